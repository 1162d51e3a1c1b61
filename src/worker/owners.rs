//! Whose each connection is.

use std::time::Instant;

use super::flush::Flushing;
use crate::io::{Chain, ConnId, Network};
use crate::proxy::endpoints::EndpointId;
use crate::proxy::request::Client;
use crate::proxy::session::Session;
use crate::proxy::{RouteId, Side};
use crate::slab::Key;

/// Whose a connection is.
#[derive(Debug, Default)]
pub(super) enum Owner {
    /// Nobody's.
    #[default]
    None,
    /// A session's, connected or being connected.
    Session(Key<Session>, Side),
    /// Being made for a pool, or to probe an endpoint.
    Connecting { endpoint: EndpointId, since: Instant },
    /// A client's whose requests are framed.
    Client(Key<Client>),
    /// In the hands of such a client.
    InUse(Key<Client>),
    /// Idle in a pool, with what the backend has sent before any request.
    Idle { endpoint: EndpointId, greeting: Chain },
    /// Nobody's, and to be closed once its peer has what was sent to it.
    Flushing(Flushing),
}

/// A connection's owner. The id tells a slot's present connection from an earlier one.
#[derive(Debug)]
pub(super) struct Owned {
    pub conn: ConnId,
    /// The route that it came by, or was made for.
    pub route: RouteId,
    pub owner: Owner,
    /// What the kernel had measured of it at the latest look.
    seen: Network,
}

impl Owned {
    fn new(conn: ConnId, route: RouteId, owner: Owner) -> Self {
        Self { conn, route, owner, seen: Network::default() }
    }
}

/// Slots in turns, for looks at a few connections at a time.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// The slot of the latest turn.
    at: usize,
}

impl Turns {
    /// The slot whose turn it is, of so many.
    pub(super) fn next(&mut self, slots: usize) -> usize {
        self.at = if self.at == 0 { slots } else { self.at } - 1;
        self.at
    }
}

/// The owners of all connections, by slot.
#[derive(Debug)]
pub(super) struct Owners {
    slots: Vec<Owned>,
}

impl Owners {
    /// None yet, and room for so many.
    pub(super) fn with_capacity(conns_max: usize) -> Self {
        Self { slots: Vec::with_capacity(conns_max) }
    }

    /// How many there may be.
    pub(super) fn capacity(&self) -> usize {
        self.slots.capacity()
    }

    /// A new connection, and whose it is.
    pub(super) fn insert(&mut self, conn: ConnId, route: RouteId, owner: Owner) {
        let slot = conn.index();
        while self.slots.len() <= slot {
            self.slots.push(Owned::new(conn, route, Owner::None));
        }
        self.slots[slot] = Owned::new(conn, route, owner);
    }

    /// Takes note of whose a connection is from now on, of the same route.
    pub(super) fn set(&mut self, conn: ConnId, owner: Owner) {
        let slot = &mut self.slots[conn.index()];
        debug_assert_eq!(slot.conn, conn, "a connection was closed that changes hands");
        slot.owner = owner;
    }

    /// The route of a connection; none of one that was closed.
    pub(super) fn route_of(&self, conn: ConnId) -> Option<RouteId> {
        let owned = self.slots.get(conn.index())?;
        (owned.conn == conn).then_some(owned.route)
    }

    /// Takes a connection's owner out: for connections that change hands.
    pub(super) fn take(&mut self, conn: ConnId) -> Owner {
        match self.slots.get_mut(conn.index()) {
            Some(owned) if owned.conn == conn => std::mem::take(&mut owned.owner),
            _ => Owner::None,
        }
    }

    /// Whose a connection is; none of one that was closed.
    pub(super) fn get(&self, conn: ConnId) -> Option<&Owner> {
        let owned = self.slots.get(conn.index())?;
        (owned.conn == conn).then_some(&owned.owner)
    }

    /// The latest connection in a slot below [`Owners::len`], and whose it is.
    pub(super) fn at(&self, slot: usize) -> &Owned {
        &self.slots[slot]
    }

    /// What was seen last of the way that the connection in a slot takes.
    pub(super) fn seen(&mut self, slot: usize) -> &mut Network {
        &mut self.slots[slot].seen
    }

    /// How many slots were ever used.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Those of a route.
    #[cfg(test)]
    pub(super) fn of_route(&self, route: RouteId) -> impl Iterator<Item = &Owned> {
        self.slots.iter().filter(move |owned| owned.route == route)
    }

    /// All slots.
    #[cfg(test)]
    pub(super) fn iter(&self) -> std::slice::Iter<'_, Owned> {
        self.slots.iter()
    }
}

#[cfg(test)]
impl<'a> IntoIterator for &'a Owners {
    type Item = &'a Owned;
    type IntoIter = std::slice::Iter<'a, Owned>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_tells_its_present_connection_from_an_earlier_one() {
        let mut owners = Owners::with_capacity(0);
        let (first, second) = (ConnId::from_parts(3, 0), ConnId::from_parts(3, 1));
        let client = |at| Owner::Client(Key::from_parts(at, 0));
        owners.insert(first, RouteId::default(), client(1));
        assert_eq!(owners.len(), 4, "those below it are nobody's");
        assert!(matches!(owners.at(0).owner, Owner::None));
        owners.insert(second, RouteId::default(), client(2));
        assert!(owners.get(first).is_none());
        assert!(matches!(owners.take(first), Owner::None), "it is nobody's any more");
        assert!(matches!(owners.get(second), Some(Owner::Client(key)) if key.index() == 2));
        assert!(matches!(owners.take(second), Owner::Client(_)));
        assert!(matches!(owners.get(second), Some(Owner::None)));
    }
}
