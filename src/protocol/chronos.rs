//! Requests and replies of Chronos: text lines that end in `\n`, one reply a request, in order.
//!
//! The server takes each read as one command and decodes it as text before it splits it. So a line
//! is sent whole, and white space is what Unicode calls so.

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
    /// Writes a key.
    Set,
    /// Reads a key.
    Get,
    /// Removes a key.
    Del,
    /// Merges the tables of a whole store.
    Compact,
    /// What the server alone can judge.
    Other,
}

impl Command {
    const NAMES: [(&[u8], Self); 5] = [
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
    let mut at = 0;
    for chunk in text.utf8_chunks() {
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

/// How far the reply to the one request under way has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// It goes on.
    Partial,
    /// It ended with the last byte given: the connection is silent again.
    Complete,
    /// It ended after this many bytes given, and more followed, which nobody asked for: the
    /// connection must not be used again.
    Surplus(usize),
}

/// Judges the bytes that follow those judged before.
pub fn reply(bytes: &[u8]) -> Reply {
    match bytes.iter().position(|&byte| byte == b'\n').map(|at| at + 1) {
        None => Reply::Partial,
        Some(end) if end == bytes.len() => Reply::Complete,
        Some(end) => Reply::Surplus(end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of a stream given in pieces, and whether each was too long.
    fn lines(pieces: &[&[u8]], line_max: usize) -> Vec<(Vec<u8>, bool)> {
        let mut scanner = RequestScanner::new(line_max);
        let (mut lines, mut line) = (Vec::new(), Vec::new());
        for mut piece in pieces.iter().copied() {
            while let Some(end) = scanner.on_bytes(piece) {
                let (end, too_long) = match end {
                    LineEnd::Whole(end) => (end, false),
                    LineEnd::TooLong(end) => (end, true),
                };
                line.extend_from_slice(&piece[..end]);
                lines.push((std::mem::take(&mut line), too_long));
                piece = &piece[end..];
                assert!(scanner.is_between_lines());
            }
            line.extend_from_slice(piece);
            assert_eq!(scanner.is_between_lines(), line.is_empty());
            assert_eq!(scanner.is_too_long(), line.len() > line_max);
        }
        lines
    }

    /// The same, the slow and obvious way.
    fn lines_slowly(stream: &[u8], line_max: usize) -> Vec<(Vec<u8>, bool)> {
        stream
            .split_inclusive(|&byte| byte == b'\n')
            .filter(|line| line.ends_with(b"\n"))
            .map(|line| (line.to_vec(), line.len() > line_max))
            .collect()
    }

    /// As the server does it: text, then words.
    fn parse_slowly(line: &[u8]) -> Option<(Command, Option<String>)> {
        let text = String::from_utf8_lossy(line);
        let words: Vec<_> = text.split_whitespace().collect();
        let command = match words.first()?.to_ascii_uppercase().as_str() {
            "PING" => Command::Ping,
            "SET" => Command::Set,
            "GET" => Command::Get,
            "DEL" => Command::Del,
            "COMPACT" => Command::Compact,
            _ => Command::Other,
        };
        let key = matches!(command, Command::Set | Command::Get | Command::Del);
        Some((command, words.get(1).filter(|_| key).map(ToString::to_string)))
    }

    fn parse(line: &[u8]) -> Option<(Command, Option<String>)> {
        let lossy = |key| String::from_utf8_lossy(key).into_owned();
        Request::parse(line).map(|request| (request.command, request.key.map(lossy)))
    }

    #[test]
    fn lines_are_found_at_every_split() {
        let stream = b"PING\r\n\nSET key a b\nGET 123456\nGET 1234567\nDEL k";
        let expected = lines_slowly(stream, 12);
        assert_eq!(expected.iter().filter(|(_, too_long)| *too_long).count(), 0);
        for line_max in [1, 6, 10, 11, 12] {
            let expected = lines_slowly(stream, line_max);
            for a in 0..=stream.len() {
                for b in a..=stream.len() {
                    let pieces = [&stream[..a], &stream[a..b], &stream[b..]];
                    assert_eq!(lines(&pieces, line_max), expected, "{a} {b} {line_max}");
                }
            }
        }
    }

    #[test]
    fn a_line_may_be_as_long_as_the_limit_and_no_longer() {
        let line = |len: usize| [vec![b'x'; len - 1], vec![b'\n']].concat();
        let mut scanner = RequestScanner::new(LINE_MAX);
        assert_eq!(scanner.on_bytes(&line(512)), Some(LineEnd::Whole(512)));
        assert_eq!(scanner.on_bytes(&line(513)), Some(LineEnd::TooLong(513)));
        assert_eq!(scanner.on_bytes(&line(1)), Some(LineEnd::Whole(1)));
    }

    #[test]
    fn requests_are_told_apart() {
        let key = |key: &str| Some(key.to_string());
        assert_eq!(parse(b"ping\r\n"), Some((Command::Ping, None)));
        assert_eq!(parse(b" Set\tk v w\n"), Some((Command::Set, key("k"))));
        assert_eq!(parse("GET\u{3000}k\n".as_bytes()), Some((Command::Get, key("k"))));
        assert_eq!(parse(b"DEL\n"), Some((Command::Del, None)));
        assert_eq!(parse(b"compact\n"), Some((Command::Compact, None)));
        assert_eq!(parse(b"GETS k\n"), Some((Command::Other, None)));
        assert_eq!(Request::parse(b"GET \xff\xfe v").unwrap().key, Some(&b"\xff\xfe"[..]));
        for blank in ["", "\n", " \t\r\n", "\u{a0}\u{2003}\u{3000}\n", "\u{b}\u{c}\u{85}\n"] {
            assert_eq!(Request::parse(blank.as_bytes()), None, "{blank:?}");
        }
    }

    #[test]
    fn random_streams_are_understood_as_the_slow_way_does() {
        const PIECES: [&[u8]; 20] = [
            b"PING",
            b"SET",
            b"get",
            b"DEL",
            b"Compact",
            b" ",
            b"\t",
            b"\r",
            b"\n",
            b"\n",
            b"key",
            b"\xff",
            b"\xc2",
            b"\xa0",
            b"\xe3\x80",
            b"\x80",
            b"\xc2\xa0",
            b"\xe2\x80\x83",
            b"\0",
            b"\xf0\x9f\x98\x80",
        ];
        let mut random = fastrand::Rng::with_seed(7);
        for round in 0..20_000 {
            let stream: Vec<u8> = (0..random.usize(0..24))
                .flat_map(|_| PIECES[random.usize(0..PIECES.len())])
                .copied()
                .collect();
            let line_max = random.usize(1..32);
            let (mut pieces, mut rest) = (Vec::new(), &stream[..]);
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(random.usize(1..=rest.len()));
                pieces.push(piece);
                rest = after;
            }
            let found = lines(&pieces, line_max);
            assert_eq!(found, lines_slowly(&stream, line_max), "round {round}: {stream:?}");
            for (line, _) in found {
                assert_eq!(parse(&line), parse_slowly(&line), "round {round}: {line:?}");
            }
        }
    }

    #[test]
    fn a_reply_is_complete_only_if_nothing_follows() {
        assert_eq!(reply(b""), Reply::Partial);
        assert_eq!(reply(b"OK"), Reply::Partial);
        assert_eq!(reply(b"OK\n"), Reply::Complete);
        assert_eq!(reply(b"\n"), Reply::Complete);
        assert_eq!(reply(b"OK\nOK\n"), Reply::Surplus(3));
        assert_eq!(reply(b"OK\nO"), Reply::Surplus(3));
    }

    #[test]
    fn only_reads_are_repeated() {
        use Command::{Compact, Del, Get, Other, Ping, Set};
        assert_eq!(
            [Ping, Get, Set, Del, Compact, Other].map(Command::is_repeatable),
            [true, true, false, false, false, false]
        );
    }
}
