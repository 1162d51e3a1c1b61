//! Values that are in order, and do nothing in the configuration at hand.

use super::routes::plain;
use super::value::{logs_ends, unknown_targets};
use super::variable::{VARIABLES, Variable};
use super::variables::{
    AEGIS_BACKEND_DRAIN, AEGIS_BACKENDS, AEGIS_BACKUPS, AEGIS_CHECK, AEGIS_CHECK_FALL,
    AEGIS_CHECK_PATH, AEGIS_CHECK_RISE, AEGIS_DNS_REFRESH, AEGIS_FAILBACK_TIME,
    AEGIS_KUBE_SNAPSHOT_MAX_AGE, AEGIS_KUBE_STORES, AEGIS_LINE_MAX, AEGIS_LOCALITY, AEGIS_LOG_ENDS,
    AEGIS_POOL_IDLE_TIMEOUT, AEGIS_POOL_MAX_IDLE, AEGIS_POOL_MAX_LIFETIME, AEGIS_POOL_SIZE,
    AEGIS_PRESET, AEGIS_PROTOCOL, AEGIS_QUEUE_MAX, AEGIS_QUEUE_TIMEOUT, AEGIS_REPEAT_WRITES,
    AEGIS_REQUEST_TIMEOUT, AEGIS_SLOW_START, AEGIS_SOCKET_MODE, AEGIS_SOCKET_OWNER,
};
use super::{Balance, Config, Discovery, EndsLogged, Locality, PoolMode, Protocol, RouteConfig};

/// Variables, whether what else is configured leaves them an effect, and if not, why.
type Rule<'a> = (&'a [&'a Variable], bool, &'a str);

impl Config {
    /// What is set and has no effect, each with the reason: somebody expects something of it. A
    /// value that is the default brings no warning, since charts write defaults out, and one that is
    /// for all routes none where it has an effect on some of them.
    pub fn warnings(&self) -> Vec<String> {
        let default = Self::from_vars([]).map(|config| config.effective()).unwrap_or_default();
        let mut set = self.effective();
        set.retain(|(name, value)| !default.contains(&(plain(name), value.clone())));
        let idle: Vec<_> = self.routes.iter().map(|route| self.without_effect(route)).collect();
        let mut warnings = Vec::new();
        for (name, value) in set {
            let bare = plain(&name);
            let concerned = self.routes.iter().zip(&idle);
            let concerned =
                concerned.filter(|(route, _)| name == bare || name == route.name.own(&bare));
            let whys = concerned.map(|(_, idle)| idle.iter().find(|(idle, _)| *idle == bare));
            let whys: Option<Vec<_>> = whys.collect();
            if let Some((_, why)) = whys.as_ref().and_then(|whys| whys.first()) {
                warnings.push(format!("{name}={value:?} has no effect: {why}"));
            }
        }
        for target in unknown_targets(&self.log) {
            warnings.push(format!("AEGIS_LOG: nothing that is known logs as {target:?}"));
        }
        warnings
    }

    /// The variables that have no effect on this route, each with the reason. What a preset suggests
    /// nobody has set.
    fn without_effect(&self, route: &RouteConfig) -> Vec<(&'static str, String)> {
        let kube: Vec<_> =
            VARIABLES.iter().copied().filter(|v| v.name.starts_with("AEGIS_KUBE_")).collect();
        let readers = Protocol::words_where(|facts| !facts.variables.is_empty());
        let not_read = format!("requests of {readers} are not told apart here");
        let at_once =
            format!("AEGIS_BALANCE={} gives each endpoint its share at once", route.balance);
        let of_endpoints = self.rules_of_endpoints(route, &kube, &at_once);
        let rules = of_endpoints
            .into_iter()
            .chain(rules_of_pools(route, &not_read))
            .chain(rules_of_checks(route));
        let by_preset = route.by_preset();
        let is_suggested = |name: &str| by_preset.iter().any(|(suggested, _)| *suggested == name);
        let idle = rules.filter(|(_, has_effect, _)| !has_effect);
        let idle =
            idle.flat_map(|(variables, _, why)| variables.iter().map(move |v| (v.name, why)));
        let idle = idle.filter(|(name, _)| !is_suggested(name));
        idle.map(|(name, why)| (name, why.to_owned())).collect()
    }

