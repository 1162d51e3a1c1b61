//! The `io_uring` driver.
//!
//! One system call a turn submits everything and waits for a batch. Receives are multishot: armed
//! once, the kernel takes a buffer from the ring of provided ones whenever bytes arrive, and those
//! bytes are sent from the same buffer.
//!
//! A socket's slot is reclaimed when its last operation has come back: [`Ops`] says which are out.
#![allow(unsafe_code)]

mod accept;
mod bulk;
mod receive;
mod send;
mod socket;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use io_uring::types::Fd;
use io_uring::{cqueue, opcode, squeue};
use rustix::io::Errno;
use socket2::Type;

use self::socket::{
    Accepting, Attention, Kind, Listener, Receive, Send, Socket, parse_user_data, user_data,
};
use super::buffers::{Buf, Buffers};
use super::crowded::Crowded;
use super::descriptors::Descriptors;
use super::halves::Sending;
use super::lateness::Lateness;
use super::net::{self, Address, Credentials, Stream};
use super::probe::{self, Features};
use super::provided::ProvidedBuffers;
use super::ring::{Ring, result};
use super::splice::{self, Pipes};
use super::{Acks, Close, Completion, Conn, ConnId, Driver, DriverSetup, Network, Unheard, Wait};
use crate::fifo;
use crate::limits;
use crate::slab::Slab;

/// The `io_uring` driver of one worker.
pub struct Uring {
    // Dropped first, so that no operation outlives the memory below.
    ring: Ring,
    provided: ProvidedBuffers,
    buffers: Buffers,
    sockets: Slab<Socket, Conn>,
    listeners: Vec<Listener>,
    wake: OwnedFd,
    room: usize,
    /// Clients of these listeners that came when there was no room, and wait for some.
    early: VecDeque<(Stream, usize)>,
    /// No handshake begins any more.
    refusing: bool,
    crowded: Crowded,
    descriptors: Descriptors,
    start: Instant,
    now: Instant,
    lateness: Lateness,
    /// Events to hand out before what the ring tells.
    ready: VecDeque<Completion>,
    pending: Vec<ConnId>,
    starving: VecDeque<ConnId>,
    /// Sockets with a send of which nothing is known yet.
    submitted: VecDeque<ConnId>,
    pipes: Pipes,
    /// The window that the turn falls in.
    window: u32,
    buffer_waits: u64,
    strays: u64,
}

/// What the kernel keeps for a driver, and may have no memory for.
pub struct Rings {
    // Dropped first, as in the driver.
    ring: Ring,
    provided: ProvidedBuffers,
}

impl Rings {
    /// Sets them up. To be called on the worker's own thread, which alone may use them.
    ///
    /// # Errors
    /// The kernel denies them.
    pub(super) fn new(features: Features) -> io::Result<Self> {
        let ring = Ring::new(features)?;
        let provided = ProvidedBuffers::register(ring.uring())?;
        probe::enable_ring(ring.uring(), features)?;
        Ok(Self { ring, provided })
    }
}

