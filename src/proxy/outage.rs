//! While no endpoint is usable, clients wait: in order of arrival, and served little by little as
//! endpoints return.
//!
//! ```text
//! client ──no endpoint is usable, or all that were tried failed──▶ line ──its turn──▶ a connect
//!                                                                  ▲ │                   │
//!                                                  the connect failed └──its wait is over │
//!                                                                  └─────────────────────┘
//! ```
//!
//! The line is that of [`line`](super::line), in which sessions also wait for places.
//!
//! How many connects to an endpoint may be under way for those that wait is what its [`Recovery`]
//! knows: one tries the way, and each that succeeds makes room for two. After a failure none is made
//! for a while.

use std::time::{Duration, Instant};

use super::backoff::Backoff;
use crate::limits::WAITING_CONNECTS_MAX;

/// An endpoint that has not failed for so long starts again with the shortest backoff, though no
/// byte came from it: some never send any.
const FORGIVEN_AFTER: Duration = Duration::from_secs(10);

/// What clients of one worker feel of outages: from the first that finds no usable endpoint to when
/// there is one and nobody waits any more.
#[derive(Debug, Default)]
pub struct Outage {
    since: Option<Instant>,
    /// How long those have lasted that are over.
    before: Duration,
}

impl Outage {
    /// A client has found no usable endpoint. Says whether it is the first one.
    pub fn on_felt(&mut self, now: Instant) -> bool {
        let first = self.since.is_none();
        self.since.get_or_insert(now);
        first
    }

    /// Whether an outage is going on.
    pub fn is_on(&self) -> bool {
        self.since.is_some()
    }

    /// An endpoint is usable, and nobody waits.
    pub fn on_over(&mut self, now: Instant) {
        self.before = self.total(now);
        self.since = None;
    }

    /// How long all outages together have lasted.
    pub fn total(&self, now: Instant) -> Duration {
        let current = self.since.map(|since| now.saturating_duration_since(since));
        self.before + current.unwrap_or_default()
    }
}

/// How an endpoint takes connects, as far as those that wait are concerned.
#[derive(Debug)]
pub struct Recovery {
    backoff: Backoff,
    failed_at: Option<Instant>,
    /// Its latest connect has failed.
    is_unreachable: bool,
    /// Sessions' connects under way.
    connecting: u32,
    /// So many may be, for those that wait.
    connecting_max: u32,
}

impl Default for Recovery {
    fn default() -> Self {
        let backoff = Backoff::default();
        Self { backoff, failed_at: None, is_unreachable: false, connecting: 0, connecting_max: 1 }
    }
}

impl Recovery {
    /// Whether a connect has failed just now, so that none is made for a while.
    pub(super) fn backs_off(&self, now: Instant) -> bool {
        self.backoff.is_on(now)
    }

    /// Whether the latest connect has failed, however long ago.
    pub(super) fn is_unreachable(&self) -> bool {
        self.is_unreachable
    }

    /// Whether one more connect may be made for a session that waits.
    pub(super) fn has_room(&self, now: Instant) -> bool {
        !self.backs_off(now) && self.connecting < self.connecting_max
    }

    /// A session's connect was started.
    pub fn on_connecting(&mut self) {
        self.connecting += 1;
    }

    /// A session's connect has ended so or so, or nobody waits for it any more.
    pub fn on_connect_over(&mut self) {
        assert!(self.connecting > 0, "a connect ends once");
        self.connecting -= 1;
    }

    /// A connect has succeeded.
    pub fn on_connected(&mut self) {
        self.backoff.end();
        self.is_unreachable = false;
        self.connecting_max = (self.connecting_max + 1).min(WAITING_CONNECTS_MAX);
    }

    /// A connect has failed, or what was connected ended at once.
    pub fn on_failed(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        let forgiven = |at| now.saturating_duration_since(at) >= FORGIVEN_AFTER;
        if self.failed_at.is_some_and(forgiven) {
            self.backoff.forget();
        }
        self.failed_at = Some(now);
        self.connecting_max = 1;
        self.backoff.on_failed(now, rng);
    }

    /// A connect has failed, which is reported as a failure as well.
    pub fn on_unreachable(&mut self) {
        self.is_unreachable = true;
    }

    /// A byte has come from the endpoint on a connection made since it failed.
    pub fn on_well(&mut self) {
        self.backoff.forget();
    }

    /// Sessions' connects under way.
    #[cfg(test)]
    pub fn connecting(&self) -> usize {
        self.connecting as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn outages_last_from_the_first_client_to_the_end_and_add_up() {
        let (mut outage, start) = (Outage::default(), Instant::now());
        assert!(outage.on_felt(start) && !outage.on_felt(start + MS));
        assert_eq!(outage.total(start + 5 * MS), 5 * MS);
        outage.on_over(start + 10 * MS);
        assert!(!outage.is_on() && outage.total(start + 20 * MS) == 10 * MS);
        assert!(outage.on_felt(start + 30 * MS));
        assert_eq!(outage.total(start + 31 * MS), 11 * MS);
    }

    #[test]
    fn connects_grow_with_success_to_a_limit_and_start_again_after_a_failure() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut now = Instant::now();
        let mut recovery = Recovery::default();
        let fill = |recovery: &mut Recovery, now| {
            let mut started = 0;
            while recovery.has_room(now) {
                recovery.on_connecting();
                started += 1;
            }
            started
        };
        for (round, expected) in [1, 2, 4, 8, 16, 32, 32].into_iter().enumerate() {
            let started = fill(&mut recovery, now);
            assert_eq!(started, expected, "round {round}");
            for _ in 0..started {
                recovery.on_connect_over();
                recovery.on_connected();
            }
        }
        recovery.on_connecting();
        recovery.on_connect_over();
        recovery.on_failed(now, &mut rng);
        assert_eq!(fill(&mut recovery, now), 0, "it has just failed");
        now += 100 * MS;
        assert_eq!(fill(&mut recovery, now), 1, "one tries the way");
        recovery.on_connect_over();
        recovery.on_failed(now, &mut rng);
        assert!(!recovery.has_room(now + 49 * MS), "longer than before");
        now += FORGIVEN_AFTER;
        recovery.on_failed(now, &mut rng);
        assert!(recovery.has_room(now + 75 * MS), "it was long ago");
    }
}
