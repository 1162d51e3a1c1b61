//! The connections in clients' hands: released, discarded, lost.

use crate::io::{Chain, Close, ConnId, Driver};
use crate::metrics::{Discard, Retry};
use crate::proxy::endpoints::EndpointId;
use crate::proxy::request::{BackendConn, Client, DiscardHow, Fate};
use crate::slab::Key;
use crate::worker::context::Context;
use crate::worker::owners::Owner;
use crate::worker::route::Route;

impl Route {
    /// The backend that a client holds took bytes of its request.
    pub(in crate::worker) fn on_backend_sent<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        bytes: u32,
    ) {
        self.tell(cx, key, |client, moment| client.on_backend_sent(bytes, moment.now));
    }

    /// Nothing more can be sent on a connection that a client holds.
    pub(in crate::worker) fn on_backend_broken<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
    ) {
        self.tell(cx, key, |client, _| client.on_backend_send_failed());
    }

    /// A connection that a client holds ended or broke.
    pub(in crate::worker) fn on_backend_died<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        why: Retry,
    ) {
        let client = self.requests.clients.get(key);
        let why = if client.is_some_and(Client::is_backend_broken) { Retry::Broken } else { why };
        let why = self.judge_lost(cx, key, why);
        self.tell(cx, key, |client, moment| client.on_backend_ended(why, moment));
    }

    /// A client loses the connection that it holds.
    pub(in crate::worker) fn lose<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        discard: Discard,
        why: Retry,
    ) {
        self.tell(cx, key, |client, moment| client.on_backend_lost(discard, why, moment));
    }

    /// A client goes on with its connection, unless that was made to an endpoint that is gone.
    pub(super) fn keep(&mut self, key: Key<Client>, endpoint: EndpointId) {
        if self.pools.table.get_mut(endpoint).is_some_and(|entry| entry.is_gone()) {
            self.requests.releasing.push(key);
        }
    }

    /// Releases the connections of clients that are done with them.
    pub(super) fn release_backends<D: Driver>(&mut self, cx: &mut Context<D>) {
        while let Some(key) = self.requests.releasing.pop() {
            self.release_backend_of(cx, key);
        }
    }

    /// Releases the connection of a client that is done with it.
    pub(super) fn release_backend_of<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Client>) {
        // One that was closed since has released it.
        match self.requests.clients.get_mut(key).and_then(Client::release) {
            Some(Fate::Released { conn, paused, asked }) => {
                self.release_backend(cx, &conn, paused, asked);
            }
            Some(Fate::Discarded(action)) => self.perform(cx, key, action),
            None => {}
        }
    }

    /// A connection goes back to its pool, silent as it is.
    fn release_backend<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        backend: &BackendConn,
        paused: bool,
        asked: bool,
    ) {
        if asked {
            cx.driver.ask(backend.conn, &self.pools.options, None);
        }
        if paused {
            cx.driver.receive(backend.conn, true);
        }
        // Whether there is room for it is seen once those that wait have had theirs.
        let entry = self.pools.table.get(backend.endpoint);
        let useful = self.keeps_pools(cx) && !entry.is_some_and(|entry| entry.must_yield(cx.now));
        if self.pools.table.release(backend, useful, cx.now) {
            let greeting = Chain::default();
            cx.owners.set(backend.conn, Owner::Idle { endpoint: backend.endpoint, greeting });
            self.free(backend.endpoint);
            self.pools.on_idle(backend.endpoint, cx.now);
        } else {
            let aged = backend.retire_at.is_some_and(|at| at <= cx.now);
            let why = if aged { Discard::Lifetime } else { Discard::Surplus };
            // The backend may have answered before it has read all of the request.
            let how = match cx.driver.undelivered(backend.conn) {
                0 => Close::Reset,
                _ => Close::Graceful,
            };
            self.retire(cx, backend.conn, backend.endpoint, why, how);
        }
    }

    /// A connection is of no more use.
    pub(super) fn discard_backend<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        conn: ConnId,
        endpoint: EndpointId,
        why: Discard,
        how: DiscardHow,
    ) {
        let how = match how {
            DiscardHow::Now(how) => how,
            DiscardHow::ResetUnlessUnsent if cx.driver.unsent(conn) > 0 => Close::Graceful,
            DiscardHow::ResetUnlessUnsent => Close::Reset,
        };
        self.pools.table.unanswered(endpoint, conn, cx.now);
        self.pools.table.discarded(endpoint);
        self.retire(cx, conn, endpoint, why, how);
    }

    /// Closes a connection that was in use.
    fn retire<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        conn: ConnId,
        endpoint: EndpointId,
        why: Discard,
        how: Close,
    ) {
        cx.owners.take(conn);
        self.stats.count_discard(why);
        cx.close(conn, how);
        self.pools.on_closing(endpoint, Some(conn));
        self.on_place_in_pool_free(endpoint);
    }

    /// A connection that was in use was closed: another one may be made in its place. Those that wait
    /// may have counted on it.
    pub(in crate::worker) fn on_place_in_pool_free(&mut self, endpoint: EndpointId) {
        if !self.requests.queue.is_empty() {
            self.want(endpoint, 1);
        }
        self.pools.mark_short(endpoint);
        self.pools.table.forget_unused();
    }
}
