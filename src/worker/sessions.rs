//! A worker's sessions: what happens to them, and doing what they answer.

use crate::proxy::endpoints::EndpointId;
use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use super::engine::{Engine, Owner};
use super::pools::is_local;
use crate::config::{Balance, Locality, ProxyProtocol};
use crate::io::{Buf, Chain, Close, ConnId, Driver, Unheard};
use crate::metrics::{Checkout, CloseReason, Direction};
use crate::protocol::proxy_header::{HEADER_MAX, write_v1, write_v2};
use crate::proxy::Side;
use crate::proxy::session::{Action, Ending, Session, Tried};
use crate::slab::Key;

/// All buffers are taken.
struct NoBuffer;

impl<D: Driver> Engine<D> {
    pub(super) fn on_accepted(&mut self, client: ConnId) {
        self.cx.stats.sessions_opened.add(1);
        let Ok(key) = self.sessions.insert(Session::new(client, self.cx.now)) else {
            self.cx.stats.count_close(CloseReason::Overload);
            self.cx.driver.close(client, Close::Reset);
            return;
        };
        self.publish_sessions();
        self.own(client, Owner::Session(key, Side::Client));
        self.dispatch(key, CloseReason::NoEndpoint);
        self.listen_to_early(key);
    }

    /// Receives from a client that has no backend: it may leave. What it sends meanwhile is kept, and
    /// that is at most a buffer: a receive that was stopped once brings one at a time.
    pub(super) fn listen_to_early(&mut self, key: Key<Session>) {
        if let Some(session) = self.sessions.get(key)
            && !session.is_open()
            && session.early.is_empty()
            && let Some(client) = session.conn(Side::Client)
        {
            self.cx.driver.receive(client, false);
            self.cx.driver.receive(client, true);
        }
    }

    /// Finds the session a backend: a warm connection, or one made for it. Closes it for
    /// `otherwise` when there is no endpoint left to try.
    pub(super) fn dispatch(&mut self, key: Key<Session>, mut otherwise: CloseReason) {
        loop {
            let Some(session) = self.sessions.get(key) else { return };
            let (client, tried) = (session.conn(Side::Client), *session.tried());
            let source = (self.cx.config.balance == Balance::SourceHash)
                .then(|| client.and_then(|client| self.cx.driver.peer_address(client)))
                .flatten()
                .and_then(|address| address.ip());
            let left = tried.attempts() < self.cx.config.connect_attempts;
            let mut choose = |tried: &Tried| {
                if self.cx.config.locality == Locality::Off {
                    return self.pools.table.choose(tried, source, &mut self.cx.rng);
                }
                let (chosen, spilled) =
                    self.pools.table.choose_near(tried, source, &mut self.cx.rng);
                spilled.inspect(|&why| self.cx.stats.count_spillover(why));
                chosen
            };
            let chosen = left.then(|| {
                choose(&tried).or_else(|| {
                    // A handshake that got lost, in a full accept queue for one, is worth another
                    // try, and so is the endpoint of a warm connection that was dead. A refusal is
                    // an answer.
                    let lost = matches!(
                        otherwise,
                        CloseReason::ConnectTimeout | CloseReason::BackendReset
                    );
                    lost.then(|| choose(&Tried::default())).flatten()
                })
            });
            let chosen = chosen.flatten();
            let Some(endpoint) = chosen else {
                return if self.pools.table.is_empty() && tried.attempts() == 0 && !self.waited(key)
                {
                    self.await_endpoint(key);
                } else if self.pools.table.is_empty() {
                    self.close_session(key, CloseReason::NoEndpoint);
                } else {
                    self.close_session(key, otherwise);
                };
            };
            if tried.attempts() > 0 {
                self.cx.stats.connect_retries.add(1);
            }
            match self.try_endpoint(key, endpoint) {
                Ok(()) => return,
                Err(error) if is_local(&error) => {
                    tracing::debug!(%error, "cannot connect");
                    return self.close_session(key, CloseReason::Overload);
                }
                Err(error) => {
                    self.on_endpoint_unreachable(endpoint, &error);
                    self.leave_endpoint(key);
                    otherwise = CloseReason::ConnectFailed;
                }
            }
        }
    }

    /// Whether a session has waited for an endpoint for as long as it may.
    fn waited(&self, key: Key<Session>) -> bool {
        let age = self.sessions.get(key).map(|session| session.age(self.cx.now));
        age.is_none_or(|age| age >= self.cx.config.endpoint_wait)
    }

    /// There is no endpoint at all: the session waits until one comes, or its time is up.
    fn await_endpoint(&mut self, key: Key<Session>) {
        if let Some(session) = self.sessions.get(key)
            && let Some(client) = session.conn(Side::Client)
        {
            let left = self.cx.config.endpoint_wait.saturating_sub(session.age(self.cx.now));
            self.cx.timers.set(client.index(), self.cx.now + left);
        }
    }

