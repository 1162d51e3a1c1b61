//! SIGTERM: from the first signal to the exit.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect, try_ask, try_connect, wait_closed};
use crate::support::proxy::{Builder, LEAVING, Proxy};
use crate::support::{Io, PATIENCE, SetOnDrop, eventually, heavy, measured, on_both_drivers};

on_both_drivers![
    a_drain_under_load_cuts_no_session_and_drops_no_client,
    no_client_that_has_connected_is_reset_by_the_end_of_listening,
    sessions_that_outlast_the_deadline_are_ended_there,
    a_second_signal_ends_everything_at_once,
    a_drain_without_sessions_is_over_at_once,
];

/// Drains, each with clients that come as fast as they can.
const ROUNDS: usize = 12;

/// Waits until `/readyz` says no.
fn wait_unready(proxy: &Proxy) {
    let answer = eventually("/readyz says 503", PATIENCE, || {
        let answer = proxy.get("/readyz");
        (answer.status == 503).then_some(answer)
    });
    assert!(answer.body.to_lowercase().contains("draining"), "{}", answer.body);
}

fn a_drain_under_load_cuts_no_session_and_drops_no_client(io: Io) {
    let _alone = heavy();
    let backends = [Backend::named("up"), Backend::named("up")];
    let mut proxy = Builder::on(io)
        .backends(&backends.each_ref().map(Backend::address))
        .set("AEGIS_DRAIN_DELAY", "2s")
        .set("AEGIS_DRAIN_TIMEOUT", "60s")
        .start();
    let address = proxy.address();
    let (finish, newcomers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let keep_alive: Vec<_> = (0..8).map(|_| connect(address)).collect();
    let (enough, over) = (AtomicBool::new(false), Duration::from_millis(2500));
    thread::scope(|scope| {
        let (_finish, _enough) = (SetOnDrop(&finish), SetOnDrop(&enough));
        let (finish, enough) = (&finish, &enough);
        let stay = |client| scope.spawn(move || stay(client, finish));
        let staying: Vec<_> = keep_alive.iter().map(stay).collect();
        let coming: Vec<_> =
            (0..4).map(|_| scope.spawn(|| come_until(enough, address, 3, &newcomers))).collect();
        eventually("newcomers are served", PATIENCE, || {
            (newcomers.load(Relaxed) > 100).then_some(())
        });

        proxy.terminate();
        let told = Instant::now();
        wait_unready(&proxy);
        assert!(told.elapsed() < Duration::from_secs(1), "/readyz took {:?}", told.elapsed());
        assert_eq!(ask_once(address, "still?").unwrap(), "up");
        let served = newcomers.load(Relaxed);
        eventually("the delay is over", PATIENCE, || proxy.log_events(LEAVING).first().map(drop));
        assert!(told.elapsed() > Duration::from_millis(1500), "the delay was cut short");
        let later = newcomers.load(Relaxed);
        assert!(later > served, "nobody was served during the delay");
        // Nor is anybody refused later, as long as sessions hold the process up.
        eventually("more are served", PATIENCE, || {
            (newcomers.load(Relaxed) > later + 100 && told.elapsed() > over).then_some(())
        });

        finish.store(true, Relaxed);
        for client in staying {
            client.join().unwrap().unwrap();
        }
        enough.store(true, Relaxed);
        for client in coming {
            assert!(client.join().unwrap().unwrap() != Came::Refused, "{:?}", told.elapsed());
        }
    });
    drop(keep_alive);
    proxy.wait_clean(PATIENCE);
}

fn no_client_that_has_connected_is_reset_by_the_end_of_listening(io: Io) {
    let _alone = heavy();
    let backend = Backend::named("up");
    let (mut clients, mut warnings) = (0, Vec::new());
    for (round, delay) in ["0s", "200ms"].iter().cycle().take(ROUNDS).enumerate() {
        // Where requests are told apart, clients are sent away after one.
        let (protocol, mode, asks) =
            if round % 3 == 2 { ("chronos", "request", 1) } else { ("tcp", "preconnect", 3) };
        let listen = if round % 4 < 2 { "127.0.0.1:0" } else { "[::1]:0" };
        let mut proxy = Builder::on(io)
            .backends(&[backend.address()])
            .set("AEGIS_LISTEN", listen)
            .set("AEGIS_WORKERS", ["1", "3"][round / 4 % 2])
            .set("AEGIS_DRAIN_DELAY", *delay)
            .set("AEGIS_DRAIN_TIMEOUT", "1s")
            .protocol(protocol, mode)
            .start();
        let (address, served) = (proxy.address(), AtomicUsize::new(0));
        let never = AtomicBool::new(false);
        thread::scope(|scope| {
            let (never, served) = (&never, &served);
            let come = || scope.spawn(move || come_until(never, address, asks, served));
            let coming: Vec<_> = (0..12).map(|_| come()).collect();
            eventually("newcomers are served", PATIENCE, || {
                (served.load(Relaxed) > 100).then_some(())
            });
            proxy.terminate();
            for client in coming {
                assert_eq!(client.join().unwrap().unwrap(), Came::Refused);
            }
        });
        proxy.wait_clean(PATIENCE);
        warnings.extend(proxy.log_warnings());
        clients += served.load(Relaxed);
    }
    measured(&format!("{clients} clients served in {ROUNDS} drains, none of them reset"));
    assert_eq!(warnings, [""; 0]);
}

/// A keep-alive client: asks until told to finish, and a hundred times more.
fn stay(client: &TcpStream, finish: &AtomicBool) -> io::Result<()> {
    while !finish.load(Relaxed) {
        try_ask(client, "up?")?;
    }
    (0..100).try_for_each(|_| try_ask(client, "up?").map(drop))
}

/// Why somebody comes no more.
#[derive(Debug, PartialEq)]
enum Came {
    Enough,
    Refused,
}

/// Short sessions until it is enough, or the proxy no longer listens. Whatever else happens to a
/// client is an error, above all if it has connected.
fn come_until(
    enough: &AtomicBool,
    address: SocketAddr,
    asks: u32,
    served: &AtomicUsize,
) -> Result<Came, String> {
    let begun = Instant::now();
    while begun.elapsed() < 2 * PATIENCE {
        if enough.load(Relaxed) {
            return Ok(Came::Enough);
        }
        let client = match try_connect(address) {
            Ok(client) => client,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(Came::Refused),
            Err(error) => return Err(format!("connecting: {error}")),
        };
        for _ in 0..asks {
            try_ask(&client, "up?").map_err(|error| format!("accepted, then: {error}"))?;
        }
        served.fetch_add(1, Relaxed);
    }
    Err("never refused".to_owned())
}

fn sessions_that_outlast_the_deadline_are_ended_there(io: Io) {
    let backend = Backend::named("up");
    let mut proxy =
        Builder::on(io).backends(&[backend.address()]).set("AEGIS_DRAIN_TIMEOUT", "1s").start();
    let clients: Vec<_> = (0..4).map(|_| connect(proxy.address())).collect();
    for client in &clients {
        assert_eq!(ask(client, "up?"), "up");
    }

    proxy.terminate();
    let told = Instant::now();
    wait_unready(&proxy);
    assert_eq!(ask_once(proxy.address(), "newcomer?").unwrap(), "up");
    for client in &clients {
        wait_closed(client).unwrap();
    }
    let took = told.elapsed();
    assert!(took > Duration::from_millis(900), "cut before the deadline: {took:?}");
    assert!(took < Duration::from_secs(5), "long after the deadline: {took:?}");
    proxy.wait_clean(PATIENCE);
}

fn a_second_signal_ends_everything_at_once(io: Io) {
    let backend = Backend::named("up");
    let mut proxy = Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_DRAIN_DELAY", "60s")
        .set("AEGIS_DRAIN_TIMEOUT", "60s")
        .start();
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "up?"), "up");

    proxy.terminate();
    wait_unready(&proxy);
    assert_eq!(ask(&client, "up?"), "up");
    proxy.terminate();
    proxy.wait(Duration::from_secs(5));
    wait_closed(&client).unwrap();
}

