//! What a worker hears of the control plane and of the other workers, and what it sees of those.

use std::sync::Arc;

use super::mailbox::{Command, Mailbox};
use crate::io::net::Stream;
use crate::metrics::WorkerStats;
use crate::proxy::endpoints::EndpointSnapshot;
use crate::proxy::{RouteId, WorkerId};
use crate::worker::tap::Offer;

/// The mailboxes and counters of all workers.
pub(super) struct Mail {
    worker: WorkerId,
    mailboxes: Arc<[Arc<Mailbox>]>,
    stats: Arc<[Arc<WorkerStats>]>,
    /// Clients may have been handed over.
    has_clients: bool,
}

impl Mail {
    /// Those of `worker` are its own.
    pub(super) fn new(
        worker: WorkerId,
        mailboxes: Arc<[Arc<Mailbox>]>,
        stats: Arc<[Arc<WorkerStats>]>,
    ) -> Self {
        assert_eq!(mailboxes.len(), stats.len(), "one mailbox per worker");
        Self { worker, mailboxes, stats, has_clients: false }
    }

    fn own(&self) -> &Mailbox {
        &self.mailboxes[usize::from(self.worker)]
    }

    /// The worker was woken: from now on the mailbox wakes it again.
    pub(super) fn on_woken(&mut self) {
        self.own().clear_wake();
        self.has_clients = true;
    }

    /// A route's endpoints, if there is news of any.
    pub(super) fn take_snapshot(&self) -> Option<Arc<EndpointSnapshot>> {
        self.own().take_snapshot()
    }

    /// Whether places for connections are to be looked after.
    pub(super) fn take_call_for_places(&self) -> bool {
        self.own().take_call_for_places()
    }

    /// Has another worker look after them.
    pub(super) fn call_for_places(&self, worker: WorkerId) {
        self.mailboxes[usize::from(worker)].call_for_places();
    }

    /// An offer to capture a client, or one that has ended.
    pub(super) fn take_tap(&self) -> Option<Arc<Offer>> {
        self.own().take_tap()
    }

    /// The command in force.
    pub(super) fn command(&self) -> Command {
        self.own().current_command()
    }

    /// A client that another worker has handed over since this one was woken.
    pub(super) fn take_client(&mut self) -> Option<(RouteId, Stream)> {
        if !self.has_clients {
            return None;
        }
        let client = self.own().take_client();
        self.has_clients = client.is_some();
        client
    }

    /// Whether clients wait that were handed over.
    pub(super) fn has_waiting_clients(&self) -> bool {
        self.own().clients() > 0
    }

    /// Hands a client of a route over to another worker.
    ///
    /// # Errors
    /// That one takes no more; the client comes back.
    pub(super) fn hand_over(
        &self,
        to: WorkerId,
        route: RouteId,
        client: Stream,
    ) -> Result<(), Stream> {
        self.mailboxes[usize::from(to)].hand_over(route, client)
    }

    /// How many workers there are.
    pub(super) fn workers(&self) -> usize {
        self.mailboxes.len()
    }

    /// All workers but this one.
    pub(super) fn others(&self) -> impl Iterator<Item = WorkerId> {
        let own = self.worker;
        (0..self.workers()).map(WorkerId::new).filter(move |&worker| worker != own)
    }

    /// Whether a worker knows a route's endpoints as well as this one does.
    pub(super) fn is_up_to_date(&self, worker: WorkerId, route: RouteId) -> bool {
        let applied = |worker: WorkerId| {
            let stats = &self.stats[usize::from(worker)];
            stats.routes[usize::from(route)].applied_generation.get()
        };
        applied(worker) >= applied(self.worker)
    }

    /// A worker's sessions, with those on the way to it.
    pub(super) fn sessions_of(&self, worker: WorkerId) -> usize {
        let worker = usize::from(worker);
        self.stats[worker].sessions.get() as usize + self.mailboxes[worker].clients()
    }

    /// The sessions of a route, of all workers together, with those on the way.
    pub(super) fn sessions_of_route(&self, route: RouteId) -> usize {
        let active =
            |stats: &Arc<WorkerStats>| stats.routes[usize::from(route)].sessions_active.get();
        let on_the_way = self.mailboxes.iter().map(|mailbox| mailbox.clients_of(route));
        self.stats.iter().map(active).sum::<u64>() as usize + on_the_way.sum::<usize>()
    }

    /// Those of all workers together, with those on the way.
    pub(super) fn sessions(&self) -> usize {
        (0..self.workers()).map(|worker| self.sessions_of(WorkerId::new(worker))).sum()
    }
}
