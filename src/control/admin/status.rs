//! The page that the page at `/` is made of: all that there is to see of the process, in JSON.
//!
//! Counters are as they are, so that whoever looks twice knows what has happened in between.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

use super::backends::{state, write_row};
use super::page::Pieces;
use crate::config::{PoolMode, RouteConfig};
use crate::control::diagnosis::Finding;
use crate::control::metrics::ProcessCounts;
use crate::control::view::{RouteView, failure, labels, usable};
use crate::control::{View, logging};
use crate::io::net::Address;
use crate::metrics::{
    Checkout, Direction, Durations, EndpointCounts, Failure, Histogram, LabelSet, Problem,
    RoundTrips, RouteStats, WorkerState, WorkerStats,
};
use crate::proxy::endpoints::Endpoint;

/// Endpoints of a route that are shown at most; `/backends` has them all.
const ENDPOINTS_SHOWN: usize = 64;

/// All of it.
#[derive(Serialize)]
struct Status<'a> {
    version: &'static str,
    arch: &'static str,
    /// Seconds that the process has run.
    alive: f64,
    /// When it began, in seconds since the Unix epoch as of then: it tells one run from another.
    began: f64,
    /// Seconds since the Unix epoch.
    now: f64,
    draining: bool,
    /// In one word, and why.
    health: Health,
    driver: Driver<'a>,
    sessions: Level,
    descriptors: Option<Level>,
    memory_bytes: Option<u64>,
    cpu_seconds: Option<f64>,
    log_lines_dropped: u64,
    workers: Vec<Worker>,
    /// Bounds of the buckets of all phases, in seconds; the last one has none.
    bounds: Vec<Option<f64>>,
    // The routes follow.
}

#[derive(Serialize)]
struct Health {
    word: &'static str,
    reasons: Vec<Reason>,
}

#[derive(Serialize)]
struct Reason {
    problem: &'static str,
    words: String,
    /// For how many seconds it has been so.
    lasts: Option<u64>,
}

#[derive(Serialize)]
struct Driver<'a> {
    name: &'a str,
    why: &'a str,
    kernel: &'a str,
}

/// How much of what there may be there is.
#[derive(Serialize)]
struct Level {
    now: u64,
    max: Option<u64>,
}

#[derive(Serialize)]
struct Worker {
    state: &'static str,
    sessions: u64,
    cpu_seconds: f64,
    core_wait_seconds: f64,
    turns: u64,
    completions: u64,
    buffers_in_use: u64,
    accept_pauses: u64,
}

#[derive(Serialize)]
struct Route<'a> {
    name: &'a str,
    listen: Vec<String>,
    protocol: String,
    pool_mode: String,
    health: Health,
    sessions_active: u64,
    sessions_opened: u64,
    clients_waiting: u64,
    queue: Option<Level>,
    outage_seconds: f64,
    bytes: BTreeMap<&'static str, u64>,
    closed: Vec<Ends>,
    requests: Option<Vec<Ends>>,
    checkouts: BTreeMap<&'static str, u64>,
    phases: BTreeMap<&'static str, Phase>,
    discovery: DiscoveryRow,
    endpoints_total: usize,
    // The endpoints follow.
}

/// How many sessions or requests have ended in one way.
#[derive(Serialize)]
struct Ends {
    how: &'static str,
    words: &'static str,
    count: u64,
}

/// One part of the time that clients wait.
#[derive(Serialize)]
struct Phase {
    sum: f64,
    /// By [`Status::bounds`], not cumulative; what is missing at the end is 0.
    counts: Vec<u64>,
}

#[derive(Serialize)]
struct DiscoveryRow {
    generation: u64,
    /// Seconds since the source answered last, where it is one that is asked.
    age: Option<f64>,
    trouble: Option<String>,
}

#[derive(Serialize)]
struct EndpointRow<'a> {
    name: String,
    address: &'a Address,
    near: bool,
    state: &'static str,
    /// Why it is ejected, if it is.
    why: Option<&'static str>,
    #[serde(flatten)]
    counts: EndpointCounts,
    rtt: Rtt,
}

#[derive(Serialize)]
struct Rtt {
    sum: f64,
    count: u64,
}

/// Writes it, an endpoint a line.
pub(super) async fn write(view: Arc<View>, mut to: Pieces) {
    to.begin().await;
    let findings = view.findings();
    begin(&mut to.text, &status(&view, &findings));
    to.text.push_str(",\"routes\":[");
    let mut before = "\n";
    for (at, route) in view.routes().enumerate() {
        to.text.push_str(before);
        before = "]},\n";
        begin(&mut to.text, &route_row(at, &route, view.max_sessions(), &findings));
        to.text.push_str(",\"endpoints\":[");
        to.pause().await;
        let endpoints = &route.snapshot.endpoints;
        let mut before = "\n  ";
        let mut names = labels(endpoints);
        for at in shown(endpoints) {
            let row = endpoint_row(&endpoints[at], std::mem::take(&mut names[at]));
            write_row(&mut to.text, &mut before, &row);
            to.pause().await;
        }
    }
    // There is at least one route.
    to.text.push_str("]}]}\n");
    to.end().await;
}

