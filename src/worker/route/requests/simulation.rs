//! The engine on the simulator where connections serve several clients: a thousand seeded runs, every answer checked.

use crate::proxy::endpoints::EndpointId;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::config::{Balance, Config, PoolMode, Protocol};
use crate::io::sim::lines::{Asked, LINE_MAX, UNASKED, answer};
use crate::io::sim::{Peer, Reachability, Sim, Speech};
use crate::limits;
use crate::metrics::CloseReason;
use crate::proxy::queue::Line;
use crate::proxy::route::{StableHash, owner};
use crate::proxy::session::Session;
use crate::worker::engine::Engine;
use crate::worker::mailbox::Command;
use crate::worker::route::Route;
use crate::worker::simulation::{Run, run_seeds};

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);
/// A request that waits for another endpoint than the one that it was lost on gets what is idle
/// there at the next look, at the latest: after 100 ms, or so long after a stop of the process.
const LOOK_AFTER: Duration = Duration::from_millis(250);

fn config(protocol: Protocol, rng: &mut fastrand::Rng) -> Config {
    let mut config = Config::from_vars(std::iter::empty()).expect("defaults are valid");
    let route = Arc::make_mut(&mut config.routes[0]);
    route.protocol = protocol;
    route.pool.mode = if rng.u8(..3) > 0 { PoolMode::Request } else { PoolMode::Session };
    route.pool.size = rng.usize(1..5);
    route.pool.min_idle = rng.usize(..2);
    route.pool.max_idle = route.pool.min_idle + rng.usize(..4);
    route.pool.idle_timeout = Some(rng.u32(1..10) * SECOND);
    route.pool.max_lifetime = (rng.u8(..4) == 0).then(|| rng.u32(1..4) * SECOND);
    route.balance = [
        Balance::LeastConn,
        Balance::RoundRobin,
        Balance::SourceHash,
        Balance::RandomTwo,
        Balance::PeakEwma,
    ][rng.usize(..5)];
    route.retry_budget = [None, Some(0), Some(20)][rng.usize(..3)];
    route.requests.line_max = LINE_MAX;
    route.requests.queue_max = [0, 4, 1000][rng.usize(..3)];
    route.requests.queue_timeout = [30 * MS, 300 * MS, 3 * SECOND][rng.usize(..3)];
    route.endpoint_wait = route.requests.queue_timeout;
    route.requests.timeout = Some([100 * MS, 4 * SECOND][rng.usize(..2)]);
    let has_keys = protocol == Protocol::Chronos && route.pool.mode == PoolMode::Request;
    if has_keys && rng.bool() {
        route.balance = Balance::KeyHash;
    }
    route.connect_timeout = [200 * MS, 3 * SECOND][rng.usize(..2)];
    route.backend_drain = [None, None, Some(SECOND), Some(Duration::ZERO)][rng.usize(..4)];
    route.idle_timeout = (rng.u8(..6) == 0).then_some(10 * SECOND);
    route.half_close_timeout = (rng.u8(..4) == 0).then_some(3 * SECOND);
    config
}

pub(super) struct RequestRun {
    pub(super) run: Run,
    /// The endpoints have been the same from the start.
    steady: bool,
    /// Since when requests wait though an endpoint has an idle connection.
    waits_since: HashMap<EndpointId, Duration>,
    /// Clients were sent away: what they send after that is not answered.
    drained: bool,
}

