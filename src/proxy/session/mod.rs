//! A client's life: a state machine without I/O.
//!
//! ```text
//! Connecting ──connected──▶ Open ──both directions done──▶ closed: Finished
//!  │ ▲  │ │                  ├─ a side broke: what it sent before still goes out, then ▶ reset
//!  └─┘  │ │                  └─ deadline ▶ reset
//! next  │ └─the client left──▶ closed
//! one   └──none is usable────▶ it waits, and is connected later, or ▶ closed
//! ```
//!
//! A client can leave before it has a backend. A break is leaving. So is an end of stream before
//! the first byte, unless a connect is about to succeed: it has asked for nothing, and a close looks
//! no different. Behind bytes the end is that of a request, whose answer is still wanted.
//!
//! A side that broke is not believed to have said nothing: what it sent before is read to its end
//! and passed on, as slowly as the other side takes it, and only then the other side is reset. That
//! has a limit of its own: [`FLUSH_STALL_MAX`](crate::limits::FLUSH_STALL_MAX) without a byte that the other side took. What that one
//! sends meanwhile is dropped: while it cannot send, it may not get to receiving.
//!
//! The worker tells a session what happened and does what it answers. Which bytes are where is the
//! driver's business; a session counts them.

use std::time::{Duration, Instant};

use super::endpoints::EndpointId;
use super::line::Ticket;
use super::pulse::Pulse;
use super::relay::{Flow, Relay};
use super::{Bytes, Side};
use crate::io::{Chain, ConnId};
use crate::metrics::CloseReason;

mod cancel;
mod deadline;
mod ending;
#[cfg(test)]
mod tests;
mod tried;
mod verdict;

pub use deadline::Timeouts;
pub use ending::{Ending, how_to_close};
pub use tried::{Attempts, Tried};
pub use verdict::Verdict;

/// What the worker has to do for a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// Drop the bytes just received: there is nobody to send them to.
    Discard,
    /// Stop receiving from this side.
    Pause(Side),
    /// Receive from this side again.
    Resume(Side),
    /// Tell this side that the other one has ended, behind all bytes queued for it.
    Shutdown(Side),
    /// Close both sides.
    Close(CloseReason),
}

/// A side has broken, while the other is to have what it sent before.
#[derive(Debug, Clone, Copy)]
struct Failure {
    /// The side that broke first.
    side: Side,
    /// It did not break, but acknowledges nothing.
    silent: bool,
    /// Bytes on their way to the other one at the latest look.
    left: u64,
    /// The time of the latest look.
    looked: Instant,
}

