//! Outages that are waited out: while no endpoint is usable new clients wait, and what they feel of it
//! is that it took longer.
//!
//! `cargo test --test e2e felt -- --nocapture --test-threads=1 2>&1 | grep '^|'` prints what clients
//! felt of each kind of outage, as in docs/OUTAGES.md.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, BlackHole, Memory, reset_on_close};
use crate::support::client::{
    ask, ask_once, connect, is_silent, read_line, try_ask, try_connect, wait_closed,
};
use crate::support::kube_api::{KubeApi, host_ip};
use crate::support::link::{Fate, Link};
use crate::support::metrics::{ENDPOINT_CONNECTS, SESSIONS_ACTIVE, SESSIONS_CLOSED};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, heavy, measured, on_both_drivers};

on_both_drivers![
    sessions_that_come_while_the_endpoint_refuses_are_served_when_it_returns,
    those_that_wait_are_served_in_order_of_arrival,
    clients_that_leave_while_the_endpoint_refuses_are_forgotten,
    a_wait_that_is_over_ends_for_the_reason_of_the_last_failure,
    without_a_wait_sessions_fail_at_once,
    an_outage_is_counted_and_logged_once,
    requests_wait_for_an_endpoint_for_as_long_as_sessions_do,
    all_that_have_waited_are_served_soon_and_connected_once,
    felt_of_an_endpoint_that_refuses,
    felt_of_a_host_that_is_silent,
    felt_of_endpoints_that_are_absent,
    felt_of_an_endpoint_that_flaps,
];

const OUTAGE_SECONDS: &str = "aegis_outage_seconds_total";
const MS: Duration = Duration::from_millis(1);

fn backend_that_is_away(name: &'static str) -> Backend {
    let mut backend = Backend::named(name);
    backend.kill();
    backend
}

fn sessions_that_come_while_the_endpoint_refuses_are_served_when_it_returns(io: Io) {
    const CLIENTS: usize = 100;
    for pool in [0, 2] {
        let mut backend = Backend::named("a");
        let proxy = Builder::on(io)
            .backends(&[backend.address()])
            .pool(pool, 4 * pool)
            .set("AEGIS_ENDPOINT_WAIT", "1m")
            .start();
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
        backend.kill();
        // Some speak first, and others may wait for a greeting.
        let clients: Vec<_> = (0..CLIENTS).map(|_| connect(proxy.address())).collect();
        for mut client in clients.iter().step_by(2) {
            client.write_all(b"who\n").unwrap();
        }
        proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == CLIENTS as u64);
        // Longer than it takes to eject it.
        proxy.wait_for("aegis_endpoint_ejections_total", &[], |ejections| ejections >= 1);
        backend.start();
        for (i, client) in clients.iter().enumerate() {
            let by = if i % 2 == 0 { read_line(client).unwrap() } else { ask(client, "who") };
            assert_eq!(by, "a");
        }
        assert_eq!(proxy.metric(SESSIONS_CLOSED, &[("reason", "connect_failed")]), 0);
    }
}

/// A proxy in front of one endpoint, without connections in advance, where clients may wait so long.
fn without_pool(io: Io, endpoint: SocketAddr, wait: &str) -> Builder {
    Builder::on(io).backends(&[endpoint]).without_pool().set("AEGIS_ENDPOINT_WAIT", wait)
}

fn those_that_wait_are_served_in_order_of_arrival(io: Io) {
    let mut backend = Backend::named("a");
    backend.kill();
    let proxy = without_pool(io, backend.address(), "1m").set("AEGIS_WORKERS", "1").start();
    // The next comes when the one before is known to wait.
    let clients: Vec<_> = (0..8)
        .map(|i| {
            let mut client = connect(proxy.address());
            writeln!(client, "{i}").unwrap();
            proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == i + 1);
            client
        })
        .collect();
    // The kernel keeps connections in their order, threads that serve them would not.
    let listener = TcpListener::bind(backend.address()).unwrap();
    let accepted = (0..8).map(|_| listener.accept().unwrap().0);
    let order: Vec<_> = accepted.map(|stream| read_line(&stream).unwrap()).collect();
    for client in &clients {
        wait_closed(client).unwrap();
    }
    // One tries the way, and those behind it are connected together.
    assert_eq!(order[0], "0", "{order:?}");
}

