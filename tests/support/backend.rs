//! Backends: servers in threads of the test, which can be killed and come back at their address.
//!
//! They listen on 127.0.0.2. Connections to there come from 127.0.0.1, so while a backend is gone
//! no connection's own port can take its place, and none can connect to itself.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::epoll;
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use super::client::{prepare, read_line};
use super::ports;

type Handler = dyn Fn(&TcpStream) + Send + Sync;

/// What a store holds.
pub type Memory = Arc<Mutex<HashMap<String, String>>>;

const ANY_PORT: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), 0));

/// A server with a thread for each connection.
pub struct Backend {
    address: SocketAddr,
    handler: Arc<Handler>,
    accepted: Arc<AtomicU64>,
    running: Option<Running>,
}

struct Running {
    listener: Arc<TcpListener>,
    acceptor: JoinHandle<()>,
    connections: Arc<Mutex<Vec<Weak<TcpStream>>>>,
}

impl Backend {
    /// A server that runs `handler` on each connection and closes it afterwards. What a handler
    /// finds out it has to send to the test: a panic would stay in its thread.
    pub fn scripted(handler: impl Fn(&TcpStream) + Send + Sync + 'static) -> Self {
        Self::scripted_at(ANY_PORT, handler)
    }

    /// The same, at an address that need not be of the loopback interface.
    pub fn scripted_at(
        address: SocketAddr,
        handler: impl Fn(&TcpStream) + Send + Sync + 'static,
    ) -> Self {
        let accepted = Arc::default();
        let mut backend = Self { address, handler: Arc::new(handler), accepted, running: None };
        backend.start();
        backend
    }

    /// Sends back what it gets.
    pub fn echo() -> Self {
        Self::scripted(|mut stream| {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..n]).is_err() {
                    return;
                }
            }
        })
    }

    /// Answers each line with its own name.
    pub fn named(name: &'static str) -> Self {
        Self::named_at(name, ANY_PORT.ip())
    }

    /// The same, at an address that need not be of the loopback interface.
    pub fn named_at(name: &'static str, ip: IpAddr) -> Self {
        Self::named_on(name, SocketAddr::new(ip, 0))
    }

    /// The same, at a port that may be another server's at another address.
    pub fn named_on(name: &'static str, address: SocketAddr) -> Self {
        Self::scripted_at(address, move |mut stream| {
            while read_line(stream).is_ok() {
                if stream.write_all(format!("{name}\n").as_bytes()).is_err() {
                    return;
                }
            }
        })
    }

    /// Speaks Chronos's protocol, and like it takes each read for one command.
    pub fn chronos() -> Self {
        Self::chronos_on(ANY_PORT, &Memory::default())
    }

    /// The same, with what it stores in the hands of the test, so that it can move.
    pub fn chronos_on(address: SocketAddr, memory: &Memory) -> Self {
        let store = Arc::clone(memory);
        Self::scripted_at(address, move |mut stream| {
            let mut buffer = [0; 512];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                let reply = chronos_reply(&store, &String::from_utf8_lossy(&buffer[..n]));
                if stream.write_all(format!("{reply}\n").as_bytes()).is_err() {
                    return;
                }
            }
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Relaxed)
    }

    /// Connections that are open now.
    pub fn open(&self) -> usize {
        let running = self.running.as_ref().unwrap();
        let connections = running.connections.lock().unwrap();
        connections.iter().filter(|connection| connection.strong_count() > 0).count()
    }

    /// Listens again, at the same address.
    pub fn start(&mut self) {
        assert!(self.running.is_none());
        let listener = Arc::new(listen(self.address, 1024).unwrap());
        self.address = listener.local_addr().unwrap();
        let connections = Arc::<Mutex<Vec<Weak<TcpStream>>>>::default();
        let acceptor = thread::spawn({
            let (listener, connections) = (listener.clone(), connections.clone());
            let (handler, accepted) = (self.handler.clone(), self.accepted.clone());
            move || {
                while let Ok((stream, _)) = listener.accept() {
                    let stream = Arc::new(stream);
                    let mut open = connections.lock().unwrap();
                    open.retain(|connection| connection.strong_count() > 0);
                    open.push(Arc::downgrade(&stream));
                    drop(open);
                    accepted.fetch_add(1, Relaxed);
                    let serve = serving(handler.clone(), stream);
                    thread::Builder::new().stack_size(256 << 10).spawn(serve).unwrap();
                }
            }
        });
        self.running = Some(Running { listener, acceptor, connections });
    }

    /// Closes the listener and every connection, as if the process had died.
    pub fn kill(&mut self) {
        let Some(running) = self.running.take() else { return };
        // On Linux this ends the listening and wakes the thread that accepts.
        rustix::net::shutdown(&running.listener, rustix::net::Shutdown::Read).unwrap();
        running.acceptor.join().unwrap();
        close(&running.connections);
    }

    /// Closes every connection and goes on listening.
    pub fn close_connections(&self) {
        close(&self.running.as_ref().unwrap().connections);
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.kill();
    }
}

