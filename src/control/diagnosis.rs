//! Says in one word what is wrong, and where: in the database, the network, the proxy, or around it.
//!
//! It compares what the workers count with what they had counted some seconds before; nobody waits for
//! this. What it finds is logged when it begins and when it ends, and shown by the admin port.

use std::collections::{HashMap, VecDeque};
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::yield_now;

use super::View;
use super::view::{RouteView, usable};
use crate::metrics::{
    CloseReason, EndpointCounts, EndpointStats, Histogram, LabelSet, Outcome, Problem, RouteStats,
};
use crate::proxy::endpoints::Endpoint;

/// How often it is looked.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What is compared with is as old as this, or twice as old: what lasted for less is no problem.
const WINDOW: Duration = Duration::from_secs(5);

/// Fewer events in a window than this say nothing about their kind.
const EVENTS_MIN: u64 = 10;

/// A backend is slow if its first byte takes so many times as long as usual, and this long, …
const SLOW_TIMES: f64 = 4.0;
const SLOW_MIN: f64 = 0.005;
/// … or this long, in seconds, whatever is usual.
const SLOW_ANYWAY: f64 = 1.0;

/// What a look weighs in what is usual. What is slow and lasts becomes usual within an hour or so; what
/// is extremely so counts no more than what is twice as slow as has to be.
const USUAL_WEIGHT: f64 = 0.01;
const USUAL_WEIGHT_SLOW: f64 = 0.00005;
const USUAL_TIMES_MAX: f64 = 2.0 * SLOW_TIMES;

/// Shares of time, of segments and of sessions from which on there is a problem.
const QUEUE_SHARE: f64 = 0.2;
const LOSS_SHARE: f64 = 0.01;
const BUSY_SHARE: f64 = 0.9;
const CORE_WAIT_SHARE: f64 = 0.1;
const SESSIONS_SHARE: f64 = 0.95;
/// Below this there is no such problem any more.
const SESSIONS_SHARE_END: f64 = 0.9;

/// Waits for a connection that are shorter than this, in seconds, are nobody's problem.
const QUEUE_MIN: f64 = 0.001;

/// Endpoints that a line names.
const NAMED_MAX: usize = 4;

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Its kind.
    pub problem: Problem,
    /// The number of the route that it is about; `None` if it is about the process.
    pub route: Option<usize>,
    /// What was seen, in words.
    pub words: String,
    /// Since when.
    pub since: Instant,
}

impl Finding {
    fn is_about(&self, other: &Self) -> bool {
        (self.problem, self.route) == (other.problem, other.route)
    }
}

/// A sum of durations in seconds, and how many there were.
#[derive(Debug, Clone, Copy, Default)]
struct Total {
    sum: f64,
    count: u64,
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

    fn mean(self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum / self.count as f64 }
    }
}

/// What was counted of a route until some moment.
#[derive(Debug, Default)]
struct RouteSample {
    queue: Total,
    connect: Total,
    first_byte: Total,
    timed_out: u64,
    gave_up: u64,
    /// Sessions that had to wait for an endpoint.
    waited: u64,
    /// In the order of the snapshot.
    endpoints: Vec<(Arc<Endpoint>, Counted)>,
    /// The same by their addresses in memory, and what others had counted when they were seen first.
    by_endpoint: HashMap<usize, Counted>,
}

/// What was counted of an endpoint until some moment.
#[derive(Debug, Clone, Copy, Default)]
struct Counted {
    failures: u64,
    segments: u64,
    retransmits: u64,
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

    fn since(self, before: Self) -> Self {
        Self {
            failures: self.failures.saturating_sub(before.failures),
            segments: self.segments.saturating_sub(before.segments),
            retransmits: self.retransmits.saturating_sub(before.retransmits),
        }
    }
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
        let counted = |endpoint: &Arc<Endpoint>| (Arc::clone(endpoint), Counted::of(endpoint));
        let endpoints: Vec<_> = route.snapshot.endpoints.iter().map(counted).collect();
        Self {
            queue: total(|stats| &stats.queue_wait),
            connect: total(|stats| &stats.connect_duration),
            first_byte: total(|stats| &stats.first_byte),
            timed_out: ended(Outcome::Timeout),
            gave_up: ended(Outcome::QueueFull)
                + ended(Outcome::QueueTimeout)
                + closed(CloseReason::QueueFull)
                + closed(CloseReason::QueueTimeout),
            waited: route.stats.iter().map(|stats| stats.outage_waited.get()).sum(),
            by_endpoint: endpoints
                .iter()
                .map(|(endpoint, counted)| (key(endpoint), *counted))
                .collect(),
            endpoints,
        }
    }

    /// Takes endpoints that another sample has, and this one has not, for such as have counted nothing in
    /// between: one that comes back has counted before.
    fn adopt(&mut self, other: &Self) {
        for (endpoint, counted) in &other.endpoints {
            self.by_endpoint.entry(key(endpoint)).or_insert(*counted);
        }
    }

    /// Each endpoint with what it has counted since.
    fn endpoints_since<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = (&'a Endpoint, Counted)> {
        self.endpoints.iter().map(|(endpoint, now)| {
            let before = before.by_endpoint.get(&key(endpoint)).copied().unwrap_or(*now);
            (&**endpoint, now.since(before))
        })
    }
}

