//! Listening sockets: one per worker and address, all bound before anything is announced.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use crate::config::Config;
use crate::io::net::Options;
use crate::limits::LISTEN_BACKLOG;
use crate::proxy::RouteId;
use crate::worker::socket_options;

/// A port that is in use is tried again for so long: far longer than a kernel takes to close what a
/// process that was killed has left, and short for a user who waits for the error.
const IN_USE_MAX: Duration = Duration::from_secs(1);
/// The pause before each other try.
const IN_USE_PAUSE: Duration = Duration::from_millis(10);

/// A listening socket could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else has the port.
    #[error("AEGIS_LISTEN: {0} is in use by another program; stop it or choose another port")]
    InUse(SocketAddr),
    /// Every address is of a family that the host lacks.
    #[error("AEGIS_LISTEN: the host has none of the address families of {0:?}")]
    NoFamily(Vec<SocketAddr>),
    /// Anything else.
    #[error("AEGIS_LISTEN: cannot listen on {0}: {1}")]
    Other(SocketAddr, #[source] io::Error),
}

impl ListenError {
    /// What kind of failure it is.
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::InUse(_) => io::ErrorKind::AddrInUse,
            Self::NoFamily(_) => io::ErrorKind::Unsupported,
            Self::Other(_, error) => error.kind(),
        }
    }
}

/// The listening sockets of all workers.
#[derive(Debug)]
pub struct Listeners {
    /// The addresses, with the real port where 0 was asked for.
    pub addresses: Vec<SocketAddr>,
    /// Their routes.
    pub routes: Box<[RouteId]>,
    /// One set a worker.
    pub sets: Vec<Vec<OwnedFd>>,
}

/// Binds the addresses of all routes, each as [`listen`] does.
///
/// # Errors
/// The first address that cannot be had.
pub fn listen_by_route(config: &Config, workers: usize) -> Result<Listeners, ListenError> {
    let mut all = Listeners {
        addresses: Vec::new(),
        routes: Box::default(),
        sets: (0..workers).map(|_| Vec::new()).collect(),
    };
    let mut routes = Vec::new();
    for (number, route) in config.routes.iter().enumerate() {
        let own = listen(&route.listen, workers, &socket_options(route))?;
        routes.resize(routes.len() + own.addresses.len(), RouteId::at(number));
        all.addresses.extend(own.addresses);
        for (set, sockets) in all.sets.iter_mut().zip(own.sets) {
            set.extend(sockets);
        }
    }
    all.routes = routes.into();
    Ok(all)
}

/// Binds every address of one route once a worker, with `SO_REUSEPORT`, and listens. An address whose family
/// the host lacks is skipped with a log line, unless no other is left.
///
/// # Errors
/// The first address that cannot be had.
pub fn listen(
    addresses: &[SocketAddr],
    workers: usize,
    options: &Options,
) -> Result<Listeners, ListenError> {
    let mut listeners = Listeners {
        addresses: Vec::new(),
        routes: Box::default(),
        sets: (0..workers).map(|_| Vec::new()).collect(),
    };
    for &address in addresses {
        match bind_patiently(address, workers, options) {
            Ok((bound, sockets)) => {
                listeners.addresses.push(bound);
                for (set, socket) in listeners.sets.iter_mut().zip(sockets) {
                    set.push(socket.into());
                }
            }
            Err(error) if lacks_family(address, &error) => {
                tracing::warn!(%address, %error, "not listening: the host lacks the address family");
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                return Err(ListenError::InUse(address));
            }
            Err(error) => return Err(ListenError::Other(address, error)),
        }
    }
    if listeners.addresses.is_empty() {
        return Err(ListenError::NoFamily(addresses.to_vec()));
    }
    listeners.routes = vec![RouteId::default(); listeners.addresses.len()].into();
    Ok(listeners)
}

/// As [`bind_all`], but gives a predecessor time to free the port: what a process had in an
/// `io_uring` the kernel closes only some time after its end.
fn bind_patiently(
    address: SocketAddr,
    workers: usize,
    options: &Options,
) -> io::Result<(SocketAddr, Vec<Socket>)> {
    let begun = Instant::now();
    loop {
        match bind_all(address, workers, options) {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse && begun.elapsed() < IN_USE_MAX =>
            {
                thread::sleep(IN_USE_PAUSE);
            }
            outcome => return outcome,
        }
    }
}

fn bind_all(
    address: SocketAddr,
    workers: usize,
    options: &Options,
) -> io::Result<(SocketAddr, Vec<Socket>)> {
    // SO_REUSEPORT lets a second process of the same user in as well. Binding once without it
    // finds that out before anybody's connections go astray.
    let lone = socket(address)?;
    lone.bind(&address.into())?;
    let address = lone.local_addr()?.as_socket().unwrap_or(address);
    drop(lone);
    let sockets = (0..workers).map(|_| {
        let socket = socket(address)?;
        socket.set_reuse_port(true)?;
        options.apply(&socket)?;
        socket.bind(&address.into())?;
        Ok(socket)
    });
    let sockets = sockets.collect::<io::Result<Vec<_>>>()?;
    // All are bound before the first listens, so the group is complete when clients come.
    for socket in &sockets {
        socket.listen(LISTEN_BACKLOG)?;
    }
    Ok((address, sockets))
}

fn socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Connections of a predecessor in TIME_WAIT do not keep the port from us.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

fn lacks_family(address: SocketAddr, error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(libc::EAFNOSUPPORT | libc::EPROTONOSUPPORT) => true,
        // Where IPv6 is switched off by sysctl, even ::1 is missing. Else it is some other host's.
        Some(libc::EADDRNOTAVAIL) => {
            let loopback = SocketAddr::from((Ipv6Addr::LOCALHOST, 0));
            let has_loopback = || socket(loopback).and_then(|s| s.bind(&loopback.into())).is_ok();
            address.is_ipv6() && !has_loopback()
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_workers_share_one_free_port_and_a_second_process_is_refused() {
        let any = "127.0.0.1:0".parse().unwrap();
        let listeners = listen(&[any], 3, &Options::default()).unwrap();
        let [address] = listeners.addresses[..] else { panic!("{listeners:?}") };
        assert_ne!(address.port(), 0);
        assert_eq!(listeners.sets.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1, 1]);
        let error = listen(&[address], 1, &Options::default()).unwrap_err();
        assert!(matches!(error, ListenError::InUse(a) if a == address), "{error}");
    }

    #[test]
    fn accepted_sockets_inherit_the_options() {
        let keepalive = Some(std::time::Duration::from_secs(7));
        let options = Options { keepalive, ..Options::default() };
        let any = "127.0.0.1:0".parse().unwrap();
        let mut listeners = listen(&[any], 1, &options).unwrap();
        let _client = std::net::TcpStream::connect(listeners.addresses[0]).unwrap();
        let listener = Socket::from(listeners.sets.remove(0).remove(0));
        let (accepted, _) = listener.accept().unwrap();
        assert!(accepted.tcp_nodelay().unwrap() && accepted.keepalive().unwrap());
        assert_eq!(accepted.tcp_keepalive_time().unwrap(), options.keepalive.unwrap());
    }
}
