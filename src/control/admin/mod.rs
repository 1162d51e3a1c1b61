//! The admin server: metrics, probes, and a look inside, by HTTP.
//!
//! Liveness never depends on backends: a restart would not mend them. Everybody in the cluster can
//! reach this port, so [`connection`] and [`rooms`] see to it that a probe is always answered.

mod backends;
mod connection;
pub(super) mod page;
mod rooms;
mod status;
mod web;

use std::convert::Infallible;
use std::fmt::Write;
use std::future::ready;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper_util::service::TowerToHyperService;
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::{Instant, timeout};
use tracing::{info, warn};
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::http::{HeaderMap, StatusCode};
use warp::reject::{MethodNotAllowed, Rejection};

use super::View;
use super::metrics;
use crate::metrics::text::CONTENT_TYPE;
use connection::Visit;
use page::{Page, page, streamed};
use rooms::Times;

/// A head comes within a round trip of the connection. An answer may take its time over a slow
/// network; scrapers give up at ten seconds too, by default. A start is waited for a little less
/// than the ten seconds that the charts' startup probe gives it.
const TIMES: Times = Times {
    head: Duration::from_secs(1),
    answer: Duration::from_secs(10),
    hold: Duration::from_secs(8),
};

/// How often a start that is waited for is looked at.
const START_TICK: Duration = Duration::from_millis(10);

/// The listener's queue of connections not yet accepted. A flood of them is let in, and out again,
/// at more than ten thousand a second; until then a probe's handshake needs a place.
const BACKLOG: i32 = 1024;

/// Bytes of an answer that the kernel takes before its reader does, twice that with its own: all
/// readers together cannot make it hold more than 2 MiB.
const SEND_BUFFER: usize = 64 * 1024;

/// How a page is made.
type Render = fn(Arc<View>, Visit) -> BoxFuture<'static, Page>;

/// Every page: path, what it is, and how it is made.
#[rustfmt::skip]
const PAGES: &[(&str, &str, Render)] = &[
    ("metrics", "counters and histograms for Prometheus", |view, visit| now(&visit, metrics_page(view))),
    ("livez", "200 while every worker turns", |view, visit| now(&visit, probe(&view.not_live()))),
    ("readyz", "200 while new sessions are welcome", |view, visit| now(&visit, probe(&view.not_ready()))),
    ("startupz", "200 once workers accept and the first endpoints are applied; waits for that, 8 s or ?wait=SECONDS", |view, visit| Box::pin(startup_page(view, visit))),
    ("backends", "endpoints, their state and pools, in JSON; ?limit=100&offset=0&workers=0", |view, visit| now(&visit, backends_page(view, &visit.query))),
    ("status", "what the page shows, in JSON", |view, visit| now(&visit, status_page(view))),
    ("config", "the effective configuration, in JSON", |view, visit| now(&visit, config_page(&view))),
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
    // Its connections inherit it.
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn ipv6_is_off(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL))
}

/// Answers admin requests for ever.
pub async fn serve(listener: tokio::net::TcpListener, view: Arc<View>) {
    serve_within(TIMES, listener, view).await;
}

async fn serve_within(times: Times, listener: tokio::net::TcpListener, view: Arc<View>) {
    let service = TowerToHyperService::new(warp::service(pages(&view).recover(rejected)));
    connection::serve(listener, times, service).await;
}

fn pages(view: &Arc<View>) -> BoxedFilter<(Page,)> {
    let visit = || warp::ext::get::<Visit>();
    let index = warp::path::end()
        .and(visit())
        .and(warp::header::headers_cloned())
        .then(|visit: Visit, headers| now(&visit, index_page(&headers)));
    let index = web::FILES.iter().fold(index.boxed(), |pages, file| {
        let file_page = warp::path(file.path).and(warp::path::end()).and(visit());
        let file_page = file_page.then(|visit: Visit| now(&visit, file.page()));
        pages.or(file_page).unify().boxed()
    });
    let pages = PAGES.iter().fold(index, |pages, &(path, _, render)| {
        let view = Arc::clone(view);
        let page = warp::path(path)
            .and(warp::path::end())
            .and(visit())
            .then(move |visit| render(Arc::clone(&view), visit));
        pages.or(page).unify().boxed()
    });
    warp::get().or(warp::head()).unify().and(pages).boxed()
}

