//! Answers that no API server should give, and some give all the same.

use std::io::Write;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::stand_in::{Request, Tls, answer, bookmark, chunk, failure};

/// What the server does with each request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Odd {
    /// Sends it elsewhere.
    Redirect,
    /// A good answer without a body.
    Empty,
    /// The page of a captive portal.
    Html,
    /// The same, which calls itself JSON.
    HtmlAsJson,
    /// An answer that breaks off.
    Truncated,
    /// Lists are good, and the watches end at once.
    EndsAtOnce,
    /// Lists are good, and watches are too late at once.
    GoneAtOnce,
    /// 429 with this `Retry-After`.
    Throttled(u32),
    /// 401.
    Unauthorized,
    /// A head that does not end.
    EndlessHead,
    /// An event that does not end.
    HugeEvent,
    /// Objects that do not end.
    EndlessObjects,
    /// A list by a watch that does not end, with signs of life.
    BookmarksOnly,
    /// Events that go back in time, after a good list.
    BackInTime,
    /// Lists only, with always one page more.
    EndlessPages,
    /// Nothing at all.
    Silent,
}

const HTML: &str = "<html>Please log in</html>";

const CHUNKED: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";

/// Answers so, with these objects where a list is good; what does not end ends with the client's patience, or once `goes_on` is false.
pub fn talk(
    tls: &mut Tls,
    odd: Odd,
    request: &Request,
    objects: &[Value],
    goes_on: impl Fn() -> bool,
) -> std::io::Result<()> {
    let typed = |tls: &mut Tls, media_type: &str, length: usize, body: &str| {
        let head = format!("Content-Type: {media_type}\r\nContent-Length: {length}\r\n\r\n");
        raw(tls, &format!("HTTP/1.1 200 OK\r\n{head}{body}"))
    };
    match odd {
        Odd::Redirect => {
            let path = &request.path;
            raw(tls, &format!("HTTP/1.1 302 -\r\nLocation: {path}\r\nContent-Length: 0\r\n\r\n"))
        }
        Odd::Empty => typed(tls, "application/json", 0, ""),
        Odd::Html => typed(tls, "text/html", HTML.len(), HTML),
        Odd::HtmlAsJson => typed(tls, "application/json", HTML.len(), HTML),
        Odd::Truncated => typed(tls, "application/json", 1000, "{\"kind\": \"List\", \"items\": ["),
        Odd::Throttled(seconds) => {
            let mut status = failure(429, "later");
            status["details"] = json!({"retryAfterSeconds": seconds});
            let body = status.to_string();
            let head = format!("Retry-After: {seconds}\r\nContent-Length: {}", body.len());
            raw(tls, &format!("HTTP/1.1 429 -\r\n{head}\r\n\r\n{body}"))
        }
        Odd::Unauthorized => answer(tls, 401, &failure(401, "Unauthorized")),
        Odd::EndlessPages if request.query.contains_key("sendInitialEvents") => {
            answer(tls, 422, &failure(422, "sendInitialEvents: Forbidden"))
        }
        Odd::EndlessPages => {
            let page = request.query.get("continue").and_then(|text| text.parse::<u64>().ok());
            let next = (page.unwrap_or(0) + 1).to_string();
            let metadata = json!({"resourceVersion": "1", "continue": next});
            let list = json!({"kind": "List", "apiVersion": "v1", "metadata": metadata,
                              "items": []});
            answer(tls, 200, &list)
        }
        Odd::EndsAtOnce | Odd::GoneAtOnce | Odd::BackInTime => {
            watch_that_ends(tls, odd, request, objects)
        }
        _ => go_on_forever(tls, odd, request, goes_on),
    }
}

/// A watch that sends its objects, if it is asked for them, and something odd before it ends.
fn watch_that_ends(
    tls: &mut Tls,
    odd: Odd,
    request: &Request,
    objects: &[Value],
) -> std::io::Result<()> {
    tls.write_all(CHUNKED)?;
    if request.query.contains_key("sendInitialEvents") {
        for object in objects {
            chunk(tls, &json!({"type": "ADDED", "object": object}))?;
        }
        let ends = json!({"k8s.io/initial-events-end": "true"});
        chunk(tls, &bookmark(request, 1000, ends))?;
    }
    match odd {
        Odd::GoneAtOnce => chunk(tls, &error(410))?,
        Odd::BackInTime => chunk(tls, &bookmark(request, 999, json!({})))?,
        _ => {}
    }
    raw(tls, "0\r\n\r\n")
}

/// What has no end of its own.
fn go_on_forever(
    tls: &mut Tls,
    odd: Odd,
    request: &Request,
    goes_on: impl Fn() -> bool,
) -> std::io::Result<()> {
    match odd {
        Odd::EndlessHead => {
            raw(tls, "HTTP/1.1 200 OK\r\n")?;
            while goes_on() {
                raw(tls, "X-More: yes\r\n")?;
            }
            Ok(())
        }
        Odd::HugeEvent => {
            tls.write_all(CHUNKED)?;
            let piece = "x".repeat(64 << 10);
            while goes_on() {
                raw(tls, &format!("{:x}\r\n{piece}\r\n", piece.len()))?;
            }
            Ok(())
        }
        Odd::EndlessObjects => {
            tls.write_all(CHUNKED)?;
            let mut number = 0_u64;
            while goes_on() {
                number += 1;
                let name = format!("{number:0200}");
                let version = (1_000_000 + number).to_string();
                let object = json!({"metadata": {"name": name, "resourceVersion": version},
                                    "addressType": "IPv4", "endpoints": [], "ports": []});
                chunk(tls, &json!({"type": "ADDED", "object": object}))?;
            }
            Ok(())
        }
        Odd::BookmarksOnly => {
            tls.write_all(CHUNKED)?;
            while goes_on() {
                chunk(tls, &bookmark(request, 1_000_000, json!({})))?;
                tls.flush()?;
                thread::sleep(Duration::from_millis(50));
            }
            Ok(())
        }
        Odd::Silent => {
            while goes_on() {
                thread::sleep(Duration::from_millis(50));
            }
            Ok(())
        }
        _ => unreachable!("{odd:?} has an end"),
    }
}

fn raw(tls: &mut Tls, text: &str) -> std::io::Result<()> {
    tls.write_all(text.as_bytes())?;
    tls.flush()
}

fn error(code: u16) -> Value {
    json!({"type": "ERROR", "object": failure(code, "too old resource version")})
}
