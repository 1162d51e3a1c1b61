//! Sessions that wait, for a usable endpoint or for a place at one: in one line, in order of arrival.
//!
//! A session keeps its [`Ticket`] until it is served for good: one whose connect fails goes back to
//! where it stood. The line is linked through a table by the session's slot, so that joining and
//! leaving allocate nothing once a slot was used. Who joins looks for its place from both ends at a
//! time: those that go back stood in front, and newcomers stand at the end.
//!
//! What the line waits for is the same for all in it at any moment, and may change: endpoints come
//! back and are full, or those that are full go away. A clock runs while it is a place, so that each
//! wait has a limit of its own, whatever the session has waited for before.

use std::time::{Duration, Instant};

use super::session::Session;
use crate::slab::Key;

/// A place in the [`Line`], which its holder keeps until it is served for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket {
    since: Instant,
    /// Of those that came at the same moment.
    number: u64,
    /// What [`Line::full`] was.
    full: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Link {
    ticket: Ticket,
    session: Key<Session>,
    previous: Option<u32>,
    next: Option<u32>,
}

/// Sessions that wait, in order of arrival.
#[derive(Debug, Default)]
pub struct Line {
    /// By the slots of sessions.
    links: Vec<Option<Link>>,
    first: Option<u32>,
    last: Option<u32>,
    len: usize,
    /// Tickets so far.
    tickets: u64,
    /// Those whose holders are not served yet: they wait, or are being connected.
    held: usize,
    /// Since when it is places that are waited for, while it is.
    full_since: Option<Instant>,
    /// For how long it was before.
    full_before: Duration,
}

impl Line {
    /// Nobody, of sessions in up to `slots` slots.
    pub fn new(slots: usize) -> Self {
        Self { links: Vec::with_capacity(slots), ..Self::default() }
    }

    /// The place of a session that has looked for an endpoint since then.
    pub fn ticket(&mut self, since: Instant, now: Instant) -> Ticket {
        self.tickets += 1;
        self.held += 1;
        Ticket { since, number: self.tickets, full: self.full(now) }
    }

    /// A session waits.
    ///
    /// # Panics
    /// It waits already.
    pub fn join(&mut self, ticket: Ticket, session: Key<Session>) {
        let slot = session.index();
        if self.links.len() <= slot {
            self.links.resize(slot + 1, None);
        }
        assert!(self.links[slot].is_none(), "it waits already");
        let (previous, next) = self.neighbours(ticket);
        self.links[slot] = Some(Link { ticket, session, previous, next });
        self.set_next(previous, Some(slot as u32));
        self.set_previous(next, Some(slot as u32));
        self.len += 1;
    }

    /// Between whom a ticket belongs.
    fn neighbours(&self, ticket: Ticket) -> (Option<u32>, Option<u32>) {
        let (mut front, mut back) = (self.first, self.last);
        while let (Some(one), Some(other)) = (front, back) {
            let (one, other) = (self.link(one), self.link(other));
            if ticket < one.ticket {
                return (one.previous, front);
            }
            if ticket > other.ticket {
                return (back, other.next);
            }
            (front, back) = (one.next, other.previous);
        }
        (None, None)
    }

    /// A session waits no longer.
    ///
    /// # Panics
    /// It did not wait.
    pub fn leave(&mut self, session: Key<Session>) {
        assert!(self.has(session), "it waits");
        let Some(left) = self.links[session.index()].take() else { return };
        self.set_next(left.previous, left.next);
        self.set_previous(left.next, left.previous);
        self.len -= 1;
    }

    /// Whether a session waits.
    pub fn has(&self, session: Key<Session>) -> bool {
        let link = self.links.get(session.index()).copied().flatten();
        link.is_some_and(|link| link.session == session)
    }

    fn link(&self, slot: u32) -> &Link {
        let Some(link) = &self.links[slot as usize] else { unreachable!("links lead to links") };
        link
    }

    fn set_next(&mut self, slot: Option<u32>, next: Option<u32>) {
        match slot.and_then(|slot| self.links[slot as usize].as_mut()) {
            Some(link) => link.next = next,
            None => self.first = next,
        }
    }

    fn set_previous(&mut self, slot: Option<u32>, previous: Option<u32>) {
        match slot.and_then(|slot| self.links[slot as usize].as_mut()) {
            Some(link) => link.previous = previous,
            None => self.last = previous,
        }
    }

    /// The one that has waited longest.
    pub fn first(&self) -> Option<Key<Session>> {
        self.first.map(|slot| self.link(slot).session)
    }

