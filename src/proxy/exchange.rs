//! A client whose requests are told apart, so that it shares backend connections with others.
//!
//! ```text
//! Reading ──whole request──▶ Ready ──a connection is free──▶ Asked ──answered──▶ Reading
//!    ▲                       │   ▲                            │
//!    │                       ▼   └──connection lost: again────┤
//!    │                    Waiting                             │
//!    └──────────error to the client: no connection, no answer─┘
//! ```
//!
//! One request of a client is under way at a time; those that it sends ahead wait in its input. So
//! replies come in the order of the requests. The bytes of a request that can be repeated stay at
//! the front of the input until the first byte of its answer.

use std::fmt;
use std::io::Write;
use std::time::{Duration, Instant};

use super::route::StableHash;
use super::session::Tried;
use crate::io::buffers::Buffers;
use crate::io::{Chain, ConnId};
use crate::telemetry::{CloseReason, Outcome, Verb};
use crate::wire::chronos::{self, Command, LineEnd, RequestScanner};

/// What is at the front of a client's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// Nothing, or a request that goes on.
    Partial,
    /// So many bytes that no backend may see: they are answered with an error.
    Refused(u32, Fault),
    /// A whole request.
    Request(Request),
}

/// A request, as far as it is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What it asks for.
    pub verb: Verb,
    /// The hash of the key that it is about.
    pub key: Option<StableHash>,
    /// Whether it may be sent again when its answer was lost.
    pub repeatable: bool,
    /// How many bytes of the input it is.
    pub len: u32,
}

/// What a client is told in place of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The line holds nothing but white space.
    Blank,
    /// The line is longer than this many bytes.
    TooLong(usize),
    /// Too many requests wait already.
    QueueFull,
    /// No connection became free in this time.
    QueueTimeout(Duration),
    /// The endpoint that holds the key is out of use.
    Unreachable,
    /// The backend did not answer in this time.
    Timeout(Duration),
    /// The backend's connection ended first.
    Lost,
}

impl Fault {
    /// How the request counts.
    pub fn outcome(self) -> Outcome {
        match self {
            Self::Blank | Self::TooLong(_) => Outcome::Refused,
            Self::QueueFull => Outcome::QueueFull,
            Self::QueueTimeout(_) => Outcome::QueueTimeout,
            Self::Unreachable => Outcome::Unreachable,
            Self::Timeout(_) => Outcome::Timeout,
            Self::Lost => Outcome::Lost,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blank => f.write_str("empty request"),
            Self::TooLong(max) => write!(f, "request longer than {max} bytes"),
            Self::QueueFull => f.write_str("too many requests wait for a connection"),
            Self::QueueTimeout(limit) => write!(f, "no backend connection was free in {limit:?}"),
            Self::Unreachable => f.write_str("the store that holds the key cannot be reached"),
            Self::Timeout(limit) => {
                write!(f, "no answer in {limit:?}; the request may have taken effect")
            }
            Self::Lost => {
                f.write_str("connection to the backend lost; the request may have taken effect")
            }
        }
    }
}

/// Writes a fault as the protocol says it. Returns its length.
pub fn write_fault(fault: Fault, mut space: &mut [u8]) -> usize {
    let before = space.len();
    // It is far shorter than a buffer.
    let _ = writeln!(space, "ERR {fault}");
    before - space.len()
}

/// A backend connection in a client's hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loan {
    /// The connection.
    pub conn: ConnId,
    /// The endpoint that it goes to.
    pub endpoint: u16,
    /// When it is too old to be kept.
    pub retire_at: Option<Instant>,
}

/// What part of a backend's bytes is the answer, and what follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// All of them, and it goes on.
    Partial,
    /// All of them, and it is over: the connection is silent again.
    Complete,
    /// It ended after this many: the rest was not asked for, so the connection is of no more use.
    Surplus(usize),
}

/// What to do about a lost connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// The client had no request on it.
    Idle,
    /// The request is to be sent again.
    Repeat,
    /// The client is told.
    Fail,
    /// The client has a part of the answer: it can only be cut off.
    CutOff,
}

/// Time limits of a client.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Without a byte in either direction, and without a request.
    pub idle: Option<Duration>,
    /// With its direction ended, until it has taken all answers.
    pub half_close: Option<Duration>,
    /// A request's wait for a connection.
    pub queue: Duration,
    /// An answer.
    pub request: Option<Duration>,
}

