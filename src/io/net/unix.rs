//! What Unix sockets alone have: credentials, and a listening socket that all workers share.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::Shutdown;
use socket2::SockRef;

use super::option::set_int;

/// Who is at the other end of a Unix socket, as of the moment when it connected, or began to listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credentials {
    /// The process; 0 where it is not of this PID namespace.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, uid, gid } = self;
        write!(f, "pid {pid}, uid {uid}, gid {gid}")
    }
}

/// Who is at the other end (`SO_PEERCRED`).
pub fn credentials(socket: &impl AsFd) -> Option<Credentials> {
    let fd = socket.as_fd().as_raw_fd();
    let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of_val(&found) as libc::socklen_t;
    let (level, name, at) = (libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut found).cast());
    // SAFETY: the kernel writes at most `len` bytes, which is how many there are.
    let code = unsafe { libc::getsockopt(fd, level, name, at, &raw mut len) };
    let libc::ucred { pid, uid, gid } = found;
    (code == 0).then_some(Credentials { pid: pid.unsigned_abs(), uid, gid })
}

/// `<asm-generic/socket.h>`; the `libc` crate lacks it.
const SO_PASSRIGHTS: libc::c_int = 83;

/// Has a socket's peers, or those of a listening one, send no descriptors (`SCM_RIGHTS`): `sendmsg`
/// fails with `EPERM`. What is received and not wanted would be closed by the thread that receives,
/// which a peer can make last for as long as it likes (`SO_LINGER` of a TCP socket with bytes unsent).
///
/// # Errors
/// Linux before 6.16 cannot do that.
pub fn refuse_descriptors(socket: &impl AsFd) -> io::Result<()> {
    set_int(socket, libc::SOL_SOCKET, SO_PASSRIGHTS, 0)
}

/// Whether this process is at the other end, and bound that end to `path`. The path alone would not
/// do: in another mount namespace somebody else may have bound the same one.
pub(super) fn leads_back_to(socket: &impl AsFd, path: &Path) -> bool {
    let address = SockRef::from(socket).peer_addr();
    address.is_ok_and(|address| address.as_pathname() == Some(path))
        && credentials(socket).is_some_and(|peer| peer.pid == std::process::id())
}

/// Has a listening socket refuse who connects from now on. Who waits in its queue is still accepted,
/// by whichever worker comes first, and behind the last one `accept` says `EINVAL`.
///
/// # Errors
/// The kernel cannot do that.
pub(super) fn refuse_connects(listener: &impl AsFd) -> Result<(), Errno> {
    rustix::net::shutdown(listener, Shutdown::Read)
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};
    use std::mem::MaybeUninit;
    use std::os::unix::net::UnixStream;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;
    use crate::io::net::{Stream, Transport};

    fn send_with_descriptor(stream: &UnixStream, bytes: &[u8]) -> Result<usize, Errno> {
        let fds = [stream.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty())
    }

    #[test]
    fn a_receive_that_stops_at_descriptors_says_so() {
        let (mut client, server) = UnixStream::pair().unwrap();
        // As on a kernel that cannot refuse them.
        let (fd, transport) = (server.into(), Transport::Unix);
        let stream = Stream { fd, transport, takes_descriptors: true };
        assert_eq!(send_with_descriptor(&client, b"first"), Ok(5));
        client.write_all(b"second").unwrap();
        let mut space = [0; 100];
        assert_eq!(stream.receive(&mut space), Ok((5, true)));
        assert_eq!(stream.receive(&mut space), Ok((6, false)));
        drop(client);
        assert_eq!(stream.receive(&mut space), Ok((0, false)));
    }

    #[test]
    fn descriptors_are_refused_where_the_kernel_can() {
        let (client, server) = UnixStream::pair().unwrap();
        if refuse_descriptors(&server).is_ok() {
            assert_eq!(send_with_descriptor(&client, b"first"), Err(Errno::PERM));
        }
    }
}
