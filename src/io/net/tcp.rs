//! What TCP alone has: its options, what `TCP_INFO` tells, handshakes.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Once;
use std::time::Duration;

use rustix::ioctl::{Getter, Opcode, ioctl};
use socket2::{Domain, SockRef, Socket, TcpKeepalive};

use super::option::set_int;
use crate::io::{Acks, Network};

/// Options of every TCP socket of the data plane.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Idle time before keep-alive probes start; off when `None`.
    pub keepalive: Option<Duration>,
    /// A peer that is asked may leave that unanswered for so long before the kernel gives it up.
    pub silence_max: Duration,
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

/// The kernel counts in whole seconds and refuses 0.
const SECOND: Duration = Duration::from_secs(1);
/// It refuses more than these.
const KEEPALIVE_TIME_MAX: Duration = Duration::from_secs(32_767);
const KEEPALIVE_PROBES_MAX: u32 = 127;

fn usual_probes(idle: Duration) -> TcpKeepalive {
    let interval = (idle / 4).max(SECOND);
    TcpKeepalive::new().with_time(idle.max(SECOND)).with_interval(interval).with_retries(4)
}

impl Options {
    /// Asks a peer whether it is there, each second once it has been silent for so long, or more rarely
    /// where it has longer than so many probes take; or as these options say.
    pub(super) fn ask(&self, socket: &impl AsFd, silence: Option<Duration>) {
        let socket = SockRef::from(socket);
        let probes = match (silence, self.keepalive) {
            (Some(silence), _) => {
                send_again_steadily(&*socket);
                let interval = self.silence_max.div_f64(KEEPALIVE_PROBES_MAX.into());
                let probes = TcpKeepalive::new()
                    .with_time(silence.clamp(SECOND, KEEPALIVE_TIME_MAX))
                    .with_interval(interval + SECOND)
                    .with_retries(KEEPALIVE_PROBES_MAX);
                Some(probes)
            }
            (None, Some(idle)) => Some(usual_probes(idle)),
            (None, None) => None,
        };
        // What fails here is a connection that is broken, which is reported by itself.
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
    // Where it fails the connection is broken, which is reported by itself.
    let _ = set_int(socket, libc::IPPROTO_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, 1);
}

/// The beginning of `struct tcp_info`, up to the last member that is read here.
type TcpInfo = [u32; 58];

/// What the kernel tells of a socket in `TCP_INFO`, and how many bytes of it: older ones tell less.
fn tcp_info(socket: &impl AsFd) -> io::Result<(TcpInfo, usize)> {
    let fd = socket.as_fd().as_raw_fd();
    let mut info: TcpInfo = [0; 58];
    let mut len = size_of::<TcpInfo>() as libc::socklen_t;
    let (level, name, at) = (libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast());
    // SAFETY: the kernel writes at most `len` bytes, which is how many there are.
    let code = unsafe { libc::getsockopt(fd, level, name, at, &raw mut len) };
    if code == 0 { Ok((info, len as usize)) } else { Err(io::Error::last_os_error()) }
}

/// A member of 64 bits that begins at this place.
fn wide(info: &TcpInfo, at: usize) -> u64 {
    let [first, second] = [info[at], info[at + 1]].map(u32::to_ne_bytes);
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first);
    bytes[4..].copy_from_slice(&second);
    u64::from_ne_bytes(bytes)
}

/// What `TCP_INFO` tells of the way to the peer.
pub(super) fn network(socket: &impl AsFd) -> Option<Network> {
    const UNACKED: usize = 6;
    const RTT_US: usize = 17;
    const TOTAL_RETRANS: usize = 25;
    const DATA_SEGS_OUT: usize = 39;
    const DELIVERY_RATE: usize = 40;
    let (info, len) = tcp_info(socket).ok()?;
    // Linux before 4.9 lacks the last one.
    (len >= (DELIVERY_RATE + 2) * size_of::<u32>()).then(|| Network {
        rtt: Duration::from_micros(info[RTT_US].into()),
        segments: info[DATA_SEGS_OUT],
        retransmits: info[TOTAL_RETRANS],
        unacked: info[UNACKED],
        delivery_rate: wide(&info, DELIVERY_RATE),
    })
}

