//! The connections of one worker to one endpoint: those that are idle, and how many there are else.
//!
//! `preconnect`, right for any protocol: a session takes the oldest idle connection, and a new one
//! is made in the background. The pool aims at a target between its bounds: it grows by one for
//! each session that found the pool empty and was served by a connection made for it, and shrinks
//! one by one as connections sit idle for too long. Attempts that fail are no demand.
//!
//! Where connections are used again, they come back, and the latest one back is the next one
//! acquired, so that those that are not needed grow old. New ones are made while requests wait, up
//! to the pool's size.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`policy`] | what is kept, by the pool's mode |
//! | [`pacing`] | when connects that nobody waits for may be started |
//! | [`login_limit`] | servers that end what is not used |

mod login_limit;
mod pacing;
mod policy;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::config::PoolConfig;
use crate::io::ConnId;
use crate::limits;
use crate::metrics::Discard;
use login_limit::{LOGIN_TIME_MIN, LoginLimit};
use pacing::Pacing;
use policy::Policy;

/// A connection that has been open for so long, or has served, shows that the backend is well.
/// Less than any server gives a login.
const PROVEN_AFTER: Duration = Duration::from_millis(500);

#[derive(Debug)]
struct Idle {
    conn: ConnId,
    made: Instant,
    since: Instant,
    retire_at: Option<Instant>,
    /// It was in use before.
    served: bool,
    /// See [`Taken::unread`].
    unread: bool,
}

/// A connection that was taken from the pool to be used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The connection.
    pub conn: ConnId,
    /// When it was made.
    pub made: Instant,
    /// When it is too old to be kept.
    pub retire_at: Option<Instant>,
    /// It was in use before, and answered.
    pub served: bool,
    /// Its backend answered a request before it had read all of it, and may still be reading.
    pub unread: bool,
}

/// How many connections there are, by what becomes of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// They wait for whoever is next.
    pub idle: usize,
    /// They are being made, for the pool.
    pub connecting: usize,
    /// They have a session or a client; `preconnect`: those still being made for one included.
    pub in_use: usize,
}

/// The connections of one worker to one endpoint. Those methods that change how many there are can
/// be called by the table of endpoints alone, which keeps the sums.
#[derive(Debug)]
pub struct Pool {
    config: PoolConfig,
    policy: Policy,
    idle: VecDeque<Idle>,
    connecting: usize,
    in_use: usize,
    /// Connections that requests wait for and that are still to be made.
    wanted: usize,
    target: usize,
    pacing: Pacing,
    login: LoginLimit,
}

impl Pool {
    /// An empty pool that aims at its minimum.
    pub fn new(config: &PoolConfig, now: Instant) -> Self {
        Self {
            policy: Policy::of(config),
            idle: VecDeque::with_capacity(config.most()),
            connecting: 0,
            in_use: 0,
            wanted: 0,
            target: config.min_idle,
            pacing: Pacing::new(config.min_idle, now),
            login: LoginLimit::new(),
            config: config.clone(),
        }
    }

    /// How many connections there are.
    pub fn counts(&self) -> Counts {
        Counts { idle: self.idle.len(), connecting: self.connecting, in_use: self.in_use }
    }

    /// Whether its connections serve more than one client.
    pub fn reuses(&self) -> bool {
        self.policy.reuses()
    }

    /// A session takes its place, `preconnect`. With it come the oldest idle connection, if there is
    /// one, and when that was made.
    pub(super) fn enter(&mut self, now: Instant) -> Option<(ConnId, Instant)> {
        self.in_use += 1;
        let at = self.next_idle(now)?;
        self.idle.remove(at).map(|idle| (idle.conn, idle.made))
    }

    fn next_idle(&self, now: Instant) -> Option<usize> {
        let age_max = self.login.usable_age_max();
        self.idle.iter().position(|idle| now.saturating_duration_since(idle.made) < age_max)
    }

    /// Sets how many are in use.
    #[cfg(test)]
    pub(super) fn set_in_use(&mut self, count: usize) {
        self.in_use = count;
    }

