//! The simulator: a seeded network in memory with virtual time.
//!
//! It drives the real engine through what real networks and kernels do and tests can hardly
//! provoke: partial reads and writes, receives that stop late, refused, hanging and broken
//! connections, slow and stalled readers, clients and backends that end or reset at any moment, too
//! few buffers, what a reset destroys on its way, and events that are reported late, in part, in
//! another order or as one. Two runs from one seed are identical.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::buffers::Buffers;
use super::halves::Sending;
use super::{Completion, Conn, ConnId};
use crate::limits::BUFFERS_PROVIDED_MIN;
use crate::slab::Slab;

mod checks;
mod driver;
mod hearing;
pub mod http;
pub mod lines;
mod peers;
mod sockets;

use self::hearing::Hearing;
pub use self::peers::{ID_BYTES, Peer, Plan};
use self::sockets::Socket;

/// Buffers filled of which that was not reported yet: as many as a driver provides to its kernel, at least.
pub const UNTOLD_BUFFERS_MAX: usize = BUFFERS_PROVIDED_MIN;
/// What a peer's socket buffers, in each direction.
const SOCKET_BYTES: usize = 48 * 1024;
/// What the proxy's kernel takes for one connection and has not delivered.
const SEND_BYTES: usize = 32 * 1024;
/// What was sent is to be reported within this time.
const UNDONE_MAX: Duration = Duration::from_millis(2);
/// For so long everybody who is not asked has been idle.
const IDLE: Duration = Duration::from_secs(60);
/// For so long a process may be stopped, as one is whose CPU quota is used up.
const STOP: Duration = Duration::from_millis(100);

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
    sockets: Slab<Socket, Conn>,
    buffers: Buffers,
    hearing: Hearing,
    /// Sends are reported up to so many microseconds after the kernel has taken them.
    sent_late_us: u64,
    noise: Arc<[u8]>,
    backlog: std::collections::VecDeque<usize>,
    listening: bool,
    room: usize,
    /// Clients are left waiting.
    held: bool,
    woken: bool,
    buffer_waits: u64,
    /// Everybody who took part.
    pub peers: Vec<Peer>,
    /// How each endpoint answers now, by port.
    pub endpoints: Vec<Reachability>,
    /// Whether backends greet.
    pub greetings: bool,
    /// How many listeners there are.
    pub listeners: usize,
    /// What peers speak.
    pub speech: Speech,
    /// The user sleeps for no longer than until then: others may have something for it by then.
    pub sleeps_until: Option<Duration>,
    /// The endpoints of connections that are closed once the driver waits.
    closing: Vec<u16>,
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
            held: false,
            woken: false,
            buffer_waits: 0,
            peers: Vec::new(),
            endpoints: vec![Reachability::Up; endpoints],
            greetings: rng.bool(),
            listeners: 1,
            speech: Speech::Bytes,
            sleeps_until: None,
            closing: Vec::new(),
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

    /// The listener that a client comes to, by its place among all peers.
    pub fn listener_of(&self, peer: usize) -> usize {
        peer % self.listeners
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

    /// Connections to an endpoint, with those that are being made, and those that are not closed yet.
    pub fn conns_to(&self, endpoint: u16) -> usize {
        let sockets = (0..self.sockets.slots()).filter_map(|at| self.sockets.key_at(at));
        let sockets = sockets.filter_map(|conn| self.sockets.get(conn));
        let open = sockets.filter(|socket| self.peers[socket.peer].endpoint == Some(endpoint));
        open.count() + self.closing.iter().filter(|&&closing| closing == endpoint).count()
    }

    /// Clients that wait to be accepted or are still to come.
    pub fn clients_outside(&self) -> usize {
        let coming = self.steps.iter().filter(|s| matches!(s.0.2, Step::ClientArrives(_))).count();
        coming + self.backlog.len()
    }

    fn schedule(&mut self, delay: Duration, step: Step) {
        self.sequence += 1;
        self.steps.push(Reverse((self.elapsed + delay, self.sequence, step)));
    }

    fn soon(&mut self, most_us: u64, step: Step) {
        let delay = Duration::from_micros(self.rng.u64(..=most_us));
        self.schedule(delay, step);
    }

    fn accept_waiting(&mut self) {
        while self.room > 0 && !self.held && !self.backlog.is_empty() {
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
            self.hearing.push(Completion::Accepted(conn, self.listener_of(peer)));
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
                if self.sockets.get(conn).is_some_and(|socket| socket.sending != Sending::Broken) {
                    self.hearing.push(Completion::Sent(conn, bytes));
                }
            }
            Step::Break(index, generation) => {
                self.break_step(ConnId::from_parts(index, generation));
            }
            Step::Deliver(peer) => self.deliver(peer),
        }
    }

    /// The process is stopped for a while: much happens, and nothing is reported.
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
}
