//! The turn of a worker: wait for events, pass each on to whom it belongs, then see to the clients that
//! came, the timers, the requests and the pools.

use std::io;
use std::time::Duration;

use super::acceptor::Accepted;
use super::batch::Plan;
use super::engine::Engine;
use super::flush;
use super::handover::{Lighter, hand_over};
use super::mailbox::Command;
#[cfg(test)]
use super::owners::{Owned, Owner};
use super::route::Route;
use crate::io::{Completion, Driver, Wait};
use crate::limits;
use crate::metrics::{CloseReason, WorkerState};
#[cfg(test)]
use crate::proxy::Side;

/// An idle worker still turns this often, which is its sign of life.
const TURN_MAX: Duration = Duration::from_millis(500);

impl<D: Driver> Engine<D> {
    /// Turns until it is to end and the last session has ended.
    ///
    /// # Errors
    /// The driver cannot go on.
    pub fn run(&mut self) -> io::Result<()> {
        self.on_mail();
        while !self.is_finished() {
            self.turn()?;
        }
        // One more, so that the last closes reach the kernel.
        self.cx.driver.wait(Wait::for_one(Duration::ZERO)).map(drop)
    }

    /// Whether it is to end and nothing is left to do.
    pub fn is_finished(&self) -> bool {
        self.cx.command >= Command::Drain
            && !self.acceptor.is_listening()
            && self.sessions() == 0
            && !self.mail.has_waiting_clients()
    }

    /// One turn.
    ///
    /// # Errors
    /// The driver cannot go on.
    pub fn turn(&mut self) -> io::Result<()> {
        self.acceptor.steer(&mut self.cx, &self.mail);
        let wait = self.plan_wait();
        if self.cx.driver.wait(wait)? {
            self.cx.load.batcher.on_sleep();
        }
        self.cx.now = self.cx.driver.now();
        // While this worker slept the others may have taken the room.
        self.acceptor.steer(&mut self.cx, &self.mail);
        let events = self.handle_completions();
        // Of a process that stood still, time limits may be over that were kept.
        let is_behind = self.cx.driver.is_behind();
        self.serve_accepted();
        if self.acceptor.is_done(self.cx.now) {
            self.stop_listening();
        }
        while !is_behind && let Some(slot) = self.cx.timers.pop(self.cx.now) {
            let route = usize::from(self.cx.owners.at(slot).route);
            self.routes[route].on_timer(&mut self.cx, slot);
        }
        for route in &mut self.routes {
            route.look_after_tiers(&mut self.cx);
            route.serve_clients(&mut self.cx);
            route.serve_waiting(&mut self.cx);
            route.refill_short_pools(&mut self.cx);
        }
        if !is_behind && self.cx.now >= self.upkeep_at {
            self.upkeep();
        }
        for route in &mut self.routes {
            route.settle_places(&mut self.cx);
        }
        while let Some(worker) = self.cx.calls.pop() {
            self.mail.call_for_places(worker);
        }
        self.cx.publish(events);
        Ok(())
    }

    fn upkeep(&mut self) {
        self.upkeep_at = self.cx.now + limits::UPKEEP_INTERVAL;
        for route in &mut self.routes {
            route.upkeep(&mut self.cx);
        }
        self.look_at_network();
        self.cx.load.forget_ended();
        self.cx.driver.buffers().release_idle();
    }

    fn plan_wait(&mut self) -> Wait {
        let Plan { events, batch, contended } = self.cx.load.plan(&self.cx.stats, self.cx.now);
        // Where answers of all routes are few at a time, there is no use in waiting for more.
        let answers = self.routes.iter().map(Route::answers_max);
        let answers = answers.reduce(|a, b| Some(a?.saturating_add(b?))).flatten();
        let events = events.min(answers.map_or(events, |answers| answers.max(1)));
        let mut most = self.acceptor.sleep_max().unwrap_or(TURN_MAX);
        if self.routes.iter().any(Route::is_due) {
            most = Duration::ZERO;
        }
        let upkeep_at = self.routes.iter().any(Route::needs_upkeep).then_some(self.upkeep_at);
        let places_at = self.routes.iter().filter_map(Route::wakes_at).min();
        let due = [self.cx.timers.next(), self.acceptor.wakes_at(), upkeep_at, places_at];
        for at in due.into_iter().flatten() {
            most = most.min(at.saturating_duration_since(self.cx.now));
        }
        Wait { events, batch, most, contended }
    }

    /// Handles what the driver has to tell. Returns how many events that were.
    fn handle_completions(&mut self) -> u64 {
        let mut events = 0;
        // No client is let in meanwhile.
        let is_tapped = self.cx.tap.is_running();
        while let Some(completion) = self.cx.driver.next() {
            events += 1;
            if is_tapped {
                self.cx.tap_event(&completion);
            }
            self.on_completion(completion);
        }
        events
    }

