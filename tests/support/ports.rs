//! Ports that nobody else comes to have while a test needs them.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

/// Below those that the kernel gives to connections (from 32,768 unless told otherwise) and to
/// Kubernetes services of the type `NodePort` (from 30,000).
const FIRST: u16 = 10_000;
const COUNT: u16 = 20_000;

/// Each is given once, so that nobody has it while its owner is between two starts. A port that the
/// kernel chooses may be a connection's of another test a moment later.
static GIVEN: AtomicU16 = AtomicU16::new(0);

/// An address of `ip` that nobody listens at now. Its port is free at all addresses of the host.
pub fn unused(ip: IpAddr) -> SocketAddr {
    // Processes that run beside each other begin apart.
    let begin = (process::id() % 16) as u16 * (COUNT / 16);
    let port = (0..COUNT)
        .map(|_| FIRST + begin.wrapping_add(GIVEN.fetch_add(1, Relaxed)) % COUNT)
        .find(|&port| TcpListener::bind(("0.0.0.0", port)).is_ok())
        .expect("20,000 ports are in use");
    SocketAddr::new(ip, port)
}
