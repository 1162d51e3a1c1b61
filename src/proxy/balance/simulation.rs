//! Ways of balancing before servers that queue, in virtual time: what clients wait.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use super::tests::{endpoint, pool};
use super::*;
use crate::io::ConnId;
use crate::proxy::session::Tried;

const SECOND: Duration = Duration::from_secs(1);

/// Workers, of one process or of several, that know nothing of each other.
const WORKERS: usize = 16;
/// Requests per second, of all of them.
const RATE: f64 = 1000.0;
/// Threads of a server.
const THREADS: usize = 8;
const LENGTH: Duration = Duration::from_secs(30);

struct Setup {
    policy: Balance,
    /// How much longer endpoint 0 takes.
    slower: f64,
    /// Endpoint 0 stands still for the first second of each ten.
    stalls: bool,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrival,
    Done(usize, Request),
}

/// Who sent it, on which connection, and when.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Request {
    worker: usize,
    conn: u32,
    since: Duration,
}

struct Outcome {
    waits: Vec<Duration>,
    shares: Vec<usize>,
}

impl Outcome {
    fn at(&self, part: f64) -> Duration {
        self.waits[((self.waits.len() - 1) as f64 * part) as usize]
    }
}

#[derive(Default)]
struct Server {
    busy: usize,
    queue: VecDeque<Request>,
}

fn exponential(rng: &mut fastrand::Rng, mean: f64) -> Duration {
    Duration::from_secs_f64(-mean * (1.0 - rng.f64()).ln())
}

struct World<'a> {
    setup: &'a Setup,
    begun: Instant,
    rng: fastrand::Rng,
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    sequence: u64,
    tables: Vec<Table>,
    /// The connections of each worker that nothing is sent on.
    free: Vec<Vec<u32>>,
    servers: Vec<Server>,
    outcome: Outcome,
}

fn new_table(policy: Balance, now: Instant) -> Table {
    let mut table = Table::new(policy, WorkerId::new(0), 1000);
    let endpoints = (0..5).map(endpoint).collect();
    let snapshot = EndpointSnapshot { endpoints, ..EndpointSnapshot::default() };
    table.apply(&snapshot, &pool(), false, now);
    table
}

impl<'a> World<'a> {
    fn new(setup: &'a Setup) -> Self {
        let (begun, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
        let mut tables: Vec<_> = (0..WORKERS).map(|_| new_table(setup.policy, begun)).collect();
        for table in &mut tables {
            table.turn = rng.usize(..5);
        }
        Self {
            setup,
            begun,
            rng,
            events: BinaryHeap::new(),
            sequence: 0,
            tables,
            free: vec![(0..1000).rev().collect(); WORKERS],
            servers: (0..5).map(|_| Server::default()).collect(),
            outcome: Outcome { waits: Vec::new(), shares: vec![0; 5] },
        }
    }

    fn push(&mut self, at: Duration, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((at, self.sequence, event)));
    }

    fn run(mut self) -> Outcome {
        self.push(Duration::ZERO, Event::Arrival);
        while let Some(Reverse((now, _, event))) = self.events.pop() {
            match event {
                Event::Arrival if now >= LENGTH => {}
                Event::Arrival => self.on_arrival(now),
                Event::Done(endpoint, request) => self.on_done(endpoint, request, now),
            }
        }
        self.outcome.waits.sort_unstable();
        self.outcome
    }

    fn on_arrival(&mut self, now: Duration) {
        let next = now + exponential(&mut self.rng, 1.0 / RATE);
        self.push(next, Event::Arrival);
        let (worker, at) = (self.rng.usize(..WORKERS), self.begun + now);
        let table = &mut self.tables[worker];
        let chosen = table.choose(Fit::Any, &Tried::default(), None, at, &mut self.rng).unwrap();
        table.enter(chosen, at);
        let conn = self.free[worker].pop().unwrap();
        table.asked(chosen, ConnId::from_parts(conn, 0), at);
        let (endpoint, request) = (usize::from(chosen), Request { worker, conn, since: now });
        self.outcome.shares[endpoint] += 1;
        if self.servers[endpoint].busy < THREADS {
            self.servers[endpoint].busy += 1;
            self.work(endpoint, request, now);
        } else {
            self.servers[endpoint].queue.push_back(request);
        }
    }

    fn on_done(&mut self, endpoint: usize, request: Request, now: Duration) {
        let Request { worker, conn, since } = request;
        let (id, table) = (EndpointId::at(endpoint), &mut self.tables[worker]);
        table.answered(id, ConnId::from_parts(conn, 0), self.begun + now);
        table.leave(id);
        self.free[worker].push(conn);
        // Before that, nothing is known of any of them.
        if since > 2 * SECOND {
            self.outcome.waits.push(now.saturating_sub(since));
        }
        match self.servers[endpoint].queue.pop_front() {
            Some(request) => self.work(endpoint, request, now),
            None => self.servers[endpoint].busy -= 1,
        }
    }

    /// A thread of a server begins with a request, which it is done with some time.
    fn work(&mut self, endpoint: usize, request: Request, now: Duration) {
        let mut takes = Duration::from_micros(500) + exponential(&mut self.rng, 0.0005);
        if self.rng.u32(..200) == 0 {
            takes *= 5;
        }
        if endpoint == 0 {
            takes = takes.mul_f64(self.setup.slower);
        }
        let period = Duration::from_nanos((now.as_nanos() % (10 * SECOND).as_nanos()) as u64);
        let stands_still =
            endpoint == 0 && self.setup.stalls && now > 5 * SECOND && period < SECOND;
        let waits = if stands_still { SECOND.saturating_sub(period) } else { Duration::ZERO };
        self.push(now + waits + takes, Event::Done(endpoint, request));
    }
}

/// What clients wait with each way of balancing: the median and the two high percentiles, printed
/// for the documentation.
fn compare(what: &str, slower: f64, stalls: bool) -> [Outcome; 3] {
    [Balance::LeastConn, Balance::RandomTwo, Balance::PeakEwma].map(|policy| {
        let outcome = World::new(&Setup { policy, slower, stalls }).run();
        let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|part| outcome.at(part));
        println!("{what}, {policy:?}: {p50:?} {p99:?} {p999:?}, shares {:?}", outcome.shares);
        outcome
    })
}

#[test]
fn where_all_are_alike_latency_costs_nothing() {
    let [least_conn, _, peak_ewma] = compare("all alike", 1.0, false);
    assert!(peak_ewma.at(0.99) < least_conn.at(0.99).mul_f64(1.05));
    let share = peak_ewma.waits.len() / 5;
    assert!(peak_ewma.shares.iter().all(|one| one.abs_diff(share) < share / 2));
}

#[test]
fn a_slow_endpoint_of_five_gets_next_to_nothing_by_latency() {
    let [least_conn, random_two, peak_ewma] = compare("one ten times as slow", 10.0, false);
    for other in [&least_conn, &random_two] {
        assert!(peak_ewma.at(0.99) * 5 < other.at(0.99), "of 30,000 requests");
        assert!(peak_ewma.shares[0] * 20 < other.shares[0]);
    }
    assert!(peak_ewma.shares[0] > 0, "it is tried again, and may have recovered");
}

#[test]
fn an_endpoint_of_five_that_stalls_holds_up_the_fewest_by_latency() {
    let [least_conn, random_two, peak_ewma] = compare("one stalls for 1 s of 10", 1.0, true);
    for other in [&least_conn, &random_two] {
        assert!(peak_ewma.at(0.999) * 20 < other.at(0.999), "of 30,000 requests");
    }
}
