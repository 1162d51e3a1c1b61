//! One kind of object, kept known: a list, then watches, each where the last one ended.
//!
//! ```text
//! connect ─▶ list ─▶ watching ─its time is over─▶ watching …
//!    ▲        ▲         │
//!    │        ├─────────┴─ too old a version ─┐
//!    └────────┴── wait, longer each time ◀────┴─ any trouble
//! ```
//!
//! The waits grow until a watch has *lasted*: an answer that is no error proves nothing.

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::NamespaceResourceScope;
use kube::api::{ListParams, WatchParams};
use kube::core::{ObjectList, Request, WatchEvent};
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tracing::{debug, info, warn};

use super::backoff::{Backoff, Reported, jittered};
use super::connection::{Connection, Lines, Pace, Target, read_all};
use super::convert::Rules;
use super::known::{Known, Location, Weight};
use super::offload::Offload;
use super::trouble::Trouble;
use crate::config::KubeConfig;
use crate::control::discovery::status::{ErrorKind, Status};

/// A watch that has lasted for so long works; one of a shorter time, for most of that.
const LASTED: Duration = Duration::from_secs(5);

/// How much longer than a watch lasts a connection may be silent.
const SILENCE_MARGIN: Duration = Duration::from_secs(5);

/// A server that has sent bookmarks within a watch sends one each minute: silence for longer than
/// this is a dead connection.
const BOOKMARKS_MISSING: Duration = Duration::from_secs(150);

/// How long a list may take, of all pages or by a watch.
const LIST_TIME_MAX: Duration = Duration::from_secs(60);

/// Objects in a page of a list, and pages.
const PAGE_OBJECTS: u32 = 250;
const PAGES_MAX: usize = 40;

/// A page in bytes: of the objects that matter, each has some KiB.
const PAGE_BYTES_MAX: usize = 16 << 20;

/// An event in bytes: etcd holds objects of 1.5 MiB.
const EVENT_BYTES_MAX: usize = 4 << 20;

/// A client is made anew where this one finds no server for so long: certificates change.
const CLIENT_AGE_MAX: Duration = Duration::from_secs(60);

/// The annotation of the bookmark that ends a list by a watch.
const LIST_ENDS: &str = "k8s.io/initial-events-end";

/// A kind of object that endpoints are read from.
pub(super) trait Source:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + DeserializeOwned
    + Send
    + 'static
{
    /// What is kept of it.
    type Extract: PartialEq + Send + Weight;

    /// The selector of those that matter.
    fn labels(kube: &KubeConfig) -> String;

    /// Reads it.
    fn extract(&self, rules: &Rules) -> Self::Extract;
}

/// What a watch is on.
pub(super) struct Subject<'a> {
    /// The configuration.
    pub kube: &'a KubeConfig,
    /// How objects are read.
    pub rules: &'a Rules,
    /// Where it says how it fares.
    pub status: &'a Status,
}

/// Keeps one kind of object known.
pub(super) struct Watcher<'a, K: Source> {
    subject: Subject<'a>,
    known: Known<'a, K::Extract>,
    resource: String,
    namespace: String,
    offload: Arc<Offload>,
    pace: Pace,
    backoff: Backoff,
    reported: Reported,
    /// Whether the server knows lists by watches.
    streaming: bool,
    /// Whether it has sent bookmarks within a watch.
    bookmarks: bool,
    /// Where the last watch ended, and the next one goes on.
    version: Option<String>,
    /// A list by a watch is to be no older than this; empty means the latest.
    version_min: String,
}

impl<'a, K: Source> Watcher<'a, K> {
    /// One that has not begun.
    pub(super) fn new(subject: Subject<'a>, known: Known<'a, K::Extract>) -> Self {
        let resource = match &K::group(&())[..] {
            "" => K::plural(&()).into_owned(),
            group => format!("{}.{group}", K::plural(&())),
        };
        Self {
            subject,
            known,
            resource,
            namespace: String::new(),
            offload: Arc::default(),
            pace: Pace::default(),
            backoff: Backoff::default(),
            reported: Reported::default(),
            streaming: true,
            bookmarks: false,
            version: None,
            version_min: "0".to_owned(),
        }
    }

    /// Watches for ever.
    pub(super) async fn run(mut self) {
        loop {
            match self.connect().await {
                Ok(mut connection) => self.use_connection(&mut connection).await,
                Err(trouble) => self.on_trouble(trouble).await,
            }
        }
    }

    async fn connect(&mut self) -> Result<Connection, Trouble> {
        let silence = self.subject.kube.watch_timeout + SILENCE_MARGIN;
        let offload = Arc::clone(&self.offload);
        let target = self.known.wait_for(Target::find(&offload)).await?;
        let kube = self.subject.kube;
        let named = kube.service.as_ref().and_then(|service| service.namespace.as_ref());
        let named = named.or(kube.namespace.as_ref());
        let namespace = named.unwrap_or(&target.namespace).clone();
        let location = Location { server: target.server.clone(), namespace };
        (self.known.on_located)(&location);
        let connection = self.known.wait_for(target.connect(silence, &offload)).await?;
        self.known.begin_first_wait();
        let namespace = location.namespace;
        if self.namespace != namespace {
            let labels = K::labels(kube);
            let resource = &self.resource;
            info!(resource, namespace, labels, "watching the Kubernetes API");
            self.namespace = namespace;
        }
        Ok(connection)
    }

