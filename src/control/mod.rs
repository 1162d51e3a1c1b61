//! The tokio side: one thread for discovery, admin HTTP and the life of the process.
//!
//! It never forwards a byte. It speaks to workers by their mailboxes, and reads their counters.

pub mod admin;
mod checks;
mod diagnosis;
mod discovery;
mod ends;
mod lifecycle;
pub mod logging;
pub mod metrics;
mod outages;
pub mod socket;
pub mod survey;
mod tiers;
pub mod view;

#[cfg(test)]
mod testing;

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use tracing::{Instrument, Span, error_span};

use discovery::status::Status;
use discovery::{Publisher, dns, kubernetes};
pub use lifecycle::Outcome;
use lifecycle::Signals;
use view::Discovered;
pub use view::View;

use crate::config::{Balance, Config, Discovery, RouteConfig, RouteName};
use crate::io::net::Address;
use crate::listening::Listening;
use crate::metrics::WorkerStats;
use crate::proxy::RouteId;
use crate::worker::ends::Ends;
use crate::worker::mailbox::Mailbox;

/// Threads in which the Kubernetes client looks the name of its API server up. Nothing else waits
/// for them, and the process ends without them. They stay, so that there is one where the pod has as many
/// threads as it may have, of whatever container: tokio panics without any.
const BLOCKING_THREADS_MAX: usize = 8;

/// The two places where the control plane meets a worker.
#[derive(Debug, Clone)]
pub struct WorkerHandle {
    /// Where commands and endpoint snapshots go.
    pub mailbox: Arc<Mailbox>,
    /// What the worker counts.
    pub stats: Arc<WorkerStats>,
    /// What it has to tell of sessions and requests that have ended.
    pub ends: Arc<Ends>,
}

/// Which driver does the I/O, and why.
#[derive(Debug, Clone)]
pub struct DriverInfo {
    /// `io_uring` or `epoll`.
    pub driver: &'static str,
    /// Why this one.
    pub reason: String,
    /// The kernel's release.
    pub kernel: String,
}

/// Where the control plane runs: on the thread that made it.
///
/// It takes the signals over and is to be made before all else. As the first process of a container
/// this one is not ended by a signal that it does not handle: it would be lost, and the end of the
/// pod would wait for the whole grace period.
#[derive(Debug)]
pub struct Runtime {
    tokio: tokio::runtime::Runtime,
    signals: Signals,
}

impl Runtime {
    /// One that keeps the signals that come from now on.
    ///
    /// # Errors
    /// There is no descriptor for it, or a signal handler cannot be set.
    pub fn new() -> io::Result<Self> {
        let tokio = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .thread_keep_alive(Duration::MAX)
            .build()?;
        let signals = {
            let _inside = tokio.enter();
            Signals::take_over()?
        };
        Ok(Self { tokio, signals })
    }
}

/// All that the control plane needs to run.
#[derive(Debug)]
pub struct Plane {
    /// The configuration.
    pub config: Arc<Config>,
    /// When the process started; heartbeats are milliseconds since then.
    pub started: Instant,
    /// The workers, in the order of their numbers.
    pub workers: Vec<WorkerHandle>,
    /// The driver of all workers.
    pub driver: DriverInfo,
    /// Most sessions at a time in the whole process.
    pub max_sessions: usize,
    /// Where clients connect, with the ports that were bound.
    pub listening: Vec<Address>,
    /// Closes once every worker thread has ended: each holds a sender and drops it with its end.
    pub exited: mpsc::Receiver<Infallible>,
    /// The admin listener, from [`admin::bind`].
    pub admin: TcpListener,
    /// The control socket, if there is one.
    pub control: Option<UnixListener>,
}

impl Plane {
    /// Runs discovery, the admin server and signal handling on the calling thread until every
    /// worker has ended, or was asked to end and did not within [`lifecycle::STOP_MAX`].
    ///
    /// # Errors
    /// The admin listener cannot be set up. Workers may still be running then.
    pub fn run(self, runtime: Runtime) -> io::Result<Outcome> {
        let Runtime { tokio, signals } = runtime;
        let outcome = tokio.block_on(self.serve(signals));
        // Not a plain drop: that would wait for a name lookup that hangs in the resolver.
        tokio.shutdown_background();
        outcome
    }

