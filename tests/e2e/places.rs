//! Connections to an endpoint are limited for the process, whatever the number of workers: never one
//! too many, counted at the backend, and nobody starves.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::support::backend::Backend;
use crate::support::client::{ask, connect, read_line, try_ask, try_connect};
use crate::support::metrics::{
    CLIENTS_WAITING, ENDPOINT_CONNECTIONS, OUTAGE_SECONDS, POOL_CONNECTIONS, SESSIONS_ACTIVE,
    SESSIONS_CLOSED,
};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    requests_of_many_workers_share_the_connections_of_the_process,
    fewer_connections_than_workers_serve_everybody,
    a_worker_gets_its_share_from_others_that_are_busy,
    idle_connections_are_limited_for_the_process,
    sessions_beyond_the_limit_wait_in_line,
    a_session_that_waits_too_long_or_is_one_too_many_is_reset,
    a_client_that_leaves_the_line_is_forgotten,
    warm_connections_make_room_for_sessions_of_other_workers,
    pooled_sessions_and_requests_keep_to_the_limit_of_the_endpoint,
    pooled_sessions_of_fewer_connections_than_workers_reuse_them,
    an_endpoint_that_is_full_is_passed_over,
    all_places_come_back_after_all_connections_have_died,
    an_endpoint_that_comes_back_has_all_its_places,
    a_drain_serves_who_waits_in_line,
    sessions_that_wait_are_served_in_the_order_in_which_they_came,
    a_session_that_has_waited_for_an_endpoint_may_still_wait_for_a_place,
    a_cancel_request_passes_those_that_wait_for_the_session_that_it_cancels,
    a_cancel_request_is_let_in_where_nobody_else_may_wait,
];

const WORKERS: usize = 32;

/// A cancel request of `PostgreSQL`.
const CANCEL: [u8; 16] = [0, 0, 0, 16, 4, 210, 22, 46, 0, 0, 0, 42, 1, 2, 3, 4];

/// Connections that a backend has at a time, counted as the kernel sees it: one that the proxy has
/// closed is no longer there, though its thread may not know it yet.
#[derive(Default)]
struct Census {
    open: Mutex<HashMap<SocketAddr, TcpStream>>,
    most: AtomicUsize,
}

impl Census {
    /// A server that counts its connections, and answers each line after `delay`.
    fn backend(self: &Arc<Self>, delay: Duration) -> Backend {
        let census = Arc::clone(self);
        Backend::scripted(move |stream| {
            let Ok(peer) = stream.peer_addr() else { return };
            census.arrive(peer, stream);
            let mut writer = stream;
            while let Ok(line) = read_line(stream) {
                thread::sleep(delay);
                let reply = if line == "PING" { "PONG" } else { "NULL" };
                if writer.write_all(format!("{reply}\n").as_bytes()).is_err() {
                    break;
                }
            }
            // What it holds would keep the connection open.
            census.open.lock().unwrap().remove(&peer);
        })
    }

    fn arrive(&self, peer: SocketAddr, stream: &TcpStream) {
        let mut open = self.open.lock().unwrap();
        open.insert(peer, stream.try_clone().unwrap());
        open.retain(|_, stream| !is_closed_by_peer(stream));
        self.most.fetch_max(open.len(), SeqCst);
    }

    fn most(&self) -> usize {
        self.most.load(SeqCst)
    }
}

fn is_closed_by_peer(stream: &TcpStream) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::RDHUP)];
    poll(&mut polled, Some(&Timespec::default())).unwrap();
    polled[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
}

fn census() -> Arc<Census> {
    Arc::default()
}

fn workers(io: Io, count: usize, backends: &[&Backend]) -> Builder {
    let addresses: Vec<_> = backends.iter().map(|backend| backend.address()).collect();
    Builder::on(io).backends(&addresses).set("AEGIS_WORKERS", count.to_string())
}

