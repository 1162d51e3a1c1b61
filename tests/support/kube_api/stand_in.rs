//! An API server as far as discovery needs one: list, watch, streaming lists, bookmarks, resource
//! versions, time limits, and errors and nonsense on demand. The tests that use it run on a real one, too.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use super::odd::{self, Odd};
use super::tls::Authority;
use super::{ADMIN_TOKEN, PROXY_TOKEN};

pub(super) type Tls = StreamOwned<ServerConnection, TcpStream>;

/// What the server is to do wrong.
pub struct Faults(Arc<Store>);

#[derive(Default)]
struct Wrong {
    forbidden: bool,
    /// Objects of this kind are.
    hidden: Option<&'static str>,
    /// An answer for each request of the proxy: its status code.
    answer: Option<u16>,
    /// Objects of which kind it gets this status for, in place of an answer.
    failing: Option<(&'static str, u16)>,
    /// What each request of the proxy gets in place of an answer.
    odd: Option<Odd>,
    /// Streaming lists are not known, as before 1.32.
    of_old: bool,
    /// They fail once they have begun, as where etcd is too old for them.
    of_old_etcd: bool,
    /// The proxy's token, where it is not the first one.
    token: Option<String>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// Changes up to this version are forgotten.
    forgotten: u64,
    /// By the collection's path and the name.
    objects: BTreeMap<(String, String), Value>,
    log: Vec<Change>,
    wrong: Wrong,
    /// Counts what ends all watches.
    cut: u64,
    /// The proxy's requests so far.
    requests: u64,
    /// How long the proxy wanted its watches to last.
    timeouts: Vec<u64>,
    /// What the proxy's watches that are open now are on.
    watches: Vec<String>,
}

struct Change {
    version: u64,
    path: String,
    /// As it is, or was at last.
    object: Value,
    is_deleted: bool,
    /// As it was before.
    old: Option<Value>,
}

impl Change {
    /// What a watch is told of it: for who selects by label, what begins to match appears, and what no
    /// longer does disappears.
    fn event(&self, request: &Request) -> Option<Value> {
        let had = self.old.as_ref().is_some_and(|old| matches(old, request));
        let has = !self.is_deleted && matches(&self.object, request);
        let kind = match (had, has) {
            _ if self.path != request.path => return None,
            (false, false) => return None,
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
        };
        Some(json!({"type": kind, "object": self.object}))
    }
}

#[derive(Default)]
struct Store {
    state: Mutex<State>,
    changed: Condvar,
}

impl Faults {
    pub fn set_forbidden(&self, forbidden: bool) {
        self.change(|state| state.wrong.forbidden = forbidden);
    }

    /// Forbids the proxy objects of one kind, such as `pods`, or of none.
    pub fn hide(&self, kind: Option<&'static str>) {
        self.change(|state| state.wrong.hidden = kind);
    }

    /// Makes each request of the proxy fail with this status, or no longer.
    pub fn answer(&self, status: Option<u16>) {
        self.change(|state| state.wrong.answer = status);
    }

    /// Makes each request of the proxy for objects of one kind fail with this status, or of none.
    pub fn fail(&self, kind: Option<(&'static str, u16)>) {
        self.change(|state| state.wrong.failing = kind);
    }

    /// Makes the server talk nonsense to the proxy, or no longer.
    pub fn talk(&self, odd: Option<Odd>) {
        self.change(|state| state.wrong.odd = odd);
    }

    /// How many requests of the proxy there were.
    pub fn requests(&self) -> u64 {
        self.0.lock().requests
    }

    /// How many seconds each watch of the proxy was to last.
    pub fn timeouts(&self) -> Vec<u64> {
        self.0.lock().timeouts.clone()
    }

    /// What each watch of the proxy that is open now is on: a collection and a selector.
    pub fn watches(&self) -> Vec<String> {
        self.0.lock().watches.clone()
    }

    pub fn forget_streaming_lists(&self) {
        self.change(|state| state.wrong.of_old = true);
    }

    /// Makes streaming lists fail once they have begun.
    pub fn fail_streaming_lists(&self) {
        self.change(|state| state.wrong.of_old_etcd = true);
    }

    /// Accepts this token of the proxy and no other one.
    pub fn accept_only(&self, token: &str) {
        self.change(|state| state.wrong.token = Some(token.to_owned()));
    }

    /// Forgets all changes: watches that fall behind get 410.
    pub fn compact(&self) {
        self.change(|state| {
            state.version += 1;
            state.forgotten = state.version;
            state.log.clear();
        });
    }

    /// Watches end, as they do when the server restarts, after the change.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.lock();
        change(&mut state);
        state.cut += 1;
        self.0.changed.notify_all();
    }
}

impl Store {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn put(&self, collection: &str, name: &str, mut object: Value) -> Value {
        let mut state = self.lock();
        state.version += 1;
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        let key = (collection.to_owned(), name.to_owned());
        let old = state.objects.insert(key, object.clone());
        let version = state.version;
        let path = collection.to_owned();
        state.log.push(Change { version, path, object: object.clone(), is_deleted: false, old });
        self.changed.notify_all();
        object
    }

