//! A client's life: a state machine without I/O.
//!
//! ```text
//! Connecting ──connected──▶ Open ──both directions done──▶ closed: Finished
//!     │ ▲ └──failed: next endpoint──┘ │
//!     └─┘                             ├─ a side broke: what it sent before still goes out, then ▶ reset
//!     └──none left──▶ closed          └─ deadline ▶ closed
//! ```
//!
//! The worker tells a session what happened and does what it answers. Which bytes are where is the
//! driver's business; a session counts them.

use std::time::{Duration, Instant};

use super::Side;
use super::relay::{Flow, Relay};
use crate::io::{Close, ConnId};
use crate::limits::CONNECT_ATTEMPTS_MAX;
use crate::telemetry::CloseReason;

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
    endpoints: [u16; CONNECT_ATTEMPTS_MAX],
    len: u8,
}

impl Tried {
    /// How many attempts there were.
    pub fn attempts(&self) -> u32 {
        u32::from(self.len)
    }

    /// Whether this endpoint was tried.
    pub fn contains(&self, endpoint: u16) -> bool {
        self.endpoints[..usize::from(self.len)].contains(&endpoint)
    }

    /// Takes note of an attempt.
    pub fn push(&mut self, endpoint: u16) {
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

/// When the client's first byte was seen, for the time to the first byte back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FirstByte {
    Unasked,
    Asked(Instant),
    Answered,
}

/// One client and, once connected, its backend.
#[derive(Debug)]
pub struct Session {
    client: ConnId,
    backend: Option<ConnId>,
    endpoint: Option<u16>,
    tried: Tried,
    state: State,
    to_backend: Relay,
    to_client: Relay,
    /// A side broke: the reason to close with, once what it sent before has gone out.
    failure: Option<CloseReason>,
    opened: Instant,
    active: Instant,
    first_byte: FirstByte,
    /// Marks the load estimator's window in which the session was last counted as active.
    pub window: u32,
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
            failure: None,
            opened: now,
            active: now,
            first_byte: FirstByte::Unasked,
            window: 0,
        }
    }

    /// The connection of one side; a backend's only once there is one.
    pub fn conn(&self, side: Side) -> Option<ConnId> {
        match side {
            Side::Client => Some(self.client),
            Side::Backend => self.backend,
        }
    }

    /// The endpoint that serves the session or is being tried for it.
    pub fn endpoint(&self) -> Option<u16> {
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
    pub fn on_trying(&mut self, endpoint: u16, backend: Option<ConnId>) {
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
        self.to_backend.on_received(preface, u32::MAX);
    }

    /// Bytes arrived from one side. Unless told to discard them, the worker sends them to the
    /// other. `limit` is how many may be in flight in one direction now.
    pub fn on_received(&mut self, from: Side, bytes: u32, limit: u32, now: Instant) -> Action {
        self.active = now;
        if self.first_byte == FirstByte::Unasked && from == Side::Client {
            self.first_byte = FirstByte::Asked(now);
        }
        let relay = self.relay(from);
        if relay.is_broken() {
            return Action::Discard;
        }
        match relay.on_received(bytes, limit) {
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
        self.active = now;
        self.relay(from).on_ended();
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
        self.active = now;
        self.relay(from).on_ended();
        self.on_broken(from)
    }

    /// A side broke while sending to it. What it sent before may still be on its way here, so it
    /// is read to its end.
    pub fn on_send_failed(&mut self, to: Side, now: Instant) -> Action {
        self.active = now;
        self.on_broken(to)
    }

    fn on_broken(&mut self, side: Side) -> Action {
        let reason = match side {
            Side::Client => CloseReason::ClientReset,
            Side::Backend => CloseReason::BackendReset,
        };
        self.failure.get_or_insert(reason);
        self.relay(side.other()).on_broken();
        self.closed().unwrap_or(Action::Pause(side.other()))
    }

    /// When the session has to be looked at next.
    pub fn deadline(&self, timeouts: &Timeouts) -> Option<Instant> {
        if self.state == State::Connecting {
            return None; // The attempt has a timer of its own.
        }
        let half_close = timeouts.half_close.filter(|_| self.is_half_closed());
        let limit = half_close.or(timeouts.idle);
        limit.map(|limit| self.active + limit)
    }

    /// The time of [`Session::deadline`] has come, or had come before later activity moved it.
    pub fn on_deadline(&mut self, timeouts: &Timeouts, now: Instant) -> Action {
        match self.deadline(timeouts) {
            Some(deadline) if deadline <= now => Action::Close(match self.failure {
                Some(reason) => reason,
                None if self.is_half_closed() && timeouts.half_close.is_some() => {
                    CloseReason::HalfCloseTimeout
                }
                None => CloseReason::IdleTimeout,
            }),
            _ => Action::None,
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
            .then(|| Action::Close(self.failure.unwrap_or(CloseReason::Finished)))
    }
}

/// How the connections of a session that ended for `reason` are closed: with a reset where the
/// peer must not take the end for an orderly one.
pub fn how_to_close(reason: CloseReason) -> Close {
    match reason {
        CloseReason::Finished
        | CloseReason::IdleTimeout
        | CloseReason::HalfCloseTimeout
        | CloseReason::EndpointRemoved
        | CloseReason::Drained
        | CloseReason::DrainDeadline => Close::Graceful,
        CloseReason::ClientReset
        | CloseReason::BackendReset
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
        session.on_trying(3, None);
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
        assert_eq!(session.on_receive_failed(Side::Backend, now), Action::Pause(Side::Client));
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
        assert_eq!(session.on_send_failed(Side::Backend, now), Action::Pause(Side::Client));
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
        assert_eq!(session.on_deadline(&timeouts, start + 10 * second), Action::None);
        assert_eq!(
            session.on_deadline(&timeouts, start + 14 * second),
            Action::Close(CloseReason::IdleTimeout)
        );
        session.on_ended(Side::Client, start + 5 * second);
        assert_eq!(session.deadline(&timeouts), Some(start + 8 * second));
        assert_eq!(
            session.on_deadline(&timeouts, start + 8 * second),
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
            session.on_deadline(&timeouts, start + 10 * second),
            Action::Close(CloseReason::IdleTimeout)
        );
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
