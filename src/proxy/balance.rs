//! The endpoints as one worker sees them, and which one serves the next session.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::net::IpAddr;
use std::sync::Arc;

use super::endpoints::{Endpoint, EndpointSnapshot};
use super::health::Health;
use super::pool::Pool;
use super::session::Tried;
use crate::config::{Balance, PoolConfig};
use crate::limits::ENDPOINTS_MAX;
use crate::telemetry::EndpointStats;

/// One endpoint of one worker.
#[derive(Debug)]
pub struct Entry {
    /// The endpoint, shared with the other workers and the control thread.
    pub endpoint: Arc<Endpoint>,
    /// Its warm connections.
    pub pool: Pool,
    /// Its health.
    pub health: Health,
    /// Sessions on it, those still connecting included.
    pub sessions: u32,
    worker: usize,
    present: bool,
}

impl Entry {
    /// This worker's counters of the endpoint.
    pub fn stats(&self) -> &EndpointStats {
        &self.endpoint.stats[self.worker]
    }

    /// Whether the latest snapshot names it.
    pub fn is_present(&self) -> bool {
        self.present
    }

    fn is_unused(&self) -> bool {
        self.sessions == 0 && self.pool.idle() == 0 && self.pool.connecting() == 0
    }
}

/// The table of endpoints. An index stays an endpoint's own while anything refers to it.
#[derive(Debug)]
pub struct Table {
    entries: Vec<Option<Entry>>,
    /// Those that the latest snapshot names, in its order.
    present: Vec<u16>,
    policy: Balance,
    worker: usize,
    turn: usize,
}

impl Table {
    /// An empty table for worker number `worker`.
    pub fn new(policy: Balance, worker: usize) -> Self {
        Self { entries: Vec::new(), present: Vec::new(), policy, worker, turn: worker }
    }

    /// Puts a snapshot in force: known endpoints keep their pools and counts, new ones come in,
    /// and missing ones get no new session. Applying it twice changes nothing.
    pub fn apply(&mut self, snapshot: &EndpointSnapshot, pool: &PoolConfig) {
        for entry in self.entries.iter_mut().flatten() {
            entry.present = false;
        }
        self.present.clear();
        for endpoint in snapshot.endpoints.iter().take(ENDPOINTS_MAX) {
            let known = self.entries.iter().position(|entry| {
                entry.as_ref().is_some_and(|entry| Arc::ptr_eq(&entry.endpoint, endpoint))
            });
            let index = known.unwrap_or_else(|| self.vacant());
            let worker = self.worker;
            let entry = self.entries[index].get_or_insert_with(|| Entry {
                endpoint: Arc::clone(endpoint),
                pool: Pool::new(pool),
                health: Health::default(),
                sessions: 0,
                worker,
                present: true,
            });
            entry.present = true;
            self.present.push(index as u16);
        }
        self.forget_unused();
    }

    /// Frees the entries of removed endpoints to which nothing refers any more.
    pub fn forget_unused(&mut self) {
        for slot in &mut self.entries {
            if slot.as_ref().is_some_and(|entry| !entry.present && entry.is_unused()) {
                *slot = None;
            }
        }
    }

