//! The admin port.

use std::collections::HashSet;
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect};
use crate::support::metrics::{
    ACCEPT_PAUSES, CONNECT_RETRIES, ENDPOINT_USABLE, IO_DRIVER, POOL_CHECKOUTS, POOL_CONNECTIONS,
    POOL_DISCARDS, SESSIONS_ACTIVE, SESSIONS_CLOSED,
};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, on_both_drivers, skip};

on_both_drivers![
    the_probes_answer,
    metrics_are_complete_and_without_doubles,
    promtool_accepts_the_metrics,
    backends_are_listed_as_json,
    the_configuration_is_shown_as_json,
    other_paths_are_not_found,
];

/// A proxy that has served something and has a session open.
fn busy_proxy(io: Io) -> (Backend, std::net::TcpStream, Proxy) {
    let backend = Backend::named("a");
    let proxy = Builder::on(io).backends(&[backend.address()]).start();
    for _ in 0..5 {
        ask_once(proxy.address(), "who").unwrap();
    }
    let client = connect(proxy.address());
    ask(&client, "who");
    (backend, client, proxy)
}

fn the_probes_answer(io: Io) {
    let (_backend, _client, proxy) = busy_proxy(io);
    for path in ["/livez", "/readyz", "/startupz"] {
        assert_eq!(proxy.get(path).status, 200, "{path}");
    }
}

fn metrics_are_complete_and_without_doubles(io: Io) {
    let (_backend, _client, proxy) = busy_proxy(io);
    let answer = proxy.get("/metrics");
    assert!(answer.headers["content-type"].starts_with("text/plain"), "{:?}", answer.headers);
    let metrics = proxy.metrics();
    let names = [
        ACCEPT_PAUSES,
        CONNECT_RETRIES,
        ENDPOINT_USABLE,
        IO_DRIVER,
        POOL_CHECKOUTS,
        POOL_CONNECTIONS,
        POOL_DISCARDS,
        SESSIONS_ACTIVE,
        SESSIONS_CLOSED,
    ];
    for name in names {
        assert!(metrics.sum(name, &[]).is_some(), "{}", metrics.describe(name));
    }
    let mut seen = HashSet::new();
    for sample in metrics.samples() {
        assert!(sample.name.starts_with("aegis_") || sample.name.starts_with("process_"));
        assert!(seen.insert((&sample.name, &sample.labels)), "twice: {sample:?}");
        assert!(sample.value >= 0.0, "{sample:?}");
    }
}

fn promtool_accepts_the_metrics(io: Io) {
    let (_backend, _client, proxy) = busy_proxy(io);
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped());
    let mut promtool = match command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() {
        Ok(promtool) => promtool,
        Err(error) => return skip(&format!("promtool does not run: {error}")),
    };
    let body = proxy.get("/metrics").body;
    promtool.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn backends_are_listed_as_json(io: Io) {
    let (backend, _client, proxy) = busy_proxy(io);
    let answer = proxy.get("/backends");
    assert_eq!(answer.status, 200);
    assert!(answer.headers["content-type"].starts_with("application/json"));
    let listed = answer.json().to_string();
    assert!(listed.contains(&backend.address().to_string()), "{listed}");
}

fn the_configuration_is_shown_as_json(io: Io) {
    let (backend, _client, proxy) = busy_proxy(io);
    let answer = proxy.get("/config");
    assert_eq!(answer.status, 200);
    assert!(answer.headers["content-type"].starts_with("application/json"));
    let shown = answer.json().to_string();
    assert!(shown.contains(&backend.address().to_string()), "{shown}");
}

fn other_paths_are_not_found(io: Io) {
    let (_backend, _client, proxy) = busy_proxy(io);
    for path in ["/metric", "/metrics/x", "/../config"] {
        assert_eq!(proxy.get(path).status, 404, "{path}");
    }
    assert_eq!(proxy.get("/").status, 200, "an index of what there is");
}

/// A worker's queue is its own, and of each client one request waits.
#[test]
fn the_queue_is_shown_with_what_it_can_come_to() {
    for (sessions, length, max) in [("100", "8192", 100), ("1000", "7", 14)] {
        let proxy = Builder::on(Io::Auto)
            .protocol("http1", "request")
            .set("AEGIS_BACKENDS", "127.0.0.2:9")
            .set("AEGIS_MAX_SESSIONS", sessions)
            .set("AEGIS_QUEUE_MAX", length)
            .launch();
        let queue = &proxy.get("/status").json()["routes"][0]["queue"];
        assert_eq!((&queue["now"], &queue["max"]), (&json!(0), &json!(max)));
    }
}
