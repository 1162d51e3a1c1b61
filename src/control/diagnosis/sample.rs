//! What the workers have counted until some moment, and what they count from one to another.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::task::yield_now;

use super::{EVENTS_MIN, SLOW_SHARE};
use crate::control::View;
use crate::control::view::RouteView;
use crate::metrics::{CloseReason, EndpointCounts, Histogram, Outcome, RouteStats};
use crate::proxy::endpoints::Endpoint;

/// A sum of durations in seconds, and how many there were.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Total {
    pub(super) sum: f64,
    pub(super) count: u64,
}

impl Total {
    fn of(stats: &[&RouteStats], phase: fn(&RouteStats) -> &Histogram) -> Self {
        let each = stats.iter().map(|stats| phase(stats).read());
        each.fold(Self::default(), |total, read| Self {
            sum: total.sum + read.sum,
            count: total.count + read.counts.iter().sum::<u64>(),
        })
    }

    fn since(self, before: Self) -> Self {
        // The parts are not read in one moment.
        let sum = (self.sum - before.sum).max(0.0);
        Self { sum, count: self.count.saturating_sub(before.count) }
    }

    pub(super) fn mean(self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum / self.count as f64 }
    }
}

/// How long backends took to reply, without the time that clients took to send.
#[derive(Debug, Clone, Copy)]
pub(super) struct Replies {
    total: Total,
    counts: [u64; Histogram::BUCKETS],
}

impl Default for Replies {
    fn default() -> Self {
        Self { total: Total::default(), counts: [0; Histogram::BUCKETS] }
    }
}

impl Replies {
    fn of(stats: &[&RouteStats]) -> Self {
        let mut all = Self::default();
        for read in stats.iter().map(|stats| stats.reply_wait.read()) {
            all.total.sum += read.sum;
            for (all_of_it, count) in all.counts.iter_mut().zip(read.counts) {
                *all_of_it += count;
                all.total.count += count;
            }
        }
        all
    }

    fn since(&self, before: &Self) -> Self {
        let grown = |at: usize| self.counts[at].saturating_sub(before.counts[at]);
        Self { total: self.total.since(before.total), counts: std::array::from_fn(grown) }
    }

    pub(super) fn count(&self) -> u64 {
        self.total.count
    }

    pub(super) fn mean(&self) -> f64 {
        self.total.mean()
    }

    /// Whether they take so long, in seconds: in the mean, and not only since a few take very long, as
    /// those do that are meant to wait for news.
    pub(super) fn are_slow(&self, limit: f64) -> bool {
        let is_slow = |at: usize| Histogram::upper_bound_seconds(at).is_none_or(|s| s >= limit);
        let counts = self.counts.iter().enumerate();
        let slow: u64 = counts.filter(|(at, _)| is_slow(*at)).map(|(_, count)| count).sum();
        self.mean() >= limit && slow as f64 >= self.count() as f64 * SLOW_SHARE
    }
}

/// Where the time of clients went until some moment, or from one to another.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Times {
    /// Waits for a backend connection, and what follows them.
    pub(super) queue: Total,
    pub(super) connect: Total,
    pub(super) first_byte: Total,
    pub(super) replies: Replies,
    /// Sessions and requests that waited for a connection in vain, or could not.
    pub(super) gave_up: u64,
}

impl Times {
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            queue: self.queue.since(before.queue),
            connect: self.connect.since(before.connect),
            first_byte: self.first_byte.since(before.first_byte),
            replies: self.replies.since(&before.replies),
            gave_up: self.gave_up.saturating_sub(before.gave_up),
        }
    }

    /// Whether some gave up, and not one was answered.
    pub(super) fn only_gave_up(self) -> bool {
        self.gave_up > 0 && self.first_byte.count == 0
    }
}

