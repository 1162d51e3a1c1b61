//! The admin server: metrics, probes, and a look inside, by HTTP.
//!
//! Liveness never depends on backends: a restart would not mend them. One connection carries one
//! request, for ten seconds at most, so slow clients cannot pile up.

use std::convert::Infallible;
use std::fmt::Write;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rustix::io::Errno;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::http::{Response, StatusCode, header};
use warp::reject::{MethodNotAllowed, Rejection};

use super::View;
use super::metrics;
use super::view::{EndpointCounts, labels, usable};
use crate::limits::ADMIN_CONNECTIONS;
use crate::telemetry::EndpointStats;

/// How long one connection may take from accept to close: its request, the answer, and its way
/// over a slow network. Scrapers give up at ten seconds too, by default.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(10);

/// The listener's queue of connections not yet accepted.
const BACKLOG: i32 = 128;

type Page = Response<String>;

/// How a page is made.
type Render = fn(&View) -> Page;

/// Every page: path, what it is, and how it is made.
#[rustfmt::skip]
const PAGES: &[(&str, &str, Render)] = &[
    ("metrics", "counters and histograms for Prometheus", metrics_page),
    ("livez", "200 while every worker turns", |view| probe(&view.not_live())),
    ("readyz", "200 while new sessions are welcome", |view| probe(&view.not_ready())),
    ("startupz", "200 once workers accept and the first endpoints are applied", |view| probe(&view.not_started())),
    ("backends", "endpoints, their state and pools, in JSON", |view| json_page(&backends(view))),
    ("config", "the effective configuration, in JSON", |view| json_page(&config(view))),
];

/// Listens for admin connections. `[::]` means both families, and IPv4 alone where the host has
/// no IPv6.
///
/// # Errors
/// The address is in use or not this host's; the message names it and `AEGIS_ADMIN`.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = match listen(address) {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && ipv6_is_off(&error) => {
            let fallback = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
            warn!(%address, %fallback, "this host has no IPv6: admin listens on IPv4 alone");
            listen(fallback)
        }
        result => result,
    };
    let listener = listener.map_err(|error| {
        let why = match error.kind() {
            io::ErrorKind::AddrInUse => "the address is in use".to_owned(),
            _ => error.to_string(),
        };
        io::Error::new(error.kind(), format!("AEGIS_ADMIN: cannot listen on {address}: {why}"))
    })?;
    info!(address = %listener.local_addr()?, "admin listening");
    Ok(listener)
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // `[::]` serves both families whatever the host's `net.ipv6.bindv6only` says.
        socket.set_only_v6(false)?;
    }
    // A restart must not wait for old connections in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn ipv6_is_off(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL))
}

/// Answers admin requests for ever.
pub async fn serve(listener: tokio::net::TcpListener, view: Arc<View>) {
    serve_within(CONNECTION_TIME_MAX, listener, view).await;
}

async fn serve_within(time_max: Duration, listener: tokio::net::TcpListener, view: Arc<View>) {
    let service = TowerToHyperService::new(warp::service(pages(&view).recover(rejected)));
    let mut http = auto::Builder::new(TokioExecutor::new()).http1_only();
    http.http1().keep_alive(false);
    let free = Arc::new(Semaphore::new(ADMIN_CONNECTIONS));
    while let Ok(permit) = Arc::clone(&free).acquire_owned().await {
        let stream: TcpStream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Most likely out of descriptors: give others the time to close some.
                warn!(%error, "admin cannot accept");
                sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let (http, service) = (http.clone(), service.clone());
        tokio::spawn(async move {
            let connection = http.serve_connection(TokioIo::new(stream), service);
            match timeout(time_max, connection).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(%error, "admin connection broke"),
                Err(_) => debug!("admin connection took too long"),
            }
            drop(permit);
        });
    }
}

fn pages(view: &Arc<View>) -> BoxedFilter<(Page,)> {
    let index = warp::path::end().map(|| text_page(StatusCode::OK, index())).boxed();
    let pages = PAGES.iter().fold(index, |pages, &(path, _, render)| {
        let view = Arc::clone(view);
        let page = warp::path(path).and(warp::path::end()).map(move || render(&view));
        pages.or(page).unify().boxed()
    });
    warp::get().or(warp::head()).unify().and(pages).boxed()
}

async fn rejected(rejection: Rejection) -> Result<Page, Infallible> {
    let status = if rejection.find::<MethodNotAllowed>().is_some() {
        StatusCode::METHOD_NOT_ALLOWED
    } else {
        StatusCode::NOT_FOUND
    };
    Ok(text_page(status, index()))
}

