//! Ejection and re-admission of one endpoint.
//!
//! ```text
//! Usable ──failures in a row──▶ Ejected ──time is up──▶ Probing ──probe failed──▶ Ejected, longer
//!   ▲  └───nobody knows yet──────▶│                        │
//!   └────────────a byte from it───┴─or the probe lasts─────┘
//! ```
//!
//! A connect that succeeds proves little: what accepts only to close again is no better than what
//! refuses. So failures are forgotten when a byte comes from the endpoint on a connection, or where
//! it never sends any, when a session has lasted. And whoever ends a session at once, and has not
//! sent a byte on it, has failed, unless the client was the first to end.

use std::time::{Duration, Instant};

/// Ejections double up to here, or stay at `AEGIS_EJECT_TIME` if that is longer.
const EJECT_TIME_MAX: Duration = Duration::from_secs(30);
/// An endpoint that has been usable for so long starts again with the shortest ejection.
const FORGIVEN_AFTER: Duration = Duration::from_secs(60);

/// A probe that could not even be started is tried again after this.
const PROBE_RETRY: Duration = Duration::from_secs(1);

/// A probe that stays open for so long re-admits the endpoint, on trial.
pub const PROBE_SETTLED: Duration = Duration::from_millis(100);

/// An endpoint that ends a connection so soon, and has sent nothing on it, has failed. Above what
/// those take that accept for others (load balancers) to find that there is nobody behind them.
pub const AT_ONCE: Duration = Duration::from_secs(1);

/// For so long failures weigh in what counts as the load of an endpoint.
const WEIGHS_FOR: Duration = Duration::from_secs(10);

/// When an endpoint is ejected, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct HealthConfig {
    /// Consecutive failures that eject it.
    pub eject_failures: u32,
    /// The first ejection's length.
    pub eject_time: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Usable { since: Option<Instant> },
    Ejected { until: Instant },
    Probing,
}

/// What is known of an endpoint's health by one worker.
#[derive(Debug)]
pub struct Health {
    state: State,
    failures: u32,
    /// How many of them were there lately.
    weight: u32,
    failed_at: Option<Instant>,
    ejections: u32,
    fails_check: bool,
}

impl Default for Health {
    fn default() -> Self {
        let state = State::Usable { since: None };
        Self { state, failures: 0, weight: 0, failed_at: None, ejections: 0, fails_check: false }
    }
}

impl Health {
    /// Whether sessions may be sent there.
    pub fn is_usable(&self) -> bool {
        self.is_admitted() && !self.fails_check
    }

    /// Whether it is not ejected.
    fn is_admitted(&self) -> bool {
        matches!(self.state, State::Usable { .. })
    }

    /// Whether its active checks, which the control thread makes, fail.
    pub fn fails_check(&self) -> bool {
        self.fails_check
    }

