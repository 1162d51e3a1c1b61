//! Endpoints that stand in for others.

use super::*;
use crate::proxy::endpoints::Tier;

const BACK: Duration = Duration::from_secs(10);
const CONFIG: HealthConfig = HealthConfig { eject_failures: 3, eject_time: Duration::from_secs(1) };

/// A table of endpoints of these tiers.
fn tiered(policy: Balance, tiers: &[usize]) -> Table {
    let mut table = Table::new(policy, WorkerId::new(0), 0).failing_back_after(BACK);
    apply(&mut table, tiers, Instant::now());
    table
}

fn apply(table: &mut Table, tiers: &[usize], now: Instant) {
    let known = |at| table.get(EndpointId::at(at)).map(|entry| Arc::clone(&entry.endpoint));
    let endpoints = (0..tiers.len()).map(|at| known(at).unwrap_or_else(|| endpoint(at as u16)));
    let snapshot = EndpointSnapshot {
        endpoints: endpoints.collect(),
        tiers: tiers.iter().map(|&tier| Tier::at(tier)).collect(),
        ..EndpointSnapshot::default()
    };
    table.apply(&snapshot, &pool(), false, now);
}

fn choices(table: &mut Table, now: Instant) -> Vec<usize> {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut chosen: Vec<_> = (0..60)
        .filter_map(|_| table.choose(Fit::Any, &Tried::default(), None, now, &mut rng))
        .map(usize::from)
        .collect();
    chosen.sort_unstable();
    chosen.dedup();
    chosen
}

fn unreachable(table: &mut Table, index: u16) {
    let entry = table.get_mut(at(index)).unwrap();
    entry.recovery.on_unreachable();
}

fn reachable(table: &mut Table, index: u16) {
    table.get_mut(at(index)).unwrap().recovery.on_connected();
}

#[test]
fn every_policy_chooses_from_the_lowest_tier_with_a_usable_endpoint() {
    for policy in EVEN.into_iter().chain([Balance::SourceHash]) {
        let now = Instant::now();
        let mut table = tiered(policy, &[1, 0, 2, 0, 1]);
        assert_eq!(choices(&mut table, now), [1, 3], "{policy:?}");
        eject(&mut table, at(1));
        assert_eq!(choices(&mut table, now), [3], "{policy:?}");
        // One that is ejected, and one whose latest connect has failed.
        unreachable(&mut table, 3);
        assert_eq!(choices(&mut table, now), [0, 4], "{policy:?}");
        unreachable(&mut table, 0);
        eject(&mut table, at(4));
        assert_eq!(choices(&mut table, now), [2], "{policy:?}");
        reachable(&mut table, 3);
        assert_eq!(choices(&mut table, now), [2], "{policy:?}: not at once");
        assert_eq!(choices(&mut table, now + BACK), [3], "{policy:?}");
    }
}

#[test]
fn while_no_tier_has_a_usable_endpoint_all_are_tried() {
    let now = Instant::now();
    let mut table = tiered(Balance::RoundRobin, &[0, 1]);
    unreachable(&mut table, 0);
    unreachable(&mut table, 1);
    assert_eq!(choices(&mut table, now), [0, 1]);
    reachable(&mut table, 1);
    assert_eq!(choices(&mut table, now), [1], "the first to return is used");
}

#[test]
fn an_endpoint_that_was_tried_in_vain_is_no_reason_to_leave_its_tier() {
    let mut rng = fastrand::Rng::with_seed(1);
    let now = Instant::now();
    let mut table = tiered(Balance::LeastConn, &[0, 0, 1]);
    assert_eq!(table.choose(Fit::Any, &tried(&[0]), None, now, &mut rng), Some(at(1)));
    assert_eq!(table.choose(Fit::Any, &tried(&[0, 1]), None, now, &mut rng), None);
    assert!(!table.has_other(&tried(&[0, 1])));
}

