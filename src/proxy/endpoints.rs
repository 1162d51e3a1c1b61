//! The desired set of endpoints, as discovery delivers it: a complete snapshot, never an edit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::places::Places;
use super::{RouteId, WorkerId};
use crate::io::net::Address;
use crate::metrics::{CheckStats, EndpointStats};

/// Names an endpoint within one worker, which keeps the number as long as anything refers to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId(u16);

impl EndpointId {
    /// So many can be named.
    pub const COUNT_MAX: usize = u16::MAX as usize;

    /// The endpoint at this position of the worker's table.
    ///
    /// # Panics
    /// The position is beyond [`EndpointId::COUNT_MAX`].
    pub const fn at(index: usize) -> Self {
        assert!(index < Self::COUNT_MAX, "more endpoints than can be named");
        Self(index as u16)
    }
}

impl From<EndpointId> for usize {
    fn from(id: EndpointId) -> Self {
        id.0.into()
    }
}

/// The rank of an endpoint: it is chosen only while no endpoint of a lower tier is usable.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(try_from = "u8")]
pub struct Tier(u8);

impl Tier {
    /// The one that is used while it can be.
    pub const FIRST: Self = Self(0);
    /// So many there are at most: the own zone, its region, and elsewhere.
    pub const COUNT_MAX: usize = 3;

    /// The tier behind so many others.
    ///
    /// # Panics
    /// They are [`Tier::COUNT_MAX`] or more.
    pub const fn at(index: usize) -> Self {
        assert!(index < Self::COUNT_MAX, "more tiers than there can be");
        Self(index as u8)
    }
}

impl TryFrom<u8> for Tier {
    type Error = &'static str;

    fn try_from(number: u8) -> Result<Self, Self::Error> {
        let is_one = usize::from(number) < Self::COUNT_MAX;
        is_one.then_some(Self(number)).ok_or("more tiers than there can be")
    }
}

impl From<Tier> for usize {
    fn from(tier: Tier) -> Self {
        tier.0.into()
    }
}

/// One backend address, shared by all workers.
#[derive(Debug)]
pub struct Endpoint {
    /// What users call it: as it is configured, or a pod's name. Label of its metrics.
    pub name: String,
    /// Where to connect.
    pub address: Address,
    near: AtomicBool,
    fails_check: AtomicBool,
    /// Its active checks, which the control thread counts.
    pub checks: CheckStats,
    /// The first of the workers that keep its minimum of idle connections.
    first_worker: usize,
    /// Its counters, one block per worker, indexed by worker.
    pub stats: Box<[EndpointStats]>,
    /// The places of all connections to it.
    pub places: Places,
    /// The places of those that are idle, or made to be.
    pub idle_places: Places,
}

impl Endpoint {
    /// An endpoint with fresh counters for `workers` workers.
    pub fn new(name: impl Into<String>, address: Address, workers: usize) -> Arc<Self> {
        Self::numbered(0, name, address, workers)
    }

    /// The same, of which it is known how many others were there first: so the workers that keep
    /// idle connections to each are not always the same ones.
    pub fn numbered(
        number: usize,
        name: impl Into<String>,
        address: Address,
        workers: usize,
    ) -> Arc<Self> {
        let stats = (0..workers).map(|_| EndpointStats::default()).collect();
        let (places, idle_places) = (Places::new(workers), Places::new(workers));
        Arc::new(Self {
            name: name.into(),
            address,
            near: AtomicBool::new(false),
            fails_check: AtomicBool::new(false),
            checks: CheckStats::default(),
            first_worker: number,
            stats,
            places,
            idle_places,
        })
    }

    /// How many of `count` connections to it, which all workers keep together, are this worker's.
    /// The endpoint alone says which worker has how many, so none needs to ask the others.
    pub fn share_of(&self, worker: WorkerId, count: usize) -> usize {
        let workers = self.stats.len().max(1);
        // The next endpoint goes on with the worker behind the last one that had one more.
        let first = self.first_worker.wrapping_mul(count % workers) % workers;
        let place = (usize::from(worker) + workers - first) % workers;
        count / workers + usize::from(place < count % workers)
    }

    /// Whether any worker has sessions on it.
    pub fn has_sessions(&self) -> bool {
        self.stats.iter().any(|stats| stats.sessions_active.get() > 0)
    }

