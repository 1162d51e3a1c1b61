//! The backend's side: a connection, the reply on it, and what comes in place of one.

use std::mem;
use std::time::{Duration, Instant};

use super::action::{Action, Actions, Fate};
use super::backend::Backend;
use super::client::Client;
use super::policy::Moment;
use super::state::{History, InFlight, Pending, Progress, State, Wanted};
use super::{BackendConn, Broadcast, Course, ErrorReply, Reply, Request};
use crate::io::buffers::Buffers;
use crate::io::{Buf, ConnId};
use crate::metrics::{CloseReason, Discard, Outcome, Retry};
use crate::protocol::Verb;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::session::Attempts;
use crate::proxy::{Bytes, Side};

/// What is to be done with bytes that a backend sent.
#[derive(Debug, PartialEq, Eq)]
pub struct Replied {
    /// So many of them, at the front, are sent to the client; the rest is dropped.
    pub passed: usize,
    /// The endpoint has answered on this connection, which was made then.
    pub answered: Option<(EndpointId, ConnId, Instant)>,
    /// How long it was from the request to this, if this is the first of the reply; and for how long of that
    /// nothing had moved.
    pub first_byte: Option<(Duration, Duration)>,
    /// How long it was from the first of the reply to this, if this is the last of it.
    pub transfer: Option<Duration>,
    /// And then this.
    pub actions: Actions,
}

impl Replied {
    /// Nothing of it is a reply.
    fn unexpected(actions: Actions) -> Self {
        Self { passed: 0, answered: None, first_byte: None, transfer: None, actions }
    }
}

/// There is no buffer for what has to be sent.
#[derive(Debug)]
pub struct NoBuffer;

/// A request that was answered, and what its reply says of the connections.
struct Over {
    request: Request,
    history: History,
    /// Bytes at the front of the input that are its own.
    held: u32,
    /// It has been counted.
    is_counted: bool,
    kept: Option<Backend>,
    /// The client's connection is as it was before the request.
    keeps_alive: bool,
    /// The client has to see that its request was not passed on.
    is_cut: bool,
}

/// A request that gets an error in place of its reply.
struct Failed {
    wanted: Wanted,
    history: History,
    kept: Option<Backend>,
    /// Bytes at the front of the input that are its own.
    held: u32,
    /// The client has a part of the reply.
    has_part: bool,
    /// The number of the store that it is for, if it lacks that.
    store: Option<u16>,
}

impl Client {
    /// Its request has got a connection, which is open and silent.
    pub fn on_acquired(&mut self, conn: BackendConn, moment: &mut Moment<'_>) -> Actions {
        let (State::Queued { pending } | State::Ready { pending, kept: None }) =
            mem::replace(&mut self.state, State::EMPTY)
        else {
            unreachable!("it wants none")
        };
        self.use_backend(pending, Backend::new(conn), moment)
    }

    /// The connection that it holds was looked at: why it must not be used again, if it must not.
    pub fn on_proved(&mut self, why_not: Option<Discard>, moment: &mut Moment<'_>) -> Actions {
        let State::Ready { pending, kept: Some(backend) } =
            mem::replace(&mut self.state, State::EMPTY)
        else {
            unreachable!("it was not to be proved")
        };
        // Answered before it was asked.
        let early = backend.unsent > 0;
        match why_not.or(early.then_some(Discard::Unexpected)) {
            None => self.use_backend(pending, backend, moment),
            Some(why) => {
                self.state = State::Ready { pending, kept: None };
                Actions::from(backend.discard(why)).and(Action::Acquire)
            }
        }
    }

