//! The closed sets of label values, one row per value: its label in the text and the log, and under
//! which condition its series are there. The doc comments are what `docs/METRICS.md` says.

use std::fmt::Debug;

use super::family::{LabelValue, Values};
use super::when::When;
use crate::config::RouteConfig;
pub(super) use crate::protocol::Verb;

/// What labels the series of a metric.
pub trait Label: Copy + Debug + 'static {
    /// What it may be.
    const VALUES: Values;

    /// One `T` per value.
    type Each<T: Debug + Default>: AsRef<[T]> + Debug + Default;

    /// Its place among these.
    fn index(self) -> usize;
}

/// A field-less enum whose variants label the series of a metric.
pub trait LabelSet: Label {
    /// All variants, in the order of their indices.
    const ALL: &'static [Self];

    /// What the rows say, in the same order.
    const ROWS: &'static [LabelValue];

    /// The metric label and log field of this variant.
    fn name(self) -> &'static str {
        Self::ROWS[self.index()].name
    }

    /// Those whose series are there in this configuration.
    fn shown(config: &RouteConfig) -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(|label| Self::ROWS[label.index()].when.holds(config))
    }
}

/// Declares a field-less enum that is a metric label.
macro_rules! labels {
    ($(#[doc = $about:literal])+ pub enum $name:ident {
        $($(#[doc = $doc:literal])+ $variant:ident = $label:literal $(if $when:ident)?,)+
    }) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[doc = $doc])+ $variant,)+ }

        impl LabelSet for $name {
            const ALL: &'static [Self] = &[$(Self::$variant,)+];
            const ROWS: &'static [LabelValue] = &[$(LabelValue {
                name: $label,
                help: concat!($($doc),+).trim_ascii(),
                when: super::family::or!($(When::$when)?; When::ALWAYS),
            },)+];
        }

        impl Label for $name {
            const VALUES: Values = Values::OneOf(<Self as LabelSet>::ROWS);
            type Each<T: Debug + Default> = [T; $name::COUNT];

            fn index(self) -> usize {
                self as usize
            }
        }

        impl $name {
            /// How many variants there are.
            pub const COUNT: usize = <Self as LabelSet>::ALL.len();
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
        EndpointRemoved = "endpoint_removed" if BACKEND_DRAIN,
        /// The client ended before it had a backend and without having sent a byte.
        ClientLeft = "client_left" if PRECONNECT,
        /// The client reset its connection, or it broke.
        ClientReset = "client_reset",
        /// The backend reset its connection, or it broke.
        BackendReset = "backend_reset",
        /// The backend acknowledged nothing for `AEGIS_TCP_USER_TIMEOUT`.
        BackendSilent = "backend_silent" if TCP_USER_TIMEOUT,
        /// The client acknowledged nothing for a multiple of that.
        ClientSilent = "client_silent" if TCP_USER_TIMEOUT,
        /// No endpoint was usable for `AEGIS_ENDPOINT_WAIT`, and the last one tried refused.
        ConnectFailed = "connect_failed" if PRECONNECT,
        /// The same, and the last attempt to connect ran into its time limit.
        ConnectTimeout = "connect_timeout" if PRECONNECT,
        /// Discovery knew no endpoint at all for `AEGIS_ENDPOINT_WAIT`.
        NoEndpoint = "no_endpoint" if PRECONNECT,
        /// As many sessions waited for an endpoint with a free place as may.
        QueueFull = "queue_full" if SESSIONS_WAIT,
        /// No endpoint had a free place for `AEGIS_QUEUE_TIMEOUT`.
        QueueTimeout = "queue_timeout" if SESSIONS_WAIT,
        /// No byte moved for `AEGIS_IDLE_TIMEOUT`.
        IdleTimeout = "idle_timeout" if IDLE_TIMEOUT,
        /// One direction had ended and no byte moved for `AEGIS_HALF_CLOSE_TIMEOUT`.
        HalfCloseTimeout = "half_close_timeout" if HALF_CLOSE_TIMEOUT,
        /// The client took no byte of an answer, or sent its request too slowly behind a part of one,
        /// while it held a backend's connection.
        ClientTimeout = "client_timeout" if SHARED,
        /// It had nothing under way in a drain.
        Drained = "drained" if SHARED,
        /// Still open at the end of `AEGIS_DRAIN_TIMEOUT`.
        DrainDeadline = "drain_deadline",
        /// A bound of `limits` was met that leaves no other way out.
        Overload = "overload",
    }
}

impl CloseReason {
    /// Whether nothing went wrong.
    pub fn is_normal(self) -> bool {
        matches!(self, Self::Finished | Self::ClientLeft | Self::Drained)
    }

    /// Whether no endpoint could be used, and the session may have waited for one.
    pub fn is_for_want_of_endpoint(self) -> bool {
        matches!(self, Self::ConnectFailed | Self::ConnectTimeout | Self::NoEndpoint)
    }
}

impl Label for Verb {
    const VALUES: Values = Values::Commands;
    type Each<T: Debug + Default> = [T; Verb::COUNT];

    fn index(self) -> usize {
        Verb::index(self)
    }
}

