//! The endpoints as one worker sees them, and which one serves the next session.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::endpoints::{Endpoint, EndpointId, EndpointSnapshot};
use super::health::Health;
use super::pool::{Pool, Taken};
use super::request::BackendConn;
use super::route::{self, StableHash};
use super::session::Tried;
use crate::config::{Balance, PoolConfig};
use crate::limits::ENDPOINTS_MAX;
use crate::metrics::{EndpointStats, Spillover};

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
    /// Those of them whose clients hold a connection that was lent, and never give it back.
    opaque: u32,
    worker: usize,
    present: bool,
    /// When it left the set.
    removed_at: Option<Instant>,
    /// It left the set for good, as far as anybody can tell: see [`Entry::let_go`].
    gone: bool,
    ramp: Ramp,
    /// Turns that it has had, and those that went by while it could have none.
    turns: u64,
    /// When it last took a connection or answered.
    alive_at: Option<Instant>,
}

/// How far an endpoint that joined others is on the way to its full share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ramp {
    /// No connection to it has been made yet.
    Cold,
    /// The first one was made then; it now gets this part of its share, in percent.
    Warming {
        since: Instant,
        percent: u32,
    },
    Full,
}

/// The part of its share that an endpoint starts with, in percent.
const RAMP_PERCENT_MIN: u32 = 10;

/// A near endpoint is too loaded when the best other one has less than half of its sessions, not
/// counting the first few.
const NEAR_LOAD_FACTOR: u32 = 2;
const NEAR_LOAD_FREE: u32 = 8;

impl Entry {
    /// Moves the slow start on. An endpoint counts as warm from its first connection.
    pub fn ramp_up(&mut self, slow_start: Duration, now: Instant) {
        let warm = self.pool.idle() > 0 || self.stats().connects.get() > 0;
        self.ramp = match self.ramp {
            Ramp::Cold if warm => Ramp::Warming { since: now, percent: RAMP_PERCENT_MIN },
            Ramp::Warming { since, .. } => {
                let passed = now.saturating_duration_since(since).as_secs_f64();
                match (100.0 * passed / slow_start.as_secs_f64()) as u32 {
                    100.. => Ramp::Full,
                    percent => Ramp::Warming { since, percent: percent.max(RAMP_PERCENT_MIN) },
                }
            }
            ramp => ramp,
        };
    }

    /// It took a connection or answered: what goes to it arrives, and what comes from it as well.
    pub fn on_alive(&mut self, at: Instant) {
        self.alive_at = self.alive_at.max(Some(at));
    }

    /// When it last did that.
    pub fn alive_at(&self) -> Option<Instant> {
        self.alive_at
    }

    fn percent(&self) -> u32 {
        match self.ramp {
            Ramp::Cold => RAMP_PERCENT_MIN,
            Ramp::Warming { percent, .. } => percent,
            Ramp::Full => 100,
        }
    }

    /// Its load, as much higher as its share is smaller, and twice as high for each recent failure:
    /// an endpoint that ends its sessions at once would seem to be idle.
    fn load(&self) -> u32 {
        let load = match (self.percent(), self.health.weight()) {
            (100, 0) => return self.sessions,
            (percent, _) => (self.sessions + 1).saturating_mul(100) / percent,
        };
        load.saturating_mul(1 << self.health.weight().min(16))
    }

    /// Whether it left the set at least `drain` ago, for good, and still has sessions.
    pub fn is_overdue(&self, drain: Duration, now: Instant) -> bool {
        let passed = |at| now.saturating_duration_since(at) >= drain;
        self.sessions > 0 && self.gone && self.removed_at.is_some_and(passed)
    }

    /// Takes note of whether it left the set at least `linger` ago. Until then it may come back any
    /// moment: it gets nothing new, but what it has stays as it is.
    pub fn let_go(&mut self, linger: Duration, now: Instant) {
        self.gone |= self.removed_at.is_some_and(|at| now.saturating_duration_since(at) >= linger);
    }

    /// Whether it left the set for good.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// Lends an idle connection, if there is one. `index` is the entry's own.
    pub fn acquire(&mut self, index: EndpointId) -> Option<BackendConn> {
        let Taken { conn, made, retire_at, served, unread } = self.pool.acquire()?;
        self.stats().pool_idle.set(self.pool.idle() as u64);
        self.count_sessions(self.sessions + 1);
        Some(BackendConn { conn, endpoint: index, retire_at, made, served, unread })
    }

    /// A lent connection comes back. Says whether it is kept, which it can be only if it is
    /// `useful`; else it is to be closed.
    #[must_use = "a connection that is not kept is to be closed"]
    pub fn release(&mut self, backend: &BackendConn, useful: bool, now: Instant) -> bool {
        self.count_sessions(self.sessions - 1);
        if useful && !self.gone {
            let &BackendConn { conn, made, retire_at, served, unread, .. } = backend;
            let kept = self.pool.release(Taken { conn, made, retire_at, served, unread }, now);
            self.stats().pool_idle.set(self.pool.idle() as u64);
            return kept;
        }
        self.pool.on_discarded();
        false
    }

