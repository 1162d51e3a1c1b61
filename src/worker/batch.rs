//! How many events to wait for: adaptive batching.
//!
//! Waking up for each event is what makes a busy proxy slow, and waiting for several is what makes
//! an idle one slow. What tells the two apart are two things together. One is the number of
//! different sessions active in the last few milliseconds: the rate of events alone does not do
//! (one connection in ping-pong has as many a second as two hundred). The other is how many events
//! there are for each time that the worker falls asleep, or waits for a batch that does not become
//! full: at half of what the machine can do just as many sessions are active, but the worker, done
//! with them, sleeps again and again. Their rate would tell that too, but of one machine alone.

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

/// A worker that falls asleep more often than once in so many events has time to spare: waiting
/// costs more than it saves.
const EVENTS_PER_SLEEP: u32 = 32;

/// Estimates the load of one worker.
#[derive(Debug)]
pub struct Batcher {
    /// The number of the present window; sessions remember the one they were last counted in.
    window: u32,
    since: Instant,
    /// Of this window and the one before.
    active: Activity,
    previous: Activity,
}

#[derive(Debug, Clone, Copy, Default)]
struct Activity {
    /// Different ones that moved bytes.
    sessions: u32,
    events: u32,
    sleeps: u32,
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

    /// The worker had time to spare: it may have fallen asleep for a single event, or a batch has
    /// not become full in time.
    pub fn on_sleep(&mut self) {
        self.active.sleeps += 1;
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
        let events = self.active.events + self.previous.events;
        let sleeps = self.active.sleeps + self.previous.sleeps;
        if sessions < SESSIONS_MIN || events < EVENTS_PER_SLEEP * sleeps {
            return (1, Duration::ZERO);
        }
        ((sessions / SESSIONS_PER_EVENT).min(EVENTS_MAX), BATCH_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is waited for in the end, where each of `events_per_sleep` events of as many sessions
    /// as there are comes 20 µs after the one before.
    fn run(sessions: u32, events_per_sleep: u32) -> u32 {
        let start = Instant::now();
        let mut batcher = Batcher::new(start);
        let mut marks = vec![0; sessions as usize];
        let mut plan = 0;
        for event in 0..10_000 {
            if event % events_per_sleep == 0 {
                batcher.on_sleep();
            }
            batcher.on_active(&mut marks[(event % sessions) as usize]);
            plan = batcher.plan(start + event * Duration::from_micros(20)).0;
        }
        plan
    }

    #[test]
    fn one_busy_session_never_waits_and_many_batch() {
        assert_eq!(run(1, 100), 1);
        assert_eq!(run(15, 100), 1);
        assert_eq!(run(200, 100), 50);
        assert_eq!(run(5000, 100), 62, "250 events fit in a window");
    }

    #[test]
    fn a_worker_that_sleeps_often_does_not_wait() {
        assert_eq!(run(200, EVENTS_PER_SLEEP - 2), 1);
        assert_eq!(run(200, EVENTS_PER_SLEEP + 2), 50);
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
