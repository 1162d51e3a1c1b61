//! Listening sockets, all bound before anything is announced: one per worker and TCP port, and one
//! that all workers share per Unix socket.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::socket_file::{self, Access, SocketFile};
use crate::config::{Config, RouteName, SocketMode};
use crate::io::net::{Address, Options};
use crate::limits::LISTEN_BACKLOG;
use crate::proxy::RouteId;
use crate::worker::socket_options;

/// A port that is in use is tried again for so long: far longer than a kernel takes to close what a
/// process that was killed has left, and short for a user who waits for the error.
const IN_USE_MAX: Duration = Duration::from_secs(1);
/// The pause before each other try.
const IN_USE_PAUSE: Duration = Duration::from_millis(10);
/// The same where a try is a connection to whoever listens.
const IN_USE_PAUSE_UNIX: Duration = Duration::from_millis(100);

/// A listening socket could not be had.
#[derive(Debug, thiserror::Error)]
#[error("{variable}: {failure}")]
pub struct ListenError {
    /// By which the address is set: a route's own, where there are several.
    variable: String,
    failure: ListenFailure,
}

impl ListenError {
    /// What kind of failure it is.
    pub fn kind(&self) -> io::ErrorKind {
        self.failure.kind()
    }
}

/// Why an address cannot be listened at.
#[derive(Debug, thiserror::Error)]
pub enum ListenFailure {
    /// Somebody else listens there.
    #[error("{0} is in use by another program; stop it or choose another {kind}", kind = kind(.0))]
    InUse(Address),
    /// Every address is of a family that the host lacks.
    #[error("the host has none of the address families of {list}", list = list(.0))]
    NoFamily(Vec<Address>),
    /// Anything else.
    #[error("cannot listen on {0}: {1}")]
    Other(Address, #[source] io::Error),
}

fn kind(address: &Address) -> &'static str {
    if address.path().is_some() { "path" } else { "port" }
}

fn list(addresses: &[Address]) -> String {
    addresses.iter().map(Address::to_string).collect::<Vec<_>>().join(", ")
}

impl ListenFailure {
    fn of(address: &Address, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::AddrInUse => Self::InUse(address.clone()),
            _ => Self::Other(address.clone(), error),
        }
    }

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
    pub addresses: Vec<Address>,
    /// Their routes.
    pub routes: Box<[RouteId]>,
    /// One set a worker.
    pub sets: Vec<Vec<OwnedFd>>,
    /// The files of the Unix sockets. They are to be kept until nobody listens any more.
    pub files: Vec<SocketFile>,
}

/// Binds the addresses of all routes, each as [`listen`] does.
///
/// # Errors
/// The first address that cannot be had.
pub fn listen_by_route(config: &Config, workers: usize) -> Result<Listeners, ListenError> {
    let mut all = Listeners::none(workers);
    let mut routes = Vec::new();
    for (number, route) in config.routes.iter().enumerate() {
        let access = Access { mode: route.socket_mode, owner: route.socket_owner };
        let in_log = config.name_in_log(number).map(RouteName::as_str);
        let _named = in_log.map(|route| tracing::error_span!("listening", route).entered());
        let own = listen(&route.listen, workers, &socket_options(route), access);
        let variable = || config.name_to_set("AEGIS_LISTEN", number);
        let own = own.map_err(|failure| ListenError { variable: variable(), failure })?;
        routes.resize(routes.len() + own.addresses.len(), RouteId::at(number));
        all.addresses.extend(own.addresses);
        all.files.extend(own.files);
        for (set, sockets) in all.sets.iter_mut().zip(own.sets) {
            set.extend(sockets);
        }
    }
    all.routes = routes.into();
    Ok(all)
}

/// Binds the control socket, if there is to be one. Anybody may connect who reaches its path, for who
/// may not give commands is to be told so, and logged.
///
/// # Errors
/// It cannot be had.
pub fn listen_control(config: &Config) -> Result<Option<(UnixListener, SocketFile)>, ListenError> {
    let Some(address) = &config.control else { return Ok(None) };
    let Some(path) = address.path() else { unreachable!("{address} is no path") };
    let access = Access { mode: SocketMode::ALL, owner: None };
    let bound = patiently(IN_USE_PAUSE_UNIX, || {
        let (socket, file) = socket_file::listen(path, access)?;
        socket.set_nonblocking(true)?;
        Ok((UnixListener::from(socket), file))
    });
    let bound = bound.map_err(|error| ListenError {
        variable: "AEGIS_CONTROL".to_owned(),
        failure: ListenFailure::of(address, error),
    })?;
    tracing::info!(%address, "control listening");
    Ok(Some(bound))
}

/// Binds every TCP address of one route once a worker, with `SO_REUSEPORT`, and every Unix socket once,
/// and listens. An address whose family the host lacks is skipped with a log line, unless no other is
/// left.
///
/// # Errors
/// The first address that cannot be had.
pub fn listen(
    addresses: &[Address],
    workers: usize,
    options: &Options,
    access: Access,
) -> Result<Listeners, ListenFailure> {
    let mut listeners = Listeners::none(workers);
    for address in addresses {
        let added = match address {
            Address::Tcp(tcp) => listeners.add_tcp(*tcp, options),
            Address::Unix(path) => listeners.add_unix(path, access),
        };
        match added {
            Ok(bound) => listeners.addresses.push(bound),
            Err(error) if lacks_family(address, &error) => {
                tracing::warn!(%address, %error, "not listening: the host lacks the address family");
            }
            Err(error) => return Err(ListenFailure::of(address, error)),
        }
    }
    if listeners.addresses.is_empty() {
        return Err(ListenFailure::NoFamily(addresses.to_vec()));
    }
    listeners.routes = vec![RouteId::default(); listeners.addresses.len()].into();
    Ok(listeners)
}