fn clients_that_leave_while_the_endpoint_refuses_are_forgotten(io: Io) {
    let mut backend = backend_that_is_away("a");
    let proxy = without_pool(io, backend.address(), "1m")
        // No probe of its own counts among the connections.
        .set("AEGIS_EJECT_FAILURES", "1000")
        .start();
    let silent: Vec<_> = (0..10).map(|_| connect(proxy.address())).collect();
    let asking: Vec<_> = (0..10).map(|_| connect(proxy.address())).collect();
    let staying: Vec<_> = (0..3).map(|_| connect(proxy.address())).collect();
    for mut client in asking.iter().chain(&staying) {
        client.write_all(b"who\n").unwrap();
    }
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 23);
    drop(silent);
    for client in asking {
        reset_on_close(&client);
    }
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 3);
    let left = ["client_left", "client_reset"];
    let left = left.map(|reason| proxy.metric(SESSIONS_CLOSED, &[("reason", reason)]));
    assert_eq!(left, [10, 10]);
    backend.start();
    for client in &staying {
        assert_eq!(read_line(client).unwrap(), "a");
    }
    assert_eq!(backend.accepted(), 3, "nobody else is connected");
    assert_eq!(proxy.metric(ENDPOINT_CONNECTS, &[]), 3);
}

fn a_wait_that_is_over_ends_for_the_reason_of_the_last_failure(io: Io) {
    let refusing = backend_that_is_away("a");
    let hole = BlackHole::new();
    for (address, reason) in
        [(refusing.address(), "connect_failed"), (hole.address(), "connect_timeout")]
    {
        let proxy =
            without_pool(io, address, "700ms").set("AEGIS_CONNECT_TIMEOUT", "100ms").start();
        let begun = Instant::now();
        ask_once(proxy.address(), "who").expect_err("nobody could have answered");
        let took = begun.elapsed();
        assert!(took >= 700 * MS, "{reason}: closed after {took:?}");
        proxy.wait_for(SESSIONS_CLOSED, &[("reason", reason)], |closed| closed == 1);
        assert_eq!(proxy.metric(SESSIONS_CLOSED, &[("reason", "no_endpoint")]), 0);
    }
}

fn without_a_wait_sessions_fail_at_once(io: Io) {
    let refusing = backend_that_is_away("a");
    let proxy = without_pool(io, refusing.address(), "0s").start();
    for count in 1..10 {
        ask_once(proxy.address(), "who").expect_err("nobody could have answered");
        let failed = [("reason", "connect_failed")];
        proxy.wait_for(SESSIONS_CLOSED, &failed, |closed| closed == count);
    }
}

/// Of all workers together.
fn outage_seconds(proxy: &Proxy) -> f64 {
    let metrics = proxy.metrics();
    let found: Vec<_> =
        metrics.samples().iter().filter(|sample| sample.name == OUTAGE_SECONDS).collect();
    assert!(!found.is_empty(), "{}", metrics.describe(OUTAGE_SECONDS));
    found.iter().map(|sample| sample.value).sum()
}

fn an_outage_is_counted_and_logged_once(io: Io) {
    let mut backend = backend_that_is_away("a");
    let proxy = without_pool(io, backend.address(), "1m").start();
    assert!(outage_seconds(&proxy) == 0.0);
    let clients: Vec<_> = (0..5).map(|_| connect(proxy.address())).collect();
    proxy.wait_for("aegis_clients_waiting", &[], |waiting| waiting == 5);
    let begun = "no endpoint is usable: clients wait";
    let why = proxy.log_field(begun, "unusable");
    assert_eq!(why, format!("{}: refuses", backend.address()));
    eventually("a second of outage", PATIENCE, || (outage_seconds(&proxy) >= 1.0).then_some(()));
    backend.start();
    for client in &clients {
        assert_eq!(ask(client, "who"), "a");
    }
    let ended = || proxy.log_events("endpoints are usable again");
    let end = eventually("its end is logged", PATIENCE, || ended().into_iter().next());
    let field = |name: &str| end[name].as_u64().unwrap();
    assert_eq!((field("waited"), field("given_up")), (5, 0));
    let lasted = field("lasted_ms");
    assert!((500..20_000).contains(&lasted), "{lasted}");
    assert!((500..=lasted).contains(&field("longest_wait_ms")), "{}", field("longest_wait_ms"));
    assert_eq!((proxy.log_events(begun).len(), ended().len()), (1, 1));
    assert_eq!(proxy.metric("aegis_clients_waiting", &[]), 0);
}

