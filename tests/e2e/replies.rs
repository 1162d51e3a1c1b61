//! Which bytes are an answer, and whose: connections that are not as silent as was believed, answers
//! that come before their request is whole, and answers that break off or flow slowly.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::backend::Backend;
use crate::support::client::{ask, connect, is_timeout, read_line, read_to_end, reset};
use crate::support::metrics::{
    POOL_CONNECTIONS, POOL_DISCARDS, REQUESTS, RETRIES, SESSIONS_ACTIVE, SESSIONS_CLOSED,
};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers, pattern};

on_both_drivers![
    bytes_unheard_on_idle_connections_reach_nobody,
    bytes_unheard_on_an_idle_connection_of_http_reach_nobody,
    bytes_unheard_on_an_idle_connection_reach_no_opaque_client,
    ends_unheard_on_idle_connections_lose_no_write,
    ends_unheard_on_warm_connections_meet_no_newcomer,
    bytes_unheard_on_the_connection_of_a_session_are_no_reply,
    a_refusal_that_breaks_the_upload_off_reaches_the_client,
    a_client_that_sends_all_before_it_reads_gets_the_refusal,
    a_reply_that_comes_early_does_not_end_the_upload,
    a_reply_in_the_middle_of_an_upload_does_not_end_it,
    an_upload_behind_a_reply_that_closes_is_passed_on,
    an_upload_that_was_accepted_and_not_taken_ends_in_a_reset,
    a_backend_that_stops_taking_an_upload_is_given_up,
    all_of_a_reply_that_breaks_off_is_delivered,
    all_that_came_before_a_reset_is_delivered,
    a_reply_that_flows_is_not_cut_however_long_it_takes,
    a_slow_reader_is_not_blamed_on_its_backend,
    a_slow_upload_is_not_blamed_on_its_backend,
    a_backend_that_takes_no_upload_is_slow,
    a_client_that_sends_on_and_takes_nothing_is_closed,
    whatever_the_two_sides_do_nothing_of_it_is_left,
];

fn lending(io: Io, protocol: &str, mode: &str, backend: &Backend) -> Builder {
    Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_WORKERS", "1")
        .protocol(protocol, mode)
        .pool(0, 64)
}

fn wait_idle(proxy: &Proxy, count: u64) {
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle == count);
}

/// More than a driver hears of in one turn.
fn crowd(io: Io) -> usize {
    if io == Io::Epoll { 1_500 } else { 60 }
}

