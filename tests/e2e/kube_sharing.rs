//! Routes that share what is the same: one client of the Kubernetes API, and one watch where two
//! would be on the same objects.

use std::fs;

use serde_json::{Value, json};

use crate::support::backend::{Backend, Memory};
use crate::support::client::ask_once;
use crate::support::kube_api::{KubeApi, Slice, host_ip};
use crate::support::metrics::{
    DISCOVERY_ENDPOINTS, DISCOVERY_ERRORS, DISCOVERY_LAST_SYNC, DISCOVERY_SNAPSHOT_AGE,
};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, ports, skip};

const ROUTES: [&str; 2] = ["orders", "cache"];

/// Two routes that find their endpoints by this API.
fn two_routes(api: &KubeApi, orders: &str, cache: &str) -> Builder {
    Builder::on(Io::Auto)
        .set("KUBECONFIG", api.kubeconfig())
        .set("AEGIS_ROUTES", "orders,cache")
        .set("AEGIS_ORDERS__KUBE_SERVICE", orders)
        .set("AEGIS_CACHE__KUBE_SERVICE", cache)
        .set("AEGIS_SLOW_START", "off")
        .without_pool()
}

/// Waits until both routes serve, by these.
fn wait_for(proxy: &Proxy, served: [&str; 2]) {
    for (route, by) in ROUTES.into_iter().zip(served) {
        let address = proxy.address_of(route);
        eventually(&format!("{route} is served by {by}"), PATIENCE, || {
            (ask_once(address, "who").ok()? == by).then_some(())
        });
    }
}

fn errors(proxy: &Proxy, kind: &str) -> [u64; 2] {
    ROUTES.map(|route| proxy.metric(DISCOVERY_ERRORS, &[("route", route), ("kind", kind)]))
}

fn slice_of(server: &Backend, service: &'static str, pod: &str) -> Slice {
    let address = server.address();
    Slice::of(address.port()).of_service(service).with(pod, address.ip())
}

/// Each watch has one, which the next one goes on with; while that is on its way back to the pool, another
/// may be made.
fn connections_max(watches: usize) -> usize {
    2 * watches
}

const CHRONOS: &str = "endpointslices?kubernetes.io/service-name=chronos";
const REDIS: &str = "endpointslices?kubernetes.io/service-name=redis";

#[test]
fn two_routes_on_one_service_share_its_watch_and_read_it_each_by_their_own_rules() {
    let api = KubeApi::start();
    let [a, b, other] = ["a", "b", "other"].map(|name| Backend::named_at(name, host_ip()));
    api.announce("a", a.address());
    let port = other.address().port().to_string();
    let proxy = two_routes(&api, "chronos", "chronos").set("AEGIS_CACHE__KUBE_PORT", port).start();
    wait_for(&proxy, ["a", "other"]);
    if let Some(faults) = api.faults() {
        assert_eq!(faults.watches(), [CHRONOS]);
        assert_eq!((faults.requests(), api.gate.passed()), (1, 1));
    }
    for route in ROUTES {
        assert_eq!(proxy.metric(DISCOVERY_ENDPOINTS, &[("route", route)]), 1);
        let metrics = proxy.metrics();
        let synced = metrics
            .samples()
            .iter()
            .find(|sample| sample.name == DISCOVERY_LAST_SYNC && sample.labels["route"] == route);
        assert!(synced.is_some_and(|sample| sample.value > 0.0), "{synced:?}");
    }
    let lines = proxy.log_events("watching the Kubernetes API");
    let named: Vec<_> = lines.iter().filter_map(|line| line["span"]["route"].as_str()).collect();
    assert_eq!(named, ROUTES, "{lines:?}");

    api.delete_slice("a");
    for route in ROUTES {
        proxy.wait_for(DISCOVERY_ENDPOINTS, &[("route", route)], |count| count == 0);
    }
    api.announce("b", b.address());
    wait_for(&proxy, ["b", "other"]);
    assert!(api.gate.passed() <= connections_max(1), "{} connections", api.gate.passed());
}