    /// What was in use is gone.
    pub(super) fn leave(&mut self) {
        self.in_use -= 1;
    }

    /// A session that had found no idle connection is served by one that was made for it.
    pub fn on_miss_served(&mut self) {
        if !self.pacing.is_recovering() {
            self.target = (self.target + 1).min(self.config.max_idle);
        }
    }

    /// A session is served.
    pub fn on_session_served(&mut self) {
        self.login.on_session_served(self.config.most());
    }

    /// The server has spoken on a connection that was not used yet.
    pub fn on_greeting(&mut self) {
        self.login.on_greeting();
    }

    /// When an idle connection was made.
    pub fn made(&self, conn: ConnId) -> Option<Instant> {
        self.idle.iter().find(|idle| idle.conn == conn).map(|idle| idle.made)
    }

    /// A byte has come from the endpoint on a connection made at `made`: it is well.
    pub fn on_proven(&mut self, made: Instant) {
        self.pacing.on_proven(made);
    }

    /// The connection that the next session would take.
    pub fn oldest_conn(&self, now: Instant) -> Option<ConnId> {
        self.next_idle(now).map(|at| self.idle[at].conn)
    }

    /// The connection that would be acquired next.
    pub fn latest_conn(&self) -> Option<ConnId> {
        self.idle.back().map(|idle| idle.conn)
    }

    /// Takes the connection that came back last; it is to come back or to be reported as gone.
    pub(super) fn acquire(&mut self) -> Option<Taken> {
        let Idle { conn, made, retire_at, served, unread, .. } = self.idle.pop_back()?;
        self.in_use += 1;
        self.on_session_served();
        Some(Taken { conn, made, retire_at, served, unread })
    }

    /// A connection comes back. Says whether it is kept.
    #[must_use = "a connection that is not kept is to be closed"]
    pub(super) fn release(&mut self, taken: Taken, now: Instant) -> bool {
        self.in_use -= 1;
        let Taken { conn, made, retire_at, served, unread } = taken;
        if !self.policy.keeps_one_more(self.counts()) || retire_at.is_some_and(|at| at <= now) {
            return false;
        }
        self.idle.push_back(Idle { conn, made, since: now, retire_at, served, unread });
        true
    }

    /// Takes an idle connection out that was made before this moment, to be closed.
    pub(super) fn evict_made_before(&mut self, at: Instant) -> Option<ConnId> {
        let old = self.idle.iter().position(|idle| idle.made < at)?;
        self.idle.remove(old).map(|idle| idle.conn)
    }

    /// How many more connections there may be.
    pub fn room(&self) -> usize {
        self.policy.room(self.counts())
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
        self.pacing.backs_off(now)
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
        let parallel = self.pacing.parallel_max().saturating_sub(self.connecting);
        let pooled = self.idle.len() + self.connecting;
        let there = if self.policy.reuses() { self.in_use + pooled } else { pooled };
        let unneeded = self.target().min(share).saturating_sub(there).min(self.unneeded_max(now));
        self.wanted.max(unneeded).min(parallel).min(self.room())
    }

    /// How many connects that nobody waits for may be started now.
    fn unneeded_max(&mut self, now: Instant) -> usize {
        let pooled = self.idle.len() + self.connecting;
        match self.login.unneeded_max() {
            usize::MAX => self.pacing.unneeded_max(self.connecting, now),
            most => most.saturating_sub(pooled),
        }
    }

    /// A connect for the pool was started.
    pub(super) fn on_connecting(&mut self) {
        self.wanted = self.wanted.saturating_sub(1);
        self.connecting += 1;
        self.pacing.on_connecting();
    }

