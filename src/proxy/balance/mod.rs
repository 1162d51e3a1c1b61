//! The endpoints as one worker sees them, and which one serves the next session.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`entry`] | one endpoint: its pool, health, share |
//! | [`choose`] | which one serves the next session or request |
//! | [`tier`] | which endpoints may be chosen at all, where some stand in for others |
//! | [`latency`] | how long an endpoint takes to answer, where that decides |
//! | [`outstanding`] | the requests without a reply, by age |
//! | [`conns`] | the ways in which connections change hands, each of which keeps all books |
//! | [`held`] | what this worker has of the places that all workers share |

mod choose;
mod conns;
mod entry;
mod held;
mod latency;
mod outstanding;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod tier;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use choose::{Fit, Having};
pub use conns::Totals;
pub use entry::Entry;

use outstanding::Outstanding;
use tier::Tiers;

use super::WorkerId;
use super::endpoints::{EndpointId, EndpointSnapshot};
use super::route::{self, StableHash};
use crate::config::{Balance, PoolConfig};
use crate::limits::{ENDPOINTS_MAX, WORKERS_MAX};

/// A store as a worker sees it; see [`super::endpoints::Store`].
#[derive(Debug)]
pub struct Store {
    /// Its declared name.
    pub name: Arc<str>,
    /// Its endpoint, if it is there.
    pub endpoint: Option<EndpointId>,
    /// Why it is not, where that is more than that it is away.
    pub why: Option<Arc<str>>,
}

/// The table of endpoints. An index stays an endpoint's own while anything refers to it.
#[derive(Debug)]
pub struct Table {
    entries: Vec<Option<Entry>>,
    /// The connections of all of them.
    totals: Totals,
    /// Those that the latest snapshot names, in its order.
    present: Vec<EndpointId>,
    /// When the latest of them joined others.
    joined_at: Option<Instant>,
    /// The stores that share the keys, if keys say where requests go.
    stores: Vec<Store>,
    /// The hashes of their names, in the same order.
    names: Vec<StableHash>,
    policy: Balance,
    tiers: Tiers,
    /// What is waited for, where latency decides.
    outstanding: Option<Outstanding>,
    worker: WorkerId,
    turn: usize,
    /// The turns of the endpoint that was chosen last, before it was.
    turns: u64,
    /// The next one chosen has the turn of another one, which was passed over.
    substitutes: bool,
    /// Workers that are to be woken: a place was passed on to them, or others want one of theirs.
    wakes: Vec<WorkerId>,
}

impl Table {
    /// An empty table for worker number `worker`, with room for what connections in `slots` slots
    /// wait for.
    pub fn new(policy: Balance, worker: WorkerId, slots: usize) -> Self {
        let measures = policy == Balance::PeakEwma;
        Self {
            outstanding: measures.then(|| Outstanding::new(slots)),
            entries: Vec::new(),
            totals: Totals::default(),
            present: Vec::new(),
            joined_at: None,
            stores: Vec::new(),
            names: Vec::new(),
            policy,
            tiers: Tiers::default(),
            worker,
            turn: worker.into(),
            turns: 0,
            substitutes: false,
            wakes: Vec::with_capacity(WORKERS_MAX),
        }
    }

    /// Puts a snapshot in force: known endpoints keep their pools and counts, new ones come in,
    /// and missing ones get no new session. Applying it twice changes nothing.
    ///
    /// With `slow_start`, an endpoint that joins others gets less than its share at first.
    pub fn apply(
        &mut self,
        snapshot: &EndpointSnapshot,
        pool: &PoolConfig,
        slow_start: bool,
        now: Instant,
    ) {
        let joins = slow_start && !self.present.is_empty();
        let is_first = !self.has_entries();
        for entry in self.entries.iter_mut().flatten() {
            entry.present = false;
            entry.removed_at.get_or_insert(now);
        }
        self.present.clear();
        let mut indices = Vec::with_capacity(snapshot.endpoints.len());
        let known = self.entries.iter().enumerate().filter_map(|(index, entry)| {
            entry.as_ref().map(|entry| (Arc::as_ptr(&entry.endpoint), index))
        });
        let known: HashMap<_, _> = known.collect();
        let mut vacant = 0;
        for (at, endpoint) in snapshot.endpoints.iter().take(ENDPOINTS_MAX).enumerate() {
            // An endpoint that comes back finds its entry while anything of it lives.
            let index = known.get(&Arc::as_ptr(endpoint)).copied();
            let Some(index) = index.or_else(|| self.vacant(&mut vacant)) else {
                // Sessions hold on to as many that left: there is no number for one more.
                indices.push(None);
                continue;
            };
            let worker = self.worker;
            let entry = self.entries[index]
                .get_or_insert_with(|| Entry::new(endpoint, worker, pool, joins, now));
            let was_there = entry.removed_at.is_some() && !entry.is_gone();
            if !was_there {
                entry.joined_at = (!is_first).then_some(now);
            }
            entry.present = true;
            (entry.removed_at, entry.gone_at) = (None, None);
            entry.tier = snapshot.tier_of(at);
            entry.health.set_fails_check(endpoint.fails_check());
            self.present.push(EndpointId::at(index));
            indices.push(Some(EndpointId::at(index)));
        }
        let present = self.present.iter().filter_map(|&index| self.get(index));
        self.joined_at = present.filter_map(|entry| entry.joined_at).max();
        let endpoint = |at: usize| indices.get(at).copied().flatten();
        let stores = snapshot.stores.iter().map(|store| Store {
            name: Arc::clone(&store.name),
            endpoint: store.endpoint.and_then(endpoint),
            why: store.why.clone(),
        });
        self.stores = stores.collect();
        let names = self.stores.iter().map(|store| StableHash::of(store.name.as_bytes()));
        self.names = names.collect();
        self.forget_unused();
        self.on_tiers_known(now);
    }

