//! The table of variables: one row for each, which is its field as well. Parsing, the help, what is
//! in force, the messages and the reference page are all made from it.

use std::net::SocketAddr;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::kind::{
    Kind, List, Place, Text, auto_or_words, days, describe, durations, hours, minutes, ms, noted,
    numbers, numbers_of, or, seconds, text, whole_seconds, word_or, word_or_zero_or, words,
};
use super::read::Reader;
use super::routes::RouteName;
use super::value::{
    absolute_path, check_path, control_address, dns_label, list, listen_addresses, log_filter,
    selector, socket_address,
};
use super::variable::{Row, Section, Variable, settings};
use super::{
    Backend, Balance, Check, Discovery, EndsLogged, IoChoice, KubePort, Locality, LogFormat,
    PoolMode, Preset, Protocol, ProxyProtocol, ServiceName, SocketMode, SocketOwner, Switch,
};
use crate::io::net::Address;
use crate::limits;

settings! {

/// The effective configuration of the process.
pub struct Config {
    /// The routes, at least one, each with what is its own.
    routes: Vec<Arc<RouteConfig>>;
    => "Workers and resources"
    // The downward API says 0 where the container has no request.
    workers: Option<NonZeroUsize> = AEGIS_WORKERS("auto")
        in word_or_zero_or("auto", numbers(1..=limits::WORKERS_MAX)),
        "Worker threads. auto: by AEGIS_CPU_REQUEST, else by the CPU quota, else 4 at most.";
    pin: Switch = AEGIS_PIN("auto") in words(),
        "Whether workers are pinned to cores. auto: where the next four show that these are its own.";
    /// What the container was given.
    resources: Resources;
    io: IoChoice = AEGIS_IO("auto") in words(),
        "What drives the sockets. auto: io_uring where it works, else epoll.";
    max_sessions: Option<NonZeroUsize> = AEGIS_MAX_SESSIONS("auto")
        in word_or("auto", numbers(1..=limits::SESSIONS_MAX)),
        "Sessions at a time in the whole process. auto: what RLIMIT_NOFILE allows, 10000 at most.";
    => "Node, zone and region"
    node_name: Option<String> = AEGIS_NODE_NAME("none") in Place("a node's name"),
        "The node that this runs on, from the downward API.";
    zone: Option<String> = AEGIS_ZONE("none") in Place("a zone's name"),
        "The zone that this runs in, from the downward API.";
    region: Option<String> = AEGIS_REGION("none") in Place("a region's name"),
        "The region that this runs in, from the downward API.";
    => "Start and shutdown"
    start_timeout: Duration = AEGIS_START_TIMEOUT("5s") in durations(seconds(0)..=minutes(5)),
        "How long a start waits for an API or name server out of reach; wrong settings hold it forever.";
    // Native sidecars stop after the application, often with about two seconds left: the delay has
    // to fit there, and delay and timeout together within the usual grace period of 30 seconds.
    drain_delay: Duration = AEGIS_DRAIN_DELAY("1s") in durations(seconds(0)..=minutes(5)),
        "How long to go on accepting after SIGTERM, while clients notice.";
    drain_timeout: Duration = AEGIS_DRAIN_TIMEOUT("25s") in durations(seconds(0)..=hours(1)),
        "How long sessions may take to finish after that.";
    => "The admin port"
    admin: SocketAddr = AEGIS_ADMIN("[::]:8082")
        in text("IP:PORT; port 0 picks a free one", socket_address),
        "Where metrics and the probes answer.";
    => "The control socket"
    control: Option<Address> = AEGIS_CONTROL("off") in or("off", text("unix:/PATH", control_address)),
        "Where drain, log-level and tap are asked for, by this process's user or root. off: nowhere.";
    => "The log"
    log: String = AEGIS_LOG("info") in text(
        "off, error, warn, info, debug, trace, or directives such as info,aegis::io=debug",
        log_filter,
    ),
        "What is logged.";
    log_format: LogFormat = AEGIS_LOG_FORMAT("text") in words(),
        "How it is logged: lines for people, or one JSON object a line.";
}

/// What is a route's own: where its clients connect, where they are sent, and how.
pub struct RouteConfig {
    /// What it is called.
    name: RouteName;
    => "Addresses"
    listen: Vec<Address> = AEGIS_LISTEN("127.0.0.1:8081,[::1]:8081") in List {
        of: "IP:PORT or unix:/PATH",
        count_max: limits::LISTEN_ADDRESSES_MAX,
        note: "port 0 picks a free one",
        parse: listen_addresses,
    },
        "Where clients connect. Address families that the host lacks are skipped.";
    socket_mode: SocketMode = AEGIS_SOCKET_MODE("0660")
        in text("an octal number up to 0777", str::parse),
        "Who may connect to Unix sockets of AEGIS_LISTEN, as the mode of their files.";
    socket_owner: Option<SocketOwner> = AEGIS_SOCKET_OWNER("none")
        in or("none", text("UID, UID:GID or :GID in numbers", str::parse)),
        "Owner of those files. none: the proxy's own user, and its group or that of the directory.";
    backends: Vec<Backend> = AEGIS_BACKENDS("127.0.0.1:8080") in List {
        of: "HOST:PORT or unix:/PATH",
        count_max: limits::ENDPOINTS_MAX,
        note: "IPv6 addresses in brackets",
        parse: |text, max| list(text, max, str::parse),
    },
        "Where connections go. A name stands for all the addresses it resolves to.";
    backups: Option<Vec<Backend>> = AEGIS_BACKUPS("none") in or("none", List {
        of: "HOST:PORT or unix:/PATH",
        count_max: limits::ENDPOINTS_MAX,
        note: "none of AEGIS_BACKENDS",
        parse: |text, max| list(text, max, str::parse),
    }),
        "Where connections go while none of AEGIS_BACKENDS is usable.";
    dns_refresh: Duration = AEGIS_DNS_REFRESH("5s") in durations(ms(100)..=hours(1)),
        "How often names are resolved again; where their TTL is longer, after that, 30s at most.";
    discovery: Discovery = AEGIS_DISCOVERY("auto") in auto_or_words(Discovery::Static),
        "Where endpoints come from. auto: Kubernetes if it is named, else backends.";
    => "Kubernetes"
    /// What of Kubernetes the endpoints are.
    kube: KubeConfig;
    => "Endpoints"
    locality: Locality = AEGIS_LOCALITY("off") in words(),
        "Prefers endpoints of the same zone or node; failover: strictly zone, then region, then others.";
    failback_time: Duration = AEGIS_FAILBACK_TIME("10s") in durations(seconds(0)..=hours(1)),
        "How long endpoints that others stand in for have to be usable again before they are used.";
    backend_drain: Option<Duration> = AEGIS_BACKEND_DRAIN("off")
        in or("off", durations(seconds(0)..=days(1))),
        "Ends sessions on an endpoint this long after it left. off: they end by themselves.";
    slow_start: Option<Duration> = AEGIS_SLOW_START("5s")
        in or("off", durations(ms(100)..=minutes(10))),
        "An endpoint that joins others gets its full share of sessions only after this time.";
    endpoint_wait: Duration = AEGIS_ENDPOINT_WAIT("5s") in durations(seconds(0)..=minutes(5)),
        "How long clients wait while no endpoint is usable, or with key_hash the store of a request.";
    balance: Balance = AEGIS_BALANCE("least_conn") in words(),
        "How an endpoint is chosen. key_hash: for each request of chronos the store that holds its key.";
    => "Pools"
    protocol: Protocol = AEGIS_PROTOCOL("tcp") in words(),
        "What clients and backends speak. tcp: anything, passed on as it is.";
    preset: Preset = AEGIS_PRESET("none") in words(),
        "Defaults that suit a kind of server. postgres: cancel requests also go to every endpoint.";
    /// The pools of backend connections.
    pool: PoolConfig;
    => "Requests"
    /// What holds for requests, where clients share used connections.
    requests: RequestConfig;
    => "Connections"
    connect_timeout: Duration = AEGIS_CONNECT_TIMEOUT("1s") in durations(ms(1)..=minutes(5)),
        "How long one attempt to connect to an endpoint may take.";
    connect_attempts: u32 = AEGIS_CONNECT_ATTEMPTS("3") in numbers(1..=8),
        "How many endpoints are tried for a session at once, before it waits or is given up.";
    retry_budget: Option<u32> = AEGIS_RETRY_BUDGET("20")
        in or("off", numbers_of(" of percent", 0..=1000)),
        "Retries per 100 sessions or requests at most, and ten per second besides. off: any number.";
    idle_timeout: Option<Duration> = AEGIS_IDLE_TIMEOUT("off")
        in or("off", durations(ms(10)..=days(30))),
        "Ends sessions on which no byte moved for this long.";
    half_close_timeout: Option<Duration> = AEGIS_HALF_CLOSE_TIMEOUT("60s")
        in or("off", durations(ms(10)..=days(30))),
        "Ends sessions with one direction ended on which no byte moved for this long.";
    tcp_user_timeout: Option<Duration> = AEGIS_TCP_USER_TIMEOUT("5s")
        in or("off", durations(seconds(1)..=days(1))),
        "Gives up connections whose peer acknowledges nothing for this long; a slow peer acknowledges.";
    // The kernel takes whole seconds, at most 32767.
    keepalive: Option<Duration> = AEGIS_KEEPALIVE("60s")
        in or("off", durations(seconds(1)..=hours(9))),
        "TCP keep-alive probes start after this idle time.";
    proxy_protocol: ProxyProtocol = AEGIS_PROXY_PROTOCOL("off") in words(),
        "The PROXY protocol header sent to backends.";
    log_ends: EndsLogged = AEGIS_LOG_ENDS("abnormal") in words(),
        "Which ends of sessions and requests are logged; sampled adds one of 100 normal ones.";
    => "Failing endpoints"
    eject_failures: u32 = AEGIS_EJECT_FAILURES("3") in numbers(1..=1000),
        "Failures in a row that take an endpoint out of use for a while.";
    eject_time: Duration = AEGIS_EJECT_TIME("1s") in durations(ms(10)..=hours(1)),
        "How long it stays out the first time. Doubles with each further one, up to a cap.";
    check_interval: Option<Duration> = AEGIS_CHECK_INTERVAL("off")
        in or("off", durations(ms(100)..=hours(1))),
        "How often an endpoint is checked, once for all workers. off: only clients' connections tell.";
    check: Check = AEGIS_CHECK("connect") in words(),
        "What a check is: a connect, or a request that any server of AEGIS_PROTOCOL answers at once.";
    check_path: String = AEGIS_CHECK_PATH("/") in text("a path such as /healthz", check_path),
        "What a check by request asks a server of http1 for; a status of 2xx or 3xx passes.";
    check_fall: u32 = AEGIS_CHECK_FALL("3") in numbers(1..=1000),
        "Checks in a row that have to fail until an endpoint is out of use.";
    check_rise: u32 = AEGIS_CHECK_RISE("2") in numbers(1..=1000),
        "Checks in a row that have to pass until it is in use again.";
    slow_first_byte: Option<Duration> = AEGIS_SLOW_FIRST_BYTE("1s")
        in or("off", durations(ms(1)..=hours(1))),
        "Mean time to a first byte from which a backend is slow. off: only what is slower than usual.";
}

/// What of Kubernetes the endpoints are: one of service and selector where it is used.
pub struct KubeConfig {
    service: Option<ServiceName> = AEGIS_KUBE_SERVICE("none")
        in or("none", text("NAME or NAME.NAMESPACE", str::parse)),
        "The Kubernetes Service whose EndpointSlices name the endpoints.";
    selector: Option<String> = AEGIS_KUBE_SELECTOR("none")
        in or("none", text("a label selector such as app=chronos", selector)),
        "The Kubernetes Pods that are the endpoints, in place of a Service.";
    namespace: Option<String> = AEGIS_KUBE_NAMESPACE("auto")
        in or("auto", text("a namespace", dns_label)),
        "Where the Service or the Pods are. auto: the pod's own namespace, or the kubeconfig's.";
    port: Option<KubePort> = AEGIS_KUBE_PORT("auto")
        in or("auto", text("a port's name, or a number from 1 to 65535", str::parse)),
        "The endpoints' port. auto: the only TCP port there is.";
    stores: Option<NonZeroUsize> = AEGIS_KUBE_STORES("auto")
        in word_or("auto", numbers(1..=limits::ENDPOINTS_MAX)),
        "Stores that AEGIS_BALANCE=key_hash shares the keys among. auto: their StatefulSet's replicas.";
    watch_timeout: Duration = AEGIS_KUBE_WATCH_TIMEOUT("5m")
        in whole_seconds(seconds(1)..=minutes(5)),
        "How long one watch lasts at most; a connection gone silent is given up 5s after that.";
    snapshot: Option<PathBuf> = AEGIS_KUBE_SNAPSHOT("none") in or("none", Text {
        accepts: "an absolute path",
        parse: absolute_path,
        print: |path| path.display().to_string(),
    }),
        "A file of the last endpoints, for a start while the Kubernetes API does not answer.";
    snapshot_age_max: Duration = AEGIS_KUBE_SNAPSHOT_MAX_AGE("1h")
        in durations(seconds(1)..=days(30)),
        "Endpoints that the API has not confirmed for longer are not taken from that file.";
}

/// What the container was given, as far as the downward API tells. Where there is no request, it
/// says 0; without a limit it says what the node has.
#[derive(Copy, Default)]
pub struct Resources {
    cpu_request_milli: Option<NonZeroU64> = AEGIS_CPU_REQUEST("none")
        in word_or_zero_or("none", numbers_of(" of thousandths of a CPU", 1..=u64::MAX)),
        "The container's CPU request, from the downward API with the divisor 1m.";
    cpu_limit_milli: Option<NonZeroU64> = AEGIS_CPU_LIMIT("none")
        in word_or_zero_or("none", numbers_of(" of thousandths of a CPU", 1..=u64::MAX)),
        "The container's CPU limit, from the downward API with the divisor 1m.";
    memory_request_bytes: Option<NonZeroU64> = AEGIS_MEMORY_REQUEST("none")
        in word_or_zero_or("none", numbers_of(" of bytes", 1..=u64::MAX)),
        "The container's memory request, from the downward API.";
    memory_limit_bytes: Option<NonZeroU64> = AEGIS_MEMORY_LIMIT("none")
        in word_or_zero_or("none", numbers_of(" of bytes", 1..=u64::MAX)),
        "The container's memory limit, from the downward API.";
}

/// Bounds of the connections to one endpoint, which hold for all workers together.
pub struct PoolConfig {
    mode: PoolMode = AEGIS_POOL_MODE("preconnect")
        in noted(words(), "; tcp allows preconnect only"),
        "What a client has: its own connection, one of a pool until it leaves, or one per request.";
    size: usize = AEGIS_POOL_SIZE("16") in numbers(1..=limits::POOL_IDLE_MAX),
        "Connections of the route to an endpoint at most, where each serves one request at a time.";
    min_idle: usize = AEGIS_POOL_MIN_IDLE("4") in noted(
        numbers(0..=limits::POOL_IDLE_MAX),
        ", not above AEGIS_POOL_MAX_IDLE; of requests, AEGIS_POOL_SIZE",
    ),
        "Warm connections kept at least, per endpoint and route.";
    max_idle: usize = AEGIS_POOL_MAX_IDLE("64") in numbers(0..=limits::POOL_IDLE_MAX),
        "Warm connections kept at most, per endpoint and route. 0 makes none in advance.";
    endpoint_max: Option<usize> = AEGIS_ENDPOINT_MAX("off") in or("off", noted(
        numbers(1..=limits::SESSIONS_MAX),
        ", not below AEGIS_POOL_MIN_IDLE and AEGIS_POOL_SIZE",
    )),
        "All connections of the route to an endpoint at most, in any mode; sessions beyond it wait.";
    idle_timeout: Option<Duration> = AEGIS_POOL_IDLE_TIMEOUT("60s")
        in or("off", durations(ms(10)..=days(30))),
        "Closes warm connections above the minimum that were idle for this long.";
    max_lifetime: Option<Duration> = AEGIS_POOL_MAX_LIFETIME("15m")
        in or("off", durations(ms(10)..=days(30))),
        "Replaces warm connections that are older than this.";
}

/// What holds for requests, where clients share used connections.
pub struct RequestConfig {
    queue_max: usize = AEGIS_QUEUE_MAX("8192") in numbers(0..=limits::SESSIONS_MAX),
        "Requests or sessions of a worker that wait for a connection at most; with key_hash, per store.";
    queue_timeout: Duration = AEGIS_QUEUE_TIMEOUT("5s") in durations(ms(10)..=hours(1)),
        "How long a request or a session waits for a backend connection before an error or a reset.";
    timeout: Option<Duration> = AEGIS_REQUEST_TIMEOUT("30s")
        in or("off", durations(ms(10)..=days(1))),
        "How long a backend may pause: before its answer, within it, or while it is sent a request.";
    line_max: usize = AEGIS_LINE_MAX("512") in numbers_of(" of bytes", 16..=limits::BUFFER_SIZE),
        "Longest request line of chronos, its line feed included: as much as the server reads.";
    repeat_writes: bool = AEGIS_REPEAT_WRITES("off") in words(),
        "Sends a SET or DEL again when its reply was lost, though others may have written since.";
}

}
