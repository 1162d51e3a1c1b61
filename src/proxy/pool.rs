//! The idle connections of one worker to one endpoint.
//!
//! `preconnect`, right for any protocol: a session takes the oldest warm connection, and a new one
//! is made in the background. The pool aims at a target between its bounds: it grows by one for
//! each session that found the pool empty and was served by a connection made for it, and shrinks
//! one by one as connections sit idle for too long. Attempts that fail are no demand.
//!
//! Where used connections are lent, they come back, and the latest one back is the next one lent,
//! so that those that are not needed grow old. New ones are made while requests wait, up to the
//! pool's size.
//!
//! After a failure one connect tries the way; then twice as many are made in each round as in the
//! one before, so that an endpoint that has returned is not met by all that it had lost at once.
//!
//! # Servers that end what is not used
//! Some servers limit the time for a login, and some count logins that did not come to their end,
//! until they lock the host out. There, connections kept warm do harm. A pool learns it: if those
//! that were never used are ended by the server at about the same age, at different moments, it
//! keeps ever fewer, down to none. With a server that speaks first, as those do that count, it learns
//! from the first one, and keeps only that one for a while to begin with. It keeps more again as
//! sessions come, more slowly each time it had to learn.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::config::{PoolConfig, PoolMode};
use crate::io::ConnId;
use crate::limits::{self, POOL_CONNECTING_MAX};
use crate::metrics::Discard;

/// The wait after a failed connect doubles from here…
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// …to here.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A connection that has been open for so long, or has served, shows that the backend is well.
/// Less than any server gives a login.
const PROVEN_AFTER: Duration = Duration::from_millis(500);
/// The least time from one round of connects to the next; after a failure up to half more is added.
const ROUND: Duration = Duration::from_millis(80);
/// No server ends a login sooner: a second is the least that `PostgreSQL` can be told.
const LOGIN_TIME_MIN: Duration = Duration::from_millis(950);
/// Ends within this time have one cause.
const SAME_MOMENT: Duration = Duration::from_millis(30);
/// Connections whose ages differ by less than this were made together, and one limit ends both at
/// the same moment.
const MADE_TOGETHER: Duration = Duration::from_millis(50);
/// With a server that speaks first, one connection is kept alone for so long to begin with: longer
/// than `MySQL` gives a login by default.
const ALONE_FOR: Duration = Duration::from_secs(11);
/// Sessions for which one connection more is kept, where fewer are kept than could be: at first,
const SESSIONS_PER_STEP_MIN: u32 = 4;
/// and at most, after it had to learn several times.
const SESSIONS_PER_STEP_MAX: u32 = 256;

#[derive(Debug)]
struct Idle {
    conn: ConnId,
    made: Instant,
    since: Instant,
    retire_at: Option<Instant>,
    /// It was lent before.
    served: bool,
    /// See [`Taken::unread`].
    unread: bool,
}

/// A connection that was taken from the pool to be lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The connection.
    pub conn: ConnId,
    /// When it was made.
    pub made: Instant,
    /// When it is too old to be kept.
    pub retire_at: Option<Instant>,
    /// It was lent before, and answered.
    pub served: bool,
    /// Its backend answered a request before it had read all of it, and may still be reading.
    pub unread: bool,
}

/// How many connects may still be started in this round, after a failure.
#[derive(Debug, Clone, Copy)]
struct Round {
    left: usize,
    size: usize,
    /// From the latest connect of a round to the next round.
    gap: Duration,
    next_at: Instant,
}

/// The server has ended connections that were never used.
#[derive(Debug, Clone, Copy)]
struct Unused {
    at: Instant,
    made: Instant,
    /// They were made at different times, so it is not their age.
    mixed: bool,
}

/// The warm connections of one worker to one endpoint.
#[derive(Debug)]
pub struct Pool {
    config: PoolConfig,
    idle: VecDeque<Idle>,
    connecting: usize,
    in_use: usize,
    /// Connections that requests wait for and that are still to be made.
    wanted: usize,
    target: usize,
    failures: u32,
    failed_at: Option<Instant>,
    retry_at: Option<Instant>,
    /// The round of connects under way, where they are paced.
    round: Option<Round>,
    /// Connections to be made before an empty pool is a sign of demand: it was emptied otherwise.
    recovering: usize,
    /// More than so many are not kept, whatever the target: the server ends them unused.
    ceiling: usize,
    /// Ends in a row, of connections never used, at about the same age.
    alike: u32,
    /// The latest of them, to be judged when all of the same moment are known; and the age before.
    unused: Option<Unused>,
    unused_age: Option<Duration>,
    /// Sessions until the ceiling rises.
    sessions_left: u32,
    sessions_per_step: u32,
    /// The server speaks first; it was heard to do so at this moment.
    greets_since: Option<Instant>,
}

