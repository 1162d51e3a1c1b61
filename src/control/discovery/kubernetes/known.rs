//! What is known of all objects of a kind, and when that is published.

use std::collections::HashMap;
use std::pin::pin;
use std::time::Duration;

use futures_util::future::{self, Either};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::Sets;
use super::trouble::Trouble;

/// Changes that come within this time of the first make one snapshot.
const DEBOUNCE: Duration = Duration::from_millis(3);

/// What is kept of all objects, in bytes: many times the endpoints that can be served.
const KEPT_BYTES_MAX: usize = 16 << 20;

/// How much memory something takes.
pub(super) trait Weight {
    /// Bytes, about.
    fn weight(&self) -> usize;
}

/// Where the objects are.
pub(super) struct Location {
    /// The server's address.
    pub server: String,
    /// The namespace.
    pub namespace: String,
}

/// Does something with all that is known: whether any list was complete comes with it.
type Publish<'a, T> = Box<dyn FnMut(&HashMap<String, T>, bool) + Send + 'a>;

/// What is known of the objects, and when it is to be published.
pub(super) struct Known<'a, T> {
    publish: Publish<'a, T>,
    /// Called with what goes wrong; returns what stays known all the same, for the log.
    pub on_trouble: Box<dyn Fn(&Trouble) -> String + Send + 'a>,
    /// Called when the server confirms that what is known is the latest.
    pub on_confirmed: Box<dyn Fn() + Send + 'a>,
    /// Called with where the server is, and which namespace is watched.
    pub on_located: Box<dyn Fn(&Location) + Send + 'a>,
    /// Whether there is something to go on with at once, where nobody listens at the server's address.
    pub has_fallback: Box<dyn Fn() -> bool + Send + 'a>,
    /// A change of these is one of what is published, too.
    pub depends_on: Option<watch::Receiver<Sets>>,
    objects: Objects<T>,
    /// A list that is not complete yet.
    listing: Option<Objects<T>>,
    /// Whether any list was complete: before, an empty set is only ignorance.
    complete: bool,
    /// How long a first answer is waited for, from when it can be asked for.
    first_answer_max: Option<Duration>,
    publish_at: Option<Instant>,
}

impl<'a, T: PartialEq + Weight> Known<'a, T> {
    /// Nothing yet. `publish` is called with nothing where there is no answer within `first_answer_max`
    /// of the first question, and with each change of what is known after the first list.
    pub(super) fn new(
        first_answer_max: Option<Duration>,
        publish: impl FnMut(&HashMap<String, T>, bool) + Send + 'a,
    ) -> Self {
        Self {
            publish: Box::new(publish),
            on_trouble: Box::new(|_| String::new()),
            on_confirmed: Box::new(|| {}),
            on_located: Box::new(|_| {}),
            has_fallback: Box::new(|| false),
            depends_on: None,
            objects: Objects::default(),
            listing: None,
            complete: false,
            first_answer_max,
            publish_at: None,
        }
    }

    /// A list begins.
    pub(super) fn begin_list(&mut self) {
        self.listing = Some(Objects::default());
    }

    /// An object of the list.
    ///
    /// # Errors
    /// They are too many to be kept.
    pub(super) fn list(&mut self, name: String, extract: T) -> Result<(), Trouble> {
        self.listing.get_or_insert_default().set(name, extract).map(drop)
    }

    /// The list is complete: what it does not name is no more.
    pub(super) fn end_list(&mut self) {
        self.objects = self.listing.take().unwrap_or_default();
        if !self.complete {
            self.complete = true;
            self.publish_at = None;
        }
        self.changed();
    }

    /// An object is new, or has changed.
    ///
    /// # Errors
    /// They are too many to be kept.
    pub(super) fn set(&mut self, name: String, extract: T) -> Result<(), Trouble> {
        if self.objects.set(name, extract)? {
            self.changed();
        }
        Ok(())
    }

    /// An object is no more.
    pub(super) fn remove(&mut self, name: &str) {
        if self.objects.remove(name) {
            self.changed();
        }
    }

    fn changed(&mut self) {
        self.publish_at.get_or_insert_with(|| Instant::now() + DEBOUNCE);
    }

    /// The server can be asked: from now on it may be waited for.
    pub(super) fn begin_first_wait(&mut self) {
        if let Some(first_answer_max) = self.first_answer_max.take() {
            self.publish_at = Some(Instant::now() + first_answer_max);
        }
    }

    /// Waits no longer for a first answer, if there is something to go on with.
    pub(super) fn cut_first_wait(&mut self) {
        if !self.complete && self.publish_at.is_some() && (self.has_fallback)() {
            self.publish_at = Some(Instant::now());
        }
    }

    /// Waits for a future, and publishes meanwhile when it is time to.
    pub(super) async fn wait_for<O>(&mut self, future: impl Future<Output = O>) -> O {
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
            let Some(other) = &mut self.depends_on else { return future.await };
            let changed = match future::select(&mut future, pin!(other.changed())).await {
                Either::Left((output, _)) => return output,
                Either::Right((changed, _)) => changed,
            };
            if changed.is_err() {
                self.depends_on = None;
            }
            self.changed();
        }
    }
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
    /// Takes an object in. Whether that changed anything.
    fn set(&mut self, name: String, extract: T) -> Result<bool, Trouble> {
        if self.by_name.get(&name) == Some(&extract) {
            return Ok(false);
        }
        let before = self.by_name.get(&name).map_or(0, |extract| name.len() + extract.weight());
        let weight = self.weight - before + name.len() + extract.weight();
        if weight > KEPT_BYTES_MAX {
            let what = format!("more objects than {KEPT_BYTES_MAX} bytes can hold");
            return Err(Trouble::malformed(what));
        }
        self.weight = weight;
        self.by_name.insert(name, extract);
        Ok(true)
    }

    fn remove(&mut self, name: &str) -> bool {
        let Some(extract) = self.by_name.remove(name) else { return false };
        self.weight -= name.len() + extract.weight();
        true
    }
}
