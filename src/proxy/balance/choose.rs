//! Which endpoint serves the next session or request.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::net::IpAddr;
use std::time::Instant;

use super::{Entry, Table};
use crate::config::Balance;
use crate::metrics::Spillover;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::session::Tried;

/// A near endpoint is too loaded when the best other one has less than half of its sessions, not
/// counting the first few.
const NEAR_LOAD_FACTOR: u32 = 2;
const NEAR_LOAD_FREE: u32 = 8;

/// Which endpoints are looked at, of those that are not withheld.
#[derive(Debug, Clone, Copy)]
enum Among {
    All,
    Usable,
    Near,
    Far,
}

impl Among {
    fn holds(self, entry: &Entry) -> bool {
        if entry.is_withheld() {
            return false;
        }
        match self {
            Self::All => true,
            Self::Usable => entry.health.is_usable(),
            Self::Near => entry.health.is_usable() && entry.endpoint.is_near(),
            Self::Far => entry.health.is_usable() && !entry.endpoint.is_near(),
        }
    }
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
    /// Either.
    Conn,
}

impl Having {
    fn holds(self, entry: &Entry) -> bool {
        match self {
            // What has neither is full, and served by those who wait in line.
            Self::Anything => entry.pool.idle() > 0 || entry.has_room(),
            Self::Idle => entry.pool.idle() > 0,
            Self::Room => entry.pool.room() > 0 && entry.has_room(),
            Self::Conn => entry.pool.idle() > 0 || (entry.pool.room() > 0 && entry.has_room()),
        }
    }
}

/// How an endpoint has to take connects to be chosen for a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// However it does.
    Any,
    /// It is usable now: see [`Entry::is_usable`].
    Usable,
    /// The same, and it has room for one of those that wait.
    UsableInTurn,
    /// It has room for one of them, usable or not.
    InTurn,
}

impl Fit {
    fn holds(self, entry: &Entry, now: Instant) -> bool {
        match self {
            Self::Any => true,
            Self::Usable => entry.is_usable(now),
            Self::UsableInTurn => entry.is_usable(now) && entry.has_room_for_waiting(now),
            Self::InTurn => entry.has_room_for_waiting(now),
        }
    }
}

/// What is looked for.
#[derive(Clone, Copy)]
struct Search<'a> {
    tried: &'a Tried,
    source: Option<IpAddr>,
    among: Among,
    having: Having,
    fit: Fit,
    now: Instant,
}

impl Search<'_> {
    fn finds(&self, entry: &Entry) -> bool {
        self.having.holds(entry) && self.among.holds(entry) && self.fit.holds(entry, self.now)
    }
}

