//! How many events to wait for: adaptive batching.
//!
//! Waking up for each event is what makes a busy proxy slow, and waiting for several is what makes
//! an idle one slow. What tells the two apart are two things together. One is the number of
//! different sessions active in the last few milliseconds: the rate of events alone does not do
//! (one connection in ping-pong has as many a second as two hundred). The other is the rate: at
//! half of what the machine can do just as many sessions are active, but a wait brings few events.
//! The size of recent batches says nothing: each wake-up finds one or two events, takes that for a
//! light load and stays there.

use std::time::{Duration, Instant};

/// Activity is counted over windows of this length.
const WINDOW: Duration = Duration::from_millis(5);
/// With fewer active sessions than this, every event counts at once.
const SESSIONS_MIN: u32 = 16;
/// The wait is for the events of a quarter of the active sessions…
const SESSIONS_PER_EVENT: u32 = 4;
/// …but not for more than this,
const EVENTS_MAX: u32 = 128;
/// nor longer than this.
const BATCH_MAX: Duration = Duration::from_micros(100);

/// Where fewer events than four are expected in that time, waiting costs more than it saves.
const EVENTS_MIN: u32 = 4 * (WINDOW.as_micros() / BATCH_MAX.as_micros()) as u32;

/// Estimates the load of one worker.
#[derive(Debug)]
pub struct Batcher {
    /// The number of the present window; sessions remember the one they were last counted in.
    window: u32,
    since: Instant,
    /// Different sessions that were active, and all events, now and in the window before.
    active: Activity,
    previous: Activity,
}

#[derive(Debug, Clone, Copy, Default)]
struct Activity {
    sessions: u32,
    events: u32,
}

impl Batcher {
    /// No load so far.
    pub fn new(now: Instant) -> Self {
        Self { window: 1, since: now, active: Activity::default(), previous: Activity::default() }
    }

    /// A session moved bytes; `window` is its mark.
    pub fn on_active(&mut self, window: &mut u32) {
        self.active.events += 1;
        if *window != self.window {
            *window = self.window;
            self.active.sessions += 1;
        }
    }

    /// How many events to wait for, and how long for more than one.
    pub fn plan(&mut self, now: Instant) -> (u32, Duration) {
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed >= WINDOW {
            // What is older than a whole window says nothing about the present.
            let recent = elapsed < 2 * WINDOW;
            self.previous = if recent { self.active } else { Activity::default() };
            self.active = Activity::default();
            self.window = self.window.wrapping_add(1);
            self.since = now;
        }
        let sessions = self.active.sessions.max(self.previous.sessions);
        let events = self.active.events.max(self.previous.events);
        if sessions < SESSIONS_MIN || events < EVENTS_MIN {
            return (1, Duration::ZERO);
        }
        ((sessions / SESSIONS_PER_EVENT).min(EVENTS_MAX), BATCH_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(sessions: u32, events: u32) -> u32 {
        run_at(sessions, events, Duration::from_micros(20))
    }

    fn run_at(sessions: u32, events: u32, interval: Duration) -> u32 {
        let start = Instant::now();
        let mut batcher = Batcher::new(start);
        let mut marks = vec![0; sessions as usize];
        let mut plan = 0;
        for event in 0..events {
            batcher.on_active(&mut marks[(event % sessions) as usize]);
            plan = batcher.plan(start + event * interval).0;
        }
        plan
    }

    #[test]
    fn one_busy_session_never_waits_and_many_batch() {
        assert_eq!(run(1, 10_000), 1);
        assert_eq!(run(15, 10_000), 1);
        assert_eq!(run(200, 10_000), 50);
        assert_eq!(run(5000, 10_000), 62, "250 events fit in a window");
    }

    #[test]
    fn many_sessions_that_bring_few_events_do_not_wait() {
        assert_eq!(run_at(200, 10_000, Duration::from_micros(30)), 1);
        assert_eq!(run_at(200, 10_000, Duration::from_micros(24)), 50);
    }

    #[test]
    fn an_old_load_is_forgotten_at_once() {
        let start = Instant::now();
        let mut batcher = Batcher::new(start);
        let mut marks = [0; 100];
        for _ in 0..3 {
            for mark in &mut marks {
                batcher.on_active(mark);
            }
        }
        assert_eq!(batcher.plan(start).0, 25);
        assert_eq!(batcher.plan(start + 2 * WINDOW).0, 1);
    }
}
