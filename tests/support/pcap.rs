//! Reads files of captured packets, as strictly as any other reader may.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// A packet of TCP.
#[derive(Debug, Clone)]
pub struct Packet {
    /// Since the Unix epoch.
    pub at: Duration,
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub flags: u8,
    pub sequence: u32,
    pub acknowledged: u32,
    pub payload: Vec<u8>,
}

/// One connection of TCP, which is all that a file holds.
#[derive(Debug)]
pub struct Stream {
    pub client: SocketAddr,
    pub server: SocketAddr,
    pub packets: Vec<Packet>,
}

impl Stream {
    /// Reads a file. Each packet has to have right checksums, and the numbers of each direction no gap.
    pub fn read(file: &[u8]) -> Self {
        let (header, mut rest) = file.split_at(24);
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(20)), (0xa1b2_3c4d, 101), "nanoseconds, and packets of IP");
        assert_eq!(header[4..8], [2u16.to_ne_bytes(), 4u16.to_ne_bytes()].concat());
        let mut packets = Vec::new();
        while !rest.is_empty() {
            let words =
                rest[..16].chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
            let words: Vec<_> = words.collect();
            let [seconds, nanos, captured, len] = words[..] else { unreachable!() };
            assert!(captured == len && len <= word(16) && nanos < 1_000_000_000);
            let (packet, more) = rest[16..].split_at(captured as usize);
            packets.push(packet_of(Duration::new(seconds.into(), nanos), packet));
            rest = more;
        }
        let stream = Self { client: packets[0].from, server: packets[0].to, packets };
        stream.check();
        stream
    }

    fn check(&self) {
        let begin: Vec<_> = self.packets[..3].iter().map(|p| (p.from, p.flags)).collect();
        let (client, server) = (self.client, self.server);
        assert_eq!(begin, [(client, SYN), (server, SYN | ACK), (client, ACK)]);
        let (mut next, mut at) = ([0; 2], Duration::ZERO);
        for packet in &self.packets {
            let from = usize::from(packet.from == server);
            assert!(packet.at >= at, "times go on");
            at = packet.at;
            assert_eq!(packet.to, if from == 0 { server } else { client });
            assert_eq!(packet.sequence, next[from], "no gap");
            assert!(packet.flags & ACK == 0 || packet.acknowledged == next[1 - from]);
            let ends = packet.flags & (SYN | FIN) != 0;
            next[from] += packet.payload.len() as u32 + u32::from(ends);
        }
    }

    /// What one side has sent.
    pub fn sent_by(&self, from: SocketAddr) -> Vec<u8> {
        self.of(from).flat_map(|packet| packet.payload.clone()).collect()
    }

    /// The flags of a side's packets without payload, those behind the begin.
    pub fn ends_of(&self, from: SocketAddr) -> Vec<u8> {
        let empty = self.of(from).filter(|packet| packet.payload.is_empty());
        empty.map(|packet| packet.flags & !ACK).filter(|&flags| flags & !SYN != 0).collect()
    }

    fn of(&self, from: SocketAddr) -> impl Iterator<Item = &Packet> {
        self.packets.iter().filter(move |packet| packet.from == from)
    }
}

fn packet_of(at: Duration, packet: &[u8]) -> Packet {
    let (from, to, segment, pseudo);
    match packet[0] >> 4 {
        4 => {
            assert_eq!((packet[0] & 15, packet[9]), (5, 6), "no options, and TCP");
            assert_eq!(usize::from(u16::from_be_bytes([packet[2], packet[3]])), packet.len());
            assert_eq!(sum(&packet[..20]), 0xffff, "the checksum of IP");
            let ip = |at: usize| {
                IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).unwrap()))
            };
            (from, to, segment) = (ip(12), ip(16), &packet[20..]);
            let len = (segment.len() as u16).to_be_bytes();
            pseudo = [&packet[12..20], &[0, 6], &len].concat();
        }
        6 => {
            assert_eq!(packet[6], 6, "TCP");
            assert_eq!(usize::from(u16::from_be_bytes([packet[4], packet[5]])), packet.len() - 40);
            let ip = |at: usize| {
                IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).unwrap()))
            };
            (from, to, segment) = (ip(8), ip(24), &packet[40..]);
            let len = (segment.len() as u32).to_be_bytes();
            pseudo = [&packet[8..40], &len, &[0, 0, 0, 6]].concat();
        }
        version => panic!("version {version}"),
    }
    assert_eq!(sum(&[&pseudo, segment].concat()), 0xffff, "the checksum of TCP");
    let port = |at: usize| u16::from_be_bytes([segment[at], segment[at + 1]]);
    let number = |at: usize| u32::from_be_bytes(segment[at..at + 4].try_into().unwrap());
    Packet {
        at,
        from: (from, port(0)).into(),
        to: (to, port(2)).into(),
        flags: segment[13] & !8,
        sequence: number(4),
        acknowledged: number(8),
        payload: segment[usize::from(segment[12] >> 4) * 4..].to_vec(),
    }
}

/// The sum of words in ones' complement: 0xffff of what has the right checksum in it.
fn sum(bytes: &[u8]) -> u16 {
    bytes.chunks(2).fold(0, |sum: u16, pair| {
        let word = u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]);
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}
