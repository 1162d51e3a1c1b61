//! What one worker has of a route: the sessions and clients that came by it, and the pools of its
//! endpoints.
//!
//! A route's methods are handed the worker's context, and know nothing of other routes.

mod cut;
mod dispatch;
mod ended;
mod events;
mod overdue;
mod places;
mod pools;
mod requests;
mod sessions;
mod silence;
mod tiers;
mod upkeep;
mod waiting;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::context::Context;
use super::mailbox::Command;
use crate::config::{Config, PoolMode, RouteConfig};
use crate::io::net::Credentials;
use crate::io::{Close, ConnId, Driver};
use crate::listening::Listening;
use crate::metrics::{CloseReason, RouteStats};
use crate::proxy::RouteId;
#[cfg(test)]
use crate::proxy::Side;
use crate::proxy::endpoints::EndpointSnapshot;
use crate::proxy::outage::Outage;
use crate::proxy::retry_budget::{Reserve, RetryBudget};
#[cfg(test)]
use crate::proxy::session::Session;
#[cfg(test)]
use crate::slab::Key;
use overdue::Overdue;
use pools::Pools;
use requests::Requests;
use sessions::Sessions;
use silence::Silence;

/// One route of one worker.
pub(super) struct Route {
    id: RouteId,
    config: Arc<RouteConfig>,
    stats: Arc<RouteStats>,
    sessions: Sessions,
    requests: Requests,
    pools: Pools,
    silence: Silence,
    overdue: Overdue,
    retries: RetryBudget,
    outage: Outage,
}

impl Route {
    /// Without endpoints, with room for so many sessions, and for so many connections in pools.
    pub(super) fn new<D: Driver>(
        id: RouteId,
        process: &Config,
        cx: &Context<D>,
        pool_conns_max: usize,
        listening: Listening,
        reserve: Arc<Reserve>,
    ) -> Self {
        let config = Arc::clone(&process.routes[usize::from(id)]);
        let places = cx.places.slots();
        let stats = &cx.stats.routes[usize::from(id)];
        let in_log = process.name_in_log(usize::from(id)).map(ToString::to_string);
        Self {
            id,
            sessions: Sessions::new(id, &config, Arc::clone(stats), places),
            requests: Requests::new(&config, process.drain_delay, places),
            pools: Pools::new(&config, cx, Arc::clone(stats), pool_conns_max, listening, in_log),
            stats: Arc::clone(stats),
            silence: Silence::new(config.tcp_user_timeout),
            overdue: Overdue::default(),
            retries: RetryBudget::new(config.retry_budget, reserve, cx.now),
            outage: Outage::default(),
            config,
        }
    }

    /// A client came.
    pub(super) fn on_client<D: Driver>(&mut self, cx: &mut Context<D>, conn: ConnId) {
        self.stats.sessions_opened.add(1);
        if !cx.places.admit(self.id) {
            self.stats.count_close(CloseReason::Overload);
            self.tell_of_refused(cx, conn, CloseReason::Overload);
            return cx.close(conn, Close::Reset);
        }
        cx.publish_sessions(self.id);
        cx.tap_client(self.id, conn);
        if tracing::enabled!(tracing::Level::TRACE)
            && let Some(Credentials { pid, uid, gid }) = cx.driver.credentials(conn)
        {
            tracing::trace!(
                route = self.pools.name_in_log.as_deref(),
                pid,
                uid,
                gid,
                "a client came by a Unix socket"
            );
        }
        if self.reuses_conns() {
            self.begin_client(cx, conn);
        } else {
            self.begin_session(cx, conn);
        }
    }

