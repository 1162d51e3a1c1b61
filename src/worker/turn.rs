//! The turn of a worker: wait for events, pass each on to whom it belongs, then see to the clients that
//! came, the timers, the requests and the pools.

use std::io;
use std::time::{Duration, Instant};

use super::batch::Plan;
use super::engine::Engine;
use super::flush;
use super::handover::{Lighter, hand_over};
use super::mailbox::Command;
use super::owners::{Owned, Owner};
use super::pools::leads_back;
use crate::io::{Close, Completion, ConnId, Driver, Wait};
use crate::limits;
use crate::metrics::{CloseReason, Retry, WorkerState};
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
            self.load.batcher.on_sleep();
        }
        self.cx.now = self.cx.driver.now();
        // While this worker slept the others may have taken the room.
        self.acceptor.steer(&mut self.cx, &self.mail);
        let events = self.handle_completions();
        self.serve_accepted();
        if self.acceptor.is_done(self.cx.now) {
            self.stop_listening();
        }
        while let Some(slot) = self.cx.timers.pop(self.cx.now) {
            self.on_timer(slot);
        }
        self.serve_clients();
        self.refill_short_pools();
        if self.cx.now >= self.pools.upkeep_at {
            self.pools.upkeep_at = self.cx.now + limits::UPKEEP_INTERVAL;
            self.upkeep();
            self.load.forget_ended();
            self.cx.driver.buffers().release_idle();
        }
        self.cx.publish(events);
        Ok(())
    }

    fn plan_wait(&mut self) -> Wait {
        let Plan { events, batch, contended } = self.load.plan(&self.cx.stats, self.cx.now);
        // Few connections for many clients bring few answers at a time.
        let events = if self.reuses_conns() {
            events.min((self.pools.table.totals().acquired as u32 / 2).max(1))
        } else {
            events
        };
        let mut most = self.acceptor.sleep_max().unwrap_or(TURN_MAX);
        if !(self.requests.due.is_empty() && self.pools.freed.is_empty()) {
            most = Duration::ZERO;
        }
        let due = [self.cx.timers.next(), self.acceptor.wakes_at(), self.pools_need_upkeep_at()];
        for at in due.into_iter().flatten() {
            most = most.min(at.saturating_duration_since(self.cx.now));
        }
        Wait { events, batch, most, contended }
    }

    /// Without idle connections or endpoints to watch there is nothing to look over.
    fn pools_need_upkeep_at(&self) -> Option<Instant> {
        self.pools.table.has_entries().then_some(self.pools.upkeep_at)
    }

    /// Handles what the driver has to tell. Returns how many events that were.
    fn handle_completions(&mut self) -> u64 {
        let mut events = 0;
        while let Some(completion) = self.cx.driver.next() {
            events += 1;
            self.on_completion(completion);
        }
        events
    }

    fn on_completion(&mut self, completion: Completion) {
        match completion {
            Completion::Accepted(conn) => self.acceptor.on_accepted(conn),
            Completion::AcceptFailed(error) => self.acceptor.on_failed(&mut self.cx, &error),
            Completion::Connected(conn) => self.on_connected(conn),
            Completion::ConnectFailed(conn, error) => self.on_connect_failed(conn, &error),
            Completion::Received(conn, buf) => match self.cx.owners.get(conn) {
                Some(&Owner::Session(key, side)) => {
                    let (cx, load) = (&mut self.cx, &mut self.load);
                    let outcome = self.sessions.on_received(cx, load, key, side, buf);
                    self.follow(key, outcome);
                }
                Some(&Owner::Client(client)) => self.on_client_received(client, buf),
                Some(&Owner::InUse(client)) => self.on_reply(client, buf),
                Some(Owner::Idle { .. }) => self.on_greeting(conn, buf),
                _ => self.cx.driver.buffers().give(buf),
            },
            Completion::Spliced(conn, bytes) => {
                if let Some(&Owner::Session(key, side)) = self.cx.owners.get(conn) {
                    let (cx, load) = (&mut self.cx, &mut self.load);
                    let outcome = self.sessions.on_spliced(cx, load, key, side, bytes);
                    self.follow(key, outcome);
                }
            }
            Completion::Sent(conn, bytes) => match self.cx.owners.get(conn) {
                Some(&Owner::Session(key, side)) => {
                    let outcome = self.sessions.on_sent(&mut self.cx, key, side, bytes);
                    self.follow(key, outcome);
                }
                Some(&Owner::Client(client)) => self.on_client_sent(client, bytes),
                Some(&Owner::InUse(client)) => self.on_backend_sent(client, bytes),
                _ => {}
            },
            Completion::Ended(conn) => self.on_conn_ended(conn),
            Completion::ReceiveFailed(conn) => self.on_conn_broken(conn),
            Completion::SendFailed(conn) => self.on_conn_takes_nothing(conn),
            Completion::Woken => self.on_mail(),
        }
    }

    fn on_connected(&mut self, conn: ConnId) {
        if self.pools.leads_back(&self.cx, conn) {
            return self.on_connect_failed(conn, &leads_back());
        }
        match self.cx.owners.take(conn) {
            Owner::Session(session, _) => self.on_session_connected(session, conn),
            Owner::Connecting { endpoint, since } => self.on_pool_connected(endpoint, conn, since),
            _ => {}
        }
    }

    fn on_connect_failed(&mut self, conn: ConnId, error: &io::Error) {
        match self.cx.owners.take(conn) {
            Owner::Session(session, _) => self.on_session_connect_failed(session, conn, error),
            Owner::Connecting { endpoint, .. } => {
                self.on_pool_connect_failed(endpoint, conn, error);
            }
            _ => {}
        }
    }

    fn on_conn_ended(&mut self, conn: ConnId) {
        match self.cx.owners.get(conn) {
            Some(&Owner::Session(session, side)) => self.on_ended(session, side),
            Some(&Owner::Client(client)) => self.on_client_ended(client),
            Some(&Owner::InUse(client)) => self.on_backend_died(client, Retry::Ended),
            Some(&Owner::Idle { endpoint, .. }) => self.on_idle_died(endpoint, conn),
            _ => {}
        }
    }

    fn on_conn_broken(&mut self, conn: ConnId) {
        match self.cx.owners.get(conn) {
            Some(&Owner::Session(session, side)) => self.on_receive_failed(session, side),
            Some(&Owner::Client(client)) => self.on_client_broken(client, Side::Client),
            Some(&Owner::InUse(client)) => self.on_client_broken(client, Side::Backend),
            Some(&Owner::Idle { endpoint, .. }) => self.on_idle_died(endpoint, conn),
            Some(Owner::Flushing(_)) => flush::end(&mut self.cx, conn),
            _ => {}
        }
    }

    fn on_conn_takes_nothing(&mut self, conn: ConnId) {
        match self.cx.owners.get(conn) {
            Some(&Owner::Session(session, side)) => {
                self.apply(session, |session, now| session.on_send_failed(side, now));
            }
            Some(&Owner::Client(client)) => self.on_client_broken(client, Side::Client),
            Some(&Owner::InUse(client)) => self.on_backend_broken(client),
            Some(Owner::Flushing(_)) => flush::end(&mut self.cx, conn),
            _ => {}
        }
    }

    fn on_timer(&mut self, slot: usize) {
        let &Owned { conn, ref owner } = self.cx.owners.at(slot);
        match *owner {
            Owner::Session(session, Side::Client) => self.on_session_deadline(session),
            Owner::Session(_, Side::Backend) | Owner::Connecting { .. } => {
                self.on_connect_failed(conn, &io::ErrorKind::TimedOut.into());
            }
            Owner::Client(client) => self.on_client_deadline(client),
            Owner::Flushing(flushing) => flush::on_timer(&mut self.cx, conn, flushing),
            Owner::InUse(_) | Owner::Idle { .. } | Owner::None => {
                debug_assert!(false, "a timer of {owner:?}, for whom none is set");
            }
        }
    }

    /// Serves the clients that this turn brought, last: by now it is known which idle connections
    /// have ended.
    fn serve_accepted(&mut self) {
        let mut accepted = self.acceptor.take_accepted();
        let mut lighter = if accepted.is_empty() { None } else { self.lighter_worker() };
        for conn in accepted.drain(..) {
            if let Some(conn) = hand_over(&mut self.cx, &self.mail, conn, &mut lighter) {
                self.admit(conn);
            }
        }
        self.acceptor.on_served(accepted);
        while let Some(client) = self.mail.take_client() {
            if let Some(conn) = self.cx.driver.adopt(client) {
                self.admit(conn);
            }
        }
    }

    /// The worker to hand clients over to; `None` if that may be this one, or matters little.
    fn lighter_worker(&self) -> Option<Lighter> {
        let own = self.sessions();
        if self.load.is_of_short_ones(own) || self.cx.command >= Command::Drain {
            return None;
        }
        Lighter::than(own, &self.mail)
    }

    fn admit(&mut self, client: ConnId) {
        self.cx.stats.sessions_opened.add(1);
        if !self.cx.places.admit() {
            self.cx.stats.count_close(CloseReason::Overload);
            return self.cx.driver.close(client, Close::Reset);
        }
        self.cx.publish_sessions();
        if self.reuses_conns() {
            self.on_client(client);
        } else {
            self.on_accepted(client);
        }
    }

    /// Looks into the mailbox.
    fn on_mail(&mut self) {
        self.mail.on_woken();
        if let Some(snapshot) = self.mail.take_snapshot() {
            let slow_start = self.cx.config.slow_start.is_some();
            self.pools.table.apply(&snapshot, &self.cx.config.pool, slow_start, self.cx.now);
            self.evict_removed();
            self.cx.stats.applied_generation.set(snapshot.generation);
            self.pools.short.clear();
            self.pools.short.extend(self.pools.table.indices());
            if !self.pools.table.is_empty() {
                self.dispatch_waiting();
            }
            self.place_waiting_again();
        }
        let command = self.mail.command();
        if command > self.cx.command {
            self.on_command(command);
        }
    }

    /// Goes on to a command, by way of all that come before it.
    fn on_command(&mut self, command: Command) {
        let before = std::mem::replace(&mut self.cx.command, command);
        if before < Command::Leave {
            self.acceptor.on_leave(&self.cx);
            self.look_after_all_clients();
            self.cx.stats.set_state(WorkerState::Draining);
        }
        if before < Command::Drain && command >= Command::Drain {
            self.acceptor.on_drain(&mut self.cx);
        }
        if command == Command::Stop {
            self.stop_listening();
            self.close_all_sessions(CloseReason::DrainDeadline);
            self.close_all_clients(CloseReason::DrainDeadline);
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

    /// A session or a client is gone.
    pub(super) fn on_session_gone(&mut self, reason: CloseReason, age: Duration) {
        self.cx.stats.count_close(reason);
        self.cx.stats.session_duration.record(age);
        self.load.on_gone(age);
        self.acceptor.on_gone(&self.cx, age);
        self.cx.places.on_gone();
        self.cx.publish_sessions();
    }

    /// Checks what holds between two turns.
    #[cfg(test)]
    pub(super) fn assert_invariants(&self) {
        self.acceptor.assert_invariants(&self.cx);
        self.sessions.assert_invariants(&self.cx);
        self.assert_pool_invariants();
        self.requests_invariants();
        let is_flushing = |owned: &&Owned| matches!(owned.owner, Owner::Flushing(_));
        let flushing = self.cx.owners.iter().filter(is_flushing).count();
        self.cx
            .places
            .assert_invariants(self.sessions.len() + self.requests.clients.len(), flushing);
        for (slot, owned) in self.cx.owners.iter().enumerate() {
            let needs_timer = matches!(owned.owner, Owner::Connecting { .. } | Owner::Flushing(_));
            let may_have_one = match owned.owner {
                Owner::Session(key, Side::Backend) => {
                    self.sessions.get(key).is_some_and(|session| !session.is_open())
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
