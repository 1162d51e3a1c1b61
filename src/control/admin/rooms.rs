//! Who is connected to the admin port, and who makes room for whom.
//!
//! There is a room for connections whose head has not come yet, one for those being answered, and
//! one for those held until the start is over, so that none of them can take places from another
//! kind. Where a room is full, the address with the most connections in it loses the one that has
//! waited longest for its peer. So a newcomer always has a place, and whoever has but one keeps it
//! while somebody has more: the kubelet's probe, whatever other pods do.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::AbortHandle;
use tokio::sync::Notify;

use crate::limits::{ADMIN_ANSWERS, ADMIN_HEADS, ADMIN_HELD};

/// A kind of connections that share their places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// A whole head has not come yet.
    Head,
    /// It is being answered, or has been and has not been closed by its peer.
    Answer,
    /// It is answered once the start is over.
    Held,
}

impl Room {
    const fn places(self) -> usize {
        match self {
            Self::Head => ADMIN_HEADS,
            Self::Answer => ADMIN_ANSWERS,
            Self::Held => ADMIN_HELD,
        }
    }

    /// Places that one address may have: it leaves others as many.
    const fn places_of_peer(self) -> usize {
        self.places() / 2
    }
}

/// How long a connection may stay in each room.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// From accept to the end of the head.
    pub(super) head: Duration,
    /// From there to the close: the answer, and its way over a slow network.
    pub(super) answer: Duration,
    /// Until a start that is not over is said not to be.
    pub(super) hold: Duration,
}

/// Names a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Id(u64);

#[derive(Debug)]
pub(super) struct Rooms {
    times: Times,
    guests: Vec<Guest>,
    next: u64,
}

#[derive(Debug)]
struct Guest {
    id: Id,
    peer: IpAddr,
    room: Room,
    /// Since when it waits for its peer: to send a head, or to take more of the answer.
    waits_since: Instant,
    deadline: Instant,
    cut: AbortHandle,
    recall: Arc<Notify>,
}

impl Rooms {
    pub(super) fn new(times: Times) -> Self {
        Self { times, guests: Vec::new(), next: 0 }
    }

    /// A connection from `peer` has come; somebody else may have to go. `cut` ends it, `recall` its
    /// being held.
    pub(super) fn enter(
        &mut self,
        peer: IpAddr,
        now: Instant,
        cut: AbortHandle,
        recall: Arc<Notify>,
    ) -> Id {
        // An IPv4 client of a socket for both families is the same one.
        let peer = peer.to_canonical();
        self.make_room(Room::Head, peer, now);
        let id = Id(self.next);
        self.next += 1;
        let deadline = now + self.times.head;
        let room = Room::Head;
        self.guests.push(Guest { id, peer, room, waits_since: now, deadline, cut, recall });
        id
    }

    /// The connection goes on to another room; somebody else may have to go.
    pub(super) fn go(&mut self, id: Id, room: Room, now: Instant) {
        // One that was cut, and whose task has not ended yet, goes nowhere.
        let Some(at) = self.guests.iter().position(|guest| guest.id == id) else { return };
        if self.guests[at].room == room {
            return;
        }
        let mut guest = self.guests.swap_remove(at);
        self.make_room(room, guest.peer, now);
        let time = match room {
            Room::Head => self.times.head,
            Room::Answer => self.times.answer,
            // It goes on to another room by itself.
            Room::Held => self.times.hold + self.times.answer,
        };
        (guest.room, guest.waits_since, guest.deadline) = (room, now, now + time);
        self.guests.push(guest);
    }

    /// The peer took something of its answer.
    pub(super) fn progressed(&mut self, id: Id, now: Instant) {
        if let Some(guest) = self.guests.iter_mut().find(|guest| guest.id == id) {
            guest.waits_since = now;
        }
    }

    /// When the connection has to be gone; `None` if it was cut.
    pub(super) fn deadline(&self, id: Id) -> Option<Instant> {
        self.guests.iter().find(|guest| guest.id == id).map(|guest| guest.deadline)
    }

    /// The connection has ended.
    pub(super) fn leave(&mut self, id: Id) {
        self.guests.retain(|guest| guest.id != id);
    }

    /// Cuts the connection that has waited longest for its peer, wherever it is; whether there is
    /// one.
    pub(super) fn cut_longest_waiting(&mut self) -> bool {
        let waiting = self.guests.iter().enumerate().filter(|(_, guest)| guest.room != Room::Held);
        let Some((at, _)) = waiting.min_by_key(|(_, guest)| guest.waits_since) else {
            return false;
        };
        self.guests.swap_remove(at).cut.abort();
        true
    }

    fn make_room(&mut self, room: Room, peer: IpAddr, now: Instant) {
        let Some(at) = self.who_makes_room(room, peer) else { return };
        if room == Room::Held {
            // It is answered at once, as it would have been later.
            let Guest { id, recall, .. } = &self.guests[at];
            recall.notify_one();
            self.go(*id, Room::Answer, now);
        } else {
            self.guests.swap_remove(at).cut.abort();
        }
    }

