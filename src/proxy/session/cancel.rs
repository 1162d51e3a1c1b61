//! Cancel requests of `PostgreSQL`, each a session of its own that goes to one endpoint after the other:
//! which of them knows its key nobody else can tell, and the others pass over it. To the client all of
//! them together look like one server: its connection ends once each has ended its own.

use std::time::Instant;

use super::{Session, State};
use crate::io::Chain;
use crate::limits::CANCEL_WAIT;
use crate::proxy::endpoints::EndpointId;

/// What a client has begun with.
#[derive(Debug, Default)]
pub(super) enum Beginning {
    /// Nothing yet, or anything.
    #[default]
    Other,
    /// Nothing yet. It waits beyond those who may, to be told from a cancel request.
    Beyond,
    /// It has asked for encryption, and for nothing else yet.
    Negotiation,
    /// A cancel request.
    Cancel(Cancel),
}

impl Beginning {
    pub(super) fn cancel(&self) -> Option<&Cancel> {
        if let Self::Cancel(cancel) = self { Some(cancel) } else { None }
    }

    fn cancel_mut(&mut self) -> Option<&mut Cancel> {
        if let Self::Cancel(cancel) = self { Some(cancel) } else { None }
    }
}

/// A request that every endpoint is to have.
#[derive(Debug)]
pub(super) struct Cancel {
    /// Its bytes, to be sent again.
    request: Chain,
    /// The last endpoint that has had it since it was known for what it is.
    reached: Option<EndpointId>,
    /// One has been through with it.
    delivered: bool,
}

impl Session {
    /// Whether what its client sends next may be a cancel request: it has sent nothing else.
    pub fn may_begin_with_cancel(&self) -> bool {
        match self.beginning {
            Beginning::Other => !self.has_client_spoken(),
            Beginning::Beyond | Beginning::Negotiation => true,
            Beginning::Cancel(_) => false,
        }
    }

    /// No more clients may wait for a place than do. It waits all the same until it is heard, unless it
    /// was. Says whether it does.
    pub fn listen_for_cancel(&mut self) -> bool {
        let is_unheard = !self.has_client_spoken();
        if is_unheard {
            self.beginning = Beginning::Beyond;
        }
        is_unheard
    }

    /// Whether it waits only to be told from a cancel request.
    pub fn is_beyond_line(&self) -> bool {
        matches!(self.beginning, Beginning::Beyond)
    }

    /// Its turn has come: it waits, or is served, as any other.
    pub(super) fn on_in_line(&mut self) {
        if self.is_beyond_line() {
            self.beginning = Beginning::Other;
        }
    }

    /// Its client has sent the first bytes, which ask for encryption or not.
    pub fn on_begun(&mut self, negotiates: bool) {
        self.beginning = if negotiates { Beginning::Negotiation } else { Beginning::Other };
    }

    /// Its client has begun with a cancel request, whose bytes are these.
    pub fn on_cancel(&mut self, request: Chain) {
        assert!(self.cancel().is_none(), "a client begins once");
        self.beginning = Beginning::Cancel(Cancel { request, reached: None, delivered: false });
        // That the connection is ended without a word is how it is done.
        self.vouch();
    }

    /// The request that every endpoint is to have, if this is one.
    pub fn cancel(&self) -> Option<&Chain> {
        self.beginning.cancel().map(|cancel| &cancel.request)
    }

    /// The last endpoint that has had it, beside those tried before it was known for what it is.
    pub fn cancel_reached(&self) -> Option<EndpointId> {
        self.beginning.cancel().and_then(|cancel| cancel.reached)
    }

    /// The present endpoint is through with it.
    pub fn on_cancel_delivered(&mut self) {
        if let Some(cancel) = self.beginning.cancel_mut() {
            cancel.delivered = true;
        }
    }

    /// Whether it is a request that an endpoint has been through with: it is over where none is left.
    pub fn is_cancel_delivered(&self) -> bool {
        self.beginning.cancel().is_some_and(|cancel| cancel.delivered)
    }

    /// Takes the request out, to be freed.
    pub fn take_cancel(&mut self) -> Chain {
        match std::mem::take(&mut self.beginning) {
            Beginning::Cancel(cancel) => cancel.request,
            Beginning::Other | Beginning::Beyond | Beginning::Negotiation => Chain::default(),
        }
    }

    /// The next endpoint was chosen.
    pub(super) fn on_cancel_trying(&mut self, endpoint: EndpointId) {
        if let Some(cancel) = self.beginning.cancel_mut() {
            cancel.reached = Some(endpoint);
        }
    }

    /// When the present endpoint has had time enough.
    pub(super) fn cancel_deadline(&self) -> Option<Instant> {
        let waits = self.cancel().is_some() && self.state == State::Open;
        waits.then(|| self.connected.max(self.active) + CANCEL_WAIT)
    }

    /// Whether the present endpoint has had time enough.
    pub fn is_cancel_overdue(&self, now: Instant) -> bool {
        self.cancel_deadline().is_some_and(|deadline| deadline <= now)
    }
}
