//! Moving bulk by pipe.
//!
//! The ring's own operation for it always goes through a thread of the kernel's pool, so only
//! readiness comes from the ring, and `splice` is called directly. Sockets here are blocking for
//! the ring's sake; for the moment of that call they are not.

use rustix::io::{Errno, ioctl_fionbio};

use super::Uring;
use super::socket::{Send, Socket};
use crate::io::halves::Sending;
use crate::io::net::Stream;
use crate::io::splice;
use crate::io::{Completion, ConnId};

impl Uring {
    /// Where to move by pipe what a socket brings, if that is the way.
    pub(super) fn splice_target(&self, conn: ConnId) -> Option<(ConnId, &Socket)> {
        let socket = self.sockets.get(conn).filter(|socket| socket.bulk.is_on())?;
        let to = socket.joined.filter(|_| self.pipes.any(self.now))?;
        let takes = |sink: &&Socket| !sink.is_closing() && matches!(sink.sending, Sending::Open(_));
        Some((to, self.sockets.get(to).filter(takes)?))
    }

    /// A socket that was polled has something: moves it on.
    ///
    /// What is not moved is left to an ordinary receive, which alone can tell what it is: a move
    /// stops at an urgent mark, and there it says that nothing is left, or takes an end or an error
    /// for the next thing.
    pub(super) fn splice(&mut self, conn: ConnId) -> Option<Completion> {
        // Whatever has changed since the poll, settling sees to it.
        self.mark_pending(conn);
        let (to, sink) = self.splice_target(conn)?;
        if !sink.is_flushed() {
            return None;
        }
        let Some(mut pipe) = self.pipes.take(self.now) else {
            let window = self.window;
            self.sockets.get_mut(conn)?.bulk.rest(window);
            return None;
        };
        let socket = self.sockets.get_mut(conn)?;
        let filled = without_blocking(&socket.stream, || pipe.fill(&socket.stream));
        if let Ok(count @ 1..) = filled {
            socket.bulk.on_spliced(count, self.window);
            self.live(to).pipe = Some(pipe);
            self.drain_pipe(to);
            return Some(Completion::Spliced(conn, count));
        }
        socket.bulk.rest(self.window);
        self.pipes.give(pipe);
        match filled {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) if splice::is_refused(errno) => self.pipes.on_refused(self.now),
            Err(_) => socket.error_taken = true,
        }
        None
    }

    /// Moves on what is in a socket's pipe; the rest waits until there is room.
    pub(super) fn drain_pipe(&mut self, conn: ConnId) {
        let socket = self.sockets.get_mut(conn).expect("an open connection");
        debug_assert_eq!(socket.sending.progress(), Some(Send::Idle), "one after the other");
        let pipe = socket.pipe.as_mut().expect("what was moved in is to be moved on");
        match without_blocking(&socket.stream, || pipe.drain(&socket.stream)) {
            Ok(count) => self.ready.push_back(Completion::Sent(conn, count)),
            Err(Errno::AGAIN) => {}
            Err(Errno::INTR) => return self.mark_pending(conn),
            Err(_) => return self.fail_send(conn),
        }
        match socket.pipe.take_if(|pipe| pipe.is_empty()) {
            Some(pipe) => {
                self.pipes.give(pipe);
                self.after_send(conn);
            }
            None => self.block(conn),
        }
    }
}

/// Runs an action that is not to block, though the socket is one that does.
pub(super) fn without_blocking<T>(
    fd: &Stream,
    action: impl FnOnce() -> Result<T, Errno>,
) -> Result<T, Errno> {
    ioctl_fionbio(fd, true)?;
    let outcome = action();
    ioctl_fionbio(fd, false)?;
    outcome
}
