//! From a request to a connection: which endpoint, which line, and sending it.

use std::net::IpAddr;
use std::time::Duration;

use crate::config::{Balance, Locality};
use crate::io::{ConnId, Driver};
use crate::metrics::{Checkout, CloseReason, Outcome, Spillover};
use crate::proxy::Side;
use crate::proxy::balance::Having;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::queue::Line;
use crate::proxy::request::{Client, ErrorReply, NoBuffer, OpaqueParts, Target};
use crate::proxy::session::{Session, Tried};
use crate::slab::Key;
use crate::worker::context::Context;
use crate::worker::owners::Owner;
use crate::worker::route::Route;

/// Where a request has to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Destination {
    /// To whichever endpoint.
    Any,
    /// To this one only.
    Endpoint(EndpointId),
    /// To a store that is not there.
    Away,
    /// To no further store: all have had it.
    Done,
}

impl Route {
    /// Finds a connection for a client's request, or has it wait.
    pub(super) fn place<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Client>) {
        let destination = self.destination(cx, key);
        if destination == Destination::Any && self.pools.table.is_empty() {
            return self.await_an_endpoint(cx, key);
        }
        if let Some(client) = self.requests.clients.get_mut(key) {
            client.on_endpoints(cx.now);
        }
        match destination {
            Destination::Endpoint(endpoint) => self.place_at(cx, key, endpoint),
            Destination::Any => self.place_anywhere(cx, key),
            Destination::Done => self.reply_of_all(cx, key),
            // It has no other home, and may be away for long.
            Destination::Away if self.pools.table.is_empty() => {
                self.fail(cx, key, ErrorReply::NoneKnown);
            }
            Destination::Away => self.fail(cx, key, ErrorReply::Unreachable),
        }
    }

    /// Where a client's request has to go.
    fn destination<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Client>) -> Destination {
        let Some(client) = self.requests.clients.get(key) else {
            unreachable!("it is being served")
        };
        if self.config.balance == Balance::KeyHash {
            let table = &self.pools.table;
            let store = match client.target() {
                Target::Any => return Destination::Any,
                Target::Store(number) if number > 0 && table.store(number).is_none() => {
                    return Destination::Done;
                }
                Target::Store(number) => table.store(number),
                Target::Key(hash) => table.owner(hash).and_then(|number| table.store(number)),
            };
            let endpoint = store.and_then(|store| store.endpoint);
            return endpoint.map_or(Destination::Away, Destination::Endpoint);
        }
        if self.is_bound_to_source() {
            let (tried, source) = (client.tried(), self.source(cx, key));
            // The same one as long as it can be reached.
            let chosen = self.pools.table.choose_for_source(&tried, source, cx.now);
            return chosen.map_or(Destination::Any, Destination::Endpoint);
        }
        Destination::Any
    }

    /// Whether a client's requests go to one endpoint as long as that can be reached.
    pub(in crate::worker) fn is_bound_to_source(&self) -> bool {
        self.config.balance == Balance::SourceHash
    }

    /// There is no endpoint at all: the request waits for one.
    fn await_an_endpoint<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Client>) {
        let limits = &self.requests.policy.limits;
        let Some(client) = self.requests.clients.get_mut(key) else {
            unreachable!("it is being served")
        };
        if client.on_no_endpoint(limits, cx.now) <= cx.now {
            let error = ErrorReply::NoEndpoint(limits.endpoint);
            return self.fail(cx, key, error);
        }
        self.wait(cx, key, Line::Any, None);
    }

    pub(in crate::worker) fn source<D: Driver>(
        &self,
        cx: &Context<D>,
        key: Key<Client>,
    ) -> Option<IpAddr> {
        let conn = self.conn_of(key)?;
        cx.driver.peer_address(conn).and_then(|address| address.ip())
    }

    pub(in crate::worker) fn place_at<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        endpoint: EndpointId,
    ) {
        let line = Line::Endpoint(endpoint);
        let nobody_waits = self.requests.queue.waiting(line) == 0;
        // An endpoint may have left the set since a request to all of them began.
        let entry = self.pools.table.get_mut(endpoint).filter(|entry| entry.is_present());
        let Some(entry) = entry else { return self.fail(cx, key, ErrorReply::Unreachable) };
        if !entry.health.is_usable() && entry.pool.idle() == 0 && entry.pool.backs_off(cx.now) {
            // It has just been tried, and another store would give a wrong answer.
            return self.fail(cx, key, ErrorReply::Unreachable);
        }
        if nobody_waits {
            self.prove_latest(cx, endpoint);
            let idle = self.pools.table.get_mut(endpoint).map_or(0, |entry| entry.pool.idle());
            if idle > 0 {
                self.stats.count_checkout(Checkout::Hit);
                return self.acquire(cx, key, endpoint);
            }
        }
        self.wait(cx, key, line, Some(endpoint));
    }

    pub(in crate::worker) fn place_anywhere<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
    ) {
        let tried = self.requests.clients.get(key).map(Client::tried).unwrap_or_default();
        let near = self.config.locality != Locality::Off;
        // A connection that broke says little about the next one to the same endpoint.
        let nobody_waits = self.requests.queue.waiting(Line::Any) == 0;
        // Each time an endpoint has no connection after all, there are fewer of them.
        let chosen = loop {
            let mut choose =
                |tried: &Tried| self.pools.table.choose_for_request(tried, None, near, &mut cx.rng);
            let chosen = choose(&tried).or_else(|| choose(&Tried::default()));
            let Some((endpoint, Having::Idle)) = chosen.filter(|_| nobody_waits) else {
                break chosen;
            };
            self.prove_latest(cx, endpoint);
            if self.pools.table.get_mut(endpoint).is_some_and(|entry| entry.pool.idle() > 0) {
                break chosen;
            }
        };
        match chosen {
            Some((endpoint, Having::Idle)) if nobody_waits => {
                self.stats.count_checkout(Checkout::Hit);
                let far = self.pools.table.get_mut(endpoint).is_some_and(|e| !e.endpoint.is_near());
                if near && far {
                    self.stats.count_spillover(Spillover::Few);
                }
                self.acquire(cx, key, endpoint);
            }
            Some((endpoint, having)) => {
                self.wait(cx, key, Line::Any, (having == Having::Room).then_some(endpoint));
                if having == Having::Idle {
                    self.free(endpoint);
                }
            }
            None => self.wait(cx, key, Line::Any, None),
        }
    }

    /// A request joins a line; `endpoint` is asked for one connection more.
    pub(in crate::worker) fn wait<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        line: Line,
        endpoint: Option<EndpointId>,
    ) {
        if self.requests.queue.is_full() {
            let nowhere = self.pools.table.is_empty();
            return self.fail(
                cx,
                key,
                if nowhere { ErrorReply::NoneKnown } else { ErrorReply::QueueFull },
            );
        }
        let Some(client) = self.requests.clients.get_mut(key) else {
            unreachable!("it is being served")
        };
        client.on_waiting();
        self.requests.queue.join(line, key);
        if let Some(endpoint) = endpoint {
            self.want(endpoint, 1);
        }
    }

    pub(in crate::worker) fn want(&mut self, endpoint: EndpointId, count: usize) {
        let Some(entry) = self.pools.table.get_mut(endpoint) else { return };
        entry.pool.want(count);
        self.pools.mark_short(endpoint);
    }

    /// Whether requests wait for an endpoint that has no alternative, be it ejected or not.
    pub(in crate::worker) fn is_needed(&self, endpoint: EndpointId) -> bool {
        self.requests.queue.waiting(Line::Endpoint(endpoint)) > 0
            || (self.requests.queue.waiting(Line::Any) > 0 && !self.pools.table.any_usable())
    }

    /// Requests that would rather go to an endpoint of which no connection can be had go on to
    /// another one.
    pub(in crate::worker) fn pass_over<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
    ) {
        if !self.is_bound_to_source() {
            return;
        }
        let usable = self.pools.table.get_mut(endpoint).is_some_and(|e| e.health.is_usable());
        let backs_off =
            self.pools.table.get_mut(endpoint).is_some_and(|e| e.pool.backs_off(cx.now));
        if (usable && !backs_off) || self.pools.table.is_connected(Some(endpoint)) {
            return;
        }
        while let Some(key) = self.requests.queue.serve(Line::Endpoint(endpoint)) {
            self.tell(cx, key, |client, _| client.on_passed_over(endpoint));
        }
    }

    /// A connect to an endpoint failed: requests that only it can answer need not wait longer.
    pub(in crate::worker) fn on_endpoint_missed<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
    ) {
        if self.is_bound_to_source() {
            return self.pass_over(cx, endpoint);
        }
        let usable = self.pools.table.get_mut(endpoint).is_some_and(|e| e.health.is_usable());
        while !usable && let Some(key) = self.requests.queue.serve(Line::Endpoint(endpoint)) {
            self.fail(cx, key, ErrorReply::Unreachable);
        }
    }

    /// Takes note that an endpoint may have idle connections for those that wait.
    pub(in crate::worker) fn free(&mut self, endpoint: EndpointId) {
        if !self.requests.queue.is_empty() {
            self.pools.free(endpoint);
        }
    }

    pub(in crate::worker) fn serve_freed<D: Driver>(&mut self, cx: &mut Context<D>) {
        while let Some(endpoint) = self.pools.freed.pop() {
            let own = Line::Endpoint(endpoint);
            while self.requests.queue.waiting(own) + self.requests.queue.waiting(Line::Any) > 0 {
                self.prove_latest(cx, endpoint);
                let present = self.pools.table.get_mut(endpoint).filter(|entry| entry.is_present());
                if present.is_none_or(|entry| entry.pool.idle() == 0) {
                    break;
                }
                let Some(key) = self.requests.queue.serve_either(own, Line::Any) else { break };
                self.stats.count_checkout(Checkout::Miss);
                self.acquire(cx, key, endpoint);
            }
        }
    }

    /// Gives a client an idle connection of an endpoint, which has one that is proved to be open and
    /// silent.
    pub(in crate::worker) fn acquire<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        endpoint: EndpointId,
    ) {
        let Some(backend) = self.pools.table.acquire(endpoint) else {
            unreachable!("it has just been proved")
        };
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
        while let Some((client, moment)) = self.client(cx, key) {
            match client.take_outgoing(moment.buffers) {
                Ok(Some(buf)) => cx.driver.send(conn, buf),
                Ok(None) => return,
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
        if let Some(verb) = parts.uncounted {
            self.stats.count_request(verb, Outcome::Opaque, Duration::ZERO);
        }
        self.pools.table.turned_opaque(backend.endpoint);
        cx.timers.clear(client.index());
        let mut session = Session::new(client, cx.now);
        session.on_trying(backend.endpoint, Some(backend.conn));
        session.on_connected(backend.conn, parts.backend_unsent, cx.now);
        // What cannot be understood may be what the backend ends it for.
        session.vouch();
        session.on_received(Side::Backend, parts.unsent, u32::MAX, cx.now);
        let session = self.sessions.insert(session);
        cx.owners.set(client, Owner::Session(session, Side::Client));
        cx.owners.set(backend.conn, Owner::Session(session, Side::Backend));
        self.sessions.arm_deadline(cx, session);
        cx.driver.receive(client, true);
        cx.driver.receive(backend.conn, true);
        while let Some(buf) = cx.driver.buffers().pop(&mut input) {
            // It was counted when it came.
            self.sessions.pass_on(cx, session, Side::Client, buf);
        }
        cx.driver.join(client, backend.conn);
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
