//! How sessions end: what a side sent before its end is delivered, what was cut looks cut, and who
//! has left is not served.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use crate::support::backend::{Backend, BlackHole, Crowd, reset_on_close};
use crate::support::client::{
    ask, connect, is_silent, read_end, read_expected, read_line, read_to_end, reset, try_connect,
};
use crate::support::kube_api::{KubeApi, Slice, host_ip};
use crate::support::metrics::{
    ACCEPT_PAUSES, DISCOVERY_ENDPOINTS, SESSIONS_ACTIVE, SESSIONS_CLOSED,
};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, heavy, measured, on_both_drivers, pattern, ports};

on_both_drivers![
    a_reply_before_a_reset_arrives_in_full_and_then_the_reset,
    an_upload_before_a_reset_arrives_in_full_and_then_the_reset,
    a_slow_reader_gets_all_of_a_long_reply_before_the_reset,
    a_slow_backend_gets_all_of_a_long_upload_before_the_reset,
    a_whole_reply_before_a_break_arrives_in_full_and_then_its_end,
    a_reply_to_an_opaque_client_arrives_in_full_before_the_reset,
    a_backend_that_answers_before_it_reads_on_gets_all_of_an_upload_before_the_reset,
    a_drain_deadline_ends_the_wait_for_a_reader_that_takes_nothing,
    a_break_is_heard_of_a_side_that_is_not_received_from,
    a_reply_cut_by_the_idle_timeout_looks_cut_on_both_sides,
    a_reply_cut_by_the_half_close_timeout_looks_cut_on_both_sides,
    a_reply_cut_by_the_drain_deadline_looks_cut_on_both_sides,
    a_reply_cut_by_a_second_signal_looks_cut_on_both_sides,
    a_reply_cut_by_the_end_of_its_endpoint_looks_cut_on_both_sides,
    a_whole_reply_outlives_the_half_close_timeout_of_its_session,
    clients_that_leave_while_there_is_no_endpoint_free_their_places,
    clients_that_leave_while_they_are_connected_free_their_places,
    bytes_that_a_client_sent_before_it_had_a_backend_arrive_in_order,
    a_drain_takes_in_full_accept_queues_beside_opaque_clients,
];

const KB: usize = 1 << 10;
const MB: usize = 1 << 20;

/// Of a reader that takes 100 MB/s at most,
const SHORT_PAUSE: Duration = Duration::from_millis(2);
/// and one that takes 10 MB/s: so megabytes are on their way when the other side breaks.
const LONG_PAUSE: Duration = Duration::from_millis(25);

/// Waits until the peer's kernel has everything that was written to this socket.
fn wait_delivered(stream: &TcpStream) {
    let (local, peer) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
    let ends = [local, peer].map(|end| match end {
        SocketAddr::V4(end) => {
            format!("{:08X}:{:04X}", u32::from_ne_bytes(end.ip().octets()), end.port())
        }
        SocketAddr::V6(_) => unreachable!("tests use IPv4"),
    });
    eventually("all is delivered", PATIENCE, || {
        let table = fs::read_to_string("/proc/net/tcp").unwrap();
        let fields = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let found = fields.into_iter().find(|fields| fields[1..3] == ends);
        let queues = found.unwrap_or_else(|| panic!("no {ends:?} in {table}"))[4].to_owned();
        queues.starts_with("00000000:").then_some(())
    });
}

/// A backend whose connections report something to the test.
fn reporting<T: Send + 'static>(
    handler: impl Fn(&TcpStream, &Sender<T>) + Send + Sync + 'static,
) -> (Backend, Receiver<T>) {
    let (report, reports) = mpsc::channel();
    (Backend::scripted(move |stream| handler(stream, &report)), reports)
}

/// Says that it is connected, so that what follows is not sent to a proxy that still connects.
fn welcome(mut stream: &TcpStream) -> io::Result<()> {
    stream.write_all(b"welcome\n")
}

fn connect_welcome(proxy: &Proxy) -> TcpStream {
    let client = connect(proxy.address());
    assert_eq!(read_line(&client).unwrap(), "welcome");
    client
}

fn proxy_to(io: Io, backend: &Backend) -> Proxy {
    Builder::on(io).backends(&[backend.address()]).without_pool().start()
}