    /// The one behind a session that waits.
    pub fn next(&self, session: Key<Session>) -> Option<Key<Session>> {
        let link = self.links.get(session.index()).copied().flatten();
        let next = link.filter(|link| link.session == session)?.next?;
        Some(self.link(next).session)
    }

    /// The holder of a ticket is served, or over.
    ///
    /// # Panics
    /// Nobody holds one.
    pub fn on_ticket_over(&mut self) {
        assert!(self.held > 0, "a ticket is over once");
        self.held -= 1;
    }

    /// Sessions that have had to wait and are not served yet, those included that are being connected.
    pub fn held(&self) -> usize {
        self.held
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes note of whether it is a place at a usable endpoint that is waited for now. Says whether
    /// that is news.
    pub fn set_full(&mut self, is_full: bool, now: Instant) -> bool {
        if is_full == self.is_full() {
            return false;
        }
        self.full_before = self.full(now);
        self.full_since = is_full.then_some(now);
        true
    }

    /// Whether it is a place that is waited for, and not an endpoint that is usable.
    pub fn is_full(&self) -> bool {
        self.full_since.is_some()
    }

    /// For how long it has been places that were waited for, all waits together.
    fn full(&self, now: Instant) -> Duration {
        let current = self.full_since.map(|since| now.saturating_duration_since(since));
        self.full_before + current.unwrap_or_default()
    }

    /// For how much of its wait the holder of a ticket has waited for a place.
    pub fn waited_for_place(&self, ticket: Ticket, now: Instant) -> Duration {
        self.full(now).saturating_sub(ticket.full)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn order(line: &Line) -> Vec<Key<Session>> {
        std::iter::successors(line.first(), |&session| line.next(session)).collect()
    }

    #[test]
    fn who_came_first_is_served_first_however_often_it_was_tried() {
        let (mut line, start) = (Line::new(4), Instant::now());
        let key = |index| Key::from_parts(index, 1);
        let [second, third] = [2, 3].map(|index| {
            let ticket = line.ticket(start + MS, start + MS);
            line.join(ticket, key(index));
            ticket
        });
        // It was being connected while the others began to wait.
        let first = line.ticket(start, start + 2 * MS);
        line.join(first, key(1));
        assert!(first < second && second < third);
        assert_eq!(order(&line), [1, 2, 3].map(key));
        line.leave(key(1));
        line.leave(key(2));
        line.join(first, key(1));
        assert_eq!(order(&line), [1, 3].map(key));
        assert!(!line.has(key(2)) && !line.has(Key::from_parts(1, 2)), "another one in its slot");
        assert_eq!((line.len(), line.held()), (2, 3));
    }

    #[test]
    fn the_line_is_in_the_order_of_tickets_whoever_comes_and_goes() {
        let mut rng = fastrand::Rng::with_seed(7);
        let start = Instant::now();
        let mut line = Line::new(40);
        let mut tickets: Vec<Option<Ticket>> = vec![None; 40];
        let mut model: BTreeMap<Ticket, Key<Session>> = BTreeMap::new();
        for round in 0..20_000 {
            let slot = rng.usize(..40);
            let session = Key::from_parts(slot as u32, 1);
            let since = start + MS * (round / 10 + rng.u32(..20));
            let ticket = *tickets[slot].get_or_insert_with(|| line.ticket(since, since));
            match (model.remove(&ticket).is_some(), rng.u8(..3)) {
                (false, _) => {
                    line.join(ticket, session);
                    model.insert(ticket, session);
                }
                (true, what) => {
                    line.leave(session);
                    if what > 0 {
                        line.on_ticket_over();
                        tickets[slot] = None;
                    }
                }
            }
            assert_eq!(order(&line), model.values().copied().collect::<Vec<_>>());
            assert_eq!((line.len(), line.is_empty()), (model.len(), model.is_empty()));
            assert_eq!(line.held(), tickets.iter().flatten().count());
        }
    }

    #[test]
    fn what_is_waited_for_is_timed_apart() {
        let (mut line, start) = (Line::new(1), Instant::now());
        let at = |ms| start + MS * ms;
        let early = line.ticket(start, start);
        assert!(!line.set_full(false, at(5)) && line.set_full(true, at(10)));
        let late = line.ticket(at(20), at(20));
        assert!(line.is_full() && !line.set_full(true, at(25)) && line.set_full(false, at(30)));
        let waited = |line: &Line, ms| [early, late].map(|one| line.waited_for_place(one, at(ms)));
        assert_eq!(waited(&line, 50), [20 * MS, 10 * MS]);
        assert!(line.set_full(true, at(50)));
        assert_eq!(waited(&line, 55), [25 * MS, 15 * MS]);
    }
}
