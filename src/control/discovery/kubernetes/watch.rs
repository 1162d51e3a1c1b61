//! One kind of object, kept known: a list, then watches, each where the last one ended.
//!
//! ```text
//! connect ─▶ list ─▶ watching ─its time is over─▶ watching …
//!    ▲        ▲         │
//!    │        ├─────────┴─ the place is lost ─┐
//!    └────────┴── wait, longer each time ◀────┴─ any trouble
//! ```
//!
//! The waits grow until a watch has *lasted*: an answer that is no error proves nothing.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{self, Either};
use k8s_openapi::NamespaceResourceScope;
use kube::api::{ListParams, WatchParams};
use kube::core::{ObjectList, Request, WatchEvent};
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tracing::{debug, info, warn};

use super::Sets;
use super::connection::{Connection, Lines, Pace, Target, read_all};
use super::convert::{Rules, Weight};
use super::offload::Offload;
use super::trouble::Trouble;
use crate::config::KubeConfig;
use crate::control::discovery::status::{ErrorKind, Status};

/// Changes that come within this time of the first make one snapshot.
const DEBOUNCE: Duration = Duration::from_millis(3);

/// The wait after a first failure doubles from here…
const BACKOFF_MIN: Duration = Duration::from_millis(400);
/// …to here.
const BACKOFF_MAX: Duration = Duration::from_secs(10);

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

/// What is kept of all objects, in bytes: many times the endpoints that can be served.
const KEPT_BYTES_MAX: usize = 16 << 20;

/// A client is made anew where this one finds no server for so long: certificates change.
const CLIENT_AGE_MAX: Duration = Duration::from_secs(60);

/// The annotation of the bookmark that ends a list by a watch.
const LIST_ENDS: &str = "k8s.io/initial-events-end";

/// A kind of object that says something of endpoints.
pub trait Source:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + DeserializeOwned
    + Send
    + 'static
{
    /// What is kept of it.
    type Said: PartialEq + Send + Weight;

    /// The selector of those that matter.
    fn labels(kube: &KubeConfig) -> String;

    /// What it says.
    fn read(&self, rules: &Rules) -> Self::Said;
}

/// Where the objects are.
pub struct Location {
    /// The server's address.
    pub server: String,
    /// The namespace.
    pub namespace: String,
}

/// Does something with all that is known: whether any list was complete comes with it.
type Publish<'a, T> = Box<dyn FnMut(&HashMap<String, T>, bool) + Send + 'a>;

/// What is known of the objects, and when it is to be published.
pub struct Known<'a, T> {
    publish: Publish<'a, T>,
    /// Is told what goes wrong, and says what stays known all the same.
    pub explain: Box<dyn Fn(&Trouble) -> String + Send + 'a>,
    /// Is told that the server's word is the latest.
    pub confirm: Box<dyn Fn() + Send + 'a>,
    /// Is told where the server is, and which namespace is watched.
    pub locate: Box<dyn Fn(&Location) + Send + 'a>,
    /// Whether there is something to go on with at once, where nobody listens at the server's address.
    pub has_spare: Box<dyn Fn() -> bool + Send + 'a>,
    /// What else what is published depends on.
    pub also: Option<watch::Receiver<Sets>>,
    objects: Objects<T>,
    /// A list that is not complete yet.
    listed: Option<Objects<T>>,
    /// Whether any list was complete: before, an empty set is only ignorance.
    complete: bool,
    /// How long a first answer is waited for, from when it can be asked for.
    patience: Option<Duration>,
    publish_at: Option<Instant>,
}

/// Objects by their names, and what they weigh.
struct Objects<T> {
    by_name: HashMap<String, T>,
    weight: usize,
}

impl<T> Default for Objects<T> {
    fn default() -> Self {
        Self { by_name: HashMap::new(), weight: 0 }
    }
}

impl<T: PartialEq + Weight> Objects<T> {
    /// Takes an object in; says whether that changed anything.
    fn set(&mut self, name: String, said: T) -> Result<bool, Trouble> {
        if self.by_name.get(&name) == Some(&said) {
            return Ok(false);
        }
        let before = self.by_name.get(&name).map_or(0, |said| name.len() + said.weight());
        let weight = self.weight - before + name.len() + said.weight();
        if weight > KEPT_BYTES_MAX {
            let what = format!("more objects than {KEPT_BYTES_MAX} bytes can hold");
            return Err(Trouble::malformed(what));
        }
        self.weight = weight;
        self.by_name.insert(name, said);
        Ok(true)
    }

