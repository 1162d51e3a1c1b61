//! Values that are in order, and do nothing in the configuration at hand.

use super::value::unknown_targets;
use super::variable::{VARIABLES, Variable};
use super::variables::{
    AEGIS_BACKEND_DRAIN, AEGIS_BACKENDS, AEGIS_DNS_REFRESH, AEGIS_KUBE_STORES, AEGIS_LINE_MAX,
    AEGIS_LOCALITY, AEGIS_POOL_IDLE_TIMEOUT, AEGIS_POOL_MAX_IDLE, AEGIS_POOL_MAX_LIFETIME,
    AEGIS_POOL_SIZE, AEGIS_PROTOCOL, AEGIS_QUEUE_MAX, AEGIS_QUEUE_TIMEOUT, AEGIS_REPEAT_WRITES,
    AEGIS_REQUEST_TIMEOUT, AEGIS_SLOW_START,
};
use super::{Balance, Config, Discovery, Locality, PoolMode, Protocol, Route};

/// Variables, whether what else is configured leaves them an effect, and if not, why.
type Rule<'a> = (&'a [&'a Variable], bool, &'a str);

impl Config {
    /// What is set and has no effect, each with the reason: somebody expects something of it. A
    /// value that is the default brings no warning, since charts write defaults out.
    pub fn warnings(&self) -> Vec<String> {
        let default = Self::from_vars([]).map(|config| config.effective()).unwrap_or_default();
        let set: Vec<_> =
            self.effective().into_iter().filter(|variable| !default.contains(variable)).collect();
        let kube: Vec<_> =
            VARIABLES.iter().copied().filter(|v| v.name.starts_with("AEGIS_KUBE_")).collect();
        let mut warnings = Vec::new();
        let readers = Protocol::words_where(|facts| !facts.variables.is_empty());
        let not_read = format!("requests of {readers} are not told apart here");
        for (variables, has_effect, why) in self.rules(&kube, &not_read) {
            let idle = set.iter().filter(|(name, _)| variables.iter().any(|v| v.name == *name));
            if !has_effect {
                let text =
                    |(name, value): &(_, String)| format!("{name}={value:?} has no effect: {why}");
                warnings.extend(idle.map(text));
            }
        }
        for target in unknown_targets(&self.log) {
            warnings.push(format!("AEGIS_LOG: nothing that is known logs as {target:?}"));
        }
        warnings
    }

    fn rules<'a>(&self, kube: &'a [&'a Variable], not_read: &'a str) -> Vec<Rule<'a>> {
        let kubernetes = self.discovery == Discovery::Kubernetes;
        let mode = self.pool.mode;
        let is_shared = mode != PoolMode::Preconnect;
        let is_read = |variable: &Variable| {
            is_shared && self.protocol.facts().variables.contains(&variable.name)
        };
        let by_key = self.requests.route == Route::Key;
        let keeps_idle = mode == PoolMode::Request || self.pool.max_idle > 0;
        let ramps = self.balance != Balance::SourceHash;
        vec![
            (kube, kubernetes, "the endpoints do not come from Kubernetes"),
            (&[AEGIS_BACKENDS], !kubernetes, "the endpoints come from Kubernetes"),
            (&[AEGIS_KUBE_STORES], !kubernetes || by_key, "AEGIS_ROUTE is not key"),
            (&[AEGIS_DNS_REFRESH], self.discovery == Discovery::Dns, "no names are resolved"),
            (&[AEGIS_LOCALITY], kubernetes, "only Kubernetes says where endpoints are"),
            (
                &[AEGIS_LOCALITY],
                !kubernetes || self.locality != Locality::Zone || self.zone.is_some(),
                "AEGIS_ZONE does not say which zone is near",
            ),
            (
                &[AEGIS_LOCALITY],
                !kubernetes || self.locality != Locality::Node || self.node_name.is_some(),
                "AEGIS_NODE_NAME does not say which node is near",
            ),
            (
                &[AEGIS_BACKEND_DRAIN, AEGIS_SLOW_START],
                self.discovery != Discovery::Static,
                "the endpoints are always the same ones",
            ),
            (
                &[AEGIS_SLOW_START],
                self.discovery == Discovery::Static || ramps,
                "AEGIS_BALANCE=source_hash gives each endpoint its share at once",
            ),
            (
                &[AEGIS_PROTOCOL],
                is_shared,
                "with AEGIS_POOL_MODE=preconnect bytes are passed on as they are",
            ),
            (
                &[AEGIS_QUEUE_MAX, AEGIS_QUEUE_TIMEOUT, AEGIS_REQUEST_TIMEOUT],
                is_shared,
                "with AEGIS_POOL_MODE=preconnect requests are not told apart",
            ),
            (&[AEGIS_LINE_MAX], is_read(AEGIS_LINE_MAX), not_read),
            (&[AEGIS_REPEAT_WRITES], is_read(AEGIS_REPEAT_WRITES), not_read),
            (
                &[AEGIS_POOL_SIZE],
                mode == PoolMode::Request,
                "it is for AEGIS_POOL_MODE=request; elsewhere AEGIS_POOL_MAX_IDLE says how many",
            ),
            (
                &[AEGIS_POOL_MAX_IDLE],
                mode != PoolMode::Request || self.pool.max_idle == 0,
                "with AEGIS_POOL_MODE=request AEGIS_POOL_SIZE says how many",
            ),
            (
                &[AEGIS_POOL_IDLE_TIMEOUT, AEGIS_POOL_MAX_LIFETIME],
                keeps_idle || mode == PoolMode::Session,
                "AEGIS_POOL_MAX_IDLE=0 keeps no connections",
            ),
        ]
    }
}
