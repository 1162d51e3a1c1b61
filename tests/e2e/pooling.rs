//! Warm connections: made before they are needed, watched, replaced.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect, read_line};
use crate::support::metrics::{POOL_CHECKOUTS, POOL_CONNECTIONS, POOL_DISCARDS};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers, pattern};

on_both_drivers![
    connections_are_warm_before_any_client_comes,
    each_client_finds_a_warm_connection_and_the_pool_refills,
    a_warm_connection_that_the_backend_closes_is_replaced_before_a_client_meets_it,
    a_warm_connection_that_the_backend_floods_is_discarded,
    a_warm_connection_is_replaced_at_the_end_of_its_lifetime,
    warm_connections_above_the_minimum_are_closed_when_idle,
    a_session_without_a_pool_connects_for_itself,
    connections_that_last_are_kept_alive,
];

/// Per worker; there are two.
const MIN_IDLE: u64 = 3;
const IDLE: &[(&str, &str)] = &[("state", "idle")];

fn start(io: Io, backend: &Backend) -> Proxy {
    Builder::on(io).backends(&[backend.address()]).pool(MIN_IDLE, MIN_IDLE).start()
}

fn wait_full(proxy: &Proxy) {
    proxy.wait_for(POOL_CONNECTIONS, IDLE, |idle| idle == 2 * MIN_IDLE);
}

/// A connection is made before the backend has accepted it.
fn wait_accepted(backend: &Backend, connections: u64) {
    eventually(&format!("{connections} connections are accepted"), PATIENCE, || {
        (backend.accepted() == connections).then_some(())
    });
}

fn connections_are_warm_before_any_client_comes(io: Io) {
    let backend = Backend::named("a");
    let proxy = start(io, &backend);
    wait_full(&proxy);
    wait_accepted(&backend, 2 * MIN_IDLE);
}

fn each_client_finds_a_warm_connection_and_the_pool_refills(io: Io) {
    const CLIENTS: u64 = 10;
    let backend = Backend::named("a");
    let proxy = start(io, &backend);
    for _ in 0..CLIENTS {
        wait_full(&proxy);
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
    }
    // Every connection is used once, so each client's was a new one to the backend.
    wait_full(&proxy);
    wait_accepted(&backend, 2 * MIN_IDLE + CLIENTS);
    assert_eq!(proxy.metric(POOL_CHECKOUTS, &[("result", "hit")]), CLIENTS);
    assert_eq!(proxy.metric(POOL_CHECKOUTS, &[("result", "miss")]), 0);
}

fn a_warm_connection_that_the_backend_closes_is_replaced_before_a_client_meets_it(io: Io) {
    let backend = Backend::named("a");
    let proxy = start(io, &backend);
    for round in 1..=3 {
        wait_full(&proxy);
        wait_accepted(&backend, round * 2 * MIN_IDLE);
        backend.close_connections();
        let closed = round * 2 * MIN_IDLE;
        proxy.wait_for(POOL_DISCARDS, &[("reason", "dead")], |dead| dead == closed);
    }
    for _ in 0..20 {
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
    }
    wait_full(&proxy);
}

fn a_warm_connection_that_the_backend_floods_is_discarded(io: Io) {
    let backend = Backend::scripted(|mut stream| {
        if stream.write_all(pattern(0, 4 << 20)).is_ok() {
            let _ = read_line(stream);
        }
    });
    let proxy = start(io, &backend);
    proxy.wait_for(POOL_DISCARDS, &[("reason", "unexpected")], |discards| discards >= 1);
}

fn a_warm_connection_is_replaced_at_the_end_of_its_lifetime(io: Io) {
    let backend = Backend::named("a");
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .pool(MIN_IDLE, MIN_IDLE)
        .set("AEGIS_POOL_MAX_LIFETIME", "1s")
        .start();
    proxy.wait_for(POOL_DISCARDS, &[("reason", "lifetime")], |old| old >= 2 * MIN_IDLE);
    wait_full(&proxy);
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
}

fn warm_connections_above_the_minimum_are_closed_when_idle(io: Io) {
    let backend = Backend::named("a");
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .pool(1, 16)
        .set("AEGIS_POOL_IDLE_TIMEOUT", "500ms")
        .start();
    // However far the demand of many clients makes the pools grow, they come back to the minimum.
    for _ in 0..5 {
        let clients: Vec<_> = (0..40).map(|_| connect(proxy.address())).collect();
        for client in &clients {
            assert_eq!(ask(client, "who"), "a");
        }
    }
    proxy.wait_for(POOL_CONNECTIONS, IDLE, |idle| idle == 2);
}

fn a_session_without_a_pool_connects_for_itself(io: Io) {
    let backend = Backend::named("a");
    let proxy = Builder::on(io).backends(&[backend.address()]).without_pool().start();
    for _ in 0..5 {
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
    }
    assert_eq!(backend.accepted(), 5);
    assert_eq!(proxy.metric(POOL_CONNECTIONS, IDLE), 0);
    assert_eq!(proxy.metric(POOL_CHECKOUTS, &[("result", "hit")]), 0);
    assert_eq!(proxy.metric(POOL_CHECKOUTS, &[("result", "miss")]), 5);
}

/// The timers of the connections to a listener, as the kernel numbers them.
fn timers(to: SocketAddr) -> Vec<String> {
    const ESTABLISHED: &str = "01";
    let remote = format!(":{:04X}", to.port());
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().map(|row| row.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[2].ends_with(&remote) && row[3] == ESTABLISHED)
        .map(|row| row[5][..2].to_owned())
        .collect()
}

fn connections_that_last_are_kept_alive(io: Io) {
    const KEEP_ALIVE: &str = "02";
    let backend = Backend::named("a");
    let proxy = start(io, &backend);
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "who"), "a");
    wait_full(&proxy);
    eventually("all are kept alive", PATIENCE, || {
        let timers = timers(backend.address());
        assert_eq!(timers.len() as u64, 2 * MIN_IDLE + 1);
        timers.iter().all(|timer| timer == KEEP_ALIVE).then_some(())
    });
}
