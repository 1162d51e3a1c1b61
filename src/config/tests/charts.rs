//! What the charts repeat of the table. A property of the schema names its variable in a `$comment`;
//! its type, its range and its default are then the variable's.

use std::fmt::Write;
use std::{env, fs};

use serde_json::{Map, Value, json};

use super::{file, path};
use crate::config::kind::Shape;
use crate::config::{VARIABLES, Variable};

const SCHEMA: &str = "helm/aegis-sidecar/values.schema.json";
const VALUES: &str = "helm/aegis-sidecar/values.yaml";
const TEMPLATE: &str = "helm/aegis-sidecar/templates/_sidecar.tpl";

/// What the program accepts in variables, for those that have no value of their own in the chart.
const TABLE: &str = "helm/aegis-sidecar/templates/_variables.tpl";

/// What the chart chooses otherwise: see its values.
const CHOSEN: [(&str, &str); 2] = [("AEGIS_PROTOCOL", "chronos"), ("AEGIS_DRAIN_DELAY", "0s")];

/// A value of the chart that stands for a variable.
struct Property {
    /// Such as `pool.size`.
    path: String,
    /// Its schema, with references followed and without the comment.
    schema: Value,
    variable: &'static Variable,
}

fn properties() -> Vec<Property> {
    let schema: Value = serde_json::from_str(&file(SCHEMA)).unwrap();
    let mut found = Vec::new();
    collect(&schema, &schema, "", &mut found);
    assert!(found.len() > 10, "{}", found.len());
    found
}

fn collect(root: &Value, object: &Value, within: &str, found: &mut Vec<Property>) {
    for (name, property) in object["properties"].as_object().into_iter().flatten() {
        let path = format!("{within}{name}");
        collect(root, property, &format!("{path}."), found);
        let Some(comment) = property["$comment"].as_str() else { continue };
        let variable = VARIABLES.iter().find(|variable| variable.name == comment);
        let variable = variable.unwrap_or_else(|| panic!("{path}: there is no {comment}"));
        let mut schema = match property["$ref"].as_str() {
            Some(reference) => root.pointer(reference.trim_start_matches('#')).unwrap().clone(),
            None => property.clone(),
        };
        schema.as_object_mut().unwrap().remove("$comment");
        found.push(Property { path, schema, variable });
    }
}

/// The schema of a variable's texts, and of the empty one where that leaves the choice to the
/// program. Helm's schema knows no durations: their bounds are in the template.
fn schema(shape: &Shape, with_empty: bool) -> Value {
    let mut words = shape.words.clone();
    if with_empty {
        words.insert(0, "");
    }
    if shape.durations.is_some() {
        let number = "[0-9]{1,9}(ms|s|m|h|d)";
        let pattern = match &words[..] {
            [] => format!("^{number}$"),
            words => format!("^({}|{number})$", words.join("|")),
        };
        return json!({ "type": "string", "pattern": pattern });
    }
    let number = shape.numbers.as_ref().map(
        |range| json!({ "type": "integer", "minimum": range.start(), "maximum": range.end() }),
    );
    match (&words[..], number) {
        ([], Some(number)) => number,
        ([word], Some(number)) => json!({ "anyOf": [{ "const": word }, number] }),
        (words, Some(number)) => json!({ "anyOf": [{ "enum": words }, number] }),
        (words, None) => json!({ "enum": words }),
    }
}

fn value_of(values: &Value, path: &str) -> String {
    let value = path.split('.').fold(values, |value, name| &value[name]);
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[test]
fn the_schema_has_the_types_and_ranges_of_the_table() {
    let values: Value = serde_saphyr::from_str(&file(VALUES)).unwrap();
    for Property { path, schema: found, variable } in properties() {
        let with_empty = value_of(&values, &path).is_empty();
        let given = schema(&variable.kind.shape(), with_empty);
        assert_eq!(found, given, "{SCHEMA}: {path} has to be {given}");
    }
}

#[test]
fn the_charts_defaults_are_the_tables() {
    let values: Value = serde_saphyr::from_str(&file(VALUES)).unwrap();
    for Property { path, variable, .. } in properties() {
        let value = value_of(&values, &path);
        let chosen = CHOSEN.iter().find(|(name, _)| *name == variable.name);
        let default = chosen.map_or(variable.default, |(_, value)| value);
        assert!(value.is_empty() || value == default, "{VALUES}: {path} is {value}, not {default}");
    }
}

#[test]
fn the_template_has_the_bounds_of_durations() {
    let template = file(TEMPLATE);
    let mut count = 0;
    for Property { path, variable, .. } in properties() {
        let Some(line) = template.lines().find(|line| line.starts_with(&format!("{path}: {{")))
        else {
            continue;
        };
        let accepts = variable.accepts();
        let bounds = accepts.trim_start_matches("off, or ").trim_start_matches("a duration from ");
        let (min, max) = bounds.split_once(" to ").unwrap();
        let or_off = if accepts.starts_with("off") { ", orOff: true" } else { "" };
        let name = variable.name;
        let given = format!("{path}: {{variable: {name}, min: {min}, max: {max}{or_off}}}");
        assert_eq!(line, given, "{TEMPLATE}");
        count += 1;
    }
    assert_eq!(count, template.lines().filter(|line| line.contains(": {variable: ")).count());
}

/// What is accepted of a variable, as the template reads it: bounds in the numbers themselves, or in
/// milliseconds.
fn row(variable: &Variable) -> Value {
    let shape = variable.kind.shape();
    let mut row = Map::new();
    let mut set = |name: &str, value: Value| row.insert(name.to_owned(), value);
    set("accepts", variable.accepts().into());
    if variable.is_of_routes() {
        set("ofRoutes", true.into());
    }
    let zero = shape.zero_is_word.then_some("0");
    let words: Vec<_> = shape.words.iter().copied().chain(zero).collect();
    if !words.is_empty() {
        set("words", words.into());
    }
    if let Some(range) = &shape.numbers {
        set("numbers", json!([range.start(), range.end()]));
    }
    if let Some(range) = &shape.durations {
        let ms = [range.start(), range.end()].map(|bound| bound.as_millis() as u64);
        set("durations", json!(ms));
    }
    if shape.whole_seconds {
        set("wholeSeconds", true.into());
    }
    if let Some(items) = shape.items {
        set("items", items.into());
    }
    row.into()
}

#[test]
fn the_template_of_variables_is_made_from_the_table() {
    let mut text =
        "{{- /* Made from the table in src/config/variables.rs by a test, which also says how to \
                    refresh it. */}}\n{{- define \"aegis-sidecar.variables\" -}}\n"
            .to_owned();
    for variable in VARIABLES.iter() {
        writeln!(text, "{}: {}", variable.name, row(variable)).unwrap();
    }
    let modules = file("src/lib.rs");
    let modules =
        modules.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    let modules: Vec<_> = modules.collect();
    text += "{{- end }}\n\n{{- /* What directives of the log may name of the program. */}}\n";
    writeln!(text, "{{{{- define \"aegis-sidecar.modules\" -}}}}\n{}", json!(modules)).unwrap();
    text += "{{- end }}\n";
    if env::var_os("AEGIS_BLESS").is_some() {
        return fs::write(path(TABLE), text).unwrap();
    }
    assert!(
        fs::read_to_string(path(TABLE)).is_ok_and(|found| found == text),
        "{TABLE} has to be written anew:\n\n\
         AEGIS_BLESS=1 cargo test --lib config::tests::charts"
    );
}
