//! Peers that speak HTTP/1.1: clients whose requests name them, backends whose answers name the
//! request and last as long as they like, and everything that either may do wrong. They frame
//! messages by themselves, apart from the code that they test.

use super::{Plan, Sim};
use crate::limits::BUFFER_SIZE;

/// The tag of what backends send before a request.
pub const UNASKED: &str = "UNASKED";
/// The tag of what they say behind an answer.
pub const SURPLUS: &str = "MORE";
/// How a client's bytes begin that are no request.
const MALFORMED: &[u8] = b"GET /malformed HTTP/1.1\n\n";
/// Data of one chunk.
const CHUNK: usize = 777;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Its name; `None` for bytes that are no request.
    pub tag: Option<String>,
    /// The length of its body.
    pub body: usize,
    /// Where it ends in what the client says.
    pub ends_at: usize,
}

/// A request that a backend has begun to read.
#[derive(Debug)]
struct Reading {
    body: Vec<u8>,
    arrived: usize,
    /// Where it is in [`Http::heard`].
    index: usize,
    answers_early: bool,
}

/// A request as it reached a backend.
#[derive(Debug)]
pub struct Heard {
    /// Its name.
    pub tag: String,
    /// Whether it may not be made twice.
    pub is_post: bool,
    /// Whether all of it came.
    pub is_whole: bool,
}

/// What a peer says.
#[derive(Debug, Default)]
pub struct Http {
    /// All that it says, a client from the start, a backend as it is asked.
    pub out: Vec<u8>,
    /// What a client asks for, one after the other.
    pub asked: Vec<Asked>,
    /// The endpoint that a backend is at.
    pub endpoint: u16,
    /// The requests that reached a backend.
    pub heard: Vec<Heard>,
    /// How often a backend sent something unsolicited.
    pub unasked: usize,
    /// Whole answers that arrived.
    answers: usize,
    /// How many requests a client sends ahead of the answers.
    ahead: usize,
    /// The longest piece that a peer sends at once.
    chunk: usize,
    /// Up to where a peer has taken in what it was sent.
    understood: usize,
    reading: Option<Reading>,
    /// A backend answers no more, and does not read on.
    over: bool,
    will_speak: bool,
    fragile: bool,
}

impl Http {
    pub(super) fn has_understood(&self, received: usize) -> bool {
        self.understood == received && self.reading.is_none() && !self.over
    }

    pub(super) fn goal(&self, is_client: bool) -> usize {
        if !is_client {
            return self.out.len();
        }
        let requests = (self.answers + self.ahead).min(self.asked.len());
        requests.checked_sub(1).map_or(0, |last| self.asked[last].ends_at)
    }

    pub(super) fn chunk(&self, chunk: usize) -> usize {
        chunk % self.chunk + 1 + self.out.len() / 100
    }

    /// Bytes arrived: all of them are these.
    pub(super) fn hear(&mut self, received: &[u8]) {
        while let Some((answer, taken)) = first_answer(&received[self.understood..])
            && answer.is_whole
        {
            self.understood += taken;
            self.answers += 1;
        }
    }
}

/// An answer that reached a client.
#[allow(clippy::struct_excessive_bools, reason = "independent facts")]
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The request that it names.
    pub tag: Option<String>,
    /// The proxy gave it.
    pub is_ours: bool,
    /// It says that the connection ends with it.
    pub closes: bool,
    /// Its body, without its framing.
    pub body: Vec<u8>,
    /// It lasts until the connection ends.
    pub ends_with_connection: bool,
    /// Whether its framing says that it is complete.
    pub is_whole: bool,
}

/// The answers in what a client received. What follows the last whole head is left out.
pub fn parse(mut bytes: &[u8]) -> Vec<Answer> {
    let mut answers = Vec::new();
    while let Some((answer, taken)) = first_answer(bytes) {
        answers.push(answer);
        bytes = &bytes[taken..];
    }
    answers
}

