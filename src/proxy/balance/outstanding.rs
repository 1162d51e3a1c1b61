//! What endpoints owe replies to, by connection, so that an endpoint that stalls is seen while it
//! does: the age of its oldest request is a bound of what the reply will have taken.
//!
//! The requests of an endpoint are a list in the order in which they were sent, linked through one
//! table by the connections' slots: adding, removing from the middle and the age of the oldest take
//! constant time, and nothing is allocated.

use std::time::Instant;

use crate::io::ConnId;

const NONE: u32 = u32::MAX;

/// What a connection waits for.
#[derive(Debug, Clone, Copy)]
enum Link {
    /// Nothing.
    Idle,
    /// It was connected in a time that began then, and the first word may be the server's.
    Connected { since: Instant },
    /// A reply, or the end of a handshake.
    Owed { since: Instant, previous: u32, next: u32 },
}

/// The ends of an endpoint's list.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    oldest: u32,
    latest: u32,
}

impl Default for Ends {
    fn default() -> Self {
        Self { oldest: NONE, latest: NONE }
    }
}

/// What the connections of a worker wait for.
#[derive(Debug)]
pub(super) struct Outstanding {
    links: Vec<Link>,
}

impl Outstanding {
    /// Nothing yet, of connections in up to `slots` slots.
    pub(super) fn new(slots: usize) -> Self {
        Self { links: Vec::with_capacity(slots) }
    }

    /// A reply on a connection is owed from now on.
    pub(super) fn ask(&mut self, ends: &mut Ends, conn: ConnId, now: Instant) {
        self.take(ends, conn);
        let (slot, at) = (conn.index(), conn.index() as u32);
        if self.links.len() <= slot {
            self.links.resize(slot + 1, Link::Idle);
        }
        self.links[slot] = Link::Owed { since: now, previous: ends.latest, next: NONE };
        match self.links.get_mut(ends.latest as usize) {
            Some(Link::Owed { next, .. }) => *next = at,
            _ => ends.oldest = at,
        }
        ends.latest = at;
    }

    /// A handshake is over, and no reply owed yet. Returns when it began.
    pub(super) fn connected(&mut self, ends: &mut Ends, conn: ConnId) -> Option<Instant> {
        let since = self.take(ends, conn)?;
        self.links[conn.index()] = Link::Connected { since };
        Some(since)
    }

    /// A connection waits for nothing any more. Returns since when it did.
    pub(super) fn take(&mut self, ends: &mut Ends, conn: ConnId) -> Option<Instant> {
        let link = self.links.get_mut(conn.index())?;
        match std::mem::replace(link, Link::Idle) {
            Link::Idle => None,
            Link::Connected { since } => Some(since),
            Link::Owed { since, previous, next } => {
                match self.links.get_mut(previous as usize) {
                    Some(Link::Owed { next: of_previous, .. }) => *of_previous = next,
                    _ => ends.oldest = next,
                }
                match self.links.get_mut(next as usize) {
                    Some(Link::Owed { previous: of_next, .. }) => *of_next = previous,
                    _ => ends.latest = previous,
                }
                Some(since)
            }
        }
    }

    /// Whether a connection waits for a reply or the end of a handshake.
    pub(super) fn is_owed(&self, conn: ConnId) -> bool {
        matches!(self.links.get(conn.index()), Some(Link::Owed { .. }))
    }

    /// Since when the oldest request of an endpoint waits.
    pub(super) fn oldest(&self, ends: Ends) -> Option<Instant> {
        match self.links.get(ends.oldest as usize)? {
            Link::Owed { since, .. } => Some(*since),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Against a list that is looked through from end to end.
    #[test]
    fn the_oldest_is_the_oldest_whatever_order_replies_come_in() {
        let (mut rng, begun) = (fastrand::Rng::with_seed(1), Instant::now());
        let mut outstanding = Outstanding::new(20);
        let mut ends = [Ends::default(); 3];
        let mut model: Vec<(usize, usize, Instant)> = Vec::new();
        for step in 0..20_000 {
            let now = begun + Duration::from_millis(step);
            let slot = rng.usize(..20);
            let (conn, of) = (ConnId::from_parts(slot as u32, 0), slot % 3);
            let known = model.iter().position(|&(_, at, _)| at == slot);
            let since = known.map(|at| model[at].2);
            match rng.u8(..4) {
                0 => {
                    assert_eq!(outstanding.connected(&mut ends[of], conn), since);
                    assert_eq!(outstanding.take(&mut ends[of], conn), since, "it is remembered");
                    known.map(|at| model.remove(at));
                }
                1 => {
                    assert_eq!(outstanding.take(&mut ends[of], conn), since);
                    known.map(|at| model.remove(at));
                }
                _ => {
                    outstanding.ask(&mut ends[of], conn, now);
                    known.map(|at| model.remove(at));
                    model.push((of, slot, now));
                }
            }
            assert_eq!(outstanding.is_owed(conn), model.iter().any(|&(_, at, _)| at == slot));
            for (endpoint, &ends) in ends.iter().enumerate() {
                let oldest = model.iter().find(|&&(of, ..)| of == endpoint);
                assert_eq!(outstanding.oldest(ends), oldest.map(|&(.., since)| since));
            }
        }
    }
}
