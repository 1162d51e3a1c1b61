//! How others speak to a worker: the latest desired state, clients of busier workers, and a
//! wake-up.
//!
//! Nothing here blocks. A snapshot that the worker has not picked up yet is replaced by a newer
//! one, and the command to run, leave, drain or stop only moves forward.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};

use crossbeam_queue::ArrayQueue;
use rustix::event::{EventfdFlags, eventfd};

use crate::io::net::Stream;
use crate::limits;
use crate::proxy::RouteId;
use crate::proxy::endpoints::EndpointSnapshot;
use crate::worker::tap::Offer;

/// What a worker is to do. Commands only move forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Command {
    /// Accept and forward.
    Run = 0,
    /// Go on accepting and forwarding; clients whose requests are framed leave with none under
    /// way.
    Leave = 1,
    /// Empty the accept queue, stop accepting, end the thread once the last session has finished.
    Drain = 2,
    /// End every session now, then the thread.
    Stop = 3,
}

/// The mailbox of one worker.
#[derive(Debug)]
pub struct Mailbox {
    /// One for each route.
    snapshots: Box<[ArrayQueue<Arc<EndpointSnapshot>>]>,
    clients: ArrayQueue<(RouteId, Stream)>,
    /// How many of those that wait are of each route; one more for a moment.
    clients_of: Box<[AtomicUsize]>,
    command: AtomicU8,
    /// Places for connections have changed.
    places: AtomicBool,
    tap: ArrayQueue<Arc<Offer>>,
    wake: OwnedFd,
}

impl Mailbox {
    /// An empty mailbox for so many routes, with the command to run.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(routes: usize) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self {
            snapshots: (0..routes).map(|_| ArrayQueue::new(1)).collect(),
            clients: ArrayQueue::new(limits::HANDED_OVER_MAX),
            clients_of: (0..routes).map(|_| AtomicUsize::new(0)).collect(),
            command: AtomicU8::new(Command::Run as u8),
            places: AtomicBool::new(false),
            tap: ArrayQueue::new(1),
            wake,
        })
    }

    /// Replaces the snapshot of its route that waits for the worker, and wakes it.
    pub fn deliver(&self, snapshot: Arc<EndpointSnapshot>) {
        self.snapshots[usize::from(snapshot.route)].force_push(snapshot);
        self.wake();
    }

    /// Gives a command and wakes the worker. One below the current one changes nothing.
    pub fn command(&self, command: Command) {
        self.command.fetch_max(command as u8, Ordering::Release);
        self.wake();
    }

    /// Hands a client of a route over to the worker, and wakes it. From another worker.
    ///
    /// # Errors
    /// The worker takes no more: it is to end, or too many wait already. The client
    /// comes back.
    pub fn hand_over(&self, route: RouteId, client: Stream) -> Result<(), Stream> {
        if self.current_command() >= Command::Drain {
            return Err(client);
        }
        self.clients_of[usize::from(route)].fetch_add(1, Ordering::Relaxed);
        if let Err((_, client)) = self.clients.push((route, client)) {
            self.clients_of[usize::from(route)].fetch_sub(1, Ordering::Relaxed);
            return Err(client);
        }
        // The command may have come in between, and the worker have ended without another look.
        if self.current_command() >= Command::Drain
            && let Some((_, client)) = self.take_client()
        {
            return Err(client);
        }
        self.wake();
        Ok(())
    }

    /// Has the worker look after the places for connections: one was passed on to it, or others want
    /// one of those that it has. From another worker.
    pub fn call_for_places(&self) {
        if !self.places.swap(true, Ordering::AcqRel) {
            self.wake();
        }
    }

    /// Whether that is to be done, once. For the worker.
    pub fn take_call_for_places(&self) -> bool {
        self.places.load(Ordering::Relaxed) && self.places.swap(false, Ordering::AcqRel)
    }

    /// Makes an offer to capture a client, or has the worker see that one has ended.
    pub fn offer_tap(&self, offer: Arc<Offer>) {
        self.tap.force_push(offer);
        self.wake();
    }

    /// Whether the worker has seen the latest one.
    pub fn has_seen_tap(&self) -> bool {
        self.tap.is_empty()
    }

    /// An offer that the worker has not seen. For the worker.
    pub fn take_tap(&self) -> Option<Arc<Offer>> {
        self.tap.pop()
    }

    /// A client that was handed over, if any waits. For the worker.
    pub fn take_client(&self) -> Option<(RouteId, Stream)> {
        let (route, client) = self.clients.pop()?;
        self.clients_of[usize::from(route)].fetch_sub(1, Ordering::Relaxed);
        Some((route, client))
    }

    /// How many clients of a route wait.
    pub fn clients_of(&self, route: RouteId) -> usize {
        self.clients_of[usize::from(route)].load(Ordering::Relaxed)
    }

    /// How many clients wait.
    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    /// A snapshot that waits, if any does. For the worker.
    pub fn take_snapshot(&self) -> Option<Arc<EndpointSnapshot>> {
        self.snapshots.iter().find_map(ArrayQueue::pop)
    }

    /// The command in force. For the worker.
    pub fn current_command(&self) -> Command {
        match self.command.load(Ordering::Acquire) {
            0 => Command::Run,
            1 => Command::Leave,
            2 => Command::Drain,
            _ => Command::Stop,
        }
    }

    /// The descriptor that turns readable when there is news.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Makes the wake-up descriptor unreadable again. For the worker, before it looks for news.
    pub fn clear_wake(&self) {
        let mut count = [0; 8];
        // Not readable means that there was nothing to clear.
        let _ = rustix::io::read(&self.wake, &mut count);
    }

    fn wake(&self) {
        // The only failure is a counter at its maximum, and then the descriptor is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_snapshot_wins_and_commands_only_move_forward() {
        let mailbox = Mailbox::new(2).unwrap();
        for (route, generation) in [(0, 1), (1, 2), (0, 3), (1, 4)] {
            mailbox.deliver(Arc::new(EndpointSnapshot {
                route: RouteId::at(route),
                generation,
                endpoints: Vec::new(),
                ..EndpointSnapshot::default()
            }));
        }
        assert_eq!(mailbox.take_snapshot().map(|s| s.generation), Some(3));
        assert_eq!(
            mailbox.take_snapshot().map(|s| s.generation),
            Some(4),
            "each route has its own"
        );
        assert!(mailbox.take_snapshot().is_none());
        mailbox.command(Command::Stop);
        mailbox.command(Command::Drain);
        assert_eq!(mailbox.current_command(), Command::Stop);
    }
}
