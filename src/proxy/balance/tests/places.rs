//! Endpoints with few places.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// An endpoint gets a connection for its pool.
fn keep(table: &mut Table, conn: u32, now: Instant) {
    let mut rng = fastrand::Rng::with_seed(1);
    assert!(table.reserve(at(0), now));
    table.start(at(0));
    assert!(table.connected(at(0), ConnId::from_parts(conn, 0), true, now, &mut rng));
}

#[test]
fn an_endpoint_is_full_whose_idle_connections_are_too_old_for_a_session() {
    let (mut rng, start) = (fastrand::Rng::with_seed(1), Instant::now());
    let config = PoolConfig { endpoint_max: Some(2), min_idle: 2, ..pool() };
    let mut table = Table::new(Balance::LeastConn, WorkerId::new(0), 0);
    let snapshot = EndpointSnapshot { endpoints: vec![endpoint(0)], ..EndpointSnapshot::default() };
    table.apply(&snapshot, &config, false, start);
    // The server ends what was not used for two seconds.
    keep(&mut table, 0, start);
    table.died(at(0), ConnId::from_parts(0, 0), start + 2 * SECOND, &mut rng);
    table.closed(at(0));
    let later = start + 3 * SECOND;
    assert!(table.expire(at(0), later).is_none());
    (1..3).for_each(|conn| keep(&mut table, conn, later));
    assert!(!table.is_full(later + SECOND), "they are young");
    let old = later + SECOND * 8 / 5;
    assert!(table.is_full(old));
    // One makes room, once it is closed.
    assert!(table.evict(at(0)).is_some() && table.is_full(old));
    table.closed(at(0));
    assert!(!table.is_full(old) && table.reserve(at(0), old));
}

/// The tables of two workers that share one endpoint.
fn two_workers(config: &PoolConfig, now: Instant) -> (Arc<Endpoint>, [Table; 2]) {
    let address = SocketAddr::from(([127, 0, 0, 1], 1)).into();
    let endpoint = Endpoint::new("e", address, 2);
    let endpoints = vec![Arc::clone(&endpoint)];
    let snapshot = EndpointSnapshot { endpoints, ..EndpointSnapshot::default() };
    let tables = [0, 1].map(|worker| {
        let mut table = Table::new(Balance::LeastConn, WorkerId::new(worker), 0);
        table.apply(&snapshot, config, false, now);
        table
    });
    (endpoint, tables)
}

/// The first worker has both places that there are, one of them without a connection.
fn one_has_all(now: Instant) -> (Arc<Endpoint>, [Table; 2]) {
    let config = PoolConfig { endpoint_max: Some(2), ..pool() };
    let (endpoint, [mut one, other]) = two_workers(&config, now);
    keep(&mut one, 0, now);
    assert!(one.reserve(at(0), now) && one.get(at(0)).unwrap().spare() == 1);
    (endpoint, [one, other])
}

const OTHER: Option<WorkerId> = Some(WorkerId::new(1));

#[test]
fn who_wants_a_place_gets_the_next_one_and_is_woken_and_so_is_who_has_one_idle() {
    let now = Instant::now();
    let (_, [mut one, mut other]) = one_has_all(now);
    for _ in 0..2 {
        other.want_place(at(0), now);
        assert_eq!(other.take_wake(), Some(WorkerId::new(0)), "it has one idle");
        other.want_place(at(0), now);
        assert_eq!(other.take_wake(), None, "it has been asked");
        // It has less than its share, and the other one has more.
        assert!(one.get(at(0)).unwrap().must_yield(now));
        one.return_spare(at(0), false);
        assert_eq!((one.take_wake(), one.take_wake()), (OTHER, None));
        assert!(other.collect(at(0), now) && !other.collect(at(0), now));
        assert_eq!(other.get(at(0)).unwrap().spare(), 1);
        other.return_spare(at(0), false);
        assert!(one.reserve(at(0), now));
    }
    // Likewise for what is closed.
    other.want_place(at(0), now);
    assert_eq!(other.take_wake(), Some(WorkerId::new(0)));
    assert!(one.evict(at(0)).is_some());
    one.closed(at(0));
    assert_eq!((one.take_wake(), other.collect(at(0), now)), (OTHER, true));
    // Who uses what it got, and wants more, asks again.
    keep(&mut one, 1, now);
    keep(&mut other, 2, now);
    other.want_place(at(0), now);
    assert_eq!(other.take_wake(), Some(WorkerId::new(0)));
}

#[test]
fn who_waits_for_a_place_no_more_is_given_none() {
    let now = Instant::now();
    let (endpoint, [mut one, mut other]) = one_has_all(now);
    other.want_place(at(0), now);
    other.return_spare(at(0), false);
    one.return_spare(at(0), false);
    assert_eq!((one.take_wake(), endpoint.places.taken()), (None, 1));
    // One that is free is taken at once, and to be used.
    other.take_wake();
    other.want_place(at(0), now);
    assert_eq!((other.take_wake(), other.get(at(0)).unwrap().spare()), (OTHER, 1));
}

#[test]
fn a_worker_that_forgets_an_endpoint_gives_back_what_it_has_and_what_it_was_given() {
    let now = Instant::now();
    let (endpoint, [mut one, mut other]) = one_has_all(now);
    assert!(one.reserve_idle(at(0), now));
    other.want_place(at(0), now);
    one.return_spare(at(0), false);
    assert_eq!([endpoint.places.taken(), endpoint.idle_places.taken()], [2, 1]);
    drop(other);
    assert_eq!(endpoint.places.taken(), 1, "it was given one");
    drop(one);
    assert_eq!([endpoint.places.taken(), endpoint.idle_places.taken()], [0; 2]);
}

#[test]
fn idle_connections_beyond_the_share_make_room_for_those_of_others() {
    let now = Instant::now();
    let config = PoolConfig { max_idle: 2, ..pool() };
    let (_, [mut one, mut other]) = two_workers(&config, now);
    for conn in 0..2 {
        assert!(one.reserve_idle(at(0), now));
        keep(&mut one, conn, now);
    }
    let must_yield = |table: &Table| table.get(at(0)).unwrap().must_yield_pooled();
    assert!(!must_yield(&one));
    assert!(!other.reserve_idle(at(0), now));
    assert!(must_yield(&one));
    assert!(one.evict(at(0)).is_some() && !must_yield(&one));
    assert_eq!(one.take_wake(), OTHER);
    other.collect(at(0), now);
    assert!(other.reserve_idle(at(0), now));
}

#[test]
fn a_probe_is_not_closed_for_others_before_it_has_told_something() {
    let (mut rng, now) = (fastrand::Rng::with_seed(1), Instant::now());
    let health = HealthConfig { eject_failures: 1, eject_time: SECOND };
    let config = PoolConfig { endpoint_max: Some(1), ..pool() };
    let (_, [mut one, mut other]) = two_workers(&config, now);
    let entry = one.get_mut(at(0)).unwrap();
    entry.health.eject(&health, now, &mut rng);
    assert!(entry.health.take_probe(now + 2 * SECOND));
    keep(&mut one, 0, now);
    other.want_place(at(0), now);
    let yields = |table: &Table| table.get(at(0)).unwrap().yields_idle_at(now).is_some();
    assert!(!yields(&one));
    assert!(one.get_mut(at(0)).unwrap().health.on_settled(&health, now));
    assert!(yields(&one));
}
