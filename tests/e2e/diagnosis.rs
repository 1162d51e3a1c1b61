//! What is wrong is said in one word: by a metric, by a line of the log, and by what the page shows.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, setpriority_process};

use crate::support::backend::Backend;
use crate::support::client::{ask_once, read_line, reset, try_ask, try_connect};
use crate::support::kube_api::KubeApi;
use crate::support::link::{Fate, Link};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, skip};

const PROBLEM: &str = "aegis_problem";

/// What is compared with is as old as this, or twice as old.
pub(super) const WINDOW: Duration = Duration::from_secs(5);

/// The proxy with the driver that is there on every machine: nothing here depends on it.
pub(super) fn proxy() -> Builder {
    Builder::on(Io::Epoll)
}

/// Waits until the proxy finds this problem; returns what the page says of it.
pub(super) fn found(proxy: &Proxy, kind: &str) -> String {
    proxy.wait_for(PROBLEM, &[("kind", kind)], |found| found == 1);
    let words = eventually("the page says it", PATIENCE, || said(proxy, kind));
    let is_it = |line: &serde_json::Value| line["problem"] == kind && line["level"] == "WARN";
    let is_said = || proxy.log_problems().iter().any(is_it).then_some(());
    eventually("the log says it", PATIENCE, is_said);
    words
}

/// The words of a problem in what the page reads.
fn said(proxy: &Proxy, kind: &str) -> Option<String> {
    let status = proxy.get("/status").json();
    let routes = status["routes"].as_array().unwrap();
    let of = |health: &serde_json::Value| health["reasons"].as_array().unwrap().clone();
    let mut all = routes.iter().flat_map(|route| of(&route["health"])).chain(of(&status["health"]));
    let reason = all.find(|reason| reason["problem"] == kind)?;
    Some(reason["words"].as_str().unwrap().to_owned())
}

/// Nothing but these was found so far. That other tests keep the machine busy may be found as well.
pub(super) fn are_all(proxy: &Proxy, kinds: &[&str]) {
    let found = proxy.log_problems();
    let found = found.iter().filter(|line| line["level"] == "WARN");
    let others = found.filter(|line| {
        let kind = line["problem"].as_str().unwrap();
        !kinds.contains(&kind) && kind != "cpu_throttled"
    });
    assert_eq!(others.collect::<Vec<_>>(), Vec::<&serde_json::Value>::new());
}

/// Lets a proxy run before the other tests, so that it has the core it wants.
pub(super) fn start(proxy: Builder) -> Proxy {
    let proxy = proxy.start();
    for thread in fs::read_dir(format!("/proc/{}/task", proxy.id())).unwrap() {
        let thread: i32 = thread.unwrap().file_name().to_str().unwrap().parse().unwrap();
        // Root may.
        let _ = setpriority_process(Pid::from_raw(thread), -20);
    }
    proxy
}

/// A machine that is busy with other tests may make it look so for a moment.
pub(super) fn is_not_said(proxy: &Proxy, kind: &str) {
    let is_gone = || said(proxy, kind).is_none().then_some(());
    eventually(&format!("{kind} is not found"), PATIENCE, is_gone);
}

pub(super) fn is_over(proxy: &Proxy, kind: &str) {
    proxy.wait_for(PROBLEM, &[("kind", kind)], |found| found == 0);
    let is_it = |line: &serde_json::Value| line["problem"] == kind;
    let is_said = || proxy.log_events("problem is over").iter().any(is_it).then_some(());
    eventually("the log says that it is over", PATIENCE, is_said);
}

/// Clients that do the same again and again until this is dropped.
pub(super) struct Load {
    over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    pub(super) fn of(clients: usize, work: impl Fn() + Send + Sync + 'static) -> Self {
        let (over, work) = (Arc::new(AtomicBool::new(false)), Arc::new(work));
        let client = |_| {
            let (over, work) = (Arc::clone(&over), Arc::clone(&work));
            thread::spawn(move || {
                while !over.load(Relaxed) {
                    work();
                }
            })
        };
        Self { clients: (0..clients).map(client).collect(), over }
    }

    /// Clients that ask for a line, each on a connection of its own each time.
    pub(super) fn asking(clients: usize, proxy: SocketAddr) -> Self {
        Self::of(clients, move || {
            // Errors are what some of the tests are about.
            let _ = ask_once(proxy, "GET k");
            thread::sleep(Duration::from_millis(2));
        })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
        self.clients.drain(..).for_each(|client| client.join().unwrap());
    }
}

