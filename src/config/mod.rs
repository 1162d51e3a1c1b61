//! Configuration: environment → [`RawConfig`] (text as found) → [`Config`] (parsed, checked, with
//! units).

mod error;
mod files;
mod kind;
mod preset;
mod read;
mod routes;
mod service_links;
mod unix;
mod value;
mod variable;
mod variables;
mod warnings;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};

pub use error::{ConfigErrors, Problem};
pub(crate) use files::in_making;
pub use preset::Preset;
pub use routes::RouteName;
pub use unix::{SocketMode, SocketOwner};
pub use value::ENDS_TARGET;
pub use variable::{PREFIX, VARIABLES, Variable};
pub use variables::{Config, KubeConfig, PoolConfig, RequestConfig, Resources, RouteConfig};

use crate::io::net::Address;
use crate::limits;
pub use crate::protocol::ProtocolName as Protocol;
use crate::proxy::endpoints::Tier;
use variable::Section;

impl Config {
    /// What is in force: every variable in the order of [`VARIABLES`], with a text that would set
    /// it to the value that it has. Where routes differ it is there once for each, as its own.
    pub fn effective(&self) -> Vec<(String, String)> {
        let mut texts = Vec::new();
        self.print(&mut texts);
        texts
    }

    /// What the log calls the route at this place: nothing where there is nothing to tell apart.
    pub fn name_in_log(&self, route: usize) -> Option<&RouteName> {
        (self.routes.len() > 1).then(|| &self.routes[route].name)
    }

    /// Which variable to set for the route at this place.
    pub fn name_to_set(&self, variable: &str, route: usize) -> String {
        self.name_in_log(route).map_or_else(|| variable.to_owned(), |route| route.own(variable))
    }
}

/// Where the admin port is unless `AEGIS_ADMIN` says otherwise.
pub const ADMIN_DEFAULT: &str = variables::AEGIS_ADMIN.default;

/// Reads an address as `AEGIS_ADMIN` has it, for those who ask a proxy and do not run one.
///
/// # Errors
/// It is none; the message says why.
pub fn admin_address(text: &str) -> Result<SocketAddr, String> {
    value::socket_address(text.trim())
}

/// Reads where the control socket is, as `AEGIS_CONTROL` says it. None where it is `off`.
///
/// # Errors
/// It is neither; the message says why.
pub fn control_address(text: &str) -> Result<Option<Address>, String> {
    match text.trim() {
        "off" => Ok(None),
        text => value::control_address(text).map(Some),
    }
}

/// Reads a log filter as `AEGIS_LOG` takes it, and returns it without the spaces in it.
///
/// # Errors
/// It is none; the message says why, and what is accepted.
pub fn log_filter(text: &str) -> Result<String, String> {
    let accepts = || variables::AEGIS_LOG.accepts();
    value::log_filter(text).map_err(|why| format!("{why}. Accepted: {}", accepts()))
}

impl RouteConfig {
    /// The variables that are as `AEGIS_PRESET` suggests, with their values.
    pub fn by_preset(&self) -> Vec<(&'static str, &'static str)> {
        let mut texts = Vec::new();
        self.print(&mut texts);
        let suggested =
            self.preset.defaults().iter().map(|&(variable, text)| (variable.name, text));
        suggested
            .filter(|&(name, text)| texts.contains(&(name.to_owned(), text.to_owned())))
            .collect()
    }

    /// The backends and those that stand in for them, each with its tier.
    pub fn all_backends(&self) -> impl Iterator<Item = (&Backend, Tier)> {
        let first = self.backends.iter().map(|backend| (backend, Tier::FIRST));
        first.chain(self.backups.iter().flatten().map(|backup| (backup, Tier::at(1))))
    }

    /// Whether endpoints are checked by a request.
    pub fn checks_by_request(&self) -> bool {
        self.check_interval.is_some() && self.check == Check::Request
    }

    /// Whether some endpoints stand in for others.
    pub fn has_tiers(&self) -> bool {
        match self.discovery {
            Discovery::Static | Discovery::Dns => self.backups.is_some(),
            Discovery::Kubernetes => self.locality == Locality::Failover,
        }
    }

    /// How many addresses the backends may come to stand for, for what is reserved for them.
    pub fn addresses(&self) -> usize {
        let names = self.names();
        self.all_backends().count() - names + names * limits::ADDRESSES_PER_NAME
    }

