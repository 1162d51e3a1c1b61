//! What `docs/DATABASES.md` says about the servers, and about what passes through.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;

use tempfile::TempDir;

use crate::support::metrics::POOL_CONNECTIONS;
use crate::support::servers::{MariaDb, Postgres, Redis, Target};
use crate::support::{PATIENCE, eventually};

use super::{drivers, in_front_of, installed};

/// A certificate of `db.example` by itself, and its key, for a server that runs as nobody.
struct Certificate {
    _folder: TempDir,
    pem: PathBuf,
    key: PathBuf,
}

impl Certificate {
    fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(["db.example".to_owned()]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let [certificate, key] = ["certificate", "key"].map(|name| folder.path().join(name));
        fs::write(&certificate, made.cert.pem()).unwrap();
        fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
        if rustix::process::geteuid().is_root() {
            chown(&key, Some(65534), Some(65534)).unwrap();
        }
        Self { _folder: folder, pem: certificate, key }
    }
}

#[test]
fn tls_of_postgres_passes_through() {
    let made = Certificate::new();
    let certificate = format!("ssl_cert_file={}", made.pem.display());
    let key = format!("ssl_key_file={}", made.key.display());
    let Some(server) = installed(Postgres::start(&["ssl=on", &certificate, &key])) else { return };
    for io in drivers() {
        let proxy = in_front_of(io, server.address()).start();
        let mut psql = server.psql(&proxy.address().into());
        // The name is that of the certificate, the address the proxy's.
        psql.env("PGSSLMODE", "verify-full").env("PGSSLROOTCERT", &made.pem);
        psql.env("PGHOST", "db.example").env("PGHOSTADDR", proxy.address().ip().to_string());
        psql.args(["-Atc", "select ssl from pg_stat_ssl where pid = pg_backend_pid()"]);
        assert_eq!(crate::support::servers::output(&mut psql).as_deref(), Ok("t"));
    }
}

#[test]
fn tls_of_mariadb_passes_through() {
    let made = Certificate::new();
    let certificate = format!("--ssl-cert={}", made.pem.display());
    let key = format!("--ssl-key={}", made.key.display());
    let Some(server) = installed(MariaDb::start(&[&certificate, &key])) else { return };
    for io in drivers() {
        let proxy = in_front_of(io, server.address()).start();
        let mut client = server.mariadb(&proxy.address().into());
        client.arg("--ssl").arg(format!("--ssl-ca={}", made.pem.display()));
        client.args(["-N", "-e", "show status like 'Ssl_version'"]);
        let version = crate::support::servers::output(&mut client).unwrap();
        assert!(version.contains("TLSv1"), "{version}");
    }
}

#[test]
fn a_warm_connection_takes_a_place_of_mariadb_and_redis_and_half_a_one_of_postgres() {
    const WARM: u64 = 40;
    // A place for each process that waits for a login, of about twice as many as may log in.
    let postgres = Postgres::start(&["max_connections=10", "superuser_reserved_connections=0"]);
    let mariadb = MariaDb::start(&["--max-connections=10"]);
    let redis = Redis::start(&["--maxclients", "20"]);
    let (Some(postgres), Some(mariadb), Some(redis)) =
        (installed(postgres), installed(mariadb), installed(redis))
    else {
        return;
    };
    let io = drivers().pop().unwrap();
    let keep = |address| {
        let proxy = in_front_of(io, address).set("AEGIS_WORKERS", "1").pool(WARM, WARM).start();
        (Target::Tcp(address), proxy)
    };
    let (target, proxy) = keep(postgres.address());
    proxy.wait_for(POOL_CONNECTIONS, &[], |count| count == WARM);
    assert_eq!(postgres.ask(&target, "select 42").as_deref(), Ok("42"), "though 10 may log in");
    drop(proxy);
    let (target, proxy) = keep(redis.address());
    eventually("redis has no place left", PATIENCE, || {
        let refusal = redis.ask(&target, &["ping"]).err()?;
        refusal.contains("max number of clients reached").then_some(())
    });
    drop(proxy);
    // Of a server that speaks first one is kept, so that these are others. Root has a place more.
    let mute: Vec<_> = (0..11).map(|_| std::net::TcpStream::connect(mariadb.address())).collect();
    eventually("mariadb has no place left", PATIENCE, || {
        let refusal = mariadb.ask(&Target::Tcp(mariadb.address()), "select 42").err()?;
        refusal.contains("Too many connections").then_some(())
    });
    drop(mute);
}

#[test]
fn postgres_logs_a_check_only_where_it_logs_all_connections_and_redis_does_not() {
    let checked = |address| {
        let io = drivers().pop().unwrap();
        let proxy =
            in_front_of(io, address).set("AEGIS_CHECK_INTERVAL", "100ms").without_pool().start();
        proxy.wait_for("aegis_endpoint_checks_total", &[], |checks| checks >= 3);
        assert_eq!(proxy.metric("aegis_endpoint_check_failures_total", &[]), 0);
    };
    for setting in ["off", "on"] {
        let log_connections = format!("log_connections={setting}");
        let Some(server) = installed(Postgres::start(&[&log_connections])) else { return };
        let before = server.log().len();
        checked(server.address());
        // What it logs of a question comes behind what it logs of the checks.
        server.ask(&Target::Tcp(server.address()), "select 42").unwrap();
        let log = server.log().split_off(before);
        let logs_checks = log.lines().filter(|line| line.contains("connection received")).count();
        assert_eq!(logs_checks > 3, setting == "on", "{log}");
        assert!(setting == "on" || log.is_empty(), "{log}");
    }
    let Some(redis) = installed(Redis::start(&[])) else { return };
    let before = redis.log();
    checked(redis.address());
    redis.ask(&Target::Tcp(redis.address()), &["ping"]).unwrap();
    assert_eq!(redis.log(), before);
}

#[test]
fn a_client_hears_what_postgres_says_when_it_is_stopped() {
    for io in drivers() {
        let Some(server) = installed(Postgres::start(&[])) else { return };
        let proxy = in_front_of(io, server.address()).start();
        let mut psql = server.psql(&proxy.address().into());
        psql.args(["-c", "select pg_sleep(600)"]);
        psql.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
        let client = psql.spawn().unwrap();
        let count = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'";
        let own = Target::Tcp(server.address());
        eventually("it sleeps", PATIENCE, || {
            (server.ask(&own, count).as_deref() == Ok("1")).then_some(())
        });
        server.stop_fast();
        let said = client.wait_with_output().unwrap().stderr;
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains("terminating connection due to administrator command"), "{said}");
    }
}