    fn delete(&self, collection: &str, name: &str) -> Option<Value> {
        let mut state = self.lock();
        let old = state.objects.remove(&(collection.to_owned(), name.to_owned()))?;
        let mut object = old.clone();
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let (path, old) = (collection.to_owned(), Some(old));
        state.log.push(Change { version, path, object: object.clone(), is_deleted: true, old });
        self.changed.notify_all();
        Some(object)
    }
}

pub struct StandIn {
    address: SocketAddr,
    faults: Faults,
}

impl StandIn {
    pub fn start(authority: &Authority) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let store = Arc::<Store>::default();
        let (shared, config) = (store.clone(), authority.server_config());
        // It lives as long as the test program.
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (store, config) = (shared.clone(), config.clone());
                // A client that goes away is no failure.
                thread::spawn(move || drop(serve(stream, config, &store)));
            }
        });
        Self { address, faults: Faults(store) }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn faults(&self) -> &Faults {
        &self.faults
    }
}

pub(super) struct Request {
    method: String,
    pub(super) path: String,
    pub(super) query: BTreeMap<String, String>,
    token: String,
    body: Value,
    keep: bool,
}

fn serve(stream: TcpStream, config: Arc<ServerConfig>, store: &Store) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let tls = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut stream = BufReader::new(StreamOwned::new(tls, stream));
    while let Some(mut request) = read(&mut stream)? {
        let tls = stream.get_mut();
        if tls.conn.peer_certificates().is_some() {
            // It is signed for nobody else.
            PROXY_TOKEN.clone_into(&mut request.token);
        }
        let odd = note(&request, store);
        if let Some(odd) = odd {
            let objects: Vec<_> = selected(&store.lock(), &request).cloned().collect();
            odd::talk(tls, odd, &request, &objects, || store.lock().wrong.odd == Some(odd))?;
            // Whatever it was, nothing comes after it.
            return Ok(());
        }
        if let Some((status, message)) = refusal(&request, store) {
            answer(tls, status, &failure(status, &message))?;
        } else if request.query.get("watch").is_some_and(|watch| watch == "true") {
            let noted = note_watch(&request, store);
            let ended = watch(tls, &request, store);
            forget_watch(noted, store);
            ended?;
        } else {
            let (status, body) = answer_to(&request, store);
            answer(tls, status, &body)?;
        }
        if !request.keep {
            tls.conn.send_close_notify();
            return tls.flush();
        }
    }
    Ok(())
}

