//! Accepting, receiving, sending, waiting and closing.

use super::*;

/// As many operations as fill a submission queue.
const MANY: usize = 1024;

pub fn sends_of_one_turn_keep_to_their_connections_however_many_there_are<D: Driver>(
    mut rig: Rig<D>,
) {
    let mut pairs: Vec<_> = (0..MANY + 4).map(|_| rig.accept()).collect();
    let senders = pairs.split_off(MANY);
    for (_, conn) in &pairs {
        rig.driver.receive(*conn, true);
    }
    for (number, (_, conn)) in senders.iter().enumerate() {
        // Two buffers each, so that the send needs a header.
        for _ in 0..2 {
            rig.send(*conn, &[number as u8; BUFFER_SIZE]);
        }
    }
    let mut sent = 0;
    rig.until("sent", |_, seen| {
        sent += seen.drain(..).filter(|c| matches!(c, Completion::Sent(..))).count();
        sent >= senders.len()
    });
    for (number, (mut client, _)) in senders.into_iter().enumerate() {
        let mut bytes = vec![0xff; 2 * BUFFER_SIZE];
        client.read_exact(&mut bytes).unwrap();
        assert!(bytes.iter().all(|&byte| byte == number as u8), "another's bytes");
    }
}

pub fn connects_of_one_turn_reach_their_addresses_however_many_there_are<D: Driver>(
    mut rig: Rig<D>,
) {
    let pairs: Vec<_> = (0..MANY).map(|_| rig.accept()).collect();
    for (_, conn) in &pairs {
        rig.driver.receive(*conn, true);
    }
    let backends: Vec<_> = (0..4).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let wanted: Vec<_> = backends
        .iter()
        .map(|backend| backend.local_addr().unwrap())
        .map(|address| (rig.driver.connect(&address.into(), &Options::default()).unwrap(), address))
        .collect();
    rig.until("connected", |_, seen| {
        seen.iter().filter(|c| matches!(c, Completion::Connected(_))).count() == wanted.len()
    });
    for (conn, address) in wanted {
        assert_eq!(rig.driver.peer_address(conn), Some(address));
    }
}

