//! The epoll driver: the twin of `io_uring` where that is blocked.
//!
//! Sockets are registered once, edge-triggered, and each remembers whether it is readable and
//! writable. A send is tried before the next socket is read from; only what it does not take waits
//! for an edge. Readable sockets take turns, a few buffers each, so that none starves the others and
//! a message of several buffers is sent in one call.

mod accept;
mod receive;
mod send;
mod socket;
mod timer;

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::thread::{nanosleep, set_current_timer_slack};

use self::socket::{HangUp, Room, Socket};
use self::timer::Timer;
use super::buffers::{Buf, Buffers};
use super::crowded::Crowded;
use super::descriptors::Descriptors;
use super::halves::{Receiving, Sending};
use super::lateness::Lateness;
use super::net::{self, Address, Credentials, Listener, Stream};
use super::splice::{self, Pipes};
use super::{Acks, Close, Completion, Conn, ConnId, Driver, DriverSetup, Network, Unheard, Wait};
use crate::fifo;
use crate::limits;
use crate::slab::Slab;

/// Events taken from the kernel at a time.
const EVENTS_MAX: usize = 1024;
/// Reads and accepts of one turn; the rest comes in the next, after commands and timers.
const STEPS_PER_TURN: u32 = 2048;
/// One step in so many looks for clients before it reads.
const ACCEPT_EVERY: u32 = 32;
/// Event data of listener `i` is this plus `i`, out of the reach of connections' keys.
const LISTENER: u64 = u64::MAX - 0xffff;
/// Event data of the wake-up descriptor.
const WAKE: u64 = LISTENER - 1;
/// Event data of the timer.
const TIMER: u64 = LISTENER - 2;

