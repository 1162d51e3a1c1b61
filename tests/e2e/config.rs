//! Configuration, right and wrong. No driver runs here, so each test is one test.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;

use crate::support::proxy::{Builder, Ended};
use crate::support::{Io, skip};

/// Bad configuration, after `EX_CONFIG` of `sysexits.h`.
const EXIT_CONFIG: i32 = 78;

/// Every variable that there is.
const VARIABLES: &[&str] = &[
    "AEGIS_ADMIN",
    "AEGIS_BACKENDS",
    "AEGIS_BACKEND_DRAIN",
    "AEGIS_BALANCE",
    "AEGIS_CONNECT_ATTEMPTS",
    "AEGIS_CONNECT_TIMEOUT",
    "AEGIS_DISCOVERY",
    "AEGIS_DNS_REFRESH",
    "AEGIS_DRAIN_DELAY",
    "AEGIS_DRAIN_TIMEOUT",
    "AEGIS_EJECT_FAILURES",
    "AEGIS_EJECT_TIME",
    "AEGIS_ENDPOINT_WAIT",
    "AEGIS_HALF_CLOSE_TIMEOUT",
    "AEGIS_IDLE_TIMEOUT",
    "AEGIS_IO",
    "AEGIS_KEEPALIVE",
    "AEGIS_KUBE_NAMESPACE",
    "AEGIS_KUBE_PORT",
    "AEGIS_KUBE_SELECTOR",
    "AEGIS_KUBE_SERVICE",
    "AEGIS_KUBE_SNAPSHOT",
    "AEGIS_KUBE_SNAPSHOT_MAX_AGE",
    "AEGIS_KUBE_WATCH_TIMEOUT",
    "AEGIS_LISTEN",
    "AEGIS_LOCALITY",
    "AEGIS_LOG",
    "AEGIS_LOG_FORMAT",
    "AEGIS_MAX_SESSIONS",
    "AEGIS_NODE_NAME",
    "AEGIS_PIN",
    "AEGIS_POOL_IDLE_TIMEOUT",
    "AEGIS_POOL_MAX_IDLE",
    "AEGIS_POOL_MAX_LIFETIME",
    "AEGIS_POOL_MIN_IDLE",
    "AEGIS_PROXY_PROTOCOL",
    "AEGIS_SLOW_START",
    "AEGIS_START_TIMEOUT",
    "AEGIS_TCP_USER_TIMEOUT",
    "AEGIS_WORKERS",
    "AEGIS_ZONE",
];

fn usual() -> Builder {
    Builder::on(Io::Auto).set("AEGIS_BACKENDS", "127.0.0.2:9")
}

/// Wrong values of five kinds.
fn wrong() -> [(&'static str, &'static str); 5] {
    [
        ("AEGIS_LISTEN", "nowhere"),
        ("AEGIS_BACKENDS", "a-name-without-a-port"),
        ("AEGIS_IO", "kqueue"),
        ("AEGIS_CONNECT_TIMEOUT", "fast"),
        ("AEGIS_POOL_MAX_IDLE", "-1"),
    ]
}

fn expect_refused_naming(ended: &Ended, parts: &[&str]) {
    assert_eq!(ended.code, Some(EXIT_CONFIG), "{ended:?}");
    for part in parts {
        assert!(ended.errors.contains(part), "no {part} in {}", ended.errors);
    }
    assert!(!ended.errors.contains("listening"), "{}", ended.errors);
}

#[test]
fn all_problems_are_told_at_once() {
    let builder = wrong().iter().fold(usual(), |builder, (name, value)| builder.set(name, *value));
    let names = wrong().map(|(name, _)| name);
    expect_refused_naming(&builder.clone().run(), &names);
    expect_refused_naming(&builder.argument("check").run(), &names);
}

#[test]
fn a_wrong_value_is_quoted() {
    for (name, value) in wrong() {
        expect_refused_naming(&usual().set(name, value).run(), &[name, value]);
    }
}

#[test]
fn an_unknown_variable_is_refused_with_the_name_that_is_near() {
    let ended = usual().set("AEGIS_CONECT_TIMEOUT", "1s").run();
    expect_refused_naming(&ended, &["AEGIS_CONECT_TIMEOUT", "AEGIS_CONNECT_TIMEOUT"]);
}

#[test]
fn check_prints_the_effective_configuration_and_starts_nothing() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let ended = usual()
        .set("AEGIS_LISTEN", taken.local_addr().unwrap().to_string())
        .set("AEGIS_CONNECT_TIMEOUT", "7s")
        .set("AEGIS_BALANCE", "source_hash")
        .argument("check")
        .run();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let printed = ended.output.to_lowercase();
    for part in ["connect_timeout", "7s", "source_hash", "127.0.0.2:9", "max_sessions"] {
        assert!(printed.contains(part), "no {part} in {}", ended.output);
    }
}

#[test]
fn a_data_port_in_use_is_named() {
    expect_address_in_use("AEGIS_LISTEN");
}

#[test]
fn an_admin_port_in_use_is_named() {
    expect_address_in_use("AEGIS_ADMIN");
}

fn expect_address_in_use(variable: &str) {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = usual().set(variable, address.as_str()).run();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.errors.contains(&address), "no {address} in {}", ended.errors);
    assert!(ended.errors.to_lowercase().contains("in use"), "{}", ended.errors);
}

#[test]
fn help_lists_every_variable_and_so_does_the_readme() {
    let ended = Builder::bare().argument("--help").run();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let in_help = variables_in(&ended.output);
    for variable in VARIABLES {
        assert!(in_help.contains(*variable), "no {variable} in {}", ended.output);
    }
    match fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")) {
        Ok(readme) => {
            let in_readme = variables_in(&readme);
            let missing: Vec<_> = in_help.difference(&in_readme).collect();
            let unknown: Vec<_> = in_readme.difference(&in_help).collect();
            assert!(missing.is_empty(), "only in --help: {missing:?}");
            assert!(unknown.is_empty(), "only in README.md: {unknown:?}");
        }
        Err(error) => skip(&format!("README.md is not compared with --help: {error}")),
    }
}

/// The names of variables that a text mentions, but for the ones that concern the tests.
fn variables_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
    let names = words.filter(|word| word.starts_with("AEGIS_") && !word.ends_with('_'));
    names.filter(|word| !word.starts_with("AEGIS_E2E_")).map(str::to_owned).collect()
}
