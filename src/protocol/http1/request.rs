//! Requests.

use super::body::Body;
use super::fields::Fields;
use super::start::RequestLine;
use super::{Ambiguity, Length, Method, Scan, Step};

#[derive(Debug)]
enum Phase {
    Line,
    Fields,
    Body(Body),
    Complete,
    Ambiguous(Ambiguity),
}

/// Where requests of a stream end. What it says of a request stays until the next one begins.
#[derive(Debug)]
pub struct RequestScanner {
    phase: Phase,
    head: Length,
    line: RequestLine,
    fields: Fields,
}

impl Default for RequestScanner {
    fn default() -> Self {
        Self::new()
    }
}

impl RequestScanner {
    /// A scanner for a new connection.
    pub fn new() -> Self {
        let (line, fields) = (RequestLine::new(), Fields::new());
        Self { phase: Phase::Line, head: Length(0), line, fields }
    }

    /// Takes the bytes that follow those taken before, up to the end of a request.
    pub fn scan(&mut self, bytes: &[u8]) -> Scan {
        if matches!(self.phase, Phase::Complete) && !bytes.is_empty() {
            *self = Self::new();
        }
        match self.advance(bytes) {
            Ok(None) => Scan::Partial,
            Ok(Some(end)) => Scan::Complete(end),
            Err(ambiguity) => {
                self.phase = Phase::Ambiguous(ambiguity);
                Scan::Ambiguous(ambiguity)
            }
        }
    }

    fn advance(&mut self, bytes: &[u8]) -> Step {
        let mut at = 0;
        loop {
            let rest = &bytes[at..];
            let end = match &mut self.phase {
                Phase::Line => self.line.on_bytes(rest)?,
                Phase::Fields => self.fields.on_bytes(rest)?,
                Phase::Body(body) => body.on_bytes(rest)?,
                Phase::Complete => return Ok(None),
                Phase::Ambiguous(ambiguity) => return Err(*ambiguity),
            };
            if !self.is_head_complete() {
                self.head.add(end.unwrap_or(rest.len()))?;
            }
            let Some(end) = end else { return Ok(None) };
            at += end;
            self.phase = match self.phase {
                Phase::Line => Phase::Fields,
                Phase::Fields => self.body()?.map_or(Phase::Complete, Phase::Body),
                _ => Phase::Complete,
            };
            if matches!(self.phase, Phase::Complete) {
                return Ok(Some(at));
            }
        }
    }

    /// The body that the head announces (RFC 9112, section 6.3).
    fn body(&self) -> Result<Option<Body>, Ambiguity> {
        let framing = self.fields.framing();
        match (framing.length, framing.chunked) {
            (Some(_), true) => Err(Ambiguity::LengthAndEncoding),
            (None, true) if !self.line.is_1_1() => Err(Ambiguity::EncodingInHttp10),
            (Some(1..), _) | (_, true) if self.method() == Method::Connect => Err(Ambiguity::Body),
            (None, true) => Ok(Some(Body::chunked())),
            (None | Some(0), false) => Ok(None),
            (Some(length), false) => Ok(Some(Body::Length(length))),
        }
    }

    /// Whether no request is under way.
    pub fn is_between_requests(&self) -> bool {
        match self.phase {
            Phase::Complete => true,
            Phase::Line => self.head.0 == 0,
            _ => false,
        }
    }

    /// Whether the head is complete, so that the rest of what it says is true.
    pub fn is_head_complete(&self) -> bool {
        matches!(self.phase, Phase::Body(_) | Phase::Complete)
    }

    /// Bytes of the head, once it is complete.
    pub fn head_len(&self) -> Option<usize> {
        self.is_head_complete().then_some(self.head.0)
    }

    /// The method.
    pub fn method(&self) -> Method {
        self.line.method()
    }

    /// Whether the client wants the connection to last beyond this request.
    pub fn keeps_alive(&self) -> bool {
        self.fields.framing().keeps_alive(self.line.is_1_1())
    }

    /// Whether the connection may leave HTTP with the response: the client asks for an upgrade, or
    /// for a tunnel. Nothing may be sent behind such a request before it is answered.
    pub fn asks_for_tunnel(&self) -> bool {
        self.fields.framing().upgrade || self.method() == Method::Connect
    }

    /// Bytes of the body, where the head says so.
    pub fn body_len(&self) -> Option<u64> {
        self.fields.framing().length
    }

    /// Whether the client may hold the body back until the server says `100 Continue`.
    pub fn expects_continue(&self) -> bool {
        self.fields.framing().expects_continue
    }
}
