//! Bulk between joined connections, which the kernel moves by itself.

use super::*;

pub fn bulk_between_joined_connections_is_spliced_and_arrives_whole_with_its_end<D: Driver>(
    mut rig: Rig<D>,
) {
    let (mut writer, mut reader, mut relayed) = rig.join();
    let free = rig.driver.buffers().free();
    let bytes = pattern(BULK);
    let expected = bytes.clone();
    let (done, reads) = std::sync::mpsc::channel();
    std::thread::spawn(move || writer.write_all(&bytes));
    std::thread::spawn(move || {
        let mut received = vec![0; BULK];
        let mut at = 0;
        // Now and then slower than the writer, so that pipes fill.
        for piece in [1000, 256 << 10, 1 << 20].iter().cycle() {
            let end = BULK.min(at + piece);
            reader.read_exact(&mut received[at..end]).unwrap();
            at = end;
            if at.is_multiple_of(5) {
                std::thread::sleep(Duration::from_millis(2));
            }
            if at == BULK {
                break;
            }
        }
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "more than was sent");
        done.send(received).unwrap();
    });
    let mut received = None;
    rig.relay_until("everything", &mut relayed, |_| {
        received = reads.try_recv().ok();
        received.is_some()
    });
    assert!(received.unwrap() == expected, "wrong bytes");
    assert_eq!((relayed.sent, relayed.received + relayed.spliced), (BULK, BULK));
    assert!(relayed.spliced > BULK / 8, "only {} bytes were spliced", relayed.spliced);
    // What was provided to the kernel for bulk comes back as it is used.
    let (mut writer, _reader, mut relayed) = rig.join();
    for message in 1..=usize::from(BUFFER_RING_ENTRIES) {
        writer.write_all(b".").unwrap();
        rig.relay_until("a message", &mut relayed, |relayed| relayed.received == message);
    }
    assert!(rig.driver.buffers().free() >= free, "no buffer was lost");
}

pub fn after_bulk_small_messages_are_received_at_once_again<D: Driver>(mut rig: Rig<D>) {
    let (mut writer, mut reader, mut relayed) = rig.join();
    for round in 0..3 {
        let bulk = pattern(4 << 20);
        let total = relayed.sent + bulk.len();
        let mut back = vec![0; bulk.len()];
        let mut sender = writer.try_clone().unwrap();
        let mut other = reader.try_clone().unwrap();
        std::thread::spawn(move || sender.write_all(&bulk));
        let taken = std::thread::spawn(move || other.read_exact(&mut back));
        rig.relay_until("bulk", &mut relayed, |relayed| relayed.sent == total);
        taken.join().unwrap().unwrap();
        let spliced = relayed.spliced;
        assert!(round > 0 || spliced > 1 << 20, "only {spliced} bytes were spliced");
        for message in 0..20_u8 {
            let sent = relayed.sent;
            writer.write_all(&[message; 100]).unwrap();
            rig.relay_until("a message", &mut relayed, |relayed| relayed.sent == sent + 100);
            let mut reply = [0; 100];
            reader.read_exact(&mut reply).unwrap();
            assert_eq!(reply, [message; 100]);
        }
        let small = (relayed.spliced - spliced) / 100;
        assert!(small < 10, "{small} of 20 small messages were spliced");
    }
}

pub fn a_reader_that_resets_in_the_midst_of_bulk_is_noticed<D: Driver>(mut rig: Rig<D>) {
    let (mut writer, reader, mut relayed) = rig.join();
    std::thread::spawn(move || {
        let bytes = pattern(1 << 20);
        while writer.write_all(&bytes).is_ok() {}
    });
    let mut turns_without = 0;
    let mut last = 0;
    rig.relay_until("a stall", &mut relayed, |relayed| {
        turns_without = if relayed.sent == last { turns_without + 1 } else { 0 };
        last = relayed.sent;
        relayed.spliced > 0 && turns_without > 20
    });
    nothing_lingers(&reader);
    drop(reader);
    rig.relay_until("the failure", &mut relayed, |relayed| relayed.failed == Some(relayed.to));
    rig.driver.close(relayed.from, Close::Reset);
    rig.driver.close(relayed.to, Close::Reset);
    for _ in 0..3 {
        rig.turn();
    }
}

pub fn a_sender_that_resets_in_the_midst_of_bulk_is_noticed<D: Driver>(mut rig: Rig<D>) {
    let (mut writer, _reader, mut relayed) = rig.join();
    writer.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let stalled = std::thread::spawn(move || {
        let bytes = pattern(1 << 20);
        while writer.write_all(&bytes).is_ok() {}
        writer
    });
    rig.relay_until("a stall", &mut relayed, |_| stalled.is_finished());
    assert!(relayed.spliced > 0);
    let writer = stalled.join().unwrap();
    nothing_lingers(&writer);
    drop(writer);
    rig.relay_until("the failure", &mut relayed, |relayed| relayed.failed == Some(relayed.from));
}

pub fn more_stalled_bulk_streams_than_pipes_lose_no_byte<D: Driver>(mut rig: Rig<D>) {
    const TOTAL: usize = 12 << 20;
    let expected = std::sync::Arc::new(pattern(TOTAL));
    let (mut relayed, mut readers, mut writers) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..PIPES_MAX + 4 {
        let (writer, reader, pair) = rig.join();
        writers.push(writer);
        readers.push(reader);
        relayed.push(pair);
    }
    for mut writer in writers {
        let bytes = std::sync::Arc::clone(&expected);
        // As much as fits before anybody reads, then the rest.
        std::thread::spawn(move || writer.write_all(&bytes));
    }
    let progress = |relayed: &[Relayed]| -> usize {
        relayed.iter().map(|pair| pair.sent + pair.received + pair.spliced).sum()
    };
    let mut idle = 0;
    while idle < 30 {
        let before = progress(&relayed);
        rig.relay(&mut relayed);
        idle = if progress(&relayed) == before { idle + 1 } else { 0 };
    }
    let stuck = relayed.iter().filter(|pair| pair.spliced > pair.sent).count();
    assert!(stuck <= PIPES_MAX, "{stuck} streams hold a pipe");
    let threads: Vec<_> = readers
        .into_iter()
        .map(|mut reader| {
            let expected = std::sync::Arc::clone(&expected);
            std::thread::spawn(move || {
                let mut bytes = vec![0; TOTAL];
                reader.read_exact(&mut bytes).unwrap();
                assert!(bytes == *expected, "wrong bytes");
                assert_eq!(reader.read(&mut [0]).unwrap(), 0);
            })
        })
        .collect();
    let begun = Instant::now();
    while !threads.iter().all(std::thread::JoinHandle::is_finished) {
        assert!(begun.elapsed() < PATIENCE, "bytes are missing");
        rig.relay(&mut relayed);
    }
    for thread in threads {
        thread.join().unwrap();
    }
}
