//! What is known of all objects of a kind, and when that is published.

use std::collections::HashMap;
use std::future::pending;
use std::pin::pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::sets::Sets;
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

impl<T: Weight> Weight for Vec<T> {
    fn weight(&self) -> usize {
        size_of::<Self>() + self.iter().map(T::weight).sum::<usize>()
    }
}

/// Where the objects are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Location {
    /// The server's address.
    pub server: String,
    /// The namespace.
    pub namespace: String,
}

/// Who hears what becomes of objects of a kind: it stands for all routes that want to know.
pub(super) trait Audience: Send {
    /// The kind.
    type Object;
    /// What is kept of one.
    type Extract: PartialEq + Send + Weight;

    /// Reads an object.
    fn extract(&self, object: &Self::Object) -> Self::Extract;

    /// All that is known has changed.
    fn publish(&mut self, objects: &HashMap<String, Self::Extract>);

    /// The time for a first answer is over. These are the objects, if they are known by now.
    fn start_without(&mut self, _objects: Option<&HashMap<String, Self::Extract>>) {}

    /// Nobody listens at the server's address: whoever has something to go on with does so at once.
    fn start_from_saved(&mut self) {}

    /// Something goes wrong; whether it is of a kind that the log does not have yet comes with it.
    fn on_trouble(&mut self, trouble: &Trouble, is_news: bool);

    /// All is well again, after trouble that the log has.
    fn on_recovered(&self, resource: &str);

    /// The server confirms that what is known is the latest.
    fn on_confirmed(&self) {}

    /// This is where the objects with these labels are looked for from now on.
    fn on_located(&self, location: &Location, resource: &str, labels: &str);
}

/// What is known of the objects, and when it is to be published.
pub(super) struct Known<A: Audience> {
    /// To whom.
    pub audience: A,
    /// A change of these is one of what is published, too.
    depends_on: Option<watch::Receiver<Sets>>,
    objects: Objects<A::Extract>,
    /// A list that is not complete yet.
    listing: Option<Objects<A::Extract>>,
    /// Whether any list was complete: before, an empty set is only ignorance.
    complete: bool,
    /// How long a first answer is waited for, from when it can be asked for.
    first_answer_max: Option<Duration>,
    /// When that is over.
    first_answer_until: Option<Instant>,
    publish_at: Option<Instant>,
}

impl<A: Audience> Known<A> {
    /// Nothing yet. The audience hears of each change after the first list.
    pub(super) fn new(audience: A) -> Self {
        Self {
            audience,
            depends_on: None,
            objects: Objects::default(),
            listing: None,
            complete: false,
            first_answer_max: None,
            first_answer_until: None,
            publish_at: None,
        }
    }

    /// The same, which starts without an answer where there is none within this time of the first
    /// question.
    pub(super) fn first_answer_max(self, max: Duration) -> Self {
        Self { first_answer_max: Some(max), ..self }
    }

    /// The same, which publishes with each change of these, too.
    pub(super) fn depends_on(self, sets: Option<watch::Receiver<Sets>>) -> Self {
        Self { depends_on: sets, ..self }
    }

    /// A list begins.
    pub(super) fn begin_list(&mut self) {
        self.listing = Some(Objects::default());
    }

    /// An object of the list.
    ///
    /// # Errors
    /// They are too many to be kept.
    pub(super) fn list(&mut self, name: String, extract: A::Extract) -> Result<(), Trouble> {
        self.listing.get_or_insert_default().set(name, extract).map(drop)
    }

    /// The list is complete: what it does not name is no more.
    pub(super) fn end_list(&mut self) {
        self.objects = self.listing.take().unwrap_or_default();
        self.complete = true;
        self.changed();
    }

    /// An object is new, or has changed.
    ///
    /// # Errors
    /// They are too many to be kept.
    pub(super) fn set(&mut self, name: String, extract: A::Extract) -> Result<(), Trouble> {
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
        if self.complete {
            self.publish_at.get_or_insert_with(|| Instant::now() + DEBOUNCE);
        }
    }