    /// There are endpoints again: those that wait for one are served.
    pub(super) fn dispatch_waiting(&mut self) {
        for slot in 0..self.sessions.slots() {
            if let Some(key) = self.sessions.key_at(slot)
                && let Some(session) = self.sessions.get(key)
                && session.awaits_endpoint()
                && let Some(client) = session.conn(Side::Client)
            {
                // One that may have left is served once that is heard: if there are bytes before
                // its end, they come first.
                let silent = session.early.is_empty();
                if silent && self.cx.driver.unheard(client) == Unheard::End {
                    continue;
                }
                self.cx.timers.clear(client.index());
                self.dispatch(key, CloseReason::NoEndpoint);
            }
        }
    }

    /// A client that waits for an endpoint has said something, so it has not left.
    fn dispatch_heard(&mut self, key: Key<Session>) {
        if !self.pools.table.is_empty()
            && let Some(session) = self.sessions.get(key)
            && session.awaits_endpoint()
        {
            if let Some(client) = session.conn(Side::Client) {
                self.cx.timers.clear(client.index());
            }
            self.dispatch(key, CloseReason::NoEndpoint);
        }
    }

    /// Ends the sessions on an endpoint that left the set long enough ago.
    pub(super) fn close_sessions_on(&mut self, endpoint: EndpointId) {
        for slot in 0..self.sessions.slots() {
            if let Some(key) = self.sessions.key_at(slot)
                && self.sessions.get(key).is_some_and(|s| s.endpoint() == Some(endpoint))
            {
                self.close_session(key, CloseReason::EndpointRemoved);
            }
        }
    }

