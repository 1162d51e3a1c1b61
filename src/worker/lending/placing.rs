//! From a request to a connection: which endpoint, which line, and sending it.

use std::net::IpAddr;
use std::time::Duration;

use crate::config::{Balance, Locality, Route};
use crate::io::Driver;
use crate::limits;
use crate::proxy::Side;
use crate::proxy::balance::Having;
use crate::proxy::exchange::{Client, Fault, Request, Sweep, Upload};
use crate::proxy::queue::Line;
use crate::proxy::session::{Session, Tried};
use crate::slab::Key;
use crate::telemetry::{Checkout, CloseReason, Outcome, Spillover, Verb};
use crate::worker::engine::{Engine, Owner};

impl<D: Driver> Engine<D> {
    /// Sends a client's request, or has it wait.
    pub(in crate::worker) fn place(&mut self, key: Key) {
        let Some(client) = self.clients.get(key) else { return };
        let Some(request) = client.request() else { return };
        if client.loan.is_some() {
            return self.use_loan(key);
        }
        if self.table.is_empty() {
            return self.await_an_endpoint(key);
        }
        if let Some(client) = self.clients.get_mut(key) {
            client.on_endpoints(self.now);
        }
        match self.destination(key, &request) {
            Some(endpoint) => self.place_at(key, endpoint),
            None => self.place_anywhere(key),
        }
    }

    /// The one endpoint that a request has to go to, if there is only one.
    pub(in crate::worker) fn destination(&mut self, key: Key, request: &Request) -> Option<u16> {
        if self.config.requests.route == Route::Key {
            if request.verb == Verb::Compact {
                let first = self.table.present_from(0)?;
                let client = self.clients.get_mut(key)?;
                let sweep = client.sweep.get_or_insert_with(|| Box::new(Sweep::new(first)));
                return Some(sweep.endpoint);
            }
            if let Some(hash) = request.key {
                return self.table.owner(hash);
            }
        } else if self.is_bound_to_source() {
            let tried = self.clients.get(key)?.tried();
            let source = self.source(key);
            // The same one as long as it can be reached.
            return self.table.choose_for_source(&tried, source, self.now);
        }
        None
    }

    /// Whether a client's requests go to one endpoint as long as that can be reached.
    pub(in crate::worker) fn is_bound_to_source(&self) -> bool {
        self.config.requests.route != Route::Key && self.config.balance == Balance::SourceHash
    }

    /// There is no endpoint at all: the request waits for one.
    fn await_an_endpoint(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if client.on_no_endpoint(&self.client_limits, self.now) <= self.now {
            return self.give_up(key, Fault::NoEndpoint(self.client_limits.endpoint));
        }
        self.wait(key, Line::Any, None);
    }

    pub(in crate::worker) fn source(&self, key: Key) -> Option<IpAddr> {
        let client = self.clients.get(key)?;
        self.driver.peer_address(client.conn).map(|address| address.ip())
    }

    pub(in crate::worker) fn place_at(&mut self, key: Key, endpoint: u16) {
        let line = Line::Endpoint(endpoint);
        let nobody_waits = self.queue.waiting(line) == 0;
        // An endpoint may have left the set since a request to all of them began.
        let entry = self.table.get_mut(endpoint).filter(|entry| entry.is_present());
        let Some(entry) = entry else { return self.give_up(key, Fault::Unreachable) };
        if !entry.health.is_usable() && entry.pool.idle() == 0 && entry.pool.backs_off(self.now) {
            // It has just been tried, and another store would give a wrong answer.
            return self.give_up(key, Fault::Unreachable);
        }
        if nobody_waits && entry.pool.idle() > 0 {
            self.stats.count_checkout(Checkout::Hit);
            return self.lend(key, endpoint);
        }
        self.wait(key, line, Some(endpoint));
    }

