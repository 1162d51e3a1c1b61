//! What is found where several things are wrong at once, where one looks like another, and where nothing is
//! wrong.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use super::diagnosis::{
    LOSSY, Load, WINDOW, are_all, by_request, found, is_over, proxy, start, taking,
};
use super::replies::read_head;
use crate::support::backend::Backend;
use crate::support::client::{try_ask, try_connect};
use crate::support::kube_api::KubeApi;
use crate::support::link::{Fate, Link};
use crate::support::proxy::Proxy;

#[test]
fn a_pool_that_is_too_small_stays_named_while_its_backend_is_slow() {
    let takes = Arc::new(AtomicU64::new(5));
    let backend = taking(&takes);
    let proxy = start(by_request(&backend, "1").set("AEGIS_WORKERS", "1"));
    let _load = Load::asking(8, proxy.address());
    found(&proxy, "pool_small");
    takes.store(100, Relaxed);
    found(&proxy, "backend_slow");
    thread::sleep(2 * WINDOW);
    takes.store(5, Relaxed);
    is_over(&proxy, "backend_slow");
    assert_eq!(proxy.metric("aegis_problem", &[("kind", "pool_small")]), 1);
    assert_eq!(proxy.log_events("problem is over").len(), 1, "only of the backend");
    are_all(&proxy, &["pool_small", "backend_slow"]);
}

#[test]
fn a_backend_that_is_slow_is_named_beside_one_that_refuses() {
    let takes = Arc::new(AtomicU64::new(1));
    let (slow, mut refusing) = (taking(&takes), taking(&takes));
    let proxy = proxy().backends(&[slow.address(), refusing.address()]);
    let proxy = start(proxy.protocol("chronos", "request").set("AEGIS_POOL_SIZE", "16"));
    let _load = Load::asking(4, proxy.address());
    proxy.wait_for("aegis_requests_total", &[("outcome", "answered")], |n| n > 500);
    refusing.kill();
    takes.store(200, Relaxed);
    let words = found(&proxy, "backend_refusing");
    assert!(words.starts_with(&format!("{} refuses: ", refusing.address())), "{words}");
    found(&proxy, "backend_slow");
    are_all(&proxy, &["backend_refusing", "backend_slow"]);
}

#[test]
fn a_network_that_loses_segments_is_named_beside_an_endpoint_that_refuses() {
    let Some(link) = Link::new() else { return };
    let mut servers = [Backend::named_on("a", Link::here()), Backend::named_on("b", Link::here())];
    let hosts = link.hosts(&servers);
    let proxy = start(proxy().backends(&hosts));
    let address = proxy.address();
    let _load = Load::of(8, move || {
        let Ok(client) = try_connect(address) else { return };
        let _ = client.set_read_timeout(Some(Duration::from_secs(2)));
        (0..100).all(|_| try_ask(&client, "some words, again and again").is_ok());
    });
    proxy.wait_for("aegis_first_byte_seconds_count", &[], |n| n > 50);
    link.set(0, LOSSY, Fate::Arrive);
    servers[1].kill();
    let words = found(&proxy, "network_lossy");
    assert!(words.starts_with(&hosts[0].to_string()), "{words}");
    let words = found(&proxy, "backend_refusing");
    assert!(words.contains(&format!("{} refuses", hosts[1])), "{words}");
    are_all(&proxy, &["network_lossy", "backend_refusing"]);
}

#[test]
fn endpoints_that_may_be_old_are_named_beside_one_that_refuses() {
    let mut api = KubeApi::start();
    api.grant();
    let mut backend = Backend::named("db");
    api.announce("a", backend.address());
    let proxy = proxy().kubernetes(&api).set("AEGIS_ENDPOINT_WAIT", "50ms").start();
    proxy.wait_for_endpoints(1);
    let _load = Load::asking(2, proxy.address());
    api.kill();
    backend.kill();
    for kind in ["discovery_stale", "backend_refusing", "no_endpoint"] {
        found(&proxy, kind);
    }
    are_all(&proxy, &["discovery_stale", "backend_refusing", "no_endpoint"]);
}

#[test]
fn clients_that_come_all_at_once_say_nothing_of_a_pool() {
    let backend = taking(&Arc::new(AtomicU64::new(2)));
    let proxy = start(by_request(&backend, "4"));
    let _load = Load::asking(2, proxy.address());
    proxy.wait_for("aegis_requests_total", &[("outcome", "answered")], |n| n > 200);
    for _ in 0..2 {
        let asked = proxy.metric("aegis_requests_total", &[("outcome", "answered")]);
        let address = proxy.address();
        let burst: Vec<_> = (0..100).map_while(|_| try_connect(address).ok()).collect();
        for mut client in &burst {
            client.write_all(b"GET k\n").unwrap();
        }
        proxy.wait_for("aegis_requests_total", &[("outcome", "answered")], |n| n > asked + 100);
        thread::sleep(WINDOW + WINDOW / 5);
    }
    are_all(&proxy, &[]);
}

#[test]
fn a_busy_backend_that_becomes_slow_makes_no_small_pool() {
    let takes = Arc::new(AtomicU64::new(1));
    let backend = taking(&takes);
    let proxy = start(by_request(&backend, "8").set("AEGIS_WORKERS", "1"));
    let _load = Load::asking(12, proxy.address());
    proxy.wait_for("aegis_requests_total", &[("outcome", "answered")], |n| n > 5000);
    takes.store(200, Relaxed);
    found(&proxy, "backend_slow");
    thread::sleep(2 * WINDOW);
    are_all(&proxy, &["backend_slow"]);
}

#[test]
fn clients_that_take_their_time_to_send_say_nothing_of_a_backend() {
    const SIZE: usize = 20_000;
    let uploads = Backend::scripted(|mut stream| {
        while read_head(stream).is_some() && stream.read_exact(&mut vec![0; SIZE]).is_ok() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        }
    });
    let lines = taking(&Arc::new(AtomicU64::new(1)));
    let framed = proxy().backends(&[uploads.address()]).protocol("http1", "request");
    let proxies = [start(framed), start(proxy().backends(&[lines.address()]))];
    let addresses = proxies.each_ref().map(Proxy::address);
    let head = format!("POST / HTTP/1.1\r\nContent-Length: {SIZE}\r\n\r\n");
    let body = [head.into_bytes(), vec![b'x'; SIZE - 1]].concat();
    let slow = |address: SocketAddr, first: Vec<u8>, rest: &'static [u8]| {
        Load::of(12, move || {
            let Ok(mut client) = try_connect(address) else { return };
            let _ = client.write_all(&first);
            // How slow it is is what is tested.
            thread::sleep(Duration::from_millis(1500));
            let _ = client.write_all(rest).map(|()| client.read(&mut [0; 1024]));
        })
    };
    let _loads = [slow(addresses[0], body, b"x"), slow(addresses[1], b"GE".into(), b"T k\n")];
    for proxy in &proxies {
        proxy.wait_for("aegis_first_byte_seconds_count", &[], |n| n > 60);
        are_all(proxy, &[]);
    }
}
