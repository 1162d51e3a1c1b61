//! Where requests go: endpoints and queue by request, and what is decided.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::*;
use crate::metrics::Spillover;
use crate::proxy::WorkerId;
use crate::proxy::balance::{Having, Table};
use crate::proxy::endpoints::{Endpoint, EndpointSnapshot, Store};
use crate::proxy::health::HealthConfig;
use crate::proxy::queue::{Line, Queue};
use crate::slab::Key;

const ANY: Line = Line::Any;

fn at(index: usize) -> EndpointId {
    EndpointId::at(index)
}

fn own(index: usize) -> Line {
    Line::Endpoint(at(index))
}

fn key(slot: u32) -> Key<Client> {
    Key::from_parts(slot, 0)
}

/// A client that has sent a request, and the endpoints and the queue that it meets.
struct Scene {
    bench: Bench,
    table: Table,
    queue: Queue,
    rng: fastrand::Rng,
    config: crate::config::PoolConfig,
    conns: u32,
}

impl Scene {
    /// So many endpoints, each of them with a store of its own, and a request.
    fn new(endpoints: usize, binding: Binding, request: &str) -> Self {
        let mut bench = Bench::new(Protocol::Chronos);
        bench.policy.binding = binding;
        bench.feed(request);
        assert_eq!(bench.next(), [Action::Acquire], "{request:?}");
        let mut config = Config::from_vars([]).unwrap().routes[0].pool.clone();
        config.mode = PoolMode::Request;
        config.size = 2;
        let names: Vec<String> = (0..endpoints).map(|number| format!("s{number}")).collect();
        let endpoints: Vec<_> = names
            .iter()
            .zip(1..)
            .map(|(name, port)| {
                Endpoint::new(name.clone(), SocketAddr::from(([127, 0, 0, 1], port)).into(), 1)
            })
            .collect();
        let store = |(endpoint, name): (usize, &String)| Store {
            name: Arc::from(name.as_str()),
            endpoint: Some(endpoint),
            why: None,
        };
        let stores = names.iter().enumerate().map(store).collect();
        let snapshot =
            EndpointSnapshot { generation: 1, endpoints, stores, ..EndpointSnapshot::default() };
        let mut table = Table::new(crate::config::Balance::LeastConn, WorkerId::new(0), 0);
        table.apply(&snapshot, &config, false, bench.now);
        let rng = fastrand::Rng::with_seed(1);
        Self { bench, table, queue: Queue::new(3, 8), rng, config, conns: 0 }
    }

    /// An endpoint gets an idle connection.
    fn idle(mut self, endpoint: usize) -> Self {
        self.conns += 1;
        let conn = ConnId::from_parts(self.conns, 0);
        assert!(self.table.reserve(at(endpoint), self.bench.now));
        self.table.start(at(endpoint));
        assert!(self.table.connected(at(endpoint), conn, false, self.bench.now, &mut self.rng));
        self
    }

    /// Somebody else has got a connection to it.
    fn in_use(self, endpoint: usize) -> Self {
        let mut scene = self.idle(endpoint);
        assert!(scene.table.acquire(at(endpoint)).is_some());
        scene
    }

    /// A connect to an endpoint has just failed, and it is ejected.
    fn failed(mut self, endpoint: usize) -> Self {
        assert!(self.table.reserve(at(endpoint), self.bench.now));
        self.table.start(at(endpoint));
        self.table.connect_failed(at(endpoint), self.bench.now, &mut self.rng);
        self.table.closed(at(endpoint));
        let config = HealthConfig { eject_failures: 1, eject_time: SECOND };
        let entry = self.table.get_mut(at(endpoint)).unwrap();
        assert!(entry.health.on_failure(&config, self.bench.now, &mut self.rng));
        self
    }

    /// Its checks fail.
    fn unchecked(mut self, endpoint: usize) -> Self {
        self.table.get_mut(at(endpoint)).unwrap().health.set_fails_check(true);
        self
    }

    /// The stores are declared, and none of them is there.
    fn away(mut self) -> Self {
        let stores = (0..self.table.stores()).map(|number| Store {
            name: Arc::clone(&self.table.store(number).unwrap().name),
            endpoint: None,
            why: None,
        });
        let stores = stores.collect();
        let snapshot = EndpointSnapshot { generation: 2, stores, ..EndpointSnapshot::default() };
        self.table.apply(&snapshot, &self.config, false, self.bench.now);
        self
    }

