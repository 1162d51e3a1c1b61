//! A client whose requests are told apart, so that it shares backend connections with others.
//!
//! ```text
//! Reading ──whole request──▶ Ready ──a connection is free──▶ Asked ──answered──▶ Reading
//!    ▲                       │   ▲                            │ │                   ▲
//!    │                       ▼   └──connection lost: again────┤ └─▶ Answered ──all──┘
//!    │                    Waiting                             │   early        passed on
//!    └──────────error to the client: no connection, no answer─┘
//! ```
//!
//! One request of a client is under way at a time; those that it sends ahead wait in its input. So
//! replies come in the order of the requests. The bytes of a request that can be repeated stay at
//! the front of the input until its answer is complete; others leave it as they are sent on.
//!
//! A backend may answer before it has the whole request. The rest is passed on all the same, and only
//! then are both connections as they were before. Where it cannot be passed on any more, it is read
//! and dropped, so that the client can take the answer; unless the answer speaks as if the request
//! had been taken: then the client's connection is reset behind it.
//!
//! Where it is not certain what a message is, the client gets a connection of its own, both become
//! an ordinary session of opaque bytes, and the connection serves nobody else.

mod broadcast;
mod error_reply;
mod framing;
mod upload;

use crate::proxy::endpoints::EndpointId;
use std::time::{Duration, Instant};

pub use broadcast::Broadcast;
pub use error_reply::{write_away, write_error_reply};
pub use framing::Framing;
pub use upload::Upload;

pub use crate::protocol::{ErrorReply, Reply};

use super::pulse::Pulse;
use super::route::StableHash;
use super::session::Tried;
use crate::io::buffers::Buffers;
use crate::io::{Chain, ConnId};
use crate::limits::{BUFFER_SIZE, CLIENT_STALL_MAX, LINGER_MAX, REFUSED_REST_MAX};
use crate::metrics::{CloseReason, Discard};
use crate::protocol::Verb;

/// What is at the front of a client's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// Nothing, or a request that goes on.
    Partial,
    /// So many bytes that no backend may see: they are answered with an error.
    Refused(u32, ErrorReply),
    /// A request, or as much of it as says what it is.
    Request(Request),
    /// Bytes that can be read in more than one way.
    Opaque,
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
    /// Whether it goes to every store where keys are shared out among them.
    pub to_all: bool,
    /// How many bytes of the input it is.
    pub len: u32,
    /// Whether that is all of it.
    pub whole: bool,
}

/// A backend connection in a client's hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackendConn {
    /// The connection.
    pub conn: ConnId,
    /// The endpoint that it goes to.
    pub endpoint: EndpointId,
    /// When it is too old to be kept.
    pub retire_at: Option<Instant>,
    /// When it was made.
    pub made: Instant,
    /// An answer has come on it, to this client or to another one.
    pub served: bool,
    /// Its backend answered a request before it had read all of it, and may still be reading.
    pub unread: bool,
}

/// What to do about a lost connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// The client had no request on it.
    Idle,
    /// Its end was the end of the answer.
    Answered,
    /// The answer had come, but the request was not passed on in full.
    Rest,
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
    /// Its wait for an endpoint while there is none at all.
    pub endpoint: Duration,
    /// A backend that is owed nothing: until its answer begins, and then until it goes on.
    pub request: Option<Duration>,
}

/// What has become due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Nothing yet.
    Nothing,
    /// The request is to be given up.
    GiveUp(ErrorReply),
    /// The answer has come, and the rest of the request is not waited for any longer.
    EndRequest(Discard),
    /// The client is to be closed.
    Close(CloseReason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Reading,
    Ready,
    Waiting,
    Asked,
    /// The answer has come, and the rest of the request is still passed on.
    Answered,
    /// It was told all there is to tell, and is to leave.
    Leaving,
}

/// The request under way.
#[derive(Debug, Clone, Copy)]
struct Exchange {
    request: Request,
    tried: Tried,
    since: Instant,
    /// Since when it wants a connection.
    wanting: Instant,
    /// Since when there was no endpoint for it, the first time.
    without_endpoint: Option<Instant>,
    /// When a byte of it or of its answer moved last, in any direction.
    moved: Instant,
    /// Bytes of it that were queued for its backend.
    queued: u64,
    replied: bool,
    /// Bytes of it went to nobody.
    cut: bool,
    /// It has been counted.
    counted: bool,
}

