//! What is measured of a run, and how runs are compared.

use serde::Serialize;

/// What is measured of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    Throughput,
    P50,
    P90,
    P99,
    P999,
    Max,
    /// Per request, or per GB of a bulk stream.
    Cpu,
    Switches,
    /// Bytes of user space a connection.
    Memory,
    /// The p99 with idle connections over the p99 without.
    IdleP99,
}

impl Metric {
    pub const ALL: [Self; 10] = [
        Self::Throughput,
        Self::P50,
        Self::P90,
        Self::P99,
        Self::P999,
        Self::Max,
        Self::Cpu,
        Self::Switches,
        Self::Memory,
        Self::IdleP99,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Throughput => "throughput",
            Self::P50 => "p50",
            Self::P90 => "p90",
            Self::P99 => "p99",
            Self::P999 => "p99.9",
            Self::Max => "max",
            Self::Cpu => "CPU",
            Self::Switches => "switches",
            Self::Memory => "memory",
            Self::IdleP99 => "p99 with idle",
        }
    }

    /// What it is counted in.
    pub fn unit(self, bulk: bool) -> &'static str {
        match self {
            Self::Throughput if bulk => "GB/s",
            Self::Throughput => "/s",
            Self::P50 | Self::P90 | Self::P99 | Self::P999 | Self::Max => "µs",
            Self::Cpu if bulk => "s/GB",
            Self::Cpu => "µs/request",
            Self::Switches if bulk => "/MB",
            Self::Switches => "/request",
            Self::Memory => "B/connection",
            Self::IdleP99 => "(ratio)",
        }
    }

    /// Whether `value` reaches `bound`.
    pub fn meets(self, value: f64, bound: f64) -> bool {
        if self == Self::Throughput { value >= bound } else { value <= bound }
    }
}

/// One run of one contestant. What does not apply is absent.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Run {
    /// Requests a second, or GB a second of a bulk stream.
    pub throughput: Option<f64>,
    /// Microseconds.
    pub p50: Option<f64>,
    pub p90: Option<f64>,
    pub p99: Option<f64>,
    pub p999: Option<f64>,
    pub max: Option<f64>,
    /// Microseconds a request, or seconds a GB of a bulk stream.
    pub cpu: Option<f64>,
    /// A request, or a MB of a bulk stream.
    pub switches: Option<f64>,
    /// Bytes a connection above what the program held before the first one.
    pub memory: Option<f64>,
    pub idle_p99: Option<f64>,
}

impl Run {
    pub fn get(&self, metric: Metric) -> Option<f64> {
        match metric {
            Metric::Throughput => self.throughput,
            Metric::P50 => self.p50,
            Metric::P90 => self.p90,
            Metric::P99 => self.p99,
            Metric::P999 => self.p999,
            Metric::Max => self.max,
            Metric::Cpu => self.cpu,
            Metric::Switches => self.switches,
            Metric::Memory => self.memory,
            Metric::IdleP99 => self.idle_p99,
        }
    }
}

/// The median and how far the values lie from it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Summary {
    /// Of no values there is none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let below = if sorted.len().is_multiple_of(2) { middle - 1 } else { middle };
        Some(Self { median: f64::midpoint(sorted[below], sorted[middle]), min, max })
    }
}

/// Round by round, `own` over the one of `others` that is harder to beat: the one with the worse
/// median for `own`. (Over whoever was better in each round, of three equals each would come out
/// worse than the other two.) A round in which one of the two has no value does not count.
pub fn paired(metric: Metric, own: &[Run], others: &[&[Run]]) -> Option<Summary> {
    let worse = |one: Summary, two: Summary| {
        if metric.meets(one.median, two.median) { two } else { one }
    };
    others.iter().filter_map(|other| ratios(metric, own, other)).reduce(worse)
}

fn ratios(metric: Metric, own: &[Run], other: &[Run]) -> Option<Summary> {
    Summary::of(own.iter().zip(other).filter_map(|(own, other)| {
        let (own, other) = (own.get(metric)?, other.get(metric)?);
        (other > 0.0).then_some(own / other)
    }))
}
