//! Messages of HTTP/1 against a parser that has all of them at once and works line by line.

use aegis::protocol::http1::{Method, RequestScanner, ResponseScanner, Scan};
use fastrand::Rng;

use crate::driver;

const DICTIONARY: [&[u8]; 40] = [
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b"\0",
    b"\xff",
    b"0",
    b"1",
    b"a",
    b"GET ",
    b"HEAD ",
    b"POST ",
    b"CONNECT ",
    b"get ",
    b"/",
    b" HTTP/1.1\r\n",
    b" HTTP/1.0\r\n",
    b"HTTP/1.1 ",
    b"HTTP/1.0 ",
    b"100",
    b"101",
    b"204",
    b"304",
    b"200 OK\r\n",
    b"Content-Length: ",
    b"Transfer-Encoding: chunked\r\n",
    b"transfer-encoding:",
    b"Connection: close\r\n",
    b"Connection: keep-alive, ",
    b"Upgrade: h2c\r\n",
    b"Expect: 100-continue\r\n",
    b"0\r\n\r\n",
    b"5;x=y\r\nhello\r\n",
    b"ffffffffffffffff",
    b"chunked",
];

const METHODS: [(&str, Method); 8] = [
    ("GET", Method::Get),
    ("HEAD", Method::Head),
    ("OPTIONS", Method::Options),
    ("TRACE", Method::Trace),
    ("PUT", Method::Put),
    ("DELETE", Method::Delete),
    ("POST", Method::Post),
    ("CONNECT", Method::Connect),
];

#[test]
fn requests_of_http1_end_where_the_slow_way_says() {
    driver::run("http1-requests", &DICTIONARY, check_requests);
}

#[test]
fn responses_of_http1_end_where_the_slow_way_says() {
    driver::run("http1-responses", &DICTIONARY, check_responses);
}

// ---- The slow way ------------------------------------------------------------------------------

/// There is no end yet, or there can be none that is certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stuck {
    Incomplete,
    Ambiguous,
}
use Stuck::{Ambiguous, Incomplete};

fn ensure(right: bool) -> Result<(), Stuck> {
    if right { Ok(()) } else { Err(Ambiguous) }
}

/// A line without its end, and where the next begins.
fn line(input: &[u8], at: usize) -> Result<(&[u8], usize), Stuck> {
    let len = input[at..].windows(2).position(|two| two == b"\r\n").ok_or(Incomplete)?;
    let line = &input[at..at + len];
    ensure(!line.contains(&b'\r') && !line.contains(&b'\n'))?;
    Ok((line, at + len + 2))
}

fn is_token(bytes: &[u8]) -> bool {
    let special = b"!#$%&'*+-.^_`|~";
    !bytes.is_empty() && bytes.iter().all(|b| b.is_ascii_alphanumeric() || special.contains(b))
}

fn is_text(bytes: &[u8]) -> bool {
    bytes.iter().all(|&b| b == b'\t' || (b >= b' ' && b != 0x7f))
}

fn trimmed(bytes: &[u8]) -> &[u8] {
    let is_blank = |b: &u8| *b == b' ' || *b == b'\t';
    let Some(start) = bytes.iter().position(|b| !is_blank(b)) else { return &[] };
    let end = bytes.iter().rposition(|b| !is_blank(b)).unwrap_or(start);
    &bytes[start..=end]
}

#[derive(Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "each is given independently of the others")]
struct Framing {
    length: Option<u64>,
    chunked: bool,
    close: bool,
    keep_alive: bool,
    upgrade: bool,
    expects_continue: bool,
}

/// Field lines up to the empty one, and where what follows begins.
fn fields(input: &[u8], mut at: usize, trailer: bool) -> Result<(Framing, usize), Stuck> {
    let mut framing = Framing::default();
    loop {
        let (text, next) = line(input, at)?;
        at = next;
        if text.is_empty() {
            return Ok((framing, at));
        }
        let colon = text.iter().position(|&b| b == b':').ok_or(Ambiguous)?;
        let (name, value) = (&text[..colon], &text[colon + 1..]);
        ensure(is_token(name) && is_text(value))?;
        let name = name.to_ascii_lowercase();
        let reserved: [&[u8]; 5] =
            [b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect"];
        ensure(!(trailer && reserved.contains(&&name[..])))?;
        let items = || value.split(|&b| b == b',').map(|item| trimmed(item).to_ascii_lowercase());
        let no_blanks = |item: &Vec<u8>| !item.contains(&b' ') && !item.contains(&b'\t');
        match &name[..] {
            b"content-length" => {
                let digits = trimmed(value);
                ensure(framing.length.is_none() && digits.iter().all(u8::is_ascii_digit))?;
                ensure(digits.len() <= 20)?;
                let number = std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok());
                framing.length = Some(number.ok_or(Ambiguous)?);
            }
            b"transfer-encoding" => {
                ensure(!framing.chunked && trimmed(value).eq_ignore_ascii_case(b"chunked"))?;
                framing.chunked = true;
            }
            b"connection" => {
                ensure(items().all(|item| no_blanks(&item)))?;
                ensure(items().all(|item| !reserved[..2].contains(&&item[..])))?;
                framing.close |= items().any(|item| item == b"close");
                framing.keep_alive |= items().any(|item| item == b"keep-alive");
                framing.upgrade |= items().any(|item| item == b"upgrade");
            }
            b"expect" => {
                ensure(items().all(|item| no_blanks(&item)))?;
                framing.expects_continue |= items().any(|item| item == b"100-continue");
            }
            b"upgrade" => framing.upgrade = true,
            _ => {}
        }
    }
}

