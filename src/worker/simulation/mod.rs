//! The engine on the simulator: a thousand seeded runs, every byte checked.

mod outages;
mod routes;
mod sharing;
mod tiers;

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::contention::CoreTimes;
use super::ends::Told;
use super::engine::{Engine, EngineSetup};
use super::mailbox::{Command, Mailbox};
use crate::config::{Balance, Config, EndsLogged};
use crate::io::Driver;
use crate::io::sim::{ID_BYTES, Peer, Reachability, Sim, UNTOLD_BUFFERS_MAX};
use crate::limits;
use crate::listening::Listening;
use crate::metrics::{CloseReason, LabelSet, RouteStats, WorkerStats};
use crate::proxy::endpoints::{Endpoint, EndpointSnapshot, Store, Tier};
use crate::proxy::retry_budget::Reserve;
use crate::proxy::{RouteId, WorkerId};

const SECOND: Duration = Duration::from_secs(1);
/// As long as anybody may wait for a peer that acknowledges nothing, where its host is there again in
/// time to be taken for well: three times the default limit, and a few looks.
const HANGING_MAX: Duration = Duration::from_secs(19);

pub(super) struct Run {
    pub(super) engine: Engine<Sim>,
    mailbox: Arc<Mailbox>,
    pub(super) stats: Arc<RouteStats>,
    pub(super) endpoints: Vec<Arc<Endpoint>>,
    tiers: Vec<Tier>,
    generation: u64,
    pub(super) rng: fastrand::Rng,
    buffers: u32,
    everyone_ends: bool,
    pub(super) sessions_max: usize,
    pub(super) told: Told,
}

/// Clients that come to full places, while endpoints come and go, may wait for a minute for their turn.
const SERVED_WITHIN: Duration = Duration::from_secs(120);

