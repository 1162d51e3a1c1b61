//! How long an endpoint takes to answer, by what it has shown lately: a peak EWMA.
//!
//! As in Finagle (`PeakEwma.scala`) and in linkerd (tower's `load::peak_ewma`) the estimate rises to a
//! longer time at once, and falls towards shorter ones by the time that has passed, not by their
//! number: samples come at uneven intervals (Eckner, "Algorithms for unevenly-spaced time series").
//! Without samples it falls towards nothing, so that a slow endpoint is tried again now and then.
//! What differs:
//!
//! - What has no reply yet has taken at least its age; see [`super::outstanding`].
//! - No endpoint counts as faster than the fastest one in use was when that was last measured. Else one that
//!   was not asked for long, or never, would seem many times faster than all others and get all that
//!   comes until it has answered. Finagle takes a first request as a penalty, tower a default of one
//!   second, which both make newcomers wait.

use std::time::{Duration, Instant};

use super::outstanding::Outstanding;
use super::{Entry, Table};
use crate::io::ConnId;
use crate::proxy::endpoints::EndpointId;

/// The mean lifetime of an estimate: of a peak, two thirds are forgotten after this. As in Finagle and
/// linkerd; see the simulation for what half and twice as much make of it.
const LIFETIME: Duration = Duration::from_secs(10);

/// What a failure counts as: as long as a lost handshake takes, which is the least that a client waits
/// there for nothing.
const FAILURE: Duration = Duration::from_secs(1);

/// Times below this are noise of our own, and none is 0.
const LEAST: Duration = Duration::from_micros(1);

/// How long one endpoint takes to answer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Latency {
    /// The estimate in nanoseconds, and when it was made.
    estimate: Option<(u64, Instant)>,
    /// It has answered.
    is_measured: bool,
}

impl Latency {
    /// It has answered after this time.
    pub(super) fn on_answered(&mut self, took: Duration, now: Instant) {
        self.is_measured = true;
        let took = nanoseconds(took);
        let Some((estimate, at)) = self.estimate else {
            self.estimate = Some((took, now));
            return;
        };
        let kept = kept(at, now);
        let next = if took > estimate {
            took
        } else {
            (estimate as f64 * kept + took as f64 * (1.0 - kept)) as u64
        };
        self.estimate = Some((next, now));
    }

    /// It has taken at least this time: the estimate does not fall.
    pub(super) fn on_waited(&mut self, waited: Duration, now: Instant) {
        let waited = nanoseconds(waited);
        if self.at(now).is_none_or(|estimate| waited > estimate) {
            self.estimate = Some((waited, now));
        }
    }

    /// It has failed.
    pub(super) fn on_failed(&mut self, now: Instant) {
        self.on_waited(FAILURE, now);
    }

    /// The estimate when it was made, in nanoseconds, if it was made of a reply.
    pub(super) fn measured(&self) -> Option<u64> {
        self.estimate.filter(|_| self.is_measured).map(|(estimate, _)| estimate)
    }

    /// The estimate now, in nanoseconds.
    pub(super) fn at(&self, now: Instant) -> Option<u64> {
        let (estimate, at) = self.estimate?;
        Some((estimate as f64 * kept(at, now)) as u64)
    }
}

/// A time as an estimate: never 0.
pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.max(LEAST).as_nanos()).unwrap_or(u64::MAX)
}

/// The part of an estimate that is left after a time. A clock that stands still, or steps back, leaves
/// all of it.
fn kept(since: Instant, now: Instant) -> f64 {
    let passed = now.saturating_duration_since(since);
    (-passed.as_secs_f64() / LIFETIME.as_secs_f64()).exp()
}

/// What a worker says of its connections. None of it does anything unless latency decides.
impl Table {
    /// A reply of the endpoint on this connection is owed from now on, or the end of a handshake.
    pub fn asked(&mut self, endpoint: EndpointId, conn: ConnId, now: Instant) {
        if let Some((entry, outstanding)) = self.measured(endpoint) {
            outstanding.ask(&mut entry.owed, conn, now);
        }
    }

    /// A handshake is over. A reply takes at least as long; but a short one promises nothing.
    pub fn shook_hands(&mut self, endpoint: EndpointId, conn: ConnId, now: Instant) {
        if let Some((entry, outstanding)) = self.measured(endpoint)
            && let Some(since) = outstanding.connected(&mut entry.owed, conn)
        {
            entry.latency.on_waited(now.saturating_duration_since(since), now);
        }
    }

