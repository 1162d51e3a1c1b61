//! Requests with bodies: replies that come before their request is whole, and bodies that nobody
//! takes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Mutex;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use super::replies::{ACCEPTANCE, REFUSAL, pooled, read_answer, read_head, wait_idle};
use crate::support::backend::Backend;
use crate::support::client::{connect, is_timeout, read_line, read_to_end};
use crate::support::metrics::{POOL_CONNECTIONS, POOL_DISCARDS, REQUESTS, SESSIONS_ACTIVE};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers, pattern};

on_both_drivers![
    a_refusal_that_breaks_the_upload_off_reaches_the_client,
    a_client_that_sends_all_before_it_reads_gets_the_refusal,
    a_reply_that_comes_early_does_not_end_the_upload,
    a_reply_in_the_middle_of_an_upload_does_not_end_it,
    an_upload_behind_a_reply_that_closes_is_passed_on,
    an_upload_that_was_accepted_and_not_taken_ends_in_a_reset,
    a_backend_that_stops_taking_an_upload_is_given_up,
    a_slow_upload_is_not_blamed_on_its_backend,
    a_backend_that_takes_no_upload_is_slow,
    a_client_that_sends_on_and_takes_nothing_is_closed,
];

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
        let proxy = pooled(io, "http1", "request", &backend).start();
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
    let proxy = pooled(io, "http1", "request", &backend).start();
    for chunked in [false, true] {
        let client = connect(proxy.address());
        upload(&client, chunked, 8 << 20).expect("all is taken, if only to be dropped");
        assert_eq!(read_all(&client).0, REFUSAL);
    }
    // An answer that lasts until the end is not whole where the connection broke.
    let endless = refusing("HTTP/1.1 413 Content Too Large\r\n\r\nhow much of it is there?", false);
    let proxy = pooled(io, "http1", "request", &endless).start();
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
    let proxy = pooled(io, "http1", mode, backend).start();
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
    let proxy = pooled(io, "http1", "request", &backend).start();
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
    let proxy = pooled(io, "http1", "request", &backend).start();
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
        let proxy = pooled(io, "http1", "request", &backend).start();
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
        pooled(io, "http1", "request", &backend).set("AEGIS_REQUEST_TIMEOUT", "300ms").start();
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
        pooled(io, "http1", "request", &backend).set("AEGIS_REQUEST_TIMEOUT", "200ms").start();
    let mut client = connect(proxy.address());
    client.write_all(head.as_bytes()).unwrap();
    client.write_all(pattern(1, SIZE - 10)).unwrap();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 1);
    for pause in [100, 100, 100, 100, 500] {
        // How slow the client is is what is tested.
        std::thread::sleep(Duration::from_millis(pause));
        client.write_all(b"xx").unwrap();
    }
    assert_eq!(read_answer(&client), "ok");
    let proxy = pooled(io, "http1", "request", &backend)
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
        pooled(io, "http1", "request", &backend).set("AEGIS_REQUEST_TIMEOUT", "300ms").start();
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
        pooled(io, "http1", "request", &backend).set("AEGIS_HALF_CLOSE_TIMEOUT", "300ms").start();
    let client = connect(proxy.address());
    let mut sender = client.try_clone().unwrap();
    sender.write_all(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    eventually("its connection is closed", PATIENCE, || {
        sender.write_all(b"5\r\nbytes\r\n").is_err().then_some(())
    });
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
}
