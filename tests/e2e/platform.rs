//! What clients see of the platform's faults, and for how long: the figures of
//! `docs/PLATFORM-FAULTS.md`, into which `make faults` writes what these tests measure.
//!
//! Each fault meets the settings of the charts, as far as the fault can tell them apart, on epoll,
//! the driver of most pods.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use socket2::{Domain, SockFilter, SockRef, Socket, Type};
use tempfile::TempDir;

use crate::support::backend::{Backend, Memory};
use crate::support::client::read_line;
use crate::support::dns::{NameServer, Reply};
use crate::support::kube_api::{KubeApi, Slice, host_ip};
use crate::support::metrics::{DISCOVERY_ERRORS, POOL_CONNECTIONS};
use crate::support::onlookers::{
    CLIENTS, LIMIT, Seen, Span, answered, dial, short, staying, watch, writing,
};
use crate::support::proxy::{Builder, Proxy};
use crate::support::sandbox::hand_over;
use crate::support::{Io, PATIENCE, SetOnDrop, eventually, heavy, measured, ports, skip};

/// How long a fault lasts that clients should not notice.
const DOWN: Duration = Duration::from_secs(2);

/// The settings of the charts.
fn charted() -> Builder {
    Builder::on(Io::Epoll).protocol("chronos", "request")
}

fn store() -> Backend {
    Backend::chronos_on(SocketAddr::new(host_ip(), 0), &Memory::default())
}

/// An address that nobody listens at, for those who have to know it before they start.
fn free_address() -> SocketAddr {
    ports::unused([127, 0, 0, 1].into())
}

/// What clients see while the API is out of order for [`DOWN`], and how long after it was back the next
/// change was known. `errors` are the kind that the proxy counts meanwhile.
fn api_fails(api: &mut KubeApi, errors: &str, fail: fn(&mut KubeApi), mend: fn(&mut KubeApi)) {
    let stores = [store(), store()];
    api.announce("a", stores[0].address());
    let proxy = charted().kubernetes(api).start();
    proxy.wait_for_endpoints(1);
    let (seen, back) = watch(
        || staying(proxy.address()),
        || {
            fail(api);
            thread::sleep(DOWN);
            proxy.wait_for(DISCOVERY_ERRORS, &[("kind", errors)], |errors| errors >= 2);
            mend(api);
            let back = Instant::now();
            api.announce("b", stores[1].address());
            proxy.wait_for_endpoints(2);
            back.elapsed()
        },
    );
    measured(&format!("{seen}; the next change was known {} after it was back", Span(back)));
    assert_eq!(seen.failed(), 0);
    assert!(back < Duration::from_secs(15), "{back:?}");
}

#[test]
fn the_api_server_is_down() {
    let _alone = heavy();
    api_fails(&mut KubeApi::start(), "unreachable", KubeApi::kill, KubeApi::restart);
}

/// An API server without its etcd answers, and every answer is an error.
#[test]
fn etcd_is_down() {
    let _alone = heavy();
    let mut api = KubeApi::start();
    if api.faults().is_none() {
        return skip("a real API server cannot be parted from its etcd here");
    }
    api_fails(
        &mut api,
        "refused",
        |api| api.faults().unwrap().answer(Some(500)),
        |api| api.faults().unwrap().answer(None),
    );
}

#[test]
fn the_api_server_is_down_at_the_start() {
    /// For how long it stays away where nobody is served meanwhile.
    const AWAY: Duration = Duration::from_secs(6);
    let _alone = heavy();
    let api = KubeApi::start();
    let store = store();
    api.announce("a", store.address());
    let folder = TempDir::new().unwrap();
    hand_over(folder.path());
    let file = folder.path().join("endpoints.json");
    let builder = charted()
        .kubernetes(&api)
        .set("AEGIS_KUBE_SNAPSHOT", file.to_str().unwrap())
        .set("AEGIS_ENDPOINT_WAIT", "100ms");
    let mut proxy = builder.clone().start();
    proxy.wait_for_endpoints(1);
    eventually("the endpoints are kept", PATIENCE, || file.exists().then_some(()));
    proxy.terminate();
    proxy.wait_clean(PATIENCE);
    api.gate.close();

    let begun = Instant::now();
    let proxy = builder.launch();
    let ask = || short(proxy.address())().then(|| begun.elapsed());
    let mut served = None;
    while served.is_none() && begun.elapsed() < AWAY {
        served = ask();
    }
    api.gate.open();
    let back = Instant::now();
    eventually("clients are served", PATIENCE, ask);
    measured(&match served {
        Some(took) => format!("served {} after the start, by what was last known", Span(took)),
        None => format!(
            "nobody served while it was down ({}), and for {} after it was back",
            Span(AWAY),
            Span(back.elapsed())
        ),
    });
    assert!(served.is_some(), "nobody served by what was last known");
}

