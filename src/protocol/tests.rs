use std::time::Duration;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const SETTINGS: Settings = Settings { line_max: 512, repeat_writes: false };

#[test]
fn every_protocol_has_a_word_of_its_own_that_stands_for_it() {
    for &protocol in ProtocolName::ALL {
        assert_eq!(protocol.word().parse(), Ok(protocol));
        assert_eq!(protocol.to_string(), protocol.word());
    }
    assert!("".parse::<ProtocolName>().is_err() && "TCP".parse::<ProtocolName>().is_err());
    let words: Vec<_> =
        ProtocolName::WORDS.split(", ").flat_map(|word| word.split(" or ")).collect();
    assert_eq!(words, ProtocolName::ALL.iter().map(|protocol| protocol.word()).collect::<Vec<_>>());
}

#[test]
fn every_verb_has_a_label_and_a_place_of_its_own() {
    let labels = |protocol: ProtocolName| -> Vec<_> {
        let facts = protocol.facts();
        let mut places: Vec<_> = facts.verbs().map(Verb::index).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), facts.verbs().count());
        assert!(places.iter().all(|&place| place < Verb::COUNT));
        facts.verbs().map(Verb::label).collect()
    };
    assert_eq!(labels(ProtocolName::Tcp), [""; 0]);
    assert_eq!(labels(ProtocolName::Chronos), ["ping", "get", "set", "del", "compact", "other"]);
    assert_eq!(
        labels(ProtocolName::Http1),
        ["get", "head", "post", "put", "delete", "other", "opaque"]
    );
}

/// What is at the front of a stream of one request.
fn request(protocol: ProtocolName, bytes: &[u8]) -> Result<Request<'_>, ErrorReply> {
    let mut conversation = Conversation::new(protocol, &SETTINGS);
    assert_eq!(conversation.on_request_bytes(bytes), RequestEnd::Whole(bytes.len()), "{protocol}");
    conversation.request(&bytes[..bytes.len().min(protocol.peek_max(&SETTINGS))])
}

#[test]
fn a_liveness_request_changes_nothing_and_goes_to_one_endpoint() {
    for protocol in ProtocolName::ALL {
        if let Some(bytes) = protocol.facts().liveness_request {
            let request = request(*protocol, bytes).expect("a backend may see it");
            assert!(request.repeatable && !request.to_all && request.key.is_none(), "{protocol}");
        }
    }
}

#[test]
fn the_first_line_of_a_reply_says_whether_a_server_is_well() {
    for (protocol, reply, expected) in [
        (ProtocolName::Chronos, "", None),
        (ProtocolName::Chronos, "PON", None),
        (ProtocolName::Chronos, "PONG\n", Some(true)),
        (ProtocolName::Chronos, "PONG\r\n", Some(true)),
        (ProtocolName::Chronos, "ERR_UNKNOWN_COMMAND\n", Some(false)),
        (ProtocolName::Chronos, "HTTP/1.1 400 Bad Request\r\n", Some(false)),
        (ProtocolName::Chronos, "\n", Some(false)),
        (ProtocolName::Http1, "HTTP/1.1 200 OK", None),
        (ProtocolName::Http1, "HTTP/1.1 200 OK\r\n", Some(true)),
        (ProtocolName::Http1, "HTTP/1.0 302 Found\n", Some(true)),
        (ProtocolName::Http1, "HTTP/1.1 503 Away\r\n", Some(false)),
        (ProtocolName::Http1, "HTTP/1.1 2000 OK\r\n", Some(false)),
        (ProtocolName::Http1, "HTTP/1.1 2OK\r\n", Some(false)),
        (ProtocolName::Http1, "HTTP/1.1 103 Early Hints\r\n", None),
        (ProtocolName::Http1, "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", None),
        (ProtocolName::Http1, "HTTP/1.1 103 E\r\nLink: x\r\n\r\nHTTP/1.1 200 O\r\n", Some(true)),
        (ProtocolName::Http1, "HTTP/1.1 100 E\n\nHTTP/1.1 500 O\r\n", Some(false)),
        (ProtocolName::Http1, "HTTP/1.1 101 Switching\r\n", Some(false)),
        (ProtocolName::Http1, "SSH-2.0-x 200 200\r\n", Some(false)),
        (ProtocolName::Http1, "\n", Some(false)),
    ] {
        assert_eq!(protocol.is_live(reply.as_bytes()), expected, "{protocol}: {reply:?}");
    }
}

