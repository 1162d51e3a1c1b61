//! What the driver keeps of a socket, and what the kernel holds of it.

use std::mem;
use std::os::fd::OwnedFd;

use crate::io::ConnId;
use crate::io::buffers::Chain;
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

/// The receiving half of a socket.
///
/// ```text
///         ┌──arm──▶ Multishot ──stop──▶ Stopping ─┐
///         │             │                         │
/// Held ◀─ Idle ──arm──▶ Single, Polled ───────────┤ last completion
///   └─────▶▲                                      │
///          └──────────────────────────────────────┴──the peer ended or broke──▶ Ended
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Receiving {
    /// The kernel holds no receive of it.
    Idle,
    /// A receive that goes on until it is cancelled is with the kernel.
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
    /// The peer's direction has ended or failed, as was told.
    Ended,
}

/// The sending half of a socket.
///
/// ```text
///  ┌────────┬────all taken─────┐
///  ▼        │                  │
/// Idle ──▶ Submitted ──no room──▶ Blocked ──room──▶ Idle        any ──error──▶ Broken
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sending {
    /// The kernel holds no send of it.
    Idle,
    /// A send of so many bytes is queued for the kernel, which posts only its failure.
    Submitted(u32),
    /// What is queued waits for room, of which the watch will tell.
    Blocked,
    /// Nothing more can be sent, as was told.
    Broken,
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

#[allow(
    clippy::struct_excessive_bools,
    reason = "independent facts, each told by the kernel or the user"
)]
pub(super) struct Socket {
    pub(super) fd: OwnedFd,
    pub(super) ops: Ops,
    pub(super) receiving: Receiving,
    pub(super) sending: Sending,
    /// The user wants to receive.
    pub(super) wanted: bool,
    /// The user has wanted to, and does not now.
    pub(super) stopped: bool,
    /// It brings more than can be passed on: received from one buffer at a time, since a multishot
    /// receive may run many buffers ahead before it can be stopped.
    pub(super) single: bool,
    /// What it brings may be moved to there by pipe.
    pub(super) joined: Option<ConnId>,
    pub(super) bulk: Bulk,
    /// The watch has told of an error. A receive may have to tell it yet, behind what has arrived.
    pub(super) has_error: bool,
    /// A move by pipe has taken the error that the next receive was to tell.
    pub(super) error_taken: bool,
    /// In the list of sockets to arm or to flush before the next wait.
    pub(super) pending: bool,
    /// The direction towards the peer is to end behind what is queued.
    pub(super) shutdown: bool,
    pub(super) closing: bool,
    pub(super) queue: Chain,
    /// What is to be sent before the queue.
    pub(super) pipe: Option<Pipe>,
}

impl Socket {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            ops: Ops::default(),
            receiving: Receiving::Idle,
            sending: Sending::Idle,
            wanted: false,
            stopped: false,
            single: false,
            joined: None,
            bulk: Bulk::default(),
            has_error: false,
            error_taken: false,
            pending: false,
            shutdown: false,
            closing: false,
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

    /// What is to be sent waits for room.
    pub(super) fn is_blocked(&self) -> bool {
        self.sending == Sending::Blocked
    }

    /// It was received from, and is not now, so that no receive would tell of a break.
    pub(super) fn is_paused(&self) -> bool {
        match self.receiving {
            Receiving::Held => true,
            Receiving::Idle | Receiving::Starving => self.stopped,
            _ => false,
        }
    }

    /// Ends the direction towards the peer, if that was asked for. Nothing is queued any more.
    pub(super) fn end_direction(&mut self) {
        debug_assert!(self.is_flushed(), "the end goes behind all bytes");
        if mem::take(&mut self.shutdown) {
            // Never blocks, and its failure shows in the next operation.
            let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write);
        }
    }
}

pub(super) struct Listener {
    /// `None` once it no longer listens.
    pub(super) fd: Option<OwnedFd>,
    /// An accept is with the kernel: `Some(true)` if it is a multishot one.
    pub(super) armed: Option<bool>,
    pub(super) stopping: bool,
}
