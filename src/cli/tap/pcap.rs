//! The file: packets as they would have been on a network, each with its time to the nanosecond.
//!
//! The headers are made up, with the addresses and ports that the connection had and with numbers that
//! fit the bytes: so tools show one stream. A Unix socket has no addresses; its file says 192.0.2.1 for the
//! client and 192.0.2.2 for the proxy, which no network has (RFC 5737).

use std::io::{self, BufWriter, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::capture::{FILE_HEADER, Record, What, records};
use crate::control::socket::Tapped;

/// The file begins with it: its numbers are in this order, and its times have nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;
/// Packets begin with the header of IP, whose version that says.
const LINK_TYPE_RAW: u32 = 101;
/// No packet is longer.
const PACKET_MAX: u32 = 65_535;

const TCP: u8 = 6;
const TCP_HEADER: usize = 20;
const TTL: u8 = 64;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;

const CLIENT: usize = 0;
const PROXY: usize = 1;

const UNKNOWN: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 1),
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)), 2),
];

/// Writes the file of what was captured, packet by packet: all of it once more in memory would be taken
/// from the container that the proxy runs in.
///
/// # Errors
/// Not all of it could be written.
pub(super) fn write(file: impl Write, tapped: &Tapped, captured: &[u8]) -> io::Result<()> {
    let mut file = BufWriter::new(file);
    let header = [MAGIC, 4 << 16 | 2, 0, 0, PACKET_MAX, LINK_TYPE_RAW].map(u32::to_ne_bytes);
    debug_assert_eq!(header.as_flattened().len(), FILE_HEADER, "the bound counts with it");
    file.write_all(header.as_flattened())?;
    let addresses = [tapped.client.unwrap_or(UNKNOWN[0]), tapped.local.unwrap_or(UNKNOWN[1])];
    let since = Duration::from_nanos(tapped.since_ns);
    let mut stream = Stream { file, addresses, since, next: [0; 2] };
    stream.packet(Duration::ZERO, CLIENT, SYN, &[])?;
    stream.packet(Duration::ZERO, PROXY, SYN | ACK, &[])?;
    stream.packet(Duration::ZERO, CLIENT, ACK, &[])?;
    for Record { at, what, payload } in records(captured) {
        let (from, flags) = match what {
            What::Received => (CLIENT, PSH | ACK),
            What::Sent => (PROXY, PSH | ACK),
            What::ClientEnded => (CLIENT, FIN | ACK),
            What::ProxyEnded => (PROXY, FIN | ACK),
            What::ClientReset => (CLIENT, RST | ACK),
            What::ProxyReset => (PROXY, RST | ACK),
        };
        stream.packet(at, from, flags, payload)?;
    }
    stream.file.flush()
}

/// A file with what was on its way so far.
struct Stream<W: Write> {
    file: BufWriter<W>,
    /// The client's and the proxy's.
    addresses: [SocketAddr; 2],
    /// What times are counted from, since the Unix epoch.
    since: Duration,
    /// The number of the next byte of each.
    next: [u32; 2],
}

impl<W: Write> Stream<W> {
    fn packet(&mut self, at: Duration, from: usize, flags: u8, payload: &[u8]) -> io::Result<()> {
        let [source, target] = [from, 1 - from].map(|side| self.addresses[side]);
        let mut segment = Vec::with_capacity(TCP_HEADER + payload.len());
        segment.extend(source.port().to_be_bytes());
        segment.extend(target.port().to_be_bytes());
        segment.extend(self.next[from].to_be_bytes());
        let acknowledged = if flags & ACK == 0 { 0 } else { self.next[1 - from] };
        segment.extend(acknowledged.to_be_bytes());
        // Its length in words, and a window that is never full.
        segment.extend([(TCP_HEADER / 4) as u8 * 16, flags, 0xff, 0xff]);
        // The checksum, and no urgent byte.
        segment.extend([0; 4]);
        segment.extend_from_slice(payload);
        let header = ip_header(source.ip(), target.ip(), &mut segment);
        let time = self.since + at;
        let len = (header.len() + segment.len()) as u32;
        let about = [time.as_secs() as u32, time.subsec_nanos(), len, len].map(u32::to_ne_bytes);
        for part in [about.as_flattened(), &header, &segment] {
            self.file.write_all(part)?;
        }
        let numbered = payload.len() as u32 + u32::from(flags & (SYN | FIN) != 0);
        self.next[from] = self.next[from].wrapping_add(numbered);
        Ok(())
    }
}

/// The header in front of a segment, which gets its checksum.
fn ip_header(source: IpAddr, target: IpAddr, segment: &mut [u8]) -> Vec<u8> {
    let len = segment.len() as u16;
    let mut header;
    let pseudo;
    match (source.to_canonical(), target.to_canonical()) {
        (IpAddr::V4(source), IpAddr::V4(target)) => {
            let addresses = [source.octets(), target.octets()].concat();
            header = vec![0x45, 0];
            header.extend((20 + len).to_be_bytes());
            // In one piece, with a checksum to come.
            header.extend([0, 0, 0x40, 0, TTL, TCP, 0, 0]);
            header.extend_from_slice(&addresses);
            let sum = checksum(&[&header]);
            header[10..12].copy_from_slice(&sum);
            pseudo = [addresses, vec![0, TCP], len.to_be_bytes().to_vec()].concat();
        }
        (source, target) => {
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            let addresses = [octets(source), octets(target)].concat();
            header = vec![0x60, 0, 0, 0];
            header.extend(len.to_be_bytes());
            header.extend([TCP, TTL]);
            header.extend_from_slice(&addresses);
            let rest = [0, 0, 0, TCP];
            pseudo = [addresses, u32::from(len).to_be_bytes().to_vec(), rest.to_vec()].concat();
        }
    }
    let sum = checksum(&[&pseudo, segment]);
    segment[16..18].copy_from_slice(&sum);
    header
}

/// The checksum of IP and TCP (RFC 1071) of what lies in these places, all but the last of which are even.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    let mut sum = words.map(word).sum::<u64>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
