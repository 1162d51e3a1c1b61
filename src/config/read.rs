//! From the environment to [`RawConfig`] and on to [`Config`], with all problems at once.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use super::kind::Kind;
use super::routes::{AEGIS_ROUTES, Names};
use super::service_links;
use super::value::{Word, duration_text, list_text, overlap, takes_in};
use super::variable::{PREFIX, RawConfig, Section, Variable};
use super::variables::{
    AEGIS_ADMIN, AEGIS_BACKENDS, AEGIS_BACKUPS, AEGIS_BALANCE, AEGIS_CHECK, AEGIS_CHECK_INTERVAL,
    AEGIS_CONTROL, AEGIS_DISCOVERY, AEGIS_ENDPOINT_MAX, AEGIS_KUBE_NAMESPACE, AEGIS_KUBE_SELECTOR,
    AEGIS_KUBE_SERVICE, AEGIS_KUBE_SNAPSHOT, AEGIS_LISTEN, AEGIS_LOCALITY, AEGIS_POOL_MAX_IDLE,
    AEGIS_POOL_MIN_IDLE, AEGIS_POOL_MODE, AEGIS_POOL_SIZE, AEGIS_PRESET, AEGIS_PROTOCOL,
    AEGIS_PROXY_PROTOCOL,
};
use super::{
    Backend, Balance, Config, ConfigErrors, Discovery, PoolMode, Preset, Problem, Protocol,
    ProxyProtocol, RouteConfig, RouteName, ServiceName,
};
use crate::io::net::Address;
use crate::limits::{ENDPOINTS_MAX, LISTEN_ADDRESSES_MAX};
use crate::listening::Listening;
use crate::proxy::endpoints::Tier;

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
        let mut ours: Vec<_> = vars
            .map(|(name, value)| (name.to_string_lossy().into_owned(), value))
            .filter(|(name, _)| name.starts_with(PREFIX))
            .collect();
        let texts = ours.iter().map(|(name, value)| (name.clone(), value.to_string_lossy().into()));
        let texts: BTreeMap<_, String> = texts.collect();
        let of_services = service_links::names(&texts);
        ours.retain(|(name, _)| !of_services.contains(name));
        let names = Names::of(texts.get(AEGIS_ROUTES.name).map(String::as_str));

        let (mut known, mut not_unicode, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
        for (name, value) in ours {
            match (names.variable(&name), value.into_string()) {
                (Some(_), Ok(value)) => known.push((name, value)),
                (Some(variable), Err(value)) => {
                    let (value, why) = (value.to_string_lossy(), "not Unicode text".to_owned());
                    not_unicode.push(Problem::value(name, variable, &value, why));
                }
                (None, _) => unknown.extend(Problem::no_variable(name, &names)),
            }
        }
        unknown.sort_by_key(Problem::to_string);
        let raw = envy::prefixed(PREFIX)
            .from_iter(known)
            .map_err(|error| ConfigErrors(vec![Problem::Environment(error.to_string())]))?;

        let mut reader = Reader { raw, names, route: None, problems: not_unicode };
        let mut config = Self::read(&mut reader);
        reader.settle(&mut config);
        reader.check(&config);
        reader.problems.sort_by_key(Problem::position);
        reader.problems.extend(unknown);
        if reader.problems.is_empty() { Ok(config) } else { Err(ConfigErrors(reader.problems)) }
    }
}

/// Parses values and collects what is wrong with them.
pub(super) struct Reader {
    raw: RawConfig,
    names: Names,
    /// The route whose variables are read or checked now.
    route: Option<RouteName>,
    problems: Vec<Problem>,
}

impl Reader {
    /// The variable's value: of a route its own, or else that of all. After a problem, which is noted,
    /// it is the default, so that reading goes on and finds the others.
    pub(super) fn read<K: Kind>(&mut self, variable: &Variable, kind: &K) -> K::Value {
        let mut value = None;
        for name in self.names_of(variable) {
            let Some(text) = self.raw.text(&name) else { continue };
            match kind.parse_found(text) {
                Ok(parsed) => value = Some(parsed),
                Err(why) => {
                    let problem = Problem::value(name, variable, text, why);
                    self.note(problem);
                }
            }
        }
        value.unwrap_or_else(|| match kind.parse(self.preset().default_of(variable)) {
            Ok(value) => value,
            Err(why) => unreachable!("the default of {}: {why}", variable.name),
        })
    }

