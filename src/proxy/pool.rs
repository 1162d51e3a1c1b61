//! The idle connections of one worker to one endpoint.
//!
//! `preconnect`, right for any protocol: a session takes the oldest warm connection, and a new one
//! is made in the background. The pool aims at a target between its bounds: it doubles when a
//! session finds the pool empty, and shrinks one by one as connections sit idle for too long.
//!
//! Where used connections are lent, they come back, and the latest one back is the next one lent,
//! so that those that are not needed grow old. New ones are made while requests wait, up to the
//! pool's size.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::config::{PoolConfig, PoolMode};
use crate::io::ConnId;
use crate::limits::{self, POOL_CONNECTING_MAX};
use crate::telemetry::Discard;

/// The wait after a failed connect doubles from here…
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// …to here.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A connection that has been open for so long, or has served, shows that the backend is well.
const PROVEN_AFTER: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Idle {
    conn: ConnId,
    since: Instant,
    retire_at: Option<Instant>,
    /// It was lent before.
    served: bool,
}

/// The warm connections of one worker to one endpoint.
#[derive(Debug)]
pub struct Pool {
    config: PoolConfig,
    idle: VecDeque<Idle>,
    connecting: usize,
    lent: usize,
    /// Connections that requests wait for and that are still to be made.
    wanted: usize,
    target: usize,
    failures: u32,
    retry_at: Option<Instant>,
}

impl Pool {
    /// An empty pool that aims at its minimum.
    pub fn new(config: &PoolConfig) -> Self {
        Self {
            idle: VecDeque::with_capacity(config.most()),
            connecting: 0,
            lent: 0,
            wanted: 0,
            target: config.min_idle,
            failures: 0,
            retry_at: None,
            config: config.clone(),
        }
    }

    /// Takes the oldest warm connection. If there is none, more will be kept from now on.
    pub fn checkout(&mut self) -> Option<ConnId> {
        let oldest = self.idle.pop_front();
        if oldest.is_some() {
            self.failures = 0;
        } else {
            self.target = (self.target * 2).max(1).min(self.config.max_idle);
        }
        oldest.map(|idle| idle.conn)
    }

    /// The connection that [`Pool::checkout`] would take.
    pub fn oldest_conn(&self) -> Option<ConnId> {
        self.idle.front().map(|idle| idle.conn)
    }

    /// The connection that [`Pool::lend`] would lend.
    pub fn latest_conn(&self) -> Option<ConnId> {
        self.idle.back().map(|idle| idle.conn)
    }

    /// Lends the connection that came back last; it is to come back or to be reported as closed.
    /// With it comes when it is too old to be kept.
    pub fn lend(&mut self) -> Option<(ConnId, Option<Instant>)> {
        let latest = self.idle.pop_back()?;
        self.failures = 0;
        self.lent += 1;
        Some((latest.conn, latest.retire_at))
    }

    /// A lent connection comes back. Says whether it is kept.
    #[must_use = "a connection that is not kept is to be closed"]
    pub fn take_back(&mut self, conn: ConnId, retire_at: Option<Instant>, now: Instant) -> bool {
        self.lent -= 1;
        if !self.keeps_one_more() || retire_at.is_some_and(|at| at <= now) {
            return false;
        }
        self.idle.push_back(Idle { conn, since: now, retire_at, served: true });
        true
    }

    /// A lent connection was closed.
    pub fn on_lent_closed(&mut self) {
        self.lent -= 1;
    }

    /// Whether there is room for a further idle connection. Where requests share connections, all
    /// of them may come back in one turn, to be lent at its end: the surplus grows old instead.
    fn keeps_one_more(&self) -> bool {
        let idle = self.idle.len();
        match self.config.mode {
            PoolMode::Preconnect | PoolMode::Session => idle < self.config.most(),
            PoolMode::Request => idle + self.lent < self.config.most(),
        }
    }

