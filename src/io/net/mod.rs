//! The network as the drivers see it: addresses, listeners and streams, whatever carries them.
//!
//! | | TCP | Unix |
//! | --- | --- | --- |
//! | options | no delay, keep-alive, urgent data in line | urgent data in line |
//! | a connect | takes time | is over at once; a full accept queue refuses it (`io::crowded`) |
//! | listening | a socket per worker | one, which all workers share |
//! | a reset | by `SO_LINGER` | only where bytes were left unread; else it looks like an end |
//! | acknowledgements, probes | `TCP_INFO` | none: there is no network to lose anything |
//! | room to send | told where a send has found none | told each time that the peer reads |
//! | taken and undelivered | what is not acknowledged | nothing: the peer has what the kernel took |
//!
//! What a transport does not have is answered here, so that nobody above needs to ask which it is.

mod address;
mod option;
mod tcp;
mod unix;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, SocketFlags};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{Acks, Network, Unheard};

pub use address::{Address, AddressError, PATH_LEN_MAX, UNIX};
pub use tcp::{Options, is_local};
pub use unix::{Credentials, credentials, refuse_descriptors};

/// What carries a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Tcp,
    Unix,
}

impl Transport {
    fn of(domain: Domain) -> Self {
        if domain == Domain::UNIX { Self::Unix } else { Self::Tcp }
    }

    /// Whether the listening sockets of all workers have one accept queue.
    pub(super) fn is_shared(self) -> bool {
        self == Self::Unix
    }

    /// A client that a listener of this transport has accepted.
    pub(super) fn accepted(self, fd: OwnedFd) -> Stream {
        if self == Self::Unix {
            // A TCP socket has it from its listener. Where there is no urgent data there is no need.
            let _ = SockRef::from(&fd).set_out_of_band_inline(true);
        }
        self.stream(fd)
    }

    fn stream(self, fd: OwnedFd) -> Stream {
        let takes_descriptors = self == Self::Unix && refuse_descriptors(&fd).is_err();
        Stream { fd, transport: self, takes_descriptors }
    }
}

/// A socket of a connection. To be closed it is dropped.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
    transport: Transport,
    /// Its peer may send descriptors along with bytes.
    takes_descriptors: bool,
}

impl Stream {
    /// One for a connection to `address`, not yet connected.
    pub(super) fn outgoing(address: &Address, kind: Type, options: &Options) -> io::Result<Self> {
        let domain = address.domain();
        let transport = Transport::of(domain);
        let socket = match transport {
            Transport::Tcp => {
                let socket = Socket::new(domain, kind, Some(Protocol::TCP))?;
                options.apply(&socket)?;
                socket
            }
            Transport::Unix => {
                let socket = Socket::new(domain, kind, None)?;
                socket.set_out_of_band_inline(true)?;
                socket
            }
        };
        Ok(transport.stream(socket.into()))
    }

    /// Receives what has come, as far as there is room. Says how many bytes that are, and whether
    /// descriptors were between them and what may follow: a receive stops there, whatever is behind.
    pub(super) fn receive(&self, space: &mut [u8]) -> Result<(usize, bool), Errno> {
        if !self.takes_descriptors {
            return Ok((rustix::net::recv(&self.fd, space, RecvFlags::empty())?.1, false));
        }
        let mut none = RecvAncillaryBuffer::default();
        let mut parts = [io::IoSliceMut::new(space)];
        let received = rustix::net::recvmsg(&self.fd, &mut parts, &mut none, RecvFlags::empty())?;
        Ok((received.bytes, received.flags.contains(ReturnFlags::CTRUNC)))
    }

    /// Whether a connect is over as soon as it is asked for.
    pub(super) fn connects_at_once(&self) -> bool {
        self.transport == Transport::Unix
    }

    /// Connects, or begins to: then it fails with `EINPROGRESS`. To be called while it does not block.
    pub(super) fn connect(&self, address: &Address) -> Result<(), Errno> {
        match address {
            Address::Tcp(address) => rustix::net::connect(&self.fd, address),
            Address::Unix(path) => {
                rustix::net::connect(&self.fd, &rustix::net::SocketAddrUnix::new(&**path)?)
            }
        }
    }

    /// Receives from a client that may have been accepted after [`Listener::refuse_handshakes`].
    pub(super) fn welcome(&self) {
        if self.transport == Transport::Tcp {
            tcp::welcome(&self.fd);
        }
    }

    /// The peer's address, where the transport has such addresses.
    pub(super) fn peer(&self) -> Option<SocketAddr> {
        SockRef::from(&self.fd).peer_addr().ok()?.as_socket()
    }

    /// The address at this end.
    pub(super) fn local(&self) -> Option<SocketAddr> {
        SockRef::from(&self.fd).local_addr().ok()?.as_socket()
    }

    /// Who is at the other end: of a client, who connected; of a backend, who listens.
    pub(super) fn credentials(&self) -> Option<Credentials> {
        match self.transport {
            Transport::Tcp => None,
            Transport::Unix => unix::credentials(&self.fd),
        }
    }

