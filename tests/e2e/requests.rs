//! Used connections, shared request by request or session by session: whose answer is whose,
//! whatever clients and backends do.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::Backend;
use crate::support::client::{ask, connect, read_line, read_to_end, try_ask};
use crate::support::metrics::{POOL_CONNECTIONS, POOL_DISCARDS, QUEUE_DEPTH, REQUESTS, RETRIES};
use crate::support::proxy::{Builder, LEAVING, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    many_clients_share_few_connections,
    requests_are_put_together_and_taken_apart,
    a_request_that_no_backend_may_see_is_answered_and_its_client_kept,
    a_client_that_ends_its_direction_still_gets_its_replies,
    a_session_keeps_its_connection_and_leaves_it_to_the_next,
    a_reply_with_more_behind_it_reaches_nobody_else,
    an_idle_connection_with_bytes_that_nobody_asked_for_is_discarded,
    a_reply_that_breaks_off_cuts_its_client_off_and_nobody_else,
    a_reply_that_comes_too_late_reaches_nobody,
    a_read_on_a_dead_connection_is_repeated_and_a_write_is_not,
    a_client_that_leaves_takes_its_reply_with_it,
    a_client_that_left_in_order_keeps_no_connection_for_ever,
    requests_that_wait_too_long_or_are_too_many_get_an_error,
    a_request_without_a_backend_gets_an_error,
    a_slow_reader_holds_no_more_than_its_own,
    requests_wait_in_a_fair_queue,
    a_drain_answers_requests_under_way_and_those_that_still_come,
];

const ONE_WORKER: &str = "1";

fn pooled(io: Io, mode: &str, backends: &[&Backend]) -> Builder {
    let addresses: Vec<_> = backends.iter().map(|backend| backend.address()).collect();
    Builder::on(io)
        .backends(&addresses)
        .set("AEGIS_WORKERS", ONE_WORKER)
        .protocol("chronos", mode)
        .pool(0, 16)
}

fn request_mode(io: Io, backend: &Backend) -> Builder {
    pooled(io, "request", &[backend])
}

fn wait_idle(proxy: &Proxy, count: u64) {
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle == count);
}

fn retired(proxy: &Proxy, why: &str, count: u64) {
    proxy.wait_for(POOL_DISCARDS, &[("reason", why)], |retired| retired == count);
}

fn many_clients_share_few_connections(io: Io) {
    const CLIENTS: usize = 60;
    let backend = Backend::chronos();
    let proxy = request_mode(io, &backend).set("AEGIS_POOL_SIZE", "3").start();
    let clients: Vec<_> = (0..CLIENTS).map(|_| connect(proxy.address())).collect();
    for round in 0..5 {
        for (i, client) in clients.iter().enumerate() {
            assert_eq!(ask(client, &format!("SET k{i} v{i} {round}")), "OK");
        }
        thread::scope(|scope| {
            for (i, client) in clients.iter().enumerate() {
                scope.spawn(move || {
                    assert_eq!(ask(client, &format!("GET k{i}")), format!("v{i} {round}"));
                });
            }
        });
    }
    assert!(backend.accepted() <= 3, "{} connections", backend.accepted());
    let answered =
        |command| proxy.metric(REQUESTS, &[("command", command), ("outcome", "answered")]) as usize;
    assert_eq!((answered("set"), answered("get")), (5 * CLIENTS, 5 * CLIENTS));
}

fn requests_are_put_together_and_taken_apart(io: Io) {
    let backend = Backend::chronos();
    let proxy = request_mode(io, &backend).start();
    let mut client = connect(proxy.address());
    for byte in b"SET split one byte at a time\r\n" {
        client.write_all(&[*byte]).unwrap();
    }
    assert_eq!(read_line(&client).unwrap(), "OK");
    let joined: Vec<_> = (0..500).map(|i| format!("SET k{i} v{i}\nGET k{i}\n")).collect();
    let joined = joined.concat();
    let mut writer = client.try_clone().unwrap();
    let sent = thread::spawn(move || writer.write_all(joined.as_bytes()).unwrap());
    for i in 0..500 {
        assert_eq!(read_line(&client).unwrap(), "OK");
        assert_eq!(read_line(&client).unwrap(), format!("v{i}"));
    }
    sent.join().unwrap();
    assert_eq!(ask(&client, "GET split"), "one byte at a time");
}