fn a_drain_without_sessions_is_over_at_once(io: Io) {
    let backend = Backend::named("up");
    let mut proxy = Builder::on(io)
        .backends(&[backend.address()])
        .pool(4, 8)
        .set("AEGIS_DRAIN_TIMEOUT", "60s")
        .start();
    assert_eq!(ask_once(proxy.address(), "up?").unwrap(), "up");
    proxy.terminate();
    proxy.wait_clean(Duration::from_secs(5));
}

/// The first process of a container is not ended by a signal that it does not handle, so one that
/// comes before that is lost. Here it comes while the start tries again to have `io_uring`.
#[test]
fn a_signal_that_comes_during_the_start_is_not_lost() {
    let mut proxy = Builder::on(Io::Auto)
        .set("AEGIS_BACKENDS", "127.0.0.2:9")
        .set("AEGIS_DRAIN_DELAY", "0s")
        .deny(libc::SYS_io_uring_setup, libc::EAGAIN)
        .begin();
    let status = format!("/proc/{}/status", proxy.id());
    eventually("SIGTERM is handled", PATIENCE, || {
        let status = std::fs::read_to_string(&status).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        let caught = u64::from_str_radix(caught.trim(), 16).unwrap();
        (caught & 1 << (libc::SIGTERM - 1) != 0).then_some(())
    });
    assert_eq!(proxy.log_lines(), [""; 0], "the start has come no further");
    proxy.terminate();
    proxy.wait_clean(Duration::from_secs(5));
}
