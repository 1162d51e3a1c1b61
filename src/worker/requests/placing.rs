//! From a request to a connection: which endpoint, which line, and sending it.

use crate::proxy::endpoints::EndpointId;
use std::net::IpAddr;
use std::time::Duration;

use crate::config::{Balance, Locality, Route};
use crate::io::Driver;
use crate::limits;
use crate::metrics::{Checkout, CloseReason, Discard, Outcome, Spillover};
use crate::proxy::Side;
use crate::proxy::balance::{Having, Store};
use crate::proxy::queue::Line;
use crate::proxy::request::{Broadcast, Client, ErrorReply, Request, Upload};
use crate::proxy::session::{Session, Tried};
use crate::slab::Key;
use crate::worker::engine::{Engine, Owner};
use crate::worker::pools::why_not_acquired;

/// Where a request has to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::worker) enum Destination {
    /// To whichever endpoint.
    Any,
    /// To this one only.
    Endpoint(EndpointId),
    /// To a store that is not there.
    Away,
}

impl<D: Driver> Engine<D> {
    /// Sends a client's request, or has it wait.
    pub(in crate::worker) fn place(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get(key) else { return };
        let Some(request) = client.request() else { return };
        if client.backend.is_some() {
            match self.why_not_used(key) {
                None => return self.use_backend(key),
                Some(why) => self.discard_backend(key, why),
            }
        }
        let destination = self.destination(key, &request);
        if destination == Destination::Any && self.pools.table.is_empty() {
            return self.await_an_endpoint(key);
        }
        if let Some(client) = self.requests.clients.get_mut(key) {
            client.on_endpoints(self.cx.now);
        }
        match destination {
            Destination::Endpoint(endpoint) => self.place_at(key, endpoint),
            Destination::Any => self.place_anywhere(key),
            // It has no other home, and may be away for long.
            Destination::Away if self.pools.table.is_empty() => {
                self.give_up(key, ErrorReply::NoneKnown);
            }
            Destination::Away => self.give_up(key, ErrorReply::Unreachable),
        }
    }

    /// Why a client must not ask again on the connection that it holds, if it must not.
    fn why_not_used(&mut self, key: Key<Client>) -> Option<Discard> {
        let client = self.requests.clients.get(key)?;
        let backend = client.backend?;
        // Answered before it was asked.
        let early = client.unasked() > 0;
        why_not_acquired(self.cx.driver.unheard(backend.conn))
            .or(early.then_some(Discard::Unexpected))
    }

    /// Where a request has to go.
    pub(in crate::worker) fn destination(
        &mut self,
        key: Key<Client>,
        request: &Request,
    ) -> Destination {
        if self.cx.config.requests.route == Route::Key {
            let Some(store) = self.store_for(key, request) else { return Destination::Any };
            let endpoint = self.pools.table.store(store).and_then(|store| store.endpoint);
            return endpoint.map_or(Destination::Away, Destination::Endpoint);
        }
        if self.is_bound_to_source()
            && let Some(tried) = self.requests.clients.get(key).map(Client::tried)
        {
            let source = self.source(key);
            // The same one as long as it can be reached.
            let chosen = self.pools.table.choose_for_source(&tried, source, self.cx.now);
            return chosen.map_or(Destination::Any, Destination::Endpoint);
        }
        Destination::Any
    }

    /// The number of the store that a request has to go to; of one to all stores, that of the store
    /// whose turn it is. One that does not exist where no store is declared.
    fn store_for(&mut self, key: Key<Client>, request: &Request) -> Option<u16> {
        if request.to_all {
            let protocol = self.cx.config.protocol;
            let client = self.requests.clients.get_mut(key)?;
            return Some(
                client.broadcast.get_or_insert_with(|| Box::new(Broadcast::new(protocol))).store,
            );
        }
        request.key.map(|hash| self.pools.table.owner(hash).unwrap_or(u16::MAX))
    }