    fn on_completion(&mut self, completion: Completion) {
        let conn = match completion {
            Completion::Accepted(conn, listener) => {
                return self.acceptor.on_accepted(&self.cx, conn, listener);
            }
            Completion::AcceptFailed(error) => {
                return self.acceptor.on_failed(&mut self.cx, &error);
            }
            Completion::Woken => return self.on_mail(),
            Completion::Connected(conn)
            | Completion::ConnectFailed(conn, _)
            | Completion::Received(conn, _)
            | Completion::Spliced(conn, _)
            | Completion::Ended(conn)
            | Completion::ReceiveFailed(conn)
            | Completion::Sent(conn, _)
            | Completion::SendFailed(conn) => conn,
        };
        match self.cx.owners.route_of(conn) {
            Some(route) => self.routes[usize::from(route)].on_event(&mut self.cx, completion),
            // It was closed meanwhile.
            None => {
                if let Completion::Received(_, buf) = completion {
                    self.cx.driver.buffers().give(buf);
                }
            }
        }
    }

    /// Serves the clients that this turn brought, last: by now it is known which idle connections
    /// have ended.
    fn serve_accepted(&mut self) {
        let mut accepted = self.acceptor.take_accepted();
        let mut lighter = if accepted.is_empty() { None } else { self.lighter_worker() };
        for Accepted { conn, route, is_shared } in accepted.drain(..) {
            let most = self.routes[usize::from(route)].workers_max();
            let mut bound;
            let to = if most < self.mail.workers() && self.cx.command < Command::Drain {
                bound = Lighter::among(most, self.cx.worker, &self.mail);
                &mut bound
            } else {
                if is_shared {
                    lighter = self.lightest_worker();
                }
                &mut lighter
            };
            if let Some(conn) = hand_over(&mut self.cx, &self.mail, (conn, route), to) {
                self.routes[usize::from(route)].on_client(&mut self.cx, conn);
            }
        }
        self.acceptor.on_served(accepted);
        while let Some((route, client)) = self.mail.take_client() {
            if let Some(conn) = self.cx.driver.adopt(client) {
                self.routes[usize::from(route)].on_client(&mut self.cx, conn);
            }
        }
    }

    /// The worker to hand clients over to; `None` if that may be this one, or matters little.
    fn lighter_worker(&self) -> Option<Lighter> {
        let matters = !self.cx.load.is_of_short_ones(self.sessions());
        self.lightest_worker().filter(|_| matters)
    }

    /// The same for a client that the kernel would have given to any worker.
    fn lightest_worker(&self) -> Option<Lighter> {
        let serves = self.cx.command < Command::Drain;
        Lighter::than(self.sessions(), &self.mail).filter(|_| serves)
    }

    /// Looks into the mailbox.
    fn on_mail(&mut self) {
        self.mail.on_woken();
        while let Some(snapshot) = self.mail.take_snapshot() {
            self.routes[usize::from(snapshot.route)].apply(&mut self.cx, &snapshot);
        }
        if self.mail.take_call_for_places() {
            self.routes.iter_mut().for_each(Route::on_call_for_places);
        }
        if let Some(offer) = self.mail.take_tap() {
            self.cx.tap.on_offer(offer);
        }
        let command = self.mail.command();
        if command > self.cx.command {
            self.on_command(command);
        }
        if self.cx.command > Command::Run {
            self.cx.tap.on_drain();
        }
    }

    /// Goes on to a command, by way of all that come before it.
    fn on_command(&mut self, command: Command) {
        let before = std::mem::replace(&mut self.cx.command, command);
        if before < Command::Leave {
            self.cx.begin_drain();
            self.routes.iter_mut().for_each(Route::look_after_all_clients);
            self.cx.stats.set_state(WorkerState::Draining);
        }
        if before < Command::Drain && command >= Command::Drain {
            self.acceptor.on_drain(&mut self.cx);
        }
        if command == Command::Stop {
            self.stop_listening();
            for route in &mut self.routes {
                route.close_all(&mut self.cx, CloseReason::DrainDeadline);
            }
            flush::end_all(&mut self.cx);
        }
    }

    /// Closes the listeners. The clients that were still in the accept queues become sessions.
    fn stop_listening(&mut self) {
        if self.acceptor.stop_listening(&mut self.cx) {
            self.handle_completions();
            self.serve_accepted();
        }
    }

    /// Checks what holds between two turns.
    #[cfg(test)]
    pub(super) fn assert_invariants(&self) {
        self.acceptor.assert_invariants(&self.cx);
        let served = self.routes.iter().map(|route| route.assert_invariants(&self.cx)).sum();
        let is_flushing = |owned: &&Owned| matches!(owned.owner, Owner::Flushing(_));
        let flushing = self.cx.owners.iter().filter(is_flushing).count();
        self.cx.places.assert_invariants(served, flushing);
        for (slot, owned) in self.cx.owners.iter().enumerate() {
            let needs_timer = matches!(owned.owner, Owner::Connecting { .. } | Owner::Flushing(_));
            let may_have_one = match owned.owner {
                Owner::Session(key, Side::Backend) => {
                    self.routes[usize::from(owned.route)].is_connecting(key)
                }
                Owner::Session(..) | Owner::Client(_) => true,
                _ => needs_timer,
            };
            let is_set = self.cx.timers.is_set(slot);
            assert!(may_have_one || !is_set, "a timer of {:?}", owned.owner);
            assert!(is_set || !needs_timer, "nothing ends {:?}", owned.owner);
        }
    }
}