/// Stops the proxy, as a CPU quota would, while `meanwhile` runs.
fn stopped(proxy: &Proxy, meanwhile: impl FnOnce()) {
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
        let proxy = lending(io, "chronos", "request", &backend)
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
        let lent = proxy.metric(POOL_CONNECTIONS, &[("state", "lent")]);
        assert_eq!(lent, 0);
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

fn read_answer(mut stream: &TcpStream) -> String {
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

fn bytes_unheard_on_an_idle_connection_of_http_reach_nobody(io: Io) {
    let (backend, connections) = echoing_paths();
    let proxy = lending(io, "http1", "request", &backend).set("AEGIS_POOL_SIZE", "1").start();
    let clients: Vec<_> = (0..60).map(|_| connect(proxy.address())).collect();
    fill(&proxy, &clients, b"GET /first HTTP/1.1\r\n\r\n", 1, |client| {
        assert_eq!(read_answer(client), "/first");
    });
    stopped(&proxy, || {
        for (i, mut client) in clients.iter().enumerate() {
            client.write_all(format!("GET /k{i} HTTP/1.1\r\n\r\n").as_bytes()).unwrap();
        }
        let stray = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray";
        (&connections.lock().unwrap()[0]).write_all(stray).unwrap();
    });
    for (i, client) in clients.iter().enumerate() {
        assert_eq!(read_answer(client), format!("/k{i}"));
    }
    assert_eq!(proxy.metric(POOL_DISCARDS, &[("reason", "unexpected")]), 1);
}

fn bytes_unheard_on_an_idle_connection_reach_no_opaque_client(io: Io) {
    let (backend, connections) = echoing_paths();
    let proxy = lending(io, "http1", "request", &backend).set("AEGIS_POOL_SIZE", "1").start();
    let clients: Vec<_> = (0..60).map(|_| connect(proxy.address())).collect();
    fill(&proxy, &clients, b"GET /first HTTP/1.1\r\n\r\n", 1, |client| {
        assert_eq!(read_answer(client), "/first");
    });
    stopped(&proxy, || {
        for (i, mut client) in clients.iter().enumerate() {
            // Its line ends make each of them opaque.
            client.write_all(format!("GET /k{i} HTTP/1.1\n\n").as_bytes()).unwrap();
        }
        let stray = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray";
        (&connections.lock().unwrap()[0]).write_all(stray).unwrap();
    });
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
    let proxy = lending(io, "chronos", "request", &backend).set("AEGIS_POOL_SIZE", "3").start();
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
    let proxy = lending(io, "chronos", "session", &backend).start();
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

/// Reads the head of a request, up to its empty line. None: the connection has ended.
fn read_head(stream: &TcpStream) -> Option<String> {
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

/// Sends a request with a body of `size` bytes, as far as anybody takes it.
fn upload(mut stream: &TcpStream, chunked: bool, size: usize) -> std::io::Result<()> {
    let framing = if chunked {
        "Transfer-Encoding: chunked".to_owned()
    } else {
        format!("Content-Length: {size}")
    };
    stream.write_all(format!("POST /upload HTTP/1.1\r\n{framing}\r\n\r\n").as_bytes())?;
    for part in pattern(1, size).chunks(10_000) {
        if chunked {
            stream.write_all(format!("{:x}\r\n", part.len()).as_bytes())?;
            stream.write_all(part)?;
            stream.write_all(b"\r\n")?;
        } else {
            stream.write_all(part)?;
        }
    }
    if chunked { stream.write_all(b"0\r\n\r\n") } else { Ok(()) }
}

const REFUSAL: &str =
    "HTTP/1.1 413 Content Too Large\r\nContent-Length: 7\r\nConnection: close\r\n\r\ntoo big";
const ACCEPTANCE: &str = "HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\nok";

/// What a client gets, and whether an orderly end came behind it.
fn read_all(mut stream: &TcpStream) -> (String, bool) {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (String::from_utf8(bytes).unwrap(), true),
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(error) => {
                assert!(!is_timeout(&error), "it is left open behind {bytes:?}");
                return (String::from_utf8(bytes).unwrap(), false);
            }
        }
    }
}

/// Answers the head of a request with `answer`, then closes with the body unread, which makes of it
/// a reset, or ends its direction first.
fn refusing(answer: &'static str, in_order: bool) -> Backend {
    Backend::scripted(move |mut stream| {
        if read_head(stream).is_some() {
            let _ = stream.write_all(answer.as_bytes());
            if in_order {
                let _ = stream.shutdown(Shutdown::Write);
                let _ = wait_until_closed(stream);
            } else {
                let _ = stream.peek(&mut [0]);
            }
        }
    })
}

fn a_refusal_that_breaks_the_upload_off_reaches_the_client(io: Io) {
    for in_order in [false, true] {
        let backend = refusing(REFUSAL, in_order);
        let proxy = lending(io, "http1", "request", &backend).start();
        let mut tries = 0;
        for (size, rounds) in [(20_000, 8), (300_000, 8), (5 << 20, 6), (16 << 20, 3)] {
            for round in 0..rounds {
                let client = connect(proxy.address());
                let sender = client.try_clone().unwrap();
                let sending = std::thread::spawn(move || upload(&sender, round % 2 == 1, size));
                let (answer, ended) = read_all(&client);
                assert_eq!(answer, REFUSAL, "{size} bytes, round {round}, {in_order}");
                assert!(ended, "{size} bytes, round {round}, {in_order}");
                drop(client);
                let _ = sending.join().unwrap();
                tries += 1;
            }
        }
        let answered = [("command", "post"), ("outcome", "answered")];
        proxy.wait_for(REQUESTS, &answered, |answered| answered == tries);
    }
}

fn a_client_that_sends_all_before_it_reads_gets_the_refusal(io: Io) {
    let backend = refusing(REFUSAL, false);
    let proxy = lending(io, "http1", "request", &backend).start();
    for chunked in [false, true] {
        let client = connect(proxy.address());
        upload(&client, chunked, 8 << 20).expect("all is taken, if only to be dropped");
        assert_eq!(read_all(&client).0, REFUSAL);
    }
    // An answer that lasts until the end is not whole where the connection broke.
    let endless = refusing("HTTP/1.1 413 Content Too Large\r\n\r\nhow much of it is there?", false);
    let proxy = lending(io, "http1", "request", &endless).start();
    for _ in 0..4 {
        let client = connect(proxy.address());
        let sender = client.try_clone().unwrap();
        let sending = std::thread::spawn(move || upload(&sender, false, 8 << 20));
        let (answer, ended) = read_all(&client);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413 "), "{answer}");
        // The reset is told once, be it to the one that reads or to the one that writes.
        let sent = sending.join().unwrap();
        let cut = !ended || sent.is_err() || answer.starts_with("HTTP/1.1 502 ");
        assert!(cut, "{answer} looks whole");
    }
}

fn a_reply_that_comes_early_does_not_end_the_upload(io: Io) {
    const SIZE: usize = 5 << 20;
    let (uploads, taken) = std::sync::mpsc::channel();
    let uploads = Mutex::new(uploads);
    let backend = Backend::scripted(move |mut stream| {
        while let Some(head) = read_head(stream) {
            stream.write_all(ACCEPTANCE.as_bytes()).unwrap();
            let body = if head.contains("chunked") {
                read_chunks(stream)
            } else {
                let mut body = vec![0; SIZE];
                stream.read_exact(&mut body).map(|()| body).unwrap_or_default()
            };
            uploads.lock().unwrap().send(body == pattern(1, SIZE)).unwrap();
        }
    });
    for mode in ["request", "session"] {
        let before = backend.accepted();
        early_uploads(io, mode, &backend, SIZE, &taken);
        assert_eq!(backend.accepted(), before + 1, "both connections are kept");
    }
}

fn early_uploads(io: Io, mode: &str, backend: &Backend, size: usize, taken: &Receiver<bool>) {
    let proxy = lending(io, "http1", mode, backend).start();
    let client = connect(proxy.address());
    for round in 0..4 {
        let sender = client.try_clone().unwrap();
        let waits = round < 2;
        // One that has its answer before it sends on, and one that does not look.
        let sending = std::thread::spawn(move || {
            if waits {
                let mut sender = &sender;
                let head = format!("POST /upload HTTP/1.1\r\nContent-Length: {size}\r\n\r\n");
                sender.write_all(head.as_bytes()).unwrap();
                assert_eq!(read_answer(sender), "ok");
                sender.write_all(pattern(1, size)).unwrap();
            } else {
                upload(&sender, round % 2 == 1, size).unwrap();
                assert_eq!(read_answer(&sender), "ok");
            }
        });
        sending.join().unwrap();
        assert!(taken.recv_timeout(PATIENCE).unwrap(), "round {round}");
    }
    let answered = [("command", "post"), ("outcome", "answered")];
    proxy.wait_for(REQUESTS, &answered, |answered| answered == 4);
    drop(client);
    wait_idle(&proxy, 1);
}

fn a_reply_in_the_middle_of_an_upload_does_not_end_it(io: Io) {
    // What is left of it may be anywhere: at the client, in the proxy, in sockets.
    const SIZES: [usize; 6] = [16_385, 17_000, 40_000, 200_000, 1_000_000, 6_000_000];
    let (uploads, taken) = std::sync::mpsc::channel();
    let uploads = Mutex::new(uploads);
    let backend = Backend::scripted(move |mut stream| {
        while let Some(head) = read_head(stream) {
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
            let mut body = vec![0; length.unwrap().trim().parse().unwrap()];
            let early = body.len() / 3;
            let first = stream.read_exact(&mut body[..early]);
            stream.write_all(ACCEPTANCE.as_bytes()).unwrap();
            // That it goes on later is what is tested.
            std::thread::sleep(Duration::from_millis(30));
            let all = first.and_then(|()| stream.read_exact(&mut body[early..]));
            let right = all.is_ok() && body == pattern(1, body.len());
            uploads.lock().unwrap().send(right).unwrap();
        }
    });
    let proxy = lending(io, "http1", "request", &backend).start();
    let client = connect(proxy.address());
    for size in SIZES {
        for round in 0..3 {
            upload(&client, false, size).unwrap();
            assert_eq!(read_answer(&client), "ok");
            assert!(taken.recv_timeout(PATIENCE).unwrap(), "{size} bytes, round {round}");
        }
    }
    assert_eq!(backend.accepted(), 1, "both connections are kept");
}

fn an_upload_behind_a_reply_that_closes_is_passed_on(io: Io) {
    const SIZE: usize = 5 << 20;
    let (uploads, taken) = std::sync::mpsc::channel();
    let uploads = Mutex::new(uploads);
    let backend = Backend::scripted(move |mut stream| {
        read_head(stream);
        let close = "\r\nConnection: close\r\n\r\n";
        stream.write_all(ACCEPTANCE.replace("\r\n\r\n", close).as_bytes()).unwrap();
        // That it is slow to read is what is tested.
        std::thread::sleep(Duration::from_millis(100));
        let body = read_to_end(stream).unwrap_or_default();
        uploads.lock().unwrap().send(body == pattern(1, SIZE)).unwrap();
    });
    let proxy = lending(io, "http1", "request", &backend).start();
    for _ in 0..3 {
        let client = connect(proxy.address());
        upload(&client, false, SIZE).unwrap();
        let (answer, ended) = read_all(&client);
        assert!(answer.ends_with("\r\n\r\nok") && ended, "{answer}");
        assert!(taken.recv_timeout(PATIENCE).unwrap(), "all of it, and an orderly end");
    }
}

fn read_chunks(mut stream: &TcpStream) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let Ok(line) = read_line(stream) else { return body };
        let size = usize::from_str_radix(line.trim_end(), 16).unwrap();
        let at = body.len();
        body.resize(at + size + 2, 0);
        if stream.read_exact(&mut body[at..]).is_err() {
            return body;
        }
        body.truncate(at + size);
        if size == 0 {
            return body;
        }
    }
}

