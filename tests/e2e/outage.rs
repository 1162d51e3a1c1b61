//! Endpoints that accept and do not serve, forget, or are away for a while: nobody suffers for longer
//! than it takes to notice, and nobody is stormed.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, reset_on_close};
use crate::support::client::{ask, ask_once, connect, is_timeout, read_line, read_to_end, try_ask};
use crate::support::metrics::{
    ENDPOINT_SESSIONS, ENDPOINT_USABLE, POOL_CONNECTIONS, POOL_DISCARDS, SESSIONS_ACTIVE,
};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, measured, on_both_drivers, pattern, skip};

on_both_drivers![
    an_endpoint_that_accepts_and_closes_costs_few_sessions,
    an_endpoint_that_accepts_and_resets_costs_few_sessions,
    an_endpoint_that_closes_at_the_first_byte_costs_few_sessions,
    a_session_that_has_sent_nothing_moves_on_from_an_endpoint_that_closes_at_once,
    an_end_is_passed_on_where_all_endpoints_close_at_once,
    clients_that_leave_without_a_word_eject_nobody,
    an_endpoint_that_takes_and_never_says_anything_is_not_ejected,
    an_endpoint_that_speaks_first_and_much_or_closes_is_not_ejected,
    an_endpoint_that_accepts_and_closes_fails_few_requests,
    an_endpoint_that_answers_again_is_used_again,
    usable_endpoints_share_evenly,
    a_pool_comes_back_little_by_little_after_an_outage,
    one_client_of_a_worker_finds_out_that_the_backend_has_forgotten_all,
    requests_outlive_a_backend_that_has_forgotten_all,
    a_session_on_which_the_backend_was_to_hear_first_of_its_client_moves,
    stores_that_are_needed_get_connections_whatever_others_keep,
    connections_beyond_the_budget_are_not_made_anew_for_each_request,
];

const IDLE: (&str, &str) = ("state", "idle");

/// Accepts, waits for `delay`, and closes without a byte.
fn closes_after(delay: Duration) -> Backend {
    Backend::scripted(move |_| thread::sleep(delay))
}

/// How many of `count` short sessions, one after the other, were served.
fn served(proxy: &Proxy, count: u32) -> u32 {
    (0..count).filter(|_| ask_once(proxy.address(), "who").is_ok_and(|by| by == "good")).count()
        as u32
}

const POLICIES: [&str; 3] = ["least_conn", "round_robin", "random_two"];

/// Runs 200 sessions on a good endpoint and a bad one, by each policy, with and without pools.
fn few_are_lost(io: Io, bad: &Backend) {
    for (policy, pool) in POLICIES.into_iter().flat_map(|policy| [(policy, 0), (policy, 4)]) {
        let good = Backend::named("good");
        let proxy = Builder::on(io)
            .backends(&[bad.address(), good.address()])
            .pool(pool, 16 * pool)
            .set("AEGIS_BALANCE", policy)
            .start();
        let good = served(&proxy, 200);
        measured(&format!("{policy}, pool of {pool}: {good} of 200 served"));
        // Each worker may lose three until it ejects the endpoint, and one for each time that it
        // tries it again.
        assert!(good >= 185, "{policy}, pool of {pool}: {good} of 200");
    }
}

fn an_endpoint_that_accepts_and_closes_costs_few_sessions(io: Io) {
    few_are_lost(io, &closes_after(Duration::ZERO));
}

fn an_endpoint_that_accepts_and_resets_costs_few_sessions(io: Io) {
    few_are_lost(io, &Backend::scripted(reset_on_close));
}

fn an_endpoint_that_closes_at_the_first_byte_costs_few_sessions(io: Io) {
    few_are_lost(
        io,
        &Backend::scripted(|mut stream| {
            let _ = stream.read(&mut [0]);
        }),
    );
}

