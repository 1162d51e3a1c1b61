//! The configured backends as a source: IP addresses as they are, names by DNS, again and again.
//!
//! Every name is looked up by a task of its own, so a name that hangs holds up no other, and has
//! one lookup in flight at most. Where keys say where requests go, each backend is one store, known
//! by its name whatever its address. Names of endpoints are stable: `10.0.0.1:5432` for an address,
//! `db.example:5432@10.0.0.1` for an address behind a name, however many there are.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{info, warn};

use super::status::{ErrorKind, Status};
use super::{Declared, Publisher, Wanted};
use crate::config::HostPort;
use crate::limits::{DNS_ANSWERS_TO_LEAVE, DNS_CONFIRM};

/// The wait after a first failed lookup; it doubles up to the refresh interval.
const RETRY_MIN: Duration = Duration::from_millis(500);

/// Looks names up.
pub trait Resolve: Clone + Send + Sync + 'static {
    /// All addresses of a host, in any order.
    ///
    /// # Errors
    /// The lookup failed, or the name does not exist.
    fn resolve(&self, host: &HostPort) -> impl Future<Output = io::Result<Vec<SocketAddr>>> + Send;
}

/// The system's resolver: the hosts file, then DNS with its search domains.
#[derive(Debug, Clone, Copy)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    async fn resolve(&self, host: &HostPort) -> io::Result<Vec<SocketAddr>> {
        Ok(tokio::net::lookup_host((host.host.as_str(), host.port)).await?.collect())
    }
}

/// The configured backends, as a source of endpoints.
#[derive(Debug)]
pub struct Backends<R> {
    /// Names and addresses, in the order of the endpoints.
    pub hosts: Vec<HostPort>,
    /// How often a name is looked up again.
    pub refresh: Duration,
    /// How long the first snapshot waits for names while no endpoint is known.
    pub first_answer_max: Duration,
    /// Who looks names up.
    pub resolver: R,
    /// Whether keys say where requests go: then each backend is one store, and has one address.
    pub by_key: bool,
    /// Where it says how it fares.
    pub status: Arc<Status>,
}

impl<R: Resolve> Backends<R> {
    /// Keeps the endpoints published: for ever, or once if there are no names among them.
    ///
    /// The first snapshot comes as soon as any endpoint is known; without one, or where keys say where
    /// requests go, when every name has been looked up or `first_answer_max` has passed.
    pub async fn run(self, publisher: Publisher) {
        let (answers, mut received) = mpsc::channel(1);
        let mut lookups = JoinSet::new();
        let mut known: Vec<Vec<Wanted>> = Vec::with_capacity(self.hosts.len());
        let mut unanswered = vec![false; self.hosts.len()];
        // Whether the latest lookup failed, so that what is known may be out of date.
        let mut stale = vec![false; self.hosts.len()];
        for (index, host) in self.hosts.iter().cloned().enumerate() {
            known.push(literal(&host).into_iter().collect());
            if known[index].is_empty() {
                unanswered[index] = true;
                let (resolver, answers) = (self.resolver.clone(), answers.clone());
                lookups.spawn(follow(index, host, self.refresh, resolver, answers));
            }
        }
        if lookups.is_empty() {
            self.status.on_sync();
        }
        // Only the lookups hold senders now: without any, the loop ends.
        drop(answers);

        let deadline = Instant::now() + self.first_answer_max;
        let mut begun = false;
        loop {
            let some = known.iter().any(|wanted| !wanted.is_empty());
            begun |= !unanswered.contains(&true) || (some && !self.by_key);
            if begun && self.by_key {
                self.publish_stores(&publisher, &known, &stale);
            } else if begun {
                publisher.publish(known.iter().flatten().cloned());
            }
            let answer = if begun {
                received.recv().await
            } else if let Ok(answer) = timeout_at(deadline, received.recv()).await {
                answer
            } else {
                warn!("no name is resolved yet: going on without endpoints");
                begun = true;
                continue;
            };
            let Some(Answer { index, wanted }) = answer else { return };
            unanswered[index] = false;
            stale[index] = wanted.is_err();
            match wanted {
                Ok(wanted) => {
                    known[index] = wanted;
                    self.status.on_sync();
                    self.status.clear_trouble();
                }
                Err(why) => self.status.on_error(ErrorKind::Lookup, why),
            }
        }
    }
}