    /// How many more connections there may be.
    pub fn room(&self) -> usize {
        match self.config.mode {
            PoolMode::Request => {
                self.config.size.saturating_sub(self.idle.len() + self.connecting + self.lent)
            }
            PoolMode::Preconnect | PoolMode::Session => usize::MAX,
        }
    }

    /// So many requests wait for a connection of this pool.
    pub fn want(&mut self, count: usize) {
        self.wanted = (self.wanted + count).min(limits::POOL_IDLE_MAX);
    }

    /// Whether a connect has failed just now, so that none is made for a while.
    pub fn backs_off(&self, now: Instant) -> bool {
        self.retry_at.is_some_and(|at| now < at)
    }

    /// Nothing waits any more.
    pub fn stop_wanting(&mut self) {
        self.wanted = 0;
    }

    /// How many connects to start now.
    pub fn shortage(&self, now: Instant) -> usize {
        if self.config.mode != PoolMode::Preconnect {
            let kept = self.config.min_idle.saturating_sub(self.lent);
            let warm = self.idle.len() + self.connecting;
            let missing = self.wanted.max(kept.saturating_sub(warm));
            return self.allowed(missing, now).min(self.room());
        }
        self.allowed(self.target.saturating_sub(self.idle.len() + self.connecting), now)
    }

    fn allowed(&self, missing: usize, now: Instant) -> usize {
        if self.backs_off(now) {
            return 0;
        }
        // After a failure one connect tries the way first.
        let parallel = if self.failures > 0 { 1 } else { POOL_CONNECTING_MAX };
        missing.min(parallel.saturating_sub(self.connecting))
    }

    /// A connect for the pool was started.
    pub fn on_connecting(&mut self) {
        self.wanted = self.wanted.saturating_sub(1);
        self.connecting += 1;
    }

    /// A connect for the pool succeeded. Says whether the connection is kept.
    #[must_use = "a connection that is not kept is to be closed"]
    pub fn on_connected(&mut self, conn: ConnId, now: Instant, rng: &mut fastrand::Rng) -> bool {
        self.connecting -= 1;
        if !self.keeps_one_more() {
            return false;
        }
        // Ages are spread by a tenth either way, so that a pool is never renewed all at once.
        let spread = 0.9 + 0.2 * rng.f64();
        let retire_at = self.config.max_lifetime.map(|lifetime| now + lifetime.mul_f64(spread));
        self.idle.push_back(Idle { conn, since: now, retire_at, served: false });
        true
    }

    /// A connect for the pool failed; the next waits, longer each time.
    pub fn on_connect_failed(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        self.connecting -= 1;
        self.back_off(now, rng);
    }

    /// A warm connection ended or broke. A backend that accepts only to close is no better than
    /// one that refuses.
    pub fn on_died(&mut self, conn: ConnId, now: Instant, rng: &mut fastrand::Rng) {
        let died = self.idle.iter().position(|idle| idle.conn == conn);
        let died = died.and_then(|at| self.idle.remove(at));
        let proven =
            |idle: Idle| idle.served || now.saturating_duration_since(idle.since) >= PROVEN_AFTER;
        if died.is_some_and(|idle| !proven(idle)) {
            self.back_off(now, rng);
        }
    }

    fn back_off(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        if self.retry_at.is_some_and(|at| now < at) {
            return; // Of several that fail together the first one counts.
        }
        let backoff = BACKOFF_MIN.saturating_mul(1 << self.failures.min(10)).min(BACKOFF_MAX);
        self.failures += 1;
        self.retry_at = Some(now + backoff.mul_f64(0.5 + rng.f64()));
    }

    /// Takes a warm connection out that is not to be kept after all.
    pub fn remove(&mut self, conn: ConnId) {
        self.idle.retain(|idle| idle.conn != conn);
    }