/// What the peer has acknowledged, as `TCP_INFO` tells.
pub(super) fn acks(socket: &impl AsFd) -> Option<Acks> {
    const PROBES_BYTE: usize = 3;
    const UNACKED: usize = 6;
    const LAST_DATA_SENT: usize = 11;
    const LAST_ACK_RECV: usize = 14;
    const BYTES_ACKED: usize = 30;
    const NOTSENT_BYTES: usize = 36;
    const SND_WND: usize = 57;
    let (info, len) = tcp_info(socket).ok()?;
    if len != size_of::<TcpInfo>() {
        // Linux before 5.4 lacks the last one.
        return None;
    }
    let probes = info[0].to_ne_bytes()[PROBES_BYTE];
    let (unacked, has_room) = (info[UNACKED] > 0, info[SND_WND] > 0);
    // What finds no room is answered all the same, be it bytes or a probe. Until it is sent again the
    // peer has nothing to acknowledge, whatever the kernel still counts as on its way.
    let answered = info[LAST_ACK_RECV] <= info[LAST_DATA_SENT];
    Some(Acks {
        awaited: probes > 0 || unacked && !answered,
        pending: unacked || info[NOTSENT_BYTES] > 0,
        last: Duration::from_millis(info[LAST_ACK_RECV].into()),
        sent: Duration::from_millis(info[LAST_DATA_SENT].into()),
        progress: (unacked && has_room).then(|| wide(&info, BYTES_ACKED)),
    })
}

/// `<linux/sockios.h>`; the `libc` crate lacks it.
const SIOCOUTQNSD: Opcode = 0x894b;

/// Bytes that the kernel has taken and not sent for the first time, since the peer has no room.
pub(super) fn unsent(socket: &impl AsFd) -> u64 {
    count::<SIOCOUTQNSD>(socket)
}

/// Bytes that the kernel has taken and the peer has not acknowledged; none once it never will.
pub(super) fn unacknowledged(socket: &impl AsFd) -> u64 {
    let count = count::<{ libc::TIOCOUTQ as _ }>(socket);
    // Only a connection has a peer. (A hang-up would not do: it is also what both ends in order are.)
    if count > 0 && SockRef::from(socket).peer_addr().is_err() { 0 } else { count }
}

