//! The `io_uring` driver.
//!
//! One system call a turn submits everything and waits for a batch. Receives are multishot: armed
//! once, the kernel takes a buffer from the ring of provided ones whenever bytes arrive, and those
//! bytes are sent from the same buffer.
//!
//! A socket's slot is reclaimed when its last operation has come back: [`Ops`] says which are out.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr;
use std::time::Instant;

use io_uring::squeue::Flags;
use io_uring::types::Fd;
use io_uring::{cqueue, opcode, squeue};
use rustix::io::Errno;

use super::buffers::{Buf, Buffers, Chain};
use super::probe::Features;
use super::provided::ProvidedBuffers;
use super::ring::Ring;
use super::{Close, Completion, ConnId, Driver, DriverSetup, Wait, socket};
use crate::limits;
use crate::slab::Slab;

/// A send up to this size is expected to complete as it is submitted.
const SEND_INLINE_MAX: u32 = 4096;

/// What an operation is, packed into its user data beside the slot and its generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Accept = 1,
    Connect = 2,
    Receive = 3,
    Send = 4,
    Wake = 5,
    /// Ends a wait.
    Timer = 8,
    /// Waits for an error of a socket that is not received from.
    Watch = 7,
    /// Cancels and closes: nobody waits for their result.
    Forget = 6,
}

fn user_data(kind: Kind, key: ConnId) -> u64 {
    debug_assert!(key.index() < 1 << 28);
    (kind as u64) << 60 | (key.index() as u64) << 32 | u64::from(key.generation())
}

fn parse_user_data(data: u64) -> (Option<Kind>, ConnId) {
    let kind = match data >> 60 {
        1 => Some(Kind::Accept),
        2 => Some(Kind::Connect),
        3 => Some(Kind::Receive),
        4 => Some(Kind::Send),
        5 => Some(Kind::Wake),
        7 => Some(Kind::Watch),
        8 => Some(Kind::Timer),
        _ => None,
    };
    (kind, ConnId::from_parts((data >> 32) as u32 & 0x0fff_ffff, data as u32))
}

/// The receiving side of a socket.
///
/// ```text
/// Idle ──arm──▶ Armed ──stop──▶ Stopping
///  ▲             │ last completion   │
///  └─────────────┴───────────────────┘      Starving: as Idle, waits for a free buffer
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiving {
    Idle,
    Armed,
    Stopping,
    Starving,
}

/// Which operations the kernel holds for a socket: one bit a [`Kind`], at most one operation each.
#[derive(Debug, Clone, Copy, Default)]
struct Ops(u8);

impl Ops {
    fn add(&mut self, kind: Kind) {
        debug_assert!(!self.has(kind), "{kind:?} twice");
        self.0 |= 1 << kind as u8;
    }

    fn remove(&mut self, kind: Kind) {
        self.0 &= !(1 << kind as u8);
    }

    fn has(self, kind: Kind) -> bool {
        self.0 & (1 << kind as u8) != 0
    }

    fn any(self) -> bool {
        self.0 != 0
    }
}

#[allow(
    clippy::struct_excessive_bools,
    reason = "independent facts, each told by the kernel or the user"
)]
struct Socket {
    fd: OwnedFd,
    ops: Ops,
    receiving: Receiving,
    /// The user wants to receive.
    wanted: bool,
    /// The user has wanted to, and does not now.
    stopped: bool,
    /// It brings more than can be passed on: received from one buffer at a time, since a multishot
    /// receive may run many buffers ahead before it can be stopped.
    bulk: bool,
    /// The peer's direction has ended or failed.
    ended: bool,
    /// In the list of sockets to arm or to flush before the next wait.
    pending: bool,
    shutdown: bool,
    closing: bool,
    /// The bytes of a send that completes as it is submitted, and posts only a failure.
    inline: Option<NonZeroU32>,
    /// The latest inline send found no room.
    congested: bool,
    queue: Chain,
}

