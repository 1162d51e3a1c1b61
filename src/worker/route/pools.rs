//! A worker's endpoints and their pools: what fills and empties them, and their health. What happens to
//! sessions and requests with that is the business of whoever calls.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::places::Closing;
use crate::config::{Discovery, RouteConfig};
use crate::io::net::Address;
use crate::io::{Close, ConnId, Driver, Unheard, net};
use crate::limits;
use crate::listening::Listening;
use crate::metrics::{Discard, Failure, RouteStats};
use crate::proxy::balance::Table;
use crate::proxy::endpoints::EndpointId;
use crate::proxy::health::{HealthConfig, PROBE_SETTLED};
use crate::proxy::session::{Session, Tried};
use crate::worker::context::Context;
use crate::worker::owners::Owner;
use crate::worker::socket_options;

/// The endpoints and their pools.
pub(super) struct Pools {
    stats: Arc<RouteStats>,
    pub table: Table,
    /// Pool connections at most, idle or being made, of all endpoints.
    pub conns_max: usize,
    /// Endpoints whose pool may want connections.
    pub short: Vec<EndpointId>,
    /// Endpoints that may have connections for requests that wait.
    pub freed: Vec<EndpointId>,
    pub health: HealthConfig,
    /// For so long an endpoint that left the set is taken to come back, …
    linger: Duration,
    /// … and for so long if another one has taken its place.
    linger_replaced: Duration,
    /// Of connections to backends.
    pub options: net::Options,
    /// Where backends cannot be.
    listening: Listening,
    /// Idle connections of an endpoint at most.
    idle_max: usize,
    /// What the log calls the route, where there are several.
    pub name_in_log: Option<String>,
    /// Connections that were closed, and keep their places until they are in fact.
    pub(super) closing: Vec<Closing>,
    /// Places are to be looked after in this turn.
    pub(super) places_due: bool,
    /// They are to be looked after then: a connection may not be needed any more.
    pub(super) places_at: Option<Instant>,
}

/// For how long an endpoint that left the set is taken to come back.
fn linger_of(config: &RouteConfig) -> Duration {
    match config.discovery {
        Discovery::Dns => {
            let answers =
                config.dns_refresh.min(limits::DNS_CONFIRM) * limits::DNS_ANSWERS_TO_LEAVE;
            answers.max(limits::ENDPOINT_LINGER)
        }
        Discovery::Static | Discovery::Kubernetes => limits::ENDPOINT_LINGER,
    }
}

/// The same if another one has taken its place: then it does not come back, unless name servers have
/// only given other addresses for once.
fn linger_replaced_of(config: &RouteConfig) -> Duration {
    let linger = linger_of(config);
    match config.discovery {
        Discovery::Dns => linger,
        Discovery::Static | Discovery::Kubernetes => {
            config.backend_drain.map_or(linger, |drain| drain.min(linger))
        }
    }
}

/// The address of a backend is one of this process.
pub(super) fn leads_back() -> io::Error {
    io::Error::other("its address leads back to this proxy itself")
}

impl Pools {
    /// Without endpoints, and with room for so many connections.
    pub(super) fn new<D>(
        config: &RouteConfig,
        cx: &Context<D>,
        stats: Arc<RouteStats>,
        conns_max: usize,
        listening: Listening,
        name_in_log: Option<String>,
    ) -> Self {
        Self {
            name_in_log,
            table: Table::new(config.balance, cx.worker, cx.owners.capacity())
                .failing_back_after(config.failback_time),
            stats,
            conns_max: conns_max.min(limits::POOL_CONNS_MAX),
            short: Vec::with_capacity(limits::ENDPOINTS_MAX),
            freed: Vec::with_capacity(limits::ENDPOINTS_MAX),
            health: HealthConfig {
                eject_failures: config.eject_failures,
                eject_time: config.eject_time,
            },
            linger: linger_of(config),
            linger_replaced: linger_replaced_of(config),
            options: socket_options(config),
            listening,
            idle_max: config.pool.most(),
            closing: Vec::with_capacity(cx.owners.capacity().min(limits::POOL_CONNS_MAX)),
            places_due: false,
            places_at: None,
        }
    }