/// What has become due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Nothing yet.
    Nothing,
    /// The request is to be given up.
    GiveUp(Fault),
    /// The client is to be closed.
    Close(CloseReason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Reading,
    Ready,
    Waiting,
    Asked,
}

/// The request under way.
#[derive(Debug, Clone, Copy)]
struct Exchange {
    request: Request,
    tried: Tried,
    since: Instant,
    asked: Instant,
    replied: bool,
}

/// A client and the request that is under way for it.
#[allow(
    clippy::struct_excessive_bools,
    reason = "independent facts, each told by the driver or the client"
)]
#[derive(Debug)]
pub struct Client {
    /// Its connection.
    pub conn: ConnId,
    /// What it has sent and what is not done with.
    pub input: Chain,
    /// The connection that it holds, if any.
    pub loan: Option<Loan>,
    /// Set while it is in the list of those to be looked at.
    pub due: bool,
    /// Whether it is received from.
    pub receiving: bool,
    /// Whether its backend is, while it holds one.
    pub backend_receiving: bool,
    /// When its timer fires.
    pub timer: Option<Instant>,
    /// Answers that a request to all stores has brought so far.
    pub sweep: Option<Box<Sweep>>,
    /// Marks the load estimator's window in which it was last counted as active.
    pub window: u32,
    scanner: RequestScanner,
    /// Bytes of the input that the scanner has seen.
    scanned: u32,
    line_max: usize,
    repeat_writes: bool,
    state: State,
    exchange: Option<Exchange>,
    /// Bytes on their way to it.
    unsent: u32,
    ended: bool,
    opened: Instant,
    active: Instant,
}

impl Client {
    /// A client just accepted.
    pub fn new(conn: ConnId, line_max: usize, repeat_writes: bool, now: Instant) -> Self {
        Self {
            conn,
            input: Chain::default(),
            loan: None,
            due: false,
            receiving: false,
            backend_receiving: true,
            timer: None,
            sweep: None,
            window: 0,
            scanner: RequestScanner::new(line_max),
            scanned: 0,
            line_max,
            repeat_writes,
            state: State::Reading,
            exchange: None,
            unsent: 0,
            ended: false,
            opened: now,
            active: now,
        }
    }

