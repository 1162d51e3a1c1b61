//! Responses.

use super::body::Body;
use super::head::Head;
use super::start::StatusLine;
use super::{Ambiguity, Method, Scan};

#[derive(Debug)]
enum Phase {
    /// No request was sent, or it is answered.
    Silent,
    Head,
    Body(Body),
    Tunnel,
    Ambiguous(Ambiguity),
}

/// What follows a head.
enum Next {
    Nothing,
    Body(Body),
    /// This was an interim response.
    Response,
    Tunnel,
}

/// Where the response to the one request under way ends. What it says of a response stays until the
/// next request.
#[derive(Debug)]
pub struct ResponseScanner {
    phase: Phase,
    method: Method,
    /// Bytes of any response to the request were seen.
    begun: bool,
    head: Head<StatusLine>,
}

impl Default for ResponseScanner {
    fn default() -> Self {
        Self::new()
    }
}

impl ResponseScanner {
    /// A scanner for a connection on which no request was sent yet.
    pub fn new() -> Self {
        let (phase, method) = (Phase::Silent, Method::Other);
        Self { phase, method, begun: false, head: Head::new(StatusLine::new()) }
    }

    /// A request was sent: a response follows. Its method decides how that is framed.
    pub fn begin(&mut self, method: Method) {
        *self = Self { phase: Phase::Head, method, ..Self::new() };
    }

    /// Takes the bytes that follow those taken before, up to the end of the final response.
    pub fn scan(&mut self, bytes: &[u8]) -> Scan {
        self.begun |= !bytes.is_empty();
        self.advance(bytes).unwrap_or_else(|ambiguity| {
            self.phase = Phase::Ambiguous(ambiguity);
            Scan::Ambiguous(ambiguity)
        })
    }

    fn advance(&mut self, bytes: &[u8]) -> Result<Scan, Ambiguity> {
        let mut at = 0;
        loop {
            let rest = &bytes[at..];
            let end = match &mut self.phase {
                Phase::Head => self.head.on_bytes(rest)?,
                Phase::Body(body) => body.on_bytes(rest)?,
                Phase::Ambiguous(ambiguity) => return Err(*ambiguity),
                Phase::Tunnel => return Ok(Scan::Tunnel(0)),
                Phase::Silent if rest.is_empty() => None,
                Phase::Silent => return Err(Ambiguity::Unsolicited),
            };
            let Some(end) = end else { return Ok(Scan::Partial) };
            at += end;
            let next = match self.phase {
                Phase::Head => self.next()?,
                _ => Next::Nothing,
            };
            match next {
                Next::Body(body) => self.phase = Phase::Body(body),
                Next::Response => self.begin_next_head(),
                Next::Nothing => {
                    self.phase = Phase::Silent;
                    return Ok(Scan::Complete(at));
                }
                Next::Tunnel => {
                    self.phase = Phase::Tunnel;
                    return Ok(Scan::Tunnel(at));
                }
            }
        }
    }

    fn begin_next_head(&mut self) {
        self.begin(self.method);
        self.begun = true;
    }

    /// What follows the head.
    fn next(&self) -> Result<Next, Ambiguity> {
        let status = self.head.line().status();
        if status == 101 || self.method == Method::Connect && (200..300).contains(&status) {
            return Ok(Next::Tunnel);
        }
        let body = self.head.body()?;
        let is_announced = !matches!(body, None | Some(Body::Length(0)));
        match body {
            _ if matches!(status, 100..200 | 204) && is_announced => Err(Ambiguity::Body),
            _ if status < 200 => Ok(Next::Response),
            _ if matches!(status, 204 | 304) || self.method == Method::Head => Ok(Next::Nothing),
            Some(Body::Length(0)) => Ok(Next::Nothing),
            Some(body) => Ok(Next::Body(body)),
            None => Ok(Next::Body(Body::UntilClose)),
        }
    }

    /// Whether any byte of a response to the request was seen: it must not be sent again.
    pub fn has_begun(&self) -> bool {
        self.begun
    }

    /// The status, once there is one; that of an interim response until the next one begins.
    pub fn status(&self) -> Option<u16> {
        Some(self.head.line().status()).filter(|&status| status >= 100)
    }

    /// Whether the body lasts until the connection closes: its end is then the response's.
    pub fn is_until_close(&self) -> bool {
        matches!(self.phase, Phase::Body(Body::UntilClose))
    }

    /// Whether the response is complete and its server takes another request on the connection,
    /// provided that nothing followed the response.
    pub fn is_reusable(&self) -> bool {
        let is_answered = matches!(self.phase, Phase::Silent) && self.begun;
        is_answered && self.head.keeps_alive()
    }
}
