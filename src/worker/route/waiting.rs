//! Sessions for which no endpoint is usable, or which find all of them full: they wait in line, and are
//! served as endpoints return and places become free.

use std::time::Instant;

use super::Route;
use super::pools::is_local;
use crate::io::{Driver, Unheard};
use crate::metrics::{CloseReason, Failure};
use crate::proxy::balance::{Entry, Fit};
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

    /// Has a session wait for an endpoint, or for a place at one, behind those that came before. It is
    /// closed when that has been too long, for `reason` if no endpoint was usable.
    pub(super) fn have_wait<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        reason: CloseReason,
    ) {
        if self.sessions.of(key).may_have_left() {
            return self.close_session(cx, key, CloseReason::ClientLeft);
        }
        if self.sessions.line.is_empty() {
            let is_full = self.pools.table.is_full(cx.now);
            self.sessions.line.set_full(is_full, cx.now);
        }
        let is_new = self.sessions.ticket_of(key).is_none();
        if is_new && self.is_line_full(cx) && !self.sessions.listen_for_cancel(key) {
            return self.close_session(cx, key, CloseReason::QueueFull);
        }
        self.sessions.have_wait(key, reason, cx.now);
        if !self.sessions.line.is_full() {
            self.stats.outage_waited.add(u64::from(is_new));
            self.feel_outage(cx);
        }
        self.on_wait_over(cx, key);
    }

    /// Whether as many wait for a place as may, those apart for whom one comes by itself.
    fn is_line_full<D>(&self, cx: &Context<D>) -> bool {
        let (line, max) = (&self.sessions.line, self.config.requests.queue_max);
        line.is_full()
            && line.len() >= max
            && line.len() - max >= self.pools.table.places_coming(cx.now)
    }

    /// When a session that waits has done so for too long, and what it is closed for then.
    fn wait_ends(&self, cx: &Context<impl Driver>, key: Key<Session>) -> (Instant, CloseReason) {
        let for_place = self.sessions.waited_for_place(key, cx.now);
        if self.sessions.line.is_full() {
            let left = self.config.requests.queue_timeout.saturating_sub(for_place);
            return (cx.now + left, CloseReason::QueueTimeout);
        }
        let Some((session, reason)) =
            self.sessions.get(key).and_then(|session| Some((session, session.why_waits()?)))
        else {
            unreachable!("it waits")
        };
        (session.waits_until(self.config.endpoint_wait + for_place), reason)
    }

    /// The time of a session that waits may be over. If it is not, it is looked at again then.
    pub(super) fn on_wait_over<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Session>) {
        let (at, reason) = self.wait_ends(cx, key);
        if at > cx.now {
            let client = self.sessions.of(key).client();
            return cx.timers.set(client.index(), at);
        }
        if reason == CloseReason::QueueTimeout {
            return self.close_session(cx, key, reason);
        }
        self.record_wait(cx, key);
        self.give_up(cx, key, reason);
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
        let waited = waited.saturating_sub(self.sessions.waited_for_place(key, cx.now));
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
        let requests_wait = !self.requests.queue.is_empty();
        if requests_wait && (self.pools.table.is_outage(cx.now) || self.placing(cx).feels_outage())
        {
            self.feel_outage(cx);
        }
    }

    /// Publishes what clients feel of an outage, while there is one.
    fn look_after_outage<D: Driver>(&mut self, cx: &Context<D>) {
        self.stats.clients_waiting.set(self.sessions.line.held() as u64);
        if !self.outage.is_on() {
            return;
        }
        let line = &self.sessions.line;
        let sessions_wait = line.held() > 0 && !line.is_full();
        let requests_wait = !self.requests.queue.is_empty() && !self.pools.table.is_connected(None)
            || self.placing(cx).lacks_store();
        if !sessions_wait && !requests_wait && !self.pools.table.is_outage(cx.now) {
            self.outage.on_over(cx.now);
            self.stats.outage_since_ms.set(0);
        }
        self.stats.outage.set(self.outage.total(cx.now));
    }

    /// Serves those that wait, in order, as far as endpoints take them now.
    pub(in crate::worker) fn serve_waiting<D: Driver>(&mut self, cx: &mut Context<D>) {
        if !self.sessions.line.is_empty() {
            self.serve_those_who_wait(cx);
        }
        self.look_at_what_is_waited_for(cx);
        self.look_after_outage(cx);
    }

    /// Whether it is places that are waited for, or endpoints, may have changed.
    fn look_at_what_is_waited_for<D: Driver>(&mut self, cx: &mut Context<D>) {
        let waits = !self.sessions.line.is_empty();
        let is_full = waits && self.pools.table.is_full(cx.now);
        if self.sessions.line.set_full(is_full, cx.now) {
            let mut at = self.sessions.line.first();
            while let Some(key) = at {
                at = self.sessions.line.next(key);
                self.on_wait_over(cx, key);
            }
        }
        if waits && self.pools.table.is_outage(cx.now) {
            self.feel_outage(cx);
        }
        if waits {
            self.want_places(cx);
        }
    }

    fn serve_those_who_wait<D: Driver>(&mut self, cx: &mut Context<D>) {
        let mut at = self.sessions.line.first();
        while let Some(key) = at {
            at = self.sessions.line.next(key);
            let session = self.sessions.of(key);
            let (client, silent) = (session.client(), !session.has_early());
            // One that may have left is served once that is heard: if there are bytes before its end,
            // they come first.
            if silent && cx.driver.unheard(client) == Unheard::End {
                continue;
            }
            if session.cancel().is_some() {
                self.serve_cancel(cx, key);
                continue;
            }
            if !self.may_wait() {
                if !self.pools.table.has_room() {
                    return;
                }
                self.sessions.serve(cx, key);
                self.dispatch(cx, key, CloseReason::NoEndpoint);
                continue;
            }
            // Where all are ejected, those that wait try the way.
            let is_outage = self.pools.table.is_outage(cx.now);
            let fit = if is_outage { Fit::InTurn } else { Fit::UsableInTurn };
            let Some(endpoint) = self.choose_fit(cx, client, &Tried::default(), fit) else {
                return;
            };
            self.record_wait(cx, key);
            self.sessions.serve(cx, key);
            if !self.has_conn_for_session(cx, key, endpoint) {
                // Another worker was faster, or the one there is was too old: next turn.
                self.pools.look_after_places();
                return self.have_wait(cx, key, CloseReason::ConnectFailed);
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
                    // It is still the first one, and another endpoint may take it.
                    if self.sessions.line.has(key) {
                        at = Some(key);
                    }
                }
            }
        }
    }

    /// A session that waits is a cancel request. It goes to one endpoint after the other, from the first
    /// on, whoever takes it, and past all that wait: they may wait for the very session that it is to
    /// cancel.
    pub(super) fn serve_cancel<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Session>) {
        if !self.pools.table.is_outage(cx.now) {
            self.sessions.serve(cx, key);
            self.dispatch(cx, key, CloseReason::ConnectFailed);
        }
    }
}
