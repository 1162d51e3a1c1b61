//! Lines of Chronos against a reader that has all of them at once.

use aegis::protocol::Reply;
use aegis::protocol::chronos::{Command, LineEnd, Request, RequestScanner, reply};
use fastrand::Rng;

use crate::driver;

const DICTIONARY: [&[u8]; 14] = [
    b"\n",
    b"\r\n",
    b" ",
    b"\t",
    b"PING",
    b"get ",
    b"SET ",
    b"Del ",
    b"COMPACT",
    b"\xc2\xa0",
    b"\xe3\x80",
    b"\x80",
    b"\xff",
    b"\0",
];

#[test]
fn chronos_lines_are_read_as_the_slow_way_does() {
    driver::run("chronos", &DICTIONARY, check);
}

fn check(input: &[u8], random: &mut Rng) {
    let line_max = random.usize(1..40);
    let slow: Vec<_> = input
        .split_inclusive(|&byte| byte == b'\n')
        .filter(|line| line.ends_with(b"\n"))
        .map(|line| (line.to_vec(), line.len() > line_max))
        .collect();
    assert_eq!(lines(&[input], line_max), slow);
    assert_eq!(lines(&driver::split(input, random), line_max), slow);
    for (line, _) in &slow {
        let lossy = |key| String::from_utf8_lossy(key).into_owned();
        let found = Request::parse(line).map(|found| (found.command, found.key.map(lossy)));
        assert_eq!(found, words(line));
    }
    let expected = match slow.first() {
        None => Reply::Partial,
        Some((line, _)) if line.len() == input.len() => Reply::Complete,
        Some((line, _)) => Reply::Surplus(line.len()),
    };
    assert_eq!(reply(input), expected);
}

fn lines(pieces: &[&[u8]], line_max: usize) -> Vec<(Vec<u8>, bool)> {
    let mut scanner = RequestScanner::new(line_max);
    let (mut lines, mut line) = (Vec::new(), Vec::new());
    for mut piece in pieces.iter().copied() {
        while let Some(end) = scanner.on_bytes(piece) {
            let (LineEnd::Whole(at) | LineEnd::TooLong(at)) = end;
            line.extend_from_slice(&piece[..at]);
            lines.push((std::mem::take(&mut line), matches!(end, LineEnd::TooLong(_))));
            piece = &piece[at..];
        }
        line.extend_from_slice(piece);
        assert_eq!(scanner.is_between_lines(), line.is_empty());
        assert_eq!(scanner.is_too_long(), line.len() > line_max);
    }
    lines
}

/// As the server reads a line: text, then words.
fn words(line: &[u8]) -> Option<(Command, Option<String>)> {
    let text = String::from_utf8_lossy(line);
    let mut words = text.split_whitespace();
    let (command, has_key) = match words.next()?.to_ascii_uppercase().as_str() {
        "PING" => (Command::Ping, false),
        "SET" => (Command::Set, true),
        "GET" => (Command::Get, true),
        "DEL" => (Command::Del, true),
        "COMPACT" => (Command::Compact, false),
        _ => (Command::Other, false),
    };
    Some((command, words.next().filter(|_| has_key).map(str::to_string)))
}
