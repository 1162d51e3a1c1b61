//! The connections in clients' hands: given back, dropped, lost.

use crate::io::{Close, ConnId, Driver};
use crate::metrics::{Discard, Outcome, Retry};
use crate::proxy::endpoints::EndpointId;
use crate::proxy::request::{Client, ErrorReply, Lost};
use crate::slab::Key;
use crate::worker::engine::{Engine, Owner};

impl<D: Driver> Engine<D> {
    /// Nothing more can be sent on a connection that a client holds.
    pub(in crate::worker) fn on_backend_broken(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        if client.on_backend_broken() {
            // Read on: what the backend sent before is the client's, up to the end that will come.
            return self.mark_due(key);
        }
        self.on_backend_died(key, Retry::Broken);
    }

    /// A connection that a client holds ended or broke.
    pub(in crate::worker) fn on_backend_died(&mut self, key: Key<Client>, why: Retry) {
        let Some(client) = self.requests.clients.get(key) else { return };
        let spent = client.framing().ends_with_connection() && !client.is_broken();
        let why = if client.is_broken() { Retry::Broken } else { why };
        let discard = if spent { Discard::Spent } else { Discard::Dead };
        self.judge_lost(key, why);
        self.lose(key, discard, why);
    }

    pub(in crate::worker) fn lose(&mut self, key: Key<Client>, discard: Discard, why: Retry) {
        self.discard_backend(key, discard);
        let attempts = self.cx.config.connect_attempts;
        let in_order = why == Retry::Ended && discard != Discard::Endpoint;
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        match client.on_lost(in_order, attempts, self.cx.now) {
            Lost::Idle => {}
            Lost::Answered | Lost::Rest => self.end_exchange(key),
            Lost::Repeat => {
                self.cx.stats.count_retry(why);
                self.mark_due(key);
            }
            Lost::Fail => self.give_up(key, ErrorReply::Lost),
            Lost::CutOff => self.cut_off(key, Outcome::Lost),
        }
    }

    /// A client gives its connection back, silent as it is.
    pub(in crate::worker) fn release_backend(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        if client.unasked() > 0 {
            // Answered before it was asked.
            return self.discard_backend(key, Discard::Unexpected);
        }
        let Some(backend) = client.backend.take() else { return };
        if client.backend_pulse.take_asked() {
            self.cx.driver.ask(backend.conn, None);
        }
        if !client.backend_receiving {
            self.cx.driver.receive(backend.conn, true);
        }
        // Whether there is room for it is seen once those that wait have had theirs.
        let useful = self.keeps_pools();
        if self.pools.table.release(&backend, useful, self.cx.now) {
            let greeting = crate::io::Chain::default();
            self.own(backend.conn, Owner::Warm { endpoint: backend.endpoint, greeting });
            self.free(backend.endpoint);
        } else {
            let aged = backend.retire_at.is_some_and(|at| at <= self.cx.now);
            let why = if aged { Discard::Lifetime } else { Discard::Surplus };
            // The backend may have answered before it has read all of the request.
            let how = match self.cx.driver.undelivered(backend.conn) {
                0 => Close::Reset,
                _ => Close::Graceful,
            };
            self.retire(backend.conn, backend.endpoint, why, how);
        }
    }

    /// A client's connection is of no more use.
    pub(in crate::worker) fn discard_backend(&mut self, key: Key<Client>, why: Discard) {
        let backend = self.requests.clients.get(key).and_then(|client| client.backend);
        let how = match backend.filter(|backend| backend.unread) {
            // What it reads there still is the upload of somebody who has been answered.
            Some(backend) if self.cx.driver.unsent(backend.conn) > 0 => Close::Graceful,
            // So that a backend does not go on with what nobody waits for.
            _ => Close::Reset,
        };
        self.close_backend(key, why, how);
    }

    /// Closes a client's connection.
    pub(in crate::worker) fn close_backend(&mut self, key: Key<Client>, why: Discard, how: Close) {
        let backend = self.requests.clients.get_mut(key).and_then(|client| client.backend.take());
        let Some(backend) = backend else { return };
        self.pools.table.discarded(backend.endpoint);
        self.retire(backend.conn, backend.endpoint, why, how);
    }

    /// Closes a connection that was lent.
    fn retire(&mut self, conn: ConnId, endpoint: EndpointId, why: Discard, how: Close) {
        self.owner(conn);
        self.cx.stats.count_discard(why);
        self.cx.driver.close(conn, how);
        self.on_place_in_pool_free(endpoint);
    }

    /// A lent connection was closed: another one may be made in its place. Those that wait may have
    /// counted on it.
    pub(in crate::worker) fn on_place_in_pool_free(&mut self, endpoint: EndpointId) {
        if !self.requests.queue.is_empty() {
            self.want(endpoint, 1);
        }
        self.mark_short(endpoint);
        self.pools.table.forget_unused();
    }
}
