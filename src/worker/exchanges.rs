//! A worker's clients where used connections are lent: their requests, and the queue of those that
//! wait for a connection.
//!
//! Connections are lent at the end of a turn only. By then all that the kernel had to say about
//! them has been heard: one that is lent is open and silent.

use std::net::IpAddr;
use std::time::Duration;

use super::engine::{Engine, Owner};
use crate::config::{Balance, Locality, PoolMode, Protocol, Route};
use crate::io::{Buf, Close, ConnId, Driver};
use crate::limits;
use crate::proxy::Side;
use crate::proxy::balance::Having;
use crate::proxy::exchange::{
    Client, Due, Fault, Framing, Front, Lost, Reply, Request, Sweep, write_fault,
};
use crate::proxy::queue::Line;
use crate::proxy::session::{Session, how_to_close};
use crate::slab::Key;
use crate::telemetry::{Checkout, CloseReason, Discard, Outcome, Retry, Spillover, Verb};

impl<D: Driver> Engine<D> {
    /// Whether used connections are lent.
    pub(super) fn lends(&self) -> bool {
        self.config.pool.mode != PoolMode::Preconnect
    }

    pub(super) fn on_client(&mut self, conn: ConnId) {
        self.stats.sessions_opened.add(1);
        let framing = Framing::new(self.config.protocol, &self.config.requests);
        let client = Client::new(conn, framing, self.now);
        let Ok(key) = self.clients.insert(client) else {
            self.stats.count_close(CloseReason::Overload);
            self.driver.close(conn, Close::Reset);
            return;
        };
        self.publish_sessions();
        self.own(conn, Owner::Client(key));
        self.mark_due(key);
    }

    /// Has a client looked at when the turn's events have been handled.
    fn mark_due(&mut self, key: Key) {
        if let Some(client) = self.clients.get_mut(key)
            && !client.due
        {
            client.due = true;
            self.due.push_back(key);
        }
    }

    /// Lends what is free to those that have waited longest, then looks after the clients to which
    /// something has happened.
    pub(super) fn serve_clients(&mut self) {
        while let Some(key) = self.returning.pop() {
            self.return_loan(key);
        }
        self.lend_freed();
        while let Some(key) = self.due.pop_front() {
            if let Some(client) = self.clients.get_mut(key) {
                client.due = false;
                self.serve(key);
            }
            self.lend_freed();
        }
        self.stats.queue_depth.set(self.queue.len() as u64);
    }

    fn serve(&mut self, key: Key) {
        let limit = self.in_flight_limit();
        while let Some(client) = self.clients.get_mut(key) {
            if client.is_ready() {
                self.place(key);
                continue;
            }
            if client.is_streaming() {
                self.ask_more(key, limit);
                break;
            }
            if !client.is_reading() || client.unsent() > limit {
                break;
            }
            match client.front(self.driver.buffers(), &mut self.scratch) {
                Front::Partial => break,
                Front::Refused(len, fault) => {
                    self.driver.buffers().advance(&mut client.input, len);
                    self.stats.count_request(Verb::Other, fault.outcome(), Duration::ZERO);
                    self.tell(key, fault);
                }
                Front::Request(request) => client.begin(request, self.now),
                Front::Opaque => client.begin_opaque(self.now),
            }
        }
        self.settle(key, limit);
    }

