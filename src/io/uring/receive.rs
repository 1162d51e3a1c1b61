//! Receiving.

use std::os::fd::AsRawFd;
use std::ptr;

use io_uring::squeue::Flags;
use io_uring::types::Fd;
use io_uring::{cqueue, opcode};
use rustix::io::Errno;

use super::Uring;
use super::socket::{Attention, Kind, Receive, Socket};
use crate::io::halves::Receiving;
use crate::io::provided::ProvidedBuffers;
use crate::io::ring::result;
use crate::io::{Completion, ConnId};
use crate::limits;

impl Uring {
    pub(super) fn settle_socket(&mut self, conn: ConnId) {
        // Its slot may have been reclaimed since.
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if socket.is_closing() {
            return;
        }
        socket.attention = Attention::None;
        if socket.receiving == Receiving::Wanted(Receive::Idle) {
            self.arm_receive(conn);
        }
        self.watch_paused(conn);
        self.flush(conn);
    }

    fn arm_receive(&mut self, conn: ConnId) {
        let short = self.is_short_of_buffers();
        let can_splice = self.splice_target(conn).map(|(_, sink)| sink.is_flushed());
        let joined = self.live(conn).joined;
        let queues = joined.and_then(|sink| self.sockets.get(sink)).is_some_and(Socket::is_blocked);
        let socket = self.live(conn);
        if can_splice == Some(false) {
            return socket.receive().hold();
        }
        socket.ops.add(Kind::Receive);
        let fd = Fd(socket.stream.as_raw_fd());
        let (operation, entry) = if can_splice == Some(true) {
            // Each time that it fires it is followed by a move or by a receive, so it does not
            // fire again for what it has reported.
            let poll = opcode::PollAdd::new(fd, (libc::POLLIN | libc::POLLRDHUP) as u32);
            (Receive::Polled, poll.build())
        } else if short || queues || socket.single {
            let receive = opcode::Recv::new(fd, ptr::null_mut(), limits::BUFFER_SIZE as u32);
            let receive = receive.buf_group(ProvidedBuffers::GROUP).build();
            (Receive::Single, receive.flags(Flags::BUFFER_SELECT))
        } else {
            let receive = opcode::RecvMulti::new(fd, ProvidedBuffers::GROUP);
            (Receive::Multishot, receive.build())
        };
        socket.receive().arm(operation);
        self.push(entry, Kind::Receive, conn);
    }

    /// The socket joined with this one, if that is still open, has sent everything.
    pub(super) fn resume(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn)
            && socket.receiving.progress() == Some(Receive::Held)
        {
            socket.receive().resume();
            self.mark_pending(conn);
        }
    }

    pub(super) fn on_receive(&mut self, conn: ConnId, entry: &cqueue::Entry) -> Option<Completion> {
        let buf = cqueue::buffer_select(entry.flags())
            .and_then(|id| self.provided.take(id, entry.result().max(0) as u32));
        let more = cqueue::more(entry.flags());
        let holds = |socket: &&mut Socket| socket.ops.has(Kind::Receive);
        let Some(socket) = self.sockets.get_mut(conn).filter(holds) else {
            if let Some(buf) = buf {
                self.buffers.give(buf);
            }
            return self.on_stray(conn);
        };
        let polled = socket.receiving.progress() == Some(Receive::Polled);
        if !more {
            socket.ops.remove(Kind::Receive);
            socket.receive().complete();
        }
        if socket.is_closing() {
            if let Some(buf) = buf {
                self.buffers.give(buf);
            }
            self.finish_close(conn);
            return None;
        }
        if polled {
            if matches!(socket.receiving, Receiving::Wanted(_)) && result(entry).is_ok() {
                return self.splice(conn);
            }
            self.mark_pending(conn);
            return None;
        }
        match buf {
            Some(buf) if !buf.is_empty() => {
                self.on_bytes(conn, buf.len(), more);
                return Some(Completion::Received(conn, buf));
            }
            Some(buf) => self.buffers.give(buf),
            None => {}
        }
        // One that goes on has brought something.
        if more { self.on_stray(conn) } else { self.on_no_bytes(conn, result(entry)) }
    }

    fn on_bytes(&mut self, conn: ConnId, bytes: u32, more: bool) {
        let window = self.window;
        let socket = self.live(conn);
        socket.single &= bytes as usize == limits::BUFFER_SIZE;
        socket.bulk.on_received(bytes, window);
        if !more {
            self.mark_pending(conn);
        } else if self.splice_target(conn).is_some() {
            self.stop_receiving(conn);
        }
    }

    /// A receive has come back without bytes.
    fn on_no_bytes(&mut self, conn: ConnId, outcome: Result<u32, Errno>) -> Option<Completion> {
        match outcome {
            // Stopped as asked. It may be wanted again by now.
            Err(Errno::CANCELED | Errno::INTR) => {
                self.mark_pending(conn);
                None
            }
            Err(Errno::NOBUFS) => {
                self.live(conn).receive().starve();
                self.provided.on_none_left();
                self.buffer_waits += u64::from(self.buffers.free() == 0);
                self.starving.push_back(conn);
                None
            }
            Ok(0) if !self.live(conn).error_taken => {
                self.live(conn).receiving.end();
                Some(Completion::Ended(conn))
            }
            Ok(_) | Err(_) => {
                self.live(conn).receiving.end();
                Some(Completion::ReceiveFailed(conn))
            }
        }
    }

    /// Takes a multishot receive back. What it has brought by then still arrives.
    pub(super) fn stop_receiving(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn)
            && socket.receiving.progress() == Some(Receive::Multishot)
        {
            socket.receive().stop();
            self.cancel(Kind::Receive, conn);
        }
    }
}
