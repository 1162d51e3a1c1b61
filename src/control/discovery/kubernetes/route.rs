//! What a route makes of what is known: its endpoints, by its own rules, and their publication.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::future::join_all;
use tokio::sync::watch as channel;
use tracing::{Span, info, warn};

use super::convert::{self, Extract, Rules, Union};
use super::known::{Audience, Location};
use super::membership::{self, Membership};
use super::saved::{Named, SavedEndpoints};
use super::sets::{self, Sets};
use super::trouble::Trouble;
use super::watch::{Object, Query};
use crate::config::{Balance, Config, RouteConfig};
use crate::control::discovery::Publisher;
use crate::control::discovery::status::Status;

/// The label that ties a slice to its Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// What may hold the start-up: what becomes of the requests for endpoints, and what the answers say of
/// the endpoints and the stores.
const REQUESTS: &str = "requests";
const ENDPOINTS: &str = "endpoints";
const STORES: &str = "stores";

/// A route whose endpoints the Kubernetes API names.
#[derive(Debug)]
pub(crate) struct Route {
    config: Arc<RouteConfig>,
    rules: Rules,
    status: Arc<Status>,
    publisher: Publisher,
    saved: SavedEndpoints,
    /// The `StatefulSets` that are read.
    sets: channel::Receiver<Sets>,
    /// Which stores shared the keys, when that was known last.
    members: Option<Membership>,
    /// Whether the time for a first answer is over.
    waited: bool,
    /// What names it in the log.
    span: Span,
}

impl Route {
    /// One as the configuration describes it; what it logs is in this span.
    pub(crate) fn new(
        process: &Config,
        config: Arc<RouteConfig>,
        publisher: Publisher,
        status: Arc<Status>,
        span: Span,
    ) -> Self {
        let (node, zone) = (process.node_name.clone(), process.zone.clone());
        let region = process.region.clone();
        let (port, locality) = (config.kube.port.clone(), config.locality);
        let by_key = config.balance == Balance::KeyHash;
        let rules = Rules { port, locality, node, zone, region, by_key };
        Self {
            config,
            rules,
            status,
            publisher,
            saved: SavedEndpoints::default(),
            sets: sets::unread().1,
            members: None,
            waited: false,
            span,
        }
    }

    /// Whether its endpoints are Pods, and not those of slices.
    pub(super) fn is_of_pods(&self) -> bool {
        self.config.kube.selector.is_some()
    }

    /// What its endpoints are read from.
    pub(super) fn query(&self) -> Query {
        let kube = &self.config.kube;
        let service = kube.service.as_ref();
        let named = service.and_then(|service| service.namespace.as_ref());
        let of_service = || {
            let service = service.map(|service| service.name.as_str());
            format!("{SERVICE_LABEL}={}", service.unwrap_or_default())
        };
        Query {
            namespace: named.or(kube.namespace.as_ref()).cloned(),
            labels: kube.selector.clone().unwrap_or_else(of_service),
            timeout: kube.watch_timeout,
        }
    }

    /// Which `StatefulSets` tell it who shares the keys, if any do: all of its namespace.
    pub(super) fn query_of_sets(&self) -> Option<Query> {
        let reads = self.rules.by_key && self.config.kube.stores.is_none();
        reads.then(|| Query { labels: String::new(), ..self.query() })
    }

    /// What of it whoever reads the `StatefulSets` has to know.
    pub(super) fn listener(&self) -> sets::Listener {
        let (status, span) = (Arc::clone(&self.status), self.span.clone());
        sets::Listener { status, snapshots: self.publisher.subscribe(), span }
    }

    /// These are the `StatefulSets` that tell it who shares the keys.
    pub(super) fn read_sets(&mut self, sets: channel::Receiver<Sets>) {
        self.sets = sets;
    }

    /// Reads what was saved of a former run.
    async fn open(&mut self) {
        self.saved = SavedEndpoints::open(&self.config).await;
    }

