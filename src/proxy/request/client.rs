//! The client's own side: what it sends, what it takes, and when it is done with.

use std::mem;
use std::time::{Duration, Instant};

use super::action::{Action, Actions, ClientEnding};
use super::backend::Backend;
use super::policy::{Moment, Room};
use super::state::{History, Pending, Progress, State, Wanted};
use super::{BackendConn, Binding, Broadcast, Course, Framing, Front, Limits, Request};
use crate::io::buffers::Buffers;
use crate::io::{Buf, Chain, Close, ConnId, Unheard};
use crate::limits::{BUFFER_SIZE, DRAIN_PATIENCE, PARTIAL_BUFFERS_SHORT_MAX};
use crate::metrics::{CloseReason, Discard, Outcome};
use crate::protocol::Verb;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::pulse::Pulse;
use crate::proxy::route::StableHash;
use crate::proxy::session::{Tried, how_to_close};
use crate::proxy::{Bytes, Side};

/// A client and the request that is under way for it.
#[allow(
    clippy::struct_excessive_bools,
    reason = "independent facts, each told by the driver or the client"
)]
#[derive(Debug)]
pub struct Client {
    conn: ConnId,
    /// What it has sent and what is not done with.
    pub(super) input: Chain,
    pub(super) framing: Framing,
    /// Bytes of the input that were looked at.
    scanned: u32,
    pub(super) state: State,
    /// Bytes on their way to it.
    pub(super) unsent: u32,
    /// Whether it acknowledges what it is sent.
    pulse: Pulse,
    /// It is received from.
    pub(super) receiving: bool,
    /// It has ended its direction.
    pub(super) ended: bool,
    /// It has sent a request, or what was taken for one.
    began: bool,
    /// It is in the worker's list of those to be served.
    pub(super) due: bool,
    /// Which of the two was the first to end its direction: it, or the backend of its last reply.
    pub(super) ended_first: Option<Side>,
    /// Bytes of it and for it so far.
    pub(super) bytes: Bytes,
    /// The way of its latest request, if that was sent.
    pub(super) course: Option<Course>,
    /// When its timer fires.
    pub(super) timer: Option<Instant>,
    /// Marks the load estimator's window in which it was last counted as active.
    window: u32,
    opened: Instant,
    /// When the last byte of it or to it moved that counts.
    pub(super) active: Instant,
}

/// Where a request wants to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// To whichever endpoint.
    Any,
    /// To the store that holds this key, where keys are routed.
    Key(StableHash),
    /// To the store of this number, whose turn it is in a broadcast. There may be none: then all
    /// have had it.
    Store(u16),
}

/// What is left of a client whose bytes have become opaque.
#[derive(Debug)]
pub struct OpaqueParts {
    /// The client's connection.
    pub client: ConnId,
    /// What it has sent that no backend was sent.
    pub input: Chain,
    /// Bytes on their way to it.
    pub unsent: u32,
    /// It has ended its direction.
    pub ended: bool,
    /// The connection that it holds.
    pub backend: BackendConn,
    /// Bytes on their way there.
    pub backend_unsent: u32,
    /// That connection takes nothing more.
    pub backend_broken: bool,
    /// When it was accepted.
    pub opened: Instant,
    /// Bytes of it and for it so far.
    pub bytes: Bytes,
}

impl Client {
    /// A client just accepted.
    pub fn new(conn: ConnId, framing: Framing, now: Instant) -> Self {
        Self {
            conn,
            input: Chain::default(),
            framing,
            scanned: 0,
            state: State::EMPTY,
            unsent: 0,
            pulse: Pulse::default(),
            receiving: false,
            ended: false,
            began: false,
            due: false,
            ended_first: None,
            bytes: Bytes::default(),
            course: None,
            timer: None,
            window: 0,
            opened: now,
            active: now,
        }
    }

    /// The connection of one side; a backend's only while it holds one.
    pub fn conn(&self, side: Side) -> Option<ConnId> {
        match side {
            Side::Client => Some(self.conn),
            Side::Backend => self.backend().map(|backend| backend.conn),
        }
    }

    /// The connection to a backend that it holds.
    pub fn backend(&self) -> Option<&BackendConn> {
        self.state.backend().map(|backend| &backend.conn)
    }

    /// Likewise, where a reply is expected of which nothing has come.
    pub fn unanswered_backend(&self) -> Option<&BackendConn> {
        let flight = self.state.in_flight()?;
        (flight.reply == Progress::Expected).then_some(&flight.backend.conn)
    }

