//! Configuration: environment → [`RawConfig`] (text as found) → [`Config`] (parsed, checked, with
//! units).

mod error;
mod read;
mod service_links;
mod value;
mod variables;
mod warnings;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

pub use error::{ConfigErrors, Problem};
pub use variables::{PREFIX, RawConfig, VARIABLES, Variable};

use crate::limits;
pub use crate::protocol::ProtocolName as Protocol;
use value::{duration_text, list_text};
#[allow(clippy::wildcard_imports)] // The constants of the table.
use variables::*;

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
    /// Where endpoints come from.
    pub discovery: Discovery,
    /// What of Kubernetes the endpoints are.
    pub kube: KubeConfig,
    /// How long the start waits for a source that cannot be reached.
    pub start_timeout: Duration,
    /// Which endpoints are preferred.
    pub locality: Locality,
    /// The node that this runs on.
    pub node_name: Option<String>,
    /// The zone that this runs in.
    pub zone: Option<String>,
    /// Ends sessions on an endpoint this long after it has left the set.
    pub backend_drain: Option<Duration>,
    /// How long an endpoint that joins others takes to its full share.
    pub slow_start: Option<Duration>,
    /// How long a new session waits for an endpoint while there is none at all.
    pub endpoint_wait: Duration,
    /// How many worker threads; `None` means what the container may use.
    pub workers: Option<NonZeroUsize>,
    /// Whether workers are pinned to cores.
    pub pin: Switch,
    /// What the container was given.
    pub resources: Resources,
    /// Which driver does the I/O.
    pub io: IoChoice,
    /// How the endpoint of a new session is chosen.
    pub balance: Balance,
    /// What clients and backends speak.
    pub protocol: Protocol,
    /// The pools of backend connections.
    pub pool: PoolConfig,
    /// What holds for requests, where used connections are lent.
    pub requests: RequestConfig,
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
    /// For how long a peer may acknowledge nothing, be it bytes or a probe, until it is given up.
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