/// What was counted of a route until some moment.
#[derive(Debug, Default)]
pub(super) struct RouteSample {
    pub(super) times: Times,
    timed_out: u64,
    overdue: u64,
    left_overdue: u64,
    /// Whether half of the first bytes, and no few, came within `AEGIS_SLOW_FIRST_BYTE`.
    is_prompt: bool,
    /// Sessions that had to wait for an endpoint.
    waited: u64,
    /// Time without one, as clients felt it; of all workers together.
    outage: Duration,
    /// In the order of the snapshot.
    pub(super) endpoints: Vec<(Arc<Endpoint>, Counted)>,
    /// The same by their addresses in memory, and what others had counted when they were seen first.
    by_endpoint: HashMap<usize, Counted>,
}

/// What was counted of a route from one moment to another.
#[derive(Debug)]
pub(super) struct Growth {
    pub(super) times: Times,
    /// Requests that were not answered in time.
    pub(super) timed_out: u64,
    /// Clients that wait for their first byte for too long, or have left after that.
    pub(super) overdue: u64,
    /// Those that still do.
    pub(super) waiting: u64,
    /// Whether clients waited for an endpoint.
    pub(super) is_outage: bool,
}

/// What was counted of an endpoint until some moment, or from one to another.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counted {
    pub(super) failures: u64,
    pub(super) segments: u64,
    pub(super) retransmits: u64,
}

impl Counted {
    fn of(endpoint: &Endpoint) -> Self {
        let total = EndpointCounts::total(&endpoint.stats);
        Self {
            failures: total.connect_failures,
            segments: total.segments,
            retransmits: total.retransmits,
        }
    }

    pub(super) fn since(self, before: Self) -> Self {
        Self {
            failures: self.failures.saturating_sub(before.failures),
            segments: self.segments.saturating_sub(before.segments),
            retransmits: self.retransmits.saturating_sub(before.retransmits),
        }
    }
}

/// Whether a route's backends are known to answer, and soon: some protocols never do, or when they like.
fn is_prompt(route: &RouteView<'_>) -> bool {
    let Some(limit) = route.config.slow_first_byte else { return false };
    let bound = Histogram::upper_bound_seconds;
    let (mut prompt, mut all) = (0, 0);
    for stats in &route.stats {
        for (at, count) in stats.reply_wait.read().counts.into_iter().enumerate() {
            all += count;
            prompt += if bound(at).is_some_and(|s| s <= limit.as_secs_f64()) { count } else { 0 };
        }
    }
    all >= EVENTS_MIN && 2 * prompt >= all
}

fn key(endpoint: &Arc<Endpoint>) -> usize {
    Arc::as_ptr(endpoint).addr()
}

impl RouteSample {
    fn of(route: &RouteView<'_>) -> Self {
        let total = |phase| Total::of(&route.stats, phase);
        let ended = |outcome: Outcome| {
            let of_worker = |stats: &&RouteStats| stats.requests_ended(outcome);
            route.stats.iter().map(of_worker).sum::<u64>()
        };
        let closed = |reason| route.stats.iter().map(|stats| stats.closed(reason)).sum::<u64>();
        let sum = |of: fn(&RouteStats) -> u64| route.stats.iter().map(|stats| of(stats)).sum();
        let gave_up = ended(Outcome::QueueFull)
            + ended(Outcome::QueueTimeout)
            + closed(CloseReason::QueueFull)
            + closed(CloseReason::QueueTimeout);
        let times = Times {
            queue: total(|stats| &stats.queue_wait),
            connect: total(|stats| &stats.connect_duration),
            first_byte: total(|stats| &stats.first_byte),
            replies: Replies::of(&route.stats),
            gave_up,
        };
        Self {
            times,
            timed_out: ended(Outcome::Timeout),
            overdue: sum(|stats| stats.overdue.get()),
            left_overdue: sum(|stats| stats.left_overdue.get()),
            is_prompt: is_prompt(route),
            waited: sum(|stats| stats.outage_waited.get()),
            outage: route.stats.iter().map(|stats| stats.outage.get()).sum(),
            ..Self::of_endpoints(route.snapshot.endpoints.clone())
        }
    }

