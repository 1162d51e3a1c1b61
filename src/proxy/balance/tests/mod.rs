mod cancel;
mod fit;
mod latency;
mod places;
mod tier;

use super::entry::Ramp;
use super::*;
use crate::metrics::Spillover;
use crate::proxy::RouteId;
use crate::proxy::endpoints::Endpoint;
use crate::proxy::session::Tried;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::io::ConnId;
use crate::proxy::endpoints;
use crate::proxy::health::HealthConfig;
use crate::proxy::session::Session;

fn at(index: u16) -> EndpointId {
    EndpointId::at(index.into())
}

/// Those that share sessions evenly among endpoints that are alike.
const EVEN: [Balance; 4] =
    [Balance::LeastConn, Balance::RoundRobin, Balance::RandomTwo, Balance::PeakEwma];

pub(super) fn endpoint(number: u16) -> Arc<Endpoint> {
    Endpoint::new(format!("e{number}"), SocketAddr::from(([127, 0, 0, 1], 1000 + number)).into(), 1)
}

pub(super) fn pool() -> PoolConfig {
    PoolConfig {
        endpoint_max: None,
        mode: crate::config::PoolMode::Preconnect,
        size: 16,
        min_idle: 0,
        max_idle: 4,
        idle_timeout: None,
        max_lifetime: None,
    }
}

