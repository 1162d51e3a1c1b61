//! Accepting and connecting: how sockets come to the driver.
#![allow(unsafe_code)]

use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use io_uring::types::Fd;
use io_uring::{cqueue, opcode};
use rustix::io::Errno;

use super::Uring;
use super::bulk::without_blocking;
use super::socket::{Accepting, Kind, Socket};
use crate::fifo;
use crate::io::net::{Address, Stream};
use crate::io::ring::result;
use crate::io::{Completion, ConnId, Driver, Wait};
use crate::limits;

impl Uring {
    /// Lets at most so many in of those who came when there was no room. Each listener has an accept of
    /// its own under way, so one client of each may come where there is room for one.
    pub(super) fn let_in_early(&mut self, max: usize) {
        for _ in 0..max {
            let Some((client, index)) = fifo::pop(&mut self.early) else { return };
            let accepted = self.let_in(client, index);
            self.ready.extend(accepted);
        }
    }

    fn let_in(&mut self, client: Stream, index: usize) -> Option<Completion> {
        self.room = self.room.saturating_sub(1);
        self.adopt(client).map(|conn| Completion::Accepted(conn, index))
    }

    pub(super) fn settle_listener(&mut self, index: usize) {
        let queues = self.listeners.len() * limits::LISTEN_BACKLOG as usize;
        // A multishot accept may empty the whole queue before it can be stopped: near the limit, and
        // where descriptors may not do for all and their backends, clients are accepted one by one.
        let multi = self.room > queues
            && self.descriptors.have_room_for_queues(self.listeners.len(), self.now);
        let listener = &mut self.listeners[index];
        let room = if listener.held { 0 } else { self.room };
        let Some(fd) = &listener.net else { return };
        let fd = Fd(fd.as_raw_fd());
        let key = ConnId::from_parts(index as u32, 0);
        match listener.accepting {
            Accepting::Idle if room > 0 => {
                listener.accepting = if multi { Accepting::Multishot } else { Accepting::Single };
                let entry = if multi {
                    opcode::AcceptMulti::new(fd).flags(libc::SOCK_CLOEXEC).build()
                } else {
                    let accept = opcode::Accept::new(fd, ptr::null_mut(), ptr::null_mut());
                    accept.flags(libc::SOCK_CLOEXEC).build()
                };
                self.push(entry, Kind::Accept, key);
            }
            Accepting::Single | Accepting::Multishot if room == 0 => {
                listener.accepting = Accepting::Stopping;
                self.cancel(Kind::Accept, key);
            }
            Accepting::Multishot if !multi => {
                listener.accepting = Accepting::Stopping;
                self.cancel(Kind::Accept, key);
            }
            _ => {}
        }
    }

    pub(super) fn on_accept(&mut self, index: usize, entry: &cqueue::Entry) -> Option<Completion> {
        let listener = self.listeners.get_mut(index)?;
        if !cqueue::more(entry.flags()) {
            listener.accepting = Accepting::Idle;
        }
        match result(entry) {
            Ok(fd) => {
                // SAFETY: the kernel has just given this descriptor to us alone.
                let fd = unsafe { OwnedFd::from_raw_fd(fd.cast_signed()) };
                self.descriptors.on_new(&fd);
                let client = listener.transport.accepted(fd);
                if self.refusing {
                    client.welcome();
                }
                // Where it is closed by now, nobody gives room any more.
                if self.room == 0 && listener.net.is_some() {
                    self.early.push_back((client, index));
                    return None;
                }
                self.let_in(client, index)
            }
            Err(Errno::CANCELED | Errno::CONNABORTED | Errno::INTR) => None,
            Err(Errno::INVAL) if listener.transport.is_shared() => {
                // Another worker has ended the queue, and it is empty.
                listener.accepting = Accepting::Over;
                None
            }
            Err(errno) => {
                // Not armed again before the user says how much room there is.
                self.room = 0;
                Some(Completion::AcceptFailed(errno.into()))
            }
        }
    }

    pub(super) fn on_connect(&mut self, conn: ConnId, entry: &cqueue::Entry) -> Option<Completion> {
        self.came_back(Kind::Connect, conn)?;
        Some(self.finish_connect(conn, result(entry).map(drop)))
    }

    fn finish_connect(&mut self, conn: ConnId, outcome: Result<(), Errno>) -> Completion {
        let sending = &mut self.live(conn).sending;
        match outcome {
            Ok(()) => {
                sending.connect();
                Completion::Connected(conn)
            }
            Err(errno) => {
                sending.break_off();
                Completion::ConnectFailed(conn, errno.into())
            }
        }
    }

    /// Connects a socket for which that takes no time. Says whether the peer has no room for it, of which
    /// nobody would tell: the ring would wait in a thread of the kernel's pool.
    pub(super) fn try_connect(&mut self, conn: ConnId, address: &Address) -> bool {
        // It may be closed by now.
        let Some(Socket { stream, .. }) = self.sockets.get(conn) else { return false };
        let outcome = without_blocking(stream, || stream.connect(address));
        if outcome == Err(Errno::AGAIN) {
            return true;
        }
        let completion = self.finish_connect(conn, outcome);
        self.ready.push_back(completion);
        false
    }

    /// Tries connects again that found no room. Returns a wait that does not sleep beyond the next try.
    pub(super) fn connect_again(&mut self, wait: Wait) -> Wait {
        let mut crowded = mem::take(&mut self.crowded);
        crowded.retry(self.now, |conn, address| self.try_connect(conn, address));
        let most = crowded.sleep_max(wait.most, self.now);
        self.crowded = crowded;
        Wait { most, ..wait }
    }
}
