//! Backends that die, come back, or never answer.

use std::io;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, BlackHole};
use crate::support::client::{ask, ask_once, connect, try_ask, try_connect, wait_closed};
use crate::support::metrics::{
    CONNECT_RETRIES, ENDPOINT_USABLE, POOL_CONNECTIONS, SESSIONS_ACTIVE,
};
use crate::support::proxy::Builder;
use crate::support::{Io, PATIENCE, SetOnDrop, eventually, measured, on_both_drivers};

on_both_drivers![
    a_killed_backend_ends_its_own_sessions_only_and_comes_back_by_itself,
    sessions_without_any_backend_that_may_not_wait_are_refused_quickly_until_it_returns,
    a_backend_that_never_answers_costs_one_connect_timeout_and_no_session,
    a_refusing_backend_costs_no_session,
    an_ejected_backend_returns_where_no_idle_connections_are_kept,
];

/// One session of the load: when it began, and who answered.
struct Served {
    begun: Instant,
    by: io::Result<String>,
}

/// Short sessions, one after the other.
fn load(address: SocketAddr, stop: &AtomicBool, log: &Mutex<Vec<Served>>) {
    while !stop.load(Relaxed) {
        let begun = Instant::now();
        let by = short_session(address);
        log.lock().unwrap().push(Served { begun, by });
    }
}

fn short_session(address: SocketAddr) -> io::Result<String> {
    let client = try_connect(address)?;
    let by = try_ask(&client, "who")?;
    for _ in 0..10 {
        if try_ask(&client, "who")? != by {
            return Err(io::Error::other("one session, two backends"));
        }
    }
    Ok(by)
}

fn a_killed_backend_ends_its_own_sessions_only_and_comes_back_by_itself(io: Io) {
    let a = Backend::named("a");
    let mut b = Backend::named("b");
    let proxy = Builder::on(io)
        .backends(&[a.address(), b.address()])
        .set("AEGIS_BALANCE", "round_robin")
        .set("AEGIS_EJECT_TIME", "300ms")
        .start();
    let b_name = b.address().to_string();
    let b_endpoint = [("endpoint", b_name.as_str())];
    let held: Vec<_> = (0..16).map(|_| connect(proxy.address())).collect();
    let (on_a, on_b): (Vec<_>, Vec<_>) = held.iter().partition(|client| ask(client, "who") == "a");
    assert!(!on_a.is_empty() && !on_b.is_empty(), "{} and {}", on_a.len(), on_b.len());

    let (stop, log) = (AtomicBool::new(false), Mutex::new(Vec::<Served>::new()));
    let served = |since: Instant, name: &str| {
        let log = log.lock().unwrap();
        log.iter()
            .filter(|one| one.begun > since && one.by.as_ref().is_ok_and(|by| by == name))
            .count()
    };
    let failed = |since: Instant| {
        let log = log.lock().unwrap();
        let recent = log.iter().filter(|one| one.begun > since);
        recent.filter_map(|one| one.by.as_ref().err()).map(ToString::to_string).collect::<Vec<_>>()
    };
    thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        for _ in 0..4 {
            scope.spawn(|| load(proxy.address(), &stop, &log));
        }
        let begin = Instant::now();
        eventually("both backends serve", PATIENCE, || {
            (served(begin, "a") > 50 && served(begin, "b") > 50).then_some(())
        });
        assert_eq!(failed(begin), Vec::<String>::new());

        b.kill();
        for client in &on_b {
            wait_closed(client).unwrap();
        }
        for client in &on_a {
            assert_eq!(ask(client, "who"), "a");
        }
        let idle = [b_endpoint[0], ("state", "idle")];
        proxy.wait_for(POOL_CONNECTIONS, &idle, |idle| idle == 0);
        let gone = Instant::now();
        eventually("the other serves", PATIENCE, || (served(gone, "a") > 200).then_some(()));
        assert_eq!(served(gone, "b"), 0);

        b.start();
        let back = Instant::now();
        eventually("the backend that returned serves", PATIENCE, || {
            (served(back, "b") > 50).then_some(())
        });
        proxy.wait_for(ENDPOINT_USABLE, &b_endpoint, |usable| usable == 1);
        assert_eq!(failed(gone), Vec::<String>::new());
        for client in &on_a {
            assert_eq!(ask(client, "who"), "a");
        }
    });
}

fn sessions_without_any_backend_that_may_not_wait_are_refused_quickly_until_it_returns(io: Io) {
    let mut backend = Backend::named("a");
    let proxy =
        Builder::on(io).backends(&[backend.address()]).set("AEGIS_ENDPOINT_WAIT", "0s").start();
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");

    backend.kill();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle == 0);
    // More than would eject an endpoint that has company.
    for _ in 0..20 {
        let begun = Instant::now();
        ask_once(proxy.address(), "who").expect_err("nobody could have answered");
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(1), "refused only after {took:?}");
    }

    backend.start();
    let back = Instant::now();
    eventually("sessions flow again within a second or so", Duration::from_secs(2), || {
        ask_once(proxy.address(), "who").ok()
    });
    measured(&format!("sessions flowed {:?} after the return", back.elapsed()));
    for _ in 0..20 {
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
    }
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
}

fn a_backend_that_never_answers_costs_one_connect_timeout_and_no_session(io: Io) {
    let good = Backend::named("good");
    let hole = BlackHole::new();
    let proxy = Builder::on(io)
        .backends(&[hole.address(), good.address()])
        .without_pool()
        .set("AEGIS_BALANCE", "round_robin")
        .set("AEGIS_CONNECT_TIMEOUT", "300ms")
        .start();
    for _ in 0..8 {
        let begun = Instant::now();
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "good");
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(3), "{took:?}");
    }
    assert!(proxy.metric(CONNECT_RETRIES, &[]) >= 1);
}

fn a_refusing_backend_costs_no_session(io: Io) {
    let good = Backend::named("good");
    let mut refusing = Backend::named("refusing");
    refusing.kill();
    let proxy = Builder::on(io)
        .backends(&[refusing.address(), good.address()])
        .without_pool()
        .set("AEGIS_BALANCE", "round_robin")
        .start();
    for _ in 0..50 {
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "good");
    }
    assert!(proxy.metric(CONNECT_RETRIES, &[]) >= 1);
}

fn an_ejected_backend_returns_where_no_idle_connections_are_kept(io: Io) {
    let (a, mut b) = (Backend::named("a"), Backend::named("b"));
    let proxy = Builder::on(io)
        .backends(&[a.address(), b.address()])
        .without_pool()
        .set("AEGIS_WORKERS", "1")
        .set("AEGIS_BALANCE", "round_robin")
        .set("AEGIS_EJECT_TIME", "100ms")
        .start();
    let who = || ask_once(proxy.address(), "who").unwrap();
    let name = b.address().to_string();
    b.kill();
    eventually("it is ejected", PATIENCE, || {
        assert_eq!(who(), "a");
        (proxy.metric(ENDPOINT_USABLE, &[("endpoint", &name)]) == 0).then_some(())
    });
    b.start();
    eventually("it serves again", PATIENCE, || (who() == "b").then_some(()));
}