impl Pool {
    /// An empty pool that aims at its minimum.
    pub fn new(config: &PoolConfig, now: Instant) -> Self {
        Self {
            idle: VecDeque::with_capacity(config.most()),
            connecting: 0,
            in_use: 0,
            wanted: 0,
            target: config.min_idle,
            failures: 0,
            failed_at: None,
            retry_at: None,
            // Nothing is known of the server yet.
            round: Some(Round { left: 1, size: 1, gap: ROUND, next_at: now }),
            recovering: config.min_idle,
            ceiling: usize::MAX,
            alike: 0,
            unused: None,
            unused_age: None,
            sessions_left: SESSIONS_PER_STEP_MIN,
            sessions_per_step: SESSIONS_PER_STEP_MIN,
            greets_since: None,
            config: config.clone(),
        }
    }

    /// Takes the oldest warm connection, for a session. With it comes when it was made.
    pub fn checkout(&mut self, now: Instant) -> Option<(ConnId, Instant)> {
        let at = self.next_checkout(now)?;
        self.idle.remove(at).map(|idle| (idle.conn, idle.made))
    }

    fn next_checkout(&self, now: Instant) -> Option<usize> {
        // One that the server is about to end would leave no time for a login.
        let most = self.unused_age.map_or(Duration::MAX, |age| age / 4 * 3);
        self.idle.iter().position(|idle| now.saturating_duration_since(idle.made) < most)
    }

    /// A session that had found no warm connection is served by one that was made for it.
    pub fn on_miss_served(&mut self) {
        if self.recovering == 0 {
            self.target = (self.target + 1).min(self.config.max_idle);
        }
    }

    /// A session is served. Where fewer are kept than could be, one more will be after some of them.
    pub fn on_session_served(&mut self) {
        if self.ceiling >= self.config.most() {
            return;
        }
        self.sessions_left = self.sessions_left.saturating_sub(1);
        if self.sessions_left == 0 {
            self.ceiling += 1;
            self.sessions_left = self.sessions_per_step;
        }
    }

    /// The server has spoken on a connection that was not used yet.
    pub fn on_greeting(&mut self, now: Instant) {
        self.greets_since.get_or_insert(now);
    }

    /// When a warm connection was made.
    pub fn made(&self, conn: ConnId) -> Option<Instant> {
        self.idle.iter().find(|idle| idle.conn == conn).map(|idle| idle.made)
    }

    /// A byte has come from the endpoint on a connection made at `made`: it is well.
    pub fn on_proven(&mut self, made: Instant) {
        if self.failed_at.is_none_or(|at| made >= at) {
            self.failures = 0;
        }
    }

    /// The connection that [`Pool::checkout`] would take.
    pub fn oldest_conn(&self, now: Instant) -> Option<ConnId> {
        self.next_checkout(now).map(|at| self.idle[at].conn)
    }

    /// The connection that [`Pool::acquire`] would lend.
    pub fn latest_conn(&self) -> Option<ConnId> {
        self.idle.back().map(|idle| idle.conn)
    }

    /// Lends the connection that came back last; it is to come back or to be reported as closed.
    pub fn acquire(&mut self) -> Option<Taken> {
        let Idle { conn, made, retire_at, served, unread, .. } = self.idle.pop_back()?;
        self.in_use += 1;
        self.on_session_served();
        Some(Taken { conn, made, retire_at, served, unread })
    }

    /// A lent connection comes back. Says whether it is kept.
    #[must_use = "a connection that is not kept is to be closed"]
    pub fn release(&mut self, taken: Taken, now: Instant) -> bool {
        self.in_use -= 1;
        let Taken { conn, made, retire_at, served, unread } = taken;
        if !self.keeps_one_more() || retire_at.is_some_and(|at| at <= now) {
            return false;
        }
        self.idle.push_back(Idle { conn, made, since: now, retire_at, served, unread });
        true
    }