    fn use_backend(
        &mut self,
        pending: Pending,
        backend: Backend,
        moment: &mut Moment<'_>,
    ) -> Actions {
        let Pending { wanted, mut history, wanting, .. } = pending;
        let BackendConn { conn, endpoint, .. } = backend.conn;
        history.tried.push(endpoint);
        let attempts = Attempts { count: history.attempts(), endpoint, at: moment.now };
        let bytes = Bytes { to_backend: wanted.len().into(), to_client: 0 };
        self.course = Some(Course { attempts, answered: None, bytes });
        let Wanted::Request(request) = wanted else {
            return self.turn_opaque(wanted.verb(), backend, &history, 0, moment.now);
        };
        self.framing.on_asked();
        let asks = Action::Asks(endpoint, conn, moment.now.saturating_duration_since(wanting));
        self.state = State::InFlight(InFlight::new(request, history, backend, moment.now));
        let mut actions = Actions::from(asks).and(Action::Send(conn));
        if request.whole {
            self.settle_after(moment.room(), moment, &mut actions);
        } else {
            // The rest of it follows.
            actions.push(Action::Serve);
        }
        actions
    }

    /// Whether bytes are still to be sent to the backend, after [`Action::Send`].
    pub fn has_outgoing(&self) -> bool {
        self.state.in_flight().is_some_and(|flight| flight.outgoing > 0)
    }

    /// The next of them.
    ///
    /// # Errors
    /// No buffer is free for them.
    pub fn take_outgoing(&mut self, buffers: &mut Buffers) -> Result<Buf, NoBuffer> {
        let State::InFlight(flight) = &mut self.state else { unreachable!("nothing is sent") };
        let buf = if flight.held > 0 {
            // Its bytes stay where they are, to be sent again.
            buffers.duplicate(&self.input, mem::take(&mut flight.outgoing)).ok_or(NoBuffer)?
        } else {
            let buf = buffers.take_front(&mut self.input, flight.outgoing).ok_or(NoBuffer)?;
            flight.outgoing -= buf.len();
            buf
        };
        Ok(buf)
    }

    /// Sends on what has come of a request that is longer than what was held of it.
    pub(super) fn stream_on(&mut self, moment: &mut Moment<'_>) -> Actions {
        let State::InFlight(flight) = &mut self.state else { unreachable!("nothing is sent") };
        let more = self.framing.more(&self.input, moment.buffers);
        if let Some((_, whole)) = more {
            flight.request.whole = whole;
        }
        match more {
            more if flight.backend.broken => {
                let len = more.map_or(self.input.bytes(), |(len, _)| len);
                moment.buffers.advance(&mut self.input, len);
                flight.cut = true;
                Action::Serve.into()
            }
            Some((len, _)) => {
                flight.on_queued(len, moment.now);
                if let Some(course) = &mut self.course {
                    course.bytes.to_backend += u64::from(len);
                }
                Actions::from(Action::Send(flight.backend.conn.conn)).and(Action::Serve)
            }
            None => self.become_opaque(moment.now),
        }
    }

    /// It cannot be told any more what the bytes of its request or its reply are.
    fn become_opaque(&mut self, now: Instant) -> Actions {
        let State::InFlight(flight) = mem::replace(&mut self.state, State::EMPTY) else {
            unreachable!("nothing is on the way")
        };
        if flight.is_answered() {
            self.state = State::Opaque { backend: flight.backend, sent: flight.held };
            return Action::BecomeOpaque.into();
        }
        let InFlight { request, history, backend, held, .. } = flight;
        self.turn_opaque(request.verb, backend, &history, held, now)
    }

    /// A request is over in that its bytes are a session's, and it is none of those that are answered.
    fn turn_opaque(
        &mut self,
        verb: Verb,
        backend: Backend,
        history: &History,
        sent: u32,
        now: Instant,
    ) -> Actions {
        self.state = State::Opaque { backend, sent };
        let took = now.saturating_duration_since(history.since);
        Actions::from(Action::Count(verb, Outcome::Opaque, took)).and(Action::BecomeOpaque)
    }

