//! Hosts that are gone without a word: their packets are lost, and nothing says so. What waits on one
//! is given up within seconds, and placed again where that is safe; what is only slow is left alone.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::support::backend::{Backend, Memory};
use crate::support::client::{ask, connect, read_expected, read_line, try_ask, wait_closed};
use crate::support::link::{Fate, Link};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, eventually, measured, on_both_drivers, pattern};

on_both_drivers!(
    sessions_on_a_host_that_is_gone_are_cut_within_seconds,
    a_session_that_says_nothing_is_cut_once_its_host_is_found_to_be_gone,
    new_sessions_soon_go_to_hosts_that_are_there,
    requests_on_a_host_that_is_gone_are_answered_by_another_within_seconds,
    a_request_that_its_host_had_before_it_was_gone_is_sent_again_within_seconds,
    a_write_that_its_host_may_have_is_not_sent_again,
    sessions_that_connect_to_a_host_that_is_gone_pay_for_it_once,
    a_backend_that_reads_nothing_for_long_is_left_alone,
    a_link_that_loses_a_third_of_all_round_trips_is_left_alone,
    a_pause_of_the_network_cuts_no_session,
    a_client_that_is_gone_does_not_hold_its_backend,
);

/// `AEGIS_TCP_USER_TIMEOUT` unless set, two looks, and what a busy machine needs.
const GIVEN_UP_MAX: Duration = Duration::from_secs(9);

/// What either direction, or both, may be like.
const HOLES: [(Fate, Fate); 3] =
    [(Fate::Vanish, Fate::Vanish), (Fate::Vanish, Fate::Arrive), (Fate::Arrive, Fate::Vanish)];

const IDLE: &[(&str, &str)] = &[("state", "idle")];
const SILENT: &[(&str, &str)] = &[("reason", "silent")];
const CLIENT_SILENT: &[(&str, &str)] = &[("reason", "client_silent")];
const BACKEND_SILENT: &[(&str, &str)] = &[("reason", "backend_silent")];

/// Sessions with a server behind a link, each of which has been answered once.
struct Far {
    sessions: Vec<TcpStream>,
    proxy: Proxy,
    _server: Backend,
    link: Link,
}

impl Far {
    /// `None` where there can be no link.
    fn start(builder: Builder, sessions: usize) -> Option<Self> {
        let link = Link::new()?;
        let server = Backend::named_on("far", Link::here());
        let proxy = builder.backends(&[link.behind(0, server.address())]).start();
        let sessions: Vec<_> = (0..sessions).map(|_| connect(proxy.address())).collect();
        for session in &sessions {
            assert_eq!(ask(session, "hello"), "far");
        }
        Some(Self { sessions, proxy, _server: server, link })
    }
}

fn sessions_on_a_host_that_is_gone_are_cut_within_seconds(io: Io) {
    for (there, back) in HOLES {
        let Some(Far { sessions, proxy, link, .. }) = &Far::start(Builder::on(io), 4) else {
            return;
        };
        link.set(0, there, back);
        let gone = Instant::now();
        thread::scope(|scope| {
            for session in sessions {
                scope.spawn(|| {
                    let error = try_ask(session, "are you there?").unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
                });
            }
        });
        let took = gone.elapsed();
        measured(&format!("cut after {took:.1?} where packets there {there:?}, back {back:?}"));
        assert!(took < GIVEN_UP_MAX, "{took:?}");
        proxy.wait_for("aegis_sessions_closed_total", BACKEND_SILENT, |closed| closed == 4);
    }
}

