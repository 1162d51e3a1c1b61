//! A sidecar that is restarted in place: the kubelet sends SIGTERM, waits for the end and starts a
//! new container, while the application lives on and wants its database.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::Backend;
use crate::support::client::{ask, connect, prepare, read_line, try_ask, wait_closed};
use crate::support::proxy::Builder;
use crate::support::{
    Io, PATIENCE, SetOnDrop, eventually, heavy, measured, on_both_drivers, ports,
};

on_both_drivers![
    newcomers_are_served_while_an_idle_session_holds_the_process_up,
    newcomers_are_served_while_a_request_holds_the_process_up,
    a_killed_process_leaves_its_port_to_the_next,
];

/// A newcomer comes so often.
const INTERVAL: Duration = Duration::from_millis(10);
/// A connect that takes longer is not service.
const CONNECT_MAX: Duration = Duration::from_millis(100);
/// An end and a start, on a busy machine. The time of the drain comes on top where newcomers are
/// refused during it.
const GAP_MAX: Duration = Duration::from_millis(1500);
const DRAIN: Duration = Duration::from_secs(3);

/// Comes again and again until it is enough; gives the longest time in which nobody was served.
fn longest_gap(address: SocketAddr, ask: &str, enough: &AtomicBool) -> Duration {
    let (mut served_at, mut longest) = (Instant::now(), Duration::ZERO);
    while !enough.load(Relaxed) {
        let served = TcpStream::connect_timeout(&address, CONNECT_MAX)
            .and_then(|client| prepare(&client).and_then(|()| try_ask(&client, ask)));
        if served.is_ok() {
            longest = longest.max(served_at.elapsed());
            served_at = Instant::now();
        }
        thread::sleep(INTERVAL);
    }
    longest.max(served_at.elapsed())
}

/// Restarts a proxy while `hold` holds it up and newcomers ask; gives the longest gap in service and
/// what the end of the first took.
fn restart(builder: Builder, question: &str, hold: impl FnOnce(SocketAddr)) -> [Duration; 2] {
    let address = ports::unused([127, 0, 0, 1].into());
    let builder = builder
        .set("AEGIS_LISTEN", address.to_string())
        .set("AEGIS_DRAIN_TIMEOUT", format!("{}s", DRAIN.as_secs()));
    let mut proxy = builder.clone().start();
    let enough = AtomicBool::new(false);
    thread::scope(|scope| {
        let _enough = SetOnDrop(&enough);
        hold(address);
        let gap = scope.spawn(|| longest_gap(address, question, &enough));
        thread::sleep(5 * INTERVAL);
        let asked = Instant::now();
        proxy.terminate();
        eventually("/readyz says no", PATIENCE, || {
            (proxy.get("/readyz").status == 503).then_some(())
        });
        assert!(asked.elapsed() < DRAIN / 2, "/readyz took {:?}", asked.elapsed());
        proxy.wait_clean(PATIENCE);
        let took = asked.elapsed();
        let next = builder.start();
        assert_eq!(next.address(), address);
        thread::sleep(5 * INTERVAL);
        enough.store(true, Relaxed);
        [gap.join().unwrap(), took]
    })
}

fn newcomers_are_served_while_an_idle_session_holds_the_process_up(io: Io) {
    let _alone = heavy();
    let backend = Backend::named("up");
    let builder = Builder::on(io).backends(&[backend.address()]);
    let mut idle = None;
    let [gap, took] = restart(builder, "up?", |address| {
        let client = idle.insert(connect(address));
        assert_eq!(ask(client, "up?"), "up");
    });
    measured(&format!("nobody was served for {gap:?} of a restart whose end took {took:?}"));
    assert!(took > DRAIN * 29 / 30, "the session was cut after {took:?}");
    assert!(gap < GAP_MAX, "nobody was served for {gap:?}");
    wait_closed(&idle.unwrap()).unwrap();
}

fn newcomers_are_served_while_a_request_holds_the_process_up(io: Io) {
    let _alone = heavy();
    let backend = Backend::scripted(|mut stream| {
        while let Ok(line) = read_line(stream) {
            thread::sleep(if line == "GET slow" { DRAIN / 3 } else { Duration::ZERO });
            if stream.write_all(b"answer\n").is_err() {
                break;
            }
        }
    });
    let builder = Builder::on(io).backends(&[backend.address()]).protocol("chronos", "request");
    let (mut busy, mut idle) = (None, None);
    let [gap, took] = restart(builder, "GET a", |address| {
        assert_eq!(ask(idle.insert(connect(address)), "GET a"), "answer");
        (&*busy.insert(connect(address))).write_all(b"GET slow\n").unwrap();
    });
    measured(&format!("nobody was served for {gap:?} of a restart whose end took {took:?}"));
    let busy = busy.unwrap();
    assert_eq!(read_line(&busy).unwrap(), "answer");
    assert!(took > DRAIN / 4, "nothing held the process up for longer than {took:?}");
    assert!(took < DRAIN * 5 / 6, "newcomers held the process up for {took:?}");
    assert!(gap < GAP_MAX, "nobody was served for {gap:?}");
}

fn a_killed_process_leaves_its_port_to_the_next(io: Io) {
    let _alone = heavy();
    let backend = Backend::named("up");
    let address = ports::unused([127, 0, 0, 1].into());
    let builder =
        Builder::on(io).backends(&[backend.address()]).set("AEGIS_LISTEN", address.to_string());
    for _ in 0..10 {
        let proxy = builder.clone().start();
        let client = connect(address);
        assert_eq!(ask(&client, "up?"), "up");
        // Killed, with a session.
        drop(proxy);
    }
}
