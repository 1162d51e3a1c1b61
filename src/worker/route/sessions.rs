//! A worker's sessions: what happens to them, and doing what they answer.
//!
//! What concerns others comes back as an [`Outcome`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{Preset, ProxyProtocol, RouteConfig};
use crate::io::{Buf, Chain, Close, ConnId, Driver};
use crate::metrics::{CloseReason, Direction, RouteStats};
use crate::protocol::postgres::{CANCEL_REQUEST_MAX, is_cancel_request, is_negotiation};
use crate::protocol::proxy_header::{Addresses, HEADER_MAX, write_v1, write_v2};
use crate::proxy::line::{Line, Ticket};
use crate::proxy::session::{Action, Ending, Session, Timeouts};
use crate::proxy::{RouteId, Side};
use crate::slab::{Key, Slab};
use crate::worker::context::Context;
use crate::worker::flush;
use crate::worker::owners::Owner;

/// All buffers are taken.
struct NoBuffer;

/// What an event of a session asks of others than itself.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing.
    Done,
    /// The first bytes from its client went to its backend.
    Asked,
    /// The first byte came from its backend.
    Answered,
    /// The first byte came from its backend since that was asked; it had greeted before.
    Replied,
    /// It waits, and has turned out to be a cancel request.
    Cancels,
    /// It is over, and to be closed.
    Over(CloseReason),
}

/// The sessions, each of which both of its connections belong to.
pub(super) struct Sessions {
    route: RouteId,
    slab: Slab<Session>,
    /// Those that wait for an endpoint, or for a place at one.
    pub(super) line: Line,
    timeouts: Timeouts,
    proxy_protocol: ProxyProtocol,
    stats: Arc<RouteStats>,
    /// Clients may begin with a cancel request of `PostgreSQL`.
    has_cancels: bool,
}

impl Sessions {
    /// None, and room for as many as there are places.
    pub(super) fn new(
        route: RouteId,
        config: &RouteConfig,
        stats: Arc<RouteStats>,
        places: usize,
    ) -> Self {
        let timeouts =
            Timeouts { idle: config.idle_timeout, half_close: config.half_close_timeout };
        Self {
            route,
            slab: Slab::with_capacity(places),
            line: Line::new(places),
            timeouts,
            proxy_protocol: config.proxy_protocol,
            stats,
            has_cancels: config.preset == Preset::Postgres,
        }
    }

    pub(super) fn get(&self, key: Key<Session>) -> Option<&Session> {
        self.slab.get(key)
    }

    pub(super) fn get_mut(&mut self, key: Key<Session>) -> Option<&mut Session> {
        self.slab.get_mut(key)
    }

    /// The session that a connection belongs to: it is there for as long as that does.
    pub(super) fn of(&mut self, key: Key<Session>) -> &mut Session {
        &mut self.slab[key]
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.slab.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slab.is_empty()
    }

    /// The bound of [`Sessions::key_at`], for walks that change sessions on the way.
    pub(super) fn slots(&self) -> usize {
        self.slab.slots()
    }

    /// The session in this slot, if there is one.
    pub(super) fn key_at(&self, slot: usize) -> Option<Key<Session>> {
        self.slab.key_at(slot)
    }

    /// Adds a session, which has a place.
    pub(super) fn insert(&mut self, session: Session) -> Key<Session> {
        let Ok(key) = self.slab.insert(session) else {
            unreachable!("there are as many slots as places")
        };
        key
    }

    /// Begins a session of a client that has a place.
    pub(super) fn begin<D: Driver>(&mut self, cx: &mut Context<D>, client: ConnId) -> Key<Session> {
        let key = self.insert(Session::new(client, cx.now));
        cx.owners.insert(client, self.route, Owner::Session(key, Side::Client));
        key
    }

    /// The place that a session has had in line, if it has had to wait.
    pub(super) fn ticket_of(&self, key: Key<Session>) -> Option<Ticket> {
        self.slab[key].ticket()
    }

    /// A session waits, at the place that it has had in line.
    pub(super) fn have_wait(&mut self, key: Key<Session>, reason: CloseReason, now: Instant) {
        let session = &mut self.slab[key];
        let ticket = session.ticket().unwrap_or_else(|| self.line.ticket(session.seeking(), now));
        session.on_waiting(ticket, reason);
        self.line.join(ticket, key);
    }

