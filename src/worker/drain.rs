//! How far a drain has come.

use std::time::{Duration, Instant};

/// Since when a worker lets clients leave, and how many are left of those that were there then.
#[derive(Debug, Default)]
pub(super) struct Drain {
    since: Option<Instant>,
    before: usize,
}

impl Drain {
    /// The worker lets clients leave from now on; so many are there.
    pub(super) fn begin(&mut self, served: usize, now: Instant) {
        assert!(self.since.is_none(), "commands only move forward");
        self.since = Some(now);
        self.before = served;
    }

    /// When that began.
    pub(super) fn since(&self) -> Option<Instant> {
        self.since
    }

    /// A session or a client of this age is gone.
    pub(super) fn on_gone(&mut self, age: Duration, now: Instant) {
        if self.since.is_some_and(|since| age > now.saturating_duration_since(since)) {
            self.before = self.before.saturating_sub(1);
        }
    }

    /// How many are left that were there when it began.
    pub(super) fn before(&self) -> usize {
        self.before
    }
}
