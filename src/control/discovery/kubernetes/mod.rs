//! The Kubernetes API as a source: one watch, complete snapshots, and the last known good set
//! whatever becomes of the API server.

mod client;
mod convert;

use std::collections::HashMap;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, TryStreamExt};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tracing::{debug, info, warn};

use super::Publisher;
use super::status::{ErrorKind, Status};
use crate::config::{Config, Locality};
use convert::{Rules, Said};

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

/// A kind of object that names endpoints.
trait Source:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + DeserializeOwned
    + Send
    + 'static
{
    fn read(&self, rules: &Rules) -> Said;
}

impl Source for EndpointSlice {
    fn read(&self, rules: &Rules) -> Said {
        convert::slice(self, rules)
    }
}

impl Source for Pod {
    fn read(&self, rules: &Rules) -> Said {
        convert::pod(self, rules)
    }
}

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
        let rules = Rules { port: config.kube.port.clone(), locality: config.locality, node, zone };
        Self { config, status, rules }
    }

    /// Keeps the endpoints published, for ever.
    pub async fn run(self, publisher: Publisher) {
        if self.config.kube.selector.is_some() {
            self.follow::<Pod>(&publisher).await;
        } else {
            self.follow::<EndpointSlice>(&publisher).await;
        }
    }

    async fn follow<K: Source>(&self, publisher: &Publisher) {
        let mut known = Known::new(publisher, &self.status);
        let mut backoff = Backoff::default();
        let mut streaming = true;
        loop {
            let connected =
                client::connect(self.config.kube.watch_timeout, Arc::clone(&self.status)).await;
            let trouble = match connected {
                Ok((client, own_namespace)) => {
                    let namespace = self.namespace(&own_namespace);
                    let watched = (client, &namespace[..]);
                    self.watch::<K>(watched, &mut known, &mut backoff, &mut streaming).await
                }
                Err(error) => client::client(&error, "reach", "", ""),
            };
            self.report(&trouble, &backoff);
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
        known: &mut Known<'_>,
        backoff: &mut Backoff,
        streaming: &mut bool,
    ) -> client::Trouble {
        let kube = &self.config.kube;
        let labels = match (&kube.selector, &kube.service) {
            (Some(selector), _) => selector.clone(),
            (None, Some(service)) => format!("{SERVICE_LABEL}={}", service.name),
            (None, None) => String::new(),
        };
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
                self.report(&trouble, backoff);
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
        known: &mut Known<'_>,
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

    fn report(&self, trouble: &client::Trouble, backoff: &Backoff) {
        // The same trouble again is no news.
        if backoff.failures == 0 || self.status.trouble().as_ref() != Some(&trouble.what) {
            warn!(kind = ?trouble.kind, "{}; keeping the endpoints that are known", trouble.what);
        }
        self.status.on_error(trouble.kind, trouble.what.clone());
    }
}

/// What is known of the objects, and when it is to be published.
struct Known<'a> {
    publisher: &'a Publisher,
    status: &'a Status,
    objects: HashMap<String, Said>,
    /// A list that is not complete yet.
    listed: Option<HashMap<String, Said>>,
    /// Whether any list was complete: before, an empty set is only ignorance.
    complete: bool,
    publish_at: Option<Instant>,
}

impl<'a> Known<'a> {
    fn new(publisher: &'a Publisher, status: &'a Status) -> Self {
        Self {
            publisher,
            status,
            objects: HashMap::new(),
            listed: None,
            complete: false,
            publish_at: Some(Instant::now() + FIRST_ANSWER_MAX),
        }
    }

    fn begin(&mut self) {
        self.listed = Some(HashMap::new());
    }

    fn list(&mut self, name: String, said: Said) {
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

    fn set(&mut self, name: String, said: Said) {
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
    async fn wait_for<T>(&mut self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        while let Some(at) = self.publish_at {
            // Events that are there already go first; but a stream that never pauses must not
            // keep a snapshot back.
            if Instant::now() < at
                && let Ok(output) = timeout_at(at, &mut future).await
            {
                return output;
            }
            sleep_until(at).await;
            self.publish();
        }
        future.await
    }

    fn publish(&mut self) {
        self.publish_at = None;
        let (wanted, trouble) = convert::union(self.objects.values());
        if let Some(trouble) = trouble {
            if self.status.trouble().as_ref() != Some(&trouble) {
                warn!("endpoints are left out: {trouble}");
            }
            self.status.set_trouble(trouble);
        }
        if !self.complete {
            warn!("the Kubernetes API has not answered yet: going on without endpoints");
        }
        self.publisher.publish(wanted);
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
