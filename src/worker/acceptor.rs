//! Accepting: how many clients are let in, and when that stops.

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use super::context::Context;
use super::mail::Mail;
use super::mailbox::Command;
use crate::io::{ConnId, Driver};
use crate::limits;
use crate::proxy::RouteId;
use crate::proxy::admission::{Gate, Parts, RETRY_AFTER, ROTATION, View};

/// In a drain, handshakes under way may take so long to end before the listeners are closed…
const HANDSHAKE_MAX: Duration = Duration::from_millis(100);
/// …and so long where the queues were full: then the kernel drops the last packet of a handshake,
/// and asks for it again after a second.
const HANDSHAKE_AGAIN_MAX: Duration = Duration::from_millis(1200);
/// Complaints about a lasting state are repeated this often.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

/// A client that was let in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Accepted {
    pub(super) conn: ConnId,
    pub(super) route: RouteId,
    /// It waited in one queue for all workers, of which nobody but a worker gives each its share.
    pub(super) is_shared: bool,
}

/// Lets clients in, up to the process's limit, until a drain has emptied the accept queue.
pub(super) struct Acceptor {
    gate: Gate,
    /// The routes of the listeners, in the order in which the driver has those.
    routes: Box<[RouteId]>,
    /// Clients to be served at the end of the turn.
    accepted: Vec<Accepted>,
    /// In a drain, the listeners stay open until then.
    listening_until: Option<Instant>,
    /// Sessions at a time in the whole process.
    sessions_max: usize,
    parts: Parts,
    /// There are free places, and a route whose clients do not get them.
    keeps_places: bool,
    complained_at: Option<Instant>,
}

impl Acceptor {
    /// With so many sessions at a time in the whole process, from listeners of these routes.
    pub(super) fn new(sessions_max: usize, routes: Box<[RouteId]>, parts: Parts) -> Self {
        Self {
            routes,
            parts,
            keeps_places: false,
            gate: Gate::default(),
            // More than that come in the one turn of a drain, which may allocate.
            accepted: Vec::with_capacity(limits::LISTEN_BACKLOG as usize),
            listening_until: None,
            sessions_max,
            complained_at: None,
        }
    }

    /// Lets in as many clients as there is room for in the whole process.
    pub(super) fn steer<D: Driver>(&mut self, cx: &mut Context<D>, mail: &Mail) {
        if cx.places.take_freed() {
            self.gate.on_place_free();
        }
        if cx.command >= Command::Drain {
            // Nobody comes behind those who wait: all are let in, whatever the limit says.
            (0..self.routes.len()).for_each(|listener| cx.driver.hold(listener, false));
            let listens = self.gate.may_try(cx.now) && self.listening_until.is_some();
            return cx.driver.accept(if listens { cx.places.free() } else { 0 });
        }
        let view = View {
            free: self.sessions_max.saturating_sub(mail.sessions()),
            workers: mail.workers(),
            worker: cx.worker,
            alive: cx.alive(),
            // Before the first snapshot there is nowhere to send a client.
            serves: cx.serves(),
            parts: self.parts,
        };
        self.hold_routes(cx, mail, view.free);
        let share = self.gate.look(&view, cx.now);
        if share.has_filled {
            cx.stats.accept_pauses.add(1);
            let most = self.sessions_max;
            self.complain(cx, format_args!("{most} sessions are open (AEGIS_MAX_SESSIONS): newcomers wait in the kernel's queue"));
        }
        cx.driver.accept(share.clients);
        if share.clients > 0 && cx.driver.is_short_of_descriptors() {
            self.complain(
                cx,
                format_args!(
                    "descriptors are short (RLIMIT_NOFILE): newcomers wait in the kernel's queue"
                ),
            );
        }
    }

    /// Leaves the clients of a route in the kernel's queue that has not heard of its endpoints, and of one
    /// that has its part of the places where few are left for the others.
    fn hold_routes<D: Driver>(&mut self, cx: &mut Context<D>, mail: &Mail, free: usize) {
        // Those who wait while a process drains are to be served by it.
        let is_short = self.parts.is_short(free) && cx.command == Command::Run;
        let kept_before = std::mem::replace(&mut self.keeps_places, false);
        for (listener, &route) in self.routes.iter().enumerate() {
            let has_part = is_short && self.parts.has_part(mail.sessions_of_route(route));
            self.keeps_places |= has_part;
            cx.driver.hold(listener, has_part || !cx.has_begun(route));
        }
        if self.keeps_places && !kept_before {
            cx.stats.accept_pauses.add(1);
            self.complain(cx, format_args!("{free} places for sessions are left (AEGIS_MAX_SESSIONS), for the other routes: newcomers of one that has its part wait in the kernel's queue"));
        }
    }