    /// Connections that the pools of all workers together may come to hold; those being made count as
    /// idle.
    pub fn pool_conns(&self) -> usize {
        // Nobody knows how many endpoints a Service will have: as many as there can be.
        let endpoints = match self.discovery {
            Discovery::Kubernetes => limits::ENDPOINTS_MAX,
            Discovery::Static | Discovery::Dns => {
                limits::ENDPOINTS_MAX.min(self.addresses() * limits::POOL_ENDPOINTS_PER_BACKEND)
            }
        };
        self.pool.most() * endpoints
    }

    /// How many of the backends are names.
    pub fn names(&self) -> usize {
        self.all_backends().filter(|(backend, _)| backend.is_name()).count()
    }
}

/// Where endpoints come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discovery {
    /// The backends, which are all addresses.
    Static,
    /// The backends, names among them resolved again and again.
    Dns,
    /// The Kubernetes API.
    Kubernetes,
}

/// How an endpoint is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// It has to take a connection.
    Connect,
    /// It has to answer the protocol's liveness request.
    Request,
}

/// Which endpoints are preferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locality {
    /// None.
    Off,
    /// Those of the same zone.
    Zone,
    /// Those of the same node.
    Node,
    /// Those of the same zone, and others only while none of these is usable: then those of the same
    /// region, then all.
    Failover,
}

impl Locality {
    /// Whether near endpoints are preferred, without a strict order.
    pub fn prefers_near(self) -> bool {
        matches!(self, Self::Zone | Self::Node)
    }
}

/// A Service's name, and its namespace if it was given with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceName {
    /// The Service's name.
    pub name: String,
    /// Its namespace.
    pub namespace: Option<String>,
}

/// A port by its name or number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KubePort {
    /// Its name in the slices, or in the containers.
    Name(String),
    /// Its number at the endpoints.
    Number(u16),
}

/// Where connections go.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Backend {
    /// A port of a host, which is resolved where it is a name.
    Tcp(HostPort),
    /// A Unix socket.
    Unix(Address),
}

impl Backend {
    /// Whether it has to be resolved.
    pub fn is_name(&self) -> bool {
        self.address().is_none()
    }

    /// Where it is, unless that is to be resolved.
    pub fn address(&self) -> Option<Address> {
        match self {
            Self::Tcp(host) => {
                let ip = host.host.parse::<IpAddr>().ok()?;
                Some(SocketAddr::new(ip, host.port).into())
            }
            Self::Unix(address) => Some(address.clone()),
        }
    }
}

/// A host (name or IP address) and a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// A DNS name or an IP address (IPv6 without brackets).
    pub host: String,
    /// The TCP port, never 0.
    pub port: u16,
}

/// For how long a client has a backend connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolMode {
    /// A new one for its whole session: right for any protocol.
    Preconnect,
    /// From its first request until it leaves.
    Session,
    /// For one request at a time.
    Request,
}

impl PoolConfig {
    /// All connections to an endpoint at most, if that is bounded.
    pub fn conns_max(&self) -> Option<usize> {
        match self.mode {
            PoolMode::Preconnect | PoolMode::Session => self.endpoint_max,
            PoolMode::Request => Some(self.endpoint_max.unwrap_or(self.size).min(self.size)),
        }
    }

    /// Idle connections to an endpoint at most.
    pub fn most(&self) -> usize {
        match self.mode {
            PoolMode::Preconnect => self.max_idle,
            PoolMode::Session => self.max_idle.max(1),
            PoolMode::Request => self.size,
        }
    }
}

/// A switch that the program may decide by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// The program decides.
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// Which driver does the I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoChoice {
    /// `io_uring` where it works, else epoll.
    Auto,
    /// `io_uring`, or a failure to start.
    Uring,
    /// epoll.
    Epoll,
}

/// How the endpoint of a new session, or of a request, is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    /// The endpoint with the fewest sessions of this worker; ties take turns.
    LeastConn,
    /// Each in turn.
    RoundRobin,
    /// The better of two drawn at random (Mitzenmacher, "The power of two choices").
    RandomTwo,
    /// The one that has answered fastest lately, and has little to answer (peak EWMA, as in Finagle).
    PeakEwma,
    /// By the client's address, stable while the endpoints are (rendezvous hashing).
    SourceHash,
    /// The one that holds the request's key (rendezvous hashing); where there is none as by
    /// [`Self::LeastConn`].
    KeyHash,
}

/// The PROXY protocol header sent to backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// None.
    Off,
    /// Version 1, one text line.
    V1,
    /// Version 2, binary.
    V2,
}

/// Which ends of sessions and requests are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndsLogged {
    /// None.
    Off,
    /// Those that are not normal.
    Abnormal,
    /// Those, and one of a hundred of the others.
    Sampled,
    /// All.
    All,
}

/// The log's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}
