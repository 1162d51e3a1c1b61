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

/// The connects that wait for room. Those to one address wait for the first of them, and for nobody
/// else: a server that accepts nothing is not to hold up another one.
#[derive(Debug, Default)]
pub(super) struct Crowded {
    /// By address, of which there are as many as the configuration names.
    lines: Vec<Line>,
    retry_at: Option<Instant>,
}

/// The connects to one address, in their order.
#[derive(Debug)]
struct Line {
    address: Address,
    waiting: VecDeque<ConnId>,
}

impl Crowded {
    /// A connect found no room.
    pub(super) fn push(&mut self, conn: ConnId, address: &Address, now: Instant) {
        let at = self.lines.iter().position(|line| line.address == *address);
        let at = at.unwrap_or_else(|| {
            self.lines.push(Line { address: address.clone(), waiting: VecDeque::new() });
            self.lines.len() - 1
        });
        self.lines[at].waiting.push_back(conn);
        self.retry_at.get_or_insert(now + RETRY_PAUSE);
    }

    /// Tries again, if it is time. `connect` says whether there is still no room: then the others of that
    /// address would find none either, so that those that wait cost little however many they are.
    pub(super) fn retry(
        &mut self,
        now: Instant,
        mut connect: impl FnMut(ConnId, &Address) -> bool,
    ) {
        if self.retry_at.is_none_or(|at| now < at) {
            return;
        }
        for Line { address, waiting } in &mut self.lines {
            while let Some(&conn) = waiting.front()
                && !connect(conn, address)
            {
                fifo::pop(waiting);
            }
        }
        let waits = self.lines.iter().any(|line| !line.waiting.is_empty());
        self.retry_at = waits.then_some(now + RETRY_PAUSE);
    }

    /// How long the driver may sleep that may sleep for `most`.
    pub(super) fn sleep_max(&self, most: Duration, now: Instant) -> Duration {
        self.retry_at.map_or(most, |at| most.min(at.saturating_duration_since(now)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which are tried in a round in which there is room for so many, one after the other.
    fn round(crowded: &mut Crowded, now: Instant, room: usize) -> Vec<usize> {
        let mut tried = Vec::new();
        crowded.retry(now, |conn, _| {
            tried.push(conn.index());
            tried.len() > room
        });
        tried
    }

    #[test]
    fn those_that_wait_are_tried_in_their_order_until_there_is_no_room() {
        let (mut crowded, begun) = (Crowded::default(), Instant::now());
        let address: Address = "unix:/run/db.sock".parse().unwrap();
        for index in 0..4 {
            crowded.push(ConnId::from_parts(index, 0), &address, begun);
        }
        let minute = Duration::from_secs(60);
        assert_eq!(crowded.sleep_max(minute, begun), RETRY_PAUSE);
        assert!(round(&mut crowded, begun, 4).is_empty(), "not before its time");
        let mut now = begun + RETRY_PAUSE;
        assert_eq!(round(&mut crowded, now, 0), [0], "the others would find none either");
        now += RETRY_PAUSE;
        assert_eq!(round(&mut crowded, now, 2), [0, 1, 2]);
        assert_eq!(crowded.sleep_max(minute, now), RETRY_PAUSE);
        now += RETRY_PAUSE;
        assert_eq!(round(&mut crowded, now, 4), [2, 3]);
        assert_eq!(crowded.sleep_max(minute, now), minute, "nobody waits");
    }

    #[test]
    fn those_that_wait_for_one_address_hold_up_no_other() {
        let (mut crowded, begun) = (Crowded::default(), Instant::now());
        let [full, free] =
            ["unix:/run/full.sock", "unix:/run/free.sock"].map(|text| text.parse().unwrap());
        for index in 0..1000 {
            crowded.push(ConnId::from_parts(index, 0), &full, begun);
        }
        crowded.push(ConnId::from_parts(1000, 0), &free, begun);
        let mut tried = Vec::new();
        crowded.retry(begun + RETRY_PAUSE, |conn, address| {
            tried.push(conn.index());
            *address == full
        });
        assert_eq!(tried, [0, 1000]);
    }
}
