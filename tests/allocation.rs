//! Steady forwarding allocates nothing: every allocation of the process is counted by thread, and
//! worker threads must have none while messages flow.
#![allow(unsafe_code, missing_docs)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aegis::config::Config;
use aegis::io::probe::{self, DriverKind, Features};
use aegis::listening::Listening;
use aegis::metrics::{Direction, WorkerStats};
use aegis::proxy::RouteId;
use aegis::proxy::endpoints::{Endpoint, EndpointSnapshot};
use aegis::startup::listeners;
use aegis::worker::mailbox::{Command, Mailbox};
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

fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            stream.set_nodelay(true).unwrap();
            thread::spawn(move || {
                let mut message = MESSAGE;
                while stream.read_exact(&mut message).is_ok() {
                    stream.write_all(&message).unwrap();
                }
            });
        }
    });
    address
}

fn round_trips(client: &mut TcpStream, count: usize) {
    let mut reply = [0; MESSAGE.len()];
    for _ in 0..count {
        client.write_all(&MESSAGE).unwrap();
        client.read_exact(&mut reply).unwrap();
        assert_eq!(reply, MESSAGE);
    }
}

fn exchange_with_all(clients: &mut [TcpStream], count: usize) {
    thread::scope(|scope| {
        for client in clients {
            scope.spawn(move || round_trips(client, count));
        }
    });
}

fn forwarding_allocates_nothing(driver: DriverKind) {
    for settings in SETTINGS {
        forwarding_with_settings_allocates_nothing(driver, settings);
    }
}

fn forwarding_with_settings_allocates_nothing(driver: DriverKind, settings: &[(&str, &str)]) {
    let settings = settings.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
    let config = Arc::new(Config::from_vars(settings).unwrap());
    let mode = config.routes[0].pool.mode;
    let any = "127.0.0.1:0".parse().unwrap();
    let options = worker::socket_options(&config.routes[0]);
    let mut listeners = listeners::listen(&[any], 1, &options).unwrap();
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
        listening: Listening::default(),
        started: Instant::now(),
        exited: alive,
    };
    worker::prepare(0, None, driver).unwrap().start(setup).unwrap();
    let endpoint = Endpoint::new("echo", echo_server(), 1);
    mailbox.deliver(Arc::new(EndpointSnapshot {
        route: RouteId::default(),
        generation: 1,
        endpoints: vec![endpoint],
        stores: Vec::new(),
    }));

    let connect = |_| TcpStream::connect(listeners.addresses[0]).unwrap();
    let mut clients: Vec<TcpStream> = (0..CLIENTS).map(connect).collect();
    for client in &clients {
        client.set_nodelay(true).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    }
    exchange_with_all(&mut clients, WARM_UP);

    let (before, bytes) =
        (worker_allocations(), stats.routes[0].bytes.of(Direction::ToClient).get());
    exchange_with_all(&mut clients, MESSAGES / CLIENTS);
    let allocations = worker_allocations() - before;
    let moved = stats.routes[0].bytes.of(Direction::ToClient).get() - bytes;
    assert_eq!(moved, (MESSAGES * MESSAGE.len()) as u64, "all went through the worker");
    eprintln!("MEASURED: {allocations} allocations for {MESSAGES} messages on {driver:?}, {mode}");
    assert_eq!(allocations, 0, "the worker allocated while it forwarded");

    drop(clients);
    mailbox.command(Command::Stop);
    assert!(exited.blocking_recv().is_none());
}

/// One test, so that the workers of one driver are not counted with the other's.
#[test]
fn steady_forwarding_allocates_nothing_on_any_driver() {
    forwarding_allocates_nothing(DriverKind::Epoll);
    match probe::uring() {
        Ok(features) => {
            forwarding_allocates_nothing(DriverKind::Uring(features));
            // As on a kernel that lacks what can be done without.
            let oldest = Features { defer_taskrun: false, min_wait: false, no_iowait: false };
            forwarding_allocates_nothing(DriverKind::Uring(oldest));
        }
        Err(why) => eprintln!("SKIPPED: allocation on io_uring: {why}"),
    }
}