fn a_session_that_says_nothing_is_cut_once_its_host_is_found_to_be_gone(io: Io) {
    let builder = Builder::on(io).set("AEGIS_TCP_USER_TIMEOUT", "2s").set("AEGIS_WORKERS", "1");
    let Some(Far { sessions, proxy, link, .. }) = &Far::start(builder, 2) else { return };
    // As long as it takes until nobody minds that one is quiet.
    thread::sleep(Duration::from_secs(5));
    link.set(0, Fate::Vanish, Fate::Vanish);
    let gone = Instant::now();
    assert!(try_ask(&sessions[0], "are you there?").is_err());
    wait_closed(&sessions[1]).unwrap();
    measured(&format!("cut after {:.1?}, and never said a word", gone.elapsed()));
    proxy.wait_for("aegis_sessions_closed_total", BACKEND_SILENT, |closed| closed == 2);
}

fn new_sessions_soon_go_to_hosts_that_are_there(io: Io) {
    let Some(link) = Link::new() else { return };
    let servers = ["a", "b"].map(|name| Backend::named_on(name, Link::here()));
    let addresses = link.hosts(&servers);
    let proxy = Builder::on(io).backends(&addresses).pool(4, 4).start();
    proxy.wait_for("aegis_pool_connections", IDLE, |idle| idle == 16);
    link.set(0, Fate::Vanish, Fate::Vanish);
    let gone = Instant::now();
    let asks = || {
        let session = connect(proxy.address());
        let since = Instant::now();
        (try_ask(&session, "who").ok(), since.elapsed())
    };
    thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| {
                let (answer, took) = asks();
                assert!(answer.is_none_or(|answer| answer == "b") && took < GIVEN_UP_MAX);
            });
        }
        let (mut good, mut last_bad) = (0, Duration::ZERO);
        eventually("a hundred sessions in a row are served at once", 2 * GIVEN_UP_MAX, || {
            let (answer, took) = asks();
            if answer.is_some() && took < Duration::from_millis(500) {
                good += 1;
            } else {
                (good, last_bad) = (0, gone.elapsed());
            }
            (good >= 100).then_some(())
        });
        measured(&format!("the last session that was not served at once: after {last_bad:.1?}"));
    });
}

fn requests_on_a_host_that_is_gone_are_answered_by_another_within_seconds(io: Io) {
    for (there, back) in HOLES {
        let Some(link) = Link::new() else { return };
        let memory = Memory::default();
        let servers = [(); 2].map(|()| Backend::chronos_on(Link::here(), &memory));
        let addresses = link.hosts(&servers);
        let proxy = Builder::on(io).backends(&addresses).protocol("chronos", "request").start();
        let clients: Vec<_> = (0..8).map(|_| connect(proxy.address())).collect();
        assert_eq!(ask(&clients[0], "SET k v"), "OK");
        for client in &clients {
            assert_eq!(ask(client, "GET k"), "v");
        }
        link.set(0, there, back);
        let gone = Instant::now();
        thread::scope(|scope| {
            for client in &clients {
                scope.spawn(|| assert_eq!(ask(client, "GET k"), "v"));
            }
        });
        let took = gone.elapsed();
        measured(&format!("answered after {took:.1?} where there {there:?}, back {back:?}"));
        assert!(took < GIVEN_UP_MAX, "{took:?}");
        assert!(proxy.metric("aegis_retries_total", SILENT) > 0, "none was on that host");
    }
}

/// A server that tells of each request, and answers only those to `b`.
fn holding(name: &'static str, asked: mpsc::Sender<&'static str>) -> Backend {
    Backend::scripted_at(Link::here(), move |mut stream| {
        while let Ok(line) = read_line(stream) {
            let _ = asked.send(name);
            if line.contains("hold") && name == "a" {
                let _ = stream.read(&mut [0]);
                return;
            }
            let _ = stream.write_all(format!("{name}\n").as_bytes());
        }
    })
}

