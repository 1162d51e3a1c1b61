//! Balancing by latency, and the budget of retries, with real sockets.
//!
//! `cargo test --release --test e2e balance::table -- --ignored --nocapture` prints what clients wait
//! with each way of balancing.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect, read_line};
use crate::support::metrics::{CONNECT_RETRIES, RETRIES_REFUSED};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, SetOnDrop, measured, on_both_drivers};

on_both_drivers![
    a_slow_endpoint_gets_few_requests_by_latency,
    a_slow_endpoint_gets_few_sessions_by_latency,
    an_endpoint_that_stalls_gets_no_more_requests_by_latency,
    retries_of_connects_are_bounded_by_the_budget,
];

const MS: Duration = Duration::from_millis(1);

/// Answers each line after a time, unless it stands still.
struct Server {
    backend: Backend,
    asked: Arc<AtomicU64>,
    stands_still: Arc<AtomicBool>,
}

impl Server {
    fn new(takes: Duration) -> Self {
        let (asked, stands_still) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (count, gate) = (Arc::clone(&asked), Arc::clone(&stands_still));
        let backend = Backend::scripted(move |mut stream| {
            while read_line(stream).is_ok() {
                count.fetch_add(1, Relaxed);
                thread::sleep(takes);
                while gate.load(Relaxed) {
                    thread::sleep(MS);
                }
                if stream.write_all(b"1\n").is_err() {
                    return;
                }
            }
        });
        Self { backend, asked, stands_still }
    }

    fn asked(&self) -> u64 {
        self.asked.load(Relaxed)
    }
}

/// Five servers, of which the first one takes so long.
fn servers(first: Duration) -> Vec<Server> {
    (0..5).map(|number| Server::new(if number == 0 { first } else { MS })).collect()
}

fn builder(io: Io, servers: &[Server], balance: &str) -> Builder {
    let addresses: Vec<_> = servers.iter().map(|server| server.backend.address()).collect();
    Builder::on(io).backends(&addresses).set("AEGIS_WORKERS", "1").set("AEGIS_BALANCE", balance)
}

/// A proxy whose clients share connections by requests.
fn framed(io: Io, servers: &[Server], balance: &str) -> Proxy {
    builder(io, servers, balance).protocol("chronos", "request").start()
}

/// The part of all requests that the first server was asked.
fn share_of_first(servers: &[Server]) -> f64 {
    let all: u64 = servers.iter().map(Server::asked).sum();
    servers[0].asked() as f64 / all as f64
}

/// On a busy machine even the fast ones take long now and then, so that the slow one is tried. In
/// turn it would get a fifth.
const SHARE_MAX: f64 = 0.1;

fn a_slow_endpoint_gets_few_requests_by_latency(io: Io) {
    let servers = servers(50 * MS);
    let proxy = framed(io, &servers, "peak_ewma");
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let client = connect(proxy.address());
                (0..100).for_each(|_| drop(ask(&client, "GET a")));
            });
        }
    });
    let share = share_of_first(&servers);
    measured(&format!("{:.1} % of the requests", 100.0 * share));
    assert!(share > 0.0 && share < SHARE_MAX, "{share}");
}

fn a_slow_endpoint_gets_few_sessions_by_latency(io: Io) {
    let servers = servers(50 * MS);
    let proxy = builder(io, &servers, "peak_ewma").start();
    for _ in 0..200 {
        ask_once(proxy.address(), "who").unwrap();
    }
    let share = share_of_first(&servers);
    measured(&format!("{:.1} % of the sessions", 100.0 * share));
    assert!(share > 0.0 && share < SHARE_MAX, "{share}");
}

fn an_endpoint_that_stalls_gets_no_more_requests_by_latency(io: Io) {
    const CLIENTS: usize = 16;
    let servers = servers(MS);
    let proxy = framed(io, &servers, "peak_ewma");
    let stop = AtomicBool::new(false);
    let answered = AtomicU64::new(0);
    thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        let still = &servers[0].stands_still;
        let _on = SetOffOnDrop(still);
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let client = connect(proxy.address());
                while !stop.load(Relaxed) {
                    ask(&client, "GET a");
                    answered.fetch_add(1, Relaxed);
                }
            });
        }
        thread::sleep(300 * MS);
        assert!(servers[0].asked() > 0, "it gets its share");
        still.store(true, Relaxed);
        // What it gets before its oldest request is older than the others take is a share of what is
        // under way.
        thread::sleep(100 * MS);
        let (before, others) = (servers[0].asked(), answered.load(Relaxed));
        thread::sleep(700 * MS);
        let (stuck, served) = (servers[0].asked() - before, answered.load(Relaxed) - others);
        measured(&format!("{stuck} more requests stuck, {served} answered"));
        assert!(stuck <= 2 && served > 200, "{stuck} stuck, {served} answered");
    });
}

