//! Texts that are no values, and names that are no variables.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::{problems, read};
use crate::config::{Config, KubePort, Problem, Switch, VARIABLES};

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
  AEGIS_POOL_MIN_IDLE="9" and AEGIS_POOL_MAX_IDLE="8": the minimum is above what may be kept.
  AEGIS_IDLE_TIMEOUT="": empty; unset it to have the default. Accepted: off, or a duration from 10ms to 30d.
  AEGIS_WORKERS="many": not a whole number, or far too large. Accepted: auto (or 0), or a number from 1 to 256.
  AEGIS_PIN="yes\n\u{1b}[2J": not one of the choices. Accepted: auto, on or off.
  AEGIS_LOG="info=loud": error parsing level filter: expected one of "off", "error", "warn", "info", "debug", "trace", or a number 0-5. Accepted: off, error, warn, info, debug, trace, or directives such as info,aegis::io=debug.
  AEGIS_BACKEND: no such variable. Is AEGIS_BACKENDS meant?"#
    );
}

#[test]
fn of_a_long_value_the_begin_is_shown() {
    let many = format!("db:5432,{}nobody", "db-0.example:5432,".repeat(1000));
    let found = problems(&[("AEGIS_BACKENDS", &many), ("AEGIS_WORKERS", &"ä".repeat(1000))]);
    assert_eq!(found.len(), 2);
    assert!(found[0].starts_with("AEGIS_BACKENDS=\"db:5432,db-0.example:5432,"), "{}", found[0]);
    for problem in found {
        assert!(problem.contains("…\": ") && problem.len() < 700, "{problem}");
    }
}

#[test]
fn problems_come_in_the_order_of_the_table() {
    let vars: Vec<_> = VARIABLES.iter().rev().map(|variable| (variable.name, "?")).collect();
    let found = problems(&vars);
    // Where this runs may have any name.
    let places = ["AEGIS_NODE_NAME", "AEGIS_ZONE", "AEGIS_REGION"];
    let others = VARIABLES.iter().filter(|v| !places.contains(&v.name));
    assert_eq!(found.len(), others.clone().count());
    for (problem, variable) in found.iter().zip(others) {
        assert!(problem.starts_with(&format!("{}=\"?\": ", variable.name)), "{problem}");
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
        ("AEGIS_A__XYZZY", None),
        ("AEGIS_KUBE_SERVICE_PORT", Some("AEGIS_KUBE_PORT")),
        ("AEGIS_KUBE_SERVICE_NAMESPACE", Some("AEGIS_KUBE_NAMESPACE")),
        ("AEGIS_POOL_SIZE_MAX", Some("AEGIS_POOL_SIZE")),
    ] {
        let errors = read(&[(name, "1")]).unwrap_err();
        let similar = near.map(str::to_owned);
        let expected = Problem::Unknown { name: name.to_owned(), similar };
        assert_eq!(errors.problems(), [expected]);
    }
}

/// What the kubelet sets for a Service of this name with these ports; the first one has a name.
fn service_links(service: &str, host: &str, ports: &[(u16, &str)]) -> Vec<(String, String)> {
    let name = service.to_ascii_uppercase().replace('-', "_");
    let in_url = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let (first, protocol) = ports[0];
    let url = |protocol: &str, port| format!("{}://{in_url}:{port}", protocol.to_lowercase());
    let mut links = vec![
        (format!("{name}_SERVICE_HOST"), host.to_owned()),
        (format!("{name}_SERVICE_PORT"), first.to_string()),
        (format!("{name}_SERVICE_PORT_HTTP_ADMIN"), first.to_string()),
        (format!("{name}_PORT"), url(protocol, first)),
    ];
    for &(port, protocol) in ports {
        let link = format!("{name}_PORT_{port}_{protocol}");
        links.push((link.clone(), url(protocol, port)));
        links.push((format!("{link}_PROTO"), protocol.to_lowercase()));
        links.push((format!("{link}_PORT"), port.to_string()));
        links.push((format!("{link}_ADDR"), host.to_owned()));
    }
    links
}

fn problems_beside(
    links: &[(String, String)],
    vars: &[(&str, &str)],
) -> (Option<Config>, Vec<String>) {
    // Those of the container go over those of Services.
    let set = vars.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
    let links = links.iter().filter(|(name, _)| vars.iter().all(|(set, _)| set != name)).cloned();
    match Config::from_vars(links.chain(set)) {
        Ok(config) => (Some(config), Vec::new()),
        Err(errors) => (None, errors.problems().iter().map(Problem::to_string).collect()),
    }
}

#[test]
fn a_service_of_any_name_stops_no_start() {
    let mut services: Vec<_> =
        ["aegis", "aegis-x", "aegis-port", "aegis-kube-service-host"].map(str::to_owned).into();
    // And those that give names which are ours, or begin with one.
    for variable in VARIABLES.iter() {
        let words: Vec<_> = variable.name.split('_').map(str::to_ascii_lowercase).collect();
        services.extend((1..=words.len()).map(|count| words[..count].join("-")));
    }
    for service in services {
        for host in ["10.0.0.1", "fd00::1"] {
            for ports in [&[(80, "TCP")][..], &[(53, "UDP"), (53, "TCP"), (9, "SCTP")]] {
                let links = service_links(&service, host, ports);
                let (config, problems) = problems_beside(&links, &[]);
                assert_eq!(config, read(&[]).ok(), "{service}: {problems:?}");
            }
        }
    }
}

