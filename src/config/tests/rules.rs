//! Which values go together, and what follows from several.

use super::{problems, read};
use crate::config::{Config, Discovery};

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
                ("AEGIS_BALANCE", "key_hash"),
            ],
            "keys of one client may belong to several endpoints",
        ),
        (
            &[
                ("AEGIS_PROTOCOL", "http1"),
                ("AEGIS_POOL_MODE", "request"),
                ("AEGIS_BALANCE", "key_hash"),
            ],
            "only the requests of chronos have keys",
        ),
    ] {
        let [problem] = &problems(vars)[..] else { panic!("{vars:?}: {:?}", problems(vars)) };
        assert!(problem.contains(why), "{problem}");
    }
}

#[test]
fn what_has_no_effect_is_told_with_the_reason() {
    let kube = ("AEGIS_KUBE_SERVICE", "db");
    let chronos = ("AEGIS_PROTOCOL", "chronos");
    let request_mode = ("AEGIS_POOL_MODE", "request");
    for (vars, warned) in [
        (&[][..], &[][..]),
        // Defaults may be written out.
        (&[("AEGIS_POOL_SIZE", "16"), ("AEGIS_KUBE_PORT", "auto")], &[]),
        (&[("AEGIS_ENDPOINT_MAX", "4")], &[]),
        (
            &[("AEGIS_KUBE_PORT", "5432")],
            &["AEGIS_KUBE_PORT=\"5432\" has no effect: the endpoints"],
        ),
        (&[kube, ("AEGIS_KUBE_PORT", "5432")], &[]),
        (&[kube, ("AEGIS_DISCOVERY", "static")], &["AEGIS_KUBE_SERVICE"]),
        (
            &[kube, ("AEGIS_DISCOVERY", "kubernetes"), ("AEGIS_BACKENDS", "db:1")],
            &["AEGIS_BACKENDS"],
        ),
        (&[kube, ("AEGIS_KUBE_STORES", "3")], &["AEGIS_KUBE_STORES"]),
        (
            &[
                kube,
                chronos,
                request_mode,
                ("AEGIS_BALANCE", "key_hash"),
                ("AEGIS_KUBE_STORES", "3"),
            ],
            &[],
        ),
        (&[("AEGIS_DNS_REFRESH", "1s")], &["AEGIS_DNS_REFRESH"]),
        (&[("AEGIS_DNS_REFRESH", "1s"), ("AEGIS_BACKENDS", "db:1")], &[]),
        (&[("AEGIS_LOCALITY", "zone")], &["AEGIS_LOCALITY"]),
        (
            &[kube, ("AEGIS_LOCALITY", "zone")],
            &["AEGIS_LOCALITY=\"zone\" has no effect: AEGIS_ZONE"],
        ),
        (&[kube, ("AEGIS_LOCALITY", "zone"), ("AEGIS_ZONE", "a")], &[]),
        (&[kube, ("AEGIS_LOCALITY", "node"), ("AEGIS_ZONE", "a")], &["AEGIS_LOCALITY"]),
        // Where this runs is a fact, and asks for nothing.
        (&[("AEGIS_ZONE", "a"), ("AEGIS_NODE_NAME", "n"), ("AEGIS_CPU_REQUEST", "100")], &[]),
        (&[("AEGIS_BACKEND_DRAIN", "1s")], &["AEGIS_BACKEND_DRAIN"]),
        (&[("AEGIS_SLOW_START", "1s")], &["AEGIS_SLOW_START"]),
        (&[kube, ("AEGIS_SLOW_START", "1s")], &[]),
        (&[kube, ("AEGIS_SLOW_START", "1s"), ("AEGIS_BALANCE", "source_hash")], &["AEGIS_SLOW"]),
        (&[chronos], &["AEGIS_PROTOCOL"]),
        (&[chronos, request_mode], &[]),
        (&[("AEGIS_POOL_SIZE", "8")], &["AEGIS_POOL_SIZE"]),
        (&[chronos, request_mode, ("AEGIS_POOL_SIZE", "8")], &[]),
        (&[chronos, request_mode, ("AEGIS_POOL_MAX_IDLE", "8")], &["AEGIS_POOL_MAX_IDLE"]),
        (
            &[("AEGIS_QUEUE_MAX", "8"), ("AEGIS_REQUEST_TIMEOUT", "off")],
            &["AEGIS_QUEUE_MAX", "AEGIS_REQUEST_TIMEOUT"],
        ),
        (&[chronos, ("AEGIS_POOL_MODE", "session"), ("AEGIS_REQUEST_TIMEOUT", "off")], &[]),
        (
            &[("AEGIS_PROTOCOL", "http1"), request_mode, ("AEGIS_LINE_MAX", "16")],
            &["AEGIS_LINE_MAX"],
        ),
        (
            &[("AEGIS_POOL_MAX_IDLE", "0"), ("AEGIS_POOL_MAX_LIFETIME", "1m")],
            &["AEGIS_POOL_MAX_LIFETIME"],
        ),
        (
            &[("AEGIS_LOG", "info,agis=debug")],
            &["AEGIS_LOG: nothing that is known logs as \"agis\""],
        ),
    ] {
        expect_warned(vars, warned);
    }
}

