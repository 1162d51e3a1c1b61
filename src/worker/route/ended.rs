//! Tells of sessions and requests that have ended, where somebody wants to know.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Route;
use crate::config::EndsLogged;
use crate::io::{ConnId, Driver};
use crate::metrics::{CloseReason, Outcome};
use crate::protocol::Verb;
use crate::proxy::endpoints::Endpoint;
use crate::proxy::request::Client;
use crate::proxy::session::{Attempts, Session};
use crate::proxy::{Bytes, Side};
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

    /// The endpoint of the latest attempt, unless it is gone: its number may be another's by now.
    fn endpoint(&self, attempts: Option<Attempts>) -> Option<Arc<Endpoint>> {
        let Attempts { endpoint, at, .. } = attempts?;
        let entry = self.pools.table.get(endpoint).filter(|entry| entry.since() <= at)?;
        Some(Arc::clone(&entry.endpoint))
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
            endpoint: self.endpoint(session.attempts()),
            attempts: session.attempts().map_or(0, |attempts| attempts.count),
            ended_first: session.ended_first().or(how.broken()),
            bytes: session.bytes(),
            lasted: session.age(cx.now),
            placed: session.placed_within(),
            first_byte,
            transfer,
        });
    }

    /// A client is about to be closed for which there is no place.
    pub(super) fn tell_of_refused<D: Driver>(
        &self,
        cx: &mut Context<D>,
        client: ConnId,
        reason: CloseReason,
    ) {
        let how = How::Session(reason);
        if self.tells_of(cx, how) {
            cx.ends.tell(self.end_of_conn(cx, Some(client), how, Duration::ZERO));
        }
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
            let end = self.end_of(cx, client, how, lasted);
            let ended_first = client.ended_first().or(how.broken());
            cx.ends.tell(End { ended_first, bytes: client.bytes(), ..end });
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
            let end = self.end_of(cx, client, how, took);
            let course = client.course();
            let since = |at: Instant| cx.now.saturating_duration_since(at);
            let answered = course.and_then(|course| Some((course, course.answered?)));
            cx.ends.tell(End {
                bytes: course.map(|course| course.bytes).unwrap_or_default(),
                placed: course.map(|course| took.saturating_sub(since(course.attempts.at))),
                first_byte: answered.map(|(course, at)| at - course.attempts.at),
                transfer: answered.map(|(_, at)| since(at)),
                ..end
            });
        }
    }

    fn end_of<D: Driver>(
        &self,
        cx: &Context<D>,
        client: &Client,
        how: How,
        lasted: Duration,
    ) -> End {
        let attempts = client.course().map(|course| course.attempts);
        End {
            endpoint: self.endpoint(attempts),
            attempts: attempts.map_or(0, |attempts| attempts.count),
            ..self.end_of_conn(cx, client.conn(Side::Client), how, lasted)
        }
    }

    /// Of a connection of which no more is known.
    fn end_of_conn<D: Driver>(
        &self,
        cx: &Context<D>,
        conn: Option<ConnId>,
        how: How,
        lasted: Duration,
    ) -> End {
        End {
            route: self.id,
            how,
            client: conn.and_then(|conn| cx.driver.peer_address(conn)),
            endpoint: None,
            attempts: 0,
            ended_first: how.broken(),
            bytes: Bytes::default(),
            lasted,
            placed: None,
            first_byte: None,
            transfer: None,
        }
    }
}
