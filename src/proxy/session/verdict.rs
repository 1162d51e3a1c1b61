//! What a session says about its endpoint.

use std::time::Instant;

use super::{FirstByte, Session};
use crate::proxy::health::AT_ONCE;

/// What the end of a session's backend says about its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    None,
    /// It has ended an idle connection just before that was used.
    Stale,
    /// It does not know an idle connection any more that was made before.
    Forgotten,
    /// It has ended the session at once.
    Failed,
}

impl Session {
    /// Its backend connection was made at this moment, in advance.
    pub fn on_warm(&mut self, made: Instant) {
        self.warm_since = Some(made);
    }

    /// When its backend connection was made.
    pub fn made(&self) -> Instant {
        self.warm_since.unwrap_or(self.connected)
    }

    /// What the backend had said before the session began is passed on to the client.
    pub fn on_greeted(&mut self) {
        self.greeted = true;
    }

    /// Nothing is to be made of how the backend ends the session.
    pub fn vouch(&mut self) {
        self.heard = true;
    }

    /// A byte came from the backend. Says whether it is the first one of the session.
    pub fn take_heard(&mut self) -> bool {
        self.greeted = true;
        !std::mem::replace(&mut self.heard, true)
    }

    /// Whether nothing has been passed on in either direction, so that another connection would do as
    /// well.
    pub fn is_untouched(&self) -> bool {
        self.is_open() && self.is_unasked() && !self.greeted
    }

    /// Whether the client has ended its direction or broken its connection.
    pub fn has_client_left(&self) -> bool {
        self.to_client.is_broken() || self.to_backend.is_ending() && !self.to_backend.is_broken()
    }

    /// Whether it has been served without a byte from its backend for so long that all is well.
    pub fn has_lasted(&self, now: Instant) -> bool {
        self.is_open() && now.saturating_duration_since(self.connected) >= AT_ONCE
    }

    /// The backend ended or broke its connection: what that says about the endpoint. Each session is
    /// judged once.
    pub fn judge(&mut self, broken: bool, now: Instant) -> Verdict {
        if !self.is_open() || self.has_client_left() || std::mem::replace(&mut self.heard, true) {
            return Verdict::None;
        }
        let broken = broken || self.failure.is_some();
        let asked = self.preface > 0 || self.first_byte != FirstByte::Unasked;
        match self.warm_since {
            Some(_) if broken && asked => Verdict::Forgotten,
            Some(_) if !asked => Verdict::Stale,
            _ if !self.has_lasted(now) => Verdict::Failed,
            _ => Verdict::None,
        }
    }
}
