//! How many events to wait for: adaptive batching.
//!
//! Waking up for each event is what makes a busy proxy slow, and waiting for several is what makes
//! an idle one slow. What tells the two apart is the number of different sessions active in the
//! last few milliseconds. Neither the size of recent batches does (each wake-up finds one or two
//! events, takes that for a light load and stays there), nor the rate of events (one connection
//! in ping-pong has as many a second as two hundred).

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

/// Estimates the load of one worker.
#[derive(Debug)]
pub struct Batcher {
    /// The number of the present window; sessions remember the one they were last counted in.
    window: u32,
    since: Instant,
    active: u32,
    previous: u32,
}

impl Batcher {
    /// No load so far.
    pub fn new(now: Instant) -> Self {
        Self { window: 1, since: now, active: 0, previous: 0 }
    }

    /// A session moved bytes; `window` is its mark.
    pub fn on_active(&mut self, window: &mut u32) {
        if *window != self.window {
            *window = self.window;
            self.active += 1;
        }
    }

    /// How many events to wait for, and how long for more than one.
    pub fn plan(&mut self, now: Instant) -> (u32, Duration) {
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed >= WINDOW {
            // What is older than a whole window says nothing about the present.
            self.previous = if elapsed < 2 * WINDOW { self.active } else { 0 };
            self.active = 0;
            self.window = self.window.wrapping_add(1);
            self.since = now;
        }
        let sessions = self.active.max(self.previous);
        if sessions < SESSIONS_MIN {
            return (1, Duration::ZERO);
        }
        ((sessions / SESSIONS_PER_EVENT).min(EVENTS_MAX), BATCH_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(sessions: u32, events: u32) -> u32 {
        let start = Instant::now();
        let mut batcher = Batcher::new(start);
        let mut marks = vec![0; sessions as usize];
        let mut plan = 0;
        for event in 0..events {
            batcher.on_active(&mut marks[(event % sessions) as usize]);
            plan = batcher.plan(start + event * Duration::from_micros(20)).0;
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
    fn an_old_load_is_forgotten_at_once() {
        let start = Instant::now();
        let mut batcher = Batcher::new(start);
        let mut marks = [0; 100];
        for mark in &mut marks {
            batcher.on_active(mark);
        }
        assert_eq!(batcher.plan(start).0, 25);
        assert_eq!(batcher.plan(start + 2 * WINDOW).0, 1);
    }
}
