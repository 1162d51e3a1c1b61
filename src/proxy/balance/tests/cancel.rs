//! Endpoints that are asked to cancel what others do.

use super::*;

#[test]
fn an_endpoint_that_left_is_asked_for_as_long_as_any_worker_has_sessions_on_it() {
    let address = |port| SocketAddr::from(([127, 0, 0, 1], port)).into();
    let endpoints = [1, 2].map(|port| Endpoint::new(format!("e{port}"), address(port), 2));
    let mut table = table(Balance::LeastConn, &endpoints);
    endpoints[1].stats[1].sessions_active.set(1);
    let generation = 2;
    let first = vec![Arc::clone(&endpoints[0])];
    let snapshot = EndpointSnapshot { generation, endpoints: first, ..EndpointSnapshot::default() };
    let now = Instant::now();
    table.apply(&snapshot, &pool(), true, now);
    table.get_mut(at(1)).unwrap().let_go(Duration::ZERO, now);
    table.forget_unused();
    let none = tried(&[]);
    assert_eq!(table.next_of_all(Some(at(0)), &none), Some(at(1)), "the other worker's session");
    endpoints[1].stats[1].sessions_active.set(0);
    assert_eq!(table.next_of_all(Some(at(0)), &none), None);
    table.forget_unused();
    assert!(table.get(at(1)).is_none());
}