impl Run {
    /// `is_limited`: there may be few connections to an endpoint.
    fn new(seed: u64, is_limited: bool) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let sessions_max = rng.usize(3..40);
        let lean = rng.bool();
        let timeouts = rng.u8(..4) == 0;
        let idle_timeout = (timeouts && rng.bool()).then_some(10 * SECOND);
        let mut config = Config::from_vars(std::iter::empty()).expect("defaults are valid");
        let route = Arc::make_mut(&mut config.routes[0]);
        route.pool.min_idle = rng.usize(..3);
        route.pool.max_idle = route.pool.min_idle + rng.usize(..4);
        if is_limited {
            route.pool.endpoint_max = Some(rng.usize(1..12));
            route.requests.queue_timeout = Duration::from_millis(rng.u64(100..5_000));
            route.requests.queue_max = [0, 2, 1000][sessions_max % 3];
        }
        route.idle_timeout = idle_timeout;
        route.balance = [Balance::LeastConn, Balance::PeakEwma][sessions_max % 2];
        route.backend_drain =
            [None, None, Some(Duration::ZERO), Some(SECOND)][sessions_max / 2 % 4];
        route.half_close_timeout = timeouts.then_some(3 * SECOND);
        // Short of buffers, or with plenty.
        let buffers = if lean { 6 * sessions_max + 64 } else { limits::buffers_max(sessions_max) };
        Self::with(rng, config, sessions_max, buffers)
    }

    /// A run with this configuration.
    pub(super) fn with(
        rng: fastrand::Rng,
        config: Config,
        sessions_max: usize,
        buffers: usize,
    ) -> Self {
        Self::workers(rng, config, sessions_max, buffers, 1).remove(0)
    }

    /// The runs of so many workers of one process, each on a network of its own.
    fn workers(
        mut rng: fastrand::Rng,
        mut config: Config,
        sessions_max: usize,
        buffers: usize,
        count: usize,
    ) -> Vec<Self> {
        for route in &mut config.routes {
            Arc::make_mut(route).log_ends = EndsLogged::All;
        }
        let everyone_ends = config.routes[0].idle_timeout.is_some();
        let routes = config.routes.len();
        let endpoints: Vec<_> = (0..rng.u16(1..5) * routes as u16)
            .map(|i| {
                let address = std::net::SocketAddr::from(([127, 0, 0, 1], i));
                Endpoint::numbered(i.into(), format!("e{i}"), address.into(), count)
            })
            .collect();
        let conns_max = limits::conns_max(sessions_max);
        let config = Arc::new(config);
        let mailboxes = (0..count).map(|_| Mailbox::new(routes).expect("a descriptor"));
        let mailboxes: Arc<[_]> = mailboxes.map(Arc::new).collect();
        let stats: Arc<[_]> = (0..count).map(|_| Arc::new(WorkerStats::new(routes))).collect();
        let reserves: Arc<[_]> =
            (0..routes).map(|_| Arc::new(Reserve::new(Instant::now()))).collect();
        let worker = |at: usize| {
            let mut sim = Sim::new(rng.u64(..), endpoints.len(), conns_max, buffers);
            sim.listeners = routes;
            let setup = EngineSetup {
                worker: WorkerId::new(at),
                listener_routes: (0..routes).map(RouteId::at).collect(),
                config: Arc::clone(&config),
                sessions_max,
                pool_conns_max: limits::POOL_CONNS_MAX,
                mailboxes: Arc::clone(&mailboxes),
                stats: Arc::clone(&stats),
                ends: Arc::default(),
                retry_reserves: Arc::clone(&reserves),
                started: Instant::now(),
                listening: Listening::default(),
                core_times: CoreTimes::none(),
                seed: rng.u64(..),
            };
            Self {
                engine: Engine::new(sim, setup),
                mailbox: Arc::clone(&mailboxes[at]),
                stats: Arc::clone(&stats[at].routes[0]),
                tiers: vec![Tier::FIRST; endpoints.len()],
                endpoints: endpoints.clone(),
                generation: 0,
                rng: rng.clone(),
                buffers: buffers as u32,
                everyone_ends,
                sessions_max,
                told: Told::default(),
            }
        };
        (0..count).map(worker).collect()
    }

    pub(super) fn deliver(&mut self, endpoints: Vec<Arc<Endpoint>>) {
        self.deliver_to(RouteId::default(), endpoints);
    }

    fn deliver_to(&mut self, route: RouteId, endpoints: Vec<Arc<Endpoint>>) {
        self.generation += 1;
        let generation = self.generation;
        // All of them are declared, whoever is there.
        let stores = self.endpoints.iter().map(|declared| Store {
            name: declared.name.as_str().into(),
            endpoint: endpoints.iter().position(|endpoint| Arc::ptr_eq(endpoint, declared)),
            why: None,
        });
        let stores = stores.collect();
        let of = |endpoint| self.endpoints.iter().position(|one| Arc::ptr_eq(one, endpoint));
        let tiers = endpoints.iter().map(|one| of(one).map_or(Tier::FIRST, |at| self.tiers[at]));
        let tiers = tiers.collect();
        let snapshot = EndpointSnapshot { route, generation, endpoints, tiers, stores };
        self.mailbox.deliver(Arc::new(snapshot));
        self.engine.driver().wake();
    }

    pub(super) fn command(&mut self, command: Command) {
        self.mailbox.command(command);
        self.engine.driver().wake();
    }

    pub(super) fn turn(&mut self) {
        self.engine.turn().expect("the simulator never fails");
        self.told.hear(&self.engine.cx.ends);
        self.engine.assert_invariants();
        // A drain empties the accept queue, whatever waits in it.
        let allowed = self.mailbox.current_command() >= Command::Drain
            || self.engine.sessions() <= self.sessions_max;
        assert!(allowed, "more sessions than AEGIS_MAX_SESSIONS");
        let driver = self.engine.driver();
        if let Some(what) = driver.undone().or_else(|| driver.hanging(HANGING_MAX)) {
            panic!("undone at {:?}: {what}", driver.elapsed());
        }
    }

    /// Endpoints fail, hang and recover, and discovery changes its mind.
    pub(super) fn disturb(&mut self) {
        match self.rng.u16(..400) {
            0..=2 => {
                let at = self.rng.usize(..self.endpoints.len());
                let states = [Reachability::Up, Reachability::Refusing, Reachability::Silent];
                // Who is gone takes all of its sessions along: seldom, so that others end in order.
                let gone = self.rng.u8(..6) == 0;
                let state = if gone { Reachability::Gone } else { states[self.rng.usize(..3)] };
                self.engine.driver().reach(at, state);
            }
            3 => {
                let kept = self.endpoints.clone().into_iter().filter(|_| self.rng.u8(..4) > 0);
                let kept = kept.collect();
                self.deliver(kept);
            }
            _ => {}
        }
    }

    fn serve_clients(&mut self) {
        let all = self.endpoints.clone();
        self.deliver(all);
        for _ in 0..self.rng.usize(1..60) {
            let delay = Duration::from_micros(self.rng.u64(..2_000_000));
            self.engine.driver().add_client(delay);
        }
        let mut drained = false;
        let drain_at = (self.rng.u8(..4) == 0).then(|| self.rng.u32(..2000) * SECOND / 1000);
        let mut turns = 0;
        while self.engine.driver().elapsed() < SERVED_WITHIN {
            self.disturb();
            self.turn();
            turns += 1;
            assert!(turns < 200_000, "spins at {:?}", self.engine.driver().elapsed());
            if !drained && drain_at.is_some_and(|at| self.engine.driver().elapsed() >= at) {
                drained = true;
                self.command(Command::Drain);
            }
            let outside = self.engine.driver().clients_outside();
            if self.engine.sessions() == 0 && (outside == 0 || drained) {
                break;
            }
        }
    }

    /// Removes every endpoint and stops; then nothing may be left.
    pub(super) fn stop(&mut self) {
        self.end();
        self.assert_places_free();
    }

    fn assert_places_free(&self) {
        for endpoint in &self.endpoints {
            let taken = [endpoint.places.taken(), endpoint.idle_places.taken()];
            assert_eq!(taken, [0; 2], "places of {} leaked", endpoint.name);
        }
    }

    fn end(&mut self) {
        self.deliver(Vec::new());
        self.turn();
        self.command(Command::Stop);
        for _ in 0..100 {
            self.turn();
        }
        assert!(self.engine.is_finished());
        let driver = self.engine.driver();
        assert_eq!(driver.open_sockets(), 0, "connections leaked");
        assert_eq!(driver.buffers().free(), self.buffers, "buffers leaked");
        for stats in &self.engine.stats().routes {
            let ended: u64 = CloseReason::ALL.iter().map(|&reason| stats.closed(reason)).sum();
            assert_eq!(stats.sessions_opened.get(), ended, "every session ends for one reason");
        }
        self.told.check(self.engine.stats());
    }

    fn check_bytes(&mut self) {
        let timeouts = self.stats.closed(CloseReason::IdleTimeout)
            + self.stats.closed(CloseReason::HalfCloseTimeout);
        let stopped = timeouts > 0;
        let cut = [CloseReason::EndpointRemoved, CloseReason::DrainDeadline, CloseReason::Overload];
        let cut = cut.iter().any(|&reason| self.stats.closed(reason) > 0);
        let driver = self.engine.driver();
        let mut served = std::collections::HashSet::new();
        for peer in &driver.peers {
            let Some(partner) = partner(driver, peer) else { continue };
            assert_ne!(partner.is_client, peer.is_client, "{} met {}", peer.id, partner.id);
            assert!(served.insert((peer.is_client, partner.id)), "two met {}", partner.id);
            let expected = driver.stream(partner.id, 0, peer.received.len());
            assert!(peer.received == expected, "{} got wrong bytes of {}", peer.id, partner.id);
            assert!(peer.received.len() <= partner.sent, "bytes that were never sent");
            if stopped {
                continue;
            }
            if peer.saw_end && !peer.saw_reset {
                assert!(
                    partner.ended,
                    "{} was told of an end that {} made not",
                    peer.id, partner.id
                );
                assert_eq!(peer.received.len(), partner.sent, "bytes lost before the end");
            }
            assert!(!(partner.reset && peer.saw_end), "a reset arrived as an ordinary end");
            let reads_on = peer.plan.stalls_at.is_none() && !peer.reset && !peer.is_swallowed();
            if partner.reset && peer.saw_reset && reads_on && !cut {
                let (got, sent) = (peer.received.len(), partner.sent);
                assert_eq!(got, sent, "{} sent it to {} before it broke", partner.id, peer.id);
            }
        }
        let buffers = limits::RELAY_BUFFERS_MAX
            + 3
            + limits::POOL_GREETING_BUFFERS_MAX
            + UNTOLD_BUFFERS_MAX as u32;
        let limit = buffers * limits::BUFFER_SIZE as u32;
        assert!(driver.queue_peak <= limit, "{} bytes in flight", driver.queue_peak);
        assert_eq!(driver.buffer_waits(), 0, "a slow session held buffers that others needed");
    }

    /// Whoever is still served is waiting for a peer that stalls.
    fn check_liveness(&mut self) {
        let stalling = |peer: &&Peer| peer.plan.stalls_at.is_some();
        let stalled = self.engine.driver().peers.iter().filter(stalling).count();
        assert!(self.engine.sessions() <= stalled, "{} sessions hang", self.engine.sessions());
        if self.everyone_ends {
            assert_eq!(self.engine.sessions(), 0, "time limits end every session");
        }
    }
}

