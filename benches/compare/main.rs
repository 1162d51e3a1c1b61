//! Aegis against `HAProxy`, nginx and no proxy: the same load on each, in turns, in one run.
#![allow(missing_docs)]

mod backend;
mod floor;
mod frame;
mod generator;
mod load;
mod measure;
mod net;
mod page;
mod peers;
mod report;
mod scenarios;
mod stats;
mod syscalls;
mod usage;
mod watchers;

use std::io::{IsTerminal, Write, stderr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::measure::{Effort, measure};
use crate::peers::Contestant;
use crate::report::Report;
use crate::scenarios::Scenario;

/// Compares Aegis with other proxies
#[derive(Parser)]
#[command(name = "compare")]
struct Options {
    /// Only these scenarios, comma-separated: a name, or the part of it before the last dash
    #[arg(long, value_delimiter = ',')]
    scenario: Vec<String>,
    /// Only these contestants
    #[arg(long, value_delimiter = ',')]
    contestants: Vec<Contestant>,
    /// Another build of Aegis, or this one with other settings, to measure beside it: a command,
    /// split at blanks, such as `env AEGIS_PIN=on /path/of/aegis-proxy`
    #[arg(long, value_name = "COMMAND")]
    other: Option<String>,
    /// Has /status of the other build read so many times a second while it is measured; without
    /// `--other` that is this build. A page in a browser reads it every other second
    #[arg(long, value_name = "READS")]
    watched: Option<u32>,
    /// Runs of each contestant in each scenario [sweeps: half as many]
    #[arg(long)]
    rounds: Option<usize>,
    /// Length of a run [sweeps: half as long]
    #[arg(long)]
    seconds: Option<f64>,
    /// Checks that everything works, with figures that say little
    #[arg(long)]
    quick: bool,
    /// Lists the scenarios
    #[arg(long)]
    list: bool,
    /// What cargo says to every bench
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn effort(&self, scenario: &Scenario) -> Effort {
        // On a noisy machine many short rounds have a steadier median than a few long ones.
        let rounds = self.rounds.unwrap_or(if self.quick { 1 } else { 12 });
        let seconds = self.seconds.unwrap_or(if self.quick { 0.3 } else { 0.8 });
        let share = if scenario.sweep.is_some() { 2 } else { 1 };
        let rounds = rounds.div_ceil(share);
        Effort { rounds, measured: Duration::from_secs_f64(seconds) / share as u32 }
    }

    fn scenarios(&self) -> Result<Vec<Scenario>, String> {
        let all = scenarios::all();
        let fits = |scenario: &Scenario, wanted: &String| {
            scenario.name == *wanted
                || scenario.name.rsplit_once('-').is_some_and(|(start, _)| start == wanted)
        };
        for wanted in &self.scenario {
            if !all.iter().any(|scenario| fits(scenario, wanted)) {
                return Err(format!("there is no scenario {wanted}; --list shows all"));
            }
        }
        let chosen =
            |s: &Scenario| self.scenario.is_empty() || self.scenario.iter().any(|w| fits(s, w));
        Ok(all.into_iter().filter(chosen).collect())
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let result = if arguments.next().as_deref() == Some(backend::ARGUMENT) {
        backend::main(arguments).map_err(|error| format!("the backend: {error}"))
    } else {
        compare(&Options::parse())
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(options: &Options) -> Result<(), String> {
    let scenarios = options.scenarios()?;
    if options.list {
        for scenario in &scenarios {
            println!("{:16} {}", scenario.name, scenario.about);
        }
        return Ok(());
    }
    let own = options.watched.map(|_| peers::AEGIS);
    let other = options.other.as_deref().or(own).unwrap_or_default();
    let other: Vec<_> = other.split_whitespace().map(str::to_owned).collect();
    let has_other = !other.is_empty();
    if has_other {
        let other = peers::Other { command: other, watched: options.watched };
        peers::OTHER.set(other).expect("it is set here alone");
    }
    let all = Contestant::ALL.iter().filter(|c| has_other || !c.is_other());
    let contestants = match &options.contestants[..] {
        [] => &all.copied().collect::<Vec<_>>(),
        chosen => chosen,
    };
    // Thousands of connections need as many descriptors; children inherit the limit.
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).map_err(|e| e.to_string())?;
    let mut report = Report::new(contestants, options.quick)?;
    println!("{}", report.heading());
    let start = Instant::now();
    for scenario in &scenarios {
        let mut progress = |text: &str| {
            if stderr().is_terminal() {
                eprint!("\r\x1b[K{:4}s {text}", start.elapsed().as_secs());
                let _ = stderr().flush();
            }
        };
        let results = measure(scenario, contestants, options.effort(scenario), &mut progress)?;
        progress("\r");
        println!("{}", report.add(scenario, &results));
    }
    print!("{}", report.verdicts());
    report.save()
}
