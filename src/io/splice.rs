//! Bulk is moved within the kernel: out of one socket into a pipe, and on into another socket.
//!
//! Nothing is copied to user space and back, which is most of what bulk costs. For small messages
//! it would be more calls a message, so a stream has to prove itself first: see [`Bulk`].

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use crate::limits::{PIPE_SIZE, PIPES_MAX};

/// The length of a window.
const WINDOW: Duration = Duration::from_millis(4);
/// A stream is bulk from so many bytes in a window on: 64 MB/s.
const WINDOW_BYTES: u32 = 256 * 1024;
/// Moves below this size…
const SMALL: u32 = 32 * 1024;
/// …so many in a row show that it is bulk no more, or comes in pieces too small to gain by pipes.
const SMALL_MOVES: u8 = 8;
/// Then it is not looked at for so many windows.
const REST: u32 = 32;
/// After a failure, pipes are made again once so much time has passed. Descriptors may be there
/// again by then, and where something forbids pipes for good, a try a second costs nothing.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The window that a time falls in, counted from `start`. It begins anew at 0 every 198 days.
pub(super) fn window(start: Instant, now: Instant) -> u32 {
    (now.saturating_duration_since(start).as_micros() / WINDOW.as_micros()) as u32
}

/// Whether a stream brings so much that moving it by pipe pays.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Bulk {
    /// The window that `bytes` came in; while it rests, one to come.
    window: u32,
    bytes: u32,
    on: bool,
    small: u8,
}

impl Bulk {
    /// A receive brought so many bytes.
    pub(super) fn on_received(&mut self, bytes: u32, window: u32) {
        // No rest ends later than that: a window further ahead is one of long ago, or of never.
        match self.window.wrapping_sub(window) {
            0 => {}
            1..=REST => return,
            _ => (self.window, self.bytes) = (window, 0),
        }
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes >= WINDOW_BYTES {
            (self.on, self.small) = (true, 0);
        }
    }

    /// So many bytes went into a pipe.
    pub(super) fn on_spliced(&mut self, bytes: u32, window: u32) {
        self.small = if bytes < SMALL { self.small + 1 } else { 0 };
        if self.small == SMALL_MOVES {
            self.rest(window);
        }
    }

    /// It is copied for a while, whatever it brings.
    pub(super) fn rest(&mut self, window: u32) {
        *self = Self { window: window.wrapping_add(REST), ..Self::default() };
    }

    /// Whether to move it by pipe.
    pub(super) fn is_on(self) -> bool {
        self.on
    }
}

/// A pipe with what is on its way to a socket.
#[derive(Debug)]
pub(super) struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
    bytes: u32,
}

impl Pipe {
    /// Moves what has arrived at a socket into the pipe, which must be empty. No bytes, and even an
    /// error, may stand for an urgent mark with more behind it: only an ordinary receive can tell.
    pub(super) fn fill(&mut self, from: impl AsFd) -> Result<u32, Errno> {
        debug_assert!(self.is_empty(), "else EAGAIN might speak of the pipe");
        let count = splice(from, None, &self.writer, None, PIPE_SIZE, flags())? as u32;
        self.bytes += count;
        Ok(count)
    }

    /// Moves as much on into a socket as that takes.
    pub(super) fn drain(&mut self, to: impl AsFd) -> Result<u32, Errno> {
        let count = splice(&self.reader, None, to, None, self.bytes as usize, flags())? as u32;
        self.bytes -= count;
        Ok(count)
    }

