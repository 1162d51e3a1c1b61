//! Discovery: from what a source knows to complete, ordered snapshots in every worker's mailbox.
//!
//! A source ([`dns`], [`kubernetes`]) hands over the whole set that it wants, as often as it likes;
//! [`Publisher`] publishes when that differs from the last snapshot. A source that fails hands over
//! nothing, so the last known good set stays in force.

pub(super) mod dns;
pub(super) mod kubernetes;
pub(super) mod status;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{debug, error, info, warn};

use super::WorkerHandle;
use crate::io::net::{Address, is_local};
use crate::limits::ENDPOINTS_MAX;
use crate::listening::Listening;
use crate::proxy::RouteId;
use crate::proxy::endpoints::{Endpoint, EndpointSnapshot, Store, Tier};
use status::{ErrorKind, LeftOut, Status};

/// An endpoint that a source wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Its name, which is to be stable.
    pub name: String,
    /// Where to connect.
    pub address: Address,
    /// Whether it is preferred because it is near.
    pub near: bool,
    /// Whether others come first.
    pub tier: Tier,
}

impl Wanted {
    /// An endpoint of which only this is known.
    pub(super) fn new(name: impl Into<String>, address: impl Into<Address>) -> Self {
        Self { name: name.into(), address: address.into(), near: false, tier: Tier::FIRST }
    }
}

/// A store that shares the keys with others, as a source declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Declared {
    /// Its name, by which its keys are known.
    pub name: String,
    /// Where it is now; or else why it is nowhere, if more is known than that it is away.
    pub address: Result<Address, Option<String>>,
}

/// What may hold the start-up here: that no endpoint is left beside the process itself.
const LOOP: &str = "loop";

/// An endpoint that has left and of which nothing lives any more is remembered for so long, so that
/// its counters go on where they were if it comes back.
const REMEMBERED_FOR: Duration = Duration::from_secs(600);

/// Turns wanted endpoints into snapshots.
#[derive(Debug)]
pub(super) struct Publisher {
    workers: Vec<WorkerHandle>,
    route: RouteId,
    snapshots: watch::Sender<Arc<EndpointSnapshot>>,
    /// How many endpoints the last snapshot had no room for.
    left_out: AtomicUsize,
    known: Mutex<Known>,
    /// What is no endpoint: the process itself.
    listening: Listening,
    /// Where it says which are left out for that.
    status: Arc<Status>,
}

/// Every endpoint that the last snapshot names, that a worker still holds, or that left lately.
#[derive(Debug, Default)]
struct Known(Vec<(Arc<Endpoint>, Option<Instant>)>);

impl Known {
    /// Takes note of who is in the set now, and forgets those that left and are held by nobody:
    /// after [`REMEMBERED_FOR`], or where they are more than [`ENDPOINTS_MAX`], the first to have
    /// left first.
    fn settle(&mut self, present: &[Arc<Endpoint>], now: Instant) {
        let by_address: HashMap<_, _> = present.iter().map(|e| (e.address.clone(), e)).collect();
        let mut new: HashSet<_> = by_address.keys().cloned().collect();
        for (endpoint, left) in &mut self.0 {
            if by_address.get(&endpoint.address).is_some_and(|e| Arc::ptr_eq(e, endpoint)) {
                *left = None;
                new.remove(&endpoint.address);
            } else {
                left.get_or_insert(now);
            }
        }
        let new = present.iter().filter(|endpoint| new.contains(&endpoint.address));
        self.0.extend(new.map(|endpoint| (Arc::clone(endpoint), None)));
        // Who is held by nobody else is held by nobody later: only here are they handed out.
        let unheld = |endpoint: &Arc<Endpoint>, left: &Option<Instant>| match left {
            Some(at) if Arc::strong_count(endpoint) == 1 => Some(*at),
            _ => None,
        };
        let mut times: Vec<_> = self.0.iter().filter_map(|(e, left)| unheld(e, left)).collect();
        times.sort_unstable();
        let oldest = times.len().checked_sub(ENDPOINTS_MAX).and_then(|at| times.get(at)).copied();
        self.0.retain(|(endpoint, left)| {
            unheld(endpoint, left).is_none_or(|at| {
                oldest.is_none_or(|oldest| at >= oldest)
                    && now.saturating_duration_since(at) < REMEMBERED_FOR
            })
        });
    }
}