    /// A lent connection was closed.
    pub fn on_discarded(&mut self) {
        self.in_use -= 1;
    }

    /// Whether there is room for a further idle connection. Where requests share connections, all
    /// of them may come back in one turn, to be lent at its end: the surplus grows old instead.
    fn keeps_one_more(&self) -> bool {
        let idle = self.idle.len();
        match self.config.mode {
            PoolMode::Preconnect | PoolMode::Session => idle < self.config.most(),
            PoolMode::Request => idle + self.in_use < self.config.most(),
        }
    }

    /// Takes a warm connection out that was made before this moment, to be closed.
    pub fn evict_made_before(&mut self, at: Instant) -> Option<ConnId> {
        let old = self.idle.iter().position(|idle| idle.made < at)?;
        self.idle.remove(old).map(|idle| idle.conn)
    }

    /// How many more connections there may be.
    pub fn room(&self) -> usize {
        match self.config.mode {
            PoolMode::Request => {
                self.config.size.saturating_sub(self.idle.len() + self.connecting + self.in_use)
            }
            PoolMode::Preconnect | PoolMode::Session => usize::MAX,
        }
    }

    /// So many requests wait for a connection of this pool.
    pub fn want(&mut self, count: usize) {
        self.wanted = (self.wanted + count).min(limits::POOL_IDLE_MAX);
    }

    /// Connections that requests wait for and that are still to be made.
    pub fn wanted(&self) -> usize {
        self.wanted
    }

    /// Whether a connect has failed just now, so that none is made for a while.
    pub fn backs_off(&self, now: Instant) -> bool {
        self.retry_at.is_some_and(|at| now < at)
    }

    /// Nothing waits any more.
    pub fn stop_wanting(&mut self) {
        self.wanted = 0;
    }

    /// How many connects to start now. Of what is kept without being waited for, at most `share`
    /// is.
    pub fn shortage(&mut self, share: usize, now: Instant) -> usize {
        if self.backs_off(now) {
            return 0;
        }
        // After a failure one connect tries the way first.
        let parallel = if self.failures > 0 { 1 } else { POOL_CONNECTING_MAX };
        let parallel = parallel.saturating_sub(self.connecting);
        let warm = self.idle.len() + self.connecting;
        let kept = self.target().min(share);
        if self.config.mode != PoolMode::Preconnect {
            let kept = kept.saturating_sub(self.in_use + warm);
            let kept = kept.min(self.paced(now));
            return self.wanted.max(kept).min(parallel).min(self.room());
        }
        kept.saturating_sub(warm).min(parallel).min(self.paced(now))
    }

    /// How many connects that nobody waits for may be started now.
    fn paced(&mut self, now: Instant) -> usize {
        if self.unused.is_some() {
            return 0; // It is not known yet whether they would only be ended again.
        }
        let alone = |since: Instant| now.saturating_duration_since(since) < ALONE_FOR;
        if self.greets_since.is_some_and(alone) {
            return 1_usize.saturating_sub(self.idle.len() + self.connecting);
        }
        let Some(round) = &mut self.round else { return usize::MAX };
        if round.left == 0 && now >= round.next_at && self.connecting == 0 {
            // Until the endpoint has shown that it is well, one at a time is enough.
            round.size = if self.failures > 0 { 1 } else { 2 * round.size };
            round.left = round.size;
            if round.size >= POOL_CONNECTING_MAX {
                self.round = None;
                return usize::MAX;
            }
        }
        let Some(round) = &mut self.round else { return usize::MAX };
        if round.left > 0 {
            round.next_at = now + round.gap;
        }
        round.left
    }

    /// From now on connects are made in rounds, each twice as large as the one before.
    fn pace(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        // Worker and sidecars are not to fall in step.
        let gap = ROUND.mul_f64(1.0 + 0.5 * rng.f64());
        self.round = Some(Round { left: 1, size: 1, gap, next_at: now });
        self.recovering = self.target();
    }

    /// A connect for the pool was started.
    pub fn on_connecting(&mut self) {
        self.wanted = self.wanted.saturating_sub(1);
        self.connecting += 1;
        if let Some(round) = &mut self.round {
            round.left = round.left.saturating_sub(1);
        }
    }

