//! What all parts of a worker share, and no rule of any of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::mailbox::Command;
use super::owners::Owners;
use super::places::Places;
use super::timers::Timers;
use crate::config::RouteConfig;
use crate::io::Driver;
use crate::limits;
use crate::metrics::WorkerStats;
use crate::proxy::WorkerId;

/// The driver, the clock, the counters, randomness, and whose each connection is.
pub(super) struct Context<D> {
    pub(super) worker: WorkerId,
    pub(super) driver: D,
    pub(super) config: Arc<RouteConfig>,
    pub(super) stats: Arc<WorkerStats>,
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

    /// Publishes how many places are taken.
    pub(super) fn publish_sessions(&self) {
        self.stats.sessions_active.set(self.places.taken() as u64);
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
        let in_use = self.driver.buffers_lent();
        let buffers = self.driver.buffers();
        stats.buffers_in_use.set(u64::from(buffers.capacity() - buffers.free() - in_use));
    }
}
