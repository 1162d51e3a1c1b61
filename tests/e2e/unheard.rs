//! Bytes and ends of a backend that the proxy has not heard of when it uses the connection again.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};

use super::replies::{pooled, read_answer, wait_idle};
use crate::support::backend::Backend;
use crate::support::client::{ask, connect, read_line};
use crate::support::metrics::{POOL_CONNECTIONS, POOL_DISCARDS, REQUESTS, RETRIES};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    bytes_unheard_on_idle_connections_reach_nobody,
    bytes_unheard_on_an_idle_connection_of_http_reach_nobody,
    bytes_unheard_on_an_idle_connection_reach_no_opaque_client,
    ends_unheard_on_idle_connections_lose_no_write,
    ends_unheard_on_warm_connections_meet_no_newcomer,
    bytes_unheard_on_the_connection_of_a_session_are_no_reply,
];

/// More than a driver hears of in one turn.
fn crowd(io: Io) -> usize {
    if io == Io::Epoll { 1_500 } else { 60 }
}

/// Stops the proxy, as a CPU quota would, while `meanwhile` runs.
pub(super) fn stopped(proxy: &Proxy, meanwhile: impl FnOnce()) {
    let pid = Pid::from_raw(proxy.id().cast_signed()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let stat = format!("/proc/{}/stat", proxy.id());
    eventually("it is stopped", PATIENCE, || {
        std::fs::read_to_string(&stat).unwrap().contains(") T ").then_some(())
    });
    meanwhile();
    kill_process(pid, Signal::CONT).unwrap();
}

/// The backend's ends of its connections, to misbehave on them.
type Connections = Arc<Mutex<Vec<TcpStream>>>;

/// Answers each line with its second word.
fn echoing_keys() -> (Backend, Connections) {
    let connections = Connections::default();
    let all = connections.clone();
    let backend = Backend::scripted(move |mut stream| {
        all.lock().unwrap().push(stream.try_clone().unwrap());
        while let Ok(line) = read_line(stream) {
            let key = line.split(' ').nth(1).unwrap_or_default();
            if stream.write_all(format!("{key}\n").as_bytes()).is_err() {
                return;
            }
        }
    });
    (backend, connections)
}

/// Makes the pool hold `count` idle connections.
fn fill(
    proxy: &Proxy,
    clients: &[TcpStream],
    request: &[u8],
    count: usize,
    done: impl Fn(&TcpStream),
) {
    stopped(proxy, || {
        for mut client in &clients[..count] {
            client.write_all(request).unwrap();
        }
    });
    clients[..count].iter().for_each(done);
    wait_idle(proxy, count as u64);
}

fn bytes_unheard_on_idle_connections_reach_nobody(io: Io) {
    for (size, strays) in [(1, 1), (4, 3)] {
        let (backend, connections) = echoing_keys();
        let proxy = pooled(io, "chronos", "request", &backend)
            .set("AEGIS_POOL_SIZE", size.to_string())
            .start();
        let clients: Vec<_> = (0..crowd(io)).map(|_| connect(proxy.address())).collect();
        fill(&proxy, &clients, b"GET first\n", size, |client| {
            assert_eq!(read_line(client).unwrap(), "first");
        });
        stopped(&proxy, || {
            for (i, mut client) in clients.iter().enumerate() {
                client.write_all(format!("GET k{i}\n").as_bytes()).unwrap();
            }
            for mut connection in &connections.lock().unwrap()[..strays] {
                connection.write_all(b"stray\n").unwrap();
            }
        });
        for (i, client) in clients.iter().enumerate() {
            assert_eq!(read_line(client).unwrap(), format!("k{i}"), "pool of {size}");
        }
        assert_eq!(
            proxy.metric(POOL_DISCARDS, &[("reason", "unexpected")]),
            strays as u64,
            "pool of {size}"
        );
        let in_use = proxy.metric(POOL_CONNECTIONS, &[("state", "in_use")]);
        assert_eq!(in_use, 0);
    }
}

/// Answers each request of HTTP with its path.
fn echoing_paths() -> (Backend, Connections) {
    let connections = Connections::default();
    let all = connections.clone();
    let backend = Backend::scripted(move |mut stream| {
        all.lock().unwrap().push(stream.try_clone().unwrap());
        while let Ok(line) = read_line(stream) {
            let Some(path) = line.split(' ').nth(1) else { continue };
            let length = path.len();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{path}");
            if stream.write_all(answer.as_bytes()).is_err() {
                break;
            }
        }
        // The test holds on to it.
        let _ = stream.shutdown(Shutdown::Both);
    });
    (backend, connections)
}

/// Sixty clients whose requests, with these line ends, come while a reply that nobody asked for lies
/// unheard on the one connection of the pool.
fn asked_before_a_stray_reply_is_heard(io: Io, line_end: &str) -> (Backend, Proxy, Vec<TcpStream>) {
    let (backend, connections) = echoing_paths();
    let proxy = pooled(io, "http1", "request", &backend).set("AEGIS_POOL_SIZE", "1").start();
    let clients: Vec<_> = (0..60).map(|_| connect(proxy.address())).collect();
    fill(&proxy, &clients, b"GET /first HTTP/1.1\r\n\r\n", 1, |client| {
        assert_eq!(read_answer(client), "/first");
    });
    stopped(&proxy, || {
        for (i, mut client) in clients.iter().enumerate() {
            client.write_all(format!("GET /k{i} HTTP/1.1{line_end}{line_end}").as_bytes()).unwrap();
        }
        let stray = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray";
        (&connections.lock().unwrap()[0]).write_all(stray).unwrap();
    });
    (backend, proxy, clients)
}

fn bytes_unheard_on_an_idle_connection_of_http_reach_nobody(io: Io) {
    let (_backend, proxy, clients) = asked_before_a_stray_reply_is_heard(io, "\r\n");
    for (i, client) in clients.iter().enumerate() {
        assert_eq!(read_answer(client), format!("/k{i}"));
    }
    assert_eq!(proxy.metric(POOL_DISCARDS, &[("reason", "unexpected")]), 1);
}

fn bytes_unheard_on_an_idle_connection_reach_no_opaque_client(io: Io) {
    // Its line ends make each of them opaque.
    let (_backend, proxy, clients) = asked_before_a_stray_reply_is_heard(io, "\n");
    // Each has the one connection for itself until it leaves.
    thread::scope(|scope| {
        for (i, client) in clients.iter().enumerate() {
            scope.spawn(move || {
                assert_eq!(read_answer(client), format!("/k{i}"));
                client.shutdown(Shutdown::Both).unwrap();
            });
        }
    });
    assert_eq!(proxy.metric(POOL_DISCARDS, &[("reason", "unexpected")]), 1);
}

fn ends_unheard_on_idle_connections_lose_no_write(io: Io) {
    const IDLE: usize = 3;
    let (backend, connections) = echoing_keys();
    let proxy = pooled(io, "chronos", "request", &backend).set("AEGIS_POOL_SIZE", "3").start();
    let clients: Vec<_> = (0..crowd(io)).map(|_| connect(proxy.address())).collect();
    fill(&proxy, &clients, b"GET first\n", IDLE, |client| {
        assert_eq!(read_line(client).unwrap(), "first");
    });
    stopped(&proxy, || {
        for (i, mut client) in clients.iter().enumerate() {
            client.write_all(format!("SET k{i} x\n").as_bytes()).unwrap();
        }
        for connection in &connections.lock().unwrap()[..] {
            connection.shutdown(Shutdown::Both).unwrap();
        }
    });
    for (i, client) in clients.iter().enumerate() {
        assert_eq!(read_line(client).unwrap(), format!("k{i}"));
    }
    assert_eq!(proxy.metric(POOL_DISCARDS, &[("reason", "dead")]), IDLE as u64);
    assert_eq!(proxy.metric(RETRIES, &[]), 0);
    assert_eq!(proxy.metric(REQUESTS, &[("outcome", "backend_lost")]), 0);
}

fn ends_unheard_on_warm_connections_meet_no_newcomer(io: Io) {
    const WARM: usize = 8;
    // Of those on which nothing was asked yet.
    let unused = Connections::default();
    let all = unused.clone();
    let backend = Backend::scripted(move |mut stream| {
        all.lock().unwrap().push(stream.try_clone().unwrap());
        let peer = stream.peer_addr().unwrap();
        while let Ok(line) = read_line(stream) {
            all.lock().unwrap().retain(|other| other.peer_addr().is_ok_and(|addr| addr != peer));
            if stream.write_all(format!("{line}\n").as_bytes()).is_err() {
                return;
            }
        }
    });
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_WORKERS", "1")
        .pool(WARM as u64, WARM as u64)
        .start();
    let busy: Vec<_> = (0..crowd(io)).map(|_| connect(proxy.address())).collect();
    for client in &busy {
        assert_eq!(ask(client, "busy"), "busy");
    }
    wait_idle(&proxy, WARM as u64);
    eventually("all are accepted", PATIENCE, || {
        (unused.lock().unwrap().len() == WARM).then_some(())
    });
    let mut newcomers = Vec::new();
    stopped(&proxy, || {
        for mut client in &busy {
            client.write_all(b"again\n").unwrap();
        }
        for connection in &unused.lock().unwrap()[..] {
            connection.shutdown(Shutdown::Both).unwrap();
        }
        for i in 0..10 {
            let mut client = connect(proxy.address());
            client.write_all(format!("new{i}\n").as_bytes()).unwrap();
            newcomers.push(client);
        }
    });
    for (i, client) in newcomers.iter().enumerate() {
        assert_eq!(read_line(client).unwrap(), format!("new{i}"));
    }
    proxy.wait_for(POOL_DISCARDS, &[("reason", "dead")], |dead| dead == WARM as u64);
}

fn bytes_unheard_on_the_connection_of_a_session_are_no_reply(io: Io) {
    let (backend, connections) = echoing_keys();
    let proxy = pooled(io, "chronos", "session", &backend).start();
    let clients: Vec<_> = (0..crowd(io)).map(|_| connect(proxy.address())).collect();
    for (i, client) in clients.iter().enumerate() {
        assert_eq!(ask(client, &format!("GET first{i}")), format!("first{i}"));
    }
    // Each of the last ones has a connection on which something unheard waits.
    let troubled = clients.len() - 10;
    stopped(&proxy, || {
        for (i, mut client) in clients.iter().enumerate() {
            client.write_all(format!("SET k{i} x\n").as_bytes()).unwrap();
        }
        for (i, mut connection) in connections.lock().unwrap()[troubled..].iter().enumerate() {
            if i % 2 == 0 {
                connection.write_all(b"stray\n").unwrap();
            } else {
                connection.shutdown(Shutdown::Both).unwrap();
            }
        }
    });
    for (i, client) in clients.iter().enumerate() {
        assert_eq!(read_line(client).unwrap(), format!("k{i}"));
    }
    for why in ["unexpected", "dead"] {
        proxy.wait_for(POOL_DISCARDS, &[("reason", why)], |discards| discards == 5);
    }
}