fn an_upload_that_was_accepted_and_not_taken_ends_in_a_reset(io: Io) {
    // It takes a part, and closes in order or breaks.
    for part in [0, 100_000] {
        let backend = Backend::scripted(move |mut stream| {
            read_head(stream);
            let _ = stream.write_all(ACCEPTANCE.as_bytes());
            let _ = stream.read_exact(&mut vec![0; part]);
        });
        let proxy = lending(io, "http1", "request", &backend).start();
        for chunked in [false, true] {
            let client = connect(proxy.address());
            let sender = client.try_clone().unwrap();
            let sending = std::thread::spawn(move || upload(&sender, chunked, 8 << 20));
            let (answer, ended) = read_all(&client);
            assert_eq!(answer, ACCEPTANCE);
            // The reset is told once, be it to the one that reads or to the one that writes.
            let sent = sending.join().unwrap();
            assert!(!ended || sent.is_err(), "it looks as if all had been taken");
        }
    }
}

fn a_backend_that_stops_taking_an_upload_is_given_up(io: Io) {
    let backend = Backend::scripted(|mut stream| {
        read_head(stream);
        let _ = stream.write_all(ACCEPTANCE.as_bytes());
        let _ = wait_until_closed(stream);
    });
    let proxy =
        lending(io, "http1", "request", &backend).set("AEGIS_REQUEST_TIMEOUT", "300ms").start();
    let client = connect(proxy.address());
    let sender = client.try_clone().unwrap();
    let sending = std::thread::spawn(move || upload(&sender, false, 16 << 20));
    let (answer, ended) = read_all(&client);
    let sent = sending.join().unwrap();
    assert_eq!(answer, ACCEPTANCE);
    assert!(!ended || sent.is_err());
    proxy.wait_for(POOL_DISCARDS, &[("reason", "timeout")], |discards| discards == 1);
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
}

