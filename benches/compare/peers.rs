//! The contestants: how each is set up for this job, started, watched and stopped.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process};

use crate::load;
use crate::net::{self, Address, Transport};
use crate::scenarios::Scenario;
use crate::usage::Processes;

/// Workers or threads of every contestant.
pub const WORKERS: usize = 2;
/// Backend connections of Aegis where clients share them.
const POOL_SIZE: usize = 16;
/// Sessions that every contestant is set up for.
const SESSIONS: usize = 9_000;
const START: Duration = Duration::from_secs(5);
const STOP: Duration = Duration::from_secs(5);
const NGINX_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// What carries the bytes on either side of a contestant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// TCP on both
    Tcp,
    /// A Unix socket for clients, TCP to the backend
    UnixClients,
    /// Unix sockets on both
    Unix,
}

impl Way {
    pub const ALL: &[Self] = &[Self::Tcp, Self::UnixClients, Self::Unix];

    pub fn of_clients(self) -> Transport {
        if self == Self::Tcp { Transport::Tcp } else { Transport::Unix }
    }

    pub fn of_backend(self) -> Transport {
        if self == Self::Unix { Transport::Unix } else { Transport::Tcp }
    }
}

/// One that takes part in a scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub contestant: Contestant,
    pub way: Way,
}

impl Entry {
    /// What it is called in the report.
    pub fn name(self) -> String {
        let way = match self.way {
            Way::Tcp => "",
            Way::UnixClients => ", Unix",
            Way::Unix => ", Unix both",
        };
        format!("{}{way}", self.contestant.name())
    }
}

/// What stands between the load and the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub enum Contestant {
    /// Nothing
    Direct,
    /// Aegis on `io_uring`
    Uring,
    /// Aegis on epoll
    Epoll,
    /// Aegis on `io_uring`, connections shared request by request
    Request,
    /// What `--other` names, on `io_uring`
    Other,
    /// The same, on epoll
    OtherEpoll,
    /// `HAProxy`, mode tcp
    Haproxy,
    /// nginx, module stream
    Nginx,
    /// What no proxy can do without
    Floor,
}

impl Contestant {
    pub const ALL: &[Self] = &[
        Self::Direct,
        Self::Uring,
        Self::Epoll,
        Self::Request,
        Self::Other,
        Self::OtherEpoll,
        Self::Haproxy,
        Self::Nginx,
        Self::Floor,
    ];

    /// What it is called in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "no proxy",
            Self::Uring => "Aegis io_uring",
            Self::Epoll => "Aegis epoll",
            Self::Request => "Aegis request",
            Self::Other => "other io_uring",
            Self::OtherEpoll => "other epoll",
            Self::Haproxy => "HAProxy",
            Self::Nginx => "nginx",
            Self::Floor => "the floor",
        }
    }

    /// Whether Aegis is compared with it.
    pub fn is_peer(self) -> bool {
        matches!(self, Self::Haproxy | Self::Nginx)
    }

    /// Whether it is a program beside the load and the backend.
    pub fn is_proxy(self) -> bool {
        !matches!(self, Self::Direct | Self::Floor)
    }

    /// Whether `--other` says what it is.
    pub fn is_other(self) -> bool {
        matches!(self, Self::Other | Self::OtherEpoll)
    }

    /// How many processes it runs as.
    fn processes(self) -> usize {
        if self == Self::Nginx { WORKERS + 1 } else { 1 }
    }

    /// Exactly what is run. Fails with what to install if it is missing.
    pub fn version(self) -> Result<String, String> {
        let first_line = |program: &str, argument: &str, package: &str| {
            let output = Command::new(program).arg(argument).output().map_err(|error| {
                format!("{program} does not start ({error}): apt-get install {package}")
            })?;
            let text = [output.stdout, output.stderr].concat();
            Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned())
        };
        match self {
            Self::Direct | Self::Floor => Ok(self.name().to_owned()),
            Self::Uring | Self::Epoll | Self::Request => {
                first_line(AEGIS, "--version", "nothing, cargo builds it")
            }
            Self::Other | Self::OtherEpoll => match OTHER.get() {
                Some(Other { command, watched }) => {
                    let watched = watched.map(|reads| format!(", read {reads} times a second"));
                    Ok(command.join(" ") + &watched.unwrap_or_default())
                }
                None => Err(format!("--other is missing, which says what {} is", self.name())),
            },
            Self::Haproxy => first_line("haproxy", "-v", "haproxy"),
            Self::Nginx if Path::new(NGINX_MODULE).exists() => {
                first_line("nginx", "-v", "nginx libnginx-mod-stream")
            }
            Self::Nginx => {
                Err(format!("{NGINX_MODULE} is missing: apt-get install nginx libnginx-mod-stream"))
            }
        }
    }
}