    /// Whether it is preferred because it is near.
    pub fn is_near(&self) -> bool {
        self.near.load(Relaxed)
    }

    /// Whether its active checks say that it is not to be used. Workers look when a snapshot comes.
    pub fn fails_check(&self) -> bool {
        self.fails_check.load(Relaxed)
    }

    /// For the checks alone, which deliver the latest snapshot again.
    pub fn set_fails_check(&self, fails: bool) {
        self.fails_check.store(fails, Relaxed);
    }

    /// For discovery alone. It is advice that may change while the endpoint stays the same one,
    /// with its pools and counters, so it is not worth a snapshot of its own.
    pub fn set_near(&self, near: bool) {
        self.near.store(near, Relaxed);
    }
}

/// The complete, ordered set of endpoints at one moment.
///
/// Applying the same snapshot twice changes nothing. An endpoint is the same one across snapshots
/// when its `Arc` is the same: discovery hands out one `Arc` for each name and address for as long
/// as anybody holds it, though the endpoint may leave and come back.
#[derive(Debug, Default)]
pub struct EndpointSnapshot {
    /// Whose endpoints they are.
    pub route: RouteId,
    /// Grows by one with every snapshot that discovery publishes.
    pub generation: u64,
    /// The endpoints, at most [`crate::limits::ENDPOINTS_MAX`].
    pub endpoints: Vec<Arc<Endpoint>>,
    /// Their tiers, in the same order; those beyond its end are of the first one.
    pub tiers: Vec<Tier>,
    /// Where keys say where a request goes: all stores that share the keys, in the order in which
    /// they were declared. Nothing but these names says which of them holds a key.
    pub stores: Vec<Store>,
}

impl EndpointSnapshot {
    /// The tier of the endpoint at this place.
    pub fn tier_of(&self, at: usize) -> Tier {
        self.tiers.get(at).copied().unwrap_or_default()
    }
}

/// One of the stores that share the keys. It holds its keys whether it is there or not: what it
/// holds is nowhere else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    /// Its declared name: a pod's, or the configured `host:port`. Its address may change.
    pub name: Arc<str>,
    /// Where it is among the endpoints of the snapshot, if it is there.
    pub endpoint: Option<usize>,
    /// Why it is not, where that is more than that it is away.
    pub why: Option<Arc<str>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each of `workers` keeps of `count` to each of `endpoints`, and of all of them.
    fn kept(workers: usize, count: usize, endpoints: usize) -> Vec<usize> {
        let address: Address = "10.0.0.1:80".parse().unwrap();
        let endpoints: Vec<_> = (0..endpoints)
            .map(|number| Endpoint::numbered(number, "db", address.clone(), workers))
            .collect();
        for endpoint in &endpoints {
            let shares = (0..workers).map(|worker| endpoint.share_of(WorkerId::new(worker), count));
            assert_eq!(shares.sum::<usize>(), count, "{count} of {workers} workers");
        }
        let kept = |worker| endpoints.iter().map(|e| e.share_of(worker, count)).sum();
        (0..workers).map(WorkerId::new).map(kept).collect()
    }

    #[test]
    fn workers_keep_so_many_together_whatever_their_number() {
        assert_eq!(kept(1, 4, 1), [4]);
        assert_eq!(kept(3, 4, 1), [2, 1, 1]);
        assert_eq!(kept(3, 0, 1), [0; 3]);
        assert_eq!(kept(16, 4, 1), [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for workers in [1, 2, 3, 5, 16, 64, 256] {
            for count in [0, 1, 2, 3, 4, 7, 63, 64, 65, 4096] {
                kept(workers, count, 7);
            }
        }
    }

    #[test]
    fn the_shares_of_many_endpoints_are_even() {
        assert_eq!(kept(16, 4, 4), [1; 16], "each worker has one, to one of them");
        assert_eq!(kept(3, 1, 3), [1; 3]);
        for workers in [2, 3, 5, 16, 64] {
            for count in [1, 2, 3, 4, 7, 63] {
                for endpoints in [2, 3, 10, 1000] {
                    let kept = kept(workers, count, endpoints);
                    let (min, max) = (kept.iter().min().unwrap(), kept.iter().max().unwrap());
                    assert!(max - min <= 1, "{kept:?}");
                }
            }
        }
    }
}
