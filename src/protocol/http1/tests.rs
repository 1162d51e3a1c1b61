//! Both scanners, on streams given whole, in two pieces at every place, and byte by byte.

use super::Ambiguity as A;
use super::{Method, RequestScanner, ResponseScanner, Scan};
use crate::limits::HTTP1_HEAD_MAX;

/// What became of a stream: where messages ended, and what the scanner returned last.
type Outcome = (Vec<usize>, Scan);

fn outcome(pieces: &[&[u8]], mut scan: impl FnMut(&[u8]) -> Scan) -> Outcome {
    let (mut ends, mut at) = (Vec::new(), 0);
    for mut piece in pieces.iter().copied() {
        while !piece.is_empty() {
            match scan(piece) {
                Scan::Complete(end) => {
                    at += end;
                    ends.push(at);
                    piece = &piece[end..];
                }
                Scan::Partial => {
                    at += piece.len();
                    piece = &[];
                }
                Scan::Tunnel(end) => return (ends, Scan::Tunnel(at + end)),
                ambiguous @ Scan::Ambiguous(_) => {
                    assert_eq!(scan(b"x"), ambiguous, "it stays so");
                    return (ends, ambiguous);
                }
            }
        }
    }
    (ends, Scan::Partial)
}

/// The outcome, which must not depend on how the stream is split.
fn at_every_split<S: FnMut(&[u8]) -> Scan>(stream: &[u8], scanner: impl Fn() -> S) -> Outcome {
    let whole = outcome(&[stream], scanner());
    for at in 0..stream.len() {
        let (a, b) = stream.split_at(at);
        assert_eq!(outcome(&[a, b], scanner()), whole, "{at} of {stream:?}");
    }
    let bytes: Vec<_> = stream.chunks(1).collect();
    assert_eq!(outcome(&bytes, scanner()), whole, "{stream:?}");
    whole
}

fn requests(stream: &[u8]) -> Outcome {
    at_every_split(stream, || {
        let mut scanner = RequestScanner::new();
        move |bytes: &[u8]| scanner.scan(bytes)
    })
}

fn response_to(method: Method, stream: &[u8]) -> Outcome {
    at_every_split(stream, || {
        let mut scanner = ResponseScanner::new();
        scanner.begin(method);
        move |bytes: &[u8]| scanner.scan(bytes)
    })
}

fn request(head: &str) -> RequestScanner {
    let mut scanner = RequestScanner::new();
    assert_eq!(scanner.scan(head.as_bytes()), Scan::Complete(head.len()), "{head:?}");
    scanner
}

fn is_reusable(method: Method, stream: &str) -> bool {
    let mut scanner = ResponseScanner::new();
    scanner.begin(method);
    scanner.scan(stream.as_bytes());
    scanner.is_reusable()
}

#[test]
fn requests_end_where_their_framing_says() {
    let messages: [&[u8]; 9] = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /a?b HTTP/1.1\r\ncontent-LENGTH:\t 5 \r\n\r\na\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
        b"PUT / HTTP/1.1\r\nTransfer-Encoding: Chunked \r\n\r\n5\r\n12345\r\n0\r\n\r\n",
        b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n00A;a=\"b\"\r\n0\r\n\r\n56789\r\n0\r\n\r\n",
        b"X HTTP/1.1 HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Lengths: x\r\nX-Transfer-Encoding: y\r\nE:\r\n\r\n",
        b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0;x\r\nA: b\r\nC:d\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nA: \xff\t\x80\r\n\r\n",
    ];
    let mut end = 0;
    let ends: Vec<_> = messages.iter().map(|message| (end += message.len(), end).1).collect();
    assert_eq!(requests(&messages.concat()), (ends, Scan::Partial));
}

