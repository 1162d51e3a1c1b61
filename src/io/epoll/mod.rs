//! The epoll driver: the twin of `io_uring` where that is blocked.
//!
//! Sockets are registered once, edge-triggered, and each remembers whether it is readable and
//! writable. A send is tried before the next socket is read from; only what it does not take waits
//! for an edge. Readable sockets take turns, a few buffers each, so that none starves the others and
//! a message of several buffers is sent in one call.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use rustix::thread::{nanosleep, set_current_timer_slack};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use socket2::{SockRef, Type};

use super::buffers::{Buf, Buffers, Chain};
use super::descriptors::Descriptors;
use super::splice::{self, Bulk, Pipe, Pipes};
use super::{Acks, Close, Completion, ConnId, Driver, DriverSetup, Unheard, Wait, socket};
use crate::fifo;
use crate::limits;
use crate::slab::Slab;

/// Events taken from the kernel at a time.
const EVENTS_MAX: usize = 1024;
/// Buffers that one write takes at most.
const SEND_PARTS_MAX: usize = 8;
/// Reads and accepts of one turn; the rest comes in the next, after commands and timers.
const STEPS_PER_TURN: u32 = 2048;
/// Buffers that a socket may fill in a row.
const READS_IN_A_ROW: u32 = 4;
/// One step in so many looks for clients before it reads.
const ACCEPT_EVERY: u32 = 32;
/// Event data of listener `i` is this plus `i`, out of the reach of connections' keys.
const LISTENER: u64 = u64::MAX - 0xffff;
/// Event data of the wake-up descriptor.
const WAKE: u64 = LISTENER - 1;
/// Event data of the timer.
const TIMER: u64 = LISTENER - 2;

#[allow(
    clippy::struct_excessive_bools,
    reason = "independent facts, each told by the kernel or the user"
)]
#[derive(Debug)]
struct Socket {
    fd: OwnedFd,
    connecting: bool,
    readable: bool,
    writable: bool,
    /// The peer has ended or reset its direction: a short read is not the last one.
    hung_up: bool,
    /// There is or was an urgent mark, at which reads and moves stop short: what they bring does not
    /// say how much there is, until one brings nothing.
    urgent: bool,
    /// The kernel has told of an error. A receive may have to tell it yet, behind what has arrived.
    has_error: bool,
    /// A move by pipe has taken the error that the next receive was to tell.
    error_taken: bool,
    /// Nothing more can be sent, as was told.
    broken: bool,
    /// The user wants to receive.
    wanted: bool,
    /// The user has wanted to, and does not now.
    stopped: bool,
    /// The peer's direction has ended or failed.
    ended: bool,
    /// In the queue of sockets to read from.
    queued: bool,
    shutdown: bool,
    /// What it brings may be moved to there by pipe.
    joined: Option<ConnId>,
    bulk: Bulk,
    /// What it brings waits until the joined one has sent everything.
    held: bool,
    queue: Chain,
    /// What is to be sent before the queue.
    pipe: Option<Pipe>,
}

impl Socket {
    fn new(fd: OwnedFd, connecting: bool) -> Self {
        Self {
            fd,
            connecting,
            readable: false,
            writable: !connecting,
            hung_up: false,
            urgent: false,
            has_error: false,
            error_taken: false,
            broken: false,
            wanted: false,
            stopped: false,
            ended: false,
            queued: false,
            shutdown: false,
            joined: None,
            bulk: Bulk::default(),
            held: false,
            queue: Chain::with_reserve(),
            pipe: None,
        }
    }

    /// Bytes that are to be sent, or being sent.
    fn queued(&self) -> u64 {
        u64::from(self.queue.bytes() + self.pipe.as_ref().map_or(0, Pipe::bytes))
    }

    fn is_flushed(&self) -> bool {
        self.queue.is_empty() && self.pipe.is_none()
    }

    /// It was received from, and is not now, so that no receive would tell of a break.
    fn is_paused(&self) -> bool {
        !self.ended && (self.stopped || self.held)
    }

