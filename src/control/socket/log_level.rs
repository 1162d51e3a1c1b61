//! Which log filter is in force: the lasting one, or one that holds for a while.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use crate::config::log_filter;
use crate::control::logging;
use crate::io::net::Credentials;

/// How long a passing filter may hold. Who wants more than a day wants a lasting one.
const FOR_MIN: Duration = Duration::from_secs(1);
const FOR_MAX: Duration = Duration::from_secs(24 * 3600);

/// The filters.
#[derive(Debug)]
pub(super) struct LogLevel {
    filters: watch::Sender<Filters>,
}

#[derive(Debug, Clone)]
struct Filters {
    lasting: String,
    /// What is in force in its place, and until when.
    passing: Option<(String, Instant)>,
}

impl LogLevel {
    /// This filter is in force.
    pub(super) fn new(lasting: String) -> Self {
        Self { filters: watch::Sender::new(Filters { lasting, passing: None }) }
    }

    /// What is in force, in words.
    pub(super) fn show(&self) -> String {
        let Filters { lasting, passing } = &*self.filters.borrow();
        let Some((filter, until)) = passing else { return lasting.clone() };
        // Rounded up: one that is in force has time left.
        let left = until.saturating_duration_since(Instant::now()).as_millis().div_ceil(1000);
        let left = humantime::format_duration(Duration::from_secs(left as u64));
        format!("{filter} (for another {left}, then {lasting})")
    }

    /// Puts a filter in force, for ever or for a while, and says what is in force now.
    ///
    /// # Errors
    /// It is none, or the time is out of range; the message says what is accepted.
    pub(super) fn set(
        &self,
        text: &str,
        for_ms: Option<u64>,
        who: Credentials,
    ) -> Result<String, String> {
        let filter = log_filter(text.trim())?;
        let time = for_ms.map(Duration::from_millis);
        if time.is_some_and(|time| !(FOR_MIN..=FOR_MAX).contains(&time)) {
            return Err(
                "a filter holds for a while of 1s to 1d, or without --for for good".to_owned()
            );
        }
        let before = self.show();
        logging::set_filter(&filter)?;
        info!(filter, for_ms, before, uid = who.uid, pid = who.pid, "log filter changed");
        let until = time.map(|time| Instant::now() + time);
        self.filters.send_modify(|filters| match until {
            Some(until) => filters.passing = Some((filter, until)),
            None => *filters = Filters { lasting: filter, passing: None },
        });
        Ok(self.show())
    }

    /// Returns to the lasting filter when a passing one's time is over, for ever.
    pub(super) async fn run(self: Arc<Self>) {
        let mut changes = self.filters.subscribe();
        loop {
            let until = changes.borrow_and_update().passing.as_ref().map(|(_, until)| *until);
            let over = async {
                match until {
                    Some(until) => sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = changes.changed() => {}
                () = over => self.end_passing(),
            }
        }
    }

    fn end_passing(&self) {
        self.filters.send_modify(|filters| {
            filters.passing = None;
            match logging::set_filter(&filters.lasting) {
                Ok(()) => info!(filter = filters.lasting, "log filter as before"),
                Err(error) => warn!(filter = filters.lasting, error, "log filter stays"),
            }
        });
    }
}
