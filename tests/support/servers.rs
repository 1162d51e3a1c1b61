//! Real databases: `PostgreSQL`, `MariaDB` and Redis as Debian packages them, each in a folder of its
//! own and ended when dropped, and the commands of their own clients.
//!
//! It uses nothing else of the tests, since the benchmarks have it too.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::ports;

/// `nobody` and its group: no server runs as root.
const NOBODY: u32 = 65534;
/// How long a server may take to answer after its start, and to end.
const START: Duration = Duration::from_secs(30);
const STOP: Duration = Duration::from_secs(10);

/// Where a client connects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Tcp(SocketAddr),
    /// What psql connects to is called `.s.PGSQL.PORT`.
    Unix(PathBuf),
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

/// A program that is to be there is not, and which package has it.
#[derive(Debug)]
pub struct Missing(pub String);

/// The programs of one package.
struct Programs {
    folders: Vec<PathBuf>,
    package: &'static str,
}

impl Programs {
    fn of(package: &'static str) -> Self {
        let usual = ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"];
        let mut folders: Vec<_> = usual.map(PathBuf::from).into();
        // Debian has the programs of each version of PostgreSQL in a folder of their own.
        let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
        folders.extend(versions.map(|version| version.path().join("bin")));
        Self { folders, package }
    }

    fn find(&self, name: &str) -> Result<PathBuf, Missing> {
        let found = self.folders.iter().map(|folder| folder.join(name)).find(|path| path.exists());
        found.ok_or_else(|| Missing(format!("{name} is missing: apt-get install {}", self.package)))
    }
}

/// A server that runs.
struct Server {
    child: Child,
    folder: TempDir,
    address: SocketAddr,
    /// What ends it without leaving anything behind.
    stop: Signal,
}

impl Server {
    /// Starts what `command` makes of a folder and an address, and waits until it answers.
    fn start(
        stop: Signal,
        (folder, address): (TempDir, SocketAddr),
        mut command: Command,
        mut answers: impl FnMut() -> Result<String, String>,
    ) -> Self {
        let log = File::create(folder.path().join("log")).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap();
        let mut server = Self { child, folder, address, stop };
        server.wait_for(&mut answers);
        server
    }

    /// Waits until it answers.
    fn wait_for(&mut self, answers: &mut dyn FnMut() -> Result<String, String>) {
        let deadline = Instant::now() + START;
        while let Err(why) = answers() {
            let ended = self.child.try_wait().unwrap();
            let log = || self.log();
            assert!(ended.is_none() && Instant::now() < deadline, "{why}; {ended:?}: {}", log());
            sleep(Duration::from_millis(10));
        }
    }

    /// What it has logged so far.
    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = kill_process(Pid::from_child(&self.child), self.stop);
        let deadline = Instant::now() + STOP;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = self.child.kill();
            }
            sleep(Duration::from_millis(5));
        }
    }
}

