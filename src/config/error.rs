//! What is wrong with a configuration, and how it is reported.

use std::fmt;

use super::variable::{PREFIX, VARIABLES, Variable};

/// Names that are less alike than this are no suggestion (Jaro and Winkler, 1 is equality).
const SUGGESTION_LIKENESS_MIN: f64 = 0.8;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// The value is not an accepted one.
    Value {
        /// The variable's name.
        name: &'static str,
        /// Its value, with what is not Unicode replaced.
        value: String,
        /// Why it is not accepted.
        why: String,
        /// What is.
        accepts: String,
    },
    /// Two values do not go together.
    Conflict {
        /// Names and values of both.
        pairs: [(&'static str, String); 2],
        /// Why.
        why: String,
    },
    /// There is no such variable.
    Unknown {
        /// The name that was found.
        name: String,
        /// A variable with a name much like it.
        similar: Option<&'static str>,
    },
    /// The environment could not be taken apart.
    Environment(String),
}

impl Problem {
    pub(super) fn value(variable: &Variable, value: &str, why: String) -> Self {
        let (name, accepts) = (variable.name, variable.accepts());
        Self::Value { name, value: value.to_owned(), why, accepts }
    }

    pub(super) fn unknown(name: String) -> Self {
        // Without the common prefix, which would make all names look alike.
        let bare = |name: &str| name.trim_start_matches(PREFIX).to_ascii_uppercase();
        let likeness = |variable: &Variable| {
            if has_one_word_more(&name, variable.name) {
                1.0
            } else {
                strsim::jaro_winkler(&bare(variable.name), &bare(&name))
            }
        };
        let similar = VARIABLES
            .iter()
            .map(|&variable| (likeness(variable), variable.name))
            .filter(|&(likeness, _)| likeness >= SUGGESTION_LIKENESS_MIN)
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .map(|(_, name)| name);
        Self::Unknown { name, similar }
    }

    /// The name of the variable that is wrong, or of the first of two.
    fn name(&self) -> Option<&str> {
        match self {
            Self::Value { name, .. } | Self::Conflict { pairs: [(name, _), _], .. } => Some(name),
            Self::Unknown { .. } | Self::Environment(_) => None,
        }
    }

    /// Whether the variable is wrong, or the first of two.
    pub(super) fn is_about(&self, variable: &Variable) -> bool {
        self.name() == Some(variable.name)
    }

    /// Where its variable stands in the table; behind all where it has none.
    pub(super) fn position(&self) -> usize {
        VARIABLES.iter().position(|variable| self.is_about(variable)).unwrap_or(VARIABLES.len())
    }
}

/// Whether `name` is `other` with one more word, not at its end, which says what it is.
fn has_one_word_more(name: &str, other: &str) -> bool {
    let words: Vec<_> = name.split('_').collect();
    (0..words.len() - 1).any(|at| {
        let rest: Vec<_> = [&words[..at], &words[at + 1..]].concat();
        rest.join("_") == other
    })
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value { name, value, why, accepts } => {
                write!(f, "{name}={value:?}: {why}. Accepted: {accepts}.")
            }
            Self::Conflict { pairs: [(a, a_value), (b, b_value)], why } => {
                write!(f, "{a}={a_value:?} and {b}={b_value:?}: {why}.")
            }
            Self::Unknown { name, similar: Some(similar) } => {
                write!(f, "{name}: no such variable. Is {similar} meant?")
            }
            Self::Unknown { name, similar: None } => {
                write!(f, "{name}: no such variable; --help lists all.")
            }
            Self::Environment(why) => write!(f, "the environment cannot be read: {why}"),
        }
    }
}

/// Everything that is wrong with a configuration; never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors(pub(super) Vec<Problem>);

impl ConfigErrors {
    /// The problems in the order of [`VARIABLES`]; unknown names come last.
    pub fn problems(&self) -> &[Problem] {
        &self.0
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.len() {
            1 => write!(f, "the configuration has a problem:")?,
            n => write!(f, "the configuration has {n} problems:")?,
        }
        self.0.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}
