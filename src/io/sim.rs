//! The simulator: a seeded network in memory with virtual time.
//!
//! It drives the real engine through what real networks do and tests can hardly provoke: partial
//! reads and writes, receives that stop late, refused, hanging and broken connections, slow and
//! stalled readers, clients and backends that end or reset at any moment, and too few buffers.
//! Two runs from one seed are identical.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::buffers::{Buf, Buffers, Chain};
use super::{Close, Completion, ConnId, Driver, Unheard, Wait};
use crate::limits::BUFFER_SIZE;
use crate::slab::Slab;

pub mod lines;

use lines::Lines;

/// Bytes of each peer's stream start with its number, so that who talked to whom is known.
pub const ID_BYTES: usize = 8;
/// What a peer's socket buffers, in each direction.
const SOCKET_BYTES: usize = 48 * 1024;

/// What a peer does, decided when it is created.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Bytes that it sends in all.
    pub sends: usize,
    /// Bytes that it sends before it was asked. Backends only.
    pub greeting: usize,
    /// Ends its direction once it has sent all; else only after the other's end.
    pub ends_first: bool,
    /// Resets after having sent so many bytes.
    pub resets_at: Option<usize>,
    /// Stops reading for good after so many bytes.
    pub stalls_at: Option<usize>,
    /// Sends in pieces of up to so many bytes.
    pub piece: usize,
    /// Longest pause between two of its steps, in microseconds.
    pub pause_us: u64,
}

/// A client or a backend at the far end of a connection.
#[allow(
    clippy::struct_excessive_bools,
    reason = "independent facts, each told by the kernel or the user"
)]
#[derive(Debug)]
pub struct Peer {
    /// Its number, unique in a run.
    pub id: u64,
    /// Whether it is a client.
    pub is_client: bool,
    /// What it does.
    pub plan: Plan,
    /// Bytes handed to its socket.
    pub sent: usize,
    /// All bytes that reached it.
    pub received: Vec<u8>,
    /// It was told of the other's end.
    pub saw_end: bool,
    /// It was told of a reset.
    pub saw_reset: bool,
    /// It has ended its direction.
    pub ended: bool,
    /// It has reset the connection.
    pub reset: bool,
    /// What it says, where peers speak lines.
    pub lines: Option<Box<Lines>>,
    read: usize,
    pause_us: u64,
    conn: Option<ConnId>,
}

impl Peer {
    fn is_over(&self) -> bool {
        self.reset || self.saw_reset || (self.ended && self.saw_end)
    }
}

#[allow(
    clippy::struct_excessive_bools,
    reason = "independent facts, each told by the kernel or the user"
)]
#[derive(Debug)]
struct Socket {
    peer: usize,
    connecting: bool,
    wanted: bool,
    /// Deliveries that may still come after receiving was stopped.
    late: u8,
    /// The peer's bytes taken from its socket so far.
    taken: usize,
    ended: bool,
    /// An error that a send met first: receiving then shows an ordinary end.
    error_taken: bool,
    /// What it receives may be sent there by itself.
    joined: Option<ConnId>,
    queue: Chain,
    shutdown: bool,
    stepping: bool,
    /// A receive waits for a buffer.
    starved: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    ClientArrives(usize),
    ConnectEnds(u32, u32, bool),
    PeerActs(usize),
    Receive(u32, u32),
    Send(u32, u32),
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
}