/// Writes an object to which members are to be added.
fn begin(text: &mut String, object: &impl Serialize) {
    // Strings and numbers can always be written.
    let object = serde_json::to_string(object).unwrap_or_default();
    text.push_str(object.strip_suffix('}').unwrap_or(&object));
}

fn status<'a>(view: &'a View, findings: &[Finding]) -> Status<'a> {
    let process = ProcessCounts::read().ok();
    let driver = view.driver();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Status {
        version: env!("CARGO_PKG_VERSION"),
        arch: std::env::consts::ARCH,
        alive: view.alive().as_secs_f64(),
        began: view.began().as_secs_f64(),
        now: now.as_secs_f64(),
        draining: view.draining(),
        health: process_health(view, findings),
        driver: Driver { name: driver.driver, why: &driver.reason, kernel: &driver.kernel },
        sessions: Level { now: view.sessions_active(), max: Some(view.max_sessions() as u64) },
        descriptors: process.as_ref().map(|p| Level { now: p.fds as u64, max: p.fds_max }),
        memory_bytes: process.as_ref().map(|process| process.resident_bytes),
        cpu_seconds: process.as_ref().map(|process| process.cpu_seconds),
        log_lines_dropped: logging::lines_dropped(),
        workers: view.stats().map(worker_row).collect(),
        bounds: (0..Histogram::BUCKETS).map(Histogram::upper_bound_seconds).collect(),
    }
}

/// The state of the process: what probes say, and what was found to be wrong.
fn process_health(view: &View, findings: &[Finding]) -> Health {
    let (not_live, not_started) = (view.not_live(), view.not_started());
    let found = Health::of(findings.iter().filter(|finding| finding.route.is_none()));
    let (word, reasons) = if !not_live.is_empty() {
        ("stuck", not_live)
    } else if view.draining() {
        ("draining", Vec::new())
    } else if !not_started.is_empty() {
        ("starting", not_started)
    } else {
        match view.not_ready() {
            not_ready if not_ready.is_empty() => (found.word, not_ready),
            not_ready => ("down", not_ready),
        }
    };
    // Sessions pile up at their limit because there is no endpoint: both are to be seen.
    let reasons = reasons.into_iter().map(Reason::plain).chain(found.reasons).collect();
    Health { word, reasons }
}

impl Health {
    /// That of what these findings are about.
    fn of<'a>(findings: impl Iterator<Item = &'a Finding>) -> Self {
        let found: Vec<_> = findings.collect();
        let word = match found.iter().map(|finding| finding.problem) {
            problems if problems.clone().any(|problem| problem == Problem::NoEndpoint) => "down",
            problems if problems.len() > 0 => "degraded",
            _ => "fine",
        };
        Self { word, reasons: found.into_iter().map(Reason::of).collect() }
    }
}

impl Reason {
    fn plain(words: String) -> Self {
        Self { problem: "", words, lasts: None }
    }

    fn of(finding: &Finding) -> Self {
        Self {
            problem: finding.problem.name(),
            words: finding.words.clone(),
            lasts: Some(finding.since.elapsed().as_secs()),
        }
    }
}

fn worker_row(stats: &WorkerStats) -> Worker {
    Worker {
        state: match stats.state() {
            WorkerState::Starting => "starting",
            WorkerState::Running => "running",
            WorkerState::Draining => "draining",
            WorkerState::Stopped => "ended",
        },
        sessions: stats.sessions.get(),
        cpu_seconds: stats.cpu.get().as_secs_f64(),
        core_wait_seconds: stats.core_wait.get().as_secs_f64(),
        turns: stats.turns.get(),
        completions: stats.completions.get(),
        buffers_in_use: stats.buffers_in_use.get(),
        accept_pauses: stats.accept_pauses.get(),
    }
}

