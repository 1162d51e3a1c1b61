//! A Chronos-compatible key-value store on an LSM tree.
//!
//! One port speaks two protocols: the text lines of Chronos, and enough HTTP/1.x to read the same
//! keys with `curl` and to measure with `ab`. Unlike Chronos it reassembles lines and takes
//! pipelined ones.

use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{sleep, timeout};

/// The longest request line, without its line feed.
pub const MAX_LINE: usize = 64 * 1024;
/// The longest head of an HTTP request.
pub const MAX_HEAD: usize = 16 * 1024;
/// What `GET /` answers.
pub const WELCOME: &[u8] = b"Hello Aegis\n";

/// Replies to one batch of requests are sent early above this size, so that a small request with
/// large replies cannot fill the memory.
const FLUSH_AT: usize = 64 * 1024;
const READ_AT_LEAST: usize = 2 * 1024;
const FLUSH_MEMTABLE: Duration = Duration::from_secs(10);
const LINGER: Duration = Duration::from_secs(1);

/// A handle on the open store; clones share it.
#[derive(Clone)]
pub struct Store {
    db: Database,
    items: Keyspace,
}

impl Store {
    /// Opens the store in the directory `path`, or creates it.
    pub fn open(path: impl AsRef<Path>) -> fjall::Result<Self> {
        let db = Database::builder(path).open()?;
        let items = db.keyspace("items", KeyspaceCreateOptions::default)?;
        Ok(Self { db, items })
    }

    /// Writes everything through to the disk.
    pub fn persist(&self) -> fjall::Result<()> {
        self.db.persist(PersistMode::SyncAll)
    }

    /// Serves connections until the future is dropped, which ends them too.
    pub async fn serve(&self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((socket, _)) => {
                        connections.spawn(converse(self.clone(), socket));
                    }
                    // Out of descriptors, most likely: others must close before accepting helps.
                    Err(_) => sleep(Duration::from_millis(10)).await,
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }

    fn compact(&self) -> fjall::Result<()> {
        self.items.rotate_memtable()?;
        let deadline = Instant::now() + FLUSH_MEMTABLE;
        while self.items.sealed_memtable_count() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.items.major_compact()
    }

    /// Executes one command line and appends its reply line.
    async fn execute(&self, line: &[u8], reply: &mut Vec<u8>) {
        let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let name = words.next().unwrap_or_default().to_ascii_uppercase();
        let key = words.next();
        let rest = words.next().map(|first| {
            words.fold(first.to_vec(), |mut value, word| {
                value.push(b' ');
                value.extend_from_slice(word);
                value
            })
        });
        match (name.as_slice(), key, rest) {
            (b"PING", None, _) => reply.extend_from_slice(b"PONG"),
            (b"GET", Some(key), None) => match self.items.get(key) {
                Ok(Some(value)) => reply.extend_from_slice(&value),
                Ok(None) => reply.extend_from_slice(b"NULL"),
                Err(error) => put_error(reply, "ERR", &error),
            },
            (b"SET", Some(key), Some(value)) => match self.items.insert(key, value) {
                Ok(()) => reply.extend_from_slice(b"OK"),
                Err(error) => put_error(reply, "ERR", &error),
            },
            (b"DEL", Some(key), None) => match self.items.remove(key) {
                Ok(()) => reply.extend_from_slice(b"OK_DELETED"),
                Err(error) => put_error(reply, "ERR", &error),
            },
            (b"COMPACT", None, _) => {
                let store = self.clone();
                match spawn_blocking(move || store.compact()).await {
                    Ok(Ok(())) => reply.extend_from_slice(b"OK_COMPACTED"),
                    Ok(Err(error)) => put_error(reply, "ERR_COMPACT", &error),
                    Err(error) => put_error(reply, "ERR_COMPACT", &error),
                }
            }
            (b"GET", ..) => reply.extend_from_slice(b"ERR usage: GET key"),
            (b"SET", ..) => reply.extend_from_slice(b"ERR usage: SET key value"),
            (b"DEL", ..) => reply.extend_from_slice(b"ERR usage: DEL key"),
            _ => reply.extend_from_slice(b"ERR_UNKNOWN_COMMAND"),
        }
        reply.push(b'\n');
    }
}