/// The simulated network and the driver on it.
#[allow(clippy::struct_excessive_bools, reason = "independent facts")]
pub struct Sim {
    rng: fastrand::Rng,
    start: Instant,
    elapsed: Duration,
    steps: BinaryHeap<Reverse<(Duration, u64, Step)>>,
    sequence: u64,
    sockets: Slab<Socket>,
    buffers: Buffers,
    completions: VecDeque<Completion>,
    noise: Arc<[u8]>,
    backlog: VecDeque<usize>,
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
    /// Whether peers speak lines, each answered with one.
    pub speaks_lines: bool,
    /// The most that was held for one connection, in bytes.
    pub queue_peak: u32,
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
            completions: VecDeque::new(),
            noise: std::iter::repeat_with(|| rng.u8(..)).take(1 << 16).collect(),
            backlog: VecDeque::new(),
            listening: true,
            room: 0,
            woken: false,
            buffer_waits: 0,
            peers: Vec::new(),
            endpoints: vec![Reachability::Up; endpoints],
            greetings: rng.bool(),
            speaks_lines: false,
            queue_peak: 0,
            rng,
        }
    }

    /// Lets a client come after `delay`.
    pub fn add_client(&mut self, delay: Duration) {
        let peer = if self.speaks_lines {
            self.add_asker()
        } else {
            let plan = self.plan(true);
            self.add_peer(true, plan)
        };
        self.schedule(delay, Step::ClientArrives(peer));
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

    /// The bytes of a peer's stream from `at`, up to `len`.
    pub fn stream(&self, id: u64, at: usize, len: usize) -> Vec<u8> {
        let header = id.to_be_bytes();
        let body = |i: usize| self.noise[(id as usize * 7919 + i) % self.noise.len()];
        (at..at + len).map(|i| header.get(i).copied().unwrap_or_else(|| body(i))).collect()
    }

    fn plan(&mut self, is_client: bool) -> Plan {
        let rng = &mut self.rng;
        let sends = match rng.u8(..10) {
            0 => 0,
            1..=6 => rng.usize(ID_BYTES..2000),
            7 | 8 => rng.usize(ID_BYTES..40_000),
            _ => rng.usize(ID_BYTES..300_000),
        };
        let greeting = if self.greetings && !is_client { rng.usize(..200).min(sends) } else { 0 };
        Plan {
            sends,
            greeting,
            ends_first: rng.u8(..3) > 0,
            resets_at: (rng.u8(..8) == 0).then(|| rng.usize(..=sends)),
            stalls_at: (rng.u8(..16) == 0).then(|| rng.usize(..10_000)),
            piece: if rng.u8(..4) == 0 { 100 } else { BUFFER_SIZE },
            pause_us: [20, 300, 5_000, 50_000][rng.usize(..4)],
        }
    }

    fn add_peer(&mut self, is_client: bool, plan: Plan) -> usize {
        self.peers.push(Peer {
            id: self.peers.len() as u64 + 1,
            is_client,
            pause_us: plan.pause_us,
            plan,
            sent: 0,
            received: Vec::new(),
            saw_end: false,
            saw_reset: false,
            ended: false,
            reset: false,
            lines: None,
            read: 0,
            conn: None,
        });
        self.peers.len() - 1
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
            late: 0,
            taken: 0,
            ended: false,
            error_taken: false,
            joined: None,
            queue: Chain::default(),
            shutdown: false,
            stepping: false,
            starved: false,
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
                return self.completions.push_back(Completion::AcceptFailed(error));
            }
            self.room -= 1;
            self.accept_one();
        }
    }

    fn accept_one(&mut self) {
        if let Some(peer) = self.backlog.pop_front()
            && let Some(conn) = self.add_socket(peer, false)
        {
            self.completions.push_back(Completion::Accepted(conn));
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
        }
    }

    fn connect_ends(&mut self, conn: ConnId, accepted: bool) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if accepted {
            socket.connecting = false;
            let peer = socket.peer;
            self.completions.push_back(Completion::Connected(conn));
            self.soon(100, Step::PeerActs(peer));
        } else {
            let error = io::ErrorKind::ConnectionRefused.into();
            self.completions.push_back(Completion::ConnectFailed(conn, error));
        }
    }

    /// A peer sends, reads, ends or resets, as it planned.
    fn peer_acts(&mut self, index: usize) {
        let chunk = self.rng.usize(1..8000);
        if self.peers[index].is_over() {
            return;
        }
        self.answer(index);
        let peer = &mut self.peers[index];
        let taken = peer.conn.and_then(|c| self.sockets.get(c)).map_or(0, |socket| socket.taken);
        let asked = peer.is_client || !peer.received.is_empty() || peer.saw_end;
        let goal = match &peer.lines {
            Some(lines) => lines.goal(peer).min(peer.plan.sends),
            None if asked => peer.plan.sends,
            None => peer.plan.greeting,
        };
        let chunk = peer.lines.as_ref().map_or(chunk, |lines| lines.chunk(chunk));
        let room = SOCKET_BYTES.saturating_sub(peer.sent - taken);
        let before_reset = peer.plan.resets_at.unwrap_or(usize::MAX).saturating_sub(peer.sent);
        let before = (peer.sent, peer.read);
        peer.sent += chunk.min(room).min(goal.saturating_sub(peer.sent)).min(before_reset);
        if peer.plan.stalls_at.is_none_or(|at| peer.read < at) {
            peer.read = peer.received.len();
        }
        if asked && peer.plan.resets_at.is_some_and(|at| peer.sent >= at) {
            peer.reset = true;
        } else if asked && peer.sent == peer.plan.sends {
            // Two that wait for one another would wait for ever: the client gives in.
            let gives_in = peer.is_client && self.rng.u8(..20) == 0;
            peer.ended |= peer.plan.ends_first || peer.saw_end || gives_in;
        }
        peer.ended |= peer.lines.is_some() && !peer.is_client && peer.saw_end;
        // With nothing to do it looks around ever more rarely.
        let busy = before != (peer.sent, peer.read);
        peer.pause_us = if busy { peer.plan.pause_us } else { (2 * peer.pause_us).min(500_000) };
        let (pause, over) = (peer.pause_us, peer.is_over());
        if let Some(conn) = peer.conn {
            self.poke(conn);
        }
        if !over {
            self.soon(pause, Step::PeerActs(index));
        }
    }

    /// Something changed: the socket may have something to receive or room to send.
    fn poke(&mut self, conn: ConnId) {
        let (index, generation) = (conn.index() as u32, conn.generation());
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if socket.connecting {
            return;
        }
        if !socket.ended && !socket.starved && (socket.wanted || socket.late > 0) {
            self.soon(50, Step::Receive(index, generation));
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
                self.completions.push_back(if broken {
                    Completion::ReceiveFailed(conn)
                } else {
                    Completion::Ended(conn)
                });
            }
            return;
        }
        if !socket.wanted {
            socket.late -= 1;
        }
        let Some(mut buf) = self.buffers.take() else {
            self.buffer_waits += 1;
            socket.starved = true;
            let step = Step::Receive(conn.index() as u32, conn.generation());
            return self.schedule(Duration::from_millis(1), step);
        };
        let sink = self.sink(conn);
        let Some(socket) = self.sockets.get_mut(conn) else { return self.buffers.give(buf) };
        let peer = &self.peers[socket.peer];
        let piece = peer.lines.as_ref().map_or(0, |lines| lines.out.len() / 100);
        let piece = peer.plan.piece.max(piece).min(BUFFER_SIZE);
        let mut len = self.rng.usize(1..=waiting.min(piece));
        let (id, at) = (peer.id, socket.taken);
        if let Some(lines) = &peer.lines {
            len = lines.piece(at, len);
        }
        socket.taken += len;
        let bytes = match &peer.lines {
            Some(lines) => lines.out[at..at + len].to_vec(),
            None => self.stream(id, at, len),
        };
        self.buffers.space(&mut buf)[..len].copy_from_slice(&bytes);
        self.buffers.set_len(&mut buf, len);
        match sink {
            Some(to) => {
                self.completions.push_back(Completion::Spliced(conn, len as u32));
                self.send(to, buf);
            }
            None => self.completions.push_back(Completion::Received(conn, buf)),
        }
        self.poke(conn);
    }

    /// Where bytes go without the user's help, now and then.
    fn sink(&mut self, conn: ConnId) -> Option<ConnId> {
        let source = self.sockets.get(conn).filter(|source| source.wanted)?;
        let to = source.joined?;
        let free = self.sockets.get(to).is_some_and(|to| to.queue.is_empty());
        let first = !self.completions.iter().any(|earlier| earlier.conn() == Some(conn));
        (free && first && self.rng.bool()).then_some(to)
    }

    fn send_step(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        socket.stepping = false;
        let peer = &mut self.peers[socket.peer];
        if peer.reset && !socket.queue.is_empty() {
            socket.error_taken = true;
            self.buffers.clear(&mut socket.queue);
            socket.shutdown = false;
            return self.completions.push_back(Completion::SendFailed(conn));
        }
        let room = SOCKET_BYTES.saturating_sub(peer.received.len() - peer.read);
        let most = room.min(socket.queue.bytes() as usize);
        if most > 0 {
            let len = self.rng.usize(1..=most);
            let before = peer.received.len();
            for part in self.buffers.slices(&socket.queue) {
                let rest = len - (peer.received.len() - before);
                peer.received.extend_from_slice(&part[..part.len().min(rest)]);
            }
            if let Some(lines) = &mut peer.lines {
                lines.hear(&peer.received[before..]);
            }
            self.buffers.advance(&mut socket.queue, len as u32);
            self.completions.push_back(Completion::Sent(conn, len as u32));
        }
        if socket.queue.is_empty() && socket.shutdown {
            socket.shutdown = false;
            peer.saw_end = true;
        }
        if most > 0 {
            self.poke(conn);
        }
    }
}

