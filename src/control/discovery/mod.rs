//! Where endpoints come from: the configured backends, names resolved again and again.
//!
//! What leaves here is always a complete [`EndpointSnapshot`], and only when something changed.
//! What was known last stays in force while a lookup fails.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::Shared;
use crate::config::HostPort;
use crate::limits::ENDPOINTS_MAX;
use crate::proxy::endpoints::{Endpoint, EndpointSnapshot};

/// Finds the addresses of a name.
pub trait Resolve {
    /// The addresses of `backend`, not empty.
    fn resolve(
        &self,
        backend: &HostPort,
    ) -> impl Future<Output = io::Result<Vec<SocketAddr>>> + Send;
}

/// The host's resolver, with its configuration.
#[derive(Debug)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    async fn resolve(&self, backend: &HostPort) -> io::Result<Vec<SocketAddr>> {
        let found: Vec<_> =
            tokio::net::lookup_host((backend.host.as_str(), backend.port)).await?.collect();
        if found.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        Ok(found)
    }
}

/// Publishes the endpoints of the configured backends, for ever.
pub async fn run(shared: Arc<Shared>) {
    let mut discovery = Discovery::new(&shared, SystemResolver);
    loop {
        discovery.refresh().await;
        if discovery.is_static() {
            return;
        }
        tokio::time::sleep(shared.config.dns_refresh).await;
    }
}

/// Turns configured backends into endpoint snapshots.
#[derive(Debug)]
struct Discovery<'a, R> {
    shared: &'a Shared,
    resolver: R,
    /// The addresses found last, one list a backend, in the order of the configuration.
    known: Vec<Vec<SocketAddr>>,
    failing: HashSet<usize>,
    crowded: bool,
}

impl<'a, R: Resolve> Discovery<'a, R> {
    fn new(shared: &'a Shared, resolver: R) -> Self {
        let known =
            shared.config.backends.iter().map(|backend| literal(backend).into_iter().collect());
        Self { shared, resolver, known: known.collect(), failing: HashSet::new(), crowded: false }
    }

    /// Whether all backends are addresses, so that nothing can change.
    fn is_static(&self) -> bool {
        self.shared.config.backends.iter().all(|backend| literal(backend).is_some())
    }

    /// Looks every name up and publishes a snapshot if anything changed.
    async fn refresh(&mut self) {
        for (index, backend) in self.shared.config.backends.iter().enumerate() {
            if literal(backend).is_some() {
                continue;
            }
            match self.resolver.resolve(backend).await {
                Ok(mut addresses) => {
                    // Resolvers rotate their answers, which is no change.
                    addresses.sort_unstable();
                    addresses.dedup();
                    self.known[index] = addresses;
                    if self.failing.remove(&index) {
                        tracing::info!(%backend, "the name resolves again");
                    }
                }
                Err(error) => {
                    if self.failing.insert(index) {
                        let kept = self.known[index].len();
                        tracing::warn!(%backend, %error, kept, "the name does not resolve");
                    }
                }
            }
        }
        let endpoints = self.endpoints();
        let current = self.shared.snapshot();
        let same = current.endpoints.len() == endpoints.len()
            && current.endpoints.iter().zip(&endpoints).all(|(a, b)| Arc::ptr_eq(a, b));
        if current.generation == 0 || !same {
            let generation = current.generation + 1;
            tracing::info!(generation, endpoints = endpoints.len(), "endpoints changed");
            self.shared.publish(EndpointSnapshot { generation, endpoints });
        }
    }

    /// All endpoints as of now. Those that were there before are the same objects.
    fn endpoints(&mut self) -> Vec<Arc<Endpoint>> {
        let current = self.shared.snapshot();
        let before: HashMap<(&str, SocketAddr), &Arc<Endpoint>> =
            current.endpoints.iter().map(|e| ((e.name.as_str(), e.address), e)).collect();
        let mut seen = HashSet::new();
        let mut endpoints = Vec::new();
        for (backend, addresses) in self.shared.config.backends.iter().zip(&self.known) {
            for &address in addresses.iter().filter(|&&address| seen.insert(address)) {
                let name = name(backend, address);
                let endpoint = before.get(&(name.as_str(), address)).map_or_else(
                    || Endpoint::new(name.clone(), address, self.shared.workers.len()),
                    |&known| Arc::clone(known),
                );
                endpoints.push(endpoint);
            }
        }
        if endpoints.len() > ENDPOINTS_MAX {
            if !std::mem::replace(&mut self.crowded, true) {
                let found = endpoints.len();
                tracing::warn!(
                    found,
                    used = ENDPOINTS_MAX,
                    "too many endpoints: the rest is unused"
                );
            }
            endpoints.truncate(ENDPOINTS_MAX);
        }
        endpoints
    }
}

