//! What was measured, as a table in Markdown.

use std::fmt::Write as _;

use crate::loads::Done;
use crate::proxies::Contestant;
use crate::stats::Summary;

/// One run of one contestant.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    pub done: Done,
    /// CPU time of the proxy for each transaction, query or command, in microseconds.
    pub cpu_us: f64,
}

/// One load: the runs of each contestant.
pub struct Line {
    pub about: &'static str,
    pub runs: Vec<Vec<Run>>,
}

/// A column's name: each contestant has one for TCP and one for Unix sockets.
pub fn column(at: usize) -> String {
    let kind = if at.is_multiple_of(2) { "" } else { ", Unix" };
    format!("{}{kind}", Contestant::ALL[at / 2])
}

/// Medians, and each column's throughput as a share of the first one's, round by round.
pub fn table(lines: &[Line]) -> String {
    let mut text = String::from("| load | |");
    let columns = 2 * Contestant::ALL.len();
    for at in 0..columns {
        let _ = write!(text, " {} |", column(at));
    }
    text.push_str("\n| --- | --- |");
    text.push_str(&" --- |".repeat(columns));
    text.push('\n');
    for line in lines {
        row(&mut text, line.about, "per second", line, |runs| {
            let median = median(runs, |run| Some(run.done.per_second))?;
            let share = paired(runs, &line.runs[0])?;
            Some(format!("{median:.0} ({share:.2})"))
        });
        row(&mut text, "", "p99", line, |runs| {
            median(runs, |run| run.done.p99_ms).map(|ms| format!("{ms:.1} ms"))
        });
        row(&mut text, "", "CPU of the proxy for each", line, |runs| {
            let cpu =
                median(runs, |run| (run.cpu_us > 0.0 && run.done.count > 0).then_some(run.cpu_us))?;
            Some(format!("{cpu:.1} µs"))
        });
    }
    text
}

/// A row, unless there is nothing in it.
fn row(
    text: &mut String,
    load: &str,
    what: &str,
    line: &Line,
    cell: impl Fn(&[Run]) -> Option<String>,
) {
    let cells: Vec<_> = line.runs.iter().map(|runs| cell(runs)).collect();
    if cells.iter().all(Option::is_none) {
        return;
    }
    let _ = write!(text, "| {load} | {what} |");
    for cell in cells {
        let _ = write!(text, " {} |", cell.unwrap_or_default());
    }
    text.push('\n');
}

fn median(runs: &[Run], value: impl Fn(&Run) -> Option<f64>) -> Option<f64> {
    Summary::of(runs.iter().filter_map(value)).map(|summary| summary.median)
}

fn paired(runs: &[Run], direct: &[Run]) -> Option<f64> {
    let pairs = runs.iter().zip(direct);
    let ratios = pairs.map(|(own, direct)| own.done.per_second / direct.done.per_second);
    Summary::of(ratios.filter(|ratio| ratio.is_finite())).map(|summary| summary.median)
}
