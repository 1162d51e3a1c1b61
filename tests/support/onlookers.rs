//! Clients of a store that ask all the time while something happens, and what they saw of it.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use super::SetOnDrop;
use super::client::try_ask;

/// How long a client waits for anything. Far above what clients may see, and far below what a
/// test may take where they hang.
pub const LIMIT: Duration = Duration::from_secs(15);
pub const CLIENTS: usize = 4;
/// What the clients saw while a fault lasted.
#[derive(Default)]
pub struct Seen {
    attempts: Vec<Attempt>,
}

struct Attempt {
    begun: Instant,
    ended: Instant,
    answered: bool,
}

impl Seen {
    pub fn failed(&self) -> usize {
        self.attempts.iter().filter(|attempt| !attempt.answered).count()
    }

    /// How long the attempt that took longest took, answered or not.
    pub fn longest(&self) -> Duration {
        self.attempts.iter().map(|attempt| attempt.ended - attempt.begun).max().unwrap_or_default()
    }

    /// From the first failure's beginning to the last one's end.
    pub fn failing_for(&self) -> Duration {
        let failures = || self.attempts.iter().filter(|attempt| !attempt.answered);
        let first = failures().map(|attempt| attempt.begun).min();
        let last = failures().map(|attempt| attempt.ended).max();
        first.zip(last).map_or(Duration::ZERO, |(first, last)| last - first)
    }
}

/// Such as "412 asked, 3 failed within 120 ms; the longest wait was 4 ms".
impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} asked, ", self.attempts.len())?;
        match self.failed() {
            0 => write!(f, "none failed")?,
            failed => write!(f, "{failed} failed within {}", Span(self.failing_for()))?,
        }
        write!(f, "; the longest wait was {}", Span(self.longest()))
    }
}

/// A duration for people.
pub struct Span(pub Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.0.as_millis() {
            0 => write!(f, "less than 1 ms"),
            millis @ 1..1000 => write!(f, "{millis} ms"),
            _ => write!(f, "{:.1} s", self.0.as_secs_f64()),
        }
    }
}

/// Connects as a client that has patience for [`LIMIT`] alone.
pub fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Asks, and takes an error of the proxy's for the failure that it is to a client.
pub fn answered(stream: &TcpStream) -> bool {
    try_ask(stream, "GET k").is_ok_and(|reply| !reply.starts_with("ERR"))
}

/// A client with a session for each request.
pub fn short(address: SocketAddr) -> impl Fn() -> bool {
    move || dial(address).is_ok_and(|stream| answered(&stream))
}

/// A client that stays connected, and connects again where it has lost its connection.
pub fn staying(address: SocketAddr) -> impl Fn() -> bool {
    on_one_connection(address, answered)
}

/// The same, with requests that must not be repeated.
pub fn writing(address: SocketAddr) -> impl Fn() -> bool {
    on_one_connection(address, |stream| try_ask(stream, "SET k v").is_ok_and(|reply| reply == "OK"))
}

fn on_one_connection(address: SocketAddr, ask: fn(&TcpStream) -> bool) -> impl Fn() -> bool {
    let held = Cell::new(None);
    move || {
        let Some(stream) = held.take().or_else(|| dial(address).ok()) else { return false };
        let answered = ask(&stream);
        held.set(answered.then_some(stream));
        answered
    }
}

/// Runs clients, each of which asks again and again, until the fault is over.
pub fn watch<C: Fn() -> bool, T>(
    client: impl Fn() -> C + Sync,
    fault: impl FnOnce() -> T,
) -> (Seen, T) {
    let stop = AtomicBool::new(false);
    let ask = || {
        let (client, mut attempts) = (client(), Vec::new());
        while !stop.load(Relaxed) {
            let begun = Instant::now();
            let answered = client();
            attempts.push(Attempt { begun, ended: Instant::now(), answered });
            // A client's own work. Without it failures that come at once would be all that is seen.
            thread::sleep(Duration::from_millis(2));
        }
        attempts
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(ask)).collect();
        let stopping = SetOnDrop(&stop);
        let result = fault();
        drop(stopping);
        let attempts = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
        (Seen { attempts }, result)
    })
}
