//! `aegis-proxy drain`: has a running proxy drain and end, as SIGTERM does.

use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::control::{ask, option};
use super::output::{fail, print};
use crate::control::socket::Request;

pub(super) const NAME: &str = "drain";

const WAIT: &str = "wait";

pub(super) fn definition() -> Command {
    Command::new(NAME)
        .about("Has a running proxy drain and end, as SIGTERM does; a second time changes nothing")
        .arg(
            Arg::new(WAIT)
                .long(WAIT)
                .action(ArgAction::SetTrue)
                .help("Waits until the process has ended"),
        )
        .arg(option())
}

/// Asks for it, and waits where that is wanted.
pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    let wait = matches.get_flag(WAIT);
    let done = match ask(matches, &Request::Drain { wait }) {
        Ok(done) => done,
        Err(why) => return fail(1, format_args!("drain: {why}")),
    };
    let code = print(&format!("{}\n", done.text));
    if !wait || code != ExitCode::SUCCESS {
        return code;
    }
    match done.wait() {
        Ok(()) => print("ended\n"),
        Err(why) => fail(1, format_args!("drain: {why}")),
    }
}
