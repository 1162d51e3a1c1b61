//! Waits between tries of what has failed: each longer than the one before, up to a limit, and never
//! the same for two that fail together.

use std::time::{Duration, Instant};

/// The wait after a failure doubles from here…
pub(super) const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// …to here, and is between half of that and half as much again.
pub(super) const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// How long what has failed is left alone.
#[derive(Debug, Clone, Default)]
pub(super) struct Backoff {
    /// In a row.
    failures: u32,
    retry_at: Option<Instant>,
}

impl Backoff {
    /// It has failed. Says whether that counts: of several failures at a time the first one does.
    pub(super) fn on_failed(&mut self, now: Instant, rng: &mut fastrand::Rng) -> bool {
        if self.is_on(now) {
            return false;
        }
        let wait = BACKOFF_MIN.saturating_mul(1 << self.failures.min(10)).min(BACKOFF_MAX);
        self.failures += 1;
        self.retry_at = Some(now + wait.mul_f64(0.5 + rng.f64()));
        true
    }

    /// It is well: the next failure is the first one.
    pub(super) fn forget(&mut self) {
        self.failures = 0;
    }

    /// It may be tried at once.
    pub(super) fn end(&mut self) {
        self.retry_at = None;
    }

    /// Whether it has failed just now.
    pub(super) fn is_on(&self, now: Instant) -> bool {
        self.retry_at.is_some_and(|at| now < at)
    }

    /// Whether it has not been well since a failure.
    pub(super) fn has_failed(&self) -> bool {
        self.failures > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_limit_and_several_failures_at_a_time_are_one() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut now = Instant::now();
        let mut backoff = Backoff::default();
        let expected = [50, 100, 200, 400, 800, 1000, 1000].map(Duration::from_millis);
        for wait in expected {
            assert!(backoff.on_failed(now, &mut rng));
            assert!(!backoff.on_failed(now, &mut rng), "at the same time");
            assert!(backoff.is_on(now + wait.mul_f64(0.49)), "{wait:?}");
            now += wait.mul_f64(1.5);
            assert!(!backoff.is_on(now), "{wait:?}");
        }
        backoff.forget();
        assert!(!backoff.has_failed());
        backoff.on_failed(now, &mut rng);
        assert!(!backoff.is_on(now + BACKOFF_MIN.mul_f64(1.5)), "the shortest again");
        backoff.on_failed(now + BACKOFF_MAX, &mut rng);
        backoff.end();
        assert!(!backoff.is_on(now + BACKOFF_MAX) && backoff.has_failed());
    }
}
