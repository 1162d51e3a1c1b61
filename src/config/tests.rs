use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::*;
use crate::limits;

fn read(vars: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
    Config::from_vars(vars.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())))
}

fn problems(vars: &[(&str, &str)]) -> Vec<String> {
    read(vars).map_or_else(
        |errors| errors.problems().iter().map(Problem::to_string).collect(),
        |_| Vec::new(),
    )
}

#[test]
fn an_empty_environment_gives_the_defaults() {
    let config = read(&[]).unwrap();
    assert_eq!(config.listen, ["127.0.0.1:8081", "[::1]:8081"].map(|a| a.parse().unwrap()));
    assert_eq!(config.backends, [HostPort { host: "127.0.0.1".to_owned(), port: 8080 }]);
    assert_eq!(config.workers, None);
    assert_eq!(config.balance, Balance::LeastConn);
    assert_eq!((config.pool.min_idle, config.pool.max_idle), (4, 64));
    assert_eq!(config.pool.max_lifetime, Some(Duration::from_secs(900)));
    assert_eq!(config.idle_timeout, None);
    assert_eq!(config.drain_delay, Duration::from_secs(1));
}

#[test]
fn defaults_written_out_are_the_defaults() {
    let written: Vec<_> = VARIABLES.iter().map(|v| (v.name, v.default)).collect();
    assert_eq!(read(&written), read(&[]));
}

#[test]
fn what_is_in_force_names_every_variable_in_order() {
    let names: Vec<_> = read(&[]).unwrap().effective().into_iter().map(|(name, _)| name).collect();
    let table: Vec<_> = VARIABLES.iter().map(|v| v.name).collect();
    assert_eq!(names, table);
    assert!(table.iter().all(|name| name.starts_with(PREFIX)));
    assert_eq!(table.iter().collect::<BTreeSet<_>>().len(), table.len());
}