    /// A connect for the pool succeeded. Says whether the connection is kept, which takes a place. One
    /// that `probes` the endpoint is kept for a while even where none are.
    #[must_use = "a connection that is not kept is to be closed"]
    pub(super) fn on_connected(
        &mut self,
        conn: ConnId,
        has_place: bool,
        probes: bool,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> bool {
        self.connecting -= 1;
        self.pacing.on_connected();
        let probes = probes && self.idle.is_empty() && !self.policy.reuses();
        let has_room = has_place && self.policy.keeps_one_more(self.counts());
        if !(has_room || probes) {
            return false;
        }
        // Ages are spread by a tenth either way, so that a pool is never renewed all at once.
        let spread = 0.9 + 0.2 * rng.f64();
        let retire_at = self.config.max_lifetime.map(|lifetime| now + lifetime.mul_f64(spread));
        let (served, unread) = (false, false);
        self.idle.push_back(Idle { conn, made: now, since: now, retire_at, served, unread });
        true
    }

    /// A connect for the pool failed; the next waits, longer each time.
    pub(super) fn on_connect_failed(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        self.connecting -= 1;
        self.on_failed(now, rng);
    }

    /// An idle connection ended or broke. A backend that accepts only to close is no better than
    /// one that refuses: says whether it has failed so.
    pub(super) fn on_died(&mut self, conn: ConnId, now: Instant, rng: &mut fastrand::Rng) -> bool {
        let died = self.idle.iter().position(|idle| idle.conn == conn);
        let Some(died) = died.and_then(|at| self.idle.remove(at)) else { return false };
        let age = now.saturating_duration_since(died.made);
        if !died.served && age >= LOGIN_TIME_MIN {
            self.login.on_ended_unused(died.made, self.aimed_at(), now);
        }
        // While others stay open the endpoint is well.
        let alone = self.idle.is_empty();
        if !died.served && age < PROVEN_AFTER {
            return self.on_failed(now, rng) && alone;
        }
        if alone {
            self.on_emptied(now, rng);
        }
        false
    }

    /// The connections that are kept, of which one may just have gone.
    fn aimed_at(&self) -> usize {
        self.target().min(self.idle.len() + 1)
    }

    /// The endpoint has failed: the next connect waits, and tries the way. Says whether it counts: of
    /// several failures at a time the first one does.
    pub fn on_failed(&mut self, now: Instant, rng: &mut fastrand::Rng) -> bool {
        self.pacing.on_failed(self.target(), now, rng)
    }

    /// The connections have been taken out because they are of no use any more.
    pub fn on_emptied(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        self.pacing.restart(self.target(), now, rng);
    }

    /// Takes an idle connection out that is not to be kept after all.
    pub(super) fn remove(&mut self, conn: ConnId) {
        self.idle.retain(|idle| idle.conn != conn);
    }

    /// The next connection to close because of its age, and why.
    pub(super) fn expire(&mut self, now: Instant) -> Option<(ConnId, Discard)> {
        self.login.judge(self.aimed_at(), now);
        if let Some(unused) = self.idle.iter().find(|idle| !idle.served) {
            self.login.on_kept(now.saturating_duration_since(unused.made));
        }
        if self.has_settled(PROVEN_AFTER, now) {
            self.pacing.on_settled();
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

    /// Takes every idle connection out, one a call, to be closed: the one that has been idle for
    /// longest first.
    pub(super) fn evict(&mut self) -> Option<ConnId> {
        self.idle.pop_front().map(|idle| idle.conn)
    }

    /// Idle connections now.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Connections being made.
    pub fn connecting(&self) -> usize {
        self.connecting
    }

    /// Connections that have a session or a client.
    pub fn in_use(&self) -> usize {
        self.in_use
    }

    /// How many idle connections it aims at.
    pub fn target(&self) -> usize {
        let target = if self.policy.reuses() { self.config.min_idle } else { self.target };
        target.min(self.login.ceiling())
    }

    /// Since when the oldest idle connection has been idle.
    pub fn oldest_since(&self) -> Option<Instant> {
        self.idle.front().map(|idle| idle.since)
    }

    /// For how long the oldest idle connection has been idle.
    pub fn oldest(&self, now: Instant) -> Option<Duration> {
        self.oldest_since().map(|since| now.saturating_duration_since(since))
    }
}
