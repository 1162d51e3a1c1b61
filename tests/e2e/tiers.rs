//! Endpoints that stand in for others: `AEGIS_BACKUPS`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, BlackHole, Memory};
use crate::support::client::{ask, ask_once, connect};
use crate::support::metrics::{POOL_CONNECTIONS, SESSIONS_CLOSED};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, measured, on_both_drivers};

on_both_drivers![
    backups_serve_while_no_backend_is_usable_and_backends_again_after_a_while,
    a_backend_that_is_silent_costs_one_connect_timeout,
    requests_go_to_backups_while_no_backend_is_usable,
    while_nobody_is_usable_clients_wait_for_whoever_returns_first,
    what_is_wrong_about_backups_is_told_at_once,
];

const TIER: &str = "aegis_endpoint_tier";
const FAILBACK: Duration = Duration::from_secs(1);

fn tiered(io: Io, backends: &[SocketAddr], backups: &[SocketAddr]) -> Builder {
    let backups: Vec<_> = backups.iter().map(SocketAddr::to_string).collect();
    Builder::on(io)
        .backends(backends)
        .set("AEGIS_BACKUPS", backups.join(","))
        .set("AEGIS_FAILBACK_TIME", "1s")
        .set("AEGIS_EJECT_TIME", "100ms")
}

/// Who answers 20 sessions.
fn who(proxy: &Proxy) -> Vec<String> {
    let mut who: Vec<_> = (0..20).map(|_| ask_once(proxy.address(), "who").unwrap()).collect();
    who.sort_unstable();
    who.dedup();
    who
}

fn backups_serve_while_no_backend_is_usable_and_backends_again_after_a_while(io: Io) {
    let (mut a, mut b) = (Backend::named("a"), Backend::named("b"));
    let spare = Backend::named("spare");
    let proxy = tiered(io, &[a.address(), b.address()], &[spare.address()]).pool(2, 4).start();
    assert_eq!(who(&proxy), ["a", "b"]);
    a.kill();
    eventually("the other one serves alone", PATIENCE, || (who(&proxy) == ["b"]).then_some(()));
    assert_eq!(spare.accepted(), 0, "neither sessions nor warm connections");
    assert_eq!(proxy.metric(TIER, &[]), 0);

    b.kill();
    assert_eq!(who(&proxy), ["spare"], "nobody is refused, and nobody waits long");
    let held = connect(proxy.address());
    assert_eq!(ask(&held, "who"), "spare");
    // Each of the two workers finds out by itself.
    proxy.wait_for(TIER, &[], |tiers| tiers == 2);
    let name = spare.address().to_string();
    let idle = [("endpoint", name.as_str()), ("state", "idle")];
    proxy.wait_for(POOL_CONNECTIONS, &idle, |idle| idle >= 4);

    let returned = Instant::now();
    a.start();
    eventually("the backend is used again", PATIENCE, || {
        (ask_once(proxy.address(), "who").unwrap() == "a").then_some(())
    });
    let after = returned.elapsed();
    measured(&format!("used again {after:?} after its return"));
    assert!(after >= FAILBACK, "{after:?}");
    proxy.wait_for(TIER, &[], |tiers| tiers == 0);
    assert_eq!(who(&proxy), ["a"]);
    assert_eq!(ask(&held, "who"), "spare", "a session stays where it is");
    proxy.wait_for(POOL_CONNECTIONS, &idle, |idle| idle == 0);
    for lost in ["connect_failed", "connect_timeout", "no_endpoint"] {
        assert_eq!(proxy.metric(SESSIONS_CLOSED, &[("reason", lost)]), 0);
    }
    eventually("both changes are logged", PATIENCE, || {
        let back = proxy.log_events("endpoints that others stood in for are in use again");
        (back.len() == 1).then_some(())
    });
    let left = proxy.log_events("other endpoints stand in");
    assert_eq!(left.len(), 1, "{left:?}");
    let why = left[0]["unusable"].as_str().unwrap();
    assert!(why.contains(&b.address().to_string()), "{why}");
    let row = &proxy.get("/backends?limit=3").json()["endpoints"][2];
    assert_eq!((row["name"].as_str(), row["tier"].as_u64()), (Some(&name[..]), Some(1)));
}