/// An error's text may have line feeds, a reply must not.
fn put_error(reply: &mut Vec<u8>, code: &str, error: &dyn std::error::Error) {
    reply.extend_from_slice(code.as_bytes());
    for word in error.to_string().split_whitespace() {
        reply.push(b' ');
        reply.extend_from_slice(word.as_bytes());
    }
}

/// Serves one connection to its end.
async fn converse(store: Store, mut socket: TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let mut session = Session { store, mode: Mode::Unknown, reply: Vec::new() };
    let mut input = Vec::new();
    loop {
        let mut scanned = input.len();
        input.reserve(READ_AT_LEAST);
        if socket.read_buf(&mut input).await? == 0 {
            return Ok(());
        }
        let mut start = 0;
        while let Some(length) = input[scanned..].iter().position(|&byte| byte == b'\n') {
            let end = scanned + length;
            if session.line(&input[start..end]).await.is_break() {
                return session.close(socket).await;
            }
            if session.reply.len() >= FLUSH_AT {
                session.flush(&mut socket).await?;
            }
            start = end + 1;
            scanned = start;
        }
        input.drain(..start);
        if session.check_length(input.len()).is_break() {
            return session.close(socket).await;
        }
        session.flush(&mut socket).await?;
    }
}

/// What a connection speaks; its first line decides.
enum Mode {
    Unknown,
    Lines,
    Http(Option<Request>),
}

struct Session {
    store: Store,
    mode: Mode,
    reply: Vec<u8>,
}

impl Session {
    /// Takes the next line, without its line feed; breaks when the connection must close.
    async fn line(&mut self, line: &[u8]) -> ControlFlow<()> {
        self.check_length(line.len())?;
        if matches!(self.mode, Mode::Unknown) {
            let http = Request::parse(line).is_some();
            self.mode = if http { Mode::Http(None) } else { Mode::Lines };
            self.check_length(line.len())?;
        }
        match &mut self.mode {
            Mode::Unknown | Mode::Lines => {
                self.store.execute(line, &mut self.reply).await;
                ControlFlow::Continue(())
            }
            Mode::Http(request) => {
                let line = line.trim_ascii_end();
                match request {
                    Some(open) if !line.is_empty() => open.header(line),
                    Some(_) => {
                        if let Some(request) = request.take() {
                            return request.answer(&self.store, &mut self.reply);
                        }
                    }
                    // Blank lines before a request are harmless leftovers of the one before.
                    None if line.is_empty() => {}
                    None => {
                        *request = Request::parse(line);
                        if request.is_none() {
                            put_response(&mut self.reply, "400 Bad Request", b"", true, CLOSE);
                            return ControlFlow::Break(());
                        }
                    }
                }
                ControlFlow::Continue(())
            }
        }
    }

