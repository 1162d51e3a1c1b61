//! A request that goes to every store.

use super::write_error_reply;
use crate::protocol::{Answers, ErrorReply, ProtocolName};

/// A request that goes to every store, one after the other, so that one at a time is stalled.
#[derive(Debug)]
pub struct Broadcast {
    /// The number of the store that is asked now.
    pub store: u16,
    protocol: ProtocolName,
    stores: u32,
    failed: u32,
    /// The names of stores that are not available, as many as fit, and how many others there are.
    away: String,
    unnamed: u32,
    answer: [u8; Self::ANSWER_MAX],
    len: usize,
    first_failure: Option<([u8; Self::ANSWER_MAX], usize)>,
}

impl Broadcast {
    /// As much of an answer as is passed on.
    const ANSWER_MAX: usize = 128;

    /// As much of the names of stores is passed on.
    const NAMES_MAX: usize = 4096;

    /// A broadcast that begins at the first store.
    pub fn new(protocol: ProtocolName) -> Self {
        Self {
            store: 0,
            protocol,
            stores: 0,
            failed: 0,
            away: String::new(),
            unnamed: 0,
            answer: [0; Self::ANSWER_MAX],
            len: 0,
            first_failure: None,
        }
    }

    /// Bytes of the present store's answer.
    pub fn on_reply(&mut self, bytes: &[u8]) {
        let space = &mut self.answer[self.len..];
        let count = space.len().min(bytes.len());
        space[..count].copy_from_slice(&bytes[..count]);
        self.len += count;
    }

    /// The present store has answered.
    pub fn on_answered(&mut self) {
        let answer = &self.answer[..self.len];
        if !self.protocol.is_success(answer) {
            let len = answer.trim_ascii_end().len();
            self.failed += 1;
            self.first_failure.get_or_insert((self.answer, len));
        }
        self.stores += 1;
        self.len = 0;
    }

    /// The present store has failed.
    pub fn on_failed(&mut self, error: ErrorReply) {
        self.len = 0;
        let mut text = [0; Self::ANSWER_MAX];
        let len = write_error_reply(self.protocol, error, &mut text);
        self.on_reply(&text[..len]);
        self.on_answered();
    }

    /// The present store is not available.
    pub fn on_away(&mut self, name: &str) {
        self.stores += 1;
        self.failed += 1;
        self.len = 0;
        if self.away.len() + name.len() > Self::NAMES_MAX {
            self.unnamed += 1;
            return;
        }
        if !self.away.is_empty() {
            self.away.push_str(", ");
        }
        self.away.push_str(name);
    }

    /// One answer for all stores. Returns its length.
    pub fn write_answer(&self, mut space: &mut [u8]) -> usize {
        let before = space.len();
        let first_failure = self.first_failure.as_ref().map(|(text, len)| &text[..*len]);
        let answers = Answers {
            stores: self.stores,
            failed: self.failed,
            away: &self.away,
            away_unnamed: self.unnamed,
            first_failure,
        };
        // It is far shorter than a buffer.
        let _ = self.protocol.write_combined(&answers, &mut space);
        before - space.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broadcast_has_one_answer() {
        let text = |broadcast: &Broadcast| {
            let mut space = [0; 512];
            let len = broadcast.write_answer(&mut space);
            String::from_utf8(space[..len].to_vec()).unwrap()
        };
        let mut broadcast = Broadcast::new(ProtocolName::Chronos);
        broadcast.on_reply(b"OK_COMP");
        broadcast.on_reply(b"ACTED\n");
        broadcast.on_answered();
        assert_eq!(text(&broadcast), "OK_COMPACTED\n");
        broadcast.on_reply(b"ERR_COMPACT disk full\n");
        broadcast.on_answered();
        broadcast.on_failed(ErrorReply::Lost);
        assert_eq!(
            text(&broadcast),
            "ERR_COMPACT 2 of 3 stores failed, the first with: ERR_COMPACT disk full\n"
        );
        broadcast.on_away("store-3");
        broadcast.on_away("store-4");
        assert_eq!(
            text(&broadcast),
            "ERR_COMPACT 4 of 5 stores failed, not available: store-3, store-4, the first other \
             with: ERR_COMPACT disk full\n"
        );
        let mut broadcast = Broadcast::new(ProtocolName::Chronos);
        (0..1000).for_each(|i| broadcast.on_away(&format!("a-store-with-a-name-{i}")));
        let answer = {
            let mut space = [0; 16384];
            let len = broadcast.write_answer(&mut space);
            String::from_utf8(space[..len].to_vec()).unwrap()
        };
        assert!(answer.ends_with(" more\n") && answer.len() < 6000, "{answer}");
    }
}
