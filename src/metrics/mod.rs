//! Every metric of the process, one row each: name, kind, labels and help, from which follow the
//! counter of a worker, the text of `/metrics` and the page `docs/METRICS.md`.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`route`] | the rows of what each worker counts of a route, and its block of counters |
//! | [`worker`] | the same of itself |
//! | [`endpoint`] | the rows of what each worker counts per endpoint, and how workers are added up |
//! | [`scraped`] | the rows of what nobody counts: the control thread reads it when it is asked |
//! | [`labels`] | the closed sets of label values, one row per value |
//! | [`when`] | the conditions under which a metric or a label value is shown |
//! | [`counted`] | how a row of a worker's becomes a counter and text |
//! | [`cells`] | what a counter, a gauge and a histogram are to the thread that writes them |
//! | [`text`] | the Prometheus text of a row |
//!
//! To add a metric of a worker or of an endpoint: its row, and its increment. To add one that is read:
//! its row, and its reading in `control::metrics`. To add a label value: its row, and its use.
//!
//! `prometheus-client` does not fit: its counters add with a read-modify-write, its families are a map
//! behind a lock, and its histograms are behind a mutex, where a worker writes its own block with plain
//! loads and stores and allocates nothing. With counters of our own its encoder alone would be left,
//! which writes the whole registry in one call, not in pieces between which probes are answered, and
//! in `OpenMetrics`, which is not the text that we promise.

pub mod cells;
pub mod counted;
pub mod endpoint;
pub mod family;
pub mod labels;
#[cfg(test)]
mod page;
pub mod route;
pub mod scraped;
pub mod text;
pub mod when;
pub mod worker;

pub use cells::{By, Counter, DurationTotal, Durations, Gauge, Histogram, RoundTrips};
pub use endpoint::{CheckStats, EndpointCounts, EndpointStats, Failure};
pub use family::Family;
pub use labels::{
    Checkout, CloseReason, Direction, Discard, ErrorKind, Label, LabelSet, Outcome, PooledState,
    Problem, Retry, Spillover,
};
pub use route::RouteStats;
pub use worker::{WorkerState, WorkerStats};

/// All metrics in the order of the text, by what they are about.
pub fn sections() -> [(&'static str, Vec<&'static Family>); 5] {
    let routes = RouteStats::ROWS.iter().map(|row| &row.family).collect();
    let workers = WorkerStats::ROWS.iter().map(|row| &row.family).collect();
    let endpoints = EndpointStats::rows().into_iter().map(|row| &row.family);
    [
        ("Sessions, pools and requests", routes),
        ("Workers", workers),
        ("Discovery", scraped::DISCOVERY.to_vec()),
        ("Endpoints", endpoints.chain(scraped::ENDPOINTS.iter().copied()).collect()),
        ("The process", scraped::PROCESS.to_vec()),
    ]
}