fn a_request_that_no_backend_may_see_is_answered_and_its_client_kept(io: Io) {
    let backend = Backend::chronos();
    let proxy = request_mode(io, &backend).start();
    let client = connect(proxy.address());
    for blank in ["", "  \t ", "\r", "\u{3000}"] {
        assert_eq!(ask(&client, blank), "ERR empty request");
    }
    let fits = format!("SET k {}", "x".repeat(512 - 7));
    assert_eq!(ask(&client, &fits), "OK");
    for excess in [1, 40_000] {
        let long = format!("{fits}{}", "x".repeat(excess));
        assert_eq!(ask(&client, &long), "ERR request longer than 512 bytes");
    }
    assert_eq!(ask(&client, "PING"), "PONG");
    assert_eq!(proxy.metric(REQUESTS, &[("outcome", "refused")]), 6);
}

fn a_client_that_ends_its_direction_still_gets_its_replies(io: Io) {
    let backend = Backend::chronos();
    let proxy = request_mode(io, &backend).start();
    let mut client = connect(proxy.address());
    client.write_all(b"SET a 1\nGET a\nPING\nGET unfinish").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&client).unwrap(), b"OK\n1\nPONG\n");
    wait_idle(&proxy, 1);
}

fn a_session_keeps_its_connection_and_leaves_it_to_the_next(io: Io) {
    let connections = AtomicU64::new(0);
    let backend = Backend::scripted(move |mut stream| {
        let number = connections.fetch_add(1, Relaxed);
        while read_line(stream).is_ok()
            && stream.write_all(format!("{number}\n").as_bytes()).is_ok()
        {}
    });
    let proxy = pooled(io, "session", &[&backend]).start();
    let (a, b) = (connect(proxy.address()), connect(proxy.address()));
    assert_eq!((ask(&a, "GET x"), ask(&b, "GET x")), ("0".to_owned(), "1".to_owned()));
    for _ in 0..20 {
        assert_eq!((ask(&b, "GET x"), ask(&a, "GET x")), ("1".to_owned(), "0".to_owned()));
    }
    drop(a);
    wait_idle(&proxy, 1);
    assert_eq!(ask(&connect(proxy.address()), "GET x"), "0", "the one that came back");
    // One that leaves with an answer outstanding takes its connection with it.
    (&b).write_all(b"GET x\n").unwrap();
    b.shutdown(Shutdown::Both).unwrap();
    drop(b);
    eventually("only clean connections are kept", PATIENCE, || {
        (proxy.metric(POOL_CONNECTIONS, &[("state", "in_use")]) == 0).then_some(())
    });
    for _ in 0..3 {
        let client = connect(proxy.address());
        let first = ask(&client, "GET x");
        assert_eq!(ask(&client, "GET x"), first);
    }
}

/// Answers each line with what follows its second word, `|` standing for a line feed, after as many
/// milliseconds as its first word says. An answer that ends in `!` is the last one.
fn puppet() -> Backend {
    Backend::scripted(|mut stream| {
        while let Ok(line) = read_line(stream) {
            let mut words = line.splitn(3, ' ').skip(1);
            let delay = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            let text = words.next().unwrap_or_default().replace('|', "\n");
            // What the backend does at this time is what is tested.
            thread::sleep(Duration::from_millis(delay));
            if stream.write_all(text.trim_end_matches('!').as_bytes()).is_err()
                || text.ends_with('!')
            {
                return;
            }
        }
    })
}

