//! How many workers there are and where they run; and that clients go to the one with the fewest
//! sessions, whichever the kernel chose.

use std::net::TcpStream;
use std::thread;

use core_affinity::CoreId;

use crate::support::backend::Backend;
use crate::support::client::{ask, connect};
use crate::support::metrics::{HANDED_OVER, SESSIONS_ACTIVE};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, on_both_drivers, skip};

on_both_drivers![
    long_connections_are_spread_evenly,
    clients_whose_requests_are_told_apart_are_spread_evenly,
    a_client_that_is_alone_stays,
    clients_that_ask_once_and_leave_stay,
];

const WORKERS: usize = 3;

fn builder(io: Io, backend: &Backend) -> Builder {
    Builder::on(io).backends(&[backend.address()]).set("AEGIS_WORKERS", WORKERS.to_string())
}

fn sessions(proxy: &Proxy) -> [u64; WORKERS] {
    std::array::from_fn(|worker| {
        proxy.metric(SESSIONS_ACTIVE, &[("worker", worker.to_string().as_str())])
    })
}

fn spread(proxy: &Proxy, request: &str, answer: &str) {
    // By chance alone they would be as even as this once in 30 times.
    let clients: Vec<TcpStream> = (0..8 * WORKERS)
        .map(|_| {
            let client = connect(proxy.address());
            assert_eq!(ask(&client, request), answer);
            client
        })
        .collect();
    assert_eq!(sessions(proxy), [8; WORKERS]);
    assert!(proxy.metric(HANDED_OVER, &[]) > 0);
    for client in &clients {
        assert_eq!(ask(client, request), answer);
    }
}

fn long_connections_are_spread_evenly(io: Io) {
    let backend = Backend::named("a");
    spread(&builder(io, &backend).start(), "who", "a");
}

fn clients_whose_requests_are_told_apart_are_spread_evenly(io: Io) {
    let backend = Backend::chronos();
    let builder = builder(io, &backend)
        .protocol("chronos", "request")
        .set("AEGIS_POOL_SIZE", WORKERS.to_string());
    spread(&builder.start(), "PING", "PONG");
}

fn a_client_that_is_alone_stays(io: Io) {
    let backend = Backend::named("a");
    let proxy = builder(io, &backend).start();
    for _ in 0..2 * WORKERS {
        let client = connect(proxy.address());
        assert_eq!(ask(&client, "who"), "a");
        drop(client);
        proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
    }
    assert_eq!(proxy.metric(HANDED_OVER, &[]), 0);
}

fn clients_that_ask_once_and_leave_stay(io: Io) {
    const CLIENTS: u64 = 16;
    const TIMES: u64 = 100;
    let backend = Backend::named("a");
    let proxy = builder(io, &backend).start();
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                for _ in 0..TIMES {
                    assert_eq!(ask(&connect(proxy.address()), "who"), "a");
                }
            });
        }
    });
    // Only the first ones might have come to stay.
    let moved = proxy.metric(HANDED_OVER, &[]);
    assert!(moved <= 2 * CLIENTS, "{moved} of {} were handed over", CLIENTS * TIMES);
}

/// What `check` says of the workers to a container that was given this, on one CPU or on all.
fn workers_on(cpu: Option<usize>, given: &[(&str, &str)]) -> String {
    let builder = Builder::on(Io::Epoll)
        .set("AEGIS_BACKENDS", "127.0.0.2:9")
        .set("AEGIS_WORKERS", "auto")
        .set("AEGIS_PIN", "auto")
        .argument("check");
    let builder = given.iter().fold(builder, |builder, (name, value)| builder.set(name, *value));
    // The child has the mask of the thread that starts it.
    let run = || {
        if let Some(cpu) = cpu {
            assert!(core_affinity::set_for_current(CoreId { id: cpu }));
        }
        builder.run()
    };
    let ended = thread::scope(|scope| scope.spawn(run).join().unwrap());
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let line = ended.output.lines().find_map(|line| line.strip_prefix("workers: "));
    line.unwrap_or_else(|| panic!("{ended:?}")).to_owned()
}

fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// What the downward API tells of a container with one CPU of its own.
const GUARANTEED: [(&str, &str); 4] = [
    ("AEGIS_CPU_REQUEST", "1000"),
    ("AEGIS_CPU_LIMIT", "1000"),
    ("AEGIS_MEMORY_REQUEST", "67108864"),
    ("AEGIS_MEMORY_LIMIT", "67108864"),
];

#[test]
fn workers_are_pinned_only_where_the_cpus_are_proved_to_be_its_own() {
    let score = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    if cpus() < 2 || score.trim().parse().is_ok_and(|score: i32| score > 1) {
        return skip("a part of the CPUs cannot pass for a container's own on this host");
    }
    let said = workers_on(Some(1), &GUARANTEED);
    assert!(said.starts_with("1 (1 worker (auto, by the CPU request of 1)"), "{said}");
    assert!(said.contains(", pinned (the CPUs are the container's own)"), "{said}");
    // The kubelet's shared pool is a part of the machine's CPUs as well.
    let said = workers_on(Some(1), &[]);
    assert!(said.contains(", not pinned (AEGIS_CPU_REQUEST, AEGIS_CPU_LIMIT and"), "{said}");
    for (name, value, why) in [
        ("AEGIS_CPU_REQUEST", "500", "it requests 0.5 CPUs, and its limit is 1"),
        ("AEGIS_CPU_LIMIT", "64000", "it requests 1 CPUs, and its limit is 64"),
        ("AEGIS_MEMORY_LIMIT", "67108865", "its limit is 67108865"),
        ("AEGIS_MEMORY_REQUEST", "0", "do not prove that its CPUs are its own"),
    ] {
        let given = GUARANTEED.map(|pair| if pair.0 == name { (name, value) } else { pair });
        let said = workers_on(Some(1), &given);
        assert!(said.contains(", not pinned (") && said.contains(why), "{said}");
    }
    let said = workers_on(None, &GUARANTEED);
    let why = format!("it requests 1 CPUs and may run on {}, so others share them", cpus());
    assert!(said.contains(&why), "{said}");
}

#[test]
fn workers_follow_the_cpu_request() {
    if cpus() < 2 {
        return skip("one CPU has one worker anyhow");
    }
    for (request, workers) in [("1", 1), ("250", 1), ("1000", 1), ("1001", 2), ("2000", 2)] {
        let said = workers_on(None, &[("AEGIS_CPU_REQUEST", request)]);
        assert!(said.starts_with(&format!("{workers} (")), "{request}: {said}");
        // What a container without a request is told by the downward API.
        let none = [("AEGIS_WORKERS", "0"), ("AEGIS_CPU_REQUEST", request)];
        assert_eq!(workers_on(None, &none), said);
    }
    let said = workers_on(None, &[("AEGIS_CPU_REQUEST", "0"), ("AEGIS_CPU_LIMIT", "64000")]);
    assert!(said.starts_with("2 ("), "{said}");
}
