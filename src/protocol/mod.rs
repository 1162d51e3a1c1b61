//! What there is to know of a protocol: where its requests and replies end, what its errors look
//! like, what may be sent again, what goes to all stores, and under which labels it is counted.
//!
//! # How to add a protocol
//!
//! 1. Make a folder with a type that holds what one client's connection is in the middle of, and
//!    implement [`Protocol`] for it. [`tcp`] is the smallest that there can be, [`chronos`] the one
//!    to copy for lines, [`http1`] the one for messages with bodies.
//! 2. Declare the module and add its row to the list of `protocols!` below: its type, and the word
//!    that users write for it in `AEGIS_PROTOCOL`.
//!
//! That is all of the program. The configuration learns the word and which modes and variables go
//! with it, the metrics their labels, and a worker's clients speak it; the tests of this module hold
//! each row to what its facts promise. The chart's schema and the generated pages in `docs` repeat the words.
//!
//! A protocol sees slices of bytes, in order, each of them once. It has no I/O, no clock, and does
//! not know what holds the bytes, or which endpoints there are. It never guesses: what two readers
//! could take for two things is [`RequestEnd::Ambiguous`] or [`Reply::Opaque`]. The bytes are still
//! passed on, on connections that serve nobody else.
//!
//! There is no `dyn` here: the list makes an enum of the types, [`Conversation`], which is matched
//! once per slice.

pub mod chronos;
pub mod http1;
pub mod postgres;
pub mod proxy_header;
pub mod tcp;

mod error_reply;
#[macro_use]
mod list;
mod message;
#[cfg(test)]
mod tests;
mod verb;

use std::fmt;
use std::io::{self, Write};

pub use error_reply::ErrorReply;
pub use message::{Answers, Reply, Request, RequestEnd};
pub use verb::Verb;

protocols! {
    tcp::Tcp = "tcp",
    chronos::Chronos = "chronos",
    http1::Http1 = "http1",
}

/// What one client's connection is in the middle of, as its protocol sees it.
///
/// The calls for one request, in order: [`on_request_bytes`](Self::on_request_bytes) until it ends;
/// [`request`](Self::request); [`on_sent`](Self::on_sent) each time that it is sent; then
/// [`on_reply_bytes`](Self::on_reply_bytes) until the reply ends. Where
/// [`is_sent_on`](Self::is_sent_on) says so, the later calls come before the request ends.
pub trait Protocol: fmt::Debug + Sized {
    /// What holds for all connections.
    const FACTS: Facts;

    /// A connection on which nothing was received yet.
    fn new(settings: &Settings) -> Self;

    /// Of how many bytes at the front of a request [`request`](Self::request) has to see at most.
    fn peek_max(_settings: &Settings) -> usize {
        0
    }

    /// Takes the client's bytes that follow those taken before, up to the end of a request.
    fn on_request_bytes(&mut self, bytes: &[u8]) -> RequestEnd;

    /// Whether an error will answer the request under way whatever follows, so that its bytes need
    /// not be kept.
    fn is_refused(&self) -> bool {
        false
    }

    /// Whether the request under way, of which `seen` bytes were taken, is to be sent on before it
    /// is whole. Up to `held_max` bytes can be waited for, and are better: a request that is sent on
    /// holds a connection while its client takes its time.
    fn is_sent_on(&self, _seen: usize, _held_max: usize) -> bool {
        false
    }

    /// What the request is that has just ended, or is sent on from here. `front` is its beginning, as
    /// far as [`peek_max`](Self::peek_max) says. An error is the reply to what no backend may see.
    fn request<'a>(&self, front: &'a [u8]) -> Result<Request<'a>, ErrorReply>;

    /// The request is sent to a backend: a reply follows.
    fn on_sent(&mut self) {}

    /// Takes the backend's bytes that follow those taken before.
    fn on_reply_bytes(&mut self, bytes: &[u8]) -> Reply;

    /// Whether both ends keep their connections after the reply that has just ended.
    fn keeps_alive(&self) -> bool {
        true
    }

    /// Whether the end of the backend's connection is the end of the reply.
    fn ends_with_connection(&self) -> bool {
        false
    }

    /// Whether the reply says that the request did not do what it was for, so that the rest of it
    /// need not be sent.
    fn refuses(&self) -> bool {
        false
    }

    /// Writes a reply in place of the one that a backend would have given. `text` says why.
    fn write_error(
        error: ErrorReply,
        text: fmt::Arguments<'_>,
        space: &mut dyn Write,
    ) -> io::Result<()>;

    /// Whether the reply to the liveness request says that the server is well, if these first bytes of it
    /// are enough to tell.
    fn is_live(_reply: &[u8]) -> Option<bool> {
        unreachable!("there is no request for that")
    }

    /// Whether one store's reply to a request that goes to all of them says that all is well.
    fn is_success(_reply: &[u8]) -> bool {
        unreachable!("no request of this protocol goes to all stores")
    }

    /// Writes one reply in place of those of all stores.
    fn write_combined(_answers: &Answers<'_>, _space: &mut dyn Write) -> io::Result<()> {
        unreachable!("no request of this protocol goes to all stores")
    }
}

/// What holds for all connections of a protocol.
#[derive(Debug, Clone, Copy)]
#[allow(clippy::struct_excessive_bools, reason = "each is independent of the others")]
pub struct Facts {
    /// Its requests and replies are framed, so a connection may serve several clients.
    pub is_framed: bool,
    /// What requests ask for, by the labels under which they are counted; see [`Verb::named`].
    pub commands: &'static [&'static str],
    /// Its requests have keys, by which they can be routed.
    pub has_keys: bool,
    /// It may turn out that nobody can tell where a message ends.
    pub can_be_opaque: bool,
    /// There are requests that no backend may see.
    pub can_refuse: bool,
    /// An error says that the connection ends with it.
    pub ends_after_error: bool,
    /// The variables that are there for it and for others like it.
    pub variables: &'static [&'static str],
    /// A request that changes nothing and that any server answers at once, if there is one. In it
    /// `{path}` stands for what users would have it ask for, and `{host}` for the server's address.
    pub liveness_request: Option<&'static [u8]>,
}

impl Facts {
    /// Where messages are framed, and nothing else is special.
    pub const FRAMED: Self = Self {
        is_framed: true,
        commands: &[],
        has_keys: false,
        can_be_opaque: false,
        can_refuse: false,
        ends_after_error: false,
        variables: &[],
        liveness_request: None,
    };

    /// What requests can be counted as, in the order in which they are shown.
    pub fn verbs(&self) -> impl Iterator<Item = Verb> + use<> {
        let commands = self.commands.iter().map(|label| Verb::named(label));
        let opaque = self.is_framed && self.can_be_opaque;
        let other = self.is_framed.then_some(Verb::OTHER);
        commands.chain(other).chain(opaque.then_some(Verb::OPAQUE))
    }
}

impl ProtocolName {
    /// The words for those of which something holds.
    pub fn words_where(holds: impl Fn(&Facts) -> bool) -> String {
        let found: Vec<_> =
            Self::ALL.iter().filter(|name| holds(name.facts())).map(|name| name.word()).collect();
        found.join(" and ")
    }
}

/// What users can say about messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// The longest line in bytes, its end included (`AEGIS_LINE_MAX`).
    pub line_max: usize,
    /// Whether writes are sent again when their reply was lost (`AEGIS_REPEAT_WRITES`).
    pub repeat_writes: bool,
}
