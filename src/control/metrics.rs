//! The counters as Prometheus text, format 0.0.4. A scrape reads; it disturbs no worker.

use std::fmt::{Display, Write};

use super::Shared;
use super::admin::is_usable;
use crate::proxy::endpoints::EndpointSnapshot;
use crate::telemetry::{
    Checkout, CloseReason, Discard, EndpointStats, Histogram, Label, WorkerStats,
};

/// The content type of [`render`]'s text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics.
pub fn render(shared: &Shared) -> String {
    let mut text = Text::default();
    info(&mut text, shared);
    sessions(&mut text, shared);
    durations(&mut text, shared);
    workers(&mut text, shared);
    endpoints(&mut text, &shared.snapshot());
    discovery(&mut text, shared);
    process(&mut text);
    text.0
}

/// Text of metric families, one after the other.
#[derive(Default)]
struct Text(String);

/// Label names and values.
type Labels<'a> = &'a [(&'a str, &'a str)];

impl Text {
    fn family(&mut self, kind: &str, name: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl Display) {
        self.0.push_str(name);
        for (i, (label, value)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"", if i == 0 { '{' } else { ',' });
            for character in value.chars() {
                match character {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    other => self.0.push(other),
                }
            }
            self.0.push('"');
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{end} {value}");
    }

    fn single(&mut self, kind: &str, name: &str, help: &str, value: impl Display) {
        self.family(kind, name, help);
        self.sample(name, &[], value);
    }

    /// A family with one sample a worker.
    fn per_worker(
        &mut self,
        kind: &str,
        name: &str,
        help: &str,
        shared: &Shared,
        value: impl Fn(&WorkerStats) -> u64,
    ) {
        self.family(kind, name, help);
        for (index, worker) in shared.workers.iter().enumerate() {
            self.sample(name, &[("worker", &index.to_string())], value(&worker.stats));
        }
    }

    /// A family with one sample a variant of a label, summed over the workers.
    fn per_label<L: Label>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        shared: &Shared,
        value: impl Fn(&WorkerStats, L) -> u64,
    ) {
        self.family("counter", name, help);
        for &variant in L::ALL {
            let sum: u64 = shared.workers.iter().map(|worker| value(&worker.stats, variant)).sum();
            self.sample(name, &[(label, variant.name())], sum);
        }
    }

    /// A family with one sample an endpoint, summed over the workers.
    fn per_endpoint(
        &mut self,
        kind: &str,
        name: &str,
        help: &str,
        snapshot: &EndpointSnapshot,
        value: impl Fn(&EndpointStats) -> u64,
    ) {
        self.family(kind, name, help);
        for endpoint in &snapshot.endpoints {
            let sum: u64 = endpoint.stats.iter().map(&value).sum();
            self.sample(name, &[("endpoint", &endpoint.name)], sum);
        }
    }

    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        shared: &Shared,
        of: impl Fn(&WorkerStats) -> &Histogram,
    ) {
        self.family("histogram", name, help);
        let mut counts = [0; Histogram::BUCKETS];
        let mut sum = 0.0;
        for worker in &shared.workers {
            let (worker_counts, worker_sum) = of(&worker.stats).read();
            counts.iter_mut().zip(worker_counts).for_each(|(all, one)| *all += one);
            sum += worker_sum;
        }
        let mut cumulative = 0;
        for (index, count) in counts.iter().enumerate() {
            cumulative += count;
            let bound = Histogram::upper_bound_seconds(index);
            let bound = bound.map_or_else(|| "+Inf".to_owned(), |bound| bound.to_string());
            self.sample(&format!("{name}_bucket"), &[("le", &bound)], cumulative);
        }
        self.sample(&format!("{name}_sum"), &[], sum);
        self.sample(&format!("{name}_count"), &[], cumulative);
    }
}

