//! The admin port: metrics, probes, and what the proxy knows.
//!
//! | path | what |
//! | --- | --- |
//! | `/metrics` | Prometheus text |
//! | `/livez` | 200 while every worker turns |
//! | `/readyz` | 200 while new sessions can be served; else the reasons, one a line |
//! | `/startupz` | 200 once workers run and the first endpoints were applied |
//! | `/backends` | JSON: each endpoint, its state and its pools |
//! | `/config` | JSON: the effective configuration |

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::Semaphore;
use warp::Filter;
use warp::http::{Response, StatusCode, header};

use super::{Shared, metrics};
use crate::limits::ADMIN_CONNECTIONS;
use crate::proxy::endpoints::Endpoint;
use crate::telemetry::{EndpointStats, WorkerState};

/// A worker that has not turned for so long is stuck: an idle one turns twice a second.
const TURN_OVERDUE: Duration = Duration::from_secs(10);
/// Whoever connects has so long to send a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// After a failed accept.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

const INDEX: &str = "/metrics\n/livez\n/readyz\n/startupz\n/backends\n/config\n";

/// The admin port could not be had.
#[derive(Debug, thiserror::Error)]
#[error("AEGIS_ADMIN: cannot listen on {address}: {error}")]
pub struct BindError {
    address: SocketAddr,
    #[source]
    error: io::Error,
}

/// Binds the admin port. The unspecified IPv6 address takes both families, and falls back to IPv4
/// where IPv6 is off.
///
/// # Errors
/// The address is in use or not this host's.
pub fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    let bound = bind_one(address).or_else(|error| {
        let everywhere = address.is_ipv6() && address.ip().is_unspecified();
        if !everywhere || error.kind() == io::ErrorKind::AddrInUse {
            return Err(BindError { address, error });
        }
        let fallback = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
        tracing::info!(%error, %fallback, "no IPv6 here: the admin port is on IPv4 only");
        bind_one(fallback).map_err(|error| BindError { address: fallback, error })
    })?;
    let local = bound.local_addr().unwrap_or(address);
    tracing::info!(address = %local, "admin listening");
    Ok(bound)
}

fn bind_one(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.bind(&address.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}

/// The bound socket, for use by the runtime.
///
/// # Errors
/// What the kernel says.
pub fn listener(listener: TcpListener) -> io::Result<tokio::net::TcpListener> {
    listener.set_nonblocking(true)?;
    tokio::net::TcpListener::from_std(listener)
}

/// Answers on the admin port for ever, to at most [`ADMIN_CONNECTIONS`] connections at a time.
pub async fn serve(listener: tokio::net::TcpListener, shared: Arc<Shared>) {
    let service = TowerToHyperService::new(warp::service(routes(shared)));
    let places = Arc::new(Semaphore::new(ADMIN_CONNECTIONS as usize));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "the admin port cannot accept");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let service = service.clone();
        tokio::spawn(async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            // Whatever the other side did wrong is its own business.
            let _ = connection.await;
            drop(place);
        });
    }
}

type Reply = Response<String>;

fn routes(
    shared: Arc<Shared>,
) -> impl Filter<Extract = (Reply,), Error = Infallible> + Clone + Send + Sync + 'static {
    warp::method().and(warp::path::full()).map(
        move |method: warp::http::Method, path: warp::path::FullPath| {
            if method == warp::http::Method::GET || method == warp::http::Method::HEAD {
                answer(&shared, path.as_str())
            } else {
                text(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n".to_owned())
            }
        },
    )
}

