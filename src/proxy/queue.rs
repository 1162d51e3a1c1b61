//! Requests that wait for a backend connection: first come, first served, also where a connection
//! would do for the first of several lines.
//!
//! A client has at most one request in here, so the order of arrival is fair to all of them. Lines
//! are linked through one table by the client's slot: joining, serving and leaving from the middle
//! take constant time and allocate nothing once a slot was used.

use super::request::Client;
use crate::proxy::endpoints::EndpointId;
use crate::slab::Key;

const NONE: u32 = u32::MAX;

/// Which line a request waits in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// For a connection to whichever endpoint.
    Any,
    /// For one to this endpoint.
    Endpoint(EndpointId),
    /// For the store of this number, which is away: until there is an endpoint, nothing serves it.
    Store(u16),
}

impl Line {
    fn index(self) -> usize {
        match self {
            Self::Any => 0,
            Self::Endpoint(endpoint) => 1 + 2 * usize::from(endpoint),
            Self::Store(number) => 2 + 2 * usize::from(number),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Ends {
    head: u32,
    tail: u32,
    len: u32,
}

const EMPTY: Ends = Ends { head: NONE, tail: NONE, len: 0 };

#[derive(Debug, Clone, Copy)]
struct Link {
    next: u32,
    previous: u32,
    /// How many had joined any line before.
    turn: u64,
    /// The key of who waits, and its line; `None` while the slot does not wait.
    waits: Option<(Key<Client>, Line)>,
}

const UNLINKED: Link = Link { next: NONE, previous: NONE, turn: 0, waits: None };

/// All requests of a worker that wait.
#[derive(Debug)]
pub struct Queue {
    lines: Vec<Ends>,
    links: Vec<Link>,
    len: usize,
    max: usize,
    joined: u64,
}

impl Queue {
    /// An empty queue of at most `max` requests, in all lines or in each, for clients in up to `slots`
    /// slots.
    pub fn new(max: usize, slots: usize) -> Self {
        Self { lines: Vec::new(), links: Vec::with_capacity(slots), len: 0, max, joined: 0 }
    }

    /// How many wait in all lines.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether no further request may wait in a line. Those for whom connections are `coming` wait for
    /// nobody else, and are none of the maximum, which all lines share.
    pub fn is_full(&self, line: Line, coming: usize) -> bool {
        let waiting = self.waiting(line);
        let max = self.max.saturating_sub(self.len - waiting);
        waiting >= max.saturating_add(coming)
    }

    /// The same where each line has the maximum for itself.
    pub fn is_line_full(&self, line: Line, coming: usize) -> bool {
        self.waiting(line) >= self.max.saturating_add(coming)
    }

    /// How many wait in a line.
    pub fn waiting(&self, line: Line) -> usize {
        self.lines.get(line.index()).map_or(0, |ends| ends.len as usize)
    }

    /// The line in which a client waits, if it does.
    pub fn line_of(&self, client: Key<Client>) -> Option<Line> {
        let (who, line) = self.links.get(client.index())?.waits?;
        (who == client).then_some(line)
    }

    /// A client's request joins the end of a line. It must not wait already.
    pub fn join(&mut self, line: Line, client: Key<Client>) {
        let slot = client.index() as u32;
        if self.links.len() <= client.index() {
            self.links.resize(client.index() + 1, UNLINKED);
        }
        debug_assert!(self.links[client.index()].waits.is_none(), "waits already");
        if self.lines.len() <= line.index() {
            self.lines.resize(line.index() + 1, EMPTY);
        }
        let ends = &mut self.lines[line.index()];
        self.links[client.index()] = Link {
            next: NONE,
            previous: ends.tail,
            turn: self.joined,
            waits: Some((client, line)),
        };
        self.joined += 1;
        match self.links.get_mut(ends.tail as usize) {
            Some(last) => last.next = slot,
            None => ends.head = slot,
        }
        ends.tail = slot;
        ends.len += 1;
        self.len += 1;
    }

    /// Takes the client at the head of a line.
    pub fn serve(&mut self, line: Line) -> Option<Key<Client>> {
        let (client, _) = self.head(line)?.waits?;
        self.leave(client);
        Some(client)
    }

    /// Takes the client that has waited longest at the head of one of two lines.
    pub fn serve_either(&mut self, one: Line, two: Line) -> Option<Key<Client>> {
        let is_earlier = match (self.head(one), self.head(two)) {
            (Some(one), Some(two)) => one.turn < two.turn,
            (one, _) => one.is_some(),
        };
        self.serve(if is_earlier { one } else { two })
    }

    /// Takes all clients, in the order in which they came.
    pub fn serve_all(&mut self) -> Vec<Key<Client>> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut waiting: Vec<_> =
            self.links.iter().filter_map(|link| Some((link.turn, link.waits?.0))).collect();
        waiting.sort_unstable_by_key(|(turn, _)| *turn);
        let clients: Vec<Key<Client>> = waiting.into_iter().map(|(_, client)| client).collect();
        for client in &clients {
            self.leave(*client);
        }
        clients
    }

    fn head(&self, line: Line) -> Option<&Link> {
        self.links.get(self.lines.get(line.index())?.head as usize)
    }

    /// A client waits no longer, if it did.
    pub fn leave(&mut self, client: Key<Client>) {
        let Some(&Link { next, previous, waits: Some((who, line)), .. }) =
            self.links.get(client.index())
        else {
            return;
        };
        if who != client {
            return;
        }
        self.links[client.index()] = UNLINKED;
        let ends = &mut self.lines[line.index()];
        match self.links.get_mut(previous as usize) {
            Some(before) => before.next = next,
            None => ends.head = next,
        }
        match self.links.get_mut(next as usize) {
            Some(after) => after.previous = previous,
            None => ends.tail = previous,
        }
        ends.len -= 1;
        self.len -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    #[test]
    fn lines_keep_their_order_whoever_leaves() {
        const LINES: [Line; 5] = [
            Line::Any,
            Line::Endpoint(EndpointId::at(0)),
            Line::Endpoint(EndpointId::at(1)),
            Line::Store(0),
            Line::Store(1),
        ];
        let mut rng = fastrand::Rng::with_seed(3);
        let mut queue = Queue::new(1000, 40);
        let mut model: [VecDeque<Key<Client>>; 5] = Default::default();
        for round in 0..50_000u32 {
            let line = rng.usize(..5);
            let client = Key::from_parts(rng.u32(..40), round);
            let waits = model.iter().flatten().any(|key| key.index() == client.index());
            match rng.u8(..4) {
                0 | 1 if !waits => {
                    queue.join(LINES[line], client);
                    model[line].push_back(client);
                }
                0 | 1 => queue.leave(client), // Of another one in its slot.
                2 => assert_eq!(queue.serve(LINES[line]), model[line].pop_front()),
                _ => {
                    let count = model[line].len();
                    if count > 0 {
                        let who = model[line].remove(rng.usize(..count)).unwrap();
                        queue.leave(who);
                        queue.leave(who);
                    }
                }
            }
            for (line, model) in LINES.into_iter().zip(&model) {
                assert_eq!(queue.waiting(line), model.len());
                assert!(model.iter().all(|&key| queue.line_of(key) == Some(line)));
            }
            assert_eq!(queue.len(), model.iter().map(VecDeque::len).sum::<usize>());
        }
    }

    #[test]
    fn of_two_lines_the_one_whose_head_came_first_is_served() {
        let key = |slot| Key::from_parts(slot, 0);
        let (any, own) = (Line::Any, Line::Endpoint(EndpointId::at(3)));
        let mut queue = Queue::new(10, 10);
        assert_eq!(queue.serve_either(own, any), None);
        for (slot, line) in
            [own, any, own, Line::Endpoint(EndpointId::at(0)), any].into_iter().enumerate()
        {
            queue.join(line, key(slot as u32));
        }
        for expected in [0, 1, 2, 4] {
            assert_eq!(queue.serve_either(own, any), Some(key(expected)));
        }
        assert_eq!(queue.serve_either(own, any), None);
        assert_eq!(queue.len(), 1);
    }

    #[test]
    fn all_are_taken_in_the_order_in_which_they_came() {
        let key = |slot| Key::from_parts(slot, 0);
        let mut queue = Queue::new(10, 10);
        assert_eq!(queue.serve_all(), []);
        let arrivals = [
            (7, Line::Any),
            (2, Line::Endpoint(EndpointId::at(1))),
            (9, Line::Any),
            (0, Line::Any),
        ];
        for (slot, line) in arrivals {
            queue.join(line, key(slot));
        }
        queue.leave(key(9));
        assert_eq!(queue.serve_all(), [key(7), key(2), key(0)]);
        assert!(queue.is_empty() && queue.waiting(Line::Any) == 0);
    }

    #[test]
    fn it_is_full_at_its_maximum() {
        let mut queue = Queue::new(1, 2);
        assert!(!queue.is_full(Line::Any, 0) && queue.is_empty());
        queue.join(Line::Any, Key::from_parts(0, 0));
        assert!(queue.is_full(Line::Any, 0) && !queue.is_empty());
        assert!(queue.is_line_full(Line::Any, 0) && !queue.is_line_full(Line::Store(0), 0));
    }

    #[test]
    fn those_for_whom_connections_are_coming_are_none_of_its_maximum() {
        let (own, key) = (Line::Endpoint(EndpointId::at(0)), |slot| Key::from_parts(slot, 0));
        for (max, coming, waiting) in [(0, 3, 3), (1, 3, 4), (2, usize::MAX, 9)] {
            let mut queue = Queue::new(max, 10);
            for slot in 0..waiting {
                assert!(!queue.is_full(own, coming), "{slot} of {max} and {coming}");
                queue.join(own, key(slot));
            }
            assert_eq!(queue.is_full(own, coming), coming < 9, "{max} and {coming}");
            assert_eq!(queue.is_line_full(own, coming), coming < 9, "{max} and {coming}");
            assert!(queue.is_full(Line::Any, 0), "all lines have one maximum");
            assert!(!queue.is_full(Line::Any, 1), "and each its own connections");
        }
    }
}
