//! The command line. All configuration of the proxy is in the environment, and the help tells about
//! it; options are for commands that ask a running one. To run the proxy is what `main` does; the rest
//! is here, one file for each command.

mod admin;
mod check;
mod control;
mod drain;
mod endpoints;
mod healthcheck;
mod help;
mod host;
mod log_level;
mod output;
mod setting;
mod shell;
mod signals;
mod table;
mod tap;
mod top;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::ArgMatches;

pub use check::{Check, check};
pub use output::{EXIT_CONFIG, EXIT_USAGE, fail, print};

const NAME: &str = "aegis-proxy";

/// What the program is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Run the proxy.
    Run,
    /// Check the configuration, print what is in force, and exit.
    Check(Check),
    /// Do something that needs no configuration.
    Tool(Tool),
}

/// A command for which there need be no configuration, such as those that ask a running proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    name: &'static str,
    matches: ArgMatches,
}

/// Each of them: its name, what it takes, and what it does.
type ToolRow = (&'static str, fn() -> clap::Command, fn(&ArgMatches) -> ExitCode);

const TOOLS: &[ToolRow] = &[
    (healthcheck::NAME, healthcheck::definition, healthcheck::run),
    (endpoints::NAME, endpoints::definition, endpoints::run),
    (top::NAME, top::definition, top::run),
    (drain::NAME, drain::definition, drain::run),
    (log_level::NAME, log_level::definition, log_level::run),
    (tap::NAME, tap::definition, tap::run),
    (shell::COMPLETIONS, shell::completions_definition, shell::completions),
    (shell::MAN, shell::man_definition, shell::man),
];

impl Tool {
    /// Does it, and says how to exit.
    pub fn run(&self) -> ExitCode {
        let row = TOOLS.iter().find(|(name, ..)| *name == self.name);
        let Some((.., run)) = row else { unreachable!("{} was parsed", self.name) };
        run(&self.matches)
    }
}

/// Reads the command line, the program's name first.
///
/// # Errors
/// It asks for the help or the version, or makes no sense; the error is what to print.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, clap::Error> {
    let mut matches = definition().try_get_matches_from(args)?;
    let Some((name, matches)) = matches.remove_subcommand() else { return Ok(Command::Run) };
    let tool = TOOLS.iter().find(|(tool, ..)| *tool == name);
    Ok(match tool {
        Some(&(name, ..)) => Command::Tool(Tool { name, matches }),
        None => Command::Check(Check::of(&matches)),
    })
}

fn definition() -> clap::Command {
    clap::Command::new(NAME)
        .version(env!("CARGO_PKG_VERSION"))
        .about("A Layer 4 TCP proxy and connection pooler for the sidecar of a database's clients")
        .override_usage("aegis-proxy [COMMAND]")
        .after_help(help::environment())
        .disable_help_subcommand(true)
        .subcommand(check::definition())
        .subcommands(TOOLS.iter().map(|(_, definition, _)| definition()))
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
        assert_eq!(parse(&["check"]).unwrap(), Command::Check(Check { host: false }));
        let with_host = Command::Check(Check { host: true });
        assert_eq!(parse(&["check", "--host"]).unwrap(), with_host);
    }

    #[test]
    fn what_is_no_command_is_refused() {
        for args in [
            &["run"][..],
            &["--port", "1"],
            &["check", "it"],
            &[""],
            &["healthcheck", "--probe", "x"],
            &["endpoints", "--port", "1"],
            &["tap", "--bytes", "much"],
            &["tap", "--nth", "0"],
        ] {
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
