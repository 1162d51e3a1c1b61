//! The room of one worker.

use crate::proxy::RouteId;

/// Counts what takes a place: sessions, clients, and connections that are being flushed. Each of the
/// first two has a slot in a slab of its own, and the slabs have as many slots each: so whatever was
/// let in has one, whatever becomes of it.
#[derive(Debug)]
pub(super) struct Places {
    slots: usize,
    /// By route.
    taken: Box<[Taken]>,
    /// One has become free since [`Places::take_freed`].
    freed: bool,
}

/// The places that a route has taken.
#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    /// Sessions and clients.
    served: usize,
    /// Connections that are closed once their peers have what was sent to them.
    flushing: usize,
}

impl Places {
    /// So many, all free, for so many routes.
    pub(super) fn new(slots: usize, routes: usize) -> Self {
        Self { slots, taken: vec![Taken::default(); routes].into(), freed: false }
    }

    /// Fewer slots than were reserved, for tests of what happens beyond them.
    #[cfg(test)]
    pub(super) fn limit_to(&mut self, slots: usize) {
        self.slots = slots;
    }

    /// How many there are.
    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    /// How many are taken.
    pub(super) fn taken(&self) -> usize {
        self.taken.iter().map(|taken| taken.served + taken.flushing).sum()
    }

    /// How many of them a route has taken.
    pub(super) fn taken_by(&self, route: RouteId) -> usize {
        let Taken { served, flushing } = self.taken[usize::from(route)];
        served + flushing
    }

    /// How many are free.
    pub(super) fn free(&self) -> usize {
        self.slots.saturating_sub(self.taken())
    }

    /// Those of a route's sessions and clients.
    pub(super) fn served_of(&self, route: RouteId) -> usize {
        self.taken[usize::from(route)].served
    }

    /// A session or a client of a route takes a place. Says whether there was one.
    pub(super) fn admit(&mut self, route: RouteId) -> bool {
        let admits = self.free() > 0;
        self.taken[usize::from(route)].served += usize::from(admits);
        admits
    }

    /// A session or a client of a route is gone. One of its connections may be flushed in its place: then that
    /// was counted before.
    pub(super) fn on_gone(&mut self, route: RouteId) {
        let taken = &mut self.taken[usize::from(route)];
        assert!(taken.served > 0, "one is gone that was not let in");
        taken.served -= 1;
        self.freed = true;
        debug_assert!(self.taken() <= self.slots, "one session leaves one connection at most");
    }

    /// A connection is being flushed.
    pub(super) fn on_flushing(&mut self, route: RouteId) {
        self.taken[usize::from(route)].flushing += 1;
    }

    /// A connection was flushed.
    pub(super) fn on_flushed(&mut self, route: RouteId) {
        let taken = &mut self.taken[usize::from(route)];
        assert!(taken.flushing > 0, "one was flushed that nobody counted");
        taken.flushing -= 1;
        self.freed = true;
    }

    /// Whether one has become free since this was asked before. What it held may be what accepting
    /// lacked.
    pub(super) fn take_freed(&mut self) -> bool {
        std::mem::take(&mut self.freed)
    }

    /// Checks that all that takes a place is counted, and nothing else.
    #[cfg(test)]
    pub(super) fn assert_invariants(&self, served: usize, flushing: usize) {
        let all_served: usize = self.taken.iter().map(|taken| taken.served).sum();
        assert_eq!(all_served, served, "places of sessions and clients");
        assert_eq!(self.taken() - all_served, flushing, "places of what is flushed");
        assert!(self.taken() <= self.slots, "more places are taken than there are");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: RouteId = RouteId::at(1);

    #[test]
    fn a_place_is_free_again_once_what_is_left_of_a_session_is_flushed() {
        let mut places = Places::new(2, 2);
        assert!(places.admit(A) && places.admit(A));
        assert!(!places.admit(A), "both are taken");
        assert!(!places.take_freed());
        places.on_flushing(A);
        places.on_gone(A);
        assert!(places.take_freed());
        assert_eq!((places.taken(), places.served_of(A)), (2, 1));
        assert!(!places.admit(A), "one is flushed");
        places.on_flushed(A);
        assert!(places.take_freed() && !places.take_freed());
        assert!(places.admit(A));
    }

    #[test]
    #[should_panic(expected = "was not let in")]
    fn nobody_is_gone_who_was_not_let_in() {
        Places::new(2, 2).on_gone(A);
    }
}
