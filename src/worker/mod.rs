//! One core: binds `proxy` to `io`, turn by turn.
//!
//! A worker is a thread that shares nothing with the others: it has its own listening sockets,
//! driver, sessions, buffers, pools and counters.
//!
//! ```text
//! turn ──▶ acceptor, mail ─────────────────────▶ context: driver, clock, timers, counters,
//!   └────▶ route: sessions, requests, pools ───▶          places, owners, load, drain
//! ```
//!
//! A part is handed the context and does not know who calls it: what concerns others, it returns. A
//! route has all that is its own, and knows of no other; the turn tells by a connection's owner whose
//! it is. The parts are put together in [`engine`].

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Instant;

use crate::config::{Config, RouteConfig};
use crate::io::epoll::Epoll;
use crate::io::probe::{self, DriverKind};
use crate::io::uring::Uring;
use crate::io::{Driver, DriverSetup, block_signals, net};
use crate::limits;
use crate::listening::Listening;
use crate::metrics::{WorkerState, WorkerStats};
use crate::proxy::retry_budget::Reserve;
use crate::proxy::{RouteId, WorkerId};

mod acceptor;
pub mod batch;
pub mod contention;
mod context;
mod drain;
pub mod ends;
pub mod engine;
mod flush;
mod handover;
mod load;
mod mail;
pub mod mailbox;
mod network;
mod owners;
mod places;
mod route;
#[cfg(test)]
mod simulation;
pub mod tap;
pub mod timers;
mod turn;

use contention::CoreTimes;
use ends::Ends;
use engine::{Engine, EngineSetup};
use mailbox::Mailbox;

/// What a worker needs to start.
#[derive(Debug)]
pub struct WorkerSetup {
    /// Its number, from 0.
    pub index: usize,
    /// Its listening sockets.
    pub listeners: Vec<OwnedFd>,
    /// The routes of its listening sockets.
    pub listener_routes: Box<[RouteId]>,
    /// The configuration.
    pub config: Arc<Config>,
    /// Sessions at a time in the whole process.
    pub sessions_max: usize,
    /// Connections of this worker's pools, idle or being made.
    pub pool_conns_max: usize,
    /// The mailboxes of all workers, its own at `index`.
    pub mailboxes: Arc<[Arc<Mailbox>]>,
    /// The counters of all workers, its own at `index`.
    pub stats: Arc<[Arc<WorkerStats>]>,
    /// Where it tells of those that have ended.
    pub ends: Arc<Ends>,
    /// What retries need no requests, of each route.
    pub retry_reserves: Arc<[Arc<Reserve>]>,
    /// When the process started.
    pub started: Instant,
    /// Where backends cannot be.
    pub listening: Listening,
    /// Dropped when the thread ends.
    pub exited: tokio::sync::mpsc::Sender<Infallible>,
}

/// A worker could not start.
#[derive(Debug, thiserror::Error)]
#[error("worker {index} cannot start: {error}")]
pub struct WorkerError {
    index: usize,
    #[source]
    error: io::Error,
}

/// The socket options that the configuration asks for.
pub fn socket_options(config: &RouteConfig) -> net::Options {
    let limit = config.tcp_user_timeout.unwrap_or_default();
    let silence_max = limit * limits::SILENCE_WITNESSED_FACTOR;
    net::Options { keepalive: config.keepalive, silence_max }
}

/// A worker's thread that has what the kernel may deny, and waits for the rest. Dropped, it ends.
#[derive(Debug)]
pub struct Prepared {
    index: usize,
    setup: mpsc::Sender<WorkerSetup>,
    outcome: mpsc::Receiver<io::Result<()>>,
}