    /// The backend whose connection it holds took bytes.
    pub fn on_backend_sent(&mut self, bytes: u32, now: Instant) -> Actions {
        self.active = now;
        if let State::InFlight(flight) = &mut self.state {
            flight.on_backend_sent(bytes, now);
            if flight.is_streaming() || flight.is_answered() {
                return Action::Serve.into();
            }
        } else if let Some(backend) = self.state.backend_mut() {
            backend.on_sent(bytes);
        }
        Actions::NONE
    }

    /// Bytes arrived from its backend.
    pub fn on_reply(&mut self, buf: &Buf, moment: &mut Moment<'_>) -> Replied {
        let flight = match &mut self.state {
            State::InFlight(flight) if !flight.is_answered() => flight,
            // Between two requests of a client, or behind a reply that came early.
            _ => {
                let actions = self.on_backend_lost(Discard::Unexpected, Retry::Broken, moment);
                return Replied::unexpected(actions);
            }
        };
        self.active = moment.now;
        let (begins, moved) = (flight.reply == Progress::Expected, flight.moved);
        flight.on_reply(moment.now);
        let Some(course) = &mut self.course else { unreachable!("its request was sent") };
        let asked = course.attempts.at;
        let answered = *course.answered.get_or_insert(moment.now);
        let BackendConn { conn, endpoint, made, .. } = flight.backend.conn;
        let bytes = moment.buffers.bytes(buf);
        let reply = self.framing.reply(bytes);
        let count = if let Reply::Surplus(count) = reply { count } else { bytes.len() };
        let passed = if let Some(broadcast) = &mut flight.history.broadcast {
            broadcast.on_reply(&bytes[..count]);
            0
        } else {
            course.bytes.to_client += count as u64;
            self.bytes.to_client += count as u64;
            self.on_queued(count as u32);
            count
        };
        let ends = matches!(reply, Reply::Complete | Reply::Surplus(_));
        let since = |at| moment.now.saturating_duration_since(at);
        let first_byte = begins.then(|| (since(asked), since(moved)));
        let transfer = ends.then(|| since(answered));
        let actions = match reply {
            Reply::Partial => self.on_part(moment),
            Reply::Complete => self.on_complete(moment),
            // The rest was not asked for.
            Reply::Surplus(_) => self.conclude(Some(Discard::Unexpected), moment),
            Reply::Opaque => self.on_opaque_reply(moment.now),
        };
        let answered = Some((endpoint, conn, made));
        Replied { passed, answered, first_byte, transfer, actions }
    }

    fn on_part(&mut self, moment: &Moment<'_>) -> Actions {
        let mut actions = Actions::NONE;
        let is_full = self.unsent >= moment.room().max;
        // A slow client holds its backend up rather than the worker's buffers.
        if let Some(backend) = self.state.backend_mut()
            && is_full
            && mem::take(&mut backend.receiving)
        {
            actions.push(Action::Pause(Side::Backend));
        }
        self.arm(moment, &mut actions);
        actions
    }

    /// The reply is complete. The rest of the request is still passed on, if there is any and it can
    /// be.
    fn on_complete(&mut self, moment: &mut Moment<'_>) -> Actions {
        let is_long = self.is_long();
        let State::InFlight(flight) = &mut self.state else { unreachable!("it was answered") };
        let rest = flight.is_streaming() || (is_long && flight.backend.unsent > 0);
        if !rest || flight.backend.broken {
            return self.conclude(None, moment);
        }
        flight.reply = Progress::Complete;
        let took = moment.now.saturating_duration_since(flight.history.since);
        let count = Action::Count(flight.request.verb, Outcome::Answered, took);
        Actions::from(count).and(Action::Serve)
    }

    /// From here on nobody can tell where the reply ends: all that comes is the client's.
    fn on_opaque_reply(&mut self, now: Instant) -> Actions {
        let State::InFlight(flight) = mem::replace(&mut self.state, State::EMPTY) else {
            unreachable!("it was answered")
        };
        let took = now.saturating_duration_since(flight.history.since);
        let count = Action::Count(flight.request.verb, Outcome::Answered, took);
        let sent = flight.held;
        self.state = State::Opaque { backend: flight.backend, sent };
        Actions::from(count).and(Action::BecomeOpaque)
    }

