//! Sending.
#![allow(unsafe_code)]

use std::mem;
use std::num::NonZeroU32;
use std::os::fd::AsRawFd;

use io_uring::opcode;
use io_uring::squeue::Flags;
use io_uring::types::Fd;
use rustix::io::Errno;

use super::Uring;
use super::socket::{Kind, user_data};
use crate::fifo;
use crate::io::{Completion, ConnId};

/// A send up to this size is expected to complete as it is submitted.
const SEND_INLINE_MAX: u32 = 4096;

impl Uring {
    /// Sends what is queued, then ends the direction if that was asked for.
    ///
    /// A small send nearly always finds room in the socket. It is submitted so that it completes
    /// at once, wholly or with an error: `MSG_DONTWAIT` keeps the kernel from waiting for room,
    /// `MSG_WAITALL` makes a part of it a failure, and success posts no completion. So sends do
    /// not end the waiting for what is to be received.
    pub(super) fn flush(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if socket.ops.has(Kind::Send) {
            return;
        }
        if socket.queue.is_empty() {
            if mem::take(&mut socket.shutdown) {
                // Never blocks, and its failure shows in the next operation.
                let _ = rustix::net::shutdown(&socket.fd, rustix::net::Shutdown::Write);
            }
            return;
        }
        socket.ops.add(Kind::Send);
        let fd = Fd(socket.fd.as_raw_fd());
        if socket.queue.buffers() == 1 {
            let Some((bytes, count)) = self.buffers.parts(&socket.queue).next() else { return };
            let send = opcode::Send::new(fd, bytes.as_ptr(), count as u32);
            let send = if count as u32 <= SEND_INLINE_MAX && !socket.congested {
                socket.inline = NonZeroU32::new(count as u32);
                self.inline.push_back(conn);
                let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT | libc::MSG_WAITALL;
                send.flags(flags).build().flags(Flags::SKIP_SUCCESS)
            } else {
                send.flags(libc::MSG_NOSIGNAL).build()
            };
            self.push(send, Kind::Send, conn);
        } else {
            let parts = self.buffers.parts(&socket.queue);
            // SAFETY: the queue's buffers stay taken until the send has completed.
            unsafe { self.ring.send_parts(fd, parts, user_data(Kind::Send, conn)) }
        }
    }

    /// The next inline send that did not fail: all completions that there are have been handled.
    pub(super) fn next_inline_send(&mut self) -> Option<Completion> {
        if !self.ring.has_told_all() {
            return None;
        }
        while let Some(conn) = fifo::pop(&mut self.inline) {
            if let Some(count) = self.sockets.get(conn).and_then(|socket| socket.inline)
                && let Some(completion) = self.on_send(conn, Ok(count.get()))
            {
                return Some(completion);
            }
        }
        None
    }

    pub(super) fn on_send(
        &mut self,
        conn: ConnId,
        result: Result<u32, Errno>,
    ) -> Option<Completion> {
        let socket = self.sockets.get_mut(conn)?;
        let inline = socket.inline.take().is_some();
        self.came_back(Kind::Send, conn)?;
        let socket = self.sockets.get_mut(conn)?;
        if socket.pipe.is_some() {
            self.drain_pipe(conn);
            return None;
        }
        match result {
            Ok(count) => {
                // A part of an inline send: the rest waits for room.
                socket.congested = inline && count < socket.queue.bytes();
                self.buffers.advance(&mut socket.queue, count);
                self.after_send(conn);
                Some(Completion::Sent(conn, count))
            }
            Err(Errno::INTR | Errno::AGAIN) => {
                socket.congested = true;
                self.mark_pending(conn);
                None
            }
            Err(_) => {
                self.fail_send(conn);
                None
            }
        }
    }

    /// Goes on with the queue, or lets the socket go on that waited for it to be empty.
    pub(super) fn after_send(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        let joined = socket.joined;
        if !socket.queue.is_empty() || socket.shutdown {
            self.mark_pending(conn);
        } else if let Some(source) = joined {
            self.let_go(source);
        }
    }

    /// Nothing more can be sent.
    pub(super) fn fail_send(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        self.buffers.clear(&mut socket.queue);
        socket.shutdown = false;
        self.ready.push_back(Completion::SendFailed(conn));
        self.after_send(conn);
    }
}
