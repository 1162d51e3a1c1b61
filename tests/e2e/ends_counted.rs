//! With `AEGIS_LOG_ENDS=all` the log tells what the metrics count, end by end.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::support::backend::{Backend, reset_on_close};
use crate::support::client::{ask, connect, read_line, read_to_end, reset};
use crate::support::metrics::{REQUESTS, SESSIONS_ACTIVE, SESSIONS_CLOSED};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    each_end_that_is_counted_is_logged_once_and_as_what_it_is_counted,
    a_request_tells_its_bytes_and_the_times_of_its_phases,
    a_request_that_no_backend_may_see_names_none,
    bytes_that_cannot_be_told_apart_are_logged_as_a_request_and_a_session,
    a_client_of_requests_says_who_ended_first,
];

/// Answers a line with another, a request of HTTP with what its path says.
fn server() -> Backend {
    Backend::scripted(|mut stream| {
        while let Ok(line) = read_line(stream) {
            let is_http = line.contains("HTTP/1.1");
            while is_http && read_line(stream).is_ok_and(|field| field != "\r") {}
            let reply: &[u8] = match (line.contains("upgrade"), is_http) {
                _ if line.contains("silent") => continue,
                _ if line.contains("cut") => {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nh");
                    return reset_on_close(stream);
                }
                _ if line.contains("until-end") => {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nall");
                    return;
                }
                (true, true) => b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
                (false, true) => b"HTTP/1.1 204 No Content\r\n\r\n",
                (_, false) => b"well\n",
            };
            if stream.write_all(reply).is_err() {
                return;
            }
        }
    })
}

fn start(io: Io, backend: &Backend) -> Proxy {
    let backend = backend.address().to_string();
    let mut builder = Builder::on(io).set("AEGIS_ROUTES", "raw,dead,cache,web");
    for (route, protocol) in [("CACHE", "chronos"), ("WEB", "http1")] {
        builder = builder
            .set(&format!("AEGIS_{route}__PROTOCOL"), protocol)
            .set(&format!("AEGIS_{route}__POOL_MODE"), "request")
            .set(&format!("AEGIS_{route}__POOL_SIZE"), "3")
            .set(&format!("AEGIS_{route}__QUEUE_MAX"), "2")
            .set(&format!("AEGIS_{route}__REQUEST_TIMEOUT"), "100ms");
    }
    for route in ["RAW", "CACHE", "WEB"] {
        builder = builder.set(&format!("AEGIS_{route}__BACKENDS"), backend.clone());
    }
    builder
        .set("AEGIS_DEAD__BACKENDS", "127.0.0.2:9")
        .set("AEGIS_ENDPOINT_WAIT", "50ms")
        .set("AEGIS_EJECT_FAILURES", "1000")
        .set("AEGIS_HALF_CLOSE_TIMEOUT", "1s")
        .set("AEGIS_LOG_ENDS", "all")
        .set("AEGIS_WORKERS", "2")
        .start()
}

/// A client that says a few things and ends in one of a few ways.
fn talk(mut client: TcpStream, words: &[&str], rng: &mut fastrand::Rng) {
    // What is not whole has no answer.
    client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    for _ in 0..rng.usize(..3) {
        let said = rng.choice(words).unwrap();
        if client.write_all(said.as_bytes()).is_err() || rng.u8(..4) == 0 {
            break;
        }
        let _ = read_line(&client);
    }
    match rng.u8(..3) {
        0 => drop(client),
        1 => reset(client),
        _ => {
            let _ = client.shutdown(Shutdown::Write);
            let _ = read_to_end(&client);
        }
    }
}

/// How often each route's sessions and requests ended in which way.
type Tally = BTreeMap<(String, String, String), u64>;

