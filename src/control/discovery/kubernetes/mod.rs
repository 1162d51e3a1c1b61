//! The Kubernetes API as a source: one watch, complete snapshots, and the last known good set
//! whatever becomes of the API server.
//!
//! | file | what |
//! | --- | --- |
//! | `watch` | lists and watches one kind of object, at a bounded pace |
//! | `known` | all objects of that kind, and when they are published |
//! | `backoff` | how long to wait |
//! | `connection` | the way to the server: configuration, credentials, answers within bounds |
//! | `plugin`, `offload` | what may hang |
//! | `trouble` | what goes wrong, and what follows |
//! | `convert` | objects → endpoints |
//! | `membership` | who shares the keys |
//! | `saved` | the last endpoints in a file |

mod backoff;
mod connection;
mod convert;
mod known;
mod membership;
mod objects;
mod offload;
mod plugin;
mod saved;
#[cfg(test)]
mod testing;
mod trouble;
mod watch;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use tokio::sync::watch as channel;
use tracing::{info, warn};

use super::Publisher;
use super::status::Status;
use crate::config::{Balance, Config, KubeConfig, RouteConfig};
use convert::{Extract, Rules, Union};
use known::{Known, Location};
use membership::{Membership, Ordinals};
use objects::{Pod, StatefulSet};
use offload::Offload;
use saved::{Identity, Named, Snapshot, Writer};
use watch::{Source, Subject, Watcher};

/// How long the start waits for the file of endpoints to be read.
const SNAPSHOT_READ_MAX: Duration = Duration::from_secs(2);

/// The label that ties a slice to its Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

impl Source for EndpointSlice {
    type Extract = Extract;

    fn labels(kube: &KubeConfig) -> String {
        let service = kube.service.as_ref().map(|service| service.name.as_str());
        format!("{SERVICE_LABEL}={}", service.unwrap_or_default())
    }

    fn extract(&self, rules: &Rules) -> Extract {
        convert::slice(self, rules)
    }
}

impl Source for Pod {
    type Extract = Extract;

    fn labels(kube: &KubeConfig) -> String {
        kube.selector.clone().unwrap_or_default()
    }

    fn extract(&self, rules: &Rules) -> Extract {
        convert::pod(self, rules)
    }
}

impl Source for StatefulSet {
    type Extract = Ordinals;

    fn labels(_: &KubeConfig) -> String {
        String::new()
    }

    fn extract(&self, _: &Rules) -> Ordinals {
        membership::ordinals(self)
    }
}

/// All `StatefulSets` of the namespace, or why they are not known.
type Sets = Result<HashMap<String, Ordinals>, String>;

/// What may hold the start-up: what becomes of the requests for endpoints and for `StatefulSets`, and
/// what the answers say of the endpoints and the stores.
const REQUESTS: &str = "requests";
const ENDPOINTS: &str = "endpoints";
const SETS: &str = "sets";
const STORES: &str = "stores";

/// The Kubernetes API as a source of endpoints.
#[derive(Debug)]
pub(crate) struct Kubernetes {
    config: Arc<RouteConfig>,
    start_timeout: Duration,
    status: Arc<Status>,
    rules: Rules,
}

impl Kubernetes {
    /// The source that the configuration describes for a route.
    pub(crate) fn new(process: &Config, route: Arc<RouteConfig>, status: Arc<Status>) -> Self {
        let (node, zone) = (process.node_name.clone(), process.zone.clone());
        let region = process.region.clone();
        let (port, locality) = (route.kube.port.clone(), route.locality);
        let by_key = route.balance == Balance::KeyHash;
        let rules = Rules { port, locality, node, zone, region, by_key };
        Self { config: route, start_timeout: process.start_timeout, status, rules }
    }

