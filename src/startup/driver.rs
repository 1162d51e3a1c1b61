//! Which driver serves: `io_uring` where it works, else epoll.

use super::cores::Plan;
use crate::config::IoChoice;
use crate::io::probe::{self, Denied, DriverKind, Features};
use crate::worker::{self, Prepared, WorkerError};

/// The driver of all workers, and why it is this one.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The driver.
    pub driver: DriverKind,
    /// One sentence for the log, the metric and `check`.
    pub reason: String,
}

/// `AEGIS_IO=uring` cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "AEGIS_IO=uring: io_uring cannot be used here: {0}. \
     Set AEGIS_IO=auto to run on epoll instead"
)]
pub struct Unavailable(#[source] Denied);

/// Chooses the driver that `io` asks for, or the best that works.
///
/// # Errors
/// `io_uring` is demanded but denied.
pub(super) fn choose(io: IoChoice) -> Result<Choice, Unavailable> {
    if io == IoChoice::Epoll {
        return Ok(Choice { driver: DriverKind::Epoll, reason: "AEGIS_IO=epoll".into() });
    }
    match probe::uring() {
        Ok(features) => {
            Ok(Choice { driver: DriverKind::Uring(features), reason: describe(features) })
        }
        Err(denied) if io == IoChoice::Uring => Err(Unavailable(denied)),
        Err(denied) => Ok(Choice::epoll_instead(denied)),
    }
}

/// Prepares a worker for each core of the plan, on the driver that was chosen; or all on epoll, where
/// `io` leaves that open and the kernel does not give each a ring.
///
/// # Errors
/// A thread or its ring cannot be set up.
pub fn prepare_workers(
    plan: &Plan,
    choice: Choice,
    io: IoChoice,
) -> Result<(Vec<Prepared>, Choice), WorkerError> {
    let prepare_all = |driver| -> Result<Vec<_>, _> {
        let cores = plan.cores.iter().enumerate();
        cores.map(|(index, &core)| worker::prepare(index, core, driver)).collect()
    };
    match prepare_all(choice.driver) {
        Err(error) if io == IoChoice::Auto && choice.driver != DriverKind::Epoll => {
            let choice = Choice::epoll_instead(error);
            Ok((prepare_all(choice.driver)?, choice))
        }
        outcome => Ok((outcome?, choice)),
    }
}

impl Choice {
    fn epoll_instead(why: impl std::fmt::Display) -> Self {
        let reason = format!("io_uring cannot be used: {why}");
        Self { driver: DriverKind::Epoll, reason }
    }
}

/// What works of `io_uring`, by what does not.
fn describe(features: Features) -> String {
    let mut missing = Vec::new();
    if !features.restricted {
        missing.push("restrictions of its rings (denied)");
    }
    if !features.defer_taskrun {
        missing.push("DEFER_TASKRUN (kernel 6.1)");
    }
    if !features.min_wait {
        missing.push("minimum wait (kernel 6.12)");
    }
    if !features.no_iowait {
        missing.push("idle waits that do not count as I/O wait (kernel 6.15)");
    }
    if missing.is_empty() {
        "all features work".to_owned()
    } else {
        format!("works, without {}", missing.join(", "))
    }
}