fn a_reply_with_more_behind_it_reaches_nobody_else(io: Io) {
    let backend = puppet();
    let proxy = request_mode(io, &backend).set("AEGIS_POOL_SIZE", "1").start();
    let (a, b) = (connect(proxy.address()), connect(proxy.address()));
    for (i, surplus) in ["yours|stray|", "yours|str", "yours||"].into_iter().enumerate() {
        // The second waits for the only connection meanwhile.
        (&a).write_all(format!("GET 20 {surplus}\n").as_bytes()).unwrap();
        assert_eq!(ask(&b, "GET 0 mine|"), "mine");
        assert_eq!(read_line(&a).unwrap(), "yours");
        retired(&proxy, "unexpected", i as u64 + 1);
    }
}

fn an_idle_connection_with_bytes_that_nobody_asked_for_is_discarded(io: Io) {
    let backend = Backend::scripted(|mut stream| {
        while let Ok(line) = read_line(stream) {
            let late = line.starts_with("GET late");
            if stream.write_all(b"answer\n").is_err() {
                return;
            }
            if late {
                thread::sleep(Duration::from_millis(30));
                let _ = stream.write_all(b"answer of nobody\n");
            }
        }
    });
    let proxy = request_mode(io, &backend).start();
    let client = connect(proxy.address());
    for round in 1..=3 {
        assert_eq!(ask(&client, "GET late"), "answer");
        retired(&proxy, "unexpected", round);
        assert_eq!(ask(&client, "GET x"), "answer");
    }
    // A warm one that greets is not used.
    let greeter = Backend::scripted(|mut stream| {
        let _ = stream.write_all(b"welcome\n");
        let _ = stream.read(&mut [0]);
    });
    let proxy = request_mode(io, &greeter).pool(1, 1).start();
    proxy.wait_for(POOL_DISCARDS, &[("reason", "unexpected")], |retired| retired > 3);
    wait_idle(&proxy, 0);
}

fn a_reply_that_breaks_off_cuts_its_client_off_and_nobody_else(io: Io) {
    let backend = puppet();
    let proxy = request_mode(io, &backend).set("AEGIS_POOL_SIZE", "1").start();
    let (a, b) = (connect(proxy.address()), connect(proxy.address()));
    (&a).write_all(b"GET 20 half an ans!\n").unwrap();
    (&b).write_all(b"GET 0 mine|\n").unwrap();
    let cut = read_line(&a);
    assert!(cut.is_err(), "{cut:?}");
    assert_eq!(read_line(&b).unwrap(), "mine");
    retired(&proxy, "dead", 1);
}

fn a_reply_that_comes_too_late_reaches_nobody(io: Io) {
    let backend = puppet();
    let proxy = request_mode(io, &backend)
        .set("AEGIS_POOL_SIZE", "1")
        .set("AEGIS_REQUEST_TIMEOUT", "1s")
        .start();
    let (a, b) = (connect(proxy.address()), connect(proxy.address()));
    (&a).write_all(b"GET 3000 late|\n").unwrap();
    assert_eq!(ask(&b, "GET 0 mine|"), "mine");
    let answer = read_line(&a).unwrap();
    assert_eq!(answer, "ERR no answer in 1s; the request may have taken effect");
    assert_eq!(ask(&a, "GET 0 again|"), "again", "the client is kept");
    assert_eq!(proxy.metric(REQUESTS, &[("outcome", "timeout")]), 1);
    retired(&proxy, "timeout", 1);
    // One that has begun to answer has gone too far.
    (&a).write_all(b"GET 0 half\n").unwrap();
    assert!(read_line(&a).is_err());
    assert_eq!(ask(&b, "GET 0 mine|"), "mine");
}

fn a_read_on_a_dead_connection_is_repeated_and_a_write_is_not(io: Io) {
    // Each connection takes one request and dies of it, unless it is the third of its kind.
    let seen = AtomicU64::new(0);
    let backend = Backend::scripted(move |mut stream| {
        while read_line(stream).is_ok() {
            if seen.fetch_add(1, Relaxed) % 3 < 2 {
                return;
            }
            let _ = stream.write_all(b"answer\n");
        }
    });
    let proxy = request_mode(io, &backend).start();
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "GET a"), "answer");
    let retries = proxy.metric(RETRIES, &[]);
    assert_eq!(retries, 2);
    for _ in 0..2 {
        let lost = "ERR connection to the backend lost; the request may have taken effect";
        assert_eq!(ask(&client, "SET a b"), lost);
    }
    assert_eq!(ask(&client, "DEL a"), "answer");
    assert_eq!(proxy.metric(RETRIES, &[]), retries, "no write was repeated");
    assert_eq!(proxy.metric(REQUESTS, &[("command", "set"), ("outcome", "backend_lost")]), 2);
}

