//! Connections that are closed with a reset once their peers have what was sent to them.
//!
//! A reset discards what the kernel has not delivered yet, and a kernel tells nobody that the last
//! byte was acknowledged. So whoever is to get all that came before a break, and then see the break,
//! is looked at again and again, more rarely each time, until nothing is on its way any more.

use std::time::{Duration, Instant};

use super::context::Context;
use super::mailbox::Command;
use super::owners::{Owned, Owner};
use crate::io::{Close, ConnId, Driver};
use crate::limits;
use crate::proxy::RouteId;

/// The first look comes after this; each further one after twice the time,
const LOOK_AFTER_MIN: Duration = Duration::from_millis(8);
/// or this.
const LOOK_AFTER_MAX: Duration = Duration::from_millis(500);

/// A connection of which nothing is wanted but that its peer takes what was sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flushing {
    /// Bytes on their way at the latest look that saw fewer than the one before.
    left: u64,
    /// The time of that look.
    since: Instant,
    look_after: Duration,
}

impl Flushing {
    fn new(left: u64, now: Instant) -> Self {
        Self { left, since: now, look_after: LOOK_AFTER_MIN }
    }

    /// Bytes that are on their way now; `None` once there are none, or it takes no more of them.
    fn look(self, left: u64, now: Instant) -> Option<Self> {
        let taken = left < self.left;
        let (left, since) = if taken { (left, now) } else { (self.left, self.since) };
        let stalled = now.saturating_duration_since(since) >= limits::FLUSH_STALL_MAX;
        let look_after = (2 * self.look_after).min(LOOK_AFTER_MAX);
        (left > 0 && !stalled).then_some(Self { left, since, look_after })
    }
}

/// Closes a connection with a reset, behind all that is on its way to its peer. That may take as long
/// as the peer goes on taking bytes, and until then it takes a place. Whoever calls this has taken its
/// timer away.
pub(super) fn reset_behind<D: Driver>(cx: &mut Context<D>, conn: ConnId) {
    let left = cx.driver.undelivered(conn);
    if left == 0 || cx.command == Command::Stop {
        cx.owners.take(conn);
        return cx.close(conn, Close::Reset);
    }
    // What it still sends is for nobody, but while it cannot send, it may not get to receiving.
    cx.driver.receive(conn, true);
    cx.places.on_flushing(route_of(cx, conn));
    go_on(cx, conn, Flushing::new(left, cx.now));
}

fn go_on<D: Driver>(cx: &mut Context<D>, conn: ConnId, flushing: Flushing) {
    cx.timers.set(conn.index(), cx.now + flushing.look_after);
    cx.owners.set(conn, Owner::Flushing(flushing));
}

/// Looks at a connection again that is being flushed.
pub(super) fn on_timer<D: Driver>(cx: &mut Context<D>, conn: ConnId, flushing: Flushing) {
    match flushing.look(cx.driver.undelivered(conn), cx.now) {
        Some(flushing) => go_on(cx, conn, flushing),
        None => end(cx, conn),
    }
}

/// A connection that is being flushed has broken, or there is no time left for it.
pub(super) fn end<D: Driver>(cx: &mut Context<D>, conn: ConnId) {
    let route = route_of(cx, conn);
    cx.timers.clear(conn.index());
    cx.owners.take(conn);
    cx.close(conn, Close::Reset);
    cx.places.on_flushed(route);
    cx.publish_sessions(route);
}

fn route_of<D>(cx: &Context<D>, conn: ConnId) -> RouteId {
    let Some(route) = cx.owners.route_of(conn) else { unreachable!("it is open") };
    route
}

/// Ends all flushes: there is no time left.
pub(super) fn end_all<D: Driver>(cx: &mut Context<D>) {
    for slot in 0..cx.owners.len() {
        let &Owned { conn, ref owner, .. } = cx.owners.at(slot);
        if let Owner::Flushing(_) = owner {
            end(cx, conn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks on until it is over; returns how many looks there were and how long it took.
    fn flush(start: Instant, left_at: impl Fn(Duration) -> u64) -> (u32, Duration) {
        let mut flushing = Some(Flushing::new(left_at(Duration::ZERO), start));
        let (mut looks, mut now) = (0, start);
        while let Some(latest) = flushing {
            now += latest.look_after;
            looks += 1;
            flushing = latest.look(left_at(now - start), now);
        }
        (looks, now - start)
    }

    #[test]
    fn a_flush_ends_soon_after_the_last_byte_was_taken() {
        let start = Instant::now();
        let (looks, took) = flush(start, |_| 0);
        assert_eq!((looks, took), (1, LOOK_AFTER_MIN));
        let last = Duration::from_secs(100);
        let (looks, took) =
            flush(start, |at| (last.as_millis() - at.as_millis().min(100_000)) as u64);
        assert!(took >= last && took <= last + LOOK_AFTER_MAX, "{took:?}");
        assert!(looks < 220, "{looks} looks");
    }

    #[test]
    fn a_flush_that_stalls_ends_however_many_bytes_are_left() {
        let start = Instant::now();
        let (_, took) = flush(start, |_| 1 << 20);
        assert!(took >= limits::FLUSH_STALL_MAX, "{took:?}");
        assert!(took <= limits::FLUSH_STALL_MAX + LOOK_AFTER_MAX, "{took:?}");
        // What is taken in the last moment is progress.
        let last_moment = Duration::from_millis(29_400);
        let (_, took) = flush(start, |at| if at < last_moment { 9 } else { 8 });
        assert!(took >= last_moment + limits::FLUSH_STALL_MAX, "{took:?}");
    }
}
