//! Endpoints that leave and come back, and stores that are away.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use crate::support::backend::{Backend, Memory};
use crate::support::client::{ask, connect, wait_closed};
use crate::support::kube_api::{KubeApi, NAMESPACE, Slice, host_ip};
use crate::support::metrics::{ENDPOINT_CONNECTS, POOL_CONNECTIONS, STORE_PRESENT};
use crate::support::proxy::{Builder, Proxy};
use crate::support::sandbox::Hosts;
use crate::support::{Io, PATIENCE, SetOnDrop, eventually, on_both_drivers, skip};

on_both_drivers![
    a_slice_that_is_rewritten_disturbs_nothing,
    an_answer_with_a_part_of_the_addresses_disturbs_nothing,
    connections_that_requests_share_outlive_a_rewritten_slice,
    a_listed_store_that_is_down_is_named_and_not_replaced,
    a_name_is_one_store_whatever_its_address,
    a_name_of_several_servers_is_no_store,
    the_ordinals_of_a_stateful_set_are_the_stores_whoever_is_there,
    no_acknowledged_write_is_lost_in_a_rolling_restart,
    pods_that_are_counted_are_the_stores_without_a_stateful_set,
    nothing_starts_without_a_membership,
];

/// Whose session a new client gets.
fn client_of(proxy: &Proxy, name: &str) -> TcpStream {
    eventually(&format!("a session on {name}"), PATIENCE, || {
        let client = connect(proxy.address());
        (ask(&client, "who") == name).then_some(client)
    })
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
        proxy.wait_for_endpoints(1);
        assert_eq!(ask(&client, "who"), "b", "it is cut");
        set_present(true);
        proxy.wait_for_endpoints(2);
        assert_eq!(ask(&client, "who"), "b", "it is cut");
        assert_eq!(proxy.metric(ENDPOINT_CONNECTS, &of), connects, "counted from the start again");
    }
    assert_eq!(proxy.metric(POOL_CONNECTIONS, &idle), 4);
    assert_eq!(server.accepted(), accepted, "its pools were made anew");
    let another = client_of(proxy, "b");
    assert_eq!(ask(&client, "who"), "b");

    set_present(false);
    proxy.wait_for_endpoints(1);
    wait_closed(&client).unwrap();
    wait_closed(&another).unwrap();
    eventually("all connections to it are closed", PATIENCE, || (server.open() == 0).then_some(()));
    // However long it was away, it is counted on.
    set_present(true);
    proxy.wait_for_endpoints(2);
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
    let proxy = on(io).kubernetes(&api).start();
    proxy.wait_for_endpoints(2);
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
    proxy.wait_for_endpoints(2);
    leaves_and_returns(&proxy, &b, &format!("db.test:{port}@127.0.0.3"), |present| {
        hosts.set(&[("db.test", if present { &both } else { &both[..1] })]);
    });
}

fn connections_that_requests_share_outlive_a_rewritten_slice(io: Io) {
    let api = KubeApi::start();
    let servers =
        [(); 2].map(|()| Backend::chronos_on(SocketAddr::new(host_ip(), 0), &Memory::default()));
    let announce = |i: usize, present| {
        let (address, pod) = (servers[i].address(), format!("pod-{i}"));
        let slice = Slice::of(address.port());
        api.slice(&pod, &if present { slice.with(&pod, address.ip()) } else { slice });
    };
    announce(0, true);
    announce(1, true);
    let proxy = on(io)
        .kubernetes(&api)
        .set("AEGIS_WORKERS", "1")
        .pool(2, 2)
        .protocol("chronos", "request")
        .start();
    proxy.wait_for_endpoints(2);
    let client = connect(proxy.address());
    let ask_all = || (0..8).for_each(|_| assert_eq!(ask(&client, "PING"), "PONG"));
    ask_all();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle == 4);
    let accepted = servers[1].accepted();
    for _ in 0..3 {
        announce(1, false);
        proxy.wait_for_endpoints(1);
        ask_all();
        announce(1, true);
        proxy.wait_for_endpoints(2);
        ask_all();
    }
    assert_eq!(servers[1].accepted(), accepted, "its pool was made anew");
}

const KEYS: usize = 60;

/// By key, where nobody waits for a store that is away.
fn by_key(builder: Builder) -> Builder {
    let builder = builder.protocol("chronos", "request").set("AEGIS_BALANCE", "key_hash");
    builder.pool(0, 4).set("AEGIS_ENDPOINT_WAIT", "0s")
}

