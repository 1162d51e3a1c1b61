//! A Kubernetes API that talks nonsense, and credentials that hang: neither costs the server, the
//! disk, the memory or the end of the process.
//!
//! Discovery is the same whatever drives the sockets, so each test runs once.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::support::backend::Backend;
use crate::support::client::ask_once;
use crate::support::kube_api::{KubeApi, Odd, PROXY_TOKEN, host_ip};
use crate::support::metrics::{DISCOVERY_ERRORS, DISCOVERY_LAST_SYNC};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, measured, skip};

fn on(api: &KubeApi) -> Builder {
    Builder::on(Io::Auto).kubernetes(api).set("AEGIS_SLOW_START", "off").without_pool()
}

/// What an answer may do.
#[derive(PartialEq)]
enum Syncs {
    /// It proves that what is known is up to date.
    Yes,
    No,
}

/// A proxy that knows the endpoints and one that starts meet this answer.
fn is_borne(odd: Odd, syncs: Syncs) {
    const WINDOW: Duration = Duration::from_secs(4);
    // Four at once and two a second, of each of the two.
    const REQUESTS_MAX: u64 = 2 * (4 + 2 * WINDOW.as_secs()) + 4;
    const MEMORY_KB_MAX: u64 = 100 << 10;

    let api = KubeApi::start();
    let Some(faults) = api.faults() else {
        return skip("a real API server makes sense");
    };
    let servers = [(); 2].map(|()| Backend::named_at("a", host_ip()));
    api.announce("a", servers[0].address());
    let old = on(&api).start();
    old.wait_for_endpoints(1);
    let memory = old.memory_kb("status", "VmHWM");

    faults.talk(Some(odd));
    let last_sync = |proxy: &Proxy| proxy.metrics().value(DISCOVERY_LAST_SYNC).unwrap();
    // The watches that are cut for it end well.
    let synced = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64() + 1.0;
    let (begun, before) = (Instant::now(), faults.requests());
    let new = on(&api).launch();
    eventually("it has been heard for a while", WINDOW + PATIENCE, || {
        assert_eq!(ask_once(old.address(), "who").unwrap(), "a");
        (begun.elapsed() >= WINDOW).then_some(())
    });
    let (requests, took) = (faults.requests() - before, begun.elapsed());
    measured(&format!("{odd:?}: {requests} requests of two proxies in {took:?}"));
    assert!(requests <= REQUESTS_MAX, "{odd:?}: {requests} requests in {took:?}");
    let grown = old.memory_kb("status", "VmHWM").saturating_sub(memory);
    assert!(grown < MEMORY_KB_MAX, "{odd:?}: {grown} KiB");
    if syncs == Syncs::No {
        assert!(last_sync(&old) <= synced, "{odd:?} is a sync");
        assert!(last_sync(&new) <= 0.0, "{odd:?} is a sync");
    }

    faults.talk(None);
    api.announce("b", servers[1].address());
    for proxy in [&old, &new] {
        proxy.wait_for_endpoints(2);
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
        // Each kind of trouble once, and what the start has to say.
        let warned = proxy.log_at("WARN").into_iter().chain(proxy.log_at("ERROR"));
        let warned: Vec<_> = warned.map(|line| line["message"].clone()).collect();
        assert!(warned.len() <= 4, "{odd:?}: {warned:#?}");
        let foreign = proxy.log_lines().into_iter().find(|line| line.contains("kube_client"));
        assert_eq!(foreign, None, "the library tells it, too");
    }
}

macro_rules! borne {
    ($($name:ident: $odd:expr, $syncs:expr;)+) => { $(
        #[test]
        fn $name() {
            is_borne($odd, $syncs);
        }
    )+ };
}

borne! {
    a_redirect: Odd::Redirect, Syncs::No;
    an_empty_answer: Odd::Empty, Syncs::No;
    a_page_for_people: Odd::Html, Syncs::No;
    a_page_that_calls_itself_json: Odd::HtmlAsJson, Syncs::No;
    an_answer_that_breaks_off: Odd::Truncated, Syncs::No;
    watches_that_end_at_once: Odd::EndsAtOnce, Syncs::Yes;
    watches_that_are_late_at_once: Odd::GoneAtOnce, Syncs::Yes;
    no_patience_at_all: Odd::Throttled(0), Syncs::No;
    patience_for_46_days: Odd::Throttled(4_000_000), Syncs::No;
    credentials_that_never_do: Odd::Unauthorized, Syncs::No;
    a_head_that_does_not_end: Odd::EndlessHead, Syncs::No;
    an_event_that_does_not_end: Odd::HugeEvent, Syncs::No;
    objects_that_do_not_end: Odd::EndlessObjects, Syncs::Yes;
    a_list_that_only_gives_signs_of_life: Odd::BookmarksOnly, Syncs::Yes;
    events_that_go_back_in_time: Odd::BackInTime, Syncs::Yes;
    pages_that_do_not_end: Odd::EndlessPages, Syncs::No;
    silence: Odd::Silent, Syncs::No;
}