fn a_session_that_has_sent_nothing_moves_on_from_an_endpoint_that_closes_at_once(io: Io) {
    let (bad, good) = (closes_after(Duration::ZERO), Backend::named("good"));
    let proxy = Builder::on(io)
        .backends(&[bad.address(), good.address()])
        .without_pool()
        .set("AEGIS_BALANCE", "round_robin")
        .set("AEGIS_EJECT_FAILURES", "1000")
        .start();
    let clients: Vec<_> = (0..20).map(|_| connect(proxy.address())).collect();
    let (bad, good) = (bad.address().to_string(), good.address().to_string());
    proxy.wait_for(ENDPOINT_SESSIONS, &[("endpoint", &good)], |sessions| sessions == 20);
    proxy.wait_for(ENDPOINT_SESSIONS, &[("endpoint", &bad)], |sessions| sessions == 0);
    for client in &clients {
        assert_eq!(ask(client, "who"), "good");
    }
}

fn an_end_is_passed_on_where_all_endpoints_close_at_once(io: Io) {
    let bad = [closes_after(Duration::ZERO), closes_after(Duration::ZERO)];
    let proxy = Builder::on(io).backends(&bad.each_ref().map(Backend::address)).start();
    for _ in 0..10 {
        let client = connect(proxy.address());
        assert_eq!(read_to_end(&client).unwrap(), b"");
    }
}

fn usable(proxy: &Proxy, backend: &Backend) -> u64 {
    proxy.metric(ENDPOINT_USABLE, &[("endpoint", &backend.address().to_string())])
}

fn clients_that_leave_without_a_word_eject_nobody(io: Io) {
    let (a, b) = (Backend::named("good"), Backend::named("good"));
    for pool in [0, 4] {
        let proxy = Builder::on(io)
            .backends(&[a.address(), b.address()])
            .pool(pool, pool)
            .set("AEGIS_EJECT_FAILURES", "1")
            .start();
        for _ in 0..50 {
            drop(connect(proxy.address()));
            let client = connect(proxy.address());
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_to_end(&client).unwrap(), b"");
        }
        proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
        assert_eq!((usable(&proxy, &a), usable(&proxy, &b)), (1, 1));
    }
}

fn an_endpoint_that_takes_and_never_says_anything_is_not_ejected(io: Io) {
    let sink = Backend::scripted(|stream| {
        let _ = read_line(stream);
        // It was asked to end after a while.
        thread::sleep(Duration::from_millis(1100));
    });
    let proxy = Builder::on(io)
        .backends(&[sink.address()])
        .without_pool()
        .set("AEGIS_EJECT_FAILURES", "1")
        .start();
    let clients: Vec<_> = (0..5).map(|_| connect(proxy.address())).collect();
    for mut client in &clients {
        client.write_all(b"take this\n").unwrap();
    }
    for client in &clients {
        assert_eq!(read_to_end(client).unwrap(), b"");
    }
    assert_eq!(usable(&proxy, &sink), 1);
}

fn an_endpoint_that_speaks_first_and_much_or_closes_is_not_ejected(io: Io) {
    // More than is kept of what is said to nobody. It is made beforehand: a server that begins to
    // speak only after a second is taken for one that ends what does not log in.
    let much = pattern(1, 200_000);
    let feed = Backend::scripted(|mut stream| {
        let _ = stream.write_all(much);
        let _ = read_to_end(stream);
    });
    let daytime = Backend::scripted(|mut stream| {
        let _ = stream.write_all(b"half past nine");
    });
    for (mut backend, reason) in [(feed, "unexpected"), (daytime, "dead")] {
        let proxy = Builder::on(io)
            .backends(&[backend.address()])
            .pool(1, 4)
            .set("AEGIS_EJECT_FAILURES", "1")
            .start();
        proxy.wait_for(POOL_DISCARDS, &[("reason", reason)], |discards| discards >= 3);
        assert_eq!(proxy.metric("aegis_endpoint_ejections_total", &[]), 0, "{reason}");
        assert_eq!(usable(&proxy, &backend), 1, "{reason}");
        // One that was away is used again once it has spoken.
        backend.kill();
        eventually("it is ejected", PATIENCE, || (usable(&proxy, &backend) == 0).then_some(()));
        backend.start();
        eventually("it is usable", PATIENCE, || (usable(&proxy, &backend) == 1).then_some(()));
    }
}