impl Uring {
    /// Sets the driver up on these rings. To be called on the thread that made them.
    ///
    /// # Errors
    /// The buffers cannot be mapped, or the kernel denies something.
    pub fn new(setup: DriverSetup, rings: Rings) -> io::Result<Self> {
        let Rings { ring, provided } = rings;
        let early = VecDeque::with_capacity(setup.listeners.len());
        let mut driver = Self {
            provided,
            sockets: Slab::with_capacity(setup.conns_max),
            listeners: setup
                .listeners
                .into_iter()
                .map(|fd| net::Listener::new(fd).map(Listener::new))
                .collect::<io::Result<_>>()?,
            wake: setup.wake,
            room: 0,
            early,
            refusing: false,
            crowded: Crowded::default(),
            descriptors: Descriptors::new(),
            start: Instant::now(),
            now: Instant::now(),
            lateness: Lateness::default(),
            // A turn has few, except for the clients of a drain, which may well allocate.
            ready: VecDeque::with_capacity(1024),
            pending: Vec::with_capacity(setup.conns_max),
            starving: VecDeque::with_capacity(setup.conns_max),
            submitted: VecDeque::with_capacity(setup.conns_max),
            pipes: Pipes::new(),
            window: 0,
            buffer_waits: 0,
            strays: 0,
            ring,
            buffers: Buffers::new(setup.buffers_max)?,
        };
        for fd in driver.listeners.iter().filter_map(|listener| listener.net.as_ref()) {
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
            && socket.attention == Attention::None
        {
            socket.attention = Attention::Pending;
            self.pending.push(conn);
        }
    }

    /// A socket that its caller knows not to be reclaimed.
    fn live(&mut self, conn: ConnId) -> &mut Socket {
        self.sockets.get_mut(conn).expect("a socket of which the kernel holds something, or open")
    }

    /// Turns what the user asked for since the last wait into submissions.
    fn settle(&mut self) {
        let short = self.is_short_of_buffers();
        self.provided.refill(&mut self.buffers, short);
        if self.provided.available() > 0 {
            // All of them: those that starve on again come back at no great cost.
            while let Some(conn) = fifo::pop(&mut self.starving) {
                if let Some(socket) = self.sockets.get_mut(conn)
                    && socket.receiving.progress() == Some(Receive::Starving)
                {
                    socket.receive().feed();
                }
                self.mark_pending(conn);
            }
        }
        // Settling one may make another pending.
        let mut next = 0;
        while let Some(&conn) = self.pending.get(next) {
            next += 1;
            self.settle_socket(conn);
        }
        self.pending.clear();
        for index in 0..self.listeners.len() {
            self.settle_listener(index);
        }
    }

    /// Whether buffers are short: then each receive takes one, so that no socket runs ahead.
    fn is_short_of_buffers(&self) -> bool {
        limits::buffers_are_short(self.buffers.spare())
    }

    /// The kernel has given an operation back. Its socket, unless it was only waiting to be closed.
    fn came_back(&mut self, kind: Kind, conn: ConnId) -> Option<&mut Socket> {
        let Some(socket) = self.sockets.get_mut(conn).filter(|socket| socket.ops.has(kind)) else {
            return self.on_stray(conn);
        };
        socket.ops.remove(kind);
        if socket.is_closing() {
            self.finish_close(conn);
            return None;
        }
        self.sockets.get_mut(conn)
    }

    /// The kernel says of a connection what cannot be: that an operation ends which it does not hold, or
    /// that more bytes were taken than there are. Only a fault of its own explains that, and who knows what
    /// else went wrong: the connection fails as soon as what had arrived is received.
    #[cold]
    fn on_stray<T>(&mut self, conn: ConnId) -> Option<T> {
        self.strays += 1;
        if let Some(socket) = self.sockets.get_mut(conn).filter(|socket| !socket.is_closing()) {
            // Towards the peer it stays open, for nothing is to look whole there: its user resets it.
            socket.error_taken = true;
            socket.stream.stop_receiving();
        }
        None
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

    /// What a connection has brought that is not handed out yet.
    fn taken(&mut self, conn: ConnId) -> Unheard {
        let data = user_data(Kind::Receive, conn);
        let entries = self.ring.taken().filter(|entry| entry.user_data() == data);
        let entries = entries.map(|entry| match result(entry) {
            Ok(1..) => Unheard::Bytes,
            Err(Errno::CANCELED | Errno::INTR | Errno::NOBUFS) => Unheard::Nothing,
            Ok(0) | Err(_) => Unheard::End,
        });
        let ready = self.ready.iter().filter(|completion| completion.conn() == Some(conn));
        let ready = ready.map(|completion| match completion {
            Completion::Received(..) | Completion::Spliced(..) => Unheard::Bytes,
            Completion::Sent(..) | Completion::Connected(_) => Unheard::Nothing,
            _ => Unheard::End,
        });
        entries.chain(ready).max().unwrap_or(Unheard::Nothing)
    }

    /// Gives the slot back once the kernel holds nothing of it.
    fn finish_close(&mut self, conn: ConnId) {
        let socket = self.live(conn);
        debug_assert!(socket.is_closing(), "only a socket that was closed is reclaimed");
        if socket.ops.any() {
            return;
        }
        let mut socket = self.sockets.remove(conn).expect("it was just found");
        self.buffers.clear(&mut socket.queue);
        if let Some(pipe) = socket.pipe.take() {
            self.pipes.give(pipe);
        }
        let fd = Fd(OwnedFd::from(socket.stream).into_raw_fd());
        self.forget(opcode::Close::new(fd).build());
    }
}

impl Driver for Uring {
    fn now(&self) -> Instant {
        self.now
    }

    fn wait(&mut self, wait: Wait) -> io::Result<bool> {
        let wait = self.connect_again(wait);
        // Only if the kernel could not take all submissions.
        let unresolved = !self.submitted.is_empty();
        self.settle();
        let mut spare_time = false;
        if self.ring.has_completions() || !self.ready.is_empty() || unresolved {
            self.ring.submit();
        } else {
            let data = user_data(Kind::Timer, ConnId::from_parts(0, 0));
            self.ring.wake_after(self.now, wait.most, data);
            let looked = wait.events == 1 && self.ring.submit_and_look();
            if looked {
                // There is something to do.
            } else if self.submitted.is_empty() {
                self.ring.submit_and_wait(wait.events, wait.batch, wait.most);
                spare_time = wait.events == 1 || !self.ring.has(wait.events);
            } else if wait.events > 1 {
                // A send that went well ends no wait, and somebody may wait for it: an end that
                // goes behind it, a source that was stopped. So how sends went is reported before
                // falling asleep. No other completion is asked for, so that a batch stays one. For
                // a single event the look above has shown it already.
                self.ring.submit();
            }
        }
        let due = self.now + wait.most;
        self.now = Instant::now();
        if self.lateness.on_waited(due, self.now) {
            self.ring.take_all();
            self.now = Instant::now();
        }
        self.window = splice::window(self.start, self.now);
        self.ring.take_failure().map_or(Ok(spare_time), Err)
    }

    fn next(&mut self) -> Option<Completion> {
        loop {
            if let Some(completion) = fifo::pop(&mut self.ready) {
                return Some(completion);
            }
            let Some(entry) = self.ring.pop() else { return self.next_sent() };
            if let Some(completion) = self.on_completion(&entry) {
                return Some(completion);
            }
        }
    }

    fn is_behind(&mut self) -> bool {
        let has_more = !self.starving.is_empty() || !self.ring.has_told_all();
        self.lateness.is_behind(has_more, self.now)
    }

    fn accept(&mut self, room: usize) {
        // A client that is accepted is to get its backend too.
        let fits = room > 0 && self.descriptors.can_accept();
        self.room = if fits { room } else { 0 };
        self.let_in_early(self.room);
    }

    fn hold(&mut self, listener: usize, held: bool) {
        self.listeners[listener].held = held;
    }

    fn refuse_handshakes(&mut self) -> bool {
        self.refusing = true;
        let open = || self.listeners.iter().filter_map(|listener| listener.net.as_ref());
        open().for_each(net::Listener::refuse_handshakes);
        open().any(net::Listener::is_crowded)
    }

    fn stop_listening(&mut self) -> bool {
        self.let_in_early(usize::MAX);
        self.room = 0;
        for index in 0..self.listeners.len() {
            let listener = &mut self.listeners[index];
            let Some(fd) = listener.net.take() else { continue };
            let (clients, emptied) = fd.empty_accept_queue();
            let is_armed = !matches!(listener.accepting, Accepting::Idle | Accepting::Over);
            if emptied && is_armed {
                self.cancel(Kind::Accept, ConnId::from_parts(index as u32, 0));
            } else if !emptied {
                // Else an accept would come back at once where nobody waits.
                let _ = rustix::io::ioctl_fionbio(&fd, false);
                listener.net = Some(fd);
            }
            for client in clients {
                if let Some(conn) = self.adopt(client) {
                    self.ready.push_back(Completion::Accepted(conn, index));
                }
            }
        }
        self.listeners.iter().all(|listener| listener.net.is_none())
    }

    fn release(&mut self, conn: ConnId) -> Option<Stream> {
        self.sockets
            .get(conn)
            .filter(|socket| !socket.ops.any() && socket.attention == Attention::None)?;
        self.sockets.remove(conn).map(|socket| socket.stream)
    }

    fn adopt(&mut self, client: Stream) -> Option<ConnId> {
        // `limits::conns_max` has room for more than can come.
        self.sockets.insert(Socket::connected(client)).ok()
    }

    fn connect(&mut self, address: &Address, options: &net::Options) -> io::Result<ConnId> {
        let kernel_address = address.to_kernel()?;
        let make = || Stream::outgoing(address, Type::STREAM, options);
        let stream = self.descriptors.make(make)?;
        let fd = Fd(stream.as_raw_fd());
        let at_once = stream.connects_at_once();
        let Ok(conn) = self.sockets.insert(Socket::connecting(stream)) else {
            return Err(io::ErrorKind::QuotaExceeded.into());
        };
        if at_once {
            if self.try_connect(conn, address) {
                self.crowded.push(conn, address, self.now);
            }
        } else {
            self.live(conn).ops.add(Kind::Connect);
            self.ring.connect(fd, kernel_address, user_data(Kind::Connect, conn));
        }
        Ok(conn)
    }

    fn join(&mut self, a: ConnId, b: ConnId) {
        for (conn, other) in [(a, b), (b, a)] {
            if let Some(socket) = self.sockets.get_mut(conn) {
                socket.joined = Some(other);
            }
        }
    }

    fn receive(&mut self, conn: ConnId, on: bool) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        debug_assert!(socket.sending != Sending::Connecting, "nothing comes before the connection");
        if on {
            socket.receiving.want();
        } else {
            socket.receiving.stop();
            socket.single = true;
            self.stop_receiving(conn);
        }
        self.mark_pending(conn);
    }

    fn send(&mut self, conn: ConnId, buf: Buf) {
        let Some(socket) = self.sockets.get_mut(conn) else { return self.buffers.give(buf) };
        debug_assert!(socket.sending.takes_bytes(), "bytes are sent in {:?}", socket.sending);
        match socket.sending.progress() {
            None => self.buffers.give(buf),
            Some(Send::Idle) => {
                self.buffers.push(&mut socket.queue, buf);
                self.mark_pending(conn);
            }
            Some(Send::Submitted(_) | Send::Blocked) => self.buffers.push(&mut socket.queue, buf),
        }
    }

    fn shutdown(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn) {
            socket.sending.shut_down();
            self.mark_pending(conn);
        }
    }