    /// Nobody waits for what is not usable.
    fn without_wait(mut self) -> Self {
        self.bench.policy.limits.endpoint = Duration::ZERO;
        self
    }

    /// Others wait in this line already.
    fn waiting(mut self, line: Line, count: u32) -> Self {
        (0..count).for_each(|slot| self.queue.join(line, key(slot)));
        self
    }

    fn is_needed(&mut self, endpoint: usize) -> bool {
        let any_usable = self.table.any_usable();
        self.placing().is_needed(at(endpoint), any_usable)
    }

    fn placing(&mut self) -> Placing<'_> {
        let (policy, now) = (&self.bench.policy, self.bench.now);
        Placing { table: &mut self.table, queue: &mut self.queue, policy, now }
    }

    fn place(&mut self) -> Placement {
        let source = Some(IpAddr::from([127, 0, 0, 1]));
        let (policy, now) = (&self.bench.policy, self.bench.now);
        let mut placing = Placing { table: &mut self.table, queue: &mut self.queue, policy, now };
        placing.place(&mut self.bench.client, source, &mut self.rng)
    }
}

#[test]
fn a_request_acquires_what_is_idle_or_waits_or_fails() {
    use Placement::{Acquire, Fail, Wait};
    let any = |endpoints| Scene::new(endpoints, Binding::Nothing, "GET a\n");
    // Of one store, so that the key's owner is known.
    let by_key = |request| Scene::new(1, Binding::Key, request);
    let room = |endpoint| Some((at(endpoint), Having::Room));
    let idle = |endpoint| Some((at(endpoint), Having::Idle));
    for (what, mut scene, wanted) in vec![
        ("no endpoint is known", any(0), Wait(ANY, None)),
        ("nor is there room to wait", any(0).waiting(ANY, 3), Fail(ErrorReply::NoneKnown)),
        ("one is idle", any(2).idle(1), Acquire(at(1), None)),
        ("others came first", any(2).idle(1).waiting(ANY, 1), Wait(ANY, idle(1))),
        ("those of another line did not", any(2).idle(1).waiting(own(0), 1), Acquire(at(1), None)),
        ("none is idle", any(1), Wait(ANY, room(0))),
        ("none is usable", any(1).failed(0), Wait(ANY, None)),
        ("the queue is full", any(1).in_use(0).in_use(0).waiting(ANY, 3), {
            Fail(ErrorReply::QueueFull)
        }),
        (
            "a connection comes for one of them",
            any(1).in_use(0).waiting(ANY, 3),
            Wait(ANY, room(0)),
        ),
        ("and for no other one", any(1).in_use(0).waiting(ANY, 4), Fail(ErrorReply::QueueFull)),
        ("its store has one", by_key("GET a\n").idle(0), Acquire(at(0), None)),
        ("its store has none", by_key("GET a\n"), Wait(own(0), room(0))),
        ("its store has one, for others", by_key("GET a\n").idle(0).waiting(own(0), 1), {
            Wait(own(0), room(0))
        }),
        ("its store was just tried", by_key("GET a\n").failed(0), Wait(own(0), room(0))),
        ("and there is no wait", by_key("GET a\n").failed(0).without_wait(), {
            Fail(ErrorReply::Unreachable)
        }),
        ("its store fails its checks", by_key("GET a\n").idle(0).unchecked(0), Wait(own(0), None)),
        ("its store is away", by_key("GET a\n").away(), Wait(Line::Store(0), None)),
        ("others wait for another store", by_key("GET a\n").away().waiting(own(1), 3), {
            Wait(Line::Store(0), None)
        }),
        ("no more may wait for its own", by_key("GET a\n").away().waiting(Line::Store(0), 3), {
            Fail(ErrorReply::NoneKnown)
        }),
        ("it has no key", by_key("PING\n").idle(0), Acquire(at(0), None)),
        ("it goes to all", by_key("COMPACT\n").idle(0), Acquire(at(0), None)),
        ("there is no store", Scene::new(0, Binding::Key, "GET a\n"), Wait(Line::Store(0), None)),
        ("nor a wait", Scene::new(0, Binding::Key, "GET a\n").without_wait(), {
            Fail(ErrorReply::NoneKnown)
        }),
    ] {
        assert_eq!(scene.place(), wanted, "{what}");
    }
}