fn expect_reset(mut stream: &TcpStream) {
    match stream.read(&mut [0]) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("{other:?} instead of a reset"),
    }
}

/// Reads what is a part of `expected`, with a pause after each piece. Returns how many bytes came,
/// and what came behind them.
fn read_slowly(
    mut stream: &TcpStream,
    expected: &[u8],
    pause: Duration,
) -> (usize, io::Result<usize>) {
    let mut buffer = vec![0; 256 * KB];
    let mut at = 0;
    loop {
        match stream.read(&mut buffer) {
            Ok(n @ 1..) => {
                assert!(buffer[..n] == expected[at..][..n], "wrong bytes behind {at}");
                at += n;
                thread::sleep(pause);
            }
            end => return (at, end),
        }
    }
}

fn assert_reset_behind(outcome: (usize, io::Result<usize>), expected: usize) {
    let (count, end) = outcome;
    assert_eq!(count, expected, "before {end:?}");
    assert!(end.as_ref().is_err_and(|e| e.kind() == ErrorKind::ConnectionReset), "{end:?}");
}

fn a_reply_before_a_reset_arrives_in_full_and_then_the_reset(io: Io) {
    for size in [1, 20 * KB, 200 * KB, 400 * KB] {
        let (backend, closed) = reporting(move |mut stream, closed| {
            let _ = stream.read_exact(&mut [0; 4]);
            if stream.write_all(pattern(1, size)).is_ok() {
                wait_delivered(stream);
                // The rest of the request is unread: the kernel makes this a reset.
                let _ = closed.send(());
            }
        });
        let proxy = proxy_to(io, &backend);
        for _ in 0..5 {
            let mut client = connect(proxy.address());
            client.write_all(pattern(2, 10_000)).unwrap();
            closed.recv_timeout(PATIENCE).unwrap();
            thread::sleep(Duration::from_millis(50));
            assert_reset_behind(read_slowly(&client, pattern(1, size), SHORT_PAUSE), size);
        }
        proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
        assert_eq!(proxy.metric(SESSIONS_CLOSED, &[("reason", "backend_reset")]), 5);
    }
}

fn an_upload_before_a_reset_arrives_in_full_and_then_the_reset(io: Io) {
    for size in [1, 20 * KB, 200 * KB, 400 * KB] {
        let (go, gone) = mpsc::channel();
        let gone = std::sync::Mutex::new(gone);
        let (backend, outcomes) = reporting(move |stream, outcomes| {
            if welcome(stream).is_ok() {
                let _: Result<(), _> = gone.lock().unwrap().recv_timeout(PATIENCE);
                thread::sleep(Duration::from_millis(50));
                let _ = outcomes.send(read_slowly(stream, pattern(1, size), SHORT_PAUSE));
            }
        });
        let proxy = proxy_to(io, &backend);
        for _ in 0..5 {
            let mut client = connect_welcome(&proxy);
            client.write_all(pattern(1, size)).unwrap();
            wait_delivered(&client);
            reset(client);
            go.send(()).unwrap();
            assert_reset_behind(outcomes.recv_timeout(PATIENCE).unwrap(), size);
        }
        proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
        assert_eq!(proxy.metric(SESSIONS_CLOSED, &[("reason", "client_reset")]), 5);
    }
}

const LONG: usize = 16 * MB;

fn a_slow_reader_gets_all_of_a_long_reply_before_the_reset(io: Io) {
    let (backend, closed) = reporting(|mut stream, closed| {
        let _ = stream.read_exact(&mut [0; 4]);
        if stream.write_all(pattern(3, LONG)).is_ok() {
            wait_delivered(stream);
            let _ = closed.send(());
        }
    });
    let proxy = proxy_to(io, &backend);
    let mut client = connect(proxy.address());
    client.write_all(pattern(2, 10_000)).unwrap();
    assert_reset_behind(read_slowly(&client, pattern(3, LONG), LONG_PAUSE), LONG);
    closed.recv_timeout(PATIENCE).unwrap();
}

