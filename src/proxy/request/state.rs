//! The states of a client, each with what there is only in it.

use std::time::Instant;

use super::backend::Backend;
use super::{Broadcast, Request, Upload};
use crate::limits::BUFFER_SIZE;
use crate::protocol::Verb;
use crate::proxy::route::StableHash;
use crate::proxy::session::Tried;

/// What a client is in the middle of.
#[allow(clippy::large_enum_variant, reason = "clients are in flight for most of their time")]
#[derive(Debug)]
pub(super) enum State {
    /// No request is known: nothing has come, or a part of one.
    Idle {
        /// From an earlier request.
        kept: Option<Backend>,
    },
    /// A request is to be sent, or to join the queue, before the turn ends.
    Ready {
        /// The request.
        pending: Pending,
        /// From an earlier request. It is looked at before it is used.
        kept: Option<Backend>,
    },
    /// Its request is in the queue.
    Queued {
        /// The request.
        pending: Pending,
    },
    /// Its request is with a backend.
    InFlight(InFlight),
    /// It is to become a session of opaque bytes before the event is over.
    Opaque {
        /// What the session will be on.
        backend: Backend,
        /// Bytes at the front of the input that were sent.
        sent: u32,
    },
    /// It was sent all that it gets, and is to leave.
    Leaving {
        /// From an earlier request.
        kept: Option<Backend>,
    },
}

impl State {
    /// Nothing at all.
    pub(super) const EMPTY: Self = Self::Idle { kept: None };

    /// The connection that the client holds.
    pub(super) fn backend(&self) -> Option<&Backend> {
        match self {
            Self::Idle { kept } | Self::Ready { kept, .. } | Self::Leaving { kept } => {
                kept.as_ref()
            }
            Self::Queued { .. } => None,
            Self::InFlight(flight) => Some(&flight.backend),
            Self::Opaque { backend, .. } => Some(backend),
        }
    }

    /// The connection that the client holds.
    pub(super) fn backend_mut(&mut self) -> Option<&mut Backend> {
        match self {
            Self::Idle { kept } | Self::Ready { kept, .. } | Self::Leaving { kept } => {
                kept.as_mut()
            }
            Self::Queued { .. } => None,
            Self::InFlight(flight) => Some(&mut flight.backend),
            Self::Opaque { backend, .. } => Some(backend),
        }
    }

    /// The connection that it holds without a request on it, taken out.
    pub(super) fn take_kept(&mut self) -> Option<Backend> {
        match self {
            Self::Idle { kept } | Self::Ready { kept, .. } | Self::Leaving { kept } => kept.take(),
            Self::Queued { .. } => None,
            Self::InFlight(_) | Self::Opaque { .. } => unreachable!("it is in use"),
        }
    }

    /// The request that has no connection yet.
    pub(super) fn pending(&self) -> Option<&Pending> {
        match self {
            Self::Ready { pending, .. } | Self::Queued { pending } => Some(pending),
            _ => None,
        }
    }

    /// The request that has no connection yet.
    pub(super) fn pending_mut(&mut self) -> Option<&mut Pending> {
        match self {
            Self::Ready { pending, .. } | Self::Queued { pending } => Some(pending),
            _ => None,
        }
    }

    /// The request that is with a backend.
    pub(super) fn in_flight(&self) -> Option<&InFlight> {
        match self {
            Self::InFlight(flight) => Some(flight),
            _ => None,
        }
    }
}

/// What a connection is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// To send a request on it.
    Request(Request),
    /// To become a session of bytes that can be read in more than one way.
    Opaque,
}

impl Wanted {
    /// What it counts as.
    pub(super) fn verb(&self) -> Verb {
        match self {
            Self::Request(request) => request.verb,
            Self::Opaque => Verb::OPAQUE,
        }
    }

    /// The key that it is about.
    pub(super) fn key(&self) -> Option<StableHash> {
        match self {
            Self::Request(request) => request.key,
            Self::Opaque => None,
        }
    }

    /// Bytes at the front of the input that are its own.
    pub(super) fn len(&self) -> u32 {
        match self {
            Self::Request(request) => request.len,
            Self::Opaque => 0,
        }
    }
}

/// What is remembered of a request however often it is sent.
#[derive(Debug)]
pub(super) struct History {
    /// When it was found.
    pub(super) since: Instant,
    /// The endpoints that were tried for it.
    pub(super) tried: Tried,
    /// Attempts that are none of those, since their endpoint has left.
    pub(super) attempts_cut: u32,
    /// Since when there was no endpoint for it, the first time.
    pub(super) no_endpoint_since: Option<Instant>,
    /// The replies so far, if it goes to all stores.
    pub(super) broadcast: Option<Box<Broadcast>>,
}

