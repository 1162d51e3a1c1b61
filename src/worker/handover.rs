//! Clients of a worker that has more sessions than another go over to that one.
//!
//! The kernel chooses a worker by a hash, so what a worker gets is random: of a few connections all
//! may be its own, and where each request comes on a new one the difference wanders between
//! nothing and everything. Only a client that has just been accepted is handed over, and only once.
//!
//! Where sessions last for less than a second, a difference says only who was on a core lately, and
//! goes away by itself.
//!
//! Clients of a route with fewer connections than workers go to as many workers as it has connections:
//! others would wait for their turn with each request.
//!
//! A Unix socket is listened on by all workers together, and the kernel wakes the first of them that
//! waits: on `io_uring` that is the same one for all clients, on epoll the next one only while that one
//! is busy. So each such client goes to whoever has the fewest sessions then, however long those last.

use super::context::Context;
use super::mail::Mail;
use crate::io::{ConnId, Driver};
use crate::proxy::{RouteId, WorkerId};

/// A difference of one sixteenth is left as it is, for handing over wakes the other worker up.
const TOLERANCE: usize = 16;

/// The worker with the fewest sessions, and how many it has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lighter {
    worker: WorkerId,
    sessions: usize,
    /// However many it has.
    is_bound: bool,
}

impl Lighter {
    /// The other worker with the fewest sessions, if that is fewer than `own`.
    pub(super) fn than(own: usize, mail: &Mail) -> Option<Self> {
        let others = mail.others().map(|worker| Self::at(worker, mail));
        others.min_by_key(|lighter| lighter.sessions).filter(|lighter| lighter.sessions < own)
    }

    fn at(worker: WorkerId, mail: &Mail) -> Self {
        Self { worker, sessions: mail.sessions_of(worker), is_bound: false }
    }

    /// The one of the first `most` workers with the fewest sessions: for a client that only those
    /// serve, and the `worker` that has accepted it does not.
    pub(super) fn among(most: usize, worker: WorkerId, mail: &Mail) -> Option<Self> {
        let serve = (0..most).map(WorkerId::new);
        let lightest = serve.map(|worker| Self::at(worker, mail)).min_by_key(|one| one.sessions);
        let is_bound = usize::from(worker) >= most;
        let other = lightest.filter(|lightest| lightest.worker != worker);
        other.map(|lightest| Self { is_bound, ..lightest })
    }

    /// Whether it has far fewer than `own`: if a client stayed, there would be two more here than
    /// there, at least.
    fn is_far_lighter_than(&self, own: usize) -> bool {
        self.is_bound || own > self.sessions + own / TOLERANCE
    }
}

/// Hands a client of a route over to `lighter` if that has far fewer sessions; else it comes back.
pub(super) fn hand_over<D: Driver>(
    cx: &mut Context<D>,
    mail: &Mail,
    (client, route): (ConnId, RouteId),
    lighter: &mut Option<Lighter>,
) -> Option<ConnId> {
    let own = cx.places.taken();
    let Some(to) = lighter.as_mut().filter(|lighter| lighter.is_far_lighter_than(own)) else {
        return Some(client);
    };
    let Some(socket) = cx.driver.release(client) else { return Some(client) };
    match mail.hand_over(to.worker, route, socket) {
        Ok(()) => {
            to.sessions += 1;
            cx.stats.handed_over.add(1);
            None
        }
        Err(socket) => {
            *lighter = None;
            cx.driver.adopt(socket)
        }
    }
}
