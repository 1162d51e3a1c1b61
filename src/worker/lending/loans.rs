//! The connections in clients' hands: given back, dropped, lost.

use crate::io::{Close, ConnId, Driver};
use crate::proxy::exchange::{Fault, Lost};
use crate::slab::Key;
use crate::telemetry::{Discard, Outcome, Retry};
use crate::worker::engine::{Engine, Owner};

impl<D: Driver> Engine<D> {
    /// A connection that a client holds ended or broke.
    pub(in crate::worker) fn on_lent_died(&mut self, key: Key, why: Retry) {
        let spent = self.clients.get(key).is_some_and(|c| c.framing().ends_with_connection());
        let discard = if spent { Discard::Spent } else { Discard::Dead };
        self.judge_lost(key, why);
        self.lose(key, discard, why);
    }

    pub(in crate::worker) fn lose(&mut self, key: Key, discard: Discard, why: Retry) {
        self.drop_loan(key, discard);
        let attempts = self.config.connect_attempts;
        let in_order = why == Retry::Ended && discard != Discard::Endpoint;
        let Some(client) = self.clients.get_mut(key) else { return };
        match client.on_lost(in_order, attempts, self.now) {
            Lost::Idle => {}
            Lost::Answered => self.on_answered(key, false),
            Lost::Repeat => {
                self.stats.count_retry(why);
                self.mark_due(key);
            }
            Lost::Fail => self.give_up(key, Fault::Lost),
            Lost::CutOff => self.cut_off(key, Outcome::Lost),
        }
    }

    /// A client gives its connection back, silent as it is.
    pub(in crate::worker) fn return_loan(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if client.unasked() > 0 {
            // Answered before it was asked.
            return self.drop_loan(key, Discard::Unexpected);
        }
        let Some(loan) = client.loan.take() else { return };
        self.loans -= 1;
        if !client.backend_receiving {
            self.driver.receive(loan.conn, true);
        }
        // Whether there is room for it is seen once those that wait have had theirs.
        let useful = self.keeps_pools();
        let Some(entry) = self.table.get_mut(loan.endpoint) else { return };
        if entry.take_back(&loan, useful, self.now) {
            self.pool_conns += 1;
            let greeting = crate::io::Chain::default();
            self.own(loan.conn, Owner::Warm { endpoint: loan.endpoint, greeting });
            self.free(loan.endpoint);
        } else {
            let aged = loan.retire_at.is_some_and(|at| at <= self.now);
            let why = if aged { Discard::Lifetime } else { Discard::Surplus };
            self.retire(loan.conn, loan.endpoint, why);
        }
    }

    /// A client's connection is of no more use.
    pub(in crate::worker) fn drop_loan(&mut self, key: Key, why: Discard) {
        let loan = self.clients.get_mut(key).and_then(|client| client.loan.take());
        let Some(loan) = loan else { return };
        self.loans -= 1;
        if let Some(entry) = self.table.get_mut(loan.endpoint) {
            entry.on_lent_closed();
        }
        self.retire(loan.conn, loan.endpoint, why);
    }

    /// Closes a connection that was lent. Those that wait may have counted on it.
    pub(in crate::worker) fn retire(&mut self, conn: ConnId, endpoint: u16, why: Discard) {
        self.owner(conn);
        self.stats.count_discard(why);
        // With a reset, so that a backend does not go on with what nobody waits for.
        self.driver.close(conn, Close::Reset);
        if !self.queue.is_empty() {
            self.want(endpoint, 1);
        }
        self.mark_short(endpoint);
        self.table.forget_unused();
    }
}
