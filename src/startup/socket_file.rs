//! The file of a Unix socket that this process listens on: made, put in the place of a stale one, and
//! removed at the end.
//!
//! Whether a file is stale is found out by connecting to it. From that on until the new one listens,
//! and while it is removed, its directory is locked (`flock`): of two processes of this program that
//! start at a time one finds the other listening. Programs that do not take the lock are noticed as
//! well, except where one begins to listen between two system calls.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::{SocketMode, SocketOwner};
use crate::io::net::refuse_descriptors;
use crate::limits::LISTEN_BACKLOG;

/// Whoever may read a directory may lock it, and holds nobody up for longer than this.
const LOCK_MAX: Duration = Duration::from_secs(1);
/// The pause before each other try.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Who may connect to the sockets.
#[derive(Debug, Clone, Copy)]
pub struct Access {
    /// The mode of their files.
    pub mode: SocketMode,
    /// The owner of their files, if it is not to be as it comes.
    pub owner: Option<SocketOwner>,
}

/// The file of a socket that listens. Removed when dropped, unless somebody has put another one in its
/// place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// As long as it is open, no other file gets its number.
    inode: File,
}

/// Binds a socket to `path` and listens. Nobody can connect before its mode and owner are set.
///
/// # Errors
/// `AddrInUse`: somebody listens there. Otherwise the message says what is in the way.
pub(super) fn listen(path: &Path, access: Access) -> io::Result<(Socket, SocketFile)> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let _lock = lock(directory)?;
    make_room(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Before anybody can send some. Older kernels cannot do it.
    let _ = refuse_descriptors(&socket);
    socket.bind(&SockAddr::unix(path)?).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => {
            explained(&error, format!("this user may not create files in {}", directory.display()))
        }
        _ => error,
    })?;
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    let inode = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let file = SocketFile { path: path.to_owned(), inode };
    file.grant(access)?;
    socket.listen(LISTEN_BACKLOG)?;
    Ok((socket, file))
}

impl SocketFile {
    fn grant(&self, Access { mode, owner }: Access) -> io::Result<()> {
        // Not by the path, where by now there may be something else.
        let this = format!("/proc/self/fd/{}", self.inode.as_raw_fd());
        if let Some(SocketOwner { uid, gid }) = owner {
            chown(&this, uid, gid).map_err(|error| {
                explained(&error, "its owner cannot be set as AEGIS_SOCKET_OWNER says")
            })?;
        }
        // Last, since a new owner may take bits away.
        fs::set_permissions(&this, fs::Permissions::from_mode(mode.bits()))
            .map_err(|error| explained(&error, "its mode cannot be set"))
    }

    /// Whether it is still what its path leads to.
    fn is_in_place(&self) -> io::Result<bool> {
        let (there, this) = (fs::symlink_metadata(&self.path)?, self.inode.metadata()?);
        Ok((there.dev(), there.ino()) == (this.dev(), this.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Without the lock somebody who starts at this moment might lose its file.
        let _lock = self.path.parent().map(lock);
        if self.is_in_place().unwrap_or(false)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the socket's file is not removed");
        }
    }
}

/// Locks a directory until the file is dropped. None where somebody else holds the lock for too long.
fn lock(directory: &Path) -> io::Result<Option<File>> {
    let file = File::open(directory).map_err(|error| {
        let directory = directory.display();
        match error.kind() {
            ErrorKind::NotFound => explained(
                &error,
                format!("there is no directory {directory}; create it, or mount a volume there"),
            ),
            _ => explained(&error, format!("the directory {directory} cannot be opened")),
        }
    })?;
    let begun = Instant::now();
    while begun.elapsed() < LOCK_MAX {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_PAUSE),
            // Some file systems have no locks.
            Err(TryLockError::Error(_)) => return Ok(None),
        }
    }
    tracing::warn!(directory = %directory.display(), "locked by another program: going on without");
    Ok(None)
}

/// Removes a stale socket from `path`. Nobody listens there, and nothing else is there, if it returns.
fn make_room(path: &Path) -> io::Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Ok(found) => found.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !kind.is_socket() {
        let what = match () {
            () if kind.is_dir() => "a directory",
            () if kind.is_symlink() => "a symbolic link",
            () => "a file that is no socket",
        };
        let why = format!("{what} is in its place; remove it or choose another path");
        return Err(io::Error::new(ErrorKind::InvalidInput, why));
    }
    match probe(path) {
        // Also if the queue of its clients is full, or it is of another type.
        Ok(()) => Err(ErrorKind::AddrInUse.into()),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EPROTOTYPE) => Err(ErrorKind::AddrInUse.into()),
            Some(libc::ENOENT) => Ok(()),
            Some(libc::ECONNREFUSED) => fs::remove_file(path)
                .map_err(|error| explained(&error, "a stale socket cannot be removed")),
            _ => Err(explained(&error, "a socket is there, and whether it is in use is unknown")),
        },
    }
}

