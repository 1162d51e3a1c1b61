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
