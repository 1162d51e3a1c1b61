//! The simulator: a seeded network in memory with virtual time.
//!
//! It drives the real engine through what real networks and kernels do and tests can hardly
//! provoke: partial reads and writes, receives that stop late, refused, hanging and broken
//! connections, slow and stalled readers, clients and backends that end or reset at any moment, too
//! few buffers, what a reset destroys on its way, and events that are told late, in part, in
//! another order or as one. Two runs from one seed are identical.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::buffers::{Buf, Buffers, Chain};
use super::{Acks, Close, Completion, ConnId, Driver, Unheard, Wait};
use crate::limits::{BUFFER_SIZE, BUFFERS_LENT_MIN};
use crate::slab::Slab;

mod hearing;
pub mod http;
pub mod lines;
mod peers;

use hearing::Hearing;
pub use peers::{ID_BYTES, Peer, Plan};

/// Buffers filled of which that was not told yet: as many as a driver lends to its kernel, at least.
pub const UNTOLD_BUFFERS_MAX: usize = BUFFERS_LENT_MIN;
/// What a peer's socket buffers, in each direction.
const SOCKET_BYTES: usize = 48 * 1024;
/// What the proxy's kernel takes for one connection and has not delivered.
const SEND_BYTES: usize = 32 * 1024;
/// What was sent is to be told within this time.
const UNDONE_MAX: Duration = Duration::from_millis(2);
/// For so long everybody who is not asked has been idle.
const IDLE: Duration = Duration::from_secs(60);
/// For so long a process may be stopped, as one is whose CPU quota is used up.
const STOP: Duration = Duration::from_millis(100);

#[allow(
    clippy::struct_excessive_bools,
    reason = "independent facts, each told by the kernel or the user"
)]
#[derive(Debug)]
struct Socket {
    peer: usize,
    connecting: bool,
    wanted: bool,
    /// The user has wanted to receive, and does not now.
    stopped: bool,
    /// Deliveries that may still come after receiving was stopped.
    late: u8,
    /// The peer's bytes taken from its socket so far.
    taken: usize,
    ended: bool,
    /// That was told.
    told_end: bool,
    /// The break was told as a failed send.
    broken: bool,
    /// An error that a send met first: receiving then shows an ordinary end.
    error_taken: bool,
    /// What it receives may be sent there by itself.
    joined: Option<ConnId>,
    queue: Chain,
    /// Bytes taken by the kernel of which that was not told yet.
    untold: u32,
    /// When the kernel took the latest.
    taken_at: Duration,
    shutdown: bool,
    /// The user has ended the direction to the peer.
    shut: bool,
    stepping: bool,
    /// A receive waits for a buffer.
    starved: bool,
    /// The kernel asks the peer whether it is there.
    asked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    ClientArrives(usize),
    ConnectEnds(u32, u32, bool),
    PeerActs(usize),
    Receive(u32, u32),
    Send(u32, u32),
    /// The kernel tells of so many bytes that it has taken.
    TellSent(u32, u32, u32),
    /// A connection that is not received from shows that it is broken.
    Break(u32, u32),
    /// Bytes on the wire reach a peer.
    Deliver(usize),
}

/// How an endpoint answers connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reachability {
    /// It accepts.
    Up,
    /// It refuses.
    Refusing,
    /// It never answers.
    Silent,
    /// Its host is gone without a word, and so is what was connected to it: see [`Sim::reach`].
    Gone,
}

/// What peers speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speech {
    /// Anything, in both directions.
    Bytes,
    /// Lines, each answered with one.
    Lines,
    /// Requests of HTTP/1.1, each answered.
    Http,
}

/// The simulated network and the driver on it.
#[allow(clippy::struct_excessive_bools, reason = "independent facts")]
pub struct Sim {
    rng: fastrand::Rng,
    start: Instant,
    elapsed: Duration,
    steps: BinaryHeap<Reverse<(Duration, u64, Step)>>,
    sequence: u64,
    sockets: Slab<Socket, crate::io::Conn>,
    buffers: Buffers,
    hearing: Hearing,
    /// Sends are told of up to so many microseconds after the kernel has taken them.
    sent_late_us: u64,
    noise: Arc<[u8]>,
    backlog: std::collections::VecDeque<usize>,
    listening: bool,
    room: usize,
    woken: bool,
    buffer_waits: u64,
    /// Everybody who took part.
    pub peers: Vec<Peer>,
    /// How each endpoint answers now, by port.
    pub endpoints: Vec<Reachability>,
    /// Whether backends greet.
    pub greetings: bool,
    /// What peers speak.
    pub speech: Speech,
    /// The most that was held for one connection, in bytes.
    pub queue_peak: u32,
    /// That bytes were sent ends no wait, as no driver may have it.
    pub withholds_sends: bool,
    /// When the latest stop of the process was over.
    stopped_until: Duration,
    too_late: Option<String>,
}