    /// The next connection to close because of its age, and why.
    pub fn expire(&mut self, now: Instant) -> Option<(ConnId, Discard)> {
        let proven = |idle: &Idle| now.saturating_duration_since(idle.since) >= PROVEN_AFTER;
        if self.idle.front().is_some_and(proven) {
            self.failures = 0;
        }
        if let Some(at) = self.idle.iter().position(|i| i.retire_at.is_some_and(|at| at <= now)) {
            return self.idle.remove(at).map(|idle| (idle.conn, Discard::Lifetime));
        }
        let idle_for = now.saturating_duration_since(self.idle.front()?.since);
        let surplus = self.idle.len() > self.config.min_idle;
        if surplus && self.config.idle_timeout.is_some_and(|timeout| idle_for >= timeout) {
            self.target = (self.idle.len() - 1).max(self.config.min_idle);
            return self.idle.pop_front().map(|idle| (idle.conn, Discard::Idle));
        }
        None
    }

    /// Takes every warm connection out, one a call, to be closed.
    pub fn evict(&mut self) -> Option<ConnId> {
        self.idle.pop_front().map(|idle| idle.conn)
    }

    /// Warm connections now.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Connections being made.
    pub fn connecting(&self) -> usize {
        self.connecting
    }

    /// Connections that are lent.
    pub fn lent(&self) -> usize {
        self.lent
    }

    /// How many warm connections it aims at.
    pub fn target(&self) -> usize {
        self.target
    }