fn close(connections: &Mutex<Vec<Weak<TcpStream>>>) {
    for connection in connections.lock().unwrap().drain(..) {
        if let Some(stream) = connection.upgrade() {
            // It fails where the peer has closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// As for clients, but a warm connection may wait for its first bytes for as long as it takes.
/// Runs the handler on a connection, for a thread of its own.
fn serving(handler: Arc<Handler>, stream: Arc<TcpStream>) -> impl FnOnce() + Send {
    move || {
        // It fails where the peer is gone already, as the handler will find.
        let _ = prepare_backend(&stream);
        handler(&stream);
    }
}

fn prepare_backend(stream: &TcpStream) -> io::Result<()> {
    prepare(stream)?;
    stream.set_read_timeout(None)
}

fn listen(address: SocketAddr, backlog: i32) -> io::Result<TcpListener> {
    if address.port() != 0 {
        return listen_at(address, backlog);
    }
    // Another process of tests may look at the same port at this moment.
    loop {
        match listen_at(ports::unused(address.ip()), backlog) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            outcome => return outcome,
        }
    }
}

fn listen_at(address: SocketAddr, backlog: i32) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(backlog)?;
    Ok(socket.into())
}

fn chronos_reply(store: &Mutex<HashMap<String, String>>, command: &str) -> String {
    let mut store = store.lock().unwrap();
    let words: Vec<&str> = command.split_whitespace().collect();
    match words[..] {
        ["PING"] => "PONG".to_owned(),
        ["GET", key] => store.get(key).cloned().unwrap_or_else(|| "NULL".to_owned()),
        ["SET", key, ..] if words.len() > 2 => {
            store.insert(key.to_owned(), words[2..].join(" "));
            "OK".to_owned()
        }
        ["DEL", key] => {
            store.remove(key);
            "OK_DELETED".to_owned()
        }
        ["COMPACT"] => "OK_COMPACTED".to_owned(),
        _ => "ERR_UNKNOWN_COMMAND".to_owned(),
    }
}

/// An address where connects get no answer: a listener that never accepts, with its queue full.
pub struct BlackHole {
    listener: TcpListener,
    _queue: Vec<Socket>,
}

impl BlackHole {
    pub fn new() -> Self {
        Self::at([127, 0, 0, 2].into())
    }

    pub fn at(ip: IpAddr) -> Self {
        let listener = listen((ip, 0).into(), 0).unwrap();
        let address = SockAddr::from(listener.local_addr().unwrap());
        let mut queue = Vec::new();
        loop {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let outcome = socket.connect_timeout(&address, Duration::from_millis(250));
            queue.push(socket);
            match outcome {
                Ok(()) => assert!(queue.len() < 64, "the queue never fills"),
                Err(error) if error.kind() == ErrorKind::TimedOut => break,
                Err(error) => panic!("filling the queue: {error}"),
            }
        }
        Self { listener, _queue: queue }
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }
}

/// An echo server for thousands of quiet connections: one thread, one epoll instance, and
/// messages small enough for any socket's buffer.
pub struct Crowd {
    listener: Arc<TcpListener>,
    thread: Option<JoinHandle<()>>,
}

impl Crowd {
    pub fn new() -> Self {
        let listener = Arc::new(listen("127.0.0.2:0".parse().unwrap(), 4096).unwrap());
        let serving = listener.clone();
        let thread = Some(thread::spawn(move || serve_crowd(&serving).unwrap()));
        Self { listener, thread }
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Read).unwrap();
        let _ = self.thread.take().unwrap().join();
    }
}

fn serve_crowd(listener: &TcpListener) -> io::Result<()> {
    const LISTENER: u64 = u64::MAX;
    let watch = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let readable = epoll::EventFlags::IN;
    epoll::add(&watch, listener, epoll::EventData::new_u64(LISTENER), readable)?;
    let mut connections: Vec<Option<TcpStream>> = Vec::new();
    let mut events = Vec::with_capacity(256);
    loop {
        events.clear();
        epoll::wait(&watch, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            let which = event.data.u64();
            if which == LISTENER {
                let Ok((stream, _)) = listener.accept() else { return Ok(()) };
                let number = connections.len();
                epoll::add(&watch, &stream, epoll::EventData::new_u64(number as u64), readable)?;
                connections.push(Some(stream));
                continue;
            }
            let slot = &mut connections[usize::try_from(which).unwrap()];
            let Some(stream) = slot else { continue };
            let mut buffer = [0; 1024];
            let alive = match stream.read(&mut buffer) {
                Ok(0) | Err(_) => false,
                Ok(n) => stream.write_all(&buffer[..n]).is_ok(),
            };
            if !alive {
                *slot = None;
            }
        }
    }
}

/// Makes the close of a backend's connection a reset.
pub fn reset_on_close(stream: &TcpStream) {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}