pub fn a_reset_is_a_reset_however_the_driver_ends<D: Driver>(mut rig: Rig<D>) {
    let (mut client, conn) = rig.accept();
    rig.driver.receive(conn, true);
    rig.turn();
    rig.driver.close(conn, Close::Reset);
    // What the kernel gives back in this wait is never looked at.
    let wait = Wait::for_one(Duration::ZERO);
    rig.driver.wait(wait).unwrap();
    drop(rig);
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

pub fn a_reset_is_told_once_while_receiving_is_stopped_and_loses_no_byte<D: Driver>(
    mut rig: Rig<D>,
) {
    for half_closed in [false, true] {
        let (mut client, conn) = rig.accept();
        rig.driver.receive(conn, true);
        rig.turn();
        rig.driver.receive(conn, false);
        for _ in 0..3 {
            rig.turn();
        }
        let bytes = pattern(40_000);
        client.write_all(&bytes).unwrap();
        if half_closed {
            // What is reported of this must not pass for the reset, nor hide it.
            client.shutdown(Shutdown::Write).unwrap();
            for _ in 0..3 {
                rig.turn();
            }
            assert!(rig.seen.iter().all(|seen| !matches!(seen, Completion::SendFailed(_))));
        }
        nothing_lingers(&client);
        drop(client);
        rig.until("the reset", |_, seen| {
            seen.iter().any(|seen| matches!(seen, Completion::SendFailed(c) if *c == conn))
        });
        // Nobody takes this any more, and nobody says so again.
        rig.send(conn, b"late");
        rig.driver.receive(conn, true);
        let is_end =
            |seen: &Completion| matches!(seen, Completion::ReceiveFailed(_) | Completion::Ended(_));
        rig.until("the end", |_, seen| seen.iter().any(is_end));
        for _ in 0..3 {
            rig.turn();
        }
        let last = rig.seen.last().unwrap();
        assert!(is_end(last), "the end is not the last: {:?}", rig.seen);
        assert!(half_closed || matches!(last, Completion::ReceiveFailed(_)), "{last:?}");
        assert!(rig.received() == bytes, "wrong bytes");
        let failed = rig.seen.iter().filter(|c| matches!(c, Completion::SendFailed(_))).count();
        assert_eq!(failed, 1, "{:?}", rig.seen);
        rig.seen.clear();
        rig.driver.close(conn, Close::Reset);
    }
}

const LONG: Duration = Duration::from_secs(5);

pub fn how_a_send_went_is_told_at_once<D: Driver>(mut rig: Rig<D>) {
    let (mut client, conn) = rig.accept();
    rig.driver.receive(conn, true);
    rig.turn();
    for events in [1, 8] {
        for buffers in [1, 3] {
            let begun = Instant::now();
            for _ in 0..buffers {
                rig.send(conn, &[7; BUFFER_SIZE]);
            }
            let wait = Wait { events, batch: LONG, most: LONG, contended: false };
            let mut sent = 0;
            while sent < buffers * BUFFER_SIZE {
                rig.driver.wait(wait).unwrap();
                while let Some(completion) = rig.driver.next() {
                    sent += match completion {
                        Completion::Sent(_, bytes) => bytes as usize,
                        other => panic!("{other:?}"),
                    };
                }
            }
            assert!(begun.elapsed() < LONG / 2, "{:?} for {events} events", begun.elapsed());
            client.read_exact(&mut vec![0; sent]).unwrap();
        }
    }
}

pub fn the_end_goes_right_behind_a_send<D: Driver>(mut rig: Rig<D>) {
    for events in [1, 8] {
        let (mut client, conn) = rig.accept();
        rig.driver.receive(conn, true);
        rig.turn();
        let begun = Instant::now();
        rig.send(conn, b"the last words");
        rig.driver.shutdown(conn);
        rig.driver.wait(Wait { events, batch: LONG, most: LONG, contended: false }).unwrap();
        while let Some(completion) = rig.driver.next() {
            assert!(matches!(completion, Completion::Sent(..)), "{completion:?}");
        }
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "the last words");
        assert!(begun.elapsed() < LONG / 2, "{:?} for {events} events", begun.elapsed());
    }
}

/// The waits that end within `time` although nothing is to be reported, each of at most 50 ms.
fn idle_turns<D: Driver>(rig: &mut Rig<D>, time: Duration) -> usize {
    let begun = Instant::now();
    let mut turns = 0;
    while begun.elapsed() < time {
        rig.driver.wait(Wait::for_one(Duration::from_millis(50))).unwrap();
        while let Some(completion) = rig.driver.next() {
            rig.seen.push(completion);
        }
        turns += 1;
    }
    turns
}

pub fn a_half_closed_peer_that_reads_slowly_costs_no_turns<D: Driver>(mut rig: Rig<D>) {
    const TOTAL: usize = 24 << 20;
    let (mut client, conn) = rig.accept();
    rig.driver.receive(conn, true);
    client.shutdown(Shutdown::Write).unwrap();
    rig.until("the end", |_, seen| seen.iter().any(|seen| matches!(seen, Completion::Ended(_))));
    rig.seen.clear();
    let bytes = pattern(TOTAL);
    for piece in bytes.chunks(BUFFER_SIZE) {
        rig.send(conn, piece);
    }
    rig.driver.shutdown(conn);
    let mut sent = 0;
    while idle_turns(&mut rig, Duration::from_millis(200)) > 20 {}
    sent += sent_bytes(&mut rig.seen);
    assert!((1..TOTAL).contains(&sent), "{sent} bytes fit into the socket");
    let turns = idle_turns(&mut rig, Duration::from_millis(300));
    assert!(turns < 20, "{turns} turns for nothing");
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let names = threads.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
    let helpers = names.flatten().filter(|name| name.starts_with("iou-wrk")).count();
    assert_eq!(helpers, 0, "threads of the kernel's pool wait for room");
    let reader = std::thread::spawn(move || {
        let mut received = vec![0; TOTAL];
        client.read_exact(&mut received).unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        received
    });
    rig.until("the rest", |_, seen| {
        sent += sent_bytes(seen);
        reader.is_finished()
    });
    assert!(reader.join().unwrap() == bytes, "wrong bytes");
    assert_eq!(sent, TOTAL);
}

