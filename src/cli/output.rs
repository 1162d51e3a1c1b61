//! What the program prints outside of the log, and the codes that it exits with.

use std::fmt::Display;
use std::io::{self, Write as _};
use std::process::ExitCode;

use crate::control::logging;

/// The command line is wrong, as with any command.
pub const EXIT_USAGE: u8 = 2;

/// The configuration is wrong (`EX_CONFIG` of BSD's sysexits).
pub const EXIT_CONFIG: u8 = 78;

/// Prints what was asked for. A reader that has seen enough and left is no failure.
pub fn print(text: &str) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            fail(1, format_args!("cannot write to standard output: {error}"))
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Says on standard error what is wrong, behind what was logged.
pub fn fail(code: u8, error: impl Display) -> ExitCode {
    logging::complain(format_args!("aegis-proxy: {error}"));
    ExitCode::from(code)
}
