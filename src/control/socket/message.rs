//! What is said on the control socket: one line of JSON each way, and a second one by a tap.

use std::net::SocketAddr;

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
    /// Capture what one new client says and is told. Behind the first reply there comes another one in
    /// time, [`Reply::Tapped`] or [`Reply::Refused`].
    Tap(Tap),
}

/// What it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It is done; what came of it.
    Done(String),
    /// It is not done; why.
    Refused(String),
    /// What was captured follows, to be read by [`crate::capture::records`].
    Tapped(Tapped),
}

/// Which client is to be captured, and how much of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tap {
    /// The route that it comes by. None: any.
    pub route: Option<String>,
    /// The endpoint that serves it. None: any.
    pub endpoint: Option<String>,
    /// How many others come first.
    pub passes: u32,
    /// Bytes of the file, at most.
    pub bytes: usize,
    /// How long to wait for it and to capture it, in all.
    pub for_ms: u64,
}

/// Whom it was captured of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tapped {
    /// What came of it, in words.
    pub summary: String,
    /// The client's address. None by a Unix socket, or if it had left already.
    pub client: Option<SocketAddr>,
    /// The address that it connected to.
    pub local: Option<SocketAddr>,
    /// When it was let in, in nanoseconds since the Unix epoch.
    pub since_ns: u64,
    /// Bytes that follow.
    pub len: usize,
}