pub fn bulk_to_a_half_closed_peer_that_reads_slowly_costs_no_turns<D: Driver>(mut rig: Rig<D>) {
    let (mut writer, mut reader, mut relayed) = rig.join();
    reader.shutdown(Shutdown::Write).unwrap();
    let bytes = pattern(BULK);
    let expected = bytes.clone();
    std::thread::spawn(move || {
        writer.write_all(&bytes).unwrap();
        writer
    });
    let relay_turns = |rig: &mut Rig<D>, relayed: &mut Relayed, time: Duration| {
        let begun = Instant::now();
        let mut turns = 0;
        while begun.elapsed() < time {
            rig.relay(std::slice::from_mut(relayed));
            turns += 1;
        }
        turns
    };
    let begun = Instant::now();
    while relay_turns(&mut rig, &mut relayed, Duration::from_millis(200)) > 60 {
        assert!(begun.elapsed() < PATIENCE, "turns without end");
    }
    assert!(relayed.spliced > 0 && relayed.sent < BULK, "{relayed:?}");
    let turns = relay_turns(&mut rig, &mut relayed, Duration::from_millis(300));
    assert!(turns < 60, "{turns} turns for nothing");
    let reads = std::thread::spawn(move || {
        let mut received = vec![0; BULK];
        reader.read_exact(&mut received).unwrap();
        received
    });
    rig.relay_until("everything", &mut relayed, |_| reads.is_finished());
    assert!(reads.join().unwrap() == expected, "wrong bytes");
}

pub fn a_sender_that_resets_behind_bulk_loses_no_byte_of_it<D: Driver>(mut rig: Rig<D>) {
    let (mut writer, mut reader, mut relayed) = rig.join();
    writer.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let writing = std::thread::spawn(move || {
        let bytes = pattern(1 << 20);
        let mut taken = 0;
        while let Ok(count @ 1..) = writer.write(&bytes[taken % bytes.len()..]) {
            taken += count;
        }
        // What waits to be sent would be lost with the reset, by nobody's fault but its own.
        (writer, taken)
    });
    rig.relay_until("a stall", &mut relayed, |_| writing.is_finished());
    assert!(relayed.spliced > 0);
    let (writer, taken) = writing.join().unwrap();
    let unsent = unsent_bytes(&writer);
    nothing_lingers(&writer);
    drop(writer);
    rig.relay_until("the break", &mut relayed, |relayed| relayed.failed.is_some());
    assert_eq!(relayed.failed, Some(relayed.from));
    let arrived = taken - unsent;
    let reads = std::thread::spawn(move || {
        let bytes = pattern(1 << 20);
        let mut received = vec![0; arrived];
        reader.read_exact(&mut received).unwrap();
        received.chunks(bytes.len()).all(|piece| *piece == bytes[..piece.len()])
    });
    rig.relay_until("what had arrived", &mut relayed, |_| reads.is_finished());
    assert!(reads.join().unwrap(), "wrong bytes");
    rig.relay_until("the end", &mut relayed, |relayed| relayed.ended);
}

/// Bytes that the peer of a socket has not acknowledged.
fn unsent_bytes(socket: &TcpStream) -> usize {
    let port = |address: SocketAddr| format!(":{:04X}", address.port());
    let local = port(socket.local_addr().unwrap());
    let peer = port(socket.peer_addr().unwrap());
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let line = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let line = line.filter(|words| words[1].ends_with(&local) && words[2].ends_with(&peer));
    let queues = line.collect::<Vec<_>>().pop().unwrap()[4].to_owned();
    usize::from_str_radix(queues.split(':').next().unwrap(), 16).unwrap()
}

/// Sends all of it, with an urgent byte at the end of each send if it is urgent.
fn send_piece(writer: &TcpStream, piece: &[u8], is_urgent: bool) {
    use rustix::net::SendFlags;
    let (step, flags) =
        if is_urgent { (1000, SendFlags::OOB) } else { (piece.len(), SendFlags::empty()) };
    let mut at = 0;
    while at < piece.len() {
        let end = piece.len().min(at + step);
        at += rustix::net::send(writer, &piece[at..end], flags).unwrap();
    }
}