    /// How long ago it was accepted.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.opened)
    }

    /// Bytes on their way to it.
    pub fn unsent(&self) -> u32 {
        self.unsent
    }

    /// Bytes of the input behind the request under way.
    pub fn ahead(&self) -> u32 {
        self.input.bytes() - self.exchange.map_or(0, |exchange| exchange.request.len)
    }

    /// The request under way.
    pub fn request(&self) -> Option<Request> {
        self.exchange.map(|exchange| exchange.request)
    }

    /// The endpoints that were tried for it.
    pub fn tried(&self) -> Tried {
        self.exchange.map_or_else(Tried::default, |exchange| exchange.tried)
    }

    /// Whether no request is under way.
    pub fn is_reading(&self) -> bool {
        self.state == State::Reading
    }

    /// Whether a request is to be sent or to join the queue.
    pub fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    /// Whether an answer is expected.
    pub fn is_asked(&self) -> bool {
        self.state == State::Asked
    }

    /// Whether it has ended its direction and is owed nothing more.
    pub fn is_finished(&self) -> bool {
        self.ended && self.state == State::Reading && self.unsent == 0
    }

    /// Bytes arrived from it.
    pub fn on_active(&mut self, now: Instant) {
        self.active = now;
    }

    /// It ended its direction: a request that is not whole will never be.
    pub fn on_ended(&mut self, now: Instant) {
        self.ended = true;
        self.active = now;
    }

    /// Bytes were queued for it.
    pub fn on_queued(&mut self, bytes: u32) {
        self.unsent += bytes;
    }

    /// Its socket took bytes.
    pub fn on_sent(&mut self, bytes: u32, now: Instant) {
        self.unsent = self.unsent.saturating_sub(bytes);
        self.active = now;
    }

    /// Looks for a request at the front of the input. `scratch` holds a line of the greatest
    /// length, for one that lies in several buffers.
    pub fn front(&mut self, buffers: &mut Buffers, scratch: &mut [u8]) -> Front {
        let (mut seen, mut skip) = (self.scanned, self.scanned as usize);
        let mut end = None;
        for slice in buffers.slices(&self.input) {
            let fresh = &slice[skip.min(slice.len())..];
            skip = skip.saturating_sub(slice.len());
            end = self.scanner.on_bytes(fresh);
            match end {
                Some(LineEnd::Whole(count) | LineEnd::TooLong(count)) => {
                    seen += count as u32;
                    break;
                }
                None => seen += fresh.len() as u32,
            }
        }
        self.scanned = if end.is_some() { 0 } else { seen };
        match end {
            Some(LineEnd::Whole(_)) => self.understand(seen, buffers, scratch),
            Some(LineEnd::TooLong(_)) => Front::Refused(seen, Fault::TooLong(self.line_max)),
            None => {
                if self.scanner.is_too_long() {
                    buffers.clear(&mut self.input);
                    self.scanned = 0;
                }
                Front::Partial
            }
        }
    }

    fn understand(&self, len: u32, buffers: &Buffers, scratch: &mut [u8]) -> Front {
        let line = buffers.front(&self.input, len as usize, scratch);
        let Some(request) = chronos::Request::parse(line) else {
            return Front::Refused(len, Fault::Blank);
        };
        let verb = match request.command {
            Command::Ping => Verb::Ping,
            Command::Get => Verb::Get,
            Command::Set => Verb::Set,
            Command::Del => Verb::Del,
            Command::Compact => Verb::Compact,
            Command::Other => Verb::Other,
        };
        let write = matches!(verb, Verb::Set | Verb::Del);
        Front::Request(Request {
            verb,
            key: request.key.map(StableHash::of),
            repeatable: request.command.is_repeatable() || (write && self.repeat_writes),
            len,
        })
    }

    /// The request found at the front is under way from now on.
    pub fn begin(&mut self, request: Request, now: Instant) {
        debug_assert!(self.is_reading());
        self.state = State::Ready;
        self.exchange = Some(Exchange {
            request,
            tried: Tried::default(),
            since: now,
            asked: now,
            replied: false,
        });
    }

    /// The request has joined the queue.
    pub fn on_waiting(&mut self) {
        self.state = State::Waiting;
    }

    /// A request that waits is to be placed again. Says whether there is one.
    pub fn on_placed_again(&mut self) -> bool {
        let waits = self.state == State::Waiting;
        if waits {
            self.state = State::Ready;
        }
        waits
    }

    /// The request is sent on the connection that the client holds. Returns how long it waited.
    pub fn on_asked(&mut self, now: Instant) -> Duration {
        self.state = State::Asked;
        let Some(exchange) = &mut self.exchange else { return Duration::ZERO };
        exchange.asked = now;
        if let Some(loan) = self.loan {
            exchange.tried.push(loan.endpoint);
        }
        now.saturating_duration_since(exchange.since)
    }

    /// Bytes arrived from its backend while an answer was expected.
    pub fn on_reply(&mut self, bytes: &[u8], now: Instant) -> Reply {
        self.active = now;
        if let Some(exchange) = &mut self.exchange {
            exchange.replied = true;
        }
        match chronos::reply(bytes) {
            chronos::Reply::Partial => Reply::Partial,
            chronos::Reply::Complete => Reply::Complete,
            chronos::Reply::Surplus(count) => Reply::Surplus(count),
        }
    }

    /// Its backend's connection ended or broke. `attempts_max` bounds how often a request is sent.
    pub fn on_lost(&mut self, attempts_max: u32) -> Lost {
        self.loan = None;
        let Some(exchange) = &self.exchange else { return Lost::Idle };
        if self.state != State::Asked {
            return Lost::Idle;
        }
        if exchange.replied && self.sweep.is_none() {
            return Lost::CutOff;
        }
        let again = exchange.request.repeatable && exchange.tried.attempts() < attempts_max;
        if again {
            self.state = State::Ready;
            return Lost::Repeat;
        }
        Lost::Fail
    }

    /// Whether the client has a part of the answer to its request.
    pub fn has_part(&self) -> bool {
        self.sweep.is_none() && self.exchange.is_some_and(|exchange| exchange.replied)
    }

    /// The request goes to the next store of several: once more ready to be sent.
    pub fn on_next_store(&mut self, now: Instant) {
        self.state = State::Ready;
        if let Some(exchange) = &mut self.exchange {
            exchange.tried = Tried::default();
            exchange.since = now;
            exchange.replied = false;
        }
    }

    /// The request is over; the client reads on. Returns it, and how long it took.
    pub fn finish(&mut self, buffers: &mut Buffers, now: Instant) -> Option<(Request, Duration)> {
        self.state = State::Reading;
        self.sweep = None;
        let Exchange { request, since, .. } = self.exchange.take()?;
        buffers.advance(&mut self.input, request.len);
        Some((request, now.saturating_duration_since(since)))
    }

    /// When the client has to be looked at next.
    pub fn deadline(&self, limits: &Limits) -> Option<Instant> {
        match (self.state, &self.exchange) {
            (State::Ready | State::Waiting, Some(exchange)) => Some(exchange.since + limits.queue),
            (State::Asked, Some(exchange)) => limits.request.map(|limit| exchange.asked + limit),
            _ if self.ended => limits.half_close.map(|limit| self.active + limit),
            _ => limits.idle.map(|limit| self.active + limit),
        }
    }

    /// The time of [`Client::deadline`] may have come.
    pub fn on_deadline(&self, limits: &Limits, now: Instant) -> Due {
        if self.deadline(limits).is_none_or(|deadline| now < deadline) {
            return Due::Nothing;
        }
        match self.state {
            State::Ready | State::Waiting => Due::GiveUp(Fault::QueueTimeout(limits.queue)),
            State::Asked => Due::GiveUp(Fault::Timeout(limits.request.unwrap_or_default())),
            State::Reading if self.ended => Due::Close(CloseReason::HalfCloseTimeout),
            State::Reading => Due::Close(CloseReason::IdleTimeout),
        }
    }
}

