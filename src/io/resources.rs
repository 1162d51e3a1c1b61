//! Limits of resources, as the kernel tells them.
//!
//! Not by `rustix`, which takes the call for one that cannot fail: where a filter of system calls denies
//! it, as that of a service manager may, it returns what was never written.

#![allow(unsafe_code)]

use std::io;

/// A limit of this process.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Limit {
    /// `RLIMIT_NOFILE`.
    Descriptors,
    /// `RLIMIT_MEMLOCK`, in bytes.
    LockedMemory,
}

impl Limit {
    /// The soft one and the hard one; `u64::MAX` where there is none.
    ///
    /// # Errors
    /// The kernel, or a filter, denies it.
    pub(crate) fn of_this_process(self) -> io::Result<[u64; 2]> {
        let resource = match self {
            Self::Descriptors => libc::RLIMIT_NOFILE,
            Self::LockedMemory => libc::RLIMIT_MEMLOCK,
        };
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the kernel writes a `struct rlimit`, which is what there is room for.
        let code = unsafe { libc::getrlimit(resource, &raw mut limit) };
        if code == 0 {
            Ok([limit.rlim_cur, limit.rlim_max])
        } else {
            Err(io::Error::last_os_error())
        }
    }
}
