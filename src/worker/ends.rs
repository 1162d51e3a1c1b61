//! What is known of sessions and requests that have ended, on its way from a worker to the log.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use crate::limits;
use crate::metrics::{CloseReason, Outcome};
use crate::protocol::Verb;
use crate::proxy::endpoints::Endpoint;
use crate::proxy::{RouteId, Side};

/// How a session or a request has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// A session, or a client whose requests are framed.
    Session(CloseReason),
    /// A request of such a client.
    Request(Verb, Outcome),
}

impl How {
    /// Whether nothing went wrong.
    pub fn is_normal(self) -> bool {
        match self {
            Self::Session(reason) => reason.is_normal(),
            Self::Request(_, outcome) => outcome.is_normal(),
        }
    }
}

/// One that has ended. It has nothing of what a client or a backend sent.
#[derive(Debug)]
pub struct End {
    /// The route that it came by.
    pub route: RouteId,
    /// How it ended.
    pub how: How,
    /// The client's address; none by a Unix socket, or of one that has reset its connection, which the
    /// kernel forgets at once.
    pub client: Option<SocketAddr>,
    /// The endpoint that it had, or that was tried last.
    pub endpoint: Option<Arc<Endpoint>>,
    /// How many endpoints were tried.
    pub attempts: u32,
    /// Who was the first to end or to break, if one of the two was.
    pub ended_first: Option<Side>,
    /// Bytes to the backend and to the client.
    pub bytes: Option<(u64, u64)>,
    /// For how long it lasted.
    pub lasted: Duration,
    /// How long it took until it had a backend.
    pub placed: Option<Duration>,
    /// How long it took from the first byte to the backend to the first one back.
    pub first_byte: Option<Duration>,
    /// How long it took from there to its end.
    pub transfer: Option<Duration>,
}

/// The ends that a worker has to tell of. It never waits: what finds no room is counted.
#[derive(Debug)]
pub struct Ends {
    ring: ArrayQueue<End>,
    dropped: AtomicU64,
}

impl Default for Ends {
    fn default() -> Self {
        Self { ring: ArrayQueue::new(limits::ENDS_MAX), dropped: AtomicU64::new(0) }
    }
}

impl Ends {
    /// Whether one more finds room. One that does not is counted, and need not be made. For the worker.
    pub fn has_room(&self) -> bool {
        let has_room = !self.ring.is_full();
        if !has_room {
            self.dropped.fetch_add(1, Relaxed);
        }
        has_room
    }

    /// Tells of one that finds room. For the worker, which alone fills the ring.
    pub fn tell(&self, end: End) {
        let told = self.ring.push(end);
        debug_assert!(told.is_ok(), "it had room");
    }

    /// The next one, if there is any.
    pub fn take(&self) -> Option<End> {
        self.ring.pop()
    }

    /// How many found no room so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }
}
