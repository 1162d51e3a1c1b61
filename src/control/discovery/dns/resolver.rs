//! Looks names up as the C libraries do, but without a thread that waits: `/etc/hosts`, then the
//! name servers and the search list of `/etc/resolv.conf`, both read again when they have changed.
//!
//! Each query of a name server is hickory's. What is decided here is what an application relies on
//! beyond that: which server is asked when, which name of the search list counts, and what an error
//! says about a name. The families are asked for at the same time and reported one by one, so neither
//! waits for the other, nor stands for it.

use std::fmt;
use std::fs::File;
use std::future::Future;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RecordType};
use tokio::time::{Instant, timeout};
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;
use tracing::{info, warn};

use crate::limits::{
    DNS_CONFIRM, DNS_FILE_BYTES_MAX, DNS_QUERIES_MAX, DNS_SEARCH_MAX, DNS_SERVERS_MAX,
};

const HOSTS: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The files are looked at again after this: often enough for whoever edits one, and at most ten
/// times a second however many names there are. They are small and local, so that reading them
/// blocks no longer than any page of the program's own.
const FILES_AGE_MAX: Duration = Duration::from_millis(100);

/// For how long a name server that did not answer is asked last. Each name of the search list that
/// waited for it again would take its whole time: with six of them, as on GKE, and the usual five
/// seconds, no lookup would end in time.
const SILENT_FOR: Duration = Duration::from_secs(30);

/// A family of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4: `A` records.
    V4,
    /// IPv6: `AAAA` records.
    V6,
}