/// Answers each line after a time that can be changed.
pub(super) fn taking(milliseconds: &Arc<AtomicU64>) -> Backend {
    let milliseconds = Arc::clone(milliseconds);
    Backend::scripted(move |mut stream| {
        while read_line(stream).is_ok_and(|line| !line.is_empty()) {
            let begun = Instant::now();
            while let Some(left) =
                Duration::from_millis(milliseconds.load(Relaxed)).checked_sub(begun.elapsed())
            {
                thread::sleep(left.min(Duration::from_millis(20)));
            }
            if stream.write_all(b"v\n").is_err() {
                return;
            }
        }
    })
}

#[test]
fn a_backend_that_becomes_slow_is_told_from_one_that_is_as_usual() {
    let takes = Arc::new(AtomicU64::new(1));
    let backend = taking(&takes);
    let proxy = start(proxy().backends(&[backend.address()]));
    let _load = Load::asking(4, proxy.address());
    proxy.wait_for("aegis_sessions_closed_total", &[("reason", "finished")], |n| n > 200);
    thread::sleep(Duration::from_secs(2));
    is_not_said(&proxy, "backend_slow");
    takes.store(200, Relaxed);
    let words = found(&proxy, "backend_slow");
    assert!(words.starts_with("the first byte takes ") && words.contains("usual"), "{words}");
    takes.store(1, Relaxed);
    is_over(&proxy, "backend_slow");
    are_all(&proxy, &["backend_slow"]);
}

#[test]
fn a_backend_that_stops_answering_is_named_while_clients_still_wait() {
    let takes = Arc::new(AtomicU64::new(1));
    let backend = taking(&takes);
    for mode in [proxy().backends(&[backend.address()]), by_request(&backend, "64")] {
        takes.store(1, Relaxed);
        let proxy = start(mode);
        let _load = Load::asking(12, proxy.address());
        proxy.wait_for("aegis_first_byte_seconds_count", &[], |n| n > 100);
        takes.store(60_000, Relaxed);
        let words = found(&proxy, "backend_slow");
        let end = " clients got no first byte; AEGIS_SLOW_FIRST_BYTE is 1s";
        assert!(words.ends_with(end), "{words}");
        takes.store(1, Relaxed);
        is_over(&proxy, "backend_slow");
        are_all(&proxy, &["backend_slow"]);
    }
}

#[test]
fn a_backend_that_stops_answering_is_named_though_its_few_clients_lose_patience() {
    let takes = Arc::new(AtomicU64::new(1));
    let backend = taking(&takes);
    let proxy = start(proxy().backends(&[backend.address()]));
    let address = proxy.address();
    let _load = Load::of(4, move || {
        let Ok(client) = try_connect(address) else { return };
        let _ = client.set_read_timeout(Some(Duration::from_millis(1200)));
        let _ = try_ask(&client, "GET k");
        thread::sleep(Duration::from_millis(2));
    });
    proxy.wait_for("aegis_first_byte_seconds_count", &[], |n| n > 100);
    takes.store(60_000, Relaxed);
    let words = found(&proxy, "backend_slow");
    assert!(words.contains(" clients got no first byte; AEGIS_SLOW_FIRST_BYTE is 1s"), "{words}");
    takes.store(1, Relaxed);
    is_over(&proxy, "backend_slow");
    are_all(&proxy, &["backend_slow"]);
}

/// Clients that have sent this, and wait for as long as they are kept.
fn waiting(proxy: SocketAddr, clients: usize, line: &str) -> Vec<TcpStream> {
    let client = |_| {
        let mut client = try_connect(proxy).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        client
    };
    (0..clients).map(client).collect()
}

#[test]
fn clients_that_wait_for_what_need_not_come_say_nothing_of_a_backend() {
    // One answers nobody, as those do that take logs; one answers whoever asks, and tells the others
    // when there is something to tell; one is first to speak, and its clients have nothing to say.
    let takes_all =
        Backend::scripted(|stream| while read_line(stream).is_ok_and(|l| !l.is_empty()) {});
    let tells_some = Backend::scripted(|mut stream| {
        while let Ok(line) = read_line(stream) {
            let is_told = line.starts_with("GET");
            if line.is_empty() || (is_told && stream.write_all(b"v\n").is_err()) {
                return;
            }
        }
    });
    let greets = Backend::scripted(|mut stream| {
        if stream.write_all(b"hello\n").is_ok() {
            while read_line(stream).is_ok_and(|line| !line.is_empty()) {}
        }
    });
    let all = [(&takes_all, "log\n"), (&tells_some, "WAIT\n"), (&greets, "")];
    let proxies = all.map(|(backend, _)| start(proxy().backends(&[backend.address()])));
    let _loads = Load::asking(4, proxies[1].address());
    proxies[1].wait_for("aegis_first_byte_seconds_count", &[], |n| n > 100);
    let clients: Vec<_> = all
        .iter()
        .zip(&proxies)
        .map(|((_, line), proxy)| waiting(proxy.address(), 12, line))
        .collect();
    thread::sleep(2 * WINDOW);
    for proxy in &proxies {
        are_all(proxy, &[]);
    }
    drop(clients);
}

