//! Connects to Unix sockets that find the accept queue full.
//!
//! Over TCP the kernel repeats such a handshake by itself. Here it refuses the connect, and tells
//! nobody when there is room: so it is tried again after a while, until its user closes the
//! connection.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::ConnId;
use super::net::Address;
use crate::fifo;

/// The pause between two rounds of tries: what a connect waits for at most when there is room again.
/// Half of it would cost twice as many system calls where nobody accepts.
const RETRY_PAUSE: Duration = Duration::from_millis(2);
/// A round ends after so many that still find no room, so that those that wait cost little however
/// many they are.
const FAILED_MAX: usize = 4;

/// The connects that wait for room, those that have waited for longest first.
#[derive(Debug, Default)]
pub(super) struct Crowded {
    waiting: VecDeque<(ConnId, Address)>,
    retry_at: Option<Instant>,
}

impl Crowded {
    /// Has room for so many without allocating.
    pub(super) fn with_capacity(conns_max: usize) -> Self {
        Self { waiting: VecDeque::with_capacity(conns_max), retry_at: None }
    }

    /// A connect found no room.
    pub(super) fn push(&mut self, conn: ConnId, address: &Address, now: Instant) {
        self.waiting.push_back((conn, address.clone()));
        self.retry_at.get_or_insert(now + RETRY_PAUSE);
    }

    /// Tries again, if it is time. `connect` says whether there is still no room.
    pub(super) fn retry(
        &mut self,
        now: Instant,
        mut connect: impl FnMut(ConnId, &Address) -> bool,
    ) {
        if self.retry_at.is_none_or(|at| now < at) {
            return;
        }
        let mut failed = 0;
        for _ in 0..self.waiting.len() {
            let Some((conn, address)) = fifo::pop(&mut self.waiting) else { break };
            if connect(conn, &address) {
                self.waiting.push_back((conn, address));
                failed += 1;
                if failed == FAILED_MAX {
                    break;
                }
            }
        }
        self.retry_at = (!self.waiting.is_empty()).then_some(now + RETRY_PAUSE);
    }

    /// How long the driver may sleep that may sleep for `most`.
    pub(super) fn sleep_max(&self, most: Duration, now: Instant) -> Duration {
        self.retry_at.map_or(most, |at| most.min(at.saturating_duration_since(now)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_wait_are_tried_in_their_order_a_few_at_a_time() {
        let mut crowded = Crowded::with_capacity(16);
        let begun = Instant::now();
        let address: Address = "unix:/run/db.sock".parse().unwrap();
        let round = |crowded: &mut Crowded, now, room: usize| {
            let mut tried = Vec::new();
            crowded.retry(now, |conn, _| {
                tried.push(conn.index());
                tried.len() > room
            });
            tried
        };
        for index in 0..7 {
            crowded.push(ConnId::from_parts(index, 0), &address, begun);
        }
        let minute = Duration::from_secs(60);
        assert_eq!(crowded.sleep_max(minute, begun), RETRY_PAUSE);
        assert!(round(&mut crowded, begun, 7).is_empty(), "not before its time");
        let mut now = begun + RETRY_PAUSE;
        assert_eq!(round(&mut crowded, now, 0), [0, 1, 2, 3]);
        now += RETRY_PAUSE;
        assert_eq!(round(&mut crowded, now, 3), [4, 5, 6, 0, 1, 2, 3]);
        assert_eq!(crowded.sleep_max(minute, now), RETRY_PAUSE);
        now += RETRY_PAUSE;
        assert_eq!(round(&mut crowded, now, 7), [0, 1, 2, 3]);
        assert_eq!(crowded.sleep_max(minute, now), minute, "nobody waits");
    }
}
