//! The label of a primary moves to another pod: new sessions follow it at once, old ones are cut, little
//! by little. What real databases make of it is in `databases/switchover.rs`.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::backend::{Backend, BlackHole};
use crate::support::client::{ask, ask_once, connect, read_line, try_ask};
use crate::support::kube_api::{KubeApi, NAMESPACE, host_ip};
use crate::support::metrics::{
    BYTES, ENDPOINT_SESSIONS, POOL_CONNECTIONS, REQUESTS, RETRIES, RETRIES_REFUSED,
    SESSIONS_ACTIVE, SESSIONS_CLOSED,
};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, SetOnDrop, eventually, measured, on_both_drivers};

on_both_drivers![
    a_promotion_moves_new_sessions_at_once_and_cuts_old_ones_little_by_little,
    sessions_on_which_nothing_has_moved_follow_unharmed,
    following_is_no_attempt,
    a_connect_under_way_follows_though_it_was_the_only_attempt,
    clients_that_have_asked_and_ended_follow_from_a_connect_under_way,
    a_cancel_request_that_has_to_move_meets_nobody_twice,
    an_upgraded_connection_on_which_nothing_has_moved_since_is_cut,
    a_moment_with_two_primaries_delays_no_cut,
    promotions_in_quick_succession_refuse_nobody_and_leave_nothing_behind,
    requests_are_cut_like_sessions_and_new_ones_follow_at_once,
    requests_that_are_cut_cost_no_retry_and_are_no_attempt,
];

const REMOVED: &[(&str, &str)] = &[("reason", "endpoint_removed")];

/// Two pods, the first of which is the primary.
struct Pair {
    api: KubeApi,
    servers: [Backend; 2],
}

fn role(role: &str) -> Value {
    json!({"cnpg.io/cluster": "orders", "cnpg.io/instanceRole": role})
}

fn follows_primary(builder: Builder, api: &KubeApi) -> Builder {
    builder
        .kubernetes(api)
        .set("AEGIS_KUBE_SERVICE", "none")
        .set("AEGIS_KUBE_NAMESPACE", NAMESPACE)
        .set("AEGIS_KUBE_SELECTOR", "cnpg.io/cluster=orders,cnpg.io/instanceRole=primary")
        .set("AEGIS_KUBE_PORT", "chronos")
        .set("AEGIS_BACKEND_DRAIN", "0s")
        .set("AEGIS_ENDPOINT_WAIT", "60s")
}

impl Pair {
    fn start(servers: [Backend; 2]) -> Self {
        let api = KubeApi::start();
        for (name, role, server) in
            [("orders-1", role("primary"), &servers[0]), ("orders-2", role("replica"), &servers[1])]
        {
            api.pod(name, &role, server.address());
        }
        Self { api, servers }
    }

    /// Servers that say their names, `a` and `b`.
    fn named() -> Self {
        Self::start(["a", "b"].map(|name| Backend::named_at(name, host_ip())))
    }

    fn proxy(&self, io: Io) -> Builder {
        follows_primary(Builder::on(io), &self.api)
    }

    fn demote_first(&self) {
        self.api.label_pod("orders-1", &role("replica"));
    }

    fn promote_second(&self) {
        self.api.label_pod("orders-2", &role("primary"));
    }

    /// The first is the primary again.
    fn take_back(&self) {
        self.api.label_pod("orders-2", &role("replica"));
        self.api.label_pod("orders-1", &role("primary"));
    }
}

/// Waits until new sessions go to the second server, whichever worker they come to.
fn wait_until_followed(proxy: &Proxy) {
    eventually("new sessions follow", PATIENCE, || {
        (0..20).all(|_| ask_once(proxy.address(), "who").unwrap() == "b").then_some(())
    });
}

/// Sessions that have been served by the first server.
fn sessions(proxy: &Proxy, count: usize) -> Vec<TcpStream> {
    let clients: Vec<_> = (0..count).map(|_| connect(proxy.address())).collect();
    for client in &clients {
        assert_eq!(ask(client, "who"), "a");
    }
    clients
}

