//! A client's life: a state machine without I/O.
//!
//! ```text
//! Connecting ──connected──▶ Open ──both directions done──▶ closed: Finished
//!  │ ▲  │ │                  ├─ a side broke: what it sent before still goes out, then ▶ reset
//!  └─┘  │ │                  └─ deadline ▶ reset
//! next  │ └─the client left──▶ closed
//! one   └──none left─────────▶ closed
//! ```
//!
//! A client can leave before it has a backend. A break is leaving. So is an end of stream before
//! the first byte, unless a connect is about to succeed: it has asked for nothing, and a close looks
//! no different. Behind bytes the end is that of a request, whose answer is still wanted.
//!
//! A side that broke is not believed to have said nothing: what it sent before is read to its end
//! and passed on, as slowly as the other side takes it, and only then the other side is reset. That
//! has a limit of its own: [`FLUSH_STALL_MAX`] without a byte that the other side took. What that one
//! sends meanwhile is dropped: while it cannot send, it may not get to receiving.
//!
//! The worker tells a session what happened and does what it answers. Which bytes are where is the
//! driver's business; a session counts them.

use crate::proxy::endpoints::EndpointId;
use std::time::{Duration, Instant};

use super::Side;
use super::health::AT_ONCE;
use super::pulse::Pulse;
use super::relay::{Flow, Relay};
use crate::io::{Chain, Close, ConnId};
use crate::limits::{CONNECT_ATTEMPTS_MAX, FLUSH_STALL_MAX};
use crate::metrics::CloseReason;

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

/// How the connection of one side is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// At once, so or so.
    Now(Close),
    /// With a reset, once the peer has all that was sent to it.
    ResetBehind,
    /// At once: with a reset if the peer has all that was sent to it, else with the end of stream,
    /// which is on its way to it already.
    ResetOrEnd,
}

/// A session with a broken side is looked at this often: whether the other one takes bytes, only
/// the kernel knows.
const FAILURE_LOOK: Duration = Duration::from_millis(500);

/// A client that has ended its direction before the first byte, while it is being connected, is
/// taken for one that left if that takes longer than this. Within a cluster a handshake takes less.
const LEFT_AFTER: Duration = Duration::from_millis(100);

/// Time limits of an open session.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// Without a byte in either direction.
    pub idle: Option<Duration>,
    /// Likewise, once one direction has ended.
    pub half_close: Option<Duration>,
}

/// The endpoints that were tried for a session, by their index in the balancer's table.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tried {
    endpoints: [EndpointId; CONNECT_ATTEMPTS_MAX],
    len: u8,
}

impl Tried {
    /// How many attempts there were.
    pub fn attempts(&self) -> u32 {
        u32::from(self.len)
    }

    /// Whether this endpoint was tried.
    pub fn contains(&self, endpoint: EndpointId) -> bool {
        self.endpoints[..usize::from(self.len)].contains(&endpoint)
    }