fn read(stream: &mut BufReader<Tls>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let bad = || std::io::Error::from(std::io::ErrorKind::InvalidData);
    let (method, target) = (words.next().ok_or_else(bad)?, words.next().ok_or_else(bad)?);
    let keep = words.next().is_some_and(|version| version == "HTTP/1.1");
    let (mut length, mut token) = (0, String::new());
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        match &name.to_ascii_lowercase()[..] {
            "content-length" => length = value.parse().map_err(|_| bad())?,
            "authorization" => value.trim_start_matches("Bearer ").clone_into(&mut token),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = query.split('&').filter_map(|pair| pair.split_once('='));
    let query = query.map(|(key, value)| (key.to_owned(), decode(value))).collect();
    let body = serde_json::from_slice(&body).unwrap_or_default();
    Ok(Some(Request { method, path: path.to_owned(), query, token, body, keep }))
}

/// Counts a request of the proxy, and says what nonsense it is to get.
fn note(request: &Request, store: &Store) -> Option<Odd> {
    if request.token == ADMIN_TOKEN {
        return None;
    }
    let mut state = store.lock();
    state.requests += 1;
    let timeout: Option<u64> =
        request.query.get("timeoutSeconds").and_then(|text| text.parse().ok());
    state.timeouts.extend(timeout);
    state.wrong.odd
}

/// Notes a watch that begins, if it is the proxy's.
fn note_watch(request: &Request, store: &Store) -> Option<String> {
    let selector = request.query.get("labelSelector").map(String::as_str).unwrap_or_default();
    let on = format!("{}?{selector}", request.path.rsplit('/').next().unwrap_or_default());
    (request.token != ADMIN_TOKEN).then(|| {
        store.lock().watches.push(on.clone());
        on
    })
}

fn forget_watch(noted: Option<String>, store: &Store) {
    let open = &mut store.lock().watches;
    if let Some(at) = noted.and_then(|noted| open.iter().position(|on| *on == noted)) {
        open.remove(at);
    }
}

/// Undoes the percent-encoding.
fn decode(text: &str) -> String {
    let mut parts = text.split('%');
    let mut decoded = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (code, rest) = part.split_at(2);
        decoded.push(u8::from_str_radix(code, 16).unwrap_or(b'?') as char);
        decoded.push_str(rest);
    }
    decoded
}

fn refusal(request: &Request, store: &Store) -> Option<(u16, String)> {
    let state = store.lock();
    let proxy = state.wrong.token.as_deref().unwrap_or(PROXY_TOKEN);
    if request.token == ADMIN_TOKEN {
        return None;
    }
    if request.token != proxy {
        return Some((401, "Unauthorized".to_owned()));
    }
    if state.wrong.forbidden || state.wrong.hidden.is_some_and(|kind| request.path.ends_with(kind))
    {
        let verb = if request.query.contains_key("watch") { "watch" } else { "list" };
        let message = format!("User \"proxy\" cannot {verb} {}", request.path);
        return Some((403, message));
    }
    if state.wrong.of_old && request.query.contains_key("sendInitialEvents") {
        let message = "sendInitialEvents: Forbidden: the WatchList feature gate is disabled";
        return Some((422, message.to_owned()));
    }
    let since = request.query.get("resourceVersion").and_then(|text| text.parse::<u64>().ok());
    if since.is_some_and(|since| since > state.version) {
        return Some((504, "Too large resource version".to_owned()));
    }
    let failing = state.wrong.failing.filter(|(kind, _)| request.path.ends_with(kind));
    let status = state.wrong.answer.or(failing.map(|(_, status)| status));
    status.map(|status| (status, format!("told to answer {status}")))
}

pub(super) fn failure(code: u16, message: &str) -> Value {
    let details = (code == 429).then(|| json!({"retryAfterSeconds": 1}));
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
           "message": message, "reason": "", "code": code, "details": details})
}

fn answer_to(request: &Request, store: &Store) -> (u16, Value) {
    let path = request.path.trim_end_matches("/status");
    let (collection, name) = path.rsplit_once('/').unwrap_or(("", path));
    let missing = || (404, failure(404, "not found"));
    let key = (collection.to_owned(), name.to_owned());
    match &request.method[..] {
        "POST" => {
            let name = request.body["metadata"]["name"].as_str().unwrap_or_default();
            let mut object = request.body.clone();
            object["metadata"]["uid"] = json!(format!("uid-of-{name}"));
            (201, store.put(path, name, object))
        }
        "PUT" if store.lock().objects.contains_key(&key) => {
            (200, store.put(collection, name, request.body.clone()))
        }
        "PUT" => missing(),
        "DELETE" => store.delete(collection, name).map_or_else(missing, |object| (200, object)),
        "GET" if store.lock().objects.contains_key(&key) => {
            (200, store.lock().objects[&key].clone())
        }
        "GET" => {
            let state = store.lock();
            let items: Vec<_> = selected(&state, request).cloned().collect();
            let version = state.version.to_string();
            (
                200,
                json!({"kind": "List", "apiVersion": "v1",
                         "metadata": {"resourceVersion": version}, "items": items}),
            )
        }
        _ => (405, failure(405, "method not allowed")),
    }
}

