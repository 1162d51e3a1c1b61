//! `aegis-proxy log-level`: shows or changes what a running proxy logs.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};

use super::control::{ask, option};
use super::output::{fail, print};
use crate::control::socket::Request;

pub(super) const NAME: &str = "log-level";

const FILTER: &str = "filter";
const FOR: &str = "for";

pub(super) fn definition() -> Command {
    Command::new(NAME)
        .about("Shows or changes what a running proxy logs")
        .arg(
            Arg::new(FILTER)
                .value_name("LEVEL|DIRECTIVES")
                .help("A filter as AEGIS_LOG takes it, such as info,aegis::io=debug"),
        )
        .arg(
            Arg::new(FOR)
                .long(FOR)
                .value_name("DURATION")
                .requires(FILTER)
                .value_parser(|text: &str| humantime::parse_duration(text))
                .help("Returns to what was before after this time, such as 10m"),
        )
        .arg(option())
}

/// Asks for it, and prints what is in force then.
pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    let time = matches.get_one::<Duration>(FOR);
    let for_ms = time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    let filter = matches.get_one::<String>(FILTER).cloned();
    match ask(matches, &Request::LogLevel { filter, for_ms }) {
        Ok(done) => print(&format!("{}\n", done.text)),
        Err(why) => fail(1, format_args!("log-level: {why}")),
    }
}
