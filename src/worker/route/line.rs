//! Sessions that wait for a place at an endpoint, where `AEGIS_ENDPOINT_MAX` limits connections:
//! first come, first served, within the limits of the queue of requests.

use std::time::{Duration, Instant};

use super::Route;
use crate::config::{PoolMode, RouteConfig};
use crate::io::{Driver, Unheard};
use crate::metrics::CloseReason;
use crate::proxy::queue::{self, Queue};
use crate::proxy::session::Session;
use crate::slab::Key;
use crate::worker::context::Context;

/// The sessions that wait.
#[derive(Debug)]
pub(super) struct Line {
    queue: Queue<Session>,
    /// Since when who is in a slot has waited, should it be in the line.
    since: Vec<Instant>,
    timeout: Duration,
}

impl Line {
    /// Nobody, of as many as there are places for sessions.
    pub(super) fn new(config: &RouteConfig, places: usize) -> Self {
        let is_used =
            config.pool.mode == PoolMode::Preconnect && config.pool.endpoint_max.is_some();
        let slots = if is_used { places } else { 0 };
        let queue = Queue::new(config.requests.queue_max, slots);
        let timeout = config.requests.queue_timeout;
        Self { queue, since: Vec::with_capacity(slots), timeout }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether a session is in it.
    pub(super) fn has(&self, key: Key<Session>) -> bool {
        self.queue.line_of(key).is_some()
    }

    /// A session is not to wait any more, if it did.
    pub(super) fn leave(&mut self, key: Key<Session>) {
        self.queue.leave(key);
    }

    fn join(&mut self, key: Key<Session>, since: Instant) {
        if self.since.len() <= key.index() {
            self.since.resize(key.index() + 1, since);
        }
        self.since[key.index()] = since;
        self.queue.join(queue::Line::Any, key);
    }

    /// When the session's time is up.
    fn ends_at(&self, key: Key<Session>) -> Instant {
        self.since[key.index()] + self.timeout
    }
}

impl Route {
    /// All endpoints that a session may go to are full: it waits, behind those that came before.
    pub(super) fn join_line<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        since: Instant,
    ) {
        if self.line.queue.is_full() {
            return self.close_session(cx, key, CloseReason::QueueFull);
        }
        self.line.join(key, since);
        let session = self.sessions.of(key);
        session.await_place(true);
        let client = session.client();
        cx.timers.set(client.index(), self.line.ends_at(key));
        self.want_places(cx);
    }

    /// The timer of a session in the line has fired, perhaps for a moment too early.
    pub(super) fn on_line_deadline<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Session>) {
        let at = self.line.ends_at(key);
        if cx.now >= at {
            return self.close_session(cx, key, CloseReason::QueueTimeout);
        }
        let client = self.sessions.of(key).client();
        cx.timers.set(client.index(), at);
    }

    /// Gives those that have waited longest the places that there are now.
    pub(super) fn serve_line<D: Driver>(&mut self, cx: &mut Context<D>) {
        // Who finds none after all goes to the end, and is not looked at again in this turn.
        for _ in 0..self.line.len() {
            if !self.pools.table.has_room() {
                break;
            }
            let Some(key) = self.line.queue.serve(queue::Line::Any) else { return };
            let session = self.sessions.of(key);
            let (client, since) = (session.client(), self.line.since[key.index()]);
            if !session.has_early() && cx.driver.unheard(client) == Unheard::End {
                // If there are bytes before its end, they are heard first.
                self.line.join(key, since);
                continue;
            }
            session.await_place(false);
            cx.timers.clear(client.index());
            self.dispatch_since(cx, key, CloseReason::NoEndpoint, since);
        }
        if !self.line.is_empty() {
            self.want_places(cx);
        }
    }
}
