//! The ring of buffers provided to the kernel, from which it takes one whenever a socket receives.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::mem;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::IoUring;
use io_uring::types::BufRingEntry;

use super::buffers::{Buf, Buffers};
use crate::limits::{
    BUFFER_RING_ENTRIES, BUFFER_SIZE, BUFFERS_PROVIDED_MIN, BUFFERS_PROVIDED_SHORT_MAX,
};

/// So many more are provided after a turn with too few.
const GROWTH: usize = 4;

/// Lends buffers of a pool to the kernel. A buffer's id is its position in the ring, so that the
/// pool may be larger than ids reach.
///
/// It lends as many as are received into at a time: with more, all of them would pass through the
/// caches in turns; with fewer, receives fail and have to be armed again.
pub(super) struct ProvidedBuffers {
    ring: NonNull<BufRingEntry>,
    layout: Layout,
    /// The pool's buffer at each position; `None` where the kernel has given it back.
    provided: Box<[Option<Buf>]>,
    tail: u16,
    available: usize,
    /// So many are to be available to each turn.
    target: usize,
    /// Receives of the last turn found none.
    starved: bool,
}

impl ProvidedBuffers {
    /// The buffer group of the ring.
    pub(super) const GROUP: u16 = 0;

    /// Registers an empty ring.
    ///
    /// # Errors
    /// The kernel is older than 5.19 or denies it.
    pub(super) fn register(uring: &IoUring) -> io::Result<Self> {
        let entries = BUFFER_RING_ENTRIES;
        let size = usize::from(entries) * size_of::<BufRingEntry>();
        // The kernel wants it on a page of its own; pages are 64 KiB at most.
        let layout = Layout::from_size_align(size, 64 * 1024).map_err(io::Error::other)?;
        // SAFETY: the size is not zero; zeroed entries are valid.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(ring) = NonNull::new(memory.cast()) else { handle_alloc_error(layout) };
        let this = Self {
            ring,
            layout,
            provided: (0..entries).map(|_| None).collect(),
            tail: 0,
            available: 0,
            target: BUFFERS_PROVIDED_MIN,
            starved: false,
        };
        // SAFETY: the memory has `entries` entries and lives until after the ring is closed, as
        // the driver's fields are dropped in that order.
        unsafe {
            uring.submitter().register_buf_ring_with_flags(
                ring.as_ptr() as u64,
                entries,
                Self::GROUP,
                0,
            )?;
        }
        Ok(this)
    }

    /// How many buffers the kernel can take from.
    pub(super) fn available(&self) -> usize {
        self.available
    }

    /// A receive found no buffer.
    pub(super) fn on_none_left(&mut self) {
        self.starved = true;
    }

    /// Lends free buffers for the next turn: a few more than for the last one if a receive found
    /// none then, and otherwise one fewer; not many if they are short (`short`).
    pub(super) fn refill(&mut self, buffers: &mut Buffers, short: bool) {
        self.target = if mem::take(&mut self.starved) {
            (self.target + GROWTH).min(self.provided.len())
        } else {
            (self.target - 1).max(BUFFERS_PROVIDED_MIN)
        };
        let max = if short { BUFFERS_PROVIDED_SHORT_MAX } else { self.provided.len() };
        let target = self.target.min(max);
        let before = self.tail;
        let mask = self.provided.len() as u16 - 1;
        while self.available < target && self.provided[usize::from(self.tail & mask)].is_none() {
            let Some(buf) = buffers.take() else { break };
            let position = self.tail & mask;
            // SAFETY: the position is inside the ring, and the kernel reads an entry only between
            // the tail's publication below and giving it back. The tail's own bytes lie in entry
            // 0's reserved field, which these setters leave alone.
            unsafe {
                let entry = &mut *self.ring.as_ptr().add(usize::from(position));
                entry.set_addr(buffers.address(&buf).as_ptr() as u64);
                entry.set_len(BUFFER_SIZE as u32);
                entry.set_bid(position);
            }
            self.provided[usize::from(position)] = Some(buf);
            self.tail = self.tail.wrapping_add(1);
            self.available += 1;
        }
        if self.tail != before {
            // SAFETY: the tail lies inside the ring's memory, aligned to 2, and only the kernel
            // reads it, so an atomic store is what both sides agree on.
            unsafe {
                let tail = BufRingEntry::tail(self.ring.as_ptr()).cast_mut();
                AtomicU16::from_ptr(tail).store(self.tail, Ordering::Release);
            }
        }
    }

    /// The buffer that the kernel filled with `len` bytes, if it has this one. It is empty where so many do
    /// not fit.
    pub(super) fn take(&mut self, id: u16, len: u32) -> Option<Buf> {
        let buf = self.provided.get_mut(usize::from(id))?.take()?;
        self.available -= 1;
        let fits = len as usize <= BUFFER_SIZE;
        Some(Buf::filled(buf.index(), if fits { len } else { 0 }))
    }
}

impl Drop for ProvidedBuffers {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `register`; the io_uring instance that knew of it
        // is closed by now.
        unsafe { dealloc(self.ring.as_ptr().cast(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: usize = BUFFER_RING_ENTRIES as usize;

    /// Lets the kernel use all buffers up, as if each had received something.
    fn use_up(provided: &mut ProvidedBuffers, buffers: &mut Buffers) {
        for id in 0..BUFFER_RING_ENTRIES {
            if let Some(buf) = provided.take(id, 1) {
                buffers.give(buf);
            }
        }
    }

    #[test]
    fn as_many_are_lent_as_receives_want_and_no_more() {
        let uring = match IoUring::new(8) {
            Ok(uring) => uring,
            Err(error) => return eprintln!("SKIPPED: a ring of provided buffers: {error}"),
        };
        let mut provided = ProvidedBuffers::register(&uring).unwrap();
        let mut buffers = Buffers::new(2 * ALL).unwrap();
        let mut provide = |starved: bool, short: bool, turns: usize| {
            use_up(&mut provided, &mut buffers);
            for _ in 0..turns {
                (0..3).filter(|_| starved).for_each(|_| provided.on_none_left());
                provided.refill(&mut buffers, short);
            }
            provided.available()
        };
        assert_eq!(provide(false, false, 1), BUFFERS_PROVIDED_MIN);
        assert_eq!(provide(true, false, 25), BUFFERS_PROVIDED_MIN + 25 * GROWTH);
        assert_eq!(provide(false, true, 1), BUFFERS_PROVIDED_SHORT_MAX, "buffers are short");
        assert_eq!(provide(false, false, 1), BUFFERS_PROVIDED_MIN + 98, "they no longer are");
        assert_eq!(provide(true, false, ALL), ALL);
        assert_eq!(provide(false, true, ALL), BUFFERS_PROVIDED_SHORT_MAX);
        assert_eq!(provide(false, false, 1), BUFFERS_PROVIDED_MIN, "nobody wanted more for long");
    }
}