    /// Its active checks fail from now on, or pass.
    pub fn set_fails_check(&mut self, fails: bool) {
        self.fails_check = fails;
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Failures since the last success that are recent.
    pub fn weight(&self) -> u32 {
        self.weight
    }

    /// Whether it is not ejected and no failure is held against it.
    pub fn is_sound(&self) -> bool {
        self.is_admitted() && self.failures == 0 && self.weight == 0
    }

    /// A byte came from it on a connection made at `made`. Says whether that re-admits the endpoint.
    pub fn on_success(&mut self, made: Instant, now: Instant) -> bool {
        // What was made before says nothing of connections made now.
        if self.failed_at.is_some_and(|at| made < at) {
            return false;
        }
        let readmitted = !self.is_admitted();
        if readmitted {
            self.state = State::Usable { since: Some(now) };
        }
        self.failures = 0;
        self.weight = 0;
        readmitted
    }

    /// A session without a byte from it has lasted.
    pub fn on_lasted(&mut self) {
        if self.is_admitted() {
            self.failures = 0;
            self.weight = 0;
        }
    }

    /// A probe has stayed open for a while. Says whether that re-admits the endpoint: on trial, so
    /// that the next failure ejects it again.
    pub fn on_settled(&mut self, config: &HealthConfig, now: Instant) -> bool {
        let readmitted = self.is_probing();
        if readmitted {
            self.state = State::Usable { since: Some(now) };
            self.failures = config.eject_failures.saturating_sub(1);
        }
        readmitted
    }

    /// Failures that are long past no longer weigh.
    pub fn forgive(&mut self, now: Instant) {
        if self.failed_at.is_some_and(|at| now.saturating_duration_since(at) >= WEIGHS_FOR) {
            self.weight = 0;
        }
    }

    /// Whether a probe decides what becomes of it.
    pub fn is_probing(&self) -> bool {
        self.state == State::Probing
    }

    /// A connect failed, or what was connected ended at once. Says whether that ejects the endpoint.
    pub fn on_failure(
        &mut self,
        config: &HealthConfig,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> bool {
        self.failures = self.failures.saturating_add(1);
        self.weight = self.weight.saturating_add(1);
        self.failed_at = Some(now);
        match self.state {
            State::Usable { since } => {
                if self.failures < config.eject_failures {
                    return false;
                }
                if since.is_none_or(|since| now.duration_since(since) >= FORGIVEN_AFTER) {
                    self.ejections = 0;
                }
            }
            State::Probing => {}
            // Tried because no endpoint is usable; that it failed is no news.
            State::Ejected { .. } => return false,
        }
        let cap = EJECT_TIME_MAX.max(config.eject_time);
        let time = config.eject_time.saturating_mul(1 << self.ejections.min(16)).min(cap);
        self.ejections += 1;
        // Workers and sidecars must not all come back at the same moment.
        let until = now + time.mul_f64(0.8 + 0.4 * rng.f64());
        self.state = State::Ejected { until };
        true
    }

    /// Ejects it, however few its failures are: nobody but a probe is to find out whether it is well.
    /// Says whether it was usable.
    pub fn eject(&mut self, config: &HealthConfig, now: Instant, rng: &mut fastrand::Rng) -> bool {
        if !self.is_admitted() {
            return false;
        }
        self.failures = self.failures.max(config.eject_failures.saturating_sub(1));
        self.on_failure(config, now, rng)
    }

    /// Nobody knows whether it is well, and nobody needs it now: a probe is to find out.
    pub fn doubt(&mut self, now: Instant) {
        if self.is_admitted() {
            self.state = State::Ejected { until: now };
        }
    }

    /// The probe could not be made, for a reason on this side; another one is due a little later.
    pub fn on_probe_lost(&mut self, now: Instant) {
        if self.is_probing() {
            self.state = State::Ejected { until: now + PROBE_RETRY };
        }
    }

    /// Whether a probe connection is due.
    pub fn is_probe_due(&self, now: Instant) -> bool {
        matches!(self.state, State::Ejected { until } if until <= now)
    }

    /// Whether a probe connection is due. If so, it has to be made now.
    pub fn take_probe(&mut self, now: Instant) -> bool {
        let due = self.is_probe_due(now);
        if due {
            self.state = State::Probing;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: HealthConfig =
        HealthConfig { eject_failures: 3, eject_time: Duration::from_secs(1) };

    fn eject(health: &mut Health, now: Instant, rng: &mut fastrand::Rng) {
        while !health.on_failure(&CONFIG, now, rng) {}
    }

    #[test]
    fn only_failures_in_a_row_eject() {
        let mut rng = fastrand::Rng::with_seed(1);
        let now = Instant::now();
        let mut health = Health::default();
        for _ in 0..10 {
            assert!(!health.on_failure(&CONFIG, now, &mut rng));
            assert!(!health.on_failure(&CONFIG, now, &mut rng));
            assert!(!health.on_success(now, now));
        }
        health.on_failure(&CONFIG, now, &mut rng);
        health.on_failure(&CONFIG, now, &mut rng);
        assert!(health.on_failure(&CONFIG, now, &mut rng));
        assert!(!health.is_usable());
    }

    #[test]
    fn a_failed_probe_ejects_for_longer_and_a_good_one_readmits() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut now = Instant::now();
        let mut health = Health::default();
        eject(&mut health, now, &mut rng);
        let mut previous = Duration::ZERO;
        for _ in 0..5 {
            let step = Duration::from_millis(10);
            let waited =
                (0..10_000).map(|i| i * step).find(|&t| health.take_probe(now + t)).unwrap();
            assert!(waited > previous.mul_f64(1.2), "{waited:?} after {previous:?}");
            assert!(!health.take_probe(now + waited), "one probe at a time");
            previous = waited;
            now += waited;
            assert!(health.on_failure(&CONFIG, now, &mut rng));
        }
        assert!(health.take_probe(now + 2 * EJECT_TIME_MAX));
        assert!(health.on_success(now, now));
        assert!(health.is_usable());
    }

    #[test]
    fn a_probe_that_could_not_be_made_is_made_later() {
        let mut rng = fastrand::Rng::with_seed(1);
        let now = Instant::now();
        let mut health = Health::default();
        eject(&mut health, now, &mut rng);
        let later = now + EJECT_TIME_MAX;
        assert!(health.take_probe(later));
        health.on_probe_lost(later);
        assert!(!health.take_probe(later));
        assert!(health.take_probe(later + PROBE_RETRY));
    }

    #[test]
    fn long_good_conduct_is_rewarded_with_the_shortest_ejection() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut now = Instant::now();
        let mut health = Health::default();
        for _ in 0..4 {
            eject(&mut health, now, &mut rng);
            now += 2 * EJECT_TIME_MAX;
            assert!(health.take_probe(now));
            health.on_success(now, now);
        }
        now += FORGIVEN_AFTER;
        eject(&mut health, now, &mut rng);
        assert!(health.take_probe(now + CONFIG.eject_time.mul_f64(1.2)));
    }

    #[test]
    fn only_what_was_made_after_the_failure_counts_as_a_success() {
        let mut rng = fastrand::Rng::with_seed(1);
        let before = Instant::now();
        let now = before + Duration::from_millis(1);
        let mut health = Health::default();
        eject(&mut health, now, &mut rng);
        assert!(!health.on_success(before, now));
        assert!(!health.is_usable());
        assert!(health.on_success(now, now));
        assert!(health.is_sound());
    }

    #[test]
    fn a_probe_that_lasts_readmits_on_trial() {
        let mut rng = fastrand::Rng::with_seed(1);
        let now = Instant::now();
        let mut health = Health::default();
        assert!(!health.on_settled(&CONFIG, now), "nothing was probed");
        eject(&mut health, now, &mut rng);
        assert!(health.take_probe(now + EJECT_TIME_MAX));
        assert!(health.on_settled(&CONFIG, now));
        assert!(health.is_usable());
        assert!(health.on_failure(&CONFIG, now, &mut rng), "one more is enough");
    }

    #[test]
    fn failures_weigh_until_a_success_or_for_a_while() {
        let mut rng = fastrand::Rng::with_seed(1);
        let now = Instant::now();
        let mut health = Health::default();
        health.on_failure(&CONFIG, now, &mut rng);
        health.forgive(now + WEIGHS_FOR / 2);
        assert_eq!((health.weight(), health.failures()), (1, 1));
        health.forgive(now + WEIGHS_FOR);
        assert_eq!((health.weight(), health.failures()), (0, 1), "it still counts");
        health.on_failure(&CONFIG, now, &mut rng);
        health.on_success(now, now);
        assert_eq!((health.weight(), health.failures()), (0, 0));
    }
}
