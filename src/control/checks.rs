//! Active checks: each endpoint is connected to again and again, or asked something that any server
//! answers at once, by this thread alone, however many workers there are.
//!
//! Each endpoint has a task of its own, so one that hangs holds up no other. How many checks are under
//! way at a time is bounded, for those that take long apart from all others: however many hang, what is
//! well is checked in time. What checks come to is part of the endpoint, and workers learn of it by the
//! snapshot that they have already.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{Instrument, Span, debug, info, warn};

use super::WorkerHandle;
use crate::config::{Check, ProxyProtocol, RouteConfig};
use crate::io::net::Address;
use crate::limits::{CHECK_QUICK_MAX, CHECK_REPLY_MAX, CHECK_RETRY_PAUSE, CHECKS_MAX, LATE_MIN};
use crate::protocol::ProtocolName;
use crate::protocol::proxy_header::{HEADER_MAX, write_v1, write_v2};
use crate::proxy::check::Verdicts;
use crate::proxy::endpoints::{Endpoint, EndpointSnapshot};

/// Checks of all routes at a time.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// Each for [`CHECK_QUICK_MAX`].
    quick: Arc<Semaphore>,
    /// Each for as long as a check may take: of endpoints whose latest one took longer than that.
    slow: Arc<Semaphore>,
}

impl Default for Places {
    fn default() -> Self {
        let half = || Arc::new(Semaphore::new(CHECKS_MAX / 2));
        Self { quick: half(), slow: half() }
    }
}

/// The checks of a route's endpoints.
#[derive(Debug)]
pub(super) struct Checks {
    pub(super) route: Arc<RouteConfig>,
    pub(super) workers: Vec<WorkerHandle>,
    pub(super) snapshots: watch::Receiver<Arc<EndpointSnapshot>>,
    pub(super) places: Places,
}

impl Checks {
    /// Checks the endpoints for as long as the process runs, if they are to be checked.
    pub(super) async fn run(self) {
        let Some(interval) = self.route.check_interval else { return };
        let mut snapshots = self.snapshots.clone();
        let this = Arc::new(self);
        let mut running: HashMap<usize, (Arc<Endpoint>, AbortHandle)> = HashMap::new();
        loop {
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            let mut left = std::mem::take(&mut running);
            for endpoint in &snapshot.endpoints {
                let at = Arc::as_ptr(endpoint).addr();
                let one = left.remove(&at).unwrap_or_else(|| {
                    let checks = Arc::clone(&this).follow(Arc::clone(endpoint), interval);
                    let task = tokio::spawn(checks.instrument(Span::current()));
                    (Arc::clone(endpoint), task.abort_handle())
                });
                running.insert(at, one);
            }
            for (endpoint, task) in left.into_values() {
                task.abort();
                // If it comes back, it is another time.
                endpoint.set_fails_check(false);
            }
            if snapshots.changed().await.is_err() {
                return;
            }
        }
    }

    /// Checks one endpoint until it leaves.
    async fn follow(self: Arc<Self>, endpoint: Arc<Endpoint>, interval: Duration) {
        let mut verdicts = Verdicts::new(self.route.check_fall, self.route.check_rise);
        let (mut is_slow, whole) = (false, self.route.connect_timeout);
        // Neither the endpoints of a process nor the processes of a fleet are to fall in step.
        sleep(interval.mul_f64(fastrand::f64())).await;
        loop {
            let (places, limit) = if is_slow {
                (&self.places.slow, whole)
            } else {
                (&self.places.quick, whole.min(CHECK_QUICK_MAX))
            };
            let Ok(place) = places.acquire().await else { return };
            let begun = Instant::now();
            let mut check = pin!(self.check(&endpoint.address));
            let mut checked = timeout(limit, &mut check).await;
            if checked.is_err() && begun.elapsed() >= limit + LATE_MIN {
                // This process stood still, and what came meanwhile is not heard yet.
                checked = timeout(limit, &mut check).await;
            }
            drop(place);
            is_slow = if is_slow { begun.elapsed() >= CHECK_QUICK_MAX } else { checked.is_err() };
            if checked.is_err() && limit < whole {
                // Nobody knows yet: it is checked anew, without haste.
                continue;
            }
            let checked = checked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            match checked {
                Err(error) if is_local(&error) => debug!(%error, "cannot check an endpoint"),
                checked => self.take_in(&endpoint, &mut verdicts, checked),
            }
            sleep_until(begun + interval.mul_f64(0.9 + 0.2 * fastrand::f64())).await;
        }
    }