impl Failure {
    fn reason(&self) -> CloseReason {
        match (self.side, self.silent) {
            (Side::Client, false) => CloseReason::ClientReset,
            (Side::Client, true) => CloseReason::ClientSilent,
            (Side::Backend, false) => CloseReason::BackendReset,
            (Side::Backend, true) => CloseReason::BackendSilent,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Connecting,
    Open,
}

/// When the client's first byte was seen, and the first byte back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FirstByte {
    Unasked,
    Asked(Instant),
    Answered { asked: Instant, since: Instant },
}

/// One client and, once connected, its backend.
#[derive(Debug)]
pub struct Session {
    client: ConnId,
    backend: Option<ConnId>,
    endpoint: Option<EndpointId>,
    tried: Tried,
    attempts: Option<Attempts>,
    state: State,
    to_backend: Relay,
    to_client: Relay,
    /// What the client sent before there was a backend.
    early: Chain,
    bytes: Bytes,
    /// What the client has begun with.
    beginning: cancel::Beginning,
    failure: Option<Failure>,
    ended_first: Option<Side>,
    opened: Instant,
    /// Since when it has looked for a backend.
    seeking: Instant,
    /// Its place among those that wait, if it has had to.
    ticket: Option<Ticket>,
    /// While it waits: what it is closed for once that has been too long.
    waits: Option<CloseReason>,
    active: Instant,
    first_byte: FirstByte,
    /// When its connection was made, if that was in advance.
    warm_since: Option<Instant>,
    /// When the connect under way was started.
    connecting: Option<Instant>,
    connected: Instant,
    /// Bytes of ours that went ahead of the client's.
    preface: u32,
    /// The client has been sent something of what the backend said.
    greeted: bool,
    /// The backend has shown that it is well, or nothing is to be made of it.
    heard: bool,
    client_pulse: Pulse,
    backend_pulse: Pulse,
    /// Marks the load estimator's window in which the session was last counted as active.
    window: u32,
}

impl Session {
    /// A session of a client just accepted.
    pub fn new(client: ConnId, now: Instant) -> Self {
        Self {
            client,
            backend: None,
            endpoint: None,
            tried: Tried::default(),
            attempts: None,
            state: State::Connecting,
            to_backend: Relay::default(),
            to_client: Relay::default(),
            early: Chain::default(),
            bytes: Bytes::default(),
            beginning: cancel::Beginning::default(),
            failure: None,
            ended_first: None,
            opened: now,
            seeking: now,
            ticket: None,
            waits: None,
            active: now,
            first_byte: FirstByte::Unasked,
            warm_since: None,
            connecting: None,
            connected: now,
            preface: 0,
            greeted: false,
            heard: false,
            client_pulse: Pulse::default(),
            backend_pulse: Pulse::default(),
            window: 0,
        }
    }

    /// Its client has been here since then, and so much has come meanwhile.
    #[must_use]
    pub fn after(mut self, opened: Instant, bytes: Bytes) -> Self {
        (self.opened, self.bytes) = (opened, bytes);
        self
    }

    /// It is to have another connection. The worker closes the one that it had.
    pub fn on_moved(&mut self, now: Instant) {
        self.state = State::Connecting;
        self.seeking = now;
        self.endpoint = None;
        self.backend = None;
        self.to_backend = Relay::default();
        self.to_client = Relay::default();
        self.failure = None;
        self.warm_since = None;
        self.preface = 0;
        self.heard = self.cancel().is_some();
        self.backend_pulse = Pulse::default();
    }

    /// What is known of whether a side acknowledges what it is sent.
    pub fn pulse(&mut self, side: Side) -> &mut Pulse {
        match side {
            Side::Client => &mut self.client_pulse,
            Side::Backend => &mut self.backend_pulse,
        }
    }

    /// The mark of the load estimator's window in which the session was last counted as active.
    pub fn window(&mut self) -> &mut u32 {
        &mut self.window
    }

    /// What the client sent before there was a backend.
    pub fn early(&mut self) -> &mut Chain {
        &mut self.early
    }

    /// Whether the client has sent something that nobody got yet.
    pub fn has_early(&self) -> bool {
        !self.early.is_empty()
    }

    /// Takes it out, for the backend.
    pub fn take_early(&mut self) -> Chain {
        std::mem::take(&mut self.early)
    }

    /// The client's connection.
    pub fn client(&self) -> ConnId {
        self.client
    }

    /// The connection of one side; a backend's only once there is one.
    pub fn conn(&self, side: Side) -> Option<ConnId> {
        match side {
            Side::Client => Some(self.client),
            Side::Backend => self.backend,
        }
    }

    /// The endpoint and the connection to it, once there is one.
    pub fn backend(&self) -> Option<(EndpointId, ConnId)> {
        Some((self.endpoint?, self.backend?))
    }

    /// Whether its backend has been sent nothing yet that the client sent.
    pub fn is_unasked(&self) -> bool {
        self.is_open() && self.first_byte == FirstByte::Unasked && !self.to_backend.is_broken()
    }

    /// Whether the end of a handshake or the first byte of a reply is to come.
    #[cfg(test)]
    pub fn awaits_backend(&self) -> bool {
        let is_asked = matches!(self.first_byte, FirstByte::Asked(_));
        self.backend.is_some() && (!self.is_open() || is_asked)
    }

