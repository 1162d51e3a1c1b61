//! Keeping the pools filled, and looking after endpoints: what pools, sessions and requests do together.

use crate::proxy::endpoints::EndpointId;
use std::io;
use std::time::Instant;

use super::engine::{Engine, Owner};
use super::mailbox::Command;
use super::pools::{discard, is_local, why_not_acquired};
use crate::io::{Buf, Chain, Close, ConnId, Driver};
use crate::limits;
use crate::metrics::{CloseReason, Discard, Retry};
use crate::proxy::Side;
use crate::proxy::health::AT_ONCE;
use crate::proxy::request::Client;
use crate::proxy::session::{Session, Verdict};
use crate::slab::Key;

impl<D: Driver> Engine<D> {
    pub(super) fn refill_short_pools(&mut self) {
        while let Some(endpoint) = self.pools.short.pop() {
            self.refill(endpoint);
        }
    }

    fn refill(&mut self, endpoint: EndpointId) {
        let (now, keeps, share) = (self.cx.now, self.keeps_pools(), self.pools.pool_share());
        let needed = self.is_needed(endpoint);
        let Some(entry) = self.pools.table.get_mut(endpoint) else { return };
        let tries = entry.health.is_usable() || needed;
        let short =
            if keeps && entry.is_present() && tries { entry.pool.shortage(share, now) } else { 0 };
        for _ in 0..short {
            if !self.has_room_for(endpoint) || !self.start_connect(endpoint) {
                break;
            }
        }
        self.pools.publish_pool(&mut self.cx, endpoint);
    }

    /// How many connections there may be in pools, those that clients hold included. Each client
    /// comes with the right to one.
    fn pool_budget(&self) -> usize {
        self.pools.conns_max + self.requests.clients.len()
    }

    /// Whether one more connection to an endpoint may be made. If requests wait for it, or others
    /// have more than their share, the one goes for it that has been idle for longest.
    fn has_room_for(&mut self, endpoint: EndpointId) -> bool {
        let waited_for = self.pools.table.get_mut(endpoint).is_some_and(|e| e.pool.wanted() > 0);
        // What comes with clients goes with them, so it is for what they need.
        let most = if waited_for { self.pool_budget() } else { self.pools.conns_max };
        if self.pools.pool_budget_used() < most {
            return true;
        }
        let share = self.pools.pool_share();
        let oldest = self.pools.table.oldest_idle(|index, entry| {
            let has_enough = entry.pool.idle() > share || !entry.is_present();
            index != endpoint && (waited_for || has_enough)
        });
        oldest.is_some_and(|oldest| self.pools.give_up_oldest(&mut self.cx, oldest))
    }

    /// Closes those that have been idle for longest while there are more than may be: clients have
    /// left, and their connections have come back.
    pub(super) fn trim_pools(&mut self) {
        while self.pools.pool_budget_used() > self.pool_budget() {
            let oldest = self.pools.table.oldest_idle(|_, _| true);
            if !oldest.is_some_and(|oldest| self.pools.give_up_oldest(&mut self.cx, oldest)) {
                return;
            }
        }
    }

    /// Starts a connection for the pool. Says whether it is under way.
    pub(super) fn start_connect(&mut self, endpoint: EndpointId) -> bool {
        if !self.reuses_conns() && self.cx.driver.is_short_of_descriptors() {
            // Those in reserve are for clients that are here already.
            return false;
        }
        let Some(entry) = self.pools.table.get_mut(endpoint) else { return false };
        let address = entry.endpoint.address;
        self.pools.table.start(endpoint);
        match self.pools.connect(&mut self.cx, &address) {
            Ok(conn) => {
                self.cx.owners.set(conn, Owner::Connecting { endpoint, since: self.cx.now });
                self.cx.timers.set(conn.index(), self.cx.now + self.cx.config.connect_timeout);
                true
            }
            Err(error) => {
                self.pool_failed(endpoint, &error);
                false
            }
        }
    }

