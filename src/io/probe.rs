//! Whether `io_uring` works here, found by trying.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};
use rustix::io::Errno;
use rustix::net::SocketAddrUnix;
use socket2::{Domain, Socket, Type};

use super::buffers::Buffers;
use super::provided::ProvidedBuffers;
use super::restrictions;
use super::uring::Rings;

/// What may pass by itself is tried again for so long. The choice is for the life of the process, and
/// a start may well wait for that.
const SHORTAGE_MAX: Duration = Duration::from_secs(1);
/// The pause before each other try.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(20);

/// What of `io_uring` may be missing without ruling it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "a kernel has each or lacks it")]
pub struct Features {
    /// Rings that refuse what no worker asks of them. Only a filter can be in the way.
    pub restricted: bool,
    /// `DEFER_TASKRUN` (kernel 6.1): completions are run when we wait, not when they interrupt.
    pub defer_taskrun: bool,
    /// A minimum wait for batches in one system call (kernel 6.12).
    pub min_wait: bool,
    /// Waits that the node's metrics do not take for waits for a disk (kernel 6.15).
    pub no_iowait: bool,
}

/// The driver to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverKind {
    /// `io_uring` with these features.
    Uring(Features),
    /// epoll.
    Epoll,
}

impl DriverKind {
    /// The name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uring(_) => "io_uring",
            Self::Epoll => "epoll",
        }
    }
}

/// Why `io_uring` cannot be used here.
#[derive(Debug, thiserror::Error)]
#[error("{step} failed: {error}{hint}")]
pub struct Denied {
    step: &'static str,
    error: io::Error,
    hint: Hint,
}

impl Denied {
    /// Whether the reason may be gone in a moment: something is short, or the machine is slow.
    fn may_pass(&self) -> bool {
        matches!(
            Errno::from_io_error(&self.error),
            Some(
                Errno::AGAIN
                    | Errno::INTR
                    | Errno::MFILE
                    | Errno::NFILE
                    | Errno::NOBUFS
                    | Errno::NOMEM
                    | Errno::TIME
                    | Errno::ADDRINUSE
                    | Errno::ADDRNOTAVAIL
            )
        ) || self.error.kind() == io::ErrorKind::TimedOut
    }
}

/// Where a refusal probably comes from.
#[derive(Debug)]
struct Hint(Option<String>);

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |hint| write!(f, " ({hint})"))
    }
}

/// Tries whether `io_uring` works here, and with which features.
///
/// # Errors
/// The kernel denies it.
pub fn uring() -> Result<Features, Denied> {
    patiently(SHORTAGE_MAX, probe_uring)
}

/// Sets up a ring with what `features` names, to be enabled by [`enable_ring`] once all is registered.
pub(super) fn build_ring(features: Features, sq: u32, cq: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder
        .setup_cqsize(cq)
        // Large rings are made smaller rather than refused.
        .setup_clamp()
        // One bad submission does not hold up those behind it.
        .setup_submit_all()
        // Only the worker's thread submits, which spares the kernel its locks.
        .setup_single_issuer();
    if features.defer_taskrun {
        builder.setup_defer_taskrun();
    } else {
        builder.setup_coop_taskrun();
    }
    if features.restricted {
        // Else there would be a time before the restrictions.
        builder.setup_r_disabled();
    }
    builder.build(sq)
}

/// Makes a ring ready for submissions, by this thread only.
pub(super) fn enable_ring(uring: &IoUring, features: Features) -> io::Result<()> {
    if features.restricted { restrictions::enable_restricted(uring) } else { Ok(()) }
}

/// Sets up what a worker's driver needs of the kernel, on the worker's own thread. A probe needs less,
/// and what a predecessor has had is free only some time after its end.
///
/// # Errors
/// The kernel denies it.
pub fn set_up(features: Features) -> Result<Rings, Denied> {
    patiently(SHORTAGE_MAX, || {
        Rings::new(features).map_err(|error| denied("setting up a worker's ring", error))
    })
}

/// Tries until it works, fails for a reason that stays, or time is up.
fn patiently<T>(
    max: Duration,
    mut attempt: impl FnMut() -> Result<T, Denied>,
) -> Result<T, Denied> {
    let begun = Instant::now();
    loop {
        match attempt() {
            Err(denied) if denied.may_pass() && begun.elapsed() < max => {
                std::thread::sleep(SHORTAGE_PAUSE);
            }
            outcome => return outcome,
        }
    }
}

/// Tries a restricted ring first.
fn probe_uring() -> Result<Features, Denied> {
    match probe_ring(true) {
        Err(denied) if !denied.may_pass() => probe_ring(false),
        outcome => outcome,
    }
}

