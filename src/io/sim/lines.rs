//! Peers that speak lines: clients whose requests name them, backends whose answers name the
//! request, and everything that either may do wrong.

use super::{Peer, Plan, Sim};
use crate::limits::BUFFER_SIZE;

/// The longest line that is a request.
pub const LINE_MAX: usize = 64;
/// What backends send unsolicited starts so.
pub const UNASKED: &str = "UNASKED";

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// To be answered with a line that names this tag.
    Tag(String),
    /// For all stores.
    Compact,
    /// Nothing: a blank line.
    Blank,
    /// A line that no backend would take.
    TooLong,
}

/// What a peer says.
#[derive(Debug, Default)]
pub struct Lines {
    /// All that it says, a client from the start, a backend as it is asked.
    pub out: Vec<u8>,
    /// What a client asks for, line by line.
    pub asked: Vec<Asked>,
    /// The endpoint that a backend is at.
    pub endpoint: u16,
    /// The requests that reached a backend.
    pub heard: Vec<String>,
    /// How often a backend sent something unsolicited.
    pub unasked: usize,
    /// Where each of a client's lines ends.
    ends: Vec<usize>,
    /// Whole lines that arrived.
    answers: usize,
    /// How many requests a client sends ahead of the answers.
    ahead: usize,
    /// The longest piece that a peer sends at once.
    chunk: usize,
    /// Up to where a backend has understood what it was sent.
    understood: usize,
    /// An answer ends there and what follows is not kept apart from it.
    glued_at: Option<usize>,
    /// A backend answers no more.
    mute: bool,
    /// A backend sends something unsolicited once it has sent all else.
    will_speak: bool,
    /// A backend dies of the next request.
    fragile: bool,
}

impl Lines {
    /// Whether a backend has taken in all of the bytes that reached it.
    pub(super) fn has_understood(&self, received: usize) -> bool {
        self.understood == received
    }

    /// Up to where a peer may send now.
    pub(super) fn goal(&self, peer: &Peer) -> usize {
        if !peer.is_client {
            return self.out.len();
        }
        let lines = (self.answers + self.ahead).min(self.ends.len());
        lines.checked_sub(1).map_or(0, |last| self.ends[last])
    }

    /// How much is sent at once.
    pub(super) fn chunk(&self, chunk: usize) -> usize {
        if self.glued_at.is_some() {
            usize::MAX
        } else {
            chunk % self.chunk + 1 + self.out.len() / 100
        }
    }

    /// Bytes arrived.
    pub(super) fn hear(&mut self, bytes: &[u8]) {
        self.answers += bytes.split(|&byte| byte == b'\n').count() - 1;
    }

    /// How much arrives at once, where `len` would.
    pub(super) fn piece(&self, at: usize, len: usize) -> usize {
        match self.glued_at {
            Some(end) if at + len == end && len < BUFFER_SIZE => len + 1,
            Some(end) if at + len == end => len - 1,
            _ => len,
        }
    }

    /// How many whole requests a client that sent `sent` bytes has made.
    pub fn asked_in(&self, sent: usize) -> usize {
        self.ends.iter().filter(|&&end| end <= sent).count()
    }

    /// How many of them are whole lines.
    pub fn whole_in(&self, sent: usize) -> usize {
        self.out[..sent].split(|&byte| byte == b'\n').count() - 1
    }
}

/// The answer to a request line, as the backend at an endpoint gives it.
pub fn answer_to(line: &str, endpoint: u16) -> String {
    let mut words = line.split_whitespace();
    match (words.next(), words.next()) {
        (Some("COMPACT"), _) => "OK_COMPACTED\n".to_string(),
        (_, tag) => answer(tag.unwrap_or_default(), endpoint),
    }
}

/// The answer that names a tag: most are short, some fill many buffers.
pub fn answer(tag: &str, endpoint: u16) -> String {
    let sum: usize = tag.bytes().map(usize::from).sum();
    let len = match sum % 64 {
        0 => 60_000,
        1..=3 => 5_000,
        few => few,
    };
    format!("VAL {tag} e{endpoint} {}\n", "x".repeat(len))
}

