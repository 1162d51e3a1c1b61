//! Why a client gets an error in place of a reply. What it looks like is each protocol's
//! [`write_error`](super::Protocol::write_error).

use std::fmt;
use std::time::Duration;

/// The error that a client gets in place of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorReply {
    /// The line holds nothing but white space.
    Blank,
    /// The line is longer than this many bytes.
    TooLong(usize),
    /// Too many requests wait already.
    QueueFull,
    /// No connection became free in this time.
    QueueTimeout(Duration),
    /// There is no endpoint at all, and the request cannot wait for one.
    NoneKnown,
    /// There was no endpoint at all for this time.
    NoEndpoint(Duration),
    /// There were endpoints, and no connection to any of them could be made in this time.
    NoneReachable(Duration),
    /// The store that holds the key is away or out of use.
    Unreachable,
    /// The backend did not answer in this time.
    Timeout(Duration),
    /// The backend's connection ended first.
    Lost,
    /// The backend's endpoint was removed, and the time over that it had to answer.
    Removed,
    /// The client did not go on with its request in this time.
    Unfinished(Duration),
}

impl fmt::Display for ErrorReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blank => f.write_str("empty request"),
            Self::TooLong(max) => write!(f, "request longer than {max} bytes"),
            Self::QueueFull => f.write_str("too many requests wait for a connection"),
            Self::QueueTimeout(limit) => write!(f, "no backend connection was free in {limit:?}"),
            Self::NoneKnown => f.write_str("no endpoint is known"),
            Self::NoEndpoint(limit) => {
                write!(f, "no endpoint is known, and none came in {limit:?}")
            }
            Self::NoneReachable(limit) => {
                write!(f, "no endpoint could be connected to in {limit:?}")
            }
            Self::Unreachable => f.write_str("no store is available"),
            Self::Timeout(limit) => {
                write!(f, "no answer in {limit:?}; the request may have taken effect")
            }
            Self::Lost => {
                f.write_str("connection to the backend lost; the request may have taken effect")
            }
            Self::Removed => {
                f.write_str("the backend was removed; the request may have taken effect")
            }
            Self::Unfinished(limit) => {
                write!(f, "the rest of the request did not come in {limit:?}")
            }
        }
    }
}