    /// Whether its backend takes nothing more.
    pub fn is_backend_broken(&self) -> bool {
        self.state.backend().is_some_and(|backend| backend.broken)
    }

    /// What is known of whether a side acknowledges what it is sent.
    pub fn pulse(&mut self, side: Side) -> Option<&mut Pulse> {
        match side {
            Side::Client => Some(&mut self.pulse),
            Side::Backend => self.state.backend_mut().map(|backend| &mut backend.pulse),
        }
    }

    /// The mark of the load estimator.
    pub fn window(&mut self) -> &mut u32 {
        &mut self.window
    }

    /// How long ago it was accepted.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.opened)
    }

    /// Whether no request is known and it is not to leave.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle { .. })
    }

    /// Whether its request is in the queue.
    pub fn is_queued(&self) -> bool {
        matches!(self.state, State::Queued { .. })
    }

    /// Whether its request is with a backend.
    pub fn is_in_flight(&self) -> bool {
        matches!(self.state, State::InFlight(_))
    }

    /// The endpoint that has all of its request and has answered nothing, and since when that is so.
    pub fn asked_since(&self) -> Option<(EndpointId, Instant)> {
        let State::InFlight(flight) = &self.state else { return None };
        let is_asked = flight.reply == Progress::Expected && !flight.is_streaming();
        is_asked.then_some((flight.backend.conn.endpoint, flight.moved))
    }

    /// Where its request that has no connection yet wants to go.
    pub fn target(&self) -> Target {
        let Some(pending) = self.state.pending() else { unreachable!("it wants no connection") };
        match (&pending.history.broadcast, pending.wanted.key()) {
            (Some(broadcast), _) => Target::Store(broadcast.store),
            (None, Some(key)) => Target::Key(key),
            (None, None) => Target::Any,
        }
    }

    /// The endpoints that were tried for that request.
    pub(super) fn tried(&self) -> Tried {
        self.state.pending().map_or_else(Tried::default, |pending| pending.history.tried)
    }

    /// Marks it as one to be served. Says whether it was not.
    pub fn mark_due(&mut self) -> bool {
        !mem::replace(&mut self.due, true)
    }

    /// Bytes arrived from it. It is to be served; marks it so and says whether it was not.
    pub fn on_received(&mut self, buf: Buf, buffers: &mut Buffers, now: Instant) -> bool {
        self.pulse.on_heard();
        self.bytes.to_backend += u64::from(buf.len());
        // One that is to leave does not stay by sending.
        if !matches!(self.state, State::Leaving { .. }) {
            self.active = now;
        }
        if let State::InFlight(flight) = &mut self.state {
            flight.upload.on_bytes(buf.len(), now);
        }
        buffers.push(&mut self.input, buf);
        self.mark_due()
    }

    /// It ended its direction: a request that is not whole will never be. Likewise.
    pub fn on_ended(&mut self, now: Instant) -> bool {
        self.ended = true;
        if !matches!(self.state, State::Leaving { .. }) {
            self.ended_first.get_or_insert(Side::Client);
        }
        self.active = now;
        self.mark_due()
    }

    /// Bytes were queued for it.
    pub fn on_queued(&mut self, bytes: u32) {
        self.unsent += bytes;
        self.pulse.on_sent();
    }

    /// Its socket took bytes.
    pub fn on_sent(&mut self, bytes: u32, moment: &Moment<'_>) -> Actions {
        let mut actions = Actions::NONE;
        self.unsent = self.unsent.saturating_sub(bytes);
        self.active = moment.now;
        if let State::InFlight(flight) = &mut self.state {
            flight.moved = moment.now;
        }
        if let Some(backend) = self.state.backend_mut()
            && !backend.receiving
            && self.unsent <= moment.room().max / 2
        {
            backend.receiving = true;
            actions.push(Action::Resume(Side::Backend));
        }
        let reads = self.is_idle() && !self.input.is_empty();
        if self.is_finished() || reads || moment.drains_since.is_some() {
            actions.push(Action::Serve);
        } else if self.unsent == 0
            && matches!(self.state, State::InFlight(_) | State::Leaving { .. })
        {
            // It is the backend's turn now, or its own to leave.
            self.arm(moment, &mut actions);
        }
        actions
    }

    /// Whether it has ended its direction and is owed nothing more.
    fn is_finished(&self) -> bool {
        let nothing_under_way = matches!(self.state, State::Idle { .. } | State::Leaving { .. });
        self.ended && nothing_under_way && self.unsent == 0
    }

    /// It is served, after the turn's events: what is to be done. Where that may not be all of it, an
    /// [`Action::Serve`] is at the end.
    pub fn next(&mut self, moment: &mut Moment<'_>) -> Actions {
        self.due = false;
        let room = moment.room();
        match &self.state {
            State::Ready { kept, .. } => acquire(kept.as_ref()).into(),
            State::InFlight(_) => self.next_in_flight(room, moment),
            State::Idle { .. } if self.unsent <= room.max => self.next_request(room, moment),
            State::Opaque { .. } => unreachable!("it is a session by now"),
            _ => self.settle(room, moment),
        }
    }

    fn next_in_flight(&mut self, room: Room, moment: &mut Moment<'_>) -> Actions {
        let Some(flight) = self.state.in_flight() else { unreachable!("it is in flight") };
        if flight.is_streaming() {
            if flight.backend.unsent < room.max && !self.input.is_empty() {
                return self.stream_on(moment);
            }
            if self.ended && self.input.is_empty() && !flight.backend.broken {
                // Its backend would wait for the rest as long as it may.
                return if flight.is_answered() {
                    self.end_request(Discard::Abandoned, moment)
                } else {
                    Action::Close(CloseReason::ClientReset).into()
                };
            }
        }
        if flight.is_passed_on() {
            return self.conclude(None, moment);
        }
        self.settle(room, moment)
    }

    /// Looks for a request at the front of the input.
    fn next_request(&mut self, room: Room, moment: &mut Moment<'_>) -> Actions {
        let (buffers, scratch) = (&mut *moment.buffers, &mut *moment.scratch);
        match self.framing.front(&mut self.input, &mut self.scanned, buffers, scratch) {
            Front::Partial if self.input.buffers() > PARTIAL_BUFFERS_SHORT_MAX && room.is_short => {
                // Many that begin large heads and never end them would stall everybody.
                Action::Close(CloseReason::Overload).into()
            }
            Front::Partial => self.settle(room, moment),
            Front::Refused(len, error) => {
                moment.buffers.advance(&mut self.input, len);
                self.course = None;
                let count = Action::Count(Verb::OTHER, error.outcome(), Duration::ZERO);
                Actions::from(count).and(Action::Reply(error, None)).and(Action::Serve)
            }
            Front::Request(request) => self.begin(request, moment),
            Front::Opaque => self.on_begun(Wanted::Opaque, None, moment.now),
        }
    }

    fn begin(&mut self, request: Request, moment: &mut Moment<'_>) -> Actions {
        moment.retries.on_request(moment.now);
        let goes_to_all = moment.policy.binding == Binding::Key && request.to_all;
        let broadcast = goes_to_all.then(|| Box::new(Broadcast::new(moment.policy.protocol)));
        self.on_begun(Wanted::Request(request), broadcast, moment.now)
    }

    /// What was found at the front is under way from now on.
    fn on_begun(
        &mut self,
        wanted: Wanted,
        broadcast: Option<Box<Broadcast>>,
        now: Instant,
    ) -> Actions {
        let State::Idle { kept } = mem::replace(&mut self.state, State::EMPTY) else {
            unreachable!("one request at a time")
        };
        self.began = true;
        self.course = None;
        let action = acquire(kept.as_ref());
        let pending = Pending::new(wanted, History::new(broadcast, now), now);
        self.state = State::Ready { pending, kept };
        action.into()
    }

    /// Receives from it as long as what it sends can be held, and closes it if it is done.
    fn settle(&mut self, room: Room, moment: &mut Moment<'_>) -> Actions {
        if self.is_finished() {
            return Action::Close(CloseReason::Finished).into();
        }
        let mut actions = Actions::NONE;
        self.settle_after(room, moment, &mut actions);
        actions
    }

    /// The same behind other actions, of one that is not done.
    pub(super) fn settle_after(
        &mut self,
        room: Room,
        moment: &mut Moment<'_>,
        actions: &mut Actions,
    ) {
        // A request that is not whole yet has to go on, however short buffers are.
        let (waits_for_more, held) = match &self.state {
            State::Idle { .. } => (self.unsent <= room.max, 0),
            State::Ready { pending, .. } | State::Queued { pending } => {
                (false, pending.wanted.len())
            }
            State::InFlight(flight) => {
                let streams = flight.is_streaming() && flight.backend.unsent < room.max;
                (streams, flight.held.max(flight.outgoing))
            }
            State::Leaving { .. } => {
                moment.buffers.clear(&mut self.input);
                (false, 0)
            }
            State::Opaque { .. } => unreachable!("it is a session by now"),
        };
        let ahead = self.input.bytes() - held;
        let wanted = waits_for_more || ahead < BUFFER_SIZE as u32;
        if self.receiving != wanted {
            self.receiving = wanted;
            let side = Side::Client;
            actions.push(if wanted { Action::Resume(side) } else { Action::Pause(side) });
        }
        self.arm(moment, actions);
        let has_nothing = self.is_idle() && self.input.is_empty();
        if moment.drains_since.is_some()
            && has_nothing
            && self.drain_deadline(moment).is_none_or(|at| at <= moment.now)
        {
            actions.push(Action::LookBeforeLeaving);
        }
    }

    /// In a drain, it has nothing under way, and this is what its connection shows.
    ///
    /// It is closed at once, which it sees as the ordinary end. A request that is in its socket by
    /// then is served first; who sends one later sees the end, or a reset, in place of a reply, as
    /// at any server that closes an idle connection.
    pub fn on_looked(&mut self, unheard: Unheard, undelivered: u64, now: Instant) -> Actions {
        if unheard == Unheard::Bytes {
            return Actions::NONE;
        }
        if self.unsent == 0 && undelivered == 0 {
            return Action::Close(CloseReason::Drained).into();
        }
        // A reset in answer to what it may send would overtake its last reply.
        let kept = self.state.take_kept();
        self.leave(kept, now)
    }

    /// Ends our direction to it behind all that it is sent, and waits for it to leave.
    pub(super) fn leave(&mut self, kept: Option<Backend>, now: Instant) -> Actions {
        self.state = State::Leaving { kept };
        self.active = now;
        Actions::from(Action::Shutdown).and(Action::Serve)
    }

    /// In a drain, until when it is waited for if it has not begun to ask or is to leave.
    pub(super) fn drain_deadline(&self, moment: &Moment<'_>) -> Option<Instant> {
        let since = moment.drains_since?;
        match self.state {
            State::Leaving { .. } => (self.unsent == 0).then(|| self.active + DRAIN_PATIENCE),
            State::Idle { .. } => {
                // Whoever came while newcomers were still welcome is to be served once.
                let announced = moment.policy.drain_delay + DRAIN_PATIENCE;
                let is_newcomer = self.opened + announced >= since;
                let is_silent = self.input.is_empty() && !self.began;
                (is_silent && is_newcomer).then(|| self.opened.max(since) + DRAIN_PATIENCE)
            }
            _ => None,
        }
    }

    /// There is no endpoint for its request, which is to wait for one. Says until when, however often
    /// endpoints come and go meanwhile.
    pub(super) fn on_no_endpoint(&mut self, limits: &Limits, now: Instant) -> Instant {
        let Some(pending) = self.state.pending_mut() else { unreachable!("it wants none") };
        let since = *pending.history.no_endpoint_since.get_or_insert(now);
        pending.awaits_endpoint = Some(since);
        since + limits.endpoint
    }

    /// Its request has waited for a connection for as long as it may, and its endpoints are not usable: it
    /// waits on for as long as for one, if that is longer. Says what is to be done for that.
    pub fn on_outage(&mut self, moment: &Moment<'_>) -> Option<Actions> {
        let State::Queued { pending } = &mut self.state else { return None };
        let since = *pending.history.no_endpoint_since.get_or_insert(pending.wanting);
        if pending.awaits_endpoint.is_some() || since + moment.policy.limits.endpoint <= moment.now
        {
            return None;
        }
        pending.awaits_endpoint = Some(since);
        let mut actions = Actions::NONE;
        self.arm(moment, &mut actions);
        Some(actions)
    }

    /// There are endpoints. If its request has waited for one, it now waits for a connection.
    pub(super) fn on_endpoints(&mut self, now: Instant) {
        let Some(pending) = self.state.pending_mut() else { unreachable!("it wants none") };
        if pending.awaits_endpoint.take().is_some() {
            pending.timed = now;
        }
    }

    /// Its request has joined the queue.
    pub fn on_waiting(&mut self, moment: &mut Moment<'_>) -> Actions {
        let State::Ready { pending, kept: None } = mem::replace(&mut self.state, State::EMPTY)
        else {
            unreachable!("it has nothing to wait for")
        };
        self.state = State::Queued { pending };
        self.settle(moment.room(), moment)
    }

    /// Its request has left the queue to be placed again.
    pub fn on_placed_again(&mut self) -> Actions {
        let State::Queued { pending } = mem::replace(&mut self.state, State::EMPTY) else {
            unreachable!("it was not in the queue")
        };
        self.state = State::Ready { pending, kept: None };
        Action::Serve.into()
    }

    /// No connection to an endpoint can be had: its request goes to another one.
    pub fn on_passed_over(&mut self, endpoint: EndpointId) -> Actions {
        let actions = self.on_placed_again();
        if let Some(pending) = self.state.pending_mut() {
            pending.history.tried.push(endpoint);
        }
        actions
    }

    /// It is closed for `reason`: how, and what is to be done before. A connection without a request
    /// on it is to be [released](Client::release) behind that.
    pub fn on_closing(
        &mut self,
        reason: CloseReason,
        buffers: &mut Buffers,
        now: Instant,
    ) -> (ClientEnding, Actions) {
        let ending = self.ending(reason);
        let holds_itself_up = self.holds_itself_up();
        let outcome = match reason {
            CloseReason::IdleTimeout | CloseReason::HalfCloseTimeout if !holds_itself_up => {
                Outcome::Timeout
            }
            CloseReason::IdleTimeout
            | CloseReason::HalfCloseTimeout
            | CloseReason::ClientTimeout => Outcome::ClientTimeout,
            CloseReason::DrainDeadline | CloseReason::EndpointRemoved | CloseReason::Overload => {
                Outcome::Cut
            }
            _ => Outcome::ClientGone,
        };
        let mut actions = Actions::NONE;
        let uncounted = match mem::replace(&mut self.state, State::EMPTY) {
            State::Idle { kept } | State::Leaving { kept } => {
                self.state = State::Leaving { kept };
                None
            }
            State::Ready { pending, kept } => {
                self.state = State::Leaving { kept };
                Some((pending.wanted.verb(), pending.history.since))
            }
            State::Queued { pending } => {
                actions.push(Action::LeaveQueue);
                Some((pending.wanted.verb(), pending.history.since))
            }
            State::InFlight(flight) => {
                let is_counted = flight.is_answered();
                // Behind a half-close it cannot be told whether anybody still waited.
                let why = match outcome {
                    Outcome::Timeout if reason != CloseReason::HalfCloseTimeout => Discard::Timeout,
                    _ => Discard::Abandoned,
                };
                actions.push(flight.backend.discard(why));
                (!is_counted).then_some((flight.request.verb, flight.history.since))
            }
            State::Opaque { .. } => unreachable!("it is a session by now"),
        };
        if let Some((verb, since)) = uncounted {
            let took = now.saturating_duration_since(since);
            actions.push(Action::Count(verb, outcome, took));
        }
        buffers.clear(&mut self.input);
        (ending, actions)
    }

    fn ending(&self, reason: CloseReason) -> ClientEnding {
        let nothing_under_way = matches!(self.state, State::Idle { .. } | State::Leaving { .. });
        // A connection is clean when every request on it was answered in full.
        let cut = self.unsent > 0 || !nothing_under_way;
        let lingers = matches!(self.state, State::Leaving { .. }) && self.unsent == 0;
        match reason {
            // It gets what its backend had sent.
            CloseReason::BackendReset | CloseReason::EndpointRemoved => ClientEnding::ResetBehind,
            // It has been sent its end already, and may still be taking what came before.
            CloseReason::HalfCloseTimeout if lingers => ClientEnding::EndOrResetBehind,
            _ if cut => ClientEnding::Now(Close::Reset),
            _ => ClientEnding::Now(how_to_close(reason)),
        }
    }

    /// What becomes a session, after [`Action::BecomeOpaque`].
    pub fn into_opaque_parts(self, buffers: &mut Buffers) -> OpaqueParts {
        let State::Opaque { backend, sent } = self.state else {
            unreachable!("its bytes are understood")
        };
        let mut input = self.input;
        // What was held of a request that was sent is not to be sent again.
        buffers.advance(&mut input, sent);
        OpaqueParts {
            client: self.conn,
            input,
            unsent: self.unsent,
            ended: self.ended,
            backend: backend.conn,
            backend_unsent: backend.unsent,
            backend_broken: backend.broken,
            opened: self.opened,
            bytes: self.bytes,
        }
    }
}

/// How a request gets a connection: the one that its client holds is looked at before it is used again.
pub(super) fn acquire(kept: Option<&Backend>) -> Action {
    kept.map_or(Action::Acquire, |backend| Action::Prove(backend.conn.conn))
}
