//! Clients of a worker that has more sessions than another go over to that one.
//!
//! The kernel chooses a worker by a hash, so what a worker gets is random: of a few connections all
//! may be its own, and where each request comes on a new one the difference wanders between
//! nothing and everything. Only a client that has just been accepted is handed over, and only once.
//!
//! Where sessions last for less than a second, a difference says only who was on a core lately, and
//! goes away by itself.

use super::engine::Engine;
use super::mailbox::Command;
use crate::io::{ConnId, Driver};

/// A difference of one sixteenth is left as it is, for handing over wakes the other worker up.
const TOLERANCE: usize = 16;

/// The worker with the fewest sessions, and how many it has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lighter {
    worker: usize,
    sessions: usize,
}

impl<D: Driver> Engine<D> {
    /// A worker's sessions, with those on the way to it.
    pub(super) fn load_of(&self, worker: usize) -> usize {
        self.acceptor.everyone[worker].sessions_active.get() as usize
            + self.mail.all[worker].clients()
    }

    /// To be called ten times a second.
    pub(super) fn forget_ended(&mut self) {
        self.load.ended_lately -= self.load.ended_lately.div_ceil(10);
    }

    /// The worker with the fewest sessions; `None` if that may be this one, or matters little.
    pub(super) fn lighter_worker(&self) -> Option<Lighter> {
        // Little's law: fewer are open than short ones end in a second.
        if self.sessions() < self.load.ended_lately {
            return None;
        }
        let others =
            (0..self.acceptor.everyone.len()).filter(|&worker| worker != self.acceptor.index);
        let lighter = others
            .map(|worker| Lighter { worker, sessions: self.load_of(worker) })
            .min_by_key(|lighter| lighter.sessions)?;
        (lighter.sessions < self.sessions() && self.cx.command < Command::Drain).then_some(lighter)
    }

    /// Hands a client over to `lighter` if that has far fewer sessions; else it comes back.
    pub(super) fn hand_over(
        &mut self,
        client: ConnId,
        lighter: &mut Option<Lighter>,
    ) -> Option<ConnId> {
        let Some(to) = lighter else { return Some(client) };
        let own = self.sessions();
        // If it stayed, there would be two more here than there, at least.
        if own <= to.sessions + own / TOLERANCE {
            return Some(client);
        }
        let Some(socket) = self.cx.driver.release(client) else { return Some(client) };
        match self.mail.all[to.worker].hand_over(socket) {
            Ok(()) => {
                to.sessions += 1;
                self.cx.stats.handed_over.add(1);
                None
            }
            Err(socket) => {
                *lighter = None;
                self.cx.driver.adopt(socket)
            }
        }
    }
}
