//! What only a faulty kernel, or a faulty driver, would do to a ring.
#![expect(clippy::disallowed_methods, reason = "no tap is here")]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use io_uring::squeue::Entry;

use super::*;
use crate::io::probe;

const PATIENCE: Duration = Duration::from_secs(10);

/// A driver with one listener, and its address. `None`, said so, where there is no `io_uring`.
fn driver(test: &str) -> Option<(Uring, SocketAddr)> {
    let features = match probe::uring() {
        Ok(features) => features,
        Err(why) => {
            eprintln!("SKIPPED: {test}: {why}");
            return None;
        }
    };
    if !features.restricted {
        eprintln!("SKIPPED: {test}: something here is in the way of restrictions");
        return None;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let setup = DriverSetup {
        listeners: vec![listener.into()],
        wake: rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap(),
        conns_max: 8,
        buffers_max: 64,
    };
    Some((Uring::new(setup, probe::set_up(features).unwrap()).unwrap(), address))
}

/// What the kernel says of a submission.
fn outcome(driver: &mut Uring, entry: Entry) -> i32 {
    // SAFETY: what it points to is static, or nothing at all.
    unsafe { driver.ring.push(&entry.user_data(u64::MAX)) };
    loop {
        driver.ring.submit_and_wait(1, Duration::ZERO, Duration::ZERO);
        while let Some(entry) = driver.ring.pop() {
            if entry.user_data() == u64::MAX {
                return entry.result();
            }
        }
    }
}

/// Has the kernel complete an operation that it was never asked for.
fn complete_out_of_nowhere(driver: &mut Uring, kind: Kind, conn: ConnId) {
    let entry = opcode::Nop::new().build().user_data(user_data(kind, conn));
    // SAFETY: it points to nothing.
    unsafe { driver.ring.push(&entry) };
}

/// Turns until something has happened that `wanted` wants.
fn until(driver: &mut Uring, wanted: impl Fn(&Completion) -> bool) -> Completion {
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < PATIENCE, "not in time");
        driver.wait(Wait::for_one(Duration::from_millis(10))).unwrap();
        while let Some(completion) = driver.next() {
            if wanted(&completion) {
                return completion;
            }
            if let Completion::Received(_, buf) = completion {
                driver.buffers.give(buf);
            }
        }
    }
}

/// A client, and the driver's connection to it.
fn client(driver: &mut Uring, address: SocketAddr) -> (TcpStream, ConnId) {
    driver.accept(1);
    let client = TcpStream::connect(address).unwrap();
    let accepted = until(driver, |completion| matches!(completion, Completion::Accepted(..)));
    (client, accepted.conn().unwrap())
}

/// Turns until the slot of a closed connection is free.
fn until_gone(driver: &mut Uring, conn: ConnId) {
    let begun = Instant::now();
    while driver.sockets.get(conn).is_some() {
        assert!(begun.elapsed() < PATIENCE, "{conn:?} is not reclaimed");
        driver.wait(Wait::for_one(Duration::from_millis(10))).unwrap();
        while driver.next().is_some() {}
    }
}

#[test]
fn a_ring_refuses_what_the_driver_never_asks_of_it() {
    let Some((mut driver, _)) = driver("a restricted ring") else { return };
    let (stdin, path) = (Fd(0), c"/proc/self/status");
    let fixed = io_uring::types::Fixed(0);
    let mut byte = 0;
    let refused = [
        ("nop", opcode::Nop::new().build()),
        ("open", opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build()),
        ("read", opcode::Read::new(stdin, &raw mut byte, 1).build()),
        ("socket", opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build()),
        ("a registered descriptor", opcode::PollAdd::new(fixed, 0).build()),
        ("a thread of the pool", opcode::Close::new(Fd(-1)).build().flags(squeue::Flags::ASYNC)),
        ("a link", opcode::Close::new(Fd(-1)).build().flags(squeue::Flags::IO_LINK)),
    ];
    for (what, entry) in refused {
        assert_eq!(outcome(&mut driver, entry), -libc::EACCES, "{what}");
    }
    let close = opcode::Close::new(Fd(-1)).build();
    assert_eq!(outcome(&mut driver, close), -libc::EBADF, "what is asked of it is done");
    let submitter = driver.ring.uring().submitter();
    let registering = [submitter.register_eventfd(0), submitter.register_files(&[0])];
    for registered in registering {
        assert_eq!(registered.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}

#[test]
fn a_receive_that_ends_twice_costs_its_connection_alone() {
    let Some((mut driver, address)) = driver("a receive that ends twice") else { return };
    let (mut peer, conn) = client(&mut driver, address);
    let (mut other_peer, other) = client(&mut driver, address);
    for conn in [conn, other] {
        driver.receive(conn, true);
    }
    peer.write_all(b"x").unwrap();
    until(&mut driver, |completion| matches!(completion, Completion::Received(..)));
    // The first is taken for the end of the receive that goes on, the second is one too many.
    for strays in 0..2 {
        complete_out_of_nowhere(&mut driver, Kind::Receive, conn);
        driver.wait(Wait::for_one(PATIENCE)).unwrap();
        let failed: Vec<_> = std::iter::from_fn(|| driver.next()).collect();
        assert_eq!(failed.len(), 1 - strays, "{failed:?}");
        assert_eq!(driver.strays(), strays as u64);
    }
    driver.close(conn, Close::Reset);
    // The receive that goes on holds the socket until its peer has gone.
    drop(peer);
    other_peer.write_all(b"y").unwrap();
    let received = until(&mut driver, |completion| completion.conn() == Some(other));
    let Completion::Received(_, buf) = received else { panic!("{received:?}") };
    driver.send(other, buf);
    until(&mut driver, |completion| matches!(completion, Completion::Sent(..)));
    let mut byte = [0];
    other_peer.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"y");
}

#[test]
fn what_ends_without_having_begun_costs_its_connection_alone() {
    for kind in [Kind::Connect, Kind::Send, Kind::Watch] {
        let Some((mut driver, address)) = driver("what ends without having begun") else { return };
        let (mut peer, conn) = client(&mut driver, address);
        driver.receive(conn, true);
        peer.write_all(b"x").unwrap();
        until(&mut driver, |completion| matches!(completion, Completion::Received(..)));
        complete_out_of_nowhere(&mut driver, kind, conn);
        let failed = until(&mut driver, |_| true);
        assert!(matches!(failed, Completion::ReceiveFailed(_)), "{kind:?}: {failed:?}");
        assert_eq!(driver.strays(), 1, "{kind:?}");
        driver.close(conn, Close::Reset);
        until_gone(&mut driver, conn);
        driver.wait(Wait::for_one(Duration::ZERO)).unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        let cut = peer.read_exact(&mut [0]).unwrap_err();
        assert_eq!(cut.kind(), ErrorKind::ConnectionReset, "{kind:?}: what was cut looks cut");
        // Nobody has this connection any more.
        complete_out_of_nowhere(&mut driver, kind, conn);
        driver.wait(Wait::for_one(PATIENCE)).unwrap();
        assert!(driver.next().is_none(), "{kind:?}");
        assert_eq!(driver.strays(), 2, "{kind:?}");
    }
}