/// Asks until `a` holds a request, then takes its host away; the answer to that request.
fn ask_a_host_that_goes(io: Io, request: &'static str) -> (String, Duration) {
    let Some(link) = Link::new() else { return (String::new(), Duration::ZERO) };
    let (asked, has_asked) = mpsc::channel();
    let servers = ["a", "b"].map(|name| holding(name, asked.clone()));
    let addresses = link.hosts(&servers);
    let proxy = Builder::on(io).backends(&addresses).protocol("chronos", "request").start();
    loop {
        let client = connect(proxy.address());
        let answer = thread::spawn(move || ask(&client, request));
        if has_asked.recv().unwrap() == "a" {
            // Its acknowledgement is on its way.
            thread::sleep(Duration::from_millis(300));
            link.set(0, Fate::Vanish, Fate::Vanish);
            let gone = Instant::now();
            return (answer.join().unwrap(), gone.elapsed());
        }
        answer.join().unwrap();
    }
}

fn a_request_that_its_host_had_before_it_was_gone_is_sent_again_within_seconds(io: Io) {
    let (answer, took) = ask_a_host_that_goes(io, "GET hold");
    if !answer.is_empty() {
        measured(&format!("answered after {took:.1?}"));
        assert!(answer == "b" && took < GIVEN_UP_MAX + Duration::from_secs(2), "{answer} {took:?}");
    }
}

fn a_write_that_its_host_may_have_is_not_sent_again(io: Io) {
    let (answer, took) = ask_a_host_that_goes(io, "SET hold v");
    if !answer.is_empty() {
        assert!(answer.contains("may have taken effect"), "{answer}");
        assert!(took < GIVEN_UP_MAX + Duration::from_secs(2), "{took:?}");
    }
}

fn sessions_that_connect_to_a_host_that_is_gone_pay_for_it_once(io: Io) {
    let Some(link) = Link::new() else { return };
    let servers = ["a", "b"].map(|name| Backend::named_on(name, Link::here()));
    let addresses = link.hosts(&servers);
    link.set(0, Fate::Vanish, Fate::Vanish);
    let proxy = Builder::on(io).backends(&addresses).without_pool().launch();
    let all_ask = || {
        thread::scope(|scope| {
            let ask = || {
                let since = Instant::now();
                assert_eq!(ask(&connect(proxy.address()), "who"), "b");
                since.elapsed()
            };
            let asked: Vec<_> = (0..10).map(|_| scope.spawn(ask)).collect();
            asked.into_iter().map(|asked| asked.join().unwrap()).max().unwrap()
        })
    };
    // Each worker finds it out for itself.
    let took: Vec<_> = (0..5).map(|_| all_ask()).collect();
    measured(&format!("ten at once, five times in a row, took at most {took:.1?}"));
    assert!(took.iter().all(|took| *took < Duration::from_millis(1900)), "once each: {took:?}");
    assert!(took.iter().any(|took| *took < Duration::from_millis(900)), "always: {took:?}");
}

fn a_backend_that_reads_nothing_for_long_is_left_alone(io: Io) {
    let Some(link) = &Link::new() else { return };
    thread::scope(|scope| {
        let cases = [("1s", 8, 4 << 10), ("1s", 8, 1 << 20), ("5s", 15, 64 << 10)];
        for (host, (limit, pause, window)) in (0..).zip(cases) {
            scope.spawn(move || upload_to_one_that_pauses(io, link, host, limit, pause, window));
        }
    });
}

fn upload_to_one_that_pauses(
    io: Io,
    link: &Link,
    host: u8,
    limit: &str,
    pause: u64,
    window: usize,
) {
    const LEN: usize = 2 << 20;
    let server = Backend::scripted_at(Link::here(), move |mut stream| {
        SockRef::from(stream).set_recv_buffer_size(window).unwrap();
        thread::sleep(Duration::from_secs(pause));
        // The proxy's kernel takes its time to find out that there is room again.
        stream.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
        let took = read_expected(stream, pattern(1, LEN), 64 << 10);
        let _ = stream.write_all(format!("{took:?}\n").as_bytes());
    });
    let proxy = Builder::on(io)
        .backends(&[link.behind(host, server.address())])
        .set("AEGIS_TCP_USER_TIMEOUT", limit)
        .without_pool()
        .start();
    let mut session = connect(proxy.address());
    session.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
    session.set_write_timeout(Some(Duration::from_secs(90))).unwrap();
    session.write_all(pattern(1, LEN)).unwrap();
    let answer = read_line(&session).unwrap();
    assert_eq!(answer, "Ok(())", "{limit} {window}");
    assert_eq!(proxy.metric("aegis_sessions_closed_total", BACKEND_SILENT), 0);
}

