//! What the page at `/` shows, as lines of text: from one reading of `/status` and an older one.

use std::fmt::Write;

use serde_json::Value;

use crate::cli::table::{Align, plain, table};

/// A line, and how it is to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) text: String,
    pub(super) tone: Tone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tone {
    Plain,
    Good,
    Warning,
    Bad,
    Dim,
}

impl Line {
    pub(super) fn new(tone: Tone, text: impl Into<String>) -> Self {
        Self { text: text.into(), tone }
    }

    /// The same in so many columns.
    pub(super) fn cut(&self, columns: usize) -> Self {
        Self { text: self.text.chars().take(columns).collect(), tone: self.tone }
    }
}

/// The parts of the time that clients wait, as the page and people call them.
const PHASES: &[(&str, &str)] = &[
    ("queue", "queue"),
    ("connect", "connect"),
    ("first_byte", "first byte"),
    ("transfer", "transfer"),
];

/// A reading, and the one that it is compared with.
#[derive(Clone, Copy)]
struct Pair<'a> {
    now: &'a Value,
    then: &'a Value,
    seconds: f64,
}

/// Everything, in the order of its importance.
pub(super) fn lines(now: &Value, then: &Value) -> Vec<Line> {
    let pair = Pair { now, then, seconds: number(&now["alive"]) - number(&then["alive"]) };
    let mut lines = process(pair);
    for at in 0..rows(&now["routes"]).len() {
        lines.push(Line::new(Tone::Plain, ""));
        lines.extend(route(pair.at("routes", at), &now["bounds"]));
    }
    lines.push(Line::new(Tone::Plain, ""));
    lines.extend(workers(pair));
    let driver = &now["driver"];
    let about = format!("I/O by {}: {}", text(&driver["name"]), text(&driver["why"]));
    lines.push(Line::new(Tone::Dim, about));
    lines
}

impl<'a> Pair<'a> {
    fn at(self, list: &str, at: usize) -> Self {
        Self { now: &self.now[list][at], then: &self.then[list][at], ..self }
    }

