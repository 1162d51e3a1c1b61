//! What a kind of server suggests in place of the defaults; `docs/DATABASES.md` says why.

use super::variable::Variable;
use super::variables::{AEGIS_POOL_IDLE_TIMEOUT, AEGIS_POOL_MAX_IDLE, AEGIS_POOL_MIN_IDLE};

/// A kind of server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// None in particular.
    None,
    /// `PostgreSQL`.
    Postgres,
    /// `MySQL` or `MariaDB`.
    Mysql,
    /// Redis.
    Redis,
}

impl Preset {
    /// The defaults that it puts in place of the variables' own.
    pub(super) fn defaults(self) -> &'static [(&'static Variable, &'static str)] {
        match self {
            // What nobody uses is a process there, and is ended after a minute: it is closed before.
            Self::Postgres => &[
                (AEGIS_POOL_MIN_IDLE, "0"),
                (AEGIS_POOL_MAX_IDLE, "4"),
                (AEGIS_POOL_IDLE_TIMEOUT, "30s"),
            ],
            // It would be counted, until the host is locked out.
            Self::Mysql => &[(AEGIS_POOL_MIN_IDLE, "0"), (AEGIS_POOL_MAX_IDLE, "0")],
            // It minds none, nor how long they are kept.
            Self::None | Self::Redis => &[],
        }
    }

    /// The text that stands for a variable where it is not set.
    pub(super) fn default_of(self, variable: &Variable) -> &'static str {
        let own = self.defaults().iter().find(|(own, _)| own.name == variable.name);
        own.map_or(variable.default, |(_, text)| text)
    }
}
