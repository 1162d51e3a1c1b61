//! What the process looks like from outside at one moment: read from counters, disturbs no worker.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::discovery::status::Status;
use super::{DriverInfo, WorkerHandle};
use crate::config::{Config, Discovery, RouteConfig};
use crate::metrics::{RouteStats, WorkerState, WorkerStats};
use crate::proxy::endpoints::{Endpoint, EndpointSnapshot};

/// A worker that did not turn for this long is stuck: an idle one turns once a second.
pub const HEARTBEAT_AGE_MAX: Duration = Duration::from_secs(10);

/// The state of the process as the admin server shows it.
#[derive(Debug)]
pub struct View {
    config: Arc<Config>,
    started: Instant,
    workers: Vec<WorkerHandle>,
    driver: DriverInfo,
    max_sessions: usize,
    draining: AtomicBool,
    snapshot: watch::Receiver<Arc<EndpointSnapshot>>,
    discovery: Arc<Status>,
}

/// A route as it is at one moment.
#[derive(Debug)]
pub struct RouteView<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its configuration.
    pub config: &'a RouteConfig,
    /// What the workers count of it, in the order of their numbers.
    pub stats: Vec<&'a RouteStats>,
}

impl View {
    /// A view of these workers, not draining, which follows discovery by `snapshot`.
    pub fn new(
        config: Arc<Config>,
        started: Instant,
        workers: Vec<WorkerHandle>,
        driver: DriverInfo,
        max_sessions: usize,
        snapshot: watch::Receiver<Arc<EndpointSnapshot>>,
        discovery: Arc<Status>,
    ) -> Self {
        let draining = AtomicBool::new(false);
        Self { config, started, workers, driver, max_sessions, draining, snapshot, discovery }
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The driver of all workers.
    pub fn driver(&self) -> &DriverInfo {
        &self.driver
    }

    /// The workers, in the order of their numbers.
    pub fn workers(&self) -> &[WorkerHandle] {
        &self.workers
    }

    /// The workers' counters, in the order of their numbers.
    pub fn stats(&self) -> impl Iterator<Item = &WorkerStats> {
        self.workers.iter().map(|worker| &*worker.stats)
    }

    /// The routes, in the order of their numbers.
    pub fn routes(&self) -> impl Iterator<Item = RouteView<'_>> {
        self.config.routes.iter().enumerate().map(|(at, config)| RouteView {
            name: config.name.as_str(),
            config,
            stats: self.stats().map(|stats| &*stats.routes[at]).collect(),
        })
    }

    /// Most sessions at a time in the whole process.
    pub fn max_sessions(&self) -> usize {
        self.max_sessions
    }

    /// Sessions now open in all workers.
    pub fn sessions_active(&self) -> u64 {
        self.stats().map(|stats| stats.sessions.get()).sum()
    }

    /// The snapshot that discovery published last; of generation 0 before the first.
    pub fn snapshot(&self) -> Arc<EndpointSnapshot> {
        Arc::clone(&self.snapshot.borrow())
    }

    /// How discovery fares.
    pub fn discovery(&self) -> &Status {
        &self.discovery
    }

    /// Whether the process was asked to end.
    pub fn draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Makes the process not ready for good.
    pub fn set_draining(&self) {
        self.draining.store(true, Relaxed);
    }

    /// Why the process is not alive, one reason a worker; empty if it is.
    pub fn not_live(&self) -> Vec<String> {
        let now_ms = self.started.elapsed().as_millis() as u64;
        self.stats()
            .enumerate()
            .filter(|(_, stats)| stats.state() != WorkerState::Stopped)
            .map(|(i, stats)| (i, now_ms.saturating_sub(stats.heartbeat_ms.get())))
            .filter(|(_, age_ms)| u128::from(*age_ms) > HEARTBEAT_AGE_MAX.as_millis())
            .map(|(i, age_ms)| format!("worker {i} has not turned for {age_ms} ms"))
            .collect()
    }

    /// Why new sessions should go elsewhere, one reason each; empty if they are welcome.
    pub fn not_ready(&self) -> Vec<String> {
        let mut reasons = self.not_running();
        if self.draining() {
            reasons.push("draining".to_owned());
        }
        let snapshot = self.snapshot();
        if snapshot.endpoints.is_empty() {
            let why = self.discovery.stores_trouble().or_else(|| self.discovery.trouble());
            let why = why.unwrap_or_else(|| "discovery has found none".to_owned());
            reasons.push(format!("no endpoint: {why}"));
        } else if !snapshot.endpoints.iter().any(|endpoint| usable(endpoint)) {
            let count = snapshot.endpoints.len();
            reasons.push(format!("no endpoint usable: all {count} are ejected"));
        }
        reasons
    }

    /// Why the process has not started yet, one reason each; empty once it has.
    pub fn not_started(&self) -> Vec<String> {
        let mut reasons = self.not_running();
        if self.snapshot().generation == 0 {
            let stores = self.discovery.stores_trouble();
            let stores =
                stores.map(|why| format!("which stores share the keys is not known: {why}"));
            let reason = self.discovery.held().or(stores).or_else(|| self.discovery.trouble());
            reasons.push(reason.unwrap_or_else(|| "discovery has not answered yet".to_owned()));
        } else {
            reasons.extend(
                self.stats()
                    .enumerate()
                    .filter(|(_, stats)| stats.routes[0].applied_generation.get() == 0)
                    .map(|(i, _)| format!("worker {i} has no endpoints yet")),
            );
        }
        reasons
    }

    /// Why the process can never start as it is configured, as far as is known: what the source of
    /// endpoints says of the configuration or of rights, where it was not used before.
    pub fn misconfigured(&self) -> Option<String> {
        if self.snapshot().generation > 0 {
            return None;
        }
        // Names are no stores only because of what they stand for.
        let stores = self.discovery.stores_trouble();
        let stores = stores.filter(|_| self.config.routes[0].discovery != Discovery::Kubernetes);
        self.discovery.held().or(stores)
    }

    /// Workers that have not begun, or have ended. Those that drain are shown by `draining`.
    fn not_running(&self) -> Vec<String> {
        let reason = |(i, stats): (usize, &WorkerStats)| match stats.state() {
            WorkerState::Starting => Some(format!("worker {i} is starting")),
            WorkerState::Stopped => Some(format!("worker {i} has ended")),
            WorkerState::Running | WorkerState::Draining => None,
        };
        self.stats().enumerate().filter_map(reason).collect()
    }
}

/// Whether some worker would send a session to `endpoint`. Each worker judges by its own failures,
/// so an endpoint counts as ejected once all of them have ejected it.
pub fn usable(endpoint: &Endpoint) -> bool {
    endpoint.stats.iter().any(|stats| stats.ejected.get() == 0)
}

/// A label for each endpoint, unique in the snapshot: its name, and the address where two share it.
pub fn labels(endpoints: &[Arc<Endpoint>]) -> Vec<String> {
    let mut uses = HashMap::new();
    for endpoint in endpoints {
        *uses.entry(&endpoint.name).or_insert(0) += 1;
    }
    let label = |endpoint: &Arc<Endpoint>| match uses[&endpoint.name] {
        1 => endpoint.name.clone(),
        _ => format!("{}@{}", endpoint.name, endpoint.address),
    };
    endpoints.iter().map(label).collect()
}