fn a_link_that_loses_a_third_of_all_round_trips_is_left_alone(io: Io) {
    const SESSIONS: usize = 8;
    const QUESTIONS: usize = 8;
    let builder = Builder::on(io).set("AEGIS_CONNECT_TIMEOUT", "5s").without_pool();
    let Some(Far { sessions, proxy, link, .. }) = &Far::start(builder, SESSIONS) else { return };
    for session in sessions {
        // The server's kernel waits twice as long for each loss in a row, whatever the proxy does.
        session.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    }
    // With 30 % in each direction every second round trip is lost, and nine in a row often enough to
    // fail one such test of thirty: more than 15 s, in which kernels send again as rarely as that.
    let lossy = Fate::Lossy(18, Duration::from_millis(100));
    link.set(0, lossy, lossy);
    let since = Instant::now();
    thread::scope(|scope| {
        for session in sessions {
            scope.spawn(|| (0..QUESTIONS).for_each(|_| assert_eq!(ask(session, "again"), "far")));
        }
    });
    measured(&format!("{QUESTIONS} answers of each took {:.1?}", since.elapsed()));
    assert_eq!(proxy.metric("aegis_sessions_closed_total", BACKEND_SILENT), 0);
}

fn a_pause_of_the_network_cuts_no_session(io: Io) {
    let builder = Builder::on(io).without_pool();
    let Some(Far { sessions, proxy, link, .. }) = &Far::start(builder, 4) else { return };
    link.set(0, Fate::Vanish, Fate::Vanish);
    let took: Vec<_> = thread::scope(|scope| {
        let again = |session| {
            assert_eq!(ask(session, "again"), "far");
            Instant::now()
        };
        let asked: Vec<_> =
            sessions.iter().map(|session| scope.spawn(move || again(session))).collect();
        // Kernels send again after 3 s, and then after 6: later than the time limit.
        thread::sleep(Duration::from_millis(3600));
        link.set(0, Fate::Arrive, Fate::Arrive);
        let over = Instant::now();
        let answered = asked.into_iter().map(|answered| answered.join().unwrap());
        answered.map(|at| at.saturating_duration_since(over)).collect()
    });
    measured(&format!("answered {took:.1?} after it"));
    assert_eq!(proxy.metric("aegis_sessions_closed_total", BACKEND_SILENT), 0);
}

fn a_client_that_is_gone_does_not_hold_its_backend(io: Io) {
    let Some(link) = Link::new() else { return };
    let server = Backend::scripted(|mut stream: &TcpStream| {
        let _ = read_line(stream);
        while stream.write_all(&[7; 1024]).is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let proxy = Builder::on(io)
        .backends(&[server.address()])
        .set("AEGIS_LISTEN", Link::here().to_string())
        .set("AEGIS_TCP_USER_TIMEOUT", "1s")
        .without_pool()
        .start();
    let mut client = connect(link.behind(3, proxy.address()));
    client.write_all(b"go on\n").unwrap();
    client.read_exact(&mut [0; 4096]).unwrap();
    assert_eq!(server.open(), 1);
    link.set(3, Fate::Vanish, Fate::Vanish);
    let gone = Instant::now();
    eventually("its backend is let go", GIVEN_UP_MAX, || (server.open() == 0).then_some(()));
    measured(&format!("its backend was let go after {:.1?}", gone.elapsed()));
    proxy.wait_for("aegis_sessions_closed_total", CLIENT_SILENT, |closed| closed == 1);
}
