//! `aegis-proxy check --host`: the host, the sources of endpoints and the backends, each with what to
//! do where it is not fine.

use std::io;
use std::time::Duration;

use crate::config::{Config, Discovery, IoChoice, RouteConfig};
use crate::control::survey::{Found, Reached, survey};
use crate::io::Limit;
use crate::io::net::Address;
use crate::limits::SESSIONS_AUTO_MAX;
use crate::startup::{Capacity, Decisions, Plan};

/// What is thought of a thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    Fine,
    /// It works, and could be better.
    Note,
    /// It does not work now.
    Bad,
    /// It will not work until somebody changes the configuration or grants rights.
    Misconfigured,
}

/// A thing, and what to do about it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) verdict: Verdict,
    pub(super) text: String,
}

impl Item {
    fn new(verdict: Verdict, text: String) -> Self {
        Self { verdict, text }
    }

    /// A line of the report.
    pub(super) fn line(&self) -> String {
        let word = match self.verdict {
            Verdict::Fine => "fine",
            Verdict::Note => "note",
            Verdict::Bad | Verdict::Misconfigured => "BAD",
        };
        format!("{word:<4}  {}", self.text)
    }
}

/// Looks at everything that a start would need.
///
/// # Errors
/// There is no descriptor to look with.
pub(super) fn look(config: &Config, decisions: &Decisions) -> io::Result<Vec<Item>> {
    let mut items = vec![cores(&decisions.plan), descriptors(config, decisions), memlock()];
    items.push(driver(config, decisions));
    for (route, found) in config.routes.iter().zip(survey(config)?) {
        let of = match config.routes.len() {
            1 => String::new(),
            _ => format!("route {}: ", route.name),
        };
        items.extend(of_route(&of, route, &found));
    }
    Ok(items)
}

fn cores(plan: &Plan) -> Item {
    let &Plan { cpus, quota, .. } = plan;
    let workers = plan.cores.len();
    let limit = quota.map_or("no quota".to_owned(), |quota| format!("a quota of {quota}"));
    let text = format!("cores: {cpus} for this process, {limit}; workers: {workers}");
    let at_a_time = quota.map_or(cpus, |quota| cpus.min(quota.cores()));
    if at_a_time > 0 && workers > at_a_time {
        let what =
            format!("{text}; they would wait for each other: set AEGIS_WORKERS to {at_a_time}");
        return Item::new(Verdict::Note, what);
    }
    Item::new(Verdict::Fine, text)
}

fn descriptors(config: &Config, decisions: &Decisions) -> Item {
    // As it was raised, if it could be.
    let limit = shown(Limit::Descriptors, |limit| limit.to_string());
    let Capacity { sessions_max: sessions, pool_conns, .. } = decisions.capacity;
    let text = format!(
        "descriptors: {limit}, which is room for {sessions} sessions and {pool_conns} connections of \
         pools"
    );
    if config.max_sessions.is_none() && sessions.get() < SESSIONS_AUTO_MAX {
        let what = format!("{text} of {SESSIONS_AUTO_MAX}; raise RLIMIT_NOFILE if that is too few");
        return Item::new(Verdict::Note, what);
    }
    Item::new(Verdict::Fine, text)
}

/// Where it is too small for rings, the driver's reason says so.
fn memlock() -> Item {
    let limit = shown(Limit::LockedMemory, |bytes| format!("{} KiB", bytes / 1024));
    Item::new(Verdict::Fine, format!("locked memory: {limit}"))
}

fn driver(config: &Config, decisions: &Decisions) -> Item {
    let (name, reason) = (decisions.driver.driver.name(), &decisions.driver.reason);
    let text = format!("driver: {name} ({reason})");
    let is_fallback = config.io == IoChoice::Auto && name == "epoll";
    Item::new(if is_fallback { Verdict::Note } else { Verdict::Fine }, text)
}

/// The limit that is in force, with its unit.
fn shown(limit: Limit, text: impl FnOnce(u64) -> String) -> String {
    match limit.of_this_process() {
        Ok([u64::MAX, _]) => "unlimited".to_owned(),
        Ok([soft, _]) => text(soft),
        Err(error) => format!("not known ({error})"),
    }
}

