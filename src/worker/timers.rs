//! One deadline per slot, in a hashed timing wheel (Varghese and Lauck, scheme 6).
//!
//! Setting and clearing take constant time and allocate nothing. Deadlines are rounded up to
//! [`TICK`], so a timer never fires early.

use std::time::{Duration, Instant};

const TICK_MS: u64 = 8;
/// The wheel's resolution.
pub const TICK: Duration = Duration::from_millis(TICK_MS);
/// Buckets of the wheel: 8 seconds per round. A later deadline stays for several rounds.
const BUCKETS: usize = 1024;
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// The tick to fire at; 0, which has passed before anything is set, is unset.
    tick: u64,
    next: u32,
    previous: u32,
}

/// The deadlines of up to `capacity` slots.
#[derive(Debug)]
pub struct Timers {
    start: Instant,
    /// All ticks up to this one have been looked at.
    elapsed: u64,
    buckets: Box<[u32; BUCKETS]>,
    /// One bit per bucket: it is not empty.
    occupied: [u64; BUCKETS / 64],
    entries: Vec<Entry>,
    /// Slots taken from the bucket being looked at.
    due: Vec<u32>,
}

impl Timers {
    /// No deadlines; time starts at `start`.
    pub fn new(capacity: usize, start: Instant) -> Self {
        Self {
            start,
            elapsed: 0,
            buckets: Box::new([NONE; BUCKETS]),
            occupied: [0; BUCKETS / 64],
            entries: Vec::with_capacity(capacity),
            due: Vec::with_capacity(capacity),
        }
    }

    /// Sets the deadline of a slot in place of the one it had.
    pub fn set(&mut self, slot: usize, deadline: Instant) {
        self.clear(slot);
        if slot >= self.entries.len() {
            self.entries.resize(slot + 1, Entry { tick: 0, next: NONE, previous: NONE });
        }
        let tick = self.tick_at_or_after(deadline).max(self.elapsed + 1);
        let bucket = tick as usize % BUCKETS;
        let next = self.buckets[bucket];
        self.entries[slot] = Entry { tick, next, previous: NONE };
        if next != NONE {
            self.entries[next as usize].previous = slot as u32;
        }
        self.buckets[bucket] = slot as u32;
        self.occupied[bucket / 64] |= 1 << (bucket % 64);
    }

    /// Takes the deadline of a slot away, if it has one.
    pub fn clear(&mut self, slot: usize) {
        let Some(&Entry { tick, next, previous }) = self.entries.get(slot) else { return };
        if tick == 0 {
            return;
        }
        let bucket = tick as usize % BUCKETS;
        if previous == NONE {
            self.buckets[bucket] = next;
            if next == NONE {
                self.occupied[bucket / 64] &= !(1 << (bucket % 64));
            }
        } else {
            self.entries[previous as usize].next = next;
        }
        if next != NONE {
            self.entries[next as usize].previous = previous;
        }
        self.entries[slot].tick = 0;
    }

    /// Whether a slot has a deadline.
    #[cfg(test)]
    pub fn is_set(&self, slot: usize) -> bool {
        self.entries.get(slot).is_some_and(|entry| entry.tick != 0)
    }

    /// A slot whose deadline has come. Its deadline is unset by this.
    pub fn pop(&mut self, now: Instant) -> Option<usize> {
        let current =
            (now.saturating_duration_since(self.start).as_nanos() / TICK.as_nanos()) as u64;
        loop {
            while let Some(slot) = self.due.pop() {
                let tick = self.entries[slot as usize].tick;
                if tick != 0 && tick <= self.elapsed {
                    self.clear(slot as usize);
                    return Some(slot as usize);
                }
            }
            if self.elapsed >= current {
                return None;
            }
            // After a long pause one round sees every bucket.
            self.elapsed = (self.elapsed + 1).max(current.saturating_sub(BUCKETS as u64 - 1));
            let mut slot = self.buckets[self.elapsed as usize % BUCKETS];
            while slot != NONE {
                self.due.push(slot);
                slot = self.entries[slot as usize].next;
            }
        }
    }

    /// No deadline comes before this moment; `None` if there is no deadline at all.
    pub fn next(&self) -> Option<Instant> {
        let first = (self.elapsed + 1) as usize % BUCKETS;
        let ahead = (0..=self.occupied.len()).find_map(|step| {
            let word = (first / 64 + step) % self.occupied.len();
            let bits = match step {
                0 => self.occupied[word] & (u64::MAX << (first % 64)),
                _ => self.occupied[word],
            };
            let bucket = 64 * word + bits.trailing_zeros() as usize;
            (bits != 0).then(|| (bucket + BUCKETS - first) % BUCKETS)
        })?;
        Some(self.moment_of(self.elapsed + 1 + ahead as u64))
    }

