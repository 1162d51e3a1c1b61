//! What a client's decisions depend on beside its own state.

use std::time::{Duration, Instant};

use super::Binding;
use crate::config::{Balance, PoolMode, Protocol, RouteConfig};
use crate::io::buffers::Buffers;
use crate::limits;
use crate::proxy::retry_budget::RetryBudget;

/// Time limits of a client.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Without a byte in either direction, and without a request.
    pub idle: Option<Duration>,
    /// With its direction ended, until it has taken all replies.
    pub half_close: Option<Duration>,
    /// A request's wait for a connection.
    pub queue: Duration,
    /// Its wait for an endpoint while there is none at all.
    pub endpoint: Duration,
    /// A backend that is owed nothing: until its reply begins, and then until it goes on.
    pub request: Option<Duration>,
}

/// What the configuration says about clients.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// What they speak.
    pub protocol: Protocol,
    /// Their time limits.
    pub limits: Limits,
    /// How often a request is sent at most.
    pub attempts_max: u32,
    /// A connection is released after each reply, and not only as its client ends.
    pub releases_after_reply: bool,
    /// What says which endpoints a request may go to.
    pub binding: Binding,
    /// An endpoint nearby is preferred.
    pub prefers_near: bool,
    /// An error says that the connection ends with it.
    pub ends_after_error: bool,
    /// In a drain, clients still come for so long as the worker is announced as leaving.
    pub drain_delay: Duration,
}

impl Policy {
    /// The policy of a route, in a process that announces for so long that it leaves.
    pub fn new(config: &RouteConfig, drain_delay: Duration) -> Self {
        Self {
            protocol: config.protocol,
            limits: Limits {
                idle: config.idle_timeout,
                half_close: config.half_close_timeout,
                queue: config.requests.queue_timeout,
                endpoint: config.endpoint_wait,
                request: config.requests.timeout,
            },
            attempts_max: config.connect_attempts,
            releases_after_reply: config.pool.mode == PoolMode::Request,
            binding: match config.balance {
                Balance::KeyHash => Binding::Key,
                Balance::SourceHash => Binding::Source,
                _ => Binding::Nothing,
            },
            prefers_near: config.locality.prefers_near(),
            ends_after_error: config.protocol.facts().ends_after_error,
            drain_delay,
        }
    }
}

/// What holds at the moment of an event.
pub struct Moment<'a> {
    /// What the configuration says.
    pub policy: &'a Policy,
    /// The worker's buffers.
    pub buffers: &'a mut Buffers,
    /// The retries that may be made.
    pub retries: &'a mut RetryBudget,
    /// Room for a request that lies in several buffers.
    pub scratch: &'a mut [u8],
    /// Since when clients are to leave, if they are.
    pub drains_since: Option<Instant>,
    /// The time.
    pub now: Instant,
}

impl Moment<'_> {
    /// How much may be held for a client now.
    pub(super) fn room(&self) -> Room {
        let spare = self.buffers.spare();
        Room { max: limits::in_flight_max(spare), is_short: limits::buffers_are_short(spare) }
    }
}

/// How much may be held for one direction of a client: the fewer buffers are free, the less.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// Bytes; at least as many as a buffer holds.
    pub max: u32,
    /// Buffers are so short that it is one buffer.
    pub is_short: bool,
}
