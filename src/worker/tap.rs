//! The tap: captures what one new client says and is told, for who asks for it by the control socket.
//!
//! The control thread offers the memory for it to all workers, and whoever lets the first client in
//! that fits takes it. It is handed back when that client's connection is closed, the memory is full,
//! the time is over, or the worker drains. Neither of the two waits for the other.
//!
//! Connections of nobody's interest pay a comparison for each buffer sent: nothing is noted at them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::Instant;

use crossbeam_queue::ArrayQueue;
use tokio::sync::oneshot;

use super::context::Context;
use crate::capture::{Capture, What};
use crate::io::{Buf, Close, Completion, ConnId, Driver};
use crate::proxy::endpoints::Endpoint;
use crate::proxy::{RouteId, WorkerId};

/// What is offered to all workers, and taken by one.
#[derive(Debug)]
pub struct Offer {
    route: Option<RouteId>,
    /// The endpoint's name, where only clients of one are of interest.
    endpoint: Option<String>,
    /// Clients that are let pass before the one that is captured.
    passes: AtomicU32,
    room: ArrayQueue<Room>,
    is_over: AtomicBool,
}

/// Where to write to, and whom to hand it back to.
#[derive(Debug)]
struct Room {
    capture: Capture,
    done: oneshot::Sender<Tapped>,
}

/// What has come of an offer that was taken.
#[derive(Debug)]
pub struct Tapped {
    /// What was captured.
    pub capture: Capture,
    /// Why it ends there.
    pub end: TapEnd,
    /// Of which client. None: none came, or none that got the endpoint.
    pub client: Option<TappedClient>,
}

/// Why a capture has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapEnd {
    /// The client's connection was closed.
    Closed,
    /// There was no room for more.
    Full,
    /// Who has made the offer has ended it.
    Over,
    /// The worker drains.
    Drain,
}

/// The client that is captured.
#[derive(Debug, Clone)]
pub struct TappedClient {
    /// The route that it came by.
    pub route: RouteId,
    /// Its worker.
    pub worker: WorkerId,
    /// Its address. None by a Unix socket, or if it is gone already.
    pub address: Option<SocketAddr>,
    /// The address that it connected to. None by a Unix socket.
    pub local_address: Option<SocketAddr>,
    /// The endpoint that served it last.
    pub endpoint: Option<Arc<Endpoint>>,
    /// When the worker let it in.
    pub since: Instant,
}

impl Offer {
    /// An offer to capture a client, of this route or of any, that comes behind so many others of it,
    /// and gets the endpoint of this name first, or any; and where it is handed back.
    pub fn new(
        route: Option<RouteId>,
        endpoint: Option<String>,
        passes: u32,
        capture: Capture,
    ) -> (Arc<Self>, oneshot::Receiver<Tapped>) {
        let (done, tapped) = oneshot::channel();
        let room = ArrayQueue::new(1);
        let pushed = room.push(Room { capture, done });
        debug_assert!(pushed.is_ok(), "it was empty");
        let (passes, is_over) = (AtomicU32::new(passes), AtomicBool::new(false));
        (Arc::new(Self { route, endpoint, passes, room, is_over }), tapped)
    }

    /// Ends it. Says whether a worker has taken it, which hands it back once it looks.
    pub fn end(&self) -> bool {
        self.is_over.store(true, Relaxed);
        self.room.pop().is_none()
    }

    /// Hands the room back of which nobody has made use, if it is there.
    fn hand_back(&self, end: TapEnd) {
        if let Some(Room { capture, done }) = self.room.pop() {
            // Who made the offer may be gone with the control thread.
            let _ = done.send(Tapped { capture, end, client: None });
        }
    }

    /// Takes the room, for a new client of a route. None where it is for another one, or was taken.
    fn take_for(&self, route: RouteId) -> Option<Room> {
        if self.route.is_some_and(|wanted| wanted != route) || self.room.is_empty() {
            return None;
        }
        let passes = self.passes.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        passes.is_err().then(|| self.room.pop()).flatten()
    }
}

/// The tap of one worker.
#[derive(Debug, Default)]
pub(super) struct Tap {
    /// The latest offer.
    offer: Option<Arc<Offer>>,
    running: Option<Running>,
}

/// A client that is captured.
#[derive(Debug)]
struct Running {
    conn: ConnId,
    offer: Arc<Offer>,
    room: Room,
    client: TappedClient,
}

impl Running {
    /// Whether this client is known to be the one that is asked for: it may have no endpoint yet.
    fn is_asked_for(&self) -> bool {
        self.offer.endpoint.is_none() || self.client.endpoint.is_some()
    }
}

impl Tap {
    /// Whether a client is captured.
    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Whether this is the connection of the client that is captured.
    #[inline]
    pub(super) fn is_of(&self, conn: ConnId) -> bool {
        self.running.as_ref().is_some_and(|running| running.conn == conn)
    }