    /// A session finds the line full. Its client may still want to cancel what another one does, which
    /// waits for nobody: then it waits to be heard. Says whether it may.
    pub(super) fn listen_for_cancel(&mut self, key: Key<Session>) -> bool {
        self.has_cancels && self.slab[key].listen_for_cancel()
    }

    /// Takes a session out of the line: its turn has come.
    pub(super) fn serve<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Session>) {
        let session = &mut self.slab[key];
        cx.timers.clear(session.client().index());
        session.on_waited();
        self.line.leave(key);
    }

    /// For how much of its wait a session has waited for a place.
    pub(super) fn waited_for_place(&self, key: Key<Session>, now: Instant) -> Duration {
        let ticket = self.ticket_of(key);
        ticket.map(|ticket| self.line.waited_for_place(ticket, now)).unwrap_or_default()
    }

    /// Receives from a client that has no backend: it may leave. What it sends meanwhile is kept, and
    /// that is at most a buffer: a receive that was stopped once brings one at a time.
    pub(super) fn listen_to_early<D: Driver>(&self, cx: &mut Context<D>, key: Key<Session>) {
        // It may be over by now.
        if let Some(session) = self.slab.get(key)
            && !session.is_open()
            && !session.has_early()
        {
            cx.driver.receive(session.client(), false);
            cx.driver.receive(session.client(), true);
        }
    }

    /// Lets bytes flow between the session's client and `backend`, which has sent `greeting`.
    pub(super) fn open<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        backend: ConnId,
        mut greeting: Chain,
    ) -> Outcome {
        cx.owners.set(backend, Owner::Session(key, Side::Backend));
        let session = &mut self.slab[key];
        let client = session.client();
        let Ok(preface) = proxy_header(cx, self.proxy_protocol, client) else {
            // Without it the backend would take the client's bytes for the header.
            cx.driver.buffers().clear(&mut greeting);
            return Outcome::Over(CloseReason::Overload);
        };
        session.on_connected(backend, preface.as_ref().map_or(0, Buf::len), cx.now);
        if session.take_ticket() {
            self.line.on_ticket_over();
        }
        if let Some(buf) = preface {
            cx.send(backend, buf);
        }
        let mut early = session.take_early();
        let (asks, ended) = (!early.is_empty(), session.has_ended(Side::Client));
        cx.join(client, backend);
        cx.driver.receive(client, true);
        cx.driver.receive(backend, true);
        while let Some(buf) = cx.driver.buffers().pop(&mut early) {
            // It was counted when it came.
            pass_on(cx, session, Side::Client, buf);
        }
        if ended {
            cx.shutdown(backend);
        }
        while let Some(buf) = cx.driver.buffers().pop(&mut greeting) {
            session.on_greeted();
            self.stats.bytes.of(Direction::ToClient).add(u64::from(buf.len()));
            session.on_counted(Side::Backend, buf.len());
            pass_on(cx, session, Side::Backend, buf);
        }
        self.arm_deadline(cx, key);
        if asks { Outcome::Asked } else { Outcome::Done }
    }

    /// Bytes came from one side: they go to the other one, or are kept while there is none.
    pub(super) fn on_received<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        from: Side,
        buf: Buf,
    ) -> Outcome {
        let is_beyond = self.slab[key].is_beyond_line();
        if self.has_cancels && from == Side::Client && self.slab[key].may_begin_with_cancel() {
            self.look_for_cancel(cx, key, &buf);
        }
        let session = &mut self.slab[key];
        let outcome = count(cx, &self.stats, session, from, buf.len());
        if session.is_open() {
            pass_on(cx, session, from, buf);
            return outcome;
        }
        debug_assert_eq!(from, Side::Client, "there is no backend");
        let kept = keep(cx, session, buf);
        match session.cancel() {
            _ if kept != Outcome::Done || !session.awaits_endpoint() => kept,
            Some(_) => Outcome::Cancels,
            None if is_beyond && self.line.is_full() => Outcome::Over(CloseReason::QueueFull),
            None => kept,
        }
    }

    /// Takes note if a client begins with a cancel request. Without a buffer to keep it in, it goes to
    /// one endpoint only.
    fn look_for_cancel<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Session>, buf: &Buf) {
        let mut bytes = [0; CANCEL_REQUEST_MAX];
        let begins = cx.driver.buffers().bytes(buf);
        let len = begins.len();
        self.slab[key].on_begun(is_negotiation(begins));
        if !is_cancel_request(begins) {
            return;
        }
        bytes[..len].copy_from_slice(begins);
        let buffers = cx.driver.buffers();
        let Some(mut copy) = buffers.take() else { return };
        buffers.space(&mut copy)[..len].copy_from_slice(&bytes[..len]);
        buffers.set_len(&mut copy, len);
        let mut request = Chain::default();
        buffers.push(&mut request, copy);
        self.slab[key].on_cancel(request);
        if self.slab[key].is_open() {
            self.arm_deadline(cx, key);
        }
    }

    /// Takes a cancel request from the endpoint that has had it: there is to be another one. Says whether
    /// it is one. Without a buffer it has come to its end.
    pub(super) fn move_cancel<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
    ) -> bool {
        let session = &mut self.slab[key];
        let Some(request) = session.cancel() else { return false };
        let Some(again) = cx.driver.buffers().duplicate(request, request.bytes()) else {
            return false;
        };
        let ended = session.has_ended(Side::Client);
        cx.timers.clear(session.client().index());
        if let Some(backend) = session.conn(Side::Backend) {
            cx.owners.take(backend);
            cx.close(backend, Close::Reset);
        }
        session.on_moved(cx.now);
        cx.driver.buffers().push(session.early(), again);
        if ended {
            let action = session.on_ended(Side::Client, cx.now);
            debug_assert_eq!(action, Action::None, "it has asked for something");
        } else {
            cx.driver.receive(session.client(), false);
        }
        true
    }

    /// The same for bytes that were counted before.
    pub(super) fn pass_on<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        from: Side,
        buf: Buf,
    ) {
        pass_on(cx, &mut self.slab[key], from, buf);
    }

    /// Bytes came that the driver sends on by itself, which also bounds them.
    pub(super) fn on_spliced<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        from: Side,
        bytes: u32,
    ) -> Outcome {
        let session = &mut self.slab[key];
        let outcome = count(cx, &self.stats, session, from, bytes);
        let action = session.on_received(from, bytes, u32::MAX, cx.now);
        let acted = act(cx, session, action);
        debug_assert_eq!(acted, Outcome::Done, "bytes end no session");
        outcome
    }

    /// A side's socket took bytes.
    pub(super) fn on_sent<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        to: Side,
        bytes: u32,
    ) -> Outcome {
        let limit = cx.in_flight_limit();
        let session = &mut self.slab[key];
        let action = session.on_sent(to, bytes, limit, cx.now);
        act(cx, session, action)
    }

    /// The time of a session's deadline has come, or had come before activity moved it.
    pub(super) fn on_deadline<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
    ) -> Outcome {
        let timeouts = self.timeouts;
        let session = &self.slab[key];
        let survivor = session.survivor().and_then(|side| session.conn(side));
        let undelivered = survivor.map_or(0, |conn| cx.driver.undelivered(conn));
        self.on_event(cx, key, |session, now| session.on_deadline(&timeouts, undelivered, now))
    }

    /// Tells a session what happened and does what it answers. The event may move its deadline.
    pub(super) fn on_event<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        event: impl FnOnce(&mut Session, Instant) -> Action,
    ) -> Outcome {
        let session = &mut self.slab[key];
        let action = event(session, cx.now);
        let outcome = act(cx, session, action);
        if outcome == Outcome::Done {
            self.arm_deadline(cx, key);
        }
        outcome
    }

    /// Sets the session's timer: it has been opened, one direction of it has ended, or activity
    /// has moved the deadline at which the timer fired.
    pub(super) fn arm_deadline<D: Driver>(&self, cx: &mut Context<D>, key: Key<Session>) {
        let session = &self.slab[key];
        if let Some(deadline) = session.deadline(&self.timeouts) {
            cx.timers.set(session.client().index(), deadline);
        }
    }

    /// Takes a session out and closes its connections.
    pub(super) fn close<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        reason: CloseReason,
    ) -> Session {
        let Some(mut session) = self.slab.remove(key) else {
            unreachable!("a session is closed once")
        };
        if session.awaits_endpoint() {
            self.line.leave(key);
        }
        if session.take_ticket() {
            self.line.on_ticket_over();
        }
        cx.driver.buffers().clear(&mut session.take_early());
        cx.driver.buffers().clear(&mut session.take_cancel());
        for side in [Side::Client, Side::Backend] {
            if let Some(conn) = session.conn(side) {
                cx.timers.clear(conn.index());
                cx.owners.take(conn);
                end(cx, conn, session.ending(side, reason));
            }
        }
        tracing::trace!(reason = ?reason, "session closed");
        session
    }

    /// Checks what holds between two turns: both connections of a session belong to it, and those
    /// that belong to a session are its.
    #[cfg(test)]
    pub(super) fn assert_invariants<D: Driver>(&self, cx: &Context<D>) {
        let (mut conns, mut waiting, mut tickets) = (0, 0, 0);
        for key in (0..self.slots()).filter_map(|slot| self.key_at(slot)) {
            let Some(session) = self.get(key) else { unreachable!("it has a key") };
            for side in [Side::Client, Side::Backend] {
                let Some(conn) = session.conn(side) else { continue };
                conns += 1;
                let owner = cx.owners.get(conn);
                let is_its = matches!(owner, Some(&Owner::Session(k, s)) if (k, s) == (key, side));
                assert!(is_its, "{side:?} of {key:?} belongs to {owner:?}");
            }
            let has_backend = session.conn(Side::Backend).is_some();
            assert!(has_backend || !session.is_open(), "{key:?} is open without a backend");
            assert!(!session.is_open() || !session.has_early(), "what came early is not sent");
            let waits = session.awaits_endpoint();
            waiting += usize::from(waits);
            tickets += usize::from(session.ticket().is_some());
            let connects = session.is_connecting();
            let states = [session.is_open(), connects, waits];
            assert_eq!(states.map(u8::from).iter().sum::<u8>(), 1, "{key:?}: {states:?}");
            let ends = cx.timers.is_set(session.client().index());
            assert!(!waits || ends, "nothing ends the wait of {key:?}");
        }
        assert_eq!(waiting, self.line.len(), "those that wait are in line");
        assert_eq!(tickets, self.line.held(), "tickets that are held");
        let is_of_session = |owner: &Owner| matches!(owner, Owner::Session(..));
        let owned =
            cx.owners.of_route(self.route).filter(|owned| is_of_session(&owned.owner)).count();
        assert_eq!(owned, conns, "connections that belong to sessions");
    }
}

