//! The counters as Prometheus text, format 0.0.4.
//!
//! A scrape only reads memory that workers write anyway, and `/proc/self`. Labels are bounded:
//! worker, endpoint, direction, and the closed lists of reasons in [`crate::metrics`].

use std::fmt::{Display, Write};
use std::sync::Arc;

use procfs::WithCurrentSystemInfo;
use procfs::process::{LimitValue, Process};

use super::admin::page::Pieces;
use super::discovery::status::ErrorKind;
use super::view::{EndpointCounts, labels, usable};
use super::{View, logging};
use crate::config::{Config, Locality, PoolMode};
use crate::metrics::{
    Checkout, CloseReason, Discard, Histogram, Label, Outcome, Retry, Spillover, WorkerStats,
};
use crate::protocol::{Facts, Verb};

/// The `Content-Type` of the format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a family's values are.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}
use Kind::{Counter, Gauge};

/// A family with one value of each `T`: name, kind, help, and how to read it.
type Family<T> = (&'static str, Kind, &'static str, fn(&T) -> u64);

#[rustfmt::skip]
const WORKER_FAMILIES: &[Family<WorkerStats>] = &[
    ("aegis_sessions_opened_total", Counter, "Sessions accepted.", |w| w.sessions_opened.get()),
    ("aegis_sessions_active", Gauge, "Sessions now open, those still connecting included.", |w| w.sessions_active.get()),
    ("aegis_clients_handed_over_total", Counter, "Clients handed over to a worker with fewer sessions.", |w| w.handed_over.get()),
    ("aegis_accept_errors_total", Counter, "Failed accepts: descriptors or memory short.", |w| w.accept_errors.get()),
    ("aegis_accept_pauses_total", Counter, "Times accepting was paused at the session limit.", |w| w.accept_pauses.get()),
    ("aegis_connect_retries_total", Counter, "Attempts to connect beyond a session's first.", |w| w.connect_retries.get()),
    ("aegis_worker_turns_total", Counter, "Turns of the worker's loop: one wait in the kernel each.", |w| w.turns.get()),
    ("aegis_worker_completions_total", Counter, "I/O completions handled.", |w| w.completions.get()),
    ("aegis_worker_applied_generation", Gauge, "Generation of the endpoint snapshot in force.", |w| w.applied_generation.get()),
    ("aegis_buffer_waits_total", Counter, "Times a receive had to wait for a free buffer.", |w| w.buffer_waits.get()),
    ("aegis_splice_failures_total", Counter, "Times that moving bulk within the kernel failed, for want of descriptors or of permission; it is copied for a second then.", |w| w.splice_failures.get()),
    ("aegis_buffers_in_use", Gauge, "Buffers now holding bytes in flight.", |w| w.buffers_in_use.get()),
];

#[rustfmt::skip]
const ENDPOINT_FAMILIES: &[Family<EndpointCounts>] = &[
    ("aegis_endpoint_sessions_active", Gauge, "Sessions now on the endpoint.", |e| e.sessions_active),
    ("aegis_endpoint_connects_total", Counter, "Connections made to the endpoint.", |e| e.connects),
    ("aegis_endpoint_connect_failures_total", Counter, "Connects refused, unreachable or timed out.", |e| e.connect_failures),
    ("aegis_endpoint_ejections_total", Counter, "Times a worker ejected the endpoint.", |e| e.ejections),
    ("aegis_pool_target", Gauge, "Warm connections that the pools aim at.", |e| e.pool_target),
];

/// Writes all metrics of the process, each as of the moment when it is written.
pub async fn render(view: Arc<View>, pieces: Pieces) {
    let mut text = Encoder(pieces);
    text.0.begin().await;
    write_workers(&mut text, &view).await;
    write_durations(&mut text, &view).await;
    if view.config().pool.mode != PoolMode::Preconnect {
        write_requests(&mut text, &view).await;
    }
    write_endpoints(&mut text, &view).await;
    write_identity(&mut text, &view);
    if let Ok(process) = ProcessCounts::read() {
        process.write(&mut text);
    }
    text.0.end().await;
}

