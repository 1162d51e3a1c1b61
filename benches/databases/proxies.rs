//! What stands between a load tool and its server, each set up alike and with two threads.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

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

/// One that runs, where it is a program; killed when dropped.
pub struct Proxy {
    /// Where clients connect.
    pub address: SocketAddr,
    child: Option<Child>,
    folder: tempfile::TempDir,
}

impl Proxy {
    /// Starts it in front of `server`, and waits until it listens.
    pub fn start(contestant: Contestant, server: SocketAddr) -> Result<Self, String> {
        let context = |error: io::Error| format!("starting {contestant}: {error}");
        let folder = tempfile::tempdir().map_err(context)?;
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(context)?;
        let address = free.local_addr().map_err(context)?;
        drop(free);
        let command = match contestant {
            Contestant::Direct => None,
            Contestant::Uring => Some(aegis("uring", address, server)),
            Contestant::Epoll => Some(aegis("epoll", address, server)),
            Contestant::Haproxy => {
                let file = folder.path().join("haproxy.cfg");
                fs::write(&file, haproxy(address, server)).map_err(context)?;
                let mut command = Command::new("haproxy");
                command.args(["-db", "-f"]).arg(file);
                Some(command)
            }
        };
        let Some(mut command) = command else {
            return Ok(Self { address: server, child: None, folder });
        };
        let log = File::create(folder.path().join("log")).map_err(context)?;
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(context)?).stderr(log);
        let child = command.spawn().map_err(context)?;
        let proxy = Self { address, child: Some(child), folder };
        let deadline = Instant::now() + START;
        while let Err(error) = TcpStream::connect(address) {
            if Instant::now() > deadline {
                let log = fs::read_to_string(proxy.folder.path().join("log"));
                return Err(format!("{contestant}: {error}\n{}", log.unwrap_or_default()));
            }
            sleep(Duration::from_millis(10));
        }
        Ok(proxy)
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

fn aegis(io: &str, listen: SocketAddr, server: SocketAddr) -> Command {
    let mut command = Command::new(AEGIS);
    command.env_clear().envs([
        ("AEGIS_IO", io.to_owned()),
        ("AEGIS_LISTEN", listen.to_string()),
        ("AEGIS_BACKENDS", server.to_string()),
        ("AEGIS_ADMIN", "127.0.0.1:0".to_owned()),
        ("AEGIS_WORKERS", WORKERS.to_string()),
        ("AEGIS_LOG", "warn".to_owned()),
    ]);
    command
}

/// As in `benches/compare`: a listener for each thread, and no logging.
fn haproxy(listen: SocketAddr, server: SocketAddr) -> String {
    format!(
        "global\n  nbthread {WORKERS}\n  maxconn 4000\n\
         defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n\
         listen bench\n  bind {listen} backlog 4096 shards by-thread\n  server server {server}\n"
    )
}
