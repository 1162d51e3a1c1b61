//! `AEGIS_QUEUE_MAX`: who has to wait until others are done may be refused, and nobody else is.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use crate::support::backend::Backend;
use crate::support::client::{ask, connect, read_line, try_ask, try_connect};
use crate::support::metrics::{POOL_CONNECTIONS, REQUESTS, SESSIONS_ACTIVE, SESSIONS_CLOSED};
use crate::support::proxy::Builder;
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    requests_for_which_connections_can_be_made_are_none_of_a_queue,
    a_request_that_finds_a_connection_being_closed_waits_for_its_place,
    sessions_for_which_another_worker_has_an_idle_connection_are_not_refused,
];

const FULL: &str = "ERR too many requests wait for a connection";

/// Answers lines, those that say `wait` once it may.
fn gated(is_open: &Arc<AtomicBool>) -> Backend {
    let is_open = Arc::clone(is_open);
    Backend::scripted(move |mut stream| {
        while let Ok(line) = read_line(stream) {
            while line.contains("wait") && !is_open.load(SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            if stream.write_all(b"done\n").is_err() {
                return;
            }
        }
    })
}

fn no_queue(io: Io, backend: &Backend) -> Builder {
    Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_QUEUE_MAX", "0")
        .set("AEGIS_POOL_MIN_IDLE", "0")
}

fn requests_for_which_connections_can_be_made_are_none_of_a_queue(io: Io) {
    for mode in ["request", "session"] {
        let is_open = Arc::default();
        let backend = gated(&is_open);
        let proxy =
            no_queue(io, &backend).protocol("chronos", mode).set("AEGIS_ENDPOINT_MAX", "6").start();
        let clients: Vec<_> = (0..6).map(|_| connect(proxy.address())).collect();
        let asking = clients.into_iter().map(|client| {
            thread::spawn(move || try_ask(&client, "GET wait").map(|answer| (client, answer)))
        });
        let asking: Vec<_> = asking.collect();
        proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 6);
        let other = connect(proxy.address());
        assert_eq!(ask(&other, "GET it"), FULL, "in {mode} mode");
        is_open.store(true, SeqCst);
        let answered: Vec<_> = asking.into_iter().map(|one| one.join().unwrap().unwrap()).collect();
        assert!(answered.iter().all(|(_, answer)| answer == "done"), "{answered:?} in {mode} mode");
        drop(answered);
        eventually("a connection is free", PATIENCE, || {
            (ask(&other, "GET it") == "done").then_some(())
        });
        assert!(proxy.metric(REQUESTS, &[("outcome", "queue_full")]) >= 1);
    }
}

fn a_request_that_finds_a_connection_being_closed_waits_for_its_place(io: Io) {
    let backend = Backend::scripted(|mut stream| {
        // It ends each connection behind a reply.
        let _ = read_line(stream).is_ok() && stream.write_all(b"done\n").is_ok();
    });
    let proxy = no_queue(io, &backend)
        .set("AEGIS_WORKERS", "1")
        .protocol("chronos", "request")
        .set("AEGIS_POOL_SIZE", "1")
        .set("AEGIS_RETRY_BUDGET", "off")
        .start();
    let client = connect(proxy.address());
    for round in 0..200 {
        assert_eq!(ask(&client, "GET it"), "done", "in round {round}");
    }
}

fn sessions_for_which_another_worker_has_an_idle_connection_are_not_refused(io: Io) {
    const ROUNDS: u64 = 10;
    let backend = Backend::named("a");
    // Of three, one worker keeps two and the other one.
    let proxy = no_queue(io, &backend)
        .set("AEGIS_POOL_MIN_IDLE", "3")
        .set("AEGIS_ENDPOINT_MAX", "3")
        .start();
    for round in 0..ROUNDS {
        proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle == 3);
        let clients: Vec<_> = (0..3).map(|_| connect(proxy.address())).collect();
        for client in &clients {
            assert_eq!(ask(client, "who"), "a", "in round {round}");
        }
        let refused = try_connect(proxy.address()).and_then(|client| try_ask(&client, "who"));
        assert!(refused.is_err(), "one too many is answered {refused:?} in round {round}");
        drop(clients);
        proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
    }
    assert_eq!(proxy.metric(SESSIONS_CLOSED, &[("reason", "queue_full")]), ROUNDS);
}
