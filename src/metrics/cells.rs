//! What a thread writes and others read.
//!
//! There is one writer per value, so an update is a relaxed load and a relaxed store, never a
//! read-modify-write.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::family::Kind;
use super::labels::Label;

/// What a metric keeps its values in.
pub trait Cell: Debug + Default {
    /// What it is in the text.
    const KIND: Kind;

    /// The value now. `at` has an index for each label that this is kept by.
    fn value(&self, at: &[usize]) -> Value;

    /// Begins anew: what is set is 0 again, what is counted stays.
    fn reset_gauge(&self) {}
}

/// A value that was read.
#[derive(Debug)]
pub enum Value {
    /// A number of something.
    Whole(u64),
    /// A time, to be shown in seconds.
    Nanoseconds(u64),
    /// Durations by how long they were.
    Durations(Durations),
}

/// What a histogram holds.
#[derive(Debug)]
pub struct Durations {
    /// The counts of all buckets, not cumulative.
    pub counts: Vec<u64>,
    /// The inclusive upper bound of a bucket in seconds; `None` for the last, unbounded one.
    pub upper_bound: fn(usize) -> Option<f64>,
    /// All durations together, in seconds.
    pub sum: f64,
}

impl Durations {
    /// Together with others of the same buckets.
    #[must_use]
    pub fn plus(mut self, other: Self) -> Self {
        self.counts.iter_mut().zip(other.counts).for_each(|(total, n)| *total += n);
        self.sum += other.sum;
        self
    }
}

impl Value {
    /// Together with another worker's.
    pub(super) fn plus(self, other: Self) -> Self {
        match (self, other) {
            (Self::Whole(a), Self::Whole(b)) => Self::Whole(a + b),
            (Self::Nanoseconds(a), Self::Nanoseconds(b)) => Self::Nanoseconds(a + b),
            (Self::Durations(a), Self::Durations(b)) => Self::Durations(a.plus(b)),
            (a, b) => unreachable!("{a:?} and {b:?} are of one row"),
        }
    }
}

/// A value that only ever grows. One thread writes it, any thread reads it.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. To be called by the owning worker only.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// The value as of some recent moment.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Cell for Counter {
    const KIND: Kind = Kind::Counter;

    fn value(&self, _: &[usize]) -> Value {
        Value::Whole(self.get())
    }
}

/// A value that is set. One thread writes it, any thread reads it.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets the value. To be called by the owning worker only.
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// The value as of some recent moment.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Cell for Gauge {
    const KIND: Kind = Kind::Gauge;

    fn value(&self, _: &[usize]) -> Value {
        Value::Whole(self.get())
    }

    fn reset_gauge(&self) {
        self.set(0);
    }
}

/// A time that only ever grows, measured by somebody else. One thread writes it, any thread reads it.
#[derive(Debug, Default)]
pub struct DurationTotal(AtomicU64);

impl DurationTotal {
    /// Sets the total. To be called by the owning worker only.
    pub fn set(&self, total: Duration) {
        self.0.store(total.as_nanos() as u64, Relaxed);
    }

    /// The total as of some recent moment.
    pub fn get(&self) -> Duration {
        Duration::from_nanos(self.0.load(Relaxed))
    }
}

impl Cell for DurationTotal {
    const KIND: Kind = Kind::Counter;

    fn value(&self, _: &[usize]) -> Value {
        Value::Nanoseconds(self.0.load(Relaxed))
    }
}

/// A log-linear histogram of durations: two buckets an octave from 50 µs to about 14 hours.
///
/// The layout follows the idea of HDR histograms (Tene): constant relative error, an index by bit
/// arithmetic, no search.
#[derive(Debug)]
#[repr(align(64))]
pub struct Histogram {
    buckets: [Counter; Histogram::BUCKETS],
    sum_ns: Counter,
}

impl Histogram {
    /// The first bucket's upper bound in nanoseconds.
    const FIRST_NS: u64 = 50_000;
    /// One bucket up to 50 µs, two for each of 30 doublings, one for all above.
    pub const BUCKETS: usize = 1 + 2 * 30 + 1;

    fn index(ns: u64) -> usize {
        // Bounds are inclusive (`le`), so a value that equals a bound belongs below it.
        let Some(above) = ns.min(u64::MAX / 4).checked_sub(Self::FIRST_NS + 1) else { return 0 };
        let ratio = above / Self::FIRST_NS + 1;
        let octave = ratio.ilog2() as usize;
        let middle = (Self::FIRST_NS << octave) + (Self::FIRST_NS << octave) / 2;
        let upper_half = usize::from(ns > middle);
        (1 + 2 * octave + upper_half).min(Self::BUCKETS - 1)
    }

    /// The inclusive upper bound of bucket `index` in seconds; `None` for the last, unbounded one.
    pub fn upper_bound_seconds(index: usize) -> Option<f64> {
        if index >= Self::BUCKETS - 1 {
            return None;
        }
        let octave = index.div_ceil(2);
        let ns = match index {
            0 => Self::FIRST_NS,
            i if i % 2 == 1 => (Self::FIRST_NS << (octave - 1)) / 2 * 3,
            _ => Self::FIRST_NS << octave,
        };
        Some(ns as f64 / 1e9)
    }

