//! What the tests of the control plane share.

use std::future::Future;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::{DriverInfo, View, WorkerHandle};
use crate::config::{
    Balance, Config, Discovery, HostPort, IoChoice, KubeConfig, Locality, LogFormat, PoolConfig,
    PoolMode, Protocol, ProxyProtocol, RequestConfig, Resources, Route, Switch,
};
use crate::metrics::WorkerState;
use crate::proxy::endpoints::{Endpoint, EndpointSnapshot};
use crate::worker::mailbox::Mailbox;

pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

pub(super) fn config() -> Config {
    Config {
        listen: vec!["127.0.0.1:8081".parse().unwrap()],
        admin: "127.0.0.1:0".parse().unwrap(),
        backends: vec![HostPort { host: "10.0.0.1".to_owned(), port: 5432 }],
        dns_refresh: Duration::from_secs(30),
        discovery: Discovery::Static,
        kube: KubeConfig {
            service: None,
            selector: None,
            namespace: None,
            port: None,
            stores: None,
            watch_timeout: Duration::from_secs(60),
            snapshot: None,
            snapshot_age_max: Duration::from_secs(3600),
        },
        start_timeout: Duration::from_secs(5),
        locality: Locality::Off,
        node_name: None,
        zone: None,
        backend_drain: None,
        slow_start: None,
        endpoint_wait: Duration::ZERO,
        workers: None,
        pin: Switch::Auto,
        resources: Resources::default(),
        io: IoChoice::Auto,
        balance: Balance::LeastConn,
        protocol: Protocol::Tcp,
        pool: PoolConfig {
            mode: PoolMode::Preconnect,
            size: 16,
            min_idle: 0,
            max_idle: 0,
            idle_timeout: None,
            max_lifetime: None,
        },
        requests: RequestConfig {
            queue_max: 0,
            queue_timeout: Duration::from_secs(1),
            timeout: None,
            route: Route::Balance,
            line_max: 512,
            repeat_writes: false,
        },
        max_sessions: None,
        connect_timeout: Duration::from_secs(1),
        connect_attempts: 3,
        idle_timeout: None,
        half_close_timeout: None,
        tcp_user_timeout: None,
        keepalive: None,
        proxy_protocol: ProxyProtocol::Off,
        drain_delay: Duration::ZERO,
        drain_timeout: Duration::from_secs(3600),
        eject_failures: 5,
        eject_time: Duration::from_secs(10),
        log: "info".to_owned(),
        log_format: LogFormat::Text,
    }
}

/// Workers as they are before their first turn.
pub(super) fn workers(count: usize) -> Vec<WorkerHandle> {
    let worker =
        || WorkerHandle { mailbox: Arc::new(Mailbox::new().unwrap()), stats: Arc::default() };
    (0..count).map(|_| worker()).collect()
}

pub(super) fn driver() -> DriverInfo {
    DriverInfo { driver: "epoll", reason: "io_uring: \"EPERM\"".to_owned(), kernel: "6.1".into() }
}

/// A view of two running workers that have applied `endpoints`.
pub(super) fn view(config: Config, endpoints: Vec<Arc<Endpoint>>) -> View {
    view_started(Instant::now(), config, endpoints)
}

/// The same, in a process that started at `started`.
pub(super) fn view_started(
    started: Instant,
    config: Config,
    endpoints: Vec<Arc<Endpoint>>,
) -> View {
    let workers = workers(2);
    for worker in &workers {
        worker.stats.set_state(WorkerState::Running);
        worker.stats.applied_generation.set(1);
    }
    let snapshot =
        Arc::new(EndpointSnapshot { generation: 1, endpoints, ..EndpointSnapshot::default() });
    let (_, snapshots) = watch::channel(snapshot);
    View::new(Arc::new(config), started, workers, driver(), 1000, snapshots, Arc::default())
}

pub(super) fn endpoint(name: &str, address: &str) -> Arc<Endpoint> {
    Endpoint::new(name, address.parse().unwrap(), 2)
}

/// One HTTP exchange: the head of the response, and its body.
pub(super) fn http(address: SocketAddr, method: &str, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: aegis\r\n\r\n").unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    if head.contains("transfer-encoding: chunked") {
        return (head.to_owned(), dechunked(body));
    }
    (head.to_owned(), body.to_owned())
}

fn dechunked(mut chunks: &str) -> String {
    let mut body = String::new();
    while let Some((len, rest)) = chunks.split_once("\r\n") {
        let (chunk, rest) = rest.split_at(usize::from_str_radix(len, 16).unwrap());
        body += chunk;
        chunks = rest.strip_prefix("\r\n").unwrap();
    }
    body
}
