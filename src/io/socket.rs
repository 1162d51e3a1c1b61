//! Socket options, addresses and states, alike for all drivers.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::Unheard;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::ioctl::{Getter, Opcode, ioctl};
use rustix::net::SocketFlags;
use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, TcpKeepalive, Type};

/// Options of every TCP socket of the data plane.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Idle time before keep-alive probes start; off when `None`.
    pub keepalive: Option<Duration>,
    /// `TCP_USER_TIMEOUT`; the kernel's default when `None`.
    pub user_timeout: Option<Duration>,
}

impl Options {
    /// Sets the options. Sockets accepted from a listener inherit them from it.
    ///
    /// # Errors
    /// The kernel refuses one of them.
    pub fn apply(&self, socket: &Socket) -> io::Result<()> {
        // Small messages leave at once: coalescing is the applications' business.
        socket.set_tcp_nodelay(true)?;
        // Urgent data is passed on as ordinary bytes, at its place in the stream.
        socket.set_out_of_band_inline(true)?;
        if let Some(idle) = self.keepalive {
            // The kernel counts in whole seconds and refuses 0.
            let second = Duration::from_secs(1);
            let probes = TcpKeepalive::new()
                .with_time(idle.max(second))
                .with_interval((idle / 4).max(second))
                .with_retries(4);
            socket.set_tcp_keepalive(&probes)?;
        }
        if let Some(timeout) = self.user_timeout {
            socket.set_tcp_user_timeout(Some(timeout))?;
        }
        Ok(())
    }
}

/// A socket for a connection to `address`, not yet connected.
pub(super) fn outgoing(address: &SocketAddr, kind: Type, options: &Options) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(*address), kind, Some(Protocol::TCP))?;
    options.apply(&socket)?;
    Ok(socket)
}

/// Makes the coming close a reset.
pub(super) fn close_with_reset(socket: &impl AsFd) {
    // A socket that cannot take the option is broken already and resets by itself.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

/// `<linux/sockios.h>`; the `libc` crate lacks it.
const SIOCOUTQNSD: Opcode = 0x894b;

/// What a connection shows at this moment.
pub(super) fn unheard(socket: &impl AsFd) -> Unheard {
    let shown = poll_now(socket, PollFlags::IN | PollFlags::RDHUP);
    if shown.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
        Unheard::End
    } else if shown.is_empty() {
        Unheard::Nothing
    } else {
        Unheard::Bytes
    }
}

/// Bytes that the kernel has taken and not sent for the first time, since the peer has no room.
pub(super) fn unsent(socket: &impl AsFd) -> u64 {
    count::<SIOCOUTQNSD>(socket)
}

/// Bytes that the kernel has taken and the peer has not acknowledged; none once it never will.
pub(super) fn unacknowledged(socket: &impl AsFd) -> u64 {
    let count = count::<{ libc::TIOCOUTQ as _ }>(socket);
    // Only a connection has a peer. (A hang-up would not do: it is also what both ends in order are.)
    if count > 0 && peer_address(socket).is_none() { 0 } else { count }
}

/// What the kernel says to a request for a number of bytes; none if it refuses.
fn count<const REQUEST: Opcode>(socket: &impl AsFd) -> u64 {
    // SAFETY: the requests of this module store an int, and nothing else.
    let count = unsafe { ioctl(socket, Getter::<REQUEST, libc::c_int>::new()) };
    count.ok().and_then(|count| u64::try_from(count).ok()).unwrap_or_default()
}

/// Which of these hold now; an error or a hang-up is told in any case.
fn poll_now(socket: &impl AsFd, flags: PollFlags) -> PollFlags {
    let mut fds = [PollFd::new(socket, flags)];
    match poll(&mut fds, Some(&Timespec::default())) {
        Ok(_) => fds[0].revents(),
        // It is not known to be well.
        Err(_) => PollFlags::ERR,
    }
}

/// The peer's address.
pub(super) fn peer_address(socket: &impl AsFd) -> Option<SocketAddr> {
    SockRef::from(socket).peer_addr().ok()?.as_socket()
}

/// The address that the peer connected to.
pub(super) fn local_address(socket: &impl AsFd) -> Option<SocketAddr> {
    SockRef::from(socket).local_addr().ok()?.as_socket()
}

/// Whether an address is one of this host's: then the kernel gives it to connections to it as their
/// own too. Nothing is sent.
pub fn is_local(ip: IpAddr) -> bool {
    let any: IpAddr = match ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let own = || {
        let socket = UdpSocket::bind((any, 0))?;
        // Any port will do.
        socket.connect((ip, 9))?;
        socket.local_addr()
    };
    own().is_ok_and(|own: SocketAddr| own.ip() == ip)
}

/// Drops the packets that would begin a handshake with `listener`, unanswered. Handshakes under way
/// go on: a client that has seen our answer counts on being served.
pub(super) fn refuse_handshakes(listener: &OwnedFd) {
    // Classic BPF; offsets count from the TCP header.
    const FLAGS_OFFSET: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    let only_others = [
        SockFilter::new(0x30 /* BPF_LD | BPF_B | BPF_ABS */, 0, 0, FLAGS_OFFSET),
        SockFilter::new(0x54 /* BPF_ALU | BPF_AND | BPF_K */, 0, 0, SYN | ACK),
        SockFilter::new(0x15 /* BPF_JMP | BPF_JEQ | BPF_K */, 0, 1, SYN),
        SockFilter::new(0x06 /* BPF_RET | BPF_K */, 0, 0, 0),
        SockFilter::new(0x06 /* BPF_RET | BPF_K */, 0, 0, u32::MAX),
    ];
    if let Err(error) = SockRef::from(listener).attach_filter(&only_others) {
        tracing::warn!(%error, "clients that connect while the listener closes may be reset");
    }
}

/// Takes every client that the kernel has accepted on `listener`.
pub(super) fn empty_accept_queue(listener: &OwnedFd) -> Vec<OwnedFd> {
    let mut clients = Vec::new();
    if rustix::io::ioctl_fionbio(listener, true).is_ok() {
        while let Ok(client) = rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            clients.push(client);
        }
    }
    clients
}
