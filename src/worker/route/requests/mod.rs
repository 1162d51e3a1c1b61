//! A worker's clients where connections serve several of them: doing what the clients decide.
//!
//! Connections are acquired at the end of a turn only, and each is looked at itself as it changes
//! hands: one that is acquired is open and silent, whatever a busy kernel has not told yet.

mod answers;
mod backends;
mod clients;
#[cfg(test)]
mod http_simulation;
#[cfg(test)]
mod invariants;
mod placing;
#[cfg(test)]
mod simulation;

use std::collections::VecDeque;
use std::time::Duration;

use crate::config::{PoolMode, RouteConfig};
use crate::fifo;
use crate::io::Driver;
use crate::proxy::Side;
use crate::proxy::queue::Queue;
use crate::proxy::request::{Action, Actions, Client, Framing, Moment, Policy};
use crate::slab::{Key, Slab};
use crate::worker::context::Context;
use crate::worker::route::Route;
use crate::worker::route::pools::why_not_acquired;

/// Why an event always finds its client.
const NAMED: &str = "whatever names a client is removed as that is closed";

/// Clients whose requests are framed.
pub(in crate::worker) struct Requests {
    pub clients: Slab<Client>,
    pub policy: Policy,
    pub queue: Queue,
    /// Clients to be looked at before the turn ends.
    pub due: VecDeque<Key<Client>>,
    /// Clients whose connection is to be released before the turn ends.
    pub releasing: Vec<Key<Client>>,
    /// For a request that lies in several buffers.
    pub scratch: Box<[u8]>,
}

impl Requests {
    /// None, of as many clients as there are places.
    pub(super) fn new(config: &RouteConfig, drain_delay: Duration, places: usize) -> Self {
        let reuses_conns = config.pool.mode != PoolMode::Preconnect;
        let clients_max = if reuses_conns { places } else { 0 };
        Self {
            clients: Slab::with_capacity(clients_max),
            policy: Policy::new(config, drain_delay),
            queue: Queue::new(config.requests.queue_max, clients_max),
            due: VecDeque::with_capacity(clients_max),
            releasing: Vec::with_capacity(clients_max),
            scratch: vec![0; Framing::scratch_len(config.protocol, &config.requests)].into(),
        }
    }

    /// The client that an event names.
    fn named(&mut self, key: Key<Client>) -> &mut Client {
        let Some(client) = self.clients.get_mut(key) else { unreachable!("{NAMED}") };
        client
    }
}

impl Route {
    /// Has a client served when the turn's events have been handled.
    pub(in crate::worker) fn mark_due(&mut self, key: Key<Client>) {
        if let Some(client) = self.requests.clients.get_mut(key)
            && client.mark_due()
        {
            self.requests.due.push_back(key);
        }
    }

    /// Gives what is idle to those that have waited longest, then serves the clients to which
    /// something has happened.
    pub(in crate::worker) fn serve_clients<D: Driver>(&mut self, cx: &mut Context<D>) {
        self.release_backends(cx);
        self.serve_freed(cx);
        while let Some(key) = fifo::pop(&mut self.requests.due) {
            // One that was closed since it was marked is nobody's.
            if let Some((client, mut moment)) = self.client(cx, key) {
                let actions = client.next(&mut moment);
                self.act_for(cx, key, &actions);
                self.release_backends(cx);
                self.serve_freed(cx);
            }
        }
        self.trim_pools(cx);
        self.stats.queue_depth.set(self.requests.queue.len() as u64);
    }

    /// A client, and what its decisions depend on.
    fn client<'a, D: Driver>(
        &'a mut self,
        cx: &'a mut Context<D>,
        key: Key<Client>,
    ) -> Option<(&'a mut Client, Moment<'a>)> {
        let Requests { clients, policy, scratch, .. } = &mut self.requests;
        let moment = Moment {
            policy,
            buffers: cx.driver.buffers(),
            retries: &mut self.retries,
            scratch,
            drains_since: cx.drain.since(),
            now: cx.now,
        };
        Some((clients.get_mut(key)?, moment))
    }

    /// Tells a client what happened and does what it answers.
    fn tell<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        event: impl FnOnce(&mut Client, &mut Moment<'_>) -> Actions,
    ) {
        let Some((client, mut moment)) = self.client(cx, key) else { unreachable!("{NAMED}") };
        let actions = event(client, &mut moment);
        self.act_for(cx, key, &actions);
    }

    pub(super) fn act_for<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        actions: &Actions,
    ) {
        for action in actions.iter() {
            self.perform(cx, key, action);
        }
    }

    fn perform<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Client>, action: Action) {
        match action {
            Action::Serve => self.mark_due(key),
            Action::Acquire => self.place(cx, key),
            Action::Prove(conn) => {
                let why_not = why_not_acquired(cx.driver.unheard(conn));
                self.tell(cx, key, |client, moment| client.on_proved(why_not, moment));
            }
            Action::LeaveQueue => self.requests.queue.leave(key),
            Action::Asks(endpoint, conn, waited) => {
                self.stats.queue_wait.record(waited);
                if cx.tap.is_running()
                    && let Some(client) = self.conn_of(key)
                {
                    self.tap_endpoint(cx, client, Some(endpoint));
                }
                self.pools.table.asked(endpoint, conn, cx.now);
            }
            Action::Send(conn) => self.send_request(cx, key, conn),
            Action::Lost(why) => self.on_backend_died(cx, key, why),
            Action::Pause(side) => self.receive_from(cx, key, side, false),
            Action::Resume(side) => self.receive_from(cx, key, side, true),
            Action::Keep(endpoint) => self.keep(key, endpoint),
            Action::ReleaseSoon => self.requests.releasing.push(key),
            Action::Discard(conn, endpoint, why, how) => {
                self.discard_backend(cx, conn, endpoint, why, how);
            }
            Action::Count(verb, outcome, took) => {
                self.stats.count_request(verb, outcome, took);
                self.tell_of_request(cx, key, (verb, outcome), took);
            }
            Action::CountRetry(why) => self.stats.count_retry(why),
            Action::CountRefusedRetry => self.stats.retries_refused.add(1),
            Action::Reply(error, store) => self.reply(cx, key, error, store),
            Action::Fail(error) => self.on_waited(cx, key, error),
            Action::Shutdown => self.shut_down(cx, key),
            Action::LookBeforeLeaving => self.look_before_leaving(cx, key),
            Action::BecomeOpaque => self.turn_opaque(cx, key),
            Action::Arm(at) => self.arm_client(cx, key, at),
            Action::Close(reason) => self.close_client(cx, key, reason),
        }
    }

    fn receive_from<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Client>,
        side: Side,
        on: bool,
    ) {
        if let Some(client) = self.requests.clients.get(key)
            && let Some(conn) = client.conn(side)
        {
            cx.driver.receive(conn, on);
        }
    }
}
