//! What was measured, as text, as JSON and as a page.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use crate::measure::Results;
use crate::page;
use crate::peers::{Contestant, Entry, WORKERS, Way};
use crate::scenarios::{Against, Scenario, Sweep, Target};
use crate::stats::{Metric, Run, Summary, paired};

/// Everything that was measured.
#[derive(Serialize)]
pub struct Report {
    pub quick: bool,
    pub date: String,
    pub machine: String,
    pub versions: Vec<String>,
    pub scenarios: Vec<Measured>,
}

/// One scenario's part.
#[derive(Serialize)]
pub struct Measured {
    pub name: String,
    pub about: String,
    pub bulk: bool,
    #[serde(skip)]
    pub pools: bool,
    #[serde(skip)]
    pub sweep: Option<(Sweep, usize)>,
    pub lines: Vec<Line>,
    pub verdicts: Vec<Verdict>,
}

/// One contestant in a scenario: its median of each metric, and all its runs.
#[derive(Serialize)]
pub struct Line {
    #[serde(skip)]
    pub entry: Entry,
    pub name: String,
    pub median: Run,
    pub syscalls: Option<f64>,
    pub runs: Vec<Run>,
}

/// A figure of Aegis beside what it is to be.
#[derive(Serialize)]
pub struct Verdict {
    pub driver: String,
    pub metric: Metric,
    pub against: &'static str,
    pub figure: Summary,
    /// What the figure of no proxy at all would be, where that can be compared.
    pub direct: Option<f64>,
    /// What the floor's would be.
    pub floor: Option<f64>,
    pub bound: f64,
    pub met: bool,
}

impl Report {
    /// An empty report of this machine. Fails if a contestant is missing.
    pub fn new(contestants: &[Contestant], quick: bool) -> Result<Self, String> {
        let versions = contestants
            .iter()
            .filter(|c| c.is_proxy())
            .map(|c| c.version().map(|version| format!("{}: {version}", c.name())));
        Ok(Self {
            quick,
            date: date(),
            machine: machine(),
            versions: versions.collect::<Result<_, _>>()?,
            scenarios: Vec::new(),
        })
    }

    /// What was run, where and when.
    pub fn heading(&self) -> String {
        let quick = if self.quick { "\nQuick: the figures say little." } else { "" };
        let versions = self.versions.join("\n");
        format!("{}\n{}\n{versions}\n{WORKERS} workers each{quick}\n", self.date, self.machine)
    }

    /// Adds a scenario, and gives its table.
    pub fn add(&mut self, scenario: &Scenario, results: &[Results]) -> String {
        let line = |results: &Results| Line {
            entry: results.entry,
            name: results.entry.name(),
            median: median(&results.runs),
            syscalls: results.syscalls,
            runs: results.runs.clone(),
        };
        let lines: Vec<Line> = results.iter().map(line).collect();
        let measured = Measured {
            name: scenario.name.clone(),
            about: scenario.about.clone(),
            bulk: scenario.is_bulk(),
            pools: scenario.pools,
            sweep: scenario.sweep,
            verdicts: verdicts(scenario, &lines),
            lines,
        };
        let table = measured.table();
        self.scenarios.push(measured);
        table
    }

    /// Every target, and whether it was met.
    pub fn verdicts(&self) -> String {
        let mut text = format!(
            "{:16} {:26} {:14} {:22} {:>8}  {:17} {:>8} {:9} {:>8} {:>8}\n",
            "scenario",
            "driver",
            "metric",
            "against",
            "figure",
            "from … to",
            "target",
            "",
            "no proxy",
            "floor"
        );
        for scenario in &self.scenarios {
            for verdict in &scenario.verdicts {
                let _ = writeln!(text, "{:16} {verdict}", scenario.name);
            }
        }
        text
    }

