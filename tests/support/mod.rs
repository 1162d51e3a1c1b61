//! What the end-to-end tests share: the proxy as a child process, backends, clients, and how to
//! wait.

pub mod backend;
pub mod client;
pub mod dns;
pub mod kube_api;
pub mod link;
pub mod metrics;
pub mod onlookers;
pub mod pcap;
pub mod ports;
pub mod proxy;
pub mod sandbox;
pub mod servers;

use std::cell::Cell;
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long anything that must happen may take before a test fails: far above what it needs, for
/// busy machines.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What `AEGIS_IO` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Io {
    Uring,
    Epoll,
    Auto,
}

impl Io {
    pub fn name(self) -> &'static str {
        match self {
            Self::Uring => "uring",
            Self::Epoll => "epoll",
            Self::Auto => "auto",
        }
    }
}

/// Makes of each function `fn name(io: Io)` two tests: `name::uring` and `name::epoll`.
macro_rules! on_both_drivers {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            #[test]
            fn uring() {
                crate::support::on(crate::support::Io::Uring, super::$name);
            }

            #[test]
            fn epoll() {
                crate::support::on(crate::support::Io::Epoll, super::$name);
            }
        }
    )+ };
}
pub(crate) use on_both_drivers;

/// Runs a test on a driver, or says that the host cannot.
pub fn on(io: Io, test: fn(Io)) {
    timed();
    if io == Io::Uring
        && let Some(why) = uring_unavailable()
    {
        return skip(&format!("io_uring does not work on this host: {why}"));
    }
    test(io);
}

/// Why no ring can be set up on this host, if so.
pub fn uring_unavailable() -> Option<String> {
    // On a thread of its own: the end of a ring interrupts the system calls of its thread.
    let probe = std::thread::spawn(|| io_uring::IoUring::new(8).err());
    probe.join().unwrap().map(|error| error.to_string())
}

/// Says in the output, past the capture of passing tests, that a test did not run.
pub fn skip(why: &str) {
    static SKIPPED: AtomicUsize = AtomicUsize::new(0);
    let count = SKIPPED.fetch_add(1, Relaxed) + 1;
    say(&format!("SKIPPED: {}: {why} (skipped so far: {count})", test_name()));
}

/// Prints a measured figure, past the capture of passing tests.
pub fn measured(what: &str) {
    say(&format!("MEASURED: {}: {what}", test_name()));
}

fn say(line: &str) {
    // The macros would be captured; a write to the stream itself is not. One write a line.
    let _ = std::io::stderr().write_all(format!("\n{line}\n").as_bytes());
}

/// The harness names each test's thread after it.
fn test_name() -> String {
    thread::current().name().unwrap_or("?").to_owned()
}

/// Has the test on this thread tell `make test` at its end how long it took since the first call.
/// libtest's own way to do so is unstable.
pub fn timed() {
    TIMED.with(|_| ());
}

thread_local! {
    static TIMED: Timed = Timed { test: test_name(), since: Cell::new(Instant::now()) };
}

struct Timed {
    test: String,
    since: Cell<Instant>,
}

impl Drop for Timed {
    fn drop(&mut self) {
        // Threads that tests start have no name.
        let Some(file) = std::env::var_os("TEST_TIMES").filter(|_| self.test != "?") else {
            return;
        };
        let line = format!("{:.1} {}\n", self.since.get().elapsed().as_secs_f64(), self.test);
        // One write, so that lines of tests that end together stay apart.
        let file = OpenOptions::new().append(true).create(true).open(file);
        let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
    }
}

/// Polls until `probe` finds something, and fails the test when it takes longer than `within`.
/// Other sleeps are a part of what is tested, such as a pause of a peer's.
pub fn eventually<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Tells threads to stop at the end of a scope, which waits for them even where an assertion fails.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Holds the heavy tests apart: those that measure, need thousands of descriptors or both cores.
pub fn heavy() -> MutexGuard<'static, ()> {
    static HEAVY: Mutex<()> = Mutex::new(());
    // A failed test poisons the lock, which says nothing about the next.
    let alone = HEAVY.lock().unwrap_or_else(PoisonError::into_inner);
    // Its turn is not the test's own time.
    TIMED.with(|timed| timed.since.set(Instant::now()));
    alone
}

/// The most that `pattern` gives.
pub const PATTERN_BYTES_MAX: usize = 16 << 20;

/// `len` random bytes, the same ones for the same seed. Streams of different seeds differ at each
/// position, so a byte that is lost, doubled, moved or somebody else's shows in a comparison.
pub fn pattern(seed: usize, len: usize) -> &'static [u8] {
    const SEEDS: usize = 1024;
    const STRIDE: usize = 4099;
    static BLOCK: OnceLock<Vec<u8>> = OnceLock::new();
    assert!(len <= PATTERN_BYTES_MAX && seed < SEEDS);
    let block = BLOCK.get_or_init(|| {
        let mut rng = fastrand::Rng::with_seed(0xAE615);
        let words = (PATTERN_BYTES_MAX + SEEDS * STRIDE).div_ceil(8);
        (0..words).flat_map(|_| rng.u64(..).to_le_bytes()).collect()
    });
    &block[seed * STRIDE..][..len]
}