/// A request that goes to every store, one after the other, so that one at a time is stalled.
#[derive(Debug)]
pub struct Sweep {
    /// The endpoint that is asked now.
    pub endpoint: u16,
    stores: u32,
    failed: u32,
    answer: [u8; Self::ANSWER_MAX],
    len: usize,
    first_failure: Option<([u8; Self::ANSWER_MAX], usize)>,
}

impl Sweep {
    /// As much of an answer as is passed on.
    const ANSWER_MAX: usize = 128;

    /// A sweep that begins at an endpoint.
    pub fn new(endpoint: u16) -> Self {
        Self {
            endpoint,
            stores: 0,
            failed: 0,
            answer: [0; Self::ANSWER_MAX],
            len: 0,
            first_failure: None,
        }
    }

    /// Bytes of the present store's answer.
    pub fn on_reply(&mut self, bytes: &[u8]) {
        let space = &mut self.answer[self.len..];
        let count = space.len().min(bytes.len());
        space[..count].copy_from_slice(&bytes[..count]);
        self.len += count;
    }

    /// The present store has answered, with `OK_COMPACTED` if all is well.
    pub fn on_answered(&mut self) {
        let answer = self.answer[..self.len].trim_ascii_end();
        if answer != b"OK_COMPACTED" {
            let len = answer.len();
            self.failed += 1;
            self.first_failure.get_or_insert((self.answer, len));
        }
        self.stores += 1;
        self.len = 0;
    }

    /// The present store has failed.
    pub fn on_failed(&mut self, fault: Fault) {
        self.len = 0;
        let mut text = [0; Self::ANSWER_MAX];
        let mut space = &mut text[..];
        let _ = write!(space, "ERR {fault}");
        let len = Self::ANSWER_MAX - space.len();
        self.on_reply(&text[..len]);
        self.on_answered();
    }