fn a_client_that_leaves_takes_its_reply_with_it(io: Io) {
    let backend = puppet();
    let proxy = request_mode(io, &backend).set("AEGIS_POOL_SIZE", "1").start();
    for round in 1..=5 {
        let mut gone = connect(proxy.address());
        gone.write_all(b"GET 5000 of somebody else|\n").unwrap();
        let client = connect(proxy.address());
        proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 1);
        socket2::SockRef::from(&gone).set_linger(Some(Duration::ZERO)).unwrap();
        drop(gone);
        assert_eq!(ask(&client, "GET 0 mine|"), "mine");
        retired(&proxy, "abandoned", round);
    }
}

fn a_client_that_left_in_order_keeps_no_connection_for_ever(io: Io) {
    let backend = puppet();
    let proxy = request_mode(io, &backend)
        .set("AEGIS_POOL_SIZE", "1")
        .set("AEGIS_REQUEST_TIMEOUT", "off")
        .set("AEGIS_HALF_CLOSE_TIMEOUT", "500ms")
        .start();
    let (mut gone, patient) = (connect(proxy.address()), connect(proxy.address()));
    gone.write_all(b"GET 60000 never|\n").unwrap();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 1);
    drop(gone);
    assert_eq!(ask(&patient, "GET 0 mine|"), "mine");
    retired(&proxy, "abandoned", 1);
    // Whoever has not ended its direction may wait.
    assert_eq!(ask(&patient, "GET 1500 late|"), "late");
}

fn requests_that_wait_too_long_or_are_too_many_get_an_error(io: Io) {
    let backend = puppet();
    let proxy = request_mode(io, &backend)
        .set("AEGIS_POOL_SIZE", "1")
        .set("AEGIS_QUEUE_MAX", "1")
        .set("AEGIS_QUEUE_TIMEOUT", "1s")
        .start();
    let [busy, waiting, refused] = [(); 3].map(|()| connect(proxy.address()));
    (&busy).write_all(b"GET 4000 done|\n").unwrap();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 1);
    (&waiting).write_all(b"GET 0 x|\n").unwrap();
    proxy.wait_for(QUEUE_DEPTH, &[], |depth| depth == 1);
    assert_eq!(ask(&refused, "GET 0 x|"), "ERR too many requests wait for a connection");
    assert_eq!(read_line(&waiting).unwrap(), "ERR no backend connection was free in 1s");
    assert_eq!(read_line(&busy).unwrap(), "done");
    assert_eq!(ask(&waiting, "GET 0 x|"), "x");
    assert_eq!(proxy.metric(REQUESTS, &[("outcome", "queue_full")]), 1);
    assert_eq!(proxy.metric(REQUESTS, &[("outcome", "queue_timeout")]), 1);
}

fn a_request_without_a_backend_gets_an_error(io: Io) {
    let mut backend = Backend::chronos();
    // Ejected for longer than the test lasts: where there is no other, it is tried all the same.
    let proxy = request_mode(io, &backend)
        .set("AEGIS_QUEUE_TIMEOUT", "1s")
        .set("AEGIS_ENDPOINT_WAIT", "1s")
        .set("AEGIS_EJECT_FAILURES", "1")
        .set("AEGIS_EJECT_TIME", "1h")
        .start();
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "PING"), "PONG");
    backend.kill();
    for _ in 0..3 {
        let answer = ask(&client, "PING");
        assert_eq!(answer, "ERR no endpoint could be connected to in 1s");
    }
    backend.start();
    eventually("it is served again", PATIENCE, || (ask(&client, "PING") == "PONG").then_some(()));
}