    fn can_receive(&self) -> bool {
        self.wanted && self.readable && !self.ended && !self.connecting && !self.held
    }
}

/// Ends a wait. It stands over many of them: a limit given to each would set and clear one of the
/// kernel's timers every time.
struct Timer {
    fd: OwnedFd,
    /// When it fires, if it is set.
    fires_at: Option<Instant>,
}

impl Timer {
    fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let fd = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self { fd, fires_at: None })
    }

    /// Makes sure that it fires at `at` at the latest.
    fn fire_by(&mut self, at: Instant) -> io::Result<()> {
        if self.fires_at.is_some_and(|set| set <= at) {
            return Ok(());
        }
        let delay = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let value = Timespec::try_from(delay).map_err(io::Error::other)?;
        let once = Itimerspec { it_interval: Timespec::default(), it_value: value };
        timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &once)?;
        self.fires_at = Some(at);
        Ok(())
    }
}

/// The epoll driver of one worker.
pub struct Epoll {
    fd: OwnedFd,
    /// Registered, so it must stay open.
    _wake: OwnedFd,
    timer: Timer,
    listeners: Vec<Option<OwnedFd>>,
    /// Listeners that may have clients waiting.
    acceptable: Vec<bool>,
    /// Where the next client is looked for first.
    accept_from: usize,
    room: usize,
    /// No handshake begins any more.
    refusing: bool,
    descriptors: Descriptors,
    sockets: Slab<Socket, crate::io::Conn>,
    buffers: Buffers,
    options: socket::Options,
    start: Instant,
    now: Instant,
    events: Vec<epoll::Event>,
    /// Events to hand out, before anything is read.
    completions: VecDeque<Completion>,
    /// Readable sockets whose user wants to receive.
    ready: VecDeque<ConnId>,
    /// How many buffers in a row the first of them has filled.
    filled: u32,
    /// The latest socket that was given something to send, which has not been tried yet.
    unsent: Option<ConnId>,
    /// As `ready`, but not before the next turn: what has come until then is moved at once.
    bulky: Vec<ConnId>,
    /// As `ready`, but no buffer was free.
    starving: VecDeque<ConnId>,
    pipes: Pipes,
    /// The window that the turn falls in.
    window: u32,
    steps: u32,
    buffer_waits: u64,
}