impl History {
    /// A request that was found just now, and goes to all stores if there is a `broadcast`.
    pub(super) fn new(broadcast: Option<Box<Broadcast>>, now: Instant) -> Self {
        Self {
            since: now,
            tried: Tried::default(),
            attempts_cut: 0,
            no_endpoint_since: None,
            broadcast,
        }
    }

    /// How often it was tried, whatever became of that.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts_cut + self.tried.attempts()
    }

    /// The endpoint that it is with has left: nothing has failed, so it may be tried as often as at first.
    pub(super) fn on_cut(&mut self) {
        self.attempts_cut = self.attempts();
        self.tried = Tried::default();
    }

    /// The next store has its turn.
    pub(super) fn on_next_store(&mut self) {
        (self.attempts_cut, self.tried) = (0, Tried::default());
    }
}

/// A request that has no connection yet.
#[derive(Debug)]
pub(super) struct Pending {
    /// What it wants one for.
    pub(super) wanted: Wanted,
    /// What is remembered of it.
    pub(super) history: History,
    /// Since when it wants a connection.
    pub(super) wanting: Instant,
    /// From when its wait for a connection has its limit: that for an endpoint has another.
    pub(super) timed: Instant,
    /// There is no endpoint for it, since then.
    pub(super) awaits_endpoint: Option<Instant>,
}

impl Pending {
    /// It wants a connection from now on.
    pub(super) fn new(wanted: Wanted, history: History, now: Instant) -> Self {
        Self { wanted, history, wanting: now, timed: now, awaits_endpoint: None }
    }
}

/// How far the reply to a request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing of it.
    Expected,
    /// A part.
    Begun,
    /// All of it, and the request is counted. The rest of that is still passed on.
    Complete,
}

/// A request that is with a backend.
#[derive(Debug)]
pub(super) struct InFlight {
    /// The request.
    pub(super) request: Request,
    /// What is remembered of it.
    pub(super) history: History,
    /// Where it was sent.
    pub(super) backend: Backend,
    /// Bytes of it that stay at the front of the input, to be sent again.
    pub(super) held: u32,
    /// Bytes of it that are queued for the backend and still to be taken out of the input.
    pub(super) outgoing: u32,
    /// How far the reply has come.
    pub(super) reply: Progress,
    /// Bytes of it went to nobody.
    pub(super) cut: bool,
    /// When a byte of it or of its reply moved last, in any direction.
    pub(super) moved: Instant,
    /// The client's pace with a request that is sent on as it comes.
    pub(super) upload: Upload,
}

impl InFlight {
    /// The request is sent, all of it that there is.
    pub(super) fn new(request: Request, history: History, backend: Backend, now: Instant) -> Self {
        let is_held = request.repeatable || history.broadcast.is_some();
        let mut flight = Self {
            request,
            history,
            backend,
            held: if is_held { request.len } else { 0 },
            outgoing: 0,
            reply: Progress::Expected,
            cut: false,
            moved: now,
            upload: Upload::new(now),
        };
        flight.on_queued(request.len, now);
        flight
    }

    /// Bytes of it are queued for its backend.
    pub(super) fn on_queued(&mut self, bytes: u32, now: Instant) {
        self.backend.on_queued(bytes);
        self.outgoing += bytes;
        self.moved = now;
        self.on_upload(now);
    }

    /// The backend took bytes of it.
    pub(super) fn on_backend_sent(&mut self, bytes: u32, now: Instant) {
        self.backend.on_sent(bytes);
        self.moved = now;
        self.on_upload(now);
    }

    /// Bytes of the reply came.
    pub(super) fn on_reply(&mut self, now: Instant) {
        self.reply = Progress::Begun;
        self.moved = now;
        self.backend.conn.served = true;
        self.backend.pulse.on_heard();
    }

    fn on_upload(&mut self, now: Instant) {
        if self.is_streaming() {
            // One buffer may have been sent without that having been told.
            self.upload.on_held_up(self.backend.unsent >= BUFFER_SIZE as u32, now);
        }
    }

    /// More of it is to be sent on as it comes.
    pub(super) fn is_streaming(&self) -> bool {
        !self.request.whole
    }

    /// It was answered, and the rest of it is passed on.
    pub(super) fn is_answered(&self) -> bool {
        self.reply == Progress::Complete
    }

    /// It was answered, and the backend has all of it by now.
    pub(super) fn is_passed_on(&self) -> bool {
        self.is_answered() && !self.is_streaming() && self.backend.unsent == 0
    }

    /// The client has a part of the reply.
    pub(super) fn has_part(&self) -> bool {
        self.history.broadcast.is_none() && self.reply != Progress::Expected
    }
}
