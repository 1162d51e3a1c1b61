//! What a client is told in place of an answer.

use std::fmt;
use std::io::Write;
use std::time::Duration;

use crate::config::Protocol;
use crate::metrics::Outcome;

/// What a client is told in place of an answer.
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
    /// The client did not go on with its request in this time.
    Unfinished(Duration),
}

impl ErrorReply {
    /// Whether it is told of the store that holds the key, if one does.
    pub fn is_of_a_store(self) -> bool {
        matches!(self, Self::Unreachable | Self::NoneKnown | Self::QueueTimeout(_))
    }

    /// How the request counts.
    pub fn outcome(self) -> Outcome {
        match self {
            Self::Blank | Self::TooLong(_) => Outcome::Refused,
            Self::QueueFull => Outcome::QueueFull,
            Self::QueueTimeout(_) => Outcome::QueueTimeout,
            Self::NoneKnown | Self::NoEndpoint(_) => Outcome::NoEndpoint,
            Self::NoneReachable(_) | Self::Unreachable => Outcome::Unreachable,
            Self::Timeout(_) => Outcome::Timeout,
            Self::Lost => Outcome::Lost,
            Self::Unfinished(_) => Outcome::ClientTimeout,
        }
    }
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
            Self::Unfinished(limit) => {
                write!(f, "the rest of the request did not come in {limit:?}")
            }
        }
    }
}

/// Writes that a store is not available, and why if that is known. Returns its length.
pub fn write_away(name: &str, why: Option<&str>, mut space: &mut [u8]) -> usize {
    let before = space.len();
    // It is far shorter than a buffer.
    let _ = match why {
        None => writeln!(space, "ERR store {name} is not available"),
        Some(why) => writeln!(space, "ERR store {name} is not available: {why}"),
    };
    before - space.len()
}

/// Writes a fault as the protocol says it. Returns its length.
pub fn write_error_reply(protocol: Protocol, error: ErrorReply, mut space: &mut [u8]) -> usize {
    let before = space.len();
    // It is far shorter than a buffer.
    let _ = match protocol {
        Protocol::Tcp | Protocol::Chronos => writeln!(space, "ERR {error}"),
        Protocol::Http1 => {
            let status = match error {
                ErrorReply::Timeout(_) => "504 Gateway Timeout",
                ErrorReply::Lost => "502 Bad Gateway",
                ErrorReply::Unfinished(_) => "408 Request Timeout",
                _ => "503 Service Unavailable",
            };
            // Without a body, so that it is right as an answer to HEAD too.
            write!(
                space,
                "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\
                 Proxy-Status: aegis-proxy; details=\"{error}\"\r\n\r\n"
            )
        }
    };
    before - space.len()
}
