//! Tells in the log when clients of a route begin to wait for an endpoint, and what it came to.
//!
//! The workers publish since when theirs wait; nobody waits for this.

use std::sync::Arc;
use std::time::Duration;

use super::View;
use super::view::{RouteView, failure};
use crate::config::Balance;
use crate::metrics::Failure;
use crate::proxy::endpoints::{Endpoint, EndpointSnapshot, Store};

/// How often it is looked whether clients wait. Shorter outages are counted, and not logged.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Endpoints that a line names.
const NAMED_MAX: usize = 8;

/// What is known of an outage of a route.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Ongoing {
    /// Milliseconds since the process started.
    since_ms: u64,
    /// What the workers had counted before.
    before: Counts,
}

/// What the workers of a route count of all outages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    waited: u64,
    given_up: u64,
}

impl Counts {
    fn of(route: &RouteView<'_>) -> Self {
        let mut counts = Self::default();
        for stats in &route.stats {
            counts.waited += stats.outage_waited.get();
            counts.given_up += stats.outage_given_up.get();
        }
        counts
    }
}

/// Looks after the outages of all routes for as long as the process runs.
pub(super) async fn log_outages(view: Arc<View>) {
    let mut ongoing: Vec<Option<Ongoing>> = view.routes().map(|_| None).collect();
    let mut before: Vec<_> = view.routes().map(|route| Counts::of(&route)).collect();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        for (at, route) in view.routes().enumerate() {
            ongoing[at] = look(&view, &route, ongoing[at], before[at]);
            if ongoing[at].is_none() {
                before[at] = Counts::of(&route);
            }
        }
    }
}

/// Looks at a route of which an outage was going on at the latest look, or not. Says whether one is
/// going on now.
fn look(
    view: &View,
    route: &RouteView<'_>,
    ongoing: Option<Ongoing>,
    before: Counts,
) -> Option<Ongoing> {
    let since = route.stats.iter().map(|stats| stats.outage_since_ms.get()).filter(|&at| at > 0);
    let now_ms = view.alive().as_millis() as u64;
    match (ongoing, since.min()) {
        (None, Some(since_ms)) => {
            if route.config.balance == Balance::KeyHash && !route.snapshot.endpoints.is_empty() {
                let unusable = unusable_stores(&route.snapshot);
                tracing::warn!(
                    route = route.name,
                    unusable,
                    "a store is not usable: its clients wait"
                );
            } else {
                let unusable = unusable(&route.snapshot.endpoints);
                tracing::warn!(route = route.name, unusable, "no endpoint is usable: clients wait");
            }
            Some(Ongoing { since_ms, before })
        }
        (Some(outage), None) => {
            let counts = Counts::of(route);
            let longest = route.stats.iter().map(|stats| stats.outage_longest_ms.get()).max();
            tracing::info!(
                route = route.name,
                lasted_ms = now_ms.saturating_sub(outage.since_ms),
                waited = counts.waited - outage.before.waited,
                longest_wait_ms = longest.unwrap_or_default(),
                given_up = counts.given_up - outage.before.given_up,
                "endpoints are usable again"
            );
            None
        }
        (ongoing, _) => ongoing,
    }
}

/// What endpoints there are, and why none of them is usable.
pub(super) fn unusable(endpoints: &[Arc<Endpoint>]) -> String {
    if endpoints.is_empty() {
        return "there is no endpoint".to_owned();
    }
    let all = endpoints.iter().map(|endpoint| format!("{}: {}", endpoint.name, why(endpoint)));
    list(all.collect())
}

/// The stores that are away or fail, and why. Others may be well.
fn unusable_stores(snapshot: &EndpointSnapshot) -> String {
    let why = |store: &Store| match store.endpoint.and_then(|at| snapshot.endpoints.get(at)) {
        None => Some(format!("{}: away", store.name)),
        Some(endpoint) => fails(endpoint).then(|| format!("{}: {}", store.name, why(endpoint))),
    };
    list(snapshot.stores.iter().filter_map(why).collect())
}

fn list(mut all: Vec<String>) -> String {
    let more = all.len().saturating_sub(NAMED_MAX);
    all.truncate(NAMED_MAX);
    if more > 0 {
        all.push(format!("{more} more"));
    }
    all.join(", ")
}

/// Whether it has failed in some worker, and has not been well since.
fn fails(endpoint: &Endpoint) -> bool {
    let mut stats = endpoint.stats.iter();
    endpoint.fails_check()
        || stats.any(|stats| stats.ejected.get() > 0 || stats.failures_in_a_row.get() > 0)
}

/// How an endpoint has failed last, as far as any worker knows.
fn why(endpoint: &Endpoint) -> &'static str {
    if endpoint.fails_check() {
        return "fails its checks";
    }
    failure(endpoint).map_or("not known yet", Failure::name)
}
