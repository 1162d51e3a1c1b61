//! What one route does to the clients of another: nothing, whatever becomes of it.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect, is_silent, read_line, try_ask, try_connect};
use crate::support::kube_api::{KubeApi, host_ip};
use crate::support::metrics::{ACCEPT_PAUSES, POOL_CONNECTIONS, SESSIONS_ACTIVE};
use crate::support::proxy::Builder;
use crate::support::{Io, PATIENCE, SetOnDrop, eventually, on_both_drivers};

on_both_drivers![
    a_drain_ends_though_clients_of_a_framed_route_come_again_and_again,
    a_client_waits_until_its_own_route_knows_its_endpoints,
    clients_of_one_route_do_not_take_all_places,
    a_route_without_pools_leaves_its_part_to_the_others,
];

/// Nothing comes within this, where nothing is to come.
const QUIET: Duration = Duration::from_millis(300);

/// Where two routes listen. Of the addresses of the loopback interface there are enough for all tests.
fn addresses() -> [SocketAddr; 2] {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    let own = [127, 128 | (high & 63), low, NEXT.fetch_add(1, Relaxed) as u8];
    [8081, 8082].map(|port| SocketAddr::from((own, port)))
}

/// Routes `a` and `b`.
fn two_routes(io: Io) -> (Builder, [SocketAddr; 2]) {
    let [a, b] = addresses();
    let builder = Builder::on(io)
        .set("AEGIS_ROUTES", "a,b")
        .set("AEGIS_A__LISTEN", a.to_string())
        .set("AEGIS_B__LISTEN", b.to_string());
    (builder, [a, b])
}

fn text(backend: &Backend) -> String {
    backend.address().to_string()
}

/// Framed clients that come again as soon as they were asked to leave are not waited for, and the
/// other route has nobody.
fn a_drain_ends_though_clients_of_a_framed_route_come_again_and_again(io: Io) {
    let (opaque, framed) = (Backend::named("a"), Backend::chronos());
    let (builder, [a, b]) = two_routes(io);
    let mut proxy = builder
        .set("AEGIS_A__BACKENDS", text(&opaque))
        .set("AEGIS_B__BACKENDS", text(&framed))
        .set("AEGIS_B__PROTOCOL", "chronos")
        .set("AEGIS_B__POOL_MODE", "request")
        .set("AEGIS_DRAIN_TIMEOUT", "1h")
        .start();
    let session = connect(a);
    assert_eq!(ask(&session, "who"), "a");
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _over = SetOnDrop(&over);
        for _ in 0..8 {
            scope.spawn(|| come_again(&over, b));
        }
        proxy.wait_for(SESSIONS_ACTIVE, &[("route", "b")], |clients| clients == 8);
        proxy.terminate();
        // A session of the other route is waited for.
        assert!(is_silent(&session, QUIET));
        assert_eq!(ask(&session, "who"), "a");
        drop(session);
        proxy.wait_clean(PATIENCE);
    });
}

/// A client that asks until it is sent away, and then comes again.
fn come_again(over: &AtomicBool, address: SocketAddr) {
    while !over.load(Relaxed) {
        let Ok(client) = try_connect(address) else { continue };
        while try_ask(&client, "PING").is_ok() {}
    }
}

/// What a route has not heard it does not know: that there is no endpoint, for one.
fn a_client_waits_until_its_own_route_knows_its_endpoints(io: Io) {
    let backends = [Backend::named("a"), Backend::named_at("b", host_ip())];
    let mut api = KubeApi::start();
    api.announce("b", backends[1].address());
    api.kill();
    let (builder, [a, b]) = two_routes(io);
    let proxy = builder
        .set("AEGIS_A__BACKENDS", text(&backends[0]))
        .set("KUBECONFIG", api.kubeconfig())
        .set("AEGIS_B__KUBE_SERVICE", "chronos")
        .set("AEGIS_START_TIMEOUT", "5m")
        .set("AEGIS_ENDPOINT_WAIT", "0s")
        .launch();
    eventually("the other route serves", PATIENCE, || ask_once(a, "who").ok());
    let waiting: Vec<_> = (0..20).map(|_| connect(b)).collect();
    for mut client in &waiting {
        client.write_all(b"who\n").unwrap();
    }
    assert!(is_silent(&waiting[0], QUIET));
    assert_eq!(ask_once(a, "who").unwrap(), "a");
    assert_eq!(proxy.metric(SESSIONS_ACTIVE, &[("route", "b")]), 0, "they take no places");
    api.restart();
    for client in &waiting {
        assert_eq!(read_line(client).unwrap(), "b");
    }
}

/// However many come by one route, the other one has places.
fn clients_of_one_route_do_not_take_all_places(io: Io) {
    const PLACES: usize = 64;
    let backends = [Backend::named("a"), Backend::named("b")];
    for workers in ["1", "2"] {
        let (builder, [a, b]) = two_routes(io);
        let proxy = builder
            .set("AEGIS_WORKERS", workers)
            .set("AEGIS_MAX_SESSIONS", PLACES.to_string())
            .set("AEGIS_A__BACKENDS", text(&backends[0]))
            .set("AEGIS_B__BACKENDS", text(&backends[1]))
            .without_pool()
            .start();
        let mut crowd: Vec<TcpStream> = (0..2 * PLACES).map(|_| connect(a)).collect();
        for mut client in &crowd {
            client.write_all(b"who\n").unwrap();
        }
        proxy.wait_for(ACCEPT_PAUSES, &[], |pauses| pauses > 0);
        let others: Vec<_> = (0..4).map(|_| connect(b)).collect();
        for client in &others {
            assert_eq!(ask(client, "who"), "b");
        }
        let taken = proxy.metric(SESSIONS_ACTIVE, &[("route", "a")]) as usize;
        assert!((PLACES * 3 / 4..PLACES).contains(&taken), "{taken} of {PLACES} places");
        // And everybody has his turn.
        let mut served = 0;
        while let Some(client) = crowd.pop() {
            // Of those that wait it is not known which comes first.
            if is_silent_now(&client) {
                crowd.insert(0, client);
            } else {
                assert_eq!(read_line(&client).unwrap(), "a");
                served += 1;
            }
        }
        assert_eq!(served, 2 * PLACES);
        for client in &others {
            assert_eq!(ask(client, "who"), "b");
        }
    }
}

fn is_silent_now(client: &TcpStream) -> bool {
    client.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    let silent = client.peek(&mut [0]).is_err();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    silent
}

/// What is reserved for pools is for those that have some.
fn a_route_without_pools_leaves_its_part_to_the_others(io: Io) {
    const IDLE: u64 = 32;
    let backend = Backend::named("a");
    let [a, b] = addresses();
    let [c, d] = addresses();
    let mut builder = Builder::on(io)
        .set("AEGIS_WORKERS", "1")
        .set("AEGIS_ROUTES", "a,b,c,d")
        .set("AEGIS_BACKENDS", text(&backend))
        .without_pool()
        .set("AEGIS_A__POOL_MIN_IDLE", IDLE.to_string())
        .set("AEGIS_A__POOL_MAX_IDLE", IDLE.to_string());
    for (name, address) in [("A", a), ("B", b), ("C", c), ("D", d)] {
        builder = builder.set(&format!("AEGIS_{name}__LISTEN"), address.to_string());
    }
    let proxy = builder.start();
    let idle = [("route", "a"), ("state", "idle")];
    proxy.wait_for(POOL_CONNECTIONS, &idle, |connections| connections == IDLE);
}
