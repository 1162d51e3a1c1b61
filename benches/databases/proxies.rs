//! What stands between a load tool and its server, each set up alike and with two threads.

use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::loads::{Databases, Server, Targets};
use crate::usage::{Processes, Usage};

const WORKERS: usize = 2;
const START: Duration = Duration::from_secs(5);
const AEGIS: &str = env!("CARGO_BIN_EXE_aegis-proxy");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contestant {
    Direct,
    Uring,
    Epoll,
    Haproxy,
}

impl Contestant {
    pub const ALL: &[Self] = &[Self::Direct, Self::Uring, Self::Epoll, Self::Haproxy];
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "no proxy",
            Self::Uring => "Aegis io_uring",
            Self::Epoll => "Aegis epoll",
            Self::Haproxy => "HAProxy",
        })
    }
}

/// One that runs, where it is a program, in front of all servers; killed when dropped.
pub struct Proxy {
    /// Where clients of each server connect.
    targets: Vec<Targets>,
    child: Option<Child>,
    folder: tempfile::TempDir,
}

impl Proxy {
    /// Starts it in front of the servers, and waits until it listens for all of them.
    pub fn start(contestant: Contestant, databases: &Databases) -> Result<Self, String> {
        let context = |error: io::Error| format!("starting {contestant}: {error}");
        let folder = tempfile::tempdir().map_err(context)?;
        let servers = Server::ALL.map(|server| databases.targets(server));
        let targets: Vec<_> = (0..servers.len())
            .map(|at| free(&folder, at))
            .collect::<io::Result<_>>()
            .map_err(context)?;
        let routes: Vec<_> =
            targets.iter().zip(servers.each_ref().map(|server| server.tcp)).collect();
        let mut command = match contestant {
            Contestant::Direct => {
                return Ok(Self { targets: servers.into(), child: None, folder });
            }
            Contestant::Haproxy => {
                let file = folder.path().join("haproxy.cfg");
                fs::write(&file, haproxy(&routes)).map_err(context)?;
                let mut command = Command::new("haproxy");
                command.args(["-db", "-f"]).arg(file);
                command
            }
            Contestant::Epoll => aegis("epoll", &routes),
            Contestant::Uring => aegis("uring", &routes),
        };
        let log = File::create(folder.path().join("log")).map_err(context)?;
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(context)?).stderr(log);
        let child = command.spawn().map_err(context)?;
        let proxy = Self { targets, child: Some(child), folder };
        let deadline = Instant::now() + START;
        while let Err(error) = proxy.targets.iter().try_for_each(connect) {
            if Instant::now() > deadline {
                let log = fs::read_to_string(proxy.folder.path().join("log"));
                return Err(format!("{contestant}: {error}\n{}", log.unwrap_or_default()));
            }
            sleep(Duration::from_millis(10));
        }
        Ok(proxy)
    }

    /// Where clients of a server connect.
    pub fn targets(&self, server: Server) -> &Targets {
        &self.targets[server as usize]
    }

    /// What it has used until now.
    pub fn usage(&self) -> Usage {
        self.child.as_ref().map_or(Usage::default(), |child| Processes(vec![child.id()]).usage())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // Both fail where it has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A free port, and the path of a socket in the folder.
fn free(folder: &tempfile::TempDir, at: usize) -> io::Result<Targets> {
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    // psql connects to no other name.
    let unix = folder.path().join(format!(".s.PGSQL.{}", at + 1));
    Ok(Targets { tcp, unix })
}

fn connect(targets: &Targets) -> io::Result<()> {
    TcpStream::connect(targets.tcp).and(UnixStream::connect(&targets.unix)).map(drop)
}

/// One route for each server.
fn aegis(io: &str, routes: &[(&Targets, SocketAddr)]) -> Command {
    let mut command = Command::new(AEGIS);
    let names = ["orders", "shop", "cache"];
    command.env_clear().envs([
        ("AEGIS_IO", io.to_owned()),
        ("AEGIS_ROUTES", names.join(",")),
        ("AEGIS_ADMIN", "127.0.0.1:0".to_owned()),
        ("AEGIS_WORKERS", WORKERS.to_string()),
        ("AEGIS_LOG", "warn".to_owned()),
    ]);
    for (name, (targets, server)) in names.iter().zip(routes) {
        let variable = |setting: &str| format!("AEGIS_{}__{setting}", name.to_uppercase());
        let listen = format!("{},unix:{}", targets.tcp, targets.unix.display());
        command.env(variable("LISTEN"), listen).env(variable("BACKENDS"), server.to_string());
    }
    command
}

/// As in `benches/compare`: a listener for each thread where there can be, and no logging.
fn haproxy(routes: &[(&Targets, SocketAddr)]) -> String {
    let mut text = format!(
        "global\n  nbthread {WORKERS}\n  maxconn 4000\n\
         defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n"
    );
    for (at, (targets, server)) in routes.iter().enumerate() {
        let (port, path) = (targets.tcp, targets.unix.display());
        let _ = write!(
            text,
            "listen bench{at}\n  bind {port} backlog 4096 shards by-thread\n  \
             bind unix@{path} backlog 4096\n  server server {server}\n"
        );
    }
    text
}
