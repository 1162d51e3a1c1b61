//! The Kubernetes API as a source: one watch, complete snapshots, and the last known good set
//! whatever becomes of the API server.

mod client;
mod convert;

use std::collections::HashMap;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{self, Either};
use futures_util::{Stream, TryStreamExt};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tracing::{debug, info, warn};

use super::Publisher;
use super::status::{ErrorKind, Status};
use crate::config::{Config, KubeConfig, Locality, Route};
use convert::{Membership, Ordinals, Rules, Said};

/// Changes that come within this time of the first make one snapshot.
const DEBOUNCE: Duration = Duration::from_millis(3);

/// How long start-up waits for the API before it goes on without endpoints.
const FIRST_ANSWER_MAX: Duration = Duration::from_secs(5);

/// The wait after a first failure doubles from here…
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// …to here.
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// The label that ties a slice to its Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// A kind of object that says something of endpoints.
trait Source:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + DeserializeOwned
    + Send
    + 'static
{
    /// What is kept of it.
    type Said: PartialEq + Send;

    /// The selector of those that matter.
    fn labels(kube: &KubeConfig) -> String;

    fn read(&self, rules: &Rules) -> Self::Said;
}

impl Source for EndpointSlice {
    type Said = Said;

    fn labels(kube: &KubeConfig) -> String {
        let service = kube.service.as_ref().map(|service| service.name.as_str());
        format!("{SERVICE_LABEL}={}", service.unwrap_or_default())
    }

    fn read(&self, rules: &Rules) -> Said {
        convert::slice(self, rules)
    }
}

impl Source for Pod {
    type Said = Said;

    fn labels(kube: &KubeConfig) -> String {
        kube.selector.clone().unwrap_or_default()
    }

    fn read(&self, rules: &Rules) -> Said {
        convert::pod(self, rules)
    }
}

impl Source for StatefulSet {
    type Said = Ordinals;

    fn labels(_: &KubeConfig) -> String {
        String::new()
    }

    fn read(&self, _: &Rules) -> Ordinals {
        convert::ordinals(self)
    }
}

/// All `StatefulSets` of the namespace, or why they are not known.
type Sets = Result<HashMap<String, Ordinals>, String>;

/// The Kubernetes API as a source of endpoints.
#[derive(Debug)]
pub struct Kubernetes {
    config: Arc<Config>,
    status: Arc<Status>,
    rules: Rules,
}

impl Kubernetes {
    /// The source that the configuration describes.
    pub fn new(config: Arc<Config>, status: Arc<Status>) -> Self {
        let (node, zone) = (config.node_name.clone(), config.zone.clone());
        match config.locality {
            Locality::Node if node.is_none() => {
                warn!("AEGIS_LOCALITY=node has no effect: AEGIS_NODE_NAME is not set");
            }
            Locality::Zone if zone.is_none() => {
                warn!("AEGIS_LOCALITY=zone has no effect: AEGIS_ZONE is not set");
            }
            _ => {}
        }
        let (port, locality) = (config.kube.port.clone(), config.locality);
        let by_key = config.requests.route == Route::Key;
        let rules = Rules { port, locality, node, zone, by_key };
        Self { config, status, rules }
    }

    /// Keeps the endpoints published, for ever.
    pub async fn run(self, publisher: Publisher) {
        let unread = "the StatefulSets have not been read yet".to_owned();
        let (sender, sets) = watch::channel::<Sets>(Err(unread));
        let reads_sets = self.rules.by_key && self.config.kube.stores.is_none();
        let mut stores = Stores { source: &self, sets: sets.clone(), known: None };
        let mut known = Known::new(Arc::clone(&self.status), |objects, complete| {
            self.publish(&publisher, &mut stores, objects, complete);
        });
        known.also = reads_sets.then_some(sets);
        let endpoints = async {
            if self.config.kube.selector.is_some() {
                self.follow::<Pod>(known).await;
            } else {
                self.follow::<EndpointSlice>(known).await;
            }
        };
        if reads_sets {
            future::join(endpoints, self.follow_sets(&sender)).await;
        } else {
            endpoints.await;
        }
    }

    /// Keeps all `StatefulSets` known.
    async fn follow_sets(&self, sets: &watch::Sender<Sets>) {
        // That this watch fares well says nothing of the other one.
        let mut known = Known::new(Arc::default(), |objects: &HashMap<_, _>, complete| {
            if complete {
                sets.send_modify(|sets| *sets = Ok(objects.clone()));
            }
        });
        known.explain = Box::new(|trouble| {
            self.status.count(trouble.kind);
            sets.send_if_modified(|sets| {
                // Once they were read, they stay what they were.
                let news = sets.as_ref().is_err_and(|why| *why != trouble.what);
                if news {
                    *sets = Err(trouble.what.clone());
                }
                news
            });
        });
        self.follow::<StatefulSet>(known).await;
    }

