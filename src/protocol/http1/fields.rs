//! Field lines of a head or a trailer section, and those of them that frame.

use super::{Ambiguity, Step, TEXT, TOKEN, Word, line_feed, run, unexpected};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    ContentLength,
    TransferEncoding,
    Connection,
    Upgrade,
    Expect,
    Other,
}

impl Field {
    const NAMES: [(&[u8], Self); 5] = [
        (b"content-length", Self::ContentLength),
        (b"transfer-encoding", Self::TransferEncoding),
        (b"connection", Self::Connection),
        (b"upgrade", Self::Upgrade),
        (b"expect", Self::Expect),
    ];

    fn named(word: &Word) -> Self {
        Self::NAMES.iter().find(|(name, _)| word.is(name)).map_or(Self::Other, |&(_, field)| field)
    }

    /// Why a value that is not in order is ambiguous.
    fn malformed(self) -> Ambiguity {
        match self {
            Self::ContentLength => Ambiguity::ContentLength,
            Self::TransferEncoding => Ambiguity::TransferEncoding,
            _ => Ambiguity::List,
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Part {
    LineStart,
    Name,
    Value(Field),
    Lf,
    LastLf,
}

/// What the fields say.
#[derive(Debug, Clone, Copy, Default)]
#[allow(clippy::struct_excessive_bools)] // Each is given independently of the others.
pub(super) struct Framing {
    pub(super) length: Option<u64>,
    pub(super) chunked: bool,
    pub(super) close: bool,
    pub(super) keep_alive: bool,
    pub(super) upgrade: bool,
    pub(super) expects_continue: bool,
}

impl Framing {
    /// Whether the connection lasts (RFC 9112, section 9.3).
    pub(super) fn keeps_alive(&self, is_1_1: bool) -> bool {
        !self.close && (is_1_1 || self.keep_alive)
    }
}

/// Field lines up to the empty one that ends them.
#[derive(Debug)]
pub(super) struct Fields {
    part: Part,
    /// The name under way, or the item of a value.
    word: Word,
    /// White space followed the item.
    item_over: bool,
    is_trailer: bool,
    framing: Framing,
}

impl Fields {
    pub(super) fn new() -> Self {
        let (part, word, framing) = (Part::LineStart, Word::default(), Framing::default());
        Self { part, word, item_over: false, is_trailer: false, framing }
    }

    pub(super) fn new_trailer() -> Self {
        Self { is_trailer: true, ..Self::new() }
    }

    pub(super) fn framing(&self) -> &Framing {
        &self.framing
    }

    pub(super) fn on_bytes(&mut self, bytes: &[u8]) -> Step {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            match self.part {
                Part::LineStart => match byte {
                    b'\r' => {
                        self.part = Part::LastLf;
                        at += 1;
                    }
                    b' ' | b'\t' => return Err(Ambiguity::Fold),
                    _ => self.part = Part::Name,
                },
                Part::Name => {
                    let token = run(&bytes[at..], TOKEN);
                    self.word.push(&bytes[at..at + token]);
                    at += token;
                    match bytes.get(at) {
                        None => break,
                        Some(b':') if !self.word.is_empty() => self.on_name()?,
                        Some(&byte) => return Err(unexpected(byte, Ambiguity::FieldName)),
                    }
                    at += 1;
                }
                Part::Value(field) => {
                    let text = run(&bytes[at..], TEXT);
                    self.on_value(field, &bytes[at..at + text])?;
                    at += text;
                    match bytes.get(at) {
                        None => break,
                        Some(b'\r') => self.on_value_end(field)?,
                        Some(&byte) => return Err(unexpected(byte, Ambiguity::FieldValue)),
                    }
                    at += 1;
                }
                Part::Lf => {
                    line_feed(byte)?;
                    self.part = Part::LineStart;
                    at += 1;
                }
                Part::LastLf => {
                    line_feed(byte)?;
                    return Ok(Some(at + 1));
                }
            }
        }
        Ok(None)
    }

    fn on_name(&mut self) -> Result<(), Ambiguity> {
        let field = Field::named(&self.word);
        let is_new = match field {
            Field::Other => true,
            _ if self.is_trailer => return Err(Ambiguity::Trailer),
            Field::ContentLength => self.framing.length.is_none(),
            Field::TransferEncoding => !self.framing.chunked,
            Field::Upgrade => {
                self.framing.upgrade = true;
                true
            }
            Field::Connection | Field::Expect => true,
        };
        if !is_new {
            let lengths = field == Field::ContentLength;
            let (several, coding) = (Ambiguity::ContentLengths, Ambiguity::TransferEncoding);
            return Err(if lengths { several } else { coding });
        }
        self.word.clear();
        self.part = Part::Value(field);
        Ok(())
    }

    /// Takes a value apart into items. Those of other fields do not matter.
    fn on_value(&mut self, field: Field, text: &[u8]) -> Result<(), Ambiguity> {
        if matches!(field, Field::Other | Field::Upgrade) {
            return Ok(());
        }
        for &byte in text {
            match byte {
                b' ' | b'\t' => self.item_over = !self.word.is_empty(),
                b',' if matches!(field, Field::Connection | Field::Expect) => {
                    self.on_item(field)?;
                }
                _ if self.item_over || byte == b',' => return Err(field.malformed()),
                _ => self.word.push(&[byte]),
            }
        }
        Ok(())
    }

    fn on_value_end(&mut self, field: Field) -> Result<(), Ambiguity> {
        self.on_item(field)?;
        self.part = Part::Lf;
        Ok(())
    }

    fn on_item(&mut self, field: Field) -> Result<(), Ambiguity> {
        let (word, framing) = (&self.word, &mut self.framing);
        match field {
            Field::ContentLength => {
                framing.length = Some(number(word).ok_or(Ambiguity::ContentLength)?);
            }
            Field::TransferEncoding if word.is(b"chunked") => framing.chunked = true,
            Field::TransferEncoding => return Err(Ambiguity::TransferEncoding),
            Field::Connection => match Field::named(word) {
                Field::ContentLength | Field::TransferEncoding => {
                    return Err(Ambiguity::FramingRemoved);
                }
                _ => {
                    framing.close |= word.is(b"close");
                    framing.keep_alive |= word.is(b"keep-alive");
                    framing.upgrade |= word.is(b"upgrade");
                }
            },
            Field::Expect => framing.expects_continue |= word.is(b"100-continue"),
            Field::Upgrade | Field::Other => {}
        }
        self.word.clear();
        self.item_over = false;
        Ok(())
    }
}

/// A number of nothing but digits: `parse` alone would take a sign.
fn number(word: &Word) -> Option<u64> {
    let digits = word.as_bytes().filter(|bytes| bytes.iter().all(u8::is_ascii_digit))?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}
