//! The turn of a worker: wait for events, handle each, then see to commands, timers and pools.

use crate::proxy::endpoints::EndpointId;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batch::{Batcher, Plan};
use super::contention::CoreWait;
use super::flush::Flushing;
use super::mailbox::{Command, Mailbox};
use super::timers::Timers;
use crate::config::{Config, Discovery, PoolMode};
use crate::io::{Chain, Close, Completion, ConnId, Driver, Wait, net};
use crate::limits;
use crate::listening::Listening;
use crate::metrics::{CloseReason, Retry, WorkerState, WorkerStats};
use crate::proxy::Side;
use crate::proxy::balance::Table;
use crate::proxy::health::HealthConfig;
use crate::proxy::pulse::Patience;
use crate::proxy::queue::Queue;
use crate::proxy::request::{Client, Framing, Policy};
use crate::proxy::session::{Session, Timeouts};
use crate::slab::{Key, Slab};

/// An idle worker still turns this often, which is its sign of life.
const TURN_MAX: Duration = Duration::from_millis(500);
/// After a failed accept, the next is tried when a session ends, or after this.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// With fewer free places than this a worker, each takes one client a turn: the others may be
/// taking the same places at that moment, and then the limit is exceeded by one a worker at most.
const FREE_SHORT: usize = 64;
/// The last free places for sessions are offered to one worker after the other, so long each.
const ROTATION: Duration = Duration::from_millis(50);
/// In a drain, handshakes under way may take so long to end before the listeners are closed…
const HANDSHAKE_MAX: Duration = Duration::from_millis(100);
/// …and so long where the queues were full: then the kernel drops the last packet of a handshake,
/// and asks for it again after a second.
const HANDSHAKE_AGAIN_MAX: Duration = Duration::from_millis(1200);
/// Complaints about a lasting state are repeated this often.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

/// What an engine needs, apart from its driver.
#[derive(Debug)]
pub struct EngineSetup {
    /// The worker's number.
    pub index: usize,
    /// The configuration.
    pub config: Arc<Config>,
    /// Sessions at a time in the whole process.
    pub sessions_max: usize,
    /// Connections of its pools, idle or being made.
    pub pool_conns_max: usize,
    /// The mailboxes of all workers, its own at `index`.
    pub mailboxes: Arc<[Arc<Mailbox>]>,
    /// The counters of all workers, its own at `index`.
    pub stats: Arc<[Arc<WorkerStats>]>,
    /// When the process started.
    pub started: Instant,
    /// Where backends cannot be.
    pub listening: Listening,
    /// How long the worker waits for its core.
    pub core_wait: CoreWait,
    /// Of the random numbers; equal seeds behave alike.
    pub seed: u64,
}

/// Whose a connection is.
#[derive(Debug, Default)]
pub(super) enum Owner {
    /// Nobody's.
    #[default]
    None,
    /// A session's, connected or being connected.
    Session(Key<Session>, Side),
    /// Being made for a pool, or to probe an endpoint.
    Warming { endpoint: EndpointId, since: Instant },
    /// A client's whose requests are told apart.
    Client(Key<Client>),
    /// In the hands of such a client.
    InUse(Key<Client>),
    /// Warm in a pool, with what the backend has sent unasked.
    Warm { endpoint: EndpointId, greeting: Chain },
    /// Nobody's, and to be closed once its peer has what was sent to it.
    Flushing(Flushing),
}

/// A connection's owner. The id tells a slot's present connection from an earlier one.
#[derive(Debug)]
pub(super) struct Owned {
    pub conn: ConnId,
    pub owner: Owner,
}

/// What accepting is held up by.
#[derive(Debug, Default)]
struct AcceptGate {
    /// There was no room at the latest look.
    full: bool,
    /// There was some, but it was other workers' turn.
    waits_for_turn: bool,
    /// A failed accept is tried again from then on.
    retry_at: Option<Instant>,
    complained_at: Option<Instant>,
}

fn leads_back() -> io::Error {
    io::Error::other("its address leads back to this proxy itself")
}

