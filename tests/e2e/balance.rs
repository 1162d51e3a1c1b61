//! Balancing by latency, and the budget of retries, with real sockets. What clients wait with each way of
//! balancing: `cargo bench --bench balance`.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect, prepare, read_line};
use crate::support::metrics::{CONNECT_RETRIES, RETRIES_REFUSED};
use crate::support::ports;
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, SetOnDrop, measured, on_both_drivers};

on_both_drivers![
    a_slow_endpoint_gets_few_requests_by_latency,
    a_slow_endpoint_gets_few_sessions_by_latency,
    an_endpoint_that_stalls_gets_no_more_requests_by_latency,
    retries_of_connects_are_bounded_by_the_budget,
    each_source_finds_the_one_endpoint_that_is_well_among_many,
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

/// However many refuse that a source would rather go to, and though none is ejected for it.
fn each_source_finds_the_one_endpoint_that_is_well_among_many(io: Io) {
    let server = Backend::named("a");
    let mut addresses: Vec<_> = (0..11).map(|_| ports::unused([127, 0, 0, 1].into())).collect();
    addresses.push(server.address());
    let proxy = Builder::on(io)
        .backends(&addresses)
        .without_pool()
        .set("AEGIS_BALANCE", "source_hash")
        .set("AEGIS_EJECT_FAILURES", "1000")
        .set("AEGIS_RETRY_BUDGET", "off")
        .start();
    for source in 1..=30 {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 2, source], 0)).into()).unwrap();
        socket.connect(&proxy.address().into()).unwrap();
        let client = TcpStream::from(socket);
        prepare(&client).unwrap();
        assert_eq!(ask(&client, "who"), "a", "source {source}");
    }
}
