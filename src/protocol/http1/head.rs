//! Heads: a start line, and field lines up to the empty one.

use super::body::Body;
use super::fields::{Fields, Framing};
use super::{Ambiguity, Length, Step};

/// What a head begins with.
pub(super) trait StartLine {
    fn on_bytes(&mut self, bytes: &[u8]) -> Step;

    /// Whether its version is HTTP/1.1, and not 1.0.
    fn is_1_1(&self) -> bool;
}

#[derive(Debug)]
pub(super) struct Head<L> {
    line: L,
    line_ended: bool,
    fields: Fields,
    length: Length,
}

impl<L: StartLine> Head<L> {
    pub(super) fn new(line: L) -> Self {
        Self { line, line_ended: false, fields: Fields::new(), length: Length(0) }
    }

    pub(super) fn on_bytes(&mut self, bytes: &[u8]) -> Step {
        let mut at = 0;
        if !self.line_ended {
            let end = self.line.on_bytes(bytes)?;
            self.length.add(end.unwrap_or(bytes.len()))?;
            let Some(end) = end else { return Ok(None) };
            self.line_ended = true;
            at = end;
        }
        let rest = &bytes[at..];
        let end = self.fields.on_bytes(rest)?;
        self.length.add(end.unwrap_or(rest.len()))?;
        Ok(end.map(|end| at + end))
    }

    /// Bytes of it so far.
    pub(super) fn len(&self) -> usize {
        self.length.0
    }

    pub(super) fn line(&self) -> &L {
        &self.line
    }

    pub(super) fn framing(&self) -> &Framing {
        self.fields.framing()
    }

    /// Whether the connection lasts beyond the message.
    pub(super) fn keeps_alive(&self) -> bool {
        self.framing().keeps_alive(self.line.is_1_1())
    }

    /// The body that the fields announce, if they do (RFC 9112, section 6.3).
    pub(super) fn body(&self) -> Result<Option<Body>, Ambiguity> {
        let framing = self.framing();
        match (framing.length, framing.chunked) {
            (Some(_), true) => Err(Ambiguity::LengthAndEncoding),
            (None, true) if !self.line.is_1_1() => Err(Ambiguity::EncodingInHttp10),
            (None, true) => Ok(Some(Body::chunked())),
            (length, false) => Ok(length.map(Body::Length)),
        }
    }
}
