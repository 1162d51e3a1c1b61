//! What each worker counts: one row per metric, in the order of the text. It is written by that worker
//! alone, and read by the control thread and, to spread clients, by the other workers.

use std::time::Duration;

use super::cells::{Cell, Gauge, Value, cells};
use super::family::{Family, LabelName, family, or};
use super::labels::{
    Checkout, CloseReason, Discard, Label, LabelSet, Outcome, Retry, Spillover, Verb,
};
use super::text;
use crate::config::RouteConfig;

/// Declares [`WorkerStats`] and its rows:
///
/// ```text
/// /// Help text, and the field's documentation.
/// field: Cell [label: Set, …] = "name" per WORKER if CONDITION where possible;
/// ```
///
/// Without `per WORKER` the workers are added up. `if` names a condition of [`super::when::When`],
/// `where` a function that tells which series can move, by the indices of their label values.
macro_rules! worker_stats {
    (
        metrics {$(
            $(#[doc = $doc:literal])+
            $field:ident: $cell:ident $([$($label:ident: $set:ident),+])? = $name:literal
                $(per $each:ident)? $(if $when:ident)? $(where $possible:ident)?;
        )+}
        others {$(
            $(#[doc = $other_doc:literal])+
            $other_vis:vis $other:ident: $other_type:ty;
        )+}
    ) => {
        /// All that one worker counts. Blocks of different workers share no cache line.
        #[derive(Debug, Default)]
        #[repr(align(64))]
        pub struct WorkerStats {
            $($(#[doc = $doc])+ pub $field: cells!($cell $($($set)+)?),)+
            $($(#[doc = $other_doc])+ $other_vis $other: $other_type,)+
        }

        impl WorkerStats {
            /// Its metrics, in the order of the text.
            pub const ROWS: &'static [Row] = &[$(Row {
                family: family!(
                    [$($doc)+]
                    <cells!($cell $($($set)+)?) as Cell>::KIND,
                    $name,
                    &[
                        $(LabelName::$each,)?
                        $($(LabelName::of::<super::labels::$set>(stringify!($label)),)+)?
                    ],
                    [$($when)?]
                ),
                possible: or!($($possible)?; |_| true),
                value: |stats, at| stats.$field.value(at),
            },)+];
        }
    };
}

worker_stats! {
    metrics {
        /// Sessions accepted.
        sessions_opened: Counter = "aegis_sessions_opened_total" per WORKER;
        /// Sessions now open, those still connecting included.
        sessions_active: Gauge = "aegis_sessions_active" per WORKER;
        /// Clients handed over to a worker with fewer sessions.
        handed_over: Counter = "aegis_clients_handed_over_total" per WORKER;
        /// Failed accepts: descriptors or memory short.
        accept_errors: Counter = "aegis_accept_errors_total" per WORKER;
        /// Times accepting was paused at the session limit.
        accept_pauses: Counter = "aegis_accept_pauses_total" per WORKER;
        /// Attempts to connect beyond a session's first.
        connect_retries: Counter = "aegis_connect_retries_total" per WORKER;
        /// Turns of the worker's loop: one wait in the kernel each.
        turns: Counter = "aegis_worker_turns_total" per WORKER;
        /// I/O completions handled.
        completions: Counter = "aegis_worker_completions_total" per WORKER;
        /// Generation of the endpoint snapshot in force.
        applied_generation: Gauge = "aegis_worker_applied_generation" per WORKER;
        /// Times a receive had to wait for a free buffer.
        buffer_waits: Counter = "aegis_buffer_waits_total" per WORKER;
        /// Times that moving bulk within the kernel failed, for want of descriptors or of
        /// permission; it is copied for a second then.
        splice_failures: Counter = "aegis_splice_failures_total" per WORKER;
        /// Buffers now holding bytes in flight.
        buffers_in_use: Gauge = "aegis_buffers_in_use" per WORKER;
        /// Time for which the worker was ready to run and waited for a core, or for its CPU quota.
        core_wait: DurationTotal = "aegis_worker_core_wait_seconds_total" per WORKER;
        /// Sessions ended, by how.
        sessions_closed: Counter [reason: CloseReason] = "aegis_sessions_closed_total" per WORKER;
        /// Payload bytes received, by where they were sent on to.
        bytes: Counter [direction: Direction] = "aegis_bytes_total" per WORKER;
        /// How sessions came by their backend connections.
        checkouts: Counter [result: Checkout] = "aegis_pool_checkouts_total";
        /// Sessions sent to endpoints that are not near, by why.
        spillovers: Counter [reason: Spillover] = "aegis_locality_spillovers_total" if LOCALITY;
        /// Pooled connections closed, by why.
        discards: Counter [reason: Discard] = "aegis_pool_discards_total";
        /// From the start of a connect to its success.
        connect_duration: Histogram = "aegis_connect_duration_seconds";
        /// From a session's first byte towards the backend to the first byte back.
        first_byte: Histogram = "aegis_first_byte_seconds";
        /// From accept to close.
        session_duration: Histogram = "aegis_session_duration_seconds";
        /// Requests that wait for a backend connection.
        queue_depth: Gauge = "aegis_queue_depth" if SHARED;
        /// How long requests waited for a backend connection.
        queue_wait: Histogram = "aegis_queue_wait_seconds" if SHARED;
        /// Requests sent again because their connection was lost, by how.
        retries: Counter [reason: Retry] = "aegis_retries_total" if SHARED;
        /// Requests ended, by what they asked for and how they ended.
        requests: Counter [command: Verb, outcome: Outcome] = "aegis_requests_total"
            if SHARED where can_end;
        /// From the last byte of an answered request to the last of its answer.
        request_duration: Histogram [command: Verb] = "aegis_request_duration_seconds"
            if SHARED where can_be_answered;
    }
    others {
        /// Milliseconds since the process started, as of the worker's latest turn.
        pub heartbeat_ms: Gauge;
        /// In a drain, those of its sessions that were open when it began.
        pub sessions_before_drain: Gauge;
        /// A [`WorkerState`].
        state: Gauge;
    }
}

/// Whether a request can end so, as far as what it asks for decides that.
fn can_end(at: &[usize]) -> bool {
    let is = |verb: Verb| at[0] == verb.index();
    match Outcome::ALL[at[1]] {
        Outcome::Refused => is(Verb::OTHER),
        Outcome::Answered | Outcome::Timeout | Outcome::Lost | Outcome::ClientTimeout => {
            !is(Verb::OPAQUE)
        }
        Outcome::Opaque
        | Outcome::QueueFull
        | Outcome::QueueTimeout
        | Outcome::NoEndpoint
        | Outcome::Unreachable
        | Outcome::ClientGone => true,
    }
}

fn can_be_answered(at: &[usize]) -> bool {
    can_end(&[at[0], Outcome::Answered.index()])
}

impl WorkerStats {
    /// Counts a session's end.
    pub fn count_close(&self, reason: CloseReason) {
        self.sessions_closed.of(reason).add(1);
    }

    /// Sessions that ended for `reason`.
    pub fn closed(&self, reason: CloseReason) -> u64 {
        self.sessions_closed.of(reason).get()
    }

    /// Counts a session that went to an endpoint that is not near.
    pub fn count_spillover(&self, why: Spillover) {
        self.spillovers.of(why).add(1);
    }

    /// Counts how a session came by its backend connection.
    pub fn count_checkout(&self, checkout: Checkout) {
        self.checkouts.of(checkout).add(1);
    }

    /// Counts a pooled connection that was closed unused.
    pub fn count_discard(&self, discard: Discard) {
        self.discards.of(discard).add(1);
    }

    /// Counts the end of a request. What the backend answered also counts by how long it took.
    pub fn count_request(&self, verb: Verb, outcome: Outcome, took: Duration) {
        self.requests.of(verb).of(outcome).add(1);
        if outcome == Outcome::Answered {
            self.request_duration.of(verb).record(took);
        }
    }

    /// Counts a request that is sent again.
    pub fn count_retry(&self, why: Retry) {
        self.retries.of(why).add(1);
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

/// A metric that workers count.
#[derive(Debug)]
pub struct Row {
    /// What it is.
    pub family: Family,
    possible: fn(&[usize]) -> bool,
    value: fn(&WorkerStats, &[usize]) -> Value,
}

/// One series of a metric, apart from whose it is.
#[derive(Debug, Default)]
pub struct Series {
    /// The indices of its label values.
    at: Vec<usize>,
    /// Their names.
    names: Vec<&'static str>,
}

impl Row {
    /// Whether each worker has series of its own; else the workers are added up.
    pub fn per_worker(&self) -> bool {
        self.family.labels.first().is_some_and(|label| label.name == LabelName::WORKER.name)
    }

    /// The series that can move in this configuration.
    pub fn series(&self, config: &RouteConfig) -> Vec<Series> {
        let mut series = vec![Series::default()];
        for values in self.family.labels.iter().filter_map(|label| label.shown(config)) {
            let extend = |begun: Series| {
                let with = move |&(at, name): &(usize, _)| Series {
                    at: [&begun.at[..], &[at]].concat(),
                    names: [&begun.names[..], &[name]].concat(),
                };
                values.iter().map(with).collect::<Vec<_>>()
            };
            series = series.into_iter().flat_map(extend).collect();
        }
        series.retain(|one| (self.possible)(&one.at));
        series
    }

    /// Writes one series of these workers, added up. `number` is the first one's.
    pub fn write(&self, text: &mut String, number: usize, workers: &[&WorkerStats], one: &Series) {
        let number = number.to_string();
        let own = self.per_worker().then_some(number.as_str());
        let names: Vec<_> = own.into_iter().chain(one.names.iter().copied()).collect();
        let total = workers.iter().map(|stats| (self.value)(stats, &one.at)).reduce(Value::plus);
        match total.unwrap_or_else(|| unreachable!("a process has workers")) {
            Value::Whole(n) => text::sample(text, &self.family, &names, n),
            Value::Nanoseconds(n) => text::sample(text, &self.family, &names, n as f64 / 1e9),
            Value::Durations(all) => text::durations(text, &self.family, &names, &all),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_two_workers_share_no_cache_line() {
        assert_eq!(align_of::<WorkerStats>() % 64, 0);
        assert_eq!(size_of::<WorkerStats>() % 64, 0);
    }
}