fn of_route(of: &str, route: &RouteConfig, found: &Found) -> Vec<Item> {
    let mut items = vec![source(of, route, found)];
    items.extend(found.endpoints.iter().map(|endpoint| reached(of, endpoint)));
    items
}

/// Where the endpoints come from.
fn source(of: &str, route: &RouteConfig, found: &Found) -> Item {
    let source = match route.discovery {
        Discovery::Static => "backends",
        Discovery::Dns => "names",
        Discovery::Kubernetes => "Kubernetes API",
    };
    let Found { held, trouble, endpoints, took } = found;
    match (held, trouble) {
        (Some(why), _) => Item::new(Verdict::Misconfigured, format!("{of}{source}: {why}")),
        (None, Some(why)) => Item::new(Verdict::Bad, format!("{of}{source}: {why}")),
        (None, None) if endpoints.is_empty() => {
            Item::new(Verdict::Bad, format!("{of}{source}: there is no endpoint now"))
        }
        (None, None) => {
            let count = endpoints.len();
            let time = match route.discovery {
                Discovery::Static => String::new(),
                Discovery::Dns | Discovery::Kubernetes => format!(" after {}", time(*took)),
            };
            Item::new(Verdict::Fine, format!("{of}{source}: endpoints known: {count}{time}"))
        }
    }
}

fn reached(of: &str, Reached { name, address, outcome }: &Reached) -> Item {
    let address_text = address.to_string();
    let endpoint =
        if *name == address_text { address_text } else { format!("{name} at {address_text}") };
    match outcome {
        Ok(took) => {
            Item::new(Verdict::Fine, format!("{of}{endpoint}: connected in {}", time(*took)))
        }
        Err((error, took)) => {
            let why = why(error, address);
            Item::new(Verdict::Bad, format!("{of}{endpoint}: {why} (after {})", time(*took)))
        }
    }
}

/// What a failed connect means, and where to look.
fn why(error: &io::Error, address: &Address) -> String {
    let is_unix = address.path().is_some();
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            "refused: nobody listens there; is the server up, and is this its port?".to_owned()
        }
        io::ErrorKind::TimedOut if is_unix => {
            "its queue is full: the server is up, and accepts nobody".to_owned()
        }
        io::ErrorKind::TimedOut => "no answer: look for a firewall or a NetworkPolicy on the way, \
                                    or a wrong address"
            .to_owned(),
        io::ErrorKind::NotFound if is_unix => {
            "there is no such socket: is its folder shared with this container?".to_owned()
        }
        io::ErrorKind::PermissionDenied if is_unix => {
            "denied: this user may not write to the socket, or not enter its folder".to_owned()
        }
        _ => error.to_string(),
    }
}

fn time(took: Duration) -> String {
    format!("{:.1} ms", took.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::startup::Quota;

    #[test]
    fn workers_are_too_many_where_there_are_more_than_cpus_and_quota_rounded_up() {
        for (workers, cpus, quota_milli, expected) in [
            (2, 2, Some(1500), "fine  cores: 2 for this process, a quota of 1.5; workers: 2"),
            (1, 4, Some(250), "fine  cores: 4 for this process, a quota of 0.25; workers: 1"),
            (
                2,
                4,
                Some(250),
                "note  cores: 4 for this process, a quota of 0.25; workers: 2; they would wait for each other: set AEGIS_WORKERS to 1",
            ),
            (
                3,
                2,
                None,
                "note  cores: 2 for this process, no quota; workers: 3; they would wait for each other: set AEGIS_WORKERS to 2",
            ),
            // How many there are is not known.
            (3, 0, None, "fine  cores: 0 for this process, no quota; workers: 3"),
        ] {
            let (cores, quota) = (vec![None; workers], quota_milli.map(Quota::of_milli));
            let plan = Plan { cores, reason: String::new(), cpus, quota };
            assert_eq!(super::cores(&plan).line(), expected);
        }
    }
}
