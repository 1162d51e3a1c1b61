//! Several workers that share the places of endpoints: never one connection too many, and nobody waits
//! for what is there.
//!
//! Each worker has a network and a clock of its own. The one that is behind goes on, and sleeps until it
//! is a little ahead of the others at most, so what one does the others notice as late as threads would.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Run, SECOND, run_seeds};
use crate::config::{Config, PoolMode, Protocol};
use crate::io::Driver;
use crate::io::sim::lines::LINE_MAX;
use crate::io::sim::{Reachability, Speech};
use crate::limits;
use crate::metrics::CloseReason;
use crate::worker::mailbox::Command;

/// A worker is ahead of the others by so much at most.
const AHEAD_MAX_US: u64 = 20_000;
/// What a worker does not do at once, or misses the call for, it does when it looks after everything; or so
/// long after a stop of the process.
const LOOK_AFTER: Duration = Duration::from_millis(350);
/// What is idle goes to who waits, be it after a turn; a worker's turn is over by then, too.
const IDLE_MAX: Duration = Duration::from_millis(600);

/// With one other worker, which asks this one: what it is to close for that one it closes
/// as soon as it looks up.
const OVERDUE_MAX: Duration = Duration::from_millis(25);

/// What must not last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Lasting {
    /// Somebody waits at a worker that could serve them.
    InVain,
    /// Somebody waits for a place, and another worker has an idle connection.
    BesideIdle,
}

/// The workers of one process.
struct Workers {
    runs: Vec<Run>,
    rng: fastrand::Rng,
    max: usize,
    /// By worker and endpoint.
    since: HashMap<(usize, usize, Lasting), Duration>,
}

