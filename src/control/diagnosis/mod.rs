//! Says in one word what is wrong, and where: in the database, the network, the proxy, or around it.
//!
//! It compares what the workers count with what they had counted some seconds before; nobody waits for
//! this. What it finds is logged when it begins and when it ends, and shown by the admin port.

mod sample;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use humantime::format_duration;

use super::View;
use super::view::{RouteView, failure, usable};
use crate::config::{PoolMode, RouteConfig};
use crate::metrics::{Failure, LabelSet, Problem};
use crate::proxy::endpoints::Endpoint;
use sample::{Counted, CpuTimes, Growth, Replies, RouteSample, Sample, Seen, Times};

/// How often it is looked.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What is compared with is as old as this, or twice as old: what lasted for less is no problem.
const WINDOW: Duration = Duration::from_secs(5);

/// What fewer looks have found is not said: what lasts for a moment may be seen by two.
const LOOKS_MIN: u32 = 3;

/// What was counted over a window is over once no look has found it for so long: a window and a look.
/// Near a bound it comes and goes with each look, and what is rare with the age of what is compared with.
const OVER_AFTER: Duration = Duration::from_secs(6);

/// Fewer events in a window than this say nothing about their kind.
const EVENTS_MIN: u64 = 10;

/// A first byte is unusual that takes so many times as long as usual, and this long in seconds.
const SLOW_TIMES: f64 = 4.0;
const SLOW_MIN: f64 = 0.005;

/// And this share of them is so slow. One reply in a hundred that takes half a minute, since it waits for
/// news, makes the mean a third of a second.
const SLOW_SHARE: f64 = 0.05;

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
    /// When a look found it last.
    pub found_at: Instant,
    /// How many looks have found it. Others may have found that it cannot be judged, and goes on.
    pub looks: u32,
}

impl Finding {
    fn is_about(&self, other: &Self) -> bool {
        (self.problem, self.route) == (other.problem, other.route)
    }

    fn is_said(&self) -> bool {
        self.looks >= LOOKS_MIN
    }

    /// Whether it goes on though this look has not found it; some are as they are now.
    fn lasts(&self, now: Instant) -> bool {
        let is_state = match self.problem {
            Problem::NoEndpoint | Problem::SessionLimit | Problem::DiscoveryStale => true,
            Problem::BackendSlow
            | Problem::BackendRefusing
            | Problem::NetworkLossy
            | Problem::PoolSmall
            | Problem::WorkerOverloaded
            | Problem::CpuThrottled => false,
        };
        !is_state && now.saturating_duration_since(self.found_at) < OVER_AFTER
    }
}

/// What a look has to say of one kind of problem.
#[derive(Debug)]
struct Verdict {
    words: String,
    /// Whether it can be judged, and goes on. Else what other looks have found stays as it was.
    is_certain: bool,
}

impl Verdict {
    /// One of several, if there are any.
    fn of_all(all: impl Iterator<Item = Self>) -> Option<Self> {
        all.reduce(|one, other| Self {
            words: format!("{}; {}", one.words, other.words),
            is_certain: one.is_certain || other.is_certain,
        })
    }
}

/// What is remembered from one look to the next.
#[derive(Debug)]
struct Looks {
    /// What is compared with; the oldest is as old as [`WINDOW`] once there are two.
    before: VecDeque<Sample>,
    /// Of the latest look.
    cpu: CpuTimes,
    /// Of each route.
    routes: Vec<Remembered>,
    /// What the latest look found.
    found: Vec<Finding>,
}

