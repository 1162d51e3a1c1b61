//! From a connection to an answer, or to an error in its place.

use std::sync::Arc;

use crate::config::PoolMode;
use crate::io::{Buf, Close, Driver};
use crate::metrics::{CloseReason, Direction, Discard, Outcome, Retry};
use crate::proxy::request::{Client, ErrorReply, Reply, write_away, write_error_reply};
use crate::slab::Key;
use crate::worker::engine::Engine;

impl<D: Driver> Engine<D> {
    /// A backend sent bytes on a connection that a client holds.
    pub(in crate::worker) fn on_reply(&mut self, key: Key<Client>, mut buf: Buf) {
        let limit = self.in_flight_limit();
        let Some(client) = self.requests.clients.get_mut(key).filter(|client| client.is_asked())
        else {
            // Between two requests of a session, or behind an answer that came early.
            self.cx.driver.buffers().give(buf);
            return self.lose(key, Discard::Unexpected, Retry::Broken);
        };
        let backend = client.backend.as_mut().map(|backend| {
            backend.served = true;
            *backend
        });
        if let Some(backend) = backend {
            self.on_endpoint_answered(backend.endpoint, backend.made);
        }
        let Some(client) = self.requests.clients.get_mut(key) else {
            return self.cx.driver.buffers().give(buf);
        };
        let buffers = self.cx.driver.buffers();
        let reply = client.on_reply(buffers.bytes(&buf), self.cx.now);
        if let Reply::Surplus(count) = reply {
            buffers.set_len(&mut buf, count);
        }
        if let Some(broadcast) = &mut client.broadcast {
            broadcast.on_reply(buffers.bytes(&buf));
            buffers.give(buf);
        } else {
            self.cx.stats.bytes.of(Direction::ToClient).add(u64::from(buf.len()));
            client.on_queued(buf.len());
            self.cx.driver.send(client.conn, buf);
        }
        match reply {
            Reply::Opaque => {
                self.finish(key, Outcome::Answered);
                self.turn_opaque(key);
            }
            Reply::Partial => {
                // A slow client holds its backend up rather than the worker's buffers.
                if client.unsent() >= limit
                    && client.backend_receiving
                    && let Some(backend) = client.backend
                {
                    client.backend_receiving = false;
                    self.cx.driver.receive(backend.conn, false);
                }
                self.arm_client(key);
            }
            Reply::Complete => self.on_answer_complete(key),
            Reply::Surplus(_) => {
                self.discard_backend(key, Discard::Unexpected);
                self.on_answer_complete(key);
            }
        }
    }

    fn on_answer_complete(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        if client.on_answer_complete() {
            return self.end_exchange(key);
        }
        if let Some((request, took)) = client.count(self.cx.now) {
            self.cx.stats.count_request(request.verb, Outcome::Answered, took);
        }
        self.mark_due(key);
    }

    /// The answer has come, and the request was passed on as far as it can be.
    pub(in crate::worker) fn end_exchange(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        let (keeps_alive, is_cut) = (client.keeps_alive(), client.is_cut());
        if client.is_answered()
            && let Some(backend) = &mut client.backend
        {
            backend.unread = true;
        }
        if client.is_broken() {
            self.discard_backend(key, Discard::Dead);
        } else if client.is_passed_on() && !keeps_alive {
            // It may still have to read the end of it.
            self.close_backend(key, Discard::Spent, Close::Graceful);
        } else if !keeps_alive {
            self.discard_backend(key, Discard::Spent);
        } else if self.cx.config.pool.mode == PoolMode::Request || self.is_backend_obsolete(key) {
            // At the end of the turn, when it is known that nothing came behind.
            self.requests.releasing.push(key);
        }
        if is_cut {
            return self.cut_off(key, Outcome::Answered);
        }
        self.on_answered(key, keeps_alive);
    }

    pub(in crate::worker) fn is_backend_obsolete(&mut self, key: Key<Client>) -> bool {
        let backend = self.requests.clients.get(key).and_then(|client| client.backend);
        let entry = backend.and_then(|backend| self.pools.table.get_mut(backend.endpoint));
        let aged =
            backend.and_then(|backend| backend.retire_at).is_some_and(|at| at <= self.cx.now);
        aged || entry.is_some_and(|entry| entry.is_gone())
    }

