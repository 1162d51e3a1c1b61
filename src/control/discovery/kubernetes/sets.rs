//! The `StatefulSets` of a namespace: who shares the keys, for all routes that ask.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::watch as channel;
use tracing::{Span, info, warn};

use super::known::{Audience, Location};
use super::membership::{self, Ordinals};
use super::objects::StatefulSet;
use super::trouble::Trouble;
use crate::control::discovery::status::Status;
use crate::proxy::endpoints::EndpointSnapshot;

/// What may hold the start-up: what becomes of the requests for `StatefulSets`.
const SETS: &str = "sets";

/// All `StatefulSets` of a namespace, or why they are not known.
pub(super) type Sets = Result<HashMap<String, Ordinals>, String>;

/// Where they come, which is not known yet.
pub(super) fn unread() -> (channel::Sender<Sets>, channel::Receiver<Sets>) {
    channel::channel(Err("the StatefulSets have not been read yet".to_owned()))
}

/// A route that wants to know them.
pub(super) struct Listener {
    /// Where it says how it fares.
    pub status: Arc<Status>,
    /// What it has published.
    pub snapshots: channel::Receiver<Arc<EndpointSnapshot>>,
    /// What names it in the log.
    pub span: Span,
}

/// All that want to know the same.
pub(super) struct Listeners {
    sets: channel::Sender<Sets>,
    listeners: Vec<Listener>,
}

impl Listeners {
    /// These, and where the `StatefulSets` go.
    pub(super) fn new(listeners: Vec<Listener>, sets: channel::Sender<Sets>) -> Self {
        Self { sets, listeners }
    }

    fn each(&self, tell: impl Fn(&Listener)) {
        self.listeners.iter().for_each(|listener| listener.span.in_scope(|| tell(listener)));
    }
}

impl Audience for Listeners {
    type Object = StatefulSet;
    type Extract = Ordinals;

    fn extract(&self, object: &StatefulSet) -> Ordinals {
        membership::ordinals(object)
    }

    fn publish(&mut self, objects: &HashMap<String, Ordinals>) {
        self.each(|listener| {
            listener.status.hold(SETS, None);
        });
        self.sets.send_modify(|sets| *sets = Ok(objects.clone()));
    }

    // That this watch fares well says nothing of the other one.
    fn on_trouble(&mut self, trouble: &Trouble, is_news: bool) {
        self.sets.send_if_modified(|sets| {
            // Once they were read, they stay what they were.
            let differs = sets.as_ref().is_err_and(|why| *why != trouble.what);
            if differs {
                *sets = Err(trouble.what.clone());
            }
            differs
        });
        let kept = match &*self.sets.borrow() {
            Ok(sets) => format!("keeping the StatefulSets that are known ({})", sets.len()),
            Err(_) => "no StatefulSet is known".to_owned(),
        };
        self.each(|listener| {
            listener.status.count(trouble.kind);
            if trouble.holds_the_start() && listener.snapshots.borrow().generation == 0 {
                listener.status.hold(SETS, Some(trouble.what.clone()));
            }
            if is_news {
                warn!(kind = ?trouble.kind, "{}; {kept}", trouble.what);
            }
        });
    }

    fn on_recovered(&self, resource: &str) {
        self.each(|_| info!(resource, "the Kubernetes API is well again"));
    }

    fn on_located(&self, location: &Location, resource: &str, labels: &str) {
        let namespace = &location.namespace;
        self.each(|_| info!(resource, namespace, labels, "watching the Kubernetes API"));
    }
}
