//! What is known of sessions and requests that have ended, on its way from a worker to the log.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use crate::limits;
use crate::metrics::{CloseReason, Outcome};
#[cfg(test)]
use crate::metrics::{Direction, LabelSet, WorkerStats};
use crate::protocol::Verb;
use crate::proxy::endpoints::Endpoint;
use crate::proxy::{Bytes, RouteId, Side};

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

    /// The side that it says to have broken, if it says so.
    pub fn broken(self) -> Option<Side> {
        match self {
            Self::Session(CloseReason::ClientReset | CloseReason::ClientSilent)
            | Self::Request(_, Outcome::ClientGone) => Some(Side::Client),
            Self::Session(CloseReason::BackendReset | CloseReason::BackendSilent)
            | Self::Request(_, Outcome::Lost) => Some(Side::Backend),
            Self::Session(_) | Self::Request(..) => None,
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
    /// Bytes that came from the client and from the backend. Of a request: those of its latest attempt.
    pub bytes: Bytes,
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

/// All that a worker has told of, to be compared with what it has counted.
#[cfg(test)]
#[derive(Default)]
pub(super) struct Told {
    ends: Vec<End>,
    dropped: u64,
}

#[cfg(test)]
impl Told {
    /// Takes what there is.
    pub(super) fn hear(&mut self, ends: &Ends) {
        self.ends.extend(std::iter::from_fn(|| ends.take()));
        self.dropped = ends.dropped();
    }

    /// Each end that was counted was told of once, as what it was counted, and the bytes of all sessions
    /// are those that were counted.
    pub(super) fn check(&self, stats: &WorkerStats) {
        assert_eq!(self.dropped, 0, "there was room for all");
        for (route, stats) in stats.routes.iter().enumerate() {
            let ends = || self.ends.iter().filter(move |end| usize::from(end.route) == route);
            let told = |how| ends().filter(|end| end.how == how).count() as u64;
            for &reason in CloseReason::ALL {
                assert_eq!(told(How::Session(reason)), stats.closed(reason), "{reason:?}");
            }
            for &outcome in Outcome::ALL {
                let of_all = |end: &&End| matches!(end.how, How::Request(_, how) if how == outcome);
                let told = ends().filter(of_all).count() as u64;
                assert_eq!(told, stats.requests_ended(outcome), "{outcome:?}");
            }
            let sessions = ends().filter(|end| matches!(end.how, How::Session(_)));
            let (mut to_backend, mut to_client) = (0, 0);
            for end in sessions {
                to_backend += end.bytes.to_backend;
                to_client += end.bytes.to_client;
            }
            assert_eq!(to_backend, stats.bytes.of(Direction::ToBackend).get(), "bytes to backends");
            assert_eq!(to_client, stats.bytes.of(Direction::ToClient).get(), "bytes to clients");
        }
    }
}