    fn try_endpoint(&mut self, key: Key<Session>, endpoint: EndpointId) -> io::Result<()> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        self.prove_oldest(endpoint);
        let entry = self.pools.table.get_mut(endpoint).ok_or_else(gone)?;
        let address = entry.endpoint.address;
        let warm = self.pools.table.enter(endpoint, self.cx.now);
        self.mark_short(endpoint);
        if let Some(session) = self.sessions.get_mut(key) {
            session.on_trying(endpoint, warm.map(|(conn, _)| conn));
        }
        if let Some((backend, made)) = warm {
            if let Some(session) = self.sessions.get_mut(key) {
                session.on_warm(made);
            }
            self.cx.stats.count_checkout(Checkout::Hit);
            let greeting = match self.owner(backend) {
                Owner::Warm { greeting, .. } => greeting,
                _ => Chain::default(),
            };
            self.open(key, backend, greeting);
            return Ok(());
        }
        self.cx.stats.count_checkout(Checkout::Miss);
        let backend = self.connect(&address)?;
        self.own(backend, Owner::Session(key, Side::Backend));
        self.cx.timers.set(backend.index(), self.cx.now + self.cx.config.connect_timeout);
        if let Some(session) = self.sessions.get_mut(key) {
            session.on_connecting(backend, self.cx.now);
        }
        Ok(())
    }

    pub(super) fn on_session_connected(&mut self, key: Key<Session>, backend: ConnId) {
        self.cx.timers.clear(backend.index());
        let Some(session) = self.sessions.get(key) else { return };
        if let Some(since) = session.connecting_since() {
            self.cx.stats.connect_duration.record(self.cx.now.saturating_duration_since(since));
        }
        if let Some(endpoint) = session.endpoint() {
            self.on_endpoint_connected(endpoint);
            if let Some(entry) = self.pools.table.get_mut(endpoint) {
                entry.pool.on_miss_served();
            }
            self.mark_short(endpoint);
        }
        self.open(key, backend, Chain::default());
    }

    pub(super) fn on_session_connect_failed(
        &mut self,
        key: Key<Session>,
        conn: ConnId,
        error: &io::Error,
    ) {
        self.cx.timers.clear(conn.index());
        self.cx.driver.close(conn, Close::Reset);
        if let Some(endpoint) = self.sessions.get(key).and_then(Session::endpoint)
            && !is_local(error)
        {
            self.on_endpoint_unreachable(endpoint, error);
        }
        self.leave_endpoint(key);
        self.dispatch(
            key,
            match error.kind() {
                io::ErrorKind::TimedOut => CloseReason::ConnectTimeout,
                _ => CloseReason::ConnectFailed,
            },
        );
    }

    pub(super) fn leave_endpoint(&mut self, key: Key<Session>) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        let endpoint = session.endpoint();
        session.on_connect_failed();
        self.release(endpoint);
    }

    /// A session no longer counts as one of its endpoint's.
    pub(super) fn release(&mut self, endpoint: Option<EndpointId>) {
        let Some(endpoint) = endpoint else { return };
        if self.reuses_conns() {
            // It was a client whose bytes had become opaque: its place is free for who waits.
            self.pools.table.opaque_closed(endpoint);
            return self.on_place_in_pool_free(endpoint);
        }
        self.pools.table.leave(endpoint);
        if self.pools.table.get_mut(endpoint).is_some_and(|entry| !entry.is_present()) {
            self.pools.table.forget_unused();
        }
    }

    /// Lets bytes flow between the session's client and `backend`.
    fn open(&mut self, key: Key<Session>, backend: ConnId, mut greeting: Chain) {
        let Some(client) = self.sessions.get(key).and_then(|s| s.conn(Side::Client)) else {
            return;
        };
        self.own(backend, Owner::Session(key, Side::Backend));
        let Ok(preface) = self.proxy_header(client) else {
            // Without it the backend would take the client's bytes for the header.
            self.cx.driver.buffers().clear(&mut greeting);
            if let Some(session) = self.sessions.get_mut(key) {
                session.on_connecting(backend, self.cx.now);
            }
            return self.close_session(key, CloseReason::Overload);
        };
        let Some(session) = self.sessions.get_mut(key) else { return };
        session.on_connected(backend, preface.as_ref().map_or(0, Buf::len), self.cx.now);
        if let Some(buf) = preface {
            self.cx.driver.send(backend, buf);
        }
        let mut early = std::mem::take(&mut session.early);
        let ended = session.has_ended(Side::Client);
        self.cx.driver.join(client, backend);
        self.cx.driver.receive(client, true);
        self.cx.driver.receive(backend, true);
        while let Some(buf) = self.cx.driver.buffers().pop(&mut early) {
            // It was counted when it came.
            self.pass_on(key, Side::Client, buf);
        }
        if ended {
            self.act(key, Action::Shutdown(Side::Backend));
        }
        self.arm_deadline(key);
        while let Some(buf) = self.cx.driver.buffers().pop(&mut greeting) {
            if let Some(session) = self.sessions.get_mut(key) {
                session.on_greeted();
            }
            self.cx.stats.bytes.of(Direction::ToClient).add(u64::from(buf.len()));
            self.pass_on(key, Side::Backend, buf);
        }
    }

    /// The PROXY protocol header that the backend is to get first, if any.
    fn proxy_header(&mut self, client: ConnId) -> Result<Option<Buf>, NoBuffer> {
        let write = match self.cx.config.proxy_protocol {
            ProxyProtocol::Off => return Ok(None),
            ProxyProtocol::V1 => write_v1,
            ProxyProtocol::V2 => write_v2,
        };
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let source = self.cx.driver.peer_address(client).and_then(|a| a.tcp()).unwrap_or(nowhere);
        let destination =
            self.cx.driver.local_address(client).and_then(|a| a.tcp()).unwrap_or(nowhere);
        let mut header = [0; HEADER_MAX];
        let len = write(&mut header, source, destination);
        let buffers = self.cx.driver.buffers();
        let mut buf = buffers.take().ok_or(NoBuffer)?;
        buffers.space(&mut buf)[..len].copy_from_slice(&header[..len]);
        buffers.set_len(&mut buf, len);
        Ok(Some(buf))
    }

    pub(super) fn on_received(&mut self, key: Key<Session>, from: Side, buf: Buf) {
        self.count_received(key, from, buf.len());
        self.pass_on(key, from, buf);
    }

    /// Sends bytes that one side of a session has sent to the other.
    pub(super) fn pass_on(&mut self, key: Key<Session>, from: Side, buf: Buf) {
        let limit = self.in_flight_limit();
        let Some(session) = self.sessions.get_mut(key) else {
            return self.cx.driver.buffers().give(buf);
        };
        if !session.is_open() {
            self.cx.driver.buffers().push(&mut session.early, buf);
            self.apply(key, Session::on_early);
            return self.dispatch_heard(key);
        }
        let action = session.on_received(from, buf.len(), limit, self.cx.now);
        match (action, session.conn(from.other())) {
            (Action::Discard, _) | (_, None) => self.cx.driver.buffers().give(buf),
            (action, Some(to)) => {
                self.cx.driver.send(to, buf);
                self.act(key, action);
            }
        }
    }

    /// Bytes came that the driver sends on by itself, which also bounds them.
    pub(super) fn on_spliced(&mut self, key: Key<Session>, from: Side, bytes: u32) {
        self.count_received(key, from, bytes);
        self.apply(key, |session, now| session.on_received(from, bytes, u32::MAX, now));
    }

    fn count_received(&mut self, key: Key<Session>, from: Side, bytes: u32) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        self.load.batcher.on_active(&mut session.window);
        match from {
            Side::Client => self.cx.stats.bytes.of(Direction::ToBackend).add(u64::from(bytes)),
            Side::Backend => {
                self.cx.stats.bytes.of(Direction::ToClient).add(u64::from(bytes));
                if let Some(waited) = session.take_first_byte(self.cx.now) {
                    self.cx.stats.first_byte.record(waited);
                }
                if session.take_heard() {
                    self.on_session_answered(key);
                }
            }
        }
    }

    pub(super) fn on_sent(&mut self, key: Key<Session>, to: Side, bytes: u32) {
        let limit = self.in_flight_limit();
        self.apply(key, |session, now| session.on_sent(to, bytes, limit, now));
    }

    pub(super) fn on_ended(&mut self, key: Key<Session>, from: Side) {
        if from == Side::Backend && self.on_backend_gone(key, false) {
            return;
        }
        self.apply(key, |session, now| session.on_ended(from, now));
        self.arm_deadline(key);
    }

    /// Sets the session's timer: it has been opened, one direction of it has ended, or activity
    /// has moved the deadline at which the timer fired.
    pub(super) fn arm_deadline(&mut self, key: Key<Session>) {
        if let Some(session) = self.sessions.get(key)
            && let (Some(client), Some(deadline)) =
                (session.conn(Side::Client), session.deadline(&self.timeouts))
        {
            self.cx.timers.set(client.index(), deadline);
        }
    }

    pub(super) fn on_session_deadline(&mut self, key: Key<Session>) {
        if self.sessions.get(key).is_some_and(Session::awaits_endpoint) {
            // The timer may have fired for a moment too early: it is set again then.
            return self.dispatch(key, CloseReason::NoEndpoint);
        }
        let Some(session) = self.sessions.get(key) else { return };
        let survivor = session.survivor().and_then(|side| session.conn(side));
        let undelivered = survivor.map_or(0, |conn| self.cx.driver.undelivered(conn));
        let timeouts = self.timeouts;
        self.apply(key, |session, now| session.on_deadline(&timeouts, undelivered, now));
        self.arm_deadline(key);
    }

    /// Tells a session what happened and does what it answers.
    pub(super) fn apply(
        &mut self,
        key: Key<Session>,
        event: impl FnOnce(&mut Session, Instant) -> Action,
    ) {
        if let Some(session) = self.sessions.get_mut(key) {
            let action = event(session, self.cx.now);
            self.act(key, action);
        }
    }

    fn act(&mut self, key: Key<Session>, action: Action) {
        let Some(session) = self.sessions.get(key) else { return };
        match action {
            Action::None | Action::Discard => {}
            Action::Close(reason) => self.close_session(key, reason),
            Action::Pause(side) | Action::Resume(side) => {
                if let Some(conn) = session.conn(side) {
                    self.cx.driver.receive(conn, matches!(action, Action::Resume(_)));
                }
            }
            Action::Shutdown(side) => {
                if let Some(conn) = session.conn(side) {
                    self.cx.driver.shutdown(conn);
                }
            }
        }
    }

    pub(super) fn close_session(&mut self, key: Key<Session>, reason: CloseReason) {
        let Some(mut session) = self.sessions.remove(key) else { return };
        self.cx.driver.buffers().clear(&mut session.early);
        self.judge_closed(&mut session);
        for side in [Side::Client, Side::Backend] {
            if let Some(conn) = session.conn(side) {
                self.cx.timers.clear(conn.index());
                self.owner(conn);
                match session.ending(side, reason) {
                    Ending::Now(how) => self.cx.driver.close(conn, how),
                    Ending::ResetBehind => self.reset_behind(conn),
                    Ending::ResetOrEnd => {
                        let delivered = self.cx.driver.undelivered(conn) == 0;
                        let how = if delivered { Close::Reset } else { Close::Graceful };
                        self.cx.driver.close(conn, how);
                    }
                }
            }
        }
        self.release(session.endpoint());
        self.on_session_gone(reason, session.age(self.cx.now));
        tracing::trace!(reason = ?reason, "session closed");
    }

    pub(super) fn close_all_sessions(&mut self, reason: CloseReason) {
        for slot in 0..self.sessions.slots() {
            if let Some(key) = self.sessions.key_at(slot) {
                self.close_session(key, reason);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
            if mode == PoolMode::Request {
                config.protocol = Protocol::Chronos;
            }
            config.pool.mode = mode;
            let mut run = Run::with(fastrand::Rng::with_seed(1), config, 1, 100);
            if mode == PoolMode::Request {
                run.engine.driver().speech = Speech::Lines;
            }
            run.engine.acceptor.slots = SLOTS;
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
            assert!(run.stats.closed(CloseReason::Overload) > 0, "{mode:?}");
            run.stop();
        }
    }
}
