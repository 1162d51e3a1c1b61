//! A link that loses, delays or swallows packets, in either direction, for what no socket can play:
//! a host that is gone without a word.
//!
//! It is a network namespace with a TUN device. A packet that the proxy sends to a host behind the
//! device comes out at the test, which sends it back in with its two addresses exchanged. So that
//! host is this one by another name, and a server that listens here serves it. (The checksums stay
//! right: sums do not mind the order.)

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Setter, ioctl};

use super::backend::Backend;

/// Where servers listen, and clients of the servers behind the link come from.
const HERE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const DEVICE: &[u8] = b"far";
const PACKET_MAX: usize = 2048;

/// What becomes of the packets of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// They arrive at once.
    Arrive,
    /// None arrives.
    Vanish,
    /// So many percent are lost, and the others arrive after this time.
    Lossy(u8, Duration),
}

/// A host, and the fates of both directions.
#[derive(Debug, Clone, Copy)]
struct Host {
    /// Its server's port, by which its packets are distinguished from those to it.
    port: u16,
    there: Fate,
    back: Fate,
}

type Hosts = [Host; 4];

/// Hosts behind a link, reached from this thread and from what it starts from now on.
pub struct Link {
    hosts: Arc<Mutex<Hosts>>,
    ends: Arc<AtomicBool>,
    carrier: Option<JoinHandle<()>>,
}

impl Link {
    /// Puts this thread into a network of its own; `None`, with a word about it, where that is not
    /// allowed.
    pub fn new() -> Option<Self> {
        let made = unshare(CloneFlags::CLONE_NEWNET)
            .map_err(std::io::Error::from)
            .and_then(|()| tun())
            .and_then(|tun| {
                ip("link set lo up")?;
                ip("addr add 10.9.0.1/24 dev far")?;
                ip("link set far up")?;
                Ok(tun)
            });
        let tun = match made {
            Ok(tun) => tun,
            Err(error) => {
                super::skip(&format!("no network namespace with a TUN device: {error}"));
                return None;
            }
        };
        let host = Host { port: 0, there: Fate::Arrive, back: Fate::Arrive };
        let hosts = Arc::new(Mutex::new([host; 4]));
        let ends = Arc::<AtomicBool>::default();
        let carrier = thread::spawn({
            let (hosts, ends) = (Arc::clone(&hosts), Arc::clone(&ends));
            move || carry(&tun, &hosts, &ends)
        });
        Some(Self { hosts, ends, carrier: Some(carrier) })
    }

    /// Where a server is to listen.
    pub fn here() -> SocketAddr {
        SocketAddr::new(IpAddr::V4(HERE), 0)
    }

    /// A server that listens here, as it is reached as host number `host` behind the link.
    pub fn behind(&self, host: u8, server: SocketAddr) -> SocketAddr {
        self.hosts.lock().unwrap()[usize::from(host)].port = server.port();
        let [a, b, c, _] = HERE.octets();
        SocketAddr::new(IpAddr::V4(Ipv4Addr::new(a, b, c, 2 + host)), server.port())
    }

    /// These servers as they are reached behind the link, hosts in their order.
    pub fn hosts(&self, servers: &[Backend]) -> Vec<SocketAddr> {
        (0..).zip(servers).map(|(host, server)| self.behind(host, server.address())).collect()
    }

    /// What becomes from now on of packets to a host, and of those from it.
    pub fn set(&self, host: u8, there: Fate, back: Fate) {
        let mut hosts = self.hosts.lock().unwrap();
        let host = &mut hosts[usize::from(host)];
        (host.there, host.back) = (there, back);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.ends.store(true, Relaxed);
        let _ = self.carrier.take().unwrap().join();
    }
}

fn ip(arguments: &str) -> std::io::Result<()> {
    let status = Command::new("ip").args(arguments.split(' ')).status()?;
    status.success().then_some(()).ok_or_else(|| std::io::Error::other(format!("ip {arguments}")))
}

#[allow(unsafe_code, reason = "no crate makes this request")]
fn tun() -> std::io::Result<OwnedFd> {
    const TUNSETIFF: u32 = 0x4004_54ca;
    const IFF_TUN: u16 = 1;
    const IFF_NO_PI: u16 = 0x1000;
    let tun = rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::NONBLOCK, Mode::empty())?;
    // `struct ifreq`: a name of 16 bytes, then the flags.
    let mut request = [0_u8; 40];
    request[..DEVICE.len()].copy_from_slice(DEVICE);
    request[16..18].copy_from_slice(&(IFF_TUN | IFF_NO_PI).to_ne_bytes());
    // SAFETY: the request reads a `struct ifreq`, which is as long as this.
    unsafe { ioctl(&tun, Setter::<{ TUNSETIFF }, [u8; 40]>::new(request)) }?;
    Ok(tun)
}

/// Carries packets until it is asked to end.
fn carry(tun: &OwnedFd, hosts: &Mutex<Hosts>, ends: &AtomicBool) {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut under_way = BinaryHeap::new();
    let mut number = 0_u64;
    let mut packet = [0; PACKET_MAX];
    while !ends.load(Relaxed) {
        let mut events = [PollFd::new(tun, PollFlags::IN)];
        let _ = poll(&mut events, Some(&Timespec { tv_sec: 0, tv_nsec: 2_000_000 }));
        while let Ok(len) = rustix::io::read(tun, &mut packet) {
            let Some((host, port)) = turn_round(&mut packet[..len]) else { continue };
            let host = hosts.lock().unwrap()[host];
            let delay = match if port == host.port { host.there } else { host.back } {
                Fate::Arrive => Duration::ZERO,
                Fate::Lossy(percent, delay) if rng.u8(..100) >= percent => delay,
                Fate::Vanish | Fate::Lossy(..) => continue,
            };
            number += 1;
            under_way.push(Reverse((Instant::now() + delay, number, packet[..len].to_vec())));
        }
        while let Some(Reverse((at, ..))) = under_way.peek()
            && *at <= Instant::now()
            && let Some(Reverse((.., packet))) = under_way.pop()
        {
            // A full device loses it, as links do.
            let _ = rustix::io::write(tun, &packet);
        }
    }
}

/// Exchanges the addresses of a packet. Returns the number of the host that it is to or from, and
/// the port that it is for.
fn turn_round(packet: &mut [u8]) -> Option<(usize, u16)> {
    const VERSION_4_NO_OPTIONS: u8 = 0x45;
    if packet.len() < 40 || packet[0] != VERSION_4_NO_OPTIONS {
        return None;
    }
    let host = usize::from(packet[19].checked_sub(2)?);
    let port = u16::from_be_bytes([packet[22], packet[23]]);
    let (from, to) = packet.split_at_mut(16);
    from[12..16].swap_with_slice(&mut to[..4]);
    (host < 4).then_some((host, port))
}
