//! Several routes in one process: each has its protocol, its backends and its outages.

use std::io::Read;
use std::net::SocketAddr;

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect, wait_closed};
use crate::support::kube_api::{KubeApi, host_ip};
use crate::support::metrics::{
    CLIENTS_WAITING, DISCOVERY_ENDPOINTS, ENDPOINT_CONNECTIONS, ENDPOINT_USABLE, SESSIONS_OPENED,
};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    each_route_has_its_own_protocol_and_backends,
    an_outage_of_one_route_leaves_the_other,
    a_route_without_any_endpoint_leaves_the_other,
    kubernetes_and_addresses_are_found_side_by_side,
    a_drain_is_over_when_the_clients_of_every_route_have_left,
    two_routes_to_one_server_have_a_limit_of_connections_each,
];

/// `orders` passes bytes on, `cache` shares connections by requests.
fn two_routes(io: Io, orders: &str, cache: &str) -> Builder {
    Builder::on(io)
        .set("AEGIS_ROUTES", "orders,cache")
        .set("AEGIS_ORDERS__BACKENDS", orders)
        .set("AEGIS_CACHE__BACKENDS", cache)
        .set("AEGIS_CACHE__PROTOCOL", "chronos")
        .set("AEGIS_CACHE__POOL_MODE", "request")
        .set("AEGIS_ENDPOINT_WAIT", "0s")
        .set("AEGIS_EJECT_FAILURES", "1")
        .set("AEGIS_EJECT_TIME", "100ms")
}

fn text(backend: &Backend) -> String {
    backend.address().to_string()
}

/// The addresses that the page of a route lists.
fn listed(proxy: &Proxy, query: &str) -> Vec<SocketAddr> {
    let page = proxy.get(&format!("/backends{query}")).json();
    assert_eq!(page["routes"], serde_json::json!(["orders", "cache"]));
    let endpoints = page["endpoints"].as_array().unwrap();
    endpoints.iter().map(|row| row["address"].as_str().unwrap().parse().unwrap()).collect()
}

fn each_route_has_its_own_protocol_and_backends(io: Io) {
    let (orders, cache) = (Backend::named("orders"), Backend::chronos());
    let proxy = two_routes(io, &text(&orders), &text(&cache)).start();
    let [of_orders, of_cache] = ["orders", "cache"].map(|route| proxy.address_of(route));
    assert_ne!(of_orders, of_cache);
    for turn in 0..10 {
        assert_eq!(ask_once(of_orders, "who").unwrap(), "orders");
        assert_eq!(ask_once(of_cache, &format!("SET key {turn}")).unwrap(), "OK");
    }
    // Of requests that nobody may see one route knows, and the other one does not.
    assert!(ask_once(of_cache, "SELECT 1").unwrap().starts_with("ERR"));
    assert_eq!(ask_once(of_orders, "SELECT 1").unwrap(), "orders");

    let opened = |route| proxy.metric(SESSIONS_OPENED, &[("route", route)]);
    assert_eq!([opened("orders"), opened("cache")], [11, 11]);
    let answered = [("route", "cache"), ("command", "set"), ("outcome", "answered")];
    assert_eq!(proxy.metric("aegis_requests_total", &answered), 10);
    let metrics = proxy.metrics();
    assert_eq!(metrics.sum("aegis_requests_total", &[("route", "orders")]), None, "opaque bytes");
    let connects = |route| metrics.sum("aegis_endpoint_connects_total", &[("route", route)]);
    assert!(connects("orders") >= Some(11) && connects("cache") >= Some(1));

    assert_eq!(listed(&proxy, ""), [orders.address()], "the first one");
    assert_eq!(listed(&proxy, "?route=cache"), [cache.address()]);
    assert_eq!(proxy.get("/backends?route=stock").status, 400);
    let config = proxy.get("/config").json();
    assert_eq!(config["AEGIS_ROUTES"], "orders,cache");
    assert_eq!(config["AEGIS_CACHE__PROTOCOL"], "chronos");
    assert_eq!(config["AEGIS_ORDERS__PROTOCOL"], "tcp");
    assert_eq!(config["AEGIS_CONNECT_TIMEOUT"], "1s", "which both have");
    let changes = proxy.log_events("endpoints changed");
    let names: Vec<_> = changes.iter().map(|line| line["span"]["route"].clone()).collect();
    assert!(names.contains(&"orders".into()) && names.contains(&"cache".into()), "{changes:?}");
}

