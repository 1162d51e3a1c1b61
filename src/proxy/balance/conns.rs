//! The ways in which connections change hands. Each is one call here, which keeps all books at once:
//! the pool's own, the sums of all pools, and the counters that others read.
//!
//! ```text
//!            start          connected          acquire
//!   nothing ──────▶ connecting ──────▶ idle ◀────────▶ in use ──turned_opaque──▶ opaque
//!      ▲                │ failed       │ │   release     │                         │
//!      │                ▼              │ └─enter─▶ in use│ discarded               │ left
//!      └────────────────┴──────────────┴─────────────────┴─────────────────────────┘
//!                              evicted, expired, died
//! ```
//!
//! With `preconnect` a session [enters](Table::enter), with an idle connection or with one that is
//! made for it, and [leaves](Table::leave); what it had never comes back.

use std::time::Instant;

use super::{Entry, Table};
use crate::io::ConnId;
use crate::metrics::Discard;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::pool::Taken;
use crate::proxy::request::BackendConn;

/// The connections of all endpoints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Idle in pools, or being made for them.
    pub pooled: usize,
    /// Acquired from pools that reuse them, and to be released again.
    pub acquired: usize,
}

impl Totals {
    fn of(entry: &Entry) -> Self {
        let counts = entry.pool.counts();
        let acquired = if entry.pool.reuses() { counts.in_use - entry.opaque } else { 0 };
        Self { pooled: counts.idle + counts.connecting, acquired }
    }
}

impl Table {
    /// The connections of all endpoints.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Everything that changes how many connections there are goes through here.
    fn change<R>(&mut self, endpoint: EndpointId, act: impl FnOnce(&mut Entry) -> R) -> Option<R> {
        let entry = self.entries.get_mut(usize::from(endpoint))?.as_mut()?;
        let (before, counts) = (Totals::of(entry), entry.pool.counts());
        let outcome = act(entry);
        let (after, now) = (Totals::of(entry), entry.pool.counts());
        self.totals.pooled = self.totals.pooled + after.pooled - before.pooled;
        self.totals.acquired = self.totals.acquired + after.acquired - before.acquired;
        let stats = entry.stats();
        if now.in_use != counts.in_use {
            stats.sessions_active.set(now.in_use as u64);
        }
        if now.idle != counts.idle {
            stats.pool_idle.set(now.idle as u64);
        }
        if now.connecting != counts.connecting {
            stats.pool_connecting.set(now.connecting as u64);
        }
        Some(outcome)
    }

    /// Nothing → connecting: a connect for the pool was started.
    pub fn start(&mut self, endpoint: EndpointId) {
        self.change(endpoint, |entry| entry.pool.on_connecting());
    }

