//! Who may hold a backend connection where they are shared, for how long, and the errors that those get
//! who find none.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, BlackHole};
use crate::support::client::{ask, connect, read_line, read_to_end, try_ask, wait_closed};
use crate::support::kube_api::{KubeApi, Slice, host_ip};
use crate::support::metrics::{
    APPLIED_GENERATION, POOL_CONNECTIONS, QUEUE_DEPTH, REQUESTS, SESSIONS_CLOSED,
};
use crate::support::proxy::{Builder, LEAVING, Proxy};
use crate::support::{Io, PATIENCE, SetOnDrop, eventually, on_both_drivers};

on_both_drivers![
    malformed_requests_have_no_more_connections_than_others,
    an_upgraded_connection_keeps_its_place_until_it_ends,
    the_pool_size_bounds_nothing_in_session_mode,
    a_small_body_that_does_not_come_holds_no_connection,
    a_body_that_trickles_loses_its_connection_to_those_that_wait,
    a_client_that_is_asked_for_its_body_and_sends_none_is_given_up,
    a_slow_body_is_taken_while_nobody_waits,
    an_idle_client_is_closed_whichever_other_limit_is_off,
    a_client_that_is_to_leave_does_not_stay_by_sending,
    a_request_without_endpoints_waits_for_one_and_its_error_says_so,
    an_error_says_that_every_endpoint_refuses,
    a_drain_sends_idle_clients_away_at_once,
    a_drain_serves_who_came_while_it_was_announced,
    half_a_request_does_not_keep_a_draining_worker_busy,
    a_request_on_its_way_as_the_drain_begins_is_answered_or_seen_to_fail,
    a_source_goes_on_to_another_endpoint_when_its_own_is_gone,
    a_source_goes_on_when_its_endpoint_does_not_answer_connects,
];

fn framed(io: Io, protocol: &str, mode: &str, backends: &[&Backend]) -> Builder {
    let addresses: Vec<_> = backends.iter().map(|backend| backend.address()).collect();
    Builder::on(io)
        .backends(&addresses)
        .set("AEGIS_WORKERS", "1")
        .protocol(protocol, mode)
        .pool(0, 16)
}

fn http(io: Io, backend: &Backend) -> Builder {
    framed(io, "http1", "request", &[backend])
}

/// Answers requests once it has their bodies, unless they are not HTTP: then it keeps silent.
fn server() -> Backend {
    Backend::scripted(|mut stream| {
        let mut head = String::new();
        while let Ok(line) = read_line(stream) {
            if line != "\r" {
                head.push_str(&line);
                continue;
            }
            if head.contains("Expect") {
                let _ = stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
            }
            if head.contains("chunked") {
                while read_line(stream).is_ok_and(|line| line != "0\r") {}
                let _ = read_line(stream);
            }
            if let Some((_, rest)) = head.split_once("Content-Length: ") {
                let length: u64 = rest.split('\r').next().unwrap().parse().unwrap();
                if std::io::copy(&mut stream.take(length), &mut std::io::sink()).is_err() {
                    return;
                }
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
    let opaque = |outcome| proxy.metric(REQUESTS, &[("command", "opaque"), ("outcome", outcome)]);
    let all = || [opaque("opaque"), opaque("queue_full"), opaque("queue_timeout")];
    let ended = || (all().iter().sum::<u64>() == CLIENTS as u64).then(all);
    let [held, full, late] = eventually("all are told", PATIENCE, ended);
    assert!(held == 2 && full >= 8 && late >= 28, "{held} {full} {late}");
    assert_eq!(backend.accepted(), 2);
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "opaque")], |count| count == 2);
    let other = connect(proxy.address());
    assert_eq!(status(&other, GET), UNAVAILABLE);
    let (mut refused, mut held) = (0, 0);
    for client in clients {
        client.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        match read_line(&client) {
            Ok(line) => {
                assert_eq!(line.trim_end(), UNAVAILABLE);
                refused += 1;
            }
            Err(_) => held += 1,
        }
    }
    assert_eq!((refused, held), (CLIENTS - 2, 2));
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

fn the_pool_size_bounds_nothing_in_session_mode(io: Io) {
    let backend = server();
    let proxy = framed(io, "http1", "session", &[&backend]).set("AEGIS_POOL_SIZE", "1").start();
    let clients: Vec<_> = (0..3).map(|_| connect(proxy.address())).collect();
    for client in &clients {
        assert_eq!(status(client, GET), OK);
    }
    let mut malformed = connect(proxy.address());
    malformed.write_all(b"\n").unwrap();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "opaque")], |count| count == 1);
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |count| count == 3);
}