    /// The server can be asked: from now on it may be waited for.
    pub(super) fn begin_first_wait(&mut self) {
        if let Some(first_answer_max) = self.first_answer_max.take() {
            self.first_answer_until = Some(Instant::now() + first_answer_max);
        }
    }

    /// Waits no longer for a first answer where there is something to go on with.
    pub(super) fn cut_first_wait(&mut self) {
        if !self.complete && self.first_answer_until.is_some() {
            self.audience.start_from_saved();
        }
    }

    /// Waits for a future, and publishes meanwhile when it is time to.
    pub(super) async fn wait_for<O>(&mut self, future: impl Future<Output = O>) -> O {
        let mut future = pin!(future);
        loop {
            let times = [self.publish_at, self.first_answer_until];
            let at = times.into_iter().flatten().min();
            // Events that are there already go first; but a stream that never pauses must not keep a
            // snapshot back.
            if at.is_some_and(|at| at <= Instant::now()) {
                self.on_time();
                continue;
            }
            tokio::select! {
                biased;
                output = &mut future => return output,
                () = until(at) => {}
                is_open = changed(&mut self.depends_on) => {
                    if !is_open {
                        self.depends_on = None;
                    }
                    self.changed();
                }
            }
        }
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        let is_over = self.first_answer_until.take_if(|at| *at <= now).is_some();
        if self.publish_at.take_if(|at| is_over || *at <= now).is_some() {
            self.audience.publish(&self.objects.by_name);
        }
        if is_over {
            self.audience.start_without(self.complete.then_some(&self.objects.by_name));
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

/// The next change. Says whether there may be others.
async fn changed(sets: &mut Option<watch::Receiver<Sets>>) -> bool {
    match sets {
        Some(sets) => sets.changed().await.is_ok(),
        None => pending().await,
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

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::super::objects::Pod;
    use super::super::sets;
    use super::*;
    use crate::control::testing::block_on;

    /// What it was told.
    #[derive(Default)]
    struct Told(Vec<&'static str>);

    impl Weight for () {
        fn weight(&self) -> usize {
            0
        }
    }

    impl Audience for Told {
        type Object = Pod;
        type Extract = ();

        fn extract(&self, _: &Pod) {}

        fn publish(&mut self, _: &HashMap<String, ()>) {
            self.0.push("published");
        }

        fn start_without(&mut self, objects: Option<&HashMap<String, ()>>) {
            self.0.push(if objects.is_some() { "over with objects" } else { "over" });
        }

        fn on_trouble(&mut self, _: &Trouble, _: bool) {}
        fn on_recovered(&self, _: &str) {}
        fn on_located(&self, _: &Location, _: &str, _: &str) {}
    }

    #[test]
    fn the_first_answer_has_its_time_whatever_becomes_of_what_depends_on_others() {
        const LONG: Duration = Duration::from_secs(3600);
        block_on(async {
            let waits = || sleep(4 * DEBOUNCE);
            let (sender, sets) = sets::unread();
            let mut known = Known::new(Told::default()).first_answer_max(LONG);
            known = known.depends_on(Some(sets));
            // There is no way to the API, which is news of both.
            sender.send_modify(|sets| *sets = Err("no way to the Kubernetes API".to_owned()));
            known.wait_for(waits()).await;
            known.begin_first_wait();
            sender.send_modify(|sets| *sets = Ok(HashMap::new()));
            known.wait_for(waits()).await;
            assert_eq!(known.audience.0, [""; 0]);
            known.end_list();
            known.wait_for(waits()).await;
            sender.send_modify(|_| {});
            known.wait_for(waits()).await;
            assert_eq!(known.audience.0, ["published"; 2]);
            // What has come at the last moment counts.
            known.end_list();
            known.first_answer_until = Some(Instant::now());
            known.wait_for(waits()).await;
            assert_eq!(known.audience.0[2..], ["published", "over with objects"]);
        });
    }
}