    /// The store that a client's request is for.
    pub(in crate::worker) fn store_of(&self, key: Key<Client>) -> Option<&Store> {
        let client = self.requests.clients.get(key)?;
        let number = match &client.broadcast {
            Some(broadcast) => broadcast.store,
            None => self.pools.table.owner(client.request()?.key?)?,
        };
        self.pools.table.store(number)
    }

    /// Whether a client's requests go to one endpoint as long as that can be reached.
    pub(in crate::worker) fn is_bound_to_source(&self) -> bool {
        self.cx.config.requests.route != Route::Key && self.cx.config.balance == Balance::SourceHash
    }

    /// There is no endpoint at all: the request waits for one.
    fn await_an_endpoint(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        if client.on_no_endpoint(&self.requests.limits, self.cx.now) <= self.cx.now {
            return self.give_up(key, ErrorReply::NoEndpoint(self.requests.limits.endpoint));
        }
        self.wait(key, Line::Any, None);
    }

    pub(in crate::worker) fn source(&self, key: Key<Client>) -> Option<IpAddr> {
        let client = self.requests.clients.get(key)?;
        self.cx.driver.peer_address(client.conn).and_then(|address| address.ip())
    }

    pub(in crate::worker) fn place_at(&mut self, key: Key<Client>, endpoint: EndpointId) {
        let line = Line::Endpoint(endpoint);
        let nobody_waits = self.requests.queue.waiting(line) == 0;
        // An endpoint may have left the set since a request to all of them began.
        let entry = self.pools.table.get_mut(endpoint).filter(|entry| entry.is_present());
        let Some(entry) = entry else { return self.give_up(key, ErrorReply::Unreachable) };
        if !entry.health.is_usable() && entry.pool.idle() == 0 && entry.pool.backs_off(self.cx.now)
        {
            // It has just been tried, and another store would give a wrong answer.
            return self.give_up(key, ErrorReply::Unreachable);
        }
        if nobody_waits {
            self.prove_latest(endpoint);
            let idle = self.pools.table.get_mut(endpoint).map_or(0, |entry| entry.pool.idle());
            if idle > 0 {
                self.cx.stats.count_checkout(Checkout::Hit);
                return self.acquire(key, endpoint);
            }
        }
        self.wait(key, line, Some(endpoint));
    }

    pub(in crate::worker) fn place_anywhere(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get(key) else { return };
        let tried = client.tried();
        let near = self.cx.config.locality != Locality::Off;
        // A connection that broke says little about the next one to the same endpoint.
        let nobody_waits = self.requests.queue.waiting(Line::Any) == 0;
        // Each time an endpoint has no connection after all, there are fewer of them.
        let chosen = loop {
            let mut choose = |tried: &Tried| {
                self.pools.table.choose_for_request(tried, None, near, &mut self.cx.rng)
            };
            let chosen = choose(&tried).or_else(|| choose(&Tried::default()));
            let Some((endpoint, Having::Idle)) = chosen.filter(|_| nobody_waits) else {
                break chosen;
            };
            self.prove_latest(endpoint);
            if self.pools.table.get_mut(endpoint).is_some_and(|entry| entry.pool.idle() > 0) {
                break chosen;
            }
        };
        match chosen {
            Some((endpoint, Having::Idle)) if nobody_waits => {
                self.cx.stats.count_checkout(Checkout::Hit);
                let far = self.pools.table.get_mut(endpoint).is_some_and(|e| !e.endpoint.is_near());
                if near && far {
                    self.cx.stats.count_spillover(Spillover::Few);
                }
                self.acquire(key, endpoint);
            }
            Some((endpoint, having)) => {
                self.wait(key, Line::Any, (having == Having::Room).then_some(endpoint));
                if having == Having::Idle {
                    self.free(endpoint);
                }
            }
            None => self.wait(key, Line::Any, None),
        }
    }

    /// A request joins a line; `endpoint` is asked for one connection more.
    pub(in crate::worker) fn wait(
        &mut self,
        key: Key<Client>,
        line: Line,
        endpoint: Option<EndpointId>,
    ) {
        if self.requests.queue.is_full() {
            let nowhere = self.pools.table.is_empty();
            return self
                .give_up(key, if nowhere { ErrorReply::NoneKnown } else { ErrorReply::QueueFull });
        }
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        client.on_waiting();
        self.requests.queue.join(line, key);
        if let Some(endpoint) = endpoint {
            self.want(endpoint, 1);
        }
    }

