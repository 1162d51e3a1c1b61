//! How discovery fares: written by the source, shown by metrics and probes.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::io::net::Address;
pub(crate) use crate::metrics::ErrorKind;

/// An endpoint that is not used, since it is this proxy itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: Address,
    /// Where this process listens for what would be sent there.
    pub listener: Address,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, address, listener } = self;
        write!(f, "{name} ({address}) is this proxy itself, which listens on {listener}")
    }
}

/// The state of discovery.
#[derive(Debug, Default)]
pub struct Status {
    errors: [AtomicU64; ErrorKind::COUNT],
    /// When the source answered last: by the clock that nobody sets, and by the one of the wall.
    synced: Mutex<Option<(Instant, SystemTime)>>,
    trouble: Mutex<Option<String>>,
    unanswered: Mutex<Option<String>>,
    left_out: Mutex<Vec<LeftOut>>,
    unusable: Mutex<Option<String>>,
    stores_trouble: Mutex<Option<String>>,
    /// What holds the start-up, by who says so.
    held: Mutex<BTreeMap<&'static str, String>>,
    /// When the endpoints in use were confirmed, where they are those of a former run.
    saved: Mutex<Option<SystemTime>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Status {
    /// The source has answered: what is known is what it knows now.
    pub fn on_sync(&self) {
        *lock(&self.synced) = Some((Instant::now(), SystemTime::now()));
    }

    /// Something went wrong. It is the reason shown until [`Status::clear_trouble`].
    pub fn on_error(&self, kind: ErrorKind, what: String) {
        self.count(kind);
        self.set_trouble(what);
    }

    /// Something went wrong, and somebody else says what.
    pub fn count(&self, kind: ErrorKind) {
        self.errors[kind as usize].fetch_add(1, Relaxed);
    }

    /// Why it is not known which stores share the keys, if so. Says whether that is news.
    pub fn set_stores_trouble(&self, what: Option<String>) -> bool {
        replace(&self.stores_trouble, what)
    }

    /// Why it is not known which stores share the keys.
    pub fn stores_trouble(&self) -> Option<String> {
        lock(&self.stores_trouble).clone()
    }

    /// There is a reason why endpoints may be missing.
    pub fn set_trouble(&self, what: String) {
        *lock(&self.trouble) = Some(what);
    }

    /// All is well again.
    pub fn clear_trouble(&self) {
        *lock(&self.trouble) = None;
    }

    /// The source has not said anything of this so far, be it good or bad. None: it has of all.
    pub fn set_unanswered(&self, what: Option<String>) {
        *lock(&self.unanswered) = what;
    }

    /// What the source has not said anything of so far.
    pub fn unanswered(&self) -> Option<String> {
        lock(&self.unanswered).clone()
    }

    /// Why endpoints that the source names cannot be used, if so. Says whether that is news.
    pub fn set_unusable(&self, why: Option<String>) -> bool {
        replace(&self.unusable, why)
    }

    /// These endpoints are left out now. Returns those that were not before.
    pub fn set_left_out(&self, now: Vec<LeftOut>) -> Vec<LeftOut> {
        let mut left_out = lock(&self.left_out);
        let news = now.iter().filter(|one| !left_out.contains(one)).cloned().collect();
        *left_out = now;
        news
    }

    /// The endpoints that are left out, since they are this proxy itself.
    pub fn left_out(&self) -> Vec<LeftOut> {
        lock(&self.left_out).clone()
    }

    /// Why the source of endpoints does not tell of them, if so.
    pub fn source_trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    /// Why endpoints may be missing.
    pub fn trouble(&self) -> Option<String> {
        if let Some(left_out) = self.left_out().first() {
            return Some(left_out.to_string());
        }
        lock(&self.trouble).clone().or_else(|| lock(&self.unusable).clone())
    }

    /// Why the start-up must not be over, as far as `who` knows: an error of the configuration or of
    /// rights. Says whether that is news.
    pub fn hold(&self, who: &'static str, why: Option<String>) -> bool {
        let mut held = lock(&self.held);
        let news = held.get(who) != why.as_ref();
        match why {
            Some(why) => held.insert(who, why),
            None => held.remove(who),
        };
        news
    }

    /// Why the start-up must not be over, if so.
    pub fn held(&self) -> Option<String> {
        let held = lock(&self.held);
        (!held.is_empty()).then(|| held.values().cloned().collect::<Vec<_>>().join("; "))
    }

    /// The endpoints in use are those of a former run, confirmed then, or no longer. Says whether that
    /// is news.
    pub fn set_saved(&self, confirmed: Option<SystemTime>) -> bool {
        replace(&self.saved, confirmed)
    }

    /// How old the endpoints in use are, where they are those of a former run.
    pub fn saved_age(&self) -> Option<Duration> {
        lock(&self.saved).map(|confirmed| confirmed.elapsed().unwrap_or_default())
    }

    /// Errors so far.
    pub fn errors(&self, kind: ErrorKind) -> u64 {
        self.errors[kind as usize].load(Relaxed)
    }

    /// When the source answered last, in seconds since the Unix epoch; 0 before the first time, and
    /// where there is none to ask.
    pub fn last_sync_seconds(&self) -> f64 {
        let at = lock(&self.synced).map_or(UNIX_EPOCH, |(_, at)| at);
        at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as f64 / 1000.0
    }

    /// How long ago the source answered last, however the wall's clock was set since.
    pub fn sync_age(&self) -> Option<Duration> {
        lock(&self.synced).map(|(at, _)| at.elapsed())
    }
}

/// Puts a value in the place of another; says whether they differ.
fn replace<T: PartialEq>(place: &Mutex<T>, value: T) -> bool {
    let mut place = lock(place);
    let news = *place != value;
    *place = value;
    news
}