#[test]
fn a_request_to_all_stores_is_done_behind_the_last() {
    let mut scene = Scene::new(2, Binding::Key, "COMPACT\n").idle(0).idle(1);
    for store in 0..2 {
        assert_eq!(scene.place(), Placement::Acquire(at(store), None));
        scene.bench.acquire();
        scene.bench.backend_sent(8);
        scene.bench.reply("OK_COMPACTED\n");
        scene.bench.client.release();
    }
    assert_eq!(scene.place(), Placement::Done);
}

#[test]
fn a_source_keeps_its_endpoint_until_that_cannot_be_had() {
    let mut scene = Scene::new(3, Binding::Source, "GET a\n").idle(0).idle(1).idle(2);
    let Placement::Acquire(bound, None) = scene.place() else { panic!("all have one") };
    for _ in 0..5 {
        assert_eq!(scene.place(), Placement::Acquire(bound, None), "the same one");
    }
    assert!(scene.table.acquire(bound).is_some());
    let waits = Placement::Wait(Line::Endpoint(bound), Some((bound, Having::Room)));
    assert_eq!(scene.place(), waits, "whatever others have");
    scene.queue.join(Line::Endpoint(bound), key(5));
    assert_eq!(scene.placing().pass_over(bound), None, "it is connected");
    let withheld = |scene: &mut Scene, fails| {
        scene.table.get_mut(bound).unwrap().health.set_fails_check(fails);
    };
    withheld(&mut scene, true);
    assert_eq!(scene.placing().pass_over(bound), Some(key(5)), "though it has a connection");
    withheld(&mut scene, false);
    scene.queue.join(Line::Endpoint(bound), key(5));
    scene.table.discarded(bound);
    assert_eq!(scene.placing().pass_over(bound), None, "it may be connected to");
    let mut scene = scene.failed(usize::from(bound));
    assert_eq!(scene.placing().miss(bound), Some(Unserved::PassedOver(key(5))));
    assert_eq!(scene.placing().miss(bound), None);
    assert!(matches!(scene.place(), Placement::Acquire(other, None) if other != bound));
}

#[test]
fn one_that_goes_far_where_near_is_preferred_is_counted() {
    let mut scene = Scene::new(1, Binding::Nothing, "GET a\n").idle(0);
    scene.bench.policy.prefers_near = true;
    for (near, spilled) in [(false, Some(Spillover::Few)), (true, None)] {
        scene.table.get(at(0)).unwrap().endpoint.set_near(near);
        assert_eq!(scene.place(), Placement::Acquire(at(0), spilled));
    }
}

#[test]
fn what_is_idle_serves_who_has_waited_longest() {
    let mut scene = Scene::new(2, Binding::Nothing, "GET a\n").waiting(own(0), 1);
    scene.queue.join(ANY, key(1));
    scene.queue.join(own(1), key(2));
    assert_eq!(scene.placing().serve(at(0)), None, "nothing is idle");
    let mut scene = scene.idle(0);
    assert_eq!(scene.placing().serve(at(0)), Some(key(0)));
    assert_eq!(scene.placing().serve(at(0)), Some(key(1)));
    assert!(!scene.placing().is_waited_for(at(0)) && scene.placing().is_waited_for(at(1)));
    assert_eq!(scene.placing().serve(at(0)), None, "it waits for another one");
}

#[test]
fn only_requests_without_an_alternative_fail_with_their_endpoint() {
    let scene = Scene::new(2, Binding::Key, "GET a\n").waiting(own(0), 1);
    assert_eq!(scene.failed(0).placing().miss(at(0)), None, "it waits");
    let mut scene = Scene::new(2, Binding::Key, "GET a\n").waiting(own(0), 1).without_wait();
    scene.queue.join(ANY, key(1));
    assert_eq!(scene.placing().miss(at(0)), None, "it is not ejected");
    assert!(scene.is_needed(0) && !scene.is_needed(1));
    let mut scene = scene.failed(0);
    assert!(scene.is_needed(0), "ejected or not");
    let failed = Unserved::Failed(key(0), ErrorReply::Unreachable);
    assert_eq!(scene.placing().miss(at(0)), Some(failed));
    assert_eq!(scene.placing().miss(at(0)), None);
    assert!(!scene.is_needed(0));
    let mut scene = scene.failed(1);
    assert!(scene.is_needed(1), "no other one is usable");
}