/// For how long an endpoint that left the set is taken to come back.
fn linger_of(config: &Config) -> Duration {
    match config.discovery {
        Discovery::Dns => {
            let answers =
                config.dns_refresh.min(limits::DNS_CONFIRM) * limits::DNS_ANSWERS_TO_LEAVE;
            answers.max(limits::ENDPOINT_LINGER)
        }
        Discovery::Static | Discovery::Kubernetes => limits::ENDPOINT_LINGER,
    }
}

/// What all parts of a worker use: the driver, the clock, the counters, randomness.
pub(super) struct Context<D> {
    pub driver: D,
    pub config: Arc<Config>,
    pub stats: Arc<WorkerStats>,
    pub timers: Timers,
    pub rng: fastrand::Rng,
    pub now: Instant,
    /// Whose each connection is, by its slot.
    pub owners: Vec<Owned>,
    /// What the worker was told to do at last.
    pub command: Command,
}

/// Accepting, and when it stops.
pub(super) struct Acceptor {
    gate: AcceptGate,
    /// In a drain, the listeners stay open until then.
    listening_until: Option<Instant>,
    /// Clients to be served at the end of the turn.
    accepted: Vec<ConnId>,
    /// When it was told to let clients leave.
    pub drains_since: Option<Instant>,
    /// Sessions and clients that were open then, and are.
    before_drain: usize,
    /// The most sessions of the whole process.
    sessions_max: usize,
    /// Sessions, clients and connections that are being flushed, all together: each of the first
    /// two has as many slots, so that whatever was let in has one, whatever becomes of it.
    pub slots: usize,
    /// The counters of all workers, this one's at `index`.
    pub everyone: Arc<[Arc<WorkerStats>]>,
    pub index: usize,
    started: Instant,
}

/// The mailboxes of all workers, and this one's.
pub(super) struct Mail {
    own: Arc<Mailbox>,
    pub all: Arc<[Arc<Mailbox>]>,
    /// Clients may have been handed over.
    has_some: bool,
}

/// How much there is to do.
pub(super) struct Load {
    pub batcher: Batcher,
    core_wait: CoreWait,
    /// Sessions shorter than a second that ended within about a second.
    pub ended_lately: usize,
}

/// Clients whose requests are told apart.
pub(super) struct Requests {
    pub clients: Slab<Client>,
    pub policy: Policy,
    pub queue: Queue,
    /// Clients to be looked at before the turn ends.
    pub due: VecDeque<Key<Client>>,
    /// Clients whose connection is to be released before the turn ends.
    pub releasing: Vec<Key<Client>>,
    /// For a request that lies in several buffers.
    pub scratch: Box<[u8]>,
}

/// The endpoints and their pools.
pub(super) struct Pools {
    pub table: Table,
    /// Pool connections at most, idle or being made, of all endpoints.
    pub conns_max: usize,
    /// Endpoints whose pool may want connections.
    pub short: Vec<EndpointId>,
    /// Endpoints that may have connections for requests that wait.
    pub freed: Vec<EndpointId>,
    pub health: HealthConfig,
    /// For so long an endpoint that left the set is taken to come back.
    pub linger: Duration,
    /// How long peers may acknowledge nothing.
    pub patience: Option<Patience>,
    /// The slot of the connection that was looked at last for that.
    pub looked_at: usize,
    upkeep_at: Instant,
    /// Where backends cannot be.
    listening: Listening,
}

/// One worker's state, bound to a driver.
pub struct Engine<D> {
    pub(super) cx: Context<D>,
    pub(super) acceptor: Acceptor,
    pub(super) mail: Mail,
    pub(super) load: Load,
    pub(super) sessions: Slab<Session>,
    pub(super) timeouts: Timeouts,
    /// Connections that are closed once their peers have what was sent to them.
    pub(super) flushing: usize,
    pub(super) requests: Requests,
    pub(super) pools: Pools,
}

