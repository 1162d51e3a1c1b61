//! The minimum of warm connections: of all workers together, counted where they arrive.

use std::time::Duration;

use crate::support::backend::Backend;
use crate::support::client::{ask, connect};
use crate::support::metrics::{POOL_CHECKOUTS, POOL_CONNECTIONS};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    an_endpoint_has_the_minimum_however_many_workers_there_are,
    requests_share_the_minimum_of_all_workers,
    many_endpoints_have_the_minimum_each,
    a_worker_without_a_share_serves_its_sessions,
    shares_above_the_minimum_grow_and_shrink_again,
];

const MIN_IDLE: u64 = 4;

fn builder(io: Io, backends: &[Backend], workers: usize) -> Builder {
    let addresses: Vec<_> = backends.iter().map(Backend::address).collect();
    Builder::on(io)
        .backends(&addresses)
        .set("AEGIS_WORKERS", workers.to_string())
        .set("AEGIS_POOL_MIN_IDLE", MIN_IDLE.to_string())
}

/// Pools are looked over ten times a second, and grow in rounds: what is still missing or too many
/// after this time stays so.
const SETTLED: Duration = Duration::from_millis(700);

/// Waits until each backend has `count` connections, and sees it stay so.
fn expect_warm(proxy: &Proxy, backends: &[Backend], count: u64) {
    let is_warm = || backends.iter().all(|backend| backend.accepted() == count);
    eventually("the minimum is there", PATIENCE, || is_warm().then_some(()));
    std::thread::sleep(SETTLED);
    let accepted: Vec<_> = backends.iter().map(Backend::accepted).collect();
    assert!(is_warm(), "{accepted:?}");
    let open: usize = backends.iter().map(Backend::open).sum();
    assert_eq!(proxy.metric(POOL_CONNECTIONS, &[("state", "idle")]), open as u64);
}

fn backends(count: usize) -> Vec<Backend> {
    (0..count).map(|_| Backend::named("a")).collect()
}

fn an_endpoint_has_the_minimum_however_many_workers_there_are(io: Io) {
    for workers in [1, 3, 16] {
        let backends = backends(3);
        let proxy = builder(io, &backends, workers).start();
        expect_warm(&proxy, &backends, MIN_IDLE);
    }
}

fn requests_share_the_minimum_of_all_workers(io: Io) {
    for mode in ["session", "request"] {
        let backends = [Backend::chronos(), Backend::chronos()];
        let proxy = builder(io, &backends, 3).protocol("chronos", mode).start();
        expect_warm(&proxy, &backends, MIN_IDLE);
    }
}

fn many_endpoints_have_the_minimum_each(io: Io) {
    let backends = backends(12);
    for min_idle in [1, 5] {
        let connected: Vec<_> = backends.iter().map(Backend::accepted).collect();
        let proxy =
            builder(io, &backends, 16).set("AEGIS_POOL_MIN_IDLE", min_idle.to_string()).start();
        expect_warm(&proxy, &backends, connected[0] + min_idle);
    }
}

fn a_worker_without_a_share_serves_its_sessions(io: Io) {
    const WORKERS: usize = 16;
    let backends = backends(1);
    let proxy = builder(io, &backends, WORKERS).start();
    expect_warm(&proxy, &backends, MIN_IDLE);
    // Sessions that stay are spread over all workers.
    let clients: Vec<_> = (0..4 * WORKERS)
        .map(|_| {
            let client = connect(proxy.address());
            assert_eq!(ask(&client, "who"), "a");
            client
        })
        .collect();
    let misses = proxy.metric(POOL_CHECKOUTS, &[("result", "miss")]);
    assert!(misses >= (WORKERS as u64 - MIN_IDLE) / 2, "{misses} found no warm connection");
    for client in &clients {
        assert_eq!(ask(client, "who"), "a");
    }
}

fn shares_above_the_minimum_grow_and_shrink_again(io: Io) {
    let backends = backends(1);
    let proxy = builder(io, &backends, 3).set("AEGIS_POOL_IDLE_TIMEOUT", "500ms").start();
    expect_warm(&proxy, &backends, MIN_IDLE);
    for _ in 0..3 {
        let clients: Vec<_> = (0..40).map(|_| connect(proxy.address())).collect();
        for client in &clients {
            assert_eq!(ask(client, "who"), "a");
        }
    }
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle == MIN_IDLE);
}