    /// Writes the JSON and the page, and says where.
    pub fn save(&self) -> Result<(), String> {
        let folder = std::env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
        let folder = folder.join("bench");
        let context = |error: std::io::Error| format!("writing to {}: {error}", folder.display());
        fs::create_dir_all(&folder).map_err(context)?;
        let json = serde_json::to_string_pretty(self).map_err(|error| error.to_string())?;
        fs::write(folder.join("report.json"), json).map_err(context)?;
        fs::write(folder.join("report.html"), page::html(self)?).map_err(context)?;
        println!("\n{0}/report.html\n{0}/report.json", folder.display());
        Ok(())
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Summary { median, min, max } = self.figure;
        let digits = if median >= 100.0 { 0 } else { 2 };
        let spread = format!("{min:.digits$} … {max:.digits$}");
        let sign = if self.metric == Metric::Throughput { "≥" } else { "≤" };
        let met = if self.met { "met" } else { "NOT met" };
        let aside = |figure: Option<f64>| figure.map_or_else(String::new, |f| format!("{f:.2}"));
        write!(
            f,
            "{:26} {:14} {:22} {median:>8.digits$}  {spread:17} {sign} {:<6} {met:9} {:>8} {:>8}",
            self.driver,
            self.metric.name(),
            self.against,
            self.bound,
            aside(self.direct),
            aside(self.floor)
        )
    }
}

fn median(runs: &[Run]) -> Run {
    let of = |metric| Summary::of(runs.iter().filter_map(|run| run.get(metric))).map(|s| s.median);
    Run {
        throughput: of(Metric::Throughput),
        p50: of(Metric::P50),
        p90: of(Metric::P90),
        p99: of(Metric::P99),
        p999: of(Metric::P999),
        max: of(Metric::Max),
        cpu: of(Metric::Cpu),
        switches: of(Metric::Switches),
        memory: of(Metric::Memory),
        idle_p99: of(Metric::IdleP99),
    }
}

fn verdicts(scenario: &Scenario, lines: &[Line]) -> Vec<Verdict> {
    let ours: &[_] = if scenario.pools {
        &[Contestant::Request]
    } else {
        &[Contestant::Uring, Contestant::Epoll]
    };
    let mut verdicts = Vec::new();
    for contestant in ours {
        for line in lines.iter().filter(|line| line.entry.contestant == *contestant) {
            let targets = scenario.targets.iter();
            let targets = targets.filter_map(|target| for_entry(*target, line.entry));
            verdicts.extend(targets.filter_map(|target| verdict(target, line.entry, lines)));
        }
    }
    verdicts
}

fn runs_of(lines: &[Line], entry: Entry) -> Option<&[Run]> {
    lines.iter().find(|line| line.entry == entry).map(|line| &line.runs[..])
}

fn verdict(target: Target, entry: Entry, lines: &[Line]) -> Option<Verdict> {
    let against = match target.against {
        Against::Peers => "better peer",
        Against::Haproxy => "HAProxy with splice",
        Against::OwnTcp => "its own TCP",
        Against::Nothing => "itself",
    };
    // What a contestant's figure is by the same way.
    let figure_of = |contestant| {
        let entry = Entry { contestant, ..entry };
        let own = runs_of(lines, entry)?;
        let others: Vec<&[Run]> = match target.against {
            Against::Peers => {
                let is_peer = |e: Entry| e.contestant.is_peer() && e.way == entry.way;
                lines.iter().filter(|line| is_peer(line.entry)).map(|line| &line.runs[..]).collect()
            }
            Against::Haproxy => {
                let haproxy = Entry { contestant: Contestant::Haproxy, ..entry };
                runs_of(lines, haproxy).into_iter().collect()
            }
            Against::OwnTcp => {
                runs_of(lines, Entry { way: Way::Tcp, ..entry }).into_iter().collect()
            }
            Against::Nothing => {
                return Summary::of(own.iter().filter_map(|run| run.get(target.metric)));
            }
        };
        paired(target.metric, own, &others)
    };
    let figure = figure_of(entry.contestant)?;
    let aside = |contestant| figure_of(contestant).map(|figure| figure.median);
    // Its CPU time is that of the load and the backend.
    let direct = if target.metric == Metric::Cpu { None } else { aside(Contestant::Direct) };
    Some(Verdict {
        driver: entry.name(),
        metric: target.metric,
        against,
        figure,
        direct,
        floor: aside(Contestant::Floor),
        bound: target.bound,
        met: target.metric.meets(figure.median, target.bound),
    })
}