#[test]
fn requests_are_counted_under_the_words_they_begin_with() {
    let lines = ["PING", "GET k", "SET k v", "DEL k", "COMPACT"].map(|line| format!("{line}\n"));
    let heads = ["GET", "HEAD", "POST", "PUT", "DELETE"]
        .map(|method| format!("{method} / HTTP/1.1\r\n\r\n"));
    for (protocol, requests, other) in [
        (ProtocolName::Chronos, lines, "KEYS\n"),
        (ProtocolName::Http1, heads, "OPTIONS * HTTP/1.1\r\n\r\n"),
    ] {
        let label = |text: &str| {
            let request = request(protocol, text.as_bytes()).unwrap();
            request.verb.label()
        };
        for text in &requests {
            let word = text.split_whitespace().next().unwrap().to_ascii_lowercase();
            assert_eq!(label(text), word);
        }
        assert_eq!(label(other), "other");
    }
}

#[test]
fn lines_of_chronos_have_keys_refusals_and_settings_and_its_facts_say_so() {
    let chronos = ProtocolName::Chronos;
    assert_eq!(request(chronos, b"GET k\n").unwrap().key, Some(&b"k"[..]));
    assert_eq!(request(chronos, b" \n"), Err(ErrorReply::Blank));
    assert!(request(chronos, b"COMPACT\n").unwrap().to_all);
    assert!(!request(chronos, b"SET k v\n").unwrap().repeatable);
    let settings = Settings { line_max: 8, repeat_writes: true };
    let mut conversation = Conversation::new(chronos, &settings);
    assert_eq!(conversation.on_request_bytes(b"SET k v\n"), RequestEnd::Whole(8));
    assert!(conversation.request(b"SET k v\n").unwrap().repeatable, "a setting");
    assert_eq!(conversation.on_request_bytes(b"SET k vw"), RequestEnd::Partial);
    assert!(!conversation.is_refused());
    assert_eq!(conversation.on_request_bytes(b"x\n"), RequestEnd::Whole(2));
    assert_eq!(conversation.request(b"x\n"), Err(ErrorReply::TooLong(8)));
    let http1 = ProtocolName::Http1.facts();
    assert!(chronos.facts().has_keys && !http1.has_keys);
    assert!(chronos.facts().can_refuse && !http1.can_refuse);
    assert_eq!(chronos.facts().variables, ["AEGIS_LINE_MAX", "AEGIS_REPEAT_WRITES"]);
    assert!(http1.variables.is_empty());
}

#[test]
fn errors_are_written_as_clients_of_the_protocol_read_them() {
    let text = |protocol: ProtocolName, error: ErrorReply| {
        let mut text = Vec::new();
        protocol.write_error(error, format_args!("{error}"), &mut text).unwrap();
        String::from_utf8(text).unwrap()
    };
    assert_eq!(text(ProtocolName::Tcp, ErrorReply::Lost), "");
    assert_eq!(text(ProtocolName::Chronos, ErrorReply::NoneKnown), "ERR no endpoint is known\n");
    for (error, status) in [
        (ErrorReply::Timeout(SECOND), "504 Gateway Timeout"),
        (ErrorReply::Lost, "502 Bad Gateway"),
        (ErrorReply::Removed, "502 Bad Gateway"),
        (ErrorReply::Unfinished(SECOND), "408 Request Timeout"),
        (ErrorReply::QueueFull, "503 Service Unavailable"),
    ] {
        let expected = format!(
            "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\
             Proxy-Status: aegis-proxy; details=\"{error}\"\r\n\r\n"
        );
        assert_eq!(text(ProtocolName::Http1, error), expected);
    }
}
