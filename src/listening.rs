//! Which addresses lead back to this process: a backend that is the proxy itself would be given
//! each of its own connections as a client, until no session is left for any other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use crate::io::net::Address;

/// The addresses that this process listens on.
#[derive(Debug, Clone, Default)]
pub struct Listening(Vec<Address>);

impl Listening {
    /// With the ports that were bound, not those that were asked for. One that is any address
    /// (`0.0.0.0`, `[::]`) stands for those of its own family.
    pub fn new(addresses: impl IntoIterator<Item = Address>) -> Self {
        Self(addresses.into_iter().collect())
    }

    /// The paths of Unix sockets among them.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().filter_map(Address::path)
    }

    /// Which of them a connection to `address` would arrive at, if any. `is_local` tells whether an
    /// address that is not of the loopback interface is one of this host's; it is asked only where
    /// that decides. A Unix socket is known by its path alone here.
    pub fn reached_by(
        &self,
        address: &Address,
        is_local: impl FnOnce(IpAddr) -> bool,
    ) -> Option<&Address> {
        match address {
            Address::Tcp(address) => self.reached_by_tcp(*address, is_local),
            Address::Unix(_) => self.0.iter().find(|&own| own == address),
        }
    }

    fn reached_by_tcp(
        &self,
        address: SocketAddr,
        is_local: impl FnOnce(IpAddr) -> bool,
    ) -> Option<&Address> {
        // What a connect makes of an address of no host in particular.
        let ip = match address.ip().to_canonical() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        let tcp = self.0.iter().filter_map(|own| Some((own, own.tcp()?)));
        let at_port = tcp.filter(|(_, tcp)| tcp.port() == address.port());
        let is_any = |own: SocketAddr| own.ip().is_unspecified() && own.is_ipv4() == ip.is_ipv4();
        let exact = at_port.clone().find(|(_, tcp)| tcp.ip() == ip);
        let found = exact.or_else(|| {
            let any = at_port.clone().find(|&(_, tcp)| is_any(tcp));
            any.filter(|_| ip.is_loopback() || is_local(ip))
        });
        found.map(|(own, _)| own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_leads_back_where_a_connection_to_it_would_arrive() {
        let reached = |own: &[&str], address: &str| {
            let listening = Listening::new(own.iter().map(|own| own.parse().unwrap()));
            let own_ips = ["10.0.0.5", "fd00::5"].map(|ip| ip.parse::<IpAddr>().unwrap());
            let found = listening
                .reached_by(&address.parse().unwrap(), |ip| own_ips.contains(&ip))
                .map(ToString::to_string);
            found.unwrap_or_default()
        };
        let [four, six, any, any_six] = ["127.0.0.1:1", "[::1]:1", "0.0.0.0:1", "[::]:1"];
        let both = [four, six];
        for address in ["127.0.0.1:1", "0.0.0.0:1", "[::ffff:127.0.0.1]:1", "[::ffff:0.0.0.0]:1"] {
            assert_eq!(reached(&both, address), four, "{address}");
            assert_eq!(reached(&[any], address), any, "{address}");
            assert_eq!(reached(&[six, any_six], address), "", "{address}");
        }
        for address in ["[::1]:1", "[::]:1"] {
            assert_eq!(reached(&both, address), six, "{address}");
            assert_eq!(reached(&[any_six], address), any_six, "{address}");
            assert_eq!(reached(&[four, any], address), "", "{address}");
        }
        for address in ["127.0.0.2:1", "10.0.0.5:1", "[::ffff:10.0.0.5]:1"] {
            assert_eq!(reached(&both, address), "", "{address}: somebody else may listen there");
            assert_eq!(reached(&[any], address), any, "{address}");
        }
        assert_eq!(reached(&[any_six], "[fd00::5]:1"), any_six);
        assert_eq!(reached(&["10.0.0.5:1"], "10.0.0.5:1"), "10.0.0.5:1");
        assert_eq!(reached(&[any, "unix:/run/a.sock"], "unix:/run/a.sock"), "unix:/run/a.sock");
        assert_eq!(reached(&[any, "unix:/run/a.sock"], "unix:/run/b.sock"), "");
        for address in ["10.0.0.6:1", "[fd00::6]:1", "10.0.0.5:2", "127.0.0.1:2", "[::]:2"] {
            assert_eq!(reached(&[four, six, any, any_six], address), "", "{address}");
        }
    }
}
