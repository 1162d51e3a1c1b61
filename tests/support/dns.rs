//! A name server on a loopback address of its own, port 53: what it says of a name is up to the
//! test, and what it was asked it tells.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tempfile::NamedTempFile;

use super::sandbox::{Hosts, hand_over};

/// What an answer by UDP may hold; longer ones are cut and had by TCP.
const UDP_MAX: usize = 512;

const A: u16 = 1;
const CNAME: u16 = 5;
const AAAA: u16 = 28;

const NO_ERROR: u8 = 0;
const SERVER_FAILURE: u8 = 2;
const NO_SUCH_NAME: u8 = 3;

/// What is answered about a name's addresses of one family.
#[derive(Clone)]
pub enum Reply {
    Addresses(Vec<IpAddr>, u32),
    Alias(String),
    NoData,
    NoSuchName,
    ServerFailure,
    Silence,
    /// These bytes behind the right message number.
    Garbage(Vec<u8>),
}

type Zone = Mutex<HashMap<(String, u16), Reply>>;

#[derive(Default)]
struct State {
    zone: Zone,
    asked: Mutex<Vec<(String, u16, &'static str)>>,
}

/// A name server. Names that it was not given do not exist.
pub struct NameServer {
    ip: Ipv4Addr,
    state: Arc<State>,
    resolv_conf: NamedTempFile,
}

impl NameServer {
    /// One with its own address; `None` where the test may not have port 53, or not give a process
    /// its own files.
    pub fn start() -> Option<Self> {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        Hosts::new()?;
        let process = std::process::id().to_le_bytes();
        let (ip, udp, tcp) = (0..50).find_map(|_| {
            let ip =
                Ipv4Addr::new(127, 53 + process[1] % 64, process[0], NEXT.fetch_add(1, Relaxed));
            let tcp = TcpListener::bind((ip, 53)).ok()?;
            Some((ip, UdpSocket::bind((ip, 53)).ok()?, tcp))
        })?;
        let state = Arc::new(State::default());
        let (by_udp, by_tcp) = (Arc::clone(&state), Arc::clone(&state));
        // They end with the test's process.
        thread::spawn(move || serve_udp(&udp, &by_udp));
        thread::spawn(move || {
            while let Ok((stream, _)) = tcp.accept() {
                let state = Arc::clone(&by_tcp);
                thread::spawn(move || serve_tcp(stream, &state));
            }
        });
        let resolv_conf = NamedTempFile::new().unwrap();
        hand_over(resolv_conf.path());
        let this = Self { ip, state, resolv_conf };
        this.configure("");
        Some(this)
    }

    pub fn ip(&self) -> Ipv4Addr {
        self.ip
    }

    /// Makes it the only name server of the proxy, with these further lines.
    pub fn configure(&self, more: &str) {
        self.write_resolv_conf(&format!("nameserver {}\n{more}\n", self.ip));
    }

    /// What the proxy finds as its `/etc/resolv.conf`.
    pub fn write_resolv_conf(&self, text: &str) {
        std::fs::write(self.resolv_conf.path(), text).unwrap();
    }

    pub fn resolv_conf(&self) -> &std::path::Path {
        self.resolv_conf.path()
    }

    /// What is answered about the name from now on, family by family.
    pub fn set(&self, name: &str, four: Reply, six: Reply) {
        let mut zone = self.state.zone.lock().unwrap();
        zone.insert((name.to_owned(), A), four);
        zone.insert((name.to_owned(), AAAA), six);
    }

    /// The name has these addresses.
    pub fn set_addresses(&self, name: &str, ttl: u32, addresses: &[IpAddr]) {
        let of = |four: bool| {
            let found: Vec<_> = addresses.iter().filter(|a| a.is_ipv4() == four).copied().collect();
            if found.is_empty() { Reply::NoData } else { Reply::Addresses(found, ttl) }
        };
        self.set(name, of(true), of(false));
    }

    /// How often the name was asked for, in any family.
    pub fn asked(&self, name: &str) -> usize {
        self.state.asked.lock().unwrap().iter().filter(|(n, ..)| n == name).count()
    }