fn a_small_body_that_does_not_come_holds_no_connection(io: Io) {
    let backend = server();
    let proxy = http(io, &backend).set("AEGIS_POOL_SIZE", "2").start();
    let sized = "POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\n";
    let chunked = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    let near = "POST / HTTP/1.1\r\nContent-Length: 16000\r\n\r\n";
    let slow: Vec<_> =
        [(sized, "x"), (chunked, "1\r\nx\r\n0\r\n\r\n"), (near, &*"x".repeat(16_000))]
            .into_iter()
            .cycle()
            .take(6)
            .map(|(head, body)| {
                let mut client = connect(proxy.address());
                // All but the last byte.
                client.write_all(head.as_bytes()).unwrap();
                client.write_all(&body.as_bytes()[..body.len() - 1]).unwrap();
                (client, body.as_bytes()[body.len() - 1])
            })
            .collect();
    let begun = Instant::now();
    for _ in 0..20 {
        assert_eq!(status(&connect(proxy.address()), GET), OK);
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "took {:?}", begun.elapsed());
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 0);
    for (mut client, last) in slow {
        client.write_all(&[last]).unwrap();
        assert_eq!(read_status(&client).unwrap(), OK);
    }
}

/// A client that holds a connection, since it has sent more than is waited for.
fn uploading(proxy: &Proxy, head: &str) -> TcpStream {
    let mut client = connect(proxy.address());
    client.write_all(head.as_bytes()).unwrap();
    client.write_all(&vec![b'x'; 20_000]).unwrap();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 1);
    client
}

fn a_body_that_trickles_loses_its_connection_to_those_that_wait(io: Io) {
    let backend = server();
    let proxy = http(io, &backend).set("AEGIS_POOL_SIZE", "1").start();
    for (i, head) in [
        "POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n",
        "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n",
    ]
    .into_iter()
    .enumerate()
    {
        let slow = uploading(&proxy, head);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let _done = SetOnDrop(&done);
            scope.spawn(|| {
                while !done.load(Relaxed) && (&slow).write_all(b"x").is_ok() {
                    // Far more often than any limit.
                    thread::sleep(Duration::from_millis(100));
                }
            });
            let begun = Instant::now();
            assert_eq!(status(&connect(proxy.address()), GET), OK);
            assert!(begun.elapsed() < Duration::from_secs(4), "took {:?}", begun.elapsed());
            assert_eq!(read_status(&slow).unwrap(), "HTTP/1.1 408 Request Timeout");
        });
        let slow = [("command", "post"), ("outcome", "client_timeout")];
        assert_eq!(proxy.metric(REQUESTS, &slow), i as u64 + 1);
    }
    // One whose chunks become nonsense while it is sent on stays what it was for those who count.
    let mut nonsense =
        uploading(&proxy, "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4e20\r\n");
    nonsense.write_all(b"xxxx").unwrap();
    proxy.wait_for(REQUESTS, &[("command", "post"), ("outcome", "opaque")], |count| count == 1);
    assert_eq!(proxy.metric("aegis_endpoint_ejections_total", &[]), 0);
    assert_eq!(proxy.metric(REQUESTS, &[("outcome", "timeout")]), 0);
}

fn a_client_that_is_asked_for_its_body_and_sends_none_is_given_up(io: Io) {
    let backend = server();
    let proxy = http(io, &backend).set("AEGIS_POOL_SIZE", "1").start();
    let slow = connect(proxy.address());
    let head = "POST / HTTP/1.1\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n";
    assert_eq!(status(&slow, head), "HTTP/1.1 100 Continue");
    assert_eq!(status(&connect(proxy.address()), GET), OK);
    wait_closed(&slow).unwrap();
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "client_timeout")], |closed| closed == 1);
}

fn a_slow_body_is_taken_while_nobody_waits(io: Io) {
    let backend = server();
    let proxy = http(io, &backend).set("AEGIS_POOL_SIZE", "1").start();
    let mut slow = uploading(&proxy, "POST / HTTP/1.1\r\nContent-Length: 20001\r\n\r\n");
    // How long it may take is what is tested.
    thread::sleep(Duration::from_millis(2500));
    slow.write_all(b"x").unwrap();
    assert_eq!(read_status(&slow).unwrap(), OK);
}

fn an_idle_client_is_closed_whichever_other_limit_is_off(io: Io) {
    let backend = Backend::scripted(|mut stream| while let Ok(1..) = stream.read(&mut [0; 512]) {});
    let proxy = framed(io, "chronos", "request", &[&backend])
        .set("AEGIS_IDLE_TIMEOUT", "500ms")
        .set("AEGIS_HALF_CLOSE_TIMEOUT", "off")
        .set("AEGIS_REQUEST_TIMEOUT", "off")
        .start();
    let (mut asked, mut half, silent) =
        (connect(proxy.address()), connect(proxy.address()), connect(proxy.address()));
    asked.write_all(b"GET a\n").unwrap();
    half.write_all(b"GET a\n").unwrap();
    half.shutdown(std::net::Shutdown::Write).unwrap();
    for client in [&asked, &half, &silent] {
        let begun = Instant::now();
        wait_closed(client).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(3), "took {:?}", begun.elapsed());
    }
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "idle_timeout")], |closed| closed == 3);
}

