//! Sending.
//!
//! What is sent is tried before the next socket is read from; only what the kernel does not take waits
//! for an edge.

use std::io;
use std::os::fd::AsFd;

use rustix::event::epoll::{self, EventData};
use rustix::io::Errno;
use rustix::net::SendFlags;

use super::socket::{Room, Socket};
use super::{Epoll, conn_data};
use crate::io::buffers::Buffers;
use crate::io::halves::Sending;
use crate::io::splice::Pipes;
use crate::io::{Completion, ConnId};

/// Buffers that one write takes at most.
const SEND_PARTS_MAX: usize = 8;

impl Epoll {
    /// Tries what is to be sent, unless there is more to come from where it came from.
    pub(super) fn flush_unsent(&mut self) {
        if let Some(conn) = self.unsent.take_if(|_| self.filled == 0) {
            self.flush_if_open(conn);
        }
    }

    /// As [`Epoll::flush`], of a connection that its user may have closed.
    pub(super) fn flush_if_open(&mut self, conn: ConnId) {
        if self.sockets.get(conn).is_some() {
            self.flush(conn);
        }
    }

    /// Sends what is queued as far as the socket takes it, then ends the direction if asked to.
    pub(super) fn flush(&mut self, conn: ConnId) {
        let socket = self.sockets.get_mut(conn).expect("an open connection");
        let (sent, failed) = send_queued(socket, &mut self.buffers, &mut self.pipes);
        let is_flushed = socket.is_flushed();
        let source = socket.joined.filter(|_| is_flushed);
        if is_flushed && matches!(socket.sending, Sending::Ending(_)) {
            socket.stream.end_direction();
            socket.sending.end();
        }
        if sent > 0 {
            self.completions.push_back(Completion::Sent(conn, sent));
        }
        if failed || !self.watch_room(conn) {
            return self.fail_send(conn);
        }
        if let Some(source) = source {
            self.resume(source);
        }
    }

    /// Has the kernel tell of room, or no more. Says whether it will.
    fn watch_room(&mut self, conn: ConnId) -> bool {
        let socket = self.sockets.get_mut(conn).expect("an open connection");
        let is_to_watch = socket.is_to_watch_room();
        if socket.watches_room == is_to_watch {
            return true;
        }
        socket.watches_room = is_to_watch;
        let data = EventData::new_u64(conn_data(conn));
        // If there is room by now, this tells of it.
        epoll::modify(&self.fd, &socket.stream, data, socket.interest()).is_ok()
    }

    /// Nothing more can be sent. What has arrived can still be received.
    pub(super) fn fail_send(&mut self, conn: ConnId) {
        let Self { sockets, buffers, pipes, .. } = self;
        let socket = sockets.get_mut(conn).expect("an open connection");
        if socket.sending == Sending::Broken {
            return;
        }
        socket.sending.break_off();
        buffers.clear(&mut socket.queue);
        if let Some(pipe) = socket.pipe.take() {
            pipes.give(pipe);
        }
        let joined = socket.joined;
        self.completions.push_back(Completion::SendFailed(conn));
        if let Some(source) = joined {
            self.resume(source);
        }
    }

    /// Says that a socket that is not received from has broken.
    pub(super) fn tell_break(&mut self, conn: ConnId) {
        let socket = self.live(conn);
        if socket.has_error() && socket.is_paused() {
            self.fail_send(conn);
        }
    }
}

/// Sends what is queued as far as the socket takes it: bytes taken, and whether it has broken.
fn send_queued(socket: &mut Socket, buffers: &mut Buffers, pipes: &mut Pipes) -> (u32, bool) {
    let mut sent = 0;
    while socket.sending.progress() == Some(Room::Free) && !socket.is_flushed() {
        let written = match &mut socket.pipe {
            Some(pipe) => {
                let offered = pipe.bytes();
                pipe.drain(&socket.stream).map(|count| (count, offered))
            }
            None => write(buffers, socket),
        };
        let is_full = match written {
            Ok((count, offered)) => {
                sent += count;
                match socket.pipe.take_if(|pipe| pipe.is_empty()) {
                    Some(pipe) => pipes.give(pipe),
                    None if socket.pipe.is_none() => buffers.advance(&mut socket.queue, count),
                    None => {}
                }
                // A short write means that the socket is full; an edge will follow.
                count < offered
            }
            Err(Errno::AGAIN) => true,
            Err(Errno::INTR) => false,
            Err(_) => return (sent, true),
        };
        if is_full && let Some(room) = socket.sending.progress_mut() {
            room.fill();
        }
    }
    (sent, false)
}

/// Writes the first buffers of a socket's queue in one call: bytes taken, bytes offered.
fn write(buffers: &Buffers, socket: &Socket) -> Result<(u32, u32), Errno> {
    let mut parts = [io::IoSlice::new(&[]); SEND_PARTS_MAX];
    let mut count = 0;
    let mut offered = 0;
    for (bytes, part) in buffers.slices(&socket.queue).zip(&mut parts) {
        *part = io::IoSlice::new(bytes);
        count += 1;
        offered += bytes.len() as u32;
    }
    let sent = if count == 1 {
        rustix::net::send(&socket.stream, &parts[0], SendFlags::NOSIGNAL)
    } else {
        let mut control = rustix::net::SendAncillaryBuffer::default();
        rustix::net::sendmsg(
            socket.stream.as_fd(),
            &parts[..count],
            &mut control,
            SendFlags::NOSIGNAL,
        )
    };
    sent.map(|taken| (taken as u32, offered))
}
