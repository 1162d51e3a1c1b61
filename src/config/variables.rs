//! The table of variables. The help, the defaults, the messages and the print of what is in force
//! are all made from it.

use serde::Deserialize;

use crate::protocol::ProtocolName;

/// What all names of variables start with.
pub const PREFIX: &str = "AEGIS_";

/// One variable of the environment.
#[derive(Debug)]
pub struct Variable {
    /// Its name, `AEGIS_…`.
    pub name: &'static str,
    /// The text that stands for it where it is not set.
    pub default: &'static str,
    /// Which values are accepted, with their unit.
    pub accepts: &'static str,
    /// What it does.
    pub what: &'static str,
    pub(super) raw: fn(&RawConfig) -> Option<&str>,
}

/// Declares the variables: constant and name, field of [`RawConfig`], default, accepted, purpose.
macro_rules! variables {
    ($($name:ident $field:ident = $default:literal, $accepts:expr, $what:literal;)+) => {
        /// The environment as found: the text of each variable, without the prefix `AEGIS_`.
        #[derive(Debug, Default, Deserialize)]
        pub struct RawConfig {
            $(#[doc = concat!("The text of `", stringify!($name), "`.")] pub $field: Option<String>,)+
        }

        $(pub(super) const $name: Variable = Variable {
            name: stringify!($name),
            default: $default,
            accepts: $accepts,
            what: $what,
            raw: |raw| raw.$field.as_deref(),
        };)+

        /// Every variable, in the order in which people read about them.
        pub const VARIABLES: &[Variable] = &[$($name,)+];
    };
}

variables! {
    AEGIS_LISTEN listen = "127.0.0.1:8081,[::1]:8081",
        "1 to 16 of IP:PORT, comma-separated; port 0 picks a free one",
        "Where clients connect. Address families that the host lacks are skipped.";
    AEGIS_ADMIN admin = "[::]:8082",
        "IP:PORT; port 0 picks a free one",
        "Where metrics and the probes answer.";
    AEGIS_BACKENDS backends = "127.0.0.1:8080",
        "1 to 1024 of HOST:PORT, comma-separated; IPv6 addresses in brackets",
        "Where connections go. A name stands for all the addresses it resolves to.";
    AEGIS_DNS_REFRESH dns_refresh = "5s",
        "a duration from 100ms to 1h",
        "How often names are resolved again; where their TTL is longer, after that, 30s at most.";
    AEGIS_DISCOVERY discovery = "auto",
        "auto, static, dns or kubernetes",
        "Where endpoints come from. auto: Kubernetes if it is named, else backends.";
    AEGIS_KUBE_SERVICE kube_service = "none",
        "none, NAME or NAME.NAMESPACE",
        "The Kubernetes Service whose EndpointSlices name the endpoints.";
    AEGIS_KUBE_SELECTOR kube_selector = "none",
        "none, or a label selector such as app=chronos",
        "The Kubernetes Pods that are the endpoints, in place of a Service.";
    AEGIS_KUBE_NAMESPACE kube_namespace = "auto",
        "auto, or a namespace",
        "Where the Service or the Pods are. auto: the pod's own namespace, or the kubeconfig's.";
    AEGIS_KUBE_PORT kube_port = "auto",
        "auto, a port's name, or a number from 1 to 65535",
        "The endpoints' port. auto: the only TCP port there is.";
    AEGIS_KUBE_STORES kube_stores = "auto",
        "auto, or a number from 1 to 1024",
        "Stores that AEGIS_ROUTE=key shares the keys among. auto: their StatefulSet's replicas.";
    AEGIS_KUBE_WATCH_TIMEOUT kube_watch_timeout = "5m",
        "a duration of whole seconds from 1s to 5m",
        "How long one watch lasts at most; a connection gone silent is given up 5s after that.";
    AEGIS_KUBE_SNAPSHOT kube_snapshot = "none",
        "none, or an absolute path",
        "A file of the last endpoints, for a start while the Kubernetes API does not answer.";
    AEGIS_KUBE_SNAPSHOT_MAX_AGE kube_snapshot_max_age = "1h",
        "a duration from 1s to 30d",
        "Endpoints that the API has not confirmed for longer are not taken from that file.";
    AEGIS_START_TIMEOUT start_timeout = "5s",
        "a duration from 0s to 5m",
        "How long a start waits for an API or name server out of reach; wrong settings hold it forever.";
    AEGIS_LOCALITY locality = "off",
        "off, zone or node",
        "Prefers endpoints of the same zone or node. Needs Kubernetes, and the next two.";
    AEGIS_NODE_NAME node_name = "none",
        "none, or a node's name",
        "The node that this runs on, from the downward API.";
    AEGIS_ZONE zone = "none",
        "none, or a zone's name",
        "The zone that this runs in, from the downward API.";
    AEGIS_BACKEND_DRAIN backend_drain = "off",
        "off, or a duration from 0s to 1d",
        "Ends sessions on an endpoint this long after it left. off: they end by themselves.";
    AEGIS_SLOW_START slow_start = "5s",
        "off, or a duration from 100ms to 10m",
        "An endpoint that joins others gets its full share of sessions only after this time.";
    AEGIS_ENDPOINT_WAIT endpoint_wait = "5s",
        "a duration from 0s to 5m",
        "How long a new session or a request waits for an endpoint while there is none at all.";
    AEGIS_BALANCE balance = "least_conn",
        "least_conn, round_robin, random_two or source_hash",
        "How the endpoint of a new session is chosen.";
    AEGIS_WORKERS workers = "auto",
        "auto (or 0), or a number from 1 to 256",
        "Worker threads. auto: by AEGIS_CPU_REQUEST, else by the CPU quota, else 4 at most.";
    AEGIS_PIN pin = "auto",
        "auto, on or off",
        "Whether workers are pinned to cores. auto: where the next four prove them to be its own.";
    // What the downward API says. Where there is no request, it says 0; without a limit it says what
    // the node has.
    AEGIS_CPU_REQUEST cpu_request = "none",
        "none (or 0), or a number of thousandths of a CPU",
        "The container's CPU request, from the downward API with the divisor 1m.";
    AEGIS_CPU_LIMIT cpu_limit = "none",
        "none (or 0), or a number of thousandths of a CPU",
        "The container's CPU limit, from the downward API with the divisor 1m.";
    AEGIS_MEMORY_REQUEST memory_request = "none",
        "none (or 0), or a number of bytes",
        "The container's memory request, from the downward API.";
    AEGIS_MEMORY_LIMIT memory_limit = "none",
        "none (or 0), or a number of bytes",
        "The container's memory limit, from the downward API.";
    AEGIS_IO io = "auto",
        "auto, uring or epoll",
        "What drives the sockets. auto: io_uring where it works, else epoll.";
    AEGIS_MAX_SESSIONS max_sessions = "auto",
        "auto, or a number from 1 to 1000000",
        "Sessions at a time in the whole process. auto: what RLIMIT_NOFILE allows, 10000 at most.";
    AEGIS_PROTOCOL protocol = "tcp",
        ProtocolName::WORDS,
        "What clients and backends speak. tcp: anything, passed on as it is.";
    AEGIS_POOL_MODE pool_mode = "preconnect",
        "preconnect, session or request; tcp allows preconnect only",
        "How long a client has a backend connection: its own, its for now, or for a request.";
    AEGIS_POOL_SIZE pool_size = "16",
        "a number from 1 to 4096",
        "Connections at most, per worker and endpoint, where each is lent for a request.";
    AEGIS_POOL_MIN_IDLE pool_min_idle = "4",
        "a number from 0 to 4096, not above what AEGIS_POOL_MAX_IDLE allows all workers",
        "Warm connections kept at least, per endpoint, by all workers together.";
    AEGIS_POOL_MAX_IDLE pool_max_idle = "64",
        "a number from 0 to 4096",
        "Warm connections kept at most, per worker and endpoint. 0 makes none in advance.";
    AEGIS_POOL_IDLE_TIMEOUT pool_idle_timeout = "60s",
        "off, or a duration from 10ms to 30d",
        "Closes warm connections above the minimum that were idle for this long.";
    AEGIS_POOL_MAX_LIFETIME pool_max_lifetime = "15m",
        "off, or a duration from 10ms to 30d",
        "Replaces warm connections that are older than this.";
    AEGIS_QUEUE_MAX queue_max = "8192",
        "a number from 0 to 1000000",
        "Requests of one worker that wait for a backend connection; further ones get an error.";
    AEGIS_QUEUE_TIMEOUT queue_timeout = "5s",
        "a duration from 10ms to 1h",
        "How long a request waits for a backend connection before it gets an error.";
    AEGIS_REQUEST_TIMEOUT request_timeout = "30s",
        "off, or a duration from 10ms to 1d",
        "How long a backend may pause: before its answer, within it, or while it is sent a request.";
    AEGIS_ROUTE route = "balance",
        "balance, or key (of chronos, where a connection is lent for a request)",
        "Where a request goes: to any endpoint, or to the store that holds its key.";
    AEGIS_LINE_MAX line_max = "512",
        "a number of bytes from 16 to 16384",
        "Longest request line of chronos, its line feed included: as much as the server reads.";
    AEGIS_REPEAT_WRITES repeat_writes = "off",
        "on or off",
        "Sends a SET or DEL again when its reply was lost, though others may have written since.";
    AEGIS_CONNECT_TIMEOUT connect_timeout = "1s",
        "a duration from 1ms to 5m",
        "How long one attempt to connect to an endpoint may take.";
    AEGIS_CONNECT_ATTEMPTS connect_attempts = "3",
        "a number from 1 to 8",
        "How many endpoints are tried for a session before it is given up.";
    AEGIS_IDLE_TIMEOUT idle_timeout = "off",
        "off, or a duration from 10ms to 30d",
        "Ends sessions on which no byte moved for this long.";
    AEGIS_HALF_CLOSE_TIMEOUT half_close_timeout = "60s",
        "off, or a duration from 10ms to 30d",
        "Ends sessions with one direction ended on which no byte moved for this long.";
    AEGIS_TCP_USER_TIMEOUT tcp_user_timeout = "5s",
        "off, or a duration from 1s to 1d",
        "Gives up connections whose peer acknowledges nothing for this long; slow ones acknowledge.";
    AEGIS_KEEPALIVE keepalive = "60s",
        "off, or a duration from 1s to 9h",
        "TCP keep-alive probes start after this idle time.";
    AEGIS_PROXY_PROTOCOL proxy_protocol = "off",
        "off, v1 or v2",
        "The PROXY protocol header sent to backends.";
    // Native sidecars stop after the application, often with about two seconds left: the delay has
    // to fit there, and delay and timeout together within the usual grace period of 30 seconds.
    AEGIS_DRAIN_DELAY drain_delay = "1s",
        "a duration from 0s to 5m",
        "How long to go on accepting after SIGTERM, while clients notice.";
    AEGIS_DRAIN_TIMEOUT drain_timeout = "25s",
        "a duration from 0s to 1h",
        "How long sessions may take to finish after that.";
    AEGIS_EJECT_FAILURES eject_failures = "3",
        "a number from 1 to 1000",
        "Failures in a row that take an endpoint out of use for a while.";
    AEGIS_EJECT_TIME eject_time = "1s",
        "a duration from 10ms to 1h",
        "How long it stays out the first time. Doubles with each further one, up to a cap.";
    AEGIS_LOG log = "info",
        "off, error, warn, info, debug, trace, or directives such as info,aegis::io=debug",
        "What is logged.";
    AEGIS_LOG_FORMAT log_format = "text",
        "text or json",
        "How it is logged: lines for people, or one JSON object a line.";
}