#[test]
fn two_services_have_two_watches_of_one_client() {
    let api = KubeApi::start();
    let [a, b] = ["a", "b"].map(|name| Backend::named_at(name, host_ip()));
    api.slice("a", &slice_of(&a, "chronos", "a"));
    api.slice("b", &slice_of(&b, "redis", "b"));
    let proxy = two_routes(&api, "chronos", "redis").set("AEGIS_KUBE_WATCH_TIMEOUT", "2s").start();
    wait_for(&proxy, ["a", "b"]);
    if let Some(faults) = api.faults() {
        eventually("both are watched", PATIENCE, || {
            let mut watches = faults.watches();
            watches.sort_unstable();
            (watches == [CHRONOS, REDIS]).then_some(())
        });
        let before = faults.requests();
        eventually("watches follow watches", PATIENCE, || {
            (faults.requests() >= before + 4).then_some(())
        });
    }
    assert!(api.gate.passed() <= connections_max(2), "{} connections", api.gate.passed());
    api.slice("a", &slice_of(&b, "chronos", "b"));
    wait_for(&proxy, ["b", "b"]);
    api.slice("b", &slice_of(&a, "redis", "a"));
    wait_for(&proxy, ["b", "a"]);
}

#[test]
fn a_watch_that_is_forbidden_leaves_that_of_another_route() {
    let api = KubeApi::start();
    let Some(faults) = api.faults() else { return skip("a real API server forbids by RBAC only") };
    let [a, b] = ["a", "b"].map(|name| Backend::named_at(name, host_ip()));
    api.announce("a", a.address());
    api.pod("b", &json!({"app": "redis"}), b.address());
    faults.hide(Some("pods"));
    let proxy =
        two_routes(&api, "chronos", "none").set("AEGIS_CACHE__KUBE_SELECTOR", "app=redis").launch();
    let orders = proxy.address_of("orders");
    eventually("the other one is served", PATIENCE, || {
        (ask_once(orders, "who").ok()? == "a").then_some(())
    });
    let forbidden = [("route", "cache"), ("kind", "forbidden")];
    proxy.wait_for(DISCOVERY_ERRORS, &forbidden, |count| count >= 3);
    assert_eq!(errors(&proxy, "forbidden")[0], 0);
    let told = proxy.log_at("WARN");
    let of_cache = |line: &Value| {
        line["span"]["route"] == "cache" && line.to_string().contains("not allowed to watch pods")
    };
    assert!(told.iter().any(of_cache), "{told:#?}");
    let page = proxy.get("/startupz?wait=0");
    assert!(page.status == 503 && page.body.contains("pods"), "{page:?}");

    // What the other one watches goes on.
    let next = Backend::named_at("next", host_ip());
    api.announce("a", next.address());
    eventually("its changes are known", PATIENCE, || {
        (ask_once(orders, "who").ok()? == "next").then_some(())
    });
    faults.hide(None);
    wait_for(&proxy, ["next", "b"]);
    proxy.wait_for_start();
}

#[test]
fn a_watch_that_fell_behind_starts_over_for_each_of_its_routes() {
    let api = KubeApi::start();
    let Some(faults) = api.faults() else { return skip("a real API server forgets in its time") };
    let [a, b] = ["a", "b"].map(|name| Backend::named_at(name, host_ip()));
    api.announce("a", a.address());
    let proxy = two_routes(&api, "chronos", "chronos").start();
    wait_for(&proxy, ["a", "a"]);
    faults.compact();
    for route in ROUTES {
        let expired = [("route", route), ("kind", "expired")];
        proxy.wait_for(DISCOVERY_ERRORS, &expired, |count| count == 1);
    }
    api.announce("a", b.address());
    wait_for(&proxy, ["b", "b"]);
    eventually("one watch is there again", PATIENCE, || {
        (faults.watches() == [CHRONOS]).then_some(())
    });

    api.gate.cut();
    api.announce("a", a.address());
    wait_for(&proxy, ["a", "a"]);
    let both = errors(&proxy, "unreachable");
    assert_eq!(both[0], both[1], "what becomes of a watch is counted for each of its routes");
}

#[test]
fn a_rotated_token_counts_for_every_watch() {
    let api = KubeApi::start();
    let Some(faults) = api.faults() else { return skip("a real API server knows one token") };
    let [a, b, c] = ["a", "b", "c"].map(|name| Backend::named_at(name, host_ip()));
    api.slice("a", &slice_of(&a, "chronos", "a"));
    api.slice("b", &slice_of(&b, "redis", "b"));
    let proxy = two_routes(&api, "chronos", "redis").start();
    wait_for(&proxy, ["a", "b"]);
    api.write_token("another");
    faults.accept_only("another");
    for (name, service) in [("a", "chronos"), ("b", "redis")] {
        api.slice(name, &slice_of(&c, service, "c"));
    }
    wait_for(&proxy, ["c", "c"]);
}