fn a_client_that_is_to_leave_does_not_stay_by_sending(io: Io) {
    let backend = server();
    let proxy = http(io, &backend).set("AEGIS_HALF_CLOSE_TIMEOUT", "500ms").start();
    let mut client = connect(proxy.address());
    let last = "GET / HTTP/1.1\r\nConnection: close\r\n\r\n";
    assert_eq!(status(&client, last), OK);
    eventually("it cannot send any more", Duration::from_secs(4), || client.write_all(b"x").err());
}

fn a_request_without_endpoints_waits_for_one_and_its_error_says_so(io: Io) {
    let api = KubeApi::start();
    api.slice("a", &Slice::of(1));
    let proxy = |wait: &str| {
        let proxy = Builder::on(io)
            .kubernetes(&api)
            .set("AEGIS_WORKERS", "1")
            .protocol("chronos", "request")
            .set("AEGIS_ENDPOINT_WAIT", wait)
            .set("AEGIS_QUEUE_TIMEOUT", "20s")
            .launch();
        proxy.wait_for(APPLIED_GENERATION, &[], |generation| generation > 0);
        proxy
    };
    let impatient = proxy("300ms");
    let client = connect(impatient.address());
    let error = "ERR no endpoint is known, and none came in 300ms";
    assert_eq!(ask(&client, "GET a"), error);
    assert_eq!(impatient.metric(REQUESTS, &[("outcome", "no_endpoint")]), 1);
    let patient = proxy("20s");
    let mut waiting = connect(patient.address());
    waiting.write_all(b"GET a\n").unwrap();
    patient.wait_for(QUEUE_DEPTH, &[], |depth| depth == 1);
    let backend = Backend::named_at("here", host_ip());
    let address = backend.address();
    api.slice("a", &Slice::of(address.port()).with("pod-a", address.ip()));
    assert_eq!(read_line(&waiting).unwrap(), "here");
    eventually("the client is kept", PATIENCE, || (ask(&client, "GET a") == "here").then_some(()));
}

fn an_error_says_that_every_endpoint_refuses(io: Io) {
    let mut backends = [Backend::named("a"), Backend::named("b")];
    for mode in ["request", "session"] {
        for balance in ["least_conn", "source_hash"] {
            let proxy = framed(io, "chronos", mode, &backends.each_ref())
                .set("AEGIS_BALANCE", balance)
                .set("AEGIS_QUEUE_TIMEOUT", "300ms")
                .set("AEGIS_ENDPOINT_WAIT", "300ms")
                .start();
            backends.iter_mut().for_each(Backend::kill);
            let error = "ERR no endpoint could be connected to in 300ms";
            assert_eq!(ask(&connect(proxy.address()), "GET a"), error, "{mode} {balance}");
            assert_eq!(proxy.metric(REQUESTS, &[("outcome", "unreachable")]), 1);
            backends.iter_mut().for_each(Backend::start);
        }
    }
}

/// Answers each line after a while, if it asks for that.
fn thinker() -> Backend {
    Backend::scripted(|mut stream| {
        while let Ok(line) = read_line(stream) {
            if line.starts_with("GET slow") {
                // The client is busy for so long.
                thread::sleep(Duration::from_millis(700));
            }
            if stream.write_all(b"answer\n").is_err() {
                return;
            }
        }
    })
}

fn a_drain_sends_idle_clients_away_at_once(io: Io) {
    for mode in ["request", "session"] {
        let backend = thinker();
        let mut proxy =
            framed(io, "chronos", mode, &[&backend]).set("AEGIS_DRAIN_TIMEOUT", "60s").start();
        let [idle, begun, mut busy] = [(); 3].map(|()| connect(proxy.address()));
        for client in [&idle, &begun, &busy] {
            assert_eq!(ask(client, "GET a"), "answer");
        }
        busy.write_all(b"GET slow\n").unwrap();
        (&begun).write_all(b"GET half of a li").unwrap();
        proxy.wait_for("aegis_bytes_total", &[("direction", "to_backend")], |bytes| {
            bytes == 3 * 6 + 9 + 16
        });
        let told = Instant::now();
        proxy.terminate();
        assert_eq!(read_to_end(&idle).unwrap(), b"");
        assert!(told.elapsed() < Duration::from_millis(600), "{mode}: {:?}", told.elapsed());
        assert_eq!(read_to_end(&busy).unwrap(), b"answer\n");
        (&begun).write_all(b"ne\n").unwrap();
        assert_eq!(read_to_end(&begun).unwrap(), b"answer\n", "one that has begun may finish");
        proxy.wait_clean(Duration::from_secs(5));
    }
}