pub(super) fn by_request(backend: &Backend, pool_size: &str) -> Builder {
    let proxy = proxy().backends(&[backend.address()]).protocol("chronos", "request");
    proxy.set("AEGIS_POOL_SIZE", pool_size)
}

#[test]
fn clients_that_wait_since_a_backend_has_become_slow_wait_for_the_backend() {
    let takes = Arc::new(AtomicU64::new(1));
    let backend = taking(&takes);
    let proxy = start(by_request(&backend, "4"));
    let _load = Load::asking(2, proxy.address());
    proxy.wait_for("aegis_requests_total", &[("outcome", "answered")], |n| n > 500);
    takes.store(200, Relaxed);
    found(&proxy, "backend_slow");
    let _more = Load::asking(10, proxy.address());
    // Until nothing is compared with the time before.
    thread::sleep(2 * WINDOW);
    are_all(&proxy, &["backend_slow"]);
}

#[test]
fn a_backend_that_answers_nothing_any_more_is_told_from_a_pool_that_is_too_small() {
    let takes = Arc::new(AtomicU64::new(1));
    let backend = taking(&takes);
    let proxy = start(by_request(&backend, "6").set("AEGIS_QUEUE_TIMEOUT", "200ms"));
    let load = Load::asking(12, proxy.address());
    proxy.wait_for("aegis_requests_total", &[("outcome", "answered")], |n| n > 200);
    takes.store(60_000, Relaxed);
    let words = found(&proxy, "backend_slow");
    assert!(words.starts_with("no request is answered, and "), "{words}");
    are_all(&proxy, &["backend_slow"]);
    takes.store(1, Relaxed);
    drop(load);
}

#[test]
fn a_backend_that_refuses_is_named() {
    let mut backend = Backend::named("db");
    let proxy = proxy()
        .backends(&[backend.address()])
        .set("AEGIS_ENDPOINT_WAIT", "50ms")
        .set("AEGIS_EJECT_TIME", "1s")
        .start();
    let _load = Load::asking(2, proxy.address());
    backend.kill();
    let words = found(&proxy, "backend_refusing");
    assert!(words.contains(&format!("{} refuses", backend.address())), "{words}");
    let words = found(&proxy, "no_endpoint");
    assert_eq!(words, "no endpoint usable: all 1 are ejected");
    backend.start();
    is_over(&proxy, "no_endpoint");
    is_over(&proxy, "backend_refusing");
    are_all(&proxy, &["backend_refusing", "no_endpoint"]);
}

#[test]
fn a_queue_that_fills_while_all_backends_refuse_is_not_the_pools_fault() {
    let mut backend = taking(&Arc::new(AtomicU64::new(1)));
    let proxy = start(by_request(&backend, "6").set("AEGIS_QUEUE_MAX", "1"));
    let _load = Load::asking(2, proxy.address());
    proxy.wait_for("aegis_requests_total", &[("outcome", "answered")], |n| n > 20);
    backend.kill();
    let more = Load::asking(6, proxy.address());
    proxy.wait_for("aegis_requests_total", &[("outcome", "queue_full")], |n| n > 20);
    found(&proxy, "backend_refusing");
    let full = proxy.metric("aegis_requests_total", &[("outcome", "queue_full")]);
    proxy.wait_for("aegis_requests_total", &[("outcome", "queue_full")], |n| n > full + 100);
    drop(more);
    backend.start();
    is_over(&proxy, "backend_refusing");
    are_all(&proxy, &["backend_refusing", "no_endpoint"]);
}

