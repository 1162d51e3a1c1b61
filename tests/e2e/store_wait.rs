//! Requests whose store is not usable: they wait for it, and those for other stores pass them.

use std::io::Write;
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, Memory};
use crate::support::client::{ask, connect, is_silent, read_line, reset};
use crate::support::kube_api::{KubeApi, NAMESPACE, Slice, host_ip};
use crate::support::metrics::STORE_PRESENT;
use crate::support::ports;
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    requests_wait_for_their_store_while_those_for_another_pass,
    a_wait_for_a_store_that_is_over_ends_with_its_name,
    requests_wait_for_a_store_that_is_absent,
    a_request_that_waits_goes_where_its_key_goes,
    a_crowd_that_waits_for_one_store_leaves_room_for_those_of_another,
];

const MS: Duration = Duration::from_millis(1);
const QUEUE_DEPTH: &str = "aegis_queue_depth";

fn by_key(io: Io, wait: &str) -> Builder {
    Builder::on(io)
        .protocol("chronos", "request")
        .set("AEGIS_BALANCE", "key_hash")
        .set("AEGIS_WORKERS", "1")
        .set("AEGIS_QUEUE_TIMEOUT", "300ms")
        .set("AEGIS_ENDPOINT_WAIT", wait)
        .pool(0, 4)
}

/// Two stores, and a key of each, which has its own name as its value.
struct Stores {
    servers: [Backend; 2],
    keys: [String; 2],
}

impl Stores {
    /// At ports that nobody else takes while they are down.
    fn at(ip: IpAddr) -> ([Backend; 2], [Memory; 2]) {
        let memories: [Memory; 2] = Default::default();
        let server = |memory| Backend::chronos_on(ports::unused(ip), memory);
        (memories.each_ref().map(server), memories)
    }

    /// Whose keys are whose is asked by this proxy.
    fn behind(proxy: &Proxy, servers: [Backend; 2], memories: &[Memory; 2]) -> Self {
        let client = connect(proxy.address());
        for number in 0..40 {
            assert_eq!(ask(&client, &format!("SET key{number} key{number}")), "OK");
        }
        let key = |memory: &Memory| memory.lock().unwrap().keys().next().cloned();
        let keys = memories.each_ref().map(|memory| key(memory).expect("each has some"));
        Self { servers, keys }
    }

    fn get(&self, store: usize) -> String {
        format!("GET {}\n", self.keys[store])
    }
}

fn refusing(io: Io, wait: &str) -> (Proxy, Stores) {
    let (servers, memories) = Stores::at([127, 0, 0, 2].into());
    let proxy = by_key(io, wait).backends(&servers.each_ref().map(Backend::address)).start();
    let mut stores = Stores::behind(&proxy, servers, &memories);
    stores.servers[0].kill();
    (proxy, stores)
}

fn sends(proxy: &Proxy, requests: &str) -> TcpStream {
    let mut client = connect(proxy.address());
    client.write_all(requests.as_bytes()).unwrap();
    client
}

fn outage_seconds(proxy: &Proxy) -> f64 {
    let metrics = proxy.metrics();
    let samples = metrics.samples().iter();
    samples.filter(|one| one.name == "aegis_outage_seconds_total").map(|one| one.value).sum()
}

fn requests_wait_for_their_store_while_those_for_another_pass(io: Io) {
    let (proxy, mut stores) = refusing(io, "1m");
    let waiting = sends(&proxy, &stores.get(0));
    // Behind its first request, the second of a client waits as well, whoever would serve it.
    let ahead = sends(&proxy, &format!("{}{}", stores.get(0), stores.get(1)));
    let leaving: Vec<_> = (0..5).map(|_| sends(&proxy, &stores.get(0))).collect();
    proxy.wait_for(QUEUE_DEPTH, &[], |waiting| waiting == 7);
    leaving.into_iter().for_each(reset);
    proxy.wait_for(QUEUE_DEPTH, &[], |waiting| waiting == 2);
    // For longer than a connection that is busy is waited for, and than it takes to eject the store.
    assert!(is_silent(&waiting, 1000 * MS) && is_silent(&ahead, MS));
    let other = connect(proxy.address());
    for _ in 0..20 {
        assert_eq!(ask(&other, stores.get(1).trim_end()), stores.keys[1]);
    }
    eventually("it is felt", PATIENCE, || (outage_seconds(&proxy) >= 0.5).then_some(()));
    assert_eq!(proxy.metric(QUEUE_DEPTH, &[]), 2);
    stores.servers[0].start();
    assert_eq!(read_line(&waiting).unwrap(), stores.keys[0]);
    assert_eq!([read_line(&ahead).unwrap(), read_line(&ahead).unwrap()], stores.keys);
    let name = stores.servers[0].address();
    let unusable = proxy.log_field("a store is not usable: its clients wait", "unusable");
    assert_eq!(unusable, format!("{name}: refuses"), "and not the other one");
    eventually("it is over", PATIENCE, || {
        (!proxy.log_events("endpoints are usable again").is_empty()).then_some(())
    });
}

fn a_wait_for_a_store_that_is_over_ends_with_its_name(io: Io) {
    let (proxy, stores) = refusing(io, "700ms");
    let begun = Instant::now();
    let error = format!("ERR store {} is not available", stores.servers[0].address());
    let answer = read_line(&sends(&proxy, &stores.get(0))).unwrap();
    assert!(answer.starts_with(&error), "{answer}");
    assert!(begun.elapsed() >= 700 * MS, "after {:?}", begun.elapsed());
    let answer = read_line(&sends(&proxy, "COMPACT\n")).unwrap();
    let name = stores.servers[0].address();
    assert_eq!(answer, format!("ERR_COMPACT 1 of 2 stores failed, not available: {name}"));
}

