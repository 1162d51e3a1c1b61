//! Keeping the pools filled, and looking after endpoints: what pools, sessions and requests do together.

use std::io;
use std::time::Instant;

use super::Route;
use super::pools::{is_local, why_not_acquired};
use crate::io::{Buf, Chain, Close, ConnId, Driver};
use crate::limits;
use crate::metrics::{CloseReason, Discard, Retry};
use crate::proxy::Side;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::health::AT_ONCE;
use crate::proxy::request::Client;
use crate::proxy::session::{Session, Verdict};
use crate::slab::Key;
use crate::worker::context::Context;
use crate::worker::mailbox::Command;
use crate::worker::owners::Owner;

impl Route {
    pub(in crate::worker) fn refill_short_pools<D: Driver>(&mut self, cx: &mut Context<D>) {
        if self.pools.short.is_empty() {
            return;
        }
        let any_usable = self.pools.table.any_usable();
        while let Some(endpoint) = self.pools.short.pop() {
            self.refill(cx, endpoint, any_usable);
        }
    }

    fn is_needed<D: Driver>(&mut self, cx: &Context<D>, endpoint: EndpointId) -> bool {
        let any_usable = self.pools.table.any_usable();
        self.placing(cx).is_needed(endpoint, any_usable)
    }

    /// Makes the connections that a pool lacks. `any_usable`: whether any endpoint is, which is looked at
    /// once for all.
    pub(super) fn refill<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        any_usable: bool,
    ) {
        let probe_waits = self.probe(cx, endpoint);
        let (now, keeps, share) = (cx.now, self.keeps_pools(cx), self.pools.pool_share());
        let needed = self.placing(cx).is_needed(endpoint, any_usable);
        let Some(entry) = self.pools.table.get_mut(endpoint) else { return };
        let tries = (entry.health.is_usable() && !entry.is_withheld()) || needed;
        let short =
            if keeps && entry.is_present() && tries { entry.pool.shortage(share, now) } else { 0 };
        for _ in 0..short {
            let Some(entry) = self.pools.table.get(endpoint) else { break };
            let may_be_idle =
                entry.pool.wanted() > 0 || self.pools.table.reserve_idle(endpoint, now);
            if !may_be_idle || !self.has_room_for(cx, endpoint) || !self.start_connect(cx, endpoint)
            {
                break;
            }
        }
        let waits = probe_waits || self.waits_for(endpoint);
        self.pools.table.return_spare(endpoint, waits);
        self.pools.publish_pool(cx, endpoint);
    }

    /// Probes an endpoint if that is due. Says whether that waits for a place: it has its turn as those have
    /// who wait for one.
    fn probe<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) -> bool {
        let now = cx.now;
        let Some(entry) = self.pools.table.get(endpoint) else { return false };
        let running = cx.command < Command::Drain && entry.is_present();
        if !running || !entry.health.is_probe_due(now) || self.lacks_descriptors(cx) {
            return false;
        }
        if !self.pools.table.reserve(endpoint, now) {
            self.pools.table.want_place(endpoint, now);
            // One may just have become free.
            if !self.pools.table.reserve(endpoint, now) {
                return true;
            }
        }
        if let Some(entry) = self.pools.table.get_mut(endpoint) {
            entry.health.take_probe(now);
        }
        self.start_connect(cx, endpoint);
        false
    }

    /// How many connections there may be in pools, those that clients hold included. Each client
    /// comes with the right to one.
    fn pool_budget(&self) -> usize {
        self.pools.conns_max + self.requests.clients.len()
    }

    /// Whether one more connection to an endpoint may be made. If requests wait for it, or others
    /// have more than their share, the one goes for it that has been idle for longest.
    fn has_room_for<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) -> bool {
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
        oldest.is_some_and(|oldest| self.pools.give_up_oldest(cx, oldest))
    }

    /// Closes those that have been idle for longest while there are more than may be: clients have
    /// left, and their connections have come back.
    pub(super) fn trim_pools<D: Driver>(&mut self, cx: &mut Context<D>) {
        while self.pools.pool_budget_used() > self.pool_budget() {
            let oldest = self.pools.table.oldest_idle(|_, _| true);
            if !oldest.is_some_and(|oldest| self.pools.give_up_oldest(cx, oldest)) {
                return;
            }
        }
    }

    /// Whether there are no descriptors for connections that no client waits for.
    fn lacks_descriptors<D: Driver>(&self, cx: &Context<D>) -> bool {
        // Those in reserve are for clients that are here already.
        !self.reuses_conns() && cx.driver.is_short_of_descriptors()
    }

    /// Starts a connection for the pool. Says whether it is under way.
    pub(super) fn start_connect<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
    ) -> bool {
        if self.lacks_descriptors(cx) {
            return false;
        }
        let Some(entry) = self.pools.table.get(endpoint) else { return false };
        let (address, is_waited_for) = (entry.endpoint.address.clone(), entry.pool.wanted() > 0);
        if !self.pools.table.reserve(endpoint, cx.now) {
            if is_waited_for {
                self.pools.table.want_place(endpoint, cx.now);
            }
            return false;
        }
        self.pools.table.start(endpoint);
        match self.pools.connect(cx, &address) {
            Ok(conn) => {
                cx.owners.insert(conn, self.id, Owner::Connecting { endpoint, since: cx.now });
                cx.timers.set(conn.index(), cx.now + self.config.connect_timeout);
                true
            }
            Err(error) => {
                self.pool_failed(cx, endpoint, None, &error);
                false
            }
        }
    }

    pub(super) fn on_pool_connected<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        conn: ConnId,
        since: Instant,
    ) {
        cx.timers.clear(conn.index());
        self.stats.connect_duration.record(cx.now.saturating_duration_since(since));
        self.pools.on_endpoint_connected(cx, endpoint);
        let (now, keeps, health) = (cx.now, self.keeps_pools(cx), self.pools.health);
        let is_waited_for = self.waits_for(endpoint);
        let kept = self.pools.table.connected(endpoint, conn, is_waited_for, now, &mut cx.rng);
        let Some(entry) = self.pools.table.get_mut(endpoint) else { return };
        if !kept && entry.health.on_settled(&health, now) {
            // There is no room to see whether it lasts.
            self.pools.on_readmitted(endpoint);
        }
        let Some(entry) = self.pools.table.get_mut(endpoint) else { return };
        let (useful, usable) = (!entry.is_gone() && keeps, entry.health.is_usable());
        if kept && useful {
            cx.owners.set(conn, Owner::Idle { endpoint, greeting: Chain::default() });
            // Watched while idle: its end shows at once.
            cx.driver.receive(conn, true);
            self.pools.on_idle(endpoint, now);
            // One to an endpoint in doubt is for nobody who can have another one.
            if self.reuses_conns() && (usable || self.is_needed(cx, endpoint)) {
                self.free(endpoint);
            }
        } else {
            self.pools.table.remove(endpoint, conn);
            self.pools.discard(
                cx,
                endpoint,
                conn,
                if useful { Discard::Surplus } else { Discard::Endpoint },
            );
        }
        self.pools.mark_short(endpoint);
    }

    pub(super) fn on_pool_connect_failed<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        conn: ConnId,
        error: &io::Error,
    ) {
        cx.timers.clear(conn.index());
        cx.close(conn, Close::Reset);
        self.pool_failed(cx, endpoint, Some(conn), error);
    }

    fn pool_failed<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        conn: Option<ConnId>,
        error: &io::Error,
    ) {
        let now = cx.now;
        self.pools.table.connect_failed(endpoint, now, &mut cx.rng);
        self.pools.on_closing(endpoint, conn);
        if is_local(error) {
            if let Some(entry) = self.pools.table.get_mut(endpoint) {
                entry.health.on_probe_lost(now);
            }
        } else {
            self.pools.on_endpoint_unreachable(cx, endpoint, error);
        }
        self.on_endpoint_missed(cx, endpoint);
        self.pools.publish_pool(cx, endpoint);
    }

    /// A backend spoke before it was asked, as some protocols do. The bytes wait for the session
    /// that gets the connection, which is still watched.
    pub(super) fn on_greeting<D: Driver>(&mut self, cx: &mut Context<D>, conn: ConnId, buf: Buf) {
        let Owner::Idle { endpoint, mut greeting } = cx.owners.take(conn) else {
            return cx.driver.buffers().give(buf);
        };
        if self.reuses_conns() {
            // It would pass for the answer to the next request.
            cx.driver.buffers().give(buf);
            return self.pools.discard_idle(cx, endpoint, conn, Discard::Unexpected);
        }
        if let Some(entry) = self.pools.table.get_mut(endpoint) {
            entry.pool.on_greeting();
            if let Some(made) = entry.pool.made(conn) {
                self.pools.on_endpoint_well(cx, endpoint, made);
            }
        }
        cx.driver.buffers().push(&mut greeting, buf);
        if greeting.buffers() > limits::POOL_GREETING_BUFFERS_MAX || cx.is_short_of_buffers() {
            cx.driver.buffers().clear(&mut greeting);
            self.pools.discard_idle(cx, endpoint, conn, Discard::Unexpected);
            return;
        }
        cx.owners.set(conn, Owner::Idle { endpoint, greeting });
    }

    /// A connection ended or broke while it was idle.
    pub(super) fn on_idle_died<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        conn: ConnId,
    ) {
        self.pools.discard_idle(cx, endpoint, conn, Discard::Dead);
    }

    /// Discards the idle connections that would be acquired next, up to the first one that is open and
    /// silent. What the kernel had told by the end of a turn need not be all that there was to tell.
    pub(super) fn prove_latest<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) {
        while let Some(entry) = self.pools.table.get_mut(endpoint)
            && let Some(conn) = entry.pool.latest_conn()
            && let Some(why) = why_not_acquired(cx.driver.unheard(conn))
        {
            self.pools.discard_idle(cx, endpoint, conn, why);
            if !self.requests.queue.is_empty() {
                // Those that wait may have counted on it.
                self.want(endpoint, 1);
            }
        }
    }

    /// Closes the idle connections of endpoints that have left for good. Those of one that may come
    /// back stay for a little, unless nobody needs them.
    pub(super) fn evict_removed<D: Driver>(&mut self, cx: &mut Context<D>) {
        let now = cx.now;
        let keeps = self.keeps_pools(cx);
        for endpoint in self.pools.table.indices() {
            let linger = self.pools.linger_of(endpoint);
            let Some(entry) = self.pools.table.get_mut(endpoint) else { continue };
            entry.let_go(linger, now);
            if entry.is_gone() || !(keeps || entry.is_present()) {
                self.pools.evict(cx, endpoint, Discard::Endpoint);
            }
        }
        self.pools.table.forget_unused();
    }

    /// The first byte of a session came from its backend.
    pub(super) fn on_session_answered<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
    ) {
        let Some(session) = self.sessions.get(key) else { return };
        let (endpoint, made) = (session.endpoint(), session.made());
        let Some(endpoint) = endpoint else { return };
        if let Some(entry) = self.pools.table.get_mut(endpoint) {
            entry.pool.on_session_served();
        }
        self.pools.on_endpoint_answered(cx, endpoint, made);
        self.on_session_replied(cx, key);
    }

    /// The first byte came from a session's backend since that was sent one, or was connected.
    pub(super) fn on_session_replied<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Session>) {
        if let Some((endpoint, conn)) = self.sessions.of(key).backend() {
            if let Some(entry) = self.pools.table.get_mut(endpoint) {
                entry.on_answered(cx.now);
            }
            self.pools.table.answered(endpoint, conn, cx.now);
        }
    }

    /// The backend of a session ended or broke its connection. Says whether the session has got
    /// another one; then it has not been touched by this.
    pub(super) fn on_backend_gone<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        broken: bool,
    ) -> bool {
        let Some(session) = self.sessions.get_mut(key) else { return false };
        let (untouched, was_asked) = (session.is_untouched(), session.has_client_spoken());
        let (verdict, endpoint) = (session.judge(broken, cx.now), session.endpoint());
        let Some(endpoint) = endpoint else { return false };
        let why = match verdict {
            Verdict::None => return false,
            Verdict::Stale => Retry::Forgotten,
            Verdict::Forgotten => {
                self.on_forgotten(cx, endpoint);
                Retry::Forgotten
            }
            Verdict::Failed => {
                self.pools.on_failed_at_once(cx, endpoint, was_asked);
                Retry::Ended
            }
        };
        untouched && self.move_session(cx, key, why)
    }

    /// Gives a session on which nothing has moved another backend, if it may have one. From one that
    /// has failed it goes to another endpoint only: what all do may be what is wanted.
    pub(super) fn move_session<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        why: Retry,
    ) -> bool {
        let Some(session) = self.sessions.get_mut(key) else { return false };
        let tried = *session.tried();
        let elsewhere = why != Retry::Forgotten;
        if tried.attempts() >= self.config.connect_attempts
            || (elsewhere && !self.pools.table.has_other(&tried))
            || !(why.is_free() || self.takes_retry(cx))
        {
            return false;
        }
        let session = self.sessions.of(key);
        let endpoint = session.endpoint();
        let (client, backend) = (session.conn(Side::Client), session.conn(Side::Backend));
        session.on_moved(cx.now);
        if let Some(client) = client {
            cx.timers.clear(client.index());
            cx.driver.receive(client, false);
        }
        if let Some(backend) = backend {
            cx.timers.clear(backend.index());
            cx.owners.take(backend);
            cx.close(backend, Close::Reset);
        }
        self.leave(cx, endpoint, backend);
        // What this costs was taken, so it is none of the attempts that the next may be refused for.
        self.dispatch(cx, key, CloseReason::BackendReset);
        self.sessions.listen_to_early(cx, key);
        true
    }

    /// An endpoint has reset an idle connection at its first use: it does not know it any more, and
    /// so none that was made before now. Its host was restarted, or its address has moved.
    fn on_forgotten<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) {
        self.pools.empty_pool(cx, endpoint, Discard::Dead);
        self.discard_idle_in_use_of(cx, endpoint, Discard::Dead);
        self.pools.on_failed_at_once(cx, endpoint, false);
        self.pools.mark_short(endpoint);
    }

    /// A client's connection was lost: what that says about its endpoint, and of how it was lost.
    pub(super) fn judge_lost<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        why: Retry,
    ) -> Retry {
        let client = self.requests.clients.get(key);
        let Some(&backend) = client.and_then(Client::unanswered_backend) else { return why };
        let fresh = cx.now.saturating_duration_since(backend.made) < AT_ONCE && !backend.served;
        if fresh {
            self.pools.on_failed_at_once(cx, backend.endpoint, true);
        } else if why == Retry::Broken {
            let entry = self.pools.table.get_mut(backend.endpoint);
            let was_known = entry.is_some_and(|entry| entry.on_forgotten(backend.made, cx.now));
            self.on_forgotten(cx, backend.endpoint);
            if was_known {
                return Retry::Forgotten;
            }
        }
        why
    }

    /// A session is closed. One that has lasted says that its endpoint is well, where that never
    /// sends a byte.
    pub(super) fn judge_closed<D: Driver>(&mut self, cx: &mut Context<D>, session: &mut Session) {
        let silent = session.has_lasted(cx.now) && session.take_heard();
        if silent
            && let Some(entry) = session.endpoint().and_then(|at| self.pools.table.get_mut(at))
            && !entry.health.is_sound()
        {
            entry.health.on_lasted();
            entry.stats().failures_in_a_row.set(u64::from(entry.health.failures()));
        }
    }

    /// Closes what is too old, makes what is missing, and probes what may have recovered.
    pub(in crate::worker) fn upkeep<D: Driver>(&mut self, cx: &mut Context<D>) {
        let now = cx.now;
        self.look_after_queue(cx);
        self.look_for_outage(cx);
        self.look_for_silence(cx);
        self.look_for_overdue(cx);
        self.evict_removed(cx);
        self.look_after_withheld(cx);
        self.gather_places(cx);
        self.cut_overdue(cx, |_| true);
        let any_usable = self.pools.table.any_usable();
        for endpoint in self.pools.table.indices() {
            while let Some((conn, why)) = self.pools.table.expire(endpoint, now) {
                self.pools.discard(cx, endpoint, conn, why);
            }
            let Some(entry) = self.pools.table.get_mut(endpoint) else { continue };
            if let Some(slow_start) = self.config.slow_start {
                entry.ramp_up(slow_start, now);
            }
            if entry.health.is_probing() {
                self.pools.look_at_probe(cx, endpoint);
            }
            if let Some(entry) = self.pools.table.get_mut(endpoint) {
                entry.health.forgive(now);
            }
            self.refill(cx, endpoint, any_usable);
        }
        self.pools.table.forget_unused();
    }

    /// What the pools say they have is what connections say whose they are.
    #[cfg(test)]
    pub(super) fn assert_pool_invariants<D: Driver>(&self, cx: &Context<D>) {
        use std::collections::HashMap;

        let table = &self.pools.table;
        table.assert_invariants();
        self.assert_place_invariants();
        let mut found: HashMap<EndpointId, [usize; 2]> = HashMap::new();
        for owned in cx.owners.of_route(self.id) {
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