    pub(super) fn on_pool_connected(&mut self, endpoint: EndpointId, conn: ConnId, since: Instant) {
        self.cx.timers.clear(conn.index());
        self.cx.stats.connect_duration.record(self.cx.now.saturating_duration_since(since));
        self.pools.on_endpoint_connected(&mut self.cx, endpoint);
        let (now, keeps, health) = (self.cx.now, self.keeps_pools(), self.pools.health);
        let kept = self.pools.table.connected(endpoint, conn, now, &mut self.cx.rng);
        let Some(entry) = self.pools.table.get_mut(endpoint) else { return };
        if !kept && entry.health.on_settled(&health, now) {
            // There is no room to see whether it lasts.
            self.pools.on_readmitted(endpoint);
        }
        let Some(entry) = self.pools.table.get_mut(endpoint) else { return };
        let (useful, usable) = (!entry.is_gone() && keeps, entry.health.is_usable());
        if kept && useful {
            self.cx.owners.set(conn, Owner::Idle { endpoint, greeting: Chain::default() });
            // Watched while idle: its end shows at once.
            self.cx.driver.receive(conn, true);
            // One to an endpoint in doubt is for nobody who can have another one.
            if self.reuses_conns() && (usable || self.is_needed(endpoint)) {
                self.free(endpoint);
            }
        } else {
            self.pools.table.remove(endpoint, conn);
            discard(&mut self.cx, conn, if useful { Discard::Surplus } else { Discard::Endpoint });
        }
        self.pools.mark_short(endpoint);
    }

    pub(super) fn on_pool_connect_failed(
        &mut self,
        endpoint: EndpointId,
        conn: ConnId,
        error: &io::Error,
    ) {
        self.cx.timers.clear(conn.index());
        self.cx.driver.close(conn, Close::Reset);
        self.pool_failed(endpoint, error);
    }

    fn pool_failed(&mut self, endpoint: EndpointId, error: &io::Error) {
        let now = self.cx.now;
        self.pools.table.connect_failed(endpoint, now, &mut self.cx.rng);
        if is_local(error) {
            if let Some(entry) = self.pools.table.get_mut(endpoint) {
                entry.health.on_probe_lost(now);
            }
        } else {
            self.pools.on_endpoint_unreachable(&mut self.cx, endpoint, error);
        }
        self.on_endpoint_missed(endpoint);
        self.pools.publish_pool(&mut self.cx, endpoint);
    }

    /// A backend spoke before it was asked, as some protocols do. The bytes wait for the session
    /// that gets the connection, which is still watched.
    pub(super) fn on_greeting(&mut self, conn: ConnId, buf: Buf) {
        let Owner::Idle { endpoint, mut greeting } = self.cx.owners.take(conn) else {
            return self.cx.driver.buffers().give(buf);
        };
        if self.reuses_conns() {
            // It would pass for the answer to the next request.
            self.cx.driver.buffers().give(buf);
            return self.pools.discard_idle(&mut self.cx, endpoint, conn, Discard::Unexpected);
        }
        if let Some(entry) = self.pools.table.get_mut(endpoint) {
            entry.pool.on_greeting(self.cx.now);
            if let Some(made) = entry.pool.made(conn) {
                self.pools.on_endpoint_well(&mut self.cx, endpoint, made);
            }
        }
        self.cx.driver.buffers().push(&mut greeting, buf);
        if greeting.buffers() > limits::POOL_GREETING_BUFFERS_MAX || self.cx.is_short_of_buffers() {
            self.cx.driver.buffers().clear(&mut greeting);
            self.pools.discard_idle(&mut self.cx, endpoint, conn, Discard::Unexpected);
            return;
        }
        self.cx.owners.set(conn, Owner::Idle { endpoint, greeting });
    }

    /// A idle connection ended or broke while it was idle.
    pub(super) fn on_idle_died(&mut self, endpoint: EndpointId, conn: ConnId) {
        self.pools.discard_idle(&mut self.cx, endpoint, conn, Discard::Dead);
    }