fn an_endpoint_that_accepts_and_closes_fails_few_requests(io: Io) {
    let (bad, good) = (closes_after(Duration::ZERO), Backend::chronos());
    for mode in ["request", "session"] {
        for policy in POLICIES {
            let proxy = Builder::on(io)
                .backends(&[bad.address(), good.address()])
                .protocol("chronos", mode)
                .set("AEGIS_BALANCE", policy)
                .pool(0, 8)
                .start();
            let (mut failed, mut held) = (0, Vec::new());
            for i in 0..100 {
                let client = connect(proxy.address());
                let set = ask(&client, &format!("SET k{i} v"));
                failed += u32::from(set != "OK");
                assert_eq!(ask(&client, "PING"), "PONG", "it may be sent again");
                // In a session each has a connection of its own.
                held.push(client);
            }
            measured(&format!("{mode}, {policy}: {failed} of 100 writes failed"));
            assert!(failed <= 10, "{mode}, {policy}: {failed} of 100");
        }
    }
}

fn an_endpoint_that_answers_again_is_used_again(io: Io) {
    let well = Arc::new(AtomicBool::new(false));
    let flag = well.clone();
    let changing = Backend::scripted(move |mut stream| {
        while flag.load(Relaxed) && read_line(stream).is_ok() {
            if stream.write_all(b"back\n").is_err() {
                return;
            }
        }
    });
    let good = Backend::named("good");
    for pool in [0, 4] {
        well.store(false, Relaxed);
        let proxy = Builder::on(io)
            .backends(&[changing.address(), good.address()])
            .pool(pool, pool)
            .set("AEGIS_EJECT_TIME", "200ms")
            .start();
        served(&proxy, 50);
        well.store(true, Relaxed);
        let mut held = Vec::new();
        eventually("it serves again", PATIENCE, || {
            let client = connect(proxy.address());
            let by = try_ask(&client, "who").ok()?;
            held.push(client);
            (by == "back").then_some(())
        });
        proxy.wait_for(
            ENDPOINT_USABLE,
            &[("endpoint", &changing.address().to_string())],
            |usable| usable == 1,
        );
    }
}

fn usable_endpoints_share_evenly(io: Io) {
    let mut refusing = Backend::named("refusing");
    refusing.kill();
    for policy in POLICIES {
        let backends: Vec<_> = (0..4).map(|_| Backend::named("good")).collect();
        let mut addresses: Vec<_> = backends.iter().map(Backend::address).collect();
        addresses.insert(1, refusing.address());
        let proxy = Builder::on(io)
            .backends(&addresses)
            .without_pool()
            .set("AEGIS_BALANCE", policy)
            .set("AEGIS_EJECT_TIME", "1h")
            .set("AEGIS_WORKERS", "1")
            .start();
        assert_eq!(served(&proxy, 400), 400);
        let shares: Vec<_> = backends.iter().map(Backend::accepted).collect();
        // By load, the end of the session before may not have been seen yet.
        let range = match policy {
            "round_robin" => 98..=102,
            "least_conn" => 80..=120,
            _ => 60..=140,
        };
        assert!(shares.iter().all(|share| range.contains(share)), "{policy}: {shares:?}");
    }
}