fn table(policy: Balance, endpoints: &[Arc<Endpoint>]) -> Table {
    let mut table = Table::new(policy, WorkerId::new(0), 0);
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
    let now = Instant::now();
    let mut session = Session::new(ConnId::from_parts(0, 0), now);
    for &endpoint in endpoints {
        session.on_trying(at(endpoint), None, now);
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
    for policy in EVEN {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut table = table(policy, &[endpoint(0), endpoint(1), endpoint(2)]);
        for _ in 0..300 {
            let chosen =
                table.choose(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng).unwrap();
            table.enter(chosen, Instant::now());
        }
        for index in 0..3 {
            let sessions = table.get_mut(at(index)).unwrap().sessions();
            assert!((90..=110).contains(&sessions), "{policy:?}: {sessions}");
        }
    }
}

#[test]
fn those_that_are_left_share_evenly_whichever_are_out_of_use() {
    for (policy, count) in EVEN.into_iter().flat_map(|p| (2..=7).map(move |n| (p, n))) {
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
                let index = table
                    .choose(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng)
                    .unwrap();
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
            let mut index =
                table.choose(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng).unwrap();
            if index == at(2) {
                index =
                    table.choose(Fit::Any, &tried(&[2]), None, Instant::now(), &mut rng).unwrap();
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
        table.choose(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng);
    }
    let now = Instant::now();
    table.get_mut(at(0)).unwrap().health.on_success(now, now);
    let mut chosen = [0; 3];
    for _ in 0..30 {
        chosen[usize::from(
            table.choose(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng).unwrap(),
        )] += 1;
    }
    assert!(chosen.iter().all(|count| (9..=11).contains(count)), "{chosen:?}");
}

#[test]
fn an_endpoint_that_fails_does_not_look_idle() {
    let config = HealthConfig { eject_failures: 1000, eject_time: Duration::from_secs(1) };
    let mut rng = fastrand::Rng::with_seed(1);
    for policy in [Balance::LeastConn, Balance::RandomTwo, Balance::PeakEwma] {
        let mut table = table(policy, &[endpoint(0), endpoint(1)]);
        let mut failed = 0;
        for _ in 0..200 {
            let index =
                table.choose(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng).unwrap();
            if index == at(0) {
                failed += 1;
                let entry = table.get_mut(index).unwrap();
                entry.on_failure(&config, Instant::now(), &mut rng);
            } else {
                table.enter(index, Instant::now());
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
    let before: Vec<_> = (0..200)
        .map(|i| table.choose(Fit::Any, &Tried::default(), source(i), Instant::now(), &mut rng))
        .collect();
    let rest = EndpointSnapshot {
        generation: 2,
        endpoints: endpoints[1..].to_vec(),
        ..EndpointSnapshot::default()
    };
    table.apply(&rest, &pool(), true, Instant::now());
    for (i, &was) in (0..200).zip(&before) {
        let is = table.choose(Fit::Any, &Tried::default(), source(i), Instant::now(), &mut rng);
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
        assert_eq!(
            table.choose(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng),
            Some(at(1))
        );
    }
    assert_eq!(table.choose(Fit::Any, &tried(&[1]), None, Instant::now(), &mut rng), Some(at(0)));
    eject(&mut table, at(1));
    assert!(table.choose(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng).is_some());
    assert_eq!(table.choose(Fit::Any, &tried(&[0, 1]), None, Instant::now(), &mut rng), None);
}

#[test]
fn all_that_may_have_sessions_have_their_turn_once() {
    let all = [endpoint(0), endpoint(1), endpoint(2), endpoint(3), endpoint(4)];
    let mut table = table(Balance::LeastConn, &all);
    let left = EndpointSnapshot {
        generation: 2,
        endpoints: all[2..].to_vec(),
        ..EndpointSnapshot::default()
    };
    table.get_mut(at(1)).unwrap().pool.set_in_use(1);
    table.apply(&left, &pool(), true, Instant::now());
    eject(&mut table, at(3));
    let (tried, mut behind, mut turns) = (tried(&[2]), None, Vec::new());
    while let Some(next) = table.next_of_all(behind, &tried) {
        turns.push(next);
        behind = Some(next);
    }
    // Not 0, which left, 2, which was tried, and 3, which is ejected.
    assert_eq!(turns, [at(1), at(4)]);
}

#[test]
fn a_snapshot_keeps_what_is_known_and_an_index_while_it_is_used() {
    let mut rng = fastrand::Rng::with_seed(1);
    let (a, b, c) = (endpoint(0), endpoint(1), endpoint(2));
    let mut table = table(Balance::RoundRobin, &[a, Arc::clone(&b)]);
    table.get_mut(at(0)).unwrap().pool.set_in_use(1);
    table.get_mut(at(1)).unwrap().pool.set_in_use(5);
    let next =
        EndpointSnapshot { generation: 2, endpoints: vec![b, c], ..EndpointSnapshot::default() };
    for _ in 0..2 {
        table.apply(&next, &pool(), true, Instant::now());
        assert!(!table.get_mut(at(0)).unwrap().is_present(), "removed, but a session is on it");
        assert_eq!(table.get_mut(at(1)).unwrap().sessions(), 5);
        assert_eq!(table.get_mut(at(2)).unwrap().endpoint.name, "e2");
    }
    for _ in 0..4 {
        assert_ne!(
            table.choose(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng),
            Some(at(0))
        );
    }
    table.get_mut(at(0)).unwrap().pool.set_in_use(0);
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
    table.get_mut(at(0)).unwrap().pool.set_in_use(3);
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
        entry.overdue_since(Duration::ZERO, now).is_some()
    };
    table.apply(&less, &pool(), true, now);
    assert!(!overdue(&mut table, now + SECOND), "it may come back");
    table.apply(&all, &pool(), true, now + SECOND);
    assert!(!overdue(&mut table, now + 9 * SECOND), "it is back");
    let entry = table.get_mut(at(0)).unwrap();
    assert_eq!((entry.sessions(), entry.percent()), (3, 100), "no slow start either");
    assert!(!entry.health.is_usable(), "and what is known of it is not forgotten");
    table.apply(&less, &pool(), true, now + 9 * SECOND);
    assert!(!overdue(&mut table, now + 10 * SECOND), "its time begins anew");
    assert!(overdue(&mut table, now + 11 * SECOND));
    table.apply(&all, &pool(), true, now + 12 * SECOND);
    assert!(!overdue(&mut table, now + 20 * SECOND), "and may come back all the same");
}

#[test]
fn an_endpoint_is_replaced_by_one_that_joins_about_when_it_leaves() {
    const SECOND: Duration = Duration::from_secs(1);
    let (a, b) = (endpoint(0), endpoint(1));
    let both = vec![Arc::clone(&a), Arc::clone(&b)];
    let (a, b) = (vec![a], vec![b]);
    let none = Vec::new();
    let cases = [
        ("in one step", vec![(0, &b)], true),
        ("with none in between", vec![(0, &none), (1, &b)], true),
        ("with both in between", vec![(0, &both), (1, &b)], true),
        ("by none", vec![(0, &none)], false),
        ("by one that has been there for long", vec![(0, &both), (9, &b)], false),
    ];
    for (how, steps, wanted) in cases {
        let mut table = table(Balance::LeastConn, &a);
        table.get_mut(at(0)).unwrap().pool.set_in_use(1);
        let now = Instant::now();
        for (after, endpoints) in steps {
            let snapshot =
                EndpointSnapshot { endpoints: endpoints.clone(), ..EndpointSnapshot::default() };
            table.apply(&snapshot, &pool(), true, now + after * SECOND);
        }
        assert_eq!(table.is_replaced(at(0), 2 * SECOND), wanted, "{how}");
    }
}

#[test]
fn an_endpoint_that_was_there_at_the_start_or_comes_back_replaces_none() {
    const SECOND: Duration = Duration::from_secs(1);
    let (a, b) = (endpoint(0), endpoint(1));
    let both = vec![Arc::clone(&a), Arc::clone(&b)];
    let mut table = table(Balance::LeastConn, &both);
    let now = Instant::now();
    for (after, endpoints) in [(0, vec![b]), (1, both), (2, vec![a])] {
        let snapshot = EndpointSnapshot { endpoints, ..EndpointSnapshot::default() };
        table.apply(&snapshot, &pool(), true, now + after * SECOND);
    }
    assert!(!table.is_replaced(at(1), 2 * SECOND), "the other one was away for a moment only");
}

#[test]
fn what_is_on_an_endpoint_is_overdue_once_it_is_gone_and_its_time_is_over() {
    const SECOND: Duration = Duration::from_secs(1);
    let (a, b) = (endpoint(0), endpoint(1));
    let mut table = table(Balance::LeastConn, &[a]);
    table.get_mut(at(0)).unwrap().pool.set_in_use(1);
    let now = Instant::now();
    let snapshot = EndpointSnapshot { endpoints: vec![b], ..EndpointSnapshot::default() };
    table.apply(&snapshot, &pool(), true, now);
    let entry = table.get_mut(at(0)).unwrap();
    assert_eq!(entry.overdue_since(Duration::ZERO, now + SECOND), None, "it may come back");
    entry.let_go(2 * SECOND, now + 3 * SECOND);
    assert_eq!(entry.overdue_since(Duration::ZERO, now + 4 * SECOND), Some(now + 3 * SECOND));
    assert_eq!(entry.overdue_since(5 * SECOND, now + 4 * SECOND), None);
    assert_eq!(entry.overdue_since(5 * SECOND, now + 5 * SECOND), Some(now + 5 * SECOND));
    entry.pool.set_in_use(0);
    assert_eq!(entry.overdue_since(Duration::ZERO, now + 5 * SECOND), None, "nothing is on it");
}

#[test]
fn endpoints_that_come_and_go_leave_nothing_behind() {
    let mut table = Table::new(Balance::RoundRobin, WorkerId::new(0), 0);
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
        route: RouteId::default(),
        generation,
        endpoints: there.iter().map(|&i| Arc::clone(&all[usize::from(i)])).collect(),
        stores: (0..3)
            .map(|i| endpoints::Store {
                name: format!("e{i}").into(),
                endpoint: there.iter().position(|&at| at == i),
                why: None,
            })
            .collect(),
        ..EndpointSnapshot::default()
    };
    let mut table = Table::new(Balance::LeastConn, WorkerId::new(0), 0);
    let mut owners = |there: &[u16]| {
        table.apply(&declare(1, there), &pool(), true, Instant::now());
        let owner = |i: usize| {
            let store = table.owner(StableHash::of(format!("key{i}").as_bytes())).unwrap();
            let found = table.store(store).unwrap();
            let endpoint = found.endpoint.and_then(|at| table.entries[usize::from(at)].as_ref());
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
    assert_eq!(table.get_mut(at(0)).unwrap().percent(), 100, "the first ones have no slow start");
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
    let mut off = Table::new(Balance::RoundRobin, WorkerId::new(0), 0);
    let endpoints = [endpoint(0), endpoint(1)];
    for count in [1, 2] {
        let endpoints = endpoints[..count].to_vec();
        let snapshot =
            EndpointSnapshot { generation: count as u64, endpoints, ..EndpointSnapshot::default() };
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
        let chosen =
            table.choose(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng).unwrap();
        table.enter(chosen, Instant::now());
    }
    table.get_mut(at(1)).unwrap().sessions()
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
        for policy in [Balance::LeastConn, Balance::RandomTwo, Balance::PeakEwma] {
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
    for policy in EVEN {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut table = near_and_far(policy);
        let mut chosen = [0; 4];
        for _ in 0..200 {
            let (index, spillover) =
                table.choose_near(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng);
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
    let (index, spillover) =
        table.choose_near(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng);
    assert_eq!((index, spillover), (Some(at(1)), None), "one is left");
    let (index, spillover) =
        table.choose_near(Fit::Any, &tried(&[1]), None, Instant::now(), &mut rng);
    assert!(
        (index == Some(at(2)) || index == Some(at(3))) && spillover == Some(Spillover::Few),
        "{index:?}"
    );
    eject(&mut table, at(1));
    let (index, spillover) =
        table.choose_near(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng);
    assert!(
        (index == Some(at(2)) || index == Some(at(3))) && spillover == Some(Spillover::Few),
        "{index:?}"
    );
    // With none usable anywhere, any one not tried will do, and that is no spillover.
    for index in [2, 3] {
        eject(&mut table, at(index));
    }
    let (index, spillover) =
        table.choose_near(Fit::Any, &tried(&[0, 1, 3]), None, Instant::now(), &mut rng);
    assert_eq!((index, spillover), (Some(at(2)), None));
    assert_eq!(
        table.choose_near(Fit::Any, &tried(&[0, 1, 2, 3]), None, Instant::now(), &mut rng),
        (None, None)
    );
}

#[test]
fn sessions_spill_over_where_near_endpoints_are_too_loaded() {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut table = near_and_far(Balance::LeastConn);
    let mut choose = |near: u32, far: u32| {
        for (index, sessions) in [(0, near), (1, near), (2, far), (3, far)] {
            table.get_mut(at(index)).unwrap().pool.set_in_use(sessions as usize);
        }
        table.choose_near(Fit::Any, &Tried::default(), None, Instant::now(), &mut rng)
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