/// When each is cut, which shows as a reset.
fn when_cut(clients: Vec<TcpStream>) -> Vec<Instant> {
    let wait = |client: TcpStream| {
        thread::spawn(move || {
            let outcome = read_line(&client);
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::ConnectionReset);
            Instant::now()
        })
    };
    let waiting: Vec<_> = clients.into_iter().map(wait).collect();
    let mut cut: Vec<_> = waiting.into_iter().map(|one| one.join().unwrap()).collect();
    cut.sort_unstable();
    cut
}

fn a_promotion_moves_new_sessions_at_once_and_cuts_old_ones_little_by_little(io: Io) {
    const SESSIONS: usize = 100;
    let pair = Pair::named();
    let proxy = pair.proxy(io).pool(2, 2).start();
    proxy.wait_for_endpoints(1);
    let clients = sessions(&proxy, SESSIONS);
    let cut = thread::spawn(move || when_cut(clients));
    let flipped = Instant::now();
    pair.demote_first();
    pair.promote_second();
    wait_until_followed(&proxy);
    let cut = cut.join().unwrap();
    let [first, median, last] =
        [0, SESSIONS / 2, SESSIONS - 1].map(|at| (cut[at] - flipped).as_millis());
    measured(&format!("{}: sessions were cut {first}, {median}, {last} ms after", io.name()));
    let spread = cut[SESSIONS * 9 / 10] - cut[SESSIONS / 10];
    assert!(spread > Duration::from_millis(300), "nine tenths within {spread:?}");
    assert!(first < 2000, "an endpoint that is replaced is not taken to come back: {first} ms");
    proxy.wait_for(SESSIONS_CLOSED, REMOVED, |count| count == SESSIONS as u64);
    eventually("nothing is left on the old primary, warm or not", PATIENCE, || {
        (pair.servers[0].open() == 0).then_some(())
    });
}

fn sessions_on_which_nothing_has_moved_follow_unharmed(io: Io) {
    const SESSIONS: usize = 10;
    let pair = Pair::named();
    let proxy = pair.proxy(io).pool(2, 2).start();
    proxy.wait_for_endpoints(1);
    let old = [("endpoint", "orders-1")];
    let clients: Vec<_> = (0..SESSIONS).map(|_| connect(proxy.address())).collect();
    let all_are_there = |count| count == SESSIONS as u64;
    proxy.wait_for(ENDPOINT_SESSIONS, &old, all_are_there);
    eventually("they are on the old primary", PATIENCE, || {
        (pair.servers[0].accepted() >= SESSIONS as u64).then_some(())
    });
    pair.demote_first();
    pair.promote_second();
    wait_until_followed(&proxy);
    proxy.wait_for(SESSIONS_ACTIVE, &[], all_are_there);
    eventually("the old primary is left", PATIENCE, || (pair.servers[0].open() == 0).then_some(()));
    assert_eq!(proxy.metrics().sum(ENDPOINT_SESSIONS, &old).unwrap_or(0), 0);
    for client in &clients {
        assert_eq!(ask(client, "who"), "b");
    }
    assert_eq!(proxy.metric(SESSIONS_CLOSED, REMOVED), 0);
}

fn following_is_no_attempt(io: Io) {
    let pair = Pair::named();
    let proxy = pair
        .proxy(io)
        .without_pool()
        .set("AEGIS_CONNECT_ATTEMPTS", "1")
        .set("AEGIS_ENDPOINT_WAIT", "0s")
        .start();
    proxy.wait_for_endpoints(1);
    let client = connect(proxy.address());
    let serves = |at: usize| {
        eventually("it is at the primary", PATIENCE, || {
            let open = [pair.servers[at].open(), pair.servers[1 - at].open()];
            (open == [1, 0]).then_some(())
        });
    };
    serves(0);
    for _ in 0..2 {
        pair.demote_first();
        pair.promote_second();
        serves(1);
        pair.take_back();
        serves(0);
    }
    assert_eq!(ask(&client, "who"), "a");
    assert_eq!(proxy.metric(SESSIONS_CLOSED, REMOVED), 0);
}

fn a_silent_primary_and_a_replica(api: &KubeApi) -> (BlackHole, Backend) {
    let (hole, server) = (BlackHole::at(host_ip()), Backend::named_at("b", host_ip()));
    let pod = |name, role_of, address| api.pod(name, &role(role_of), address);
    pod("orders-1", "primary", hole.address());
    pod("orders-2", "replica", server.address());
    (hole, server)
}