    fn take_in(&self, endpoint: &Endpoint, verdicts: &mut Verdicts, checked: io::Result<()>) {
        endpoint.checks.made.add(1);
        endpoint.checks.failed.add(u64::from(checked.is_err()));
        let Some(fails) = verdicts.on_check(checked.is_ok()) else { return };
        let name = &endpoint.name;
        if let Err(error) = checked {
            warn!(endpoint = name, %error, "out of use: its checks fail");
        } else {
            info!(endpoint = name, "in use again: its checks pass");
        }
        endpoint.set_fails_check(fails);
        // The same snapshot as before: what it names is something else now. Discovery publishes on this
        // thread too, so a later one cannot come in between.
        let latest = Arc::clone(&self.snapshots.borrow());
        for worker in &self.workers {
            worker.mailbox.deliver(Arc::clone(&latest));
        }
    }

    async fn check(&self, address: &Address) -> io::Result<()> {
        match address {
            Address::Tcp(tcp) => self.talk(TcpStream::connect(tcp).await?, address).await,
            Address::Unix(path) => self.talk(connect_unix(path).await?, address).await,
        }
    }

    /// Asks on a connection what any server answers at once, if that is to be done.
    async fn talk(
        &self,
        mut stream: impl AsyncRead + AsyncWrite + Unpin,
        address: &Address,
    ) -> io::Result<()> {
        let protocol = self.route.protocol;
        let Some(template) = protocol.facts().liveness_request.filter(|_| self.asks()) else {
            return Ok(());
        };
        let mut request = header(self.route.proxy_protocol);
        request.extend(filled_in(template, &self.route.check_path, address));
        stream.write_all(&request).await?;
        reply(protocol, &mut stream).await
    }

    fn asks(&self) -> bool {
        self.route.check == Check::Request
    }
}

/// Connects to a Unix socket. Where its queue is full, nobody tells when it has room: it is tried again,
/// as it is for clients.
pub(super) async fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                sleep(CHECK_RETRY_PAUSE).await;
            }
            outcome => return outcome,
        }
    }
}

/// Reads as much of a reply as says whether the server is well.
async fn reply(protocol: ProtocolName, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut reply = Vec::with_capacity(CHECK_REPLY_MAX);
    loop {
        if let Some(is_live) = protocol.is_live(&reply) {
            let text = || String::from_utf8_lossy(&reply[..reply.len().min(64)]).trim().to_owned();
            return if is_live {
                Ok(())
            } else {
                Err(io::Error::other(format!("it says {:?}", text())))
            };
        }
        if reply.len() == CHECK_REPLY_MAX {
            return Err(io::Error::other("its reply is too long"));
        }
        let room = CHECK_REPLY_MAX - reply.len();
        if (&mut *stream).take(room as u64).read_buf(&mut reply).await? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended without a reply"));
        }
    }
}

/// The PROXY protocol's header of a connection that is nobody's but this proxy's own.
fn header(version: ProxyProtocol) -> Vec<u8> {
    let mut bytes = [0; HEADER_MAX];
    let len = match version {
        ProxyProtocol::Off => 0,
        ProxyProtocol::V1 => write_v1(&mut bytes, None),
        ProxyProtocol::V2 => write_v2(&mut bytes, None),
    };
    bytes[..len].to_vec()
}

/// A liveness request with what stands in it for a path and the server's address.
fn filled_in(template: &[u8], path: &str, address: &Address) -> Vec<u8> {
    let host = address.tcp().map_or_else(|| "localhost".to_owned(), |tcp| tcp.to_string());
    String::from_utf8_lossy(template).replace("{path}", path).replace("{host}", &host).into_bytes()
}

/// Whether a check failed for want of something on this side, which says nothing of the endpoint.
fn is_local(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM | libc::EADDRNOTAVAIL)
    )
}