    /// When a tick is. `Duration` multiplies by 32 bits only, which are over after 397 days.
    fn moment_of(&self, tick: u64) -> Instant {
        self.start + Duration::from_millis(TICK_MS * tick)
    }

    fn tick_at_or_after(&self, deadline: Instant) -> u64 {
        let after = deadline.saturating_duration_since(self.start);
        after.as_nanos().div_ceil(TICK.as_nanos()) as u64
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::Config;
    use crate::io::sim::Sim;
    use crate::io::{Driver, Wait};
    use crate::limits;
    use crate::worker::engine::Engine;
    use crate::worker::simulation::Run;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    /// Just before 32 bits of ticks are over; far beyond that; and just before 32 bits of seconds are.
    const AGES: [Duration; 4] = [
        Duration::ZERO,
        Duration::from_millis(TICK_MS * (u32::MAX as u64 - 500)),
        Duration::from_secs(5 * 366 * 24 * 60 * 60),
        Duration::from_secs(u32::MAX as u64 - 100),
    ];

    #[test]
    fn timers_fire_in_time_and_never_early_whatever_is_set_and_cleared() {
        for age in AGES {
            set_and_clear(age);
        }
    }

    fn set_and_clear(age: Duration) {
        const SLOTS: usize = 200;
        let mut rng = fastrand::Rng::with_seed(7);
        let start = Instant::now();
        let mut timers = Timers::new(SLOTS, start);
        let mut deadlines: Vec<Option<Instant>> = vec![None; SLOTS];
        let mut now = start + age;
        assert_eq!(timers.pop(now), None);
        for _ in 0..20_000 {
            let slot = rng.usize(..SLOTS);
            match rng.u8(..4) {
                0 => {
                    timers.clear(slot);
                    deadlines[slot] = None;
                }
                1 => {
                    let deadline = now + Duration::from_millis(rng.u64(..20_000));
                    timers.set(slot, deadline);
                    deadlines[slot] = Some(deadline);
                }
                _ => now += Duration::from_micros(rng.u64(..30_000)),
            }
            let earliest = deadlines.iter().flatten().min();
            assert_eq!(timers.next().is_some(), earliest.is_some());
            if let (Some(next), Some(&earliest)) = (timers.next(), earliest) {
                assert!(next <= earliest + TICK, "sleeps past a deadline");
            }
            while let Some(slot) = timers.pop(now) {
                let deadline = deadlines[slot].take().expect("fired unset");
                assert!(deadline <= now, "fired early");
            }
            assert!(timers.next().is_none_or(|next| next > now), "it never sleeps");
            let late = deadlines.iter().flatten().filter(|&&d| d + TICK < now).count();
            assert_eq!(late, 0, "overslept");
        }
    }

    #[test]
    fn after_a_long_pause_all_are_due() {
        let start = Instant::now();
        let mut timers = Timers::new(3, start);
        for (slot, seconds) in [(0, 1), (1, 9), (2, 1000)] {
            timers.set(slot, start + Duration::from_secs(seconds));
        }
        let now = start + Duration::from_secs(500);
        let mut due: Vec<_> = std::iter::from_fn(|| timers.pop(now)).collect();
        due.sort_unstable();
        assert_eq!(due, [0, 1]);
    }

    /// Turns for a minute of virtual time, and gives the number of turns.
    fn turns_of_a_minute(engine: &mut Engine<Sim>) -> u32 {
        let until = engine.driver().now() + Duration::from_secs(60);
        let mut turns = 0;
        while engine.driver().now() < until {
            engine.turn().unwrap();
            turns += 1;
            assert!(turns < 100_000, "it spins");
        }
        turns
    }

    #[test]
    fn a_worker_that_is_years_old_serves_and_sleeps_as_a_young_one_does() {
        for years in [0, 2] {
            let mut config = Config::from_vars(std::iter::empty()).unwrap();
            let route = Arc::make_mut(&mut config.routes[0]);
            route.idle_timeout = Some(Duration::from_secs(300));
            (route.pool.min_idle, route.pool.max_idle) = (0, 0);
            let rng = fastrand::Rng::with_seed(3);
            let mut run = Run::with(rng, config, 8, limits::buffers_max(8));
            let endpoints = run.endpoints.clone();
            run.deliver(endpoints);
            // Nothing happens for long.
            run.turn();
            run.engine.driver().wait(Wait::for_one(years * 366 * DAY)).unwrap();
            assert!(run.engine.driver().elapsed() >= years * 366 * DAY);
            run.turn();
            for _ in 0..8 {
                run.engine.driver().add_client(Duration::ZERO);
            }
            let turns = turns_of_a_minute(&mut run.engine);
            assert!(run.stats.sessions_opened.get() >= 4, "{years} years: clients are served");
            assert!(turns < 20_000, "{years} years: {turns} turns in a minute");
        }
    }
}