#[test]
fn ambiguous_requests_are_told() {
    let get = "GET / HTTP/1.1\r\n";
    let lines = [
        ("\r\nGET / HTTP/1.1\r\n", A::StartLine),
        ("GET\t/ HTTP/1.1\r\n", A::StartLine),
        ("GET  / HTTP/1.1\r\n", A::StartLine),
        ("GET / a HTTP/1.1\r\n", A::Version),
        ("GET /\0 HTTP/1.1\r\n", A::StartLine),
        (" GET / HTTP/1.1\r\n", A::StartLine),
        ("head / HTTP/1.1\r\n", A::MethodCase),
        ("GET /\r\n", A::Version),
        ("GET / HTTP/1.1 \r\n", A::Version),
        ("GET / HTTP/1.2\r\n", A::Version),
        ("GET / http/1.1\r\n", A::Version),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", A::Version),
        ("GET / HTTP/1.1\n", A::BareLf),
        ("GET /\n", A::BareLf),
        ("GET / HTTP/1.1\rX", A::BareCr),
    ];
    for (line, reason) in lines {
        assert_eq!(requests(line.as_bytes()), (vec![], Scan::Ambiguous(reason)), "{line:?}");
    }
    let fields = [
        ("A: b\n", A::BareLf),
        ("A: b\rc\r\n", A::BareCr),
        ("\rA", A::BareCr),
        ("\n", A::BareLf),
        (" A: b\r\n", A::Fold),
        ("A: b\r\n\tc\r\n", A::Fold),
        ("A : b\r\n", A::FieldName),
        ("A\0: b\r\n", A::FieldName),
        (": b\r\n", A::FieldName),
        ("A\r\n", A::FieldName),
        ("A: \0\r\n", A::FieldValue),
        ("A: \x7f\r\n", A::FieldValue),
        ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", A::LengthAndEncoding),
        ("Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n", A::LengthAndEncoding),
        ("Content-Length: 1\r\nContent-Length: 1\r\n", A::ContentLengths),
        ("Content-Length: 1\r\nContent-Length: 2\r\n", A::ContentLengths),
        ("Content-Length: +1\r\n", A::ContentLength),
        ("Content-Length: -1\r\n", A::ContentLength),
        ("Content-Length: 1 1\r\n", A::ContentLength),
        ("Content-Length: 1, 1\r\n", A::ContentLength),
        ("Content-Length: 1,\r\n", A::ContentLength),
        ("Content-Length: 0x1\r\n", A::ContentLength),
        ("Content-Length:\r\n", A::ContentLength),
        ("Content-Length: 18446744073709551616\r\n", A::ContentLength),
        ("Content-Length: 000000000000000000001\r\n", A::ContentLength),
        ("Transfer-Encoding: gzip\r\n", A::TransferEncoding),
        ("Transfer-Encoding: chunked, gzip\r\n", A::TransferEncoding),
        ("Transfer-Encoding: chunked,\r\n", A::TransferEncoding),
        ("Transfer-Encoding: xchunked\r\n", A::TransferEncoding),
        ("Transfer-Encoding: \x0bchunked\r\n", A::FieldValue),
        ("Transfer-Encoding:\r\n", A::TransferEncoding),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", A::TransferEncoding),
        ("Connection: close, Content-Length\r\n", A::FramingRemoved),
        ("Connection: transfer-encoding\r\n", A::FramingRemoved),
        ("Connection: close keep-alive\r\n", A::List),
    ];
    for (text, reason) in fields {
        let stream = [get, text].concat();
        assert_eq!(requests(stream.as_bytes()), (vec![], Scan::Ambiguous(reason)), "{text:?}");
    }
    let http_1_0 = b"PUT / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(requests(http_1_0), (vec![], Scan::Ambiguous(A::EncodingInHttp10)));
    let connect = b"CONNECT a:1 HTTP/1.1\r\nContent-Length: 1\r\n\r\n";
    assert_eq!(requests(connect), (vec![], Scan::Ambiguous(A::Body)));
}

#[test]
fn ambiguous_chunks_are_told() {
    let head = "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    let bodies = [
        ("\r\n", A::ChunkSize),
        (";a\r\n", A::ChunkSize),
        ("5 \r\n", A::ChunkSize),
        (" 5\r\n", A::ChunkSize),
        ("+5\r\n", A::ChunkSize),
        ("0x5\r\n", A::ChunkSize),
        ("5g\r\n", A::ChunkSize),
        ("5\n", A::BareLf),
        ("5;a\n", A::BareLf),
        ("5;a\rb", A::BareCr),
        ("5\r5", A::BareCr),
        ("10000000000000000\r\n", A::ChunkSize),
        ("1\r\nab", A::ChunkEnd),
        ("1\r\na\n", A::ChunkEnd),
        ("1\r\na\rb", A::ChunkEnd),
        ("0\r\nContent-Length: 1\r\n", A::Trailer),
        ("0\r\nA : 1\r\n", A::FieldName),
        ("0\r\n\n", A::BareLf),
    ];
    for (body, reason) in bodies {
        let stream = [head, body].concat();
        assert_eq!(requests(stream.as_bytes()), (vec![], Scan::Ambiguous(reason)), "{body:?}");
    }
    let largest = [head, "ffffffffffffffff\r\nabc"].concat();
    assert_eq!(requests(largest.as_bytes()), (vec![], Scan::Partial));
}

