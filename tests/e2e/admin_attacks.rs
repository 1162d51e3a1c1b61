//! Whatever other pods do with the admin port, the probes are answered: the kubelet kills a proxy
//! that does not answer, with all its sessions.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};

use crate::support::backend::{Backend, Memory};
use crate::support::kube_api::{KubeApi, Slice, host_ip};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, SetOnDrop, eventually, heavy, measured};

/// What a kubelet waits for an answer, unless set otherwise.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// A proxy for the tests of this module, and its admin port.
struct Attacked {
    _backend: Backend,
    proxy: Proxy,
    admin: SocketAddr,
}

impl Attacked {
    fn start() -> Self {
        let backend = Backend::named("a");
        let proxy = Builder::on(Io::Epoll).backends(&[backend.address()]).start();
        let admin = proxy.admin();
        Self { _backend: backend, proxy, admin }
    }

    /// Another address of the loopback interface stands for another pod.
    fn connect_from(&self, pod: u8) -> io::Result<TcpStream> {
        connect(self.admin, pod)
    }

    /// Probes from the node's address, as the kubelet does; each is answered in time.
    #[track_caller]
    fn assert_probes(&self) {
        assert_probe(self.admin, NODE);
    }
}

const NODE: u8 = 200;

fn connect(admin: SocketAddr, pod: u8) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from(([127, 0, 1, pod], 0)).into())?;
    socket.connect_timeout(&admin.into(), PATIENCE)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

#[track_caller]
fn assert_probe(admin: SocketAddr, from: u8) {
    assert_answered(admin, from, "/livez");
}

#[track_caller]
fn assert_answered(admin: SocketAddr, from: u8, probe: &str) {
    let begun = Instant::now();
    let stream = connect(admin, from).unwrap();
    ask_for(&stream, probe);
    let answer = read_all(&stream);
    assert!(
        answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("\r\n\r\nok\n"),
        "{answer:?}"
    );
    assert!(begun.elapsed() < PROBE_TIMEOUT, "{probe} took {:?}", begun.elapsed());
}

