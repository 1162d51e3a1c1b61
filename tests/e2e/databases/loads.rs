//! The servers' own load tools run through the proxy unchanged, by TCP and by Unix sockets: no error,
//! and nothing lost or done twice.

use std::path::Path;
use std::thread;

use crate::support::proxy::Builder;
use crate::support::sandbox::hand_over;
use crate::support::servers::{MariaDb, Postgres, Redis, Target, output};
use crate::support::{Io, heavy, measured};

use super::{assert_all_finished, drivers, installed};

/// The line of a load tool's report that begins with `name`, without that.
fn field<'a>(report: &'a str, name: &str) -> &'a str {
    let found = report.lines().find_map(|line| line.trim().strip_prefix(name));
    found.unwrap_or_else(|| panic!("no {name:?} in {report}")).trim()
}

/// Transactions of 50 clients that read and write.
fn load_postgres(server: &Postgres, target: &Target) {
    let own = Target::Tcp(server.address());
    let rows = || -> u64 {
        server.ask(&own, "select count(*) from pgbench_history").unwrap().parse().unwrap()
    };
    let before = rows();
    let mut load = server.pgbench(target);
    let report = output(load.args(["-n", "-c", "50", "-j", "2", "-t", "10", "-M", "prepared"]));
    let report = report.unwrap();
    assert_eq!(field(&report, "number of transactions actually processed:"), "500/500");
    assert!(field(&report, "number of failed transactions:").starts_with("0 "), "{report}");
    measured(&format!("pgbench: {} transactions/s", field(&report, "tps =")));
    assert_eq!(rows() - before, 500, "each transaction adds a row");
    let sums = server.ask(
        &own,
        "select (select sum(abalance) from pgbench_accounts), \
         (select sum(bbalance) from pgbench_branches), \
         (select sum(tbalance) from pgbench_tellers), \
         (select sum(delta) from pgbench_history)",
    );
    let sums = sums.unwrap();
    let sums: Vec<_> = sums.split('|').collect();
    assert!(sums.iter().all(|sum| *sum == sums[0]), "each transaction adds to all: {sums:?}");
    // And a new connection for each of many small ones.
    let mut churn = server.pgbench(target);
    let report = output(churn.args(["-n", "-C", "-S", "-c", "10", "-j", "2", "-t", "20"])).unwrap();
    assert_eq!(field(&report, "number of transactions actually processed:"), "200/200");
}

/// Inserts and reads of 50 clients.
fn load_mariadb(server: &MariaDb, target: &Target) {
    const QUERIES: u64 = 3000;
    let queries = format!("--number-of-queries={QUERIES}");
    let mut load = server.slap(target);
    load.args(["--concurrency=50", &queries, "--no-drop", "--delimiter=;", "--create-schema=slap"]);
    load.arg("--create=create table t (id int auto_increment primary key, v int)");
    load.arg("--query=insert into t (v) values (1); select max(id) from t");
    let report = output(&mut load).unwrap();
    measured(&format!("{QUERIES} queries in s: {}", seconds_of(&report)));
    // Every other one was an insert.
    assert_eq!(server.administer("select count(*), sum(v) from slap.t"), "1500\t1500");
    server.administer("drop schema slap");
    // And the tool's own mix.
    let mut mix = server.slap(target);
    mix.args(["--concurrency=50", "--number-of-queries=1000", "--auto-generate-sql"]);
    mix.args(["--auto-generate-sql-load-type=mixed", "--auto-generate-sql-write-number=50"]);
    output(&mut mix).unwrap();
}

fn seconds_of(report: &str) -> &str {
    let seconds = field(report, "Average number of seconds to run all queries:");
    seconds.split_whitespace().next().unwrap()
}