/// Who can make an exchange go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Party {
    Client,
    Backend,
}

/// What the wait for a connection is for, where it is to become an opaque session.
const OPAQUE: Request = Request {
    verb: Verb::OPAQUE,
    key: None,
    repeatable: false,
    to_all: false,
    len: 0,
    whole: false,
};

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
    pub backend: Option<BackendConn>,
    /// Set while it is in the list of those to be looked at.
    pub due: bool,
    /// Whether it is received from.
    pub receiving: bool,
    /// Whether its backend is, while it holds one.
    pub backend_receiving: bool,
    /// When its timer fires.
    pub timer: Option<Instant>,
    /// Answers that a request to all stores has brought so far.
    pub broadcast: Option<Box<Broadcast>>,
    /// Marks the load estimator's window in which it was last counted as active.
    pub window: u32,
    /// Its pace with a request that is sent on as it comes.
    pub upload: Upload,
    /// Whether it acknowledges what it is sent.
    pub pulse: Pulse,
    /// Likewise of the backend whose connection it holds.
    pub backend_pulse: Pulse,
    framing: Framing,
    /// Bytes of the input that were looked at.
    scanned: u32,
    state: State,
    exchange: Option<Exchange>,
    /// It waits for an endpoint.
    awaits_endpoint: bool,
    /// It has sent a request, or what was taken for one.
    began: bool,
    /// The connection is to be given to it for good.
    opaque: bool,
    /// The backend's connection is broken: it takes nothing more, and what had come is still read.
    broken: bool,
    /// Bytes on their way to it.
    unsent: u32,
    /// Bytes on their way to its backend.
    unasked: u32,
    ended: bool,
    opened: Instant,
    active: Instant,
}