fn a_backend_that_is_silent_costs_one_connect_timeout(io: Io) {
    const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
    let (hole, spare) = (BlackHole::new(), Backend::named("spare"));
    for wait in ["5s", "0s"] {
        let proxy = tiered(io, &[hole.address()], &[spare.address()])
            .without_pool()
            .set("AEGIS_WORKERS", "1")
            .set("AEGIS_CONNECT_TIMEOUT", "500ms")
            .set("AEGIS_ENDPOINT_WAIT", wait)
            .start();
        for count in 1..5 {
            let begun = Instant::now();
            assert_eq!(ask_once(proxy.address(), "who").unwrap(), "spare");
            let took = begun.elapsed();
            assert!((count > 1) == (took < CONNECT_TIMEOUT), "{count}: {took:?}");
        }
    }
}

fn requests_go_to_backups_while_no_backend_is_usable(io: Io) {
    let any = "127.0.0.2:0".parse().unwrap();
    let store = |name: &str| {
        let memory = Memory::default();
        memory.lock().unwrap().insert("who".to_owned(), name.to_owned());
        Backend::chronos_on(any, &memory)
    };
    let (mut first, spare) = (store("first"), store("spare"));
    for mode in ["request", "session"] {
        let proxy = tiered(io, &[first.address()], &[spare.address()])
            .protocol("chronos", mode)
            .set("AEGIS_WORKERS", "1")
            .start();
        let get = || ask_once(proxy.address(), "GET who").unwrap();
        let before = spare.accepted();
        assert_eq!([get(), get(), get()], ["first"; 3]);
        assert_eq!(spare.accepted(), before);
        first.kill();
        assert_eq!([get(), get(), get()], ["spare"; 3], "{mode}");
        first.start();
        let returned = Instant::now();
        eventually("the first is used again", PATIENCE, || (get() == "first").then_some(()));
        assert!(returned.elapsed() >= FAILBACK, "{mode}: {:?}", returned.elapsed());
        eventually("no connection to the other is kept", PATIENCE, || {
            (spare.open() == 0).then_some(())
        });
    }
}

fn while_nobody_is_usable_clients_wait_for_whoever_returns_first(io: Io) {
    let (mut first, mut spare) = (Backend::named("first"), Backend::named("spare"));
    let proxy =
        tiered(io, &[first.address()], &[spare.address()]).set("AEGIS_ENDPOINT_WAIT", "1m").start();
    for (name, returns_first) in [("spare", false), ("first", true)] {
        first.kill();
        spare.kill();
        let waiting: Vec<_> = (0..8).map(|_| connect(proxy.address())).collect();
        proxy.wait_for("aegis_clients_waiting", &[], |waiting| waiting == 8);
        if returns_first {
            first.start();
        } else {
            spare.start();
        }
        assert!(waiting.iter().all(|client| ask(client, "who") == name));
        if returns_first {
            spare.start();
        } else {
            first.start();
        }
        eventually("the first is used", PATIENCE, || (who(&proxy) == ["first"]).then_some(()));
    }
}

fn what_is_wrong_about_backups_is_told_at_once(io: Io) {
    let ended = Builder::on(io)
        .set("AEGIS_BACKENDS", "127.0.0.2:9")
        .set("AEGIS_BACKUPS", "127.0.0.3:9,127.0.0.2:9")
        .set("AEGIS_FAILBACK_TIME", "soon")
        .run();
    assert_eq!(ended.code, Some(78));
    for part in ["nothing stands in for itself", "AEGIS_FAILBACK_TIME=\"soon\""] {
        assert!(ended.errors.contains(part), "{}", ended.errors);
    }
}
