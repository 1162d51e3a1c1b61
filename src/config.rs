//! Configuration: environment → [`RawConfig`] (text as found) → [`Config`] (parsed, checked, with
//! units).

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::time::Duration;

/// The effective configuration. Every field is named after its variable `AEGIS_…`.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Where clients connect; families that the host lacks are skipped.
    pub listen: Vec<SocketAddr>,
    /// Where `/metrics` and the probes answer.
    pub admin: SocketAddr,
    /// The backends' names or addresses.
    pub backends: Vec<HostPort>,
    /// How often names among the backends are resolved again.
    pub dns_refresh: Duration,
    /// How many worker threads; `None` means what the container may use.
    pub workers: Option<NonZeroUsize>,
    /// Whether workers are pinned to cores.
    pub pin: Switch,
    /// Which driver does the I/O.
    pub io: IoChoice,
    /// How the endpoint of a new session is chosen.
    pub balance: Balance,
    /// The pools of warm connections.
    pub pool: PoolConfig,
    /// Most sessions at a time in the whole process; `None` derives it from the descriptor limit.
    pub max_sessions: Option<NonZeroUsize>,
    /// How long one attempt to connect may take.
    pub connect_timeout: Duration,
    /// How many endpoints are tried for a session at most.
    pub connect_attempts: u32,
    /// Ends sessions on which no byte moved for this long.
    pub idle_timeout: Option<Duration>,
    /// Ends sessions with one direction ended on which no byte moved for this long.
    pub half_close_timeout: Option<Duration>,
    /// `TCP_USER_TIMEOUT` of all sockets: how long sent bytes may stay unacknowledged.
    pub tcp_user_timeout: Option<Duration>,
    /// Keep-alive probes start after this idle time.
    pub keepalive: Option<Duration>,
    /// The PROXY protocol header sent to backends.
    pub proxy_protocol: ProxyProtocol,
    /// How long to go on accepting after the first SIGTERM.
    pub drain_delay: Duration,
    /// How long sessions may take to finish after that.
    pub drain_timeout: Duration,
    /// Consecutive failures that eject an endpoint.
    pub eject_failures: u32,
    /// The first ejection's length; it doubles with each further one, up to a cap.
    pub eject_time: Duration,
    /// The log filter, in the syntax of `tracing_subscriber::EnvFilter`.
    pub log: String,
    /// The log's format.
    pub log_format: LogFormat,
}

/// A host (name or IP address) and a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// A DNS name or an IP address (IPv6 without brackets).
    pub host: String,
    /// The TCP port, never 0.
    pub port: u16,
}

/// Bounds of a pool, each per worker and endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// Warm connections kept at least.
    pub min_idle: usize,
    /// Warm connections kept at most; 0 turns pooling off.
    pub max_idle: usize,
    /// Connections above the minimum that were idle for this long are closed.
    pub idle_timeout: Option<Duration>,
    /// Connections older than this are replaced.
    pub max_lifetime: Option<Duration>,
}

/// A switch that the program may decide by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// The program decides.
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// Which driver does the I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoChoice {
    /// `io_uring` where it works, else epoll.
    Auto,
    /// `io_uring`, or a failure to start.
    Uring,
    /// epoll.
    Epoll,
}

/// How the endpoint of a new session is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    /// The endpoint with the fewest sessions of this worker; ties take turns.
    LeastConn,
    /// Each in turn.
    RoundRobin,
    /// The better of two drawn at random (Mitzenmacher, "The power of two choices").
    RandomTwo,
    /// By the client's address, stable while the endpoints are (rendezvous hashing).
    SourceHash,
}

/// The PROXY protocol header sent to backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// None.
    Off,
    /// Version 1, one text line.
    V1,
    /// Version 2, binary.
    V2,
}

/// The log's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}
