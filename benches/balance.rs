//! What clients wait with each way of balancing where one endpoint of five is slow, or stalls for a
//! second of each ten: 800 requests per second from 32 clients that share connections. Prints a table for
//! `docs/ENDPOINTS.md`.
#![allow(missing_docs)]

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;

const AEGIS: &str = env!("CARGO_BIN_EXE_aegis-proxy");
const ENDPOINTS: usize = 5;
const CLIENTS: u32 = 32;
/// From one request of a client to the next.
const EACH: Duration = Duration::from_millis(40);
const MS: Duration = Duration::from_millis(1);
const START: Duration = Duration::from_secs(5);
const WAYS: [&str; 3] = ["least_conn", "random_two", "peak_ewma"];
/// What one endpoint is like, what it takes for a reply, and whether it stalls.
const ENDPOINT_IS: [(&str, Duration, bool); 3] = [
    ("like the others", MS, false),
    ("ten times as slow", Duration::from_millis(10), false),
    ("stalls for 1 s of 10", MS, true),
];

/// Compares the ways of balancing
#[derive(Parser)]
#[command(name = "balance")]
struct Options {
    /// Runs of each way with each kind of endpoint
    #[arg(long)]
    rounds: Option<usize>,
    /// Length of a run; less than 10 may miss the stall
    #[arg(long)]
    seconds: Option<u64>,
    /// Checks that everything works, with figures that say little
    #[arg(long)]
    quick: bool,
    /// What cargo says to every bench
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> io::Result<()> {
    let options = Options::parse();
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { 3 });
    let seconds = options.seconds.unwrap_or(if options.quick { 1 } else { 20 });
    println!("| one endpoint | way | p50 | p99 | p99.9 | its share |\n| - | - | - | - | - | - |");
    for (is, takes, stalls) in ENDPOINT_IS {
        let mut felt = WAYS.map(|_| Felt::default());
        for _ in 0..rounds {
            for (way, felt) in WAYS.iter().zip(&mut felt) {
                felt.add(run(way, takes, stalls, Duration::from_secs(seconds))?);
            }
        }
        for (way, felt) in WAYS.iter().zip(felt) {
            println!("| {is} | `{way}` | {felt} |");
        }
    }
    Ok(())
}

/// What clients waited, and how many of the requests the one endpoint was asked.
#[derive(Default)]
struct Felt {
    waits: Vec<Duration>,
    asked: u64,
}

impl Felt {
    fn add(&mut self, mut other: Self) {
        self.waits.append(&mut other.waits);
        self.waits.sort_unstable();
        self.asked += other.asked;
    }
}

impl std::fmt::Display for Felt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for part in [0.5, 0.99, 0.999] {
            let at = ((self.waits.len() - 1) as f64 * part) as usize;
            write!(f, "{:.1} ms | ", self.waits[at].as_secs_f64() * 1e3)?;
        }
        write!(f, "{:.1} %", 100.0 * self.asked as f64 / self.waits.len() as f64)
    }
}

fn run(way: &str, takes: Duration, stalls: bool, time: Duration) -> io::Result<Felt> {
    let endpoints: Vec<Endpoint> = (0..ENDPOINTS)
        .map(|at| Endpoint::start(if at == 0 { takes } else { MS }))
        .collect::<io::Result<_>>()?;
    let addresses: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
    let proxy = Proxy::start(way, &addresses.join(","))?;
    let (first, waits, over) = (&endpoints[0], Mutex::new(Vec::new()), AtomicBool::new(!stalls));
    thread::scope(|scope| {
        scope.spawn(|| first.stall(&over));
        let client = |number| {
            let (proxy, waits) = (&proxy, &waits);
            scope.spawn(move || ask(proxy, EACH * number / CLIENTS, time, waits))
        };
        let clients: Vec<_> = (0..CLIENTS).map(client).collect();
        let outcome = clients.into_iter().try_for_each(|client| {
            client.join().map_err(|_| io::Error::other("a client panicked"))?
        });
        over.store(true, Relaxed);
        outcome
    })?;
    Ok(Felt {
        waits: waits.into_inner().expect("no client panicked"),
        asked: first.asked.load(Relaxed),
    })
}

/// Asks at an even pace, whatever the replies do: each request is timed from when it was due.
fn ask(
    proxy: &Proxy,
    first: Duration,
    time: Duration,
    waits: &Mutex<Vec<Duration>>,
) -> io::Result<()> {
    let stream = TcpStream::connect(proxy.address)?;
    stream.set_nodelay(true)?;
    let (mut replies, mut reply) = (BufReader::new(&stream), String::new());
    let begun = Instant::now();
    let (mut due, mut own) = (begun + first, Vec::new());
    while due < begun + time {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        (&stream).write_all(b"GET a\n")?;
        reply.clear();
        replies.read_line(&mut reply)?;
        if reply != "1\n" {
            return Err(io::Error::other(format!("a client received {reply:?}")));
        }
        own.push(due.elapsed());
        due += EACH;
    }
    waits.lock().expect("no client panicked").append(&mut own);
    Ok(())
}

/// Answers each line after a time, unless it stands still.
struct Endpoint {
    address: SocketAddr,
    asked: Arc<AtomicU64>,
    stands_still: Arc<AtomicBool>,
}

impl Endpoint {
    fn start(takes: Duration) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let (asked, stands_still) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let endpoint = Self {
            address: listener.local_addr()?,
            asked: Arc::clone(&asked),
            stands_still: Arc::clone(&stands_still),
        };
        // It stays until the process ends, without clients.
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (asked, still) = (Arc::clone(&asked), Arc::clone(&stands_still));
                thread::spawn(move || serve(&stream, takes, &asked, &still));
            }
        });
        Ok(endpoint)
    }

    /// Stands still for a second of each ten, until it is over.
    fn stall(&self, over: &AtomicBool) {
        let begun = Instant::now();
        while !over.load(Relaxed) {
            let still = (begun.elapsed().as_secs() + 7).is_multiple_of(10);
            self.stands_still.store(still, Relaxed);
            thread::sleep(MS);
        }
        self.stands_still.store(false, Relaxed);
    }
}

fn serve(stream: &TcpStream, takes: Duration, asked: &AtomicU64, still: &AtomicBool) {
    let _ = stream.set_nodelay(true);
    for _request in BufReader::new(stream).lines().map_while(Result::ok) {
        asked.fetch_add(1, Relaxed);
        thread::sleep(takes);
        while still.load(Relaxed) {
            thread::sleep(MS);
        }
        if (&*stream).write_all(b"1\n").is_err() {
            return;
        }
    }
}

/// Aegis; killed when dropped.
struct Proxy {
    address: SocketAddr,
    child: Child,
}

impl Proxy {
    fn start(way: &str, backends: &str) -> io::Result<Self> {
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let child = Command::new(AEGIS)
            .env_clear()
            .envs([
                ("AEGIS_LISTEN", &*address.to_string()),
                ("AEGIS_BACKENDS", backends),
                ("AEGIS_BALANCE", way),
                ("AEGIS_PROTOCOL", "chronos"),
                ("AEGIS_POOL_MODE", "request"),
                ("AEGIS_WORKERS", "1"),
                ("AEGIS_ADMIN", "127.0.0.1:0"),
                ("AEGIS_LOG", "warn"),
            ])
            .stdin(Stdio::null())
            .spawn()?;
        let proxy = Self { address, child };
        let deadline = Instant::now() + START;
        while let Err(error) = TcpStream::connect(address) {
            if Instant::now() > deadline {
                return Err(error);
            }
            thread::sleep(10 * MS);
        }
        Ok(proxy)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Both fail where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