/// Starts a worker's thread on its core, or on any, and returns once it has what its driver needs of
/// the kernel.
///
/// # Errors
/// The thread or its ring cannot be set up.
pub fn prepare(
    index: usize,
    core: Option<core_affinity::CoreId>,
    driver: DriverKind,
) -> Result<Prepared, WorkerError> {
    let (setup, received) = mpsc::channel();
    let (done, outcome) = mpsc::channel();
    let prepared = Prepared { index, setup, outcome };
    thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || run(index, core, driver, &received, &done))
        .map_err(|error| WorkerError { index, error })?;
    prepared.outcome()?;
    Ok(prepared)
}

impl Prepared {
    /// Goes on with the rest, and returns once the worker's driver is set up. It accepts from the first
    /// snapshot of endpoints on.
    ///
    /// # Errors
    /// The driver cannot be set up.
    pub fn start(self, setup: WorkerSetup) -> Result<(), WorkerError> {
        // If nobody takes it the thread has panicked.
        let _ = self.setup.send(setup);
        self.outcome()
    }

    fn outcome(&self) -> Result<(), WorkerError> {
        // A thread that ends without a word has panicked, which the panic hook reports.
        let outcome = self.outcome.recv().unwrap_or_else(|_| Err(io::Error::other("it panicked")));
        outcome.map_err(|error| WorkerError { index: self.index, error })
    }
}

fn run(
    index: usize,
    core: Option<core_affinity::CoreId>,
    driver: DriverKind,
    setup: &mpsc::Receiver<WorkerSetup>,
    done: &mpsc::Sender<io::Result<()>>,
) {
    block_signals();
    if let Some(core) = core
        && !core_affinity::set_for_current(core)
    {
        tracing::warn!(worker = index, core = core.id, "cannot be pinned to its core");
    }
    let rings = match driver {
        DriverKind::Uring(features) => probe::set_up(features).map(Some),
        DriverKind::Epoll => Ok(None),
    };
    let (rings, prepared) = match rings {
        Ok(rings) => (rings, Ok(())),
        Err(denied) => (None, Err(io::Error::other(denied))),
    };
    // Nobody listens any more only if the process is ending.
    let _ = done.send(prepared);
    // Nothing comes where this was denied, or another worker's was.
    let Ok(mut setup) = setup.recv() else { return };
    let outcome = driver_setup(&mut setup).and_then(|driver| match rings {
        Some(rings) => Uring::new(driver, rings).map(|driver| serve(driver, setup, done)),
        None => Epoll::new(driver).map(|driver| serve(driver, setup, done)),
    });
    if let Err(error) = outcome {
        let _ = done.send(Err(error));
    }
}

fn driver_setup(setup: &mut WorkerSetup) -> io::Result<DriverSetup> {
    Ok(DriverSetup {
        listeners: std::mem::take(&mut setup.listeners),
        wake: setup.mailboxes[setup.index].wake_fd().as_fd().try_clone_to_owned()?,
        conns_max: limits::conns_max(setup.sessions_max),
        buffers_max: limits::buffers_max(setup.sessions_max),
    })
}

fn serve<D: Driver>(driver: D, setup: WorkerSetup, started: &mpsc::Sender<io::Result<()>>) {
    let index = setup.index;
    let stats = Arc::clone(&setup.stats[index]);
    let mut engine = Engine::new(
        driver,
        EngineSetup {
            worker: WorkerId::new(index),
            config: setup.config,
            listener_routes: setup.listener_routes,
            sessions_max: setup.sessions_max,
            pool_conns_max: setup.pool_conns_max,
            mailboxes: setup.mailboxes,
            stats: setup.stats,
            ends: setup.ends,
            retry_reserves: setup.retry_reserves,
            started: setup.started,
            listening: setup.listening,
            core_times: CoreTimes::of_this_thread(),
            seed: fastrand::u64(..),
        },
    );
    stats.set_state(WorkerState::Running);
    let _ = started.send(Ok(()));
    let outcome = engine.run();
    drop(engine);
    stats.set_state(WorkerState::Stopped);
    if let Err(error) = outcome {
        // Half a proxy is worse than none: the process ends, and is started again.
        panic!("worker {index}: the kernel refused to wait for events: {error}");
    }
    drop(setup.exited);
}
