//! Why the process cannot start or go on, and whether another configuration would mend it.

use std::io;

use super::capacity::CapacityError;
use super::driver::Unavailable;
use super::listeners::ListenError;
use crate::config::ConfigErrors;
use crate::worker::WorkerError;

/// Why the process cannot start.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub enum StartError {
    /// The configuration does not go together on this host.
    Config(#[from] ConfigErrors),
    /// The descriptors do not suffice.
    Capacity(#[from] CapacityError),
    /// The driver that is demanded does not work here.
    Driver(#[from] Unavailable),
    /// A listening socket could not be had.
    Listen(#[from] ListenError),
    /// A worker could not be started.
    Worker(#[from] WorkerError),
    /// Anything else that the kernel refused.
    Io(#[from] io::Error),
}

impl StartError {
    /// Whether only somebody who changes the configuration can mend it. Anything else may be gone at
    /// the next start.
    pub fn is_configuration(&self) -> bool {
        let kind = match self {
            Self::Config(_) | Self::Capacity(_) | Self::Driver(_) => return true,
            Self::Worker(_) => return false,
            Self::Listen(error) => error.kind(),
            Self::Io(error) => error.kind(),
        };
        matches!(
            kind,
            io::ErrorKind::AddrNotAvailable
                | io::ErrorKind::InvalidInput
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::Unsupported
        )
    }
}