#[test]
fn a_server_that_fails_in_lists_by_watch_is_listed() {
    let api = KubeApi::start();
    let Some(faults) = api.faults() else { return skip("a real API server has the etcd it has") };
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    faults.fail_streaming_lists();
    let proxy = on(&api).start();
    proxy.wait_for_endpoints(1);
    let warned = proxy.log_at("WARN");
    assert!(warned.is_empty(), "{warned:#?}");
}

#[test]
fn both_watches_of_keyed_routing_keep_their_pace() {
    const WINDOW: Duration = Duration::from_secs(4);
    let api = KubeApi::start();
    let Some(faults) = api.faults() else { return skip("a real API server makes sense") };
    for odd in [Odd::Redirect, Odd::EndsAtOnce, Odd::Empty] {
        faults.talk(Some(odd));
        let (begun, before) = (Instant::now(), faults.requests());
        let _proxy =
            on(&api).protocol("chronos", "request").set("AEGIS_BALANCE", "key_hash").launch();
        eventually("it has been heard for a while", WINDOW + PATIENCE, || {
            (begun.elapsed() >= WINDOW).then_some(())
        });
        let requests = faults.requests() - before;
        assert!(requests <= 2 * (4 + 2 * WINDOW.as_secs()) + 4, "{odd:?}: {requests} requests");
        assert!(requests >= 4, "{odd:?}: both are tried again");
    }
}

#[test]
fn a_plugin_of_void_credentials_does_not_run_in_a_circle() {
    let api = KubeApi::start();
    let runs = api.folder().join("runs");
    let status = json!({"token": "of-nobody", "expirationTimestamp": "2001-01-01T00:00:00Z"});
    let credential = json!({"kind": "ExecCredential", "status": status});
    plugin(&api, &format!("echo run >> {}; echo '{credential}'", runs.display()));
    let begun = Instant::now();
    let proxy = on(&api).launch();
    proxy.wait_for(DISCOVERY_ERRORS, &[("kind", "unauthorized")], |errors| errors >= 3);
    let count = fs::read_to_string(&runs).unwrap().lines().count() as u64;
    assert!(count <= 4 + 2 * begun.elapsed().as_secs(), "{count} in {:?}", begun.elapsed());
}

#[test]
fn a_list_that_never_ends_is_no_sync() {
    let api = KubeApi::start();
    let Some(faults) = api.faults() else { return skip("a real API server ends its lists") };
    faults.talk(Some(Odd::BookmarksOnly));
    let proxy = on(&api).set("AEGIS_START_TIMEOUT", "2s").launch();
    eventually("the start is over", PATIENCE, || {
        (proxy.get("/startupz?wait=0").status == 200).then_some(())
    });
    assert!(proxy.metrics().value(DISCOVERY_LAST_SYNC) <= Some(0.0));
}

#[test]
fn troubles_and_their_end_are_reported_once() {
    let api = KubeApi::start();
    let Some(faults) = api.faults() else {
        return skip("no real API server answers 503 on demand");
    };
    let servers = [(); 2].map(|()| Backend::named_at("a", host_ip()));
    api.announce("a", servers[0].address());
    let proxy = on(&api).set("AEGIS_KUBE_WATCH_TIMEOUT", "2s").start();
    proxy.wait_for_endpoints(1);
    faults.answer(Some(503));
    proxy.wait_for(DISCOVERY_ERRORS, &[("kind", "refused")], |errors| errors >= 4);
    let warned = proxy.log_at("WARN");
    assert_eq!(warned.len(), 1, "{warned:#?}");
    let message = warned[0]["message"].as_str().unwrap();
    assert!(message.contains("503") && message.contains("keeping the endpoints"), "{message}");
    assert!(proxy.log_events("the Kubernetes API is well again").is_empty());
    faults.answer(None);
    let well = || proxy.log_events("the Kubernetes API is well again").len();
    eventually("it is told that all is well", PATIENCE, || (well() > 0).then_some(()));
    assert_eq!((well(), proxy.log_at("WARN").len()), (1, 1));
}

