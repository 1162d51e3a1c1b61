//! An endpoint as one worker sees it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::latency::Latency;
use super::outstanding::Ends;
use crate::config::PoolConfig;
use crate::metrics::EndpointStats;
use crate::proxy::WorkerId;
use crate::proxy::endpoints::{Endpoint, Tier};
use crate::proxy::health::{Health, HealthConfig};
use crate::proxy::outage::Recovery;
use crate::proxy::pool::{Counts, Pool};

/// One endpoint of one worker.
#[derive(Debug)]
pub struct Entry {
    /// The endpoint, shared with the other workers and the control thread.
    pub endpoint: Arc<Endpoint>,
    /// Its connections.
    pub pool: Pool,
    /// Its health.
    pub health: Health,
    /// How it takes connects.
    pub recovery: Recovery,
    /// Those of its connections in use that are not released to the pool, though it reuses them:
    /// nobody knows any more what is on them.
    pub(super) opaque: usize,
    worker: WorkerId,
    pub(super) tier: Tier,
    /// Another tier is in use.
    pub(super) is_spare: bool,
    pub(super) present: bool,
    /// When it left the set.
    pub(super) removed_at: Option<Instant>,
    /// It left the set for good, as far as anybody can tell: see [`Entry::let_go`].
    pub(super) gone: bool,
    pub(super) ramp: Ramp,
    /// How long it takes to answer.
    pub(super) latency: Latency,
    /// Its requests without a reply.
    pub(super) owed: Ends,
    /// Turns that it has had, and those that went by while it could have none.
    pub(super) turns: u64,
    /// When it last took a connection or answered.
    alive_at: Option<Instant>,
    /// When it last did not know a connection any more that it had taken.
    forgotten_at: Option<Instant>,
}

/// How far an endpoint that joined others is on the way to its full share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ramp {
    /// No connection to it has been made yet.
    Cold,
    /// The first one was made then; it now gets this part of its share, in percent.
    Warming {
        since: Instant,
        percent: u32,
    },
    Full,
}

/// The part of its share that an endpoint starts with, in percent.
const RAMP_PERCENT_MIN: u32 = 10;

impl Entry {
    /// An endpoint that has just come in. One that `joins` others gets less than its share at first.
    pub(super) fn new(
        endpoint: &Arc<Endpoint>,
        worker: WorkerId,
        pool: &PoolConfig,
        joins: bool,
        now: Instant,
    ) -> Self {
        // Its counters may be of an earlier time, in which it ended up anyhow.
        endpoint.stats[usize::from(worker)].reset_gauges();
        let min_idle = endpoint.share_of(worker, pool.min_idle);
        Self {
            endpoint: Arc::clone(endpoint),
            pool: Pool::new(&PoolConfig { min_idle, ..pool.clone() }, now),
            health: Health::default(),
            recovery: Recovery::default(),
            opaque: 0,
            worker,
            tier: Tier::FIRST,
            is_spare: false,
            present: true,
            removed_at: None,
            gone: false,
            ramp: if joins { Ramp::Cold } else { Ramp::Full },
            latency: Latency::default(),
            owed: Ends::default(),
            turns: 0,
            alive_at: None,
            forgotten_at: None,
        }
    }

    /// Whether clients may be sent there now: it is in the set, it is not ejected, and unless there is
    /// a connection to it that nobody uses, no connect has just failed. While this holds for none,
    /// clients wait.
    pub fn is_usable(&self, now: Instant) -> bool {
        let has_way = self.pool.idle() > 0 || !self.recovery.backs_off(now);
        self.present && self.health.is_usable() && has_way
    }

    /// Whether its tier is worth using for it: it is in the set, it is not ejected, and unless there is
    /// a connection to it that nobody uses, its latest connect has not failed. A backoff that is over
    /// proves nothing, so time does not count.
    pub(super) fn holds_tier(&self) -> bool {
        let has_way = self.pool.idle() > 0 || !self.recovery.is_unreachable();
        self.present && self.health.is_usable() && has_way
    }

    /// Whether it gets nothing new, however well it takes connections: another tier is in use than its
    /// own, or its checks fail.
    pub fn is_withheld(&self) -> bool {
        self.is_spare || self.health.fails_check()
    }

