//! What is wrong with a configuration, and how it is reported.

use std::borrow::Cow;
use std::fmt;

use super::RouteName;
use super::routes::{AEGIS_ROUTES, Names, parts, plain};
use super::variable::{PREFIX, VARIABLES, Variable};

/// Names that are less alike than this are no suggestion (Jaro and Winkler, 1 is equality).
const SUGGESTION_LIKENESS_MIN: f64 = 0.8;

/// Characters of a value that are shown: a list of a thousand backends would hide what is wrong with it, and
/// the other problems.
const SHOWN_MAX: usize = 200;

/// Variables of earlier versions, and what to do instead.
const GONE: &[(&str, &str)] = &[(
    "AEGIS_ROUTE",
    "it is gone. For key set AEGIS_BALANCE=key_hash in its place, for balance nothing",
)];

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// The value is not an accepted one.
    Value {
        /// The variable's name.
        name: String,
        /// Its value, with what is not Unicode replaced.
        value: String,
        /// Why it is not accepted.
        why: String,
        /// What is.
        accepts: String,
    },
    /// Two values do not go together.
    Conflict {
        /// Of which route, where routes have names.
        route: Option<RouteName>,
        /// Names and values of both.
        pairs: [(String, String); 2],
        /// Why.
        why: String,
    },
    /// There is no such variable.
    Unknown {
        /// The name that was found.
        name: String,
        /// A variable with a name much like it.
        similar: Option<String>,
    },
    /// There is such a variable, but not of that route.
    Misplaced {
        /// The name that was found.
        name: String,
        /// Why not, and what to set.
        why: String,
    },
    /// The environment could not be taken apart.
    Environment(String),
}

impl Problem {
    pub(super) fn value(name: String, variable: &Variable, value: &str, why: String) -> Self {
        Self::Value { name, value: value.to_owned(), why, accepts: variable.accepts() }
    }

    /// What is wrong with a name that is no variable's where there are these routes.
    pub(super) fn no_variable(name: String, routes: &Names) -> Option<Self> {
        if let Some((_, why)) = GONE.iter().find(|(gone, _)| plain(&name) == *gone) {
            return Some(Self::Misplaced { name, why: (*why).to_owned() });
        }
        let Some((of, plain)) = parts(&name) else {
            let similar = routes.with_one_underscore(&name);
            let similar = similar.or_else(|| similar_to(&name, |_| true).map(str::to_owned));
            return Some(Self::Unknown { name, similar });
        };
        let route = routes.with_prefix_of(&name);
        let variable = VARIABLES.iter().find(|variable| variable.name == plain);
        match (variable, route) {
            (None, Some(route)) => {
                let similar = similar_to(&plain, Variable::is_of_routes);
                let similar = similar.map(|similar| route.own(similar));
                Some(Self::Unknown { name, similar })
            }
            (None, None) => {
                let similar = similar_to(&plain, |_| true).map(str::to_owned);
                Some(Self::Unknown { name, similar })
            }
            (Some(variable), _) if !variable.is_of_routes() => {
                let why = format!("it is for the whole process, and no route's own. Set {plain}");
                Some(Self::Misplaced { name, why })
            }
            // It may be one of those that could not be told.
            (Some(_), _) if !routes.are_right => None,
            (Some(_), _) => {
                let why = no_route(of, &plain, routes);
                Some(Self::Misplaced { name, why })
            }
        }
    }

    /// The name of the variable that is wrong, or of the first of two.
    fn name(&self) -> Option<&str> {
        match self {
            Self::Value { name, .. } | Self::Conflict { pairs: [(name, _), _], .. } => Some(name),
            Self::Unknown { .. } | Self::Misplaced { .. } | Self::Environment(_) => None,
        }
    }

    /// Whether the variable is wrong, or the first of two; of whichever route.
    pub(super) fn is_about(&self, variable: &Variable) -> bool {
        self.name().is_some_and(|name| plain(name) == variable.name)
    }

    /// Where its variable stands in the table; behind all where it has none.
    pub(super) fn position(&self) -> usize {
        VARIABLES.iter().position(|variable| self.is_about(variable)).unwrap_or(VARIABLES.len())
    }
}

/// Why there is no such variable of a route, and what to do about it.
fn no_route(of: &str, variable: &str, routes: &Names) -> String {
    let of = of.to_ascii_lowercase().replace('_', "-");
    if !routes.are_given {
        return format!(
            "there is no route {of:?}, as AEGIS_ROUTES is not set. Set {variable}, or \
             AEGIS_ROUTES={of} as well"
        );
    }
    let text: Vec<_> = routes.all.iter().map(RouteName::as_str).collect();
    let (name, text) = (AEGIS_ROUTES.name, text.join(","));
    let likeness = |route: &&RouteName| strsim::jaro_winkler(route.as_str(), &of);
    let near = routes.all.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match near.filter(|route| likeness(route) >= SUGGESTION_LIKENESS_MIN) {
        Some(route) => {
            format!("{name}={text:?} does not name {of:?}. Is {} meant?", route.own(variable))
        }
        None => format!("{name}={text:?} does not name {of:?}. Name it there, or unset this"),
    }
}

/// The variable with a name much like this one, if there is one.
fn similar_to(name: &str, is_meant: impl Fn(&Variable) -> bool) -> Option<&'static str> {
    // Without the common prefix, which would make all names look alike.
    let bare = |name: &str| name.trim_start_matches(PREFIX).to_ascii_uppercase();
    let likeness = |variable: &Variable| {
        if has_one_word_more(name, variable.name) {
            1.0
        } else {
            strsim::jaro_winkler(&bare(variable.name), &bare(name))
        }
    };
    VARIABLES
        .iter()
        .filter(|variable| is_meant(variable))
        .map(|&variable| (likeness(variable), variable.name))
        .filter(|&(likeness, _)| likeness >= SUGGESTION_LIKENESS_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

/// Whether `name` is `other` with one more word, not at its end, which says what it is.
fn has_one_word_more(name: &str, other: &str) -> bool {
    let words: Vec<_> = name.split('_').collect();
    (0..words.len() - 1).any(|at| {
        let rest: Vec<_> = [&words[..at], &words[at + 1..]].concat();
        rest.join("_") == other
    })
}

fn shown(value: &str) -> Cow<'_, str> {
    match value.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}…", &value[..end]).into(),
        None => value.into(),
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value { name, value, why, accepts } => {
                write!(f, "{name}={:?}: {why}. Accepted: {accepts}.", shown(value))
            }
            Self::Conflict { route, pairs: [(a, a_value), (b, b_value)], why } => {
                if let Some(route) = route {
                    write!(f, "route {route}: ")?;
                }
                write!(f, "{a}={:?} and {b}={:?}: {why}.", shown(a_value), shown(b_value))
            }
            Self::Unknown { name, similar: Some(similar) } => {
                write!(f, "{name}: no such variable. Is {similar} meant?")
            }
            Self::Unknown { name, similar: None } => {
                write!(f, "{name}: no such variable; --help lists all.")
            }
            Self::Misplaced { name, why } if why.ends_with('?') => write!(f, "{name}: {why}"),
            Self::Misplaced { name, why } => write!(f, "{name}: {why}."),
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
