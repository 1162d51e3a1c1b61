//! Addresses of clients, listeners and backends.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use socket2::{Domain, SockAddr};

/// What a Unix socket's path begins with where it is written.
pub const UNIX: &str = "unix:";
/// Bytes of a path, which the kernel keeps with a NUL behind it (`sun_path`).
pub const PATH_LEN_MAX: usize = 107;

/// Where something listens, or who is at the far end. A copy of it allocates nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// A TCP port.
    Tcp(SocketAddr),
    /// The path of a Unix socket: shared, since it is handed on with every connect.
    Unix(Arc<Path>),
}

/// A text is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither an IP address with a port nor a Unix socket.
    #[error("{0:?} is neither IP:PORT nor unix:/PATH")]
    Unknown(String),
    /// The path depends on where the process was started, or is empty.
    #[error("the path of {0:?} does not begin with /")]
    NotAbsolute(String),
    /// The kernel has no room for the path.
    #[error("the path of {0:?} is longer than {PATH_LEN_MAX} bytes")]
    TooLong(String),
}

impl Address {
    /// Of TCP, the address and port.
    pub fn tcp(&self) -> Option<SocketAddr> {
        match *self {
            Self::Tcp(address) => Some(address),
            Self::Unix(_) => None,
        }
    }

    /// Of TCP, the host's address.
    pub fn ip(&self) -> Option<IpAddr> {
        self.tcp().map(|address| address.ip())
    }

    /// Of a Unix socket, its path.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Tcp(_) => None,
            Self::Unix(path) => Some(path),
        }
    }

    pub(super) fn domain(&self) -> Domain {
        match self {
            Self::Tcp(address) => Domain::for_address(*address),
            Self::Unix(_) => Domain::UNIX,
        }
    }

    /// As the kernel wants it.
    ///
    /// # Errors
    /// The kernel has no room for the path.
    pub(in crate::io) fn to_kernel(&self) -> io::Result<SockAddr> {
        match self {
            Self::Tcp(address) => Ok((*address).into()),
            Self::Unix(path) => SockAddr::unix(path),
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let Some(path) = text.strip_prefix(UNIX) else {
            let unknown = |_| AddressError::Unknown(text.to_owned());
            return text.parse().map(Self::Tcp).map_err(unknown);
        };
        if !path.starts_with('/') {
            return Err(AddressError::NotAbsolute(text.to_owned()));
        }
        if path.len() > PATH_LEN_MAX {
            return Err(AddressError::TooLong(text.to_owned()));
        }
        Ok(Self::Unix(PathBuf::from(path).into()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_written_as_it_is_read() {
        for text in ["10.0.0.1:8081", "[::1]:8081", "unix:/run/aegis/app.sock"] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
            let json = serde_json::to_string(&address).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<Address>(&json).unwrap(), address);
        }
        let longest = format!("unix:/{}", "x".repeat(PATH_LEN_MAX - 1));
        assert!(longest.parse::<Address>().unwrap().to_kernel().is_ok());
    }

    #[test]
    fn what_is_no_address_is_refused_with_a_reason() {
        let longer = format!("unix:/{}", "x".repeat(PATH_LEN_MAX));
        for (text, reason) in [
            ("", "\"\" is neither IP:PORT nor unix:/PATH"),
            ("10.0.0.1", "\"10.0.0.1\" is neither IP:PORT nor unix:/PATH"),
            ("/run/app.sock", "\"/run/app.sock\" is neither IP:PORT nor unix:/PATH"),
            ("unix:", "the path of \"unix:\" does not begin with /"),
            ("unix:app.sock", "the path of \"unix:app.sock\" does not begin with /"),
            (&longer, &format!("the path of {longer:?} is longer than 107 bytes")),
        ] {
            assert_eq!(text.parse::<Address>().unwrap_err().to_string(), reason);
        }
    }
}
