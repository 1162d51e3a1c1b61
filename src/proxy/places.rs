//! Places for connections to one endpoint, which all workers share without a lock.
//!
//! A place is taken before a connection is made and given back once that is closed, so there are
//! never more connections than places. The line of memory is touched only then, not on the path of
//! a byte.
//!
//! ```text
//!          take, want                                give
//!   free ─────────────▶ held by a worker ──────────────────────────▶ free
//!                        ▲                     │ somebody waits
//!                        └──collect── granted ◀┘
//! ```
//!
//! A worker that finds none registers that it [wants](Places::want) one. Whoever gives one back
//! then passes it on to such a worker instead of freeing it: so nobody who comes later is served
//! first, the workers that wait have their turns one after the other, and one of them is to be woken
//! for each place, not all.
//!
//! Those that hold less than their share come first. They may have a place of those that hold more,
//! who may have the places of others only where these do not need them.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize};

use super::WorkerId;
use crate::limits::WORKERS_MAX;

const WORDS: usize = WORKERS_MAX.div_ceil(64);

/// A set of workers that all of them may change.
#[derive(Debug, Default)]
struct Workers([AtomicU64; WORDS]);

impl Workers {
    fn bit(worker: usize) -> (usize, u64) {
        (worker / 64, 1 << (worker % 64))
    }

    fn insert(&self, worker: usize) {
        let (word, bit) = Self::bit(worker);
        self.0[word].fetch_or(bit, SeqCst);
    }

    /// Says whether it was there.
    fn remove(&self, worker: usize) -> bool {
        let (word, bit) = Self::bit(worker);
        self.0[word].load(Relaxed) & bit != 0 && self.0[word].fetch_and(!bit, SeqCst) & bit != 0
    }

    fn contains(&self, worker: usize) -> bool {
        let (word, bit) = Self::bit(worker);
        self.0[word].load(SeqCst) & bit != 0
    }

    fn len_without(&self, worker: usize) -> usize {
        let (own, bit) = Self::bit(worker);
        let others = |(at, word): (usize, &AtomicU64)| {
            let word = word.load(Relaxed);
            (if at == own { word & !bit } else { word }).count_ones() as usize
        };
        self.0.iter().enumerate().map(others).sum()
    }

    /// The first one from `from` on, or else the first one.
    fn next(&self, from: usize) -> Option<usize> {
        let (start, bit) = Self::bit(from % WORKERS_MAX);
        let words = self.0.each_ref().map(|word| word.load(SeqCst));
        let at = |word: usize, bits: u64| {
            (bits != 0).then(|| word * 64 + bits.trailing_zeros() as usize)
        };
        at(start, words[start] & !(bit - 1))
            .or_else(|| (start + 1..WORDS).find_map(|word| at(word, words[word])))
            .or_else(|| (0..=start).find_map(|word| at(word, words[word])))
    }
}

/// How many other workers wait for a place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Those that hold less than their share.
    pub needy: usize,
    /// Those that hold it.
    pub others: usize,
}

/// The places of one endpoint.
#[derive(Debug)]
#[repr(align(128))]
pub struct Places {
    /// Held by workers, or granted to them.
    taken: AtomicUsize,
    /// The worker that had its turn last.
    latest: AtomicUsize,
    /// Those that wait and hold less than their share.
    needy: Workers,
    /// Those that wait and hold it.
    others: Workers,
    /// What was passed on to each worker and not collected yet.
    granted: Box<[AtomicU32]>,
}