fn answer(shared: &Shared, path: &str) -> Reply {
    match path {
        "/" => text(StatusCode::OK, INDEX.to_owned()),
        "/metrics" => reply(StatusCode::OK, metrics::CONTENT_TYPE, metrics::render(shared)),
        "/livez" => probe(&stuck(shared)),
        "/readyz" => probe(&unready(shared)),
        "/startupz" => probe(&unstarted(shared)),
        "/backends" => json_text(&backends(shared)),
        "/config" => json_text(&config(shared)),
        _ => text(StatusCode::NOT_FOUND, format!("there is no {path}; there are\n{INDEX}")),
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Reply {
    let mut reply = Response::new(body);
    *reply.status_mut() = status;
    let content_type = header::HeaderValue::from_static(content_type);
    reply.headers_mut().insert(header::CONTENT_TYPE, content_type);
    reply
}

fn text(status: StatusCode, body: String) -> Reply {
    reply(status, "text/plain; charset=utf-8", body)
}

fn json_text(value: &Value) -> Reply {
    reply(StatusCode::OK, "application/json", format!("{value:#}\n"))
}

/// 200 if there is no reason against, else 503 and the reasons.
fn probe(reasons: &[String]) -> Reply {
    if reasons.is_empty() {
        text(StatusCode::OK, "ok\n".to_owned())
    } else {
        text(StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n")
    }
}

fn stuck(shared: &Shared) -> Vec<String> {
    let now = shared.started.elapsed();
    let overdue = shared.workers.iter().enumerate().filter_map(|(index, worker)| {
        let turned = Duration::from_millis(worker.stats.heartbeat_ms.get());
        let silent = now.saturating_sub(turned);
        (silent > TURN_OVERDUE && worker.stats.state() != WorkerState::Stopped)
            .then(|| format!("worker {index} has not turned for {} s", silent.as_secs()))
    });
    overdue.collect()
}

fn unready(shared: &Shared) -> Vec<String> {
    let mut reasons = unstarted(shared);
    if shared.is_draining() {
        reasons.push("draining".to_owned());
    }
    let snapshot = shared.snapshot();
    if snapshot.endpoints.is_empty() {
        reasons.push("no endpoint is known: see AEGIS_BACKENDS and the log".to_owned());
    } else if !snapshot.endpoints.iter().any(|endpoint| is_usable(endpoint)) {
        reasons.push(format!("none of {} endpoints is usable", snapshot.endpoints.len()));
    }
    reasons
}

fn unstarted(shared: &Shared) -> Vec<String> {
    let mut reasons = Vec::new();
    if shared.workers.iter().any(|worker| worker.stats.state() == WorkerState::Starting) {
        reasons.push("workers are starting".to_owned());
    }
    if shared.workers.iter().any(|worker| worker.stats.applied_generation.get() == 0) {
        reasons.push("the first endpoints are not applied yet".to_owned());
    }
    reasons
}

/// Whether some worker sends sessions to the endpoint.
pub(super) fn is_usable(endpoint: &Endpoint) -> bool {
    endpoint.stats.iter().any(|stats| stats.ejected.get() == 0)
}

fn backends(shared: &Shared) -> Value {
    let snapshot = shared.snapshot();
    let endpoints: Vec<Value> = snapshot
        .endpoints
        .iter()
        .map(|endpoint| {
            let workers: Vec<Value> = endpoint.stats.iter().map(endpoint_of_worker).collect();
            let total =
                |value: fn(&EndpointStats) -> u64| endpoint.stats.iter().map(value).sum::<u64>();
            json!({
                "name": endpoint.name,
                "address": endpoint.address.to_string(),
                "state": if is_usable(endpoint) { "usable" } else { "ejected" },
                "sessions_active": total(|stats| stats.sessions_active.get()),
                "connects": total(|stats| stats.connects.get()),
                "connect_failures": total(|stats| stats.connect_failures.get()),
                "pool_idle": total(|stats| stats.pool_idle.get()),
                "workers": workers,
            })
        })
        .collect();
    let applied: Vec<u64> =
        shared.workers.iter().map(|worker| worker.stats.applied_generation.get()).collect();
    json!({ "generation": snapshot.generation, "applied": applied, "endpoints": endpoints })
}

fn endpoint_of_worker(stats: &EndpointStats) -> Value {
    json!({
        "state": if stats.ejected.get() == 0 { "usable" } else { "ejected" },
        "failures_in_a_row": stats.failures_in_a_row.get(),
        "ejections": stats.ejections.get(),
        "sessions_active": stats.sessions_active.get(),
        "pool": {
            "idle": stats.pool_idle.get(),
            "connecting": stats.pool_connecting.get(),
            "target": stats.pool_target.get(),
            "oldest_ms": stats.pool_oldest_ms.get(),
        },
    })
}

fn config(shared: &Shared) -> Value {
    let values = shared.config.effective();
    values.into_iter().map(|(name, value)| (name.to_owned(), Value::from(value))).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::sync::Arc;
    use std::time::Instant;

    use super::*;
    use crate::config::Config;
    use crate::control::{DriverInfo, WorkerHandle};
    use crate::proxy::endpoints::EndpointSnapshot;
    use crate::telemetry::WorkerStats;
    use crate::worker::mailbox::Mailbox;

    fn shared() -> Arc<Shared> {
        let config = Arc::new(Config::from_vars([]).unwrap());
        let worker =
            WorkerHandle { mailbox: Arc::new(Mailbox::new().unwrap()), stats: Arc::default() };
        let driver = DriverInfo {
            driver: "epoll",
            reason: "a \"quoted\"\nreason".to_owned(),
            kernel: "6.1".to_owned(),
        };
        Shared::new(config, Instant::now(), vec![worker], driver, 100)
    }

    fn run(stats: &WorkerStats) {
        stats.set_state(WorkerState::Running);
        stats.applied_generation.set(1);
    }

    #[test]
    fn readiness_names_every_reason_against_it() {
        let shared = shared();
        assert_eq!(unready(&shared).len(), 3, "{:?}", unready(&shared));
        run(&shared.workers[0].stats);
        let endpoint = Endpoint::new("e", ([127, 0, 0, 1], 1).into(), 1);
        shared.publish(EndpointSnapshot { generation: 1, endpoints: vec![Arc::clone(&endpoint)] });
        assert!(unready(&shared).is_empty());
        endpoint.stats[0].ejected.set(1);
        assert_eq!(unready(&shared), ["none of 1 endpoints is usable"]);
        endpoint.stats[0].ejected.set(0);
        shared.set_draining();
        assert_eq!(unready(&shared), ["draining"]);
    }

    #[test]
    fn every_path_answers_over_http_and_slow_requests_hold_up_nobody() {
        let shared = shared();
        run(&shared.workers[0].stats);
        let socket = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async { serve(listener(socket).unwrap(), shared).await });
        });
        let mut slow = TcpStream::connect(address).unwrap();
        slow.write_all(b"GET /met").unwrap();
        let ask = |method: &str, path: &str| {
            let mut stream = TcpStream::connect(address).unwrap();
            write!(stream, "{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
                .unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        };
        for path in INDEX.lines().filter(|&path| path != "/readyz") {
            assert!(ask("GET", path).starts_with("HTTP/1.1 200"), "{path}");
        }
        assert!(ask("GET", "/readyz").starts_with("HTTP/1.1 503"));
        assert!(ask("HEAD", "/metrics").ends_with("\r\n\r\n"), "no body");
        assert!(ask("GET", "/nothing").contains("/backends"), "404 with what there is");
        assert!(ask("POST", "/metrics").starts_with("HTTP/1.1 405"));
    }

    #[test]
    fn a_port_in_use_is_a_clear_error() {
        let first = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = first.local_addr().unwrap();
        let error = bind(address).unwrap_err().to_string();
        assert!(error.contains("AEGIS_ADMIN") && error.contains(&address.to_string()), "{error}");
    }
}
