//! What is found where several things are wrong, or seem to be.

use std::cell::Cell;

use super::*;
use crate::config::Config;
use crate::control::testing::{block_on, endpoint, view};
use crate::metrics::{CloseReason, Outcome, RouteStats, WorkerStats};
use crate::protocol::Verb;
use crate::proxy::endpoints::Endpoint;

const MS: Duration = Duration::from_millis(1);

/// A process of two workers and a route, looked at each second.
struct Scene {
    view: View,
    looks: Looks,
    now: Instant,
    /// What the log would have said so far: each problem as it begins, and after a `-` as it ends.
    log: Vec<String>,
}

impl Scene {
    fn new(variables: &[(&str, &str)]) -> Self {
        let base = [("AEGIS_PROTOCOL", "chronos"), ("AEGIS_POOL_MODE", "request")];
        let all = base.iter().chain(variables);
        let all = all.map(|&(name, value)| (name.to_owned(), value.to_owned()));
        let config = Config::from_vars(all).unwrap();
        let view = view(config, vec![endpoint("a", "10.0.0.1:1"), endpoint("b", "10.0.0.2:1")]);
        let now = Instant::now();
        let looks = block_on(Looks::new(&view, now));
        Self { view, looks, now, log: Vec::new() }
    }

    fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        self.view.routes().next().unwrap().snapshot.endpoints.clone()
    }

    /// Lets 15 seconds pass, in each of which this happens. Returns what is found then.
    fn pass(&mut self, happens: impl Fn(&Self)) -> Vec<(&'static str, String)> {
        self.pass_seconds(15, |scene, _| happens(scene))
    }

    /// The same for so many seconds, which are counted from 0.
    fn pass_seconds(
        &mut self,
        seconds: u32,
        happens: impl Fn(&Self, u32),
    ) -> Vec<(&'static str, String)> {
        for second in 0..seconds {
            happens(self, second);
            self.now += Duration::from_secs(1);
            let now = block_on(self.looks.look(&self.view, self.now));
            let before = self.view.set_findings(now.clone());
            let names = |all: &[Finding], others: &[Finding]| {
                let news = |one: &&Finding| !others.iter().any(|other| other.is_about(one));
                all.iter().filter(news).map(|one| one.problem.name()).collect::<Vec<_>>()
            };
            self.log.extend(names(&now, &before).into_iter().map(str::to_owned));
            self.log.extend(names(&before, &now).into_iter().map(|name| format!("-{name}")));
        }
        let all = self.view.findings().into_iter();
        all.map(|finding| (finding.problem.name(), finding.words)).collect()
    }

    fn worker(&self) -> &WorkerStats {
        &self.view.workers()[0].stats
    }

    fn route(&self) -> &RouteStats {
        &self.worker().routes[0]
    }

    /// Requests that waited for a connection, and then for their first byte.
    fn answer(&self, waited: Duration, first_byte: Duration) {
        for _ in 0..50 {
            self.route().queue_wait.record(waited);
            self.reply(first_byte);
        }
    }

    /// A reply that nothing but its backend had to be waited for.
    fn reply(&self, took: Duration) {
        self.route().count_first_byte(took, took);
    }

    /// Of a second, the first worker ran so many milliseconds, and waited for a core so many.
    fn run(&self, ran: u32, waited: u32) {
        let worker = self.worker();
        worker.cpu.set(worker.cpu.get() + MS * ran);
        worker.core_wait.set(worker.core_wait.get() + MS * waited);
    }

    fn give_up(&self, outcome: Outcome) {
        (0..5).for_each(|_| self.route().count_request(Verb::OTHER, outcome, MS));
    }
}