    /// Publishes what the objects say, unless that shows that the configuration is wrong: then nothing
    /// is, so that the start-up is not over.
    fn publish(&mut self, objects: &[&Extract]) {
        let Union { wanted, left_out, misfit } = convert::union(objects.iter().copied());
        let absence = self.absence(objects);
        let wrong = absence.clone().or(misfit).filter(|_| !self.publisher.has_begun());
        if self.status.hold(ENDPOINTS, wrong.clone())
            && let Some(why) = &wrong
        {
            warn!("the start waits: {why}");
        }
        if wrong.is_some() {
            self.status.set_unusable(wrong);
            return;
        }
        // Later its Service may have been deleted, which has to be seen from outside as well.
        if self.status.set_unusable(left_out.clone().or(absence.clone())) {
            if let Some(why) = left_out {
                warn!("endpoints are left out: {why}");
            } else if let Some(why) = absence {
                warn!("no endpoint is left: {why}");
            }
        }
        let stores = if self.rules.by_key {
            // Without knowing who shares the keys nobody can be served.
            let Some(names) = self.stores(objects) else { return };
            membership::declare(names, &wanted)
        } else {
            Vec::new()
        };
        if self.status.set_saved(None) {
            info!(endpoints = wanted.len(), "the Kubernetes API has answered: its endpoints count");
        }
        self.publisher.publish_stores(wanted.iter().cloned(), &stores);
        self.saved.save(Named { endpoints: wanted, stores });
    }

    /// Why there is no such Service, if so. Each that selects pods has a slice, be it an empty one, so
    /// to read slices tells.
    fn absence(&self, objects: &[&Extract]) -> Option<String> {
        let service = self.config.kube.service.as_ref().filter(|_| objects.is_empty())?;
        let name = &service.name;
        Some(format!(
            "there is no EndpointSlice of a Service {name:?}: either there is no such Service in \
             that namespace, or it selects no pods"
        ))
    }

    /// The names of all stores that share the keys: the last that were known, if they are not known now.
    /// Before the start is over, it waits for them.
    fn stores(&mut self, objects: &[&Extract]) -> Option<&[String]> {
        let kube = &self.config.kube;
        let sets = self.sets.borrow_and_update();
        let sets = sets.as_ref().map_err(String::as_str);
        // Why the StatefulSets are not known is reported by who reads them.
        let answered = sets.is_ok() || kube.stores.is_some();
        let service = kube.service.as_ref().map(|service| service.name.as_str());
        let last = self.members.as_ref().map(|members| members.set.as_str());
        let found = membership::stores(objects.iter().copied(), last, kube.stores, sets, service);
        let why = match found {
            Ok(found) => {
                self.members = Some(found);
                None
            }
            Err(why) => Some(why),
        };
        let begun = self.publisher.has_begun();
        self.status.hold(STORES, why.clone().filter(|_| answered && !begun));
        if self.status.set_stores_trouble(why.clone())
            && answered
            && let Some(why) = why
        {
            warn!("which stores share the keys is not known: {why}");
        }
        self.members.as_ref().map(|members| &members.names[..])
    }

    /// The time for a first answer is over: goes on with what is known of a former run, or with nothing.
    /// Where these are the objects, only who shares the keys is not known.
    fn start_without(&mut self, objects: Option<&[&Extract]>) {
        let is_over = std::mem::replace(&mut self.waited, true);
        if is_over || self.status.held().is_some() || self.publisher.has_begun() {
            return;
        }
        let saved = self.saved.usable();
        let stores = saved.as_ref().map(|(named, _)| &named.stores[..]);
        self.members = stores.and_then(Membership::of_former_run);
        let Some((named, confirmed)) =
            saved.filter(|_| objects.is_none() || self.members.is_some())
        else {
            if objects.is_none() {
                warn!("the Kubernetes API has not answered: going on without endpoints");
            } else {
                warn!(
                    "the Kubernetes API has not said which stores there are: going on without endpoints"
                );
            }
            return self.publisher.publish([]);
        };
        let age_s = confirmed.elapsed().unwrap_or_default().as_secs();
        let (endpoints, stores) = (named.endpoints.len(), named.stores.len());
        if let Some(objects) = objects {
            warn!(
                stores,
                age_s,
                "the Kubernetes API has not said which stores there are: going on with the saved ones"
            );
            return self.publish(objects);
        }
        warn!(
            endpoints,
            stores, age_s, "the Kubernetes API has not answered: going on with the saved endpoints"
        );
        self.status.set_saved(Some(confirmed));
        self.publisher.publish_stores(named.endpoints, &named.stores);
    }

