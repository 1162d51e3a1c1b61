//! Endpoints that stand in for others.

use std::sync::Arc;
use std::time::Duration;

use super::{Run, SECOND, partner, run_seeds};
use crate::config::{Balance, Config};
use crate::io::sim::Reachability;
use crate::limits;
use crate::proxy::endpoints::Tier;

/// Endpoints stand in for others, and all of them fail and recover. Once all have been well for a while,
/// who comes meets those that come first.
fn tiers(seed: u64) -> (u64, u64) {
    const TROUBLE: Duration = Duration::from_secs(20);
    // A few ejections.
    const WELL_WITHIN: Duration = Duration::from_secs(300);
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut config = Config::from_vars(std::iter::empty()).expect("defaults are valid");
    let route = Arc::make_mut(&mut config.routes[0]);
    route.endpoint_wait = 60 * SECOND;
    route.failback_time = rng.u32(..4) * SECOND;
    // And a probe.
    let failback = route.failback_time + SECOND;
    route.pool.min_idle = rng.usize(..3);
    route.pool.max_idle = route.pool.min_idle + rng.usize(..4);
    route.balance = [Balance::LeastConn, Balance::RoundRobin, Balance::PeakEwma][rng.usize(..3)];
    let mut run = Run::with(rng, config, 60, limits::buffers_max(60));
    for tier in &mut run.tiers[1..] {
        *tier = Tier::at(run.rng.usize(..Tier::COUNT_MAX));
    }
    let all = run.endpoints.clone();
    run.deliver(all.clone());
    for _ in 0..run.rng.usize(1..40) {
        let delay = Duration::from_millis(run.rng.u64(..20_000));
        run.engine.driver().add_client(delay);
    }
    let mut moves = 0;
    let mut tier = 0;
    let turn = |run: &mut Run, tier: &mut u64, moves: &mut u64| {
        run.turn();
        *moves += u64::from(std::mem::replace(tier, run.stats.tier.get()) != run.stats.tier.get());
    };
    while run.engine.driver().elapsed() < TROUBLE {
        run.disturb();
        turn(&mut run, &mut tier, &mut moves);
    }
    (0..all.len()).for_each(|at| run.engine.driver().reach(at, Reachability::Up));
    run.deliver(all);
    // A server that ends sessions at once is ejected, however well it is: each time it has to show that anew.
    let mut well_since = TROUBLE;
    while run.engine.driver().elapsed() < well_since + failback {
        turn(&mut run, &mut tier, &mut moves);
        if run.endpoints.iter().any(|endpoint| endpoint.stats[0].ejected.get() > 0) {
            well_since = run.engine.driver().elapsed();
        }
        assert!(well_since < TROUBLE + WELL_WITHIN, "somebody stays ejected");
    }
    assert_eq!(tier, 0, "all have been well for the failback time");
    let (before, begun) = (moves, run.engine.driver().elapsed());
    let late = run.engine.driver().peers.len();
    for _ in 0..8 {
        run.engine.driver().add_client(Duration::ZERO);
    }
    while run.engine.driver().elapsed() < begun + 5 * SECOND {
        turn(&mut run, &mut tier, &mut moves);
    }
    let driver = run.engine.driver();
    let late = driver.peers[late..].iter().filter(|peer| peer.is_client);
    let met = late.filter_map(|peer| partner(driver, peer)?.endpoint).map(usize::from);
    let met: Vec<_> = met.map(|at| run.tiers[at]).collect();
    // Sessions that end at once may have the first ones left again.
    let is_left = moves > before;
    assert!(is_left || met.iter().all(|&tier| tier == Tier::FIRST), "{met:?}");
    run.check_bytes();
    run.stop();
    (moves, met.len() as u64)
}

#[test]
fn endpoints_stand_in_for_others_only_while_these_are_not_usable() {
    let (moves, met) = run_seeds(0, 40, tiers);
    println!("{moves} times another tier was used, {met} clients met the first one at last");
    assert!(moves > 0 && met > 0, "{moves} and {met}: the runs test too little");
}
