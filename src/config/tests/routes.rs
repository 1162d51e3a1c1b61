//! Several routes: names, whose a variable is, and what two of them may not share.

use super::{problems, read};
use crate::config::{Balance, Config, Discovery, Protocol, RouteConfig, VARIABLES};
use crate::limits;

/// Two routes that each have an address.
const TWO: [(&str, &str); 3] = [
    ("AEGIS_ROUTES", "orders,cache-eu"),
    ("AEGIS_ORDERS__LISTEN", "127.0.0.1:5432"),
    ("AEGIS_CACHE_EU__LISTEN", "127.0.0.1:6379"),
];

/// The same, with more set.
fn two_and(more: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
    TWO.iter().chain(more).copied().collect()
}

fn two(config: &Config) -> [&RouteConfig; 2] {
    let [orders, cache] = &config.routes[..] else { panic!("{config:?}") };
    [orders, cache]
}

#[test]
fn a_plain_variable_is_for_all_and_a_route_s_own_goes_over_it() {
    let config = read(&two_and(&[
        ("AEGIS_PROTOCOL", "http1"),
        ("AEGIS_BACKENDS", "10.0.0.1:80"),
        ("AEGIS_CACHE_EU__PROTOCOL", "chronos"),
        ("AEGIS_CACHE_EU__POOL_MODE", "request"),
        ("AEGIS_CACHE_EU__BALANCE", "key_hash"),
        ("AEGIS_ORDERS__KUBE_SERVICE", "orders"),
        ("AEGIS_ORDERS__DISCOVERY", "kubernetes"),
    ]))
    .unwrap();
    let [orders, cache] = two(&config);
    assert_eq!([orders.name.as_str(), cache.name.as_str()], ["orders", "cache-eu"]);
    assert_eq!(orders.listen, ["127.0.0.1:5432".parse().unwrap()]);
    assert_eq!(cache.listen, ["127.0.0.1:6379".parse().unwrap()]);
    assert_eq!([orders.protocol, cache.protocol], [Protocol::Http1, Protocol::Chronos]);
    assert_eq!([orders.balance, cache.balance], [Balance::LeastConn, Balance::KeyHash]);
    assert_eq!([orders.discovery, cache.discovery], [Discovery::Kubernetes, Discovery::Static]);
    assert_eq!(orders.backends, cache.backends);
}

#[test]
fn one_route_may_have_any_name_and_is_what_it_is_without() {
    let mut named =
        read(&[("AEGIS_ROUTES", "orders"), ("AEGIS_ORDERS__LISTEN", "127.0.0.1:1")]).unwrap();
    let mut plain = read(&[("AEGIS_LISTEN", "127.0.0.1:1")]).unwrap();
    assert_eq!(named.routes[0].name.to_string(), "orders");
    let listen = ("AEGIS_LISTEN".to_owned(), "127.0.0.1:1".to_owned());
    assert!(named.effective().contains(&listen), "one route needs no names of its own");
    for config in [&mut named, &mut plain] {
        std::sync::Arc::make_mut(&mut config.routes[0]).name = "any".parse().unwrap();
    }
    assert_eq!(named, plain);
}

#[test]
fn what_is_in_force_is_told_once_where_routes_agree() {
    let config = read(&two_and(&[
        ("AEGIS_IDLE_TIMEOUT", "1h"),
        ("AEGIS_CACHE_EU__BACKENDS", "cache:6379"),
        ("AEGIS_WORKERS", "2"),
    ]))
    .unwrap();
    let effective = config.effective();
    let text = |name: &str| effective.iter().find(|(n, _)| n == name).map(|(_, text)| &**text);
    for (name, value) in [
        ("AEGIS_ROUTES", Some("orders,cache-eu")),
        ("AEGIS_LISTEN", None),
        ("AEGIS_ORDERS__LISTEN", Some("127.0.0.1:5432")),
        ("AEGIS_CACHE_EU__LISTEN", Some("127.0.0.1:6379")),
        ("AEGIS_ORDERS__DISCOVERY", Some("static")),
        ("AEGIS_CACHE_EU__DISCOVERY", Some("dns")),
        ("AEGIS_IDLE_TIMEOUT", Some("1h")),
        ("AEGIS_ORDERS__IDLE_TIMEOUT", None),
        ("AEGIS_WORKERS", Some("2")),
    ] {
        assert_eq!(text(name), value, "{name}");
    }
    assert_eq!(effective.len(), VARIABLES.len() + 3, "three differ");
    assert_eq!(Config::from_vars(effective), Ok(config));
}