impl Socket {
    fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            ops: Ops::default(),
            receiving: Receiving::Idle,
            wanted: false,
            stopped: false,
            bulk: false,
            ended: false,
            pending: false,
            shutdown: false,
            closing: false,
            inline: None,
            congested: false,
            queue: Chain::default(),
        }
    }
}

struct Listener {
    /// `None` once it no longer listens.
    fd: Option<OwnedFd>,
    /// An accept is with the kernel: `Some(true)` if it is a multishot one.
    armed: Option<bool>,
    stopping: bool,
}

/// The `io_uring` driver of one worker.
pub struct Uring {
    // Dropped first, so that no operation outlives the memory below.
    ring: Ring,
    provided: ProvidedBuffers,
    buffers: Buffers,
    sockets: Slab<Socket>,
    listeners: Vec<Listener>,
    wake: OwnedFd,
    options: socket::Options,
    lean_below: u32,
    room: usize,
    now: Instant,
    accepted: VecDeque<ConnId>,
    pending: Vec<ConnId>,
    starving: VecDeque<ConnId>,
    /// Sockets with an inline send of which nothing is known yet.
    inline: VecDeque<ConnId>,
    buffer_waits: u64,
}

impl Uring {
    /// Sets the ring up. To be called on the worker's own thread, which alone may use it.
    ///
    /// # Errors
    /// The kernel denies the ring or one of its parts.
    pub fn new(setup: DriverSetup, features: Features) -> io::Result<Self> {
        let ring = Ring::new(features)?;
        let provided = ProvidedBuffers::register(ring.uring(), limits::BUFFER_RING_ENTRIES)?;
        let mut driver = Self {
            provided,
            sockets: Slab::with_capacity(setup.conns_max),
            listeners: setup
                .listeners
                .into_iter()
                .map(|fd| Listener { fd: Some(fd), armed: None, stopping: false })
                .collect(),
            wake: setup.wake,
            options: setup.options,
            lean_below: setup.buffers_lean_below,
            room: 0,
            now: Instant::now(),
            accepted: VecDeque::new(),
            pending: Vec::with_capacity(setup.conns_max),
            starving: VecDeque::with_capacity(setup.conns_max),
            inline: VecDeque::with_capacity(setup.conns_max),
            buffer_waits: 0,
            ring,
            buffers: Buffers::new(setup.buffers_max)?,
        };
        for fd in driver.listeners.iter().filter_map(|listener| listener.fd.as_ref()) {
            // io_uring polls by itself; O_NONBLOCK would make it fail with EAGAIN instead.
            rustix::io::ioctl_fionbio(fd, false)?;
        }
        driver.arm_wake();
        Ok(driver)
    }

    /// Queues an operation that points to no memory but that of the buffers.
    fn push(&mut self, entry: squeue::Entry, kind: Kind, conn: ConnId) {
        // SAFETY: buffers of the pool stay taken until the operation on them has completed.
        unsafe { self.ring.push(&entry.user_data(user_data(kind, conn))) }
    }

    fn arm_wake(&mut self) {
        let fd = Fd(self.wake.as_raw_fd());
        let poll = opcode::PollAdd::new(fd, libc::POLLIN as u32).multi(true).build();
        self.push(poll, Kind::Wake, ConnId::from_parts(0, 0));
    }

    fn forget(&mut self, entry: squeue::Entry) {
        self.ring.forget(entry, user_data(Kind::Forget, ConnId::from_parts(0, 0)));
    }

    fn cancel(&mut self, kind: Kind, conn: ConnId) {
        self.forget(opcode::AsyncCancel::new(user_data(kind, conn)).build());
    }