/// Commands of 200 clients, one at a time and 16 at a time.
fn load_redis(server: &Redis, target: &Target) {
    let own = Target::Tcp(server.address());
    let ask = |command: &[&str]| server.ask(&own, command).unwrap();
    ask(&["flushall"]);
    let run = |more: &[&str]| {
        let mut load = server.benchmark(target);
        let report = output(load.args(["-c", "200", "-q", "--csv"]).args(more)).unwrap();
        measured(&report.lines().skip(1).collect::<Vec<_>>().join(" "));
    };
    run(&["-n", "20000", "-t", "set,get,incr,lpush"]);
    assert_eq!(ask(&["get", "counter:__rand_int__"]), "20000", "each INCR counts once");
    assert_eq!(ask(&["llen", "mylist"]), "20000", "each LPUSH adds one");
    run(&["-n", "50000", "-P", "16", "--threads", "2", "-t", "incr"]);
    assert_eq!(ask(&["get", "counter:__rand_int__"]), "70000");
    // Values that take several reads, and a new connection for each command.
    run(&["-n", "2000", "-d", "100000", "-t", "set,get"]);
    assert_eq!(ask(&["strlen", "key:__rand_int__"]), "100000");
    run(&["-n", "2000", "-k", "0", "-t", "incr"]);
    assert_eq!(ask(&["get", "counter:__rand_int__"]), "72000");
}

/// Listens on both kinds of sockets.
fn listen(socket: &Path) -> String {
    format!("127.0.0.1:0,unix:{}", socket.display())
}

/// All three loads at a time, each on a route of its own, first by TCP and then by Unix sockets.
fn load_all(io: Io, postgres: &Postgres, mariadb: &MariaDb, redis: &Redis) {
    let folder = tempfile::tempdir().unwrap();
    hand_over(folder.path());
    // psql connects to no other name.
    let sockets = [".s.PGSQL.5432", "shop", "cache"].map(|name| folder.path().join(name));
    let mut builder = Builder::on(io).set("AEGIS_ROUTES", "orders,shop,cache");
    for (route, socket, address, preset) in [
        ("ORDERS", &sockets[0], postgres.address(), "postgres"),
        ("SHOP", &sockets[1], mariadb.address(), "mysql"),
        ("CACHE", &sockets[2], redis.address(), "redis"),
    ] {
        builder = builder
            .set(&format!("AEGIS_{route}__LISTEN"), listen(socket))
            .set(&format!("AEGIS_{route}__BACKENDS"), address.to_string())
            .set(&format!("AEGIS_{route}__PRESET"), preset);
    }
    let proxy = builder.start();
    let listening = proxy.log_events("listening").into_iter();
    let ports = listening.filter_map(|event| event["address"].as_str().unwrap().parse().ok());
    let ports: Vec<_> = ports.map(Target::Tcp).collect();
    for [orders, shop, cache] in [ports.try_into().unwrap(), sockets.map(Target::Unix)] {
        measured(&format!("orders at {orders:?}"));
        thread::scope(|scope| {
            scope.spawn(|| load_postgres(postgres, &orders));
            scope.spawn(|| load_mariadb(mariadb, &shop));
            scope.spawn(|| load_redis(redis, &cache));
        });
        assert_all_finished(&proxy);
    }
    assert_eq!(mariadb.status("Aborted_clients"), 0, "every client has said that it leaves");
    assert_eq!(mariadb.status("Aborted_connects"), 0, "and nobody came for nothing");
}

#[test]
fn one_process_serves_all_three_and_nothing_is_lost_or_done_twice() {
    let servers = (Postgres::start(&[]), MariaDb::start(&[]), Redis::start(&[]));
    let (Some(postgres), Some(mariadb), Some(redis)) =
        (installed(servers.0), installed(servers.1), installed(servers.2))
    else {
        return;
    };
    let _alone = heavy();
    let own = Target::Tcp(postgres.address());
    output(postgres.pgbench(&own).args(["-i", "-q", "-s", "2"])).unwrap();
    for io in drivers() {
        load_all(io, &postgres, &mariadb, &redis);
    }
}