#[test]
fn a_connection_is_missing_for_each_that_waits() {
    let mut scene = Scene::new(2, Binding::Nothing, "GET a\n").waiting(ANY, 2);
    scene.queue.join(own(1), key(2));
    assert!(scene.table.reserve(at(1), scene.bench.now));
    scene.table.start(at(1));
    assert_eq!(scene.placing().missing(at(0)), Some(2));
    assert_eq!(scene.placing().missing(at(1)), Some(2), "one is being made");
    let none = EndpointSnapshot::default();
    let pool = Config::from_vars([]).unwrap().routes[0].pool.clone();
    scene.table.apply(&none, &pool, false, scene.bench.now);
    assert_eq!(scene.placing().missing(at(1)), None, "it has left");
}

#[test]
fn requests_feel_an_outage_while_their_store_is_not_usable_whatever_others_are() {
    let feels = |scene: &mut Scene| [scene.placing().feels_outage(), scene.placing().lacks_store()];
    let by_key = || Scene::new(2, Binding::Key, "GET a\n").idle(1);
    assert_eq!(feels(&mut by_key().failed(0)), [false; 2], "nobody waits");
    assert_eq!(feels(&mut by_key().failed(0).waiting(own(1), 1)), [false; 2], "not for that one");
    let mut waits = by_key().waiting(own(0), 1);
    assert_eq!(feels(&mut waits), [false, true], "its first connection is being made");
    assert_eq!(feels(&mut waits.failed(0)), [true; 2]);
    assert_eq!(feels(&mut by_key().waiting(own(0), 1).unchecked(0).idle(0)), [true; 2]);
    assert_eq!(feels(&mut by_key().away().waiting(Line::Store(1), 1)), [true; 2]);
    assert_eq!(
        feels(&mut Scene::new(0, Binding::Key, "GET a\n").waiting(Line::Store(0), 1)),
        [true; 2]
    );
    let mut any = Scene::new(2, Binding::Nothing, "GET a\n").failed(0).waiting(ANY, 1);
    assert_eq!(feels(&mut any), [false; 2], "any will do");
}

#[test]
fn a_request_that_waited_in_vain_is_told_what_it_lacked() {
    let limit = ErrorReply::QueueTimeout(SECOND);
    let why = |mut scene: Scene| scene.placing().why_it_waited(key(0), limit);
    let scene = |binding, line| Scene::new(2, binding, "GET a\n").waiting(line, 1);
    for (binding, line, idle, wanted) in [
        (Binding::Nothing, ANY, None, ErrorReply::NoneReachable(SECOND)),
        (Binding::Nothing, ANY, Some(1), limit),
        (Binding::Source, own(0), Some(1), ErrorReply::NoneReachable(SECOND)),
        (Binding::Key, own(0), Some(1), ErrorReply::Unreachable),
        (Binding::Key, own(0), Some(0), limit),
    ] {
        let scene = scene(binding, line);
        let scene = if let Some(endpoint) = idle { scene.idle(endpoint) } else { scene };
        assert_eq!(why(scene), wanted, "{binding:?} {line:?} {idle:?}");
    }
    // It has waited on because there was no endpoint, or none that could be connected to.
    let timeout = ErrorReply::NoEndpoint(SECOND);
    let mut refused = scene(Binding::Nothing, ANY);
    let wanted = ErrorReply::NoneReachable(SECOND);
    assert_eq!(refused.placing().why_it_waited(key(0), timeout), wanted);
    let mut busy = scene(Binding::Nothing, ANY).idle(1);
    assert_eq!(busy.placing().why_it_waited(key(0), timeout), limit);
    let mut absent = Scene::new(0, Binding::Nothing, "GET a\n").waiting(ANY, 1);
    assert_eq!(absent.placing().why_it_waited(key(0), timeout), timeout);
    // Of those that wait for a store, only such as lack one wait on.
    let lacks = |mut scene: Scene| scene.placing().lacks_endpoint(key(0), limit);
    for (line, idle, wanted) in [
        (own(0), None, true),
        (own(0), Some(0), false),
        (own(0), Some(1), true),
        (ANY, Some(1), false),
        (Line::Store(0), Some(0), true),
    ] {
        let scene = scene(Binding::Key, line);
        let scene = if let Some(endpoint) = idle { scene.idle(endpoint) } else { scene };
        assert_eq!(lacks(scene), wanted, "{line:?} {idle:?}");
    }
}
