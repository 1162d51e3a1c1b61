//! A worker's endpoints: keeping their pools filled, and their health.

use std::io;
use std::time::Instant;

use super::engine::{Engine, Owner};
use super::mailbox::Order;
use crate::io::{Buf, Chain, Close, ConnId, Driver, Unheard};
use crate::limits;
use crate::telemetry::Discard;

impl<D: Driver> Engine<D> {
    /// Remembers that an endpoint's pool may want connections.
    pub(super) fn mark_short(&mut self, endpoint: u16) {
        if !self.short_pools.contains(&endpoint) {
            self.short_pools.push(endpoint);
        }
    }

    pub(super) fn refill_short_pools(&mut self) {
        while let Some(endpoint) = self.short_pools.pop() {
            self.refill(endpoint);
        }
    }

    fn refill(&mut self, endpoint: u16) {
        let (now, keeps) = (self.now, self.keeps_pools());
        let needed = self.is_needed(endpoint);
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        let tries = entry.health.is_usable() || needed;
        let wanted =
            if keeps && entry.is_present() && tries { entry.pool.shortage(now) } else { 0 };
        for _ in 0..wanted.min(self.pool_conns_max.saturating_sub(self.pool_conns)) {
            if !self.warm(endpoint) {
                break;
            }
        }
        self.publish_pool(endpoint);
    }

    /// Starts a connection for the pool. Says whether it is under way.
    fn warm(&mut self, endpoint: u16) -> bool {
        if !self.lends() && self.driver.is_short_of_descriptors() {
            // Those in reserve are for clients that are here already.
            return false;
        }
        let Some(entry) = self.table.get_mut(endpoint) else { return false };
        entry.pool.on_connecting();
        self.pool_conns += 1;
        match self.driver.connect(&entry.endpoint.address) {
            Ok(conn) => {
                self.own(conn, Owner::Warming { endpoint, since: self.now });
                self.timers.set(conn.index(), self.now + self.config.connect_timeout);
                true
            }
            Err(error) => {
                self.pool_failed(endpoint, &error);
                false
            }
        }
    }

    pub(super) fn on_warmed(&mut self, endpoint: u16, conn: ConnId, since: Instant) {
        self.timers.clear(conn.index());
        self.stats.connect_duration.record(self.now.saturating_duration_since(since));
        self.on_endpoint_success(endpoint);
        let (now, keeps) = (self.now, self.keeps_pools());
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        let kept = entry.pool.on_connected(conn, now, &mut self.rng);
        let useful = !entry.is_gone() && keeps;
        if kept && useful {
            self.own(conn, Owner::Warm { endpoint, greeting: Chain::default() });
            // Watched while idle: its end shows at once.
            self.driver.receive(conn, true);
            if self.lends() {
                self.free(endpoint);
            }
        } else {
            entry.pool.remove(conn);
            self.discard(conn, if useful { Discard::Surplus } else { Discard::Endpoint });
        }
        self.mark_short(endpoint);
    }

    pub(super) fn on_warming_failed(&mut self, endpoint: u16, conn: ConnId, error: &io::Error) {
        self.timers.clear(conn.index());
        self.driver.close(conn, Close::Reset);
        self.pool_failed(endpoint, error);
    }

    fn pool_failed(&mut self, endpoint: u16, error: &io::Error) {
        self.pool_conns -= 1;
        let now = self.now;
        if let Some(entry) = self.table.get_mut(endpoint) {
            entry.pool.on_connect_failed(now, &mut self.rng);
        }
        if is_local(error) {
            if let Some(entry) = self.table.get_mut(endpoint) {
                entry.health.on_probe_lost(now);
            }
        } else {
            self.on_endpoint_failure(endpoint, error);
        }
        self.on_endpoint_missed(endpoint);
        self.publish_pool(endpoint);
    }

    /// A backend spoke before it was asked, as some protocols do. The bytes wait for the session
    /// that gets the connection, which is still watched.
    pub(super) fn on_greeting(&mut self, conn: ConnId, buf: Buf) {
        let Owner::Warm { endpoint, mut greeting } = self.owner(conn) else {
            return self.driver.buffers().give(buf);
        };
        if self.lends() {
            // It would pass for the answer to the next request.
            self.driver.buffers().give(buf);
            return self.forget_warm(endpoint, conn, Discard::Unexpected);
        }
        self.driver.buffers().push(&mut greeting, buf);
        if greeting.buffers() > limits::POOL_GREETING_BUFFERS_MAX || self.is_lean() {
            self.driver.buffers().clear(&mut greeting);
            self.forget_warm(endpoint, conn, Discard::Unexpected);
            return;
        }
        self.own(conn, Owner::Warm { endpoint, greeting });
    }

    /// A warm connection ended or broke while it was idle.
    pub(super) fn on_warm_died(&mut self, endpoint: u16, conn: ConnId) {
        self.forget_warm(endpoint, conn, Discard::Dead);
    }

    /// Discards the warm connections whose end nobody has heard yet, up to the first one that is
    /// open: the next to be taken is proved to be so, at the moment when it changes hands.
    pub(super) fn prove_oldest(&mut self, endpoint: u16) {
        while let Some(entry) = self.table.get_mut(endpoint)
            && let Some(conn) = entry.pool.oldest_conn()
            // Bytes are a greeting.
            && self.driver.unheard(conn) == Unheard::End
        {
            self.forget_warm(endpoint, conn, Discard::Dead);
        }
    }