fn requests(io: Io, count: usize, backend: &Backend, size: usize) -> Builder {
    workers(io, count, &[backend])
        .protocol("chronos", "request")
        .set("AEGIS_POOL_SIZE", size.to_string())
}

/// So many clients ask as fast as they can for a while, all of them are answered each time; returns
/// how long the longest of them had to wait.
fn crowd(proxy: &Proxy, clients: usize, lasting: Duration) -> Duration {
    let clients: Vec<_> = (0..clients).map(|_| connect(proxy.address())).collect();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let asking = clients.iter().map(|client| {
            let over = &over;
            scope.spawn(move || {
                let (mut longest, mut asked) = (Duration::ZERO, 0);
                while asked == 0 || !over.load(SeqCst) {
                    let since = Instant::now();
                    assert_eq!(ask(client, "PING"), "PONG");
                    longest = longest.max(since.elapsed());
                    asked += 1;
                }
                (longest, asked)
            })
        });
        let asking: Vec<_> = asking.collect();
        thread::sleep(lasting);
        over.store(true, SeqCst);
        let done: Vec<_> = asking.into_iter().map(|thread| thread.join().unwrap()).collect();
        let longest = done.iter().map(|(longest, _)| *longest).max().unwrap();
        let asked: u64 = done.iter().map(|(_, asked)| asked).sum();
        println!("MEASURED: {asked} requests, the longest took {longest:?}");
        longest
    })
}

fn requests_of_many_workers_share_the_connections_of_the_process(io: Io) {
    let census = census();
    let backend = census.backend(Duration::ZERO);
    for count in [1, 2, WORKERS] {
        let proxy = requests(io, count, &backend, 16).start();
        let longest = crowd(&proxy, 64, Duration::from_millis(700));
        assert!(longest < Duration::from_secs(2), "{longest:?} with {count} workers");
        assert!(census.most() <= 16, "{} connections of {count} workers", census.most());
        assert!(proxy.metric(ENDPOINT_CONNECTIONS, &[]) <= 16);
        drop(proxy);
        census.open.lock().unwrap().clear();
    }
    assert!(census.most() > 8, "{} were enough", census.most());
}

fn fewer_connections_than_workers_serve_everybody(io: Io) {
    for (count, size) in [(2, 1), (WORKERS, 1), (WORKERS, 16)] {
        let census = census();
        let backend = census.backend(Duration::ZERO);
        let proxy = requests(io, count, &backend, size).start();
        let longest = crowd(&proxy, 40, Duration::from_millis(500));
        assert!(longest < Duration::from_secs(2), "{longest:?} with {count} workers");
        assert!(census.most() <= size, "{} of {size} connections", census.most());
    }
}

fn a_worker_gets_its_share_from_others_that_are_busy(io: Io) {
    let census = census();
    let backend = census.backend(Duration::from_millis(20));
    let proxy = requests(io, 4, &backend, 4).start();
    // As they come one at a time, some workers have two clients before others have one.
    let longest = crowd(&proxy, 24, Duration::from_secs(1));
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    assert_eq!(census.most(), 4);
}

fn idle_connections_are_limited_for_the_process(io: Io) {
    let backend = Backend::named("a");
    let proxy = workers(io, 8, &[&backend])
        .set("AEGIS_POOL_MIN_IDLE", "2")
        .set("AEGIS_POOL_MAX_IDLE", "5")
        .start();
    for _ in 0..3 {
        let clients: Vec<_> = (0..40).map(|_| connect(proxy.address())).collect();
        for client in &clients {
            assert_eq!(ask(client, "who"), "a");
        }
        let idle = proxy.metric(POOL_CONNECTIONS, &[("state", "idle")]);
        assert!(idle <= 5, "{idle} idle");
        drop(clients);
        proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
        assert!(backend.open() <= 5 + 1, "{} open", backend.open());
    }
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle == 5);
}

