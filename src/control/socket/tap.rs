//! The tap: what one new client says and is told, for who asks for it.
//!
//! It shows what nothing else does, so it is one at a time, bounded in bytes and time, and logged with
//! who asked, at its begin and its end, as warnings: a log without them would hide it. No file is written
//! here: who asks does that, with its own rights.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{self, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::message::{Reply, Tap, Tapped};
use super::{line_of, until_it_leaves};
use crate::capture::Capture;
use crate::control::View;
use crate::io::net::Credentials;
use crate::limits::{TAP_BYTES_MAX, TAP_BYTES_MIN, TAP_TIME_MAX};
use crate::proxy::RouteId;
use crate::worker::tap::{self, Offer, TapEnd, TappedClient};

/// How long a worker may take to hand back what it has captured: far more than a turn.
const HAND_BACK_MAX: Duration = Duration::from_secs(3);

/// How long who asks waits at most for all workers to know it: a turn of each, if none hangs.
const HEARD_MAX: Duration = Duration::from_secs(1);
/// How often that is looked at.
const HEARD_EVERY: Duration = Duration::from_millis(1);

/// How long a client may take to read all of it.
const READ_MAX: Duration = Duration::from_secs(30);

const TIME_OVER: &str = "the time is over";

/// Begins taps.
#[derive(Debug)]
pub(super) struct Taps {
    view: Arc<View>,
    place: Arc<Semaphore>,
}

/// A tap that was begun.
#[derive(Debug)]
pub(super) struct Tapping {
    view: Arc<View>,
    asked: Tap,
    who: Credentials,
    offer: Arc<Offer>,
    tapped: oneshot::Receiver<tap::Tapped>,
    _place: OwnedSemaphorePermit,
}

impl Taps {
    pub(super) fn new(view: Arc<View>) -> Self {
        Self { view, place: Arc::new(Semaphore::new(1)) }
    }

    /// Has the workers wait for the client that is asked for.
    ///
    /// # Errors
    /// That is not possible; the message says why, and what to do.
    pub(super) fn begin(&self, asked: Tap, who: Credentials) -> Result<Tapping, String> {
        let Tap { bytes, for_ms, passes, .. } = asked;
        if !(TAP_BYTES_MIN..=TAP_BYTES_MAX).contains(&bytes) {
            return Err(format!("--bytes is to be from {TAP_BYTES_MIN} to {TAP_BYTES_MAX}"));
        }
        let time = Duration::from_millis(for_ms);
        if time.is_zero() || time > TAP_TIME_MAX {
            return Err("--for is to be from 1ms to 1h".to_owned());
        }
        let route = self.route(&asked)?;
        if self.view.draining() {
            return Err("the proxy drains: ask one that does not".to_owned());
        }
        let place = Arc::clone(&self.place).try_acquire_owned();
        let place = place.map_err(|_| "another tap runs, and there is one at a time: try again")?;
        let (offer, tapped) =
            Offer::new(route, asked.endpoint.clone(), passes, Capture::new(bytes));
        let Credentials { uid, pid, .. } = who;
        let view = Arc::clone(&self.view);
        let tapping = Tapping { view, asked, who, offer, tapped, _place: place };
        tapping.tell_workers();
        let Tap { route, endpoint, .. } = &tapping.asked;
        warn!(uid, pid, route, endpoint, passes, bytes, for_ms, "tap begins");
        Ok(tapping)
    }

    /// The route that is asked for, if one is, where it has the endpoint.
    fn route(&self, asked: &Tap) -> Result<Option<RouteId>, String> {
        let wanted = |name: &str| asked.route.as_deref().is_none_or(|wanted| wanted == name);
        let mut routes = self.view.routes().filter(|route| wanted(route.name)).peekable();
        if let (None, Some(name)) = (routes.peek(), &asked.route) {
            let names = self.view.routes().map(|route| route.name.to_owned()).collect::<Vec<_>>();
            return Err(format!("there is no route {name:?}, only: {}", names.join(", ")));
        }
        if let Some(name) = &asked.endpoint
            && !routes.any(|route| route.snapshot.endpoints.iter().any(|one| one.name == *name))
        {
            let list = "`aegis-proxy endpoints` lists them";
            return Err(format!("there is no endpoint {name:?} now: {list}"));
        }
        let mut names = self.view.routes().map(|route| route.name);
        let at = asked.route.as_deref().and_then(|wanted| names.position(|name| name == wanted));
        Ok(at.map(RouteId::at))
    }
}

impl Tapping {
    fn tell_workers(&self) {
        for worker in self.view.workers() {
            worker.mailbox.offer_tap(Arc::clone(&self.offer));
        }
    }

