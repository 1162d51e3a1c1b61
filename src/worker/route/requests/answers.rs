//! From a connection to an answer, or to an error in its place.

use std::sync::Arc;

use crate::io::{Buf, Driver};
use crate::metrics::{CloseReason, Direction};
use crate::proxy::request::{Client, ErrorReply, Replied, Target, write_away, write_error_reply};
use crate::slab::Key;
use crate::worker::context::Context;
use crate::worker::route::Route;

impl Route {
    /// A backend sent bytes on a connection that a client holds.
    pub(in crate::worker) fn on_reply<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        mut buf: Buf,
    ) {
        let Some((client, mut moment)) = self.client(cx, key) else {
            unreachable!("a connection in use has a client")
        };
        let Replied { passed, answered, first_byte, transfer, actions } =
            client.on_reply(&buf, &mut moment);
        first_byte.inspect(|&(took, quiet)| self.stats.count_first_byte(took, quiet));
        transfer.inspect(|&took| self.stats.transfer.record(took));
        match self.conn_of(key).filter(|_| passed > 0) {
            Some(conn) => {
                cx.driver.buffers().set_len(&mut buf, passed);
                self.stats.bytes.of(Direction::ToClient).add(passed as u64);
                cx.send(conn, buf);
            }
            None => cx.driver.buffers().give(buf),
        }
        if let Some((endpoint, conn, made)) = answered {
            self.pools.on_endpoint_answered(cx, endpoint, made);
            self.pools.table.answered(endpoint, conn, cx.now);
        }
        self.act_for(cx, key, &actions);
    }

    /// A request gets an error in place of a connection.
    pub(in crate::worker) fn fail<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        error: ErrorReply,
    ) {
        let table = &self.pools.table;
        let number = match self.requests.clients.get(key).map(Client::target) {
            Some(Target::Store(number)) => Some(number),
            Some(Target::Key(hash)) => table.owner(hash),
            Some(Target::Any) | None => None,
        };
        let store =
            number.and_then(|number| Some((number, Arc::clone(&table.store(number)?.name))));
        self.tell(cx, key, |client, moment| {
            client.fail(error, store.as_ref().map(|(number, name)| (*number, &**name)), moment)
        });
    }

    /// Sends a client an error in place of a reply, to a request for the store of this number.
    pub(super) fn reply<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        error: ErrorReply,
        store: Option<u16>,
    ) {
        let protocol = self.config.protocol;
        let Some(buf) = self.own_buffer(cx, key) else { return };
        // That no connection came in time is mostly the same, found out more slowly.
        if error.is_of_a_store()
            && let Some(store) = store.and_then(|number| self.pools.table.store(number))
        {
            let (name, why) = (Arc::clone(&store.name), store.why.clone());
            let text = (error != ErrorReply::Unreachable).then(|| error.to_string());
            let why = match error {
                ErrorReply::QueueTimeout(_) => text.as_deref().or(why.as_deref()),
                _ => why.as_deref().or(text.as_deref()),
            };
            let write = |space: &mut [u8]| write_away(protocol, error, &name, why, space);
            return self.send_own(cx, key, buf, write);
        }
        self.send_own(cx, key, buf, |space| write_error_reply(protocol, error, space));
    }

    /// All stores have had a request: its client gets their replies as one.
    pub(super) fn reply_of_all<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Client>) {
        let Some(buf) = self.own_buffer(cx, key) else { return };
        let Some((client, mut moment)) = self.client(cx, key) else {
            unreachable!("it has just been placed")
        };
        let (broadcast, actions) = client.on_stores_done(&mut moment);
        self.send_own(cx, key, buf, |space| broadcast.write_answer(space));
        self.act_for(cx, key, &actions);
    }

    /// A buffer for what no backend has written. Without one the client is closed.
    fn own_buffer<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Client>) -> Option<Buf> {
        let buf = cx.driver.buffers().take();
        if buf.is_none() {
            self.close_client(cx, key, CloseReason::Overload);
        }
        buf
    }

    /// Sends a client what no backend has written.
    fn send_own<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        mut buf: Buf,
        write: impl FnOnce(&mut [u8]) -> usize,
    ) {
        let buffers = cx.driver.buffers();
        let len = write(buffers.space(&mut buf));
        buffers.set_len(&mut buf, len);
        let Some(client) = self.requests.clients.get_mut(key) else {
            unreachable!("errors are replied with first of all")
        };
        client.on_queued(len as u32);
        if let Some(conn) = self.conn_of(key) {
            cx.send(conn, buf);
        }
    }
}
