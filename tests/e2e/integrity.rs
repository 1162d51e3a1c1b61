//! Many sessions at once, every byte of each compared, beside one that has stopped.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use socket2::SockRef;

use crate::support::backend::Backend;
use crate::support::client::{connect, is_timeout, read_end, read_expected};
use crate::support::proxy::Builder;
use crate::support::{Io, PATIENCE, heavy, measured, on_both_drivers, pattern};

on_both_drivers![sessions_at_once_keep_every_byte_apart_and_one_that_stopped_hurts_no_other];

const SESSIONS: u16 = 64;
const SESSION_BYTES: usize = 8 << 20;
/// The session whose reader stops for good.
const STALLED: u16 = 999;
/// What a side holds back until it has seen the other side's end of stream.
const HELD_BACK_BYTES: usize = 1 << 10;

/// Who ends its direction first, while the other still sends.
#[derive(PartialEq, Eq, Clone, Copy)]
enum Side {
    Client,
    Backend,
}

fn first_to_end(session: u16) -> Side {
    if session.is_multiple_of(2) { Side::Client } else { Side::Backend }
}

fn sessions_at_once_keep_every_byte_apart_and_one_that_stopped_hurts_no_other(io: Io) {
    let _alone = heavy();
    let (report, reports) = mpsc::channel();
    let (stalled, has_stalled) = mpsc::channel();
    let backend = Backend::scripted(move |mut stream| {
        let mut session = [0; 2];
        if stream.read_exact(&mut session).is_err() {
            return; // A warm connection that no session took.
        }
        match u16::from_be_bytes(session) {
            STALLED => flood(stream, &stalled),
            session => drop(report.send((session, exchange(stream, session, Side::Backend)))),
        }
    });
    let proxy = Builder::on(io).backends(&[backend.address()]).start();
    let before_kb = proxy.memory_kb("status", "VmRSS");

    let mut stopped = connect(proxy.address());
    stopped.write_all(&STALLED.to_be_bytes()).unwrap();
    has_stalled.recv_timeout(PATIENCE).expect("the flood never met a full pipe");

    let failures: Vec<String> = thread::scope(|scope| {
        let start = |session: u16| {
            let address = proxy.address();
            scope.spawn(move || {
                let mut client = connect(address);
                client.write_all(&session.to_be_bytes()).unwrap();
                exchange(&client, session, Side::Client)
            })
        };
        let clients: Vec<_> = (0..SESSIONS).map(|session| (session, start(session))).collect();
        let outcome = |(session, client): (u16, thread::ScopedJoinHandle<Result<(), String>>)| {
            let error = client.join().unwrap().err()?;
            Some(format!("client of session {session}: {error}"))
        };
        clients.into_iter().filter_map(outcome).collect()
    });
    assert_eq!(failures, Vec::<String>::new());
    for _ in 0..SESSIONS {
        let (session, outcome) = reports.recv_timeout(PATIENCE).unwrap();
        outcome.unwrap_or_else(|error| panic!("backend of session {session}: {error}"));
    }

    // The peak, so that memory given back in the meantime counts as well.
    let grown_kb = proxy.memory_kb("status", "VmHWM").saturating_sub(before_kb);
    measured(&format!("{SESSIONS} busy sessions and a stopped one took {grown_kb} kB"));
    assert!(grown_kb < 32 << 10, "the proxy grew by {grown_kb} kB");
    drop(stopped);
}

/// Writes until nobody has taken a byte for a while, reports that, and goes on.
fn flood(mut stream: &TcpStream, stalled: &mpsc::Sender<()>) {
    stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    loop {
        match stream.write(pattern(1000, 1 << 20)) {
            Ok(_) => {}
            Err(error) if is_timeout(&error) => drop(stalled.send(())),
            Err(_) => return,
        }
    }
}

/// One side of a session: sends and receives all at once, and checks every byte and both ends.
fn exchange(stream: &TcpStream, session: u16, side: Side) -> Result<(), String> {
    let seed = usize::from(session) * 2;
    let (sends, expects) = match side {
        Side::Client => (seed, seed + 1),
        Side::Backend => (seed + 1, seed),
    };
    let (sends, expects) = (pattern(sends, SESSION_BYTES), pattern(expects, SESSION_BYTES));
    // A quarter of the readers on each side are slow: little room, little at a time.
    let slow = (session / 2) % 4 == side as u16;
    let piece = if slow { 2 << 10 } else { 256 << 10 };
    if slow {
        SockRef::from(stream).set_recv_buffer_size(64 << 10).map_err(|e| e.to_string())?;
    }
    let (end_seen, may_end) = mpsc::channel();
    thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let mut writer = stream;
            let (now, later) = sends.split_at(SESSION_BYTES - HELD_BACK_BYTES);
            writer.write_all(now)?;
            if first_to_end(session) != side && may_end.recv().is_err() {
                return Ok(()); // The reader has failed and says why.
            }
            writer.write_all(later)?;
            stream.shutdown(Shutdown::Write)
        });
        let received = read_expected(stream, expects, piece).and_then(|()| read_end(stream));
        if received.is_ok() {
            let _ = end_seen.send(());
        }
        drop(end_seen);
        let sent: std::io::Result<()> = sender.join().unwrap();
        received?;
        sent.map_err(|error| format!("sending: {error}"))
    })
}
