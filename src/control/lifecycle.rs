//! How the process ends: a drain in three stages, each with a deadline.
//!
//! ```text
//! serving ─SIGTERM─▶ delaying ─drain_delay─▶ leaving ─nobody to wait for─▶ finishing ─last session─▶ drained
//!                       │ not ready,            │ still accepts,             │ accepts no more
//!                       │ still accepts         │ idle clients leave         ├─drain_timeout─▶ stopping ─▶ deadline passed
//!                       └──────second signal────┴────────────────────────────┴───────────────▶ stopping ─▶ stopped
//! ```
//!
//! While sessions hold the process up, newcomers are better served than refused: in a pod whose
//! sidecar alone is restarted there is nowhere else to go until this process has ended. So it listens
//! until nobody is left, or nearly until the deadline, which includes the time of both stages. Where
//! clients are asked to leave once they have nothing under way, only those are waited for that were
//! there before.
//!
//! SIGTERM and SIGINT mean the same. SIGHUP is ignored: the configuration comes from the
//! environment, so there is nothing to read again, and the end of a terminal or of a supervisor's
//! session must not cut traffic.

use std::convert::Infallible;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{error, info, warn};

use super::View;
use super::view::RouteView;
use crate::config::PoolMode;
use crate::metrics::{RouteStats, WorkerState};
use crate::worker::mailbox::Command;

/// How long workers may take to end after the command to stop.
pub(super) const STOP_MAX: Duration = Duration::from_secs(5);

/// So long before the deadline the process accepts no more: what is accepted last has time to be
/// noticed, for the workers listen for 100 ms longer, and short sessions to end.
const LAST_CALL: Duration = Duration::from_millis(250);

/// Where all places are taken for so long, nobody else is going to be served by this process.
const FULL_MAX: Duration = Duration::from_secs(1);

/// How often it is looked whether somebody is to be waited for.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Where the kubelet looks for the reason of a container's end, unless configured otherwise.
const TERMINATION_LOG: &str = "/dev/termination-log";

/// The kubelet reads no more.
const TERMINATION_LOG_MAX: usize = 4096;

/// What stands in the log for a signal where the control socket asked for the drain.
const BY_CONTROL_SOCKET: &str = "none, the control socket";

/// Events that may wait. Signals of one kind that come faster are merged by the kernel anyway.
const EVENTS_MAX: usize = 4;

/// How the process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Every session finished within the drain's time.
    Drained,
    /// The drain's deadline passed and these sessions were cut.
    DeadlinePassed {
        /// Sessions open at the deadline.
        sessions_cut: u64,
    },
    /// A second signal came and these sessions were cut.
    Stopped {
        /// Sessions open at that signal.
        sessions_cut: u64,
    },
    /// Workers did not end within [`STOP_MAX`] of the command to stop; their threads still run.
    Stuck,
    /// The workers ended without a command.
    WorkersEnded,
    /// It was asked to end before it had ever started, which it could not, because of an error of the
    /// configuration or of rights.
    Misconfigured {
        /// What the error is.
        reason: String,
    },
}

impl Outcome {
    /// Whether the process should exit with a failure.
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Stuck | Self::WorkersEnded | Self::Misconfigured { .. })
    }
}

/// What moves the process towards its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// The named signal asked the process to end.
    Terminate(&'static str),
    /// Every worker thread has ended.
    WorkersEnded,
}

