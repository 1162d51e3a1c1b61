//! The page `/metrics`: what workers count, and what is read when it is asked for, a piece at a time.
//!
//! A scrape only reads memory that workers write anyway, and `/proc/self`. What there is to tell and
//! how it is written is decided in [`crate::metrics`].

use std::fmt::Display;
use std::sync::Arc;

use procfs::WithCurrentSystemInfo;
use procfs::process::{LimitValue, Process};

use super::admin::page::Pieces;
use super::view::{RouteView, labels, usable};
use super::{View, logging};
use crate::config::RouteConfig;
use crate::metrics::counted::Row;
use crate::metrics::family::Family;
use crate::metrics::scraped::{
    BUILD_INFO, CPU_SECONDS, DISCOVERY_ENDPOINTS, DISCOVERY_ERRORS, DISCOVERY_GENERATION,
    DISCOVERY_LAST_SYNC, DISCOVERY_SNAPSHOT_AGE, DRAINING, ENDPOINT_CHECK_FAILURES,
    ENDPOINT_CHECKS, ENDPOINT_RTT, ENDPOINT_USABLE, ENDS_DROPPED, IO_DRIVER_INFO,
    LOG_LINES_DROPPED, MAX_FDS, MAX_SESSIONS, OPEN_FDS, POOL_CONNECTIONS, PROBLEM, RESIDENT_MEMORY,
    START_TIME, STORE_PRESENT, THREADS, VIRTUAL_MEMORY,
};
use crate::metrics::text::{durations, family, sample, single};
use crate::metrics::{
    CheckStats, EndpointCounts, EndpointStats, ErrorKind, LabelSet, PooledState, Problem,
    RoundTrips, RouteStats, WorkerStats,
};

/// Writes all metrics of the process, each as of the moment when it is written.
pub async fn render(view: Arc<View>, mut to: Pieces) {
    to.begin().await;
    write_routes(&mut to, &view).await;
    write_workers(&mut to, &view).await;
    write_discovery(&mut to, &view).await;
    write_endpoints(&mut to, &view).await;
    write_identity(&mut to.text, &view);
    if let Ok(process) = ProcessCounts::read() {
        process.write(&mut to.text);
    }
    to.end().await;
}

async fn write_workers(to: &mut Pieces, view: &View) {
    let workers: Vec<_> = view.stats().collect();
    for row in WorkerStats::ROWS {
        family(&mut to.text, &row.family);
        // No series of a worker's own depends on it.
        write_row(to, row, &view.config().routes[0], None, &workers).await;
    }
}

async fn write_routes(to: &mut Pieces, view: &View) {
    for row in RouteStats::ROWS {
        let routes: Vec<_> = view.routes().filter(|r| row.family.when.holds(r.config)).collect();
        if !routes.is_empty() {
            family(&mut to.text, &row.family);
        }
        for route in routes {
            write_row(to, row, route.config, Some(route.name), &route.stats).await;
        }
    }
}

async fn write_row<S>(
    to: &mut Pieces,
    row: &Row<S>,
    config: &RouteConfig,
    route: Option<&str>,
    workers: &[&S],
) {
    let series = row.series(config);
    let together = if row.per_worker() { 1 } else { workers.len() };
    for (number, workers) in workers.chunks(together).enumerate() {
        for one in &series {
            row.write(&mut to.text, (number, route), workers, one);
            to.pause().await;
        }
    }
}

