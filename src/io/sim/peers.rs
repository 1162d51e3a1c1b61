//! The far ends of connections: what they plan, what they do, and the wires to them.

use std::collections::VecDeque;
use std::time::Duration;

use super::http::Http;
use super::lines::Lines;
use super::{SOCKET_BYTES, Sim, Step};
use crate::io::{Close, ConnId};
use crate::limits::BUFFER_SIZE;

/// Bytes of each peer's stream start with its number, so that who talked to whom is known.
pub const ID_BYTES: usize = 8;

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
    reason = "independent facts, each reported by the kernel or the user"
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
    /// It was notified of the other's end.
    pub saw_end: bool,
    /// It was notified of a reset.
    pub saw_reset: bool,
    /// It has ended its direction.
    pub ended: bool,
    /// It has reset the connection.
    pub reset: bool,
    /// What it says, where peers speak lines.
    pub lines: Option<Box<Lines>>,
    /// What it says, where peers speak HTTP.
    pub http: Option<Box<Http>>,
    /// What the proxy's kernel has taken for it and not delivered. A reset loses it.
    pub(super) wire: VecDeque<u8>,
    /// Behind that comes the end of the stream.
    pub(super) wire_ends: bool,
    pub(super) delivering: bool,
    pub(super) read: usize,
    pause_us: u64,
    /// The endpoint that it is of, if it is a backend.
    pub endpoint: Option<u16>,
    /// Its host has been gone without a word since then.
    pub(super) swallowed: Option<Duration>,
    /// Since when it has not acknowledged what it was sent, and never will.
    pub(super) unacked_since: Option<Duration>,
    pub(super) conn: Option<ConnId>,
}

impl Peer {
    /// Whether it says what it says in messages.
    fn speaks(&self) -> bool {
        self.lines.is_some() || self.http.is_some()
    }

    /// Whether its host is gone without a word.
    pub fn is_swallowed(&self) -> bool {
        self.swallowed.is_some()
    }

    fn is_over(&self) -> bool {
        self.reset || self.saw_reset || (self.ended && self.saw_end)
    }

    /// The proxy has reset the connection.
    fn see_reset(&mut self) {
        self.saw_reset = true;
        self.wire.clear();
    }
}

impl Sim {
    /// The bytes of a peer's stream from `at`, up to `len`.
    pub fn stream(&self, id: u64, at: usize, len: usize) -> Vec<u8> {
        let header = id.to_be_bytes();
        let body = |i: usize| self.noise[(id as usize * 7919 + i) % self.noise.len()];
        (at..at + len).map(|i| header.get(i).copied().unwrap_or_else(|| body(i))).collect()
    }