#[test]
fn a_head_may_be_as_long_as_the_limit_and_no_longer() {
    for (over, expected) in [(0, None), (1, Some(Scan::Ambiguous(A::TooLong)))] {
        let mut head = b"GET / HTTP/1.1\r\nA: ".to_vec();
        head.resize(HTTP1_HEAD_MAX - 4 + over, b'x');
        head.extend_from_slice(b"\r\n\r\n");
        let expected = expected.unwrap_or(Scan::Complete(head.len()));
        assert_eq!(RequestScanner::new().scan(&head), expected);
        let mut scanner = RequestScanner::new();
        let last = head.chunks(1).map(|byte| scanner.scan(byte)).last();
        assert_eq!(last, Some(if over == 0 { Scan::Complete(1) } else { expected }));
        assert_eq!(scanner.head_len(), (over == 0).then_some(HTTP1_HEAD_MAX));
    }
    let mut trailer = b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA:".to_vec();
    trailer.resize(2 * HTTP1_HEAD_MAX, b'x');
    assert_eq!(RequestScanner::new().scan(&trailer), Scan::Ambiguous(A::TooLong));
    let mut extension = b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;".to_vec();
    extension.resize(2 * HTTP1_HEAD_MAX, b'x');
    assert_eq!(RequestScanner::new().scan(&extension), Scan::Ambiguous(A::TooLong));
}