fn a_drain_serves_who_came_while_it_was_announced(io: Io) {
    let backend = thinker();
    let mut proxy = framed(io, "chronos", "request", &[&backend])
        .set("AEGIS_DRAIN_DELAY", "500ms")
        .set("AEGIS_DRAIN_TIMEOUT", "60s")
        .start();
    proxy.terminate();
    eventually("it says so", PATIENCE, || (proxy.get("/readyz").status == 503).then_some(()));
    let (newcomer, silent) = (connect(proxy.address()), connect(proxy.address()));
    eventually("the drain begins", PATIENCE, || proxy.log_events(LEAVING).first().map(drop));
    assert_eq!(ask(&newcomer, "GET a"), "answer");
    assert_eq!(read_to_end(&newcomer).unwrap(), b"");
    // One that says nothing is not waited for much longer.
    assert_eq!(read_to_end(&silent).unwrap(), b"");
    proxy.wait_clean(Duration::from_secs(5));
}

fn half_a_request_does_not_keep_a_draining_worker_busy(io: Io) {
    let backend = thinker();
    let mut proxy = framed(io, "chronos", "request", &[&backend])
        .set("AEGIS_DRAIN_DELAY", "0s")
        .set("AEGIS_DRAIN_TIMEOUT", "60s")
        .start();
    let mut client = connect(proxy.address());
    client.write_all(b"GET half of a li").unwrap();
    proxy.terminate();
    eventually("the drain begins", PATIENCE, || proxy.log_events(LEAVING).first().map(drop));
    // Longer than those are waited for that have sent nothing.
    thread::sleep(Duration::from_millis(1200));
    let turns = || proxy.metric("aegis_worker_turns_total", &[]);
    let before = turns();
    thread::sleep(Duration::from_millis(500));
    let busy = turns() - before;
    assert!(busy < 30, "{busy} turns in half a second");
    client.write_all(b"ne\n").unwrap();
    assert_eq!(read_to_end(&client).unwrap(), b"answer\n");
    proxy.wait_clean(Duration::from_secs(5));
}

fn a_request_on_its_way_as_the_drain_begins_is_answered_or_seen_to_fail(io: Io) {
    let backend = thinker();
    let mut proxy =
        framed(io, "chronos", "request", &[&backend]).set("AEGIS_DRAIN_TIMEOUT", "60s").start();
    let clients: Vec<_> = (0..8).map(|_| connect(proxy.address())).collect();
    thread::scope(|scope| {
        for client in &clients {
            scope.spawn(move || {
                // Until it is sent away: then a request has no answer, and the stream has ended.
                while let Ok(answer) = try_ask(client, "GET a") {
                    assert_eq!(answer, "answer");
                }
                let _ = wait_closed(client);
            });
        }
        proxy.terminate();
    });
    proxy.wait_clean(Duration::from_secs(5));
}

fn a_source_goes_on_to_another_endpoint_when_its_own_is_gone(io: Io) {
    for mode in ["request", "session"] {
        let mut backends = [Backend::named("a"), Backend::named("b")];
        let proxy = framed(io, "chronos", mode, &backends.each_ref())
            .set("AEGIS_BALANCE", "source_hash")
            .set("AEGIS_EJECT_TIME", "100ms")
            .start();
        let client = connect(proxy.address());
        let own = usize::from(ask(&client, "GET x") == "b");
        let other = ["b", "a"][own];
        backends[own].kill();
        for _ in 0..50 {
            assert_eq!(ask(&connect(proxy.address()), "GET x"), other, "{mode}");
            assert_eq!(ask(&client, "GET x"), other, "{mode}");
        }
        backends[own].start();
        eventually("it goes back", PATIENCE, || {
            (ask(&connect(proxy.address()), "GET x") != other).then_some(())
        });
    }
}

fn a_source_goes_on_when_its_endpoint_does_not_answer_connects(io: Io) {
    let hole = BlackHole::new();
    let backend = Backend::named("up");
    let proxy = Builder::on(io)
        .backends(&[hole.address(), backend.address()])
        .set("AEGIS_WORKERS", "1")
        .protocol("chronos", "request")
        .set("AEGIS_BALANCE", "source_hash")
        .set("AEGIS_CONNECT_TIMEOUT", "100ms")
        .pool(0, 16)
        .start();
    for _ in 0..20 {
        assert_eq!(ask(&connect(proxy.address()), "GET x"), "up");
    }
}
