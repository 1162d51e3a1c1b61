//! How far a client is behind with a request that is sent on as it comes.
//!
//! Such a client holds a connection that others may wait for, so it has to keep a pace: silence and a
//! trickle are the same to those. The time for which its backend took nothing does not
//! count.

use std::time::{Duration, Instant};

use crate::limits::{UPLOAD_BEHIND_CONTENDED_MAX, UPLOAD_BEHIND_MAX, UPLOAD_RATE_MIN};

/// A client is asked for its delay again after this, while that does not matter to anybody.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The pace of one request.
#[derive(Debug, Clone, Copy)]
pub struct Upload {
    /// By what has come, it should be that time; never later than now.
    since: Instant,
    /// Since when its backend has been what holds it up.
    paused: Option<Instant>,
    look_at: Instant,
}

impl Upload {
    /// A client that is expected to send from now on.
    pub fn new(now: Instant) -> Self {
        Self { since: now, paused: None, look_at: now }
    }

    /// It sent bytes.
    pub fn on_bytes(&mut self, bytes: u32, now: Instant) {
        let worth = Duration::from_secs(1).mul_f64(f64::from(bytes) / f64::from(UPLOAD_RATE_MIN));
        self.since = (self.since + worth).min(now);
    }

    /// Its backend has as much of it before it as can be held, or no longer.
    pub fn on_held_up(&mut self, held_up: bool, now: Instant) {
        if held_up {
            self.paused.get_or_insert(now);
        } else if let Some(paused) = self.paused.take() {
            self.since = (self.since + now.saturating_duration_since(paused)).min(now);
        }
    }

    /// When it has to be looked at next, if it sends nothing.
    pub fn deadline(&self) -> Option<Instant> {
        let deadline = (self.since + UPLOAD_BEHIND_CONTENDED_MAX).max(self.look_at);
        self.paused.is_none().then_some(deadline)
    }

    /// The time of [`Upload::deadline`] has come. For how long the client has been too far behind,
    /// if it is; others may wait for what it holds.
    pub fn on_deadline(&mut self, others_wait: bool, now: Instant) -> Option<Duration> {
        let behind = now.saturating_duration_since(self.since);
        let most = if others_wait { UPLOAD_BEHIND_CONTENDED_MAX } else { UPLOAD_BEHIND_MAX };
        if self.paused.is_none() && behind >= most {
            return Some(most);
        }
        self.look_at = now + LOOK_AGAIN;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn silence_and_a_trickle_are_the_same() {
        let start = Instant::now();
        let (mut silent, mut trickle) = (Upload::new(start), Upload::new(start));
        let mut steady = Upload::new(start);
        for second in 1..=10 {
            let now = start + second * SECOND;
            trickle.on_bytes(1, now);
            steady.on_bytes(UPLOAD_RATE_MIN, now);
            let is_late = now - start >= UPLOAD_BEHIND_CONTENDED_MAX + SECOND;
            for (upload, late) in
                [(&mut silent, is_late), (&mut trickle, is_late), (&mut steady, false)]
            {
                assert_eq!(upload.on_deadline(false, now), None, "nobody waits");
                let found = upload.on_deadline(true, now).is_some();
                assert!(found == late || second == 2, "after {second} s");
            }
        }
        let end = start + UPLOAD_BEHIND_MAX;
        assert_eq!(silent.on_deadline(false, end), Some(UPLOAD_BEHIND_MAX));
    }

    #[test]
    fn what_came_early_is_not_saved_up() {
        let start = Instant::now();
        let mut upload = Upload::new(start);
        upload.on_bytes(1 << 20, start);
        let late = start + UPLOAD_BEHIND_CONTENDED_MAX;
        assert_eq!(upload.deadline(), Some(late));
        assert!(upload.on_deadline(true, late).is_some());
    }

    #[test]
    fn a_client_is_not_late_while_its_backend_is() {
        let start = Instant::now();
        let mut upload = Upload::new(start);
        upload.on_held_up(true, start + SECOND);
        assert_eq!(upload.deadline(), None);
        assert_eq!(upload.on_deadline(true, start + 100 * SECOND), None);
        upload.on_held_up(false, start + 100 * SECOND);
        let late = start + 99 * SECOND + UPLOAD_BEHIND_CONTENDED_MAX;
        assert_eq!(upload.on_deadline(true, start + 99 * SECOND + SECOND), None);
        assert!(upload.on_deadline(true, late).is_some(), "the second before counts");
    }
}
