//! Endpoints that stand in for others: what a worker does when other ones are in use.

use super::Route;
use crate::io::Driver;
use crate::metrics::Discard;
use crate::proxy::balance::Moved;
use crate::worker::context::Context;

impl Route {
    /// Does what follows where another tier is in use: its pools are filled, those that wait are placed
    /// anew, and whether those that failed are well is found out by probes, as no client tries them.
    pub(in crate::worker) fn look_after_tiers<D: Driver>(&mut self, cx: &mut Context<D>) {
        let Some(Moved { from, to }) = self.pools.table.take_moved() else { return };
        self.stats.tier.set(usize::from(to) as u64);
        for endpoint in self.pools.table.indices() {
            if self.pools.table.was_left(endpoint, from) {
                self.pools.eject(cx, endpoint);
            }
            self.pools.mark_short(endpoint);
        }
        self.place_waiting_again(cx);
    }

    /// Closes the idle connections of endpoints that get nothing new, except probes, which decide whether
    /// they may.
    pub(super) fn evict_withheld<D: Driver>(&mut self, cx: &mut Context<D>) {
        self.pools.table.judge_tiers(cx.now);
        for endpoint in self.pools.table.indices() {
            let entry = self.pools.table.get(endpoint);
            if entry.is_some_and(|entry| entry.is_withheld() && !entry.health.is_probing()) {
                self.pools.evict(cx, endpoint, Discard::Surplus);
            }
        }
    }
}
