//! Aegis to try out: a real store, the real proxy in front of it, and what to do with them.
//!
//! `demo` runs both until Ctrl-C; `demo store [address]` runs the store alone. `AEGIS_…` variables
//! reach the proxy, `DEMO_DATA` is the store's directory, `TOKIO_WORKER_THREADS` its threads.

mod store;
#[cfg(test)]
mod tests;

use std::env;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::process::{Child, Command};
use tokio::signal::unix::{self, SignalKind, signal};
use tokio::time::{sleep, timeout};

use store::Store;

const STORE: &str = "127.0.0.1:8080";
const ADMIN: &str = "127.0.0.1:8082";
/// What the proxy listens on by default: the variable to choose another, the address, its part.
const PROXY: [(&str, &str, &str); 4] = [
    ("AEGIS_LISTEN", "127.0.0.1:8081", "the proxy"),
    ("AEGIS_LISTEN", "[::1]:8081", "the proxy"),
    ("AEGIS_ADMIN", ADMIN, "the proxy's admin server"),
    ("AEGIS_ADMIN", "[::]:8082", "the proxy's admin server"),
];
const READY_WITHIN: Duration = Duration::from_secs(15);
const PROBE_WITHIN: Duration = Duration::from_secs(1);
const PROBE_EVERY: Duration = Duration::from_millis(50);

const WHAT_TO_TRY: &str = r"
Aegis is up: clients ──▶ 127.0.0.1:8081 (proxy) ──▶ 127.0.0.1:8080 (store)

Talk to the store through the proxy:
  printf 'SET k v\nGET k\n' | nc -q1 127.0.0.1 8081

Put it under load:
  ab -k -n 100000 -c 100 http://127.0.0.1:8081/

See what the proxy saw, or open http://localhost:8082/ in a browser:
  curl http://localhost:8082/metrics
  curl http://localhost:8082/backends

Ctrl-C stops both.
";

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

#[tokio::main]
async fn main() -> ExitCode {
    raise_descriptor_limit();
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ended = match args[..] {
        [] => run_both().await,
        ["store"] => run_store(STORE).await,
        ["store", addr] => run_store(addr).await,
        _ => Err("usage: demo [store [address]]".into()),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run_store(addr: &str) -> Result<()> {
    let mut stop = Stop::new()?;
    let listener = bind(addr, "the store")?;
    let store = open_store()?;
    eprintln!("demo: the store listens on {}", listener.local_addr()?);
    tokio::select! {
        () = store.serve(listener) => {}
        () = stop.asked() => {}
    }
    Ok(store.persist()?)
}

async fn run_both() -> Result<()> {
    let mut stop = Stop::new()?;
    let program = proxy_program()?;
    let listener = bind(STORE, "the store")?;
    let admin = env::var("AEGIS_ADMIN").ok().and_then(|addr| addr.parse::<SocketAddr>().ok());
    let admin = admin.map_or_else(|| ADMIN.to_owned(), |addr| addr.to_string());
    // Told here because the proxy's own error would come late and not say what else to stop. An
    // address of the caller's own choice is left to the proxy.
    for (variable, addr, part) in PROXY {
        if env::var_os(variable).is_none()
            && let Err(error) = TcpListener::bind(addr).await
            && error.kind() == ErrorKind::AddrInUse
        {
            return Err(in_use(addr, part).into());
        }
    }

    let store = open_store()?;
    let serving = tokio::spawn({
        let store = store.clone();
        async move { store.serve(listener).await }
    });
    let ended = run_proxy(&program, &admin, &mut stop).await;
    serving.abort();
    store.persist()?;
    ended
}

/// Runs the proxy until it is asked to stop; that it ends by itself is an error.
async fn run_proxy(program: &Path, admin: &str, stop: &mut Stop) -> Result<()> {
    let mut command = Command::new(program);
    // A group of its own: a terminal's Ctrl-C would reach it twice, from the terminal and from us.
    command.process_group(0).kill_on_drop(true);
    if env::var_os("AEGIS_BACKENDS").is_none() {
        command.env("AEGIS_BACKENDS", STORE);
    }
    let mut child =
        command.spawn().map_err(|error| format!("cannot start {}: {error}", program.display()))?;

    let started = tokio::select! {
        started = timeout(READY_WITHIN, ready(admin)) => started,
        ended = child.wait() => return Err(format!("the proxy did not start: {}", ended?).into()),
        () = stop.asked() => return drain(child, stop).await,
    };
    if started.is_err() {
        drain(child, stop).await?;
        let waited = READY_WITHIN.as_secs();
        return Err(format!("http://{admin}/readyz did not answer 200 in {waited} s").into());
    }
    println!("{WHAT_TO_TRY}");

    tokio::select! {
        ended = child.wait() => Err(format!("the proxy ended by itself: {}", ended?).into()),
        () = stop.asked() => drain(child, stop).await,
    }
}

/// Asks the proxy to end and waits until its sessions have drained, or for a second signal.
async fn drain(mut child: Child, stop: &mut Stop) -> Result<()> {
    eprintln!("demo: waiting for the proxy to drain; Ctrl-C again to kill it");
    let pid = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
    if let Some(pid) = pid {
        kill_process(pid, Signal::TERM)?;
    }
    tokio::select! {
        ended = child.wait() => match ended? {
            status if status.success() => Ok(()),
            status => Err(format!("the proxy did not end well: {status}").into()),
        },
        () = stop.asked() => Ok(child.kill().await?),
    }
}

/// Returns once the proxy's readiness probe answers 200.
async fn ready(admin: &str) {
    while !matches!(timeout(PROBE_WITHIN, probe(admin)).await, Ok(Ok(true))) {
        sleep(PROBE_EVERY).await;
    }
}

async fn probe(admin: &str) -> io::Result<bool> {
    let mut socket = TcpStream::connect(admin).await?;
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut status = [0; "HTTP/1.1 200".len()];
    socket.read_exact(&mut status).await?;
    Ok(status.ends_with(b" 200"))
}

fn bind(addr: &str, owner: &str) -> Result<TcpListener> {
    listen(addr).map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => in_use(addr, owner).into(),
        _ => format!("{owner} cannot listen on {addr}: {error}").into(),
    })
}