fn a_slow_backend_gets_all_of_a_long_upload_before_the_reset(io: Io) {
    let (backend, outcomes) = reporting(|stream, outcomes| {
        if welcome(stream).is_ok() {
            let _ = outcomes.send(read_slowly(stream, pattern(3, LONG), LONG_PAUSE));
        }
    });
    let proxy = proxy_to(io, &backend);
    let mut client = connect_welcome(&proxy);
    client.write_all(pattern(3, LONG)).unwrap();
    wait_delivered(&client);
    reset(client);
    assert_reset_behind(outcomes.recv_timeout(PATIENCE).unwrap(), LONG);
}

fn a_whole_reply_before_a_break_arrives_in_full_and_then_its_end(io: Io) {
    const SIZE: usize = 200 * KB;
    for half_closed in [false, true] {
        let (backend, closed) = reporting(|mut stream, closed| {
            let _ = stream.read_exact(&mut [0; 4]);
            if stream.write_all(pattern(7, SIZE)).is_ok() {
                wait_delivered(stream);
                let _ = stream.shutdown(Shutdown::Write);
                let _ = closed.send(());
            }
        });
        let proxy = proxy_to(io, &backend);
        let mut client = connect(proxy.address());
        client.write_all(pattern(2, 10_000)).unwrap();
        if half_closed {
            client.shutdown(Shutdown::Write).unwrap();
        }
        closed.recv_timeout(PATIENCE).unwrap();
        thread::sleep(Duration::from_millis(50));
        let (count, end) = read_slowly(&client, pattern(7, SIZE), SHORT_PAUSE);
        assert_eq!((count, end.unwrap()), (SIZE, 0), "{half_closed}");
        drop(client);
        proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
    }
}

fn a_reply_to_an_opaque_client_arrives_in_full_before_the_reset(io: Io) {
    const SIZE: usize = 200 * KB;
    let (backend, closed) = reporting(|mut stream, closed| {
        let _ = stream.read_exact(&mut [0; 4]);
        if stream.write_all(pattern(7, SIZE)).is_ok() {
            wait_delivered(stream);
            let _ = closed.send(());
        }
    });
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .pool(0, 0)
        .protocol("http1", "request")
        .start();
    let mut client = connect(proxy.address());
    client.write_all(b"\n").unwrap();
    client.write_all(pattern(2, 10_000)).unwrap();
    closed.recv_timeout(PATIENCE).unwrap();
    thread::sleep(Duration::from_millis(50));
    assert_reset_behind(read_slowly(&client, pattern(7, SIZE), SHORT_PAUSE), SIZE);
}

/// Of what a connection takes while nobody reads from it, some way above.
const MORE_THAN_FITS: usize = 16 * MB;

fn a_backend_that_answers_before_it_reads_on_gets_all_of_an_upload_before_the_reset(io: Io) {
    let (backend, outcomes) = reporting(|mut stream, outcomes| {
        if welcome(stream).is_ok() {
            // Until the client is gone, nobody takes this.
            let answered = stream.write_all(pattern(8, MORE_THAN_FITS));
            let _ = outcomes.send((answered, read_slowly(stream, pattern(1, MB), SHORT_PAUSE)));
        }
    });
    let proxy = proxy_to(io, &backend);
    let mut client = connect_welcome(&proxy);
    client.write_all(pattern(1, MB)).unwrap();
    wait_delivered(&client);
    // Its close with unread input is a reset.
    drop(client);
    let (answered, outcome) = outcomes.recv_timeout(PATIENCE).unwrap();
    answered.unwrap();
    assert_reset_behind(outcome, MB);
}

fn a_drain_deadline_ends_the_wait_for_a_reader_that_takes_nothing(io: Io) {
    let (backend, closed) = reporting(|mut stream, closed| {
        let _ = stream.read_exact(&mut [0; 4]);
        if stream.write_all(pattern(7, 400 * KB)).is_ok() {
            wait_delivered(stream);
            let _ = closed.send(());
        }
    });
    let mut proxy = Builder::on(io)
        .backends(&[backend.address()])
        .without_pool()
        .set("AEGIS_DRAIN_TIMEOUT", "300ms")
        .start();
    let mut client = connect(proxy.address());
    client.write_all(pattern(2, 10_000)).unwrap();
    closed.recv_timeout(PATIENCE).unwrap();
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "backend_reset")], |count| count == 1);
    assert_eq!(proxy.metric(SESSIONS_ACTIVE, &[]), 1, "it still delivers");
    proxy.terminate();
    proxy.wait_clean(Duration::from_secs(5));
    let (count, end) = read_slowly(&client, pattern(7, 400 * KB), SHORT_PAUSE);
    assert!(count < 400 * KB && end.is_err(), "{count} {end:?}");
}