impl<R> Backends<R> {
    /// Publishes the stores, but not the first time while one of them is not a single server: then
    /// the configuration is wrong.
    fn publish_stores(&self, publisher: &Publisher, known: &[Vec<Wanted>], stale: &[bool]) {
        let (wanted, stores) = stores(&self.hosts, known, stale);
        let trouble = stores.iter().find_map(|store| {
            let why = store.address.as_ref().err()?.as_ref()?;
            Some(format!("AEGIS_BACKENDS={}: {why}", store.name))
        });
        let wrong = trouble.is_some();
        if self.status.set_stores_trouble(trouble.clone())
            && let Some(trouble) = trouble
        {
            warn!("a store is not one server: {trouble}");
        }
        if publisher.has_begun() || !wrong {
            publisher.publish_stores(wanted, &stores);
        }
    }
}

/// The store that each backend is, and the endpoints of all of them.
fn stores(
    hosts: &[HostPort],
    known: &[Vec<Wanted>],
    stale: &[bool],
) -> (Vec<Wanted>, Vec<Declared>) {
    let single: Vec<_> = known.iter().map(|wanted| single(wanted)).collect();
    let place = |index: usize| -> Result<&Wanted, Option<String>> {
        let wanted = single[index].clone()?;
        // Addresses are used again: one that is out of date belongs to who has it now.
        let same = |other: &usize| {
            *other != index && single[*other].as_ref().is_ok_and(|w| w.address == wanted.address)
        };
        let rival = (0..hosts.len()).filter(same).find(|&other| stale[index] || !stale[other]);
        match rival {
            None => Ok(wanted),
            Some(rival) => {
                let (address, rival) = (wanted.address, &hosts[rival]);
                Err(Some(format!("its address {address} is also that of {rival}")))
            }
        }
    };
    let (mut wanted, mut stores) = (Vec::new(), Vec::with_capacity(hosts.len()));
    for (index, host) in hosts.iter().enumerate() {
        let address = place(index).map(|found| {
            wanted.push(found.clone());
            found.address
        });
        stores.push(Declared { name: host.to_string(), address });
    }
    (wanted, stores)
}

/// The one address of a store. One of each family is one server, reached by IPv4.
fn single(known: &[Wanted]) -> Result<&Wanted, Option<String>> {
    let mut found: Vec<&Wanted> = known.iter().collect();
    found.sort_unstable_by_key(|wanted| wanted.address);
    found.dedup_by_key(|wanted| wanted.address);
    match found[..] {
        [] => Err(None),
        [one] => Ok(one),
        [four, six] if four.address.is_ipv4() && six.address.is_ipv6() => Ok(four),
        _ => Err(Some(format!(
            "its name has {} addresses, and a store has one: list the name of each store",
            found.len()
        ))),
    }
}

/// The end of one lookup of backend `index`.
struct Answer {
    index: usize,
    /// Never empty; a failure, told of here, changes nothing.
    wanted: Result<Vec<Wanted>, String>,
}

/// Looks `host` up every `refresh`, sooner after failures, until nobody listens.
async fn follow<R: Resolve>(
    index: usize,
    host: HostPort,
    refresh: Duration,
    resolver: R,
    answers: mpsc::Sender<Answer>,
) {
    let name = format!("{}:{}", host.host, host.port);
    let mut failures = 0u32;
    let mut pace = Pace::default();
    loop {
        let (wanted, wait) = match lookup(&name, &host, &resolver).await {
            Ok(wanted) => {
                if failures > 0 {
                    info!(backend = name, failures, "name resolves again");
                }
                failures = 0;
                let wait = pace.on_answer(&wanted, refresh);
                (Ok(wanted), wait)
            }
            Err(error) => {
                if failures == 0 {
                    warn!(backend = name, %error, "name does not resolve: keeping what is known");
                }
                let wait = RETRY_MIN.saturating_mul(1 << failures.min(16)).min(refresh);
                failures = failures.saturating_add(1);
                (Err(format!("{name} does not resolve: {error}")), wait)
            }
        };
        if answers.send(Answer { index, wanted }).await.is_err() {
            return;
        }
        sleep(wait).await;
    }
}

/// How soon a name is looked up again.
#[derive(Debug, Default)]
struct Pace {
    last: Vec<Wanted>,
    /// So many more answers are to come soon.
    soon: u32,
}

impl Pace {
    /// An address that is missing has left, or only this answer has not named it: the next few tell,
    /// and come soon. Where each answer has other addresses, that is not the case all the time.
    fn on_answer(&mut self, wanted: &[Wanted], refresh: Duration) -> Duration {
        self.soon = match self.soon {
            0 if self.last.iter().any(|known| !wanted.contains(known)) => DNS_ANSWERS_TO_LEAVE,
            soon => soon.saturating_sub(1),
        };
        self.last = wanted.to_vec();
        if self.soon > 0 { refresh.min(DNS_CONFIRM) } else { refresh }
    }
}

