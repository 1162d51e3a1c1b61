//! What the process looks like from outside at one moment: read from counters, disturbs no worker.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::diagnosis::Finding;
use super::discovery::status::Status;
use super::{DriverInfo, WorkerHandle};
use crate::config::{Config, Discovery, RouteConfig};
use crate::metrics::{EndpointStats, Failure, RouteStats, WorkerState, WorkerStats};
use crate::proxy::endpoints::{Endpoint, EndpointSnapshot};

/// A worker that did not turn for this long is stuck: an idle one turns once a second.
pub const HEARTBEAT_AGE_MAX: Duration = Duration::from_secs(10);

/// The state of the process as the admin server shows it.
#[derive(Debug)]
pub struct View {
    config: Arc<Config>,
    started: Instant,
    /// The same since the Unix epoch, as the clock was then.
    began: Duration,
    workers: Vec<WorkerHandle>,
    driver: DriverInfo,
    max_sessions: usize,
    draining: AtomicBool,
    /// Of each route, by their numbers.
    discovery: Vec<Discovered>,
    findings: Mutex<Vec<Finding>>,
}

/// What discovery shows of one route.
#[derive(Debug)]
pub struct Discovered {
    /// The snapshots that it publishes.
    pub snapshot: watch::Receiver<Arc<EndpointSnapshot>>,
    /// How it fares.
    pub status: Arc<Status>,
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
    /// The snapshot that discovery published last; of generation 0 before the first.
    pub snapshot: Arc<EndpointSnapshot>,
    /// How discovery fares.
    pub discovery: &'a Status,
}

impl RouteView<'_> {
    /// Why there is nowhere to send its clients, if so.
    pub fn not_ready(&self) -> Option<String> {
        let endpoints = &self.snapshot.endpoints;
        if endpoints.is_empty() {
            let why = self.discovery.stores_trouble().or_else(|| self.discovery.trouble());
            let why = why.unwrap_or_else(|| "discovery has found none".to_owned());
            return Some(format!("no endpoint: {why}"));
        }
        let is_usable = endpoints.iter().any(|endpoint| usable(endpoint));
        let failing = endpoints.iter().filter(|endpoint| endpoint.fails_check()).count();
        let checks = if failing > 0 { " or fail their checks" } else { "" };
        let why = || format!("no endpoint usable: all {} are ejected{checks}", endpoints.len());
        (!is_usable).then(why)
    }

    /// Why it has not started yet, one reason each.
    pub fn not_started(&self) -> Vec<String> {
        if self.snapshot.generation == 0 {
            let stores = self.discovery.stores_trouble();
            let stores =
                stores.map(|why| format!("which stores share the keys is not known: {why}"));
            let reason = self.discovery.held().or(stores).or_else(|| self.discovery.trouble());
            return vec![reason.unwrap_or_else(|| "discovery has not answered yet".to_owned())];
        }
        let applied = self.stats.iter().map(|stats| stats.applied_generation.get());
        let not_applied = applied.enumerate().filter(|(_, generation)| *generation == 0);
        not_applied.map(|(i, _)| format!("worker {i} has no endpoints yet")).collect()
    }

    /// Why it can never start as it is configured, as far as is known.
    fn misconfigured(&self) -> Option<String> {
        if self.snapshot.generation > 0 {
            return None;
        }
        // Names are no stores only because of what they stand for.
        let stores = self.discovery.stores_trouble();
        let stores = stores.filter(|_| self.config.discovery != Discovery::Kubernetes);
        self.discovery.held().or(stores)
    }
}

impl View {
    /// A view of these workers, not draining, which follows the discovery of each route.
    pub fn new(
        config: Arc<Config>,
        started: Instant,
        workers: Vec<WorkerHandle>,
        driver: DriverInfo,
        max_sessions: usize,
        discovery: Vec<Discovered>,
    ) -> Self {
        assert_eq!(config.routes.len(), discovery.len(), "each route has its own");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let began = now.saturating_sub(started.elapsed());
        let (draining, findings) = (AtomicBool::new(false), Mutex::default());
        Self {
            config,
            started,
            began,
            workers,
            driver,
            max_sessions,
            draining,
            discovery,
            findings,
        }
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
        let routes = self.config.routes.iter().zip(&self.discovery).enumerate();
        routes.map(|(at, (config, discovery))| RouteView {
            name: config.name.as_str(),
            config,
            stats: self.stats().map(|stats| &*stats.routes[at]).collect(),
            snapshot: Arc::clone(&discovery.snapshot.borrow()),
            discovery: &discovery.status,
        })
    }

    /// When the process began, since the Unix epoch. The same for as long as it runs, whatever becomes of
    /// the clock.
    pub fn began(&self) -> Duration {
        self.began
    }

    /// For how long the process has run.
    pub fn alive(&self) -> Duration {
        self.started.elapsed()
    }

    /// Most sessions at a time in the whole process.
    pub fn max_sessions(&self) -> usize {
        self.max_sessions
    }

    /// Sessions now open in all workers.
    pub fn sessions_active(&self) -> u64 {
        self.stats().map(|stats| stats.sessions.get()).sum()
    }

    /// Whether the process was asked to end.
    pub fn draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Makes the process not ready for good.
    pub fn set_draining(&self) {
        self.draining.store(true, Relaxed);
    }

    /// What is wrong, as was found at the latest look.
    pub fn findings(&self) -> Vec<Finding> {
        self.lock_findings().clone()
    }

