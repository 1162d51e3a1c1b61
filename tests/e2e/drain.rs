//! SIGTERM: from the first signal to the exit.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect, try_ask, try_connect, wait_closed};
use crate::support::proxy::{Builder, Proxy, is_refused};
use crate::support::{Io, PATIENCE, SetOnDrop, eventually, heavy, on_both_drivers};

on_both_drivers![
    a_drain_under_load_cuts_no_session_and_drops_no_client,
    sessions_that_outlast_the_deadline_are_ended_there,
    a_second_signal_ends_everything_at_once,
    without_sessions_a_drain_is_over_at_once,
];

/// Waits until `/readyz` says no.
fn wait_unready(proxy: &Proxy) {
    let answer = eventually("/readyz says 503", PATIENCE, || {
        let answer = proxy.get("/readyz");
        (answer.status == 503).then_some(answer)
    });
    assert!(answer.body.to_lowercase().contains("draining"), "{}", answer.body);
}

fn a_drain_under_load_cuts_no_session_and_drops_no_client(io: Io) {
    let _alone = heavy();
    let backends = [Backend::named("up"), Backend::named("up")];
    let mut proxy = Builder::on(io)
        .backends(&backends.each_ref().map(Backend::address))
        .set("AEGIS_DRAIN_DELAY", "2s")
        .set("AEGIS_DRAIN_TIMEOUT", "60s")
        .start();
    let address = proxy.address();
    let (finish, newcomers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let keep_alive: Vec<_> = (0..8).map(|_| connect(address)).collect();
    thread::scope(|scope| {
        let _finish = SetOnDrop(&finish);
        let finish = &finish;
        let stay = |client| scope.spawn(move || stay(client, finish));
        let staying: Vec<_> = keep_alive.iter().map(stay).collect();
        let coming: Vec<_> =
            (0..4).map(|_| scope.spawn(|| come_until_refused(address, &newcomers))).collect();
        eventually("newcomers are served", PATIENCE, || {
            (newcomers.load(Relaxed) > 100).then_some(())
        });

        proxy.terminate();
        let told = Instant::now();
        wait_unready(&proxy);
        assert!(told.elapsed() < Duration::from_secs(1), "/readyz took {:?}", told.elapsed());
        assert_eq!(ask_once(address, "still?").unwrap(), "up");
        let served = newcomers.load(Relaxed);
        // They end when they are refused; whatever else happens to them is an error.
        for client in coming {
            client.join().unwrap().unwrap();
        }
        assert!(newcomers.load(Relaxed) > served, "nobody was served during the delay");
        assert!(told.elapsed() > Duration::from_millis(1500), "the delay was cut short");
        assert!(is_refused(address));

        finish.store(true, Relaxed);
        for client in staying {
            client.join().unwrap().unwrap();
        }
    });
    drop(keep_alive);
    proxy.wait_clean(PATIENCE);
}

/// A keep-alive client: asks until told to finish, and a hundred times more.
fn stay(client: &TcpStream, finish: &AtomicBool) -> io::Result<()> {
    while !finish.load(Relaxed) {
        try_ask(client, "up?")?;
    }
    (0..100).try_for_each(|_| try_ask(client, "up?").map(drop))
}

/// Short sessions until the proxy no longer listens.
fn come_until_refused(address: SocketAddr, served: &AtomicUsize) -> Result<(), String> {
    let begun = Instant::now();
    while begun.elapsed() < 2 * PATIENCE {
        let client = match try_connect(address) {
            Ok(client) => client,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(()),
            Err(error) => return Err(format!("connecting: {error}")),
        };
        for _ in 0..3 {
            try_ask(&client, "up?").map_err(|error| format!("accepted, then: {error}"))?;
        }
        served.fetch_add(1, Relaxed);
    }
    Err("never refused".to_owned())
}

fn sessions_that_outlast_the_deadline_are_ended_there(io: Io) {
    let backend = Backend::named("up");
    let mut proxy =
        Builder::on(io).backends(&[backend.address()]).set("AEGIS_DRAIN_TIMEOUT", "1s").start();
    let clients: Vec<_> = (0..4).map(|_| connect(proxy.address())).collect();
    for client in &clients {
        assert_eq!(ask(client, "up?"), "up");
    }

    proxy.terminate();
    let told = Instant::now();
    wait_unready(&proxy);
    eventually("new clients are refused", PATIENCE, || is_refused(proxy.address()).then_some(()));
    for client in &clients {
        wait_closed(client).unwrap();
    }
    let took = told.elapsed();
    assert!(took > Duration::from_millis(900), "cut before the deadline: {took:?}");
    assert!(took < Duration::from_secs(5), "long after the deadline: {took:?}");
    proxy.wait_clean(PATIENCE);
}

fn a_second_signal_ends_everything_at_once(io: Io) {
    let backend = Backend::named("up");
    let mut proxy = Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_DRAIN_DELAY", "60s")
        .set("AEGIS_DRAIN_TIMEOUT", "60s")
        .start();
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "up?"), "up");

    proxy.terminate();
    wait_unready(&proxy);
    assert_eq!(ask(&client, "up?"), "up");
    proxy.terminate();
    proxy.wait(Duration::from_secs(5));
    wait_closed(&client).unwrap();
}

fn without_sessions_a_drain_is_over_at_once(io: Io) {
    let backend = Backend::named("up");
    let mut proxy = Builder::on(io)
        .backends(&[backend.address()])
        .pool(4, 8)
        .set("AEGIS_DRAIN_TIMEOUT", "60s")
        .start();
    assert_eq!(ask_once(proxy.address(), "up?").unwrap(), "up");
    proxy.terminate();
    proxy.wait_clean(Duration::from_secs(5));
}
