//! Does the I/O that `proxy` decides on: a driver behind one interface, three times.
//!
//! | driver | what it is |
//! | --- | --- |
//! | [`uring`] | `io_uring`: completions, batched waits, buffers filled by the kernel |
//! | [`epoll`] | the complete twin where `io_uring` is blocked |
//! | `sim` | a seeded network in memory with virtual time, for tests |
//!
//! A driver owns its sockets, its buffers and each socket's queue of bytes to send. Its user
//! names sockets by [`ConnId`] and never sees a descriptor. One turn is: [`Driver::wait`], then
//! [`Driver::next`] until it is empty. A closed [`ConnId`] is dead at once for the user; the
//! driver reclaims its slot when the kernel has finished every operation on it. What is asked of a
//! dead one does nothing.
//!
//! What all drivers have alike is apart from them: the states of a connection's two halves
//! (`halves`), and what carries its bytes ([`net`]).

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

pub mod buffers;
mod crowded;
mod descriptors;
pub mod epoll;
mod halves;
mod lateness;
pub mod net;
pub mod probe;
mod provided;
mod resources;
mod restrictions;
mod ring;
mod signals;
#[cfg(test)]
pub mod sim;
mod splice;
pub mod uring;

pub use buffers::{Buf, Chain};
pub(crate) use descriptors::Claim;
pub(crate) use resources::Limit;
pub(crate) use signals::block_signals;
pub use signals::ignore_file_size_signal;

/// Names a connection of a driver.
pub type ConnId = crate::slab::Key<Conn>;

/// What a [`ConnId`] names.
#[derive(Debug)]
pub enum Conn {}

/// What has happened, one event at a time.
#[derive(Debug)]
pub enum Completion {
    /// A client was accepted from this one of [`DriverSetup::listeners`].
    Accepted(ConnId, usize),
    /// Accepting failed for want of descriptors or memory; it goes on after the next
    /// [`Driver::accept`].
    AcceptFailed(io::Error),
    /// A connect succeeded.
    Connected(ConnId),
    /// A connect failed. The connection is still to be closed.
    ConnectFailed(ConnId, io::Error),
    /// Bytes arrived.
    Received(ConnId, Buf),
    /// Bytes arrived, so many, and are already on their way to the connection joined with this one.
    Spliced(ConnId, u32),
    /// The peer ended its direction, behind all that was received; nothing more will be.
    Ended(ConnId),
    /// Receiving failed, behind all that had arrived before; nothing more will be received.
    ReceiveFailed(ConnId),
    /// So many bytes were taken by the socket.
    Sent(ConnId, u32),
    /// The connection broke: what was queued is gone, and nothing more can be sent. It is reported once,
    /// by a send or, while receiving is stopped, by the break itself. What had arrived before can
    /// still be received; since the error has been taken, [`Completion::Ended`] may come behind it
    /// in place of [`Completion::ReceiveFailed`].
    SendFailed(ConnId),
    /// Somebody wrote to the wake-up descriptor.
    Woken,
}

impl Completion {
    /// The connection that the event is about, if it is about one.
    pub fn conn(&self) -> Option<ConnId> {
        match *self {
            Self::Accepted(conn, _)
            | Self::Connected(conn)
            | Self::ConnectFailed(conn, _)
            | Self::Received(conn, _)
            | Self::Spliced(conn, _)
            | Self::Ended(conn)
            | Self::ReceiveFailed(conn)
            | Self::Sent(conn, _)
            | Self::SendFailed(conn) => Some(conn),
            Self::AcceptFailed(_) | Self::Woken => None,
        }
    }
}

/// What a connection shows when it is looked at, whatever [`Driver::next`] has reported so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unheard {
    /// It is open and silent.
    Nothing,
    /// Bytes wait on it, and its end has not come.
    Bytes,
    /// Its peer has ended or broken it, perhaps behind bytes that wait.
    End,
}

/// What the kernel knows of a peer's acknowledgements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acks {
    /// Something is on its way to the peer that it has not acknowledged: bytes, an end, or a probe.
    pub awaited: bool,
    /// There are bytes that it does not have, if only for want of room there.
    pub pending: bool,
    /// How long ago anything came from it, if only an acknowledgement.
    pub last: Duration,
    /// How long ago anything was sent to it, be it once more.
    pub sent: Duration,
    /// How many bytes it has acknowledged so far, where it has room for those on their way: then
    /// nothing but more of them shows that they arrive. What it repeats itself shows nothing.
    pub progress: Option<u64>,
}

