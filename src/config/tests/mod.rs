mod charts;
mod mistakes;
mod page;
mod routes;
mod rules;
mod table;

use std::fs;

use super::{Config, ConfigErrors, Problem};

fn read(vars: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
    Config::from_vars(vars.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())))
}

fn problems(vars: &[(&str, &str)]) -> Vec<String> {
    read(vars).map_or_else(
        |errors| errors.problems().iter().map(Problem::to_string).collect(),
        |_| Vec::new(),
    )
}

/// A file of this project, by its path from the root.
fn path(file: &str) -> String {
    format!("{}/{file}", env!("CARGO_MANIFEST_DIR"))
}

fn file(file: &str) -> String {
    fs::read_to_string(path(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}