/// The answer at the front, and how many bytes are its own so far.
fn first_answer(bytes: &[u8]) -> Option<(Answer, usize)> {
    let end = find(bytes, b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).expect("heads are text");
    let rest = &bytes[end + 4..];
    let field =
        |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let status = head.get(9..12).and_then(|status| status.parse().ok()).expect("a status line");
    let length = field("Content-Length").map(|n| n.parse::<usize>().expect("a number"));
    let (body, taken, is_whole) = match length {
        Some(length) => {
            let taken = length.min(rest.len());
            (rest[..taken].to_vec(), taken, taken == length)
        }
        None if field("Transfer-Encoding").is_some() => unchunk(rest),
        None => (rest.to_vec(), rest.len(), false),
    };
    let answer = Answer {
        status,
        tag: field("Tag").map(str::to_string),
        is_ours: field("Proxy-Status").is_some(),
        closes: field("Connection") == Some("close"),
        body,
        ends_with_connection: length.is_none() && field("Transfer-Encoding").is_none(),
        is_whole,
    };
    Some((answer, end + 4 + taken))
}

/// What is in chunks, how long they are, and whether that is all of them.
fn unchunk(bytes: &[u8]) -> (Vec<u8>, usize, bool) {
    let (mut body, mut at) = (Vec::new(), 0);
    while let Some(end) = find(&bytes[at..], b"\r\n") {
        let size = std::str::from_utf8(&bytes[at..at + end]).expect("a chunk's size is text");
        let size = usize::from_str_radix(size, 16).expect("a chunk's size");
        let data = at + end + 2;
        if size == 0 {
            let is_whole = bytes.len() >= data + 2;
            return (body, if is_whole { data + 2 } else { bytes.len() }, is_whole);
        }
        let Some(part) = bytes.get(data..data + size) else { break };
        body.extend_from_slice(part);
        at = data + size + 2;
        if at > bytes.len() {
            break;
        }
    }
    (body, bytes.len(), false)
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

fn sum(tag: &str) -> usize {
    tag.bytes().map(usize::from).sum()
}

fn filled(tag: &str, len: usize) -> Vec<u8> {
    tag.bytes().cycle().take(len).collect()
}

fn chunked(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for part in body.chunks(CHUNK) {
        out.extend_from_slice(format!("{:x}\r\n", part.len()).as_bytes());
        out.extend_from_slice(part);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"0\r\n\r\n");
    out
}

/// The body of the answer to a request, as an endpoint gives it.
pub fn body_of(tag: &str, endpoint: u16) -> Vec<u8> {
    let len = match sum(tag) % 24 {
        0 => 60_000,
        1..=3 => 5_000,
        few => few,
    };
    let mut body = format!("e{endpoint} ").into_bytes();
    body.extend(filled(tag, len));
    body
}

/// Whether the answer to a request lasts until its connection ends.
fn lasts_until_close(tag: &str) -> bool {
    sum(tag) % 10 == 4
}

fn answer(status: &str, tag: &str, body: &[u8]) -> Vec<u8> {
    let (framing, body) = match sum(tag) % 10 {
        4 => ("Connection: close".to_string(), body.to_vec()),
        5..=6 => ("Transfer-Encoding: chunked".to_string(), chunked(body)),
        _ => (format!("Content-Length: {}", body.len()), body.to_vec()),
    };
    let mut out = format!("HTTP/1.1 {status}\r\nTag: {tag}\r\n{framing}\r\n\r\n").into_bytes();
    out.extend(body);
    out
}

impl Sim {
    /// A client with requests.
    pub(super) fn add_http_client(&mut self) -> usize {
        let id = self.peers.len() as u64 + 1;
        let rng = &mut self.rng;
        let mut http = Http {
            ahead: [1, 1, 2, 100][rng.usize(..4)],
            chunk: [3, 50, 8000][rng.usize(..3)],
            ..Http::default()
        };
        for number in 0..rng.usize(..12) {
            let tag = format!("c{id}r{number}");
            let len = [0, 1, 300, 5_000, 50_000][rng.usize(..5)];
            let kind = rng.u8(..40);
            let (mut request, body) = match kind {
                0 => (MALFORMED.to_vec(), 0),
                1..=19 => (format!("GET /{tag} HTTP/1.1\r\nHost: a\r\n\r\n").into_bytes(), 0),
                20..=32 => {
                    let head = format!("POST /{tag} HTTP/1.1\r\nContent-Length: {len}\r\n\r\n");
                    (head.into_bytes(), len)
                }
                _ => {
                    let framing = format!("Length: {len}\r\nTransfer-Encoding: chunked");
                    (format!("POST /{tag} HTTP/1.1\r\n{framing}\r\n\r\n").into_bytes(), len)
                }
            };
            match kind {
                20..=32 => request.extend(filled(&tag, body)),
                33.. => request.extend(chunked(&filled(&tag, body))),
                _ => {}
            }
            http.out.extend(request);
            let tag = (kind > 0).then_some(tag);
            let is_last = tag.is_none();
            http.asked.push(Asked { tag, body, ends_at: http.out.len() });
            if is_last {
                break;
            }
        }
        let sends = http.out.len();
        let plan = Plan {
            sends,
            greeting: 0,
            ends_first: rng.u8(..3) == 0,
            resets_at: (rng.u8(..8) == 0).then(|| rng.usize(..=sends)),
            stalls_at: (rng.u8(..16) == 0).then(|| rng.usize(..400)),
            piece: if rng.u8(..4) == 0 { 50 } else { BUFFER_SIZE },
            pause_us: [20, 300, 5_000][rng.usize(..3)],
        };
        let index = self.add_peer(true, plan);
        self.peers[index].http = Some(Box::new(http));
        index
    }

    /// A backend that answers.
    pub(super) fn add_http_backend(&mut self, endpoint: u16) -> usize {
        let rng = &mut self.rng;
        let chunk = [5, 100, 8000][rng.usize(..3)];
        let http = Http { endpoint, chunk, will_speak: rng.u8(..40) == 0, ..Http::default() };
        let plan = Plan {
            sends: usize::MAX,
            greeting: 0,
            ends_first: true,
            resets_at: None,
            stalls_at: None,
            piece: if rng.u8(..4) == 0 { 70 } else { BUFFER_SIZE },
            pause_us: [20, 300, 5_000][rng.usize(..3)],
        };
        let index = self.add_peer(false, plan);
        self.peers[index].http = Some(Box::new(http));
        index
    }

    /// A backend reads what it was sent, and decides what becomes of it.
    pub(super) fn answer_http(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        let Some(http) = peer.http.as_mut().filter(|_| !peer.is_client) else { return };
        let is_idle = peer.sent == http.out.len() && http.reading.is_none() && !http.over;
        if http.will_speak && is_idle && self.rng.u8(..3) == 0 {
            http.out.extend(answer("408 Too late", UNASKED, b""));
            http.unasked += 1;
            (http.will_speak, http.fragile) = (false, true);
        }
        while !http.over {
            let fresh = &peer.received[http.understood..];
            if let Some(reading) = &mut http.reading {
                let count = (reading.body.len() - reading.arrived).min(fresh.len());
                let expected = &reading.body[reading.arrived..reading.arrived + count];
                assert!(fresh[..count] == *expected, "a backend got another body");
                reading.arrived += count;
                http.understood += count;
                if reading.arrived < reading.body.len() {
                    return;
                }
                http.heard[reading.index].is_whole = true;
                let (at, early) = (reading.index, reading.answers_early);
                http.reading = None;
                if !early {
                    http.give_answer(at, &mut peer.plan, &mut self.rng);
                }
                continue;
            }
            if fresh.starts_with(MALFORMED) {
                http.out.extend_from_slice(b"HTTP/1.1 400 No\r\nContent-Length: 0\r\n\r\n");
                http.over = true;
                peer.plan.sends = http.out.len();
                return;
            }
            let Some(end) = find(fresh, b"\r\n\r\n") else { return };
            let head = std::str::from_utf8(&fresh[..end]).expect("heads are text").to_string();
            http.understood += end + 4;
            let busy = peer.sent < http.out.len();
            assert!(!busy || http.fragile, "a backend got two requests at once: {head:?}");
            http.begin(&head, &mut peer.plan, &mut self.rng);
        }
    }
}

impl Http {
    /// A request's head has come.
    fn begin(&mut self, head: &str, plan: &mut Plan, rng: &mut fastrand::Rng) {
        let field =
            |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let tag = head.split(' ').nth(1).and_then(|target| target.strip_prefix('/'));
        let tag = tag.expect("a request line").to_string();
        let is_post = head.starts_with("POST");
        let len = |name| field(name).map_or(0, |n| n.parse().expect("a number"));
        let body = match field("Transfer-Encoding") {
            Some(_) => chunked(&filled(&tag, len("Length"))),
            None => filled(&tag, len("Content-Length")),
        };
        let index = self.heard.len();
        self.heard.push(Heard { tag, is_post, is_whole: false });
        let fate = if self.fragile { 0 } else { rng.u8(..40) };
        let answers_early = is_post && matches!(fate, 6 | 7);
        self.reading = Some(Reading { body, arrived: 0, index, answers_early });
        match fate {
            0 => self.die(self.out.len(), plan, rng),
            6 if is_post => {
                let tag = self.heard[index].tag.clone();
                let body = body_of(&tag, self.endpoint);
                if lasts_until_close(&tag) {
                    self.reading = None;
                    self.out.extend(answer("413 Too large", &tag, &body));
                    self.die(self.out.len(), plan, rng);
                } else {
                    self.out.extend(answer("202 Accepted", &tag, &body));
                }
            }
            7 if is_post => {
                let tag = self.heard[index].tag.clone();
                self.out.extend_from_slice(
                    format!("HTTP/1.1 413 Too large\r\nTag: {tag}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                        .as_bytes(),
                );
                self.die(self.out.len(), plan, rng);
            }
            _ => {}
        }
    }

    /// A request has come whole.
    fn give_answer(&mut self, index: usize, plan: &mut Plan, rng: &mut fastrand::Rng) {
        let tag = self.heard[index].tag.clone();
        let before = self.out.len();
        match rng.u8(..40) {
            0 => return self.die(before, plan, rng),
            1 => return self.over = true,
            fate => {
                self.out.extend(answer("200 OK", &tag, &body_of(&tag, self.endpoint)));
                match fate {
                    2 => {
                        let at = rng.usize(before + 1..self.out.len());
                        self.die(at, plan, rng);
                        if lasts_until_close(&tag) {
                            // Nobody could tell an end in order from that of the answer.
                            (plan.sends, plan.resets_at) = (usize::MAX, Some(at));
                        }
                        return;
                    }
                    3 => return self.die(self.out.len(), plan, rng),
                    4 if !lasts_until_close(&tag) => {
                        self.out.extend(answer("200 OK", SURPLUS, b""));
                        self.fragile = true;
                        self.unasked += 1;
                    }
                    5 => self.will_speak = true,
                    _ => {}
                }
            }
        }
        if lasts_until_close(&tag) {
            self.over = true;
            plan.sends = self.out.len();
        }
    }

    /// The backend ends or breaks once it has sent so much.
    fn die(&mut self, at: usize, plan: &mut Plan, rng: &mut fastrand::Rng) {
        self.over = true;
        if rng.bool() {
            plan.resets_at = Some(at);
        } else {
            plan.sends = at;
        }
    }
}