async fn write_workers(text: &mut Encoder, view: &View) {
    let workers: Vec<_> = view.stats().enumerate().map(|(i, w)| (i.to_string(), w)).collect();
    for (name, kind, help, read) in WORKER_FAMILIES {
        text.family(name, *kind, help);
        for (worker, stats) in &workers {
            text.sample(name, &[("worker", worker)], read(stats));
        }
        text.0.pause().await;
    }

    let name = "aegis_worker_core_wait_seconds_total";
    text.family(
        name,
        Counter,
        "Time for which the worker was ready to run and waited for a core, or for its CPU quota.",
    );
    for (worker, stats) in &workers {
        text.sample(name, &[("worker", worker)], stats.core_wait_ns.get() as f64 / 1e9);
    }

    let name = "aegis_sessions_closed_total";
    text.family(name, Counter, "Sessions ended, by how.");
    for (worker, stats) in &workers {
        for &reason in CloseReason::ALL.iter().filter(|&&reason| can_close(view.config(), reason)) {
            let labels = [("worker", worker.as_str()), ("reason", reason.name())];
            text.sample(name, &labels, stats.closed(reason));
        }
        text.0.pause().await;
    }

    let name = "aegis_bytes_total";
    text.family(name, Counter, "Payload bytes received, by where they were sent on to.");
    for (worker, stats) in &workers {
        let to_backend = stats.bytes_to_backend.get();
        let to_client = stats.bytes_to_client.get();
        for (direction, bytes) in [("to_backend", to_backend), ("to_client", to_client)] {
            text.sample(name, &[("worker", worker), ("direction", direction)], bytes);
        }
    }

    let name = "aegis_pool_checkouts_total";
    text.family(name, Counter, "How sessions came by their backend connections.");
    for &result in Checkout::ALL {
        let count: u64 = view.stats().map(|stats| stats.checkouts(result)).sum();
        text.sample(name, &[("result", result.name())], count);
    }

    if view.config().locality != Locality::Off {
        let name = "aegis_locality_spillovers_total";
        text.family(name, Counter, "Sessions sent to endpoints that are not near, by why.");
        for &reason in Spillover::ALL {
            let count: u64 = view.stats().map(|stats| stats.spillovers(reason)).sum();
            text.sample(name, &[("reason", reason.name())], count);
        }
    }

    let name = "aegis_pool_discards_total";
    text.family(name, Counter, "Pooled connections closed, by why.");
    let lends = view.config().pool.mode != PoolMode::Preconnect;
    let can_be = |reason: Discard| match reason {
        Discard::Timeout | Discard::Abandoned | Discard::Spent => lends,
        _ => true,
    };
    for &reason in Discard::ALL.iter().filter(|&&reason| can_be(reason)) {
        let count: u64 = view.stats().map(|stats| stats.discards(reason)).sum();
        text.sample(name, &[("reason", reason.name())], count);
    }
}

async fn write_durations(text: &mut Encoder, view: &View) {
    text.histogram(
        "aegis_connect_duration_seconds",
        "From the start of a connect to its success.",
        view.stats().map(|stats| &stats.connect_duration),
    );
    text.0.pause().await;
    text.histogram(
        "aegis_first_byte_seconds",
        "From a session's first byte towards the backend to the first byte back.",
        view.stats().map(|stats| &stats.first_byte),
    );
    text.0.pause().await;
    text.histogram(
        "aegis_session_duration_seconds",
        "From accept to close.",
        view.stats().map(|stats| &stats.session_duration),
    );
    text.0.pause().await;
}

