//! Endpoints of the own zone, and of the own region: preferred, or used alone until they are gone.

use std::time::{Duration, Instant};

use crate::kubernetes::{backends, on, who};
use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect};
use crate::support::kube_api::{KubeApi, Slice};
use crate::support::metrics::{CONNECT_RETRIES, SPILLOVERS};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    local_endpoints_are_preferred_until_they_are_gone,
    the_own_zone_is_left_for_its_region_and_that_for_others_and_back_after_a_while,
    no_client_tries_whether_an_endpoint_that_joins_the_own_zone_is_well,
];

fn local_endpoints_are_preferred_until_they_are_gone(io: Io) {
    let api = KubeApi::start();
    let servers = backends(&["near", "far"]);
    let place = |name: &str, server: &Backend, zone: &str| {
        let address = server.address();
        let slice = Slice::of(address.port()).with(name, address.ip()).at("node", zone);
        api.slice(name, &slice);
    };
    place("near", &servers[0], "z1");
    place("far", &servers[1], "z2");
    let proxy = on(io, &api).set("AEGIS_LOCALITY", "zone").set("AEGIS_ZONE", "z1").start();
    proxy.wait_for_endpoints(2);
    assert_eq!(who(&proxy), ["near"]);
    assert_eq!(proxy.metric(SPILLOVERS, &[]), 0);
    // Too loaded: a session more than the far one would be far behind.
    let held: Vec<_> = (0..60).map(|_| connect(proxy.address())).collect();
    let by: Vec<_> = held.iter().map(|client| ask(client, "who")).collect();
    assert!(by.iter().any(|who| who == "far"), "all on the near one");
    assert!(proxy.metric(SPILLOVERS, &[("reason", "loaded")]) > 0);
    drop(held);
    api.delete_slice("near");
    proxy.wait_for_endpoints(1);
    assert_eq!(who(&proxy), ["far"]);
    assert!(proxy.metric(SPILLOVERS, &[("reason", "few")]) >= 40);
}

fn the_own_zone_is_left_for_its_region_and_that_for_others_and_back_after_a_while(io: Io) {
    let api = KubeApi::start();
    let servers = backends(&["zone", "region", "elsewhere"]);
    let place = |at: usize| {
        let (name, zone) = [("zone", "eu-1a"), ("region", "eu-1b"), ("elsewhere", "us-2a")][at];
        let address = servers[at].address();
        api.slice(name, &Slice::of(address.port()).with(name, address.ip()).at("node", zone));
    };
    (0..3).for_each(place);
    let proxy = on(io, &api)
        .set("AEGIS_LOCALITY", "failover")
        .set("AEGIS_ZONE", "eu-1a")
        .set("AEGIS_REGION", "eu-1")
        .set("AEGIS_FAILBACK_TIME", "1s")
        .start();
    proxy.wait_for_endpoints(3);
    // However many sessions there are.
    let held: Vec<_> = (0..40).map(|_| connect(proxy.address())).collect();
    assert!(held.iter().all(|client| ask(client, "who") == "zone"));
    api.delete_slice("zone");
    proxy.wait_for_endpoints(2);
    assert_eq!(who(&proxy), ["region"]);
    api.delete_slice("region");
    proxy.wait_for_endpoints(1);
    assert_eq!(who(&proxy), ["elsewhere"]);
    assert!(held.iter().all(|client| ask(client, "who") == "zone"), "sessions stay");
    let returned = Instant::now();
    place(0);
    eventually("the zone is used again", PATIENCE, || {
        (ask_once(proxy.address(), "who").unwrap() == "zone").then_some(())
    });
    assert!(returned.elapsed() >= Duration::from_secs(1), "after {:?}", returned.elapsed());
}

fn no_client_tries_whether_an_endpoint_that_joins_the_own_zone_is_well(io: Io) {
    let api = KubeApi::start();
    let mut servers = backends(&["zone", "region"]);
    let place = |name: &str, server: &Backend, zone: &str| {
        let address = server.address();
        api.slice(name, &Slice::of(address.port()).with(name, address.ip()).at("node", zone));
    };
    servers[0].kill();
    place("region", &servers[1], "eu-1b");
    let proxy = on(io, &api)
        .without_pool()
        .set("AEGIS_LOCALITY", "failover")
        .set("AEGIS_ZONE", "eu-1a")
        .set("AEGIS_REGION", "eu-1")
        .set("AEGIS_FAILBACK_TIME", "200ms")
        .set("AEGIS_EJECT_TIME", "100ms")
        .start();
    proxy.wait_for_endpoints(1);
    assert_eq!(who(&proxy), ["region"]);
    place("zone", &servers[0], "eu-1a");
    eventually("it has refused each of the two workers", PATIENCE, || {
        assert_eq!(who(&proxy), ["region"]);
        let of_zone = [("endpoint", "zone")];
        (proxy.metric("aegis_endpoint_ejections_total", &of_zone) >= 2).then_some(())
    });
    assert_eq!(proxy.metric(CONNECT_RETRIES, &[]), 0);
    servers[0].start();
    eventually("it is used", PATIENCE, || (who(&proxy) == ["zone"]).then_some(()));
    assert_eq!(proxy.metric(CONNECT_RETRIES, &[]), 0);
}