    /// A lent connection was closed.
    pub fn on_discarded(&mut self) {
        self.count_sessions(self.sessions - 1);
        self.pool.on_discarded();
    }

    /// A lent connection is not coming back before its client ends; it keeps its place till then.
    pub fn on_turned_opaque(&mut self) {
        self.opaque += 1;
        self.stats().sessions_opaque.set(u64::from(self.opaque));
    }

    /// A lent connection that was not to come back was closed.
    pub fn on_opaque_closed(&mut self) {
        self.opaque -= 1;
        self.stats().sessions_opaque.set(u64::from(self.opaque));
        self.on_discarded();
    }

    fn count_sessions(&mut self, sessions: u32) {
        self.sessions = sessions;
        self.stats().sessions_active.set(u64::from(sessions));
    }

    /// This worker's counters of the endpoint.
    pub fn stats(&self) -> &EndpointStats {
        &self.endpoint.stats[self.worker]
    }

    /// Whether the latest snapshot names it.
    pub fn is_present(&self) -> bool {
        self.present
    }

    fn is_unused(&self) -> bool {
        self.sessions == 0
            && self.pool.in_use() == 0
            && self.pool.idle() == 0
            && self.pool.connecting() == 0
    }
}

/// Which endpoints are looked at.
#[derive(Debug, Clone, Copy)]
enum Among {
    All,
    Usable,
    Near,
    Far,
}

/// What an endpoint must have to be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Having {
    /// Nothing.
    Anything,
    /// An idle connection.
    Idle,
    /// Room for one more connection.
    Room,
}

impl Having {
    fn holds(self, entry: &Entry) -> bool {
        match self {
            Self::Anything => true,
            Self::Idle => entry.pool.idle() > 0,
            Self::Room => entry.pool.room() > 0,
        }
    }
}

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
    /// Those that the latest snapshot names, in its order.
    present: Vec<EndpointId>,
    /// The stores that share the keys, if keys say where requests go.
    stores: Vec<Store>,
    /// The hashes of their names, in the same order.
    names: Vec<StableHash>,
    policy: Balance,
    worker: usize,
    turn: usize,
    /// The turns of the endpoint that was chosen last, before it was.
    turns: u64,
    /// The next one chosen has the turn of another one, which was passed over.
    substitutes: bool,
}

