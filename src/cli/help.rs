//! What `--help` says of the environment.

use std::fmt::Write;

use crate::config::{VARIABLES, Variable};

/// Three lines a variable: the assignment of its default, what it does, what it accepts.
pub(super) fn environment() -> String {
    let mut help =
        "Environment, with the defaults (durations: 500ms, 5s, 1m 30s, 1h, 1d):".to_owned();
    // The first one says which routes there are.
    let mut of_routes = false;
    for variable in VARIABLES.iter() {
        if variable.is_of_routes() != of_routes {
            of_routes = variable.is_of_routes();
            help += "\n\n";
            help += whose(variable);
        }
        let (name, default) = (variable.name, variable.default);
        let (what, accepts) = (variable.help, variable.accepts());
        // Writing to a string cannot fail.
        let _ = write!(help, "\n\n  {name}={default}\n      {what}\n      Accepts {accepts}.");
    }
    help
}

/// Whose the variables from this one on are.
fn whose(variable: &Variable) -> &'static str {
    if variable.is_of_routes() {
        "Of each route: AEGIS_LISTEN is for all, AEGIS_ORDERS__LISTEN for the route orders alone:"
    } else {
        "Of the process:"
    }
}