impl Family {
    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::V6];

    fn of(address: &IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn records(self) -> RecordType {
        match self {
            Self::V4 => RecordType::A,
            Self::V6 => RecordType::AAAA,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// What is known of a name's addresses of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// These, in any order; never empty.
    Found {
        /// The addresses.
        addresses: Vec<IpAddr>,
        /// How long they hold; `None` where the source does not say.
        ttl: Option<Duration>,
    },
    /// A source that knows says that there are none: the name does not exist, or has none of this
    /// family.
    Absent,
    /// Nothing, for this reason.
    Failed(String),
}

/// Looks names up.
pub(crate) trait Resolve: Clone + Send + Sync + 'static {
    /// Looks `host` up and tells of each family once, as soon as its answer is there; of one that
    /// has none in time it does not tell.
    ///
    /// `origin` is the full name that the addresses came from so far, if any, and is kept up to date.
    fn resolve(
        &self,
        host: &str,
        origin: &mut Option<String>,
        tell: &mut (dyn FnMut(Family, Answer) + Send),
    ) -> impl Future<Output = ()> + Send;
}

/// The system's files and the name servers that they name.
#[derive(Debug, Clone, Default)]
pub(crate) struct SystemResolver(Arc<Mutex<Files>>);

#[derive(Debug, Default)]
struct Files {
    read_at: Option<Instant>,
    hosts: Arc<str>,
    resolv_conf: Option<String>,
    servers: Option<Arc<Servers>>,
}

impl Files {
    /// Takes in what has changed. A `resolv.conf` that cannot be read or names no server that can be
    /// asked changes nothing: the last that did stays in force. Without any it is the local host, as
    /// resolv.conf(5) has it.
    fn refresh(&mut self) -> (Arc<str>, Arc<Servers>) {
        if self.read_at.is_none_or(|at| at.elapsed() >= FILES_AGE_MAX) {
            self.read_at = Some(Instant::now());
            let hosts = read(HOSTS).unwrap_or_default();
            if *hosts != *self.hosts {
                self.hosts = hosts.into();
            }
            let resolv_conf = read(RESOLV_CONF).ok();
            if self.servers.is_none() || resolv_conf != self.resolv_conf {
                self.take_in(resolv_conf);
            }
        }
        let servers = self.servers.get_or_insert_with(|| Arc::new(Servers::new(&[]))).clone();
        (Arc::clone(&self.hosts), servers)
    }

    fn take_in(&mut self, resolv_conf: Option<String>) {
        let servers = Servers::new(resolv_conf.as_deref().unwrap_or_default().as_bytes());
        let usable = !servers.all.is_empty();
        if usable {
            info!(servers = ?servers.addresses(), "name servers");
        } else {
            warn!("{RESOLV_CONF} names no server: the last known ones stay, or else 127.0.0.1");
        }
        if usable || self.servers.is_none() {
            self.servers = Some(Arc::new(if usable {
                servers
            } else {
                Servers::new(b"nameserver 127.0.0.1")
            }));
        }
        self.resolv_conf = resolv_conf;
    }
}

/// The text of a file as far as it may be long; what is no text in it is replaced.
fn read(path: &str) -> io::Result<String> {
    let mut bytes = Vec::new();
    // What is not a file may have no end, or none yet.
    if std::fs::metadata(path)?.is_file() {
        File::open(path)?.take(DNS_FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What a hosts file says about a name.
fn in_hosts(text: &str, host: &str) -> Vec<IpAddr> {
    let entries = text.lines().filter_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address: IpAddr = words.next()?.parse().ok()?;
        words.any(|name| absolute(name).eq_ignore_ascii_case(host)).then_some(address)
    });
    entries.collect()
}

fn absolute(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

/// The addresses of a name that needs no name server: from the hosts file, whichever families it
/// has there; or the local host's, which no name server is to be asked about (RFC 6761, section 6.3).
fn known_here(hosts: &str, host: &str) -> Option<Vec<IpAddr>> {
    let host = absolute(host);
    let found = in_hosts(hosts, host);
    let is_local = host == "localhost" || host.ends_with(".localhost");
    match found.is_empty() {
        false => Some(found),
        true if is_local => Some(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]),
        true => None,
    }
}

/// Tells of both families from one list.
pub(super) fn tell_all(addresses: Vec<IpAddr>, tell: &mut (dyn FnMut(Family, Answer) + Send)) {
    for family in Family::ALL {
        let addresses: Vec<_> =
            addresses.iter().filter(|a| Family::of(a) == family).copied().collect();
        let found = !addresses.is_empty();
        tell(family, if found { Answer::Found { addresses, ttl: None } } else { Answer::Absent });
    }
}

impl Resolve for SystemResolver {
    async fn resolve(
        &self,
        host: &str,
        origin: &mut Option<String>,
        tell: &mut (dyn FnMut(Family, Answer) + Send),
    ) {
        let (hosts, servers) = self.0.lock().unwrap_or_else(PoisonError::into_inner).refresh();
        match known_here(&hosts, host) {
            Some(addresses) => tell_all(addresses, tell),
            None => servers.resolve(host, origin, tell).await,
        }
    }
}

/// One name server.
struct Server {
    ip: IpAddr,
    resolver: TokioResolver,
    /// When it last left a query unanswered, if it has answered none since.
    silent_at: Mutex<Option<Instant>>,
}

impl Server {
    fn is_silent(&self) -> bool {
        let silent_at = *self.silent_at.lock().unwrap_or_else(PoisonError::into_inner);
        silent_at.is_some_and(|at| at.elapsed() < SILENT_FOR)
    }

    fn set_silent(&self, is_silent: bool) {
        let now = is_silent.then(Instant::now);
        *self.silent_at.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }
}

/// The name servers, and how they are to be asked.
struct Servers {
    all: Vec<Server>,
    /// The first to be asked.
    next: AtomicUsize,
    rotate: bool,
    attempts: u32,
    timeout: Duration,
    ndots: usize,
    search: Vec<String>,
    /// IPv6 addresses are of no use here, and not to be asked for.
    no_ipv6: bool,
}

impl fmt::Debug for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.addresses()).finish()
    }
}