impl<D: Driver> Engine<D> {
    /// An engine without endpoints: the first snapshot brings them.
    pub fn new(mut driver: D, setup: EngineSetup) -> Self {
        driver.buffers().reserve(limits::buffers_reserved(setup.sessions_max));
        let now = driver.now();
        let conns_max = limits::conns_max(setup.sessions_max);
        let config = setup.config;
        let reuses_conns = config.pool.mode != PoolMode::Preconnect;
        let slots = limits::sessions_of_worker_max(setup.sessions_max);
        let clients_max = if reuses_conns { slots } else { 0 };
        Self {
            acceptor: Acceptor {
                gate: AcceptGate::default(),
                listening_until: None,
                // More than that come in the one turn of a drain, which may allocate.
                accepted: Vec::with_capacity(limits::LISTEN_BACKLOG as usize),
                drains_since: None,
                before_drain: 0,
                sessions_max: setup.sessions_max,
                slots,
                index: setup.index,
                started: setup.started,
                everyone: Arc::clone(&setup.stats),
            },
            mail: Mail {
                own: Arc::clone(&setup.mailboxes[setup.index]),
                all: setup.mailboxes,
                has_some: false,
            },
            load: Load {
                batcher: Batcher::new(now, setup.core_wait.total()),
                core_wait: setup.core_wait,
                ended_lately: 0,
            },
            sessions: Slab::with_capacity(slots),
            timeouts: Timeouts { idle: config.idle_timeout, half_close: config.half_close_timeout },
            flushing: 0,
            requests: Requests {
                clients: Slab::with_capacity(clients_max),
                policy: Policy::new(&config),
                queue: Queue::new(config.requests.queue_max, clients_max),
                due: VecDeque::with_capacity(clients_max),
                releasing: Vec::with_capacity(clients_max),
                scratch: vec![0; Framing::scratch_len(config.protocol, &config.requests)].into(),
            },
            pools: Pools {
                table: Table::new(config.balance, setup.index),
                conns_max: setup.pool_conns_max.min(limits::POOL_CONNS_MAX),
                short: Vec::with_capacity(limits::ENDPOINTS_MAX),
                freed: Vec::with_capacity(limits::ENDPOINTS_MAX),
                health: HealthConfig {
                    eject_failures: config.eject_failures,
                    eject_time: config.eject_time,
                },
                linger: linger_of(&config),
                patience: config.tcp_user_timeout.map(|limit| Patience { limit }),
                looked_at: 0,
                upkeep_at: now,
                listening: setup.listening,
            },
            cx: Context {
                stats: Arc::clone(&setup.stats[setup.index]),
                owners: Vec::with_capacity(conns_max),
                timers: Timers::new(conns_max, now),
                rng: fastrand::Rng::with_seed(setup.seed),
                now,
                command: Command::Run,
                config,
                driver,
            },
        }
    }

    /// Turns until it is told to end and the last session has ended.
    ///
    /// # Errors
    /// The driver cannot go on.
    pub fn run(&mut self) -> io::Result<()> {
        self.on_mail();
        while !self.is_finished() {
            self.turn()?;
        }
        // One more, so that the last closes reach the kernel.
        self.cx.driver.wait(Wait::for_one(Duration::ZERO)).map(drop)
    }

    /// Whether it was told to end and nothing is left to do.
    pub fn is_finished(&self) -> bool {
        self.cx.command >= Command::Drain
            && self.acceptor.listening_until.is_none()
            && self.sessions() == 0
            && self.mail.own.clients() == 0
    }

    /// One turn.
    ///
    /// # Errors
    /// The driver cannot go on.
    pub fn turn(&mut self) -> io::Result<()> {
        self.steer_accepting();
        let wait = self.plan_wait();
        if self.cx.driver.wait(wait)? {
            self.load.batcher.on_sleep();
        }
        self.cx.now = self.cx.driver.now();
        // While this worker slept the others may have taken the room.
        self.steer_accepting();
        let mut events = 0;
        while let Some(completion) = self.cx.driver.next() {
            events += 1;
            self.on_completion(completion);
        }
        self.serve_accepted();
        if self.acceptor.listening_until.is_some_and(|at| self.cx.now >= at) {
            self.stop_listening();
        }
        while let Some(slot) = self.cx.timers.pop(self.cx.now) {
            self.on_timer(slot);
        }
        self.serve_clients();
        self.refill_short_pools();
        if self.cx.now >= self.pools.upkeep_at {
            self.pools.upkeep_at = self.cx.now + limits::UPKEEP_INTERVAL;
            self.upkeep();
            self.forget_ended();
            self.cx.driver.buffers().release_idle();
        }
        self.publish(events);
        Ok(())
    }

