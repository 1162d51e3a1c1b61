//! Connections shared by requests of HTTP/1: framed as RFC 9112 says, and where that is uncertain,
//! never used again.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

use crate::support::backend::Backend;
use crate::support::client::{connect, read_expected, read_line, read_to_end};
use crate::support::metrics::{
    BYTES, POOL_CONNECTIONS, POOL_DISCARDS, REQUESTS, RETRIES, SESSIONS_ACTIVE,
};
use crate::support::proxy::Builder;
use crate::support::{Io, on_both_drivers, pattern};

on_both_drivers![
    messages_of_every_framing_share_a_connection,
    bodies_of_any_size_pass_through,
    a_body_may_wait_to_be_asked_for,
    an_upgrade_makes_a_session_of_it,
    a_reply_that_lasts_until_the_end_ends_with_it,
    a_message_that_can_be_read_in_two_ways_has_a_connection_of_its_own,
    a_request_that_is_safe_is_repeated_and_no_other,
    a_reply_that_does_not_come_is_an_error,
    a_reply_before_the_request_is_whole_spends_the_connection,
    a_client_that_wants_to_close_is_closed,
    a_client_that_has_ended_is_closed_once_it_has_its_reply,
    a_client_that_ends_within_its_request_holds_nothing,
    heads_that_never_end_do_not_take_all_buffers,
];

fn pooled(io: Io, backend: &Backend) -> Builder {
    Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_WORKERS", "1")
        .protocol("http1", "request")
        .set("AEGIS_POOL_SIZE", "1")
        .pool(0, 8)
}

/// A head, without its last line end.
fn read_head(stream: &TcpStream) -> Option<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let line = read_line(stream).ok()?;
        let line = line.strip_suffix('\r')?;
        if line.is_empty() {
            return Some(lines);
        }
        lines.push(line.to_owned());
    }
}

fn field<'a>(head: &'a [String], name: &str) -> Option<&'a str> {
    head.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

fn read_body(mut stream: &TcpStream, head: &[String]) -> Vec<u8> {
    let mut body = Vec::new();
    if field(head, "Transfer-Encoding").is_some() {
        loop {
            let size = read_line(stream).unwrap();
            let size = usize::from_str_radix(size.trim_end(), 16).unwrap();
            let mut chunk = vec![0; size + 2];
            stream.read_exact(&mut chunk).unwrap();
            assert_eq!(chunk[size..], *b"\r\n");
            body.extend_from_slice(&chunk[..size]);
            if size == 0 {
                return body;
            }
        }
    }
    body.resize(field(head, "Content-Length").map_or(0, |length| length.parse().unwrap()), 0);
    stream.read_exact(&mut body).unwrap();
    body
}

/// A server whose answer depends on the path.
fn server() -> Backend {
    let connections = AtomicU64::new(0);
    Backend::scripted(move |mut stream| {
        let number = connections.fetch_add(1, Relaxed).to_string();
        while let Some(head) = read_head(stream) {
            let mut words = head[0].split(' ');
            let (method, path) = (words.next().unwrap(), words.next().unwrap());
            if field(&head, "Expect").is_some() {
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
            }
            let answer: Vec<u8> = match path {
                "/chunked" => {
                    let body = read_body(stream, &head);
                    let mut answer =
                        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
                    for chunk in body.chunks(7) {
                        answer.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                        answer.extend_from_slice(chunk);
                        answer.extend_from_slice(b"\r\n");
                    }
                    answer.extend_from_slice(b"0\r\n\r\n");
                    answer
                }
                "/nothing" => b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
                "/upgrade" => {
                    stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\nfirst").unwrap();
                    let mut buffer = [0; 4096];
                    while let Ok(count @ 1..) = stream.read(&mut buffer)
                        && stream.write_all(&buffer[..count]).is_ok()
                    {}
                    return;
                }
                "/until-close" => {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nall of it");
                    return;
                }
                "/too-much" => {
                    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n".to_vec()
                }
                "/early" => b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n".to_vec(),
                "/silent" => {
                    while let Ok(1..) = stream.read(&mut [0; 4096]) {}
                    return;
                }
                _ => {
                    let body = read_body(stream, &head);
                    let body = if path == "/who" { number.clone().into_bytes() } else { body };
                    let length = body.len();
                    let mut answer =
                        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").into_bytes();
                    if method != "HEAD" {
                        answer.extend_from_slice(&body);
                    }
                    answer
                }
            };
            if stream.write_all(&answer).is_err() {
                return;
            }
        }
    })
}

