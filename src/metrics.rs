//! What one worker counts: written by that worker alone, read by the control thread and, to spread
//! clients, by the other workers.
//!
//! There is one writer a value, so an update is a relaxed load and a relaxed store, never a
//! read-modify-write, and blocks of different workers never share a 64-byte cache line.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::protocol::Verb;

/// A value that only ever grows. One thread writes it, any thread reads it.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. To be called by the owning worker only.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// The value as of some recent moment.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A value that is set. One thread writes it, any thread reads it.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets the value. To be called by the owning worker only.
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// The value as of some recent moment.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A log-linear histogram of durations: two buckets an octave from 50 µs to about 14 hours.
///
/// The layout follows the idea of HDR histograms (Tene): constant relative error, an index by bit
/// arithmetic, no search.
#[derive(Debug)]
#[repr(align(64))]
pub struct Histogram {
    buckets: [Counter; Histogram::BUCKETS],
    sum_ns: Counter,
}

impl Histogram {
    /// The first bucket's upper bound in nanoseconds.
    const FIRST_NS: u64 = 50_000;
    /// One bucket up to 50 µs, two for each of 30 doublings, one for all above.
    pub const BUCKETS: usize = 1 + 2 * 30 + 1;

    fn index(ns: u64) -> usize {
        // Bounds are inclusive (`le`), so a value that equals a bound belongs below it.
        let Some(above) = ns.min(u64::MAX / 4).checked_sub(Self::FIRST_NS + 1) else { return 0 };
        let ratio = above / Self::FIRST_NS + 1;
        let octave = ratio.ilog2() as usize;
        let middle = (Self::FIRST_NS << octave) + (Self::FIRST_NS << octave) / 2;
        let upper_half = usize::from(ns > middle);
        (1 + 2 * octave + upper_half).min(Self::BUCKETS - 1)
    }

    /// The inclusive upper bound of bucket `index` in seconds; `None` for the last, unbounded one.
    pub fn upper_bound_seconds(index: usize) -> Option<f64> {
        if index >= Self::BUCKETS - 1 {
            return None;
        }
        let octave = index.div_ceil(2);
        let ns = match index {
            0 => Self::FIRST_NS,
            i if i % 2 == 1 => (Self::FIRST_NS << (octave - 1)) / 2 * 3,
            _ => Self::FIRST_NS << octave,
        };
        Some(ns as f64 / 1e9)
    }

    /// Counts one duration. To be called by the owning worker only.
    pub fn record(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[Self::index(ns)].add(1);
        self.sum_ns.add(ns);
    }

    /// The counts of all buckets (not cumulative), and the sum in seconds.
    pub fn read(&self) -> ([u64; Self::BUCKETS], f64) {
        (std::array::from_fn(|i| self.buckets[i].get()), self.sum_ns.get() as f64 / 1e9)
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| Counter::default()), sum_ns: Counter::default() }
    }
}

/// An enum whose variants label a family of counters.
pub trait Label: Copy + 'static {
    /// All variants, in the order of their discriminants.
    const ALL: &'static [Self];

    /// The metric label and log field of this variant.
    fn name(self) -> &'static str;
}

/// Declares a field-less enum that is a metric label.
macro_rules! labels {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$vmeta:meta])* $variant:ident = $label:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vmeta])* $variant,)+ }

        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant,)+];

            fn name(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }

        impl $name {
            /// How many variants there are.
            pub const COUNT: usize = <Self as Label>::ALL.len();
        }
    };
}

labels! {
    /// Why a session went to an endpoint that is not near though near ones are preferred.
    pub enum Spillover {
        /// No near endpoint was usable and untried.
        Few = "few",
        /// The near ones had far more sessions.
        Loaded = "loaded",
    }
}

