//! How many clients a worker lets in.
//!
//! The limit is the process's, and the workers do not ask each other before they accept: each takes
//! at most its share of what is left as it looks.
//!
//! ```text
//! Open ◀──free places──▶ Full           any ──accepting failed──▶ nobody is let in until a place
//!  └──too few for all──▶ OthersTurn ──▶                           becomes free, or RETRY_AFTER
//! ```

use std::time::{Duration, Instant};

use super::WorkerId;

/// After a failed accept, the next is tried when a session ends, or after this.
pub const RETRY_AFTER: Duration = Duration::from_millis(100);
/// The last free places for sessions are offered to one worker after the other, so long each.
pub const ROTATION: Duration = Duration::from_millis(50);
/// With fewer free places per worker than this, each takes one client per turn: the others may be
/// taking the same places at that moment, and then the limit is exceeded by one per worker at most.
const FREE_SHORT: usize = 64;
/// One of so many places is kept: enough for other routes to begin with, and little for one that is
/// alone in being used.
const KEPT_OF: usize = 8;

/// What a worker sees of the process as it looks.
#[derive(Debug, Clone, Copy)]
pub struct View {
    /// Places for sessions that are free, for all workers together.
    pub free: usize,
    /// How many workers there are.
    pub workers: usize,
    /// Which of them looks.
    pub worker: WorkerId,
    /// For how long the process has run.
    pub alive: Duration,
    /// There is somewhere to send a client.
    pub serves: bool,
    /// Of the places, how each route is to come by some.
    pub parts: Parts,
}

/// How the places are parted among the routes: any of them may have most, and none all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Parts {
    /// The last free places are kept for routes that have less than an equal part.
    kept: usize,
    equal: usize,
}

impl Parts {
    /// Of so many places for so many routes. Of few places none is kept.
    pub fn new(places: usize, routes: usize) -> Self {
        let kept = if routes > 1 { places / KEPT_OF } else { 0 };
        Self { kept, equal: places / routes }
    }

    /// Whether no more than what is kept is free.
    pub fn is_short(&self, free: usize) -> bool {
        self.kept > 0 && free <= self.kept
    }

    /// Whether a route that has taken so many has its part.
    pub fn has_part(&self, taken: usize) -> bool {
        taken >= self.equal
    }
}

impl View {
    /// How many clients the worker may let in. Of a remainder some workers get one each, in turns, so
    /// that nobody's clients wait for ever.
    fn share(&self) -> usize {
        // What is kept is not given away before it is looked at again who takes it.
        let free =
            if self.parts.is_short(self.free) { self.free } else { self.free - self.parts.kept };
        let first = (self.alive.as_millis() / ROTATION.as_millis()) as usize;
        let gets_one = (usize::from(self.worker) + first) % self.workers < free % self.workers;
        let share = free / self.workers + usize::from(gets_one);
        let is_short = free < FREE_SHORT * self.workers;
        match () {
            () if !self.serves => 0,
            () if is_short => share.min(1),
            () => share,
        }
    }
}

/// How many clients to let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// So many.
    pub clients: usize,
    /// No place is free, which is news.
    pub has_filled: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// There are free places, and it is for other workers to fill them.
    OthersTurn,
    /// No place is free.
    Full,
}

/// What accepting is held up by.
#[derive(Debug, Default)]
pub struct Gate {
    /// At the latest look.
    state: State,
    /// A failed accept is tried again from then on.
    retry_at: Option<Instant>,
}

impl Gate {
    /// How many clients may be let in now.
    pub fn look(&mut self, view: &View, now: Instant) -> Share {
        if !self.may_try(now) {
            return Share { clients: 0, has_filled: false };
        }
        let clients = view.share();
        let was_full = self.state == State::Full;
        self.state = match (view.free, clients) {
            (0, _) => State::Full,
            (_, 0) => State::OthersTurn,
            _ => State::Open,
        };
        Share { clients, has_filled: self.state == State::Full && !was_full }
    }

    /// Whether a failed accept is far enough back, if there was any.
    pub fn may_try(&mut self, now: Instant) -> bool {
        self.retry_at = self.retry_at.filter(|&at| now < at);
        self.retry_at.is_none()
    }

