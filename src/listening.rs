//! Which addresses lead back to this process: a backend that is the proxy itself would be given
//! each of its own connections as a client, until no session is left for any other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The addresses that this process listens on.
#[derive(Debug, Clone, Default)]
pub struct Listening(Vec<SocketAddr>);

impl Listening {
    /// With the ports that were bound, not those that were asked for. One that is any address
    /// (`0.0.0.0`, `[::]`) stands for those of its own family.
    pub fn new(addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self(addresses.into_iter().collect())
    }

    /// Which of them a connection to `address` would arrive at, if any. `is_local` tells whether an
    /// address that is not of the loopback interface is one of this host's; it is asked only where
    /// that decides.
    pub fn reached_by(
        &self,
        address: SocketAddr,
        is_local: impl FnOnce(IpAddr) -> bool,
    ) -> Option<SocketAddr> {
        // What a connect makes of an address of no host in particular.
        let ip = match address.ip().to_canonical() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        let at_port = || self.0.iter().copied().filter(|own| own.port() == address.port());
        let any = |own: &SocketAddr| own.ip().is_unspecified() && own.is_ipv4() == ip.is_ipv4();
        at_port()
            .find(|own| own.ip() == ip)
            .or_else(|| at_port().find(any).filter(|_| ip.is_loopback() || is_local(ip)))
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
                .reached_by(address.parse().unwrap(), |ip| own_ips.contains(&ip))
                .map(|own| own.to_string());
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
        for address in ["10.0.0.6:1", "[fd00::6]:1", "10.0.0.5:2", "127.0.0.1:2", "[::]:2"] {
            assert_eq!(reached(&[four, six, any, any_six], address), "", "{address}");
        }
    }
}