    /// Serves the clients that this turn brought, last: by now it is known which warm connections
    /// have ended.
    fn serve_accepted(&mut self) {
        let mut accepted = std::mem::take(&mut self.acceptor.accepted);
        let mut lighter = if accepted.is_empty() { None } else { self.lighter_worker() };
        for conn in accepted.drain(..) {
            if let Some(conn) = self.hand_over(conn, &mut lighter) {
                self.admit(conn);
            }
        }
        self.acceptor.accepted = accepted;
        if std::mem::take(&mut self.mail.has_some) {
            while let Some(client) = self.mail.own.take_client() {
                if let Some(conn) = self.cx.driver.adopt(client) {
                    self.admit(conn);
                }
            }
        }
    }

    fn admit(&mut self, client: ConnId) {
        if self.sessions() >= self.acceptor.slots {
            self.cx.stats.sessions_opened.add(1);
            self.cx.stats.count_close(CloseReason::Overload);
            self.cx.driver.close(client, Close::Reset);
        } else if self.reuses_conns() {
            self.on_client(client);
        } else {
            self.on_accepted(client);
        }
    }

    fn plan_wait(&mut self) -> Wait {
        if self.load.batcher.window_is_over(self.cx.now) {
            let waited = self.load.core_wait.total();
            self.cx.stats.core_wait.set(waited);
            self.load.batcher.on_window(self.cx.now, waited);
        }
        let Plan { events, batch, contended } = self.load.batcher.plan(self.cx.now);
        // Few connections for many clients bring few answers at a time.
        let events = if self.reuses_conns() {
            events.min((self.pools.table.totals().acquired as u32 / 2).max(1))
        } else {
            events
        };
        let mut most = if self.acceptor.gate.waits_for_turn || self.acceptor.gate.full {
            ROTATION
        } else {
            TURN_MAX
        };
        let due = [
            self.cx.timers.next(),
            self.acceptor.gate.retry_at,
            self.acceptor.listening_until,
            self.pools_need_upkeep_at(),
        ];
        if !(self.requests.due.is_empty() && self.pools.freed.is_empty()) {
            most = Duration::ZERO;
        }
        for at in due.into_iter().flatten() {
            most = most.min(at.saturating_duration_since(self.cx.now));
        }
        Wait { events, batch, most, contended }
    }

    /// Without warm connections or endpoints to watch there is nothing to look over.
    fn pools_need_upkeep_at(&self) -> Option<Instant> {
        self.pools.table.has_entries().then_some(self.pools.upkeep_at)
    }

    fn on_completion(&mut self, completion: Completion) {
        match completion {
            Completion::Accepted(conn) => self.acceptor.accepted.push(conn),
            Completion::AcceptFailed(error) => self.on_accept_failed(&error),
            Completion::Connected(conn) if self.leads_back(conn) => {
                self.on_connect_failed(conn, &leads_back());
            }
            Completion::Connected(conn) => match self.owner(conn) {
                Owner::Session(session, _) => self.on_session_connected(session, conn),
                Owner::Warming { endpoint, since } => self.on_warmed(endpoint, conn, since),
                _ => {}
            },
            Completion::ConnectFailed(conn, error) => self.on_connect_failed(conn, &error),
            Completion::Received(conn, buf) => match self.peek_owner(conn) {
                Some(&Owner::Session(session, side)) => self.on_received(session, side, buf),
                Some(&Owner::Client(client)) => self.on_client_received(client, buf),
                Some(&Owner::InUse(client)) => self.on_reply(client, buf),
                Some(Owner::Warm { .. }) => self.on_greeting(conn, buf),
                _ => self.cx.driver.buffers().give(buf),
            },
            Completion::Spliced(conn, bytes) => {
                if let Some(&Owner::Session(session, side)) = self.peek_owner(conn) {
                    self.on_spliced(session, side, bytes);
                }
            }
            Completion::Ended(conn) => match self.peek_owner(conn) {
                Some(&Owner::Session(session, side)) => self.on_ended(session, side),
                Some(&Owner::Client(client)) => self.on_client_ended(client),
                Some(&Owner::InUse(client)) => self.on_backend_died(client, Retry::Ended),
                Some(&Owner::Warm { endpoint, .. }) => self.on_warm_died(endpoint, conn),
                _ => {}
            },
            Completion::ReceiveFailed(conn) => match self.peek_owner(conn) {
                Some(&Owner::Session(session, side)) => {
                    if side == Side::Backend && self.on_backend_gone(session, true) {
                        return;
                    }
                    self.apply(session, |session, now| session.on_receive_failed(side, now));
                    self.arm_deadline(session);
                }
                Some(&Owner::Client(client)) => self.on_client_broken(client, Side::Client),
                Some(&Owner::InUse(client)) => self.on_client_broken(client, Side::Backend),
                Some(&Owner::Warm { endpoint, .. }) => self.on_warm_died(endpoint, conn),
                Some(Owner::Flushing(_)) => self.end_flush(conn),
                _ => {}
            },
            Completion::Sent(conn, bytes) => match self.peek_owner(conn) {
                Some(&Owner::Session(session, side)) => self.on_sent(session, side, bytes),
                Some(&Owner::Client(client)) => self.on_client_sent(client, bytes),
                Some(&Owner::InUse(client)) => self.on_backend_sent(client, bytes),
                _ => {}
            },
            Completion::SendFailed(conn) => match self.peek_owner(conn) {
                Some(&Owner::Session(session, side)) => {
                    self.apply(session, |session, now| session.on_send_failed(side, now));
                    self.arm_deadline(session);
                }
                Some(&Owner::Client(client)) => self.on_client_broken(client, Side::Client),
                Some(&Owner::InUse(client)) => self.on_backend_broken(client),
                Some(Owner::Flushing(_)) => self.end_flush(conn),
                _ => {}
            },
            Completion::Woken => self.on_mail(),
        }
    }