impl Driver for Sim {
    fn now(&self) -> Instant {
        self.start + self.elapsed
    }

    fn wait(&mut self, wait: Wait) -> io::Result<bool> {
        let until = self.elapsed + wait.most;
        loop {
            if std::mem::take(&mut self.woken) {
                self.completions.push_back(Completion::Woken);
            }
            self.accept_waiting();
            if self.completions.len() >= wait.events as usize {
                return Ok(wait.events == 1);
            }
            match self.steps.peek() {
                Some(&Reverse((at, _, step))) if at <= until => {
                    self.steps.pop();
                    self.elapsed = self.elapsed.max(at);
                    self.run_step(step);
                }
                _ => {
                    self.elapsed = until;
                    return Ok(true);
                }
            }
        }
    }

    fn next(&mut self) -> Option<Completion> {
        loop {
            let completion = self.completions.pop_front()?;
            if completion.conn().is_none_or(|conn| self.sockets.get(conn).is_some()) {
                return Some(completion);
            }
            if let Completion::Received(_, buf) = completion {
                self.buffers.give(buf);
            }
        }
    }

    fn accept(&mut self, room: usize) {
        self.room = room;
    }

    fn refuse_handshakes(&mut self) {
        self.listening = false;
    }

    fn stop_listening(&mut self) {
        self.room = 0;
        self.listening = false;
        while !self.backlog.is_empty() {
            self.accept_one();
        }
    }

