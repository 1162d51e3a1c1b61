//! Gives commands to a proxy that runs, by its control socket.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::{Arg, ArgMatches};
use socket2::{Domain, SockAddr, Socket, Type};

use super::admin::left;
use super::setting::setting;
use super::table::plain;
use crate::config::control_address;
use crate::control::socket::{Reply, Request, Tapped};
use crate::io::net::Address;
use crate::limits::{TAP_BYTES_MAX, TAP_TIME_MAX};

const CONTROL: &str = "control";

/// How long the proxy may take to answer; it waits for less.
const TIME_MAX: Duration = Duration::from_secs(3);

/// How long it may take to read what was captured. The proxy waits for as long.
const RECORDS_TIME_MAX: Duration = Duration::from_secs(30);

/// Far more than the proxy answers.
const REPLY_BYTES_MAX: usize = 64 << 10;

/// The option that names the socket.
pub(super) fn option() -> Arg {
    Arg::new(CONTROL)
        .long(CONTROL)
        .value_name("unix:/PATH")
        .help("Where the proxy's control socket is [default: AEGIS_CONTROL]")
}

/// A connection on which a command was carried out.
pub(super) struct Done {
    /// What came of it.
    pub(super) text: String,
    talk: Talk,
}

impl Done {
    /// Waits until the process has ended, which closes the connection. It says nothing more.
    pub(super) fn wait(mut self) -> Result<(), String> {
        let stream = &mut self.talk.stream;
        stream.set_read_timeout(None).map_err(|error| error.to_string())?;
        loop {
            match stream.read(&mut [0]) {
                Ok(0) => return Ok(()),
                Ok(_) => return Err("the proxy says more than it was asked for".to_owned()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// The connection, to end it by.
    pub(super) fn stream(&self) -> io::Result<UnixStream> {
        self.talk.stream.try_clone()
    }

    /// Waits for what a tap captures, which takes so long at most.
    pub(super) fn tapped(mut self, time: Duration) -> Result<(Tapped, Vec<u8>), String> {
        let text = |error: io::Error| error.to_string();
        // A worker has some time to hand it back.
        let until = Instant::now() + time.min(TAP_TIME_MAX) + 2 * TIME_MAX;
        match self.talk.reply(until).map_err(text)? {
            Reply::Tapped(tapped) if tapped.len <= TAP_BYTES_MAX => {
                let records = self.talk.bytes(tapped.len, Instant::now() + RECORDS_TIME_MAX);
                let records = records.map_err(text)?;
                self.talk.until_closed();
                Ok((tapped, records))
            }
            Reply::Refused(why) => {
                self.talk.until_closed();
                Err(plain(&why))
            }
            Reply::Tapped(_) | Reply::Done(_) => Err("the proxy answers what it cannot".to_owned()),
        }
    }
}

/// A connection to the socket, and what came by it that was not looked at so far.
struct Talk {
    stream: UnixStream,
    read: Vec<u8>,
}

impl Talk {
    /// Reads a line.
    fn reply(&mut self, until: Instant) -> io::Result<Reply> {
        loop {
            if let Some(end) = self.read.iter().position(|&byte| byte == b'\n') {
                let line = self.read.drain(..=end).collect::<Vec<_>>();
                return Ok(serde_json::from_slice(&line)?);
            }
            if self.read.len() > REPLY_BYTES_MAX || !self.read_more(until)? {
                return Err(io::Error::other("the connection was closed without an answer"));
            }
        }
    }

    /// Waits until the proxy is done with the command, so that the next one does not find it busy.
    fn until_closed(&mut self) {
        let until = Instant::now() + TIME_MAX;
        while self.read_more(until).is_ok_and(|is_more| is_more) {
            self.read.clear();
        }
    }

    /// Reads so many bytes.
    fn bytes(&mut self, len: usize, until: Instant) -> io::Result<Vec<u8>> {
        self.read.reserve_exact(len.saturating_sub(self.read.len()));
        while self.read.len() < len {
            if !self.read_more(until)? {
                return Err(io::Error::other("the proxy ended before all was sent"));
            }
        }
        Ok(std::mem::take(&mut self.read))
    }

    /// Reads what there is. Says whether there was something before the end.
    fn read_more(&mut self, until: Instant) -> io::Result<bool> {
        let mut buffer = [0; 16 << 10];
        loop {
            // Whoever sends a byte now and then is no better than who is silent.
            self.stream.set_read_timeout(Some(left(until)?))?;
            match self.stream.read(&mut buffer) {
                Ok(count) => {
                    self.read.extend_from_slice(&buffer[..count]);
                    return Ok(count > 0);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Has the proxy carry a command out.
///
/// # Errors
/// There is no such socket, nobody answers there, or the proxy refuses; the message says which.
pub(super) fn ask(matches: &ArgMatches, request: &Request) -> Result<Done, String> {
    let address = address(matches)?;
    let Some(path) = address.path() else { unreachable!("{address} is no path") };
    let reply = connect(path).and_then(|stream| exchange(stream, request));
    let (reply, talk) = reply.map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            format!("nothing listens at {address}: no proxy with this AEGIS_CONTROL runs here")
        }
        ErrorKind::PermissionDenied => {
            format!(
                "{address}: this user may not pass there; run it as the proxy's user or as root"
            )
        }
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            format!("{address} did not answer within {} s", TIME_MAX.as_secs())
        }
        _ => format!("{address}: {error}"),
    })?;
    match reply {
        Reply::Done(text) => Ok(Done { text: plain(&text), talk }),
        Reply::Refused(why) => Err(plain(&why)),
        Reply::Tapped(_) => Err("the proxy answers what was not asked".to_owned()),
    }
}

fn address(matches: &ArgMatches) -> Result<Address, String> {
    let (source, text) = setting(matches, CONTROL, "AEGIS_CONTROL", "off");
    match control_address(&text) {
        Ok(Some(address)) => Ok(address),
        Ok(None) => Err("no control socket is configured: start the proxy with \
                         AEGIS_CONTROL=unix:/PATH, and set the same here or name it by --control"
            .to_owned()),
        Err(why) => Err(format!("{source}={text}: {why}")),
    }
}

fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // It holds for the connect as well, which waits while many others do.
    socket.set_write_timeout(Some(TIME_MAX))?;
    socket.set_read_timeout(Some(TIME_MAX))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(socket.into())
}

fn exchange(mut stream: UnixStream, request: &Request) -> io::Result<(Reply, Talk)> {
    let until = Instant::now() + TIME_MAX;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    // Who is refused at once may find the connection closed already, and the reply there.
    let sent = stream.write_all(&line);
    let mut talk = Talk { stream, read: Vec::new() };
    match talk.reply(until) {
        Ok(reply) => Ok((reply, talk)),
        Err(error) => sent.and(Err(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_waited_for_until_it_comes_or_something_else() {
        let waited = |said: &[u8]| {
            let (stream, mut proxy) = UnixStream::pair().unwrap();
            proxy.write_all(said).unwrap();
            // One that goes on, or one that has ended.
            let _goes_on = (!said.is_empty()).then_some(proxy);
            Done { text: String::new(), talk: Talk { stream, read: Vec::new() } }.wait()
        };
        assert_eq!(waited(b""), Ok(()));
        assert!(waited(b"more").is_err());
    }
}