/// What is remembered of a route.
#[derive(Debug, Default)]
struct Remembered {
    /// What the first byte usually takes, in seconds, once that is known.
    usual: Option<f64>,
    /// Since when the endpoints may be old.
    stale: Option<Instant>,
    seen: Seen,
    /// When a backend was last found to be slow, and may have let clients wait in vain.
    blamed: Option<Instant>,
    /// What had been counted until the latest look.
    times: Times,
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
    let route = |finding: &Finding| Some(view.config().routes[finding.route?].name.as_str());
    let is_in = |all: &[Finding], one: &Finding| all.iter().any(|other| other.is_about(one));
    for new in now.iter().filter(|new| !is_in(before, new)) {
        tracing::warn!(route = route(new), problem = new.problem.name(), "problem: {}", new.words);
    }
    for over in before.iter().filter(|old| !is_in(now, old)) {
        let seconds = over.found_at.saturating_duration_since(over.since).as_secs();
        let (route, problem) = (route(over), over.problem.name());
        tracing::info!(route, problem, seconds, "problem is over");
    }
}

impl Looks {
    async fn new(view: &View, now: Instant) -> Self {
        let routes = view.config().routes.len();
        let before = Sample::of(view, now).await;
        let routes = std::iter::repeat_with(Remembered::default).take(routes).collect();
        Self { cpu: before.cpu.clone(), before: [before].into(), routes, found: Vec::new() }
    }

    /// All problems that there are now, with when they began. What few looks find is none: it may be how
    /// another one begins or ends.
    async fn look(&mut self, view: &View, now: Instant) -> Vec<Finding> {
        let sample = Sample::of(view, now).await;
        for before in &mut self.before {
            let pairs = before.routes.iter_mut().zip(&sample.routes).zip(&self.routes);
            pairs.for_each(|((before, now), remembered)| before.adopt(now, &remembered.seen));
        }
        let mut found = Found { since: now, is_late: false, list: Vec::new() };
        let before = &self.before[0];
        found.in_sessions(view, &self.found);
        found.in_workers(&before.cpu, &self.cpu, &sample.cpu);
        self.cpu.clone_from(&sample.cpu);
        for (at, route) in view.routes().enumerate() {
            let remembered = &mut self.routes[at];
            let (before, now) = (&before.routes[at], &sample.routes[at]);
            found.in_route((at, &route), before, now, remembered);
            found.in_discovery((at, &route), &mut remembered.stale);
            remembered.seen.add(now);
            remembered.times = now.times;
        }
        let latest = self.before.back().map_or(now, |sample| sample.cpu.at);
        if now.saturating_duration_since(latest) >= WINDOW {
            self.before.push_back(sample);
            if self.before.len() > 2 {
                self.before.pop_front();
            }
        }
        found.add_known(std::mem::take(&mut self.found));
        self.found = found.list;
        self.found.iter().filter(|finding| finding.is_said()).cloned().collect()
    }
}

/// What one look finds.
struct Found {
    since: Instant,
    /// Whether workers come too late to measure how long others take.
    is_late: bool,
    list: Vec<Finding>,
}

impl Found {
    fn add(&mut self, problem: Problem, route: Option<usize>, words: String) {
        self.add_verdict(problem, route, Some(Verdict { words, is_certain: true }));
    }

    /// The same, of what may be no more certain than it was, if there is anything.
    fn add_verdict(&mut self, problem: Problem, route: Option<usize>, verdict: Option<Verdict>) {
        let Some(Verdict { words, is_certain }) = verdict else { return };
        let (since, looks) = (self.since, u32::from(is_certain));
        self.list.push(Finding { problem, route, words, since, found_at: since, looks });
    }

    /// Adds what former looks have found.
    fn add_known(&mut self, known: Vec<Finding>) {
        for known in known {
            match self.list.iter_mut().find(|finding| finding.is_about(&known)) {
                Some(same) if known.looks > 0 => {
                    same.since = known.since;
                    same.looks += known.looks;
                }
                None if known.lasts(self.since) => self.list.push(known),
                _ => {}
            }
        }
    }

    fn in_sessions(&mut self, view: &View, known: &[Finding]) {
        let (open, most) = (view.sessions_active(), view.max_sessions());
        let goes_on = known.iter().any(|known| known.problem == Problem::SessionLimit);
        let share = if goes_on { SESSIONS_SHARE_END } else { SESSIONS_SHARE };
        if open as f64 >= most as f64 * share {
            let words = format!("{open} of {most} sessions are open");
            self.add(Problem::SessionLimit, None, words);
        }
    }

