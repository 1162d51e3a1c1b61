//! The backend: a process of its own, which checks every byte of every frame and answers those that
//! ask for it. One thread, as simple as it can be; or like Chronos a thread for each connection, which
//! takes each read for one request.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::process::{Child, Command, Stdio, exit};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token};
use rustix::fd::AsRawFd;
use slab::Slab;
use socket2::Socket;

use crate::frame::{Frame, Incoming, Outgoing};
use crate::net::{Address, Listener, Transport};

/// The argument that makes this program the backend.
pub const ARGUMENT: &str = "--backend";
/// The argument behind it for a thread for each connection.
const THREADED: &str = "--threaded";
/// What it prints once it listens.
const READY: &str = "ready\n";
/// Bytes read at a time.
const READ: usize = 256 * 1024;

/// A backend in a process of its own. It ends with this handle.
pub struct Backend {
    child: Child,
    /// Where it listens, one address a contestant.
    pub addresses: Vec<Address>,
    _folder: tempfile::TempDir,
}

impl Backend {
    /// Starts a backend that listens at an address for each of `transports`, with a thread for each
    /// connection if it is to be `threaded`.
    pub fn start(transports: &[Transport], threaded: bool) -> Result<Self, String> {
        let context = |error: io::Error| format!("starting the backend: {error}");
        let folder = tempfile::tempdir().map_err(context)?;
        let address = |(at, transport): (usize, &Transport)| {
            Address::free(*transport, &folder.path().join(at.to_string()))
        };
        let addresses = transports.iter().enumerate().map(address);
        let addresses: Vec<_> = addresses.collect::<io::Result<_>>().map_err(context)?;
        let mut child = Command::new(std::env::current_exe().map_err(context)?)
            .arg(ARGUMENT)
            .args(threaded.then_some(THREADED))
            .args(addresses.iter().map(Address::to_string))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(context)?;
        let mut line = String::new();
        let output = child.stdout.take().expect("it is piped");
        BufReader::new(output).read_line(&mut line).map_err(context)?;
        if line == READY {
            Ok(Self { child, addresses, _folder: folder })
        } else {
            Err(format!("starting the backend: it printed {line:?}"))
        }
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Fails if it has ended, as it does at a wrong byte.
    pub fn check(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            ended => Err(format!("the backend ended: {ended:?}; what it printed is above")),
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        drop(self.child.stdin.take()); // Its sign to end.
        let _ = self.child.wait();
    }
}

/// The backend's process: listens where its arguments say, serves until its input ends.
pub fn main(arguments: impl Iterator<Item = String>) -> Result<(), String> {
    let mut arguments = arguments.peekable();
    let threaded = arguments.next_if(|argument| argument == THREADED).is_some();
    let listen = |address: String| {
        address.parse::<Address>()?.listen().map_err(|error| format!("{address}: {error}"))
    };
    let listeners = arguments.map(listen).collect::<Result<Vec<_>, _>>()?;

    std::thread::spawn(|| {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        exit(0);
    });
    if threaded {
        serve_by_threads(listeners);
        return Ok(());
    }
    let mut server = Server::new(listeners).map_err(|error| error.to_string())?;
    print!("{READY}");
    server.run().map_err(|error| error.to_string())
}

/// A thread for each listener, and one for each connection.
fn serve_by_threads(listeners: Vec<Listener>) {
    let mut threads = Vec::new();
    for listener in listeners {
        threads.push(std::thread::spawn(move || {
            loop {
                let Ok(stream) = listener.accept(true) else { continue };
                let serve = move || serve_blocking(&stream).unwrap_or(());
                let thread = std::thread::Builder::new().stack_size(64 * 1024);
                if let Err(error) = thread.spawn(serve) {
                    let _ = writeln!(io::stderr(), "the backend has no thread left: {error}");
                    exit(1);
                }
            }
        }));
    }
    print!("{READY}");
    for thread in threads {
        drop(thread.join());
    }
}

/// Answers one request a read.
fn serve_blocking(mut stream: &Socket) -> io::Result<()> {
    let mut buffer = [0; 512];
    loop {
        let read = stream.read(&mut buffer)?;
        let mut bytes = &buffer[..read];
        match Incoming::default().read(&mut bytes) {
            _ if read == 0 => return Ok(()),
            Ok(Some(frame)) if bytes.is_empty() => {
                let reply = Frame { id: frame.id, len: frame.reply, reply: 0 };
                Outgoing::new(reply).write(&mut stream)?;
            }
            other => {
                let _ = writeln!(io::stderr(), "the backend received {other:?} and {bytes:?}");
                exit(1);
            }
        }
    }
}

struct Conn {
    stream: Socket,
    /// Whether it is registered for room too, as it had none once.
    watches_room: bool,
    incoming: Incoming,
    replies: VecDeque<Outgoing>,
}

struct Server {
    poll: Poll,
    listeners: Vec<Listener>,
    conns: Slab<Conn>,
    buffer: Vec<u8>,
}

impl Server {
    fn new(listeners: Vec<Listener>) -> io::Result<Self> {
        let poll = Poll::new()?;
        for (at, listener) in listeners.iter().enumerate() {
            listener.socket.set_nonblocking(true)?;
            let fd = listener.socket.as_raw_fd();
            poll.registry().register(&mut SourceFd(&fd), Token(at), Interest::READABLE)?;
        }
        Ok(Self { poll, listeners, conns: Slab::new(), buffer: vec![0; READ] })
    }

    fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        loop {
            match self.poll.poll(&mut events, None) {
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            for event in &events {
                match event.token().0.checked_sub(self.listeners.len()) {
                    None => self.accept(event.token().0)?,
                    Some(key) => self.serve(key, event.is_read_closed()),
                }
            }
        }
    }

    fn accept(&mut self, listener: usize) -> io::Result<()> {
        loop {
            let stream = match self.listeners[listener].accept(false) {
                Ok(stream) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            let entry = self.conns.vacant_entry();
            let token = Token(self.listeners.len() + entry.key());
            let fd = stream.as_raw_fd();
            self.poll.registry().register(&mut SourceFd(&fd), token, Interest::READABLE)?;
            entry.insert(Conn {
                stream,
                watches_room: false,
                incoming: Incoming::default(),
                replies: VecDeque::new(),
            });
        }
    }

    fn serve(&mut self, key: usize, ended: bool) {
        // The connection may have ended earlier in the same turn.
        let Some(conn) = self.conns.get_mut(key) else { return };
        // A reset is an end like any other: whoever misses a reply says so.
        let served = conn.serve(&mut self.buffer, ended);
        let token = Token(self.listeners.len() + key);
        let watched = conn.watch_room(self.poll.registry(), token);
        if !served.and_then(|goes_on| watched.map(|()| goes_on)).unwrap_or(false) {
            self.conns.remove(key);
        }
    }
}

impl Conn {
    /// Reads and answers what there is. Says whether the connection goes on.
    fn serve(&mut self, buffer: &mut [u8], ended: bool) -> io::Result<bool> {
        self.flush()?;
        loop {
            let read = match self.stream.read(buffer) {
                Ok(0) => return Ok(false),
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            };
            let mut bytes = &buffer[..read];
            while !bytes.is_empty() {
                match self.incoming.read(&mut bytes) {
                    Ok(Some(frame)) if frame.reply > 0 => {
                        let reply = Frame { id: frame.id, len: frame.reply, reply: 0 };
                        self.replies.push_back(Outgoing::new(reply));
                    }
                    Ok(_) => {}
                    Err(error) => {
                        let _ = writeln!(io::stderr(), "the backend received {error}");
                        exit(1);
                    }
                }
            }
            self.flush()?;
            if read < buffer.len() && !ended {
                return Ok(true); // More will come with an event of its own.
            }
        }
    }

    /// Watches for room once there was none. (Of a Unix socket the kernel tells of room each time that
    /// the other end reads.)
    fn watch_room(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        if self.watches_room || self.replies.is_empty() {
            return Ok(());
        }
        self.watches_room = true;
        let interest = Interest::READABLE | Interest::WRITABLE;
        registry.reregister(&mut SourceFd(&self.stream.as_raw_fd()), token, interest)
    }

    fn flush(&mut self) -> io::Result<()> {
        while let Some(reply) = self.replies.front_mut() {
            if !reply.write(&mut self.stream)? {
                break;
            }
            self.replies.pop_front();
        }
        Ok(())
    }
}