/// Stores, as far as the test sees them.
struct Stores {
    names: Vec<String>,
    memories: Vec<Memory>,
}

impl Stores {
    fn new(names: &[&str]) -> Self {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        Self { memories: names.iter().map(|_| Memory::default()).collect(), names }
    }

    /// Which keys each has.
    fn keys(&self) -> Vec<Vec<String>> {
        let keys = |memory: &Memory| {
            let mut keys: Vec<_> = memory.lock().unwrap().keys().cloned().collect();
            keys.sort_unstable();
            keys
        };
        self.memories.iter().map(keys).collect()
    }

    /// Writes all keys, where each has to go to the store that had it before.
    fn fill(&self, client: &TcpStream, value: &str) -> Vec<Vec<String>> {
        for i in 0..KEYS {
            assert_eq!(ask(client, &format!("SET key{i} {value}")), "OK");
        }
        self.keys()
    }

    /// Reads and writes all keys while some stores are away: their keys get an error that names
    /// the store, and nothing of them reaches another one.
    fn check_away(&self, client: &TcpStream, away: &[usize], before: &[Vec<String>]) {
        for i in 0..KEYS {
            let key = format!("key{i}");
            let owner = before.iter().position(|keys| keys.contains(&key)).unwrap();
            for request in [format!("SET {key} late"), format!("GET {key}")] {
                let answer = ask(client, &request);
                if away.contains(&owner) {
                    let error = format!("ERR store {} is not available", self.names[owner]);
                    assert!(answer.starts_with(&error), "{request}: {answer}");
                } else {
                    assert!(["OK", "late"].contains(&&*answer), "{request}: {answer}");
                }
            }
        }
        assert_eq!(self.keys(), before, "keys have moved");
        assert_eq!(ask(client, "PING"), "PONG", "which any store answers");
        let names: Vec<_> = away.iter().map(|&i| self.names[i].as_str()).collect();
        let all = self.names.len();
        assert_eq!(
            ask(client, "COMPACT"),
            format!(
                "ERR_COMPACT {} of {all} stores failed, not available: {}",
                away.len(),
                names.join(", ")
            )
        );
    }

    /// All keys are where they were, with their values.
    fn check_back(&self, client: &TcpStream, before: &[Vec<String>], back: &[usize]) {
        for (i, keys) in before.iter().enumerate() {
            let value = if back.contains(&i) { "early" } else { "late" };
            for key in keys {
                assert_eq!(ask(client, &format!("GET {key}")), value, "{}", self.names[i]);
            }
        }
        assert_eq!(ask(client, "COMPACT"), "OK_COMPACTED");
    }
}

fn a_listed_store_that_is_down_is_named_and_not_replaced(io: Io) {
    let mut servers: Vec<_> = (0..3)
        .map(|_| Memory::default())
        .map(|m| (Backend::chronos_on(([127, 0, 0, 2], 0).into(), &m), m))
        .collect();
    let addresses: Vec<_> = servers.iter().map(|(server, _)| server.address()).collect();
    let names: Vec<_> = addresses.iter().map(SocketAddr::to_string).collect();
    let stores = Stores {
        names: names.clone(),
        memories: servers.iter().map(|(_, memory)| memory.clone()).collect(),
    };
    let proxy = by_key(Builder::on(io)).backends(&addresses).start();
    let client = connect(proxy.address());
    let before = stores.fill(&client, "early");
    assert!(before.iter().all(|keys| !keys.is_empty()), "{before:?}");
    servers[1].0.kill();
    stores.check_away(&client, &[1], &before);
    servers[1].0.start();
    eventually("it is back", PATIENCE, || {
        (ask(&client, &format!("GET {}", before[1][0])) == "early").then_some(())
    });
    stores.check_back(&client, &before, &[1]);
}