fn chunks(input: &[u8], mut at: usize) -> Result<usize, Stuck> {
    loop {
        let (text, next) = line(input, at)?;
        at = next;
        let (size, extension) = match text.iter().position(|&b| b == b';') {
            Some(semicolon) => (&text[..semicolon], &text[semicolon..]),
            None => (text, &b""[..]),
        };
        ensure((1..=16).contains(&size.len()) && size.iter().all(u8::is_ascii_hexdigit))?;
        ensure(is_text(extension))?;
        let size = u64::from_str_radix(std::str::from_utf8(size).unwrap(), 16).unwrap();
        if size == 0 {
            return fields(input, at, true).map(|(_, end)| end);
        }
        if size > (input.len() - at) as u64 {
            return Err(Incomplete);
        }
        at += size as usize;
        let end = &input[at..input.len().min(at + 2)];
        ensure(b"\r\n".starts_with(end))?;
        if end.len() < 2 {
            return Err(Incomplete);
        }
        at += 2;
    }
}

fn sized(input: &[u8], at: usize, length: u64) -> Result<usize, Stuck> {
    if length > (input.len() - at) as u64 { Err(Incomplete) } else { Ok(at + length as usize) }
}

fn version(text: &[u8]) -> Result<bool, Stuck> {
    match text {
        b"HTTP/1.1" => Ok(true),
        b"HTTP/1.0" => Ok(false),
        _ => Err(Ambiguous),
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Message {
    len: usize,
    method: Method,
    keeps_alive: bool,
    tunnel: bool,
    expects_continue: bool,
}

fn slow_request(input: &[u8]) -> Result<Message, Stuck> {
    let (start, at) = line(input, 0)?;
    // What is wrong with the fields would be reported only after the start line.
    let (framing, at) = match (request_line(start), fields(input, at, false)) {
        (Err(stuck), Ok(_) | Err(_)) => return Err(stuck),
        (Ok(_), fields) => fields?,
    };
    let (method, is_1_1) = request_line(start)?;
    let body = framing.chunked || framing.length.is_some_and(|length| length > 0);
    ensure(!(framing.chunked && (framing.length.is_some() || !is_1_1)))?;
    ensure(!(body && method == Method::Connect))?;
    let len = if framing.chunked {
        chunks(input, at)?
    } else {
        sized(input, at, framing.length.unwrap_or(0))?
    };
    Ok(Message {
        len,
        method,
        keeps_alive: !framing.close && (is_1_1 || framing.keep_alive),
        tunnel: framing.upgrade || method == Method::Connect,
        expects_continue: framing.expects_continue,
    })
}

fn request_line(text: &[u8]) -> Result<(Method, bool), Stuck> {
    let words: Vec<&[u8]> = text.split(|&b| b == b' ').collect();
    let [name, target, protocol] = words[..] else { return Err(Ambiguous) };
    ensure(is_token(name) && !target.is_empty() && target.iter().all(u8::is_ascii_graphic))?;
    let known = METHODS.iter().find(|(known, _)| known.as_bytes().eq_ignore_ascii_case(name));
    ensure(known.is_none_or(|(known, _)| known.as_bytes() == name))?;
    Ok((known.map_or(Method::Other, |&(_, method)| method), version(protocol)?))
}

/// Where the response ends, and whether the connection is good for another; or where a tunnel
/// begins.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Complete(usize, bool),
    Tunnel(usize),
}

fn slow_response(input: &[u8], method: Method) -> Result<Answer, Stuck> {
    let mut at = 0;
    loop {
        let (start, next) = line(input, at)?;
        let (status, is_1_1) = status_line(start)?;
        let (framing, next) = fields(input, next, false)?;
        at = next;
        if status == 101 || (method == Method::Connect && (200..300).contains(&status)) {
            return Ok(Answer::Tunnel(at));
        }
        let body = framing.chunked || framing.length.is_some_and(|length| length > 0);
        ensure(!(framing.chunked && (framing.length.is_some() || !is_1_1)))?;
        ensure(!(body && (status < 200 || status == 204)))?;
        if status < 200 {
            continue;
        }
        let end = match framing.length {
            _ if status == 204 || status == 304 || method == Method::Head => at,
            _ if framing.chunked => chunks(input, at)?,
            Some(length) => sized(input, at, length)?,
            None => return Err(Incomplete),
        };
        return Ok(Answer::Complete(end, !framing.close && (is_1_1 || framing.keep_alive)));
    }
}

fn status_line(text: &[u8]) -> Result<(u16, bool), Stuck> {
    ensure(text.len() >= 12 && text[8] == b' ')?;
    let is_1_1 = version(&text[..8])?;
    let (code, reason) = (&text[9..12], &text[12..]);
    ensure((b'1'..=b'5').contains(&code[0]) && code.iter().all(u8::is_ascii_digit))?;
    ensure(reason.is_empty() || (reason[0] == b' ' && is_text(reason)))?;
    Ok((code.iter().fold(0, |code, digit| code * 10 + u16::from(digit - b'0')), is_1_1))
}

// ---- Both beside one another -------------------------------------------------------------------

/// The scanner may see that something is wrong before the line is over; then the slow way sees it
/// once it is.
fn agree(stuck: Stuck, ambiguous: bool, rest: &[u8], again: impl Fn(&[u8]) -> Option<Stuck>) {
    if stuck == Incomplete && ambiguous {
        let ended = [rest, b"\r\n\r\n"].concat();
        assert_eq!(again(&ended), Some(Ambiguous), "ambiguous too early");
    } else {
        assert_eq!(stuck == Ambiguous, ambiguous, "{stuck:?}");
    }
}

fn check_requests(input: &[u8], random: &mut Rng) {
    let mut expected = Vec::new();
    let mut rest = input;
    let stuck = loop {
        match slow_request(rest) {
            Ok(message) => {
                rest = &rest[message.len..];
                expected.push(message);
            }
            Err(stuck) => break stuck,
        }
    };
    for pieces in [vec![input], driver::split(input, random)] {
        let (found, ambiguous) = requests(&pieces);
        assert_eq!(found, expected);
        agree(stuck, ambiguous, rest, |ended| slow_request(ended).err());
    }
}

fn requests(pieces: &[&[u8]]) -> (Vec<Message>, bool) {
    let mut scanner = RequestScanner::new();
    let (mut found, mut len) = (Vec::new(), 0);
    for mut piece in pieces.iter().copied() {
        while !piece.is_empty() {
            match scanner.scan(piece) {
                Scan::Partial => {
                    len += piece.len();
                    break;
                }
                Scan::Complete(end) => {
                    assert!(scanner.is_head_complete() && scanner.is_between_requests());
                    found.push(Message {
                        len: len + end,
                        method: scanner.method(),
                        keeps_alive: scanner.keeps_alive(),
                        tunnel: scanner.asks_for_tunnel(),
                        expects_continue: scanner.expects_continue(),
                    });
                    len = 0;
                    piece = &piece[end..];
                }
                Scan::Ambiguous(_) => {
                    assert!(
                        matches!(scanner.scan(b"x"), Scan::Ambiguous(_)),
                        "it changed its mind"
                    );
                    return (found, true);
                }
                Scan::Tunnel(_) => panic!("a request is no tunnel"),
            }
        }
    }
    (found, false)
}

fn check_responses(input: &[u8], random: &mut Rng) {
    let method = METHODS[random.usize(..METHODS.len())].1;
    let expected = slow_response(input, method);
    for pieces in [vec![input], driver::split(input, random)] {
        match (&expected, response(&pieces, method)) {
            (Ok(expected), Ok(Some(found))) => assert_eq!(&found, expected),
            (Err(stuck), Err(())) => {
                agree(*stuck, true, input, |ended| slow_response(ended, method).err());
            }
            (Err(Incomplete), Ok(None)) => {}
            (expected, found) => panic!("{found:?} instead of {expected:?}"),
        }
    }
}

/// The answer, if it is there; an error where it is ambiguous.
fn response(pieces: &[&[u8]], method: Method) -> Result<Option<Answer>, ()> {
    let mut scanner = ResponseScanner::new();
    scanner.begin(method);
    let mut len = 0;
    for piece in pieces {
        match scanner.scan(piece) {
            Scan::Partial => len += piece.len(),
            Scan::Complete(end) => {
                return Ok(Some(Answer::Complete(len + end, scanner.is_reusable())));
            }
            Scan::Tunnel(end) => return Ok(Some(Answer::Tunnel(len + end))),
            Scan::Ambiguous(_) => {
                assert!(!scanner.is_reusable());
                return Err(());
            }
        }
    }
    Ok(None)
}