    /// Whether each variable has an effect, of those that say where endpoints are and which is used.
    fn rules_of_endpoints<'a>(
        &self,
        route: &RouteConfig,
        kube: &'a [&'a Variable],
        at_once: &'a str,
    ) -> Vec<Rule<'a>> {
        let kubernetes = route.discovery == Discovery::Kubernetes;
        let by_key = route.balance == Balance::KeyHash;
        let ramps = ![Balance::SourceHash, Balance::KeyHash].contains(&route.balance);
        vec![
            (kube, kubernetes, "the endpoints do not come from Kubernetes"),
            (&[AEGIS_BACKENDS, AEGIS_BACKUPS], !kubernetes, "the endpoints come from Kubernetes"),
            (
                &[AEGIS_KUBE_SNAPSHOT_MAX_AGE],
                !kubernetes || route.kube.snapshot.is_some(),
                "AEGIS_KUBE_SNAPSHOT is none",
            ),
            (
                &[AEGIS_LOG_ENDS],
                route.log_ends == EndsLogged::Off || logs_ends(&self.log),
                "AEGIS_LOG leaves out what is of the level info",
            ),
            (&[AEGIS_KUBE_STORES], !kubernetes || by_key, "AEGIS_BALANCE is not key_hash"),
            (
                &[AEGIS_SOCKET_MODE, AEGIS_SOCKET_OWNER],
                route.listen.iter().any(|address| address.path().is_some()),
                "AEGIS_LISTEN has no Unix socket",
            ),
            (
                &[AEGIS_DNS_REFRESH],
                route.discovery == Discovery::Dns && route.names() > 0,
                "no names are resolved",
            ),
            (&[AEGIS_LOCALITY], kubernetes, "only Kubernetes says where endpoints are"),
            (
                &[AEGIS_LOCALITY],
                !kubernetes
                    || ![Locality::Zone, Locality::Failover].contains(&route.locality)
                    || self.zone.is_some(),
                "AEGIS_ZONE does not say which zone is near",
            ),
            (
                &[AEGIS_LOCALITY],
                !kubernetes || route.locality != Locality::Node || self.node_name.is_some(),
                "AEGIS_NODE_NAME does not say which node is near",
            ),
            (
                &[AEGIS_BACKEND_DRAIN, AEGIS_SLOW_START],
                route.discovery != Discovery::Static,
                "the endpoints are always the same ones",
            ),
            (&[AEGIS_SLOW_START], route.discovery == Discovery::Static || ramps, at_once),
        ]
    }
}

/// The same, of those that say how clients come by connections.
fn rules_of_pools<'a>(route: &RouteConfig, not_read: &'a str) -> Vec<Rule<'a>> {
    let mode = route.pool.mode;
    let is_shared = mode != PoolMode::Preconnect;
    let is_read = |variable: &Variable| {
        is_shared && route.protocol.facts().variables.contains(&variable.name)
    };
    let pool = &route.pool;
    let has_size = mode == PoolMode::Request;
    let keeps_idle = has_size || pool.max_idle > 0;
    let suggested = route.by_preset();
    let is_used = |name: &str| !has_size || name != AEGIS_POOL_MAX_IDLE.name;
    vec![
        (
            &[AEGIS_PRESET],
            !is_shared || suggested.iter().any(|(name, _)| is_used(name)),
            "it is for servers whose bytes are passed on as they are",
        ),
        (
            &[AEGIS_PROTOCOL],
            is_shared || route.checks_by_request(),
            "with AEGIS_POOL_MODE=preconnect bytes are passed on as they are",
        ),
        (
            &[AEGIS_QUEUE_MAX, AEGIS_QUEUE_TIMEOUT],
            is_shared || route.pool.endpoint_max.is_some(),
            "with AEGIS_POOL_MODE=preconnect and without AEGIS_ENDPOINT_MAX nothing waits in line",
        ),
        (
            &[AEGIS_REQUEST_TIMEOUT],
            is_shared,
            "with AEGIS_POOL_MODE=preconnect requests are not told apart",
        ),
        (&[AEGIS_LINE_MAX], is_read(AEGIS_LINE_MAX), not_read),
        (&[AEGIS_REPEAT_WRITES], is_read(AEGIS_REPEAT_WRITES), not_read),
        (
            &[AEGIS_POOL_SIZE],
            has_size,
            "it is for AEGIS_POOL_MODE=request; elsewhere AEGIS_POOL_MAX_IDLE says how many",
        ),
        (
            &[AEGIS_POOL_MAX_IDLE],
            !has_size,
            "with AEGIS_POOL_MODE=request AEGIS_POOL_SIZE says how many",
        ),
        (
            &[AEGIS_POOL_MAX_LIFETIME],
            keeps_idle || mode == PoolMode::Session,
            "AEGIS_POOL_MAX_IDLE=0 keeps no connections",
        ),
        (&[AEGIS_POOL_IDLE_TIMEOUT], keeps_idle, "AEGIS_POOL_MAX_IDLE=0 keeps no connections"),
    ]
}

/// The same, of those that say which endpoints stand in for others, and how they are checked.
fn rules_of_checks(route: &RouteConfig) -> Vec<Rule<'static>> {
    vec![
        (
            &[AEGIS_CHECK, AEGIS_CHECK_PATH, AEGIS_CHECK_FALL, AEGIS_CHECK_RISE],
            route.check_interval.is_some(),
            "AEGIS_CHECK_INTERVAL is off",
        ),
        (
            &[AEGIS_CHECK_PATH],
            route.checks_by_request() && route.protocol == Protocol::Http1,
            "it is for AEGIS_CHECK=request with AEGIS_PROTOCOL=http1",
        ),
        (&[AEGIS_FAILBACK_TIME], route.has_tiers(), "no endpoints stand in for others"),
    ]
}