fn route_row<'a>(
    at: usize,
    route: &RouteView<'a>,
    max_sessions: usize,
    findings: &[Finding],
) -> Route<'a> {
    let config: &RouteConfig = route.config;
    let of_route = findings.iter().filter(|finding| finding.route == Some(at));
    let health = match route.snapshot.generation {
        0 => Health {
            word: "starting",
            reasons: route.not_started().into_iter().map(Reason::plain).collect(),
        },
        _ => Health::of(of_route),
    };
    let is_shared = config.pool.mode != PoolMode::Preconnect;
    // Of each client one request waits at a time.
    let queue_max = (config.requests.queue_max * route.stats.len()).min(max_sessions);
    let queue =
        Level { now: sum(route, |stats| stats.queue_depth.get()), max: Some(queue_max as u64) };
    Route {
        name: route.name,
        listen: config.listen.iter().map(ToString::to_string).collect(),
        protocol: config.protocol.to_string(),
        pool_mode: config.pool.mode.to_string(),
        health,
        sessions_active: sum(route, |stats| stats.sessions_active.get()),
        sessions_opened: sum(route, |stats| stats.sessions_opened.get()),
        clients_waiting: sum(route, |stats| stats.clients_waiting.get()),
        queue: is_shared.then_some(queue),
        outage_seconds: route.stats.iter().map(|stats| stats.outage.get().as_secs_f64()).sum(),
        bytes: by(route, |stats, direction: Direction| stats.bytes.of(direction).get()),
        closed: ends(route, RouteStats::closed),
        requests: is_shared.then(|| ends(route, RouteStats::requests_ended)),
        checkouts: by(route, |stats, result: Checkout| stats.checkouts.of(result).get()),
        phases: phases(route),
        discovery: DiscoveryRow {
            generation: route.snapshot.generation,
            age: route.discovery.sync_age().map(|age| age.as_secs_f64()),
            trouble: route.discovery.trouble(),
        },
        endpoints_total: route.snapshot.endpoints.len(),
    }
}

fn sum(route: &RouteView<'_>, of: fn(&RouteStats) -> u64) -> u64 {
    route.stats.iter().map(|stats| of(stats)).sum()
}

/// What is counted by a label, without the values that have not come up.
fn by<L: LabelSet>(
    route: &RouteView<'_>,
    of: fn(&RouteStats, L) -> u64,
) -> BTreeMap<&'static str, u64> {
    let count = |&label: &L| route.stats.iter().map(|stats| of(stats, label)).sum::<u64>();
    let all = L::ALL.iter().map(|label| (label.name(), count(label)));
    all.filter(|(_, count)| *count > 0).collect()
}

fn ends<L: LabelSet>(route: &RouteView<'_>, of: fn(&RouteStats, L) -> u64) -> Vec<Ends> {
    let counts = by(route, of);
    let rows = L::ROWS.iter().filter_map(|row| {
        Some(Ends { how: row.name, words: row.help, count: *counts.get(row.name)? })
    });
    rows.collect()
}