async fn lookup<R: Resolve>(name: &str, host: &HostPort, resolver: &R) -> io::Result<Vec<Wanted>> {
    let mut addresses = resolver.resolve(host).await?;
    if addresses.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "no address in the answer"));
    }
    // Name servers rotate their answers, and a new order is no change.
    addresses.sort_unstable();
    Ok(addresses.into_iter().map(|a| Wanted::new(format!("{name}@{}", a.ip()), a)).collect())
}

fn literal(host: &HostPort) -> Option<Wanted> {
    let address = SocketAddr::new(host.host.parse::<IpAddr>().ok()?, host.port);
    Some(Wanted::new(address.to_string(), address))
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Mutex;

    use tokio::sync::watch;

    use super::*;
    use crate::control::testing::{block_on, workers};
    use crate::proxy::endpoints::EndpointSnapshot;

    /// Gives the scripted answers one by one, then none for ever.
    #[derive(Clone)]
    struct Script(Arc<Mutex<VecDeque<Option<Vec<&'static str>>>>>);

    impl Script {
        fn new(answers: &[Option<&[&'static str]>]) -> Self {
            Self(Arc::new(Mutex::new(answers.iter().map(|a| a.map(<[_]>::to_vec)).collect())))
        }
    }

    impl Resolve for Script {
        async fn resolve(&self, host: &HostPort) -> io::Result<Vec<SocketAddr>> {
            let answer = self.0.lock().unwrap().pop_front();
            match answer {
                Some(Some(ips)) => {
                    let address = |ip: &str| SocketAddr::new(ip.parse().unwrap(), host.port);
                    Ok(ips.into_iter().map(address).collect())
                }
                Some(None) => Err(io::Error::other("scripted failure")),
                None => std::future::pending().await,
            }
        }
    }

    fn host(host: &str) -> HostPort {
        HostPort { host: host.to_owned(), port: 5432 }
    }

    /// The snapshot of this generation; later ones must not follow.
    async fn last(
        backends: &[&str],
        script: Script,
        generation: u64,
    ) -> (Arc<EndpointSnapshot>, Script) {
        last_within(Duration::from_secs(3600), backends, script, generation).await
    }

    async fn last_within(
        first_answer_max: Duration,
        backends: &[&str],
        script: Script,
        generation: u64,
    ) -> (Arc<EndpointSnapshot>, Script) {
        let snapshots = watch::Sender::default();
        let mut receiver = snapshots.subscribe();
        let publisher = Publisher::new(workers(1), snapshots);
        let backends = Backends {
            hosts: backends.iter().map(|h| host(h)).collect(),
            refresh: Duration::from_millis(1),
            first_answer_max,
            resolver: script.clone(),
            by_key: false,
            status: Arc::default(),
        };
        let running = tokio::spawn(backends.run(publisher));
        let snapshot = receiver
            .wait_for(|s: &Arc<EndpointSnapshot>| s.generation == generation)
            .await
            .unwrap()
            .clone();
        running.abort();
        (snapshot, script)
    }

    fn names(snapshot: &EndpointSnapshot) -> Vec<&str> {
        snapshot.endpoints.iter().map(|e| e.name.as_str()).collect()
    }

    #[test]
    fn addresses_are_published_at_once_and_in_the_configured_order() {
        block_on(async {
            let (snapshot, _) = last(&["10.0.0.9", "never", "::1"], Script::new(&[]), 1).await;
            assert_eq!(names(&snapshot), ["10.0.0.9:5432", "[::1]:5432"]);
        });
    }

    #[test]
    fn a_new_order_is_no_change_and_a_new_address_is() {
        block_on(async {
            let script = Script::new(&[
                Some(&["10.0.0.2", "10.0.0.1"]),
                Some(&["10.0.0.1", "10.0.0.2"]),
                Some(&["10.0.0.3", "10.0.0.1", "10.0.0.1"]),
            ]);
            let (snapshot, _) = last(&["db"], script, 2).await;
            assert_eq!(names(&snapshot), ["db:5432@10.0.0.1", "db:5432@10.0.0.3"]);
        });
    }

    #[test]
    fn failures_and_empty_answers_keep_the_last_known_good() {
        block_on(async {
            let script = Script::new(&[
                Some(&["10.0.0.1"]),
                None,
                Some(&[]),
                Some(&["10.0.0.1"]),
                Some(&["10.0.0.2"]),
            ]);
            let (snapshot, script) = last(&["db"], script, 2).await;
            assert_eq!(names(&snapshot), ["db:5432@10.0.0.2"]);
            assert!(script.0.lock().unwrap().is_empty());
        });
    }

    #[test]
    fn an_unresolvable_name_gives_an_empty_first_snapshot_and_is_tried_again() {
        block_on(async {
            let (empty, _) = last(&["db"], Script::new(&[None]), 1).await;
            assert!(empty.endpoints.is_empty());

            let script = Script::new(&[None, Some(&["10.0.0.1"])]);
            let (found, _) = last(&["db"], script, 2).await;
            assert_eq!(names(&found), ["db:5432@10.0.0.1"]);
        });
    }

    #[test]
    fn a_name_that_hangs_delays_the_first_snapshot_for_a_bounded_time() {
        block_on(async {
            let (empty, _) = last_within(Duration::ZERO, &["db"], Script::new(&[]), 1).await;
            assert!(empty.endpoints.is_empty());
        });
    }

    #[test]
    fn after_an_answer_that_lacks_an_address_the_next_ones_come_soon() {
        const HOUR: Duration = Duration::from_secs(3600);
        let (both, one) = (at("db", &["10.0.0.1:1", "10.0.0.2:1"]), at("db", &["10.0.0.1:1"]));
        let other = at("db", &["10.0.0.3:1"]);
        let mut pace = Pace::default();
        let mut waits = |answers: &[&Vec<Wanted>], refresh| {
            answers.iter().map(|wanted| pace.on_answer(wanted, refresh)).collect::<Vec<_>>()
        };
        assert_eq!(waits(&[&one, &both, &both], HOUR), [HOUR; 3]);
        let soon = DNS_CONFIRM;
        assert_eq!(waits(&[&one, &one, &one, &one, &one], HOUR), [soon, soon, soon, HOUR, HOUR]);
        assert_eq!(waits(&[&other, &both], HOUR / 3600), [HOUR / 3600; 2], "sooner if so set");
        assert_eq!(waits(&[&both, &both], HOUR), [soon, HOUR]);
        let turns = waits(&[&one, &other, &one, &other, &one, &other, &one, &other], HOUR);
        assert_eq!(turns.iter().filter(|&&wait| wait == HOUR).count(), 2, "{turns:?}");
    }

    fn at(name: &str, addresses: &[&str]) -> Vec<Wanted> {
        let wanted = |address: &&str| Wanted::new(name, address.parse().unwrap());
        addresses.iter().map(wanted).collect()
    }

    #[test]
    fn a_backend_is_one_store_whatever_its_address_is() {
        let hosts = ["a", "b", "c"].map(host);
        let all = |a: &[&str], b: &[&str], c: &[&str]| [at("a", a), at("b", b), at("c", c)];
        let found = |known: &[Vec<Wanted>], stale: [bool; 3]| {
            let (wanted, stores) = stores(&hosts, known, &stale);
            let names: Vec<_> = stores.iter().map(|store| store.name.clone()).collect();
            assert_eq!(names, ["a:5432", "b:5432", "c:5432"]);
            let placed = stores.iter().filter(|store| store.address.is_ok()).count();
            assert_eq!(wanted.len(), placed);
            stores
                .into_iter()
                .map(|store| match store.address {
                    Ok(address) => address.to_string(),
                    Err(why) => why.unwrap_or_default(),
                })
                .collect::<Vec<_>>()
        };
        let [one, two, three] = ["10.0.0.1:1", "10.0.0.2:1", "[fd00::3]:1"];
        let fresh = [false; 3];
        assert_eq!(found(&all(&[one], &[], &[three]), fresh), [one, "", three]);
        assert_eq!(found(&all(&[one], &[two, three], &[]), fresh), [one, two, ""], "two families");
        let many = "its name has 2 addresses, and a store has one: list the name of each store";
        assert_eq!(found(&all(&[], &[one, two], &[three]), fresh), ["", many, three]);
        let also = |other| format!("its address {one} is also that of {other}:5432");
        let twice = all(&[one], &[one], &[three]);
        assert_eq!(found(&twice, fresh), [&also("b"), &also("a"), three], "whose is it?");
        assert_eq!(
            found(&twice, [true, false, false]),
            [&also("b"), one, three],
            "the newer one's"
        );
        assert_eq!(found(&twice, [true, true, true]), [&also("b"), &also("a"), three]);
    }

    #[test]
    fn the_system_resolver_knows_localhost() {
        block_on(async {
            let addresses = SystemResolver.resolve(&host("localhost")).await.unwrap();
            assert!(addresses.iter().all(|a| a.ip().is_loopback() && a.port() == 5432));
            assert!(!addresses.is_empty());
        });
    }
}