/// What the kernel has measured of the way to a peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Network {
    /// How long it takes from a segment to its acknowledgement, smoothed.
    pub rtt: Duration,
    /// Segments with data that were sent, those sent again included.
    pub segments: u32,
    /// Segments that were sent again.
    pub retransmits: u32,
    /// Segments on their way now.
    pub unacked: u32,
    /// Bytes a second that arrived, as of the latest measurement; 0 before the first.
    pub delivery_rate: u64,
}

/// How to close a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// With the ordinary end of stream.
    Graceful,
    /// With a reset, so that the peer sees an error.
    Reset,
}

/// How long to wait for events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// Return as soon as there are so many (at least 1).
    pub events: u32,
    /// Wait no longer than this for more than one.
    pub batch: Duration,
    /// Wait no longer than this for the first.
    pub most: Duration,
    /// Others want the core: a driver that cannot wait for several events leaves it to them for
    /// as long as those may take.
    pub contended: bool,
}

impl Wait {
    /// For a single event, no longer than `most`.
    pub fn for_one(most: Duration) -> Self {
        Self { events: 1, batch: Duration::ZERO, most, contended: false }
    }
}

/// What a driver needs at start.
#[derive(Debug)]
pub struct DriverSetup {
    /// Bound and listening sockets of this worker.
    pub listeners: Vec<OwnedFd>,
    /// The mailbox's descriptor.
    pub wake: OwnedFd,
    /// Connections at a time, those of clients, backends and pools together.
    pub conns_max: usize,
    /// Buffers of [`crate::limits::BUFFER_SIZE`].
    pub buffers_max: usize,
}

/// One way of doing I/O.
pub trait Driver {
    /// The time, read once a turn.
    fn now(&self) -> Instant;

    /// Submits what is pending and waits for events. Says whether there was time to spare: it may
    /// have fallen asleep for a single event, or a batch has not become full in time.
    ///
    /// # Errors
    /// The kernel refuses to go on with this ring or epoll instance; the worker cannot continue.
    fn wait(&mut self, wait: Wait) -> io::Result<bool>;

    /// The next event of this turn.
    fn next(&mut self) -> Option<Completion>;

    /// Whether the latest wait was over long after it was to be, and not all is told that had come by
    /// then: no time limit is known to be over. To be asked once [`Driver::next`] is empty.
    fn is_behind(&mut self) -> bool {
        false
    }

    /// How many more clients may be accepted from now on; 0 stops accepting.
    fn accept(&mut self, room: usize);

    /// Whether the clients of this one of [`DriverSetup::listeners`] are left in the kernel's queue,
    /// whatever the room.
    fn hold(&mut self, listener: usize, held: bool);

    /// Lets no new handshake begin. Those under way still end in the accept queues. Says whether
    /// those are so full that some handshakes may have to be repeated.
    fn refuse_handshakes(&mut self) -> bool;

    /// Empties the kernel's accept queues into [`Completion::Accepted`], then closes the
    /// listeners. A while after [`Driver::refuse_handshakes`] no client is accepted by the kernel
    /// and dropped by this. Says whether all are closed: one stays open while somebody waits for
    /// whom there is no descriptor.
    fn stop_listening(&mut self) -> bool;

    /// Gives up a client that has just been accepted, so that another driver of the same kind can
    /// adopt it. `None` if something was asked for it already; then it stays.
    fn release(&mut self, conn: ConnId) -> Option<net::Stream>;

    /// Takes on a client that was accepted elsewhere, such as one that another driver has released.
    /// A client for which there is no room is dropped.
    fn adopt(&mut self, client: net::Stream) -> Option<ConnId>;

    /// Starts connecting.
    ///
    /// # Errors
    /// No descriptor or slot is free, or the address cannot be used at all.
    fn connect(&mut self, address: &net::Address, options: &net::Options) -> io::Result<ConnId>;

