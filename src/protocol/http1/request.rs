//! Requests.

use super::body::Body;
use super::head::Head;
use super::start::RequestLine;
use super::{Ambiguity, Method, Scan, Step};

#[derive(Debug)]
enum Phase {
    Head,
    Body(Body),
    Complete,
    Ambiguous(Ambiguity),
}

/// Where requests of a stream end. What it says of a request stays until the next one begins.
#[derive(Debug)]
pub struct RequestScanner {
    phase: Phase,
    head: Head<RequestLine>,
}

impl Default for RequestScanner {
    fn default() -> Self {
        Self::new()
    }
}

impl RequestScanner {
    /// A scanner for a new connection.
    pub fn new() -> Self {
        Self { phase: Phase::Head, head: Head::new(RequestLine::new()) }
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
                Phase::Head => self.head.on_bytes(rest)?,
                Phase::Body(body) => body.on_bytes(rest)?,
                Phase::Complete => return Ok(None),
                Phase::Ambiguous(ambiguity) => return Err(*ambiguity),
            };
            let Some(end) = end else { return Ok(None) };
            at += end;
            self.phase = match self.phase {
                Phase::Head => self.body()?.map_or(Phase::Complete, Phase::Body),
                _ => Phase::Complete,
            };
            if matches!(self.phase, Phase::Complete) {
                return Ok(Some(at));
            }
        }
    }

    /// The body that follows the head.
    fn body(&self) -> Result<Option<Body>, Ambiguity> {
        match self.head.body()? {
            None | Some(Body::Length(0)) => Ok(None),
            Some(_) if self.method() == Method::Connect => Err(Ambiguity::Body),
            body => Ok(body),
        }
    }

    /// Whether no request is under way.
    pub fn is_between_requests(&self) -> bool {
        match self.phase {
            Phase::Complete => true,
            Phase::Head => self.head.len() == 0,
            _ => false,
        }
    }

    /// Whether the head is complete, so that the rest of what it says is true.
    pub fn is_head_complete(&self) -> bool {
        matches!(self.phase, Phase::Body(_) | Phase::Complete)
    }

    /// Bytes of the head, once it is complete.
    pub fn head_len(&self) -> Option<usize> {
        self.is_head_complete().then_some(self.head.len())
    }

    /// The method.
    pub fn method(&self) -> Method {
        self.head.line().method()
    }

    /// Whether the client wants the connection to last beyond this request.
    pub fn keeps_alive(&self) -> bool {
        self.head.keeps_alive()
    }

    /// Whether the connection may leave HTTP with the response: the client asks for an upgrade, or
    /// for a tunnel. Nothing may be sent behind such a request before it is answered.
    pub fn asks_for_tunnel(&self) -> bool {
        self.head.framing().upgrade || self.method() == Method::Connect
    }

    /// Bytes of the body, where the head says so.
    pub fn body_len(&self) -> Option<u64> {
        self.head.framing().length
    }

    /// Whether the client may hold the body back until the server says `100 Continue`.
    pub fn expects_continue(&self) -> bool {
        self.head.framing().expects_continue
    }
}