    /// Connecting → idle, if the pool has room for it; see [`crate::proxy::pool::Pool::room`]. Says
    /// whether it has.
    #[must_use = "a connection that is not kept is to be closed"]
    pub fn connected(
        &mut self,
        endpoint: EndpointId,
        conn: ConnId,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> bool {
        let kept = self.change(endpoint, |entry| {
            let probes = entry.health.is_probing();
            entry.pool.on_connected(conn, probes, now, rng)
        });
        kept.unwrap_or(false)
    }

    /// Connecting → nothing.
    pub fn connect_failed(&mut self, endpoint: EndpointId, now: Instant, rng: &mut fastrand::Rng) {
        self.change(endpoint, |entry| entry.pool.on_connect_failed(now, rng));
    }

    /// A session comes to an endpoint: idle → in use, where there is one, which is returned with the
    /// moment when it was made; else one has to be made for it.
    pub fn enter(&mut self, endpoint: EndpointId, now: Instant) -> Option<(ConnId, Instant)> {
        self.change(endpoint, |entry| entry.pool.enter(now)).flatten()
    }

    /// In use → nothing: a session has left its endpoint.
    pub fn leave(&mut self, endpoint: EndpointId) {
        self.change(endpoint, |entry| entry.pool.leave());
    }

    /// Idle → in use, if one is idle.
    pub fn acquire(&mut self, endpoint: EndpointId) -> Option<BackendConn> {
        let taken = self.change(endpoint, |entry| entry.pool.acquire())??;
        let Taken { conn, made, retire_at, served, unread } = taken;
        Some(BackendConn { conn, endpoint, retire_at, made, served, unread })
    }

    /// In use → idle, if it is `useful` and the pool keeps it; else → nothing. Says which.
    #[must_use = "a connection that is not kept is to be closed"]
    pub fn release(&mut self, backend: &BackendConn, useful: bool, now: Instant) -> bool {
        let &BackendConn { conn, endpoint, made, retire_at, served, unread } = backend;
        let kept = self.change(endpoint, |entry| {
            if useful && !entry.is_gone() && !entry.is_withheld() {
                return entry.pool.release(Taken { conn, made, retire_at, served, unread }, now);
            }
            entry.pool.leave();
            false
        });
        kept.unwrap_or(false)
    }

    /// In use → nothing: it was closed for cause.
    pub fn discarded(&mut self, endpoint: EndpointId) {
        self.change(endpoint, |entry| entry.pool.leave());
    }

    /// In use → opaque: it is not released before its session ends, and keeps its place till then.
    pub fn turned_opaque(&mut self, endpoint: EndpointId) {
        self.change(endpoint, |entry| {
            entry.opaque += 1;
            entry.stats().sessions_opaque.set(entry.opaque as u64);
        });
    }

    /// Opaque → nothing.
    pub fn opaque_closed(&mut self, endpoint: EndpointId) {
        self.change(endpoint, |entry| {
            entry.opaque -= 1;
            entry.stats().sessions_opaque.set(entry.opaque as u64);
            entry.pool.leave();
        });
    }

    /// Idle → nothing: the one that has been idle for longest.
    pub fn evict(&mut self, endpoint: EndpointId) -> Option<ConnId> {
        self.change(endpoint, |entry| entry.pool.evict()).flatten()
    }

    /// Idle → nothing: one that was made before this moment.
    pub fn evict_made_before(&mut self, endpoint: EndpointId, at: Instant) -> Option<ConnId> {
        self.change(endpoint, |entry| entry.pool.evict_made_before(at)).flatten()
    }

    /// Idle → nothing: one that is too old, or has been idle for too long, and which of both.
    pub fn expire(&mut self, endpoint: EndpointId, now: Instant) -> Option<(ConnId, Discard)> {
        self.change(endpoint, |entry| entry.pool.expire(now)).flatten()
    }

    /// Idle → nothing: it is not to be kept after all.
    pub fn remove(&mut self, endpoint: EndpointId, conn: ConnId) {
        self.change(endpoint, |entry| entry.pool.remove(conn));
    }

    /// Idle → nothing: it ended or broke. Says whether its endpoint has failed with that.
    pub fn died(
        &mut self,
        endpoint: EndpointId,
        conn: ConnId,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> bool {
        self.change(endpoint, |entry| entry.pool.on_died(conn, now, rng)).unwrap_or(false)
    }

    /// The sums are those of the parts.
    ///
    /// # Panics
    /// They are not.
    pub fn assert_invariants(&self) {
        let mut totals = Totals::default();
        for entry in self.entries.iter().flatten() {
            let (counts, own) = (entry.pool.counts(), Totals::of(entry));
            assert!(entry.opaque <= counts.in_use && (entry.pool.reuses() || entry.opaque == 0));
            totals.pooled += own.pooled;
            totals.acquired += own.acquired;
            let stats = entry.stats();
            let gauges = [&stats.sessions_active, &stats.pool_idle, &stats.pool_connecting];
            let are = [counts.in_use, counts.idle, counts.connecting];
            assert_eq!(gauges.map(|gauge| gauge.get() as usize), are, "{}", entry.endpoint.name);
        }
        assert_eq!(self.totals, totals, "the connections of all endpoints");
    }
}
