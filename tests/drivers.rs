//! The contract of a driver, kept by `io_uring` and epoll alike, on real sockets.
#![allow(missing_docs)]
#![expect(clippy::disallowed_methods, reason = "no tap is here")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use aegis::config::SocketMode;
use aegis::io::epoll::Epoll;
use aegis::io::net::Options;
use aegis::io::probe;
use aegis::io::uring::Uring;
use aegis::io::{Close, Completion, ConnId, Driver, DriverSetup, Unheard, Wait};
use aegis::limits::{BUFFER_RING_ENTRIES, BUFFER_SIZE, PIPES_MAX};
use aegis::startup::{Access, listeners};
use aegis::worker::mailbox::Mailbox;

#[path = "drivers/bulk.rs"]
mod bulk;
#[path = "drivers/checks.rs"]
mod checks;
#[path = "drivers/unix.rs"]
mod unix;

const BULK: usize = 32 << 20;
const PATIENCE: Duration = Duration::from_secs(10);
const BUFFERS: usize = BUFFER_RING_ENTRIES as usize + 4000;

struct Rig<D> {
    driver: D,
    address: SocketAddr,
    seen: Vec<Completion>,
}

fn prepare() -> (DriverSetup, SocketAddr) {
    let (setup, addresses) = prepare_listeners(1);
    (setup, addresses[0])
}

fn prepare_listeners(count: usize) -> (DriverSetup, Vec<SocketAddr>) {
    let any = vec!["127.0.0.1:0".parse().unwrap(); count];
    let access = Access { mode: SocketMode::DEFAULT, owner: None };
    let mut listeners = listeners::listen(&any, 1, &Options::default(), access).unwrap();
    let wake = Mailbox::new(1).unwrap().wake_fd().try_clone_to_owned().unwrap();
    let setup = DriverSetup {
        listeners: listeners.sets.remove(0),
        wake,
        conns_max: 4000,
        buffers_max: BUFFERS,
    };
    (setup, listeners.addresses.iter().map(|address| address.tcp().unwrap()).collect())
}

/// Runs a test on each driver. It says so where `io_uring` cannot run.
macro_rules! on_each_driver {
    (unix: $($name:ident,)+) => { $(
        #[test]
        fn $name() {
            let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
            let (setup, path, listener) = unix::prepare(concat!("epoll-", stringify!($name)));
            let driver = Epoll::new(setup).unwrap();
            let rig = Rig { driver, address: nowhere, seen: Vec::new() };
            unix::$name(unix::UnixRig { rig, path, listener });
            match probe::uring() {
                Ok(features) => {
                    let (setup, path, listener) = unix::prepare(concat!("uring-", stringify!($name)));
                    let driver = Uring::new(setup, probe::set_up(features).unwrap()).unwrap();
                    let rig = Rig { driver, address: nowhere, seen: Vec::new() };
                    unix::$name(unix::UnixRig { rig, path, listener });
                }
                Err(why) => eprintln!("SKIPPED: {} on io_uring: {why}", stringify!($name)),
            }
        }
    )+ };
    ($module:ident: $($name:ident,)+) => { $(
        #[test]
        fn $name() {
            let (setup, address) = prepare();
            let driver = Epoll::new(setup).unwrap();
            $module::$name(Rig { driver, address, seen: Vec::new() });
            match probe::uring() {
                Ok(features) => {
                    let (setup, address) = prepare();
                    let driver = Uring::new(setup, probe::set_up(features).unwrap()).unwrap();
                    $module::$name(Rig { driver, address, seen: Vec::new() });
                }
                Err(why) => eprintln!("SKIPPED: {} on io_uring: {why}", stringify!($name)),
            }
        }
    )+ };
}

