//! The loads, each by the server's own tool.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::servers::{MariaDb, Missing, Postgres, Redis, Target, output};

/// The servers that run.
pub struct Databases {
    postgres: Postgres,
    mariadb: MariaDb,
    redis: Redis,
}

#[derive(Debug, Clone, Copy)]
pub enum Server {
    Postgres,
    MariaDb,
    Redis,
}

impl Server {
    pub const ALL: [Self; 3] = [Self::Postgres, Self::MariaDb, Self::Redis];
}

/// Where clients connect: a port and a Unix socket.
#[derive(Debug, Clone)]
pub struct Targets {
    pub tcp: SocketAddr,
    pub unix: PathBuf,
}

impl Targets {
    /// Either of them, in the order of the table.
    pub fn both(&self) -> [Target; 2] {
        [Target::Tcp(self.tcp), Target::Unix(self.unix.clone())]
    }
}

impl Databases {
    pub fn start() -> Result<Self, Missing> {
        let postgres = Postgres::start(&["max_connections=300", "shared_buffers=256MB"])?;
        let own = Target::Tcp(postgres.address());
        let filled = output(postgres.pgbench(&own).args(["-i", "-q", "-s", "10"]));
        assert!(filled.is_ok(), "{filled:?}");
        let mariadb = MariaDb::start(&["--max-connections=300"])?;
        Ok(Self { postgres, mariadb, redis: Redis::start(&[])? })
    }

    pub fn targets(&self, server: Server) -> Targets {
        let (tcp, unix) = match server {
            Server::Postgres => (self.postgres.address(), self.postgres.unix()),
            Server::MariaDb => (self.mariadb.address(), self.mariadb.unix()),
            Server::Redis => (self.redis.address(), self.redis.unix()),
        };
        Targets { tcp, unix }
    }
}

/// What a tool says of its run.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Transactions, queries or commands.
    pub count: u64,
    pub per_second: f64,
    /// Milliseconds, of tools that say so.
    pub p99_ms: Option<f64>,
}

/// A load of about so many seconds.
pub struct Load {
    pub name: &'static str,
    pub about: &'static str,
    pub server: Server,
    pub run: fn(&Databases, &Target, u32) -> Result<Done, String>,
}

/// All of them, in the order of the table.
pub const LOADS: &[Load] = &[
    Load {
        name: "pgbench-write",
        about: "`pgbench -c 50 -M prepared`: transactions",
        server: Server::Postgres,
        run: |databases, target, seconds| {
            pgbench(&databases.postgres, target, seconds, &["-c", "50", "-M", "prepared"])
        },
    },
    Load {
        name: "pgbench-read",
        about: "`pgbench -S -c 50 -M prepared`: selects",
        server: Server::Postgres,
        run: |databases, target, seconds| {
            pgbench(&databases.postgres, target, seconds, &["-S", "-c", "50", "-M", "prepared"])
        },
    },
    Load {
        name: "pgbench-connect",
        about: "`pgbench -S -C -c 10`: a new connection for each select",
        server: Server::Postgres,
        run: |databases, target, seconds| {
            pgbench(&databases.postgres, target, seconds, &["-S", "-C", "-c", "10"])
        },
    },
    Load {
        name: "mariadb-slap",
        about: "`mariadb-slap --concurrency=50`: inserts and selects by key",
        server: Server::MariaDb,
        run: |databases, target, seconds| slap(&databases.mariadb, target, seconds),
    },
    Load {
        name: "redis-get",
        about: "`redis-benchmark -c 200 -t get`",
        server: Server::Redis,
        run: |databases, target, seconds| {
            redis(&databases.redis, target, 40_000 * u64::from(seconds), &["-t", "get"])
        },
    },
    Load {
        name: "redis-pipeline",
        about: "`redis-benchmark -c 200 -P 16 -t set`",
        server: Server::Redis,
        run: |databases, target, seconds| {
            redis(
                &databases.redis,
                target,
                300_000 * u64::from(seconds),
                &["-P", "16", "-t", "set"],
            )
        },
    },
];

/// A number from a report.
fn number(text: Option<&str>, report: &str) -> Result<f64, String> {
    let number = text.and_then(|text| text.trim().parse().ok());
    number.ok_or_else(|| format!("a number is missing in {report:?}"))
}

/// What follows `name` at the beginning of a line, up to the next blank.
fn field<'a>(report: &'a str, name: &str) -> Option<&'a str> {
    let rest = report.lines().find_map(|line| line.trim().strip_prefix(name))?;
    rest.split_whitespace().next()
}

fn pgbench(
    server: &Postgres,
    target: &Target,
    seconds: u32,
    options: &[&str],
) -> Result<Done, String> {
    let seconds = seconds.to_string();
    let mut tool = server.pgbench(target);
    let report = output(tool.args(["-n", "-j", "2", "-T", &seconds]).args(options))?;
    let failed = number(field(&report, "number of failed transactions:"), &report)?;
    if failed > 0.0 {
        return Err(report);
    }
    let count = number(field(&report, "number of transactions actually processed:"), &report)?;
    // A server that waits for a slow disk may finish nothing in a short run, and has no rate then.
    let per_second = if count > 0.0 { number(field(&report, "tps ="), &report)? } else { 0.0 };
    Ok(Done { count: count as u64, per_second, p99_ms: None })
}

fn slap(server: &MariaDb, target: &Target, seconds: u32) -> Result<Done, String> {
    let count = 5_000 * u64::from(seconds);
    let mut tool = server.slap(target);
    tool.args(["--concurrency=50", &format!("--number-of-queries={count}"), "--delimiter=;"]);
    tool.arg("--create=create table t (id int auto_increment primary key, v int)");
    tool.arg("--query=insert into t (v) values (1); select v from t where id = 1");
    let report = output(&mut tool)?;
    let seconds = number(field(&report, "Average number of seconds to run all queries:"), &report)?;
    Ok(Done { count, per_second: count as f64 / seconds, p99_ms: None })
}

fn redis(server: &Redis, target: &Target, count: u64, options: &[&str]) -> Result<Done, String> {
    let mut tool = server.benchmark(target);
    let report = output(tool.args(["-c", "200", "--csv", "-n", &count.to_string()]).args(options))?;
    // "test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms",…
    let row: Vec<_> = report.lines().last().unwrap_or_default().split(',').collect();
    let column = |at: usize| number(row.get(at).map(|text| text.trim_matches('"')), &report);
    Ok(Done { count, per_second: column(1)?, p99_ms: Some(column(6)?) })
}
