//! The near ends of connections: what the simulated kernel does with them.

use std::io;
use std::time::Duration;

use super::{SEND_BYTES, Sim, Step, UNTOLD_BUFFERS_MAX};
use crate::io::buffers::Chain;
use crate::io::halves::{Receiving, Sending};
use crate::io::{Completion, ConnId, Driver};
use crate::limits::BUFFER_SIZE;

/// How the kernel is getting on with what a socket brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    /// It receives as things come.
    Steady,
    /// A receive waits for a buffer.
    Starved,
}

/// How the kernel is getting on with what is to be sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Flush {
    /// No step is scheduled.
    #[default]
    Idle,
    /// A [`Step::Send`] is.
    Scheduled,
}

#[derive(Debug)]
pub(super) struct Socket {
    pub(super) peer: usize,
    pub(super) receiving: Receiving<Flow>,
    pub(super) sending: Sending<Flush>,
    /// Deliveries that may still come after receiving was stopped.
    pub(super) late: u8,
    /// The peer's bytes taken from its socket so far.
    pub(super) taken: usize,
    /// The user was notified of the peer's end.
    pub(super) told_end: bool,
    /// An error that a send met first: receiving then shows an ordinary end.
    pub(super) error_taken: bool,
    /// What it receives may be sent there by itself.
    pub(super) joined: Option<ConnId>,
    pub(super) queue: Chain,
    /// Bytes taken by the kernel of which that was not reported yet.
    pub(super) untold: u32,
    /// When the kernel took the latest.
    pub(super) taken_at: Duration,
    /// The kernel asks the peer whether it is there.
    pub(super) asked: bool,
}

impl Socket {
    fn new(peer: usize, sending: Sending<Flush>) -> Self {
        Self {
            peer,
            receiving: Receiving::Unused(Flow::Steady),
            sending,
            late: 0,
            taken: 0,
            told_end: false,
            error_taken: false,
            joined: None,
            queue: Chain::default(),
            untold: 0,
            taken_at: Duration::ZERO,
            asked: false,
        }
    }

    pub(super) fn is_wanted(&self) -> bool {
        matches!(self.receiving, Receiving::Wanted(_))
    }

    /// The user has ended the direction to the peer, or is about to.
    pub(super) fn has_shut_down(&self) -> bool {
        matches!(self.sending, Sending::Ending(_) | Sending::Ended)
    }

    /// Whether the next delivery reaches the user.
    fn receives(&self) -> bool {
        match self.receiving {
            Receiving::Wanted(_) => true,
            Receiving::Stopped(_) => self.late > 0,
            Receiving::Unused(_) | Receiving::Ended => false,
        }
    }

    /// Whether a reset shows though nothing is received.
    fn breaks_by_itself(&self) -> bool {
        matches!(self.receiving, Receiving::Stopped(_)) && self.sending != Sending::Broken
    }

    fn set_flow(&mut self, to: Flow) {
        if let Some(flow) = self.receiving.progress_mut() {
            *flow = to;
        }
    }

    fn set_flush(&mut self, to: Flush) {
        if let Some(flush) = self.sending.progress_mut() {
            *flush = to;
        }
    }
}

impl Sim {
    pub(super) fn add_socket(&mut self, peer: usize, connecting: bool) -> Option<ConnId> {
        let sending = if connecting { Sending::Connecting } else { Sending::Open(Flush::Idle) };
        let socket = Socket::new(peer, sending);
        let conn = self.sockets.insert(socket).ok()?;
        self.peers[peer].conn = Some(conn);
        Some(conn)
    }

    pub(super) fn connect_ends(&mut self, conn: ConnId, accepted: bool) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if accepted {
            socket.sending.connect();
            let peer = socket.peer;
            self.hearing.push(Completion::Connected(conn));
            self.soon(100, Step::PeerActs(peer));
        } else {
            let error = io::ErrorKind::ConnectionRefused.into();
            self.hearing.push(Completion::ConnectFailed(conn, error));
        }
    }

    /// Something changed: the socket may have something to receive, room to send, or be broken.
    pub(super) fn poke(&mut self, conn: ConnId) {
        let (index, generation) = (conn.index() as u32, conn.generation());
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if socket.sending == Sending::Connecting {
            return;
        }
        if socket.receives() && socket.receiving.progress() == Some(Flow::Steady) {
            self.soon(50, Step::Receive(index, generation));
        } else if socket.breaks_by_itself() && self.peers[socket.peer].reset {
            self.soon(50, Step::Break(index, generation));
        }
        if let Some(socket) = self.sockets.get_mut(conn)
            && socket.sending.progress() == Some(Flush::Idle)
            && (!socket.queue.is_empty() || matches!(socket.sending, Sending::Ending(_)))
        {
            socket.set_flush(Flush::Scheduled);
            self.soon(50, Step::Send(index, generation));
        }
    }

    #[expect(clippy::disallowed_methods, reason = "the driver itself moves bulk")]
    pub(super) fn receive_step(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        socket.set_flow(Flow::Steady);
        if !socket.receives() {
            return;
        }
        let peer = &self.peers[socket.peer];
        let waiting = peer.sent - socket.taken;
        if waiting == 0 {
            if peer.reset || peer.ended {
                socket.receiving.end();
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
            socket.set_flow(Flow::Starved);
            let step = Step::Receive(conn.index() as u32, conn.generation());
            return self.schedule(Duration::from_millis(1), step);
        };
        if let Receiving::Stopped(_) = socket.receiving {
            socket.late -= 1;
        }
        let sink = self.sink(conn);
        let Some(socket) = self.sockets.get_mut(conn) else { return self.buffers.give(buf) };
        let peer = &self.peers[socket.peer];
        let queued = peer.lines.as_ref().map_or(0, |lines| lines.out.len());
        let piece = (queued + peer.http.as_ref().map_or(0, |http| http.out.len())) / 100;
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
        let source = self.sockets.get(conn).filter(|source| source.is_wanted())?;
        let to = source.joined?;
        let free = self
            .sockets
            .get(to)
            .is_some_and(|to| to.queue.is_empty() && to.sending != Sending::Broken);
        (free && !self.hearing.has(conn) && self.rng.bool()).then_some(to)
    }

    pub(super) fn send_step(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        socket.set_flush(Flush::Idle);
        let index = socket.peer;
        let peer = &mut self.peers[index];
        if peer.reset && !socket.queue.is_empty() {
            socket.error_taken = true;
            return self.break_step(conn);
        }
        let max = (SEND_BYTES - peer.wire.len()).min(socket.queue.bytes() as usize);
        // What is small finds room where little else is on its way, and that is known at once.
        let is_small = peer.wire.len() + socket.queue.bytes() as usize <= BUFFER_SIZE;
        if max > 0 {
            let len = if is_small { max } else { self.rng.usize(1..=max) };
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
        if socket.queue.is_empty() && matches!(socket.sending, Sending::Ending(_)) {
            socket.sending.end();
            self.peers[index].wire_ends = true;
        }
        self.carry_on(index);
        if max > 0 {
            self.poke(conn);
        }
    }

    pub(super) fn break_step(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        let has_ended = socket.receiving == Receiving::Ended;
        if socket.sending == Sending::Broken
            || (has_ended && !socket.error_taken && socket.queue.is_empty())
        {
            return;
        }
        socket.sending.break_off();
        self.buffers.clear(&mut socket.queue);
        self.hearing.push(Completion::SendFailed(conn));
    }
}
