//! What the driver keeps of a socket.

use rustix::event::epoll::EventFlags;

use crate::io::ConnId;
use crate::io::buffers::Chain;
use crate::io::halves::{Receiving, Sending, transitions};
use crate::io::net::Stream;
use crate::io::splice::{Bulk, Pipe};

/// How far the driver is with what a socket brings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Turn {
    /// There is nothing; an edge will tell of more.
    #[default]
    Dry,
    /// There may be something. Where it is wanted, this is passed through only.
    Readable,
    /// As `Readable`, and in a queue of sockets to read from: `ready`, `bulky` or `starving`.
    Queued,
    /// As `Readable`, and waits until the joined socket has sent everything.
    Held,
}

transitions! { impl[] Turn {
    /// The kernel tells that something has arrived.
    arrive() {
        Self::Dry | Self::Readable => Self::Readable,
        Self::Queued => Self::Queued,
        Self::Held => Self::Held,
    }
    /// A read has found nothing, or less than there was room for.
    run_dry() {
        Self::Readable => Self::Dry,
    }
    /// It is put into a queue.
    queue() {
        Self::Readable => Self::Queued,
    }
    /// It is taken out of one.
    take() {
        Self::Queued => Self::Readable,
    }
    /// It begins to wait for the joined socket.
    hold() {
        Self::Readable => Self::Held,
    }
    /// That has sent everything.
    resume() {
        Self::Held => Self::Readable,
    }
} }

/// Whether the kernel takes what is to be sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Room {
    /// It may take some.
    #[default]
    Free,
    /// It has taken less than it was offered; an edge will tell of room.
    Full,
}

transitions! { impl[] Room {
    /// The kernel took less than it was offered.
    fill() {
        Self::Free => Self::Full,
    }
    /// The kernel tells that there is room.
    clear() {
        Self::Free | Self::Full => Self::Free,
    }
} }

/// What the kernel has reported of the peer's direction, whatever still waits in front of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum HangUp {
    /// Nothing.
    None,
    /// It has ended or was reset: a short read is not the last one.
    Ended,
    /// As `Ended`, and there is or was an error. A receive may have to tell it yet, behind what has
    /// arrived.
    Failed,
}

#[derive(Debug)]
pub(super) struct Socket {
    pub(super) stream: Stream,
    pub(super) receiving: Receiving<Turn>,
    pub(super) sending: Sending<Room>,
    /// An edge will tell of room.
    pub(super) watches_room: bool,
    pub(super) hang_up: HangUp,
    /// There is or was an urgent mark, at which reads and moves stop short: what they bring does not
    /// say how much there is, until one brings nothing.
    pub(super) urgent: bool,
    /// A move by pipe has taken the error that the next receive was to tell.
    pub(super) error_taken: bool,
    /// What it brings may be moved to there by pipe.
    pub(super) joined: Option<ConnId>,
    pub(super) bulk: Bulk,
    pub(super) queue: Chain,
    /// What is to be sent before the queue.
    pub(super) pipe: Option<Pipe>,
}

impl Socket {
    /// One that is connected.
    pub(super) fn connected(stream: Stream) -> Self {
        Self::new(stream, Sending::Open(Room::Free))
    }

    /// One that is to be connected.
    pub(super) fn connecting(stream: Stream) -> Self {
        Self::new(stream, Sending::Connecting)
    }

    fn new(stream: Stream, sending: Sending<Room>) -> Self {
        Self {
            watches_room: !stream.tells_of_room_unasked(),
            stream,
            receiving: Receiving::Unused(Turn::Dry),
            sending,
            hang_up: HangUp::None,
            urgent: false,
            error_taken: false,
            joined: None,
            bulk: Bulk::default(),
            queue: Chain::with_reserve(),
            pipe: None,
        }
    }

    /// Whether an edge is to tell of room: where the kernel tells of it unasked, only while there is
    /// none, or each message that a peer reads would wake the worker.
    pub(super) fn is_to_watch_room(&self) -> bool {
        self.sending.progress() == Some(Room::Full) || !self.stream.tells_of_room_unasked()
    }

    /// The events that it is registered for.
    pub(super) fn interest(&self) -> EventFlags {
        // Nothing more wakes for `PRI`: it only says more of what has arrived.
        let incoming = EventFlags::IN | EventFlags::PRI | EventFlags::RDHUP | EventFlags::ET;
        if self.watches_room { incoming | EventFlags::OUT } else { incoming }
    }

    /// Bytes that are to be sent, or being sent.
    pub(super) fn queued(&self) -> u64 {
        u64::from(self.queue.bytes() + self.pipe.as_ref().map_or(0, Pipe::bytes))
    }

    pub(super) fn is_flushed(&self) -> bool {
        self.queue.is_empty() && self.pipe.is_none()
    }

    pub(super) fn has_error(&self) -> bool {
        self.hang_up == HangUp::Failed
    }

    /// It was received from, and is not now, so that no receive would tell of a break.
    pub(super) fn is_paused(&self) -> bool {
        matches!(self.receiving, Receiving::Stopped(_) | Receiving::Wanted(Turn::Held))
    }

    /// How far receiving is, where the caller knows that it has not ended.
    pub(super) fn turn(&mut self) -> &mut Turn {
        self.receiving.progress_mut().expect("nothing is read behind the end")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_to_be_read_from_changes_as_its_table_says() {
        let table = "\
arrive: Dry -> Readable
arrive: Readable -> Readable
arrive: Queued -> Queued
arrive: Held -> Held
run_dry: Dry -> illegal
run_dry: Readable -> Dry
run_dry: Queued -> illegal
run_dry: Held -> illegal
queue: Dry -> illegal
queue: Readable -> Queued
queue: Queued -> illegal
queue: Held -> illegal
take: Dry -> illegal
take: Readable -> illegal
take: Queued -> Readable
take: Held -> illegal
hold: Dry -> illegal
hold: Readable -> Held
hold: Queued -> illegal
hold: Held -> illegal
resume: Dry -> illegal
resume: Readable -> illegal
resume: Queued -> illegal
resume: Held -> Readable
";
        assert_eq!(Turn::table(&[Turn::Dry, Turn::Readable, Turn::Queued, Turn::Held]), table);
    }

    #[test]
    fn room_to_send_changes_as_its_table_says() {
        let table = "\
fill: Free -> Full
fill: Full -> illegal
clear: Free -> Free
clear: Full -> Free
";
        assert_eq!(Room::table(&[Room::Free, Room::Full]), table);
    }
}
