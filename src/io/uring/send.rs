//! Sending.
//!
//! Every send completes as it is submitted, wholly or with an error: `MSG_DONTWAIT` keeps the kernel
//! from waiting for room, `MSG_WAITALL` makes a part of it a failure, and success posts no
//! completion. So sends do not end the waiting for what is to be received, and none lingers in the
//! kernel: on a socket whose peer has ended its direction, a send that waits for room is woken at
//! once, again and again, and then occupies a thread of the kernel's pool.
//!
//! A socket without room waits for the poll that watches it (`watch.rs`).
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

use io_uring::opcode;
use io_uring::squeue::Flags;
use io_uring::types::Fd;
use rustix::io::Errno;

use super::Uring;
use super::socket::{Kind, Send, user_data};
use crate::fifo;
use crate::io::halves::Sending;
use crate::io::ring::SEND_FLAGS;
use crate::io::{Completion, ConnId};

impl Uring {
    /// Sends what is queued, then ends the direction if that was asked for.
    pub(super) fn flush(&mut self, conn: ConnId) {
        let socket = self.sockets.get_mut(conn).expect("an open connection");
        if socket.sending.progress() != Some(Send::Idle) {
            return;
        }
        if socket.pipe.is_some() {
            return self.drain_pipe(conn);
        }
        if socket.queue.is_empty() {
            return socket.end_direction();
        }
        let fd = Fd(socket.stream.as_raw_fd());
        let bytes = if socket.queue.buffers() == 1 {
            let (at, len) = self.buffers.parts(&socket.queue).next().expect("there is one buffer");
            let send = opcode::Send::new(fd, at.as_ptr(), len as u32).flags(SEND_FLAGS).build();
            let send = send.flags(Flags::SKIP_SUCCESS).user_data(user_data(Kind::Send, conn));
            // SAFETY: the queue's buffers stay taken until the send has completed.
            unsafe { self.ring.push(&send) };
            len as u32
        } else {
            let parts = self.buffers.parts(&socket.queue);
            // SAFETY: as above.
            unsafe { self.ring.send_parts(fd, parts, user_data(Kind::Send, conn)) }
        };
        socket.ops.add(Kind::Send);
        socket.send().submit(bytes);
        self.submitted.push_back(conn);
    }

    /// The next send that did not fail: all completions that there are have been handled.
    pub(super) fn next_sent(&mut self) -> Option<Completion> {
        if !self.ring.has_told_all() {
            return None;
        }
        while let Some(conn) = fifo::pop(&mut self.submitted) {
            // Others have failed, as was reported.
            let progress = self.sockets.get(conn).and_then(|socket| socket.sending.progress());
            if let Some(Send::Submitted(bytes)) = progress
                && let Some(completion) = self.on_send(conn, Ok(bytes))
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
        let sending = self.came_back(Kind::Send, conn)?.send();
        let offered = if let Send::Submitted(bytes) = *sending { bytes } else { 0 };
        sending.complete();
        let socket = self.sockets.get_mut(conn)?;
        let mut sent = None;
        match result {
            Ok(count) if count <= offered => {
                self.buffers.advance(&mut socket.queue, count);
                if count < offered {
                    self.block(conn);
                } else {
                    self.after_send(conn);
                }
                sent = Some(Completion::Sent(conn, count));
            }
            Err(Errno::AGAIN) => self.block(conn),
            Err(Errno::INTR) => self.mark_pending(conn),
            Ok(_) => {
                self.fail_send(conn);
                return self.on_stray(conn);
            }
            Err(_) => self.fail_send(conn),
        }
        // A break that was noticed while the send was under way.
        self.tell_break(conn);
        sent
    }

    /// The socket has no room: what is queued waits for some.
    pub(super) fn block(&mut self, conn: ConnId) {
        let socket = self.live(conn);
        socket.send().block();
        let joined = socket.joined;
        self.watch(conn);
        if let Some(source) = joined {
            // It would run ahead, as far as there are buffers, before it can be stopped.
            self.stop_receiving(source);
        }
    }

    /// Goes on with the queue, or lets the socket go on that waited for it to be empty.
    pub(super) fn after_send(&mut self, conn: ConnId) {
        let socket = self.live(conn);
        let joined = socket.joined;
        if !socket.queue.is_empty() {
            return self.mark_pending(conn);
        }
        socket.end_direction();
        if let Some(source) = joined {
            self.resume(source);
        }
    }

    /// Nothing more can be sent. What has arrived can still be received.
    pub(super) fn fail_send(&mut self, conn: ConnId) {
        let socket = self.sockets.get_mut(conn).expect("an open connection");
        if socket.sending == Sending::Broken {
            return;
        }
        debug_assert!(!socket.is_submitted(), "a send is under way");
        socket.sending.break_off();
        self.buffers.clear(&mut socket.queue);
        if let Some(pipe) = socket.pipe.take() {
            self.pipes.give(pipe);
        }
        let joined = socket.joined;
        self.ready.push_back(Completion::SendFailed(conn));
        if let Some(source) = joined {
            self.resume(source);
        }
    }
}