    /// Publishes what the objects say.
    fn publish(
        &self,
        publisher: &Publisher,
        stores: &mut Stores<'_>,
        objects: &HashMap<String, Said>,
        complete: bool,
    ) {
        let (wanted, trouble) = convert::union(objects.values());
        if let Some(trouble) = trouble {
            if self.status.trouble().as_ref() != Some(&trouble) {
                warn!("endpoints are left out: {trouble}");
            }
            self.status.set_trouble(trouble);
        }
        if !self.rules.by_key {
            if !complete {
                warn!("the Kubernetes API has not answered yet: going on without endpoints");
            }
            return publisher.publish(wanted);
        }
        // Without knowing who shares the keys nobody can be served.
        if let Some(names) = stores.read(objects) {
            publisher.publish_stores(wanted.iter().cloned(), &convert::declare(names, &wanted));
        }
    }

    async fn follow<K: Source>(&self, mut known: Known<'_, K::Said>) {
        let mut backoff = Backoff::default();
        let mut streaming = true;
        loop {
            let status = Arc::clone(&known.status);
            let connected = client::connect(self.config.kube.watch_timeout, status).await;
            let trouble = match connected {
                Ok((client, own_namespace)) => {
                    let namespace = self.namespace(&own_namespace);
                    let watched = (client, &namespace[..]);
                    self.watch::<K>(watched, &mut known, &mut backoff, &mut streaming).await
                }
                Err(error) => client::client(&error, "reach", "", ""),
            };
            known.report(&trouble, &backoff);
            let wait = backoff.next().max(trouble.wait);
            known.wait_for(sleep(wait)).await;
        }
    }

    fn namespace(&self, own: &str) -> String {
        let kube = &self.config.kube;
        let named = kube.service.as_ref().and_then(|service| service.namespace.as_ref());
        named.or(kube.namespace.as_ref()).map_or_else(|| own.to_owned(), Clone::clone)
    }

    /// Watches until a new client is needed: credentials are read anew then.
    async fn watch<K: Source>(
        &self,
        (client, namespace): (Client, &str),
        known: &mut Known<'_, K::Said>,
        backoff: &mut Backoff,
        streaming: &mut bool,
    ) -> client::Trouble {
        let kube = &self.config.kube;
        let labels = K::labels(kube);
        let resource = match &K::group(&())[..] {
            "" => K::plural(&()).into_owned(),
            group => format!("{}.{group}", K::plural(&())),
        };
        info!(resource, namespace, labels, "watching the Kubernetes API");
        loop {
            let api = Api::<K>::namespaced(client.clone(), namespace);
            let mut config = watcher::Config::default()
                .labels(&labels)
                .timeout(kube.watch_timeout.as_secs() as u32);
            if *streaming {
                config = config.streaming_lists();
            }
            let mut events = pin!(watcher::watcher(api, config));
            let trouble = loop {
                let Err(error) = self.step(&mut events, known, backoff).await else { continue };
                let trouble = client::explain(&error, &resource, namespace);
                if *streaming && trouble.no_streaming {
                    debug!(why = trouble.what, "no streaming lists here: listing");
                    *streaming = false;
                    break None;
                }
                if trouble.kind == ErrorKind::Unauthorized {
                    break Some(trouble);
                }
                known.report(&trouble, backoff);
                let wait = backoff.next().max(trouble.wait);
                known.wait_for(sleep(wait)).await;
            };
            if let Some(trouble) = trouble {
                return trouble;
            }
        }
    }

    /// Takes one event in, and publishes when it is time to.
    async fn step<K: Source>(
        &self,
        events: &mut (impl Stream<Item = watcher::Result<Event<K>>> + Unpin),
        known: &mut Known<'_, K::Said>,
        backoff: &mut Backoff,
    ) -> watcher::Result<()> {
        let event = known.wait_for(events.try_next()).await?;
        match event {
            Some(Event::Init) => known.begin(),
            Some(Event::InitApply(object)) => {
                known.list(object.name_any(), object.read(&self.rules));
            }
            Some(Event::InitDone) => {
                backoff.reset();
                known.end();
            }
            Some(Event::Apply(object)) => {
                backoff.reset();
                known.set(object.name_any(), object.read(&self.rules));
            }
            Some(Event::Delete(object)) => {
                backoff.reset();
                known.remove(&object.name_any());
            }
            None => {}
        }
        Ok(())
    }
}

/// Which stores share the keys.
struct Stores<'a> {
    source: &'a Kubernetes,
    sets: watch::Receiver<Sets>,
    known: Option<Membership>,
}

