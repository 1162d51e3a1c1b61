//! Real databases behind warm connections: `PostgreSQL`, which limits the time for a login, and
//! `MariaDB`, which also counts those that came to nothing and then locks the host out.

use std::ffi::OsStr;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::support::metrics::POOL_DISCARDS;
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, measured, skip, uring_unavailable};

/// `nobody` and its group: neither server runs as root.
const NOBODY: u32 = 65534;
const TARGET: &str = "aegis_pool_target";
/// Workers of the proxy.
const WORKERS: u64 = 2;

/// A server in a folder of its own; killed when dropped.
struct Server {
    child: Child,
    folder: TempDir,
    address: SocketAddr,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Postgres's own processes go with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The programs of a server, where they are installed.
fn find(names: &[&str], folders: &[PathBuf]) -> Option<Vec<PathBuf>> {
    let found = names.iter().map(|name| {
        let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.exists());
        if found.is_none() {
            skip(&format!("{name} is not installed"));
        }
        found
    });
    found.collect()
}

fn usual_folders() -> Vec<PathBuf> {
    ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"].map(PathBuf::from).into()
}

fn as_nobody(program: &Path) -> Command {
    let mut command = Command::new(program);
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    command
}

fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    if rustix::process::geteuid().is_root() {
        chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    folder
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.2:0").unwrap().local_addr().unwrap()
}

/// What a client program prints.
fn output(client: &mut Command) -> Result<String, String> {
    let output = client.stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn drivers() -> Vec<Io> {
    let uring = uring_unavailable().is_none().then_some(Io::Uring);
    uring.into_iter().chain([Io::Epoll]).collect()
}

/// A proxy whose pools are as by default.
fn start(io: Io, server: &Server) -> Proxy {
    Builder::on(io).backends(&[server.address]).pool(4, 64).start()
}

fn dead(proxy: &Proxy) -> u64 {
    proxy.metric(POOL_DISCARDS, &[("reason", "dead")])
}

#[test]
fn postgres_ends_few_logins_that_nobody_needs() {
    let mut folders = usual_folders();
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    folders.extend(versions.map(|version| version.unwrap().path().join("bin")));
    let Some(programs) = find(&["initdb", "postgres", "psql"], &folders) else { return };
    let (folder, address) = (folder(), free_address());
    let data = folder.path().join("data");
    let made = as_nobody(&programs[0])
        .args(["-A", "trust", "-U", "aegis", "--no-sync", "-D"])
        .arg(&data)
        .status();
    assert!(made.unwrap().success());
    let child = as_nobody(&programs[1])
        .arg("-D")
        .arg(&data)
        .args([
            "-c",
            "authentication_timeout=1s",
            "-c",
            "fsync=off",
            "-c",
            "listen_addresses=127.0.0.2",
        ])
        .args(["-c", &format!("port={}", address.port())])
        .args(["-c", &format!("unix_socket_directories={}", folder.path().display())])
        .spawn();
    let server = Server { child: child.unwrap(), folder, address };
    let ask = |address: SocketAddr| {
        let target = format!(
            "host={} port={} user=aegis dbname=postgres sslmode=disable",
            address.ip(),
            address.port()
        );
        output(Command::new(&programs[2]).args([&target, "-Atc", "select 6 * 7"]))
    };
    eventually("the server is ready", PATIENCE, || ask(server.address).ok());
    for io in drivers() {
        let proxy = start(io, &server);
        assert_eq!(ask(proxy.address()).as_deref(), Ok("42"));
        proxy.wait_for(TARGET, &[], |target| target == 0);
        let ended = dead(&proxy);
        measured(&format!("{}: {ended} connections were ended", io.name()));
        assert!(ended <= 8 * WORKERS, "{ended}");
        for _ in 0..20 {
            assert_eq!(ask(proxy.address()).as_deref(), Ok("42"));
        }
        let more = dead(&proxy) - ended;
        assert!(more <= 2 * WORKERS, "{more} more");
    }
}

#[test]
fn mariadb_does_not_lock_the_host_out() {
    let names = ["mariadb-install-db", "mariadbd", "mariadb"];
    let Some(programs) = find(&names, &usual_folders()) else { return };
    let (folder, address) = (folder(), free_address());
    let path = |name: &str| folder.path().join(name);
    let option = |name: &str, value: &OsStr| {
        let mut option = std::ffi::OsString::from(name);
        option.push(value);
        option
    };
    let (data, socket) = (path("data"), path("socket"));
    let data = option("--datadir=", data.as_os_str());
    let made = as_nobody(&programs[0])
        .args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"])
        .arg(&data)
        .status();
    assert!(made.unwrap().success());
    let child = as_nobody(&programs[1])
        .args(["--no-defaults", "--max-connect-errors=3", "--connect-timeout=2"])
        .args(["--bind-address=127.0.0.2", "--innodb-buffer-pool-size=16M"])
        .arg(format!("--port={}", address.port()))
        .args([&data, &option("--socket=", socket.as_os_str())])
        .arg(option("--pid-file=", path("pid").as_os_str()))
        .spawn();
    let server = Server { child: child.unwrap(), folder, address };
    let socket = server.folder.path().join("socket");
    let administer = |statement: &str| {
        let mut client = Command::new(&programs[2]);
        client.args(["--no-defaults", "-N", "-uroot", "-e", statement]);
        output(client.arg(option("--socket=", socket.as_os_str())))
    };
    eventually("the server is ready", PATIENCE, || administer("select 1").ok());
    administer("create user aegis@'%' identified by 'word'").unwrap();
    // Of its own host the server does not count errors, but what it would have counted is known.
    let aborted = || -> u64 {
        let row = administer("show global status like 'Aborted_connects'").unwrap();
        row.split_whitespace().last().unwrap().parse().unwrap()
    };
    let ask = |address: SocketAddr| {
        let mut client = Command::new(&programs[2]);
        client.args(["--no-defaults", "-N", "-uaegis", "-pword", "-e", "select 6 * 7"]);
        let (ip, port) = (address.ip().to_string(), address.port().to_string());
        output(client.args(["--protocol=tcp", "-h", &ip, "-P", &port]))
    };
    for io in drivers() {
        let before = aborted();
        let proxy = start(io, &server);
        proxy.wait_for(TARGET, &[], |target| target == 0);
        let ended = aborted() - before;
        measured(&format!("{}: {ended} logins were aborted", io.name()));
        // With three in a row the host would be locked out.
        assert!(ended <= WORKERS, "{ended}");
        for _ in 0..20 {
            assert_eq!(ask(proxy.address()).as_deref(), Ok("42"));
        }
        // Those that were kept again, for the sake of these twenty, end like the others.
        proxy.wait_for(TARGET, &[], |target| target == 0);
        let ended = aborted() - before;
        assert!(ended <= 2 * WORKERS, "{ended}");
    }
}
