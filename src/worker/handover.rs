//! Clients of a worker that has more sessions than another go over to that one.
//!
//! The kernel chooses a worker by a hash, so what a worker gets is random: of a few connections all
//! may be its own, and where each request comes on a new one the difference wanders between
//! nothing and everything. Only a client that has just been accepted is handed over, and only once.
//!
//! Where sessions last for less than a second, a difference says only who was on a core lately, and
//! goes away by itself.
//!
//! Clients of a route that reuses its connections, and may have fewer of them than there are workers, go
//! to as many workers as it may have connections: others would wait for their turn, and make a new
//! connection each time.
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

    /// Whether a client of a route is better off there. It has far fewer sessions than `own`: if a client
    /// stayed, there would be two more here than there, at least. And it has heard of the endpoints that
    /// are known here: it might know none, and refuse the client.
    fn is_better(&self, own: usize, route: RouteId, mail: &Mail) -> bool {
        let is_far_lighter = self.is_bound || own > self.sessions + own / TOLERANCE;
        is_far_lighter && mail.is_up_to_date(self.worker, route)
    }
}

/// Hands a client of a route over to `lighter` if it is better off there; else it comes back.
pub(super) fn hand_over<D: Driver>(
    cx: &mut Context<D>,
    mail: &Mail,
    (client, route): (ConnId, RouteId),
    lighter: &mut Option<Lighter>,
) -> Option<ConnId> {
    let own = cx.places.taken();
    let is_better = |lighter: &&mut Lighter| lighter.is_better(own, route, mail);
    let Some(to) = lighter.as_mut().filter(is_better) else { return Some(client) };
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::metrics::WorkerStats;
    use crate::worker::mailbox::Mailbox;

    #[test]
    fn a_client_stays_where_its_endpoints_are_known_until_others_know_them() {
        let route = RouteId::default();
        let stats: Arc<[_]> = (0..2).map(|_| Arc::new(WorkerStats::new(1))).collect();
        let mailboxes = (0..2).map(|_| Arc::new(Mailbox::new(1).unwrap()));
        let mail = Mail::new(WorkerId::new(0), mailboxes.collect(), Arc::clone(&stats));
        let is_better = |applied: [u64; 2]| {
            for (stats, generation) in stats.iter().zip(applied) {
                stats.routes[0].applied_generation.set(generation);
            }
            let bound = Lighter::among(2, WorkerId::new(0), &mail);
            [Lighter::than(10, &mail), bound]
                .map(|to| to.is_some_and(|to| to.is_better(10, route, &mail)))
        };
        assert_eq!(is_better([1, 0]), [false; 2], "it has just started");
        assert_eq!(is_better([3, 2]), [false; 2]);
        assert!(is_better([3, 3])[0]);
        assert!(is_better([3, 4])[0]);
    }
}