pub const AEGIS: &str = env!("CARGO_BIN_EXE_aegis-proxy");

/// Another build of Aegis, or this one with other settings.
#[derive(Debug)]
pub struct Other {
    pub command: Vec<String>,
    /// How many times a second its status is read while it is measured.
    pub watched: Option<u32>,
}

pub static OTHER: OnceLock<Other> = OnceLock::new();

/// A contestant that runs; it stops with this handle.
pub struct Running {
    pub entry: Entry,
    /// Where clients connect.
    pub address: Address,
    /// Its admin port, and how many times a second it is to be read, if so.
    pub watched: Option<(SocketAddr, u32)>,
    child: Option<Child>,
    pub processes: Processes,
    /// Bytes of user space before the first connection.
    pub memory_at_start: u64,
    _folder: tempfile::TempDir,
}

impl Running {
    /// Starts it in front of `backend`, and waits until it serves.
    pub fn start(entry: Entry, backend: &Address, scenario: &Scenario) -> Result<Self, String> {
        let contestant = entry.contestant;
        let context = |error: io::Error| format!("starting {}: {error}", entry.name());
        let folder = tempfile::tempdir().map_err(context)?;
        let address = Address::free(entry.way.of_clients(), &folder.path().join("socket"));
        let address = address.map_err(context)?;
        let reads = OTHER.get().filter(|_| contestant.is_other()).and_then(|other| other.watched);
        let watched = reads.map(|reads| Ok((net::free()?, reads))).transpose().map_err(context)?;
        let command = command(contestant, &address, backend, scenario, folder.path());
        let command = command.map_err(context)?;
        let Some(mut command) = command else {
            return Ok(Self {
                entry,
                address: backend.clone(),
                watched: None,
                child: None,
                processes: Processes::default(),
                memory_at_start: 0,
                _folder: folder,
            });
        };
        if let Some((admin, _)) = watched {
            command.env("AEGIS_ADMIN", admin.to_string());
        }
        let log = folder.path().join("log");
        let output = File::create(&log).map_err(context)?;
        command.stdin(Stdio::null()).stdout(output.try_clone().map_err(context)?).stderr(output);
        let child = command.spawn().map_err(context)?;
        let processes = Processes(vec![child.id()]);
        let mut running = Self {
            entry,
            address,
            watched,
            child: Some(child),
            processes,
            memory_at_start: 0,
            _folder: folder,
        };
        let deadline = Instant::now() + START;
        while let Err(error) = load::connect(&running.address, 1, 0) {
            let ended = running.child.as_mut().is_some_and(|c| !matches!(c.try_wait(), Ok(None)));
            if ended || Instant::now() > deadline {
                let log = fs::read_to_string(&log).unwrap_or_default();
                return Err(format!("{} does not serve: {error}\n{log}", entry.name()));
            }
            sleep(Duration::from_millis(10));
        }
        // The first worker may serve before the last one is there.
        let first = running.processes.0[0];
        while running.processes.0.len() < contestant.processes() {
            if Instant::now() > deadline {
                return Err(format!("{} runs as {:?} only", entry.name(), running.processes));
            }
            running.processes = Processes::of(first);
        }
        running.memory_at_start = running.processes.memory();
        Ok(running)
    }

    fn stop(child: &mut Child) {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let deadline = Instant::now() + STOP;
        let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = child.kill();
            }
            sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            Self::stop(child);
        }
    }
}