fn a_name_is_one_store_whatever_its_address(io: Io) {
    let Some(hosts) = Hosts::new() else { return skip("no mount namespace is allowed") };
    let ip = |last| IpAddr::from([127, 0, 0, last]);
    let stores = Stores::new(&["a.test", "b.test"]);
    let a = Backend::chronos_on(SocketAddr::new(ip(2), 0), &stores.memories[0]);
    let port = a.address().port();
    let mut b = Backend::chronos_on(SocketAddr::new(ip(3), port), &stores.memories[1]);
    let stores = Stores {
        names: stores.names.iter().map(|name| format!("{name}:{port}")).collect(),
        ..stores
    };
    hosts.set(&[("a.test", &[ip(2)]), ("b.test", &[ip(3)])]);
    let proxy = by_key(Builder::on(io))
        .hosts(&hosts)
        .set("AEGIS_BACKENDS", stores.names.join(","))
        .set("AEGIS_DNS_REFRESH", "100ms")
        .start();
    let client = connect(proxy.address());
    let before = stores.fill(&client, "early");
    assert!(before.iter().all(|keys| !keys.is_empty()), "{before:?}");

    // It dies, and its name is gone; then it has the address of the other one for a moment.
    b.kill();
    hosts.set(&[("a.test", &[ip(2)])]);
    stores.check_away(&client, &[1], &before);
    let present = [("store", stores.names[1].as_str())];
    let both = format!("its address 127.0.0.2:{port} is also that of");
    hosts.set(&[("a.test", &[ip(2)]), ("b.test", &[ip(2)])]);
    proxy.wait_for(STORE_PRESENT, &[], |present| present == 0);
    for keys in &before {
        let answer = ask(&client, &format!("GET {}", keys[0]));
        assert!(answer.starts_with("ERR store ") && answer.contains(&both), "{answer}");
    }
    hosts.set(&[("a.test", &[ip(2)]), ("b.test", &[ip(4), ip(5)])]);
    proxy.wait_for(STORE_PRESENT, &[], |present| present == 1);
    let answer = ask(&client, &format!("SET {} late", before[1][0]));
    assert!(answer.contains("its name has 2 addresses"), "{answer}");
    assert_eq!(stores.keys(), before);

    // It comes back elsewhere, with what it had.
    let _b = Backend::chronos_on(SocketAddr::new(ip(4), port), &stores.memories[1]);
    hosts.set(&[("a.test", &[ip(2)]), ("b.test", &[ip(4)])]);
    proxy.wait_for(STORE_PRESENT, &present, |present| present == 1);
    stores.check_back(&client, &before, &[1]);
}

fn a_name_of_several_servers_is_no_store(io: Io) {
    let Some(hosts) = Hosts::new() else { return skip("no mount namespace is allowed") };
    let store = Backend::chronos();
    let ip = store.address().ip();
    hosts.set(&[("all.test", &[ip, [127, 0, 0, 3].into()])]);
    let proxy = by_key(Builder::on(io))
        .hosts(&hosts)
        .set("AEGIS_BACKENDS", format!("all.test:{}", store.address().port()))
        .set("AEGIS_DNS_REFRESH", "100ms")
        .launch();
    let why = eventually("it says why it does not start", PATIENCE, || {
        let answer = proxy.get("/startupz?wait=0");
        assert_eq!(answer.status, 503);
        answer.body.contains("has 2 addresses").then_some(answer.body)
    });
    assert!(why.contains("AEGIS_BACKENDS") && why.contains("list the name of each store"), "{why}");
    hosts.set(&[("all.test", &[ip])]);
    eventually("it starts", PATIENCE, || {
        (proxy.get("/startupz?wait=0").status == 200).then_some(())
    });
    assert_eq!(ask(&connect(proxy.address()), "SET key value"), "OK");
}

/// Pods of stores, each in a slice of its own, since each has a port of its own.
struct Pods<'a> {
    api: &'a KubeApi,
    stores: Stores,
    servers: Vec<Option<Backend>>,
}

impl<'a> Pods<'a> {
    fn new(api: &'a KubeApi, count: usize) -> Self {
        let names = ["chronos-0", "chronos-1", "chronos-2", "chronos-3"];
        let stores = Stores::new(&names[..count]);
        let mut pods = Self { api, stores, servers: (0..count).map(|_| None).collect() };
        (0..count).for_each(|i| pods.start(i));
        pods
    }

    /// Starts a pod with what its store had, at another address.
    fn start(&mut self, i: usize) {
        let memory = &self.stores.memories[i];
        let server = Backend::chronos_on(SocketAddr::new(host_ip(), 0), memory);
        self.servers[i] = Some(server);
        self.show(i, Slice::with);
    }

    fn show(&self, i: usize, as_what: impl Fn(Slice, &str, IpAddr) -> Slice) {
        let address = self.servers[i].as_ref().unwrap().address();
        let name = &self.stores.names[i];
        self.api.slice(name, &as_what(Slice::of(address.port()), name, address.ip()));
    }
}

fn keyed(io: Io, api: &KubeApi) -> Builder {
    by_key(Builder::on(io)).kubernetes(api).set("AEGIS_KUBE_NAMESPACE", NAMESPACE)
}

