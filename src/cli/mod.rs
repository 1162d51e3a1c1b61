//! The command line. There are no options: all configuration is in the environment, and the help
//! tells about it. To run the proxy is what `main` does; the rest is here, one file for each thing.

mod check;
mod help;
mod output;

use std::ffi::OsString;

pub use check::check;
pub use output::{EXIT_CONFIG, EXIT_USAGE, fail, print};

const CHECK: &str = "check";

/// What the program is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Run the proxy.
    Run,
    /// Check the configuration, print what is in force, and exit.
    Check,
}

/// Reads the command line, the program's name first.
///
/// # Errors
/// It asks for the help or the version, or makes no sense; the error is what to print.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, clap::Error> {
    let matches = definition().try_get_matches_from(args)?;
    Ok(match matches.subcommand_name() {
        Some(CHECK) => Command::Check,
        _ => Command::Run,
    })
}

fn definition() -> clap::Command {
    clap::Command::new("aegis-proxy")
        .version(env!("CARGO_PKG_VERSION"))
        .about("A Layer 4 TCP proxy and connection pooler for the sidecar of a database's clients")
        .override_usage("aegis-proxy [check]")
        .after_help(help::environment())
        .disable_help_subcommand(true)
        .subcommand(
            clap::Command::new(CHECK)
                .about("Checks the configuration, prints what is in force, and exits"),
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VARIABLES;

    fn parse(args: &[&str]) -> Result<Command, clap::Error> {
        super::parse(["aegis-proxy"].iter().chain(args).map(OsString::from))
    }

    #[test]
    fn without_arguments_the_proxy_runs() {
        definition().debug_assert();
        assert_eq!(parse(&[]).unwrap(), Command::Run);
        assert_eq!(parse(&["check"]).unwrap(), Command::Check);
    }

    #[test]
    fn what_is_no_command_is_refused() {
        for args in [&["run"][..], &["--port", "1"], &["check", "it"], &[""]] {
            let error = parse(args).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{error}");
        }
    }

    #[test]
    fn the_version_is_the_packages() {
        let version = parse(&["--version"]).unwrap_err();
        assert_eq!(version.exit_code(), 0);
        assert_eq!(version.to_string(), concat!("aegis-proxy ", env!("CARGO_PKG_VERSION"), "\n"));
    }

    #[test]
    fn the_help_tells_of_every_variable_within_100_columns() {
        let help = parse(&["--help"]).unwrap_err();
        assert_eq!(help.exit_code(), 0);
        let help = help.to_string();
        for variable in VARIABLES.iter() {
            for line in [
                format!("  {}={}", variable.name, variable.default),
                format!("      {}", variable.help),
                format!("      Accepts {}.", variable.accepts()),
            ] {
                assert!(help.lines().any(|l| l == line), "{line}\n{help}");
            }
        }
        let (of_routes, of_process) =
            (help.find("Of each route").unwrap(), help.find("Of the process").unwrap());
        let at = |name| help.find(&format!("\n  {name}=")).unwrap();
        assert!(
            at("AEGIS_ROUTES") < of_routes && (of_routes..of_process).contains(&at("AEGIS_LISTEN"))
        );
        assert!(at("AEGIS_WORKERS") > of_process);
        for line in help.lines() {
            assert!(line.chars().count() <= 100, "{line}");
        }
    }
}
