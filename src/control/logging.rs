//! Where the log goes: lines of text or JSON on standard error.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use crate::config::{Config, LogFormat};

/// Libraries that tell of troubles which the program tells of itself, once. `AEGIS_LOG` may ask for
/// them.
const QUIET: &str =
    "kube=off,kube_client=off,hyper=off,hyper_util=off,tower=off,tower_http=off,rustls=off";

/// Starts logging to standard error. A second call changes nothing.
///
/// A filter that cannot be parsed is replaced by `info` with a warning: it is no reason to refuse
/// traffic.
pub fn init_logging(config: &Config) {
    let (filter, problem) = match EnvFilter::try_new(format!("{QUIET},{}", config.log)) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    // The only failure is that a subscriber is set already.
    let _ = match config.log_format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    if let Some(error) = problem {
        tracing::warn!(filter = config.log, %error, "AEGIS_LOG is not a log filter, using `info`");
    }
}