fn requests_wait_for_a_store_that_is_absent(io: Io) {
    let api = KubeApi::start();
    api.stateful_set("chronos", 2);
    let (servers, memories) = Stores::at(host_ip());
    let announce = |at: usize, server: &Backend| {
        let name = format!("chronos-{at}");
        api.slice(&name, &Slice::of(server.address().port()).with(&name, host_ip()));
    };
    servers.iter().enumerate().for_each(|(at, server)| announce(at, server));
    let start = |wait| {
        let proxy = by_key(io, wait).kubernetes(&api).set("AEGIS_KUBE_NAMESPACE", NAMESPACE);
        let proxy = proxy.start();
        proxy.wait_for(STORE_PRESENT, &[], |present| present == 2);
        proxy
    };
    let [brief, long] = ["700ms", "1m"].map(start);
    let stores = Stores::behind(&long, servers, &memories);
    api.delete_slice("chronos-0");
    for proxy in [&brief, &long] {
        proxy.wait_for(STORE_PRESENT, &[], |present| present == 1);
    }
    let begun = Instant::now();
    let answer = read_line(&sends(&brief, &stores.get(0))).unwrap();
    assert!(answer.starts_with("ERR store chronos-0 is not available"), "{answer}");
    assert!(begun.elapsed() >= 700 * MS, "after {:?}", begun.elapsed());
    let waiting = sends(&long, &stores.get(0));
    assert!(is_silent(&waiting, 1000 * MS));
    assert_eq!(read_line(&sends(&long, &stores.get(1))).unwrap(), stores.keys[1]);
    announce(0, &stores.servers[0]);
    assert_eq!(read_line(&waiting).unwrap(), stores.keys[0]);
}

fn a_request_that_waits_goes_where_its_key_goes(io: Io) {
    let api = KubeApi::start();
    let memories: [Memory; 3] = Default::default();
    let servers =
        memories.each_ref().map(|memory| Backend::chronos_on((host_ip(), 0).into(), memory));
    let names = ["chronos-0", "chronos-1", "chronos-2"];
    let announce = |at: usize| {
        let port = servers[at].address().port();
        api.slice(names[at], &Slice::of(port).with(names[at], host_ip()));
    };
    let scale = |replicas: usize| api.stateful_set("chronos", replicas);
    scale(3);
    (0..3).for_each(announce);
    let proxy = by_key(io, "1m")
        .set("AEGIS_WORKERS", "32")
        .kubernetes(&api)
        .set("AEGIS_KUBE_NAMESPACE", NAMESPACE)
        .start();
    let present = |count: u64| proxy.wait_for(STORE_PRESENT, &[], |present| present == count);
    let fill = || {
        let client = connect(proxy.address());
        for number in 0..60 {
            assert_eq!(ask(&client, &format!("SET key{number} key{number}")), "OK");
        }
    };
    present(3);
    fill();
    scale(2);
    present(2);
    fill();
    let [first, _, third] = memories.each_ref().map(|memory| memory.lock().unwrap().clone());
    let key = third.keys().find(|key| first.contains_key(*key)).expect("some moved to the first");
    let waits = || {
        let client = sends(&proxy, &format!("GET {key}\nGET {key}\n"));
        proxy.wait_for(QUEUE_DEPTH, &[], |waiting| waiting == 1);
        client
    };
    let answered = |client: TcpStream| {
        assert_eq!([read_line(&client).unwrap(), read_line(&client).unwrap()], [&key[..]; 2]);
    };
    // Its store is away, and is its own no more once there are three.
    api.delete_slice(names[0]);
    present(1);
    let client = waits();
    scale(3);
    answered(client);
    // And back: now the third one is away, and then is none of the stores.
    api.delete_slice(names[2]);
    announce(0);
    present(2);
    let client = waits();
    assert!(is_silent(&client, 500 * MS));
    scale(2);
    answered(client);
    // Without any store it waits for the first that there is.
    scale(0);
    eventually("there is no store", PATIENCE, || {
        let declared = proxy.log_events("the stores that share the keys are declared");
        (declared.last()?["now"] == 0).then_some(())
    });
    let client = waits();
    scale(2);
    answered(client);
}

fn a_crowd_that_waits_for_one_store_leaves_room_for_those_of_another(io: Io) {
    let (servers, memories) = Stores::at([127, 0, 0, 2].into());
    let proxy = by_key(io, "1m")
        .backends(&servers.each_ref().map(Backend::address))
        .set("AEGIS_QUEUE_MAX", "3")
        .start();
    let mut stores = Stores::behind(&proxy, servers, &memories);
    stores.servers.iter_mut().for_each(Backend::kill);
    let crowd: Vec<_> = (0..3).map(|_| sends(&proxy, &stores.get(0))).collect();
    proxy.wait_for(QUEUE_DEPTH, &[], |waiting| waiting == 3);
    let answer = read_line(&sends(&proxy, &stores.get(0))).unwrap();
    assert_eq!(answer, "ERR too many requests wait for a connection");
    let other = sends(&proxy, &stores.get(1));
    proxy.wait_for(QUEUE_DEPTH, &[], |waiting| waiting == 4);
    stores.servers[1].start();
    assert_eq!(read_line(&other).unwrap(), stores.keys[1]);
    stores.servers[0].start();
    for client in &crowd {
        assert_eq!(read_line(client).unwrap(), stores.keys[0]);
    }
}
