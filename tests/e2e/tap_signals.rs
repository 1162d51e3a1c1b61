//! How a tap ends by who asked for it: by a signal, as people end tcpdump, or as its reader leaves.

use std::fs;
use std::io::{BufRead, BufReader, Read, pipe};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::tap::Place;
use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect};
use crate::support::pcap::Stream;
use crate::support::proxy::{Proxy, binary};
use crate::support::{Io, PATIENCE, eventually};

/// Begins a tap; returns once clients are waited for, with what says how it goes on.
fn begin(proxy: &Proxy, command: &mut Command) -> (Child, BufReader<impl Read + use<>>) {
    let begun = proxy.log_events("tap begins").len();
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut begins = String::new();
    said.read_line(&mut begins).unwrap();
    assert_eq!(begins, "waiting for the next client\n");
    assert!(proxy.log_events("tap begins").len() > begun);
    (child, said)
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn end_of((mut child, mut said): (Child, BufReader<impl Read>)) -> (Option<i32>, String) {
    let status = eventually("the tap ends", PATIENCE, || child.try_wait().unwrap());
    let mut text = String::new();
    said.read_to_string(&mut text).unwrap();
    (status.code(), text)
}

#[test]
fn a_signal_ends_a_tap_with_what_there_is() {
    let (place, backend) = (Place::new(), Backend::named("a"));
    let proxy = place.on(Io::Epoll, &[backend.address()]).start();
    for (name, kind) in [("int", Signal::INT), ("term", Signal::TERM)] {
        let file = place.file(name);
        let tap = begin(&proxy, &mut place.command(&file, &[]));
        let client = connect(proxy.address());
        assert_eq!(ask(&client, "who"), "a");
        signal(&tap.0, kind);
        let (code, said) = end_of(tap);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("6 bytes of a client of route default"), "{said}");
        let stream = Stream::read(&fs::read(&file).unwrap());
        assert_eq!(stream.sent_by(proxy.address()), b"a\n");
        // The session goes on.
        assert_eq!(ask(&client, "who"), "a");
    }
    // Nobody has come.
    let file = place.file("none");
    let tap = begin(&proxy, &mut place.command(&file, &[]));
    signal(&tap.0, Signal::INT);
    let (code, said) = end_of(tap);
    assert!(code == Some(1) && said.contains("the next client has not come"), "{said}");
    assert!(!file.exists());
}

#[test]
fn a_second_signal_ends_a_tap_whose_proxy_does_not_answer() {
    let (place, backend) = (Place::new(), Backend::named("a"));
    let proxy = place.on(Io::Epoll, &[backend.address()]).start();
    let tap = begin(&proxy, &mut place.command(&place.file("file"), &[]));
    proxy.signal(Signal::STOP);
    signal(&tap.0, Signal::INT);
    // Two that come at once may be one.
    let mut tap = tap;
    let status = eventually("the tap ends", PATIENCE, || {
        signal(&tap.0, Signal::INT);
        tap.0.try_wait().unwrap()
    });
    assert_eq!(status.code(), Some(130));
    proxy.signal(Signal::CONT);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let (place, backend) = (Place::new(), Backend::named("a"));
    let proxy = place.on(Io::Epoll, &[backend.address()]).start();
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let mut command = Command::new(binary());
    command.arg("tap").env("AEGIS_CONTROL", place.control()).stdout(writer);
    let tap = begin(&proxy, &mut command);
    ask_once(proxy.address(), "who").unwrap();
    let (code, said) = end_of(tap);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("6 bytes of a client") && !said.contains("Broken pipe"), "{said}");
}