impl Config {
    /// What is in force: every variable in the order of [`VARIABLES`], with a text that would set
    /// it to the value that it has.
    pub fn effective(&self) -> Vec<(&'static str, String)> {
        let optional = |duration: &Option<Duration>| match duration {
            Some(duration) => duration_text(duration),
            None => "off".to_owned(),
        };
        let or_auto = |number: Option<NonZeroUsize>| match number {
            Some(number) => number.to_string(),
            None => "auto".to_owned(),
        };
        let or_none = |number: Option<NonZeroU64>| match number {
            Some(number) => number.to_string(),
            None => "none".to_owned(),
        };
        let or_word = |text: Option<String>, word: &str| text.unwrap_or_else(|| word.to_owned());
        vec![
            (AEGIS_LISTEN.name, list_text(&self.listen)),
            (AEGIS_ADMIN.name, self.admin.to_string()),
            (AEGIS_BACKENDS.name, list_text(&self.backends)),
            (AEGIS_DNS_REFRESH.name, duration_text(&self.dns_refresh)),
            (AEGIS_DISCOVERY.name, self.discovery.to_string()),
            (
                AEGIS_KUBE_SERVICE.name,
                or_word(self.kube.service.as_ref().map(ToString::to_string), "none"),
            ),
            (AEGIS_KUBE_SELECTOR.name, or_word(self.kube.selector.clone(), "none")),
            (AEGIS_KUBE_NAMESPACE.name, or_word(self.kube.namespace.clone(), "auto")),
            (
                AEGIS_KUBE_PORT.name,
                or_word(self.kube.port.as_ref().map(ToString::to_string), "auto"),
            ),
            (AEGIS_KUBE_STORES.name, or_auto(self.kube.stores)),
            (AEGIS_KUBE_WATCH_TIMEOUT.name, duration_text(&self.kube.watch_timeout)),
            (
                AEGIS_KUBE_SNAPSHOT.name,
                or_word(self.kube.snapshot.as_ref().map(|p| p.display().to_string()), "none"),
            ),
            (AEGIS_KUBE_SNAPSHOT_MAX_AGE.name, duration_text(&self.kube.snapshot_age_max)),
            (AEGIS_START_TIMEOUT.name, duration_text(&self.start_timeout)),
            (AEGIS_LOCALITY.name, self.locality.to_string()),
            (AEGIS_NODE_NAME.name, or_word(self.node_name.clone(), "none")),
            (AEGIS_ZONE.name, or_word(self.zone.clone(), "none")),
            (AEGIS_BACKEND_DRAIN.name, optional(&self.backend_drain)),
            (AEGIS_SLOW_START.name, optional(&self.slow_start)),
            (AEGIS_ENDPOINT_WAIT.name, duration_text(&self.endpoint_wait)),
            (AEGIS_BALANCE.name, self.balance.to_string()),
            (AEGIS_WORKERS.name, or_auto(self.workers)),
            (AEGIS_PIN.name, self.pin.to_string()),
            (AEGIS_CPU_REQUEST.name, or_none(self.resources.cpu_request_milli)),
            (AEGIS_CPU_LIMIT.name, or_none(self.resources.cpu_limit_milli)),
            (AEGIS_MEMORY_REQUEST.name, or_none(self.resources.memory_request_bytes)),
            (AEGIS_MEMORY_LIMIT.name, or_none(self.resources.memory_limit_bytes)),
            (AEGIS_IO.name, self.io.to_string()),
            (AEGIS_MAX_SESSIONS.name, or_auto(self.max_sessions)),
            (AEGIS_PROTOCOL.name, self.protocol.to_string()),
            (AEGIS_POOL_MODE.name, self.pool.mode.to_string()),
            (AEGIS_POOL_SIZE.name, self.pool.size.to_string()),
            (AEGIS_POOL_MIN_IDLE.name, self.pool.min_idle.to_string()),
            (AEGIS_POOL_MAX_IDLE.name, self.pool.max_idle.to_string()),
            (AEGIS_POOL_IDLE_TIMEOUT.name, optional(&self.pool.idle_timeout)),
            (AEGIS_POOL_MAX_LIFETIME.name, optional(&self.pool.max_lifetime)),
            (AEGIS_QUEUE_MAX.name, self.requests.queue_max.to_string()),
            (AEGIS_QUEUE_TIMEOUT.name, duration_text(&self.requests.queue_timeout)),
            (AEGIS_REQUEST_TIMEOUT.name, optional(&self.requests.timeout)),
            (AEGIS_ROUTE.name, self.requests.route.to_string()),
            (AEGIS_LINE_MAX.name, self.requests.line_max.to_string()),
            (
                AEGIS_REPEAT_WRITES.name,
                if self.requests.repeat_writes { "on" } else { "off" }.to_owned(),
            ),
            (AEGIS_CONNECT_TIMEOUT.name, duration_text(&self.connect_timeout)),
            (AEGIS_CONNECT_ATTEMPTS.name, self.connect_attempts.to_string()),
            (AEGIS_IDLE_TIMEOUT.name, optional(&self.idle_timeout)),
            (AEGIS_HALF_CLOSE_TIMEOUT.name, optional(&self.half_close_timeout)),
            (AEGIS_TCP_USER_TIMEOUT.name, optional(&self.tcp_user_timeout)),
            (AEGIS_KEEPALIVE.name, optional(&self.keepalive)),
            (AEGIS_PROXY_PROTOCOL.name, self.proxy_protocol.to_string()),
            (AEGIS_DRAIN_DELAY.name, duration_text(&self.drain_delay)),
            (AEGIS_DRAIN_TIMEOUT.name, duration_text(&self.drain_timeout)),
            (AEGIS_EJECT_FAILURES.name, self.eject_failures.to_string()),
            (AEGIS_EJECT_TIME.name, duration_text(&self.eject_time)),
            (AEGIS_LOG.name, self.log.clone()),
            (AEGIS_LOG_FORMAT.name, self.log_format.to_string()),
        ]
    }

    /// How many addresses the backends may come to stand for, for what is reserved for them.
    pub fn addresses(&self) -> usize {
        let names = self.names();
        self.backends.len() - names + names * limits::ADDRESSES_PER_NAME
    }