fn find_a_lossy_network(there: Fate, back: Fate) {
    let Some(link) = Link::new() else { return };
    let servers = [Backend::named_on("db", Link::here())];
    let hosts = link.hosts(&servers);
    let proxy = start(proxy().backends(&hosts));
    let address = proxy.address();
    let (sender, clients) = std::sync::mpsc::channel();
    for _ in 0..8 {
        sender.send(try_connect(address).unwrap()).unwrap();
    }
    let clients = std::sync::Mutex::new((sender, clients));
    let _load = Load::of(8, move || {
        let client = clients.lock().unwrap().1.recv().unwrap();
        let _ = client.set_read_timeout(Some(Duration::from_secs(2)));
        let _ = try_ask(&client, "some words, again and again");
        clients.lock().unwrap().0.send(client).unwrap();
    });
    thread::sleep(Duration::from_secs(3));
    is_not_said(&proxy, "network_lossy");
    link.set(0, there, back);
    let words = found(&proxy, "network_lossy");
    assert!(words.starts_with(&hosts[0].to_string()) && words.contains('%'), "{words}");
    let rtt = proxy.metrics();
    let count = rtt.sum("aegis_endpoint_rtt_seconds_count", &[]).unwrap();
    assert!(count > 0, "round trips were sampled");
    thread::sleep(WINDOW);
    are_all(&proxy, &["network_lossy"]);
}

pub(super) const LOSSY: Fate = Fate::Lossy(20, Duration::from_millis(1));

#[test]
fn a_network_that_loses_segments_is_told_from_a_backend_that_is_slow() {
    find_a_lossy_network(LOSSY, Fate::Arrive);
}

#[test]
fn a_network_that_loses_replies_is_told_from_a_backend_that_is_slow() {
    find_a_lossy_network(Fate::Arrive, LOSSY);
}

#[test]
fn nothing_is_on_its_way_on_a_connection_that_is_closed() {
    const UNACKED: &str = "aegis_endpoint_unacked_segments";
    let Some(link) = Link::new() else { return };
    let servers = [Backend::named_on("db", Link::here())];
    let proxy = proxy().backends(&link.hosts(&servers)).without_pool().start();
    let mut client = try_connect(proxy.address()).unwrap();
    try_ask(&client, "who").unwrap();
    link.set(0, Fate::Vanish, Fate::Vanish);
    client.write_all(b"who\n").unwrap();
    proxy.wait_for(UNACKED, &[], |segments| segments > 0);
    reset(client);
    proxy.wait_for(UNACKED, &[], |segments| segments == 0);
}

#[test]
fn nothing_is_delivered_to_an_endpoint_without_a_connection() {
    const RATE: &str = "aegis_endpoint_delivery_rate_bytes";
    let backend = Backend::echo();
    let proxy = proxy().backends(&[backend.address()]).without_pool().start();
    let client = try_connect(proxy.address()).unwrap();
    eventually("a rate is sampled", PATIENCE, || {
        try_ask(&client, "some words, again and again").unwrap();
        (proxy.metric(RATE, &[]) > 0).then_some(())
    });
    drop(client);
    proxy.wait_for(RATE, &[], |rate| rate == 0);
}

fn find_too_few_connections(proxy: &Proxy) {
    let _load = Load::asking(8, proxy.address());
    let words = found(proxy, "pool_small");
    assert!(words.starts_with("clients wait "), "{words}");
    are_all(proxy, &["pool_small"]);
}

#[test]
fn a_pool_that_is_too_small_is_told_from_a_backend_that_is_slow() {
    let takes = Arc::new(AtomicU64::new(5));
    let backend = taking(&takes);
    let proxy = start(by_request(&backend, "1").set("AEGIS_WORKERS", "1"));
    find_too_few_connections(&proxy);
}

#[test]
fn places_at_an_endpoint_that_are_too_few_are_told_from_a_backend_that_is_slow() {
    let backend = taking(&Arc::new(AtomicU64::new(5)));
    let proxy = proxy().backends(&[backend.address()]).set("AEGIS_ENDPOINT_MAX", "2");
    let proxy = start(proxy.without_pool());
    find_too_few_connections(&proxy);
}