/// Why a query has no answer.
struct Failure {
    why: String,
    /// A server has refused to answer, rather than been silent.
    refused: bool,
}

impl Servers {
    /// What a `resolv.conf` says, as far as it can be understood, within glibc's bounds.
    fn new(resolv_conf: &[u8]) -> Self {
        let (parsed, _) = resolv_conf::Config::parse_with_errors(resolv_conf);
        let timeout = Duration::from_secs(parsed.timeout.clamp(1, 30).into());
        let usable = |ip: &IpAddr| !ip.is_unspecified() && !ip.is_multicast();
        let addresses = parsed.nameservers.iter().map(IpAddr::from).filter(usable);
        let server = |ip| {
            let resolver = ask_only(ip, timeout, &parsed)?;
            Some(Server { ip, resolver, silent_at: Mutex::default() })
        };
        let search = parsed.get_last_search_or_domain().filter(|domain| *domain != ".");
        Self {
            all: addresses.take(DNS_SERVERS_MAX).filter_map(server).collect(),
            next: AtomicUsize::new(0),
            rotate: parsed.rotate,
            attempts: parsed.attempts.clamp(1, 5),
            timeout,
            ndots: parsed.ndots.min(15) as usize,
            search: search.take(DNS_SEARCH_MAX).cloned().collect(),
            no_ipv6: parsed.no_aaaa,
        }
    }

    fn addresses(&self) -> Vec<IpAddr> {
        self.all.iter().map(|server| server.ip).collect()
    }

    /// The full names that `host` may stand for, in the order in which they are tried.
    fn names(&self, host: &str) -> Vec<Name> {
        let absolute = [host.strip_suffix('.').unwrap_or(host).to_owned()];
        let searched: Vec<_> = if host.ends_with('.') {
            Vec::new()
        } else {
            self.search.iter().map(|domain| format!("{host}.{domain}")).collect()
        };
        let as_it_is_first = host.matches('.').count() >= self.ndots;
        let names: Vec<_> = if as_it_is_first {
            absolute.into_iter().chain(searched).collect()
        } else {
            searched.into_iter().chain(absolute).collect()
        };
        // One that would be too long stands for nothing.
        let full = |name: &String| Name::from_ascii(format!("{}.", name.trim_end_matches('.')));
        let mut names: Vec<_> = names.iter().flat_map(full).collect();
        let mut seen = Vec::new();
        names.retain(|name| {
            !seen.contains(name) && {
                seen.push(name.clone());
                true
            }
        });
        names
    }

    /// Tries one name after the other, and stops at the first that has addresses of any family: all
    /// addresses of a host are to be of one name.
    ///
    /// A name that servers refuse to answer for is passed over, as in glibc, unless it is the one
    /// that had the addresses so far: then the next may be somebody else. Silence says nothing about
    /// any of them.
    async fn resolve(
        &self,
        host: &str,
        origin: &mut Option<String>,
        tell: &mut (dyn FnMut(Family, Answer) + Send),
    ) {
        let mut refused = None;
        for name in self.names(host) {
            let mut queries: FuturesUnordered<_> = Family::ALL
                .into_iter()
                .map(|family| {
                    let name = name.clone();
                    async move { (family, self.ask(name, family).await) }
                })
                .collect();
            let (mut found, mut others) = (false, Vec::new());
            loop {
                // Where one family is known, the other is not to hold up its next lookup.
                let next = if found {
                    timeout(DNS_CONFIRM, queries.next()).await.unwrap_or(None)
                } else {
                    queries.next().await
                };
                let Some((family, outcome)) = next else { break };
                match outcome {
                    Ok(answer @ Answer::Found { .. }) => {
                        found = true;
                        tell(family, answer);
                    }
                    other => others.push((family, other)),
                }
            }
            let text = name.to_ascii();
            if found {
                for (family, outcome) in others {
                    tell(family, outcome.unwrap_or_else(|failure| Answer::Failed(failure.why)));
                }
                *origin = Some(text);
                return;
            }
            let Some(failure) = others.into_iter().find_map(|(_, outcome)| outcome.err()) else {
                continue;
            };
            let stop = !failure.refused || origin.as_ref() == Some(&text);
            refused.get_or_insert(failure.why);
            if stop {
                break;
            }
        }
        let answer = refused.map_or(Answer::Absent, Answer::Failed);
        for family in Family::ALL {
            tell(family, answer.clone());
        }
    }

