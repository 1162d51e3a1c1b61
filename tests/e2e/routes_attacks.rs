//! What one route does to the clients of another: nothing, whatever becomes of it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use crate::support::backend::Backend;
use crate::support::client::{ask, connect, is_silent, try_ask, try_connect};
use crate::support::metrics::SESSIONS_ACTIVE;
use crate::support::proxy::Builder;
use crate::support::{Io, PATIENCE, SetOnDrop, on_both_drivers};

on_both_drivers![
    a_drain_ends_though_clients_of_a_framed_route_come_again_and_again,
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
            scope.spawn(|| {
                while !over.load(Relaxed) {
                    let Ok(client) = try_connect(b) else { continue };
                    while try_ask(&client, "PING").is_ok() {}
                }
            });
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
