//! What is decided before anything is bound: how many workers and where, the driver, how much there
//! is room for; and then the sockets to listen on.

mod capacity;
mod cores;
mod driver;
mod error;
pub mod listeners;
mod quota;
mod socket_file;
mod spawn;
#[cfg(test)]
mod testing;

use crate::config::Config;

pub use capacity::Capacity;
pub use cores::Plan;
pub use driver::{Choice, prepare_workers};
pub use error::StartError;
pub use quota::Quota;
pub use socket_file::{Access, SocketFile};
pub use spawn::start_workers;

/// What is decided before anything is bound.
#[derive(Debug)]
pub struct Decisions {
    /// How many workers there are, and on which cores.
    pub plan: Plan,
    /// What drives their sockets.
    pub driver: Choice,
    /// How much there is room for.
    pub capacity: Capacity,
}

/// Decides by the configuration, and by what this host and its kernel allow.
///
/// # Errors
/// They do not allow what is configured.
pub fn decide(config: &Config) -> Result<Decisions, StartError> {
    config.check_files()?;
    let nofile = capacity::raise_nofile();
    let driver = driver::choose(config.io)?;
    let plan = cores::plan(config.workers, config.pin, &config.resources);
    let capacity = capacity::of(config, plan.cores.len(), nofile)?;
    Ok(Decisions { plan, driver, capacity })
}
