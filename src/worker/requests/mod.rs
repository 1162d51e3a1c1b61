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

use std::ops::ControlFlow;

use crate::fifo;
use crate::io::Driver;
use crate::proxy::Side;
use crate::proxy::request::{Action, Actions, Client, Moment};
use crate::slab::Key;
use crate::worker::engine::{Engine, Requests};
use crate::worker::pools::why_not_acquired;

impl<D: Driver> Engine<D> {
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
    pub(in crate::worker) fn serve_clients(&mut self) {
        self.release_backends();
        self.serve_freed();
        while let Some(key) = fifo::pop(&mut self.requests.due) {
            self.serve(key);
            self.serve_freed();
        }
        self.trim_pools();
        self.cx.stats.queue_depth.set(self.requests.queue.len() as u64);
    }

    fn serve(&mut self, key: Key<Client>) {
        // One that was closed since it was marked is nobody's.
        if let Some(client) = self.requests.clients.get_mut(key) {
            client.unmark_due();
        }
        while let Some((client, mut moment)) = self.client(key) {
            match client.next(&mut moment) {
                ControlFlow::Continue(actions) => self.act_for(key, &actions),
                ControlFlow::Break(actions) => return self.act_for(key, &actions),
            }
            self.release_backends();
        }
    }

    /// A client, and what its decisions depend on.
    fn client(&mut self, key: Key<Client>) -> Option<(&mut Client, Moment<'_>)> {
        let Requests { clients, policy, scratch, .. } = &mut self.requests;
        let moment = Moment {
            policy,
            buffers: self.cx.driver.buffers(),
            scratch,
            drains_since: self.acceptor.drains_since,
            now: self.cx.now,
        };
        Some((clients.get_mut(key)?, moment))
    }

    /// Tells a client what happened and does what it answers.
    fn tell(
        &mut self,
        key: Key<Client>,
        event: impl FnOnce(&mut Client, &mut Moment<'_>) -> Actions,
    ) {
        let Some((client, mut moment)) = self.client(key) else {
            unreachable!("whatever names a client is removed as that is closed")
        };
        let actions = event(client, &mut moment);
        self.act_for(key, &actions);
    }

    fn act_for(&mut self, key: Key<Client>, actions: &Actions) {
        for action in actions.iter() {
            self.perform(key, action);
        }
    }

    fn perform(&mut self, key: Key<Client>, action: Action) {
        match action {
            Action::Serve => self.mark_due(key),
            Action::Acquire => self.place(key),
            Action::Prove(conn) => {
                let why_not = why_not_acquired(self.cx.driver.unheard(conn));
                self.tell(key, |client, moment| client.on_proved(why_not, moment));
            }
            Action::LeaveQueue => self.requests.queue.leave(key),
            Action::Waited(time) => self.cx.stats.queue_wait.record(time),
            Action::Send(conn) => self.send_request(key, conn),
            Action::Answered(endpoint, made) => {
                self.pools.on_endpoint_answered(&mut self.cx, endpoint, made);
            }
            Action::Lost(why) => self.on_backend_died(key, why),
            Action::Pause(side) => self.receive_from(key, side, false),
            Action::Resume(side) => self.receive_from(key, side, true),
            Action::Keep(endpoint) => self.keep(key, endpoint),
            Action::ReleaseSoon => self.requests.releasing.push(key),
            Action::Release { conn, paused, asked } => self.release_backend(&conn, paused, asked),
            Action::Discard(conn, why, how) => self.discard_backend(&conn, why, how),
            Action::Count(verb, outcome, took) => self.cx.stats.count_request(verb, outcome, took),
            Action::CountRetry(why) => self.cx.stats.count_retry(why),
            Action::Reply(error, about) => self.reply(key, error, about),
            Action::Fail(error) => {
                let error = self.why_it_waited(key, error);
                self.fail(key, error);
            }
            Action::Shutdown => self.shut_down(key),
            Action::LookBeforeLeaving => self.look_before_leaving(key),
            Action::BecomeOpaque => self.turn_opaque(key),
            Action::Arm(at) => self.arm_client(key, at),
            Action::Close(reason) => self.close_client(key, reason),
        }
    }

    fn receive_from(&mut self, key: Key<Client>, side: Side, on: bool) {
        if let Some(client) = self.requests.clients.get(key)
            && let Some(conn) = client.conn(side)
        {
            self.cx.driver.receive(conn, on);
        }
    }
}
