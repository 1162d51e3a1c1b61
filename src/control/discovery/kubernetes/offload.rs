//! What may hang, each on a thread of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::AcqRel, Ordering::Release};
use std::thread;
use std::time::Duration;

use tokio::sync::{Mutex, oneshot};
use tokio::time::timeout;

use super::trouble::Trouble;

/// Runs one thing at a time that may hang: a file on a dead disk, a program that waits for ever. One
/// that does keeps its thread, and no other is started meanwhile, so hung threads do not pile up.
#[derive(Debug, Default)]
pub(super) struct Offload {
    /// Those that have not hung yet wait for each other.
    turns: Mutex<()>,
    busy: Arc<AtomicBool>,
}

impl Offload {
    /// Does it in its turn, and waits for its result for at most this long.
    ///
    /// # Errors
    /// It takes longer, or what was begun before has not ended yet.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        what: &str,
        limit: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Trouble> {
        let _turn = self.turns.lock().await;
        if self.busy.swap(true, AcqRel) {
            return Err(Trouble::configuration(format!("{what} waits for what hangs already")));
        }
        let (sender, receiver) = oneshot::channel();
        let busy = Arc::clone(&self.busy);
        let spawned = thread::Builder::new().name("aegis-offload".to_owned()).spawn(move || {
            let result = work();
            busy.store(false, Release);
            // Nobody waits any more if it took too long.
            drop(sender.send(result));
        });
        if let Err(error) = spawned {
            self.busy.store(false, Release);
            return Err(Trouble::unreachable(format!("no thread for {what}: {error}")));
        }
        match timeout(limit, receiver).await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(_)) | Err(_) => {
                Err(Trouble::configuration(format!("{what} takes longer than {limit:?}")))
            }
        }
    }
}