    /// How many of the backends are names.
    pub fn names(&self) -> usize {
        self.backends.iter().filter(|backend| backend.host.parse::<IpAddr>().is_err()).count()
    }
}

/// Where endpoints come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discovery {
    /// The backends, which are all addresses.
    Static,
    /// The backends, names among them resolved again and again.
    Dns,
    /// The Kubernetes API.
    Kubernetes,
}

/// Which endpoints are preferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locality {
    /// None.
    Off,
    /// Those of the same zone.
    Zone,
    /// Those of the same node.
    Node,
}

/// What of Kubernetes the endpoints are: one of service and selector where it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubeConfig {
    /// The Service whose endpoints they are.
    pub service: Option<ServiceName>,
    /// A label selector of Pods.
    pub selector: Option<String>,
    /// The namespace of either; `None` is the program's own.
    pub namespace: Option<String>,
    /// The port; `None` is the only one there is.
    pub port: Option<KubePort>,
    /// How many stores share the keys; `None` is as many as their `StatefulSet` has replicas.
    pub stores: Option<NonZeroUsize>,
    /// How long one watch lasts at most, in whole seconds.
    pub watch_timeout: Duration,
    /// The file that keeps the last endpoints.
    pub snapshot: Option<PathBuf>,
    /// Endpoints of that file that were not confirmed for longer are not used.
    pub snapshot_age_max: Duration,
}

/// A Service's name, and its namespace if it was given with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceName {
    /// The Service's name.
    pub name: String,
    /// Its namespace.
    pub namespace: Option<String>,
}

/// A port by its name or number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KubePort {
    /// Its name in the slices, or in the containers.
    Name(String),
    /// Its number at the endpoints.
    Number(u16),
}

/// A host (name or IP address) and a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// A DNS name or an IP address (IPv6 without brackets).
    pub host: String,
    /// The TCP port, never 0.
    pub port: u16,
}

/// For how long a client has a backend connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolMode {
    /// A new one for its whole session: right for any protocol.
    Preconnect,
    /// From its first request until it leaves.
    Session,
    /// For one request at a time.
    Request,
}

/// Where a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// To any endpoint, by [`Balance`].
    Balance,
    /// To the one that holds its key (rendezvous hashing).
    Key,
}

/// What holds for requests, where used connections are lent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestConfig {
    /// Requests of one worker that may wait for a connection.
    pub queue_max: usize,
    /// How long each may.
    pub queue_timeout: Duration,
    /// How long a backend may take to answer.
    pub timeout: Option<Duration>,
    /// Where they go.
    pub route: Route,
    /// The longest line of Chronos, in bytes.
    pub line_max: usize,
    /// Whether writes are sent again when their reply was lost.
    pub repeat_writes: bool,
}

/// What the container was given, as far as the downward API tells.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resources {
    /// The CPU request, in thousandths of a CPU.
    pub cpu_request_milli: Option<NonZeroU64>,
    /// The CPU limit, in thousandths of a CPU; what the node has where there is none.
    pub cpu_limit_milli: Option<NonZeroU64>,
    /// The memory request, in bytes.
    pub memory_request_bytes: Option<NonZeroU64>,
    /// The memory limit, in bytes; what the node has where there is none.
    pub memory_limit_bytes: Option<NonZeroU64>,
}

/// Bounds of a pool, each per endpoint: the minimum is kept by all workers together, and the others
/// hold for each worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// For how long a client has a connection.
    pub mode: PoolMode,
    /// Connections at most, idle or lent, where they are lent for a request.
    pub size: usize,
    /// Warm connections kept at least.
    pub min_idle: usize,
    /// Warm connections kept at most, unless each is lent for a request; 0 makes none in advance.
    pub max_idle: usize,
    /// Connections above the minimum that were idle for this long are closed.
    pub idle_timeout: Option<Duration>,
    /// Connections older than this are replaced.
    pub max_lifetime: Option<Duration>,
}

impl PoolConfig {
    /// Idle connections at most.
    pub fn most(&self) -> usize {
        match self.mode {
            PoolMode::Preconnect => self.max_idle,
            PoolMode::Session => self.max_idle.max(1),
            PoolMode::Request => self.size,
        }
    }
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