    /// The endpoint that serves the session or is being tried for it.
    pub fn endpoint(&self) -> Option<EndpointId> {
        self.endpoint
    }

    /// All attempts so far, if there were any, the present one included.
    pub fn attempts(&self) -> Option<Attempts> {
        self.attempts
    }

    /// The endpoints tried so far, the present one included, that are not to be tried again.
    pub fn tried(&self) -> &Tried {
        &self.tried
    }

    /// All endpoints may be tried again, as often as at first.
    pub fn forget_tried(&mut self) {
        self.tried = Tried::default();
    }

    /// Whether bytes can flow.
    pub fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// Whether it waits for an endpoint, or for a place at one.
    pub fn awaits_endpoint(&self) -> bool {
        self.waits.is_some()
    }

    /// What it is to be closed for if it waits for a usable endpoint for too long.
    pub fn why_waits(&self) -> Option<CloseReason> {
        self.waits
    }

    /// Until when it waits, if it may do so for `limit`.
    pub fn waits_until(&self, limit: Duration) -> Instant {
        self.seeking + limit
    }

    /// Since when it has looked for a backend.
    pub fn seeking(&self) -> Instant {
        self.seeking
    }

    /// Its place among those that wait, if it has had to wait.
    pub fn ticket(&self) -> Option<Ticket> {
        self.ticket
    }

    /// It is served, or over: it needs its place in line no more. Says whether it had one.
    pub fn take_ticket(&mut self) -> bool {
        self.ticket.take().is_some()
    }

    /// It waits for an endpoint, or for a place at one. If none is usable for too long it is to be closed
    /// for `reason`. Those that it has tried may be tried again.
    pub fn on_waiting(&mut self, ticket: Ticket, reason: CloseReason) {
        assert_eq!(self.state, State::Connecting, "an open session has an endpoint");
        assert!(self.endpoint.is_none() && self.waits.is_none(), "it is tried, or waits already");
        self.forget_tried();
        self.ticket = Some(ticket);
        self.waits = Some(reason);
    }

    /// Its turn has come.
    pub fn on_waited(&mut self) {
        assert!(self.waits.take().is_some(), "it waits");
        self.on_in_line();
    }

    /// Whether its client may have left: it ended before its first byte, and nobody has been connected
    /// for it yet.
    pub fn may_have_left(&self) -> bool {
        self.state == State::Connecting && self.to_backend.is_ending() && self.early.is_empty()
    }

    /// Whether the client has sent something.
    pub fn has_client_spoken(&self) -> bool {
        self.first_byte != FirstByte::Unasked
    }

    /// How long ago the client was accepted.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.opened)
    }

    /// Bytes now held for the session, both directions together.
    pub fn in_flight(&self) -> u32 {
        self.to_backend.in_flight() + self.to_client.in_flight()
    }

    /// An endpoint was chosen. Until it is connected, `backend` may be absent.
    pub fn on_trying(&mut self, endpoint: EndpointId, backend: Option<ConnId>, now: Instant) {
        assert_eq!(self.state, State::Connecting, "an open session does not move");
        self.endpoint = Some(endpoint);
        self.backend = backend;
        self.tried.push(endpoint);
        let count = self.attempts.map_or(0, |before| before.count).saturating_add(1);
        self.attempts = Some(Attempts { count, endpoint, at: now });
        self.on_cancel_trying(endpoint);
    }

    /// A connection is being made for the session.
    pub fn on_connecting(&mut self, backend: ConnId, now: Instant) {
        assert_eq!(self.state, State::Connecting, "an open session has connected");
        self.backend = Some(backend);
        self.connecting = Some(now);
        self.active = now;
    }

    /// The connect under way is over, or of no use any more. Says when it was started, if there is one.
    pub fn take_connect(&mut self) -> Option<Instant> {
        self.connecting.take()
    }