    pub(in crate::worker) fn place_anywhere(&mut self, key: Key) {
        let Some(client) = self.clients.get(key) else { return };
        let tried = client.tried();
        let near = self.config.locality != Locality::Off;
        // A connection that broke says little about the next one to the same endpoint.
        let mut choose =
            |tried: &Tried| self.table.choose_for_request(tried, None, near, &mut self.rng);
        let chosen = choose(&tried).or_else(|| choose(&Tried::default()));
        let nobody_waits = self.queue.waiting(Line::Any) == 0;
        match chosen {
            Some((endpoint, Having::Idle)) if nobody_waits => {
                self.stats.count_checkout(Checkout::Hit);
                let far = self.table.get_mut(endpoint).is_some_and(|e| !e.endpoint.is_near());
                if near && far {
                    self.stats.count_spillover(Spillover::Few);
                }
                self.lend(key, endpoint);
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
    pub(in crate::worker) fn wait(&mut self, key: Key, line: Line, endpoint: Option<u16>) {
        if self.queue.is_full() {
            return self.give_up(key, Fault::QueueFull);
        }
        let Some(client) = self.clients.get_mut(key) else { return };
        client.on_waiting();
        self.queue.join(line, key);
        if let Some(endpoint) = endpoint {
            self.want(endpoint, 1);
        }
    }

    pub(in crate::worker) fn want(&mut self, endpoint: u16, count: usize) {
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        entry.pool.want(count);
        self.mark_short(endpoint);
    }

    /// Whether requests wait for an endpoint that has no alternative, be it ejected or not.
    pub(in crate::worker) fn is_needed(&self, endpoint: u16) -> bool {
        self.queue.waiting(Line::Endpoint(endpoint)) > 0
            || (self.queue.waiting(Line::Any) > 0 && !self.table.any_usable())
    }

    /// Requests that would rather go to an endpoint of which no connection can be had go on to
    /// another one.
    pub(in crate::worker) fn pass_over(&mut self, endpoint: u16) {
        if !self.is_bound_to_source() {
            return;
        }
        let usable = self.table.get_mut(endpoint).is_some_and(|e| e.health.is_usable());
        let backs_off = self.table.get_mut(endpoint).is_some_and(|e| e.pool.backs_off(self.now));
        if (usable && !backs_off) || self.table.is_connected(Some(endpoint)) {
            return;
        }
        while let Some(key) = self.queue.serve(Line::Endpoint(endpoint)) {
            if let Some(client) = self.clients.get_mut(key) {
                client.on_passed_over(endpoint);
                self.mark_due(key);
            }
        }
    }

    /// A connect to an endpoint failed: requests that only it can answer need not wait longer.
    pub(in crate::worker) fn on_endpoint_missed(&mut self, endpoint: u16) {
        if self.is_bound_to_source() {
            return self.pass_over(endpoint);
        }
        let usable = self.table.get_mut(endpoint).is_some_and(|e| e.health.is_usable());
        while !usable && let Some(key) = self.queue.serve(Line::Endpoint(endpoint)) {
            self.give_up(key, Fault::Unreachable);
        }
    }

    /// Takes note that an endpoint may have idle connections for those that wait.
    pub(in crate::worker) fn free(&mut self, endpoint: u16) {
        if !self.queue.is_empty() && !self.freed.contains(&endpoint) {
            self.freed.push(endpoint);
        }
    }

    pub(in crate::worker) fn lend_freed(&mut self) {
        while let Some(endpoint) = self.freed.pop() {
            while self.table.get_mut(endpoint).is_some_and(|e| e.is_present() && e.pool.idle() > 0)
            {
                let own = Line::Endpoint(endpoint);
                let Some(key) = self.queue.serve_either(own, Line::Any) else { break };
                self.stats.count_checkout(Checkout::Miss);
                self.lend(key, endpoint);
            }
        }
    }

    /// Lends a client an idle connection of an endpoint, which has one.
    pub(in crate::worker) fn lend(&mut self, key: Key, endpoint: u16) {
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        let Some(loan) = entry.lend(endpoint) else { return };
        self.pool_conns -= 1;
        self.loans += 1;
        self.own(loan.conn, Owner::Lent(key));
        if let Some(client) = self.clients.get_mut(key) {
            client.on_lent(loan);
        }
        self.use_loan(key);
    }

    pub(in crate::worker) fn use_loan(&mut self, key: Key) {
        if self.clients.get(key).is_some_and(Client::is_opaque) {
            self.turn_opaque(key);
        } else {
            self.ask(key);
        }
    }

    /// Sends a client's request on the connection that it holds.
    pub(in crate::worker) fn ask(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        let (Some(request), Some(loan)) = (client.request(), client.loan) else { return };
        client.upload = Upload::new(self.now);
        self.stats.queue_wait.record(client.on_asked(self.now));
        if request.repeatable || client.sweep.is_some() {
            // Its bytes stay where they are, to be sent again.
            let Some(buf) = self.driver.buffers().duplicate(&client.input, request.len) else {
                return self.close_client(key, CloseReason::Overload);
            };
            client.on_backend_queued(buf.len());
            self.driver.send(loan.conn, buf);
        } else {
            client.on_sent_on();
            self.send_on(key, request.len);
        }
        self.arm_client(key);
    }

    /// Sends the first `len` bytes of a client's input to its backend.
    pub(in crate::worker) fn send_on(&mut self, key: Key, mut len: u32) {
        let Some(client) = self.clients.get_mut(key) else { return };
        let Some(loan) = client.loan else { return };
        while len > 0 {
            let Some(buf) = self.driver.buffers().take_front(&mut client.input, len) else {
                return self.close_client(key, CloseReason::Overload);
            };
            len -= buf.len();
            client.on_backend_queued(buf.len());
            client.upload.on_held_up(client.unasked() >= limits::BUFFER_SIZE as u32, self.now);
            self.driver.send(loan.conn, buf);
        }
    }

    /// Sends on what has come of a request that is longer than what was held of it.
    pub(in crate::worker) fn ask_more(&mut self, key: Key, limit: u32) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if client.unasked() >= limit || client.input.is_empty() {
            return;
        }
        match client.more(self.driver.buffers()) {
            Some(len) => self.send_on(key, len),
            None => self.turn_opaque(key),
        }
    }

    /// A client and the connection that it holds become a session of opaque bytes. It keeps the
    /// connection's place in its pool until it ends.
    pub(in crate::worker) fn turn_opaque(&mut self, key: Key) {
        self.queue.leave(key);
        let Some(loan) = self.clients.get_mut(key).and_then(|client| client.loan.take()) else {
            return;
        };
        let Some(mut client) = self.clients.remove(key) else { return };
        self.loans -= 1;
        // What was kept of a request that was sent is not to be sent again.
        let sent = client.request().map_or(0, |request| request.len);
        self.driver.buffers().advance(&mut client.input, sent);
        let timer = client.conn.index();
        if let Some(request) = client.request() {
            self.stats.count_request(request.verb, Outcome::Opaque, Duration::ZERO);
        }
        if let Some(entry) = self.table.get_mut(loan.endpoint) {
            entry.on_turned_opaque();
        }
        self.timers.clear(timer);
        let mut session = Session::new(client.conn, self.now);
        session.on_trying(loan.endpoint, Some(loan.conn));
        session.on_connected(loan.conn, client.unasked(), self.now);
        session.on_received(Side::Backend, client.unsent(), u32::MAX, self.now);
        let Ok(session) = self.sessions.insert(session) else {
            unreachable!("as many sessions as clients fit")
        };
        self.own(client.conn, Owner::Session(session, Side::Client));
        self.own(loan.conn, Owner::Session(session, Side::Backend));
        self.arm_deadline(session);
        self.driver.receive(client.conn, true);
        self.driver.receive(loan.conn, true);
        while let Some(buf) = self.driver.buffers().pop(&mut client.input) {
            // It was counted when it came.
            self.pass_on(session, Side::Client, buf);
        }
        self.driver.join(client.conn, loan.conn);
        if client.has_ended() {
            self.on_ended(session, Side::Client);
        }
    }
}