/// Writes until the other side has taken nothing for a moment.
fn fill(mut stream: &TcpStream) {
    let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
    while stream.write_all(pattern(4, MB)).is_ok() {}
}

fn a_break_is_heard_of_a_side_that_is_not_received_from(io: Io) {
    // Both send more than anybody takes; then one breaks, and the other after it.
    let (backend, connected) = reporting(|stream, connected| {
        if welcome(stream).is_ok() {
            fill(stream);
            let _ = connected.send(stream.try_clone().unwrap());
        }
    });
    let proxy = proxy_to(io, &backend);
    for first in ["client", "backend"] {
        let client = connect_welcome(&proxy);
        fill(&client);
        let served = connected.recv_timeout(PATIENCE).unwrap();
        let pair = if first == "client" { [client, served] } else { [served, client] };
        let before = proxy.metric(SESSIONS_CLOSED, &[]);
        for stream in pair {
            reset_on_close(&stream);
            drop(stream);
        }
        proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
        assert_eq!(proxy.metric(SESSIONS_CLOSED, &[]), before + 1);
    }
}

/// A backend that answers a line by a part of an answer, and tells when its connection is reset.
fn half_answerer() -> (Backend, Receiver<()>) {
    reporting(|mut stream, resets| {
        if read_line(stream).is_ok() && stream.write_all(b"half an ").is_ok() {
            // An end of stream may come first, from a client that ended its direction.
            eventually("a reset", PATIENCE, || stream.peer_addr().is_err().then_some(()));
            let _ = resets.send(());
        }
    })
}

fn expect_cut(builder: Builder, reason: &str, half_closed: bool, cut: impl FnOnce(&mut Proxy)) {
    let (backend, resets) = half_answerer();
    let mut proxy = builder.backends(&[backend.address()]).without_pool().start();
    let mut client = connect(proxy.address());
    client.write_all(b"answer\n").unwrap();
    if half_closed {
        client.shutdown(Shutdown::Write).unwrap();
    }
    read_expected(&client, b"half an ", 8).unwrap();
    cut(&mut proxy);
    expect_reset(&client);
    resets.recv_timeout(PATIENCE).unwrap();
    // Behind the deadline of a drain there is nobody left to count.
    if reason != "drain_deadline" {
        proxy.wait_for(SESSIONS_CLOSED, &[("reason", reason)], |count| count == 1);
    }
}

fn a_reply_cut_by_the_idle_timeout_looks_cut_on_both_sides(io: Io) {
    let builder = Builder::on(io).set("AEGIS_IDLE_TIMEOUT", "300ms");
    expect_cut(builder, "idle_timeout", false, |_| {});
}

fn a_reply_cut_by_the_half_close_timeout_looks_cut_on_both_sides(io: Io) {
    let builder = Builder::on(io).set("AEGIS_HALF_CLOSE_TIMEOUT", "300ms");
    expect_cut(builder, "half_close_timeout", true, |_| {});
}

fn a_reply_cut_by_the_drain_deadline_looks_cut_on_both_sides(io: Io) {
    for half_closed in [false, true] {
        let builder = Builder::on(io).set("AEGIS_DRAIN_TIMEOUT", "300ms");
        expect_cut(builder, "drain_deadline", half_closed, |proxy| proxy.terminate());
    }
}

fn a_reply_cut_by_a_second_signal_looks_cut_on_both_sides(io: Io) {
    let builder = Builder::on(io).set("AEGIS_DRAIN_DELAY", "60s");
    expect_cut(builder, "drain_deadline", false, |proxy| {
        proxy.terminate();
        eventually("it drains", PATIENCE, || (proxy.get("/readyz").status == 503).then_some(()));
        proxy.terminate();
    });
}