#[test]
fn watches_last_for_five_minutes_or_a_little_less() {
    let api = KubeApi::start();
    let Some(faults) = api.faults() else { return skip("a real API server keeps no such record") };
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    let proxies = [(); 4].map(|()| on(&api).start());
    for proxy in &proxies {
        proxy.wait_for_endpoints(1);
    }
    let mut timeouts = faults.timeouts();
    assert!(timeouts.iter().all(|seconds| (225..=300).contains(seconds)), "{timeouts:?}");
    timeouts.dedup();
    assert!(timeouts.len() > 1, "all the same: {timeouts:?}");
}

/// A program of this text, to be run as a plugin.
fn plugin(api: &KubeApi, script: &str) {
    let path = api.folder().join("plugin");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    api.set_user(&json!({"exec": {
        "apiVersion": "client.authentication.k8s.io/v1", "command": path.to_str().unwrap(),
        "interactiveMode": "Never",
    }}));
}

#[test]
fn a_plugin_gives_the_credentials() {
    let api = KubeApi::start();
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    let status = json!({"token": PROXY_TOKEN, "expirationTimestamp": "2099-01-01T00:00:00Z"});
    let credential = json!({"apiVersion": "client.authentication.k8s.io/v1",
                            "kind": "ExecCredential", "status": status});
    plugin(&api, &format!("echo '{credential}'"));
    let proxy = on(&api).start();
    proxy.wait_for_endpoints(1);
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
}

#[test]
fn a_plugin_gives_a_certificate() {
    let api = KubeApi::start();
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    let (certificate, key) = api.certificate();
    let status = json!({"clientCertificateData": certificate, "clientKeyData": key});
    let credential = json!({"kind": "ExecCredential", "status": status});
    let file = api.folder().join("credential");
    fs::write(&file, credential.to_string()).unwrap();
    plugin(&api, &format!("cat {}", file.display()));
    let proxy = on(&api).start();
    proxy.wait_for_endpoints(1);
}

#[test]
fn a_plugin_that_hangs_keeps_nobody_from_the_end_and_ends_with_it() {
    let api = KubeApi::start();
    let pid = api.folder().join("pid");
    plugin(&api, &format!("echo $$ > {0}.new; mv {0}.new {0}; sleep 1000", pid.display()));
    let mut proxy = on(&api).launch();
    let plugin: u32 = eventually("the plugin runs", PATIENCE, || {
        fs::read_to_string(&pid).ok()?.trim().parse().ok()
    });
    assert_eq!(proxy.get("/livez").status, 200);
    proxy.terminate();
    let asked = Instant::now();
    proxy.wait(PATIENCE);
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    eventually("the plugin has ended", PATIENCE, || {
        let stat = fs::read_to_string(format!("/proc/{plugin}/stat")).unwrap_or_default();
        (stat.is_empty() || stat.contains(") Z")).then_some(())
    });
}

#[test]
fn a_plugin_that_hangs_is_killed_and_tried_again() {
    let api = KubeApi::start();
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    let (once, pid) = (api.folder().join("once"), api.folder().join("pid"));
    let credential = json!({"kind": "ExecCredential", "status": {"token": PROXY_TOKEN}});
    plugin(
        &api,
        &format!(
            "if mkdir {}; then echo $$ > {}; sleep 1000; fi; echo '{credential}'",
            once.display(),
            pid.display()
        ),
    );
    let proxy = on(&api).launch();
    let why = eventually("it is told", PATIENCE, || {
        let why = proxy.get("/startupz?wait=0").body;
        why.contains("takes longer than").then_some(why)
    });
    assert!(why.contains("the exec plugin"), "{why}");
    let plugin = fs::read_to_string(&pid).unwrap();
    assert!(!fs::exists(format!("/proc/{}", plugin.trim())).unwrap(), "it still runs");
    proxy.wait_for_endpoints(1);
}

#[test]
fn files_that_hang_keep_nobody_from_the_end() {
    for hung in ["kubeconfig", "token"] {
        let api = KubeApi::start();
        let path = match hung {
            "token" => api.token_file(),
            _ => api.kubeconfig(),
        };
        fs::remove_file(&path).unwrap();
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let mut proxy = on(&api).launch();
        eventually("it says what it waits for", PATIENCE, || {
            let answer = proxy.get("/startupz?wait=0");
            assert_eq!((answer.status, proxy.get("/livez").status), (503, 200), "{hung}");
            answer.body.contains("takes longer than").then_some(())
        });
        proxy.terminate();
        let asked = Instant::now();
        proxy.wait(PATIENCE);
        let took = asked.elapsed();
        assert!(took < Duration::from_secs(5), "{hung}: {took:?}");
    }
}