fn ask_for(mut stream: &TcpStream, path: &str) {
    let head = format!("GET {path} HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
}

#[track_caller]
fn read_all(mut stream: &TcpStream) -> String {
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

/// How long it takes until the proxy closes a connection that it owes nothing.
fn closed_after(mut stream: &TcpStream) -> Duration {
    let begun = Instant::now();
    // An answer that says what was wrong may come first; a reset is a close too.
    let _ = io::copy(&mut stream, &mut io::sink());
    begun.elapsed()
}

#[test]
fn silent_connections_leave_a_place_for_probes() {
    let attacked = Attacked::start();
    let silent: Vec<_> = (0..128).map(|_| attacked.connect_from(1).unwrap()).collect();
    attacked.assert_probes();
    // Also where they come from the probe's own address, which several peers may share.
    let shared: Vec<_> = (0..128).map(|_| attacked.connect_from(NODE).unwrap()).collect();
    attacked.assert_probes();
    let many: Vec<_> = (0..128).map(|pod| attacked.connect_from(pod).unwrap()).collect();
    attacked.assert_probes();
    for stream in silent.iter().chain(&shared).chain(&many) {
        let closed = closed_after(stream);
        assert!(closed < Duration::from_secs(3), "a silent connection lived for {closed:?}");
    }
}

/// Keeps 10 connections open until it is over. Returns how many it opened.
fn reopen(attacked: &Attacked, pod: u8, over: &AtomicBool) -> u32 {
    let mut open: Vec<TcpStream> = Vec::new();
    let mut count = 0;
    while !over.load(Relaxed) {
        open.retain(|stream| {
            let _ = stream.set_nonblocking(true);
            matches!((&*stream).read(&mut [0]), Err(e) if e.kind() == io::ErrorKind::WouldBlock)
        });
        while open.len() < 10 {
            open.extend(attacked.connect_from(pod));
            count += 1;
        }
        thread::yield_now();
    }
    count
}

#[test]
fn connections_reopened_at_once_leave_a_place_for_probes() {
    let _heavy = heavy();
    let attacked = Attacked::start();
    let over = AtomicBool::new(false);
    let reopened: u32 = thread::scope(|scope| {
        // 300 at a time, from another pod and from the probe's own address.
        let attackers: Vec<_> = (0..30)
            .map(|i| {
                let pod = if i % 3 == 0 { NODE } else { 1 };
                let (attacked, over) = (&attacked, &over);
                scope.spawn(move || reopen(attacked, pod, over))
            })
            .collect();
        let stop = SetOnDrop(&over);
        for _ in 0..20 {
            attacked.assert_probes();
            thread::sleep(Duration::from_millis(50));
        }
        drop(stop);
        attackers.into_iter().map(|attacker| attacker.join().unwrap()).sum()
    });
    measured(&format!("{reopened} connections were reopened during 20 probes"));
}

/// Sends a head, this header again and again, on one connection after the other.
fn send_endless_heads(
    attacked: &Attacked,
    pod: u8,
    header: &str,
    pause: Duration,
    over: &AtomicBool,
) {
    while !over.load(Relaxed) {
        let Ok(mut stream) = attacked.connect_from(pod) else { continue };
        let begun = Instant::now();
        let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\n");
        while stream.write_all(header.as_bytes()).is_ok() && !over.load(Relaxed) {
            thread::sleep(pause);
        }
        let lived = begun.elapsed();
        assert!(lived < Duration::from_secs(4), "a head was read for {lived:?}");
    }
}

#[test]
fn heads_that_never_end_are_given_up() {
    let attacked = Attacked::start();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for pod in 0..20 {
            let (attacked, over) = (&attacked, &over);
            // Half of them send as much as they can, half a byte now and then.
            let (header, pause) = match pod % 2 {
                0 => ("x-filler: 0123456789\r\n".repeat(1000), 1),
                _ => ("x".to_owned(), 50),
            };
            let pause = Duration::from_millis(pause);
            scope.spawn(move || send_endless_heads(attacked, pod, &header, pause, over));
        }
        let _stop = SetOnDrop(&over);
        for _ in 0..30 {
            attacked.assert_probes();
            thread::sleep(Duration::from_millis(100));
        }
    });
}

#[test]
fn a_head_that_is_too_large_is_answered() {
    let attacked = Attacked::start();
    let mut stream = attacked.connect_from(1).unwrap();
    let filler = "x".repeat(64 * 1024);
    // It may be closed before all is sent.
    let _ = write!(stream, "GET /metrics HTTP/1.1\r\nx-filler: {filler}\r\n\r\n");
    let answer = read_all(&stream);
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer:?}");
}

#[test]
fn readers_that_do_not_read_leave_a_place_for_others() {
    let large = Large::start();
    let stuck: Vec<_> = (0..120)
        .map(|i| {
            let mut stream = connect(large.admin, i % 4).unwrap();
            let path = ["/metrics", "/backends?limit=1024&workers=1"][usize::from(i % 2)];
            SockRef::from(&stream).set_recv_buffer_size(4096).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: pod\r\n\r\n").unwrap();
            stream
        })
        .collect();
    for _ in 0..10 {
        assert_probe(large.admin, NODE);
    }
    // A scraper that reads has all of it, though others come and do not.
    let scraped = large.scrape("/metrics");
    assert!(scraped.contains("\naegis_build_info"), "it is whole");
    assert_probe(large.admin, NODE);
    // What they did not read is cut, and looks cut.
    let ends = stuck.iter().map(|mut stream| io::copy(&mut stream, &mut io::sink()));
    let broken = ends.filter(Result::is_err).count();
    assert!(broken >= 100, "{broken} of {} were cut", stuck.len());
}

