//! The places of connections to endpoints: when they become free, and who gets them.

#[cfg(test)]
use std::time::Duration;
use std::time::Instant;

use super::Route;
use super::pools::Pools;
use crate::io::{ConnId, Driver};
use crate::proxy::balance::Entry;
#[cfg(test)]
use crate::proxy::endpoints::Endpoint;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::queue::Line;
use crate::worker::context::Context;

/// A connection that was closed.
#[derive(Debug)]
pub(super) struct Closing {
    endpoint: EndpointId,
    conn: ConnId,
    /// Its descriptor is on the way to the kernel, which has it once the driver has waited.
    is_gone: bool,
}

/// What somebody who waits for an endpoint could have of one worker.
#[cfg(test)]
#[derive(Debug, Default)]
pub(in crate::worker) struct Prospect {
    /// Somebody waits whom this worker could serve.
    pub(in crate::worker) waits_in_vain: bool,
    /// Somebody waits who lacks nothing but a place.
    pub(in crate::worker) waits_for_place: bool,
    /// For so long one of its connections has been idle.
    pub(in crate::worker) idle_for: Duration,
    /// For so long one of them should have been closed for others.
    pub(in crate::worker) overdue: Duration,
}

impl Pools {
    /// A connection has left the books, and is closed if there was one: its place becomes free.
    pub(super) fn on_closing(&mut self, endpoint: EndpointId, conn: Option<ConnId>) {
        if !self.table.is_limited(endpoint) {
            return;
        }
        match conn {
            Some(conn) => self.closing.push(Closing { endpoint, conn, is_gone: false }),
            None => self.table.closed(endpoint),
        }
    }

    /// Gives back the places of connections that are closed by now. Those of which something is left
    /// to be delivered to a peer are closed later.
    fn settle_closing<D: Driver>(&mut self, cx: &Context<D>) {
        let mut at = 0;
        while let Some(closing) = self.closing.get_mut(at) {
            if closing.is_gone {
                let endpoint = self.closing.swap_remove(at).endpoint;
                self.table.closed(endpoint);
                continue;
            }
            closing.is_gone = !cx.driver.has_descriptor(closing.conn);
            self.places_due |= closing.is_gone;
            at += 1;
        }
    }

    /// Has the places looked after at the end of this turn, or in the next one.
    pub(super) fn look_after_places(&mut self) {
        self.places_due = true;
    }

    /// A connection of an endpoint is idle. If others need its place, it is looked at again in time.
    pub(super) fn on_idle(&mut self, endpoint: EndpointId, now: Instant) {
        if let Some(at) = self.table.get(endpoint).and_then(|entry| entry.yields_idle_at(now)) {
            self.look_after_places_at(at);
        }
    }

    fn look_after_places_at(&mut self, at: Instant) {
        self.places_at = Some(self.places_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// Takes what was passed on to this worker, and closes idle connections for others. Says whether
    /// there is room for more.
    pub(super) fn share_places<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
    ) -> bool {
        let now = cx.now;
        let collected = self.table.collect(endpoint, now);
        while let Some(at) = self.table.get(endpoint).and_then(|entry| entry.yields_idle_at(now)) {
            if at > now {
                self.look_after_places_at(at);
                break;
            }
            self.give_up_oldest(cx, endpoint);
        }
        while self.table.get(endpoint).is_some_and(Entry::must_yield_pooled) {
            self.give_up_oldest(cx, endpoint);
        }
        collected
    }
}

impl Route {
    /// Others have passed places on to this worker, or want some of its own.
    pub(in crate::worker) fn on_call_for_places(&mut self) {
        self.pools.look_after_places();
    }