impl Table {
    /// The endpoint for a request: a usable one with an idle connection, else one with room for
    /// one more, which then has to be made. And whether it is not near though near ones are
    /// preferred.
    pub fn choose_for_request(
        &mut self,
        tried: &Tried,
        source: Option<IpAddr>,
        prefers_near: bool,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> Option<(EndpointId, Having)> {
        self.turn = self.turn.wrapping_add(1);
        let near: &[Among] =
            if prefers_near { &[Among::Near, Among::Far] } else { &[Among::Usable] };
        // A connection that is there is worth less than the time that a slow endpoint takes.
        let having: &[Having] = match self.policy {
            Balance::PeakEwma => &[Having::Conn],
            _ => &[Having::Idle, Having::Room],
        };
        for &among in near {
            for &having in having {
                let search = Search { tried, source, among, having, fit: Fit::Any, now };
                if let Some(index) = self.pick(&search, rng) {
                    self.take_turn(index);
                    return Some((index, self.has(index)));
                }
            }
        }
        None
    }

    /// What an endpoint has for a request.
    fn has(&self, index: EndpointId) -> Having {
        let is_idle = self.get(index).is_some_and(|entry| entry.pool.idle() > 0);
        if is_idle { Having::Idle } else { Having::Room }
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
            .filter(|(_, entry)| Among::Usable.holds(entry))
            .filter(|(_, entry)| entry.pool.idle() > 0 || !entry.pool.backs_off(now))
            .max_by_key(|(_, entry)| affinity(source, entry))
            .map(|(index, _)| index)
    }

    /// The endpoint for a session's next attempt, of those that are fit for it: a usable one that it
    /// has not tried, or, should none be left, any that it has not tried.
    pub fn choose(
        &mut self,
        fit: Fit,
        tried: &Tried,
        source: Option<IpAddr>,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> Option<EndpointId> {
        self.turn = self.turn.wrapping_add(1);
        self.judge_tiers(now);
        let having = Having::Anything;
        let search = |among| Search { tried, source, among, having, fit, now };
        let chosen = self
            .pick(&search(Among::Usable), rng)
            .or_else(|| self.pick_unusable(&search(Among::All), rng));
        chosen.inspect(|&index| self.take_turn(index))
    }

    /// The first usable endpoint behind `behind` that was not tried, of those that may have sessions:
    /// so all of them have their turn.
    pub fn next_of_all(&self, behind: Option<EndpointId>, tried: &Tried) -> Option<EndpointId> {
        let from = behind.map_or(0, |behind| usize::from(behind) + 1);
        let has_turn = |entry: &Entry| {
            // The session may be another worker's.
            let has_sessions = entry.sessions() > 0 || entry.endpoint.has_sessions();
            entry.health.is_usable() && (entry.is_present() || has_sessions)
        };
        let mut others = self.indices().skip(from).filter(|&index| !tried.contains(index));
        others.find(|&index| self.get(index).is_some_and(has_turn))
    }

    /// Whether there is a usable endpoint that was not tried.
    pub fn has_other(&self, tried: &Tried) -> bool {
        self.untried(tried).any(|entry| Among::Usable.holds(entry))
    }

    fn untried<'a>(&'a self, tried: &'a Tried) -> impl Iterator<Item = &'a Entry> {
        let untried = self.present.iter().filter(|&&index| !tried.contains(index));
        untried.filter_map(|&index| self.get(index))
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
        fit: Fit,
        tried: &Tried,
        source: Option<IpAddr>,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> (Option<EndpointId>, Option<Spillover>) {
        self.turn = self.turn.wrapping_add(1);
        self.judge_tiers(now);
        let having = Having::Anything;
        let search = |among| Search { tried, source, among, having, fit, now };
        let near = self.pick(&search(Among::Near), rng);
        let other = self.pick(&search(Among::Far), rng);
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
            (None, None) => (self.pick_unusable(&search(Among::All), rng), None),
        };
        (chosen.inspect(|&index| self.take_turn(index)), spilled)
    }

    fn pick(&mut self, search: &Search<'_>, rng: &mut fastrand::Rng) -> Option<EndpointId> {
        if self.policy != Balance::RoundRobin {
            return self.pick_now(search, rng);
        }
        // One on its way to its full share is passed over now and then.
        let mut passed_over = *search.tried;
        while let Some(index) = self.pick_now(&Search { tried: &passed_over, ..*search }, rng) {
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
        self.pick_now(search, rng)
    }

    /// One that is not usable, unless there are usable ones that are only full.
    fn pick_unusable(
        &mut self,
        search: &Search<'_>,
        rng: &mut fastrand::Rng,
    ) -> Option<EndpointId> {
        if self.has_full(search.tried) { None } else { self.pick(search, rng) }
    }

    /// Whether there is a usable endpoint that was not tried and is full.
    fn has_full(&self, tried: &Tried) -> bool {
        let is_full = |entry: &Entry| Among::Usable.holds(entry) && !Having::Anything.holds(entry);
        self.untried(tried).any(is_full)
    }

    fn pick_now(&self, search: &Search<'_>, rng: &mut fastrand::Rng) -> Option<EndpointId> {
        let count = self.present.len();
        // Workers, and endpoints that have had as many turns, do not all begin with the same one.
        let candidates = (0..count)
            .map(|i| self.present[(self.turn + i) % count])
            .filter(|&index| !search.tried.contains(index))
            .filter_map(|index| Some((index, self.entries[usize::from(index)].as_ref()?)))
            .filter(|(_, entry)| search.finds(entry));
        // Equals take turns, whichever of the others are out of use.
        let turns = |entry: &Entry| entry.turns.max(self.turns);
        let chosen = match self.policy {
            Balance::RoundRobin => candidates.min_by_key(|(_, entry)| turns(entry)),
            // What has no key goes where the load is least, and so does what comes from no address, as over
            // a Unix socket.
            Balance::LeastConn | Balance::KeyHash => {
                candidates.min_by_key(|(_, entry)| (entry.load(), turns(entry)))
            }
            Balance::SourceHash if search.source.is_none() => {
                candidates.min_by_key(|(_, entry)| (entry.load(), turns(entry)))
            }
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
            Balance::PeakEwma => {
                let fastest = self.fastest();
                let cost = |entry: &Entry| (self.cost(entry, fastest, search.now), turns(entry));
                candidates.min_by_key(|(_, entry)| cost(entry))
            }
            Balance::SourceHash => {
                candidates.max_by_key(|(_, entry)| affinity(search.source, entry))
            }
        };
        chosen.map(|(index, _)| index)
    }
}

/// Rendezvous hashing (Thaler and Ravishankar): only the sources of an endpoint that goes move.
fn affinity(source: Option<IpAddr>, entry: &Entry) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one((source, &entry.endpoint.address))
}