impl Sim {
    /// A network without clients; endpoint `i` is at port `i`.
    pub fn new(seed: u64, endpoints: usize, conns_max: usize, buffers_max: usize) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        Self {
            start: Instant::now(),
            elapsed: Duration::ZERO,
            steps: BinaryHeap::new(),
            sequence: 0,
            sockets: Slab::with_capacity(conns_max),
            buffers: Buffers::new(buffers_max).expect("memory"),
            hearing: Hearing::new(&mut rng),
            sent_late_us: [0, 0, 300][rng.usize(..3)],
            noise: std::iter::repeat_with(|| rng.u8(..)).take(1 << 16).collect(),
            backlog: std::collections::VecDeque::new(),
            listening: true,
            room: 0,
            woken: false,
            buffer_waits: 0,
            peers: Vec::new(),
            endpoints: vec![Reachability::Up; endpoints],
            greetings: rng.bool(),
            speech: Speech::Bytes,
            queue_peak: 0,
            withholds_sends: false,
            stopped_until: Duration::ZERO,
            too_late: None,
            rng,
        }
    }

    /// Lets a client come after `delay`.
    pub fn add_client(&mut self, delay: Duration) {
        let peer = match self.speech {
            Speech::Lines => self.add_asker(),
            Speech::Http => self.add_http_client(),
            Speech::Bytes => {
                let plan = self.plan(true);
                self.add_peer(true, plan)
            }
        };
        self.schedule(delay, Step::ClientArrives(peer));
    }

    /// How an endpoint answers from now on.
    pub fn reach(&mut self, endpoint: usize, how: Reachability) {
        self.endpoints[endpoint] = how;
        if how != Reachability::Gone {
            return;
        }
        for peer in &mut self.peers {
            if peer.endpoint == Some(endpoint as u16) && peer.swallowed.is_none() {
                peer.swallowed = Some(self.elapsed);
                peer.unacked_since = (!peer.wire.is_empty()).then_some(self.elapsed);
            }
        }
    }

    /// A connection of which somebody waits for longer than `limit` that its peer acknowledges what it
    /// was sent, which that never will. To be asked after each turn.
    pub fn hanging(&self, limit: Duration) -> Option<String> {
        (0..self.sockets.slots()).find_map(|slot| {
            let socket = self.sockets.get(self.sockets.key_at(slot)?)?;
            let peer = &self.peers[socket.peer];
            let since = peer.unacked_since?;
            let is_read = socket.taken == peer.sent;
            let is_waited_for = match socket.joined {
                // One that takes nothing of what had come is not waiting.
                Some(client) => self.sockets.get(client).is_some_and(|client| {
                    client.queue.is_empty() && self.peers[client.peer].wire.is_empty()
                }),
                None => self.speech != Speech::Bytes,
            };
            let waits = self.elapsed.saturating_sub(since);
            (is_read && is_waited_for && waits > limit)
                .then(|| format!("{} is gone, and was waited for {waits:?}", peer.id))
        })
    }

    /// Raises the wake-up event, as writing to the descriptor would.
    pub fn wake(&mut self) {
        self.woken = true;
    }

    /// Virtual time since the start.
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// Connections that the driver holds.
    pub fn open_sockets(&self) -> usize {
        self.sockets.len()
    }

    /// Clients that wait to be accepted or are still to come.
    pub fn clients_outside(&self) -> usize {
        let coming = self.steps.iter().filter(|s| matches!(s.0.2, Step::ClientArrives(_))).count();
        coming + self.backlog.len()
    }

    /// What the user could do and has not done, though it was told all that it needs to know, for
    /// nothing will tell it again; or what it was told too late. To be asked after each turn.
    pub fn undone(&mut self) -> Option<String> {
        let undone =
            (0..self.sockets.slots()).find_map(|slot| self.undone_with(self.sockets.key_at(slot)?));
        self.too_late.take().or(undone)
    }

    /// The user is told that bytes were sent for which the source of them may have waited.
    fn check_lateness(&mut self, conn: ConnId) {
        let Some(sink) = self.sockets.get(conn) else { return };
        let Some(source) = sink.joined.and_then(|source| self.sockets.get(source)) else { return };
        let from = &self.peers[source.peer];
        let waits = !source.wanted && !source.broken && from.sent > source.taken;
        let late = self.elapsed.saturating_sub(sink.taken_at.max(self.stopped_until));
        if waits && late > UNDONE_MAX {
            self.too_late = Some(format!("{} waited {late:?} to be read from", from.id));
        }
    }

    fn undone_with(&self, conn: ConnId) -> Option<String> {
        let source = self.sockets.get(conn)?;
        let sink = self.sockets.get(source.joined?)?;
        let (from, to) = (&self.peers[source.peer], &self.peers[sink.peer]);
        let is_flushed = sink.queue.is_empty() && sink.untold == 0;
        if sink.broken || to.reset || to.is_swallowed() || !is_flushed || self.hearing.has(conn) {
            return None;
        }
        let unread = !source.ended && (from.sent > source.taken || from.ended || from.reset);
        let both_ended = source.told_end && sink.told_end;
        if unread && !source.wanted && !source.broken {
            Some(format!("{} is not read from, though {} takes everything", from.id, to.id))
        } else if source.told_end && !from.reset && !sink.shut {
            Some(format!("{} has ended, and {} was not told", from.id, to.id))
        } else if both_ended && source.queue.is_empty() && source.untold == 0 {
            Some(format!("{} and {} have ended, and stay", from.id, to.id))
        } else {
            None
        }
    }

    fn schedule(&mut self, delay: Duration, step: Step) {
        self.sequence += 1;
        self.steps.push(Reverse((self.elapsed + delay, self.sequence, step)));
    }

    fn soon(&mut self, most_us: u64, step: Step) {
        let delay = Duration::from_micros(self.rng.u64(..=most_us));
        self.schedule(delay, step);
    }

    fn add_socket(&mut self, peer: usize, connecting: bool) -> Option<ConnId> {
        let socket = Socket {
            peer,
            connecting,
            wanted: false,
            stopped: false,
            late: 0,
            taken: 0,
            ended: false,
            told_end: false,
            broken: false,
            error_taken: false,
            joined: None,
            queue: Chain::default(),
            untold: 0,
            taken_at: Duration::ZERO,
            shutdown: false,
            shut: false,
            stepping: false,
            starved: false,
            asked: false,
        };
        let conn = self.sockets.insert(socket).ok()?;
        self.peers[peer].conn = Some(conn);
        Some(conn)
    }

    fn accept_waiting(&mut self) {
        while self.room > 0 && !self.backlog.is_empty() {
            if self.rng.u8(..50) == 0 {
                self.room = 0;
                let error = io::Error::from_raw_os_error(libc::EMFILE);
                return self.hearing.push(Completion::AcceptFailed(error));
            }
            self.room -= 1;
            self.accept_one();
        }
    }

    fn accept_one(&mut self) {
        if let Some(peer) = self.backlog.pop_front()
            && let Some(conn) = self.add_socket(peer, false)
        {
            self.hearing.push(Completion::Accepted(conn));
        }
    }

    fn run_step(&mut self, step: Step) {
        match step {
            Step::ClientArrives(peer) => {
                if self.listening {
                    self.backlog.push_back(peer);
                    self.soon(100, Step::PeerActs(peer));
                } else {
                    self.peers[peer].saw_reset = true;
                }
            }
            Step::ConnectEnds(index, generation, accepted) => {
                self.connect_ends(ConnId::from_parts(index, generation), accepted);
            }
            Step::PeerActs(peer) => self.peer_acts(peer),
            Step::Receive(index, generation) => {
                self.receive_step(ConnId::from_parts(index, generation));
            }
            Step::Send(index, generation) => self.send_step(ConnId::from_parts(index, generation)),
            Step::TellSent(index, generation, bytes) => {
                let conn = ConnId::from_parts(index, generation);
                if self.sockets.get(conn).is_some_and(|socket| !socket.broken) {
                    self.hearing.push(Completion::Sent(conn, bytes));
                }
            }
            Step::Break(index, generation) => {
                self.break_step(ConnId::from_parts(index, generation));
            }
            Step::Deliver(peer) => self.deliver(peer),
        }
    }

    fn connect_ends(&mut self, conn: ConnId, accepted: bool) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if accepted {
            socket.connecting = false;
            let peer = socket.peer;
            self.hearing.push(Completion::Connected(conn));
            self.soon(100, Step::PeerActs(peer));
        } else {
            let error = io::ErrorKind::ConnectionRefused.into();
            self.hearing.push(Completion::ConnectFailed(conn, error));
        }
    }

    /// Something changed: the socket may have something to receive, room to send, or be broken.
    fn poke(&mut self, conn: ConnId) {
        let (index, generation) = (conn.index() as u32, conn.generation());
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if socket.connecting {
            return;
        }
        if !socket.ended && !socket.starved && (socket.wanted || socket.late > 0) {
            self.soon(50, Step::Receive(index, generation));
        } else if socket.stopped && !socket.broken && self.peers[socket.peer].reset {
            self.soon(50, Step::Break(index, generation));
        }
        if let Some(socket) = self.sockets.get_mut(conn)
            && !socket.stepping
            && (!socket.queue.is_empty() || socket.shutdown)
        {
            socket.stepping = true;
            self.soon(50, Step::Send(index, generation));
        }
    }

    fn receive_step(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        socket.starved = false;
        if socket.ended || !(socket.wanted || socket.late > 0) {
            return;
        }
        let peer = &self.peers[socket.peer];
        let waiting = peer.sent - socket.taken;
        if waiting == 0 {
            if peer.reset || peer.ended {
                socket.ended = true;
                let broken = peer.reset && !socket.error_taken;
                self.hearing.push(if broken {
                    Completion::ReceiveFailed(conn)
                } else {
                    Completion::Ended(conn)
                });
            }
            return;
        }
        let (_, untold) = self.hearing.untold();
        let buf = if untold < UNTOLD_BUFFERS_MAX { self.buffers.take() } else { None };
        let Some(mut buf) = buf else {
            self.buffer_waits += u64::from(untold < UNTOLD_BUFFERS_MAX);
            socket.starved = true;
            let step = Step::Receive(conn.index() as u32, conn.generation());
            return self.schedule(Duration::from_millis(1), step);
        };
        if !socket.wanted {
            socket.late -= 1;
        }
        let sink = self.sink(conn);
        let Some(socket) = self.sockets.get_mut(conn) else { return self.buffers.give(buf) };
        let peer = &self.peers[socket.peer];
        let said = peer.lines.as_ref().map_or(0, |lines| lines.out.len());
        let piece = (said + peer.http.as_ref().map_or(0, |http| http.out.len())) / 100;
        let piece = peer.plan.piece.max(piece).min(BUFFER_SIZE);
        let mut len = self.rng.usize(1..=waiting.min(piece));
        let (id, at) = (peer.id, socket.taken);
        if let Some(lines) = &peer.lines {
            len = lines.piece(at, len);
        }
        socket.taken += len;
        let bytes = match (&peer.lines, &peer.http) {
            (Some(lines), _) => lines.out[at..at + len].to_vec(),
            (_, Some(http)) => http.out[at..at + len].to_vec(),
            _ => self.stream(id, at, len),
        };
        self.buffers.space(&mut buf)[..len].copy_from_slice(&bytes);
        self.buffers.set_len(&mut buf, len);
        match sink {
            Some(to) => {
                self.hearing.push(Completion::Spliced(conn, len as u32));
                self.send(to, buf);
            }
            None => self.hearing.push(Completion::Received(conn, buf)),
        }
        self.poke(conn);
    }

    /// Where bytes go without the user's help, now and then.
    fn sink(&mut self, conn: ConnId) -> Option<ConnId> {
        let source = self.sockets.get(conn).filter(|source| source.wanted)?;
        let to = source.joined?;
        let free = self.sockets.get(to).is_some_and(|to| to.queue.is_empty() && !to.broken);
        (free && !self.hearing.has(conn) && self.rng.bool()).then_some(to)
    }

    fn send_step(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        socket.stepping = false;
        let index = socket.peer;
        let peer = &mut self.peers[index];
        if peer.reset && !socket.queue.is_empty() {
            socket.error_taken = true;
            return self.break_step(conn);
        }
        let most = (SEND_BYTES - peer.wire.len()).min(socket.queue.bytes() as usize);
        // What is small finds room where little else is on its way, and that is known at once.
        let is_small = peer.wire.len() + socket.queue.bytes() as usize <= BUFFER_SIZE;
        if most > 0 {
            let len = if is_small { most } else { self.rng.usize(1..=most) };
            let before = peer.wire.len();
            for part in self.buffers.slices(&socket.queue) {
                let rest = len - (peer.wire.len() - before);
                peer.wire.extend(&part[..part.len().min(rest)]);
            }
            if peer.is_swallowed() {
                peer.unacked_since.get_or_insert(self.elapsed);
            }
            self.buffers.advance(&mut socket.queue, len as u32);
            socket.untold += len as u32;
            socket.taken_at = self.elapsed;
            let tell = Step::TellSent(conn.index() as u32, conn.generation(), len as u32);
            match self.sent_late_us {
                late @ 1.. if !is_small => self.soon(late, tell),
                _ => self.run_step(tell),
            }
        }
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if socket.queue.is_empty() && socket.shutdown {
            socket.shutdown = false;
            self.peers[index].wire_ends = true;
        }
        self.carry_on(index);
        if most > 0 {
            self.poke(conn);
        }
    }

    fn break_step(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if socket.broken || (socket.ended && !socket.error_taken && socket.queue.is_empty()) {
            return;
        }
        socket.broken = true;
        socket.shutdown = false;
        self.buffers.clear(&mut socket.queue);
        self.hearing.push(Completion::SendFailed(conn));
    }

    /// The process is stopped for a while: much happens, and nothing is told.
    fn stop(&mut self) {
        let until = self.elapsed + STOP;
        while let Some(&Reverse((at, _, step))) = self.steps.peek()
            && at <= until
        {
            self.steps.pop();
            self.elapsed = self.elapsed.max(at);
            self.run_step(step);
        }
        (self.elapsed, self.stopped_until) = (until, until);
    }

    /// A backend that has answered all that it was asked is asked anew.
    fn check_silence(&self, conn: ConnId, socket: &Socket) {
        let peer = &self.peers[socket.peer];
        let received = peer.received.len();
        let has_understood = match (&peer.lines, &peer.http) {
            _ if peer.is_client => false,
            (Some(lines), _) => lines.has_understood(received),
            (_, Some(http)) => http.has_understood(received),
            _ => false,
        };
        let idle = socket.queue.is_empty() && peer.wire.is_empty() && has_understood;
        let unheard =
            peer.sent > socket.taken || peer.reset || peer.ended || self.hearing.has(conn);
        assert!(!idle || !unheard, "a request is sent on a connection that is not silent");
    }
}

