//! Endpoints found through a Kubernetes API.

use std::time::{Duration, Instant};

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect};
use crate::support::kube_api::{KubeApi, NAMESPACE, Slice, host_ip};
use crate::support::metrics::{DISCOVERY_ENDPOINTS, DISCOVERY_ERRORS};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, measured, on_both_drivers};

on_both_drivers![
    a_service_is_followed_from_one_endpoint_to_five_to_none_to_three,
    pods_are_found_by_their_labels,
    an_api_that_is_gone_harms_nobody_and_comes_back,
    an_api_that_is_gone_at_the_start_is_waited_for,
    a_missing_role_is_told_and_its_grant_is_noticed,
    a_connection_gone_silent_is_given_up,
];

fn on(io: Io, api: &KubeApi) -> Builder {
    Builder::on(io)
        .set("KUBECONFIG", api.kubeconfig())
        .set("AEGIS_KUBE_SERVICE", "chronos")
        .set("AEGIS_KUBE_WATCH_TIMEOUT", "2s")
        .set("AEGIS_BALANCE", "round_robin")
        .set("AEGIS_SLOW_START", "off")
}

/// Servers that the API may name: each has a slice, for each has a port of its own.
fn backends(names: &[&'static str]) -> Vec<Backend> {
    names.iter().map(|name| Backend::named_at(name, host_ip())).collect()
}

fn announce(api: &KubeApi, name: &str, backend: &Backend) {
    let address = backend.address();
    api.slice(name, &Slice::of(address.port()).with(&format!("pod-{name}"), address.ip()));
}

fn wait_for_endpoints(proxy: &Proxy, count: u64) {
    proxy.wait_for(DISCOVERY_ENDPOINTS, &[], |found| found == count);
    eventually("every worker has applied it", PATIENCE, || {
        let backends = proxy.get("/backends").json();
        let applied = backends["applied_generations"].as_array()?;
        applied.iter().all(|g| *g == backends["generation"]).then_some(())
    });
}

/// Who answers 40 sessions, each once.
fn who(proxy: &Proxy) -> Vec<String> {
    let mut who: Vec<_> = (0..40).map(|_| ask_once(proxy.address(), "who").unwrap()).collect();
    who.sort_unstable();
    who.dedup();
    who
}

fn a_service_is_followed_from_one_endpoint_to_five_to_none_to_three(io: Io) {
    let api = KubeApi::start();
    let names = ["a", "b", "c", "d", "e"];
    let servers = backends(&names);
    announce(&api, "a", &servers[0]);
    let proxy = on(io, &api).start();
    wait_for_endpoints(&proxy, 1);
    assert_eq!(who(&proxy), ["a"]);
    let name = &proxy.get("/backends").json()["endpoints"][0]["name"];
    assert_eq!(name, "pod-a");

    for (name, server) in names.iter().zip(&servers).skip(1) {
        announce(&api, name, server);
    }
    wait_for_endpoints(&proxy, 5);
    assert_eq!(who(&proxy), names);

    let held = connect(proxy.address());
    let by = ask(&held, "who");
    for name in names {
        api.delete_slice(name);
    }
    wait_for_endpoints(&proxy, 0);
    assert!(proxy.get("/readyz").body.contains("no endpoint"), "{:?}", proxy.get("/readyz"));
    assert_eq!(ask(&held, "who"), by, "a live session stays");

    // A session that comes now waits for the first endpoint.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| ask_once(proxy.address(), "who"));
        eventually("it waits", PATIENCE, || {
            (proxy.metric(crate::support::metrics::SESSIONS_ACTIVE, &[]) == 2).then_some(())
        });
        for (name, server) in names.iter().zip(&servers).take(3) {
            announce(&api, name, server);
        }
        assert!(names[..3].contains(&&*waiting.join().unwrap().unwrap()));
    });
    wait_for_endpoints(&proxy, 3);
    assert_eq!(who(&proxy), ["a", "b", "c"]);
}

