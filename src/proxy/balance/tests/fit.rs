//! Endpoints that take connects, among others that do not.

use super::*;

#[test]
fn the_one_that_is_fit_is_found_however_many_are_not() {
    const COUNT: u16 = 100;
    let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let all: Vec<_> = (0..COUNT).map(endpoint).collect();
    for policy in EVEN.into_iter().chain([Balance::SourceHash]) {
        let mut table = table(policy, &all);
        for index in (0..COUNT).filter(|&index| index != 42) {
            table.get_mut(at(index)).unwrap().recovery.on_failed(now, &mut rng);
        }
        for fit in [Fit::Usable, Fit::UsableInTurn, Fit::InTurn] {
            for source in [None, Some(IpAddr::from([10, 0, 0, 1]))] {
                let chosen = table.choose(fit, &Tried::default(), source, now, &mut rng);
                assert_eq!(chosen, Some(at(42)), "{policy:?}, {fit:?}");
                let chosen = table.choose_near(fit, &Tried::default(), source, now, &mut rng);
                assert_eq!(chosen.0, Some(at(42)), "{policy:?}, {fit:?}");
            }
        }
        table.get_mut(at(42)).unwrap().recovery.on_failed(now, &mut rng);
        for (fit, is_any) in [(Fit::Any, true), (Fit::Usable, false), (Fit::InTurn, false)] {
            let chosen = table.choose(fit, &Tried::default(), None, now, &mut rng);
            assert_eq!(chosen.is_some(), is_any, "{policy:?}, {fit:?}");
        }
    }
}
