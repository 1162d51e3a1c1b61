//! Anything: where its messages end nobody can tell, so each client has connections of its own.

use std::fmt::Arguments;
use std::io::{self, Write};

use super::{ErrorReply, Facts, Protocol, Reply, Request, RequestEnd, Settings, Verb};

/// Bytes that are passed on as they are.
#[derive(Debug)]
pub struct Tcp;

impl Protocol for Tcp {
    const FACTS: Facts = Facts { is_framed: false, can_be_opaque: true, ..Facts::FRAMED };

    fn new(_: &Settings) -> Self {
        Self
    }

    fn on_request_bytes(&mut self, _: &[u8]) -> RequestEnd {
        RequestEnd::Ambiguous
    }

    fn request<'a>(&self, _: &'a [u8]) -> Result<Request<'a>, ErrorReply> {
        Ok(Request { verb: Verb::OPAQUE, key: None, repeatable: false, to_all: false })
    }

    fn on_reply_bytes(&mut self, _: &[u8]) -> Reply {
        Reply::Opaque
    }

    /// There are no words that any client would take for an error.
    fn write_error(_: ErrorReply, _: Arguments<'_>, _: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }
}