/// Counts bytes that came from one side. Says what is new in that they came.
fn count<D: Driver>(
    cx: &mut Context<D>,
    stats: &RouteStats,
    session: &mut Session,
    from: Side,
    bytes: u32,
) -> Outcome {
    cx.load.batcher.on_active(session.window());
    session.on_counted(from, bytes);
    if from == Side::Client {
        stats.bytes.of(Direction::ToBackend).add(u64::from(bytes));
        return if session.is_unasked() { Outcome::Asked } else { Outcome::Done };
    }
    stats.bytes.of(Direction::ToClient).add(u64::from(bytes));
    let waited = session.take_first_byte(cx.now);
    waited.inspect(|&waited| stats.count_first_byte(waited, session.quiet(cx.now)));
    match (session.take_heard(), waited) {
        (true, _) => Outcome::Answered,
        (false, Some(_)) => Outcome::Replied,
        (false, None) => Outcome::Done,
    }
}

/// Sends bytes that one side of an open session has sent to the other.
fn pass_on<D: Driver>(cx: &mut Context<D>, session: &mut Session, from: Side, buf: Buf) {
    let limit = cx.in_flight_limit();
    let action = session.on_received(from, buf.len(), limit, cx.now);
    if action == Action::Discard {
        return cx.driver.buffers().give(buf);
    }
    cx.send(there(session, from.other()), buf);
    if action == Action::Pause(from) {
        cx.driver.receive(there(session, from), false);
    }
}

