//! `aegis-proxy check`: what a start would do.

use std::process::ExitCode;

use super::output::print;
use crate::config::Config;
use crate::startup::{self, Decisions, StartError};

/// Prints what a start would do, and starts nothing.
///
/// # Errors
/// It could not start. What is in force is printed all the same.
pub fn check(config: &Config) -> Result<ExitCode, StartError> {
    let variables = config.effective().into_iter();
    let variables: Vec<_> = variables.map(|(name, value)| format!("{name}={value}")).collect();
    // What is in force is worth knowing above all where it does not fit.
    let decisions = startup::decide(config).inspect_err(|_| {
        print(&lines(&variables));
    })?;
    let warnings = config.warnings().into_iter().map(|warning| format!("warning: {warning}"));
    let all = variables.into_iter().chain([String::new()]);
    let all: Vec<_> = all.chain(describe(config, &decisions)).chain(warnings).collect();
    Ok(print(&lines(&all)))
}

fn describe(config: &Config, decisions: &Decisions) -> Vec<String> {
    let Decisions { plan, driver, capacity } = decisions;
    let mut lines = vec![
        format!("workers: {} ({})", plan.cores.len(), plan.reason),
        format!("sessions at a time: {}", capacity.sessions_max),
        format!("pool connections of a worker: {} at most", capacity.pool_conns_max),
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