impl Places {
    /// All free, for so many workers.
    pub fn new(workers: usize) -> Self {
        Self {
            taken: AtomicUsize::new(0),
            latest: AtomicUsize::new(0),
            needy: Workers::default(),
            others: Workers::default(),
            granted: (0..workers).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// How many are taken.
    pub fn taken(&self) -> usize {
        self.taken.load(Relaxed)
    }

    /// Takes one of `max`, if one is free.
    pub fn take(&self, max: usize) -> bool {
        let more = |taken: usize| (taken < max).then_some(taken + 1);
        self.taken.fetch_update(SeqCst, SeqCst, more).is_ok()
    }

    /// Takes one, be it beyond all that there are.
    pub fn take_beyond(&self) {
        self.taken.fetch_add(1, SeqCst);
    }

    /// Takes one of `max`; or else the worker waits for one, as one that `needs` it or not.
    pub fn want(&self, worker: WorkerId, needs: bool, max: usize) -> bool {
        if self.take(max) {
            return true;
        }
        let worker = usize::from(worker);
        let (set, other) =
            if needs { (&self.needy, &self.others) } else { (&self.others, &self.needy) };
        other.remove(worker);
        if !set.contains(worker) {
            set.insert(worker);
        }
        // One may have been freed before it could be passed on.
        if !self.take(max) {
            return false;
        }
        // If one was passed on meanwhile there are two, to be collected and given back.
        set.remove(worker);
        true
    }

    /// The worker does not wait any more. What was passed on to it remains to be collected.
    pub fn stop_wanting(&self, worker: WorkerId) {
        let worker = usize::from(worker);
        self.needy.remove(worker);
        self.others.remove(worker);
    }

    /// Takes what was passed on to the worker.
    pub fn collect(&self, worker: WorkerId) -> usize {
        let granted = &self.granted[usize::from(worker)];
        if granted.load(Relaxed) == 0 { 0 } else { granted.swap(0, Acquire) as usize }
    }

    /// Gives one of `max` back, or one that was beyond them. Returns the worker that it was passed on to,
    /// who is to be woken.
    pub fn give(&self, max: usize) -> Option<WorkerId> {
        let beyond = |taken: usize| (taken > max).then(|| taken - 1);
        if self.taken.fetch_update(SeqCst, SeqCst, beyond).is_ok() {
            return None;
        }
        loop {
            if let Some(worker) = self.pass_on() {
                return Some(worker);
            }
            let before = self.taken.fetch_sub(1, SeqCst);
            assert!(before > 0, "a place was given back that nobody had taken");
            // Somebody may have found none just before.
            let from = self.latest.load(Relaxed);
            if self.needy.next(from).or_else(|| self.others.next(from)).is_none() || !self.take(max)
            {
                return None;
            }
        }
    }

    fn pass_on(&self) -> Option<WorkerId> {
        let from = self.latest.load(Relaxed) + 1;
        for set in [&self.needy, &self.others] {
            while let Some(worker) = set.next(from) {
                if set.remove(worker) {
                    self.latest.store(worker, Relaxed);
                    self.granted[worker].fetch_add(1, AcqRel);
                    return Some(WorkerId::new(worker));
                }
            }
        }
        None
    }

    /// How many workers wait, apart from this one. It is a look at memory that hardly ever changes.
    pub fn wanted_by_others(&self, worker: WorkerId) -> Wanted {
        let worker = usize::from(worker);
        Wanted { needy: self.needy.len_without(worker), others: self.others.len_without(worker) }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    const W: fn(usize) -> WorkerId = WorkerId::new;

    #[test]
    fn what_is_given_back_goes_to_those_who_wait_in_turns() {
        let places = Places::new(70);
        assert!(places.take(2) && places.take(2) && !places.take(2));
        for worker in [69, 3, 5] {
            assert!(!places.want(W(worker), true, 2));
        }
        assert_eq!(places.wanted_by_others(W(5)), Wanted { needy: 2, others: 0 });
        assert_eq!(places.wanted_by_others(W(0)), Wanted { needy: 3, others: 0 });
        let turns: Vec<_> = (0..4).map(|_| places.give(2).map(usize::from)).collect();
        assert_eq!(turns, [Some(3), Some(5), Some(69), None]);
        assert_eq!([3, 5, 69].map(|worker| places.collect(W(worker))), [1; 3]);
        assert_eq!(places.collect(W(3)), 0, "once");
    }

    #[test]
    fn who_wants_another_one_waits_behind_the_others() {
        let places = Places::new(3);
        assert!(places.take(1) && !places.want(W(1), true, 1) && !places.want(W(2), true, 1));
        for worker in [1, 2, 1, 2] {
            assert_eq!(places.give(1), Some(W(worker)));
            assert!(places.collect(W(worker)) == 1 && !places.want(W(worker), true, 1));
        }
    }

    #[test]
    fn who_has_less_than_its_share_comes_first() {
        let places = Places::new(3);
        assert!(places.take(1));
        assert!(!places.want(W(1), false, 1) && !places.want(W(2), true, 1));
        assert_eq!(places.give(1), Some(W(2)));
        // Whoever has got its share meanwhile waits among the others.
        assert!(!places.want(W(1), true, 1) && !places.want(W(1), false, 1));
        assert_eq!(places.wanted_by_others(W(0)), Wanted { needy: 0, others: 1 });
        assert_eq!(places.give(1), Some(W(1)));
        assert_eq!(places.give(1), None);
    }

    #[test]
    fn who_has_left_the_line_is_passed_over() {
        let places = Places::new(3);
        assert!(places.take(1) && !places.want(W(1), true, 1));
        places.stop_wanting(W(1));
        assert_eq!(places.give(1), None);
        assert_eq!(places.taken(), 0);
    }

    #[test]
    fn what_is_taken_beyond_the_limit_is_not_passed_on() {
        let places = Places::new(3);
        assert!(places.take(1) && !places.want(W(1), true, 1));
        places.take_beyond();
        assert_eq!((places.taken(), places.give(1)), (2, None), "it is one less than before");
        assert_eq!((places.taken(), places.give(1)), (1, Some(W(1))));
    }

    /// Threads that take and give as fast as they can.
    struct Contest {
        places: Places,
        workers: usize,
        max: usize,
        held: AtomicUsize,
        most: AtomicUsize,
        done: AtomicUsize,
    }

    impl Contest {
        /// Never more are held than there are, everybody has its turns, and nothing is left over.
        fn run(workers: usize, max: usize) {
            let [held, most, done] = [(); 3].map(|()| AtomicUsize::new(0));
            let contest = Self { places: Places::new(workers), workers, max, held, most, done };
            let longest = thread::scope(|scope| {
                let contest = &contest;
                let work = |worker| scope.spawn(move || contest.work(W(worker)));
                let threads: Vec<_> = (0..workers).map(work).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).max()
            });
            (0..workers).for_each(|worker| contest.give_rest(W(worker)));
            let most = contest.most.load(SeqCst);
            assert!(most <= max, "{most} of {max} at a time");
            assert_eq!(contest.places.taken(), 0, "places leaked");
            println!("{workers} workers, {max} places: longest wait {longest:?}");
        }

        fn work(&self, worker: WorkerId) -> Duration {
            let mut longest = Duration::ZERO;
            for round in 0..800 / self.workers {
                let since = Instant::now();
                let mut own = self.get(worker, round % 2 == 0);
                longest = longest.max(since.elapsed());
                self.places.stop_wanting(worker);
                self.most.fetch_max(self.held.fetch_add(1, SeqCst) + 1, SeqCst);
                thread::yield_now();
                self.held.fetch_sub(1, SeqCst);
                own += self.places.collect(worker);
                self.give(own);
            }
            self.done.fetch_add(1, SeqCst);
            // What was passed on in the last moment is not for it.
            while self.done.load(SeqCst) < self.workers {
                self.give_rest(worker);
                thread::yield_now();
            }
            longest
        }

        fn get(&self, worker: WorkerId, needs: bool) -> usize {
            let since = Instant::now();
            // It asks once: what is given back from now on is not to pass it by.
            let mut own = usize::from(self.places.want(worker, needs, self.max));
            loop {
                own += self.places.collect(worker);
                if own > 0 {
                    return own;
                }
                assert!(since.elapsed() < Duration::from_secs(20), "it starves");
                thread::yield_now();
            }
        }

        fn give(&self, count: usize) {
            for _ in 0..count {
                let _ = self.places.give(self.max);
            }
        }

        fn give_rest(&self, worker: WorkerId) {
            self.give(self.places.collect(worker));
        }
    }

    /// Goes on once both threads have come here as often as this.
    fn meet(count: &AtomicUsize, times: usize) {
        count.fetch_add(1, SeqCst);
        let mut spins = 0;
        while count.load(SeqCst) < 2 * times {
            spins += 1;
            if spins % 256 == 0 { thread::yield_now() } else { std::hint::spin_loop() }
        }
    }

    #[test]
    fn a_place_is_not_missed_that_is_given_back_as_it_is_wanted() {
        const ROUNDS: usize = 5_000;
        let (places, count, mut missed) = (Places::new(1), AtomicUsize::new(0), 0);
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..ROUNDS {
                    meet(&count, 2 * round + 1);
                    let _ = places.give(1);
                    meet(&count, 2 * round + 2);
                }
            });
            assert!(places.take(1));
            for round in 0..ROUNDS {
                meet(&count, 2 * round + 1);
                // A little later each time, so that each step meets each of the other's.
                (0..round % 64).for_each(|_| std::hint::spin_loop());
                let was_free = places.want(W(0), true, 1);
                meet(&count, 2 * round + 2);
                let got = usize::from(was_free) + places.collect(W(0));
                if got == 0 && places.take(1) {
                    missed += 1;
                }
                places.stop_wanting(W(0));
            }
        });
        assert_eq!((missed, places.taken()), (0, 1), "missed, and taken in the end");
    }

    #[test]
    fn threads_never_hold_more_than_there_are_and_leak_none() {
        for (workers, max) in [(2, 1), (4, 3), (32, 1), (32, 16), (8, 8)] {
            Contest::run(workers, max);
        }
    }
}