/// What is counted of requests, where they are told apart.
async fn write_requests(text: &mut Encoder, view: &View) {
    let name = "aegis_queue_depth";
    text.family(name, Gauge, "Requests that wait for a backend connection.");
    text.sample(name, &[], view.stats().map(|stats| stats.queue_depth.get()).sum::<u64>());
    text.histogram(
        "aegis_queue_wait_seconds",
        "How long requests waited for a backend connection.",
        view.stats().map(|stats| &stats.queue_wait),
    );

    let name = "aegis_retries_total";
    text.family(name, Counter, "Requests sent again because their connection was lost, by how.");
    for &reason in Retry::ALL {
        let count: u64 = view.stats().map(|stats| stats.retries(reason)).sum();
        text.sample(name, &[("reason", reason.name())], count);
    }

    let protocol = view.config().protocol.facts();
    let name = "aegis_requests_total";
    text.family(name, Counter, "Requests ended, by what they asked for and how they ended.");
    for verb in protocol.verbs() {
        for &outcome in Outcome::ALL.iter().filter(|&&outcome| can_end(protocol, verb, outcome)) {
            let count: u64 = view.stats().map(|stats| stats.requests(verb, outcome)).sum();
            let labels = [("command", verb.label()), ("outcome", outcome.name())];
            text.sample(name, &labels, count);
        }
        text.0.pause().await;
    }
    let name = "aegis_request_duration_seconds";
    let help = "From the last byte of an answered request to the last of its answer.";
    text.family(name, Kind::Histogram, help);
    for verb in protocol.verbs().filter(|&verb| can_end(protocol, verb, Outcome::Answered)) {
        let parts = view.stats().map(|stats| stats.request_duration(verb));
        text.distribution(name, Some(("command", verb.label())), parts);
        text.0.pause().await;
    }
}

/// Whether a session can end so, so that no series is shown that never moves.
fn can_close(config: &Config, reason: CloseReason) -> bool {
    let lends = config.pool.mode != PoolMode::Preconnect;
    match reason {
        CloseReason::ConnectFailed
        | CloseReason::ConnectTimeout
        | CloseReason::NoEndpoint
        | CloseReason::ClientLeft => !lends,
        CloseReason::ClientTimeout | CloseReason::Drained => lends,
        CloseReason::IdleTimeout => config.idle_timeout.is_some(),
        // Of requests, clients that were told to leave have such a limit in any case.
        CloseReason::HalfCloseTimeout => lends || config.half_close_timeout.is_some(),
        CloseReason::BackendSilent | CloseReason::ClientSilent => config.tcp_user_timeout.is_some(),
        CloseReason::EndpointRemoved => config.backend_drain.is_some(),
        CloseReason::Finished
        | CloseReason::ClientReset
        | CloseReason::BackendReset
        | CloseReason::DrainDeadline
        | CloseReason::Overload => true,
    }
}

/// Whether a request can end so.
fn can_end(protocol: &Facts, verb: Verb, outcome: Outcome) -> bool {
    let is_opaque = verb == Verb::OPAQUE;
    match outcome {
        // Any request may have a body that becomes ambiguous.
        Outcome::Opaque => protocol.can_be_opaque,
        Outcome::Refused => protocol.can_refuse && verb == Verb::OTHER,
        Outcome::Answered | Outcome::Timeout | Outcome::Lost | Outcome::ClientTimeout => !is_opaque,
        Outcome::QueueFull
        | Outcome::QueueTimeout
        | Outcome::NoEndpoint
        | Outcome::Unreachable
        | Outcome::ClientGone => true,
    }
}

