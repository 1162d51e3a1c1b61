//! What a request asks for, as a number: what is counted of requests is an array.

use super::COMMANDS_MAX;

/// What a request asks for, as far as its protocol tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Verb(u8);

impl Verb {
    /// Anything that is not counted apart.
    pub const OTHER: Self = Self(0);
    /// Bytes that no request can be found in, or more than one.
    pub const OPAQUE: Self = Self(1);

    /// How many there are in the protocol that has most.
    pub const COUNT: usize = Self::FIRST_COMMAND + COMMANDS_MAX;

    const FIRST_COMMAND: usize = 2;

    /// The command of this number among the protocol's own.
    pub const fn command(number: usize) -> Self {
        assert!(number < COMMANDS_MAX);
        Self((Self::FIRST_COMMAND + number) as u8)
    }

    /// Below [`Verb::COUNT`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Its label, among the commands of its protocol.
    pub(super) fn label(self, commands: &'static [&'static str]) -> &'static str {
        match self {
            Self::OTHER => "other",
            Self::OPAQUE => "opaque",
            Self(command) => commands[usize::from(command) - Self::FIRST_COMMAND],
        }
    }
}