#[test]
fn watchers_leave_a_place_for_probes_however_many_they_are() {
    let large = Large::start();
    let over = AtomicBool::new(false);
    let watch = |pod: u8| {
        let mut answers = 0;
        while !over.load(Relaxed) {
            let Ok(stream) = connect(large.admin, pod) else { continue };
            ask_for(&stream, "/status");
            // It may have lost its place to another one.
            let mut answer = String::new();
            answers += u32::from((&stream).read_to_string(&mut answer).is_ok());
        }
        answers
    };
    thread::scope(|scope| {
        let stop = SetOnDrop(&over);
        // More than there are places, from as many addresses, beside some that ask and do not read.
        let watchers: Vec<_> = (0..24)
            .map(|pod| {
                scope.spawn({
                    let watch = &watch;
                    move || watch(pod)
                })
            })
            .collect();
        let stuck: Vec<_> = (0..24)
            .map(|pod| {
                let stream = connect(large.admin, 100 + pod).unwrap();
                SockRef::from(&stream).set_recv_buffer_size(4096).unwrap();
                ask_for(&stream, "/metrics");
                stream
            })
            .collect();
        for _ in 0..20 {
            assert_answered(large.admin, NODE, "/livez");
            assert_answered(large.admin, NODE, "/readyz");
        }
        drop((stuck, stop));
        let answers = watchers.into_iter().map(|watcher| watcher.join().unwrap()).sum::<u32>();
        assert!(answers > 24, "the pages are kept up to date: {answers} readings");
    });
}

#[test]
fn bodies_and_what_follows_a_request_are_not_waited_for() {
    let attacked = Attacked::start();
    let metrics = "GET /livez HTTP/1.1\r\nHost: pod\r\nContent-Length: 1000000\r\n\r\n";
    let post = "POST /metrics HTTP/1.1\r\nHost: pod\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n";
    let body = vec![b'x'; 100_000];
    for (request, status) in [(metrics, "200"), (post, "405")] {
        // All of the body at once, so that the answer meets it on its way; or slowly; or nothing.
        for pieces in [1, 100, 0] {
            let mut stream = attacked.connect_from(1).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            for piece in body.chunks(body.len() / pieces.max(1)).take(pieces) {
                if stream.write_all(piece).is_err() {
                    break;
                }
            }
            let begun = Instant::now();
            let answer = read_all(&stream);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer:?}");
            assert!(begun.elapsed() < PROBE_TIMEOUT, "{:?}", begun.elapsed());
        }
    }
}

