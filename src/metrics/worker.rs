//! What each worker counts of itself: one row per metric, in the order of the text. It is written by
//! that worker alone, and read by the control thread and, to spread clients, by the other workers.

use std::sync::Arc;

use super::cells::{Cell, Gauge, cells};
use super::counted::{Row, counted};
use super::family::{LabelName, family, or};
use super::route::RouteStats;

counted! {
    /// All that one worker counts. Blocks of different workers share no cache line.
    pub struct WorkerStats {
        metrics {
            /// Clients handed over to a worker with fewer sessions.
            handed_over: Counter = "aegis_clients_handed_over_total" per WORKER;
            /// Failed accepts: descriptors or memory short.
            accept_errors: Counter = "aegis_accept_errors_total" per WORKER;
            /// Times accepting was paused at the session limit.
            accept_pauses: Counter = "aegis_accept_pauses_total" per WORKER;
            /// Turns of the worker's loop: one wait in the kernel each.
            turns: Counter = "aegis_worker_turns_total" per WORKER;
            /// I/O completions handled.
            completions: Counter = "aegis_worker_completions_total" per WORKER;
            /// Times a receive had to wait for a free buffer.
            buffer_waits: Counter = "aegis_buffer_waits_total" per WORKER;
            /// Times that moving bulk within the kernel failed, for want of descriptors or of
            /// permission; it is copied for a second then.
            splice_failures: Counter = "aegis_splice_failures_total" per WORKER;
            /// Completions of the kernel that answer nothing, or cannot be true: a fault of its own, which
            /// costs the connection that they name.
            strays: Counter = "aegis_stray_completions_total" per WORKER;
            /// Buffers now holding bytes in flight.
            buffers_in_use: Gauge = "aegis_buffers_in_use" per WORKER;
            /// Time for which the worker was ready to run and waited for a core, or for its CPU quota.
            core_wait: DurationTotal = "aegis_worker_core_wait_seconds_total" per WORKER;
            /// CPU time that the worker spent.
            cpu: DurationTotal = "aegis_worker_cpu_seconds_total" per WORKER;
        }
        others {
            /// Milliseconds since the process started, as of the worker's latest turn.
            pub heartbeat_ms: Gauge;
            /// Sessions now open, of all routes.
            pub sessions: Gauge;
            /// A [`WorkerState`].
            state: Gauge;
            /// What it counts of each route, by their numbers.
            pub routes: Box<[Arc<RouteStats>]>;
        }
    }
}

impl WorkerStats {
    /// Counters of a worker with so many routes.
    pub fn new(routes: usize) -> Self {
        let routes = (0..routes).map(|_| Arc::default()).collect();
        Self { routes, ..Self::default() }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_two_workers_share_no_cache_line() {
        for (align, size) in [
            (align_of::<WorkerStats>(), size_of::<WorkerStats>()),
            (align_of::<RouteStats>(), size_of::<RouteStats>()),
        ] {
            assert_eq!((align % 64, size % 64), (0, 0));
        }
    }
}