    /// The control thread makes an offer, or has ended one.
    pub(super) fn on_offer(&mut self, offer: Arc<Offer>) {
        if offer.is_over.load(Relaxed) {
            offer.hand_back(TapEnd::Over);
            self.offer = None;
        } else {
            self.offer = Some(offer);
        }
        if self.running.as_ref().is_some_and(|running| running.offer.is_over.load(Relaxed)) {
            self.finish(TapEnd::Over);
        }
    }

    /// The worker drains.
    pub(super) fn on_drain(&mut self) {
        self.finish(TapEnd::Drain);
        if let Some(offer) = self.offer.take() {
            offer.hand_back(TapEnd::Drain);
        }
    }

    /// The client that is captured has got an endpoint. Where that was to be another one, the next client
    /// is captured in its place.
    pub(super) fn on_endpoint(&mut self, endpoint: &Arc<Endpoint>) {
        let Some(mut running) = self.running.take() else { return };
        let wanted = running.offer.endpoint.as_deref();
        let is_first = running.client.endpoint.is_none();
        if is_first && wanted.is_some_and(|wanted| wanted != endpoint.name) {
            return self.offer_again(running);
        }
        running.client.endpoint = Some(Arc::clone(endpoint));
        let is_full = running.room.capture.is_full();
        self.running = Some(running);
        if is_full {
            self.finish(TapEnd::Full);
        }
    }

    /// The client that was captured is not the one that is asked for.
    fn offer_again(&mut self, Running { offer, mut room, .. }: Running) {
        room.capture.clear();
        let pushed = offer.room.push(room);
        debug_assert!(pushed.is_ok(), "it was taken out");
        self.on_offer(offer);
    }

    #[cold]
    fn add(&mut self, now: Instant, what: What, payload: &[u8]) {
        let Some(running) = &mut self.running else { return };
        let at = now.saturating_duration_since(running.client.since);
        let has_room = running.room.capture.add(at, what, payload);
        if !has_room && running.is_asked_for() {
            self.finish(TapEnd::Full);
        }
    }

    #[cold]
    fn add_end(&mut self, now: Instant, what: What) {
        let Some(Running { room, client, .. }) = &mut self.running else { return };
        room.capture.add_end(now.saturating_duration_since(client.since), what);
    }

    /// Hands back what was captured, if it is of the client that is asked for. One that leaves without an
    /// endpoint makes way for the next.
    fn finish(&mut self, end: TapEnd) {
        let Some(running) = self.running.take() else { return };
        let is_asked_for = running.is_asked_for();
        if !is_asked_for && end == TapEnd::Closed {
            return self.offer_again(running);
        }
        let Running { room: Room { capture, done }, client, .. } = running;
        let _ = done.send(Tapped { capture, end, client: is_asked_for.then_some(client) });
    }
}

#[expect(clippy::disallowed_methods, reason = "this is where they are to be called")]
impl<D: Driver> Context<D> {
    /// A client was let in: it is captured if somebody waits for one of its route.
    pub(super) fn tap_client(&mut self, route: RouteId, conn: ConnId) {
        let Some(offer) = self.tap.offer.as_ref().filter(|_| !self.tap.is_running()) else {
            return;
        };
        let Some(room) = offer.take_for(route) else { return };
        let client = TappedClient {
            route,
            worker: self.worker,
            address: self.driver.peer_address(conn),
            local_address: self.driver.local_address(conn),
            endpoint: None,
            since: self.now,
        };
        let offer = Arc::clone(offer);
        self.tap.running = Some(Running { conn, offer, room, client });
    }

    /// Something has happened, while a client is captured.
    #[cold]
    pub(super) fn tap_event(&mut self, completion: &Completion) {
        let Some(conn) = completion.conn().filter(|&conn| self.tap.is_of(conn)) else { return };
        match completion {
            Completion::Received(_, buf) => {
                self.tap.add(self.now, What::Received, self.driver.buffers().bytes(buf));
            }
            Completion::Ended(_) => self.tap.add_end(self.now, What::ClientEnded),
            Completion::ReceiveFailed(_) | Completion::SendFailed(_) => {
                self.tap.add_end(self.now, What::ClientReset);
            }
            Completion::Sent(..) => {}
            Completion::Accepted(..)
            | Completion::AcceptFailed(_)
            | Completion::Connected(_)
            | Completion::ConnectFailed(..)
            | Completion::Spliced(..)
            | Completion::Woken => {
                unreachable!("{completion:?} of a client that is not joined, {conn:?}")
            }
        }
    }

    /// Queues bytes behind those already queued.
    pub(super) fn send(&mut self, conn: ConnId, buf: Buf) {
        if self.tap.is_of(conn) {
            self.tap.add(self.now, What::Sent, self.driver.buffers().bytes(&buf));
        }
        self.driver.send(conn, buf);
    }