fn in_use(addr: &str, owner: &str) -> String {
    let port = addr.rsplit(':').next().unwrap_or(addr);
    format!("port {port} is in use, and {owner} needs it ({addr})")
}

fn open_store() -> Result<Store> {
    let dir = match env::var_os("DEMO_DATA") {
        Some(dir) => PathBuf::from(dir),
        None => profile_dir()?.join("demo-store"),
    };
    Store::open(&dir).map_err(|error| match error {
        fjall::Error::Locked => {
            format!("{} belongs to another running demo; set DEMO_DATA", dir.display()).into()
        }
        error => format!("cannot open the store in {}: {error}", dir.display()).into(),
    })
}

fn proxy_program() -> Result<PathBuf> {
    let program = profile_dir()?.join("aegis-proxy");
    if program.is_file() {
        return Ok(program);
    }
    Err(format!("{} is missing; `make demo` builds it", program.display()).into())
}

/// Where cargo puts binaries: the parent of `examples`, where this program is.
fn profile_dir() -> Result<PathBuf> {
    let program = env::current_exe()?;
    let dir = program.parent().and_then(Path::parent).ok_or("the demo runs outside of target/")?;
    Ok(dir.to_owned())
}

/// Thousands of connections need more descriptors than shells allow by default.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Without it the demo still works, for fewer connections.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// The signals that ask the demo to end.
struct Stop {
    interrupt: unix::Signal,
    terminate: unix::Signal,
    /// The terminal was closed. Left alone it would end the demo, but not the proxy.
    hangup: unix::Signal,
}

impl Stop {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}

/// Listens with a queue that holds a burst of clients: the usual 128 overflow, and a client whose
/// handshake is dropped waits a second before it tries again.
fn listen(addr: &str) -> std::io::Result<TcpListener> {
    let addr = addr.parse().map_err(std::io::Error::other)?;
    let socket = match addr {
        std::net::SocketAddr::V4(_) => TcpSocket::new_v4()?,
        std::net::SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(4096)
}
