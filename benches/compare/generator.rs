//! A generator of load: one thread with its part of the connections.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use socket2::Socket;

use crate::frame::{FRAME_MIN, Frame, Incoming, Outgoing};
use crate::load::{Load, PATIENCE, Pace, Window, histogram};
use crate::net::Address;

/// Frames that a bulk stream may write before the others have their turn.
const BULK_TURN: usize = 8;
const TIMER: Token = Token(usize::MAX);
const WAKER: Token = Token(usize::MAX - 1);
const BOTH: Interest = Interest::READABLE.add(Interest::WRITABLE);

/// Which of the generators it is, of how many.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    pub at: usize,
    pub of: usize,
}

/// What came of a generator's part within the measured time.
pub struct Counts {
    pub requests: u64,
    pub bytes: u64,
    /// Nanoseconds.
    pub latency: Histogram<u64>,
}

struct Conn {
    stream: Socket,
    /// What it is registered for, if it is.
    interest: Option<Interest>,
    incoming: Incoming,
    outgoing: Option<Outgoing>,
    /// The reply that is due, and since when.
    awaited: Option<(u64, Instant)>,
    next_id: u64,
}

/// A generator of load.
pub struct Generator<'a> {
    target: &'a Address,
    load: Load,
    part: Part,
    window: &'a Window,
    poll: Poll,
    waker: Arc<Waker>,
    conns: Vec<Conn>,
    /// How many there are to be; with churn, they come as it runs.
    connections: usize,
    timer: OwnedFd,
    /// Open pace: connections without a request, the longest idle first; when requests were due
    /// that found none; how many were due.
    free: VecDeque<usize>,
    late: VecDeque<Instant>,
    due: u32,
    /// Bulk streams that gave way to others.
    eager: VecDeque<usize>,
    start: Instant,
    /// How far the run is.
    now: Instant,
    counts: Counts,
    buffer: Vec<u8>,
}