on_each_driver![checks:
    sends_of_one_turn_keep_to_their_connections_however_many_there_are,
    connects_of_one_turn_reach_their_addresses_however_many_there_are,
    a_reset_is_a_reset_however_the_driver_ends,
    a_reset_is_told_once_while_receiving_is_stopped_and_loses_no_byte,
    how_a_send_went_is_told_at_once,
    the_end_goes_right_behind_a_send,
    a_half_closed_peer_that_reads_slowly_costs_no_turns,
    bulk_to_a_half_closed_peer_that_reads_slowly_costs_no_turns,
    a_sender_that_resets_behind_bulk_loses_no_byte_of_it,
    an_urgent_byte_holds_nothing_up,
    bytes_that_are_received_but_not_handed_out_are_not_unheard,
    a_drain_serves_who_has_connected_and_lets_nobody_else_in,
    a_closed_connection_brings_no_more_events,
    receiving_stops_and_goes_on_without_a_lost_byte,
    without_buffers_receives_wait_and_go_on,
    small_sends_wait_for_room_and_arrive_whole,
    a_small_send_to_a_broken_connection_fails,
    a_wait_ends_when_its_time_is_up,
    a_wait_for_many_where_others_want_the_core_ends_for_few,
];

on_each_driver![bulk:
    bulk_between_joined_connections_is_spliced_and_arrives_whole_with_its_end,
    after_bulk_small_messages_are_received_at_once_again,
    a_reader_that_resets_in_the_midst_of_bulk_is_noticed,
    a_sender_that_resets_in_the_midst_of_bulk_is_noticed,
    more_stalled_bulk_streams_than_pipes_lose_no_byte,
];

on_each_driver![unix:
    unix_clients_and_backends_exchange_bytes_and_ends,
    unix_connects_that_fail_say_why,
    a_unix_peer_that_leaves_bytes_unread_is_a_reset,
    a_reset_of_a_unix_client_is_one_where_bytes_are_unread_and_else_an_end,
    an_urgent_byte_of_a_unix_client_arrives_at_its_place,
    a_full_unix_socket_waits_for_room,
    a_unix_peer_that_reads_wakes_nobody,
    unix_bulk_arrives_whole_with_its_end,
    a_drain_empties_the_queue_of_a_unix_listener,
    where_one_driver_has_ended_a_shared_queue_another_one_is_told_of_no_error,
    a_unix_connect_waits_for_room_in_the_accept_queue,
    a_connection_to_a_socket_of_this_process_leads_back,
];

#[test]
fn several_listeners_bring_no_more_clients_than_there_is_room_for() {
    let (setup, addresses) = prepare_listeners(3);
    let driver = Epoll::new(setup).unwrap();
    let rig = Rig { driver, address: addresses[0], seen: Vec::new() };
    checks::several_listeners_bring_no_more_clients_than_there_is_room_for(rig, &addresses);
    match probe::uring() {
        Ok(features) => {
            let (setup, addresses) = prepare_listeners(3);
            let driver = Uring::new(setup, probe::set_up(features).unwrap()).unwrap();
            let rig = Rig { driver, address: addresses[0], seen: Vec::new() };
            checks::several_listeners_bring_no_more_clients_than_there_is_room_for(rig, &addresses);
        }
        Err(why) => eprintln!("SKIPPED: several listeners on io_uring: {why}"),
    }
}

impl<D: Driver> Rig<D> {
    fn turn(&mut self) {
        let max = Duration::from_millis(10);
        self.driver.wait(Wait::for_one(max)).unwrap();
        while let Some(completion) = self.driver.next() {
            self.seen.push(completion);
        }
    }

    /// Turns until `found` says so of what has been seen.
    fn until(&mut self, what: &str, mut found: impl FnMut(&mut D, &mut Vec<Completion>) -> bool) {
        let begun = Instant::now();
        while !found(&mut self.driver, &mut self.seen) {
            assert!(begun.elapsed() < PATIENCE, "not in time: {what}");
            self.turn();
        }
    }

    /// A client and the driver's connection to it.
    fn accept(&mut self) -> (TcpStream, ConnId) {
        self.driver.accept(4000);
        let client = TcpStream::connect(self.address).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut accepted = None;
        self.until("accept", |_, seen| {
            seen.retain(|completion| match completion {
                Completion::Accepted(conn, _) => {
                    accepted = Some(*conn);
                    false
                }
                _ => true,
            });
            accepted.is_some()
        });
        (client, accepted.unwrap())
    }

