//! What is wrong with what the driver's user does, or leaves undone.

use std::time::Duration;

use super::sockets::Socket;
use super::{Sim, Speech, UNDONE_MAX};
use crate::io::ConnId;
use crate::io::halves::{Receiving, Sending};

impl Sim {
    /// A connection of which somebody waits for longer than `limit` that its peer acknowledges what it
    /// was sent, which that never will. To be asked after each turn.
    pub fn hanging(&self, limit: Duration) -> Option<String> {
        (0..self.sockets.slots()).find_map(|slot| {
            let socket = self.sockets.get(self.sockets.key_at(slot)?)?;
            let peer = &self.peers[socket.peer];
            let since = peer.unacked_since?;
            let is_read = socket.taken == peer.sent;
            let is_waited_for = match socket.joined {
                // One that takes nothing of what had come is not waiting.
                Some(client) => self.sockets.get(client).is_some_and(|client| {
                    client.queue.is_empty() && self.peers[client.peer].wire.is_empty()
                }),
                None => self.speech != Speech::Bytes,
            };
            let waits = self.elapsed.saturating_sub(since);
            (is_read && is_waited_for && waits > limit)
                .then(|| format!("{} is gone, and was waited for {waits:?}", peer.id))
        })
    }

    /// What the user could do and has not done, though it was notified of all that it needs, for
    /// nothing will notify it again; or of what it was notified too late. To be asked after each turn.
    pub fn undone(&mut self) -> Option<String> {
        let undone =
            (0..self.sockets.slots()).find_map(|slot| self.undone_with(self.sockets.key_at(slot)?));
        self.too_late.take().or(undone)
    }

    /// The user is notified that bytes were sent for which the source of them may have waited.
    pub(super) fn check_lateness(&mut self, conn: ConnId) {
        let Some(sink) = self.sockets.get(conn) else { return };
        let Some(source) = sink.joined.and_then(|source| self.sockets.get(source)) else { return };
        let from = &self.peers[source.peer];
        let waits =
            !source.is_wanted() && source.sending != Sending::Broken && from.sent > source.taken;
        let late = self.elapsed.saturating_sub(sink.taken_at.max(self.stopped_until));
        if waits && late > UNDONE_MAX {
            self.too_late = Some(format!("{} waited {late:?} to be read from", from.id));
        }
    }

    fn undone_with(&self, conn: ConnId) -> Option<String> {
        let source = self.sockets.get(conn)?;
        let sink = self.sockets.get(source.joined?)?;
        let (from, to) = (&self.peers[source.peer], &self.peers[sink.peer]);
        let is_flushed = sink.queue.is_empty() && sink.untold == 0;
        let is_broken = sink.sending == Sending::Broken || to.reset || to.is_swallowed();
        if is_broken || !is_flushed || self.hearing.has(conn) {
            return None;
        }
        let has_ended = source.receiving == Receiving::Ended;
        let unread = !has_ended && (from.sent > source.taken || from.ended || from.reset);
        let both_ended = source.told_end && sink.told_end;
        if unread && !source.is_wanted() && source.sending != Sending::Broken {
            Some(format!("{} is not read from, though {} takes everything", from.id, to.id))
        } else if source.told_end && !from.reset && !sink.has_shut_down() {
            Some(format!("{} has ended, and {} was not notified", from.id, to.id))
        } else if both_ended && source.queue.is_empty() && source.untold == 0 {
            Some(format!("{} and {} have ended, and stay", from.id, to.id))
        } else {
            None
        }
    }

    /// A backend that has answered all that it was asked is asked anew.
    pub(super) fn check_silence(&self, conn: ConnId, socket: &Socket) {
        let peer = &self.peers[socket.peer];
        let received = peer.received.len();
        let has_understood = match (&peer.lines, &peer.http) {
            _ if peer.is_client => false,
            (Some(lines), _) => lines.has_understood(received),
            (_, Some(http)) => http.has_understood(received),
            _ => false,
        };
        let idle = socket.queue.is_empty() && peer.wire.is_empty() && has_understood;
        let unheard =
            peer.sent > socket.taken || peer.reset || peer.ended || self.hearing.has(conn);
        assert!(!idle || !unheard, "a request is sent on a connection that is not silent");
    }
}
