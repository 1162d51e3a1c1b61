//! `aegis-proxy completions` and `aegis-proxy man`: what a shell and a reader want of the command line.

use std::process::ExitCode;

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgMatches, Command};
use clap_complete::{Shell, generate};

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
    print(&text)
}

/// Prints the page in the language of `man`.
pub(super) fn man(_: &ArgMatches) -> ExitCode {
    let mut text = Vec::new();
    match clap_mangen::Man::new(super::definition()).render(&mut text) {
        Ok(()) => print(&String::from_utf8_lossy(&text)),
        Err(error) => fail(1, error),
    }
}