    pub(in crate::worker) fn want(&mut self, endpoint: EndpointId, count: usize) {
        let Some(entry) = self.pools.table.get_mut(endpoint) else { return };
        entry.pool.want(count);
        self.mark_short(endpoint);
    }

    /// Whether requests wait for an endpoint that has no alternative, be it ejected or not.
    pub(in crate::worker) fn is_needed(&self, endpoint: EndpointId) -> bool {
        self.requests.queue.waiting(Line::Endpoint(endpoint)) > 0
            || (self.requests.queue.waiting(Line::Any) > 0 && !self.pools.table.any_usable())
    }

    /// Requests that would rather go to an endpoint of which no connection can be had go on to
    /// another one.
    pub(in crate::worker) fn pass_over(&mut self, endpoint: EndpointId) {
        if !self.is_bound_to_source() {
            return;
        }
        let usable = self.pools.table.get_mut(endpoint).is_some_and(|e| e.health.is_usable());
        let backs_off =
            self.pools.table.get_mut(endpoint).is_some_and(|e| e.pool.backs_off(self.cx.now));
        if (usable && !backs_off) || self.pools.table.is_connected(Some(endpoint)) {
            return;
        }
        while let Some(key) = self.requests.queue.serve(Line::Endpoint(endpoint)) {
            if let Some(client) = self.requests.clients.get_mut(key) {
                client.on_passed_over(endpoint);
                self.mark_due(key);
            }
        }
    }

    /// A connect to an endpoint failed: requests that only it can answer need not wait longer.
    pub(in crate::worker) fn on_endpoint_missed(&mut self, endpoint: EndpointId) {
        if self.is_bound_to_source() {
            return self.pass_over(endpoint);
        }
        let usable = self.pools.table.get_mut(endpoint).is_some_and(|e| e.health.is_usable());
        while !usable && let Some(key) = self.requests.queue.serve(Line::Endpoint(endpoint)) {
            self.give_up(key, ErrorReply::Unreachable);
        }
    }

    /// Takes note that an endpoint may have idle connections for those that wait.
    pub(in crate::worker) fn free(&mut self, endpoint: EndpointId) {
        if !self.requests.queue.is_empty() && !self.pools.freed.contains(&endpoint) {
            self.pools.freed.push(endpoint);
        }
    }

    pub(in crate::worker) fn serve_freed(&mut self) {
        while let Some(endpoint) = self.pools.freed.pop() {
            let own = Line::Endpoint(endpoint);
            while self.requests.queue.waiting(own) + self.requests.queue.waiting(Line::Any) > 0 {
                self.prove_latest(endpoint);
                let lendable =
                    self.pools.table.get_mut(endpoint).filter(|entry| entry.is_present());
                if lendable.is_none_or(|entry| entry.pool.idle() == 0) {
                    break;
                }
                let Some(key) = self.requests.queue.serve_either(own, Line::Any) else { break };
                self.cx.stats.count_checkout(Checkout::Miss);
                self.acquire(key, endpoint);
            }
        }
    }

    /// Lends a client an idle connection of an endpoint, which has one that is proved to be open and
    /// silent.
    pub(in crate::worker) fn acquire(&mut self, key: Key<Client>, endpoint: EndpointId) {
        let Some(backend) = self.pools.table.acquire(endpoint) else { return };
        self.own(backend.conn, Owner::InUse(key));
        if let Some(client) = self.requests.clients.get_mut(key) {
            client.on_acquired(backend);
        }
        self.use_backend(key);
    }

    pub(in crate::worker) fn use_backend(&mut self, key: Key<Client>) {
        if self.requests.clients.get(key).is_some_and(Client::is_opaque) {
            self.turn_opaque(key);
        } else {
            self.ask(key);
        }
    }

