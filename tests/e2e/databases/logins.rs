//! Servers that limit the time for a login, and one that counts those that came to nothing and then
//! locks the host out.

use crate::support::metrics::POOL_DISCARDS;
use crate::support::proxy::Proxy;
use crate::support::servers::{MariaDb, Postgres, Target, output};
use crate::support::{Io, measured};

use super::{drivers, in_front_of, installed};

const TARGET: &str = "aegis_pool_target";
/// Workers of the proxy.
const WORKERS: u64 = 2;

/// A proxy that would keep many.
fn start(io: Io, address: std::net::SocketAddr) -> Proxy {
    in_front_of(io, address).pool(4, 64).start()
}

fn dead(proxy: &Proxy) -> u64 {
    proxy.metric(POOL_DISCARDS, &[("reason", "dead")])
}

#[test]
fn postgres_ends_few_logins_that_nobody_needs() {
    let Some(server) = installed(Postgres::start(&["authentication_timeout=1s"])) else { return };
    for io in drivers() {
        let proxy = start(io, server.address());
        let ask = || server.ask(&Target::Tcp(proxy.address()), "select 6 * 7");
        assert_eq!(ask().as_deref(), Ok("42"));
        proxy.wait_for(TARGET, &[], |target| target == 0);
        let ended = dead(&proxy);
        measured(&format!("{}: {ended} connections were ended", io.name()));
        assert!(ended <= 8 * WORKERS, "{ended}");
        for _ in 0..20 {
            assert_eq!(ask().as_deref(), Ok("42"));
        }
        let more = dead(&proxy) - ended;
        assert!(more <= 2 * WORKERS, "{more} more");
    }
}

#[test]
fn mariadb_does_not_lock_the_host_out() {
    let options = ["--max-connect-errors=3", "--connect-timeout=2"];
    let Some(server) = installed(MariaDb::start(&options)) else { return };
    for io in drivers() {
        // Of its own host the server does not count errors, but what it would have counted is known.
        let before = server.status("Aborted_connects");
        let proxy = start(io, server.address());
        let ask = || server.ask(&Target::Tcp(proxy.address()), "select 6 * 7");
        proxy.wait_for(TARGET, &[], |target| target == 0);
        let ended = server.status("Aborted_connects") - before;
        measured(&format!("{}: {ended} logins were aborted", io.name()));
        // With three in a row the host would be locked out.
        assert!(ended <= WORKERS, "{ended}");
        let mut crowd = server.slap(&proxy.address().into());
        crowd.args(["--concurrency=100", "--iterations=4", "--create-schema=slap"]);
        crowd.args(["--create=create table t (i int)", "--query=insert into t values (1)"]);
        output(&mut crowd).unwrap();
        // What was kept again for the sake of these four crowds ends like the others, one at a time. A server
        // that a crowd keeps from answering in time is ejected, and probed by a login that nobody needs.
        proxy.wait_for(TARGET, &[], |target| target == 0);
        let ended = server.status("Aborted_connects") - before;
        let probes = proxy.metric("aegis_endpoint_ejections_total", &[]);
        assert!(ended <= (1 + 4) * WORKERS + probes, "{ended}, beside {probes} ejections");
        assert_eq!(ask().as_deref(), Ok("42"));
    }
}
