//! Under which conditions a metric or one of its label values is there. What can never move in the
//! configuration at hand is not shown.

use crate::config::{PoolMode, RouteConfig};

/// A condition.
#[derive(Debug, Clone, Copy)]
pub struct When {
    /// The condition in words; empty where there is none.
    pub text: &'static str,
    holds: fn(&RouteConfig) -> bool,
}

impl When {
    /// In any case.
    pub const ALWAYS: Self = Self { text: "", holds: |_| true };
    /// Sessions have connections of their own.
    pub const PRECONNECT: Self = Self {
        text: "`AEGIS_POOL_MODE` is `preconnect`",
        holds: |config| config.pool.mode == PoolMode::Preconnect,
    };
    /// Connections serve one client after another.
    pub const SHARED: Self = Self {
        text: "`AEGIS_POOL_MODE` is `session` or `request`",
        holds: |config| config.pool.mode != PoolMode::Preconnect,
    };
    /// There are requests that no backend may see.
    pub const MAY_REFUSE: Self = Self {
        text: "the protocol has requests that no backend may see, as `chronos` has",
        holds: |config| config.protocol.facts().can_refuse,
    };
    /// It may turn out that nobody can tell where a message ends.
    pub const MAY_BE_OPAQUE: Self = Self {
        text: "the protocol's messages can be ambiguous, as those of `http1` can",
        holds: |config| config.protocol.facts().can_be_opaque,
    };
    /// The same, by connections that serve one client after another.
    pub const SHARED_MAY_BE_OPAQUE: Self = Self {
        text: "the protocol's messages can be ambiguous, as those of `http1` can, and \
               `AEGIS_POOL_MODE` is `session` or `request`",
        holds: |config| (Self::SHARED.holds)(config) && (Self::MAY_BE_OPAQUE.holds)(config),
    };
    /// Sessions may have to wait for a connection to an endpoint.
    pub const SESSIONS_WAIT: Self = Self {
        text: "`AEGIS_ENDPOINT_MAX` is set and `AEGIS_POOL_MODE` is `preconnect`",
        holds: |config| config.pool.endpoint_max.is_some() && (Self::PRECONNECT.holds)(config),
    };
    /// Near endpoints are preferred.
    pub const LOCALITY: Self = Self {
        text: "`AEGIS_LOCALITY` is `zone` or `node`",
        holds: |config| config.locality.prefers_near(),
    };
    /// Some endpoints stand in for others.
    pub const TIERS: Self = Self {
        text: "`AEGIS_BACKUPS` is set, or `AEGIS_LOCALITY` is `failover`",
        holds: RouteConfig::has_tiers,
    };
    /// Endpoints are checked.
    pub const CHECKS: Self = Self {
        text: "`AEGIS_CHECK_INTERVAL` is set",
        holds: |config| config.check_interval.is_some(),
    };
    /// Idle sessions end.
    pub const IDLE_TIMEOUT: Self =
        Self { text: "`AEGIS_IDLE_TIMEOUT` is set", holds: |config| config.idle_timeout.is_some() };
    /// Half-closed sessions end. In a drain clients of shared connections have such a limit in any case.
    pub const HALF_CLOSE_TIMEOUT: Self = Self {
        text: "`AEGIS_HALF_CLOSE_TIMEOUT` is not `off`, or `AEGIS_POOL_MODE` is `session` or `request`",
        holds: |config| config.half_close_timeout.is_some() || (Self::SHARED.holds)(config),
    };
    /// Silent peers are given up.
    pub const TCP_USER_TIMEOUT: Self = Self {
        text: "`AEGIS_TCP_USER_TIMEOUT` is not `off`",
        holds: |config| config.tcp_user_timeout.is_some(),
    };
    /// Sessions on endpoints that left end.
    pub const BACKEND_DRAIN: Self = Self {
        text: "`AEGIS_BACKEND_DRAIN` is set",
        holds: |config| config.backend_drain.is_some(),
    };
    /// Whoever writes it knows whether there are stores.
    pub const STORES: Self = Self { text: "`AEGIS_BALANCE` is `key_hash`", ..Self::ALWAYS };
    /// Whoever writes it knows where the endpoints are from.
    pub const SAVED_ENDPOINTS: Self =
        Self { text: "endpoints of a former run are in use", ..Self::ALWAYS };
    /// Whoever writes it knows the limit.
    pub const LIMITED_FDS: Self =
        Self { text: "the number of descriptors is limited", ..Self::ALWAYS };

    /// Whether it holds on this route. Conditions that the configuration does not decide hold.
    pub fn holds(&self, config: &RouteConfig) -> bool {
        (self.holds)(config)
    }
}