#[test]
fn names_are_short_labels() {
    let longest = "a".repeat(limits::ROUTE_NAME_BYTES_MAX);
    for name in ["a", "0", "orders-eu-1", "default", &longest] {
        let config = read(&[("AEGIS_ROUTES", name)]);
        assert_eq!(config.unwrap().routes[0].name.as_str(), name);
    }
    for name in ["A", "a_b", "a b", "a.b", "-a", "a-", "a--b", "é", &(longest.clone() + "a")] {
        let [problem] = &problems(&[("AEGIS_ROUTES", name)])[..] else { panic!("{name}") };
        assert!(problem.starts_with("AEGIS_ROUTES="), "{problem}");
        assert!(
            problem.contains("is not a route's name") || problem.contains("not a route's name")
        );
    }
    let accepts = VARIABLES.iter().find(|v| v.name == "AEGIS_ROUTES").unwrap().accepts();
    let max = limits::ROUTE_NAME_BYTES_MAX;
    assert!(accepts.contains(&format!("each up to {max} of a-z")), "{accepts}");
}

#[test]
fn as_many_routes_as_there_may_be() {
    let names = |count: usize| (0..count).map(|n| format!("r{n}")).collect::<Vec<_>>().join(",");
    let read = |count| {
        let (listen, names) = ("127.0.0.1:0,[::1]:0", names(count));
        read(&[("AEGIS_ROUTES", &*names), ("AEGIS_LISTEN", listen)])
    };
    let config = read(limits::ROUTES_MAX).unwrap();
    assert_eq!(config.routes.len(), limits::ROUTES_MAX);
    let listeners: usize = config.routes.iter().map(|route| route.listen.len()).sum();
    assert_eq!(listeners, limits::LISTEN_ADDRESSES_MAX);
    let error = read(limits::ROUTES_MAX + 1).unwrap_err().to_string();
    assert!(error.contains("17 items, 16 at most"), "{error}");
}

#[test]
fn all_routes_together_listen_at_so_many_addresses() {
    let ports: Vec<_> = (1..=30).map(|port| format!("127.0.0.1:{port}")).collect();
    let problems = problems(&[
        ("AEGIS_ROUTES", "a,b"),
        ("AEGIS_A__LISTEN", &ports.join(",")),
        ("AEGIS_B__LISTEN", "127.0.0.2:1,127.0.0.2:2,127.0.0.2:3"),
    ]);
    let [problem] = &problems[..] else { panic!("{problems:?}") };
    assert!(
        problem.starts_with(
            "AEGIS_ROUTES=\"a,b\": these routes listen at 33 addresses together, 32 at most."
        ),
        "{problem}"
    );
}

#[test]
fn all_mistakes_with_routes_are_told_at_once() {
    let errors = read(&[
        ("AEGIS_ROUTES", "orders,cache-eu,orders"),
        ("AEGIS_LISTEN", "0.0.0.0:1"),
        ("AEGIS_CACHE_EU__LISTEN", "127.0.0.1:1"),
        ("AEGIS_ORDERS__CONNECT_TIMEOUT", "fast"),
        ("AEGIS_ORDERS__WORKERS", "2"),
        ("AEGIS_ORDERS__LISTN", "127.0.0.1:3"),
        ("AEGIS_ORDERS_BACKENDS", "db:1"),
        ("AEGIS_CACHE_EU__POOL_MODE", "request"),
        ("AEGIS_ROUTE", "key"),
    ])
    .unwrap_err();
    assert_eq!(
        errors.to_string(),
        r#"the configuration has 8 problems:
  AEGIS_ROUTES="orders,cache-eu,orders": "orders" is there twice. Accepted: 1 to 16 of names, comma-separated; each up to 24 of a-z, 0-9 and single dashes.
  AEGIS_ORDERS__LISTEN="0.0.0.0:1" and AEGIS_CACHE_EU__LISTEN="127.0.0.1:1": both routes would listen at the same address. Set another one for each.
  route cache-eu: AEGIS_CACHE_EU__POOL_MODE="request" and AEGIS_PROTOCOL="tcp": of unknown bytes nobody can tell when an answer is over, so a used connection could bring one client the answer to another.
  AEGIS_ORDERS__CONNECT_TIMEOUT="fast": not a duration: expected number at 0. Accepted: a duration from 1ms to 5m.
  AEGIS_ORDERS_BACKENDS: no such variable. Is AEGIS_ORDERS__BACKENDS meant?
  AEGIS_ORDERS__LISTN: no such variable. Is AEGIS_ORDERS__LISTEN meant?
  AEGIS_ORDERS__WORKERS: it is for the whole process, and no route's own. Set AEGIS_WORKERS.
  AEGIS_ROUTE: it is gone. For key set AEGIS_BALANCE=key_hash in its place, for balance nothing."#
    );
}