    /// Waits until all workers know of it, so that the very next client is not missed.
    async fn until_heard(&self) {
        let heard = async {
            while !self.view.workers().iter().all(|worker| worker.mailbox.has_seen_tap()) {
                sleep(HEARD_EVERY).await;
            }
        };
        if timeout(HEARD_MAX, heard).await.is_err() {
            debug!("a worker hangs, and has not heard of the tap");
        }
    }

    /// The client that is asked for, in words.
    fn wanted(&self) -> String {
        let Tap { route, endpoint, passes, .. } = &self.asked;
        let mut text = match passes {
            0 => "the next client".to_owned(),
            passes => format!("client {} from now on", u64::from(*passes) + 1),
        };
        let parts = [(" of route ", route), (" at endpoint ", endpoint)];
        for (what, name) in parts.iter().filter_map(|(what, name)| Some((what, name.as_ref()?))) {
            text.extend([what, name.as_str()]);
        }
        text
    }

    /// Says what is waited for, waits for what is captured, and sends it to who has asked.
    pub(super) async fn run(mut self, mut stream: UnixStream) {
        self.until_heard().await;
        let begins = Reply::Done(format!("waiting for {}", self.wanted()));
        // It fits into the socket. Whether somebody is there is seen next.
        let _ = stream.write_all(&line_of(&begins)).await;
        let (tapped, why) = self.wait(&stream).await;
        let captured = tapped.and_then(|tapped| Some((tapped.client?, tapped.capture)));
        let reply = match &captured {
            Some((client, capture)) => Reply::Tapped(self.tell_of(client, capture, why)),
            None => Reply::Refused(self.tell_of_none(why)),
        };
        let sending = async {
            stream.write_all(&line_of(&reply)).await?;
            if let Some((_, capture)) = &captured {
                stream.write_all(capture.as_bytes()).await?;
            }
            io::Result::Ok(())
        };
        match timeout(READ_MAX, sending).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, "who asked for the tap left"),
            Err(_) => debug!("who asked for the tap does not read what was captured"),
        }
        // Who sees the end of the connection may ask for the next one.
        drop(self);
        drop(stream);
    }

    /// Waits until the tap ends. Returns what came of it, if a worker has taken it, and why it ended.
    async fn wait(&mut self, stream: &UnixStream) -> (Option<tap::Tapped>, &'static str) {
        let over = tokio::select! {
            tapped = &mut self.tapped => return why_it_ended(tapped.ok(), TIME_OVER),
            () = sleep(Duration::from_millis(self.asked.for_ms)) => TIME_OVER,
            () = until_it_leaves(stream) => "who asked for it left",
        };
        if !self.offer.end() {
            return (None, over);
        }
        self.tell_workers();
        match timeout(HAND_BACK_MAX, &mut self.tapped).await {
            Ok(tapped) => why_it_ended(tapped.ok(), over),
            Err(_) => (None, "its worker hangs"),
        }
    }

    fn tell_of(&self, client: &TappedClient, capture: &Capture, why: &str) -> Tapped {
        let Credentials { uid, pid, .. } = self.who;
        let TappedClient { address, local_address, since, .. } = *client;
        let route = self.view.config().routes[usize::from(client.route)].name.as_str();
        let worker = usize::from(client.worker);
        let endpoint = client.endpoint.as_ref().map(|endpoint| endpoint.name.as_str());
        let bytes = capture.payload();
        let shown = address.map(|address| address.to_string());
        warn!(uid, pid, route, endpoint, worker, client = shown, bytes, why, "tap ended");
        let from = shown.map(|shown| format!(" from {shown}")).unwrap_or_default();
        let to = endpoint.map(|endpoint| format!(", served by {endpoint}")).unwrap_or_default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let since = now.saturating_sub(since.elapsed());
        Tapped {
            summary: format!("{bytes} bytes of a client of route {route}{from}{to}; {why}"),
            client: address,
            local: local_address,
            since_ns: u64::try_from(since.as_nanos()).unwrap_or_default(),
            len: capture.as_bytes().len(),
        }
    }

    fn tell_of_none(&self, why: &str) -> String {
        let Credentials { uid, pid, .. } = self.who;
        let Tap { route, endpoint, .. } = &self.asked;
        warn!(uid, pid, route, endpoint, bytes = 0, why, "tap ended");
        let note = "clients that are connected already are not captured";
        format!("{} has not come: {why}; {note}", self.wanted())
    }
}

/// Why a tap has ended, which was ended by its begin for the reason `over`, if it was.
fn why_it_ended(
    tapped: Option<tap::Tapped>,
    over: &'static str,
) -> (Option<tap::Tapped>, &'static str) {
    let why = match tapped.as_ref().map(|tapped| tapped.end) {
        Some(TapEnd::Closed) => "its connection was closed",
        Some(TapEnd::Full) => "there was no room for more",
        Some(TapEnd::Over) => over,
        // Without a word: its worker has ended.
        Some(TapEnd::Drain) | None => "the proxy drains",
    };
    (tapped, why)
}