fn a_slow_reader_holds_no_more_than_its_own(io: Io) {
    // Far more than sockets and buffers between hold.
    const LINE: usize = 24 << 20;
    let backend = Backend::scripted(|mut stream| {
        while let Ok(line) = read_line(stream) {
            let answer = if line == "GET big" { "x".repeat(LINE) } else { "small".to_owned() };
            if stream.write_all(answer.as_bytes()).is_err() || stream.write_all(b"\n").is_err() {
                return;
            }
        }
    });
    let proxy = request_mode(io, &backend).set("AEGIS_POOL_SIZE", "2").start();
    let (slow, quick) = (connect(proxy.address()), connect(proxy.address()));
    (&slow).write_all(b"GET big\nGET big\nGET small\n").unwrap();
    for _ in 0..100 {
        assert_eq!(ask(&quick, "GET small"), "small");
    }
    let held = proxy.metric("aegis_buffers_in_use", &[]);
    // Those provided to the kernel, and what one multishot receive may run ahead.
    assert!(held < 128 + 160, "{held} buffers are held");
    let mut answer = vec![0; LINE + 1];
    for _ in 0..2 {
        (&slow).read_exact(&mut answer).unwrap();
        assert!(answer[..LINE].iter().all(|&byte| byte == b'x') && answer[LINE] == b'\n');
    }
    assert_eq!(read_line(&slow).unwrap(), "small");
}

fn requests_wait_in_a_fair_queue(io: Io) {
    // One client sends as fast as it can, ahead of its answers; another asks one by one.
    let backend = puppet();
    let proxy = request_mode(io, &backend).set("AEGIS_POOL_SIZE", "1").start();
    let (greedy, modest) = (connect(proxy.address()), connect(proxy.address()));
    (&greedy).write_all("GET 2 x|\n".repeat(300).as_bytes()).unwrap();
    let began = Instant::now();
    for _ in 0..20 {
        assert_eq!(ask(&modest, "GET 0 mine|"), "mine");
    }
    let took = began.elapsed();
    let answers = |stream: &TcpStream| {
        stream.set_nonblocking(true).unwrap();
        let mut bytes = [0; 4096];
        let count = (&*stream).read(&mut bytes).unwrap_or(0);
        stream.set_nonblocking(false).unwrap();
        count / 2
    };
    let served = answers(&greedy);
    assert!(served < 200, "the greedy one got {served} answers in {took:?}");
    assert!(try_ask(&modest, "GET 0 mine|").is_ok());
}

fn a_drain_answers_requests_under_way_and_those_that_still_come(io: Io) {
    let backend = puppet();
    let mut proxy = request_mode(io, &backend).set("AEGIS_POOL_SIZE", "1").start();
    let address = proxy.address();
    let (busy, waiting) = (connect(address), connect(address));
    (&busy).write_all(b"GET 1500 first|\n").unwrap();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 1);
    (&waiting).write_all(b"GET 0 second|!\nGET 0 on a new connection|\n").unwrap();
    proxy.wait_for(QUEUE_DEPTH, &[], |depth| depth == 1);
    proxy.terminate();
    eventually("the drain begins", PATIENCE, || proxy.log_events(LEAVING).first().map(drop));
    let newcomer = connect(address);
    (&newcomer).write_all(b"GET 0 newcomer|\n").unwrap();
    (&busy).write_all(b"GET 0 asked in the drain|\n").unwrap();
    for answer in ["first", "asked in the drain"] {
        assert_eq!(read_line(&busy).unwrap(), answer);
    }
    for answer in ["second", "on a new connection"] {
        assert_eq!(read_line(&waiting).unwrap(), answer);
    }
    // Who came in the drain is served as well, as long as others hold it up.
    assert_eq!(read_line(&newcomer).unwrap(), "newcomer");
    assert_eq!(read_to_end(&newcomer).unwrap(), b"");
    // Then both are sent away, though they would stay.
    assert_eq!((read_to_end(&busy).unwrap(), read_to_end(&waiting).unwrap()), (vec![], vec![]));
    proxy.wait_clean(PATIENCE);
}
