//! The load generator: one thread, every byte of every reply checked.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use mio::net::TcpStream;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::frame::{FRAME_MAX, FRAME_MIN, Frame, Incoming, Outgoing};

/// Connections that are made at a time before the run, well below any accept queue.
const CONNECTING: usize = 64;
/// After the run, replies may take this long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Frames that a bulk stream may write before the others have their turn.
const BULK_TURN: usize = 8;
const TIMER: Token = Token(usize::MAX);

/// When requests are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// The next one with the reply, on every connection.
    Closed,
    /// So many a second, whatever the replies do. Latency counts from when one was due.
    Open(f64),
    /// The next one with the reply, on a new connection.
    Churn,
    /// The next one as soon as it can be written; no replies.
    Bulk,
}

/// One run's load.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub pace: Pace,
    /// Connections that work.
    pub connections: usize,
    /// Connections that made one request each, and no more.
    pub idle: usize,
    /// Bytes of a request and of a reply.
    pub request: u32,
    pub reply: u32,
    pub warm_up: Duration,
    pub measured: Duration,
}

/// The edges of the measured time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    Begin,
    End,
}

/// What came of it within the measured time.
pub struct Outcome {
    pub requests: u64,
    pub bytes: u64,
    pub elapsed: Duration,
    /// Nanoseconds.
    pub latency: Histogram<u64>,
}

/// Runs the load against `target`; `on_edge` is called where the measured time begins and ends.
pub fn run(
    target: SocketAddr,
    load: &Load,
    on_edge: &mut dyn FnMut(Edge),
) -> Result<Outcome, String> {
    let idle = connect(target, load.idle, 1 << 56)?;
    let mut generator = Generator::new(target, *load).map_err(|error| error.to_string())?;
    generator.run(on_edge)?;
    exchange(&idle, 2 << 56).map_err(|error| format!("a connection that was idle: {error}"))?;
    let Generator { requests, bytes, latency, begin, end, .. } = generator;
    Ok(Outcome { requests, bytes, elapsed: end - begin, latency })
}

/// Makes connections, each of which has served one request.
pub fn connect(
    target: SocketAddr,
    count: usize,
    ids: u64,
) -> Result<Vec<std::net::TcpStream>, String> {
    let told = |error: io::Error| format!("connecting: {error}");
    let mut streams = Vec::with_capacity(count);
    while streams.len() < count {
        let from = streams.len();
        while streams.len() < count.min(from + CONNECTING) {
            let stream = std::net::TcpStream::connect(target).map_err(told)?;
            stream.set_nodelay(true).map_err(told)?;
            stream.set_read_timeout(Some(PATIENCE)).map_err(told)?;
            streams.push(stream);
        }
        exchange(&streams[from..], ids + from as u64).map_err(|error| format!("first {error}"))?;
    }
    Ok(streams)
}

/// One request on each of the connections.
fn exchange(streams: &[std::net::TcpStream], ids: u64) -> Result<(), String> {
    let frame = |at: usize| Frame { id: ids + at as u64, len: 64, reply: 64 };
    for (at, mut stream) in streams.iter().enumerate() {
        Outgoing::new(frame(at)).write(&mut stream).map_err(|e| format!("request: {e}"))?;
    }
    for (at, mut stream) in streams.iter().enumerate() {
        let mut reply = [0; 64];
        stream.read_exact(&mut reply).map_err(|error| format!("reply: {error}"))?;
        let seen = Incoming::default().read(&mut &reply[..])?;
        if seen.map(|seen| seen.id) != Some(frame(at).id) {
            return Err(format!("reply: wrong bytes: {seen:?} instead of {:?}", frame(at)));
        }
    }
    Ok(())
}

struct Conn {
    stream: TcpStream,
    incoming: Incoming,
    outgoing: Option<Outgoing>,
    /// The reply that is due, and since when.
    awaited: Option<(u64, Instant)>,
    next_id: u64,
}

struct Generator {
    target: SocketAddr,
    load: Load,
    poll: Poll,
    conns: Vec<Conn>,
    timer: OwnedFd,
    /// Open pace: connections without a request, the longest idle first; when requests were due
    /// that found none; how many were due.
    free: VecDeque<usize>,
    late: VecDeque<Instant>,
    due: u32,
    /// Bulk streams that gave way to others.
    eager: VecDeque<usize>,
    start: Instant,
    begin: Instant,
    end: Instant,
    /// How far the run is.
    now: Instant,
    requests: u64,
    bytes: u64,
    latency: Histogram<u64>,
    buffer: Vec<u8>,
}