impl Publisher {
    /// A publisher of a route to these workers; `snapshots` shows the rest of the control plane the
    /// latest.
    pub(super) fn new(
        workers: Vec<WorkerHandle>,
        route: RouteId,
        snapshots: watch::Sender<Arc<EndpointSnapshot>>,
    ) -> Self {
        Self {
            workers,
            route,
            snapshots,
            left_out: AtomicUsize::new(0),
            known: Mutex::default(),
            listening: Listening::default(),
            status: Arc::default(),
        }
    }

    /// The same, which leaves out whatever leads back to this process, and says so in `status`.
    #[must_use]
    pub(super) fn leaving_out(self, listening: Listening, status: Arc<Status>) -> Self {
        Self { listening, status, ..self }
    }

    /// What is published from now on.
    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<EndpointSnapshot>> {
        self.snapshots.subscribe()
    }

    /// Whether anything was published.
    pub(super) fn has_begun(&self) -> bool {
        self.snapshots.borrow().generation > 0
    }

    /// How many endpoints there are.
    pub(super) fn endpoints(&self) -> usize {
        self.snapshots.borrow().endpoints.len()
    }

    /// Publishes the complete, ordered set `wanted` if it differs from the last one. The first is
    /// published even if it is empty, except where that is because each endpoint is this process
    /// itself: then the configuration is wrong, and the start-up is held.
    ///
    /// An address that comes twice counts once, under the first name. Endpoints beyond
    /// [`ENDPOINTS_MAX`] are left out with a warning. An endpoint is known by its name and address:
    /// it stays the same `Arc`, and so keeps its sessions, pools and counters, also where it left
    /// for a while.
    pub(super) fn publish(&self, wanted: impl IntoIterator<Item = Wanted>) {
        self.publish_at(wanted, &[], Instant::now());
    }

    /// The same, where keys say where requests go: `stores` are all that share them.
    pub(super) fn publish_stores(
        &self,
        wanted: impl IntoIterator<Item = Wanted>,
        stores: &[Declared],
    ) {
        self.publish_at(wanted, stores, Instant::now());
    }

    fn publish_at(
        &self,
        wanted: impl IntoIterator<Item = Wanted>,
        stores: &[Declared],
        now: Instant,
    ) {
        let last = Arc::clone(&self.snapshots.borrow());
        let mut remembered = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let known: HashMap<_, _> =
            remembered.0.iter().map(|(e, _)| ((e.address.clone(), e.name.as_str()), e)).collect();
        let mut seen = HashSet::new();
        let mut own = Vec::new();
        let (mut endpoints, mut tiers): (Vec<_>, Vec<_>) = wanted
            .into_iter()
            .filter(|wanted| seen.insert(wanted.address.clone()) && !self.is_own(wanted, &mut own))
            .enumerate()
            .map(|(number, Wanted { name, address, near, tier })| {
                let endpoint = match known.get(&(address.clone(), name.as_str())) {
                    Some(endpoint) => Arc::clone(endpoint),
                    None => Endpoint::numbered(number, name, address, self.workers.len()),
                };
                endpoint.set_near(near);
                (endpoint, tier)
            })
            .unzip();
        let left_out = endpoints.len().saturating_sub(ENDPOINTS_MAX);
        endpoints.truncate(ENDPOINTS_MAX);
        tiers.truncate(ENDPOINTS_MAX);
        remembered.settle(&endpoints, now);
        let stores = placed(stores, &endpoints, &own);
        let only_own = own.first().filter(|_| endpoints.is_empty() && !self.has_begun());
        self.status.hold(LOOP, only_own.map(|own| format!("no endpoint is left: {own}")));
        let is_held = only_own.is_some();
        self.leave_out(own);
        if is_held {
            return;
        }
        let is_same = same(&last.endpoints, &endpoints) && last.tiers == tiers;
        if last.generation > 0 && is_same && last.stores == stores {
            return;
        }
        let names =
            |stores: &[Store]| stores.iter().map(|s| Arc::clone(&s.name)).collect::<Vec<_>>();
        if names(&last.stores) != names(&stores) {
            let [before, now] = [last.stores.len(), stores.len()];
            info!(before, now, "the stores that share the keys are declared");
        }

        let generation = last.generation + 1;
        debug!(generation, endpoints = endpoints.len(), "new snapshot");
        if self.left_out.swap(left_out, Relaxed) == 0 && left_out > 0 {
            warn!(left_out, max = ENDPOINTS_MAX, "too many endpoints: the last are left out");
        }
        let snapshot =
            Arc::new(EndpointSnapshot { route: self.route, generation, endpoints, tiers, stores });
        self.snapshots.send_replace(Arc::clone(&snapshot));
        for worker in &self.workers {
            worker.mailbox.deliver(Arc::clone(&snapshot));
        }
    }
}

