//! Cuts what is on an endpoint that has left, once its time is over.
//!
//! | what | when |
//! | --- | --- |
//! | a session that is still being connected, or on which nothing has moved | moves at once, its client sees nothing of it |
//! | an idle connection, in the pool or in the hands of a client without a request | is closed at once |
//! | a session, a request in flight | is cut at a moment of its own within [`crate::limits::CUT_TIME`] |

use super::Route;
use crate::io::{Close, Driver};
use crate::metrics::{CloseReason, Retry};
use crate::proxy::Side;
use crate::proxy::cut::Cut;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::session::Session;
use crate::slab::Key;
use crate::worker::context::Context;

impl Route {
    /// Cuts a part of what is on an endpoint, if that is due.
    pub(super) fn cut_overdue<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) {
        let Some(entry) = self.pools.table.get(endpoint) else { return };
        let drain = self.config.backend_drain;
        let Some(since) = drain.and_then(|drain| entry.overdue_since(drain, cx.now)) else {
            return;
        };
        let cut = Cut::at(since, cx.now);
        self.cut_sessions_on(cx, endpoint, cut);
        self.reclaim_from(cx, endpoint, cut);
    }

    fn cut_sessions_on<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId, cut: Cut) {
        for slot in 0..self.sessions.slots() {
            if let Some(key) = self.sessions.key_at(slot)
                && self.sessions.of(key).endpoint() == Some(endpoint)
                && !self.move_unused(cx, key)
                && cut.takes(&mut cx.rng)
            {
                self.close_session(cx, key, CloseReason::EndpointRemoved);
            }
        }
    }

    /// Has a session look for another endpoint that has not used the one that it has. Says whether it
    /// does.
    fn move_unused<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Session>) -> bool {
        let may_move = !self.pools.table.is_empty() || self.may_wait();
        let session = self.sessions.of(key);
        if session.has_client_left() || !may_move {
            return false;
        }
        if session.is_open() {
            // It costs no retry: the endpoint has seen nothing of it.
            return session.is_untouched() && {
                session.forget_tried();
                self.move_session(cx, key, Retry::Forgotten)
            };
        }
        session.forget_tried();
        if let Some(backend) = session.conn(Side::Backend) {
            cx.timers.clear(backend.index());
            cx.owners.take(backend);
            cx.driver.close(backend, Close::Reset);
        }
        self.leave_endpoint(cx, key);
        self.dispatch(cx, key, CloseReason::NoEndpoint);
        true
    }
}
