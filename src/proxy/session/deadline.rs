//! What ends a session that does not end by itself.

use std::time::{Duration, Instant};

use super::{Action, Session, State};
use crate::limits::FLUSH_STALL_MAX;
use crate::metrics::CloseReason;

/// A session with a broken side is looked at this often: whether the other one takes bytes, only
/// the kernel knows.
const FAILURE_LOOK: Duration = Duration::from_millis(500);

/// A client that has ended its direction before the first byte, while it is being connected, is
/// taken for one that left if that takes longer than this. Within a cluster a handshake takes less.
pub(super) const LEFT_AFTER: Duration = Duration::from_millis(100);

/// Time limits of an open session.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// Without a byte in either direction.
    pub idle: Option<Duration>,
    /// Likewise, once one direction has ended.
    pub half_close: Option<Duration>,
}

impl Session {
    /// When the session has to be looked at next.
    pub fn deadline(&self, timeouts: &Timeouts) -> Option<Instant> {
        if self.state == State::Connecting {
            // The attempt has a timer of its own.
            return self.may_have_left().then(|| self.active + LEFT_AFTER);
        }
        if let Some(failure) = self.failure {
            return Some((failure.looked + FAILURE_LOOK).min(self.active + stall_max(timeouts)));
        }
        let half_close = timeouts.half_close.filter(|_| self.is_half_closed());
        let limit = half_close.or(timeouts.idle).map(|limit| self.active + limit);
        let limits = [limit, self.cancel_deadline()];
        limits.into_iter().flatten().min()
    }

    /// The time of [`Session::deadline`] has come, or had come before later activity moved it.
    /// `undelivered` is how many bytes are on their way to the [`Session::survivor`].
    pub fn on_deadline(&mut self, timeouts: &Timeouts, undelivered: u64, now: Instant) -> Action {
        if let Some(failure) = &mut self.failure {
            // A socket with much room tells of what its peer takes only now and then.
            if undelivered < failure.left {
                self.active = now;
            }
            (failure.left, failure.looked) = (undelivered, now);
            let stalled = now.saturating_duration_since(self.active) >= stall_max(timeouts);
            return if stalled { Action::Close(failure.reason()) } else { Action::None };
        }
        match self.deadline(timeouts) {
            Some(deadline) if deadline <= now && self.state == State::Connecting => {
                Action::Close(CloseReason::ClientLeft)
            }
            Some(_) if self.is_cancel_overdue(now) => Action::Close(CloseReason::Finished),
            Some(deadline) if deadline <= now => {
                let half_close = self.is_half_closed() && timeouts.half_close.is_some();
                Action::Close(if half_close {
                    CloseReason::HalfCloseTimeout
                } else {
                    CloseReason::IdleTimeout
                })
            }
            _ => Action::None,
        }
    }

    fn is_half_closed(&self) -> bool {
        self.to_backend.is_ending() || self.to_client.is_ending()
    }
}

/// How long a session may make no progress that has a broken side.
fn stall_max(timeouts: &Timeouts) -> Duration {
    let limits = [timeouts.half_close, timeouts.idle];
    limits.into_iter().flatten().fold(FLUSH_STALL_MAX, Duration::min)
}