    fn close(&mut self, conn: ConnId, how: Close) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        let joined = socket.joined;
        if how == Close::Reset {
            // At once, so that it holds however the descriptor comes to be closed.
            socket.stream.close_with_reset();
        }
        socket.attention = Attention::Closing;
        let ops = socket.ops;
        // A send completes by itself.
        for kind in [Kind::Connect, Kind::Receive, Kind::Watch] {
            if ops.has(kind) {
                self.cancel(kind, conn);
            }
        }
        self.finish_close(conn);
        // What that one brings waits for nothing any more.
        if let Some(source) = joined {
            self.resume(source);
        }
    }

    fn has_descriptor(&self, conn: ConnId) -> bool {
        self.sockets.get(conn).is_some()
    }

    fn unheard(&mut self, conn: ConnId) -> Unheard {
        let Some(socket) = self.sockets.get(conn) else { return Unheard::End };
        let shown = socket.stream.unheard();
        // What a receive has taken is no longer in the socket. It may have been taken up to the
        // moment of that look.
        self.taken(conn).max(shown)
    }

    fn unsent(&self, conn: ConnId) -> u64 {
        let Some(socket) = self.sockets.get(conn) else { return 0 };
        socket.queued() + socket.stream.unsent()
    }

    fn undelivered(&self, conn: ConnId) -> u64 {
        let Some(socket) = self.sockets.get(conn) else { return 0 };
        socket.queued() + socket.stream.unacknowledged()
    }

    fn acks(&self, conn: ConnId) -> Option<Acks> {
        self.sockets.get(conn)?.stream.acks()
    }

    fn network(&self, conn: ConnId) -> Option<Network> {
        self.sockets.get(conn)?.stream.network()
    }

    fn ask(&mut self, conn: ConnId, options: &net::Options, silence: Option<Duration>) {
        if let Some(socket) = self.sockets.get(conn) {
            socket.stream.ask(options, silence);
        }
    }

    fn peer_address(&self, conn: ConnId) -> Option<SocketAddr> {
        self.sockets.get(conn)?.stream.peer()
    }

    fn local_address(&self, conn: ConnId) -> Option<SocketAddr> {
        self.sockets.get(conn)?.stream.local()
    }

    fn credentials(&self, conn: ConnId) -> Option<Credentials> {
        self.sockets.get(conn)?.stream.credentials()
    }

    fn leads_back_to(&self, conn: ConnId, path: &Path) -> bool {
        self.sockets.get(conn).is_some_and(|socket| socket.stream.leads_back_to(path))
    }

    fn is_shared(&self, listener: usize) -> bool {
        self.listeners.get(listener).is_some_and(|listener| listener.transport.is_shared())
    }

    fn buffers(&mut self) -> &mut Buffers {
        &mut self.buffers
    }

    fn is_short_of_descriptors(&self) -> bool {
        self.descriptors.are_short()
    }

    fn buffers_provided(&self) -> u32 {
        self.provided.available() as u32
    }

    fn buffer_waits(&self) -> u64 {
        self.buffer_waits
    }

    fn splice_failures(&self) -> u64 {
        self.pipes.failures()
    }

    fn strays(&self) -> u64 {
        self.strays
    }
}
