//! Decides what to do with connections: no I/O, no clock, no randomness of its own, no unsafe.
//!
//! Events go in as calls of `on_*`, with the time as an argument; what to do comes out as the
//! value returned. The same code runs on every driver, the simulator included.

pub mod admission;
pub mod balance;
pub mod endpoints;
pub mod health;
pub mod pool;
pub mod pulse;
pub mod queue;
pub mod relay;
pub mod request;
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