#[test]
fn a_snapshot_that_takes_a_tier_away_moves_on_at_once_and_one_that_brings_it_back_later() {
    let now = Instant::now();
    let mut table = tiered(Balance::LeastConn, &[1, 0]);
    assert_eq!(table.take_moved(), None);
    apply(&mut table, &[1], now);
    assert_eq!((table.take_moved(), table.take_moved()), (Some(Tier::at(1)), None));
    apply(&mut table, &[1, 0], now);
    assert_eq!(choices(&mut table, now), [0]);
    assert_eq!(choices(&mut table, now + BACK), [1]);
    assert_eq!(table.take_moved(), Some(Tier::FIRST));
    // Where the last tier is left alone, it is in use whatever it was.
    apply(&mut table, &[1], now + BACK);
    apply(&mut table, &[0], now + BACK);
    assert_eq!(choices(&mut table, now + BACK), [0]);
    assert_eq!(table.tier(), Tier::FIRST);
}

#[test]
fn one_that_joins_a_lower_tier_is_used_once_a_probe_has_shown_that_it_is_well() {
    let now = Instant::now();
    let mut table = tiered(Balance::LeastConn, &[1]);
    apply(&mut table, &[1, 0], now);
    assert_eq!(choices(&mut table, now + BACK), [0], "nobody knows whether it is well");
    let health = &mut table.get_mut(at(1)).unwrap().health;
    assert!(health.take_probe(now + BACK), "a probe is due");
    assert!(health.on_settled(&CONFIG, now + BACK));
    assert_eq!(choices(&mut table, now + BACK), [0]);
    assert_eq!(choices(&mut table, now + 2 * BACK), [1]);
}

#[test]
fn one_that_joins_is_used_at_once_where_nobody_else_serves() {
    let now = Instant::now();
    let mut table = tiered(Balance::LeastConn, &[1]);
    unreachable(&mut table, 0);
    apply(&mut table, &[1, 0], now);
    assert_eq!(choices(&mut table, now), [1]);
}

#[test]
fn those_that_no_client_tries_any_more_are_found_and_ejected_whatever_their_failures() {
    let mut rng = fastrand::Rng::with_seed(1);
    let now = Instant::now();
    let mut table = tiered(Balance::LeastConn, &[0, 0, 1]);
    eject(&mut table, at(0));
    unreachable(&mut table, 1);
    let left = |table: &Table| [0, 1, 2].map(|index| table.is_left(at(index)));
    assert_eq!(left(&table), [false; 3], "it is in use");
    table.judge_tiers(now);
    assert_eq!(left(&table), [false, true, false]);
    let health = &mut table.get_mut(at(1)).unwrap().health;
    assert!(health.eject(&CONFIG, now, &mut rng) && !health.eject(&CONFIG, now, &mut rng));
    assert!(!health.is_usable() && health.take_probe(now + 2 * CONFIG.eject_time));
    assert_eq!(left(&table), [false; 3]);
    // A connect that had been begun fails only once a probe has brought it back.
    table.get_mut(at(1)).unwrap().health.on_settled(&CONFIG, now);
    assert_eq!(left(&table), [false, true, false]);
}

#[test]
fn a_connection_to_an_endpoint_that_is_not_needed_is_not_kept_when_it_comes_back() {
    let mut rng = fastrand::Rng::with_seed(1);
    let now = Instant::now();
    let mode = crate::config::PoolMode::Request;
    let mut table = Table::new(Balance::LeastConn, WorkerId::new(0), 0).failing_back_after(BACK);
    let snapshot = EndpointSnapshot {
        endpoints: vec![endpoint(0), endpoint(1)],
        tiers: vec![Tier::FIRST, Tier::at(1)],
        ..EndpointSnapshot::default()
    };
    table.apply(&snapshot, &PoolConfig { mode, ..pool() }, false, now);
    unreachable(&mut table, 0);
    table.judge_tiers(now);
    assert!(table.reserve(at(1), now) && table.reserve_idle(at(1), now));
    table.start(at(1));
    assert!(table.connected(at(1), ConnId::from_parts(1, 1), true, now, &mut rng));
    let backend = table.acquire(at(1)).unwrap();
    reachable(&mut table, 0);
    table.judge_tiers(now);
    assert!(table.release(&backend, true, now), "its tier is still in use");
    let backend = table.acquire(at(1)).unwrap();
    table.judge_tiers(now + BACK);
    assert!(!table.release(&backend, true, now + BACK));
}
