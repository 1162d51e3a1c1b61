//! Connections that are closed with a reset once their peers have what was sent to them.
//!
//! A reset discards what the kernel has not delivered yet, and a kernel tells nobody that the last
//! byte was acknowledged. So whoever is to get all that came before a break, and then see the break,
//! is looked at again and again, more rarely each time, until nothing is on its way any more.

use std::time::{Duration, Instant};

use super::engine::{Engine, Owner};
use crate::io::{Close, ConnId, Driver};
use crate::limits;

/// The first look comes after this; each further one after twice the time,
const LOOK_AFTER_MIN: Duration = Duration::from_millis(8);
/// or this.
const LOOK_AFTER_MAX: Duration = Duration::from_millis(500);

/// A connection of which nothing is wanted but that its peer takes what was sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flushing {
    /// Bytes on their way at the latest look that saw fewer than the one before.
    left: u64,
    /// The time of that look.
    since: Instant,
    look_after: Duration,
}

impl<D: Driver> Engine<D> {
    /// Closes a connection with a reset, behind all that is on its way to its peer. That may take
    /// as long as the peer goes on taking bytes.
    pub(in crate::worker) fn reset_behind(&mut self, conn: ConnId) {
        let left = self.driver.undelivered(conn);
        if left == 0 {
            return self.driver.close(conn, Close::Reset);
        }
        self.driver.receive(conn, false);
        self.flushing += 1;
        self.flush_on(conn, Flushing { left, since: self.now, look_after: LOOK_AFTER_MIN });
    }

    fn flush_on(&mut self, conn: ConnId, flushing: Flushing) {
        self.timers.set(conn.index(), self.now + flushing.look_after);
        self.own(conn, Owner::Flushing(flushing));
    }

    /// Looks at a connection again that is being flushed.
    pub(super) fn on_flush_timer(&mut self, conn: ConnId, mut flushing: Flushing) {
        let left = self.driver.undelivered(conn);
        if left < flushing.left {
            (flushing.left, flushing.since) = (left, self.now);
        }
        let stalled = self.now.saturating_duration_since(flushing.since);
        if left == 0 || stalled >= limits::FLUSH_STALL_MAX {
            return self.end_flush(conn);
        }
        flushing.look_after = (2 * flushing.look_after).min(LOOK_AFTER_MAX);
        self.flush_on(conn, flushing);
    }

    /// A connection that is being flushed has broken, or there is no time left for it.
    pub(super) fn end_flush(&mut self, conn: ConnId) {
        self.timers.clear(conn.index());
        self.owner(conn);
        self.driver.close(conn, Close::Reset);
        self.flushing -= 1;
        self.on_place_free();
    }

    pub(super) fn end_all_flushes(&mut self) {
        for slot in 0..self.owners.len() {
            if let Owner::Flushing(_) = self.owners[slot].owner {
                self.end_flush(self.owners[slot].conn);
            }
        }
    }
}
