//! Configuration, right and wrong. No driver runs here, so each test is one test.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::process::Command;

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
    "AEGIS_CONTROL",
    "AEGIS_CPU_LIMIT",
    "AEGIS_CPU_REQUEST",
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
    "AEGIS_MEMORY_LIMIT",
    "AEGIS_MEMORY_REQUEST",
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
fn all_problems_are_reported_at_once() {
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

/// The limits of pools are the process's, and so is what they cost.
#[test]
fn pools_are_reserved_for_once_however_many_workers_share_them() {
    for workers in ["2", "32"] {
        let ended = usual()
            .set("AEGIS_BACKENDS", "127.0.0.2:9")
            .set("AEGIS_WORKERS", workers)
            .set("AEGIS_POOL_MAX_IDLE", "64")
            .descriptors_max(8192)
            .argument("check")
            .run();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        // For the endpoint, and another one in its place.
        let pools = "pool connections: 128 at most, 128 of a worker";
        assert!(ended.output.contains(pools), "{workers} workers: {}", ended.output);
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

/// What somebody has to change, whatever the next start finds.
#[test]
fn every_configuration_that_cannot_work_exits_78() {
    let uring = || Builder::on(Io::Uring).set("AEGIS_BACKENDS", "127.0.0.2:9");
    for (builder, parts) in [
        (usual().set("AEGIS_LISTEN", "203.0.113.1:8081"), &["AEGIS_LISTEN", "203.0.113.1"][..]),
        (usual().set("AEGIS_ADMIN", "203.0.113.1:8082"), &["AEGIS_ADMIN", "203.0.113.1"]),
        (
            usual().set("AEGIS_LISTEN", "127.0.0.1:0,[2001:db8::1]:0"),
            &["AEGIS_LISTEN", "[2001:db8::1]:0"],
        ),
        (usual().set("AEGIS_MAX_SESSIONS", "1000000").descriptors_max(2000), &["RLIMIT_NOFILE"]),
        (usual().set("AEGIS_WORKERS", "256").descriptors_max(2000), &["RLIMIT_NOFILE"]),
        (uring().deny(libc::SYS_io_uring_setup, libc::EPERM), &["AEGIS_IO=uring"]),
        (usual().set("AEGIS_LOG", "wran"), &["AEGIS_LOG", "\"wran\" is not a level"]),
        (usual().set("AEGIS_LOG", "info,aegis::oi=debug"), &["no module \"aegis::oi\""]),
        (usual().set("AEGIS_BACKENDS", "db:+80"), &["\"+80\" is not a port"]),
        (usual().set("AEGIS_BACKENDS", "db:080"), &["\"080\" is not a port"]),
        (usual().set("AEGIS_BACKENDS", "db:80,DB:80"), &["is there twice"]),
        (
            usual().set("AEGIS_BACKENDS", "0.0.0.0:81").set("AEGIS_LISTEN", "127.0.0.1:81"),
            &["itself"],
        ),
        (usual().set("AEGIS_DISCOVERY", "kubernetes"), &["has to be named"]),
        (usual().set("AEGIS_IDLE_TIMEOUT", ""), &["empty; unset it"]),
    ] {
        expect_refused_naming(&builder.run(), parts);
    }
}

#[test]
fn a_port_that_needs_privileges_exits_78_without_them() {
    let first: u16 = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        .map_or(1024, |text| text.trim().parse().unwrap());
    if first == 0 {
        return skip("every port is free for all on this host");
    }
    if !rustix::process::geteuid().is_root() {
        return skip("only root can start a process as another user");
    }
    for variable in ["AEGIS_LISTEN", "AEGIS_ADMIN"] {
        let output = Command::new("setpriv")
            .args(["--reuid=65532", "--regid=65532", "--clear-groups", "--inh-caps=-all"])
            .args(["--bounding-set=-all", env!("CARGO_BIN_EXE_aegis-proxy")])
            .envs([("AEGIS_LISTEN", "127.0.0.1:0"), ("AEGIS_ADMIN", "127.0.0.1:0")])
            .env(variable, "127.0.0.1:1")
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let code = output.status.code();
        let ended = Ended { code, output: text(output.stdout), errors: text(output.stderr) };
        expect_refused_naming(&ended, &[variable, "127.0.0.1:1", "denied"]);
    }
}

#[test]
fn addresses_that_overlap_are_reported_as_such() {
    let (taken, free) = (TcpListener::bind("127.0.0.1:0").unwrap(), "[::]:0");
    let port = taken.local_addr().unwrap().port();
    drop(taken);
    for (listen, admin) in [
        (format!("0.0.0.0:{port},127.0.0.1:{port}"), free.to_owned()),
        (format!("127.0.0.1:{port},[::1]:{port},0.0.0.0:{port}"), free.to_owned()),
        (format!("[::]:{port},[::1]:{port}"), free.to_owned()),
    ] {
        let ended = usual().set("AEGIS_LISTEN", listen).set("AEGIS_ADMIN", admin).run();
        expect_refused_naming(&ended, &["AEGIS_LISTEN", "takes in"]);
    }
    for admin in [format!("[::]:{port}"), format!("0.0.0.0:{port}"), format!("127.0.0.1:{port}")] {
        let listen = format!("127.0.0.1:{port}");
        let ended = usual().set("AEGIS_LISTEN", listen).set("AEGIS_ADMIN", admin).run();
        expect_refused_naming(&ended, &["AEGIS_LISTEN", "AEGIS_ADMIN", "the same address"]);
    }
    // The data port's `::` is of IPv6 alone.
    for listen in [format!("[::]:{port},127.0.0.1:{port}"), format!("0.0.0.0:{port},[::]:{port}")] {
        let proxy = usual().set("AEGIS_LISTEN", listen).launch();
        assert_eq!(proxy.log_events("listening").len(), 2);
    }
}

/// What a pod finds in its environment beside a Service of this name.
fn beside_service(builder: Builder, name: &str) -> Builder {
    let url = "tcp://10.0.0.1:80";
    [
        ("SERVICE_HOST", "10.0.0.1"),
        ("SERVICE_PORT", "80"),
        ("SERVICE_PORT_PG", "80"),
        ("PORT", url),
        ("PORT_80_TCP", url),
        ("PORT_80_TCP_PROTO", "tcp"),
        ("PORT_80_TCP_PORT", "80"),
        ("PORT_80_TCP_ADDR", "10.0.0.1"),
    ]
    .iter()
    .fold(builder, |builder, (part, value)| builder.set(&format!("{name}_{part}"), *value))
}

#[test]
fn a_service_of_any_name_stops_no_start() {
    let builder = ["AEGIS", "AEGIS_KUBE", "AEGIS_ADMIN", "AEGIS_POOL", "AEGIS_KUBE_SERVICE"]
        .iter()
        .fold(usual(), |builder, name| beside_service(builder, name));
    let ended = builder.clone().argument("check").run();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.output.contains("AEGIS_KUBE_PORT=auto\n"), "{}", ended.output);
    builder.launch();
    let ended = beside_service(usual(), "AEGIS_KUBE")
        .set("AEGIS_KUBE_SERVICE", "db")
        .set("AEGIS_DISCOVERY", "kubernetes")
        .set("AEGIS_KUBE_PORT", "5432")
        .argument("check")
        .run();
    assert!(ended.output.contains("AEGIS_KUBE_PORT=5432\n"), "{ended:?}");
}

#[test]
fn a_mistake_that_looks_like_a_variable_of_a_service_is_reported() {
    for builder in [usual(), beside_service(usual(), "AEGIS_KUBE")] {
        let ended = builder.set("AEGIS_KUBE_SERVICE_PORT", "5432").run();
        expect_refused_naming(&ended, &["AEGIS_KUBE_SERVICE_PORT", "Is AEGIS_KUBE_PORT meant?"]);
    }
}

#[test]
fn a_value_without_effect_is_reported_by_check_and_in_the_log() {
    let builder = usual().set("AEGIS_POOL_SIZE", "7").set("AEGIS_KUBE_PORT", "5432");
    let warnings = [
        r#"AEGIS_KUBE_PORT="5432" has no effect: the endpoints do not come from Kubernetes"#,
        "AEGIS_POOL_SIZE=\"7\" has no effect: it is for AEGIS_POOL_MODE=request; elsewhere \
         AEGIS_POOL_MAX_IDLE says how many",
    ];
    let ended = builder.clone().argument("check").run();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let proxy = builder.launch();
    for warning in warnings {
        assert!(ended.output.contains(&format!("warning: {warning}\n")), "{}", ended.output);
        assert_eq!(proxy.log_events(warning).len(), 1, "{warning}");
    }
}

#[test]
fn help_lists_every_variable_and_so_does_the_page_of_configuration() {
    let ended = Builder::bare().argument("--help").run();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let in_help = variables_in(&ended.output);
    for variable in VARIABLES {
        assert!(in_help.contains(*variable), "no {variable} in {}", ended.output);
    }
    match fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/CONFIGURATION.md")) {
        Ok(page) => {
            let in_page = variables_in(&page);
            let missing: Vec<_> = in_help.difference(&in_page).collect();
            // A route's own, as an example.
            let is_own = |name: &&String| name.contains("__");
            let unknown: Vec<_> = in_page.difference(&in_help).filter(|n| !is_own(n)).collect();
            assert!(missing.is_empty(), "only in --help: {missing:?}");
            assert!(unknown.is_empty(), "only in CONFIGURATION.md: {unknown:?}");
        }
        Err(error) => skip(&format!("CONFIGURATION.md is not compared with --help: {error}")),
    }
}

/// The names of variables that a text mentions, except those that concern the tests.
fn variables_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
    let names = words.filter(|word| word.starts_with("AEGIS_") && !word.ends_with('_'));
    names.filter(|word| !word.starts_with("AEGIS_E2E_")).map(str::to_owned).collect()
}