fn random_text(name: &str, rng: &mut fastrand::Rng) -> String {
    let duration = |rng: &mut fastrand::Rng, low_ms: u64, high_ms: u64| {
        let ms = rng.u64(low_ms..=high_ms);
        let spellings = [format!("{ms}ms"), format!("{}s {}ms", ms / 1000, ms % 1000)];
        rng.choice(spellings).unwrap_or_default()
    };
    let word = |rng: &mut fastrand::Rng, words: &[&str]| rng.choice(words).unwrap().to_string();
    let off_or = |rng: &mut fastrand::Rng, low, high| {
        if rng.bool() { "off".to_owned() } else { duration(rng, low, high) }
    };
    let list = |rng: &mut fastrand::Rng, max, host: &str| -> String {
        let ports: BTreeSet<u16> = (0..rng.usize(1..=max)).map(|_| rng.u16(9000..)).collect();
        ports.iter().map(|p| format!("{host}:{p}")).collect::<Vec<_>>().join(" , ")
    };
    match name {
        "AEGIS_LISTEN" => list(rng, limits::LISTEN_ADDRESSES_MAX, "[2001:db8:0::1]"),
        "AEGIS_ADMIN" => format!("0.0.0.0:{}", rng.u16(..9000)),
        "AEGIS_BACKENDS" => {
            let host = word(rng, &["a.b", "C-D", "[::2]", "10.0.0.1"]);
            list(rng, 100, &host)
        }
        "AEGIS_DNS_REFRESH" => duration(rng, 100, 3_600_000),
        "AEGIS_BALANCE" => word(rng, &["least_conn", "round_robin", "random_two", "source_hash"]),
        "AEGIS_WORKERS" => word(rng, &["auto", "1", "256"]),
        "AEGIS_PIN" => word(rng, &["auto", "on", "off", "true", "false"]),
        "AEGIS_IO" => word(rng, &["auto", "uring", "epoll"]),
        "AEGIS_MAX_SESSIONS" => word(rng, &["auto", "1", "1000000"]),
        "AEGIS_POOL_MIN_IDLE" => rng.usize(0..=64).to_string(),
        "AEGIS_POOL_SIZE" => rng.usize(1..=limits::POOL_IDLE_MAX).to_string(),
        "AEGIS_QUEUE_MAX" => rng.usize(0..=limits::SESSIONS_MAX).to_string(),
        "AEGIS_REQUEST_TIMEOUT" => off_or(rng, 10, 86_400_000),
        "AEGIS_LINE_MAX" => rng.usize(16..=limits::BUFFER_SIZE).to_string(),
        "AEGIS_REPEAT_WRITES" => word(rng, &["on", "off", "true", "false"]),
        "AEGIS_POOL_MAX_IDLE" => rng.usize(64..=limits::POOL_IDLE_MAX).to_string(),
        "AEGIS_CONNECT_TIMEOUT" => duration(rng, 1, 300_000),
        "AEGIS_CONNECT_ATTEMPTS" => rng.u32(1..=8).to_string(),
        "AEGIS_KEEPALIVE" => off_or(rng, 1000, 32_400_000),
        "AEGIS_TCP_USER_TIMEOUT" => off_or(rng, 1000, 86_400_000),
        "AEGIS_DRAIN_DELAY" | "AEGIS_ENDPOINT_WAIT" => duration(rng, 0, 300_000),
        "AEGIS_DRAIN_TIMEOUT" => duration(rng, 0, 3_600_000),
        "AEGIS_EJECT_FAILURES" => rng.u32(1..=1000).to_string(),
        "AEGIS_EJECT_TIME" | "AEGIS_QUEUE_TIMEOUT" => duration(rng, 10, 3_600_000),
        "AEGIS_LOG" => word(rng, &["off", "warn,aegis::io=debug", "info"]),
        "AEGIS_LOG_FORMAT" => word(rng, &["text", "json"]),
        "AEGIS_DISCOVERY" => word(rng, &["auto", "dns"]),
        "AEGIS_KUBE_SERVICE" | "AEGIS_KUBE_SELECTOR" => "none".to_owned(),
        "AEGIS_KUBE_NAMESPACE" => word(rng, &["auto", "db-1"]),
        "AEGIS_KUBE_PORT" => word(rng, &["auto", "chronos", "8080"]),
        "AEGIS_KUBE_STORES" => word(rng, &["auto", "1", "1024"]),
        "AEGIS_KUBE_WATCH_TIMEOUT" => word(rng, &["1s", "5m", "1m 1s"]),
        "AEGIS_LOCALITY" => word(rng, &["off", "zone", "node"]),
        "AEGIS_NODE_NAME" | "AEGIS_ZONE" => word(rng, &["none", "", "eu-1a"]),
        "AEGIS_BACKEND_DRAIN" => off_or(rng, 0, 86_400_000),
        "AEGIS_SLOW_START" => off_or(rng, 100, 600_000),
        _ => off_or(rng, 10, 2_592_000_000),
    }
}

/// Values that go together.
const TOGETHER: [&[(&str, &str)]; 4] = [
    &[("AEGIS_PROXY_PROTOCOL", "v1")],
    &[("AEGIS_PROXY_PROTOCOL", "v2"), ("AEGIS_PROTOCOL", "http1")],
    &[("AEGIS_PROTOCOL", "http1"), ("AEGIS_POOL_MODE", "session")],
    &[("AEGIS_PROTOCOL", "chronos"), ("AEGIS_POOL_MODE", "request"), ("AEGIS_ROUTE", "key")],
];

