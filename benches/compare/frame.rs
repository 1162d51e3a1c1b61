//! Frames of known bytes. A header says whose frame it is and how long; the payload follows from
//! the id, so that both ends check every byte without keeping any.

use std::io::{self, ErrorKind, IoSlice, Write};
use std::sync::LazyLock;

/// Bytes of a header, which a frame's length includes.
pub const HEADER: usize = 16;
/// The longest frame.
pub const FRAME_MAX: usize = 64 * 1024;

/// Payloads start at as many different places of the pattern.
const STARTS: u64 = 8191;

static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut rng = fastrand::Rng::with_seed(7);
    std::iter::repeat_with(|| rng.u8(..)).take(FRAME_MAX + STARTS as usize).collect()
});

fn payload(id: u64) -> &'static [u8] {
    let start = (id.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) % STARTS;
    &PATTERN[start as usize..]
}

/// What a frame says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Names the frame and decides its payload; a reply repeats its request's.
    pub id: u64,
    /// Bytes, the header's included.
    pub len: u32,
    /// Bytes of the reply that is asked for; 0 for none.
    pub reply: u32,
}

impl Frame {
    fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&self.id.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_be_bytes());
        bytes[12..].copy_from_slice(&self.reply.to_be_bytes());
        bytes
    }

    fn decode(bytes: [u8; HEADER]) -> Result<Self, String> {
        let word =
            |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let id = u64::from(word(0)) << 32 | u64::from(word(4));
        let frame = Self { id, len: word(8), reply: word(12) };
        let possible = |len: u32| (HEADER..=FRAME_MAX).contains(&(len as usize));
        if possible(frame.len) && (frame.reply == 0 || possible(frame.reply)) {
            Ok(frame)
        } else {
            Err(format!("wrong bytes: no header looks like {bytes:02x?}"))
        }
    }
}

/// A frame on its way out.
#[derive(Debug)]
pub struct Outgoing {
    frame: Frame,
    sent: usize,
}

impl Outgoing {
    /// None of it was sent.
    pub fn new(frame: Frame) -> Self {
        Self { frame, sent: 0 }
    }

    /// Writes what the stream takes. Says whether that was all of it.
    pub fn write(&mut self, stream: &mut impl Write) -> io::Result<bool> {
        let header = self.frame.encode();
        let payload = &payload(self.frame.id)[..self.frame.len as usize - HEADER];
        while self.sent < self.frame.len as usize {
            let header = &header[self.sent.min(HEADER)..];
            let payload = &payload[self.sent.saturating_sub(HEADER)..];
            match stream.write_vectored(&[IoSlice::new(header), IoSlice::new(payload)]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// The frame that is coming in.
#[derive(Debug, Default)]
pub struct Incoming {
    header: [u8; HEADER],
    received: usize,
}

impl Incoming {
    /// Takes bytes from the front of `bytes` up to the frame's end, checking each. Gives the frame
    /// once it is complete.
    pub fn read(&mut self, bytes: &mut &[u8]) -> Result<Option<Frame>, String> {
        if self.received < HEADER {
            let some = bytes.len().min(HEADER - self.received);
            self.header[self.received..self.received + some].copy_from_slice(&bytes[..some]);
            self.received += some;
            *bytes = &bytes[some..];
            if self.received < HEADER {
                return Ok(None);
            }
        }
        let frame = Frame::decode(self.header)?;
        let some = bytes.len().min(frame.len as usize - self.received);
        let (these, rest) = bytes.split_at(some);
        if these != &payload(frame.id)[self.received - HEADER..][..some] {
            let (id, at) = (frame.id, self.received);
            return Err(format!("wrong bytes: frame {id:#x}, among the {some} from byte {at} on"));
        }
        self.received += some;
        *bytes = rest;
        if self.received < frame.len as usize {
            return Ok(None);
        }
        self.received = 0;
        Ok(Some(frame))
    }
}
