//! One worker's state: its parts, and what they are made of.

use std::sync::Arc;
use std::time::Instant;

use super::acceptor::Acceptor;
use super::contention::CoreTimes;
use super::context::Context;
use super::drain::Drain;
use super::ends::Ends;
use super::load::Load;
use super::mail::Mail;
use super::mailbox::{Command, Mailbox};
use super::owners::{Owners, Turns};
use super::places::Places;
use super::route::Route;
use super::tap::Tap;
use super::timers::Timers;
use crate::config::Config;
use crate::io::Driver;
use crate::limits;
use crate::listening::Listening;
use crate::metrics::WorkerStats;
use crate::proxy::admission::Parts;
use crate::proxy::retry_budget::Reserve;
use crate::proxy::{RouteId, WorkerId};

/// What an engine needs, apart from its driver.
#[derive(Debug)]
pub struct EngineSetup {
    /// Which worker it is.
    pub worker: WorkerId,
    /// The configuration.
    pub config: Arc<Config>,
    /// The routes of the driver's listeners.
    pub listener_routes: Box<[RouteId]>,
    /// Sessions at a time in the whole process.
    pub sessions_max: usize,
    /// Connections of its pools, idle or being made.
    pub pool_conns_max: usize,
    /// The mailboxes of all workers, its own at its number.
    pub mailboxes: Arc<[Arc<Mailbox>]>,
    /// The counters of all workers, its own at its number.
    pub stats: Arc<[Arc<WorkerStats>]>,
    /// Where it tells of those that have ended.
    pub ends: Arc<Ends>,
    /// What retries need no requests, of each route.
    pub retry_reserves: Arc<[Arc<Reserve>]>,
    /// When the process started.
    pub started: Instant,
    /// Where backends cannot be.
    pub listening: Listening,
    /// How long the worker waits for its core.
    pub core_times: CoreTimes,
    /// Of the random numbers; equal seeds behave alike.
    pub seed: u64,
}

/// One worker's state, bound to a driver.
pub struct Engine<D> {
    pub(super) cx: Context<D>,
    pub(super) acceptor: Acceptor,
    pub(super) mail: Mail,
    /// By their numbers.
    pub(super) routes: Box<[Route]>,
    pub(super) upkeep_at: Instant,
    pub(super) network_turns: Turns,
}

impl<D: Driver> Engine<D> {
    /// An engine without endpoints: the first snapshot of each route brings its own.
    pub fn new(mut driver: D, setup: EngineSetup) -> Self {
        driver.buffers().reserve(limits::buffers_reserved(setup.sessions_max));
        let now = driver.now();
        let conns_max = limits::conns_max(setup.sessions_max);
        let EngineSetup { worker, .. } = setup;
        let cx = Context {
            worker,
            stats: Arc::clone(&setup.stats[usize::from(worker)]),
            ends: setup.ends,
            owners: Owners::with_capacity(conns_max),
            timers: Timers::new(conns_max, now),
            rng: fastrand::Rng::with_seed(setup.seed),
            now,
            started: setup.started,
            command: Command::Run,
            places: Places::new(
                limits::sessions_of_worker_max(setup.sessions_max),
                setup.config.routes.len(),
            ),
            load: Load::new(now, setup.core_times),
            drain: Drain::new(setup.config.routes.len()),
            calls: Vec::with_capacity(limits::WORKERS_MAX),
            tap: Tap::default(),
            driver,
        };
        // Any worker may have all of a route's.
        let routes = setup.config.routes.iter();
        let needs: Vec<_> =
            routes.map(|route| route.pool_conns().min(limits::POOL_CONNS_MAX)).collect();
        let conns_max = parts(setup.pool_conns_max, &needs);
        let routes = (0..setup.config.routes.len()).map(|at| {
            let listening = setup.listening.clone();
            let reserve = Arc::clone(&setup.retry_reserves[at]);
            Route::new(RouteId::at(at), &setup.config, &cx, conns_max[at], listening, reserve)
        });
        let routes = routes.collect();
        Self {
            acceptor: Acceptor::new(
                setup.sessions_max,
                setup.listener_routes,
                Parts::new(setup.sessions_max, setup.config.routes.len()),
            ),
            mail: Mail::new(worker, setup.mailboxes, setup.stats),
            routes,
            upkeep_at: now,
            network_turns: Turns::default(),
            cx,
        }
    }

    /// The engine's driver, for tests.
    pub fn driver(&mut self) -> &mut D {
        &mut self.cx.driver
    }

    /// Sessions that wait for an endpoint.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.routes.iter().map(Route::waiting).sum()
    }

    /// What it counts, for tests.
    #[cfg(test)]
    pub(super) fn stats(&self) -> &WorkerStats {
        &self.cx.stats
    }

    /// Open sessions, and what is left of some that have ended.
    pub fn sessions(&self) -> usize {
        self.cx.places.taken()
    }
}

/// Parts a number among those who need so many each: equally, and none gets more than it needs while
/// others need more. What is left over goes to who needs most.
fn parts(total: usize, needs: &[usize]) -> Box<[usize]> {
    let mut by_need: Vec<_> = (0..needs.len()).collect();
    by_need.sort_by_key(|&at| needs[at]);
    let (mut parts, mut left) = (vec![0; needs.len()], total);
    for (before, &at) in by_need.iter().enumerate() {
        let equal = left / (needs.len() - before);
        let is_last = before + 1 == needs.len();
        parts[at] = if is_last { left } else { needs[at].min(equal) };
        left -= parts[at];
    }
    parts.into()
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[test]
    fn who_needs_less_than_an_equal_part_leaves_the_rest_to_the_others() {
        for (total, needs, expected) in [
            (64, &[64][..], &[64][..]),
            (64, &[64, 0, 0, 0], &[64, 0, 0, 0]),
            (90, &[100, 10, 100], &[40, 10, 40]),
            (16, &[4096, 4096], &[8, 8]),
            (9, &[2, 3], &[2, 7]),
            (0, &[2, 3], &[0, 0]),
        ] {
            assert_eq!(*parts(total, needs), *expected, "{total} for {needs:?}");
        }
    }
}
