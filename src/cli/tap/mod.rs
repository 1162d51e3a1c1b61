//! `aegis-proxy tap`: captures what one new client of a running proxy says and is told, as a file that
//! Wireshark and tcpdump read.

mod interrupt;
mod pcap;

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command, ValueHint, value_parser};

use super::control::{ask, option};
use super::output::fail;
use super::table::plain;
use crate::control::logging;
use crate::control::socket::{Request, Tap, Tapped};
use interrupt::end_capture_by_signal;

pub(super) const NAME: &str = "tap";

/// The file that is none.
const STANDARD: &str = "-";

const FILE: &str = "file";
const ROUTE: &str = "route";
const ENDPOINT: &str = "endpoint";
const NTH: &str = "nth";
const BYTES: &str = "bytes";
const FOR: &str = "for";

pub(super) fn definition() -> Command {
    let option_of =
        |name: &'static str, value: &'static str| Arg::new(name).long(name).value_name(value);
    Command::new(NAME)
        .about("Captures what one new client says and is told, in the format of tcpdump")
        .arg(
            Arg::new(FILE)
                .value_name("FILE")
                .default_value(STANDARD)
                .value_hint(ValueHint::FilePath)
                .help("Where to write it, a file that is not there yet; -: standard output"),
        )
        .arg(option_of(ROUTE, "NAME").help("Only a client of this route"))
        .arg(option_of(ENDPOINT, "NAME").help("Only a client that this endpoint serves"))
        .arg(
            option_of(NTH, "N")
                .value_parser(value_parser!(u32).range(1..))
                .default_value("1")
                .help("The how manieth of the clients that come from now on"),
        )
        .arg(
            option_of(BYTES, "SIZE")
                .value_parser(parse_size)
                .default_value("1m")
                .help("The size of the file at most: 4k to 16m"),
        )
        .arg(
            option_of(FOR, "DURATION")
                .value_parser(|text: &str| humantime::parse_duration(text))
                .default_value("60s")
                .help("How long to wait for the client and to capture it, in all: up to 1h"),
        )
        .arg(option())
}

/// A number of bytes, of KiB with a `k` behind it, or of MiB with an `m`.
fn parse_size(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        _ => return Err("a number of bytes, or such as 64k or 1m".to_owned()),
    };
    let number = digits.parse::<usize>().map_err(|error| error.to_string())?;
    // What is too much is told by the proxy.
    Ok(number.saturating_mul(unit))
}

/// Asks for it, waits, and writes the file.
pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    match capture(matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => fail(1, format_args!("tap: {why}")),
    }
}

fn capture(matches: &ArgMatches) -> Result<(), String> {
    let (Some(path), Some(&nth), Some(&bytes), Some(&time)) = (
        matches.get_one::<String>(FILE),
        matches.get_one::<u32>(NTH),
        matches.get_one::<usize>(BYTES),
        matches.get_one::<Duration>(FOR),
    ) else {
        unreachable!("each has a default")
    };
    // First of all: what cannot be written is not captured.
    try_output(path)?;
    let tap = Tap {
        route: matches.get_one(ROUTE).cloned(),
        endpoint: matches.get_one(ENDPOINT).cloned(),
        passes: nth - 1,
        bytes,
        for_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
    };
    let done = ask(matches, &Request::Tap(tap))?;
    // Before it is said that clients are waited for: who reads that may end it.
    let watched = done.stream().and_then(end_capture_by_signal);
    watched.map_err(|error| format!("cannot wait for signals: {error}"))?;
    logging::complain(&done.text);
    let (tapped, records) = done.tapped(time)?;
    write(path, &tapped, &records)?;
    logging::complain(plain(&tapped.summary));
    Ok(())
}

/// Makes the file, which is not to be there: nothing is overwritten, no link is followed, and nobody else
/// may read it.
fn create(path: &str) -> Result<File, String> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.map_err(|error| format!("{path}: {error}"))
}

/// Finds out whether it can be written. Nothing is left behind by who is killed meanwhile.
fn try_output(path: &str) -> Result<(), String> {
    if path == STANDARD {
        let is_shown = io::stdout().is_terminal();
        let why = "it is no text for a terminal: name a file, or a program by a pipe";
        return if is_shown { Err(why.to_owned()) } else { Ok(()) };
    }
    create(path)?;
    fs::remove_file(path).map_err(|error| format!("{path}: {error}"))
}

fn write(path: &str, tapped: &Tapped, records: &[u8]) -> Result<(), String> {
    let written = match path {
        STANDARD => match pcap::write(io::stdout().lock(), tapped, records) {
            // As with all that is printed: its reader has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written,
        },
        path => {
            let written = pcap::write(create(path)?, tapped, records);
            // A part of it would look like all that there was.
            written.inspect_err(|_| drop(fs::remove_file(path)))
        }
    };
    written.map_err(|error| format!("{path}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_read_with_its_unit() {
        for (text, size) in [
            ("4096", Some(4096)),
            ("64k", Some(64 << 10)),
            ("1MiB", Some(1 << 20)),
            ("16m", Some(16 << 20)),
        ] {
            assert_eq!(parse_size(text).ok(), size, "{text}");
        }
        for text in ["", "m", "-1", "1g", "1.5m", "k1", "ä"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