    fn who_makes_room(&self, room: Room, newcomer: IpAddr) -> Option<usize> {
        let there = || self.guests.iter().enumerate().filter(move |(_, guest)| guest.room == room);
        let of_peer = |peer| there().filter(|(_, guest)| guest.peer == peer).count();
        let who = if of_peer(newcomer) >= room.places_of_peer() {
            there().filter(|(_, guest)| guest.peer == newcomer).min_by_key(|(_, g)| g.waits_since)
        } else if there().count() >= room.places() {
            there().min_by_key(|(_, guest)| (Reverse(of_peer(guest.peer)), guest.waits_since))
        } else {
            None
        };
        who.map(|(at, _)| at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Hotel {
        rooms: Rooms,
        now: Instant,
        cuts: Vec<(Id, AbortHandle)>,
    }

    impl Hotel {
        fn new() -> Self {
            let second = Duration::from_secs(1);
            let times = Times { head: second, answer: second, hold: second };
            Self { rooms: Rooms::new(times), now: Instant::now(), cuts: Vec::new() }
        }

        /// A millisecond later somebody comes.
        fn enter(&mut self, peer: u8) -> Id {
            self.now += Duration::from_millis(1);
            let (cut, _) = AbortHandle::new_pair();
            let peer = IpAddr::from([10, 0, 0, peer]);
            let id = self.rooms.enter(peer, self.now, cut.clone(), Arc::default());
            self.cuts.push((id, cut));
            id
        }

        /// Somebody comes, and goes on.
        fn enter_to(&mut self, peer: u8, room: Room) -> Id {
            let id = self.enter(peer);
            self.rooms.go(id, room, self.now);
            id
        }

        fn cut(&self) -> Vec<Id> {
            self.cuts.iter().filter(|(_, cut)| cut.is_aborted()).map(|(id, _)| *id).collect()
        }

        fn count(&self, room: Room) -> usize {
            self.rooms.guests.iter().filter(|guest| guest.room == room).count()
        }
    }

    #[test]
    fn of_one_address_the_oldest_makes_room_at_half_of_the_places() {
        let mut hotel = Hotel::new();
        let ids: Vec<_> = (0..300).map(|_| hotel.enter(1)).collect();
        assert_eq!(hotel.cut(), ids[..300 - ADMIN_HEADS / 2]);
    }

    #[test]
    fn who_has_one_keeps_it_while_another_has_more() {
        for room in [Room::Head, Room::Answer] {
            let mut hotel = Hotel::new();
            let probe = hotel.enter_to(1, room);
            for peer in (2..8).cycle().take(300) {
                hotel.enter_to(peer, room);
            }
            assert!(!hotel.cut().contains(&probe), "{room:?}");
            assert_eq!(hotel.count(room), room.places());
            // Where all have as many, it is the one that has waited longest.
            let mut hotel = Hotel::new();
            let ids: Vec<_> =
                (0..=room.places()).map(|peer| hotel.enter_to(peer as u8, room)).collect();
            assert_eq!(hotel.cut(), ids[..1], "{room:?}");
        }
    }

    #[test]
    fn who_takes_its_answer_stays_longer_than_who_does_not() {
        let mut hotel = Hotel::new();
        let ids: Vec<_> =
            (0..ADMIN_ANSWERS).map(|peer| hotel.enter_to(peer as u8, Room::Answer)).collect();
        hotel.rooms.progressed(ids[0], hotel.now);
        hotel.enter_to(200, Room::Answer);
        assert_eq!(hotel.cut(), [ids[1]]);
    }

    #[test]
    fn no_room_takes_places_of_another() {
        let mut hotel = Hotel::new();
        let answered = hotel.enter_to(1, Room::Answer);
        let held: Vec<_> =
            (0..ADMIN_HELD).map(|peer| hotel.enter_to(peer as u8, Room::Held)).collect();
        for peer in 0..100 {
            hotel.enter(peer);
        }
        for id in held.iter().chain([&answered]) {
            assert!(!hotel.cut().contains(id));
        }
        // Of those held the first is answered, not cut.
        let recalled =
            Arc::clone(&hotel.rooms.guests.iter().find(|g| g.id == held[0]).unwrap().recall);
        hotel.enter_to(200, Room::Held);
        assert_eq!((hotel.count(Room::Held), hotel.count(Room::Answer)), (ADMIN_HELD, 2));
        assert!(!hotel.cut().contains(&held[0]));
        assert!(futures_util::FutureExt::now_or_never(recalled.notified()).is_some());
    }

    #[test]
    fn each_room_has_its_time_and_who_was_cut_has_none() {
        let mut hotel = Hotel::new();
        let id = hotel.enter(1);
        let second = Duration::from_secs(1);
        assert_eq!(hotel.rooms.deadline(id), Some(hotel.now + second));
        hotel.rooms.go(id, Room::Held, hotel.now);
        assert_eq!(hotel.rooms.deadline(id), Some(hotel.now + 2 * second));
        assert!(!hotel.rooms.cut_longest_waiting(), "who is held waits for nobody");
        hotel.rooms.go(id, Room::Answer, hotel.now);
        assert!(hotel.rooms.cut_longest_waiting());
        assert_eq!((hotel.rooms.deadline(id), hotel.cut()), (None, vec![id]));
        hotel.rooms.go(id, Room::Held, hotel.now);
        assert_eq!(hotel.count(Room::Held), 0);
    }
}