impl Generator {
    fn new(target: SocketAddr, load: Load) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let now = Instant::now();
        Ok(Self {
            target,
            load,
            poll: Poll::new()?,
            conns: Vec::with_capacity(load.connections),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            free: (0..load.connections).collect(),
            late: VecDeque::new(),
            due: 0,
            eager: VecDeque::new(),
            start: now,
            begin: now,
            end: now,
            now,
            requests: 0,
            bytes: 0,
            latency: Histogram::new_with_bounds(1_000, 60_000_000_000, 3).expect("right bounds"),
            buffer: vec![0; 256 * 1024],
        })
    }

    fn run(&mut self, on_edge: &mut dyn FnMut(Edge)) -> Result<(), String> {
        let warm = if self.load.pace == Pace::Churn { 0 } else { self.load.connections };
        for stream in connect(self.target, warm, 3 << 56)? {
            stream.set_nonblocking(true).map_err(|error| error.to_string())?;
            self.add(TcpStream::from_std(stream)).map_err(|error| error.to_string())?;
        }
        self.set_out()?;
        let mut edge = Some(Edge::Begin);
        let mut events = Events::with_capacity(1024);
        loop {
            self.now = Instant::now();
            match edge {
                Some(Edge::Begin) if self.now >= self.begin => {
                    on_edge(Edge::Begin);
                    self.begin = Instant::now();
                    self.end = self.begin + self.load.measured;
                    edge = Some(Edge::End);
                }
                Some(Edge::End) if self.now >= self.end => {
                    on_edge(Edge::End);
                    edge = None;
                    self.wind_up()?;
                }
                _ => {}
            }
            if edge.is_none() && self.is_done() {
                return Ok(());
            }
            if edge.is_none() && self.now > self.end + PATIENCE {
                let missing = self.conns.iter().filter(|conn| conn.awaited.is_some()).count();
                return Err(format!("{missing} replies are missing after {PATIENCE:?}"));
            }
            self.turn(&mut events, edge)?;
        }
    }

    /// Waits for events and serves them.
    fn turn(&mut self, events: &mut Events, edge: Option<Edge>) -> Result<(), String> {
        let next = match edge {
            Some(Edge::Begin) => self.begin,
            Some(Edge::End) => self.end,
            None => self.end + PATIENCE,
        };
        let wait = next.saturating_duration_since(self.now) + Duration::from_millis(1);
        let wait = if self.eager.is_empty() { wait } else { Duration::ZERO };
        match self.poll.poll(events, Some(wait)) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.to_string()),
            _ => {}
        }
        for event in events.iter() {
            self.now = Instant::now();
            if event.token() == TIMER {
                self.on_timer()?;
            } else {
                self.on_ready(event.token().0)?;
            }
        }
        for _ in 0..self.eager.len() {
            if let Some(at) = self.eager.pop_front() {
                self.now = Instant::now();
                self.on_ready(at)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, stream: TcpStream) -> io::Result<()> {
        let at = self.conns.len();
        let mut conn = Conn {
            stream,
            incoming: Incoming::default(),
            outgoing: None,
            awaited: None,
            next_id: (at as u64) << 32,
        };
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut conn.stream, Token(at), interest)?;
        self.conns.push(conn);
        Ok(())
    }

    fn set_out(&mut self) -> Result<(), String> {
        self.start = Instant::now();
        self.now = self.start;
        self.begin = self.start + self.load.warm_up;
        self.end = self.begin + self.load.measured;
        if let Pace::Open(rate) = self.load.pace {
            let interval = Duration::from_secs_f64(1.0 / rate);
            let every = Timespec::try_from(interval).map_err(|error| error.to_string())?;
            let setting = Itimerspec { it_interval: every, it_value: every };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting)
                .and_then(|_| {
                    let timer = self.timer.as_raw_fd();
                    self.poll
                        .registry()
                        .register(&mut SourceFd(&timer), TIMER, Interest::READABLE)
                        .map_err(|_| rustix::io::Errno::INVAL)
                })
                .map_err(|error| format!("the timer: {error}"))?;
            return Ok(());
        }
        for at in 0..self.load.connections {
            if self.load.pace == Pace::Churn {
                self.reconnect(at).map_err(|error| format!("connecting: {error}"))?;
            }
            self.request(at, self.start)?;
        }
        Ok(())
    }

    /// Makes the requests that are due by now.
    fn on_timer(&mut self) -> Result<(), String> {
        let Pace::Open(rate) = self.load.pace else { return Ok(()) };
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        loop {
            let due = self.start + Duration::from_secs_f64(f64::from(self.due + 1) / rate);
            if due > self.now || due >= self.end {
                break;
            }
            self.due += 1;
            self.late.push_back(due);
        }
        self.request_late()
    }

    fn request_late(&mut self) -> Result<(), String> {
        while let (Some(at), Some(due)) = (self.free.front(), self.late.front()) {
            let (at, due) = (*at, *due);
            self.free.pop_front();
            self.late.pop_front();
            self.request(at, due)?;
        }
        Ok(())
    }

    fn request(&mut self, at: usize, due: Instant) -> Result<(), String> {
        let conn = &mut self.conns[at];
        conn.next_id += 1;
        let mut frame = Frame { id: conn.next_id, len: self.load.request, reply: self.load.reply };
        if self.load.pace == Pace::Bulk {
            frame.reply = 0;
        } else {
            conn.awaited = Some((frame.id, due));
        }
        conn.outgoing = Some(Outgoing::new(frame));
        self.write(at)
    }

    fn on_ready(&mut self, at: usize) -> Result<(), String> {
        self.write(at)?;
        self.read(at)
    }

    fn write(&mut self, at: usize) -> Result<(), String> {
        for _ in 0..BULK_TURN {
            let conn = &mut self.conns[at];
            let Some(outgoing) = &mut conn.outgoing else { return Ok(()) };
            match outgoing.write(&mut conn.stream) {
                Ok(true) => conn.outgoing = None,
                Ok(false) => return Ok(()),
                // A new connection that is not yet made.
                Err(error) if error.kind() == ErrorKind::NotConnected => return Ok(()),
                Err(error) => return Err(format!("sending a request: {error}")),
            }
            if self.load.pace != Pace::Bulk || conn.awaited.is_some() {
                return Ok(());
            }
            if self.now >= self.begin && self.now < self.end {
                self.requests += 1;
                self.bytes += u64::from(self.load.request);
            }
            conn.next_id += 1;
            // The last one asks for a reply, which says that all of them arrived.
            let reply = if self.now >= self.end { FRAME_MIN as u32 } else { 0 };
            conn.awaited = (reply > 0).then_some((conn.next_id, self.now));
            let frame = Frame { id: conn.next_id, len: self.load.request, reply };
            conn.outgoing = Some(Outgoing::new(frame));
        }
        self.eager.push_back(at);
        Ok(())
    }

    fn read(&mut self, at: usize) -> Result<(), String> {
        loop {
            let conn = &mut self.conns[at];
            let read = match conn.stream.read(&mut self.buffer) {
                Ok(0) => return Err("a connection was closed".to_owned()),
                Ok(read) => read,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {
                    return Ok(());
                }
                Err(error) => return Err(format!("receiving a reply: {error}")),
            };
            let mut bytes = &self.buffer[..read];
            while !bytes.is_empty() {
                let Some(frame) = conn.incoming.read(&mut bytes)? else { continue };
                let due = match conn.awaited.take() {
                    Some((id, due)) if id == frame.id && bytes.is_empty() => due,
                    awaited => return Err(format!("wrong bytes: {frame:?} for {awaited:?}")),
                };
                return self.on_reply(at, due);
            }
            if read < self.buffer.len() {
                return Ok(()); // More will come with an event of its own.
            }
        }
    }

    fn on_reply(&mut self, at: usize, due: Instant) -> Result<(), String> {
        self.now = Instant::now();
        if self.load.pace != Pace::Bulk {
            if (self.begin..self.end).contains(&self.now) {
                self.requests += 1;
                self.bytes += u64::from(self.load.request + self.load.reply);
            }
            if (self.begin..self.end).contains(&due) {
                self.latency.saturating_record((self.now - due).as_nanos() as u64);
            }
        }
        match self.load.pace {
            Pace::Open(_) => {
                self.free.push_back(at);
                self.request_late()
            }
            Pace::Closed if self.now < self.end => self.request(at, self.now),
            Pace::Churn if self.now < self.end => {
                let since = self.now;
                self.reconnect(at).map_err(|error| format!("connecting: {error}"))?;
                self.request(at, since)
            }
            Pace::Bulk | Pace::Closed | Pace::Churn => Ok(()),
        }
    }

    /// Closes the connection and begins another one in its place.
    fn reconnect(&mut self, at: usize) -> io::Result<()> {
        let stream = TcpStream::connect(self.target)?;
        stream.set_nodelay(true)?;
        if at == self.conns.len() {
            return self.add(stream);
        }
        self.conns[at].stream = stream;
        self.conns[at].incoming = Incoming::default();
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut self.conns[at].stream, Token(at), interest)
    }

    /// Lets nothing begin any more.
    fn wind_up(&mut self) -> Result<(), String> {
        if let Pace::Open(_) = self.load.pace {
            self.on_timer()?; // Those that were due count, however late.
            let timer = self.timer.as_raw_fd();
            let _ = self.poll.registry().deregister(&mut SourceFd(&timer));
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        let quiet = |conn: &Conn| conn.awaited.is_none() && conn.outgoing.is_none();
        self.late.is_empty() && self.conns.iter().all(quiet)
    }
}

/// The size of a bulk stream's writes.
pub const BULK_WRITE: u32 = FRAME_MAX as u32;