    fn on_trouble(&self, trouble: &Trouble, is_news: bool) {
        self.status.on_error(trouble.kind, trouble.what.clone());
        if trouble.holds_the_start() && !self.publisher.has_begun() {
            self.status.hold(REQUESTS, Some(trouble.what.clone()));
        }
        if is_news {
            let kept = match self.publisher.endpoints() {
                0 => "no endpoint is known".to_owned(),
                count => format!("keeping the endpoints that are known ({count})"),
            };
            warn!(kind = ?trouble.kind, "{}; {kept}", trouble.what);
        }
    }

    fn on_confirmed(&self) {
        self.status.on_sync();
        self.status.clear_trouble();
        self.status.hold(REQUESTS, None);
        self.saved.confirm();
    }
}

/// The routes whose endpoints are read from the same objects, each by its own rules: of an object,
/// what each of them reads is kept in their order.
pub(super) struct Routes<K> {
    routes: Vec<Route>,
    read: fn(&K, &Rules) -> Extract,
}

impl<K: Object> Routes<K> {
    /// These routes, with what was saved of former runs of theirs; an object is read like this.
    pub(super) async fn open(mut routes: Vec<Route>, read: fn(&K, &Rules) -> Extract) -> Self {
        join_all(routes.iter_mut().map(Route::open)).await;
        Self { routes, read }
    }

    fn each(&self, tell: impl Fn(&Route)) {
        self.routes.iter().for_each(|route| route.span.in_scope(|| tell(route)));
    }

    fn each_mut(&mut self, mut tell: impl FnMut(usize, &mut Route)) {
        for (at, route) in self.routes.iter_mut().enumerate() {
            route.span.clone().in_scope(|| tell(at, route));
        }
    }
}

impl<K: Object> Audience for Routes<K> {
    type Object = K;
    type Extract = Vec<Extract>;

    fn extract(&self, object: &K) -> Vec<Extract> {
        self.routes.iter().map(|route| (self.read)(object, &route.rules)).collect()
    }

    fn publish(&mut self, objects: &HashMap<String, Vec<Extract>>) {
        self.each_mut(|at, route| route.publish(&of_route(objects, at)));
    }

    fn start_without(&mut self, objects: Option<&HashMap<String, Vec<Extract>>>) {
        self.each_mut(|at, route| {
            route.start_without(objects.map(|objects| of_route(objects, at)).as_deref());
        });
    }

    fn start_from_saved(&mut self) {
        self.each_mut(|_, route| {
            if !route.waited && route.saved.usable().is_some() {
                route.start_without(None);
            }
        });
    }

    fn on_trouble(&mut self, trouble: &Trouble, is_news: bool) {
        self.each(|route| route.on_trouble(trouble, is_news));
    }

    fn on_recovered(&self, resource: &str) {
        self.each(|_| info!(resource, "the Kubernetes API is well again"));
    }

    fn on_confirmed(&self) {
        self.each(Route::on_confirmed);
    }

    fn on_located(&self, location: &Location, resource: &str, labels: &str) {
        let namespace = &location.namespace;
        self.each(|route| {
            route.saved.locate(&route.config, location);
            info!(resource, namespace, labels, "watching the Kubernetes API");
        });
    }
}

/// What the route at this place reads of all objects.
fn of_route(objects: &HashMap<String, Vec<Extract>>, at: usize) -> Vec<&Extract> {
    objects.values().map(|extracts| &extracts[at]).collect()
}
