//! The backend: a process of its own, which checks every byte of every frame and answers those that
//! ask for it. One thread, as simple as it can be; or like Chronos a thread for each connection, which
//! takes each read for one request.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio, exit};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use slab::Slab;
use socket2::{Domain, Socket, Type};

use crate::frame::{Frame, Incoming, Outgoing};

/// The argument that makes this program the backend.
pub const ARGUMENT: &str = "--backend";
/// Connections of the kernel's accept queue.
const BACKLOG: i32 = 4096;
/// Bytes read at a time.
const READ: usize = 256 * 1024;

/// A backend in a process of its own. It ends with this handle.
pub struct Backend {
    child: Child,
    /// Where it listens, one address a contestant.
    pub addresses: Vec<SocketAddr>,
}

impl Backend {
    /// Starts a backend that listens at `count` addresses, with a thread for each connection if it
    /// is to be `threaded`.
    pub fn start(count: usize, threaded: bool) -> Result<Self, String> {
        let context = |error: io::Error| format!("starting the backend: {error}");
        let mut child = Command::new(std::env::current_exe().map_err(context)?)
            .args([ARGUMENT, &count.to_string()])
            .args(threaded.then_some("threaded"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(context)?;
        let mut line = String::new();
        let output = child.stdout.take().expect("it is piped");
        BufReader::new(output).read_line(&mut line).map_err(context)?;
        let addresses: Vec<_> = line.split_whitespace().filter_map(|a| a.parse().ok()).collect();
        if addresses.len() == count {
            Ok(Self { child, addresses })
        } else {
            Err(format!("starting the backend: it said {line:?}"))
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

/// The backend's process: says where it listens, serves until its input ends.
pub fn main(count: usize, threaded: bool) -> io::Result<()> {
    std::thread::spawn(|| {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        exit(0);
    });
    if threaded {
        return serve_by_threads(count);
    }
    let mut server = Server {
        poll: Poll::new()?,
        listeners: (0..count).map(|_| listener()).collect::<io::Result<_>>()?,
        conns: Slab::new(),
        buffer: vec![0; READ],
    };
    for (at, listener) in server.listeners.iter_mut().enumerate() {
        print!("{} ", listener.local_addr()?);
        server.poll.registry().register(listener, Token(at), Interest::READABLE)?;
    }
    println!();
    server.run()
}

/// A thread for each listener, and one for each connection.
fn serve_by_threads(count: usize) -> io::Result<()> {
    let mut threads = Vec::new();
    for _ in 0..count {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        let port = crate::peers::free_port()?;
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
        socket.listen(BACKLOG)?;
        let listener = std::net::TcpListener::from(socket);
        print!("{} ", listener.local_addr()?);
        threads.push(std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serve = move || serve_blocking(&stream).unwrap_or(());
                let thread = std::thread::Builder::new().stack_size(64 * 1024);
                if let Err(error) = thread.spawn(serve) {
                    let _ = writeln!(io::stderr(), "the backend has no thread left: {error}");
                    exit(1);
                }
            }
        }));
    }
    println!();
    for thread in threads {
        drop(thread.join());
    }
    Ok(())
}

/// Answers one request a read.
fn serve_blocking(mut stream: &std::net::TcpStream) -> io::Result<()> {
    let mut buffer = [0; 512];
    stream.set_nodelay(true)?;
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

fn listener() -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, crate::peers::free_port()?)).into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(TcpListener::from_std(socket.into()))
}

struct Conn {
    stream: TcpStream,
    incoming: Incoming,
    replies: VecDeque<Outgoing>,
}

struct Server {
    poll: Poll,
    listeners: Vec<TcpListener>,
    conns: Slab<Conn>,
    buffer: Vec<u8>,
}

impl Server {
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
            let stream = match self.listeners[listener].accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            stream.set_nodelay(true)?;
            let entry = self.conns.vacant_entry();
            let token = Token(self.listeners.len() + entry.key());
            let conn = entry.insert(Conn {
                stream,
                incoming: Incoming::default(),
                replies: VecDeque::new(),
            });
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut conn.stream, token, interest)?;
        }
    }

    fn serve(&mut self, key: usize, ended: bool) {
        // The connection may have ended earlier in the same turn.
        let Some(conn) = self.conns.get_mut(key) else { return };
        // A reset is an end like any other: whoever misses a reply says so.
        if !conn.serve(&mut self.buffer, ended).unwrap_or(false) {
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