    /// Receives from a client as long as what it sends can be held, and closes one that is done.
    fn settle(&mut self, key: Key, limit: u32) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if client.is_finished() {
            return self.close_client(key, CloseReason::Finished);
        }
        if client.is_leaving() {
            self.driver.buffers().clear(&mut client.input);
        }
        if client.input.buffers() > limits::INPUT_BUFFERS_LEAN && self.is_lean() {
            // What others need is not for heads that do not end.
            return self.close_client(key, CloseReason::Overload);
        }
        let Some(client) = self.clients.get_mut(key) else { return };
        // A request that is not whole yet has to go on, however short buffers are.
        let waits_for_more = (client.is_reading() && client.unsent() <= limit)
            || (client.is_streaming() && client.unasked() < limit);
        let wanted = waits_for_more || client.ahead() < limit.min(limits::BUFFER_SIZE as u32);
        if client.receiving != wanted {
            client.receiving = wanted;
            let conn = client.conn;
            self.driver.receive(conn, wanted);
        }
        self.arm_client(key);
    }

    // ---- From a request to a connection --------------------------------------------------------

    /// Sends a client's request, or has it wait.
    fn place(&mut self, key: Key) {
        let Some(client) = self.clients.get(key) else { return };
        let Some(request) = client.request() else { return };
        if client.loan.is_some() {
            return self.use_loan(key);
        }
        match self.destination(key, &request) {
            Some(endpoint) => self.place_at(key, endpoint),
            None => self.place_anywhere(key),
        }
    }

    /// The one endpoint that a request has to go to, if there is only one.
    fn destination(&mut self, key: Key, request: &Request) -> Option<u16> {
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
        } else if self.config.balance == Balance::SourceHash {
            let tried = self.clients.get(key)?.tried();
            let source = self.source(key);
            // The same one as long as it is usable.
            return self.table.choose(&tried, source, &mut self.rng);
        }
        None
    }

    fn source(&self, key: Key) -> Option<IpAddr> {
        let client = self.clients.get(key)?;
        self.driver.peer_address(client.conn).map(|address| address.ip())
    }

    fn place_at(&mut self, key: Key, endpoint: u16) {
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

    fn place_anywhere(&mut self, key: Key) {
        let Some(client) = self.clients.get(key) else { return };
        let tried = client.tried();
        let near = self.config.locality != Locality::Off;
        let chosen = self.table.choose_for_request(&tried, None, near, &mut self.rng);
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
    fn wait(&mut self, key: Key, line: Line, endpoint: Option<u16>) {
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

    fn want(&mut self, endpoint: u16, count: usize) {
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        entry.pool.want(count);
        self.mark_short(endpoint);
    }

    /// Whether requests wait for an endpoint that has no alternative, be it ejected or not.
    pub(super) fn is_needed(&self, endpoint: u16) -> bool {
        self.queue.waiting(Line::Endpoint(endpoint)) > 0
            || (self.queue.waiting(Line::Any) > 0 && !self.table.any_usable())
    }

    /// A connect to an endpoint failed: requests that only it can answer need not wait longer.
    pub(super) fn on_endpoint_missed(&mut self, endpoint: u16) {
        let usable = self.table.get_mut(endpoint).is_some_and(|e| e.health.is_usable());
        while !usable && let Some(key) = self.queue.serve(Line::Endpoint(endpoint)) {
            self.give_up(key, Fault::Unreachable);
        }
    }

    /// Takes note that an endpoint may have idle connections for those that wait.
    pub(super) fn free(&mut self, endpoint: u16) {
        if !self.queue.is_empty() && !self.freed.contains(&endpoint) {
            self.freed.push(endpoint);
        }
    }

    fn lend_freed(&mut self) {
        while let Some(endpoint) = self.freed.pop() {
            while self.table.get_mut(endpoint).is_some_and(|e| e.is_present() && e.pool.idle() > 0)
            {
                let own = self.queue.serve(Line::Endpoint(endpoint));
                let Some(key) = own.or_else(|| self.queue.serve(Line::Any)) else { break };
                self.stats.count_checkout(Checkout::Miss);
                self.lend(key, endpoint);
            }
        }
    }

    /// Lends a client an idle connection of an endpoint, which has one.
    fn lend(&mut self, key: Key, endpoint: u16) {
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        let Some(loan) = entry.lend(endpoint) else { return };
        self.pool_conns -= 1;
        self.loans += 1;
        self.own(loan.conn, Owner::Lent(key));
        if let Some(client) = self.clients.get_mut(key) {
            client.loan = Some(loan);
            client.backend_receiving = true;
        }
        self.use_loan(key);
    }

    fn use_loan(&mut self, key: Key) {
        if self.clients.get(key).is_some_and(Client::is_opaque) {
            self.turn_opaque(key);
        } else {
            self.ask(key);
        }
    }

    /// Sends a client's request on the connection that it holds.
    fn ask(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        let (Some(request), Some(loan)) = (client.request(), client.loan) else { return };
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
    fn send_on(&mut self, key: Key, mut len: u32) {
        let Some(client) = self.clients.get_mut(key) else { return };
        let Some(loan) = client.loan else { return };
        while len > 0 {
            let Some(buf) = self.driver.buffers().take_front(&mut client.input, len) else {
                return self.close_client(key, CloseReason::Overload);
            };
            len -= buf.len();
            client.on_backend_queued(buf.len());
            self.driver.send(loan.conn, buf);
        }
    }

    /// Sends on what has come of a request that is longer than what was held of it.
    fn ask_more(&mut self, key: Key, limit: u32) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if client.unasked() >= limit || client.input.is_empty() {
            return;
        }
        match client.more(self.driver.buffers()) {
            Some(len) => self.send_on(key, len),
            None => self.turn_opaque(key),
        }
    }

    /// A client and the connection that it holds become a session of opaque bytes.
    fn turn_opaque(&mut self, key: Key) {
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
        if let Some(entry) = self.table.get_mut(loan.endpoint) {
            entry.pool.on_lent_closed();
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
            self.on_received(session, Side::Client, buf);
        }
        self.driver.join(client.conn, loan.conn);
        if client.has_ended() {
            self.on_ended(session, Side::Client);
        }
    }

    // ---- From a connection to an answer --------------------------------------------------------

    /// A backend sent bytes on a connection that a client holds.
    pub(super) fn on_reply(&mut self, key: Key, mut buf: Buf) {
        let limit = self.in_flight_limit();
        let Some(client) = self.clients.get_mut(key).filter(|client| client.is_asked()) else {
            // Between two requests of a session.
            self.driver.buffers().give(buf);
            return self.drop_loan(key, Discard::Unexpected);
        };
        let buffers = self.driver.buffers();
        let reply = client.on_reply(buffers.bytes(&buf), self.now);
        if let Reply::Surplus(count) = reply {
            buffers.set_len(&mut buf, count);
        }
        if let Some(sweep) = &mut client.sweep {
            sweep.on_reply(buffers.bytes(&buf));
            buffers.give(buf);
        } else {
            self.stats.bytes_to_client.add(u64::from(buf.len()));
            client.on_queued(buf.len());
            self.driver.send(client.conn, buf);
        }
        match reply {
            Reply::Opaque => self.turn_opaque(key),
            Reply::Partial => {
                // A slow client holds its backend up rather than the worker's buffers.
                if client.unsent() >= limit
                    && client.backend_receiving
                    && let Some(loan) = client.loan
                {
                    client.backend_receiving = false;
                    self.driver.receive(loan.conn, false);
                }
            }
            Reply::Complete => {
                let keeps_alive = client.keeps_alive();
                if !keeps_alive {
                    self.drop_loan(key, Discard::Spent);
                } else if self.config.pool.mode == PoolMode::Request || self.is_loan_obsolete(key) {
                    // At the end of the turn, when it is known that nothing came behind.
                    self.returning.push(key);
                }
                self.on_answered(key, keeps_alive);
            }
            Reply::Surplus(_) => {
                let keeps_alive = client.keeps_alive();
                self.drop_loan(key, Discard::Unexpected);
                self.on_answered(key, keeps_alive);
            }
        }
    }

    fn is_loan_obsolete(&mut self, key: Key) -> bool {
        let loan = self.clients.get(key).and_then(|client| client.loan);
        let entry = loan.and_then(|loan| self.table.get_mut(loan.endpoint));
        let aged = loan.and_then(|loan| loan.retire_at).is_some_and(|at| at <= self.now);
        aged || entry.is_some_and(|entry| !entry.is_present())
    }

    fn on_answered(&mut self, key: Key, keeps_alive: bool) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if let Some(sweep) = &mut client.sweep {
            sweep.on_answered();
            return self.next_store(key);
        }
        self.finish(key, Outcome::Answered);
        if !keeps_alive {
            self.say_goodbye(key);
        }
    }

    /// Ends our direction to a client behind all that it is told, and waits for it to leave.
    fn say_goodbye(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        client.on_leaving(self.now);
        self.driver.shutdown(client.conn);
        self.mark_due(key);
    }

    /// Goes on with the next store of a request to all of them, or answers it.
    fn next_store(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        let Some(sweep) = &mut client.sweep else { return };
        if let Some(next) = self.table.present_from(sweep.endpoint + 1) {
            sweep.endpoint = next;
            client.on_next_store(self.now);
            return self.mark_due(key);
        }
        if let Some(sweep) = client.sweep.take() {
            self.say(key, |space| sweep.write_answer(space));
        }
        self.finish(key, Outcome::Answered);
    }

    /// A request is over.
    fn finish(&mut self, key: Key, outcome: Outcome) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if let Some((request, took)) = client.finish(self.driver.buffers(), self.now) {
            self.stats.count_request(request.verb, outcome, took);
        }
        self.mark_due(key);
    }

    /// A request gets an error in place of an answer.
    fn give_up(&mut self, key: Key, fault: Fault) {
        self.queue.leave(key);
        let Some(client) = self.clients.get_mut(key) else { return };
        let cut_off = client.has_part();
        if client.is_asked() {
            self.drop_loan(key, Discard::Timeout);
        }
        let Some(client) = self.clients.get_mut(key) else { return };
        if let Some(sweep) = &mut client.sweep {
            sweep.on_failed(fault);
            return self.next_store(key);
        }
        if cut_off {
            return self.close_client(key, CloseReason::BackendReset);
        }
        self.tell(key, fault);
        self.finish(key, fault.outcome());
        // A fault of HTTP says that the connection ends with it.
        if self.config.protocol == Protocol::Http1 {
            self.say_goodbye(key);
        }
    }

    fn tell(&mut self, key: Key, fault: Fault) {
        let protocol = self.config.protocol;
        self.say(key, |space| write_fault(protocol, fault, space));
    }

    /// Sends a client words of our own.
    fn say(&mut self, key: Key, write: impl FnOnce(&mut [u8]) -> usize) {
        let buffers = self.driver.buffers();
        let Some(mut buf) = buffers.take() else {
            return self.close_client(key, CloseReason::Overload);
        };
        let len = write(buffers.space(&mut buf));
        buffers.set_len(&mut buf, len);
        let Some(client) = self.clients.get_mut(key) else { return buffers.give(buf) };
        client.on_queued(len as u32);
        self.driver.send(client.conn, buf);
    }

    // ---- Connections that are lent -------------------------------------------------------------

    /// A connection that a client holds ended or broke.
    pub(super) fn on_lent_died(&mut self, key: Key, why: Retry) {
        let spent = self.clients.get(key).is_some_and(|c| c.framing().ends_with_connection());
        let discard = if spent { Discard::Spent } else { Discard::Dead };
        self.lose(key, discard, why);
    }

    fn lose(&mut self, key: Key, discard: Discard, why: Retry) {
        self.drop_loan(key, discard);
        let attempts = self.config.connect_attempts;
        let in_order = why == Retry::Ended && discard != Discard::Endpoint;
        let Some(client) = self.clients.get_mut(key) else { return };
        match client.on_lost(in_order, attempts) {
            Lost::Idle => {}
            Lost::Answered => self.on_answered(key, false),
            Lost::Repeat => {
                self.stats.count_retry(why);
                self.mark_due(key);
            }
            Lost::Fail => self.give_up(key, Fault::Lost),
            Lost::CutOff => self.close_client(key, CloseReason::BackendReset),
        }
    }

    /// A client gives its connection back, silent as it is.
    fn return_loan(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if client.unasked() > 0 {
            // Answered before it was asked.
            return self.drop_loan(key, Discard::Unexpected);
        }
        let Some(loan) = client.loan.take() else { return };
        self.loans -= 1;
        if !client.backend_receiving {
            self.driver.receive(loan.conn, true);
        }
        let useful = self.keeps_pools() && self.pool_conns < self.pool_conns_max;
        let Some(entry) = self.table.get_mut(loan.endpoint) else { return };
        if entry.take_back(&loan, useful, self.now) {
            self.pool_conns += 1;
            let greeting = crate::io::Chain::default();
            self.own(loan.conn, Owner::Warm { endpoint: loan.endpoint, greeting });
            self.free(loan.endpoint);
        } else {
            let aged = loan.retire_at.is_some_and(|at| at <= self.now);
            let why = if aged { Discard::Lifetime } else { Discard::Surplus };
            self.retire(loan.conn, loan.endpoint, why);
        }
    }

    /// A client's connection is of no more use.
    fn drop_loan(&mut self, key: Key, why: Discard) {
        let loan = self.clients.get_mut(key).and_then(|client| client.loan.take());
        let Some(loan) = loan else { return };
        self.loans -= 1;
        if let Some(entry) = self.table.get_mut(loan.endpoint) {
            entry.on_lent_closed();
        }
        self.retire(loan.conn, loan.endpoint, why);
    }

    /// Closes a connection that was lent. Those that wait may have counted on it.
    fn retire(&mut self, conn: ConnId, endpoint: u16, why: Discard) {
        self.owner(conn);
        self.stats.count_discard(why);
        // With a reset, so that a backend does not go on with what nobody waits for.
        self.driver.close(conn, Close::Reset);
        if !self.queue.is_empty() {
            self.want(endpoint, 1);
        }
        self.mark_short(endpoint);
        self.table.forget_unused();
    }

    // ---- Clients -------------------------------------------------------------------------------

    pub(super) fn on_client_received(&mut self, key: Key, buf: Buf) {
        let Some(client) = self.clients.get_mut(key) else {
            return self.driver.buffers().give(buf);
        };
        self.batcher.on_active(&mut client.window);
        self.stats.bytes_to_backend.add(u64::from(buf.len()));
        client.on_active(self.now);
        self.driver.buffers().push(&mut client.input, buf);
        self.mark_due(key);
    }

    /// The backend that a client holds took bytes of its request.
    pub(super) fn on_lent_sent(&mut self, key: Key, bytes: u32) {
        let Some(client) = self.clients.get_mut(key) else { return };
        client.on_backend_sent(bytes, self.now);
        if client.is_streaming() {
            self.mark_due(key);
        }
    }

    pub(super) fn on_client_sent(&mut self, key: Key, bytes: u32) {
        let limit = self.in_flight_limit();
        let Some(client) = self.clients.get_mut(key) else { return };
        client.on_sent(bytes, self.now);
        if !client.backend_receiving
            && client.unsent() <= limit / 2
            && let Some(loan) = client.loan
        {
            client.backend_receiving = true;
            self.driver.receive(loan.conn, true);
        }
        if client.is_reading() && (client.is_finished() || !client.input.is_empty()) {
            self.mark_due(key);
        }
    }

    pub(super) fn on_client_ended(&mut self, key: Key) {
        if let Some(client) = self.clients.get_mut(key) {
            client.on_ended(self.now);
            self.mark_due(key);
        }
    }

    pub(super) fn on_client_deadline(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        client.timer = None;
        match client.on_deadline(&self.client_limits, self.now) {
            Due::Nothing => self.arm_client(key),
            Due::GiveUp(fault) => self.give_up(key, fault),
            Due::Close(reason) => self.close_client(key, reason),
        }
    }

    /// Sets a client's timer, if it does not fire early enough anyway: requests come and go far
    /// more often than their time limits do.
    fn arm_client(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        let Some(deadline) = client.deadline(&self.client_limits) else { return };
        if client.timer.is_none_or(|timer| deadline < timer) {
            client.timer = Some(deadline);
            self.timers.set(client.conn.index(), deadline);
        }
    }

    pub(super) fn close_client(&mut self, key: Key, reason: CloseReason) {
        self.queue.leave(key);
        let Some(client) = self.clients.get_mut(key) else { return };
        // A connection is clean when every request on it was answered in full.
        if client.is_asked() {
            self.drop_loan(key, Discard::Abandoned);
        } else {
            self.return_loan(key);
        }
        if let Some(request) = self.clients.get(key).and_then(Client::request) {
            self.stats.count_request(request.verb, Outcome::ClientGone, Duration::ZERO);
        }
        let Some(mut client) = self.clients.remove(key) else { return };
        self.driver.buffers().clear(&mut client.input);
        let how = if client.unsent() > 0 { Close::Reset } else { how_to_close(reason) };
        self.timers.clear(client.conn.index());
        self.owner(client.conn);
        self.driver.close(client.conn, how);
        self.stats.count_close(reason);
        self.stats.session_duration.record(client.age(self.now));
        self.publish_sessions();
        self.reopen_gate();
        tracing::trace!(reason = ?reason, "client closed");
    }

    pub(super) fn close_all_clients(&mut self, reason: CloseReason) {
        for slot in 0..self.clients.slots() {
            if let Some(key) = self.clients.key_at(slot) {
                self.close_client(key, reason);
            }
        }
    }

    /// Takes the connections of an endpoint that left the set long enough ago from their clients.
    pub(super) fn recall_loans_of(&mut self, endpoint: u16) {
        for slot in 0..self.clients.slots() {
            if let Some(key) = self.clients.key_at(slot)
                && self
                    .clients
                    .get(key)
                    .and_then(|c| c.loan)
                    .is_some_and(|l| l.endpoint == endpoint)
            {
                self.lose(key, Discard::Endpoint, Retry::Ended);
            }
        }
    }

    /// The endpoints have changed: whoever waits may have another one to go to.
    pub(super) fn place_waiting_again(&mut self) {
        for slot in 0..self.clients.slots() {
            if let Some(key) = self.clients.key_at(slot)
                && let Some(client) = self.clients.get_mut(key)
                && client.on_placed_again()
            {
                self.queue.leave(key);
                self.mark_due(key);
            }
        }
    }

    /// Has connections made for those that wait, where the last attempt may have come to nothing.
    pub(super) fn look_after_queue(&mut self) {
        if self.queue.is_empty() {
            return;
        }
        let anywhere = self.queue.waiting(Line::Any);
        for endpoint in self.table.indices() {
            let waiting = anywhere + self.queue.waiting(Line::Endpoint(endpoint));
            let Some(entry) = self.table.get_mut(endpoint) else { continue };
            entry.pool.stop_wanting();
            let missing = waiting.saturating_sub(entry.pool.connecting());
            if entry.is_present() {
                self.want(endpoint, missing);
                self.free(endpoint);
            }
        }
    }

    /// What holds an event of a client or of its backend.
    pub(super) fn on_client_broken(&mut self, key: Key, side: Side) {
        match side {
            Side::Client => self.close_client(key, CloseReason::ClientReset),
            Side::Backend => self.on_lent_died(key, Retry::Broken),
        }
    }
}
