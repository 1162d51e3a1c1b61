//! `aegis-proxy top`: the page at `/`, in a terminal.

mod events;
mod screen;
mod terminal;

use std::collections::VecDeque;
use std::io;
use std::process::ExitCode;
use std::thread::sleep;

use clap::{ArgMatches, Command};
use serde_json::Value;
use tokio::signal::unix::SignalKind;

use super::admin::{Admin, option};
use super::output::{fail, print};
use super::signals::exit_code;
use events::{Event, INTERVAL, RESUME, SUSPEND};
use screen::{Line, Tone, lines};
use terminal::Terminal;

pub(super) const NAME: &str = "top";

/// Rates are of the readings of so many seconds.
const WINDOW: usize = 10;

const HELP: &str = "q quits, j and k scroll";

/// What Ctrl-C and Ctrl-Z are where no signals come of them.
const CTRL_C: u8 = 3;
const CTRL_Z: u8 = 26;

pub(super) fn definition() -> Command {
    Command::new(NAME)
        .about("Shows a running proxy and keeps it up to date; without a terminal, once")
        .arg(option())
}

/// Shows it until somebody has seen enough.
pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    let first = Admin::of(matches).and_then(|admin| {
        let reading = admin.json("/status")?;
        Ok((admin, reading))
    });
    let (admin, first) = match first {
        Ok(first) => first,
        Err(why) => return fail(1, why),
    };
    if !terminal::is_there() {
        return once(&admin, &first);
    }
    watch(admin, first).unwrap_or_else(|error| fail(1, error))
}

/// Two readings, so that there are rates.
fn once(admin: &Admin, first: &Value) -> ExitCode {
    sleep(INTERVAL);
    match admin.json("/status") {
        Ok(now) => {
            let lines = lines(&now, first);
            print(&lines.iter().flat_map(|line| [line.text.as_str(), "\n"]).collect::<String>())
        }
        Err(why) => fail(1, why),
    }
}

/// What was read of late, the oldest first; never empty.
struct Readings(VecDeque<Value>);

impl Readings {
    fn add(&mut self, reading: Value) {
        // Counters of another process begin anew.
        if self.0.back().is_some_and(|last| last["began"] != reading["began"]) {
            self.0.clear();
        }
        self.0.push_back(reading);
        if self.0.len() > WINDOW + 1 {
            self.0.pop_front();
        }
    }

    fn lines(&self) -> Vec<Line> {
        match (self.0.back(), self.0.front()) {
            (Some(now), Some(then)) => lines(now, then),
            _ => Vec::new(),
        }
    }
}

fn watch(admin: Admin, first: Value) -> io::Result<ExitCode> {
    // The signals first, so that none leaves the terminal as it is used here.
    let mut events = events::begin(admin)?;
    let mut terminal = Terminal::take()?;
    let mut readings = Readings([first].into());
    let (mut lost, mut top) = (None::<String>, 0_usize);
    loop {
        let all = readings.lines();
        let screen = fit(&all, lost.as_deref(), &mut top, terminal.size());
        if terminal.show(&screen).is_err() {
            break;
        }
        match events.blocking_recv() {
            Some(Event::Key(b'q' | CTRL_C) | Event::Closed) | None => break,
            Some(Event::Key(b'j')) => top += 1,
            Some(Event::Key(b'k')) => top = top.saturating_sub(1),
            Some(Event::Key(CTRL_Z) | Event::Signal(SUSPEND)) => terminal.suspend(),
            Some(Event::Signal(RESUME)) => terminal.enter()?,
            Some(Event::Signal(signal)) if signal != SignalKind::window_change() => {
                return Ok(exit_code(signal).into());
            }
            Some(Event::Key(_) | Event::Signal(_)) => {}
            Some(Event::Reading(reading)) => {
                lost = reading.map(|reading| readings.add(reading)).err();
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// As many lines as fit from this one on, and below them the keys, or that the proxy is lost.
fn fit(
    all: &[Line],
    lost: Option<&str>,
    top: &mut usize,
    (columns, rows): (usize, usize),
) -> Vec<Line> {
    let room = rows.saturating_sub(1);
    *top = (*top).min(all.len().saturating_sub(room));
    let hidden = all.len().saturating_sub(*top + room);
    let below = match lost {
        Some(why) => Line::new(Tone::Bad, format!("lost, what is shown is old: {why}")),
        None if hidden > 0 => Line::new(Tone::Dim, format!("{HELP}; {hidden} more lines below")),
        None => Line::new(Tone::Dim, HELP),
    };
    let fitting = all.iter().skip(*top).take(room).map(|line| line.cut(columns));
    fitting.chain([below.cut(columns)]).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn counters_of_another_process_are_not_compared_however_long_it_has_run() {
        let reading = |began: f64, alive: f64| json!({"began": began, "alive": alive});
        let mut readings = Readings([reading(100.25, 2.0)].into());
        readings.add(reading(100.25, 4.0));
        assert_eq!(readings.0.len(), 2);
        // It began while nobody could look.
        readings.add(reading(107.5, 6.0));
        assert_eq!(readings.0, [reading(107.5, 6.0)]);
    }

    #[test]
    fn what_does_not_fit_is_cut_and_counted() {
        let all: Vec<_> = (0..30).map(|at| Line::new(Tone::Plain, format!("line {at}"))).collect();
        let mut top = 0;
        let shown = fit(&all, None, &mut top, (80, 24));
        assert_eq!((shown.len(), &*shown[22].text), (24, "line 22"));
        assert!(shown[23].text.ends_with("7 more lines below"), "{:?}", shown[23]);
        // It does not scroll past the end.
        top = 100;
        let shown = fit(&all, Some("nothing listens"), &mut top, (10, 24));
        assert_eq!((top, &*shown[22].text, &*shown[23].text), (7, "line 29", "lost, what"));
        assert_eq!(fit(&all, None, &mut top, (1, 1)).len(), 1);
    }
}