    /// Starts a connection to a backend, unless that would be this process itself. The endpoints that
    /// discovery finds are looked through for that too; here it is for addresses that have become
    /// this host's since.
    pub(super) fn connect(&mut self, address: &SocketAddr) -> io::Result<ConnId> {
        if self.pools.listening.reached_by(*address, net::is_local).is_some() {
            return Err(leads_back());
        }
        self.cx.driver.connect(&(*address).into())
    }

    /// Whether a connection that was just made has this process at both ends: one of its listeners,
    /// or the connection itself, which the kernel connects to itself where it happens to give it the
    /// port that it is to connect to and nobody listens there.
    fn leads_back(&self, conn: ConnId) -> bool {
        let (Some(from), Some(to)) =
            (self.cx.driver.local_address(conn), self.cx.driver.peer_address(conn))
        else {
            return false;
        };
        let (Some(from), Some(to)) = (from.tcp(), to.tcp()) else { return false };
        from == to || self.pools.listening.reached_by(to, |ip| ip == from.ip()).is_some()
    }

    fn on_connect_failed(&mut self, conn: ConnId, error: &io::Error) {
        match self.owner(conn) {
            Owner::Session(session, _) => self.on_session_connect_failed(session, conn, error),
            Owner::Warming { endpoint, .. } => self.on_warming_failed(endpoint, conn, error),
            _ => {}
        }
    }

    fn on_timer(&mut self, slot: usize) {
        let Some(&Owned { conn, ref owner }) = self.cx.owners.get(slot) else { return };
        match *owner {
            Owner::Session(session, Side::Client) => self.on_session_deadline(session),
            Owner::Session(_, Side::Backend) | Owner::Warming { .. } => {
                self.on_connect_failed(conn, &io::ErrorKind::TimedOut.into());
            }
            Owner::Client(client) => self.on_client_deadline(client),
            Owner::Flushing(flushing) => self.on_flush_timer(conn, flushing),
            Owner::InUse(_) | Owner::Warm { .. } | Owner::None => {}
        }
    }