fn pods_are_found_by_their_labels(io: Io) {
    let api = KubeApi::start();
    let servers = backends(&["a", "b"]);
    let labels = serde_json::json!({"app": "chronos"});
    api.pod("chronos-0", &labels, servers[0].address());
    api.pod("other-0", &serde_json::json!({"app": "other"}), servers[1].address());
    let proxy = on(io, &api)
        .set("AEGIS_KUBE_SERVICE", "none")
        .set("AEGIS_KUBE_SELECTOR", "app=chronos")
        .set("AEGIS_KUBE_NAMESPACE", NAMESPACE)
        .set("AEGIS_KUBE_PORT", "chronos")
        .start();
    wait_for_endpoints(&proxy, 1);
    assert_eq!(who(&proxy), ["a"]);
    api.pod("chronos-1", &labels, servers[1].address());
    wait_for_endpoints(&proxy, 2);
    assert_eq!(who(&proxy), ["a", "b"]);
    api.delete_pod("chronos-0");
    wait_for_endpoints(&proxy, 1);
    assert_eq!(who(&proxy), ["b"]);
}

fn an_api_that_is_gone_harms_nobody_and_comes_back(io: Io) {
    let api = KubeApi::start();
    let servers = backends(&["a", "b"]);
    announce(&api, "a", &servers[0]);
    let proxy = on(io, &api).start();
    let held = connect(proxy.address());
    assert_eq!(ask(&held, "who"), "a");

    api.gate.close();
    proxy.wait_for(DISCOVERY_ERRORS, &[("kind", "unreachable")], |errors| errors >= 2);
    announce(&api, "b", &servers[1]);
    assert_eq!(proxy.get("/readyz").status, 200);
    assert_eq!(who(&proxy), ["a"], "the last known good set stays");
    assert_eq!(ask(&held, "who"), "a");

    api.gate.open();
    wait_for_endpoints(&proxy, 2);
    assert_eq!(who(&proxy), ["a", "b"]);
}

fn an_api_that_is_gone_at_the_start_is_waited_for(io: Io) {
    let api = KubeApi::start();
    let servers = backends(&["a"]);
    announce(&api, "a", &servers[0]);
    api.gate.close();
    let proxy = on(io, &api).launch();
    eventually("readiness says why", PATIENCE, || {
        let answer = proxy.get("/readyz");
        let told = answer.body.contains("the Kubernetes API cannot be reached");
        (answer.status == 503 && told).then_some(())
    });
    assert_eq!(proxy.get("/livez").status, 200);
    eventually("the start-up is over in a bounded time", PATIENCE, || {
        (proxy.get("/startupz").status == 200).then_some(())
    });
    api.gate.open();
    wait_for_endpoints(&proxy, 1);
    assert_eq!(proxy.get("/readyz").status, 200);
    assert_eq!(who(&proxy), ["a"]);
}

fn a_missing_role_is_told_and_its_grant_is_noticed(io: Io) {
    let api = KubeApi::start();
    let servers = backends(&["a"]);
    announce(&api, "a", &servers[0]);
    api.revoke();
    let proxy = on(io, &api).launch();
    proxy.wait_for(DISCOVERY_ERRORS, &[("kind", "forbidden")], |errors| errors >= 1);
    let why = eventually("readiness says what is missing", PATIENCE, || {
        let why = proxy.get("/readyz").body;
        why.contains("Role").then_some(why)
    });
    for part in ["watch", "endpointslices", "discovery.k8s.io", "\"db\"", "\"list\""] {
        assert!(why.contains(part), "no {part} in {why}");
    }
    api.grant();
    wait_for_endpoints(&proxy, 1);
    assert_eq!(who(&proxy), ["a"]);
}

fn a_connection_gone_silent_is_given_up(io: Io) {
    let api = KubeApi::start();
    let servers = backends(&["a", "b"]);
    announce(&api, "a", &servers[0]);
    let proxy = on(io, &api).set("AEGIS_KUBE_WATCH_TIMEOUT", "1s").start();
    wait_for_endpoints(&proxy, 1);
    api.gate.silence();
    announce(&api, "b", &servers[1]);
    assert_eq!(who(&proxy), ["a"]);
    // What is silent now stays so; only a new connection can bring the news.
    let silent = Instant::now();
    eventually("the silence is noticed", PATIENCE, || {
        (silent.elapsed() > Duration::from_secs(1)).then(|| api.gate.open())
    });
    wait_for_endpoints(&proxy, 2);
    measured(&format!("a silent connection was replaced after {:?}", silent.elapsed()));
    assert_eq!(who(&proxy), ["a", "b"]);
}