fn an_outage_of_one_route_leaves_the_other(io: Io) {
    let (mut orders, mut cache) = (Backend::named("orders"), Backend::chronos());
    let proxy = two_routes(io, &text(&orders), &text(&cache)).start();
    let [of_orders, of_cache] = ["orders", "cache"].map(|route| proxy.address_of(route));
    assert_eq!(ask_once(of_cache, "SET key 1").unwrap(), "OK");
    let steady = connect(of_orders);
    cache.kill();
    eventually("the cache is missed", PATIENCE, || {
        let reply = ask_once(of_cache, "GET key").unwrap_or_default();
        (reply.starts_with("ERR") && usable(&proxy, "cache") == 0).then_some(())
    });
    let ejected = proxy.log_events("ejected");
    assert!(
        !ejected.is_empty() && ejected.iter().all(|line| line["route"] == "cache"),
        "{ejected:?}"
    );
    for _ in 0..10 {
        assert_eq!(ask(&steady, "who"), "orders");
        assert_eq!(ask_once(of_orders, "who").unwrap(), "orders");
    }
    assert_eq!(proxy.get("/readyz").status, 200, "it serves one of them");
    assert_eq!(usable(&proxy, "orders"), 1);

    orders.kill();
    eventually("nothing is left", PATIENCE, || {
        let _ = (ask_once(of_orders, "who"), ask_once(of_cache, "GET key"));
        let ready = proxy.get("/readyz");
        let names_both = ready.body.contains("route orders: no endpoint usable")
            && ready.body.contains("route cache: no endpoint usable");
        (ready.status == 503 && names_both).then_some(())
    });
    cache.start();
    eventually("the cache is back", PATIENCE, || {
        (ask_once(of_cache, "SET key 2").ok()? == "OK").then_some(())
    });
    assert_eq!(proxy.get("/readyz").status, 200);
    eventually("it is told", PATIENCE, || {
        let back = proxy.log_events("usable again");
        back.iter().any(|line| line["route"] == "cache").then_some(())
    });
}

fn usable(proxy: &Proxy, route: &str) -> u64 {
    proxy.metric(ENDPOINT_USABLE, &[("route", route)])
}

fn a_route_without_any_endpoint_leaves_the_other(io: Io) {
    let orders = Backend::named("orders");
    let proxy =
        two_routes(io, &text(&orders), "nobody.invalid:1").set("AEGIS_START_TIMEOUT", "1s").start();
    let [of_orders, of_cache] = ["orders", "cache"].map(|route| proxy.address_of(route));
    assert_eq!(ask_once(of_orders, "who").unwrap(), "orders");
    let reply = ask_once(of_cache, "GET key").unwrap();
    assert!(reply.starts_with("ERR no endpoint is known"), "{reply}");
    assert_eq!(proxy.metric(DISCOVERY_ENDPOINTS, &[("route", "cache")]), 0);
    assert_eq!(proxy.metric(DISCOVERY_ENDPOINTS, &[("route", "orders")]), 1);
    let errors = [("route", "cache"), ("kind", "lookup")];
    proxy.wait_for("aegis_discovery_errors_total", &errors, |count| count >= 1);
    let lines = proxy.log_events("name does not resolve: keeping what is known");
    assert!(lines.iter().all(|line| line["span"]["route"] == "cache"), "{lines:?}");
    let of_orders = [("route", "orders"), ("kind", "lookup")];
    assert_eq!(proxy.metric("aegis_discovery_errors_total", &of_orders), 0);
}

fn kubernetes_and_addresses_are_found_side_by_side(io: Io) {
    let api = KubeApi::start();
    let (pod, cache) = (Backend::named_at("pod", host_ip()), Backend::chronos());
    api.announce("a", pod.address());
    let proxy = two_routes(io, "127.0.0.1:1", &text(&cache))
        .set("KUBECONFIG", api.kubeconfig())
        .set("AEGIS_ORDERS__DISCOVERY", "kubernetes")
        .set("AEGIS_ORDERS__KUBE_SERVICE", "chronos")
        .start();
    let of_orders = proxy.address_of("orders");
    assert_eq!(ask_once(of_orders, "who").unwrap(), "pod");
    assert_eq!(ask_once(proxy.address_of("cache"), "PING").unwrap(), "PONG");
    api.delete_slice("a");
    proxy.wait_for(DISCOVERY_ENDPOINTS, &[("route", "orders")], |count| count == 0);
    assert_eq!(ask_once(proxy.address_of("cache"), "PING").unwrap(), "PONG");
    let next = Backend::named_at("next", host_ip());
    api.announce("b", next.address());
    eventually("the new one serves", PATIENCE, || {
        (ask_once(of_orders, "who").ok()? == "next").then_some(())
    });
}