impl Driver for Sim {
    fn now(&self) -> Instant {
        self.start + self.elapsed
    }

    fn wait(&mut self, wait: Wait) -> io::Result<bool> {
        let started = self.elapsed;
        self.hearing.begin_turn(&mut self.rng);
        if self.rng.u16(..500) == 0 {
            self.stop();
        }
        loop {
            if std::mem::take(&mut self.woken) {
                self.hearing.push(Completion::Woken);
            }
            self.accept_waiting();
            let heard = self.hearing.len(self.withholds_sends);
            if heard >= wait.events as usize {
                return Ok(wait.events == 1);
            }
            let until = started + if heard > 0 { wait.batch.min(wait.most) } else { wait.most };
            match self.steps.peek() {
                Some(&Reverse((at, _, step))) if at <= until => {
                    self.steps.pop();
                    self.elapsed = self.elapsed.max(at);
                    self.run_step(step);
                }
                _ => {
                    self.elapsed = self.elapsed.max(until);
                    return Ok(true);
                }
            }
        }
    }

    fn next(&mut self) -> Option<Completion> {
        loop {
            let completion = self.hearing.pop(&mut self.rng)?;
            let Some(conn) = completion.conn() else { return Some(completion) };
            if let Completion::Sent(..) = completion {
                self.check_lateness(conn);
            }
            if let Some(socket) = self.sockets.get_mut(conn) {
                match completion {
                    Completion::Sent(_, bytes) => socket.untold -= bytes,
                    Completion::Ended(_) | Completion::ReceiveFailed(_) => socket.told_end = true,
                    _ => {}
                }
                return Some(completion);
            }
            if let Completion::Received(_, buf) = completion {
                self.buffers.give(buf);
            }
        }
    }

