//! From the first signal to the end of the process.
//!
//! ```text
//! SIGTERM or SIGINT ─▶ not ready, still accepting ─AEGIS_DRAIN_DELAY─▶ accept queue emptied, no
//! longer accepting ─last session or AEGIS_DRAIN_TIMEOUT─▶ the rest is ended ─▶ exit
//! ```
//!
//! A second signal ends everything at once.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::task::Poll;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::Shared;
use crate::worker::mailbox::Order;

/// Workers told to stop end within a turn; one that does not is given up.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// How the process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every session had finished.
    Drained,
    /// So many sessions were still open at the end of the drain and were ended.
    Cut(u64),
    /// The workers ended unasked.
    WorkersGone,
}

/// The signals that ask for an end.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Takes the signals over from their default actions.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for either, and names it.
    async fn next(&mut self) -> &'static str {
        poll_fn(|context| {
            if self.terminate.poll_recv(context).is_ready() {
                Poll::Ready("SIGTERM")
            } else if self.interrupt.poll_recv(context).is_ready() {
                Poll::Ready("SIGINT")
            } else {
                Poll::Pending
            }
        })
        .await
    }
}

/// How a stage of the drain ended.
enum Stage {
    /// Its time is over.
    TimeUp,
    /// All workers have ended.
    WorkersEnded,
    /// Another signal came.
    Signal(&'static str),
}

async fn stage(
    length: Duration,
    signals: &mut Signals,
    exited: &mut mpsc::Receiver<Infallible>,
) -> Stage {
    let event = async {
        tokio::select! {
            _ = exited.recv() => Stage::WorkersEnded,
            name = signals.next() => Stage::Signal(name),
        }
    };
    timeout(length, event).await.unwrap_or(Stage::TimeUp)
}

/// Waits for a signal and drains.
pub async fn run(
    shared: &Shared,
    mut signals: Signals,
    mut exited: mpsc::Receiver<Infallible>,
) -> Outcome {
    let name = tokio::select! {
        _ = exited.recv() => {
            tracing::error!("all workers have ended unasked");
            return Outcome::WorkersGone;
        }
        name = signals.next() => name,
    };
    shared.set_draining();
    let delay = shared.config.drain_delay;
    tracing::info!(
        signal = name,
        sessions = shared.sessions_active(),
        delay = %humantime::format_duration(delay),
        "draining: no longer ready, still accepting"
    );
    let mut end = stage(delay, &mut signals, &mut exited).await;
    if matches!(end, Stage::TimeUp) {
        let limit = shared.config.drain_timeout;
        tracing::info!(
            sessions = shared.sessions_active(),
            timeout = %humantime::format_duration(limit),
            "draining: no longer accepting, sessions may finish"
        );
        shared.order(Order::Drain);
        end = stage(limit, &mut signals, &mut exited).await;
    }
    if matches!(end, Stage::WorkersEnded) {
        tracing::info!("drained: every session has finished");
        return Outcome::Drained;
    }
    let cut = shared.sessions_active();
    match end {
        Stage::Signal(name) => {
            tracing::warn!(signal = name, sessions = cut, "a second signal: ending at once");
        }
        _ => tracing::warn!(sessions = cut, "the drain's time is over: ending what is open"),
    }
    shared.order(Order::Stop);
    if timeout(STOP_TIMEOUT, exited.recv()).await.is_err() {
        tracing::error!("a worker did not end; leaving it");
    }
    Outcome::Cut(cut)
}
