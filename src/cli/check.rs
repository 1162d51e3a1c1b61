//! `aegis-proxy check`: what a start would do, and with `--host` whether it would fare well.

use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::host::{self, Verdict};
use super::output::{EXIT_CONFIG, print};
use crate::config::Config;
use crate::startup::{self, Decisions, StartError};

pub(super) const NAME: &str = "check";

const HOST: &str = "host";

pub(super) fn definition() -> Command {
    Command::new(NAME).about("Checks the configuration, prints what is in force, and exits").arg(
        Arg::new(HOST)
            .long(HOST)
            .action(ArgAction::SetTrue)
            .help("Also looks at the host, asks DNS or Kubernetes, and connects to each backend"),
    )
}

/// What is to be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// Whether the host, the sources of endpoints and the backends are looked at, too.
    pub host: bool,
}

impl Check {
    pub(super) fn of(matches: &ArgMatches) -> Self {
        Self { host: matches.get_flag(HOST) }
    }
}

/// Prints what a start would do, and starts nothing. Of the host it fails with 1 where something does
/// not work now, and as a wrong configuration does where a start would be held.
///
/// # Errors
/// It could not start. What is in force is printed all the same.
pub fn check(config: &Config, what: Check) -> Result<ExitCode, StartError> {
    let variables = config.effective().into_iter();
    let variables: Vec<_> = variables.map(|(name, value)| format!("{name}={value}")).collect();
    // What is in force is worth knowing above all where it does not fit.
    let decisions = startup::decide(config).inspect_err(|_| {
        print(&lines(&variables));
    })?;
    let warnings = config.warnings().into_iter().map(|warning| format!("warning: {warning}"));
    let all = variables.into_iter().chain([String::new()]);
    let all: Vec<_> = all.chain(describe(config, &decisions)).chain(warnings).collect();
    let done = print(&lines(&all));
    if what.host { check_host(config, &decisions) } else { Ok(done) }
}

/// It may take seconds, so that what is known without it is printed before.
fn check_host(config: &Config, decisions: &Decisions) -> Result<ExitCode, StartError> {
    let items = host::look(config, decisions)?;
    let report = items.iter().map(host::Item::line);
    let done = print(&lines(&[String::new()].into_iter().chain(report).collect::<Vec<_>>()));
    let worst = items.iter().map(|item| item.verdict).max();
    Ok(match worst {
        Some(Verdict::Misconfigured) => ExitCode::from(EXIT_CONFIG),
        Some(Verdict::Bad) => ExitCode::FAILURE,
        Some(Verdict::Fine | Verdict::Note) | None => done,
    })
}

fn describe(config: &Config, decisions: &Decisions) -> Vec<String> {
    let Decisions { plan, driver, capacity } = decisions;
    let mut lines = vec![
        format!("workers: {} ({})", plan.cores.len(), plan.reason),
        format!("sessions at a time: {}", capacity.sessions_max),
        format!(
            "pool connections: {} at most, {} of a worker",
            capacity.pool_conns, capacity.pool_conns_max
        ),
    ];
    for route in &config.routes {
        let (min_idle, max_idle) = (route.pool.min_idle, route.pool.most());
        let of =
            if config.routes.len() > 1 { format!("route {}: ", route.name) } else { String::new() };
        lines.push(format!(
            "{of}warm connections to an endpoint: {min_idle} at least, {max_idle} at most"
        ));
        let by_preset =
            route.by_preset().into_iter().map(|(name, value)| format!("{name}={value}"));
        let by_preset: Vec<_> = by_preset.collect();
        if !by_preset.is_empty() {
            let preset = route.preset;
            lines.push(format!("{of}by AEGIS_PRESET={preset}: {}", by_preset.join(", ")));
        }
    }
    lines.push(format!("driver: {} ({})", driver.driver.name(), driver.reason));
    lines
}

fn lines(lines: &[String]) -> String {
    lines.iter().flat_map(|line| [line, "\n"]).collect()
}