fn a_connect_under_way_follows_though_it_was_the_only_attempt(io: Io) {
    let api = KubeApi::start();
    let _servers = a_silent_primary_and_a_replica(&api);
    let proxy = follows_primary(Builder::on(io), &api)
        .without_pool()
        .set("AEGIS_CONNECT_ATTEMPTS", "1")
        .set("AEGIS_CONNECT_TIMEOUT", "60s")
        .set("AEGIS_ENDPOINT_WAIT", "0s")
        .start();
    proxy.wait_for_endpoints(1);
    let client = connect(proxy.address());
    proxy.wait_for(ENDPOINT_SESSIONS, &[("endpoint", "orders-1")], |count| count == 1);
    api.label_pod("orders-1", &role("replica"));
    api.label_pod("orders-2", &role("primary"));
    assert_eq!(ask(&client, "who"), "b");
}

fn clients_that_have_asked_and_ended_follow_from_a_connect_under_way(io: Io) {
    const CLIENTS: usize = 20;
    let api = KubeApi::start();
    let _servers = a_silent_primary_and_a_replica(&api);
    let proxy = follows_primary(Builder::on(io), &api)
        .without_pool()
        .set("AEGIS_CONNECT_TIMEOUT", "60s")
        .start();
    proxy.wait_for_endpoints(1);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut client = connect(proxy.address());
            client.write_all(b"who\n").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            client
        })
        .collect();
    let all = |count| count == CLIENTS as u64;
    proxy.wait_for(ENDPOINT_SESSIONS, &[("endpoint", "orders-1")], all);
    proxy.wait_for(BYTES, &[("direction", "to_backend")], |bytes| bytes == 4 * CLIENTS as u64);
    api.label_pod("orders-1", &role("replica"));
    api.label_pod("orders-2", &role("primary"));
    for client in &clients {
        assert_eq!(read_line(client).unwrap(), "b");
    }
    assert_eq!(proxy.metric(SESSIONS_CLOSED, REMOVED), 0);
}

fn a_cancel_request_that_has_to_move_meets_nobody_twice(io: Io) {
    const CANCEL: [u8; 16] = [0, 0, 0, 16, 4, 210, 22, 46, 0, 0, 0, 42, 1, 2, 3, 4];
    let api = KubeApi::start();
    let heard = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&heard);
    // It ends the connection without a word, as PostgreSQL does.
    let server = Backend::scripted_at((host_ip(), 0).into(), move |mut stream| {
        if stream.read_exact(&mut [0; CANCEL.len()]).is_ok() {
            count.fetch_add(1, Relaxed);
        }
    });
    let hole = BlackHole::at(host_ip());
    let pod = |name, role_of, address| api.pod(name, &role(role_of), address);
    pod("orders-1", "primary", hole.address());
    let proxy = follows_primary(Builder::on(io), &api)
        .without_pool()
        .set("AEGIS_PRESET", "postgres")
        .set("AEGIS_WORKERS", "1")
        .set("AEGIS_SLOW_START", "off")
        .set("AEGIS_CONNECT_TIMEOUT", "60s")
        .start();
    proxy.wait_for_endpoints(1);
    pod("orders-2", "primary", server.address());
    proxy.wait_for_endpoints(2);
    // One at least is at the server first, and then at the hole.
    let clients = [(); 2].map(|()| {
        let mut client = connect(proxy.address());
        client.write_all(&CANCEL).unwrap();
        client
    });
    proxy.wait_for(ENDPOINT_SESSIONS, &[("endpoint", "orders-1")], |count| count == 2);
    assert!(heard.load(Relaxed) > 0);
    api.label_pod("orders-1", &role("replica"));
    for client in clients {
        assert_eq!((&client).read(&mut [0]).unwrap(), 0);
    }
    assert_eq!(heard.load(Relaxed), 2);
}

