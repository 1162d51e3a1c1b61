//! Active checks of endpoints: `AEGIS_CHECK_INTERVAL`.

use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::support::backend::Backend;
use crate::support::client::{ask_once, connect, read_line};
use crate::support::metrics::ENDPOINT_USABLE;
use crate::support::proxy::{Builder, Proxy};
use crate::support::sandbox::hand_over;
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    an_endpoint_that_accepts_and_never_answers_is_found_by_a_request_and_comes_back,
    an_endpoint_that_refuses_is_found_by_a_connect_without_any_client,
    a_web_server_is_well_while_it_says_so,
    an_endpoint_is_checked_once_per_interval_however_many_workers_there_are,
    while_all_fail_their_checks_clients_wait_and_are_not_sent_there,
    a_tier_is_left_for_its_checks_and_used_again,
    endpoints_that_hang_do_not_hold_up_the_checks_of_others,
    endpoints_that_all_begin_to_hang_at_once_do_not_hold_them_up_either,
    a_server_at_a_unix_socket_is_checked_by_connect_and_by_request,
    a_unix_socket_whose_queue_is_full_is_waited_for_as_by_clients,
    a_reply_that_comes_byte_by_byte_is_taken_and_one_without_an_end_is_not,
    what_is_wrong_about_checks_is_told_at_once,
];

const CHECKS: &str = "aegis_endpoint_checks_total";
const CHECK_FAILURES: &str = "aegis_endpoint_check_failures_total";

/// A store that answers each line with its name, or hangs while it is told to. It counts the `PING`s.
struct Store {
    server: Backend,
    hangs: Arc<AtomicBool>,
    pings: Arc<AtomicU64>,
}

impl Store {
    fn named(name: &'static str) -> Self {
        let (hangs, pings) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (its_hangs, its_pings) = (Arc::clone(&hangs), Arc::clone(&pings));
        let server = Backend::scripted(move |mut stream| {
            while let Ok(line) = read_line(stream) {
                if its_hangs.load(Relaxed) {
                    // Whoever asked has to lose patience.
                    let _ = stream.read(&mut [0; 64]);
                    return;
                }
                its_pings.fetch_add(u64::from(line == "PING"), Relaxed);
                let reply = if line == "PING" { "PONG" } else { name };
                if stream.write_all(format!("{reply}\n").as_bytes()).is_err() {
                    return;
                }
            }
        });
        Self { server, hangs, pings }
    }
}

fn checked(io: Io, backends: &[SocketAddr]) -> Builder {
    Builder::on(io)
        .backends(backends)
        .set("AEGIS_CHECK_INTERVAL", "100ms")
        .set("AEGIS_CONNECT_TIMEOUT", "200ms")
        .without_pool()
}

fn by_request(io: Io, backends: &[SocketAddr]) -> Builder {
    let builder = checked(io, backends).set("AEGIS_CHECK", "request");
    builder.set("AEGIS_PROTOCOL", "chronos")
}

/// Waits until an endpoint is in use, or not.
fn wait_for(proxy: &Proxy, endpoint: SocketAddr, usable: bool) {
    let name = endpoint.to_string();
    proxy.wait_for(ENDPOINT_USABLE, &[("endpoint", &name)], |now| now == u64::from(usable));
}

/// What the log says about why an endpoint is out of use.
fn why_unusable(proxy: &Proxy, endpoint: SocketAddr) -> String {
    let name = endpoint.to_string();
    // The log is written a moment after the metrics.
    eventually("the log says why", PATIENCE, || {
        let lines = proxy.log_events("out of use: its checks fail");
        let line = lines.into_iter().find(|line| line["endpoint"] == name.as_str())?;
        Some(line["error"].as_str()?.to_owned())
    })
}