/// Sets a real ring up and moves a byte over it with every operation that cannot be done without.
fn probe_ring(restricted: bool) -> Result<Features, Denied> {
    let mut features =
        Features { restricted, defer_taskrun: true, min_wait: false, no_iowait: false };
    let ring = match build_ring(features, 8, 16) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            features.defer_taskrun = false;
            build_ring(features, 8, 16)
        }
        outcome => outcome,
    };
    let ring = ring.map_err(|error| denied("setting up a ring", error))?;
    features.min_wait = ring.params().is_feature_min_timeout();
    features.no_iowait = ring.params().is_feature_no_iowait();
    if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_submit_stable() {
        return Err(denied("setting up a ring", io::ErrorKind::Unsupported.into()));
    }
    let mut buffers = Buffers::new(8).map_err(|error| denied("mapping buffers", error))?;
    let mut provided = ProvidedBuffers::register(&ring)
        .map_err(|error| denied("registering a ring of buffers", error))?;
    provided.refill(&mut buffers, false);
    enable_ring(&ring, features).map_err(|error| denied("restricting a ring", error))?;
    connect_and_receive(ring)
        .map_err(|error| denied("a connect and a multishot accept and receive", error))?;
    Ok(features)
}

/// Connects, accepts, sends a byte and receives it, accept and receive multishot.
///
/// Over a Unix socket, whose name the kernel chooses: the operations are the same for all sockets,
/// and this one needs neither a free port nor a loopback interface that is up.
fn connect_and_receive(mut ring: IoUring) -> io::Result<()> {
    let listener = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new_unnamed())?;
    listener.listen(1)?;
    let client = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    let address = listener.local_addr()?;
    let at = address.as_ptr().cast();
    let connect = opcode::Connect::new(Fd(client.as_raw_fd()), at, address.len()).build();
    run(&mut ring, &connect)?;
    let accept = opcode::AcceptMulti::new(Fd(listener.as_raw_fd())).build();
    let accepted = run(&mut ring, &accept)?;
    // SAFETY: the kernel gave this descriptor to us alone.
    let server = unsafe { OwnedFd::from_raw_fd(accepted.result()) };
    let byte = b"x";
    run(&mut ring, &opcode::Send::new(Fd(client.as_raw_fd()), byte.as_ptr(), 1).build())?;
    let receive = opcode::RecvMulti::new(Fd(server.as_raw_fd()), ProvidedBuffers::GROUP).build();
    let received = run(&mut ring, &receive)?;
    let multishot = cqueue::more(accepted.flags()) && cqueue::more(received.flags());
    let buffered = cqueue::buffer_select(received.flags()).is_some() && received.result() == 1;
    if multishot && buffered { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

fn run(ring: &mut IoUring, entry: &io_uring::squeue::Entry) -> io::Result<cqueue::Entry> {
    // SAFETY: the kernel copies an address as it takes the entry, and the byte to send is static.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    let second = Timespec::from(Duration::from_secs(1));
    ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&second))?;
    let completion = ring.completion().next().ok_or(io::ErrorKind::TimedOut)?;
    if completion.result() < 0 {
        return Err(io::Error::from_raw_os_error(-completion.result()));
    }
    Ok(completion)
}

fn denied(step: &'static str, error: io::Error) -> Denied {
    let hint = match error.raw_os_error() {
        Some(libc::EPERM) => Some(match (disabled_by_sysctl(), filtered()) {
            (Some(value), _) => format!("the node's sysctl kernel.io_uring_disabled is {value}"),
            (None, true) => "a seccomp profile denies it".to_owned(),
            (None, false) => "a security module may deny it".to_owned(),
        }),
        Some(libc::ENOSYS) if filtered() => Some("a seccomp profile hides it".to_owned()),
        Some(libc::ENOSYS) => Some("the kernel is built without it".to_owned()),
        Some(libc::EINVAL) => Some("the kernel is older than 6.0".to_owned()),
        // From kernel 6.14 on.
        Some(libc::ENOMEM) => Some(
            "memory is short, or RLIMIT_MEMLOCK, which is for the rings of all processes of this \
             user on the node"
                .to_owned(),
        ),
        _ => None,
    };
    Denied { step, error, hint: Hint(hint) }
}

fn disabled_by_sysctl() -> Option<u32> {
    let text = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?;
    text.trim().parse().ok().filter(|&value| value != 0)
}

/// Whether a seccomp filter is in force for this thread.
fn filtered() -> bool {
    std::fs::read_to_string("/proc/thread-self/status").is_ok_and(|status| {
        status
            .lines()
            .any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_is_waited_out_and_a_refusal_is_final() {
        let outcome = |errnos: &[i32], max| {
            let mut left = errnos.iter();
            let mut tries = 0;
            let result = patiently(max, || {
                tries += 1;
                left.next().map_or(Ok(()), |&errno| {
                    Err(denied("a step", io::Error::from_raw_os_error(errno)))
                })
            });
            (result.is_ok(), tries)
        };
        let long = Duration::from_secs(3600);
        assert_eq!(outcome(&[libc::ENFILE, libc::EMFILE, libc::ETIME], long), (true, 4));
        assert_eq!(outcome(&[libc::ENFILE, libc::EPERM, libc::ENFILE], long), (false, 2));
        assert_eq!(outcome(&[libc::ENOSYS], long), (false, 1));
        assert_eq!(outcome(&[libc::ENFILE], Duration::ZERO), (false, 1));
    }
}
