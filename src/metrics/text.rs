//! The Prometheus text, format 0.0.4. Writing to a `String` cannot fail, hence the ignored results.

use std::fmt::{Display, Write};

use super::cells::Durations;
use super::family::Family;

/// The `Content-Type` of the format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Begins a family; its samples follow.
pub fn family(text: &mut String, family: &Family) {
    let Family { name, kind, help, .. } = family;
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {}", kind.name());
}

/// A family with one sample and no labels.
pub fn single(text: &mut String, of: &Family, value: impl Display) {
    family(text, of);
    sample(text, of, &[], value);
}

/// A sample with these values of the family's labels.
pub fn sample(text: &mut String, of: &Family, values: &[&str], value: impl Display) {
    line(text, of.name, "", &labels(of, values), value);
}

/// The samples of a histogram, with these values of the family's labels.
pub fn durations(text: &mut String, of: &Family, values: &[&str], all: &Durations) {
    let own = labels(of, values);
    // `_count` is the sum of the buckets, so it agrees with them while workers count on.
    let mut count = 0;
    for (i, n) in all.counts.iter().enumerate() {
        count += n;
        let le = (all.upper_bound)(i);
        let le = le.map_or_else(|| "+Inf".to_owned(), |seconds| seconds.to_string());
        line(text, of.name, "_bucket", &[&own[..], &[("le", &le)]].concat(), count);
    }
    line(text, of.name, "_sum", &own, all.sum);
    line(text, of.name, "_count", &own, count);
}

fn labels<'a>(of: &Family, values: &[&'a str]) -> Vec<(&'static str, &'a str)> {
    assert_eq!(of.labels.len(), values.len(), "labels of {}", of.name);
    of.labels.iter().map(|label| label.name).zip(values.iter().copied()).collect()
}

fn line(text: &mut String, name: &str, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
    text.push_str(name);
    text.push_str(suffix);
    for (i, (label, value)) in labels.iter().enumerate() {
        let _ = write!(text, "{}{label}=\"", if i == 0 { '{' } else { ',' });
        escape(text, value);
        text.push('"');
    }
    let _ = writeln!(text, "{} {value}", if labels.is_empty() { "" } else { "}" });
}

fn escape(text: &mut String, value: &str) {
    for c in value.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            c => text.push(c),
        }
    }
}