impl Client {
    /// A client just accepted.
    pub fn new(conn: ConnId, framing: Framing, now: Instant) -> Self {
        Self {
            conn,
            input: Chain::default(),
            backend: None,
            due: false,
            receiving: false,
            backend_receiving: true,
            timer: None,
            broadcast: None,
            window: 0,
            upload: Upload::new(now),
            pulse: Pulse::default(),
            backend_pulse: Pulse::default(),
            framing,
            scanned: 0,
            state: State::Reading,
            exchange: None,
            awaits_endpoint: false,
            began: false,
            opaque: false,
            broken: false,
            unsent: 0,
            unasked: 0,
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

    /// Bytes on their way to its backend.
    pub fn unasked(&self) -> u32 {
        self.unasked
    }

    /// How it talks.
    pub fn framing(&self) -> &Framing {
        &self.framing
    }

    /// Whether it has sent a request so far.
    pub fn has_begun(&self) -> bool {
        self.began
    }

    /// When the last byte of it or to it moved that counts.
    pub fn active(&self) -> Instant {
        self.active
    }

    /// Whether it is to have a connection for good, whose bytes nobody looks at.
    pub fn is_opaque(&self) -> bool {
        self.opaque
    }

    /// Whether it has ended its direction.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether it is only waited for to leave.
    pub fn is_leaving(&self) -> bool {
        self.state == State::Leaving
    }

    /// Whether more of the request under way is to be sent on as it comes.
    pub fn is_streaming(&self) -> bool {
        self.is_exchanging() && self.exchange.is_some_and(|e| !e.request.whole)
    }

    /// Whether the backend's connection is broken.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether it has ended its direction within the request that is being sent on.
    pub fn has_broken_off(&self) -> bool {
        self.ended && self.is_streaming() && self.input.is_empty() && !self.broken
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

    /// Whether its request is in the queue.
    pub fn is_waiting(&self) -> bool {
        self.state == State::Waiting
    }

    /// Whether an answer is expected.
    pub fn is_asked(&self) -> bool {
        self.state == State::Asked
    }

    /// Whether it was answered before its request was passed on.
    pub fn is_answered(&self) -> bool {
        self.state == State::Answered
    }

    /// Whether the connection that it holds is in use.
    pub fn is_exchanging(&self) -> bool {
        matches!(self.state, State::Asked | State::Answered)
    }

    /// Whether it was answered, and the backend has all of its request by now.
    pub fn is_passed_on(&self) -> bool {
        self.is_answered() && !self.is_streaming() && self.unasked == 0
    }

    /// The request under way, if it is to be counted yet.
    pub fn uncounted(&self) -> Option<Request> {
        self.exchange.filter(|exchange| !exchange.counted).map(|exchange| exchange.request)
    }

    /// Whether it has ended its direction and is owed nothing more.
    pub fn is_finished(&self) -> bool {
        let nothing_under_way = matches!(self.state, State::Reading | State::Leaving);
        self.ended && nothing_under_way && self.unsent == 0
    }

    /// Bytes arrived from it.
    pub fn on_active(&mut self, now: Instant) {
        self.pulse.on_heard();
        // One that is to leave does not stay by sending.
        if self.state != State::Leaving {
            self.active = now;
        }
    }

    /// It ended its direction: a request that is not whole will never be.
    pub fn on_ended(&mut self, now: Instant) {
        self.ended = true;
        self.active = now;
    }

    /// Bytes were queued for it.
    pub fn on_queued(&mut self, bytes: u32) {
        self.unsent += bytes;
        self.pulse.on_sent();
    }

    /// Bytes were queued for its backend.
    pub fn on_backend_queued(&mut self, bytes: u32, now: Instant) {
        self.unasked += bytes;
        self.backend_pulse.on_asked();
        if let Some(exchange) = &mut self.exchange {
            exchange.queued += u64::from(bytes);
            exchange.moved = now;
        }
    }

    fn on_moved(&mut self, now: Instant) {
        if let Some(exchange) = &mut self.exchange {
            exchange.moved = now;
        }
    }

    /// Its backend's socket took bytes.
    pub fn on_backend_sent(&mut self, bytes: u32, now: Instant) {
        self.unasked = self.unasked.saturating_sub(bytes);
        self.active = now;
        self.on_moved(now);
    }

    /// Its backend's connection broke. What that had sent before still comes, and then its end, if
    /// this says so: an answer may be among it.
    pub fn on_backend_broken(&mut self) -> bool {
        self.broken = true;
        if self.is_long() && self.unasked > 0 {
            self.on_rest_dropped();
        }
        self.unasked = 0;
        self.is_asked()
    }

    /// Bytes of its request were dropped: nobody takes them any more.
    pub fn on_rest_dropped(&mut self) {
        if let Some(exchange) = &mut self.exchange {
            exchange.cut = true;
        }
    }

    /// Its socket took bytes.
    pub fn on_sent(&mut self, bytes: u32, now: Instant) {
        self.unsent = self.unsent.saturating_sub(bytes);
        self.active = now;
        self.on_moved(now);
    }

    /// Looks for a request at the front of the input. `scratch` holds a line of the greatest
    /// length, for one that lies in several buffers.
    pub fn front(&mut self, buffers: &mut Buffers, scratch: &mut [u8]) -> Front {
        self.framing.front(&mut self.input, &mut self.scanned, buffers, scratch)
    }

    /// How many bytes of the input go on with the request that is being sent. None: it has become
    /// ambiguous.
    pub fn more(&mut self, buffers: &Buffers) -> Option<u32> {
        let (len, whole) = self.framing.more(&self.input, buffers)?;
        if let Some(exchange) = &mut self.exchange {
            exchange.request.whole = whole;
        }
        Some(len)
    }

    /// The bytes at the front can be read in more than one way: it waits for a connection of its
    /// own.
    pub fn begin_opaque(&mut self, now: Instant) {
        self.begin(OPAQUE, now);
        self.opaque = true;
    }

    /// The request found at the front is under way from now on.
    pub fn begin(&mut self, request: Request, now: Instant) {
        debug_assert!(self.is_reading());
        self.state = State::Ready;
        self.began = true;
        self.awaits_endpoint = false;
        self.exchange = Some(Exchange {
            request,
            tried: Tried::default(),
            since: now,
            wanting: now,
            without_endpoint: None,
            moved: now,
            queued: 0,
            replied: false,
            cut: false,
            counted: false,
        });
    }

    /// There is no endpoint at all: the request is to wait for one. Says until when, however often
    /// endpoints come and go meanwhile.
    pub fn on_no_endpoint(&mut self, limits: &Limits, now: Instant) -> Instant {
        self.awaits_endpoint = true;
        let Some(exchange) = &mut self.exchange else { return now };
        *exchange.without_endpoint.get_or_insert(now) + limits.endpoint
    }

    /// There are endpoints. If the request has waited for one, it now waits for a connection.
    pub fn on_endpoints(&mut self, now: Instant) {
        if std::mem::take(&mut self.awaits_endpoint)
            && let Some(exchange) = &mut self.exchange
        {
            exchange.wanting = now;
        }
    }

    /// No connection to an endpoint can be had: the request goes to another one.
    pub fn on_passed_over(&mut self, endpoint: EndpointId) {
        self.on_placed_again();
        if let Some(exchange) = &mut self.exchange {
            exchange.tried.push(endpoint);
        }
    }

    /// The request has joined the queue.
    pub fn on_waiting(&mut self) {
        self.state = State::Waiting;
    }

    /// The request has left the queue to be placed again.
    pub fn on_placed_again(&mut self) {
        debug_assert!(self.is_waiting());
        self.state = State::Ready;
    }

    /// It was lent a connection, on which nothing is on its way.
    pub fn on_acquired(&mut self, backend: BackendConn) {
        self.backend = Some(backend);
        self.backend_receiving = true;
        self.broken = false;
        self.unasked = 0;
        self.backend_pulse = Pulse::default();
    }

    /// The request is sent on the connection that the client holds. Returns how long it waited.
    pub fn on_asked(&mut self, now: Instant) -> Duration {
        self.state = State::Asked;
        self.framing.on_asked();
        let Some(exchange) = &mut self.exchange else { return Duration::ZERO };
        exchange.moved = now;
        exchange.queued = 0;
        exchange.cut = false;
        if let Some(backend) = self.backend {
            exchange.tried.push(backend.endpoint);
        }
        now.saturating_duration_since(exchange.wanting)
    }

    /// Bytes arrived from its backend while an answer was expected.
    pub fn on_reply(&mut self, bytes: &[u8], now: Instant) -> Reply {
        self.active = now;
        self.backend_pulse.on_heard();
        if let Some(exchange) = &mut self.exchange {
            exchange.replied = true;
            exchange.moved = now;
        }
        self.framing.reply(bytes)
    }

    /// The answer is complete. Says whether the exchange is over with it: else the rest of the
    /// request is still to be passed on.
    pub fn on_answer_complete(&mut self) -> bool {
        let rest = self.is_streaming() || (self.is_long() && self.unasked > 0);
        if rest && self.backend.is_some() && !self.broken {
            self.state = State::Answered;
            return false;
        }
        true
    }

    /// Whether the request takes more than one buffer. One that does not finds room in the socket of
    /// a silent connection at once: it has been sent, if not told yet, or this is no answer to it.
    fn is_long(&self) -> bool {
        self.exchange.is_some_and(|exchange| exchange.queued > BUFFER_SIZE as u64)
    }

    /// The answer is to be counted now. Returns the request, and how long that took.
    pub fn count(&mut self, now: Instant) -> Option<(Request, Duration)> {
        let exchange = self.exchange.as_mut().filter(|exchange| !exchange.counted)?;
        exchange.counted = true;
        Some((exchange.request, now.saturating_duration_since(exchange.since)))
    }

    /// Whether the client has to see that its request was not passed on, since the answer does not
    /// say so.
    pub fn is_cut(&self) -> bool {
        let cut = self.exchange.is_some_and(|exchange| exchange.cut || !exchange.request.whole);
        cut && !self.framing.refuses()
    }

    /// Whether the answer that was just completed leaves both connections as they were before the
    /// request.
    pub fn keeps_alive(&self) -> bool {
        self.exchange.is_none_or(|exchange| exchange.request.whole) && self.framing.keeps_alive()
    }

    /// All is said: it is to leave.
    pub fn on_leaving(&mut self, now: Instant) {
        self.state = State::Leaving;
        self.active = now;
    }

    /// The bytes at the front have been sent on, and are not kept.
    pub fn on_sent_on(&mut self) {
        if let Some(exchange) = &mut self.exchange {
            exchange.request.len = 0;
        }
    }

    /// Its backend's connection ended, in order or not. `attempts_max` bounds how often a request
    /// is sent.
    pub fn on_lost(&mut self, in_order: bool, attempts_max: u32, now: Instant) -> Lost {
        self.backend = None;
        let Some(exchange) = &mut self.exchange else { return Lost::Idle };
        match self.state {
            State::Asked => {}
            State::Answered => {
                exchange.cut |= self.unasked > 0;
                return Lost::Rest;
            }
            _ => return Lost::Idle,
        }
        if exchange.replied && self.broadcast.is_none() {
            let complete = in_order && !self.broken && self.framing.ends_with_connection();
            return if complete { Lost::Answered } else { Lost::CutOff };
        }
        let again = exchange.request.repeatable && exchange.tried.attempts() < attempts_max;
        if again {
            exchange.wanting = now;
            self.state = State::Ready;
            return Lost::Repeat;
        }
        Lost::Fail
    }

    /// Whether a byte has come of the answer to its request.
    pub fn has_reply(&self) -> bool {
        self.exchange.is_some_and(|exchange| exchange.replied)
    }

    /// Whether the client has a part of the answer to its request.
    pub fn has_part(&self) -> bool {
        self.broadcast.is_none() && self.exchange.is_some_and(|exchange| exchange.replied)
    }

    /// The request goes to the next store of several: once more ready to be sent.
    pub fn on_next_store(&mut self, now: Instant) {
        self.state = State::Ready;
        if let Some(exchange) = &mut self.exchange {
            exchange.tried = Tried::default();
            exchange.wanting = now;
            exchange.replied = false;
        }
    }

    /// The request is over; the client reads on. Returns it, and how long it took, unless it was
    /// counted before.
    pub fn finish(&mut self, buffers: &mut Buffers, now: Instant) -> Option<(Request, Duration)> {
        self.state = State::Reading;
        self.broadcast = None;
        let Exchange { request, since, counted, .. } = self.exchange.take()?;
        buffers.advance(&mut self.input, request.len);
        (!counted).then(|| (request, now.saturating_duration_since(since)))
    }

    /// When the client has to be looked at next.
    pub fn deadline(&self, limits: &Limits) -> Option<Instant> {
        match (self.state, &self.exchange) {
            (State::Ready | State::Waiting, Some(exchange)) => match exchange.without_endpoint {
                Some(since) if self.awaits_endpoint => Some(since + limits.endpoint),
                _ => Some(exchange.wanting + limits.queue),
            },
            (State::Asked | State::Answered, Some(exchange)) => {
                self.stall_max(limits).map(|limit| exchange.moved + limit)
            }
            (State::Leaving, _) => {
                let most = if self.unsent > 0 { CLIENT_STALL_MAX } else { LINGER_MAX };
                let limit = limits.half_close.or(limits.idle).unwrap_or(most);
                let linger = if self.unsent > 0 { limit } else { limit.min(LINGER_MAX) };
                Some(self.active + linger)
            }
            _ if self.ended => limits.half_close.or(limits.idle).map(|limit| self.active + limit),
            _ => limits.idle.map(|limit| self.active + limit),
        }
    }

    /// The time of [`Client::deadline`] may have come.
    pub fn on_deadline(&self, limits: &Limits, now: Instant) -> Due {
        if self.deadline(limits).is_none_or(|deadline| now < deadline) {
            return Due::Nothing;
        }
        match self.state {
            State::Ready | State::Waiting if self.awaits_endpoint => {
                Due::GiveUp(ErrorReply::NoEndpoint(limits.endpoint))
            }
            State::Ready | State::Waiting => Due::GiveUp(ErrorReply::QueueTimeout(limits.queue)),
            State::Asked | State::Answered => self.on_stalled(limits),
            State::Leaving => Due::Close(CloseReason::HalfCloseTimeout),
            State::Reading if self.ended && limits.half_close.is_some() => {
                Due::Close(CloseReason::HalfCloseTimeout)
            }
            State::Reading => Due::Close(CloseReason::IdleTimeout),
        }
    }

    /// Whether nothing but the client can make its exchange go on.
    pub fn holds_itself_up(&self) -> bool {
        self.is_exchanging() && self.owing() == Party::Client
    }

    /// Who can make the exchange go on: a backend that is held up by its client is not slow.
    fn owing(&self) -> Party {
        if self.unsent > 0 {
            Party::Client
        } else if self.broken || self.unasked > 0 || !self.is_streaming() {
            Party::Backend
        } else {
            Party::Client
        }
    }

    /// How long no byte of the exchange may move. A client that sends nothing of a request is mostly
    /// given up before that, for its pace: see [`Upload`].
    fn stall_max(&self, limits: &Limits) -> Option<Duration> {
        match self.owing() {
            Party::Backend => limits.request.or(self.half_close(limits)).or(limits.idle),
            Party::Client if self.is_waiting_for_refused() => Some(REFUSED_REST_MAX),
            Party::Client => Some(limits.idle.unwrap_or(CLIENT_STALL_MAX)),
        }
    }

    /// The time limit of a client that has ended its direction, and may have left.
    fn half_close(&self, limits: &Limits) -> Option<Duration> {
        limits.half_close.filter(|_| self.ended)
    }

    /// Whether nothing but the rest of a request is missing that was refused: clients need not send
    /// it, and some wait for the end instead.
    fn is_waiting_for_refused(&self) -> bool {
        self.is_answered() && self.unsent == 0 && self.framing.refuses()
    }

    /// No byte of the exchange has moved for as long as that may be.
    fn on_stalled(&self, limits: &Limits) -> Due {
        let replied = self.exchange.is_some_and(|exchange| exchange.replied);
        match self.owing() {
            Party::Backend => match limits.request {
                None if self.half_close(limits).is_some() => {
                    Due::Close(CloseReason::HalfCloseTimeout)
                }
                None => Due::Close(CloseReason::IdleTimeout),
                Some(_) if self.is_answered() => Due::EndRequest(Discard::Timeout),
                Some(limit) => Due::GiveUp(ErrorReply::Timeout(limit)),
            },
            Party::Client if self.is_waiting_for_refused() => Due::EndRequest(Discard::Abandoned),
            Party::Client if !replied => {
                Due::GiveUp(ErrorReply::Unfinished(limits.idle.unwrap_or(CLIENT_STALL_MAX)))
            }
            Party::Client => Due::Close(match limits.idle {
                Some(_) => CloseReason::IdleTimeout,
                None => CloseReason::ClientTimeout,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Protocol};

    fn feed(client: &mut Client, buffers: &mut Buffers, bytes: &[u8]) {
        let mut buf = buffers.take().unwrap();
        buffers.space(&mut buf)[..bytes.len()].copy_from_slice(bytes);
        buffers.set_len(&mut buf, bytes.len());
        buffers.push(&mut client.input, buf);
    }

    fn backend(made: Instant) -> BackendConn {
        let conn = ConnId::from_parts(1, 0);
        BackendConn {
            conn,
            endpoint: EndpointId::at(0),
            retire_at: None,
            made,
            served: false,
            unread: false,
        }
    }

    fn client() -> (Client, Buffers, Instant) {
        let now = Instant::now();
        let mut config = Config::from_vars([]).unwrap().requests;
        config.line_max = 16;
        let framing = Framing::new(Protocol::Chronos, &config);
        let client = Client::new(ConnId::from_parts(0, 0), framing, now);
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
                Front::Refused(len, error) => {
                    buffers.advance(&mut client.input, len);
                    found.push(format!("{error}"));
                }
                Front::Opaque => panic!("lines are never opaque"),
                Front::Request(request) => {
                    client.begin(request, now);
                    assert_eq!(client.ahead(), 0);
                    found.push(format!("{} {}", request.verb.label(), request.repeatable));
                    client.finish(&mut buffers, now);
                }
            }
        }
        let expected = ["get true", "empty request", "request longer than 16 bytes", "ping true"];
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
            client.backend = Some(backend(now));
            client.on_asked(now);
            if replied {
                assert_eq!(client.on_reply(b"O", now), Reply::Partial);
            }
            assert_eq!(client.on_lost(true, 3, now), expected, "{line:?} {replied}");
            assert_eq!(client.ahead(), 0, "its bytes are still there");
        }
    }

    #[test]
    fn a_request_that_is_sent_again_waits_anew() {
        const SECOND: Duration = Duration::from_secs(1);
        let limits =
            Limits { idle: None, half_close: None, queue: SECOND, endpoint: SECOND, request: None };
        let (mut client, mut buffers, now) = client();
        feed(&mut client, &mut buffers, b"GET a\n");
        let Front::Request(request) = client.front(&mut buffers, &mut [0; 16]) else {
            panic!("it is whole");
        };
        client.begin(request, now);
        client.on_asked(now);
        let later = now + 5 * SECOND;
        assert_eq!(client.on_lost(true, 3, later), Lost::Repeat);
        assert_eq!(client.on_deadline(&limits, later), Due::Nothing);
        assert_eq!(client.on_asked(later + SECOND / 2), SECOND / 2, "the wait for a connection");
        let took = client.finish(&mut buffers, later + SECOND).map(|(_, took)| took);
        assert_eq!(took, Some(6 * SECOND), "the whole of it");
    }

    #[test]
    fn bytes_of_an_earlier_request_are_not_forgotten_while_a_connection_is_kept() {
        let (mut client, mut buffers, now) = client();
        client.on_acquired(backend(now));
        for expected in [6, 12] {
            feed(&mut client, &mut buffers, b"GET a\n");
            let Front::Request(request) = client.front(&mut buffers, &mut [0; 16]) else {
                panic!("it is whole");
            };
            client.begin(request, now);
            client.on_asked(now);
            client.on_backend_queued(request.len, now);
            assert_eq!(client.unasked(), expected);
            assert_eq!(client.on_reply(b"answered too early\n", now), Reply::Complete);
            client.finish(&mut buffers, now);
        }
        client.on_acquired(backend(now));
        assert_eq!(client.unasked(), 0, "of a connection that is gone");
    }

    #[test]
    fn each_state_has_its_own_time_limit() {
        const SECOND: Duration = Duration::from_secs(1);
        let limits = Limits {
            idle: Some(7 * SECOND),
            half_close: Some(5 * SECOND),
            queue: SECOND,
            endpoint: SECOND,
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
        assert_eq!(given_up, Due::GiveUp(ErrorReply::QueueTimeout(SECOND)));
        assert_eq!(client.on_asked(now + SECOND), SECOND);
        assert_eq!(client.deadline(&limits), Some(now + 4 * SECOND));
        client.finish(&mut buffers, now);
        client.on_ended(now);
        let closed = client.on_deadline(&limits, now + 5 * SECOND);
        assert_eq!(closed, Due::Close(CloseReason::HalfCloseTimeout));
    }

    #[test]
    fn one_that_may_have_left_does_not_wait_for_ever_for_a_backend_without_a_limit() {
        const SECOND: Duration = Duration::from_secs(1);
        let limits = Limits {
            idle: None,
            half_close: Some(5 * SECOND),
            queue: SECOND,
            endpoint: SECOND,
            request: None,
        };
        let (mut client, _, now) = asked(DOWNLOAD);
        client.on_backend_sent(DOWNLOAD.len() as u32, now);
        assert_eq!(client.deadline(&limits), None, "it may want to wait");
        client.on_ended(now);
        let closed = client.on_deadline(&limits, now + 5 * SECOND);
        assert_eq!(closed, Due::Close(CloseReason::HalfCloseTimeout));
        let both = Limits { request: Some(9 * SECOND), ..limits };
        assert_eq!(client.deadline(&both), Some(now + 9 * SECOND), "a limit of its own");
    }

    /// A client of HTTP that has asked with what it has sent so far.
    fn asked(bytes: &[u8]) -> (Client, Buffers, Instant) {
        let now = Instant::now();
        let config = Config::from_vars([]).unwrap().requests;
        let framing = Framing::new(Protocol::Http1, &config);
        let mut client = Client::new(ConnId::from_parts(0, 0), framing, now);
        let mut buffers = Buffers::new(8).unwrap();
        feed(&mut client, &mut buffers, bytes);
        let Front::Request(request) = client.front(&mut buffers, &mut []) else {
            panic!("it says what it is");
        };
        client.begin(request, now);
        client.on_acquired(backend(now));
        client.on_asked(now);
        client.on_backend_queued(bytes.len() as u32, now);
        (client, buffers, now)
    }

    const UPLOAD: &[u8] = b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n";
    const DOWNLOAD: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

    #[test]
    fn a_backend_is_timed_only_while_it_is_its_turn() {
        const SECOND: Duration = Duration::from_secs(1);
        let limits = Limits {
            idle: None,
            half_close: None,
            queue: SECOND,
            endpoint: SECOND,
            request: Some(3 * SECOND),
        };
        let timeout = Due::GiveUp(ErrorReply::Timeout(3 * SECOND));
        for (bytes, then) in [(UPLOAD, CLIENT_STALL_MAX), (DOWNLOAD, 3 * SECOND)] {
            let (mut client, _, now) = asked(bytes);
            assert_eq!(client.on_deadline(&limits, now + 3 * SECOND), timeout, "it takes nothing");
            client.on_backend_sent(bytes.len() as u32, now + SECOND);
            assert_eq!(client.deadline(&limits), Some(now + SECOND + then), "it has all of it");
        }
        let (mut client, _, now) = asked(UPLOAD);
        client.on_backend_sent(UPLOAD.len() as u32, now);
        let unfinished = Due::GiveUp(ErrorReply::Unfinished(CLIENT_STALL_MAX));
        assert_eq!(client.on_deadline(&limits, now + CLIENT_STALL_MAX), unfinished);
        // Within an answer.
        let (mut client, _, now) = asked(DOWNLOAD);
        client.on_backend_sent(DOWNLOAD.len() as u32, now);
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n";
        assert_eq!(client.on_reply(answer, now), Reply::Partial);
        client.on_queued(answer.len() as u32);
        assert_eq!(client.on_deadline(&limits, now + 3 * SECOND), Due::Nothing, "a slow reader");
        let stalled = Due::Close(CloseReason::ClientTimeout);
        assert_eq!(client.on_deadline(&limits, now + CLIENT_STALL_MAX), stalled);
        let idle = Limits { idle: Some(2 * SECOND), ..limits };
        let stalled = Due::Close(CloseReason::IdleTimeout);
        assert_eq!(client.on_deadline(&idle, now + 2 * SECOND), stalled);
        client.on_sent(answer.len() as u32, now + 20 * SECOND);
        assert_eq!(client.deadline(&limits), Some(now + 23 * SECOND));
        client.on_reply(b"12345", now + 22 * SECOND);
        assert_eq!(client.deadline(&limits), Some(now + 25 * SECOND), "it flows");
        assert_eq!(client.on_deadline(&limits, now + 25 * SECOND), timeout);
    }

    #[test]
    fn an_answer_that_comes_early_is_followed_by_the_rest_of_the_request() {
        for (status, cut) in [(202, true), (413, false)] {
            let (mut client, mut buffers, now) = asked(UPLOAD);
            client.on_sent_on();
            let answer = format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n");
            assert_eq!(client.on_reply(answer.as_bytes(), now), Reply::Complete);
            assert!(!client.on_answer_complete() && client.is_answered() && client.is_streaming());
            assert_eq!(client.is_cut(), cut, "{status}");
            assert!(client.count(now).is_some() && client.uncounted().is_none(), "counted once");
            let mut held = client.input.bytes();
            buffers.advance(&mut client.input, held);
            for size in [16_384, 16_384, 16_384, 16_384, 16_384, 16_384, 1_696] {
                feed(&mut client, &mut buffers, &vec![b'x'; size]);
                held = client.more(&buffers).unwrap();
                buffers.advance(&mut client.input, held);
                client.on_backend_queued(held, now);
            }
            assert!(!client.is_streaming() && !client.is_passed_on(), "it is still on its way");
            client.on_backend_sent(200_000, now);
            assert!(client.is_passed_on() && client.keeps_alive() && !client.is_cut());
            assert_eq!(client.finish(&mut buffers, now), None);
        }
    }

    #[test]
    fn a_connection_that_takes_no_more_is_read_to_its_end() {
        let (mut client, _, now) = asked(UPLOAD);
        assert!(client.on_backend_broken(), "an answer may come");
        assert!(client.is_asked() && client.unasked() == 0);
        let answer = b"HTTP/1.1 413 X\r\nContent-Length: 0\r\n\r\n";
        assert_eq!(client.on_reply(answer, now), Reply::Complete);
        assert!(client.on_answer_complete(), "nothing can be passed on");
        let (mut client, _, now) = asked(DOWNLOAD);
        assert!(client.on_backend_broken());
        assert_eq!(client.on_reply(b"HTTP/1.1 200 OK\r\n\r\nuntil", now), Reply::Partial);
        assert_eq!(client.on_lost(true, 3, now), Lost::CutOff, "not whole, whatever its end says");
    }
}