    /// Keeps the endpoints published, for ever.
    pub(crate) async fn run(self, publisher: Publisher) {
        let unread = "the StatefulSets have not been read yet".to_owned();
        let (sender, sets) = channel::channel::<Sets>(Err(unread));
        let reads_sets = self.rules.by_key && self.config.kube.stores.is_none();
        let saved = SavedEndpoints::open(&self.config).await;
        let mut stores = Stores { source: &self, sets: sets.clone(), known: None };
        let first_answer_max = Some(self.start_timeout);
        let mut known = Known::new(first_answer_max, |objects, complete| {
            if complete {
                self.publish(&publisher, &mut stores, &saved, objects);
            } else {
                self.start_without(&publisher, &saved);
            }
        });
        known.depends_on = reads_sets.then_some(sets);
        known.on_trouble = Box::new(|trouble| {
            self.status.set_trouble(trouble.what.clone());
            if trouble.holds_the_start() && !publisher.has_begun() {
                self.status.hold(REQUESTS, Some(trouble.what.clone()));
            }
            match publisher.endpoints() {
                0 => "no endpoint is known".to_owned(),
                count => format!("keeping the endpoints that are known ({count})"),
            }
        });
        known.on_confirmed = Box::new(|| {
            self.status.on_sync();
            self.status.clear_trouble();
            self.status.hold(REQUESTS, None);
            saved.confirm();
        });
        known.on_located = Box::new(|location| saved.locate(&self.config, location));
        known.has_fallback = Box::new(|| saved.usable().is_some());
        let endpoints = async {
            if self.config.kube.selector.is_some() {
                Watcher::<Pod>::new(self.subject(), known).run().await;
            } else {
                Watcher::<EndpointSlice>::new(self.subject(), known).run().await;
            }
        };
        if reads_sets {
            let has_begun = || publisher.has_begun();
            Box::pin(future::join(endpoints, self.follow_sets(&sender, &has_begun))).await;
        } else {
            Box::pin(endpoints).await;
        }
    }

    fn subject(&self) -> Subject<'_> {
        Subject { kube: &self.config.kube, rules: &self.rules, status: &self.status }
    }

    /// Keeps all `StatefulSets` known.
    async fn follow_sets(
        &self,
        sets: &channel::Sender<Sets>,
        has_begun: &(dyn Fn() -> bool + Sync),
    ) {
        let mut known = Known::new(None, |objects: &HashMap<_, _>, _| {
            self.status.hold(SETS, None);
            sets.send_modify(|sets| *sets = Ok(objects.clone()));
        });
        // That this watch fares well says nothing of the other one.
        known.on_trouble = Box::new(|trouble| {
            if trouble.holds_the_start() && !has_begun() {
                self.status.hold(SETS, Some(trouble.what.clone()));
            }
            sets.send_if_modified(|sets| {
                // Once they were read, they stay what they were.
                let news = sets.as_ref().is_err_and(|why| *why != trouble.what);
                if news {
                    *sets = Err(trouble.what.clone());
                }
                news
            });
            match &*sets.borrow() {
                Ok(sets) => format!("keeping the StatefulSets that are known ({})", sets.len()),
                Err(_) => "no StatefulSet is known".to_owned(),
            }
        });
        Watcher::<StatefulSet>::new(self.subject(), known).run().await;
    }

    /// Publishes what the objects say, unless that shows that the configuration is wrong: then nothing
    /// is, so that the start-up is not over.
    fn publish(
        &self,
        publisher: &Publisher,
        stores: &mut Stores<'_>,
        saved: &SavedEndpoints,
        objects: &HashMap<String, Extract>,
    ) {
        let Union { wanted, left_out, misfit } = convert::union(objects.values());
        let wrong = self.absence(objects).or(misfit).filter(|_| !publisher.has_begun());
        if self.status.hold(ENDPOINTS, wrong.clone())
            && let Some(why) = &wrong
        {
            warn!("the start waits: {why}");
        }
        if wrong.is_some() {
            self.status.set_unusable(wrong);
            return;
        }
        if self.status.set_unusable(left_out.clone())
            && let Some(why) = left_out
        {
            warn!("endpoints are left out: {why}");
        }
        let stores = if self.rules.by_key {
            // Without knowing who shares the keys nobody can be served.
            let Some(names) = stores.read(objects, publisher.has_begun()) else { return };
            membership::declare(names, &wanted)
        } else {
            Vec::new()
        };
        if self.status.set_saved(None) {
            info!(endpoints = wanted.len(), "the Kubernetes API has answered: its endpoints count");
        }
        publisher.publish_stores(wanted.iter().cloned(), &stores);
        saved.save(Named { endpoints: wanted, stores });
    }

    /// Why there is no such Service, if so. Each that selects pods has a slice, be it an empty one, so
    /// to read slices tells.
    fn absence(&self, objects: &HashMap<String, Extract>) -> Option<String> {
        let service = self.config.kube.service.as_ref().filter(|_| objects.is_empty())?;
        let name = &service.name;
        Some(format!(
            "there is no EndpointSlice of a Service {name:?}: either there is no such Service in \
             that namespace, or it selects no pods"
        ))
    }

    /// The time for a first answer is over: goes on with the endpoints of a former run, or with none.
    fn start_without(&self, publisher: &Publisher, saved: &SavedEndpoints) {
        if self.status.held().is_some() {
            return;
        }
        if let Some((named, confirmed)) = saved.usable() {
            let age = confirmed.elapsed().unwrap_or_default();
            let endpoints = named.endpoints.len();
            warn!(
                endpoints,
                age_s = age.as_secs(),
                "the Kubernetes API has not answered: going on with the saved endpoints"
            );
            self.status.set_saved(Some(confirmed));
            publisher.publish_stores(named.endpoints, &named.stores);
        } else {
            warn!("the Kubernetes API has not answered: going on without endpoints");
            publisher.publish([]);
        }
    }
}