    /// One answer for all stores. Returns its length.
    pub fn write_answer(&self, mut space: &mut [u8]) -> usize {
        let before = space.len();
        // It is far shorter than a buffer.
        let _ = match &self.first_failure {
            None => writeln!(space, "OK_COMPACTED"),
            Some((text, len)) => {
                let (failed, stores) = (self.failed, self.stores);
                let text = String::from_utf8_lossy(&text[..*len]);
                writeln!(
                    space,
                    "ERR_COMPACT {failed} of {stores} stores failed, the first with: {text}"
                )
            }
        };
        before - space.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(client: &mut Client, buffers: &mut Buffers, bytes: &[u8]) {
        let mut buf = buffers.take().unwrap();
        buffers.space(&mut buf)[..bytes.len()].copy_from_slice(bytes);
        buffers.set_len(&mut buf, bytes.len());
        buffers.push(&mut client.input, buf);
    }

    fn client() -> (Client, Buffers, Instant) {
        let now = Instant::now();
        let client = Client::new(ConnId::from_parts(0, 0), 16, false, now);
        (client, Buffers::new(8).unwrap(), now)
    }

    #[test]
    fn requests_are_found_one_by_one_however_they_are_split() {
        let (mut client, mut buffers, now) = client();
        let mut scratch = [0; 16];
        let mut found = Vec::new();
        for byte in b"GET a\n \nSET key 0123456789\nPING\n" {
            feed(&mut client, &mut buffers, &[*byte]);
            match client.front(&mut buffers, &mut scratch) {
                Front::Partial => {}
                Front::Refused(len, fault) => {
                    buffers.advance(&mut client.input, len);
                    found.push(format!("{fault}"));
                }
                Front::Request(request) => {
                    client.begin(request, now);
                    assert_eq!(client.ahead(), 0);
                    found.push(format!("{:?} {}", request.verb, request.repeatable));
                    client.finish(&mut buffers, now);
                }
            }
        }
        let expected = ["Get true", "empty request", "request longer than 16 bytes", "Ping true"];
        assert_eq!(found, expected);
        assert_eq!(buffers.free(), buffers.capacity());
    }

    #[test]
    fn only_what_is_safe_is_sent_again_and_only_before_its_answer() {
        for (line, replied, expected) in [
            ("GET a\n", false, Lost::Repeat),
            ("GET a\n", true, Lost::CutOff),
            ("SET a b\n", false, Lost::Fail),
            ("SET a b\n", true, Lost::CutOff),
        ] {
            let (mut client, mut buffers, now) = client();
            feed(&mut client, &mut buffers, line.as_bytes());
            let Front::Request(request) = client.front(&mut buffers, &mut [0; 16]) else {
                panic!("{line:?} is whole");
            };
            client.begin(request, now);
            client.loan =
                Some(Loan { conn: ConnId::from_parts(1, 0), endpoint: 0, retire_at: None });
            client.on_asked(now);
            if replied {
                assert_eq!(client.on_reply(b"O", now), Reply::Partial);
            }
            assert_eq!(client.on_lost(3), expected, "{line:?} {replied}");
            assert_eq!(client.ahead(), 0, "its bytes are still there");
        }
    }

    #[test]
    fn each_state_has_its_own_time_limit() {
        const SECOND: Duration = Duration::from_secs(1);
        let limits = Limits {
            idle: Some(7 * SECOND),
            half_close: Some(5 * SECOND),
            queue: SECOND,
            request: Some(3 * SECOND),
        };
        let (mut client, mut buffers, now) = client();
        assert_eq!(client.deadline(&limits), Some(now + 7 * SECOND));
        feed(&mut client, &mut buffers, b"SET a b\n");
        let Front::Request(request) = client.front(&mut buffers, &mut [0; 16]) else {
            panic!("it is whole");
        };
        client.begin(request, now);
        client.on_waiting();
        assert_eq!(client.on_deadline(&limits, now), Due::Nothing);
        let given_up = client.on_deadline(&limits, now + SECOND);
        assert_eq!(given_up, Due::GiveUp(Fault::QueueTimeout(SECOND)));
        client.on_asked(now + SECOND);
        assert_eq!(client.deadline(&limits), Some(now + 4 * SECOND));
        client.finish(&mut buffers, now);
        client.on_ended(now);
        let closed = client.on_deadline(&limits, now + 5 * SECOND);
        assert_eq!(closed, Due::Close(CloseReason::HalfCloseTimeout));
    }

    #[test]
    fn a_sweep_has_one_answer() {
        let text = |sweep: &Sweep| {
            let mut space = [0; 512];
            let len = sweep.write_answer(&mut space);
            String::from_utf8(space[..len].to_vec()).unwrap()
        };
        let mut sweep = Sweep::new(0);
        sweep.on_reply(b"OK_COMP");
        sweep.on_reply(b"ACTED\n");
        sweep.on_answered();
        assert_eq!(text(&sweep), "OK_COMPACTED\n");
        sweep.on_reply(b"ERR_COMPACT disk full\n");
        sweep.on_answered();
        sweep.on_failed(Fault::Lost);
        assert_eq!(
            text(&sweep),
            "ERR_COMPACT 2 of 3 stores failed, the first with: ERR_COMPACT disk full\n"
        );
    }
}