/// The address of a backend that is given as one.
fn literal(backend: &HostPort) -> Option<SocketAddr> {
    backend.host.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, backend.port))
}

/// What an endpoint is called: its address, and before it the name that led there, if any. So
/// names are unique, and stay the same when other addresses of the name come and go.
fn name(backend: &HostPort, address: SocketAddr) -> String {
    match literal(backend) {
        Some(_) => address.to_string(),
        None => format!("{}/{address}", backend.host),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Instant;

    use super::*;
    use crate::config::Config;
    use crate::control::DriverInfo;

    #[derive(Debug, Default)]
    struct Answers(Mutex<HashMap<String, Vec<&'static str>>>);

    impl Resolve for &Answers {
        async fn resolve(&self, backend: &HostPort) -> io::Result<Vec<SocketAddr>> {
            let answers = self.0.lock().unwrap();
            let found = answers.get(&backend.host).ok_or(io::ErrorKind::NotFound)?;
            Ok(found.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), backend.port)).collect())
        }
    }

    impl Answers {
        fn set(&self, host: &str, answer: &[&'static str]) {
            self.0.lock().unwrap().insert(host.to_owned(), answer.to_vec());
        }
    }

    fn shared(backends: &str) -> Arc<Shared> {
        let vars = [("AEGIS_BACKENDS".to_owned(), backends.to_owned())];
        let config = Arc::new(Config::from_vars(vars).unwrap());
        let driver = DriverInfo { driver: "epoll", reason: String::new(), kernel: String::new() };
        Shared::new(config, Instant::now(), Vec::new(), driver, 1)
    }

    fn names(shared: &Shared) -> Vec<String> {
        shared.snapshot().endpoints.iter().map(|endpoint| endpoint.name.clone()).collect()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn addresses_are_published_at_once_and_each_once() {
        let shared = shared("10.0.0.1:1,db:1");
        let answers = Answers::default();
        answers.set("db", &["10.0.0.2", "10.0.0.1", "10.0.0.2"]);
        let mut discovery = Discovery::new(&shared, &answers);
        assert!(!discovery.is_static());
        discovery.refresh().await;
        assert_eq!(names(&shared), ["10.0.0.1:1", "db/10.0.0.2:1"]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn only_a_change_is_published_and_what_stays_keeps_its_identity() {
        let shared = shared("db:1");
        let answers = Answers::default();
        answers.set("db", &["10.0.0.1", "10.0.0.2"]);
        let mut discovery = Discovery::new(&shared, &answers);
        discovery.refresh().await;
        let first = shared.snapshot();
        answers.set("db", &["10.0.0.2", "10.0.0.1"]);
        discovery.refresh().await;
        assert_eq!(shared.snapshot().generation, 1, "the same addresses in another order");
        answers.set("db", &["10.0.0.2", "10.0.0.3"]);
        discovery.refresh().await;
        let second = shared.snapshot();
        assert_eq!(second.generation, 2);
        assert_eq!(names(&shared), ["db/10.0.0.2:1", "db/10.0.0.3:1"]);
        assert!(Arc::ptr_eq(&first.endpoints[1], &second.endpoints[0]));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_last_known_addresses_stay_while_a_name_does_not_resolve() {
        let shared = shared("db:1,cache:2");
        let answers = Answers::default();
        answers.set("db", &["10.0.0.1"]);
        let mut discovery = Discovery::new(&shared, &answers);
        discovery.refresh().await;
        assert_eq!(names(&shared), ["db/10.0.0.1:1"], "one name that fails holds up no other");
        answers.0.lock().unwrap().clear();
        discovery.refresh().await;
        assert_eq!(names(&shared), ["db/10.0.0.1:1"]);
        assert_eq!(shared.snapshot().generation, 1);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_first_snapshot_is_published_even_if_it_is_empty() {
        let shared = shared("nowhere:1");
        let answers = Answers::default();
        Discovery::new(&shared, &answers).refresh().await;
        assert_eq!((shared.snapshot().generation, names(&shared).len()), (1, 0));
    }
}