    fn mark_pending(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn)
            && !socket.pending
        {
            socket.pending = true;
            self.pending.push(conn);
        }
    }

    /// Turns what the user asked for since the last wait into submissions.
    fn settle(&mut self) {
        self.provided.refill(&mut self.buffers);
        if self.provided.available() > 0 {
            // All of them: those that starve on again come back at no great cost.
            while let Some(conn) = self.starving.pop_front() {
                if let Some(socket) = self.sockets.get_mut(conn)
                    && socket.receiving == Receiving::Starving
                {
                    socket.receiving = Receiving::Idle;
                }
                self.mark_pending(conn);
            }
        }
        // Taken out and put back, so that its memory is kept.
        let mut pending = mem::take(&mut self.pending);
        for conn in pending.drain(..) {
            self.settle_socket(conn);
        }
        self.pending = pending;
        for index in 0..self.listeners.len() {
            self.settle_listener(index);
        }
    }

    /// Whether buffers are short: then each receive takes one, so that no socket runs ahead.
    fn is_lean(&self) -> bool {
        self.buffers.free() < self.lean_below
    }

    fn settle_socket(&mut self, conn: ConnId) {
        let lean = self.is_lean();
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        socket.pending = false;
        if socket.closing {
            return;
        }
        let fd = Fd(socket.fd.as_raw_fd());
        if socket.wanted && !socket.ended && socket.receiving == Receiving::Idle {
            socket.receiving = Receiving::Armed;
            socket.ops.add(Kind::Receive);
            let entry = if lean || socket.bulk {
                let receive = opcode::Recv::new(fd, ptr::null_mut(), limits::BUFFER_SIZE as u32);
                receive.buf_group(ProvidedBuffers::GROUP).build().flags(Flags::BUFFER_SELECT)
            } else {
                opcode::RecvMulti::new(fd, ProvidedBuffers::GROUP).build()
            };
            self.push(entry, Kind::Receive, conn);
        }
        self.watch(conn);
        self.flush(conn);
    }

    /// Lets a stopped socket still tell of a reset, which no receive would show.
    fn watch(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if socket.stopped
            && !socket.ended
            && socket.receiving == Receiving::Idle
            && !socket.ops.has(Kind::Watch)
        {
            socket.ops.add(Kind::Watch);
            let fd = Fd(socket.fd.as_raw_fd());
            let poll = opcode::PollAdd::new(fd, libc::POLLERR as u32).build();
            self.push(poll, Kind::Watch, conn);
        }
    }

    /// Sends what is queued, then ends the direction if that was asked for.
    ///
    /// A small send nearly always finds room in the socket. It is submitted so that it completes
    /// at once, wholly or with an error: `MSG_DONTWAIT` keeps the kernel from waiting for room,
    /// `MSG_WAITALL` makes a part of it a failure, and success posts no completion. So sends do
    /// not end the waiting for what is to be received.
    fn flush(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if socket.ops.has(Kind::Send) {
            return;
        }
        if socket.queue.is_empty() {
            if mem::take(&mut socket.shutdown) {
                // Never blocks, and its failure shows in the next operation.
                let _ = rustix::net::shutdown(&socket.fd, rustix::net::Shutdown::Write);
            }
            return;
        }
        socket.ops.add(Kind::Send);
        let fd = Fd(socket.fd.as_raw_fd());
        if socket.queue.buffers() == 1 {
            let Some((bytes, count)) = self.buffers.parts(&socket.queue).next() else { return };
            let send = opcode::Send::new(fd, bytes.as_ptr(), count as u32);
            let send = if count as u32 <= SEND_INLINE_MAX && !socket.congested {
                socket.inline = NonZeroU32::new(count as u32);
                self.inline.push_back(conn);
                let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT | libc::MSG_WAITALL;
                send.flags(flags).build().flags(Flags::SKIP_SUCCESS)
            } else {
                send.flags(libc::MSG_NOSIGNAL).build()
            };
            self.push(send, Kind::Send, conn);
        } else {
            let parts = self.buffers.parts(&socket.queue);
            // SAFETY: the queue's buffers stay taken until the send has completed.
            unsafe { self.ring.send_parts(fd, parts, user_data(Kind::Send, conn)) }
        }
    }

    fn settle_listener(&mut self, index: usize) {
        let queues = self.listeners.len() * limits::LISTEN_BACKLOG as usize;
        let listener = &mut self.listeners[index];
        let Some(fd) = &listener.fd else { return };
        let fd = Fd(fd.as_raw_fd());
        // A multishot accept may empty the whole queue before it can be stopped: near the limit,
        // clients are accepted one by one.
        let multi = self.room > queues;
        let key = ConnId::from_parts(index as u32, 0);
        match listener.armed {
            None if self.room > 0 => {
                listener.armed = Some(multi);
                let entry = if multi {
                    opcode::AcceptMulti::new(fd).flags(libc::SOCK_CLOEXEC).build()
                } else {
                    let accept = opcode::Accept::new(fd, ptr::null_mut(), ptr::null_mut());
                    accept.flags(libc::SOCK_CLOEXEC).build()
                };
                self.push(entry, Kind::Accept, key);
            }
            Some(armed_multi)
                if !listener.stopping && (self.room == 0 || (armed_multi && !multi)) =>
            {
                listener.stopping = true;
                self.cancel(Kind::Accept, key);
            }
            _ => {}
        }
    }

    fn adopt(&mut self, fd: OwnedFd) -> Option<ConnId> {
        // A full table drops the client; `limits::conns_max` has room for more than can come.
        self.sockets.insert(Socket::new(fd)).ok()
    }

    fn on_accept(&mut self, index: usize, entry: &cqueue::Entry) -> Option<Completion> {
        let listener = self.listeners.get_mut(index)?;
        if !cqueue::more(entry.flags()) {
            listener.armed = None;
            listener.stopping = false;
        }
        match result(entry) {
            Ok(fd) => {
                // SAFETY: the kernel has just given this descriptor to us alone.
                let fd = unsafe { OwnedFd::from_raw_fd(fd.cast_signed()) };
                self.adopt(fd).map(Completion::Accepted)
            }
            Err(Errno::CANCELED | Errno::CONNABORTED | Errno::INTR) => None,
            Err(errno) => {
                // Not armed again before the user says how much room there is.
                self.room = 0;
                Some(Completion::AcceptFailed(errno.into()))
            }
        }
    }

    fn on_receive(&mut self, conn: ConnId, entry: &cqueue::Entry) -> Option<Completion> {
        let buf = cqueue::buffer_select(entry.flags())
            .and_then(|id| self.provided.take(id, entry.result().max(0) as u32));
        let more = cqueue::more(entry.flags());
        let socket = self.sockets.get_mut(conn)?;
        if !more {
            socket.ops.remove(Kind::Receive);
            socket.receiving = Receiving::Idle;
        }
        if socket.closing {
            if let Some(buf) = buf {
                self.buffers.give(buf);
            }
            self.finish_close(conn);
            return None;
        }
        let (outcome, unused) = match (result(entry), buf) {
            (Ok(1..), Some(buf)) => {
                socket.bulk &= buf.len() as usize == limits::BUFFER_SIZE;
                if !more {
                    self.mark_pending(conn);
                }
                return Some(Completion::Received(conn, buf));
            }
            other => other,
        };
        if let Some(buf) = unused {
            self.buffers.give(buf);
        }
        match outcome {
            Ok(_) => {
                socket.ended = true;
                Some(Completion::Ended(conn))
            }
            // Stopped as asked. It may be wanted again by now.
            Err(Errno::CANCELED | Errno::INTR) => {
                self.mark_pending(conn);
                None
            }
            Err(Errno::NOBUFS) => {
                socket.receiving = Receiving::Starving;
                self.buffer_waits += u64::from(self.buffers.free() == 0);
                self.starving.push_back(conn);
                None
            }
            Err(_) => {
                socket.ended = true;
                Some(Completion::ReceiveFailed(conn))
            }
        }
    }

    /// The kernel has given an operation back. Its socket, unless it was only waiting to be closed.
    fn came_back(&mut self, kind: Kind, conn: ConnId) -> Option<&mut Socket> {
        let socket = self.sockets.get_mut(conn)?;
        socket.ops.remove(kind);
        if socket.closing {
            self.finish_close(conn);
        }
        self.sockets.get_mut(conn).filter(|socket| !socket.closing)
    }

    fn on_watch(&mut self, conn: ConnId, entry: &cqueue::Entry) -> Option<Completion> {
        let socket = self.came_back(Kind::Watch, conn)?;
        // If it is received from again, that will show the error, behind what came before it.
        let stopped = socket.stopped && !socket.ended && socket.receiving == Receiving::Idle;
        let broken = result(entry).is_ok_and(|events| events & libc::POLLERR as u32 != 0);
        (stopped && broken).then(|| {
            socket.ended = true;
            Completion::ReceiveFailed(conn)
        })
    }

    /// The next inline send that did not fail: all completions that there are have been handled.
    fn next_inline_send(&mut self) -> Option<Completion> {
        if !self.ring.has_told_all() {
            return None;
        }
        while let Some(conn) = self.inline.pop_front() {
            if let Some(count) = self.sockets.get(conn).and_then(|socket| socket.inline)
                && let Some(completion) = self.on_send(conn, Ok(count.get()))
            {
                return Some(completion);
            }
        }
        None
    }

    fn on_send(&mut self, conn: ConnId, result: Result<u32, Errno>) -> Option<Completion> {
        let socket = self.sockets.get_mut(conn)?;
        let inline = socket.inline.take().is_some();
        self.came_back(Kind::Send, conn)?;
        let socket = self.sockets.get_mut(conn)?;
        match result {
            Ok(count) => {
                // A part of an inline send: the rest waits for room.
                socket.congested = inline && count < socket.queue.bytes();
                self.buffers.advance(&mut socket.queue, count);
                if !socket.queue.is_empty() || socket.shutdown {
                    self.mark_pending(conn);
                }
                Some(Completion::Sent(conn, count))
            }
            Err(Errno::INTR | Errno::AGAIN) => {
                socket.congested = true;
                self.mark_pending(conn);
                None
            }
            Err(_) => {
                self.buffers.clear(&mut socket.queue);
                socket.shutdown = false;
                Some(Completion::SendFailed(conn))
            }
        }
    }

    fn on_connect(&mut self, conn: ConnId, entry: &cqueue::Entry) -> Option<Completion> {
        self.came_back(Kind::Connect, conn)?;
        Some(match result(entry) {
            Ok(_) => Completion::Connected(conn),
            Err(errno) => Completion::ConnectFailed(conn, errno.into()),
        })
    }

    fn on_completion(&mut self, entry: &cqueue::Entry) -> Option<Completion> {
        let (kind, conn) = parse_user_data(entry.user_data());
        match kind? {
            Kind::Accept => self.on_accept(conn.index(), entry),
            Kind::Connect => self.on_connect(conn, entry),
            Kind::Receive => self.on_receive(conn, entry),
            Kind::Send => self.on_send(conn, result(entry)),
            Kind::Watch => self.on_watch(conn, entry),
            Kind::Wake => {
                if !cqueue::more(entry.flags()) {
                    self.arm_wake();
                }
                Some(Completion::Woken)
            }
            Kind::Timer => {
                self.ring.on_timer();
                None
            }
            Kind::Forget => None,
        }
    }

    /// Gives the slot back once the kernel holds nothing of it.
    fn finish_close(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get(conn) else { return };
        if socket.ops.any() || !socket.closing {
            return;
        }
        let Some(mut socket) = self.sockets.remove(conn) else { return };
        self.buffers.clear(&mut socket.queue);
        let fd = Fd(socket.fd.into_raw_fd());
        self.forget(opcode::Close::new(fd).build());
    }
}