    /// A sample of endpoints alone.
    pub(super) fn of_endpoints(endpoints: Vec<Arc<Endpoint>>) -> Self {
        let counted = |endpoint: Arc<Endpoint>| {
            let counted = Counted::of(&endpoint);
            (endpoint, counted)
        };
        let endpoints: Vec<_> = endpoints.into_iter().map(counted).collect();
        let by_endpoint = endpoints.iter().map(|(endpoint, counted)| (key(endpoint), *counted));
        Self { by_endpoint: by_endpoint.collect(), endpoints, ..Self::default() }
    }

    /// Takes note of the endpoints of a later sample that this one has not. A new one has counted nothing
    /// until then, one that comes back all that it had.
    pub(super) fn adopt(&mut self, later: &Self, seen: &Seen) {
        for (endpoint, counted) in &later.endpoints {
            let until_then = if seen.has(endpoint) { *counted } else { Counted::default() };
            self.by_endpoint.entry(key(endpoint)).or_insert(until_then);
        }
    }

    /// What was counted since a former sample.
    pub(super) fn since(&self, before: &Self) -> Growth {
        // Who has left may be among those that were seen waiting.
        let left_overdue = self.left_overdue.saturating_sub(before.left_overdue);
        Growth {
            times: self.times.since(before.times),
            timed_out: self.timed_out.saturating_sub(before.timed_out),
            overdue: if self.is_prompt { self.overdue.max(left_overdue) } else { 0 },
            waiting: if self.is_prompt { self.overdue } else { 0 },
            is_outage: self.waited > before.waited || self.outage > before.outage,
        }
    }

    /// Each endpoint with what it has counted since.
    pub(super) fn endpoints_since<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = (&'a Endpoint, Counted)> {
        self.endpoints.iter().map(|(endpoint, now)| {
            let before = before.by_endpoint.get(&key(endpoint)).copied().unwrap_or(*now);
            (&**endpoint, now.since(before))
        })
    }
}

/// Endpoints that a look has seen, for as long as their counters go on: they may leave and come back.
#[derive(Debug, Default)]
pub(super) struct Seen(HashMap<usize, Weak<Endpoint>>);

impl Seen {
    fn has(&self, endpoint: &Arc<Endpoint>) -> bool {
        self.0.contains_key(&key(endpoint))
    }

    pub(super) fn add(&mut self, sample: &RouteSample) {
        // What is held here keeps its address in memory, so that no other endpoint has it.
        self.0.retain(|_, endpoint| endpoint.strong_count() > 0);
        let all = sample.endpoints.iter();
        self.0.extend(all.map(|(endpoint, _)| (key(endpoint), Arc::downgrade(endpoint))));
    }
}

/// For how long workers had run, and waited for a core, until some moment.
#[derive(Debug, Clone)]
pub(super) struct CpuTimes {
    pub(super) at: Instant,
    workers: Vec<(Duration, Duration)>,
}

impl CpuTimes {
    fn of(view: &View, at: Instant) -> Self {
        let workers = view.stats().map(|stats| (stats.cpu.get(), stats.core_wait.get()));
        Self { at, workers: workers.collect() }
    }

    /// The shares of the time since, of each worker, for which it ran, and for which it waited.
    pub(super) fn shares_since(&self, before: &Self) -> (Vec<f64>, Vec<f64>) {
        let elapsed = self.at.saturating_duration_since(before.at).as_secs_f64();
        let share = |now: Duration, before| now.saturating_sub(before).as_secs_f64() / elapsed;
        let pairs = self.workers.iter().zip(&before.workers);
        pairs.map(|(now, before)| (share(now.0, before.0), share(now.1, before.1))).unzip()
    }
}

/// What was counted until some moment.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) cpu: CpuTimes,
    pub(super) routes: Vec<RouteSample>,
}

impl Sample {
    /// Reads all counters, a route at a time, so that probes are answered in between.
    pub(super) async fn of(view: &View, at: Instant) -> Self {
        let cpu = CpuTimes::of(view, at);
        let mut routes = Vec::new();
        for number in 0..view.config().routes.len() {
            routes.extend(view.routes().nth(number).map(|route| RouteSample::of(&route)));
            yield_now().await;
        }
        Self { cpu, routes }
    }
}
