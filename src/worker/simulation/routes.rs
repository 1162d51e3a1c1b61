//! Two routes of one worker.

use std::sync::Arc;
use std::time::Duration;

use super::{Run, SECOND, partner, run_seeds};
use crate::config::Config;
use crate::limits;
use crate::proxy::RouteId;

/// Two routes share a worker; of the endpoints every other one is the second one's.
fn run_two_routes(seed: u64) -> (u64, u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let sessions_max = rng.usize(3..40);
    let mut config = Config::from_vars(std::iter::empty()).expect("defaults are valid");
    config.routes.push(Arc::clone(&config.routes[0]));
    for route in &mut config.routes {
        let route = Arc::make_mut(route);
        route.pool.min_idle = rng.usize(..3);
        route.pool.max_idle = route.pool.min_idle + rng.usize(..4);
    }
    let buffers = limits::buffers_max(sessions_max);
    let mut run = Run::with(rng, config, sessions_max, buffers);
    let of = |run: &Run, route: usize| {
        let endpoints = run.endpoints.iter().enumerate();
        endpoints.filter(|(at, _)| at % 2 == route).map(|(_, one)| Arc::clone(one)).collect()
    };
    for _ in 0..run.rng.usize(1..60) {
        let delay = Duration::from_micros(run.rng.u64(..2_000_000));
        run.engine.driver().add_client(delay);
    }
    while run.engine.driver().elapsed() < 30 * SECOND {
        // Discovery hears of each by itself, and of one it may hear that there are none.
        if run.rng.u8(..100) == 0 || run.generation < 2 {
            let route = run.generation as usize % 2;
            let endpoints = if run.rng.u8(..4) == 0 { Vec::new() } else { of(&run, route) };
            run.deliver_to(RouteId::at(route), endpoints);
        }
        run.turn();
    }
    run.check_bytes();
    let driver = run.engine.driver();
    let mut met = 0;
    for (at, peer) in driver.peers.iter().enumerate().filter(|(_, peer)| peer.is_client) {
        let Some(endpoint) = partner(driver, peer).and_then(|partner| partner.endpoint) else {
            continue;
        };
        let came_by = driver.listener_of(at);
        assert_eq!(usize::from(endpoint) % 2, came_by, "client {at} met another route's endpoint");
        met += 1;
    }
    let stats: Vec<_> = run.engine.stats().routes.iter().map(Arc::clone).collect();
    run.deliver_to(RouteId::at(1), Vec::new());
    run.stop();
    (met, stats[1].sessions_opened.get())
}

#[test]
fn two_routes_of_a_worker_never_meet() {
    let (met, of_second) = run_seeds(0, 100, run_two_routes);
    assert!(met > 0 && of_second > 0, "{met} and {of_second}: the runs test too little");
}