#[test]
fn a_preset_has_an_effect_where_it_changes_something() {
    let chronos = ("AEGIS_PROTOCOL", "chronos");
    let [request, session] = ["request", "session"].map(|mode| ("AEGIS_POOL_MODE", mode));
    let preset = |name| ("AEGIS_PRESET", name);
    for (vars, warned) in [
        (&[preset("postgres")][..], &[][..]),
        (&[preset("redis")], &[]),
        // Other numbers of warm connections, and how long they are kept.
        (&[chronos, session, preset("postgres")], &[]),
        (&[chronos, session, preset("mysql")], &[]),
        (&[chronos, request, preset("postgres")], &[]),
        (&[chronos, session, preset("redis")], &["AEGIS_PRESET=\"redis\" has no effect"]),
        (
            &[
                chronos,
                request,
                preset("postgres"),
                ("AEGIS_POOL_MIN_IDLE", "1"),
                ("AEGIS_POOL_IDLE_TIMEOUT", "60s"),
            ],
            &["AEGIS_PRESET"],
        ),
    ] {
        expect_warned(vars, warned);
    }
}

#[test]
fn what_only_others_give_an_effect_is_told() {
    let kube = ("AEGIS_KUBE_SERVICE", "db");
    let age = ("AEGIS_KUBE_SNAPSHOT_MAX_AGE", "2h");
    let all = ("AEGIS_LOG_ENDS", "all");
    let session = [("AEGIS_PROTOCOL", "chronos"), ("AEGIS_POOL_MODE", "session")];
    let [protocol, mode] = session;
    let request = ("AEGIS_POOL_MODE", "request");
    let idle = ("AEGIS_POOL_IDLE_TIMEOUT", "7s");
    for (vars, warned) in [
        (&[kube, age][..], &["AEGIS_KUBE_SNAPSHOT_MAX_AGE"][..]),
        (&[kube, age, ("AEGIS_KUBE_SNAPSHOT", "/tmp/saved")], &[]),
        (&[("AEGIS_DISCOVERY", "dns"), ("AEGIS_DNS_REFRESH", "1s")], &["AEGIS_DNS_REFRESH"]),
        (&[protocol, mode, ("AEGIS_POOL_MAX_IDLE", "0"), idle], &["AEGIS_POOL_IDLE_TIMEOUT"]),
        (&[protocol, mode, ("AEGIS_POOL_MAX_IDLE", "1"), idle], &[]),
        (&[protocol, request, ("AEGIS_POOL_MAX_IDLE", "2")], &["AEGIS_POOL_MAX_IDLE"]),
        (&[all], &[]),
        (&[all, ("AEGIS_LOG", "warn")], &["AEGIS_LOG_ENDS=\"all\" has no effect: AEGIS_LOG"]),
        (&[all, ("AEGIS_LOG", "warn,aegis::ends=info")], &[]),
        (&[("AEGIS_LOG_ENDS", "off"), ("AEGIS_LOG", "warn")], &[]),
    ] {
        expect_warned(vars, warned);
    }
}

