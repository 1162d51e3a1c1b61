//! Thousands of clients on a few backend connections, while clients vanish and backends die: every
//! answer belongs to its request, and nobody hangs.
//!
//! `AEGIS_E2E_CROWD` says for how many seconds (6 unless set); a failure names its seed.

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::Backend;
use crate::support::client::{ask, connect, reset, try_connect};
use crate::support::metrics::{POOL_CONNECTIONS, QUEUE_DEPTH, SESSIONS_ACTIVE};
use crate::support::proxy::Builder;
use crate::support::{Io, PATIENCE, SetOnDrop, heavy, measured, on_both_drivers};

on_both_drivers![
    every_reply_belongs_to_its_request_with_a_fixed_seed,
    every_reply_belongs_to_its_request_with_a_random_seed,
    every_reply_belongs_to_its_request_in_session_mode,
];

const THREADS: usize = 4;
const KEYS: u64 = 500;
/// Two workers, two backends.
const POOL_SIZE: usize = 4;

fn every_reply_belongs_to_its_request_with_a_fixed_seed(io: Io) {
    crowd(io, "request", 4000, 7);
}

fn every_reply_belongs_to_its_request_with_a_random_seed(io: Io) {
    crowd(io, "request", 4000, fastrand::u64(..));
}

fn every_reply_belongs_to_its_request_in_session_mode(io: Io) {
    crowd(io, "session", 200, fastrand::u64(..));
}

/// A store that names the request in every answer but to `SET`, and takes each read for one.
fn store() -> Backend {
    let store: Mutex<HashMap<String, String>> = Mutex::default();
    Backend::scripted(move |mut stream| {
        let mut buffer = [0; 512];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            let line = String::from_utf8_lossy(&buffer[..n]);
            let words: Vec<&str> = line.split_whitespace().collect();
            let answer = match words[..] {
                ["SET", key, ..] => {
                    store.lock().unwrap().insert(key.to_owned(), words[2..].join(" "));
                    format!("OK {key} {}", words[words.len() - 1])
                }
                ["GET", key, nonce] => {
                    let found = store.lock().unwrap().get(key).cloned();
                    format!("{key} {nonce} {}", found.unwrap_or_else(|| "NULL".to_owned()))
                }
                ["ECHO", nonce] => format!("ECHOED {nonce}"),
                _ => format!("ERR_UNKNOWN_COMMAND {line:?}"),
            };
            if stream.write_all(format!("{answer}\n").as_bytes()).is_err() {
                return;
            }
        }
    })
}

/// A request that is to be answered.
struct Asked {
    /// Where it ends in all that its client sends.
    end: u64,
    /// When its last byte was sent.
    at: Option<Instant>,
    answer: Expected,
}

enum Expected {
    Exactly(String),
    /// The value of a key, which names it, after the key and a word of the request.
    Value {
        key: String,
        nonce: u64,
    },
}

impl Expected {
    fn accepts(&self, answer: &str) -> bool {
        match self {
            Self::Exactly(text) => answer == text,
            Self::Value { key, nonce } => {
                let value = answer.strip_prefix(&format!("{key} {nonce} "));
                value.is_some_and(|v| v == "NULL" || v.starts_with(&format!("{key} of ")))
            }
        }
    }
}

struct Member {
    stream: TcpStream,
    unsent: Vec<u8>,
    sent: u64,
    asked: VecDeque<Asked>,
    received: Vec<u8>,
    /// Sends in such pieces.
    piece: usize,
}

impl Member {
    fn new(address: SocketAddr, rng: &mut fastrand::Rng) -> Self {
        let stream = connect(address);
        stream.set_nonblocking(true).unwrap();
        let piece = if rng.bool() { 1 } else { 4096 };
        Self {
            stream,
            unsent: Vec::new(),
            sent: 0,
            asked: VecDeque::new(),
            received: Vec::new(),
            piece,
        }
    }

    fn ask(&mut self, id: u64, rng: &mut fastrand::Rng) {
        let nonce = rng.u64(..);
        let key = format!("key{}", rng.u64(..KEYS));
        let (line, answer) = match rng.u8(..3) {
            0 => {
                let line = format!("SET {key} {key} of {id} {nonce}\n");
                (line, Expected::Exactly(format!("OK {key} {nonce}")))
            }
            1 => (format!("GET {key} {nonce}\n"), Expected::Value { key, nonce }),
            _ => (format!("ECHO {nonce}\n"), Expected::Exactly(format!("ECHOED {nonce}"))),
        };
        self.unsent.extend_from_slice(line.as_bytes());
        let end = self.sent + self.unsent.len() as u64;
        self.asked.push_back(Asked { end, at: None, answer });
    }

