//! Where messages of HTTP/1 begin and end, as RFC 9112 frames them.
//!
//! What two readers could take for two different things is [`Ambiguity`], never a guess: its bytes
//! may be passed on, but the connection they came on, and the one they go to, serve nobody else.

mod body;
mod fields;
mod head;
mod protocol;
mod request;
mod response;
mod start;
#[cfg(test)]
mod tests;

pub use protocol::Http1;
pub use request::RequestScanner;
pub use response::ResponseScanner;

/// What a scanner says of the bytes given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// All of them belong to the message, which goes on.
    Partial,
    /// The message is over after this many of them.
    Complete(usize),
    /// The head of a response is over after this many of them, and HTTP ends with it: all that
    /// follows, in both directions, is opaque. Requests never say so.
    Tunnel(usize),
    /// The message can be read in more than one way, or not at all: it is opaque from its first
    /// byte, and so is all that follows it. The scanner says the same from now on.
    Ambiguous(Ambiguity),
}

/// Why it is not certain where a message ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Ambiguity {
    /// Not `method target version`, or `version status reason`, with single spaces.
    #[error("malformed start line")]
    StartLine,
    /// A known method in other letters: servers that do not mind the case frame it differently.
    #[error("method in the wrong case")]
    MethodCase,
    /// Neither HTTP/1.1 nor HTTP/1.0, or none at all.
    #[error("version other than HTTP/1.1 and HTTP/1.0")]
    Version,
    /// A status that no class is known for.
    #[error("status out of range")]
    Status,
    /// A carriage return without a line feed.
    #[error("carriage return without a line feed")]
    BareCr,
    /// A line feed without a carriage return.
    #[error("line feed without a carriage return")]
    BareLf,
    /// A field name with a byte that no token has, such as white space before the colon.
    #[error("malformed field name")]
    FieldName,
    /// A field value with a control character.
    #[error("control character in a field value")]
    FieldValue,
    /// A line that begins with white space.
    #[error("folded field line")]
    Fold,
    /// `Content-Length` is not one decimal number.
    #[error("Content-Length is not one number")]
    ContentLength,
    /// `Content-Length` is given more than once.
    #[error("more than one Content-Length")]
    ContentLengths,
    /// `Transfer-Encoding` is not `chunked` alone, or given more than once.
    #[error("Transfer-Encoding is not chunked alone")]
    TransferEncoding,
    /// Both `Content-Length` and `Transfer-Encoding`.
    #[error("both Content-Length and Transfer-Encoding")]
    LengthAndEncoding,
    /// `Transfer-Encoding` in HTTP/1.0, which does not know it.
    #[error("Transfer-Encoding in HTTP/1.0")]
    EncodingInHttp10,
    /// A body where there cannot be one.
    #[error("body in a message that cannot have one")]
    Body,
    /// `Connection` or `Expect` is no list of words.
    #[error("malformed list of words")]
    List,
    /// `Connection` names a field that frames the message, so that a recipient may remove it.
    #[error("Connection names a field that frames the message")]
    FramingRemoved,
    /// A chunk's size is no hexadecimal number, or has more than 16 digits.
    #[error("malformed chunk size")]
    ChunkSize,
    /// A chunk's data does not end where its size says.
    #[error("malformed end of a chunk")]
    ChunkEnd,
    /// A trailer field that belongs in the head.
    #[error("framing field in the trailer section")]
    Trailer,
    /// More than [`HTTP1_HEAD_MAX`](crate::limits::HTTP1_HEAD_MAX) bytes.
    #[error("head, trailer section or chunk line too long")]
    TooLong,
    /// Bytes of a response to no request.
    #[error("response to no request")]
    Unsolicited,
}

/// The method of a request, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Method {
    Get,
    Head,
    Options,
    Trace,
    Put,
    Delete,
    Post,
    Connect,
    Other,
}

