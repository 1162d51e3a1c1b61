//! The endpoints that a session has tried.

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

    /// The endpoint that was tried last.
    pub fn last(&self) -> Option<EndpointId> {
        self.endpoints[..usize::from(self.len)].last().copied()
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