fn a_pool_comes_back_little_by_little_after_an_outage(io: Io) {
    let mut backend = Backend::named("good");
    let proxy = Builder::on(io).backends(&[backend.address()]).pool(4, 64).start();
    proxy.wait_for(POOL_CONNECTIONS, &[IDLE], |idle| idle == 8);
    backend.kill();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        ask_once(proxy.address(), "who").expect_err("nobody could have answered");
        thread::sleep(Duration::from_millis(2));
    }
    let before = backend.accepted();
    backend.start();
    let asked = eventually("it serves again", PATIENCE, || ask_once(proxy.address(), "who").ok());
    assert_eq!(asked, "good");
    proxy.wait_for(POOL_CONNECTIONS, &[IDLE], |idle| idle == 8);
    let made = backend.accepted() - before;
    measured(&format!("{made} connections after the return"));
    assert!(made <= 12, "{made} connections for one client");
}

/// A proxy with so few descriptors that pools have sixteen, where the minimum alone is 48.
fn short_of_descriptors(io: Io, stores: &[Backend]) -> Builder {
    let addresses: Vec<_> = stores.iter().map(Backend::address).collect();
    Builder::on(io)
        .backends(&addresses)
        .set("AEGIS_WORKERS", "1")
        .protocol("chronos", "request")
        .set("AEGIS_POOL_SIZE", "4")
        .set("AEGIS_QUEUE_TIMEOUT", "1s")
        .set("AEGIS_MAX_SESSIONS", "40")
        .pool(4, 4)
        .descriptors_max(286)
}

fn stores_that_are_needed_get_connections_whatever_others_keep(io: Io) {
    let stores: Vec<_> = (0..12).map(|_| Backend::chronos()).collect();
    let proxy = short_of_descriptors(io, &stores).set("AEGIS_BALANCE", "key_hash").start();
    let clients: Vec<_> = (0..8).map(|_| connect(proxy.address())).collect();
    for round in 0..50 {
        for (i, client) in clients.iter().enumerate() {
            assert_eq!(ask(client, &format!("SET k{i}-{round} v")), "OK");
        }
    }
    assert!(stores.iter().all(|store| store.accepted() > 0));
    let made: u64 = stores.iter().map(Backend::accepted).sum();
    measured(&format!("{made} connections for 400 requests"));
    assert!(made <= 80, "{made} connections for 400 requests");
}

fn connections_beyond_the_budget_are_not_made_anew_for_each_request(io: Io) {
    const CLIENTS: usize = 32;
    for policy in POLICIES {
        let stores: Vec<_> = (0..12).map(|_| Backend::chronos()).collect();
        let proxy = short_of_descriptors(io, &stores).set("AEGIS_BALANCE", policy).start();
        thread::scope(|scope| {
            for i in 0..CLIENTS {
                let client = connect(proxy.address());
                let set = move |round| assert_eq!(ask(&client, &format!("SET k{i} {round}")), "OK");
                scope.spawn(move || (0..60).for_each(set));
            }
        });
        let made: u64 = stores.iter().map(Backend::accepted).sum();
        measured(&format!("{policy}: {made} connections for {} requests", 60 * CLIENTS));
        assert!(made <= 160, "{policy}: {made} connections");
    }
}

/// Reads a line and answers it.
fn answer_line(mut stream: &TcpStream, answer: impl Fn(&str) -> String) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let line = read_line(stream)?;
    stream.write_all(format!("{}\n", answer(&line)).as_bytes())
}

/// A backend whose host can be power-cycled: it forgets its connections without a word to anybody.
struct Forgetful {
    backend: Backend,
    cycles: Arc<AtomicU64>,
    /// Connections that it serves now.
    serving: Arc<()>,
}

impl Forgetful {
    /// Answers each line by `answer`.
    fn new(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let (cycles, serving) = <(Arc<AtomicU64>, Arc<()>)>::default();
        let (power, served) = (cycles.clone(), serving.clone());
        let backend = Backend::scripted(move |stream| {
            let begun = power.load(Relaxed);
            let _served = served.clone();
            loop {
                stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
                match stream.peek(&mut [0]) {
                    Ok(1..) if answer_line(stream, &answer).is_ok() => {}
                    Err(error) if is_timeout(&error) => {}
                    _ => return,
                }
                if power.load(Relaxed) != begun {
                    return forget(stream);
                }
            }
        });
        Self { backend, cycles, serving }
    }

