//! What the simulator looks at.

use std::time::Instant;

use super::client::Client;
use super::state::State;
use crate::io::Chain;

impl Client {
    /// It wants a connection before the turn ends.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready { .. })
    }

    /// It is marked as one to be served.
    pub fn is_due(&self) -> bool {
        self.due
    }

    /// It is received from.
    pub fn is_receiving(&self) -> bool {
        self.receiving
    }

    /// It has ended its direction.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Bytes on their way to it.
    pub fn unsent(&self) -> u32 {
        self.unsent
    }

    /// What it has sent and what is not done with.
    pub fn input(&self) -> &Chain {
        &self.input
    }

    /// When its timer fires.
    pub fn timer(&self) -> Option<Instant> {
        self.timer
    }

    /// Checks what holds of it between two events.
    ///
    /// # Panics
    /// If something does not.
    pub fn invariants(&self) {
        match &self.state {
            State::Ready { pending, .. } | State::Queued { pending } => {
                assert!(
                    pending.wanted.len() <= self.input.bytes(),
                    "its request is there: {self:?}"
                );
                let first = pending.history.no_endpoint_since;
                assert!(pending.awaits_endpoint.is_none_or(|at| Some(at) == first), "{self:?}");
            }
            State::InFlight(flight) => {
                assert_eq!(flight.outgoing, 0, "a send is performed at once: {self:?}");
                assert!(flight.held <= self.input.bytes(), "its request is there: {self:?}");
                assert!(!flight.is_passed_on() || self.due, "it is over: {self:?}");
                assert!(!(flight.is_answered() && flight.backend.broken), "{self:?}");
            }
            State::Opaque { .. } => panic!("it is a session by now: {self:?}"),
            State::Idle { .. } | State::Leaving { .. } => {}
        }
    }
}
