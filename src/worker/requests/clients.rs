//! The clients: what they send, what they take, and when they are done with.

use crate::proxy::endpoints::EndpointId;
use std::time::{Duration, Instant};

use crate::config::PoolMode;
use crate::fifo;
use crate::io::{Buf, Close, ConnId, Driver, Unheard};
use crate::limits;
use crate::metrics::{CloseReason, Direction, Discard, Outcome, Retry};
use crate::protocol::Verb;
use crate::proxy::Side;
use crate::proxy::queue::Line;
use crate::proxy::request::{Client, Due, ErrorReply, Framing, Front};
use crate::proxy::session::how_to_close;
use crate::slab::Key;
use crate::worker::engine::{Engine, Owner};

impl<D: Driver> Engine<D> {
    /// Whether used connections are lent.
    pub(in crate::worker) fn reuses_conns(&self) -> bool {
        self.cx.config.pool.mode != PoolMode::Preconnect
    }

    pub(in crate::worker) fn on_client(&mut self, conn: ConnId) {
        let framing = Framing::new(self.cx.config.protocol, &self.cx.config.requests);
        let client = Client::new(conn, framing, self.cx.now);
        let Ok(key) = self.requests.clients.insert(client) else {
            unreachable!("there are as many slots as places")
        };
        self.own(conn, Owner::Client(key));
        self.mark_due(key);
    }

    /// Has a client looked at when the turn's events have been handled.
    pub(in crate::worker) fn mark_due(&mut self, key: Key<Client>) {
        if let Some(client) = self.requests.clients.get_mut(key)
            && !client.due
        {
            client.due = true;
            self.requests.due.push_back(key);
        }
    }

    /// Lends what is free to those that have waited longest, then looks after the clients to which
    /// something has happened.
    pub(in crate::worker) fn serve_clients(&mut self) {
        self.release_backends();
        self.serve_freed();
        while let Some(key) = fifo::pop(&mut self.requests.due) {
            if let Some(client) = self.requests.clients.get_mut(key) {
                client.due = false;
                self.serve(key);
            }
            self.serve_freed();
        }
        self.trim_pools();
        self.cx.stats.queue_depth.set(self.requests.queue.len() as u64);
    }

    fn release_backends(&mut self) {
        while let Some(key) = self.requests.releasing.pop() {
            self.release_backend(key);
        }
    }

    pub(in crate::worker) fn serve(&mut self, key: Key<Client>) {
        let limit = self.in_flight_limit();
        while let Some(client) = self.requests.clients.get_mut(key) {
            if client.is_ready() {
                self.place(key);
                continue;
            }
            if client.is_streaming() {
                self.ask_more(key, limit);
            }
            let Some(client) = self.requests.clients.get_mut(key) else { return };
            if client.has_broken_off() {
                // Its backend would wait for the rest as long as it may.
                if client.is_answered() {
                    self.end_request(key, Discard::Abandoned);
                    continue;
                }
                return self.close_client(key, CloseReason::ClientReset);
            }
            if client.is_passed_on() {
                self.end_exchange(key);
                self.release_backends();
                continue;
            }
            if !client.is_reading() || client.unsent() > limit {
                break;
            }
            match client.front(self.cx.driver.buffers(), &mut self.requests.scratch) {
                Front::Partial => {
                    if client.input.buffers() > limits::PARTIAL_BUFFERS_SHORT_MAX
                        && self.is_short_of_buffers()
                    {
                        // Many that begin large heads and never end them would stall everybody.
                        return self.close_client(key, CloseReason::Overload);
                    }
                    break;
                }
                Front::Refused(len, error) => {
                    self.cx.driver.buffers().advance(&mut client.input, len);
                    self.cx.stats.count_request(Verb::OTHER, error.outcome(), Duration::ZERO);
                    self.tell(key, error);
                }
                Front::Request(request) => client.begin(request, self.cx.now),
                Front::Opaque => client.begin_opaque(self.cx.now),
            }
        }
        self.settle(key, limit);
    }

