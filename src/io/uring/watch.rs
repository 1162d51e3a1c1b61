//! Watching a socket for room to send and for a break.
//!
//! One multishot poll serves both. It is armed when it is first needed, and stays until the close:
//! after its first completion, which says how things stand, it tells of wake-ups only, and the kernel
//! wakes for room only where a send has found none. A poll reports the peer's end, of a hang-up
//! and of errors whatever was asked for, so one that is armed anew each time fires at once, for ever,
//! on a socket whose peer has ended its direction.

use std::os::fd::AsRawFd;

use io_uring::types::Fd;
use io_uring::{cqueue, opcode};

use super::socket::Kind;
use super::{Uring, result};
use crate::io::{Completion, ConnId};

const ROOM: u32 = libc::POLLOUT as u32;
const ERROR: u32 = libc::POLLERR as u32;
const HANG_UP: u32 = libc::POLLHUP as u32;

impl Uring {
    /// Sees to it that a socket is watched.
    pub(super) fn watch(&mut self, conn: ConnId) {
        let socket = self.live(conn);
        if socket.ops.has(Kind::Watch) {
            return;
        }
        socket.ops.add(Kind::Watch);
        let fd = Fd(socket.stream.as_raw_fd());
        self.push(opcode::PollAdd::new(fd, ROOM).multi(true).build(), Kind::Watch, conn);
    }

    /// Lets a socket that is not received from still tell of a reset.
    pub(super) fn watch_paused(&mut self, conn: ConnId) {
        if self.live(conn).is_paused() {
            self.watch(conn);
            self.tell_break(conn);
        }
    }

    pub(super) fn on_watch(&mut self, conn: ConnId, entry: &cqueue::Entry) -> Option<Completion> {
        if cqueue::more(entry.flags()) {
            self.sockets.get(conn).filter(|socket| !socket.is_closing())?;
        } else {
            self.came_back(Kind::Watch, conn)?;
        }
        let socket = self.sockets.get_mut(conn)?;
        let blocked = socket.is_blocked();
        let Ok(events) = result(entry) else {
            // It cannot be watched: nobody would ever say that there is room.
            if blocked {
                self.fail_send(conn);
            }
            return None;
        };
        socket.has_error |= events & ERROR != 0;
        if blocked {
            if events & (ROOM | ERROR | HANG_UP) != 0 {
                self.go_on_sending(conn);
            } else {
                // The peer has ended its direction, which makes no room. Nothing is done where the
                // poll goes on.
                self.watch(conn);
            }
        }
        self.watch_paused(conn);
        None
    }

    fn go_on_sending(&mut self, conn: ConnId) {
        let socket = self.live(conn);
        if socket.has_error {
            // A send would take the error from the receive that is to tell it.
            return self.fail_send(conn);
        }
        socket.send().resume();
        if socket.pipe.is_some() {
            self.drain_pipe(conn);
        } else {
            self.mark_pending(conn);
        }
    }

    /// Says that a socket that is not received from has broken.
    pub(super) fn tell_break(&mut self, conn: ConnId) {
        let socket = self.live(conn);
        // While a send is under way, once that is back.
        if socket.has_error && socket.is_paused() && !socket.is_submitted() {
            self.fail_send(conn);
        }
    }
}