impl Epoll {
    /// Sets the epoll instance up.
    ///
    /// # Errors
    /// Descriptors are short.
    pub fn new(setup: DriverSetup) -> io::Result<Self> {
        // Else the kernel may end a sleep 50 µs late, which is as long as one of ours.
        let _ = set_current_timer_slack(NonZeroU64::new(1));
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &setup.wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        let timer = Timer::new()?;
        let once = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &timer.fd, EventData::new_u64(TIMER), once)?;
        let listening = EventFlags::IN | EventFlags::ET;
        for (data, fd) in (LISTENER..).zip(&setup.listeners) {
            rustix::io::ioctl_fionbio(fd, true)?;
            epoll::add(&epoll, fd, EventData::new_u64(data), listening)?;
        }
        Ok(Self {
            fd: epoll,
            _wake: setup.wake,
            timer,
            acceptable: vec![true; setup.listeners.len()],
            accept_from: 0,
            listeners: setup.listeners.into_iter().map(Some).collect(),
            room: 0,
            refusing: false,
            descriptors: Descriptors::new(),
            sockets: Slab::with_capacity(setup.conns_max),
            buffers: Buffers::new(setup.buffers_max)?,
            options: setup.options,
            start: Instant::now(),
            now: Instant::now(),
            events: Vec::with_capacity(EVENTS_MAX),
            // One socket can bring up to four: connected, sent, failed, accepted.
            completions: VecDeque::with_capacity(4 * setup.conns_max),
            ready: VecDeque::with_capacity(setup.conns_max),
            filled: 0,
            unsent: None,
            bulky: Vec::with_capacity(setup.conns_max),
            starving: VecDeque::with_capacity(setup.conns_max),
            pipes: Pipes::new(),
            window: 0,
            steps: 0,
            buffer_waits: 0,
        })
    }

    fn register(&mut self, fd: OwnedFd, connecting: bool) -> io::Result<ConnId> {
        let full = |_| io::Error::from(io::ErrorKind::QuotaExceeded);
        let conn = self.sockets.insert(Socket::new(fd, connecting)).map_err(full)?;
        // Nothing more wakes for `PRI`: it only says more of what has arrived.
        let incoming = EventFlags::IN | EventFlags::PRI | EventFlags::RDHUP;
        let interest = incoming | EventFlags::OUT | EventFlags::ET;
        let data = EventData::new_u64(conn_data(conn));
        let added = self.sockets.get(conn).map(|s| epoll::add(&self.fd, &s.fd, data, interest));
        match added {
            Some(Err(errno)) => {
                self.sockets.remove(conn);
                Err(errno.into())
            }
            _ => Ok(conn),
        }
    }

    /// Puts a socket in the queue of those to read from, if it is due.
    fn enqueue(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn)
            && socket.can_receive()
            && !socket.queued
        {
            socket.queued = true;
            self.ready.push_back(conn);
        }
    }

    fn on_event(&mut self, conn: ConnId, flags: EventFlags) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        let hung_up = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        socket.hung_up |= flags.intersects(hung_up);
        socket.urgent |= flags.contains(EventFlags::PRI);
        socket.readable |= flags.intersects(EventFlags::IN | EventFlags::PRI | hung_up);
        let settled = EventFlags::OUT | EventFlags::ERR | EventFlags::HUP;
        if socket.connecting {
            if flags.intersects(settled) {
                self.finish_connect(conn, flags.contains(EventFlags::ERR));
            }
        } else {
            socket.has_error |= flags.contains(EventFlags::ERR);
            if socket.has_error && !socket.is_flushed() {
                // A send would take the error from the receive that is to tell it.
                self.fail_send(conn);
            } else if flags.intersects(settled) && !socket.writable {
                socket.writable = true;
                self.flush(conn);
            }
            self.tell_break(conn);
        }
        self.enqueue(conn);
    }

    /// Says that a socket that is not received from has broken.
    fn tell_break(&mut self, conn: ConnId) {
        if self.sockets.get(conn).is_some_and(|socket| socket.has_error && socket.is_paused()) {
            self.fail_send(conn);
        }
    }

    /// Nothing more can be sent. What has arrived can still be received.
    fn fail_send(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if mem::replace(&mut socket.broken, true) {
            return;
        }
        socket.shutdown = false;
        self.buffers.clear(&mut socket.queue);
        if let Some(pipe) = socket.pipe.take() {
            self.pipes.give(pipe);
        }
        let joined = socket.joined;
        self.completions.push_back(Completion::SendFailed(conn));
        if let Some(source) = joined {
            self.let_go(source);
        }
    }

    fn finish_connect(&mut self, conn: ConnId, failed: bool) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        let error = if failed { SockRef::from(&socket.fd).take_error() } else { Ok(None) };
        let completion = match error {
            Ok(None) => {
                socket.connecting = false;
                socket.writable = true;
                Completion::Connected(conn)
            }
            Ok(Some(error)) | Err(error) => Completion::ConnectFailed(conn, error),
        };
        self.completions.push_back(completion);
    }

    /// Sends what is queued as far as the socket takes it, then ends the direction if asked to.
    fn flush(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        let mut sent = 0;
        let mut failed = false;
        while socket.writable && !socket.is_flushed() {
            let written = match &mut socket.pipe {
                Some(pipe) => {
                    let offered = pipe.bytes();
                    pipe.drain(&socket.fd).map(|count| (count, offered))
                }
                None => write(&self.buffers, socket),
            };
            match written {
                Ok((count, offered)) => {
                    sent += count;
                    match socket.pipe.take_if(|pipe| pipe.is_empty()) {
                        Some(pipe) => self.pipes.give(pipe),
                        None if socket.pipe.is_none() => {
                            self.buffers.advance(&mut socket.queue, count);
                        }
                        None => {}
                    }
                    // A short write means that the socket is full; an edge will follow.
                    socket.writable = count == offered;
                }
                Err(Errno::AGAIN) => socket.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => {
                    failed = true;
                    break;
                }
            }
        }
        let source = socket.joined.filter(|_| socket.is_flushed());
        if socket.is_flushed() && mem::take(&mut socket.shutdown) {
            // Its failure shows in the next operation.
            let _ = rustix::net::shutdown(&socket.fd, rustix::net::Shutdown::Write);
        }
        if sent > 0 {
            self.completions.push_back(Completion::Sent(conn, sent));
        }
        if failed {
            return self.fail_send(conn);
        }
        if let Some(source) = source {
            self.let_go(source);
        }
    }

    /// The socket joined with this one has sent everything.
    fn let_go(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn)
            && mem::take(&mut socket.held)
        {
            self.enqueue(conn);
        }
    }

    /// Where to move by pipe what a readable socket brings, if that is the way.
    fn splice_target(&self, conn: ConnId) -> Option<(ConnId, &Socket)> {
        let socket = self.sockets.get(conn).filter(|socket| socket.bulk.is_on())?;
        let to = socket.joined.filter(|_| self.pipes.any(self.now))?;
        Some((to, self.sockets.get(to).filter(|sink| !sink.broken)?))
    }

    /// Moves what a socket has to the one joined with it.
    ///
    /// What is not moved is left to an ordinary receive, which alone can tell what it is: a move
    /// stops at an urgent mark, and there it says that nothing is left, or takes an end or an error
    /// for the next thing.
    fn splice(&mut self, conn: ConnId, to: ConnId) -> Option<Completion> {
        let Some(mut pipe) = self.pipes.take(self.now) else {
            self.sockets.get_mut(conn)?.bulk.rest(self.window);
            self.enqueue(conn);
            return None;
        };
        let socket = self.sockets.get_mut(conn)?;
        let filled = pipe.fill(&socket.fd);
        if let Ok(count @ 1..) = filled {
            socket.bulk.on_spliced(count, self.window);
            if let Some(sink) = self.sockets.get_mut(to) {
                sink.pipe = Some(pipe);
            }
            self.flush(to);
            if self.sockets.get(to).is_some_and(|sink| !sink.is_flushed()) {
                self.hold(conn);
            } else if let Some(socket) = self.sockets.get_mut(conn)
                && !mem::replace(&mut socket.queued, true)
            {
                self.bulky.push(conn);
            }
            return Some(Completion::Spliced(conn, count));
        }
        self.pipes.give(pipe);
        match filled {
            // Had a mark come since the latest event, another would follow for it.
            Err(Errno::AGAIN) if !socket.urgent => {
                socket.readable = false;
                return None;
            }
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) if splice::is_refused(errno) => self.pipes.on_refused(self.now),
            Err(_) => socket.error_taken = true,
        }
        socket.bulk.rest(self.window);
        self.enqueue(conn);
        None
    }

    /// What a socket brings waits until the joined one has sent everything.
    fn hold(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn) {
            socket.held = true;
            self.tell_break(conn);
        }
    }

    /// Tries what is to be sent, unless there is more to come from where it came from.
    fn flush_unsent(&mut self) {
        if let Some(conn) = self.unsent.take_if(|_| self.filled == 0) {
            self.flush(conn);
        }
    }

    /// Reads one buffer from the first socket in the queue.
    fn read_one(&mut self) -> Option<Completion> {
        while let Some(conn) = fifo::pop(&mut self.ready) {
            let filled = mem::take(&mut self.filled);
            let Some(socket) = self.sockets.get_mut(conn) else { continue };
            socket.queued = false;
            if !socket.can_receive() {
                continue;
            }
            if socket.bulk.is_on()
                && let Some((to, sink)) = self.splice_target(conn)
            {
                if sink.is_flushed() {
                    if let Some(completion) = self.splice(conn, to) {
                        return Some(completion);
                    }
                } else {
                    self.hold(conn);
                }
                continue;
            }
            let Some(socket) = self.sockets.get_mut(conn) else { continue };
            let Some(mut buf) = self.buffers.take() else {
                socket.queued = true;
                self.starving.push_back(conn);
                self.buffer_waits += 1;
                return None;
            };
            let space = self.buffers.space(&mut buf);
            match rustix::net::recv(&socket.fd, space, RecvFlags::empty()) {
                Ok((1.., count)) => {
                    // A short read empties the socket, unless its end is waiting behind, or it
                    // stopped at an urgent mark. (Had a mark or an end come since the latest event,
                    // another would follow for it.)
                    let may_have_more = socket.hung_up || socket.urgent;
                    socket.readable = count == limits::BUFFER_SIZE || may_have_more;
                    socket.bulk.on_received(count as u32, self.window);
                    self.buffers.set_len(&mut buf, count);
                    if count == limits::BUFFER_SIZE && filled + 1 < READS_IN_A_ROW {
                        socket.queued = true;
                        self.filled = filled + 1;
                        self.ready.push_front(conn);
                    } else {
                        self.enqueue(conn);
                    }
                    return Some(Completion::Received(conn, buf));
                }
                Ok(_) => {
                    self.buffers.give(buf);
                    socket.ended = true;
                    return Some(if socket.error_taken {
                        Completion::ReceiveFailed(conn)
                    } else {
                        Completion::Ended(conn)
                    });
                }
                Err(Errno::AGAIN) => {
                    self.buffers.give(buf);
                    socket.readable = false;
                    socket.urgent = false;
                }
                Err(Errno::INTR) => {
                    self.buffers.give(buf);
                    self.enqueue(conn);
                }
                Err(_) => {
                    self.buffers.give(buf);
                    socket.ended = true;
                    return Some(Completion::ReceiveFailed(conn));
                }
            }
            // There was no more to come after all.
            if filled > 0 {
                self.flush_unsent();
                if let Some(completion) = fifo::pop(&mut self.completions) {
                    return Some(completion);
                }
            }
        }
        None
    }

    fn accept_one(&mut self) -> Option<Completion> {
        for offset in 0..self.listeners.len() {
            let index = (self.accept_from + offset) % self.listeners.len();
            while self.room > 0 && self.acceptable[index] {
                let Some(listener) = &self.listeners[index] else { break };
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                match rustix::net::accept_with(listener, flags) {
                    Ok(fd) => {
                        self.room -= 1;
                        if self.refusing {
                            socket::welcome(&fd);
                        }
                        // Each in turn: near the limit there is room for one a turn.
                        self.accept_from = index + 1;
                        match self.register(fd, false) {
                            Ok(conn) => return Some(Completion::Accepted(conn)),
                            Err(error) => {
                                self.room = 0;
                                return Some(Completion::AcceptFailed(error));
                            }
                        }
                    }
                    Err(Errno::AGAIN) => self.acceptable[index] = false,
                    Err(Errno::CONNABORTED | Errno::INTR) => {}
                    Err(errno) => {
                        self.room = 0;
                        return Some(Completion::AcceptFailed(errno.into()));
                    }
                }
            }
        }
        None
    }

    /// Whether there is something to do without waiting.
    fn busy(&self) -> bool {
        !self.completions.is_empty()
            || !self.ready.is_empty()
            || !self.bulky.is_empty()
            || (self.room > 0 && self.acceptable.contains(&true))
    }

    fn dispatch(&mut self) {
        let mut events = mem::take(&mut self.events);
        for event in events.drain(..) {
            match event.data.u64() {
                WAKE => self.completions.push_back(Completion::Woken),
                TIMER => self.timer.fires_at = None,
                data @ LISTENER.. => {
                    if let Some(flag) = self.acceptable.get_mut((data - LISTENER) as usize) {
                        *flag = true;
                    }
                }
                data => self.on_event(data_conn(data), event.flags),
            }
        }
        self.events = events;
    }
}