    /// Likewise for those that are lent: the next one is open and silent, or there is none. What
    /// the kernel had told by the end of a turn need not be all that there was to tell.
    pub(super) fn prove_latest(&mut self, endpoint: EndpointId) {
        while let Some(entry) = self.pools.table.get_mut(endpoint)
            && let Some(conn) = entry.pool.latest_conn()
            && let Some(why) = why_not_acquired(self.cx.driver.unheard(conn))
        {
            self.pools.discard_idle(&mut self.cx, endpoint, conn, why);
            if !self.requests.queue.is_empty() {
                // Those that wait may have counted on it.
                self.want(endpoint, 1);
            }
        }
    }

    /// Closes the idle connections of endpoints that have left for good. Those of one that may come
    /// back stay for a little, unless nobody needs them.
    pub(super) fn evict_removed(&mut self) {
        let (now, linger) = (self.cx.now, self.pools.linger);
        let keeps = self.keeps_pools();
        for endpoint in self.pools.table.indices() {
            let Some(entry) = self.pools.table.get_mut(endpoint) else { continue };
            entry.let_go(linger, now);
            if entry.is_gone() || !(keeps || entry.is_present()) {
                self.pools.evict(&mut self.cx, endpoint, Discard::Endpoint);
            }
        }
        self.pools.table.forget_unused();
    }

    /// The first byte of a session came from its backend.
    pub(super) fn on_session_answered(&mut self, key: Key<Session>) {
        let Some(session) = self.sessions.get(key) else { return };
        let (endpoint, made) = (session.endpoint(), session.made());
        let Some(endpoint) = endpoint else { return };
        if let Some(entry) = self.pools.table.get_mut(endpoint) {
            entry.pool.on_session_served();
        }
        self.pools.on_endpoint_answered(&mut self.cx, endpoint, made);
    }

    /// The backend of a session ended or broke its connection. Says whether the session has got
    /// another one; then it has not been touched by this.
    pub(super) fn on_backend_gone(&mut self, key: Key<Session>, broken: bool) -> bool {
        let Some(session) = self.sessions.get_mut(key) else { return false };
        let untouched = session.is_untouched();
        let (verdict, endpoint) = (session.judge(broken, self.cx.now), session.endpoint());
        let Some(endpoint) = endpoint else { return false };
        match verdict {
            Verdict::None => return false,
            Verdict::Stale => {}
            Verdict::Forgotten => self.on_forgotten(endpoint),
            Verdict::Failed => self.pools.on_failed_at_once(&mut self.cx, endpoint),
        }
        untouched && self.move_session(key, verdict == Verdict::Failed)
    }

    /// Gives a session on which nothing has moved another backend, if it may have one. From one that
    /// has failed it goes to another endpoint only: what all do may be what is wanted.
    pub(super) fn move_session(&mut self, key: Key<Session>, failed: bool) -> bool {
        let Some(session) = self.sessions.get_mut(key) else { return false };
        let tried = *session.tried();
        if tried.attempts() >= self.cx.config.connect_attempts
            || (failed && !self.pools.table.has_other(&tried))
        {
            return false;
        }
        let endpoint = session.endpoint();
        let (client, backend) = (session.conn(Side::Client), session.conn(Side::Backend));
        session.on_moved();
        if let Some(client) = client {
            self.cx.timers.clear(client.index());
            self.cx.driver.receive(client, false);
        }
        if let Some(backend) = backend {
            self.cx.timers.clear(backend.index());
            self.cx.owners.take(backend);
            self.cx.driver.close(backend, Close::Reset);
        }
        self.release(endpoint);
        let otherwise = if failed { CloseReason::ConnectFailed } else { CloseReason::BackendReset };
        self.dispatch(key, otherwise);
        self.sessions.listen_to_early(&mut self.cx, key);
        true
    }