pub fn an_urgent_byte_holds_nothing_up<D: Driver>(mut rig: Rig<D>) {
    const PIECE: usize = 1 << 16;
    let last = BULK / PIECE - 1;
    for (total, marks) in [
        (BULK, vec![0]),
        (BULK, vec![last / 2]),
        (BULK, vec![last]),
        (BULK, vec![0, 10, 11, 100, last - 1, last]),
        (4 * PIECE, vec![1]),
    ] {
        let (writer, mut reader, mut relayed) = rig.join();
        let bytes = pattern(total);
        let expected = bytes.clone();
        let urgent = marks.clone();
        std::thread::spawn(move || {
            for (number, piece) in bytes.chunks(PIECE).enumerate() {
                send_piece(&writer, piece, urgent.contains(&number));
            }
        });
        let reads = std::thread::spawn(move || {
            let mut received = vec![0; total];
            reader.read_exact(&mut received).unwrap();
            assert_eq!(reader.read(&mut [0]).unwrap(), 0, "more than was sent");
            received
        });
        let what = format!("{total} bytes with marks at {marks:?}");
        rig.relay_until(&what, &mut relayed, |_| reads.is_finished());
        assert!(reads.join().unwrap() == expected, "wrong bytes: {what}");
        rig.driver.close(relayed.from, Close::Reset);
        rig.driver.close(relayed.to, Close::Reset);
        rig.turn();
    }
    // Between small messages, of which only one is under way at a time.
    let (mut writer, mut reader, mut relayed) = rig.join();
    for number in 0..30_u8 {
        let message = [number; 10];
        if number % 3 == 0 {
            let flags = rustix::net::SendFlags::OOB;
            assert_eq!(rustix::net::send(&writer, &message, flags), Ok(10));
        }
        if number % 3 != 1 {
            writer.write_all(&message).unwrap();
        }
        let count = if number % 3 == 0 {
            20
        } else if number % 3 == 1 {
            0
        } else {
            10
        };
        let total = relayed.sent + count;
        rig.relay_until("a message", &mut relayed, |relayed| relayed.sent == total);
        let mut received = vec![0; count];
        reader.read_exact(&mut received).unwrap();
        assert_eq!(received, vec![number; count]);
    }
}

pub fn bytes_that_are_received_but_not_handed_out_are_not_unheard<D: Driver>(mut rig: Rig<D>) {
    let (mut busy, first) = rig.accept();
    let (mut client, conn) = rig.accept();
    let (ending, ended) = rig.accept();
    for conn in [first, conn, ended] {
        rig.driver.receive(conn, true);
    }
    rig.turn();
    assert_eq!(rig.driver.unheard(conn), Unheard::Nothing);
    assert_eq!(rig.driver.unheard(ended), Unheard::Nothing);
    busy.write_all(b"first").unwrap();
    client.write_all(b"second").unwrap();
    drop(ending);
    // All of it is there, taken by the driver or not, and none of it is handed out.
    for _ in 0..3 {
        rig.driver.wait(Wait::for_one(Duration::from_millis(10))).unwrap();
        assert_eq!(rig.driver.unheard(conn), Unheard::Bytes);
        assert_eq!(rig.driver.unheard(ended), Unheard::End);
    }
    let (mut bytes, mut end) = (0, false);
    rig.until("all of it", |driver, seen| {
        for completion in seen.drain(..) {
            match completion {
                Completion::Received(_, buf) => {
                    bytes += buf.len();
                    driver.buffers().give(buf);
                }
                Completion::Ended(_) => end = true,
                other => panic!("{other:?}"),
            }
        }
        bytes == 11 && end
    });
    assert_eq!(rig.driver.unheard(conn), Unheard::Nothing);
}