    /// The preset of the route that is being read.
    fn preset(&self) -> Preset {
        let text = self.route.as_ref().and_then(|_| self.text(AEGIS_PRESET));
        text.and_then(|(_, text)| Preset::of_word(text.trim())).unwrap_or(Preset::None)
    }

    /// Whether the preset of that route has a default of its own for a variable.
    fn suggests(&self, variable: &Variable) -> bool {
        self.preset().default_of(variable) != variable.default
    }

    /// Every route, with what is its own.
    pub(super) fn read_routes(&mut self) -> Vec<Arc<RouteConfig>> {
        let names = self.names.all.clone();
        let routes = names.into_iter().map(|name| {
            self.route = Some(name);
            Arc::new(RouteConfig::read(self))
        });
        let routes = routes.collect();
        self.route = None;
        routes
    }

    /// The name of the route that is being read.
    pub(super) fn route(&self) -> &RouteName {
        self.route.as_ref().unwrap_or_else(|| unreachable!("its variables are being read"))
    }

    /// The names that a variable may have now, the weaker one first.
    fn names_of(&self, variable: &Variable) -> impl Iterator<Item = String> + use<> {
        let own = self.route.as_ref().map(|route| route.own(variable.name));
        std::iter::once(variable.name.to_owned()).chain(own)
    }

    /// The text that is in force, if any is, and the name it was found by.
    fn text(&self, variable: &Variable) -> Option<(String, &str)> {
        let found = self.names_of(variable).filter_map(|name| {
            let text = self.raw.text(&name)?;
            Some((name, text))
        });
        found.last()
    }

    /// By which name people know the variable: by that it was set by, or its plain one.
    fn name(&self, variable: &Variable) -> String {
        self.text(variable).map_or_else(|| variable.name.to_owned(), |(name, _)| name)
    }

    /// The name to set the variable by, of the route that is looked at.
    fn name_to_set(&self, variable: &Variable) -> String {
        let route = self.route.as_ref().filter(|_| self.names.are_given);
        route.map_or_else(|| variable.name.to_owned(), |route| route.own(variable.name))
    }

