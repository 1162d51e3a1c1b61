//! Outages of all endpoints, waited through.

use std::sync::Arc;
use std::time::Duration;

use super::{Run, SECOND, run_seeds};
use crate::config::Config;
use crate::io::sim::Reachability;
use crate::limits;
use crate::metrics::CloseReason;

/// All endpoints go away, each in its way, and come back after a while. Until then whoever wants to
/// be served waits.
fn outage(seed: u64) -> (u64, u64) {
    const SOON: Duration = Duration::from_secs(4);
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut config = Config::from_vars(std::iter::empty()).expect("defaults are valid");
    let route = Arc::make_mut(&mut config.routes[0]);
    route.endpoint_wait = 60 * SECOND;
    route.pool.min_idle = rng.usize(..3);
    route.pool.max_idle = route.pool.min_idle + rng.usize(..4);
    let clients = rng.usize(1..60);
    let mut run = Run::with(rng, config, clients, limits::buffers_max(clients));
    let all = run.endpoints.clone();
    run.deliver(all.clone());
    run.turn();
    for at in 0..all.len() {
        let states = [Reachability::Refusing, Reachability::Silent];
        let state = states[run.rng.usize(..2)];
        run.engine.driver().reach(at, state);
    }
    if run.rng.u8(..4) == 0 {
        run.deliver(Vec::new());
    }
    for _ in 0..clients {
        let delay = Duration::from_millis(run.rng.u64(..20_000));
        run.engine.driver().add_client(delay);
    }
    let back = Duration::from_millis(run.rng.u64(..20_000));
    while run.engine.driver().elapsed() < back {
        run.turn();
    }
    for at in 0..all.len() {
        run.engine.driver().reach(at, Reachability::Up);
    }
    run.deliver(all);
    let waited = run.stats.outage_waited.get();
    while run.engine.driver().elapsed() < back + SOON {
        run.turn();
    }
    assert_eq!(run.engine.waiting(), 0, "they wait though all endpoints are back");
    let given_up = run.stats.outage_given_up.get();
    run.check_bytes();
    run.stop();
    assert_eq!(given_up, 0, "nobody has waited for too long");
    (waited, run.stats.closed(CloseReason::ConnectFailed))
}

/// The same with few places: once endpoints are back, those that wait do so for a place at a full one,
/// and all are served as sessions end.
fn outage_with_few_places(seed: u64) -> (u64, u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut config = Config::from_vars(std::iter::empty()).expect("defaults are valid");
    let route = Arc::make_mut(&mut config.routes[0]);
    route.endpoint_wait = 30 * SECOND;
    route.pool.min_idle = rng.usize(..2);
    route.pool.endpoint_max = Some(rng.usize(1..4));
    route.requests.queue_timeout = 600 * SECOND;
    // Whoever stalls holds a place for no longer.
    route.idle_timeout = Some(5 * SECOND);
    let clients = rng.usize(1..40);
    let mut run = Run::with(rng, config, clients, limits::buffers_max(clients));
    let all = run.endpoints.clone();
    run.deliver(all.clone());
    for _ in 0..clients {
        let delay = Duration::from_millis(run.rng.u64(..20_000));
        run.engine.driver().add_client(delay);
    }
    for _ in 0..run.rng.u8(1..4) {
        let until = run.engine.driver().elapsed() + Duration::from_millis(run.rng.u64(..10_000));
        for at in 0..all.len() {
            let state = [Reachability::Refusing, Reachability::Silent][run.rng.usize(..2)];
            run.engine.driver().reach(at, state);
        }
        while run.engine.driver().elapsed() < until {
            run.turn();
        }
        (0..all.len()).for_each(|at| run.engine.driver().reach(at, Reachability::Up));
        let until = until + Duration::from_millis(run.rng.u64(..5_000));
        while run.engine.driver().elapsed() < until {
            run.turn();
        }
    }
    while run.engine.driver().clients_outside() + run.engine.waiting() > 0 {
        run.turn();
        assert!(run.engine.driver().elapsed() < 400 * SECOND, "somebody waits for ever");
    }
    let waited = run.stats.outage_waited.get();
    let failed = run.stats.outage_given_up.get() + run.stats.closed(CloseReason::QueueTimeout);
    run.check_bytes();
    run.stop();
    assert_eq!(failed, 0, "nobody has waited for too long");
    (waited, run.stats.closed(CloseReason::Finished))
}

#[test]
fn whoever_waits_through_outages_and_then_for_a_place_is_served() {
    let (waited, finished) = run_seeds(30_000, 100, outage_with_few_places);
    println!("{waited} sessions waited, {finished} finished in order");
    assert!(waited > 50 && finished > 50, "{waited} and {finished}: the runs test too little");
}

#[test]
fn whoever_waits_through_an_outage_is_served_soon_after_it() {
    let (waited, failed) = run_seeds(0, 100, outage);
    println!("{waited} sessions waited");
    assert!(waited > 100, "{waited}: the runs test too little");
    assert_eq!(failed, 0);
}