/// The signals, taken over: one that comes from then on is kept until it is looked for.
#[derive(Debug)]
pub(super) struct Signals {
    terminate: Vec<(Signal, &'static str)>,
    hangup: Signal,
}

impl Signals {
    /// Takes over the signals; to be called in a runtime.
    ///
    /// # Errors
    /// A signal handler cannot be set.
    pub(super) fn take_over() -> io::Result<Self> {
        let terminate = [(SignalKind::terminate(), "SIGTERM"), (SignalKind::interrupt(), "SIGINT")];
        let terminate = terminate.into_iter().map(|(kind, name)| Ok((signal(kind)?, name)));
        // Its handler stays: from now on a write beyond `RLIMIT_FSIZE`, as of the log, only fails.
        drop(signal(SignalKind::from_raw(libc::SIGXFSZ))?);
        Ok(Self {
            terminate: terminate.collect::<io::Result<_>>()?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}

/// Watches the signals and the workers' end; to be called in a runtime.
pub(super) fn events(
    signals: Signals,
    mut exited: mpsc::Receiver<Infallible>,
) -> mpsc::Receiver<Event> {
    let (events, receiver) = mpsc::channel(EVENTS_MAX);
    let Signals { terminate, mut hangup } = signals;
    for (mut signals, name) in terminate {
        let events = events.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                let _ = events.send(Event::Terminate(name)).await;
            }
        });
    }
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            info!("SIGHUP ignored: there is no configuration to read again");
        }
    });
    tokio::spawn(async move {
        let None = exited.recv().await;
        let _ = events.send(Event::WorkersEnded).await;
    });
    receiver
}

/// Waits for the signal to end, or the same from the control socket, then drains; returns once all workers
/// have ended or are stuck.
///
/// The control socket asks by `drain_asked`, which is looked at once: unlike a second signal, to ask
/// again is no command to cut what drains. Nor is the first signal behind it.
pub(super) async fn run(
    view: &View,
    mut events: mpsc::Receiver<Event>,
    drain_asked: &Notify,
) -> Outcome {
    let signal = tokio::select! {
        biased;
        event = events.recv() => match event {
            Some(Event::Terminate(signal)) => signal,
            _ => return ended_early(),
        },
        () = drain_asked.notified() => BY_CONTROL_SOCKET,
    };
    // What is learned from now on comes too late for anybody who waited for the start.
    let misconfigured = view.misconfigured();
    let events = DrainEvents { events, had_signal: signal != BY_CONTROL_SOCKET };
    let outcome = drain(view, events, signal).await;
    match misconfigured {
        Some(reason) if !outcome.is_failure() => {
            leave_message(TERMINATION_LOG, &reason);
            Outcome::Misconfigured { reason }
        }
        _ => outcome,
    }
}

/// The events of a drain.
struct DrainEvents {
    events: mpsc::Receiver<Event>,
    /// Whether a signal has come.
    had_signal: bool,
}

impl DrainEvents {
    /// The next one. The first signal is none: a pod that is deleted gets one, be it draining or not, and
    /// its sessions have their time.
    async fn next(&mut self) -> Option<Event> {
        loop {
            match self.events.recv().await {
                Some(Event::Terminate(signal)) if !self.had_signal => {
                    self.had_signal = true;
                    info!(signal, "draining already: a second signal would end it at once");
                }
                event => return event,
            }
        }
    }
}

/// Leaves the reason for the end where the kubelet looks for it, if there is such a place.
fn leave_message(path: &str, reason: &str) {
    // A pipe that somebody put there must not keep the process from its end.
    let options = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path);
    if let Ok(mut file) = options {
        let mut end = reason.len().min(TERMINATION_LOG_MAX);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        // It is in the log as well.
        let _ = file.write_all(&reason.as_bytes()[..end]);
    }
}

async fn drain(view: &View, mut events: DrainEvents, signal: &str) -> Outcome {
    view.set_draining();
    let config = view.config();
    info!(
        signal,
        sessions = view.sessions_active(),
        delay_ms = config.drain_delay.as_millis() as u64,
        "drain asked: not ready, still accepting"
    );
    match timeout(config.drain_delay, events.next()).await {
        Err(_) => {}
        Ok(Some(Event::Terminate(signal))) => return cut(view, events, signal).await,
        Ok(_) => return ended_early(),
    }

    let deadline = Instant::now() + config.drain_timeout;
    command(view, Command::Leave);
    info!(
        sessions = view.sessions_active(),
        timeout_ms = config.drain_timeout.as_millis() as u64,
        "draining: sessions finish, still accepting until they have"
    );
    let left = timeout(config.drain_timeout.saturating_sub(LAST_CALL), nobody_to_wait_for(view));
    tokio::select! {
        biased;
        event = events.next() => match event {
            Some(Event::Terminate(signal)) => return cut(view, events, signal).await,
            _ => return ended_early(),
        },
        _ = left => {}
    }

    command(view, Command::Drain);
    info!(sessions = view.sessions_active(), "draining: accepting no more, sessions finish");
    match timeout_at(deadline, events.next()).await {
        Ok(Some(Event::Terminate(signal))) => cut(view, events, signal).await,
        Ok(_) => {
            info!("drained: every session has finished");
            Outcome::Drained
        }
        Err(_) => {
            let sessions_cut = view.sessions_active();
            warn!(sessions_cut, "drain deadline passed: ending the rest");
            stop(view, events, Outcome::DeadlinePassed { sessions_cut }).await
        }
    }
}