    /// Looks into the mailbox.
    fn on_mail(&mut self) {
        self.mail.own.clear_wake();
        self.mail.has_some = true;
        if let Some(snapshot) = self.mail.own.take_snapshot() {
            let slow_start = self.cx.config.slow_start.is_some();
            self.pools.table.apply(&snapshot, &self.cx.config.pool, slow_start, self.cx.now);
            self.evict_removed();
            self.cx.stats.applied_generation.set(snapshot.generation);
            self.pools.short.clear();
            self.pools.short.extend(self.pools.table.indices());
            if !self.pools.table.is_empty() {
                self.dispatch_waiting();
            }
            self.place_waiting_again();
        }
        let command = self.mail.own.current_command();
        if command > self.cx.command {
            if self.cx.command == Command::Run {
                self.acceptor.drains_since = Some(self.cx.now);
                self.acceptor.before_drain = self.sessions.len() + self.requests.clients.len();
                self.cx.stats.sessions_before_drain.set(self.acceptor.before_drain as u64);
                self.look_after_all_clients();
                self.cx.stats.set_state(WorkerState::Draining);
            }
            if self.cx.command < Command::Drain && command >= Command::Drain {
                let crowded = self.cx.driver.refuse_handshakes();
                let most = if crowded { HANDSHAKE_AGAIN_MAX } else { HANDSHAKE_MAX };
                self.acceptor.listening_until = Some(self.cx.now + most);
                self.acceptor.gate = AcceptGate::default();
            }
            self.cx.command = command;
            if command == Command::Stop {
                self.stop_listening();
                self.close_all_sessions(CloseReason::DrainDeadline);
                self.close_all_clients(CloseReason::DrainDeadline);
                self.end_all_flushes();
            }
        }
    }

    /// Closes the listeners. The clients that were still in the accept queues become sessions.
    fn stop_listening(&mut self) {
        if self.acceptor.listening_until.take().is_some() {
            self.acceptor.gate = AcceptGate::default();
            let closed = self.cx.driver.stop_listening();
            if !closed && self.cx.command < Command::Stop {
                // Sessions that end leave descriptors for those who wait.
                self.acceptor.listening_until = Some(self.cx.now + ACCEPT_RETRY);
            }
            while let Some(completion) = self.cx.driver.next() {
                self.on_completion(completion);
            }
            self.serve_accepted();
        }
    }

    /// Lets in as many clients as there is room for in the whole process.
    fn steer_accepting(&mut self) {
        if self.cx.command >= Command::Drain {
            // Nobody comes behind those who wait: all are let in, whatever the limit says.
            self.acceptor.gate.retry_at =
                self.acceptor.gate.retry_at.filter(|&at| self.cx.now < at);
            let listens =
                self.acceptor.listening_until.is_some() && self.acceptor.gate.retry_at.is_none();
            let room = self.acceptor.slots.saturating_sub(self.sessions());
            return self.cx.driver.accept(if listens { room } else { 0 });
        }
        let active: usize =
            (0..self.acceptor.everyone.len()).map(|worker| self.load_of(worker)).sum();
        let free = self.acceptor.sessions_max.saturating_sub(active);
        // Each worker takes at most its share of what is left as it looks; of a remainder, some
        // get one each, in turns, so that nobody's clients wait for ever.
        let workers = self.acceptor.everyone.len();
        let alive = self.cx.now.saturating_duration_since(self.acceptor.started);
        let first = (alive.as_millis() / ROTATION.as_millis()) as usize;
        let share =
            free / workers + usize::from((self.acceptor.index + first) % workers < free % workers);
        let share = if free < FREE_SHORT * workers { share.min(1) } else { share };
        // Before the first snapshot there is nowhere to send a client.
        let share = if self.cx.stats.applied_generation.get() == 0 { 0 } else { share };
        if self.acceptor.gate.retry_at.is_some_and(|at| self.cx.now < at) {
            self.cx.driver.accept(0);
            return;
        }
        self.acceptor.gate.retry_at = None;
        if free == 0 && !self.acceptor.gate.full {
            self.cx.stats.accept_pauses.add(1);
            let most = self.acceptor.sessions_max;
            self.complain(format_args!("{most} sessions are open (AEGIS_MAX_SESSIONS): newcomers wait in the kernel's queue"));
        }
        self.acceptor.gate.full = free == 0;
        self.acceptor.gate.waits_for_turn = share == 0 && free > 0;
        self.cx.driver.accept(share);
        if share > 0 && self.cx.driver.is_short_of_descriptors() {
            self.complain(format_args!(
                "descriptors are short (RLIMIT_NOFILE): newcomers wait in the kernel's queue"
            ));
        }
    }

