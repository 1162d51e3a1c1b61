//! How many events to wait for: adaptive batching.
//!
//! Waking up for each event is what makes a busy proxy slow, and waiting for several is what makes
//! an idle one slow. What tells the two apart are two things together. One is the number of
//! different sessions active in the last few milliseconds: the rate of events alone does not do
//! (one connection in ping-pong has as many a second as two hundred). The other is how many events
//! there are for each time that the worker falls asleep, or waits for a batch that does not become
//! full: at half of what the machine can do just as many sessions are active, but the worker, done
//! with them, sleeps again and again. Their rate would tell that too, but of one machine alone.
//!
//! Where others want the core, a worker that always finds something to do holds it until the
//! scheduler's next tick takes it away, milliseconds later, and whoever is to send the next request
//! or answer waits for as long. There it waits for a moment for the events of all active sessions,
//! which hardly ever come, so that it sleeps each turn.

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
/// Where others want the core it is for all of the active sessions, but no longer than this.
const NAP: Duration = Duration::from_micros(50);

/// A worker that falls asleep more often than once in so many events has time to spare: waiting
/// costs more than it saves.
const EVENTS_PER_SLEEP: u32 = 32;

/// Others want the core if the worker waited for it for this part of a window…
const CONTENDED_PART: u32 = 10;
/// …and for so long after that.
const CONTENDED_HOLD: Duration = Duration::from_millis(100);

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// So many events…
    pub events: u32,
    /// …or fewer after this time.
    pub batch: Duration,
    /// Others want the core.
    pub contended: bool,
}

/// Estimates the load of one worker.
#[derive(Debug)]
pub struct Batcher {
    /// The number of the present window; sessions remember the one they were last counted in, and
    /// begin with 0, which none has.
    window: u32,
    since: Instant,
    /// Of this window and the one before.
    active: Activity,
    previous: Activity,
    /// How long the worker had waited for its core as the window began.
    waited: Duration,
    contended_until: Instant,
}

#[derive(Debug, Clone, Copy, Default)]
struct Activity {
    /// Different ones that moved bytes.
    sessions: u32,
    events: u32,
    sleeps: u32,
}

impl Batcher {
    /// No load so far, on the part of a worker that has `waited` for a core as long as that.
    pub fn new(now: Instant, waited: Duration) -> Self {
        Self {
            window: 1,
            since: now,
            active: Activity::default(),
            previous: Activity::default(),
            waited,
            contended_until: now,
        }
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

    /// Whether [`Batcher::on_window`] is due.
    pub fn window_is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= WINDOW
    }

    /// A window is over; the worker has `waited` for a core as long as that since it began.
    pub fn on_window(&mut self, now: Instant, waited: Duration) {
        let elapsed = now.saturating_duration_since(self.since);
        // What is older than a whole window says nothing about the present.
        let recent = elapsed < 2 * WINDOW;
        self.previous = if recent { self.active } else { Activity::default() };
        self.active = Activity::default();
        self.window = self.window.wrapping_add(1).max(1);
        self.since = now;
        if waited.saturating_sub(self.waited) > elapsed / CONTENDED_PART {
            self.contended_until = now + CONTENDED_HOLD;
        }
        self.waited = waited;
    }

    /// How many events to wait for, and how long for more than one.
    pub fn plan(&self, now: Instant) -> Plan {
        let sessions = self.active.sessions.max(self.previous.sessions);
        let events = self.active.events + self.previous.events;
        let sleeps = self.active.sleeps + self.previous.sleeps;
        let contended = now < self.contended_until;
        if sessions < SESSIONS_MIN || events < EVENTS_PER_SLEEP * sleeps {
            Plan { events: 1, batch: Duration::ZERO, contended }
        } else if contended {
            Plan { events: sessions.min(EVENTS_MAX), batch: NAP, contended }
        } else {
            let events = (sessions / SESSIONS_PER_EVENT).min(EVENTS_MAX);
            Plan { events, batch: BATCH_MAX, contended }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is waited for in the end, where each of `events_per_sleep` events of as many sessions
    /// as there are comes 20 µs after the one before, and the worker waits for its core for that
    /// part of the time.
    fn run(sessions: u32, events_per_sleep: u32, waited: f64) -> Plan {
        let start = Instant::now();
        let mut batcher = Batcher::new(start, Duration::ZERO);
        let mut marks = vec![0; sessions as usize];
        let mut now = start;
        for event in 0..10_000 {
            now = start + event * Duration::from_micros(20);
            if event % events_per_sleep == 0 {
                batcher.on_sleep();
            }
            batcher.on_active(&mut marks[(event % sessions) as usize]);
            if batcher.window_is_over(now) {
                batcher.on_window(now, (now - start).mul_f64(waited));
            }
        }
        batcher.plan(now)
    }

    #[test]
    fn one_busy_session_never_waits_and_many_batch() {
        assert_eq!(run(1, 100, 0.0).events, 1);
        assert_eq!(run(15, 100, 0.0).events, 1);
        assert_eq!(run(200, 100, 0.0).events, 50);
        assert_eq!(run(5000, 100, 0.0).events, 62, "250 events fit in a window");
    }

    #[test]
    fn a_worker_that_sleeps_often_does_not_wait() {
        assert_eq!(run(200, EVENTS_PER_SLEEP - 2, 0.0).events, 1);
        assert_eq!(run(200, EVENTS_PER_SLEEP + 2, 0.0).events, 50);
    }

    #[test]
    fn where_others_want_the_core_it_waits_for_all() {
        let alone = Plan { events: 25, batch: BATCH_MAX, contended: false };
        let crowded = Plan { events: 100, batch: NAP, contended: true };
        assert_eq!(run(100, 100, 0.05), alone);
        assert_eq!(run(100, 100, 0.2), crowded);
        assert_eq!(run(1, 100, 0.2).events, 1);
        assert_eq!(run(200, 1, 0.2).events, 1);
    }

    #[test]
    fn an_old_load_is_forgotten_at_once_and_contention_after_a_while() {
        let start = Instant::now();
        let mut batcher = Batcher::new(start, Duration::ZERO);
        let mut marks = [0; 100];
        for _ in 0..3 {
            for mark in &mut marks {
                batcher.on_active(mark);
            }
        }
        assert_eq!(batcher.plan(start).events, 25);
        let (now, waited) = (start + WINDOW, WINDOW / 2);
        batcher.on_window(now, waited);
        assert_eq!(batcher.plan(now).events, 100);
        let now = now + 2 * WINDOW;
        batcher.on_window(now, waited);
        assert_eq!(batcher.plan(now), Plan { events: 1, batch: Duration::ZERO, contended: true });
        assert!(!batcher.plan(start + WINDOW + CONTENDED_HOLD).contended);
    }
}
