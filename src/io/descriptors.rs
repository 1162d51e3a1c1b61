//! Descriptors held back, so that a client that is accepted gets its backend too.
//!
//! A client that waits in the kernel's queue for want of descriptors loses nothing; one that is
//! accepted and then reset does. So some descriptors are held in reserve, from which backends'
//! connections are made where there are no others, and nobody is accepted before the reserve is
//! whole again.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::resources::Limit;
use crate::limits::{DESCRIPTORS_RESERVED, LISTEN_BACKLOG};

/// The limit is read again after this.
const LIMIT_AGE_MAX: Duration = Duration::from_secs(1);

/// How many [`Claim`]s there are.
static CLAIMS: AtomicU32 = AtomicU32::new(0);

/// While it is held, no driver of this process accepts or refills its reserve: somebody has made a
/// descriptor free to use it at once, and what is free otherwise is taken by whoever comes first.
#[derive(Debug)]
pub(crate) struct Claim(());

impl Claim {
    pub(crate) fn new() -> Self {
        CLAIMS.fetch_add(1, Relaxed);
        Self(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMS.fetch_sub(1, Relaxed);
    }
}

/// What one driver holds back.
pub(super) struct Descriptors {
    /// Each is a file of its own, so that it also stands for one of the system's.
    reserve: Vec<OwnedFd>,
    /// The kernel gives the lowest number that is free, so that at least as many were in use.
    latest: u64,
    limit: u64,
    limit_read_at: Instant,
}

impl Descriptors {
    pub(super) fn new() -> Self {
        let mut this = Self {
            reserve: Vec::with_capacity(DESCRIPTORS_RESERVED),
            latest: 0,
            limit: soft_limit(),
            limit_read_at: Instant::now(),
        };
        this.refill();
        this
    }

    /// Whether the reserve is whole, after what can be had for it.
    fn refill(&mut self) -> bool {
        while self.reserve.len() < DESCRIPTORS_RESERVED {
            let Ok(fd) = eventfd(0, EventfdFlags::CLOEXEC) else { return false };
            self.reserve.push(fd);
        }
        true
    }

    /// Whether clients may be accepted: each is to get its backend too.
    pub(super) fn can_accept(&mut self) -> bool {
        CLAIMS.load(Relaxed) == 0 && (!self.are_short() || self.refill())
    }

    /// Whether some of the reserve is in use.
    pub(super) fn are_short(&self) -> bool {
        self.reserve.len() < DESCRIPTORS_RESERVED
    }

    /// A descriptor was given out.
    pub(super) fn on_new(&mut self, fd: &impl AsRawFd) {
        self.latest = u64::from(fd.as_raw_fd().unsigned_abs());
    }

    /// Whether the accept queues of so many listeners, and a backend for each client, surely fit.
    pub(super) fn have_room_for_queues(&mut self, listeners: usize, now: Instant) -> bool {
        if now.saturating_duration_since(self.limit_read_at) >= LIMIT_AGE_MAX {
            (self.limit, self.limit_read_at) = (soft_limit(), now);
        }
        let queued = listeners as u64 * LISTEN_BACKLOG as u64;
        !self.are_short() && self.limit.saturating_sub(self.latest) > 2 * queued
    }

    /// Makes a descriptor, with one of the reserve where there is no other.
    pub(super) fn make<T: AsRawFd>(
        &mut self,
        mut make: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        let mut outcome = make();
        if outcome.as_ref().is_err_and(is_shortage) && self.reserve.pop().is_some() {
            outcome = make();
        }
        if let Ok(fd) = &outcome {
            self.on_new(fd);
        }
        outcome
    }
}

fn is_shortage(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// Where nobody says what it is, it may be low: then clients are accepted one by one.
fn soft_limit() -> u64 {
    Limit::Descriptors.of_this_process().map_or(0, |[soft, _]| soft)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_reserve_serves_where_there_is_no_other_and_is_made_whole_again() {
        let mut descriptors = Descriptors::new();
        assert!(!descriptors.are_short());
        let mut failures = 1;
        let mut make = || {
            failures -= 1;
            if failures >= 0 { Err(Errno::MFILE.into()) } else { TcpListener::bind("127.0.0.1:0") }
        };
        let socket = descriptors.make(&mut make).unwrap();
        assert!(descriptors.are_short());
        assert_eq!(descriptors.latest, u64::from(socket.as_raw_fd().unsigned_abs()));
        assert!(descriptors.refill() && !descriptors.are_short());
        let claim = Claim::new();
        assert!(!descriptors.can_accept(), "somebody needs the next one");
        drop(claim);
        let refused = descriptors.make(|| Err::<OwnedFd, _>(Errno::MFILE.into()));
        assert!(refused.is_err_and(|error| is_shortage(&error)), "there is none at all");
        let other = descriptors.make(|| Err::<OwnedFd, _>(Errno::CONNREFUSED.into()));
        assert!(other.is_err_and(|error| !is_shortage(&error)));
    }
}