    pub(in crate::worker) fn on_answered(&mut self, key: Key<Client>, keeps_alive: bool) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        if let Some(broadcast) = &mut client.broadcast {
            broadcast.on_answered();
            return self.next_store(key);
        }
        self.finish(key, Outcome::Answered);
        if !keeps_alive {
            self.say_goodbye(key);
        }
    }

    /// Ends our direction to a client behind all that it is told, and waits for it to leave.
    pub(in crate::worker) fn say_goodbye(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        client.on_leaving(self.cx.now);
        self.cx.driver.shutdown(client.conn);
        self.mark_due(key);
    }

    /// Goes on with the next store of a request to all of them, or answers it.
    pub(in crate::worker) fn next_store(&mut self, key: Key<Client>) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        let Some(broadcast) = &mut client.broadcast else { return };
        if self.pools.table.store(broadcast.store + 1).is_some() {
            broadcast.store += 1;
            client.on_next_store(self.cx.now);
            return self.mark_due(key);
        }
        if let Some(broadcast) = client.broadcast.take() {
            self.say(key, |space| broadcast.write_answer(space));
        }
        self.finish(key, Outcome::Answered);
    }

    /// A request is over.
    pub(in crate::worker) fn finish(&mut self, key: Key<Client>, outcome: Outcome) {
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        if let Some((request, took)) = client.finish(self.cx.driver.buffers(), self.cx.now) {
            self.cx.stats.count_request(request.verb, outcome, took);
        }
        self.mark_due(key);
    }

    /// A request gets an error in place of an answer.
    pub(in crate::worker) fn give_up(&mut self, key: Key<Client>, error: ErrorReply) {
        self.requests.queue.leave(key);
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        let cut_off = client.has_part();
        if client.is_asked() {
            let slow_client = matches!(error, ErrorReply::Unfinished(_));
            let why = if slow_client { Discard::Abandoned } else { Discard::Timeout };
            self.discard_backend(key, why);
        }
        let store = self.store_of(key).map(|store| Arc::clone(&store.name));
        let Some(client) = self.requests.clients.get_mut(key) else { return };
        if let Some(broadcast) = &mut client.broadcast {
            match store {
                Some(store) if error.is_of_a_store() => {
                    broadcast.on_away(&store);
                }
                _ => broadcast.on_failed(error),
            }
            return self.next_store(key);
        }
        if cut_off {
            return self.cut_off(key, error.outcome());
        }
        self.tell(key, error);
        self.finish(key, error.outcome());
        if self.cx.config.protocol.facts().ends_after_error {
            self.say_goodbye(key);
        }
    }

    /// A client that has a part of an answer gets no more of it.
    pub(in crate::worker) fn cut_off(&mut self, key: Key<Client>, outcome: Outcome) {
        self.finish(key, outcome);
        self.close_client(key, CloseReason::BackendReset);
    }

    pub(in crate::worker) fn tell(&mut self, key: Key<Client>, error: ErrorReply) {
        let protocol = self.cx.config.protocol;
        // That no connection came in time is mostly the same, found out more slowly.
        if error.is_of_a_store()
            && let Some(store) = self.store_of(key)
        {
            let (name, why) = (Arc::clone(&store.name), store.why.clone());
            let said = (error != ErrorReply::Unreachable).then(|| error.to_string());
            let why = match error {
                ErrorReply::QueueTimeout(_) => said.as_deref().or(why.as_deref()),
                _ => why.as_deref().or(said.as_deref()),
            };
            return self.say(key, |space| write_away(protocol, error, &name, why, space));
        }
        self.say(key, |space| write_error_reply(protocol, error, space));
    }

    /// Sends a client words of our own.
    pub(in crate::worker) fn say(
        &mut self,
        key: Key<Client>,
        write: impl FnOnce(&mut [u8]) -> usize,
    ) {
        let buffers = self.cx.driver.buffers();
        let Some(mut buf) = buffers.take() else {
            return self.close_client(key, CloseReason::Overload);
        };
        let len = write(buffers.space(&mut buf));
        buffers.set_len(&mut buf, len);
        let Some(client) = self.requests.clients.get_mut(key) else { return buffers.give(buf) };
        client.on_queued(len as u32);
        self.cx.driver.send(client.conn, buf);
    }
}