fn logged(proxy: &Proxy) -> Tally {
    let mut tally = Tally::new();
    for end in proxy.log_events("ended") {
        let field = |name: &str| end[name].as_str().unwrap_or_default().to_owned();
        let of = if end["event.name"] == "aegis.request.end" {
            field("aegis.command")
        } else {
            "session".to_owned()
        };
        *tally.entry((field("aegis.route"), of, field("aegis.end"))).or_default() += 1;
    }
    tally
}

fn counted(proxy: &Proxy) -> Tally {
    let mut tally = Tally::new();
    for sample in proxy.metrics().samples() {
        let label = |name: &str| sample.labels.get(name).cloned().unwrap_or_default();
        let key = match sample.name.as_str() {
            SESSIONS_CLOSED => (label("route"), "session".to_owned(), label("reason")),
            REQUESTS => (label("route"), label("command"), label("outcome")),
            _ => continue,
        };
        *tally.entry(key).or_default() += sample.value as u64;
    }
    tally.retain(|_, ends| *ends > 0);
    tally
}

fn each_end_that_is_counted_is_logged_once_and_as_what_it_is_counted(io: Io) {
    let backend = server();
    let proxy = start(io, &backend);
    let get = |path: &str| format!("GET /{path} HTTP/1.1\r\nHost: a\r\n\r\n");
    let upgrade = "GET /upgrade HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
    let both = "GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n";
    let [well, cut, silent, until_end] = ["", "cut", "silent", "until-end"].map(get);
    let plain = ["GET a\n", "PING\n", "GET cut\n"];
    let lines = ["GET a\n", "SET b 1\n", "GET cut\n", "SET silent 1\n", "\n", "GET a"];
    let web = [&well, &well, &cut, &silent, &until_end, upgrade, both, "GET / HTT"];
    // All together are fewer than what finds room for the log at once: none is dropped.
    let routes: [(&str, &[&str]); _] =
        [("raw", &plain), ("dead", &plain), ("cache", &lines), ("web", &web)];
    thread::scope(|scope| {
        for (seed, (route, words)) in routes.into_iter().cycle().take(16).enumerate() {
            let address = proxy.address_of(route);
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(seed as u64);
                (0..5).for_each(|_| talk(connect(address), words, &mut rng));
            });
        }
    });
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
    let mut last = Default::default();
    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        eventually("each is logged", PATIENCE, || {
            last = (logged(&proxy), counted(&proxy));
            (last.0 == last.1).then_some(())
        });
    }));
    assert!(told.is_ok(), "logged: {:#?}\ncounted: {:#?}", last.0, last.1);
    assert_eq!(proxy.metric("aegis_ends_dropped_total", &[]), 0);
    let kinds = last.1.keys().map(|(_, _, how)| how.as_str()).collect::<Vec<_>>();
    for how in ["finished", "client_reset", "connect_failed", "timeout", "refused", "opaque"] {
        assert!(kinds.contains(&how), "no {how} among {kinds:?}");
    }
}

/// A proxy whose clients share connections by requests, and which logs every end.
fn shared(io: Io, backend: &Backend, protocol: &str) -> Proxy {
    Builder::on(io)
        .backends(&[backend.address()])
        .protocol(protocol, "request")
        .set("AEGIS_LOG_ENDS", "all")
        .start()
}

/// The one end of this kind.
fn end(proxy: &Proxy, kind: &str) -> Value {
    let name = format!("aegis.{kind}.end");
    let is_one = |end: &Value| end["event.name"] == *name;
    eventually(&format!("the end of a {kind} is logged"), PATIENCE, || {
        proxy.log_events("ended").into_iter().find(is_one)
    })
}

fn bytes(end: &Value) -> [Option<u64>; 2] {
    ["to_backend", "to_client"].map(|way| end[format!("aegis.bytes.{way}")].as_u64())
}

