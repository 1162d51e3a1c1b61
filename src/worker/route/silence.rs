//! Peers that acknowledge nothing: found, and given up.
//!
//! A part of all connections is looked at with each upkeep, so that a look never holds up the worker;
//! see [`Pulse`] for which of them cost a system call. Silence of a few packets may be a lossy link.
//! So connects are made to an endpoint whose connection is silent: where they succeed, it has more
//! time; where they fail, it is ejected before the limit, as ever.

use std::io;
use std::time::{Duration, Instant};

use super::sessions::Sessions;
use super::{Requests, Route};
use crate::io::{ConnId, Driver, Unheard};
use crate::limits;
use crate::metrics::{CloseReason, Discard, Retry};
use crate::proxy::Side;
use crate::proxy::balance::Entry;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::pulse::{Patience, Pulse};
use crate::worker::context::Context;
use crate::worker::owners::{Owned, Owner, Turns};

/// How long peers may acknowledge nothing, and which connection is looked at next for that.
pub(super) struct Silence {
    /// They may for ever, where there is none.
    patience: Option<Patience>,
    turns: Turns,
}

impl Silence {
    /// Nobody was looked at. Without a limit, nobody is.
    pub(super) fn new(limit: Option<Duration>) -> Self {
        Self { patience: limit.map(|limit| Patience { limit }), turns: Turns::default() }
    }
}

/// A connection whose peer is to acknowledge what it is sent.
struct Watched<'a> {
    pulse: &'a mut Pulse,
    /// The backend's endpoint; none of a client.
    endpoint: Option<EndpointId>,
    /// An answer is to come soon.
    waits: bool,
}

/// What is known of a connection's peer, if that is looked at.
fn watched<'a>(
    owner: &Owner,
    sessions: &'a mut Sessions,
    requests: &'a mut Requests,
) -> Option<Watched<'a>> {
    match *owner {
        Owner::Session(key, side) => {
            let session = sessions.of(key);
            // One that is broken is waited for no longer.
            if !session.is_open() || session.survivor().is_some_and(|other| other != side) {
                return None;
            }
            let endpoint = session.endpoint().filter(|_| side == Side::Backend);
            Some(Watched { pulse: session.pulse(side), endpoint, waits: false })
        }
        Owner::Client(key) => {
            let client = requests.clients.get_mut(key)?;
            Some(Watched { pulse: client.pulse(Side::Client)?, endpoint: None, waits: false })
        }
        Owner::InUse(key) => {
            let client = requests.clients.get_mut(key)?;
            let endpoint = client.backend().map(|backend| backend.endpoint);
            let waits = client.is_in_flight();
            Some(Watched { pulse: client.pulse(Side::Backend)?, endpoint, waits })
        }
        // Idle ones are asked nothing, and what is flushed or made has a limit of its own.
        Owner::Idle { .. } | Owner::Connecting { .. } | Owner::Flushing(_) | Owner::None => None,
    }
}

impl Route {
    /// The endpoints, those included that left while something of them lives.
    pub(in crate::worker) fn entries(&self) -> impl Iterator<Item = &Entry> {
        let table = &self.pools.table;
        table.indices().filter_map(|endpoint| table.get(endpoint))
    }

    /// The endpoint of a connection of this owner, if it leads to one.
    pub(in crate::worker) fn entry_of(&mut self, owner: &Owner) -> Option<&mut Entry> {
        let endpoint = match *owner {
            Owner::Session(key, Side::Backend) => self.sessions.of(key).endpoint(),
            Owner::InUse(key) => self.requests.clients.get_mut(key)?.backend().map(|b| b.endpoint),
            Owner::Idle { endpoint, .. } => Some(endpoint),
            _ => None,
        };
        self.pools.table.get_mut(endpoint?)
    }

    /// Looks at the next part of the connections, all of which have their turn between two looks.
    pub(super) fn look_for_silence<D: Driver>(&mut self, cx: &mut Context<D>) {
        let Some(patience) = self.silence.patience else { return };
        let turns = patience.look_after().as_millis() / limits::UPKEEP_INTERVAL.as_millis();
        let slots = cx.owners.len();
        let mut looks = 0;
        for _ in 0..slots.div_ceil((turns as usize).max(1)) {
            if looks == limits::SILENCE_LOOKS_MAX {
                return;
            }
            let slot = self.silence.turns.next(slots);
            looks += usize::from(self.look_at(cx, slot, &patience));
        }
    }