/// Longer than `AEGIS_QUEUE_TIMEOUT`, which is about connections that are busy.
fn requests_wait_for_an_endpoint_for_as_long_as_sessions_do(io: Io) {
    let mut backend = Backend::chronos();
    backend.kill();
    let start = |wait| {
        Builder::on(io)
            .backends(&[backend.address()])
            .protocol("chronos", "request")
            .set("AEGIS_QUEUE_TIMEOUT", "300ms")
            .set("AEGIS_ENDPOINT_WAIT", wait)
            .start()
    };
    let [brief, long] = ["700ms", "1m"].map(start);
    let begun = Instant::now();
    let error = "ERR no endpoint could be connected to in 700ms";
    assert_eq!(ask(&connect(brief.address()), "GET k"), error);
    assert!(begun.elapsed() >= 700 * MS);
    let mut client = connect(long.address());
    client.write_all(b"GET k\n").unwrap();
    assert!(is_silent(&client, 1000 * MS));
    eventually("a second of outage", PATIENCE, || (outage_seconds(&long) >= 1.0).then_some(()));
    backend.start();
    assert_eq!(read_line(&client).unwrap(), "NULL");
}

/// How many at a time is shown where it is decided; here that they are served soon, each by one
/// connection.
fn all_that_have_waited_are_served_soon_and_connected_once(io: Io) {
    const CLIENTS: u64 = 1000;
    let _alone = heavy();
    let mut backend = backend_that_is_away("a");
    let proxy =
        without_pool(io, backend.address(), "1m").set("AEGIS_EJECT_FAILURES", "1000").start();
    let clients: Vec<_> = (0..CLIENTS).map(|_| connect(proxy.address())).collect();
    for mut client in &clients {
        client.write_all(b"who\n").unwrap();
    }
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == CLIENTS);
    backend.start();
    let back = Instant::now();
    for client in &clients {
        assert_eq!(read_line(client).unwrap(), "a");
    }
    measured(&format!("{CLIENTS} that waited were served {:?} after the return", back.elapsed()));
    assert_eq!(backend.accepted(), CLIENTS);
}

/// How long an outage lasts.
const OUTAGE: Duration = Duration::from_millis(2500);
/// How long clients come before and after it.
const AROUND: Duration = Duration::from_millis(500);

/// How clients reach their backend: the name, the protocol and the pool's mode.
const WAYS: [(&str, &str, &str); 2] =
    [("sessions", "tcp", "preconnect"), ("requests", "chronos", "request")];

/// What a client felt: when it came, and when it had its answer, or the error.
struct Felt {
    begun: Instant,
    answered: Result<Instant, String>,
}

fn come(address: SocketAddr) -> Felt {
    let begun = Instant::now();
    let asked = try_connect(address).and_then(|client| try_ask(&client, "GET k"));
    let answered = match asked {
        Ok(answer) if answer.starts_with("ERR") => Err(answer),
        Ok(_) => Ok(Instant::now()),
        Err(error) => Err(error.to_string()),
    };
    Felt { begun, answered }
}

/// Has a client come every 25 ms while an outage goes on, and says what they felt.
fn felt(proxy: &Proxy, outage: impl FnOnce()) -> Vec<Felt> {
    let (stop, felt) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                scope.spawn(|| felt.lock().unwrap().push(come(proxy.address())));
                thread::sleep(25 * MS);
            }
        });
        thread::sleep(AROUND);
        outage();
        thread::sleep(AROUND);
        stop.store(true, Relaxed);
    });
    felt.into_inner().unwrap()
}