labels! {
    /// How a request ended.
    pub enum Outcome {
        /// The backend's answer went to the client.
        Answered = "answered",
        /// It is not certain where it ends: its client got a connection of its own.
        Opaque = "opaque" if MAY_BE_OPAQUE,
        /// The proxy answered it with an error: no backend may see it.
        Refused = "refused" if MAY_REFUSE,
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
        /// The proxy cut it: at the end of `AEGIS_DRAIN_TIMEOUT` or `AEGIS_BACKEND_DRAIN`, or since a
        /// bound of `limits` was met.
        Cut = "cut",
    }
}

impl Outcome {
    /// Whether nothing went wrong.
    pub fn is_normal(self) -> bool {
        matches!(self, Self::Answered | Self::Opaque)
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
        /// It broke, as others had that were made as early: the endpoint does not know them any more.
        Forgotten = "forgotten",
        /// The proxy cut it: its endpoint was removed, and `AEGIS_BACKEND_DRAIN` was over.
        Removed = "removed",
    }
}

impl Retry {
    /// Whether the request may be sent again whatever the retry budget says: no server gets it twice. It
    /// has reached none, or only one that has left.
    pub fn is_free(self) -> bool {
        matches!(self, Self::Silent | Self::Forgotten | Self::Removed)
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
        Timeout = "timeout" if SHARED,
        /// Its client left in the middle of a request.
        Abandoned = "abandoned" if SHARED,
        /// The protocol ends it here, or it is not certain where the reply ended.
        Spent = "spent" if SHARED,
        /// The backend acknowledges nothing, on it or on another one that was made as early.
        Silent = "silent",
    }
}

labels! {
    /// Where bytes were sent on to.
    pub enum Direction {
        /// From a client to its backend.
        ToBackend = "to_backend",
        /// From a backend to its client.
        ToClient = "to_client",
    }
}

labels! {
    /// What a pooled connection is doing.
    pub enum PooledState {
        /// It waits for a client.
        Idle = "idle",
        /// It is being made.
        Connecting = "connecting",
        /// It serves a client.
        InUse = "in_use" if SHARED,
        /// It serves one client until that leaves, since its requests cannot be framed.
        Opaque = "opaque" if SHARED_MAY_BE_OPAQUE,
    }
}

labels! {
    /// What went wrong between discovery and its source.
    pub enum ErrorKind {
        /// No connection, no answer in time, or no trust in the certificate.
        Unreachable = "unreachable",
        /// The credentials were not accepted: 401.
        Unauthorized = "unauthorized",
        /// The credentials do not allow it: 403.
        Forbidden = "forbidden",
        /// The watch fell too far behind and starts over: 410.
        Expired = "expired",
        /// The source asks for patience: 429.
        Throttled = "throttled",
        /// Any other error that the source reported.
        Refused = "refused",
        /// The answer made no sense.
        Malformed = "malformed",
        /// The credentials or the address of the source cannot be found.
        Configuration = "configuration",
        /// A name does not resolve.
        Lookup = "lookup",
        /// An endpoint is this proxy itself.
        Loop = "loop",
    }
}

labels! {
    /// What is wrong, by where to look.
    pub enum Problem {
        /// The database: its first byte takes four times as long as usual, or `AEGIS_SLOW_FIRST_BYTE`, or
        /// does not come.
        BackendSlow = "backend_slow",
        /// The database, or the way to it: connects or checks fail, or endpoints are ejected.
        BackendRefusing = "backend_refusing",
        /// The database or discovery: there is no endpoint to send clients to.
        NoEndpoint = "no_endpoint",
        /// The network: a hundredth of all segments to an endpoint had to be sent again.
        NetworkLossy = "network_lossy",
        /// The proxy's limits: clients wait for a backend connection for a fifth of the time until their
        /// first byte, or get none.
        PoolSmall = "pool_small",
        /// The proxy's limits: nearly as many sessions are open as may be.
        SessionLimit = "session_limit",
        /// The proxy: a worker is busy all the time.
        WorkerOverloaded = "worker_overloaded",
        /// The node: workers that could run, or a busy one, wait for a core for a tenth of the time.
        CpuThrottled = "cpu_throttled",
        /// The cluster: the source of endpoints does not answer, or is not believed.
        DiscoveryStale = "discovery_stale",
    }
}

impl Problem {
    /// Whether it is one of the process, not of a route.
    pub fn is_of_process(self) -> bool {
        matches!(self, Self::SessionLimit | Self::WorkerOverloaded | Self::CpuThrottled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::family::Values;
    use crate::metrics::sections;

    #[test]
    fn labels_are_in_the_order_of_their_discriminants_and_distinct() {
        for (i, reason) in CloseReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), i);
            assert_eq!(reason.name(), CloseReason::ROWS[i].name);
        }
        for family in sections().into_iter().flat_map(|(_, families)| families) {
            for label in family.labels {
                let Values::OneOf(values) = label.values else { continue };
                let mut names: Vec<_> = values.iter().map(|value| value.name).collect();
                names.sort_unstable();
                names.dedup();
                assert_eq!(names.len(), values.len(), "{} of {}", label.name, family.name);
            }
        }
    }
}