    /// Starts a connection to a backend, unless that would be this process itself. The endpoints that
    /// discovery finds are looked through for that too; here it is for addresses that have become
    /// this host's since.
    pub(super) fn connect<D: Driver>(
        &self,
        cx: &mut Context<D>,
        address: &Address,
    ) -> io::Result<ConnId> {
        if self.listening.reached_by(address, net::is_local).is_some() {
            return Err(leads_back());
        }
        cx.driver.connect(address, &self.options)
    }

    /// Whether a connection that was just made has this process at both ends: one of its listeners,
    /// or the connection itself, which the kernel connects to itself where it happens to give it the
    /// port that it is to connect to and nobody listens there.
    pub(super) fn leads_back<D: Driver>(&self, cx: &Context<D>, conn: ConnId) -> bool {
        let (Some(from), Some(to)) = (cx.driver.local_address(conn), cx.driver.peer_address(conn))
        else {
            // By which other path a Unix socket may have been reached, nobody needs to know.
            return self.listening.paths().any(|path| cx.driver.leads_back_to(conn, path));
        };
        from == to || self.listening.reached_by(&to.into(), |ip| ip == from.ip()).is_some()
    }

    /// For how long an endpoint that left the set is taken to come back.
    pub(super) fn linger_of(&self, endpoint: EndpointId) -> Duration {
        if self.table.is_replaced(endpoint, limits::ENDPOINT_LINGER) {
            self.linger_replaced
        } else {
            self.linger
        }
    }

    /// Remembers that requests that wait may find a connection of an endpoint.
    pub(super) fn free(&mut self, endpoint: EndpointId) {
        if !self.freed.contains(&endpoint) {
            self.freed.push(endpoint);
        }
    }

    /// Remembers that an endpoint's pool may want connections.
    pub(super) fn mark_short(&mut self, endpoint: EndpointId) {
        if !self.short.contains(&endpoint) {
            self.short.push(endpoint);
        }
    }

    pub(super) fn pool_budget_used(&self) -> usize {
        let totals = self.table.totals();
        totals.pooled + totals.acquired
    }

    /// How many connections each endpoint may keep without need, so that there are some for all.
    pub(super) fn pool_share(&self) -> usize {
        (self.conns_max / self.table.len().max(1)).max(1)
    }

