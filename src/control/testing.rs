//! What the tests of the control plane share.

use std::future::Future;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::view::Discovered;
use super::{DriverInfo, View, WorkerHandle};
use crate::config::Config;
use crate::metrics::{WorkerState, WorkerStats};
use crate::proxy::RouteId;
use crate::proxy::endpoints::{Endpoint, EndpointSnapshot};
use crate::worker::mailbox::Mailbox;

pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

pub(super) fn config() -> Config {
    let vars = [
        ("AEGIS_LISTEN", "127.0.0.1:8081"),
        ("AEGIS_ADMIN", "127.0.0.1:0"),
        ("AEGIS_BACKENDS", "10.0.0.1:5432"),
        ("AEGIS_DNS_REFRESH", "30s"),
        ("AEGIS_KUBE_WATCH_TIMEOUT", "60s"),
        ("AEGIS_SLOW_START", "off"),
        ("AEGIS_ENDPOINT_WAIT", "0s"),
        ("AEGIS_POOL_MAX_IDLE", "0"),
        ("AEGIS_POOL_IDLE_TIMEOUT", "off"),
        ("AEGIS_POOL_MAX_LIFETIME", "off"),
        ("AEGIS_QUEUE_MAX", "0"),
        ("AEGIS_QUEUE_TIMEOUT", "1s"),
        ("AEGIS_REQUEST_TIMEOUT", "off"),
        ("AEGIS_HALF_CLOSE_TIMEOUT", "off"),
        ("AEGIS_TCP_USER_TIMEOUT", "off"),
        ("AEGIS_KEEPALIVE", "off"),
        ("AEGIS_DRAIN_DELAY", "0s"),
        ("AEGIS_DRAIN_TIMEOUT", "1h"),
        ("AEGIS_EJECT_FAILURES", "5"),
        ("AEGIS_EJECT_TIME", "10s"),
    ];
    Config::from_vars(vars.map(|(name, value)| (name.to_owned(), value.to_owned()))).unwrap()
}

/// Workers of one route as they are before their first turn.
pub(super) fn workers(count: usize) -> Vec<WorkerHandle> {
    workers_of(1, count)
}

/// The same, of so many routes.
pub(super) fn workers_of(routes: usize, count: usize) -> Vec<WorkerHandle> {
    let worker = || WorkerHandle {
        mailbox: Arc::new(Mailbox::new(routes).unwrap()),
        stats: Arc::new(WorkerStats::new(routes)),
        ends: Arc::default(),
    };
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
    view_of_routes(started, config, vec![(1, endpoints)])
}

/// The same, where each route has a generation of endpoints.
pub(super) fn view_of_routes(
    started: Instant,
    config: Config,
    routes: Vec<(u64, Vec<Arc<Endpoint>>)>,
) -> View {
    let workers = workers_of(routes.len(), 2);
    for worker in &workers {
        worker.stats.set_state(WorkerState::Running);
        for ((generation, _), stats) in routes.iter().zip(&worker.stats.routes) {
            stats.applied_generation.set(*generation);
        }
    }
    let discovered = routes.into_iter().enumerate().map(|(at, (generation, endpoints))| {
        let route = RouteId::at(at);
        let snapshot = EndpointSnapshot { route, generation, endpoints, ..Default::default() };
        let (_, snapshot) = watch::channel(Arc::new(snapshot));
        Discovered { snapshot, status: Arc::default() }
    });
    View::new(Arc::new(config), started, workers, driver(), 1000, discovered.collect())
}

pub(super) fn endpoint(name: &str, address: &str) -> Arc<Endpoint> {
    Endpoint::new(name, address.parse().unwrap(), 2)
}

/// One HTTP request: the head of the response, and its body.
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