pub fn a_drain_serves_who_has_connected_and_lets_nobody_else_in<D: Driver>(mut rig: Rig<D>) {
    rig.driver.accept(0);
    rig.turn();
    let early: Vec<_> = (0..5).map(|_| TcpStream::connect(rig.address).unwrap()).collect();
    assert!(!rig.driver.refuse_handshakes(), "five of a thousand are no crowd");
    let late = TcpStream::connect_timeout(&rig.address, Duration::from_millis(300));
    assert_eq!(late.unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(rig.driver.stop_listening());
    rig.until("the accept queue", |_, seen| {
        seen.iter().filter(|seen| matches!(seen, Completion::Accepted(..))).count() == early.len()
    });
    let late = TcpStream::connect(rig.address).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::ConnectionRefused);
}

pub fn several_listeners_bring_no_more_clients_than_there_is_room_for<D: Driver>(
    mut rig: Rig<D>,
    addresses: &[SocketAddr],
) {
    rig.driver.accept(1);
    rig.turn();
    let clients: Vec<_> = addresses.iter().map(TcpStream::connect).collect();
    assert!(clients.iter().all(Result::is_ok) && clients.len() == 3);
    for let_in in [1, 2] {
        rig.until("a client", |_, seen| seen.len() >= let_in);
        for _ in 0..5 {
            rig.driver.accept(0);
            rig.turn();
        }
        assert_eq!(rig.seen.len(), let_in, "{:?}", rig.seen);
        if let_in == 1 {
            rig.driver.accept(1);
        }
    }
    assert!(rig.driver.stop_listening());
    rig.until("who is left in a drain", |_, seen| seen.len() == addresses.len());
    let accepted = |seen: &Completion| matches!(seen, Completion::Accepted(..));
    assert!(rig.seen.iter().all(accepted), "{:?}", rig.seen);
}

pub fn a_closed_connection_brings_no_more_events<D: Driver>(mut rig: Rig<D>) {
    let (mut client, conn) = rig.accept();
    rig.driver.receive(conn, true);
    rig.turn();
    client.write_all(b"late").unwrap();
    rig.driver.close(conn, Close::Graceful);
    let free = rig.driver.buffers().free();
    for _ in 0..10 {
        rig.turn();
    }
    assert!(rig.seen.is_empty(), "{:?}", rig.seen);
    assert_eq!(rig.driver.buffers().free(), free, "no buffer was lost");
}

pub fn receiving_stops_and_goes_on_without_a_lost_byte<D: Driver>(mut rig: Rig<D>) {
    const TOTAL: usize = 8 << 20;
    let (mut client, conn) = rig.accept();
    let writer = std::thread::spawn(move || {
        let bytes: Vec<u8> = (0..TOTAL).map(|i| (i / 3) as u8).collect();
        client.write_all(&bytes).unwrap();
        client
    });
    let mut received = Vec::new();
    let mut on = false;
    let begun = Instant::now();
    while received.len() < TOTAL {
        assert!(begun.elapsed() < PATIENCE, "{} of {TOTAL} bytes", received.len());
        on = !on;
        rig.driver.receive(conn, on);
        rig.turn();
        received.append(&mut rig.received());
    }
    assert!(received.iter().enumerate().all(|(i, &byte)| byte == (i / 3) as u8));
    writer.join().unwrap();
}

