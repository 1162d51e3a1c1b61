//! The control socket: commands that change something, from the process's own user or root alone.
//!
//! A client sends a line and gets one ([`Request`], [`Reply`]), one command a connection. A command
//! whose line does not come to its end is none. Whoever connects is known by what the kernel says of
//! it, and has seconds for all of it, so that nobody keeps a place who says or reads nothing.

mod log_level;
mod message;
mod tap;

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::getuid;
use tokio::io::{self, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

pub use message::{Reply, Request, Tap, Tapped};

use super::View;
use crate::io::net::{Credentials, credentials};
use crate::limits::{CONTROL_CONNECTIONS, CONTROL_LINE_BYTES_MAX, CONTROL_WAITING};
use log_level::LogLevel;
use tap::{Tapping, Taps};

/// How long a client has for its line and the answer to it. It sends the one at once, and the other
/// fits into the socket.
const TIME_MAX: Duration = Duration::from_secs(2);

/// The pause before the next try where no connection can be accepted, for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who is refused is logged once in so long, with the number of those before: anybody may connect.
const REFUSED_LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Carries commands out.
#[derive(Debug)]
pub(super) struct Control {
    view: Arc<View>,
    drain_asked: Arc<Notify>,
    log_level: Arc<LogLevel>,
    taps: Taps,
    places: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Control {
    /// For this process; to drain it, `drain_asked` is notified.
    pub(super) fn new(view: Arc<View>, drain_asked: Arc<Notify>) -> Self {
        let log_level = Arc::new(LogLevel::new(view.config().log.clone()));
        let [places, waiting] =
            [CONTROL_CONNECTIONS, CONTROL_WAITING].map(|count| Arc::new(Semaphore::new(count)));
        let taps = Taps::new(Arc::clone(&view));
        Self { view, drain_asked, log_level, taps, places, waiting }
    }

    /// Serves the socket for ever.
    pub(super) async fn serve(self: Arc<Self>, listener: UnixListener) {
        tokio::spawn(Arc::clone(&self.log_level).run());
        let mut refusals = Refusals::default();
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    debug!(%error, "control cannot accept");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            match self.admit(&stream, &mut refusals) {
                Ok((who, place)) => drop(tokio::spawn(Arc::clone(&self).talk(stream, who, place))),
                // One that the socket does not take at once is not waited for.
                Err(why) => drop(stream.try_write(&line_of(&Reply::Refused(why)))),
            }
        }
    }

    /// Whether a client may give commands, and there is a place for it.
    fn admit(
        &self,
        stream: &UnixStream,
        refusals: &mut Refusals,
    ) -> Result<(Credentials, OwnedSemaphorePermit), String> {
        let who = credentials(stream).ok_or("who you are is not known")?;
        let own = getuid().as_raw();
        if who.uid != own && who.uid != 0 {
            refusals.log(who);
            let uid = who.uid;
            return Err(format!("uid {uid} may give no commands, only root and uid {own} may"));
        }
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place = place.map_err(|_| {
            format!("{CONTROL_CONNECTIONS} others give commands at this moment, try again")
        })?;
        Ok((who, place))
    }

    async fn talk(
        self: Arc<Self>,
        mut stream: UnixStream,
        who: Credentials,
        place: OwnedSemaphorePermit,
    ) {
        match timeout(TIME_MAX, self.answer(&mut stream, who)).await {
            Ok(Ok(After::End)) => {}
            Ok(Ok(After::Wait(waiting))) => {
                drop(place);
                until_the_end(stream).await;
                drop(waiting);
            }
            Ok(Ok(After::Tap(tapping))) => {
                drop(place);
                tapping.run(stream).await;
            }
            Ok(Err(error)) => debug!(%error, "a client of the control socket left"),
            Err(_) => debug!("a client of the control socket said or read nothing"),
        }
    }

    /// Reads a command, carries it out and says so. Returns what is to be done for the client then.
    async fn answer(&self, stream: &mut UnixStream, who: Credentials) -> io::Result<After> {
        let done = read_request(stream).await?.and_then(|request| self.carry_out(request, who));
        let (reply, after) = match done {
            Ok((None, after)) => return Ok(after),
            Ok((Some(text), after)) => (Reply::Done(text), after),
            Err(why) => (Reply::Refused(why), After::End),
        };
        stream.write_all(&line_of(&reply)).await?;
        Ok(after)
    }

    /// Carries a command out. Returns what is said of it here, if anything is, and what is to be done then.
    fn carry_out(
        &self,
        request: Request,
        who: Credentials,
    ) -> Result<(Option<String>, After), String> {
        Ok(match request {
            Request::Drain { wait } => {
                let after = self.place_to_wait(wait)?;
                (Some(self.drain(who)), after)
            }
            Request::LogLevel { filter: None, .. } => (Some(self.log_level.show()), After::End),
            Request::LogLevel { filter: Some(filter), for_ms } => {
                (Some(self.log_level.set(&filter, for_ms, who)?), After::End)
            }
            // What has begun is to be ended, and that logged, so nothing here may give it up: who asked
            // may have left, or its time be over.
            Request::Tap(tap) => (None, After::Tap(self.taps.begin(tap, who)?)),
        })
    }

    fn place_to_wait(&self, wait: bool) -> Result<After, String> {
        if !wait {
            return Ok(After::End);
        }
        let place = Arc::clone(&self.waiting).try_acquire_owned();
        place
            .map(After::Wait)
            .map_err(|_| format!("{CONTROL_WAITING} others wait for the end; drain without --wait"))
    }

    fn drain(&self, Credentials { uid, pid, .. }: Credentials) -> String {
        let sessions = self.view.sessions_active();
        let has_begun = self.view.draining();
        info!(uid, pid, sessions, has_begun, "drain asked by the control socket");
        self.drain_asked.notify_one();
        let begins = if has_begun { "draining already" } else { "draining" };
        format!("{begins}, {sessions} sessions are open")
    }
}

/// What is to be done for a client once its command is answered.
enum After {
    /// Nothing.
    End,
    /// It waits for the end of the process, and has this place.
    Wait(OwnedSemaphorePermit),
    /// It waits for what is captured.
    Tap(Tapping),
}

/// Reads a line; why it is no request, if it is none.
async fn read_request(stream: &mut UnixStream) -> io::Result<Result<Request, String>> {
    let mut line = Vec::new();
    let max = CONTROL_LINE_BYTES_MAX;
    BufReader::new(stream).take(max as u64).read_until(b'\n', &mut line).await?;
    if line.last() != Some(&b'\n') {
        return if line.len() == max {
            Ok(Err(format!("the command is longer than {max} bytes")))
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        };
    }
    Ok(serde_json::from_slice(&line).map_err(|error| format!("no command: {error}")))
}

fn line_of(reply: &Reply) -> Vec<u8> {
    let mut line = serde_json::to_vec(reply).unwrap_or_else(|error| unreachable!("{error}"));
    line.push(b'\n');
    line
}

/// Keeps a connection until its client leaves, or else until the process has ended: the kernel closes
/// it then, and not this runtime, whose end comes before.
async fn until_the_end(stream: UnixStream) {
    let stream = ManuallyDrop::new(stream);
    until_it_leaves(&stream).await;
    drop(ManuallyDrop::into_inner(stream));
}

/// Waits until a client leaves, or says more than a command.
async fn until_it_leaves(stream: &UnixStream) {
    while stream.readable().await.is_ok() {
        match stream.try_read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => break,
        }
    }
}

