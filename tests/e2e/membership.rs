//! Endpoints that leave and come back, and stores that are away.

use std::net::{IpAddr, SocketAddr};

use crate::support::backend::Backend;
use crate::support::client::{ask, connect, wait_closed};
use crate::support::kube_api::{KubeApi, Slice, host_ip};
use crate::support::metrics::{DISCOVERY_ENDPOINTS, ENDPOINT_CONNECTS, POOL_CONNECTIONS};
use crate::support::proxy::{Builder, Hosts, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers, skip};

on_both_drivers![
    a_slice_that_is_rewritten_disturbs_nothing,
    an_answer_with_a_part_of_the_addresses_disturbs_nothing,
];

/// Whose session a new client gets.
fn client_of(proxy: &Proxy, name: &str) -> std::net::TcpStream {
    eventually(&format!("a session on {name}"), PATIENCE, || {
        let client = connect(proxy.address());
        (ask(&client, "who") == name).then_some(client)
    })
}

fn wait_for_endpoints(proxy: &Proxy, count: u64) {
    proxy.wait_for(DISCOVERY_ENDPOINTS, &[], |found| found == count);
    eventually("every worker has applied it", PATIENCE, || {
        let backends = proxy.get("/backends").json();
        let applied = backends["applied_generations"].as_array()?;
        applied.iter().all(|g| *g == backends["generation"]).then_some(())
    });
}

/// Has `endpoint` leave and return several times, with a session on it, and then leave for good.
fn leaves_and_returns(proxy: &Proxy, server: &Backend, endpoint: &str, set_present: impl Fn(bool)) {
    let of = [("endpoint", endpoint)];
    let client = client_of(proxy, "b");
    let idle = [("endpoint", endpoint), ("state", "idle")];
    proxy.wait_for(POOL_CONNECTIONS, &idle, |idle| idle == 4);
    let (accepted, connects) = (server.accepted(), proxy.metric(ENDPOINT_CONNECTS, &of));
    assert!(accepted >= 5 && connects == accepted, "{accepted} accepted, {connects} counted");
    for _ in 0..3 {
        set_present(false);
        wait_for_endpoints(proxy, 1);
        assert_eq!(ask(&client, "who"), "b", "it is cut");
        set_present(true);
        wait_for_endpoints(proxy, 2);
        assert_eq!(ask(&client, "who"), "b", "it is cut");
        assert_eq!(proxy.metric(ENDPOINT_CONNECTS, &of), connects, "counted from the start again");
    }
    assert_eq!(proxy.metric(POOL_CONNECTIONS, &idle), 4);
    assert_eq!(server.accepted(), accepted, "its pools were made anew");
    let another = client_of(proxy, "b");
    assert_eq!(ask(&client, "who"), "b");

    set_present(false);
    wait_for_endpoints(proxy, 1);
    wait_closed(&client).unwrap();
    wait_closed(&another).unwrap();
    eventually("all connections to it are closed", PATIENCE, || (server.open() == 0).then_some(()));
    // However long it was away, it is counted on.
    set_present(true);
    wait_for_endpoints(proxy, 2);
    assert!(proxy.metric(ENDPOINT_CONNECTS, &of) >= connects);
    client_of(proxy, "b");
}

fn on(io: Io) -> Builder {
    Builder::on(io)
        .set("AEGIS_BALANCE", "round_robin")
        .set("AEGIS_BACKEND_DRAIN", "0s")
        .set("AEGIS_SLOW_START", "off")
        .pool(2, 2)
}

fn a_slice_that_is_rewritten_disturbs_nothing(io: Io) {
    let api = KubeApi::start();
    let servers = ["a", "b"].map(|name| Backend::named_at(name, host_ip()));
    let announce = |i: usize, present| {
        let address = servers[i].address();
        let pod = format!("pod-{}", ["a", "b"][i]);
        let slice = Slice::of(address.port());
        api.slice(&pod, &if present { slice.with(&pod, address.ip()) } else { slice });
    };
    announce(0, true);
    announce(1, true);
    let proxy =
        on(io).set("KUBECONFIG", api.kubeconfig()).set("AEGIS_KUBE_SERVICE", "chronos").start();
    wait_for_endpoints(&proxy, 2);
    leaves_and_returns(&proxy, &servers[1], "pod-b", |present| announce(1, present));
}

fn an_answer_with_a_part_of_the_addresses_disturbs_nothing(io: Io) {
    let Some(hosts) = Hosts::new() else { return skip("no mount namespace is allowed") };
    let a = Backend::named("a");
    let port = a.address().port();
    let other = IpAddr::from([127, 0, 0, 3]);
    let b = Backend::named_on("b", SocketAddr::new(other, port));
    let both = [a.address().ip(), other];
    hosts.set(&[("db.test", &both)]);
    let proxy = on(io)
        .hosts(&hosts)
        .set("AEGIS_BACKENDS", format!("db.test:{port}"))
        .set("AEGIS_DNS_REFRESH", "100ms")
        .start();
    wait_for_endpoints(&proxy, 2);
    leaves_and_returns(&proxy, &b, &format!("db.test:{port}@127.0.0.3"), |present| {
        hosts.set(&[("db.test", if present { &both } else { &both[..1] })]);
    });
}