    fn remove(&mut self, name: &str) -> bool {
        let Some(said) = self.by_name.remove(name) else { return false };
        self.weight -= name.len() + said.weight();
        true
    }
}

impl<'a, T: PartialEq + Weight> Known<'a, T> {
    /// Nothing yet. `publish` is called with nothing where there is no answer within `patience` of the
    /// first question, and with each change of what is known after the first list.
    pub fn new(
        patience: Option<Duration>,
        publish: impl FnMut(&HashMap<String, T>, bool) + Send + 'a,
    ) -> Self {
        Self {
            publish: Box::new(publish),
            explain: Box::new(|_| String::new()),
            confirm: Box::new(|| {}),
            locate: Box::new(|_| {}),
            has_spare: Box::new(|| false),
            also: None,
            objects: Objects::default(),
            listed: None,
            complete: false,
            patience,
            publish_at: None,
        }
    }

    fn begin(&mut self) {
        self.listed = Some(Objects::default());
    }

    fn list(&mut self, name: String, said: T) -> Result<(), Trouble> {
        self.listed.get_or_insert_default().set(name, said).map(drop)
    }

    fn end(&mut self) {
        self.objects = self.listed.take().unwrap_or_default();
        if !self.complete {
            self.complete = true;
            self.publish_at = None;
        }
        self.changed();
    }

    fn set(&mut self, name: String, said: T) -> Result<(), Trouble> {
        if self.objects.set(name, said)? {
            self.changed();
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) {
        if self.objects.remove(name) {
            self.changed();
        }
    }

    fn changed(&mut self) {
        self.publish_at.get_or_insert_with(|| Instant::now() + DEBOUNCE);
    }

    /// The server can be asked: from now on it may be waited for.
    fn ask(&mut self) {
        if let Some(patience) = self.patience.take() {
            self.publish_at = Some(Instant::now() + patience);
        }
    }

    /// Waits no longer for a first answer, if there is something to go on with.
    fn lose_patience(&mut self) {
        if !self.complete && self.publish_at.is_some() && (self.has_spare)() {
            self.publish_at = Some(Instant::now());
        }
    }

    /// Waits for a future, and publishes meanwhile when it is time to.
    async fn wait_for<O>(&mut self, future: impl Future<Output = O>) -> O {
        let mut future = pin!(future);
        loop {
            if let Some(at) = self.publish_at {
                // Events that are there already go first; but a stream that never pauses must not
                // keep a snapshot back.
                if Instant::now() < at
                    && let Ok(output) = timeout_at(at, &mut future).await
                {
                    return output;
                }
                sleep_until(at).await;
                self.publish_at = None;
                (self.publish)(&self.objects.by_name, self.complete);
                continue;
            }
            let Some(also) = &mut self.also else { return future.await };
            let changed = match future::select(&mut future, pin!(also.changed())).await {
                Either::Left((output, _)) => return output,
                Either::Right((changed, _)) => changed,
            };
            if changed.is_err() {
                self.also = None;
            }
            self.changed();
        }
    }
}

/// What a watch is on.
pub struct Subject<'a> {
    /// The configuration.
    pub kube: &'a KubeConfig,
    /// How objects are read.
    pub rules: &'a Rules,
    /// Where it says how it fares.
    pub status: &'a Status,
}

/// Keeps one kind of object known.
pub struct Watcher<'a, K: Source> {
    subject: Subject<'a>,
    known: Known<'a, K::Said>,
    resource: String,
    namespace: String,
    offload: Arc<Offload>,
    pace: Pace,
    backoff: Backoff,
    health: Health,
    /// Whether the server knows lists by watches.
    streaming: bool,
    /// Whether it has sent bookmarks within a watch.
    bookmarks: bool,
    /// Where the last watch ended.
    place: Option<String>,
    /// A list by a watch is to be no older than this; empty means the latest.
    no_older: String,
}