/// Waits until no session is left for which the process goes on.
async fn nobody_to_wait_for(view: &View) {
    let mut room_at = Instant::now();
    loop {
        let sessions = view.sessions_active();
        if sessions < view.max_sessions() as u64 {
            room_at = Instant::now();
        }
        let drains = view.stats().all(|stats| stats.state() == WorkerState::Draining);
        let over = sessions == 0 || drains && view.routes().all(|route| has_left(&route));
        // Those who wait for a place are let in by the next stage.
        if over || room_at.elapsed() >= FULL_MAX {
            return;
        }
        sleep(LOOK_INTERVAL).await;
    }
}

/// Whether nobody is left of a route for whom the process goes on, as far as that is the route's.
fn has_left(route: &RouteView<'_>) -> bool {
    let is_over = |stats: &&RouteStats| match route.config.pool.mode {
        PoolMode::Preconnect => stats.sessions_active.get() == 0,
        // Newcomers leave as well, each after its first request.
        PoolMode::Session | PoolMode::Request => stats.sessions_before_drain.get() == 0,
    };
    route.stats.iter().all(is_over)
}

async fn cut(view: &View, events: DrainEvents, signal: &str) -> Outcome {
    let sessions_cut = view.sessions_active();
    warn!(signal, sessions_cut, "second signal: ending at once");
    stop(view, events, Outcome::Stopped { sessions_cut }).await
}

/// Orders the workers to stop; `outcome` once they have.
async fn stop(view: &View, mut events: DrainEvents, outcome: Outcome) -> Outcome {
    command(view, Command::Stop);
    let ended = async { while let Some(Event::Terminate(_)) = events.next().await {} };
    if timeout(STOP_MAX, ended).await.is_ok() {
        info!(?outcome, "stopped: every worker has ended");
        outcome
    } else {
        error!(waited_s = STOP_MAX.as_secs(), "workers do not end: leaving them behind");
        Outcome::Stuck
    }
}

fn ended_early() -> Outcome {
    error!("every worker has ended though none was asked to");
    Outcome::WorkersEnded
}

