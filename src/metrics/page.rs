//! The reference page, `docs/METRICS.md`.

use std::fmt::Write;

use super::family::{Family, LabelName, LabelValue, Values};
use super::sections;
use crate::protocol::ProtocolName;

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/METRICS.md");

const HEAD: &str = "\
# Metrics

<!-- Generated from the rows in src/metrics; `AEGIS_BLESS=1 cargo test --lib metrics::page` writes it. -->

The admin port gives these at `/metrics` as Prometheus text. Counters begin at 0 with the process.
Metrics with the label `worker` have one series per worker; the others are of the whole process.
Histograms have two buckets per octave from 50 µs to about 14 hours.

A metric or a label value that can never move in the configuration at hand is not shown; \"shown if\"
says when it is.
";

fn page() -> String {
    let mut page = HEAD.to_owned();
    for (title, families) in sections() {
        let _ = writeln!(page, "\n## {title}\n");
        page +=
            "| metric | kind | labels | what it is | shown if |\n| --- | --- | --- | --- | --- |\n";
        for Family { name, kind, help, labels, when } in families {
            let labels: Vec<_> = labels.iter().map(|label| format!("`{}`", label.name)).collect();
            let (kind, labels) = (kind.name(), labels.join(", "));
            let _ = writeln!(page, "| `{name}` | {kind} | {labels} | {help} | {} |", when.text);
        }
    }
    page += "\n## Labels\n\n";
    for (name, what) in open_labels() {
        let _ = writeln!(page, "- `{name}`: {what}");
    }
    page += "\n### `command`\n\n| protocol | what requests ask for |\n| --- | --- |\n";
    for protocol in ProtocolName::ALL {
        let facts = protocol.facts();
        let commands: Vec<_> = facts.verbs().map(|verb| format!("`{}`", verb.label())).collect();
        if !commands.is_empty() {
            let _ = writeln!(page, "| `{protocol}` | {} |", commands.join(", "));
        }
    }
    for (name, families, values) in closed_labels() {
        let families: Vec<_> = families.iter().map(|family| format!("`{family}`")).collect();
        let _ = writeln!(page, "\n### `{name}` of {}\n", families.join(", "));
        page += "| value | what it means | shown if |\n| --- | --- | --- |\n";
        for LabelValue { name, help, when } in values {
            let _ = writeln!(page, "| `{name}` | {help} | {} |", when.text);
        }
    }
    page
}

/// The labels that have no closed set of values, once each.
fn open_labels() -> Vec<(&'static str, &'static str)> {
    let mut found = Vec::new();
    for label in sections().iter().flat_map(|(_, families)| families).flat_map(|f| f.labels) {
        if let Values::Open(what) = label.values
            && !found.contains(&(label.name, what))
        {
            found.push((label.name, what));
        }
    }
    found
}

/// The closed sets: the label's name, the metrics that have it, and its values.
fn closed_labels() -> Vec<(&'static str, Vec<&'static str>, &'static [LabelValue])> {
    let mut found: Vec<(_, Vec<_>, &[LabelValue])> = Vec::new();
    for family in sections().iter().flat_map(|(_, families)| families) {
        let closed = |label: &LabelName| match label.values {
            Values::OneOf(values) => Some((label.name, values)),
            Values::Open(_) | Values::Commands => None,
        };
        for (name, values) in family.labels.iter().filter_map(closed) {
            let names = |values: &[LabelValue]| values.iter().map(|v| v.name).collect::<Vec<_>>();
            let known = found.iter_mut().find(|known| names(known.2) == names(values));
            match known {
                Some((_, families, _)) => families.push(family.name),
                None => found.push((name, vec![family.name], values)),
            }
        }
    }
    found
}

#[test]
fn the_page_says_what_the_rows_say() {
    let page = page();
    if std::env::var_os("AEGIS_BLESS").is_some() {
        std::fs::write(PATH, &page).unwrap();
    }
    let found = std::fs::read_to_string(PATH).unwrap_or_default();
    assert!(
        found == page,
        "docs/METRICS.md is not what the rows say: \
         `AEGIS_BLESS=1 cargo test --lib metrics::page` writes it anew"
    );
}

#[test]
fn a_name_says_its_kind_and_comes_once() {
    let mut names = Vec::new();
    for family in sections().into_iter().flat_map(|(_, families)| families) {
        let Family { name, kind, help, .. } = family;
        assert_eq!(kind.name() == "counter", name.ends_with("_total"), "{name}");
        assert!(help.ends_with('.') && !help.contains(['\n', '|']), "{name}: {help}");
        assert!(!names.contains(name), "{name} has two rows");
        names.push(*name);
    }
}