#[test]
fn a_variable_of_a_route_that_is_not_named_says_what_to_set() {
    for (routes, name, why) in [
        (
            "orders,cache-eu",
            "AEGIS_STOCK__LISTEN",
            "AEGIS_ROUTES=\"orders,cache-eu\" does not name \"stock\". Name it there, or unset this.",
        ),
        (
            "orders,cache-eu",
            "AEGIS_ORDER__KUBE_SERVICE",
            "AEGIS_ROUTES=\"orders,cache-eu\" does not name \"order\". Is AEGIS_ORDERS__KUBE_SERVICE meant?",
        ),
        (
            "orders,cache-eu",
            "AEGIS_CACHE_US__LISTEN",
            "AEGIS_ROUTES=\"orders,cache-eu\" does not name \"cache-us\". Is AEGIS_CACHE_EU__LISTEN meant?",
        ),
        (
            "",
            "AEGIS_STOCK__LISTEN",
            "there is no route \"stock\", as AEGIS_ROUTES is not set. Set AEGIS_LISTEN, or \
             AEGIS_ROUTES=stock as well.",
        ),
        (
            "",
            "AEGIS_DEFAULT__LISTEN",
            "there is no route \"default\", as AEGIS_ROUTES is not set. Set AEGIS_LISTEN, or \
             AEGIS_ROUTES=default as well.",
        ),
    ] {
        let mut vars = vec![(name, "127.0.0.1:1")];
        if !routes.is_empty() {
            vars.extend([("AEGIS_ROUTES", routes), ("AEGIS_LISTEN", "127.0.0.1:0")]);
        }
        assert_eq!(problems(&vars), [format!("{name}: {why}")]);
    }
    // Whose they are cannot be told where the names are refused.
    let vars = [("AEGIS_ROUTES", "Orders"), ("AEGIS_ORDERS__LISTEN", "127.0.0.1:1")];
    assert_eq!(problems(&vars).len(), 1, "{:?}", problems(&vars));
}

#[test]
fn no_route_has_a_variable_of_the_process() {
    for variable in VARIABLES.iter().filter(|variable| !variable.is_of_routes()) {
        let name = variable.name.replacen('_', "_ORDERS__", 1);
        let problems = problems(&two_and(&[(&*name.clone().leak(), variable.default)]));
        let why = format!(
            "{name}: it is for the whole process, and no route's own. Set {}.",
            variable.name
        );
        assert_eq!(problems, [why]);
    }
}

#[test]
fn an_empty_list_of_routes_is_a_mistake() {
    for text in ["", " ", ",", "a,,b"] {
        let [problem] = &problems(&[("AEGIS_ROUTES", text), ("AEGIS_LISTEN", "[::1]:0")])[..]
        else {
            panic!("{text}")
        };
        assert!(problem.starts_with("AEGIS_ROUTES=") && problem.contains("empty"), "{problem}");
    }
}

#[test]
fn each_route_needs_addresses_of_its_own() {
    for (plain, orders, cache, fine) in [
        (None, None, None, false),
        (Some("127.0.0.1:1"), None, None, false),
        (Some("127.0.0.1:1"), Some("127.0.0.1:2"), None, true),
        (None, Some("0.0.0.0:1"), Some("127.0.0.1:1"), false),
        (None, Some("127.0.0.1:1"), Some("0.0.0.0:1"), false),
        (None, Some("127.0.0.1:1"), Some("127.0.0.2:1"), true),
        (None, Some("[::]:1"), Some("0.0.0.0:1"), true),
        (None, Some("127.0.0.1:1,127.0.0.1:2"), Some("127.0.0.1:3,127.0.0.1:2"), false),
        // Each has a free port of its own.
        (Some("127.0.0.1:0"), None, None, true),
        // The admin port and the backends, which here are each other's.
        (None, Some("127.0.0.1:1"), Some("127.0.0.1:8082"), false),
        (None, Some("127.0.0.1:1"), Some("127.0.0.1:8080"), false),
    ] {
        let mut vars = vec![("AEGIS_ROUTES", "orders,cache-eu")];
        vars.extend(plain.map(|text| ("AEGIS_LISTEN", text)));
        vars.extend(orders.map(|text| ("AEGIS_ORDERS__LISTEN", text)));
        vars.extend(cache.map(|text| ("AEGIS_CACHE_EU__LISTEN", text)));
        assert_eq!(problems(&vars).is_empty(), fine, "{vars:?}: {:?}", problems(&vars));
    }
    let [problem] = &problems(&[("AEGIS_ROUTES", "orders,cache-eu")])[..] else { panic!() };
    assert!(
        problem.starts_with(
            "AEGIS_ORDERS__LISTEN=\"127.0.0.1:8081,[::1]:8081\" and \
         AEGIS_CACHE_EU__LISTEN=\"127.0.0.1:8081,[::1]:8081\": both routes"
        ),
        "{problem}"
    );
}