labels! {
    /// Every way in which a session can end.
    pub enum CloseReason {
        /// Both directions ended and every byte was delivered.
        Finished = "finished",
        /// Its endpoint had left the set, and the time for its sessions was over.
        EndpointRemoved = "endpoint_removed",
        /// The client ended before it had a backend and without having sent a byte.
        ClientLeft = "client_left",
        /// The client reset its connection, or it broke.
        ClientReset = "client_reset",
        /// The backend reset its connection, or it broke.
        BackendReset = "backend_reset",
        /// The backend acknowledged nothing for `AEGIS_TCP_USER_TIMEOUT`.
        BackendSilent = "backend_silent",
        /// The client acknowledged nothing for a multiple of that.
        ClientSilent = "client_silent",
        /// No endpoint accepted a connection within the attempts allowed.
        ConnectFailed = "connect_failed",
        /// The last attempt to connect to an endpoint ran into its time limit.
        ConnectTimeout = "connect_timeout",
        /// Discovery knows no endpoint at all.
        NoEndpoint = "no_endpoint",
        /// No byte moved for `AEGIS_IDLE_TIMEOUT`.
        IdleTimeout = "idle_timeout",
        /// One direction had ended and no byte moved for `AEGIS_HALF_CLOSE_TIMEOUT`.
        HalfCloseTimeout = "half_close_timeout",
        /// The client took no byte of an answer, or sent its request too slowly behind a part of one,
        /// while it held a backend's connection.
        ClientTimeout = "client_timeout",
        /// It had nothing under way in a drain.
        Drained = "drained",
        /// Still open at the end of `AEGIS_DRAIN_TIMEOUT`.
        DrainDeadline = "drain_deadline",
        /// A bound of `limits` was met that leaves no other way out.
        Overload = "overload",
    }
}

labels! {
    /// How a request ended.
    pub enum Outcome {
        /// The backend's answer went to the client.
        Answered = "answered",
        /// It could not be told where it ends: its client got a connection of its own.
        Opaque = "opaque",
        /// The proxy answered it with an error: no backend may see it.
        Refused = "refused",
        /// As many requests waited as may.
        QueueFull = "queue_full",
        /// No connection became free in time.
        QueueTimeout = "queue_timeout",
        /// There was no endpoint for `AEGIS_ENDPOINT_WAIT`.
        NoEndpoint = "no_endpoint",
        /// The endpoint that holds its key cannot be reached, or none of all that there are.
        Unreachable = "unreachable",
        /// The backend did not answer in time, or did not go on with its answer.
        Timeout = "timeout",
        /// The backend's connection ended before the answer did.
        Lost = "backend_lost",
        /// The client left before its answer.
        ClientGone = "client_gone",
        /// The client neither sent the rest of it nor took its answer in time.
        ClientTimeout = "client_timeout",
    }
}

labels! {
    /// How the connection ended of a request that was sent again.
    pub enum Retry {
        /// The backend ended it.
        Ended = "ended",
        /// It broke.
        Broken = "broken",
        /// The backend acknowledged nothing on it.
        Silent = "silent",
    }
}

labels! {
    /// How a session came by its backend connection.
    pub enum Checkout {
        /// A warm connection was taken from the pool.
        Hit = "hit",
        /// The pool was empty: connected on demand.
        Miss = "miss",
    }
}

labels! {
    /// Why a pooled connection was closed.
    pub enum Discard {
        /// The backend ended or reset it.
        Dead = "dead",
        /// Idle for longer than `AEGIS_POOL_IDLE_TIMEOUT` while there were more than needed.
        Idle = "idle",
        /// Older than `AEGIS_POOL_MAX_LIFETIME`.
        Lifetime = "lifetime",
        /// The pool holds enough.
        Surplus = "surplus",
        /// Its endpoint was removed or ejected.
        Endpoint = "endpoint",
        /// The backend sent what nobody had asked for.
        Unexpected = "unexpected",
        /// The backend took too long to answer a request on it.
        Timeout = "timeout",
        /// Its client left in the middle of a request.
        Abandoned = "abandoned",
        /// The protocol ends it here, or it cannot be told where the answer ended.
        Spent = "spent",
        /// The backend acknowledges nothing, on it or on another one that was made as early.
        Silent = "silent",
    }
}

