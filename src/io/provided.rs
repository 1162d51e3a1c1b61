//! The ring of buffers lent to the kernel, from which it takes one whenever a socket receives.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::IoUring;
use io_uring::types::BufRingEntry;

use super::buffers::{Buf, Buffers};
use crate::limits::BUFFER_SIZE;

/// Lends buffers of a pool to the kernel. A buffer's id is its position in the ring, so that the
/// pool may be larger than ids reach.
pub(super) struct ProvidedBuffers {
    ring: NonNull<BufRingEntry>,
    layout: Layout,
    /// The pool's buffer at each position; `None` where the kernel has given it back.
    lent: Box<[Option<Buf>]>,
    tail: u16,
    available: usize,
}

impl ProvidedBuffers {
    /// The buffer group of the ring.
    pub(super) const GROUP: u16 = 0;

    /// Registers an empty ring of `entries`, a power of two.
    ///
    /// # Errors
    /// The kernel is older than 5.19 or denies it.
    pub(super) fn register(uring: &IoUring, entries: u16) -> io::Result<Self> {
        assert!(entries.is_power_of_two());
        let size = usize::from(entries) * size_of::<BufRingEntry>();
        // The kernel wants it on a page of its own; pages are 64 KiB at most.
        let layout = Layout::from_size_align(size, 64 * 1024).map_err(io::Error::other)?;
        // SAFETY: the size is not zero; zeroed entries are valid.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(ring) = NonNull::new(memory.cast()) else { handle_alloc_error(layout) };
        let this = Self {
            ring,
            layout,
            lent: (0..entries).map(|_| None).collect(),
            tail: 0,
            available: 0,
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

    /// Lends free buffers until the ring is full or the pool is empty.
    pub(super) fn refill(&mut self, buffers: &mut Buffers) {
        let before = self.tail;
        let mask = self.lent.len() as u16 - 1;
        while self.lent[usize::from(self.tail & mask)].is_none() {
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
            self.lent[usize::from(position)] = Some(buf);
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

    /// The buffer that the kernel filled with `len` bytes.
    pub(super) fn take(&mut self, id: u16, len: u32) -> Option<Buf> {
        let buf = self.lent.get_mut(usize::from(id))?.take()?;
        self.available -= 1;
        Some(Buf::filled(buf.index(), len))
    }
}

impl Drop for ProvidedBuffers {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `register`; the io_uring instance that knew of it
        // is closed by now.
        unsafe { dealloc(self.ring.as_ptr().cast(), self.layout) };
    }
}