    /// The number of the store that holds a key, whether it is there or not.
    pub fn owner(&self, key: StableHash) -> Option<u16> {
        route::owner(key, &self.names).map(|at| at as u16)
    }

    /// The store of this number, as long as there are so many.
    pub fn store(&self, number: u16) -> Option<&Store> {
        self.stores.get(usize::from(number))
    }

    /// How many stores there are, whoever of them is there.
    pub fn stores(&self) -> u16 {
        self.stores.len() as u16
    }

    /// Whether there is a connection to an endpoint, or to any.
    pub fn is_connected(&self, endpoint: Option<EndpointId>) -> bool {
        self.present.iter().filter(|&&index| endpoint.is_none_or(|one| one == index)).any(
            |&index| {
                let entry = self.entries[usize::from(index)].as_ref();
                // Where others have all places, there is one, only not here.
                let is_connected = |entry: &Entry| entry.pool.idle() + entry.pool.in_use() > 0;
                entry.is_some_and(|entry| is_connected(entry) || !entry.has_room())
            },
        )
    }

    /// Frees the entries of endpoints that are gone and to which nothing refers any more, in any worker.
    /// Where very many left just now, they are not waited for.
    pub fn forget_unused(&mut self) {
        let crowded = self.entries.len() > 2 * ENDPOINTS_MAX;
        for slot in &mut self.entries {
            // What another worker's session is about may come to this one.
            let is_over = |entry: &Entry| entry.is_gone() && !entry.endpoint.has_sessions();
            let over = |entry: &Entry| !entry.present && (is_over(entry) || crowded);
            if slot.as_ref().is_some_and(|entry| over(entry) && entry.is_unused()) {
                *slot = None;
            }
        }
        while self.entries.last().is_some_and(Option::is_none) {
            self.entries.pop();
        }
    }

    /// The first free index from a position on, which moves behind it.
    fn vacant(&mut self, from: &mut usize) -> Option<usize> {
        while self.entries.get(*from).is_some_and(Option::is_some) {
            *from += 1;
        }
        if *from == self.entries.len() {
            if *from >= EndpointId::COUNT_MAX {
                return None;
            }
            self.entries.push(None);
        }
        *from += 1;
        Some(*from - 1)
    }

    /// The entry at an index.
    pub fn get(&self, index: EndpointId) -> Option<&Entry> {
        self.entries.get(usize::from(index))?.as_ref()
    }

    /// The entry at an index.
    pub fn get_mut(&mut self, index: EndpointId) -> Option<&mut Entry> {
        self.entries.get_mut(usize::from(index))?.as_mut()
    }

    /// All indices in use, removed endpoints included.
    pub fn indices(&self) -> impl Iterator<Item = EndpointId> + use<> {
        (0..self.entries.len()).map(EndpointId::at)
    }

    /// Whether the latest snapshot was empty, or there was none yet.
    pub fn is_empty(&self) -> bool {
        self.present.is_empty()
    }

    /// Whether any endpoint of the latest snapshot is usable.
    pub fn any_usable(&self) -> bool {
        let entries = self.present.iter().map(|&index| self.entries[usize::from(index)].as_ref());
        entries.flatten().any(|entry| entry.health.is_usable())
    }

    /// Whether no endpoint is usable: see [`Entry::is_usable`].
    pub fn is_outage(&self, now: Instant) -> bool {
        let entries = self.present.iter().map(|&index| self.entries[usize::from(index)].as_ref());
        !entries.flatten().any(|entry| entry.is_usable(now))
    }

    /// Whether another endpoint has taken the place of one that left: it has joined since, or less than
    /// `before` ahead of that.
    pub fn is_replaced(&self, index: EndpointId, before: Duration) -> bool {
        let left = self.get(index).and_then(|entry| entry.removed_at);
        let joined = self.joined_at;
        left.is_some_and(|left| joined.is_some_and(|joined| joined + before >= left))
    }

    /// Whether there is any endpoint to look after, removed ones included.
    pub fn has_entries(&self) -> bool {
        self.entries.iter().any(Option::is_some)
    }

    /// How many endpoints the latest snapshot names.
    pub fn len(&self) -> usize {
        self.present.len()
    }

    /// The endpoint with the connection that has been idle for longest, of those for which
    /// `may_give` holds. A probe is not given: closed too early it says nothing, and its endpoint would
    /// stay ejected.
    pub fn oldest_idle(&self, may_give: impl Fn(EndpointId, &Entry) -> bool) -> Option<EndpointId> {
        let entries = self.entries.iter().enumerate();
        let entries = entries.filter_map(|(i, entry)| Some((EndpointId::at(i), entry.as_ref()?)));
        entries
            .filter(|(index, entry)| !entry.health.is_probing() && may_give(*index, entry))
            .filter_map(|(index, entry)| Some((entry.pool.oldest_since()?, index)))
            .min()
            .map(|(_, index)| index)
    }
}