    /// The servers in the order in which they are to be asked.
    fn in_order(&self) -> Vec<&Server> {
        let first = if self.rotate { self.next.fetch_add(1, Relaxed) } else { 0 };
        let len = self.all.len();
        let mut servers: Vec<_> = (0..len).map(|at| &self.all[(first + at) % len]).collect();
        servers.sort_by_cached_key(|server| server.is_silent());
        servers
    }

    /// Asks one server after the other, each of them as often as there are to be attempts, until one
    /// knows.
    async fn ask(&self, name: Name, family: Family) -> Result<Answer, Failure> {
        if family == Family::V6 && self.no_ipv6 {
            return Ok(Answer::Absent);
        }
        let mut failure = Failure { why: "there is no name server".to_owned(), refused: false };
        let servers = self.in_order();
        for turn in 0..servers.len() * self.attempts as usize {
            let server = servers[turn % servers.len()];
            let asked = Instant::now();
            // What the library would log of single packets is up to whoever sends them.
            let query = server.resolver.lookup(name.clone(), family.records());
            let query = query.with_subscriber(NoSubscriber::default());
            let outcome = timeout(self.timeout, query).await;
            server.set_silent(matches!(outcome, Err(_) | Ok(Err(NetError::Timeout))));
            let error = match outcome {
                Ok(Ok(lookup)) => {
                    let ttl = lookup.valid_until().saturating_duration_since(asked.into_std());
                    let records = lookup.answers().iter();
                    let addresses: Vec<_> = records.filter_map(|r| r.data.ip_addr()).collect();
                    if addresses.is_empty() {
                        return Ok(Answer::Absent);
                    }
                    return Ok(Answer::Found { addresses, ttl: Some(ttl) });
                }
                Ok(Err(error)) => error,
                Err(_) => NetError::Timeout,
            };
            let why = match &error {
                NetError::Dns(DnsError::NoRecordsFound(none)) => match none.response_code {
                    ResponseCode::NXDomain | ResponseCode::NoError => return Ok(Answer::Absent),
                    code => code.to_string(),
                },
                NetError::Dns(DnsError::ResponseCode(code)) => code.to_string(),
                NetError::Timeout => format!("no answer within {:?}", self.timeout),
                other => other.to_string(),
            };
            failure.refused |= matches!(error, NetError::Dns(_));
            failure.why = format!("name server {}, {family}: {why}", server.ip);
        }
        Err(failure)
    }
}