    fn send(&mut self, conn: ConnId, text: &[u8]) {
        let buffers = self.driver.buffers();
        let mut buf = buffers.take().unwrap();
        buffers.space(&mut buf)[..text.len()].copy_from_slice(text);
        buffers.set_len(&mut buf, text.len());
        self.driver.send(conn, buf);
    }

    /// Takes what was received out of what was seen.
    fn received(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for completion in std::mem::take(&mut self.seen) {
            match completion {
                Completion::Received(_, buf) => {
                    bytes.extend_from_slice(self.driver.buffers().bytes(&buf));
                    self.driver.buffers().give(buf);
                }
                other => self.seen.push(other),
            }
        }
        bytes
    }
}

/// Bytes that look different at every place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i ^ (i >> 8) ^ ((i >> 16) * 7)) as u8).collect()
}

fn nothing_lingers(stream: &TcpStream) {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// So many bytes may be queued for a connection before its source is stopped.
const LIMIT: usize = 8 * BUFFER_SIZE;

/// A pair of joined connections, and what has come through from the first to the second.
#[derive(Debug)]
struct Relayed {
    from: ConnId,
    to: ConnId,
    received: usize,
    spliced: usize,
    sent: usize,
    paused: bool,
    failed: Option<ConnId>,
    ended: bool,
}

impl Relayed {
    fn on_completion(&mut self, driver: &mut impl Driver, completion: Completion) {
        match completion {
            Completion::Received(_, buf) => {
                self.received += buf.len() as usize;
                driver.send(self.to, buf);
            }
            Completion::Spliced(conn, bytes) => {
                assert_eq!(conn, self.from);
                self.spliced += bytes as usize;
            }
            Completion::Sent(conn, bytes) => {
                assert_eq!(conn, self.to);
                self.sent += bytes as usize;
            }
            Completion::Ended(conn) if conn == self.from => {
                self.ended = true;
                driver.shutdown(self.to);
            }
            Completion::Ended(_) => {}
            Completion::ReceiveFailed(conn) => {
                self.ended |= conn == self.from;
                self.failed.get_or_insert(conn);
            }
            Completion::SendFailed(conn) => {
                self.failed.get_or_insert(conn);
            }
            other => panic!("{other:?}"),
        }
        let queued = self.received + self.spliced;
        assert!(self.sent <= queued, "{} bytes were sent of {queued}", self.sent);
        let pause = queued - self.sent >= if self.paused { LIMIT / 2 } else { LIMIT };
        if pause != self.paused {
            self.paused = pause;
            driver.receive(self.from, !pause);
        }
    }
}

impl<D: Driver> Rig<D> {
    /// Two clients whose connections are joined.
    fn join(&mut self) -> (TcpStream, TcpStream, Relayed) {
        let ((writer, from), (reader, to)) = (self.accept(), self.accept());
        self.driver.join(from, to);
        self.driver.receive(from, true);
        self.driver.receive(to, true);
        let (received, spliced, sent) = (0, 0, 0);
        let (paused, failed, ended) = (false, None, false);
        let relayed = Relayed { from, to, received, spliced, sent, paused, failed, ended };
        (writer, reader, relayed)
    }

    /// One turn, in which everything is passed on at once. Much that is queued stops its source.
    fn relay(&mut self, pairs: &mut [Relayed]) {
        let max = Duration::from_millis(10);
        self.driver.wait(Wait::for_one(max)).unwrap();
        while let Some(completion) = self.driver.next() {
            let conn = completion.conn();
            let about = |pair: &&mut Relayed| conn == Some(pair.from) || conn == Some(pair.to);
            match pairs.iter_mut().find(about) {
                Some(pair) => pair.on_completion(&mut self.driver, completion),
                None => self.seen.push(completion),
            }
        }
    }

    fn relay_until(
        &mut self,
        what: &str,
        relayed: &mut Relayed,
        mut done: impl FnMut(&Relayed) -> bool,
    ) {
        let begun = Instant::now();
        while !done(relayed) {
            assert!(begun.elapsed() < PATIENCE, "not in time: {what}: {relayed:?}");
            self.relay(std::slice::from_mut(relayed));
        }
    }
}