    pub(super) fn give_up_oldest<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
    ) -> bool {
        let oldest = self.table.evict(endpoint);
        if let Some(conn) = oldest {
            self.discard(cx, endpoint, conn, Discard::Surplus);
            self.publish_pool(cx, endpoint);
        }
        oldest.is_some()
    }

    /// Discards the idle connections whose end nobody has heard yet, up to the first one that is
    /// open: the next to be taken is proved to be so, at the moment when it changes hands.
    pub(super) fn prove_oldest<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) {
        while let Some(entry) = self.table.get_mut(endpoint)
            && let Some(conn) = entry.pool.oldest_conn(cx.now)
            // Bytes are a greeting.
            && cx.driver.unheard(conn) == Unheard::End
        {
            self.discard_idle(cx, endpoint, conn, Discard::Dead);
        }
    }

    /// Closes a connection that has left its pool.
    pub(super) fn discard<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        conn: ConnId,
        why: Discard,
    ) {
        if let Owner::Idle { mut greeting, .. } = cx.owners.take(conn) {
            cx.driver.buffers().clear(&mut greeting);
        }
        self.stats.count_discard(why);
        cx.close(conn, Close::Graceful);
        self.on_closing(endpoint, Some(conn));
    }

    /// Whether places are to be looked after.
    pub(super) fn has_closed(&self) -> bool {
        self.places_due
    }

    pub(super) fn discard_idle<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        conn: ConnId,
        why: Discard,
    ) {
        let now = cx.now;
        // One that has said something is well, whatever becomes of the connection.
        let is_silent = why == Discard::Dead
            && matches!(cx.owners.get(conn), Some(Owner::Idle { greeting, .. }) if greeting.is_empty());
        let failed = self.table.died(endpoint, conn, now, &mut cx.rng);
        self.discard(cx, endpoint, conn, why);
        if failed && is_silent {
            self.on_endpoint_failure(cx, endpoint, &ended_at_once());
        }
        self.mark_short(endpoint);
    }

    pub(super) fn evict<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        why: Discard,
    ) {
        while let Some(conn) = self.table.evict(endpoint) {
            self.discard(cx, endpoint, conn, why);
        }
    }

    /// Closes the idle connections of an endpoint that were made before this moment.
    pub(super) fn evict_made_before<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        at: Instant,
    ) {
        while let Some(conn) = self.table.evict_made_before(endpoint, at) {
            self.discard(cx, endpoint, conn, Discard::Silent);
        }
    }

    /// A connect to the endpoint succeeded, which proves little.
    pub(super) fn on_endpoint_connected<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
    ) {
        let now = cx.now;
        if let Some(entry) = self.table.get_mut(endpoint) {
            entry.on_alive(now);
            entry.recovery.on_connected();
            entry.stats().connects.add(1);
        }
    }

    /// A byte came from the endpoint on a connection made at `made`.
    pub(super) fn on_endpoint_answered<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        made: Instant,
    ) {
        let now = cx.now;
        if let Some(entry) = self.table.get_mut(endpoint) {
            entry.on_answered(now);
            entry.pool.on_proven(made);
        }
        self.on_endpoint_well(cx, endpoint, made);
    }

    /// The same without the pool's pace: what greets may end each connection that is kept idle.
    pub(super) fn on_endpoint_well<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        made: Instant,
    ) {
        let now = cx.now;
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        if entry.health.is_sound() {
            return;
        }
        let readmitted = entry.health.on_success(made, now);
        if entry.health.is_sound() {
            entry.recovery.on_well();
        }
        entry.stats().failures_in_a_row.set(u64::from(entry.health.failures()));
        if readmitted {
            self.on_readmitted(endpoint);
        }
    }

    /// A session's connect is over, or of no use any more. Says when it was started, if there was one.
    pub(super) fn on_connect_over(&mut self, session: &mut Session) -> Option<Instant> {
        let since = session.take_connect()?;
        if let Some(entry) = session.endpoint().and_then(|at| self.table.get_mut(at)) {
            entry.recovery.on_connect_over();
        }
        Some(since)
    }

    pub(super) fn on_readmitted(&mut self, endpoint: EndpointId) {
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        // One that was only in doubt was never said to be ejected.
        if entry.stats().ejected.get() > 0 {
            entry.stats().ejected.set(0);
            tracing::info!(
                route = self.name_in_log.as_deref(),
                endpoint = entry.endpoint.name,
                "usable again"
            );
        }
        self.free(endpoint);
        self.mark_short(endpoint);
    }

    /// A connect to the endpoint failed.
    pub(super) fn on_endpoint_unreachable<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        error: &io::Error,
    ) {
        if let Some(entry) = self.table.get_mut(endpoint) {
            entry.stats().connect_failures.add(1);
            entry.recovery.on_unreachable();
        }
        self.on_endpoint_failure(cx, endpoint, error);
    }

    /// The endpoint has failed, whoever its clients are: a connect to it, or what it had accepted
    /// ended at once, unasked.
    pub(super) fn on_endpoint_failure<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        error: &io::Error,
    ) {
        if let Some(entry) = self.table.get_mut(endpoint) {
            entry.recovery.on_failed(cx.now, &mut cx.rng);
        }
        self.count_failure(cx, endpoint, error);
    }

    /// The endpoint has failed, once more in a row.
    fn count_failure<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        error: &io::Error,
    ) {
        let (now, health) = (cx.now, self.health);
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        let ejected = entry.on_failure(&health, now, &mut cx.rng);
        let stats = entry.stats();
        stats.set_failure(Failure::of(error));
        stats.failures_in_a_row.set(u64::from(entry.health.failures()));
        if ejected {
            // A probe that fails ejects again; that is no news.
            if stats.ejected.get() == 0 {
                tracing::warn!(route = self.name_in_log.as_deref(), endpoint = entry.endpoint.name, %error, "ejected");
            }
            self.on_ejected(cx, endpoint);
        }
        self.table.judge_tiers(now);
    }

    fn on_ejected<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) {
        let Some(entry) = self.table.get(endpoint) else { return };
        entry.stats().ejections.add(1);
        entry.stats().ejected.set(1);
        self.empty_pool(cx, endpoint, Discard::Endpoint);
    }

    /// Ejects an endpoint that fails, and that no client tries any more: others stand in for it.
    pub(super) fn eject<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) {
        let (now, health) = (cx.now, self.health);
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        if entry.health.eject(&health, now, &mut cx.rng) {
            entry.stats().failures_in_a_row.set(u64::from(entry.health.failures()));
            tracing::warn!(
                route = self.name_in_log.as_deref(),
                endpoint = entry.endpoint.name,
                "ejected: others stand in for it"
            );
            self.on_ejected(cx, endpoint);
        }
    }

    /// Closes all idle connections of an endpoint, which get replaced little by little.
    pub(super) fn empty_pool<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        why: Discard,
    ) {
        let now = cx.now;
        if let Some(entry) = self.table.get_mut(endpoint) {
            entry.pool.on_emptied(now, &mut cx.rng);
        }
        self.evict(cx, endpoint, why);
    }

    /// An endpoint ended a fresh connection at once, without a byte on it. If it was asked something,
    /// that may be its answer to this one client: see [`Pools::may_mean_one_client`]. Likewise others
    /// wait for it only once it is ejected.
    pub(super) fn on_failed_at_once<D: Driver>(
        &mut self,
        cx: &mut Context<D>,
        endpoint: EndpointId,
        was_asked: bool,
    ) {
        let now = cx.now;
        if let Some(entry) = self.table.get_mut(endpoint) {
            entry.pool.on_failed(now, &mut cx.rng);
        }
        if was_asked && self.may_mean_one_client(endpoint, now) {
            return;
        }
        self.count_failure(cx, endpoint, &ended_at_once());
        if let Some(entry) = self.table.get_mut(endpoint)
            && (!was_asked || !entry.health.is_usable())
        {
            entry.recovery.on_failed(now, &mut cx.rng);
        }
    }

    /// Whether an endpoint that has just ended a connection answers others, who would have to wait if it
    /// were ejected. Where there is another one to go to, it is rather taken for ill too soon.
    fn may_mean_one_client(&self, endpoint: EndpointId, now: Instant) -> bool {
        let mut this = Tried::default();
        this.push(endpoint);
        let answers = self.table.get(endpoint).is_some_and(|entry| entry.has_answered_lately(now));
        answers && !self.table.has_other(&this)
    }

    /// Re-admits an endpoint whose probe has stayed open for a while.
    pub(super) fn look_at_probe<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) {
        let (now, health) = (cx.now, self.health);
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        if entry.pool.has_settled(PROBE_SETTLED, now) {
            if entry.health.on_settled(&health, now) {
                self.on_readmitted(endpoint);
            }
        } else if entry.pool.idle() + entry.pool.connecting() == 0 {
            // Somebody took it, who has not been answered yet.
            entry.health.on_probe_lost(now);
        }
        self.drop_surplus_of(cx, endpoint);
    }

    /// A probe is kept even where no idle connections are; then it has served its purpose.
    pub(super) fn drop_surplus_of<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) {
        let most = self.idle_max;
        while let Some(entry) = self.table.get_mut(endpoint)
            && entry.health.is_usable()
            && entry.pool.idle() > most
        {
            self.give_up_oldest(cx, endpoint);
        }
    }

    pub(super) fn publish_pool<D: Driver>(&mut self, cx: &mut Context<D>, endpoint: EndpointId) {
        let now = cx.now;
        let Some(entry) = self.table.get_mut(endpoint) else { return };
        let (pool, stats) = (&entry.pool, entry.stats());
        stats.pool_target.set(pool.target() as u64);
        stats.pool_oldest_ms.set(pool.oldest(now).map_or(0, |age| age.as_millis() as u64));
    }
}

/// Why a connection must not be acquired, by what is unheard of it.
pub(super) fn why_not_acquired(unheard: Unheard) -> Option<Discard> {
    match unheard {
        Unheard::Nothing => None,
        Unheard::Bytes => Some(Discard::Unexpected),
        Unheard::End => Some(Discard::Dead),
    }
}

/// What an endpoint is ejected for that accepts only to close again.
pub(super) fn ended_at_once() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it ended a connection at once, without a byte")
}

/// Whether a connect failed for want of something on this side, which is no fault of the endpoint.
pub(super) fn is_local(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::QuotaExceeded
        || matches!(
            error.raw_os_error(),
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM | libc::EADDRNOTAVAIL)
        )
}