fn info(text: &mut Text, shared: &Shared) {
    text.family("gauge", "aegis_build_info", "The version that runs.");
    text.sample("aegis_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    text.family("gauge", "aegis_io_driver_info", "The I/O driver in use, and why.");
    let driver = &shared.driver;
    let labels =
        [("driver", driver.driver), ("reason", &driver.reason), ("kernel", &driver.kernel)];
    text.sample("aegis_io_driver_info", &labels, 1);
    text.single("gauge", "aegis_workers", "Worker threads.", shared.workers.len());
    let draining = u8::from(shared.is_draining());
    text.single("gauge", "aegis_draining", "1 while the proxy drains.", draining);
}

fn sessions(text: &mut Text, shared: &Shared) {
    text.per_worker("counter", "aegis_sessions_opened_total", "Sessions accepted.", shared, |s| {
        s.sessions_opened.get()
    });
    let help = "Sessions now open.";
    text.per_worker("gauge", "aegis_sessions_active", help, shared, |s| s.sessions_active.get());
    let help = "Most sessions at a time.";
    text.single("gauge", "aegis_sessions_max", help, shared.max_sessions);
    let help = "Sessions ended, by reason.";
    text.per_label(
        "aegis_sessions_closed_total",
        help,
        "reason",
        shared,
        |s, reason: CloseReason| s.closed(reason),
    );
    let name = "aegis_bytes_total";
    text.family("counter", name, "Bytes received, by where they went.");
    let sum =
        |of: fn(&WorkerStats) -> u64| shared.workers.iter().map(|w| of(&w.stats)).sum::<u64>();
    text.sample(name, &[("direction", "to_backend")], sum(|s| s.bytes_to_backend.get()));
    text.sample(name, &[("direction", "to_client")], sum(|s| s.bytes_to_client.get()));
    let help = "Accepts that failed for want of descriptors or memory.";
    text.single("counter", "aegis_accept_errors_total", help, sum(|s| s.accept_errors.get()));
    let help = "Times accepting paused because of AEGIS_MAX_SESSIONS.";
    text.single("counter", "aegis_accept_pauses_total", help, sum(|s| s.accept_pauses.get()));
    let help = "Attempts to connect beyond a session's first.";
    text.single("counter", "aegis_connect_retries_total", help, sum(|s| s.connect_retries.get()));
    let help = "How sessions came by their backend connections.";
    text.per_label("aegis_pool_checkouts_total", help, "result", shared, |s, result: Checkout| {
        s.checkouts(result)
    });
    let help = "Pooled connections closed unused, by reason.";
    text.per_label("aegis_pool_discards_total", help, "reason", shared, |s, why: Discard| {
        s.discards(why)
    });
}

fn durations(text: &mut Text, shared: &Shared) {
    let help = "Time to connect to an endpoint.";
    text.histogram("aegis_connect_duration_seconds", help, shared, |s| &s.connect_duration);
    let help = "Time from a session's first byte to the first byte back.";
    text.histogram("aegis_first_byte_seconds", help, shared, |s| &s.first_byte);
    let help = "Time from accept to close.";
    text.histogram("aegis_session_duration_seconds", help, shared, |s| &s.session_duration);
}

fn workers(text: &mut Text, shared: &Shared) {
    let help = "Turns of the worker's loop, one wait each.";
    text.per_worker("counter", "aegis_worker_turns_total", help, shared, |s| s.turns.get());
    let help = "Events handled.";
    text.per_worker("counter", "aegis_worker_events_total", help, shared, |s| s.completions.get());
    let help = "Receives that found no free buffer and waited.";
    text.per_worker("counter", "aegis_buffer_waits_total", help, shared, |s| s.buffer_waits.get());
    let help = "Buffers holding bytes in flight or lent to the kernel.";
    text.per_worker("gauge", "aegis_buffers_in_use", help, shared, |s| s.buffers_in_use.get());
}

fn endpoints(text: &mut Text, snapshot: &EndpointSnapshot) {
    let name = "aegis_pool_connections";
    text.family("gauge", name, "Connections of the pool, warm or being made.");
    for endpoint in &snapshot.endpoints {
        let sum = |of: fn(&EndpointStats) -> u64| endpoint.stats.iter().map(of).sum::<u64>();
        for (state, value) in [
            ("idle", sum(|stats| stats.pool_idle.get())),
            ("connecting", sum(|stats| stats.pool_connecting.get())),
        ] {
            text.sample(name, &[("endpoint", &endpoint.name), ("state", state)], value);
        }
    }
    let name = "aegis_endpoint_usable";
    text.family("gauge", name, "1 while some worker sends sessions to the endpoint.");
    for endpoint in &snapshot.endpoints {
        text.sample(name, &[("endpoint", &endpoint.name)], u8::from(is_usable(endpoint)));
    }
    let help = "Warm connections that the pools aim at.";
    text.per_endpoint("gauge", "aegis_pool_target", help, snapshot, |s| s.pool_target.get());
    let help = "Sessions on the endpoint, those still connecting included.";
    let name = "aegis_endpoint_sessions_active";
    text.per_endpoint("gauge", name, help, snapshot, |s| s.sessions_active.get());
    let name = "aegis_endpoint_ejections_total";
    text.per_endpoint("counter", name, "Ejections, counted in each worker.", snapshot, |s| {
        s.ejections.get()
    });
    let name = "aegis_endpoint_connects_total";
    text.per_endpoint("counter", name, "Connections made.", snapshot, |s| s.connects.get());
    let name = "aegis_endpoint_connect_failures_total";
    let help = "Connects refused, unreachable or timed out.";
    text.per_endpoint("counter", name, help, snapshot, |s| s.connect_failures.get());
}

fn discovery(text: &mut Text, shared: &Shared) {
    let snapshot = shared.snapshot();
    let help = "The number of the endpoint snapshot in force.";
    text.single("gauge", "aegis_discovery_generation", help, snapshot.generation);
    let help = "Endpoints in that snapshot.";
    text.single("gauge", "aegis_discovery_endpoints", help, snapshot.endpoints.len());
    let help = "The snapshot that the worker has applied.";
    text.per_worker("gauge", "aegis_worker_applied_generation", help, shared, |s| {
        s.applied_generation.get()
    });
}

/// The standard metrics of a process. What the kernel does not tell is left out.
fn process(text: &mut Text) {
    let Ok(this) = procfs::process::Process::myself() else { return };
    if let Ok(stat) = this.stat() {
        let ticks = procfs::ticks_per_second() as f64;
        let cpu = (stat.utime + stat.stime) as f64 / ticks;
        let help = "User and system CPU time.";
        text.single("counter", "process_cpu_seconds_total", help, cpu);
        let resident = stat.rss * procfs::page_size();
        text.single("gauge", "process_resident_memory_bytes", "Resident memory.", resident);
        text.single("gauge", "process_virtual_memory_bytes", "Virtual memory.", stat.vsize);
        text.single("gauge", "process_threads", "Threads.", stat.num_threads);
        if let Ok(boot) = procfs::boot_time_secs() {
            let start = boot as f64 + stat.starttime as f64 / ticks;
            let help = "When the process started, since the epoch.";
            text.single("gauge", "process_start_time_seconds", help, start);
        }
    }
    if let Ok(open) = this.fd_count() {
        text.single("gauge", "process_open_fds", "Open descriptors.", open);
    }
    if let Ok(limits) = this.limits()
        && let procfs::process::LimitValue::Value(most) = limits.max_open_files.soft_limit
    {
        text.single("gauge", "process_max_fds", "Descriptors that can be open.", most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_are_escaped() {
        let mut text = Text::default();
        text.sample("m", &[("a", "x\\y\"z\n"), ("b", "")], 1);
        assert_eq!(text.0, "m{a=\"x\\\\y\\\"z\\n\",b=\"\"} 1\n");
    }
}