pub fn without_buffers_receives_wait_and_go_on<D: Driver>(mut rig: Rig<D>) {
    let (mut client, conn) = rig.accept();
    rig.turn();
    let mut hoard = Vec::new();
    while let Some(buf) = rig.driver.buffers().take() {
        hoard.push(buf);
    }
    rig.driver.receive(conn, true);
    let bytes = vec![5; 6 << 20];
    let expected = bytes.len();
    let writer = std::thread::spawn(move || client.write_all(&bytes).map(|()| client).unwrap());
    rig.until("shortage", |driver, _| driver.buffer_waits() > 0);
    for buf in hoard {
        rig.driver.buffers().give(buf);
    }
    let mut count = rig.received().len();
    let begun = Instant::now();
    while count < expected {
        assert!(begun.elapsed() < PATIENCE, "{count} of {expected} bytes");
        rig.turn();
        count += rig.received().len();
    }
    writer.join().unwrap();
}
pub fn small_sends_wait_for_room_and_arrive_whole<D: Driver>(mut rig: Rig<D>) {
    let (mut client, conn) = rig.accept();
    let (mut queued, mut sent) = (0, 0);
    // One at a time, as long as they are taken: the last one finds room for a part at most.
    while queued == sent {
        let message: Vec<u8> = (0..1000).map(|i| ((queued + i) % 251) as u8).collect();
        rig.send(conn, &message);
        queued += message.len();
        for _ in 0..20 {
            rig.turn();
            sent += sent_bytes(&mut rig.seen);
            if sent == queued {
                break;
            }
        }
        assert!(queued < 64 << 20, "the socket takes everything");
    }
    let mut bytes = vec![0; queued];
    let reader = std::thread::spawn(move || client.read_exact(&mut bytes).map(|()| bytes));
    rig.until("the rest", |_, seen| {
        sent += sent_bytes(seen);
        sent == queued
    });
    let bytes = reader.join().unwrap().unwrap();
    assert!(bytes.iter().enumerate().all(|(i, &byte)| byte == (i % 251) as u8));
}

fn sent_bytes(seen: &mut Vec<Completion>) -> usize {
    let bytes = |completion| match completion {
        Completion::Sent(_, bytes) => bytes as usize,
        other => panic!("{other:?}"),
    };
    seen.drain(..).map(bytes).sum()
}

pub fn a_small_send_to_a_broken_connection_fails<D: Driver>(mut rig: Rig<D>) {
    let (client, conn) = rig.accept();
    let free = rig.driver.buffers().free();
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    rig.send(conn, b"nobody reads this");
    rig.until("the failure", |_, seen| {
        seen.iter().any(|seen| matches!(seen, Completion::SendFailed(c) if *c == conn))
    });
    assert_eq!(rig.driver.buffers().free(), free, "no buffer was lost");
    assert!(!rig.seen.iter().any(|seen| matches!(seen, Completion::Sent(..))));
}

pub fn a_wait_ends_when_its_time_is_up<D: Driver>(mut rig: Rig<D>) {
    // A long wait leaves a timer behind, which must not hold up the short one after it.
    let (mut client, conn) = rig.accept();
    rig.driver.receive(conn, true);
    rig.turn();
    client.write_all(b"x").unwrap();
    for most in [5000, 50, 0, 20] {
        let most = Duration::from_millis(most);
        let begun = Instant::now();
        rig.driver.wait(Wait::for_one(most)).unwrap();
        let waited = begun.elapsed();
        assert!(waited < Duration::from_secs(2), "{waited:?} instead of {most:?}");
        while let Some(completion) = rig.driver.next() {
            rig.seen.push(completion);
        }
    }
    assert_eq!(rig.received(), b"x");
}

pub fn a_wait_for_many_where_others_want_the_core_ends_for_few<D: Driver>(mut rig: Rig<D>) {
    const MANY: usize = 8;
    let mut clients: Vec<_> = (0..MANY).map(|_| rig.accept()).collect();
    for (_, conn) in &clients {
        rig.driver.receive(*conn, true);
    }
    rig.turn();
    let batch = Duration::from_micros(50);
    let wait = |rig: &mut Rig<D>, most| {
        let most = Duration::from_millis(most);
        let wait = Wait { events: MANY as u32, batch, most, contended: true };
        let begun = Instant::now();
        let has_spare_time = rig.driver.wait(wait).unwrap();
        assert!(begun.elapsed() < PATIENCE / 2, "it waited for as many as there are never");
        while let Some(completion) = rig.driver.next() {
            rig.seen.push(completion);
        }
        has_spare_time
    };
    let long = 2 * PATIENCE.as_millis() as u64;
    assert!(wait(&mut rig, 20), "nothing has come");
    clients[0].0.write_all(b"x").unwrap();
    assert!(wait(&mut rig, long), "one byte has come");
    assert_eq!(rig.received(), b"x");
    // Not all of them may be there in time at once.
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < PATIENCE, "all have sent a byte, again and again");
        for (client, _) in &mut clients {
            client.write_all(b"y").unwrap();
        }
        if !wait(&mut rig, long) {
            break;
        }
    }
}