impl Stores<'_> {
    /// The names of all of them: the last that were known, if they are not known now.
    fn read(&mut self, objects: &HashMap<String, Said>) -> Option<&[String]> {
        let kube = &self.source.config.kube;
        let sets = self.sets.borrow_and_update();
        let sets = sets.as_ref().map_err(String::as_str);
        let service = kube.service.as_ref().map(|service| service.name.as_str());
        let last = self.known.as_ref().map(|known| known.set.as_str());
        let found = convert::stores(objects.values(), last, kube.stores, sets, service);
        let why = match found {
            Ok(found) => {
                self.known = Some(found);
                None
            }
            Err(why) => Some(why),
        };
        if self.source.status.set_stores_trouble(why.clone())
            && let Some(why) = why
        {
            warn!("which stores share the keys is not known: {why}");
        }
        self.known.as_ref().map(|known| &known.names[..])
    }
}

/// Does something with all that is known: whether any list was complete comes with it.
type Publish<'a, T> = Box<dyn FnMut(&HashMap<String, T>, bool) + Send + 'a>;

/// What is known of the objects, and when it is to be published.
struct Known<'a, T> {
    publish: Publish<'a, T>,
    /// Is told what goes wrong.
    explain: Box<dyn Fn(&client::Trouble) + Send + 'a>,
    /// What else what is published depends on.
    also: Option<watch::Receiver<Sets>>,
    status: Arc<Status>,
    objects: HashMap<String, T>,
    /// A list that is not complete yet.
    listed: Option<HashMap<String, T>>,
    /// Whether any list was complete: before, an empty set is only ignorance.
    complete: bool,
    publish_at: Option<Instant>,
}

impl<'a, T: PartialEq> Known<'a, T> {
    fn new(
        status: Arc<Status>,
        publish: impl FnMut(&HashMap<String, T>, bool) + Send + 'a,
    ) -> Self {
        Self {
            publish: Box::new(publish),
            explain: Box::new(|_| {}),
            also: None,
            status,
            objects: HashMap::new(),
            listed: None,
            complete: false,
            publish_at: Some(Instant::now() + FIRST_ANSWER_MAX),
        }
    }

    fn report(&self, trouble: &client::Trouble, backoff: &Backoff) {
        // The same trouble again is no news.
        if backoff.failures == 0 || self.status.trouble().as_ref() != Some(&trouble.what) {
            warn!(kind = ?trouble.kind, "{}; keeping what is known", trouble.what);
        }
        self.status.on_error(trouble.kind, trouble.what.clone());
        (self.explain)(trouble);
    }

    fn begin(&mut self) {
        self.listed = Some(HashMap::new());
    }

    fn list(&mut self, name: String, said: T) {
        self.listed.get_or_insert_default().insert(name, said);
    }

    fn end(&mut self) {
        self.objects = self.listed.take().unwrap_or_default();
        if !self.complete {
            self.complete = true;
            self.publish_at = None;
        }
        self.changed();
    }

    fn set(&mut self, name: String, said: T) {
        if self.objects.get(&name) != Some(&said) {
            self.objects.insert(name, said);
            self.changed();
        }
        self.status.on_sync();
    }

    fn remove(&mut self, name: &str) {
        if self.objects.remove(name).is_some() {
            self.changed();
        }
        self.status.on_sync();
    }

    fn changed(&mut self) {
        self.publish_at.get_or_insert_with(|| Instant::now() + DEBOUNCE);
    }

    /// Waits for a future, and publishes meanwhile when it is time to.
    async fn wait_for<O>(&mut self, future: impl Future<Output = O>) -> O {
        let mut future = pin!(future);
        loop {
            if let Some(at) = self.publish_at {
                // Events that are there already go first; but a stream that never pauses must not
                // keep a snapshot back.
                if Instant::now() < at
                    && let Ok(output) = timeout_at(at, &mut future).await
                {
                    return output;
                }
                sleep_until(at).await;
                self.publish_at = None;
                (self.publish)(&self.objects, self.complete);
                continue;
            }
            let Some(also) = &mut self.also else { return future.await };
            let changed = match future::select(&mut future, pin!(also.changed())).await {
                Either::Left((output, _)) => return output,
                Either::Right((changed, _)) => changed,
            };
            if changed.is_err() {
                self.also = None;
            }
            self.changed();
        }
    }
}

/// Waits after failures: longer each time, and never all sidecars at once.
#[derive(Debug, Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    fn next(&mut self) -> Duration {
        let full = BACKOFF_MIN.saturating_mul(1 << self.failures.min(16)).min(BACKOFF_MAX);
        self.failures = self.failures.saturating_add(1);
        full.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    fn reset(&mut self) {
        self.failures = 0;
    }
}
