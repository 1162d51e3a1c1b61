//! Clients go to the worker with the fewest sessions, whichever the kernel chose.

use std::net::TcpStream;
use std::thread;

use crate::support::backend::Backend;
use crate::support::client::{ask, connect};
use crate::support::metrics::{HANDED_OVER, SESSIONS_ACTIVE};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, on_both_drivers};

on_both_drivers![
    long_connections_are_spread_evenly,
    clients_whose_requests_are_told_apart_are_spread_evenly,
    a_client_that_is_alone_stays,
    clients_that_ask_once_and_leave_stay,
];

const WORKERS: usize = 3;

fn builder(io: Io, backend: &Backend) -> Builder {
    Builder::on(io).backends(&[backend.address()]).set("AEGIS_WORKERS", WORKERS.to_string())
}

fn sessions(proxy: &Proxy) -> [u64; WORKERS] {
    std::array::from_fn(|worker| {
        proxy.metric(SESSIONS_ACTIVE, &[("worker", worker.to_string().as_str())])
    })
}

fn spread(proxy: &Proxy, request: &str, answer: &str) {
    // By chance alone they would be as even as this once in 30 times.
    let clients: Vec<TcpStream> = (0..8 * WORKERS)
        .map(|_| {
            let client = connect(proxy.address());
            assert_eq!(ask(&client, request), answer);
            client
        })
        .collect();
    assert_eq!(sessions(proxy), [8; WORKERS]);
    assert!(proxy.metric(HANDED_OVER, &[]) > 0);
    for client in &clients {
        assert_eq!(ask(client, request), answer);
    }
}

fn long_connections_are_spread_evenly(io: Io) {
    let backend = Backend::named("a");
    spread(&builder(io, &backend).start(), "who", "a");
}

fn clients_whose_requests_are_told_apart_are_spread_evenly(io: Io) {
    let backend = Backend::chronos();
    let builder = builder(io, &backend)
        .set("AEGIS_PROTOCOL", "chronos")
        .set("AEGIS_POOL_MODE", "request")
        .set("AEGIS_POOL_SIZE", "1");
    spread(&builder.start(), "PING", "PONG");
}

fn a_client_that_is_alone_stays(io: Io) {
    let backend = Backend::named("a");
    let proxy = builder(io, &backend).start();
    for _ in 0..2 * WORKERS {
        let client = connect(proxy.address());
        assert_eq!(ask(&client, "who"), "a");
        drop(client);
        proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
    }
    assert_eq!(proxy.metric(HANDED_OVER, &[]), 0);
}

fn clients_that_ask_once_and_leave_stay(io: Io) {
    const CLIENTS: u64 = 16;
    const TIMES: u64 = 100;
    let backend = Backend::named("a");
    let proxy = builder(io, &backend).start();
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                for _ in 0..TIMES {
                    assert_eq!(ask(&connect(proxy.address()), "who"), "a");
                }
            });
        }
    });
    // Only the first ones might have come to stay.
    let moved = proxy.metric(HANDED_OVER, &[]);
    assert!(moved <= 2 * CLIENTS, "{moved} of {} were handed over", CLIENTS * TIMES);
}
