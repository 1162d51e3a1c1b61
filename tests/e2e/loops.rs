//! Backends that are the proxy itself.

use std::net::{Ipv4Addr, SocketAddr};

use crate::support::backend::Backend;
use crate::support::client::{ask, connect};
use crate::support::kube_api::host_ip;
use crate::support::metrics::{DISCOVERY_ENDPOINTS, DISCOVERY_ERRORS, SESSIONS_OPENED};
use crate::support::proxy::{Builder, Proxy};
use crate::support::sandbox::{Hosts, can_have_network};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers, ports, skip};

on_both_drivers![
    a_backend_that_is_the_proxy_itself_is_left_out,
    nothing_but_the_proxy_itself_holds_the_start,
    a_name_that_comes_to_be_the_proxy_itself_is_left_out,
    a_server_beside_the_proxy_is_none_of_it,
    no_connection_is_its_own_backend,
];

/// Another address of the loopback interface than connections come from, each of which takes a port.
const APART: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);

fn listening(io: Io, listen: &str, port: u16) -> Builder {
    Builder::on(io)
        .set("AEGIS_LISTEN", listen.replace("PORT", &port.to_string()))
        .set("AEGIS_MAX_SESSIONS", "200")
        .pool(2, 8)
}

/// The proxy has nothing to do with itself, and says why.
fn assert_left_out(proxy: &Proxy, address: &str) {
    let left_out = eventually("it is left out", PATIENCE, || {
        let backends = proxy.get("/backends").json();
        Some(backends["left_out"].as_array()?.first()?.clone())
    });
    let why = left_out["why"].as_str().unwrap();
    assert!(why.contains("is this proxy itself"), "{why}");
    assert_eq!(left_out["address"], address);
    let count = proxy.get("/backends").json()["left_out"].as_array().unwrap().len();
    let told = eventually("it is logged, once each", PATIENCE, || {
        let told = proxy.log_events(
            "left out of service: it is this proxy itself, and would be given its own connections \
             as clients: name the server, or choose another address in AEGIS_LISTEN",
        );
        (told.len() == count).then_some(told)
    });
    assert!(told.iter().all(|event| event["level"] == "ERROR"), "{told:?}");
    proxy.wait_for(DISCOVERY_ERRORS, &[("kind", "loop")], |counted| counted == count as u64);
    proxy.wait_for(DISCOVERY_ENDPOINTS, &[], |endpoints| endpoints == 0);
    eventually("it is not ready, and says why", PATIENCE, || {
        let ready = proxy.get("/readyz");
        (ready.status == 503 && ready.body.contains("this proxy itself")).then_some(())
    });
}

fn a_backend_that_is_the_proxy_itself_is_left_out(io: Io) {
    let [loopback, any, both] = ["127.0.0.1:PORT", "0.0.0.0:PORT", "127.0.0.1:PORT,[::1]:PORT"];
    let launch = |listen, host: &str, address: String, hosts: Option<&Hosts>| {
        let port = ports::unused(Ipv4Addr::UNSPECIFIED.into()).port();
        let proxy = listening(io, listen, port).set("AEGIS_BACKENDS", format!("{host}:{port}"));
        let proxy = hosts.into_iter().fold(proxy, Builder::hosts).launch();
        assert_left_out(&proxy, &format!("{address}:{port}"));
        assert_eq!(proxy.metric(SESSIONS_OPENED, &[]), 0, "{listen}, {address}");
    };
    let own = host_ip().to_string();
    launch(both, "localhost", "127.0.0.1".to_owned(), None);
    launch(any, &own, own.clone(), None);
    // Where these are plain in the configuration, they are refused.
    if let Some(hosts) = Hosts::new() {
        for (listen, ip) in [(loopback, "0.0.0.0"), (loopback, "::ffff:127.0.0.1"), (both, "::")] {
            hosts.set(&[("db.test", &[ip.parse().unwrap()])]);
            let address = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
            launch(listen, "db.test", address, Some(&hosts));
        }
    }
    // The admin port is no backend either.
    let port = ports::unused(Ipv4Addr::UNSPECIFIED.into()).port();
    let proxy = Builder::on(io)
        .set("AEGIS_ADMIN", format!("[::]:{port}"))
        .set("AEGIS_BACKENDS", format!("127.0.0.1:{port}"))
        .launch();
    assert_left_out(&proxy, &format!("127.0.0.1:{port}"));
}

