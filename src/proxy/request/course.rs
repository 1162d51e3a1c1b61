//! What is told of a client and its latest request once they have ended.

use std::time::Instant;

use super::client::Client;
use crate::limits::BUFFER_SIZE;
use crate::proxy::session::Attempts;
use crate::proxy::{Bytes, Side};

/// The latest way of a request to a backend, and of its reply back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Course {
    /// How often it was sent, and where to.
    pub attempts: Attempts,
    /// When the first byte of its reply came.
    pub answered: Option<Instant>,
    /// Bytes of it that were queued for the backend, and of the reply that were for the client.
    pub bytes: Bytes,
}

impl Client {
    /// The way of its latest request, if that was sent.
    pub fn course(&self) -> Option<Course> {
        self.course
    }

    /// Bytes of it and for it so far.
    pub fn bytes(&self) -> Bytes {
        self.bytes
    }

    /// Which of the two was the first to end its direction: it, or the backend of its last reply.
    pub fn ended_first(&self) -> Option<Side> {
        self.ended_first
    }

    /// Whether its request takes more than one buffer. One that does not finds room in the socket of
    /// a silent connection at once: it has been sent, if not told yet, or this is no reply to it.
    pub(super) fn is_long(&self) -> bool {
        self.course.is_some_and(|course| course.bytes.to_backend > BUFFER_SIZE as u64)
    }
}
