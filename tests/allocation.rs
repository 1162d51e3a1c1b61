//! Steady forwarding allocates nothing: every allocation of the process is counted by thread, and
//! worker threads must have none while messages flow.
#![allow(unsafe_code, missing_docs)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aegis::capture::{Capture, FILE_BYTES_MIN, PACKET_HEADERS};
use aegis::config::{Config, SocketMode};
use aegis::io::net::Address;
use aegis::io::probe::{self, DriverKind, Features};
use aegis::listening::Listening;
use aegis::metrics::{Direction, WorkerStats};
use aegis::proxy::RouteId;
use aegis::proxy::endpoints::{Endpoint, EndpointSnapshot};
use aegis::proxy::retry_budget::Reserve;
use aegis::startup::{Access, listeners};
use aegis::worker::mailbox::{Command, Mailbox};
use aegis::worker::tap::Offer;
use aegis::worker::{self, WorkerSetup};

const CLIENTS: usize = 20;
const WARM_UP: usize = 500;
const MESSAGES: usize = 100_000;
/// A request line of Chronos, and as its echo an answer.
const MESSAGE: [u8; 64] = *b"GET a-key-of-fifty-nine-bytes-to-make-the-message-sixty-four-by\n";
/// How the variables are set in each run: as they are, and with requests that share connections.
const SETTINGS: [&[(&str, &str)]; 3] = [
    &[],
    &[("AEGIS_BALANCE", "peak_ewma")],
    &[("AEGIS_PROTOCOL", "chronos"), ("AEGIS_POOL_MODE", "request"), ("AEGIS_POOL_SIZE", "4")],
];

/// Allocations by thread id, modulo the table's size.
static ALLOCATIONS: [AtomicU64; 1 << 12] = [const { AtomicU64::new(0) }; 1 << 12];

thread_local! {
    static SLOT: Cell<usize> = const { Cell::new(usize::MAX) };
}

fn slot(thread: usize) -> &'static AtomicU64 {
    &ALLOCATIONS[thread % ALLOCATIONS.len()]
}

struct Counting;

// SAFETY: all work is the system allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let thread = SLOT.get();
        let thread = if thread == usize::MAX {
            let id = rustix::thread::gettid().as_raw_nonzero().get() as usize;
            SLOT.set(id);
            id
        } else {
            thread
        };
        slot(thread).fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promised to us.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised to us.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations so far on threads whose name starts with `worker-`.
fn worker_allocations() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let workers = tasks
        .filter(|task| {
            fs::read_to_string(task.join("comm")).is_ok_and(|c| c.starts_with("worker-"))
        })
        .map(|task| task.file_name().unwrap().to_str().unwrap().parse().unwrap());
    let counts: Vec<u64> = workers.map(|id: usize| slot(id).load(Ordering::Relaxed)).collect();
    assert!(!counts.is_empty(), "no worker runs");
    counts.iter().sum()
}

/// Sends everything back that comes.
fn echo(stream: impl Into<OwnedFd>) {
    let mut stream = File::from(stream.into());
    thread::spawn(move || {
        let mut message = MESSAGE;
        while stream.read_exact(&mut message).is_ok() {
            stream.write_all(&message).unwrap();
        }
    });
}

fn echo_server() -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            stream.set_nodelay(true).unwrap();
            echo(stream);
        }
    });
    address.into()
}

/// The same on a Unix socket.
fn unix_echo_server(path: &Path) -> Address {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || listener.incoming().for_each(|stream| echo(stream.unwrap())));
    Address::Unix(path.into())
}

/// A client that gives up after a while.
fn connect(address: &Address) -> File {
    let patience = Some(Duration::from_secs(20));
    let stream: OwnedFd = match address {
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address).unwrap();
            stream.set_nodelay(true).unwrap();
            stream.set_read_timeout(patience).unwrap();
            stream.into()
        }
        Address::Unix(path) => {
            let stream = UnixStream::connect(path).unwrap();
            stream.set_read_timeout(patience).unwrap();
            stream.into()
        }
    };
    stream.into()
}

fn round_trips(client: &mut File, count: usize) {
    let mut reply = [0; MESSAGE.len()];
    for _ in 0..count {
        client.write_all(&MESSAGE).unwrap();
        client.read_exact(&mut reply).unwrap();
        assert_eq!(reply, MESSAGE);
    }
}

fn exchange_with_all(clients: &mut [File], count: usize) {
    thread::scope(|scope| {
        for client in clients {
            scope.spawn(move || round_trips(client, count));
        }
    });
}

