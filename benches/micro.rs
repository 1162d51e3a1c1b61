//! What the data plane does most often, one thing at a time.
#![allow(missing_docs)]

use std::time::{Duration, Instant};

use aegis::config::{Balance, PoolConfig};
use aegis::io::buffers::Buffers;
use aegis::io::{Chain, ConnId};
use aegis::metrics::{Counter, Histogram};
use aegis::protocol::http1::{Method, RequestScanner, ResponseScanner};
use aegis::protocol::proxy_header::{Addresses, HEADER_MAX, write_v1, write_v2};
use aegis::proxy::WorkerId;
use aegis::proxy::balance::Table;
use aegis::proxy::endpoints::{Endpoint, EndpointId, EndpointSnapshot};
use aegis::slab::Slab;
use aegis::worker::timers::Timers;
use divan::{Bencher, black_box};

fn main() {
    divan::main();
}

#[divan::bench]
fn slab_insert_and_remove(bencher: Bencher) {
    let mut slab: Slab<_> = Slab::with_capacity(10_000);
    let _kept: Vec<_> = (0..5_000).map(|i| slab.insert(i)).collect();
    bencher.bench_local(|| slab.insert(black_box(7)).map(|key| slab.remove(key)));
}

#[divan::bench]
fn buffer_through_a_queue(bencher: Bencher) {
    let Ok(mut buffers) = Buffers::new(64) else { return };
    bencher.bench_local(|| {
        let mut queue = Chain::default();
        if let Some(mut buf) = buffers.take() {
            buffers.set_len(&mut buf, black_box(64));
            buffers.push(&mut queue, buf);
        }
        buffers.advance(&mut queue, 64);
    });
}

#[divan::bench]
fn pool_enter_and_refill(bencher: Bencher) {
    let config = PoolConfig {
        endpoint_max: None,
        mode: aegis::config::PoolMode::Preconnect,
        size: 16,
        min_idle: 32,
        max_idle: 64,
        idle_timeout: None,
        max_lifetime: None,
    };
    let now = Instant::now();
    let endpoint = Endpoint::new("one", std::net::SocketAddr::from(([127, 0, 0, 1], 1)).into(), 1);
    let snapshot = EndpointSnapshot {
        generation: 1,
        endpoints: vec![endpoint],
        ..EndpointSnapshot::default()
    };
    let (mut table, mut rng) =
        (Table::new(Balance::RoundRobin, WorkerId::new(0), 0), fastrand::Rng::with_seed(1));
    table.apply(&snapshot, &config, false, now);
    let one = EndpointId::at(0);
    let mut connect = |table: &mut Table, conn| {
        table.start(one);
        table.connected(one, conn, false, now, &mut rng)
    };
    (0..32).for_each(|number| assert!(connect(&mut table, ConnId::from_parts(number, 0))));
    bencher.bench_local(|| {
        let conn = table.enter(one, black_box(now));
        table.get_mut(one).map(|entry| black_box(entry.pool.shortage(64, black_box(now))));
        table.leave(one);
        conn.map(|(conn, _)| connect(&mut table, conn))
    });
}

#[divan::bench]
fn timer_set_and_clear(bencher: Bencher) {
    let start = Instant::now();
    let mut timers = Timers::new(10_000, start);
    (0..5_000).for_each(|slot| timers.set(slot, start + Duration::from_secs(slot as u64 % 60)));
    bencher.bench_local(|| {
        timers.set(7_000, black_box(start + Duration::from_secs(1)));
        timers.clear(7_000);
    });
}

#[divan::bench]
fn timers_next(bencher: Bencher) {
    let start = Instant::now();
    let mut timers = Timers::new(10, start);
    timers.set(1, start + Duration::from_secs(5));
    bencher.bench_local(|| black_box(&timers).next());
}

#[divan::bench]
fn counter_add(bencher: Bencher) {
    let counter = Counter::default();
    bencher.bench_local(|| black_box(&counter).add(64));
}

#[divan::bench]
fn histogram_record(bencher: Bencher) {
    let histogram = Histogram::default();
    bencher.bench_local(|| histogram.record(black_box(Duration::from_micros(730))));
}

#[divan::bench]
fn proxy_header_v1(bencher: Bencher) {
    let address = std::net::SocketAddr::from(([10, 1, 2, 3], 54_321));
    let addresses = Some(Addresses { source: address, destination: address });
    bencher.bench_local(|| write_v1(&mut [0; HEADER_MAX], black_box(addresses)));
}

#[divan::bench]
fn proxy_header_v2(bencher: Bencher) {
    let address = std::net::SocketAddr::from(([10, 1, 2, 3], 54_321));
    let addresses = Some(Addresses { source: address, destination: address });
    bencher.bench_local(|| write_v2(&mut [0; HEADER_MAX], black_box(addresses)));
}

#[divan::bench]
fn http1_request_and_response(bencher: Bencher) {
    const REQUEST: &[u8] = b"GET /items/42 HTTP/1.1\r\nHost: example.com\r\nUser-Agent: bench\r\n\
        Accept: */*\r\nConnection: keep-alive\r\n\r\n";
    const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\
        Content-Length: 5\r\n\r\nhello";
    let (mut requests, mut responses) = (RequestScanner::new(), ResponseScanner::new());
    bencher.bench_local(|| {
        let request = requests.scan(black_box(REQUEST));
        responses.begin(Method::Get);
        (request, responses.scan(black_box(RESPONSE)))
    });
}
