//! Those who watch a proxy while it works: pages of its admin port that are read again and again.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const REQUEST: &[u8] = b"GET /status HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";

/// They watch until they are told to stop.
pub struct Watchers {
    over: Arc<AtomicBool>,
    reads: JoinHandle<io::Result<u32>>,
    begun: Instant,
    reads_a_second: u32,
}

impl Watchers {
    pub fn start(admin: SocketAddr, reads_a_second: u32) -> Self {
        let over = Arc::<AtomicBool>::default();
        let stop = Arc::clone(&over);
        let begun = Instant::now();
        let reads = thread::spawn(move || {
            let mut count = 0;
            while !stop.load(Relaxed) {
                let due = begun + Duration::from_secs(1) * count / reads_a_second;
                thread::sleep(due.saturating_duration_since(Instant::now()));
                read(admin)?;
                count += 1;
            }
            Ok(count)
        });
        Self { over, reads, begun, reads_a_second }
    }

    /// Fails if they could not read at their pace.
    pub fn stop(self) -> Result<(), String> {
        let due = self.reads_a_second as f32 * self.begun.elapsed().as_secs_f32();
        self.over.store(true, Relaxed);
        let reads = self.reads.join().unwrap_or_else(|_| Err(io::Error::other("panicked")));
        let reads = reads.map_err(|error| format!("reading /status: {error}"))?;
        if (reads as f32) < 0.8 * due {
            return Err(format!("/status was read {reads} times instead of {due:.0}"));
        }
        Ok(())
    }
}

fn read(admin: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(admin)?;
    stream.write_all(REQUEST)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if answer.starts_with(b"HTTP/1.1 200") {
        Ok(())
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&answer).into_owned()))
    }
}