fn partner<'a>(driver: &'a Sim, peer: &Peer) -> Option<&'a Peer> {
    let id = peer.received.get(..ID_BYTES)?;
    let id = u64::from_be_bytes(id.try_into().expect("eight bytes"));
    Some(driver.peers.iter().find(|peer| peer.id == id).expect("bytes that nobody sent"))
}

fn run(seed: u64) -> (u64, u64) {
    run_one(Run::new(seed, false))
}

fn run_limited(seed: u64) -> (u64, u64) {
    run_one(Run::new(seed, true))
}

fn run_one(mut run: Run) -> (u64, u64) {
    run.serve_clients();
    run.check_liveness();
    run.check_bytes();
    run.stop();
    (run.stats.sessions_opened.get(), run.stats.closed(CloseReason::Finished))
}

/// Runs the seeds from `first` on: `count` of them, or as many as `AEGIS_SEEDS` says. Returns what
/// all runs came to together; fails with each kind of failure and a seed that shows it.
pub(super) fn run_seeds(first: u64, count: u64, run: fn(u64) -> (u64, u64)) -> (u64, u64) {
    let count =
        std::env::var("AEGIS_SEEDS").map_or(count, |seeds| seeds.parse().expect("a number"));
    let mut failures: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let mut total = (0, 0);
    for seed in first..first + count {
        match std::panic::catch_unwind(|| run(seed)) {
            Ok((one, two)) => total = (total.0 + one, total.1 + two),
            Err(panic) => failures.entry(kind_of(&*panic)).or_default().push(seed),
        }
    }
    for (kind, seeds) in &failures {
        let first: Vec<_> = seeds.iter().take(10).collect();
        println!("{} seeds such as {first:?}: {kind}", seeds.len());
    }
    assert!(failures.is_empty(), "{} kinds of failures, listed above", failures.len());
    total
}