    /// A connect for the pool succeeded. Says whether the connection is kept. One that `probes` the
    /// endpoint is kept for a while even where none are.
    #[must_use = "a connection that is not kept is to be closed"]
    pub fn on_connected(
        &mut self,
        conn: ConnId,
        probes: bool,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> bool {
        self.connecting -= 1;
        self.recovering = self.recovering.saturating_sub(1);
        let probes = probes && self.idle.is_empty() && self.config.mode == PoolMode::Preconnect;
        if !self.keeps_one_more() && !probes {
            return false;
        }
        // Ages are spread by a tenth either way, so that a pool is never renewed all at once.
        let spread = 0.9 + 0.2 * rng.f64();
        let retire_at = self.config.max_lifetime.map(|lifetime| now + lifetime.mul_f64(spread));
        self.idle.push_back(Idle {
            conn,
            made: now,
            since: now,
            retire_at,
            served: false,
            unread: false,
        });
        true
    }

    /// A connect for the pool failed; the next waits, longer each time.
    pub fn on_connect_failed(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        self.connecting -= 1;
        self.on_failed(now, rng);
    }

    /// A warm connection ended or broke. A backend that accepts only to close is no better than
    /// one that refuses: says whether it has failed so.
    pub fn on_died(&mut self, conn: ConnId, now: Instant, rng: &mut fastrand::Rng) -> bool {
        let died = self.idle.iter().position(|idle| idle.conn == conn);
        let Some(died) = died.and_then(|at| self.idle.remove(at)) else { return false };
        let age = now.saturating_duration_since(died.made);
        if !died.served && age >= LOGIN_TIME_MIN {
            self.on_ended_unused(died.made, now);
        }
        // While others stay open the endpoint is well.
        let alone = self.idle.is_empty();
        if !died.served && age < PROVEN_AFTER {
            return self.on_failed(now, rng) && alone;
        }
        if alone {
            self.pace(now, rng);
        }
        false
    }

    fn on_ended_unused(&mut self, made: Instant, now: Instant) {
        self.judge_unused(now);
        let before = self.unused.get_or_insert(Unused { at: now, made, mixed: false });
        let earlier = before.made.min(made);
        before.mixed |= before.made.max(made).saturating_duration_since(earlier) >= MADE_TOGETHER;
    }

    /// Whether the server ends connections because they were not used for so long. One that is
    /// restarted ends all of them, whatever their age.
    fn judge_unused(&mut self, now: Instant) {
        let settled = |unused: &mut Unused| now.saturating_duration_since(unused.at) > SAME_MOMENT;
        let Some(unused) = self.unused.take_if(settled) else { return };
        let age = unused.at.saturating_duration_since(unused.made);
        if unused.mixed {
            self.alike = 0;
            self.unused_age = None;
            return;
        }
        let before = self.unused_age.replace(age);
        let same = |before: Duration| age.abs_diff(before) <= age / 10 + Duration::from_millis(150);
        self.alike = if before.is_some_and(same) { self.alike + 1 } else { 1 };
        // One that greets was not idle: it waited for a login.
        if self.alike >= 2 || self.greets_since.is_some() {
            let kept = self.target().min(self.idle.len() + 1);
            self.ceiling = kept / 2;
            self.sessions_per_step = (2 * self.sessions_per_step).min(SESSIONS_PER_STEP_MAX);
            self.sessions_left = self.sessions_per_step;
        }
    }

    /// The endpoint has failed: the next connect waits, and tries the way. Says whether it counts: of
    /// several failures at a time the first one does.
    pub fn on_failed(&mut self, now: Instant, rng: &mut fastrand::Rng) -> bool {
        self.pace(now, rng);
        self.failed_at = Some(now);
        if self.backs_off(now) {
            return false;
        }
        let backoff = BACKOFF_MIN.saturating_mul(1 << self.failures.min(10)).min(BACKOFF_MAX);
        self.failures += 1;
        self.retry_at = Some(now + backoff.mul_f64(0.5 + rng.f64()));
        true
    }

    /// The connections have been taken out because they are of no use any more.
    pub fn on_emptied(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        self.pace(now, rng);
    }

    /// Takes a warm connection out that is not to be kept after all.
    pub fn remove(&mut self, conn: ConnId) {
        self.idle.retain(|idle| idle.conn != conn);
    }

    /// The next connection to close because of its age, and why.
    pub fn expire(&mut self, now: Instant) -> Option<(ConnId, Discard)> {
        self.judge_unused(now);
        if self.has_settled(PROVEN_AFTER, now) {
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

    /// Whether a connection has been open and idle for so long.
    pub fn has_settled(&self, after: Duration, now: Instant) -> bool {
        let settled = |idle: &Idle| now.saturating_duration_since(idle.since) >= after;
        self.idle.front().is_some_and(settled)
    }

    /// Takes every warm connection out, one a call, to be closed: the one that has been idle for
    /// longest first.
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
    pub fn in_use(&self) -> usize {
        self.in_use
    }

    /// How many warm connections it aims at.
    pub fn target(&self) -> usize {
        let target = match self.config.mode {
            PoolMode::Preconnect => self.target,
            PoolMode::Session | PoolMode::Request => self.config.min_idle,
        };
        target.min(self.ceiling)
    }

    /// Since when the oldest warm connection has been idle.
    pub fn oldest_since(&self) -> Option<Instant> {
        self.idle.front().map(|idle| idle.since)
    }

    /// The age of the oldest warm connection.
    pub fn oldest(&self, now: Instant) -> Option<Duration> {
        self.oldest_since().map(|since| now.saturating_duration_since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);
    const ALL: usize = usize::MAX;

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

    /// A pool that has been warm for long, in which nothing is paced any more.
    fn warmed(now: Instant, count: u32) -> Pool {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut pool = Pool::new(&config(), now);
        for number in 0..count {
            pool.on_connecting();
            assert!(pool.on_connected(conn(number), false, now, &mut rng));
        }
        pool.round = None;
        pool
    }

    /// Makes what is missing, a look every 10 ms, for so long. Returns how many each look made.
    fn fill(pool: &mut Pool, next: &mut u32, start: Instant, time: Duration) -> Vec<usize> {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut made = Vec::new();
        let mut now = start;
        while now < start + time {
            assert_eq!(pool.expire(now), None);
            let short = pool.shortage(ALL, now);
            for _ in 0..short {
                pool.on_connecting();
                assert!(pool.on_connected(conn(*next), false, now, &mut rng));
                *next += 1;
            }
            made.push(short);
            now += 10 * MS;
        }
        made.retain(|&made| made > 0);
        made
    }

    #[test]
    fn it_warms_up_to_its_minimum_one_connect_first() {
        let now = Instant::now();
        let mut pool = Pool::new(&PoolConfig { min_idle: 40, max_idle: 40, ..config() }, now);
        assert_eq!(fill(&mut pool, &mut 0, now, SECOND), [1, 2, 4, 8, 16, 9]);
    }

    #[test]
    fn it_grows_by_the_sessions_that_were_served_without_it_and_by_nothing_else() {
        let now = Instant::now();
        let mut pool = Pool::new(&config(), now);
        pool.on_miss_served();
        assert_eq!(pool.target(), 2, "it had no time to be filled");
        fill(&mut pool, &mut 0, now, SECOND);
        for _ in 0..100 {
            pool.checkout(now + SECOND);
        }
        assert_eq!(pool.target(), 2, "attempts are no demand");
        for expected in [3, 4, 5, 6, 7, 8, 8] {
            pool.on_miss_served();
            assert_eq!(pool.target(), expected);
        }
    }

    #[test]
    fn what_was_lost_in_an_outage_is_no_demand_and_comes_back_in_rounds() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut now = Instant::now();
        let mut pool = Pool::new(&PoolConfig { min_idle: 2, max_idle: 64, ..config() }, now);
        fill(&mut pool, &mut 0, now, SECOND);
        now += SECOND;
        while pool.evict().is_some() {}
        for _ in 0..300 {
            assert_eq!(pool.checkout(now), None);
            if pool.shortage(ALL, now) > 0 {
                pool.on_connecting();
                pool.on_connect_failed(now, &mut rng);
            }
            now += 10 * MS;
        }
        pool.on_miss_served();
        assert_eq!(pool.target(), 2, "it is empty because of the outage");
        now += 2 * SECOND;
        assert_eq!(fill(&mut pool, &mut 10, now, SECOND), [1, 1]);
        pool.on_miss_served();
        assert_eq!(pool.target(), 3);
    }

    /// What a server does that ends each login after `limit`, over so many seconds without any
    /// session. Returns how many it ended.
    fn end_logins(pool: &mut Pool, start: Instant, limit: Duration, seconds: u32) -> u32 {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut open: Vec<(ConnId, Instant)> = Vec::new();
        let (mut next, mut ended) = (1000, 0);
        for step in 0..seconds * 100 {
            let now = start + step * 10 * MS;
            open.retain(|&(conn, made)| {
                let over = now.saturating_duration_since(made) >= limit;
                if over {
                    assert!(!pool.on_died(conn, now, &mut rng), "the endpoint is well");
                    ended += 1;
                }
                !over
            });
            if step % 10 == 0 {
                pool.expire(now);
            }
            for _ in 0..pool.shortage(ALL, now) {
                pool.on_connecting();
                assert!(pool.on_connected(conn(next), false, now, &mut rng));
                open.push((conn(next), now));
                next += 1;
            }
        }
        ended
    }

    #[test]
    fn a_server_that_ends_what_is_not_used_is_left_alone_until_there_is_demand() {
        for limit in [SECOND, 2 * SECOND, 10 * SECOND, 60 * SECOND] {
            let now = Instant::now();
            let few =
                PoolConfig { min_idle: 4, idle_timeout: None, max_lifetime: None, ..config() };
            let mut pool = Pool::new(&few, now);
            let ended = end_logins(&mut pool, now, limit, 600);
            assert!(ended <= 6, "{ended} of {limit:?}");
            assert_eq!((pool.target(), pool.idle()), (0, 0));
            for sessions in 1.. {
                pool.on_session_served();
                if pool.target() == 1 {
                    assert!((8..100).contains(&sessions), "after {sessions}");
                    break;
                }
            }
        }
    }

    #[test]
    fn a_server_that_greets_gets_one_connection_first_and_none_once_it_has_ended_that() {
        for (limit, ended) in [(SECOND, 1), (10 * SECOND, 1), (20 * SECOND, 4)] {
            let now = Instant::now();
            let mut pool = Pool::new(&PoolConfig { min_idle: 4, ..config() }, now);
            pool.on_greeting(now);
            assert_eq!(end_logins(&mut pool, now, limit, 100), ended, "{limit:?}");
            assert_eq!(pool.target(), 0);
        }
    }

    #[test]
    fn a_server_that_greets_and_waits_gets_all() {
        let now = Instant::now();
        let mut pool = Pool::new(&PoolConfig { min_idle: 4, ..config() }, now);
        pool.on_greeting(now);
        let config = pool.config.clone();
        pool.config = PoolConfig { idle_timeout: None, ..config };
        assert_eq!(fill(&mut pool, &mut 0, now, ALONE_FOR), [1]);
        fill(&mut pool, &mut 1, now + ALONE_FOR, SECOND);
        assert_eq!(pool.idle(), 4);
    }

    #[test]
    fn a_server_that_is_restarted_over_and_over_is_kept_warm() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut now = Instant::now();
        let mut pool = Pool::new(&config(), now);
        let mut next = 0;
        for _ in 0..10 {
            fill(&mut pool, &mut next, now, 2 * SECOND);
            now += 2 * SECOND;
            assert_eq!(pool.idle(), 2);
            for age in [2, 1] {
                pool.on_died(conn(next - age), now, &mut rng);
            }
            now += 100 * MS;
        }
        assert_eq!(pool.target(), 2);
    }

    #[test]
    fn the_oldest_is_taken_first_and_replaced() {
        let now = Instant::now();
        let mut pool = warmed(now, 2);
        assert_eq!(pool.checkout(now), Some((conn(0), now)));
        assert_eq!(pool.shortage(ALL, now), 1);
        pool.remove(conn(1));
        assert_eq!(pool.shortage(ALL, now), 2);
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
        assert_eq!(pool.shortage(ALL, later), 0);
    }

    #[test]
    fn old_connections_are_replaced_but_not_all_at_once() {
        let now = Instant::now();
        let mut pool = warmed(now, 2);
        assert_eq!(pool.expire(now + 89 * SECOND), None);
        let first = (90..=110).find(|&s| pool.expire(now + s * SECOND).is_some());
        assert!(first.is_some_and(|s| s < 110), "the first goes at {first:?}");
        assert_eq!(pool.idle(), 1, "their ages are spread");
        assert_eq!(pool.shortage(ALL, now + 100 * SECOND), 1);
    }

    #[test]
    fn failures_back_off_and_one_connect_tries_the_way() {
        let mut rng = fastrand::Rng::with_seed(1);
        let now = Instant::now();
        let mut pool = warmed(now, 0);
        pool.on_connecting();
        pool.on_connect_failed(now, &mut rng);
        assert_eq!(pool.shortage(ALL, now), 0);
        let later = now + 2 * BACKOFF_MIN;
        assert_eq!(pool.shortage(ALL, later), 1);
        pool.on_connecting();
        assert!(pool.on_connected(conn(7), false, later, &mut rng));
        assert_eq!(pool.shortage(ALL, later), 0, "one at a time");
        assert_eq!(pool.shortage(ALL, later + 2 * ROUND), 1);
    }

    #[test]
    fn lent_connections_come_back_and_the_latest_is_lent_first() {
        let now = Instant::now();
        let mut pool = Pool::new(&PoolConfig { mode: PoolMode::Request, ..config() }, now);
        let mut rng = fastrand::Rng::with_seed(1);
        assert_eq!(pool.shortage(ALL, now), 1, "the minimum, one first");
        pool.want(9);
        assert_eq!(pool.shortage(ALL, now), 4, "what waits, up to the size");
        pool.stop_wanting();
        for number in 0..3 {
            pool.on_connecting();
            assert!(pool.on_connected(conn(number), false, now, &mut rng));
        }
        let last = pool.acquire().unwrap();
        assert_eq!((last.conn, pool.in_use(), pool.room()), (conn(2), 1, 1));
        let first = pool.acquire().unwrap();
        assert_eq!(first.conn, conn(1));
        assert_eq!(pool.shortage(ALL, now), 0, "the minimum counts those in use");
        assert!(pool.release(last, now));
        assert_eq!(pool.acquire(), Some(last));
        pool.on_discarded();
        assert!(!pool.release(last, now + 200 * SECOND), "too old");
        assert_eq!((pool.in_use(), pool.idle(), pool.room()), (0, 1, 3));
    }

    #[test]
    fn connections_that_requests_share_are_kept_up_to_the_size_and_no_further() {
        let now = Instant::now();
        let mut rng = fastrand::Rng::with_seed(1);
        let few = PoolConfig { mode: PoolMode::Request, min_idle: 0, max_idle: 1, ..config() };
        let mut pool = Pool::new(&few, now);
        for number in 0..4 {
            pool.on_connecting();
            assert!(pool.on_connected(conn(number), false, now, &mut rng), "four requests wait");
        }
        let in_use: Vec<_> = std::iter::from_fn(|| pool.acquire()).collect();
        pool.on_connecting();
        assert!(!pool.on_connected(conn(4), false, now, &mut rng), "a probe is one too many");
        for taken in in_use {
            assert!(pool.release(taken, now), "others may wait");
        }
        assert_eq!((pool.idle(), pool.room()), (4, 0));
    }

    #[test]
    fn a_backend_that_closes_after_it_has_served_is_connected_to_again() {
        let now = Instant::now();
        let mut pool = Pool::new(&PoolConfig { mode: PoolMode::Request, ..config() }, now);
        let mut rng = fastrand::Rng::with_seed(1);
        pool.on_connecting();
        assert!(pool.on_connected(conn(0), false, now, &mut rng));
        let taken = pool.acquire().unwrap();
        assert!(pool.release(Taken { served: true, ..taken }, now));
        assert!(!pool.on_died(taken.conn, now, &mut rng));
        pool.want(1);
        assert!(pool.shortage(ALL, now) > 0, "it is well");
    }

    #[test]
    fn a_backend_that_accepts_only_to_close_is_not_stormed() {
        let mut rng = fastrand::Rng::with_seed(1);
        let start = Instant::now();
        let mut pool = Pool::new(&config(), start);
        let mut connects = 0;
        for millisecond in 0..10_000 {
            let now = start + Duration::from_millis(millisecond);
            for _ in 0..pool.shortage(ALL, now) {
                connects += 1;
                pool.on_connecting();
                assert!(pool.on_connected(conn(connects), false, now, &mut rng));
                assert!(pool.on_died(conn(connects), now, &mut rng), "it is no good");
            }
            pool.expire(now);
        }
        assert!((10..30).contains(&connects), "{connects} connects in ten seconds");
    }
}
