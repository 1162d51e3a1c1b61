//! One worker's state: its parts, and what they are made of.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::acceptor::Acceptor;
use super::contention::CoreWait;
use super::context::Context;
use super::load::Load;
use super::mail::Mail;
use super::mailbox::{Command, Mailbox};
pub(super) use super::owners::Owner;
use super::owners::Owners;
use super::places::Places;
use super::sessions::Sessions;
use super::silence::Silence;
use super::timers::Timers;
use crate::config::{Config, Discovery, PoolMode};
use crate::io::{ConnId, Driver, net};
use crate::limits;
use crate::listening::Listening;
use crate::metrics::WorkerStats;
use crate::proxy::WorkerId;
use crate::proxy::balance::Table;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::health::HealthConfig;
use crate::proxy::queue::Queue;
use crate::proxy::request::{Client, Framing, Policy};
use crate::proxy::session::Timeouts;
use crate::slab::{Key, Slab};

/// What an engine needs, apart from its driver.
#[derive(Debug)]
pub struct EngineSetup {
    /// Which worker it is.
    pub worker: WorkerId,
    /// The configuration.
    pub config: Arc<Config>,
    /// Sessions at a time in the whole process.
    pub sessions_max: usize,
    /// Connections of its pools, idle or being made.
    pub pool_conns_max: usize,
    /// The mailboxes of all workers, its own at its number.
    pub mailboxes: Arc<[Arc<Mailbox>]>,
    /// The counters of all workers, its own at its number.
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

/// The address of a backend is one of this process.
pub(super) fn leads_back() -> io::Error {
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
    pub upkeep_at: Instant,
    /// Where backends cannot be.
    listening: Listening,
}

impl Requests {
    /// None, of as many clients as there are places.
    fn new(config: &Config, places: usize) -> Self {
        let reuses_conns = config.pool.mode != PoolMode::Preconnect;
        let clients_max = if reuses_conns { places } else { 0 };
        Self {
            clients: Slab::with_capacity(clients_max),
            policy: Policy::new(config),
            queue: Queue::new(config.requests.queue_max, clients_max),
            due: VecDeque::with_capacity(clients_max),
            releasing: Vec::with_capacity(clients_max),
            scratch: vec![0; Framing::scratch_len(config.protocol, &config.requests)].into(),
        }
    }
}

impl Pools {
    /// Without endpoints, and with room for so many connections.
    fn new(
        config: &Config,
        worker: WorkerId,
        conns_max: usize,
        listening: Listening,
        now: Instant,
    ) -> Self {
        Self {
            table: Table::new(config.balance, worker),
            conns_max: conns_max.min(limits::POOL_CONNS_MAX),
            short: Vec::with_capacity(limits::ENDPOINTS_MAX),
            freed: Vec::with_capacity(limits::ENDPOINTS_MAX),
            health: HealthConfig {
                eject_failures: config.eject_failures,
                eject_time: config.eject_time,
            },
            linger: linger_of(config),
            upkeep_at: now,
            listening,
        }
    }
}

/// One worker's state, bound to a driver.
pub struct Engine<D> {
    pub(super) cx: Context<D>,
    pub(super) acceptor: Acceptor,
    pub(super) mail: Mail,
    pub(super) load: Load,
    pub(super) sessions: Sessions,
    pub(super) requests: Requests,
    pub(super) pools: Pools,
    pub(super) silence: Silence,
}

impl<D: Driver> Engine<D> {
    /// An engine without endpoints: the first snapshot brings them.
    pub fn new(mut driver: D, setup: EngineSetup) -> Self {
        driver.buffers().reserve(limits::buffers_reserved(setup.sessions_max));
        let now = driver.now();
        let conns_max = limits::conns_max(setup.sessions_max);
        let slots = limits::sessions_of_worker_max(setup.sessions_max);
        let EngineSetup { worker, config, .. } = setup;
        let stats = Arc::clone(&setup.stats[usize::from(worker)]);
        let timeouts =
            Timeouts { idle: config.idle_timeout, half_close: config.half_close_timeout };
        Self {
            acceptor: Acceptor::new(setup.sessions_max),
            mail: Mail::new(worker, setup.mailboxes, setup.stats),
            load: Load::new(now, setup.core_wait),
            sessions: Sessions::new(slots, timeouts),
            requests: Requests::new(&config, slots),
            silence: Silence::new(config.tcp_user_timeout),
            pools: Pools::new(&config, worker, setup.pool_conns_max, setup.listening, now),
            cx: Context {
                worker,
                stats,
                owners: Owners::with_capacity(conns_max),
                timers: Timers::new(conns_max, now),
                rng: fastrand::Rng::with_seed(setup.seed),
                now,
                started: setup.started,
                command: Command::Run,
                places: Places::new(slots),
                config,
                driver,
            },
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
    pub(super) fn leads_back(&self, conn: ConnId) -> bool {
        let (Some(from), Some(to)) =
            (self.cx.driver.local_address(conn), self.cx.driver.peer_address(conn))
        else {
            return false;
        };
        let (Some(from), Some(to)) = (from.tcp(), to.tcp()) else { return false };
        from == to || self.pools.listening.reached_by(to, |ip| ip == from.ip()).is_some()
    }

    /// Whether buffers are short.
    pub(super) fn is_short_of_buffers(&mut self) -> bool {
        self.cx.is_short_of_buffers()
    }

    /// Takes note of whose a connection is from now on.
    pub(super) fn own(&mut self, conn: ConnId, owner: Owner) {
        self.cx.owners.set(conn, owner);
    }

    /// Takes a connection's owner out: for connections that change hands.
    pub(super) fn owner(&mut self, conn: ConnId) -> Owner {
        self.cx.owners.take(conn)
    }

    pub(super) fn peek_owner(&self, conn: ConnId) -> Option<&Owner> {
        self.cx.owners.get(conn)
    }

    /// The engine's driver, for tests.
    pub fn driver(&mut self) -> &mut D {
        &mut self.cx.driver
    }

    /// Open sessions, and what is left of some that have ended.
    pub fn sessions(&self) -> usize {
        self.cx.places.taken()
    }

    /// Whether connections are worth keeping: there may be a client that needs one.
    pub(super) fn keeps_pools(&self) -> bool {
        self.cx.command < Command::Drain || !self.requests.clients.is_empty()
    }
}
