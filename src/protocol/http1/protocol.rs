//! What the scanners find, as a [`Protocol`].

use std::fmt::Arguments;
use std::io::{self, Write};

use super::{Method, RequestScanner, ResponseScanner, Scan};
use crate::protocol::{ErrorReply, Facts, Protocol, Reply, Request, RequestEnd, Settings, Verb};

/// One client's messages.
#[derive(Debug)]
pub struct Http1 {
    requests: RequestScanner,
    /// Finds the reply to the request that was sent last.
    responses: ResponseScanner,
}

impl Protocol for Http1 {
    const FACTS: Facts = Facts {
        commands: &Method::LABELS,
        can_be_opaque: true,
        ends_after_error: true,
        liveness_request: Some(b"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"),
        ..Facts::FRAMED
    };

    fn is_live(reply: &[u8]) -> Option<bool> {
        let whole = |line: &&[u8]| line.ends_with(b"\n");
        let mut lines = reply.split_inclusive(|&byte| byte == b'\n').filter(whole);
        loop {
            let line = lines.next()?;
            let status = line.split(u8::is_ascii_whitespace).nth(1).unwrap_or_default();
            let is_status = status.len() == 3 && status.iter().all(u8::is_ascii_digit);
            if !line.starts_with(b"HTTP/1.") || !is_status {
                return Some(false);
            }
            // Others may come ahead of the reply, asked for or not (RFC 9110, 15.2).
            if status[0] != b'1' || status == b"101" {
                return Some(matches!(status[0], b'2' | b'3'));
            }
            lines.find(|line| line.trim_ascii().is_empty())?;
        }
    }

    fn new(_: &Settings) -> Self {
        Self { requests: RequestScanner::new(), responses: ResponseScanner::new() }
    }

    fn on_request_bytes(&mut self, bytes: &[u8]) -> RequestEnd {
        match self.requests.scan(bytes) {
            Scan::Partial => RequestEnd::Partial,
            Scan::Complete(end) => RequestEnd::Whole(end),
            Scan::Tunnel(_) | Scan::Ambiguous(_) => RequestEnd::Ambiguous,
        }
    }

    /// One that is larger than what can be held is sent on as it comes, and so is one whose client
    /// expects to be asked for the body: it sends none before.
    fn is_sent_on(&self, seen: usize, held_max: usize) -> bool {
        // What is known of the last request is not to be taken for the next.
        if self.requests.is_between_requests() || !self.requests.is_head_complete() {
            return false;
        }
        let is_large = self.requests.body_len().is_some_and(|len| len > held_max as u64);
        seen >= held_max || is_large || self.requests.expects_continue()
    }

    fn request<'a>(&self, _: &'a [u8]) -> Result<Request<'a>, ErrorReply> {
        let method = self.requests.method();
        let (verb, repeatable) = (method.verb(), method.is_idempotent());
        Ok(Request { verb, key: None, repeatable, to_all: false })
    }

    fn on_sent(&mut self) {
        self.responses.begin(self.requests.method());
    }

    fn on_reply_bytes(&mut self, bytes: &[u8]) -> Reply {
        match self.responses.scan(bytes) {
            Scan::Partial => Reply::Partial,
            Scan::Complete(end) if end == bytes.len() => Reply::Complete,
            Scan::Complete(end) => Reply::Surplus(end),
            Scan::Tunnel(_) | Scan::Ambiguous(_) => Reply::Opaque,
        }
    }

    fn keeps_alive(&self) -> bool {
        self.requests.keeps_alive() && self.responses.is_reusable()
    }

    fn ends_with_connection(&self) -> bool {
        self.responses.is_until_close()
    }

    fn refuses(&self) -> bool {
        self.responses.status().is_some_and(|status| status >= 300)
    }

    fn write_error(
        error: ErrorReply,
        text: Arguments<'_>,
        space: &mut dyn Write,
    ) -> io::Result<()> {
        let status = match error {
            ErrorReply::Timeout(_) => "504 Gateway Timeout",
            ErrorReply::Lost | ErrorReply::Removed => "502 Bad Gateway",
            ErrorReply::Unfinished(_) => "408 Request Timeout",
            _ => "503 Service Unavailable",
        };
        // Without a body, so that it is right as a reply to HEAD too.
        write!(
            space,
            "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\
             Proxy-Status: aegis-proxy; details=\"{text}\"\r\n\r\n"
        )
    }
}

impl Method {
    /// Labels of the methods that are counted apart.
    const LABELS: [&str; 5] = ["get", "head", "post", "put", "delete"];

    fn verb(self) -> Verb {
        match self {
            Self::Get => const { Verb::named("get") },
            Self::Head => const { Verb::named("head") },
            Self::Post => const { Verb::named("post") },
            Self::Put => const { Verb::named("put") },
            Self::Delete => const { Verb::named("delete") },
            Self::Options | Self::Trace | Self::Connect | Self::Other => Verb::OTHER,
        }
    }
}
