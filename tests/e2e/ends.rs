//! The log's lines of sessions and requests that have ended: which, with what, and never too many.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect, read_line, reset};
use crate::support::kube_api::{KubeApi, host_ip};
use crate::support::metrics::{POOL_CONNECTIONS, REQUESTS, SESSIONS_CLOSED};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    a_session_that_was_reset_says_who_and_how_much,
    normal_ends_are_told_where_that_is_asked_for,
    a_request_that_is_not_answered_in_time_names_its_endpoint,
    a_session_without_an_endpoint_says_how_often_it_tried,
    a_storm_of_ends_is_cut_and_counted,
    those_whom_the_end_of_the_process_cuts_are_logged_or_counted,
    a_session_that_has_waited_names_the_endpoint_that_failed_it,
    a_request_that_its_client_abandons_says_how_long_that_took,
    a_request_that_a_drain_cuts_is_not_blamed_on_its_client,
    an_end_names_no_endpoint_that_has_taken_the_number_of_its_own,
    bytes_of_the_proxys_own_are_not_counted,
];

fn ends(proxy: &Proxy) -> Vec<Value> {
    proxy.log_events("ended")
}

fn one_end(proxy: &Proxy) -> Value {
    let all = eventually("an end is logged", PATIENCE, || {
        let all = ends(proxy);
        (!all.is_empty()).then_some(all)
    });
    assert_eq!(all.len(), 1, "{all:?}");
    all[0].clone()
}

fn a_session_that_was_reset_says_who_and_how_much(io: Io) {
    let backend = Backend::named("db");
    let proxy = Builder::on(io).backends(&[backend.address()]).start();
    assert_eq!(ask_once(proxy.address(), "a normal one").unwrap(), "db");
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "a secret"), "db");
    reset(client);
    let end = one_end(&proxy);
    for (field, expected) in [
        ("event.name", "aegis.session.end".into()),
        ("error.type", "client_reset".into()),
        ("aegis.ended_first", "client".into()),
        ("aegis.route", "default".into()),
        ("aegis.endpoint", backend.address().to_string().into()),
        ("aegis.attempts", 1.into()),
        ("server.address", "127.0.0.2".into()),
        ("server.port", backend.address().port().into()),
        ("aegis.bytes.to_backend", ("a secret\n".len()).into()),
        ("aegis.bytes.to_client", ("db\n".len()).into()),
    ] as [(&str, Value); _]
    {
        assert_eq!(end[field], expected, "{field} of {end}");
    }
    for field in ["duration", "aegis.seconds.to_backend", "aegis.seconds.first_byte"] {
        let seconds = end[field].as_f64().unwrap_or(-1.0);
        assert!((0.0..20.0).contains(&seconds), "{field} of {end}");
    }
    assert!(!proxy.log_lines().iter().any(|line| line.contains("secret")), "no payload");
}

fn normal_ends_are_told_where_that_is_asked_for(io: Io) {
    let backend = Backend::named("db");
    let start =
        |which| Builder::on(io).backends(&[backend.address()]).set("AEGIS_LOG_ENDS", which).start();
    let proxy = start("all");
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "db");
    let end = one_end(&proxy);
    assert_eq!((&end["aegis.end"], &end["error.type"]), (&"finished".into(), &Value::Null));

    let proxy = start("sampled");
    for _ in 0..1000 {
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "db");
    }
    proxy.wait_for(SESSIONS_CLOSED, &[], |closed| closed == 1000);
    eventually("some are logged", PATIENCE, || (!ends(&proxy).is_empty()).then_some(()));
    assert!(ends(&proxy).len() < 100, "{} of 1000", ends(&proxy).len());

    let proxy = start("off");
    reset(connect(proxy.address()));
    proxy.wait_for(SESSIONS_CLOSED, &[], |closed| closed == 1);
    // The log is written ten times a second.
    thread::sleep(Duration::from_millis(300));
    assert!(ends(&proxy).is_empty(), "{:?}", ends(&proxy));
}