    /// How much is in it.
    pub(super) fn bytes(&self) -> u32 {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

fn flags() -> SpliceFlags {
    SpliceFlags::MOVE | SpliceFlags::NONBLOCK
}

/// Whether an error of [`Pipe::fill`] says that this socket cannot be spliced, or that nothing can
/// be here: a filter of system calls may forbid it.
pub(super) fn is_refused(errno: Errno) -> bool {
    matches!(errno, Errno::PERM | Errno::ACCESS | Errno::NOSYS | Errno::INVAL | Errno::NOMEM)
}

/// The pipes of one worker. A stream holds one only while there is something in it, so few are
/// enough; who finds none copies.
#[derive(Debug)]
pub(super) struct Pipes {
    free: Vec<Pipe>,
    /// How many more may be made…
    unmade: usize,
    /// …and from when on, after a failure.
    make_at: Option<Instant>,
    failures: u64,
}

impl Pipes {
    pub(super) fn new() -> Self {
        Self { free: Vec::with_capacity(PIPES_MAX), unmade: PIPES_MAX, make_at: None, failures: 0 }
    }

    /// Whether the next [`Pipes::take`] may find one.
    pub(super) fn any(&self, now: Instant) -> bool {
        !self.free.is_empty() || self.can_make(now)
    }

    fn can_make(&self, now: Instant) -> bool {
        self.unmade > 0 && self.make_at.is_none_or(|at| now >= at)
    }

    /// An empty pipe.
    pub(super) fn take(&mut self, now: Instant) -> Option<Pipe> {
        if let Some(pipe) = self.free.pop() {
            return Some(pipe);
        }
        if !self.can_make(now) {
            return None;
        }
        let Ok((reader, writer)) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK) else {
            self.on_failure(now);
            return None;
        };
        self.unmade -= 1;
        // Where the user's pipes already hold all the memory they may, it stays small, and works.
        let _ = fcntl_setpipe_size(&writer, PIPE_SIZE);
        Some(Pipe { reader, writer, bytes: 0 })
    }

    /// Takes a pipe back. What is left in it is dropped, and so is the pipe.
    pub(super) fn give(&mut self, pipe: Pipe) {
        if pipe.is_empty() {
            self.free.push(pipe);
        } else {
            self.unmade += 1;
        }
    }

    /// The kernel refused to move bulk by pipe. For a while everything is copied.
    pub(super) fn on_refused(&mut self, now: Instant) {
        self.unmade += self.free.len();
        self.free.clear();
        self.on_failure(now);
    }

    fn on_failure(&mut self, now: Instant) {
        self.failures += 1;
        self.make_at = Some(now + RETRY_AFTER);
    }

    /// Failures so far.
    pub(super) fn failures(&self) -> u64 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_bulk_by_what_it_brings_at_a_time_until_moves_stay_small() {
        let mut bulk = Bulk::default();
        for window in [u32::MAX, 0, 1] {
            bulk.on_received(WINDOW_BYTES - 1, window);
            assert!(!bulk.is_on(), "the bytes of one window alone count");
        }
        bulk.on_received(1, 1);
        for small in [SMALL_MOVES - 1, SMALL_MOVES] {
            assert!(bulk.is_on());
            bulk.on_spliced(SMALL, 2);
            (0..small).for_each(|_| bulk.on_spliced(SMALL - 1, 2));
        }
        assert!(!bulk.is_on());
        bulk.on_received(WINDOW_BYTES, 2 + REST - 1);
        assert!(!bulk.is_on(), "it rests");
        bulk.on_received(WINDOW_BYTES, 2 + REST);
        assert!(bulk.is_on());
    }

    #[test]
    fn a_stream_becomes_bulk_however_old_the_worker_or_its_last_bytes_are() {
        for window in [1, REST + 1, 1 << 31, (1 << 31) + 1, u32::MAX - REST] {
            let mut new = Bulk::default();
            new.on_received(WINDOW_BYTES, window);
            assert!(new.is_on(), "a new stream in window {window}");
            let mut quiet = Bulk::default();
            quiet.on_received(1, 7);
            quiet.on_received(WINDOW_BYTES, window.wrapping_add(7));
            assert!(quiet.is_on(), "after {window} windows of silence");
        }
        let start = Instant::now();
        let days = |days: u64| start + Duration::from_secs(days * 24 * 60 * 60);
        assert_eq!(window(start, days(1)), 21_600_000);
        assert_eq!(window(start, days(199)), (199_u64 * 21_600_000 - (1 << 32)) as u32);
    }

    #[test]
    fn pipes_are_bounded_and_used_again_only_when_empty() {
        let now = Instant::now();
        let mut pipes = Pipes::new();
        let mut taken: Vec<_> = std::iter::from_fn(|| pipes.take(now)).collect();
        assert_eq!(taken.len(), PIPES_MAX);
        assert!(!pipes.any(now));
        let mut dirty = taken.pop().unwrap();
        dirty.bytes = 1;
        pipes.give(dirty);
        assert!(pipes.take(now).is_some_and(|pipe| pipe.is_empty()), "a new one");
        assert!(!pipes.any(now));
        pipes.give(taken.pop().unwrap());
        assert!(pipes.take(now).is_some() && pipes.take(now).is_none());
        assert_eq!(pipes.failures(), 0, "none was refused");
    }

    #[test]
    fn pipes_are_made_again_a_while_after_a_refusal() {
        let now = Instant::now();
        let mut pipes = Pipes::new();
        let (used, unused) = (pipes.take(now).unwrap(), pipes.take(now).unwrap());
        pipes.give(unused);
        pipes.on_refused(now);
        assert!(!pipes.any(now) && pipes.take(now).is_none());
        assert_eq!(pipes.failures(), 1);
        pipes.give(used);
        assert!(pipes.any(now), "one in use stays in use");
        let later = now + RETRY_AFTER;
        let all = std::iter::from_fn(|| pipes.take(later)).count();
        assert_eq!(all, PIPES_MAX);
    }
}
