//! What one worker holds of an endpoint's places.

use std::time::{Duration, Instant};

use crate::proxy::WorkerId;
use crate::proxy::places::{Places, Wanted};

/// The places of one kind that one worker holds. Without a limit nothing is counted.
#[derive(Debug)]
pub(super) struct Held {
    worker: WorkerId,
    /// How many there are for all workers.
    max: Option<usize>,
    /// How many of them are for this worker, should it need them.
    share: usize,
    count: usize,
    /// It has registered that it wants one, and none has come since.
    waits: bool,
    /// Since when it has held any, for turns.
    since: Instant,
}

impl Held {
    /// None of `max`, of which `share` are for this worker.
    pub(super) fn none(worker: WorkerId, max: Option<usize>, share: usize, now: Instant) -> Self {
        Self { worker, max, share, count: 0, waits: false, since: now }
    }

    /// How many there are for all workers, if that is limited.
    pub(super) fn max(&self) -> Option<usize> {
        self.max
    }

    /// How many the worker holds.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// How many it holds beyond its share.
    pub(super) fn beyond_share(&self) -> usize {
        self.count.saturating_sub(self.share)
    }

    /// Whether it has a share, and need not wait for its turn.
    pub(super) fn has_share(&self) -> bool {
        self.share > 0
    }

    /// For how long it has held any.
    pub(super) fn held_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }

    /// Whether all are taken.
    pub(super) fn are_all_taken(&self, places: &Places) -> bool {
        self.max.is_some_and(|max| places.taken() >= max)
    }

    /// Takes one, if one is free.
    pub(super) fn take(&mut self, places: &Places, now: Instant) -> bool {
        let Some(max) = self.max else { return true };
        let taken = places.take(max);
        if taken {
            self.add(1, now);
        }
        taken
    }

    /// Takes one, be it beyond the limit.
    pub(super) fn take_beyond(&mut self, places: &Places, now: Instant) {
        if self.max.is_some() {
            places.take_beyond();
            self.add(1, now);
        }
    }

    /// Takes one, or else waits for one. Says whether it has only now begun to wait.
    pub(super) fn want(&mut self, places: &Places, now: Instant) -> bool {
        let Some(max) = self.max else { return false };
        // One of those without a share needs one, to have its turn.
        let needs = self.count < self.share.max(1);
        if places.want(self.worker, needs, max) {
            self.add(1, now);
            self.waits = false;
            return false;
        }
        !std::mem::replace(&mut self.waits, true)
    }

    /// Wants none any more.
    pub(super) fn stop_wanting(&mut self, places: &Places) {
        if std::mem::take(&mut self.waits) {
            places.stop_wanting(self.worker);
        }
    }

    /// Takes what others have passed on. Says whether that was any.
    pub(super) fn collect(&mut self, places: &Places, now: Instant) -> bool {
        if self.max.is_none() {
            return false;
        }
        let granted = places.collect(self.worker);
        if granted > 0 {
            // It may have asked again since that was passed on.
            places.stop_wanting(self.worker);
            self.waits = false;
            self.add(granted, now);
        }
        granted > 0
    }

    fn add(&mut self, count: usize, now: Instant) {
        if self.count == 0 {
            self.since = now;
        }
        self.count += count;
    }

    /// Gives one back. Returns who is to be woken.
    pub(super) fn give(&mut self, places: &Places) -> Option<WorkerId> {
        let max = self.max?;
        self.count -= 1;
        places.give(max)
    }

    /// How many others wait for one.
    pub(super) fn wanted(&self, places: &Places) -> Wanted {
        if self.max.is_none() { Wanted::default() } else { places.wanted_by_others(self.worker) }
    }

    /// Gives all back, those included that were passed on.
    pub(super) fn give_all(&mut self, places: &Places) {
        let Some(max) = self.max else { return };
        places.stop_wanting(self.worker);
        for _ in 0..self.count + places.collect(self.worker) {
            // They look again within a moment by themselves.
            let _ = places.give(max);
        }
        self.count = 0;
    }
}