impl Method {
    const NAMES: [(&[u8], Self); 8] = [
        (b"GET", Self::Get),
        (b"HEAD", Self::Head),
        (b"OPTIONS", Self::Options),
        (b"TRACE", Self::Trace),
        (b"PUT", Self::Put),
        (b"DELETE", Self::Delete),
        (b"POST", Self::Post),
        (b"CONNECT", Self::Connect),
    ];

    /// Whether the request may be sent twice (RFC 9110, section 9.2.2).
    pub fn is_idempotent(self) -> bool {
        use Method::{Delete, Get, Head, Options, Put, Trace};
        matches!(self, Get | Head | Options | Trace | Put | Delete)
    }

    fn named(word: &Word) -> Result<Self, Ambiguity> {
        match Self::NAMES.iter().find(|(name, _)| word.is(name)) {
            None => Ok(Self::Other),
            Some(&(name, method)) if word.as_bytes() == Some(name) => Ok(method),
            Some(_) => Err(Ambiguity::MethodCase),
        }
    }
}

/// What a part of a message says of the bytes given: where it ended, if it did.
type Step = Result<Option<usize>, Ambiguity>;

/// Counts the bytes of something that must not be longer than [`crate::limits::HTTP1_HEAD_MAX`].
#[derive(Debug, Clone, Copy, Default)]
struct Length(usize);

impl Length {
    fn add(&mut self, bytes: usize) -> Result<(), Ambiguity> {
        self.0 += bytes;
        if self.0 > crate::limits::HTTP1_HEAD_MAX { Err(Ambiguity::TooLong) } else { Ok(()) }
    }
}

/// A word that comes in pieces, remembered as far as any known one goes.
#[derive(Debug, Clone, Copy, Default)]
struct Word {
    bytes: [u8; Self::MAX],
    /// Larger than `MAX`: too long to be known.
    len: usize,
}

impl Word {
    /// The digits of the largest number; every known name is shorter.
    const MAX: usize = 20;

    fn push(&mut self, bytes: &[u8]) {
        let end = self.len.saturating_add(bytes.len());
        if let Some(room) = self.bytes.get_mut(self.len..end) {
            room.copy_from_slice(bytes);
        }
        self.len = end.min(Self::MAX + 1);
    }

    fn clear(&mut self) {
        self.len = 0;
    }

    fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// None: it is too long to be known.
    fn as_bytes(&self) -> Option<&[u8]> {
        self.bytes.get(..self.len)
    }

    fn is(&self, name: &[u8]) -> bool {
        self.as_bytes().is_some_and(|bytes| bytes.eq_ignore_ascii_case(name))
    }
}

/// Bytes of a token.
const TOKEN: u8 = 1;
/// Bytes of a field value or a reason phrase.
const TEXT: u8 = 2;
/// Bytes of a request target.
const TARGET: u8 = 4;

const CLASSES: [u8; 256] = {
    let mut classes = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let b = byte as u8;
        let is_token = b.is_ascii_alphanumeric()
            || matches!(
                b,
                b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
            );
        if is_token {
            classes[byte] |= TOKEN;
        }
        if b == b'\t' || b >= b' ' && b != 0x7f {
            classes[byte] |= TEXT;
        }
        if b.is_ascii_graphic() {
            classes[byte] |= TARGET;
        }
        byte += 1;
    }
    classes
};

/// How many of the first bytes are of a class.
fn run(bytes: &[u8], class: u8) -> usize {
    let other = |&byte: &u8| CLASSES[usize::from(byte)] & class == 0;
    bytes.iter().position(other).unwrap_or(bytes.len())
}

/// What a byte is where a line's text was to go on or to end: the reason to give up.
fn unexpected(byte: u8, otherwise: Ambiguity) -> Ambiguity {
    if byte == b'\n' { Ambiguity::BareLf } else { otherwise }
}

/// The byte after a carriage return.
fn line_feed(byte: u8) -> Result<(), Ambiguity> {
    if byte == b'\n' { Ok(()) } else { Err(Ambiguity::BareCr) }
}
