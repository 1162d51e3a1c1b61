//! The log's lines of sessions and requests that have ended: which, with what, and never too many.

use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect, read_line, reset};
use crate::support::metrics::{REQUESTS, SESSIONS_CLOSED};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    a_session_that_was_reset_says_who_and_how_much,
    normal_ends_are_told_where_that_is_asked_for,
    a_request_that_is_not_answered_in_time_names_its_endpoint,
    a_session_without_an_endpoint_says_how_often_it_tried,
    a_storm_of_ends_is_cut_and_counted,
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

fn a_session_without_an_endpoint_says_how_often_it_tried(io: Io) {
    let proxy = Builder::on(io)
        .set("AEGIS_BACKENDS", "127.0.0.2:9")
        .set("AEGIS_ENDPOINT_WAIT", "100ms")
        .without_pool()
        .start();
    let mut client = connect(proxy.address());
    let _ = client.write_all(b"who\n");
    let end = one_end(&proxy);
    assert_eq!(end["error.type"], "connect_failed", "{end}");
    assert_eq!(end["aegis.seconds.to_backend"], Value::Null, "it has had none");
    drop(client);
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