    /// Accepting failed.
    pub fn on_failed(&mut self, now: Instant) {
        self.retry_at = Some(now + RETRY_AFTER);
    }

    /// A place has become free: what it held may be what accepting lacked.
    pub fn on_place_free(&mut self) {
        self.retry_at = None;
    }

    /// When to look again for a failed accept.
    pub fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Whether to look again soon: nobody tells when other workers' places become free.
    pub fn waits_for_others(&self) -> bool {
        self.state != State::Open
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(worker: usize, workers: usize, free: usize) -> View {
        let (worker, alive) = (WorkerId::new(worker), Duration::ZERO);
        View { free, workers, worker, alive, serves: true, parts: Parts::new(free, 1) }
    }

    fn shares(workers: usize, free: usize, alive: Duration) -> Vec<usize> {
        let share = |worker| View { alive, ..view(worker, workers, free) }.share();
        (0..workers).map(share).collect()
    }

    #[test]
    fn the_shares_of_all_workers_are_what_is_free() {
        assert_eq!(shares(1, 1000, Duration::ZERO), [1000]);
        assert_eq!(shares(3, 1000, Duration::ZERO), [334, 333, 333]);
        for workers in [1, 2, 3, 16] {
            let free = FREE_SHORT * workers + 5;
            assert_eq!(shares(workers, free, Duration::ZERO).iter().sum::<usize>(), free);
        }
    }

    #[test]
    fn the_last_places_go_round() {
        assert_eq!(shares(3, 64 * 3 - 1, Duration::ZERO), [1, 1, 1], "one each per turn");
        assert_eq!(shares(3, 1, Duration::ZERO), [1, 0, 0]);
        assert_eq!(shares(3, 1, ROTATION), [0, 0, 1]);
        assert_eq!(shares(3, 1, 2 * ROTATION), [0, 1, 0]);
    }

    #[test]
    fn the_last_places_are_for_routes_with_less_than_their_part() {
        let parts = Parts::new(80, 2);
        let let_in = |free| View { parts, ..view(0, 1, free) }.share();
        assert_eq!([80, 11, 10, 1, 0].map(let_in), [70, 1, 1, 1, 0]);
        assert_eq!([11, 10, 0].map(|free| parts.is_short(free)), [false, true, true]);
        assert_eq!([39, 40].map(|taken| parts.has_part(taken)), [false, true]);
        for (places, routes) in [(80, 1), (7, 2)] {
            assert!(!Parts::new(places, routes).is_short(0), "none is kept");
        }
    }

    #[test]
    fn that_the_limit_is_reached_is_news_once() {
        let (mut gate, now) = (Gate::default(), Instant::now());
        let mut look = |free| {
            let share = gate.look(&view(1, 2, free), now);
            (share.clients, share.has_filled, gate.waits_for_others())
        };
        assert_eq!(look(2), (1, false, false));
        assert_eq!(look(1), (0, false, true), "it is the other one's turn");
        assert_eq!(look(0), (0, true, true));
        assert_eq!(look(0), (0, false, true));
        assert_eq!(look(2), (1, false, false));
        assert_eq!(look(0), (0, true, true));
    }

    #[test]
    fn nobody_is_let_in_before_there_is_somewhere_to_send_him() {
        let (mut gate, now) = (Gate::default(), Instant::now());
        let share = gate.look(&View { serves: false, ..view(0, 1, 9) }, now);
        assert_eq!(share, Share { clients: 0, has_filled: false });
        assert!(gate.waits_for_others());
    }

    #[test]
    fn a_failed_accept_is_tried_again_after_a_while_or_once_a_place_is_free() {
        let (mut gate, now) = (Gate::default(), Instant::now());
        let clients = |gate: &mut Gate, now| gate.look(&view(0, 1, 9), now).clients;
        gate.on_failed(now);
        assert_eq!(gate.retry_at(), Some(now + RETRY_AFTER));
        assert_eq!(clients(&mut gate, now + RETRY_AFTER / 2), 0);
        assert_eq!(clients(&mut gate, now + RETRY_AFTER), 1);
        gate.on_failed(now);
        gate.on_place_free();
        assert_eq!(clients(&mut gate, now), 1);
    }
}
