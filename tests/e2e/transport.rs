//! What the transport owes whoever it carries: bytes and ends at once, in order, and at no cost to
//! others.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::SendFlags;

use crate::support::backend::Backend;
use crate::support::client::{
    ask, ask_once, connect, expect_echo, read_end, read_expected, read_line, read_to_end, reset,
};
use crate::support::metrics::SESSIONS_ACTIVE;
use crate::support::proxy::{Builder, Proxy};
use crate::support::{
    Io, PATIENCE, SetOnDrop, eventually, heavy, measured, on_both_drivers, pattern,
};

on_both_drivers![
    a_reply_and_its_end_come_at_once,
    an_end_behind_a_small_message_comes_at_once_in_each_mode,
    a_half_closed_client_that_reads_slowly_costs_nothing,
    an_upload_to_a_half_closed_backend_costs_nothing,
    urgent_bytes_arrive_in_order_both_ways,
    urgent_bytes_arrive_though_signals_come_to_the_worker,
    bulk_is_whole_where_pipes_cannot_be_made,
    bulk_is_whole_where_it_may_not_be_spliced,
    stalled_readers_slow_nobody_down,
    listeners_are_served_in_turn_at_the_session_limit,
    newcomers_without_descriptors_wait_and_are_served,
];

const SPLICE_FAILURES: &str = "aegis_splice_failures_total";
const TURNS: &str = "aegis_worker_turns_total";

/// The middle one of some times.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn one_worker(io: Io, backend: &Backend) -> Builder {
    Builder::on(io).backends(&[backend.address()]).set("AEGIS_WORKERS", "1")
}

/// Answers what comes until the end of the stream, and closes, as a server of HTTP/1.0 does.
fn answers_at_the_end() -> Backend {
    Backend::scripted(|mut stream| {
        if let Ok(request) = read_to_end(stream) {
            let _ = stream.write_all(&request);
        }
    })
}

fn a_reply_and_its_end_come_at_once(io: Io) {
    let backend = answers_at_the_end();
    let proxy = one_worker(io, &backend).start();
    let times = (0..40).map(|_| {
        let mut client = connect(proxy.address());
        let begun = Instant::now();
        client.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&client).unwrap(), b"GET / HTTP/1.0\r\n\r\n");
        begun.elapsed()
    });
    let time = median(times.collect());
    measured(&format!("{time:?} from request and end to reply and end"));
    assert!(time < Duration::from_millis(30), "{time:?}");
}

