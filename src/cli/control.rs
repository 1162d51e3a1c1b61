//! Gives commands to a proxy that runs, by its control socket.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::{Arg, ArgMatches};
use socket2::{Domain, SockAddr, Socket, Type};

use super::admin::left;
use super::table::plain;
use crate::config::control_address;
use crate::control::socket::{Reply, Request};
use crate::io::net::Address;

const CONTROL: &str = "control";

/// How long the proxy may take to answer; it waits for less.
const TIME_MAX: Duration = Duration::from_secs(3);

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
    stream: UnixStream,
}

impl Done {
    /// Waits until the process has ended, which closes the connection.
    pub(super) fn wait(mut self) -> Result<(), String> {
        self.stream.set_read_timeout(None).map_err(|error| error.to_string())?;
        match io::copy(&mut self.stream, &mut io::sink()) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => Err(error.to_string()),
            _ => Ok(()),
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
    let (reply, stream) = reply.map_err(|error| match error.kind() {
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
        Reply::Done(text) => Ok(Done { text: plain(&text), stream }),
        Reply::Refused(why) => Err(plain(&why)),
    }
}

fn address(matches: &ArgMatches) -> Result<Address, String> {
    let (source, text) = match matches.get_one::<String>(CONTROL) {
        Some(text) => ("--control", text.clone()),
        None => ("AEGIS_CONTROL", std::env::var("AEGIS_CONTROL").unwrap_or("off".to_owned())),
    };
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

fn exchange(mut stream: UnixStream, request: &Request) -> io::Result<(Reply, UnixStream)> {
    let until = Instant::now() + TIME_MAX;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    // Who is refused at once may find the connection closed already, and the reply there.
    let sent = stream.write_all(&line);
    let (mut reply, mut buffer) = (Vec::new(), vec![0; REPLY_BYTES_MAX]);
    let read = loop {
        // Whoever sends a byte now and then is no better than who is silent.
        let read = left(until).and_then(|left| stream.set_read_timeout(Some(left)));
        match read.and_then(|()| stream.read(&mut buffer)) {
            Ok(0) => break Ok(()),
            Ok(count) => reply.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => break Err(error),
        }
        if reply.ends_with(b"\n") || reply.len() > REPLY_BYTES_MAX {
            break Ok(());
        }
    };
    if !reply.ends_with(b"\n") {
        read.and(sent)?;
        return Err(io::Error::other("the connection was closed without an answer"));
    }
    Ok((serde_json::from_slice(&reply)?, stream))
}