/// Waits for the peer's end without reading anything.
fn wait_until_closed(stream: &TcpStream) -> std::io::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    poll(&mut fds, None)?;
    Ok(())
}

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
        let proxy = lending(io, protocol, "request", &backend).start();
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
        let proxy = lending(io, "http1", "request", &backend).start();
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
            if line.starts_with("GET") {
                for part in parts {
                    if stream.write_all(part.as_bytes()).is_err() {
                        return;
                    }
                    // How fast an answer flows is what is tested.
                    std::thread::sleep(Duration::from_millis(100));
                }
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
            lending(io, protocol, "request", backend).set("AEGIS_REQUEST_TIMEOUT", "600ms").start();
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
        lending(io, "http1", "request", &endless).set("AEGIS_REQUEST_TIMEOUT", "300ms").start();
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
            lending(io, protocol, "request", backend).set("AEGIS_REQUEST_TIMEOUT", "200ms").start();
        let mut client = connect(proxy.address());
        client.write_all(request.as_bytes()).unwrap();
        let mut answer = vec![0; len];
        for part in answer.chunks_mut(6 << 20) {
            // How slow the reader is is what is tested.
            std::thread::sleep(Duration::from_millis(300));
            client.read_exact(part).unwrap();
        }
        proxy.wait_for(REQUESTS, &[("outcome", "answered")], |answered| answered == 1);
        assert_eq!(proxy.metric(REQUESTS, &[("outcome", "timeout")]), 0);
        wait_idle(&proxy, 1);
        // One that takes nothing at all has a limit of its own.
        let proxy = lending(io, protocol, "request", backend)
            .set("AEGIS_REQUEST_TIMEOUT", "200ms")
            .set("AEGIS_IDLE_TIMEOUT", "400ms")
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

fn a_slow_upload_is_not_blamed_on_its_backend(io: Io) {
    // More than is waited for before a connection is acquired.
    const SIZE: usize = 20_000;
    let backend = Backend::scripted(|mut stream| {
        while read_head(stream).is_some() {
            if stream.read_exact(&mut vec![0; SIZE]).is_err() {
                return;
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        }
    });
    let head = format!("POST / HTTP/1.1\r\nContent-Length: {SIZE}\r\n\r\n");
    let proxy =
        lending(io, "http1", "request", &backend).set("AEGIS_REQUEST_TIMEOUT", "200ms").start();
    let mut client = connect(proxy.address());
    client.write_all(head.as_bytes()).unwrap();
    client.write_all(pattern(1, SIZE - 10)).unwrap();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "lent")], |lent| lent == 1);
    for pause in [100, 100, 100, 100, 500] {
        // How slow the client is is what is tested.
        std::thread::sleep(Duration::from_millis(pause));
        client.write_all(b"xx").unwrap();
    }
    assert_eq!(read_answer(&client), "ok");
    let proxy = lending(io, "http1", "request", &backend)
        .set("AEGIS_REQUEST_TIMEOUT", "100ms")
        .set("AEGIS_IDLE_TIMEOUT", "300ms")
        .start();
    let mut client = connect(proxy.address());
    client.write_all(head.as_bytes()).unwrap();
    client.write_all(b"xxxx").unwrap();
    let (answer, _) = read_all(&client);
    assert!(answer.starts_with("HTTP/1.1 408 Request Timeout\r\n"), "{answer}");
    assert_eq!(proxy.metric(REQUESTS, &[("outcome", "client_timeout")]), 1);
    assert_eq!(proxy.metric(POOL_DISCARDS, &[("reason", "abandoned")]), 1);
}

