//! How errors count, and how they are written to a client.

use std::fmt;

use crate::metrics::Outcome;
use crate::protocol::{ErrorReply, ProtocolName};

impl ErrorReply {
    /// Whether it is told of the store that holds the key, if one does.
    pub fn is_of_a_store(self) -> bool {
        matches!(
            self,
            Self::Unreachable | Self::NoneKnown | Self::NoEndpoint(_) | Self::QueueTimeout(_)
        )
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
            Self::Removed => Outcome::Cut,
            Self::Unfinished(_) => Outcome::ClientTimeout,
        }
    }
}

/// Writes an error as the protocol gives it. Returns its length.
pub fn write_error_reply(protocol: ProtocolName, error: ErrorReply, space: &mut [u8]) -> usize {
    write(protocol, error, format_args!("{error}"), space)
}

/// Writes that the store called `name` is not available, and why if that is known. Returns its
/// length.
pub fn write_away(
    protocol: ProtocolName,
    error: ErrorReply,
    name: &str,
    why: Option<&str>,
    space: &mut [u8],
) -> usize {
    match why {
        None => write(protocol, error, format_args!("store {name} is not available"), space),
        Some(why) => {
            write(protocol, error, format_args!("store {name} is not available: {why}"), space)
        }
    }
}

fn write(
    protocol: ProtocolName,
    error: ErrorReply,
    text: fmt::Arguments<'_>,
    mut space: &mut [u8],
) -> usize {
    let before = space.len();
    // It is far shorter than a buffer.
    let _ = protocol.write_error(error, text, &mut space);
    before - space.len()
}
