//! A switchover of `PostgreSQL` of seven seconds, as an operator does it: the primary stops, a standby
//! is promoted, the old primary follows it, and at last the label of the primary moves.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::client::{is_timeout, try_connect};
use crate::support::kube_api::{KubeApi, NAMESPACE};
use crate::support::proxy::{Builder, Proxy};
use crate::support::servers::{Postgres, Target, output};
use crate::support::{Io, SetOnDrop, eventually, measured, on_both_drivers};

use super::installed;

on_both_drivers!(a_switchover_of_postgres_is_waited_out);

/// From the end of the old primary to the label of the new one.
const SWITCHOVER: Duration = Duration::from_secs(7);
/// Clients that keep a session and connect again when it is cut.
const CLIENTS: usize = 6;
/// A connection that was accepted as the server ended may be cut so much later.
const SETTLED: Duration = Duration::from_secs(1);
/// Standbys are level within this.
const LEVEL: Duration = Duration::from_secs(20);

/// Why a client's session is over.
#[derive(Debug)]
enum Over {
    /// It was not accepted.
    Refused(io::Error),
    /// It was cut.
    Cut(io::Error),
    /// The server said so, and ended it.
    Told(String),
}

/// A session with the simplest of the protocol: what a client knows for certain, byte by byte.
struct Session(TcpStream);

impl Session {
    fn begin(address: SocketAddr) -> Result<Self, Over> {
        let mut session = Self(try_connect(address).map_err(Over::Refused)?);
        let mut startup = 196_608_u32.to_be_bytes().to_vec();
        startup.extend(b"user\0aegis\0database\0postgres\0\0");
        session.send(&startup)?;
        session.until_ready()?;
        Ok(session)
    }

    fn run(&mut self, statement: &str) -> Result<(), Over> {
        self.0.write_all(b"Q").map_err(Over::Cut)?;
        self.send(format!("{statement}\0").as_bytes())?;
        self.until_ready()
    }

    fn send(&mut self, body: &[u8]) -> Result<(), Over> {
        let len = (body.len() as u32 + 4).to_be_bytes();
        self.0.write_all(&[&len, body].concat()).map_err(Over::Cut)
    }

    fn until_ready(&mut self) -> Result<(), Over> {
        loop {
            let mut head = [0; 5];
            self.0.read_exact(&mut head).map_err(Over::Cut)?;
            let len = u32::from_be_bytes(head[1..].try_into().unwrap());
            let mut body = vec![0; len as usize - 4];
            self.0.read_exact(&mut body).map_err(Over::Cut)?;
            match head[0] {
                b'Z' => return Ok(()),
                b'E' => return Err(Over::Told(String::from_utf8_lossy(&body).into_owned())),
                _ => {}
            }
        }
    }
}

/// What a client has seen.
#[derive(Default)]
struct Seen {
    /// Rows that the server has said are committed.
    committed: Vec<u32>,
    over: Vec<(Instant, Over)>,
    /// From a commit to the next, at most.
    longest: Duration,
}

/// Writes a row after the other, and connects again when its session is over.
fn write(address: SocketAddr, client: usize, stop: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    let (mut session, mut row) = (None, 0);
    let mut latest = Instant::now();
    while !stop.load(Relaxed) {
        row += 1;
        let outcome = session.take().map_or_else(|| Session::begin(address), Ok);
        let outcome = outcome.and_then(|mut session| {
            session.run(&format!("insert into written values ({client}, {row})"))?;
            Ok(session)
        });
        match outcome {
            Ok(kept) => {
                seen.committed.push(row);
                seen.longest = seen.longest.max(latest.elapsed());
                latest = Instant::now();
                session = Some(kept);
                thread::sleep(Duration::from_millis(10));
            }
            Err(over) => seen.over.push((Instant::now(), over)),
        }
    }
    seen
}

/// Runs of pgbench with a connection for each transaction: when each began, how many transactions it
/// says are done, and what it complains of.
type Run = (Instant, u64, Option<String>);

fn bench(server: &Postgres, address: SocketAddr, stop: &AtomicBool) -> Vec<Run> {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("script");
    std::fs::write(&script, "insert into benched values (:client_id);\n").unwrap();
    let mut runs = Vec::new();
    while !stop.load(Relaxed) {
        let begun = Instant::now();
        let mut pgbench = server.pgbench(&address.into());
        pgbench.args(["-n", "-C", "-c", "2", "-t", "5", "-f"]).arg(&script);
        let (report, complaint) = match output(&mut pgbench) {
            Ok(report) => (report, None),
            Err(report) => (report.clone(), Some(report)),
        };
        let done = report.lines().find_map(|line| {
            let count = line.strip_prefix("number of transactions actually processed: ")?;
            count.split('/').next()?.parse().ok()
        });
        runs.push((begun, done.unwrap_or(0), complaint));
    }
    runs
}

fn label(role: &str) -> Value {
    json!({"cnpg.io/cluster": "orders", "cnpg.io/instanceRole": role})
}

