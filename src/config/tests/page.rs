//! The reference page, which is made from the table.

use std::fmt::Write;
use std::{env, fs};

use super::{file, path, read};
use crate::config::Preset;
use crate::config::variable::{Row, rows};

const PAGE: &str = "docs/CONFIGURATION.md";

/// What stands before the tables.
const INTRODUCTION: &str = "\
<!-- Made from the table in src/config/variables.rs by a test, which also says how to refresh it. -->

# Configuration

All configuration is in the environment, one variable for each setting, and is read once at the
start. Most variables are [of each route](#of-each-route), the others [of the process](#of-the-process).
`aegis-proxy check` prints what is in force and starts nothing, `aegis-proxy --help` prints
what stands here, and `/config` on the admin port says what a running process works with.

## How values are written

- **Durations** have units, and may be sums: `500ms`, `5s`, `1m 30s`, `1h`, `1d`.
- **Numbers** are decimal digits and nothing else. Sizes are in bytes, shares of a CPU in thousandths.
- **Lists** have commas between their items, and no item twice.
- **Words** are written as below. `true` and `false` are taken for `on` and `off`, since readers of
  YAML make the former of the latter.
- Spaces around a value do not matter. An empty value is a mistake, except for node, zone and region:
  a variable that is not set has its default.

## How mistakes are reported

Values that are not accepted, values that do not go together, and variables that begin with `AEGIS_`
and do not exist are all reported at once, on standard error, before anything is bound; the exit code
is 78. (What Kubernetes sets in every container for a Service whose name begins with `aegis` is passed
over.) With two mistakes, for example:

```text
";

const AFTER_MISTAKES: &str = "\
```

A value that is in order but has no effect, because of the value of another variable, is reported with the
reason by `aegis-proxy check`, and by a warning in the log at the start.
";

/// What stands below the heading of a part.
fn about(part: &str) -> &'static str {
    match part {
        "Of each route" => {
            "Where there is one route, as without `AEGIS_ROUTES`, these are its variables. Where there are several, \
             the name\nas it stands here is the default of all, and each route may have it of its own: \
             `AEGIS_ORDERS_EU__LISTEN` is\nthat of the route `orders-eu`, in capitals, with underscores for dashes \
             and two of them behind it."
        }
        "Of the process" => "These are for all routes together; no route has one of its own.",
        part => panic!("{part} is not described"),
    }
}

fn page() -> String {
    let mistakes = read(&[("AEGIS_WORKERS", "many"), ("AEGIS_IDLE_TIMEOUT", "60")]);
    let mut page =
        format!("{INTRODUCTION}aegis-proxy: {}\n{AFTER_MISTAKES}", mistakes.unwrap_err());
    let mut level = "##";
    for row in rows() {
        match row {
            Row::Part(part) => {
                level = "###";
                write!(page, "\n## {part}\n\n{}\n", about(part))
            }
            Row::Heading(heading) => write!(
                page,
                "\n{level} {heading}\n\n\
                 | variable | default | what it does (what it accepts) |\n| --- | --- | --- |\n"
            ),
            Row::Variable(variable) => {
                let (name, default, help) = (variable.name, variable.default, variable.help);
                let accepts = variable.accepts();
                assert!(!(help.to_owned() + default + &accepts).contains('|'), "{name}");
                writeln!(page, "| `{name}` | `{default}` | {help} ({accepts}) |")
            }
            Row::Section(_) => unreachable!("sections are flattened"),
        }
        .unwrap();
    }
    page + &presets()
}

/// What `AEGIS_PRESET` stands for.
fn presets() -> String {
    let mut text = "\n## Presets\n\n\
         `AEGIS_PRESET` puts other defaults in place of these; a variable that is set wins. \
         [DATABASES](DATABASES.md) says why.\n\n| preset | defaults |\n| --- | --- |\n"
        .to_owned();
    for preset in [Preset::Postgres, Preset::Mysql, Preset::Redis] {
        let defaults = preset.defaults().iter();
        let defaults: Vec<_> =
            defaults.map(|(variable, text)| format!("`{}={text}`", variable.name)).collect();
        let defaults =
            if defaults.is_empty() { "as they are".to_owned() } else { defaults.join(", ") };
        writeln!(text, "| `{preset}` | {defaults} |").unwrap();
    }
    text
}

#[test]
fn the_reference_page_is_what_the_table_gives() {
    if env::var_os("AEGIS_BLESS").is_some() {
        fs::write(path(PAGE), page()).unwrap();
    }
    let (written, page) = (file(PAGE), page());
    let differs = written.lines().zip(page.lines()).find(|(written, line)| written != line);
    assert!(
        written == page,
        "{PAGE} is not what the table gives, first at {differs:?}. To refresh it: \
         AEGIS_BLESS=1 cargo test --lib config::tests::page"
    );
}
