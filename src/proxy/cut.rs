//! How fast what is on an endpoint that left is cut.

use std::time::Instant;

use crate::limits::{CUT_TIME, UPKEEP_INTERVAL};

/// One of the looks at what is to be cut. They come [`UPKEEP_INTERVAL`] apart, and each cuts its part:
/// every session has the same chance at each of them, whichever worker or process it is in, so that
/// a fleet of proxies with one session each spreads as one proxy with all of them does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Looks to come, this one included.
    looks: u32,
}

impl Cut {
    /// The look at `now` at what is to be cut from `since` on.
    pub fn at(since: Instant, now: Instant) -> Self {
        let left = CUT_TIME.saturating_sub(now.saturating_duration_since(since));
        let more = left.as_nanos().div_ceil(UPKEEP_INTERVAL.as_nanos());
        Self { looks: 1 + more as u32 }
    }

    /// Whether one of those that are left is cut now.
    pub fn takes(self, rng: &mut fastrand::Rng) -> bool {
        rng.u32(..self.looks) == 0
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// How many each look takes of so many.
    fn cut(mut left: u32, every: Duration) -> Vec<u32> {
        let (since, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
        let mut at = Duration::ZERO;
        let mut taken = Vec::new();
        while left > 0 {
            let cut = Cut::at(since, since + at);
            taken.push((0..left).filter(|_| cut.takes(&mut rng)).count() as u32);
            left -= taken.last().unwrap();
            at += every;
        }
        taken
    }

    #[test]
    fn sessions_are_cut_evenly_over_a_second() {
        let taken = cut(11_000, UPKEEP_INTERVAL);
        assert_eq!(taken.len(), 11, "from 0 to 1 s, every 100 ms: {taken:?}");
        assert!(taken.iter().all(|n| (900..1100).contains(n)), "{taken:?}");
    }

    #[test]
    fn looks_that_come_late_take_more() {
        let taken = cut(1000, 3 * UPKEEP_INTERVAL);
        assert_eq!(taken.len(), 5, "at 0, 300, 600, 900 and 1200 ms: {taken:?}");
        assert_eq!(cut(1000, 20 * UPKEEP_INTERVAL).len(), 2);
    }

    #[test]
    fn single_sessions_of_many_proxies_are_not_cut_at_the_same_moment() {
        let since = Instant::now();
        let first = Cut::at(since, since);
        let taken = (0..1100).filter(|&seed| first.takes(&mut fastrand::Rng::with_seed(seed)));
        let taken = taken.count();
        assert!((50..150).contains(&taken), "{taken} of 1100 at the first look");
    }
}