async fn write_endpoints(text: &mut Encoder, view: &View) {
    let snapshot = view.snapshot();
    let name = "aegis_discovery_generation";
    text.family(name, Gauge, "Generation of the latest endpoint snapshot, 0 before the first.");
    text.sample(name, &[], snapshot.generation);

    let name = "aegis_discovery_endpoints";
    text.family(name, Gauge, "Endpoints in the latest snapshot.");
    text.sample(name, &[], snapshot.endpoints.len());

    if !snapshot.stores.is_empty() {
        let name = "aegis_store_present";
        text.family(name, Gauge, "1 while the store is there to be asked for its keys, else 0.");
        for store in &snapshot.stores {
            text.sample(name, &[("store", &store.name)], u8::from(store.endpoint.is_some()));
            text.0.pause().await;
        }
    }

    let discovery = view.discovery();
    let name = "aegis_discovery_last_sync_timestamp_seconds";
    text.family(
        name,
        Gauge,
        "When the source of endpoints answered last, 0 before the first time.",
    );
    text.sample(name, &[], discovery.last_sync_seconds());

    if let Some(age) = discovery.saved_age() {
        let name = "aegis_discovery_snapshot_age_seconds";
        text.family(
            name,
            Gauge,
            "How old the endpoints are, while they are those of a former run.",
        );
        text.sample(name, &[], age.as_secs());
    }

    let name = "aegis_discovery_errors_total";
    text.family(name, Counter, "What went wrong between discovery and its source.");
    for &kind in ErrorKind::ALL {
        text.sample(name, &[("kind", kind.name())], discovery.errors(kind));
    }

    let labels = labels(&snapshot.endpoints);
    let labelled = || labels.iter().zip(&snapshot.endpoints);
    for (name, kind, help, read) in ENDPOINT_FAMILIES {
        text.family(name, *kind, help);
        for (label, endpoint) in labelled() {
            text.sample(name, &[("endpoint", label)], read(&EndpointCounts::total(endpoint)));
            text.0.pause().await;
        }
    }

    let name = "aegis_endpoint_usable";
    text.family(name, Gauge, "1 while some worker sends sessions to the endpoint, else 0.");
    for (label, endpoint) in labelled() {
        text.sample(name, &[("endpoint", label)], u8::from(usable(endpoint)));
        text.0.pause().await;
    }

    let name = "aegis_pool_connections";
    text.family(name, Gauge, "Pooled connections, by what they are doing.");
    for (label, endpoint) in labelled() {
        let counts = EndpointCounts::total(endpoint);
        let config = view.config();
        let lends = config.pool.mode != PoolMode::Preconnect;
        let opaque = counts.sessions_opaque;
        // The two are not read at the same moment.
        let lent = counts.sessions_active.saturating_sub(opaque);
        let states = [
            ("idle", counts.pool_idle, true),
            ("connecting", counts.pool_connecting, true),
            ("lent", lent, lends),
            ("opaque", opaque, lends && config.protocol.facts().can_be_opaque),
        ];
        for (state, count, _) in states.into_iter().filter(|(.., can_be)| *can_be) {
            text.sample(name, &[("endpoint", label), ("state", state)], count);
        }
        text.0.pause().await;
    }
}

fn write_identity(text: &mut Encoder, view: &View) {
    let name = "aegis_max_sessions";
    text.family(name, Gauge, "Most sessions at a time in the whole process.");
    text.sample(name, &[], view.max_sessions());

    let name = "aegis_draining";
    text.family(name, Gauge, "1 once the process was asked to end, else 0.");
    text.sample(name, &[], u8::from(view.draining()));

    let name = "aegis_log_lines_dropped_total";
    text.family(
        name,
        Counter,
        "Lines of the log that were not read in time or could not be written.",
    );
    text.sample(name, &[], logging::lines_dropped());

    let name = "aegis_io_driver_info";
    text.family(name, Gauge, "The driver that does the I/O, and why this one.");
    let driver = view.driver();
    let labels =
        [("driver", driver.driver), ("reason", &driver.reason), ("kernel", &driver.kernel)];
    text.sample(name, &labels, 1);

    let name = "aegis_build_info";
    text.family(name, Gauge, "The program's version and target.");
    let version = env!("CARGO_PKG_VERSION");
    text.sample(name, &[("version", version), ("arch", std::env::consts::ARCH)], 1);
}

/// The process metrics that Prometheus client libraries agree on.
struct ProcessCounts {
    cpu_seconds: f64,
    start_seconds: f64,
    resident_bytes: u64,
    virtual_bytes: u64,
    threads: i64,
    fds: usize,
    fds_max: Option<u64>,
}

