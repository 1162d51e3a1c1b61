//! How connections are closed: what is cut is to look cut.

use super::{Session, State};
use crate::io::Close;
use crate::metrics::CloseReason;
use crate::proxy::Side;

/// How the connection of one side is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// At once, so or so.
    Now(Close),
    /// With a reset, once the peer has all that was sent to it.
    ResetBehind,
    /// At once: with a reset if the peer has all that was sent to it, else with the end of stream,
    /// which is on its way to it already.
    ResetOrEnd,
}

impl Session {
    /// How the connection of one side is closed. Only where both directions have ended is that an
    /// orderly end: what is cut is to look cut, or half an answer would pass for a whole one.
    pub fn ending(&self, side: Side, reason: CloseReason) -> Ending {
        let to_side = match side {
            Side::Client => &self.to_client,
            Side::Backend => &self.to_backend,
        };
        let at_once = reason == CloseReason::DrainDeadline;
        match self.failure {
            _ if reason == CloseReason::Finished => Ending::Now(Close::Graceful),
            _ if self.state == State::Connecting => Ending::Now(Close::Reset),
            // There was a whole stream for it, and its end.
            None if to_side.is_complete() && at_once => Ending::ResetOrEnd,
            None if to_side.is_complete() => Ending::ResetBehind,
            Some(failure) if failure.side != side && to_side.in_flight() == 0 && !at_once => {
                Ending::ResetBehind
            }
            _ => Ending::Now(Close::Reset),
        }
    }
}

/// How a client of whose requests none is under way is closed for `reason`: it is owed nothing, so
/// an end of stream cuts nothing.
pub fn how_to_close(reason: CloseReason) -> Close {
    match reason {
        CloseReason::Finished
        | CloseReason::IdleTimeout
        | CloseReason::HalfCloseTimeout
        | CloseReason::EndpointRemoved
        | CloseReason::Drained
        | CloseReason::DrainDeadline
        | CloseReason::ClientLeft => Close::Graceful,
        CloseReason::ClientReset
        | CloseReason::BackendReset
        | CloseReason::BackendSilent
        | CloseReason::ClientSilent
        | CloseReason::ClientTimeout
        | CloseReason::ConnectFailed
        | CloseReason::ConnectTimeout
        | CloseReason::NoEndpoint
        | CloseReason::QueueFull
        | CloseReason::QueueTimeout
        | CloseReason::Overload => Close::Reset,
    }
}