    /// A counter's growth a second.
    fn rate(self, of: impl Fn(&'a Value) -> f64) -> f64 {
        let grown = (of(self.now) - of(self.then)).max(0.0);
        if self.seconds > 0.0 { grown / self.seconds } else { 0.0 }
    }
}

fn process(pair: Pair<'_>) -> Vec<Line> {
    let now = pair.now;
    let cpu = pair.rate(|reading| number(&reading["cpu_seconds"]));
    let sessions = &now["sessions"];
    let head = format!(
        "aegis {}: {}, up {}, sessions {} of {}, memory {}, CPU {cpu:.2} cores",
        text(&now["version"]),
        text(&now["health"]["word"]),
        age(number(&now["alive"])),
        number(&sessions["now"]),
        number(&sessions["max"]),
        bytes(number(&now["memory_bytes"])),
    );
    with_reasons(head, &now["health"])
}

fn with_reasons(head: String, health: &Value) -> Vec<Line> {
    let tone = match health["word"].as_str() {
        Some("fine") => Tone::Good,
        Some("degraded" | "draining" | "starting") => Tone::Warning,
        _ => Tone::Bad,
    };
    let reason = |reason: &Value| {
        let lasts = reason["lasts"].as_f64().map(|lasts| format!(" (for {})", age(lasts)));
        let words = text(&reason["words"]);
        Line::new(tone, format!("  ! {words}{}", lasts.unwrap_or_default()))
    };
    let reasons = rows(&health["reasons"]).iter().map(reason);
    std::iter::once(Line::new(tone, head)).chain(reasons).collect()
}

fn route(pair: Pair<'_>, bounds: &Value) -> Vec<Line> {
    let now = pair.now;
    let head = format!("{}: {}", text(&now["name"]), text(&now["health"]["word"]));
    let mut lines = with_reasons(head, &now["health"]);
    let total = |list: &Value| rows(list).iter().map(|row| number(&row["count"])).sum::<f64>();
    let mut rates = format!(
        "  sessions {}, new {:.1}/s",
        number(&now["sessions_active"]),
        pair.rate(|route| number(&route["sessions_opened"])),
    );
    if !now["requests"].is_null() {
        let requests = pair.rate(|route| total(&route["requests"]));
        let queue = number(&now["queue"]["now"]);
        // Writing to a string cannot fail.
        let _ = write!(rates, ", requests {requests:.1}/s, queue {queue}");
    }
    for (field, words) in [("to_backend", "to backends"), ("to_client", "to clients")] {
        let rate = pair.rate(|route| number(&route["bytes"][field]));
        let _ = write!(rates, ", {words} {}/s", bytes(rate));
    }
    lines.push(Line::new(Tone::Plain, rates));
    lines.extend(phases(pair, bounds).into_iter().map(|line| Line::new(Tone::Plain, line)));
    lines.extend(endpoints(now));
    lines
}

/// Where the time of clients goes.
fn phases(pair: Pair<'_>, bounds: &Value) -> Vec<String> {
    let grown = |name: &str| {
        let (now, then) = (&pair.now["phases"][name], &pair.then["phases"][name]);
        let counts = rows(&now["counts"]).iter().enumerate();
        let counts =
            counts.map(|(at, count)| (number(count) - number(&then["counts"][at])).max(0.0));
        let sum = (number(&now["sum"]) - number(&then["sum"])).max(0.0);
        (counts.collect::<Vec<_>>(), sum)
    };
    let all: Vec<_> = PHASES.iter().map(|(name, words)| (words, grown(name))).collect();
    let whole: f64 = all.iter().map(|(_, (_, sum))| sum).sum();
    let row = |(words, (counts, sum)): &(&&str, (Vec<f64>, f64))| {
        let share = if whole > 0.0 { format!("{:.0} %", sum / whole * 100.0) } else { "-".into() };
        let percentiles = [0.5, 0.9, 0.99].map(|share| percentile(counts, share, bounds));
        // The sum of none is -0.
        let measured = counts.iter().fold(0.0, |sum, count| sum + count).to_string();
        [format!("  {words}"), share].into_iter().chain(percentiles).chain([measured]).collect()
    };
    #[rustfmt::skip]
    let columns = [
        ("  TIME", Align::Left), ("SHARE", Align::Right), ("P50", Align::Right),
        ("P90", Align::Right), ("P99", Align::Right), ("MEASURED", Align::Right),
    ];
    table(&columns, &all.iter().map(row).collect::<Vec<_>>())
}

/// The upper bound of the bucket that a share of all durations does not pass.
fn percentile(counts: &[f64], share: f64, bounds: &Value) -> String {
    let all: f64 = counts.iter().sum();
    if all <= 0.0 {
        return "-".to_owned();
    }
    let mut seen = 0.0;
    let at = counts.iter().position(|count| {
        seen += count;
        seen >= all * share
    });
    let bound = at.and_then(|at| bounds[at].as_f64());
    bound.map_or_else(|| "more".to_owned(), time)
}

fn endpoints(now: &Value) -> Vec<Line> {
    #[rustfmt::skip]
    let columns = [
        ("  ENDPOINT", Align::Left), ("STATE", Align::Left), ("SESSIONS", Align::Right),
        ("IDLE", Align::Right), ("FAILED", Align::Right), ("EJECTIONS", Align::Right),
    ];
    let row = |endpoint: &Value| {
        let why = endpoint["why"].as_str().map(|why| format!(": {}", plain(why)));
        let state = text(&endpoint["state"]) + &why.unwrap_or_default();
        let counts = ["sessions_active", "pool_idle", "connect_failures", "ejections"];
        let counts = counts.map(|field| number(&endpoint[field]).to_string());
        [format!("  {}", text(&endpoint["name"])), state].into_iter().chain(counts).collect()
    };
    let all = rows(&now["endpoints"]);
    let lines = table(&columns, &all.iter().map(row).collect::<Vec<_>>());
    // The headings are of none.
    let usable = all.iter().map(|endpoint| endpoint["state"] == "usable");
    let tones = [true].into_iter().chain(usable).map(|is| if is { Tone::Plain } else { Tone::Bad });
    let mut lines: Vec<_> = tones.zip(lines).map(|(tone, line)| Line::new(tone, line)).collect();
    let more = number(&now["endpoints_total"]) - all.len() as f64;
    if more > 0.0 {
        lines.push(Line::new(Tone::Dim, format!("  {more} more: aegis-proxy endpoints")));
    }
    lines
}

fn workers(pair: Pair<'_>) -> Vec<Line> {
    #[rustfmt::skip]
    let columns = [
        ("WORKER", Align::Left), ("STATE", Align::Left), ("SESSIONS", Align::Right),
        ("CPU", Align::Right), ("WAITS FOR CPU", Align::Right),
    ];
    let row = |at: usize| {
        let worker = pair.at("workers", at);
        let share =
            |field: &str| format!("{:.0} %", worker.rate(|worker| number(&worker[field])) * 100.0);
        let (state, sessions) = (text(&worker.now["state"]), number(&worker.now["sessions"]));
        let shares = [share("cpu_seconds"), share("core_wait_seconds")];
        [at.to_string(), state, sessions.to_string()].into_iter().chain(shares).collect()
    };
    let all: Vec<_> = (0..rows(&pair.now["workers"]).len()).map(row).collect();
    table(&columns, &all).into_iter().map(|line| Line::new(Tone::Plain, line)).collect()
}

fn rows(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

/// What is missing counts as nothing.
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

fn text(value: &Value) -> String {
    plain(value.as_str().unwrap_or_default())
}

fn bytes(count: f64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let (mut count, mut unit) = (count, 0);
    while count >= 1000.0 && unit + 1 < units.len() {
        (count, unit) = (count / 1000.0, unit + 1);
    }
    if unit == 0 { format!("{count:.0} B") } else { format!("{count:.1} {}", units[unit]) }
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 0.001 => format!("{:.0} us", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s => format!("{s:.1} s"),
    }
}

fn age(seconds: f64) -> String {
    match seconds as u64 {
        s if s < 60 => format!("{s} s"),
        s if s < 3600 => format!("{} min", s / 60),
        s if s < 86400 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86400),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reading(alive: f64, opened: u64, sums: [f64; 2], counts: [u64; 2]) -> Value {
        json!({
            "version": "1.2.3", "alive": alive, "memory_bytes": 30_000_000, "cpu_seconds": alive / 2.0,
            "sessions": {"now": 3, "max": 100}, "bounds": [0.00005, 0.0002, null],
            "health": {"word": "fine", "reasons": []},
            "driver": {"name": "epoll", "why": "AEGIS_IO=epoll"},
            "workers": [{"state": "running", "sessions": 3, "cpu_seconds": 1.0, "core_wait_seconds": 0}],
            "routes": [{
                "name": "orders", "sessions_active": 3, "sessions_opened": opened,
                "health": {"word": "degraded", "reasons": [{"words": "db\u{1b} refuses", "lasts": 61}]},
                "bytes": {"to_backend": opened * 1000, "to_client": 0}, "requests": null,
                "phases": {"connect": {"sum": sums[0], "counts": []},
                           "first_byte": {"sum": sums[1], "counts": counts}},
                "endpoints_total": 70,
                "endpoints": [{"name": "db", "state": "ejected", "why": "refused", "sessions_active": 3}],
            }],
        })
    }

    #[test]
    fn what_is_wrong_comes_first_and_rates_are_of_two_readings() {
        let then = reading(10.0, 100, [0.0, 0.0], [0, 0]);
        let now = reading(20.0, 150, [1.0, 3.0], [5, 5]);
        let lines = lines(&now, &then);
        let texts: Vec<_> = lines.iter().map(|line| line.text.as_str()).collect();
        let expected = [
            "aegis 1.2.3: fine, up 20 s, sessions 3 of 100, memory 30.0 MB, CPU 0.50 cores",
            "",
            "orders: degraded",
            "  ! db\u{fffd} refuses (for 1 min)",
            "  sessions 3, new 5.0/s, to backends 5.0 kB/s, to clients 0 B/s",
            "  TIME        SHARE    P50     P90     P99  MEASURED",
            "  queue         0 %      -       -       -         0",
            "  connect      25 %      -       -       -         0",
            "  first byte   75 %  50 us  200 us  200 us        10",
            "  transfer      0 %      -       -       -         0",
            "  ENDPOINT  STATE             SESSIONS  IDLE  FAILED  EJECTIONS",
            "  db        ejected: refused         3     0       0          0",
            "  69 more: aegis-proxy endpoints",
            "",
            "WORKER  STATE    SESSIONS  CPU  WAITS FOR CPU",
            "0       running         3  0 %            0 %",
            "I/O by epoll: AEGIS_IO=epoll",
        ];
        assert_eq!(texts, expected);
        let tones = [0, 2, 3, 11].map(|at| lines[at].tone);
        assert_eq!(tones, [Tone::Good, Tone::Warning, Tone::Warning, Tone::Bad]);
        assert_eq!(lines[0].cut(5).text, "aegis");
    }
}