/// What was counted until some moment.
#[derive(Debug)]
struct Sample {
    at: Instant,
    /// Of each worker: CPU time, and time that it waited for a core.
    workers: Vec<(Duration, Duration)>,
    routes: Vec<RouteSample>,
}

impl Sample {
    /// Reads all counters, a route at a time, so that probes are answered in between.
    async fn of(view: &View, at: Instant) -> Self {
        let workers = view.stats().map(|stats| (stats.cpu.get(), stats.core_wait.get())).collect();
        let mut routes = Vec::new();
        for number in 0..view.config().routes.len() {
            routes.extend(view.routes().nth(number).map(|route| RouteSample::of(&route)));
            yield_now().await;
        }
        Self { at, workers, routes }
    }
}

/// What is remembered from one look to the next.
#[derive(Debug)]
struct Looks {
    /// What is compared with; the oldest is as old as [`WINDOW`] once there are two.
    before: VecDeque<Sample>,
    /// What the first byte of each route usually takes, in seconds, once that is known.
    usual: Vec<Option<f64>>,
    /// Since when the endpoints of each route may be old.
    stale: Vec<Option<Instant>>,
}

/// Looks for problems for as long as the process runs.
pub(super) async fn run(view: Arc<View>) {
    let mut looks = Looks::new(&view, Instant::now()).await;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let found = looks.look(&view, Instant::now()).await;
        let before = view.set_findings(found.clone());
        log(&view, &before, &found);
    }
}

/// Tells what has begun and what has ended.
fn log(view: &View, before: &[Finding], now: &[Finding]) {
    let route = |finding: &Finding| match finding.route {
        Some(at) => view.config().routes[at].name.as_str(),
        None => "",
    };
    let is_in = |all: &[Finding], one: &Finding| all.iter().any(|other| other.is_about(one));
    for new in now.iter().filter(|new| !is_in(before, new)) {
        tracing::warn!(route = route(new), problem = new.problem.name(), "problem: {}", new.words);
    }
    for over in before.iter().filter(|old| !is_in(now, old)) {
        let seconds = over.since.elapsed().as_secs();
        let (route, problem) = (route(over), over.problem.name());
        tracing::info!(route, problem, seconds, "problem is over");
    }
}

impl Looks {
    async fn new(view: &View, now: Instant) -> Self {
        let routes = view.config().routes.len();
        let before = [Sample::of(view, now).await].into();
        Self { before, usual: vec![None; routes], stale: vec![None; routes] }
    }

    /// All problems that there are now, with when they began.
    async fn look(&mut self, view: &View, now: Instant) -> Vec<Finding> {
        let sample = Sample::of(view, now).await;
        for before in &mut self.before {
            let pairs = before.routes.iter_mut().zip(&sample.routes);
            pairs.for_each(|(before, now)| before.adopt(now));
        }
        let mut found = Found { since: now, list: Vec::new() };
        let before = &self.before[0];
        let known = view.findings();
        found.in_process(view, &known, before, &sample);
        for (at, route) in view.routes().enumerate() {
            let (before, now) = (&before.routes[at], &sample.routes[at]);
            found.in_route((at, &route), before, now, &mut self.usual[at]);
            found.in_discovery((at, &route), &mut self.stale[at]);
        }
        let latest = self.before.back().map_or(now, |sample| sample.at);
        if now.saturating_duration_since(latest) >= WINDOW {
            self.before.push_back(sample);
            if self.before.len() > 2 {
                self.before.pop_front();
            }
        }
        for finding in &mut found.list {
            if let Some(same) = known.iter().find(|known| known.is_about(finding)) {
                finding.since = same.since;
            }
        }
        found.list
    }
}

/// What one look finds.
struct Found {
    since: Instant,
    list: Vec<Finding>,
}

impl Found {
    fn add(&mut self, problem: Problem, route: Option<usize>, words: String) {
        self.list.push(Finding { problem, route, words, since: self.since });
    }

