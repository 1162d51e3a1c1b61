//! The buffers of one worker: fixed size, taken only while bytes are in flight.
//!
//! The memory is mapped once and touched on first use. Free buffers are used again last-in
//! first-out, and those that nobody has needed for a while give their memory back, so resident
//! memory follows the bytes in flight, not the capacity.
//!
//! A [`Buf`] is an owned handle: whoever holds it must forward it or give it back. A [`Chain`] is
//! a queue of them, linked through the pool's own table, so that queueing allocates nothing.
#![allow(unsafe_code)]

use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use rustix::param::page_size;

use crate::limits::BUFFER_SIZE;

const NONE: u32 = u32::MAX;

/// So many buffers that nobody needs keep their memory, for the next burst.
const KEPT: u32 = 64;
/// At most so many are returned at a time: each is a system call.
const GIVEN_BACK_MAX: u32 = 16;

/// Received bytes in one buffer of the pool. Not `Clone`: there is one owner.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a buffer that is dropped is lost to its pool"]
pub struct Buf {
    index: u32,
    start: u32,
    len: u32,
}

impl Buf {
    /// How many bytes it holds.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffer's number in its pool.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// The whole of buffer `index` with `len` bytes in it, as the kernel gives it back.
    pub(super) fn filled(index: u32, len: u32) -> Self {
        debug_assert!(len as usize <= BUFFER_SIZE);
        Self { index, start: 0, len }
    }
}

/// A queue of buffers. Must be emptied into its pool before it is dropped.
#[derive(Debug)]
pub struct Chain {
    head: u32,
    tail: u32,
    bytes: u32,
    buffers: u32,
    /// Buffers are reserved for it.
    has_reserve: bool,
}

impl Default for Chain {
    fn default() -> Self {
        Self { head: NONE, tail: NONE, bytes: 0, buffers: 0, has_reserve: false }
    }
}

impl Chain {
    /// A queue that is one of those for which buffers are reserved.
    pub(super) fn with_reserve() -> Self {
        Self { has_reserve: true, ..Self::default() }
    }

    /// Bytes in all of its buffers.
    pub fn bytes(&self) -> u32 {
        self.bytes
    }

    /// How many buffers it holds.
    pub fn buffers(&self) -> u32 {
        self.buffers
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.buffers == 0
    }
}

#[derive(Clone, Copy)]
struct Entry {
    start: u32,
    len: u32,
    next: u32,
}

/// A fixed number of buffers of [`BUFFER_SIZE`] bytes.
pub struct Buffers {
    memory: NonNull<u8>,
    entries: Vec<Entry>,
    capacity: u32,
    /// The first free buffer with memory of its own, and how many there are.
    free: u32,
    resident: u32,
    /// The fewest that there were since memory was last returned.
    resident_min: u32,
    /// The first free buffer whose memory was returned.
    released: u32,
    /// So many are reserved, …
    reserved: u32,
    /// … of which each chain with a reserve that is not empty has its first.
    reserved_taken: u32,
    /// Whether a page never is part of two buffers; arm64 kernels may have pages of 64 KiB.
    whole_pages: bool,
    in_use: u32,
}

