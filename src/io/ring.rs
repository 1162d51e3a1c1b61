//! The rings: handing submissions over, waiting, taking completions.
//!
//! What a submission points to besides buffers (addresses, message headers) lives here until the
//! kernel has taken the submission, which then holds a copy.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::ptr::{self, NonNull};
use std::time::{Duration, Instant};

use io_uring::squeue::{self, Flags};
use io_uring::types::{CancelBuilder, Fd, Timespec};
use io_uring::{EnterFlags, IoUring, cqueue, opcode};
use rustix::io::Errno;
use socket2::SockAddr;

use super::probe::{self, Features};
use crate::fifo;

/// Submissions between two system calls; more than that are handed over in between.
const SQ_ENTRIES: u32 = 1024;
/// Completions that fit before the kernel has to queue them aside.
const CQ_ENTRIES: u32 = 8192;
/// Buffers that one send takes at most.
const SEND_PARTS_MAX: usize = 8;

/// What each send is submitted with: it completes as it is taken, and a part of it is a failure.
pub(super) const SEND_FLAGS: i32 = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT | libc::MSG_WAITALL;

/// A message header and the parts that it points to.
type Header = (libc::msghdr, [libc::iovec; SEND_PARTS_MAX]);

/// The limits of a wait, `io_uring_getevents_arg` in the kernel.
#[repr(C)]
struct WaitLimits {
    /// A set of signals to let through, none here.
    signals: u64,
    signals_len: u32,
    /// Microseconds for which the wait is for all events.
    least_usec: u32,
    /// The address of the time after which it is for none.
    most: u64,
}

/// An `io_uring` instance with what its pending submissions need.
pub(super) struct Ring {
    uring: IoUring,
    features: Features,
    completions: VecDeque<cqueue::Entry>,
    /// As many as submissions can be pending, so that each can have one.
    addresses: Box<[Option<SockAddr>]>,
    addresses_used: usize,
    headers: Box<[Header]>,
    headers_used: usize,
    /// When the timer fires that the kernel holds, if it holds one.
    timer: Option<Instant>,
    timer_delay: Box<Timespec>,
    /// After the latest system call no submission was left, and no completion waited aside.
    told_all: bool,
    /// What the kernel refused for good; the next wait reports it.
    failure: Option<io::Error>,
}

impl Ring {
    /// Sets the rings up.
    ///
    /// # Errors
    /// The kernel denies them.
    pub(super) fn new(features: Features) -> io::Result<Self> {
        let part = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };
        let header = libc::msghdr {
            msg_name: ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: ptr::null_mut(),
            msg_iovlen: 0,
            msg_control: ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        Ok(Self {
            uring: probe::build_ring(features, SQ_ENTRIES, CQ_ENTRIES)?,
            features,
            completions: VecDeque::with_capacity(2 * CQ_ENTRIES as usize),
            addresses: (0..SQ_ENTRIES).map(|_| None).collect(),
            addresses_used: 0,
            headers: vec![(header, [part; SEND_PARTS_MAX]); SQ_ENTRIES as usize].into(),
            headers_used: 0,
            timer: None,
            timer_delay: Box::default(),
            told_all: true,
            failure: None,
        })
    }

    /// The instance, to register things with.
    pub(super) fn uring(&self) -> &IoUring {
        &self.uring
    }