fn an_end_behind_a_small_message_comes_at_once_in_each_mode(io: Io) {
    let backend = Backend::scripted(|mut stream| {
        let mut buffer = [0; 4096];
        while let Ok(1..) = stream.read(&mut buffer) {
            let answer = if buffer.starts_with(b"GET / ") {
                "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
            } else {
                "ok\n"
            };
            if stream.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    });
    for (protocol, request) in
        [("chronos", "GET a\n"), ("http1", "GET / HTTP/1.1\r\nHost: a\r\n\r\n")]
    {
        for mode in ["request", "session"] {
            let proxy = one_worker(io, &backend).protocol(protocol, mode).start();
            let times = (0..20).map(|_| {
                let mut client = connect(proxy.address());
                let begun = Instant::now();
                client.write_all(request.as_bytes()).unwrap();
                client.shutdown(Shutdown::Write).unwrap();
                let answer = read_to_end(&client).unwrap();
                assert!(String::from_utf8(answer).unwrap().trim_end().ends_with("ok"));
                begun.elapsed()
            });
            let time = median(times.collect());
            assert!(time < Duration::from_millis(30), "{time:?} with {protocol} by {mode}");
        }
    }
}

/// What the proxy's one worker did in a while: turns, and threads of the kernel's in its name.
fn idles(proxy: &Proxy, what: &str) {
    // It is still busy with filling what there is to fill.
    eventually("the worker comes to rest", PATIENCE, || {
        let before = proxy.metric(TURNS, &[]);
        thread::sleep(Duration::from_millis(200));
        (proxy.metric(TURNS, &[]) - before < 40).then_some(())
    });
    let (begun, before) = (proxy.thread_cpu("worker-0"), proxy.metric(TURNS, &[]));
    thread::sleep(Duration::from_millis(500));
    let turns = proxy.metric(TURNS, &[]) - before;
    let busy = proxy.thread_cpu("worker-0").saturating_sub(begun);
    assert!(turns < 100, "{turns} turns within 500 ms: {what}");
    assert!(busy < Duration::from_millis(100), "busy for {busy:?} of 500 ms: {what}");
    let helpers = proxy.threads().into_iter().filter(|name| name.starts_with("iou-wrk")).count();
    assert_eq!(helpers, 0, "threads of the kernel's pool wait for something: {what}");
}

fn a_half_closed_client_that_reads_slowly_costs_nothing(io: Io) {
    for (message, what) in [(16 << 20, "bulk"), (5000, "small messages")] {
        const TOTAL: usize = 16 << 20;
        let backend = Backend::scripted(move |mut stream| {
            let _ = read_to_end(stream);
            for piece in pattern(1, TOTAL).chunks(message) {
                if stream.write_all(piece).is_err() {
                    return;
                }
            }
        });
        let proxy = one_worker(io, &backend).start();
        let mut client = connect(proxy.address());
        client.write_all(b"all of it").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        read_expected(&client, &pattern(1, TOTAL)[..1000], 1000).unwrap();
        idles(&proxy, what);
        read_expected(&client, &pattern(1, TOTAL)[1000..], 1 << 16).unwrap();
        read_end(&client).unwrap();
    }
}

fn an_upload_to_a_half_closed_backend_costs_nothing(io: Io) {
    const TOTAL: usize = 16 << 20;
    let go_on = Arc::new(AtomicBool::new(false));
    let (outcome, outcomes) = std::sync::mpsc::channel();
    let backend = Backend::scripted({
        let go_on = go_on.clone();
        move |stream| {
            stream.shutdown(Shutdown::Write).unwrap();
            while !go_on.load(Relaxed) {
                thread::sleep(Duration::from_millis(5));
            }
            let read = read_expected(stream, pattern(2, TOTAL), 1 << 16);
            let _ = outcome.send(read.and_then(|()| read_end(stream)));
        }
    });
    let proxy = one_worker(io, &backend).without_pool().start();
    let client = connect(proxy.address());
    read_end(&client).unwrap();
    thread::scope(|scope| {
        let _go_on = SetOnDrop(&go_on);
        scope.spawn(|| {
            let mut writer = &client;
            writer.write_all(pattern(2, TOTAL)).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
        });
        idles(&proxy, "an upload");
        go_on.store(true, Relaxed);
        outcomes.recv_timeout(PATIENCE).unwrap().unwrap();
    });
}

/// Sends bytes of which some are urgent: the last one of each piece with that number.
fn write_with_urgent(mut stream: &TcpStream, bytes: &[u8], piece: usize, urgent: &[usize]) {
    for (number, piece) in bytes.chunks(piece).enumerate() {
        if urgent.contains(&number) {
            let last = piece.len() - 1;
            stream.write_all(&piece[..last]).unwrap();
            assert_eq!(rustix::net::send(stream, &piece[last..], SendFlags::OOB), Ok(1));
        } else {
            stream.write_all(piece).unwrap();
        }
    }
}

fn urgent_bytes_arrive_in_order_both_ways(io: Io) {
    const TOTAL: usize = 16 << 20;
    const PIECE: usize = 1 << 18;
    const LAST: usize = TOTAL / PIECE - 1;
    for urgent in [vec![0], vec![LAST / 2], vec![LAST], vec![0, 1, 5, 30, 31, LAST - 1, LAST]] {
        let marks = urgent.clone();
        let (outcome, outcomes) = std::sync::mpsc::channel();
        let backend = Backend::scripted(move |stream| {
            thread::scope(|scope| {
                scope.spawn(|| {
                    write_with_urgent(stream, pattern(3, TOTAL), PIECE, &marks);
                    stream.shutdown(Shutdown::Write).unwrap();
                });
                let read = read_expected(stream, pattern(4, TOTAL), 1 << 16);
                let _ = outcome.send(read.and_then(|()| read_end(stream)));
            });
        });
        let proxy = one_worker(io, &backend).without_pool().start();
        let client = connect(proxy.address());
        thread::scope(|scope| {
            scope.spawn(|| {
                write_with_urgent(&client, pattern(4, TOTAL), PIECE, &urgent);
                client.shutdown(Shutdown::Write).unwrap();
            });
            read_expected(&client, pattern(3, TOTAL), 1 << 16)
                .and_then(|()| read_end(&client))
                .unwrap_or_else(|error| panic!("to the client, marks at {urgent:?}: {error}"));
        });
        let read = outcomes.recv_timeout(PATIENCE).unwrap();
        read.unwrap_or_else(|error| panic!("to the backend, marks at {urgent:?}: {error}"));
    }
    // Between small messages, each of which is waited for.
    let backend = Backend::echo();
    let proxy = one_worker(io, &backend).start();
    let client = connect(proxy.address());
    for number in 0..30 {
        let message = pattern(number, 100);
        write_with_urgent(&client, message, 30, &[number % 4]);
        read_expected(&client, message, 100).unwrap();
    }
    write_with_urgent(&client, b"the end", 7, &[0]);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&client).unwrap(), b"the end");
}

