//! Endpoints that stand in for others: what a worker does when other ones are in use.

use super::Route;
use crate::io::Driver;
use crate::metrics::Discard;
use crate::worker::context::Context;

impl Route {
    /// Does what follows where another tier is in use: its pools are filled, and those that wait are placed
    /// anew.
    pub(in crate::worker) fn look_after_tiers<D: Driver>(&mut self, cx: &mut Context<D>) {
        let Some(tier) = self.pools.table.take_moved() else { return };
        self.stats.tier.set(usize::from(tier) as u64);
        for endpoint in self.pools.table.indices() {
            self.pools.mark_short(endpoint);
        }
        self.place_waiting_again(cx);
    }

    /// Has probes find out whether those are well that no client tries, and closes the idle connections of
    /// endpoints that get nothing new, except those probes.
    pub(super) fn look_after_withheld<D: Driver>(&mut self, cx: &mut Context<D>) {
        self.pools.table.judge_tiers(cx.now);
        for endpoint in self.pools.table.indices() {
            if self.pools.table.is_left(endpoint) {
                self.pools.eject(cx, endpoint);
            }
            let entry = self.pools.table.get(endpoint);
            if entry.is_some_and(|entry| entry.is_withheld() && !entry.health.is_probing()) {
                self.pools.evict(cx, endpoint, Discard::Surplus);
            }
        }
    }
}
