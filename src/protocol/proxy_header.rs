//! The header of the PROXY protocol, versions 1 and 2, as its specification gives it ("The PROXY protocol", sections 2.1 and 2.2).

use std::io::Write;
use std::net::{IpAddr, SocketAddr};

/// The longest header in bytes: a version 1 line of two IPv6 addresses.
pub const HEADER_MAX: usize = 107;

const V2_SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// The addresses of a client's connection: its source, and where it connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// The client's.
    pub source: SocketAddr,
    /// The proxy's.
    pub destination: SocketAddr,
}

/// Writes the version 1 header for a client's connection, and says how long it is. One without
/// addresses, as over a Unix socket, is `UNKNOWN`.
pub fn write_v1(out: &mut [u8; HEADER_MAX], addresses: Option<Addresses>) -> usize {
    const UNKNOWN: &[u8] = b"PROXY UNKNOWN\r\n";
    let Some(addresses) = addresses else {
        out[..UNKNOWN.len()].copy_from_slice(UNKNOWN);
        return UNKNOWN.len();
    };
    let (source, destination) = same_family(addresses);
    let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
    let mut rest = &mut out[..];
    // The longest line fits, so the write cannot fail.
    let _ = write!(
        rest,
        "PROXY {family} {} {} {} {}\r\n",
        source.ip(),
        destination.ip(),
        source.port(),
        destination.port()
    );
    let left = rest.len();
    HEADER_MAX - left
}

/// Writes the version 2 header, likewise. A connection without addresses is `LOCAL`, which every
/// receiver has to accept; not all of them accept the family of Unix sockets, or none.
pub fn write_v2(out: &mut [u8; HEADER_MAX], addresses: Option<Addresses>) -> usize {
    const VERSION_2_LOCAL: u8 = 0x20;
    const VERSION_2_PROXY: u8 = 0x21;
    const UNSPECIFIED: u8 = 0x00;
    const TCP_OVER_IPV4: u8 = 0x11;
    const TCP_OVER_IPV6: u8 = 0x21;
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        out[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&V2_SIGNATURE);
    let Some(addresses) = addresses else {
        put(&[VERSION_2_LOCAL, UNSPECIFIED, 0, 0]);
        return at;
    };
    let (source, destination) = same_family(addresses);
    let (family, size) =
        if source.is_ipv4() { (TCP_OVER_IPV4, 4_u16) } else { (TCP_OVER_IPV6, 16) };
    let length = 2 * size + 4;
    put(&[VERSION_2_PROXY, family]);
    put(&length.to_be_bytes());
    for address in [source.ip(), destination.ip()] {
        match address {
            IpAddr::V4(ip) => put(&ip.octets()),
            IpAddr::V6(ip) => put(&ip.octets()),
        }
    }
    put(&source.port().to_be_bytes());
    put(&destination.port().to_be_bytes());
    at
}

/// Both as IPv4 if both are (an IPv4 client of a dual-stack listener counts), else as IPv6.
fn same_family(addresses: Addresses) -> (SocketAddr, SocketAddr) {
    let Addresses { source: a, destination: b } = addresses;
    let canonical =
        |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let (a, b) = (canonical(a), canonical(b));
    if a.is_ipv4() == b.is_ipv4() {
        return (a, b);
    }
    let mapped = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    (mapped(a), mapped(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(source: &str, destination: &str) -> Addresses {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        Addresses { source, destination }
    }

    fn v1(source: &str, destination: &str) -> String {
        let mut out = [0; HEADER_MAX];
        let len = write_v1(&mut out, Some(addresses(source, destination)));
        String::from_utf8(out[..len].to_vec()).unwrap()
    }

    #[test]
    fn version_1_is_a_line() {
        assert_eq!(
            v1("192.168.0.1:56324", "192.168.0.11:443"),
            "PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"
        );
        assert_eq!(v1("[::1]:1", "[2001:db8::2]:2"), "PROXY TCP6 ::1 2001:db8::2 1 2\r\n");
        assert_eq!(v1("[::ffff:10.0.0.1]:1", "10.0.0.2:2"), "PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n");
    }

    #[test]
    fn the_longest_line_fits() {
        let longest = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535";
        assert!(v1(longest, longest).ends_with(" 65535 65535\r\n"));
    }

    #[test]
    fn version_2_is_binary() {
        let mut out = [0; HEADER_MAX];
        let len = write_v2(&mut out, Some(addresses("1.2.3.4:258", "5.6.7.8:772")));
        assert_eq!(
            out[..len],
            [
                b"\r\n\r\n\0\r\nQUIT\n".as_slice(),
                &[0x21, 0x11, 0, 12, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]
            ]
            .concat()
        );
        let len = write_v2(&mut out, Some(addresses("[::1]:1", "[::2]:2")));
        assert_eq!((len, out[13], &out[14..16]), (52, 0x21, &[0, 36][..]));
    }

    #[test]
    fn a_connection_without_addresses_is_unknown_or_local() {
        let mut out = [0; HEADER_MAX];
        let len = write_v1(&mut out, None);
        assert_eq!(&out[..len], b"PROXY UNKNOWN\r\n");
        let len = write_v2(&mut out, None);
        assert_eq!(&out[..len], b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
    }
}