    /// Likewise for those that are lent: the next one is open and silent, or there is none. What
    /// the kernel had told by the end of a turn need not be all that there was to tell.
    pub(super) fn prove_latest(&mut self, endpoint: u16) {
        while let Some(entry) = self.table.get_mut(endpoint)
            && let Some(conn) = entry.pool.latest_conn()
            && let Some(why) = why_not_lent(self.driver.unheard(conn))
        {
            self.forget_warm(endpoint, conn, why);
            if !self.queue.is_empty() {
                // Those that wait may have counted on it.
                self.want(endpoint, 1);
            }
        }
    }

    fn forget_warm(&mut self, endpoint: u16, conn: ConnId, why: Discard) {
        let now = self.now;
        if let Some(entry) = self.table.get_mut(endpoint) {
            entry.pool.on_died(conn, now, &mut self.rng);
        }
        self.discard(conn, why);
        self.mark_short(endpoint);
    }

    /// Closes a connection that has left its pool.
    fn discard(&mut self, conn: ConnId, why: Discard) {
        if let Owner::Warm { mut greeting, .. } = self.owner(conn) {
            self.driver.buffers().clear(&mut greeting);
        }
        self.pool_conns -= 1;
        self.stats.count_discard(why);
        self.driver.close(conn, Close::Graceful);
    }

    fn evict(&mut self, endpoint: u16, why: Discard) {
        while let Some(conn) = self.table.get_mut(endpoint).and_then(|entry| entry.pool.evict()) {
            self.discard(conn, why);
        }
    }

    /// Closes the warm connections of endpoints that have left for good. Those of one that may come
    /// back stay for a little, unless nobody needs them or others need their places.
    pub(super) fn evict_removed(&mut self) {
        let (now, linger) = (self.now, self.linger);
        let full = self.pool_conns >= self.pool_conns_max;
        let keeps = self.keeps_pools() && !(full && self.table.wants_connections(now));
        for endpoint in self.table.indices() {
            let Some(entry) = self.table.get_mut(endpoint) else { continue };
            entry.let_go(linger, now);
            if entry.is_gone() || !(keeps || entry.is_present()) {
                self.evict(endpoint, Discard::Endpoint);
            }
        }
        self.table.forget_unused();
    }

    /// A connect to the endpoint succeeded.
    pub(super) fn on_endpoint_success(&mut self, endpoint: u16) {
        let now = self.now;
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        let readmitted = entry.health.on_success(now);
        entry.stats().connects.add(1);
        entry.stats().failures_in_a_row.set(0);
        if readmitted {
            entry.stats().ejected.set(0);
            tracing::info!(endpoint = entry.endpoint.name, "usable again");
            self.mark_short(endpoint);
        }
    }

    /// A connect to the endpoint failed.
    pub(super) fn on_endpoint_failure(&mut self, endpoint: u16, error: &io::Error) {
        let (now, health) = (self.now, self.health);
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        let ejected = entry.health.on_failure(&health, now, &mut self.rng);
        let stats = entry.stats();
        stats.connect_failures.add(1);
        stats.failures_in_a_row.set(u64::from(entry.health.failures()));
        if ejected {
            stats.ejections.add(1);
            // A probe that fails ejects again; that is no news.
            if stats.ejected.get() == 0 {
                tracing::warn!(endpoint = entry.endpoint.name, %error, "ejected");
            }
            stats.ejected.set(1);
            self.evict(endpoint, Discard::Endpoint);
        }
    }

    /// Closes what is too old, makes what is missing, and probes what may have recovered.
    pub(super) fn upkeep(&mut self) {
        let now = self.now;
        self.look_after_queue();
        self.evict_removed();
        for endpoint in self.table.indices() {
            while let Some((conn, why)) =
                self.table.get_mut(endpoint).and_then(|entry| entry.pool.expire(now))
            {
                self.discard(conn, why);
            }
            let Some(entry) = self.table.get_mut(endpoint) else { continue };
            if let Some(slow_start) = self.config.slow_start {
                entry.ramp_up(slow_start, now);
            }
            if self.config.backend_drain.is_some_and(|drain| entry.is_overdue(drain, now)) {
                self.close_sessions_on(endpoint);
                self.recall_loans_of(endpoint);
            }
            let Some(entry) = self.table.get_mut(endpoint) else { continue };
            let running = self.order == Order::Run && entry.is_present();
            if running && entry.health.take_probe(now) {
                self.warm(endpoint);
            }
            self.refill(endpoint);
        }
        self.table.forget_unused();
    }

    fn publish_pool(&mut self, endpoint: u16) {
        let now = self.now;
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        let (pool, stats) = (&entry.pool, entry.stats());
        stats.pool_idle.set(pool.idle() as u64);
        stats.pool_connecting.set(pool.connecting() as u64);
        stats.pool_target.set(pool.target() as u64);
        stats.pool_oldest_ms.set(pool.oldest(now).map_or(0, |age| age.as_millis() as u64));
    }
}

/// Why a connection must not be lent, by what is unheard of it.
pub(super) fn why_not_lent(unheard: Unheard) -> Option<Discard> {
    match unheard {
        Unheard::Nothing => None,
        Unheard::Bytes => Some(Discard::Unexpected),
        Unheard::End => Some(Discard::Dead),
    }
}

/// Whether a connect failed for want of something on this side, which is no fault of the endpoint.
pub(super) fn is_local(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::QuotaExceeded
        || matches!(
            error.raw_os_error(),
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM | libc::EADDRNOTAVAIL)
        )
}