    /// Gives back the places of what was closed, and has those used that have become free.
    pub(in crate::worker) fn settle_places<D: Driver>(&mut self, cx: &mut Context<D>) {
        let is_time = self.pools.places_at.is_some_and(|at| at <= cx.now);
        let was_due = std::mem::take(&mut self.pools.places_due) || is_time;
        self.pools.settle_closing(cx);
        if was_due {
            self.use_places(cx);
        }
        while let Some(worker) = self.pools.table.take_wake() {
            if worker == cx.worker {
                self.pools.look_after_places();
            } else if !cx.calls.contains(&worker) {
                cx.calls.push(worker);
            }
        }
    }

    /// Uses the places that this worker has, and gives the others those that it does not need.
    fn use_places<D: Driver>(&mut self, cx: &mut Context<D>) {
        self.gather_places(cx);
        let any_usable = self.pools.table.any_usable();
        for endpoint in self.pools.table.indices() {
            self.refill(cx, endpoint, any_usable);
        }
    }

    /// The same except for requests, for which connections are made as pools are refilled.
    pub(super) fn gather_places<D: Driver>(&mut self, cx: &mut Context<D>) {
        self.pools.places_at = None;
        for endpoint in self.pools.table.indices() {
            let collected = self.pools.share_places(cx, endpoint);
            // Sessions connect by themselves.
            if collected && self.reuses_conns() && self.waits_for(endpoint) {
                self.want(endpoint, 1);
            }
        }
        self.serve_waiting(cx);
    }

    /// Whether requests or sessions wait that an endpoint could serve.
    pub(super) fn waits_for(&self, endpoint: EndpointId) -> bool {
        let queue = &self.requests.queue;
        !self.sessions.line.is_empty()
            || queue.waiting(Line::Any) + queue.waiting(Line::Endpoint(endpoint)) > 0
    }

    /// Has a place passed on of each endpoint that could serve who waits and has none free.
    pub(super) fn want_places<D: Driver>(&mut self, cx: &Context<D>) {
        self.pools.table.want_places(cx.now);
    }

    /// What somebody who waits for an endpoint could have of this worker.
    #[cfg(test)]
    pub(in crate::worker) fn prospect(&self, endpoint: &Endpoint, now: Instant) -> Prospect {
        let table = &self.pools.table;
        let of = |at| Some((at, table.get(at)?));
        let mut entries = table.indices().filter_map(of);
        let found = entries.find(|(_, entry)| std::ptr::eq(&raw const *entry.endpoint, endpoint));
        let Some((at, entry)) = found else { return Prospect::default() };
        let is_usable = entry.is_usable(now) && !entry.is_withheld();
        let (mut tries, mut may_serve) = (true, entry.has_room_for_waiting(now));
        if self.reuses_conns() {
            tries = !entry.pool.backs_off(now) && entry.pool.connecting() == 0;
            let may_connect = entry.has_room() && entry.pool.room() > 0;
            may_serve = tries && (entry.pool.idle() > 0 || may_connect);
        }
        let waits = self.waits_for(at) && is_usable;
        Prospect {
            waits_in_vain: waits && may_serve,
            waits_for_place: waits && tries && entry.is_full(now),
            idle_for: entry.pool.oldest(now).unwrap_or_default(),
            overdue: now.saturating_duration_since(entry.yields_idle_at(now).unwrap_or(now)),
        }
    }

    /// The places that connections have are those that are counted as taken.
    #[cfg(test)]
    pub(super) fn assert_place_invariants(&self) {
        let mut closing = std::collections::HashMap::<_, usize>::new();
        for conn in &self.pools.closing {
            *closing.entry(conn.endpoint).or_default() += 1;
        }
        for endpoint in self.pools.table.indices() {
            let Some(entry) = self.pools.table.get(endpoint) else { continue };
            let closing = closing.remove(&endpoint).unwrap_or_default();
            assert_eq!(entry.closing(), closing, "closed ones of {}", entry.endpoint.name);
            assert!(self.pools.places_due || entry.spare() == 0, "a place that nobody uses");
        }
        assert!(closing.is_empty(), "closed ones of no endpoint: {closing:?}");
    }
}
