//! Aegis in front of real databases, beside no proxy and `HAProxy`: the servers' own load tools, by TCP
//! and by Unix sockets, in turns, in one run. Each proxy is one process in front of all three servers.
//! Prints a table for `docs/PERFORMANCE.md`.
#![allow(missing_docs)]

mod loads;
mod proxies;
mod table;

#[allow(dead_code, reason = "it is compare's, which needs more of it")]
#[path = "../compare/stats.rs"]
mod stats;
#[allow(dead_code, reason = "it is compare's, which needs more of it")]
#[path = "../compare/usage.rs"]
mod usage;

#[path = "../../tests/support/ports.rs"]
mod ports;
#[allow(dead_code, reason = "it is the tests', which need more of it")]
#[path = "../../tests/support/servers.rs"]
mod servers;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::loads::{Databases, LOADS, Load};
use crate::proxies::{Contestant, Proxy};
use crate::servers::Target;
use crate::table::{Line, Run, column, table};

/// Compares Aegis with other ways to real databases
#[derive(Parser)]
#[command(name = "databases")]
struct Options {
    /// Only these loads, comma-separated
    #[arg(long, value_delimiter = ',')]
    load: Vec<String>,
    /// Runs of each contestant with each load
    #[arg(long)]
    rounds: Option<usize>,
    /// Length of a run, about
    #[arg(long)]
    seconds: Option<u32>,
    /// Checks that everything works, with figures that say little
    #[arg(long)]
    quick: bool,
    /// Lists the loads
    #[arg(long)]
    list: bool,
    /// What cargo says to every bench
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match compare(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(options: &Options) -> Result<(), String> {
    if options.list {
        for load in LOADS {
            println!("{:16} {}", load.name, load.about);
        }
        return Ok(());
    }
    let is_wanted = |load: &&Load| {
        options.load.is_empty() || options.load.iter().any(|wanted| wanted == load.name)
    };
    let loads: Vec<&Load> = LOADS.iter().filter(is_wanted).collect();
    if loads.is_empty() {
        return Err("there is no such load; --list shows all".to_owned());
    }
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { 7 });
    let seconds = options.seconds.unwrap_or(if options.quick { 1 } else { 2 });
    let databases = Databases::start().map_err(|missing| missing.0)?;
    let start = |contestant: &Contestant| Proxy::start(*contestant, &databases);
    let proxies: Vec<Proxy> = Contestant::ALL.iter().map(start).collect::<Result<_, _>>()?;
    let mut lines = Vec::new();
    for load in loads {
        lines.push(measure(load, &databases, &proxies, (rounds, seconds))?);
    }
    let table = format!("{}\n{}", heading(rounds, seconds)?, table(&lines));
    println!("{table}");
    let folder = std::env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
    let file = folder.join("bench/databases.md");
    let context = |error: std::io::Error| format!("writing {}: {error}", file.display());
    fs::create_dir_all(folder.join("bench")).map_err(context)?;
    fs::write(&file, table).map_err(context)?;
    println!("{}", file.display());
    Ok(())
}

/// Every column once a round, in an order that rotates and turns round.
fn measure(
    load: &Load,
    databases: &Databases,
    proxies: &[Proxy],
    (rounds, seconds): (usize, u32),
) -> Result<Line, String> {
    let both = |proxy: &Proxy| proxy.targets(load.server).both();
    let targets: Vec<Target> = proxies.iter().flat_map(both).collect();
    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); targets.len()];
    for round in 0..rounds {
        for turn in 0..targets.len() {
            // Backwards every other time, so that nobody always has the same one's leavings.
            let turn = if round % 2 == 0 { turn } else { targets.len() - 1 - turn };
            let at = (round + turn) % targets.len();
            let proxy = &proxies[at / 2];
            let name = column(at);
            let before = proxy.usage();
            let context = |error| format!("{} through {name}: {error}", load.name);
            let done = (load.run)(databases, &targets[at], seconds).map_err(context)?;
            let used = proxy.usage() - before;
            let cpu_us = used.cpu_ns as f64 / 1e3 / done.count as f64;
            eprintln!("{:16} {name:20} {done:?}", load.name);
            runs[at].push(Run { done, cpu_us });
        }
    }
    Ok(Line { about: load.about, runs })
}

/// What was run, where and when.
fn heading(rounds: usize, seconds: u32) -> Result<String, String> {
    let command = |program: &str, arguments: &[&str]| {
        let output = std::process::Command::new(program).args(arguments).output();
        let output = output.map_err(|error| format!("{program} does not start: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok::<_, String>(text.lines().next().unwrap_or_default().trim().to_owned())
    };
    Ok(format!(
        "{}, {rounds} rounds of about {seconds} s; medians; {}; {}\n",
        command("date", &["-u", "+%Y-%m-%d %H:%M UTC"])?,
        command("uname", &["-srm"])?,
        command("haproxy", &["-v"])?,
    ))
}
