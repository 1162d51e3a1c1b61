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
    // An ejection is over, a probe has lasted, and the failback time has passed.
    const CALM: Duration = Duration::from_secs(45);
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut config = Config::from_vars(std::iter::empty()).expect("defaults are valid");
    let route = Arc::make_mut(&mut config.routes[0]);
    route.endpoint_wait = 60 * SECOND;
    route.failback_time = rng.u32(..4) * SECOND;
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
    while run.engine.driver().elapsed() < TROUBLE + CALM {
        turn(&mut run, &mut tier, &mut moves);
    }
    assert_eq!(tier, 0, "those that come first have been well for long");
    let late = run.engine.driver().peers.len();
    for _ in 0..8 {
        run.engine.driver().add_client(Duration::ZERO);
    }
    while run.engine.driver().elapsed() < TROUBLE + CALM + 5 * SECOND {
        turn(&mut run, &mut tier, &mut moves);
    }
    let driver = run.engine.driver();
    let late = driver.peers[late..].iter().filter(|peer| peer.is_client);
    let met = late.filter_map(|peer| partner(driver, peer)?.endpoint).map(usize::from);
    let met: Vec<_> = met.map(|at| run.tiers[at]).collect();
    assert!(met.iter().all(|&tier| tier == Tier::FIRST), "{met:?}");
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
