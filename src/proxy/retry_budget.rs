//! How many retries there may be, so that those who try again do not keep a backend down that has too
//! much to do already.
//!
//! A token bucket as in Finagle (`RetryBudget.scala`) and linkerd: each request earns a part of a
//! retry, and what was earned is lost after a while, so that a quiet day saves nothing up for a bad
//! minute. A reserve lets the first retries happen where there are few requests. Each worker earns its own
//! retries, so that together they are the same part of all requests; the reserve is one for all workers, or
//! there would be as many times more of it as there are cores.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// What was earned is kept for one to two of these: long enough that a backend of several may fall
/// silent for a connect's time limit at full load, too short to outlast an outage.
const WINDOW: Duration = Duration::from_secs(10);

/// Retries per second that need no requests, as in Finagle and linkerd.
const RESERVE_PER_SECOND: u64 = 10;

/// What a retry costs. A request earns the budget's percents of it.
const COST: u64 = 100;
const RESERVE: u64 = RESERVE_PER_SECOND * WINDOW.as_secs();

/// The retries of a route that need no requests, which its workers share without a lock.
#[derive(Debug)]
pub struct Reserve {
    since: Instant,
    /// The number of the present window, above [`Reserve::TAKEN_BITS`] bits of how many were taken in it.
    state: AtomicU64,
}

impl Reserve {
    /// More than [`RESERVE`] needs.
    const TAKEN_BITS: u32 = 16;

    /// A full one.
    pub fn new(now: Instant) -> Self {
        Self { since: now, state: AtomicU64::new(0) }
    }

    /// Takes a retry. Says whether there was one left.
    fn take(&self, now: Instant) -> bool {
        let present = now.saturating_duration_since(self.since).as_secs() / WINDOW.as_secs();
        let with_one_more = |state: u64| {
            // Another worker's turn may have begun later, in the next window.
            let window = present.max(state >> Self::TAKEN_BITS);
            let state = state.max(window << Self::TAKEN_BITS);
            let taken = state & ((1 << Self::TAKEN_BITS) - 1);
            (taken < RESERVE).then_some(state + 1)
        };
        self.state.fetch_update(Relaxed, Relaxed, with_one_more).is_ok()
    }
}

/// The retries that a worker may make.
#[derive(Debug)]
pub struct RetryBudget {
    percent: Option<u32>,
    reserve: Arc<Reserve>,
    /// When the present window began.
    since: Instant,
    /// What is left of what was earned in it, in parts of [`COST`].
    left: u64,
    /// What is left of the one before.
    left_before: u64,
}

impl RetryBudget {
    /// A budget of so many retries per 100 requests; without, there is no limit.
    pub fn new(percent: Option<u32>, reserve: Arc<Reserve>, now: Instant) -> Self {
        Self { percent, reserve, since: now, left: 0, left_before: 0 }
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
            return self.reserve.take(now);
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
        (self.since, self.left) = (now, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(percent: u32, now: Instant) -> RetryBudget {
        RetryBudget::new(Some(percent), Arc::new(Reserve::new(now)), now)
    }

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
            let mut budget = budget(percent, now);
            (0..requests).for_each(|_| budget.on_request(now));
            assert_eq!(taken(&mut budget, now), expected, "{percent} % of {requests}");
        }
    }

    #[test]
    fn without_a_budget_all_can() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(None, Arc::new(Reserve::new(now)), now);
        assert_eq!(taken(&mut budget, now), 100_000);
    }

    #[test]
    fn workers_earn_for_themselves_and_share_the_reserve() {
        let begun = Instant::now();
        let reserve = Arc::new(Reserve::new(begun));
        let worker = |_| RetryBudget::new(Some(20), Arc::clone(&reserve), begun);
        let mut workers: Vec<_> = (0..32).map(worker).collect();
        for second in [0, 10, 25] {
            let now = begun + Duration::from_secs(second);
            for worker in &mut workers {
                (0..10).for_each(|_| worker.on_request(now));
            }
            let all: u32 = workers.iter_mut().map(|one| taken(one, now)).sum();
            assert_eq!(all, 32 * 2 + 100, "after {second} s");
        }
        let before = begun + Duration::from_secs(19);
        assert!(!reserve.take(before), "whose turn began earlier has none of the window before");
    }

    #[test]
    fn the_reserve_is_never_given_twice() {
        let now = Instant::now();
        let reserve = Arc::new(Reserve::new(now));
        let taken: u32 = std::thread::scope(|scope| {
            let worker = || taken(&mut RetryBudget::new(Some(20), Arc::clone(&reserve), now), now);
            let workers: Vec<_> = (0..8).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().map(|one| one.join().unwrap()).sum()
        });
        assert_eq!(u64::from(taken), RESERVE);
    }

    #[test]
    fn what_was_earned_is_kept_for_one_to_two_windows() {
        let begun = Instant::now();
        for (seconds, expected) in
            [(0, 300), (9, 300), (10, 300), (19, 300), (20, 100), (3600, 100)]
        {
            let mut budget = budget(20, begun);
            (0..1000).for_each(|_| budget.on_request(begun));
            let now = begun + Duration::from_secs(seconds);
            assert_eq!(taken(&mut budget, now), expected, "after {seconds} s");
        }
    }

    #[test]
    fn the_reserve_is_ten_per_second_over_time() {
        let begun = Instant::now();
        let mut budget = budget(20, begun);
        let all: u32 = (0..600).map(|s| taken(&mut budget, begun + Duration::from_secs(s))).sum();
        assert_eq!(all, 6000, "in 600 s");
    }

    #[test]
    fn a_sustained_outage_multiplies_the_load_by_no_more_than_the_budget() {
        let begun = Instant::now();
        let mut budget = budget(20, begun);
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
