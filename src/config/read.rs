//! From the environment to [`RawConfig`] and on to [`Config`], with all problems at once.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::{NonZeroU64, NonZeroUsize};
use std::time::Duration;

use super::service_links;
use super::value::{
    Parsed, absolute_path, dns_label, duration, list, list_text, log_filter, number, or_word,
    selector, socket_address,
};
#[allow(clippy::wildcard_imports)] // The table's constants, one for each field below.
use super::variables::*;
use super::{
    Config, ConfigErrors, Discovery, HostPort, KubeConfig, PoolConfig, PoolMode, Problem, Protocol,
    ProxyProtocol, RequestConfig, Resources, Route, ServiceName,
};
use crate::limits;
use crate::listening::Listening;

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

impl Config {
    /// Reads the environment of this process.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn from_env() -> Result<Self, ConfigErrors> {
        Self::from_os_vars(std::env::vars_os())
    }

    /// Reads variables given as pairs of name and value. Names that do not start with `AEGIS_`
    /// are none of ours, nor are the variables that Kubernetes sets for a Service of that name.
    ///
    /// # Errors
    /// Everything that is wrong with them.
    pub fn from_vars(
        vars: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigErrors> {
        Self::from_os_vars(vars.into_iter().map(|(name, value)| (name.into(), value.into())))
    }

    pub(super) fn from_os_vars(
        vars: impl Iterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigErrors> {
        let (mut known, mut not_unicode, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
        let ours: Vec<_> = vars
            .map(|(name, value)| (name.to_string_lossy().into_owned(), value))
            .filter(|(name, _)| name.starts_with(PREFIX))
            .collect();
        let texts = ours.iter().map(|(name, value)| (name.clone(), value.to_string_lossy().into()));
        let of_services = service_links::names(&texts.collect());
        for (name, value) in ours {
            if of_services.contains(&name) {
                continue;
            }
            match VARIABLES.iter().find(|variable| variable.name == name) {
                Some(variable) => match value.into_string() {
                    Ok(value) => known.push((name, value)),
                    Err(value) => not_unicode.push(Problem::value(
                        variable,
                        &value.to_string_lossy(),
                        "not Unicode text".to_owned(),
                    )),
                },
                None => unknown.push(Problem::unknown(name)),
            }
        }
        unknown.sort_by_key(Problem::to_string);
        let raw = envy::prefixed(PREFIX)
            .from_iter(known)
            .map_err(|error| ConfigErrors(vec![Problem::Environment(error.to_string())]))?;

        let mut reader = Reader { raw: &raw, problems: not_unicode };
        let config = reader.config();
        reader.problems.extend(unknown);
        if reader.problems.is_empty() { Ok(config) } else { Err(ConfigErrors(reader.problems)) }
    }
}

/// Parses values and collects what is wrong with them.
struct Reader<'a> {
    raw: &'a RawConfig,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    /// The variable's value. After a problem, which is noted, it is the default, so that reading
    /// goes on and finds the others.
    fn read<T>(&mut self, variable: &Variable, parse: impl Fn(&str) -> Parsed<T>) -> T {
        if let Some(text) = (variable.raw)(self.raw) {
            match parse_text(text, &parse) {
                Ok(value) => return value,
                Err(why) => self.problems.push(Problem::value(variable, text, why)),
            }
        }
        match parse(variable.default) {
            Ok(value) => value,
            Err(why) => unreachable!("the default of {}: {why}", variable.name),
        }
    }

    fn number<T>(&mut self, variable: &Variable, min: T, max: T) -> T
    where
        T: std::str::FromStr + PartialOrd + std::fmt::Display,
    {
        let range = min..=max;
        self.read(variable, |text| number(text, &range))
    }

    fn number_or_auto(&mut self, variable: &Variable, max: usize) -> Option<NonZeroUsize> {
        self.read(variable, |text| or_word(text, "auto", |text| number(text, &(1..=max))))
            .and_then(NonZeroUsize::new)
    }

    fn duration(&mut self, variable: &Variable, min: Duration, max: Duration) -> Duration {
        self.read(variable, |text| duration(text, &(min..=max)))
    }

    fn duration_or_off(
        &mut self,
        variable: &Variable,
        min: Duration,
        max: Duration,
    ) -> Option<Duration> {
        self.read(variable, |text| or_word(text, "off", |text| duration(text, &(min..=max))))
    }

    fn word<T: std::str::FromStr<Err = String>>(&mut self, variable: &Variable) -> T {
        self.read(variable, T::from_str)
    }

    fn config(&mut self) -> Config {
        let problems_before = self.problems.len();
        let backends: Vec<HostPort> =
            self.read(&AEGIS_BACKENDS, |text| list(text, limits::ENDPOINTS_MAX, str::parse));
        let kube = self.kube();
        // The downward API says 0 where the container has no request.
        let workers = self.read(&AEGIS_WORKERS, |text| {
            or_word(text, "auto", |text| number(text, &(0..=limits::WORKERS_MAX)))
        });
        let workers = workers.and_then(NonZeroUsize::new);
        let config = Config {
            listen: self.read(&AEGIS_LISTEN, listen_addresses),
            admin: self.read(&AEGIS_ADMIN, socket_address),
            dns_refresh: self.duration(&AEGIS_DNS_REFRESH, 100 * MILLISECOND, HOUR),
            discovery: self.discovery(&backends, &kube),
            backends,
            kube,
            start_timeout: self.duration(&AEGIS_START_TIMEOUT, Duration::ZERO, 300 * SECOND),
            locality: self.word(&AEGIS_LOCALITY),
            node_name: self.place(&AEGIS_NODE_NAME),
            zone: self.place(&AEGIS_ZONE),
            backend_drain: self.duration_or_off(&AEGIS_BACKEND_DRAIN, Duration::ZERO, DAY),
            slow_start: self.duration_or_off(&AEGIS_SLOW_START, 100 * MILLISECOND, 600 * SECOND),
            endpoint_wait: self.duration(&AEGIS_ENDPOINT_WAIT, Duration::ZERO, 300 * SECOND),
            balance: self.word(&AEGIS_BALANCE),
            workers,
            pin: self.word(&AEGIS_PIN),
            resources: self.resources(),
            io: self.word(&AEGIS_IO),
            max_sessions: self.number_or_auto(&AEGIS_MAX_SESSIONS, limits::SESSIONS_MAX),
            protocol: self.word(&AEGIS_PROTOCOL),
            pool: self.pool(workers),
            requests: self.requests(),
            connect_timeout: self.duration(&AEGIS_CONNECT_TIMEOUT, MILLISECOND, 300 * SECOND),
            connect_attempts: self.number(&AEGIS_CONNECT_ATTEMPTS, 1, 8),
            idle_timeout: self.duration_or_off(&AEGIS_IDLE_TIMEOUT, 10 * MILLISECOND, 30 * DAY),
            half_close_timeout: self.duration_or_off(
                &AEGIS_HALF_CLOSE_TIMEOUT,
                10 * MILLISECOND,
                30 * DAY,
            ),
            tcp_user_timeout: self.duration_or_off(&AEGIS_TCP_USER_TIMEOUT, SECOND, DAY),
            // The kernel takes whole seconds, at most 32767.
            keepalive: self.duration_or_off(&AEGIS_KEEPALIVE, SECOND, 9 * HOUR),
            proxy_protocol: self.word(&AEGIS_PROXY_PROTOCOL),
            drain_delay: self.duration(&AEGIS_DRAIN_DELAY, Duration::ZERO, 300 * SECOND),
            drain_timeout: self.duration(&AEGIS_DRAIN_TIMEOUT, Duration::ZERO, HOUR),
            eject_failures: self.number(&AEGIS_EJECT_FAILURES, 1, 1000),
            eject_time: self.duration(&AEGIS_EJECT_TIME, 10 * MILLISECOND, HOUR),
            log: self.read(&AEGIS_LOG, log_filter),
            log_format: self.word(&AEGIS_LOG_FORMAT),
        };
        // What stands in for a refused value is not to be blamed for anything.
        if self.problems.len() == problems_before {
            self.check_addresses(&config);
            self.check_discovery(&config);
            self.check_pooling(&config);
        }
        config
    }

    /// Where endpoints come from; what is left open follows from what else is set.
    fn discovery(&mut self, backends: &[HostPort], kube: &KubeConfig) -> Discovery {
        let said = self.read(&AEGIS_DISCOVERY, |text| or_word(text, "auto", str::parse));
        said.unwrap_or_else(|| {
            let named = match (&kube.service, &kube.selector) {
                (Some(service), _) => Some((&AEGIS_KUBE_SERVICE, service.to_string())),
                (None, Some(selector)) => Some((&AEGIS_KUBE_SELECTOR, selector.clone())),
                (None, None) => None,
            };
            match named {
                Some(named) => {
                    if let Some(backends) = self.raw.backends.clone() {
                        let why = "both name endpoints, and AEGIS_DISCOVERY does not say which";
                        self.conflict((&AEGIS_BACKENDS, backends), named, why);
                    }
                    Discovery::Kubernetes
                }
                None if backends.iter().any(is_name) => Discovery::Dns,
                None => Discovery::Static,
            }
        })
    }

    fn kube(&mut self) -> KubeConfig {
        KubeConfig {
            service: self.read(&AEGIS_KUBE_SERVICE, |text| or_word(text, "none", str::parse)),
            selector: self.read(&AEGIS_KUBE_SELECTOR, |text| or_word(text, "none", selector)),
            namespace: self.read(&AEGIS_KUBE_NAMESPACE, |text| or_word(text, "auto", dns_label)),
            port: self.read(&AEGIS_KUBE_PORT, |text| or_word(text, "auto", str::parse)),
            stores: self.number_or_auto(&AEGIS_KUBE_STORES, limits::ENDPOINTS_MAX),
            watch_timeout: self.read(&AEGIS_KUBE_WATCH_TIMEOUT, |text| {
                let timeout = duration(text, &(SECOND..=300 * SECOND))?;
                if timeout.subsec_nanos() == 0 {
                    Ok(timeout)
                } else {
                    Err("not whole seconds".to_owned())
                }
            }),
            snapshot: self.read(&AEGIS_KUBE_SNAPSHOT, |text| or_word(text, "none", absolute_path)),
            snapshot_age_max: self.read(&AEGIS_KUBE_SNAPSHOT_MAX_AGE, |text| {
                duration(text, &(SECOND..=30 * 24 * 3600 * SECOND))
            }),
        }
    }

    /// Where this runs. On a node without the label, the downward API gives an empty text.
    fn place(&mut self, variable: &Variable) -> Option<String> {
        let text = (variable.raw)(self.raw).map(str::trim);
        text.filter(|text| !text.is_empty() && *text != variable.default).map(str::to_owned)
    }

    fn check_discovery(&mut self, config: &Config) {
        let discovery = || (&AEGIS_DISCOVERY, config.discovery.to_string());
        let kube = &config.kube;
        let service = kube.service.as_ref().map(ToString::to_string);
        if let (Some(service), Some(selector)) = (&service, &kube.selector) {
            let selector = (&AEGIS_KUBE_SELECTOR, selector.clone());
            let service = (&AEGIS_KUBE_SERVICE, service.clone());
            self.conflict(service, selector, "endpoints come from one of them");
        }
        if let Some(ServiceName { namespace: Some(named), .. }) = &kube.service
            && let Some(namespace) = &kube.namespace
            && namespace != named
        {
            let service = (&AEGIS_KUBE_SERVICE, service.clone().unwrap_or_default());
            let namespace = (&AEGIS_KUBE_NAMESPACE, namespace.clone());
            self.conflict(service, namespace, "they name different namespaces");
        }
        let nothing_named = service.is_none() && kube.selector.is_none();
        if config.discovery == Discovery::Kubernetes && nothing_named {
            let service = (&AEGIS_KUBE_SERVICE, "none".to_owned());
            self.conflict(discovery(), service, "a Service or a selector has to be named");
        }
        if config.discovery == Discovery::Static
            && let Some(name) = config.backends.iter().find(|backend| is_name(backend))
        {
            let backend = (&AEGIS_BACKENDS, name.to_string());
            self.conflict(discovery(), backend, "names have to be resolved; dns does that");
        }
    }

    fn resources(&mut self) -> Resources {
        let mut number = |variable| {
            let parse = |text: &str| or_word(text, "none", |text| number(text, &(0..=u64::MAX)));
            self.read(variable, parse).and_then(NonZeroU64::new)
        };
        Resources {
            cpu_request_milli: number(&AEGIS_CPU_REQUEST),
            cpu_limit_milli: number(&AEGIS_CPU_LIMIT),
            memory_request_bytes: number(&AEGIS_MEMORY_REQUEST),
            memory_limit_bytes: number(&AEGIS_MEMORY_LIMIT),
        }
    }

    fn pool(&mut self, workers: Option<NonZeroUsize>) -> PoolConfig {
        let problems_before = self.problems.len();
        let mut min_idle = self.number(&AEGIS_POOL_MIN_IDLE, 0, limits::POOL_IDLE_MAX);
        let max_idle = self.number(&AEGIS_POOL_MAX_IDLE, 0, limits::POOL_IDLE_MAX);
        // All workers keep the minimum together, and each may keep the maximum. Where their number is
        // left open one has to be enough, so that what is right does not depend on the machine.
        let kept_max = max_idle * workers.map_or(1, NonZeroUsize::get);
        if min_idle > kept_max && self.problems.len() == problems_before {
            if self.raw.pool_min_idle.is_some() {
                self.conflict(
                    (&AEGIS_POOL_MIN_IDLE, min_idle.to_string()),
                    (&AEGIS_POOL_MAX_IDLE, max_idle.to_string()),
                    "the minimum of all workers together is above what they may keep",
                );
            }
            min_idle = kept_max;
        }
        PoolConfig {
            mode: self.word(&AEGIS_POOL_MODE),
            size: self.number(&AEGIS_POOL_SIZE, 1, limits::POOL_IDLE_MAX),
            min_idle,
            max_idle,
            idle_timeout: self.duration_or_off(
                &AEGIS_POOL_IDLE_TIMEOUT,
                10 * MILLISECOND,
                30 * DAY,
            ),
            max_lifetime: self.duration_or_off(
                &AEGIS_POOL_MAX_LIFETIME,
                10 * MILLISECOND,
                30 * DAY,
            ),
        }
    }

    fn requests(&mut self) -> RequestConfig {
        RequestConfig {
            queue_max: self.number(&AEGIS_QUEUE_MAX, 0, limits::SESSIONS_MAX),
            queue_timeout: self.duration(&AEGIS_QUEUE_TIMEOUT, 10 * MILLISECOND, HOUR),
            timeout: self.duration_or_off(&AEGIS_REQUEST_TIMEOUT, 10 * MILLISECOND, DAY),
            route: self.word(&AEGIS_ROUTE),
            line_max: self.number(&AEGIS_LINE_MAX, 16, limits::BUFFER_SIZE),
            repeat_writes: self.read(&AEGIS_REPEAT_WRITES, |text| match text {
                "on" => Ok(true),
                "off" => Ok(false),
                _ => Err("not one of the choices".to_owned()),
            }),
        }
    }

    /// A used connection is lent only where that is known to be safe.
    fn check_pooling(&mut self, config: &Config) {
        let mode = || (&AEGIS_POOL_MODE, config.pool.mode.to_string());
        let lends = config.pool.mode != PoolMode::Preconnect;
        if lends && !config.protocol.facts().is_framed {
            let protocol = (&AEGIS_PROTOCOL, config.protocol.to_string());
            let why = "of unknown bytes nobody can tell when an answer is over, so a used \
                       connection could bring one client the answer to another";
            self.conflict(mode(), protocol, why);
        }
        if lends && config.proxy_protocol != ProxyProtocol::Off {
            let header = (&AEGIS_PROXY_PROTOCOL, config.proxy_protocol.to_string());
            self.conflict(
                mode(),
                header,
                "the header names one client, and many share a connection",
            );
        }
        let route = || (&AEGIS_ROUTE, config.requests.route.to_string());
        if config.requests.route == Route::Key {
            if config.pool.mode != PoolMode::Request {
                self.conflict(
                    route(),
                    mode(),
                    "keys of one client may belong to several endpoints",
                );
            }
            if !config.protocol.facts().has_keys {
                let protocol = (&AEGIS_PROTOCOL, config.protocol.to_string());
                let with_keys = Protocol::words_where(|facts| facts.has_keys);
                let why = format!("only the requests of {with_keys} have keys");
                self.conflict(route(), protocol, &why);
            }
        }
    }

    fn check_addresses(&mut self, config: &Config) {
        let listen = || (&AEGIS_LISTEN, list_text(&config.listen));
        // The admin port's `::` takes connections of both families, and the data port's does not.
        let both_families = config.admin.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        let admin_takes_in = |other: SocketAddr| {
            takes_in(config.admin, other) || both_families && config.admin.port() == other.port()
        };
        let shared = |&listen: &SocketAddr| {
            listen.port() != 0 && (admin_takes_in(listen) || takes_in(listen, config.admin))
        };
        if config.listen.iter().any(shared) {
            let admin = (&AEGIS_ADMIN, config.admin.to_string());
            self.conflict(listen(), admin, "both would listen at the same address");
        }
        let own = Listening::new(config.listen.iter().copied());
        let is_own = |backend: &&HostPort| {
            let Ok(ip) = backend.host.parse::<IpAddr>() else { return false };
            let target = SocketAddr::new(ip, backend.port);
            // Which other addresses are the host's own may have changed by the time of a connect.
            own.reached_by(target, |_| false).is_some()
        };
        if let Some(backend) = config.backends.iter().find(is_own) {
            let backend = (&AEGIS_BACKENDS, backend.to_string());
            self.conflict(listen(), backend, "the proxy would connect to itself without end");
        }
    }

    fn conflict(&mut self, a: (&Variable, String), b: (&Variable, String), why: &str) {
        let pairs = [(a.0.name, a.1), (b.0.name, b.1)];
        self.problems.push(Problem::Conflict { pairs, why: why.to_owned() });
    }
}

fn is_name(backend: &HostPort) -> bool {
    backend.host.parse::<IpAddr>().is_err()
}

fn parse_text<T>(text: &str, parse: impl Fn(&str) -> Parsed<T>) -> Parsed<T> {
    match text.trim() {
        "" => Err("empty; unset it to have the default".to_owned()),
        // Readers of YAML 1.1, Helm among them, make booleans of a bare `on` and `off`.
        "true" => parse("on"),
        "false" => parse("off"),
        text => parse(text),
    }
}

/// Addresses to listen on, of which none takes in another one.
fn listen_addresses(text: &str) -> Parsed<Vec<SocketAddr>> {
    let addresses = list(text, limits::LISTEN_ADDRESSES_MAX, socket_address)?;
    for (at, &one) in addresses.iter().enumerate() {
        for &other in &addresses[at + 1..] {
            let overlap = if takes_in(one, other) {
                Some((one, other))
            } else if takes_in(other, one) {
                Some((other, one))
            } else {
                None
            };
            if let Some((wide, narrow)) = overlap {
                return Err(format!("{wide} takes in {narrow}: leave one of them out"));
            }
        }
    }
    Ok(addresses)
}

/// Whether a socket that listens at the one address leaves none for another socket at the other.
/// Each is of one family.
fn takes_in(one: SocketAddr, other: SocketAddr) -> bool {
    let is_any_of_family = one.ip().is_unspecified() && one.is_ipv4() == other.is_ipv4();
    one.port() != 0 && one.port() == other.port() && (one.ip() == other.ip() || is_any_of_family)
}
