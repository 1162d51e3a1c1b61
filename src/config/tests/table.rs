//! What the rows of the table give.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{problems, read};
use crate::config::kind::Shape;
use crate::config::{Backend, Balance, Config, HostPort, PREFIX, VARIABLES, Variable};
use crate::limits;

#[test]
fn an_empty_environment_gives_the_defaults() {
    let config = read(&[]).unwrap();
    let [route] = &config.routes[..] else { panic!("{config:?}") };
    assert_eq!(route.name.as_str(), "default");
    assert_eq!(route.listen, ["127.0.0.1:8081", "[::1]:8081"].map(|a| a.parse().unwrap()));
    let host = "127.0.0.1".to_owned();
    assert_eq!(route.backends, [Backend::Tcp(HostPort { host, port: 8080 })]);
    assert_eq!(config.workers, None);
    assert_eq!(route.balance, Balance::LeastConn);
    assert_eq!((route.pool.min_idle, route.pool.max_idle), (4, 64));
    assert_eq!(route.pool.max_lifetime, Some(Duration::from_secs(900)));
    assert_eq!(route.idle_timeout, None);
    assert_eq!(config.drain_delay, Duration::from_secs(1));
}

#[test]
fn defaults_written_out_are_the_defaults() {
    let written: Vec<_> = VARIABLES.iter().map(|v| (v.name, v.default)).collect();
    assert_eq!(read(&written), read(&[]));
}

#[test]
fn a_preset_gives_defaults_which_what_is_set_overrides() {
    let config = read(&[
        ("AEGIS_ROUTES", "orders,logs,cache"),
        ("AEGIS_ORDERS__PRESET", "postgres"),
        ("AEGIS_ORDERS__POOL_MAX_IDLE", "9"),
        ("AEGIS_LOGS__PRESET", " mysql "),
        ("AEGIS_ORDERS__LISTEN", "127.0.0.1:1"),
        ("AEGIS_LOGS__LISTEN", "127.0.0.1:2"),
    ]);
    let config = config.unwrap();
    let pools: Vec<_> = config.routes.iter().map(|route| &route.pool).collect();
    let sizes: Vec<_> = pools.iter().map(|pool| (pool.min_idle, pool.max_idle)).collect();
    assert_eq!(sizes, [(0, 9), (0, 0), (4, 64)]);
    assert_eq!(pools[0].idle_timeout, Some(Duration::from_secs(30)));
    let by_preset: Vec<_> = config.routes.iter().map(|route| route.by_preset()).collect();
    let (min, max, idle) = (
        ("AEGIS_POOL_MIN_IDLE", "0"),
        ("AEGIS_POOL_MAX_IDLE", "0"),
        ("AEGIS_POOL_IDLE_TIMEOUT", "30s"),
    );
    assert_eq!(by_preset, [vec![min, idle], vec![min, max], vec![]]);
    assert_eq!(Config::from_vars(config.effective()), Ok(config));
}

#[test]
fn what_is_in_force_names_every_variable_in_order() {
    let names: Vec<_> = read(&[]).unwrap().effective().into_iter().map(|(name, _)| name).collect();
    let table: Vec<_> = VARIABLES.iter().map(|v| v.name).collect();
    assert_eq!(names, table);
    assert!(table.iter().all(|name| name.starts_with(PREFIX)));
    assert_eq!(table.iter().collect::<BTreeSet<_>>().len(), table.len());
}

/// A text that the variable accepts: by its shape, except where others would contradict it, or where
/// it has a syntax of its own.
fn random_text(variable: &Variable, rng: &mut fastrand::Rng) -> String {
    let word = |rng: &mut fastrand::Rng, words: &[&str]| rng.choice(words).unwrap().to_string();
    let list = |rng: &mut fastrand::Rng, max, host: &str| -> String {
        let ports: BTreeSet<u16> = (0..rng.usize(1..=max)).map(|_| rng.u16(9000..)).collect();
        ports.iter().map(|p| format!("{host}:{p}")).collect::<Vec<_>>().join(" , ")
    };
    match variable.name {
        "AEGIS_ROUTES" => word(rng, &["default", "orders"]),
        "AEGIS_LISTEN" => list(rng, limits::LISTEN_ADDRESSES_MAX, "[2001:db8:0::1]"),
        "AEGIS_SOCKET_MODE" => word(rng, &["0600", "666", "0"]),
        "AEGIS_SOCKET_OWNER" => word(rng, &["none", "0", "1000:2000", ":2000"]),
        "AEGIS_ADMIN" => format!("0.0.0.0:{}", rng.u16(..9000)),
        "AEGIS_CONTROL" => word(rng, &["off", "unix:/run/aegis/control.sock"]),
        "AEGIS_BACKENDS" => {
            let host = word(rng, &["a.b", "C-D", "[::2]", "10.0.0.1", "unix:/run/db.sock"]);
            list(rng, 100, &host)
        }
        "AEGIS_CHECK" => "connect".to_owned(),
        "AEGIS_CHECK_PATH" => word(rng, &["/", "/healthz?deep=1"]),
        "AEGIS_DISCOVERY" => word(rng, &["auto", "dns"]),
        "AEGIS_KUBE_SERVICE" | "AEGIS_KUBE_SELECTOR" => "none".to_owned(),
        "AEGIS_KUBE_NAMESPACE" => word(rng, &["auto", "db-1"]),
        "AEGIS_KUBE_PORT" => word(rng, &["auto", "chronos", "8080"]),
        "AEGIS_KUBE_SNAPSHOT" => word(rng, &["none", "/run/aegis/endpoints.json"]),
        "AEGIS_NODE_NAME" | "AEGIS_ZONE" | "AEGIS_REGION" => word(rng, &["none", "", "eu-1a"]),
        // Others suggest less than the minimum below.
        "AEGIS_PRESET" => word(rng, &["none", "redis"]),
        "AEGIS_POOL_MIN_IDLE" => rng.usize(0..=16).to_string(),
        "AEGIS_POOL_MAX_IDLE" | "AEGIS_POOL_SIZE" => {
            rng.usize(64..=limits::POOL_IDLE_MAX).to_string()
        }
        "AEGIS_LOG" => word(rng, &["off", "warn,aegis::io=debug", "info"]),
        _ if variable.accepts().contains("(or 0)") && rng.u8(..) < 64 => "0".to_owned(),
        _ => text_of_shape(&variable.kind.shape(), rng).unwrap_or(variable.default.to_owned()),
    }
}

