//! Socket options, addresses and states, alike for all drivers.
#![allow(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use super::{Acks, Unheard};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::ioctl::{Getter, Opcode, ioctl};
use rustix::net::SocketFlags;
use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, TcpKeepalive, Type};

/// Options of every TCP socket of the data plane.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Idle time before keep-alive probes start; off when `None`.
    pub keepalive: Option<Duration>,
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
            socket.set_tcp_keepalive(&usual_probes(idle))?;
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

/// The kernel counts in whole seconds and refuses 0.
const SECOND: Duration = Duration::from_secs(1);

fn usual_probes(idle: Duration) -> TcpKeepalive {
    let interval = (idle / 4).max(SECOND);
    TcpKeepalive::new().with_time(idle.max(SECOND)).with_interval(interval).with_retries(4)
}

impl Options {
    /// Asks a peer whether it is there, each second once it has been silent for so long; or as these
    /// options say.
    pub(super) fn ask(&self, socket: &impl AsFd, silence: Option<Duration>) {
        let socket = SockRef::from(socket);
        let probes = match (silence, self.keepalive) {
            (Some(silence), _) => {
                send_again_steadily(&*socket);
                // The user gives up long before so many.
                let probes = TcpKeepalive::new().with_interval(SECOND).with_retries(127);
                Some(probes.with_time(silence.max(SECOND)))
            }
            (None, Some(idle)) => Some(usual_probes(idle)),
            (None, None) => None,
        };
        // What fails here is a connection that is broken, which is told by itself.
        let _ = match probes {
            Some(probes) => socket.set_tcp_keepalive(&probes),
            None => socket.set_keepalive(false),
        };
    }
}

/// Has the kernel send again what is not acknowledged without waiting twice as long each time, half a
/// dozen times where little is on its way: so a few seconds are enough to tell a link that loses
/// packets from one that loses all. (A smaller `TCP_RTO_MAX_MS` would do more, but at twice its value
/// the kernel itself gives up a peer without room.)
fn send_again_steadily(socket: &impl AsFd) {
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an int, and the kernel reads no more than that.
    unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_THIN_LINEAR_TIMEOUTS,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
    }
}

/// What the peer has acknowledged, as `TCP_INFO` tells.
pub(super) fn acks(socket: &impl AsFd) -> Option<Acks> {
    /// The beginning of `struct tcp_info`, up to the last member that is read. Linux before 5.4 lacks
    /// that, and gets no answer.
    type Info = [u32; 58];
    const PROBES_BYTE: usize = 3;
    const UNACKED: usize = 6;
    const LAST_DATA_SENT: usize = 11;
    const LAST_ACK_RECV: usize = 14;
    const BYTES_ACKED: [usize; 2] = [30, 31];
    const NOTSENT_BYTES: usize = 36;
    const SND_WND: usize = 57;
    let mut info: Info = [0; 58];
    let mut len = size_of::<Info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which is how many there are.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    if outcome != 0 || len as usize != size_of::<Info>() {
        return None;
    }
    let probes = info[0].to_ne_bytes()[PROBES_BYTE];
    let (unacked, has_room) = (info[UNACKED] > 0, info[SND_WND] > 0);
    // What finds no room is answered all the same, be it bytes or a probe. Until it is sent again the
    // peer has nothing to acknowledge, whatever the kernel still counts as on its way.
    let answered = info[LAST_ACK_RECV] <= info[LAST_DATA_SENT];
    let [first, second] = BYTES_ACKED.map(|at| info[at].to_ne_bytes());
    let mut acked = [0; 8];
    acked[..4].copy_from_slice(&first);
    acked[4..].copy_from_slice(&second);
    Some(Acks {
        awaited: probes > 0 || unacked && !answered,
        pending: unacked || info[NOTSENT_BYTES] > 0,
        last: Duration::from_millis(info[LAST_ACK_RECV].into()),
        sent: Duration::from_millis(info[LAST_DATA_SENT].into()),
        progress: (unacked && has_room).then_some(u64::from_ne_bytes(acked)),
    })
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
