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
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::debug;

use super::api::{Api, SILENCE_MARGIN};
use super::backoff::{Backoff, Reported, jittered};
use super::connection::{Connection, Lines, read_all};
use super::known::{Audience, Known, Location};
use super::trouble::Trouble;
use crate::control::discovery::status::ErrorKind;

/// A watch that has lasted for so long works; one of a shorter time, for most of that.
const LASTED: Duration = Duration::from_secs(5);

/// A server that has sent bookmarks within a watch sends one each minute: silence for longer than
/// this is a dead connection.
const BOOKMARKS_MISSING: Duration = Duration::from_secs(150);

/// How long a page of a list may take, or a whole list by a watch.
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

/// A kind of object that is watched.
pub(super) trait Object:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + DeserializeOwned
    + Send
    + 'static
{
}

impl<K> Object for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + 'static
{
}

/// Which objects of a kind are watched, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Query {
    /// Where they are, if not in the namespace that goes with the API.
    pub namespace: Option<String>,
    /// The selector of those that matter; empty for all.
    pub labels: String,
    /// How long one watch lasts at most.
    pub timeout: Duration,
}

/// Keeps one kind of object known.
pub(super) struct Watcher<A: Audience> {
    api: Arc<Api>,
    query: Query,
    known: Known<A>,
    resource: String,
    /// Where the objects were looked for last.
    location: Option<Location>,
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

impl<A: Audience> Watcher<A>
where
    A::Object: Object,
{
    /// One that has not begun.
    pub(super) fn new(api: Arc<Api>, query: Query, known: Known<A>) -> Self {
        let plural = A::Object::plural(&());
        let resource = match &A::Object::group(&())[..] {
            "" => plural.into_owned(),
            group => format!("{plural}.{group}"),
        };
        Self {
            api,
            query,
            known,
            resource,
            location: None,
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
            if let Err(trouble) = self.watch_next().await {
                self.on_trouble(trouble).await;
            }
        }
    }

    /// One watch, by the client that there is. One that is of no use is discarded: what it was made of
    /// is read anew then.
    async fn watch_next(&mut self) -> Result<(), Trouble> {
        let api = Arc::clone(&self.api);
        let connection = self.known.wait_for(api.connect()).await?;
        self.locate(&connection);
        self.known.begin_first_wait();
        let watched = self.watch_once(&connection).await;
        if let Err(trouble) = &watched {
            let old = connection.made.elapsed() > CLIENT_AGE_MAX;
            match trouble.kind {
                ErrorKind::Unauthorized | ErrorKind::Configuration => api.discard(&connection),
                ErrorKind::Unreachable if old => api.discard(&connection),
                _ => {}
            }
        }
        watched
    }

    fn locate(&mut self, connection: &Connection) {
        let namespace = self.query.namespace.as_ref().unwrap_or(&connection.namespace).clone();
        let location = Location { server: connection.server.clone(), namespace };
        if self.location.as_ref() != Some(&location) {
            self.known.audience.on_located(&location, &self.resource, &self.query.labels);
            self.location = Some(location);
        }
    }

    fn namespace(&self) -> &str {
        self.location.as_ref().map_or("", |location| &location.namespace)
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
            let is_news = self.reported.is_news(trouble.kind);
            self.known.audience.on_trouble(&trouble, is_news);
        }
        if trouble.refused {
            self.known.cut_first_wait();
        }
        // What a whole fleet is asked to wait must not end for all of it at once.
        let asked = trouble.wait.mul_f64(1.0 + fastrand::f64() / 4.0);
        let wait = self.backoff.next(trouble.kind).max(asked);
        debug!(resource = self.resource, ?wait, "asking the Kubernetes API again");
        self.known.wait_for(sleep(wait)).await;
    }

    /// A watch has lasted.
    fn on_lasted(&mut self) {
        self.backoff.reset();
        if self.reported.clear() {
            self.known.audience.on_recovered(&self.resource);
        }
    }

    /// One watch, with the list before it where it is needed.
    async fn watch_once(&mut self, connection: &Connection) -> Result<(), Trouble> {
        let seconds = jittered(self.query.timeout);
        let params = WatchParams::default().timeout(seconds);
        let params = params.labels(&self.query.labels);
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
        Request::new(A::Object::url_path(&(), Some(self.namespace())))
    }

    async fn get(
        &mut self,
        connection: &Connection,
        request: http::Request<Vec<u8>>,
        verb: &str,
    ) -> Result<kube::client::Body, Trouble> {
        let api = Arc::clone(&self.api);
        let namespace = self.namespace().to_owned();
        let about = (verb, &self.resource[..], &namespace[..]);
        self.known.wait_for(api.get(connection, request, about)).await
    }

    /// Lists page by page, as servers have it that know no lists by watches.
    async fn list(&mut self, connection: &Connection) -> Result<(), Trouble> {
        let mut params = ListParams::default().labels(&self.query.labels);
        params = params.limit(PAGE_OBJECTS);
        let mut tokens = HashSet::new();
        self.known.begin_list();
        loop {
            let request = self.request().list(&params).map_err(|e| unsent(&e))?;
            let body = self.get(connection, request, "list").await?;
            let read = timeout(LIST_TIME_MAX, read_all(body, PAGE_BYTES_MAX));
            let read = self.known.wait_for(read).await;
            let text = read.map_err(|_| Trouble::unreachable("a list that does not end"))??;
            let page: ObjectList<A::Object> =
                serde_json::from_slice(&text).map_err(Trouble::malformed)?;
            for object in page.items {
                let extract = self.known.audience.extract(&object);
                self.known.list(object.name_any(), extract)?;
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
        self.known.audience.on_confirmed();
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
                    self.known.audience.on_confirmed();
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
        let event: WatchEvent<A::Object> =
            serde_json::from_slice(line).map_err(Trouble::malformed)?;
        let listing = self.version.is_none();
        match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => self.apply(object),
            WatchEvent::Deleted(_) if listing => {
                Err(Trouble::malformed("an object that is deleted within a list"))
            }
            WatchEvent::Deleted(object) => {
                self.advance(object.resource_version())?;
                self.known.remove(&object.name_any());
                self.known.audience.on_confirmed();
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
                let time = self.query.timeout;
                self.bookmarks |= opened.elapsed() < time.mul_f64(0.7);
                self.known.audience.on_confirmed();
                Ok(())
            }
            WatchEvent::Error(status) => {
                Err(Trouble::api(&status, "watch", &self.resource, self.namespace()))
            }
        }
    }

    fn apply(&mut self, object: A::Object) -> Result<(), Trouble> {
        let (name, extract) = (object.name_any(), self.known.audience.extract(&object));
        if self.version.is_none() {
            return self.known.list(name, extract);
        }
        self.advance(object.resource_version())?;
        self.known.set(name, extract)?;
        self.known.audience.on_confirmed();
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
