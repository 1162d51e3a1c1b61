//! Signals to a command that goes on for a while, which are waited for on a thread of their own.

use std::io;
use std::thread;

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::SignalKind;

/// What shells make of the end by a signal.
pub(super) fn exit_code(signal: SignalKind) -> u8 {
    128 + signal.as_raw_value() as u8
}

/// Has what `begin` spawns wait for signals from now on.
///
/// # Errors
/// A signal handler cannot be set, or there is no thread to wait.
pub(super) fn watch(begin: impl FnOnce(&Runtime) -> io::Result<()>) -> io::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let entered = runtime.enter();
    begin(&runtime)?;
    drop(entered);
    spawn(move || runtime.block_on(std::future::pending::<()>()))
}

/// Has a thread wait for something.
///
/// # Errors
/// There is none.
pub(super) fn spawn(wait: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let spawned = thread::Builder::new().spawn(wait);
    spawned.map(drop).map_err(|error| io::Error::new(error.kind(), format!("no thread: {error}")))
}