impl Publisher {
    /// Whether an endpoint is this process itself; it is taken note of then.
    fn is_own(&self, wanted: &Wanted, own: &mut Vec<LeftOut>) -> bool {
        let Some(listener) = self.listening.reached_by(&wanted.address, is_local) else {
            return false;
        };
        let (address, listener) = (wanted.address.clone(), listener.clone());
        own.push(LeftOut { name: wanted.name.clone(), address, listener });
        true
    }

    /// Says once of each endpoint that it is left out.
    fn leave_out(&self, own: Vec<LeftOut>) {
        for left_out in self.status.set_left_out(own) {
            self.status.count(ErrorKind::Loop);
            error!(
                endpoint = left_out.name,
                address = %left_out.address,
                listener = %left_out.listener,
                "left out of service: it is this proxy itself, and would be given its own \
                 connections as clients: name the server, or choose another address in AEGIS_LISTEN"
            );
        }
    }
}

/// The time between two lines of the log about changed endpoints.
const LOG_PAUSE: Duration = Duration::from_secs(1);

/// Logs that endpoints changed: a single change at once, many as one line a second, so that the
/// last line always tells the latest state.
pub(super) async fn log_changes(mut snapshots: watch::Receiver<Arc<EndpointSnapshot>>) {
    let mut logged = 0;
    while snapshots.changed().await.is_ok() {
        let (generation, endpoints) = {
            let snapshot = snapshots.borrow_and_update();
            (snapshot.generation, snapshot.endpoints.len())
        };
        let changes = generation - logged;
        info!(generation, endpoints, changes, "endpoints changed");
        logged = generation;
        sleep(LOG_PAUSE).await;
    }
}

/// The stores, with where they are among the endpoints.
fn placed(stores: &[Declared], endpoints: &[Arc<Endpoint>], own: &[LeftOut]) -> Vec<Store> {
    let at: HashMap<_, _> = endpoints.iter().enumerate().map(|(i, e)| (&e.address, i)).collect();
    let place = |store: &Declared| {
        let endpoint = store.address.as_ref().ok().and_then(|address| at.get(address).copied());
        let why = match &store.address {
            Ok(address) => own.iter().find(|own| own.address == *address).map(ToString::to_string),
            Err(why) => why.clone(),
        };
        Store { name: store.name.as_str().into(), endpoint, why: why.map(Into::into) }
    };
    stores.iter().map(place).collect()
}