/// Lets a server go on, also where the test fails.
struct SetOffOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOffOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(false, Relaxed);
    }
}

fn retries_of_connects_are_bounded_by_the_budget(io: Io) {
    const SESSIONS: u64 = 500;
    for (budget, is_bounded) in [("20", true), ("off", false)] {
        let mut gone = [Backend::echo(), Backend::echo(), Backend::echo()];
        let addresses: Vec<_> = gone.iter().map(Backend::address).collect();
        gone.iter_mut().for_each(Backend::kill);
        let proxy = Builder::on(io)
            .backends(&addresses)
            .without_pool()
            .set("AEGIS_WORKERS", "1")
            .set("AEGIS_RETRY_BUDGET", budget)
            .set("AEGIS_ENDPOINT_WAIT", "0s")
            .start();
        let begun = Instant::now();
        for _ in 0..SESSIONS {
            ask_once(proxy.address(), "who").expect_err("nobody could have answered");
        }
        let windows = 1 + begun.elapsed().as_secs() / 10;
        let retries = proxy.metric(CONNECT_RETRIES, &[]);
        let refused = proxy.metric(RETRIES_REFUSED, &[]);
        measured(&format!("{retries} retries, {refused} refused"));
        if is_bounded {
            assert!(retries <= SESSIONS / 5 + 100 * windows, "{retries}");
            assert!(refused >= SESSIONS / 2, "{refused}");
        } else {
            assert_eq!((retries, refused), (2 * SESSIONS, 0), "three attempts each");
        }
    }
}

/// Requests at an even pace, whatever the replies do: each is timed from when it was due.
fn paced(proxy: &Proxy, seconds: u64) -> Vec<Duration> {
    const CLIENTS: u32 = 32;
    const EACH: Duration = Duration::from_millis(40);
    let waits = Mutex::new(Vec::new());
    let (begun, waits_of_all) = (Instant::now(), &waits);
    thread::scope(|scope| {
        for number in 0..CLIENTS {
            scope.spawn(move || {
                let client = connect(proxy.address());
                let mut due = begun + EACH * number / CLIENTS;
                let mut waits = Vec::new();
                while due < begun + Duration::from_secs(seconds) {
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    ask(&client, "GET a");
                    waits.push(due.elapsed());
                    due += EACH;
                }
                waits_of_all.lock().unwrap().append(&mut waits);
            });
        }
    });
    let mut waits = waits.into_inner().unwrap();
    waits.sort_unstable();
    waits
}

/// Has a server stand still for a second of each ten.
fn stall_by_turns(server: &Server, stop: &AtomicBool) {
    let begun = Instant::now();
    while !stop.load(Relaxed) {
        let still = (begun.elapsed().as_secs() + 7).is_multiple_of(10);
        server.stands_still.store(still, Relaxed);
        thread::sleep(MS);
    }
    server.stands_still.store(false, Relaxed);
}

#[test]
#[ignore = "prints a table, and takes two minutes"]
fn a_slow_endpoint_is_felt_least_where_latency_decides() {
    println!(
        "| one endpoint of five | way | p50 | p99 | p99.9 | its share |\n| - | - | - | - | - | - |"
    );
    for (what, first, stalls) in [
        ("like the others", MS, false),
        ("ten times as slow", 10 * MS, false),
        ("stalls for 1 s of 10", MS, true),
    ] {
        let mut felt = Vec::new();
        for balance in ["least_conn", "random_two", "peak_ewma"] {
            let servers = servers(first);
            let proxy = framed(Io::Epoll, &servers, balance);
            let stop = AtomicBool::new(!stalls);
            let waits = thread::scope(|scope| {
                scope.spawn(|| stall_by_turns(&servers[0], &stop));
                let _stop = SetOnDrop(&stop);
                paced(&proxy, 24)
            });
            let at = |part: f64| waits[((waits.len() - 1) as f64 * part) as usize];
            let share = 100.0 * share_of_first(&servers);
            let [p50, p99, p999] =
                [0.5, 0.99, 0.999].map(|part| format!("{:.1} ms", at(part).as_secs_f64() * 1e3));
            println!("| {what} | `{balance}` | {p50} | {p99} | {p999} | {share:.1} % |");
            felt.push(at(0.999));
        }
        assert!(first == MS && !stalls || felt[2] < felt[0].min(felt[1]), "{what}: {felt:?}");
    }
}
