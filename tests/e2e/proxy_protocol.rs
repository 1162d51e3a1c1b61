//! The PROXY protocol's header: once, first, and true.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::support::backend::Backend;
use crate::support::client::{prepare, read_line, read_to_end};
use crate::support::metrics::POOL_CONNECTIONS;
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, on_both_drivers, pattern};

on_both_drivers![
    version_1_comes_once_and_first,
    version_2_comes_once_and_first,
    version_1_comes_on_warm_connections_too,
    version_2_comes_on_warm_connections_too,
    a_server_that_speaks_first_gets_the_header_before_the_client_says_anything,
];

const SIGNATURE_V2: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Source and destination, as a header names them.
type Addresses = (SocketAddr, SocketAddr);
type ReadHeader = fn(&TcpStream) -> io::Result<Addresses>;

/// What one connection brought: the header's addresses and all bytes after it.
struct Arrived {
    addresses: Addresses,
    bytes: Vec<u8>,
}

fn version_1_comes_once_and_first(io: Io) {
    expect_headers(&start(io, "v1", 0, read_v1));
}

fn version_2_comes_once_and_first(io: Io) {
    expect_headers(&start(io, "v2", 0, read_v2));
}

fn version_1_comes_on_warm_connections_too(io: Io) {
    expect_headers(&start(io, "v1", 3, read_v1));
}

fn version_2_comes_on_warm_connections_too(io: Io) {
    expect_headers(&start(io, "v2", 3, read_v2));
}

struct Setup {
    _backend: Backend,
    proxy: Proxy,
    arrived: Receiver<io::Result<Arrived>>,
}

fn start(io: Io, version: &str, warm: u64, read_header: ReadHeader) -> Setup {
    let (report, arrived) = mpsc::channel();
    let backend = Backend::scripted(move |stream| collect(stream, read_header, &report));
    let proxy = Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_PROXY_PROTOCOL", version)
        .pool(warm, warm)
        .start();
    if warm > 0 {
        let full = 2 * warm;
        proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle == full);
    }
    Setup { _backend: backend, proxy, arrived }
}

fn collect(mut stream: &TcpStream, read_header: ReadHeader, report: &Sender<io::Result<Arrived>>) {
    let outcome = read_header(stream).and_then(|addresses| {
        let bytes = read_to_end(stream)?;
        stream.write_all(b"thanks\n")?;
        Ok(Arrived { addresses, bytes })
    });
    let _ = report.send(outcome);
}

fn expect_headers(Setup { proxy, arrived, .. }: &Setup) {
    for number in 0..10 {
        let message = pattern(number, 100_000 * number);
        let mut client = connect_from(Ipv4Addr::new(127, 0, 0, 3), proxy.address());
        client.write_all(message).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(read_line(&client).unwrap(), "thanks");
        let arrived = arrived.recv_timeout(PATIENCE).unwrap().unwrap();
        assert_eq!(arrived.addresses, (client.local_addr().unwrap(), proxy.address()));
        assert!(arrived.bytes == message, "session {number}");
    }
}

fn a_server_that_speaks_first_gets_the_header_before_the_client_says_anything(io: Io) {
    let backend = Backend::scripted(|mut stream| {
        if let Ok((source, _)) = read_v1(stream) {
            let _ = stream.write_all(format!("{source}\n").as_bytes());
        }
    });
    let proxy =
        Builder::on(io).backends(&[backend.address()]).set("AEGIS_PROXY_PROTOCOL", "v1").start();
    for _ in 0..10 {
        let client = connect_from(Ipv4Addr::new(127, 0, 0, 3), proxy.address());
        assert_eq!(read_line(&client).unwrap(), client.local_addr().unwrap().to_string());
    }
}

/// Connects from an address that the proxy itself never uses.
fn connect_from(source: Ipv4Addr, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SockAddr::from(SocketAddrV4::new(source, 0))).unwrap();
    socket.connect(&SockAddr::from(to)).unwrap();
    let stream = TcpStream::from(socket);
    prepare(&stream).unwrap();
    stream
}

/// `PROXY TCP4 source destination source-port destination-port\r\n`
fn read_v1(stream: &TcpStream) -> io::Result<Addresses> {
    let line = read_line(stream)?;
    let wrong = || io::Error::other(format!("not a header of version 1: {line:?}"));
    let rest = line.strip_suffix('\r').and_then(|line| line.strip_prefix("PROXY TCP4 "));
    let words: Vec<&str> = rest.ok_or_else(wrong)?.split(' ').collect();
    let [source, destination, source_port, destination_port] = words[..] else {
        return Err(wrong());
    };
    let address = |ip: &str, port: &str| -> io::Result<SocketAddr> {
        Ok((ip.parse::<Ipv4Addr>().map_err(|_| wrong())?, port.parse().map_err(|_| wrong())?)
            .into())
    };
    Ok((address(source, source_port)?, address(destination, destination_port)?))
}

/// Signature, version and command, family and protocol, length, addresses, ports.
fn read_v2(mut stream: &TcpStream) -> io::Result<Addresses> {
    let mut header = [0; 28];
    stream.read_exact(&mut header)?;
    let (fixed, addresses) = header.split_at(16);
    let expected = [&SIGNATURE_V2[..], &[0x21, 0x11, 0, 12]].concat();
    if fixed != expected {
        return Err(io::Error::other(format!("not a header of version 2: {header:?}")));
    }
    let address = |ip: usize, port: usize| {
        let ip = <[u8; 4]>::try_from(&addresses[ip..ip + 4]).unwrap();
        let port = u16::from_be_bytes([addresses[port], addresses[port + 1]]);
        SocketAddr::from((ip, port))
    };
    Ok((address(0, 8), address(4, 10)))
}
