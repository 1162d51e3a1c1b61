//! Receiving.

use std::os::fd::AsRawFd;
use std::ptr;

use io_uring::squeue::Flags;
use io_uring::types::Fd;
use io_uring::{cqueue, opcode};
use rustix::io::Errno;

use super::socket::{Kind, Receiving, Socket};
use super::{Uring, result};
use crate::io::provided::ProvidedBuffers;
use crate::io::{Completion, ConnId};
use crate::limits;

impl Uring {
    pub(super) fn settle_socket(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        socket.pending = false;
        if socket.closing {
            return;
        }
        if socket.wanted && socket.receiving == Receiving::Idle {
            self.arm_receive(conn);
        }
        self.watch_paused(conn);
        self.flush(conn);
    }

    fn arm_receive(&mut self, conn: ConnId) {
        let lean = self.is_lean();
        let can_splice = self.splice_target(conn).map(|(_, sink)| sink.is_flushed());
        let joined = self.sockets.get(conn).and_then(|socket| socket.joined);
        let queues = joined.and_then(|sink| self.sockets.get(sink)).is_some_and(Socket::is_blocked);
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        debug_assert_eq!(socket.receiving, Receiving::Idle);
        if can_splice == Some(false) {
            socket.receiving = Receiving::Held;
            return;
        }
        socket.ops.add(Kind::Receive);
        let fd = Fd(socket.fd.as_raw_fd());
        let entry = if can_splice == Some(true) {
            // Each time that it fires it is followed by a move or by a receive, so it does not
            // fire again for what it has told.
            socket.receiving = Receiving::Polled;
            opcode::PollAdd::new(fd, (libc::POLLIN | libc::POLLRDHUP) as u32).build()
        } else if lean || queues || socket.single {
            socket.receiving = Receiving::Single;
            let receive = opcode::Recv::new(fd, ptr::null_mut(), limits::BUFFER_SIZE as u32);
            receive.buf_group(ProvidedBuffers::GROUP).build().flags(Flags::BUFFER_SELECT)
        } else {
            socket.receiving = Receiving::Multishot;
            opcode::RecvMulti::new(fd, ProvidedBuffers::GROUP).build()
        };
        self.push(entry, Kind::Receive, conn);
    }

    /// The socket joined with this one has sent everything.
    pub(super) fn let_go(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn)
            && socket.receiving == Receiving::Held
        {
            socket.receiving = Receiving::Idle;
            self.mark_pending(conn);
        }
    }

    pub(super) fn on_receive(&mut self, conn: ConnId, entry: &cqueue::Entry) -> Option<Completion> {
        let buf = cqueue::buffer_select(entry.flags())
            .and_then(|id| self.provided.take(id, entry.result().max(0) as u32));
        let more = cqueue::more(entry.flags());
        let socket = self.sockets.get_mut(conn)?;
        let polled = socket.receiving == Receiving::Polled;
        if !more {
            socket.ops.remove(Kind::Receive);
            socket.receiving = Receiving::Idle;
        }
        if socket.closing {
            if let Some(buf) = buf {
                self.buffers.give(buf);
            }
            self.finish_close(conn);
            return None;
        }
        if polled {
            if socket.wanted && result(entry).is_ok() {
                return self.splice(conn);
            }
            self.mark_pending(conn);
            return None;
        }
        let (outcome, unused) = match (result(entry), buf) {
            (Ok(1..), Some(buf)) => {
                socket.single &= buf.len() as usize == limits::BUFFER_SIZE;
                socket.bulk.on_received(buf.len(), self.window);
                if !more {
                    self.mark_pending(conn);
                } else if self.splice_target(conn).is_some() {
                    self.stop_receiving(conn);
                }
                return Some(Completion::Received(conn, buf));
            }
            other => other,
        };
        if let Some(buf) = unused {
            self.buffers.give(buf);
        }
        match outcome {
            Ok(_) if socket.error_taken => {
                socket.receiving = Receiving::Ended;
                Some(Completion::ReceiveFailed(conn))
            }
            Ok(_) => {
                socket.receiving = Receiving::Ended;
                Some(Completion::Ended(conn))
            }
            // Stopped as asked. It may be wanted again by now.
            Err(Errno::CANCELED | Errno::INTR) => {
                self.mark_pending(conn);
                None
            }
            Err(Errno::NOBUFS) => {
                socket.receiving = Receiving::Starving;
                self.provided.on_none_left();
                self.buffer_waits += u64::from(self.buffers.free() == 0);
                self.starving.push_back(conn);
                None
            }
            Err(_) => {
                socket.receiving = Receiving::Ended;
                Some(Completion::ReceiveFailed(conn))
            }
        }
    }

    /// Takes a multishot receive back. What it has brought by then still arrives.
    pub(super) fn stop_receiving(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn)
            && socket.receiving == Receiving::Multishot
        {
            socket.receiving = Receiving::Stopping;
            self.cancel(Kind::Receive, conn);
        }
    }
}