fn selected<'a>(state: &'a State, request: &'a Request) -> impl Iterator<Item = &'a Value> {
    let of_kind = state.objects.iter().filter(|((path, _), _)| *path == request.path);
    of_kind.map(|(_, object)| object).filter(|object| matches(object, request))
}

/// Whether an object has the labels that are asked for, each `key=value`.
fn matches(object: &Value, request: &Request) -> bool {
    let selector = request.query.get("labelSelector").map(String::as_str).unwrap_or_default();
    selector
        .split(',')
        .filter_map(|pair| pair.split_once('='))
        .all(|(key, value)| object["metadata"]["labels"][key].as_str() == Some(value))
}

pub(super) fn answer(stream: &mut Tls, status: u16, body: &Value) -> std::io::Result<()> {
    let body = body.to_string();
    let head = format!(
        "HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes())?;
    stream.flush()
}

fn watch(stream: &mut Tls, request: &Request, store: &Store) -> std::io::Result<()> {
    let number = |key: &str| request.query.get(key).and_then(|text| text.parse::<u64>().ok());
    let streaming = request.query.get("sendInitialEvents").is_some_and(|yes| yes == "true");
    let ends = Instant::now() + Duration::from_secs(number("timeoutSeconds").unwrap_or(290));
    let head =
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes())?;
    if streaming && store.lock().wrong.of_old_etcd {
        let failed = failure(500, "the storage feature RequestWatchProgress is disabled");
        chunk(stream, &json!({"type": "ERROR", "object": failed}))?;
        stream.write_all(b"0\r\n\r\n")?;
        return stream.flush();
    }
    let (mut seen, cut, first) = {
        let state = store.lock();
        let since = if streaming { state.version } else { number("resourceVersion").unwrap_or(0) };
        let first: Vec<_> = if streaming {
            selected(&state, request)
                .map(|object| json!({"type": "ADDED", "object": object}))
                .collect()
        } else {
            Vec::new()
        };
        (since, state.cut, first)
    };
    first.iter().try_for_each(|event| chunk(stream, event))?;
    if streaming {
        let done = json!({"k8s.io/initial-events-end": "true"});
        chunk(stream, &bookmark(request, seen, done))?;
    }
    stream.flush()?;
    loop {
        let (events, version) = {
            let mut state = store.lock();
            while state.version <= seen && state.cut == cut && Instant::now() < ends {
                let left = ends.saturating_duration_since(Instant::now());
                state = store.changed.wait_timeout(state, left).unwrap().0;
            }
            if seen < state.forgotten {
                let gone = failure(410, "too old resource version");
                (vec![json!({"type": "ERROR", "object": gone})], u64::MAX)
            } else {
                let new = state.log.iter().filter(|change| change.version > seen);
                (new.filter_map(|change| change.event(request)).collect(), state.version)
            }
        };
        events.iter().try_for_each(|event| chunk(stream, event))?;
        let over = version == u64::MAX || store.lock().cut != cut || Instant::now() >= ends;
        if over {
            if version != u64::MAX {
                chunk(stream, &bookmark(request, version, json!({})))?;
            }
            stream.write_all(b"0\r\n\r\n")?;
            return stream.flush();
        }
        seen = version;
        stream.flush()?;
    }
}

pub(super) fn bookmark(request: &Request, version: u64, annotations: Value) -> Value {
    let (kind, api) = if request.path.ends_with("pods") {
        ("Pod", "v1")
    } else if request.path.ends_with("statefulsets") {
        ("StatefulSet", "apps/v1")
    } else {
        ("EndpointSlice", "discovery.k8s.io/v1")
    };
    json!({"type": "BOOKMARK", "object": {
        "kind": kind, "apiVersion": api,
        "metadata": {"resourceVersion": version.to_string(), "annotations": annotations},
    }})
}

pub(super) fn chunk(stream: &mut Tls, event: &Value) -> std::io::Result<()> {
    let line = format!("{event}\n");
    stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes())
}
