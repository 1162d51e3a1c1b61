//! Balancing by latency.

use super::*;

const MS: Duration = Duration::from_millis(1);

/// A table by latency, in which these endpoints have answered in so many milliseconds.
fn measured(answered_ms: &[Option<u32>], now: Instant) -> Table {
    let endpoints: Vec<_> = (0..answered_ms.len() as u16).map(endpoint).collect();
    let mut table = table(Balance::PeakEwma, &endpoints);
    for (i, ms) in answered_ms.iter().enumerate() {
        let (at, conn) = (EndpointId::at(i), ConnId::from_parts(i as u32, 0));
        if let Some(ms) = ms {
            table.asked(at, conn, now);
            table.answered(at, conn, now + *ms * MS);
        }
    }
    table
}

/// Where so many requests go of which none is answered yet.
fn spread(table: &mut Table, requests: u32, now: Instant) -> Vec<u32> {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut chosen = vec![0; table.len()];
    for conn in 0..requests {
        let index = table.choose(Fit::Any, &Tried::default(), None, now, &mut rng).unwrap();
        table.enter(index, now);
        table.asked(index, ConnId::from_parts(100 + conn, 0), now);
        chosen[usize::from(index)] += 1;
    }
    chosen
}

#[test]
fn requests_are_shared_by_how_fast_endpoints_answer() {
    let now = Instant::now();
    let chosen = spread(&mut measured(&[Some(10), Some(20), Some(40)], now), 70, now);
    assert_eq!(chosen, [40, 20, 10]);
}

#[test]
fn an_endpoint_never_measured_or_not_for_long_gets_as_much_as_the_fastest_and_no_more() {
    let now = Instant::now();
    for first in [None, Some(4)] {
        let mut table = measured(&[first, None, None], now);
        let later = now + Duration::from_secs(3600);
        for (i, ms) in [(1, 5), (2, 10)] {
            let conn = ConnId::from_parts(u32::from(i), 0);
            table.asked(at(i), conn, later);
            table.answered(at(i), conn, later + ms * MS);
        }
        let fastest = first.unwrap_or(5);
        let chosen = spread(&mut table, 50, later);
        let expected = if fastest == 4 { 23 } else { 20 };
        assert!(chosen[0].abs_diff(expected) <= 1, "{first:?}: {chosen:?}");
    }
}

#[test]
fn one_that_gets_nothing_is_not_the_fastest_of_those_that_do() {
    let fail_check = |table: &mut Table, index| {
        table.get_mut(index).unwrap().health.set_fails_check(true);
    };
    for (why, out_of_use) in [("its checks fail", fail_check as fn(&mut _, _)), ("ejected", eject)]
    {
        let now = Instant::now();
        let mut table = measured(&[Some(1), Some(100), Some(100)], now);
        out_of_use(&mut table, at(0));
        // Its estimate has fallen to next to nothing: a reply has taken no longer than elsewhere.
        let later = now + Duration::from_secs(3600);
        let conn = ConnId::from_parts(1, 0);
        table.asked(at(1), conn, later);
        table.answered(at(1), conn, later + 100 * MS);
        let chosen = spread(&mut table, 20, later + 100 * MS);
        assert_eq!(chosen, [0, 10, 10], "{why}");
    }
}

#[test]
fn an_endpoint_that_stalls_is_seen_while_it_does() {
    let now = Instant::now();
    let mut table = measured(&[Some(1), Some(1)], now);
    let conn = ConnId::from_parts(9, 0);
    table.enter(at(0), now);
    table.asked(at(0), conn, now);
    assert_eq!(table.get(at(0)).unwrap().sessions(), 1);
    assert_eq!(spread(&mut table, 20, now + 20 * MS), [0, 20], "20 ms for one, or 1 ms for twenty");
}

#[test]
fn an_endpoint_does_not_look_well_because_its_clients_lose_patience() {
    let now = Instant::now();
    let mut table = measured(&[Some(1), Some(1)], now);
    let (conn, later) = (ConnId::from_parts(9, 0), now + 500 * MS);
    table.asked(at(0), conn, now);
    table.unanswered(at(0), conn, later);
    assert_eq!(spread(&mut table, 100, later), [0, 100]);
}

#[test]
fn a_short_handshake_promises_nothing_and_a_greeting_counts_from_its_start() {
    let now = Instant::now();
    let mut table = measured(&[None, Some(10)], now);
    let conn = ConnId::from_parts(9, 0);
    table.asked(at(0), conn, now);
    table.shook_hands(at(0), conn, now + MS);
    assert_eq!(table.get(at(0)).unwrap().latency.measured(), None);
    assert_eq!(spread(&mut table, 10, now + MS), [5, 5], "as fast as the fastest one");
    table.answered(at(0), conn, now + 30 * MS);
    let greeted = table.get(at(0)).unwrap().latency.measured();
    assert_eq!(greeted, Some(30_000_000));
}

#[test]
fn connections_that_an_endpoint_forgot_are_known_after_the_first() {
    let begun = Instant::now();
    let mut table = table(Balance::LeastConn, &[endpoint(0)]);
    let entry = table.get_mut(at(0)).unwrap();
    assert!(!entry.on_forgotten(begun, begun + MS), "the first one shows it");
    assert!(entry.on_forgotten(begun, begun + MS), "and the others share its fate");
    assert!(!entry.on_forgotten(begun + 2 * MS, begun + 3 * MS), "but not those made since");
}