fn a_drain_is_over_when_the_clients_of_every_route_have_left(io: Io) {
    let (orders, cache) = (Backend::named("orders"), Backend::chronos());
    let mut proxy = two_routes(io, &text(&orders), &text(&cache)).start();
    let [session, client] = ["orders", "cache"].map(|route| connect(proxy.address_of(route)));
    assert_eq!((ask(&session, "who"), ask(&client, "PING")), ("orders".into(), "PONG".into()));
    proxy.terminate();
    // A client between two requests leaves at once, and nobody knows that of a session.
    wait_closed(&client).unwrap();
    assert_eq!(ask(&session, "who"), "orders");
    assert!(proxy.ended().is_none());
    session.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!((&session).read(&mut [0; 1]).unwrap(), 0);
    let ended = eventually("it ends", PATIENCE, || proxy.ended());
    assert!(ended.success(), "{ended:?}");
}

fn two_routes_to_one_server_have_a_limit_of_connections_each(io: Io) {
    let server = Backend::named("server");
    let proxy = Builder::on(io)
        .set("AEGIS_ROUTES", "orders,stock")
        .set("AEGIS_BACKENDS", text(&server))
        .set("AEGIS_ENDPOINT_MAX", "2")
        .set("AEGIS_POOL_MIN_IDLE", "0")
        .set("AEGIS_QUEUE_TIMEOUT", "30s")
        .start();
    let routes = ["orders", "stock"];
    let _clients = routes.map(|route| [(); 3].map(|()| connect(proxy.address_of(route))));
    for route in routes.map(|route| [("route", route)]) {
        proxy.wait_for(CLIENTS_WAITING, &route, |waiting| waiting == 1);
        assert_eq!(proxy.metric(ENDPOINT_CONNECTIONS, &route), 2);
    }
}

#[test]
fn mistakes_name_the_route_and_the_variable_and_what_to_set() {
    let ended = Builder::bare()
        .set("AEGIS_ROUTES", "orders,cache,cache")
        .set("AEGIS_LISTEN", "127.0.0.1:5000")
        .set("AEGIS_STOCK__LISTEN", "127.0.0.1:5001")
        .set("AEGIS_ORDERS__WORKERS", "2")
        .set("AEGIS_CACHE__POOL_MODE", "request")
        .set("AEGIS_ROUTE", "key")
        .run();
    assert_eq!(ended.code, Some(78), "{ended:?}");
    for part in [
        "\"cache\" is there twice",
        "AEGIS_ORDERS__LISTEN=\"127.0.0.1:5000\" and AEGIS_CACHE__LISTEN=\"127.0.0.1:5000\"",
        "AEGIS_ORDERS__WORKERS: it is for the whole process, and no route's own. Set AEGIS_WORKERS",
        "route cache: AEGIS_CACHE__POOL_MODE=\"request\" and AEGIS_PROTOCOL=\"tcp\"",
        "AEGIS_ROUTE: it is gone. For key set AEGIS_BALANCE=key_hash",
    ] {
        assert!(ended.errors.contains(part), "no {part} in {}", ended.errors);
    }
    let unnamed = Builder::bare()
        .set("AEGIS_ROUTES", "orders")
        .set("AEGIS_CACHE__LISTEN", "127.0.0.1:5001")
        .run();
    let told = "AEGIS_CACHE__LISTEN: AEGIS_ROUTES=\"orders\" does not name \"cache\"";
    assert!(unnamed.code == Some(78) && unnamed.errors.contains(told), "{unnamed:?}");
    let folder = std::env::temp_dir();
    let path = |name: &str| format!("unix:{}", folder.join(name).display());
    let up = format!("../{}/aliased", folder.file_name().unwrap().display());
    let aliased = Builder::bare()
        .set("AEGIS_ROUTES", "orders,cache")
        .set("AEGIS_ORDERS__LISTEN", path("aliased"))
        .set("AEGIS_CACHE__LISTEN", path(&up))
        .run();
    let told = "both are the same file. Set another one for each.";
    assert!(aliased.code == Some(78) && aliased.errors.contains(told), "{aliased:?}");
}