fn command(
    contestant: Contestant,
    listen: &Address,
    backend: &Address,
    scenario: &Scenario,
    folder: &Path,
) -> io::Result<Option<Command>> {
    let file = folder.join("configuration");
    let mut command = match contestant {
        Contestant::Direct | Contestant::Floor => return Ok(None),
        Contestant::Uring
        | Contestant::Epoll
        | Contestant::Request
        | Contestant::Other
        | Contestant::OtherEpoll => {
            let other = OTHER.get().filter(|_| contestant.is_other());
            let words = |other: &'static Other| other.command.iter().map(String::as_str).collect();
            let mut words = other.map_or(vec![AEGIS], words);
            let mut command = Command::new(words.remove(0));
            command.args(words);
            let on_epoll = matches!(contestant, Contestant::Epoll | Contestant::OtherEpoll);
            let io = if on_epoll { "epoll" } else { "uring" };
            // Many workers take descriptors of their own.
            let sessions = if scenario.workers > WORKERS { SESSIONS / 2 } else { SESSIONS };
            command.env_clear().envs([
                ("AEGIS_LISTEN", listen.to_string()),
                ("AEGIS_ADMIN", "127.0.0.1:0".to_owned()),
                ("AEGIS_BACKENDS", backend.to_string()),
                ("AEGIS_WORKERS", scenario.workers.to_string()),
                ("AEGIS_MAX_SESSIONS", sessions.to_string()),
                ("AEGIS_IO", io.to_owned()),
                ("AEGIS_LOG", "warn".to_owned()),
                ("AEGIS_DRAIN_DELAY", "0s".to_owned()),
                ("AEGIS_DRAIN_TIMEOUT", "0s".to_owned()),
            ]);
            if scenario.pools && contestant != Contestant::Uring {
                command.envs([
                    ("AEGIS_PROTOCOL", "chronos".to_owned()),
                    ("AEGIS_POOL_MODE", "request".to_owned()),
                    ("AEGIS_POOL_SIZE", POOL_SIZE.to_string()),
                ]);
            }
            command
        }
        Contestant::Haproxy => {
            fs::write(&file, haproxy(listen, backend, scenario.is_bulk()))?;
            let mut command = Command::new("haproxy");
            command.args(["-db", "-f"]).arg(&file);
            command
        }
        Contestant::Nginx => {
            fs::write(&file, nginx(listen, backend, folder))?;
            let mut command = Command::new("nginx");
            command.arg("-p").arg(folder).arg("-c").arg(&file).args(["-e", "stderr"]);
            command
        }
    };
    command.current_dir(folder);
    Ok(Some(command))
}

/// As its configuration manual advises: a thread a core with a listener of its own each, no
/// logging, splicing for bulk.
fn haproxy(listen: &Address, backend: &Address, splice: bool) -> String {
    let written = |address: &Address| match address {
        Address::Tcp(address) => address.to_string(),
        Address::Unix(path) => format!("unix@{}", path.display()),
    };
    // The threads share a Unix socket.
    let shards = if listen.transport() == Transport::Tcp { " shards by-thread" } else { "" };
    let mut text = format!(
        "global\n  nbthread {WORKERS}\n  maxconn {SESSIONS}\n\
         defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n\
         listen bench\n  bind {} backlog 4096{shards}\n  server backend {}\n",
        written(listen),
        written(backend),
    );
    if splice {
        // Not `splice-auto`, which here hardly ever splices and takes twice the CPU time.
        // Pipes are bounded because their descriptors count.
        text.push_str("  option splice-request\n  option splice-response\nglobal\n  maxpipes 64\n");
    }
    text
}

/// As its documentation advises: one worker per core with a listener of its own, connections
/// enough for both sides, no logging.
fn nginx(listen: &Address, backend: &Address, folder: &Path) -> String {
    let reuse = if listen.transport() == Transport::Tcp { " reuseport" } else { "" };
    format!(
        "load_module {NGINX_MODULE};\ndaemon off;\nuser root;\nworker_processes {WORKERS};\n\
         worker_rlimit_nofile {files};\npid {folder}/pid;\nerror_log stderr crit;\n\
         events {{ worker_connections {files}; }}\n\
         stream {{\n  server {{\n    listen {listen}{reuse} backlog=4096;\n\
         \x20   proxy_pass {backend};\n    tcp_nodelay on;\n    proxy_timeout 1h;\n\
         \x20   proxy_connect_timeout 5s;\n  }}\n}}\n",
        files = 2 * SESSIONS + 1000,
        folder = folder.display(),
    )
}
