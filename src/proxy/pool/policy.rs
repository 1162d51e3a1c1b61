//! What a pool keeps and how many connections it may have, by how its connections are used.

use super::Counts;
use crate::config::{PoolConfig, PoolMode};

/// How connections are used.
#[derive(Debug, Clone, Copy)]
pub(super) enum Policy {
    /// Each serves one session. The pool grows with the sessions that found it empty.
    Preconnect { idle_max: usize },
    /// They come back once their session is over.
    Session { idle_max: usize },
    /// They come back after each request, and there are at most `size` of them.
    Request { size: usize },
}

impl Policy {
    pub(super) fn of(config: &PoolConfig) -> Self {
        match config.mode {
            PoolMode::Preconnect => Self::Preconnect { idle_max: config.most() },
            PoolMode::Session => Self::Session { idle_max: config.most() },
            PoolMode::Request => Self::Request { size: config.size },
        }
    }

    /// Whether connections serve more than one client.
    pub(super) fn reuses(self) -> bool {
        !matches!(self, Self::Preconnect { .. })
    }

    /// Whether there is room for a further idle connection. Where requests share connections, all
    /// of them may come back in one turn, to be acquired at its end: the surplus grows old instead.
    pub(super) fn keeps_one_more(self, counts: Counts) -> bool {
        match self {
            Self::Preconnect { idle_max } | Self::Session { idle_max } => counts.idle < idle_max,
            Self::Request { size } => counts.idle + counts.in_use < size,
        }
    }

    /// How many more connections there may be.
    pub(super) fn room(self, counts: Counts) -> usize {
        match self {
            Self::Preconnect { .. } | Self::Session { .. } => usize::MAX,
            Self::Request { size } => {
                size.saturating_sub(counts.idle + counts.connecting + counts.in_use)
            }
        }
    }
}