fn the_ordinals_of_a_stateful_set_are_the_stores_whoever_is_there(io: Io) {
    let api = KubeApi::start();
    api.stateful_set("chronos", 3);
    api.stateful_set("another", 7);
    let mut pods = Pods::new(&api, 3);
    let proxy = keyed(io, &api).start();
    let count = |there| proxy.wait_for(STORE_PRESENT, &[], |present| present == there);
    count(3);
    let client = connect(proxy.address());
    let before = pods.stores.fill(&client, "early");
    assert!(before.iter().all(|keys| keys.len() > KEYS / 10), "{before:?}");

    // One is not ready, as it is in a rolling restart; then one is gone altogether.
    pods.show(1, Slice::unready);
    count(2);
    pods.stores.check_away(&client, &[1], &before);
    pods.show(1, Slice::terminating);
    api.delete_slice("chronos-2");
    pods.servers[2] = None;
    count(1);
    pods.stores.check_away(&client, &[1, 2], &before);
    // A proxy that starts now agrees.
    let late = keyed(io, &api).start();
    pods.stores.check_away(&connect(late.address()), &[1, 2], &before);
    drop(late);
    pods.start(1);
    pods.start(2);
    count(3);
    pods.stores.check_back(&client, &before, &[1]);

    // One more takes its share of the keys from the others, and nothing else moves.
    api.stateful_set("chronos", 4);
    proxy.wait_for(STORE_PRESENT, &[("store", "chronos-3")], |present| present == 0);
    let away = (0..KEYS).filter(|i| {
        let answer = ask(&client, &format!("SET key{i} moved"));
        let moved = answer.starts_with("ERR store chronos-3 is not available");
        assert!(moved || answer == "OK", "{answer}");
        moved
    });
    let away = away.count();
    assert!((1..KEYS / 2).contains(&away), "{away} of {KEYS} keys have moved");
    assert_eq!(pods.stores.keys(), before);
    pods.stores.names.push("chronos-3".to_owned());
    pods.stores.memories.push(Memory::default());
    pods.servers.push(None);
    pods.start(3);
    count(4);
    let after = pods.stores.fill(&client, "moved");
    assert_eq!(after[..3], before[..]);
    assert_eq!(after[3].len(), away);
    // And gives it back.
    api.stateful_set("chronos", 3);
    proxy.wait_for_absence(STORE_PRESENT, &[("store", "chronos-3")]);
    assert_eq!(ask(&client, &format!("SET {} back", after[3][0])), "OK");
    assert_eq!(pods.stores.keys(), after);

    // What becomes of the StatefulSet's object itself moves nothing.
    api.delete_stateful_set("chronos");
    eventually("it is said", PATIENCE, || {
        let said = proxy.log_events("which stores share the keys is not known: there is no StatefulSet \"chronos\" whose replicas would tell how many stores there are: AEGIS_KUBE_STORES can say it");
        (!said.is_empty()).then_some(())
    });
    count(3);
    assert_eq!(ask(&client, &format!("GET {}", before[0][0])), "moved");
}

/// Sets keys of its own until `stop`. Returns those that were acknowledged, with their values.
fn write_until(
    proxy: &Proxy,
    writer: u32,
    stop: &AtomicBool,
    written: &AtomicU64,
) -> Vec<(String, String)> {
    let client = connect(proxy.address());
    let mut acknowledged = Vec::new();
    for i in 0.. {
        if stop.load(Relaxed) {
            break;
        }
        let key = format!("w{writer}-{i}");
        let answer = ask(&client, &format!("SET {key} {i}"));
        if answer == "OK" {
            acknowledged.push((key, i.to_string()));
            written.fetch_add(1, Relaxed);
        } else {
            assert!(answer.starts_with("ERR "), "{answer}");
        }
    }
    acknowledged
}

fn no_acknowledged_write_is_lost_in_a_rolling_restart(io: Io) {
    let api = KubeApi::start();
    api.stateful_set("chronos", 3);
    let mut pods = Pods::new(&api, 3);
    let proxy = keyed(io, &api).start();
    let count = |there| proxy.wait_for(STORE_PRESENT, &[], |present| present == there);
    count(3);
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let acknowledged = thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let (proxy, stop, written) = (&proxy, &stop, &written);
                scope.spawn(move || write_until(proxy, writer, stop, written))
            })
            .collect();
        let more = || {
            let before = written.load(Relaxed);
            eventually("writes go on", PATIENCE, || {
                (written.load(Relaxed) >= before + 50).then_some(())
            });
        };
        for i in (0..3).rev() {
            more();
            pods.show(i, Slice::terminating);
            count(2);
            more();
            pods.servers[i] = None;
            api.delete_slice(&pods.stores.names[i]);
            more();
            pods.start(i);
            count(3);
        }
        more();
        stop.store(true, Relaxed);
        writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect::<Vec<_>>()
    });
    let client = connect(proxy.address());
    for (key, value) in &acknowledged {
        assert_eq!(ask(&client, &format!("GET {key}")), *value, "{key}");
    }
}