impl Buffers {
    /// A pool of `capacity` buffers.
    ///
    /// # Errors
    /// The address space is too small for it.
    pub fn new(capacity: usize) -> io::Result<Self> {
        assert!((1..NONE as usize).contains(&capacity), "a pool of {capacity} buffers");
        // Mapped rather than allocated: an allocator may write to what it hands out, and only
        // buffers in use are to become resident.
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new anonymous mapping, at an address of the kernel's choice.
        let memory = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                capacity * BUFFER_SIZE,
                protection,
                flags | MapFlags::NORESERVE,
            )?
        };
        Ok(Self {
            memory: NonNull::new(memory.cast()).ok_or(io::ErrorKind::OutOfMemory)?,
            entries: Vec::with_capacity(capacity),
            capacity: capacity as u32,
            free: NONE,
            resident: 0,
            resident_min: 0,
            released: NONE,
            reserved: 0,
            reserved_taken: 0,
            whole_pages: BUFFER_SIZE.is_multiple_of(page_size()),
            in_use: 0,
        })
    }

    /// How many buffers are free.
    pub fn free(&self) -> u32 {
        self.capacity - self.in_use
    }

    /// Reserves so many buffers for the queues of sockets.
    pub fn reserve(&mut self, reserved: u32) {
        self.reserved = reserved;
    }

    /// How many buffers are free beside those that are reserved.
    pub fn spare(&self) -> u32 {
        (self.free() + self.reserved_taken).saturating_sub(self.reserved)
    }

    /// How many buffers there are.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Takes a free buffer, empty.
    pub fn take(&mut self) -> Option<Buf> {
        let index = if self.free != NONE {
            self.pop_resident()
        } else if self.released != NONE {
            let index = self.released;
            self.released = self.entries[index as usize].next;
            index
        } else if self.entries.len() < self.capacity as usize {
            self.entries.push(Entry { start: 0, len: 0, next: NONE });
            self.entries.len() as u32 - 1
        } else {
            return None;
        };
        self.in_use += 1;
        Some(Buf { index, start: 0, len: 0 })
    }

    fn pop_resident(&mut self) -> u32 {
        let index = self.free;
        self.free = self.entries[index as usize].next;
        self.resident -= 1;
        self.resident_min = self.resident_min.min(self.resident);
        index
    }

    /// Gives a buffer back.
    pub fn give(&mut self, buf: Buf) {
        self.entries[buf.index as usize].next = self.free;
        self.free = buf.index;
        self.resident += 1;
        self.in_use -= 1;
    }

    /// Gives memory back of which nobody had need since the last call, a little at a time.
    pub fn release_idle(&mut self) {
        if !self.whole_pages {
            return;
        }
        let idle = self.resident_min.saturating_sub(KEPT).min(GIVEN_BACK_MAX);
        for _ in 0..idle {
            let index = self.pop_resident();
            let buf = Buf { index, start: 0, len: 0 };
            // SAFETY: the buffer is free, so nobody has a reference into it, and no operation of
            // the kernel's is under way on it; its pages hold nothing else, and what they held is
            // lost, which is what is wanted.
            let _ = unsafe {
                madvise(self.address(&buf).as_ptr().cast(), BUFFER_SIZE, Advice::LinuxDontNeed)
            };
            self.entries[index as usize].next = self.released;
            self.released = index;
        }
        self.resident_min = self.resident;
    }

    /// The bytes of a buffer.
    pub fn bytes(&self, buf: &Buf) -> &[u8] {
        // SAFETY: `start + len` never exceeds the buffer, which lies inside the allocation; the
        // handle is the only one to this buffer, so nobody writes while it is borrowed.
        unsafe { std::slice::from_raw_parts(self.address(buf).as_ptr(), buf.len as usize) }
    }

    /// The whole of a buffer, to be filled and then cut to length by [`Buffers::set_len`].
    pub fn space(&mut self, buf: &mut Buf) -> &mut [u8] {
        buf.start = 0;
        // SAFETY: as for `bytes`; the exclusive borrows of pool and handle make it unique.
        unsafe { std::slice::from_raw_parts_mut(self.address(buf).as_ptr(), BUFFER_SIZE) }
    }

    /// Says how many bytes were written to [`Buffers::space`].
    pub fn set_len(&self, buf: &mut Buf, len: usize) {
        assert!(len <= BUFFER_SIZE, "{len} bytes in a buffer");
        buf.len = len as u32;
    }

    /// Where a buffer's bytes are, for the kernel.
    pub(super) fn address(&self, buf: &Buf) -> NonNull<u8> {
        let offset = buf.index as usize * BUFFER_SIZE + buf.start as usize;
        // SAFETY: index < capacity and start <= BUFFER_SIZE, so the offset is inside.
        unsafe { self.memory.add(offset) }
    }

    /// Puts a buffer at the end of a chain. Bytes for which the chain's last buffer has room are
    /// copied there, so that small messages to a slow reader do not hold a whole buffer each.
    pub fn push(&mut self, chain: &mut Chain, mut buf: Buf) {
        self.fill_tail(chain, &mut buf);
        if buf.is_empty() {
            return self.give(buf);
        }
        let Buf { index, start, len } = buf;
        self.entries[index as usize] = Entry { start, len, next: NONE };
        if chain.tail == NONE {
            chain.head = index;
            self.reserved_taken += u32::from(chain.has_reserve);
        } else {
            self.entries[chain.tail as usize].next = index;
        }
        chain.tail = index;
        chain.bytes += len;
        chain.buffers += 1;
    }

    /// Moves bytes from the front of `buf` to the free space of the chain's last buffer.
    fn fill_tail(&mut self, chain: &mut Chain, buf: &mut Buf) {
        let Some(tail) = self.entries.get_mut(chain.tail as usize) else { return };
        let end = (tail.start + tail.len) as usize;
        let count = (BUFFER_SIZE - end).min(buf.len as usize);
        tail.len += count as u32;
        let to = chain.tail as usize * BUFFER_SIZE + end;
        // SAFETY: both ranges lie inside the mapping, in different buffers. Nobody else uses the
        // target: an operation under way has what was there when it was submitted, which ends
        // before it.
        unsafe {
            let from = self.address(buf).as_ptr();
            ptr::copy_nonoverlapping(from, self.memory.as_ptr().add(to), count);
        }
        chain.bytes += count as u32;
        buf.start += count as u32;
        buf.len -= count as u32;
    }

    /// Takes the first buffer of a chain.
    pub fn pop(&mut self, chain: &mut Chain) -> Option<Buf> {
        if chain.head == NONE {
            return None;
        }
        let index = chain.head;
        let Entry { start, len, next } = self.entries[index as usize];
        chain.head = next;
        if next == NONE {
            chain.tail = NONE;
            self.reserved_taken -= u32::from(chain.has_reserve);
        }
        chain.bytes -= len;
        chain.buffers -= 1;
        Some(Buf { index, start, len })
    }

    /// Drops the first `count` bytes of a chain, giving emptied buffers back.
    pub fn advance(&mut self, chain: &mut Chain, mut count: u32) {
        debug_assert!(count <= chain.bytes);
        while count > 0 && chain.head != NONE {
            let first = &mut self.entries[chain.head as usize];
            if count < first.len {
                first.start += count;
                first.len -= count;
                chain.bytes -= count;
                return;
            }
            count -= first.len;
            if let Some(buf) = self.pop(chain) {
                self.give(buf);
            }
        }
    }

    /// Gives all buffers of a chain back.
    pub fn clear(&mut self, chain: &mut Chain) {
        while let Some(buf) = self.pop(chain) {
            self.give(buf);
        }
    }

    /// The bytes of each of a chain's buffers, in order.
    pub fn slices<'a>(&'a self, chain: &'a Chain) -> impl Iterator<Item = &'a [u8]> + 'a {
        self.parts(chain).map(|(at, len)| {
            // SAFETY: a chain owns its buffers; while it is borrowed nobody takes or writes them.
            unsafe { std::slice::from_raw_parts(at.as_ptr(), len) }
        })
    }

    /// The first `len` bytes of a chain in one piece, put together in `scratch` if they are in
    /// several buffers.
    pub fn front<'a>(&'a self, chain: &'a Chain, len: usize, scratch: &'a mut [u8]) -> &'a [u8] {
        let Some(first) = self.slices(chain).next() else { return &[] };
        if let Some(front) = first.get(..len) {
            return front;
        }
        let len = self.copy(chain, &mut scratch[..len]);
        &scratch[..len]
    }

    /// Takes bytes from the front of a chain, at most `len` and what one buffer holds: its
    /// first buffer if all of that is wanted, else a copy. None: no buffer is free for that.
    pub fn take_front(&mut self, chain: &mut Chain, len: u32) -> Option<Buf> {
        let first = self.entries.get(chain.head as usize).map_or(0, |entry| entry.len);
        if first <= len {
            return self.pop(chain);
        }
        let buf = self.duplicate(chain, len)?;
        self.advance(chain, buf.len);
        Some(buf)
    }

    /// A new buffer with the first `len` bytes of a chain, if one is free.
    pub fn duplicate(&mut self, chain: &Chain, len: u32) -> Option<Buf> {
        let mut buf = self.take()?;
        buf.len = len.min(chain.bytes).min(BUFFER_SIZE as u32);
        let mut filled = 0;
        for (from, count) in self.parts(chain) {
            let count = count.min(buf.len as usize - filled);
            // SAFETY: both ranges lie inside the mapping, in different buffers; the target is ours
            // alone, and nobody writes to what a chain holds.
            unsafe {
                let to = self.address(&buf).as_ptr().add(filled);
                ptr::copy_nonoverlapping(from.as_ptr(), to, count);
            }
            filled += count;
        }
        Some(buf)
    }

    /// Copies the first bytes of a chain, as many as there are or as fit. Returns how many.
    pub fn copy(&self, chain: &Chain, mut space: &mut [u8]) -> usize {
        let before = space.len();
        for slice in self.slices(chain) {
            let count = slice.len().min(space.len());
            let (filled, rest) = space.split_at_mut(count);
            filled.copy_from_slice(&slice[..count]);
            space = rest;
        }
        before - space.len()
    }

    /// Address and length of each of a chain's buffers, in order.
    pub(super) fn parts<'a>(
        &'a self,
        chain: &Chain,
    ) -> impl Iterator<Item = (NonNull<u8>, usize)> + 'a {
        let mut at = chain.head;
        std::iter::from_fn(move || {
            let entry = *self.entries.get(at as usize)?;
            let buf = Buf { index: at, start: entry.start, len: entry.len };
            at = entry.next;
            Some((self.address(&buf), buf.len as usize))
        })
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: mapped with this size in `new`; drivers drop the pool only after the kernel has
        // finished every operation on it.
        let _ =
            unsafe { munmap(self.memory.as_ptr().cast(), self.capacity as usize * BUFFER_SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(pool: &mut Buffers, text: &[u8]) -> Buf {
        let mut buf = pool.take().unwrap();
        pool.space(&mut buf)[..text.len()].copy_from_slice(text);
        pool.set_len(&mut buf, text.len());
        buf
    }

    fn give_all(pool: &mut Buffers, bufs: Vec<Buf>) {
        for buf in bufs {
            pool.give(buf);
        }
    }

    fn text(pool: &Buffers, chain: &Chain) -> Vec<u8> {
        pool.slices(chain).flatten().copied().collect()
    }

    #[test]
    fn a_chain_keeps_order_and_counts_through_every_cut() {
        const LEN: u32 = BUFFER_SIZE as u32;
        let whole: Vec<u8> = (0..5 * BUFFER_SIZE / 2).map(|i| (i / 7) as u8).collect();
        for cut in [0, 1, LEN - 1, LEN, LEN + 1, 2 * LEN, 5 * LEN / 2 - 1, 5 * LEN / 2] {
            let mut pool = Buffers::new(4).unwrap();
            let mut chain = Chain::default();
            for part in whole.chunks(BUFFER_SIZE / 2 - 5) {
                let buf = filled(&mut pool, part);
                pool.push(&mut chain, buf);
            }
            assert_eq!(chain.buffers(), 3, "buffers are filled before another one is taken");
            pool.advance(&mut chain, cut);
            assert!(text(&pool, &chain) == whole[cut as usize..], "after {cut} bytes");
            assert_eq!(chain.bytes(), 5 * LEN / 2 - cut);
            let emptied = if cut == 5 * LEN / 2 { 3 } else { cut / LEN };
            assert_eq!(pool.free(), 1 + emptied, "emptied buffers are free again");
            let buf = filled(&mut pool, b"xyz");
            pool.push(&mut chain, buf);
            assert!(text(&pool, &chain).ends_with(b"xyz"));
            pool.clear(&mut chain);
            assert_eq!((pool.free(), chain.bytes(), chain.is_empty()), (4, 0, true));
        }
    }

    #[test]
    fn what_a_queue_holds_first_is_not_missing_from_what_is_reserved() {
        let mut pool = Buffers::new(10).unwrap();
        pool.reserve(4);
        assert_eq!(pool.spare(), 6);
        let (mut queue, mut other) = (Chain::with_reserve(), Chain::default());
        for (held, spare) in [(1, 6), (2, 5), (3, 4)] {
            let mut buf = filled(&mut pool, b"x");
            pool.set_len(&mut buf, BUFFER_SIZE);
            pool.push(&mut queue, buf);
            assert_eq!((queue.buffers(), pool.spare()), (held, spare));
        }
        let buf = filled(&mut pool, b"x");
        pool.push(&mut other, buf);
        assert_eq!(pool.spare(), 3, "nothing is reserved for this one");
        pool.clear(&mut queue);
        pool.clear(&mut other);
        assert_eq!(pool.spare(), 6);
    }

    #[test]
    fn an_empty_pool_says_so_and_the_last_buffer_given_is_the_next_taken() {
        let mut pool = Buffers::new(2).unwrap();
        let a = pool.take().unwrap();
        let b = pool.take().unwrap();
        assert!(pool.take().is_none());
        let index = a.index();
        pool.give(b);
        pool.give(a);
        assert_eq!(pool.take().map(|buf| buf.index()), Some(index));
    }
    #[test]
    fn memory_that_nobody_needs_any_more_is_given_back() {
        const PEAK: usize = 2 * KEPT as usize;
        let mut pool = Buffers::new(PEAK).unwrap();
        let peak = |pool: &mut Buffers| {
            let bufs: Vec<_> = (0..PEAK).map(|_| filled(pool, b"x")).collect();
            give_all(pool, bufs);
        };
        // What is resident still holds what was written to it.
        let resident = |pool: &mut Buffers| {
            let mut bufs: Vec<_> = (0..PEAK).map(|_| pool.take().unwrap()).collect();
            let firsts: Vec<_> = bufs.iter_mut().map(|buf| pool.space(buf)[0]).collect();
            give_all(pool, bufs);
            firsts.into_iter().filter(|first| *first == b'x').count()
        };
        peak(&mut pool);
        pool.release_idle();
        assert_eq!(resident(&mut pool), PEAK, "they were needed since the last call");
        pool.release_idle();
        pool.release_idle();
        assert_eq!(resident(&mut pool), PEAK - GIVEN_BACK_MAX as usize, "some at a time");
        peak(&mut pool);
        (0..PEAK).for_each(|_| pool.release_idle());
        assert_eq!(pool.free(), PEAK as u32, "all of them can be taken");
        assert_eq!(resident(&mut pool), KEPT as usize);
    }
}
