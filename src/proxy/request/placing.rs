//! From a request to a connection: which endpoint it goes to, which line it waits in, and whom a connection
//! serves that has become idle.

use std::net::IpAddr;
use std::time::Instant;

use super::{Client, ErrorReply, Policy, Target};
use crate::metrics::Spillover;
use crate::proxy::balance::{Entry, Having, Table};
use crate::proxy::endpoints::EndpointId;
use crate::proxy::queue::{Line, Queue};
use crate::proxy::session::Tried;
use crate::slab::Key;

/// What says which endpoints a request may go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    /// Nothing: all endpoints do as well.
    Nothing,
    /// Its client's address, as long as a connection to that endpoint can be had.
    Source,
    /// Its key. Some go to all stores.
    Key,
}

/// What becomes of a request that wants a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// It acquires an idle connection of this endpoint, the next one that is proved to be open and
    /// silent. Where none is, ask again: the endpoint has no idle connection then.
    Acquire(EndpointId, Option<Spillover>),
    /// It joins this line. An endpoint that has room gets one more connection, and one that has an
    /// idle one serves those that wait.
    Wait(Line, Option<(EndpointId, Having)>),
    /// It gets an error.
    Fail(ErrorReply),
    /// All stores have had it: its client gets their replies as one.
    Done,
}

/// What becomes of a request that waits for an endpoint of which no connection can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unserved {
    /// It goes to another endpoint.
    PassedOver(Key<Client>),
    /// It gets an error.
    Failed(Key<Client>, ErrorReply),
}

/// Where a request has to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Destination {
    /// To whichever endpoint.
    Any,
    /// To this one only.
    Endpoint(EndpointId),
    /// To a store that is not there.
    Away,
    /// To no further store: all have had it.
    Done,
}

/// The endpoints and the queue, as requests are placed by them.
pub struct Placing<'a> {
    /// The endpoints and their pools.
    pub table: &'a mut Table,
    /// Those that wait.
    pub queue: &'a mut Queue,
    /// What the configuration says.
    pub policy: &'a Policy,
    /// The time.
    pub now: Instant,
}

