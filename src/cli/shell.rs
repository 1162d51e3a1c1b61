//! `aegis-proxy completions` and `aegis-proxy man`: what a shell and a reader want of the command line.

use std::fmt::Write;
use std::io;
use std::process::ExitCode;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Arg, ArgMatches, Command};
use clap_complete::{Shell, generate};
use clap_mangen::Man;

use super::output::{fail, print};

pub(super) const COMPLETIONS: &str = "completions";
pub(super) const MAN: &str = "man";

const SHELL: &str = "shell";

pub(super) fn completions_definition() -> Command {
    Command::new(COMPLETIONS).about("Prints the completions for a shell").arg(
        Arg::new(SHELL)
            .required(true)
            .value_parser(PossibleValuesParser::new(["bash", "zsh", "fish"]))
            .help("The shell that is to complete the command line"),
    )
}

pub(super) fn man_definition() -> Command {
    Command::new(MAN).about("Prints the man page, with all variables of the environment")
}

/// Prints a script that the shell reads at its start.
pub(super) fn completions(matches: &ArgMatches) -> ExitCode {
    let Some(shell) = matches.get_one::<String>(SHELL) else { unreachable!("it is required") };
    let Ok(shell) = shell.parse::<Shell>() else { unreachable!("{shell} was accepted") };
    let mut text = Vec::new();
    generate(shell, &mut super::definition(), super::NAME, &mut text);
    // In its script for bash the library takes the hyphen of the name for the begin of a command in one
    // place of two (4.6.11), so that no command's options would be completed.
    let text = String::from_utf8_lossy(&text).replace("aegis__subcmd__proxy", "aegis__proxy");
    if shell == Shell::Fish { print(&(text + &values_for_fish())) } else { print(&text) }
}

/// What a command takes that is no option: in its script for fish the library leaves it out (4.6.11), so
/// that files would be completed.
fn values_for_fish() -> String {
    let definition = super::definition();
    let mut lines = String::new();
    for command in definition.get_subcommands() {
        for argument in command.get_positionals() {
            let values = argument.get_possible_values();
            let values: Vec<_> = values.iter().map(PossibleValue::get_name).collect();
            if !values.is_empty() {
                let (name, values) = (command.get_name(), values.join(" "));
                let when = format!("__fish_aegis_proxy_using_subcommand {name}");
                let program = super::NAME;
                // Writing to a string cannot fail.
                let _ = writeln!(lines, "complete -c {program} -n \"{when}\" -f -a \"{values}\"");
            }
        }
    }
    lines
}

/// Prints the page in the language of `man`.
pub(super) fn man(_: &ArgMatches) -> ExitCode {
    match page() {
        Ok(page) => print(&page),
        Err(error) => fail(1, error),
    }
}

const EXIT_STATUS: &str = r"
.TP
0
It was done; the proxy has drained.
.TP
1
It failed, and may not the next time.
.TP
2
The command line is wrong.
.TP
78
The configuration is wrong, or asks for what this host does not allow: all problems are told at once.
";

/// One page for all: the library would make one of each command.
fn page() -> io::Result<String> {
    let definition = super::definition();
    let commands: Vec<_> = definition.get_subcommands().cloned().collect();
    let whole = Man::new(definition);
    let mut parts = vec![
        text(|to| whole.render_title(to))?,
        text(|to| whole.render_name_section(to))?,
        text(|to| whole.render_synopsis_section(to))?,
        text(|to| whole.render_description_section(to))?,
        text(|to| whole.render_options_section(to))?,
        ".SH COMMANDS\n".to_owned(),
    ];
    for command in commands {
        let name = command.get_name().to_owned();
        let of_command = Man::new(command.bin_name(format!("{} {name}", super::NAME)));
        parts.extend([
            format!(".SS {}\n", name.replace('-', r"\-")),
            body(&text(|to| of_command.render_synopsis_section(to))?),
            ".PP\n".to_owned(),
            body(&text(|to| of_command.render_description_section(to))?),
            body(&text(|to| of_command.render_options_section(to))?),
        ]);
    }
    parts.extend([
        ".SH ENVIRONMENT\n".to_owned(),
        body(&text(|to| whole.render_extra_section(to))?),
        format!(".SH \"EXIT STATUS\"{EXIT_STATUS}"),
        text(|to| whole.render_version_section(to))?,
    ]);
    Ok(parts.concat())
}

fn text(render: impl FnOnce(&mut dyn io::Write) -> io::Result<()>) -> io::Result<String> {
    let mut text = Vec::new();
    render(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A section without its heading, and what comes before that.
fn body(section: &str) -> String {
    let mut lines = section.lines().skip_while(|line| !line.starts_with(".SH"));
    lines.next();
    lines.flat_map(|line| [line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_what_it_speaks_of() {
        let page = page().unwrap();
        for option in ["host", "probe", "admin", "route", "json", "wait", "control", "for"] {
            assert!(page.contains(&format!(r"\-\-{option}")), "{option}: {page}");
        }
        let command = ".SS log\\-level\n\\fBaegis\\-proxy log\\-level\\fR";
        assert!(page.contains(command), "{page}");
        assert!(page.contains(r"\fILEVEL|DIRECTIVES\fR"), "{page}");
        // No other page comes with it.
        assert!(!page.contains("(1)"), "{page}");
        let headings = page.lines().filter_map(|line| line.strip_prefix(".SH "));
        let expected = [
            "NAME",
            "SYNOPSIS",
            "DESCRIPTION",
            "OPTIONS",
            "COMMANDS",
            "ENVIRONMENT",
            "\"EXIT STATUS\"",
            "VERSION",
        ];
        assert_eq!(headings.collect::<Vec<_>>(), expected);
    }
}