fn kinds(found: &[(&'static str, String)]) -> Vec<&'static str> {
    found.iter().map(|(kind, _)| *kind).collect()
}

/// A scene in which a first byte usually takes 2 ms.
fn usual(variables: &[(&str, &str)]) -> Scene {
    let mut scene = Scene::new(variables);
    assert_eq!(scene.pass(|scene| scene.answer(Duration::ZERO, 2 * MS)), []);
    scene
}

#[test]
fn a_route_says_from_when_on_a_first_byte_is_slow() {
    let takes = |limit: &str, milliseconds: u32| {
        let mut scene = Scene::new(&[("AEGIS_SLOW_FIRST_BYTE", limit)]);
        scene.pass(|scene| scene.answer(Duration::ZERO, MS * milliseconds))
    };
    let words = |text: &str| vec![("backend_slow", text.to_owned())];
    assert_eq!(takes("1s", 1500), words("the first byte takes 1.5 s; AEGIS_SLOW_FIRST_BYTE is 1s"));
    assert_eq!(takes("2s", 1500), []);
    assert_eq!(takes("off", 1500), []);
    // What is unusual is said all the same.
    let mut scene = usual(&[("AEGIS_SLOW_FIRST_BYTE", "off")]);
    let found = scene.pass(|scene| scene.answer(Duration::ZERO, 20 * MS));
    assert_eq!(kinds(&found), ["backend_slow"]);
    assert!(found[0].1.starts_with("the first byte takes 20.0 ms; usual are 2."), "{found:?}");
}

#[test]
fn waits_for_a_connection_are_a_slow_backends_if_it_has_become_slow() {
    let mut scene = usual(&[]);
    let found = scene.pass(|scene| {
        scene.answer(80 * MS, 20 * MS);
        scene.give_up(Outcome::QueueTimeout);
    });
    assert_eq!(kinds(&found), ["backend_slow"], "{found:?}");
    // As slow as it always was, it is not what has changed.
    let mut scene = Scene::new(&[]);
    let found = scene.pass(|scene| scene.answer(80 * MS, 20 * MS));
    assert_eq!(kinds(&found), ["pool_small"], "{found:?}");
}

#[test]
fn a_backend_that_answers_nothing_is_told_from_a_pool_that_is_too_small() {
    let mut scene = usual(&[]);
    let found = scene.pass(|scene| scene.give_up(Outcome::QueueTimeout));
    assert_eq!(kinds(&found), ["backend_slow"], "{found:?}");
    assert!(found[0].1.starts_with("no request is answered, and "), "{found:?}");
    // Sessions may be silent for long.
    let mut scene = usual(&[("AEGIS_POOL_MODE", "session")]);
    let found = scene.pass(|scene| scene.route().count_close(CloseReason::QueueTimeout));
    assert_eq!(found, [("pool_small", "10 clients got no backend connection".to_owned())]);
}

#[test]
fn clients_without_a_first_byte_count_as_slow_where_others_got_theirs_in_time() {
    let words = |count: u32| {
        let words = format!("{count} clients got no first byte; AEGIS_SLOW_FIRST_BYTE is 1s");
        vec![("backend_slow", words)]
    };
    let wait = |scene: &Scene| scene.route().overdue.set(12);
    // Nobody was ever answered: that may be how it is.
    assert_eq!(Scene::new(&[]).pass(wait), []);
    // Most answers come when there is something to tell.
    let mut scene = Scene::new(&[]);
    (0..100).for_each(|_| scene.reply(60_000 * MS));
    (0..99).for_each(|_| scene.reply(MS));
    assert_eq!(scene.pass(wait), []);
    let mut scene = usual(&[]);
    let wait_few = |scene: &Scene| scene.route().overdue.set(9);
    assert_eq!(scene.pass(wait_few), []);
    assert_eq!(scene.pass(wait), words(12));
    // Three have left, and still nobody was answered.
    assert_eq!(scene.pass(wait_few), words(9));
    // Each second one of those has left that were seen.
    assert_eq!(scene.pass(|scene| scene.route().left_overdue.add(2)), words(20));
    scene.route().overdue.set(0);
    assert_eq!(scene.pass(|_| {}), []);
    // What was asked, or its answer, may be lost.
    let found = scene.pass(|scene| {
        wait(scene);
        let stats = &scene.endpoints()[0].stats[0];
        stats.segments.add(100);
        stats.retransmits.add(20);
    });
    assert_eq!(kinds(&found), ["network_lossy"], "{found:?}");
    let mut scene = usual(&[("AEGIS_SLOW_FIRST_BYTE", "off")]);
    assert_eq!(scene.pass(wait), []);
}

#[test]
fn waits_in_vain_for_a_backend_that_had_stopped_are_no_pools_fault_once_it_is_back() {
    let mut scene = usual(&[]);
    let found = scene.pass(|scene| {
        scene.route().overdue.set(12);
        scene.answer(Duration::ZERO, 2 * MS);
        scene.give_up(Outcome::QueueTimeout);
    });
    assert_eq!(kinds(&found), ["backend_slow"], "{found:?}");
    scene.pass(|scene| {
        scene.route().overdue.set(0);
        scene.answer(Duration::ZERO, 2 * MS);
        let found = scene.view.findings();
        assert!(found.iter().all(|it| it.problem == Problem::BackendSlow), "{found:?}");
    });
}

#[test]
fn a_pool_that_is_too_small_is_found_though_answers_are_few_and_far_between() {
    let mut scene = Scene::new(&[]);
    let seconds = Cell::new(0);
    let mut pass = || {
        scene.pass(|scene| {
            scene.give_up(Outcome::QueueTimeout);
            if seconds.replace(seconds.get() + 1) % 3 == 0 {
                scene.reply(3000 * MS);
            }
        })
    };
    // Whether the latest look has seen one or not.
    for _ in 0..3 {
        let found = pass();
        assert_eq!(kinds(&found), ["pool_small"], "{found:?}");
        seconds.set(seconds.get() + 1);
    }
}

#[test]
fn a_queue_that_is_full_in_an_outage_is_no_pools_fault() {
    let mut scene = usual(&[]);
    let eject = |scene: &Scene, is: u64| {
        let all = scene.endpoints();
        all.iter().flat_map(|endpoint| &endpoint.stats).for_each(|stats| stats.ejected.set(is));
    };
    let found = scene.pass(|scene| {
        eject(scene, 1);
        scene.give_up(Outcome::QueueFull);
    });
    assert_eq!(kinds(&found), ["no_endpoint", "backend_refusing"], "{found:?}");
    // Between two looks one may have been back for a moment.
    let found = scene.pass(|scene| {
        eject(scene, 0);
        scene.route().outage.set(scene.route().outage.get() + 500 * MS);
        scene.give_up(Outcome::QueueFull);
        scene.answer(30 * MS, 2 * MS);
    });
    assert_eq!(found, []);
}

#[test]
fn a_worker_that_comes_late_says_nothing_of_others() {
    let slow = |scene: &Scene| scene.answer(30 * MS, 20 * MS);
    // Of two workers one is busy.
    for (ran, waited, kind) in [(990, 0, "worker_overloaded"), (300, 690, "cpu_throttled")] {
        let mut scene = usual(&[]);
        let found = scene.pass(|scene| {
            scene.run(ran, waited);
            slow(scene);
        });
        assert_eq!(kinds(&found), [kind], "{found:?}");
        // That is not how it usually is.
        let found = scene.pass(slow);
        assert_eq!(kinds(&found), ["backend_slow"], "{found:?}");
    }
}

#[test]
fn of_many_workers_one_that_waits_for_its_core_is_named() {
    let busy = |first| [vec![first], vec![0.02; 15]].concat();
    assert_eq!(overloaded(&busy(0.6), &busy(0.38)), None);
    let words = "worker 0 waited for a core 38 % of the time: a CPU limit, or a busy node";
    assert_eq!(throttled(&busy(0.6), &busy(0.38)).as_deref(), Some(words));
    assert_eq!(throttled(&busy(0.98), &busy(0.01)), None);
    assert!(overloaded(&busy(0.98), &busy(0.01)).is_some());
}

#[test]
fn a_network_that_loses_segments_is_neither_a_slow_nor_a_refusing_backend() {
    let mut scene = usual(&[]);
    let found = scene.pass(|scene| {
        let stats = &scene.endpoints()[0].stats[0];
        stats.segments.add(100);
        stats.retransmits.add(20);
        stats.connect_failures.add(1);
        stats.set_failure(Failure::TimedOut);
        scene.answer(30 * MS, 20 * MS);
    });
    assert_eq!(kinds(&found), ["network_lossy"], "{found:?}");
    let found = scene.pass(|scene| {
        let stats = &scene.endpoints()[0].stats[0];
        stats.segments.add(100);
        stats.retransmits.add(20);
        stats.connect_failures.add(1);
        stats.set_failure(Failure::Refused);
    });
    assert_eq!(kinds(&found), ["backend_refusing", "network_lossy"], "{found:?}");
}

#[test]
fn an_endpoint_that_refuses_is_told_from_the_segments_that_are_lost_on_the_way_to_it() {
    let mut scene = usual(&[]);
    // One worker has heard nothing of late, or at a time when all were well; another one has heard a refusal.
    for is_past in [false, true] {
        let found = scene.pass(|scene| {
            let endpoints = scene.endpoints();
            let [first, second] = &endpoints[0].stats[..] else { unreachable!("of two workers") };
            first.segments.add(100);
            first.retransmits.add(20);
            first.set_failure(Failure::TimedOut);
            first.failures_in_a_row.set(u64::from(!is_past));
            second.connect_failures.add(1);
            second.set_failure(Failure::Refused);
            second.failures_in_a_row.set(1);
        });
        assert_eq!(kinds(&found), ["backend_refusing", "network_lossy"], "{found:?}");
        assert!(found[0].1.starts_with("a refuses: "), "{found:?}");
    }
}

#[test]
fn a_few_that_wait_for_news_make_no_slow_backend() {
    let mut scene = usual(&[]);
    let poll = |scene: &Scene| scene.reply(25_000 * MS);
    scene.pass_seconds(60, |scene, _| {
        scene.answer(Duration::ZERO, 2 * MS);
        poll(scene);
    });
    assert_eq!(scene.log, [""; 0]);
    // It is not usual because of them.
    scene.pass(|scene| {
        scene.answer(Duration::ZERO, 20 * MS);
        poll(scene);
    });
    assert_eq!(scene.log, ["backend_slow"]);
}

#[test]
fn clients_that_take_their_time_to_send_make_no_slow_backend() {
    let mut scene = usual(&[]);
    scene.pass(|scene| {
        (0..20).for_each(|_| scene.route().count_first_byte(5000 * MS, 2 * MS));
    });
    assert_eq!(scene.log, [""; 0]);
}

#[test]
fn what_a_new_endpoint_has_failed_until_it_is_seen_counts() {
    let mut before = RouteSample::default();
    let (new, old) = (endpoint("new", "10.0.0.1:1"), endpoint("old", "10.0.0.2:1"));
    for endpoint in [&new, &old] {
        endpoint.stats[0].connect_failures.add(3);
        endpoint.stats[0].set_failure(Failure::Refused);
    }
    let sample = |all| RouteSample::of_endpoints(all);
    let mut seen = Seen::default();
    seen.add(&sample(vec![Arc::clone(&old)]));
    let now = sample(vec![new, old]);
    before.adopt(&now, &seen);
    assert_eq!(refusing(&before, &now).as_deref(), Some("new refuses: 3 connects failed"));
}

#[test]
fn an_endpoint_that_nobody_has_connected_to_of_late_is_out_of_use() {
    let ejected = endpoint("a", "10.0.0.1:1");
    ejected.stats.iter().for_each(|stats| stats.ejected.set(1));
    let sample = || RouteSample::of_endpoints(vec![Arc::clone(&ejected)]);
    let words = "a has failed: 1 of 1 endpoints are out of use";
    assert_eq!(refusing(&sample(), &sample()).as_deref(), Some(words));
    // The one worker that has clients knows, and tries it again every half a minute.
    ejected.stats[1].ejected.set(0);
    let words = "a has failed: 1 of 1 endpoints are out of use for some workers";
    assert_eq!(refusing(&sample(), &sample()).as_deref(), Some(words));
    ejected.stats[0].ejected.set(0);
    assert_eq!(refusing(&sample(), &sample()), None);
}

#[test]
fn a_problem_that_goes_on_is_logged_once() {
    // More than ten replies in ten seconds, and fewer in five: one after another, or at once.
    for each in [[1, 2], [3, 0]] {
        let mut scene = Scene::new(&[]);
        scene.pass_seconds(60, |scene, second| {
            (0..each[second as usize % 2]).for_each(|_| scene.reply(2000 * MS));
        });
        assert_eq!(scene.log, ["backend_slow"]);
    }
    let mut scene = usual(&[]);
    scene.pass_seconds(60, |scene, second| {
        let stats = &scene.endpoints()[0].stats[0];
        stats.segments.add(10);
        stats.retransmits.add(u64::from(1 + second % 2));
    });
    assert_eq!(scene.log, ["network_lossy"]);
    // Now a little above the bound, now a little below.
    let mut scene = Scene::new(&[]);
    scene.pass_seconds(60, |scene, second| {
        scene.answer(if second % 6 < 3 { 12 * MS } else { 8 * MS }, 40 * MS);
    });
    assert_eq!(scene.log, ["pool_small"]);
}

#[test]
fn a_backend_that_answers_nobody_is_not_well_again_between_two_that_give_up() {
    let mut scene = usual(&[]);
    scene.pass_seconds(120, |scene, second| {
        // Two clients, who ask again when their time is over.
        let is_over = second % 30 == 29;
        scene.route().overdue.set(if is_over { 0 } else { 2 });
        if is_over {
            (0..2).for_each(|_| scene.route().count_request(Verb::OTHER, Outcome::Timeout, MS));
        }
    });
    assert_eq!(scene.log, ["backend_slow"]);
    scene.route().overdue.set(0);
    scene.pass_seconds(30, |scene, _| scene.reply(2 * MS));
    assert_eq!(scene.log, ["backend_slow", "-backend_slow"]);
}

#[test]
fn what_lasts_for_a_moment_is_no_problem() {
    for at in [20, 21, 22, 23, 24] {
        // Clients that come all at once wait for their connections, and then for each other.
        let mut scene = usual(&[]);
        scene.pass_seconds(60, |scene, second| {
            let waited = if second == at { 50 * MS } else { Duration::ZERO };
            scene.answer(waited, 2 * MS);
        });
        assert_eq!(scene.log, [""; 0]);
        // A backend stops for a moment.
        let mut scene = usual(&[]);
        scene.pass_seconds(60, |scene, second| {
            let took = if second == at { 500 * MS } else { 2 * MS };
            scene.answer(Duration::ZERO, took);
        });
        assert_eq!(scene.log, [""; 0]);
    }
}

#[test]
fn a_busy_backend_that_becomes_slow_at_once_makes_no_small_pool() {
    let mut scene = Scene::new(&[]);
    scene.pass(|scene| (0..60).for_each(|_| scene.answer(Duration::ZERO, MS)));
    scene.pass_seconds(60, |scene, _| scene.answer(400 * MS, 200 * MS));
    assert_eq!(scene.log, ["backend_slow"]);
}

#[test]
fn what_cannot_be_judged_for_a_while_is_not_over() {
    let mut scene = usual(&[]);
    scene.pass(|scene| scene.answer(30 * MS, 2 * MS));
    scene.pass(|scene| scene.answer(300 * MS, 20 * MS));
    assert_eq!(scene.log, ["pool_small", "backend_slow"]);
    scene.pass(|scene| {
        scene.run(300, 690);
        scene.answer(300 * MS, 20 * MS);
    });
    assert_eq!(scene.log, ["pool_small", "backend_slow", "cpu_throttled"]);
    scene.pass_seconds(30, |scene, _| scene.answer(Duration::ZERO, 2 * MS));
    let mut over = scene.log.split_off(3);
    over.sort_unstable();
    assert_eq!(over, ["-backend_slow", "-cpu_throttled", "-pool_small"]);
}
