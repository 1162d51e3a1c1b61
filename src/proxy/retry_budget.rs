//! How many retries there may be, so that those who try again do not keep a backend down that has too
//! much to do already.
//!
//! A token bucket as in Finagle (`RetryBudget.scala`) and linkerd: each request earns a part of a
//! retry, and what was earned is lost after a while, so that a quiet day saves nothing up for a bad
//! minute. A reserve lets the first retries happen where there are few requests.

use std::time::{Duration, Instant};

/// What was earned is kept for one to two of these: long enough that a backend of several may fall
/// silent for a connect's time limit at full load, too short to outlast an outage.
const WINDOW: Duration = Duration::from_secs(10);

/// Retries per second that need no requests, as in Finagle and linkerd.
const RESERVE_PER_SECOND: u64 = 10;

/// What a retry costs. A request earns the budget's percents of it.
const COST: u64 = 100;
const RESERVE: u64 = COST * RESERVE_PER_SECOND * WINDOW.as_secs();

/// The retries that a worker may make.
#[derive(Debug)]
pub struct RetryBudget {
    percent: Option<u32>,
    /// When the present window began.
    since: Instant,
    /// What is left of it, in parts of [`COST`].
    left: u64,
    /// What is left of the one before.
    left_before: u64,
}

impl RetryBudget {
    /// A budget of so many retries per 100 requests; without, there is no limit.
    pub fn new(percent: Option<u32>, now: Instant) -> Self {
        Self { percent, since: now, left: RESERVE, left_before: 0 }
    }

    /// A request, or a session, is tried for the first time.
    pub fn on_request(&mut self, now: Instant) {
        if let Some(percent) = self.percent {
            self.roll_over(now);
            self.left += u64::from(percent);
        }
    }

    /// Takes a retry. Says whether there was one left.
    #[must_use = "one that was not there must not be made"]
    pub fn take(&mut self, now: Instant) -> bool {
        if self.percent.is_none() {
            return true;
        }
        self.roll_over(now);
        if self.left_before + self.left < COST {
            return false;
        }
        let of_before = self.left_before.min(COST);
        self.left_before -= of_before;
        self.left -= COST - of_before;
        true
    }

    fn roll_over(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        if passed < WINDOW {
            return;
        }
        self.left_before = if passed < 2 * WINDOW { self.left } else { 0 };
        (self.since, self.left) = (now, RESERVE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(budget: &mut RetryBudget, now: Instant) -> u32 {
        let mut taken = 0;
        while taken < 100_000 && budget.take(now) {
            taken += 1;
        }
        taken
    }

    #[test]
    fn a_fifth_of_the_requests_and_a_reserve_can_be_tried_again() {
        let now = Instant::now();
        for (percent, requests, expected) in [
            (20, 0, 100),
            (20, 4, 100),
            (20, 5, 101),
            (20, 10_000, 2100),
            (0, 10_000, 100),
            (100, 7, 107),
        ] {
            let mut budget = RetryBudget::new(Some(percent), now);
            (0..requests).for_each(|_| budget.on_request(now));
            assert_eq!(taken(&mut budget, now), expected, "{percent} % of {requests}");
        }
    }

    #[test]
    fn without_a_budget_all_can() {
        let now = Instant::now();
        assert_eq!(taken(&mut RetryBudget::new(None, now), now), 100_000);
    }

    #[test]
    fn what_was_earned_is_kept_for_one_to_two_windows() {
        let begun = Instant::now();
        for (seconds, expected) in
            [(0, 300), (9, 300), (10, 400), (19, 400), (20, 100), (3600, 100)]
        {
            let mut budget = RetryBudget::new(Some(20), begun);
            (0..1000).for_each(|_| budget.on_request(begun));
            let now = begun + Duration::from_secs(seconds);
            assert_eq!(taken(&mut budget, now), expected, "after {seconds} s");
        }
    }

    #[test]
    fn the_reserve_is_ten_per_second_over_time() {
        let begun = Instant::now();
        let mut budget = RetryBudget::new(Some(20), begun);
        let all: u32 = (0..600).map(|s| taken(&mut budget, begun + Duration::from_secs(s))).sum();
        assert_eq!(all, 6000, "in 600 s");
    }

    #[test]
    fn a_sustained_outage_multiplies_the_load_by_no_more_than_the_budget() {
        let begun = Instant::now();
        let mut budget = RetryBudget::new(Some(20), begun);
        let mut retries = 0;
        // 1,000 requests per second for a minute, all of which would be tried twice more.
        for ms in 0..60_000 {
            let now = begun + Duration::from_millis(ms);
            budget.on_request(now);
            retries += (0..2).filter(|_| budget.take(now)).count();
        }
        assert_eq!(retries, 12_000 + 600);
    }
}
