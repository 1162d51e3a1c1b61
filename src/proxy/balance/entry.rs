//! An endpoint as one worker sees it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::held::Held;
use super::latency::Latency;
use super::outstanding::Ends;
use crate::config::{PoolConfig, PoolMode};
use crate::limits;
use crate::metrics::EndpointStats;
use crate::proxy::WorkerId;
use crate::proxy::endpoints::{Endpoint, Tier};
use crate::proxy::health::{AT_ONCE, Health, HealthConfig};
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
    /// The places of its connections.
    pub(super) places: Held,
    /// The places of those that are idle, or made to be.
    pub(super) idle_places: Held,
    /// Connections that are being closed, and keep their places until they are.
    pub(super) closing: usize,
    worker: WorkerId,
    pub(super) tier: Tier,
    /// Another tier is in use.
    pub(super) is_spare: bool,
    pub(super) present: bool,
    /// When it left the set.
    pub(super) removed_at: Option<Instant>,
    /// When it joined others, of which there may have been one that it takes the place of.
    pub(super) joined_at: Option<Instant>,
    /// Since when it counts as having left the set for good: see [`Entry::let_go`].
    pub(super) gone_at: Option<Instant>,
    pub(super) ramp: Ramp,
    /// How long it takes to answer.
    pub(super) latency: Latency,
    /// Its requests without a reply.
    pub(super) owed: Ends,
    /// Turns that it has had, and those that went by while it could have none.
    pub(super) turns: u64,
    /// When it got its place in the table, which another one may have had before.
    since: Instant,
    /// When it last took a connection or answered.
    alive_at: Option<Instant>,
    /// When it last answered.
    answered_at: Option<Instant>,
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
        let workers = endpoint.stats.len();
        // With fewer places than workers nobody has a share: they take turns.
        let share = |max: usize| if max < workers { 0 } else { endpoint.share_of(worker, max) };
        let (max, idle_max) = (pool.conns_max(), idle_max(pool));
        endpoint.stats[usize::from(worker)].connections_max.set(max.unwrap_or(0) as u64);
        let idle_share = idle_max.map_or(0, share).max(min_idle);
        Self {
            places: Held::none(worker, max, max.map_or(0, share), now),
            idle_places: Held::none(worker, idle_max, idle_share, now),
            closing: 0,
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
            joined_at: None,
            gone_at: None,
            ramp: if joins { Ramp::Cold } else { Ramp::Full },
            latency: Latency::default(),
            owed: Ends::default(),
            turns: 0,
            since: now,
            alive_at: None,
            answered_at: None,
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

    /// Whether a client that has waited may be sent there now: there is a connection for it, or a place,
    /// and one more connect may be made. Whether it is ejected does not matter: where all are, those that wait
    /// try the way.
    pub fn has_room_for_waiting(&self, now: Instant) -> bool {
        let may_connect = self.has_room() && self.recovery.has_room(now);
        self.present && (self.pool.idle() > 0 || may_connect)
    }

    /// Whether it may be chosen, where there is one that is usable, or none.
    pub(super) fn may_serve(&self, any_usable: bool) -> bool {
        !self.is_withheld() && (self.health.is_usable() || !any_usable)
    }

    /// Whether it would serve, and has all the connections that it may, none of which is for a session:
    /// each has a client, or is about to be ended for its age.
    pub fn is_full(&self, now: Instant) -> bool {
        let may_serve = self.is_usable(now) && !self.is_withheld();
        may_serve && self.pool.oldest_conn(now).is_none() && !self.has_room()
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

    /// It answered somebody.
    pub fn on_answered(&mut self, at: Instant) {
        self.on_alive(at);
        self.answered_at = self.alive_at;
    }

    /// Whether it has done so within the time in which an end without a byte counts as a failure.
    pub fn has_answered_lately(&self, now: Instant) -> bool {
        self.answered_at.is_some_and(|at| now.saturating_duration_since(at) < AT_ONCE)
    }

    /// Whether it is in use, and has answered nobody since then.
    pub fn is_mute_since(&self, at: Instant) -> bool {
        let is_in_use = self.present && self.health.is_usable();
        is_in_use && self.answered_at.is_none_or(|answered| answered <= at)
    }

    /// When it last took a connection or answered.
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

    /// Since when what is on it is to be cut, if it is: it left the set for good, and at least `drain`
    /// ago.
    pub fn overdue_since(&self, drain: Duration, now: Instant) -> Option<Instant> {
        let since = self.gone_at?.max(self.removed_at? + drain);
        (self.pool.in_use() > 0 && since <= now).then_some(since)
    }

    /// Takes note of whether it left the set at least `linger` ago. Until then it may come back any
    /// moment: it gets nothing new, but what it has stays as it is.
    pub fn let_go(&mut self, linger: Duration, now: Instant) {
        let passed = |at| now.saturating_duration_since(at) >= linger;
        if self.removed_at.is_some_and(passed) {
            self.gone_at.get_or_insert(now);
        }
    }

    /// Whether it left the set for good.
    pub fn is_gone(&self) -> bool {
        self.gone_at.is_some()
    }

    /// This worker's counters of the endpoint.
    pub fn stats(&self) -> &EndpointStats {
        &self.endpoint.stats[usize::from(self.worker)]
    }

    /// Since when its number is its own.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Whether the latest snapshot names it.
    pub fn is_present(&self) -> bool {
        self.present
    }

    pub(super) fn is_unused(&self) -> bool {
        self.pool.counts() == Counts::default() && self.closing == 0
    }

    /// Whether there is a connection to it, or one is being made for somebody.
    pub fn has_conns(&self) -> bool {
        self.pool.idle() > 0 || self.sessions() > 0
    }

    /// Connections that it has, or that are being made or closed.
    pub(super) fn conns(&self) -> usize {
        let Counts { idle, connecting, in_use } = self.pool.counts();
        idle + connecting + in_use + self.closing
    }

    /// Connections that are being closed, and keep their places until they are.
    pub fn closing(&self) -> usize {
        self.closing
    }

    /// Places held for connections that are about to be made.
    pub fn spare(&self) -> usize {
        self.places.count().saturating_sub(self.conns())
    }

    /// Likewise of those for idle ones.
    pub(super) fn spare_idle(&self) -> usize {
        self.idle_places.count().saturating_sub(self.pooled())
    }

    /// Idle connections, and those being made for the pool.
    pub(super) fn pooled(&self) -> usize {
        self.pool.idle() + self.pool.connecting()
    }

    /// Whether there may be one more connection to it.
    pub fn has_room(&self) -> bool {
        self.spare() > 0 || !self.places.are_all_taken(&self.endpoint.places)
    }

    /// Places that no session and no request has, of all workers together. They come to who waits: those of
    /// idle connections, of such as are being made or closed, and those that are passed on.
    pub(super) fn places_coming(&self) -> usize {
        let Some(max) = self.places.max() else { return usize::MAX };
        let in_use = self.endpoint.stats.iter().map(|stats| stats.sessions_active.get());
        max.saturating_sub(in_use.sum::<u64>() as usize)
    }

    /// How many requests may wait for a connection that need not wait for others to be over. While it cannot
    /// be connected to nobody knows when one comes.
    pub(super) fn conns_coming(&self) -> usize {
        if self.recovery.is_unreachable() { self.pool.idle() } else { self.places_coming() }
    }

    /// Whether this worker has to make room for others that have less than their share: the
    /// connection that it needs least is to be closed.
    pub fn must_yield(&self, now: Instant) -> bool {
        let wanted = self.places.wanted(&self.endpoint.places).needy;
        if wanted <= self.closing || self.places.beyond_share() == 0 {
            return false;
        }
        let Some(max) = self.places.max() else { return false };
        let turn = limits::place_turn(max, self.endpoint.stats.len());
        self.places.has_share() || self.places.held_for(now) >= turn
    }

    /// When an idle connection is to be closed for others, should it be idle still; `None` if they
    /// need none, or it is a probe, which has told something soon.
    pub fn yields_idle_at(&self, now: Instant) -> Option<Instant> {
        let oldest = self.pool.oldest_since().filter(|_| !self.health.is_probing())?;
        let wanted = self.places.wanted(&self.endpoint.places);
        if wanted.needy + wanted.others <= self.closing {
            return None;
        }
        // With connections of their own it is sessions that wait.
        if !self.pool.reuses() || self.must_yield(now) {
            return Some(now);
        }
        let is_for_needy = wanted.needy > self.closing && self.places.beyond_share() > 0;
        let after =
            if is_for_needy { limits::UNNEEDED_BEYOND_SHARE_AFTER } else { limits::UNNEEDED_AFTER };
        Some(oldest + after)
    }

    /// Whether an idle connection is to be closed so that others can keep their share of idle ones.
    pub fn must_yield_pooled(&self) -> bool {
        self.pool.idle() > 0
            && self.idle_places.beyond_share() > 0
            && self.idle_places.wanted(&self.endpoint.idle_places).needy > 0
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.places.give_all(&self.endpoint.places);
        self.idle_places.give_all(&self.endpoint.idle_places);
    }
}

/// How many idle connections there may be, if that is not how many there may be at all.
fn idle_max(pool: &PoolConfig) -> Option<usize> {
    (pool.mode != PoolMode::Request).then(|| pool.most())
}
