//! What the driver keeps of a socket, and what the kernel holds of it.

use crate::io::ConnId;
use crate::io::buffers::Chain;
use crate::io::halves::{Receiving, Sending, transitions};
use crate::io::net::{self, Stream};
use crate::io::splice::{Bulk, Pipe};

/// What an operation is, packed into its user data beside the slot and its generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Accept = 1,
    Connect = 2,
    Receive = 3,
    Send = 4,
    Wake = 5,
    /// Ends a wait.
    Timer = 8,
    /// Waits for room, and for an error of a socket that is not received from.
    Watch = 7,
    /// Cancels and closes: nobody waits for their result.
    Forget = 6,
}

pub(super) fn user_data(kind: Kind, key: ConnId) -> u64 {
    debug_assert!(key.index() < 1 << 28);
    (kind as u64) << 60 | (key.index() as u64) << 32 | u64::from(key.generation())
}

pub(super) fn parse_user_data(data: u64) -> (Option<Kind>, ConnId) {
    let kind = match data >> 60 {
        1 => Some(Kind::Accept),
        2 => Some(Kind::Connect),
        3 => Some(Kind::Receive),
        4 => Some(Kind::Send),
        5 => Some(Kind::Wake),
        7 => Some(Kind::Watch),
        8 => Some(Kind::Timer),
        _ => None,
    };
    (kind, ConnId::from_parts((data >> 32) as u32 & 0x0fff_ffff, data as u32))
}

/// What the kernel has to do with what a socket brings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Receive {
    /// It holds no receive of it.
    #[default]
    Idle,
    /// A receive that goes on until it is cancelled is with the kernel. Always wanted.
    Multishot,
    /// A receive of one buffer is with the kernel.
    Single,
    /// A poll for something to move by pipe is with the kernel.
    Polled,
    /// A multishot receive is being cancelled.
    Stopping,
    /// As `Idle`, and waits for a free buffer.
    Starving,
    /// As `Idle`, until the joined socket has sent everything.
    Held,
}

transitions! { impl[] Receive {
    /// A receive, or a poll in its place, is handed to the kernel.
    arm(operation: Receive) {
        Self::Idle => operation,
    }
    /// A multishot receive is cancelled; others bring one buffer at most.
    stop() {
        Self::Multishot => Self::Stopping,
        Self::Idle => Self::Idle,
        Self::Single => Self::Single,
        Self::Polled => Self::Polled,
        Self::Stopping => Self::Stopping,
        Self::Starving => Self::Starving,
        Self::Held => Self::Held,
    }
    /// The kernel's last completion of it has come.
    complete() {
        Self::Multishot | Self::Single | Self::Polled | Self::Stopping => Self::Idle,
    }
    /// It found no buffer.
    starve() {
        Self::Idle => Self::Starving,
    }
    /// There are buffers again.
    feed() {
        Self::Starving => Self::Idle,
    }
    /// It begins to wait for the joined socket.
    hold() {
        Self::Idle => Self::Held,
    }
    /// That has sent everything.
    resume() {
        Self::Held => Self::Idle,
    }
} }

/// What the kernel has to do with what is to be sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Send {
    /// It holds no send of it.
    #[default]
    Idle,
    /// A send of so many bytes is queued for the kernel, which posts only its failure.
    Submitted(u32),
    /// What is queued waits for room, of which the watch will tell.
    Blocked,
}

transitions! { impl[] Send {
    /// A send of so many bytes is queued for the kernel.
    submit(bytes: u32) {
        Self::Idle => Self::Submitted(bytes),
    }
    /// How it went is known.
    complete() {
        Self::Submitted(_) => Self::Idle,
    }
    /// There was no room for all of it.
    block() {
        Self::Idle => Self::Blocked,
    }
    /// There is room again.
    resume() {
        Self::Blocked => Self::Idle,
    }
} }

/// Whether the driver is to look after a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attention {
    /// Nothing is to be done.
    None,
    /// In the list of sockets to arm or to flush before the next wait.
    Pending,
    /// Its user has closed it, and the kernel still holds operations of it.
    Closing,
}

/// Which operations the kernel holds for a socket: one bit a [`Kind`], at most one operation each.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ops(u8);

impl Ops {
    pub(super) fn add(&mut self, kind: Kind) {
        debug_assert!(!self.has(kind), "{kind:?} twice");
        self.0 |= 1 << kind as u8;
    }

    pub(super) fn remove(&mut self, kind: Kind) {
        self.0 &= !(1 << kind as u8);
    }

    pub(super) fn has(self, kind: Kind) -> bool {
        self.0 & (1 << kind as u8) != 0
    }

    pub(super) fn any(self) -> bool {
        self.0 != 0
    }
}

pub(super) struct Socket {
    pub(super) stream: Stream,
    pub(super) ops: Ops,
    pub(super) receiving: Receiving<Receive>,
    pub(super) sending: Sending<Send>,
    pub(super) attention: Attention,
    /// It brings more than can be passed on: received from one buffer at a time, since a multishot
    /// receive may run many buffers ahead before it can be stopped.
    pub(super) single: bool,
    /// What it brings may be moved to there by pipe.
    pub(super) joined: Option<ConnId>,
    pub(super) bulk: Bulk,
    /// The watch has reported an error. A receive may have to report it yet, behind what has arrived.
    pub(super) has_error: bool,
    /// A move by pipe has taken the error that the next receive was to tell.
    pub(super) error_taken: bool,
    pub(super) queue: Chain,
    /// What is to be sent before the queue.
    pub(super) pipe: Option<Pipe>,
}