fn a_request_tells_its_bytes_and_the_times_of_its_phases(io: Io) {
    let backend = server();
    let proxy = shared(io, &backend, "chronos");
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "GET a"), "well");
    let request = end(&proxy, "request");
    assert_eq!(bytes(&request), [Some(6), Some(5)], "{request}");
    let phase = |name: &str| {
        let seconds = request[format!("aegis.seconds.{name}")].as_f64();
        seconds.unwrap_or_else(|| panic!("{name} of {request}"))
    };
    let phases: f64 = ["to_backend", "first_byte", "transfer"].map(phase).iter().sum();
    let duration = request["duration"].as_f64().unwrap();
    assert!((phases - duration).abs() < 1e-6, "{request}");
    assert_eq!(ask(&client, "SET b 22"), "well");
    drop(client);
    let session = end(&proxy, "session");
    assert_eq!(bytes(&session), [Some(6 + 9), Some(2 * 5)], "{session}");
    assert_eq!(session["aegis.ended_first"], "client", "{session}");
}

fn a_request_that_no_backend_may_see_names_none(io: Io) {
    let backend = server();
    let proxy = shared(io, &backend, "chronos");
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "GET a"), "well");
    assert!(ask(&client, "").starts_with("ERR "));
    let refused = eventually("it is logged", PATIENCE, || {
        proxy.log_events("ended").into_iter().find(|end| end["aegis.end"] == "refused")
    });
    assert_eq!(refused["aegis.endpoint"], Value::Null, "{refused}");
    assert_eq!(refused["aegis.attempts"], 0, "{refused}");
}

fn bytes_that_cannot_be_told_apart_are_logged_as_a_request_and_a_session(io: Io) {
    let backend = server();
    let get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let upgrade = "GET /upgrade HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
    let ambiguous = "GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (request, ways) in [(upgrade, ["answered"; 2]), (ambiguous, ["answered", "opaque"])] {
        let proxy = shared(io, &backend, "http1");
        let mut client = connect(proxy.address());
        for request in [get, request] {
            client.write_all(request.as_bytes()).unwrap();
            while read_line(&client).unwrap() != "\r" {}
        }
        assert_eq!(ask(&client, "hello"), "well");
        drop(client);
        let session = end(&proxy, "session");
        let of = |way| proxy.metric("aegis_bytes_total", &[("direction", way)]);
        let counted = ["to_backend", "to_client"].map(of);
        assert_eq!(counted[0] as usize, get.len() + request.len() + "hello\n".len());
        assert_eq!(bytes(&session), counted.map(Some), "{session}");
        let ends = proxy.log_events("ended");
        let requests: Vec<_> = ends.iter().filter(|end| **end != session).collect();
        assert_eq!(requests.iter().map(|end| &end["aegis.end"]).collect::<Vec<_>>(), ways);
        for request in &requests {
            assert_eq!(request["aegis.endpoint"], backend.address().to_string(), "{request}");
        }
        let lasted = requests.iter().filter_map(|end| end["duration"].as_f64()).sum::<f64>();
        assert!(session["duration"].as_f64() > Some(lasted), "since its client came: {ends:?}");
    }
}

fn a_client_of_requests_says_who_ended_first(io: Io) {
    let backend = server();
    let ends: [(_, fn(TcpStream), _); 3] = [
        ("until-end", drop, "finished"),
        ("until-end", reset, "client_reset"),
        ("cut", drop, "backend_reset"),
    ];
    for (path, leave, reason) in ends {
        let proxy = shared(io, &backend, "http1");
        let mut client = connect(proxy.address());
        write!(client, "GET /{path} HTTP/1.1\r\n\r\n").unwrap();
        let _ = read_to_end(&client);
        leave(client);
        let session = end(&proxy, "session");
        assert_eq!(session["aegis.end"], reason, "{session}");
        assert_eq!(session["aegis.ended_first"], "backend", "{session}");
    }
    let proxy = shared(io, &backend, "http1");
    reset(connect(proxy.address()));
    let session = end(&proxy, "session");
    assert_eq!(session["aegis.ended_first"], "client", "{session}");
}
