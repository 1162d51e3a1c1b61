//! A request that goes to every store.

use std::io::Write;

use super::Fault;

/// A request that goes to every store, one after the other, so that one at a time is stalled.
#[derive(Debug)]
pub struct Sweep {
    /// The endpoint that is asked now.
    pub endpoint: u16,
    stores: u32,
    failed: u32,
    answer: [u8; Self::ANSWER_MAX],
    len: usize,
    first_failure: Option<([u8; Self::ANSWER_MAX], usize)>,
}

impl Sweep {
    /// As much of an answer as is passed on.
    const ANSWER_MAX: usize = 128;

    /// A sweep that begins at an endpoint.
    pub fn new(endpoint: u16) -> Self {
        Self {
            endpoint,
            stores: 0,
            failed: 0,
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

    /// The present store has answered, with `OK_COMPACTED` if all is well.
    pub fn on_answered(&mut self) {
        let answer = self.answer[..self.len].trim_ascii_end();
        if answer != b"OK_COMPACTED" {
            let len = answer.len();
            self.failed += 1;
            self.first_failure.get_or_insert((self.answer, len));
        }
        self.stores += 1;
        self.len = 0;
    }

    /// The present store has failed.
    pub fn on_failed(&mut self, fault: Fault) {
        self.len = 0;
        let mut text = [0; Self::ANSWER_MAX];
        let mut space = &mut text[..];
        let _ = write!(space, "ERR {fault}");
        let len = Self::ANSWER_MAX - space.len();
        self.on_reply(&text[..len]);
        self.on_answered();
    }

    /// One answer for all stores. Returns its length.
    pub fn write_answer(&self, mut space: &mut [u8]) -> usize {
        let before = space.len();
        // It is far shorter than a buffer.
        let _ = match &self.first_failure {
            None => writeln!(space, "OK_COMPACTED"),
            Some((text, len)) => {
                let (failed, stores) = (self.failed, self.stores);
                let text = String::from_utf8_lossy(&text[..*len]);
                writeln!(
                    space,
                    "ERR_COMPACT {failed} of {stores} stores failed, the first with: {text}"
                )
            }
        };
        before - space.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_has_one_answer() {
        let text = |sweep: &Sweep| {
            let mut space = [0; 512];
            let len = sweep.write_answer(&mut space);
            String::from_utf8(space[..len].to_vec()).unwrap()
        };
        let mut sweep = Sweep::new(0);
        sweep.on_reply(b"OK_COMP");
        sweep.on_reply(b"ACTED\n");
        sweep.on_answered();
        assert_eq!(text(&sweep), "OK_COMPACTED\n");
        sweep.on_reply(b"ERR_COMPACT disk full\n");
        sweep.on_answered();
        sweep.on_failed(Fault::Lost);
        assert_eq!(
            text(&sweep),
            "ERR_COMPACT 2 of 3 stores failed, the first with: ERR_COMPACT disk full\n"
        );
    }
}