fn sessions_beyond_the_limit_wait_in_line(io: Io) {
    for count in [1, WORKERS] {
        let census = census();
        let backend = census.backend(Duration::ZERO);
        let proxy = workers(io, count, &[&backend])
            .set("AEGIS_ENDPOINT_MAX", "8")
            .set("AEGIS_QUEUE_TIMEOUT", "30s")
            .start();
        let address = proxy.address();
        let started = Instant::now();
        // A whole session each, again and again: eight at a time.
        let longest = thread::scope(|scope| {
            let sessions = (0..48).map(|_| {
                scope.spawn(move || {
                    let times = (0..8).map(|_| ping(address));
                    times.max().unwrap()
                })
            });
            let sessions: Vec<_> = sessions.collect();
            sessions.into_iter().map(|thread| thread.join().unwrap()).max().unwrap()
        });
        println!(
            "MEASURED: 384 sessions by {count} workers in {:?}, the longest wait {longest:?}",
            started.elapsed()
        );
        assert!(census.most() <= 8, "{} connections", census.most());
        assert!(longest < Duration::from_secs(10), "{longest:?}");
        proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
    }
}

fn a_session_that_waits_too_long_or_is_one_too_many_is_reset(io: Io) {
    let backend = Backend::named("a");
    let proxy = workers(io, 1, &[&backend])
        .set("AEGIS_ENDPOINT_MAX", "2")
        .set("AEGIS_QUEUE_MAX", "3")
        .set("AEGIS_QUEUE_TIMEOUT", "300ms")
        .start();
    let served: Vec<_> = (0..2).map(|_| connect(proxy.address())).collect();
    for client in &served {
        assert_eq!(ask(client, "who"), "a");
    }
    // One that is refused at once may be told so as it connects.
    let others: Vec<_> = (0..5).map(|_| try_connect(proxy.address())).collect();
    let closed = |reason| move |proxy: &Proxy| proxy.metric(SESSIONS_CLOSED, &[("reason", reason)]);
    let ended = || {
        let both = [closed("queue_full")(&proxy), closed("queue_timeout")(&proxy)];
        (both.iter().sum::<u64>() == 5).then_some(both)
    };
    assert_eq!(eventually("all are refused", PATIENCE, ended), [2, 3]);
    assert!(others.iter().flatten().all(|client| try_ask(client, "who").is_err()));
    for client in &served {
        assert_eq!(ask(client, "who"), "a");
    }
}

fn a_client_that_leaves_the_line_is_forgotten(io: Io) {
    let backend = Backend::named("a");
    let proxy = workers(io, 1, &[&backend])
        .set("AEGIS_ENDPOINT_MAX", "1")
        .set("AEGIS_POOL_MIN_IDLE", "0")
        .start();
    let first = connect(proxy.address());
    assert_eq!(ask(&first, "who"), "a");
    let waiting = connect(proxy.address());
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 2);
    drop(waiting);
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 1);
    drop(first);
    assert_eq!(ask(&connect(proxy.address()), "who"), "a");
    assert_eq!(proxy.metric(SESSIONS_CLOSED, &[("reason", "client_left")]), 1);
}

fn warm_connections_make_room_for_sessions_of_other_workers(io: Io) {
    let census = census();
    let backend = census.backend(Duration::ZERO);
    // Each worker keeps one, so that all places are taken before the first client comes.
    let proxy = workers(io, 8, &[&backend])
        .set("AEGIS_ENDPOINT_MAX", "8")
        .set("AEGIS_POOL_MIN_IDLE", "8")
        .start();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle == 8);
    let clients: Vec<_> = (0..8).map(|_| connect(proxy.address())).collect();
    for client in &clients {
        assert_eq!(ask(client, "PING"), "PONG");
    }
    assert_eq!(census.most(), 8);
}

