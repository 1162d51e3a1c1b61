//! What happens at the limits.

use std::fs;
use std::io::{ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, reset_on_close};
use crate::support::client::{
    ask, ask_once, connect, is_silent, read_end, read_line, read_to_end, wait_closed,
};
use crate::support::metrics::{ACCEPT_PAUSES, SESSIONS_ACTIVE, SESSIONS_CLOSED};
use crate::support::proxy::Builder;
use crate::support::{Io, on_both_drivers};

on_both_drivers![
    the_session_above_the_limit_waits_and_is_served_when_another_ends,
    all_workers_together_keep_to_the_limit_and_serve_everyone,
    a_descriptor_limit_that_is_too_small_is_refused_with_the_sum,
    a_descriptor_limit_that_may_not_be_asked_for_stops_nothing,
    a_session_without_traffic_ends_after_the_idle_timeout,
    a_half_closed_session_without_traffic_ends_after_its_own_timeout,
    a_stream_cut_by_a_timeout_does_not_look_whole,
    a_session_with_a_broken_side_and_a_stalled_one_ends,
    fewer_sessions_than_workers_serve_everyone_in_turn,
    a_backend_that_accepts_only_to_close_is_not_stormed,
];

/// More than the buffers of all sockets on the way hold.
const FLOOD: usize = 64 << 20;

/// Writes until the other side has taken nothing for a moment.
fn fill(mut stream: &TcpStream) {
    let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
    let piece = vec![7; 1 << 20];
    for _ in 0..FLOOD / piece.len() {
        if stream.write_all(&piece).is_err() {
            return;
        }
    }
}

fn the_session_above_the_limit_waits_and_is_served_when_another_ends(io: Io) {
    let backend = Backend::named("a");
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_WORKERS", "1")
        .set("AEGIS_MAX_SESSIONS", "10")
        .start();
    let mut clients: Vec<_> = (0..10).map(|_| connect(proxy.address())).collect();
    for client in &clients {
        assert_eq!(ask(client, "who"), "a");
    }

    let mut waiting = connect(proxy.address());
    waiting.write_all(b"who\n").unwrap();
    proxy.wait_for(ACCEPT_PAUSES, &[], |pauses| pauses >= 1);
    assert!(is_silent(&waiting, Duration::from_millis(300)));
    assert_eq!(proxy.metric(SESSIONS_ACTIVE, &[]), 10);
    for client in &clients {
        assert_eq!(ask(client, "who"), "a");
    }

    drop(clients.pop());
    assert_eq!(read_line(&waiting).unwrap(), "a");
    assert_eq!(ask(&waiting, "who"), "a");
    for client in &clients {
        assert_eq!(ask(client, "who"), "a");
    }
}

fn all_workers_together_keep_to_the_limit_and_serve_everyone(io: Io) {
    const LIMIT: usize = 10;
    // Nothing is locked between workers: two may take the last place at the same moment.
    const WORKERS: usize = 2;
    let backend = Backend::named("a");
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_WORKERS", WORKERS.to_string())
        .set("AEGIS_MAX_SESSIONS", LIMIT.to_string())
        .start();
    let (served, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..40 {
            scope.spawn(|| {
                for _ in 0..10 {
                    let client = connect(proxy.address());
                    assert_eq!(ask(&client, "who"), "a");
                    most.fetch_max(served.fetch_add(1, SeqCst) + 1, SeqCst);
                    assert_eq!(ask(&client, "who"), "a");
                    served.fetch_sub(1, SeqCst);
                }
            });
        }
    });
    let most = most.into_inner();
    assert!(most <= LIMIT + WORKERS, "{most} sessions at once");
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
}

fn a_descriptor_limit_that_is_too_small_is_refused_with_the_sum(io: Io) {
    let ended = Builder::on(io)
        .backends(&["127.0.0.2:9".parse().unwrap()])
        .set("AEGIS_MAX_SESSIONS", "1000")
        .descriptors_max(600)
        .run();
    assert!(matches!(ended.code, Some(1 | 78)), "{ended:?}");
    for part in ["600", "1000", "AEGIS_MAX_SESSIONS"] {
        assert!(ended.errors.contains(part), "no {part} in {}", ended.errors);
    }
}