    /// The reply has come, and the request was passed on as far as it can be. With `discard` its
    /// connection is of no more use, whatever the reply says.
    pub(super) fn conclude(
        &mut self,
        discard: Option<Discard>,
        moment: &mut Moment<'_>,
    ) -> Actions {
        let State::InFlight(flight) = mem::replace(&mut self.state, State::EMPTY) else {
            unreachable!("nothing to conclude")
        };
        let keeps_alive = flight.request.whole && self.framing.keeps_alive();
        // Its client has to see that its request was not passed on where the reply does not say so.
        let is_cut = (flight.cut || !flight.request.whole) && !self.framing.refuses();
        let (is_counted, is_passed_on) = (flight.is_answered(), flight.is_passed_on());
        let InFlight { request, history, mut backend, held, .. } = flight;
        let mut kept = None;
        let action = if let Some(why) = discard {
            backend.discard(why)
        } else {
            backend.conn.unread |= is_counted;
            match (backend.broken, keeps_alive) {
                (true, _) => backend.discard(Discard::Dead),
                (_, false) if is_passed_on => backend.end(Discard::Spent),
                (_, false) => backend.discard(Discard::Spent),
                (_, true) => {
                    let soon = moment.policy.releases_after_reply || backend.is_aged(moment.now);
                    let endpoint = backend.conn.endpoint;
                    kept = Some(backend);
                    if soon { Action::ReleaseSoon } else { Action::Keep(endpoint) }
                }
            }
        };
        let over = Over { request, history, held, is_counted, kept, keeps_alive, is_cut };
        self.finish(over, action.into(), moment)
    }

    /// The rest of a request that was answered is not passed on any more.
    pub(super) fn end_request(&mut self, why: Discard, moment: &mut Moment<'_>) -> Actions {
        let State::InFlight(flight) = mem::replace(&mut self.state, State::EMPTY) else {
            unreachable!("nothing is passed on")
        };
        debug_assert!(flight.is_answered(), "a reply is still expected");
        // One that has ended its direction has cut it by its own will.
        let is_cut = !self.ended && !self.framing.refuses();
        let keeps_alive = !self.ended && flight.request.whole && self.framing.keeps_alive();
        let InFlight { request, history, backend, held, .. } = flight;
        let discard = backend.discard(why);
        let over =
            Over { request, history, held, is_counted: true, kept: None, keeps_alive, is_cut };
        self.finish(over, discard.into(), moment)
    }

    fn finish(&mut self, over: Over, mut actions: Actions, moment: &mut Moment<'_>) -> Actions {
        let Over { request, mut history, held, is_counted, kept, keeps_alive, is_cut } = over;
        if !is_cut && let Some(broadcast) = &mut history.broadcast {
            broadcast.on_answered();
            return actions.then(&self.go_to_next_store(request, history, kept, moment.now));
        }
        moment.buffers.advance(&mut self.input, held);
        if !is_counted {
            let took = moment.now.saturating_duration_since(history.since);
            actions.push(Action::Count(request.verb, Outcome::Answered, took));
        }
        if is_cut {
            self.state = State::Idle { kept };
            return actions.and(Action::Close(CloseReason::BackendReset));
        }
        if !keeps_alive {
            return actions.then(&self.leave(kept, moment.now));
        }
        self.state = State::Idle { kept };
        actions.and(Action::Serve)
    }

    /// A request to all stores goes to the next one of them, if there is one.
    fn go_to_next_store(
        &mut self,
        request: Request,
        mut history: History,
        kept: Option<Backend>,
        now: Instant,
    ) -> Actions {
        let Some(broadcast) = &mut history.broadcast else { unreachable!("it goes to one") };
        broadcast.store += 1;
        history.on_next_store();
        let wanted = Wanted::Request(request);
        let pending = Pending::new(wanted, history, now);
        self.state = State::Ready { pending, kept };
        Action::Serve.into()
    }