    /// Says that what is received from either of two connections is to be sent to the other one as
    /// it is. The driver may then move bulk without [`Completion::Received`], and tells it by
    /// [`Completion::Spliced`]; [`Completion::Sent`] follows as ever. So that all stays in order,
    /// what [`Driver::next`] has brought is sent before it is called again.
    fn join(&mut self, a: ConnId, b: ConnId);

    /// Starts or stops receiving. What was received before the stop took effect still arrives.
    fn receive(&mut self, conn: ConnId, on: bool);

    /// Queues bytes behind those already queued. The buffer is released once they are sent, and at
    /// once where [`Completion::SendFailed`] was reported.
    fn send(&mut self, conn: ConnId, buf: Buf);

    /// Ends the direction towards the peer, behind all that is queued.
    fn shutdown(&mut self, conn: ConnId);

    /// Closes a connection; what is still queued for it is dropped.
    fn close(&mut self, conn: ConnId, how: Close);

    /// Whether a connection still has a descriptor: one that was closed may keep it until the kernel
    /// has finished what it does with that. Once it has none it is closed with the next
    /// [`Driver::wait`] at the latest.
    fn has_descriptor(&self, conn: ConnId) -> bool;

    /// Looks at a connection itself: what the kernel knows of it at this moment, be it reported or not.
    /// It costs a system call.
    fn unheard(&mut self, conn: ConnId) -> Unheard;

    /// Bytes on their way to the peer, queued here or in the kernel, that have not left this host, so
    /// that a reset would be all that the peer sees of them. It costs a system call.
    fn unsent(&self, conn: ConnId) -> u64;

    /// Bytes on their way to the peer, queued here or in the kernel, of which it has not
    /// acknowledged that it has them. None of a connection that is broken. It costs a system call.
    fn undelivered(&self, conn: ConnId) -> u64;

    /// What the peer has acknowledged. It costs a system call. `None` of a connection that is broken,
    /// or whose transport does not tell.
    fn acks(&self, conn: ConnId) -> Option<Acks>;

    /// What the kernel has measured of the way to the peer. It costs a system call. `None` where there
    /// is no network in between.
    fn network(&self, _: ConnId) -> Option<Network> {
        None
    }

    /// Has the kernel ask the peer whether it is there, each second once it has been silent for so
    /// long, and send what it does not acknowledge again more often than usual. `None`: as usual, by
    /// the options that it was connected with.
    fn ask(&mut self, conn: ConnId, options: &net::Options, silence: Option<Duration>);

    /// The peer's address. `None` over Unix sockets.
    fn peer_address(&self, conn: ConnId) -> Option<SocketAddr>;

    /// The address at this end: of a client's connection, the one that it connected to. `None` over
    /// Unix sockets.
    fn local_address(&self, conn: ConnId) -> Option<SocketAddr>;

    /// Who is at the other end of a Unix socket. It costs a system call.
    fn credentials(&self, _: ConnId) -> Option<net::Credentials> {
        None
    }

    /// Whether the connection is one to a Unix socket that this process listens on, bound to `path`,
    /// whatever it was reached by. It costs two system calls.
    fn leads_back_to(&self, _: ConnId, _path: &Path) -> bool {
        false
    }

    /// Whether this one of [`DriverSetup::listeners`] has one accept queue with those of other
    /// drivers. Then all of it may come to one driver.
    fn is_shared(&self, _listener: usize) -> bool {
        false
    }

    /// The buffers.
    fn buffers(&mut self) -> &mut buffers::Buffers;

    /// Whether descriptors are so short that backends' connections are made from a reserve. Nobody
    /// is accepted then.
    fn is_short_of_descriptors(&self) -> bool {
        false
    }

    /// Buffers that hold nothing yet, and are with the kernel for what comes.
    fn buffers_provided(&self) -> u32 {
        0
    }

    /// Times a receive had to wait for a buffer, since the start.
    fn buffer_waits(&self) -> u64;

    /// Times that moving bulk within the kernel failed, for want of descriptors or where something
    /// forbids it, since the start. It is copied then, and moved again some time later.
    fn splice_failures(&self) -> u64 {
        0
    }

    /// Times that the kernel said what cannot be, since the start. It costs the connection that it was said of.
    fn strays(&self) -> u64 {
        0
    }
}
