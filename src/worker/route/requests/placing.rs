//! From a request to a connection, and sending it. Where it goes is decided in `proxy::request`.

use std::net::IpAddr;

use super::Requests;
use crate::io::{ConnId, Driver};
use crate::metrics::{Checkout, CloseReason};
use crate::proxy::Side;
use crate::proxy::balance::Having;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::queue::Line;
use crate::proxy::request::{
    BackendConn, Binding, Client, NoBuffer, OpaqueParts, Placement, Placing, Unserved,
};
use crate::proxy::session::Session;
use crate::slab::Key;
use crate::worker::context::Context;
use crate::worker::owners::Owner;
use crate::worker::route::Route;

impl Route {
    /// What decides where requests go.
    pub(in crate::worker) fn placing<D>(&mut self, cx: &Context<D>) -> Placing<'_> {
        let Requests { queue, policy, .. } = &mut self.requests;
        Placing { table: &mut self.pools.table, queue, policy, now: cx.now }
    }

    /// Finds a connection for a client's request, or has it wait.
    pub(super) fn place<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Client>) {
        let is_bound = self.requests.policy.binding == Binding::Source;
        let source = if is_bound { self.source(cx, key) } else { None };
        loop {
            let Requests { clients, queue, policy, .. } = &mut self.requests;
            let Some(client) = clients.get_mut(key) else { unreachable!("it is being served") };
            let table = &mut self.pools.table;
            let mut placing = Placing { table, queue, policy, now: cx.now };
            match placing.place(client, source, &mut cx.rng) {
                Placement::Acquire(endpoint, spilled) => {
                    if let Some(backend) = self.acquire_proved(cx, endpoint) {
                        self.stats.count_checkout(Checkout::Hit);
                        spilled.inspect(|&why| self.stats.count_spillover(why));
                        return self.on_acquired(cx, key, backend);
                    }
                }
                Placement::Wait(line, supply) => {
                    self.wait(cx, key, line, supply);
                    if supply.is_none() && line == Line::Any {
                        // All that may serve it are full.
                        self.want_places(cx);
                    }
                    return;
                }
                Placement::Fail(error) => return self.fail(cx, key, error),
                Placement::Done => return self.reply_of_all(cx, key),
            }
        }
    }

    fn source<D: Driver>(&self, cx: &Context<D>, key: Key<Client>) -> Option<IpAddr> {
        let conn = self.conn_of(key)?;
        cx.driver.peer_address(conn).map(|address| address.ip())
    }

    /// A request joins a line.
    fn wait<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        line: Line,
        supply: Option<(EndpointId, Having)>,
    ) {
        self.requests.queue.join(line, key);
        self.tell(cx, key, Client::on_waiting);
        match supply {
            Some((endpoint, Having::Room)) => self.want(endpoint, 1),
            Some((endpoint, Having::Idle)) => self.free(endpoint),
            Some((_, Having::Anything | Having::Conn)) | None => {}
        }
    }

    pub(in crate::worker) fn want(&mut self, endpoint: EndpointId, count: usize) {
        let Some(entry) = self.pools.table.get_mut(endpoint) else { return };
        entry.pool.want(count);
        self.pools.mark_short(endpoint);
    }

    /// Requests that would rather go to an endpoint of which no connection can be had go on to
    /// another one.
    pub(super) fn pass_over<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) {
        while let Some(key) = self.placing(cx).pass_over(endpoint) {
            self.tell(cx, key, |client, _| client.on_passed_over(endpoint));
        }
    }

    /// A connect to an endpoint failed: requests that only it can answer need not wait longer.
    pub(in crate::worker) fn on_endpoint_missed<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
    ) {
        while let Some(unserved) = self.placing(cx).miss(endpoint) {
            match unserved {
                Unserved::PassedOver(key) => {
                    self.tell(cx, key, |client, _| client.on_passed_over(endpoint));
                }
                Unserved::Failed(key, error) => self.fail(cx, key, error),
            }
        }
    }

    /// Takes note that an endpoint may have idle connections for those that wait.
    pub(in crate::worker) fn free(&mut self, endpoint: EndpointId) {
        if !self.requests.queue.is_empty() {
            self.pools.free(endpoint);
        }
    }

    /// Serves those that wait with what has become idle.
    pub(super) fn serve_freed<D: Driver>(&mut self, cx: &mut Context<D>) {
        while let Some(endpoint) = self.pools.freed.pop() {
            while self.placing(cx).is_waited_for(endpoint) {
                self.prove_latest(cx, endpoint);
                let Some(key) = self.placing(cx).serve(endpoint) else { break };
                let Some(backend) = self.pools.table.acquire(endpoint) else {
                    unreachable!("it has just been proved")
                };
                self.stats.count_checkout(Checkout::Miss);
                self.on_acquired(cx, key, backend);
            }
        }
    }

    /// Acquires an idle connection of an endpoint, if it has one that is proved to be open and silent.
    fn acquire_proved<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
    ) -> Option<BackendConn> {
        self.prove_latest(cx, endpoint);
        self.pools.table.acquire(endpoint)
    }

    /// A client has got a connection.
    fn on_acquired<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        backend: BackendConn,
    ) {
        cx.owners.set(backend.conn, Owner::InUse(key));
        self.tell(cx, key, |client, moment| client.on_acquired(backend, moment));
    }

    /// Sends a client's request, or more of it, to its backend.
    pub(super) fn send_request<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        conn: ConnId,
    ) {
        let Some(client) = self.requests.clients.get_mut(key) else {
            unreachable!("its request has just got a connection, or more of it has come")
        };
        while client.has_outgoing() {
            match client.take_outgoing(cx.driver.buffers()) {
                Ok(buf) => cx.send(conn, buf),
                Err(NoBuffer) => return self.close_client(cx, key, CloseReason::Overload),
            }
        }
    }

    /// A client and the connection that it holds become a session of opaque bytes. It keeps the
    /// connection's place in its pool until it ends.
    pub(super) fn turn_opaque<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Client>) {
        let Some(client) = self.requests.clients.remove(key) else {
            unreachable!("its bytes have just become opaque")
        };
        let parts = client.into_opaque_parts(cx.driver.buffers());
        let OpaqueParts { client, mut input, backend, .. } = parts;
        self.pools.table.unanswered(backend.endpoint, backend.conn, cx.now);
        self.pools.table.turned_opaque(backend.endpoint);
        cx.timers.clear(client.index());
        let mut session = Session::new(client, cx.now).after(parts.opened, parts.bytes);
        session.on_trying(backend.endpoint, Some(backend.conn), cx.now);
        session.on_connected(backend.conn, parts.backend_unsent, cx.now);
        // What cannot be understood may be what the backend ends it for.
        session.vouch();
        // What it has become it became there: no other connection would do.
        session.on_greeted();
        session.on_received(Side::Backend, parts.unsent, u32::MAX, cx.now);
        let session = self.sessions.insert(session);
        cx.owners.set(client, Owner::Session(session, Side::Client));
        cx.owners.set(backend.conn, Owner::Session(session, Side::Backend));
        self.sessions.arm_deadline(cx, session);
        if !input.is_empty() {
            self.pools.table.asked(backend.endpoint, backend.conn, cx.now);
        }
        cx.driver.receive(client, true);
        cx.driver.receive(backend.conn, true);
        while let Some(buf) = cx.driver.buffers().pop(&mut input) {
            // It was counted when it came.
            self.sessions.pass_on(cx, session, Side::Client, buf);
        }
        cx.join(client, backend.conn);
        if parts.backend_broken {
            // The driver has reported it, and does so once.
            self.apply_event(cx, session, |session, now| {
                session.on_send_failed(Side::Backend, now)
            });
        }
        if parts.ended {
            self.on_ended(cx, session, Side::Client);
        }
    }
}
