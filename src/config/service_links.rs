//! The variables that the kubelet sets for Services.
//!
//! For each Service of its namespace a pod has a family of variables, whose names begin with the
//! Service's. A Service named `aegis` or `aegis-…` brings names that begin like ours, and one named
//! `aegis-kube` even `AEGIS_KUBE_PORT`, with an address for its value. A family is known by what
//! only the kubelet makes: a host, and for each port a URL of that host. So a variable that just
//! looks like one of them, as `AEGIS_KUBE_SERVICE_PORT` that somebody has written, stays a mistake.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];

/// The names among `vars` that are of a Service.
pub(super) fn names(vars: &BTreeMap<String, String>) -> BTreeSet<String> {
    let hosts = vars.iter().filter_map(|(name, host)| {
        let service = name.strip_suffix("_SERVICE_HOST")?;
        host.parse::<IpAddr>().ok().map(|_| Service { name: service, host })
    });
    hosts.flat_map(|service| service.names(vars)).collect()
}

/// A Service's name, as it stands in those of variables, and its address.
struct Service<'a> {
    name: &'a str,
    host: &'a str,
}

impl Service<'_> {
    fn names(&self, vars: &BTreeMap<String, String>) -> Vec<String> {
        let name = self.name;
        let ports: Vec<_> = vars.iter().filter_map(|(name, url)| self.port(name, url)).collect();
        if ports.is_empty() {
            return Vec::new();
        }
        let is_port = |value: &str| ports.iter().any(|(number, ..)| value == *number);
        let mut names = vec![format!("{name}_SERVICE_HOST")];
        names.extend(vars.iter().filter_map(|(name, value)| {
            let rest = name.strip_prefix(self.name)?;
            let is_its = match rest {
                "_SERVICE_PORT" => is_port(value),
                "_PORT" => ports.iter().any(|(.., url)| value == url),
                _ => rest.starts_with("_SERVICE_PORT_") && is_port(value),
            };
            is_its.then(|| name.clone())
        }));
        for (number, protocol, _) in &ports {
            let port = format!("{name}_PORT_{number}_{protocol}");
            names.extend(["_PROTO", "_PORT", "_ADDR"].map(|part| format!("{port}{part}")));
            names.push(port);
        }
        names
    }

    /// The port's number, its protocol and its URL, where the variable tells of one.
    fn port<'v>(&self, name: &'v str, url: &'v str) -> Option<(&'v str, &'v str, &'v str)> {
        let rest = name.strip_prefix(self.name)?.strip_prefix("_PORT_")?;
        let (number, protocol) = rest.split_once('_')?;
        number.parse::<u16>().ok()?;
        let host = self.host;
        let address = if host.contains(':') {
            format!("[{host}]:{number}")
        } else {
            format!("{host}:{number}")
        };
        let is_url = url == format!("{}://{address}", protocol.to_ascii_lowercase());
        (PROTOCOLS.contains(&protocol) && is_url).then_some((number, protocol, url))
    }
}
