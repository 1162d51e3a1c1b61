//! Several stores as one: the key of a request says which of them it goes to.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use crate::support::backend::Backend;
use crate::support::client::{ask, connect};
use crate::support::metrics::ENDPOINT_USABLE;
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, SetOnDrop, eventually, on_both_drivers};

on_both_drivers![
    each_key_has_one_store_whoever_asks,
    a_store_that_is_gone_is_missed_and_not_replaced,
    compact_goes_to_every_store_and_has_one_reply,
    a_request_for_any_store_has_its_turn_among_those_for_one,
];

const KEYS: usize = 60;

fn by_key(io: Io, backends: &[Backend]) -> Proxy {
    let addresses: Vec<_> = backends.iter().map(Backend::address).collect();
    Builder::on(io)
        .backends(&addresses)
        .protocol("chronos", "request")
        .set("AEGIS_BALANCE", "key_hash")
        .set("AEGIS_EJECT_FAILURES", "1")
        .set("AEGIS_EJECT_TIME", "1h")
        .set("AEGIS_ENDPOINT_WAIT", "0s")
        .start()
}

fn each_key_has_one_store_whoever_asks(io: Io) {
    let stores = [(); 3].map(|()| Backend::chronos());
    // Two proxies of two workers each.
    let proxies = [by_key(io, &stores), by_key(io, &stores)];
    let clients: Vec<_> = (0..8).map(|i: usize| connect(proxies[i % 2].address())).collect();
    for i in 0..KEYS {
        assert_eq!(ask(&clients[i % 8], &format!("SET key{i} value {i}")), "OK");
    }
    for (turn, client) in clients.iter().enumerate() {
        for i in 0..KEYS {
            assert_eq!(ask(client, &format!("GET  key{i}\r")), format!("value {i}"), "{turn}");
        }
    }
    // Asked directly, each store has its own part.
    let parts = stores.each_ref().map(|store| {
        let client = connect(store.address());
        let has = |i: &usize| ask(&client, &format!("GET key{i}")) != "NULL";
        (0..KEYS).filter(has).collect::<HashSet<_>>()
    });
    assert_eq!(parts.iter().map(HashSet::len).sum::<usize>(), KEYS, "no key is in two");
    assert!(parts.iter().all(|part| part.len() > KEYS / 10), "{parts:?}");
    assert_eq!(ask(&clients[0], "PING"), "PONG");
    assert_eq!(ask(&clients[0], "DEL key0"), "OK_DELETED");
    assert_eq!(ask(&clients[7], "GET key0"), "NULL");
}

fn a_store_that_is_gone_is_missed_and_not_replaced(io: Io) {
    let mut stores = [(); 3].map(|()| Backend::chronos());
    let proxy = by_key(io, &stores);
    let client = connect(proxy.address());
    for i in 0..KEYS {
        assert_eq!(ask(&client, &format!("SET key{i} value {i}")), "OK");
    }
    stores[1].kill();
    proxy.wait_for(ENDPOINT_USABLE, &[], |usable| usable == 2);
    let mut missed = 0;
    for i in 0..KEYS {
        let answer = ask(&client, &format!("GET key{i}"));
        if answer != format!("value {i}") {
            assert!(answer.starts_with("ERR "), "key{i}: {answer}");
            missed += 1;
        }
    }
    assert!((1..KEYS).contains(&missed), "{missed} of {KEYS}");
    assert_eq!(ask(&client, "PING"), "PONG", "which any store answers");
    stores[1].start();
    eventually("the store is back", PATIENCE, || {
        let has = |i: usize| ask(&client, &format!("GET key{i}")) == format!("value {i}");
        (0..KEYS).all(has).then_some(())
    });
}

fn compact_goes_to_every_store_and_has_one_reply(io: Io) {
    let compacted: [Arc<AtomicU64>; 3] = Default::default();
    let answers = ["OK_COMPACTED\n", "OK_COMPACTED\n", "ERR_COMPACT disk full\n"];
    let store = |i: usize| {
        let compacted = Arc::clone(&compacted[i]);
        Backend::scripted(move |mut stream| {
            let mut buffer = [0; 512];
            while let Ok(1..) = stream.read(&mut buffer) {
                compacted.fetch_add(1, Relaxed);
                let _ = stream.write_all(answers[i].as_bytes());
            }
        })
    };
    let stores: Vec<_> = (0..3).map(store).collect();
    let counts = || compacted.each_ref().map(|count| count.load(Relaxed));

    let proxy = by_key(io, &stores[..2]);
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "COMPACT"), "OK_COMPACTED");
    assert_eq!(ask(&client, "compact"), "OK_COMPACTED");
    assert_eq!(counts(), [2, 2, 0]);

    let proxy = by_key(io, &stores);
    let client = connect(proxy.address());
    let failed = "ERR_COMPACT 1 of 3 stores failed, the first with: ERR_COMPACT disk full";
    assert_eq!(ask(&client, "COMPACT"), failed);
    assert_eq!(counts(), [3, 3, 1]);
}

fn a_request_for_any_store_has_its_turn_among_those_for_one(io: Io) {
    let store = Backend::chronos();
    let proxy = Builder::on(io)
        .backends(&[store.address()])
        .set("AEGIS_WORKERS", "1")
        .protocol("chronos", "request")
        .set("AEGIS_POOL_SIZE", "1")
        .set("AEGIS_BALANCE", "key_hash")
        .start();
    // So many that there is always one that waits for the only connection.
    let (stop, asking) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let _stopping = SetOnDrop(&stop);
        for _ in 0..8 {
            scope.spawn(|| {
                let client = connect(proxy.address());
                while !stop.load(Relaxed) {
                    assert_eq!(ask(&client, "GET key"), "NULL");
                    asking.fetch_add(1, Relaxed);
                }
            });
        }
        eventually("they ask", PATIENCE, || (asking.load(Relaxed) > 100).then_some(()));
        let client = connect(proxy.address());
        for _ in 0..20 {
            assert_eq!(ask(&client, "PING"), "PONG");
        }
    });
}