fn expect_warned(vars: &[(&str, &str)], warned: &[&str]) {
    let warnings = read(vars).unwrap_or_else(|e| panic!("{vars:?}: {e}")).warnings();
    let fits = warnings.iter().zip(warned).all(|(warning, begin)| warning.starts_with(begin));
    assert!(fits && warnings.len() == warned.len(), "{vars:?}: {warnings:?}");
}

#[test]
fn what_stands_in_or_is_checked_without_effect_is_told() {
    let kube = ("AEGIS_KUBE_SERVICE", "db");
    for (vars, warned) in [
        (
            &[kube, ("AEGIS_LOCALITY", "failover")][..],
            &["AEGIS_LOCALITY=\"failover\" has no effect"][..],
        ),
        (&[kube, ("AEGIS_LOCALITY", "failover"), ("AEGIS_ZONE", "a")], &[]),
        (&[("AEGIS_FAILBACK_TIME", "1s")], &["AEGIS_FAILBACK_TIME"]),
        (&[("AEGIS_CHECK_RISE", "5")], &["AEGIS_CHECK_RISE=\"5\" has no effect: AEGIS_CHECK_INT"]),
        (&[("AEGIS_CHECK_RISE", "5"), ("AEGIS_CHECK_INTERVAL", "1s")], &[]),
        (&[("AEGIS_CHECK_PATH", "/x"), ("AEGIS_CHECK_INTERVAL", "1s")], &["AEGIS_CHECK_PATH"]),
        (
            &[
                ("AEGIS_CHECK_PATH", "/x"),
                ("AEGIS_CHECK_INTERVAL", "1s"),
                ("AEGIS_CHECK", "request"),
                ("AEGIS_PROTOCOL", "http1"),
            ],
            &[],
        ),
        (
            &[
                kube,
                ("AEGIS_FAILBACK_TIME", "1s"),
                ("AEGIS_LOCALITY", "failover"),
                ("AEGIS_ZONE", "a"),
            ],
            &[],
        ),
        (&[("AEGIS_FAILBACK_TIME", "1s"), ("AEGIS_BACKUPS", "10.0.0.1:1")], &[]),
        (&[kube, ("AEGIS_BACKUPS", "10.0.0.1:1")], &["AEGIS_BACKUPS"]),
    ] {
        expect_warned(vars, warned);
    }
}

#[test]
fn the_minimum_is_not_above_the_maximum_whatever_the_number_of_workers() {
    let pool = |vars: &[(&str, &str)]| read(vars).map(|config| config.routes[0].pool.min_idle).ok();
    let max = ("AEGIS_POOL_MAX_IDLE", "3");
    for workers in ["1", "4", "auto", "0"] {
        let workers = ("AEGIS_WORKERS", workers);
        assert_eq!(pool(&[workers, ("AEGIS_POOL_MIN_IDLE", "3"), max]), Some(3));
        assert_eq!(pool(&[workers, ("AEGIS_POOL_MIN_IDLE", "4"), max]), None);
        assert_eq!(pool(&[workers, max]), Some(3), "the default gives way");
        let requests = [workers, ("AEGIS_PROTOCOL", "chronos"), ("AEGIS_POOL_MODE", "request")];
        let of_requests = |vars: &[_]| pool(&[&requests[..], vars].concat());
        let size = ("AEGIS_POOL_SIZE", "3");
        assert_eq!(of_requests(&[("AEGIS_POOL_MIN_IDLE", "3"), size]), Some(3));
        assert_eq!(of_requests(&[("AEGIS_POOL_MIN_IDLE", "4"), size]), None);
        assert_eq!(of_requests(&[size]), Some(3), "the default gives way");
        assert_eq!(of_requests(&[max]), Some(4), "it is not for them");
    }
}