/// What a worker is doing, as the control thread sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum WorkerState {
    /// Not yet accepting.
    Starting = 0,
    /// Accepting and forwarding.
    Running = 1,
    /// Ends once its sessions have.
    Draining = 2,
    /// The thread has ended.
    Stopped = 3,
}

/// All that one worker counts.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct WorkerStats {
    /// Milliseconds since the process started, as of the worker's latest turn.
    pub heartbeat_ms: Gauge,
    /// Turns of the worker's loop: one wait in the kernel each.
    pub turns: Counter,
    /// Completions (events) handled.
    pub completions: Counter,
    /// Nanoseconds for which the worker was ready to run and waited for a core.
    pub core_wait_ns: Gauge,
    /// Sessions accepted.
    pub sessions_opened: Counter,
    /// Clients handed over to a worker with fewer sessions.
    pub handed_over: Counter,
    /// Sessions now open, those still connecting included.
    pub sessions_active: Gauge,
    /// In a drain, those among them that were open when it began.
    pub sessions_before_drain: Gauge,
    /// Bytes received from clients.
    pub bytes_to_backend: Counter,
    /// Bytes received from backends.
    pub bytes_to_client: Counter,
    /// Failed accepts: descriptors or memory short.
    pub accept_errors: Counter,
    /// Times accepting was paused at `AEGIS_MAX_SESSIONS`.
    pub accept_pauses: Counter,
    /// Attempts to connect beyond a session's first.
    pub connect_retries: Counter,
    /// Times a receive found no free buffer and had to wait for one.
    pub buffer_waits: Counter,
    /// Times that moving bulk within the kernel failed.
    pub splice_failures: Counter,
    /// Buffers now holding bytes in flight.
    pub buffers_in_use: Gauge,
    /// The generation of the endpoint snapshot in force.
    pub applied_generation: Gauge,
    state: Gauge,
    closed: [Counter; CloseReason::COUNT],
    checkouts: [Counter; Checkout::COUNT],
    spillovers: [Counter; Spillover::COUNT],
    discards: [Counter; Discard::COUNT],
    requests: [[Counter; Outcome::COUNT]; Verb::COUNT],
    request_durations: [Histogram; Verb::COUNT],
    retries: [Counter; Retry::COUNT],
    /// Requests now waiting for a backend connection.
    pub queue_depth: Gauge,
    /// How long requests waited for a backend connection.
    pub queue_wait: Histogram,
    /// From the start of a connect to its success.
    pub connect_duration: Histogram,
    /// From a session's first byte towards the backend to the first byte back.
    pub first_byte: Histogram,
    /// From accept to close.
    pub session_duration: Histogram,
}

impl WorkerStats {
    /// Counts a session's end.
    pub fn count_close(&self, reason: CloseReason) {
        self.closed[reason as usize].add(1);
    }

    /// Sessions that ended for `reason`.
    pub fn closed(&self, reason: CloseReason) -> u64 {
        self.closed[reason as usize].get()
    }

    /// Counts a session that went to an endpoint that is not near.
    pub fn count_spillover(&self, why: Spillover) {
        self.spillovers[why as usize].add(1);
    }

    /// Spillovers for this reason.
    pub fn spillovers(&self, why: Spillover) -> u64 {
        self.spillovers[why as usize].get()
    }

    /// Counts how a session came by its backend connection.
    pub fn count_checkout(&self, checkout: Checkout) {
        self.checkouts[checkout as usize].add(1);
    }

    /// Checkouts with this result.
    pub fn checkouts(&self, checkout: Checkout) -> u64 {
        self.checkouts[checkout as usize].get()
    }

    /// Counts a pooled connection that was closed unused.
    pub fn count_discard(&self, discard: Discard) {
        self.discards[discard as usize].add(1);
    }

    /// Pooled connections closed unused for this reason.
    pub fn discards(&self, discard: Discard) -> u64 {
        self.discards[discard as usize].get()
    }

    /// Counts the end of a request. What the backend answered also counts by how long it took.
    pub fn count_request(&self, verb: Verb, outcome: Outcome, took: Duration) {
        self.requests[verb.index()][outcome as usize].add(1);
        if outcome == Outcome::Answered {
            self.request_durations[verb.index()].record(took);
        }
    }