    /// All stores have had its request: their replies, to be sent as one.
    pub fn on_stores_done(&mut self, moment: &mut Moment<'_>) -> (Box<Broadcast>, Actions) {
        let State::Ready { pending, kept } = mem::replace(&mut self.state, State::EMPTY) else {
            unreachable!("a store is still to reply")
        };
        let Pending { wanted, history, .. } = pending;
        let Some(broadcast) = history.broadcast else { unreachable!("it goes to one") };
        moment.buffers.advance(&mut self.input, wanted.len());
        self.state = State::Idle { kept };
        let took = moment.now.saturating_duration_since(history.since);
        let count = Action::Count(wanted.verb(), Outcome::Answered, took);
        (broadcast, Actions::from(count).and(Action::Serve))
    }

    /// Its request gets an error in place of a connection. `store` is the number and the name of the
    /// store that it is for, if it is for one.
    pub fn fail(
        &mut self,
        error: ErrorReply,
        store: Option<(u16, &str)>,
        moment: &mut Moment<'_>,
    ) -> Actions {
        let mut actions = Actions::NONE;
        let (pending, kept) = match mem::replace(&mut self.state, State::EMPTY) {
            State::Ready { pending, kept } => (pending, kept),
            State::Queued { pending } => {
                actions.push(Action::LeaveQueue);
                (pending, None)
            }
            _ => unreachable!("it wants no connection"),
        };
        let Pending { wanted, history, .. } = pending;
        if let (Wanted::Request(request), Some(_)) = (wanted, &history.broadcast) {
            let name = store.map(|(_, name)| name);
            return actions.then(&self.fail_store(request, history, kept, error, name, moment.now));
        }
        let (held, store) = (wanted.len(), store.map(|(number, _)| number));
        let failed = Failed { wanted, history, kept, held, has_part: false, store };
        actions.then(&self.reply_with(failed, error, moment))
    }

    /// Its request gets an error in place of a reply, or what has come of that is all.
    pub(super) fn fail_in_flight(
        &mut self,
        error: ErrorReply,
        why: Discard,
        moment: &mut Moment<'_>,
    ) -> Actions {
        let State::InFlight(flight) = mem::replace(&mut self.state, State::EMPTY) else {
            unreachable!("nothing is expected")
        };
        debug_assert!(!flight.is_answered(), "it was answered");
        let has_part = flight.has_part();
        let InFlight { request, history, backend, held, .. } = flight;
        let discard = Actions::from(backend.discard(why));
        if history.broadcast.is_some() {
            let next = self.fail_store(request, history, None, error, None, moment.now);
            return discard.then(&next);
        }
        let wanted = Wanted::Request(request);
        let failed = Failed { wanted, history, kept: None, held, has_part, store: None };
        discard.then(&self.reply_with(failed, error, moment))
    }

    fn fail_store(
        &mut self,
        request: Request,
        mut history: History,
        kept: Option<Backend>,
        error: ErrorReply,
        store: Option<&str>,
        now: Instant,
    ) -> Actions {
        let Some(broadcast) = &mut history.broadcast else { unreachable!("it goes to one") };
        match store {
            Some(store) if error.is_of_a_store() => broadcast.on_away(store),
            _ => broadcast.on_failed(error),
        }
        self.go_to_next_store(request, history, kept, now)
    }

    fn reply_with(
        &mut self,
        failed: Failed,
        error: ErrorReply,
        moment: &mut Moment<'_>,
    ) -> Actions {
        let Failed { wanted, history, kept, held, has_part, store } = failed;
        moment.buffers.advance(&mut self.input, held);
        let took = moment.now.saturating_duration_since(history.since);
        let count = Action::Count(wanted.verb(), error.outcome(), took);
        if has_part {
            // It can only be cut off.
            self.state = State::Idle { kept };
            let reason = match error {
                ErrorReply::Removed => CloseReason::EndpointRemoved,
                _ => CloseReason::BackendReset,
            };
            return Actions::from(count).and(Action::Close(reason));
        }
        // Counted first: where there is no buffer for the error its client is closed.
        let actions = Actions::from(count).and(Action::Reply(error, store));
        if moment.policy.ends_after_error {
            return actions.then(&self.leave(kept, moment.now));
        }
        self.state = State::Idle { kept };
        actions.and(Action::Serve)
    }