    fn in_workers(&mut self, before: &CpuTimes, latest: &CpuTimes, now: &CpuTimes) {
        if now.at.saturating_duration_since(before.at) < WINDOW {
            // The start of the process, which takes what it can get.
            return;
        }
        let problems = |since: &CpuTimes| {
            let (ran, waited) = now.shares_since(since);
            let late = [
                (Problem::WorkerOverloaded, overloaded(&ran, &waited)),
                (Problem::CpuThrottled, throttled(&ran, &waited)),
            ];
            late.into_iter().filter_map(|(problem, words)| Some((problem, words?)))
        };
        for (problem, words) in problems(before) {
            self.is_late = true;
            self.add(problem, None, words);
        }
        // How long others take goes by their number, and may look worse sooner than this does.
        self.is_late |= problems(latest).next().is_some();
    }

    /// Each part of a client's time is judged only where those in front of it are fine: the CPU, the
    /// network, the backend, and last the limits of the proxy's own, at which clients wait for all of them.
    fn in_route(
        &mut self,
        (at, route): (usize, &RouteView<'_>),
        before: &RouteSample,
        now: &RouteSample,
        remembered: &mut Remembered,
    ) {
        let (about, grown) = (Some(at), now.since(before));
        let latest = now.times.since(remembered.times);
        let no_endpoint = route.not_ready().filter(|_| route.snapshot.generation > 0);
        let is_outage = grown.is_outage || no_endpoint.is_some();
        let (lossy, refusing) = (lossy(before, now), refusing(before, now));
        let is_blurred = self.is_late || lossy.is_some();
        let replies = (&grown.times.replies, &latest.replies);
        // Those of the latest moment are few beside those of before, where many were asked.
        let is_slow_now =
            remembered.usual.is_some_and(|usual| latest.replies.are_slow(slow_from(usual)));
        let unusual = unusual(replies, &mut remembered.usual, is_blurred);
        // A session may have its connection, and nothing to ask.
        let asks = route.config.pool.mode == PoolMode::Request && !is_outage;
        let is_silent = asks && latest.only_gave_up();
        let unanswered = unanswered(&grown, is_silent);
        // What was asked, or its answer, may be lost.
        let overdue = overdue(&grown, route.config, lossy.is_none());
        let is_unusual = unusual.is_some() && !is_blurred;
        let is_mute = unanswered.is_some() || overdue.as_ref().is_some_and(|it| it.is_certain);
        if is_unusual || is_mute {
            remembered.blamed = Some(self.since);
        }
        // What is compared with may be from before that, and is at most twice as old and a look.
        let is_blamed = remembered.blamed.is_some_and(|at| self.since - at < 3 * WINDOW);
        let above_limit = above_limit(replies, route.config);
        let slow = above_limit.into_iter().chain(unusual).max_by_key(|verdict| verdict.is_certain);
        let slow = slow.into_iter().chain(unanswered).chain(overdue);
        self.add_verdict(Problem::BackendSlow, about, Verdict::of_all(slow));
        // Where nobody was answered since the latest look, the backend may have stopped, or never answers
        // more often.
        let may_be_slow = is_blamed || is_slow_now || is_silent;
        let is_clear = !is_blurred && refusing.is_none();
        let queued = queued(&grown.times, &latest, is_clear).map(|verdict| Verdict {
            is_certain: verdict.is_certain && !is_outage && !may_be_slow,
            ..verdict
        });
        self.add_verdict(Problem::PoolSmall, about, queued);
        let others = [
            (Problem::NoEndpoint, no_endpoint),
            (Problem::BackendRefusing, refusing),
            (Problem::NetworkLossy, lossy),
        ];
        for (problem, words) in others {
            if let Some(words) = words {
                self.add(problem, about, words);
            }
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

/// Whether a worker has something to do all the time and the core to do it on, by the shares of time for
/// which each ran, and waited for a core to run on.
fn overloaded(ran: &[f64], waited: &[f64]) -> Option<String> {
    let wants: Vec<_> = ran.iter().zip(waited).map(|(ran, waited)| ran + waited).collect();
    let is_busy = |&at: &usize| wants[at] >= BUSY_SHARE && waited[at] < CORE_WAIT_SHARE;
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

/// Whether workers that could run do not, for want of a core: all of them together, or one that has
/// something to do all the time.
fn throttled(ran: &[f64], waited: &[f64]) -> Option<String> {
    let busy = ran
        .iter()
        .zip(waited)
        .position(|(ran, waited)| ran + waited >= BUSY_SHARE && *waited >= CORE_WAIT_SHARE);
    let (who, share) = match (mean(waited), busy) {
        (share, _) if share >= CORE_WAIT_SHARE => ("workers".to_owned(), share),
        (_, busy) => (format!("worker {}", busy?), waited[busy?]),
    };
    let percent = share * 100.0;
    Some(format!("{who} waited for a core {percent:.0} % of the time: a CPU limit, or a busy node"))
}

/// From how many seconds on replies are slow, where so many are usual.
fn slow_from(usual: f64) -> f64 {
    (usual * SLOW_TIMES).max(SLOW_MIN)
}

/// Whether the first byte takes longer than is usual: those of a window, and of them those since the latest
/// look. What is usual is learned as long as nothing blurs the times.
fn unusual(
    (replies, latest): (&Replies, &Replies),
    usual: &mut Option<f64>,
    is_blurred: bool,
) -> Option<Verdict> {
    if replies.count() < EVENTS_MIN || (is_blurred && usual.is_none()) {
        return None;
    }
    let mean = replies.mean();
    let before = *usual.get_or_insert(mean);
    let limit = slow_from(before);
    if !is_blurred {
        let weight = if mean >= limit { USUAL_WEIGHT_SLOW } else { USUAL_WEIGHT };
        let counts = mean.min(before.max(SLOW_MIN) * USUAL_TIMES_MAX);
        *usual = Some(before + (counts - before) * weight);
    }
    replies.are_slow(limit).then(|| Verdict {
        words: format!("the first byte takes {}; usual are {}", time(mean), time(before)),
        is_certain: !is_blurred && latest.are_slow(limit),
    })
}

/// Whether the first byte takes longer than it may on this route, be it usual or not.
fn above_limit((replies, latest): (&Replies, &Replies), config: &RouteConfig) -> Option<Verdict> {
    let limit = config.slow_first_byte?;
    let are_above = |of: &Replies| of.are_slow(limit.as_secs_f64());
    let is_found = replies.count() >= EVENTS_MIN && are_above(replies);
    is_found.then(|| {
        let (mean, limit) = (time(replies.mean()), format_duration(limit));
        let words = format!("the first byte takes {mean}; AEGIS_SLOW_FIRST_BYTE is {limit}");
        Verdict { words, is_certain: are_above(latest) }
    })
}

/// Whether requests get no answer: they took too long, or all connections have been asked, and none has
/// answered for a while.
fn unanswered(grown: &Growth, is_silent: bool) -> Option<Verdict> {
    let Growth { timed_out, times, .. } = *grown;
    let words = match timed_out {
        0 if is_silent && times.only_gave_up() => {
            format!("no request is answered, and {} gave up before", times.gave_up)
        }
        0 => return None,
        _ => format!("{timed_out} requests were not answered"),
    };
    Some(Verdict { words, is_certain: true })
}

/// Whether the first byte takes longer than it may, for those that still wait for it or have given up. A few
/// may wait for news; but while they do and nobody is answered, nothing is known to be over.
fn overdue(grown: &Growth, config: &RouteConfig, is_clear: bool) -> Option<Verdict> {
    let limit = format_duration(config.slow_first_byte?);
    let waiting = grown.overdue;
    let words = || format!("{waiting} clients got no first byte; AEGIS_SLOW_FIRST_BYTE is {limit}");
    let are_many = waiting >= EVENTS_MIN;
    let is_found = are_many || (grown.waiting > 0 && grown.times.replies.count() == 0);
    is_found.then(|| Verdict { words: words(), is_certain: are_many && is_clear })
}

/// Whether clients wait for a connection for a good part of their time, or in vain: within a window, and
/// since the latest look. Their waits say something of the pool if that `is_clear`.
fn queued(grown: &Times, latest: &Times, is_clear: bool) -> Option<Verdict> {
    let Times { queue, gave_up, .. } = *grown;
    // Sessions may last for days.
    let whole = queue.sum + grown.connect.sum + grown.first_byte.sum;
    let share = if whole > 0.0 { queue.sum / whole } else { 0.0 };
    let waits = queue.count >= EVENTS_MIN && queue.mean() >= QUEUE_MIN && share >= QUEUE_SHARE;
    if !waits && gave_up == 0 {
        return None;
    }
    // Those that got none are not among those that were counted as they got theirs.
    let late = waits.then(|| {
        let (wait, percent) = (time(queue.mean()), share * 100.0);
        format!(
            "clients wait {wait} for a backend connection, {percent:.0} % of the time until their first byte"
        )
    });
    let vain = (gave_up > 0).then(|| format!("{gave_up} clients got no backend connection"));
    let words = late.into_iter().chain(vain).collect::<Vec<_>>().join("; ");
    let still_waits = waits && is_clear && latest.queue.mean() >= QUEUE_MIN;
    Some(Verdict { words, is_certain: still_waits || latest.gave_up > 0 })
}

/// Whether some worker has ejected it, and has not found it well since. Others may not have tried.
fn is_ejected(endpoint: &Endpoint) -> bool {
    endpoint.stats.iter().any(|stats| stats.ejected.get() > 0)
}

/// Whether connects fail, or endpoints are ejected.
fn refusing(before: &RouteSample, now: &RouteSample) -> Option<String> {
    let mut named = Vec::new();
    let mut failed = 0;
    for (endpoint, counted) in now.endpoints_since(before) {
        let failure = failure(endpoint);
        // Handshakes get lost as well.
        let is_lost = loss(counted).is_some() && failure == Some(Failure::TimedOut);
        if is_lost || (counted.failures == 0 && usable(endpoint) && !is_ejected(endpoint)) {
            continue;
        }
        failed += counted.failures;
        let how = match failure {
            _ if endpoint.fails_check() => "fails its checks",
            Some(failure) => failure.name(),
            None => "has failed",
        };
        named.push(format!("{} {how}", endpoint.name));
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
    // One that is out of use may not have been connected to since.
    let failed = (failed > 0).then(|| format!("{failed} connects failed"));
    let all = now.endpoints.len();
    let ejected = match now.endpoints.iter().filter(|(endpoint, _)| is_ejected(endpoint)).count() {
        _ if ejected > 0 => Some(format!("{ejected} of {all} endpoints are out of use")),
        0 => None,
        by_some => Some(format!("{by_some} of {all} endpoints are out of use for some workers")),
    };
    let seen: Vec<_> = failed.into_iter().chain(ejected).collect();
    Some(format!("{words}: {}", seen.join(", ")))
}

/// The share of the segments to an endpoint that had to be sent again, if it is a problem.
fn loss(counted: Counted) -> Option<f64> {
    let share = counted.retransmits as f64 / counted.segments.max(1) as f64;
    (counted.retransmits >= EVENTS_MIN && share >= LOSS_SHARE).then_some(share)
}

/// Whether what is sent to an endpoint gets lost on the way.
fn lossy(before: &RouteSample, now: &RouteSample) -> Option<String> {
    let all = now.endpoints_since(before);
    let lost = all.filter_map(|(endpoint, counted)| Some((endpoint, loss(counted)?)));
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