impl Workers {
    fn new(seed: u64, mode: PoolMode) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut config = Config::from_vars(std::iter::empty()).expect("defaults are valid");
        let route = Arc::make_mut(&mut config.routes[0]);
        let max = rng.usize(1..6);
        route.pool.mode = mode;
        route.pool.min_idle = rng.usize(..3);
        route.pool.max_idle = route.pool.min_idle + rng.usize(..4);
        route.pool.endpoint_max = Some(max);
        route.endpoint_wait = 30 * SECOND;
        // Whoever stalls holds a place for no longer.
        route.idle_timeout = Some(2 * SECOND);
        route.requests.queue_timeout = 600 * SECOND;
        route.requests.timeout = Some(2 * SECOND);
        route.requests.line_max = LINE_MAX;
        let speech = match mode {
            PoolMode::Preconnect => Speech::Bytes,
            PoolMode::Session | PoolMode::Request => {
                route.protocol = Protocol::Chronos;
                Speech::Lines
            }
        };
        let (count, clients) = ([2, 2, 2, 3, 3, 8, 8, 32][rng.usize(..8)], rng.usize(1..40));
        let buffers = limits::buffers_max(clients);
        let mut runs = Run::workers(rng.fork(), config, clients, buffers, count);
        // All come to one of them, or some to each.
        let busy = rng.bool().then(|| rng.usize(..count));
        for run in &mut runs {
            run.engine.driver().speech = speech;
            let all = run.endpoints.clone();
            run.deliver(all);
        }
        for _ in 0..clients {
            let at = busy.filter(|_| rng.u8(..8) > 0).unwrap_or_else(|| rng.usize(..count));
            let delay = Duration::from_millis(rng.u64(..3_000));
            runs[at].engine.driver().add_client(delay);
        }
        Self { runs, rng, max, since: HashMap::new() }
    }

    fn elapsed(&mut self, at: usize) -> Duration {
        self.runs[at].engine.driver().elapsed()
    }

    /// The worker that is behind all others, and its time.
    fn behind(&mut self) -> (Duration, usize) {
        let times = (0..self.runs.len()).map(|at| (self.elapsed(at), at));
        times.min().expect("there are workers")
    }

    fn turn(&mut self) {
        let (now, at) = self.behind();
        let ahead = Duration::from_micros(self.rng.u64(1..AHEAD_MAX_US));
        let run = &mut self.runs[at];
        run.engine.driver().sleeps_until = Some(now + ahead);
        run.turn();
        for run in &mut self.runs {
            let mut mail = [PollFd::from_borrowed_fd(run.mailbox.wake_fd(), PollFlags::IN)];
            if poll(&mut mail, Some(&Timespec::default())).expect("it can be asked") > 0 {
                run.engine.driver().wake();
            }
        }
        self.check_places();
        self.check_waits(at);
    }

    /// There are never more connections than places, of all workers together.
    fn check_places(&mut self) {
        for at in 0..self.runs[0].endpoints.len() {
            let conns = self.runs.iter_mut().map(|run| run.engine.driver().conns_to(at as u16));
            let (conns, max) = (conns.sum::<usize>(), self.max);
            let taken = self.runs[0].endpoints[at].places.taken();
            assert!(conns <= max, "{conns} connections of {max}");
            assert!(conns <= taken && taken <= max, "{taken} places of {max}");
        }
    }

    /// Nobody waits at a worker for long who could be served.
    fn check_waits(&mut self, at: usize) {
        let now = self.elapsed(at);
        for number in 0..self.runs[at].endpoints.len() {
            let endpoint = Arc::clone(&self.runs[at].endpoints[number]);
            let prospects = self.runs.iter_mut().map(|run| {
                let now = run.engine.driver().now();
                run.engine.routes[0].prospect(&endpoint, now)
            });
            let prospects: Vec<_> = prospects.collect();
            let is_idle = prospects.iter().any(|prospect| prospect.idle_for > IDLE_MAX);
            let own = &prospects[at];
            let is_asked = self.runs.len() == 2;
            assert!(!is_asked || own.overdue < OVERDUE_MAX, "an idle one is kept: {own:?}");
            let lasting = [
                (Lasting::InVain, own.waits_in_vain),
                (Lasting::BesideIdle, own.waits_for_place && is_idle),
            ];
            for (what, is_so) in lasting {
                if !is_so {
                    self.since.remove(&(at, number, what));
                    continue;
                }
                let since = *self.since.entry((at, number, what)).or_insert(now);
                let lasts = now.saturating_sub(since);
                assert!(lasts <= LOOK_AFTER, "{what:?} since {since:?} at {at}: {prospects:?}");
            }
        }
    }

    fn turn_until(&mut self, until: Duration, mut act: impl FnMut(&mut Self)) {
        while self.behind().0 < until {
            act(self);
            self.turn();
        }
    }

    /// Endpoints fail and recover, and discovery changes its mind: for all workers, if not at once.
    fn disturb(&mut self) {
        let count = self.runs[0].endpoints.len();
        match self.rng.u16(..2_000) {
            0..=5 => {
                let states = [Reachability::Up, Reachability::Refusing, Reachability::Silent];
                let (at, state) = (self.rng.usize(..count), states[self.rng.usize(..3)]);
                self.runs.iter_mut().for_each(|run| run.engine.driver().reach(at, state));
            }
            6 => {
                let kept: Vec<_> = (0..count).map(|_| self.rng.u8(..4) > 0).collect();
                self.deliver(|at| kept[at]);
            }
            _ => {}
        }
    }

    fn deliver(&mut self, is_there: impl Fn(usize) -> bool) {
        for run in &mut self.runs {
            let there = run.endpoints.iter().enumerate().filter(|(at, _)| is_there(*at));
            let there = there.map(|(_, endpoint)| Arc::clone(endpoint)).collect();
            run.deliver(there);
        }
    }

    fn recover(&mut self) {
        for run in &mut self.runs {
            (0..run.endpoints.len()).for_each(|at| run.engine.driver().reach(at, Reachability::Up));
        }
        self.deliver(|_| true);
    }

    /// Until all clients have been served, and have left.
    fn serve_all(&mut self) {
        let is_served = |run: &mut Run| {
            run.engine.driver().clients_outside() == 0 && run.engine.sessions() == 0
        };
        while !self.runs.iter_mut().all(is_served) {
            self.turn();
            assert!(self.behind().0 < 400 * SECOND, "somebody waits for ever");
        }
    }

    fn stop(mut self) {
        for run in &mut self.runs {
            run.engine.driver().sleeps_until = None;
            run.end();
        }
        self.runs[0].assert_places_free();
    }
}