/// A session of one request; how long it took.
fn ping(address: SocketAddr) -> Duration {
    let since = Instant::now();
    let client = connect(address);
    assert_eq!(ask(&client, "PING"), "PONG");
    since.elapsed()
}

fn pooled_sessions_and_requests_keep_to_the_limit_of_the_endpoint(io: Io) {
    for mode in ["session", "request"] {
        let census = census();
        let backend = census.backend(Duration::ZERO);
        let proxy = workers(io, 8, &[&backend])
            .protocol("chronos", mode)
            .set("AEGIS_ENDPOINT_MAX", "3")
            .start();
        let address = proxy.address();
        thread::scope(|scope| {
            for _ in 0..12 {
                scope.spawn(move || (0..20).map(|_| ping(address)).max());
            }
        });
        assert!(census.most() <= 3, "{} connections in {mode} mode", census.most());
    }
}

fn pooled_sessions_of_fewer_connections_than_workers_reuse_them(io: Io) {
    for mode in ["session", "request"] {
        let backend = Backend::named("a");
        let proxy = workers(io, 8, &[&backend])
            .protocol("chronos", mode)
            .set("AEGIS_ENDPOINT_MAX", "2")
            .start();
        for _ in 0..40 {
            assert_eq!(ask(&connect(proxy.address()), "GET a"), "a");
        }
        // Whoever of the workers had none would have to take one from another, and make it anew.
        assert!(backend.accepted() <= 2, "{} connections with {mode}", backend.accepted());
    }
}

fn an_endpoint_that_is_full_is_passed_over(io: Io) {
    let backends = [Backend::named("a"), Backend::named("b")];
    let proxy = workers(io, 2, &[&backends[0], &backends[1]])
        .set("AEGIS_ENDPOINT_MAX", "3")
        .set("AEGIS_BALANCE", "source_hash")
        .set("AEGIS_POOL_MIN_IDLE", "0")
        .start();
    let clients: Vec<_> = (0..6).map(|_| connect(proxy.address())).collect();
    let mut names: Vec<_> = clients.iter().map(|client| ask(client, "who")).collect();
    names.sort_unstable();
    assert_eq!(names, ["a", "a", "a", "b", "b", "b"]);
}

fn all_places_come_back_after_all_connections_have_died(io: Io) {
    for mode in ["preconnect", "request"] {
        let census = census();
        let backend = census.backend(Duration::ZERO);
        let protocol = if mode == "request" { "chronos" } else { "tcp" };
        let proxy = workers(io, 4, &[&backend])
            .protocol(protocol, mode)
            .set("AEGIS_ENDPOINT_MAX", "4")
            .set("AEGIS_EJECT_FAILURES", "1000")
            .start();
        for _ in 0..5 {
            let clients: Vec<_> = (0..4).map(|_| connect(proxy.address())).collect();
            for client in &clients {
                assert_eq!(ask(client, "PING"), "PONG");
            }
            backend.close_connections();
            drop(clients);
            proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
        }
        // All four can be had at a time.
        let clients: Vec<_> = (0..4).map(|_| connect(proxy.address())).collect();
        for client in &clients {
            assert_eq!(ask(client, "PING"), "PONG");
        }
        assert!(census.most() <= 4, "{} connections with {mode}", census.most());
        drop(clients);
        proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
    }
}

fn an_endpoint_that_comes_back_has_all_its_places(io: Io) {
    let mut backend = Backend::named("a");
    let proxy = workers(io, 4, &[&backend])
        .set("AEGIS_ENDPOINT_MAX", "3")
        .set("AEGIS_EJECT_FAILURES", "1")
        .set("AEGIS_EJECT_TIME", "100ms")
        .start();
    for _ in 0..2 {
        let clients: Vec<_> = (0..3).map(|_| connect(proxy.address())).collect();
        for client in &clients {
            assert_eq!(ask(client, "who"), "a");
        }
        backend.kill();
        // It is ejected, and probed in vain.
        let refused = try_connect(proxy.address()).and_then(|client| try_ask(&client, "who"));
        assert!(refused.is_err());
        drop(clients);
        thread::sleep(Duration::from_millis(300));
        backend.start();
        eventually("it is used again", PATIENCE, || {
            try_ask(&try_connect(proxy.address()).ok()?, "who").ok()
        });
    }
    let clients: Vec<_> = (0..3).map(|_| connect(proxy.address())).collect();
    for client in &clients {
        assert_eq!(ask(client, "who"), "a");
    }
}

