//! From the environment to [`RawConfig`] and on to [`Config`], with all problems at once.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;

use super::kind::Kind;
use super::service_links;
use super::value::{Word, list_text, takes_in};
use super::variable::{PREFIX, RawConfig, Section, VARIABLES, Variable};
use super::variables::{
    AEGIS_ADMIN, AEGIS_BACKENDS, AEGIS_DISCOVERY, AEGIS_KUBE_NAMESPACE, AEGIS_KUBE_SELECTOR,
    AEGIS_KUBE_SERVICE, AEGIS_LISTEN, AEGIS_POOL_MAX_IDLE, AEGIS_POOL_MIN_IDLE, AEGIS_POOL_MODE,
    AEGIS_PROTOCOL, AEGIS_PROXY_PROTOCOL, AEGIS_ROUTE,
};
use super::{
    Config, ConfigErrors, Discovery, HostPort, PoolMode, Problem, Protocol, ProxyProtocol, Route,
    ServiceName,
};
use crate::listening::Listening;

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

        let mut reader = Reader { raw, problems: not_unicode };
        let mut config = Self::read(&mut reader);
        reader.settle_discovery(&mut config);
        reader.settle_min_idle(&mut config);
        // What stands in for a refused value is not to be blamed for anything.
        if reader.problems.is_empty() {
            reader.check_addresses(&config);
            reader.check_discovery(&config);
            reader.check_pooling(&config);
        }
        reader.problems.sort_by_key(Problem::position);
        reader.problems.extend(unknown);
        if reader.problems.is_empty() { Ok(config) } else { Err(ConfigErrors(reader.problems)) }
    }
}

/// Parses values and collects what is wrong with them.
pub(super) struct Reader {
    raw: RawConfig,
    problems: Vec<Problem>,
}

impl Reader {
    /// The variable's value. After a problem, which is noted, it is the default, so that reading
    /// goes on and finds the others.
    pub(super) fn read<K: Kind>(&mut self, variable: &Variable, kind: &K) -> K::Value {
        if let Some(text) = self.raw.text(variable) {
            match kind.parse_found(text) {
                Ok(value) => return value,
                Err(why) => self.problems.push(Problem::value(variable, text, why)),
            }
        }
        match kind.parse(variable.default) {
            Ok(value) => value,
            Err(why) => unreachable!("the default of {}: {why}", variable.name),
        }
    }

    /// Where endpoints come from, if that is left open, follows from what else is set.
    fn settle_discovery(&mut self, config: &mut Config) {
        let text = self.raw.text(AEGIS_DISCOVERY);
        if text.is_some_and(|text| Discovery::of_word(text.trim()).is_some()) {
            return;
        }
        let named = match (&config.kube.service, &config.kube.selector) {
            (Some(service), _) => Some((AEGIS_KUBE_SERVICE, service.to_string())),
            (None, Some(selector)) => Some((AEGIS_KUBE_SELECTOR, selector.clone())),
            (None, None) => None,
        };
        config.discovery = match named {
            Some(named) => {
                if let Some(backends) = self.raw.text(AEGIS_BACKENDS).map(str::to_owned) {
                    let why = "both name endpoints, and AEGIS_DISCOVERY does not say which";
                    self.conflict((AEGIS_BACKENDS, backends), named, why);
                }
                Discovery::Kubernetes
            }
            None if config.backends.iter().any(is_name) => Discovery::Dns,
            None => Discovery::Static,
        };
    }

    /// The default of the minimum gives way to the maximum; one that is set does not.
    fn settle_min_idle(&mut self, config: &mut Config) {
        let is_refused = |problem: &Problem| {
            [AEGIS_POOL_MIN_IDLE, AEGIS_POOL_MAX_IDLE].iter().any(|v| problem.is_about(v))
        };
        // All workers keep the minimum together, and each may keep the maximum. Where their number is
        // left open one has to be enough, so that what is right does not depend on the machine.
        let kept_max = config.pool.max_idle * config.workers.map_or(1, NonZeroUsize::get);
        if config.pool.min_idle <= kept_max || self.problems.iter().any(is_refused) {
            return;
        }
        if self.raw.text(AEGIS_POOL_MIN_IDLE).is_some() {
            self.conflict(
                (AEGIS_POOL_MIN_IDLE, config.pool.min_idle.to_string()),
                (AEGIS_POOL_MAX_IDLE, config.pool.max_idle.to_string()),
                "the minimum of all workers together is above what they may keep",
            );
        }
        config.pool.min_idle = kept_max;
    }

    fn check_discovery(&mut self, config: &Config) {
        let discovery = || (AEGIS_DISCOVERY, config.discovery.to_string());
        let kube = &config.kube;
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
        let nothing_named = service.is_none() && kube.selector.is_none();
        if config.discovery == Discovery::Kubernetes && nothing_named {
            let service = (AEGIS_KUBE_SERVICE, "none".to_owned());
            self.conflict(discovery(), service, "a Service or a selector has to be named");
        }
        if config.discovery == Discovery::Static
            && let Some(name) = config.backends.iter().find(|backend| is_name(backend))
        {
            let backend = (AEGIS_BACKENDS, name.to_string());
            self.conflict(discovery(), backend, "names have to be resolved; dns does that");
        }
    }

    /// A used connection is shared only where that is known to be safe.
    fn check_pooling(&mut self, config: &Config) {
        let mode = || (AEGIS_POOL_MODE, config.pool.mode.to_string());
        let reuses = config.pool.mode != PoolMode::Preconnect;
        if reuses && !config.protocol.facts().is_framed {
            let protocol = (AEGIS_PROTOCOL, config.protocol.to_string());
            let why = "of unknown bytes nobody can tell when an answer is over, so a used \
                       connection could bring one client the answer to another";
            self.conflict(mode(), protocol, why);
        }
        if reuses && config.proxy_protocol != ProxyProtocol::Off {
            let header = (AEGIS_PROXY_PROTOCOL, config.proxy_protocol.to_string());
            self.conflict(
                mode(),
                header,
                "the header names one client, and many share a connection",
            );
        }
        let route = || (AEGIS_ROUTE, config.requests.route.to_string());
        if config.requests.route == Route::Key {
            if config.pool.mode != PoolMode::Request {
                self.conflict(
                    route(),
                    mode(),
                    "keys of one client may belong to several endpoints",
                );
            }
            if !config.protocol.facts().has_keys {
                let protocol = (AEGIS_PROTOCOL, config.protocol.to_string());
                let with_keys = Protocol::words_where(|facts| facts.has_keys);
                let why = format!("only the requests of {with_keys} have keys");
                self.conflict(route(), protocol, &why);
            }
        }
    }

    fn check_addresses(&mut self, config: &Config) {
        let listen = || (AEGIS_LISTEN, list_text(&config.listen));
        // The admin port's `::` takes connections of both families, and the data port's does not.
        let both_families = config.admin.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        let admin_takes_in = |other: SocketAddr| {
            takes_in(config.admin, other) || both_families && config.admin.port() == other.port()
        };
        let shared = |&listen: &SocketAddr| {
            listen.port() != 0 && (admin_takes_in(listen) || takes_in(listen, config.admin))
        };
        if config.listen.iter().any(shared) {
            let admin = (AEGIS_ADMIN, config.admin.to_string());
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
            let backend = (AEGIS_BACKENDS, backend.to_string());
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
