//! What was captured of one client's connection: records in one piece of memory.
//!
//! A worker writes them, and the program that asked for them reads them and makes a file of them. Each
//! takes less here than there, and what the file takes is counted, so that one bound holds for both.

use std::time::Duration;

use crate::limits::BUFFER_SIZE;

/// Bytes of a record in front of what was captured: when, what, and how many bytes.
const HEADER: usize = 8 + 1 + 4;

/// Bytes of a packet in the file in front of its payload: its own header, those of IPv6 and of TCP.
pub const PACKET_HEADERS: usize = 16 + 40 + 20;

/// Bytes of the file in front of its packets.
pub const FILE_HEADER: usize = 24;

/// Packets of the file without payload: three that begin the connection, and its ends.
const PACKETS_WITHOUT_PAYLOAD: usize = 3 + What::ENDS;

/// Bytes of a file without any payload.
pub const FILE_BYTES_MIN: usize = FILE_HEADER + PACKETS_WITHOUT_PAYLOAD * PACKET_HEADERS;

/// What has happened on a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum What {
    /// The client sent these bytes.
    Received,
    /// These were given to its connection.
    Sent,
    /// The client ended its direction.
    ClientEnded,
    /// The proxy ended its own.
    ProxyEnded,
    /// The connection broke, or the client reset it.
    ClientReset,
    /// The proxy reset it.
    ProxyReset,
}

impl What {
    const ALL: [Self; 6] = [
        Self::Received,
        Self::Sent,
        Self::ClientEnded,
        Self::ProxyEnded,
        Self::ClientReset,
        Self::ProxyReset,
    ];

    /// How many of them have no payload. Each comes once.
    const ENDS: usize = 4;
}

/// One thing that has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// When, counted from the begin.
    pub at: Duration,
    /// What.
    pub what: What,
    /// The payload, or the begin of it where there was no room for all.
    pub payload: &'a [u8],
}

/// Records, and the memory for them.
#[derive(Debug)]
pub struct Capture {
    memory: Vec<u8>,
    /// Bytes that packets with payload may take in the file…
    room_max: usize,
    /// …and those that they may take yet.
    room: usize,
    /// A bit for each end that is there already.
    ends: u8,
    payload: u64,
}

impl Capture {
    /// An empty one for a file of at most so many bytes. It never needs more memory than this.
    pub fn new(file_bytes_max: usize) -> Self {
        assert!(file_bytes_max > FILE_BYTES_MIN, "no room for any payload");
        let room_max = file_bytes_max - FILE_BYTES_MIN;
        let memory = Vec::with_capacity(room_max + What::ENDS * HEADER);
        Self { memory, room_max, room: room_max, ends: 0, payload: 0 }
    }

    /// Adds bytes that were received or sent. Says whether all of them found room.
    pub fn add(&mut self, at: Duration, what: What, payload: &[u8]) -> bool {
        debug_assert!(matches!(what, What::Received | What::Sent), "{what:?} has no payload");
        debug_assert!(payload.len() <= BUFFER_SIZE, "more than a packet can hold");
        let taken = payload.len().min(self.room.saturating_sub(PACKET_HEADERS));
        if taken > 0 {
            self.room -= PACKET_HEADERS + taken;
            self.payload += taken as u64;
            self.write(at, what, &payload[..taken]);
        }
        taken == payload.len()
    }

    /// Whether there is no room for another byte.
    pub fn is_full(&self) -> bool {
        self.room <= PACKET_HEADERS
    }

    /// Adds an end, if it is the first of its kind.
    pub fn add_end(&mut self, at: Duration, what: What) {
        debug_assert!(!matches!(what, What::Received | What::Sent), "{what:?} is no end");
        let bit = 1 << what as u8;
        if self.ends & bit == 0 {
            self.ends |= bit;
            self.write(at, what, &[]);
        }
    }

