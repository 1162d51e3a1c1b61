//! What peers over Unix sockets may do that those over TCP cannot.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::Signal;

use crate::support::backend::Backend;
use crate::support::proxy::{Builder, Proxy};
use crate::support::sandbox::hand_over;
use crate::support::{Io, PATIENCE, on_both_drivers};

on_both_drivers![descriptors_that_a_client_sends_stop_nothing];

/// A proxy with one worker that listens on a Unix socket, and its path.
fn start(io: Io, backend: &Backend) -> (tempfile::TempDir, PathBuf, Proxy) {
    let directory = tempfile::tempdir().unwrap();
    hand_over(directory.path());
    let path = directory.path().join("db.sock");
    let proxy = Builder::on(io)
        .set("AEGIS_LISTEN", format!("127.0.0.1:0,unix:{}", path.display()))
        .set("AEGIS_WORKERS", "1")
        .backends(&[backend.address()])
        .start();
    (directory, path, proxy)
}

fn connect(path: &PathBuf) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends bytes with a descriptor.
fn send_with_descriptor(stream: &UnixStream, bytes: &[u8]) -> Result<usize, Errno> {
    let sent = io::stdin();
    let fds = [sent.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty())
}

/// Whoever received one would have to close it, which can take as long as its sender likes. Where the
/// kernel cannot refuse them (before Linux 6.16), what follows them has to arrive at least.
fn descriptors_that_a_client_sends_stop_nothing(io: Io) {
    let backend = Backend::scripted(|mut stream| {
        let mut greeting = [0];
        let mut whole = [0; 11];
        let _ = stream.read_exact(&mut greeting).and_then(|()| stream.write_all(&greeting));
        let _ = stream.read_exact(&mut whole).and_then(|()| stream.write_all(&whole));
    });
    let (_directory, path, proxy) = start(io, &backend);
    let mut client = connect(&path);
    client.write_all(b"a").unwrap();
    client.read_exact(&mut [0]).unwrap();
    // So that both are there when it looks.
    proxy.signal(Signal::STOP);
    match send_with_descriptor(&client, b"first") {
        Err(Errno::PERM) => client.write_all(b"first").unwrap(),
        outcome => assert_eq!(outcome, Ok(5)),
    }
    client.write_all(b"second").unwrap();
    proxy.signal(Signal::CONT);
    let mut reply = [0; 11];
    client.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"firstsecond");
}
