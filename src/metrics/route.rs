//! What each worker counts of a route: one row per metric, in the order of the text. It is written by
//! that worker alone, and read by the control thread.

use std::time::Duration;

use super::cells::{Cell, Counter, Gauge, Histogram, cells};
use super::counted::{Row, counted};
use super::family::{LabelName, family, or};
use super::labels::{
    Checkout, CloseReason, Discard, Label, LabelSet, Outcome, Retry, Spillover, Verb,
};

counted! {
    /// All that one worker counts of one route. Blocks of different workers share no cache line.
    pub struct RouteStats by ROUTE {
        metrics {
            /// Sessions accepted.
            sessions_opened: Counter = "aegis_sessions_opened_total" per WORKER;
            /// Sessions now open, those still connecting included.
            sessions_active: Gauge = "aegis_sessions_active" per WORKER;
            /// Attempts to connect beyond a session's first.
            connect_retries: Counter = "aegis_connect_retries_total" per WORKER;
            /// Retries, of connects and of requests, that `AEGIS_RETRY_BUDGET` did not allow.
            retries_refused: Counter = "aegis_retries_refused_total" per WORKER;
            /// Generation of the endpoint snapshot in force.
            applied_generation: Gauge = "aegis_worker_applied_generation" per WORKER;
            /// Sessions ended, by how.
            sessions_closed: Counter [reason: CloseReason] = "aegis_sessions_closed_total" per WORKER;
            /// Time for which clients found no usable endpoint: from the first that did until there was
            /// one and nobody waited.
            outage: DurationTotal = "aegis_outage_seconds_total" per WORKER;
            /// Sessions that wait for a usable endpoint or a place at one, or are being connected after that.
            clients_waiting: Gauge = "aegis_clients_waiting" per WORKER;
            /// The tier of endpoints in use: 0 is the first one, and those behind stand in for it.
            tier: Gauge = "aegis_endpoint_tier" per WORKER if TIERS;
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
            /// From a session's or request's first byte towards the backend to the first byte back.
            first_byte: Histogram = "aegis_first_byte_seconds";
            /// From the first byte back to the last: of an answer, or of a session.
            transfer: Histogram = "aegis_transfer_seconds";
            /// From accept to close.
            session_duration: Histogram = "aegis_session_duration_seconds";
            /// Requests that wait for a backend connection.
            queue_depth: Gauge = "aegis_queue_depth" if SHARED;
            /// How long sessions and requests waited for a backend connection, or until one was begun for
            /// them.
            queue_wait: Histogram = "aegis_queue_wait_seconds";
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
            /// In a drain, those of the open sessions that were so when it began.
            pub sessions_before_drain: Gauge;
            /// Since when clients find no usable endpoint, in milliseconds since the process started;
            /// 0 if that is not so.
            pub outage_since_ms: Gauge;
            /// Sessions that had to wait for an endpoint.
            pub outage_waited: Counter;
            /// Sessions that were closed for want of one.
            pub outage_given_up: Counter;
            /// Sessions and requests that wait for their first byte for longer than
            /// `AEGIS_SLOW_FIRST_BYTE`, of an endpoint that has answered nobody since they do.
            pub overdue: Gauge;
            /// Sessions that ended while they did.
            pub left_overdue: Counter;
            /// The same as `first_byte`, without the time that clients took to send.
            pub reply_wait: Histogram;
            /// The longest wait of the latest outage, in milliseconds.
            pub outage_longest_ms: Gauge;
        }
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
        | Outcome::ClientGone
        | Outcome::Cut => true,
    }
}

fn can_be_answered(at: &[usize]) -> bool {
    can_end(&[at[0], Outcome::Answered.index()])
}

impl RouteStats {
    /// Counts a session's end.
    pub fn count_close(&self, reason: CloseReason) {
        self.sessions_closed.of(reason).add(1);
    }

    /// Sessions that ended for `reason`.
    pub fn closed(&self, reason: CloseReason) -> u64 {
        self.sessions_closed.of(reason).get()
    }

    /// Requests of any kind that ended so.
    pub fn requests_ended(&self, outcome: Outcome) -> u64 {
        self.requests.all().iter().map(|of_verb| of_verb.of(outcome).get()).sum()
    }

    /// Counts a first byte back: how long it took, and how long nothing had moved before it.
    pub fn count_first_byte(&self, took: Duration, quiet: Duration) {
        self.first_byte.record(took);
        self.reply_wait.record(quiet.min(took));
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
}
