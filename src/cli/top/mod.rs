//! `aegis-proxy top`: the page at `/`, in a terminal.

mod screen;
mod terminal;

use std::collections::VecDeque;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::{ArgMatches, Command};
use serde_json::Value;

use super::admin::{Admin, option};
use super::output::{fail, print};
use screen::{Line, Tone, lines};
use terminal::{Key, Terminal};

pub(super) const NAME: &str = "top";

/// How often the proxy is asked.
const INTERVAL: Duration = Duration::from_secs(1);

/// Rates are of the readings of so many seconds.
const WINDOW: usize = 10;

const HELP: &str = "q quits, j and k scroll";

/// What Ctrl-C is where no signal comes of it.
const CTRL_C: u8 = 3;

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
    match Terminal::take() {
        Some(terminal) => {
            watch(&admin, first, terminal);
            ExitCode::SUCCESS
        }
        None => once(&admin, &first),
    }
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

fn watch(admin: &Admin, first: Value, mut terminal: Terminal) {
    let mut readings = Readings([first].into());
    let (mut lost, mut next, mut top) = (None::<String>, Instant::now() + INTERVAL, 0_usize);
    loop {
        let all = readings.lines();
        let screen = fit(&all, lost.as_deref(), &mut top, terminal.size());
        if terminal.show(&screen).is_err() {
            return;
        }
        match terminal.key(next.saturating_duration_since(Instant::now())) {
            Key::End | Key::Byte(b'q' | CTRL_C) => return,
            Key::Byte(b'j') => top += 1,
            Key::Byte(b'k') => top = top.saturating_sub(1),
            Key::Byte(_) | Key::None => {}
        }
        if Instant::now() >= next {
            lost = admin.json("/status").map(|reading| readings.add(reading)).err();
            next = Instant::now() + INTERVAL;
        }
    }
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