fn a_request_that_is_not_answered_in_time_names_its_endpoint(io: Io) {
    let silent = Backend::scripted(|stream| {
        let _ = read_line(stream);
        let _ = read_line(stream);
    });
    let proxy = Builder::on(io)
        .backends(&[silent.address()])
        .protocol("chronos", "request")
        .set("AEGIS_REQUEST_TIMEOUT", "200ms")
        .start();
    let client = connect(proxy.address());
    assert!(ask(&client, "GET secret").starts_with("ERR "));
    proxy.wait_for(REQUESTS, &[("outcome", "timeout")], |timeouts| timeouts == 1);
    let end = one_end(&proxy);
    assert_eq!(end["event.name"], "aegis.request.end");
    assert_eq!((&end["error.type"], &end["aegis.command"]), (&"timeout".into(), &"get".into()));
    assert_eq!(end["aegis.endpoint"], silent.address().to_string());
    assert!(end["duration"].as_f64().unwrap() >= 0.2, "{end}");
    let from = client.local_addr().unwrap();
    assert_eq!(end["client.address"], from.ip().to_string());
    assert_eq!(end["client.port"], from.port());
    assert!(!proxy.log_lines().iter().any(|line| line.contains("secret")), "no payload");
}

/// Nobody listens there.
fn unreachable(io: Io) -> Builder {
    Builder::on(io)
        .set("AEGIS_BACKENDS", "127.0.0.2:9")
        .set("AEGIS_ENDPOINT_WAIT", "100ms")
        .without_pool()
}

/// How a session ends that is given up while its client is there.
fn end_without_endpoint(proxy: &Proxy) -> Value {
    let mut client = connect(proxy.address());
    let _ = client.write_all(b"who\n");
    let end = one_end(proxy);
    assert_eq!(end["error.type"], "connect_failed", "{end}");
    end
}

fn a_session_without_an_endpoint_says_how_often_it_tried(io: Io) {
    let end = end_without_endpoint(&unreachable(io).start());
    assert_eq!(end["aegis.seconds.to_backend"], Value::Null, "it has had none");
}

fn a_session_that_has_waited_names_the_endpoint_that_failed_it(io: Io) {
    let proxy = unreachable(io)
        .set("AEGIS_EJECT_FAILURES", "1000")
        .set("AEGIS_CONNECT_ATTEMPTS", "1")
        .start();
    let end = end_without_endpoint(&proxy);
    assert_eq!(end["aegis.endpoint"], "127.0.0.2:9", "{end}");
    assert!(end["aegis.attempts"].as_u64() >= Some(1), "{end}");
}

fn a_storm_of_ends_is_cut_and_counted(io: Io) {
    let backend = Backend::echo();
    let proxy = Builder::on(io).backends(&[backend.address()]).set("AEGIS_WORKERS", "1").start();
    let clients: Vec<TcpStream> = (0..1500).map(|_| connect(proxy.address())).collect();
    proxy.wait_for("aegis_sessions_active", &[], |active| active == 1500);
    clients.into_iter().for_each(reset);
    proxy.wait_for(SESSIONS_CLOSED, &[], |closed| closed == 1500);
    let told = || ends(&proxy).len() as u64 + proxy.metric("aegis_ends_dropped_total", &[]);
    eventually("each is logged or counted", PATIENCE, || (told() == 1500).then_some(()));
    assert!(proxy.metric("aegis_ends_dropped_total", &[]) > 500, "{} lines", ends(&proxy).len());
}

fn those_whom_the_end_of_the_process_cuts_are_logged_or_counted(io: Io) {
    let backend = Backend::echo();
    let mut proxy = Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_WORKERS", "1")
        .set("AEGIS_DRAIN_DELAY", "0s")
        .set("AEGIS_DRAIN_TIMEOUT", "0s")
        .start();
    let clients: Vec<TcpStream> = (0..400).map(|_| connect(proxy.address())).collect();
    proxy.wait_for("aegis_sessions_active", &[], |active| active == 400);
    proxy.terminate();
    proxy.wait_clean(PATIENCE);
    let cut = ends(&proxy);
    assert!(cut.iter().all(|end| end["error.type"] == "drain_deadline"), "{cut:?}");
    let dropped =
        proxy.log_events("ends of sessions and requests were not logged: there were too many");
    let dropped: u64 = dropped.iter().filter_map(|event| event["dropped"].as_u64()).sum();
    assert_eq!(cut.len() as u64 + dropped, 400, "{} logged, {dropped} counted", cut.len());
    assert!(cut.len() >= 256, "all that found room");
    drop(clients);
}