impl<'a> Generator<'a> {
    /// Of `load` it takes its part, on `streams` as far as they are made before.
    pub fn new(
        target: &'a Address,
        load: Load,
        part: Part,
        streams: Vec<Socket>,
        window: &'a Window,
    ) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let (start, poll) = (Instant::now(), Poll::new()?);
        let Part { at, of } = part;
        let connections = load.connections * (at + 1) / of - load.connections * at / of;
        let mut generator = Self {
            target,
            load,
            part,
            window,
            waker: Arc::new(Waker::new(poll.registry(), WAKER)?),
            poll,
            conns: Vec::with_capacity(connections),
            connections,
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            free: (0..connections).collect(),
            late: VecDeque::new(),
            due: 0,
            eager: VecDeque::new(),
            start,
            now: start,
            counts: Counts { requests: 0, bytes: 0, latency: histogram() },
            buffer: vec![0; 256 * 1024],
        };
        for stream in streams {
            stream.set_nonblocking(true)?;
            generator.add(stream);
            generator.register(generator.conns.len() - 1)?;
        }
        Ok(generator)
    }

    /// To be woken by, when the measured time is over.
    pub fn waker(&self) -> Arc<Waker> {
        Arc::clone(&self.waker)
    }

    /// Runs until the measured time is over and every reply is there. All begin at the same `start`.
    pub fn run(mut self, start: Instant) -> Result<Counts, String> {
        self.set_out(start)?;
        let mut events = Events::with_capacity(1024);
        let mut ending = false;
        loop {
            self.now = Instant::now();
            if let Some(end) = self.window.end() {
                if !ending {
                    self.wind_up()?;
                    ending = true;
                }
                if self.is_done() {
                    return Ok(self.counts);
                }
                if self.now > end + PATIENCE {
                    let missing = self.conns.iter().filter(|conn| conn.awaited.is_some()).count();
                    return Err(format!("{missing} replies are missing after {PATIENCE:?}"));
                }
            }
            self.turn(&mut events, ending.then_some(PATIENCE))?;
        }
    }

    /// Waits for events and serves them.
    fn turn(&mut self, events: &mut Events, patience: Option<Duration>) -> Result<(), String> {
        let wait = if self.eager.is_empty() { patience } else { Some(Duration::ZERO) };
        match self.poll.poll(events, wait) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.to_string()),
            _ => {}
        }
        for event in events.iter() {
            self.now = Instant::now();
            match event.token() {
                WAKER => {}
                TIMER => self.on_timer()?,
                Token(at) => {
                    if event.is_writable() {
                        self.write(at)?;
                    }
                    if event.is_readable() || event.is_error() {
                        self.read(at)?;
                    }
                }
            }
        }
        for _ in 0..self.eager.len() {
            if let Some(at) = self.eager.pop_front() {
                self.now = Instant::now();
                self.write(at)?;
                self.read(at)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, stream: Socket) {
        // No two connections of a run have an id in common.
        let at = self.conns.len() * self.part.of + self.part.at;
        self.conns.push(Conn {
            stream,
            interest: None,
            incoming: Incoming::default(),
            outgoing: None,
            awaited: None,
            next_id: (at as u64) << 32,
        });
    }

    /// Watches for room once a connection had none. Of a Unix socket the kernel tells of room each
    /// time that the other end reads, which would wake the generator for nothing.
    fn register(&mut self, at: usize) -> io::Result<()> {
        let conn = &mut self.conns[at];
        let before = conn.interest;
        let waits = conn.outgoing.is_some() || before == Some(BOTH);
        let interest = if waits { BOTH } else { Interest::READABLE };
        conn.interest = Some(interest);
        let fd = conn.stream.as_raw_fd();
        match before {
            Some(before) if before == interest => Ok(()),
            Some(_) => self.poll.registry().reregister(&mut SourceFd(&fd), Token(at), interest),
            None => self.poll.registry().register(&mut SourceFd(&fd), Token(at), interest),
        }
    }

    fn set_out(&mut self, start: Instant) -> Result<(), String> {
        self.start = start;
        if let Pace::Open(_) = self.load.pace {
            return self.set_timer().map_err(|error| format!("the timer: {error}"));
        }
        for at in 0..self.connections {
            if self.load.pace == Pace::Churn {
                self.ask_anew(at, self.start)?;
            } else {
                self.request(at, self.start)?;
            }
        }
        Ok(())
    }

    fn set_timer(&mut self) -> io::Result<()> {
        let Pace::Open(rate) = self.load.pace else { return Ok(()) };
        let after = |requests: usize| {
            let delay = Duration::from_secs_f64(requests as f64 / rate);
            Timespec::try_from(delay).map_err(io::Error::other)
        };
        let Part { at, of } = self.part;
        let setting = Itimerspec { it_interval: after(of)?, it_value: after(at + 1)? };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting)?;
        let timer = self.timer.as_raw_fd();
        self.poll.registry().register(&mut SourceFd(&timer), TIMER, Interest::READABLE)
    }

    /// When this generator's next request is due. Those of all generators are evenly spaced.
    fn next_due(&self, rate: f64) -> Instant {
        let before = self.due as usize * self.part.of + self.part.at;
        self.start + Duration::from_secs_f64((before + 1) as f64 / rate)
    }

    /// Makes the requests that are due by now.
    fn on_timer(&mut self) -> Result<(), String> {
        let Pace::Open(rate) = self.load.pace else { return Ok(()) };
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        loop {
            let due = self.next_due(rate);
            if due > self.now || self.window.is_over_at(due) {
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

    fn write(&mut self, at: usize) -> Result<(), String> {
        self.send(at)?;
        self.register(at).map_err(|error| format!("watching a connection: {error}"))
    }

    fn send(&mut self, at: usize) -> Result<(), String> {
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
            if self.window.contains(self.now) {
                self.counts.requests += 1;
                self.counts.bytes += u64::from(self.load.request);
            }
            conn.next_id += 1;
            // The last one asks for a reply, which says that all of them arrived.
            let reply = if self.window.is_over_at(self.now) { FRAME_MIN as u32 } else { 0 };
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
            if self.window.contains(self.now) {
                self.counts.requests += 1;
                self.counts.bytes += u64::from(self.load.request + self.load.reply);
            }
            if self.window.contains(due) {
                self.counts.latency.saturating_record((self.now - due).as_nanos() as u64);
            }
        }
        if let Pace::Open(_) = self.load.pace {
            self.free.push_back(at);
            return self.request_late();
        }
        if self.window.is_over_at(self.now) {
            return Ok(());
        }
        match self.load.pace {
            Pace::Closed => self.request(at, self.now),
            Pace::Churn => self.ask_anew(at, self.now),
            Pace::Bulk | Pace::Open(_) => Ok(()),
        }
    }

    /// Closes the connection, and makes a request on another one in its place.
    fn ask_anew(&mut self, at: usize, since: Instant) -> Result<(), String> {
        let client = (at * self.part.of + self.part.at) as u32;
        let client = Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 0).to_bits() + client + 1);
        let stream = self.target.begin_connect(client);
        let stream = stream.map_err(|error| format!("connecting: {error}"))?;
        if at == self.conns.len() {
            self.add(stream);
        } else {
            self.conns[at].stream = stream;
            self.conns[at].interest = None;
            self.conns[at].incoming = Incoming::default();
        }
        self.request(at, since)
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
