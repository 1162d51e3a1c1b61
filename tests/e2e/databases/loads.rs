//! The servers' own load tools run through the proxy unchanged: no error, and nothing lost or done
//! twice.

use crate::support::servers::{MariaDb, Postgres, Redis, Target, output};
use crate::support::{heavy, measured};

use super::{assert_all_finished, drivers, in_front_of, installed};

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
    let report = output(load.args(["-n", "-c", "50", "-j", "2", "-T", "2", "-M", "prepared"]));
    let report = report.unwrap();
    let done: u64 = field(&report, "number of transactions actually processed:").parse().unwrap();
    assert!(field(&report, "number of failed transactions:").starts_with("0 "), "{report}");
    measured(&format!("pgbench: {done} transactions"));
    assert!(done > 0);
    assert_eq!(rows() - before, done, "each transaction adds a row");
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

#[test]
fn pgbench_loses_nothing_and_does_nothing_twice() {
    let Some(server) = installed(Postgres::start(&[])) else { return };
    let _alone = heavy();
    let own = Target::Tcp(server.address());
    output(server.pgbench(&own).args(["-i", "-q", "-s", "2"])).unwrap();
    for io in drivers() {
        let proxy = in_front_of(io, server.address()).start();
        load_postgres(&server, &proxy.address().into());
        assert_all_finished(&proxy);
    }
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

#[test]
fn mariadb_slap_loses_nothing_and_does_nothing_twice() {
    let Some(server) = installed(MariaDb::start(&[])) else { return };
    let _alone = heavy();
    for io in drivers() {
        let proxy = in_front_of(io, server.address()).start();
        load_mariadb(&server, &proxy.address().into());
        assert_all_finished(&proxy);
        assert_eq!(server.status("Aborted_clients"), 0, "every client has said that it leaves");
    }
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

#[test]
fn redis_benchmark_loses_nothing_and_does_nothing_twice() {
    let Some(server) = installed(Redis::start(&[])) else { return };
    let _alone = heavy();
    for io in drivers() {
        let proxy = in_front_of(io, server.address()).start();
        load_redis(&server, &proxy.address().into());
        assert_all_finished(&proxy);
    }
}