/// As where a service manager filters the calls that have to do with resources (`~@resources`).
fn a_descriptor_limit_that_may_not_be_asked_for_stops_nothing(io: Io) {
    let backend = Backend::named("a");
    let builder = Builder::on(io).deny(libc::SYS_prlimit64, libc::EPERM);
    let proxy = builder.clone().backends(&[backend.address()]).start();
    assert_eq!(ask(&connect(proxy.address()), "who"), "a");
    let found = fs::read_to_string(format!("/proc/{}/limits", proxy.id())).unwrap();
    let open = found.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let checked = builder
        .set("AEGIS_BACKENDS", backend.address().to_string())
        .set("AEGIS_MAX_SESSIONS", "1000000")
        .argument("check")
        .run();
    let limit = open.split_whitespace().next().unwrap();
    assert!(checked.errors.contains(&format!("RLIMIT_NOFILE allows {limit},")), "{checked:?}");
}

fn a_session_without_traffic_ends_after_the_idle_timeout(io: Io) {
    let backend = Backend::named("a");
    let proxy =
        Builder::on(io).backends(&[backend.address()]).set("AEGIS_IDLE_TIMEOUT", "1s").start();
    let client = connect(proxy.address());
    let begun = Instant::now();
    // Traffic puts the end off.
    while begun.elapsed() < Duration::from_millis(1500) {
        assert_eq!(ask(&client, "who"), "a");
    }
    let last = Instant::now();
    wait_closed(&client).unwrap();
    let idle = last.elapsed();
    assert!(idle > Duration::from_millis(800) && idle < Duration::from_secs(5), "{idle:?}");
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "idle_timeout")], |sessions| sessions == 1);
}

fn a_half_closed_session_without_traffic_ends_after_its_own_timeout(io: Io) {
    // It never ends its direction by itself while the proxy keeps the connection.
    let backend = Backend::scripted(|stream| {
        let _ = stream.shutdown(Shutdown::Write);
        while read_line(stream).is_ok() {}
    });
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .without_pool()
        .set("AEGIS_IDLE_TIMEOUT", "off")
        .set("AEGIS_HALF_CLOSE_TIMEOUT", "1s")
        .start();
    let client = connect(proxy.address());
    read_end(&client).unwrap();
    let labels = [("reason", "half_close_timeout")];
    proxy.wait_for(SESSIONS_CLOSED, &labels, |sessions| sessions == 1);
    assert_eq!(proxy.metric(SESSIONS_ACTIVE, &[]), 0);
}

fn a_stream_cut_by_a_timeout_does_not_look_whole(io: Io) {
    let backend = Backend::scripted(|stream| {
        fill(stream);
        let _ = read_line(stream);
    });
    let proxy =
        Builder::on(io).backends(&[backend.address()]).set("AEGIS_IDLE_TIMEOUT", "1s").start();
    let client = connect(proxy.address());
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "idle_timeout")], |sessions| sessions == 1);
    let error = read_to_end(&client).expect_err("an end of stream after a part of it");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

fn a_session_with_a_broken_side_and_a_stalled_one_ends(io: Io) {
    let backend = Backend::scripted(|stream| {
        fill(stream);
        reset_on_close(stream);
    });
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .without_pool()
        .set("AEGIS_HALF_CLOSE_TIMEOUT", "1s")
        .start();
    let stalled = connect(proxy.address());
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "backend_reset")], |sessions| sessions == 1);
    assert_eq!(proxy.metric(SESSIONS_ACTIVE, &[]), 0);
    drop(stalled);
}

fn fewer_sessions_than_workers_serve_everyone_in_turn(io: Io) {
    let backend = Backend::named("a");
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_WORKERS", "4")
        .set("AEGIS_MAX_SESSIONS", "1")
        .start();
    for _ in 0..20 {
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
    }
}

fn a_backend_that_accepts_only_to_close_is_not_stormed(io: Io) {
    let backend = Backend::scripted(|_| {});
    let proxy = Builder::on(io).backends(&[backend.address()]).set("AEGIS_WORKERS", "1").start();
    proxy.wait_for("aegis_pool_discards_total", &[("reason", "dead")], |dead| dead >= 1);
    let (begun, before) = (Instant::now(), backend.accepted());
    proxy.wait_for("aegis_pool_discards_total", &[("reason", "dead")], |dead| dead >= 4);
    let rate = (backend.accepted() - before) as f64 / begun.elapsed().as_secs_f64();
    assert!(rate < 100.0, "{rate} connects a second");
}