    /// Sends and receives what it can. False: the connection is over.
    fn move_bytes(&mut self) -> bool {
        let piece = self.piece.min(self.unsent.len());
        if piece > 0 {
            match self.stream.write(&self.unsent[..piece]) {
                Ok(count) => {
                    self.unsent.drain(..count);
                    self.sent += count as u64;
                    for asked in self.asked.iter_mut().filter(|asked| asked.end <= self.sent) {
                        asked.at.get_or_insert_with(Instant::now);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return false,
            }
        }
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(count) => self.received.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
        true
    }

    /// Checks the answers that are there. Returns how many were no errors of the proxy.
    fn check(&mut self, id: u64) -> Result<u64, String> {
        let mut right = 0;
        while let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.received.drain(..=end).collect();
            let answer = String::from_utf8_lossy(&line[..end]).into_owned();
            let asked =
                self.asked.pop_front().ok_or_else(|| format!("{id}: {answer:?} unasked"))?;
            if asked.answer.accepts(&answer) {
                right += 1;
            } else if !answer.starts_with("ERR ") {
                return Err(format!("{id}: {answer:?} is somebody else's"));
            }
        }
        match self.asked.front().and_then(|asked| asked.at) {
            Some(at) if at.elapsed() > PATIENCE => {
                Err(format!("{id}: no answer for {:?}", at.elapsed()))
            }
            _ => Ok(right),
        }
    }
}

/// A part of the crowd. Returns how many answers it got that were no errors.
fn members(
    address: SocketAddr,
    count: usize,
    seed: u64,
    done: &AtomicBool,
    restarts: &AtomicU64,
) -> Result<u64, String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut members: Vec<_> = (0..count).map(|_| Member::new(address, &mut rng)).collect();
    let mut right = 0;
    let mut over = false;
    while !over {
        over = done.load(Relaxed);
        for (i, member) in members.iter_mut().enumerate() {
            let id = seed.wrapping_mul(10_000).wrapping_add(i as u64);
            if member.asked.is_empty() && !over && rng.u8(..4) == 0 {
                (0..rng.usize(1..6)).for_each(|_| member.ask(id, &mut rng));
            }
            let vanishes = rng.u32(..2000) == 0;
            if !member.move_bytes() || vanishes {
                // Whatever came before the end is still to be right.
                right += member.check(id)?;
                restarts.fetch_add(1, Relaxed);
                let gone = std::mem::replace(member, Member::new(address, &mut rng));
                if rng.bool() {
                    reset(gone.stream);
                }
                continue;
            }
            right += member.check(id)?;
        }
    }
    // Everybody gets what is owed, one after the other: the proxy may be done long before the test.
    for (i, member) in members.iter_mut().enumerate() {
        let deadline = Instant::now() + PATIENCE;
        while !member.asked.is_empty() && member.move_bytes() {
            right += member.check(i as u64)?;
            if Instant::now() > deadline {
                return Err(format!("{i} still waits for {} answers", member.asked.len()));
            }
            thread::yield_now();
        }
    }
    Ok(right)
}

fn crowd(io: Io, mode: &str, clients: usize, seed: u64) {
    let _alone = heavy();
    println!("seed {seed}");
    let seconds = std::env::var("AEGIS_E2E_CROWD").ok().and_then(|text| text.parse().ok());
    let mut backends = [store(), store()];
    let proxy = Builder::on(io)
        .backends(&backends.each_ref().map(Backend::address))
        .protocol("chronos", mode)
        .set("AEGIS_POOL_SIZE", POOL_SIZE.to_string())
        .pool(0, POOL_SIZE as u64)
        .set("AEGIS_QUEUE_TIMEOUT", "10s")
        .start();
    let (address, done, restarts) = (proxy.address(), AtomicBool::new(false), AtomicU64::new(0));
    let outcome = thread::scope(|scope| {
        let done_at_last = SetOnDrop(&done);
        let threads: Vec<_> = (0..THREADS as u64)
            .map(|i| {
                let (done, restarts) = (&done, &restarts);
                let seed = seed.wrapping_add(i);
                scope.spawn(move || members(address, clients / THREADS, seed, done, restarts))
            })
            .collect();
        let mut rng = fastrand::Rng::with_seed(seed);
        let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(6));
        while Instant::now() < end && threads.iter().all(|thread| !thread.is_finished()) {
            let victim = &mut backends[rng.usize(..2)];
            thread::sleep(Duration::from_millis(rng.u64(20..300)));
            victim.kill();
            thread::sleep(Duration::from_millis(rng.u64(..30)));
            victim.start();
            if mode == "request" {
                // One that changes from idle to in use while it is scraped may be there twice.
                let few = || proxy.metric(POOL_CONNECTIONS, &[]) as usize <= 4 * POOL_SIZE;
                assert!((0..5).any(|_| few()), "more connections than the pools may have");
            }
        }
        drop(done_at_last);
        threads.into_iter().map(|thread| thread.join().unwrap()).sum::<Result<u64, String>>()
    });
    let right = outcome.unwrap_or_else(|error| {
        let waiting = proxy.metric(QUEUE_DEPTH, &[]);
        panic!("seed {seed}: {error}; {waiting} requests wait in the proxy")
    });
    assert!(right > 1000, "seed {seed}: only {right} requests were answered");
    let accepted: u64 = backends.iter().map(Backend::accepted).sum();
    measured(&format!(
        "seed {seed}: {right} answers for {clients} clients, each its own; {} clients vanished; \
         {accepted} backend connections one after the other",
        restarts.load(Relaxed),
    ));
    let line = ask(&try_connect(address).unwrap(), "ECHO at-last");
    assert_eq!(line, "ECHOED at-last");
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "in_use")], |in_use| in_use == 0);
}