impl RequestRun {
    pub(super) fn new(seed: u64, protocol: Protocol) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let sessions_max = rng.usize(3..40);
        let config = config(protocol, &mut rng);
        let buffers = match rng.u8(..3) {
            0 => 2 * sessions_max.max(60) + 8,
            1 => 6 * sessions_max.max(20) + 64,
            _ => limits::buffers_max(sessions_max),
        };
        let mut run = Run::with(rng, config, sessions_max, buffers);
        run.engine.driver().speech = match protocol {
            Protocol::Http1 => Speech::Http,
            _ => Speech::Lines,
        };
        Self { run, steady: true, waits_since: HashMap::new(), drained: false }
    }

    pub(super) fn serve(&mut self) {
        let run = &mut self.run;
        let all = run.endpoints.clone();
        run.deliver(all);
        for _ in 0..run.rng.usize(1..60) {
            let delay = Duration::from_micros(run.rng.u64(..2_000_000));
            run.engine.driver().add_client(delay);
        }
        let troubled = run.rng.bool();
        self.steady = !troubled;
        let drain_at = (run.rng.u8(..4) == 0).then(|| run.rng.u32(..2000) * SECOND / 1000);
        let leave_at = drain_at.map(|at| at.saturating_sub(run.rng.u32(..500) * SECOND / 1000));
        let (mut drained, mut turns) = (false, 0);
        // Sixty clients of three places at a time, each with twenty requests that get nothing but their
        // time limits, take 1,200 s.
        while run.engine.driver().elapsed() < 1500 * SECOND {
            if troubled && run.engine.driver().elapsed() < 40 * SECOND {
                run.disturb();
            }
            run.turn();
            check_accounts(&mut run.engine, &mut self.waits_since);
            turns += 1;
            assert!(turns < 100_000, "spins at {:?}", run.engine.driver().elapsed());
            let elapsed = run.engine.driver().elapsed();
            if !self.drained && leave_at.is_some_and(|at| elapsed >= at) {
                self.drained = true;
                run.command(Command::Leave);
            }
            if !drained && drain_at.is_some_and(|at| elapsed >= at) {
                drained = true;
                run.command(Command::Drain);
            }
            let outside = run.engine.driver().clients_outside();
            if run.engine.sessions() == 0 && (outside == 0 || drained) {
                break;
            }
        }
    }

    pub(super) fn check_liveness(&mut self) {
        let engine = &mut self.run.engine;
        let stalling = |peer: &&Peer| peer.plan.stalls_at.is_some();
        let stalled = engine.driver().peers.iter().filter(stalling).count();
        assert!(engine.sessions() <= stalled, "{} clients hang", engine.sessions());
        assert_eq!(engine.routes[0].requests.queue.len(), 0, "requests hang in the queue");
    }

    /// Returns how many requests were answered by backends.
    fn check_answers(&mut self) -> usize {
        let cut_off: u64 = [
            CloseReason::IdleTimeout,
            CloseReason::HalfCloseTimeout,
            CloseReason::Overload,
            CloseReason::DrainDeadline,
        ]
        .map(|reason| self.run.stats.closed(reason))
        .iter()
        .sum();
        let driver = self.run.engine.driver();
        let (mut answered, mut leaked) = (0, 0);
        for client in driver.peers.iter().filter(|peer| peer.is_client) {
            let (answers, unasked) = check_client(client, cut_off > 0, self.drained);
            answered += answers;
            leaked += unasked;
        }
        let unasked: usize =
            driver.peers.iter().filter_map(|peer| peer.lines.as_ref()).map(|l| l.unasked).sum();
        assert!(leaked <= unasked, "{leaked} words for {unasked}");
        self.check_requests();
        answered
    }

    /// No write is made twice, and keys go to their owner, whoever else is there.
    fn check_requests(&mut self) {
        let by_key = self.run.engine.routes[0].config.balance == Balance::KeyHash;
        let names: Vec<_> =
            self.run.endpoints.iter().map(|e| StableHash::of(e.name.as_bytes())).collect();
        let mut heard: HashMap<&str, usize> = HashMap::new();
        for backend in self.run.engine.driver().peers.iter().filter(|peer| !peer.is_client) {
            let Some(lines) = &backend.lines else { continue };
            for line in &lines.heard {
                let mut words = line.split_whitespace();
                let (verb, tag) = (words.next().unwrap(), words.next().unwrap_or_default());
                *heard.entry(line).or_default() += 1;
                if by_key && ["GET", "SET", "DEL"].contains(&verb) {
                    let expected = owner(StableHash::of(tag.as_bytes()), &names);
                    assert_eq!(expected, Some(usize::from(lines.endpoint)), "{line}");
                }
            }
        }
        for (line, times) in heard {
            let repeatable = ["GET", "PING"].iter().any(|verb| line.starts_with(verb));
            assert!(times == 1 || repeatable || line == "COMPACT\n", "{times} times {line}");
        }
    }
}

