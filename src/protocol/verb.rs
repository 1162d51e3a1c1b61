//! What a request asks for, as a number: what is counted of requests is an array.

use super::COMMANDS;

/// What a request asks for, as far as its protocol tells. Protocols with the same label share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Verb(u8);

impl Verb {
    /// Anything that is not counted apart.
    pub const OTHER: Self = Self(0);
    /// Bytes that no request can be found in, or more than one.
    pub const OPAQUE: Self = Self(1);

    /// How many there are in all protocols together.
    pub const COUNT: usize = LABELS.1;

    /// The one with this label. A label that no protocol has among its commands is a mistake, found
    /// by the compiler where this is called in a `const`.
    pub const fn named(label: &str) -> Self {
        match position(&LABELS.0, LABELS.1, label) {
            Some(at) => Self(at as u8),
            None => panic!("no protocol has this label among its commands"),
        }
    }

    /// Below [`Verb::COUNT`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Its label.
    pub const fn label(self) -> &'static str {
        LABELS.0[self.0 as usize]
    }
}

const LABELS_MAX: usize = 64;

/// The labels, each once, and how many there are.
const LABELS: ([&str; LABELS_MAX], usize) = {
    let (mut labels, mut count) = ([""; LABELS_MAX], 2);
    (labels[0], labels[1]) = ("other", "opaque");
    let mut protocol = 0;
    while protocol < COMMANDS.len() {
        let mut at = 0;
        while at < COMMANDS[protocol].len() {
            let label = COMMANDS[protocol][at];
            if position(&labels, count, label).is_none() {
                labels[count] = label;
                count += 1;
            }
            at += 1;
        }
        protocol += 1;
    }
    (labels, count)
};

const fn position(labels: &[&str], count: usize, label: &str) -> Option<usize> {
    let mut at = 0;
    while at < count {
        if is_equal(labels[at].as_bytes(), label.as_bytes()) {
            return Some(at);
        }
        at += 1;
    }
    None
}

const fn is_equal(a: &[u8], b: &[u8]) -> bool {
    let mut at = 0;
    while at < a.len() && at < b.len() && a[at] == b[at] {
        at += 1;
    }
    at == a.len() && at == b.len()
}
