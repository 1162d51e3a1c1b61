//! What the kernel measures of the way to the endpoints: a few connections are looked at ten times a
//! second, all in turns.

use super::engine::Engine;
use super::owners::Owned;
use super::route::Route;
use crate::io::{Driver, Network};
use crate::limits;

impl<D: Driver> Engine<D> {
    /// Looks at the next few connections to endpoints.
    pub(super) fn look_at_network(&mut self) {
        let slots = self.cx.owners.len();
        let mut looks = 0;
        for _ in 0..slots.min(limits::NETWORK_SLOTS) {
            let slot = self.network_turns.next(slots);
            if slot == slots - 1 {
                self.begin_round();
            }
            looks += usize::from(self.look_at_slot(slot));
            if looks == limits::NETWORK_LOOKS {
                return;
            }
        }
    }

    /// All have had a turn. What is on its way is what this round finds: of a connection that is closed
    /// nothing is, and an endpoint without one is delivered nothing.
    fn begin_round(&self) {
        for entry in self.routes.iter().flat_map(Route::entries) {
            entry.stats().unacked.set(0);
            if !entry.has_conns() {
                entry.stats().delivery_rate.set(0);
            }
        }
    }

    /// Looks at the connection in a slot, if it leads to an endpoint. Says whether it was looked at,
    /// which costs a system call.
    fn look_at_slot(&mut self, slot: usize) -> bool {
        let &Owned { conn, route, ref owner, .. } = self.cx.owners.at(slot);
        let route = &mut self.routes[usize::from(route)];
        let Some(entry) = route.entry_of(owner) else { return false };
        let Some(now) = self.cx.driver.network(conn) else { return true };
        let before = std::mem::replace(self.cx.owners.seen(slot), now);
        let stats = entry.stats();
        let Network { rtt, segments, retransmits, unacked, delivery_rate } = now;
        // Whether it sends anew or not: what is not acknowledged is still on its way.
        stats.unacked.set(stats.unacked.get().max(unacked.into()));
        let sent = segments.wrapping_sub(before.segments);
        if sent > 0 {
            stats.rtt.record(rtt);
            stats.segments.add(sent.into());
            stats.retransmits.add(retransmits.wrapping_sub(before.retransmits).into());
            stats.delivery_rate.set(delivery_rate);
        }
        true
    }
}
