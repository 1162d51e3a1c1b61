//! Decides what to do with connections: no I/O, no clock, no randomness of its own, no unsafe.
//!
//! Events go in as calls of `on_*`, with the time as an argument; what to do comes out as the
//! value returned. The same code runs on every driver, the simulator included.

pub mod admission;
mod backoff;
pub mod balance;
pub mod check;
pub mod cut;
pub mod endpoints;
pub mod health;
pub mod line;
pub mod outage;
pub mod places;
pub mod pool;
pub mod pulse;
pub mod queue;
pub mod relay;
pub mod request;
pub mod retry_budget;
pub mod route;
pub mod session;

/// Names a worker of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId(usize);

impl WorkerId {
    /// The one with this number, from 0.
    pub const fn new(number: usize) -> Self {
        Self(number)
    }
}

impl From<WorkerId> for usize {
    fn from(id: WorkerId) -> Self {
        id.0
    }
}

/// Names a route by its place in the configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteId(u8);

impl RouteId {
    /// So many can be named.
    pub const COUNT_MAX: usize = u8::MAX as usize + 1;

    /// The route at this place.
    ///
    /// # Panics
    /// The place is at or beyond [`RouteId::COUNT_MAX`].
    pub const fn at(index: usize) -> Self {
        assert!(index < Self::COUNT_MAX, "more routes than can be named");
        Self(index as u8)
    }
}

impl From<RouteId> for usize {
    fn from(id: RouteId) -> Self {
        id.0.into()
    }
}

/// Payload that came from a client and from its backend, as it counts in the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bytes {
    /// From the client.
    pub to_backend: u64,
    /// From the backend.
    pub to_client: u64,
}

impl Bytes {
    /// More came from this side.
    pub fn add(&mut self, from: Side, bytes: u64) {
        match from {
            Side::Client => self.to_backend += bytes,
            Side::Backend => self.to_client += bytes,
        }
    }
}

/// One end of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The application that connected to us.
    Client,
    /// The endpoint that we connected to.
    Backend,
}

impl Side {
    /// The opposite end.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Backend,
            Self::Backend => Self::Client,
        }
    }
}