    /// Whether a connect is under way.
    pub fn is_connecting(&self) -> bool {
        self.connecting.is_some()
    }

    /// The attempt failed; another endpoint may be tried.
    pub fn on_connect_failed(&mut self) {
        assert_eq!(self.state, State::Connecting, "an open session has connected");
        self.endpoint = None;
        self.backend = None;
    }

    /// The backend is connected; `preface` bytes of ours go to it ahead of the client's.
    pub fn on_connected(&mut self, backend: ConnId, preface: u32, now: Instant) {
        assert_eq!(self.state, State::Connecting, "an open session has connected");
        self.state = State::Open;
        self.backend = Some(backend);
        self.active = now;
        self.connected = now;
        if let FirstByte::Asked(at) = &mut self.first_byte {
            // What came early goes to it only now.
            *at = now;
        }
        self.preface = preface;
        if preface > 0 {
            self.backend_pulse.on_asked();
        }
        self.to_backend.on_received(preface, u32::MAX);
    }

    /// The client sent something before there was a backend: it is kept, and paused.
    pub fn on_early(&mut self, now: Instant) -> Action {
        assert_eq!(self.state, State::Connecting, "an open session keeps nothing");
        if self.first_byte == FirstByte::Unasked {
            self.first_byte = FirstByte::Asked(now);
        }
        Action::Pause(Side::Client)
    }

    /// Whether a side has ended its direction, or broken.
    pub fn has_ended(&self, side: Side) -> bool {
        match side {
            Side::Client => self.to_backend.is_ending(),
            Side::Backend => self.to_client.is_ending(),
        }
    }

    /// Bytes arrived from one side. Unless told to discard them, the worker sends them to the
    /// other. `limit` is how many may be in flight in one direction now.
    pub fn on_received(&mut self, from: Side, bytes: u32, limit: u32, now: Instant) -> Action {
        let relay = self.relay(from);
        if relay.is_broken() {
            return Action::Discard;
        }
        let flow = relay.on_received(bytes, limit);
        self.active = now;
        match from {
            Side::Client => {
                self.client_pulse.on_heard();
                self.backend_pulse.on_asked();
                if self.first_byte == FirstByte::Unasked {
                    self.first_byte = FirstByte::Asked(now);
                }
            }
            Side::Backend => {
                self.backend_pulse.on_heard();
                self.client_pulse.on_sent();
            }
        }
        if flow == Flow::Pause { Action::Pause(from) } else { Action::None }
    }

    /// Since when it waits for the first byte back; `None` if that has come, or will not come any more.
    pub fn asked_since(&self) -> Option<Instant> {
        let FirstByte::Asked(at) = self.first_byte else { return None };
        let is_over = self.has_ended(Side::Backend) || self.survivor() == Some(Side::Client);
        (self.is_open() && !is_over).then_some(at)
    }