impl ProcessCounts {
    fn read() -> procfs::ProcResult<Self> {
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

    #[rustfmt::skip]
    fn write(&self, text: &mut Encoder) {
        text.single("process_cpu_seconds_total", Counter, "User and system CPU time spent.", self.cpu_seconds);
        text.single("process_start_time_seconds", Gauge, "Start of the process since the Unix epoch.", self.start_seconds);
        text.single("process_resident_memory_bytes", Gauge, "Resident memory size.", self.resident_bytes);
        text.single("process_virtual_memory_bytes", Gauge, "Virtual memory size.", self.virtual_bytes);
        text.single("process_threads", Gauge, "Threads of the process.", self.threads);
        text.single("process_open_fds", Gauge, "Open file descriptors.", self.fds);
        if let Some(limit) = self.fds_max {
            text.single("process_max_fds", Gauge, "Most open file descriptors.", limit);
        }
    }
}

/// Writes the exposition format. Writing to a `String` cannot fail, hence the ignored results.
struct Encoder(Pieces);

impl Encoder {
    /// Begins a family; its samples follow.
    fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let _ = writeln!(self.0.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.text.push_str(name);
        for (i, (label, text)) in labels.iter().enumerate() {
            let _ = write!(self.0.text, "{}{label}=\"", if i == 0 { '{' } else { ',' });
            self.label_value(text);
            self.0.text.push('"');
        }
        let _ = writeln!(self.0.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn label_value(&mut self, text: &str) {
        for c in text.chars() {
            match c {
                '\\' => self.0.text.push_str("\\\\"),
                '"' => self.0.text.push_str("\\\""),
                '\n' => self.0.text.push_str("\\n"),
                c => self.0.text.push(c),
            }
        }
    }

    /// A family with one sample and no labels.
    fn single(&mut self, name: &str, kind: Kind, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    /// A histogram, summed over `parts`.
    fn histogram<'a>(
        &mut self,
        name: &str,
        help: &str,
        parts: impl Iterator<Item = &'a Histogram>,
    ) {
        self.family(name, Kind::Histogram, help);
        self.distribution(name, None, parts);
    }

    /// The samples of one histogram of a family.
    fn distribution<'a>(
        &mut self,
        name: &str,
        label: Option<(&str, &str)>,
        parts: impl Iterator<Item = &'a Histogram>,
    ) {
        let mut counts = [0; Histogram::BUCKETS];
        let mut sum = 0.0;
        for (part, seconds) in parts.map(Histogram::read) {
            counts.iter_mut().zip(part).for_each(|(total, n)| *total += n);
            sum += seconds;
        }
        let own: Vec<_> = label.into_iter().collect();
        let bucket = format!("{name}_bucket");
        // `_count` is the sum of the buckets, so it agrees with them while workers count on.
        let mut count = 0;
        for (i, n) in counts.into_iter().enumerate() {
            count += n;
            let le = Histogram::upper_bound_seconds(i);
            let le = le.map_or_else(|| "+Inf".to_owned(), |seconds| seconds.to_string());
            let labels: Vec<_> = own.iter().copied().chain([("le", le.as_str())]).collect();
            self.sample(&bucket, &labels, count);
        }
        self.sample(&format!("{name}_sum"), &own, sum);
        self.sample(&format!("{name}_count"), &own, count);
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Protocol;
    use std::collections::{HashMap, HashSet};
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;
    use crate::control::admin::page::whole;
    use crate::control::testing::{config, endpoint, view};

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
            stats.sessions_opened.add(10 + i as u64);
            stats.core_wait_ns.set(1_500_000_000);
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
            ("aegis_sessions_opened_total{worker=\"1\"}", 11.0),
            ("aegis_sessions_closed_total{worker=\"0\",reason=\"client_reset\"}", 1.0),
            ("aegis_worker_core_wait_seconds_total{worker=\"1\"}", 1.5),
            ("aegis_pool_checkouts_total{result=\"hit\"}", 2.0),
            ("aegis_pool_connections{endpoint=\"db:5432@10.0.0.1:5432\",state=\"idle\"}", 3.0),
            ("aegis_endpoint_usable{endpoint=\"db:5432@10.0.0.2:5432\"}", 1.0),
            ("aegis_endpoint_usable{endpoint=\"pod-\\\"0\\\"\\\\\\n\"}", 0.0),
            ("aegis_discovery_generation", 1.0),
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
            config.pool.mode = mode;
            config.protocol = protocol;
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
            ("state=\"lent\"", [false, true, true]),
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
        let bucket = |le: &str| samples[format!("{prefix}{{le=\"{le}\"}}").as_str()];
        assert_eq!((bucket("0.00005"), bucket("0.000075"), bucket("+Inf")), (0.0, 2.0, 4.0));
        assert!(text.contains("\naegis_connect_duration_seconds_count 4\n"));
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