impl Placing<'_> {
    /// Where a client's request goes that has no connection. `source` is the client's address, which
    /// only [`Binding::Source`] needs.
    pub fn place(
        &mut self,
        client: &mut Client,
        source: Option<IpAddr>,
        rng: &mut fastrand::Rng,
    ) -> Placement {
        self.table.judge_tiers(self.now);
        let destination = self.destination(client, source);
        if destination == Destination::Any && self.table.is_empty() {
            return self.await_an_endpoint(client);
        }
        client.on_endpoints(self.now);
        match destination {
            Destination::Endpoint(endpoint) => self.place_at(endpoint),
            Destination::Any => self.place_anywhere(&client.tried(), rng),
            Destination::Done => Placement::Done,
            // It has no other home, and may be away for long.
            Destination::Away if self.table.is_empty() => Placement::Fail(ErrorReply::NoneKnown),
            Destination::Away => Placement::Fail(ErrorReply::Unreachable),
        }
    }

    fn destination(&self, client: &Client, source: Option<IpAddr>) -> Destination {
        match self.policy.binding {
            Binding::Nothing => Destination::Any,
            Binding::Source => {
                // The same one as long as it can be reached. Clients of a Unix socket have no address.
                let chosen = source.and_then(|source| {
                    self.table.choose_for_source(&client.tried(), Some(source), self.now)
                });
                chosen.map_or(Destination::Any, Destination::Endpoint)
            }
            Binding::Key => {
                let store = match client.target() {
                    Target::Any => return Destination::Any,
                    Target::Store(number) if number > 0 && self.table.store(number).is_none() => {
                        return Destination::Done;
                    }
                    Target::Store(number) => self.table.store(number),
                    Target::Key(hash) => {
                        self.table.owner(hash).and_then(|number| self.table.store(number))
                    }
                };
                let endpoint = store.and_then(|store| store.endpoint);
                endpoint.map_or(Destination::Away, Destination::Endpoint)
            }
        }
    }

    /// There is no endpoint at all: the request waits for one.
    fn await_an_endpoint(&self, client: &mut Client) -> Placement {
        let limits = &self.policy.limits;
        if client.on_no_endpoint(limits, self.now) <= self.now {
            return Placement::Fail(ErrorReply::NoEndpoint(limits.endpoint));
        }
        self.wait(Line::Any, None)
    }

    fn place_at(&self, endpoint: EndpointId) -> Placement {
        // An endpoint may have left the set since a request to all of them began.
        let entry = self.table.get(endpoint).filter(|entry| entry.is_present());
        let Some(entry) = entry else { return Placement::Fail(ErrorReply::Unreachable) };
        let has_idle = entry.pool.idle() > 0;
        if entry.health.fails_check() {
            return Placement::Fail(ErrorReply::Unreachable);
        }
        if !entry.health.is_usable() && !has_idle && entry.pool.backs_off(self.now) {
            // It has just been tried, and another store would give a wrong answer.
            return Placement::Fail(ErrorReply::Unreachable);
        }
        let line = Line::Endpoint(endpoint);
        if has_idle && self.queue.waiting(line) == 0 {
            return Placement::Acquire(endpoint, None);
        }
        self.wait(line, Some((endpoint, Having::Room)))
    }

    fn place_anywhere(&mut self, tried: &Tried, rng: &mut fastrand::Rng) -> Placement {
        let prefers_near = self.policy.prefers_near;
        let now = self.now;
        let mut choose =
            |tried: &Tried| self.table.choose_for_request(tried, None, prefers_near, now, rng);
        // A connection that broke says little about the next one to the same endpoint.
        let chosen = choose(tried).or_else(|| choose(&Tried::default()));
        match chosen {
            Some((endpoint, Having::Idle)) if self.queue.waiting(Line::Any) == 0 => {
                let far = self.table.get(endpoint).is_some_and(|entry| !entry.endpoint.is_near());
                Placement::Acquire(endpoint, (prefers_near && far).then_some(Spillover::Few))
            }
            chosen => self.wait(Line::Any, chosen),
        }
    }

    fn wait(&self, line: Line, supply: Option<(EndpointId, Having)>) -> Placement {
        if self.queue.is_full() {
            let nowhere = self.table.is_empty();
            return Placement::Fail(if nowhere {
                ErrorReply::NoneKnown
            } else {
                ErrorReply::QueueFull
            });
        }
        Placement::Wait(line, supply)
    }

    /// Whether requests wait that a connection to this endpoint would do for.
    pub fn is_waited_for(&self, endpoint: EndpointId) -> bool {
        self.waiting_for(endpoint) > 0
    }

    fn waiting_for(&self, endpoint: EndpointId) -> usize {
        self.queue.waiting(Line::Any) + self.queue.waiting(Line::Endpoint(endpoint))
    }

    /// Whether requests wait for an endpoint that has no alternative, be it ejected or not.
    pub fn is_needed(&self, endpoint: EndpointId) -> bool {
        if self.table.get(endpoint).is_none_or(Entry::is_withheld) {
            return false;
        }
        self.queue.waiting(Line::Endpoint(endpoint)) > 0
            || (self.queue.waiting(Line::Any) > 0 && !self.table.any_usable())
    }

    /// Takes out of the queue whom the idle connection of an endpoint serves, if it has one: the
    /// request that has waited longest, of those that it would do for.
    pub fn serve(&mut self, endpoint: EndpointId) -> Option<Key<Client>> {
        let entry = self.table.get(endpoint)?;
        if !entry.is_present() || entry.is_withheld() || entry.pool.idle() == 0 {
            return None;
        }
        self.queue.serve_either(Line::Endpoint(endpoint), Line::Any)
    }

    /// Takes the next request out of the queue that would rather go to this endpoint, if no connection
    /// to that can be had: it goes to another one.
    pub fn pass_over(&mut self, endpoint: EndpointId) -> Option<Key<Client>> {
        if self.policy.binding != Binding::Source {
            return None;
        }
        let entry = self.table.get(endpoint);
        let may_come = entry.is_some_and(|e| e.health.is_usable() && !e.pool.backs_off(self.now));
        if may_come || self.table.is_connected(Some(endpoint)) {
            return None;
        }
        self.queue.serve(Line::Endpoint(endpoint))
    }

    /// A connect to an endpoint failed. Takes the next request out of the queue that need not wait
    /// for it any longer.
    pub fn miss(&mut self, endpoint: EndpointId) -> Option<Unserved> {
        if self.policy.binding == Binding::Source {
            return self.pass_over(endpoint).map(Unserved::PassedOver);
        }
        if self.table.get(endpoint).is_some_and(|entry| entry.health.is_usable()) {
            return None;
        }
        let client = self.queue.serve(Line::Endpoint(endpoint))?;
        Some(Unserved::Failed(client, ErrorReply::Unreachable))
    }

    /// How many connections to an endpoint are missing for those that wait, whatever was wanted before:
    /// an attempt may have come to nothing. None if it is not to be connected to.
    pub fn missing(&mut self, endpoint: EndpointId) -> Option<usize> {
        let waiting = self.waiting_for(endpoint);
        let entry = self.table.get_mut(endpoint)?;
        entry.pool.stop_wanting();
        let may_come = entry.is_present() && !entry.is_withheld();
        may_come.then(|| waiting.saturating_sub(entry.pool.connecting()))
    }

    /// Whether a client's request that has waited for a connection for as long as it may lacks an endpoint
    /// that takes one, whichever.
    pub fn waits_for_any_endpoint(&self, client: Key<Client>, error: ErrorReply) -> bool {
        matches!(error, ErrorReply::QueueTimeout(_))
            && self.queue.line_of(client) == Some(Line::Any)
            && !self.table.is_connected(None)
    }

    /// What a client's request lacked that has waited for a connection for as long as it may.
    pub fn why_it_waited(&self, client: Key<Client>, error: ErrorReply) -> ErrorReply {
        let limit = match error {
            ErrorReply::QueueTimeout(limit) => limit,
            ErrorReply::NoEndpoint(limit) if !self.table.is_empty() => limit,
            _ => return error,
        };
        match self.queue.line_of(client) {
            Some(Line::Endpoint(endpoint)) if !self.table.is_connected(Some(endpoint)) => {
                if self.policy.binding == Binding::Source {
                    ErrorReply::NoneReachable(limit)
                } else {
                    ErrorReply::Unreachable
                }
            }
            Some(Line::Any) if !self.table.is_connected(None) => ErrorReply::NoneReachable(limit),
            _ => ErrorReply::QueueTimeout(limit),
        }
    }
}