/// The parts of the time that clients wait, in their order: a reader finds the slow one.
fn phases(route: &RouteView<'_>) -> BTreeMap<&'static str, Phase> {
    let phase = |of: fn(&RouteStats) -> &Histogram| {
        let each = route.stats.iter().map(|stats| of(stats).read());
        let total = each.reduce(Durations::plus);
        let Durations { mut counts, sum, .. } =
            total.unwrap_or_else(|| unreachable!("a process has workers"));
        counts.truncate(counts.iter().rposition(|&count| count > 0).map_or(0, |last| last + 1));
        Phase { sum, counts }
    };
    [
        ("queue", phase(|stats| &stats.queue_wait)),
        ("connect", phase(|stats| &stats.connect_duration)),
        ("first_byte", phase(|stats| &stats.first_byte)),
        ("transfer", phase(|stats| &stats.transfer)),
    ]
    .into()
}

/// Which endpoints are shown, in their order: those that are not usable are, if others are left out.
fn shown(endpoints: &[Arc<Endpoint>]) -> Vec<usize> {
    let (well, unwell): (Vec<_>, Vec<_>) =
        (0..endpoints.len()).partition(|&at| usable(&endpoints[at]));
    let mut shown: Vec<_> = unwell.into_iter().chain(well).take(ENDPOINTS_SHOWN).collect();
    shown.sort_unstable();
    shown
}

fn endpoint_row(endpoint: &Endpoint, name: String) -> EndpointRow<'_> {
    let is_usable = usable(endpoint);
    let rtt = RoundTrips::total(endpoint.stats.iter().map(|stats| &stats.rtt));
    EndpointRow {
        name,
        address: &endpoint.address,
        near: endpoint.is_near(),
        state: state(endpoint.fails_check(), is_usable),
        why: if endpoint.fails_check() {
            Some("fails its checks")
        } else {
            failure(endpoint).filter(|_| !is_usable).map(Failure::name)
        },
        counts: EndpointCounts::total(&endpoint.stats),
        rtt: Rtt { sum: rtt.sum, count: rtt.counts.iter().sum() },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::control::admin::page::whole;
    use crate::control::testing::{config, endpoint, view};
    use crate::metrics::CloseReason;

    fn read(view: View) -> serde_json::Value {
        let view = Arc::new(view);
        serde_json::from_str(&whole(|pieces| write(view, pieces))).unwrap()
    }

    #[test]
    fn all_workers_are_added_up() {
        let view = view(config(), vec![endpoint("db", "10.0.0.1:1")]);
        for worker in view.workers() {
            let stats = &worker.stats.routes[0];
            stats.sessions_opened.add(2);
            stats.count_close(CloseReason::ClientReset);
            stats.first_byte.record(Duration::from_micros(60));
            stats.first_byte.record(Duration::from_micros(10));
        }
        let found = read(view);
        assert_eq!(found["health"]["word"], "fine");
        let route = &found["routes"][0];
        assert_eq!(route["health"]["word"], "fine");
        assert_eq!(route["sessions_opened"], 4);
        let closed = route["closed"].as_array().unwrap();
        assert_eq!(closed.len(), 1, "what has not come up is not there: {closed:?}");
        assert_eq!((&closed[0]["how"], &closed[0]["count"]), (&"client_reset".into(), &2.into()));
        assert_eq!(route["phases"]["first_byte"]["counts"], serde_json::json!([2, 2]));
        assert_eq!(route["endpoints"][0]["name"], "db");
        assert_eq!(route["endpoints"][0]["state"], "usable");
        assert_eq!(found["bounds"][0], 0.00005);
        assert_eq!(found["workers"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn of_many_endpoints_those_that_are_unwell_are_shown() {
        let endpoints: Vec<_> =
            (0..100).map(|at| endpoint(&format!("db-{at:02}"), "10.0.0.1:1")).collect();
        for at in [3, 98] {
            endpoints[at].stats.iter().for_each(|stats| stats.ejected.set(1));
        }
        let found = read(view(config(), endpoints));
        let route = &found["routes"][0];
        let rows = route["endpoints"].as_array().unwrap();
        let names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
        let first = (0..63).map(|at| format!("db-{at:02}"));
        assert_eq!(names, first.chain(["db-98".to_owned()]).collect::<Vec<_>>());
        assert_eq!(
            (&route["endpoints_total"], &rows[63]["state"]),
            (&100.into(), &"ejected".into())
        );
    }

    #[test]
    fn a_run_is_told_from_another_by_when_it_began() {
        let began = |view: &Arc<View>| {
            let view = Arc::clone(view);
            let page = whole(|pieces| write(view, pieces));
            serde_json::from_str::<serde_json::Value>(&page).unwrap()["began"].clone()
        };
        let [first, second] = [(); 2].map(|()| Arc::new(view(config(), Vec::new())));
        assert_eq!(began(&first), began(&first));
        assert_ne!(began(&first), began(&second));
    }

    #[test]
    fn of_many_endpoints_some_are_shown() {
        let endpoints = (1..=250).map(|i| endpoint("db", &format!("10.0.0.{i}:1"))).collect();
        let found = read(view(config(), endpoints));
        assert_eq!(found["routes"][0]["endpoints_total"], 250);
        assert_eq!(found["routes"][0]["endpoints"].as_array().unwrap().len(), ENDPOINTS_SHOWN);
    }

    #[test]
    fn what_is_wrong_is_said_in_one_word_and_why() {
        let view = view(config(), vec![endpoint("db", "10.0.0.1:1")]);
        let since = std::time::Instant::now();
        let words = "db refuses".to_owned();
        let found = |problem| {
            let words = words.clone();
            Finding { problem, route: Some(0), words, since, found_at: since, looks: 3 }
        };
        view.set_findings(vec![found(Problem::BackendRefusing)]);
        let page = read(view);
        assert_eq!(page["health"]["word"], "fine", "the process is");
        let health = &page["routes"][0]["health"];
        assert_eq!(health["word"], "degraded");
        assert_eq!(health["reasons"][0]["problem"], "backend_refusing");
        assert_eq!(health["reasons"][0]["words"], "db refuses");
    }

    #[test]
    fn a_process_without_endpoints_says_what_else_is_wrong() {
        let view = view(config(), Vec::new());
        let (since, words) = (std::time::Instant::now(), "8 of 8 sessions are open".to_owned());
        let problem = Problem::SessionLimit;
        let limit = Finding { problem, route: None, words, since, found_at: since, looks: 3 };
        view.set_findings(vec![limit]);
        let found = |page: &serde_json::Value| {
            let reasons = page["health"]["reasons"].as_array().unwrap().clone();
            let problems = reasons.into_iter().map(|reason| reason["problem"].clone());
            (page["health"]["word"].clone(), problems.collect::<Vec<_>>())
        };
        let view = Arc::new(view);
        let page = |view: &Arc<View>| {
            let view = Arc::clone(view);
            serde_json::from_str(&whole(|pieces| write(view, pieces))).unwrap()
        };
        assert_eq!(found(&page(&view)), ("down".into(), vec!["".into(), "session_limit".into()]));
        view.set_draining();
        assert_eq!(found(&page(&view)), ("draining".into(), vec!["session_limit".into()]));
    }
}
