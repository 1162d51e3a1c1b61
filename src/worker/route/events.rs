//! From what the driver and the clock tell of a connection to whom it belongs.

use std::io;

use super::Route;
use super::pools::leads_back;
use crate::io::{Buf, Completion, ConnId, Driver};
use crate::metrics::Retry;
use crate::proxy::Side;
use crate::worker::context::Context;
use crate::worker::flush;
use crate::worker::owners::{Owned, Owner};

impl Route {
    /// Something has happened on a connection of this route.
    pub(in crate::worker) fn on_event<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        completion: Completion,
    ) {
        match completion {
            Completion::Connected(conn) => self.on_connected(cx, conn),
            Completion::ConnectFailed(conn, error) => self.on_connect_failed(cx, conn, &error),
            Completion::Received(conn, buf) => self.on_received(cx, conn, buf),
            Completion::Spliced(conn, bytes) => {
                if let Some(&Owner::Session(key, side)) = cx.owners.get(conn) {
                    let outcome = self.sessions.on_spliced(cx, key, side, bytes);
                    self.follow(cx, key, outcome);
                }
            }
            Completion::Sent(conn, bytes) => self.on_sent(cx, conn, bytes),
            Completion::Ended(conn) => self.on_conn_ended(cx, conn),
            Completion::ReceiveFailed(conn) => self.on_conn_broken(cx, conn),
            Completion::SendFailed(conn) => self.on_conn_takes_nothing(cx, conn),
            Completion::Accepted(..) | Completion::AcceptFailed(_) | Completion::Woken => {
                unreachable!("it is of no route's connection: {completion:?}")
            }
        }
    }

    fn on_connected<D: Driver>(&mut self, cx: &mut Context<D>, conn: ConnId) {
        if self.pools.leads_back(cx, conn) {
            return self.on_connect_failed(cx, conn, &leads_back());
        }
        match cx.owners.take(conn) {
            Owner::Session(session, _) => self.on_session_connected(cx, session, conn),
            Owner::Connecting { endpoint, since } => {
                self.on_pool_connected(cx, endpoint, conn, since);
            }
            _ => {}
        }
    }

    fn on_connect_failed<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        conn: ConnId,
        error: &io::Error,
    ) {
        match cx.owners.take(conn) {
            Owner::Session(session, _) => self.on_session_connect_failed(cx, session, conn, error),
            Owner::Connecting { endpoint, .. } => {
                self.on_pool_connect_failed(cx, endpoint, conn, error);
            }
            _ => {}
        }
    }

    fn on_received<D: Driver>(&mut self, cx: &mut Context<D>, conn: ConnId, buf: Buf) {
        match cx.owners.get(conn) {
            Some(&Owner::Session(key, side)) => {
                let outcome = self.sessions.on_received(cx, key, side, buf);
                self.follow(cx, key, outcome);
            }
            Some(&Owner::Client(client)) => self.on_client_received(cx, client, buf),
            Some(&Owner::InUse(client)) => self.on_reply(cx, client, buf),
            Some(Owner::Idle { .. }) => self.on_greeting(cx, conn, buf),
            _ => cx.driver.buffers().give(buf),
        }
    }

    fn on_sent<D: Driver>(&mut self, cx: &mut Context<D>, conn: ConnId, bytes: u32) {
        match cx.owners.get(conn) {
            Some(&Owner::Session(key, side)) => {
                let outcome = self.sessions.on_sent(cx, key, side, bytes);
                self.follow(cx, key, outcome);
            }
            Some(&Owner::Client(client)) => self.on_client_sent(cx, client, bytes),
            Some(&Owner::InUse(client)) => self.on_backend_sent(cx, client, bytes),
            _ => {}
        }
    }

    fn on_conn_ended<D: Driver>(&mut self, cx: &mut Context<D>, conn: ConnId) {
        match cx.owners.get(conn) {
            Some(&Owner::Session(session, side)) => self.on_ended(cx, session, side),
            Some(&Owner::Client(client)) => self.on_client_ended(cx, client),
            Some(&Owner::InUse(client)) => self.on_backend_died(cx, client, Retry::Ended),
            Some(&Owner::Idle { endpoint, .. }) => self.on_idle_died(cx, endpoint, conn),
            _ => {}
        }
    }

    fn on_conn_broken<D: Driver>(&mut self, cx: &mut Context<D>, conn: ConnId) {
        match cx.owners.get(conn) {
            Some(&Owner::Session(session, side)) => self.on_receive_failed(cx, session, side),
            Some(&Owner::Client(client)) => self.on_client_broken(cx, client, Side::Client),
            Some(&Owner::InUse(client)) => self.on_client_broken(cx, client, Side::Backend),
            Some(&Owner::Idle { endpoint, .. }) => self.on_idle_died(cx, endpoint, conn),
            Some(Owner::Flushing(_)) => flush::end(cx, conn),
            _ => {}
        }
    }

    fn on_conn_takes_nothing<D: Driver>(&mut self, cx: &mut Context<D>, conn: ConnId) {
        match cx.owners.get(conn) {
            Some(&Owner::Session(session, side)) => {
                self.apply_event(cx, session, |session, now| session.on_send_failed(side, now));
            }
            Some(&Owner::Client(client)) => self.on_client_broken(cx, client, Side::Client),
            Some(&Owner::InUse(client)) => self.on_backend_broken(cx, client),
            Some(Owner::Flushing(_)) => flush::end(cx, conn),
            _ => {}
        }
    }

    /// The time of a connection's timer has come.
    pub(in crate::worker) fn on_timer<D: Driver>(&mut self, cx: &mut Context<D>, slot: usize) {
        let &Owned { conn, ref owner, .. } = cx.owners.at(slot);
        match *owner {
            Owner::Session(session, Side::Client) => self.on_session_deadline(cx, session),
            Owner::Session(_, Side::Backend) | Owner::Connecting { .. } => {
                self.on_connect_failed(cx, conn, &io::ErrorKind::TimedOut.into());
            }
            Owner::Client(client) => self.on_client_deadline(cx, client),
            Owner::Flushing(flushing) => flush::on_timer(cx, conn, flushing),
            Owner::InUse(_) | Owner::Idle { .. } | Owner::None => {
                debug_assert!(false, "a timer of {owner:?}, for whom none is set");
            }
        }
    }
}