    /// The same, by TCP.
    pub fn asked_by_tcp(&self, name: &str) -> usize {
        let asked = self.state.asked.lock().unwrap();
        asked.iter().filter(|(n, _, by)| n == name && *by == "tcp").count()
    }
}

fn serve_udp(socket: &UdpSocket, state: &State) {
    let mut query = [0; UDP_MAX];
    while let Ok((len, from)) = socket.recv_from(&mut query) {
        if let Some(reply) = reply(&query[..len], "udp", state) {
            let sent = if reply.len() > UDP_MAX { cut(&query[..len]) } else { reply };
            let _: Result<_, _> = socket.send_to(&sent, from);
        }
    }
}

fn serve_tcp(mut stream: TcpStream, state: &State) {
    let _: Result<_, _> = stream.set_read_timeout(Some(Duration::from_secs(60)));
    let mut len = [0; 2];
    while stream.read_exact(&mut len).is_ok() {
        let mut query = vec![0; u16::from_be_bytes(len).into()];
        if stream.read_exact(&mut query).is_err() {
            return;
        }
        let Some(reply) = reply(&query, "tcp", state) else { continue };
        let len = u16::try_from(reply.len()).unwrap().to_be_bytes();
        if stream.write_all(&[&len[..], &reply].concat()).is_err() {
            return;
        }
    }
}

/// Question's name in lower case, its type, and where it ends.
fn question(query: &[u8]) -> (String, u16, usize) {
    let (mut at, mut labels) = (12, Vec::new());
    while query[at] != 0 {
        let end = at + 1 + usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..end]).to_lowercase());
        at = end;
    }
    (labels.join("."), u16::from_be_bytes([query[at + 1], query[at + 2]]), at + 5)
}

fn header(query: &[u8], cut: bool, code: u8, answers: usize) -> Vec<u8> {
    let (_, _, end) = question(query);
    let flags = [0x81 | u8::from(cut) << 1, 0x80 | code];
    let answers = u16::try_from(answers).unwrap().to_be_bytes();
    [&query[..2], &flags, &[0, 1], &answers, &[0; 4], &query[12..end]].concat()
}

fn cut(query: &[u8]) -> Vec<u8> {
    header(query, true, NO_ERROR, 0)
}

fn record(name: &[u8], kind: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let len = u16::try_from(data.len()).unwrap().to_be_bytes();
    [name, &kind.to_be_bytes(), &[0, 1], &ttl.to_be_bytes(), &len, data].concat()
}

fn wire(name: &str) -> Vec<u8> {
    let label = |label: &str| [&[u8::try_from(label.len()).unwrap()], label.as_bytes()].concat();
    let mut wire: Vec<_> = name.split('.').flat_map(label).collect();
    wire.push(0);
    wire
}

fn reply(query: &[u8], by: &'static str, state: &State) -> Option<Vec<u8>> {
    let (mut name, kind, _) = question(query);
    state.asked.lock().unwrap().push((name.clone(), kind, by));
    let zone = state.zone.lock().unwrap();
    // What the question's name is in the answer: a pointer to it.
    let mut owner = vec![0xc0, 12];
    let mut records = Vec::new();
    loop {
        let reply = zone.get(&(name.clone(), kind)).cloned().unwrap_or(Reply::NoSuchName);
        let code = match reply {
            Reply::Alias(target) if records.len() < 20 => {
                records.push(record(&owner, CNAME, 60, &wire(&target)));
                owner = wire(&target);
                name = target;
                continue;
            }
            Reply::Addresses(addresses, ttl) => {
                records.extend(addresses.iter().map(|address| match address {
                    IpAddr::V4(four) => record(&owner, A, ttl, &four.octets()),
                    IpAddr::V6(six) => record(&owner, AAAA, ttl, &six.octets()),
                }));
                NO_ERROR
            }
            Reply::Alias(_) | Reply::NoData => NO_ERROR,
            Reply::NoSuchName => NO_SUCH_NAME,
            Reply::ServerFailure => SERVER_FAILURE,
            Reply::Silence => return None,
            Reply::Garbage(bytes) => return Some([&query[..2], &bytes].concat()),
        };
        let header = header(query, false, code, records.len());
        return Some([header, records.concat()].concat());
    }
}

/// Many addresses of the loopback interface, different ones for the same number.
pub fn loopback_addresses(count: u16) -> Vec<IpAddr> {
    (0..count).map(|i| IpAddr::from([127, 99, i.to_be_bytes()[0], i.to_be_bytes()[1]])).collect()
}