    /// Has the endpoints of a snapshot from now on.
    pub(super) fn apply<D: Driver>(&mut self, cx: &mut Context<D>, snapshot: &EndpointSnapshot) {
        let slow_start = self.config.slow_start.is_some();
        self.pools.table.apply(snapshot, &self.config.pool, slow_start, cx.now);
        self.evict_removed(cx);
        // The pace of the others is that of upkeep.
        let now = cx.now;
        self.cut_overdue(cx, |since| since == now);
        self.stats.applied_generation.set(snapshot.generation);
        self.pools.short.clear();
        self.pools.short.extend(self.pools.table.indices());
        if !self.pools.table.is_empty() {
            self.pools.look_after_places();
        }
        self.place_waiting_again(cx);
    }

    /// Closes all sessions and clients.
    pub(super) fn close_all<D: Driver>(&mut self, cx: &mut Context<D>, reason: CloseReason) {
        self.close_all_sessions(cx, reason);
        self.close_all_clients(cx, reason);
    }

    /// A session or a client is gone, which was open for so long.
    fn on_gone<D: Driver>(&self, cx: &mut Context<D>, reason: CloseReason, age: Duration) {
        self.stats.count_close(reason);
        self.stats.session_duration.record(age);
        cx.on_gone(self.id, age);
    }

    /// Whether there is something to do in this turn already.
    pub(super) fn is_due(&self) -> bool {
        !(self.requests.due.is_empty() && self.pools.freed.is_empty()) || self.pools.has_closed()
    }

    /// When places are to be looked after.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        self.pools.places_at
    }

    /// The workers that serve its clients: where connections serve several of them, no more than may
    /// have one at a time. Others would have to wait for their turn.
    pub(super) fn workers_max(&self) -> usize {
        match self.config.pool.mode {
            PoolMode::Request | PoolMode::Session => {
                self.config.pool.conns_max().unwrap_or(usize::MAX)
            }
            PoolMode::Preconnect => usize::MAX,
        }
    }

    /// Without idle connections or endpoints to watch there is nothing to look over.
    pub(super) fn needs_upkeep(&self) -> bool {
        self.pools.table.has_entries()
    }

    /// Whether connections serve several clients.
    pub(super) fn reuses_conns(&self) -> bool {
        self.config.pool.mode != PoolMode::Preconnect
    }

    /// How many answers may come at a time, where that is known: connections serve several clients, or
    /// there are none.
    pub(super) fn answers_max(&self) -> Option<u32> {
        // Few connections for many clients bring few answers at a time, and a route that nobody uses
        // brings none.
        let acquired = self.pools.table.totals().acquired as u32;
        (self.reuses_conns() || self.sessions.is_empty()).then_some(acquired / 2)
    }

    /// Whether connections are worth keeping: there may be a client that needs one.
    fn keeps_pools<D>(&self, cx: &Context<D>) -> bool {
        cx.command < Command::Drain || !self.requests.clients.is_empty()
    }

    /// Whether a session has no backend yet.
    #[cfg(test)]
    pub(super) fn is_connecting(&self, key: Key<Session>) -> bool {
        self.sessions.get(key).is_some_and(|session| !session.is_open())
    }

    /// What is owed to sessions counts by its age, and nothing else.
    #[cfg(test)]
    fn outstanding_invariants(&self) {
        let keys = (0..self.sessions.slots()).filter_map(|slot| self.sessions.key_at(slot));
        for session in keys.filter_map(|key| self.sessions.get(key)) {
            let Some(conn) = session.conn(Side::Backend) else { continue };
            let owed = self.pools.table.owes(conn);
            assert!(owed.is_none_or(|owed| owed == session.awaits_backend()), "{session:?}");
        }
    }

    /// Sessions that wait for an endpoint, or for a place at one.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.sessions.line.held()
    }

    /// Checks what holds between two turns. Returns how many sessions and clients there are.
    #[cfg(test)]
    pub(super) fn assert_invariants<D: Driver>(&self, cx: &Context<D>) -> usize {
        self.sessions.assert_invariants(cx);
        self.assert_pool_invariants(cx);
        self.requests_invariants(cx);
        self.outstanding_invariants();
        self.sessions.len() + self.requests.clients.len()
    }
}
