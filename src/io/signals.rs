//! Keeps signals from the threads of the workers, and one from the process.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::ptr;

/// Blocks all signals for this thread. While one pends for it, the kernel says at an urgent mark that
/// there is nothing to receive, though there is, and says no more until something else comes. Those
/// for the process are the main thread's, and what the thread brings on itself ends it all the same.
pub(crate) fn block_signals() {
    let mut all = MaybeUninit::uninit();
    // SAFETY: the set is filled before it is read, and the one before is not asked for.
    let outcome = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), ptr::null_mut())
    };
    debug_assert_eq!(outcome, 0, "there is such an operation");
}

/// Has a write fail with `EFBIG` that would make a file longer than it may be (`RLIMIT_FSIZE`), as one
/// fails for which the disk has no room. Unless somebody ignores SIGXFSZ it ends the process: by a line
/// of its log. Programs that this one starts ignore it as well.
pub fn ignore_file_size_signal() {
    // SAFETY: no handler is called.
    let before = unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    debug_assert_ne!(before, libc::SIG_ERR, "there is such a signal");
}
