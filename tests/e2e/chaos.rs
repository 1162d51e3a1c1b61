//! Many short sessions, and clients that behave badly beside them.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;

use crate::support::backend::Backend;
use crate::support::client::{ask_once, connect, reset, try_ask, try_connect};
use crate::support::metrics::SESSIONS_ACTIVE;
use crate::support::proxy::Builder;
use crate::support::{Io, SetOnDrop, heavy, on_both_drivers, pattern};

on_both_drivers![
    none_of_many_short_sessions_fails,
    clients_that_reset_and_vanish_harm_nobody_and_leave_nothing_behind,
];

fn none_of_many_short_sessions_fails(io: Io) {
    let _alone = heavy();
    let backends = [Backend::chronos(), Backend::chronos()];
    let proxy = Builder::on(io).backends(&backends.each_ref().map(Backend::address)).start();
    expect_no_failure(proxy.address(), 5000);
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
}

/// Runs this many sessions from 32 threads: connect, store, fetch, close.
fn expect_no_failure(address: SocketAddr, sessions: usize) {
    let next = AtomicUsize::new(0);
    let run = || {
        let numbers = std::iter::repeat_with(|| next.fetch_add(1, Relaxed));
        let numbers = numbers.take_while(|number| *number < sessions);
        numbers.filter_map(|number| store_and_fetch(address, number).err()).collect::<Vec<_>>()
    };
    let failures: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..32).map(|_| scope.spawn(run)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(failures.is_empty(), "{} failed, among them {}", failures.len(), failures[0]);
}

/// A session keeps to one backend, so what it stored is there.
fn store_and_fetch(address: SocketAddr, number: usize) -> Result<(), String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| format!("{number}: {what}: {error}");
    let client = try_connect(address).map_err(|error| failed("connect", &error))?;
    let request = format!("SET key{number} value {number}");
    let stored = try_ask(&client, &request).map_err(|error| failed("set", &error))?;
    let fetched =
        try_ask(&client, &format!("GET key{number}")).map_err(|error| failed("get", &error))?;
    let right = stored == "OK" && fetched == format!("value {number}");
    if right { Ok(()) } else { Err(failed("wrong reply", &format!("{stored}, {fetched}"))) }
}

fn clients_that_reset_and_vanish_harm_nobody_and_leave_nothing_behind(io: Io) {
    let backend = Backend::chronos();
    let proxy = Builder::on(io).backends(&[backend.address()]).start();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _done = SetOnDrop(&done);
        for seed in 0..4 {
            let (address, done) = (proxy.address(), &done);
            scope.spawn(move || misbehave(address, seed, done));
        }
        expect_no_failure(proxy.address(), 1000);
    });
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
}

/// Sessions that stop in the middle, each in one of a few ways.
fn misbehave(address: SocketAddr, seed: u64, done: &AtomicBool) {
    let mut rng = fastrand::Rng::with_seed(seed);
    while !done.load(Relaxed) {
        let mut client = connect(address);
        match rng.u8(..5) {
            0 => drop(client),
            1 => reset(client),
            2 => {
                // Half a request.
                let _ = client.write_all(b"GET ke");
            }
            3 => {
                // A request, and no interest in the reply.
                let _ = client.write_all(b"PING\n");
                reset(client);
            }
            _ => {
                // More than anybody asked for; the backend answers each piece.
                let _ = client.write_all(pattern(rng.usize(..1000), 10_000));
            }
        }
        // A whole exchange for each half one: it keeps to the pace of the proxy.
        assert_eq!(ask_once(address, "PING").unwrap(), "PONG");
    }
}