#[test]
fn what_is_in_force_reads_back_as_the_same() {
    let mut rng = fastrand::Rng::with_seed(7);
    for round in 0..300 {
        let mut vars = Vec::new();
        for variable in VARIABLES {
            let apart = TOGETHER.concat().iter().all(|(name, _)| *name != variable.name);
            if round > 0 && apart && rng.u8(..) < 192 {
                vars.push((variable.name.to_owned(), random_text(variable.name, &mut rng)));
            }
        }
        let together = rng.choice(TOGETHER).unwrap();
        vars.extend(together.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())));
        let config = Config::from_vars(vars.clone()).unwrap_or_else(|e| panic!("{vars:?}: {e}"));
        let again = config.effective().into_iter().map(|(n, text)| (n.to_owned(), text));
        assert_eq!(Config::from_vars(again), Ok(config), "{vars:?}");
    }
}

#[test]
fn ranges_are_those_that_the_table_tells() {
    // Just inside and just outside; what is inside has to stand in the table's text.
    for (name, low, below, high, above) in [
        ("AEGIS_DNS_REFRESH", "100ms", "99ms", "1h", "1h 1ms"),
        ("AEGIS_KUBE_WATCH_TIMEOUT", "1s", "999ms", "5m", "5m 1s"),
        ("AEGIS_BACKEND_DRAIN", "0s", "-1s", "1d", "2d"),
        ("AEGIS_SLOW_START", "100ms", "99ms", "10m", "11m"),
        ("AEGIS_ENDPOINT_WAIT", "0s", "-1s", "5m", "6m"),
        ("AEGIS_WORKERS", "1", "0", "256", "257"),
        ("AEGIS_MAX_SESSIONS", "1", "0", "1000000", "1000001"),
        ("AEGIS_POOL_MIN_IDLE", "0", "-1", "4096", "4097"),
        ("AEGIS_POOL_MAX_IDLE", "0", "-1", "4096", "4097"),
        ("AEGIS_POOL_SIZE", "1", "0", "4096", "4097"),
        ("AEGIS_QUEUE_MAX", "0", "-1", "1000000", "1000001"),
        ("AEGIS_QUEUE_TIMEOUT", "10ms", "9ms", "1h", "61m"),
        ("AEGIS_REQUEST_TIMEOUT", "10ms", "9ms", "1d", "2d"),
        ("AEGIS_LINE_MAX", "16", "15", "16384", "16385"),
        ("AEGIS_POOL_IDLE_TIMEOUT", "10ms", "9ms", "30d", "30d 1s"),
        ("AEGIS_POOL_MAX_LIFETIME", "10ms", "9ms", "30d", "30d 1s"),
        ("AEGIS_CONNECT_TIMEOUT", "1ms", "0s", "5m", "5m 1s"),
        ("AEGIS_CONNECT_ATTEMPTS", "1", "0", "8", "9"),
        ("AEGIS_IDLE_TIMEOUT", "10ms", "0s", "30d", "31d"),
        ("AEGIS_HALF_CLOSE_TIMEOUT", "10ms", "0s", "30d", "31d"),
        ("AEGIS_TCP_USER_TIMEOUT", "1s", "999ms", "1d", "2d"),
        ("AEGIS_KEEPALIVE", "1s", "999ms", "9h", "10h"),
        ("AEGIS_DRAIN_DELAY", "0s", "-1s", "5m", "6m"),
        ("AEGIS_DRAIN_TIMEOUT", "0s", "-1s", "1h", "2h"),
        ("AEGIS_EJECT_FAILURES", "1", "0", "1000", "1001"),
        ("AEGIS_EJECT_TIME", "10ms", "9ms", "1h", "61m"),
    ] {
        let accepts = VARIABLES.iter().find(|v| v.name == name).unwrap().accepts;
        for inside in [low, high] {
            let max_idle = ("AEGIS_POOL_MAX_IDLE", "4096");
            let vars = [max_idle, (name, inside)];
            let vars = if name == max_idle.0 { &vars[1..] } else { &vars[..] };
            assert_eq!(problems(vars), [""; 0]);
            assert!(accepts.contains(inside), "{name} accepts {inside}");
        }
        for outside in [below, above] {
            let [problem] = &problems(&[(name, outside)])[..] else { panic!("{name}={outside}") };
            assert!(problem.starts_with(&format!("{name}=\"{outside}\": ")), "{problem}");
            assert!(problem.ends_with(&format!("Accepted: {accepts}.")), "{problem}");
        }
    }
}