    /// Takes note of an attempt.
    pub fn push(&mut self, endpoint: EndpointId) {
        if let Some(slot) = self.endpoints.get_mut(usize::from(self.len)) {
            *slot = endpoint;
            self.len += 1;
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Connecting,
    Open,
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

/// When the client's first byte was seen, for the time to the first byte back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FirstByte {
    Unasked,
    Asked(Instant),
    Answered,
}

/// What the end of a session's backend says about its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    None,
    /// It has ended a warm connection just before that was used.
    Stale,
    /// It does not know a warm connection any more that was made before.
    Forgotten,
    /// It has ended the session at once.
    Failed,
}

/// One client and, once connected, its backend.
#[derive(Debug)]
pub struct Session {
    client: ConnId,
    backend: Option<ConnId>,
    endpoint: Option<EndpointId>,
    tried: Tried,
    state: State,
    to_backend: Relay,
    to_client: Relay,
    /// What the client sent before there was a backend.
    early: Chain,
    failure: Option<Failure>,
    opened: Instant,
    active: Instant,
    first_byte: FirstByte,
    /// When its connection was made, if that was in advance.
    warm_since: Option<Instant>,
    connected: Instant,
    /// Bytes of ours went ahead of the client's.
    prefaced: bool,
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
            state: State::Connecting,
            to_backend: Relay::default(),
            to_client: Relay::default(),
            early: Chain::default(),
            failure: None,
            opened: now,
            active: now,
            first_byte: FirstByte::Unasked,
            warm_since: None,
            connected: now,
            prefaced: false,
            greeted: false,
            heard: false,
            client_pulse: Pulse::default(),
            backend_pulse: Pulse::default(),
            window: 0,
        }
    }

    /// Its backend connection was made at this moment, in advance.
    pub fn on_warm(&mut self, made: Instant) {
        self.warm_since = Some(made);
    }

    /// When its backend connection was made.
    pub fn made(&self) -> Instant {
        self.warm_since.unwrap_or(self.connected)
    }

    /// What the backend had said before the session began is passed on to the client.
    pub fn on_greeted(&mut self) {
        self.greeted = true;
    }

    /// Nothing is to be made of how the backend ends the session.
    pub fn vouch(&mut self) {
        self.heard = true;
    }

    /// A byte came from the backend. Says whether it is the first one of the session.
    pub fn take_heard(&mut self) -> bool {
        self.greeted = true;
        !std::mem::replace(&mut self.heard, true)
    }

    /// Whether nothing has been passed on in either direction, so that another connection would do as
    /// well.
    pub fn is_untouched(&self) -> bool {
        self.is_open() && self.first_byte == FirstByte::Unasked && !self.greeted
    }

    /// Whether the client has ended its direction or broken its connection.
    pub fn has_client_left(&self) -> bool {
        self.to_client.is_broken() || self.to_backend.is_ending() && !self.to_backend.is_broken()
    }

    /// Whether it has been served without a byte from its backend for so long that all is well.
    pub fn has_lasted(&self, now: Instant) -> bool {
        self.is_open() && now.saturating_duration_since(self.connected) >= AT_ONCE
    }

    /// The backend ended or broke its connection: what that says about the endpoint. Each session is
    /// judged once.
    pub fn judge(&mut self, broken: bool, now: Instant) -> Verdict {
        if !self.is_open() || self.has_client_left() || std::mem::replace(&mut self.heard, true) {
            return Verdict::None;
        }
        let broken = broken || self.failure.is_some();
        let asked = self.prefaced || self.first_byte != FirstByte::Unasked;
        match self.warm_since {
            Some(_) if broken && asked => Verdict::Forgotten,
            Some(_) if !asked => Verdict::Stale,
            _ if !self.has_lasted(now) => Verdict::Failed,
            _ => Verdict::None,
        }
    }

    /// It is to have another connection. The worker closes the one that it had.
    pub fn on_moved(&mut self) {
        self.state = State::Connecting;
        self.endpoint = None;
        self.backend = None;
        self.to_backend = Relay::default();
        self.to_client = Relay::default();
        self.failure = None;
        self.warm_since = None;
        self.prefaced = false;
        self.heard = false;
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

    /// The endpoint that serves the session or is being tried for it.
    pub fn endpoint(&self) -> Option<EndpointId> {
        self.endpoint
    }

    /// The endpoints tried so far, the present one included.
    pub fn tried(&self) -> &Tried {
        &self.tried
    }

    /// Whether bytes can flow.
    pub fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// Whether no endpoint has been tried, for want of any.
    pub fn awaits_endpoint(&self) -> bool {
        self.state == State::Connecting && self.tried.attempts() == 0
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
    pub fn on_trying(&mut self, endpoint: EndpointId, backend: Option<ConnId>) {
        assert_eq!(self.state, State::Connecting, "an open session does not move");
        self.endpoint = Some(endpoint);
        self.backend = backend;
        self.tried.push(endpoint);
    }

    /// A connection is being made for the session.
    pub fn on_connecting(&mut self, backend: ConnId, now: Instant) {
        assert_eq!(self.state, State::Connecting, "an open session has connected");
        self.backend = Some(backend);
        self.active = now;
    }

    /// When the connect under way was started.
    pub fn connecting_since(&self) -> Option<Instant> {
        (self.state == State::Connecting && self.backend.is_some()).then_some(self.active)
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
        self.prefaced = preface > 0;
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
        if self.relay(from).is_broken() {
            return Action::Discard;
        }
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
        match self.relay(from).on_received(bytes, limit) {
            Flow::Pause => Action::Pause(from),
            _ => Action::None,
        }
    }

    /// How long the client waited for the first byte back, once, when that has just come.
    pub fn take_first_byte(&mut self, now: Instant) -> Option<Duration> {
        let FirstByte::Asked(at) = self.first_byte else { return None };
        self.first_byte = FirstByte::Answered;
        Some(now.saturating_duration_since(at))
    }

    /// A side's socket took bytes.
    pub fn on_sent(&mut self, to: Side, bytes: u32, limit: u32, now: Instant) -> Action {
        self.active = now;
        let from = to.other();
        match self.relay(from).on_sent(bytes, limit) {
            Flow::Resume => Action::Resume(from),
            _ => self.closed().unwrap_or(Action::None),
        }
    }

    /// A side ended its direction.
    pub fn on_ended(&mut self, from: Side, now: Instant) -> Action {
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

    /// When the session has to be looked at next.
    pub fn deadline(&self, timeouts: &Timeouts) -> Option<Instant> {
        if self.state == State::Connecting {
            // The attempt has a timer of its own.
            let may_have_left = self.to_backend.is_ending() && self.early.is_empty();
            return may_have_left.then(|| self.active + LEFT_AFTER);
        }
        if let Some(failure) = self.failure {
            return Some((failure.looked + FAILURE_LOOK).min(self.active + stall_max(timeouts)));
        }
        let half_close = timeouts.half_close.filter(|_| self.is_half_closed());
        let limit = half_close.or(timeouts.idle);
        limit.map(|limit| self.active + limit)
    }

    /// The time of [`Session::deadline`] has come, or had come before later activity moved it.
    /// `undelivered` is how many bytes are on their way to the [`Session::survivor`].
    pub fn on_deadline(&mut self, timeouts: &Timeouts, undelivered: u64, now: Instant) -> Action {
        if let Some(failure) = &mut self.failure {
            // A socket with much room tells of what its peer takes only now and then.
            if undelivered < failure.left {
                self.active = now;
            }
            (failure.left, failure.looked) = (undelivered, now);
            let stalled = now.saturating_duration_since(self.active) >= stall_max(timeouts);
            return if stalled { Action::Close(failure.reason()) } else { Action::None };
        }
        match self.deadline(timeouts) {
            Some(deadline) if deadline <= now && self.state == State::Connecting => {
                Action::Close(CloseReason::ClientLeft)
            }
            Some(deadline) if deadline <= now => {
                let half_close = self.is_half_closed() && timeouts.half_close.is_some();
                Action::Close(if half_close {
                    CloseReason::HalfCloseTimeout
                } else {
                    CloseReason::IdleTimeout
                })
            }
            _ => Action::None,
        }
    }

    /// How the connection of one side is closed. Only where both directions have ended is that an
    /// orderly end: what is cut is to look cut, or half an answer would pass for a whole one.
    pub fn ending(&self, side: Side, reason: CloseReason) -> Ending {
        let to_side = match side {
            Side::Client => &self.to_client,
            Side::Backend => &self.to_backend,
        };
        let at_once = reason == CloseReason::DrainDeadline;
        match self.failure {
            _ if reason == CloseReason::Finished => Ending::Now(Close::Graceful),
            _ if self.state == State::Connecting => Ending::Now(Close::Reset),
            // There was a whole stream for it, and its end.
            None if to_side.is_complete() && at_once => Ending::ResetOrEnd,
            None if to_side.is_complete() => Ending::ResetBehind,
            Some(failure) if failure.side != side && to_side.in_flight() == 0 && !at_once => {
                Ending::ResetBehind
            }
            _ => Ending::Now(Close::Reset),
        }
    }

    fn is_half_closed(&self) -> bool {
        self.to_backend.is_ending() || self.to_client.is_ending()
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

/// How long a session may make no progress that has a broken side.
fn stall_max(timeouts: &Timeouts) -> Duration {
    let limits = [timeouts.half_close, timeouts.idle];
    limits.into_iter().flatten().fold(FLUSH_STALL_MAX, Duration::min)
}

/// How a client of whose requests none is under way is closed for `reason`: it is owed nothing, so
/// an end of stream cuts nothing.
pub fn how_to_close(reason: CloseReason) -> Close {
    match reason {
        CloseReason::Finished
        | CloseReason::IdleTimeout
        | CloseReason::HalfCloseTimeout
        | CloseReason::EndpointRemoved
        | CloseReason::Drained
        | CloseReason::DrainDeadline
        | CloseReason::ClientLeft => Close::Graceful,
        CloseReason::ClientReset
        | CloseReason::BackendReset
        | CloseReason::BackendSilent
        | CloseReason::ClientSilent
        | CloseReason::ClientTimeout
        | CloseReason::ConnectFailed
        | CloseReason::ConnectTimeout
        | CloseReason::NoEndpoint
        | CloseReason::Overload => Close::Reset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u32 = 100;

    fn open() -> (Session, Instant) {
        let now = Instant::now();
        let mut session = Session::new(ConnId::from_parts(0, 0), now);
        session.on_trying(EndpointId::at(3), None);
        session.on_connected(ConnId::from_parts(1, 0), 0, now);
        (session, now)
    }

    #[test]
    fn each_end_is_passed_on_and_the_second_one_finishes_the_session() {
        for first in [Side::Client, Side::Backend] {
            let (mut session, now) = open();
            assert_eq!(session.on_ended(first, now), Action::Shutdown(first.other()));
            let second = first.other();
            assert_eq!(session.on_received(second, 5, LIMIT, now), Action::None);
            assert_eq!(session.on_ended(second, now), Action::Shutdown(first));
            assert_eq!(
                session.on_sent(first, 5, LIMIT, now),
                Action::Close(CloseReason::Finished),
                "only once the last byte has gone out"
            );
        }
    }

    #[test]
    fn a_reset_waits_for_the_bytes_that_came_before_it() {
        let (mut session, now) = open();
        session.on_received(Side::Backend, 10, LIMIT, now);
        assert_eq!(session.on_receive_failed(Side::Backend, now), Action::None);
        assert_eq!(session.on_received(Side::Client, 7, LIMIT, now), Action::Discard);
        assert_eq!(
            session.on_sent(Side::Client, 10, LIMIT, now),
            Action::Close(CloseReason::BackendReset)
        );
    }

    #[test]
    fn a_side_that_takes_nothing_is_still_read_to_its_end() {
        let (mut session, now) = open();
        session.on_received(Side::Client, 10, LIMIT, now);
        assert_eq!(session.on_send_failed(Side::Backend, now), Action::None);
        assert_eq!(session.on_received(Side::Backend, 3, LIMIT, now), Action::None);
        // The kernel reports an ordinary end once the error was taken by the send.
        assert_eq!(session.on_ended(Side::Backend, now), Action::None);
        assert_eq!(
            session.on_sent(Side::Client, 3, LIMIT, now),
            Action::Close(CloseReason::BackendReset)
        );
    }

    #[test]
    fn both_sides_breaking_closes_for_the_first_reason() {
        let (mut session, now) = open();
        session.on_send_failed(Side::Client, now);
        assert_eq!(
            session.on_send_failed(Side::Backend, now),
            Action::Close(CloseReason::ClientReset)
        );
    }

    #[test]
    fn activity_moves_the_deadline_and_a_half_close_changes_it() {
        let (mut session, start) = open();
        let second = Duration::from_secs(1);
        let timeouts = Timeouts { idle: Some(10 * second), half_close: Some(3 * second) };
        session.on_received(Side::Client, 1, LIMIT, start + 4 * second);
        assert_eq!(session.on_deadline(&timeouts, 0, start + 10 * second), Action::None);
        assert_eq!(
            session.on_deadline(&timeouts, 0, start + 14 * second),
            Action::Close(CloseReason::IdleTimeout)
        );
        session.on_ended(Side::Client, start + 5 * second);
        assert_eq!(session.deadline(&timeouts), Some(start + 8 * second));
        assert_eq!(
            session.on_deadline(&timeouts, 0, start + 8 * second),
            Action::Close(CloseReason::HalfCloseTimeout)
        );
    }

    #[test]
    fn without_a_limit_of_its_own_a_half_closed_session_keeps_the_idle_limit() {
        let (mut session, start) = open();
        let second = Duration::from_secs(1);
        let timeouts = Timeouts { idle: Some(10 * second), half_close: None };
        session.on_ended(Side::Client, start);
        assert_eq!(
            session.on_deadline(&timeouts, 0, start + 10 * second),
            Action::Close(CloseReason::IdleTimeout)
        );
    }

    const UNLIMITED: Timeouts = Timeouts { idle: None, half_close: None };
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_paused_side_that_broke_is_read_on_as_the_other_takes_bytes() {
        let (mut session, now) = open();
        assert_eq!(
            session.on_received(Side::Backend, LIMIT, LIMIT, now),
            Action::Pause(Side::Backend)
        );
        assert_eq!(session.on_send_failed(Side::Backend, now), Action::None);
        assert_eq!(session.on_sent(Side::Client, LIMIT, LIMIT, now), Action::Resume(Side::Backend));
        assert_eq!(session.on_received(Side::Backend, 9, LIMIT, now), Action::None);
        assert_eq!(session.on_receive_failed(Side::Backend, now), Action::None);
        let closed = Action::Close(CloseReason::BackendReset);
        assert_eq!(session.on_sent(Side::Client, 9, LIMIT, now), closed);
        let ending = |side| session.ending(side, CloseReason::BackendReset);
        assert_eq!(ending(Side::Backend), Ending::Now(Close::Reset));
        assert_eq!(ending(Side::Client), Ending::ResetBehind);
    }

    #[test]
    fn a_session_with_a_broken_side_ends_when_the_other_takes_nothing_whatever_the_limits() {
        for timeouts in [UNLIMITED, Timeouts { idle: None, half_close: Some(60 * SECOND) }] {
            let (mut session, start) = open();
            session.on_received(Side::Backend, LIMIT, LIMIT, start);
            session.on_send_failed(Side::Backend, start);
            let (closed, now) = loop {
                let now = session.deadline(&timeouts).expect("it is looked at");
                match session.on_deadline(&timeouts, 1000, now) {
                    Action::None => {}
                    action => break (action, now),
                }
            };
            assert_eq!(closed, Action::Close(CloseReason::BackendReset));
            assert_eq!(now - start, FLUSH_STALL_MAX);
            let ending = session.ending(Side::Client, CloseReason::BackendReset);
            assert_eq!(ending, Ending::Now(Close::Reset), "it takes nothing");
        }
    }

    #[test]
    fn what_the_kernel_delivers_is_progress_of_a_session_with_a_broken_side() {
        let (mut session, start) = open();
        session.on_received(Side::Backend, LIMIT, LIMIT, start);
        session.on_send_failed(Side::Backend, start);
        // One byte in 20 s is taken, of which no send tells.
        for step in 0..600_u32 {
            let (now, left) = (start + step * SECOND, 1000 - u64::from(step / 20));
            assert_eq!(session.on_deadline(&UNLIMITED, left, now), Action::None, "{step}");
        }
    }

    #[test]
    fn what_comes_for_a_broken_side_is_dropped_and_is_no_progress() {
        let (mut session, start) = open();
        session.on_received(Side::Backend, LIMIT, LIMIT, start);
        assert_eq!(
            session.on_received(Side::Client, LIMIT, LIMIT, start),
            Action::Pause(Side::Client)
        );
        assert_eq!(session.on_send_failed(Side::Backend, start), Action::Resume(Side::Client));
        for second in 0..30 {
            let now = start + second * SECOND;
            assert_eq!(session.on_received(Side::Client, 1, LIMIT, now), Action::Discard);
            assert_eq!(session.on_deadline(&UNLIMITED, 5, now), Action::None);
        }
        let closed = Action::Close(CloseReason::BackendReset);
        assert_eq!(session.on_deadline(&UNLIMITED, 5, start + 30 * SECOND), closed);
    }

    #[test]
    fn a_shorter_limit_holds_for_a_broken_side_as_well() {
        let timeouts = Timeouts { idle: Some(3 * SECOND), half_close: Some(SECOND) };
        let (mut session, start) = open();
        session.on_received(Side::Client, LIMIT, LIMIT, start);
        session.on_send_failed(Side::Client, start);
        let closed = Action::Close(CloseReason::ClientReset);
        assert_eq!(session.on_deadline(&timeouts, 0, start + SECOND), closed);
    }

    #[test]
    fn what_is_cut_looks_cut() {
        let cuts = [
            CloseReason::IdleTimeout,
            CloseReason::HalfCloseTimeout,
            CloseReason::EndpointRemoved,
            CloseReason::DrainDeadline,
            CloseReason::Overload,
        ];
        for reason in cuts {
            for bytes in [0, 5] {
                let (mut session, now) = open();
                session.on_received(Side::Backend, bytes, LIMIT, now);
                for side in [Side::Client, Side::Backend] {
                    assert_eq!(session.ending(side, reason), Ending::Now(Close::Reset));
                }
            }
        }
    }

    #[test]
    fn who_has_a_whole_stream_before_him_gets_it_before_the_cut() {
        let (mut session, now) = open();
        session.on_received(Side::Backend, 5, LIMIT, now);
        session.on_ended(Side::Backend, now);
        let ending = |session: &Session, side| session.ending(side, CloseReason::HalfCloseTimeout);
        assert_eq!(ending(&session, Side::Client), Ending::Now(Close::Reset), "it takes nothing");
        session.on_sent(Side::Client, 5, LIMIT, now);
        assert_eq!(ending(&session, Side::Client), Ending::ResetBehind);
        assert_eq!(ending(&session, Side::Backend), Ending::Now(Close::Reset));
        let at_deadline = session.ending(Side::Client, CloseReason::DrainDeadline);
        assert_eq!(at_deadline, Ending::ResetOrEnd, "there is no time to wait");
    }

    #[test]
    fn both_ends_in_order_are_an_orderly_end() {
        let (mut session, now) = open();
        session.on_ended(Side::Backend, now);
        let closed = Action::Close(CloseReason::Finished);
        assert_eq!(session.on_ended(Side::Client, now), closed);
        for side in [Side::Client, Side::Backend] {
            assert_eq!(session.ending(side, CloseReason::Finished), Ending::Now(Close::Graceful));
        }
    }

    #[test]
    fn a_client_without_a_backend_leaves_by_a_reset_or_by_an_end_before_the_first_byte() {
        let now = Instant::now();
        let connecting = || {
            let mut session = Session::new(ConnId::from_parts(0, 0), now);
            session.on_trying(EndpointId::at(3), None);
            session.on_connecting(ConnId::from_parts(1, 0), now);
            session
        };
        let left = Action::Close(CloseReason::ClientLeft);
        let mut waiting = Session::new(ConnId::from_parts(0, 0), now);
        assert_eq!(waiting.on_ended(Side::Client, now), left, "no endpoint is there");
        let none = Timeouts { idle: None, half_close: None };
        let mut slow = connecting();
        assert_eq!(slow.on_ended(Side::Client, now), Action::None, "the connect may succeed");
        assert_eq!(slow.on_deadline(&none, 0, now + LEFT_AFTER / 2), Action::None);
        assert_eq!(slow.on_deadline(&none, 0, now + LEFT_AFTER), left);
        let reset = Action::Close(CloseReason::ClientReset);
        assert_eq!(connecting().on_receive_failed(Side::Client, now), reset);
        assert_eq!(connecting().on_send_failed(Side::Client, now), reset);
        assert_eq!(connecting().on_early(now), Action::Pause(Side::Client));
        for side in [Side::Client, Side::Backend] {
            let ending = connecting().ending(side, CloseReason::ClientLeft);
            assert_eq!(ending, Ending::Now(Close::Reset));
        }
    }

    #[test]
    fn a_client_that_ends_behind_bytes_is_served() {
        let mut buffers = crate::io::buffers::Buffers::new(1).unwrap();
        let now = Instant::now();
        let mut session = Session::new(ConnId::from_parts(0, 0), now);
        session.on_trying(EndpointId::at(3), None);
        let mut buf = buffers.take().unwrap();
        buffers.set_len(&mut buf, 4);
        buffers.push(&mut session.early, buf);
        session.on_early(now);
        assert_eq!(session.on_ended(Side::Client, now), Action::None);
        session.on_connected(ConnId::from_parts(1, 0), 0, now);
        assert!(session.has_ended(Side::Client) && !session.has_ended(Side::Backend));
        assert_eq!(session.on_received(Side::Client, 4, LIMIT, now), Action::None);
        assert_eq!(session.on_sent(Side::Backend, 4, LIMIT, now), Action::None);
        assert_eq!(session.on_ended(Side::Backend, now), Action::Close(CloseReason::Finished));
    }

    #[test]
    fn the_first_byte_back_is_timed_once() {
        let (mut session, now) = open();
        assert_eq!(session.take_first_byte(now), None);
        session.on_received(Side::Client, 1, LIMIT, now);
        let later = now + Duration::from_millis(2);
        assert_eq!(session.take_first_byte(later), Some(Duration::from_millis(2)));
        assert_eq!(session.take_first_byte(later), None);
    }
}
