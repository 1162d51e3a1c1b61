//! Bodies: of a known length, in chunks, or until the connection closes.

use super::fields::Fields;
use super::{Ambiguity, Length, Step, TEXT, line_feed, run, unexpected};

#[derive(Debug)]
pub(super) enum Body {
    /// As many bytes are missing.
    Length(u64),
    Chunked(Chunked),
    UntilClose,
}

impl Body {
    pub(super) fn chunked() -> Self {
        Self::Chunked(Chunked { part: Part::Size { digits: 0 }, left: 0, length: Length(0) })
    }

    pub(super) fn on_bytes(&mut self, bytes: &[u8]) -> Step {
        match self {
            Self::Length(left) => {
                let taken = skip(left, bytes.len());
                Ok((*left == 0).then_some(taken))
            }
            Self::Chunked(chunked) => chunked.on_bytes(bytes),
            Self::UntilClose => Ok(None),
        }
    }
}

/// Takes as many of `available` bytes as are left, and says how many.
fn skip(left: &mut u64, available: usize) -> usize {
    let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(available);
    *left -= taken as u64;
    taken
}

#[derive(Debug)]
enum Part {
    Size { digits: u8 },
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    Trailer(Fields),
}

/// Chunks, the last one, and the trailer section.
#[derive(Debug)]
pub(super) struct Chunked {
    part: Part,
    /// The size of the chunk under way, then what is missing of it.
    left: u64,
    /// Of the line before the chunk, or of the trailer section.
    length: Length,
}

impl Chunked {
    /// As many hexadecimal digits as 64 bits hold.
    const DIGITS_MAX: u8 = 16;

    fn on_bytes(&mut self, bytes: &[u8]) -> Step {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            let taken = match &mut self.part {
                Part::Data => {
                    let taken = skip(&mut self.left, bytes.len() - at);
                    if self.left == 0 {
                        self.part = Part::DataCr;
                    }
                    taken
                }
                Part::Trailer(fields) => {
                    let end = fields.on_bytes(&bytes[at..])?;
                    self.length.add(end.unwrap_or(bytes.len() - at))?;
                    return Ok(end.map(|end| at + end));
                }
                Part::Extension => {
                    let text = run(&bytes[at..], TEXT);
                    self.length.add(text)?;
                    if text == 0 { self.on_byte(byte)? } else { text }
                }
                _ => self.on_byte(byte)?,
            };
            at += taken;
        }
        Ok(None)
    }

    fn on_byte(&mut self, byte: u8) -> Result<usize, Ambiguity> {
        self.length.add(1)?;
        self.part = match (&self.part, byte) {
            (Part::Size { digits }, _) if byte.is_ascii_hexdigit() => {
                if *digits == Self::DIGITS_MAX {
                    return Err(Ambiguity::ChunkSize);
                }
                let digit = char::from(byte).to_digit(16).unwrap_or_default();
                self.left = self.left << 4 | u64::from(digit);
                Part::Size { digits: digits + 1 }
            }
            (Part::Size { digits: 1.. }, b';') => Part::Extension,
            (Part::Size { digits: 1.. } | Part::Extension, b'\r') => Part::SizeLf,
            (Part::SizeLf, _) => {
                line_feed(byte)?;
                self.length = Length(0);
                if self.left == 0 { Part::Trailer(Fields::new_trailer()) } else { Part::Data }
            }
            (Part::DataCr, b'\r') => Part::DataLf,
            (Part::DataLf, b'\n') => {
                self.length = Length(0);
                Part::Size { digits: 0 }
            }
            (Part::DataCr | Part::DataLf, _) => return Err(Ambiguity::ChunkEnd),
            _ => return Err(unexpected(byte, Ambiguity::ChunkSize)),
        };
        Ok(1)
    }
}
