//! The connections of the admin port: let in, given their time, and closed.
//!
//! One connection carries one request. Everything that waits for a peer has a limit here, below HTTP,
//! and ends at once where its place is needed.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{AbortHandle, Abortable, poll_fn};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{DupFlags, Errno, dup3};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::{sleep, timeout, timeout_at};
use tracing::{debug, info, warn};
use warp::http::Request;

use super::page::Page;
use super::rooms::{Id, Room, Rooms, Times};
use crate::io::Claim;
use crate::limits::ADMIN_DESCRIPTORS_RESERVED;

/// Bytes of a head, and of an answer on its way: HTTP's own buffers. Probes and scrapers send less
/// than one kilobyte.
const HTTP_BUFFER: usize = 16 * 1024;

/// How long a connection is kept after the answer, for its peer to close it, and how much of what it
/// still sends is taken meanwhile. Without that the kernel resets it, and a peer that sends more than
/// it was asked for may lose the answer.
const LINGER_MAX: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 256 * 1024;

/// How long to wait where a connection cannot be accepted and none can make room for it.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Without a failure for so long, accepting has recovered: a line of the log a change, not a
/// connection.
const CALM: Duration = Duration::from_secs(10);

/// One request, as the pages see it.
#[derive(Debug, Clone)]
pub(super) struct Visit {
    id: Id,
    rooms: Shared,
    stream: Arc<TcpStream>,
    recall: Arc<Notify>,
    cut: AbortHandle,
    /// True exactly when what the peer has received is not the whole answer.
    is_under_way: Arc<AtomicBool>,
    /// Whatever follows the `?`.
    pub(super) query: String,
}

#[derive(Debug, Clone)]
struct Shared(Arc<Mutex<Rooms>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Rooms> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Visit {
    /// The head is there, and the answer is made.
    pub(super) fn answer(&self) {
        self.rooms.lock().go(self.id, Room::Answer, Instant::now());
    }

    /// The head is there, and the answer has to wait for the process.
    pub(super) fn hold(&self) {
        self.rooms.lock().go(self.id, Room::Held, Instant::now());
    }

    /// Waits until its place is needed by another.
    pub(super) async fn recalled(&self) {
        self.recall.notified().await;
    }

    /// Forgets the connection if its client has left. One that has ended its own direction only
    /// looks the same.
    pub(super) fn cut_if_left(&self) {
        let ready = self.stream.ready(Interest::READABLE).now_or_never();
        if ready.is_some_and(|ready| ready.is_ok_and(Ready::is_read_closed)) {
            self.cut.abort();
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.rooms.lock().deadline(self.id)
    }
}

/// Lets connections in for ever, and answers each by `service`.
pub(super) async fn serve<S>(listener: TcpListener, times: Times, service: S)
where
    S: Service<Request<Incoming>, Response = Page> + Clone + Unpin + Send + 'static,
    S::Future: Send,
    S::Error: std::error::Error + Send + Sync,
{
    let mut http = http1::Builder::new();
    // Its own limits are per read of a head; ours are per connection.
    http.keep_alive(false).half_close(true).max_buf_size(HTTP_BUFFER).header_read_timeout(None);
    let rooms = Shared(Arc::new(Mutex::new(Rooms::new(times))));
    let reserve = Reserve::default();
    let mut failed_at = None::<Instant>;
    reserve.refill();
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                if failed_at.replace(Instant::now()).is_none() {
                    warn!(%error, "admin cannot accept");
                }
                let is_shortage = is_shortage(&error);
                let by_reserve = is_shortage.then(|| accept_by_reserve(&listener, &reserve));
                match by_reserve.unwrap_or(ByReserve::Exhausted) {
                    ByReserve::Accepted(stream, peer) => (stream, peer),
                    ByReserve::NobodyWaits => {
                        yield_now().await;
                        continue;
                    }
                    // Its task closes it, into the reserve.
                    ByReserve::Exhausted if is_shortage && rooms.lock().cut_longest_waiting() => {
                        yield_now().await;
                        continue;
                    }
                    ByReserve::Exhausted => {
                        sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                }
            }
        };
        reserve.refill();
        if failed_at.is_some_and(|at| at.elapsed() > CALM) {
            failed_at = None;
            info!("admin accepts again");
        }
        let stream = Arc::new(stream);
        let recall = Arc::new(Notify::new());
        let (cut, registration) = AbortHandle::new_pair();
        let id = rooms.lock().enter(peer.ip(), Instant::now(), cut.clone(), Arc::clone(&recall));
        let visit = Visit {
            id,
            rooms: rooms.clone(),
            stream: Arc::clone(&stream),
            recall,
            cut,
            is_under_way: Arc::default(),
            query: String::new(),
        };
        let (http, service, reserve) = (http.clone(), service.clone(), reserve.clone());
        tokio::spawn(async move {
            let rooms = visit.rooms.clone();
            let is_under_way = Arc::clone(&visit.is_under_way);
            let _ = Abortable::new(converse(visit, http, service), registration).await;
            rooms.lock().leave(id);
            if is_under_way.load(Relaxed) {
                // What was cut looks cut: its reader may have no other way to tell.
                let _ = SockRef::from(&*stream).set_linger(Some(Duration::ZERO));
            }
            reserve.close(stream);
        });
        // A head that is there already is read before anybody else is let in.
        yield_now().await;
    }
}

