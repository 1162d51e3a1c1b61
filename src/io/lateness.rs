//! Waits that end long after they were to end: the process was stopped or frozen, or had no core.
//!
//! Then the clock says that time limits are over, and what would tell that they were kept may not be
//! heard yet. So nothing is decided by the clock before all is told that had come by then.

use std::time::{Duration, Instant};

use crate::limits::LATE_MIN;

/// A driver that always has more to tell holds time limits up for no longer than this.
const HELD_UP_MAX: Duration = Duration::from_millis(500);

/// Whether a driver has yet to tell what came during a late wait.
#[derive(Debug, Default)]
pub(super) struct Lateness {
    /// There may be more to tell, which is not waited for beyond this.
    behind_until: Option<Instant>,
}

impl Lateness {
    /// A wait that was to be over at `due` is over at `now`. Says whether it was late: then the kernel
    /// is to be asked again for what has come.
    pub(super) fn on_waited(&mut self, due: Instant, now: Instant) -> bool {
        let is_late = now.saturating_duration_since(due) >= LATE_MIN;
        if is_late {
            self.behind_until.get_or_insert(now + HELD_UP_MAX);
        }
        is_late
    }

    /// The driver has told what it could in this turn. Says whether it is behind, where there is more to
    /// tell (`has_more`).
    pub(super) fn is_behind(&mut self, has_more: bool, now: Instant) -> bool {
        self.behind_until = self.behind_until.filter(|&until| has_more && now < until);
        self.behind_until.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_behind_after_a_late_wait_until_it_has_told_all_or_for_a_while() {
        let due = Instant::now();
        let late = due + LATE_MIN;
        let mut lateness = Lateness::default();
        assert!(!lateness.on_waited(due, due + LATE_MIN / 2));
        assert!(!lateness.is_behind(true, late), "it was in time, and has always more to tell");
        assert!(lateness.on_waited(due, late));
        assert!(lateness.is_behind(true, late));
        assert!(!lateness.is_behind(false, late), "it has told all");
        assert!(!lateness.is_behind(true, late), "that is other news");
        for turns in 1..10 {
            lateness.on_waited(due, late + turns * HELD_UP_MAX / 10);
            assert!(lateness.is_behind(true, late + turns * HELD_UP_MAX / 10));
        }
        assert!(lateness.on_waited(due, late + HELD_UP_MAX * 2));
        assert!(!lateness.is_behind(true, late + HELD_UP_MAX * 2), "however late each is");
    }
}