/// Maybe with trouble at first, and with a drain. Returns how many sessions were opened, and how many ended in order.
fn run(seed: u64, mode: PoolMode) -> (u64, u64) {
    let mut workers = Workers::new(seed, mode);
    if workers.rng.bool() {
        workers.turn_until(6 * SECOND, Workers::disturb);
        workers.recover();
    }
    if workers.rng.u8(..4) == 0 {
        let from = workers.behind().0 + Duration::from_millis(workers.rng.u64(..2_000));
        workers.turn_until(from, |_| ());
        workers.runs.iter_mut().for_each(|run| run.command(Command::Drain));
    }
    workers.serve_all();
    let closed = |reason| workers.runs.iter().map(|run| run.stats.closed(reason)).sum::<u64>();
    let opened = workers.runs.iter().map(|run| run.stats.sessions_opened.get()).sum();
    let (late, finished) = (closed(CloseReason::QueueTimeout), closed(CloseReason::Finished));
    assert_eq!(late, 0, "nobody has waited for too long");
    workers.stop();
    (opened, finished)
}

#[test]
fn workers_share_the_places_of_sessions() {
    let (opened, finished) = run_seeds(40_000, 20, |seed| run(seed, PoolMode::Preconnect));
    println!("{opened} sessions, {finished} finished in order");
    assert!(finished > opened / 4, "{finished} of {opened}: the runs test too little");
}

#[test]
fn workers_share_the_places_of_pooled_sessions() {
    let (opened, finished) = run_seeds(41_000, 20, |seed| run(seed, PoolMode::Session));
    println!("{opened} clients, {finished} finished in order");
    assert!(finished > opened / 4, "{finished} of {opened}: the runs test too little");
}

#[test]
fn workers_share_the_places_of_requests() {
    let (opened, finished) = run_seeds(42_000, 20, |seed| run(seed, PoolMode::Request));
    println!("{opened} clients, {finished} finished in order");
    assert!(finished > opened / 4, "{finished} of {opened}: the runs test too little");
}

/// One worker has ejected all endpoints while the clients of another one keep them full: its probes have their
/// turns at the places. Returns how many clients there were, and how many endpoints are usable again.
fn probes_beside_a_crowd(seed: u64) -> (u64, u64) {
    // An ejection, and the longest session: of a client that sends all in small pieces.
    const SOON: Duration = Duration::from_secs(100);
    const CROWD: usize = 6;
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut config = Config::from_vars(std::iter::empty()).expect("defaults are valid");
    let route = Arc::make_mut(&mut config.routes[0]);
    let max = rng.usize(1..4);
    route.pool.endpoint_max = Some(max);
    // Without clients it is pools that find out.
    route.pool.min_idle = 2 * max;
    route.pool.max_idle = 2 * max;
    route.idle_timeout = Some(2 * SECOND);
    route.requests.queue_timeout = 600 * SECOND;
    let buffers = limits::buffers_max(60);
    let runs = Run::workers(rng.fork(), config, 60, buffers, 2);
    let mut workers = Workers { runs, rng, max, since: HashMap::new() };
    let count = workers.runs[0].endpoints.len();
    let ejected = |workers: &Workers| {
        let endpoints = workers.runs[0].endpoints.iter();
        endpoints.filter(|endpoint| endpoint.stats[0].ejected.get() > 0).count()
    };
    // The other one has not come yet.
    let all = workers.runs[0].endpoints.clone();
    workers.runs[0].deliver(all);
    (0..count).for_each(|at| workers.runs[0].engine.driver().reach(at, Reachability::Refusing));
    let crowd = |workers: &mut Workers| {
        let run = &mut workers.runs[1];
        if run.engine.waiting() + run.engine.driver().clients_outside() < CROWD {
            run.engine.driver().add_client(Duration::ZERO);
        }
    };
    while ejected(&workers) < count {
        workers.turn();
        assert!(workers.behind().0 < SOON, "it is not noticed that they refuse");
    }
    workers.deliver(|_| true);
    let full = workers.behind().0 + 2 * SECOND;
    workers.turn_until(full, crowd);
    workers.recover();
    let from = workers.behind().0;
    while ejected(&workers) > 0 {
        crowd(&mut workers);
        workers.turn();
        assert!(workers.behind().0 < from + SOON, "{} are still ejected", ejected(&workers));
    }
    workers.serve_all();
    let opened = workers.runs.iter().map(|run| run.stats.sessions_opened.get()).sum();
    workers.stop();
    (opened, count as u64)
}

#[test]
fn probes_have_their_turns_at_the_places_of_full_endpoints() {
    let (opened, usable) = run_seeds(43_000, 20, probes_beside_a_crowd);
    println!("{usable} endpoints are usable again beside {opened} clients");
}