#[test]
fn lists_are_as_long_as_the_table_tells() {
    for (name, host, max) in [
        ("AEGIS_LISTEN", "127.0.0.1", limits::LISTEN_ADDRESSES_MAX),
        ("AEGIS_BACKENDS", "db", limits::ENDPOINTS_MAX),
    ] {
        let list =
            |n| (9000..9000 + n).map(|p| format!("{host}:{p}")).collect::<Vec<_>>().join(",");
        assert_eq!(problems(&[(name, &list(max))]), [""; 0]);
        assert_eq!(problems(&[(name, &list(max + 1))]).len(), 1);
        let accepts = VARIABLES.iter().find(|v| v.name == name).unwrap().accepts;
        assert!(accepts.contains(&format!("1 to {max} of")), "{accepts}");
    }
}

#[test]
fn all_problems_are_told_at_once() {
    let errors = read(&[
        ("AEGIS_LOG", "info=loud"),
        ("AEGIS_BACKEND", "db:1"),
        ("AEGIS_WORKERS", "many"),
        ("AEGIS_IDLE_TIMEOUT", ""),
        ("AEGIS_POOL_MIN_IDLE", "9"),
        ("AEGIS_POOL_MAX_IDLE", "8"),
        ("AEGIS_PIN", "yes\n\u{1b}[2J"),
        ("HOME", "/"),
    ])
    .unwrap_err();
    assert_eq!(
        errors.to_string(),
        r#"the configuration has 6 problems:
  AEGIS_WORKERS="many": not a whole number, or far too large. Accepted: auto, or a number from 1 to 256.
  AEGIS_PIN="yes\n\u{1b}[2J": not one of the choices. Accepted: auto, on or off.
  AEGIS_POOL_MIN_IDLE="9" and AEGIS_POOL_MAX_IDLE="8": the minimum is above the maximum.
  AEGIS_IDLE_TIMEOUT="": empty; unset it to have the default. Accepted: off, or a duration from 10ms to 30d.
  AEGIS_LOG="info=loud": error parsing level filter: expected one of "off", "error", "warn", "info", "debug", "trace", or a number 0-5. Accepted: off, error, warn, info, debug, trace, or directives such as info,aegis::io=debug.
  AEGIS_BACKEND: no such variable. Is AEGIS_BACKENDS meant?"#
    );
}

#[test]
fn used_connections_are_lent_only_where_that_is_safe() {
    for (vars, why) in [
        (&[("AEGIS_POOL_MODE", "request")][..], "AEGIS_PROTOCOL=\"tcp\": of unknown bytes"),
        (&[("AEGIS_POOL_MODE", "session")], "AEGIS_PROTOCOL=\"tcp\": of unknown bytes"),
        (
            &[
                ("AEGIS_PROTOCOL", "chronos"),
                ("AEGIS_POOL_MODE", "session"),
                ("AEGIS_PROXY_PROTOCOL", "v2"),
            ],
            "the header names one client",
        ),
        (
            &[
                ("AEGIS_PROTOCOL", "chronos"),
                ("AEGIS_POOL_MODE", "session"),
                ("AEGIS_ROUTE", "key"),
            ],
            "keys of one client may belong to several endpoints",
        ),
        (
            &[("AEGIS_PROTOCOL", "http1"), ("AEGIS_POOL_MODE", "request"), ("AEGIS_ROUTE", "key")],
            "only the requests of chronos have keys",
        ),
    ] {
        let [problem] = &problems(vars)[..] else { panic!("{vars:?}: {:?}", problems(vars)) };
        assert!(problem.contains(why), "{problem}");
    }
}