fn forwarding_allocates_nothing(driver: DriverKind) {
    for settings in SETTINGS {
        let any = "127.0.0.1:0".parse().unwrap();
        forwarding_with_settings_allocates_nothing(driver, settings, any, echo_server());
        let path = |name| std::env::temp_dir().join(format!("aegis-{}-{name}", std::process::id()));
        let (listen, backend) = (path("alloc"), path("echo"));
        let _ = fs::remove_file(&backend);
        let listen = Address::Unix(listen.into());
        let echo = unix_echo_server(&backend);
        forwarding_with_settings_allocates_nothing(driver, settings, listen, echo);
        fs::remove_file(backend).unwrap();
    }
}

fn forwarding_with_settings_allocates_nothing(
    driver: DriverKind,
    settings: &[(&str, &str)],
    listen: Address,
    backend: Address,
) {
    let settings = settings.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
    let config = Arc::new(Config::from_vars(settings).unwrap());
    let mode = config.routes[0].pool.mode;
    let options = worker::socket_options(&config.routes[0]);
    let access = Access { mode: SocketMode::DEFAULT, owner: None };
    let mut listeners = listeners::listen(&[listen], 1, &options, access).unwrap();
    let mailbox = Arc::new(Mailbox::new(1).unwrap());
    let stats: Arc<WorkerStats> = Arc::new(WorkerStats::new(1));
    let (alive, mut exited) = tokio::sync::mpsc::channel(1);
    let setup = WorkerSetup {
        index: 0,
        listeners: listeners.sets.remove(0),
        listener_routes: vec![RouteId::default()].into(),
        config,
        sessions_max: 1000,
        pool_conns_max: 64,
        mailboxes: Arc::new([Arc::clone(&mailbox)]),
        stats: Arc::new([Arc::clone(&stats)]),
        ends: Arc::default(),
        retry_reserves: Arc::new([Arc::new(Reserve::new(Instant::now()))]),
        listening: Listening::new(listeners.addresses.clone()),
        started: Instant::now(),
        exited: alive,
    };
    worker::prepare(0, None, driver).unwrap().start(setup).unwrap();
    let endpoint = Endpoint::new("echo", backend, 1);
    mailbox.deliver(Arc::new(EndpointSnapshot {
        route: RouteId::default(),
        generation: 1,
        endpoints: vec![endpoint],
        tiers: Vec::new(),
        stores: Vec::new(),
    }));

    // The first of the clients is captured meanwhile.
    let exchanges = WARM_UP + MESSAGES / CLIENTS;
    let packets = 2 * exchanges * (PACKET_HEADERS + MESSAGE.len());
    let (offer, tapped) = Offer::new(None, None, 0, Capture::new(FILE_BYTES_MIN + packets));
    mailbox.offer_tap(offer);

    let address = &listeners.addresses[0];
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| connect(address)).collect();
    exchange_with_all(&mut clients, WARM_UP);

    let (before, bytes) =
        (worker_allocations(), stats.routes[0].bytes.of(Direction::ToClient).get());
    exchange_with_all(&mut clients, MESSAGES / CLIENTS);
    let allocations = worker_allocations() - before;
    let moved = stats.routes[0].bytes.of(Direction::ToClient).get() - bytes;
    assert_eq!(moved, (MESSAGES * MESSAGE.len()) as u64, "all went through the worker");
    eprintln!(
        "MEASURED: {allocations} allocations for {MESSAGES} messages on {driver:?}, {mode}, {address}"
    );
    assert_eq!(allocations, 0, "the worker allocated while it forwarded");

    drop(clients);
    mailbox.command(Command::Stop);
    assert!(exited.blocking_recv().is_none());
    let captured = tapped.blocking_recv().unwrap().capture.payload();
    assert_eq!(
        captured,
        (2 * exchanges * MESSAGE.len()) as u64,
        "each of its messages is captured"
    );
}

/// One test, so that the workers of one driver are not counted with the other's.
#[test]
fn steady_forwarding_allocates_nothing_on_any_driver() {
    forwarding_allocates_nothing(DriverKind::Epoll);
    match probe::uring() {
        Ok(features) => {
            forwarding_allocates_nothing(DriverKind::Uring(features));
            // As on a kernel that lacks what can be done without.
            let oldest = Features {
                restricted: false,
                defer_taskrun: false,
                min_wait: false,
                no_iowait: false,
            };
            forwarding_allocates_nothing(DriverKind::Uring(oldest));
        }
        Err(why) => eprintln!("SKIPPED: allocation on io_uring: {why}"),
    }
}