fn a_reply_cut_by_the_end_of_its_endpoint_looks_cut_on_both_sides(io: Io) {
    let api = KubeApi::start();
    let backend = Backend::named_at("half", host_ip());
    let address = backend.address();
    api.slice("a", &Slice::of(address.port()).with("pod-a", address.ip()));
    let proxy = on_kubernetes(io, &api).set("AEGIS_BACKEND_DRAIN", "100ms").start();
    proxy.wait_for(DISCOVERY_ENDPOINTS, &[], |found| found == 1);
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "who"), "half");
    api.delete_slice("a");
    expect_reset(&client);
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "endpoint_removed")], |count| count == 1);
}

fn a_whole_reply_outlives_the_half_close_timeout_of_its_session(io: Io) {
    const SIZE: usize = 200 * KB;
    let backend = Backend::scripted(|mut stream| {
        if read_line(stream).is_ok() && stream.write_all(pattern(5, SIZE)).is_ok() {
            let _ = stream.shutdown(Shutdown::Write);
            while stream.read(&mut [0]).is_ok_and(|n| n > 0) {}
        }
    });
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .without_pool()
        .set("AEGIS_HALF_CLOSE_TIMEOUT", "300ms")
        .start();
    let mut client = connect(proxy.address());
    client.write_all(b"answer\n").unwrap();
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "half_close_timeout")], |closed| closed == 1);
    assert_eq!(proxy.metric(SESSIONS_ACTIVE, &[]), 1, "it still delivers");
    read_expected(&client, pattern(5, SIZE), 10 * KB).unwrap();
    read_end(&client).unwrap();
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
}

fn on_kubernetes(io: Io, api: &KubeApi) -> Builder {
    Builder::on(io).kubernetes(api).set("AEGIS_KUBE_WATCH_TIMEOUT", "2s")
}

fn clients_that_leave_while_there_is_no_endpoint_free_their_places(io: Io) {
    const PLACES: usize = 10;
    let api = KubeApi::start();
    let backend = Backend::named_at("a", host_ip());
    let address = backend.address();
    let slice = Slice::of(address.port()).with("pod-a", address.ip());
    api.slice("a", &slice);
    let proxy = on_kubernetes(io, &api)
        .without_pool()
        .set("AEGIS_WORKERS", "1")
        .set("AEGIS_MAX_SESSIONS", PLACES.to_string())
        .set("AEGIS_ENDPOINT_WAIT", "60s")
        .start();
    proxy.wait_for(DISCOVERY_ENDPOINTS, &[], |found| found == 1);
    api.delete_slice("a");
    proxy.wait_for(DISCOVERY_ENDPOINTS, &[], |found| found == 0);

    // A third each: silent, behind a request by a reset, and those that stay.
    let mut silent: Vec<_> = (0..4).map(|_| connect(proxy.address())).collect();
    let mut asking: Vec<_> = (0..3).map(|_| connect(proxy.address())).collect();
    let staying: Vec<_> = (0..3).map(|_| connect(proxy.address())).collect();
    for mut client in asking.iter().chain(&staying) {
        client.write_all(b"who\n").unwrap();
    }
    // Those want their answer all the same.
    staying[0].shutdown(Shutdown::Write).unwrap();
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == PLACES as u64);
    let mut later = connect(proxy.address());
    later.write_all(b"who\n").unwrap();
    proxy.wait_for(ACCEPT_PAUSES, &[], |pauses| pauses >= 1);
    reset(silent.pop().unwrap());
    drop(silent);
    asking.drain(..).for_each(reset);
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 4);
    assert_eq!(proxy.metric(SESSIONS_CLOSED, &[("reason", "client_left")]), 3);
    assert_eq!(proxy.metric(SESSIONS_CLOSED, &[("reason", "client_reset")]), 4);
    assert!(is_silent(&later, Duration::from_millis(50)));

    assert_eq!(backend.accepted(), 0);
    api.slice("a", &slice);
    for client in staying.iter().chain([&later]) {
        assert_eq!(read_line(client).unwrap(), "a");
    }
    read_end(&staying[0]).unwrap();
    assert_eq!(backend.accepted(), 4, "nobody else is connected");
}