/// Prints a row of the table, and gives the errors that clients got.
fn row(io: Io, kind: &str, way: &str, felt: &[Felt], back: Instant) -> Vec<String> {
    let served = felt.iter().filter_map(|one| Some((one.begun, *one.answered.as_ref().ok()?)));
    let longest = served.clone().map(|(begun, at)| at - begun).max().unwrap_or_default();
    // Of those that came while it lasted.
    let waited = served.filter(|&(begun, at)| begun < back && at > back);
    let mut after: Vec<_> = waited.map(|(_, at)| at - back).collect();
    after.sort_unstable();
    let median = after.get(after.len() / 2).copied().unwrap_or_default();
    let last = after.last().copied().unwrap_or_default();
    let errors: Vec<_> =
        felt.iter().filter_map(|one| one.answered.as_ref().err().cloned()).collect();
    let row = format!(
        "| {kind} | {way} | {} | {} | {} | {} ms | {} ms | {} ms |",
        io.name(),
        felt.len(),
        errors.len(),
        longest.as_millis(),
        median.as_millis(),
        last.as_millis(),
    );
    let _ = io::stderr().write_all(format!("\n{row}\n").as_bytes());
    errors
}

fn waits_out(io: Io) -> Builder {
    Builder::on(io).set("AEGIS_ENDPOINT_WAIT", "1m")
}

/// Speaks to both kinds of clients.
fn server(at: SocketAddr) -> Backend {
    Backend::chronos_on(at, &Memory::default())
}

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)), 0);

fn felt_of_an_endpoint_that_refuses(io: Io) {
    for (way, protocol, mode) in WAYS {
        let mut backend = server(LOOPBACK);
        let proxy = waits_out(io).protocol(protocol, mode).backends(&[backend.address()]).start();
        let mut back = Instant::now();
        let felt = felt(&proxy, || {
            backend.kill();
            thread::sleep(OUTAGE);
            backend.start();
            back = Instant::now();
        });
        let errors = row(io, "refuses", way, &felt, back);
        // One may have been connected when the server died.
        assert!(errors.len() <= 1, "{way}: {errors:?}");
    }
}

fn felt_of_a_host_that_is_silent(io: Io) {
    for (way, protocol, mode) in WAYS {
        let Some(link) = Link::new() else { return };
        let backend = server(Link::here());
        let backends = [link.behind(0, backend.address())];
        let proxy = waits_out(io).protocol(protocol, mode).backends(&backends).start();
        let mut back = Instant::now();
        let felt = felt(&proxy, || {
            link.set(0, Fate::Vanish, Fate::Vanish);
            thread::sleep(OUTAGE);
            link.set(0, Fate::Arrive, Fate::Arrive);
            back = Instant::now();
        });
        let errors = row(io, "is silent", way, &felt, back);
        assert_eq!(errors, Vec::<String>::new(), "{way}");
    }
}

fn felt_of_endpoints_that_are_absent(io: Io) {
    for (way, protocol, mode) in WAYS {
        let api = KubeApi::start();
        let backend = server((host_ip(), 0).into());
        api.announce("a", backend.address());
        let proxy = waits_out(io).protocol(protocol, mode).kubernetes(&api).start();
        proxy.wait_for_endpoints(1);
        let mut back = Instant::now();
        let felt = felt(&proxy, || {
            api.delete_slice("a");
            proxy.wait_for_endpoints(0);
            thread::sleep(OUTAGE);
            api.announce("a", backend.address());
            back = Instant::now();
        });
        let errors = row(io, "is absent", way, &felt, back);
        assert_eq!(errors, Vec::<String>::new(), "{way}");
    }
}

fn felt_of_an_endpoint_that_flaps(io: Io) {
    const FLAPS: usize = 3;
    for (way, protocol, mode) in WAYS {
        let mut backend = server(LOOPBACK);
        let proxy = waits_out(io).protocol(protocol, mode).backends(&[backend.address()]).start();
        let mut back = Instant::now();
        let felt = felt(&proxy, || {
            for _ in 0..FLAPS {
                backend.kill();
                thread::sleep(1000 * MS);
                backend.start();
                back = Instant::now();
                thread::sleep(1000 * MS);
            }
        });
        let errors = row(io, "flaps", way, &felt, back);
        assert!(errors.len() <= FLAPS, "{way}: {errors:?}");
    }
}