    /// This is wrong now. Returns what was until now.
    pub fn set_findings(&self, now: Vec<Finding>) -> Vec<Finding> {
        std::mem::replace(&mut self.lock_findings(), now)
    }

    fn lock_findings(&self) -> MutexGuard<'_, Vec<Finding>> {
        // Whoever panicked left a whole list behind.
        self.findings.lock().unwrap_or_else(PoisonError::into_inner)
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
    ///
    /// While one route has an endpoint the others' outages are no reason: its clients would suffer from
    /// what they have nothing to do with. In the beginning all have to be there.
    pub fn not_ready(&self) -> Vec<String> {
        let mut reasons = self.not_running();
        if self.draining() {
            reasons.push("draining".to_owned());
        }
        let routes: Vec<_> = self.routes().map(|route| (route.not_ready(), route)).collect();
        let all_began = routes.iter().all(|(_, route)| route.snapshot.generation > 0);
        if all_began && routes.iter().any(|(reason, _)| reason.is_none()) {
            return reasons;
        }
        let of_routes =
            routes.into_iter().filter_map(|(reason, route)| Some((route.name, reason?)));
        reasons.extend(of_routes.map(|(name, reason)| self.of_route(name, &reason)));
        reasons
    }

    /// Why the process has not started yet, one reason each; empty once it has.
    pub fn not_started(&self) -> Vec<String> {
        let mut reasons = self.not_running();
        for route in self.routes() {
            let of_route = route.not_started().into_iter();
            reasons.extend(of_route.map(|reason| self.of_route(route.name, &reason)));
        }
        reasons
    }

    /// Why the process can never start as it is configured, as far as is known: what the sources of
    /// endpoints say of the configuration or of rights, where they were not used before.
    pub fn misconfigured(&self) -> Option<String> {
        let routes = self.routes();
        let reasons: Vec<_> = routes
            .filter_map(|route| Some(self.of_route(route.name, &route.misconfigured()?)))
            .collect();
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }

    /// A reason with the name of its route, where there are several.
    fn of_route(&self, name: &str, reason: &str) -> String {
        if self.config.routes.len() > 1 {
            format!("route {name}: {reason}")
        } else {
            reason.to_owned()
        }
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
/// so an endpoint counts as ejected once all of them have ejected it; its checks are made for all.
pub fn usable(endpoint: &Endpoint) -> bool {
    !endpoint.fails_check() && endpoint.stats.iter().any(|stats| stats.ejected.get() == 0)
}

/// How an endpoint has failed last, as far as any worker knows. For one that has found it well since, that
/// is the past; and one that has heard something knows more than one that has heard nothing.
pub fn failure(endpoint: &Endpoint) -> Option<Failure> {
    let known = |stats: &EndpointStats| {
        let failure = stats.failure()?;
        let is_past = stats.failures_in_a_row.get() == 0 && stats.ejected.get() == 0;
        Some(((is_past, failure == Failure::TimedOut), failure))
    };
    let all = endpoint.stats.iter().filter_map(known);
    all.min_by_key(|(order, _)| *order).map(|(_, failure)| failure)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::testing::{self, endpoint};

    /// A view of two routes, each with its generation and an endpoint or none.
    fn two_routes(routes: [(u64, bool); 2]) -> View {
        let vars = [
            ("AEGIS_ROUTES", "orders,cache"),
            ("AEGIS_LISTEN", "127.0.0.1:0"),
            ("AEGIS_CACHE__BACKENDS", "db:1"),
        ];
        let vars = vars.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let routes = routes.map(|(generation, has_endpoint)| {
            let endpoints = has_endpoint.then(|| endpoint("db", "10.0.0.1:1"));
            (generation, endpoints.into_iter().collect())
        });
        testing::view_of_routes(Instant::now(), Config::from_vars(vars).unwrap(), routes.into())
    }

    #[test]
    fn a_process_is_ready_while_one_of_its_routes_is_and_all_have_begun() {
        let none = "no endpoint: discovery has found none";
        let of = |route: &str| format!("route {route}: {none}");
        for (routes, expected) in [
            ([(1, true), (1, true)], vec![]),
            ([(1, true), (2, false)], vec![]),
            ([(1, false), (2, true)], vec![]),
            ([(1, false), (2, false)], vec![of("orders"), of("cache")]),
            ([(1, true), (0, false)], vec![of("cache")]),
        ] {
            assert_eq!(two_routes(routes).not_ready(), expected, "{routes:?}");
        }
        let view = two_routes([(1, true), (1, true)]);
        let eject = |route: usize| {
            let route = view.routes().nth(route).unwrap();
            route.snapshot.endpoints[0].stats.iter().for_each(|stats| stats.ejected.set(1));
        };
        eject(0);
        assert_eq!(view.not_ready(), [""; 0]);
        eject(1);
        assert_eq!(view.not_ready().len(), 2, "{:?}", view.not_ready());
    }

    #[test]
    fn the_start_is_over_when_every_route_has_begun() {
        assert_eq!(two_routes([(1, true), (1, false)]).not_started(), [""; 0]);
        let view = two_routes([(1, true), (0, false)]);
        assert_eq!(view.not_started(), ["route cache: discovery has not answered yet"]);
        assert_eq!(view.misconfigured(), None);
        let status = &view.discovery[1].status;
        status.hold("test", Some("no rights".to_owned()));
        assert_eq!(view.not_started(), ["route cache: no rights"]);
        assert_eq!(view.misconfigured().unwrap(), "route cache: no rights");
    }
}