/// What one client got: its answers in the order of its requests. Returns how many came from
/// backends, and how many of those nobody had asked for.
fn check_client(client: &Peer, cut_off: bool, sent_away: bool) -> (usize, usize) {
    let (id, lines) = (client.id, client.lines.as_ref().expect("clients speak lines"));
    let text = std::str::from_utf8(&client.received).expect("answers are text");
    let (mut answers, mut unasked, mut whole) = (0, 0, 0);
    let mut parts = text.split_inclusive('\n').peekable();
    while let Some(part) = parts.next() {
        let asked = lines.asked.get(whole).unwrap_or_else(|| panic!("{id} got more: {part}"));
        if !part.ends_with('\n') {
            assert!(parts.peek().is_none());
            let cut = client.saw_reset || client.reset || !client.saw_end;
            assert!(cut || cut_off, "client {id} got a part of an answer as if it were all");
            let right = "ERR".starts_with(&part[..part.len().min(3)])
                || UNASKED.starts_with(&part[..part.len().min(UNASKED.len())])
                || is_answer(asked, part);
            assert!(right, "client {id} asked {asked:?} and got the start of {part:.60}");
            break;
        }
        whole += 1;
        match asked {
            Asked::Blank => assert_eq!(part, "ERR empty request\n", "client {id}"),
            Asked::TooLong => assert_eq!(part, "ERR request longer than 64 bytes\n"),
            _ if part.starts_with(UNASKED) => unasked += 1,
            _ if part.starts_with("ERR ") || part.starts_with("ERR_COMPACT ") => {
                let ours = part.contains("empty") || part.contains("longer");
                assert!(!ours, "client {id} asked {asked:?} and got {part}");
            }
            _ => {
                assert!(is_answer(asked, part), "client {id} asked {asked:?} and got {part:.60}");
                answers += 1;
            }
        }
    }
    let made = lines.asked_in(client.sent);
    assert!(whole <= made, "client {id} got answers before it asked");
    let orderly = client.saw_end && !client.saw_reset && !client.reset;
    if orderly && client.ended && !cut_off && !sent_away && client.plan.stalls_at.is_none() {
        assert_eq!(whole, lines.whole_in(client.sent), "client {id} lacks answers");
    }
    (answers, unasked)
}

/// Whether `text` is an answer, or the first part of one.
fn is_answer(asked: &Asked, text: &str) -> bool {
    match asked {
        Asked::Tag(tag) => {
            let endpoint = text.strip_prefix("VAL ").and_then(|rest| rest.split(' ').nth(1));
            let Some(endpoint) = endpoint.and_then(|e| e.strip_prefix('e')?.parse().ok()) else {
                return format!("VAL {tag} e").starts_with(text) && !text.ends_with('\n');
            };
            answer(tag, endpoint).starts_with(text)
        }
        Asked::Compact => "OK_COMPACTED\n".starts_with(text),
        Asked::Blank | Asked::TooLong => false,
    }
}

