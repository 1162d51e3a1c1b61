//! What an idle session costs.

use std::net::TcpStream;

use crate::support::backend::Crowd;
use crate::support::client::{ask, try_connect};
use crate::support::metrics::SESSIONS_ACTIVE;
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, heavy, measured, on_both_drivers};

on_both_drivers![an_idle_session_takes_less_than_4_kib_of_user_memory];

fn an_idle_session_takes_less_than_4_kib_of_user_memory(io: Io) {
    const SESSIONS: u64 = 5000;
    const SESSION_BYTES_MAX: u64 = 4096;
    let _alone = heavy();
    let backend = Crowd::new();
    let proxy =
        Builder::on(io).backends(&[backend.address()]).set("AEGIS_IDLE_TIMEOUT", "off").start();

    let before = Memory::of(&proxy);
    let clients: Vec<TcpStream> = (0..SESSIONS)
        .map(|_| {
            let client = try_connect(proxy.address()).unwrap();
            assert_eq!(ask(&client, "PING"), "PING");
            client
        })
        .collect();
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == SESSIONS);
    let after = Memory::of(&proxy);

    let pss = (after.pss_kb.saturating_sub(before.pss_kb) << 10) / SESSIONS;
    let anonymous = (after.anonymous_kb.saturating_sub(before.anonymous_kb) << 10) / SESSIONS;
    measured(&format!(
        "{pss} B of PSS and {anonymous} B of RssAnon for each of {SESSIONS} idle sessions \
         ({} kB before, {} kB after)",
        before.pss_kb, after.pss_kb
    ));
    assert!(pss < SESSION_BYTES_MAX && anonymous < SESSION_BYTES_MAX);
    drop(clients);
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
}

struct Memory {
    pss_kb: u64,
    anonymous_kb: u64,
}

impl Memory {
    fn of(proxy: &Proxy) -> Self {
        Self {
            pss_kb: proxy.memory_kb("smaps_rollup", "Pss"),
            anonymous_kb: proxy.memory_kb("status", "RssAnon"),
        }
    }
}