fn pods_that_are_counted_are_the_stores_without_a_stateful_set(io: Io) {
    let api = KubeApi::start();
    let labels = serde_json::json!({"app": "chronos"});
    let stores = Stores::new(&["chronos-0", "chronos-1"]);
    let servers = [0, 1].map(|i| {
        let server = Backend::chronos_on(SocketAddr::new(host_ip(), 0), &stores.memories[i]);
        api.pod(&stores.names[i], &labels, server.address());
        server
    });
    if let Some(faults) = api.faults() {
        faults.hide(Some("statefulsets"));
    }
    let proxy = keyed(io, &api)
        .set("AEGIS_KUBE_SERVICE", "none")
        .set("AEGIS_KUBE_SELECTOR", "app=chronos")
        .set("AEGIS_KUBE_PORT", "chronos")
        .set("AEGIS_KUBE_STORES", "2")
        .start();
    proxy.wait_for(STORE_PRESENT, &[], |present| present == 2);
    let client = connect(proxy.address());
    let before = stores.fill(&client, "early");
    assert!(before.iter().all(|keys| !keys.is_empty()), "{before:?}");
    api.delete_pod("chronos-1");
    proxy.wait_for(STORE_PRESENT, &[], |present| present == 1);
    stores.check_away(&client, &[1], &before);
    // None of its pods is there, and each key still has its name.
    api.delete_pod("chronos-0");
    proxy.wait_for(STORE_PRESENT, &[], |present| present == 0);
    for (keys, name) in before.iter().zip(&stores.names) {
        let answer = ask(&client, &format!("GET {}", keys[0]));
        assert_eq!(answer, format!("ERR store {name} is not available: no endpoint is known"));
    }
    for (i, server) in servers.iter().enumerate() {
        api.pod(&stores.names[i], &labels, server.address());
    }
    proxy.wait_for(STORE_PRESENT, &[], |present| present == 2);
    stores.check_back(&client, &before, &[1]);
}

fn nothing_starts_without_a_membership(io: Io) {
    let api = KubeApi::start();
    let store = Backend::chronos_on(SocketAddr::new(host_ip(), 0), &Memory::default());
    let slice = |pod| Slice::of(store.address().port()).with(pod, host_ip());
    api.slice("s", &slice("web-5d8f7c9b-x2x4z"));
    let proxy = keyed(io, &api).launch();
    let wait_for = |parts: &[&str]| {
        eventually(&format!("it says {parts:?}"), PATIENCE, || {
            let answer = proxy.get("/startupz?wait=0");
            assert_eq!(answer.status, 503);
            parts.iter().all(|part| answer.body.contains(part)).then_some(())
        });
    };
    wait_for(&["web-5d8f7c9b-x2x4z", "is not of a StatefulSet", "AEGIS_BALANCE=key_hash"]);
    assert_eq!(proxy.get("/livez").status, 200);
    api.slice("s", &slice("chronos-0"));
    wait_for(&["no StatefulSet \"chronos\"", "AEGIS_KUBE_STORES"]);
    if let Some(faults) = api.faults() {
        let forbidden = keyed(io, &api);
        faults.hide(Some("statefulsets"));
        let forbidden = forbidden.launch();
        eventually("it says which permission is missing", PATIENCE, || {
            let body = forbidden.get("/startupz?wait=0").body;
            let parts = ["not allowed to", "statefulsets", "\"apps\"", "Role"];
            parts.iter().all(|part| body.contains(part)).then_some(())
        });
        api.stateful_set("chronos", 1);
        faults.hide(None);
        eventually("it starts once it may read them", PATIENCE, || {
            (forbidden.get("/startupz?wait=0").status == 200).then_some(())
        });
    }
    api.stateful_set("chronos", 2);
    eventually("it starts", PATIENCE, || {
        (proxy.get("/startupz?wait=0").status == 200).then_some(())
    });
    proxy.wait_for(STORE_PRESENT, &[("store", "chronos-1")], |present| present == 0);
}