fn command(view: &View, command: Command) {
    for worker in view.workers() {
        worker.mailbox.command(command);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;

    use super::*;
    use crate::config::Config;
    use crate::control::testing::{self, block_on};

    const HOUR: Duration = Duration::from_secs(3600);

    /// Runs a process of these times; the events come in this order, each once the workers have
    /// the order that stands beside it. Gives the outcome and the last order.
    fn life(
        drain_delay: Duration,
        drain_timeout: Duration,
        script: &[(Command, Event)],
    ) -> (Outcome, Command) {
        let config = Config { drain_delay, drain_timeout, ..testing::config() };
        life_of(config, [2, 1], script)
    }

    /// The same with this configuration and so many sessions per worker.
    fn life_of(
        config: Config,
        sessions: [u64; 2],
        script: &[(Command, Event)],
    ) -> (Outcome, Command) {
        let view = testing::view(config, Vec::new());
        for (worker, sessions) in view.workers().iter().zip(sessions) {
            worker.stats.sessions.set(sessions);
            worker.stats.routes[0].sessions_active.set(sessions);
            worker.stats.set_state(WorkerState::Draining);
        }
        let view = Arc::new(view);
        block_on(async {
            let (sender, events) = mpsc::channel(1);
            let running = tokio::spawn({
                let view = Arc::clone(&view);
                async move { run(&view, events, &Notify::new()).await }
            });
            for &(command, event) in script {
                while view.workers().iter().any(|w| w.mailbox.current_command() != command) {
                    tokio::task::yield_now().await;
                }
                sender.send(event).await.unwrap();
            }
            (running.await.unwrap(), view.workers()[1].mailbox.current_command())
        })
    }

    const SIGTERM: Event = Event::Terminate("SIGTERM");

    #[test]
    fn sessions_that_finish_in_time_make_a_clean_drain() {
        let script = [(Command::Run, SIGTERM), (Command::Drain, Event::WorkersEnded)];
        let config =
            Config { drain_delay: Duration::ZERO, drain_timeout: HOUR, ..testing::config() };
        let drained = (Outcome::Drained, Command::Drain);
        assert_eq!(life_of(config.clone(), [0, 0], &script), drained);
        // Clients that are asked to leave need not all have left: these came later.
        let mut framed = config;
        Arc::make_mut(&mut framed.routes[0]).pool.mode = PoolMode::Request;
        assert_eq!(life_of(framed, [0, 3], &script), drained);
    }

    #[test]
    fn the_deadline_cuts_the_rest() {
        let script = [(Command::Run, SIGTERM), (Command::Stop, Event::WorkersEnded)];
        let outcome = Outcome::DeadlinePassed { sessions_cut: 3 };
        assert_eq!(life(Duration::ZERO, Duration::ZERO, &script), (outcome.clone(), Command::Stop));
        assert!(!outcome.is_failure());
    }

    #[test]
    fn a_second_signal_ends_at_once_at_any_stage_and_a_third_changes_nothing() {
        let outcome = Outcome::Stopped { sessions_cut: 3 };
        let end = [(Command::Stop, SIGTERM), (Command::Stop, Event::WorkersEnded)];
        let delaying = [&[(Command::Run, SIGTERM), (Command::Run, SIGTERM)], &end[..]].concat();
        assert_eq!(life(HOUR, HOUR, &delaying), (outcome.clone(), Command::Stop));
        let leaving = [&[(Command::Run, SIGTERM), (Command::Leave, SIGTERM)], &end[..]].concat();
        assert_eq!(life(Duration::ZERO, HOUR, &leaving), (outcome.clone(), Command::Stop));
        let finishing = [&[(Command::Run, SIGTERM), (Command::Drain, SIGTERM)], &end[..]].concat();
        assert_eq!(life(Duration::ZERO, LAST_CALL, &finishing), (outcome, Command::Stop));
    }

    /// A pod that is deleted while it drains gets one signal, as ever.
    #[test]
    fn the_first_signal_cuts_no_drain_that_was_asked_for_otherwise() {
        let config = Config { drain_delay: HOUR, drain_timeout: HOUR, ..testing::config() };
        let view = testing::view(config, Vec::new());
        block_on(async {
            let (sender, events) = mpsc::channel(1);
            let drain_asked = Notify::new();
            drain_asked.notify_one();
            let mut running = pin!(run(&view, events, &drain_asked));
            let mut goes_on = async || timeout(Duration::ZERO, &mut running).await.is_err();
            assert!(goes_on().await && view.draining());
            for _ in 0..2 {
                assert_eq!(view.workers()[0].mailbox.current_command(), Command::Run);
                sender.try_send(SIGTERM).unwrap();
                assert!(goes_on().await);
            }
            assert_eq!(view.workers()[0].mailbox.current_command(), Command::Stop);
        });
    }

    #[test]
    fn workers_that_end_early_are_a_failure() {
        for script in [
            &[(Command::Run, Event::WorkersEnded)][..],
            &[(Command::Run, SIGTERM), (Command::Run, Event::WorkersEnded)],
        ] {
            let (outcome, command) = life(HOUR, HOUR, script);
            assert!(outcome.is_failure());
            assert_eq!((outcome, command), (Outcome::WorkersEnded, Command::Run));
        }
    }

    #[test]
    fn a_message_is_left_where_there_is_a_place_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("termination-log");
        let path = path.to_str().unwrap();
        leave_message(path, "nobody asked for it");
        assert!(!std::fs::exists(path).unwrap());
        std::fs::write(path, "").unwrap();
        leave_message(path, &"ä".repeat(4000));
        assert_eq!(std::fs::read_to_string(path).unwrap(), "ä".repeat(2048));
    }
}
