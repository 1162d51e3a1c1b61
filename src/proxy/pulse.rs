//! Whether the peer of a connection still acknowledges what it is sent.
//!
//! A host that is gone without a word sends no reset and no end: only that it acknowledges nothing
//! tells it. A peer that is slow, or whose process is stopped, is distinguished by that: its kernel
//! acknowledges all the same, be it that there is no room.
//!
//! ```text
//! Idle ──bytes moved──▶ Unproved ──quiet, asked, and it answered; nothing is expected──▶ Idle
//!                         │  ▲
//!      look: something is │  │ acknowledged, or heard from
//!          unacknowledged ▼  │
//!                       Silent ──for too long──▶ given up
//! ```
//!
//! Nothing of this is looked at as bytes move. Every so often the worker looks at those connections
//! on which something is under way and from which nothing came since the look before.

use std::time::{Duration, Instant};

use crate::io::Acks;
use crate::limits::{SILENCE_LOOK_MAX, SILENCE_WITNESSED_FACTOR};

/// How long a peer may acknowledge nothing.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Until it is given up, where its host does not take connections either.
    pub limit: Duration,
}

impl Patience {
    /// The time between two looks, and after which silence is suspicious.
    pub fn look_after(&self) -> Duration {
        (self.limit / 4).min(SILENCE_LOOK_MAX)
    }

    /// Whether a peer is to be given up that has been silent since then. `alive` is when its host
    /// last took a connection or answered.
    pub fn is_over(&self, since: Instant, alive: Option<Instant>, now: Instant) -> bool {
        let witnessed = alive.is_some_and(|at| at > since);
        let limit = self.limit * if witnessed { SILENCE_WITNESSED_FACTOR } else { 1 };
        now.saturating_duration_since(since) >= limit
    }

    /// Whether it is time to ask whether the host is there at all.
    pub fn is_suspicious(&self, since: Instant, now: Instant) -> bool {
        now.saturating_duration_since(since) >= self.look_after()
    }
}

/// What is known of one peer.
#[allow(clippy::struct_excessive_bools, reason = "independent facts, each reported by an event")]
#[derive(Debug, Default)]
pub struct Pulse {
    /// Bytes have moved, and no look has shown since that it is still there.
    unproved: bool,
    /// It is to say something.
    expects: bool,
    /// It has sent something since the latest look.
    heard: bool,
    /// The kernel asks it whether it is there.
    asked: bool,
    /// Since when it has left something unacknowledged, at the latest, and how far it was then.
    silent_since: Option<(Instant, Option<u64>)>,
    /// How far it was at the latest look, and at which one it was there first.
    progress: Option<(u64, Instant)>,
}

/// What a look has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// The kernel is to begin to ask it whether it is there, or to stop that.
    pub ask: Option<bool>,
    /// Since when it has acknowledged nothing, if so.
    pub silent_since: Option<Instant>,
}

impl Pulse {
    /// Bytes, or an end, went to it.
    pub fn on_sent(&mut self) {
        self.unproved = true;
    }

    /// Bytes, or an end, went to it, to which it is to answer.
    pub fn on_asked(&mut self) {
        self.unproved = true;
        self.expects = true;
    }

    /// It sent something. Whether that was all that it had to send, nobody knows.
    pub fn on_heard(&mut self) {
        self.unproved = true;
        self.expects = false;
        self.heard = true;
    }

    /// Nothing is under way any more. Says whether the kernel still asks, which is to be stopped.
    pub fn take_asked(&mut self) -> bool {
        std::mem::take(self).asked
    }

    /// Whether the connection is to be looked at now. One that is `watched` is, whatever has moved on
    /// it, except those of which something was heard since the latest look.
    pub fn is_due(&mut self, watched: bool) -> bool {
        if std::mem::take(&mut self.heard) {
            self.silent_since = None;
            return self.asked;
        }
        self.asked || self.unproved || self.expects || watched
    }

