//! The configured backends as a source: IP addresses as they are, names by DNS, again and again.
//!
//! Every name is looked up by a task of its own, so a name that hangs holds up no other, and has
//! one lookup in flight at most. Each family has its own last known good addresses: what a name
//! server fails to say of one takes nothing from the other. Where keys say where requests go, each backend is one store, known
//! by its name whatever its address. Names of endpoints are stable: `10.0.0.1:5432` for an address,
//! `db.example:5432@10.0.0.1` for an address behind a name, however many there are.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{info, warn};

use super::resolver::{Answer, Family, Resolve};
use super::status::{ErrorKind, Status};
use super::{Declared, Publisher, Wanted};
use crate::config::HostPort;
use crate::limits::{
    DNS_ANSWERS_TO_LEAVE, DNS_CONFIRM, DNS_LOOKUP_MAX, DNS_TTL_MAX, ENDPOINTS_MAX,
};

/// The wait after a first failed lookup; it doubles up to the refresh interval.
const RETRY_MIN: Duration = Duration::from_millis(500);

/// The configured backends, as a source of endpoints.
#[derive(Debug)]
pub struct Backends<R> {
    /// Names and addresses, in the order of the endpoints.
    pub hosts: Vec<HostPort>,
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
    /// The first snapshot comes as soon as any endpoint is known; without one, or where keys say where
    /// requests go, when every name has been looked up or `first_answer_max` has passed.
    pub async fn run(self, publisher: Publisher) {
        // Each name has one lookup at a time, which tells of each family once.
        let (answers, mut received) = mpsc::unbounded_channel();
        let mut lookups = JoinSet::new();
        let mut hosts = Vec::with_capacity(self.hosts.len());
        for (index, host) in self.hosts.iter().cloned().enumerate() {
            let known = Host::new(&host);
            if known.is_name {
                let (resolver, answers) = (self.resolver.clone(), answers.clone());
                lookups.spawn(follow(index, host, self.refresh, resolver, answers));
            }
            hosts.push(known);
        }
        if lookups.is_empty() {
            self.status.on_sync();
        }
        // Only the lookups hold senders now: without any, the loop ends.
        drop(answers);

        let deadline = Instant::now() + self.first_answer_max;
        let mut begun = false;
        loop {
            let known = self.wanted(&hosts);
            let some = known.iter().any(|wanted| !wanted.is_empty());
            let answered = hosts.iter().all(|host| host.is_answered(self.by_key));
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
            self.status.clear_trouble();
        }
        if answer == Answer::Absent && hosts[index].is_empty() {
            let what = format!("{}: the name does not exist", self.hosts[index]);
            self.status.on_error(ErrorKind::Lookup, what);
        }
        hosts[index].families[family as usize].on_answer(answer);
    }

