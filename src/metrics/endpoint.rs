//! What each worker counts per endpoint: one row per number, from which follow the worker's counter,
//! the sum over workers, the field of `/backends` and, where it has a name, the metric.

use std::io;

use serde::Serialize;

use super::cells::{Cell, Counter, Gauge, RoundTrips};
use super::family::{Family, LabelName, family};

/// Declares [`EndpointStats`], [`EndpointCounts`] and the rows, in the order of `/backends`:
///
/// ```text
/// /// Help text, and the field's documentation.
/// field: Cell, how workers are added up [= "name"];
/// ```
macro_rules! endpoint_stats {
    ($($(#[doc = $doc:literal])+ $field:ident: $cell:ident, $add:ident $(= $name:literal)?;)+) => {
        /// What one worker knows of one endpoint. Blocks of different workers share no cache line.
        #[derive(Debug, Default)]
        #[repr(align(64))]
        pub struct EndpointStats {
            $($(#[doc = $doc])+ pub $field: $cell,)+
            /// How long the network takes to the endpoint and back, on connections while they were
            /// sampled.
            pub rtt: RoundTrips,
            /// 1 while the worker has ejected the endpoint, else 0.
            pub ejected: Gauge,
            /// The number of its latest [`Failure`], or 0.
            failed_by: Gauge,
        }

        impl EndpointStats {
            const ROWS: &'static [Option<Row>] =
                &[$(endpoint_stats!(@row [$($doc)+] $field $cell $($name)?),)+];

            /// The worker begins anew with the endpoint: only what it counts goes on.
            pub fn reset_gauges(&self) {
                $(self.$field.reset_gauge();)+
                self.ejected.reset_gauge();
                self.failed_by.reset_gauge();
            }
        }

        /// One reading of what a worker, or all of them, know of an endpoint.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
        pub struct EndpointCounts {
            $($(#[doc = $doc])+ pub $field: u64,)+
        }

        impl EndpointCounts {
            /// Reads one worker's counters.
            pub fn read(stats: &EndpointStats) -> Self {
                Self { $($field: stats.$field.get(),)+ }
            }

            fn add(self, other: Self) -> Self {
                Self { $($field: $add(self.$field, other.$field),)+ }
            }
        }
    };
    (@row [$($doc:literal)+] $field:ident $cell:ident) => { None };
    (@row [$($doc:literal)+] $field:ident $cell:ident $name:literal) => {
        Some(Row {
            family: family!([$($doc)+] $cell::KIND, $name, &[LabelName::ROUTE, LabelName::ENDPOINT], []),
            read: |counts| counts.$field,
        })
    };
}

endpoint_stats! {
    /// Sessions now on the endpoint.
    sessions_active: Gauge, sum = "aegis_endpoint_sessions_active";
    /// Those of them that hold a shared connection until they end.
    sessions_opaque: Gauge, sum;
    /// Warm connections.
    pool_idle: Gauge, sum;
    /// Connections being made for the pool.
    pool_connecting: Gauge, sum;
    /// Connections that the endpoint has, of those that it may have: 0 where they are not limited.
    connections: Gauge, sum = "aegis_endpoint_connections";
    /// Connections that the endpoint may have; 0: any number.
    connections_max: Gauge, most = "aegis_endpoint_connections_max";
    /// Warm connections that the pools aim at.
    pool_target: Gauge, sum = "aegis_pool_target";
    /// Age of the oldest warm connection in milliseconds.
    pool_oldest_ms: Gauge, most;
    /// Failures since the last success; of several workers, the most.
    failures_in_a_row: Gauge, most;
    /// Connections made to the endpoint.
    connects: Counter, sum = "aegis_endpoint_connects_total";
    /// Connects refused, unreachable or timed out.
    connect_failures: Counter, sum = "aegis_endpoint_connect_failures_total";
    /// Times a worker ejected the endpoint.
    ejections: Counter, sum = "aegis_endpoint_ejections_total";
    /// TCP segments sent to the endpoint, those sent again included, on connections while they were
    /// sampled.
    segments: Counter, sum = "aegis_endpoint_segments_total";
    /// Those of them that had to be sent again.
    retransmits: Counter, sum = "aegis_endpoint_retransmits_total";
    /// Bytes a second that the network took to the endpoint on the connection sampled last, 0 without
    /// one; of several workers, the most.
    delivery_rate: Gauge, most = "aegis_endpoint_delivery_rate_bytes";
    /// Segments on their way, on the connection that has most of them, as far as they are looked at in
    /// turns; of several workers, the most.
    unacked: Gauge, most = "aegis_endpoint_unacked_segments";
}

/// What the control thread counts of an endpoint's active checks.
#[derive(Debug, Default)]
pub struct CheckStats {
    /// Checks made.
    pub made: Counter,
    /// Those that failed.
    pub failed: Counter,
}

fn sum(a: u64, b: u64) -> u64 {
    a + b
}

fn most(a: u64, b: u64) -> u64 {
    a.max(b)
}

impl EndpointCounts {
    /// Reads the counters of all workers together.
    pub fn total(workers: &[EndpointStats]) -> Self {
        workers.iter().map(Self::read).fold(Self::default(), Self::add)
    }
}

/// How an endpoint has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// It refused a connection.
    Refused = 1,
    /// It did not answer in time.
    TimedOut = 2,
    /// It ended a connection at once.
    EndedAtOnce = 3,
    /// It could not be reached for another reason.
    Unreachable = 4,
}

impl Failure {
    const ALL: [Self; 4] = [Self::Refused, Self::TimedOut, Self::EndedAtOnce, Self::Unreachable];

    /// What an error is.
    pub fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::TimedOut => Self::TimedOut,
            io::ErrorKind::UnexpectedEof => Self::EndedAtOnce,
            _ => Self::Unreachable,
        }
    }

    /// Its words in the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Refused => "refuses",
            Self::TimedOut => "does not answer",
            Self::EndedAtOnce => "ends connections at once",
            Self::Unreachable => "cannot be reached",
        }
    }
}

/// A metric of an endpoint.
#[derive(Debug)]
pub struct Row {
    /// What it is.
    pub family: Family,
    /// Its value.
    pub read: fn(&EndpointCounts) -> u64,
}

impl EndpointStats {
    /// The endpoint has failed.
    pub fn set_failure(&self, failure: Failure) {
        self.failed_by.set(failure as u64);
    }

    /// How it has failed last, if it ever has.
    pub fn failure(&self) -> Option<Failure> {
        let number = self.failed_by.get();
        Failure::ALL.into_iter().find(|&failure| failure as u64 == number)
    }

    /// The metrics in the order of the text: what is the endpoint's own, then what is its pools'.
    pub fn rows() -> Vec<&'static Row> {
        let mut rows: Vec<_> = Self::ROWS.iter().flatten().collect();
        rows.sort_by_key(|row| row.family.name.starts_with("aegis_pool_"));
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_two_workers_share_no_cache_line() {
        assert_eq!(align_of::<EndpointStats>() % 64, 0);
        assert_eq!(size_of::<EndpointStats>() % 64, 0);
    }

    #[test]
    fn workers_are_added_up_or_the_most_of_them_counts() {
        let workers = [EndpointStats::default(), EndpointStats::default()];
        for (n, stats) in (1..).zip(&workers) {
            stats.connects.add(10 * n);
            stats.sessions_active.set(n);
            stats.pool_oldest_ms.set(100 * n);
        }
        let total = EndpointCounts::total(&workers);
        assert_eq!((total.connects, total.sessions_active, total.pool_oldest_ms), (30, 3, 200));
    }
}