#[test]
fn what_is_kept_and_made_is_within_the_limit_of_the_endpoint() {
    let conflict = |name: &str, value| {
        format!(
            "{name}={value:?} and AEGIS_ENDPOINT_MAX=\"8\": an endpoint would have more connections \
             than it may; set AEGIS_ENDPOINT_MAX to 9 or more, or {name} to 8 or less."
        )
    };
    let max = ("AEGIS_ENDPOINT_MAX", "8");
    let framed = [("AEGIS_PROTOCOL", "chronos"), ("AEGIS_POOL_MODE", "request"), max];
    let found = problems(&[("AEGIS_POOL_MIN_IDLE", "9"), max]);
    assert_eq!(found, [conflict("AEGIS_POOL_MIN_IDLE", "9")]);
    let found = problems(&[&framed[..], &[("AEGIS_POOL_SIZE", "9")]].concat());
    assert_eq!(found, [conflict("AEGIS_POOL_SIZE", "9")]);
    // Defaults give way, and so does what is not used.
    let pool = |vars: &[(&str, &str)]| read(vars).unwrap().routes[0].pool.clone();
    let (sessions, requests) = (pool(&[("AEGIS_POOL_SIZE", "9"), max]), pool(&framed));
    assert_eq!((sessions.conns_max(), requests.conns_max()), (Some(8), Some(8)));
    assert_eq!(pool(&[("AEGIS_ENDPOINT_MAX", "2")]).min_idle, 2);
    // Without it only requests are limited, by the size of the pool.
    assert_eq!(pool(&[]).conns_max(), None);
    assert_eq!(pool(&framed[..2]).conns_max(), Some(16));
}

#[test]
fn the_default_minimum_gives_way_to_a_small_maximum() {
    let config = read(&[("AEGIS_POOL_MAX_IDLE", "0")]).unwrap();
    let pool = &config.routes[0].pool;
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
        ("127.0.0.1:1", "[::]:3", "0.0.0.0:1", false),
        ("[::1]:1", "[::]:3", "[::]:1", false),
        ("127.0.0.1:1", "[::]:3", "[::ffff:127.0.0.1]:1", false),
        // A data port of IPv6 takes nothing of IPv4, and so is in nobody's way there.
        ("[::]:1", "[::]:3", "127.0.0.1:1", true),
        ("[::]:1", "0.0.0.0:1", "127.0.0.1:9", true),
        ("[::]:1,0.0.0.0:1", "[::]:3", "127.0.0.1:9", true),
        ("[::]:1,127.0.0.1:1", "[::]:3", "127.0.0.1:9", true),
        ("0.0.0.0:1,127.0.0.1:1", "[::]:3", "127.0.0.1:9", false),
        ("127.0.0.1:1,127.0.0.2:2,0.0.0.0:1", "[::]:3", "127.0.0.1:9", false),
        ("[::1]:1,[::]:1", "[::]:3", "127.0.0.1:9", false),
        ("127.0.0.1:1,[::ffff:127.0.0.1]:1", "[::]:3", "127.0.0.1:9", false),
        ("127.0.0.1:1,127.0.0.1:1", "[::]:3", "127.0.0.1:9", false),
        ("127.0.0.1:0,0.0.0.0:0", "[::]:0", "127.0.0.1:9", true),
        ("0.0.0.0:1", "127.0.0.1:1", "127.0.0.1:9", false),
        ("[::1]:1", "[::]:1", "127.0.0.1:9", false),
        // The same backend twice.
        ("127.0.0.1:1", "[::]:3", "db:5,DB:5", false),
        ("127.0.0.1:1", "[::]:3", "10.0.0.9:5,[::ffff:10.0.0.9]:5", false),
    ] {
        let vars = [("AEGIS_LISTEN", listen), ("AEGIS_ADMIN", admin), ("AEGIS_BACKENDS", backends)];
        assert_eq!(problems(&vars).is_empty(), fine, "{vars:?}");
    }
}