#[test]
fn unknown_names_come_with_a_near_one_if_there_is_one() {
    for (name, near) in [
        ("AEGIS_BACKEND", Some("AEGIS_BACKENDS")),
        ("AEGIS_LISTEN_ADDRESS", Some("AEGIS_LISTEN")),
        ("AEGIS_listen", Some("AEGIS_LISTEN")),
        ("AEGIS_AEGIS_LISTEN", Some("AEGIS_LISTEN")),
        ("AEGIS_CONNECTION_TIMEOUT", Some("AEGIS_CONNECT_TIMEOUT")),
        ("AEGIS_POOL_MAXIDLE", Some("AEGIS_POOL_MAX_IDLE")),
        ("AEGIS_", None),
        ("AEGIS_XYZZY", None),
    ] {
        let errors = read(&[(name, "1")]).unwrap_err();
        let expected = Problem::Unknown { name: name.to_owned(), similar: near };
        assert_eq!(errors.problems(), [expected]);
    }
}

#[test]
fn variables_of_kubernetes_services_are_ignored() {
    for service in ["AEGIS", "AEGIS_X", "AEGIS_PORT", "AEGIS_LISTEN"] {
        for (suffix, value) in [
            ("SERVICE_HOST", "10.0.0.1"),
            ("SERVICE_PORT", "8081"),
            ("SERVICE_PORT_HTTP_ADMIN", "8081"),
            ("PORT", "tcp://10.0.0.1:8081"),
            ("PORT_8081_TCP", "tcp://10.0.0.1:8081"),
            ("PORT_8081_TCP_PROTO", "tcp"),
            ("PORT_8081_TCP_PORT", "8081"),
            ("PORT_8081_TCP_ADDR", "10.0.0.1"),
            ("PORT_53_UDP_ADDR", "10.0.0.1"),
        ] {
            let name = format!("{service}_{suffix}");
            assert_eq!(problems(&[(&name, value)]), [""; 0], "{name}");
        }
    }
    for (name, value) in [
        ("AEGIS_PORT", "8081"),
        ("AEGIS_PORT_8081", "tcp://10.0.0.1:8081"),
        ("AEGIS_PORT_99999_TCP", "x"),
        ("AEGIS_PORT_8081_TCP_NAME", "x"),
        ("AEGIS_HOST", "10.0.0.1"),
    ] {
        assert_eq!(problems(&[(name, value)]).len(), 1, "{name}");
    }
}

#[test]
fn what_is_not_unicode_is_a_problem_and_no_panic() {
    let os = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    let vars = [
        (os(b"AEGIS_LOG"), os(b"in\xfffo")),
        (os(b"AEGIS_\xff"), os(b"1")),
        (os(b"OTHER\xff"), os(b"\xff")),
    ];
    let errors = Config::from_os_vars(vars.into_iter()).unwrap_err();
    let [Problem::Value { name: "AEGIS_LOG", why, .. }, Problem::Unknown { .. }] =
        errors.problems()
    else {
        panic!("{errors}");
    };
    assert_eq!(why, "not Unicode text");
}

#[test]
fn the_default_minimum_gives_way_to_a_small_maximum() {
    let pool = read(&[("AEGIS_POOL_MAX_IDLE", "0")]).unwrap().pool;
    assert_eq!((pool.min_idle, pool.max_idle), (0, 0));
    // A refused maximum is not reported a second time as being below the minimum.
    let vars = [("AEGIS_POOL_MIN_IDLE", "100"), ("AEGIS_POOL_MAX_IDLE", "x")];
    assert_eq!(problems(&vars).len(), 1);
}