    /// Lists and watches until a new connection is needed: credentials are read anew then.
    async fn use_connection(&mut self, connection: &mut Connection) {
        while !connection.is_void() {
            let Err(trouble) = self.watch_once(connection).await else { continue };
            let old = connection.made.elapsed() > CLIENT_AGE_MAX;
            let renew = match trouble.kind {
                ErrorKind::Unauthorized | ErrorKind::Configuration => true,
                ErrorKind::Unreachable => old,
                _ => false,
            };
            self.on_trouble(trouble).await;
            if renew {
                return;
            }
        }
    }

    /// Reports trouble, and waits.
    async fn on_trouble(&mut self, trouble: Trouble) {
        if trouble.loses_the_version() {
            self.version = None;
            if trouble.kind != ErrorKind::Expired {
                // The server may know an older state only: the latest that it has will do.
                self.version_min.clear();
            }
        }
        if !trouble.quiet || self.backoff.has_failures() {
            let kept = (self.known.on_trouble)(&trouble);
            self.subject.status.count(trouble.kind);
            if self.reported.is_news(trouble.kind) {
                warn!(kind = ?trouble.kind, "{}; {kept}", trouble.what);
            }
        }
        if trouble.refused {
            self.known.cut_first_wait();
        }
        // What a whole fleet is asked to wait must not end for all of it at once.
        let asked = trouble.wait.mul_f64(1.0 + fastrand::f64() / 4.0);
        let wait = self.backoff.next(trouble.kind).max(asked);
        debug!(?wait, "asking the Kubernetes API again");
        self.known.wait_for(sleep(wait)).await;
    }

    /// A watch has lasted.
    fn on_lasted(&mut self) {
        self.backoff.reset();
        if self.reported.clear() {
            info!(resource = self.resource, "the Kubernetes API is well again");
        }
    }

    /// One watch, with the list before it where it is needed.
    async fn watch_once(&mut self, connection: &mut Connection) -> Result<(), Trouble> {
        let seconds = jittered(self.subject.kube.watch_timeout);
        let params = WatchParams::default().timeout(seconds);
        let params = params.labels(&K::labels(self.subject.kube));
        if self.version.is_none() && !self.streaming {
            self.list(connection).await?;
        }
        let (params, since) = match &self.version {
            Some(version) => (params, version.clone()),
            None => (params.initial_events(), self.version_min.clone()),
        };
        let request = self.request().watch(&params, &since).map_err(|e| unsent(&e))?;
        let time = Duration::from_secs(seconds.into());
        let watched = match self.get(connection, request, "watch").await {
            Ok(body) => self.watch(Lines::of(body, EVENT_BYTES_MAX), time).await,
            Err(trouble) => Err(trouble),
        };
        match watched {
            // Answered at once, or within the watch.
            Err(trouble) if self.version.is_none() && trouble.may_be_for_streaming() => {
                debug!(why = trouble.what, "no streaming lists here: listing");
                self.streaming = false;
                Ok(())
            }
            watched => watched,
        }
    }

    fn request(&self) -> Request {
        Request::new(K::url_path(&(), Some(&self.namespace)))
    }

    async fn get(
        &mut self,
        connection: &mut Connection,
        request: http::Request<Vec<u8>>,
        verb: &str,
    ) -> Result<kube::client::Body, Trouble> {
        let due = self.pace.next(Instant::now());
        self.known.wait_for(sleep_until(due)).await;
        let offload = Arc::clone(&self.offload);
        let about = (verb, &self.resource[..], &self.namespace[..]);
        self.known.wait_for(connection.get(request, about, &offload)).await
    }