#[test]
fn variables_that_only_look_like_those_of_a_service_are_mistakes() {
    for (name, value) in [
        ("AEGIS_KUBE_SERVICE_PORT", "5432"),
        ("AEGIS_KUBE_SERVICE_HOST", "10.0.0.1"),
        ("AEGIS_SERVICE_PORT_HTTP", "80"),
        ("AEGIS_KUBE_PORT", "tcp://10.0.0.1:80"),
        ("AEGIS_PORT", "8081"),
        ("AEGIS_PORT", "tcp://10.0.0.1:8081"),
        ("AEGIS_PORT_8081", "tcp://10.0.0.1:8081"),
        ("AEGIS_PORT_8081_TCP", "tcp://10.0.0.1:8081"),
        ("AEGIS_HOST", "10.0.0.1"),
    ] {
        let problems = problems(&[(name, value)]);
        assert!(problems.len() == 1 && problems[0].starts_with(name), "{problems:?}");
    }
    // Also beside a Service of that name, whose variables they replace.
    let links = service_links("aegis-kube", "10.0.0.1", &[(80, "TCP")]);
    for (name, value) in [
        ("AEGIS_KUBE_SERVICE_PORT", "5432"),
        ("AEGIS_KUBE_SERVICE_PORT_PG", "5432"),
        ("AEGIS_KUBE_PORT", "tcp://10.0.0.2:80"),
        ("AEGIS_KUBE_PORT_81_TCP", "tcp://10.0.0.1:80"),
        ("AEGIS_KUBE_PORT_80_TCP_NAME", "x"),
    ] {
        let (_, problems) = problems_beside(&links, &[(name, value)]);
        assert!(problems.len() == 1 && problems[0].starts_with(name), "{problems:?}");
    }
    let (config, problems) = problems_beside(&links, &[("AEGIS_KUBE_PORT", "5432")]);
    let port = config.and_then(|config| config.routes[0].kube.port.clone());
    assert_eq!(port, Some(KubePort::Number(5432)), "{problems:?}");
}

#[test]
fn a_log_filter_names_levels_and_what_logs() {
    for filter in [
        "off",
        "WARN",
        "3",
        "info,aegis::io=debug",
        "aegis",
        "aegis::control::discovery=trace,aegis_proxy=off",
        "warn, kube_client=debug,rustls",
        "info,[request{id=1}]=debug",
        "info,somebody::elses=debug",
        "warn,aegis::ends=info",
    ] {
        assert_eq!(problems(&[("AEGIS_LOG", filter)]), [""; 0]);
    }
    for (filter, why) in [
        ("wran", "\"wran\" is not a level"),
        ("inof,aegis::io=debug", "\"inof\" is not a level"),
        ("info,debgu", "\"debgu\" is not a level"),
        ("info, aegis::oi=debug", "there is no module \"aegis::oi\""),
        ("aegis::oi", "there is no module \"aegis::oi\""),
        ("info,aegis::io=debgu", "error parsing level filter"),
        (", ,", "there is no level"),
    ] {
        let [problem] = &problems(&[("AEGIS_LOG", filter)])[..] else { panic!("{filter}") };
        assert!(problem.contains(why), "{problem}");
    }
}

#[test]
fn ports_are_plain_numbers() {
    for text in
        ["db:+80", "db:080", "db: 80", "db:80 0", "db:", "db", "[::1]80", "[::1]", "[::1]:+80"]
    {
        let [problem] = &problems(&[("AEGIS_BACKENDS", text)])[..] else { panic!("{text}") };
        assert!(problem.contains("port"), "{problem}");
    }
    for text in ["127.0.0.1:+80", "127.0.0.1:080", "127.0.0.1:00", "[::1]:080", "[::1]80"] {
        for name in ["AEGIS_LISTEN", "AEGIS_ADMIN"] {
            assert_eq!(problems(&[(name, text)]).len(), 1, "{name}={text}");
        }
    }
    for (name, value) in [("AEGIS_WORKERS", "+2"), ("AEGIS_CONNECT_ATTEMPTS", "+2")] {
        assert_eq!(problems(&[(name, value)]).len(), 1, "{name}={value}");
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
    let [Problem::Value { name, why, .. }, Problem::Unknown { .. }] = errors.problems() else {
        panic!("{errors}");
    };
    assert_eq!((&**name, &**why), ("AEGIS_LOG", "not Unicode text"));
}

#[test]
fn booleans_of_yaml_are_on_and_off() {
    let config =
        read(&[("AEGIS_PIN", "true"), ("AEGIS_KEEPALIVE", "false"), ("AEGIS_LOG", " warn\n")])
            .unwrap();
    assert_eq!((config.pin, config.routes[0].keepalive, &*config.log), (Switch::On, None, "warn"));
}
