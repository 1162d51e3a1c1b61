//! The same contract over Unix sockets, and what they lack.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use aegis::io::net::{Address, Credentials};

use super::*;

/// As for TCP, with a Unix socket of that name in place of the port.
pub fn prepare(name: &str) -> (DriverSetup, Arc<Path>, UnixListener) {
    let path = std::env::temp_dir().join(format!("aegis-{}-{name}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let (setup, _) = super::prepare();
    let shared = listener.try_clone().unwrap();
    (DriverSetup { listeners: vec![listener.into()], ..setup }, path.into(), shared)
}

pub struct UnixRig<D> {
    pub rig: Rig<D>,
    pub path: Arc<Path>,
    /// The same socket, as another driver has it.
    pub listener: UnixListener,
}

impl<D> Drop for UnixRig<D> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl<D: Driver> UnixRig<D> {
    /// A client and the driver's connection to it.
    fn accept(&mut self) -> (UnixStream, ConnId) {
        self.rig.driver.accept(4000);
        let client = UnixStream::connect(&self.path).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut accepted = None;
        self.rig.until("accept", |_, seen| {
            accepted = seen.pop().map(|seen| match seen {
                Completion::Accepted(conn, _) => conn,
                other => panic!("{other:?}"),
            });
            accepted.is_some()
        });
        (client, accepted.unwrap())
    }

    fn until_received(&mut self, wanted: &[u8]) {
        let mut received = Vec::new();
        let begun = Instant::now();
        while received.len() < wanted.len() {
            assert!(begun.elapsed() < PATIENCE, "{} of {}", received.len(), wanted.len());
            self.rig.turn();
            received.append(&mut self.rig.received());
        }
        assert!(received == wanted, "wrong bytes");
    }

    fn until_seen(&mut self, what: &str, wanted: impl Fn(&Completion) -> bool) {
        self.rig.until(what, |_, seen| seen.iter().any(&wanted));
        self.rig.seen.clear();
    }
}

pub fn unix_clients_and_backends_exchange_bytes_and_ends<D: Driver>(mut unix: UnixRig<D>) {
    let (client, accepted) = unix.accept();
    let driver = &unix.rig.driver;
    assert_eq!((driver.peer_address(accepted), driver.local_address(accepted)), (None, None));
    let [pid, uid, gid] = [
        std::process::id(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    ];
    assert_eq!(driver.credentials(accepted), Some(Credentials { pid, uid, gid }));

    let backend_path = unix.path.with_extension("backend");
    let backend = UnixListener::bind(&backend_path).unwrap();
    let address = Address::Unix(backend_path.clone().into());
    let connected = unix.rig.driver.connect(&address, &Options::default()).unwrap();
    unix.until_seen("the connect", |seen| matches!(seen, Completion::Connected(_)));
    let (peer, _) = backend.accept().unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    std::fs::remove_file(backend_path).unwrap();
    assert_eq!(unix.rig.driver.peer_address(connected), None);

    for (mut far, conn) in [(client, accepted), (peer, connected)] {
        unix.rig.driver.ask(conn, &Options::default(), Some(Duration::from_secs(1)));
        unix.rig.driver.receive(conn, true);
        far.write_all(b"a request").unwrap();
        unix.until_received(b"a request");
        unix.rig.send(conn, b"a reply");
        unix.until_seen("the send", |seen| matches!(seen, Completion::Sent(_, 7)));
        // Nothing is known of what the peer has read, and all of it has reached it.
        assert_eq!(unix.rig.driver.acks(conn), None);
        assert_eq!(unix.rig.driver.undelivered(conn), 0);
        assert_eq!(unix.rig.driver.unsent(conn), 0);
        assert_eq!(unix.rig.driver.unheard(conn), Unheard::Nothing);
        let mut reply = [0; 7];
        far.read_exact(&mut reply).unwrap();
        assert_eq!(&reply, b"a reply");
        // Each direction ends by itself.
        far.shutdown(Shutdown::Write).unwrap();
        unix.until_seen("the end", |seen| matches!(seen, Completion::Ended(_)));
        unix.rig.send(conn, b"the last words");
        unix.rig.driver.shutdown(conn);
        unix.rig.turn();
        let mut text = String::new();
        far.read_to_string(&mut text).unwrap();
        assert_eq!(text, "the last words");
        unix.rig.driver.close(conn, Close::Graceful);
    }
}

pub fn unix_connects_that_fail_say_why<D: Driver>(mut unix: UnixRig<D>) {
    let nobody = unix.path.with_extension("nobody");
    let left = unix.path.with_extension("left");
    drop(UnixListener::bind(&left).unwrap());
    for (path, kind) in [(&nobody, ErrorKind::NotFound), (&left, ErrorKind::ConnectionRefused)] {
        let conn = unix
            .rig
            .driver
            .connect(&Address::Unix(path.clone().into()), &Options::default())
            .unwrap();
        unix.until_seen(
            &format!("{kind}"),
            |seen| matches!(seen, Completion::ConnectFailed(_, error) if error.kind() == kind),
        );
        unix.rig.driver.close(conn, Close::Graceful);
    }
    std::fs::remove_file(left).unwrap();
}

pub fn a_unix_peer_that_leaves_bytes_unread_is_a_reset<D: Driver>(mut unix: UnixRig<D>) {
    let (mut client, conn) = unix.accept();
    unix.rig.driver.receive(conn, true);
    unix.rig.send(conn, b"unread");
    unix.until_seen("the send", |seen| matches!(seen, Completion::Sent(..)));
    client.write_all(b"before").unwrap();
    drop(client);
    unix.until_received(b"before");
    unix.until_seen("the reset", |seen| matches!(seen, Completion::ReceiveFailed(_)));
}

pub fn a_reset_of_a_unix_client_is_one_where_bytes_are_unread_and_else_an_end<D: Driver>(
    mut unix: UnixRig<D>,
) {
    for unread in [true, false] {
        let (mut client, conn) = unix.accept();
        if unread {
            client.write_all(b"unread").unwrap();
        }
        unix.rig.driver.close(conn, Close::Reset);
        unix.rig.turn();
        match client.read(&mut [0]) {
            Ok(count) => assert!(!unread && count == 0),
            Err(error) => assert!(unread && error.kind() == ErrorKind::ConnectionReset),
        }
    }
}

pub fn an_urgent_byte_of_a_unix_client_arrives_at_its_place<D: Driver>(mut unix: UnixRig<D>) {
    let (mut client, conn) = unix.accept();
    unix.rig.driver.receive(conn, true);
    for _ in 0..3 {
        client.write_all(b"be").unwrap();
        match rustix::net::send(&client, b"f", rustix::net::SendFlags::OOB) {
            Err(rustix::io::Errno::OPNOTSUPP) => {
                return eprintln!("SKIPPED: the kernel has no urgent data on Unix sockets");
            }
            sent => assert_eq!(sent, Ok(1)),
        }
        client.write_all(b"ore").unwrap();
        unix.until_received(b"before");
    }
}

pub fn a_full_unix_socket_waits_for_room<D: Driver>(mut unix: UnixRig<D>) {
    const TOTAL: usize = 4 << 20;
    let (mut client, conn) = unix.accept();
    let bytes = pattern(TOTAL);
    for piece in bytes.chunks(BUFFER_SIZE) {
        unix.rig.send(conn, piece);
    }
    unix.rig.driver.shutdown(conn);
    for _ in 0..20 {
        unix.rig.turn();
    }
    assert!(unix.rig.driver.undelivered(conn) > 0, "all of it fits into the socket");
    let reader = std::thread::spawn(move || {
        let mut received = Vec::new();
        client.read_to_end(&mut received).map(|_| received)
    });
    unix.rig.until("the rest", |_, _| reader.is_finished());
    assert!(reader.join().unwrap().unwrap() == bytes, "wrong bytes");
}

pub fn a_unix_peer_that_reads_wakes_nobody<D: Driver>(mut unix: UnixRig<D>) {
    const MESSAGES: usize = 20;
    let (mut client, conn) = unix.accept();
    unix.rig.driver.receive(conn, true);
    let (mut woken, mut reply) = (0, [0; 5]);
    for _ in 0..MESSAGES {
        client.write_all(b"ask").unwrap();
        unix.until_received(b"ask");
        unix.rig.send(conn, b"reply");
        unix.until_seen("the send", |seen| matches!(seen, Completion::Sent(_, 5)));
        client.read_exact(&mut reply).unwrap();
        // The kernel would tell of room at once; a timer of an earlier wait takes longer, mostly.
        let begun = Instant::now();
        unix.rig.driver.wait(Wait::for_one(Duration::from_millis(40))).unwrap();
        woken += usize::from(begun.elapsed() < Duration::from_millis(2));
    }
    assert!(
        woken < MESSAGES / 2,
        "woken {woken} times where the peer has read {MESSAGES} messages"
    );
}

pub fn unix_bulk_arrives_whole_with_its_end<D: Driver>(mut unix: UnixRig<D>) {
    const BULK: usize = 32 << 20;
    let ((mut writer, from), (mut reader, to)) = (unix.accept(), unix.accept());
    unix.rig.driver.join(from, to);
    unix.rig.driver.receive(from, true);
    unix.rig.driver.receive(to, true);
    let (received, spliced, sent) = (0, 0, 0);
    let (paused, failed, ended) = (false, None, false);
    let mut relayed = Relayed { from, to, received, spliced, sent, paused, failed, ended };
    let bytes = pattern(BULK);
    let expected = bytes.clone();
    std::thread::spawn(move || writer.write_all(&bytes));
    let reads = std::thread::spawn(move || {
        let mut received = Vec::new();
        reader.read_to_end(&mut received).map(|_| received)
    });
    unix.rig.relay_until("everything", &mut relayed, |_| reads.is_finished());
    assert!(reads.join().unwrap().unwrap() == expected, "wrong bytes");
    assert!(relayed.spliced > 0, "nothing was spliced");
}

pub fn a_drain_empties_the_queue_of_a_unix_listener<D: Driver>(mut unix: UnixRig<D>) {
    unix.rig.driver.accept(0);
    unix.rig.turn();
    let early: Vec<_> = (0..5).map(|_| UnixStream::connect(&unix.path).unwrap()).collect();
    assert!(!unix.rig.driver.refuse_handshakes(), "there is no handshake to be repeated");
    assert!(unix.rig.driver.stop_listening());
    unix.rig.until("the accept queue", |_, seen| {
        seen.iter().filter(|seen| matches!(seen, Completion::Accepted(..))).count() == early.len()
    });
    let late = UnixStream::connect(&unix.path).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::ConnectionRefused);
}

pub fn where_one_driver_has_ended_a_shared_queue_another_one_is_told_of_no_error<D: Driver>(
    mut unix: UnixRig<D>,
) {
    unix.rig.driver.accept(1);
    unix.rig.turn();
    assert!(unix.rig.driver.is_shared(0));
    let (client, _) = unix.accept();
    drop(client);
    // As another one does that drains: all sockets share the queue.
    rustix::net::shutdown(&unix.listener, rustix::net::Shutdown::Read).unwrap();
    let begun = Instant::now();
    let mut turns = 0;
    while begun.elapsed() < Duration::from_millis(100) {
        unix.rig.driver.accept(4000);
        unix.rig.turn();
        turns += 1;
    }
    assert!(unix.rig.seen.is_empty(), "{:?}", unix.rig.seen);
    assert!(turns < 100, "{turns} turns for nothing");
    assert!(unix.rig.driver.stop_listening());
}

pub fn a_unix_connect_waits_for_room_in_the_accept_queue<D: Driver>(mut unix: UnixRig<D>) {
    const BACKLOG: i32 = 1;
    const MORE: usize = 7;
    let path = unix.path.with_extension("crowded");
    let backend = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    backend.bind(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
    backend.listen(BACKLOG).unwrap();
    let address = Address::Unix(path.clone().into());
    let connect = |rig: &mut Rig<D>| rig.driver.connect(&address, &Options::default()).unwrap();
    // The kernel has room for one more than it is told.
    let room = BACKLOG as usize + 1;
    let conns: Vec<_> = (0..room + MORE).map(|_| connect(&mut unix.rig)).collect();
    let begun = Instant::now();
    let mut turns = 0;
    while begun.elapsed() < Duration::from_millis(50) {
        unix.rig.turn();
        turns += 1;
    }
    assert!(turns < 100, "{turns} turns in 50 ms");
    let connected = |seen: &[Completion]| {
        seen.iter().filter(|seen| matches!(seen, Completion::Connected(_))).count()
    };
    assert_eq!((connected(&unix.rig.seen), unix.rig.seen.len()), (room, room));
    // One that is given up takes no place.
    unix.rig.driver.close(conns[room], Close::Graceful);
    let accepted = std::thread::spawn(move || {
        (0..room + MORE - 1).map(|_| backend.accept().unwrap()).collect::<Vec<_>>()
    });
    unix.rig.until("the others", |_, seen| connected(seen) == room + MORE - 1);
    accepted.join().unwrap();
    std::fs::remove_file(path).unwrap();
}

pub fn a_connection_to_a_socket_of_this_process_leads_back<D: Driver>(mut unix: UnixRig<D>) {
    let other = unix.path.with_extension("other");
    let link = unix.path.with_extension("link");
    let _other = UnixListener::bind(&other).unwrap();
    std::os::unix::fs::symlink(&unix.path, &link).unwrap();
    let own = unix.path.clone();
    for (reached, leads_back) in [(&*own, true), (&*link, true), (&*other, false)] {
        let address = Address::Unix(reached.into());
        let conn = unix.rig.driver.connect(&address, &Options::default()).unwrap();
        unix.until_seen("the connect", |seen| matches!(seen, Completion::Connected(_)));
        assert_eq!(unix.rig.driver.leads_back_to(conn, &own), leads_back, "{}", reached.display());
        unix.rig.driver.close(conn, Close::Graceful);
    }
    for path in [link, other] {
        std::fs::remove_file(path).unwrap();
    }
}
