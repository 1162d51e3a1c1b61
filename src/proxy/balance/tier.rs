//! Which tier of endpoints is in use: the lowest that has a usable endpoint, and back again only after a
//! while, so that sessions do not follow each up and down of an endpoint that flaps.
//!
//! ```text
//! in use: t ──none of t is usable──▶ the lowest tier that has a usable endpoint, at once
//!    ▲  │                            (where no tier has one: all of them, until one has)
//!    │  └──a lower tier has been usable for the failback time──▶ that one
//!    └──else
//! ```
//!
//! An endpoint that joins a lower tier than the one in use is in doubt until a probe has shown that it
//! takes connections: no client is to leave who serves for who may refuse.

use std::time::{Duration, Instant};

use super::{Entry, Table};
use crate::proxy::endpoints::{EndpointId, Tier};

/// What a worker knows of its tiers.
#[derive(Debug, Default)]
pub(super) struct Tiers {
    /// False while all endpoints are of the first tier and it is in use: there is nothing to choose.
    are_several: bool,
    /// The one in use, or the last that was.
    latest: Tier,
    /// No tier has a usable endpoint: all are looked at.
    is_outage: bool,
    /// Since when each tier has a usable endpoint without a break.
    usable_since: [Option<Instant>; Tier::COUNT_MAX],
    /// For how long that has to be so before one that was left is used again.
    failback_time: Duration,
    /// Which one was in use when it was last asked.
    reported: Tier,
}

impl Tiers {
    /// Decides anew, given which tiers have a usable endpoint. Says whether anything is different.
    fn judge(&mut self, usable: [bool; Tier::COUNT_MAX], now: Instant) -> bool {
        for (since, is_usable) in self.usable_since.iter_mut().zip(usable) {
            *since = is_usable.then(|| since.unwrap_or(now));
        }
        let before = (self.latest, self.is_outage);
        let back = |since: &Option<Instant>| {
            since.is_some_and(|at| now.saturating_duration_since(at) >= self.failback_time)
        };
        let lowest = if usable[usize::from(self.latest)] {
            let lower = &self.usable_since[..self.latest.into()];
            Some(lower.iter().position(back).map_or(self.latest, Tier::at))
        } else {
            usable.iter().position(|&is_usable| is_usable).map(Tier::at)
        };
        self.is_outage = lowest.is_none();
        self.latest = lowest.unwrap_or(self.latest);
        before != (self.latest, self.is_outage)
    }

    /// Whether endpoints of a tier get nothing new.
    fn is_spare(&self, tier: Tier) -> bool {
        !self.is_outage && tier != self.latest
    }
}

impl Table {
    /// The same, which uses a tier that was left again only after it has been usable for this time.
    #[must_use]
    pub fn failing_back_after(mut self, failback_time: Duration) -> Self {
        self.tiers.failback_time = failback_time;
        self
    }

    /// The tier in use, or the last that was, while there is no usable endpoint.
    pub fn tier(&self) -> Tier {
        self.tiers.latest
    }

    /// Another snapshot is in force.
    pub(super) fn on_tiers_known(&mut self, now: Instant) {
        let are_first = self.in_set().all(|entry| entry.tier == Tier::FIRST);
        self.doubt_newcomers(now);
        // Where there is one tier only, too: the one that was in use may be gone.
        self.decide_tiers(now);
        self.tiers.are_several = !are_first || self.tiers.latest != Tier::FIRST;
        self.mark_spare();
    }

    /// Those that the latest snapshot names.
    pub(super) fn in_set(&self) -> impl Iterator<Item = &Entry> {
        self.present.iter().filter_map(|&index| self.get(index))
    }

    /// Has those probed first that have just joined a lower tier than the one in use.
    fn doubt_newcomers(&mut self, now: Instant) {
        let latest = self.tiers.latest;
        if !self.in_set().any(|entry| entry.tier == latest && entry.holds_tier()) {
            return;
        }
        for &index in &self.present {
            let Some(entry) = &mut self.entries[usize::from(index)] else { continue };
            if entry.tier < latest && entry.joined_at == Some(now) {
                entry.health.doubt(now);
            }
        }
    }

    /// Looks at which tier is to be used.
    pub fn judge_tiers(&mut self, now: Instant) {
        if self.tiers.are_several && self.decide_tiers(now) {
            self.mark_spare();
        }
    }

