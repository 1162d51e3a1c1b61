//! What a start would find, found once and for nobody: the endpoints of each route, by the very
//! discovery that a proxy runs, and whether each of them takes a connection.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::checks::connect_unix;
use super::discovery::status::Status;
use super::{Publisher, discover, listening};
use crate::config::{Config, Discovery, RouteConfig};
use crate::io::net::Address;
use crate::proxy::RouteId;
use crate::proxy::endpoints::EndpointSnapshot;

/// A source has at least so long to answer, however soon a start would go on without it.
const ANSWER_TIME_MIN: Duration = Duration::from_secs(5);

/// How much later than the source's own limit it is given up.
const ANSWER_MARGIN: Duration = Duration::from_secs(1);

/// A right to list is not one to watch: so long after the list the API has refused the watch, if it
/// does.
const WATCH_REFUSED_WITHIN: Duration = Duration::from_secs(1);

/// Connections under way at a time.
const CONNECTS_MAX: usize = 64;

/// How often it is looked whether there is an answer.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// What was found of a route.
#[derive(Debug)]
pub struct Found {
    /// When its source had answered, since the begin.
    pub took: Duration,
    /// Why a start would be held, which is for whoever configures it to mend.
    pub held: Option<String>,
    /// What else is wrong with the source.
    pub trouble: Option<String>,
    /// Its endpoints.
    pub endpoints: Vec<Reached>,
}

/// An endpoint that was connected to.
#[derive(Debug)]
pub struct Reached {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub address: Address,
    /// How long the connect took, or why it failed.
    pub outcome: Result<Duration, (io::Error, Duration)>,
}

/// Finds the endpoints of each route, in their order, and connects to each once. Writes no file and
/// sends no byte to an endpoint.
///
/// # Errors
/// There is no descriptor for the runtime.
pub fn survey(config: &Config) -> io::Result<Vec<Found>> {
    let mut config = config.clone();
    config.start_timeout = config.start_timeout.max(ANSWER_TIME_MIN);
    for route in &mut config.routes {
        // The file is the running proxy's.
        Arc::make_mut(route).kube.snapshot = None;
    }
    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(super::BLOCKING_THREADS_MAX)
        .build()?;
    let found = tokio.block_on(find_all(&config));
    // A name lookup may hang in the resolver.
    tokio.shutdown_background();
    Ok(found)
}

async fn find_all(config: &Config) -> Vec<Found> {
    let own = config.routes.iter().flat_map(|route| route.listen.clone()).collect();
    let listening = listening(own, config.admin);
    let (mut sources, mut found) = (Vec::new(), Vec::new());
    for (at, route) in config.routes.iter().enumerate() {
        let (snapshots, snapshot) = watch::channel(Arc::default());
        let status = Arc::<Status>::default();
        let publisher = Publisher::new(Vec::new(), RouteId::at(at), snapshots)
            .leaving_out(listening.clone(), Arc::clone(&status));
        sources.push((publisher, Arc::clone(&status)));
        found.push(find(route, config.start_timeout, snapshot, status));
    }
    discover(config, sources);
    join_all(found).await
}

async fn find(
    route: &RouteConfig,
    start_timeout: Duration,
    mut snapshot: watch::Receiver<Arc<EndpointSnapshot>>,
    status: Arc<Status>,
) -> Found {
    let begun = Instant::now();
    let answered = answer(route.discovery, &mut snapshot, &status);
    let in_time = timeout(start_timeout + ANSWER_MARGIN, answered).await.is_ok();
    let took = begun.elapsed();
    if route.discovery == Discovery::Kubernetes && status.held().is_none() {
        let refused = async {
            while status.trouble().is_none() {
                sleep(LOOK_INTERVAL).await;
            }
        };
        // Silence is consent.
        let _ = timeout(WATCH_REFUSED_WITHIN, refused).await;
    }
    let silent = (!in_time).then(|| match status.unanswered() {
        Some(name) => format!("{name} has not been looked up in time"),
        None => "it has not answered in time".to_owned(),
    });
    let endpoints = snapshot.borrow().endpoints.clone();
    let reached = stream::iter(endpoints)
        .map(|endpoint| reach(endpoint.name.clone(), endpoint.address.clone(), route))
        .buffered(CONNECTS_MAX);
    let stores = status.stores_trouble();
    let kubernetes = route.discovery == Discovery::Kubernetes;
    Found {
        took,
        // What Kubernetes says of stores may be another thing at the next start.
        held: status.held().or_else(|| stores.clone().filter(|_| !kubernetes)),
        trouble: status.trouble().or(stores).or(silent),
        endpoints: reached.collect().await,
    }
}

/// Waits until endpoints are published and each name was looked up, or it is known why none will be. What
/// is published without a word of the source is not its answer: a start goes on with addresses, or with
/// none.
async fn answer(
    discovery: Discovery,
    snapshot: &mut watch::Receiver<Arc<EndpointSnapshot>>,
    status: &Status,
) {
    let is_heard = || {
        discovery == Discovery::Static || status.sync_age().is_some() || status.trouble().is_some()
    };
    let is_all = || is_heard() && status.unanswered().is_none();
    while (snapshot.borrow_and_update().generation == 0 || !is_all()) && status.held().is_none() {
        sleep(LOOK_INTERVAL).await;
    }
}

async fn reach(name: String, address: Address, route: &RouteConfig) -> Reached {
    let begun = Instant::now();
    let connect = async {
        match &address {
            Address::Tcp(address) => connect_tcp(*address).await,
            Address::Unix(path) => connect_unix(path).await.map(drop),
        }
    };
    let outcome = timeout(route.connect_timeout, connect).await;
    let outcome = outcome.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let took = begun.elapsed();
    let outcome = outcome.map(|()| took).map_err(|error| (error, took));
    Reached { name, address, outcome }
}

async fn connect_tcp(address: SocketAddr) -> io::Result<()> {
    TcpStream::connect(address).await.map(drop)
}
