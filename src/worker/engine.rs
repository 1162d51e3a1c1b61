//! The turn of a worker: wait for events, handle each, then see to commands, timers and pools.

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
use crate::io::{Chain, Close, Completion, ConnId, Driver, Wait, socket};
use crate::limits;
use crate::listening::Listening;
use crate::metrics::{CloseReason, Retry, WorkerState, WorkerStats};
use crate::proxy::Side;
use crate::proxy::balance::Table;
use crate::proxy::health::HealthConfig;
use crate::proxy::pulse::Patience;
use crate::proxy::queue::Queue;
use crate::proxy::request::{Client, Limits as ClientLimits};
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
    Session(Key, Side),
    /// Being made for a pool, or to probe an endpoint.
    Warming { endpoint: u16, since: Instant },
    /// A client's whose requests are told apart.
    Client(Key),
    /// In the hands of such a client.
    InUse(Key),
    /// Warm in a pool, with what the backend has sent unasked.
    Warm { endpoint: u16, greeting: Chain },
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

/// One worker's state, bound to a driver.
pub struct Engine<D> {
    pub(super) driver: D,
    pub(super) config: Arc<Config>,
    pub(super) timeouts: Timeouts,
    pub(super) health: HealthConfig,
    /// For so long an endpoint that left the set is taken to come back.
    pub(super) linger: Duration,
    pub(super) stats: Arc<WorkerStats>,
    pub(super) sessions: Slab<Session>,
    /// Clients whose requests are told apart.
    pub(super) clients: Slab<Client>,
    /// Sessions, clients and connections that are being flushed, all together: each of the first
    /// two has as many slots, so that whatever was let in has one, whatever becomes of it.
    pub(super) slots: usize,
    pub(super) client_limits: ClientLimits,
    pub(super) queue: Queue,
    /// Clients to be looked at before the turn ends.
    pub(super) due: VecDeque<Key>,
    /// Clients whose connection is to be given back before the turn ends.
    pub(super) releasing: Vec<Key>,
    /// Connections that are closed once their peers have what was sent to them.
    pub(super) flushing: usize,
    /// Connections that clients hold.
    pub(super) conns_in_use: u32,
    /// Endpoints that may have connections for requests that wait.
    pub(super) freed: Vec<u16>,
    /// For a request that lies in several buffers.
    pub(super) scratch: Box<[u8]>,
    pub(super) owners: Vec<Owned>,
    pub(super) table: Table,
    pub(super) timers: Timers,
    pub(super) rng: fastrand::Rng,
    pub(super) now: Instant,
    pub(super) command: Command,
    /// Pool connections, warm or being made, of all endpoints.
    pub(super) pool_conns: usize,
    pub(super) pool_conns_max: usize,
    /// Endpoints whose pool may want connections.
    pub(super) short_pools: Vec<u16>,
    /// How long peers may acknowledge nothing.
    pub(super) patience: Option<Patience>,
    /// The slot of the connection that was looked at last for that.
    pub(super) looked_at: usize,
    pub(super) batcher: Batcher,
    core_wait: CoreWait,
    /// Sessions shorter than a second that ended within about a second.
    pub(super) ended_lately: usize,
    /// In a drain, the listeners stay open until then.
    listening_until: Option<Instant>,
    /// When it was told to let clients leave.
    pub(super) drains_since: Option<Instant>,
    /// Sessions and clients that were open then, and are.
    before_drain: usize,
    /// Clients to be served at the end of the turn.
    accepted: Vec<ConnId>,
    /// Clients may have been handed over.
    has_mail: bool,
    mailbox: Arc<Mailbox>,
    pub(super) mailboxes: Arc<[Arc<Mailbox>]>,
    pub(super) everyone: Arc<[Arc<WorkerStats>]>,
    pub(super) index: usize,
    sessions_max: usize,
    started: Instant,
    listening: Listening,
    upkeep_at: Instant,
    gate: AcceptGate,
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
            clients: Slab::with_capacity(clients_max),
            slots,
            client_limits: ClientLimits {
                idle: config.idle_timeout,
                half_close: config.half_close_timeout,
                queue: config.requests.queue_timeout,
                endpoint: config.endpoint_wait,
                request: config.requests.timeout,
            },
            queue: Queue::new(config.requests.queue_max, clients_max),
            due: VecDeque::with_capacity(clients_max),
            releasing: Vec::with_capacity(clients_max),
            flushing: 0,
            conns_in_use: 0,
            freed: Vec::with_capacity(limits::ENDPOINTS_MAX),
            scratch: vec![0; config.requests.line_max].into(),
            timeouts: Timeouts { idle: config.idle_timeout, half_close: config.half_close_timeout },
            health: HealthConfig {
                eject_failures: config.eject_failures,
                eject_time: config.eject_time,
            },
            linger: linger_of(&config),
            stats: Arc::clone(&setup.stats[setup.index]),
            sessions: Slab::with_capacity(slots),
            owners: Vec::with_capacity(conns_max),
            table: Table::new(config.balance, setup.index),
            timers: Timers::new(conns_max, now),
            rng: fastrand::Rng::with_seed(setup.seed),
            now,
            command: Command::Run,
            pool_conns: 0,
            pool_conns_max: setup.pool_conns_max.min(limits::POOL_CONNS_MAX),
            short_pools: Vec::with_capacity(limits::ENDPOINTS_MAX),
            patience: config.tcp_user_timeout.map(|limit| Patience { limit }),
            looked_at: 0,
            batcher: Batcher::new(now, setup.core_wait.total()),
            core_wait: setup.core_wait,
            ended_lately: 0,
            listening_until: None,
            drains_since: None,
            before_drain: 0,
            // More than that come in the one turn of a drain, which may allocate.
            accepted: Vec::with_capacity(limits::LISTEN_BACKLOG as usize),
            has_mail: false,
            mailbox: Arc::clone(&setup.mailboxes[setup.index]),
            mailboxes: setup.mailboxes,
            everyone: setup.stats,
            index: setup.index,
            sessions_max: setup.sessions_max,
            started: setup.started,
            listening: setup.listening,
            upkeep_at: now,
            gate: AcceptGate::default(),
            config,
            driver,
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
        self.driver.wait(Wait::for_one(Duration::ZERO)).map(drop)
    }

    /// Whether it was told to end and nothing is left to do.
    pub fn is_finished(&self) -> bool {
        self.command >= Command::Drain
            && self.listening_until.is_none()
            && self.sessions() == 0
            && self.mailbox.clients() == 0
    }

    /// One turn.
    ///
    /// # Errors
    /// The driver cannot go on.
    pub fn turn(&mut self) -> io::Result<()> {
        self.steer_accepting();
        let wait = self.plan_wait();
        if self.driver.wait(wait)? {
            self.batcher.on_sleep();
        }
        self.now = self.driver.now();
        // While this worker slept the others may have taken the room.
        self.steer_accepting();
        let mut events = 0;
        while let Some(completion) = self.driver.next() {
            events += 1;
            self.on_completion(completion);
        }
        self.serve_accepted();
        if self.listening_until.is_some_and(|at| self.now >= at) {
            self.stop_listening();
        }
        while let Some(slot) = self.timers.pop(self.now) {
            self.on_timer(slot);
        }
        self.serve_clients();
        self.refill_short_pools();
        if self.now >= self.upkeep_at {
            self.upkeep_at = self.now + limits::UPKEEP_INTERVAL;
            self.upkeep();
            self.forget_ended();
            self.driver.buffers().release_idle();
        }
        self.publish(events);
        Ok(())
    }

    /// Serves the clients that this turn brought, last: by now it is known which warm connections
    /// have ended.
    fn serve_accepted(&mut self) {
        let mut accepted = std::mem::take(&mut self.accepted);
        let mut lighter = if accepted.is_empty() { None } else { self.lighter_worker() };
        for conn in accepted.drain(..) {
            if let Some(conn) = self.hand_over(conn, &mut lighter) {
                self.admit(conn);
            }
        }
        self.accepted = accepted;
        if std::mem::take(&mut self.has_mail) {
            while let Some(client) = self.mailbox.take_client() {
                if let Some(conn) = self.driver.adopt(client) {
                    self.admit(conn);
                }
            }
        }
    }

    fn admit(&mut self, client: ConnId) {
        if self.sessions() >= self.slots {
            self.stats.sessions_opened.add(1);
            self.stats.count_close(CloseReason::Overload);
            self.driver.close(client, Close::Reset);
        } else if self.reuses_conns() {
            self.on_client(client);
        } else {
            self.on_accepted(client);
        }
    }

    fn plan_wait(&mut self) -> Wait {
        if self.batcher.window_is_over(self.now) {
            let waited = self.core_wait.total();
            self.stats.core_wait.set(waited);
            self.batcher.on_window(self.now, waited);
        }
        let Plan { events, batch, contended } = self.batcher.plan(self.now);
        // Few connections for many clients bring few answers at a time.
        let events =
            if self.reuses_conns() { events.min((self.conns_in_use / 2).max(1)) } else { events };
        let mut most = if self.gate.waits_for_turn || self.gate.full { ROTATION } else { TURN_MAX };
        let due = [
            self.timers.next(),
            self.gate.retry_at,
            self.listening_until,
            self.pools_need_upkeep_at(),
        ];
        if !(self.due.is_empty() && self.freed.is_empty()) {
            most = Duration::ZERO;
        }
        for at in due.into_iter().flatten() {
            most = most.min(at.saturating_duration_since(self.now));
        }
        Wait { events, batch, most, contended }
    }

    /// Without warm connections or endpoints to watch there is nothing to look over.
    fn pools_need_upkeep_at(&self) -> Option<Instant> {
        self.table.has_entries().then_some(self.upkeep_at)
    }

    fn on_completion(&mut self, completion: Completion) {
        match completion {
            Completion::Accepted(conn) => self.accepted.push(conn),
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
                _ => self.driver.buffers().give(buf),
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
        if self.listening.reached_by(*address, socket::is_local).is_some() {
            return Err(leads_back());
        }
        self.driver.connect(address)
    }

    /// Whether a connection that was just made has this process at both ends: one of its listeners,
    /// or the connection itself, which the kernel connects to itself where it happens to give it the
    /// port that it is to connect to and nobody listens there.
    fn leads_back(&self, conn: ConnId) -> bool {
        let (Some(from), Some(to)) =
            (self.driver.local_address(conn), self.driver.peer_address(conn))
        else {
            return false;
        };
        from == to || self.listening.reached_by(to, |ip| ip == from.ip()).is_some()
    }

    fn on_connect_failed(&mut self, conn: ConnId, error: &io::Error) {
        match self.owner(conn) {
            Owner::Session(session, _) => self.on_session_connect_failed(session, conn, error),
            Owner::Warming { endpoint, .. } => self.on_warming_failed(endpoint, conn, error),
            _ => {}
        }
    }

    fn on_timer(&mut self, slot: usize) {
        let Some(&Owned { conn, ref owner }) = self.owners.get(slot) else { return };
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
        self.mailbox.clear_wake();
        self.has_mail = true;
        if let Some(snapshot) = self.mailbox.take_snapshot() {
            let slow_start = self.config.slow_start.is_some();
            self.table.apply(&snapshot, &self.config.pool, slow_start, self.now);
            self.evict_removed();
            self.stats.applied_generation.set(snapshot.generation);
            self.short_pools.clear();
            self.short_pools.extend(self.table.indices());
            if !self.table.is_empty() {
                self.dispatch_waiting();
            }
            self.place_waiting_again();
        }
        let command = self.mailbox.current_command();
        if command > self.command {
            if self.command == Command::Run {
                self.drains_since = Some(self.now);
                self.before_drain = self.sessions.len() + self.clients.len();
                self.stats.sessions_before_drain.set(self.before_drain as u64);
                self.look_after_all_clients();
                self.stats.set_state(WorkerState::Draining);
            }
            if self.command < Command::Drain && command >= Command::Drain {
                let crowded = self.driver.refuse_handshakes();
                let most = if crowded { HANDSHAKE_AGAIN_MAX } else { HANDSHAKE_MAX };
                self.listening_until = Some(self.now + most);
                self.gate = AcceptGate::default();
            }
            self.command = command;
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
        if self.listening_until.take().is_some() {
            self.gate = AcceptGate::default();
            let closed = self.driver.stop_listening();
            if !closed && self.command < Command::Stop {
                // Sessions that end leave descriptors for those who wait.
                self.listening_until = Some(self.now + ACCEPT_RETRY);
            }
            while let Some(completion) = self.driver.next() {
                self.on_completion(completion);
            }
            self.serve_accepted();
        }
    }

    /// Lets in as many clients as there is room for in the whole process.
    fn steer_accepting(&mut self) {
        if self.command >= Command::Drain {
            // Nobody comes behind those who wait: all are let in, whatever the limit says.
            self.gate.retry_at = self.gate.retry_at.filter(|&at| self.now < at);
            let listens = self.listening_until.is_some() && self.gate.retry_at.is_none();
            let room = self.slots.saturating_sub(self.sessions());
            return self.driver.accept(if listens { room } else { 0 });
        }
        let active: usize = (0..self.everyone.len()).map(|worker| self.load_of(worker)).sum();
        let free = self.sessions_max.saturating_sub(active);
        // Each worker takes at most its share of what is left as it looks; of a remainder, some
        // get one each, in turns, so that nobody's clients wait for ever.
        let workers = self.everyone.len();
        let alive = self.now.saturating_duration_since(self.started);
        let first = (alive.as_millis() / ROTATION.as_millis()) as usize;
        let share = free / workers + usize::from((self.index + first) % workers < free % workers);
        let share = if free < FREE_SHORT * workers { share.min(1) } else { share };
        // Before the first snapshot there is nowhere to send a client.
        let share = if self.stats.applied_generation.get() == 0 { 0 } else { share };
        if self.gate.retry_at.is_some_and(|at| self.now < at) {
            self.driver.accept(0);
            return;
        }
        self.gate.retry_at = None;
        if free == 0 && !self.gate.full {
            self.stats.accept_pauses.add(1);
            let most = self.sessions_max;
            self.complain(format_args!("{most} sessions are open (AEGIS_MAX_SESSIONS): newcomers wait in the kernel's queue"));
        }
        self.gate.full = free == 0;
        self.gate.waits_for_turn = share == 0 && free > 0;
        self.driver.accept(share);
        if share > 0 && self.driver.is_short_of_descriptors() {
            self.complain(format_args!(
                "descriptors are short (RLIMIT_NOFILE): newcomers wait in the kernel's queue"
            ));
        }
    }

    fn on_accept_failed(&mut self, error: &io::Error) {
        self.stats.accept_errors.add(1);
        if self.command < Command::Drain || self.listening_until.is_some() {
            self.gate.retry_at = Some(self.now + ACCEPT_RETRY);
        }
        self.complain(format_args!("accepting failed, newcomers wait: {error}"));
    }

    /// A session or a client has gone: what it held may be what accepting lacked.
    pub(super) fn on_session_gone(&mut self, reason: CloseReason, age: Duration) {
        self.stats.count_close(reason);
        self.stats.session_duration.record(age);
        if age < Duration::from_secs(1) {
            self.ended_lately += 1;
        }
        if self.drains_since.is_some_and(|since| age > self.now.saturating_duration_since(since)) {
            self.before_drain = self.before_drain.saturating_sub(1);
            self.stats.sessions_before_drain.set(self.before_drain as u64);
        }
        self.on_place_free();
    }

    /// A connection was closed: its place may be what accepting lacked.
    pub(super) fn on_place_free(&mut self) {
        self.publish_sessions();
        self.gate.retry_at = None;
    }

    fn complain(&mut self, what: std::fmt::Arguments<'_>) {
        if self.gate.complained_at.is_none_or(|at| self.now >= at + COMPLAINT_INTERVAL) {
            self.gate.complained_at = Some(self.now);
            tracing::warn!(worker = self.index, "{what}");
        }
    }

    fn publish(&mut self, events: u64) {
        let stats = &self.stats;
        stats.turns.add(1);
        stats.completions.add(events);
        let alive = self.now.saturating_duration_since(self.started);
        stats.heartbeat_ms.set(alive.as_millis() as u64);
        stats.buffer_waits.add(self.driver.buffer_waits() - stats.buffer_waits.get());
        let failures = self.driver.splice_failures() - stats.splice_failures.get();
        stats.splice_failures.add(failures);
        let in_use = self.driver.buffers_lent();
        let buffers = self.driver.buffers();
        stats.buffers_in_use.set(u64::from(buffers.capacity() - buffers.free() - in_use));
    }

    /// Bytes that one direction of a session may have in flight now.
    pub(super) fn in_flight_limit(&mut self) -> u32 {
        limits::in_flight_max(self.driver.buffers().spare())
    }

    /// Whether buffers are short.
    pub(super) fn is_short_of_buffers(&mut self) -> bool {
        limits::buffers_are_short(self.driver.buffers().spare())
    }

    /// Takes note of whose a connection is from now on.
    pub(super) fn own(&mut self, conn: ConnId, owner: Owner) {
        let slot = conn.index();
        while self.owners.len() <= slot {
            self.owners.push(Owned { conn, owner: Owner::None });
        }
        self.owners[slot] = Owned { conn, owner };
    }

    /// Takes a connection's owner out: for connections that change hands.
    pub(super) fn owner(&mut self, conn: ConnId) -> Owner {
        match self.owners.get_mut(conn.index()) {
            Some(owned) if owned.conn == conn => std::mem::take(&mut owned.owner),
            _ => Owner::None,
        }
    }

    pub(super) fn peek_owner(&self, conn: ConnId) -> Option<&Owner> {
        let owned = self.owners.get(conn.index())?;
        (owned.conn == conn).then_some(&owned.owner)
    }

    /// The engine's driver, for tests.
    pub fn driver(&mut self) -> &mut D {
        &mut self.driver
    }

    /// Open sessions, and what is left of some that have ended.
    pub fn sessions(&self) -> usize {
        self.sessions.len() + self.clients.len() + self.flushing
    }

    pub(super) fn publish_sessions(&self) {
        self.stats.sessions_active.set(self.sessions() as u64);
    }

    /// Whether connections are worth keeping: there may be a client that needs one.
    pub(super) fn keeps_pools(&self) -> bool {
        self.command < Command::Drain || !self.clients.is_empty()
    }
}
