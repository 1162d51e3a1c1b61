//! The connection to a backend that a client holds.

use std::time::Instant;

use super::BackendConn;
use super::action::{Action, DiscardHow, Fate};
use crate::io::Close;
use crate::metrics::Discard;
use crate::proxy::pulse::Pulse;

/// The connection to a backend that a client holds, from when it is acquired until it is released
/// or discarded.
#[derive(Debug)]
pub(super) struct Backend {
    /// As its pool knows it.
    pub(super) conn: BackendConn,
    /// It takes nothing more. What had come before is still read.
    pub(super) broken: bool,
    /// It is received from.
    pub(super) receiving: bool,
    /// Bytes on their way to it.
    pub(super) unsent: u32,
    /// Whether it acknowledges what it is sent.
    pub(super) pulse: Pulse,
}

impl Backend {
    /// A connection just acquired, on which nothing is on its way.
    pub(super) fn new(conn: BackendConn) -> Self {
        Self { conn, broken: false, receiving: true, unsent: 0, pulse: Pulse::default() }
    }

    /// Bytes were queued for it.
    pub(super) fn on_queued(&mut self, bytes: u32) {
        self.unsent += bytes;
        self.pulse.on_asked();
    }

    /// Its socket took bytes.
    pub(super) fn on_sent(&mut self, bytes: u32) {
        self.unsent = self.unsent.saturating_sub(bytes);
    }

    /// Whether it is too old to be kept.
    pub(super) fn is_aged(&self, now: Instant) -> bool {
        self.conn.retire_at.is_some_and(|at| at <= now)
    }

    /// Goes back to its pool, silent as it is.
    pub(super) fn release(mut self) -> Fate {
        if self.unsent > 0 {
            // Answered before it was asked.
            return Fate::Discarded(self.discard(Discard::Unexpected));
        }
        let asked = self.pulse.take_asked();
        Fate::Released { conn: self.conn, paused: !self.receiving, asked }
    }

    /// Is of no more use.
    pub(super) fn discard(self, why: Discard) -> Action {
        // What it reads there still is the upload of somebody who has been answered; else a reset, so
        // that it does not go on with what nobody waits for.
        let how = if self.conn.unread {
            DiscardHow::ResetUnlessUnsent
        } else {
            DiscardHow::Now(Close::Reset)
        };
        Action::Discard(self.conn.conn, self.conn.endpoint, why, how)
    }

    /// Is closed with the end of stream: it may still have to read the end of a request.
    pub(super) fn end(self, why: Discard) -> Action {
        let how = DiscardHow::Now(Close::Graceful);
        Action::Discard(self.conn.conn, self.conn.endpoint, why, how)
    }
}