    /// Says that what comes from a client goes to its backend as it is, and back. That of one that is
    /// captured is to be seen, and is not moved unseen within the kernel.
    pub(super) fn join(&mut self, client: ConnId, backend: ConnId) {
        if !self.tap.is_of(client) {
            self.driver.join(client, backend);
        }
    }

    /// Ends the direction towards the peer, behind all that is queued.
    pub(super) fn shutdown(&mut self, conn: ConnId) {
        if self.tap.is_of(conn) {
            self.tap.add_end(self.now, What::ProxyEnded);
        }
        self.driver.shutdown(conn);
    }

    /// Closes a connection.
    pub(super) fn close(&mut self, conn: ConnId, how: Close) {
        if self.tap.is_of(conn) {
            let what = if how == Close::Reset { What::ProxyReset } else { What::ProxyEnded };
            self.tap.add_end(self.now, what);
            self.tap.finish(TapEnd::Closed);
        }
        self.driver.close(conn, how);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::capture::{FILE_BYTES_MIN, Record, records};
    use crate::config::Config;
    use crate::io::sim::{ID_BYTES, Sim};
    use crate::limits;
    use crate::worker::simulation::{Run, run_seeds};

    fn payload(capture: &Capture, wanted: What) -> Vec<u8> {
        let of = records(capture.as_bytes()).filter(|record| record.what == wanted);
        of.flat_map(|Record { payload, .. }| payload.to_vec()).collect()
    }

    /// Whose stream these bytes are the begin of, if that is known.
    fn sender(sim: &Sim, bytes: &[u8]) -> Option<usize> {
        let id = u64::from_be_bytes(*bytes.first_chunk::<ID_BYTES>()?);
        let at = sim.peers.iter().position(|peer| peer.id == id).expect("nobody's bytes");
        assert!(bytes == sim.stream(id, 0, bytes.len()), "wrong bytes of {id}");
        assert!(bytes.len() <= sim.peers[at].sent, "more than {id} has sent");
        Some(at)
    }

    /// What was captured is what the client has sent, and what it was sent by the one that it met.
    fn check(sim: &Sim, asked: &Offer, Tapped { capture, end, client }: &Tapped) {
        let endpoint = client.as_ref().map(|client| client.endpoint.is_some());
        assert!(asked.endpoint.is_none() || endpoint != Some(false), "one that got none");
        let (received, sent) = (payload(capture, What::Received), payload(capture, What::Sent));
        let backend = sender(sim, &sent);
        assert!(backend.is_none_or(|at| !sim.peers[at].is_client));
        let Some(client) = sender(sim, &received).map(|at| &sim.peers[at]) else { return };
        assert!(client.is_client);
        if *end == TapEnd::Closed {
            assert!(sent.starts_with(&client.received), "it got what was not captured");
            let last = records(capture.as_bytes()).last().map(|record| record.what);
            assert!(!matches!(last, Some(What::Received | What::Sent)), "no end: {last:?}");
        }
    }

    fn tapped(seed: u64) -> (u64, u64) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut config = Config::from_vars(std::iter::empty()).expect("defaults are valid");
        let route = Arc::make_mut(&mut config.routes[0]);
        route.pool.min_idle = rng.usize(..3);
        route.pool.max_idle = route.pool.min_idle + rng.usize(..4);
        let clients = rng.usize(1..40);
        let mut run = Run::with(rng, config, clients, limits::buffers_max(clients));
        let all = run.endpoints.clone();
        run.deliver(all.clone());
        for _ in 0..clients {
            let delay = Duration::from_micros(run.rng.u64(..2_000_000));
            run.engine.driver().add_client(delay);
        }
        let (mut closed, mut full) = (0, 0);
        let mut waiting = None;
        while run.engine.driver().elapsed() < Duration::from_secs(10) {
            let (offer, done) = waiting.get_or_insert_with(|| {
                let size = FILE_BYTES_MIN + run.rng.usize(1..200_000);
                let endpoint = (run.rng.u8(..4) == 0).then(|| all[0].name.clone());
                let offer = Offer::new(None, endpoint, run.rng.u32(..3), Capture::new(size));
                run.engine.cx.tap.on_offer(Arc::clone(&offer.0));
                offer
            });
            if let Ok(tapped) = done.try_recv() {
                check(run.engine.driver(), offer, &tapped);
                closed += u64::from(tapped.end == TapEnd::Closed);
                full += u64::from(tapped.end == TapEnd::Full);
                waiting = None;
            } else if run.rng.u16(..2000) == 0
                && let Some((offer, _)) = &waiting
                && offer.end()
            {
                run.engine.cx.tap.on_offer(Arc::clone(offer));
            }
            run.disturb();
            run.turn();
        }
        run.stop();
        (closed, full)
    }

    #[test]
    fn what_a_client_says_and_is_told_is_captured_whatever_happens() {
        let (closed, full) = run_seeds(0, 60, tapped);
        println!("{closed} until they were closed, {full} until there was no room");
        assert!(closed > 30 && full > 5, "{closed} and {full}: the runs test too little");
    }
}
