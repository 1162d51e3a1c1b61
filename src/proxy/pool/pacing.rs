//! When connects that nobody waits for may be started: in rounds after a failure or a loss, so that
//! an endpoint that has returned is not met by all that it had lost at once.

use std::time::{Duration, Instant};

use crate::limits::POOL_CONNECTING_MAX;
use crate::proxy::backoff::Backoff;

/// The least time from one round of connects to the next; after a failure up to half more is added.
pub(super) const ROUND: Duration = Duration::from_millis(80);

/// How many connects may still be started in this round.
#[derive(Debug, Clone, Copy)]
pub(super) struct Round {
    left: usize,
    size: usize,
    /// From the latest connect of a round to the next round.
    gap: Duration,
    next_at: Instant,
}

/// One connect tries the way; then each round has twice as many as the one before.
#[derive(Debug)]
pub(super) struct Pacing {
    backoff: Backoff,
    failed_at: Option<Instant>,
    /// The round under way, where connects are paced.
    pub(super) round: Option<Round>,
    /// Connections to be made before an empty pool is a sign of demand: it was emptied otherwise.
    recovering: usize,
}

impl Pacing {
    /// Of an endpoint of which nothing is known yet, whose pool is to have `target` connections.
    pub(super) fn new(target: usize, now: Instant) -> Self {
        Self {
            backoff: Backoff::default(),
            failed_at: None,
            round: Some(Round { left: 1, size: 1, gap: ROUND, next_at: now }),
            recovering: target,
        }
    }

    /// From now on connects are made in rounds, until there are `target` again.
    pub(super) fn restart(&mut self, target: usize, now: Instant, rng: &mut fastrand::Rng) {
        // Workers and sidecars are not to fall in step.
        let gap = ROUND.mul_f64(1.0 + 0.5 * rng.f64());
        self.round = Some(Round { left: 1, size: 1, gap, next_at: now });
        self.recovering = target;
    }

    /// The endpoint has failed: the next connect waits. Says whether it counts: of several failures
    /// at a time the first one does.
    pub(super) fn on_failed(
        &mut self,
        target: usize,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> bool {
        self.restart(target, now, rng);
        self.failed_at = Some(now);
        self.backoff.on_failed(now, rng)
    }

    /// A byte has come on a connection made at `made`.
    pub(super) fn on_proven(&mut self, made: Instant) {
        if self.failed_at.is_none_or(|at| made >= at) {
            self.backoff.forget();
        }
    }

    /// A connection has stayed open for long enough.
    pub(super) fn on_settled(&mut self) {
        self.backoff.forget();
    }

    /// A connect was started.
    pub(super) fn on_connecting(&mut self) {
        if let Some(round) = &mut self.round {
            round.left = round.left.saturating_sub(1);
        }
    }

    /// A connect succeeded.
    pub(super) fn on_connected(&mut self) {
        self.recovering = self.recovering.saturating_sub(1);
    }

    /// Whether an empty pool is no sign of demand.
    pub(super) fn is_recovering(&self) -> bool {
        self.recovering > 0
    }

    /// Whether a connect has failed just now, so that none is made for a while.
    pub(super) fn backs_off(&self, now: Instant) -> bool {
        self.backoff.is_on(now)
    }

    /// Connects at a time, whoever waits for them: after a failure one tries the way first.
    pub(super) fn parallel_max(&self) -> usize {
        if self.backoff.has_failed() { 1 } else { POOL_CONNECTING_MAX }
    }

    /// Connects that nobody waits for which may be started now, beside those under way.
    pub(super) fn unneeded_max(&mut self, connecting: usize, now: Instant) -> usize {
        let Some(round) = &mut self.round else { return usize::MAX };
        if round.left == 0 && now >= round.next_at && connecting == 0 {
            // Until the endpoint has shown that it is well, one at a time is enough.
            round.size = if self.backoff.has_failed() { 1 } else { 2 * round.size };
            round.left = round.size;
            if round.size >= POOL_CONNECTING_MAX {
                self.round = None;
                return usize::MAX;
            }
        }
        if round.left > 0 {
            round.next_at = now + round.gap;
        }
        round.left
    }
}
