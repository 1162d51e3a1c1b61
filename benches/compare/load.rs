//! The load: a generator on each core, every byte of every reply checked.

use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use socket2::Socket;

use crate::frame::{FRAME_MAX, Frame, Incoming, Outgoing};
use crate::generator::{Generator, Part};
use crate::net::Address;

/// Connections that are made at a time before the run, well below any accept queue.
const CONNECTING: usize = 64;
/// After the run, replies may take this long.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// The size of a bulk stream's writes.
pub const BULK_WRITE: u32 = FRAME_MAX as u32;

/// When requests are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// The next one with the reply, on every connection.
    Closed,
    /// So many a second, whatever the replies do. Latency counts from when one was due.
    Open(f64),
    /// The next one with the reply, on a new connection.
    Churn,
    /// The next one as soon as it can be written; no replies.
    Bulk,
}

/// One run's load.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub pace: Pace,
    /// Connections that work.
    pub connections: usize,
    /// Connections that made one request each, and no more.
    pub idle: usize,
    /// Bytes of a request and of a reply.
    pub request: u32,
    pub reply: u32,
    pub warm_up: Duration,
    pub measured: Duration,
}

/// The edges of the measured time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    Begin,
    End,
}

/// What came of it within the measured time.
pub struct Outcome {
    pub requests: u64,
    pub bytes: u64,
    pub elapsed: Duration,
    /// Nanoseconds.
    pub latency: Histogram<u64>,
}

/// The measured time, for all generators.
#[derive(Default)]
pub struct Window {
    begin: OnceLock<Instant>,
    end: OnceLock<Instant>,
}

impl Window {
    pub fn contains(&self, time: Instant) -> bool {
        self.begin.get().is_some_and(|begin| time >= *begin) && !self.is_over_at(time)
    }

    pub fn is_over_at(&self, time: Instant) -> bool {
        self.end.get().is_some_and(|end| time >= *end)
    }

    pub fn end(&self) -> Option<Instant> {
        self.end.get().copied()
    }
}

/// Runs the load against `target`; `on_edge` is called where the measured time begins and ends.
pub fn run(
    target: &Address,
    load: &Load,
    on_edge: &mut dyn FnMut(Edge),
) -> Result<Outcome, String> {
    let idle = connect(target, load.idle, 1 << 56)?;
    let warm = if load.pace == Pace::Churn { 0 } else { load.connections };
    let mut streams = connect(target, warm, 2 << 56)?;
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let of = cores.min(load.connections);
    let window = Window::default();
    let mut generators = Vec::with_capacity(of);
    for at in (0..of).rev() {
        let streams = streams.split_off(warm * at / of);
        let generator = Generator::new(target, *load, Part { at, of }, streams, &window);
        generators.push(generator.map_err(|error| format!("a generator of load: {error}"))?);
    }
    let outcome = thread::scope(|scope| {
        let wakers: Vec<_> = generators.iter().map(Generator::waker).collect();
        let start = Instant::now();
        let running: Vec<_> = generators
            .into_iter()
            .map(|generator| scope.spawn(move || generator.run(start)))
            .collect();
        thread::sleep(load.warm_up);
        on_edge(Edge::Begin);
        let begin = *window.begin.get_or_init(Instant::now);
        thread::sleep(load.measured);
        let end = *window.end.get_or_init(Instant::now);
        on_edge(Edge::End);
        for waker in wakers {
            waker.wake().map_err(|error| format!("waking a generator of load: {error}"))?;
        }
        let mut sum = Outcome { requests: 0, bytes: 0, elapsed: end - begin, latency: histogram() };
        for generator in running {
            let part = generator.join().map_err(|_| "a generator of load panicked")??;
            sum.requests += part.requests;
            sum.bytes += part.bytes;
            sum.latency.add(part.latency).map_err(|error| error.to_string())?;
        }
        Ok::<_, String>(sum)
    })?;
    round_trips(&idle, 3 << 56).map_err(|error| format!("a connection that was idle: {error}"))?;
    Ok(outcome)
}

/// Of latencies in nanoseconds.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1_000, 60_000_000_000, 3).expect("right bounds")
}

/// Makes connections, each of which has served one request.
pub fn connect(target: &Address, count: usize, ids: u64) -> Result<Vec<Socket>, String> {
    let context = |error: io::Error| format!("connecting: {error}");
    let mut streams = Vec::with_capacity(count);
    while streams.len() < count {
        let from = streams.len();
        while streams.len() < count.min(from + CONNECTING) {
            let stream = target.connect().map_err(context)?;
            stream.set_read_timeout(Some(PATIENCE)).map_err(context)?;
            streams.push(stream);
        }
        round_trips(&streams[from..], ids + from as u64)
            .map_err(|error| format!("first {error}"))?;
    }
    Ok(streams)
}

/// One request on each of the connections.
fn round_trips(streams: &[Socket], ids: u64) -> Result<(), String> {
    let frame = |at: usize| Frame { id: ids + at as u64, len: 64, reply: 64 };
    for (at, mut stream) in streams.iter().enumerate() {
        Outgoing::new(frame(at)).write(&mut stream).map_err(|e| format!("request: {e}"))?;
    }
    for (at, mut stream) in streams.iter().enumerate() {
        let mut reply = [0; 64];
        stream.read_exact(&mut reply).map_err(|error| format!("reply: {error}"))?;
        let seen = Incoming::default().read(&mut &reply[..])?;
        if seen.map(|seen| seen.id) != Some(frame(at).id) {
            return Err(format!("reply: wrong bytes: {seen:?} instead of {:?}", frame(at)));
        }
    }
    Ok(())
}