impl Sim {
    /// A client with requests.
    pub(super) fn add_asker(&mut self) -> usize {
        let id = self.peers.len() as u64 + 1;
        let rng = &mut self.rng;
        let mut lines = Lines {
            ahead: [1, 1, 2, 100][rng.usize(..4)],
            chunk: [3, 50, 8000][rng.usize(..3)],
            ..Lines::default()
        };
        for number in 0..rng.usize(..20) {
            let tag = format!("c{id}r{number}");
            let (line, asked) = match rng.u8(..24) {
                0 => ("\n".to_string(), Asked::Blank),
                1 => (" \t\r\n".to_string(), Asked::Blank),
                2 => (format!("GET {}\n", "y".repeat(rng.usize(LINE_MAX..400))), Asked::TooLong),
                3 => ("COMPACT\n".to_string(), Asked::Compact),
                kind => {
                    let verb = ["GET", "SET", "PING", "DEL", "WHAT"][usize::from(kind) % 5];
                    (format!("{verb} {tag} some value\n"), Asked::Tag(tag))
                }
            };
            lines.out.extend_from_slice(line.as_bytes());
            lines.ends.push(lines.out.len());
            lines.asked.push(asked);
        }
        // Now and then the last line never ends.
        if rng.u8(..10) == 0 {
            lines.out.extend_from_slice(b"GET unfin");
            lines.ends.push(lines.out.len());
            lines.asked.push(Asked::Blank);
            lines.ahead = 100;
        }
        let sends = lines.out.len();
        let plan = Plan {
            sends,
            greeting: 0,
            ends_first: rng.u8(..3) == 0,
            resets_at: (rng.u8(..8) == 0).then(|| rng.usize(..=sends)),
            stalls_at: (rng.u8(..16) == 0).then(|| rng.usize(..400)),
            piece: if rng.u8(..4) == 0 { 5 } else { BUFFER_SIZE },
            pause_us: [20, 300, 5_000, 50_000][rng.usize(..4)],
        };
        let index = self.add_peer(true, plan);
        self.peers[index].lines = Some(Box::new(lines));
        index
    }

    /// A backend that answers.
    pub(super) fn add_answerer(&mut self, endpoint: u16) -> usize {
        let rng = &mut self.rng;
        let greets = rng.u8(..40) == 0;
        let chunk = [5, 100, 8000][rng.usize(..3)];
        let lines = Lines { endpoint, chunk, will_speak: greets, ..Lines::default() };
        let plan = Plan {
            sends: usize::MAX,
            greeting: 0,
            ends_first: true,
            resets_at: None,
            stalls_at: None,
            piece: if rng.u8(..4) == 0 { 7 } else { BUFFER_SIZE },
            pause_us: [20, 300, 5_000][rng.usize(..3)],
        };
        let index = self.add_peer(false, plan);
        self.peers[index].lines = Some(Box::new(lines));
        index
    }

    /// A backend reads what it was sent, and decides what becomes of it.
    pub(super) fn answer(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        let Some(lines) = peer.lines.as_mut().filter(|_| !peer.is_client) else { return };
        if lines.will_speak && peer.sent == lines.out.len() && self.rng.u8(..3) == 0 {
            lines.out.extend_from_slice(format!("{UNASKED} words\n").as_bytes());
            lines.unasked += 1;
            (lines.will_speak, lines.fragile) = (false, true);
        }
        while let Some(end) =
            peer.received[lines.understood..].iter().position(|&byte| byte == b'\n')
        {
            let line = &peer.received[lines.understood..=lines.understood + end];
            lines.understood += end + 1;
            let line = String::from_utf8(line.to_vec()).expect("requests are text");
            assert!(line.len() <= LINE_MAX && !line.trim().is_empty(), "a backend got {line:?}");
            let busy = peer.sent < lines.out.len() || lines.understood < peer.received.len();
            assert!(!busy || lines.fragile, "a backend got two requests at once: {line:?}");
            assert!(lines.glued_at.is_none(), "a connection was used after surplus");
            let answer = answer_to(&line, lines.endpoint);
            lines.heard.push(line);
            let before = lines.out.len();
            let fate = if lines.fragile { 0 } else { self.rng.u8(..60) };
            if lines.mute {
                continue;
            }
            match fate {
                0 => {}
                4 => lines.mute = true,
                _ => lines.out.extend_from_slice(answer.as_bytes()),
            }
            let dies_at = match fate {
                0 => before,
                1 => self.rng.usize(before + 1..lines.out.len()),
                2 => lines.out.len(),
                3 => {
                    lines.glued_at = Some(lines.out.len());
                    lines.out.extend_from_slice(b"SURPLUS that nobody asked for\n");
                    continue;
                }
                5 => {
                    lines.will_speak = true;
                    continue;
                }
                _ => continue,
            };
            if self.rng.bool() {
                peer.plan.resets_at = Some(dies_at);
            } else {
                peer.plan.sends = dies_at;
            }
        }
    }
}