    fn in_process(&mut self, view: &View, known: &[Finding], before: &Sample, now: &Sample) {
        let (open, most) = (view.sessions_active(), view.max_sessions());
        let goes_on = known.iter().any(|known| known.problem == Problem::SessionLimit);
        let share = if goes_on { SESSIONS_SHARE_END } else { SESSIONS_SHARE };
        if open as f64 >= most as f64 * share {
            let words = format!("{open} of {most} sessions are open");
            self.add(Problem::SessionLimit, None, words);
        }
        let elapsed = now.at.saturating_duration_since(before.at);
        if elapsed < WINDOW {
            // The start of the process, which takes what it can get.
            return;
        }
        let elapsed = elapsed.as_secs_f64();
        let share = |of: fn(&(Duration, Duration)) -> Duration| {
            let of_worker = |(now, before)| of(now).saturating_sub(of(before)).as_secs_f64();
            let each = now.workers.iter().zip(&before.workers).map(of_worker);
            each.map(|seconds| seconds / elapsed).collect::<Vec<_>>()
        };
        let (ran, waited) = (share(|times| times.0), share(|times| times.1));
        if let Some(words) = overloaded(&ran, &waited) {
            self.add(Problem::WorkerOverloaded, None, words);
        }
        let waited = mean(&waited);
        if waited >= CORE_WAIT_SHARE {
            let words = format!(
                "workers waited for a core {:.0} % of the time: a CPU limit, or a busy node",
                waited * 100.0
            );
            self.add(Problem::CpuThrottled, None, words);
        }
    }