/// A proxy of which a client has asked a backend that never answers, and that client.
fn asked(io: Io, drain: &str) -> (Proxy, TcpStream, Backend) {
    let silent = Backend::scripted(|stream| {
        let _ = read_line(stream);
        let _ = read_line(stream);
    });
    let proxy = Builder::on(io)
        .backends(&[silent.address()])
        .protocol("chronos", "request")
        .set("AEGIS_DRAIN_DELAY", "0s")
        .set("AEGIS_DRAIN_TIMEOUT", drain)
        .start();
    let mut client = connect(proxy.address());
    client.write_all(b"GET a\n").unwrap();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 1);
    (proxy, client, silent)
}

/// The one end of a request.
fn request_end(proxy: &Proxy) -> Value {
    let is_request = |end: &Value| end["event.name"] == "aegis.request.end";
    let find = || ends(proxy).into_iter().find(is_request);
    eventually("the end of a request is logged", PATIENCE, find)
}

fn a_request_that_its_client_abandons_says_how_long_that_took(io: Io) {
    let (proxy, client, _silent) = asked(io, "10s");
    thread::sleep(Duration::from_millis(50));
    reset(client);
    let end = request_end(&proxy);
    assert_eq!(end["error.type"], "client_gone", "{end}");
    assert!(end["duration"].as_f64() >= Some(0.05), "{end}");
}

fn a_request_that_a_drain_cuts_is_not_blamed_on_its_client(io: Io) {
    let (mut proxy, _client, _silent) = asked(io, "0s");
    proxy.terminate();
    proxy.wait_clean(PATIENCE);
    let end = request_end(&proxy);
    assert_eq!(end["error.type"], "cut", "{end}");
}

fn an_end_names_no_endpoint_that_has_taken_the_number_of_its_own(io: Io) {
    let api = KubeApi::start();
    let at = SocketAddr::new(host_ip(), 0);
    let servers = [(); 3].map(|()| Backend::named_on("db", at));
    api.announce("db", servers[0].address());
    let proxy = Builder::on(io)
        .kubernetes(&api)
        .protocol("chronos", "request")
        .without_pool()
        .set("AEGIS_WORKERS", "1")
        .set("AEGIS_BACKEND_DRAIN", "0s")
        .start();
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "GET a"), "db");
    // Each takes the place of the one before; numbers are given anew.
    for round in 0..4 {
        let server = servers[1 + round % 2].address();
        api.announce("db", server);
        eventually("the endpoint is another one", PATIENCE, || {
            let backends = proxy.get("/backends").json();
            (backends["endpoints"][0]["address"] == server.to_string()).then_some(())
        });
        // Beyond one upkeep, which forgets those that left.
        thread::sleep(Duration::from_millis(150));
    }
    reset(client);
    let end = one_end(&proxy);
    assert_eq!(end["error.type"], "client_reset", "{end}");
    let named = &end["server.port"];
    assert!(named.is_null() || *named == servers[0].address().port(), "{end}");
}

fn bytes_of_the_proxys_own_are_not_counted(io: Io) {
    let backend = Backend::scripted(|stream| {
        assert!(read_line(stream).unwrap().starts_with("PROXY TCP4 "));
        let _ = read_line(stream);
        let _ = (&mut &*stream).write_all(b"db\n");
        let _ = read_line(stream);
    });
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_PROXY_PROTOCOL", "v1")
        .without_pool()
        .start();
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "who"), "db");
    reset(client);
    let end = one_end(&proxy);
    for direction in ["to_backend", "to_client"] {
        let counted = proxy.metric("aegis_bytes_total", &[("direction", direction)]);
        assert_eq!(end[format!("aegis.bytes.{direction}")], counted, "{end}");
    }
}
