//! The report as one page that needs nothing else.

use std::fmt::Write as _;

use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;

use crate::peers::{Contestant, Entry, Way};
use crate::report::{Line, Measured, Report};
use crate::scenarios::Sweep;
use crate::stats::{Metric, Run};

const SIZE: (u32, u32) = (560, 320);
const STYLE: &str = "body{font:15px system-ui;margin:2em auto;max-width:1180px;color:#222}\
    table{border-collapse:collapse;margin:.5em 0}td,th{padding:.15em .7em;text-align:right}\
    td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f4f4f4}\
    .not{color:#b00;font-weight:bold}pre{white-space:pre-wrap}svg{margin:.3em}";

/// One contestant's points.
struct Curve {
    entry: Entry,
    points: Vec<(f64, f64)>,
}

/// The whole page.
pub fn html(report: &Report) -> Result<String, String> {
    let mut page = format!(
        "<!doctype html><meta charset=utf-8><title>Aegis, compared</title><style>{STYLE}</style>\
         <h1>Aegis, compared</h1><pre>{}</pre><h2>Targets</h2>{}",
        escape(&report.heading()),
        verdicts(report)
    );
    page.push_str("<h2>As the work grows</h2>");
    let sweeps = [
        (Sweep::Connections, Metric::Cpu, "CPU µs a request against connections"),
        (Sweep::Connections, Metric::Throughput, "requests/s against connections"),
        (Sweep::Connections, Metric::P99, "p99 µs against connections"),
        (Sweep::Connections, Metric::Memory, "bytes of user space a connection"),
        (Sweep::MessageSize, Metric::Cpu, "CPU µs a request against bytes a message"),
        (Sweep::MessageSize, Metric::Throughput, "requests/s against bytes a message"),
    ];
    for (sweep, metric, title) in sweeps {
        page.push_str(&plot(title, &swept(report, sweep, metric))?);
    }
    for scenario in report.scenarios.iter().filter(|scenario| scenario.sweep.is_none()) {
        let _ = write!(page, "<h2>{}</h2>{}", escape(&scenario.about), table(scenario));
        if !scenario.bulk {
            let title = "latency µs against 1/(1 − quantile): 2, 10, 100, 1000";
            page.push_str(&plot(title, &percentiles(scenario))?);
        }
    }
    Ok(page)
}

fn verdicts(report: &Report) -> String {
    let mut text = "<table><tr><th>scenario<th>driver<th>metric<th>against<th>median<th>from<th>to\
                    <th>target<th></tr>"
        .to_owned();
    for scenario in &report.scenarios {
        for verdict in &scenario.verdicts {
            let (class, met) = if verdict.met { ("", "met") } else { ("not", "not met") };
            let figure = verdict.figure;
            let _ = write!(
                text,
                "<tr><td>{}<td>{}<td>{}<td>{}<td>{:.2}<td>{:.2}<td>{:.2}<td>{}<td class='{class}'>{met}</tr>",
                escape(&scenario.about),
                verdict.driver,
                verdict.metric.name(),
                verdict.against,
                figure.median,
                figure.min,
                figure.max,
                verdict.bound
            );
        }
    }
    text + "</table>"
}

fn table(scenario: &Measured) -> String {
    let mut text = "<table><tr><th>".to_owned();
    let some = |metric: &&Metric| scenario.lines.iter().any(|l| l.median.get(**metric).is_some());
    let metrics: Vec<&Metric> = Metric::ALL.iter().filter(some).collect();
    for metric in &metrics {
        let _ = write!(text, "<th>{} {}", metric.name(), metric.unit(scenario.bulk));
    }
    for line in &scenario.lines {
        let _ = write!(text, "<tr><td>{}", line.name);
        for metric in &metrics {
            let value = line.median.get(**metric).map_or("–".to_owned(), |v| format!("{v:.2}"));
            let _ = write!(text, "<td>{value}");
        }
    }
    text + "</table>"
}

