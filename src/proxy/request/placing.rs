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
    /// To the store of this number, which is not there.
    Away(u16),
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
        let lacking = match destination {
            Destination::Any if self.table.is_empty() => Some(Line::Any),
            // It has no other home.
            Destination::Away(store) => Some(Line::Store(store)),
            _ => None,
        };
        if let Some(line) = lacking {
            return self.await_an_endpoint(client, line);
        }
        client.on_endpoints(self.now);
        match destination {
            Destination::Endpoint(endpoint) => self.place_at(endpoint),
            Destination::Any => self.place_anywhere(&client.tried(), rng),
            Destination::Done => Placement::Done,
            Destination::Away(_) => unreachable!("it awaits its endpoint"),
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
                let number = match client.target() {
                    Target::Any => return Destination::Any,
                    Target::Store(number) if number > 0 && self.table.store(number).is_none() => {
                        return Destination::Done;
                    }
                    Target::Store(number) => number,
                    // Where no store is known, it waits for the first.
                    Target::Key(hash) => self.table.owner(hash).unwrap_or_default(),
                };
                let endpoint = self.table.store(number).and_then(|store| store.endpoint);
                endpoint.map_or(Destination::Away(number), Destination::Endpoint)
            }
        }
    }

    /// There is no endpoint for the request, which waits for one in this line.
    fn await_an_endpoint(&self, client: &mut Client, line: Line) -> Placement {
        let limits = &self.policy.limits;
        if client.on_no_endpoint(limits, self.now) > self.now {
            return self.wait(line, None);
        }
        Placement::Fail(match line {
            Line::Store(_) if !self.table.is_empty() => ErrorReply::Unreachable,
            Line::Store(_) if limits.endpoint.is_zero() => ErrorReply::NoneKnown,
            _ => ErrorReply::NoEndpoint(limits.endpoint),
        })
    }

    fn place_at(&self, endpoint: EndpointId) -> Placement {
        // An endpoint may have left the set since a request to all of them began.
        let entry = self.table.get(endpoint).filter(|entry| entry.is_present());
        let Some(entry) = entry else { return Placement::Fail(ErrorReply::Unreachable) };
        let (has_idle, fails_check) = (entry.pool.idle() > 0, entry.health.fails_check());
        let has_failed = !entry.health.is_usable() && !has_idle && entry.pool.backs_off(self.now);
        if (fails_check || has_failed) && !self.waits_for_endpoints() {
            // It has just been tried, and another store would give a wrong answer.
            return Placement::Fail(ErrorReply::Unreachable);
        }
        let line = Line::Endpoint(endpoint);
        if has_idle && !fails_check && self.queue.waiting(line) == 0 {
            return Placement::Acquire(endpoint, None);
        }
        self.wait(line, (!fails_check).then_some((endpoint, Having::Room)))
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

    /// Whether requests wait for an endpoint that is not usable.
    fn waits_for_endpoints(&self) -> bool {
        !self.policy.limits.endpoint.is_zero()
    }

    fn wait(&self, line: Line, supply: Option<(EndpointId, Having)>) -> Placement {
        if self.is_full(line) {
            let nowhere = self.table.is_empty();
            return Placement::Fail(if nowhere {
                ErrorReply::NoneKnown
            } else {
                ErrorReply::QueueFull
            });
        }
        Placement::Wait(line, supply)
    }

    /// Whether no further request may wait in a line.
    fn is_full(&self, line: Line) -> bool {
        let is_full = |coming| match self.policy.binding {
            // Those that wait for one store are not to be in the way of those that another would serve.
            Binding::Key => self.queue.is_line_full(line, coming),
            Binding::Nothing | Binding::Source => self.queue.is_full(line, coming),
        };
        is_full(0)
            && is_full(match line {
                Line::Any => self.table.conns_coming(None),
                Line::Endpoint(endpoint) => self.table.conns_coming(Some(endpoint)),
                Line::Store(_) => 0,
            })
    }

    /// Whether requests wait that a connection to this endpoint would do for.
    pub fn is_waited_for(&self, endpoint: EndpointId) -> bool {
        self.waiting_for(endpoint) > 0
    }

    fn waiting_for(&self, endpoint: EndpointId) -> usize {
        self.queue.waiting(Line::Any) + self.queue.waiting(Line::Endpoint(endpoint))
    }

    /// Whether requests wait for an endpoint that has no alternative, be it ejected or not. `any_usable`:
    /// see [`Table::any_usable`].
    pub fn is_needed(&self, endpoint: EndpointId, any_usable: bool) -> bool {
        if self.table.get(endpoint).is_none_or(Entry::is_withheld) {
            return false;
        }
        self.queue.waiting(Line::Endpoint(endpoint)) > 0
            || (self.queue.waiting(Line::Any) > 0 && !any_usable)
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
        let serves = entry.is_some_and(|entry| !entry.is_withheld());
        if serves && (may_come || self.table.is_connected(Some(endpoint))) {
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
        let is_usable = self.table.get(endpoint).is_some_and(|entry| entry.health.is_usable());
        if is_usable || self.waits_for_endpoints() {
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
    /// that takes one.
    pub fn lacks_endpoint(&self, client: Key<Client>, error: ErrorReply) -> bool {
        let line = self.queue.line_of(client);
        matches!(error, ErrorReply::QueueTimeout(_))
            && line.is_some_and(|line| !self.is_connected(line))
    }

    /// Whether there are connections for those in a line, be they in use or all with other workers.
    fn is_connected(&self, line: Line) -> bool {
        match line {
            Line::Any => self.table.is_connected(None),
            Line::Store(_) => false,
            Line::Endpoint(endpoint) => {
                let entry = self.table.get(endpoint);
                !entry.is_some_and(|entry| entry.health.fails_check())
                    && self.table.is_connected(Some(endpoint))
            }
        }
    }

    /// Whether requests wait for a store that is not usable, whatever others are: they feel an outage.
    pub fn feels_outage(&self) -> bool {
        let is_usable = |entry: &Entry| entry.is_usable(self.now) && !entry.is_withheld();
        self.waits_for_store(|line| match line {
            Line::Endpoint(endpoint) => self.table.get(endpoint).is_some_and(is_usable),
            Line::Any | Line::Store(_) => false,
        })
    }

    /// Whether requests wait for a store without a connection to it: an outage that they feel goes on.
    pub fn lacks_store(&self) -> bool {
        self.waits_for_store(|line| self.is_connected(line))
    }

    fn waits_for_store(&self, is_there: impl Fn(Line) -> bool) -> bool {
        if self.policy.binding != Binding::Key || self.queue.is_empty() {
            return false;
        }
        let line = |number| match self.table.store(number).and_then(|store| store.endpoint) {
            Some(endpoint) => Line::Endpoint(endpoint),
            None => Line::Store(number),
        };
        let mut lines = (0..self.table.stores().max(1)).map(line);
        lines.any(|line| self.queue.waiting(line) > 0 && !is_there(line))
    }

    /// What a client's request lacked that has waited for a connection for as long as it may.
    pub fn why_it_waited(&self, client: Key<Client>, error: ErrorReply) -> ErrorReply {
        let limit = match error {
            ErrorReply::QueueTimeout(limit) => limit,
            ErrorReply::NoEndpoint(limit) if !self.table.is_empty() => limit,
            _ => return error,
        };
        match self.queue.line_of(client) {
            Some(line) if self.is_connected(line) => ErrorReply::QueueTimeout(limit),
            Some(Line::Endpoint(_) | Line::Store(_)) if self.policy.binding == Binding::Key => {
                ErrorReply::Unreachable
            }
            Some(_) => ErrorReply::NoneReachable(limit),
            None => ErrorReply::QueueTimeout(limit),
        }
    }
}