    /// The age of the oldest warm connection.
    pub fn oldest(&self, now: Instant) -> Option<Duration> {
        self.idle.front().map(|idle| now.saturating_duration_since(idle.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn config() -> PoolConfig {
        PoolConfig {
            mode: PoolMode::Preconnect,
            size: 4,
            min_idle: 2,
            max_idle: 8,
            idle_timeout: Some(10 * SECOND),
            max_lifetime: Some(100 * SECOND),
        }
    }

    fn conn(number: u32) -> ConnId {
        ConnId::from_parts(number, 0)
    }

    fn warmed(now: Instant, count: u32) -> Pool {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut pool = Pool::new(&config());
        for number in 0..count {
            pool.on_connecting();
            assert!(pool.on_connected(conn(number), now, &mut rng));
        }
        pool
    }

    #[test]
    fn it_warms_up_to_its_minimum_and_grows_when_found_empty() {
        let now = Instant::now();
        let mut pool = Pool::new(&config());
        assert_eq!(pool.shortage(now), 2);
        pool.on_connecting();
        assert_eq!(pool.shortage(now), 1);
        for expected in [4, 8, 8] {
            assert_eq!(pool.checkout(), None);
            assert_eq!(pool.target(), expected);
        }
        assert_eq!(pool.shortage(now), 7);
    }

    #[test]
    fn the_oldest_is_taken_first_and_replaced() {
        let now = Instant::now();
        let mut pool = warmed(now, 2);
        assert_eq!(pool.checkout(), Some(conn(0)));
        assert_eq!(pool.shortage(now), 1);
        pool.remove(conn(1));
        assert_eq!(pool.shortage(now), 2);
    }

    #[test]
    fn idle_connections_above_the_minimum_are_closed_and_not_replaced() {
        let now = Instant::now();
        let mut pool = warmed(now, 4);
        assert_eq!(pool.expire(now + 9 * SECOND), None);
        let later = now + 10 * SECOND;
        assert_eq!(pool.expire(later), Some((conn(0), Discard::Idle)));
        assert_eq!(pool.expire(later), Some((conn(1), Discard::Idle)));
        assert_eq!(pool.expire(later), None, "the minimum stays");
        assert_eq!(pool.shortage(later), 0);
    }

    #[test]
    fn old_connections_are_replaced_but_not_all_at_once() {
        let now = Instant::now();
        let mut pool = warmed(now, 2);
        assert_eq!(pool.expire(now + 89 * SECOND), None);
        let first = (90..=110).find(|&s| pool.expire(now + s * SECOND).is_some());
        assert!(first.is_some_and(|s| s < 110), "the first goes at {first:?}");
        assert_eq!(pool.idle(), 1, "their ages are spread");
        assert_eq!(pool.shortage(now + 100 * SECOND), 1);
    }

    #[test]
    fn failures_back_off_and_one_connect_tries_the_way() {
        let mut rng = fastrand::Rng::with_seed(1);
        let now = Instant::now();
        let mut pool = Pool::new(&config());
        pool.on_connecting();
        pool.on_connect_failed(now, &mut rng);
        assert_eq!(pool.shortage(now), 0);
        let later = now + 2 * BACKOFF_MIN;
        assert_eq!(pool.shortage(later), 1);
        pool.on_connecting();
        assert!(pool.on_connected(conn(7), later, &mut rng));
        assert_eq!(pool.shortage(later), 1, "no longer held back");
    }

    #[test]
    fn lent_connections_come_back_and_the_latest_is_lent_first() {
        let now = Instant::now();
        let mut pool = Pool::new(&PoolConfig { mode: PoolMode::Request, ..config() });
        let mut rng = fastrand::Rng::with_seed(1);
        assert_eq!(pool.shortage(now), 2, "the minimum");
        pool.want(9);
        assert_eq!(pool.shortage(now), 4, "what waits, up to the size");
        pool.stop_wanting();
        for number in 0..3 {
            pool.on_connecting();
            assert!(pool.on_connected(conn(number), now, &mut rng));
        }
        let (last, retire_at) = pool.lend().unwrap();
        assert_eq!((last, pool.lent(), pool.room()), (conn(2), 1, 1));
        let (first, _) = pool.lend().unwrap();
        assert_eq!(first, conn(1));
        assert_eq!(pool.shortage(now), 0, "the minimum counts those that are lent");
        assert!(pool.take_back(last, retire_at, now));
        assert_eq!(pool.lend().map(|(conn, _)| conn), Some(last));
        pool.on_lent_closed();
        assert!(!pool.take_back(last, retire_at, now + 200 * SECOND), "too old");
        assert_eq!((pool.lent(), pool.idle(), pool.room()), (0, 1, 3));
    }

    #[test]
    fn connections_that_requests_share_are_kept_up_to_the_size_and_no_further() {
        let now = Instant::now();
        let mut rng = fastrand::Rng::with_seed(1);
        let few = PoolConfig { mode: PoolMode::Request, min_idle: 0, max_idle: 1, ..config() };
        let mut pool = Pool::new(&few);
        for number in 0..4 {
            pool.on_connecting();
            assert!(pool.on_connected(conn(number), now, &mut rng), "four requests wait");
        }
        let lent: Vec<_> = std::iter::from_fn(|| pool.lend()).collect();
        pool.on_connecting();
        assert!(!pool.on_connected(conn(4), now, &mut rng), "a probe is one too many");
        for (conn, retire_at) in lent {
            assert!(pool.take_back(conn, retire_at, now), "others may wait");
        }
        assert_eq!((pool.idle(), pool.room()), (4, 0));
    }

    #[test]
    fn a_backend_that_closes_after_it_has_served_is_connected_to_again() {
        let now = Instant::now();
        let mut pool = Pool::new(&PoolConfig { mode: PoolMode::Request, ..config() });
        let mut rng = fastrand::Rng::with_seed(1);
        pool.on_connecting();
        assert!(pool.on_connected(conn(0), now, &mut rng));
        let (conn, retire_at) = pool.lend().unwrap();
        assert!(pool.take_back(conn, retire_at, now));
        pool.on_died(conn, now, &mut rng);
        pool.want(1);
        assert!(pool.shortage(now) > 0, "it is well");
    }

    #[test]
    fn a_backend_that_accepts_only_to_close_is_not_stormed() {
        let mut rng = fastrand::Rng::with_seed(1);
        let start = Instant::now();
        let mut pool = Pool::new(&config());
        let mut connects = 0;
        for millisecond in 0..10_000 {
            let now = start + Duration::from_millis(millisecond);
            for _ in 0..pool.shortage(now) {
                connects += 1;
                pool.on_connecting();
                assert!(pool.on_connected(conn(connects), now, &mut rng));
                pool.on_died(conn(connects), now, &mut rng);
            }
            pool.expire(now);
        }
        assert!((10..30).contains(&connects), "{connects} connects in ten seconds");
    }
}