impl Driver for Uring {
    fn now(&self) -> Instant {
        self.now
    }

    fn wait(&mut self, wait: Wait) -> io::Result<()> {
        // Only if the kernel could not take all submissions.
        let unresolved = !self.inline.is_empty();
        self.settle();
        if self.ring.has_completions() || !self.accepted.is_empty() || unresolved {
            self.ring.submit();
        } else {
            let data = user_data(Kind::Timer, ConnId::from_parts(0, 0));
            self.ring.wake_after(self.now, wait.most, data);
            self.ring.submit_and_wait(wait.events, wait.batch, wait.most);
        }
        self.now = Instant::now();
        self.ring.take_failure().map_or(Ok(()), Err)
    }

    fn next(&mut self) -> Option<Completion> {
        if let Some(conn) = self.accepted.pop_front() {
            return Some(Completion::Accepted(conn));
        }
        while let Some(entry) = self.ring.pop() {
            if let Some(completion) = self.on_completion(&entry) {
                return Some(completion);
            }
        }
        self.next_inline_send()
    }

    fn accept(&mut self, room: usize) {
        self.room = room;
    }

    fn refuse_handshakes(&mut self) {
        self.listeners.iter().filter_map(|l| l.fd.as_ref()).for_each(socket::refuse_handshakes);
    }

