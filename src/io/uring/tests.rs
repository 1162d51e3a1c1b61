//! What only a faulty kernel, or a faulty driver, would do to a ring.

use std::net::{SocketAddr, TcpListener};

use io_uring::squeue::Entry;

use super::*;
use crate::io::probe;

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
