//! The tokio side: discovery, admin HTTP, lifecycle, on one thread.
//!
//! It tells the workers what it wants through their mailboxes and reads their counters. Traffic
//! never waits for anything that happens here.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::mpsc;

use crate::config::Config;
use crate::proxy::endpoints::EndpointSnapshot;
use crate::telemetry::WorkerStats;
use crate::worker::mailbox::{Mailbox, Order};

pub mod admin;
pub mod discovery;
pub mod lifecycle;
pub mod logging;
pub mod metrics;

pub use lifecycle::Outcome;

/// The control thread's end of a worker.
#[derive(Debug, Clone)]
pub struct WorkerHandle {
    /// Commands go down.
    pub mailbox: Arc<Mailbox>,
    /// Counts come up.
    pub stats: Arc<WorkerStats>,
}

/// Which driver runs, and why.
#[derive(Debug, Clone)]
pub struct DriverInfo {
    /// `io_uring` or `epoll`.
    pub driver: &'static str,
    /// One sentence.
    pub reason: String,
    /// The kernel's release.
    pub kernel: String,
}

/// What the control plane is started with.
#[derive(Debug)]
pub struct Setup {
    /// The configuration.
    pub config: Arc<Config>,
    /// When the process started.
    pub started: Instant,
    /// The workers, all of them running.
    pub workers: Vec<WorkerHandle>,
    /// Which driver runs, and why.
    pub driver: DriverInfo,
    /// Sessions at a time in the whole process.
    pub max_sessions: usize,
    /// The admin socket, bound.
    pub admin: TcpListener,
    /// Closes once every worker's thread has ended.
    pub exited: mpsc::Receiver<Infallible>,
}

/// What the parts of the control plane share.
#[derive(Debug)]
pub struct Shared {
    /// The configuration.
    pub config: Arc<Config>,
    /// When the process started.
    pub started: Instant,
    /// The workers.
    pub workers: Vec<WorkerHandle>,
    /// Which driver runs, and why.
    pub driver: DriverInfo,
    /// Sessions at a time in the whole process.
    pub max_sessions: usize,
    draining: AtomicBool,
    snapshot: Mutex<Arc<EndpointSnapshot>>,
}

impl Shared {
    /// The state at start: no endpoint known, not draining.
    pub fn new(
        config: Arc<Config>,
        started: Instant,
        workers: Vec<WorkerHandle>,
        driver: DriverInfo,
        max_sessions: usize,
    ) -> Arc<Self> {
        Arc::new(Self {
            config,
            started,
            workers,
            driver,
            max_sessions,
            draining: AtomicBool::new(false),
            snapshot: Mutex::default(),
        })
    }

    /// The endpoint snapshot published last.
    pub fn snapshot(&self) -> Arc<EndpointSnapshot> {
        Arc::clone(&self.snapshot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes a snapshot the one in force and delivers it to every worker.
    pub fn publish(&self, snapshot: EndpointSnapshot) {
        let snapshot = Arc::new(snapshot);
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&snapshot);
        for worker in &self.workers {
            worker.mailbox.deliver(Arc::clone(&snapshot));
        }
    }

    /// Whether a drain has begun.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Takes note that a drain has begun: not ready from now on.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Gives an order to every worker.
    pub fn order(&self, order: Order) {
        for worker in &self.workers {
            worker.mailbox.order(order);
        }
    }

    /// Sessions now open in all workers.
    pub fn sessions_active(&self) -> u64 {
        self.workers.iter().map(|worker| worker.stats.sessions_active.get()).sum()
    }
}

/// Runs the control plane until the workers have ended.
///
/// # Errors
/// The runtime, the signal handlers or the admin server cannot be set up.
pub fn run(setup: Setup) -> io::Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let Setup { config, started, workers, driver, max_sessions, admin, exited } = setup;
    let shared = Shared::new(config, started, workers, driver, max_sessions);
    runtime.block_on(async {
        // Signals first: whoever asks for an end during the start gets it.
        let signals = lifecycle::Signals::new()?;
        tokio::spawn(admin::serve(admin::listener(admin)?, Arc::clone(&shared)));
        tokio::spawn(discovery::run(Arc::clone(&shared)));
        Ok(lifecycle::run(&shared, signals, exited).await)
    })
}