    fn on_accept_failed(&mut self, error: &io::Error) {
        self.cx.stats.accept_errors.add(1);
        if self.cx.command < Command::Drain || self.acceptor.listening_until.is_some() {
            self.acceptor.gate.retry_at = Some(self.cx.now + ACCEPT_RETRY);
        }
        self.complain(format_args!("accepting failed, newcomers wait: {error}"));
    }

    /// A session or a client has gone: what it held may be what accepting lacked.
    pub(super) fn on_session_gone(&mut self, reason: CloseReason, age: Duration) {
        self.cx.stats.count_close(reason);
        self.cx.stats.session_duration.record(age);
        if age < Duration::from_secs(1) {
            self.load.ended_lately += 1;
        }
        if self
            .acceptor
            .drains_since
            .is_some_and(|since| age > self.cx.now.saturating_duration_since(since))
        {
            self.acceptor.before_drain = self.acceptor.before_drain.saturating_sub(1);
            self.cx.stats.sessions_before_drain.set(self.acceptor.before_drain as u64);
        }
        self.on_place_free();
    }

    /// A connection was closed: its place may be what accepting lacked.
    pub(super) fn on_place_free(&mut self) {
        self.publish_sessions();
        self.acceptor.gate.retry_at = None;
    }

    fn complain(&mut self, what: std::fmt::Arguments<'_>) {
        if self.acceptor.gate.complained_at.is_none_or(|at| self.cx.now >= at + COMPLAINT_INTERVAL)
        {
            self.acceptor.gate.complained_at = Some(self.cx.now);
            tracing::warn!(worker = self.acceptor.index, "{what}");
        }
    }

    fn publish(&mut self, events: u64) {
        let stats = &self.cx.stats;
        stats.turns.add(1);
        stats.completions.add(events);
        let alive = self.cx.now.saturating_duration_since(self.acceptor.started);
        stats.heartbeat_ms.set(alive.as_millis() as u64);
        stats.buffer_waits.add(self.cx.driver.buffer_waits() - stats.buffer_waits.get());
        let failures = self.cx.driver.splice_failures() - stats.splice_failures.get();
        stats.splice_failures.add(failures);
        let in_use = self.cx.driver.buffers_lent();
        let buffers = self.cx.driver.buffers();
        stats.buffers_in_use.set(u64::from(buffers.capacity() - buffers.free() - in_use));
    }

    /// Bytes that one direction of a session may have in flight now.
    pub(super) fn in_flight_limit(&mut self) -> u32 {
        limits::in_flight_max(self.cx.driver.buffers().spare())
    }

    /// Whether buffers are short.
    pub(super) fn is_short_of_buffers(&mut self) -> bool {
        limits::buffers_are_short(self.cx.driver.buffers().spare())
    }

    /// Takes note of whose a connection is from now on.
    pub(super) fn own(&mut self, conn: ConnId, owner: Owner) {
        let slot = conn.index();
        while self.cx.owners.len() <= slot {
            self.cx.owners.push(Owned { conn, owner: Owner::None });
        }
        self.cx.owners[slot] = Owned { conn, owner };
    }

    /// Takes a connection's owner out: for connections that change hands.
    pub(super) fn owner(&mut self, conn: ConnId) -> Owner {
        match self.cx.owners.get_mut(conn.index()) {
            Some(owned) if owned.conn == conn => std::mem::take(&mut owned.owner),
            _ => Owner::None,
        }
    }

    pub(super) fn peek_owner(&self, conn: ConnId) -> Option<&Owner> {
        let owned = self.cx.owners.get(conn.index())?;
        (owned.conn == conn).then_some(&owned.owner)
    }

    /// The engine's driver, for tests.
    pub fn driver(&mut self) -> &mut D {
        &mut self.cx.driver
    }

    /// Open sessions, and what is left of some that have ended.
    pub fn sessions(&self) -> usize {
        self.sessions.len() + self.requests.clients.len() + self.flushing
    }

    pub(super) fn publish_sessions(&self) {
        self.cx.stats.sessions_active.set(self.sessions() as u64);
    }

    /// Whether connections are worth keeping: there may be a client that needs one.
    pub(super) fn keeps_pools(&self) -> bool {
        self.cx.command < Command::Drain || !self.requests.clients.is_empty()
    }
}
