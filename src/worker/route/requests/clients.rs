//! The clients: what they send, what they take, and when they are done with.

use std::time::Instant;

use crate::io::{Buf, Close, ConnId, Driver};
use crate::metrics::{CloseReason, Direction, Discard, Retry};
use crate::proxy::Side;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::request::{Client, ClientEnding, ErrorReply, Framing};
use crate::slab::Key;
use crate::worker::context::Context;
use crate::worker::flush;
use crate::worker::owners::Owner;
use crate::worker::route::Route;

impl Route {
    pub(in crate::worker) fn begin_client<D: Driver>(&mut self, cx: &mut Context<D>, conn: ConnId) {
        let framing = Framing::new(self.config.protocol, &self.config.requests);
        let client = Client::new(conn, framing, cx.now);
        let Ok(key) = self.requests.clients.insert(client) else {
            unreachable!("there are as many slots as places")
        };
        cx.owners.insert(conn, self.id, Owner::Client(key));
        self.mark_due(key);
    }

    pub(in crate::worker) fn on_client_received<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        buf: Buf,
    ) {
        self.stats.bytes.of(Direction::ToBackend).add(u64::from(buf.len()));
        let client = self.requests.named(key);
        cx.load.batcher.on_active(client.window());
        if client.on_received(buf, cx.driver.buffers(), cx.now) {
            self.requests.due.push_back(key);
        }
    }

    pub(in crate::worker) fn on_client_sent<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        bytes: u32,
    ) {
        self.tell(cx, key, |client, moment| client.on_sent(bytes, moment));
    }

    pub(in crate::worker) fn on_client_ended<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
    ) {
        if self.requests.named(key).on_ended(cx.now) {
            self.requests.due.push_back(key);
        }
    }

    /// Receiving from a client or its backend failed, or sending to the client.
    pub(in crate::worker) fn on_client_broken<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        side: Side,
    ) {
        match side {
            Side::Client => self.close_client(cx, key, CloseReason::ClientReset),
            Side::Backend => self.on_backend_died(cx, key, Retry::Broken),
        }
    }

    pub(in crate::worker) fn on_client_deadline<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
    ) {
        let backend = self.requests.clients.get(key).and_then(Client::backend);
        let endpoint = backend.map(|backend| backend.endpoint);
        let others_wait = endpoint.is_some_and(|at| self.placing(cx).is_waited_for(at));
        self.tell(cx, key, |client, moment| client.on_deadline(others_wait, moment));
    }

    /// A request has waited for as long as it may. While no endpoint can be connected to that would serve
    /// it, it may wait on.
    pub(super) fn on_waited<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        error: ErrorReply,
    ) {
        let in_outage = self.placing(cx).lacks_endpoint(key, error);
        if in_outage
            && let Some((client, moment)) = self.client(cx, key)
            && let Some(actions) = client.on_outage(&moment)
        {
            return self.act_for(cx, key, &actions);
        }
        let error = self.placing(cx).why_it_waited(key, error);
        self.fail(cx, key, error);
    }

    /// The worker drains: clients with nothing under way are to leave.
    pub(in crate::worker) fn look_after_all_clients(&mut self) {
        for slot in 0..self.requests.clients.slots() {
            if let Some(key) = self.requests.clients.key_at(slot) {
                self.mark_due(key);
            }
        }
    }

    pub(super) fn look_before_leaving<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Client>) {
        let Some(conn) = self.conn_of(key) else { return };
        let unheard = cx.driver.unheard(conn);
        let undelivered = cx.driver.undelivered(conn);
        self.tell(cx, key, |client, moment| client.on_looked(unheard, undelivered, moment.now));
    }

    pub(super) fn shut_down<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Client>) {
        let Some(conn) = self.conn_of(key) else { return };
        cx.shutdown(conn);
    }

    pub(super) fn arm_client<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        at: Instant,
    ) {
        let Some(conn) = self.conn_of(key) else { return };
        cx.timers.set(conn.index(), at);
    }

    /// A client's connection; none if it was closed for want of a buffer, in the middle of actions.
    pub(super) fn conn_of(&self, key: Key<Client>) -> Option<ConnId> {
        self.requests.clients.get(key)?.conn(Side::Client)
    }

    pub(in crate::worker) fn close_client<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        reason: CloseReason,
    ) {
        self.tell_of_client(cx, key, reason);
        let Some((client, moment)) = self.client(cx, key) else { return };
        let (ending, actions) = client.on_closing(reason, moment.buffers, moment.now);
        self.act_for(cx, key, &actions);
        self.release_backend_of(cx, key);
        let Some(client) = self.requests.clients.remove(key) else {
            unreachable!("nothing else has closed it")
        };
        let Some(conn) = client.conn(Side::Client) else { unreachable!("it is one") };
        cx.timers.clear(conn.index());
        cx.owners.take(conn);
        match ending {
            ClientEnding::Now(how) => cx.close(conn, how),
            ClientEnding::EndOrResetBehind if cx.driver.undelivered(conn) == 0 => {
                cx.close(conn, Close::Graceful);
            }
            ClientEnding::ResetBehind | ClientEnding::EndOrResetBehind => {
                flush::reset_behind(cx, conn);
            }
        }
        self.on_gone(cx, reason, client.age(cx.now));
        tracing::trace!(reason = ?reason, "client closed");
    }

    pub(in crate::worker) fn close_all_clients<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        reason: CloseReason,
    ) {
        for slot in 0..self.requests.clients.slots() {
            if let Some(key) = self.requests.clients.key_at(slot) {
                self.close_client(cx, key, reason);
            }
        }
    }

    /// Takes the connections of an endpoint from the clients that have no request on them.
    pub(in crate::worker) fn discard_idle_in_use_of<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        why: Discard,
    ) {
        for slot in 0..self.requests.clients.slots() {
            if let Some(key) = self.requests.clients.key_at(slot)
                && self.endpoint_of(key) == Some(endpoint)
            {
                self.discard_kept(cx, key, why);
            }
        }
    }

    /// Takes a client's connection, if there is no request on it.
    pub(in crate::worker) fn discard_kept<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        why: Discard,
    ) {
        self.tell(cx, key, |client, _| client.discard_kept(why));
    }

    /// The endpoint of the connection that a client holds.
    pub(in crate::worker) fn endpoint_of(&self, key: Key<Client>) -> Option<EndpointId> {
        self.requests.clients.get(key).and_then(Client::backend).map(|backend| backend.endpoint)
    }

    /// The endpoints have changed: whoever waits may have another one to go to.
    pub(in crate::worker) fn place_waiting_again<D: Driver>(&mut self, cx: &mut Context<D>) {
        for key in self.requests.queue.serve_all() {
            self.tell(cx, key, |client, _| client.on_placed_again());
        }
    }

    /// Has connections made for those that wait, where the last attempt may have come to nothing.
    pub(in crate::worker) fn look_after_queue<D: Driver>(&mut self, cx: &mut Context<D>) {
        if self.requests.queue.is_empty() {
            return;
        }
        for endpoint in self.pools.table.indices() {
            self.pass_over(cx, endpoint);
            if let Some(missing) = self.placing(cx).missing(endpoint) {
                self.want(endpoint, missing);
                self.free(endpoint);
            }
        }
    }
}