fn nothing_but_the_proxy_itself_holds_the_start(io: Io) {
    let Some(hosts) = Hosts::new() else { return skip("no mount namespace is allowed") };
    let server = Backend::named("a");
    let port = server.address().port();
    hosts.set(&[("db.test", &[APART.into()])]);
    let launch = || {
        let proxy = listening(io, "127.0.0.3:PORT", port)
            .hosts(&hosts)
            .set("AEGIS_BACKENDS", format!("db.test:{port}"))
            .set("AEGIS_DNS_REFRESH", "100ms")
            .set("AEGIS_START_TIMEOUT", "0s")
            .launch();
        assert_left_out(&proxy, &format!("127.0.0.3:{port}"));
        let start = proxy.get("/startupz?wait=0");
        let parts = ["no endpoint is left: db.test:", "is this proxy itself"];
        assert!(parts.iter().all(|part| start.body.contains(part)), "{}", start.body);
        assert_eq!((start.status, proxy.get("/livez").status), (503, 200));
        (proxy, start.body)
    };
    let (mut held, why) = launch();
    held.terminate();
    assert_eq!(held.wait(PATIENCE).code(), Some(78));
    eventually("its last line is the reason", PATIENCE, || {
        let last = format!("aegis-proxy: {}", why.trim());
        (held.log_lines().last()? == &last).then_some(())
    });

    let (mended, _) = launch();
    hosts.set(&[("db.test", &[APART.into(), server.address().ip()])]);
    eventually("it starts", PATIENCE, || (mended.get("/startupz").status == 200).then_some(()));
    assert_eq!(ask(&connect(mended.address()), "who"), "a");
}

fn a_name_that_comes_to_be_the_proxy_itself_is_left_out(io: Io) {
    let Some(hosts) = Hosts::new() else { return skip("no mount namespace is allowed") };
    let server = Backend::named("a");
    let port = server.address().port();
    hosts.set(&[("db.test", &[server.address().ip()])]);
    let proxy = listening(io, "127.0.0.3:PORT", port)
        .hosts(&hosts)
        .set("AEGIS_BACKENDS", format!("db.test:{port}"))
        .set("AEGIS_DNS_REFRESH", "100ms")
        .start();
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "who"), "a");
    let opened = proxy.metric(SESSIONS_OPENED, &[]);
    hosts.set(&[("db.test", &[APART.into()])]);
    assert_left_out(&proxy, &format!("127.0.0.3:{port}"));
    assert_eq!(ask(&client, "who"), "a");
    assert_eq!(proxy.metric(SESSIONS_OPENED, &[]), opened);
    hosts.set(&[("db.test", &[server.address().ip()])]);
    proxy.wait_for(DISCOVERY_ENDPOINTS, &[], |count| count == 1);
    assert_eq!(ask(&connect(proxy.address()), "who"), "a");
}

fn a_server_beside_the_proxy_is_none_of_it(io: Io) {
    // The same port, at another address of the host.
    let server = Backend::named_at("a", host_ip());
    let port = server.address().port();
    let proxy =
        listening(io, "127.0.0.1:PORT,[::1]:PORT", port).backends(&[server.address()]).start();
    assert_eq!(ask(&connect(proxy.address()), "who"), "a");
    // Another port, at any.
    let proxy = listening(io, "0.0.0.0:PORT", 0).backends(&[server.address()]).start();
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, proxy.address().port()));
    assert_eq!(ask(&connect(to), "who"), "a");
}

/// The kernel may give a connection the very port that it is to connect to, where nobody listens
/// there: it is connected to itself then, and echoes whatever it is sent.
fn no_connection_is_its_own_backend(io: Io) {
    // One port to give and to connect to, so that it happens each time.
    let give = "ip link set lo up && echo 40000 40001 > /proc/sys/net/ipv4/ip_local_port_range";
    if !can_have_network(give) {
        return skip("no network namespace is allowed");
    }
    let proxy = Builder::on(io)
        .set("AEGIS_LISTEN", "127.0.0.1:8081")
        .set("AEGIS_ADMIN", "127.0.0.1:8082")
        .set("AEGIS_BACKENDS", "127.0.0.1:40000")
        .set("AEGIS_WORKERS", "1")
        .pool(1, 1)
        .in_network(give)
        .launch();
    eventually("it is noticed", PATIENCE, || {
        let ejected = proxy.log_events("ejected").pop()?;
        (ejected["error"] == "its address leads back to this proxy itself").then_some(())
    });
}
