//! Fixed-capacity slots with generations.
//!
//! Capacity is reserved once; a slot's memory is touched only when it is first used, and freed
//! slots are used again last-in first-out, so resident memory follows the peak, not the capacity.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::ops::{Index, IndexMut};

/// Names a `T` in a [`Slab`]. A key of a removed value never finds a later one.
pub struct Key<T> {
    index: u32,
    generation: u32,
    of: PhantomData<fn() -> T>,
}

// Derived, these would ask the same of `T`.
impl<T> Clone for Key<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Key<T> {}

impl<T> PartialEq for Key<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.index, self.generation) == (other.index, other.generation)
    }
}

impl<T> Eq for Key<T> {}

impl<T> Hash for Key<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.index, self.generation).hash(state);
    }
}

impl<T> fmt::Debug for Key<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.index, self.generation)
    }
}

impl<T> Key<T> {
    /// The slot's position, below the slab's capacity.
    pub fn index(self) -> usize {
        self.index as usize
    }

    /// The generation of the slot that the key belongs to.
    pub fn generation(self) -> u32 {
        self.generation
    }

    /// A key from its parts, as they came back from the kernel.
    pub fn from_parts(index: u32, generation: u32) -> Self {
        Self { index, generation, of: PhantomData }
    }
}

#[derive(Debug)]
enum Slot<T> {
    Used { generation: u32, value: T },
    Free { generation: u32, next: u32 },
}

/// No further free slot.
const NONE: u32 = u32::MAX;

/// A table of at most `capacity` values. Its keys name an `N`, where that is not the value itself.
#[derive(Debug)]
pub struct Slab<T, N = T> {
    slots: Vec<Slot<T>>,
    capacity: usize,
    free: u32,
    len: usize,
    names: PhantomData<fn() -> N>,
}

impl<T, N> Slab<T, N> {
    /// An empty slab. This is its only allocation.
    pub fn with_capacity(capacity: usize) -> Self {
        assert!(capacity < NONE as usize, "a slab of {capacity} slots");
        Self {
            slots: Vec::with_capacity(capacity),
            capacity,
            free: NONE,
            len: 0,
            names: PhantomData,
        }
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many values there can be.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Stores a value, or gives it back when the slab is full.
    pub fn insert(&mut self, value: T) -> Result<Key<N>, T> {
        if self.free != NONE {
            let index = self.free;
            let slot = &mut self.slots[index as usize];
            let Slot::Free { generation, next } = *slot else {
                unreachable!("a used slot is free")
            };
            self.free = next;
            *slot = Slot::Used { generation, value };
            self.len += 1;
            return Ok(Key::from_parts(index, generation));
        }
        if self.slots.len() == self.capacity {
            return Err(value);
        }
        let index = self.slots.len() as u32;
        self.slots.push(Slot::Used { generation: 0, value });
        self.len += 1;
        Ok(Key::from_parts(index, 0))
    }

    /// The value that `key` names, if it is still there.
    pub fn get(&self, key: Key<N>) -> Option<&T> {
        match self.slots.get(key.index()) {
            Some(Slot::Used { generation, value }) if *generation == key.generation => Some(value),
            _ => None,
        }
    }

    /// The value that `key` names, if it is still there.
    pub fn get_mut(&mut self, key: Key<N>) -> Option<&mut T> {
        match self.slots.get_mut(key.index()) {
            Some(Slot::Used { generation, value }) if *generation == key.generation => Some(value),
            _ => None,
        }
    }

    /// Takes a value out.
    pub fn remove(&mut self, key: Key<N>) -> Option<T> {
        self.get(key)?;
        let next = Slot::Free { generation: key.generation.wrapping_add(1), next: self.free };
        let Slot::Used { value, .. } = std::mem::replace(&mut self.slots[key.index()], next) else {
            unreachable!("get found the slot in use")
        };
        self.free = key.index;
        self.len -= 1;
        Some(value)
    }

    /// The key of the value in slot `index`, for walks that change the slab on the way:
    /// `0..slots()` visits every value.
    pub fn key_at(&self, index: usize) -> Option<Key<N>> {
        match self.slots.get(index) {
            Some(Slot::Used { generation, .. }) => Some(Key::from_parts(index as u32, *generation)),
            _ => None,
        }
    }

    /// How many slots were ever used: the bound of [`Slab::key_at`].
    pub fn slots(&self) -> usize {
        self.slots.len()
    }
}

/// For keys whose values are there as long as anything holds the key.
///
/// # Panics
/// The value was removed.
impl<T, N> Index<Key<N>> for Slab<T, N> {
    type Output = T;

    fn index(&self, key: Key<N>) -> &T {
        match self.get(key) {
            Some(value) => value,
            None => panic!("{key:?} names what was removed"),
        }
    }
}

impl<T, N> IndexMut<Key<N>> for Slab<T, N> {
    fn index_mut(&mut self, key: Key<N>) -> &mut T {
        match self.slots.get_mut(key.index()) {
            Some(Slot::Used { generation, value }) if *generation == key.generation => value,
            _ => panic!("{key:?} names what was removed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_a_removed_value_never_finds_a_later_one() {
        let mut slab: Slab<_> = Slab::with_capacity(2);
        let a = slab.insert('a').unwrap();
        assert_eq!(slab.remove(a), Some('a'));
        let b = slab.insert('b').unwrap();
        assert_eq!((a.index(), b.index()), (0, 0), "the slot is used again");
        assert_eq!((slab.get(a), slab.get(b)), (None, Some(&'b')));
        assert_eq!(slab.remove(a), None);
        assert_eq!(slab.len(), 1);
    }

    #[test]
    #[should_panic(expected = "0.0 names what was removed")]
    fn what_was_removed_cannot_be_indexed() {
        let mut slab: Slab<_> = Slab::with_capacity(1);
        let key = slab.insert('a').unwrap();
        assert_eq!(slab[key], 'a');
        slab[key] = 'b';
        assert_eq!(slab.remove(key), Some('b'));
        slab.insert('c').unwrap();
        slab[key] = 'd';
    }

    #[test]
    fn a_full_slab_gives_the_value_back() {
        let mut slab: Slab<_> = Slab::with_capacity(1);
        slab.insert(1).unwrap();
        assert_eq!(slab.insert(2), Err(2));
    }

    #[test]
    fn free_slots_are_all_found_again() {
        let mut slab: Slab<_> = Slab::with_capacity(100);
        let keys: Vec<Key<_>> = (0..100).map(|i| slab.insert(i).unwrap()).collect();
        for &key in keys.iter().step_by(3) {
            slab.remove(key);
        }
        while slab.insert(0).is_ok() {}
        assert_eq!((slab.len(), slab.slots()), (100, 100));
    }
}