    /// For how long no byte of it has moved.
    pub fn quiet(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.active)
    }

    /// Whether its client is still sending: bytes have moved within that time, and no end has come.
    pub fn may_still_ask(&self, now: Instant, within: Duration) -> bool {
        self.quiet(now) < within && !self.has_ended(Side::Client)
    }

    /// How long the client waited for the first byte back, once, when that has just come.
    pub fn take_first_byte(&mut self, now: Instant) -> Option<Duration> {
        let FirstByte::Asked(at) = self.first_byte else { return None };
        self.first_byte = FirstByte::Answered { asked: at, since: now };
        Some(now.saturating_duration_since(at))
    }

    /// How long it took from the client's first byte to the first byte back, and from that until now.
    pub fn answer_times(&self, now: Instant) -> Option<(Duration, Duration)> {
        let FirstByte::Answered { asked, since } = self.first_byte else { return None };
        Some((since.saturating_duration_since(asked), now.saturating_duration_since(since)))
    }

    /// How long it took from the client's coming to its backend, if it has one.
    pub fn placed_within(&self) -> Option<Duration> {
        self.is_open().then(|| self.sought(self.connected))
    }

    /// For how long it had looked for a backend by then; anew since it had one that was of no use.
    pub fn sought(&self, at: Instant) -> Duration {
        at.saturating_duration_since(self.seeking)
    }

    /// Bytes that came so far.
    pub fn bytes(&self) -> Bytes {
        self.bytes
    }

    /// Bytes came, and are counted.
    pub fn on_counted(&mut self, from: Side, bytes: u32) {
        self.bytes.add(from, bytes.into());
    }

    /// The side that was the first to end or to break, if one was.
    pub fn ended_first(&self) -> Option<Side> {
        self.ended_first.or_else(|| self.failure.map(|failure| failure.side))
    }

    /// A side's socket took bytes.
    pub fn on_sent(&mut self, to: Side, bytes: u32, limit: u32, now: Instant) -> Action {
        self.active = now;
        let from = to.other();
        let relay = self.relay(from);
        match relay.on_sent(bytes, limit) {
            Flow::Resume => Action::Resume(from),
            _ if relay.is_ending() => self.closed().unwrap_or(Action::None),
            _ => Action::None,
        }
    }

    /// A side ended its direction.
    pub fn on_ended(&mut self, from: Side, now: Instant) -> Action {
        if self.failure.is_none() {
            self.ended_first.get_or_insert(from);
        }
        if self.state == State::Connecting {
            if self.early.is_empty() && self.awaits_endpoint() {
                return Action::Close(CloseReason::ClientLeft);
            }
            self.relay(from).on_ended();
            return Action::None;
        }
        self.active = now;
        self.relay(from).on_ended();
        match from {
            Side::Client => self.backend_pulse.on_asked(),
            Side::Backend => self.client_pulse.on_sent(),
        }
        // A broken side ends too; the other must see the break, not an ordinary end.
        let shutdown = if self.failure.is_some() || self.relay(from).is_broken() {
            Action::None
        } else {
            Action::Shutdown(from.other())
        };
        self.closed().unwrap_or(shutdown)
    }

    /// A side broke while receiving from it: nothing more comes, nothing can be sent.
    pub fn on_receive_failed(&mut self, from: Side, now: Instant) -> Action {
        self.relay(from).on_ended();
        self.on_broken(from, false, now)
    }

    /// A side acknowledges nothing any more: nothing that it sends will come, and it takes nothing.
    pub fn on_silent(&mut self, side: Side, now: Instant) -> Action {
        self.relay(side).on_ended();
        self.on_broken(side, true, now)
    }

    /// A side broke while sending to it. What it sent before may still be on its way here, so it
    /// is read to its end.
    pub fn on_send_failed(&mut self, to: Side, now: Instant) -> Action {
        self.on_broken(to, false, now)
    }

    fn on_broken(&mut self, side: Side, silent: bool, now: Instant) -> Action {
        if self.state == State::Connecting {
            return Action::Close(CloseReason::ClientReset);
        }
        self.active = now;
        self.failure.get_or_insert(Failure { side, silent, left: 0, looked: now });
        let other = side.other();
        let paused = self.relay(other).is_paused();
        self.relay(other).on_broken();
        let go_on = if paused { Action::Resume(other) } else { Action::None };
        self.closed().unwrap_or(go_on)
    }

    /// The side that is to have what the other one sent before it broke.
    pub fn survivor(&self) -> Option<Side> {
        self.failure.map(|failure| failure.side.other())
    }

    /// The direction that starts at `from`.
    fn relay(&mut self, from: Side) -> &mut Relay {
        match from {
            Side::Client => &mut self.to_backend,
            Side::Backend => &mut self.to_client,
        }
    }

    fn closed(&self) -> Option<Action> {
        (self.to_backend.is_done() && self.to_client.is_done())
            .then(|| self.failure.map_or(CloseReason::Finished, |failure| failure.reason()))
            .map(Action::Close)
    }
}