/// One on a `StatefulSet`'s Service and the other on another's: their sets are of one namespace.
#[test]
fn keyed_routes_share_the_watch_on_stateful_sets() {
    let api = KubeApi::start();
    let Some(faults) = api.faults() else {
        return skip("a real API server does not say who watches");
    };
    let [a, b] = [(); 2].map(|()| Backend::chronos_on((host_ip(), 0).into(), &Memory::default()));
    api.slice("a", &slice_of(&a, "chronos", "chronos-0"));
    api.slice("b", &slice_of(&b, "redis", "redis-0"));
    api.stateful_set("chronos", 1);
    api.stateful_set("redis", 1);
    let proxy = two_routes(&api, "chronos", "redis")
        .protocol("chronos", "request")
        .set("AEGIS_BALANCE", "key_hash")
        .start();
    for route in ROUTES {
        assert_eq!(ask_once(proxy.address_of(route), "SET key value").unwrap(), "OK");
    }
    eventually("three watches for two keyed routes", PATIENCE, || {
        let mut watches = faults.watches();
        watches.sort_unstable();
        (watches == [CHRONOS, REDIS, "statefulsets?"]).then_some(())
    });
    assert!(api.gate.passed() <= connections_max(3), "{} connections", api.gate.passed());
}

/// The file is one route's own: the other one, on the same watch, waits for its time.
#[test]
fn saved_endpoints_are_of_the_route_that_has_the_file() {
    let api = KubeApi::start();
    let a = Backend::named_at("a", host_ip());
    api.announce("a", a.address());
    let file = api.folder().join("orders.json");
    let on = || {
        two_routes(&api, "chronos", "chronos")
            .set("AEGIS_ORDERS__KUBE_SNAPSHOT", file.to_str().unwrap())
            .set("AEGIS_ENDPOINT_WAIT", "0s")
    };
    let mut proxy = on().start();
    wait_for(&proxy, ["a", "a"]);
    eventually("the endpoints are saved", PATIENCE, || {
        fs::read_to_string(&file).ok()?.contains("pod-a").then_some(())
    });
    proxy.terminate();
    proxy.wait_clean(PATIENCE);

    // Where nobody listens at the server's address, there is no reason to wait.
    let nobody = ports::unused([127, 0, 0, 1].into());
    let saved = fs::read_to_string(&file).unwrap();
    let saved = saved.replace(&api.gate.address().to_string(), &nobody.to_string());
    fs::write(&file, saved).unwrap();
    api.set_server(nobody);
    let proxy = on().set("AEGIS_START_TIMEOUT", "5m").launch();
    let orders = [("route", "orders")];
    proxy.wait_for(DISCOVERY_ENDPOINTS, &orders, |count| count == 1);
    assert_eq!(ask_once(proxy.address_of("orders"), "who").unwrap(), "a");
    assert!(proxy.metric(DISCOVERY_SNAPSHOT_AGE, &orders) < 60);
    let unreachable = [("route", "cache"), ("kind", "unreachable")];
    proxy.wait_for(DISCOVERY_ERRORS, &unreachable, |count| count >= 3);
    let told = proxy.log_events("the Kubernetes API has not answered: going on without endpoints");
    assert!(told.is_empty(), "{told:?}");
    assert_eq!(proxy.get("/startupz?wait=0").status, 503);
}

/// As many routes as there may be, each with a watch of its own: none has to wait for the others'
/// turns.
#[test]
fn as_many_routes_as_there_may_be_are_found_at_once() {
    const COUNT: usize = 16;
    let api = KubeApi::start();
    let Some(faults) = api.faults() else { return skip("lists by watch are not to be had anew") };
    // Each needs a watch that fails, a list and a watch.
    faults.forget_streaming_lists();
    let a = Backend::named_at("a", host_ip());
    let services: [&str; COUNT] = std::array::from_fn(|at| &*format!("s{at}").leak());
    let names: Vec<_> = (0..COUNT).map(|at| format!("r{at}")).collect();
    let mut builder = Builder::on(Io::Auto)
        .set("KUBECONFIG", api.kubeconfig())
        .set("AEGIS_ROUTES", names.join(","))
        .set("AEGIS_START_TIMEOUT", "5m")
        .without_pool();
    for (name, service) in names.iter().zip(services) {
        api.slice(service, &slice_of(&a, service, "a"));
        let variable = format!("AEGIS_{}__KUBE_SERVICE", name.to_uppercase());
        builder = builder.set(&variable, service);
    }
    let proxy = builder.start();
    eventually("each is watched", PATIENCE, || (faults.watches().len() == COUNT).then_some(()));
    for name in &names {
        assert_eq!(proxy.metric(DISCOVERY_ENDPOINTS, &[("route", name)]), 1);
    }
    assert!(api.gate.passed() <= connections_max(COUNT), "{} connections", api.gate.passed());
}