fn a_backend_that_takes_no_upload_is_slow(io: Io) {
    let backend = Backend::scripted(|stream| {
        let _ = wait_until_closed(stream);
    });
    let proxy =
        lending(io, "http1", "request", &backend).set("AEGIS_REQUEST_TIMEOUT", "300ms").start();
    let client = connect(proxy.address());
    let sender = client.try_clone().unwrap();
    let sending = std::thread::spawn(move || upload(&sender, false, 16 << 20));
    let (answer, _) = read_all(&client);
    assert!(answer.starts_with("HTTP/1.1 504 Gateway Timeout\r\n"), "{answer}");
    assert_eq!(proxy.metric(REQUESTS, &[("outcome", "timeout")]), 1);
    drop(client);
    let _ = sending.join().unwrap();
}

fn a_client_that_sends_on_and_takes_nothing_is_closed(io: Io) {
    let backend = refusing(REFUSAL, false);
    let proxy =
        lending(io, "http1", "request", &backend).set("AEGIS_HALF_CLOSE_TIMEOUT", "300ms").start();
    let client = connect(proxy.address());
    let mut sender = client.try_clone().unwrap();
    sender.write_all(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    eventually("its connection is closed", PATIENCE, || {
        sender.write_all(b"5\r\nbytes\r\n").is_err().then_some(())
    });
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
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

fn whatever_the_two_sides_do_nothing_of_it_is_left(io: Io) {
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
    let backend = moody();
    let proxy = lending(io, "http1", "request", &backend)
        .set("AEGIS_POOL_SIZE", "4")
        .set("AEGIS_HALF_CLOSE_TIMEOUT", "1s")
        .start();
    let quiet = proxy.metric("aegis_buffers_in_use", &[]);
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let address = proxy.address();
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(seed);
                for _ in 0..40 {
                    let path = PATHS[rng.usize(..PATHS.len())];
                    let size = [0, 100, 20_000, 400_000][rng.usize(..4)];
                    let client = connect(address);
                    let mut sender = client.try_clone().unwrap();
                    let leaves = rng.u8(..4) == 0;
                    let part = if leaves { rng.usize(..=size) } else { size };
                    let sending = std::thread::spawn(move || {
                        let head =
                            format!("POST {path} HTTP/1.1\r\nContent-Length: {size}\r\n\r\n");
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
            });
        }
    });
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "lent")], |lent| lent == 0);
    // Those that the kernel holds come and go.
    proxy.wait_for("aegis_buffers_in_use", &[], |held| held <= quiet + 8);
}