fn text_of_shape(shape: &Shape, rng: &mut fastrand::Rng) -> Option<String> {
    let mut texts: Vec<_> = rng.choice(&shape.words).map(ToString::to_string).into_iter().collect();
    match texts.first().map(String::as_str) {
        Some("on") => texts.push("true".to_owned()),
        Some("off") if shape.words.contains(&"on") => texts.push("false".to_owned()),
        _ => {}
    }
    texts.extend(shape.numbers.clone().map(|range| rng.u64(range).to_string()));
    if let Some(range) = &shape.durations {
        let ms = rng.u64(range.start().as_millis() as u64..=range.end().as_millis() as u64);
        let ms = if shape.whole_seconds { ms / 1000 * 1000 } else { ms };
        texts.extend([format!("{ms}ms"), format!("{}s {}ms", ms / 1000, ms % 1000)]);
    }
    rng.choice(texts)
}

/// Values that go together.
const TOGETHER: [&[(&str, &str)]; 4] = [
    &[("AEGIS_PROXY_PROTOCOL", "v1"), ("AEGIS_BACKUPS", "10.0.0.2:1,spare.example:2")],
    &[("AEGIS_PROXY_PROTOCOL", "v2"), ("AEGIS_PROTOCOL", "http1")],
    &[("AEGIS_PROTOCOL", "http1"), ("AEGIS_POOL_MODE", "session")],
    &[("AEGIS_PROTOCOL", "chronos"), ("AEGIS_POOL_MODE", "request"), ("AEGIS_BALANCE", "key_hash")],
];

#[test]
fn what_is_in_force_reads_back_as_the_same() {
    let mut rng = fastrand::Rng::with_seed(7);
    for round in 0..300 {
        let mut vars = Vec::new();
        for variable in VARIABLES.iter() {
            let apart = TOGETHER.concat().iter().all(|(name, _)| *name != variable.name);
            if round > 0 && apart && rng.u8(..) < 192 {
                vars.push((variable.name.to_owned(), random_text(variable, &mut rng)));
            }
        }
        let together = rng.choice(TOGETHER).unwrap();
        vars.extend(together.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())));
        let config = Config::from_vars(vars.clone()).unwrap_or_else(|e| panic!("{vars:?}: {e}"));
        assert_eq!(Config::from_vars(config.effective()), Ok(config), "{vars:?}");
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
        ("AEGIS_WORKERS", "1", "-1", "256", "257"),
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
        let accepts = VARIABLES.iter().find(|v| v.name == name).unwrap().accepts();
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

/// Texts of the bounds, and of what is just outside.
fn bounds(shape: &Shape, zero_is_word: bool) -> Option<([String; 2], Vec<String>)> {
    if let Some(range) = &shape.numbers {
        let (min, max) = (*range.start(), *range.end());
        let below = min.checked_sub(1).map_or("-1".to_owned(), |below| below.to_string());
        let above = u128::from(max) + 1;
        let mut outside = vec![above.to_string()];
        outside.extend((!zero_is_word).then_some(below));
        return Some(([min.to_string(), max.to_string()], outside));
    }
    let range = shape.durations.as_ref()?;
    let text = |duration: &Duration| format!("{}ms", duration.as_millis());
    let step = Duration::from_millis(if shape.whole_seconds { 1000 } else { 1 });
    let mut outside = vec![text(&(*range.end() + step))];
    outside.extend(range.start().checked_sub(step).as_ref().map(text));
    Some(([text(range.start()), text(range.end())], outside))
}

#[test]
fn every_range_is_kept_to_at_both_ends() {
    let mut count = 0;
    for variable in VARIABLES.iter() {
        let (name, accepts) = (variable.name, variable.accepts());
        let zero_is_word = accepts.contains("(or 0)");
        let Some((inside, outside)) = bounds(&variable.kind.shape(), zero_is_word) else {
            continue;
        };
        count += 1;
        for text in inside {
            let max_idle = ("AEGIS_POOL_MAX_IDLE", "4096");
            let vars = [max_idle, (name, &*text)];
            let vars = if name == max_idle.0 { &vars[1..] } else { &vars[..] };
            assert_eq!(problems(vars), [""; 0]);
        }
        for text in outside {
            let [problem] = &problems(&[(name, &text)])[..] else { panic!("{name}={text}") };
            assert!(problem.ends_with(&format!("Accepted: {accepts}.")), "{problem}");
        }
    }
    assert!(count > 30, "{count}");
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
        let accepts = VARIABLES.iter().find(|v| v.name == name).unwrap().accepts();
        assert!(accepts.contains(&format!("1 to {max} of")), "{accepts}");
    }
}
