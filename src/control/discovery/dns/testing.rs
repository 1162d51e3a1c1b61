//! What the tests of this module have in common.

use std::time::Duration;

use super::resolver::Answer;
use crate::config::{Backend, HostPort};

/// The port 5432 of a host.
pub(super) fn backend(host: &str) -> Backend {
    Backend::Tcp(HostPort { host: host.to_owned(), port: 5432 })
}

pub(super) fn found(ips: &[&str], ttl: Option<u64>) -> Answer {
    let addresses = ips.iter().map(|ip| ip.parse().unwrap()).collect();
    Answer::Found { addresses, ttl: ttl.map(Duration::from_secs) }
}
