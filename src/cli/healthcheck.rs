//! `aegis-proxy healthcheck`: a probe of the admin port, for images that have no other client.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};

use super::admin::{Admin, Answer, PAGE_TIME_MAX, option};
use super::output::{fail, print};

pub(super) const NAME: &str = "healthcheck";

const PROBE: &str = "probe";
const STARTUPZ: &str = "startupz";

/// What a proxy says to each of them that is fine.
const FINE: &str = "ok\n";

/// The proxy itself waits for its start for up to 8 s before it answers.
const START_TIME_MAX: Duration = Duration::from_secs(10);

pub(super) fn definition() -> Command {
    Command::new(NAME)
        .about("Asks a running proxy for its health: exits with 0 if it is fine, else with 1")
        .arg(
            Arg::new(PROBE)
                .long(PROBE)
                .value_parser(["livez", "readyz", STARTUPZ])
                .default_value("readyz")
                .help("What to ask: whether it runs, takes new sessions, or has started"),
        )
        .arg(option())
}

/// Asks, and says why where it is not fine.
pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    let Some(probe) = matches.get_one::<String>(PROBE) else { unreachable!("it has a default") };
    let within = if probe == STARTUPZ { START_TIME_MAX } else { PAGE_TIME_MAX };
    let answer = Admin::of(matches).and_then(|admin| admin.get(&format!("/{probe}"), within));
    match answer {
        Ok(Answer { status: 200, body }) if body == FINE => print(&body),
        // Whatever has the port in the proxy's place may know the path, or say 200 to any.
        Ok(Answer { status: 200, .. }) => {
            fail(1, format_args!("{probe}: the answer is no proxy's"))
        }
        Ok(Answer { body, .. }) => {
            let reasons: Vec<_> = body.lines().collect();
            fail(1, format_args!("{probe}: {}", reasons.join("; ")))
        }
        Err(why) => fail(1, format_args!("{probe}: {why}")),
    }
}
