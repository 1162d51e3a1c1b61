//! Tells of sessions and requests that have ended, where somebody wants to know.

use std::sync::Arc;
use std::time::Duration;

use super::Route;
use crate::config::EndsLogged;
use crate::io::Driver;
use crate::metrics::{CloseReason, Outcome};
use crate::protocol::Verb;
use crate::proxy::Side;
use crate::proxy::endpoints::{Endpoint, EndpointId};
use crate::proxy::request::Client;
use crate::proxy::session::Session;
use crate::slab::Key;
use crate::worker::context::Context;
use crate::worker::ends::{End, How};

/// With `sampled`, one of so many normal ends is told of.
const SAMPLED_OF: u8 = 100;

impl Route {
    fn tells_of<D: Driver>(&self, cx: &mut Context<D>, how: How) -> bool {
        let is_wanted = match self.config.log_ends {
            EndsLogged::Off => false,
            EndsLogged::Abnormal => !how.is_normal(),
            EndsLogged::Sampled => !how.is_normal() || cx.rng.u8(0..SAMPLED_OF) == 0,
            EndsLogged::All => true,
        };
        // In a storm of ends most find none: they cost no look at their client's address.
        is_wanted && cx.ends.has_room()
    }

    fn endpoint(&self, id: Option<EndpointId>) -> Option<Arc<Endpoint>> {
        Some(Arc::clone(&self.pools.table.get(id?)?.endpoint))
    }

    /// A session is about to be closed.
    pub(super) fn tell_of_session<D: Driver>(
        &self,
        cx: &mut Context<D>,
        key: Key<Session>,
        reason: CloseReason,
    ) {
        let how = How::Session(reason);
        if !self.tells_of(cx, how) {
            return;
        }
        let Some(session) = self.sessions.get(key) else { unreachable!("it is closed once") };
        let (first_byte, transfer) = session.answer_times(cx.now).unzip();
        cx.ends.tell(End {
            route: self.id,
            how,
            client: cx.driver.peer_address(session.client()),
            endpoint: self.endpoint(session.tried().last()),
            attempts: session.tried().attempts(),
            ended_first: session.ended_first(),
            bytes: Some((session.received(Side::Client), session.received(Side::Backend))),
            lasted: session.age(cx.now),
            placed: session.placed_within(),
            first_byte,
            transfer,
        });
    }

    /// A client whose requests are framed is about to be closed.
    pub(super) fn tell_of_client<D: Driver>(
        &self,
        cx: &mut Context<D>,
        key: Key<Client>,
        reason: CloseReason,
    ) {
        let how = How::Session(reason);
        let client = self.requests.clients.get(key);
        if let Some(client) = client.filter(|_| self.tells_of(cx, how)) {
            let lasted = client.age(cx.now);
            cx.ends.tell(self.end_of(cx, client, how, lasted));
        }
    }

    /// A request has ended, after so long.
    pub(super) fn tell_of_request<D: Driver>(
        &self,
        cx: &mut Context<D>,
        key: Key<Client>,
        (verb, outcome): (Verb, Outcome),
        took: Duration,
    ) {
        let how = How::Request(verb, outcome);
        if self.tells_of(cx, how)
            && let Some(client) = self.requests.clients.get(key)
        {
            cx.ends.tell(self.end_of(cx, client, how, took));
        }
    }

    fn end_of<D: Driver>(
        &self,
        cx: &Context<D>,
        client: &Client,
        how: How,
        lasted: Duration,
    ) -> End {
        let (endpoint, attempts) = client.asked().unzip();
        let conn = client.conn(Side::Client);
        End {
            route: self.id,
            how,
            client: conn.and_then(|conn| cx.driver.peer_address(conn)),
            endpoint: self.endpoint(endpoint),
            attempts: attempts.unwrap_or(0),
            ended_first: None,
            bytes: None,
            lasted,
            placed: None,
            first_byte: None,
            transfer: None,
        }
    }
}
