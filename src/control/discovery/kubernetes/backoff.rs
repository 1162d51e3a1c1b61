//! How long to wait: between watches, and after failures; and which failures are news.

use std::collections::HashSet;
use std::time::Duration;

use crate::control::discovery::status::ErrorKind;

/// The wait after a first failure doubles from here…
const BACKOFF_MIN: Duration = Duration::from_millis(400);
/// …to here.
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// How long one watch lasts, in seconds: a quarter less at most, so that a fleet that began together
/// does not go on together.
pub(super) fn jittered(timeout: Duration) -> u32 {
    let seconds = timeout.as_secs_f64() * (0.75 + fastrand::f64() / 4.0);
    (seconds.ceil() as u32).max(1)
}

/// This long or up to a half less, so that not all sidecars ask at once.
fn jitter(full: Duration) -> Duration {
    full.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// Waits after failures: longer each time, and never all sidecars at once.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    /// Whether the server has answered that the version is too old.
    expired: bool,
}

impl Backoff {
    pub(super) fn has_failures(&self) -> bool {
        self.failures > 0
    }

    pub(super) fn next(&mut self, kind: ErrorKind) -> Duration {
        if kind == ErrorKind::Expired && !std::mem::replace(&mut self.expired, true) {
            // A server that is back from a restart answers that to each version: it is well then, and
            // what it knows is needed. If it does so again, that is trouble like any other.
            return jitter(BACKOFF_MIN);
        }
        let full = BACKOFF_MIN.saturating_mul(1 << self.failures.min(16)).min(BACKOFF_MAX);
        self.failures = self.failures.saturating_add(1);
        jitter(full)
    }

    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}

/// Which kinds of trouble the log has: one line when trouble begins, one for each further kind, one when
/// all is well.
#[derive(Debug, Default)]
pub(super) struct Reported {
    kinds: HashSet<ErrorKind>,
}

impl Reported {
    /// Whether this kind is not in the log yet; it is then.
    pub(super) fn is_news(&mut self, kind: ErrorKind) -> bool {
        self.kinds.insert(kind)
    }

    /// All is well again: whether the log has any trouble, which is over.
    pub(super) fn clear(&mut self) -> bool {
        !std::mem::take(&mut self.kinds).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_that_is_too_old_is_no_reason_to_wait_unless_each_is() {
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