impl Table {
    /// An empty table for worker number `worker`.
    pub fn new(policy: Balance, worker: usize) -> Self {
        Self {
            entries: Vec::new(),
            present: Vec::new(),
            stores: Vec::new(),
            names: Vec::new(),
            policy,
            worker,
            turn: worker,
            turns: 0,
            substitutes: false,
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
        for endpoint in snapshot.endpoints.iter().take(ENDPOINTS_MAX) {
            // An endpoint that comes back finds its entry while anything of it lives.
            let index = known.get(&Arc::as_ptr(endpoint)).copied();
            let Some(index) = index.or_else(|| self.vacant(&mut vacant)) else {
                // Sessions hold on to as many that left: there is no number for one more.
                indices.push(None);
                continue;
            };
            let worker = self.worker;
            let entry = self.entries[index].get_or_insert_with(|| {
                // Its counters may be of an earlier time, in which it ended up anyhow.
                endpoint.stats[worker].reset_gauges();
                let min_idle = endpoint.share_of(worker, pool.min_idle);
                Entry {
                    endpoint: Arc::clone(endpoint),
                    pool: Pool::new(&PoolConfig { min_idle, ..pool.clone() }, now),
                    health: Health::default(),
                    sessions: 0,
                    opaque: 0,
                    worker,
                    present: true,
                    removed_at: None,
                    gone: false,
                    ramp: if joins { Ramp::Cold } else { Ramp::Full },
                    turns: 0,
                    alive_at: None,
                }
            });
            (entry.present, entry.gone) = (true, false);
            entry.removed_at = None;
            self.present.push(EndpointId::at(index));
            indices.push(Some(EndpointId::at(index)));
        }
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
    }

    /// The number of the store that holds a key, whether it is there or not.
    pub fn owner(&self, key: StableHash) -> Option<u16> {
        route::owner(key, &self.names).map(|at| at as u16)
    }

    /// The store of this number, as long as there are so many.
    pub fn store(&self, number: u16) -> Option<&Store> {
        self.stores.get(usize::from(number))
    }

    /// The endpoint for a request: a usable one with an idle connection, else one with room for
    /// one more, which then has to be made. And whether it is not near though near ones are
    /// preferred.
    pub fn choose_for_request(
        &mut self,
        tried: &Tried,
        source: Option<IpAddr>,
        prefers_near: bool,
        rng: &mut fastrand::Rng,
    ) -> Option<(EndpointId, Having)> {
        self.turn = self.turn.wrapping_add(1);
        let near: &[Among] =
            if prefers_near { &[Among::Near, Among::Far] } else { &[Among::Usable] };
        for &among in near {
            for having in [Having::Idle, Having::Room] {
                if let Some(index) = self.pick(tried, source, rng, among, having) {
                    self.take_turn(index);
                    return Some((index, having));
                }
            }
        }
        None
    }

    /// The endpoint that a source's requests go to: of those not tried the one that it is bound to,
    /// or the next one where that is ejected, or has just refused to be connected to.
    pub fn choose_for_source(
        &self,
        tried: &Tried,
        source: Option<IpAddr>,
        now: Instant,
    ) -> Option<EndpointId> {
        let entries = self.present.iter().filter(|&&index| !tried.contains(index));
        entries
            .filter_map(|&index| Some((index, self.entries[usize::from(index)].as_ref()?)))
            .filter(|(_, entry)| entry.health.is_usable())
            .filter(|(_, entry)| entry.pool.idle() > 0 || !entry.pool.backs_off(now))
            .max_by_key(|(_, entry)| affinity(source, entry))
            .map(|(index, _)| index)
    }

    /// Whether there is a connection to an endpoint, or to any.
    pub fn is_connected(&self, endpoint: Option<EndpointId>) -> bool {
        self.present.iter().filter(|&&index| endpoint.is_none_or(|one| one == index)).any(
            |&index| {
                let entry = self.entries[usize::from(index)].as_ref();
                entry.is_some_and(|entry| entry.pool.idle() + entry.pool.in_use() > 0)
            },
        )
    }

    /// Frees the entries of endpoints that are gone and to which nothing refers any more. Where very
    /// many left just now, they are not waited for.
    pub fn forget_unused(&mut self) {
        let crowded = self.entries.len() > 2 * ENDPOINTS_MAX;
        for slot in &mut self.entries {
            let over = |entry: &Entry| !entry.present && (entry.gone || crowded);
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

    /// Whether there is any endpoint to look after, removed ones included.
    pub fn has_entries(&self) -> bool {
        self.entries.iter().any(Option::is_some)
    }

    /// The endpoint for a session's next attempt: a usable one that it has not tried, or, should
    /// none be left, any that it has not tried.
    pub fn choose(
        &mut self,
        tried: &Tried,
        source: Option<IpAddr>,
        rng: &mut fastrand::Rng,
    ) -> Option<EndpointId> {
        self.turn = self.turn.wrapping_add(1);
        let chosen = self
            .pick(tried, source, rng, Among::Usable, Having::Anything)
            .or_else(|| self.pick(tried, source, rng, Among::All, Having::Anything));
        chosen.inspect(|&index| self.take_turn(index))
    }

    /// Whether there is a usable endpoint that was not tried.
    pub fn has_other(&self, tried: &Tried) -> bool {
        let entries = self.present.iter().filter(|&&index| !tried.contains(index));
        let mut entries = entries.filter_map(|&index| self.entries[usize::from(index)].as_ref());
        entries.any(|entry| entry.health.is_usable())
    }

    /// How many endpoints the latest snapshot names.
    pub fn len(&self) -> usize {
        self.present.len()
    }

    /// The endpoint with the connection that has been idle for longest, of those for which
    /// `may_give` holds.
    pub fn oldest_idle(&self, may_give: impl Fn(EndpointId, &Entry) -> bool) -> Option<EndpointId> {
        let entries = self.entries.iter().enumerate();
        let entries = entries.filter_map(|(i, entry)| Some((EndpointId::at(i), entry.as_ref()?)));
        entries
            .filter(|(index, entry)| may_give(*index, entry))
            .filter_map(|(index, entry)| Some((entry.pool.oldest_since()?, index)))
            .min()
            .map(|(_, index)| index)
    }

    /// An endpoint was chosen.
    fn take_turn(&mut self, index: EndpointId) {
        if !std::mem::take(&mut self.substitutes) {
            self.use_turn(index);
        }
    }

    fn use_turn(&mut self, index: EndpointId) {
        let Some(entry) = self.entries.get_mut(usize::from(index)).and_then(Option::as_mut) else {
            return;
        };
        // One that could have no turn for a while does not get all of them at once.
        let turns = entry.turns.max(self.turns);
        self.turns = turns;
        entry.turns = turns + 1;
    }

    /// The same where near endpoints are preferred, and why it is another one, if it is.
    pub fn choose_near(
        &mut self,
        tried: &Tried,
        source: Option<IpAddr>,
        rng: &mut fastrand::Rng,
    ) -> (Option<EndpointId>, Option<Spillover>) {
        self.turn = self.turn.wrapping_add(1);
        let near = self.pick(tried, source, rng, Among::Near, Having::Anything);
        let other = self.pick(tried, source, rng, Among::Far, Having::Anything);
        let load =
            |index: EndpointId| self.entries[usize::from(index)].as_ref().map_or(0, Entry::load);
        let too_much =
            |load: u32| load.saturating_mul(NEAR_LOAD_FACTOR).saturating_add(NEAR_LOAD_FREE);
        let (chosen, spilled) = match (near, other) {
            (Some(near), Some(other)) if load(near) > too_much(load(other)) => {
                (Some(other), Some(Spillover::Loaded))
            }
            (Some(near), _) => (Some(near), None),
            (None, Some(other)) => (Some(other), Some(Spillover::Few)),
            (None, None) => (self.pick(tried, source, rng, Among::All, Having::Anything), None),
        };
        (chosen.inspect(|&index| self.take_turn(index)), spilled)
    }

    fn pick(
        &mut self,
        tried: &Tried,
        source: Option<IpAddr>,
        rng: &mut fastrand::Rng,
        among: Among,
        having: Having,
    ) -> Option<EndpointId> {
        if self.policy != Balance::RoundRobin {
            return self.pick_now(tried, source, rng, among, having);
        }
        // One on its way to its full share is passed over now and then.
        let mut passed_over = *tried;
        while let Some(index) = self.pick_now(&passed_over, source, rng, among, having) {
            let percent = self.entries[usize::from(index)].as_ref().map_or(100, Entry::percent);
            if percent == 100 || rng.u32(..100) < percent {
                return Some(index);
            }
            self.use_turn(index);
            self.substitutes = true;
            let before = passed_over.attempts();
            passed_over.push(index);
            if passed_over.attempts() == before {
                return Some(index); // More than can be passed over.
            }
        }
        self.pick_now(tried, source, rng, among, having)
    }

    fn pick_now(
        &self,
        tried: &Tried,
        source: Option<IpAddr>,
        rng: &mut fastrand::Rng,
        among: Among,
        having: Having,
    ) -> Option<EndpointId> {
        let count = self.present.len();
        // Workers, and endpoints that have had as many turns, do not all begin with the same one.
        let candidates = (0..count)
            .map(|i| self.present[(self.turn + i) % count])
            .filter(|&index| !tried.contains(index))
            .filter_map(|index| Some((index, self.entries[usize::from(index)].as_ref()?)))
            .filter(|(_, entry)| having.holds(entry))
            .filter(|(_, entry)| match among {
                Among::All => true,
                Among::Usable => entry.health.is_usable(),
                Among::Near => entry.health.is_usable() && entry.endpoint.is_near(),
                Among::Far => entry.health.is_usable() && !entry.endpoint.is_near(),
            });
        // Equals take turns, whichever of the others are out of use.
        let turns = |entry: &Entry| entry.turns.max(self.turns);
        let chosen = match self.policy {
            Balance::RoundRobin => candidates.min_by_key(|(_, entry)| turns(entry)),
            Balance::LeastConn => candidates.min_by_key(|(_, entry)| (entry.load(), turns(entry))),
            Balance::RandomTwo => {
                let all = candidates.clone().count();
                if all == 0 {
                    return None;
                }
                let first = rng.usize(..all);
                let second = if all > 1 { (first + rng.usize(1..all)) % all } else { first };
                let drawn = candidates.enumerate().filter(|(i, _)| *i == first || *i == second);
                drawn
                    .map(|(_, candidate)| candidate)
                    .min_by_key(|(_, entry)| (entry.load(), turns(entry)))
            }
            Balance::SourceHash => candidates.max_by_key(|(_, entry)| affinity(source, entry)),
        };
        chosen.map(|(index, _)| index)
    }
}

/// Rendezvous hashing (Thaler and Ravishankar): only the sources of an endpoint that goes move.
fn affinity(source: Option<IpAddr>, entry: &Entry) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one((source, entry.endpoint.address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(index: u16) -> EndpointId {
        EndpointId::at(index.into())
    }

    use crate::io::ConnId;
    use crate::proxy::endpoints;
    use crate::proxy::health::HealthConfig;
    use crate::proxy::session::Session;

    fn endpoint(number: u16) -> Arc<Endpoint> {
        Endpoint::new(format!("e{number}"), ([127, 0, 0, 1], 1000 + number).into(), 1)
    }

    fn pool() -> PoolConfig {
        PoolConfig {
            mode: crate::config::PoolMode::Preconnect,
            size: 16,
            min_idle: 0,
            max_idle: 4,
            idle_timeout: None,
            max_lifetime: None,
        }
    }

    fn table(policy: Balance, endpoints: &[Arc<Endpoint>]) -> Table {
        let mut table = Table::new(policy, 0);
        table.apply(
            &EndpointSnapshot {
                generation: 1,
                endpoints: endpoints.to_vec(),
                ..EndpointSnapshot::default()
            },
            &pool(),
            true,
            Instant::now(),
        );
        table
    }

    fn tried(endpoints: &[u16]) -> Tried {
        let mut session = Session::new(ConnId::from_parts(0, 0), Instant::now());
        for &endpoint in endpoints {
            session.on_trying(at(endpoint), None);
        }
        *session.tried()
    }

    fn eject(table: &mut Table, index: EndpointId) {
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
                let sessions = table.get_mut(at(index)).unwrap().sessions;
                assert!((90..=110).contains(&sessions), "{policy:?}: {sessions}");
            }
        }
    }

    #[test]
    fn those_that_are_left_share_evenly_whichever_are_out_of_use() {
        let policies = [Balance::LeastConn, Balance::RoundRobin, Balance::RandomTwo];
        for (policy, count) in policies.into_iter().flat_map(|p| (2..=7).map(move |n| (p, n))) {
            for out in 0..(1_u32 << count) - 1 {
                let mut rng = fastrand::Rng::with_seed(1);
                let endpoints: Vec<_> = (0..count).map(endpoint).collect();
                let mut table = table(policy, &endpoints);
                let is_out = |index: u16| out & (1 << index) != 0;
                (0..count).filter(|&i| is_out(i)).for_each(|index| eject(&mut table, at(index)));
                let left = (0..count).filter(|&i| !is_out(i)).count() as u32;
                let mut chosen = vec![0; usize::from(count)];
                // Sessions end at once, so all loads are equal.
                for _ in 0..100 * left {
                    let index = table.choose(&Tried::default(), None, &mut rng).unwrap();
                    chosen[usize::from(index)] += 1;
                }
                for index in 0..count {
                    let expected = if is_out(index) { 0_u32 } else { 100 };
                    let actual: u32 = chosen[usize::from(index)];
                    let spread = if policy == Balance::RandomTwo { 30 } else { 0 };
                    let right = actual.abs_diff(expected) <= spread;
                    assert!(right, "{policy:?} {count} without {out:b}: {chosen:?}");
                }
            }
        }
    }

    #[test]
    fn what_a_refusing_endpoint_was_to_have_is_shared_by_all_others() {
        for policy in [Balance::LeastConn, Balance::RoundRobin] {
            let mut rng = fastrand::Rng::with_seed(1);
            let mut table = table(policy, &[0, 1, 2, 3].map(endpoint));
            let mut chosen = [0; 4];
            for _ in 0..400 {
                let mut index = table.choose(&Tried::default(), None, &mut rng).unwrap();
                if index == at(2) {
                    index = table.choose(&tried(&[2]), None, &mut rng).unwrap();
                }
                chosen[usize::from(index)] += 1;
            }
            for index in [0, 1, 3] {
                assert!((120..=146).contains(&chosen[index]), "{policy:?}: {chosen:?}");
            }
        }
    }

    #[test]
    fn an_endpoint_that_was_out_of_use_is_not_met_by_all_that_it_missed() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut table = table(Balance::RoundRobin, &[0, 1, 2].map(endpoint));
        eject(&mut table, at(0));
        for _ in 0..1000 {
            table.choose(&Tried::default(), None, &mut rng);
        }
        let now = Instant::now();
        table.get_mut(at(0)).unwrap().health.on_success(now, now);
        let mut chosen = [0; 3];
        for _ in 0..30 {
            chosen[usize::from(table.choose(&Tried::default(), None, &mut rng).unwrap())] += 1;
        }
        assert!(chosen.iter().all(|count| (9..=11).contains(count)), "{chosen:?}");
    }

    #[test]
    fn an_endpoint_that_fails_does_not_look_idle() {
        let config = HealthConfig { eject_failures: 1000, eject_time: Duration::from_secs(1) };
        let mut rng = fastrand::Rng::with_seed(1);
        for policy in [Balance::LeastConn, Balance::RandomTwo] {
            let mut table = table(policy, &[endpoint(0), endpoint(1)]);
            let mut failed = 0;
            for _ in 0..200 {
                let index = table.choose(&Tried::default(), None, &mut rng).unwrap();
                let entry = table.get_mut(index).unwrap();
                if index == at(0) {
                    failed += 1;
                    entry.health.on_failure(&config, Instant::now(), &mut rng);
                } else {
                    entry.sessions += 1;
                }
            }
            assert!(failed <= 10, "{policy:?}: {failed} of 200");
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
        let rest = EndpointSnapshot {
            generation: 2,
            endpoints: endpoints[1..].to_vec(),
            ..EndpointSnapshot::default()
        };
        table.apply(&rest, &pool(), true, Instant::now());
        for (i, &was) in (0..200).zip(&before) {
            let is = table.choose(&Tried::default(), source(i), &mut rng);
            assert!(is == was || was == Some(at(0)), "source {i} moved from {was:?} to {is:?}");
        }
        let moved = before.iter().filter(|&&index| index == Some(at(0))).count();
        assert!((25..80).contains(&moved), "{moved} of 200 were on one of four");
    }

    #[test]
    fn ejected_endpoints_are_passed_over_unless_there_is_no_other() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut table = table(Balance::LeastConn, &[endpoint(0), endpoint(1)]);
        eject(&mut table, at(0));
        for _ in 0..10 {
            assert_eq!(table.choose(&Tried::default(), None, &mut rng), Some(at(1)));
        }
        assert_eq!(table.choose(&tried(&[1]), None, &mut rng), Some(at(0)));
        eject(&mut table, at(1));
        assert!(table.choose(&Tried::default(), None, &mut rng).is_some());
        assert_eq!(table.choose(&tried(&[0, 1]), None, &mut rng), None);
    }

    #[test]
    fn a_snapshot_keeps_what_is_known_and_an_index_while_it_is_used() {
        let mut rng = fastrand::Rng::with_seed(1);
        let (a, b, c) = (endpoint(0), endpoint(1), endpoint(2));
        let mut table = table(Balance::RoundRobin, &[a, Arc::clone(&b)]);
        table.get_mut(at(0)).unwrap().sessions = 1;
        table.get_mut(at(1)).unwrap().sessions = 5;
        let next = EndpointSnapshot {
            generation: 2,
            endpoints: vec![b, c],
            ..EndpointSnapshot::default()
        };
        for _ in 0..2 {
            table.apply(&next, &pool(), true, Instant::now());
            assert!(!table.get_mut(at(0)).unwrap().is_present(), "removed, but a session is on it");
            assert_eq!(table.get_mut(at(1)).unwrap().sessions, 5);
            assert_eq!(table.get_mut(at(2)).unwrap().endpoint.name, "e2");
        }
        for _ in 0..4 {
            assert_ne!(table.choose(&Tried::default(), None, &mut rng), Some(at(0)));
        }
        table.get_mut(at(0)).unwrap().sessions = 0;
        table.forget_unused();
        assert!(table.get_mut(at(0)).is_some(), "it may come back");
        table.get_mut(at(0)).unwrap().let_go(Duration::ZERO, Instant::now());
        table.forget_unused();
        assert!(table.get_mut(at(0)).is_none());
    }

    #[test]
    fn an_endpoint_that_comes_back_is_what_it_was_and_is_not_drained() {
        const SECOND: Duration = Duration::from_secs(1);
        let (a, b) = (endpoint(0), endpoint(1));
        let mut table = table(Balance::RoundRobin, &[Arc::clone(&a), Arc::clone(&b)]);
        table.get_mut(at(0)).unwrap().sessions = 3;
        eject(&mut table, at(0));
        let now = Instant::now();
        let all = EndpointSnapshot {
            generation: 2,
            endpoints: vec![a, Arc::clone(&b)],
            ..EndpointSnapshot::default()
        };
        let less =
            EndpointSnapshot { generation: 3, endpoints: vec![b], ..EndpointSnapshot::default() };
        let overdue = |table: &mut Table, now| {
            let entry = table.get_mut(at(0)).unwrap();
            entry.let_go(2 * SECOND, now);
            entry.is_overdue(Duration::ZERO, now)
        };
        table.apply(&less, &pool(), true, now);
        assert!(!overdue(&mut table, now + SECOND), "it may come back");
        table.apply(&all, &pool(), true, now + SECOND);
        assert!(!overdue(&mut table, now + 9 * SECOND), "it is back");
        let entry = table.get_mut(at(0)).unwrap();
        assert_eq!((entry.sessions, entry.percent()), (3, 100), "no slow start either");
        assert!(!entry.health.is_usable(), "and what is known of it is not forgotten");
        table.apply(&less, &pool(), true, now + 9 * SECOND);
        assert!(!overdue(&mut table, now + 10 * SECOND), "its time begins anew");
        assert!(overdue(&mut table, now + 11 * SECOND));
        table.apply(&all, &pool(), true, now + 12 * SECOND);
        assert!(!overdue(&mut table, now + 20 * SECOND), "and may come back all the same");
    }

    #[test]
    fn endpoints_that_come_and_go_leave_nothing_behind() {
        let mut table = Table::new(Balance::RoundRobin, 0);
        let now = Instant::now();
        for generation in 0..5 {
            let all = (0..1000).map(|port| endpoint(1000 * generation + port)).collect();
            let snapshot = EndpointSnapshot {
                generation: u64::from(generation),
                endpoints: all,
                ..EndpointSnapshot::default()
            };
            table.apply(&snapshot, &pool(), true, now);
            assert!(table.entries.len() <= 4 * ENDPOINTS_MAX, "{}", table.entries.len());
        }
        table.apply(&EndpointSnapshot::default(), &pool(), true, now);
        table.entries.iter_mut().flatten().for_each(|entry| entry.let_go(Duration::ZERO, now));
        table.forget_unused();
        assert!(!table.has_entries() && table.entries.is_empty());
    }

    #[test]
    fn gauges_of_an_earlier_time_are_not_believed() {
        let a = endpoint(0);
        a.stats[0].ejected.set(1);
        a.stats[0].connects.add(7);
        let mut table = table(Balance::RoundRobin, &[Arc::clone(&a)]);
        assert_eq!((a.stats[0].ejected.get(), a.stats[0].connects.get()), (0, 7));
        assert!(table.get_mut(at(0)).unwrap().health.is_usable());
    }

    #[test]
    fn a_key_belongs_to_a_declared_store_whoever_is_there() {
        let all = [0, 1, 2].map(endpoint);
        let declare = |generation, there: &[u16]| EndpointSnapshot {
            generation,
            endpoints: there.iter().map(|&i| Arc::clone(&all[usize::from(i)])).collect(),
            stores: (0..3)
                .map(|i| endpoints::Store {
                    name: format!("e{i}").into(),
                    endpoint: there.iter().position(|&at| at == i),
                    why: None,
                })
                .collect(),
        };
        let mut table = Table::new(Balance::LeastConn, 0);
        let mut owners = |there: &[u16]| {
            table.apply(&declare(1, there), &pool(), true, Instant::now());
            let owner = |i: usize| {
                let store = table.owner(StableHash::of(format!("key{i}").as_bytes())).unwrap();
                let found = table.store(store).unwrap();
                let endpoint =
                    found.endpoint.and_then(|at| table.entries[usize::from(at)].as_ref());
                let name = endpoint.map(|entry| entry.endpoint.name.clone());
                assert!(name.is_none_or(|name| *name == *found.name));
                (store, found.endpoint.is_some())
            };
            (0..300).map(owner).collect::<Vec<_>>()
        };
        let before = owners(&[0, 1, 2]);
        for there in [&[0, 2][..], &[], &[2, 1, 0], &[1]] {
            for (was, is) in before.iter().zip(owners(there)) {
                assert_eq!(is, (was.0, there.contains(&was.0)), "{there:?}");
            }
        }
    }

    /// A table in which `e1` has joined `e0`.
    fn joined(policy: Balance) -> Table {
        let first = endpoint(0);
        let mut table = table(policy, &[Arc::clone(&first)]);
        let next = EndpointSnapshot {
            generation: 2,
            endpoints: vec![first, endpoint(1)],
            ..EndpointSnapshot::default()
        };
        table.apply(&next, &pool(), true, Instant::now());
        table
    }

    const SLOW_START: Duration = Duration::from_secs(100);

    #[test]
    fn an_endpoint_that_joins_warms_up_from_its_first_connection_on() {
        let mut table = joined(Balance::RoundRobin);
        assert_eq!(
            table.get_mut(at(0)).unwrap().percent(),
            100,
            "the first ones have no slow start"
        );
        let entry = table.get_mut(at(1)).unwrap();
        let begun = Instant::now();
        let percent_after = |entry: &mut Entry, seconds| {
            entry.ramp_up(SLOW_START, begun + Duration::from_secs(seconds));
            entry.percent()
        };
        assert_eq!(percent_after(entry, 0), 10);
        assert_eq!(percent_after(entry, 1000), 10, "no connection yet");
        entry.stats().connects.add(1);
        let percents = [1000, 1005, 1030, 1075, 1099, 1100, 1101];
        let percents = percents.map(|seconds| percent_after(entry, seconds));
        assert_eq!(percents, [10, 10, 30, 75, 99, 100, 100]);
        assert_eq!(entry.ramp, Ramp::Full);
    }

    #[test]
    fn no_endpoint_starts_slowly_where_slow_start_is_off_or_none_was_there() {
        let mut first = table(Balance::RoundRobin, &[endpoint(0), endpoint(1)]);
        let mut off = Table::new(Balance::RoundRobin, 0);
        let endpoints = [endpoint(0), endpoint(1)];
        for count in [1, 2] {
            let endpoints = endpoints[..count].to_vec();
            let snapshot = EndpointSnapshot {
                generation: count as u64,
                endpoints,
                ..EndpointSnapshot::default()
            };
            off.apply(&snapshot, &pool(), false, Instant::now());
        }
        for table in [&mut first, &mut off] {
            for index in table.indices() {
                assert_eq!(table.get_mut(index).unwrap().percent(), 100);
            }
        }
    }

    /// Of `sessions`, how many go to the endpoint that joined and has come to `percent`.
    fn share_at(policy: Balance, percent: u32, sessions: u32) -> u32 {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut table = joined(policy);
        table.get_mut(at(1)).unwrap().ramp = Ramp::Warming { since: Instant::now(), percent };
        for _ in 0..sessions {
            let chosen = table.choose(&Tried::default(), None, &mut rng).unwrap();
            table.get_mut(chosen).unwrap().sessions += 1;
        }
        table.get_mut(at(1)).unwrap().sessions
    }

    #[test]
    fn the_share_of_an_endpoint_grows_with_its_warmth() {
        const SESSIONS: u32 = 10_000;
        for percent in [10, 25, 50, 75, 100] {
            // In turn: of every other session, this part. Of 5,000 draws, four standard
            // deviations are at most 142.
            let share = share_at(Balance::RoundRobin, percent, SESSIONS);
            let expected = SESSIONS / 2 * percent / 100;
            assert!(share.abs_diff(expected) <= 142, "{percent} %: {share}, not {expected}");
            // By load: as many sessions as the other, times this part.
            for policy in [Balance::LeastConn, Balance::RandomTwo] {
                let share = share_at(policy, percent, SESSIONS);
                let expected = SESSIONS * percent / (100 + percent);
                assert!(share.abs_diff(expected) <= 2, "{percent} %: {share}, not {expected}");
            }
        }
    }

    /// Two near endpoints, `e0` and `e1`, and two others.
    fn near_and_far(policy: Balance) -> Table {
        let endpoints = [0, 1, 2, 3].map(endpoint);
        endpoints[0].set_near(true);
        endpoints[1].set_near(true);
        table(policy, &endpoints)
    }

    #[test]
    fn near_endpoints_share_all_sessions_while_they_can() {
        for policy in [Balance::LeastConn, Balance::RoundRobin, Balance::RandomTwo] {
            let mut rng = fastrand::Rng::with_seed(1);
            let mut table = near_and_far(policy);
            let mut chosen = [0; 4];
            for _ in 0..200 {
                let (index, spillover) = table.choose_near(&Tried::default(), None, &mut rng);
                assert_eq!(spillover, None);
                chosen[usize::from(index.unwrap())] += 1;
            }
            assert_eq!(chosen[2..], [0, 0], "{policy:?}");
            // Of 200 draws, four standard deviations are 57.
            assert!((43..=157).contains(&chosen[0]), "{policy:?}: {chosen:?}");
        }
    }

    #[test]
    fn sessions_spill_over_where_near_endpoints_are_too_few() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut table = near_and_far(Balance::RoundRobin);
        eject(&mut table, at(0));
        let (index, spillover) = table.choose_near(&Tried::default(), None, &mut rng);
        assert_eq!((index, spillover), (Some(at(1)), None), "one is left");
        let (index, spillover) = table.choose_near(&tried(&[1]), None, &mut rng);
        assert!(
            (index == Some(at(2)) || index == Some(at(3))) && spillover == Some(Spillover::Few),
            "{index:?}"
        );
        eject(&mut table, at(1));
        let (index, spillover) = table.choose_near(&Tried::default(), None, &mut rng);
        assert!(
            (index == Some(at(2)) || index == Some(at(3))) && spillover == Some(Spillover::Few),
            "{index:?}"
        );
        // With none usable anywhere, any one not tried will do, and that is no spillover.
        for index in [2, 3] {
            eject(&mut table, at(index));
        }
        let (index, spillover) = table.choose_near(&tried(&[0, 1, 3]), None, &mut rng);
        assert_eq!((index, spillover), (Some(at(2)), None));
        assert_eq!(table.choose_near(&tried(&[0, 1, 2, 3]), None, &mut rng), (None, None));
    }

    #[test]
    fn sessions_spill_over_where_near_endpoints_are_too_loaded() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut table = near_and_far(Balance::LeastConn);
        let mut choose = |near: u32, far: u32| {
            for (index, sessions) in [(0, near), (1, near), (2, far), (3, far)] {
                table.get_mut(at(index)).unwrap().sessions = sessions;
            }
            table.choose_near(&Tried::default(), None, &mut rng)
        };
        for far in [0, 1, 10, 1000] {
            let bound = 2 * far + 8;
            let (index, spillover) = choose(bound, far);
            assert!(
                (index == Some(at(0)) || index == Some(at(1))) && spillover.is_none(),
                "at {bound}: {index:?}"
            );
            let (index, spillover) = choose(bound + 1, far);
            assert!((index == Some(at(2)) || index == Some(at(3))), "at {bound} + 1: {index:?}");
            assert_eq!(spillover, Some(Spillover::Loaded));
        }
        assert_eq!(choose(u32::MAX, u32::MAX - 1).1, None, "more than can be counted twice");
    }
}