#[test]
fn where_endpoints_come_from_follows_from_what_is_set() {
    let kubernetes = Discovery::Kubernetes;
    for (vars, discovery) in [
        (&[][..], Discovery::Static),
        (&[("AEGIS_BACKENDS", "db:1")], Discovery::Dns),
        (&[("AEGIS_KUBE_SERVICE", "chronos")], kubernetes),
        (&[("AEGIS_KUBE_SELECTOR", "app=chronos,tier in (a, b),age>3")], kubernetes),
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
        assert_eq!(config.routes[0].discovery, discovery, "{vars:?}");
        assert_eq!(Config::from_vars(config.effective()), Ok(config), "{vars:?}");
    }
    for (vars, part) in [
        (&[("AEGIS_DISCOVERY", "kubernetes")][..], "has to be named"),
        (&[("AEGIS_DISCOVERY", "static"), ("AEGIS_BACKENDS", "db:1")], "have to be resolved"),
        (&[("AEGIS_KUBE_SERVICE", "a"), ("AEGIS_KUBE_SELECTOR", "a=b")], "one of them"),
        (&[("AEGIS_KUBE_SERVICE", "a"), ("AEGIS_BACKENDS", "db:1")], "does not say which"),
        (&[("AEGIS_KUBE_SERVICE", "a.b"), ("AEGIS_KUBE_NAMESPACE", "c")], "different namespaces"),
        (&[("AEGIS_KUBE_SERVICE", "A")], "not a name in Kubernetes"),
        (&[("AEGIS_KUBE_SELECTOR", "a={}")], "not a label selector"),
        (&[("AEGIS_KUBE_PORT", "0")], "port 0 cannot be connected to"),
        (&[("AEGIS_KUBE_PORT", "080")], "is not a port"),
        (&[("AEGIS_KUBE_PORT", "+80")], "not a name in Kubernetes"),
    ] {
        let [problem] = &problems(vars)[..] else { panic!("{vars:?}: {:?}", problems(vars)) };
        assert!(problem.contains(part), "{problem}");
    }
}

#[test]
fn a_name_is_counted_as_the_addresses_that_it_may_stand_for() {
    let addresses = |backends| read(&[("AEGIS_BACKENDS", backends)]).unwrap().routes[0].addresses();
    assert_eq!(addresses("10.0.0.1:80,[::1]:80"), 2);
    assert_eq!(addresses("10.0.0.1:80,db:80"), 1 + crate::limits::ADDRESSES_PER_NAME);
}

#[test]
fn what_a_preset_suggests_gives_way_to_what_is_set() {
    let kept = |vars: &[(&str, &str)]| {
        let pool = read(vars).unwrap().routes[0].pool.clone();
        (pool.min_idle, pool.max_idle)
    };
    let [mysql, postgres] = ["mysql", "postgres"].map(|preset| ("AEGIS_PRESET", preset));
    assert_eq!(kept(&[mysql]), (0, 0));
    assert_eq!(kept(&[mysql, ("AEGIS_POOL_MIN_IDLE", "2")]), (2, 2));
    assert_eq!(kept(&[postgres, ("AEGIS_POOL_MIN_IDLE", "8")]), (8, 8));
    assert_eq!(kept(&[postgres, ("AEGIS_POOL_MIN_IDLE", "2")]), (2, 4));
    assert_eq!(kept(&[postgres, ("AEGIS_POOL_MAX_IDLE", "64")]), (0, 64));
    let both = [mysql, ("AEGIS_POOL_MIN_IDLE", "200"), ("AEGIS_POOL_MAX_IDLE", "1")];
    assert_eq!(problems(&both).len(), 1, "what is set does not");
}

