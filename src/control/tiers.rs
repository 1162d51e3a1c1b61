//! Tells in the log when endpoints of another tier come into use: the workers publish which one each has
//! in use, and nobody waits for this.

use std::sync::Arc;
use std::time::Duration;

use super::View;
use super::outages::unusable;
use super::view::RouteView;
use crate::proxy::endpoints::{Endpoint, Tier};

/// How often it is looked. Shorter changes are counted, and not logged.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Looks after the tiers of all routes that have several, for as long as the process runs.
pub(super) async fn log_tiers(view: Arc<View>) {
    if !view.routes().any(|route| route.config.has_tiers()) {
        return;
    }
    let mut known: Vec<_> = view.routes().map(|_| (0, view.alive())).collect();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        for (route, (known, since)) in view.routes().zip(&mut known) {
            // Each worker decides for itself, by what it has seen: a lower one may follow soon.
            let tier = route.stats.iter().map(|stats| stats.tier.get()).max().unwrap_or_default();
            if tier != *known {
                let lasted = view.alive().saturating_sub(*since);
                log(&route, *known, tier, lasted);
                (*known, *since) = (tier, view.alive());
            }
        }
    }
}

fn log(route: &RouteView<'_>, before: u64, tier: u64, lasted: Duration) {
    if tier < before {
        let lasted_ms = lasted.as_millis() as u64;
        tracing::info!(
            route = route.name,
            tier,
            before,
            lasted_ms,
            "endpoints that others stood in for are in use again"
        );
    } else {
        let unusable = unusable(&endpoints_of(route, before));
        tracing::warn!(route = route.name, tier, before, unusable, "other endpoints stand in");
    }
}

/// The endpoints of this tier.
fn endpoints_of(route: &RouteView<'_>, tier: u64) -> Vec<Arc<Endpoint>> {
    let snapshot = &route.snapshot;
    let is_of = |at: usize| u8::try_from(tier).map(Tier::try_from) == Ok(Ok(snapshot.tier_of(at)));
    let endpoints = snapshot.endpoints.iter().enumerate();
    endpoints.filter(|(at, _)| is_of(*at)).map(|(_, endpoint)| Arc::clone(endpoint)).collect()
}
