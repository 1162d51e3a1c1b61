//! What the worker has to do for a client.

use std::time::{Duration, Instant};

use super::{BackendConn, ErrorReply};
use crate::io::{Close, ConnId};
use crate::metrics::{CloseReason, Discard, Outcome, Retry};
use crate::protocol::Verb;
use crate::proxy::Side;
use crate::proxy::endpoints::EndpointId;

/// How the connection to a backend is closed that is not to be used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiscardHow {
    /// At once, so or so.
    Now(Close),
    /// With a reset, unless bytes for it have not left this host: then with the end of stream. They
    /// are of a client that was answered before its backend had read all.
    ResetUnlessUnsent,
}

/// How a client's connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientEnding {
    /// At once, so or so.
    Now(Close),
    /// With a reset, once the client has all that was sent to it.
    ResetBehind,
    /// The same while it lacks some of it, else with the end of stream, which it was sent already.
    EndOrResetBehind,
}

/// What the worker has to do for a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Call [`Client::next`](super::Client::next) before the turn ends, behind those that are due
    /// already.
    Serve,
    /// Find a connection for the request, or have it wait for one.
    Acquire,
    /// Look whether the connection that it holds is open and silent, and tell it.
    Prove(ConnId),
    /// The request waits no longer.
    LeaveQueue,
    /// The request goes to the endpoint on this connection, for which it has waited so long.
    Asks(EndpointId, ConnId, Duration),
    /// Send to the backend what [`Client::take_outgoing`](super::Client::take_outgoing) gives.
    Send(ConnId),
    /// Its connection has ended or broken: judge the endpoint by that, then call
    /// [`Client::on_backend_ended`](super::Client::on_backend_ended).
    Lost(Retry),
    /// Stop receiving from this side.
    Pause(Side),
    /// Receive from this side again.
    Resume(Side),
    /// It keeps its connection for the next request, unless the endpoint is gone: then as
    /// [`Action::ReleaseSoon`].
    Keep(EndpointId),
    /// Call [`Client::release`](super::Client::release) at the end of the turn, when it is known
    /// that nothing came behind the reply.
    ReleaseSoon,
    /// The connection to this endpoint is closed.
    Discard(ConnId, EndpointId, Discard, DiscardHow),
    /// Count a request. The duration is that until its reply was complete.
    Count(Verb, Outcome, Duration),
    /// Count a request that is sent again.
    CountRetry(Retry),
    /// Count one that would be, if there were a retry left.
    CountRefusedRetry,
    /// Send an error in place of a reply, to a request for the store of this number, if for one.
    Reply(ErrorReply, Option<u16>),
    /// Call [`Client::fail`](super::Client::fail) with this error, or what is known better.
    Fail(ErrorReply),
    /// End the direction to the client, behind all that it was sent.
    Shutdown,
    /// Look whether the client has sent something, and whether it has everything; tell it.
    LookBeforeLeaving,
    /// The client and its backend become a session of opaque bytes.
    BecomeOpaque,
    /// Set the timer.
    Arm(Instant),
    /// Close the client.
    Close(CloseReason),
}

// Several are returned for each event.
const _: () = assert!(size_of::<Action>() <= 32);

/// What becomes of a connection that its client is done with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes back to its pool.
    Released {
        /// The connection.
        conn: BackendConn,
        /// Nothing was received from it lately.
        paused: bool,
        /// The kernel asks its peer whether it is there.
        asked: bool,
    },
    /// It is of no more use.
    Discarded(Action),
}

/// What the worker has to do for a client, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "the client takes it for done"]
pub struct Actions {
    list: [Option<Action>; Self::MAX],
    len: usize,
}

impl Actions {
    /// An error for a request in flight: discard, reply, count, shut down, serve. And one to spare.
    const MAX: usize = 6;

    /// Nothing to do.
    pub const NONE: Self = Self { list: [None; Self::MAX], len: 0 };

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Action> + '_ {
        self.list[..self.len].iter().flatten().copied()
    }

    /// Adds an action behind the others.
    pub(super) fn push(&mut self, action: Action) {
        self.list[self.len] = Some(action);
        self.len += 1;
    }

    /// Adds other actions behind these.
    pub(super) fn then(mut self, others: &Self) -> Self {
        others.iter().for_each(|action| self.push(action));
        self
    }

    /// Adds an action behind the others.
    pub(super) fn and(mut self, action: Action) -> Self {
        self.push(action);
        self
    }
}

impl From<Action> for Actions {
    fn from(action: Action) -> Self {
        let mut actions = Self::NONE;
        actions.push(action);
        actions
    }
}