    fn in_route(
        &mut self,
        (at, route): (usize, &RouteView<'_>),
        before: &RouteSample,
        now: &RouteSample,
        usual: &mut Option<f64>,
    ) {
        let first_byte = now.first_byte.since(before.first_byte);
        let timed_out = now.timed_out.saturating_sub(before.timed_out);
        let about = Some(at);
        if let Some(words) = slow(first_byte, timed_out, usual) {
            self.add(Problem::BackendSlow, about, words);
        }
        let refusing = refusing(before, now);
        // Who waits for an endpoint waits for none of the proxy's limits.
        let outage = refusing.is_some() || now.waited > before.waited;
        if let Some(words) = queued(before, now, outage) {
            self.add(Problem::PoolSmall, about, words);
        }
        let no_endpoint = route.not_ready().filter(|_| route.snapshot.generation > 0);
        if let Some(words) = no_endpoint {
            self.add(Problem::NoEndpoint, about, words);
        }
        if let Some(words) = refusing {
            self.add(Problem::BackendRefusing, about, words);
        }
        if let Some(words) = lossy(before, now) {
            self.add(Problem::NetworkLossy, about, words);
        }
    }

    fn in_discovery(&mut self, (at, route): (usize, &RouteView<'_>), since: &mut Option<Instant>) {
        let Some(words) = stale(route) else { return *since = None };
        let since = *since.get_or_insert(self.since);
        if self.since.saturating_duration_since(since) >= WINDOW {
            self.add(Problem::DiscoveryStale, Some(at), words);
        }
    }
}

fn mean(of: &[f64]) -> f64 {
    of.iter().sum::<f64>() / of.len() as f64
}

/// A duration in seconds, to be read.
fn time(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.1} ms", seconds * 1e3) } else { format!("{seconds:.1} s") }
}

/// Whether a worker has something to do all the time, by the shares of time for which each ran, and
/// waited for a core to run on.
fn overloaded(ran: &[f64], waited: &[f64]) -> Option<String> {
    let wants: Vec<_> = ran.iter().zip(waited).map(|(ran, waited)| ran + waited).collect();
    let is_busy = |worker: &usize| wants[*worker] >= BUSY_SHARE;
    let (busy, others): (Vec<_>, Vec<_>) = (0..wants.len()).partition(is_busy);
    let first = *busy.first()?;
    let share = |of: f64| format!("{:.0} %", of.min(1.0) * 100.0);
    let times = format!(
        "runs {} of the time, waits for a core {}",
        share(ran[first]),
        share(waited[first])
    );
    if others.is_empty() {
        return Some(format!(
            "all {} workers are busy all the time; worker 0 {times}",
            wants.len()
        ));
    }
    let rest = mean(&others.iter().map(|&worker| wants[worker]).collect::<Vec<_>>());
    let more =
        if busy.len() == 1 { String::new() } else { format!(" and {} more", busy.len() - 1) };
    Some(format!("worker {first}{more} is busy all the time ({times}), the others {}", share(rest)))
}

/// Whether a backend takes longer for its first byte than is usual, or does not answer.
fn slow(first_byte: Total, timed_out: u64, usual: &mut Option<f64>) -> Option<String> {
    let mean = first_byte.mean();
    let mut words = None;
    if first_byte.count >= EVENTS_MIN {
        let before = *usual.get_or_insert(mean);
        let is_slow = mean >= SLOW_ANYWAY || (mean >= SLOW_MIN && mean >= before * SLOW_TIMES);
        let weight = if is_slow { USUAL_WEIGHT_SLOW } else { USUAL_WEIGHT };
        let counts = mean.min(before.max(SLOW_MIN) * USUAL_TIMES_MAX);
        *usual = Some(before + (counts - before) * weight);
        words = is_slow
            .then(|| format!("the first byte takes {}; usual are {}", time(mean), time(before)));
    }
    let unanswered = (timed_out > 0).then(|| format!("{timed_out} requests were not answered"));
    match (words, unanswered) {
        (Some(slow), Some(unanswered)) => Some(format!("{slow}; {unanswered}")),
        (slow, unanswered) => slow.or(unanswered),
    }
}

/// Whether clients wait for a connection for a good part of their time, other than for want of an
/// endpoint.
fn queued(before: &RouteSample, now: &RouteSample, outage: bool) -> Option<String> {
    let queue = now.queue.since(before.queue);
    // Sessions may last for days.
    let whole = queue.sum
        + now.connect.since(before.connect).sum
        + now.first_byte.since(before.first_byte).sum;
    let gave_up = now.gave_up.saturating_sub(before.gave_up);
    let share = if whole > 0.0 { queue.sum / whole } else { 0.0 };
    let waits =
        !outage && queue.count >= EVENTS_MIN && queue.mean() >= QUEUE_MIN && share >= QUEUE_SHARE;
    if !waits && gave_up == 0 {
        return None;
    }
    let mut words = format!(
        "clients wait {} for a backend connection, {:.0} % of the time until their first byte",
        time(queue.mean()),
        share * 100.0
    );
    if gave_up > 0 {
        let _ = write!(words, "; {gave_up} gave up");
    }
    Some(words)
}

/// Whether connects fail, or endpoints are ejected.
fn refusing(before: &RouteSample, now: &RouteSample) -> Option<String> {
    let mut named = Vec::new();
    let mut failed = 0;
    for (endpoint, Counted { failures, .. }) in now.endpoints_since(before) {
        failed += failures;
        if failures > 0 || !usable(endpoint) {
            let failure = endpoint.stats.iter().find_map(EndpointStats::failure);
            let how = match failure {
                _ if endpoint.fails_check() => "fails its checks",
                Some(failure) => failure.name(),
                None => "has failed",
            };
            named.push(format!("{} {how}", endpoint.name));
        }
    }
    if named.is_empty() {
        return None;
    }
    let ejected = now.endpoints.iter().filter(|(endpoint, _)| !usable(endpoint)).count();
    let more = named.len().saturating_sub(NAMED_MAX);
    named.truncate(NAMED_MAX);
    let mut words = named.join(", ");
    if more > 0 {
        let _ = write!(words, " and {more} more");
    }
    let _ = write!(words, ": {failed} connects failed");
    if ejected > 0 {
        let _ = write!(words, ", {ejected} of {} endpoints are out of use", now.endpoints.len());
    }
    Some(words)
}

/// Whether what is sent to an endpoint gets lost on the way.
fn lossy(before: &RouteSample, now: &RouteSample) -> Option<String> {
    let lost = now.endpoints_since(before).filter_map(|(endpoint, counted)| {
        let (again, sent) = (counted.retransmits, counted.segments);
        let share = again as f64 / sent.max(1) as f64;
        (again >= EVENTS_MIN && share >= LOSS_SHARE).then_some((endpoint, share))
    });
    let (endpoint, share) = lost.max_by(|(_, a), (_, b)| a.total_cmp(b))?;
    let percent = share * 100.0;
    Some(format!("{}: {percent:.1} % of the segments to it had to be sent again", endpoint.name))
}

/// Whether the endpoints may be old.
fn stale(route: &RouteView<'_>) -> Option<String> {
    if let Some(age) = route.discovery.saved_age() {
        let seconds = age.as_secs();
        return Some(format!("the endpoints are those of a former run, {seconds} s old"));
    }
    let trouble = route.discovery.source_trouble().filter(|_| route.snapshot.generation > 0)?;
    Some(format!("the endpoints may be old: {trouble}"))
}