    /// Breaks with a reply when a line of this length, whole or so far, is too long.
    fn check_length(&mut self, length: usize) -> ControlFlow<()> {
        if let Mode::Http(request) = &self.mode {
            if length + request.as_ref().map_or(0, |request| request.size) > MAX_HEAD {
                let status = "431 Request Header Fields Too Large";
                put_response(&mut self.reply, status, b"", true, CLOSE);
                return ControlFlow::Break(());
            }
        } else if length > MAX_LINE {
            self.reply.extend_from_slice(b"ERR line too long\n");
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    async fn flush(&mut self, socket: &mut TcpStream) -> io::Result<()> {
        if !self.reply.is_empty() {
            socket.write_all(&self.reply).await?;
            self.reply.clear();
            self.reply.shrink_to(FLUSH_AT);
        }
        Ok(())
    }

    /// Sends what is left and closes. Closing on unread input would reset the connection and could
    /// destroy the reply on its way, hence the short wait for the peer's end.
    async fn close(mut self, mut socket: TcpStream) -> io::Result<()> {
        self.flush(&mut socket).await?;
        socket.shutdown().await?;
        let mut rest = vec![0; READ_AT_LEAST];
        let drained = timeout(LINGER, async {
            while socket.read(&mut rest).await? > 0 {}
            Ok(())
        });
        drained.await.unwrap_or(Ok(()))
    }
}

const KEEP: &str = "";
const KEEP_OLD: &str = "Connection: keep-alive\r\n";
const CLOSE: &str = "Connection: close\r\n";

/// An HTTP request whose head is being read.
struct Request {
    method: Vec<u8>,
    target: Vec<u8>,
    modern: bool,
    keep_alive: bool,
    has_body: bool,
    size: usize,
}

impl Request {
    /// Reads a request line; `None` if it is none.
    fn parse(line: &[u8]) -> Option<Self> {
        let line = line.trim_ascii_end();
        let mut words = line.split(|&byte| byte == b' ');
        let (method, target, version) = (words.next()?, words.next()?, words.next()?);
        let modern = version == b"HTTP/1.1";
        let known = modern || version == b"HTTP/1.0";
        // `SET /key HTTP/1.1` is a valid Chronos command, and HTTP has no such method.
        let is_set = method.eq_ignore_ascii_case(b"SET");
        if !known || is_set || !target.starts_with(b"/") || words.next().is_some() {
            return None;
        }
        Some(Self {
            method: method.to_vec(),
            target: target.to_vec(),
            modern,
            keep_alive: modern,
            has_body: false,
            size: line.len(),
        })
    }

    /// Takes note of one header line.
    fn header(&mut self, line: &[u8]) {
        self.size += line.len();
        let mut parts = line.splitn(2, |&byte| byte == b':');
        let name = parts.next().unwrap_or_default();
        let value = parts.next().unwrap_or_default().trim_ascii();
        if name.eq_ignore_ascii_case(b"connection") {
            for option in value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
                if option.eq_ignore_ascii_case(b"close") {
                    self.keep_alive = false;
                } else if option.eq_ignore_ascii_case(b"keep-alive") {
                    self.keep_alive = true;
                }
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding")
            || name.eq_ignore_ascii_case(b"content-length") && value != b"0"
        {
            self.has_body = true;
        }
    }

    /// Appends the response; breaks when it ends the connection.
    fn answer(self, store: &Store, reply: &mut Vec<u8>) -> ControlFlow<()> {
        // No request here needs a body: closing is simpler than to find where it ends.
        let keep = self.keep_alive && !self.has_body;
        let connection = match (keep, self.modern) {
            (false, _) => CLOSE,
            (true, false) => KEEP_OLD,
            (true, true) => KEEP,
        };
        let with_body = self.method != b"HEAD";
        let mut put = |status, body| put_response(reply, status, body, with_body, connection);
        if self.method != b"GET" && with_body {
            put("405 Method Not Allowed\r\nAllow: GET, HEAD", b"");
        } else if self.target == b"/" {
            put("200 OK", WELCOME);
        } else if let Some(key) = key_of(&self.target) {
            match store.items.get(&key) {
                Ok(Some(value)) => put("200 OK", &value),
                Ok(None) => put("404 Not Found", b"not found\n"),
                Err(_) => put("500 Internal Server Error", b""),
            }
        } else {
            put("400 Bad Request", b"");
        }
        if keep { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

/// The key that a request's target names: its path without the slash, percent-decoded.
fn key_of(target: &[u8]) -> Option<Vec<u8>> {
    let mut rest = target.strip_prefix(b"/")?.split(|&byte| byte == b'?').next()?;
    let mut key = Vec::with_capacity(rest.len());
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            key.push(*first);
            continue;
        }
        let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
        key.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &tail[2..];
    }
    (!key.is_empty()).then_some(key)
}

/// Appends a response. `connection` is a whole header line, or nothing.
fn put_response(reply: &mut Vec<u8>, status: &str, body: &[u8], with_body: bool, connection: &str) {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\
         {connection}\r\n"
    );
    reply.extend_from_slice(head.as_bytes());
    if with_body {
        reply.extend_from_slice(body);
    }
}