/// A signal for one thread, as from a profiler or a debugger.
#[allow(unsafe_code, reason = "no crate of ours makes this call")]
fn signal_thread(thread: i64, signal: i32) {
    // SAFETY: the call takes numbers only.
    let outcome = unsafe { libc::syscall(libc::SYS_tkill, thread, signal) };
    assert_eq!(outcome, 0);
}

/// While one pends, the kernel says that there is nothing to receive at an urgent mark.
fn urgent_bytes_arrive_though_signals_come_to_the_worker(io: Io) {
    let backend = Backend::echo();
    // Its log would have a line for each that it hears of.
    let log = "info,aegis::control::lifecycle=warn";
    let proxy = one_worker(io, &backend).set("AEGIS_LOG", log).start();
    let worker = proxy.thread("worker-0");
    let worker = worker.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _over = SetOnDrop(&over);
        scope.spawn(|| {
            while !over.load(Relaxed) {
                signal_thread(worker, libc::SIGHUP);
            }
        });
        let client = connect(proxy.address());
        for number in 0..400 {
            let message = pattern(number, 100);
            write_with_urgent(&client, message, 30, &[number % 4]);
            read_expected(&client, message, 100).unwrap();
        }
    });
}

fn bulk_is_whole_where_pipes_cannot_be_made(io: Io) {
    // Those of the test's own process are blocking.
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    expect_copied(io, |proxy| proxy.deny_where(libc::SYS_pipe2, libc::EMFILE, (1, flags)));
}

fn bulk_is_whole_where_it_may_not_be_spliced(io: Io) {
    expect_copied(io, |proxy| proxy.deny(libc::SYS_splice, libc::EPERM));
}

fn expect_copied(io: Io, deny: impl Fn(Builder) -> Builder) {
    let backend = Backend::echo();
    let proxy = deny(one_worker(io, &backend)).start();
    let client = connect(proxy.address());
    let begun = Instant::now();
    expect_echo(&client, 5, 16 << 20).unwrap();
    proxy.wait_for(SPLICE_FAILURES, &[], |failures| failures > 0);
    let failures = proxy.metric(SPLICE_FAILURES, &[]);
    // Once, and again after a second each.
    let most = begun.elapsed().as_secs() + 1;
    assert!(failures <= most, "{failures} failures in {:?}", begun.elapsed());
}

fn stalled_readers_slow_nobody_down(io: Io) {
    const MESSAGE: usize = 100;
    let _alone = heavy();
    for (sessions, stalled) in [("200", 60), ("9000", 400)] {
        let (arrived, arrivals) = std::sync::mpsc::channel();
        let backend = Backend::scripted(move |mut stream| {
            let bulk = vec![7; 1 << 16];
            match read_line(stream).as_deref() {
                Ok("everything") => while stream.write_all(&bulk).is_ok() {},
                // What is not bulk is copied, and stalls in buffers instead of in the kernel.
                Ok("steadily") => {
                    while stream.write_all(&bulk).is_ok() {
                        thread::sleep(Duration::from_millis(4));
                    }
                }
                _ => {
                    while stream.read_exact(&mut [0; MESSAGE]).is_ok() {
                        let _ = arrived.send(Instant::now());
                    }
                }
            }
        });
        let proxy = one_worker(io, &backend).set("AEGIS_MAX_SESSIONS", sessions).start();
        let mut sender = connect(proxy.address());
        sender.write_all(b"messages\n").unwrap();
        let mut message_takes = || {
            let times = (0..60).map(|_| {
                thread::sleep(Duration::from_millis(2));
                let begun = Instant::now();
                sender.write_all(&[1; MESSAGE]).unwrap();
                arrivals.recv_timeout(PATIENCE).unwrap() - begun
            });
            median(times.collect())
        };
        let alone = message_takes();
        let readers: Vec<_> = (0..stalled).map(|_| stalled_reader(proxy.address())).collect();
        // Until nothing moves any more.
        let mut before = u64::MAX;
        eventually("all readers stall", PATIENCE, || {
            let bytes = proxy.metric("aegis_bytes_total", &[]);
            thread::sleep(Duration::from_millis(100));
            (std::mem::replace(&mut before, bytes) == bytes).then_some(())
        });
        let held = proxy.metric("aegis_buffers_in_use", &[]);
        let beside = message_takes();
        let mut bulk = connect(proxy.address());
        bulk.write_all(b"everything\n").unwrap();
        let (begun, mut bytes) = (Instant::now(), 0);
        let mut space = vec![0; 1 << 18];
        while begun.elapsed() < Duration::from_millis(300) {
            bytes += bulk.read(&mut space).unwrap();
        }
        let rate = bytes as f64 / begun.elapsed().as_secs_f64() / 1e6;
        let waits = proxy.metric("aegis_buffer_waits_total", &[]);
        measured(&format!(
            "of {sessions} sessions {stalled} stall on {held} buffers: a message takes {alone:?} \
             alone, {beside:?} beside them; bulk {rate:.0} MB/s; {waits} waits for buffers"
        ));
        assert!(beside < Duration::from_millis(10), "{beside:?} beside {stalled} that stall");
        assert_eq!(waits, 0, "somebody waited for a buffer");
        reset(bulk);
        readers.into_iter().for_each(reset);
        drop(sender);
        proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
    }
}

