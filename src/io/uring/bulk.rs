//! Moving bulk by pipe.
//!
//! The ring's own operation for it always goes through a thread of the kernel's pool, so only
//! readiness comes from the ring, and `splice` is called directly. Sockets here are blocking for
//! the ring's sake; for the moment of that call they are not.

use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::opcode;
use io_uring::types::Fd;
use rustix::io::{Errno, ioctl_fionbio};

use super::Uring;
use super::socket::{Kind, Socket};
use crate::io::splice;
use crate::io::{Completion, ConnId};

impl Uring {
    /// Where to move by pipe what a socket brings, if that is the way.
    pub(super) fn splice_target(&self, conn: ConnId) -> Option<(ConnId, &Socket)> {
        let socket = self.sockets.get(conn).filter(|socket| socket.bulk.is_on())?;
        let to = socket.joined.filter(|_| self.pipes.any())?;
        Some((to, self.sockets.get(to).filter(|sink| !sink.closing)?))
    }

    /// A socket that was polled has something: moves it on.
    pub(super) fn splice(&mut self, conn: ConnId) -> Option<Completion> {
        // Whatever has changed since the poll, settling sees to it.
        self.mark_pending(conn);
        let (to, sink) = self.splice_target(conn)?;
        if !sink.is_flushed() {
            return None;
        }
        let mut pipe = self.pipes.take()?;
        let socket = self.sockets.get_mut(conn)?;
        let filled = without_blocking(&socket.fd, || pipe.fill(&socket.fd));
        if let Ok(count @ 1..) = filled {
            socket.bulk.on_spliced(count, self.window);
            if let Some(sink) = self.sockets.get_mut(to) {
                sink.pipe = Some(pipe);
            }
            self.drain_pipe(to);
            return Some(Completion::Spliced(conn, count));
        }
        self.pipes.give(pipe);
        match filled {
            Ok(_) => {
                socket.ended = true;
                Some(Completion::Ended(conn))
            }
            Err(Errno::AGAIN | Errno::INTR) => None,
            Err(errno) if splice::is_refused(errno) => {
                self.pipes.give_up();
                None
            }
            Err(_) => {
                socket.ended = true;
                Some(Completion::ReceiveFailed(conn))
            }
        }
    }

    /// Moves on what is in a socket's pipe; for the rest it waits until there is room.
    pub(super) fn drain_pipe(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        let Some(mut pipe) = socket.pipe.take() else { return };
        match without_blocking(&socket.fd, || pipe.drain(&socket.fd)) {
            Ok(count) => self.ready.push_back(Completion::Sent(conn, count)),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => {
                self.pipes.give(pipe);
                return self.fail_send(conn);
            }
        }
        if pipe.is_empty() {
            self.pipes.give(pipe);
            return self.after_send(conn);
        }
        let fd = Fd(socket.fd.as_raw_fd());
        socket.pipe = Some(pipe);
        socket.ops.add(Kind::Send);
        self.push(opcode::PollAdd::new(fd, libc::POLLOUT as u32).build(), Kind::Send, conn);
    }
}

fn without_blocking<T>(
    fd: &OwnedFd,
    action: impl FnOnce() -> Result<T, Errno>,
) -> Result<T, Errno> {
    ioctl_fionbio(fd, true)?;
    let outcome = action();
    ioctl_fionbio(fd, false)?;
    outcome
}
