//! How far a drain has come.

use std::time::{Duration, Instant};

use crate::proxy::RouteId;

/// Since when a worker lets clients leave, and how many are left of those that were there then.
#[derive(Debug)]
pub(super) struct Drain {
    since: Option<Instant>,
    /// By route.
    before: Box<[usize]>,
}

impl Drain {
    /// None yet, of so many routes.
    pub(super) fn new(routes: usize) -> Self {
        Self { since: None, before: vec![0; routes].into() }
    }

    /// The worker lets clients leave from now on; so many of each route are there.
    pub(super) fn begin(&mut self, served: impl Fn(RouteId) -> usize, now: Instant) {
        assert!(self.since.is_none(), "commands only move forward");
        self.since = Some(now);
        for (at, before) in self.before.iter_mut().enumerate() {
            *before = served(RouteId::at(at));
        }
    }

    /// When that began.
    pub(super) fn since(&self) -> Option<Instant> {
        self.since
    }

    /// A session or a client of a route is gone, of this age.
    pub(super) fn on_gone(&mut self, route: RouteId, age: Duration, now: Instant) {
        if self.since.is_some_and(|since| age > now.saturating_duration_since(since)) {
            let before = &mut self.before[usize::from(route)];
            *before = before.saturating_sub(1);
        }
    }

    /// How many of a route are left that were there when it began.
    pub(super) fn before(&self, route: RouteId) -> usize {
        self.before[usize::from(route)]
    }
}