fn swept(report: &Report, sweep: Sweep, metric: Metric) -> Vec<Curve> {
    let point = |scenario: &Measured, entry| {
        let (_, x) = scenario.sweep.filter(|(which, _)| *which == sweep)?;
        let line = scenario.lines.iter().find(|line| line.entry == entry)?;
        Some((x as f64, line.median.get(metric)?))
    };
    curves(|entry| report.scenarios.iter().filter_map(|s| point(s, entry)).collect())
}

fn percentiles(scenario: &Measured) -> Vec<Curve> {
    let points = |run: &Run| {
        let all = [(2.0, run.p50), (10.0, run.p90), (100.0, run.p99), (1000.0, run.p999)];
        all.into_iter().filter_map(|(x, y)| Some((x, y?))).collect()
    };
    let line = |entry| scenario.lines.iter().find(|line: &&Line| line.entry == entry);
    curves(|entry| line(entry).map(|line| points(&line.median)).unwrap_or_default())
}

fn curves(points: impl Fn(Entry) -> Vec<(f64, f64)>) -> Vec<Curve> {
    let by_each_way =
        |&contestant: &Contestant| Way::ALL.iter().map(move |&way| Entry { contestant, way });
    let curve = |entry| Curve { entry, points: points(entry) };
    let all = Contestant::ALL.iter().flat_map(by_each_way).map(curve);
    all.filter(|curve| !curve.points.is_empty()).collect()
}

/// Both axes are logarithmic: the work spans four decades.
fn plot(title: &str, curves: &[Curve]) -> Result<String, String> {
    let points = || curves.iter().flat_map(|curve| curve.points.iter().copied());
    let span = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values
            .filter(|value| *value > 0.0)
            .fold((f64::MAX, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
        (low / 1.2)..(high * 1.2)
    };
    let (x, y) = (span(&mut points().map(|p| p.0)), span(&mut points().map(|p| p.1)));
    if x.start >= x.end || y.start >= y.end {
        return Ok(String::new());
    }
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    draw(&area, title, curves, x.log_scale(), y.log_scale())?;
    drop(area);
    Ok(svg)
}

fn draw<X, Y>(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    curves: &[Curve],
    x: X,
    y: Y,
) -> Result<(), String>
where
    X: AsRangedCoord<Value = f64>,
    Y: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let context = |error: &dyn std::fmt::Display| format!("the plot {title}: {error}");
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 15))
        .margin(8)
        .x_label_area_size(25)
        .y_label_area_size(60)
        .build_cartesian_2d(x, y)
        .map_err(|error| context(&error))?;
    chart.configure_mesh().light_line_style(WHITE).draw().map_err(|error| context(&error))?;
    for curve in curves {
        let color = color(curve.entry);
        let line = LineSeries::new(curve.points.iter().copied(), color.stroke_width(2));
        chart
            .draw_series(line.point_size(3))
            .map_err(|error| context(&error))?
            .label(curve.entry.name())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .draw()
        .map_err(|error| context(&error))?;
    area.present().map_err(|error| context(&error))
}

/// The less TCP, the paler.
fn color(entry: Entry) -> RGBAColor {
    let opacity = match entry.way {
        Way::Tcp => 1.0,
        Way::UnixClients => 0.6,
        Way::Unix => 0.35,
    };
    let color = match entry.contestant {
        Contestant::Direct => RGBColor(150, 150, 150),
        Contestant::Uring => RGBColor(200, 30, 30),
        Contestant::Epoll => RGBColor(240, 150, 30),
        Contestant::Request => RGBColor(150, 40, 160),
        Contestant::Other => RGBColor(120, 90, 60),
        Contestant::OtherEpoll => RGBColor(200, 170, 120),
        Contestant::Haproxy => RGBColor(30, 90, 200),
        Contestant::Nginx => RGBColor(30, 150, 60),
        Contestant::Floor => RGBColor(90, 90, 90),
    };
    color.mix(opacity)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