fn start(io: Io, api: &KubeApi) -> Proxy {
    Builder::on(io)
        .kubernetes(api)
        .set("AEGIS_KUBE_SERVICE", "none")
        .set("AEGIS_KUBE_NAMESPACE", NAMESPACE)
        .set("AEGIS_KUBE_SELECTOR", "cnpg.io/cluster=orders,cnpg.io/instanceRole=primary")
        .set("AEGIS_KUBE_PORT", "chronos")
        .set("AEGIS_PRESET", "postgres")
        .set("AEGIS_BACKEND_DRAIN", "0s")
        .set("AEGIS_ENDPOINT_WAIT", "60s")
        .start()
}

/// Moves the primary from one server to the other. Returns when the old one had ended.
fn switch_over(api: &KubeApi, old: &mut Postgres, new: &Postgres) -> Instant {
    let begun = Instant::now();
    old.stop_fast();
    old.wait();
    let ended = Instant::now();
    api.label_pod("orders-1", &label("replica"));
    new.promote();
    old.follow(new);
    // It serves readers now. Nobody may meet it who wants to write.
    thread::sleep(SWITCHOVER.saturating_sub(begun.elapsed()));
    api.label_pod("orders-2", &label("primary"));
    ended
}

fn a_switchover_of_postgres_is_waited_out(io: Io) {
    let Some(mut old) = installed(Postgres::start(&[])) else { return };
    let ask = |server: &Postgres, statement: &str| {
        server.ask(&Target::Tcp(server.address()), statement).unwrap()
    };
    ask(&old, "create table written (client int, row int); create table benched (client int)");
    let new = old.start_standby();
    let api = KubeApi::start();
    api.pod("orders-1", &label("primary"), old.address());
    api.pod("orders-2", &label("replica"), new.address());
    let proxy = start(io, &api);
    proxy.wait_for_endpoints(1);
    let address = proxy.address();
    let stop = AtomicBool::new(false);
    let (ended, seen, runs) = thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        let stop = &stop;
        let writers: Vec<_> =
            (0..CLIENTS).map(|client| scope.spawn(move || write(address, client, stop))).collect();
        let bench = scope.spawn(|| bench(&new, address, stop));
        thread::sleep(Duration::from_secs(1));
        let ended = switch_over(&api, &mut old, &new);
        thread::sleep(Duration::from_secs(1));
        stop.store(true, Relaxed);
        let seen: Vec<_> = writers.into_iter().map(|one| one.join().unwrap()).collect();
        (ended, seen, bench.join().unwrap())
    });
    for (at, over) in seen.iter().flat_map(|seen| &seen.over) {
        assert!(*at < ended + SETTLED, "a client failed after the old primary's end: {over:?}");
        match over {
            Over::Refused(error) => panic!("a client is refused: {error}"),
            Over::Cut(error) => assert!(!is_timeout(error), "a client hangs: {error}"),
            Over::Told(what) => {
                assert!(what.contains("57P01") || what.contains("57P03"), "{what}");
            }
        }
    }
    for (begun, _, complaint) in &runs {
        let complaint = complaint.as_deref().unwrap_or_default();
        assert!(!complaint.contains("refused"), "{complaint}");
        assert!(*begun < ended || complaint.is_empty(), "{complaint}");
    }
    check_rows(&new, &old, &seen, &runs);
    let longest = seen.iter().map(|seen| seen.longest).max().unwrap();
    let cut: usize = seen.iter().map(|seen| seen.over.len()).sum();
    measured(&format!("{}: {cut} errors of {CLIENTS} clients, {longest:?} at most", io.name()));
    assert!(longest + Duration::from_secs(1) >= SWITCHOVER, "they wrote all the time: {longest:?}");
}

/// Each row that a client was told is committed is on the new primary, once, and the old one has just
/// what that has: nothing was written to it since.
fn check_rows(new: &Postgres, old: &Postgres, seen: &[Seen], runs: &[Run]) {
    let ask = |server: &Postgres, statement: &str| {
        server.ask(&Target::Tcp(server.address()), statement).unwrap()
    };
    let rows = ask(new, "select client, row from written");
    let kept: HashSet<_> = rows.lines().collect();
    assert_eq!(kept.len(), rows.lines().count(), "no row was written twice");
    for (client, seen) in seen.iter().enumerate() {
        assert!(seen.committed.len() > 2, "client {client} has hardly written");
        for row in &seen.committed {
            assert!(kept.contains(&*format!("{client}|{row}")), "row {row} of {client} is lost");
        }
    }
    let done: u64 = runs.iter().map(|(_, done, _)| done).sum();
    let benched: u64 = ask(new, "select count(*) from benched").parse().unwrap();
    assert!(done > 0 && benched >= done, "{benched} of {done} transactions are there");
    let all = "select (select count(*) || md5(string_agg(client || ':' || row, ',' order by client, row)) \
               from written), (select count(*) from benched), pg_is_in_recovery()";
    let (wanted, here) = (ask(new, all), |all| ask(old, all));
    let wanted = wanted.replace("|f", "|t");
    eventually("the old primary has followed", LEVEL, || (here(all) == wanted).then_some(()));
}