fn an_endpoint_that_accepts_and_never_answers_is_found_by_a_request_and_comes_back(io: Io) {
    let (a, b) = (Store::named("a"), Store::named("b"));
    for mode in ["preconnect", "request"] {
        let (a_address, b_address) = (a.server.address(), b.server.address());
        let proxy = by_request(io, &[a_address, b_address])
            .set("AEGIS_POOL_MODE", mode)
            .set("AEGIS_BALANCE", "round_robin")
            // Requests go where a connection is idle.
            .pool(2, 4)
            .start();
        let who = || {
            let mut who: Vec<_> =
                (0..20).map(|_| ask_once(proxy.address(), "GET who").unwrap()).collect();
            who.sort_unstable();
            who.dedup();
            who
        };
        assert_eq!(who(), ["a", "b"]);
        a.hangs.store(true, Relaxed);
        wait_for(&proxy, a_address, false);
        // A worker has it a moment later.
        eventually("the other one serves alone", PATIENCE, || {
            let asked: Vec<_> = (0..4).map(|_| connect(proxy.address())).collect();
            let quick = asked.iter().all(|client| {
                client.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
                (&*client).write_all(b"GET who\n").unwrap();
                read_line(client).is_ok_and(|who| who == "b")
            });
            quick.then_some(())
        });
        assert_eq!(who(), ["b"]);
        let rows = proxy.get("/backends").json();
        assert_eq!(rows["endpoints"][0]["state"], "fails_check");
        assert!(proxy.metric(CHECK_FAILURES, &[]) >= 3);
        a.hangs.store(false, Relaxed);
        wait_for(&proxy, a_address, true);
        eventually("both serve", PATIENCE, || (who() == ["a", "b"]).then_some(()));
        assert_eq!(proxy.log_events("out of use: its checks fail").len(), 1);
        assert_eq!(proxy.log_events("in use again: its checks pass").len(), 1);
    }
}

fn an_endpoint_that_refuses_is_found_by_a_connect_without_any_client(io: Io) {
    let mut server = Backend::named("a");
    let proxy = checked(io, &[server.address()]).start();
    proxy.wait_for(CHECKS, &[], |checks| checks >= 2);
    assert_eq!(proxy.metric(CHECK_FAILURES, &[]), 0);
    server.kill();
    wait_for(&proxy, server.address(), false);
    assert_eq!(proxy.metric("aegis_endpoint_ejections_total", &[]), 0, "no worker has tried");
    assert!(proxy.get("/readyz").body.contains("no endpoint usable"));
    server.start();
    wait_for(&proxy, server.address(), true);
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
}

fn a_web_server_is_well_while_it_says_so(io: Io) {
    let status = Arc::new(AtomicU64::new(200));
    let its_status = Arc::clone(&status);
    let server = Backend::scripted(move |mut stream| {
        let line = read_line(stream).unwrap_or_default();
        let is_asked = line.trim() == "GET /healthz HTTP/1.1";
        let status = if is_asked { its_status.load(Relaxed) } else { 404 };
        let _ = write!(stream, "HTTP/1.1 {status} So\r\nContent-Length: 0\r\n\r\n");
        let _ = stream.read(&mut [0; 1024]);
    });
    let proxy = checked(io, &[server.address()])
        .set("AEGIS_CHECK", "request")
        .set("AEGIS_CHECK_PATH", "/healthz")
        .set("AEGIS_PROTOCOL", "http1")
        // Nothing hangs: what is slow is this machine.
        .set("AEGIS_CONNECT_TIMEOUT", "10s")
        .start();
    proxy.wait_for(CHECKS, &[], |checks| checks >= 5);
    assert_eq!(proxy.metric(CHECK_FAILURES, &[]), 0);
    status.store(503, Relaxed);
    wait_for(&proxy, server.address(), false);
    assert!(why_unusable(&proxy, server.address()).contains("503"));
    status.store(204, Relaxed);
    wait_for(&proxy, server.address(), true);
}

fn an_endpoint_is_checked_once_per_interval_however_many_workers_there_are(io: Io) {
    let store = Store::named("a");
    let proxy = by_request(io, &[store.server.address()]).set("AEGIS_WORKERS", "4").start();
    let (begun, before) = (Instant::now(), store.pings.load(Relaxed));
    proxy.wait_for(CHECKS, &[], |checks| checks >= 20);
    let (made, took) = (store.pings.load(Relaxed) - before, begun.elapsed());
    // A tenth sooner at the soonest.
    let most = took.as_millis() as u64 / 90 + 1;
    assert!(made <= most, "{made} checks in {took:?}");
    // One may be under way.
    let pings = store.pings.load(Relaxed);
    assert!(store.server.accepted() <= pings + 1, "and nobody else");
}