/// A folder for a server, and a free address of the loopback interface.
fn place() -> (TempDir, SocketAddr) {
    let folder = tempfile::tempdir().unwrap();
    if rustix::process::geteuid().is_root() {
        chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let address = ports::unused([127, 0, 0, 2].into());
    (folder, address)
}

fn as_nobody(program: &Path) -> Command {
    let mut command = Command::new(program);
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command.stdin(Stdio::null()).current_dir("/");
    command
}

/// Runs a program to its end: what it prints, or what it complains of.
pub fn output(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
    let (out, errors) = (text(&output.stdout), text(&output.stderr));
    if output.status.success() { Ok(out) } else { Err(format!("{out}\n{errors}")) }
}

fn option(name: &str, value: impl AsRef<OsStr>) -> OsString {
    let mut option = OsString::from(name);
    option.push(value);
    option
}

/// A `PostgreSQL` server with the superuser `aegis`, who needs no password, and a database `postgres`.
pub struct Postgres {
    server: Server,
    programs: PostgresPrograms,
}

#[derive(Clone)]
struct PostgresPrograms {
    postgres: PathBuf,
    base_backup: PathBuf,
    psql: PathBuf,
    pgbench: PathBuf,
}

impl PostgresPrograms {
    /// Starts a server with what is in its folder, and further settings.
    fn start(self, (folder, address): (TempDir, SocketAddr), settings: &[&str]) -> Postgres {
        let command = self.server(&folder, address, settings);
        let answers = self.answers(address);
        // Told to end at once it still gives its shared memory back.
        let server = Server::start(Signal::QUIT, (folder, address), command, answers);
        Postgres { server, programs: self }
    }

    fn server(&self, folder: &TempDir, address: SocketAddr, settings: &[&str]) -> Command {
        let mut command = as_nobody(&self.postgres);
        command.arg("-D").arg(folder.path().join("data"));
        let port = format!("port={}", address.port());
        let sockets = format!("unix_socket_directories={}", folder.path().display());
        let own = ["fsync=off", "listen_addresses=127.0.0.2", &port, &sockets];
        for setting in own.iter().chain(settings) {
            command.args(["-c", setting]);
        }
        command
    }

    fn answers(&self, address: SocketAddr) -> impl FnMut() -> Result<String, String> + use<> {
        let (psql, target) = (self.psql.clone(), Target::Tcp(address));
        move || output(at(Command::new(&psql).args(["-Atc", "select 1"]), &target))
    }
}

impl Postgres {
    /// Starts one with further settings, such as `authentication_timeout=1s`.
    pub fn start(settings: &[&str]) -> Result<Self, Missing> {
        let found = Programs::of("postgresql");
        let initdb = found.find("initdb")?;
        let programs = PostgresPrograms {
            postgres: found.find("postgres")?,
            base_backup: found.find("pg_basebackup")?,
            psql: found.find("psql")?,
            pgbench: found.find("pgbench")?,
        };
        let (folder, address) = place();
        let mut made = as_nobody(&initdb);
        made.args(["-A", "trust", "-U", "aegis", "--no-sync", "-D"]);
        output(made.arg(folder.path().join("data"))).unwrap();
        Ok(programs.start((folder, address), settings))
    }

    /// Starts a standby of it, which has what it has and follows it.
    pub fn start_standby(&self) -> Self {
        let (folder, address) = place();
        let mut copy = as_nobody(&self.programs.base_backup);
        copy.args(["-R", "-X", "stream", "-c", "fast", "--no-sync", "-D"]);
        copy.arg(folder.path().join("data"));
        output(at(&mut copy, &Target::Tcp(self.address()))).unwrap();
        self.programs.clone().start((folder, address), &[])
    }

    /// Makes a standby a primary.
    pub fn promote(&self) {
        let promoted = self.ask(&Target::Tcp(self.address()), "select pg_promote()");
        assert_eq!(promoted.as_deref(), Ok("t"));
    }

    /// Waits until it has ended, after [`Postgres::stop_fast`].
    pub fn wait(&mut self) {
        let deadline = Instant::now() + STOP;
        while self.server.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "it does not end: {}", self.server.log());
            sleep(Duration::from_millis(5));
        }
    }

    /// Starts it again, after it has ended, as a standby of another one.
    pub fn follow(&mut self, primary: &Self) {
        let data = self.server.folder.path().join("data");
        File::create(data.join("standby.signal")).unwrap();
        let (ip, port) = (primary.address().ip(), primary.address().port());
        let source = format!("primary_conninfo=host={ip} port={port} user=aegis");
        let (folder, address) = (&self.server.folder, self.server.address);
        let mut command = self.programs.server(folder, address, &[&source]);
        let log = File::options().append(true).open(folder.path().join("log")).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.server.child = command.spawn().unwrap();
        let mut answers = self.programs.answers(address);
        self.server.wait_for(&mut answers);
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.server.log()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address
    }

    /// Where else it listens.
    #[allow(dead_code, reason = "the benchmarks use it")]
    pub fn unix(&self) -> PathBuf {
        self.server.folder.path().join(format!(".s.PGSQL.{}", self.server.address.port()))
    }

    /// Tells it to end as at a switchover: clients are told, and cut.
    pub fn stop_fast(&self) {
        kill_process(Pid::from_child(&self.server.child), Signal::INT).unwrap();
    }

    /// psql at `target`.
    pub fn psql(&self, target: &Target) -> Command {
        let mut psql = Command::new(&self.programs.psql);
        at(psql.args(["-X", "-v", "ON_ERROR_STOP=1"]), target);
        psql
    }

    /// pgbench at `target`.
    pub fn pgbench(&self, target: &Target) -> Command {
        let mut pgbench = Command::new(&self.programs.pgbench);
        at(&mut pgbench, target);
        pgbench
    }

    /// What it answers to a statement: rows of `|`-separated columns.
    pub fn ask(&self, target: &Target, statement: &str) -> Result<String, String> {
        output(self.psql(target).args(["-Atc", statement]))
    }
}

