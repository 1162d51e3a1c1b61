//! The endpoints that a session has tried.

use std::time::Instant;

use crate::limits::CONNECT_ATTEMPTS_MAX;
use crate::proxy::endpoints::EndpointId;

/// The endpoints that were tried for a session, by their index in the balancer's table.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tried {
    endpoints: [EndpointId; CONNECT_ATTEMPTS_MAX],
    len: u8,
}

impl Tried {
    /// How many attempts there were.
    pub fn attempts(&self) -> u32 {
        u32::from(self.len)
    }

    /// Whether this endpoint was tried.
    pub fn contains(&self, endpoint: EndpointId) -> bool {
        self.endpoints[..usize::from(self.len)].contains(&endpoint)
    }

    /// Takes note of an attempt.
    pub fn push(&mut self, endpoint: EndpointId) {
        if let Some(slot) = self.endpoints.get_mut(usize::from(self.len)) {
            *slot = endpoint;
            self.len += 1;
        }
    }
}

/// What is told of the attempts that were made, once it is over. It outlasts [`Tried`], which begins anew
/// when all endpoints may be tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempts {
    /// How many there were.
    pub count: u32,
    /// The endpoint of the latest one. Nothing keeps its number from being given to another one later.
    pub endpoint: EndpointId,
    /// When that one was made.
    pub at: Instant,
}