fn an_upgraded_connection_on_which_nothing_has_moved_since_is_cut(io: Io) {
    let upgrades = || {
        Backend::scripted_at((host_ip(), 0).into(), |mut stream| {
            while read_line(stream).is_ok_and(|line| !line.trim_end().is_empty()) {}
            let _ = stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n");
            let _ = read_line(stream);
        })
    };
    let pair = Pair::start([upgrades(), upgrades()]);
    let proxy = pair.proxy(io).protocol("http1", "request").start();
    proxy.wait_for_endpoints(1);
    let mut client = connect(proxy.address());
    client.write_all(b"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n").unwrap();
    assert_eq!(read_line(&client).unwrap().trim_end(), "HTTP/1.1 101 Switching Protocols");
    assert_eq!(read_line(&client).unwrap().trim_end(), "");
    pair.demote_first();
    pair.promote_second();
    proxy.wait_for(SESSIONS_CLOSED, REMOVED, |cut| cut == 1);
    assert!(read_line(&client).map_or(true, |line| line.is_empty()), "it is cut");
    assert_eq!(proxy.metric(POOL_CONNECTIONS, &[("state", "opaque")]), 0);
}

fn a_moment_with_two_primaries_delays_no_cut(io: Io) {
    const SESSIONS: usize = 10;
    let pair = Pair::named();
    let proxy = pair.proxy(io).without_pool().start();
    proxy.wait_for_endpoints(1);
    let clients = sessions(&proxy, SESSIONS);
    pair.promote_second();
    proxy.wait_for_endpoints(2);
    assert_eq!(proxy.metric(SESSIONS_CLOSED, REMOVED), 0, "both are in the set");
    let cut = thread::spawn(move || when_cut(clients));
    let flipped = Instant::now();
    pair.demote_first();
    wait_until_followed(&proxy);
    let first = cut.join().unwrap()[0] - flipped;
    assert!(first < Duration::from_secs(2), "{first:?}");
}