    /// A client came, which is served at the end of the turn.
    pub(super) fn on_accepted<D: Driver>(
        &mut self,
        cx: &Context<D>,
        conn: ConnId,
        listener: usize,
    ) {
        let is_shared = cx.driver.is_shared(listener);
        self.accepted.push(Accepted { conn, route: self.routes[listener], is_shared });
    }

    /// A client that is to be served now. What is let in meanwhile counts.
    pub(super) fn take_accepted(&mut self) -> Vec<Accepted> {
        std::mem::take(&mut self.accepted)
    }

    /// Gets its memory back, to use it again.
    pub(super) fn on_served(&mut self, accepted: Vec<Accepted>) {
        debug_assert!(accepted.is_empty() && self.accepted.is_empty(), "all were served");
        self.accepted = accepted;
    }

    /// Accepting failed.
    pub(super) fn on_failed<D: Driver>(&mut self, cx: &mut Context<D>, error: &io::Error) {
        cx.stats.accept_errors.add(1);
        // A place that became free before that did not help.
        cx.places.take_freed();
        if cx.command < Command::Drain || self.listening_until.is_some() {
            self.gate.on_failed(cx.now);
        }
        self.complain(cx, format_args!("accepting failed, newcomers wait: {error}"));
    }

    /// When accepting is to be looked at next.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        let at = [self.gate.retry_at(), self.listening_until];
        at.into_iter().flatten().min()
    }

    /// How long the worker may sleep, at most, where it has to look for other workers' places.
    pub(super) fn sleep_max(&self) -> Option<Duration> {
        (self.gate.waits_for_others() || self.keeps_places).then_some(ROTATION)
    }

    /// The worker is to empty the accept queue.
    pub(super) fn on_drain<D: Driver>(&mut self, cx: &mut Context<D>) {
        assert!(self.listening_until.is_none(), "commands only move forward");
        let crowded = cx.driver.refuse_handshakes();
        let most = if crowded { HANDSHAKE_AGAIN_MAX } else { HANDSHAKE_MAX };
        self.listening_until = Some(cx.now + most);
        self.gate = Gate::default();
    }

    /// Whether clients may come still, in a drain.
    pub(super) fn is_listening(&self) -> bool {
        self.listening_until.is_some()
    }

    /// Whether the listeners have been open for long enough.
    pub(super) fn is_done(&self, now: Instant) -> bool {
        self.listening_until.is_some_and(|at| now >= at)
    }

    /// Closes the listeners, if that was not done before. Says whether the driver has clients for whom
    /// that was the moment to come.
    pub(super) fn stop_listening<D: Driver>(&mut self, cx: &mut Context<D>) -> bool {
        if self.listening_until.take().is_none() {
            return false;
        }
        self.gate = Gate::default();
        let closed = cx.driver.stop_listening();
        if !closed && cx.command < Command::Stop {
            // Sessions that end leave descriptors for those who wait.
            self.listening_until = Some(cx.now + RETRY_AFTER);
        }
        true
    }

    fn complain<D>(&mut self, cx: &Context<D>, what: fmt::Arguments<'_>) {
        if self.complained_at.is_none_or(|at| cx.now >= at + COMPLAINT_INTERVAL) {
            self.complained_at = Some(cx.now);
            tracing::warn!(worker = usize::from(cx.worker), "{what}");
        }
    }

    /// Checks what holds between two turns.
    #[cfg(test)]
    pub(super) fn assert_invariants<D>(&self, cx: &Context<D>) {
        assert!(self.accepted.is_empty(), "a client was let in and is not served");
        let drains = cx.command > Command::Run;
        assert_eq!(cx.drain.since().is_some(), drains, "since when it drains");
        assert!(!self.is_listening() || cx.command == Command::Drain, "it listens on");
    }
}
