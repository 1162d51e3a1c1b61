//! What the simulated driver tells of what has happened, and in which order and how many pieces.
//!
//! Kernels tell late, in batches of a limited size, in another order than things happened in, and
//! two sends as one. Of one connection all is reported in order.

use std::collections::VecDeque;

use crate::io::{Completion, ConnId};

/// As many as an `io_uring` runs the pending work of in one call.
const BATCH_MAX: usize = 20;
/// So many events may be reported in any order.
const REORDERED_MAX: usize = 8;

/// Events that have happened and are to be reported.
#[derive(Debug)]
pub(super) struct Hearing {
    events: VecDeque<Completion>,
    /// Not all that there is may be reported in one turn.
    piecemeal: bool,
    reorders: bool,
    /// How many may still be reported in this turn.
    left: usize,
}

impl Hearing {
    /// Nothing to tell so far.
    pub(super) fn new(rng: &mut fastrand::Rng) -> Self {
        Self {
            events: VecDeque::new(),
            piecemeal: rng.bool(),
            reorders: rng.bool(),
            left: usize::MAX,
        }
    }

    /// How many events are to be reported, those of sends included or not.
    pub(super) fn len(&self, without_sends: bool) -> usize {
        let counts =
            |event: &&Completion| !(without_sends && matches!(event, Completion::Sent(..)));
        self.events.iter().filter(counts).count()
    }

    /// Whether anything is to be reported of a connection.
    pub(super) fn has(&self, conn: ConnId) -> bool {
        self.events.iter().any(|event| event.conn() == Some(conn))
    }

    /// How many clients were accepted, and how many buffers filled, of which that was not reported.
    pub(super) fn untold(&self) -> (usize, usize) {
        self.events.iter().fold((0, 0), |(clients, buffers), event| match event {
            Completion::Accepted(..) => (clients + 1, buffers),
            Completion::Received(..) => (clients, buffers + 1),
            _ => (clients, buffers),
        })
    }

    /// Something has happened.
    pub(super) fn push(&mut self, event: Completion) {
        if let Completion::Sent(conn, more) = event {
            let is_moved = |earlier: &Completion| matches!(earlier, Completion::Spliced(..));
            let latest = self
                .events
                .iter_mut()
                .rfind(|earlier| earlier.conn() == Some(conn) || is_moved(earlier));
            if let Some(Completion::Sent(_, bytes)) = latest {
                *bytes += more;
                return;
            }
        }
        self.events.push_back(event);
    }

    /// A turn begins, in which perhaps not everything is reported.
    pub(super) fn begin_turn(&mut self, rng: &mut fastrand::Rng) {
        let part = self.piecemeal && rng.u8(..3) == 0;
        self.left = if part { rng.usize(1..=BATCH_MAX) } else { usize::MAX };
    }

    /// All that there is will be reported in this turn.
    pub(super) fn tell_all(&mut self) {
        self.left = usize::MAX;
    }

    /// The next event to tell in this turn.
    pub(super) fn pop(&mut self, rng: &mut fastrand::Rng) -> Option<Completion> {
        if self.left == 0 || self.events.is_empty() {
            return None;
        }
        self.left -= 1;
        // What was moved by itself is reported before that it was sent.
        let moved = self.events.iter().position(|event| matches!(event, Completion::Spliced(..)));
        let among = moved.map_or(self.events.len(), |moved| moved + 1).min(REORDERED_MAX);
        let drawn = if self.reorders { rng.usize(..among) } else { 0 };
        // Nothing of the same connection is overtaken.
        let conn = self.events[drawn].conn();
        let first = self.events.iter().position(|event| conn.is_some() && event.conn() == conn);
        self.events.remove(first.unwrap_or(drawn))
    }
}