/// The epoll driver of one worker.
pub struct Epoll {
    fd: OwnedFd,
    /// Registered, so it must stay open.
    _wake: OwnedFd,
    timer: Timer,
    listeners: Vec<Option<Listener>>,
    /// Listeners that may have clients waiting.
    acceptable: Vec<bool>,
    /// Listeners whose clients are left waiting.
    held: Vec<bool>,
    /// Where the next client is looked for first.
    accept_from: usize,
    room: usize,
    /// No handshake begins any more.
    refusing: bool,
    crowded: Crowded,
    descriptors: Descriptors,
    sockets: Slab<Socket, Conn>,
    buffers: Buffers,
    start: Instant,
    now: Instant,
    lateness: Lateness,
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
        let listeners = setup.listeners.into_iter().map(Listener::new);
        let listeners = listeners.map(|listener| listener.map(Some));
        let listeners = listeners.collect::<io::Result<Vec<_>>>()?;
        for (data, fd) in (LISTENER..).zip(listeners.iter().flatten()) {
            rustix::io::ioctl_fionbio(fd, true)?;
            // Else each client would wake every worker. Whom the kernel wakes first may get them all:
            // see `worker::handover`.
            let exclusive = if fd.transport().is_shared() {
                EventFlags::EXCLUSIVE
            } else {
                EventFlags::empty()
            };
            epoll::add(&epoll, fd, EventData::new_u64(data), listening | exclusive)?;
        }
        Ok(Self {
            fd: epoll,
            _wake: setup.wake,
            timer,
            acceptable: vec![true; listeners.len()],
            held: vec![false; listeners.len()],
            accept_from: 0,
            listeners,
            room: 0,
            refusing: false,
            crowded: Crowded::default(),
            descriptors: Descriptors::new(),
            sockets: Slab::with_capacity(setup.conns_max),
            buffers: Buffers::new(setup.buffers_max)?,
            start: Instant::now(),
            now: Instant::now(),
            lateness: Lateness::default(),
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

    fn on_event(&mut self, conn: ConnId, flags: EventFlags) {
        // A descriptor that somebody has duplicated outlives its close in the epoll instance.
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if socket.sending == Sending::Connecting && socket.stream.connects_at_once() {
            return; // It waits for room: until it is connected, it looks like one that is hung up.
        }
        let hung_up = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        if flags.intersects(hung_up) {
            socket.hang_up = socket.hang_up.max(HangUp::Ended);
        }
        socket.urgent |= flags.contains(EventFlags::PRI);
        if flags.intersects(EventFlags::IN | EventFlags::PRI | hung_up)
            && let Some(turn) = socket.receiving.progress_mut()
        {
            turn.arrive();
        }
        let settled = flags.intersects(EventFlags::OUT | EventFlags::ERR | EventFlags::HUP);
        let failed = flags.contains(EventFlags::ERR);
        if socket.sending == Sending::Connecting {
            if settled {
                self.on_connect_event(conn, failed);
            }
        } else {
            if failed {
                socket.hang_up = HangUp::Failed;
            }
            if socket.has_error() && !socket.is_flushed() {
                // A send would take the error from the receive that is to tell it.
                self.fail_send(conn);
            } else if settled && let Some(room @ Room::Full) = socket.sending.progress_mut() {
                room.clear();
                self.flush(conn);
            }
            self.tell_break(conn);
        }
        self.enqueue(conn);
    }

    /// A socket that its caller knows to be open.
    fn live(&mut self, conn: ConnId) -> &mut Socket {
        self.sockets.get_mut(conn).expect("an open connection")
    }

    /// Whether there is something to do without waiting.
    fn busy(&self) -> bool {
        !self.completions.is_empty()
            || !self.ready.is_empty()
            || !self.bulky.is_empty()
            || (self.room > 0 && (0..self.listeners.len()).any(|index| self.may_accept_from(index)))
    }

    fn may_accept_from(&self, index: usize) -> bool {
        self.acceptable[index] && !self.held[index]
    }

    /// Takes events from the kernel, and waits for them unless it only looks (`polls`).
    fn take_events(&mut self, polls: bool) -> io::Result<()> {
        let at_once = Timespec::default();
        let mut limit = polls.then_some(&at_once);
        loop {
            let room = rustix::buffer::spare_capacity(&mut self.events);
            match epoll::wait(&self.fd, room, limit) {
                Ok(_) => return Ok(()),
                // By a stop, maybe long ago: what has come since is not told yet.
                Err(Errno::INTR) => limit = Some(&at_once),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Takes on all events that there are beyond those of one look.
    fn take_more_events(&mut self) -> io::Result<()> {
        for _ in 0..=self.sockets.len() / EVENTS_MAX {
            self.take_events(true)?;
            let are_all = self.events.len() < EVENTS_MAX;
            self.dispatch();
            if are_all {
                break;
            }
        }
        Ok(())
    }

    fn dispatch(&mut self) {
        let mut events = mem::take(&mut self.events);
        for event in events.drain(..) {
            match event.data.u64() {
                WAKE => self.completions.push_back(Completion::Woken),
                TIMER => self.timer.on_fired(),
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
        let wait = self.connect_again(wait);
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
        let due = self.now + wait.most;
        self.take_events(polls)?;
        let spare_time = !polls && (!naps || self.events.len() < wait.events as usize);
        self.now = Instant::now();
        self.ready.extend(self.bulky.drain(..));
        self.steps = STEPS_PER_TURN;
        self.dispatch();
        if self.lateness.on_waited(due, self.now) {
            self.take_more_events()?;
            self.now = Instant::now();
        }
        self.window = splice::window(self.start, self.now);
        Ok(spare_time)
    }

    fn is_behind(&mut self) -> bool {
        // A turn has as many steps, and needs buffers.
        let has_more = !self.ready.is_empty() || !self.starving.is_empty();
        self.lateness.is_behind(has_more, self.now)
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
        let fits = room > 0 && self.descriptors.can_accept();
        self.room = if fits { room.min(limits::DESCRIPTORS_RESERVED) } else { 0 };
    }

    fn hold(&mut self, listener: usize, held: bool) {
        self.held[listener] = held;
    }

    fn refuse_handshakes(&mut self) -> bool {
        self.refusing = true;
        self.listeners.iter().flatten().for_each(Listener::refuse_handshakes);
        self.listeners.iter().flatten().any(Listener::is_crowded)
    }

    fn stop_listening(&mut self) -> bool {
        self.room = 0;
        let mut all_closed = true;
        for index in 0..self.listeners.len() {
            all_closed &= self.empty_listener(index);
        }
        all_closed
    }

    fn release(&mut self, conn: ConnId) -> Option<Stream> {
        let is_unwanted =
            |socket: &&Socket| !matches!(socket.receiving, Receiving::Wanted(_) | Receiving::Ended);
        let socket = self.sockets.get(conn).filter(is_unwanted)?;
        epoll::delete(&self.fd, &socket.stream).ok()?;
        self.sockets.remove(conn).map(|socket| socket.stream)
    }

    fn adopt(&mut self, client: Stream) -> Option<ConnId> {
        self.register(Socket::connected(client)).ok()
    }

    fn connect(&mut self, address: &Address, options: &net::Options) -> io::Result<ConnId> {
        self.begin_connect(address, options)
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
        }
        self.tell_break(conn);
        self.enqueue(conn);
    }

    fn send(&mut self, conn: ConnId, buf: Buf) {
        let socket = self.sockets.get_mut(conn).filter(|s| s.sending != Sending::Broken);
        let Some(socket) = socket else { return self.buffers.give(buf) };
        debug_assert!(socket.sending.takes_bytes(), "bytes are sent in {:?}", socket.sending);
        self.buffers.push(&mut socket.queue, buf);
        if let Some(other) = self.unsent.replace(conn).filter(|&other| other != conn) {
            self.flush_if_open(other);
        }
    }

    fn shutdown(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn) {
            socket.sending.shut_down();
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
            socket.stream.close_with_reset();
        }
        // What that one brings waits for nothing any more.
        if let Some(source) = socket.joined {
            self.resume(source);
        }
    }

    fn has_descriptor(&self, conn: ConnId) -> bool {
        self.sockets.get(conn).is_some()
    }

    fn unheard(&mut self, conn: ConnId) -> Unheard {
        let Some(socket) = self.sockets.get(conn) else { return Unheard::End };
        let broke = |completion: &Completion| matches!(completion, Completion::SendFailed(broken) if *broken == conn);
        if self.completions.iter().any(broke) {
            return Unheard::End;
        }
        socket.stream.unheard()
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
        self.listeners[listener].as_ref().is_some_and(|listener| listener.transport().is_shared())
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

fn conn_data(conn: ConnId) -> u64 {
    (conn.index() as u64) << 32 | u64::from(conn.generation())
}

fn data_conn(data: u64) -> ConnId {
    ConnId::from_parts((data >> 32) as u32, data as u32)
}
