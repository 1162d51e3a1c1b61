//! What happens while a terminal shows a proxy: keys, signals and readings, one after the other.
//!
//! Each kind is waited for on a thread of its own, so that none holds up another: a key counts while
//! the proxy does not answer, and a signal while the terminal takes nothing.

use std::io::{self, Read};
use std::process::exit;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::{sleep, timeout};

use crate::cli::admin::Admin;
use crate::cli::signals::{exit_code, spawn, watch};

/// How often the proxy is asked.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);

/// How long the end may take that a signal asks for.
const END_TIME_MAX: Duration = Duration::from_secs(1);

/// Something that has happened.
#[derive(Debug)]
pub(super) enum Event {
    Key(u8),
    /// No more keys can come.
    Closed,
    /// What the proxy says of itself, or why it does not.
    Reading(Result<Value, String>),
    Signal(SignalKind),
}

/// Another owner is to have the terminal.
pub(super) const SUSPEND: SignalKind = SignalKind::from_raw(libc::SIGTSTP);

/// This process has the terminal again, which somebody else may have changed.
pub(super) const RESUME: SignalKind = SignalKind::from_raw(libc::SIGCONT);

fn ends() -> [SignalKind; 4] {
    use SignalKind as Kind;
    [Kind::hangup(), Kind::interrupt(), Kind::quit(), Kind::terminate()]
}

/// Takes the signals over and waits for all else from now on.
///
/// # Errors
/// A signal handler cannot be set, or there is no thread to wait.
pub(super) fn begin(admin: Admin) -> io::Result<Receiver<Event>> {
    let (events, receiver) = channel(1);
    watch_signals(&events)?;
    let of_keys = events.clone();
    spawn(move || read_keys(&of_keys))?;
    spawn(move || ask(&admin, &events))?;
    Ok(receiver)
}

fn watch_signals(events: &Sender<Event>) -> io::Result<()> {
    watch(|runtime| {
        for kind in [SUSPEND, RESUME, SignalKind::window_change()] {
            runtime.spawn(pass_on(signal(kind)?, kind, events.clone()));
        }
        for kind in ends() {
            runtime.spawn(end(signal(kind)?, kind, events.clone()));
        }
        Ok(())
    })
}

async fn pass_on(mut signals: Signal, kind: SignalKind, events: Sender<Event>) {
    while signals.recv().await.is_some() && events.send(Event::Signal(kind)).await.is_ok() {}
}

async fn end(mut signals: Signal, kind: SignalKind, events: Sender<Event>) {
    signals.recv().await;
    let _ = timeout(END_TIME_MAX, events.send(Event::Signal(kind))).await;
    // A terminal that takes nothing cannot be given back, and must not be waited for.
    sleep(END_TIME_MAX).await;
    exit(i32::from(exit_code(kind)));
}

fn read_keys(events: &Sender<Event>) {
    let mut byte = [0];
    loop {
        let event = match io::stdin().read(&mut byte) {
            Ok(1) => Event::Key(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            _ => Event::Closed,
        };
        let is_last = matches!(event, Event::Closed);
        if events.blocking_send(event).is_err() || is_last {
            return;
        }
    }
}

fn ask(admin: &Admin, events: &Sender<Event>) {
    loop {
        thread::sleep(INTERVAL);
        if events.blocking_send(Event::Reading(admin.json("/status"))).is_err() {
            return;
        }
    }
}