#[test]
fn one_connection_carries_one_request_of_any_version() {
    let attacked = Attacked::start();
    for (request, version) in [
        ("GET /livez HTTP/1.0\r\n\r\n", "1.0"),
        ("GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "1.0"),
        ("GET /livez HTTP/1.1\r\nHost: pod\r\nConnection: keep-alive\r\n\r\n", "1.1"),
    ] {
        let mut stream = attacked.connect_from(1).unwrap();
        // Whatever is sent ahead has no answer, and does not take the first one's away.
        stream.write_all(request.repeat(1000).as_bytes()).unwrap();
        let answer = read_all(&stream);
        assert_eq!(answer.matches("HTTP/").count(), 1, "{answer:?}");
        assert!(answer.starts_with(&format!("HTTP/{version} 200 OK\r\n")), "{answer:?}");
        assert!(answer.ends_with("\r\n\r\nok\n"), "{answer:?}");
    }
    // A client that ends its direction behind the request has its answer, be it a long one.
    let mut stream = attacked.connect_from(1).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(read_all(&stream).contains("\naegis_build_info"));
}

#[test]
fn probes_are_answered_without_a_free_descriptor() {
    let attacked = Attacked::start();
    attacked.proxy.limit_descriptors(20);
    // Sessions take all that there are, and want more.
    let address = attacked.proxy.address();
    let _clients: Vec<_> = (0..50).map(|_| TcpStream::connect(address).unwrap()).collect();
    eventually("descriptors are short", PATIENCE, || {
        attacked.assert_probes();
        (!attacked.proxy.log_events("admin cannot accept").is_empty()).then_some(())
    });
    for _ in 0..50 {
        attacked.assert_probes();
    }
    let _silent: Vec<_> = (0..40).map(|i| attacked.connect_from(i).unwrap()).collect();
    for _ in 0..50 {
        attacked.assert_probes();
    }
    assert_eq!(attacked.proxy.log_events("admin cannot accept").len(), 1, "a line a change");
}

/// A proxy with as many endpoints as there can be, and many workers.
struct Large {
    proxy: Proxy,
    admin: SocketAddr,
}

const LARGE_WORKERS: usize = 16;
const LARGE_ENDPOINTS: usize = 1000;

impl Large {
    fn start() -> Self {
        let backend = Backend::named("a");
        let port = backend.address().port();
        let others = (0..LARGE_ENDPOINTS - 1).map(|i| {
            let [high, low] = u16::try_from(i).unwrap().to_be_bytes();
            SocketAddr::from(([127, 10, high, low], port))
        });
        let addresses: Vec<_> = [backend.address()].into_iter().chain(others).collect();
        let proxy = Builder::on(Io::Epoll)
            .backends(&addresses)
            .without_pool()
            .set("AEGIS_WORKERS", LARGE_WORKERS.to_string())
            .start();
        let admin = proxy.admin();
        Self { proxy, admin }
    }

    fn scrape(&self, path: &str) -> String {
        let answer = self.proxy.get(path);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body
    }
}

#[test]
fn large_pages_do_not_hold_up_the_control_thread() {
    let _heavy = heavy();
    let large = Large::start();
    for path in ["/backends", "/backends?limit=1024&workers=1", "/metrics", "/config"] {
        let over = AtomicBool::new(false);
        let cpu = large.proxy.thread_cpu("aegis-proxy");
        let (took, bytes, slowest) = thread::scope(|scope| {
            let prober = scope.spawn(|| {
                let mut slowest = Duration::ZERO;
                while !over.load(Relaxed) {
                    let begun = Instant::now();
                    assert_eq!(large.proxy.get("/livez").status, 200);
                    slowest = slowest.max(begun.elapsed());
                }
                slowest
            });
            let stop = SetOnDrop(&over);
            let begun = Instant::now();
            let bytes = large.scrape(path).len();
            let took = begun.elapsed();
            drop(stop);
            (took, bytes, prober.join().unwrap())
        });
        let cpu = large.proxy.thread_cpu("aegis-proxy").saturating_sub(cpu);
        measured(&format!(
            "{path}: {bytes} bytes in {took:?}, slowest probe {slowest:?}, CPU {cpu:?}"
        ));
        assert!(slowest < PROBE_TIMEOUT / 2, "a probe took {slowest:?} beside {path}");
    }
    let page = large.proxy.get("/backends").json();
    assert_eq!(page["endpoints_total"], LARGE_ENDPOINTS);
    assert_eq!(page["endpoints"].as_array().unwrap().len(), 100);
    assert!(page["endpoints"][0]["workers"].is_null(), "{}", page["endpoints"][0]);
    let all = large.proxy.get("/backends?limit=1024&workers=1").json();
    assert_eq!(all["endpoints"].as_array().unwrap().len(), LARGE_ENDPOINTS);
    assert_eq!(all["endpoints"][999]["workers"].as_array().unwrap().len(), LARGE_WORKERS);
    for wrong in ["limit=0", "limit=1025", "offset=x", "pages=1"] {
        let answer = large.proxy.get(&format!("/backends?{wrong}"));
        assert_eq!(answer.status, 400, "{wrong}");
        assert!(answer.body.contains("limit=1 to 1024"), "{}", answer.body);
    }
}

/// A proxy that cannot start until it is said which stores there are.
fn starting(api: &KubeApi, store: &Backend) -> (Proxy, SocketAddr) {
    let slice = Slice::of(store.address().port()).with("chronos-0", store.address().ip());
    api.slice("s", &slice);
    let proxy = Builder::on(Io::Epoll)
        .kubernetes(api)
        .protocol("chronos", "request")
        .set("AEGIS_BALANCE", "key_hash")
        .launch();
    let admin = proxy.admin();
    eventually("it says why it does not start", PATIENCE, || {
        let answer = proxy.get("/startupz?wait=0");
        assert_eq!(answer.status, 503);
        answer.body.contains(NOT_STARTED).then_some(())
    });
    (proxy, admin)
}

const NOT_STARTED: &str = "no StatefulSet \"chronos\"";

fn store() -> Backend {
    Backend::chronos_on(SocketAddr::new(host_ip(), 0), &Memory::default())
}

fn ask_for_start(admin: SocketAddr, pod: u8, method: &str) -> TcpStream {
    let mut stream = connect(admin, pod).unwrap();
    write!(stream, "{method} /startupz HTTP/1.1\r\nHost: pod\r\n\r\n").unwrap();
    stream
}

/// Whether nothing comes for as long as all else takes to be answered many times.
fn is_held(mut stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let is_silent = stream.read(&mut [0]).is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    is_silent
}

fn descriptors(proxy: &Proxy) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", proxy.id())).unwrap().count()
}

