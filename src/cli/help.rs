//! What `--help` says of the environment.

use std::fmt::Write;

use crate::config::VARIABLES;

/// Three lines a variable: the assignment of its default, what it does, what it accepts.
pub(super) fn environment() -> String {
    let mut help =
        "Environment, with the defaults (durations: 500ms, 5s, 1m 30s, 1h, 1d):".to_owned();
    for variable in VARIABLES.iter() {
        let (name, default) = (variable.name, variable.default);
        let (what, accepts) = (variable.help, variable.accepts());
        // Writing to a string cannot fail.
        let _ = write!(help, "\n\n  {name}={default}\n      {what}\n      Accepts {accepts}.");
    }
    help
}