/// Those who may not give commands.
#[derive(Debug, Default)]
struct Refusals {
    logged_at: Option<Instant>,
    /// Since then.
    unlogged: u64,
}

impl Refusals {
    fn log(&mut self, Credentials { uid, gid, pid }: Credentials) {
        if self.logged_at.is_some_and(|at| at.elapsed() < REFUSED_LOG_INTERVAL) {
            self.unlogged += 1;
            return;
        }
        let more = std::mem::take(&mut self.unlogged);
        warn!(uid, gid, pid, more, "refused on the control socket: neither root nor the own user");
        self.logged_at = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::testing;

    /// Who is slow to ask, and workers that are slow to hear of it, are together slower than an answer
    /// may be.
    #[test]
    fn a_tap_that_has_begun_comes_to_its_end() {
        const ASK: &[u8] = b"{\"command\":\"tap\",\"route\":null,\"endpoint\":null,\"passes\":0,\
            \"bytes\":4096,\"for_ms\":1}\n";
        testing::block_on(async {
            let view = Arc::new(testing::view(testing::config(), Vec::new()));
            let control = Arc::new(Control::new(view, Arc::default()));
            let (mut client, served) = UnixStream::pair().unwrap();
            let who = Credentials { pid: 1, uid: 0, gid: 0 };
            let place = Arc::clone(&control.places).acquire_owned().await.unwrap();
            tokio::spawn(Arc::clone(&control).talk(served, who, place));
            sleep(TIME_MAX * 3 / 4).await;
            client.write_all(ASK).await.unwrap();
            let mut said = String::new();
            client.read_to_string(&mut said).await.unwrap();
            assert!(said.contains("waiting for the next client"), "{said}");
            assert!(said.contains("has not come: the time is over"), "{said}");
        });
    }
}
