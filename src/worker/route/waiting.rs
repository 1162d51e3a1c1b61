//! Sessions for which no endpoint is usable: they wait in line, and are served as endpoints return.

use super::Route;
use super::pools::is_local;
use crate::io::{Driver, Unheard};
use crate::metrics::{CloseReason, Failure};
use crate::proxy::balance::Entry;
use crate::proxy::session::{Session, Tried};
use crate::slab::Key;
use crate::worker::context::Context;

impl Route {
    /// Whether sessions wait for an endpoint rather than be closed at once.
    pub(super) fn may_wait(&self) -> bool {
        !self.config.endpoint_wait.is_zero()
    }

    /// What a session is closed for that has waited in vain and was never tried itself.
    pub(super) fn why_unusable(&self) -> CloseReason {
        if self.pools.table.is_empty() {
            return CloseReason::NoEndpoint;
        }
        let timed_out = |entry: &Entry| entry.stats().failure() == Some(Failure::TimedOut);
        let table = &self.pools.table;
        let mut present =
            table.indices().filter_map(|at| table.get(at)).filter(|entry| entry.is_present());
        if present.all(timed_out) {
            CloseReason::ConnectTimeout
        } else {
            CloseReason::ConnectFailed
        }
    }

    /// Has a session wait for an endpoint, and closes it for `reason` when that has been too long.
    pub(super) fn have_wait<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        reason: CloseReason,
    ) {
        if self.sessions.of(key).may_have_left() {
            return self.close_session(cx, key, CloseReason::ClientLeft);
        }
        if self.sessions.have_wait(key, reason) {
            self.stats.outage_waited.add(1);
        }
        self.feel_outage(cx);
        self.on_wait_over(cx, key);
    }

    /// The time of a session that waits may be over. If it is not, it is looked at again then.
    pub(super) fn on_wait_over<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Session>) {
        let wait = self.config.endpoint_wait;
        let session = self.sessions.of(key);
        match session.waited_too_long(wait, cx.now) {
            Some(reason) => {
                self.record_wait(cx, key);
                self.give_up(cx, key, reason);
            }
            None => cx.timers.set(session.client().index(), session.waits_until(wait)),
        }
    }

    /// Closes a session for want of a usable endpoint.
    pub(super) fn give_up<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        reason: CloseReason,
    ) {
        self.feel_outage(cx);
        self.stats.outage_given_up.add(1);
        self.close_session(cx, key, reason);
    }

    fn record_wait<D: Driver>(&mut self, cx: &Context<D>, key: Key<Session>) {
        let waited = cx.now.saturating_duration_since(self.sessions.of(key).seeking());
        let longest = &self.stats.outage_longest_ms;
        longest.set(longest.get().max(waited.as_millis() as u64));
    }

    /// A client has found no usable endpoint.
    fn feel_outage<D: Driver>(&mut self, cx: &Context<D>) {
        if self.outage.on_felt(cx.now) {
            self.stats.outage_longest_ms.set(0);
            // Zero says that there is none.
            self.stats.outage_since_ms.set((cx.alive().as_millis() as u64).max(1));
        }
    }

    /// Requests that wait feel an outage as sessions do.
    pub(super) fn look_for_outage<D: Driver>(&mut self, cx: &Context<D>) {
        if !self.requests.queue.is_empty() && self.pools.table.is_outage(cx.now) {
            self.feel_outage(cx);
        }
    }

    /// Publishes what clients feel of an outage, while there is one.
    fn look_after_outage<D: Driver>(&mut self, cx: &Context<D>) {
        if !self.outage.is_on() {
            return;
        }
        let waiting = self.sessions.line.held();
        let requests_wait = !self.requests.queue.is_empty() && !self.pools.table.is_connected(None);
        if waiting == 0 && !requests_wait && !self.pools.table.is_outage(cx.now) {
            self.outage.on_over(cx.now);
            self.stats.outage_since_ms.set(0);
        }
        self.stats.clients_waiting.set(waiting as u64);
        self.stats.outage.set(self.outage.total(cx.now));
    }

    /// Serves those that wait, in order, as far as endpoints take them now.
    pub(in crate::worker) fn serve_waiting<D: Driver>(&mut self, cx: &mut Context<D>) {
        self.serve_those_who_wait(cx);
        self.look_after_outage(cx);
    }

    fn serve_those_who_wait<D: Driver>(&mut self, cx: &mut Context<D>) {
        let mut passed_over = None;
        while let Some((ticket, key)) = self.sessions.line.next(passed_over) {
            let session = self.sessions.of(key);
            let (client, silent) = (session.client(), !session.has_early());
            // One that may have left is served once that is heard: if there are bytes before its end,
            // they come first.
            if silent && cx.driver.unheard(client) == Unheard::End {
                passed_over = Some(ticket);
                continue;
            }
            if session.cancel().is_some() {
                // It goes to one endpoint after the other, from the first on, whoever takes it.
                passed_over = Some(ticket);
                if !self.pools.table.is_outage(cx.now) {
                    cx.timers.clear(client.index());
                    self.sessions.serve(key);
                    self.dispatch(cx, key, CloseReason::ConnectFailed);
                }
                continue;
            }
            let fit = Entry::has_room_for_waiting;
            let Some(endpoint) = self.choose_among(cx, client, &Tried::default(), fit) else {
                return;
            };
            cx.timers.clear(client.index());
            self.record_wait(cx, key);
            self.sessions.serve(key);
            if !self.has_conn_for_session(cx, endpoint) {
                self.join_line(cx, key, cx.now);
                continue;
            }
            match self.try_endpoint(cx, key, endpoint) {
                Ok(()) => {}
                Err(error) if is_local(&error) => {
                    tracing::debug!(%error, "cannot connect");
                    self.close_session(cx, key, CloseReason::Overload);
                }
                Err(error) => {
                    self.pools.on_endpoint_unreachable(cx, endpoint, &error);
                    self.leave_endpoint(cx, key);
                    self.have_wait(cx, key, CloseReason::ConnectFailed);
                }
            }
        }
    }
}