fn exchange(mut stream: &TcpStream, request: &str) -> (String, String) {
    stream.write_all(request.as_bytes()).unwrap();
    let head = read_head(stream).expect("an answer");
    let without = request.starts_with("HEAD") || head[0].contains(" 204 ");
    let body = if without { Vec::new() } else { read_body(stream, &head) };
    (head[0].clone(), String::from_utf8(body).unwrap())
}

fn who(stream: &TcpStream) -> u64 {
    let (status, body) = exchange(stream, "GET /who HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(status, "HTTP/1.1 200 OK");
    body.parse().unwrap()
}

fn messages_of_every_framing_share_a_connection(io: Io) {
    let backend = server();
    let proxy = pooled(io, &backend).start();
    let clients: Vec<_> = (0..5).map(|_| connect(proxy.address())).collect();
    let ok = |body: &str| ("HTTP/1.1 200 OK".to_owned(), body.to_owned());
    for client in &clients {
        assert_eq!(who(client), 0);
        let sized = "POST /echo HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello";
        assert_eq!(exchange(client, sized), ok("hello"));
        let chunked = "POST /chunked HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\
                       5;x=y\r\nhello\r\n6\r\n world\r\n0\r\n\r\n";
        let chunked = chunked.replace(";x=y", "");
        assert_eq!(exchange(client, &chunked), ok("hello world"));
        assert_eq!(exchange(client, "HEAD /who HTTP/1.1\r\n\r\n"), ok(""));
        let (status, _) = exchange(client, "DELETE /nothing HTTP/1.1\r\n\r\n");
        assert_eq!(status, "HTTP/1.1 204 No Content");
    }
    // Sent ahead, and cut at every byte.
    let mut client = &clients[0];
    for byte in
        "GET /who HTTP/1.1\r\n\r\nPOST /echo HTTP/1.1\r\nContent-Length: 2\r\n\r\nab".bytes()
    {
        client.write_all(&[byte]).unwrap();
    }
    for expected in ["0", "ab"] {
        let head = read_head(client).unwrap();
        assert_eq!(read_body(client, &head), expected.as_bytes());
    }
    assert_eq!(backend.accepted(), 1);
    let posts = proxy.metric(REQUESTS, &[("command", "post"), ("outcome", "answered")]);
    assert_eq!(posts, 11);
}

fn bodies_of_any_size_pass_through(io: Io) {
    let backend = server();
    let proxy = pooled(io, &backend).start();
    for (i, size) in [1, 16_000, 16_384, 16_385, 100_000, 8 << 20].into_iter().enumerate() {
        let client = connect(proxy.address());
        let body = pattern(i, size);
        let mut sender = client.try_clone().unwrap();
        let sending = thread::spawn(move || {
            let head = format!("PUT /echo HTTP/1.1\r\nContent-Length: {size}\r\n\r\n");
            sender.write_all(head.as_bytes()).unwrap();
            sender.write_all(body).unwrap();
            sender.write_all(b"GET /who HTTP/1.1\r\n\r\n").unwrap();
        });
        let head = read_head(&client).unwrap();
        assert_eq!(field(&head, "Content-Length"), Some(size.to_string().as_str()));
        read_expected(&client, body, 10_000).unwrap_or_else(|error| panic!("{size}: {error}"));
        let head = read_head(&client).unwrap();
        assert_eq!(read_body(&client, &head), b"0");
        sending.join().unwrap();
    }
    assert_eq!(backend.accepted(), 1);
}

fn a_body_may_wait_to_be_asked_for(io: Io) {
    let backend = server();
    let proxy = pooled(io, &backend).start();
    let mut client = connect(proxy.address());
    for _ in 0..3 {
        let head = b"POST /echo HTTP/1.1\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n";
        client.write_all(head).unwrap();
        assert_eq!(read_head(&client).unwrap(), ["HTTP/1.1 100 Continue"]);
        client.write_all(b"body").unwrap();
        let head = read_head(&client).unwrap();
        assert_eq!(read_body(&client, &head), b"body");
    }
    assert_eq!(backend.accepted(), 1);
}

fn an_upgrade_makes_a_session_of_it(io: Io) {
    let backend = server();
    let proxy = pooled(io, &backend).set("AEGIS_POOL_SIZE", "2").start();
    let mut client = connect(proxy.address());
    assert_eq!(who(&client), 0);
    let request = b"GET /upgrade HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
    client.write_all(request).unwrap();
    assert_eq!(read_head(&client).unwrap(), ["HTTP/1.1 101 Switching Protocols"]);
    read_expected(&client, b"first", 5).unwrap();
    let bytes = pattern(3, 1 << 20);
    let mut sender = client.try_clone().unwrap();
    let sending = thread::spawn(move || sender.write_all(bytes).unwrap());
    read_expected(&client, bytes, 5000).unwrap();
    sending.join().unwrap();
    // It keeps its place among those that are shared, and nobody else has its connection.
    let other = connect(proxy.address());
    assert_eq!(who(&other), 1);
    drop(client);
    assert_eq!(who(&other), 1);
    proxy.wait_for(POOL_CONNECTIONS, &[], |open| open == 1);
    proxy.wait_for(REQUESTS, &[("outcome", "answered")], |answered| answered == 4);
}

fn a_reply_that_lasts_until_the_end_ends_with_it(io: Io) {
    let backend = server();
    let proxy = pooled(io, &backend).start();
    for _ in 0..3 {
        let mut client = connect(proxy.address());
        client.write_all(b"GET /until-close HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(read_to_end(&client).unwrap(), b"HTTP/1.1 200 OK\r\n\r\nall of it");
    }
    assert_eq!(proxy.metric(POOL_DISCARDS, &[("reason", "spent")]), 3);
    assert_eq!(proxy.metric(REQUESTS, &[("outcome", "answered")]), 3);
}

fn a_message_that_can_be_read_in_two_ways_has_a_connection_of_its_own(io: Io) {
    let (seen, shared) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (hidden, after) = (Arc::clone(&seen), Arc::clone(&shared));
    let backend = Backend::scripted(move |mut stream| {
        // By its length alone the hidden request is a body, else it is one more request.
        let (mut buffer, mut is_of_attacker) = ([0; 4096], false);
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
            hidden.fetch_add(text.matches("hidden").count() as u64, Relaxed);
            is_of_attacker |= text.contains("POST");
            after.fetch_add(u64::from(is_of_attacker && text.contains("GET / ")), Relaxed);
            for _ in 0..text.matches(" HTTP/1.1").count() {
                let body = if is_of_attacker { "poison" } else { "plain!" };
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n{body}");
                if stream.write_all(answer.as_bytes()).is_err() {
                    return;
                }
            }
        }
    });
    let proxy = pooled(io, &backend).set("AEGIS_POOL_SIZE", "2").start();
    let bystander = connect(proxy.address());
    let plain = "GET / HTTP/1.1\r\n\r\n";
    let mut sent = 0;
    for (i, framing) in [
        "Content-Length: 30\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Content-Length: 0\r\nContent-Length: 27\r\n\r\n",
        "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "Content-Length : 27\r\n\r\n",
        "Content-Length: +27\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n0\n\r\n",
        "X: a\r\n Content-Length: 27\r\n\r\n",
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(exchange(&bystander, plain).1, "plain!");
        proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle > 0);
        let mut attacker = connect(proxy.address());
        let smuggled = format!("POST / HTTP/1.1\r\n{framing}GET /hidden HTTP/1.1\r\n\r\n");
        attacker.write_all(smuggled.as_bytes()).unwrap();
        sent += (smuggled.len() + 3 * plain.len()) as u64;
        // Both answers are the attacker's own.
        for _ in 0..2 {
            let head = read_head(&attacker).unwrap();
            assert_eq!(read_body(&attacker, &head), b"poison");
        }
        assert_eq!(seen.load(Relaxed), i as u64 + 1, "{framing:?}");
        assert_eq!(exchange(&bystander, plain).1, "plain!", "{framing:?}");
        drop(attacker);
        assert_eq!(exchange(&bystander, plain).1, "plain!", "{framing:?}");
    }
    assert_eq!(shared.load(Relaxed), 0, "no connection of an attacker serves anybody else");
    proxy.wait_for(BYTES, &[("direction", "to_backend")], |bytes| bytes == sent);
}

