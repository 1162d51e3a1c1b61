//! Chronos: text lines that end in `\n`, one reply per request, in order.
//!
//! The server takes each read as one command and decodes it as text before it splits it. So a line
//! is sent whole, and white space is what Unicode calls so.

mod request;
#[cfg(test)]
mod tests;

use std::fmt::Arguments;
use std::io::{self, Write};

pub use request::{Command, LINE_MAX, LineEnd, Request, RequestScanner};

use super::{Answers, ErrorReply, Facts, Protocol, Reply, RequestEnd, Settings, Verb};

/// One client's lines.
#[derive(Debug)]
pub struct Chronos {
    lines: RequestScanner,
    /// The line that ended last was too long.
    is_too_long: bool,
    settings: Settings,
}

impl Protocol for Chronos {
    const FACTS: Facts = Facts {
        commands: &Command::LABELS,
        has_keys: true,
        can_refuse: true,
        variables: &["AEGIS_LINE_MAX", "AEGIS_REPEAT_WRITES"],
        liveness_request: Some(b"PING\n"),
        ..Facts::FRAMED
    };

    fn new(&settings: &Settings) -> Self {
        let lines = RequestScanner::new(settings.line_max);
        Self { lines, is_too_long: false, settings }
    }

    fn peek_max(settings: &Settings) -> usize {
        settings.line_max
    }

    fn on_request_bytes(&mut self, bytes: &[u8]) -> RequestEnd {
        let (end, is_too_long) = match self.lines.on_bytes(bytes) {
            None => return RequestEnd::Partial,
            Some(LineEnd::Whole(end)) => (end, false),
            Some(LineEnd::TooLong(end)) => (end, true),
        };
        self.is_too_long = is_too_long;
        RequestEnd::Whole(end)
    }

    fn is_refused(&self) -> bool {
        self.lines.is_too_long()
    }

    fn request<'a>(&self, line: &'a [u8]) -> Result<super::Request<'a>, ErrorReply> {
        if self.is_too_long {
            return Err(ErrorReply::TooLong(self.settings.line_max));
        }
        let Request { command, key } = Request::parse(line).ok_or(ErrorReply::Blank)?;
        let repeats = command.is_write() && self.settings.repeat_writes;
        Ok(super::Request {
            verb: command.verb(),
            key,
            repeatable: command.is_repeatable() || repeats,
            to_all: command == Command::Compact,
        })
    }

    fn on_reply_bytes(&mut self, bytes: &[u8]) -> Reply {
        reply(bytes)
    }

    fn write_error(_: ErrorReply, text: Arguments<'_>, space: &mut dyn Write) -> io::Result<()> {
        writeln!(space, "ERR {text}")
    }

    fn is_live(reply: &[u8]) -> Option<bool> {
        let end = reply.iter().position(|&byte| byte == b'\n')?;
        Some(reply[..end].trim_ascii_end() == b"PONG")
    }

    fn is_success(reply: &[u8]) -> bool {
        reply.trim_ascii_end() == b"OK_COMPACTED"
    }

    fn write_combined(answers: &Answers<'_>, space: &mut dyn Write) -> io::Result<()> {
        if answers.failed == 0 {
            return writeln!(space, "OK_COMPACTED");
        }
        write!(space, "ERR_COMPACT {} of {} stores failed", answers.failed, answers.stores)?;
        if !answers.away.is_empty() {
            write!(space, ", not available: {}", answers.away)?;
        }
        if answers.away_unnamed > 0 {
            write!(space, " and {} more", answers.away_unnamed)?;
        }
        if let Some(text) = answers.first_failure {
            let which = if answers.away.is_empty() { "the first" } else { "the first other" };
            write!(space, ", {which} with: {}", String::from_utf8_lossy(text))?;
        }
        writeln!(space)
    }
}

impl Command {
    /// Labels of the commands that are counted apart.
    const LABELS: [&str; 5] = ["ping", "get", "set", "del", "compact"];

    fn verb(self) -> Verb {
        match self {
            Self::Ping => const { Verb::named("ping") },
            Self::Get => const { Verb::named("get") },
            Self::Set => const { Verb::named("set") },
            Self::Del => const { Verb::named("del") },
            Self::Compact => const { Verb::named("compact") },
            Self::Other => Verb::OTHER,
        }
    }
}

/// Judges the bytes that follow those judged before.
pub fn reply(bytes: &[u8]) -> Reply {
    match bytes.iter().position(|&byte| byte == b'\n').map(|at| at + 1) {
        None => Reply::Partial,
        Some(end) if end == bytes.len() => Reply::Complete,
        Some(end) => Reply::Surplus(end),
    }
}