#[test]
fn a_file_of_endpoints_is_one_route_s() {
    let kube = [("AEGIS_ORDERS__KUBE_SERVICE", "a"), ("AEGIS_CACHE_EU__KUBE_SERVICE", "b")];
    let shared = ("AEGIS_KUBE_SNAPSHOT", "/run/aegis/endpoints.json");
    let own = ("AEGIS_CACHE_EU__KUBE_SNAPSHOT", "/run/aegis/cache.json");
    let [problem] = &problems(&two_and(&[kube[0], kube[1], shared]))[..] else { panic!() };
    assert_eq!(
        problem,
        "AEGIS_ORDERS__KUBE_SNAPSHOT=\"/run/aegis/endpoints.json\" and \
         AEGIS_CACHE_EU__KUBE_SNAPSHOT=\"/run/aegis/endpoints.json\": both routes would write to the same \
         file. Set another one for each."
    );
    assert_eq!(problems(&two_and(&[kube[0], kube[1], shared, own])), [""; 0]);
    assert_eq!(problems(&two_and(&[kube[0], shared])), [""; 0], "the other has none");
}

#[test]
fn a_refused_text_is_told_once_whatever_it_is_for() {
    let vars = two_and(&[("AEGIS_KEEPALIVE", "?"), ("AEGIS_ORDERS__KEEPALIVE", "60s")]);
    let [problem] = &problems(&vars)[..] else { panic!() };
    assert!(problem.starts_with("AEGIS_KEEPALIVE=\"?\": "), "{problem}");
    let vars = two_and(&[("AEGIS_KEEPALIVE", "?"), ("AEGIS_ORDERS__KEEPALIVE", "!")]);
    let starts = ["AEGIS_KEEPALIVE=\"?\": ", "AEGIS_ORDERS__KEEPALIVE=\"!\": "];
    let problems = problems(&vars);
    assert!(problems.iter().zip(starts).all(|(problem, start)| problem.starts_with(start)));
    assert_eq!(problems.len(), 2, "{problems:?}");
}

#[test]
fn what_does_not_go_together_names_the_route_and_the_variables_that_are_set() {
    for (more, problem) in [
        (
            &[("AEGIS_POOL_MIN_IDLE", "9"), ("AEGIS_CACHE_EU__POOL_MAX_IDLE", "8")][..],
            "route cache-eu: AEGIS_POOL_MIN_IDLE=\"9\" and AEGIS_CACHE_EU__POOL_MAX_IDLE=\"8\": ",
        ),
        (
            &[("AEGIS_BACKENDS", "db:1"), ("AEGIS_ORDERS__KUBE_SERVICE", "db")],
            "route orders: AEGIS_BACKENDS=\"db:1\" and AEGIS_ORDERS__KUBE_SERVICE=\"db\": both name \
             endpoints, and AEGIS_ORDERS__DISCOVERY does not say which.",
        ),
        (
            &[("AEGIS_ORDERS__BACKENDS", "127.0.0.1:6379")],
            "route orders: AEGIS_CACHE_EU__LISTEN=\"127.0.0.1:6379\" and \
             AEGIS_ORDERS__BACKENDS=\"127.0.0.1:6379\": the proxy would connect to itself, by its route \
             cache-eu.",
        ),
        (
            &[("AEGIS_ADMIN", "127.0.0.1:5432")],
            "route orders: AEGIS_ORDERS__LISTEN=\"127.0.0.1:5432\" and AEGIS_ADMIN=\"127.0.0.1:5432\": ",
        ),
    ] {
        let problems = problems(&two_and(more));
        assert!(problems.len() == 1 && problems[0].starts_with(problem), "{problems:?}");
    }
}

#[test]
fn what_has_no_effect_is_told_by_route() {
    for (more, warned) in [
        // It has an effect on one of them.
        (&[("AEGIS_DNS_REFRESH", "1s"), ("AEGIS_ORDERS__BACKENDS", "db:1")][..], &[][..]),
        (&[("AEGIS_DNS_REFRESH", "1s")], &["AEGIS_DNS_REFRESH=\"1s\" has no effect: no names"]),
        (
            &[("AEGIS_ORDERS__BACKENDS", "db:1"), ("AEGIS_CACHE_EU__DNS_REFRESH", "1s")],
            &["AEGIS_CACHE_EU__DNS_REFRESH=\"1s\" has no effect: no names"],
        ),
        (
            &[("AEGIS_ORDERS__PROTOCOL", "chronos"), ("AEGIS_CACHE_EU__POOL_SIZE", "8")],
            &["AEGIS_ORDERS__PROTOCOL=", "AEGIS_CACHE_EU__POOL_SIZE=\"8\""],
        ),
    ] {
        let warnings = read(&two_and(more)).unwrap().warnings();
        let fits = warnings.iter().zip(warned).all(|(warning, begin)| warning.starts_with(begin));
        assert!(fits && warnings.len() == warned.len(), "{more:?}: {warnings:?}");
    }
}