fn clients_that_leave_while_they_are_connected_free_their_places(io: Io) {
    let hole = BlackHole::new();
    let proxy = Builder::on(io)
        .backends(&[hole.address()])
        .without_pool()
        .set("AEGIS_CONNECT_TIMEOUT", "60s")
        .start();
    let silent: Vec<_> = (0..4).map(|_| connect(proxy.address())).collect();
    let asking: Vec<_> = (0..4).map(|_| connect(proxy.address())).collect();
    for mut client in &asking {
        client.write_all(b"who\n").unwrap();
    }
    asking[0].shutdown(Shutdown::Write).unwrap();
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 8);
    drop(silent);
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "client_left")], |count| count == 4);
    for client in asking.into_iter().skip(1) {
        reset(client);
    }
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "client_reset")], |count| count == 3);
    assert_eq!(proxy.metric(SESSIONS_ACTIVE, &[]), 1, "who asked and ended still waits");
}

fn bytes_that_a_client_sent_before_it_had_a_backend_arrive_in_order(io: Io) {
    let api = KubeApi::start();
    let backend = Backend::scripted_at((host_ip(), 0).into(), |mut stream| {
        if let Ok(bytes) = read_to_end(stream) {
            let _ = stream.write_all(&bytes);
        }
    });
    api.slice("a", &Slice::of(1));
    let proxy = on_kubernetes(io, &api).without_pool().set("AEGIS_ENDPOINT_WAIT", "60s").launch();
    let sizes = [1, 16 * KB, 100 * KB, 3 * MB];
    let clients: Vec<_> = sizes
        .into_iter()
        .map(|size| {
            let client = connect(proxy.address());
            let sender = client.try_clone().unwrap();
            let sending = thread::spawn(move || {
                (&sender).write_all(pattern(6, size)).unwrap();
                sender.shutdown(Shutdown::Write).unwrap();
            });
            (client, sending, size)
        })
        .collect();
    // The proxy accepts from the first snapshot on, and here that names nobody.
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == sizes.len() as u64);
    let address = backend.address();
    api.slice("a", &Slice::of(address.port()).with("pod-a", address.ip()));
    for (client, sending, size) in clients {
        read_expected(&client, pattern(6, size), 64 * KB).unwrap();
        read_end(&client).unwrap();
        sending.join().unwrap();
    }
}

fn a_drain_takes_in_full_accept_queues_beside_opaque_clients(io: Io) {
    const PLACES: usize = 100;
    const LISTENERS: usize = 3;
    /// What the kernel puts into each queue, which is one more than it was told.
    const QUEUE: usize = 1025;
    let _alone = heavy();
    let backend = Crowd::new();
    let addresses = [(); LISTENERS].map(|()| ports::unused(Ipv4Addr::LOCALHOST.into()));
    let listen: Vec<_> = addresses.iter().map(SocketAddr::to_string).collect();
    let mut proxy = Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_LISTEN", listen.join(","))
        .set("AEGIS_WORKERS", "1")
        .protocol("http1", "request")
        .set("AEGIS_POOL_SIZE", "4096")
        .pool(0, 0)
        .set("AEGIS_MAX_SESSIONS", PLACES.to_string())
        .set("AEGIS_QUEUE_TIMEOUT", "30s")
        .set("AEGIS_DRAIN_TIMEOUT", "60s")
        .start();
    // A line feed alone can be read in more than one way.
    let opaque = |address| {
        let mut client = try_connect(address)?;
        client.write_all(b"\nx")?;
        io::Result::Ok(client)
    };
    let served: Vec<_> = (0..PLACES).map(|i| opaque(addresses[i % LISTENERS]).unwrap()).collect();
    for mut client in &served {
        client.read_exact(&mut [0; 2]).unwrap();
    }
    proxy.wait_for(ACCEPT_PAUSES, &[], |pauses| pauses >= 1);
    let waiting: Vec<_> =
        (0..LISTENERS * QUEUE).map(|i| opaque(addresses[i % LISTENERS]).unwrap()).collect();
    proxy.terminate();
    for mut client in &waiting {
        let mut echo = [0; 2];
        client.read_exact(&mut echo).unwrap();
        assert_eq!(&echo, b"\nx");
    }
    measured(&format!("{} clients beside {PLACES} places", waiting.len()));
    drop((served, waiting));
    proxy.wait_clean(PATIENCE);
}