#[test]
fn addresses_that_get_in_each_others_way_are_refused() {
    for (listen, admin, backends, fine) in [
        ("127.0.0.1:8081", "[::]:8082", "127.0.0.1:8080", true),
        ("127.0.0.1:8082", "[::]:8082", "127.0.0.1:8080", false),
        ("127.0.0.1:8082", "127.0.0.2:8082", "127.0.0.1:8080", true),
        ("[::1]:8082", "0.0.0.0:8082", "127.0.0.1:8080", true),
        ("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:8080", true),
        ("127.0.0.1:1,127.0.0.1:2", "[::]:3", "db:5,127.0.0.1:2", false),
        ("0.0.0.0:1", "[::]:3", "127.0.0.1:1", false),
        ("0.0.0.0:1", "[::]:3", "10.0.0.9:1", true),
    ] {
        let vars = [("AEGIS_LISTEN", listen), ("AEGIS_ADMIN", admin), ("AEGIS_BACKENDS", backends)];
        assert_eq!(problems(&vars).is_empty(), fine, "{vars:?}");
    }
}

#[test]
fn booleans_of_yaml_are_on_and_off() {
    let config =
        read(&[("AEGIS_PIN", "true"), ("AEGIS_KEEPALIVE", "false"), ("AEGIS_LOG", " warn\n")])
            .unwrap();
    assert_eq!((config.pin, config.keepalive, &*config.log), (Switch::On, None, "warn"));
}

#[test]
fn where_endpoints_come_from_follows_from_what_is_set() {
    let kubernetes = Discovery::Kubernetes;
    for (vars, discovery) in [
        (&[][..], Discovery::Static),
        (&[("AEGIS_BACKENDS", "db:1")], Discovery::Dns),
        (&[("AEGIS_KUBE_SERVICE", "chronos")], kubernetes),
        (&[("AEGIS_KUBE_SELECTOR", "app=chronos,tier in (a, b)")], kubernetes),
        (
            &[
                ("AEGIS_DISCOVERY", "kubernetes"),
                ("AEGIS_BACKENDS", "db:1"),
                ("AEGIS_KUBE_SERVICE", "a.b"),
            ],
            kubernetes,
        ),
        (&[("AEGIS_DISCOVERY", "static"), ("AEGIS_KUBE_SERVICE", "a")], Discovery::Static),
    ] {
        let config = read(vars).unwrap_or_else(|problems| panic!("{vars:?}: {problems}"));
        assert_eq!(config.discovery, discovery, "{vars:?}");
        let again = config.effective().into_iter().map(|(n, text)| (n.to_owned(), text));
        assert_eq!(Config::from_vars(again), Ok(config), "{vars:?}");
    }
    for (vars, part) in [
        (&[("AEGIS_DISCOVERY", "kubernetes")][..], "has to be named"),
        (&[("AEGIS_DISCOVERY", "static"), ("AEGIS_BACKENDS", "db:1")], "have to be resolved"),
        (&[("AEGIS_KUBE_SERVICE", "a"), ("AEGIS_KUBE_SELECTOR", "a=b")], "one of them"),
        (&[("AEGIS_KUBE_SERVICE", "a"), ("AEGIS_BACKENDS", "db:1")], "does not say which"),
        (&[("AEGIS_KUBE_SERVICE", "a.b"), ("AEGIS_KUBE_NAMESPACE", "c")], "different namespaces"),
        (&[("AEGIS_KUBE_SERVICE", "A")], "not a name in Kubernetes"),
        (&[("AEGIS_KUBE_SELECTOR", "a={}")], "not a label selector"),
        (&[("AEGIS_KUBE_PORT", "0")], "below 1"),
    ] {
        let [problem] = &problems(vars)[..] else { panic!("{vars:?}: {:?}", problems(vars)) };
        assert!(problem.contains(part), "{problem}");
    }
}

#[test]
fn a_name_is_counted_as_the_addresses_that_it_may_stand_for() {
    let addresses = |backends| read(&[("AEGIS_BACKENDS", backends)]).unwrap().addresses();
    assert_eq!(addresses("10.0.0.1:80,[::1]:80"), 2);
    assert_eq!(addresses("10.0.0.1:80,db:80"), 1 + crate::limits::ADDRESSES_PER_NAME);
}