    /// Nothing more can be sent to its backend. What that had sent before still comes, and then its
    /// end, where a reply is expected: it may be among that.
    pub fn on_backend_send_failed(&mut self) -> Actions {
        let is_long = self.is_long();
        let Some(backend) = self.state.backend_mut() else { unreachable!("it holds none") };
        backend.broken = true;
        let unsent = mem::take(&mut backend.unsent);
        if let State::InFlight(flight) = &mut self.state {
            flight.cut |= is_long && unsent > 0;
            if !flight.is_answered() {
                return Action::Serve.into();
            }
        }
        Action::Lost(Retry::Broken).into()
    }

    /// Its backend's connection ended, in order or not.
    pub fn on_backend_ended(&mut self, why: Retry, moment: &mut Moment<'_>) -> Actions {
        let spent = self.framing.ends_with_connection() && !self.is_backend_broken();
        if spent {
            self.ended_first.get_or_insert(Side::Backend);
        }
        let discard = if spent { Discard::Spent } else { Discard::Dead };
        self.on_backend_lost(discard, why, moment)
    }

    /// Its backend's connection is lost to it, for whatever reason.
    pub fn on_backend_lost(
        &mut self,
        discard: Discard,
        why: Retry,
        moment: &mut Moment<'_>,
    ) -> Actions {
        let State::InFlight(flight) = &mut self.state else {
            let Some(backend) = self.state.take_kept() else { unreachable!("it holds none") };
            return backend.discard(discard).into();
        };
        if flight.is_answered() {
            flight.cut |= flight.backend.unsent > 0;
            return self.conclude(Some(discard), moment);
        }
        let error = if why == Retry::Removed { ErrorReply::Removed } else { ErrorReply::Lost };
        if flight.has_part() {
            let is_broken = flight.backend.broken;
            if why == Retry::Ended && !is_broken && self.framing.ends_with_connection() {
                return self.conclude(Some(discard), moment);
            }
            return self.fail_in_flight(error, discard, moment);
        }
        if why == Retry::Removed {
            flight.history.on_cut();
        }
        let attempts = flight.history.tried.attempts();
        if !flight.request.repeatable || attempts >= moment.policy.attempts_max {
            return self.fail_in_flight(error, discard, moment);
        }
        if !why.is_free() && !moment.retries.take(moment.now) {
            let failed = self.fail_in_flight(error, discard, moment);
            return Actions::from(Action::CountRefusedRetry).then(&failed);
        }
        let State::InFlight(flight) = mem::replace(&mut self.state, State::EMPTY) else {
            unreachable!("it is in flight")
        };
        let InFlight { request, history, backend, .. } = flight;
        let wanted = Wanted::Request(request);
        let pending = Pending::new(wanted, history, moment.now);
        self.state = State::Ready { pending, kept: None };
        let discard = Actions::from(backend.discard(discard));
        discard.and(Action::CountRetry(why)).and(Action::Serve)
    }

    /// What becomes of its connection, after [`Action::ReleaseSoon`].
    pub fn release(&mut self) -> Option<Fate> {
        // One that was lost since has none.
        self.state.take_kept().map(Backend::release)
    }

    /// Its connection is of no more use, if it holds one without a request on it.
    pub fn discard_kept(&mut self, why: Discard) -> Actions {
        if !self.is_idle() {
            return Actions::NONE;
        }
        self.state.take_kept().map_or(Actions::NONE, |kept| kept.discard(why).into())
    }
}