    fn accept(&mut self, room: usize) {
        // Those that the user does not know of yet have their places.
        let (accepted, _) = self.hearing.untold();
        self.room = room.saturating_sub(accepted);
    }

    fn refuse_handshakes(&mut self) -> bool {
        self.listening = false;
        false
    }

    fn stop_listening(&mut self) -> bool {
        self.room = 0;
        self.listening = false;
        while !self.backlog.is_empty() {
            self.accept_one();
        }
        self.hearing.tell_all();
        true
    }

    fn release(&mut self, _: ConnId) -> Option<OwnedFd> {
        None // There is one worker.
    }

    fn adopt(&mut self, _: OwnedFd) -> Option<ConnId> {
        None
    }

    fn connect(&mut self, address: &SocketAddr) -> io::Result<ConnId> {
        let peer = match self.speech {
            Speech::Lines => self.add_answerer(address.port()),
            Speech::Http => self.add_http_backend(address.port()),
            Speech::Bytes => {
                let plan = self.plan(false);
                self.add_peer(false, plan)
            }
        };
        let Some(conn) = self.add_socket(peer, true) else {
            return Err(io::ErrorKind::QuotaExceeded.into());
        };
        let reachability = self.endpoints[usize::from(address.port())];
        self.peers[peer].endpoint = Some(address.port());
        if !matches!(reachability, Reachability::Silent | Reachability::Gone) {
            let accepted = reachability == Reachability::Up;
            let step = Step::ConnectEnds(conn.index() as u32, conn.generation(), accepted);
            self.soon(2_000, step);
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
        let late = self.rng.u8(..3);
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if socket.wanted && !on {
            socket.late = late;
        }
        socket.wanted = on;
        socket.stopped = !on;
        self.poke(conn);
    }

    fn send(&mut self, conn: ConnId, buf: Buf) {
        let Some(socket) = self.sockets.get(conn) else { return self.buffers.give(buf) };
        self.check_silence(conn, socket);
        let Some(socket) = self.sockets.get_mut(conn).filter(|socket| !socket.broken) else {
            return self.buffers.give(buf);
        };
        assert!(!socket.shut, "bytes are sent behind the end");
        self.buffers.push(&mut socket.queue, buf);
        self.queue_peak = self.queue_peak.max(socket.queue.bytes());
        self.poke(conn);
    }

    fn shutdown(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn) {
            socket.shutdown = !socket.broken;
            socket.shut = true;
        }
        self.poke(conn);
    }