/// A client that asks for more than it reads, and takes little, so that many do not bring the
/// kernel's own memory to its limits.
fn stalled_reader(proxy: SocketAddr) -> TcpStream {
    let reader = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    reader.set_recv_buffer_size(4096).unwrap();
    reader.connect(&proxy.into()).unwrap();
    let mut reader = TcpStream::from(reader);
    reader.write_all(b"steadily\n").unwrap();
    reader
}

fn listeners_are_served_in_turn_at_the_session_limit(io: Io) {
    const CLIENTS: usize = 12;
    let backend = Backend::named("a");
    let proxy = one_worker(io, &backend)
        .set("AEGIS_LISTEN", "127.0.0.1:0,127.0.0.3:0")
        .set("AEGIS_MAX_SESSIONS", "1")
        .start();
    let addresses: Vec<SocketAddr> = proxy
        .log_events("listening")
        .iter()
        .map(|event| event["address"].as_str().unwrap().parse().unwrap())
        .collect();
    assert_eq!(addresses.len(), 2, "each listener is named in the log");
    for (crowded, other) in [(addresses[0], addresses[1]), (addresses[1], addresses[0])] {
        let first = connect(crowded);
        assert_eq!(ask(&first, "who"), "a");
        let served = Mutex::new(Vec::new());
        thread::scope(|scope| {
            let serve = |address| {
                let client = connect(address);
                let served = &served;
                scope.spawn(move || {
                    assert_eq!(ask(&client, "who"), "a");
                    served.lock().unwrap().push(address);
                });
            };
            (0..CLIENTS).for_each(|_| serve(crowded));
            serve(other);
            // All are in the accept queues by now.
            drop(first);
        });
        let at = served.into_inner().unwrap().iter().position(|&address| address == other);
        assert!(at.is_some_and(|at| at <= CLIENTS / 2), "the other listener's came at {at:?}");
    }
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
}

fn newcomers_without_descriptors_wait_and_are_served(io: Io) {
    const CLIENTS: usize = 40;
    let backend = Backend::named("a");
    let proxy = one_worker(io, &backend).without_pool().start();
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
    proxy.limit_descriptors(11);
    // The worker hears of it within a second.
    thread::sleep(Duration::from_millis(1200));
    let (served, most) = (Mutex::new(0_usize), Mutex::new(0));
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            let client = connect(proxy.address());
            let (served, most) = (&served, &most);
            scope.spawn(move || {
                assert_eq!(ask(&client, "who"), "a");
                let now = {
                    let mut served = served.lock().unwrap();
                    *served += 1;
                    *served
                };
                let mut most = most.lock().unwrap();
                *most = now.max(*most);
                drop(most);
                thread::sleep(Duration::from_millis(20));
                assert_eq!(ask(&client, "who"), "a");
                *served.lock().unwrap() -= 1;
            });
        }
    });
    let most = most.into_inner().unwrap();
    assert!(most < CLIENTS, "{most} of {CLIENTS} at a time: descriptors were not short");
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
}
