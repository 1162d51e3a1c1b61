//! The configured backends as a source: IP addresses and Unix sockets as they are, names by DNS, again and
//! again.
//!
//! Every name is looked up by a task of its own, so a name that hangs holds up no other, and has
//! one lookup in flight at most. Each family has its own last known good addresses: what a name
//! server fails to say of one takes nothing from the other. Where keys say where requests go, each
//! backend is one store, known by its name whatever its address. Names of endpoints are stable:
//! `10.0.0.1:5432` for an address, `db.example:5432@10.0.0.1` for an address behind a name, however
//! many there are.
//!
//! | file | what |
//! | --- | --- |
//! | `lookup` | looks one name up again and again, and decides how soon |
//! | `resolver` | one lookup, as the system's files and name servers have it |
//! | `host` | what is known of one backend's addresses |
//! | `stores` | which one address each store has |

mod host;
mod lookup;
mod resolver;
mod stores;
#[cfg(test)]
mod testing;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tracing::{Instrument, warn};

use super::status::{ErrorKind, Status};
use super::{Publisher, Wanted};
use crate::config::Backend;
use crate::proxy::endpoints::Tier;
use host::Host;
use lookup::{News, follow};
pub(crate) use resolver::SystemResolver;
use resolver::{Answer, Resolve};

/// The configured backends, as a source of endpoints.
#[derive(Debug)]
pub(crate) struct Backends<R> {
    /// Names and addresses, in the order of the endpoints.
    pub hosts: Vec<Backend>,
    /// The tier of each, in the same order; those beyond its end are of the first one.
    pub tiers: Vec<Tier>,
    /// How soon a name is looked up again at the soonest; later where its addresses hold longer.
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
    /// The first snapshot comes as soon as any endpoint of the first tier is known; without one, or where keys say where
    /// requests go, when every name has been looked up or `first_answer_max` has passed.
    pub(crate) async fn run(self, publisher: Publisher) {
        // Each name has one lookup at a time, which tells of each family once.
        let (answers, mut received) = mpsc::unbounded_channel();
        let mut lookups = JoinSet::new();
        let mut hosts = Vec::with_capacity(self.hosts.len());
        for (index, backend) in self.hosts.iter().enumerate() {
            if let Backend::Tcp(host) = backend
                && backend.is_name()
            {
                let (resolver, answers) = (self.resolver.clone(), answers.clone());
                let lookup = follow(index, host.clone(), self.refresh, resolver, answers);
                lookups.spawn(lookup.in_current_span());
            }
            hosts.push(Host::new(backend, self.tiers.get(index).copied().unwrap_or_default()));
        }
        // Only the lookups hold senders now: without any, the loop ends.
        drop(answers);

        let deadline = Instant::now() + self.first_answer_max;
        let mut begun = false;
        loop {
            let known = host::wanted(&hosts, &self.hosts);
            // Those that stand in for others do not come before these are looked up.
            let some = known.iter().flatten().any(|wanted| wanted.tier == Tier::FIRST);
            let unanswered = hosts.iter().position(|host| !host.is_answered(self.by_key));
            self.status.set_unanswered(unanswered.map(|index| self.hosts[index].to_string()));
            let answered = unanswered.is_none();
            begun |= answered || (some && !self.by_key);
            if begun && self.by_key {
                let stale: Vec<_> = hosts.iter().map(Host::is_stale).collect();
                self.publish_stores(&publisher, &known, &stale);
            } else if begun {
                publisher.publish(known.into_iter().flatten());
            }
            let news = if begun {
                received.recv().await
            } else if let Ok(news) = timeout_at(deadline, received.recv()).await {
                news
            } else {
                warn!("no name is resolved yet: going on without endpoints");
                begun = true;
                continue;
            };
            let Some(news) = news else { return };
            self.take_in(&mut hosts, news);
            while let Ok(news) = received.try_recv() {
                self.take_in(&mut hosts, news);
            }
        }
    }

    fn take_in(&self, hosts: &mut [Host], News { index, family, answer }: News) {
        if let Answer::Failed(why) = &answer {
            let name = &self.hosts[index];
            self.status.on_error(ErrorKind::Lookup, format!("{name} does not resolve: {why}"));
        } else {
            self.status.on_sync();
        }
        let is_absent = answer == Answer::Absent;
        hosts[index].on_answer(family, answer);
        if is_absent && hosts[index].is_empty() {
            let what = format!("{}: the name does not exist", self.hosts[index]);
            self.status.on_error(ErrorKind::Lookup, what);
        }
        // What one name answers does not mend another's trouble.
        if !hosts.iter().any(Host::is_in_trouble) {
            self.status.clear_trouble();
        }
    }
}