    fn release(&mut self, _: ConnId) -> Option<OwnedFd> {
        None // There is one worker.
    }

    fn adopt(&mut self, _: OwnedFd) -> Option<ConnId> {
        None
    }

    fn connect(&mut self, address: &SocketAddr) -> io::Result<ConnId> {
        let peer = if self.speaks_lines {
            self.add_answerer(address.port())
        } else {
            let plan = self.plan(false);
            self.add_peer(false, plan)
        };
        let Some(conn) = self.add_socket(peer, true) else {
            return Err(io::ErrorKind::QuotaExceeded.into());
        };
        let reachability = self.endpoints[usize::from(address.port())];
        if reachability != Reachability::Silent {
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
        self.poke(conn);
    }

    fn send(&mut self, conn: ConnId, buf: Buf) {
        let Some(socket) = self.sockets.get_mut(conn) else { return self.buffers.give(buf) };
        assert!(!socket.shutdown, "bytes are sent behind the end");
        self.buffers.push(&mut socket.queue, buf);
        self.queue_peak = self.queue_peak.max(socket.queue.bytes());
        self.poke(conn);
    }

    fn shutdown(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn) {
            socket.shutdown = true;
        }
        self.poke(conn);
    }

    fn close(&mut self, conn: ConnId, how: Close) {
        let Some(mut socket) = self.sockets.remove(conn) else { return };
        self.buffers.clear(&mut socket.queue);
        if socket.connecting {
            return;
        }
        let peer = &mut self.peers[socket.peer];
        // As kernels do: unread bytes turn a close into a reset.
        if how == Close::Reset || socket.taken < peer.sent {
            peer.saw_reset = true;
        } else {
            peer.saw_end = true;
        }
    }

    fn unheard(&mut self, conn: ConnId) -> Unheard {
        let Some(socket) = self.sockets.get(conn) else { return Unheard::End };
        let peer = &self.peers[socket.peer];
        if peer.reset || peer.ended {
            Unheard::End
        } else if peer.sent > socket.taken {
            Unheard::Bytes
        } else {
            Unheard::Nothing
        }
    }

    fn undelivered(&self, conn: ConnId) -> u64 {
        self.sockets.get(conn).map_or(0, |socket| u64::from(socket.queue.bytes()))
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