    fn vacant(&mut self) -> usize {
        self.entries.iter().position(Option::is_none).unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        })
    }

    /// The entry at an index.
    pub fn get_mut(&mut self, index: u16) -> Option<&mut Entry> {
        self.entries.get_mut(usize::from(index))?.as_mut()
    }

    /// All indices in use, removed endpoints included.
    pub fn indices(&self) -> impl Iterator<Item = u16> + use<> {
        0..self.entries.len() as u16
    }

    /// Whether the latest snapshot was empty, or there was none yet.
    pub fn is_empty(&self) -> bool {
        self.present.is_empty()
    }

    /// The endpoint for a session's next attempt: a usable one that it has not tried, or, should
    /// none be left, any that it has not tried.
    pub fn choose(
        &mut self,
        tried: &Tried,
        source: Option<IpAddr>,
        rng: &mut fastrand::Rng,
    ) -> Option<u16> {
        self.turn = self.turn.wrapping_add(1);
        self.pick(tried, source, rng, true).or_else(|| self.pick(tried, source, rng, false))
    }

    fn pick(
        &self,
        tried: &Tried,
        source: Option<IpAddr>,
        rng: &mut fastrand::Rng,
        usable_only: bool,
    ) -> Option<u16> {
        let count = self.present.len();
        // Starting each time one further on makes equals take turns.
        let candidates = (0..count)
            .map(|i| self.present[(self.turn + i) % count])
            .filter(|&index| !tried.contains(index))
            .filter_map(|index| Some((index, self.entries[usize::from(index)].as_ref()?)))
            .filter(|(_, entry)| !usable_only || entry.health.is_usable());
        let chosen = match self.policy {
            Balance::RoundRobin => {
                let mut candidates = candidates;
                candidates.next()
            }
            Balance::LeastConn => candidates.min_by_key(|(_, entry)| entry.sessions),
            Balance::RandomTwo => {
                let all = candidates.clone().count();
                if all == 0 {
                    return None;
                }
                let first = rng.usize(..all);
                let second = if all > 1 { (first + rng.usize(1..all)) % all } else { first };
                let drawn = candidates.enumerate().filter(|(i, _)| *i == first || *i == second);
                drawn.map(|(_, candidate)| candidate).min_by_key(|(_, entry)| entry.sessions)
            }
            Balance::SourceHash => candidates.max_by_key(|(_, entry)| {
                // Rendezvous hashing (Thaler and Ravishankar): only the sources of an endpoint
                // that goes move.
                BuildHasherDefault::<DefaultHasher>::default()
                    .hash_one((source, entry.endpoint.address))
            }),
        };
        chosen.map(|(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::ConnId;
    use crate::proxy::health::HealthConfig;
    use crate::proxy::session::Session;
    use std::time::{Duration, Instant};

    fn endpoint(number: u16) -> Arc<Endpoint> {
        Endpoint::new(format!("e{number}"), ([127, 0, 0, 1], 1000 + number).into(), 1)
    }

    fn pool() -> PoolConfig {
        PoolConfig { min_idle: 0, max_idle: 4, idle_timeout: None, max_lifetime: None }
    }

    fn table(policy: Balance, endpoints: &[Arc<Endpoint>]) -> Table {
        let mut table = Table::new(policy, 0);
        table.apply(&EndpointSnapshot { generation: 1, endpoints: endpoints.to_vec() }, &pool());
        table
    }

    fn tried(endpoints: &[u16]) -> Tried {
        let mut session = Session::new(ConnId::from_parts(0, 0), Instant::now());
        for &endpoint in endpoints {
            session.on_trying(endpoint, None);
        }
        *session.tried()
    }

    fn eject(table: &mut Table, index: u16) {
        let config = HealthConfig { eject_failures: 1, eject_time: Duration::from_secs(1) };
        let mut rng = fastrand::Rng::with_seed(1);
        table.get_mut(index).unwrap().health.on_failure(&config, Instant::now(), &mut rng);
    }

    #[test]
    fn load_is_spread_evenly_by_every_policy_but_hashing() {
        for policy in [Balance::LeastConn, Balance::RoundRobin, Balance::RandomTwo] {
            let mut rng = fastrand::Rng::with_seed(1);
            let mut table = table(policy, &[endpoint(0), endpoint(1), endpoint(2)]);
            for _ in 0..300 {
                let chosen = table.choose(&Tried::default(), None, &mut rng).unwrap();
                table.get_mut(chosen).unwrap().sessions += 1;
            }
            for index in 0..3 {
                let sessions = table.get_mut(index).unwrap().sessions;
                assert!((90..=110).contains(&sessions), "{policy:?}: {sessions}");
            }
        }
    }

    #[test]
    fn a_source_keeps_its_endpoint_when_another_one_goes() {
        let mut rng = fastrand::Rng::with_seed(1);
        let endpoints = [endpoint(0), endpoint(1), endpoint(2), endpoint(3)];
        let mut table = table(Balance::SourceHash, &endpoints);
        let source = |i: u8| Some(IpAddr::from([10, 0, 0, i]));
        let before: Vec<_> =
            (0..200).map(|i| table.choose(&Tried::default(), source(i), &mut rng)).collect();
        let rest = EndpointSnapshot { generation: 2, endpoints: endpoints[1..].to_vec() };
        table.apply(&rest, &pool());
        for (i, &was) in (0..200).zip(&before) {
            let is = table.choose(&Tried::default(), source(i), &mut rng);
            assert!(is == was || was == Some(0), "source {i} moved from {was:?} to {is:?}");
        }
        let moved = before.iter().filter(|&&index| index == Some(0)).count();
        assert!((25..80).contains(&moved), "{moved} of 200 were on one of four");
    }

    #[test]
    fn ejected_endpoints_are_passed_over_unless_there_is_no_other() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut table = table(Balance::LeastConn, &[endpoint(0), endpoint(1)]);
        eject(&mut table, 0);
        for _ in 0..10 {
            assert_eq!(table.choose(&Tried::default(), None, &mut rng), Some(1));
        }
        assert_eq!(table.choose(&tried(&[1]), None, &mut rng), Some(0));
        eject(&mut table, 1);
        assert!(table.choose(&Tried::default(), None, &mut rng).is_some());
        assert_eq!(table.choose(&tried(&[0, 1]), None, &mut rng), None);
    }

    #[test]
    fn a_snapshot_keeps_what_is_known_and_an_index_while_it_is_used() {
        let mut rng = fastrand::Rng::with_seed(1);
        let (a, b, c) = (endpoint(0), endpoint(1), endpoint(2));
        let mut table = table(Balance::RoundRobin, &[a, Arc::clone(&b)]);
        table.get_mut(0).unwrap().sessions = 1;
        table.get_mut(1).unwrap().sessions = 5;
        let next = EndpointSnapshot { generation: 2, endpoints: vec![b, c] };
        for _ in 0..2 {
            table.apply(&next, &pool());
            assert!(!table.get_mut(0).unwrap().is_present(), "removed, but a session is on it");
            assert_eq!(table.get_mut(1).unwrap().sessions, 5);
            assert_eq!(table.get_mut(2).unwrap().endpoint.name, "e2");
        }
        for _ in 0..4 {
            assert_ne!(table.choose(&Tried::default(), None, &mut rng), Some(0));
        }
        table.get_mut(0).unwrap().sessions = 0;
        table.forget_unused();
        assert!(table.get_mut(0).is_none());
    }
}