/// The status that the admin port answers within the two seconds that the charts' probes give it.
fn probe(admin: SocketAddr, path: &str) -> io::Result<u16> {
    const PROBE: Duration = Duration::from_secs(2);
    let mut stream = TcpStream::connect_timeout(&admin, PROBE)?;
    stream.set_read_timeout(Some(PROBE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: aegis\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
    status.ok_or_else(|| io::Error::other(format!("not HTTP: {text:?}")))
}

/// How long it takes to end when it is asked to, unless that takes longer than `within`.
fn terminate(proxy: &mut Proxy, within: Duration) -> Option<Duration> {
    proxy.terminate();
    let asked = Instant::now();
    while asked.elapsed() < within {
        if proxy.ended().is_some() {
            return Some(asked.elapsed());
        }
        thread::sleep(Duration::from_millis(5));
    }
    None
}

/// How an end that was waited for went.
fn ended(took: Option<Duration>, within: Duration) -> String {
    match took {
        Some(took) => format!("SIGTERM ended the proxy in {}", Span(took)),
        None => format!("SIGTERM did not end the proxy within {}", Span(within)),
    }
}

#[test]
fn the_name_server_is_down() {
    const END: Duration = Duration::from_secs(5);
    let _alone = heavy();
    let Some(server) = NameServer::start() else {
        return skip("the test may not give a process a name server of its own");
    };
    let local = |last| Ipv4Addr::new(127, 0, 53, last);
    let known = |last| server.set_addresses("store.test", 1, &[local(last).into()]);
    let silent = || server.set("store.test", Reply::Silence, Reply::Silence);
    known(2);
    let first = Backend::chronos_on((local(2), 0).into(), &Memory::default());
    let port = first.address().port();
    let _second = Backend::chronos_on((local(3), port).into(), &Memory::default());
    let mut proxy = charted()
        .set("AEGIS_BACKENDS", format!("store.test:{port}"))
        .set("AEGIS_DNS_REFRESH", "500ms")
        .mount(server.resolv_conf(), "/etc/resolv.conf")
        .start();
    let (seen, back) = watch(
        || staying(proxy.address()),
        || {
            silent();
            thread::sleep(DOWN);
            known(3);
            let back = Instant::now();
            eventually("the new address is known", PATIENCE, || {
                proxy.get("/backends").body.contains("127.0.53.3").then(|| back.elapsed())
            })
        },
    );
    silent();
    // Long enough for a question to be under way that nobody answers.
    thread::sleep(Duration::from_secs(1));
    let took = terminate(&mut proxy, END);
    measured(&format!(
        "{seen}; the next change was known {} after it was back; {} while it was down",
        Span(back),
        ended(took, END)
    ));
    assert_eq!(seen.failed(), 0);
    assert!(took.is_some());
}

/// Whoever reads the log stops doing so, and the pipe is full. The store ends, which the workers
/// would log, and comes back.
#[test]
fn the_log_collector_is_stuck() {
    const END: Duration = Duration::from_secs(5);
    let _alone = heavy();
    let mut store = store();
    let (mut reader, writer) = io::pipe().unwrap();
    // Two pages: of a single one that a line has begun, the rest would take others.
    rustix::pipe::fcntl_setpipe_size(&writer, 8192).unwrap();
    let (pipe, mut other) = (writer.try_clone().unwrap(), writer.try_clone().unwrap());
    let reading = Arc::new(AtomicBool::new(true));
    let collector = thread::spawn({
        let reading = reading.clone();
        move || {
            let mut lines = [0; 512];
            while reading.load(Relaxed) {
                assert!(reader.read(&mut lines).unwrap() > 0, "the proxy ended");
            }
            reader
        }
    });
    let builder = charted().backends(&[store.address()]).set("AEGIS_LOG", "debug");
    let mut proxy = builder.log_to(writer).start();
    reading.store(false, Relaxed);
    // What it waits for comes with the line that fills the pipe. The thread ends with the reader.
    thread::spawn(move || other.write_all(&vec![b'\n'; 1 << 20]));
    // Kept open, and never read again.
    let _unread = collector.join().unwrap();
    eventually("the pipe is full", PATIENCE, || {
        let mut writable = [PollFd::new(&pipe, PollFlags::OUT)];
        (poll(&mut writable, Some(&Timespec::default())).unwrap() == 0).then_some(())
    });
    store.kill();
    // What fails now is the store's fault.
    drop(watch(|| staying(proxy.address()), || thread::sleep(Duration::from_secs(1))));
    store.start();
    let recovers = Instant::now();
    let recovered = loop {
        if short(proxy.address())() {
            break Some(recovers.elapsed());
        }
        if recovers.elapsed() > LIMIT {
            break None;
        }
    };
    let (seen, live) = watch(
        || staying(proxy.address()),
        || {
            thread::sleep(Duration::from_secs(1));
            probe(proxy.admin(), "/livez")
        },
    );
    let took = terminate(&mut proxy, END);
    let live = if live.is_ok_and(|status| status == 200) { "answers" } else { "does not answer" };
    measured(&format!("{seen}; /livez {live}; {}", ended(took, END)));
    assert!(recovered.is_some(), "nobody served though the store is back");
    assert_eq!((seen.failed(), live), (0, "answers"));
    assert!(took.is_some());
}

/// A neighbour opens connections to the admin port, says nothing on them, and opens new ones for
/// those that it loses.
#[test]
fn the_prober_is_attacked() {
    const SILENT: usize = 300;
    const LASTS: Duration = Duration::from_secs(3);
    let _alone = heavy();
    let store = store();
    let proxy = charted().backends(&[store.address()]).start();
    let stop = AtomicBool::new(false);
    let attack = || {
        let mut open = Vec::new();
        while !stop.load(Relaxed) {
            open.retain(|stream: &TcpStream| {
                stream.peek(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
            });
            while open.len() < SILENT {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                // Not the kubelet's address.
                socket.bind(&SocketAddr::from(([127, 0, 0, 3], 0)).into()).unwrap();
                let limit = Duration::from_millis(100);
                if socket.connect_timeout(&proxy.admin().into(), limit).is_err() {
                    break;
                }
                socket.set_nonblocking(true).unwrap();
                open.push(TcpStream::from(socket));
            }
            thread::sleep(Duration::from_millis(10));
        }
    };
    let (seen, (probes, failed, longest)) = thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        scope.spawn(attack);
        watch(
            || staying(proxy.address()),
            || {
                let (mut probes, mut failed, mut longest) = (0, 0, Duration::ZERO);
                let begun = Instant::now();
                while begun.elapsed() < LASTS {
                    let asked = Instant::now();
                    let outcome = probe(proxy.admin(), "/livez");
                    longest = longest.max(asked.elapsed());
                    probes += 1;
                    failed += usize::from(!outcome.is_ok_and(|status| status == 200));
                    thread::sleep(Duration::from_millis(100));
                }
                (probes, failed, longest)
            },
        )
    });
    measured(&format!(
        "{failed} of {probes} liveness probes failed, the longest took {}; clients: {seen}",
        Span(longest)
    ));
    assert_eq!(seen.failed(), 0);
    // The kubelet restarts the sidecar after three in a row.
    assert!(failed * 10 <= probes, "{failed} of {probes} probes failed");
}

/// A store whose host can vanish: the kernel drops what arrives there, and acknowledges nothing.
struct Host {
    address: SocketAddr,
    listener: TcpListener,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

fn answer_lines(mut stream: &TcpStream) {
    while read_line(stream).is_ok() && stream.write_all(b"v\n").is_ok() {}
    let _ = stream.shutdown(Shutdown::Both);
}

impl Host {
    fn start() -> Self {
        let listener = TcpListener::bind((host_ip(), 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (accepting, streams) = (listener.try_clone().unwrap(), Arc::<Mutex<Vec<_>>>::default());
        let shared = streams.clone();
        // Its threads live as long as the test program.
        thread::spawn(move || {
            for stream in accepting.incoming().map_while(Result::ok) {
                stream.set_nodelay(true).unwrap();
                shared.lock().unwrap().push(stream.try_clone().unwrap());
                thread::spawn(move || answer_lines(&stream));
            }
        });
        Self { address, listener, streams }
    }

    /// False where the test has no right to it.
    fn vanish(&self) -> bool {
        let nothing = [SockFilter::new(0x06 /* BPF_RET | BPF_K */, 0, 0, 0)];
        let streams = self.streams.lock().unwrap();
        SockRef::from(&self.listener).attach_filter(&nothing).is_ok()
            && streams.iter().all(|stream| SockRef::from(stream).attach_filter(&nothing).is_ok())
    }
}

/// How long a session or a request may wait for a node that is gone: `AEGIS_TCP_USER_TIMEOUT` is 5 s.
const GIVEN_UP: Duration = Duration::from_secs(12);

/// A node is gone without a word; its pod leaves the slices two seconds later.
fn black_hole(builder: Builder, staying_clients: bool) -> Option<Seen> {
    let _alone = heavy();
    let api = KubeApi::start();
    let (good, bad) = (store(), Host::start());
    api.announce("good", good.address());
    api.announce("bad", bad.address);
    let proxy = builder.kubernetes(&api).set("AEGIS_BALANCE", "round_robin").start();
    proxy.wait_for_endpoints(2);
    let client: &(dyn Fn() -> Box<dyn Fn() -> bool> + Sync) = if staying_clients {
        &|| Box::new(staying(proxy.address()))
    } else {
        &|| Box::new(short(proxy.address()))
    };
    // Short sessions take warm connections, and would use up all of them before the fault.
    let mut vanished = true;
    if !staying_clients {
        proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle >= 8);
        vanished = bad.vanish();
    }
    let (seen, ()) = watch(client, || {
        if staying_clients {
            eventually("connections to both", PATIENCE, || {
                (!bad.streams.lock().unwrap().is_empty()).then_some(())
            });
            thread::sleep(Duration::from_millis(300));
            vanished = bad.vanish();
        }
        thread::sleep(Duration::from_secs(2));
        api.delete_slice("bad");
        proxy.wait_for_endpoints(1);
        thread::sleep(Duration::from_secs(2));
    });
    if !vanished {
        skip("a socket filter needs CAP_NET_ADMIN");
        return None;
    }
    Some(seen)
}

#[test]
fn a_node_is_a_black_hole_for_requests() {
    let Some(seen) = black_hole(charted(), true) else { return };
    measured(&seen.to_string());
    assert!(seen.longest() < GIVEN_UP, "a GET hung for {:?}", seen.longest());
    assert_eq!(seen.failed(), 0, "a GET can be placed again");
}

#[test]
fn a_node_is_a_black_hole_for_short_sessions() {
    let Some(seen) = black_hole(Builder::on(Io::Epoll), false) else { return };
    measured(&seen.to_string());
    assert!(seen.longest() < GIVEN_UP, "a session hung for {:?}", seen.longest());
}

#[test]
fn a_node_is_a_black_hole_for_long_sessions() {
    let Some(seen) = black_hole(Builder::on(Io::Epoll), true) else { return };
    measured(&seen.to_string());
    assert!(seen.longest() < GIVEN_UP, "a session hung for {:?}", seen.longest());
}

/// Replaces each of three stores. `notice` is how long one goes on serving once its slice says
/// that it terminates: what a preStop hook gives; without one it ends before the slice says so.
fn rolling_update(notice: Option<Duration>) -> Seen {
    /// From a pod's end to the news of it.
    const NEWS: Duration = Duration::from_millis(100);
    let api = KubeApi::start();
    let memory = Memory::default();
    let at = || Backend::chronos_on(SocketAddr::new(host_ip(), 0), &memory);
    let mut stores: Vec<_> = (0..3).map(|_| at()).collect();
    for (number, store) in stores.iter().enumerate() {
        api.announce(&format!("s{number}"), store.address());
    }
    let proxy = charted().kubernetes(&api).start();
    proxy.wait_for_endpoints(3);
    let (seen, ()) = watch(
        || writing(proxy.address()),
        || {
            thread::sleep(Duration::from_millis(300));
            for (number, store) in stores.iter_mut().enumerate() {
                let (name, address) = (format!("s{number}"), store.address());
                let pod = format!("pod-s{number}");
                let news = Slice::of(address.port()).terminating(&pod, address.ip());
                if let Some(notice) = notice {
                    thread::sleep(NEWS);
                    api.slice(&name, &news);
                    proxy.wait_for_endpoints(2);
                    thread::sleep(notice);
                    store.kill();
                } else {
                    store.kill();
                    thread::sleep(NEWS);
                    api.slice(&name, &news);
                    proxy.wait_for_endpoints(2);
                }
                *store = at();
                api.announce(&name, store.address());
                proxy.wait_for_endpoints(3);
            }
            thread::sleep(Duration::from_millis(300));
        },
    );
    seen
}

#[test]
fn a_rolling_update_of_the_stores_without_a_pre_stop_hook() {
    let _alone = heavy();
    let seen = rolling_update(None);
    measured(&format!("writes: {seen}"));
    // Those that were under way may fail: each client has one for each store that ends.
    assert!(seen.failed() <= 3 * CLIENTS, "{} failed", seen.failed());
}

#[test]
fn a_rolling_update_of_the_stores_with_a_pre_stop_hook() {
    let _alone = heavy();
    let seen = rolling_update(Some(Duration::from_millis(500)));
    measured(&format!("writes: {seen}"));
    assert_eq!(seen.failed(), 0);
}

/// Restarts a proxy at its address, as the kubelet does with a container that has ended, but at
/// once, while the application keeps idle sessions. Gives for how long newcomers were not served.
fn restart(builder: Builder, signal: Signal) -> Seen {
    let store = store();
    let address = free_address();
    let builder = builder
        .backends(&[store.address()])
        .set("AEGIS_LISTEN", address.to_string())
        .set("AEGIS_DRAIN_TIMEOUT", "5s");
    let mut proxy = builder.clone().start();
    let idle: Vec<_> = (0..8).map(|_| dial(address).unwrap()).collect();
    assert!(idle.iter().all(answered));
    let (seen, proxy) = watch(
        || short(address),
        || {
            thread::sleep(Duration::from_millis(200));
            proxy.signal(signal);
            proxy.wait(2 * PATIENCE);
            let again = builder.start();
            thread::sleep(Duration::from_millis(200));
            again
        },
    );
    drop((proxy, idle));
    seen
}

#[test]
fn a_restart_in_place_under_requests() {
    let _alone = heavy();
    let seen = restart(charted(), Signal::TERM);
    measured(&format!("newcomers: {seen}"));
    assert!(seen.failing_for() < Duration::from_secs(3), "{seen}");
}

#[test]
fn a_restart_in_place_under_sessions() {
    let _alone = heavy();
    let seen = restart(Builder::on(Io::Epoll), Signal::TERM);
    measured(&format!("newcomers, with a drain of 5 s and idle sessions: {seen}"));
    // Not for as long as the idle sessions may stay.
    assert!(seen.failing_for() < Duration::from_secs(3), "{seen}");
}

#[test]
fn a_crash_in_place() {
    let _alone = heavy();
    let seen = restart(charted(), Signal::KILL);
    measured(&format!("newcomers: {seen}"));
    assert!(seen.failing_for() < Duration::from_secs(3), "{seen}");
}