fn a_drain_serves_who_waits_in_line(io: Io) {
    let backend = Backend::named("a");
    let proxy = workers(io, 2, &[&backend])
        .set("AEGIS_ENDPOINT_MAX", "1")
        .set("AEGIS_QUEUE_TIMEOUT", "20s")
        .start();
    let first = connect(proxy.address());
    assert_eq!(ask(&first, "who"), "a");
    let waiting: Vec<_> = (0..3).map(|_| connect(proxy.address())).collect();
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 4);
    proxy.terminate();
    drop(first);
    thread::scope(|scope| {
        for client in waiting {
            scope.spawn(move || assert_eq!(ask(&client, "who"), "a"));
        }
    });
}

fn outage_seconds(proxy: &Proxy) -> f64 {
    let metrics = proxy.metrics();
    let found = metrics.samples().iter().filter(|sample| sample.name == OUTAGE_SECONDS);
    found.map(|sample| sample.value).sum()
}

fn sessions_that_wait_are_served_in_the_order_in_which_they_came(io: Io) {
    let backend = Backend::named("a");
    let proxy = workers(io, 1, &[&backend])
        .set("AEGIS_ENDPOINT_MAX", "1")
        .set("AEGIS_QUEUE_TIMEOUT", "1m")
        .start();
    let first = connect(proxy.address());
    assert_eq!(ask(&first, "who"), "a");
    let waiting: Vec<_> = (2..8)
        .map(|count| {
            let client = connect(proxy.address());
            proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == count);
            client
        })
        .collect();
    assert_eq!(proxy.metric(CLIENTS_WAITING, &[]), 6);
    drop(first);
    for client in waiting {
        // Were another one served first, this one would wait for it for ever.
        assert_eq!(ask(&client, "who"), "a");
    }
    assert!(outage_seconds(&proxy) < f64::EPSILON, "it was there all the time");
}

fn a_session_that_has_waited_for_an_endpoint_may_still_wait_for_a_place(io: Io) {
    let mut backend = Backend::named("a");
    backend.kill();
    let proxy = workers(io, 1, &[&backend])
        .set("AEGIS_ENDPOINT_MAX", "1")
        .set("AEGIS_ENDPOINT_WAIT", "1m")
        .set("AEGIS_QUEUE_TIMEOUT", "1s")
        .start();
    // Of those that come at one moment nobody is the first.
    let first = connect(proxy.address());
    proxy.wait_for(CLIENTS_WAITING, &[], |waiting| waiting == 1);
    let others: Vec<_> = (1..4).map(|_| connect(proxy.address())).collect();
    proxy.wait_for(CLIENTS_WAITING, &[], |waiting| waiting == 4);
    // Longer than anybody may wait for a place.
    eventually("it lasts", PATIENCE, || (outage_seconds(&proxy) > 1.2).then_some(()));
    backend.start();
    assert_eq!(ask(&first, "who"), "a");
    // The others find it full from now on, and wait for that for as long as anybody.
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "queue_timeout")], |closed| closed == 3);
    assert!(others.iter().all(|client| try_ask(client, "who").is_err()));
    assert_eq!(ask(&first, "who"), "a");
}

