//! A client's time limits: which one holds, and what follows when it is over.

use std::time::{Duration, Instant};

use super::ErrorReply;
use super::action::{Action, Actions};
use super::client::Client;
use super::policy::{Limits, Moment};
use super::state::{InFlight, State};
use crate::limits::{CLIENT_STALL_MAX, LINGER_MAX, REFUSED_REST_MAX};
use crate::metrics::{CloseReason, Discard};

/// Who can make a request in flight go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Party {
    Client,
    Backend,
}

impl Client {
    /// Sets its timer, if that does not fire early enough anyway: requests come and go far more
    /// often than their time limits do.
    pub(super) fn arm(&mut self, moment: &Moment<'_>, actions: &mut Actions) {
        let upload = self
            .state
            .in_flight()
            .filter(|flight| flight.is_streaming())
            .and_then(|flight| flight.upload.deadline());
        let deadline = self.deadline(&moment.policy.limits);
        let drain = self.drain_deadline(moment);
        let earliest = [deadline, upload, drain].into_iter().flatten().min();
        if let Some(at) = earliest
            && self.timer.is_none_or(|timer| at < timer)
        {
            self.timer = Some(at);
            actions.push(Action::Arm(at));
        }
    }

    /// When it has to be looked at next, drains and uploads apart.
    pub fn deadline(&self, limits: &Limits) -> Option<Instant> {
        match &self.state {
            State::Ready { pending, .. } | State::Queued { pending } => {
                Some(match pending.awaits_endpoint {
                    Some(since) => since + limits.endpoint,
                    None => pending.timed + limits.queue,
                })
            }
            State::InFlight(flight) => {
                self.stall_max(flight, limits).map(|limit| flight.moved + limit)
            }
            State::Leaving { .. } => {
                let max = if self.unsent > 0 { CLIENT_STALL_MAX } else { LINGER_MAX };
                let limit = limits.half_close.or(limits.idle).unwrap_or(max);
                let linger = if self.unsent > 0 { limit } else { limit.min(LINGER_MAX) };
                Some(self.active + linger)
            }
            State::Idle { .. } | State::Opaque { .. } => {
                let limit = self.half_close(limits).or(limits.idle);
                limit.map(|limit| self.active + limit)
            }
        }
    }

    /// Its timer has fired. `others_wait` for the connection that it holds.
    pub fn on_deadline(&mut self, others_wait: bool, moment: &mut Moment<'_>) -> Actions {
        self.timer = None;
        if self.deadline(&moment.policy.limits).is_some_and(|at| at <= moment.now) {
            return self.on_due(moment);
        }
        let mut actions = Actions::NONE;
        if self.drain_deadline(moment).is_some_and(|at| at <= moment.now) {
            if let State::Leaving { .. } = self.state {
                return Action::Close(CloseReason::Drained).into();
            }
            actions.push(Action::Serve);
        }
        if let State::InFlight(flight) = &mut self.state
            && flight.is_streaming()
            && flight.upload.deadline().is_some_and(|at| at <= moment.now)
            && let Some(limit) = flight.upload.on_deadline(others_wait, moment.now)
        {
            // It holds a connection, and takes too long to send what that is for.
            if flight.has_part() {
                return Action::Close(CloseReason::ClientTimeout).into();
            }
            return self.fail_in_flight(ErrorReply::Unfinished(limit), Discard::Abandoned, moment);
        }
        self.arm(moment, &mut actions);
        actions
    }

    fn on_due(&mut self, moment: &mut Moment<'_>) -> Actions {
        let limits = &moment.policy.limits;
        match &self.state {
            State::Ready { pending, .. } | State::Queued { pending } => {
                Action::Fail(match pending.awaits_endpoint {
                    Some(_) => ErrorReply::NoEndpoint(limits.endpoint),
                    None => ErrorReply::QueueTimeout(limits.queue),
                })
                .into()
            }
            State::InFlight(_) => self.on_stalled(moment),
            State::Leaving { .. } => Action::Close(CloseReason::HalfCloseTimeout).into(),
            State::Idle { .. } | State::Opaque { .. } => {
                Action::Close(if self.half_close(limits).is_some() {
                    CloseReason::HalfCloseTimeout
                } else {
                    CloseReason::IdleTimeout
                })
                .into()
            }
        }
    }

    /// No byte of its request or the reply has moved for as long as that may be.
    fn on_stalled(&mut self, moment: &mut Moment<'_>) -> Actions {
        let Some(flight) = self.state.in_flight() else { unreachable!("it is in flight") };
        let limits = &moment.policy.limits;
        let client_max = limits.idle.unwrap_or(CLIENT_STALL_MAX);
        match self.owing(flight) {
            Party::Backend => match limits.request {
                None if self.half_close(limits).is_some() => {
                    Action::Close(CloseReason::HalfCloseTimeout).into()
                }
                None => Action::Close(CloseReason::IdleTimeout).into(),
                Some(_) if flight.is_answered() => self.end_request(Discard::Timeout, moment),
                Some(limit) => {
                    self.fail_in_flight(ErrorReply::Timeout(limit), Discard::Timeout, moment)
                }
            },
            Party::Client if self.is_waiting_for_refused(flight) => {
                self.end_request(Discard::Abandoned, moment)
            }
            Party::Client if flight.reply == super::state::Progress::Expected => {
                let error = ErrorReply::Unfinished(client_max);
                self.fail_in_flight(error, Discard::Abandoned, moment)
            }
            Party::Client => Action::Close(match limits.idle {
                Some(_) => CloseReason::IdleTimeout,
                None => CloseReason::ClientTimeout,
            })
            .into(),
        }
    }

    /// Whether nothing but the client can make its request go on.
    pub(super) fn holds_itself_up(&self) -> bool {
        self.state.in_flight().is_some_and(|flight| self.owing(flight) == Party::Client)
    }

    /// Who can make a request go on: a backend that is held up by its client is not slow.
    fn owing(&self, flight: &InFlight) -> Party {
        if self.unsent > 0 {
            return Party::Client;
        }
        let backend = &flight.backend;
        if backend.broken || backend.unsent > 0 || !flight.is_streaming() {
            Party::Backend
        } else {
            Party::Client
        }
    }

    /// How long no byte of a request or its reply may move. A client that sends nothing of a request
    /// is mostly given up before that, for its pace: see [`Upload`](super::Upload).
    fn stall_max(&self, flight: &InFlight, limits: &Limits) -> Option<Duration> {
        match self.owing(flight) {
            Party::Backend => limits.request.or(self.half_close(limits)).or(limits.idle),
            Party::Client if self.is_waiting_for_refused(flight) => Some(REFUSED_REST_MAX),
            Party::Client => Some(limits.idle.unwrap_or(CLIENT_STALL_MAX)),
        }
    }

    /// The time limit of a client that has ended its direction, and may have left.
    fn half_close(&self, limits: &Limits) -> Option<Duration> {
        limits.half_close.filter(|_| self.ended)
    }

    /// Whether nothing but the rest of a request is missing that was refused: clients need not send
    /// it, and some wait for the end instead.
    fn is_waiting_for_refused(&self, flight: &InFlight) -> bool {
        flight.is_answered() && self.unsent == 0 && self.framing.refuses()
    }
}
