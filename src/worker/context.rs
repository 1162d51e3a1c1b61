//! What all parts of a worker share, and no rule of any of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::drain::Drain;
use super::ends::Ends;
use super::load::Load;
use super::mailbox::Command;
use super::owners::Owners;
use super::places::Places;
use super::tap::Tap;
use super::timers::Timers;
use crate::io::Driver;
use crate::limits;
use crate::metrics::WorkerStats;
use crate::proxy::{RouteId, WorkerId};

/// The driver, the clock, the counters, randomness, and whose each connection is.
pub(super) struct Context<D> {
    pub(super) worker: WorkerId,
    /// What ends a connection, sends on it or joins it is called on the context, so that the tap sees it.
    pub(super) driver: D,
    pub(super) stats: Arc<WorkerStats>,
    /// Where it tells of those that have ended.
    pub(super) ends: Arc<Ends>,
    pub(super) timers: Timers,
    pub(super) rng: fastrand::Rng,
    /// The time of this turn.
    pub(super) now: Instant,
    /// When the process started.
    pub(super) started: Instant,
    /// Whose each connection is.
    pub(super) owners: Owners,
    /// The command in force.
    pub(super) command: Command,
    /// The room for sessions and clients.
    pub(super) places: Places,
    /// How much there is to do.
    pub(super) load: Load,
    /// How far a drain has come.
    pub(super) drain: Drain,
    /// Workers that are to look after places for connections, once this turn is over.
    pub(super) calls: Vec<WorkerId>,
    /// The client that is captured, if one is.
    pub(super) tap: Tap,
}

impl<D: Driver> Context<D> {
    /// For how long the process has run.
    pub(super) fn alive(&self) -> Duration {
        self.now.saturating_duration_since(self.started)
    }

    /// Bytes that one direction of a session may have in flight now.
    pub(super) fn in_flight_limit(&mut self) -> u32 {
        limits::in_flight_max(self.driver.buffers().spare())
    }

    /// Whether buffers are short.
    pub(super) fn is_short_of_buffers(&mut self) -> bool {
        limits::buffers_are_short(self.driver.buffers().spare())
    }

    /// Whether there is a route that has heard of its endpoints.
    pub(super) fn serves(&self) -> bool {
        (0..self.stats.routes.len()).any(|at| self.has_begun(RouteId::at(at)))
    }

    /// Whether a route has heard of its endpoints.
    pub(super) fn has_begun(&self, route: RouteId) -> bool {
        self.stats.routes[usize::from(route)].applied_generation.get() > 0
    }

    /// A session or a client of a route is gone, which was open for so long.
    pub(super) fn on_gone(&mut self, route: RouteId, age: Duration) {
        self.load.on_gone(age);
        self.drain.on_gone(route, age, self.now);
        self.publish_before_drain(route);
        self.places.on_gone(route);
        self.publish_sessions(route);
    }

    /// Clients are let leave from now on.
    pub(super) fn begin_drain(&mut self) {
        self.drain.begin(|route| self.places.served_of(route), self.now);
        (0..self.stats.routes.len()).for_each(|at| self.publish_before_drain(RouteId::at(at)));
    }

    fn publish_before_drain(&self, route: RouteId) {
        let before = self.drain.before(route) as u64;
        self.stats.routes[usize::from(route)].sessions_before_drain.set(before);
    }

    /// Publishes how many places are taken.
    pub(super) fn publish_sessions(&self, route: RouteId) {
        self.stats.sessions.set(self.places.taken() as u64);
        let of_route = self.places.taken_by(route);
        self.stats.routes[usize::from(route)].sessions_active.set(of_route as u64);
    }

    /// Publishes what a turn came to that handled so many events.
    pub(super) fn publish(&mut self, events: u64) {
        let alive = self.alive();
        let stats = &self.stats;
        stats.turns.add(1);
        stats.completions.add(events);
        stats.heartbeat_ms.set(alive.as_millis() as u64);
        stats.buffer_waits.add(self.driver.buffer_waits() - stats.buffer_waits.get());
        let failures = self.driver.splice_failures() - stats.splice_failures.get();
        stats.splice_failures.add(failures);
        stats.strays.add(self.driver.strays() - stats.strays.get());
        let in_use = self.driver.buffers_provided();
        let buffers = self.driver.buffers();
        stats.buffers_in_use.set(u64::from(buffers.capacity() - buffers.free() - in_use));
    }
}