/// Connects, and leaves at once.
fn probe(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    socket.connect(&SockAddr::unix(path)?)
}

fn explained(error: &io::Error, what: impl std::fmt::Display) -> io::Error {
    io::Error::new(error.kind(), format!("{what} ({error})"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
    use std::sync::Barrier;

    use super::*;

    /// A directory of its own for a test, removed with all that is in it.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("aegis-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn file(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn access(mode: &str) -> Access {
        Access { mode: mode.parse().unwrap(), owner: None }
    }

    #[test]
    fn a_socket_has_its_mode_from_the_beginning_and_goes_with_its_file() {
        let directory = Directory::new("mode");
        let path = directory.file("db.sock");
        for mode in ["0660", "0600", "0777"] {
            let (_socket, file) = listen(&path, access(mode)).unwrap();
            let found = fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777;
            assert_eq!(format!("{found:04o}"), mode);
            UnixStream::connect(&path).unwrap();
            drop(file);
            assert!(!path.exists(), "it is removed");
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = Directory::new("stale");
        let path = directory.file("db.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (socket, file) = listen(&path, access("0660")).unwrap();
        let refused = listen(&path, access("0660")).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::AddrInUse);
        UnixStream::connect(&path).expect("the first one listens on");
        // It no longer listens, and its file is still there: a predecessor that ends.
        drop(socket);
        let (_successor, _its) = listen(&path, access("0660")).unwrap();
        drop(file);
        UnixStream::connect(&path).expect("the predecessor left the file of another alone");
    }

    #[test]
    fn what_is_no_socket_of_ours_to_replace_stays() {
        let directory = Directory::new("others");
        let [folder, file, link, datagrams] =
            ["folder", "file", "link", "datagrams"].map(|name| directory.file(name));
        fs::create_dir(&folder).unwrap();
        fs::write(&file, "precious").unwrap();
        symlink(&file, &link).unwrap();
        let _datagrams = UnixDatagram::bind(&datagrams).unwrap();
        for (path, what) in [
            (&folder, "a directory is in its place; remove it or choose another path"),
            (&file, "a file that is no socket is in its place; remove it or choose another path"),
            (&link, "a symbolic link is in its place; remove it or choose another path"),
            (&datagrams, "address in use"),
        ] {
            let error = listen(path, access("0660")).unwrap_err();
            assert_eq!(error.to_string(), what);
            assert!(path.exists());
        }
        let missing = directory.file("no/db.sock");
        let error = listen(&missing, access("0660")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let parent = directory.file("no");
        let what = format!("there is no directory {}; create it, or mount", parent.display());
        assert!(error.to_string().starts_with(&what), "{error}");
    }

    #[test]
    fn of_many_that_start_at_a_time_one_listens() {
        const MANY: usize = 8;
        let directory = Directory::new("race");
        let path = directory.file("db.sock");
        for round in 0..20 {
            if round % 2 == 0 {
                drop(UnixListener::bind(&path).unwrap());
            }
            let all = Barrier::new(MANY);
            let start = || {
                all.wait();
                listen(&path, access("0660"))
            };
            let outcomes: Vec<_> = thread::scope(|scope| {
                let started: Vec<_> = (0..MANY).map(|_| scope.spawn(start)).collect();
                started.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let (won, lost): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
            assert_eq!(won.len(), 1, "round {round}: {lost:?}");
            assert!(
                lost.iter()
                    .filter_map(|e| e.as_ref().err())
                    .all(|e| e.kind() == ErrorKind::AddrInUse)
            );
            UnixStream::connect(&path).expect("whoever listens has the file");
            drop(won);
            assert!(!path.exists());
        }
    }

    #[test]
    fn whoever_holds_the_lock_for_ever_holds_nobody_up() {
        let directory = Directory::new("locked");
        let held = File::open(&directory.0).unwrap();
        held.lock().unwrap();
        let path = directory.file("db.sock");
        let (_socket, _file) = listen(&path, access("0660")).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(held);
    }
}
