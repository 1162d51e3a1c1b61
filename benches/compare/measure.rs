//! Runs a scenario: every contestant once a round, in an order that rotates and turns round.

use std::thread::sleep;
use std::time::Duration;

use crate::backend::Backend;
use crate::floor;
use crate::load::{self, Edge, Load, Outcome, Pace};
use crate::net::Transport;
use crate::peers::{Contestant, Entry, Running};
use crate::scenarios::{RATE_TO_BE_MEASURED, Scenario};
use crate::stats::Run;
use crate::syscalls;
use crate::usage::{Processes, Usage};
use crate::watchers::Watchers;

/// How long the floor is measured in each round, at most.
const FLOOR_MEASURED: Duration = Duration::from_millis(250);

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    pub rounds: usize,
    pub measured: Duration,
}

/// A contestant's runs, one a round.
pub struct Results {
    pub entry: Entry,
    pub runs: Vec<Run>,
    /// System calls a request (or a MB), counted in a run of its own.
    pub syscalls: Option<f64>,
}

/// Measures one scenario.
pub fn measure(
    scenario: &Scenario,
    contestants: &[Contestant],
    effort: Effort,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<Results>, String> {
    let entries = scenario.entries(contestants);
    let (floors, entries): (Vec<_>, Vec<_>) =
        entries.into_iter().partition(|entry| entry.contestant == Contestant::Floor);
    let transports: Vec<Transport> = entries.iter().map(|entry| entry.way.of_backend()).collect();
    let mut backend = Backend::start(&transports, scenario.pools)?;
    let proxies: Vec<Running> = entries
        .iter()
        .zip(&backend.addresses)
        .map(|(entry, address)| Running::start(*entry, address, scenario))
        .collect::<Result<_, _>>()?;
    let mut scenario = scenario.clone();
    if scenario.pace == RATE_TO_BE_MEASURED {
        let capacity = slowest(&scenario, &proxies, effort, &mut backend)?;
        progress(&format!("{}: half of {capacity:.0}/s", scenario.name));
        scenario.pace = Pace::Open(capacity / 2.0);
    }
    let of = |entry| Results { entry, runs: Vec::new(), syscalls: None };
    let mut results: Vec<Results> = entries.into_iter().map(of).collect();
    let mut floors: Vec<Results> = floors.into_iter().map(of).collect();
    for round in 0..effort.rounds {
        for floor in &mut floors {
            let measured = effort.measured.min(FLOOR_MEASURED);
            let run = floor::measure(&scenario, floor.entry.way, measured);
            floor.runs.extend(run.map_err(|error| format!("the floor: {error}"))?);
        }
        for turn in 0..proxies.len() {
            // Backwards every other time, so that nobody always has the same one's leavings.
            let turn = if round % 2 == 0 { turn } else { proxies.len() - 1 - turn };
            let at = (round + turn) % proxies.len();
            let proxy = &proxies[at];
            let name = proxy.entry.name();
            progress(&format!("{} {}/{} {name}", scenario.name, round + 1, effort.rounds));
            let run = run(&scenario, proxy, effort.measured, &mut backend)?;
            results[at].runs.push(run);
        }
    }
    for (results, proxy) in results.iter_mut().zip(&proxies) {
        if proxy.entry.contestant.is_proxy() {
            let measured = effort.measured.min(Duration::from_millis(500));
            results.syscalls = count_syscalls(&scenario, proxy, measured, &mut backend)?;
        }
    }
    for floor in &mut floors {
        let direct = Entry { contestant: Contestant::Direct, ..floor.entry };
        if let Some(direct) = results.iter().find(|results| results.entry == direct) {
            for (floor, direct) in floor.runs.iter_mut().zip(&direct.runs) {
                floor::extend(floor, &scenario, direct.cpu);
            }
        }
    }
    results.extend(floors.into_iter().filter(|floor| !floor.runs.is_empty()));
    Ok(results)
}

/// The throughput of the peer that has the least, or of whoever is there if no peer is.
fn slowest(
    scenario: &Scenario,
    proxies: &[Running],
    effort: Effort,
    backend: &mut Backend,
) -> Result<f64, String> {
    let closed = Scenario { pace: Pace::Closed, ..scenario.clone() };
    let is_peer = |proxy: &&Running| proxy.entry.contestant.is_peer();
    let any_peer = proxies.iter().any(|proxy| is_peer(&proxy));
    let mut slowest = f64::INFINITY;
    for proxy in proxies.iter().filter(|proxy| is_peer(proxy) || !any_peer) {
        let run = run(&closed, proxy, effort.measured, backend)?;
        slowest = slowest.min(run.throughput.unwrap_or(f64::INFINITY));
    }
    Ok(slowest)
}

fn run(
    scenario: &Scenario,
    proxy: &Running,
    measured: Duration,
    backend: &mut Backend,
) -> Result<Run, String> {
    let mut alone = None;
    if scenario.idle > 0 {
        let load = Load { idle: 0, ..load_of(scenario, measured) };
        alone = Some(put(scenario, &load, proxy, backend, &mut |_| {})?);
    }
    let load = load_of(scenario, measured);
    let is_proxy = proxy.entry.contestant.is_proxy();
    // Without a proxy it is the load and the backend that are watched.
    let ends = Processes(vec![std::process::id(), backend.id()]);
    let processes = if is_proxy { &proxy.processes } else { &ends };
    let (mut used, mut memory) = (Usage::default(), 0);
    let watchers = proxy.watched.map(|(admin, reads)| Watchers::start(admin, reads));
    let outcome = put(scenario, &load, proxy, backend, &mut |edge| match edge {
        Edge::Begin => used = processes.usage(),
        Edge::End => {
            used = processes.usage() - used;
            memory = processes.memory();
        }
    })?;
    watchers.map_or(Ok(()), Watchers::stop)?;
    let mut run = of_outcome(scenario, &outcome);
    run.idle_p99 = alone.map(|alone| quantile(&outcome, 0.99) / quantile(&alone, 0.99));
    let work = work(scenario, &outcome);
    let unit = if scenario.is_bulk() { 1e9 } else { 1e3 };
    run.cpu = Some(used.cpu_ns as f64 / work / unit);
    if is_proxy {
        let connections = (load.connections + load.idle) as f64;
        let work = if scenario.is_bulk() { work * 1e3 } else { work };
        run.switches = Some(used.switches as f64 / work);
        run.memory = Some(memory.saturating_sub(proxy.memory_at_start) as f64 / connections);
    }
    Ok(run)
}

fn load_of(scenario: &Scenario, measured: Duration) -> Load {
    Load {
        pace: scenario.pace,
        connections: scenario.connections,
        idle: scenario.idle,
        request: scenario.request,
        reply: scenario.reply,
        warm_up: measured / 4,
        measured,
    }
}

/// Puts the load on the proxy; an error says where it happened.
fn put(
    scenario: &Scenario,
    load: &Load,
    proxy: &Running,
    backend: &mut Backend,
    on_edge: &mut dyn FnMut(Edge),
) -> Result<Outcome, String> {
    let outcome = load::run(&proxy.address, load, on_edge);
    // What was closed at the end of the run keeps both sides busy for a moment.
    sleep(
        Duration::from_millis(20)
            + Duration::from_micros(50) * (load.idle + load.connections) as u32,
    );
    let context = |error| format!("{} through {}: {error}", scenario.name, proxy.entry.name());
    backend.check().map_err(context)?;
    let outcome = outcome.map_err(context)?;
    if outcome.requests == 0 {
        return Err(context("not one request was served in time".to_owned()));
    }
    Ok(outcome)
}

/// Requests, or GB of a bulk stream.
fn work(scenario: &Scenario, outcome: &Outcome) -> f64 {
    if scenario.is_bulk() { outcome.bytes as f64 / 1e9 } else { outcome.requests as f64 }
}

fn of_outcome(scenario: &Scenario, outcome: &Outcome) -> Run {
    let latency = |quantile: f64| {
        let us = outcome.latency.value_at_quantile(quantile) as f64 / 1e3;
        (!scenario.is_bulk()).then_some(us)
    };
    Run {
        throughput: Some(work(scenario, outcome) / outcome.elapsed.as_secs_f64()),
        p50: latency(0.5),
        p90: latency(0.9),
        p99: latency(0.99),
        p999: latency(0.999),
        max: latency(1.0),
        ..Run::default()
    }
}

fn quantile(outcome: &Outcome, quantile: f64) -> f64 {
    outcome.latency.value_at_quantile(quantile) as f64
}

fn count_syscalls(
    scenario: &Scenario,
    proxy: &Running,
    measured: Duration,
    backend: &mut Backend,
) -> Result<Option<f64>, String> {
    let load = load_of(scenario, measured);
    let (mut counter, mut calls) = (None, None);
    let outcome = put(scenario, &load, proxy, backend, &mut |edge| match edge {
        Edge::Begin => counter = syscalls::Counter::start(&proxy.processes),
        Edge::End => calls = counter.take().and_then(syscalls::Counter::stop),
    })?;
    let work = work(scenario, &outcome) * if scenario.is_bulk() { 1e3 } else { 1.0 };
    Ok(calls.map(|calls| calls as f64 / work))
}