/// Asks one server, once, by UDP and where an answer does not fit by TCP; keeps nothing.
fn ask_only(ip: IpAddr, timeout: Duration, parsed: &resolv_conf::Config) -> Option<TokioResolver> {
    let mut server = NameServerConfig::udp_and_tcp(ip);
    if parsed.use_vc {
        server.connections = vec![ConnectionConfig::tcp()];
    }
    let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    let options = builder.options_mut();
    options.attempts = 0;
    options.timeout = timeout;
    options.edns0 = parsed.edns0;
    options.cache_size = 0;
    options.use_hosts_file = ResolveHosts::Never;
    options.max_active_requests = DNS_QUERIES_MAX;
    builder.build().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(resolv_conf: &str, host: &str) -> Vec<String> {
        let servers = Servers::new(resolv_conf.as_bytes());
        servers.names(host).iter().map(Name::to_ascii).collect()
    }

    #[test]
    fn the_search_list_is_gone_through_as_resolv_conf_says() {
        let cluster = "search db.svc.cluster.local svc.cluster.local\noptions ndots:5\n";
        let all = ["store.db.svc.cluster.local.", "store.svc.cluster.local.", "store."];
        assert_eq!(names(cluster, "store"), all);
        assert_eq!(names(cluster, "store."), ["store."]);
        let as_it_is = ["a.b.", "a.b.x."];
        assert_eq!(names("search x", "a.b"), as_it_is, "ndots is 1");
        assert_eq!(names("domain x.", "a.b"), as_it_is);
        assert_eq!(names("search x\ndomain y", "a"), ["a.y.", "a."], "the last one counts");
        assert_eq!(names("search x x .", "a"), ["a.x.", "a."]);
        assert_eq!(names("search x\noptions ndots:0", "a"), ["a.", "a.x."]);
        assert_eq!(names("", "a"), ["a."]);
        let long = format!("search {0}.{0}.{0}.{0}", "x".repeat(62));
        assert_eq!(names(&long, "store"), ["store."], "too long a name is none");
    }

    #[test]
    fn what_cannot_be_understood_is_passed_over() {
        let servers = Servers::new(
            b"nameserver\nnameserver 10.0.0.999\nnameserver 0.0.0.0\nnonsense \xff\n\
              nameserver 10.0.0.1 # first\n;nameserver 10.0.0.9\nnameserver fd00::2\n\
              options timeout:0 attempts:4000000000 ndots:99 unknown:1\noptions rotate\n",
        );
        let usable: [IpAddr; 2] = ["10.0.0.1", "fd00::2"].map(|ip| ip.parse().unwrap());
        assert_eq!(servers.addresses(), usable);
        assert_eq!((servers.timeout, servers.attempts), (Duration::from_secs(1), 5));
        assert!(servers.rotate && servers.ndots == 15);
        let many = "nameserver 10.0.0.1\n".repeat(9);
        assert_eq!(Servers::new(many.as_bytes()).all.len(), DNS_SERVERS_MAX);
    }

    #[test]
    fn the_last_name_servers_stay_where_a_file_names_none() {
        let mut files = Files::default();
        let mut after = |text: Option<&str>| {
            files.take_in(text.map(str::to_owned));
            files.servers.as_ref().unwrap().addresses()
        };
        let [local, first] =
            ["127.0.0.1", "10.0.0.1"].map(|ip| vec![ip.parse::<IpAddr>().unwrap()]);
        assert_eq!(after(None), local);
        assert_eq!(after(Some("nameserver 10.0.0.1")), first);
        for nothing in [None, Some(""), Some("nameserver x"), Some("search a")] {
            assert_eq!(after(nothing), first);
        }
    }

    #[test]
    fn a_hosts_file_comes_first_and_the_local_host_needs_none() {
        let hosts = "127.0.0.1 localhost\n\n# 10.0.0.9 db\n10.0.0.1 other DB. # db9\nfd00::1\tdb\n\
                     10.0.0.300 db\nfe80::1%1 db\n10.0.0.2 db.example db\n";
        let ips = |ips: &[&str]| Some(ips.iter().map(|ip| ip.parse().unwrap()).collect());
        assert_eq!(known_here(hosts, "db"), ips(&["10.0.0.1", "fd00::1", "10.0.0.2"]));
        assert_eq!(known_here(hosts, "db."), ips(&["10.0.0.1", "fd00::1", "10.0.0.2"]));
        assert_eq!(known_here(hosts, "localhost"), ips(&["127.0.0.1"]));
        assert_eq!(known_here("", "localhost."), ips(&["127.0.0.1", "::1"]));
        assert_eq!(known_here(hosts, "db.localhost"), ips(&["127.0.0.1", "::1"]));
        assert_eq!(known_here(hosts, "db9"), None);
        assert_eq!(known_here(hosts, "notlocalhost"), None);
    }
}