async fn write_discovery(to: &mut Pieces, view: &View) {
    let routes: Vec<_> = view.routes().collect();
    each(&mut to.text, &DISCOVERY_GENERATION, &routes, |route| Some(route.snapshot.generation));
    each(&mut to.text, &DISCOVERY_ENDPOINTS, &routes, |r| Some(r.snapshot.endpoints.len()));
    if routes.iter().any(|route| !route.snapshot.stores.is_empty()) {
        family(&mut to.text, &STORE_PRESENT);
    }
    for route in &routes {
        for store in &route.snapshot.stores {
            let present = u8::from(store.endpoint.is_some());
            sample(&mut to.text, &STORE_PRESENT, &[route.name, &store.name], present);
            to.pause().await;
        }
    }
    let last_sync = |route: &RouteView<'_>| Some(route.discovery.last_sync_seconds());
    each(&mut to.text, &DISCOVERY_LAST_SYNC, &routes, last_sync);
    let saved_age = |route: &RouteView<'_>| route.discovery.saved_age().map(|age| age.as_secs());
    each(&mut to.text, &DISCOVERY_SNAPSHOT_AGE, &routes, saved_age);
    family(&mut to.text, &DISCOVERY_ERRORS);
    for route in &routes {
        for &kind in ErrorKind::ALL {
            let errors = route.discovery.errors(kind);
            sample(&mut to.text, &DISCOVERY_ERRORS, &[route.name, kind.name()], errors);
        }
    }
}

