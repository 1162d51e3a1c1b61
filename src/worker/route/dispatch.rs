//! Finds sessions a backend, and does for them what concerns the pools.

use std::io;
use std::net::IpAddr;
use std::time::Instant;

use super::Route;
use super::pools::is_local;
use super::sessions::Outcome;
use crate::config::Balance;
use crate::io::{Chain, Close, ConnId, Driver};
use crate::metrics::{Checkout, CloseReason};
use crate::proxy::Side;
use crate::proxy::balance::Fit;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::session::{Action, Session, Tried};
use crate::slab::Key;
use crate::worker::context::Context;
use crate::worker::owners::Owner;

impl Route {
    pub(super) fn begin_session<D: Driver>(&mut self, cx: &mut Context<D>, client: ConnId) {
        let key = self.sessions.begin(cx, client);
        self.retries.on_request(cx.now);
        let others_wait = !self.sessions.line.is_empty();
        if others_wait || (self.may_wait() && self.pools.table.is_outage(cx.now)) {
            let reason = self.why_unusable();
            self.have_wait(cx, key, reason);
        } else {
            self.dispatch(cx, key, CloseReason::NoEndpoint);
        }
        self.sessions.listen_to_early(cx, key);
    }

    /// Does for a session what concerns others than itself.
    pub(super) fn follow<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        outcome: Outcome,
    ) {
        match outcome {
            Outcome::Done => {}
            Outcome::Asked => self.on_session_asked(cx, key),
            Outcome::Answered => self.on_session_answered(cx, key),
            Outcome::Replied => self.on_session_replied(cx, key),
            Outcome::Cancels => self.serve_cancel(cx, key),
            Outcome::Over(reason) => self.close_session(cx, key, reason),
        }
    }

    /// Finds the session a backend: an idle connection, or one made for it. When there is no endpoint
    /// left to try, it waits, or is closed for `otherwise`.
    pub(super) fn dispatch<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        mut otherwise: CloseReason,
    ) {
        loop {
            let session = self.sessions.of(key);
            let (client, tried) = (session.client(), *session.tried());
            let is_cancel = session.cancel().is_some();
            let chosen = if is_cancel {
                self.pools.table.next_of_all(session.cancel_reached(), &tried)
            } else if self.may_wait() {
                self.choose_fit(cx, client, &tried, Fit::Usable)
            } else {
                self.choose(cx, client, &tried, otherwise)
            };
            let Some(endpoint) = chosen else {
                return self.on_none_left(cx, key, otherwise);
            };
            if !self.has_conn_for_session(cx, key, endpoint) {
                if self.pools.table.is_full(cx.now) {
                    return self.have_wait(cx, key, otherwise);
                }
                // Another worker was faster, and one has given a place back since.
                continue;
            }
            let costs = !is_cancel
                && matches!(otherwise, CloseReason::ConnectFailed | CloseReason::ConnectTimeout);
            if costs && !self.takes_retry(cx) {
                // The place is for others.
                self.pools.look_after_places();
                return self.on_none_left(cx, key, otherwise);
            }
            if tried.attempts() > 0 && !is_cancel {
                self.stats.connect_retries.add(1);
            }
            match self.try_endpoint(cx, key, endpoint) {
                Ok(()) => return,
                Err(error) if is_local(&error) => {
                    tracing::debug!(%error, "cannot connect");
                    return self.close_session(cx, key, CloseReason::Overload);
                }
                Err(error) => {
                    self.pools.on_endpoint_unreachable(cx, endpoint, &error);
                    self.leave_endpoint(cx, key);
                    otherwise = CloseReason::ConnectFailed;
                }
            }
        }
    }

    /// The endpoint to try next for a session whose latest attempt ended for `otherwise`, where none
    /// waits: should no usable one be left, any.
    fn choose<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        client: ConnId,
        tried: &Tried,
        otherwise: CloseReason,
    ) -> Option<EndpointId> {
        if tried.attempts() >= self.config.connect_attempts {
            return None;
        }
        // A handshake that got lost, in a full accept queue for one, is worth another try, and so is
        // the endpoint of an idle connection that was dead. A refusal is an answer.
        let lost = matches!(otherwise, CloseReason::ConnectTimeout | CloseReason::BackendReset);
        let source = self.source_of(cx, client);
        let chosen = self.choose_untried(cx, tried, Fit::Any, source);
        if chosen.is_some() || !lost {
            return chosen;
        }
        self.choose_untried(cx, &Tried::default(), Fit::Any, source)
    }

    /// The endpoint to try next for a session, of those that are fit for it now.
    pub(super) fn choose_fit<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        client: ConnId,
        tried: &Tried,
        fit: Fit,
    ) -> Option<EndpointId> {
        if tried.attempts() >= self.config.connect_attempts {
            return None;
        }
        let source = self.source_of(cx, client);
        self.choose_untried(cx, tried, fit, source)
    }

    fn choose_untried<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        tried: &Tried,
        fit: Fit,
        source: Option<IpAddr>,
    ) -> Option<EndpointId> {
        let (table, rng) = (&mut self.pools.table, &mut cx.rng);
        if !self.config.locality.prefers_near() {
            return table.choose(fit, tried, source, cx.now, rng);
        }
        let (chosen, spilled) = table.choose_near(fit, tried, source, cx.now, rng);
        spilled.inspect(|&why| self.stats.count_spillover(why));
        chosen
    }

    /// Where a client comes from, if that says where it goes.
    fn source_of<D: Driver>(&self, cx: &Context<D>, client: ConnId) -> Option<IpAddr> {
        (self.config.balance == Balance::SourceHash)
            .then(|| cx.driver.peer_address(client))
            .flatten()
            .map(|address| address.ip())
    }

    /// There is no endpoint left to try for a session. It waits for one, if it may.
    fn on_none_left<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        otherwise: CloseReason,
    ) {
        let session = self.sessions.of(key);
        if session.is_cancel_delivered() {
            return self.close_session(cx, key, CloseReason::Finished);
        }
        // A cancel request that reaches nobody has nothing to wait for.
        let is_cancel = session.cancel().is_some();
        let may_try = session.tried().attempts() < self.config.connect_attempts;
        let is_full = may_try && self.pools.table.is_full(cx.now);
        if (self.may_wait() || is_full) && !is_cancel {
            self.have_wait(cx, key, otherwise);
        } else {
            self.give_up(cx, key, otherwise);
        }
    }

    /// Whether there is an idle connection for a session, or a place for another one. A cancel request
    /// has one beyond all others.
    pub(super) fn has_conn_for_session<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        endpoint: EndpointId,
    ) -> bool {
        self.pools.prove_oldest(cx, endpoint);
        let is_cancel = self.sessions.of(key).cancel().is_some();
        let table = &mut self.pools.table;
        if table.get(endpoint).is_some_and(|entry| entry.pool.oldest_conn(cx.now).is_some())
            || table.reserve(endpoint, cx.now)
            || (is_cancel && table.reserve_beyond(endpoint, cx.now))
        {
            return true;
        }
        // One that is too old to be used makes room.
        self.pools.give_up_oldest(cx, endpoint);
        false
    }

    pub(super) fn try_endpoint<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        endpoint: EndpointId,
    ) -> io::Result<()> {
        let warm = self.pools.table.enter(endpoint, cx.now);
        self.pools.mark_short(endpoint);
        self.sessions.of(key).on_trying(endpoint, warm.map(|(conn, _)| conn), cx.now);
        if let Some((backend, made)) = warm {
            self.sessions.of(key).on_warm(made);
            self.stats.count_checkout(Checkout::Hit);
            self.stats.queue_wait.record(self.sessions.of(key).sought(cx.now));
            let Owner::Idle { greeting, .. } = cx.owners.take(backend) else {
                unreachable!("a pool's connection is idle")
            };
            self.open(cx, key, backend, greeting);
            return Ok(());
        }
        self.stats.count_checkout(Checkout::Miss);
        let Some(entry) = self.pools.table.get(endpoint) else {
            unreachable!("the table has what it chose")
        };
        let backend = self.pools.connect(cx, &entry.endpoint.address)?;
        cx.owners.insert(backend, self.id, Owner::Session(key, Side::Backend));
        cx.timers.set(backend.index(), cx.now + self.config.connect_timeout);
        self.sessions.of(key).on_connecting(backend, cx.now);
        self.pools.table.asked(endpoint, backend, cx.now);
        if let Some(entry) = self.pools.table.get_mut(endpoint) {
            entry.recovery.on_connecting();
        }
        Ok(())
    }

    /// Takes one of the retries that may be made, if one is left.
    pub(super) fn takes_retry<D: Driver>(&mut self, cx: &Context<D>) -> bool {
        let taken = self.retries.take(cx.now);
        if !taken {
            self.stats.retries_refused.add(1);
        }
        taken
    }

    /// The first bytes of a session went to its backend.
    fn on_session_asked<D: Driver>(&mut self, cx: &Context<D>, key: Key<Session>) {
        if let Some((endpoint, conn)) = self.sessions.of(key).backend() {
            self.pools.table.asked(endpoint, conn, cx.now);
        }
    }

    pub(super) fn on_session_connected<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        backend: ConnId,
    ) {
        cx.timers.clear(backend.index());
        let session = self.sessions.of(key);
        let (since, endpoint) = (self.pools.on_connect_over(session), session.endpoint());
        let (Some(since), Some(endpoint)) = (since, endpoint) else {
            unreachable!("a session that connects has an endpoint")
        };
        self.stats.queue_wait.record(session.sought(since));
        self.stats.connect_duration.record(cx.now.saturating_duration_since(since));
        self.pools.table.shook_hands(endpoint, backend, cx.now);
        self.pools.on_endpoint_connected(cx, endpoint);
        if let Some(entry) = self.pools.table.get_mut(endpoint) {
            entry.pool.on_miss_served();
        }
        self.pools.mark_short(endpoint);
        self.open(cx, key, backend, Chain::default());
    }

    pub(super) fn on_session_connect_failed<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        conn: ConnId,
        error: &io::Error,
    ) {
        cx.timers.clear(conn.index());
        cx.close(conn, Close::Reset);
        if let Some(endpoint) = self.sessions.of(key).endpoint()
            && !is_local(error)
        {
            self.pools.on_endpoint_unreachable(cx, endpoint, error);
        }
        self.leave_endpoint(cx, key);
        let otherwise = match error.kind() {
            io::ErrorKind::TimedOut => CloseReason::ConnectTimeout,
            _ => CloseReason::ConnectFailed,
        };
        self.dispatch(cx, key, otherwise);
    }

    pub(super) fn leave_endpoint<D: Driver>(&mut self, cx: &Context<D>, key: Key<Session>) {
        let session = self.sessions.of(key);
        self.pools.on_connect_over(session);
        let (endpoint, backend) = (session.endpoint(), session.conn(Side::Backend));
        session.on_connect_failed();
        self.leave(cx, endpoint, backend);
    }

    /// A session no longer counts as one of its endpoint's, nor does what it waits for there. Its
    /// connection was closed.
    pub(super) fn leave<D: Driver>(
        &mut self,
        cx: &Context<D>,
        endpoint: Option<EndpointId>,
        backend: Option<ConnId>,
    ) {
        let Some(endpoint) = endpoint else { return };
        if let Some(conn) = backend {
            self.pools.table.unanswered(endpoint, conn, cx.now);
        }
        if self.reuses_conns() {
            // It was a client whose bytes had become opaque: its place is free for who waits.
            self.pools.table.opaque_closed(endpoint);
            self.pools.on_closing(endpoint, backend);
            return self.on_place_in_pool_free(endpoint);
        }
        self.pools.table.leave(endpoint);
        self.pools.on_closing(endpoint, backend);
        if self.pools.table.get_mut(endpoint).is_some_and(|entry| !entry.is_present()) {
            self.pools.table.forget_unused();
        }
    }

    fn open<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        backend: ConnId,
        greeting: Chain,
    ) {
        let session = self.sessions.of(key);
        let (client, endpoint) = (session.client(), session.endpoint());
        self.tap_endpoint(cx, client, endpoint);
        let outcome = self.sessions.open(cx, key, backend, greeting);
        self.follow(cx, key, outcome);
    }

    /// A client has got an endpoint, which is told of where it is captured.
    pub(super) fn tap_endpoint<D>(
        &self,
        cx: &mut Context<D>,
        client: ConnId,
        endpoint: Option<EndpointId>,
    ) {
        if cx.tap.is_of(client)
            && let Some(entry) = endpoint.and_then(|endpoint| self.pools.table.get(endpoint))
        {
            cx.tap.on_endpoint(&entry.endpoint);
        }
    }

    pub(super) fn on_ended<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        from: Side,
    ) {
        if from == Side::Backend
            && (self.ask_next_to_cancel(cx, key) || self.on_backend_gone(cx, key, false))
        {
            return;
        }
        self.apply_event(cx, key, |session, now| session.on_ended(from, now));
    }

    pub(super) fn on_receive_failed<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        from: Side,
    ) {
        if from == Side::Backend
            && (self.ask_next_to_cancel(cx, key) || self.on_backend_gone(cx, key, true))
        {
            return;
        }
        self.apply_event(cx, key, |session, now| session.on_receive_failed(from, now));
    }

    /// An endpoint is through with a cancel request: the next one gets it. Says whether there is one.
    fn ask_next_to_cancel<D: Driver>(&mut self, cx: &mut Context<D>, key: Key<Session>) -> bool {
        let session = self.sessions.of(key);
        session.on_cancel_delivered();
        let (endpoint, backend) = (session.endpoint(), session.conn(Side::Backend));
        let (tried, reached) = (*session.tried(), session.cancel_reached());
        if session.cancel().is_none()
            || self.pools.table.next_of_all(reached, &tried).is_none()
            || !self.sessions.move_cancel(cx, key)
        {
            return false;
        }
        self.leave(cx, endpoint, backend);
        self.dispatch(cx, key, CloseReason::Finished);
        true
    }

    pub(super) fn on_session_deadline<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
    ) {
        if self.sessions.of(key).awaits_endpoint() {
            return self.on_wait_over(cx, key);
        }
        if self.sessions.of(key).is_cancel_overdue(cx.now) && self.ask_next_to_cancel(cx, key) {
            return;
        }
        let outcome = self.sessions.on_deadline(cx, key);
        self.follow(cx, key, outcome);
    }

    /// Tells a session what happened and does what it answers.
    pub(super) fn apply_event<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        event: impl FnOnce(&mut Session, Instant) -> Action,
    ) {
        let outcome = self.sessions.on_event(cx, key, event);
        self.follow(cx, key, outcome);
    }

    pub(super) fn close_session<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        key: Key<Session>,
        reason: CloseReason,
    ) {
        let waits_max = self.config.endpoint_wait + self.sessions.waited_for_place(key, cx.now);
        debug_assert!(
            !reason.is_for_want_of_endpoint()
                || self.sessions.of(key).cancel().is_some()
                || self.sessions.of(key).waits_until(waits_max) <= cx.now,
            "{reason:?} while it may wait"
        );
        self.tell_of_session(cx, key, reason);
        self.count_left_overdue(cx, key);
        let mut session = self.sessions.close(cx, key, reason);
        self.judge_closed(cx, &mut session);
        self.pools.on_connect_over(&mut session);
        self.leave(cx, session.endpoint(), session.conn(Side::Backend));
        if let Some((_, transfer)) = session.answer_times(cx.now) {
            self.stats.transfer.record(transfer);
        }
        self.on_gone(cx, reason, session.age(cx.now));
    }

    pub(super) fn close_all_sessions<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        reason: CloseReason,
    ) {
        for slot in 0..self.sessions.slots() {
            if let Some(key) = self.sessions.key_at(slot) {
                self.close_session(cx, key, reason);
            }
        }
    }
}
