//! How much a worker has to do.

use std::time::{Duration, Instant};

use super::batch::{Batcher, Plan};
use super::contention::{CoreTime, CoreTimes};
use crate::metrics::WorkerStats;

/// A session that was shorter than this is one of many, each of which may be anybody's.
const SHORT: Duration = Duration::from_secs(1);

/// What tells how many events to wait for, and whether a difference between workers lasts.
pub(super) struct Load {
    pub(super) batcher: Batcher,
    core_times: CoreTimes,
    /// Sessions shorter than [`SHORT`] that ended within about a second.
    ended_lately: usize,
}

impl Load {
    /// None so far, on the part of a worker whose times on its core are these.
    pub(super) fn new(now: Instant, core_times: CoreTimes) -> Self {
        let batcher = Batcher::new(now, core_times.total().waited);
        Self { batcher, core_times, ended_lately: 0 }
    }

    /// What to wait for.
    pub(super) fn plan(&mut self, stats: &WorkerStats, now: Instant) -> Plan {
        if self.batcher.window_is_over(now) {
            let CoreTime { ran, waited } = self.core_times.total();
            stats.core_wait.set(waited);
            stats.cpu.set(ran);
            self.batcher.on_window(now, waited);
        }
        self.batcher.plan(now)
    }

    /// A session or a client of this age is gone.
    pub(super) fn on_gone(&mut self, age: Duration) {
        self.ended_lately += usize::from(age < SHORT);
    }

    /// To be called ten times a second.
    pub(super) fn forget_ended(&mut self) {
        self.ended_lately -= self.ended_lately.div_ceil(10);
    }

    /// Whether a worker with so many sessions has mostly short ones. Little's law: fewer are open
    /// than end in a second.
    pub(super) fn is_of_short_ones(&self, sessions: usize) -> bool {
        sessions < self.ended_lately
    }
}
