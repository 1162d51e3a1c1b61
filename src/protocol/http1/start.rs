//! Start lines: of a request, and of a response.

use super::head::StartLine;
use super::{Ambiguity, Method, Step, TARGET, TEXT, TOKEN, Word, line_feed, run, unexpected};

/// The version so far: bytes of it that were seen, and its minor number.
#[derive(Debug, Clone, Copy, Default)]
struct Version {
    seen: usize,
    is_1_1: bool,
}

impl Version {
    const MAJOR: &[u8] = b"HTTP/1.";

    /// Whether this was its last byte.
    fn on_byte(&mut self, byte: u8) -> Result<bool, Ambiguity> {
        let is_last = self.seen == Self::MAJOR.len();
        match (Self::MAJOR.get(self.seen), byte) {
            (Some(&expected), byte) if byte == expected => {}
            (None, b'0') => {}
            (None, b'1') => self.is_1_1 = true,
            _ => return Err(unexpected(byte, Ambiguity::Version)),
        }
        self.seen += 1;
        Ok(is_last)
    }
}

#[derive(Debug, Clone, Copy)]
enum RequestPart {
    Method,
    TargetStart,
    Target,
    Version,
    Cr,
    Lf,
}

/// `method target version`.
#[derive(Debug)]
pub(super) struct RequestLine {
    part: RequestPart,
    word: Word,
    version: Version,
    method: Method,
}

impl RequestLine {
    pub(super) fn new() -> Self {
        let (part, method) = (RequestPart::Method, Method::Other);
        Self { part, word: Word::default(), version: Version::default(), method }
    }

    pub(super) fn method(&self) -> Method {
        self.method
    }
}

impl StartLine for RequestLine {
    fn is_1_1(&self) -> bool {
        self.version.is_1_1
    }

    fn on_bytes(&mut self, bytes: &[u8]) -> Step {
        let mut at = 0;
        while at < bytes.len() {
            match self.part {
                RequestPart::Method => {
                    let token = run(&bytes[at..], TOKEN);
                    self.word.push(&bytes[at..at + token]);
                    at += token;
                    match bytes.get(at) {
                        None => break,
                        Some(b' ') if !self.word.is_empty() => {}
                        Some(&byte) => return Err(unexpected(byte, Ambiguity::StartLine)),
                    }
                    self.method = Method::named(&self.word)?;
                    self.part = RequestPart::TargetStart;
                }
                RequestPart::TargetStart if run(&bytes[at..=at], TARGET) == 0 => {
                    return Err(unexpected(bytes[at], Ambiguity::StartLine));
                }
                RequestPart::TargetStart => self.part = RequestPart::Target,
                RequestPart::Target => {
                    at += run(&bytes[at..], TARGET);
                    match bytes.get(at) {
                        None => break,
                        Some(b' ') => self.part = RequestPart::Version,
                        Some(b'\r') => return Err(Ambiguity::Version),
                        Some(&byte) => return Err(unexpected(byte, Ambiguity::StartLine)),
                    }
                }
                RequestPart::Version => {
                    if self.version.on_byte(bytes[at])? {
                        self.part = RequestPart::Cr;
                    }
                }
                RequestPart::Cr if bytes[at] == b'\r' => self.part = RequestPart::Lf,
                RequestPart::Cr => return Err(unexpected(bytes[at], Ambiguity::Version)),
                RequestPart::Lf => {
                    line_feed(bytes[at])?;
                    return Ok(Some(at + 1));
                }
            }
            at += 1;
        }
        Ok(None)
    }
}

#[derive(Debug, Clone, Copy)]
enum StatusPart {
    Version,
    Space,
    Code,
    CodeEnd,
    Reason,
    Lf,
}

/// `version status reason`.
#[derive(Debug)]
pub(super) struct StatusLine {
    part: StatusPart,
    version: Version,
    status: u16,
}

impl StatusLine {
    pub(super) fn new() -> Self {
        Self { part: StatusPart::Version, version: Version::default(), status: 0 }
    }

    pub(super) fn status(&self) -> u16 {
        self.status
    }
}

impl StartLine for StatusLine {
    fn is_1_1(&self) -> bool {
        self.version.is_1_1
    }

    fn on_bytes(&mut self, bytes: &[u8]) -> Step {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            match (self.part, byte) {
                (StatusPart::Version, _) => {
                    if self.version.on_byte(byte)? {
                        self.part = StatusPart::Space;
                    }
                }
                (StatusPart::Space, b' ') => self.part = StatusPart::Code,
                (StatusPart::Code, b'0'..=b'9') => {
                    self.status = self.status * 10 + u16::from(byte - b'0');
                    if !(1..600).contains(&self.status) {
                        return Err(Ambiguity::Status);
                    }
                    if self.status >= 100 {
                        self.part = StatusPart::CodeEnd;
                    }
                }
                // Many servers leave out the space before an empty reason.
                (StatusPart::CodeEnd | StatusPart::Reason, b'\r') => self.part = StatusPart::Lf,
                (StatusPart::CodeEnd, b' ') => self.part = StatusPart::Reason,
                (StatusPart::Reason, _) => {
                    let text = run(&bytes[at..], TEXT);
                    if text == 0 {
                        return Err(unexpected(byte, Ambiguity::StartLine));
                    }
                    at += text - 1;
                }
                (StatusPart::Lf, _) => {
                    line_feed(byte)?;
                    return Ok(Some(at + 1));
                }
                _ => return Err(unexpected(byte, Ambiguity::StartLine)),
            }
            at += 1;
        }
        Ok(None)
    }
}
