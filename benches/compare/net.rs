//! Sockets of both kinds, TCP and Unix, as the load and the backend use them.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

use rustix::net::{SocketFlags, accept_with};
use socket2::{Domain, SockAddr, Socket, Type};

/// Connections of the kernel's accept queue.
const BACKLOG: i32 = 4096;
/// What a Unix socket's path begins with where it is written.
const UNIX: &str = "unix:";

/// What carries the bytes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Unix,
}

/// Where something listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Address {
    /// One that nobody listens at: a port of the loopback interface, or that file.
    pub fn free(transport: Transport, file: &Path) -> io::Result<Self> {
        Ok(match transport {
            Transport::Tcp => Self::Tcp(free()?),
            Transport::Unix => Self::Unix(file.to_owned()),
        })
    }

    pub fn transport(&self) -> Transport {
        match self {
            Self::Tcp(_) => Transport::Tcp,
            Self::Unix(_) => Transport::Unix,
        }
    }

    fn to_kernel(&self) -> io::Result<SockAddr> {
        match self {
            Self::Tcp(address) => Ok((*address).into()),
            Self::Unix(path) => SockAddr::unix(path),
        }
    }

    fn socket(&self, kind: Type) -> io::Result<Socket> {
        let domain = match self {
            Self::Tcp(address) => Domain::for_address(*address),
            Self::Unix(_) => Domain::UNIX,
        };
        Socket::new(domain, kind, None)
    }

    /// Makes a connection.
    pub fn connect(&self) -> io::Result<Socket> {
        let socket = self.socket(Type::STREAM)?;
        socket.connect(&self.to_kernel()?)?;
        send_at_once(&socket, self.transport())?;
        Ok(socket)
    }

    /// Begins to make one from `client`, an address of the client's own: other machines have theirs,
    /// while the ports of one are used up by many that come and go, and looking for a free one would
    /// take most of the time. A Unix socket needs none.
    pub fn begin_connect(&self, client: Ipv4Addr) -> io::Result<Socket> {
        let socket = self.socket(Type::STREAM.nonblocking())?;
        if self.transport() == Transport::Tcp {
            nix::sys::socket::setsockopt(
                &socket,
                nix::sys::socket::sockopt::IpBindAddressNoPort,
                &true,
            )?;
            socket.bind(&SocketAddr::from((client, 0)).into())?;
        }
        match socket.connect(&self.to_kernel()?) {
            Err(e) if e.raw_os_error() != Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {
                Err(e)
            }
            _ => Ok(socket),
        }
    }

    /// Listens there.
    pub fn listen(&self) -> io::Result<Listener> {
        let socket = self.socket(Type::STREAM)?;
        socket.bind(&self.to_kernel()?)?;
        socket.listen(BACKLOG)?;
        Ok(Listener { socket, transport: self.transport() })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix(UNIX) {
            Some(path) => Ok(Self::Unix(path.into())),
            None => text.parse().map(Self::Tcp).map_err(|error| format!("{text}: {error}")),
        }
    }
}

/// A listening socket.
pub struct Listener {
    pub socket: Socket,
    transport: Transport,
}

impl Listener {
    /// The next client, on a socket that blocks or not.
    pub fn accept(&self, blocks: bool) -> io::Result<Socket> {
        let nonblock = if blocks { SocketFlags::empty() } else { SocketFlags::NONBLOCK };
        let client = Socket::from(accept_with(&self.socket, SocketFlags::CLOEXEC | nonblock)?);
        send_at_once(&client, self.transport)?;
        Ok(client)
    }
}

/// Small messages wait for nothing; those of a Unix socket never do.
fn send_at_once(socket: &Socket, transport: Transport) -> io::Result<()> {
    match transport {
        Transport::Tcp => socket.set_tcp_nodelay(true),
        Transport::Unix => Ok(()),
    }
}

/// A port of the loopback interface that nobody listens on.
pub fn free() -> io::Result<SocketAddr> {
    Ok((Ipv4Addr::LOCALHOST, free_port()?).into())
}

/// A port that nobody listens on, below those that the kernel gives to clients.
fn free_port() -> io::Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let spread = (std::process::id() % 500) as u16 * 20;
    for _ in 0..1000 {
        let port = 20_000 + (spread + NEXT.fetch_add(1, Relaxed)) % 12_000;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    Err(io::Error::other("no free port from 20000 to 32000"))
}
