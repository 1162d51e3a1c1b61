//! Frames of known bytes. A header says whose frame it is and how long; the payload follows from
//! the id, so that both ends check every byte without keeping any.
//!
//! A frame is a line of text, and as such a request of Chronos or the answer to one:
//! `GET 00000000000000a7 00064 00128 payload…\n`.

use std::io::{self, ErrorKind, IoSlice, Write};
use std::sync::LazyLock;

/// Bytes of a header, which a frame's length includes.
pub const HEADER: usize = 33;
/// The shortest frame: a header and the line feed.
pub const FRAME_MIN: usize = HEADER + 1;
/// The longest frame.
pub const FRAME_MAX: usize = 64 * 1024;

/// Payloads start at as many different places of the pattern.
const STARTS: u64 = 8191;

static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut rng = fastrand::Rng::with_seed(7);
    std::iter::repeat_with(|| rng.u8(b'!'..=b'~')).take(FRAME_MAX + STARTS as usize).collect()
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
        let mut bytes = *b"GET ................ ..... ..... ";
        let digit = |value: u64| b"0123456789abcdef"[value as usize];
        for (i, byte) in bytes[4..20].iter_mut().enumerate() {
            *byte = digit(self.id >> (60 - 4 * i) & 15);
        }
        for (at, mut number) in [(21, self.len), (27, self.reply)] {
            for byte in bytes[at..at + 5].iter_mut().rev() {
                *byte = digit(u64::from(number % 10));
                number /= 10;
            }
        }
        bytes
    }

    fn decode(bytes: [u8; HEADER]) -> Result<Self, String> {
        let text = str::from_utf8(&bytes).unwrap_or_default();
        let number = |at: usize| text.get(at..at + 5).and_then(|digits| digits.parse().ok());
        let id = text.get(4..20).and_then(|digits| u64::from_str_radix(digits, 16).ok());
        let frame = match (id, number(21), number(27)) {
            (Some(id), Some(len), Some(reply)) => Self { id, len, reply },
            _ => return Err(format!("wrong bytes: no header looks like {bytes:02x?}")),
        };
        if frame.encode() != bytes {
            return Err(format!("wrong bytes: no header looks like {bytes:02x?}"));
        }
        let possible = |len: u32| (FRAME_MIN..=FRAME_MAX).contains(&(len as usize));
        if possible(frame.len) && (frame.reply == 0 || possible(frame.reply)) {
            Ok(frame)
        } else {
            Err(format!("wrong bytes: no frame looks like {frame:?}"))
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
        let body = self.frame.len as usize - FRAME_MIN;
        let payload = &payload(self.frame.id)[..body];
        while self.sent < self.frame.len as usize {
            let header = &header[self.sent.min(HEADER)..];
            let payload = &payload[self.sent.saturating_sub(HEADER).min(body)..];
            let parts = [header, payload, b"\n"].map(IoSlice::new);
            match stream.write_vectored(&parts) {
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
#[derive(Debug)]
pub struct Incoming {
    header: [u8; HEADER],
    received: usize,
}

impl Default for Incoming {
    fn default() -> Self {
        Self { header: [0; HEADER], received: 0 }
    }
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
        let body = frame.len as usize - 1 - self.received;
        let (these, feed) = these.split_at(some.min(body));
        if these != &payload(frame.id)[self.received - HEADER..][..these.len()]
            || feed.iter().any(|&byte| byte != b'\n')
        {
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
