//! What is measured, and which figures it is to reach.

use crate::load::{BULK_WRITE, Pace};
use crate::peers::{Contestant, Entry, WORKERS, Way};
use crate::stats::Metric;

/// What a figure is held against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Against {
    /// The ratio to the better of the peers.
    Peers,
    /// The ratio to `HAProxy`.
    Haproxy,
    /// The ratio to itself over TCP, by each other way.
    OwnTcp,
    /// Nothing: it is the figure itself.
    Nothing,
}

/// A figure to be reached by Aegis on `io_uring`, or where it lends connections.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub metric: Metric,
    pub bound: f64,
    pub against: Against,
}

/// A series of scenarios that differ in one number, for a plot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sweep {
    Connections,
    MessageSize,
}

/// One load, put on each contestant in turns.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub name: String,
    pub about: String,
    pub pace: Pace,
    pub connections: usize,
    pub idle: usize,
    pub request: u32,
    pub reply: u32,
    pub targets: Vec<Target>,
    /// The backend has a thread for each connection, and the contestants share connections.
    pub pools: bool,
    /// What carries the bytes.
    pub ways: &'static [Way],
    /// Workers of Aegis.
    pub workers: usize,
    /// What the sweep varies, and its value here.
    pub sweep: Option<(Sweep, usize)>,
}

impl Scenario {
    fn new(name: &str, about: &str, pace: Pace, connections: usize, targets: &[Target]) -> Self {
        let bulk = pace == Pace::Bulk;
        Self {
            name: name.to_owned(),
            about: about.to_owned(),
            pace,
            connections,
            idle: 0,
            request: if bulk { BULK_WRITE } else { 64 },
            reply: if bulk { 0 } else { 128 },
            targets: targets.to_vec(),
            pools: false,
            ways: &[Way::Tcp],
            workers: WORKERS,
            sweep: None,
        }
    }

    /// Who takes part, each of the contestants by each way.
    pub fn entries(&self, all: &[Contestant]) -> Vec<Entry> {
        let takes_part = |entry: &Entry| match entry.contestant {
            Contestant::Request => self.pools,
            Contestant::Epoll | Contestant::OtherEpoll => !self.pools,
            // Without a proxy there is one side.
            Contestant::Direct => entry.way != Way::UnixClients,
            // One peer shows what Unix sockets give; a second one would take more minutes.
            Contestant::Nginx => self.ways == [Way::Tcp],
            _ => true,
        };
        let by_each_way = |&contestant| self.ways.iter().map(move |&way| Entry { contestant, way });
        all.iter().flat_map(by_each_way).filter(takes_part).collect()
    }

    /// The same before a backend with a thread for each connection, where clients share connections.
    fn with_pools(mut self) -> Self {
        self.pools = true;
        self
    }

    /// Whether splicing helps.
    pub fn is_bulk(&self) -> bool {
        self.pace == Pace::Bulk
    }
}

/// The pace of `half-load` until the peers' capacity is known.
pub const RATE_TO_BE_MEASURED: Pace = Pace::Open(0.0);

/// All of them, in the order of the report.
pub fn all() -> Vec<Scenario> {
    let mut all = named();
    for connections in [1, 4, 16, 64, 200, 1000, 2000, 8000] {
        let name = format!("connections-{connections}");
        let about = format!("sweep: {connections} connections, 64 B → 128 B");
        let mut point = Scenario::new(&name, &about, Pace::Closed, connections, &[]);
        point.sweep = Some((Sweep::Connections, connections));
        all.push(point);
    }
    for size in [64, 256, 1024, 4096, 16_384, 65_536] {
        let about = format!("sweep: messages of {size} B both ways, 64 connections");
        let mut point = Scenario::new(&format!("size-{size}"), &about, Pace::Closed, 64, &[]);
        (point.request, point.reply) = (size, size);
        point.sweep = Some((Sweep::MessageSize, size as usize));
        all.push(point);
    }
    all
}

/// A target against the better of the peers.
fn to(metric: Metric, bound: f64) -> Target {
    Target { metric, bound, against: Against::Peers }
}