#[test]
fn backups_are_other_servers_than_those_that_they_stand_in_for() {
    let keys = [
        ("AEGIS_PROTOCOL", "chronos"),
        ("AEGIS_POOL_MODE", "request"),
        ("AEGIS_BALANCE", "key_hash"),
        ("AEGIS_BACKUPS", "10.0.0.2:1"),
    ];
    let zones = [
        ("AEGIS_KUBE_SERVICE", "db"),
        ("AEGIS_PROTOCOL", "chronos"),
        ("AEGIS_POOL_MODE", "request"),
        ("AEGIS_BALANCE", "key_hash"),
        ("AEGIS_LOCALITY", "failover"),
        ("AEGIS_ZONE", "a"),
    ];
    let many = (1..=1000).map(|port| format!("10.0.0.2:{port}")).collect::<Vec<_>>().join(",");
    let more = many.replace("10.0.0.2", "10.0.0.3");
    for (vars, part) in [
        (
            &[("AEGIS_BACKENDS", "10.0.0.1:1,10.0.0.2:1"), ("AEGIS_BACKUPS", "10.0.0.2:1")][..],
            "AEGIS_BACKENDS=\"10.0.0.2:1\" and AEGIS_BACKUPS=\"10.0.0.2:1\": nothing stands in for",
        ),
        (&keys, "AEGIS_BACKUPS=\"10.0.0.2:1\": no store has the keys of another one"),
        (&zones, "AEGIS_LOCALITY=\"failover\": no store has the keys of another one"),
        (
            &[("AEGIS_DISCOVERY", "static"), ("AEGIS_BACKUPS", "spare.example:1")],
            "AEGIS_BACKUPS=\"spare.example:1\": names have to be resolved",
        ),
        (
            &[("AEGIS_LISTEN", "127.0.0.1:1"), ("AEGIS_BACKUPS", "127.0.0.1:1")],
            "AEGIS_BACKUPS=\"127.0.0.1:1\": the proxy would connect to itself without end",
        ),
        (&[("AEGIS_BACKENDS", &many), ("AEGIS_BACKUPS", &more)], "2000 together, 1024 at most"),
        (&[("AEGIS_BACKUPS", "db")], "AEGIS_BACKUPS=\"db\": \"db\": the port is missing"),
        (&[("AEGIS_FAILBACK_TIME", "2h")], "AEGIS_FAILBACK_TIME=\"2h\": above 1h"),
    ] {
        let [problem] = &problems(vars)[..] else { panic!("{part}: {:?}", problems(vars)) };
        assert!(problem.contains(part), "{problem}");
    }
    let discovery = |backups| read(&[("AEGIS_BACKUPS", backups)]).unwrap().routes[0].discovery;
    assert_eq!(discovery("10.0.0.1:1,unix:/run/db.sock"), Discovery::Static);
    assert_eq!(discovery("10.0.0.1:1,spare.example:1"), Discovery::Dns);
}

#[test]
fn checks_are_such_that_a_server_can_pass_and_does_not_mind() {
    let every = ("AEGIS_CHECK_INTERVAL", "1s");
    for (vars, part) in [
        (
            &[every, ("AEGIS_CHECK", "request")][..],
            "AEGIS_CHECK=\"request\" and AEGIS_PROTOCOL=\"tcp\": only chronos and http1 have",
        ),
        (&[every, ("AEGIS_PRESET", "mysql")], "until it locks the host out"),
        (&[("AEGIS_CHECK_PATH", "healthz")], "it does not begin with /"),
        (&[("AEGIS_CHECK_PATH", "/a b")], "without spaces"),
        (&[("AEGIS_CHECK_INTERVAL", "10ms")], "below 100ms"),
    ] {
        let [problem] = &problems(vars)[..] else { panic!("{part}: {:?}", problems(vars)) };
        assert!(problem.contains(part), "{problem}");
    }
}