/// A client that asks again and again, and connects again when it is cut. Gives how often it was.
fn keep_asking(address: SocketAddr, stop: &AtomicBool) -> u32 {
    let mut cuts = 0;
    while !stop.load(Relaxed) {
        let client = connect(address);
        while !stop.load(Relaxed) {
            if let Err(error) = try_ask(&client, "who") {
                let cut = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
                assert!(cut.contains(&error.kind()), "neither answered nor cut: {error}");
                cuts += 1;
                break;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
    cuts
}

fn promotions_in_quick_succession_refuse_nobody_and_leave_nothing_behind(io: Io) {
    let pair = Pair::named();
    let proxy = pair.proxy(io).pool(2, 2).start();
    proxy.wait_for_endpoints(1);
    let (address, stop) = (proxy.address(), AtomicBool::new(false));
    let mut rng = fastrand::Rng::with_seed(1);
    let cuts: u32 = thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        let askers: Vec<_> = (0..8).map(|_| scope.spawn(|| keep_asking(address, &stop))).collect();
        for promoted in [1, 0, 1, 0, 1, 0, 1, 0, 1] {
            let names = ["orders-1", "orders-2"];
            let mut steps =
                [(names[1 - promoted], role("replica")), (names[promoted], role("primary"))];
            // For a moment there are two primaries, or none.
            rng.shuffle(&mut steps);
            for (name, role) in steps {
                pair.api.label_pod(name, &role);
                thread::sleep(Duration::from_millis(rng.u64(..300)));
            }
        }
        wait_until_followed(&proxy);
        eventually("nothing is left on the old primary", PATIENCE, || {
            (pair.servers[0].open() == 0).then_some(())
        });
        stop.store(true, Relaxed);
        askers.into_iter().map(|asker| asker.join().unwrap()).sum()
    });
    assert!(cuts > 0, "nobody was on a primary that left");
    assert_eq!(ask_once(address, "who").unwrap(), "b");
    for reason in ["no_endpoint", "connect_failed", "connect_timeout"] {
        assert_eq!(proxy.metric(SESSIONS_CLOSED, &[("reason", reason)]), 0, "{reason}");
    }
}

/// A server that answers each line with its name. The first one does not answer requests for `slow`, and does
/// not end its answers to those for `part`.
fn store(name: &'static str, asked: &Arc<AtomicU64>) -> Backend {
    let asked = Arc::clone(asked);
    Backend::scripted_at((host_ip(), 0).into(), move |mut stream| {
        while let Ok(line) = read_line(stream) {
            asked.fetch_add(1, Relaxed);
            if name == "a" && line.contains("slow") {
                continue;
            }
            if name == "a" && line.contains("part") {
                let _ = stream.write_all(b"a");
                continue;
            }
            if stream.write_all(format!("{name}\n").as_bytes()).is_err() {
                return;
            }
        }
    })
}

fn requests_are_cut_like_sessions_and_new_ones_follow_at_once(io: Io) {
    const CLIENTS: usize = 3;
    let asked = [(); 2].map(|()| Arc::<AtomicU64>::default());
    let pair = Pair::start([store("a", &asked[0]), store("b", &asked[1])]);
    let proxy = pair.proxy(io).protocol("chronos", "request").start();
    proxy.wait_for_endpoints(1);
    let idle: Vec<_> = (0..CLIENTS).map(|_| connect(proxy.address())).collect();
    for client in &idle {
        assert_eq!(ask(client, "GET k"), "a");
    }
    let slow = |request: &'static str| {
        let clients = (0..CLIENTS).map(|_| connect(proxy.address()));
        let ask = |client: TcpStream| thread::spawn(move || try_ask(&client, request));
        clients.map(ask).collect::<Vec<_>>()
    };
    let (reads, writes) = (slow("GET slow"), slow("SET slow v"));
    let mut begun = connect(proxy.address());
    begun.write_all(b"GET part\n").unwrap();
    begun.read_exact(&mut [0]).unwrap();
    let before = 3 * CLIENTS as u64 + 1;
    eventually("all are in flight", PATIENCE, || (asked[0].load(Relaxed) == before).then_some(()));
    pair.demote_first();
    pair.promote_second();
    eventually("requests follow", PATIENCE, || {
        (0..20).all(|_| ask_once(proxy.address(), "GET k").unwrap() == "b").then_some(())
    });
    let followed = asked[0].load(Relaxed);
    for client in &idle {
        assert_eq!(ask(client, "SET k v"), "b");
    }
    for read in reads {
        assert_eq!(read.join().unwrap().unwrap(), "b", "what may be repeated is");
    }
    for write in writes {
        let answer = write.join().unwrap().unwrap();
        assert!(answer.starts_with("ERR"), "nobody knows whether it was done: {answer}");
    }
    assert_eq!(asked[0].load(Relaxed), followed, "the old primary gets nothing more");
    eventually("and keeps no connection", PATIENCE, || (pair.servers[0].open() == 0).then_some(()));
    assert_eq!(begun.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    proxy.wait_for(SESSIONS_CLOSED, REMOVED, |cut| cut == 1);
    // No backend has ended anything.
    let ended = |outcome| proxy.metric(REQUESTS, &[("outcome", outcome)]);
    let told = proxy.metrics().describe(REQUESTS);
    assert_eq!([ended("cut"), ended("backend_lost")], [CLIENTS as u64 + 1, 0], "{told}");
    let again = |why| proxy.metric(RETRIES, &[("reason", why)]);
    assert_eq!([again("removed"), again("ended")], [CLIENTS as u64, 0]);
    assert!(proxy.metric(POOL_CONNECTIONS, &[]) > 0);
}

/// What is cut is as much as was in flight, and comes to a server that has had none of it.
fn requests_that_are_cut_cost_no_retry_and_are_no_attempt(io: Io) {
    // More than there are retries that need no requests.
    const CLIENTS: u64 = 110;
    let asked = [(); 2].map(|()| Arc::<AtomicU64>::default());
    let pair = Pair::start([store("a", &asked[0]), store("b", &asked[1])]);
    let proxy = pair
        .proxy(io)
        .protocol("chronos", "request")
        .set("AEGIS_POOL_SIZE", "128")
        .set("AEGIS_RETRY_BUDGET", "0")
        .set("AEGIS_CONNECT_ATTEMPTS", "1")
        .start();
    proxy.wait_for_endpoints(1);
    let address = proxy.address();
    let ask = |_| thread::spawn(move || ask_once(address, "GET slow"));
    let reads: Vec<_> = (0..CLIENTS).map(ask).collect();
    eventually("all are in flight", PATIENCE, || (asked[0].load(Relaxed) == CLIENTS).then_some(()));
    pair.demote_first();
    pair.promote_second();
    for read in reads {
        assert_eq!(read.join().unwrap().unwrap(), "b");
    }
    assert_eq!(proxy.metric(RETRIES, &[("reason", "removed")]), CLIENTS);
    assert_eq!(proxy.metric(RETRIES_REFUSED, &[]), 0);
}