    /// Receives from a client as long as what it sends can be held, and closes one that is done.
    pub(in crate::worker) fn settle(&mut self, key: Key<Client>, limit: u32) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        if client.is_finished() {
            return self.close_client(key, CloseReason::Finished);
        }
        if client.is_leaving() {
            self.cx.driver.buffers().clear(&mut client.input);
        }
        if self.acceptor.drains_since.is_some() && self.leaves_for_drain(key) {
            return;
        }
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        // A request that is not whole yet has to go on, however short buffers are.
        let waits_for_more = (client.is_reading() && client.unsent() <= limit)
            || (client.is_streaming() && client.unasked() < limit);
        let wanted = waits_for_more || client.ahead() < limit.min(limits::BUFFER_SIZE as u32);
        if client.receiving != wanted {
            client.receiving = wanted;
            let conn = client.conn;
            self.cx.driver.receive(conn, wanted);
        }
        self.arm_client(key);
    }

    pub(in crate::worker) fn on_client_received(&mut self, key: Key<Client>, buf: Buf) {
        let Some(client) = self.requests.clients.get_mut(key) else {
            return self.cx.driver.buffers().give(buf);
        };
        self.load.batcher.on_active(&mut client.window);
        self.cx.stats.bytes.of(Direction::ToBackend).add(u64::from(buf.len()));
        client.on_active(self.cx.now);
        client.upload.on_bytes(buf.len(), self.cx.now);
        self.cx.driver.buffers().push(&mut client.input, buf);
        self.mark_due(key);
    }

    /// The rest of a request that was answered is not passed on any more.
    fn end_request(&mut self, key: Key<Client>, why: Discard) {
        self.discard_backend(key, why);
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        client.on_rest_dropped();
        if client.has_ended() {
            // By its own will.
            return self.on_answered(key, false);
        }
        self.end_exchange(key);
    }

    /// The backend that a client holds took bytes of its request.
    pub(in crate::worker) fn on_backend_sent(&mut self, key: Key<Client>, bytes: u32) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        client.on_backend_sent(bytes, self.cx.now);
        if client.is_streaming() {
            // One buffer may have been sent without that having been told.
            client.upload.on_held_up(client.unasked() >= limits::BUFFER_SIZE as u32, self.cx.now);
        }
        if client.is_streaming() || client.is_answered() {
            self.mark_due(key);
        }
    }

    pub(in crate::worker) fn on_client_sent(&mut self, key: Key<Client>, bytes: u32) {
        let limit = self.in_flight_limit();
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        client.on_sent(bytes, self.cx.now);
        if !client.backend_receiving
            && client.unsent() <= limit / 2
            && let Some(backend) = client.backend
        {
            client.backend_receiving = true;
            self.cx.driver.receive(backend.conn, true);
        }
        let reads = client.is_reading() && !client.input.is_empty();
        if client.is_finished() || reads || self.acceptor.drains_since.is_some() {
            self.mark_due(key);
        } else if client.is_exchanging() && client.unsent() == 0 {
            // It is the backend's turn now.
            self.arm_client(key);
        }
    }

    pub(in crate::worker) fn on_client_ended(&mut self, key: Key<Client>) {
        if let Some(client) = self.requests.clients.get_mut(key) {
            client.on_ended(self.cx.now);
            self.mark_due(key);
        }
    }

    pub(in crate::worker) fn on_client_deadline(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        client.timer = None;
        match client.on_deadline(&self.requests.limits, self.cx.now) {
            Due::Nothing => {}
            Due::GiveUp(error) => {
                let error = self.why_it_waited(key, error);
                return self.give_up(key, error);
            }
            Due::EndRequest(why) => return self.end_request(key, why),
            Due::Close(reason) => return self.close_client(key, reason),
        }
        if self.drain_deadline(key).is_some_and(|at| at <= self.cx.now) {
            if self.requests.clients.get(key).is_some_and(Client::is_leaving) {
                return self.close_client(key, CloseReason::Drained);
            }
            self.mark_due(key);
        }
        self.look_after_upload(key);
        self.arm_client(key);
    }

    /// What a request lacked that has waited for a connection for as long as it may.
    fn why_it_waited(&mut self, key: Key<Client>, error: ErrorReply) -> ErrorReply {
        let ErrorReply::QueueTimeout(limit) = error else { return error };
        match self.requests.queue.line_of(key) {
            Some(Line::Endpoint(endpoint)) if !self.pools.table.is_connected(Some(endpoint)) => {
                if self.is_bound_to_source() {
                    ErrorReply::NoneReachable(limit)
                } else {
                    ErrorReply::Unreachable
                }
            }
            Some(Line::Any) if !self.pools.table.is_connected(None) => {
                ErrorReply::NoneReachable(limit)
            }
            _ => error,
        }
    }

    /// Ends a request that holds a connection while its client takes too long to send it.
    fn look_after_upload(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        let Some(backend) = client.backend.filter(|_| is_late(client, self.cx.now)) else { return };
        let waiting = self.requests.queue.waiting(Line::Any)
            + self.requests.queue.waiting(Line::Endpoint(backend.endpoint));
        if let Some(limit) = client.upload.on_deadline(waiting > 0, self.cx.now) {
            if client.has_part() {
                return self.close_client(key, CloseReason::ClientTimeout);
            }
            self.give_up(key, ErrorReply::Unfinished(limit));
        }
    }

    /// The worker drains: clients with nothing under way are to leave.
    pub(in crate::worker) fn look_after_all_clients(&mut self) {
        for slot in 0..self.requests.clients.slots() {
            if let Some(key) = self.requests.clients.key_at(slot) {
                self.mark_due(key);
            }
        }
    }

    /// Sends a client away that has nothing under way. Says whether it is gone or on its way.
    ///
    /// It is closed at once, which it sees as the ordinary end. A request that is in its socket by
    /// then is served first; who sends one later sees the end, or a reset, in place of an answer, as
    /// at any server that closes an idle connection.
    fn leaves_for_drain(&mut self, key: Key<Client>) -> bool {
        let Some(client) = self.requests.clients.get(key) else { return true };
        if !client.is_reading() || !client.input.is_empty() {
            return false;
        }
        let conn = client.conn;
        if self.drain_deadline(key).is_some_and(|at| at > self.cx.now)
            || self.cx.driver.unheard(conn) == Unheard::Bytes
        {
            return false;
        }
        if client.unsent() == 0 && self.cx.driver.undelivered(conn) == 0 {
            self.close_client(key, CloseReason::Drained);
            return true;
        }
        // A reset in answer to what it may send would overtake its last answer.
        self.say_goodbye(key);
        false
    }

    /// In a drain, how long a client is waited for that has not begun to ask or is to leave.
    fn drain_deadline(&self, key: Key<Client>) -> Option<Instant> {
        let since = self.acceptor.drains_since?;
        let client = self.requests.clients.get(key)?;
        if client.is_leaving() {
            return (client.unsent() == 0).then(|| client.active() + limits::DRAIN_PATIENCE);
        }
        let age = client.age(self.cx.now);
        let accepted = self.cx.now.checked_sub(age)?;
        // Whoever came while newcomers were still welcome is to be served once.
        let announced = self.cx.config.drain_delay + limits::DRAIN_PATIENCE;
        let is_newcomer = accepted + announced >= since;
        let is_silent = client.is_reading() && client.input.is_empty() && !client.has_begun();
        let waits = is_silent && is_newcomer;
        waits.then(|| accepted.max(since) + limits::DRAIN_PATIENCE)
    }

    /// Sets a client's timer, if it does not fire early enough anyway: requests come and go far
    /// more often than their time limits do.
    pub(in crate::worker) fn arm_client(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        let upload = client.upload.deadline().filter(|_| client.is_streaming());
        let deadline = client.deadline(&self.requests.limits);
        let drain = self.drain_deadline(key);
        let Some(deadline) = [deadline, upload, drain].into_iter().flatten().min() else { return };
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        if client.timer.is_none_or(|timer| deadline < timer) {
            client.timer = Some(deadline);
            self.cx.timers.set(client.conn.index(), deadline);
        }
    }

    pub(in crate::worker) fn close_client(&mut self, key: Key<Client>, reason: CloseReason) {
        self.requests.queue.leave(key);
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        // A connection is clean when every request on it was answered in full.
        let cut = client.unsent() > 0 || client.is_exchanging() || client.request().is_some();
        let lingers = client.is_leaving() && client.unsent() == 0;
        let outcome = match reason {
            CloseReason::IdleTimeout | CloseReason::ClientTimeout if client.holds_itself_up() => {
                Outcome::ClientTimeout
            }
            CloseReason::IdleTimeout => Outcome::Timeout,
            _ => Outcome::ClientGone,
        };
        if client.is_exchanging() {
            let slow_backend = outcome == Outcome::Timeout;
            self.discard_backend(
                key,
                if slow_backend { Discard::Timeout } else { Discard::Abandoned },
            );
        } else {
            self.release_backend(key);
        }
        if let Some(request) = self.requests.clients.get(key).and_then(Client::uncounted) {
            self.cx.stats.count_request(request.verb, outcome, Duration::ZERO);
        }
        let Some(mut client) = self.requests.clients.remove(key) else { return };
        self.cx.driver.buffers().clear(&mut client.input);
        self.cx.timers.clear(client.conn.index());
        self.owner(client.conn);
        match reason {
            // It gets what its backend had sent.
            CloseReason::BackendReset => self.reset_behind(client.conn),
            CloseReason::HalfCloseTimeout if lingers => {
                // It has been told its end already, and may still be taking what came before.
                if self.cx.driver.undelivered(client.conn) > 0 {
                    self.reset_behind(client.conn);
                } else {
                    self.cx.driver.close(client.conn, Close::Graceful);
                }
            }
            _ if cut => self.cx.driver.close(client.conn, Close::Reset),
            _ => self.cx.driver.close(client.conn, how_to_close(reason)),
        }
        self.on_session_gone(reason, client.age(self.cx.now));
        tracing::trace!(reason = ?reason, "client closed");
    }

    pub(in crate::worker) fn close_all_clients(&mut self, reason: CloseReason) {
        for slot in 0..self.requests.clients.slots() {
            if let Some(key) = self.requests.clients.key_at(slot) {
                self.close_client(key, reason);
            }
        }
    }

    /// Takes the connections of an endpoint that left the set long enough ago from their clients.
    pub(in crate::worker) fn reclaim_from(&mut self, endpoint: EndpointId) {
        for slot in 0..self.requests.clients.slots() {
            if let Some(key) = self.requests.clients.key_at(slot)
                && self
                    .requests
                    .clients
                    .get(key)
                    .and_then(|c| c.backend)
                    .is_some_and(|l| l.endpoint == endpoint)
            {
                self.lose(key, Discard::Endpoint, Retry::Ended);
            }
        }
    }

    /// Takes the connections of an endpoint from the clients that have no request on them.
    pub(in crate::worker) fn discard_idle_in_use_of(&mut self, endpoint: EndpointId) {
        for slot in 0..self.requests.clients.slots() {
            if let Some(key) = self.requests.clients.key_at(slot)
                && let Some(client) = self.requests.clients.get(key)
                && client.backend.is_some_and(|backend| backend.endpoint == endpoint)
                && client.is_reading()
            {
                self.discard_backend(key, Discard::Dead);
            }
        }
    }

    /// The endpoints have changed: whoever waits may have another one to go to.
    pub(in crate::worker) fn place_waiting_again(&mut self) {
        for key in self.requests.queue.serve_all() {
            if let Some(client) = self.requests.clients.get_mut(key) {
                client.on_placed_again();
                self.mark_due(key);
            }
        }
    }

    /// Has connections made for those that wait, where the last attempt may have come to nothing.
    pub(in crate::worker) fn look_after_queue(&mut self) {
        if self.requests.queue.is_empty() {
            return;
        }
        let anywhere = self.requests.queue.waiting(Line::Any);
        for endpoint in self.pools.table.indices() {
            self.pass_over(endpoint);
            let waiting = anywhere + self.requests.queue.waiting(Line::Endpoint(endpoint));
            let Some(entry) = self.pools.table.get_mut(endpoint) else { continue };
            entry.pool.stop_wanting();
            let missing = waiting.saturating_sub(entry.pool.connecting());
            if entry.is_present() {
                self.want(endpoint, missing);
                self.free(endpoint);
            }
        }
    }

    /// What holds an event of a client or of its backend.
    pub(in crate::worker) fn on_client_broken(&mut self, key: Key<Client>, side: Side) {
        match side {
            Side::Client => self.close_client(key, CloseReason::ClientReset),
            Side::Backend => self.on_backend_died(key, Retry::Broken),
        }
    }
}

/// Whether it is a client's turn to send, and it should have sent by now.
fn is_late(client: &Client, now: Instant) -> bool {
    client.is_streaming() && client.upload.deadline().is_some_and(|deadline| deadline <= now)
}