    /// Takes note of a problem. What all routes share is wrong once.
    fn note(&mut self, problem: Problem) {
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// Whether the variable's text is refused, of whichever route.
    fn is_refused(&self, variable: &Variable) -> bool {
        let is_value = |problem: &&Problem| matches!(problem, Problem::Value { .. });
        self.problems.iter().filter(is_value).any(|problem| problem.is_about(variable))
    }

    /// Decides what is left open and follows from other variables.
    fn settle(&mut self, config: &mut Config) {
        for route in &mut config.routes {
            let route = Arc::make_mut(route);
            self.route = Some(route.name.clone());
            self.settle_discovery(route);
            self.settle_min_idle(route);
            self.settle_endpoint_max(route);
        }
        self.route = None;
    }

    /// Finds what does not go together.
    fn check(&mut self, config: &Config) {
        for route in &config.routes {
            self.route = Some(route.name.clone());
            self.check_addresses(config, route);
            self.check_discovery(route);
            self.check_pooling(route);
            self.check_checks(route);
        }
        self.route = None;
        self.check_listeners(config);
        let file = |route: &RouteConfig| match route.discovery {
            Discovery::Kubernetes => route.kube.snapshot.clone(),
            Discovery::Static | Discovery::Dns => None,
        };
        let text = |route: &RouteConfig| file(route).unwrap_or_default().display().to_string();
        self.check_pairs(
            config,
            (AEGIS_KUBE_SNAPSHOT, "write to the same file"),
            text,
            |one, other| file(one).is_some() && file(one) == file(other),
        );
    }

    /// Where endpoints come from, if that is left open, follows from what else is set.
    fn settle_discovery(&mut self, route: &mut RouteConfig) {
        let text = self.text(AEGIS_DISCOVERY);
        if text.is_some_and(|(_, text)| Discovery::of_word(text.trim()).is_some()) {
            return;
        }
        let named = match (&route.kube.service, &route.kube.selector) {
            (Some(service), _) => Some((AEGIS_KUBE_SERVICE, service.to_string())),
            (None, Some(selector)) => Some((AEGIS_KUBE_SELECTOR, selector.clone())),
            (None, None) => None,
        };
        route.discovery = match named {
            Some(named) => {
                let backends = self.text(AEGIS_BACKENDS).map(|(_, text)| text.to_owned());
                if let Some(backends) = backends {
                    let discovery = self.name_to_set(AEGIS_DISCOVERY);
                    let why = format!("both name endpoints, and {discovery} does not say which");
                    self.conflict((AEGIS_BACKENDS, backends), named, &why);
                }
                Discovery::Kubernetes
            }
            None if route.names() > 0 => Discovery::Dns,
            None => Discovery::Static,
        };
    }

    /// The default of the minimum gives way to how many there may be; one that is set does not. What a
    /// preset suggests gives way to it.
    fn settle_min_idle(&mut self, route: &mut RouteConfig) {
        let pool = &mut route.pool;
        let (bound, most) = match pool.mode {
            PoolMode::Request => (AEGIS_POOL_SIZE, &mut pool.size),
            PoolMode::Preconnect | PoolMode::Session => (AEGIS_POOL_MAX_IDLE, &mut pool.max_idle),
        };
        if pool.min_idle <= *most {
            return;
        }
        if self.text(AEGIS_POOL_MIN_IDLE).is_some() {
            if self.text(bound).is_none() && self.suggests(bound) {
                *most = pool.min_idle;
                return;
            }
            self.conflict(
                (AEGIS_POOL_MIN_IDLE, pool.min_idle.to_string()),
                (bound, most.to_string()),
                "the minimum is above what may be kept",
            );
        }
        pool.min_idle = *most;
    }

    /// Defaults give way to the most connections that an endpoint may have; what is set does not.
    fn settle_endpoint_max(&mut self, route: &mut RouteConfig) {
        let pool = &mut route.pool;
        let Some(most) = pool.endpoint_max else { return };
        let has_size = pool.mode == PoolMode::Request;
        for (variable, value, is_used) in [
            (AEGIS_POOL_MIN_IDLE, &mut pool.min_idle, true),
            (AEGIS_POOL_SIZE, &mut pool.size, has_size),
        ] {
            if !is_used {
                continue; // Else what nobody has set would seem to be set, and in vain.
            }
            if *value > most && self.text(variable).is_some() {
                let why = format!(
                    "an endpoint would have more connections than it may; set {} to {value} or more, or \
                     {} to {most} or less",
                    self.name(AEGIS_ENDPOINT_MAX),
                    self.name(variable)
                );
                let endpoint_max = (AEGIS_ENDPOINT_MAX, most.to_string());
                self.conflict((variable, value.to_string()), endpoint_max, &why);
            }
            *value = (*value).min(most);
        }
    }

    fn check_discovery(&mut self, route: &RouteConfig) {
        let discovery = || (AEGIS_DISCOVERY, route.discovery.to_string());
        let kube = &route.kube;
        let service = kube.service.as_ref().map(ToString::to_string);
        if let (Some(service), Some(selector)) = (&service, &kube.selector) {
            let selector = (AEGIS_KUBE_SELECTOR, selector.clone());
            let service = (AEGIS_KUBE_SERVICE, service.clone());
            self.conflict(service, selector, "endpoints come from one of them");
        }
        if let Some(ServiceName { namespace: Some(named), .. }) = &kube.service
            && let Some(namespace) = &kube.namespace
            && namespace != named
        {
            let service = (AEGIS_KUBE_SERVICE, service.clone().unwrap_or_default());
            let namespace = (AEGIS_KUBE_NAMESPACE, namespace.clone());
            self.conflict(service, namespace, "they name different namespaces");
        }
        let nothing_named =
            service.is_none() && kube.selector.is_none() && !self.is_refused(AEGIS_KUBE_SELECTOR);
        if route.discovery == Discovery::Kubernetes && nothing_named {
            let service = (AEGIS_KUBE_SERVICE, "none".to_owned());
            self.conflict(discovery(), service, "a Service or a selector has to be named");
        }
        if route.discovery == Discovery::Static
            && let Some((name, tier)) = route.all_backends().find(|(backend, _)| backend.is_name())
        {
            let backend = (list_of(tier), name.to_string());
            self.conflict(discovery(), backend, "names have to be resolved; dns does that");
        }
        self.check_backups(route);
    }

    /// What stands in for others is something else than these, and what has its own keys cannot.
    fn check_backups(&mut self, route: &RouteConfig) {
        let by_key = route.balance == Balance::KeyHash;
        let balance = || (AEGIS_BALANCE, route.balance.to_string());
        let why = "no store has the keys of another one";
        if by_key && route.has_tiers() && route.discovery == Discovery::Kubernetes {
            self.conflict(balance(), (AEGIS_LOCALITY, route.locality.to_string()), why);
        }
        if route.discovery == Discovery::Kubernetes {
            return;
        }
        let Some(backups) = &route.backups else { return };
        if let Some(both) = backups.iter().find(|backup| route.backends.contains(backup)) {
            let (backend, backup) =
                ((AEGIS_BACKENDS, both.to_string()), (AEGIS_BACKUPS, both.to_string()));
            self.conflict(backend, backup, "nothing stands in for itself");
        }
        if by_key {
            self.conflict(balance(), (AEGIS_BACKUPS, list_text(backups)), why);
        }
        let count = route.all_backends().count();
        if count > ENDPOINTS_MAX {
            let (backends, backups) = (route.backends.len(), backups.len());
            let pairs = [(AEGIS_BACKENDS, backends), (AEGIS_BACKUPS, backups)];
            let [a, b] = pairs.map(|(variable, count)| (variable, format!("{count} items")));
            self.conflict(a, b, &format!("they are {count} together, {ENDPOINTS_MAX} at most"));
        }
    }

    /// A check has to be one that the server can pass, and does not mind.
    fn check_checks(&mut self, route: &RouteConfig) {
        let Some(interval) = &route.check_interval else { return };
        if route.checks_by_request() && route.protocol.facts().liveness_request.is_none() {
            let check = (AEGIS_CHECK, route.check.to_string());
            let protocol = (AEGIS_PROTOCOL, route.protocol.to_string());
            let with_one = Protocol::words_where(|facts| facts.liveness_request.is_some());
            self.conflict(check, protocol, &format!("only {with_one} have a request for that"));
        }
        if route.preset == Preset::Mysql {
            let interval = (AEGIS_CHECK_INTERVAL, duration_text(interval));
            let preset = (AEGIS_PRESET, route.preset.to_string());
            let why =
                "such a server counts connections without a login, until it locks the host out";
            self.conflict(interval, preset, why);
        }
    }

    /// A used connection is shared only where that is known to be safe.
    fn check_pooling(&mut self, route: &RouteConfig) {
        let mode = || (AEGIS_POOL_MODE, route.pool.mode.to_string());
        let reuses = route.pool.mode != PoolMode::Preconnect;
        if reuses && !route.protocol.facts().is_framed {
            let protocol = (AEGIS_PROTOCOL, route.protocol.to_string());
            let why = "of unknown bytes nobody can tell when an answer is over, so a used \
                       connection could bring one client the answer to another";
            self.conflict(mode(), protocol, why);
        }
        if reuses && route.proxy_protocol != ProxyProtocol::Off {
            let header = (AEGIS_PROXY_PROTOCOL, route.proxy_protocol.to_string());
            self.conflict(
                mode(),
                header,
                "the header names one client, and many share a connection",
            );
        }
        let balance = || (AEGIS_BALANCE, route.balance.to_string());
        if route.balance == Balance::KeyHash {
            if route.pool.mode != PoolMode::Request {
                self.conflict(
                    balance(),
                    mode(),
                    "keys of one client may belong to several endpoints",
                );
            }
            if !route.protocol.facts().has_keys {
                let protocol = (AEGIS_PROTOCOL, route.protocol.to_string());
                let with_keys = Protocol::words_where(|facts| facts.has_keys);
                let why = format!("only the requests of {with_keys} have keys");
                self.conflict(balance(), protocol, &why);
            }
        }
    }

    fn check_addresses(&mut self, config: &Config, route: &RouteConfig) {
        let listen = || (AEGIS_LISTEN, list_text(&route.listen));
        // The admin port's `::` takes connections of both families, and the data port's does not.
        let both_families = config.admin.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        let admin_takes_in = |other: SocketAddr| {
            takes_in(config.admin, other) || both_families && config.admin.port() == other.port()
        };
        let shared = |listen: SocketAddr| {
            listen.port() != 0 && (admin_takes_in(listen) || takes_in(listen, config.admin))
        };
        if route.listen.iter().filter_map(Address::tcp).any(shared) {
            let admin = (AEGIS_ADMIN, config.admin.to_string());
            self.conflict(listen(), admin, "both would listen at the same address");
        }
        if let Some(control) = config.control.as_ref().filter(|&at| route.listen.contains(at)) {
            let control = (AEGIS_CONTROL, control.to_string());
            self.conflict(listen(), control, "both would listen at the same address");
        }
        for other in &config.routes {
            let own = Listening::new(other.listen.iter().cloned());
            let is_own = |(backend, _): &(&Backend, Tier)| {
                // Which other addresses are the host's own may have changed by the time of a connect.
                backend.address().is_some_and(|target| own.reached_by(&target, |_| false).is_some())
            };
            let Some((backend, tier)) = route.all_backends().find(is_own) else { continue };
            let backend = (list_of(tier), backend.to_string());
            if other.name == route.name {
                self.conflict(listen(), backend, "the proxy would connect to itself without end");
            } else if !self.is_refused(AEGIS_LISTEN) {
                let of = self.route.clone();
                let own = (other.name.own(AEGIS_LISTEN.name), list_text(&other.listen));
                let pairs = [own, (self.name(backend.0), backend.1)];
                let why = format!("the proxy would connect to itself, by its route {}", other.name);
                self.note(Problem::Conflict { route: of, pairs, why });
            }
        }
    }

    /// Each route needs addresses of its own.
    fn check_listeners(&mut self, config: &Config) {
        if self.is_refused(AEGIS_LISTEN) {
            return;
        }
        let text = |route: &RouteConfig| list_text(&route.listen);
        self.check_pairs(
            config,
            (AEGIS_LISTEN, "listen at the same address"),
            text,
            |one, other| overlap(&one.listen, &other.listen).is_some(),
        );
        let routes = &config.routes;
        let count: usize = routes.iter().map(|route| route.listen.len()).sum();
        if count > LISTEN_ADDRESSES_MAX {
            let names: Vec<_> = routes.iter().map(|route| route.name.clone()).collect();
            let why = format!(
                "these routes listen at {count} addresses together, {LISTEN_ADDRESSES_MAX} at most"
            );
            let name = AEGIS_ROUTES.name.to_owned();
            self.note(Problem::value(name, AEGIS_ROUTES, &list_text(&names), why));
        }
    }

    /// What no two routes may share: each that shares it with one before it is told of once.
    fn check_pairs(
        &mut self,
        config: &Config,
        (variable, what): (&Variable, &str),
        text: impl Fn(&RouteConfig) -> String,
        share: impl Fn(&RouteConfig, &RouteConfig) -> bool,
    ) {
        for (at, route) in config.routes.iter().enumerate() {
            let Some(other) = config.routes[..at].iter().find(|other| share(other, route)) else {
                continue;
            };
            let own = |route: &RouteConfig| (route.name.own(variable.name), text(route));
            let why = format!("both routes would {what}. Set another one for each");
            self.note(Problem::Conflict { route: None, pairs: [own(other), own(route)], why });
        }
    }

    /// Two values that do not go together, unless one of them only stands in for a refused one.
    fn conflict(&mut self, a: (&Variable, String), b: (&Variable, String), why: &str) {
        if self.is_refused(a.0) || self.is_refused(b.0) {
            return;
        }
        let route = self.route.clone().filter(|_| self.names.are_given);
        let pairs = [(self.name(a.0), a.1), (self.name(b.0), b.1)];
        self.note(Problem::Conflict { route, pairs, why: why.to_owned() });
    }
}

/// The variable that lists the backends of this tier.
fn list_of(tier: Tier) -> &'static Variable {
    if tier == Tier::FIRST { AEGIS_BACKENDS } else { AEGIS_BACKUPS }
}