/// Keeps what a client sends before it has a backend, and pauses it.
fn keep<D: Driver>(cx: &mut Context<D>, session: &mut Session, buf: Buf) -> Outcome {
    cx.driver.buffers().push(session.early(), buf);
    let action = session.on_early(cx.now);
    act(cx, session, action)
}

/// Does what a session answers.
fn act<D: Driver>(cx: &mut Context<D>, session: &Session, action: Action) -> Outcome {
    match action {
        Action::None | Action::Discard => {}
        Action::Close(reason) => return Outcome::Over(reason),
        Action::Pause(side) => cx.driver.receive(there(session, side), false),
        Action::Resume(side) => cx.driver.receive(there(session, side), true),
        Action::Shutdown(side) => cx.shutdown(there(session, side)),
    }
    Outcome::Done
}

/// The connection of a side to which a session wants something done.
fn there(session: &Session, side: Side) -> ConnId {
    let Some(conn) = session.conn(side) else {
        unreachable!("an open session has two connections")
    };
    conn
}

/// Closes a connection the way a session says.
fn end<D: Driver>(cx: &mut Context<D>, conn: ConnId, ending: Ending) {
    match ending {
        Ending::Now(how) => cx.close(conn, how),
        Ending::ResetBehind => flush::reset_behind(cx, conn),
        Ending::ResetOrEnd => {
            let delivered = cx.driver.undelivered(conn) == 0;
            let how = if delivered { Close::Reset } else { Close::Graceful };
            cx.close(conn, how);
        }
    }
}