    /// Whether this process listens at the other end, under this path.
    pub(super) fn leads_back_to(&self, path: &Path) -> bool {
        self.transport == Transport::Unix && unix::leads_back_to(&self.fd, path)
    }

    /// Ends the direction towards the peer. Never blocks, and its failure shows in the next operation.
    pub(super) fn end_direction(&self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write);
    }

    /// Nothing more can be received behind what has arrived. The peer notices nothing.
    pub(super) fn stop_receiving(&self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Read);
    }

    /// Makes the coming close a reset, where the transport has them.
    pub(super) fn close_with_reset(&self) {
        if self.transport == Transport::Tcp {
            // A socket that cannot take the option is broken already and resets by itself.
            let _ = SockRef::from(&self.fd).set_linger(Some(Duration::ZERO));
        }
    }

    /// What a connection shows at this moment.
    pub(super) fn unheard(&self) -> Unheard {
        let shown = poll_now(&self.fd, PollFlags::IN | PollFlags::RDHUP);
        if shown.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
            Unheard::End
        } else if shown.is_empty() {
            Unheard::Nothing
        } else {
            Unheard::Bytes
        }
    }

    /// Whether the kernel tells of room each time that the peer reads, and not only where a send has
    /// found none.
    pub(super) fn tells_of_room_unasked(&self) -> bool {
        self.transport == Transport::Unix
    }

    /// Bytes that the kernel has taken and not sent for the first time, since the peer has no room.
    pub(super) fn unsent(&self) -> u64 {
        match self.transport {
            Transport::Tcp => tcp::unsent(&self.fd),
            Transport::Unix => 0,
        }
    }

    /// Bytes that the kernel has taken and the peer has not acknowledged; none once it never will.
    pub(super) fn unacknowledged(&self) -> u64 {
        match self.transport {
            Transport::Tcp => tcp::unacknowledged(&self.fd),
            Transport::Unix => 0,
        }
    }

    /// What the peer has acknowledged, if the transport tells.
    pub(super) fn acks(&self) -> Option<Acks> {
        match self.transport {
            Transport::Tcp => tcp::acks(&self.fd),
            Transport::Unix => None,
        }
    }

    /// What the kernel has measured of the way to the peer, if there is a network in between.
    pub(super) fn network(&self) -> Option<Network> {
        match self.transport {
            Transport::Tcp => tcp::network(&self.fd),
            Transport::Unix => None,
        }
    }

    /// Has the peer asked whether it is there, as [`super::Driver::ask`] says.
    pub(super) fn ask(&self, options: &Options, silence: Option<Duration>) {
        if self.transport == Transport::Tcp {
            options.ask(&self.fd, silence);
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl From<Stream> for OwnedFd {
    fn from(stream: Stream) -> Self {
        stream.fd
    }
}

/// A listening socket.
#[derive(Debug)]
pub(super) struct Listener {
    fd: OwnedFd,
    transport: Transport,
}

impl Listener {
    /// One that is bound and listens.
    ///
    /// # Errors
    /// It is no socket.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let transport = Transport::of(SockRef::from(&fd).domain()?);
        Ok(Self { fd, transport })
    }

    /// Takes a client that the kernel has accepted, if one waits.
    pub(super) fn accept(&self, flags: SocketFlags) -> Result<Stream, Errno> {
        Ok(self.transport.accepted(rustix::net::accept_with(&self.fd, flags)?))
    }

    /// What carries the streams of its clients.
    pub(super) fn transport(&self) -> Transport {
        self.transport
    }

    /// Lets no handshake begin, where the transport has handshakes: see [`tcp::refuse_handshakes`].
    pub(super) fn refuse_handshakes(&self) {
        if self.transport == Transport::Tcp {
            tcp::refuse_handshakes(&self.fd);
        }
    }

    /// Whether so many clients wait that some handshakes may have to be repeated.
    pub(super) fn is_crowded(&self) -> bool {
        self.transport == Transport::Tcp && tcp::is_crowded(&self.fd)
    }

    /// Takes every client that the kernel has accepted. Says whether all were taken: there may be no
    /// descriptors for some.
    pub(super) fn empty_accept_queue(&self) -> (Vec<Stream>, bool) {
        let mut clients = Vec::new();
        // Where the queue is shared nobody is to join it behind the last look, and `O_NONBLOCK`
        // would be that of the workers that accept still.
        let is_closed = self.transport.is_shared() && unix::refuse_connects(&self.fd).is_ok();
        if !is_closed && rustix::io::ioctl_fionbio(&self.fd, true).is_err() {
            return (clients, true);
        }
        loop {
            match self.accept(SocketFlags::CLOEXEC) {
                Ok(client) => {
                    client.welcome();
                    clients.push(client);
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    return (clients, false);
                }
                Err(_) => return (clients, true),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Which of these hold now; an error or a hang-up is reported in any case.
fn poll_now(socket: &impl AsFd, flags: PollFlags) -> PollFlags {
    let mut fds = [PollFd::new(socket, flags)];
    match poll(&mut fds, Some(&Timespec::default())) {
        Ok(_) => fds[0].revents(),
        // It is not known to be well.
        Err(_) => PollFlags::ERR,
    }
}