    async fn serve(self, signals: Signals) -> io::Result<Outcome> {
        let events = lifecycle::events(signals, self.exited);
        let admin = tokio::net::TcpListener::from_std(self.admin)?;
        let mut addresses = self.listening;
        addresses.extend(self.config.control.clone());
        let listening = listening(addresses, admin.local_addr()?);
        let routes = self.config.routes.iter().map(|_| (watch::Sender::default(), Arc::default()));
        let routes: Vec<(watch::Sender<_>, Arc<Status>)> = routes.collect();
        let shown = |(snapshots, status): &(watch::Sender<_>, _)| Discovered {
            snapshot: snapshots.subscribe(),
            status: Arc::clone(status),
        };
        let view = Arc::new(View::new(
            Arc::clone(&self.config),
            self.started,
            self.workers.clone(),
            self.driver,
            self.max_sessions,
            routes.iter().map(shown).collect(),
        ));
        let places = checks::Places::default();
        let mut discovered = Vec::new();
        for (at, (snapshots, status)) in routes.into_iter().enumerate() {
            let checks = checks::Checks {
                route: Arc::clone(&self.config.routes[at]),
                workers: self.workers.clone(),
                snapshots: snapshots.subscribe(),
                places: places.clone(),
            };
            tokio::spawn(checks.run().instrument(span_of(&self.config, at, "checks")));
            let publisher = Publisher::new(self.workers.clone(), RouteId::at(at), snapshots)
                .leaving_out(listening.clone(), Arc::clone(&status));
            discovered.push((publisher, status));
        }
        discover(&self.config, discovered);
        tokio::spawn(outages::log_outages(Arc::clone(&view)));
        tokio::spawn(tiers::log_tiers(Arc::clone(&view)));
        tokio::spawn(diagnosis::run(Arc::clone(&view)));
        tokio::spawn(ends::run(Arc::clone(&view)));
        tokio::spawn(admin::serve(admin, Arc::clone(&view)));
        let drain_asked = Arc::new(Notify::new());
        if let Some(listener) = self.control {
            let listener = tokio::net::UnixListener::from_std(listener)?;
            let control = socket::Control::new(Arc::clone(&view), Arc::clone(&drain_asked));
            tokio::spawn(Arc::new(control).serve(listener));
        }
        let outcome = lifecycle::run(&view, events, &drain_asked).await;
        ends::finish(&view);
        Ok(outcome)
    }
}

/// Starts discovery for all routes in their order, each with where its endpoints go and where it says
/// how it fares. What it logs names the route, where there are several.
fn discover(config: &Config, routes: Vec<(Publisher, Arc<Status>)>) {
    let mut of_kubernetes = Vec::new();
    for (at, (publisher, status)) in routes.into_iter().enumerate() {
        let route = Arc::clone(&config.routes[at]);
        let span = span_of(config, at, "discovery");
        tokio::spawn(discovery::log_changes(publisher.subscribe()).instrument(span.clone()));
        if route.discovery == Discovery::Kubernetes {
            of_kubernetes.push(kubernetes::Route::new(config, route, publisher, status, span));
        } else {
            tokio::spawn(backends(config, &route, status).run(publisher).instrument(span));
        }
    }
    kubernetes::spawn(of_kubernetes, config.start_timeout);
}

/// The backends that a route lists.
fn backends(
    config: &Config,
    route: &RouteConfig,
    status: Arc<Status>,
) -> dns::Backends<dns::SystemResolver> {
    let (hosts, tiers) = route.all_backends().map(|(host, tier)| (host.clone(), tier)).unzip();
    dns::Backends {
        hosts,
        tiers,
        refresh: route.dns_refresh,
        first_answer_max: config.start_timeout,
        resolver: dns::SystemResolver::default(),
        by_key: route.balance == Balance::KeyHash,
        status,
    }
}

/// What names the route at this place in the log, where there are several.
fn span_of(config: &Config, at: usize, what: &'static str) -> Span {
    // Of the highest level, so that it is there whatever the lines' levels are.
    let named = |name: &RouteName| error_span!("route", what, route = name.as_str());
    config.name_in_log(at).map_or_else(Span::none, named)
}

/// All that the process listens on. `[::]` of the admin port means both families.
fn listening(mut addresses: Vec<Address>, admin: SocketAddr) -> Listening {
    addresses.push(admin.into());
    if admin.ip() == Ipv6Addr::UNSPECIFIED {
        addresses.push(SocketAddr::from((Ipv4Addr::UNSPECIFIED, admin.port())).into());
    }
    Listening::new(addresses)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::process::{Signal, getpid, kill_process};

    use super::*;
    use crate::config::Config;
    use crate::metrics::WorkerState;
    use crate::worker::mailbox::Command;

    /// A worker that applies snapshots and ends once it is asked to drain.
    fn work(worker: &WorkerHandle) {
        worker.stats.set_state(WorkerState::Running);
        while worker.mailbox.current_command() == Command::Run {
            let mut fds = [PollFd::from_borrowed_fd(worker.mailbox.wake_fd(), PollFlags::IN)];
            // A signal may interrupt it: the loop asks again.
            let _ = poll(&mut fds, None);
            worker.mailbox.clear_wake();
            if let Some(snapshot) = worker.mailbox.take_snapshot() {
                worker.stats.routes[0].applied_generation.set(snapshot.generation);
            }
        }
        worker.stats.set_state(WorkerState::Stopped);
    }

    #[test]
    fn the_plane_runs_from_the_first_snapshot_to_the_end_of_the_last_worker() {
        let admin = admin::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = admin.local_addr().unwrap();
        let workers = testing::workers(2);
        let (alive, exited) = mpsc::channel(1);
        for worker in &workers {
            let (worker, alive) = (worker.clone(), alive.clone());
            thread::spawn(move || {
                work(&worker);
                drop(alive);
            });
        }
        drop(alive);

        let client = thread::spawn(move || {
            // The signal handlers are set before the first answer.
            while testing::http(address, "GET", "/startupz").1 != "ok\n" {
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(testing::http(address, "GET", "/readyz").1, "ok\n");
            kill_process(getpid(), Signal::TERM).unwrap();
        });
        let plane = Plane {
            config: Arc::new(Config { drain_delay: Duration::ZERO, ..testing::config() }),
            started: Instant::now(),
            workers,
            driver: testing::driver(),
            max_sessions: 100,
            listening: Vec::new(),
            exited,
            admin,
            control: None,
        };
        assert_eq!(plane.run(Runtime::new().unwrap()).unwrap(), Outcome::Drained);
        client.join().unwrap();
    }
}