/// What the kernel says to a request for a number of bytes; none if it refuses.
fn count<const REQUEST: Opcode>(socket: &impl AsFd) -> u64 {
    // SAFETY: the requests of this module store an int, and nothing else.
    let count = unsafe { ioctl(socket, Getter::<REQUEST, libc::c_int>::new()) };
    count.ok().and_then(|count| u64::try_from(count).ok()).unwrap_or_default()
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

/// A hop limit that no packet of a client reaches: systems begin at 64 or 128.
const HOP_LIMIT_OUT_OF_REACH: libc::c_int = 255;

/// Drops the packets that would begin a handshake with `listener`, unanswered. Handshakes under way
/// go on: a client that has seen our answer counts on being served.
///
/// The kernel holds what is addressed to a listener against the listener's `IP_MINTTL`, but the last
/// packet of a handshake is addressed to the request that the first has left behind. It needs no
/// capability, where a filter attached to the socket does. Clients are accepted with the same limit,
/// so [`welcome`] has to lift it.
pub(super) fn refuse_handshakes(listener: &OwnedFd) {
    static LOGGED: Once = Once::new();
    if let Err(error) = set_hop_limit_min(listener, HOP_LIMIT_OUT_OF_REACH) {
        LOGGED.call_once(|| {
            tracing::warn!(%error, "clients that connect while the listeners close may be reset");
        });
    }
}

/// Receives from a client that may have been accepted after [`refuse_handshakes`]. What was dropped
/// of it until now it sends again after 200 ms.
pub(super) fn welcome(client: &OwnedFd) {
    // What cannot be lifted was not set.
    let _ = set_hop_limit_min(client, 0);
}

/// Drops packets with fewer hops left than that; 0 lets all pass.
fn set_hop_limit_min(socket: &OwnedFd, min: libc::c_int) -> io::Result<()> {
    let (level, name) = match SockRef::from(socket).domain()? {
        Domain::IPV4 => (libc::IPPROTO_IP, libc::IP_MINTTL),
        Domain::IPV6 => (libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT),
        // Others have no hops, and no handshakes that take time.
        _ => return Ok(()),
    };
    set_int(socket, level, name, min)
}

/// Whether so many clients wait on `listener` that some may take themselves for connected that have
/// found its queue full: the kernel then drops the last packet of their handshake.
pub(super) fn is_crowded(listener: &OwnedFd) -> bool {
    // What `struct tcp_info` says of a listener: how many wait, and how many may.
    const WAITING: usize = 6;
    const WAITING_MAX: usize = 7;
    tcp_info(listener).is_ok_and(|(info, _)| info[WAITING] > info[WAITING_MAX] / 2)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use socket2::{Protocol, Type};

    use super::*;
    use crate::io::net::Listener;

    fn listener(address: &str, backlog: i32) -> (Listener, SocketAddr) {
        let address: SocketAddr = address.parse().unwrap();
        let socket =
            Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).unwrap();
        socket.bind(&address.into()).unwrap();
        socket.listen(backlog).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        (Listener::new(socket.into()).unwrap(), address)
    }

    #[test]
    fn handshakes_under_way_end_though_no_other_begins() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (listener, address) = listener(address, 16);
            // So the kernel waits for data, and passes the last packet of a handshake over.
            set_int(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 30).unwrap();
            let mut early = TcpStream::connect(address).unwrap();
            listener.refuse_handshakes();
            let late = TcpStream::connect_timeout(&address, Duration::from_millis(100));
            assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut, "{address}");
            assert!(listener.empty_accept_queue().0.is_empty(), "{address}");

            early.write_all(b"early").unwrap();
            let (mut clients, emptied) = listener.empty_accept_queue();
            assert!(emptied && clients.len() == 1, "{address}: {clients:?}");
            let mut client = TcpStream::from(OwnedFd::from(clients.remove(0)));
            client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut bytes = [0; 9];
            client.read_exact(&mut bytes[..5]).unwrap();
            early.write_all(b"more").unwrap();
            client.read_exact(&mut bytes[5..]).unwrap();
            assert_eq!(&bytes, b"earlymore", "{address}");
        }
    }

    #[test]
    fn who_is_asked_has_as_long_to_answer_as_the_options_say() {
        let (_listener, address) = listener("127.0.0.1:0", 1);
        let client = TcpStream::connect(address).unwrap();
        let socket = SockRef::from(&client);
        let day = Duration::from_secs(86_400);
        for (silence, silence_max) in [(SECOND, SECOND), (SECOND, 15 * SECOND), (day, 3 * day)] {
            Options { keepalive: None, silence_max }.ask(&client, Some(silence));
            assert!(socket.keepalive().unwrap());
            assert_eq!(socket.tcp_keepalive_time().unwrap(), silence.min(KEEPALIVE_TIME_MAX));
            let interval = socket.tcp_keepalive_interval().unwrap();
            let max = interval * socket.tcp_keepalive_retries().unwrap();
            assert!(max >= silence_max, "{max:?} of {silence_max:?}");
            assert!(silence_max > 60 * SECOND || interval == SECOND, "{interval:?}");
            Options::default().ask(&client, None);
            assert!(!socket.keepalive().unwrap());
        }
    }

    #[test]
    fn a_queue_is_crowded_when_more_than_half_full() {
        let (listener, address) = listener("127.0.0.1:0", 4);
        let mut clients = Vec::new();
        for crowded in [false, false, false, true] {
            assert_eq!(listener.is_crowded(), crowded, "{} of 4 wait", clients.len());
            clients.push(TcpStream::connect(address).unwrap());
        }
        assert_eq!(listener.empty_accept_queue().0.len(), 4);
        assert!(!listener.is_crowded());
    }
}