fn same(a: &[Arc<Endpoint>], b: &[Arc<Endpoint>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::testing;

    fn wanted(addresses: &[&str]) -> Vec<Wanted> {
        addresses.iter().map(|a| Wanted::new(*a, a.parse::<Address>().unwrap())).collect()
    }

    fn publisher() -> Publisher {
        Publisher::new(testing::workers(2), RouteId::default(), watch::Sender::default())
    }

    #[test]
    fn a_snapshot_is_published_on_change_only_and_reaches_every_worker() {
        let publisher = publisher();
        for round in [["10.0.0.1:1", "10.0.0.2:1"], ["10.0.0.1:1", "10.0.0.2:1"]] {
            publisher.publish(wanted(&round));
        }
        for worker in &publisher.workers {
            let snapshot = worker.mailbox.take_snapshot().unwrap();
            assert_eq!((snapshot.generation, snapshot.endpoints.len()), (1, 2));
            assert_eq!(snapshot.endpoints[0].stats.len(), 2);
        }
        publisher.publish(wanted(&["10.0.0.2:1", "10.0.0.1:1"]));
        assert_eq!(publisher.snapshots.borrow().generation, 2, "the order is part of the state");
    }

    #[test]
    fn what_is_the_proxy_itself_is_left_out_and_told_of_once() {
        let status = Arc::new(Status::default());
        let own = Listening::new(["0.0.0.0:1".parse().unwrap()]);
        let publisher = publisher().leaving_out(own, Arc::clone(&status));
        let named = |address: &str| Wanted::new("db", address.parse::<Address>().unwrap());
        let store = |address: &str| Declared {
            name: "db".to_owned(),
            address: Ok(address.parse().unwrap()),
        };
        for _ in 0..2 {
            let both = [named("127.0.0.9:1"), named("127.0.0.9:2")];
            publisher.publish_stores(both, &[store("127.0.0.9:1"), store("127.0.0.9:2")]);
        }
        let latest = Arc::clone(&publisher.snapshots.borrow());
        assert_eq!(latest.generation, 1);
        assert_eq!(latest.endpoints[0].address.tcp().unwrap().port(), 2);
        let why = "db (127.0.0.9:1) is this proxy itself, which listens on 0.0.0.0:1";
        assert_eq!(latest.stores[0].why.as_deref(), Some(why));
        assert_eq!((latest.stores[0].endpoint, latest.stores[1].endpoint), (None, Some(0)));
        assert_eq!(status.trouble().as_deref(), Some(why));
        assert_eq!(status.errors(ErrorKind::Loop), 1);
        publisher.publish([named("127.0.0.9:2")]);
        assert_eq!(status.trouble(), None);
        publisher.publish([named("127.0.0.9:1")]);
        let latest = Arc::clone(&publisher.snapshots.borrow());
        assert!(latest.endpoints.is_empty() && status.held().is_none(), "the start is over");
    }

    #[test]
    fn the_start_is_held_while_there_is_nothing_but_the_proxy_itself() {
        let status = Arc::new(Status::default());
        let own = Listening::new(["127.0.0.1:1".parse().unwrap()]);
        let publisher = publisher().leaving_out(own, Arc::clone(&status));
        publisher.publish(wanted(&["127.0.0.1:1", "0.0.0.0:1"]));
        let why = "no endpoint is left: 127.0.0.1:1 (127.0.0.1:1) is this proxy itself, which \
                   listens on 127.0.0.1:1";
        assert_eq!((status.held().as_deref(), publisher.has_begun()), (Some(why), false));
        publisher.publish(wanted(&["127.0.0.1:1", "127.0.0.1:2"]));
        assert_eq!((status.held(), publisher.endpoints()), (None, 1));
    }

    #[test]
    fn the_first_snapshot_is_published_even_if_empty() {
        let publisher = publisher();
        publisher.publish([]);
        publisher.publish([]);
        assert_eq!(publisher.snapshots.borrow().generation, 1);
    }

    #[test]
    fn the_tier_of_an_endpoint_is_part_of_the_state_and_the_first_one_counts() {
        let publisher = publisher();
        let of = |address: &str, tier| Wanted {
            tier: Tier::at(tier),
            ..Wanted::new(address, address.parse::<Address>().unwrap())
        };
        let tiers = || publisher.snapshots.borrow().tiers.clone();
        publisher.publish([of("10.0.0.1:1", 0), of("10.0.0.2:1", 1), of("10.0.0.1:1", 1)]);
        assert_eq!(tiers(), [0, 1].map(Tier::at));
        let endpoints = publisher.snapshots.borrow().endpoints.clone();
        publisher.publish([of("10.0.0.1:1", 2), of("10.0.0.2:1", 1)]);
        assert_eq!(tiers(), [2, 1].map(Tier::at));
        assert!(
            same(&endpoints, &publisher.snapshots.borrow().endpoints),
            "they are the same ones"
        );
        assert_eq!(publisher.snapshots.borrow().generation, 2);
    }

    #[test]
    fn an_unchanged_endpoint_stays_the_same_one() {
        let publisher = publisher();
        publisher.publish(wanted(&["10.0.0.1:1", "10.0.0.2:1"]));
        let first = Arc::clone(&publisher.snapshots.borrow());
        publisher.publish(wanted(&["10.0.0.2:1", "10.0.0.3:1"]));
        let second = Arc::clone(&publisher.snapshots.borrow());
        assert!(Arc::ptr_eq(&first.endpoints[1], &second.endpoints[0]));

        publisher.publish([Wanted::new("renamed", "10.0.0.2:1".parse::<Address>().unwrap())]);
        let third = Arc::clone(&publisher.snapshots.borrow());
        assert!(!Arc::ptr_eq(&second.endpoints[0], &third.endpoints[0]));
    }

    #[test]
    fn an_endpoint_that_comes_back_is_the_same_one() {
        let publisher = publisher();
        let latest = || Arc::clone(&publisher.snapshots.borrow());
        publisher.publish(wanted(&["10.0.0.1:1", "10.0.0.2:1"]));
        let held = Arc::clone(&latest().endpoints[1]);
        let unheld = Arc::as_ptr(&latest().endpoints[0]);
        let start = Instant::now();
        publisher.publish_at([], &[], start);
        // The last ones, who still hold a snapshot.
        publisher.workers.iter().for_each(|worker| drop(worker.mailbox.take_snapshot()));
        publisher.publish_at(wanted(&["10.0.0.3:1"]), &[], start + REMEMBERED_FOR / 2);
        let later = start + REMEMBERED_FOR.mul_f64(0.9);
        publisher.publish_at(wanted(&["10.0.0.2:1", "10.0.0.1:1"]), &[], later);
        assert!(Arc::ptr_eq(&latest().endpoints[0], &held));
        assert_eq!(Arc::as_ptr(&latest().endpoints[1]), unheld, "remembered for a while");

        held.stats[0].connects.add(7);
        publisher.publish_at([], &[], later);
        publisher.workers.iter().for_each(|worker| drop(worker.mailbox.take_snapshot()));
        publisher.publish_at([], &[], later + 2 * REMEMBERED_FOR);
        publisher.publish_at(wanted(&["10.0.0.2:1"]), &[], later + 2 * REMEMBERED_FOR);
        assert!(Arc::ptr_eq(&latest().endpoints[0], &held), "for as long as anybody holds it");
        let known = publisher.known.lock().unwrap();
        assert_eq!(known.0.len(), 1, "the others are forgotten: {known:?}");
    }

    #[test]
    fn a_store_is_declared_whether_it_is_there_or_not() {
        let publisher = publisher();
        let latest = || Arc::clone(&publisher.snapshots.borrow());
        let store = |name: &str, address: Option<&str>| Declared {
            name: name.to_owned(),
            address: address.map(|a| a.parse().unwrap()).ok_or(None),
        };
        let both = [store("a", Some("10.0.0.1:1")), store("b", Some("10.0.0.2:1"))];
        publisher.publish_stores(wanted(&["10.0.0.2:1", "10.0.0.1:1"]), &both);
        let at = |snapshot: &EndpointSnapshot| {
            snapshot.stores.iter().map(|s| (s.name.to_string(), s.endpoint)).collect::<Vec<_>>()
        };
        let [a, b] = ["a", "b"].map(str::to_owned);
        assert_eq!(at(&latest()), [(a.clone(), Some(1)), (b.clone(), Some(0))]);
        let one = [store("a", None), store("b", Some("10.0.0.2:1"))];
        publisher.publish_stores(wanted(&["10.0.0.2:1"]), &one);
        assert_eq!(at(&latest()), [(a, None), (b, Some(0))]);
        publisher.publish_stores(wanted(&["10.0.0.2:1"]), &one);
        assert_eq!(latest().generation, 2);
        publisher.publish_stores(wanted(&["10.0.0.2:1"]), &one[1..]);
        assert_eq!(latest().generation, 3, "who is declared is part of the state");
    }

    #[test]
    fn those_that_left_are_remembered_up_to_a_bound() {
        let publisher = publisher();
        for round in 0..4 * ENDPOINTS_MAX as u16 {
            publisher
                .publish([Wanted::new("one", std::net::SocketAddr::from(([10, 0, 0, 1], round)))]);
            publisher.workers.iter().for_each(|worker| drop(worker.mailbox.take_snapshot()));
        }
        let known = publisher.known.lock().unwrap();
        assert!(known.0.len() <= 2 + ENDPOINTS_MAX, "{}", known.0.len());
        let newest =
            known.0.iter().map(|(endpoint, _)| endpoint.address.tcp().unwrap().port()).min();
        assert!(newest.is_some_and(|port| port > 2 * ENDPOINTS_MAX as u16), "{newest:?}");
    }

    #[test]
    fn an_address_counts_once_and_the_number_is_bounded() {
        let publisher = publisher();
        publisher.publish(wanted(&["10.0.0.1:1", "10.0.0.1:1", "10.0.0.1:2"]));
        assert_eq!(publisher.snapshots.borrow().endpoints.len(), 2);

        let many = (0..=ENDPOINTS_MAX as u16)
            .map(|port| Wanted::new("many", std::net::SocketAddr::from(([10, 0, 0, 1], port))));
        publisher.publish(many);
        assert_eq!(publisher.snapshots.borrow().endpoints.len(), ENDPOINTS_MAX);
    }
}