/// A server that has a session until it is to cancel it, and the connections that it has had at a time.
fn cancelled_server() -> (Backend, Arc<AtomicUsize>) {
    let (sessions, most) = (Mutex::new(Vec::<TcpStream>::new()), Arc::new(AtomicUsize::new(0)));
    let (open, counted) = (AtomicUsize::new(0), Arc::clone(&most));
    let backend = Backend::scripted(move |mut stream| {
        counted.fetch_max(open.fetch_add(1, SeqCst) + 1, SeqCst);
        let mut bytes = [0; 64];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            if bytes[..count] == CANCEL {
                for session in sessions.lock().unwrap().drain(..) {
                    session.shutdown(Shutdown::Both).unwrap();
                }
                break;
            }
            sessions.lock().unwrap().push(stream.try_clone().unwrap());
            stream.write_all(b"a\n").unwrap();
        }
        open.fetch_sub(1, SeqCst);
    });
    (backend, most)
}

fn a_cancel_request_passes_those_that_wait_for_the_session_that_it_cancels(io: Io) {
    let (backend, most) = cancelled_server();
    let proxy = workers(io, 2, &[&backend])
        .set("AEGIS_PRESET", "postgres")
        .set("AEGIS_ENDPOINT_MAX", "1")
        .set("AEGIS_QUEUE_TIMEOUT", "1m")
        .start();
    let first = connect(proxy.address());
    assert_eq!(ask(&first, "who"), "a");
    let waiting: Vec<_> = (0..3).map(|_| connect(proxy.address())).collect();
    proxy.wait_for(CLIENTS_WAITING, &[], |waiting| waiting == 3);
    let mut cancels = connect(proxy.address());
    cancels.write_all(&CANCEL).unwrap();
    assert_eq!(cancels.read(&mut [0; 1]).unwrap(), 0, "it is through");
    assert_eq!((&first).read(&mut [0; 1]).unwrap(), 0, "it is cancelled");
    drop(first);
    // Its place goes to one of those that wait, and one only.
    proxy.wait_for(CLIENTS_WAITING, &[], |waiting| waiting == 2);
    assert!(most.load(SeqCst) <= 2, "{most:?} connections");
    drop(waiting);
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
    assert_eq!(ask(&connect(proxy.address()), "who"), "a", "no place is lost");
}

fn a_cancel_request_is_let_in_where_nobody_else_may_wait(io: Io) {
    for queue_max in [0, 2] {
        let (backend, _) = cancelled_server();
        let proxy = workers(io, 1, &[&backend])
            .set("AEGIS_PRESET", "postgres")
            .set("AEGIS_ENDPOINT_MAX", "1")
            .set("AEGIS_QUEUE_MAX", queue_max.to_string())
            .set("AEGIS_QUEUE_TIMEOUT", "1m")
            .start();
        let first = connect(proxy.address());
        assert_eq!(ask(&first, "who"), "a");
        let waiting: Vec<_> = (0..queue_max).map(|_| connect(proxy.address())).collect();
        for mut client in &waiting {
            client.write_all(b"who\n").unwrap();
        }
        proxy.wait_for(CLIENTS_WAITING, &[], |waiting| waiting == queue_max);
        // Who wants anything else is refused.
        let refused = try_connect(proxy.address()).and_then(|client| try_ask(&client, "who"));
        assert!(refused.is_err(), "{refused:?} with {queue_max} in line");
        proxy.wait_for(SESSIONS_CLOSED, &[("reason", "queue_full")], |closed| closed == 1);
        let mut cancels = connect(proxy.address());
        cancels.write_all(&CANCEL).unwrap();
        assert_eq!(cancels.read(&mut [0; 1]).unwrap(), 0, "it is through");
        assert_eq!((&first).read(&mut [0; 1]).unwrap(), 0, "it is cancelled");
        drop(first);
        if let Some(next) = waiting.first() {
            assert_eq!(read_line(next).unwrap(), "a");
        }
        assert_eq!(proxy.metric(SESSIONS_CLOSED, &[("reason", "queue_full")]), 1);
    }
}
