//! What a command is told by an option, or else by the environment of the proxy that it asks.

use std::env;

use clap::ArgMatches;

/// What `--option` says, or else the variable, or else `default`; and before it the source, to be named in
/// errors. A variable that is no text is told as well as it can be.
pub(super) fn setting(
    matches: &ArgMatches,
    option: &str,
    variable: &str,
    default: &str,
) -> (String, String) {
    if let Some(text) = matches.get_one::<String>(option) {
        return (format!("--{option}"), text.clone());
    }
    let text = env::var_os(variable);
    let text = text.map_or(default.to_owned(), |text| text.to_string_lossy().into_owned());
    (variable.to_owned(), text)
}