/// Everything adds up, at the end of any turn.
fn check_accounts(engine: &mut Engine<Sim>, waits_since: &mut HashMap<EndpointId, Duration>) {
    let elapsed = engine.driver().elapsed();
    let mut in_use: HashMap<EndpointId, usize> = HashMap::new();
    let mut waiting = 0;
    for slot in 0..engine.routes[0].requests.clients.slots() {
        let Some(key) = engine.routes[0].requests.clients.key_at(slot) else { continue };
        let Some(client) = engine.routes[0].requests.clients.get(key) else { continue };
        if let Some(backend) = client.backend() {
            *in_use.entry(backend.endpoint).or_default() += 1;
        }
        waiting += usize::from(client.is_queued());
        assert!(!client.is_ready() || client.is_due(), "a request is forgotten");
        let listens = client.is_receiving() || client.has_ended();
        let is_idle = client.is_idle() && client.unsent() == 0 && client.input().is_empty();
        assert!(!is_idle || listens || client.is_due(), "a client is not listened to");
    }
    assert_eq!(engine.routes[0].requests.queue.len(), waiting, "places in the queue");
    check_queue_bound(&engine.routes[0]);
    assert!(
        engine.routes[0].requests.releasing.is_empty()
            && engine.routes[0].pools.freed.len() <= engine.routes[0].pools.table.indices().count()
    );
    let mut opaque: HashMap<EndpointId, usize> = HashMap::new();
    for slot in 0..engine.routes[0].sessions.slots() {
        let session = engine.routes[0]
            .sessions
            .key_at(slot)
            .and_then(|key| engine.routes[0].sessions.get(key));
        if let Some(endpoint) = session.and_then(Session::endpoint) {
            *opaque.entry(endpoint).or_default() += 1;
        }
    }
    let anywhere = engine.routes[0].requests.queue.waiting(Line::Any);
    let (mut conns, is_request) = (0, engine.routes[0].config.pool.mode == PoolMode::Request);
    for index in engine.routes[0].pools.table.indices() {
        let Some(entry) = engine.routes[0].pools.table.get_mut(index) else { continue };
        let in_use = in_use.remove(&index).unwrap_or(0);
        let pool = &entry.pool;
        let sessions = in_use + opaque.remove(&index).unwrap_or(0);
        assert_eq!(
            (pool.in_use(), entry.sessions() as usize),
            (sessions, sessions),
            "in use of {index:?}"
        );
        conns += pool.idle() + pool.connecting();
        let waiting = anywhere + engine.routes[0].requests.queue.waiting(Line::Endpoint(index));
        if waiting > 0 && pool.idle() > 0 && entry.is_present() {
            let since = *waits_since.entry(index).or_insert(elapsed);
            assert!(elapsed.saturating_sub(since) <= LOOK_AFTER, "one waits for what is idle");
        } else {
            waits_since.remove(&index);
        }
        if is_request {
            let all = sessions + pool.idle() + pool.connecting();
            // One more may be made to find out whether an endpoint is well again.
            assert!(
                sessions + pool.idle() <= engine.routes[0].config.pool.size,
                "{all} connections"
            );
            assert!(all <= engine.routes[0].config.pool.size + 1, "{all} connections");
        }
    }
    assert!(in_use.is_empty(), "in use of no endpoint: {in_use:?}");
    assert_eq!(engine.routes[0].pools.table.totals().pooled, conns, "connections of all pools");
    engine.assert_invariants();
}

/// The queue has a bound, or each of its lines where keys say which one a request waits in: the maximum, and as
/// many as connections may be made for.
fn check_queue_bound(route: &Route) {
    let queue = &route.requests.queue;
    let conns_max = match route.config.pool.mode {
        PoolMode::Request => route.config.pool.size * route.pools.table.indices().count(),
        // Each client may have one.
        _ => return,
    };
    let longest = if route.config.balance == Balance::KeyHash {
        let endpoints = route.pools.table.indices().map(Line::Endpoint);
        let stores = (0..route.pools.table.stores()).map(Line::Store);
        let lines = endpoints.chain(stores).chain([Line::Any]);
        lines.map(|line| queue.waiting(line)).max().unwrap_or_default()
    } else {
        queue.len()
    };
    assert!(longest <= route.config.requests.queue_max + conns_max, "the queue is too long");
}