impl<R> Backends<R> {
    /// Publishes the stores, but not the first time while one of them is not a single server: then
    /// the configuration is wrong.
    fn publish_stores(&self, publisher: &Publisher, known: &[Vec<Wanted>], stale: &[bool]) {
        let (wanted, stores) = stores::stores(&self.hosts, known, stale);
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Mutex;

    use tokio::sync::watch;

    use super::resolver::{Family, tell_all};
    use super::testing::backend;
    use super::*;
    use crate::control::testing::{block_on, workers};
    use crate::limits::DNS_ANSWERS_TO_LEAVE;
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
        async fn resolve(
            &self,
            _: &str,
            _: &mut Option<String>,
            tell: &mut (dyn FnMut(Family, Answer) + Send),
        ) {
            let answer = self.0.lock().unwrap().pop_front();
            match answer {
                Some(Some(ips)) => {
                    tell_all(ips.into_iter().map(|ip| ip.parse().unwrap()).collect(), tell);
                }
                Some(None) => Family::ALL
                    .into_iter()
                    .for_each(|family| tell(family, Answer::Failed("scripted".to_owned()))),
                None => std::future::pending().await,
            }
        }
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
        let publisher = Publisher::new(workers(1), crate::proxy::RouteId::default(), snapshots);
        let backends = Backends {
            hosts: backends.iter().map(|h| backend(h)).collect(),
            tiers: Vec::new(),
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
    fn those_that_stand_in_for_a_name_do_not_come_before_it_is_looked_up() {
        block_on(async {
            let snapshots = watch::Sender::default();
            let mut receiver = snapshots.subscribe();
            let script = Script::new(&[Some(&["10.0.0.1"])]);
            let backends = Backends {
                hosts: ["db", "10.0.0.9"].map(backend).into(),
                tiers: vec![Tier::FIRST, Tier::at(1)],
                refresh: Duration::from_millis(1),
                first_answer_max: Duration::from_secs(3600),
                resolver: script,
                by_key: false,
                status: Arc::default(),
            };
            let publisher = Publisher::new(workers(1), crate::proxy::RouteId::default(), snapshots);
            let running = tokio::spawn(backends.run(publisher));
            let first = receiver.wait_for(|s: &Arc<EndpointSnapshot>| s.generation == 1).await;
            let first = first.unwrap().clone();
            running.abort();
            assert_eq!(names(&first), ["db:5432@10.0.0.1", "10.0.0.9:5432"]);
            assert_eq!(first.tiers, [Tier::FIRST, Tier::at(1)]);
        });
    }

    #[test]
    fn a_unix_socket_is_published_as_it_is_configured() {
        block_on(async {
            let snapshots = watch::Sender::default();
            let mut receiver = snapshots.subscribe();
            let sockets = ["unix:/run/db.sock", "unix:/run/other.sock"];
            let status = Arc::<Status>::default();
            let backends = Backends {
                hosts: sockets.map(|text| text.parse().unwrap()).into(),
                tiers: Vec::new(),
                refresh: Duration::from_millis(1),
                first_answer_max: Duration::ZERO,
                resolver: Script::new(&[]),
                by_key: true,
                status: Arc::clone(&status),
            };
            // Without a name it ends: there is nothing to ask again.
            backends
                .run(Publisher::new(workers(1), crate::proxy::RouteId::default(), snapshots))
                .await;
            let snapshot = receiver.borrow_and_update().clone();
            assert_eq!(names(&snapshot), sockets);
            let stores: Vec<_> = snapshot.stores.iter().map(|store| &*store.name).collect();
            assert_eq!(stores, sockets);
            // What is never asked again must not look older and older.
            assert_eq!((status.sync_age(), status.last_sync_seconds()), (None, 0.0));
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
    fn a_name_that_has_lost_its_last_address_says_so_at_once() {
        block_on(async {
            for address in ["10.0.0.1", "fd00::1"] {
                let snapshots = watch::Sender::default();
                let mut receiver = snapshots.subscribe();
                let found = [address];
                let mut script = vec![Some(&found[..])];
                script.extend([Some(&[][..]); DNS_ANSWERS_TO_LEAVE as usize]);
                let status = Arc::<Status>::default();
                let backends = Backends {
                    hosts: vec![backend("db")],
                    tiers: Vec::new(),
                    refresh: Duration::from_millis(1),
                    first_answer_max: Duration::from_secs(3600),
                    resolver: Script::new(&script),
                    by_key: false,
                    status: Arc::clone(&status),
                };
                let publisher =
                    Publisher::new(workers(1), crate::proxy::RouteId::default(), snapshots);
                let running = tokio::spawn(backends.run(publisher));
                let empty = receiver.wait_for(|s: &Arc<EndpointSnapshot>| s.generation == 2).await;
                assert!(empty.unwrap().endpoints.is_empty());
                let why = "db:5432: the name does not exist";
                assert_eq!(status.trouble().as_deref(), Some(why), "{address}");
                running.abort();
            }
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
}