#[test]
fn requests_say_what_the_proxy_needs() {
    let get = request("GET / HTTP/1.1\r\n\r\n");
    assert_eq!((get.method(), get.head_len()), (Method::Get, Some(18)));
    assert!(get.keeps_alive() && !get.asks_for_tunnel() && !get.expects_continue());
    assert!(get.is_between_requests());
    assert!(!request("GET / HTTP/1.0\r\n\r\n").keeps_alive());
    assert!(request("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").keeps_alive());
    assert!(!request("GET / HTTP/1.1\r\nConnection: a,, Close ,b\r\n\r\n").keeps_alive());
    assert!(request("GET / HTTP/1.1\r\nConnection: closed\r\n\r\n").keeps_alive());
    let both = "GET / HTTP/1.0\r\nConnection: keep-alive\r\nConnection: close\r\n\r\n";
    assert!(!request(both).keeps_alive());
    assert!(request("GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n").asks_for_tunnel());
    assert!(request("CONNECT a:1 HTTP/1.1\r\n\r\n").asks_for_tunnel());
    assert!(request("PUT / HTTP/1.1\r\nExpect: 100-Continue\r\n\r\n").expects_continue());
    assert_eq!(request("PATCH / HTTP/1.1\r\n\r\n").method(), Method::Other);
    assert_eq!(request("AVERYLONGMETHODINDEEDYES / HTTP/1.1\r\n\r\n").method(), Method::Other);

    let mut scanner = RequestScanner::new();
    assert!(scanner.is_between_requests());
    scanner.scan(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r");
    assert!(!scanner.is_head_complete() && !scanner.is_between_requests());
    scanner.scan(b"\na");
    assert!(scanner.is_head_complete() && !scanner.is_between_requests());
    assert_eq!(scanner.scan(b"bcGET"), Scan::Complete(2));
    assert_eq!(scanner.method(), Method::Post);
    scanner.scan(b"get ");
    assert!(!scanner.is_between_requests(), "an ambiguous one stays under way");
}

#[test]
fn responses_end_where_their_framing_says() {
    let get = |text: &str| response_to(Method::Get, text.as_bytes());
    let complete = |text: &str| {
        assert_eq!(get(text), (vec![text.len()], Scan::Partial), "{text:?}");
    };
    complete("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab");
    complete("HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n");
    complete("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;x\r\na\r\n0\r\nT: u\r\n\r\n");
    complete("HTTP/1.1 204 No Content\r\n\r\n");
    complete("HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n");
    complete("HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n");
    complete("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 E\r\nA: b\r\n\r\nHTTP/1.1 204 \r\n\r\n");
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n";
    let expected = (vec![head.len()], Scan::Partial);
    assert_eq!(response_to(Method::Head, head.as_bytes()), expected);

    let surplus = "HTTP/1.1 204 \r\n\r\nHTTP/1.1 204 \r\n\r\n";
    assert_eq!(get(surplus), (vec![17], Scan::Ambiguous(A::Unsolicited)));
    assert_eq!(get("HTTP/1.1 200 OK\r\n\r\nanything\r\n\r\n"), (vec![], Scan::Partial));
    let switch = "HTTP/1.1 101 S\r\nUpgrade: x\r\n\r\n";
    assert_eq!(get(&[switch, "abc"].concat()), (vec![], Scan::Tunnel(switch.len())));
    let connect = |text: &[u8]| response_to(Method::Connect, text);
    assert_eq!(connect(b"HTTP/1.1 200 OK\r\n\r\nabc"), (vec![], Scan::Tunnel(19)));
    let refused = b"HTTP/1.1 403 No\r\nContent-Length: 1\r\n\r\na";
    assert_eq!(connect(refused), (vec![refused.len()], Scan::Partial));
}

#[test]
fn ambiguous_responses_are_told() {
    let streams = [
        ("HTTP/1.1  200 OK\r\n", A::StartLine),
        ("HTTP/1.1 20 OK\r\n", A::StartLine),
        ("HTTP/1.1 2000 OK\r\n", A::StartLine),
        ("HTTP/1.1 099 OK\r\n", A::Status),
        ("HTTP/1.1 600 OK\r\n", A::Status),
        ("HTTP/1.1 200 O\0K\r\n", A::StartLine),
        ("HTTP/1.1 200 OK\n", A::BareLf),
        ("HTTP/1.1 200\n", A::BareLf),
        ("HTTP/2.0 200 OK\r\n", A::Version),
        ("OK\r\n", A::Version),
        ("HTTP/1.1 204 N\r\nContent-Length: 1\r\n\r\n", A::Body),
        ("HTTP/1.1 204 N\r\nTransfer-Encoding: chunked\r\n\r\n", A::Body),
        ("HTTP/1.1 100 C\r\nContent-Length: 1\r\n\r\n", A::Body),
        ("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", A::EncodingInHttp10),
    ];
    for (stream, reason) in streams {
        let found = response_to(Method::Get, stream.as_bytes());
        assert_eq!(found, (vec![], Scan::Ambiguous(reason)), "{stream:?}");
    }
    let both = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n";
    let expected = (vec![], Scan::Ambiguous(A::LengthAndEncoding));
    assert_eq!(response_to(Method::Get, both), expected);
    assert_eq!(response_to(Method::Head, both), expected);
    assert_eq!(ResponseScanner::new().scan(b"H"), Scan::Ambiguous(A::Unsolicited));
    assert_eq!(ResponseScanner::new().scan(b""), Scan::Partial);
}

#[test]
fn responses_say_whether_the_connection_can_be_used_again() {
    let reusable = |text: &str| is_reusable(Method::Get, text);
    assert!(reusable("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na"));
    assert!(!reusable("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na"));
    assert!(!reusable("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"));
    assert!(!reusable("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"));
    assert!(reusable("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n"));
    assert!(!reusable("HTTP/1.1 200 OK\r\n\r\n"));
    assert!(!reusable("HTTP/1.1 101 S\r\n\r\n"));
    assert!(!reusable("HTTP/1.1 100 C\r\n\r\n"));
    assert!(!is_reusable(Method::Connect, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"));
    assert!(!reusable(""));
    let mut scanner = ResponseScanner::new();
    scanner.begin(Method::Get);
    assert!(!scanner.has_begun() && scanner.status().is_none());
    scanner.scan(b"HTTP/1.1 200 OK\r\n\r\n");
    assert!(scanner.has_begun() && scanner.is_until_close());
    assert_eq!(scanner.status(), Some(200));
    scanner.begin(Method::Get);
    assert!(!scanner.has_begun());
    assert_eq!(scanner.scan(b"HTTP/1.1 204 \r\n\r\n"), Scan::Complete(17));
    assert!(scanner.is_reusable());
    scanner.scan(b"x");
    assert!(!scanner.is_reusable(), "something followed");
}

#[test]
fn idempotent_methods_are_those_of_the_rfc() {
    use Method::{Connect, Delete, Get, Head, Options, Other, Post, Put, Trace};
    let all = [Get, Head, Options, Trace, Put, Delete, Post, Connect, Other];
    let idempotent = all.map(Method::is_idempotent);
    assert_eq!(idempotent, [true, true, true, true, true, true, false, false, false]);
}
