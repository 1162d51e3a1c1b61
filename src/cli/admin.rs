//! Asks the admin port of a proxy that runs, on behalf of the commands that show something of it.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use clap::{Arg, ArgMatches};
use serde_json::Value;

use super::setting::setting;
use super::table::plain;
use crate::config::{ADMIN_DEFAULT, admin_address};

const ADMIN: &str = "admin";

/// A page of each of the most endpoints and routes there can be is far shorter.
const ANSWER_BYTES_MAX: u64 = 8 << 20;

/// How long a page may take that nothing has to be waited for.
pub(super) const PAGE_TIME_MAX: Duration = Duration::from_secs(3);

/// Where a proxy tells about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Admin {
    /// The address that people know, and those to try in its place.
    name: String,
    addresses: Vec<SocketAddr>,
}

/// What a page says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: String,
}

/// The option that names the proxy.
pub(super) fn option() -> Arg {
    Arg::new(ADMIN)
        .long(ADMIN)
        .value_name("IP:PORT")
        .help("Where the proxy's admin port is [default: AEGIS_ADMIN, else port 8082 of this host]")
}

impl Admin {
    /// The one that the option names, or else `AEGIS_ADMIN`: what else is in the environment need not
    /// be right, so that any terminal will do.
    ///
    /// # Errors
    /// Neither is an address to connect to; the message says which.
    pub(super) fn of(matches: &ArgMatches) -> Result<Self, String> {
        let (source, text) = setting(matches, ADMIN, "AEGIS_ADMIN", ADMIN_DEFAULT);
        Self::at(&text, &source)
    }

    fn at(text: &str, source: &str) -> Result<Self, String> {
        let address = admin_address(text).map_err(|why| format!("{source}={text}: {why}"))?;
        let port = address.port();
        if port == 0 {
            return Err(format!("{source}={text}: the port is not known; name it by --admin"));
        }
        let here: &[IpAddr] = match address.ip() {
            // Without IPv6 the proxy has made it IPv4.
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
                &[IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]
            }
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => &[IpAddr::V4(Ipv4Addr::LOCALHOST)],
            _ => return Ok(Self { name: address.to_string(), addresses: vec![address] }),
        };
        let addresses: Vec<_> = here.iter().map(|&ip| SocketAddr::new(ip, port)).collect();
        Ok(Self { name: addresses[0].to_string(), addresses })
    }

    /// Reads a page, for `within` at most.
    ///
    /// # Errors
    /// Nobody answers there, not in time, or not by HTTP.
    pub(super) fn get(&self, path: &str, within: Duration) -> Result<Answer, String> {
        let until = Instant::now() + within;
        let answer = self.connect(until).and_then(|stream| ask(stream, path, until));
        answer.map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused => format!("nothing listens at {}", self.name),
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                format!("{} did not answer within {} s", self.name, within.as_secs())
            }
            _ => format!("{}: {error}", self.name),
        })
    }

    /// Reads a page of JSON, as a proxy has them: with its routes.
    ///
    /// # Errors
    /// As [`Admin::get`], or the page is none; a proxy's own refusal is passed on.
    pub(super) fn json(&self, path: &str) -> Result<Value, String> {
        let Answer { status, body } = self.get(path, PAGE_TIME_MAX)?;
        if status != 200 {
            return Err(format!("{}{path}: {status} {}", self.name, plain(body.trim_end())));
        }
        let read = serde_json::from_str::<Value>(&body);
        let page = read.map_err(|error| format!("{}{path} is no JSON: {error}", self.name))?;
        // Of what another program says, nothing can be known.
        let is_of_proxy = page["routes"].is_array();
        is_of_proxy.then_some(page).ok_or_else(|| format!("{}{path} is no proxy's", self.name))
    }

    fn connect(&self, until: Instant) -> io::Result<TcpStream> {
        let mut failure = None;
        for address in &self.addresses {
            match left(until).and_then(|left| TcpStream::connect_timeout(address, left)) {
                Ok(stream) => return Ok(stream),
                // That a host lacks IPv6 says nothing of the proxy.
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        Err(failure.unwrap_or_else(|| unreachable!("there is an address")))
    }
}

/// To HTTP/1.0 the answer comes in one piece, and its end is the connection's.
fn ask(mut stream: TcpStream, path: &str, until: Instant) -> io::Result<Answer> {
    stream.set_write_timeout(Some(left(until)?))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: aegis\r\n\r\n").as_bytes())?;
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    while bytes.len() as u64 <= ANSWER_BYTES_MAX {
        // A server that sends a byte now and then is no better than a silent one.
        stream.set_read_timeout(Some(left(until)?))?;
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    parse(&String::from_utf8_lossy(&bytes))
        .ok_or_else(|| io::Error::other("the answer is not HTTP"))
}

/// The time until then, which is an error where there is none left.
pub(super) fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn parse(text: &str) -> Option<Answer> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    // Whoever answers there must not speak to the terminal.
    let body = body.chars().map(|c| if c == '\n' || !c.is_control() { c } else { '\u{fffd}' });
    Some(Answer { status, body: body.collect() })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    #[test]
    fn an_address_that_means_any_is_asked_at_this_host() {
        for (text, first) in [
            ("[::]:8082", "127.0.0.1:8082"),
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("10.0.0.1:2", "10.0.0.1:2"),
            (" [::1]:3 ", "[::1]:3"),
        ] {
            assert_eq!(Admin::at(text, "--admin").unwrap().name, first);
        }
        let wrong = |text| Admin::at(text, "--admin").unwrap_err();
        assert_eq!(wrong("here"), "--admin=here: not an IP address and a port");
        assert!(wrong("127.0.0.1:0").contains("the port is not known"));
    }

    #[test]
    fn where_no_address_answers_the_first_ones_error_counts() {
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        // No stream can be had to all of a network.
        let addresses = vec![closed, "255.255.255.255:1".parse().unwrap()];
        let admin = Admin { name: "here".to_owned(), addresses };
        let error = admin.get("/x", PAGE_TIME_MAX).unwrap_err();
        assert_eq!(error, "nothing listens at here");
    }

    /// What is said of a server that does this with its first connection.
    fn get_from(server: impl FnOnce(TcpStream) + Send + 'static) -> Result<Answer, String> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // To close what was not read would be a reset.
            assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
            server(stream);
        });
        let found = Admin::at(&address, "--admin").unwrap().get("/x", Duration::from_millis(50));
        server.join().unwrap();
        found.map_err(|error| error.replace(&address, "HERE"))
    }

    #[test]
    fn an_answer_is_read_to_its_end_and_anything_else_is_an_error() {
        let found = get_from(|mut stream| {
            stream.write_all(b"HTTP/1.1 503 Service Unavailable\r\na: b\r\n\r\ndrain").unwrap();
            stream.write_all(b"ing\n").unwrap();
        });
        assert_eq!(found, Ok(Answer { status: 503, body: "draining\n".to_owned() }));
        let other = get_from(|mut stream| stream.write_all(b"SSH-2.0\r\n").unwrap());
        assert!(other.is_err(), "{other:?}");
        let silent = get_from(|mut stream| {
            // Its client leaves.
            let _ = io::copy(&mut stream, &mut io::sink());
        });
        assert_eq!(silent, Err("HERE did not answer within 0 s".to_owned()));
    }
}