/// The PROXY protocol header that a client's backend is to get first, if any.
fn proxy_header<D: Driver>(
    cx: &mut Context<D>,
    version: ProxyProtocol,
    client: ConnId,
) -> Result<Option<Buf>, NoBuffer> {
    let write = match version {
        ProxyProtocol::Off => return Ok(None),
        ProxyProtocol::V1 => write_v1,
        ProxyProtocol::V2 => write_v2,
    };
    let addresses = match (cx.driver.peer_address(client), cx.driver.local_address(client)) {
        (Some(source), Some(destination)) => Some(Addresses { source, destination }),
        // A Unix socket's client has none, and neither has one that is gone.
        _ => None,
    };
    let mut header = [0; HEADER_MAX];
    let len = write(&mut header, addresses);
    let buffers = cx.driver.buffers();
    let mut buf = buffers.take().ok_or(NoBuffer)?;
    buffers.space(&mut buf)[..len].copy_from_slice(&header[..len]);
    buffers.set_len(&mut buf, len);
    Ok(Some(buf))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use std::sync::Arc;

    use crate::config::{Config, PoolMode, Protocol};
    use crate::io::sim::Speech;
    use crate::metrics::CloseReason;
    use crate::worker::mailbox::Command;
    use crate::worker::simulation::Run;

    #[test]
    fn who_comes_beyond_all_slots_is_refused() {
        const SLOTS: usize = 5;
        for mode in [PoolMode::Preconnect, PoolMode::Request] {
            let mut config = Config::from_vars(std::iter::empty()).expect("defaults are valid");
            let route = Arc::make_mut(&mut config.routes[0]);
            if mode == PoolMode::Request {
                route.protocol = Protocol::Chronos;
            }
            route.pool.mode = mode;
            let mut run = Run::with(fastrand::Rng::with_seed(1), config, 1, 100);
            if mode == PoolMode::Request {
                run.engine.driver().speech = Speech::Lines;
            }
            run.engine.cx.places.limit_to(SLOTS);
            let all = run.endpoints.clone();
            run.deliver(all);
            for _ in 0..20 {
                run.engine.driver().add_client(Duration::ZERO);
            }
            // They come while there is no room, so that the drain finds them in the queue.
            while run.engine.driver().elapsed() < Duration::from_millis(1) {
                run.turn();
            }
            let outside = run.engine.driver().clients_outside();
            assert!(outside > SLOTS, "{outside}");
            run.command(Command::Drain);
            while run.engine.driver().elapsed() < Duration::from_secs(1) {
                run.turn();
                assert!(run.engine.sessions() <= SLOTS);
            }
            let refused = run.stats.closed(CloseReason::Overload);
            assert!(refused > 0, "{mode:?}");
            // Each is told of, as it finds.
            run.stop();
        }
    }
}