    /// Looks at one connection, if that is due. Says whether that cost a system call.
    fn look_at<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        slot: usize,
        patience: &Patience,
    ) -> bool {
        let &Owned { conn, route, ref owner, .. } = cx.owners.at(slot);
        if route != self.id {
            return false;
        }
        let watched = watched(owner, &mut self.sessions, &mut self.requests);
        let Some(Watched { pulse, endpoint, waits }) = watched else { return false };
        let entry = endpoint.and_then(|endpoint| self.pools.table.get_mut(endpoint));
        let suspect = entry.as_ref().is_some_and(|e| e.is_gone() || !e.health.is_usable());
        let is_watched = suspect || waits;
        if !pulse.is_due(is_watched) {
            return false;
        }
        let Some(acks) = cx.driver.acks(conn) else { return true };
        // A request is to be answered soon; sessions may be silent for hours, and there are many.
        let ask_after = if is_watched { patience.look_after() } else { patience.limit };
        // Clients may be silent for as long as they like.
        let may_ask = endpoint.is_some();
        let look = pulse.look(acks, is_watched, may_ask.then_some(ask_after), cx.now);
        if let Some(on) = look.ask {
            cx.driver.ask(conn, &self.pools.options, on.then_some(ask_after));
        }
        let alive = entry.and_then(|entry| entry.alive_at());
        if let Some(since) = look.silent_since {
            self.on_silence(cx, conn, endpoint, since, alive, patience);
        }
        true
    }

    /// A peer has acknowledged nothing since then; its endpoint was last seen to be there at `alive`.
    fn on_silence<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        conn: ConnId,
        endpoint: Option<EndpointId>,
        since: Instant,
        alive: Option<Instant>,
        patience: &Patience,
    ) {
        let now = cx.now;
        let Some(endpoint) = endpoint else {
            // There is nothing else to tell by that it is there.
            if patience.is_over(since, Some(now), now) {
                self.on_client_silent(cx, conn);
            }
            return;
        };
        if patience.is_suspicious(since, now) && alive.is_none_or(|at| at <= since) {
            self.call_witnesses(cx, endpoint);
        }
        if patience.is_over(since, alive, now) {
            self.on_backend_silent(cx, conn, endpoint, since);
        }
    }

    /// Connects to an endpoint, to see whether it is there at all.
    fn call_witnesses<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) {
        let Some(entry) = self.pools.table.get_mut(endpoint) else {
            unreachable!("an endpoint is kept as long as a connection to it is in use")
        };
        if !entry.is_present() {
            return;
        }
        let under_way = entry.pool.connecting();
        let mut most = limits::SILENCE_WITNESSES.saturating_sub(under_way).min(entry.pool.room());
        if !entry.health.is_usable() {
            // The network may be back before time is up, whatever the first ones met.
            most = most.min(1);
        }
        for _ in 0..most {
            // Like probes, also where no connections are kept.
            if !self.start_connect(cx, endpoint) {
                return;
            }
        }
    }

    /// A backend's connection is given up: its peer has acknowledged nothing since then.
    fn on_backend_silent<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        conn: ConnId,
        endpoint: EndpointId,
        since: Instant,
    ) {
        let session = match cx.owners.get(conn) {
            Some(&Owner::Session(key, _)) => self.sessions.get(key),
            _ => None,
        };
        let has_ended = session.is_some_and(|session| session.has_ended(Side::Backend));
        if !has_ended && cx.driver.unheard(conn) != Unheard::Nothing {
            // It waits for whoever is to have what came before, and nobody waits for it.
            return;
        }
        // Another one does as well where neither side has said anything, its end included.
        let is_fresh = session.is_some_and(|s| s.is_untouched() && !s.has_client_left());
        self.on_endpoint_silent(cx, endpoint, since);
        match cx.owners.get(conn) {
            Some(&Owner::Session(key, _)) => {
                if is_fresh && self.move_session(cx, key, Retry::Silent) {
                    return;
                }
                self.apply_event(cx, key, |session, now| session.on_silent(Side::Backend, now));
            }
            Some(&Owner::InUse(key)) => self.lose(cx, key, Discard::Silent, Retry::Silent),
            _ => {}
        }
    }

    /// What was made before an endpoint fell silent shares the fate of the connection that showed it.
    fn on_endpoint_silent<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        since: Instant,
    ) {
        let now = cx.now;
        self.pools.evict_made_before(cx, endpoint, since);
        self.discard_idle_in_use_of(cx, endpoint, Discard::Dead);
        let Some(entry) = self.pools.table.get_mut(endpoint) else { return };
        if entry.is_present() && entry.alive_at().is_none_or(|at| at <= since) {
            entry.pool.on_emptied(now, &mut cx.rng);
            self.pools.on_endpoint_failure(cx, endpoint, &acknowledges_nothing());
        }
        self.pools.mark_short(endpoint);
    }

    fn on_client_silent<D: Driver>(&mut self, cx: &mut Context<D>, conn: ConnId) {
        match cx.owners.get(conn) {
            Some(&Owner::Session(key, side)) => {
                self.apply_event(cx, key, |session, now| session.on_silent(side, now));
            }
            Some(&Owner::Client(key)) => self.close_client(cx, key, CloseReason::ClientSilent),
            _ => {}
        }
    }
}

/// What an endpoint is ejected for that is gone without a word.
fn acknowledges_nothing() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it acknowledges nothing")
}
