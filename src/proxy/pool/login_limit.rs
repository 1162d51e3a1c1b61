//! Servers that end what is not used.
//!
//! Some servers limit the time for a login, and some count logins that did not come to their end,
//! until they lock the host out. There, connections kept idle do harm. A pool learns it: if those
//! that were never used are ended by the server at about the same age, at different moments, it
//! keeps ever fewer, down to none. With a server that speaks first, as those do that count, it learns
//! from the first one, and keeps only that one for a while to begin with. It keeps more again as
//! sessions come, more slowly each time it had to learn.

use std::time::{Duration, Instant};

/// No server ends a login sooner: a second is the least of `PostgreSQL`'s setting.
pub(super) const LOGIN_TIME_MIN: Duration = Duration::from_millis(950);
/// Ends within this time have one cause.
const SAME_MOMENT: Duration = Duration::from_millis(30);
/// Connections whose ages differ by less than this were made together, and one limit ends both at
/// the same moment.
const MADE_TOGETHER: Duration = Duration::from_millis(50);
/// With a server that speaks first, one connection is kept alone for so long to begin with: longer
/// than `MySQL` gives a login by default.
pub(super) const ALONE_FOR: Duration = Duration::from_secs(11);
/// Sessions for which one connection more is kept, where fewer are kept than could be: at first,
const SESSIONS_PER_STEP_MIN: u32 = 4;
/// and at most, after it had to learn several times.
const SESSIONS_PER_STEP_MAX: u32 = 256;

/// The server has ended connections that were never used.
#[derive(Debug, Clone, Copy)]
struct Unused {
    at: Instant,
    made: Instant,
    /// They were made at different times, so it is not their age.
    mixed: bool,
}

/// What is known of a server's limit for logins.
#[derive(Debug)]
pub(super) struct LoginLimit {
    /// More than so many are not kept: the server ends them unused.
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

impl LoginLimit {
    /// Nothing is known yet.
    pub(super) fn new() -> Self {
        Self {
            ceiling: usize::MAX,
            alike: 0,
            unused: None,
            unused_age: None,
            sessions_left: SESSIONS_PER_STEP_MIN,
            sessions_per_step: SESSIONS_PER_STEP_MIN,
            greets_since: None,
        }
    }

    /// More connections than so many are not kept.
    pub(super) fn ceiling(&self) -> usize {
        self.ceiling
    }

    /// One that is older is about to be ended, and would leave no time for a login.
    pub(super) fn usable_age_max(&self) -> Duration {
        self.unused_age.map_or(Duration::MAX, |age| age / 4 * 3)
    }

    /// The server has spoken on a connection that was not used yet.
    pub(super) fn on_greeting(&mut self, now: Instant) {
        self.greets_since.get_or_insert(now);
    }

    /// A session is served by a pool of `idle_max`. Where fewer are kept than could be, one more will
    /// be after some of them.
    pub(super) fn on_session_served(&mut self, idle_max: usize) {
        if self.ceiling >= idle_max {
            return;
        }
        self.sessions_left = self.sessions_left.saturating_sub(1);
        if self.sessions_left == 0 {
            self.ceiling += 1;
            self.sessions_left = self.sessions_per_step;
        }
    }

    /// Connections that nobody waits for which there may be, idle or being made: it may not be known
    /// yet whether they would only be ended again.
    pub(super) fn unneeded_max(&self, now: Instant) -> usize {
        let alone = |since: Instant| now.saturating_duration_since(since) < ALONE_FOR;
        if self.unused.is_some() {
            0
        } else if self.greets_since.is_some_and(alone) {
            1
        } else {
            usize::MAX
        }
    }

    /// The server has ended a connection made at `made` that was never used; `kept` are aimed at.
    pub(super) fn on_ended_unused(&mut self, made: Instant, kept: usize, now: Instant) {
        self.judge(kept, now);
        let before = self.unused.get_or_insert(Unused { at: now, made, mixed: false });
        let earlier = before.made.min(made);
        before.mixed |= before.made.max(made).saturating_duration_since(earlier) >= MADE_TOGETHER;
    }

    /// Whether the server ends connections because they were not used for so long. One that is
    /// restarted ends all of them, whatever their age.
    pub(super) fn judge(&mut self, kept: usize, now: Instant) {
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
            self.ceiling = kept / 2;
            self.sessions_per_step = (2 * self.sessions_per_step).min(SESSIONS_PER_STEP_MAX);
            self.sessions_left = self.sessions_per_step;
        }
    }
}