    /// The first byte of a reply came on this connection, or of a greeting: that took as long as
    /// handshake and greeting together.
    pub fn answered(&mut self, endpoint: EndpointId, conn: ConnId, now: Instant) {
        if let Some((entry, outstanding)) = self.measured(endpoint)
            && let Some(since) = outstanding.take(&mut entry.owed, conn)
        {
            entry.latency.on_answered(now.saturating_duration_since(since), now);
        }
    }

    /// This connection is closed, or nobody waits for a reply on it any more. One that is still owed
    /// would have taken longer: an endpoint does not look well because its clients lose patience.
    pub fn unanswered(&mut self, endpoint: EndpointId, conn: ConnId, now: Instant) {
        if let Some((entry, outstanding)) = self.measured(endpoint) {
            let is_owed = outstanding.is_owed(conn);
            if let Some(since) = outstanding.take(&mut entry.owed, conn).filter(|_| is_owed) {
                entry.latency.on_waited(now.saturating_duration_since(since), now);
            }
        }
    }

    /// Whether a reply or the end of a handshake is owed on this connection, where that is known.
    #[cfg(test)]
    pub fn owes(&self, conn: ConnId) -> Option<bool> {
        self.outstanding.as_ref().map(|outstanding| outstanding.is_owed(conn))
    }

    fn measured(&mut self, endpoint: EndpointId) -> Option<(&mut Entry, &mut Outstanding)> {
        let outstanding = self.outstanding.as_mut()?;
        let entry = self.entries.get_mut(usize::from(endpoint))?.as_mut()?;
        Some((entry, outstanding))
    }

    /// What the fastest endpoint took when it was last measured, in nanoseconds. One that gets nothing, as
    /// it is ejected, or in the own zone while backups of another one serve, does not count: it is not
    /// measured any more, and the others would all seem slow beside it as soon as they have answered.
    pub(super) fn fastest(&self) -> u64 {
        let measured = self
            .in_set()
            .filter(|entry| entry.may_serve(true))
            .filter_map(|entry| entry.latency.measured());
        measured.min().unwrap_or(nanoseconds(Duration::ZERO))
    }

    /// What one more request at an endpoint costs: the time that a reply takes there, as many times as
    /// there are requests with it. `fastest` is that of all of them.
    pub(super) fn cost(&self, entry: &Entry, fastest: u64, now: Instant) -> u64 {
        let oldest = self.outstanding.as_ref().and_then(|all| all.oldest(entry.owed));
        let waited = oldest.map_or(0, |since| nanoseconds(now.saturating_duration_since(since)));
        let takes = entry.latency.at(now).unwrap_or(0).max(waited).max(fastest);
        takes.saturating_mul(entry.load_with_one_more())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// The estimate in microseconds.
    fn us(latency: &Latency, now: Instant) -> u64 {
        latency.at(now).unwrap() / 1000
    }

    #[test]
    fn an_estimate_rises_at_once_and_falls_with_time() {
        let begun = Instant::now();
        let mut latency = Latency::default();
        assert_eq!(latency.at(begun), None);
        latency.on_answered(MS, begun);
        latency.on_answered(100 * MS, begun);
        assert_eq!(us(&latency, begun), 100_000, "as long as the longest");
        for _ in 0..1000 {
            latency.on_answered(MS, begun);
        }
        assert_eq!(us(&latency, begun), 100_000, "by time, not by the number of samples");
        let later = begun + LIFETIME;
        assert!((36_700..36_900).contains(&us(&latency, later)), "without samples");
        latency.on_answered(MS, later);
        assert!((37_300..37_500).contains(&us(&latency, later)), "towards the sample");
        assert_eq!(latency.at(begun + 1000 * LIFETIME), Some(0));
    }

    #[test]
    fn neither_zero_nor_a_clock_that_steps_back_nor_an_endless_time_does_harm() {
        let before = Instant::now();
        let now = before + MS;
        let mut latency = Latency::default();
        latency.on_answered(Duration::ZERO, now);
        assert_eq!(latency.at(now), Some(1000));
        assert_eq!(latency.at(before), Some(1000));
        latency.on_answered(Duration::MAX, before);
        assert_eq!(latency.at(before), Some(u64::MAX));
        latency.on_answered(MS, now + LIFETIME);
        assert!(latency.at(now + LIFETIME).unwrap() < u64::MAX / 2);
    }

    #[test]
    fn what_was_waited_for_in_vain_only_raises_an_estimate_and_promises_nothing() {
        let now = Instant::now();
        let mut latency = Latency::default();
        latency.on_waited(MS, now);
        assert_eq!((us(&latency, now), latency.measured()), (1000, None));
        latency.on_answered(50 * MS, now);
        latency.on_waited(MS, now);
        assert_eq!(us(&latency, now), 50_000);
        latency.on_failed(now);
        assert_eq!(us(&latency, now), 1_000_000);
    }
}