    /// Requests of this kind that ended so.
    pub fn requests(&self, verb: Verb, outcome: Outcome) -> u64 {
        self.requests[verb.index()][outcome as usize].get()
    }

    /// How long answered requests of this kind took, from their last byte to the answer's last.
    pub fn request_duration(&self, verb: Verb) -> &Histogram {
        &self.request_durations[verb.index()]
    }

    /// Counts a request that is sent again.
    pub fn count_retry(&self, why: Retry) {
        self.retries[why as usize].add(1);
    }

    /// Requests sent again for this reason.
    pub fn retries(&self, why: Retry) -> u64 {
        self.retries[why as usize].get()
    }

    /// Publishes what the worker is doing.
    pub fn set_state(&self, state: WorkerState) {
        self.state.set(state as u64);
    }

    /// What the worker is doing.
    pub fn state(&self) -> WorkerState {
        match self.state.get() {
            0 => WorkerState::Starting,
            1 => WorkerState::Running,
            2 => WorkerState::Draining,
            _ => WorkerState::Stopped,
        }
    }
}

/// What one worker knows of one endpoint.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct EndpointStats {
    /// Sessions of this worker now on the endpoint.
    pub sessions_active: Gauge,
    /// Those among them that hold a connection for good where others have it for a request.
    pub sessions_opaque: Gauge,
    /// Warm connections in the pool.
    pub pool_idle: Gauge,
    /// Connections being made for the pool.
    pub pool_connecting: Gauge,
    /// How many warm connections the pool aims at now.
    pub pool_target: Gauge,
    /// Age of the oldest warm connection in milliseconds.
    pub pool_oldest_ms: Gauge,
    /// Connections made.
    pub connects: Counter,
    /// Connects refused, unreachable or timed out.
    pub connect_failures: Counter,
    /// Failures since the last success.
    pub failures_in_a_row: Gauge,
    /// Times the endpoint was ejected.
    pub ejections: Counter,
    /// 1 while the endpoint is ejected, else 0.
    pub ejected: Gauge,
}

impl EndpointStats {
    /// The worker begins anew with the endpoint: only what it counts goes on.
    pub fn reset_gauges(&self) {
        for gauge in [
            &self.sessions_active,
            &self.sessions_opaque,
            &self.pool_idle,
            &self.pool_connecting,
            &self.pool_target,
            &self.pool_oldest_ms,
            &self.failures_in_a_row,
            &self.ejected,
        ] {
            gauge.set(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_falls_into_the_first_bucket_whose_bound_holds_it() {
        let bounds: Vec<u64> = (0..Histogram::BUCKETS - 1)
            .map(|i| (Histogram::upper_bound_seconds(i).unwrap() * 1e9).round() as u64)
            .collect();
        assert_eq!(bounds[..5], [50_000, 75_000, 100_000, 150_000, 200_000]);
        assert!(bounds.is_sorted());
        for (i, &bound) in bounds.iter().enumerate() {
            assert_eq!(Histogram::index(bound), i, "at the bound {bound}");
            assert_eq!(Histogram::index(bound + 1), i + 1, "above the bound {bound}");
        }
        assert_eq!(Histogram::index(0), 0);
        assert_eq!(Histogram::index(u64::MAX), Histogram::BUCKETS - 1);
    }

    #[test]
    fn blocks_of_two_workers_share_no_cache_line() {
        assert_eq!(align_of::<WorkerStats>() % 64, 0);
        assert_eq!(size_of::<WorkerStats>() % 64, 0);
        assert_eq!(align_of::<EndpointStats>() % 64, 0);
        assert_eq!(size_of::<EndpointStats>() % 64, 0);
    }

    #[test]
    fn labels_are_in_the_order_of_their_discriminants_and_distinct() {
        for (i, reason) in CloseReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
        }
        let mut names: Vec<_> = CloseReason::ALL.iter().map(|r| r.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CloseReason::COUNT);
    }
}
