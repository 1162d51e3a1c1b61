//! What becomes of replies that break off or flow slowly.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::time::Duration;

use crate::support::backend::Backend;
use crate::support::client::{connect, is_timeout, read_line, reset};
use crate::support::metrics::{
    POOL_CONNECTIONS, POOL_DISCARDS, REQUESTS, SESSIONS_ACTIVE, SESSIONS_CLOSED,
};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers, pattern};

on_both_drivers![
    all_of_a_reply_that_breaks_off_is_delivered,
    all_that_came_before_a_reset_is_delivered,
    a_reply_that_flows_is_not_cut_however_long_it_takes,
    a_slow_reader_is_not_blamed_on_its_backend,
    whatever_the_two_sides_do_nothing_of_it_is_left,
];

pub(super) fn pooled(io: Io, protocol: &str, mode: &str, backend: &Backend) -> Builder {
    Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_WORKERS", "1")
        .protocol(protocol, mode)
        .pool(0, 64)
}

pub(super) fn wait_idle(proxy: &Proxy, count: u64) {
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle == count);
}

pub(super) fn read_answer(mut stream: &TcpStream) -> String {
    let mut length = 0;
    loop {
        let line = read_line(stream).unwrap();
        if let Some(value) = line.trim_end().strip_prefix("Content-Length: ") {
            length = value.parse().unwrap();
        }
        if line.trim_end().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    String::from_utf8(body).unwrap()
}

/// Reads the head of a request, up to its empty line. None: the connection has ended.
pub(super) fn read_head(stream: &TcpStream) -> Option<String> {
    let mut head = String::new();
    loop {
        let line = read_line(stream).ok()?;
        if line == "\r" {
            return Some(head);
        }
        head.push_str(&line);
        head.push('\n');
    }
}

pub(super) const REFUSAL: &str =
    "HTTP/1.1 413 Content Too Large\r\nContent-Length: 7\r\nConnection: close\r\n\r\ntoo big";
pub(super) const ACCEPTANCE: &str = "HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\nok";

/// The bytes of an answer that is cut off, and all that a client got of it until the reset.
fn read_until_reset(mut stream: &TcpStream, pause: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16_000];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => panic!("an end behind {} bytes", bytes.len()),
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(error) => {
                assert!(!is_timeout(&error), "left open behind {} bytes", bytes.len());
                return bytes;
            }
        }
        if pause {
            // A slow reader is what is tested.
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Bytes without a line feed.
fn line(len: usize) -> Vec<u8> {
    pattern(2, len).iter().map(|byte| byte | 0x80).collect()
}

fn all_of_a_reply_that_breaks_off_is_delivered(io: Io) {
    const SENT: usize = 3_000_000;
    let request = "GET / HTTP/1.1\r\n\r\n";
    for (protocol, request, head) in [
        ("http1", request, "HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"),
        ("http1", request, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5f5e0ff\r\n"),
        ("chronos", "GET a\n", "half of a value: "),
    ] {
        let backend = Backend::scripted(move |mut stream| {
            let mut heard = vec![0; request.len()];
            let _ = stream.read_exact(&mut heard);
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&line(SENT));
        });
        let proxy = pooled(io, protocol, "request", &backend).start();
        for pause in [false, true] {
            let mut client = connect(proxy.address());
            client.write_all(request.as_bytes()).unwrap();
            let got = read_until_reset(&client, pause);
            assert_eq!(got.len(), head.len() + SENT, "{head:?}, pause {pause}");
            assert!(got.ends_with(&line(SENT)));
        }
        proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
    }
}

/// What the sockets of this local port have sent and their peers have not acknowledged.
fn unacknowledged(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let local = format!(":{port:04X}");
    let queues = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let own = queues.filter(|fields| fields[1].ends_with(&local) && fields[3] == "01");
    own.map(|fields| usize::from_str_radix(&fields[4][..8], 16).unwrap()).sum()
}

fn all_that_came_before_a_reset_is_delivered(io: Io) {
    for head in ["HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"] {
        let (reached, received) = std::sync::mpsc::channel();
        let reached = Mutex::new(reached);
        let backend = Backend::scripted(move |mut stream| {
            read_head(stream);
            // Much more than anybody takes.
            stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
            stream.write_all(head.as_bytes()).unwrap();
            let mut sent = head.len();
            while let Ok(count) = stream.write(pattern(2, 64 << 10)) {
                sent += count;
            }
            let port = stream.local_addr().unwrap().port();
            reached.lock().unwrap().send(sent - unacknowledged(port)).unwrap();
            // With the body unread, its close is a reset.
        });
        let proxy = pooled(io, "http1", "request", &backend).start();
        let mut client = connect(proxy.address());
        client.write_all(b"POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody").unwrap();
        let reached: usize = received.recv_timeout(PATIENCE).unwrap();
        eventually("the backend has closed", PATIENCE, || (backend.open() == 0).then_some(()));
        let got = read_until_reset(&client, false);
        assert!(got.len() >= reached, "{} bytes of {reached}", got.len());
        proxy.wait_for(REQUESTS, &[("outcome", "backend_lost")], |lost| lost == 1);
    }
}

/// Sends an answer of `parts`, one every 100 ms, of which each is as it stands.
fn streaming(parts: &'static [&'static str]) -> Backend {
    Backend::scripted(move |mut stream| {
        while let Ok(line) = read_line(stream) {
            let parts = if line.starts_with("GET") { parts } else { &[] };
            for part in parts {
                if stream.write_all(part.as_bytes()).is_err() {
                    return;
                }
                // How fast an answer flows is what is tested.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    })
}

fn a_reply_that_flows_is_not_cut_however_long_it_takes(io: Io) {
    const HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n";
    let http = streaming(&[HEAD, "1", "2", "3", "4", "5", "6", "7", "8", "9", "0"]);
    let lines = streaming(&["1", "2", "3", "4", "5", "6", "7", "8", "9", "0\n"]);
    for (protocol, backend, request) in
        [("http1", &http, "GET / HTTP/1.1\r\n\r\n"), ("chronos", &lines, "GET a\n")]
    {
        let proxy =
            pooled(io, protocol, "request", backend).set("AEGIS_REQUEST_TIMEOUT", "600ms").start();
        let mut client = connect(proxy.address());
        client.write_all(request.as_bytes()).unwrap();
        let answer =
            if protocol == "http1" { read_answer(&client) } else { read_line(&client).unwrap() };
        assert_eq!(answer, "1234567890", "{protocol}");
        wait_idle(&proxy, 1);
    }
    // One that pauses for longer than it may.
    let endless = streaming(&[HEAD, "12345"]);
    let proxy =
        pooled(io, "http1", "request", &endless).set("AEGIS_REQUEST_TIMEOUT", "300ms").start();
    let mut client = connect(proxy.address());
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(read_until_reset(&client, false), format!("{HEAD}12345").as_bytes());
    assert_eq!(proxy.metric(REQUESTS, &[("outcome", "timeout")]), 1);
    assert_eq!(proxy.metric(POOL_DISCARDS, &[("reason", "timeout")]), 1);
}

fn a_slow_reader_is_not_blamed_on_its_backend(io: Io) {
    // Far more than sockets and buffers between hold.
    const SIZE: usize = 16 << 20;
    let big = |head: &'static str, tail: &'static str| {
        Backend::scripted(move |mut stream| {
            while let Ok(line) = read_line(stream) {
                if !line.starts_with("GET") {
                    continue;
                }
                let body = vec![b'x'; SIZE];
                let sent = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
                if sent.and_then(|()| stream.write_all(tail.as_bytes())).is_err() {
                    return;
                }
            }
        })
    };
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 16777216\r\n\r\n";
    let (http, lines) = (big(head, ""), big("", "\n"));
    for (protocol, backend, request, len) in [
        ("http1", &http, "GET / HTTP/1.1\r\n\r\n", head.len() + SIZE),
        ("chronos", &lines, "GET a\n", SIZE + 1),
    ] {
        let proxy =
            pooled(io, protocol, "request", backend).set("AEGIS_REQUEST_TIMEOUT", "500ms").start();
        let mut client = connect(proxy.address());
        client.write_all(request.as_bytes()).unwrap();
        let mut answer = vec![0; len];
        for part in answer.chunks_mut(6 << 20) {
            // How slow the reader is is what is tested.
            std::thread::sleep(Duration::from_millis(700));
            client.read_exact(part).unwrap();
        }
        proxy.wait_for(REQUESTS, &[("outcome", "answered")], |answered| answered == 1);
        assert_eq!(proxy.metric(REQUESTS, &[("outcome", "timeout")]), 0);
        wait_idle(&proxy, 1);
        // One that takes nothing at all has a limit of its own.
        let proxy = pooled(io, protocol, "request", backend)
            .set("AEGIS_REQUEST_TIMEOUT", "500ms")
            .set("AEGIS_IDLE_TIMEOUT", "1s")
            .start();
        let mut client = connect(proxy.address());
        client.write_all(request.as_bytes()).unwrap();
        proxy.wait_for(SESSIONS_CLOSED, &[("reason", "idle_timeout")], |closed| closed == 1);
        assert_eq!(proxy.metric(REQUESTS, &[("outcome", "client_timeout")]), 1);
        assert_eq!(proxy.metric(REQUESTS, &[("outcome", "timeout")]), 0);
        assert_eq!(proxy.metric(POOL_DISCARDS, &[("reason", "abandoned")]), 1);
        assert!(read_until_reset(&client, false).len() < len);
    }
}

/// Does with each request what its path says.
fn moody() -> Backend {
    Backend::scripted(|mut stream| {
        while let Some(head) = read_head(stream) {
            let field = |name| head.lines().find_map(|line| line.strip_prefix(name));
            let length = field("Content-Length: ").map(|length| length.trim().parse().unwrap());
            let mut body = vec![0; length.unwrap_or(0)];
            let path = head.split(' ').nth(1).unwrap_or_default();
            let early = path.starts_with("/early");
            // One that closes says so: the next request would find its connection dying.
            let close =
                if path == "/early-cut" { "\r\nConnection: close\r\n\r\n" } else { "\r\n\r\n" };
            let acceptance = ACCEPTANCE.replace("\r\n\r\n", close);
            if early && stream.write_all(acceptance.as_bytes()).is_err() {
                return;
            }
            match path {
                "/refused" => {
                    let _ = stream.write_all(REFUSAL.as_bytes());
                    return;
                }
                "/refused-in-order" => {
                    let _ = stream.write_all(REFUSAL.as_bytes());
                    let _ = stream.shutdown(Shutdown::Write);
                    while let Ok(1..) = stream.read(&mut body) {}
                    return;
                }
                "/early-cut" => {
                    let _ = stream.read_exact(&mut body[..length.unwrap_or(0) / 2]);
                    return;
                }
                "/cut" => {
                    let _ = stream.write_all(&ACCEPTANCE.as_bytes()[..ACCEPTANCE.len() - 1]);
                    return;
                }
                "/until-close" => {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nall");
                    return;
                }
                "/closed" => return,
                _ => {}
            }
            if stream.read_exact(&mut body).is_err()
                || (!early && stream.write_all(ACCEPTANCE.as_bytes()).is_err())
            {
                return;
            }
        }
    })
}

const PATHS: [&str; 8] = [
    "/plain",
    "/early",
    "/early-cut",
    "/refused",
    "/refused-in-order",
    "/cut",
    "/until-close",
    "/closed",
];

/// Sends 40 requests with bodies; a quarter of them it resets midway.
fn ask_moody(address: SocketAddr, mut rng: fastrand::Rng) {
    for _ in 0..40 {
        let path = PATHS[rng.usize(..PATHS.len())];
        let size = [0, 100, 20_000, 400_000][rng.usize(..4)];
        let client = connect(address);
        let mut sender = client.try_clone().unwrap();
        let leaves = rng.u8(..4) == 0;
        let part = if leaves { rng.usize(..=size) } else { size };
        let sending = std::thread::spawn(move || {
            let head = format!("POST {path} HTTP/1.1\r\nContent-Length: {size}\r\n\r\n");
            let _ = sender.write_all(head.as_bytes());
            let _ = sender.write_all(pattern(1, part));
        });
        if leaves {
            sending.join().unwrap();
            reset(client);
            continue;
        }
        let line = read_line(&client).unwrap_or_default();
        let expected: &[&str] = match path {
            "/plain" | "/early" | "/early-cut" => &["HTTP/1.1 202 "],
            "/until-close" => &["HTTP/1.1 200 ", "HTTP/1.1 502 "],
            "/cut" => &["HTTP/1.1 202 ", "HTTP/1.1 502 "],
            "/closed" => &["HTTP/1.1 502 "],
            _ => &["HTTP/1.1 413 "],
        };
        let right = expected.iter().any(|expected| line.starts_with(expected));
        assert!(right, "{path} with {size} bytes: {line}");
        sending.join().unwrap();
    }
}

fn whatever_the_two_sides_do_nothing_of_it_is_left(io: Io) {
    let backend = moody();
    let proxy = pooled(io, "http1", "request", &backend)
        .set("AEGIS_POOL_SIZE", "4")
        .set("AEGIS_HALF_CLOSE_TIMEOUT", "1s")
        .start();
    let quiet = proxy.metric("aegis_buffers_in_use", &[]);
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let address = proxy.address();
            scope.spawn(move || ask_moody(address, fastrand::Rng::with_seed(seed)));
        }
    });
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 0);
    // Those that the kernel holds come and go.
    proxy.wait_for("aegis_buffers_in_use", &[], |held| held <= quiet + 8);
}
