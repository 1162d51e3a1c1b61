//! A client whose requests are framed, so that it shares backend connections with others: a state
//! machine without I/O.
//!
//! ```text
//! Idle ──request──▶ Ready ──acquired──▶ InFlight ──replied to──▶ Idle
//!  ▲                │   ▲               │     │                   ▲
//!  │                ▼   └─lost: again───┘     └─▶ InFlight, ──all─┘
//!  │              Queued                 early    answered    passed on
//!  └─error to the client: no connection, no reply; or Leaving, where that ends its connection
//! ```
//!
//! One request of a client is under way at a time; those that it sends ahead wait in its input. So
//! replies come in the order of the requests. The bytes of a request that can be repeated stay at
//! the front of the input until its reply is complete; others leave it as they are sent on.
//!
//! A backend may reply before it has the whole request. The rest is passed on all the same, and only
//! then are both connections as they were before. Where it cannot be passed on any more, it is read
//! and dropped, so that the client can take the reply; unless the reply speaks as if the request
//! had been taken: then the client's connection is reset behind it.
//!
//! Where it is not certain what a message is, the client gets a connection of its own, both become
//! an ordinary session of opaque bytes, and the connection serves nobody else.
//!
//! The worker tells a client what happened and does what it answers, in order ([`Actions`]). What is
//! to be done for what has come so far is asked for at the end of a turn ([`Client::next`]), when all
//! is known that the turn has brought.

mod action;
mod backend;
mod broadcast;
mod client;
mod course;
mod deadline;
mod error_reply;
mod framing;
#[cfg(test)]
mod inspect;
mod placing;
mod policy;
mod reply;
mod state;
#[cfg(test)]
mod tests;
mod upload;

use std::time::Instant;

pub use action::{Action, Actions, ClientEnding, DiscardHow, Fate};
pub use broadcast::Broadcast;
pub use client::{Client, OpaqueParts, Target};
pub use course::Course;
pub use error_reply::{write_away, write_error_reply};
pub use framing::Framing;
pub use placing::{Binding, Placement, Placing, Unserved};
pub use policy::{Limits, Moment, Policy};
pub use reply::{NoBuffer, Replied};
pub use upload::Upload;

pub use crate::protocol::{ErrorReply, Reply};

use super::route::StableHash;
use crate::io::ConnId;
use crate::protocol::Verb;
use crate::proxy::endpoints::EndpointId;

/// What is at the front of a client's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// Nothing, or a request that goes on.
    Partial,
    /// So many bytes that no backend may see: they are answered with an error.
    Refused(u32, ErrorReply),
    /// A request, or as much of it as says what it is.
    Request(Request),
    /// Bytes that can be read in more than one way.
    Opaque,
}

/// A request, as far as it is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What it asks for.
    pub verb: Verb,
    /// The hash of the key that it is about.
    pub key: Option<StableHash>,
    /// Whether it may be sent again when its answer was lost.
    pub repeatable: bool,
    /// Whether it goes to every store where keys are shared out among them.
    pub to_all: bool,
    /// How many bytes of the input it is.
    pub len: u32,
    /// Whether that is all of it.
    pub whole: bool,
}

/// A backend connection in a client's hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackendConn {
    /// The connection.
    pub conn: ConnId,
    /// The endpoint that it goes to.
    pub endpoint: EndpointId,
    /// When it is too old to be kept.
    pub retire_at: Option<Instant>,
    /// When it was made.
    pub made: Instant,
    /// An answer has come on it, to this client or to another one.
    pub served: bool,
    /// Its backend answered a request before it had read all of it, and may still be reading.
    pub unread: bool,
}