    /// Counts one duration. To be called by the owning worker only.
    pub fn record(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[Self::index(ns)].add(1);
        self.sum_ns.add(ns);
    }

    /// What it holds as of some recent moment.
    pub fn read(&self) -> Durations {
        read(&self.buckets, &self.sum_ns, Self::upper_bound_seconds)
    }
}

fn read(buckets: &[Counter], sum_ns: &Counter, bound: fn(usize) -> Option<f64>) -> Durations {
    let counts = buckets.iter().map(Counter::get).collect();
    Durations { counts, upper_bound: bound, sum: sum_ns.get() as f64 / 1e9 }
}

/// A histogram of the times that a network takes there and back. It has few buckets, since each
/// endpoint has one.
#[derive(Debug, Default)]
pub struct RoundTrips {
    buckets: [Counter; Self::BOUNDS_US.len() + 1],
    sum_ns: Counter,
}

impl RoundTrips {
    /// From within a rack to around the world, in microseconds.
    const BOUNDS_US: [u32; 12] =
        [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000, 250_000, 1_000_000];

    /// The inclusive upper bound of bucket `index` in seconds; `None` for the last, unbounded one.
    pub fn upper_bound_seconds(index: usize) -> Option<f64> {
        Self::BOUNDS_US.get(index).map(|&us| f64::from(us) / 1e6)
    }

    /// Counts one. To be called by the owning worker only.
    pub fn record(&self, rtt: Duration) {
        let us = rtt.as_micros();
        let index = Self::BOUNDS_US.partition_point(|&bound| u128::from(bound) < us);
        self.buckets[index].add(1);
        self.sum_ns.add(rtt.as_nanos() as u64);
    }

    /// What it holds as of some recent moment, of all workers together.
    pub fn total<'a>(workers: impl Iterator<Item = &'a Self>) -> Durations {
        let none = Self::default();
        let total = read(&none.buckets, &none.sum_ns, Self::upper_bound_seconds);
        let bound = total.upper_bound;
        let each = workers.map(|worker| read(&worker.buckets, &worker.sum_ns, bound));
        each.fold(total, Durations::plus)
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| Counter::default()), sum_ns: Counter::default() }
    }
}

impl Cell for Histogram {
    const KIND: Kind = Kind::Histogram;

    fn value(&self, _: &[usize]) -> Value {
        Value::Durations(self.read())
    }
}

/// One cell per value of a label.
#[derive(Debug)]
pub struct By<L: Label, C: Cell = Counter>(L::Each<C>);

impl<L: Label, C: Cell> By<L, C> {
    /// The cell of this label value.
    #[inline]
    pub fn of(&self, label: L) -> &C {
        &self.0.as_ref()[label.index()]
    }

    /// All of them, in the order of the label's values.
    pub fn all(&self) -> &[C] {
        self.0.as_ref()
    }
}

impl<L: Label, C: Cell> Default for By<L, C> {
    fn default() -> Self {
        Self(L::Each::default())
    }
}

impl<L: Label, C: Cell> Cell for By<L, C> {
    const KIND: Kind = C::KIND;

    fn value(&self, at: &[usize]) -> Value {
        self.0.as_ref()[at[0]].value(&at[1..])
    }
}

/// The type of a row: a cell, by one label or by two.
macro_rules! cells {
    ($cell:ident) => { $crate::metrics::cells::$cell };
    ($cell:ident $first:ident $($more:ident)*) => {
        $crate::metrics::cells::By<
            $crate::metrics::labels::$first,
            $crate::metrics::cells::cells!($cell $($more)*),
        >
    };
}
pub(super) use cells;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_trip_falls_into_the_first_bucket_whose_bound_holds_it() {
        let (first, second) = (RoundTrips::default(), RoundTrips::default());
        first.record(Duration::from_micros(50));
        first.record(Duration::from_micros(51));
        second.record(Duration::from_secs(2));
        let total = RoundTrips::total([&first, &second].into_iter());
        assert_eq!(total.counts, [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!((total.upper_bound)(11), Some(1.0));
        assert_eq!((total.upper_bound)(12), None);
        assert!((total.sum - 2.000_101).abs() < 1e-9, "{}", total.sum);
    }

    #[test]
    fn a_duration_falls_into_the_first_bucket_whose_bound_holds_it() {
        let bounds: Vec<u64> = (0..Histogram::BUCKETS - 1)
            .map(|i| (Histogram::upper_bound_seconds(i).unwrap() * 1e9).round() as u64)
            .collect();
        assert_eq!(bounds[..5], [50_000, 75_000, 100_000, 150_000, 200_000]);
        assert!(bounds.is_sorted());
        for (i, &bound) in bounds.iter().enumerate() {
            assert_eq!(Histogram::index(bound), i, "at the bound {bound}");
            assert_eq!(Histogram::index(bound + 1), i + 1, "above the bound {bound}");
        }
        assert_eq!(Histogram::index(0), 0);
        assert_eq!(Histogram::index(u64::MAX), Histogram::BUCKETS - 1);
    }
}