/// On epoll, Aegis is to be no worse than the better peer.
fn for_entry(target: Target, entry: Entry) -> Option<Target> {
    match (entry.contestant, target.against) {
        (_, Against::OwnTcp) => Some(target).filter(|_| entry.way != Way::Tcp),
        (Contestant::Uring | Contestant::Request, _) => Some(target),
        (_, Against::Nothing) => None,
        (_, _) => Some(Target { bound: 1.0, against: Against::Peers, ..target }),
    }
}

impl Measured {
    /// What a line is compared with: another build with this one, set up alike, and all with
    /// themselves over TCP.
    fn bases_of(&self, entry: Entry) -> impl Iterator<Item = &Line> {
        let base = match entry.contestant {
            Contestant::Other if self.pools => Some(Contestant::Request),
            Contestant::Other => Some(Contestant::Uring),
            Contestant::OtherEpoll => Some(Contestant::Epoll),
            _ => None,
        };
        let base = base.map(|contestant| Entry { contestant, ..entry });
        let over_tcp = (entry.way != Way::Tcp).then_some(Entry { way: Way::Tcp, ..entry });
        self.lines.iter().filter(move |line| [base, over_tcp].contains(&Some(line.entry)))
    }

    fn table(&self) -> String {
        let (work, cpu, per) =
            if self.bulk { ("GB/s", "CPU s/GB", "MB") } else { ("req/s", "CPU µs", "req") };
        let mut text = format!(
            "{}: {}\n  {:26}{work:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{cpu:>10}{:>10}{:>10}{:>9}\n",
            self.name,
            self.about,
            "",
            "p50 µs",
            "p90",
            "p99",
            "p99.9",
            "max",
            format!("switch/{per}"),
            format!("calls/{per}"),
            "B/conn",
        );
        for line in &self.lines {
            let run = &line.median;
            let _ = write!(text, "  {:26}", line.name);
            let digits = if self.bulk { 2 } else { 0 };
            let cells = [
                (run.throughput, 9, digits),
                (run.p50, 9, 0),
                (run.p90, 9, 0),
                (run.p99, 9, 0),
                (run.p999, 9, 0),
                (run.max, 9, 0),
                (run.cpu, 10, 2),
                (run.switches, 10, 3),
                (line.syscalls, 10, 2),
                (run.memory, 9, 0),
            ];
            for (value, width, digits) in cells {
                let cell = value.map_or("–".to_owned(), |value| format!("{value:.digits$}"));
                let _ = write!(text, "{cell:>width$}");
            }
            text.push('\n');
        }
        for line in &self.lines {
            for base in self.bases_of(line.entry) {
                let _ = writeln!(text, "  {} to {}:{}", line.name, base.name, ratios(line, base));
            }
        }
        text
    }
}

/// Of one build of Aegis to another, metric by metric.
fn ratios(line: &Line, base: &Line) -> String {
    let metrics = [Metric::Throughput, Metric::P50, Metric::P99, Metric::P999, Metric::Cpu];
    let mut text = String::new();
    for metric in metrics {
        if let Some(Summary { median, min, max }) = paired(metric, &line.runs, &[&base.runs]) {
            let _ = write!(text, "  {} {median:.2} ({min:.2} … {max:.2})", metric.name());
        }
    }
    text
}

fn date() -> String {
    let output = std::process::Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
    output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default()
}

fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let models: Vec<&str> = cpus
        .lines()
        .filter(|line| line.starts_with("model name"))
        .filter_map(|line| Some(line.split_once(':')?.1.trim()))
        .collect();
    let model = models.first().unwrap_or(&"unknown processor");
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{} × {model}, Linux {}", models.len(), kernel.trim())
}
