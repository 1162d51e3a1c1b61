//! Who may hold a backend connection where they are shared, for how long, and what those are told
//! that get none.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::Backend;
use crate::support::client::{ask, connect, read_line};
use crate::support::metrics::{POOL_CONNECTIONS, QUEUE_DEPTH, REQUESTS};
use crate::support::proxy::Builder;
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    malformed_requests_have_no_more_connections_than_others,
    an_upgraded_connection_keeps_its_place_until_it_ends,
    in_session_mode_the_size_bounds_nothing,
];

fn framed(io: Io, protocol: &str, mode: &str, backends: &[&Backend]) -> Builder {
    let addresses: Vec<_> = backends.iter().map(|backend| backend.address()).collect();
    Builder::on(io)
        .backends(&addresses)
        .set("AEGIS_WORKERS", "1")
        .set("AEGIS_PROTOCOL", protocol)
        .set("AEGIS_POOL_MODE", mode)
        .pool(0, 16)
}

fn http(io: Io, backend: &Backend) -> Builder {
    framed(io, "http1", "request", &[backend])
}

/// Answers each request that has no body, unless it is not HTTP: then it keeps silent.
fn server() -> Backend {
    Backend::scripted(|mut stream| {
        let mut head = String::new();
        while let Ok(line) = read_line(stream) {
            if line != "\r" {
                head.push_str(&line);
                continue;
            }
            if head.contains("/upgrade") {
                let _ = stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n");
                while let Ok(1..) = stream.read(&mut [0; 4096]) {}
                return;
            }
            if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").is_err() {
                return;
            }
            head.clear();
        }
    })
}

/// The first line of the answer, all of which is read.
fn status(mut stream: &TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).unwrap();
    read_status(stream).unwrap_or_else(|error| panic!("asking {request:?}: {error}"))
}

fn read_status(stream: &TcpStream) -> std::io::Result<String> {
    let first = read_line(stream)?;
    while read_line(stream)? != "\r" {}
    Ok(first.trim_end().to_owned())
}

const GET: &str = "GET / HTTP/1.1\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK";
const UNAVAILABLE: &str = "HTTP/1.1 503 Service Unavailable";

fn malformed_requests_have_no_more_connections_than_others(io: Io) {
    const CLIENTS: usize = 40;
    let backend = server();
    let proxy = http(io, &backend)
        .set("AEGIS_POOL_SIZE", "2")
        .set("AEGIS_QUEUE_MAX", "30")
        .set("AEGIS_QUEUE_TIMEOUT", "500ms")
        .start();
    let clients: Vec<_> = (0..CLIENTS).map(|_| connect(proxy.address())).collect();
    for mut client in &clients {
        client.write_all(b"\n").unwrap();
    }
    // Two hold connections, as many wait as may, and the others are refused.
    let opaque = |outcome| [("command", "opaque"), ("outcome", outcome)];
    proxy.wait_for(REQUESTS, &opaque("queue_full"), |count| count == CLIENTS as u64 - 32);
    proxy.wait_for(REQUESTS, &opaque("queue_timeout"), |count| count == 30);
    proxy.wait_for(REQUESTS, &opaque("opaque"), |count| count == 2);
    assert_eq!(backend.accepted(), 2);
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "opaque")], |count| count == 2);
    let other = connect(proxy.address());
    assert_eq!(status(&other, GET), UNAVAILABLE);
    let (mut told, mut held) = (0, 0);
    for client in clients {
        client.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        match read_line(&client) {
            Ok(line) => {
                assert_eq!(line.trim_end(), UNAVAILABLE);
                told += 1;
            }
            Err(_) => held += 1,
        }
    }
    assert_eq!((told, held), (CLIENTS - 2, 2));
    // With their clients they have gone, and so have their places.
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "opaque")], |count| count == 0);
    assert_eq!(status(&connect(proxy.address()), GET), OK);
}

fn an_upgraded_connection_keeps_its_place_until_it_ends(io: Io) {
    let backend = server();
    let proxy = http(io, &backend).set("AEGIS_POOL_SIZE", "1").start();
    let upgraded = connect(proxy.address());
    let upgrade = "GET /upgrade HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
    assert_eq!(status(&upgraded, upgrade), "HTTP/1.1 101 Switching Protocols");
    let mut other = connect(proxy.address());
    other.write_all(GET.as_bytes()).unwrap();
    proxy.wait_for(QUEUE_DEPTH, &[], |depth| depth == 1);
    assert_eq!(backend.accepted(), 1);
    drop(upgraded);
    assert_eq!(read_status(&other).unwrap(), OK);
    assert_eq!(backend.accepted(), 2);
    proxy.wait_for(POOL_CONNECTIONS, &[], |open| open == 1);
}

fn in_session_mode_the_size_bounds_nothing(io: Io) {
    let backend = server();
    let proxy = framed(io, "http1", "session", &[&backend]).set("AEGIS_POOL_SIZE", "1").start();
    let clients: Vec<_> = (0..3).map(|_| connect(proxy.address())).collect();
    for client in &clients {
        assert_eq!(status(client, GET), OK);
    }
    let mut malformed = connect(proxy.address());
    malformed.write_all(b"\n").unwrap();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "opaque")], |count| count == 1);
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "lent")], |count| count == 3);
}