/// What a panic says, without the numbers in it.
fn kind_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("something else");
    text.chars().filter(|c| !c.is_ascii_digit()).take(160).collect()
}

#[test]
fn a_thousand_seeds_lose_no_byte_and_leak_nothing() {
    let (opened, finished) = run_seeds(0, 1000, run);
    println!("{opened} sessions, {finished} finished in order");
    assert!(finished > opened / 4, "{finished} of {opened}: the runs test too little");
}

#[test]
fn five_hundred_seeds_with_few_places_leak_none() {
    let (opened, finished) = run_seeds(20_000, 500, run_limited);
    println!("{opened} sessions, {finished} finished in order");
    assert!(finished > opened / 10, "{finished} of {opened}: the runs test too little");
}

#[test]
fn a_driver_that_is_silent_about_what_was_sent_is_found_out() {
    let found = (0..100).any(|seed| {
        let outcome = std::panic::catch_unwind(|| {
            let mut run = Run::new(seed, false);
            run.engine.driver().withholds_sends = true;
            run.serve_clients();
        });
        outcome.is_err_and(|panic| kind_of(&*panic).contains("undone"))
    });
    assert!(found, "sources are not read from until something else happens");
}

#[test]
fn equal_seeds_run_alike() {
    assert_eq!(run(42), run(42));
}