/// Some stores go away, each in its way, and come back after a while. Until then requests for them wait,
/// and no others. Returns how many requests had to, and how many were answered.
fn stores_away(seed: u64) -> (u64, u64) {
    const SOON: Duration = Duration::from_secs(5);
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut config = config(Protocol::Chronos, &mut rng);
    let route = Arc::make_mut(&mut config.routes[0]);
    route.pool.mode = PoolMode::Request;
    route.balance = Balance::KeyHash;
    route.endpoint_wait = 60 * SECOND;
    route.requests.queue_max = 1000;
    route.requests.timeout = None;
    (route.idle_timeout, route.half_close_timeout, route.backend_drain) = (None, None, None);
    let clients = rng.usize(1..40);
    let mut run = Run::with(rng, config, clients, limits::buffers_max(clients));
    run.engine.driver().speech = Speech::Lines;
    let all = run.endpoints.clone();
    run.deliver(all.clone());
    run.turn();
    let away: Vec<_> = all.iter().map(|_| run.rng.bool()).collect();
    for at in (0..all.len()).filter(|&at| away[at]) {
        let how = [Reachability::Refusing, Reachability::Silent][run.rng.usize(..2)];
        run.engine.driver().reach(at, how);
    }
    if run.rng.bool() {
        let there = all.iter().zip(&away).filter(|(_, away)| !**away);
        let there = there.map(|(endpoint, _)| Arc::clone(endpoint)).collect();
        run.deliver(there);
    }
    for _ in 0..clients {
        let delay = Duration::from_millis(run.rng.u64(..20_000));
        run.engine.driver().add_client(delay);
    }
    let back = Duration::from_millis(run.rng.u64(1_000..25_000));
    let (mut waits_since, mut most) = (HashMap::new(), 0);
    while run.engine.driver().elapsed() < back {
        run.turn();
        check_accounts(&mut run.engine, &mut waits_since);
        most = most.max(run.engine.routes[0].requests.queue.len() as u64);
    }
    (0..all.len()).for_each(|at| run.engine.driver().reach(at, Reachability::Up));
    run.deliver(all);
    let until = run.engine.driver().elapsed() + SOON;
    while run.engine.driver().elapsed() < until {
        run.turn();
        check_accounts(&mut run.engine, &mut waits_since);
    }
    let mut answered = 0;
    for client in run.engine.driver().peers.iter().filter(|peer| peer.is_client) {
        let text = std::str::from_utf8(&client.received).expect("answers are text");
        // That a store had no connection free in time is another matter.
        let away = |line: &&str| line.starts_with("ERR store ") && !line.contains("was free in");
        let refused = text.lines().find(away);
        assert!(refused.is_none(), "client {} was not to be told {refused:?}", client.id);
        answered += text.matches("VAL ").count() as u64;
    }
    let queue = &run.engine.routes[0].requests.queue;
    let stores = (0..run.engine.routes[0].pools.table.stores()).map(Line::Store);
    assert!(stores.map(|line| queue.waiting(line)).all(|waiting| waiting == 0), "for who is back");
    run.stop();
    (most, answered)
}

#[test]
fn requests_whose_store_is_away_wait_for_it_and_no_others_do() {
    let (waited, answered) = run_seeds(0, 200, stores_away);
    println!("{waited} requests waited at a time, {answered} answers");
    assert!(waited > 100 && answered > 1000, "{waited} and {answered}: the runs test too little");
}

fn run(seed: u64) -> (u64, u64) {
    let mut run = RequestRun::new(seed, Protocol::Chronos);
    run.serve();
    run.check_liveness();
    let answered = run.check_answers();
    run.run.stop();
    assert_eq!(run.run.engine.routes[0].requests.queue.len(), 0, "places in the queue leaked");
    (run.run.stats.sessions_opened.get(), answered as u64)
}

#[test]
fn five_hundred_seeds_give_every_client_its_own_answers() {
    run_all(0);
}

#[test]
fn five_hundred_other_seeds_do_so_at_the_same_time() {
    run_all(1_000_000);
}

fn run_all(first: u64) {
    let (opened, answered) = run_seeds(first, 500, run);
    println!("{opened} clients, {answered} answers");
    assert!(answered > 2 * opened, "{answered} answers for {opened}: too little is tested");
}

#[test]
fn equal_seeds_run_alike() {
    assert_eq!(run(42), run(42));
}