/// Has a client of `PostgreSQL` connect there, without encryption.
fn at<'a>(client: &'a mut Command, target: &Target) -> &'a mut Command {
    client.env("PGUSER", "aegis").env("PGDATABASE", "postgres").env("PGSSLMODE", "disable");
    match target {
        Target::Tcp(address) => {
            client.env("PGHOST", address.ip().to_string());
            client.env("PGPORT", address.port().to_string())
        }
        Target::Unix(path) => {
            client.env("PGHOST", path.parent().unwrap());
            client.env("PGPORT", path.extension().unwrap())
        }
    }
}

/// A `MariaDB` server with the user `aegis`, whose password is `word`, and `root` on its socket.
pub struct MariaDb {
    server: Server,
    mariadb: PathBuf,
    slap: PathBuf,
}

impl MariaDb {
    /// Starts one with further options, such as `--connect-timeout=2`.
    pub fn start(options: &[&str]) -> Result<Self, Missing> {
        let programs = Programs::of("mariadb-server");
        let install = programs.find("mariadb-install-db")?;
        let mariadbd = programs.find("mariadbd")?;
        let programs = Programs::of("mariadb-client");
        let (mariadb, slap) = (programs.find("mariadb")?, programs.find("mariadb-slap")?);
        let (folder, address) = place();
        let path = |name| folder.path().join(name);
        let data = option("--datadir=", path("data"));
        // A server that starts deletes what looks like temporary tables, another's as well.
        let temporary = option("--tmpdir=", folder.path());
        let mut made = as_nobody(&install);
        made.args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]);
        output(made.args([&data, &temporary])).unwrap();
        let mut command = as_nobody(&mariadbd);
        command
            .args(["--no-defaults", "--bind-address=127.0.0.2", "--innodb-buffer-pool-size=32M"])
            .arg("--innodb-flush-log-at-trx-commit=0")
            .arg(option("--port=", address.port().to_string()))
            .args([
                &data,
                &temporary,
                &option("--socket=", path("socket")),
                &option("--pid-file=", path("pid")),
            ])
            .args(options);
        let target = Target::Unix(path("socket"));
        let ask = || {
            let mut client = Command::new(&mariadb);
            client.args(["--no-defaults", "-uroot", "-e"]).arg(
                // By the server's own socket one is `localhost`, where others come before `%`.
                "create user if not exists aegis@'%' identified by 'word'; \
                 create user if not exists aegis@localhost identified by 'word'; \
                 grant all on *.* to aegis@'%'; grant all on *.* to aegis@localhost",
            );
            output(of_mariadb(&mut client, &target))
        };
        let server = Server::start(Signal::KILL, (folder, address), command, ask);
        Ok(Self { server, mariadb, slap })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address
    }

    /// Where else it listens.
    pub fn unix(&self) -> PathBuf {
        self.server.folder.path().join("socket")
    }

    /// The client `mariadb` at `target`.
    pub fn mariadb(&self, target: &Target) -> Command {
        Self::client(&self.mariadb, target)
    }

    /// `mariadb-slap`, formerly mysqlslap, at `target`.
    pub fn slap(&self, target: &Target) -> Command {
        Self::client(&self.slap, target)
    }

    fn client(program: &Path, target: &Target) -> Command {
        let mut client = Command::new(program);
        client.args(["--no-defaults", "-uaegis", "-pword"]);
        of_mariadb(&mut client, target);
        client
    }

    /// What it answers to a statement: rows of tab-separated columns.
    pub fn ask(&self, target: &Target, statement: &str) -> Result<String, String> {
        output(self.mariadb(target).args(["-N", "-e", statement]))
    }

    /// What root is answered on the server's own socket, whatever limits hold for others.
    pub fn administer(&self, statement: &str) -> String {
        let mut root = Command::new(&self.mariadb);
        root.args(["--no-defaults", "-uroot", "-N", "-e", statement]);
        output(of_mariadb(&mut root, &Target::Unix(self.unix()))).unwrap()
    }

    /// One of its counters, such as `Aborted_connects`.
    pub fn status(&self, name: &str) -> u64 {
        let row = self.administer(&format!("show global status like '{name}'"));
        row.split_whitespace().last().unwrap().parse().unwrap()
    }
}

