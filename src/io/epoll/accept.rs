//! Accepting and connecting: how sockets come to the driver.

use std::io;
use std::mem;

use rustix::event::epoll::{self, EventData};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use socket2::{SockRef, Type};

use super::socket::Socket;
use super::{Epoll, conn_data};
use crate::io::halves::Sending;
use crate::io::net::{self, Address, Stream};
use crate::io::{Completion, ConnId, Wait};

impl Epoll {
    /// Takes a socket on.
    pub(super) fn register(&mut self, socket: Socket) -> io::Result<ConnId> {
        let full = |_| io::Error::from(io::ErrorKind::QuotaExceeded);
        let conn = self.sockets.insert(socket).map_err(full)?;
        let data = EventData::new_u64(conn_data(conn));
        let socket = self.sockets.get(conn).expect("it was just inserted");
        if let Err(errno) = epoll::add(&self.fd, &socket.stream, data, socket.interest()) {
            self.sockets.remove(conn);
            return Err(errno.into());
        }
        Ok(conn)
    }

    /// The next client that waits on any listener, if there is room for it.
    pub(super) fn accept_one(&mut self) -> Option<Completion> {
        for offset in 0..self.listeners.len() {
            let index = (self.accept_from + offset) % self.listeners.len();
            while self.room > 0 && self.may_accept_from(index) {
                if let Some(completion) = self.accept_from_listener(index) {
                    return Some(completion);
                }
            }
        }
        None
    }

    fn accept_from_listener(&mut self, index: usize) -> Option<Completion> {
        let Some(listener) = &self.listeners[index] else {
            self.acceptable[index] = false;
            return None;
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let accepted = match listener.accept(flags) {
            Ok(client) => {
                self.room -= 1;
                if self.refusing {
                    client.welcome();
                }
                // Each in turn: near the limit there is room for one per turn.
                self.accept_from = index + 1;
                self.register(Socket::connected(client))
            }
            // `EINVAL`: another worker has ended the queue that they share, and it is empty.
            Err(Errno::AGAIN | Errno::INVAL) => {
                self.acceptable[index] = false;
                return None;
            }
            Err(Errno::CONNABORTED | Errno::INTR) => return None,
            Err(errno) => Err(errno.into()),
        };
        Some(accepted.map_or_else(
            |error| {
                self.room = 0;
                Completion::AcceptFailed(error)
            },
            |conn| Completion::Accepted(conn, index),
        ))
    }

    /// Takes on all that a listener has accepted. Says whether it is closed: it stays open while
    /// somebody waits for whom there is no descriptor.
    pub(super) fn empty_listener(&mut self, index: usize) -> bool {
        let Some(listener) = self.listeners[index].take() else { return true };
        let (clients, emptied) = listener.empty_accept_queue();
        self.acceptable[index] = !emptied;
        self.listeners[index] = Some(listener).filter(|_| !emptied);
        for client in clients {
            let registered = rustix::io::ioctl_fionbio(&client, true).map_err(io::Error::from);
            let completion =
                match registered.and_then(|()| self.register(Socket::connected(client))) {
                    Ok(conn) => Completion::Accepted(conn, index),
                    Err(error) => Completion::AcceptFailed(error),
                };
            self.completions.push_back(completion);
        }
        emptied
    }

    /// Begins to connect.
    pub(super) fn begin_connect(
        &mut self,
        address: &Address,
        options: &net::Options,
    ) -> io::Result<ConnId> {
        let kind = Type::STREAM.nonblocking();
        let stream = self.descriptors.make(|| Stream::outgoing(address, kind, options))?;
        let conn = self.register(Socket::connecting(stream))?;
        if self.try_connect(conn, address) {
            self.crowded.push(conn, address, self.now);
        }
        Ok(conn)
    }

    /// Says whether the peer has no room for it, of which nobody would tell.
    fn try_connect(&mut self, conn: ConnId, address: &Address) -> bool {
        // It may be closed by now.
        let Some(socket) = self.sockets.get(conn) else { return false };
        match socket.stream.connect(address) {
            Err(Errno::INPROGRESS | Errno::INTR) => {}
            Err(Errno::AGAIN) => return true,
            outcome => self.finish_connect(conn, outcome.map_err(Into::into)),
        }
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

    /// The kernel tells that a connect is over.
    pub(super) fn on_connect_event(&mut self, conn: ConnId, failed: bool) {
        let stream = &self.live(conn).stream;
        let error = if failed { SockRef::from(stream).take_error() } else { Ok(None) };
        self.finish_connect(conn, error.and_then(|error| error.map_or(Ok(()), Err)));
    }

    fn finish_connect(&mut self, conn: ConnId, outcome: io::Result<()>) {
        let sending = &mut self.live(conn).sending;
        debug_assert_eq!(*sending, Sending::Connecting);
        let completion = match outcome {
            Ok(()) => {
                sending.connect();
                Completion::Connected(conn)
            }
            Err(error) => {
                sending.break_off();
                Completion::ConnectFailed(conn, error)
            }
        };
        self.completions.push_back(completion);
    }
}