/// A page that nothing has to be waited for.
fn now(visit: &Visit, page: Page) -> BoxFuture<'static, Page> {
    visit.answer();
    Box::pin(ready(page))
}

async fn rejected(rejection: Rejection) -> Result<Page, Infallible> {
    let status = if rejection.find::<MethodNotAllowed>().is_some() {
        StatusCode::METHOD_NOT_ALLOWED
    } else {
        StatusCode::NOT_FOUND
    };
    Ok(text_page(status, index()))
}

/// A page for a browser; a list of all pages for a terminal.
fn index_page(headers: &HeaderMap) -> Page {
    if web::is_browser(headers) { web::INDEX.page() } else { text_page(StatusCode::OK, index()) }
}

fn metrics_page(view: Arc<View>) -> Page {
    streamed(CONTENT_TYPE, |pieces| metrics::render(view, pieces))
}

/// The answer of a probe: fine, or one reason a line.
fn probe(reasons: &[String]) -> Page {
    if reasons.is_empty() {
        text_page(StatusCode::OK, "ok\n".to_owned())
    } else {
        text_page(StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n")
    }
}

/// The probe of the start. Told at once that it is not over, the kubelet would ask again only a
/// second later, and the application would start so much later.
async fn startup_page(view: Arc<View>, visit: Visit) -> Page {
    let Some(wait) = startup_wait(&visit.query) else {
        visit.answer();
        return text_page(StatusCode::BAD_REQUEST, "wait is a number of seconds, 0 to 8\n".into());
    };
    let until = Instant::now() + wait;
    loop {
        let reasons = view.not_started();
        if reasons.is_empty() || view.draining() || Instant::now() >= until {
            visit.answer();
            return probe(&reasons);
        }
        visit.hold();
        visit.cut_if_left();
        if timeout(START_TICK, visit.recalled()).await.is_ok() {
            return probe(&reasons);
        }
    }
}

/// How long to wait for the start: `wait=SECONDS`, else as long as can be.
fn startup_wait(query: &str) -> Option<Duration> {
    let Some(seconds) = query.strip_prefix("wait=") else {
        return query.is_empty().then_some(TIMES.hold);
    };
    let wait = Duration::from_secs(seconds.parse().ok()?);
    (wait <= TIMES.hold).then_some(wait)
}

fn backends_page(view: Arc<View>, query: &str) -> Page {
    let routes: Vec<_> = view.routes().map(|route| route.name).collect();
    match backends::Query::parse(query, &routes) {
        Ok(query) => {
            streamed("application/json", move |pieces| backends::write(view, query, pieces))
        }
        Err(error) => text_page(StatusCode::BAD_REQUEST, error),
    }
}

fn status_page(view: Arc<View>) -> Page {
    streamed("application/json", |pieces| status::write(view, pieces))
}

fn config_page(view: &View) -> Page {
    let config: serde_json::Value = view.config().effective().into_iter().collect();
    page(StatusCode::OK, "application/json", format!("{config:#}\n"))
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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Instant;

    use super::*;
    use crate::control::testing::{self, block_on, endpoint, http, view};
    use crate::metrics::WorkerState;

    /// Serves `view` while `client` runs on a thread of its own.
    fn with_admin(view: View, client: impl FnOnce(SocketAddr, &View) + Send + 'static) {
        with_admin_within(TIMES, view, client);
    }

    fn with_admin_within(
        times: Times,
        view: View,
        client: impl FnOnce(SocketAddr, &View) + Send + 'static,
    ) {
        let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let view = Arc::new(view);
        block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let server = tokio::spawn(serve_within(times, listener, Arc::clone(&view)));
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
            let snapshot = view.routes().next().unwrap().snapshot;
            let endpoints = &snapshot.endpoints;
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
            view.workers()[1].stats.routes[0].applied_generation.set(0);
            assert_probe(address, "/startupz?wait=0", 503, "worker 1 has no endpoints yet\n");
            view.workers()[1].stats.routes[0].applied_generation.set(1);
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
            let snapshot = view.routes().next().unwrap().snapshot;
            let stats = &snapshot.endpoints[0].stats;
            stats[0].connects.add(2);
            stats[1].connects.add(3);
            stats[1].ejected.set(1);
            let (head, body) = http(address, "GET", "/backends?workers=1");
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
        let times = Times { head: Duration::from_millis(10), ..TIMES };
        with_admin_within(times, running(), |address, _| {
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
