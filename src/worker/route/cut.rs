//! Cuts what is on an endpoint that has left, once its time is over.
//!
//! | what | when |
//! | --- | --- |
//! | a session that is still being connected, or on which nothing has moved | moves at once, its client sees nothing of it, however often it is |
//! | an idle connection, in the pool or in the hands of a client without a request | is closed at once |
//! | a session, a request in flight | is cut at a moment of its own within [`crate::limits::CUT_TIME`] |

use std::time::Instant;

use super::Route;
use crate::io::{Close, Driver};
use crate::metrics::{CloseReason, Discard, Retry};
use crate::proxy::Side;
use crate::proxy::balance::Table;
use crate::proxy::cut::Cut;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::session::Session;
use crate::slab::Key;
use crate::worker::context::Context;

impl Route {
    /// Cuts a part of what is on endpoints that have left, if that is due since a moment for which
    /// `is_meant` holds.
    pub(super) fn cut_overdue<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        is_meant: impl Fn(Instant) -> bool,
    ) {
        let Some(drain) = self.config.backend_drain else { return };
        let now = cx.now;
        let cut_on = |table: &Table, endpoint| {
            let since = table.get(endpoint)?.overdue_since(drain, now)?;
            is_meant(since).then(|| Cut::at(since, now))
        };
        // However many have left, sessions are walked through once.
        if self.pools.table.indices().any(|at| cut_on(&self.pools.table, at).is_some()) {
            self.cut_sessions(cx, &cut_on);
            self.cut_requests(cx, &cut_on);
        }
    }

    fn cut_sessions<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        cut_on: &impl Fn(&Table, EndpointId) -> Option<Cut>,
    ) {
        for slot in 0..self.sessions.slots() {
            if let Some(key) = self.sessions.key_at(slot)
                && let Some(endpoint) = self.sessions.of(key).endpoint()
                && let Some(cut) = cut_on(&self.pools.table, endpoint)
                && !self.move_unused(cx, key)
                && cut.takes(&mut cx.rng)
            {
                self.close_session(cx, key, CloseReason::EndpointRemoved);
            }
        }
    }

    /// Takes the connections from clients: at once where there is no request on them, else at their
    /// moments.
    fn cut_requests<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        cut_on: &impl Fn(&Table, EndpointId) -> Option<Cut>,
    ) {
        for slot in 0..self.requests.clients.slots() {
            if let Some(key) = self.requests.clients.key_at(slot)
                && let Some(endpoint) = self.endpoint_of(key)
                && let Some(cut) = cut_on(&self.pools.table, endpoint)
            {
                self.discard_kept(cx, key, Discard::Endpoint);
                if self.endpoint_of(key) == Some(endpoint) && cut.takes(&mut cx.rng) {
                    self.lose(cx, key, Discard::Endpoint, Retry::Removed);
                }
            }
        }
    }

    /// Has a session look for another endpoint that has not used the one that it has. Says whether it
    /// does.
    fn move_unused<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Session>) -> bool {
        let may_move = !self.pools.table.is_empty() || self.may_wait();
        let session = self.sessions.of(key);
        // Of one that is not open all is held that its client has sent, and its end.
        let is_unused = !session.is_open() || session.is_untouched() && !session.has_client_left();
        if !may_move || !is_unused {
            return false;
        }
        // Nothing has failed, so this is none of its attempts. Only a cancel request still passes those by
        // that have had it: there it could meet the next query.
        if session.cancel().is_none() {
            session.forget_tried();
        }
        if session.is_open() {
            // It costs no retry: the endpoint has seen nothing of it.
            return self.move_session(cx, key, Retry::Forgotten);
        }
        if let Some(backend) = session.conn(Side::Backend) {
            cx.timers.clear(backend.index());
            cx.owners.take(backend);
            cx.close(backend, Close::Reset);
        }
        self.leave_endpoint(cx, key);
        self.dispatch(cx, key, CloseReason::NoEndpoint);
        true
    }
}