    /// An endpoint has reset an idle connection at its first use: it does not know it any more, and
    /// so none that was made before now. Its host was restarted, or its address has moved.
    fn on_forgotten(&mut self, endpoint: EndpointId) {
        self.pools.empty_pool(&mut self.cx, endpoint, Discard::Dead);
        self.discard_idle_in_use_of(endpoint);
        self.pools.on_failed_at_once(&mut self.cx, endpoint);
        self.pools.mark_short(endpoint);
    }

    /// A client's connection was lost: what that says about its endpoint.
    pub(super) fn judge_lost(&mut self, key: Key<Client>, why: Retry) {
        let client = self.requests.clients.get(key);
        let Some(&backend) = client.and_then(Client::unanswered_backend) else { return };
        let fresh =
            self.cx.now.saturating_duration_since(backend.made) < AT_ONCE && !backend.served;
        if fresh {
            self.pools.on_failed_at_once(&mut self.cx, backend.endpoint);
        } else if why == Retry::Broken {
            self.on_forgotten(backend.endpoint);
        }
    }

    /// A session is closed. One that has lasted says that its endpoint is well, where that never
    /// sends a byte.
    pub(super) fn judge_closed(&mut self, session: &mut Session) {
        let silent = session.has_lasted(self.cx.now) && session.take_heard();
        if silent
            && let Some(entry) = session.endpoint().and_then(|at| self.pools.table.get_mut(at))
            && !entry.health.is_sound()
        {
            entry.health.on_lasted();
            entry.stats().failures_in_a_row.set(u64::from(entry.health.failures()));
        }
    }

    /// Closes what is too old, makes what is missing, and probes what may have recovered.
    pub(super) fn upkeep(&mut self) {
        let now = self.cx.now;
        self.look_after_queue();
        self.look_for_silence();
        self.evict_removed();
        for endpoint in self.pools.table.indices() {
            while let Some((conn, why)) = self.pools.table.expire(endpoint, now) {
                discard(&mut self.cx, conn, why);
            }
            let Some(entry) = self.pools.table.get_mut(endpoint) else { continue };
            if let Some(slow_start) = self.cx.config.slow_start {
                entry.ramp_up(slow_start, now);
            }
            if self.cx.config.backend_drain.is_some_and(|drain| entry.is_overdue(drain, now)) {
                self.close_sessions_on(endpoint);
                self.reclaim_from(endpoint);
            }
            let Some(entry) = self.pools.table.get_mut(endpoint) else { continue };
            let running = self.cx.command < Command::Drain && entry.is_present();
            if running && entry.health.take_probe(now) {
                self.start_connect(endpoint);
            } else if entry.health.is_probing() {
                self.pools.look_at_probe(&mut self.cx, endpoint);
            }
            if let Some(entry) = self.pools.table.get_mut(endpoint) {
                entry.health.forgive(now);
            }
            self.refill(endpoint);
        }
        self.pools.table.forget_unused();
    }

    /// What the pools say they have is what connections say whose they are.
    #[cfg(test)]
    pub(super) fn assert_pool_invariants(&self) {
        use std::collections::HashMap;

        let table = &self.pools.table;
        table.assert_invariants();
        let mut found: HashMap<EndpointId, [usize; 2]> = HashMap::new();
        for owned in &self.cx.owners {
            match owned.owner {
                Owner::Idle { endpoint, .. } => found.entry(endpoint).or_default()[0] += 1,
                Owner::Connecting { endpoint, .. } => found.entry(endpoint).or_default()[1] += 1,
                _ => {}
            }
        }
        for endpoint in table.indices() {
            let Some(entry) = table.get(endpoint) else { continue };
            let owned = found.remove(&endpoint).unwrap_or_default();
            let counts = entry.pool.counts();
            assert_eq!([counts.idle, counts.connecting], owned, "{}", entry.endpoint.name);
        }
        assert!(found.is_empty(), "connections of no endpoint: {found:?}");
    }
}