impl<'a, K: Source> Watcher<'a, K> {
    /// One that has not begun.
    pub fn new(subject: Subject<'a>, known: Known<'a, K::Said>) -> Self {
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
            health: Health::default(),
            streaming: true,
            bookmarks: false,
            place: None,
            no_older: "0".to_owned(),
        }
    }

    /// Watches for ever.
    pub async fn run(mut self) {
        loop {
            match self.connect().await {
                Ok(mut connection) => self.use_up(&mut connection).await,
                Err(trouble) => self.fail(trouble).await,
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
        (self.known.locate)(&location);
        let connection = self.known.wait_for(target.connect(silence, &offload)).await?;
        self.known.ask();
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
    async fn use_up(&mut self, connection: &mut Connection) {
        while !connection.is_void() {
            let Err(trouble) = self.turn(connection).await else { continue };
            let old = connection.made.elapsed() > CLIENT_AGE_MAX;
            let renew = match trouble.kind {
                ErrorKind::Unauthorized | ErrorKind::Configuration => true,
                ErrorKind::Unreachable => old,
                _ => false,
            };
            self.fail(trouble).await;
            if renew {
                return;
            }
        }
    }

    /// Tells of trouble, and waits.
    async fn fail(&mut self, trouble: Trouble) {
        if trouble.loses_the_place() {
            self.place = None;
            if trouble.kind != ErrorKind::Expired {
                // The server may know an older state only: the latest that it has will do.
                self.no_older.clear();
            }
        }
        if !(trouble.quiet && self.backoff.failures == 0) {
            let kept = (self.known.explain)(&trouble);
            self.subject.status.count(trouble.kind);
            if self.health.falls(trouble.kind) {
                warn!(kind = ?trouble.kind, "{}; {kept}", trouble.what);
            }
        }
        if trouble.refused {
            self.known.lose_patience();
        }
        // What a whole fleet is asked to wait must not end for all of it at once.
        let asked = trouble.wait.mul_f64(1.0 + fastrand::f64() / 4.0);
        let wait = self.backoff.next(trouble.kind).max(asked);
        debug!(?wait, "asking the Kubernetes API again");
        self.known.wait_for(sleep(wait)).await;
    }

    /// A watch has lasted.
    fn recover(&mut self) {
        self.backoff.reset();
        if self.health.rises() {
            info!(resource = self.resource, "the Kubernetes API is well again");
        }
    }

    /// One watch, with the list before it where it is needed.
    async fn turn(&mut self, connection: &mut Connection) -> Result<(), Trouble> {
        let seconds = jittered(self.subject.kube.watch_timeout);
        let params = WatchParams::default().timeout(seconds);
        let params = params.labels(&K::labels(self.subject.kube));
        if self.place.is_none() && !self.streaming {
            self.list(connection).await?;
        }
        let (params, since) = match &self.place {
            Some(place) => (params, place.clone()),
            None => (params.initial_events(), self.no_older.clone()),
        };
        let request = self.request().watch(&params, &since).map_err(|e| unsent(&e))?;
        let time = Duration::from_secs(seconds.into());
        let watched = match self.get(connection, request, "watch").await {
            Ok(body) => self.watch(Lines::of(body, EVENT_BYTES_MAX), time).await,
            Err(trouble) => Err(trouble),
        };
        match watched {
            // Said at once, or within the watch.
            Err(trouble) if self.place.is_none() && trouble.may_be_for_streaming() => {
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
        self.known.begin();
        loop {
            let request = self.request().list(&params).map_err(|e| unsent(&e))?;
            let body = self.get(connection, request, "list").await?;
            let read = timeout(LIST_TIME_MAX, read_all(body, PAGE_BYTES_MAX));
            let read = self.known.wait_for(read).await;
            let text = read.map_err(|_| Trouble::unreachable("a list that does not end"))??;
            let page: ObjectList<K> = serde_json::from_slice(&text).map_err(Trouble::malformed)?;
            for object in page.items {
                self.known.list(object.name_any(), object.read(self.subject.rules))?;
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
        self.no_older.clone_from(&version);
        self.place = Some(version);
        self.known.end();
        (self.known.confirm)();
        Ok(())
    }

    /// Takes in what a watch says until it ends.
    async fn watch(&mut self, mut lines: Lines, time: Duration) -> Result<(), Trouble> {
        let opened = Instant::now();
        let lasted = opened + LASTED.min(time.mul_f64(0.8));
        let mut heard = opened;
        let mut recovered = false;
        if self.place.is_none() {
            self.known.begin();
        }
        loop {
            let listing = self.place.is_none();
            let time_max = if listing { LIST_TIME_MAX } else { time + SILENCE_MARGIN };
            let silent = if self.bookmarks { BOOKMARKS_MISSING } else { time + SILENCE_MARGIN };
            let given_up = (opened + time_max).min(heard + silent);
            let wakes = if recovered { given_up } else { given_up.min(lasted) };
            let line = self.known.wait_for(timeout_at(wakes, lines.next())).await;
            let now = Instant::now();
            if now >= lasted && !listing && !recovered {
                recovered = true;
                self.recover();
            }
            match line {
                Ok(Ok(Some(line))) => {
                    heard = now;
                    self.take(&line, opened)?;
                }
                // It ended in the middle of its list: nothing of that is known.
                Ok(Ok(None)) if listing => return Err(Trouble::early(opened.elapsed())),
                Ok(Ok(None)) if recovered => {
                    (self.known.confirm)();
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
    fn take(&mut self, line: &[u8], opened: Instant) -> Result<(), Trouble> {
        if line.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        let event: WatchEvent<K> = serde_json::from_slice(line).map_err(Trouble::malformed)?;
        let listing = self.place.is_none();
        match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => self.apply(object),
            WatchEvent::Deleted(_) if listing => {
                Err(Trouble::malformed("an object that is deleted within a list"))
            }
            WatchEvent::Deleted(object) => {
                self.advance(object.resource_version())?;
                self.known.remove(&object.name_any());
                (self.known.confirm)();
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
                (self.known.confirm)();
                Ok(())
            }
            WatchEvent::Error(status) => {
                Err(Trouble::api(&status, "watch", &self.resource, &self.namespace))
            }
        }
    }

    fn apply(&mut self, object: K) -> Result<(), Trouble> {
        let (name, said) = (object.name_any(), object.read(self.subject.rules));
        if self.place.is_none() {
            return self.known.list(name, said);
        }
        self.advance(object.resource_version())?;
        self.known.set(name, said)?;
        (self.known.confirm)();
        Ok(())
    }

    /// Moves the place on to this version, which is no older.
    fn advance(&mut self, version: Option<String>) -> Result<(), Trouble> {
        let version = version.filter(|version| !version.is_empty());
        let version = version.ok_or_else(|| Trouble::malformed("an event without a version"))?;
        // Versions are numbers, and grow; what is no number cannot be compared.
        let number = |text: &str| text.parse::<u128>().ok();
        let place = self.place.as_deref().and_then(number);
        if let (Some(new), Some(old)) = (number(&version), place)
            && new < old
        {
            return Err(Trouble::malformed(format!("version {new} after version {old}")));
        }
        self.no_older.clone_from(&version);
        self.place = Some(version);
        Ok(())
    }
}

fn unsent(error: &kube::core::request::Error) -> Trouble {
    Trouble::configuration(format!("a request cannot be made: {error}"))
}

/// How long one watch lasts, in seconds: a quarter less at most, so that a fleet that began together
/// does not go on together.
fn jittered(timeout: Duration) -> u32 {
    let seconds = timeout.as_secs_f64() * (0.75 + fastrand::f64() / 4.0);
    (seconds.ceil() as u32).max(1)
}

/// This long or up to a half less, so that not all sidecars ask at once.
fn jitter(full: Duration) -> Duration {
    full.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// Waits after failures: longer each time, and never all sidecars at once.
#[derive(Debug, Default)]
struct Backoff {
    failures: u32,
    /// Whether the server has said that the place is too old.
    expired: bool,
}

impl Backoff {
    fn next(&mut self, kind: ErrorKind) -> Duration {
        if kind == ErrorKind::Expired && !std::mem::replace(&mut self.expired, true) {
            // A server that is back from a restart says so of each place: it is well then, and what it
            // knows is needed. If it says so again, that is trouble like any other.
            return jitter(BACKOFF_MIN);
        }
        let full = BACKOFF_MIN.saturating_mul(1 << self.failures.min(16)).min(BACKOFF_MAX);
        self.failures = self.failures.saturating_add(1);
        jitter(full)
    }

    fn reset(&mut self) {
        *self = Self::default();
    }
}

/// What the log was told: one line when the trouble begins, one for each further kind, one when all is
/// well.
#[derive(Debug, Default)]
struct Health {
    told: HashSet<ErrorKind>,
}

impl Health {
    fn falls(&mut self, kind: ErrorKind) -> bool {
        self.told.insert(kind)
    }

    fn rises(&mut self) -> bool {
        !std::mem::take(&mut self.told).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_is_too_old_is_no_reason_to_wait_unless_each_is() {
        let mut backoff = Backoff::default();
        for _ in 0..8 {
            backoff.next(ErrorKind::Unreachable);
        }
        assert!(backoff.next(ErrorKind::Expired) <= BACKOFF_MIN);
        assert!(backoff.next(ErrorKind::Expired) >= BACKOFF_MAX / 2);
        backoff.reset();
        let waits = [(); 9].map(|()| backoff.next(ErrorKind::Expired));
        assert!(waits[1] <= BACKOFF_MIN && waits[8] >= BACKOFF_MAX / 2, "{waits:?}");
    }
}