    /// The endpoints of each host. Where they are too many, those that have the most have fewer, so
    /// that no name's answer takes the place of all others.
    fn wanted(&self, hosts: &[Host]) -> Vec<Vec<Wanted>> {
        let counts: Vec<_> = hosts.iter().map(Host::len).collect();
        let fits =
            |most: usize| counts.iter().map(|&n| n.min(most)).sum::<usize>() <= ENDPOINTS_MAX;
        let most = if fits(usize::MAX) {
            usize::MAX
        } else {
            (1..ENDPOINTS_MAX).rev().find(|&most| fits(most)).unwrap_or(1)
        };
        hosts.iter().zip(&self.hosts).map(|(known, host)| known.wanted(host, most)).collect()
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

/// What is known of one of the configured backends.
#[derive(Debug)]
struct Host {
    /// It is to be looked up.
    is_name: bool,
    families: [Known; Family::ALL.len()],
}

/// What is known of a host's addresses of one family.
#[derive(Debug, Default)]
struct Known {
    /// In their order; the last known good ones.
    addresses: Vec<IpAddr>,
    is_answered: bool,
    /// The latest lookup failed, so that the addresses may be out of date.
    is_stale: bool,
    /// Answers in a row that there is no address.
    absent: u32,
}

impl Known {
    fn on_answer(&mut self, answer: Answer) {
        self.is_answered = true;
        self.is_stale = matches!(answer, Answer::Failed(_));
        match answer {
            Answer::Found { mut addresses, .. } => {
                // Name servers rotate their answers, and a new order is no change.
                addresses.sort_unstable();
                addresses.dedup();
                self.addresses = addresses;
                self.absent = 0;
            }
            Answer::Absent => {
                self.absent = self.absent.saturating_add(1);
                if self.absent >= DNS_ANSWERS_TO_LEAVE {
                    self.addresses.clear();
                }
            }
            Answer::Failed(_) => {}
        }
    }
}

impl Host {
    fn new(host: &HostPort) -> Self {
        let mut families = [Known::default(), Known::default()];
        let literal = host.host.parse::<IpAddr>();
        let is_name = literal.is_err();
        if let Ok(address) = literal {
            families[0].addresses.push(address);
        }
        Self { is_name, families }
    }

    fn len(&self) -> usize {
        self.families.iter().map(|known| known.addresses.len()).sum()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it was looked up. Where it is to have one address, IPv4 decides.
    fn is_answered(&self, has_one: bool) -> bool {
        let [four, six] = &self.families;
        let decided = has_one && !four.addresses.is_empty();
        !self.is_name || decided || (four.is_answered && six.is_answered)
    }

    fn is_stale(&self) -> bool {
        self.families.iter().any(|known| known.is_stale && !known.addresses.is_empty())
    }

    /// Its endpoints, at most so many.
    fn wanted(&self, host: &HostPort, most: usize) -> Vec<Wanted> {
        let addresses = self.families.iter().flat_map(|known| &known.addresses).take(most);
        let wanted = |&ip: &IpAddr| {
            let address = SocketAddr::new(ip, host.port);
            let name = if self.is_name {
                format!("{}:{}@{ip}", host.host, host.port)
            } else {
                address.to_string()
            };
            Wanted::new(name, address)
        };
        addresses.map(wanted).collect()
    }
}

/// What a lookup of backend `index` has said of one family.
#[derive(Debug)]
struct News {
    index: usize,
    family: Family,
    answer: Answer,
}

/// Looks `host` up again and again, sooner after failures, until nobody listens.
async fn follow<R: Resolve>(
    index: usize,
    host: HostPort,
    refresh: Duration,
    resolver: R,
    news: mpsc::UnboundedSender<News>,
) {
    let name = format!("{}:{}", host.host, host.port);
    let mut origin = None;
    let mut failures = 0u32;
    let mut pace = Pace::default();
    while !news.is_closed() {
        let mut answers = [None, None];
        let mut tell = |family: Family, answer: Answer| {
            answers[family as usize] = Some(answer.clone());
            // Nobody listens any more only where this is about to end too.
            let _ = news.send(News { index, family, answer });
        };
        let _ = timeout(DNS_LOOKUP_MAX, resolver.resolve(&host.host, &mut origin, &mut tell)).await;
        for family in Family::ALL {
            if answers[family as usize].is_none() {
                let answer = Answer::Failed(format!("no answer for {family} in time"));
                let _ = news.send(News { index, family, answer: answer.clone() });
                answers[family as usize] = Some(answer);
            }
        }
        let answers = answers.map(|answer| answer.unwrap_or(Answer::Absent));
        let wait = pace.on_answers(&answers, refresh);
        if let Some(error) = trouble(&answers) {
            if failures == 0 {
                warn!(backend = name, error, "name does not resolve: keeping what is known");
            }
            let retry = RETRY_MIN.saturating_mul(1 << failures.min(16));
            failures = failures.saturating_add(1);
            // Answers that take addresses away are not to come all at once.
            sleep(if pace.soon > 0 { wait } else { wait.min(retry) }).await;
        } else {
            if failures > 0 {
                info!(backend = name, failures, "name resolves again");
            }
            failures = 0;
            // A fleet that was started at once does not ask at once for ever.
            sleep(wait.mul_f64(1.0 + fastrand::f64() / 10.0)).await;
        }
    }
}

/// What is wrong with a name, if anything is: a family failed, or there is no address at all.
fn trouble(answers: &[Answer]) -> Option<&str> {
    let failed = answers.iter().find_map(|answer| match answer {
        Answer::Failed(why) => Some(why.as_str()),
        Answer::Found { .. } | Answer::Absent => None,
    });
    let absent = answers.iter().all(|answer| *answer == Answer::Absent);
    failed.or(absent.then_some("it does not exist"))
}

/// How soon a name is looked up again.
#[derive(Debug, Default)]
struct Pace {
    /// The addresses of each family as they were last told of.
    last: [Vec<IpAddr>; Family::ALL.len()],
    /// So many more answers are to come soon.
    soon: u32,
}

impl Pace {
    /// Addresses that hold for some time are asked for again after that, within bounds. One that is
    /// missing has left, or only this answer has not named it: the next few tell, and come soon.
    /// Where each answer has other addresses, that is not the case all the time.
    fn on_answers(&mut self, answers: &[Answer; Family::ALL.len()], refresh: Duration) -> Duration {
        let (mut is_missing, mut wait) = (false, None);
        for (last, answer) in self.last.iter_mut().zip(answers) {
            let now = match answer {
                Answer::Found { addresses, ttl } => {
                    wait = wait.into_iter().chain(*ttl).min();
                    addresses.clone()
                }
                Answer::Absent => Vec::new(),
                Answer::Failed(_) => continue,
            };
            is_missing |= last.iter().any(|known| !now.contains(known));
            *last = now;
        }
        self.soon = match self.soon {
            0 if is_missing => DNS_ANSWERS_TO_LEAVE,
            soon => soon.saturating_sub(1),
        };
        match wait {
            _ if self.soon > 0 => refresh.min(DNS_CONFIRM),
            Some(ttl) => ttl.clamp(refresh, refresh.max(DNS_TTL_MAX)),
            None => refresh,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Mutex;

    use tokio::sync::watch;

    use super::super::resolver::tell_all;
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

    fn found(ips: &[&str], ttl: Option<u64>) -> Answer {
        let addresses = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        Answer::Found { addresses, ttl: ttl.map(Duration::from_secs) }
    }

    #[test]
    fn after_an_answer_that_lacks_an_address_the_next_ones_come_soon() {
        const HOUR: Duration = Duration::from_secs(3600);
        let [both, one, other] = [&["10.0.0.1", "10.0.0.2"][..], &["10.0.0.1"], &["10.0.0.3"]]
            .map(|ips| found(ips, None));
        let mut pace = Pace::default();
        let mut waits = |answers: &[&Answer], refresh| {
            let answers = answers.iter().map(|&four| [four.clone(), Answer::Absent]);
            answers.map(|answers| pace.on_answers(&answers, refresh)).collect::<Vec<_>>()
        };
        assert_eq!(waits(&[&one, &both, &both], HOUR), [HOUR; 3]);
        let soon = DNS_CONFIRM;
        assert_eq!(waits(&[&one, &one, &one, &one, &one], HOUR), [soon, soon, soon, HOUR, HOUR]);
        assert_eq!(waits(&[&other, &both], HOUR / 3600), [HOUR / 3600; 2], "sooner if so set");
        assert_eq!(waits(&[&both, &both], HOUR), [soon, HOUR]);
        let turns = waits(&[&one, &other, &one, &other, &one, &other, &one, &other], HOUR);
        assert_eq!(turns.iter().filter(|&&wait| wait == HOUR).count(), 2, "{turns:?}");
        let mut pace = Pace::default();
        let failed = Answer::Failed(String::new());
        for answer in [&other, &failed, &other] {
            let wait = pace.on_answers(&[answer.clone(), Answer::Absent], HOUR);
            assert_eq!(wait, HOUR, "it takes nothing away");
        }
    }

    #[test]
    fn addresses_hold_as_long_as_name_servers_say_within_bounds() {
        let second = Duration::from_secs;
        let wait = |refresh, four: Option<u64>, six: Option<u64>| {
            let answers = [found(&["10.0.0.1"], four), found(&["fd00::1"], six)];
            Pace::default().on_answers(&answers, second(refresh))
        };
        assert_eq!(wait(5, Some(10), Some(20)), second(10));
        assert_eq!(wait(5, Some(20), None), second(20));
        assert_eq!(wait(5, Some(0), Some(20)), second(5));
        assert_eq!(wait(5, Some(1 << 31), Some(1 << 31)), DNS_TTL_MAX);
        assert_eq!(wait(5, None, None), second(5));
        assert_eq!(wait(600, Some(0), Some(1 << 31)), second(600));
    }

    #[test]
    fn a_family_has_its_own_last_known_good_addresses() {
        let mut host = Host::new(&host("db"));
        let mut after = |family: Family, answer: &Answer| {
            host.families[family as usize].on_answer(answer.clone());
            let addresses = host.families.iter().flat_map(|known| known.addresses.clone());
            let text: Vec<_> = addresses.map(|ip| ip.to_string()).collect();
            (text.join(" "), host.is_stale())
        };
        let failed = Answer::Failed("timed out".to_owned());
        let [both, six] = ["10.0.0.1 10.0.0.2 fd00::1", "fd00::1"].map(str::to_owned);
        after(Family::V6, &found(&["fd00::1"], None));
        let four = found(&["10.0.0.2", "10.0.0.1", "10.0.0.2"], None);
        assert_eq!(after(Family::V4, &four), (both.clone(), false));
        for _ in 0..9 {
            assert_eq!(after(Family::V4, &failed), (both.clone(), true));
        }
        for _ in 1..DNS_ANSWERS_TO_LEAVE {
            assert_eq!(after(Family::V4, &Answer::Absent), (both.clone(), false));
            assert_eq!(after(Family::V4, &failed), (both.clone(), true), "no answer");
        }
        assert_eq!(after(Family::V4, &Answer::Absent), (six.clone(), false));
        assert_eq!(after(Family::V4, &failed), (six, false));
        assert_eq!(after(Family::V4, &four), (both.clone(), false));
        assert_eq!(after(Family::V4, &Answer::Absent), (both, false), "counted anew");
    }

    #[test]
    fn a_huge_answer_does_not_take_the_place_of_others() {
        let all: Vec<_> =
            (0..4000u32).map(|i| IpAddr::from((0x0a00_0000 + i).to_be_bytes())).collect();
        let backends = Backends {
            hosts: ["huge", "small", "10.0.0.1"].map(host).to_vec(),
            refresh: Duration::from_secs(1),
            first_answer_max: Duration::ZERO,
            resolver: Script::new(&[]),
            by_key: false,
            status: Arc::default(),
        };
        let mut hosts: Vec<_> = backends.hosts.iter().map(Host::new).collect();
        hosts[1].families[0].on_answer(found(&["10.1.0.1", "10.1.0.2"], None));
        for (count, kept) in [(1021, 1021), (1022, 1021), (4000, 1021)] {
            let addresses = all[..count].to_vec();
            hosts[0].families[0].on_answer(Answer::Found { addresses, ttl: None });
            let lens = backends.wanted(&hosts).iter().map(Vec::len).collect::<Vec<_>>();
            assert_eq!(lens, [kept, 2, 1], "of {count}");
        }
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
}