impl Socket {
    /// One that is connected.
    pub(super) fn connected(stream: Stream) -> Self {
        Self::new(stream, Sending::Open(Send::Idle))
    }

    /// One that is to be connected.
    pub(super) fn connecting(stream: Stream) -> Self {
        Self::new(stream, Sending::Connecting)
    }

    fn new(stream: Stream, sending: Sending<Send>) -> Self {
        Self {
            stream,
            ops: Ops::default(),
            receiving: Receiving::Unused(Receive::Idle),
            sending,
            attention: Attention::None,
            single: false,
            joined: None,
            bulk: Bulk::default(),
            has_error: false,
            error_taken: false,
            queue: Chain::with_reserve(),
            pipe: None,
        }
    }

    /// Bytes that are to be sent, or being sent.
    pub(super) fn queued(&self) -> u64 {
        u64::from(self.queue.bytes() + self.pipe.as_ref().map_or(0, Pipe::bytes))
    }

    /// Nothing is to be sent, nor being sent.
    pub(super) fn is_flushed(&self) -> bool {
        self.queue.is_empty() && self.pipe.is_none()
    }

    pub(super) fn is_closing(&self) -> bool {
        self.attention == Attention::Closing
    }

    /// What is to be sent waits for room.
    pub(super) fn is_blocked(&self) -> bool {
        self.sending.progress() == Some(Send::Blocked)
    }

    /// A send is with the kernel, of which nothing is known yet.
    pub(super) fn is_submitted(&self) -> bool {
        matches!(self.sending.progress(), Some(Send::Submitted(_)))
    }

    /// It was received from, and is not now, so that no receive would tell of a break.
    pub(super) fn is_paused(&self) -> bool {
        match self.receiving {
            Receiving::Stopped(receive) => {
                matches!(receive, Receive::Idle | Receive::Starving | Receive::Held)
            }
            Receiving::Wanted(receive) => receive == Receive::Held,
            Receiving::Unused(_) | Receiving::Ended => false,
        }
    }

    /// How far receiving is, where the caller knows that it has not ended.
    pub(super) fn receive(&mut self) -> &mut Receive {
        self.receiving.progress_mut().expect("nothing is received behind the end")
    }

    /// How far sending is, where the caller knows that it is open.
    pub(super) fn send(&mut self) -> &mut Send {
        self.sending.progress_mut().expect("something is sent, so that it is open")
    }

    /// Ends the direction towards the peer, if that was asked for. Nothing is queued any more.
    pub(super) fn end_direction(&mut self) {
        debug_assert!(self.is_flushed(), "the end goes behind all bytes");
        if let Sending::Ending(_) = self.sending {
            self.stream.end_direction();
            self.sending.end();
        }
    }
}

/// What the kernel has to do with a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accepting {
    /// It holds no accept of it.
    Idle,
    /// An accept of one client is with the kernel.
    Single,
    /// An accept that goes on until it is cancelled is with the kernel.
    Multishot,
    /// An accept is being cancelled.
    Stopping,
    /// It holds none, and there is nobody to accept any more.
    Over,
}

pub(super) struct Listener {
    /// `None` once it no longer listens.
    pub(super) net: Option<net::Listener>,
    pub(super) transport: net::Transport,
    pub(super) accepting: Accepting,
    /// Its clients are left waiting.
    pub(super) held: bool,
}

impl Listener {
    pub(super) fn new(net: net::Listener) -> Self {
        Self { transport: net.transport(), net: Some(net), accepting: Accepting::Idle, held: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receive_changes_as_its_table_says() {
        use Receive::{Held, Idle, Multishot, Polled, Single, Starving, Stopping};
        let table = Receive::table(&[Idle, Multishot, Single, Polled, Stopping, Starving, Held]);
        let legal: Vec<_> = table.lines().filter(|row| !row.ends_with("illegal")).collect();
        let wanted = [
            "arm: Idle -> Idle",
            "stop: Idle -> Idle",
            "stop: Multishot -> Stopping",
            "stop: Single -> Single",
            "stop: Polled -> Polled",
            "stop: Stopping -> Stopping",
            "stop: Starving -> Starving",
            "stop: Held -> Held",
            "complete: Multishot -> Idle",
            "complete: Single -> Idle",
            "complete: Polled -> Idle",
            "complete: Stopping -> Idle",
            "starve: Idle -> Starving",
            "feed: Starving -> Idle",
            "hold: Idle -> Held",
            "resume: Held -> Idle",
        ];
        // Where it arms to is an argument, here the default.
        assert_eq!(legal, wanted);
    }

    #[test]
    fn a_send_changes_as_its_table_says() {
        let table = Send::table(&[Send::Idle, Send::Submitted(1), Send::Blocked]);
        let legal: Vec<_> = table.lines().filter(|row| !row.ends_with("illegal")).collect();
        let wanted = [
            "submit: Idle -> Submitted(0)",
            "complete: Submitted(1) -> Idle",
            "block: Idle -> Blocked",
            "resume: Blocked -> Idle",
        ];
        assert_eq!(legal, wanted);
    }
}
