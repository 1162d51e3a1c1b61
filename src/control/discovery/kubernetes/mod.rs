//! The Kubernetes API as a source: watches, complete snapshots, and the last known good set
//! whatever becomes of the API server.
//!
//! Routes share what is the same: all of them one way to the API, and those whose endpoints are read
//! from the same objects one watch. What becomes of a watch is told to each of its routes, and to no
//! other one.
//!
//! | file | what |
//! | --- | --- |
//! | `watch` | lists and watches one kind of object |
//! | `known` | all objects of that kind, and when they are published |
//! | `backoff` | how long to wait |
//! | `api` | the one client of the process, and its pace |
//! | `connection` | the way to the server: configuration, credentials, answers within bounds |
//! | `plugin`, `offload` | what may hang |
//! | `trouble` | what goes wrong, and what follows |
//! | `convert` | objects → endpoints |
//! | `route` | what a route makes of that, and publishes |
//! | `sets`, `membership` | who shares the keys |
//! | `saved` | the last endpoints in a file |

mod api;
mod backoff;
mod connection;
mod convert;
mod known;
mod membership;
mod objects;
mod offload;
mod plugin;
mod route;
mod saved;
mod sets;
#[cfg(test)]
mod testing;
mod trouble;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use tokio::sync::watch as channel;

use api::Api;
use convert::{Extract, Rules};
use known::Known;
use objects::Pod;
pub(crate) use route::Route;
use route::Routes;
use sets::{Listeners, Sets};
use watch::{Object, Query, Watcher};

/// Keeps the endpoints of these routes published, for ever, each watch in a task of its own. A start
/// waits for so long for a first answer.
pub(crate) fn spawn(routes: Vec<Route>, start_timeout: Duration) {
    let timeout_max = routes.iter().map(|route| route.query().timeout).max();
    let of_sets = routes.iter().filter_map(|r| Some((r.query_of_sets()?, r.listener())));
    let of_sets = group(of_sets);
    let of_endpoints = group(routes.into_iter().map(|r| ((r.is_of_pods(), r.query()), r)));
    let watches = of_sets.len() + of_endpoints.len();
    let api = Arc::new(Api::new(watches, timeout_max.unwrap_or_default()));
    let mut sets = Vec::new();
    for (query, listeners) in of_sets {
        let (sender, receiver) = sets::unread();
        sets.push((query.clone(), receiver));
        let known = Known::new(Listeners::new(listeners, sender));
        tokio::spawn(Watcher::new(Arc::clone(&api), query, known).run());
    }
    for ((is_of_pods, query), mut routes) in of_endpoints {
        let mut depends_on = None;
        for route in &mut routes {
            let Some(query) = route.query_of_sets() else { continue };
            let (_, own) = sets.iter().find(|(read, _)| *read == query).expect("all are read");
            route.read_sets(own.clone());
            // All of one watch are of one namespace.
            depends_on = Some(own.clone());
        }
        let followed = Followed { api: Arc::clone(&api), query, routes, depends_on, start_timeout };
        if is_of_pods {
            tokio::spawn(followed.run::<Pod>(convert::pod));
        } else {
            tokio::spawn(followed.run::<EndpointSlice>(convert::slice));
        }
    }
}

/// Puts together what has the same key, in the order of the first of each.
fn group<K: PartialEq, T>(items: impl Iterator<Item = (K, T)>) -> Vec<(K, Vec<T>)> {
    let mut groups: Vec<(K, Vec<T>)> = Vec::new();
    for (key, item) in items {
        match groups.iter_mut().find(|(known, _)| *known == key) {
            Some((_, items)) => items.push(item),
            None => groups.push((key, vec![item])),
        }
    }
    groups
}

/// Routes whose endpoints are read from the same objects.
struct Followed {
    api: Arc<Api>,
    query: Query,
    routes: Vec<Route>,
    depends_on: Option<channel::Receiver<Sets>>,
    start_timeout: Duration,
}

impl Followed {
    async fn run<K: Object>(self, read: fn(&K, &Rules) -> Extract) {
        let routes = Routes::open(self.routes, read).await;
        let known =
            Known::new(routes).first_answer_max(self.start_timeout).depends_on(self.depends_on);
        Watcher::new(self.api, self.query, known).run().await;
    }
}
