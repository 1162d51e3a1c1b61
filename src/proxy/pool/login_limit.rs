//! Servers that end what is not used.
//!
//! Some servers limit the time for a login, and some count logins that did not come to their end,
//! until they lock the host out. There, connections kept idle do harm. A pool learns it: if those
//! that were never used are ended by the server at about the same age, at different moments, it
//! keeps ever fewer, down to none. It keeps more again as sessions come, more slowly each time it had
//! to learn.
//!
//! With a server that speaks first, as those do that count, it keeps one only, until one has been kept
//! unused for longer than such a server waits. If that is ended, it keeps none, and later one at most:
//! a burst of sessions would otherwise leave dozens to be ended and counted, one after the other.

use std::time::{Duration, Instant};

/// No server ends a login sooner: a second is the least of `PostgreSQL`'s setting.
pub(super) const LOGIN_TIME_MIN: Duration = Duration::from_millis(950);
/// Ends within this time have one cause.
const SAME_MOMENT: Duration = Duration::from_millis(30);
/// Connections whose ages differ by less than this were made together, and one limit ends both at
/// the same moment.
const MADE_TOGETHER: Duration = Duration::from_millis(50);
/// A server that speaks first has to leave one connection alone for so long before more are kept:
/// longer than `MySQL` gives a login by default.
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
    /// Whether the server speaks first, and what it does then.
    greets: Greets,
}

/// Whether a server speaks first, as those do that count logins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Greets {
    /// It was not heard to.
    No,
    /// It does. How long it waits for a login is not known yet.
    Yes,
    /// It does, and has left a connection alone for [`ALONE_FOR`].
    AndWaits,
    /// It does, and has ended one that was not used.
    AndEnds,
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
            greets: Greets::No,
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
    pub(super) fn on_greeting(&mut self) {
        if self.greets == Greets::No {
            self.greets = Greets::Yes;
        }
    }

    /// A connection that was never used is so old.
    pub(super) fn on_kept(&mut self, age: Duration) {
        if self.greets == Greets::Yes && age >= ALONE_FOR {
            self.greets = Greets::AndWaits;
        }
    }

    /// A session is served by a pool of `idle_max`. Where fewer are kept than could be, one more will
    /// be after some of them.
    pub(super) fn on_session_served(&mut self, idle_max: usize) {
        let most = if self.greets == Greets::AndEnds { idle_max.min(1) } else { idle_max };
        if self.ceiling >= most {
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
    pub(super) fn unneeded_max(&self) -> usize {
        match self.greets {
            _ if self.unused.is_some() => 0,
            Greets::Yes => 1,
            Greets::No | Greets::AndWaits | Greets::AndEnds => usize::MAX,
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
        let greets = self.greets != Greets::No;
        if self.alike >= 2 || greets {
            self.ceiling = if greets { 0 } else { kept / 2 };
            if greets {
                self.greets = Greets::AndEnds;
            }
            self.sessions_per_step = (2 * self.sessions_per_step).min(SESSIONS_PER_STEP_MAX);
            self.sessions_left = self.sessions_per_step;
        }
    }
}