/// The endpoints of a former run, and the file for those of this one.
#[derive(Debug, Default)]
struct SavedEndpoints {
    age_max: Duration,
    /// Where the file is, for messages.
    path: String,
    writer: Option<Writer>,
    read: Mutex<Option<Snapshot>>,
    identity: Mutex<Option<Identity>>,
}

impl SavedEndpoints {
    async fn open(config: &RouteConfig) -> Self {
        let Some(path) = config.kube.snapshot.clone() else { return Self::default() };
        let shown = path.display().to_string();
        let file = path.clone();
        let reading = move || Snapshot::read(&file);
        let read = Offload::default().run("reading it", SNAPSHOT_READ_MAX, reading).await;
        // It has nothing to do with the way to the API, of which the trouble would tell.
        let late = || Err(format!("reading it takes longer than {SNAPSHOT_READ_MAX:?}"));
        let read = read.unwrap_or_else(|_| late()).unwrap_or_else(|why| {
            warn!("AEGIS_KUBE_SNAPSHOT={shown}: the saved endpoints are of no use: {why}");
            None
        });
        let writer = Writer::start(path)
            .inspect_err(|error| warn!("AEGIS_KUBE_SNAPSHOT={shown}: no thread for it: {error}"));
        Self {
            age_max: config.kube.snapshot_age_max,
            path: shown,
            writer: writer.ok(),
            read: Mutex::new(read),
            identity: Mutex::default(),
        }
    }

    fn locate(&self, config: &RouteConfig, Location { server, namespace }: &Location) {
        let identity = Identity::new(config, server, namespace);
        if let Some(writer) = &self.writer {
            writer.identify(identity.clone());
        }
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = Some(identity);
    }

    /// The endpoints of a former run, if they are of use, and when they were confirmed last.
    fn usable(&self) -> Option<(Named, SystemTime)> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = self.identity.lock().unwrap_or_else(PoisonError::into_inner);
        let snapshot = read.as_ref()?;
        let named = match &*identity {
            Some(identity) => snapshot.use_for(identity, self.age_max, SystemTime::now()),
            None => Err("whose they have to be is not known".to_owned()),
        };
        match named {
            Ok(named) => Some((named, snapshot.confirmed())),
            Err(why) => {
                warn!(
                    "AEGIS_KUBE_SNAPSHOT={}: the saved endpoints are of no use: {why}",
                    self.path
                );
                *read = None;
                None
            }
        }
    }

    fn save(&self, named: Named) {
        if let Some(writer) = &self.writer {
            writer.save(named);
        }
    }

    fn confirm(&self) {
        if let Some(writer) = &self.writer {
            writer.confirm();
        }
    }
}

/// Which stores share the keys.
struct Stores<'a> {
    source: &'a Kubernetes,
    sets: channel::Receiver<Sets>,
    known: Option<Membership>,
}

impl Stores<'_> {
    /// The names of all of them: the last that were known, if they are not known now. Before the start
    /// is over, it waits for them.
    fn read(&mut self, objects: &HashMap<String, Extract>, begun: bool) -> Option<&[String]> {
        let (kube, status) = (&self.source.config.kube, &self.source.status);
        let sets = self.sets.borrow_and_update();
        let sets = sets.as_ref().map_err(String::as_str);
        // Why the StatefulSets are not known is reported by who reads them.
        let answered = sets.is_ok() || kube.stores.is_some();
        let service = kube.service.as_ref().map(|service| service.name.as_str());
        let last = self.known.as_ref().map(|known| known.set.as_str());
        let found = membership::stores(objects.values(), last, kube.stores, sets, service);
        let why = match found {
            Ok(found) => {
                self.known = Some(found);
                None
            }
            Err(why) => Some(why),
        };
        status.hold(STORES, why.clone().filter(|_| answered && !begun));
        if status.set_stores_trouble(why.clone())
            && let Some(why) = why
        {
            warn!("which stores share the keys is not known: {why}");
        }
        self.known.as_ref().map(|known| &known.names[..])
    }
}