    /// Queues a submission.
    ///
    /// # Safety
    /// All memory that the entry points to stays as it is until the operation has completed.
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry) {
        self.make_room();
        // SAFETY: as the caller promised.
        unsafe { self.push_into_room(entry) }
    }

    /// Queues a submission for which [`Ring::make_room`] has been called. Nothing is handed over
    /// in between, so what it uses of the tables stays its own until then.
    ///
    /// # Safety
    /// As for [`Ring::push`], or until the submission is taken for what the kernel copies.
    unsafe fn push_into_room(&mut self, entry: &squeue::Entry) {
        // SAFETY: as the caller promised. The push fails only after a failure that the next wait
        // reports, and then nothing matters any more.
        let _ = unsafe { self.uring.submission().push(entry) };
    }

    /// Queues an operation on a descriptor alone, whose success is of no interest.
    pub(super) fn forget(&mut self, entry: squeue::Entry, data: u64) {
        // SAFETY: cancels and closes point to no memory.
        unsafe { self.push(&entry.flags(Flags::SKIP_SUCCESS).user_data(data)) }
    }

    /// Queues a connect.
    pub(super) fn connect(&mut self, fd: Fd, address: SockAddr, data: u64) {
        self.make_room();
        // There is room, except after a failure that the next wait reports.
        let Some(slot) = self.addresses.get_mut(self.addresses_used) else { return };
        self.addresses_used += 1;
        let address = slot.insert(address);
        let connect = opcode::Connect::new(fd, address.as_ptr().cast(), address.len()).build();
        // SAFETY: the address stays as it is until the submission is taken, which copies it.
        unsafe { self.push_into_room(&connect.user_data(data)) }
    }

    /// Queues a send of several buffers, whose success is of no interest. Says how many bytes it has.
    ///
    /// # Safety
    /// The parts stay as they are until the operation has completed.
    pub(super) unsafe fn send_parts(
        &mut self,
        fd: Fd,
        parts: impl Iterator<Item = (NonNull<u8>, usize)>,
        data: u64,
    ) -> u32 {
        self.make_room();
        // As for a connect.
        let Some((header, slots)) = self.headers.get_mut(self.headers_used) else { return 0 };
        self.headers_used += 1;
        let (mut count, mut bytes) = (0, 0);
        for ((at, len), slot) in parts.zip(slots.iter_mut()) {
            *slot = libc::iovec { iov_base: at.as_ptr().cast(), iov_len: len };
            count += 1;
            bytes += len as u32;
        }
        header.msg_iov = slots.as_mut_ptr();
        header.msg_iovlen = count;
        let send = opcode::SendMsg::new(fd, header).flags(SEND_FLAGS as u32).build();
        // SAFETY: as for a connect; the caller vouches for the parts.
        unsafe { self.push_into_room(&send.flags(Flags::SKIP_SUCCESS).user_data(data)) }
        bytes
    }

    /// Hands over until the next push finds room in the queue and in the tables beside it.
    fn make_room(&mut self) {
        while self.failure.is_none()
            && (self.uring.submission().is_full()
                || self.addresses_used == self.addresses.len()
                || self.headers_used == self.headers.len())
        {
            self.submit();
        }
    }

    /// Hands everything over without waiting, and takes what has completed.
    pub(super) fn submit(&mut self) {
        let outcome = self.uring.submit().map(drop);
        self.after_submit(outcome);
    }

    /// Makes sure that a completion with the user data `data` comes after `delay` at the latest,
    /// unless one is on its way already. [`Ring::on_timer`] is to be called for each.
    ///
    /// A timer that stands costs nothing a turn; a limit given to each wait would set and clear
    /// one of the kernel's every time.
    pub(super) fn wake_after(&mut self, now: Instant, delay: Duration, data: u64) {
        let at = now + delay;
        if self.timer.is_some_and(|armed| armed <= at) {
            return;
        }
        self.make_room();
        *self.timer_delay = Timespec::from(delay);
        let delay: *const Timespec = &raw const *self.timer_delay;
        let entry = match self.timer.replace(at) {
            None => opcode::Timeout::new(delay).build().user_data(data),
            // If it has just fired, this finds nothing, and the next wait sets another.
            Some(_) => opcode::TimeoutUpdate::new(data, delay).build().flags(Flags::SKIP_SUCCESS),
        };
        // SAFETY: the delay stays where it is; the kernel copies it as it takes the submission.
        unsafe { self.push_into_room(&entry) }
    }

    /// The timer has fired.
    pub(super) fn on_timer(&mut self) {
        self.timer = None;
    }

    /// Hands over what there is, and says whether something has completed by then.
    ///
    /// Falling asleep and being woken takes longer than many an answer. Handed over apart from the
    /// wait, a request has the time of one system call for its answer to come.
    pub(super) fn submit_and_look(&mut self) -> bool {
        if self.uring.submission().is_empty() {
            return false;
        }
        let outcome = self.enter(0, None);
        self.after_submit(outcome);
        !self.completions.is_empty() || self.failure.is_some()
    }

    /// Hands everything over, waits for `events` completions, but after `batch` for one, and, if
    /// it batches, after `most` for none; and takes what has completed.
    pub(super) fn submit_and_wait(&mut self, events: u32, batch: Duration, most: Duration) {
        let outcome = self.wait(events, batch.min(most), most);
        let is_interrupted =
            outcome.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Interrupted);
        self.after_submit(outcome);
        if is_interrupted {
            // By a stop, maybe long ago: what has come since is not told yet.
            self.take_all();
        }
    }

    /// Takes all that has completed by now. Of what is left to be done for that when a ring is asked, the
    /// kernel does (since 6.14) no more than for as many completions as are waited for, or for 20.
    pub(super) fn take_all(&mut self) {
        let outcome = self.enter(CQ_ENTRIES, Some((Duration::ZERO, Duration::ZERO)));
        self.after_submit(outcome);
    }

    fn wait(&mut self, events: u32, batch: Duration, most: Duration) -> io::Result<()> {
        if events == 1 {
            return self.enter(1, None);
        }
        if self.features.min_wait {
            // Without the second limit the kernel would come back empty-handed at the first.
            return self.enter(events, Some((batch, most)));
        }
        // Before kernel 6.12: first for the batch, then for a single event.
        match self.enter(events, Some((Duration::ZERO, batch))) {
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => self.enter(1, None),
            outcome => outcome,
        }
    }

    /// Hands everything over and waits for `events` completions; if there are limits, only for one
    /// after the first of them, unless that is zero, and for none after the second.
    fn enter(&mut self, events: u32, limits: Option<(Duration, Duration)>) -> io::Result<()> {
        let mut flags = EnterFlags::GETEVENTS;
        if self.features.no_iowait {
            // Else the node's metrics take an idle worker for one that waits for a disk.
            flags |= EnterFlags::NO_IOWAIT;
        }
        let most = limits.map(|(_, most)| Timespec::from(most));
        let limits = limits.zip(most.as_ref()).map(|((least, _), most)| WaitLimits {
            signals: 0,
            signals_len: 0,
            least_usec: least.as_micros() as u32,
            most: ptr::from_ref(most).expose_provenance() as u64,
        });
        if limits.is_some() {
            flags |= EnterFlags::EXT_ARG;
        }
        let submissions = self.uring.submission().len() as u32;
        // SAFETY: what the submissions point to was vouched for as they were pushed; the limits
        // and the time that they point to outlive the call.
        let outcome = unsafe {
            self.uring.submitter().enter(submissions, events, flags.bits(), limits.as_ref())
        };
        outcome.map(drop)
    }

    fn after_submit(&mut self, outcome: io::Result<()>) {
        self.completions.extend(self.uring.completion());
        let submissions = self.uring.submission();
        self.told_all = submissions.is_empty() && !submissions.cq_overflow();
        if submissions.is_empty() {
            self.headers_used = 0;
            self.addresses_used = 0;
        }
        drop(submissions);
        if let Err(error) = outcome {
            match error.raw_os_error() {
                // Time is up; a signal came; or completions had to be taken first, as was done.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                _ => self.failure = Some(error),
            }
        }
    }

    /// Takes completions that are there without a system call, and says whether there are any.
    pub(super) fn has_completions(&mut self) -> bool {
        self.completions.extend(self.uring.completion());
        !self.completions.is_empty()
    }

    /// All completions that there are, unless some wait aside and cannot be had at once.
    pub(super) fn taken(&mut self) -> impl Iterator<Item = &cqueue::Entry> {
        if self.uring.submission().cq_overflow() {
            self.submit();
        }
        self.has_completions();
        self.completions.iter()
    }

    /// Whether so many completions were taken.
    pub(super) fn has(&self, events: u32) -> bool {
        self.completions.len() >= events as usize
    }

    /// Whether the kernel has taken all submissions, and reported in the completions taken so far how
    /// those that complete at once went.
    pub(super) fn has_told_all(&self) -> bool {
        self.told_all
    }

    /// The next completion taken.
    pub(super) fn pop(&mut self) -> Option<cqueue::Entry> {
        fifo::pop(&mut self.completions)
    }

    /// What the kernel refused for good, if anything.
    pub(super) fn take_failure(&mut self) -> Option<io::Error> {
        self.failure.take()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // What was asked for last, such as closes, still goes out. Then everything is cancelled:
        // closing the ring alone would do that some time later, when the buffers may be gone.
        let _ = self.uring.submit();
        let patience = Timespec::from(Duration::from_secs(1));
        let _ = self.uring.submitter().register_sync_cancel(Some(patience), CancelBuilder::any());
    }
}

/// The result of a completion: a count or descriptor, or the error.
pub(super) fn result(entry: &io_uring::cqueue::Entry) -> Result<u32, Errno> {
    u32::try_from(entry.result()).map_err(|_| Errno::from_raw_os_error(-entry.result()))
}