    pub(super) fn plan(&mut self, is_client: bool) -> Plan {
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

    pub(super) fn add_peer(&mut self, is_client: bool, plan: Plan) -> usize {
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
            http: None,
            wire: VecDeque::new(),
            wire_ends: false,
            delivering: false,
            read: 0,
            endpoint: None,
            swallowed: None,
            unacked_since: None,
            conn: None,
        });
        self.peers.len() - 1
    }

    /// A peer sends, reads, ends or resets, as it planned.
    pub(super) fn peer_acts(&mut self, index: usize) {
        let chunk = self.rng.usize(1..8000);
        if self.peers[index].is_swallowed() {
            return;
        }
        if self.peers[index].is_over() {
            if self.peers[index].saw_reset {
                // What had arrived before a reset can still be read.
                self.answer_http(index);
            }
            return;
        }
        self.answer(index);
        self.answer_http(index);
        let peer = &mut self.peers[index];
        let socket = peer.conn.and_then(|conn| self.sockets.get(conn));
        let (taken, is_served) = socket.map_or((0, false), |socket| (socket.taken, true));
        let asked = peer.is_client || !peer.received.is_empty() || peer.saw_end;
        let goal = match (&peer.lines, &peer.http) {
            (Some(lines), _) => lines.goal(peer).min(peer.plan.sends),
            (_, Some(http)) => http.goal(peer.is_client).min(peer.plan.sends),
            _ if asked => peer.plan.sends,
            _ => peer.plan.greeting,
        };
        let chunk = peer.lines.as_ref().map_or(chunk, |lines| lines.chunk(chunk));
        let chunk = peer.http.as_ref().map_or(chunk, |http| http.chunk(chunk));
        let room = SOCKET_BYTES.saturating_sub(peer.sent - taken);
        let before_reset = peer.plan.resets_at.unwrap_or(usize::MAX).saturating_sub(peer.sent);
        let before = (peer.sent, peer.read);
        peer.sent += chunk.min(room).min(goal.saturating_sub(peer.sent)).min(before_reset);
        if peer.plan.stalls_at.is_none_or(|at| peer.read < at) {
            peer.read = peer.received.len();
        }
        if asked && peer.plan.resets_at.is_some_and(|at| peer.sent >= at) {
            peer.reset = true;
            peer.wire.clear();
        } else if asked && peer.sent == peer.plan.sends {
            // Two that wait for one another would wait for ever: the client gives in.
            let gives_in = peer.is_client && self.rng.u8(..20) == 0;
            peer.ended |= peer.plan.ends_first || peer.saw_end || gives_in;
        }
        peer.ended |= peer.speaks() && !peer.is_client && peer.saw_end;
        // What it knows to be over, it leaves sooner or later.
        peer.ended |= peer.http.is_some() && peer.saw_end && self.rng.u8(..3) == 0;
        if peer.conn.is_some() && !is_served && peer.sent > before.0 {
            // As kernels answer what comes for a socket that was closed.
            peer.see_reset();
        }
        // With nothing to do it looks around ever more rarely.
        let busy = before != (peer.sent, peer.read);
        peer.pause_us = if busy { peer.plan.pause_us } else { (2 * peer.pause_us).min(500_000) };
        let (pause, over) = (peer.pause_us, peer.is_over());
        if let Some(conn) = peer.conn {
            self.poke(conn);
        }
        self.carry_on(index);
        if !over {
            self.soon(pause, Step::PeerActs(index));
        }
    }

    /// What the proxy's kernel has taken for a peer is to reach it.
    pub(super) fn carry_on(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        let has_room = peer.received.len() - peer.read < SOCKET_BYTES;
        let end_is_due = peer.wire_ends && !peer.saw_end && peer.wire.is_empty();
        let is_there = !peer.reset && !peer.is_swallowed();
        if !peer.delivering && is_there && (end_is_due || (has_room && !peer.wire.is_empty())) {
            peer.delivering = true;
            self.soon(50, Step::Deliver(index));
        }
    }

    /// Some of what is on the wire reaches a peer.
    pub(super) fn deliver(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        peer.delivering = false;
        if peer.reset || peer.saw_reset || peer.is_swallowed() {
            return;
        }
        let room = SOCKET_BYTES.saturating_sub(peer.received.len() - peer.read);
        let max = room.min(peer.wire.len());
        if max > 0 {
            let len = self.rng.usize(1..=max);
            let before = peer.received.len();
            peer.received.extend(peer.wire.drain(..len));
            if let Some(lines) = &mut peer.lines {
                lines.hear(&peer.received[before..]);
            }
            if let Some(http) = peer.http.as_mut().filter(|_| peer.is_client) {
                http.hear(&peer.received);
            }
        }
        peer.saw_end |= peer.wire_ends && peer.wire.is_empty();
        if let Some(conn) = peer.conn {
            self.poke(conn);
        }
        self.carry_on(index);
    }

    /// The proxy closes its end of the connection to a peer, of which it has taken so many bytes.
    pub(super) fn close_wire(&mut self, index: usize, taken: usize, how: Close) {
        let peer = &mut self.peers[index];
        // As kernels do: unread bytes turn a close into a reset.
        if how == Close::Reset || taken < peer.sent {
            peer.see_reset();
        } else {
            peer.wire_ends = true;
            self.carry_on(index);
        }
    }
}