/// Has a client of `MariaDB` connect there.
fn of_mariadb<'a>(client: &'a mut Command, target: &Target) -> &'a mut Command {
    match target {
        Target::Tcp(address) => {
            let (ip, port) = (address.ip().to_string(), address.port().to_string());
            client.args(["--protocol=tcp", "-h", &ip, "-P", &port])
        }
        Target::Unix(path) => client.arg(option("--socket=", path)),
    }
}

/// A Redis server that keeps nothing on disk.
pub struct Redis {
    server: Server,
    cli: PathBuf,
    benchmark: PathBuf,
}

impl Redis {
    /// Starts one with further options, such as `--maxclients 10`.
    pub fn start(options: &[&str]) -> Result<Self, Missing> {
        let programs = Programs::of("redis-server redis-tools");
        let redis = programs.find("redis-server")?;
        let (cli, benchmark) = (programs.find("redis-cli")?, programs.find("redis-benchmark")?);
        let (folder, address) = place();
        let mut command = as_nobody(&redis);
        command
            .args(["--bind", "127.0.0.2", "--port", &address.port().to_string()])
            .args(["--save", "", "--appendonly", "no", "--dir"])
            .arg(folder.path())
            .arg("--unixsocket")
            .arg(folder.path().join("socket"))
            .args(options);
        let target = Target::Tcp(address);
        let ask = || output(of_redis(&mut Command::new(&cli), &target).arg("ping"));
        let server = Server::start(Signal::KILL, (folder, address), command, ask);
        Ok(Self { server, cli, benchmark })
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.server.log()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address
    }

    /// Where else it listens.
    #[allow(dead_code, reason = "the benchmarks use it")]
    pub fn unix(&self) -> PathBuf {
        self.server.folder.path().join("socket")
    }

    /// redis-benchmark at `target`.
    pub fn benchmark(&self, target: &Target) -> Command {
        let mut benchmark = Command::new(&self.benchmark);
        of_redis(&mut benchmark, target);
        benchmark
    }

    /// What it answers to a command.
    pub fn ask(&self, target: &Target, command: &[&str]) -> Result<String, String> {
        // With -e an error of the server's is one of the client's.
        output(of_redis(&mut Command::new(&self.cli), target).arg("-e").args(command))
    }
}

/// Has a client of Redis connect there.
fn of_redis<'a>(client: &'a mut Command, target: &Target) -> &'a mut Command {
    match target {
        Target::Tcp(address) => {
            client.args(["-h", &address.ip().to_string(), "-p", &address.port().to_string()])
        }
        Target::Unix(path) => client.arg("-s").arg(path),
    }
}