impl Listeners {
    fn none(workers: usize) -> Self {
        let sets = (0..workers).map(|_| Vec::new()).collect();
        Self { addresses: Vec::new(), routes: Box::default(), sets, files: Vec::new() }
    }

    fn add_tcp(&mut self, address: SocketAddr, options: &Options) -> io::Result<Address> {
        let bind = || bind_all(address, self.sets.len(), options);
        let (bound, sockets) = patiently(IN_USE_PAUSE, bind)?;
        for (set, socket) in self.sets.iter_mut().zip(sockets) {
            set.push(socket.into());
        }
        Ok(bound.into())
    }

    fn add_unix(&mut self, path: &Path, access: Access) -> io::Result<Address> {
        let (socket, file) = patiently(IN_USE_PAUSE_UNIX, || socket_file::listen(path, access))?;
        // There is no `SO_REUSEPORT` for them.
        for set in &mut self.sets {
            set.push(socket.try_clone()?.into());
        }
        self.files.push(file);
        Ok(Address::Unix(path.into()))
    }
}

/// Gives a predecessor time to free its address: what a process had in an `io_uring` the kernel closes
/// only some time after its end.
fn patiently<T>(pause: Duration, mut bind: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let begun = Instant::now();
    loop {
        match bind() {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse && begun.elapsed() < IN_USE_MAX =>
            {
                thread::sleep(pause);
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

fn lacks_family(address: &Address, error: &io::Error) -> bool {
    let Some(address) = address.tcp() else { return false };
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
    use crate::config::SocketMode;

    const ACCESS: Access = Access { mode: SocketMode::DEFAULT, owner: None };

    fn listen_to(
        text: &str,
        workers: usize,
        options: &Options,
    ) -> Result<Listeners, ListenFailure> {
        listen(&[text.parse().unwrap()], workers, options, ACCESS)
    }

    #[test]
    fn all_workers_share_one_free_port_and_a_second_process_is_refused() {
        let listeners = listen_to("127.0.0.1:0", 3, &Options::default()).unwrap();
        let [ref address] = listeners.addresses[..] else { panic!("{listeners:?}") };
        assert_ne!(address.tcp().unwrap().port(), 0);
        assert_eq!(listeners.sets.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1, 1]);
        let error = listen_to(&address.to_string(), 1, &Options::default()).unwrap_err();
        assert!(matches!(&error, ListenFailure::InUse(a) if a == address), "{error}");
    }

    #[test]
    fn all_workers_share_one_unix_socket_and_a_second_process_is_refused() {
        let path = std::env::temp_dir().join(format!("aegis-{}-listen", std::process::id()));
        let text = format!("unix:{}", path.display());
        let listeners = listen_to(&text, 3, &Options::default()).unwrap();
        assert_eq!(listeners.sets.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1, 1]);
        let error = listen_to(&text, 1, &Options::default()).unwrap_err();
        let what = format!("{text} is in use by another program; stop it or choose another path");
        assert_eq!(error.to_string(), what);
        drop(listeners);
        assert!(!path.exists());
    }

    #[test]
    fn an_address_that_is_in_use_names_the_variable_of_its_route() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = taken.local_addr().unwrap().to_string();
        let error = |vars: &[(&str, &str)]| {
            let owned = vars.iter().map(|&(name, text)| (name.to_owned(), text.to_owned()));
            let config = Config::from_vars(owned).unwrap();
            listen_by_route(&config, 1).unwrap_err().to_string()
        };
        let what = format!("{taken} is in use by another program; stop it or choose another port");
        assert_eq!(error(&[("AEGIS_LISTEN", &taken)]), format!("AEGIS_LISTEN: {what}"));
        let two = [
            ("AEGIS_ROUTES", "orders,cache-eu"),
            ("AEGIS_ORDERS__LISTEN", "127.0.0.1:0"),
            ("AEGIS_CACHE_EU__LISTEN", &taken),
        ];
        assert_eq!(error(&two), format!("AEGIS_CACHE_EU__LISTEN: {what}"));
    }

    #[test]
    fn accepted_sockets_inherit_the_options() {
        let keepalive = Some(std::time::Duration::from_secs(7));
        let options = Options { keepalive, ..Options::default() };
        let mut listeners = listen_to("127.0.0.1:0", 1, &options).unwrap();
        let address = listeners.addresses[0].tcp().unwrap();
        let _client = std::net::TcpStream::connect(address).unwrap();
        let listener = Socket::from(listeners.sets.remove(0).remove(0));
        let (accepted, _) = listener.accept().unwrap();
        assert!(accepted.tcp_nodelay().unwrap() && accepted.keepalive().unwrap());
        assert_eq!(accepted.tcp_keepalive_time().unwrap(), options.keepalive.unwrap());
    }
}