    /// A look at what the kernel knows. A peer that has not shown for `ask_after` that it is there,
    /// since bytes moved or while it is watched, is asked; with `None` it never is.
    pub fn look(
        &mut self,
        acks: Acks,
        watched: bool,
        ask_after: Option<Duration>,
        now: Instant,
    ) -> Look {
        let shown = now.checked_sub(acks.last);
        // Before the first look that finds something unacknowledged it may have been sent just now.
        let goes_on = |(since, before): &(Instant, Option<u64>)| match (*before, acks.progress) {
            (Some(before), Some(progress)) => progress == before,
            (Some(_), None) => false,
            _ => shown.is_none_or(|at| at <= *since),
        };
        let before = self.silent_since.filter(goes_on);
        // What the peer repeats may come behind what was sent, and is no answer to it.
        let undecided = before.is_some_and(|(_, progress)| progress.is_some());
        let began = before.map_or(now, |(since, _)| since);
        let stood = self.progress.filter(|(progress, _)| acks.progress == Some(*progress));
        // What was sent before there was room shows nothing: a kernel that found none for long sends
        // again as rarely, however much there is by now.
        let sent_in_vain = stood.is_some_and(|(_, since)| {
            acks.sent < SILENCE_LOOK_MAX && now.checked_sub(acks.sent).is_some_and(|at| at > since)
        });
        let silent = acks.awaited || undecided || sent_in_vain;
        self.silent_since = silent.then_some((began, acks.progress));
        self.progress = acks.progress.map(|at| stood.unwrap_or((at, now)));
        let quiet = ask_after.is_some_and(|after| acks.last >= after);
        let waits = self.expects || watched;
        // What is asked has been quiet: if it is not any more, it has answered.
        let proved =
            !acks.awaited && !acks.pending && (ask_after.is_none() || self.asked && !quiet);
        self.unproved &= !proved;
        let ask = if self.asked {
            (proved && !waits).then_some(false)
        } else {
            (quiet && (self.unproved || waits || acks.awaited)).then_some(true)
        };
        self.asked = ask.unwrap_or(self.asked);
        Look { ask, silent_since: self.silent_since.map(|(since, _)| since) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const PATIENCE: Patience = Patience { limit: Duration::from_secs(5) };

    /// Looks each second at a peer that was sent something at the start. `acks` tells by the second
    /// what the kernel knows. Returns after how many seconds it is given up, of at most 60.
    fn given_up_after(alive: Option<u32>, acks: impl Fn(u32) -> Acks) -> Option<u32> {
        let start = Instant::now();
        let mut pulse = Pulse::default();
        pulse.on_asked();
        (1..60).find(|&second| {
            let now = start + second * SECOND;
            assert!(pulse.is_due(false), "something is expected");
            let look = pulse.look(acks(second), false, Some(PATIENCE.look_after()), now);
            let alive = alive.map(|second| start + second * SECOND);
            look.silent_since.is_some_and(|since| PATIENCE.is_over(since, alive, now))
        })
    }

    fn awaited(awaited: bool, last: u32) -> Acks {
        let (last, sent) = (last * SECOND, 9 * SECOND);
        Acks { awaited, pending: awaited, last, sent, progress: None }
    }

    #[test]
    fn a_peer_that_acknowledges_nothing_is_given_up_after_the_limit() {
        assert_eq!(given_up_after(None, |second| awaited(true, second)), Some(6));
        // It had been idle for an hour.
        assert_eq!(given_up_after(None, |second| awaited(true, 3600 + second)), Some(6));
    }

    #[test]
    fn a_peer_whose_host_is_seen_otherwise_gets_more_time() {
        assert_eq!(given_up_after(Some(3), |second| awaited(true, second)), Some(16));
        assert_eq!(given_up_after(Some(0), |second| awaited(true, second)), Some(6), "before");
    }

    #[test]
    fn a_peer_that_acknowledges_lives_however_long_it_takes() {
        assert_eq!(given_up_after(None, |second| awaited(false, second)), None, "it works");
        assert_eq!(given_up_after(None, |second| awaited(true, second % 4)), None, "losses");
        // Windows probes of a full peer are answered, ever more rarely.
        assert_eq!(given_up_after(None, |second| awaited(second % 9 == 0, second % 9)), None);
    }

    #[test]
    fn only_progress_counts_where_there_is_room() {
        let one_way = |second| Acks { progress: Some(7), ..awaited(second % 2 == 0, second % 2) };
        assert_eq!(given_up_after(None, one_way), Some(7), "it sends, and gets nothing");
        // What it sends again always comes behind what it is sent again.
        let behind = |_| Acks { sent: SECOND / 2, progress: Some(7), ..awaited(false, 0) };
        assert_eq!(given_up_after(None, behind), Some(7));
        // A window has opened, and nothing was sent again yet.
        let opened =
            |second: u32| Acks { progress: Some(7), pending: true, ..awaited(false, second) };
        assert_eq!(given_up_after(None, opened), None);
        // The same, just after a last try that found none.
        let sent = |second| SECOND / 10 + (second - 1) * SECOND;
        let tried = |second| Acks { sent: sent(second), ..opened(second) };
        assert_eq!(given_up_after(None, tried), None);
        let slow =
            |second: u32| Acks { progress: Some(u64::from(second) / 4), ..awaited(true, second) };
        assert_eq!(given_up_after(None, slow), None);
    }

    #[test]
    fn who_is_quiet_though_an_answer_is_due_is_asked_until_it_comes() {
        let now = Instant::now();
        let mut pulse = Pulse::default();
        let look = |pulse: &mut Pulse, last| {
            assert!(pulse.is_due(false));
            pulse.look(awaited(false, last), false, Some(SECOND), now).ask
        };
        assert!(!pulse.is_due(false), "nothing was sent");
        pulse.on_asked();
        assert_eq!(look(&mut pulse, 0), None);
        assert_eq!(look(&mut pulse, 1), Some(true));
        assert_eq!(look(&mut pulse, 0), None, "it is there, and is asked on");
        pulse.on_heard();
        assert_eq!(look(&mut pulse, 0), Some(false));
        assert!(!pulse.is_due(false));
    }

    #[test]
    fn who_has_spoken_last_is_asked_once_for_it_may_have_more_to_say() {
        let now = Instant::now();
        let mut pulse = Pulse::default();
        pulse.on_asked();
        pulse.on_heard();
        assert!(!pulse.is_due(false), "it has just spoken");
        let asks = [(0, None), (1, Some(true)), (2, None), (0, Some(false))];
        for (last, ask) in asks {
            assert!(pulse.is_due(false));
            assert_eq!(pulse.look(awaited(false, last), false, Some(SECOND), now).ask, ask);
        }
        assert!(!pulse.is_due(false), "it was there");
        assert!(pulse.is_due(true), "its endpoint is in doubt");
        assert_eq!(pulse.look(awaited(false, 9), true, Some(SECOND), now).ask, Some(true));
        assert!(pulse.take_asked());
    }

    #[test]
    fn who_has_no_room_is_looked_at_until_it_has_everything() {
        let mut pulse = Pulse::default();
        pulse.on_sent();
        for pending in [true, true, false] {
            assert!(pulse.is_due(false));
            let acks = Acks { pending, ..awaited(false, 0) };
            pulse.look(acks, false, None, Instant::now());
        }
        assert!(!pulse.is_due(false));
    }

    #[test]
    fn a_connection_in_use_is_not_looked_at() {
        let mut pulse = Pulse::default();
        for _ in 0..3 {
            pulse.on_asked();
            pulse.on_heard();
            assert!(!pulse.is_due(false));
        }
    }

    #[test]
    fn who_is_not_to_be_asked_is_left_alone_once_it_has_acknowledged() {
        let mut pulse = Pulse::default();
        pulse.on_sent();
        for (acks, due) in [(awaited(true, 9), true), (awaited(false, 9), false)] {
            assert!(pulse.is_due(false));
            assert_eq!(pulse.look(acks, false, None, Instant::now()).ask, None);
            assert_eq!(pulse.is_due(false), due);
        }
    }
}