    /// Sends a client's request on the connection that it holds.
    pub(in crate::worker) fn ask(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        let (Some(request), Some(backend)) = (client.request(), client.backend) else { return };
        client.upload = Upload::new(self.cx.now);
        self.cx.stats.queue_wait.record(client.on_asked(self.cx.now));
        if request.repeatable || client.broadcast.is_some() {
            // Its bytes stay where they are, to be sent again.
            let Some(buf) = self.cx.driver.buffers().duplicate(&client.input, request.len) else {
                return self.close_client(key, CloseReason::Overload);
            };
            client.on_backend_queued(buf.len(), self.cx.now);
            self.cx.driver.send(backend.conn, buf);
        } else {
            client.on_sent_on();
            self.send_on(key, request.len);
        }
        self.arm_client(key);
    }

    /// Sends the first `len` bytes of a client's input to its backend.
    pub(in crate::worker) fn send_on(&mut self, key: Key<Client>, mut len: u32) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        let Some(backend) = client.backend else { return };
        while len > 0 {
            let Some(buf) = self.cx.driver.buffers().take_front(&mut client.input, len) else {
                return self.close_client(key, CloseReason::Overload);
            };
            len -= buf.len();
            client.on_backend_queued(buf.len(), self.cx.now);
            client.upload.on_held_up(client.unasked() >= limits::BUFFER_SIZE as u32, self.cx.now);
            self.cx.driver.send(backend.conn, buf);
        }
    }

    /// Sends on what has come of a request that is longer than what was held of it.
    pub(in crate::worker) fn ask_more(&mut self, key: Key<Client>, limit: u32) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        if client.unasked() >= limit || client.input.is_empty() {
            return;
        }
        let more = client.more(self.cx.driver.buffers());
        if client.is_broken() {
            let len = more.unwrap_or(client.input.bytes());
            self.cx.driver.buffers().advance(&mut client.input, len);
            return client.on_rest_dropped();
        }
        match more {
            Some(len) => self.send_on(key, len),
            None => self.turn_opaque(key),
        }
    }

    /// A client and the connection that it holds become a session of opaque bytes. It keeps the
    /// connection's place in its pool until it ends.
    pub(in crate::worker) fn turn_opaque(&mut self, key: Key<Client>) {
        self.requests.queue.leave(key);
        let Some(backend) =
            self.requests.clients.get_mut(key).and_then(|client| client.backend.take())
        else {
            return;
        };
        let Some(mut client) = self.requests.clients.remove(key) else { return };
        // What was kept of a request that was sent is not to be sent again.
        let sent = client.request().map_or(0, |request| request.len);
        self.cx.driver.buffers().advance(&mut client.input, sent);
        let timer = client.conn.index();
        if let Some(request) = client.uncounted() {
            self.cx.stats.count_request(request.verb, Outcome::Opaque, Duration::ZERO);
        }
        self.pools.table.turned_opaque(backend.endpoint);
        self.cx.timers.clear(timer);
        let mut session = Session::new(client.conn, self.cx.now);
        session.on_trying(backend.endpoint, Some(backend.conn));
        session.on_connected(backend.conn, client.unasked(), self.cx.now);
        // What cannot be understood may be what the backend ends it for.
        session.vouch();
        session.on_received(Side::Backend, client.unsent(), u32::MAX, self.cx.now);
        let session = self.sessions.insert(session);
        self.own(client.conn, Owner::Session(session, Side::Client));
        self.own(backend.conn, Owner::Session(session, Side::Backend));
        self.arm_deadline(session);
        self.cx.driver.receive(client.conn, true);
        self.cx.driver.receive(backend.conn, true);
        while let Some(buf) = self.cx.driver.buffers().pop(&mut client.input) {
            // It was counted when it came.
            self.pass_on(session, Side::Client, buf);
        }
        self.cx.driver.join(client.conn, backend.conn);
        if client.is_broken() {
            // The driver has told it, and tells it once.
            self.apply(session, |session, now| session.on_send_failed(Side::Backend, now));
        }
        if client.has_ended() {
            self.on_ended(session, Side::Client);
        }
    }
}
