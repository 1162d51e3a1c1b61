//! Who waits for a first byte for longer than `AEGIS_SLOW_FIRST_BYTE`, so that a backend that has
//! stopped answering is noticed before it answers.
//!
//! A part of all sessions and clients is looked at with each upkeep. Who sends to a server that answers
//! when it likes is told from who is owed an answer by the others: who had waited for too long when the
//! endpoint last answered anybody is not counted.

use std::time::{Duration, Instant};

use super::Route;
use crate::io::Driver;
use crate::limits;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::request::Client;
use crate::proxy::session::Session;
use crate::slab::Key;
use crate::worker::context::Context;
use crate::worker::owners::Turns;

/// How far the look at all of them has come.
#[derive(Debug, Default)]
pub(super) struct Overdue {
    turns: Turns,
    /// Those that it has found so far.
    found: u64,
}

impl Route {
    /// Looks at the next part of those that may wait.
    pub(super) fn look_for_overdue<D: Driver>(&mut self, cx: &Context<D>) {
        let Some(limit) = self.config.slow_first_byte else { return };
        let clients = &self.requests.clients;
        let slots = if self.reuses_conns() { clients.slots() } else { self.sessions.slots() };
        for _ in 0..slots.div_ceil(limits::OVERDUE_TURNS) {
            let slot = self.overdue.turns.next(slots);
            self.overdue.found += u64::from(self.is_slot_overdue(cx, slot, limit));
            if slot == 0 {
                self.stats.overdue.set(std::mem::take(&mut self.overdue.found));
            }
        }
    }

    fn is_slot_overdue<D: Driver>(&self, cx: &Context<D>, slot: usize, limit: Duration) -> bool {
        let (sessions, clients) = (&self.sessions, &self.requests.clients);
        let waits = if self.reuses_conns() {
            let client = clients.key_at(slot).and_then(|key| clients.get(key));
            client.and_then(Client::asked_since)
        } else {
            let session = sessions.key_at(slot).and_then(|key| sessions.get(key));
            session.filter(|session| !session.may_still_ask(cx.now, limit)).and_then(asked_since)
        };
        waits.is_some_and(|waits| self.is_overdue(cx, waits, limit))
    }

    /// A session is about to be closed, maybe since its client has lost patience.
    pub(super) fn count_left_overdue<D: Driver>(&self, cx: &Context<D>, key: Key<Session>) {
        let Some(limit) = self.config.slow_first_byte else { return };
        let waits = self.sessions.get(key).and_then(asked_since);
        if waits.is_some_and(|waits| self.is_overdue(cx, waits, limit)) {
            self.stats.left_overdue.add(1);
        }
    }

    fn is_overdue<D: Driver>(
        &self,
        cx: &Context<D>,
        (endpoint, since): (EndpointId, Instant),
        limit: Duration,
    ) -> bool {
        let from = since + limit;
        cx.now >= from
            && self.pools.table.get(endpoint).is_some_and(|entry| entry.is_mute_since(from))
    }
}

/// The endpoint that a session waits for, and since when.
fn asked_since(session: &Session) -> Option<(EndpointId, Instant)> {
    session.endpoint().zip(session.asked_since())
}