    /// Forgets all its connections, of which there are at least so many.
    fn power_cycle(&self, least: usize) {
        // One is the backend's own, one ours.
        let serving = || Arc::strong_count(&self.serving) - 2;
        eventually("all are served", PATIENCE, || {
            (serving() >= least && serving() == self.backend.open()).then_some(())
        });
        self.cycles.fetch_add(1, Relaxed);
        eventually("all is forgotten", PATIENCE, || (self.backend.open() == 0).then_some(()));
    }
}

/// Makes the close of a connection silent: its peer hears nothing, and meets a reset when it sends.
#[allow(unsafe_code, reason = "no crate sets this option")]
fn forget(stream: &TcpStream) {
    let (on, len) = (1_i32, size_of::<i32>() as u32);
    // SAFETY: the option is an integer, which outlives the call.
    let outcome = unsafe {
        let value = (&raw const on).cast();
        libc::setsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, value, len)
    };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
}

fn may_forget() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip("only root may make a connection be forgotten");
    }
    root
}

fn one_client_of_a_worker_finds_out_that_the_backend_has_forgotten_all(io: Io) {
    if !may_forget() {
        return;
    }
    for policy in POLICIES {
        let forgetful = Forgetful::new(|_| "good".to_owned());
        let proxy = Builder::on(io)
            .backends(&[forgetful.backend.address()])
            .set("AEGIS_BALANCE", policy)
            .pool(4, 4)
            .start();
        for _ in 0..2 {
            proxy.wait_for(POOL_CONNECTIONS, &[IDLE], |idle| idle == 8);
            forgetful.power_cycle(8);
            let lost = 20 - served(&proxy, 20);
            measured(&format!("{lost} of 20 clients were lost"));
            assert!(lost <= 2, "{lost} of 20");
            assert_eq!(served(&proxy, 20), 20);
        }
    }
}

fn requests_outlive_a_backend_that_has_forgotten_all(io: Io) {
    if !may_forget() {
        return;
    }
    for mode in ["request", "session"] {
        let forgetful = Forgetful::new(|line| line[..1].to_owned());
        let proxy = Builder::on(io)
            .backends(&[forgetful.backend.address()])
            .set("AEGIS_WORKERS", "1")
            .protocol("chronos", mode)
            .set("AEGIS_POOL_SIZE", "8")
            .pool(8, 8)
            .start();
        let clients: Vec<_> = (0..8).map(|_| connect(proxy.address())).collect();
        for request in ["GET k", "SET k v"] {
            for client in &clients {
                assert_eq!(ask(client, "GET k"), "G");
            }
            forgetful.power_cycle(1);
            let answers = clients.iter().map(|client| ask(client, request));
            let lost = answers.filter(|answer| *answer != request[..1]).count();
            measured(&format!("{mode}: {lost} of 8 were lost of {request:?}"));
            let allowed = usize::from(request.starts_with('S'));
            assert!(lost <= allowed, "{mode}: {lost} of 8 {request:?}");
        }
    }
}

/// With a PROXY header the backend's reset comes before the client has said anything.
fn a_session_on_which_the_backend_was_to_hear_first_of_its_client_moves(io: Io) {
    if !may_forget() {
        return;
    }
    let forgetful = Forgetful::new(|line| line.split(' ').next().unwrap().to_owned());
    let proxy = Builder::on(io)
        .backends(&[forgetful.backend.address()])
        .set("AEGIS_PROXY_PROTOCOL", "v1")
        .pool(4, 4)
        .start();
    proxy.wait_for(POOL_CONNECTIONS, &[IDLE], |idle| idle == 8);
    forgetful.power_cycle(8);
    let clients: Vec<_> = (0..10).map(|_| connect(proxy.address())).collect();
    for client in &clients {
        assert_eq!(read_line(client).unwrap(), "PROXY", "the answer to the header");
        assert_eq!(ask(client, "who"), "who");
    }
}