    fn stop_listening(&mut self) {
        self.room = 0;
        for index in 0..self.listeners.len() {
            let listener = &mut self.listeners[index];
            let Some(fd) = listener.fd.take() else { continue };
            let armed = listener.armed.is_some();
            for client in socket::empty_accept_queue(&fd) {
                if let Some(conn) = self.adopt(client) {
                    self.accepted.push_back(conn);
                }
            }
            if armed {
                self.cancel(Kind::Accept, ConnId::from_parts(index as u32, 0));
            }
        }
    }

    fn connect(&mut self, address: &SocketAddr) -> io::Result<ConnId> {
        let socket = socket::outgoing(address, &self.options)?;
        let fd = Fd(socket.as_raw_fd());
        let mut entry = Socket::new(socket.into());
        entry.ops.add(Kind::Connect);
        let Ok(conn) = self.sockets.insert(entry) else {
            return Err(io::ErrorKind::QuotaExceeded.into());
        };
        self.ring.connect(fd, *address, user_data(Kind::Connect, conn));
        Ok(conn)
    }

    fn receive(&mut self, conn: ConnId, on: bool) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        socket.stopped = !on;
        socket.wanted = on;
        if on {
            self.mark_pending(conn);
            return;
        }
        let armed_multishot = socket.receiving == Receiving::Armed && !socket.bulk;
        socket.bulk = true;
        if armed_multishot {
            socket.receiving = Receiving::Stopping;
            self.cancel(Kind::Receive, conn);
        }
        self.mark_pending(conn);
    }

    fn send(&mut self, conn: ConnId, buf: Buf) {
        let Some(socket) = self.sockets.get_mut(conn) else { return self.buffers.give(buf) };
        self.buffers.push(&mut socket.queue, buf);
        if !socket.ops.has(Kind::Send) {
            self.mark_pending(conn);
        }
    }

    fn shutdown(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn) {
            socket.shutdown = true;
            self.mark_pending(conn);
        }
    }

    fn close(&mut self, conn: ConnId, how: Close) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if how == Close::Reset {
            // At once, so that it holds however the descriptor comes to be closed.
            socket::close_with_reset(&socket.fd);
        }
        socket.closing = true;
        let ops = socket.ops;
        let inline = socket.inline.is_some();
        for kind in [Kind::Connect, Kind::Receive, Kind::Send, Kind::Watch] {
            if ops.has(kind) && !(kind == Kind::Send && inline) {
                self.cancel(kind, conn);
            }
        }
        self.finish_close(conn);
    }

    fn peer_address(&self, conn: ConnId) -> Option<SocketAddr> {
        socket::peer_address(&self.sockets.get(conn)?.fd)
    }

    fn local_address(&self, conn: ConnId) -> Option<SocketAddr> {
        socket::local_address(&self.sockets.get(conn)?.fd)
    }

    fn buffers(&mut self) -> &mut Buffers {
        &mut self.buffers
    }

    fn buffer_waits(&self) -> u64 {
        self.buffer_waits
    }
}

/// The result of a completion: a count or descriptor, or the error.
fn result(entry: &cqueue::Entry) -> Result<u32, Errno> {
    u32::try_from(entry.result()).map_err(|_| Errno::from_raw_os_error(-entry.result()))
}
