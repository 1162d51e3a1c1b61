//! One worker's state: its parts, and what they are made of.

use std::collections::VecDeque;
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
use super::pools::Pools;
use super::sessions::Sessions;
use super::silence::Silence;
use super::timers::Timers;
use crate::config::{Config, PoolMode, RouteConfig};
use crate::io::Driver;
use crate::limits;
use crate::listening::Listening;
use crate::metrics::WorkerStats;
use crate::proxy::WorkerId;
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

/// Clients whose requests are framed.
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

impl Requests {
    /// None, of as many clients as there are places.
    fn new(config: &RouteConfig, drain_delay: Duration, places: usize) -> Self {
        let reuses_conns = config.pool.mode != PoolMode::Preconnect;
        let clients_max = if reuses_conns { places } else { 0 };
        Self {
            clients: Slab::with_capacity(clients_max),
            policy: Policy::new(config, drain_delay),
            queue: Queue::new(config.requests.queue_max, clients_max),
            due: VecDeque::with_capacity(clients_max),
            releasing: Vec::with_capacity(clients_max),
            scratch: vec![0; Framing::scratch_len(config.protocol, &config.requests)].into(),
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
        let EngineSetup { worker, .. } = setup;
        let drain_delay = setup.config.drain_delay;
        let config = Arc::clone(&setup.config.routes[0]);
        let stats = Arc::clone(&setup.stats[usize::from(worker)]);
        let timeouts =
            Timeouts { idle: config.idle_timeout, half_close: config.half_close_timeout };
        Self {
            acceptor: Acceptor::new(setup.sessions_max),
            mail: Mail::new(worker, setup.mailboxes, setup.stats),
            load: Load::new(now, setup.core_wait),
            sessions: Sessions::new(slots, timeouts),
            requests: Requests::new(&config, drain_delay, slots),
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