    /// Lists page by page, as servers have it that know no lists by watches.
    async fn list(&mut self, connection: &mut Connection) -> Result<(), Trouble> {
        let mut params = ListParams::default().labels(&K::labels(self.subject.kube));
        params = params.limit(PAGE_OBJECTS);
        let mut tokens = HashSet::new();
        self.known.begin_list();
        loop {
            let request = self.request().list(&params).map_err(|e| unsent(&e))?;
            let body = self.get(connection, request, "list").await?;
            let read = timeout(LIST_TIME_MAX, read_all(body, PAGE_BYTES_MAX));
            let read = self.known.wait_for(read).await;
            let text = read.map_err(|_| Trouble::unreachable("a list that does not end"))??;
            let page: ObjectList<K> = serde_json::from_slice(&text).map_err(Trouble::malformed)?;
            for object in page.items {
                self.known.list(object.name_any(), object.extract(self.subject.rules))?;
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) if tokens.len() < PAGES_MAX && tokens.insert(token.clone()) => {
                    params = params.continue_token(&token);
                }
                Some(_) => return Err(Trouble::malformed("a list that does not end")),
                None => {
                    let version = page.metadata.resource_version.unwrap_or_default();
                    return self.end_list(version);
                }
            }
        }
    }

    fn end_list(&mut self, version: String) -> Result<(), Trouble> {
        if version.is_empty() {
            return Err(Trouble::malformed("a list without a version"));
        }
        self.version_min.clone_from(&version);
        self.version = Some(version);
        self.known.end_list();
        (self.known.on_confirmed)();
        Ok(())
    }

    /// Takes in what a watch reports until it ends.
    async fn watch(&mut self, mut lines: Lines, time: Duration) -> Result<(), Trouble> {
        let opened = Instant::now();
        let lasted = opened + LASTED.min(time.mul_f64(0.8));
        let mut heard = opened;
        let mut recovered = false;
        if self.version.is_none() {
            self.known.begin_list();
        }
        loop {
            let listing = self.version.is_none();
            let time_max = if listing { LIST_TIME_MAX } else { time + SILENCE_MARGIN };
            let silent = if self.bookmarks { BOOKMARKS_MISSING } else { time + SILENCE_MARGIN };
            let given_up = (opened + time_max).min(heard + silent);
            let wakes = if recovered { given_up } else { given_up.min(lasted) };
            let line = self.known.wait_for(timeout_at(wakes, lines.next())).await;
            let now = Instant::now();
            if now >= lasted && !listing && !recovered {
                recovered = true;
                self.on_lasted();
            }
            match line {
                Ok(Ok(Some(line))) => {
                    heard = now;
                    self.on_line(&line, opened)?;
                }
                // It ended in the middle of its list: nothing of that is known.
                Ok(Ok(None)) if listing => return Err(Trouble::early(opened.elapsed())),
                Ok(Ok(None)) if recovered => {
                    (self.known.on_confirmed)();
                    return Ok(());
                }
                Ok(Ok(None)) => return Err(Trouble::early(opened.elapsed())),
                // One that breaks off after it has lasted is what a server does that restarts.
                Ok(Err(trouble)) => return Err(Trouble { quiet: recovered, ..trouble }),
                Err(_) if now < given_up => {}
                Err(_) if listing => return Err(Trouble::unreachable("a list that does not end")),
                Err(_) => {
                    let why = format!("silent for {:.0?}", heard.elapsed());
                    return Err(Trouble { quiet: true, ..Trouble::unreachable(why) });
                }
            }
        }
    }

    /// Takes one event in.
    fn on_line(&mut self, line: &[u8], opened: Instant) -> Result<(), Trouble> {
        if line.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        let event: WatchEvent<K> = serde_json::from_slice(line).map_err(Trouble::malformed)?;
        let listing = self.version.is_none();
        match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => self.apply(object),
            WatchEvent::Deleted(_) if listing => {
                Err(Trouble::malformed("an object that is deleted within a list"))
            }
            WatchEvent::Deleted(object) => {
                self.advance(object.resource_version())?;
                self.known.remove(&object.name_any());
                (self.known.on_confirmed)();
                Ok(())
            }
            WatchEvent::Bookmark(mark) if listing => {
                if mark.metadata.annotations.contains_key(LIST_ENDS) {
                    self.end_list(mark.metadata.resource_version)?;
                }
                Ok(())
            }
            WatchEvent::Bookmark(mark) => {
                self.advance(Some(mark.metadata.resource_version))?;
                // The last one of a watch does not say that there are others.
                let time = self.subject.kube.watch_timeout;
                self.bookmarks |= opened.elapsed() < time.mul_f64(0.7);
                (self.known.on_confirmed)();
                Ok(())
            }
            WatchEvent::Error(status) => {
                Err(Trouble::api(&status, "watch", &self.resource, &self.namespace))
            }
        }
    }

    fn apply(&mut self, object: K) -> Result<(), Trouble> {
        let (name, extract) = (object.name_any(), object.extract(self.subject.rules));
        if self.version.is_none() {
            return self.known.list(name, extract);
        }
        self.advance(object.resource_version())?;
        self.known.set(name, extract)?;
        (self.known.on_confirmed)();
        Ok(())
    }

    /// Goes on to this version, which is no older.
    fn advance(&mut self, version: Option<String>) -> Result<(), Trouble> {
        let version = version.filter(|version| !version.is_empty());
        let version = version.ok_or_else(|| Trouble::malformed("an event without a version"))?;
        // Versions are numbers, and grow; what is no number cannot be compared.
        let number = |text: &str| text.parse::<u128>().ok();
        let old = self.version.as_deref().and_then(number);
        if let (Some(new), Some(old)) = (number(&version), old)
            && new < old
        {
            return Err(Trouble::malformed(format!("version {new} after version {old}")));
        }
        self.version_min.clone_from(&version);
        self.version = Some(version);
        Ok(())
    }
}

fn unsent(error: &kube::core::request::Error) -> Trouble {
    Trouble::configuration(format!("a request cannot be made: {error}"))
}