    fn close(&mut self, conn: ConnId, how: Close) {
        let Some(mut socket) = self.sockets.remove(conn) else { return };
        self.buffers.clear(&mut socket.queue);
        if !socket.connecting {
            self.close_wire(socket.peer, socket.taken, how);
        }
    }

    fn unheard(&mut self, conn: ConnId) -> Unheard {
        let Some(socket) = self.sockets.get(conn) else { return Unheard::End };
        let peer = &self.peers[socket.peer];
        if peer.reset || peer.ended {
            Unheard::End
        } else if peer.sent > socket.taken || self.hearing.has(conn) {
            Unheard::Bytes
        } else {
            Unheard::Nothing
        }
    }

    fn unsent(&self, conn: ConnId) -> u64 {
        self.undelivered(conn)
    }

    fn undelivered(&self, conn: ConnId) -> u64 {
        let Some(socket) = self.sockets.get(conn) else { return 0 };
        let peer = &self.peers[socket.peer];
        if peer.reset { 0 } else { u64::from(socket.queue.bytes()) + peer.wire.len() as u64 }
    }

    fn acks(&self, conn: ConnId) -> Option<Acks> {
        let socket = self.sockets.get(conn)?;
        let peer = &self.peers[socket.peer];
        let pending = !peer.wire.is_empty() || !socket.queue.is_empty();
        let Some(since) = peer.swallowed else {
            // Others acknowledge at once, and have just done it where they are asked.
            let last = if socket.asked { Duration::ZERO } else { IDLE };
            return Some(Acks {
                awaited: false,
                pending,
                last,
                sent: Duration::ZERO,
                progress: None,
            });
        };
        let awaited = !peer.wire.is_empty() || peer.wire_ends || socket.asked;
        Some(Acks {
            awaited,
            pending,
            last: self.elapsed.saturating_sub(since),
            sent: Duration::ZERO,
            progress: None,
        })
    }

    fn ask(&mut self, conn: ConnId, silence: Option<Duration>) {
        if let Some(socket) = self.sockets.get_mut(conn) {
            socket.asked = silence.is_some();
        }
    }

    fn peer_address(&self, _: ConnId) -> Option<SocketAddr> {
        None
    }

    fn local_address(&self, _: ConnId) -> Option<SocketAddr> {
        None
    }

    fn buffers(&mut self) -> &mut Buffers {
        &mut self.buffers
    }

    fn buffer_waits(&self) -> u64 {
        self.buffer_waits
    }
}