fn named() -> Vec<Scenario> {
    let mut all = small_messages();
    all.extend(unix());
    all.extend(bulk());
    all.push(idle());
    all.extend(pools());
    all
}

fn small_messages() -> Vec<Scenario> {
    use Metric::{Cpu, P50, P99, P999, Throughput};
    vec![
        Scenario::new(
            "keepalive-200",
            "200 connections, 64 B → 128 B",
            Pace::Closed,
            200,
            &[to(Cpu, 0.6), to(Throughput, 1.3), to(P99, 0.8)],
        ),
        Scenario::new(
            "keepalive-16",
            "16 connections, 64 B → 128 B",
            Pace::Closed,
            16,
            &[to(Cpu, 0.8), to(P99, 1.0)],
        ),
        Scenario::new(
            "ping-pong",
            "1 connection, one request at a time",
            Pace::Closed,
            1,
            &[to(P50, 1.0), to(P99, 1.0)],
        ),
        Scenario::new(
            "keepalive-2000",
            "2,000 connections, 64 B → 128 B",
            Pace::Closed,
            2000,
            &[to(Cpu, 0.6), to(P99, 0.8)],
        ),
        Scenario::new(
            "half-load",
            "open loop at half of the slowest peer's capacity, 200 connections",
            RATE_TO_BE_MEASURED,
            200,
            &[to(P99, 0.8), to(P999, 0.8)],
        ),
        Scenario::new(
            "churn",
            "a new connection for each request, 200 at a time",
            Pace::Churn,
            200,
            &[to(Throughput, 1.7), to(P99, 0.6)],
        ),
    ]
}

/// TCP and Unix sockets beside each other.
fn unix() -> [Scenario; 3] {
    let to_tcp = |metric| Target { metric, bound: 0.75, against: Against::OwnTcp };
    let targets = [to_tcp(Metric::Cpu), to_tcp(Metric::P50), to(Metric::Cpu, 1.0)];
    [(1, "unix-1"), (16, "unix-16"), (200, "unix-200")].map(|(connections, name)| {
        let about = format!("TCP and Unix sockets, {connections} connections, 64 B → 128 B");
        let mut scenario = Scenario::new(name, &about, Pace::Closed, connections, &targets);
        scenario.ways = Way::ALL;
        scenario
    })
}

fn bulk() -> [Scenario; 2] {
    let to = |metric, bound| Target { metric, bound, against: Against::Haproxy };
    let targets = [to(Metric::Throughput, 1.0), to(Metric::Cpu, 0.8)];
    [
        Scenario::new("bulk-1", "bulk, 1 stream, 64 KiB writes", Pace::Bulk, 1, &targets),
        Scenario::new("bulk-8", "bulk, 8 streams, 64 KiB writes", Pace::Bulk, 8, &targets),
    ]
}

fn idle() -> Scenario {
    use Metric::{IdleP99, Memory};
    let itself = |metric, bound| Target { metric, bound, against: Against::Nothing };
    let mut idle = Scenario::new(
        "idle",
        "8,000 idle connections, 200 busy ones among them",
        Pace::Closed,
        200,
        &[itself(Memory, 1024.0), to(Memory, 0.25), itself(IdleP99, 1.1)],
    );
    idle.idle = 8000;
    idle
}

/// Before a backend with a thread for each connection.
fn pools() -> [Scenario; 3] {
    let mut many_workers = Scenario::new(
        "shared-32",
        "200 connections, 32 workers that share 16 connections to the same backend",
        Pace::Closed,
        200,
        &[],
    );
    many_workers.workers = 32;
    [
        Scenario::new(
            "crowd-4000",
            "4,000 connections, a backend with a thread for each of its own",
            Pace::Closed,
            4000,
            &[],
        )
        .with_pools(),
        Scenario::new(
            "ask-once",
            "a new connection for each request, 200 at a time, the same backend",
            Pace::Churn,
            200,
            &[to(Metric::Throughput, 2.5)],
        )
        .with_pools(),
        many_workers.with_pools(),
    ]
}
