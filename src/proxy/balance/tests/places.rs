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