    /// Forgets all of it.
    pub fn clear(&mut self) {
        self.memory.clear();
        (self.room, self.ends, self.payload) = (self.room_max, 0, 0);
    }

    fn write(&mut self, at: Duration, what: What, payload: &[u8]) {
        let nanos = u64::try_from(at.as_nanos()).unwrap_or(u64::MAX);
        self.memory.extend_from_slice(&nanos.to_le_bytes());
        self.memory.push(what as u8);
        self.memory.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        self.memory.extend_from_slice(payload);
    }

    /// Bytes captured, in both directions.
    pub fn payload(&self) -> u64 {
        self.payload
    }

    /// The records, to be read by [`records`].
    pub fn as_bytes(&self) -> &[u8] {
        &self.memory
    }
}

/// Reads records up to the first that is none.
pub fn records(mut bytes: &[u8]) -> impl Iterator<Item = Record<'_>> {
    std::iter::from_fn(move || {
        let (record, rest) = read(bytes)?;
        bytes = rest;
        Some(record)
    })
}

fn read(bytes: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let (nanos, bytes) = bytes.split_first_chunk()?;
    let (&what, bytes) = bytes.split_first()?;
    let (len, bytes) = bytes.split_first_chunk()?;
    let (payload, rest) = bytes.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    let what = *What::ALL.get(usize::from(what))?;
    Some((Record { at: Duration::from_nanos(u64::from_le_bytes(*nanos)), what, payload }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Duration = Duration::from_nanos(7);

    #[test]
    fn what_was_added_is_read_in_order_and_each_end_once() {
        let mut capture = Capture::new(4096);
        assert!(capture.add(AT, What::Received, b"ask"));
        assert!(capture.add(2 * AT, What::Sent, b"answer"));
        for what in [What::ClientEnded, What::ProxyEnded, What::ClientEnded, What::ProxyReset] {
            capture.add_end(3 * AT, what);
        }
        let record = |at, what, payload| Record { at, what, payload };
        let wanted = [
            record(AT, What::Received, &b"ask"[..]),
            record(2 * AT, What::Sent, b"answer"),
            record(3 * AT, What::ClientEnded, b""),
            record(3 * AT, What::ProxyEnded, b""),
            record(3 * AT, What::ProxyReset, b""),
        ];
        assert_eq!(records(capture.as_bytes()).collect::<Vec<_>>(), wanted);
        assert_eq!(capture.payload(), 9);
    }

    #[test]
    fn what_does_not_fit_is_cut_at_the_bound_and_the_memory_does_not_grow() {
        for max in FILE_BYTES_MIN + 1..FILE_BYTES_MIN + 400 {
            let mut capture = Capture::new(max);
            let memory = capture.memory.capacity();
            while capture.add(AT, What::Received, &[7; 50]) {}
            assert!(capture.is_full() && !capture.add(AT, What::Sent, b"x"));
            for what in &What::ALL[2..] {
                capture.add_end(AT, *what);
            }
            let packets = records(capture.as_bytes()).map(|one| PACKET_HEADERS + one.payload.len());
            let file = FILE_HEADER + 3 * PACKET_HEADERS + packets.sum::<usize>();
            assert!(file <= max && file + PACKET_HEADERS + 50 > max, "{file} of {max}");
            assert_eq!(capture.memory.capacity(), memory);
        }
    }

    #[test]
    fn what_is_cut_off_or_no_record_ends_the_reading() {
        let mut capture = Capture::new(4096);
        capture.add(AT, What::Received, b"ask");
        capture.add(AT, What::Sent, b"answer");
        let whole = capture.as_bytes();
        for len in 0..whole.len() {
            let wanted = usize::from(len >= HEADER + 3);
            assert_eq!(records(&whole[..len]).count(), wanted, "{len} bytes");
        }
        let mut unknown = whole.to_vec();
        unknown[8] = 6;
        assert_eq!(records(&unknown).count(), 0);
    }
}