    /// Whether a client that has waited may be sent there now: there is a connection for it, or one
    /// more connect may be made. Whether it is ejected does not matter: where all are, those that wait
    /// try the way.
    pub fn has_room_for_waiting(&self, now: Instant) -> bool {
        self.present && (self.pool.idle() > 0 || self.recovery.has_room(now))
    }

    /// Sessions on it, those still connecting included.
    pub fn sessions(&self) -> u32 {
        self.pool.in_use() as u32
    }

    /// Moves the slow start on. An endpoint counts as warm from its first connection.
    pub fn ramp_up(&mut self, slow_start: Duration, now: Instant) {
        let warm = self.pool.idle() > 0 || self.stats().connects.get() > 0;
        self.ramp = match self.ramp {
            Ramp::Cold if warm => Ramp::Warming { since: now, percent: RAMP_PERCENT_MIN },
            Ramp::Warming { since, .. } => {
                let passed = now.saturating_duration_since(since).as_secs_f64();
                match (100.0 * passed / slow_start.as_secs_f64()) as u32 {
                    100.. => Ramp::Full,
                    percent => Ramp::Warming { since, percent: percent.max(RAMP_PERCENT_MIN) },
                }
            }
            ramp => ramp,
        };
    }

    /// It has failed. Says whether that ejects it.
    pub fn on_failure(
        &mut self,
        config: &HealthConfig,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> bool {
        self.latency.on_failed(now);
        self.health.on_failure(config, now, rng)
    }

    /// It does not know a connection any more that was made at `made`. Says whether that was known of
    /// others that are as old.
    pub fn on_forgotten(&mut self, made: Instant, now: Instant) -> bool {
        let was_known = self.forgotten_at.is_some_and(|at| made < at);
        self.forgotten_at = Some(now);
        was_known
    }

    /// It took a connection or answered: what goes to it arrives, and what comes from it as well.
    pub fn on_alive(&mut self, at: Instant) {
        self.alive_at = self.alive_at.max(Some(at));
    }

    /// When it last did that.
    pub fn alive_at(&self) -> Option<Instant> {
        self.alive_at
    }

    pub(super) fn percent(&self) -> u32 {
        match self.ramp {
            Ramp::Cold => RAMP_PERCENT_MIN,
            Ramp::Warming { percent, .. } => percent,
            Ramp::Full => 100,
        }
    }

    /// Its load, as much higher as its share is smaller, and twice as high for each recent failure:
    /// an endpoint that ends its sessions at once would seem to be idle.
    pub(super) fn load(&self) -> u32 {
        match (self.percent(), self.health.weight()) {
            (100, 0) => self.sessions(),
            _ => u32::try_from(self.load_with_one_more()).unwrap_or(u32::MAX),
        }
    }

    /// The same with one session more, so that it is never 0.
    pub(super) fn load_with_one_more(&self) -> u64 {
        let load = (u64::from(self.sessions()) + 1) * 100 / u64::from(self.percent());
        load << self.health.weight().min(16)
    }

    /// Whether it left the set at least `drain` ago, for good, and still has sessions.
    pub fn is_overdue(&self, drain: Duration, now: Instant) -> bool {
        let passed = |at| now.saturating_duration_since(at) >= drain;
        self.pool.in_use() > 0 && self.gone && self.removed_at.is_some_and(passed)
    }

    /// Takes note of whether it left the set at least `linger` ago. Until then it may come back any
    /// moment: it gets nothing new, but what it has stays as it is.
    pub fn let_go(&mut self, linger: Duration, now: Instant) {
        self.gone |= self.removed_at.is_some_and(|at| now.saturating_duration_since(at) >= linger);
    }

    /// Whether it left the set for good.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// This worker's counters of the endpoint.
    pub fn stats(&self) -> &EndpointStats {
        &self.endpoint.stats[usize::from(self.worker)]
    }

    /// Whether the latest snapshot names it.
    pub fn is_present(&self) -> bool {
        self.present
    }

    pub(super) fn is_unused(&self) -> bool {
        self.pool.counts() == Counts::default()
    }
}