/// What came of accepting by the reserve.
enum ByReserve {
    Accepted(TcpStream, SocketAddr),
    NobodyWaits,
    Exhausted,
}

/// Accepts by a descriptor of the reserve, at once, so that no worker takes it for a client.
fn accept_by_reserve(listener: &TcpListener, reserve: &Reserve) -> ByReserve {
    let _claim = Claim::new();
    while reserve.release() {
        match listener.accept().now_or_never() {
            Some(Ok((stream, peer))) => return ByReserve::Accepted(stream, peer),
            Some(Err(error)) if is_shortage(&error) => {}
            Some(Err(_)) | None => {
                // A kernel that has no descriptor says so even where nobody waits.
                reserve.refill();
                return ByReserve::NobodyWaits;
            }
        }
    }
    ByReserve::Exhausted
}

fn is_shortage(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// Reads the request, sends the answer, and waits for the peer to close; each for its time.
async fn converse<S>(visit: Visit, http: http1::Builder, service: S)
where
    S: Service<Request<Incoming>, Response = Page> + Unpin,
    S::Error: std::error::Error + Send + Sync + 'static,
{
    let asked = visit.clone();
    let answered = service_fn(move |mut request: Request<Incoming>| {
        asked.is_under_way.store(true, Relaxed);
        let query = request.uri().query().unwrap_or_default().to_owned();
        request.extensions_mut().insert(Visit { query, ..asked.clone() });
        Box::pin(service.call(request))
    });
    let mut connection = http.serve_connection(TokioIo::new(Watched(visit.clone())), answered);
    loop {
        let Some(deadline) = visit.deadline() else { return };
        let turn = poll_fn(|cx| connection.poll_without_shutdown(cx));
        match timeout_at(deadline.into(), turn).await {
            Ok(Ok(())) => break,
            Ok(Err(error)) => {
                debug!(%error, "admin connection broke");
                break;
            }
            // It has come to another room since.
            Err(_) if visit.deadline().is_some_and(|later| later > deadline) => {}
            Err(_) => return debug!("admin connection took too long"),
        }
    }
    visit.is_under_way.store(false, Relaxed);
    let _ = timeout(LINGER_MAX, linger(&visit.stream)).await;
}

/// Ends our direction, and takes what still comes until the peer ends its own.
async fn linger(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).shutdown(Shutdown::Write)?;
    let (mut buffer, mut taken) = ([0; 4096], 0);
    while taken < LINGER_BYTES_MAX {
        stream.readable().await?;
        match stream.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => taken += n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A visit's stream, which tells when the peer took something.
struct Watched(Visit);

impl AsyncRead for Watched {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let stream = &self.0.stream;
        loop {
            ready!(stream.poll_read_ready(cx))?;
            match stream.try_read(buf.initialize_unfilled()) {
                Ok(n) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Visit { stream, rooms, id, .. } = &self.0;
        loop {
            ready!(stream.poll_write_ready(cx))?;
            match stream.try_write(bytes) {
                Ok(n) => {
                    rooms.lock().progressed(*id, Instant::now());
                    return Poll::Ready(Ok(n));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(SockRef::from(&*self.0.stream).shutdown(Shutdown::Write))
    }
}

/// Descriptors held back: where the sessions have all others, a probe still gets its answer.
#[derive(Debug, Clone, Default)]
struct Reserve(Arc<Mutex<Vec<OwnedFd>>>);

impl Reserve {
    fn lock(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether some of it is in use.
    fn is_in_use(&self) -> bool {
        self.lock().len() < ADMIN_DESCRIPTORS_RESERVED
    }

    /// Makes it whole, as far as there are descriptors.
    fn refill(&self) {
        let mut held = self.lock();
        while held.len() < ADMIN_DESCRIPTORS_RESERVED {
            let Ok(fd) = eventfd(0, EventfdFlags::CLOEXEC) else { break };
            held.push(fd);
        }
    }

    /// Makes a descriptor free, though never the last one, of which others are made; whether there
    /// was one.
    fn release(&self) -> bool {
        let mut held = self.lock();
        held.len() > 1 && held.pop().is_some()
    }

    /// Closes a connection. While the reserve is in use it gets the descriptor, in one step: between
    /// a close and an open a worker would have taken it.
    fn close(&self, stream: Arc<TcpStream>) {
        if !self.is_in_use() {
            return;
        }
        let mut held = self.lock();
        let stream = Arc::into_inner(stream).map(TcpStream::into_std);
        if let (Some(Ok(stream)), Some(first)) = (stream, held.first()) {
            let mut fd = OwnedFd::from(stream);
            if dup3(first, &mut fd, DupFlags::CLOEXEC).is_ok() {
                held.push(fd);
            }
        }
    }
}
