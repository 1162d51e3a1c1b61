//! The simulator as a driver.

use std::cmp::Reverse;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{IDLE, Reachability, Sim, Speech, Step};
use crate::io::buffers::{Buf, Buffers};
use crate::io::halves::Sending;
use crate::io::net::{self, Address, Stream};
use crate::io::{Acks, Close, Completion, ConnId, Driver, Unheard, Wait};

impl Driver for Sim {
    fn now(&self) -> Instant {
        self.start + self.elapsed
    }

    fn wait(&mut self, wait: Wait) -> io::Result<bool> {
        let started = self.elapsed;
        self.closing.clear();
        let sleeps_for = self.sleeps_until.map(|until| until.saturating_sub(started));
        let most = sleeps_for.map_or(wait.most, |most| most.min(wait.most));
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
            let until = started + if heard > 0 { wait.batch.min(most) } else { most };
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

    fn hold(&mut self, _: usize, held: bool) {
        self.held = held;
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

    fn release(&mut self, _: ConnId) -> Option<Stream> {
        None // There is one worker.
    }

    fn adopt(&mut self, _: Stream) -> Option<ConnId> {
        None
    }

    fn connect(&mut self, address: &Address, _: &net::Options) -> io::Result<ConnId> {
        let address = address.tcp().expect("its network has TCP only");
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
        if on {
            socket.receiving.want();
        } else {
            if socket.is_wanted() {
                socket.late = late;
            }
            socket.receiving.stop();
        }
        self.poke(conn);
    }

    fn send(&mut self, conn: ConnId, buf: Buf) {
        let Some(socket) = self.sockets.get(conn) else { return self.buffers.give(buf) };
        self.check_silence(conn, socket);
        let Some(socket) = self.sockets.get_mut(conn).filter(|s| s.sending != Sending::Broken)
        else {
            return self.buffers.give(buf);
        };
        assert!(socket.sending.takes_bytes(), "bytes are sent in {:?}", socket.sending);
        self.buffers.push(&mut socket.queue, buf);
        self.queue_peak = self.queue_peak.max(socket.queue.bytes());
        self.poke(conn);
    }

    fn shutdown(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn) {
            socket.sending.shut_down();
        }
        self.poke(conn);
    }

    fn close(&mut self, conn: ConnId, how: Close) {
        let Some(mut socket) = self.sockets.remove(conn) else { return };
        self.buffers.clear(&mut socket.queue);
        self.closing.extend(self.peers[socket.peer].endpoint);
        if socket.sending != Sending::Connecting {
            self.close_wire(socket.peer, socket.taken, how);
        }
    }

    fn has_descriptor(&self, conn: ConnId) -> bool {
        self.sockets.get(conn).is_some()
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

    fn ask(&mut self, conn: ConnId, _: &net::Options, silence: Option<Duration>) {
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