fn a_request_that_is_safe_is_repeated_and_no_other(io: Io) {
    // Every second request finds its connection dying.
    let seen = AtomicU64::new(0);
    let backend = Backend::scripted(move |mut stream| {
        while let Some(head) = read_head(stream) {
            let _ = read_body(stream, &head);
            if seen.fetch_add(1, Relaxed).is_multiple_of(2) {
                return;
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let proxy = pooled(io, &backend).start();
    for (i, safe) in ["GET", "HEAD", "PUT", "DELETE"].into_iter().enumerate() {
        let request = format!("{safe} / HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
        assert_eq!(exchange(&connect(proxy.address()), &request).0, "HTTP/1.1 200 OK");
        assert_eq!(proxy.metric(RETRIES, &[]), i as u64 + 1);
    }
    let post = "POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nab";
    let client = connect(proxy.address());
    assert_eq!(exchange(&client, post).0, "HTTP/1.1 502 Bad Gateway");
    assert_eq!(read_to_end(&client).unwrap(), b"", "and it is closed");
    assert_eq!(proxy.metric(RETRIES, &[]), 4);
}

fn a_reply_that_does_not_come_is_an_error(io: Io) {
    let backend = server();
    let proxy = pooled(io, &backend)
        .set("AEGIS_REQUEST_TIMEOUT", "3s")
        .set("AEGIS_QUEUE_TIMEOUT", "1s")
        .start();
    let (a, b) = (connect(proxy.address()), connect(proxy.address()));
    (&a).write_all(b"GET /silent HTTP/1.1\r\n\r\n").unwrap();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 1);
    let waiting = exchange(&b, "GET /who HTTP/1.1\r\n\r\n").0;
    assert_eq!(waiting, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(read_head(&a).unwrap()[0], "HTTP/1.1 504 Gateway Timeout");
    let extra = exchange(&connect(proxy.address()), "GET /too-much HTTP/1.1\r\n\r\n");
    assert_eq!(extra.1, "ok");
    let retired = proxy.metric(POOL_DISCARDS, &[("reason", "unexpected")]);
    assert_eq!(retired, 1);
    assert_eq!(who(&connect(proxy.address())), 2);
}

fn a_reply_before_the_request_is_whole_spends_the_connection(io: Io) {
    let backend = server();
    let proxy = pooled(io, &backend).start();
    let mut client = connect(proxy.address());
    client.write_all(b"PUT /early HTTP/1.1\r\nContent-Length: 100000\r\n\r\n").unwrap();
    client.write_all(&vec![b'x'; 20_000]).unwrap();
    assert_eq!(read_head(&client).unwrap()[0], "HTTP/1.1 413 Content Too Large");
    assert_eq!(read_to_end(&client).unwrap(), b"");
    assert_eq!(who(&connect(proxy.address())), 1);
}

fn a_client_that_wants_to_close_is_closed(io: Io) {
    let backend = server();
    let proxy = pooled(io, &backend).start();
    for request in [
        "POST /echo HTTP/1.1\r\nConnection: close\r\nContent-Length: 2\r\n\r\nab",
        "POST /echo HTTP/1.0\r\nContent-Length: 2\r\n\r\nab",
    ] {
        let mut client = connect(proxy.address());
        client.write_all(request.as_bytes()).unwrap();
        let answer = read_to_end(&client).unwrap();
        assert!(answer.ends_with(b"\r\n\r\nab"), "{}", String::from_utf8_lossy(&answer));
    }
}

fn a_client_that_has_ended_is_closed_once_it_has_its_reply(io: Io) {
    let backend = server();
    let proxy = pooled(io, &backend).start();
    let mut client = connect(proxy.address());
    client.write_all(b"GET /who HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert!(read_to_end(&client).unwrap().ends_with(b"\r\n\r\n0"));
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
}

fn a_client_that_ends_within_its_request_holds_nothing(io: Io) {
    let backend = server();
    let proxy = pooled(io, &backend).start();
    let mut client = connect(proxy.address());
    client.write_all(b"POST /silent HTTP/1.1\r\nContent-Length: 100000\r\n\r\n").unwrap();
    client.write_all(&vec![b'x'; 20_000]).unwrap();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 1);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(who(&connect(proxy.address())), 1);
    assert_eq!(proxy.metric(REQUESTS, &[("outcome", "client_gone")]), 1);
}

fn heads_that_never_end_do_not_take_all_buffers(io: Io) {
    let backend = server();
    let proxy = pooled(io, &backend).set("AEGIS_MAX_SESSIONS", "200").start();
    let beginning = format!("GET /who HTTP/1.1\r\nX: {}", "x".repeat(63_000));
    let attackers: Vec<_> = (0..190).map(|_| connect(proxy.address())).collect();
    for mut attacker in &attackers {
        // Some are turned away.
        let _ = attacker.write_all(beginning.as_bytes());
    }
    for _ in 0..5 {
        assert_eq!(who(&connect(proxy.address())), 0);
    }
}