/// Writes one number of each route that has it.
fn each<T: Display>(
    text: &mut String,
    row: &Family,
    routes: &[RouteView<'_>],
    value: impl Fn(&RouteView<'_>) -> Option<T>,
) {
    let values: Vec<_> =
        routes.iter().filter_map(|route| Some((route.name, value(route)?))).collect();
    if !values.is_empty() {
        family(text, row);
    }
    for (name, value) in values {
        sample(text, row, &[name], value);
    }
}

async fn write_endpoints(to: &mut Pieces, view: &View) {
    let routes: Vec<_> = view.routes().collect();
    let labels: Vec<_> = routes.iter().map(|route| labels(&route.snapshot.endpoints)).collect();
    let mut labelled = Vec::new();
    for (route, labels) in routes.iter().zip(&labels) {
        let endpoints = labels.iter().zip(&route.snapshot.endpoints);
        labelled.extend(endpoints.map(|(label, endpoint)| (route, label, endpoint)));
    }
    for row in EndpointStats::rows() {
        family(&mut to.text, &row.family);
        for (route, label, endpoint) in &labelled {
            let counts = EndpointCounts::total(&endpoint.stats);
            sample(&mut to.text, &row.family, &[route.name, label], (row.read)(&counts));
            to.pause().await;
        }
    }

    family(&mut to.text, &ENDPOINT_USABLE);
    for (route, label, endpoint) in &labelled {
        let usable = u8::from(usable(endpoint));
        sample(&mut to.text, &ENDPOINT_USABLE, &[route.name, label], usable);
        to.pause().await;
    }

    for row in [&ENDPOINT_CHECKS, &ENDPOINT_CHECK_FAILURES] {
        let checked = || labelled.iter().filter(|(route, ..)| row.when.holds(route.config));
        if checked().next().is_some() {
            family(&mut to.text, row);
        }
        for (route, label, endpoint) in checked() {
            let CheckStats { made, failed } = &endpoint.checks;
            let count = if row.name == ENDPOINT_CHECKS.name { made } else { failed };
            sample(&mut to.text, row, &[route.name, label], count.get());
            to.pause().await;
        }
    }

    family(&mut to.text, &ENDPOINT_RTT);
    for (route, label, endpoint) in &labelled {
        let all = RoundTrips::total(endpoint.stats.iter().map(|stats| &stats.rtt));
        durations(&mut to.text, &ENDPOINT_RTT, &[route.name, label], &all);
        to.pause().await;
    }

    family(&mut to.text, &POOL_CONNECTIONS);
    for (route, label, endpoint) in &labelled {
        let counts = EndpointCounts::total(&endpoint.stats);
        for state in PooledState::shown(route.config) {
            let count = pooled(&counts, state);
            sample(&mut to.text, &POOL_CONNECTIONS, &[route.name, label, state.name()], count);
        }
        to.pause().await;
    }
}

/// Pooled connections of an endpoint in this state.
fn pooled(counts: &EndpointCounts, state: PooledState) -> u64 {
    match state {
        PooledState::Idle => counts.pool_idle,
        PooledState::Connecting => counts.pool_connecting,
        // The two are not read at the same moment.
        PooledState::InUse => counts.sessions_active.saturating_sub(counts.sessions_opaque),
        PooledState::Opaque => counts.sessions_opaque,
    }
}

fn write_problems(text: &mut String, view: &View) {
    let found = view.findings();
    let is = |problem, route| {
        u8::from(found.iter().any(|one| (one.problem, one.route) == (problem, route)))
    };
    family(text, &PROBLEM);
    for &problem in Problem::ALL {
        if problem.is_of_process() {
            sample(text, &PROBLEM, &["", problem.name()], is(problem, None));
            continue;
        }
        for (at, route) in view.config().routes.iter().enumerate() {
            sample(text, &PROBLEM, &[route.name.as_str(), problem.name()], is(problem, Some(at)));
        }
    }
}

fn write_identity(text: &mut String, view: &View) {
    write_problems(text, view);
    single(text, &MAX_SESSIONS, view.max_sessions());
    single(text, &DRAINING, u8::from(view.draining()));
    single(text, &LOG_LINES_DROPPED, logging::lines_dropped());
    single(text, &ENDS_DROPPED, view.workers().iter().map(|w| w.ends.dropped()).sum::<u64>());
    let driver = view.driver();
    family(text, &IO_DRIVER_INFO);
    sample(text, &IO_DRIVER_INFO, &[driver.driver, &driver.reason, &driver.kernel], 1);
    family(text, &BUILD_INFO);
    sample(text, &BUILD_INFO, &[env!("CARGO_PKG_VERSION"), std::env::consts::ARCH], 1);
}

/// The process metrics that Prometheus client libraries agree on.
pub(super) struct ProcessCounts {
    pub(super) cpu_seconds: f64,
    start_seconds: f64,
    pub(super) resident_bytes: u64,
    virtual_bytes: u64,
    threads: i64,
    pub(super) fds: usize,
    pub(super) fds_max: Option<u64>,
}

impl ProcessCounts {
    pub(super) fn read() -> procfs::ProcResult<Self> {
        let process = Process::myself()?;
        let stat = process.stat()?;
        let ticks = procfs::ticks_per_second() as f64;
        Ok(Self {
            cpu_seconds: (stat.utime + stat.stime) as f64 / ticks,
            start_seconds: procfs::boot_time_secs()? as f64 + stat.starttime as f64 / ticks,
            resident_bytes: stat.rss_bytes().get(),
            virtual_bytes: stat.vsize,
            threads: stat.num_threads,
            fds: process.fd_count()?,
            fds_max: match process.limits()?.max_open_files.soft_limit {
                LimitValue::Value(limit) => Some(limit),
                LimitValue::Unlimited => None,
            },
        })
    }

    fn write(&self, text: &mut String) {
        single(text, &CPU_SECONDS, self.cpu_seconds);
        single(text, &START_TIME, self.start_seconds);
        single(text, &RESIDENT_MEMORY, self.resident_bytes);
        single(text, &VIRTUAL_MEMORY, self.virtual_bytes);
        single(text, &THREADS, self.threads);
        single(text, &OPEN_FDS, self.fds);
        if let Some(limit) = self.fds_max {
            single(text, &MAX_FDS, limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;
    use crate::config::{Locality, PoolMode, Protocol};
    use crate::control::admin::page::whole;
    use crate::control::testing::{config, endpoint, view, view_of_routes};
    use crate::metrics::{Checkout, CloseReason, Histogram, sections};

    /// There are no stores, no former run, and maybe no limit.
    const NOT_HERE: [&str; 3] = [STORE_PRESENT.name, DISCOVERY_SNAPSHOT_AGE.name, MAX_FDS.name];

    fn text_of(view: View) -> String {
        whole(|pieces| render(Arc::new(view), pieces))
    }

    fn busy_view() -> View {
        let endpoints = vec![
            endpoint("db:5432", "10.0.0.1:5432"),
            endpoint("db:5432", "10.0.0.2:5432"),
            endpoint("pod-\"0\"\\\n", "[::1]:5432"),
        ];
        endpoints[0].stats[1].pool_idle.set(3);
        endpoints[2].stats.iter().for_each(|stats| stats.ejected.set(1));
        let view = view(config(), endpoints);
        for (i, stats) in view.stats().enumerate() {
            stats.core_wait.set(Duration::from_millis(1500));
            let stats = &stats.routes[0];
            stats.sessions_opened.add(10 + i as u64);
            stats.count_close(CloseReason::ClientReset);
            stats.count_checkout(Checkout::Hit);
            stats.connect_duration.record(Duration::from_micros(60));
            stats.connect_duration.record(Duration::from_secs(360_000));
        }
        view
    }

    /// The samples by name and labels. Checks the form of every line on the way.
    fn parse(text: &str) -> HashMap<&str, f64> {
        let (mut helped, mut typed) = (HashSet::new(), HashMap::new());
        let mut samples = HashMap::new();
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').unwrap();
                assert!(helped.insert(name), "{name} is helped twice");
                assert!(help.ends_with('.'), "{help}");
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert!(helped.contains(name) && typed.insert(name, kind).is_none(), "{name}");
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let name = series.split('{').next().unwrap();
                let family = ["_bucket", "_sum", "_count"]
                    .iter()
                    .find_map(|suffix| name.strip_suffix(suffix))
                    .filter(|family| typed.get(family) == Some(&"histogram"))
                    .unwrap_or(name);
                assert!(typed.contains_key(family), "{series} has no type");
                let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
                assert!(samples.insert(series, value).is_none(), "{series} comes twice");
            }
        }
        assert_eq!(helped.len(), typed.len());
        samples
    }

    #[test]
    fn every_sample_belongs_to_a_family_and_says_what_was_counted() {
        let text = text_of(busy_view());
        let samples = parse(&text);
        for (series, value) in [
            ("aegis_sessions_opened_total{worker=\"1\",route=\"default\"}", 11.0),
            (
                "aegis_sessions_closed_total{worker=\"0\",route=\"default\",reason=\"client_reset\"}",
                1.0,
            ),
            ("aegis_worker_core_wait_seconds_total{worker=\"1\"}", 1.5),
            ("aegis_pool_checkouts_total{route=\"default\",result=\"hit\"}", 2.0),
            (
                "aegis_pool_connections{route=\"default\",endpoint=\"db:5432@10.0.0.1:5432\",state=\"idle\"}",
                3.0,
            ),
            ("aegis_endpoint_usable{route=\"default\",endpoint=\"db:5432@10.0.0.2:5432\"}", 1.0),
            ("aegis_endpoint_usable{route=\"default\",endpoint=\"pod-\\\"0\\\"\\\\\\n\"}", 0.0),
            ("aegis_discovery_generation{route=\"default\"}", 1.0),
            ("aegis_draining", 0.0),
        ] {
            assert_eq!(samples.get(series), Some(&value), "{series}");
        }
        assert!(samples["process_resident_memory_bytes"] > 0.0);
        assert!(samples["process_open_fds"] > 0.0);
    }

    #[test]
    fn what_can_never_move_is_not_shown() {
        let shown = |mode, protocol| {
            let mut config = config();
            let route = Arc::make_mut(&mut config.routes[0]);
            route.pool.mode = mode;
            route.protocol = protocol;
            let text = text_of(view(config, vec![endpoint("db:1", "10.0.0.1:1")]));
            move |part: &str| text.contains(part)
        };
        let opaque_session = shown(PoolMode::Preconnect, Protocol::Tcp);
        let lines = shown(PoolMode::Request, Protocol::Chronos);
        let http = shown(PoolMode::Session, Protocol::Http1);
        for (part, expected) in [
            ("aegis_queue_depth", [false, true, true]),
            ("aegis_requests_total", [false, true, true]),
            ("reason=\"connect_failed\"", [true, false, false]),
            ("reason=\"drained\"", [false, true, true]),
            ("state=\"in_use\"", [false, true, true]),
            ("state=\"opaque\"", [false, false, true]),
            ("command=\"post\",outcome=\"opaque\"", [false, false, true]),
            ("command=\"opaque\",outcome=\"answered\"", [false, false, false]),
            ("outcome=\"refused\"", [false, true, false]),
        ] {
            let found = [&opaque_session, &lines, &http].map(|shown| shown(part));
            assert_eq!(found, expected, "{part}");
        }
    }

    #[test]
    fn buckets_are_cumulative_and_end_at_the_count() {
        let text = text_of(busy_view());
        let prefix = "aegis_connect_duration_seconds_bucket";
        let counts: Vec<u64> = text
            .lines()
            .filter(|line| line.starts_with(prefix))
            .map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
            .collect();
        assert_eq!(counts.len(), Histogram::BUCKETS);
        assert!(counts.is_sorted());
        let samples = parse(&text);
        let bucket =
            |le: &str| samples[format!("{prefix}{{route=\"default\",le=\"{le}\"}}").as_str()];
        assert_eq!((bucket("0.00005"), bucket("0.000075"), bucket("+Inf")), (0.0, 2.0, 4.0));
        assert!(text.contains("\naegis_connect_duration_seconds_count{route=\"default\"} 4\n"));
    }

    #[test]
    fn the_text_has_the_families_of_the_rows_in_their_order() {
        let mut config = config();
        let route = Arc::make_mut(&mut config.routes[0]);
        (route.pool.mode, route.protocol) = (PoolMode::Session, Protocol::Http1);
        route.locality = Locality::Zone;
        route.check_interval = Some(Duration::from_secs(1));
        route.backups = Some(vec!["10.0.0.9:1".parse().unwrap()]);
        let text = text_of(view(config, vec![endpoint("db:1", "10.0.0.1:1")]));
        let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let found = families.map(|family| family.split(' ').next().unwrap());
        let found: Vec<_> = found.filter(|name| !NOT_HERE.contains(name)).collect();
        let rows = sections().into_iter().flat_map(|(_, rows)| rows);
        let expected: Vec<_> =
            rows.map(|row| row.name).filter(|name| !NOT_HERE.contains(name)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_family_comes_once_with_the_series_of_each_route() {
        let vars = [
            ("AEGIS_ROUTES", "orders,cache"),
            ("AEGIS_LISTEN", "127.0.0.1:0"),
            ("AEGIS_CACHE__PROTOCOL", "chronos"),
            ("AEGIS_CACHE__POOL_MODE", "request"),
        ];
        let vars = vars.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let routes = ["10.0.0.1:1", "10.0.0.2:1"].map(|address| (3, vec![endpoint("db", address)]));
        let config = crate::config::Config::from_vars(vars).unwrap();
        let text = text_of(view_of_routes(std::time::Instant::now(), config, routes.into()));
        let samples = parse(&text);
        for series in [
            "aegis_sessions_active{worker=\"0\",route=\"orders\"}",
            "aegis_sessions_active{worker=\"0\",route=\"cache\"}",
            "aegis_queue_depth{route=\"cache\"}",
            "aegis_endpoint_usable{route=\"orders\",endpoint=\"db\"}",
            "aegis_endpoint_usable{route=\"cache\",endpoint=\"db\"}",
            "aegis_pool_connections{route=\"cache\",endpoint=\"db\",state=\"in_use\"}",
            "aegis_discovery_endpoints{route=\"cache\"}",
        ] {
            assert!(samples.contains_key(series), "{series}");
        }
        for series in [
            "aegis_queue_depth{route=\"orders\"}",
            "aegis_pool_connections{route=\"orders\",endpoint=\"db\",state=\"in_use\"}",
        ] {
            assert!(!samples.contains_key(series), "{series} can never move");
        }
    }

    #[test]
    fn promtool_finds_no_fault() {
        let promtool = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut promtool) = promtool else {
            eprintln!("promtool is not on the PATH: its check of the metrics did not run");
            return;
        };
        promtool.stdin.take().unwrap().write_all(text_of(busy_view()).as_bytes()).unwrap();
        let output = promtool.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
