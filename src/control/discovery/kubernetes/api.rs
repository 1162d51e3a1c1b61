//! The one way of the process to the Kubernetes API. All watches share it, whatever the routes: its
//! client with the connections, its credentials and its pace.
//!
//! What becomes of one watch is not another's: who finds the client of no use discards it, and those
//! who use it meanwhile go on with it until they need another.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::Request;
use kube::client::Body;
use tokio::sync::Mutex as Turns;
use tokio::time::{Instant, sleep_until};

use super::connection::Connection;
use super::offload::Offload;
use super::trouble::Trouble;

/// How much longer than a watch lasts a connection may be silent.
pub(super) const SILENCE_MARGIN: Duration = Duration::from_secs(5);

/// Requests that a watch needs to begin, where the server does not know lists by watches.
const REQUESTS_TO_BEGIN: u32 = 3;

/// Requests each second, of all watches together. A watch that works is one request in minutes.
const REQUESTS_PER_SECOND: f64 = 2.0;

/// Keeps the pace of requests, whatever the server says.
#[derive(Debug)]
struct Pace {
    at_once: f64,
    left: f64,
    at: Instant,
}

impl Pace {
    /// So many watches can begin at once, and one of them has one request more.
    fn of(watches: usize) -> Self {
        let watches = u32::try_from(watches).unwrap_or(u32::MAX);
        let at_once = f64::from(watches.saturating_mul(REQUESTS_TO_BEGIN).saturating_add(1));
        Self { at_once, left: at_once, at: Instant::now() }
    }

    /// Counts a request, and says when it may be sent.
    fn next(&mut self, now: Instant) -> Instant {
        let grown = now.duration_since(self.at).as_secs_f64() * REQUESTS_PER_SECOND;
        self.left = (self.left + grown).min(self.at_once) - 1.0;
        self.at = now;
        now + Duration::from_secs_f64((-self.left).max(0.0) / REQUESTS_PER_SECOND)
    }
}

/// The way to the API.
pub(super) struct Api {
    silence: Duration,
    offload: Offload,
    pace: Mutex<Pace>,
    current: Mutex<Option<Arc<Connection>>>,
    /// Held by who makes a client: when that failed last, and why.
    making: Turns<Option<(Instant, Trouble)>>,
}

impl Api {
    /// A way for so many watches, each of at most so long.
    pub(super) fn new(watches: usize, watch_timeout_max: Duration) -> Self {
        Self {
            silence: watch_timeout_max + SILENCE_MARGIN,
            offload: Offload::default(),
            pace: Mutex::new(Pace::of(watches)),
            current: Mutex::default(),
            making: Turns::default(),
        }
    }

    /// The client that all share, made anew where there is none. While one is being made, all wait for
    /// what becomes of that.
    ///
    /// # Errors
    /// There is no way to the API, by the configuration or the credentials.
    pub(super) async fn connect(&self) -> Result<Arc<Connection>, Trouble> {
        let asked = Instant::now();
        if let Some(connection) = self.current() {
            return Ok(connection);
        }
        let mut failed = self.making.lock().await;
        if let Some(connection) = self.current() {
            return Ok(connection);
        }
        if let Some((at, trouble)) = &*failed
            && *at >= asked
        {
            return Err(trouble.clone());
        }
        match Connection::make(self.silence, &self.offload).await {
            Ok(connection) => {
                let connection = Arc::new(connection);
                *self.lock_current() = Some(Arc::clone(&connection));
                Ok(connection)
            }
            Err(trouble) => {
                *failed = Some((Instant::now(), trouble.clone()));
                Err(trouble)
            }
        }
    }

    fn current(&self) -> Option<Arc<Connection>> {
        self.lock_current().clone().filter(|connection| !connection.is_void())
    }

    /// Has the next one who needs a client make another than this.
    pub(super) fn discard(&self, connection: &Arc<Connection>) {
        self.lock_current().take_if(|current| Arc::ptr_eq(current, connection));
    }

    /// Sends a request when its turn has come, and gives the body of a good answer, which is JSON.
    ///
    /// # Errors
    /// There is none in time, or it is not good. `about` names the verb, the resource and its namespace.
    pub(super) async fn get(
        &self,
        connection: &Connection,
        request: Request<Vec<u8>>,
        about: (&str, &str, &str),
    ) -> Result<Body, Trouble> {
        let due = self.pace.lock().unwrap_or_else(PoisonError::into_inner).next(Instant::now());
        sleep_until(due).await;
        connection.get(request, about, &self.offload).await
    }

    fn lock_current(&self) -> std::sync::MutexGuard<'_, Option<Arc<Connection>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_keep_their_pace_however_many_watches_share_it() {
        for (watches, at_once) in [(1, 4), (2, 7), (16, 49)] {
            let mut pace = Pace::of(watches);
            let begun = pace.at;
            let last = (0..at_once + 6).fold(begun, |now, _| pace.next(now));
            // Those at once, and then two a second.
            assert_eq!(last, begun + Duration::from_secs(3), "{watches} watches");
            let later = last + Duration::from_secs(60);
            assert_eq!((0..at_once).map(|_| pace.next(later)).max(), Some(later));
        }
    }
}