#[test]
fn a_worker_that_is_busy_all_the_time_is_named() {
    let backend = Backend::chronos();
    let proxy = by_request(&backend, "16").set("AEGIS_WORKERS", "1").start();
    // In front of all else that runs, or it would wait for a core. Root may.
    let mut first = Command::new("chrt");
    first.args(["-a", "-f", "-p", "1", &proxy.id().to_string()]);
    let _ = first.stdout(Stdio::null()).stderr(Stdio::null()).status();
    let address = proxy.address();
    // Lines that the proxy answers by itself: nobody else is busy.
    let _load = Load::of(3, move || {
        let Ok(client) = try_connect(address) else { return };
        let mut reader = client.try_clone().unwrap();
        let reading = thread::spawn(move || {
            let mut answers = vec![0; 1 << 20];
            while reader.read(&mut answers).is_ok_and(|count| count > 0) {}
        });
        let lines = [b'\n'; 4096];
        for _ in 0..200 {
            if (&client).write_all(&lines).is_err() {
                break;
            }
        }
        let _ = client.shutdown(std::net::Shutdown::Both);
        reading.join().unwrap();
    });
    let words = found(&proxy, "worker_overloaded");
    assert!(words.contains(" busy all the time"), "{words}");
    are_all(&proxy, &["worker_overloaded"]);
}

/// A process that wants the first core all the time.
struct Busy(Child);

impl Busy {
    fn start() -> Self {
        let mut busy = Command::new("taskset");
        busy.args(["-c", "0", "sh", "-c", "while :; do :; done"]).stdin(Stdio::null());
        Self(busy.spawn().unwrap())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn workers_that_wait_for_a_core_are_told_from_those_that_are_busy() {
    let backend = Backend::echo();
    let proxy = proxy().backends(&[backend.address()]).start();
    let _busy = [Busy::start(), Busy::start(), Busy::start()];
    let mut pin = Command::new("taskset");
    pin.args(["-a", "-p", "-c", "0", &proxy.id().to_string()]).stdout(Stdio::null());
    assert!(pin.status().unwrap().success());
    let _load = Load::asking(8, proxy.address());
    let words = found(&proxy, "cpu_throttled");
    assert!(words.contains("waited for a core"), "{words}");
    are_all(&proxy, &[]);
}

/// A control group with a tenth of a core, removed when dropped.
struct Quota(PathBuf);

impl Quota {
    /// None, with a word about it, where groups cannot be made.
    fn new() -> Option<Self> {
        let name = format!("aegis-test-{}", std::process::id());
        let (first, second) =
            (PathBuf::from("/sys/fs/cgroup/cpu"), PathBuf::from("/sys/fs/cgroup"));
        let (root, quota) = if first.join("cpu.cfs_quota_us").exists() {
            (first, ("cpu.cfs_quota_us", "10000"))
        } else {
            (second, ("cpu.max", "10000 100000"))
        };
        let group = Self(root.join(name));
        let made =
            fs::create_dir(&group.0).and_then(|()| fs::write(group.0.join(quota.0), quota.1));
        match made {
            Ok(()) => Some(group),
            Err(error) => {
                skip(&format!("no control group can be made: {error}"));
                None
            }
        }
    }

    fn hold(&self, proxy: &Proxy) {
        fs::write(self.0.join("cgroup.procs"), proxy.id().to_string()).unwrap();
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        // Who was in it may need a moment to end.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_cpu_quota_that_is_used_up_is_told_from_a_busy_worker_and_a_slow_backend() {
    let Some(quota) = Quota::new() else { return };
    let backend = Backend::echo();
    let proxy = start(proxy().backends(&[backend.address()]));
    let _load = Load::asking(8, proxy.address());
    thread::sleep(WINDOW);
    quota.hold(&proxy);
    found(&proxy, "cpu_throttled");
    thread::sleep(WINDOW);
    are_all(&proxy, &[]);
}

#[test]
fn endpoints_that_may_be_old_are_said_to_be() {
    let mut api = KubeApi::start();
    api.grant();
    let backend = Backend::named("db");
    api.announce("a", backend.address());
    let proxy = proxy().kubernetes(&api).start();
    proxy.wait_for_endpoints(1);
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "db");
    api.kill();
    let words = found(&proxy, "discovery_stale");
    assert!(words.starts_with("the endpoints may be old: "), "{words}");
    are_all(&proxy, &["discovery_stale"]);
    api.restart();
    api.announce("b", Backend::named("db").address());
    proxy.wait_for_endpoints(2);
    is_over(&proxy, "discovery_stale");
}

#[test]
fn sessions_near_the_limit_are_said() {
    let backend = Backend::echo();
    let proxy = proxy().backends(&[backend.address()]).set("AEGIS_MAX_SESSIONS", "8").start();
    let clients: Vec<TcpStream> = (0..8).map(|_| try_connect(proxy.address()).unwrap()).collect();
    assert_eq!(found(&proxy, "session_limit"), "8 of 8 sessions are open");
    drop(clients);
    is_over(&proxy, "session_limit");
}
