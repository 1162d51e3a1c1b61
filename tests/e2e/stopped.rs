//! A process that stands still for longer than its time limits, as one that is stopped or frozen: what
//! came meanwhile is heard before it is decided by the clock.

use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::replies::pooled;
use super::unheard::stopped;
use crate::support::backend::Backend;
use crate::support::client::{ask, connect, read_line};
use crate::support::link::{Fate, Link};
use crate::support::metrics::{ENDPOINT_USABLE, REQUESTS, SESSIONS_CLOSED};
use crate::support::proxy::Builder;
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    answers_that_came_meanwhile_are_passed_on,
    sessions_on_which_something_came_meanwhile_were_not_idle,
    connects_that_succeeded_meanwhile_are_no_failures,
    checks_that_were_passed_meanwhile_have_not_failed,
];

/// The limits that are over after a stop.
const LIMIT: &str = "500ms";
const STOP: Duration = Duration::from_millis(700);
/// More than epoll tells at a time.
const CROWD: usize = 1_500;

fn answers_that_came_meanwhile_are_passed_on(io: Io) {
    // A crowd takes a while to ask, on a busy machine.
    for (count, limit, stop) in [(1, LIMIT, STOP), (CROWD, "4s", Duration::from_millis(4500))] {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&asked);
        let backend = Backend::scripted(move |stream: &TcpStream| {
            while let Ok(line) = read_line(stream) {
                all.lock().unwrap().push((stream.try_clone().unwrap(), line));
            }
        });
        let proxy = pooled(io, "chronos", "request", &backend)
            .set("AEGIS_REQUEST_TIMEOUT", limit)
            .set("AEGIS_POOL_SIZE", "4096")
            .start();
        let clients: Vec<_> = (0..count).map(|_| connect(proxy.address())).collect();
        for (i, mut client) in clients.iter().enumerate() {
            client.write_all(format!("GET k{i}\n").as_bytes()).unwrap();
        }
        eventually("all are asked", PATIENCE, || {
            (asked.lock().unwrap().len() == count).then_some(())
        });
        stopped(&proxy, || {
            for (mut stream, line) in asked.lock().unwrap().drain(..) {
                stream.write_all(format!("{line}\n").as_bytes()).unwrap();
            }
            thread::sleep(stop);
        });
        for (i, client) in clients.iter().enumerate() {
            assert_eq!(read_line(client).unwrap(), format!("GET k{i}"), "of {count}");
        }
        assert_eq!(proxy.metric(REQUESTS, &[("outcome", "timeout")]), 0);
    }
}

fn sessions_on_which_something_came_meanwhile_were_not_idle(io: Io) {
    let backend = Backend::echo();
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_WORKERS", "1")
        .set("AEGIS_IDLE_TIMEOUT", LIMIT)
        .start();
    let clients: Vec<_> = (0..10).map(|_| connect(proxy.address())).collect();
    for client in &clients {
        ask(client, "first");
    }
    stopped(&proxy, || {
        for mut client in &clients {
            client.write_all(b"second\n").unwrap();
        }
        thread::sleep(STOP);
    });
    for client in &clients {
        assert_eq!(read_line(client).unwrap(), "second");
    }
    assert_eq!(proxy.metric(SESSIONS_CLOSED, &[("reason", "idle_timeout")]), 0);
}

fn connects_that_succeeded_meanwhile_are_no_failures(io: Io) {
    const FAR: Fate = Fate::Lossy(0, Duration::from_millis(200));
    let Some(link) = Link::new() else { return };
    let server = Backend::named_on("far", Link::here());
    let proxy = Builder::on(io)
        .backends(&[link.behind(0, server.address())])
        .without_pool()
        .set("AEGIS_WORKERS", "1")
        .set("AEGIS_CONNECT_TIMEOUT", LIMIT)
        .start();
    link.set(0, FAR, Fate::Arrive);
    let clients: Vec<_> = (0..10).map(|_| connect(proxy.address())).collect();
    proxy.wait_for("aegis_sessions_active", &[], |active| active == 10);
    stopped(&proxy, || thread::sleep(STOP));
    for client in &clients {
        assert_eq!(ask(client, "who"), "far");
    }
    assert_eq!(server.accepted(), 10, "each was connected once");
    assert_eq!(proxy.metric("aegis_endpoint_connect_failures_total", &[]), 0);
    assert_eq!(proxy.metric(ENDPOINT_USABLE, &[]), 1);
}

fn checks_that_were_passed_meanwhile_have_not_failed(io: Io) {
    const CHECKS: &str = "aegis_endpoint_checks_total";
    const PAUSE: Duration = Duration::from_millis(30);
    const STOPS: u64 = 20;
    let asked = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&asked);
    let backend = Backend::scripted(move |mut stream| {
        while read_line(stream).is_ok() {
            counted.fetch_add(1, SeqCst);
            thread::sleep(PAUSE);
            let _ = stream.write_all(b"PONG\n");
        }
    });
    let proxy = pooled(io, "chronos", "request", &backend)
        .set("AEGIS_CHECK", "request")
        .set("AEGIS_CHECK_INTERVAL", "100ms")
        .set("AEGIS_CHECK_FALL", "1")
        .set("AEGIS_CONNECT_TIMEOUT", "200ms")
        .start();
    for _ in 0..STOPS {
        // The one that was under way at the last stop has been told of, and the next one is under way.
        let before = proxy.metric(CHECKS, &[]);
        proxy.wait_for(CHECKS, &[], |made| made > before);
        let before = asked.load(SeqCst);
        eventually("a check", PATIENCE, || (asked.load(SeqCst) > before).then_some(()));
        stopped(&proxy, || thread::sleep(STOP / 2));
    }
    // On a busy machine some take too long by themselves; each did that was stopped.
    let failed = proxy.metric("aegis_endpoint_check_failures_total", &[]);
    assert!(failed < STOPS / 2, "{failed} of {STOPS}");
}
