//! What a protocol says of the bytes that it is given.

use super::Verb;

/// Where a request ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestEnd {
    /// All bytes given belong to it, and it goes on.
    Partial,
    /// After this many of them.
    Whole(usize),
    /// It can be read in more than one way, or not at all: it is opaque from its first byte, and so
    /// is all that follows.
    Ambiguous,
}

/// A request, as far as it is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// What it asks for.
    pub verb: Verb,
    /// The key that it is about.
    pub key: Option<&'a [u8]>,
    /// Whether it may be sent again when its reply was lost.
    pub repeatable: bool,
    /// Whether it goes to every store where keys are shared out among them.
    pub to_all: bool,
}

/// What part of a backend's bytes is the reply, and what follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// All of them, and it goes on.
    Partial,
    /// All of them, and it is over: the connection is silent again.
    Complete,
    /// It ended after this many: the rest was not asked for, so the connection is of no more use.
    Surplus(usize),
    /// From here on nobody can tell: all that comes is the client's.
    Opaque,
}

/// How all stores answered one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answers<'a> {
    /// How many stores there are.
    pub stores: u32,
    /// How many of them failed, or were not available.
    pub failed: u32,
    /// The names of those that were not available, as many as fit.
    pub away: &'a str,
    /// How many others were not.
    pub away_unnamed: u32,
    /// The first reply that was no success, without the white space at its end.
    pub first_failure: Option<&'a [u8]>,
}
