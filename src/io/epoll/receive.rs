//! Receiving, and moving bulk on by pipe.
//!
//! Readable sockets take turns, a few buffers each, so that none starves the others and a message of
//! several buffers is sent in one call.

use std::mem;

use rustix::io::Errno;

use super::Epoll;
use super::socket::{HangUp, Socket, Turn};
use crate::fifo;
use crate::io::buffers::Buf;
use crate::io::halves::{Receiving, Sending};
use crate::io::splice;
use crate::io::{Completion, ConnId};
use crate::limits;

/// Buffers that a socket may fill in a row.
const READS_IN_A_ROW: u32 = 4;

impl Epoll {
    /// Puts a socket in the queue of those to read from, if it is due.
    pub(super) fn enqueue(&mut self, conn: ConnId) {
        let socket = self.live(conn);
        if socket.receiving == Receiving::Wanted(Turn::Readable) {
            socket.turn().queue();
            self.ready.push_back(conn);
        }
    }

    /// What a socket brings waits until the joined one has sent everything.
    fn hold(&mut self, conn: ConnId) {
        self.live(conn).turn().hold();
        self.tell_break(conn);
    }

    /// The socket joined with this one, if that is still open, has sent everything.
    pub(super) fn resume(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn)
            && socket.receiving.progress() == Some(Turn::Held)
        {
            socket.turn().resume();
            self.enqueue(conn);
        }
    }

    /// Reads one buffer from the first socket in the queue, or moves its bulk on.
    pub(super) fn read_one(&mut self) -> Option<Completion> {
        while let Some(conn) = fifo::pop(&mut self.ready) {
            let filled = mem::take(&mut self.filled);
            // Its user may have closed it or stopped receiving since.
            let Some(socket) = self.sockets.get_mut(conn) else { continue };
            socket.turn().take();
            if !matches!(socket.receiving, Receiving::Wanted(_)) {
                continue;
            }
            if socket.bulk.is_on()
                && let Some((to, sink)) = self.splice_target(conn)
            {
                if !sink.is_flushed() {
                    self.hold(conn);
                } else if let Some(completion) = self.splice(conn, to) {
                    return Some(completion);
                }
                continue;
            }
            let Some(buf) = self.buffers.take() else {
                self.live(conn).turn().queue();
                self.starving.push_back(conn);
                self.buffer_waits += 1;
                return None;
            };
            if let Some(completion) = self.receive_into(buf, conn, filled) {
                return Some(completion);
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

    /// Reads from a socket whose turn it is, and which has filled so many buffers before this one.
    fn receive_into(&mut self, mut buf: Buf, conn: ConnId, filled: u32) -> Option<Completion> {
        let socket = self.sockets.get_mut(conn).expect("an open connection");
        let received = socket.stream.receive(self.buffers.space(&mut buf));
        if let Ok((count @ 1.., stopped)) = received {
            // A short read empties the socket, unless its end is waiting behind, or it stopped at an
            // urgent mark or at descriptors. (Had a mark or an end come since the latest event,
            // another would follow for it.)
            let is_full = count == limits::BUFFER_SIZE;
            let is_all = !is_full && !stopped;
            if is_all && socket.hang_up == HangUp::None && !socket.urgent {
                socket.turn().run_dry();
            }
            socket.bulk.on_received(count as u32, self.window);
            self.buffers.set_len(&mut buf, count);
            if is_full && filled + 1 < READS_IN_A_ROW {
                socket.turn().queue();
                self.filled = filled + 1;
                self.ready.push_front(conn);
            } else {
                self.enqueue(conn);
            }
            return Some(Completion::Received(conn, buf));
        }
        self.buffers.give(buf);
        match received {
            Err(Errno::AGAIN) => {
                socket.turn().run_dry();
                socket.urgent = false;
                None
            }
            Err(Errno::INTR) => {
                self.enqueue(conn);
                None
            }
            Ok(_) if !socket.error_taken => {
                socket.receiving.end();
                Some(Completion::Ended(conn))
            }
            Ok(_) | Err(_) => {
                socket.receiving.end();
                Some(Completion::ReceiveFailed(conn))
            }
        }
    }

    /// Where to move by pipe the bulk that a readable socket brings, if that can be.
    fn splice_target(&self, conn: ConnId) -> Option<(ConnId, &Socket)> {
        let to = self.sockets.get(conn)?.joined.filter(|_| self.pipes.any(self.now))?;
        let takes = |sink: &&Socket| matches!(sink.sending, Sending::Open(_));
        Some((to, self.sockets.get(to).filter(takes)?))
    }

    /// Moves what a socket has to the one joined with it.
    ///
    /// What is not moved is left to an ordinary receive, which alone can tell what it is: a move
    /// stops at an urgent mark, and there it says that nothing is left, or takes an end or an error
    /// for the next thing.
    fn splice(&mut self, conn: ConnId, to: ConnId) -> Option<Completion> {
        let window = self.window;
        let Some(mut pipe) = self.pipes.take(self.now) else {
            self.live(conn).bulk.rest(window);
            self.enqueue(conn);
            return None;
        };
        let socket = self.live(conn);
        let filled = pipe.fill(&socket.stream);
        if let Ok(count @ 1..) = filled {
            socket.bulk.on_spliced(count, window);
            self.live(to).pipe = Some(pipe);
            self.flush(to);
            if self.live(to).is_flushed() {
                self.live(conn).turn().queue();
                self.bulky.push(conn);
            } else {
                self.hold(conn);
            }
            return Some(Completion::Spliced(conn, count));
        }
        match filled {
            // Had a mark come since the latest event, another would follow for it.
            Err(Errno::AGAIN) if !socket.urgent => {
                socket.turn().run_dry();
                self.pipes.give(pipe);
                return None;
            }
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => self.pipes.give(pipe),
            Err(errno) if splice::is_refused(errno) => {
                self.pipes.give(pipe);
                self.pipes.on_refused(self.now);
            }
            Err(_) => {
                socket.error_taken = true;
                self.pipes.give(pipe);
            }
        }
        self.live(conn).bulk.rest(window);
        self.enqueue(conn);
        None
    }
}