fn while_all_fail_their_checks_clients_wait_and_are_not_sent_there(io: Io) {
    let store = Store::named("a");
    let proxy = by_request(io, &[store.server.address()]).set("AEGIS_ENDPOINT_WAIT", "1m").start();
    store.hangs.store(true, Relaxed);
    wait_for(&proxy, store.server.address(), false);
    let waiting: Vec<_> = (0..5).map(|_| connect(proxy.address())).collect();
    for mut client in &waiting {
        client.write_all(b"GET who\n").unwrap();
    }
    proxy.wait_for("aegis_clients_waiting", &[], |waiting| waiting == 5);
    assert_eq!(proxy.metric("aegis_endpoint_connects_total", &[]), 0);
    store.hangs.store(false, Relaxed);
    for client in &waiting {
        assert_eq!(read_line(client).unwrap(), "a");
    }
}

fn a_tier_is_left_for_its_checks_and_used_again(io: Io) {
    let (first, spare) = (Store::named("first"), Store::named("spare"));
    let proxy = by_request(io, &[first.server.address()])
        .set("AEGIS_BACKUPS", spare.server.address().to_string())
        .set("AEGIS_FAILBACK_TIME", "500ms")
        .start();
    let tier = |tier: u64| proxy.wait_for("aegis_endpoint_tier", &[], |tiers| tiers == 2 * tier);
    assert_eq!(ask_once(proxy.address(), "GET who").unwrap(), "first");
    first.hangs.store(true, Relaxed);
    tier(1);
    assert_eq!(ask_once(proxy.address(), "GET who").unwrap(), "spare");
    first.hangs.store(false, Relaxed);
    tier(0);
    assert_eq!(ask_once(proxy.address(), "GET who").unwrap(), "first");
}

fn endpoints_that_hang_do_not_hold_up_the_checks_of_others(io: Io) {
    let (store, hang) = (Store::named("a"), Arc::<AtomicBool>::default());
    let others: Vec<_> = (0..80)
        .map(|_| {
            let hang = Arc::clone(&hang);
            Backend::scripted(move |mut stream| {
                while hang.load(Relaxed) && matches!(stream.read(&mut [0; 64]), Ok(1..)) {}
            })
        })
        .collect();
    let mut backends: Vec<_> = others.iter().map(Backend::address).collect();
    backends.push(store.server.address());
    let proxy = by_request(io, &backends)
        .set("AEGIS_CHECK_FALL", "1")
        // Those that hang do so for longer than the test takes.
        .set("AEGIS_CONNECT_TIMEOUT", "5m")
        .start();
    proxy.wait_for(ENDPOINT_USABLE, &[], |usable| usable == 1);
    hang.store(true, Relaxed);
    let before = store.pings.load(Relaxed);
    eventually("the one that is well is checked on and on", PATIENCE, || {
        (store.pings.load(Relaxed) >= before + 30).then_some(())
    });
}

fn endpoints_that_all_begin_to_hang_at_once_do_not_hold_them_up_either(io: Io) {
    let stores: Vec<_> = (0..80).map(|_| Store::named("a")).collect();
    let backends: Vec<_> = stores.iter().map(|store| store.server.address()).collect();
    // Those that hang do so for longer than the test takes.
    let proxy = by_request(io, &backends).set("AEGIS_CONNECT_TIMEOUT", "5m").start();
    let (well, others) = stores.split_first().unwrap();
    eventually("each has passed a check", PATIENCE, || {
        stores.iter().all(|store| store.pings.load(Relaxed) > 0).then_some(())
    });
    for store in others {
        store.hangs.store(true, Relaxed);
    }
    let before = well.pings.load(Relaxed);
    eventually("the one that is well is checked on and on", PATIENCE, || {
        (well.pings.load(Relaxed) >= before + 30).then_some(())
    });
    assert_eq!(proxy.metric(CHECK_FAILURES, &[]), 0, "none has taken as long as it may");
}

/// A server at a Unix socket that answers a `PING`, or hangs while it is told to.
fn unix_store(path: &Path, hangs: &Arc<AtomicBool>) {
    let (listener, hangs) = (UnixListener::bind(path).unwrap(), Arc::clone(hangs));
    // The proxy may run as another user.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let hangs = Arc::clone(&hangs);
            thread::spawn(move || {
                let mut line = [0; 64];
                while matches!(stream.read(&mut line), Ok(1..))
                    && (hangs.load(Relaxed) || stream.write_all(b"PONG\n").is_ok())
                {
                }
            });
        }
    });
}

