//! What holds of a worker's clients at the end of any turn.

use crate::io::Driver;
use crate::proxy::Side;
use crate::proxy::request::Client;
use crate::slab::Key;
use crate::worker::context::Context;
use crate::worker::owners::Owner;
use crate::worker::route::Route;

impl Route {
    /// Checks that each client is where its state says, and nowhere else.
    ///
    /// # Panics
    /// If one is not.
    pub(in crate::worker) fn requests_invariants<D: Driver>(&self, cx: &Context<D>) {
        let requests = &self.requests;
        let keys = (0..requests.clients.slots()).filter_map(|slot| requests.clients.key_at(slot));
        let (mut queued, mut in_use) = (0, 0usize);
        for key in keys {
            let Some(client) = requests.clients.get(key) else { unreachable!("it has a key") };
            client.invariants();
            self.client_invariants(cx, key, client);
            queued += usize::from(client.is_queued());
            in_use += usize::from(client.backend().is_some());
        }
        assert_eq!(requests.queue.len(), queued, "places in the queue");
        assert_eq!(self.pools.table.totals().acquired, in_use, "connections in use");
        assert!(requests.releasing.is_empty(), "connections are released before a turn ends");
        let owned =
            cx.owners.of_route(self.id).filter(|owned| matches!(owned.owner, Owner::InUse(_)));
        assert_eq!(owned.count(), in_use, "connections that clients own");
    }

    fn client_invariants<D: Driver>(&self, cx: &Context<D>, key: Key<Client>, client: &Client) {
        let waits = self.requests.queue.line_of(key).is_some();
        assert_eq!(waits, client.is_queued(), "in the queue if and only if it waits: {client:?}");
        assert_eq!(
            self.requests.due.contains(&key),
            client.is_due(),
            "in the list if and only if it is marked: {client:?}"
        );
        let owner = |side| client.conn(side).and_then(|conn| cx.owners.get(conn));
        let owns_client = matches!(owner(Side::Client), Some(&Owner::Client(of)) if of == key);
        assert!(owns_client, "its connection is another's: {client:?}");
        if client.backend().is_some() {
            let owns = matches!(owner(Side::Backend), Some(&Owner::InUse(of)) if of == key);
            assert!(owns, "its backend's connection is another's: {client:?}");
        }
        if let Some(backend) = client.unanswered_backend() {
            let owed = self.pools.table.owes(backend.conn);
            assert!(owed.is_none_or(|owed| owed), "its age does not count: {client:?}");
        }
        // A timer may fire early, never late.
        let deadline = client.deadline(&self.requests.policy.limits);
        let in_time = deadline.is_none_or(|at| client.timer().is_some_and(|timer| timer <= at));
        assert!(in_time || client.is_due(), "nothing ends its state: {client:?}");
    }
}
