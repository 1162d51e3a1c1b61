//! Receiving.

use std::mem;
use std::os::fd::AsRawFd;
use std::ptr;

use io_uring::squeue::Flags;
use io_uring::types::Fd;
use io_uring::{cqueue, opcode};
use rustix::io::Errno;

use super::socket::{Kind, Receiving};
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
        if socket.wanted && !socket.ended && !socket.held && socket.receiving == Receiving::Idle {
            self.arm_receive(conn);
        }
        self.watch(conn);
        self.flush(conn);
    }

    fn arm_receive(&mut self, conn: ConnId) {
        let lean = self.is_lean();
        let can_splice = self.splice_target(conn).map(|(_, sink)| sink.is_flushed());
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if can_splice == Some(false) {
            socket.held = true;
            return;
        }
        socket.receiving = Receiving::Armed;
        socket.ops.add(Kind::Receive);
        socket.polled = can_splice == Some(true);
        let fd = Fd(socket.fd.as_raw_fd());
        let entry = if socket.polled {
            opcode::PollAdd::new(fd, (libc::POLLIN | libc::POLLRDHUP) as u32).build()
        } else if lean || socket.single {
            let receive = opcode::Recv::new(fd, ptr::null_mut(), limits::BUFFER_SIZE as u32);
            receive.buf_group(ProvidedBuffers::GROUP).build().flags(Flags::BUFFER_SELECT)
        } else {
            opcode::RecvMulti::new(fd, ProvidedBuffers::GROUP).build()
        };
        self.push(entry, Kind::Receive, conn);
    }

    /// The socket joined with this one has sent everything.
    pub(super) fn let_go(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn)
            && mem::take(&mut socket.held)
        {
            self.mark_pending(conn);
        }
    }

    /// Lets a socket that is not received from still tell of a reset.
    pub(super) fn watch(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if (socket.stopped || socket.held)
            && !socket.ended
            && socket.receiving == Receiving::Idle
            && !socket.ops.has(Kind::Watch)
        {
            socket.ops.add(Kind::Watch);
            let fd = Fd(socket.fd.as_raw_fd());
            let poll = opcode::PollAdd::new(fd, libc::POLLERR as u32).build();
            self.push(poll, Kind::Watch, conn);
        }
    }

    pub(super) fn on_receive(&mut self, conn: ConnId, entry: &cqueue::Entry) -> Option<Completion> {
        let buf = cqueue::buffer_select(entry.flags())
            .and_then(|id| self.provided.take(id, entry.result().max(0) as u32));
        let more = cqueue::more(entry.flags());
        let socket = self.sockets.get_mut(conn)?;
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
        if mem::take(&mut socket.polled) {
            if socket.wanted && !socket.ended && result(entry).is_ok() {
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
            Ok(_) => {
                socket.ended = true;
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
                socket.ended = true;
                Some(Completion::ReceiveFailed(conn))
            }
        }
    }

    /// Takes a multishot receive back. What it has brought by then still arrives.
    pub(super) fn stop_receiving(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get_mut(conn)
            && socket.receiving == Receiving::Armed
        {
            socket.receiving = Receiving::Stopping;
            self.cancel(Kind::Receive, conn);
        }
    }

    pub(super) fn on_watch(&mut self, conn: ConnId, entry: &cqueue::Entry) -> Option<Completion> {
        let socket = self.came_back(Kind::Watch, conn)?;
        // If it is received from again, that will show the error, behind what came before it.
        let stopped =
            (socket.stopped || socket.held) && !socket.ended && socket.receiving == Receiving::Idle;
        let broken = result(entry).is_ok_and(|events| events & libc::POLLERR as u32 != 0);
        (stopped && broken).then(|| {
            socket.ended = true;
            Completion::ReceiveFailed(conn)
        })
    }
}