fn a_server_at_a_unix_socket_is_checked_by_connect_and_by_request(io: Io) {
    for check in ["connect", "request"] {
        let directory = tempfile::tempdir().unwrap();
        hand_over(directory.path());
        let path = directory.path().join("db.sock");
        let hangs = Arc::default();
        unix_store(&path, &hangs);
        let proxy = by_request(io, &[])
            .set("AEGIS_BACKENDS", format!("unix:{}", path.display()))
            .set("AEGIS_CHECK", check)
            .set("AEGIS_CONNECT_TIMEOUT", "1s")
            .start();
        let usable = |usable| proxy.wait_for(ENDPOINT_USABLE, &[], |now| now == usable);
        proxy.wait_for(CHECKS, &[], |checks| checks >= 3);
        assert_eq!(proxy.metric(CHECK_FAILURES, &[]), 0, "{check}");
        if check == "request" {
            hangs.store(true, Relaxed);
            usable(0);
            hangs.store(false, Relaxed);
            usable(1);
        }
        fs::remove_file(&path).unwrap();
        usable(0);
        unix_store(&path, &hangs);
        usable(1);
        assert_eq!(ask_once(proxy.address(), "PING").unwrap(), "PONG");
    }
}

fn a_unix_socket_whose_queue_is_full_is_waited_for_as_by_clients(io: Io) {
    let directory = tempfile::tempdir().unwrap();
    hand_over(directory.path());
    let path = directory.path().join("db.sock");
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    let address = SockAddr::unix(&path).unwrap();
    socket.bind(&address).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    socket.listen(0).unwrap();
    let waiting = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    waiting.connect(&address).unwrap();
    let proxy = checked(io, &[])
        .set("AEGIS_BACKENDS", format!("unix:{}", path.display()))
        .set("AEGIS_CONNECT_TIMEOUT", "1m")
        .start();
    // Time for a check to begin; if none does, nothing is seen, and nothing fails.
    thread::sleep(Duration::from_millis(500));
    let server = thread::spawn(move || while socket.accept().is_ok() {});
    proxy.wait_for(CHECKS, &[], |checks| checks >= 2);
    assert_eq!(proxy.metric(CHECK_FAILURES, &[]), 0, "it was busy, and is well");
    assert!(!server.is_finished());
}

fn a_reply_that_comes_byte_by_byte_is_taken_and_one_without_an_end_is_not(io: Io) {
    let slow = Backend::scripted(|mut stream| {
        let _ = read_line(stream);
        for byte in b"PONG\n" {
            let _ = stream.write_all(&[*byte]);
        }
        let _ = stream.read(&mut [0; 64]);
    });
    let endless = Backend::scripted(|mut stream| while stream.write_all(&[b'P'; 4096]).is_ok() {});
    let other = Backend::scripted(|mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        let _ = stream.read(&mut [0; 64]);
    });
    let addresses = [slow.address(), endless.address(), other.address()];
    let proxy = by_request(io, &addresses).set("AEGIS_CONNECT_TIMEOUT", "5s").start();
    wait_for(&proxy, endless.address(), false);
    wait_for(&proxy, other.address(), false);
    let name = slow.address().to_string();
    proxy.wait_for(CHECKS, &[("endpoint", &name)], |checks| checks >= 3);
    assert_eq!(proxy.metric(CHECK_FAILURES, &[("endpoint", &name)]), 0);
    for (server, reason) in [(&endless, "its reply is too long"), (&other, "HTTP/1.1 400")] {
        let why = why_unusable(&proxy, server.address());
        assert!(why.contains(reason), "{why}");
    }
}

fn what_is_wrong_about_checks_is_told_at_once(io: Io) {
    let ended = Builder::on(io)
        .set("AEGIS_BACKENDS", "127.0.0.2:9")
        .set("AEGIS_CHECK_INTERVAL", "1s")
        .set("AEGIS_CHECK", "request")
        .set("AEGIS_CHECK_PATH", "healthz")
        .set("AEGIS_CHECK_FALL", "0")
        .run();
    assert_eq!(ended.code, Some(78));
    for part in [
        "AEGIS_CHECK=\"request\" and AEGIS_PROTOCOL=\"tcp\": only chronos and http1",
        "AEGIS_CHECK_PATH=\"healthz\": ",
        "AEGIS_CHECK_FALL=\"0\": below 1",
    ] {
        assert!(ended.errors.contains(part), "{}", ended.errors);
    }
}
