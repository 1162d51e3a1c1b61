//! Where request lines end, and what they ask for.

/// Bytes of a request line, its `\n` included, that the server reads at once.
pub const LINE_MAX: usize = 512;

/// Where request lines of a stream end.
#[derive(Debug)]
pub struct RequestScanner {
    /// Bytes of the line under way that were seen, counted no further than one above `line_max`.
    seen: usize,
    line_max: usize,
}

/// The end of a request line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineEnd {
    /// The line is over after this many of the bytes given.
    Whole(usize),
    /// Likewise, but it is longer than the server takes: answer it with an error.
    TooLong(usize),
}

impl RequestScanner {
    /// A scanner for lines of up to `line_max` bytes, `\n` included.
    pub fn new(line_max: usize) -> Self {
        Self { seen: 0, line_max }
    }

    /// Takes the bytes that follow those taken before. None: the line goes on after them.
    pub fn on_bytes(&mut self, bytes: &[u8]) -> Option<LineEnd> {
        let end = bytes.iter().position(|&byte| byte == b'\n').map(|at| at + 1);
        let taken = end.unwrap_or(bytes.len());
        self.seen = self.seen.saturating_add(taken).min(self.line_max + 1);
        let end = end?;
        let too_long = self.is_too_long();
        self.seen = 0;
        Some(if too_long { LineEnd::TooLong(end) } else { LineEnd::Whole(end) })
    }

    /// Whether the line under way is too long already: its bytes need not be kept.
    pub fn is_too_long(&self) -> bool {
        self.seen > self.line_max
    }

    /// Whether no line is under way.
    pub fn is_between_lines(&self) -> bool {
        self.seen == 0
    }
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Answers `PONG`.
    Ping,
    /// Reads a key.
    Get,
    /// Writes a key.
    Set,
    /// Removes a key.
    Del,
    /// Merges the tables of a whole store.
    Compact,
    /// What the server alone can judge.
    Other,
}

impl Command {
    pub(super) const NAMES: [(&[u8], Self); 5] = [
        (b"PING", Self::Ping),
        (b"SET", Self::Set),
        (b"GET", Self::Get),
        (b"DEL", Self::Del),
        (b"COMPACT", Self::Compact),
    ];

    /// Whether it may be sent again when its reply was lost, whatever other clients do.
    pub fn is_repeatable(self) -> bool {
        matches!(self, Self::Ping | Self::Get)
    }

    /// Whether it changes one key.
    pub fn is_write(self) -> bool {
        matches!(self, Self::Set | Self::Del)
    }

    fn has_key(self) -> bool {
        matches!(self, Self::Set | Self::Get | Self::Del)
    }
}

/// A whole request line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// Its command.
    pub command: Command,
    /// The key of a GET, SET or DEL that has one. The server replaces bytes that are not UTF-8.
    pub key: Option<&'a [u8]>,
}

impl<'a> Request<'a> {
    /// Reads a line. None: it is blank, which the server must never see, for its thread panics.
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let (name, rest) = split_word(line)?;
        let command = Command::NAMES
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map_or(Command::Other, |&(_, command)| command);
        let key = if command.has_key() { split_word(rest).map(|(key, _)| key) } else { None };
        Some(Self { command, key })
    }
}

/// The first word and what follows it.
fn split_word(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let start = find(text, |is_white| !is_white)?;
    let text = &text[start..];
    Some(text.split_at(find(text, |is_white| is_white).unwrap_or(text.len())))
}

/// Where the first character is that is, or is not, white space. Bytes that are not UTF-8 are not.
fn find(text: &[u8], wanted: impl Fn(bool) -> bool) -> Option<usize> {
    // Up to the first byte that is not ASCII nothing is to be decoded, which is most of the work.
    let is_found = |&byte: &u8| !byte.is_ascii() || wanted(char::from(byte).is_whitespace());
    let mut at = text.iter().position(is_found)?;
    if text[at].is_ascii() {
        return Some(at);
    }
    for chunk in text[at..].utf8_chunks() {
        if let Some(found) = chunk.valid().find(|c: char| wanted(c.is_whitespace())) {
            return Some(at + found);
        }
        at += chunk.valid().len();
        if !chunk.invalid().is_empty() && wanted(false) {
            return Some(at);
        }
        at += chunk.invalid().len();
    }
    None
}
