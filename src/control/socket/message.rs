//! What is said on the control socket: one line of JSON each way.

use serde::{Deserialize, Serialize};

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Begin to drain, as SIGTERM does.
    Drain {
        /// Keep the connection until the process has ended.
        wait: bool,
    },
    /// Show the log filter, or change it.
    LogLevel {
        /// The new one.
        filter: Option<String>,
        /// How long it holds. None: until it is changed again.
        for_ms: Option<u64>,
    },
}

/// What it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It is done; what came of it.
    Done(String),
    /// It is not done; why.
    Refused(String),
}
