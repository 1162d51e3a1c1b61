//! What nobody counts: the control thread reads it when it is asked. One row per metric, in the order
//! of the text.

use super::cells::{Cell, Counter, Gauge, Histogram};
use super::family::{Family, LabelName, family};

/// Declares rows, and a list of them all:
///
/// ```text
/// /// Help text, and the constant's documentation.
/// ROW: Cell [label: Set] = "name" per OPEN_LABEL, … if CONDITION;
/// ```
macro_rules! scraped {
    ($(#[doc = $about:literal])+ $list:ident {$(
        $(#[doc = $doc:literal])+
        $row:ident: $cell:ident $([$label:ident: $set:ident])? = $name:literal
            $(per $($open:ident),+)? $(if $when:ident)?;
    )+}) => {
        $(#[doc = $about])+
        pub const $list: &[&Family] = &[$(&$row,)+];

        $($(#[doc = $doc])+ pub const $row: Family = family!(
            [$($doc)+]
            $cell::KIND,
            $name,
            &[
                $($(LabelName::$open,)+)?
                $(LabelName::of::<super::labels::$set>(stringify!($label)),)?
            ],
            [$($when)?]
        );)+
    };
}

scraped! {
    /// Of discovery.
    DISCOVERY {
        /// Generation of the latest endpoint snapshot, 0 before the first.
        DISCOVERY_GENERATION: Gauge = "aegis_discovery_generation" per ROUTE;
        /// Endpoints in the latest snapshot.
        DISCOVERY_ENDPOINTS: Gauge = "aegis_discovery_endpoints" per ROUTE;
        /// 1 while the store is there to be asked for its keys, else 0.
        STORE_PRESENT: Gauge = "aegis_store_present" per ROUTE, STORE if STORES;
        /// When the source of endpoints answered last, 0 before the first time and where none has to be asked.
        DISCOVERY_LAST_SYNC: Gauge = "aegis_discovery_last_sync_timestamp_seconds" per ROUTE;
        /// How old the endpoints are, while they are those of a former run.
        DISCOVERY_SNAPSHOT_AGE: Gauge = "aegis_discovery_snapshot_age_seconds" per ROUTE if SAVED_ENDPOINTS;
        /// What went wrong between discovery and its source.
        DISCOVERY_ERRORS: Counter [kind: ErrorKind] = "aegis_discovery_errors_total" per ROUTE;
    }
}

scraped! {
    /// Of endpoints, after what workers count of them.
    ENDPOINTS {
        /// 1 while some worker may send sessions to the endpoint, else 0.
        ENDPOINT_USABLE: Gauge = "aegis_endpoint_usable" per ROUTE, ENDPOINT;
        /// Active checks of the endpoint.
        ENDPOINT_CHECKS: Counter = "aegis_endpoint_checks_total" per ROUTE, ENDPOINT if CHECKS;
        /// Those that failed.
        ENDPOINT_CHECK_FAILURES: Counter = "aegis_endpoint_check_failures_total" per ROUTE, ENDPOINT
            if CHECKS;
        /// How long the network takes to the endpoint and back, as the kernel measures it on
        /// connections that are sampled.
        ENDPOINT_RTT: Histogram = "aegis_endpoint_rtt_seconds" per ROUTE, ENDPOINT;
        /// Pooled connections, by what they are doing.
        POOL_CONNECTIONS: Gauge [state: PooledState] = "aegis_pool_connections" per ROUTE, ENDPOINT;
    }
}

scraped! {
    /// Of the process; the last ones are those that Prometheus client libraries agree on.
    PROCESS {
        /// 1 while the proxy finds this to be wrong, else 0; without a route where it is the process's.
        PROBLEM: Gauge [kind: Problem] = "aegis_problem" per ROUTE;
        /// Most sessions at a time in the whole process.
        MAX_SESSIONS: Gauge = "aegis_max_sessions";
        /// 1 once the process was asked to end, else 0.
        DRAINING: Gauge = "aegis_draining";
        /// Lines of the log that were not read in time or could not be written.
        LOG_LINES_DROPPED: Counter = "aegis_log_lines_dropped_total";
        /// Ends of sessions and requests that were not logged, since there were too many.
        ENDS_DROPPED: Counter = "aegis_ends_dropped_total";
        /// The driver that does the I/O, and why this one.
        IO_DRIVER_INFO: Gauge = "aegis_io_driver_info" per DRIVER, REASON, KERNEL;
        /// The program's version and target.
        BUILD_INFO: Gauge = "aegis_build_info" per VERSION, ARCH;
        /// User and system CPU time spent.
        CPU_SECONDS: Counter = "process_cpu_seconds_total";
        /// Start of the process since the Unix epoch.
        START_TIME: Gauge = "process_start_time_seconds";
        /// Resident memory size.
        RESIDENT_MEMORY: Gauge = "process_resident_memory_bytes";
        /// Virtual memory size.
        VIRTUAL_MEMORY: Gauge = "process_virtual_memory_bytes";
        /// Threads of the process.
        THREADS: Gauge = "process_threads";
        /// Open file descriptors.
        OPEN_FDS: Gauge = "process_open_fds";
        /// Most open file descriptors.
        MAX_FDS: Gauge = "process_max_fds" if LIMITED_FDS;
    }
}