    fn decide_tiers(&mut self, now: Instant) -> bool {
        let mut usable = [false; Tier::COUNT_MAX];
        for entry in self.in_set() {
            usable[usize::from(entry.tier)] |= entry.holds_tier();
        }
        self.tiers.judge(usable, now)
    }

    fn mark_spare(&mut self) {
        for &index in &self.present {
            let Some(entry) = &mut self.entries[usize::from(index)] else { continue };
            entry.is_spare = self.tiers.is_spare(entry.tier);
        }
    }

    /// The tier in use, if that is another one than when this was last asked.
    pub fn take_moved(&mut self) -> Option<Tier> {
        let (from, to) = (self.tiers.reported, self.tiers.latest);
        self.tiers.reported = to;
        (from != to).then_some(to)
    }

    /// Whether an endpoint is not ejected, while its latest connect has failed and no client tries it any
    /// more: only a probe can tell whether it is well again.
    pub fn is_left(&self, index: EndpointId) -> bool {
        self.get(index).is_some_and(|entry| {
            entry.present && entry.is_spare && entry.health.is_usable() && !entry.holds_tier()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACK: Duration = Duration::from_secs(10);

    /// Which tier is in use, if any is, after each of these: at which second, and which tiers are usable.
    fn in_use(steps: &[(u64, [u8; 3])]) -> Vec<Option<usize>> {
        let start = Instant::now();
        let mut tiers = Tiers { failback_time: BACK, ..Tiers::default() };
        let after = |&(second, usable): &(u64, [u8; 3])| {
            tiers.judge(usable.map(|one| one == 1), start + Duration::from_secs(second));
            (!tiers.is_outage).then(|| tiers.latest.into())
        };
        steps.iter().map(after).collect()
    }

    #[test]
    fn the_lowest_usable_tier_is_used_at_once_and_a_lower_one_again_after_a_while() {
        for (what, steps, expected) in [
            (
                "the first one while it can be",
                &[(0, [1, 1, 1]), (100, [1, 0, 0])][..],
                &[Some(0), Some(0)][..],
            ),
            ("the next usable one", &[(0, [0, 0, 1]), (1, [0, 1, 1])], &[Some(2), Some(2)]),
            (
                "back after the failback time",
                &[(0, [1, 1, 0]), (1, [0, 1, 0]), (2, [1, 1, 0]), (11, [1, 1, 0]), (12, [1, 1, 0])],
                &[Some(0), Some(1), Some(1), Some(1), Some(0)],
            ),
            (
                "counted anew after each break",
                &[
                    (0, [0, 1, 0]),
                    (1, [1, 1, 0]),
                    (10, [0, 1, 0]),
                    (11, [1, 1, 0]),
                    (20, [1, 1, 0]),
                ],
                &[Some(1); 5],
            ),
            (
                "at once where the one in use is lost",
                &[(0, [0, 1, 0]), (1, [1, 1, 0]), (2, [1, 0, 0])],
                &[Some(1), Some(1), Some(0)],
            ),
            (
                "the lowest of those that have been usable for long enough",
                &[(0, [0, 0, 1]), (1, [0, 1, 1]), (5, [1, 1, 1]), (11, [1, 1, 1]), (15, [1, 1, 1])],
                &[Some(2), Some(2), Some(2), Some(1), Some(0)],
            ),
            (
                "none and then the first to return, whichever that is",
                &[(0, [1, 1, 0]), (1, [0, 0, 0]), (2, [0, 1, 0]), (3, [0, 0, 0]), (4, [1, 1, 0])],
                // The one that was in use last goes on where it returns with others.
                &[Some(0), None, Some(1), None, Some(1)],
            ),
        ] {
            assert_eq!(in_use(steps), expected, "{what}");
        }
    }

    #[test]
    fn without_a_failback_time_the_lowest_usable_one_is_in_use() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut tiers = Tiers::default();
        let mut now = Instant::now();
        for _ in 0..1000 {
            now += Duration::from_millis(rng.u64(..100));
            let usable = [(); 3].map(|()| rng.bool());
            tiers.judge(usable, now);
            let lowest = usable.iter().position(|&usable| usable).map(Tier::at);
            assert_eq!(tiers.is_outage, lowest.is_none());
            assert!(lowest.is_none_or(|lowest| lowest == tiers.latest), "{tiers:?}");
            for tier in (0..Tier::COUNT_MAX).map(Tier::at) {
                assert_eq!(tiers.is_spare(tier), lowest.is_some_and(|lowest| lowest != tier));
            }
        }
    }
}