impl Driver for Epoll {
    fn now(&self) -> Instant {
        self.now
    }

    fn wait(&mut self, wait: Wait) -> io::Result<bool> {
        self.filled = 0;
        self.flush_unsent();
        if self.buffers.free() > 0 {
            while let Some(conn) = fifo::pop(&mut self.starving) {
                if self.sockets.get(conn).is_some() {
                    self.ready.push_back(conn);
                }
            }
        }
        let polls = self.busy() || wait.most.is_zero();
        if !polls {
            self.timer.fire_by(self.now + wait.most)?;
        }
        // Nothing tells epoll to wait for several events.
        let naps = !polls && wait.contended && wait.events > 1;
        if naps && let Ok(nap) = Timespec::try_from(wait.batch.min(wait.most)) {
            // A signal only ends it early.
            let _ = nanosleep(&nap);
        }
        let at_once = polls.then(Timespec::default);
        let room = rustix::buffer::spare_capacity(&mut self.events);
        match epoll::wait(&self.fd, room, at_once.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let spare_time = !polls && (!naps || self.events.len() < wait.events as usize);
        self.now = Instant::now();
        self.window = splice::window(self.start, self.now);
        self.ready.extend(self.bulky.drain(..));
        self.steps = STEPS_PER_TURN;
        self.dispatch();
        Ok(spare_time)
    }

    fn next(&mut self) -> Option<Completion> {
        self.flush_unsent();
        while let Some(completion) = fifo::pop(&mut self.completions) {
            // Its user may have closed the connection since.
            if completion.conn().is_none_or(|conn| self.sockets.get(conn).is_some()) {
                return Some(completion);
            }
        }
        self.steps = self.steps.checked_sub(1)?;
        // Now and then clients come first, so that bulk streams cannot keep them out.
        if self.steps.is_multiple_of(ACCEPT_EVERY) {
            self.accept_one().or_else(|| self.read_one())
        } else {
            self.read_one().or_else(|| self.accept_one())
        }
    }

    fn accept(&mut self, room: usize) {
        // A client that is accepted is to get its backend too. As many backends are sure as there
        // are descriptors in reserve; the next clients are taken in the next turn.
        let fits = room > 0 && (!self.descriptors.are_short() || self.descriptors.refill());
        self.room = if fits { room.min(limits::DESCRIPTORS_RESERVED) } else { 0 };
    }

    fn refuse_handshakes(&mut self) -> bool {
        self.refusing = true;
        self.listeners.iter().flatten().for_each(socket::refuse_handshakes);
        self.listeners.iter().flatten().any(socket::is_crowded)
    }

    fn stop_listening(&mut self) -> bool {
        self.room = 0;
        for index in 0..self.listeners.len() {
            let Some(listener) = self.listeners[index].take() else { continue };
            let (clients, emptied) = socket::empty_accept_queue(&listener);
            self.acceptable[index] = !emptied;
            self.listeners[index] = Some(listener).filter(|_| !emptied);
            for fd in clients {
                let registered = rustix::io::ioctl_fionbio(&fd, true).map_err(io::Error::from);
                let completion = match registered.and_then(|()| self.register(fd, false)) {
                    Ok(conn) => Completion::Accepted(conn),
                    Err(error) => Completion::AcceptFailed(error),
                };
                self.completions.push_back(completion);
            }
        }
        self.listeners.iter().all(Option::is_none)
    }

    fn release(&mut self, conn: ConnId) -> Option<OwnedFd> {
        let socket = self.sockets.get(conn).filter(|socket| !socket.wanted)?;
        epoll::delete(&self.fd, &socket.fd).ok()?;
        self.sockets.remove(conn).map(|socket| socket.fd)
    }

    fn adopt(&mut self, client: OwnedFd) -> Option<ConnId> {
        self.register(client, false).ok()
    }

    fn connect(&mut self, address: &SocketAddr) -> io::Result<ConnId> {
        let kind = Type::STREAM.nonblocking();
        let socket = self.descriptors.make(|| socket::outgoing(address, kind, &self.options))?;
        let conn = self.register(socket.into(), true)?;
        let Some(socket) = self.sockets.get(conn) else { return Ok(conn) };
        match rustix::net::connect(&socket.fd, address) {
            Err(Errno::INPROGRESS | Errno::INTR) => {}
            Ok(()) => self.finish_connect(conn, false),
            Err(errno) => {
                self.completions.push_back(Completion::ConnectFailed(conn, errno.into()));
            }
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
        if let Some(socket) = self.sockets.get_mut(conn) {
            socket.wanted = on;
            socket.stopped = !on;
        }
        self.tell_break(conn);
        self.enqueue(conn);
    }

    fn send(&mut self, conn: ConnId, buf: Buf) {
        let socket = self.sockets.get_mut(conn).filter(|socket| !socket.broken);
        let Some(socket) = socket else { return self.buffers.give(buf) };
        self.buffers.push(&mut socket.queue, buf);
        if let Some(other) = self.unsent.replace(conn).filter(|&other| other != conn) {
            self.flush(other);
        }
    }

    fn shutdown(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn)
            && !socket.broken
        {
            socket.shutdown = true;
            self.flush(conn);
        }
    }

    fn close(&mut self, conn: ConnId, how: Close) {
        let Some(mut socket) = self.sockets.remove(conn) else { return };
        self.buffers.clear(&mut socket.queue);
        if let Some(pipe) = socket.pipe.take() {
            self.pipes.give(pipe);
        }
        if how == Close::Reset {
            socket::close_with_reset(&socket.fd);
        }
        // What that one brings waits for nothing any more.
        if let Some(source) = socket.joined {
            self.let_go(source);
        }
    }

    fn unheard(&mut self, conn: ConnId) -> Unheard {
        let Some(socket) = self.sockets.get(conn) else { return Unheard::End };
        let broke = |completion: &Completion| matches!(completion, Completion::SendFailed(broken) if *broken == conn);
        if self.completions.iter().any(broke) {
            return Unheard::End;
        }
        socket::unheard(&socket.fd)
    }

    fn unsent(&self, conn: ConnId) -> u64 {
        let Some(socket) = self.sockets.get(conn) else { return 0 };
        socket.queued() + socket::unsent(&socket.fd)
    }

    fn undelivered(&self, conn: ConnId) -> u64 {
        let Some(socket) = self.sockets.get(conn) else { return 0 };
        socket.queued() + socket::unacknowledged(&socket.fd)
    }

    fn acks(&self, conn: ConnId) -> Option<Acks> {
        socket::acks(&self.sockets.get(conn)?.fd)
    }

    fn ask(&mut self, conn: ConnId, silence: Option<Duration>) {
        if let Some(socket) = self.sockets.get(conn) {
            self.options.ask(&socket.fd, silence);
        }
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

    fn is_short_of_descriptors(&self) -> bool {
        self.descriptors.are_short()
    }

    fn buffer_waits(&self) -> u64 {
        self.buffer_waits
    }

    fn splice_failures(&self) -> u64 {
        self.pipes.failures()
    }
}

/// Writes the first buffers of a socket's queue in one call: bytes taken, bytes offered.
fn write(buffers: &Buffers, socket: &Socket) -> Result<(u32, u32), Errno> {
    let mut parts = [io::IoSlice::new(&[]); SEND_PARTS_MAX];
    let mut count = 0;
    let mut offered = 0;
    for (bytes, part) in buffers.slices(&socket.queue).zip(&mut parts) {
        *part = io::IoSlice::new(bytes);
        count += 1;
        offered += bytes.len() as u32;
    }
    let sent = if count == 1 {
        rustix::net::send(&socket.fd, &parts[0], SendFlags::NOSIGNAL)
    } else {
        let mut control = rustix::net::SendAncillaryBuffer::default();
        rustix::net::sendmsg(socket.fd.as_fd(), &parts[..count], &mut control, SendFlags::NOSIGNAL)
    };
    sent.map(|taken| (taken as u32, offered))
}

fn conn_data(conn: ConnId) -> u64 {
    (conn.index() as u64) << 32 | u64::from(conn.generation())
}

fn data_conn(data: u64) -> ConnId {
    ConnId::from_parts((data >> 32) as u32, data as u32)
}