#[test]
fn the_startup_probe_is_held_until_the_start() {
    let (api, store) = (KubeApi::start(), store());
    let (proxy, admin) = starting(&api, &store);
    let get = ask_for_start(admin, NODE, "GET");
    let head = ask_for_start(admin, NODE, "HEAD");
    assert!(is_held(&get) && is_held(&head));
    let before = descriptors(&proxy);
    // Who leaves is forgotten, and who asks for other things, or comes from elsewhere, is answered.
    for _ in 0..10 {
        drop(ask_for_start(admin, NODE, "GET"));
        let others: Vec<_> = (0..4).map(|pod| ask_for_start(admin, pod, "GET")).collect();
        assert_probe(admin, NODE);
        drop(others);
        eventually("they are forgotten", PATIENCE, || {
            (descriptors(&proxy) <= before).then_some(())
        });
    }
    assert!(is_held(&get) && is_held(&head));
    let started = Instant::now();
    api.stateful_set("chronos", 1);
    let (get, head) = (read_all(&get), read_all(&head));
    assert!(get.starts_with("HTTP/1.1 200 ") && get.ends_with("\r\n\r\nok\n"), "{get:?}");
    assert!(head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"), "{head:?}");
    measured(&format!(
        "answered {:?} after the last thing that the start needs",
        started.elapsed()
    ));
    let answer = read_all(&ask_for_start(admin, NODE, "GET"));
    assert!(answer.ends_with("\r\n\r\nok\n"), "{answer:?}");
}

#[test]
fn a_start_that_does_not_come_is_answered_with_its_reason() {
    let (api, store) = (KubeApi::start(), store());
    let (proxy, admin) = starting(&api, &store);
    let begun = Instant::now();
    // As many as there may be from one address: who comes beyond gets the answer of the first.
    let mut held: Vec<_> = (0..5).map(|_| ask_for_start(admin, 1, "GET")).collect();
    let first = read_all(&held.remove(0));
    assert!(first.starts_with("HTTP/1.1 503 ") && first.contains(NOT_STARTED), "{first:?}");
    assert!(begun.elapsed() < Duration::from_secs(4), "it was not held: {:?}", begun.elapsed());
    for stream in &held {
        let answer = read_all(stream);
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains(NOT_STARTED), "{answer:?}");
        // The charts' probe waits for 10 s.
        let waited = begun.elapsed().as_secs_f64();
        assert!((7.0..10.0).contains(&waited), "{waited} s");
    }
    for query in ["wait=9", "wait=", "wait=x", "for=1"] {
        assert_eq!(proxy.get(&format!("/startupz?{query}")).status, 400, "{query}");
    }
}