fn metrics_page(view: &View) -> Page {
    page(StatusCode::OK, metrics::CONTENT_TYPE, metrics::render(view))
}

/// The answer of a probe: fine, or one reason a line.
fn probe(reasons: &[String]) -> Page {
    if reasons.is_empty() {
        text_page(StatusCode::OK, "ok\n".to_owned())
    } else {
        text_page(StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n")
    }
}

fn backends(view: &View) -> serde_json::Value {
    let snapshot = view.snapshot();
    let state = |usable| if usable { "usable" } else { "ejected" };
    let endpoints = snapshot.endpoints.iter().zip(labels(&snapshot.endpoints));
    let endpoints: Vec<_> = endpoints
        .map(|(endpoint, label)| {
            let worker = |stats: &EndpointStats| {
                json!({
                    "state": state(stats.ejected.get() == 0),
                    "counts": EndpointCounts::read(stats),
                })
            };
            json!({
                "name": label,
                "address": endpoint.address,
                "near": endpoint.is_near(),
                "state": state(usable(endpoint)),
                "total": EndpointCounts::total(endpoint),
                "workers": endpoint.stats.iter().map(worker).collect::<Vec<_>>(),
            })
        })
        .collect();
    let stores = snapshot.stores.iter().map(|store| {
        let address = store.endpoint.map(|at| snapshot.endpoints[at].address);
        json!({"name": *store.name, "address": address, "why": store.why.as_deref()})
    });
    let left_out = view.discovery().left_out().into_iter().map(|left_out| {
        json!({"name": left_out.name, "address": left_out.address, "why": left_out.to_string()})
    });
    let applied: Vec<_> = view.stats().map(|stats| stats.applied_generation.get()).collect();
    json!({
        "generation": snapshot.generation,
        "applied_generations": applied,
        "endpoints": endpoints,
        "stores": stores.collect::<Vec<_>>(),
        "left_out": left_out.collect::<Vec<_>>(),
    })
}

fn config(view: &View) -> serde_json::Value {
    view.config().effective().into_iter().collect()
}

fn index() -> String {
    PAGES.iter().fold("aegis\n\n".to_owned(), |mut text, (path, what, _)| {
        let path = format!("/{path}");
        let _ = writeln!(text, "{path:<10} {what}");
        text
    })
}

fn text_page(status: StatusCode, text: String) -> Page {
    page(status, "text/plain; charset=utf-8", text)
}

fn json_page(value: &serde_json::Value) -> Page {
    page(StatusCode::OK, "application/json", format!("{value:#}\n"))
}

fn page(status: StatusCode, content_type: &'static str, body: String) -> Page {
    let mut page = Response::new(body);
    *page.status_mut() = status;
    let headers = page.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    page
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Instant;

    use super::*;
    use crate::control::testing::{self, block_on, endpoint, http, view};
    use crate::telemetry::WorkerState;

    /// Serves `view` while `client` runs on a thread of its own.
    fn with_admin(view: View, client: impl FnOnce(SocketAddr, &View) + Send + 'static) {
        with_admin_within(CONNECTION_TIME_MAX, view, client);
    }

    fn with_admin_within(
        time_max: Duration,
        view: View,
        client: impl FnOnce(SocketAddr, &View) + Send + 'static,
    ) {
        let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let view = Arc::new(view);
        block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let server = tokio::spawn(serve_within(time_max, listener, Arc::clone(&view)));
            tokio::task::spawn_blocking(move || client(address, &view)).await.unwrap();
            server.abort();
        });
    }

    fn running() -> View {
        view(testing::config(), vec![endpoint("db", "10.0.0.1:1"), endpoint("db2", "10.0.0.2:1")])
    }

    #[track_caller]
    fn assert_probe(address: SocketAddr, path: &str, status: u16, body: &str) {
        let (head, found) = http(address, "GET", path);
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {head}");
        assert_eq!(found, body, "{path}");
    }

    #[test]
    fn probes_of_a_running_process_are_fine() {
        with_admin(running(), |address, _| {
            for path in ["/livez", "/readyz", "/startupz"] {
                assert_probe(address, path, 200, "ok\n");
            }
        });
    }

    #[test]
    fn readiness_can_be_taken_back_and_says_why() {
        with_admin(running(), |address, view| {
            let endpoints = &view.snapshot().endpoints;
            for stats in endpoints.iter().flat_map(|endpoint| &endpoint.stats) {
                stats.ejected.set(1);
            }
            let ejected = "no endpoint usable: all 2 are ejected\n";
            assert_probe(address, "/readyz", 503, ejected);
            endpoints[1].stats[0].ejected.set(0);
            assert_probe(address, "/readyz", 200, "ok\n");

            view.set_draining();
            view.workers()[1].stats.set_state(WorkerState::Draining);
            assert_probe(address, "/readyz", 503, "draining\n");
            assert_probe(address, "/livez", 200, "ok\n");
            assert_probe(address, "/startupz", 200, "ok\n");
        });
        with_admin(view(testing::config(), Vec::new()), |address, view| {
            view.workers()[0].stats.set_state(WorkerState::Starting);
            let both = "worker 0 is starting\nno endpoint: discovery has found none\n";
            assert_probe(address, "/readyz", 503, both);
        });
    }

    #[test]
    fn start_up_is_over_when_every_worker_has_endpoints() {
        with_admin(running(), |address, view| {
            view.workers()[1].stats.applied_generation.set(0);
            assert_probe(address, "/startupz", 503, "worker 1 has no endpoints yet\n");
            view.workers()[1].stats.applied_generation.set(1);
            assert_probe(address, "/startupz", 200, "ok\n");
        });
    }

    #[test]
    fn a_worker_that_does_not_turn_is_named() {
        let started = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        let view = testing::view_started(started, testing::config(), Vec::new());
        let now_ms = 60_000;
        view.workers()[0].stats.heartbeat_ms.set(now_ms);
        view.workers()[1].stats.heartbeat_ms.set(now_ms - 20_000);
        with_admin(view, |address, view| {
            let (head, body) = http(address, "GET", "/livez");
            assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
            assert!(body.starts_with("worker 1 has not turned for 2"), "{body}");
            assert_eq!(body.lines().count(), 1);
            view.workers()[1].stats.set_state(WorkerState::Stopped);
            assert_probe(address, "/livez", 200, "ok\n");
        });
    }

    #[test]
    fn backends_tell_of_each_worker_and_of_all() {
        with_admin(running(), |address, view| {
            let stats = &view.snapshot().endpoints[0].stats;
            stats[0].connects.add(2);
            stats[1].connects.add(3);
            stats[1].ejected.set(1);
            let (head, body) = http(address, "GET", "/backends");
            assert!(head.contains("application/json"), "{head}");
            let found: serde_json::Value = serde_json::from_str(&body).unwrap();
            let endpoint = &found["endpoints"][0];
            assert_eq!(found["generation"], 1);
            assert_eq!(endpoint["name"], "db");
            assert_eq!(endpoint["address"], "10.0.0.1:1");
            assert_eq!(endpoint["state"], "usable");
            assert_eq!(endpoint["total"]["connects"], 5);
            assert_eq!(endpoint["workers"][1]["state"], "ejected");
            assert_eq!(endpoint["workers"][1]["counts"]["connects"], 3);
        });
    }

    #[test]
    fn the_rest_of_http_is_as_expected() {
        with_admin(running(), |address, _| {
            let (head, body) = http(address, "GET", "/metrics?x=y");
            assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
            assert!(body.contains("\naegis_max_sessions 1000\n"));

            let (head, body) = http(address, "HEAD", "/metrics");
            assert!(head.starts_with("HTTP/1.1 200 ") && body.is_empty(), "{head}");

            let (head, body) = http(address, "GET", "/config");
            assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
            assert!(serde_json::from_str::<serde_json::Value>(&body).unwrap().is_object());

            assert_probe(address, "/", 200, &index());
            assert_probe(address, "/metrics/more", 404, &index());
            let (head, _) = http(address, "POST", "/metrics");
            assert!(head.starts_with("HTTP/1.1 405 "), "{head}");
        });
    }

    #[test]
    fn a_silent_client_holds_up_no_other() {
        with_admin(running(), |address, _| {
            let _silent = std::net::TcpStream::connect(address).unwrap();
            assert_probe(address, "/livez", 200, "ok\n");
        });
    }

    #[test]
    fn a_silent_client_is_sent_away() {
        with_admin_within(Duration::from_millis(10), running(), |address, _| {
            let mut silent = std::net::TcpStream::connect(address).unwrap();
            assert_eq!(silent.read(&mut [0; 1]).unwrap(), 0, "closed by the server");
        });
    }

    #[test]
    fn an_address_in_use_is_named() {
        let first = bind("[::]:0".parse().unwrap()).unwrap();
        let address = first.local_addr().unwrap();
        let error = bind(address).unwrap_err().to_string();
        let expected = format!("AEGIS_ADMIN: cannot listen on {address}: the address is in use");
        assert_eq!(error, expected);
        // Both families reach it.
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, address.port())).unwrap();
    }
}
