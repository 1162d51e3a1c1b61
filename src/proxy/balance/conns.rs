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
//!
//! Where connections are limited, each has one of the endpoint's [`places`](crate::proxy::places),
//! which all workers share. It is [reserved](Table::reserve) before the connection is made. What goes
//! to nothing keeps its place, until that is [closed](Table::closed) in fact.

use std::time::Instant;

use super::{Entry, Table};
use crate::io::ConnId;
use crate::metrics::Discard;
use crate::proxy::WorkerId;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::pool::{Counts, Taken};
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
        let wakes = &mut self.wakes;
        let entry = self.entries.get_mut(usize::from(endpoint))?.as_mut()?;
        let (before, counts) = (Totals::of(entry), entry.pool.counts());
        let outcome = act(entry);
        let (after, now) = (Totals::of(entry), entry.pool.counts());
        let all = |counts: Counts| counts.idle + counts.connecting + counts.in_use;
        if entry.places.max().is_some() {
            entry.closing += all(counts).saturating_sub(all(now));
            debug_assert!(entry.conns() <= entry.places.count(), "a connection without a place");
            entry.stats().connections.set(entry.conns() as u64);
        }
        while entry.idle_places.count() > entry.pooled() && after.pooled < before.pooled {
            wakes.extend(entry.idle_places.give(&entry.endpoint.idle_places));
        }
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

    /// Takes a place for one more connection. Says whether there was one; it is then to be started, or
    /// entered with.
    pub fn reserve(&mut self, endpoint: EndpointId, now: Instant) -> bool {
        let Some(entry) = self.get_mut(endpoint) else { return false };
        entry.spare() > 0 || entry.places.take(&entry.endpoint.places, now)
    }

    /// Takes one beyond all that there are, for what cannot wait until one is free. Says whether the
    /// endpoint is there.
    pub fn reserve_beyond(&mut self, endpoint: EndpointId, now: Instant) -> bool {
        let Some(entry) = self.get_mut(endpoint) else { return false };
        entry.places.take_beyond(&entry.endpoint.places, now);
        true
    }

    /// Takes one for a connection that is to be idle. Where others have all, this worker waits for its share.
    pub fn reserve_idle(&mut self, endpoint: EndpointId, now: Instant) -> bool {
        let Some(entry) = self.get_mut(endpoint) else { return false };
        let places = &entry.endpoint.idle_places;
        if entry.spare_idle() > 0 || entry.idle_places.take(places, now) {
            return true;
        }
        if entry.idle_places.has_share() && entry.idle_places.beyond_share() == 0 {
            entry.idle_places.want(places, now);
        }
        entry.spare_idle() > 0
    }

    /// Somebody waits for a connection to an endpoint of which no place is free: has one passed on to
    /// this worker, and asks a worker for it that has idle connections.
    pub fn want_place(&mut self, endpoint: EndpointId, now: Instant) {
        let own = usize::from(self.worker);
        let Some(entry) = self.get_mut(endpoint) else { return };
        let has_begun = entry.places.want(&entry.endpoint.places, now);
        if entry.spare() > 0 {
            // One has just become free: it is to be used.
            let own = self.worker;
            return self.wakes.push(own);
        }
        if !has_begun {
            return;
        }
        let workers = entry.endpoint.stats.iter().enumerate();
        let others = workers.filter(|(worker, _)| *worker != own);
        let idle = others.map(|(worker, stats)| (stats.pool_idle.get(), worker));
        let most = idle.max().filter(|(idle, _)| *idle > 0);
        self.wakes.extend(most.map(|(_, worker)| WorkerId::new(worker)));
    }

    /// The same of all endpoints that may serve who waits.
    pub fn want_places(&mut self, now: Instant) {
        let any_usable = self.any_usable();
        for at in 0..self.present.len() {
            let endpoint = self.present[at];
            let serves = |entry: &Entry| entry.may_serve(any_usable);
            if self.get(endpoint).is_some_and(|entry| serves(entry) && !entry.has_room()) {
                self.want_place(endpoint, now);
            }
        }
    }

    /// Nobody waits for a place of an endpoint any more: those that are not used go to others.
    pub fn return_spare(&mut self, endpoint: EndpointId, waits: bool) {
        let wakes = &mut self.wakes;
        let entry = self.entries.get_mut(usize::from(endpoint)).and_then(Option::as_mut);
        let Some(entry) = entry else { return };
        if !waits {
            entry.places.stop_wanting(&entry.endpoint.places);
        }
        for _ in 0..entry.spare() {
            wakes.extend(entry.places.give(&entry.endpoint.places));
        }
        for _ in 0..entry.spare_idle() {
            wakes.extend(entry.idle_places.give(&entry.endpoint.idle_places));
        }
    }

    /// Takes the places that others have passed on. Says whether there were any for connections that
    /// somebody may wait for.
    pub fn collect(&mut self, endpoint: EndpointId, now: Instant) -> bool {
        let Some(entry) = self.get_mut(endpoint) else { return false };
        entry.idle_places.collect(&entry.endpoint.idle_places, now);
        entry.places.collect(&entry.endpoint.places, now)
    }

    /// A connection of an endpoint is closed in fact: its place is free.
    pub fn closed(&mut self, endpoint: EndpointId) {
        let wakes = &mut self.wakes;
        let entry = self.entries.get_mut(usize::from(endpoint)).and_then(Option::as_mut);
        let Some(entry) = entry.filter(|entry| entry.places.max().is_some()) else { return };
        assert!(entry.closing > 0, "a connection was closed twice");
        entry.closing -= 1;
        wakes.extend(entry.places.give(&entry.endpoint.places));
        entry.stats().connections.set(entry.conns() as u64);
    }

    /// A worker that is to look after places, if any is.
    pub fn take_wake(&mut self) -> Option<WorkerId> {
        self.wakes.pop()
    }

    /// Whether there is a connection or a place for one more session.
    pub fn has_room(&self) -> bool {
        let any_usable = self.any_usable();
        let entries = self.present.iter().filter_map(|&index| self.get(index));
        // Those that are not usable serve where none is.
        let mut serving = entries.filter(|entry| entry.may_serve(any_usable));
        serving.any(|entry| entry.pool.idle() > 0 || entry.has_room())
    }

    /// Whether a session that finds no endpoint needs a place at one: there is a usable one that is full.
    pub fn is_full(&self, now: Instant) -> bool {
        let mut entries = self.present.iter().filter_map(|&index| self.get(index));
        entries.any(|entry| entry.is_full(now))
    }

    /// How many sessions that find no place need not wait for others to end: places come by themselves.
    pub fn places_coming(&self, now: Instant) -> usize {
        let full = self.in_set().filter(|entry| entry.is_full(now));
        full.map(Entry::places_coming).sum()
    }

    /// How many requests that wait for an endpoint, or for any, need not wait for others to be over.
    pub fn conns_coming(&self, endpoint: Option<EndpointId>) -> usize {
        let entries = self.present.iter().filter(|&&at| endpoint.is_none_or(|one| one == at));
        let entries = entries.filter_map(|&at| self.get(at));
        let serving = entries.filter(|entry| entry.may_serve(true));
        serving.map(Entry::conns_coming).fold(0, usize::saturating_add)
    }

    /// Whether connections to an endpoint are limited.
    pub fn is_limited(&self, endpoint: EndpointId) -> bool {
        self.get(endpoint).is_some_and(|entry| entry.places.max().is_some())
    }

    /// Nothing → connecting: a connect for the pool was started.
    pub fn start(&mut self, endpoint: EndpointId) {
        self.change(endpoint, |entry| entry.pool.on_connecting());
    }

    /// Connecting → idle, if the pool has room for it (see [`crate::proxy::pool::Pool::room`]) or
    /// somebody waits for it. Says whether that is so.
    #[must_use = "a connection that is not kept is to be closed"]
    pub fn connected(
        &mut self,
        endpoint: EndpointId,
        conn: ConnId,
        is_waited_for: bool,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> bool {
        let kept = self.change(endpoint, |entry| {
            let probes = entry.health.is_probing();
            let has_place = is_waited_for
                || entry.pooled() <= entry.idle_places.count()
                || entry.idle_places.take(&entry.endpoint.idle_places, now);
            entry.pool.on_connected(conn, has_place, probes, now, rng)
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
            let is_useful = useful && !entry.is_gone() && !entry.is_withheld();
            if is_useful && entry.idle_places.take(&entry.endpoint.idle_places, now) {
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
            if entry.places.max().is_some() {
                let held = entry.places.count();
                assert!(held >= entry.conns(), "{held} places of {}", entry.endpoint.name);
            }
            assert!(entry.idle_places.count() <= entry.pooled(), "places of idle ones");
        }
        assert_eq!(self.totals, totals, "the connections of all endpoints");
    }
}
