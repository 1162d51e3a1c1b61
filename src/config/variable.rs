//! What a row of the table is, and what is made of the rows of a struct.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde::Deserialize;

use super::Config;
use super::kind::Describe;
use super::read::Reader;

/// What all names of variables start with.
pub const PREFIX: &str = "AEGIS_";

/// One variable of the environment.
pub struct Variable {
    /// Its name, `AEGIS_…`.
    pub name: &'static str,
    /// The text that stands for it where it is not set.
    pub default: &'static str,
    /// What it does.
    pub help: &'static str,
    pub(super) kind: &'static dyn Describe,
}

impl Variable {
    /// Which values are accepted, with their unit.
    pub fn accepts(&self) -> String {
        self.kind.accepts()
    }
}

/// Every variable, in the order in which people read about them.
pub static VARIABLES: LazyLock<Vec<&'static Variable>> = LazyLock::new(|| variables(Config::ROWS));

/// The whole table, with its headings, and without sections.
#[cfg(test)]
pub(super) fn rows() -> Vec<Row> {
    flat(Config::ROWS)
}

/// The variables among rows and in their sections.
pub(super) fn variables(rows: &[Row]) -> Vec<&'static Variable> {
    let rows = flat(rows).into_iter();
    rows.filter_map(|row| if let Row::Variable(variable) = row { Some(variable) } else { None })
        .collect()
}

fn flat(rows: &[Row]) -> Vec<Row> {
    rows.iter()
        .flat_map(|row| if let Row::Section(rows) = row { flat(rows) } else { vec![*row] })
        .collect()
}

/// A row of the table.
#[derive(Clone, Copy)]
pub(super) enum Row {
    /// Whose the rows from here on are.
    #[cfg_attr(not(test), expect(dead_code, reason = "it is for the reference page"))]
    Part(&'static str),
    /// What the rows from here on are about.
    #[cfg_attr(not(test), expect(dead_code, reason = "it is for the reference page"))]
    Heading(&'static str),
    Variable(&'static Variable),
    Section(&'static [Row]),
}

/// A struct each of whose fields is a variable, or a section again.
pub(super) trait Section {
    const ROWS: &'static [Row];

    /// Reads all fields.
    fn read(reader: &mut Reader) -> Self;

    /// Appends the name of each variable and the text of its field.
    fn print(&self, texts: &mut Vec<(String, String)>);
}

/// The environment as found: the text of each variable that is set, by its name in lower case
/// without [`PREFIX`].
#[derive(Deserialize)]
#[serde(transparent)]
pub(super) struct RawConfig(HashMap<String, String>);

impl RawConfig {
    /// The text of the variable with this name, if it is set.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        let name = name.trim_start_matches(PREFIX).to_ascii_lowercase();
        self.0.get(&name).map(String::as_str)
    }
}

/// Declares structs and their variables. A field is either a struct again (`field: Type;`), or a
/// variable:
///
/// ```text
/// field: Type = NAME("default") in kind,
///     "What it does.";
/// ```
///
/// The kind holds what is accepted, with range and unit. `=> "…"` before a field begins a chapter of
/// the reference page.
macro_rules! settings {
    ($(
        $(#[$about:meta])*
        pub struct $Section:ident {$(
            $(=> $heading:literal)?
            $(#[$doc:meta])*
            $field:ident: $Type:ty $(= $NAME:ident($default:literal) in $kind:expr, $help:literal)?;
        )+}
    )+) => {$(
        $(#[$about])*
        #[allow(clippy::doc_markdown)] // The help is for terminals, which show backticks as they are.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $Section {
            $($(#[$doc])* $(#[doc = $help])? pub $field: $Type,)+
        }

        $($(
            pub(super) const $NAME: &Variable = &Variable {
                name: stringify!($NAME),
                default: $default,
                help: $help,
                kind: describe::<$Type, _>(&$kind),
            };
        )?)+

        impl Section for $Section {
            const ROWS: &'static [Row] = &[
                $($(Row::Heading($heading),)? settings!(@row $Type $(, $NAME)?),)+
            ];

            fn read(reader: &mut Reader) -> Self {
                Self { $($field: settings!(@read reader, $Type $(, $NAME, $kind)?),)+ }
            }

            fn print(&self, texts: &mut Vec<(String, String)>) {
                $(settings!(@print texts, self.$field $(, $NAME, $kind)?);)+
            }
        }
    )+};
    (@row $Type:ty) => { Row::Section(<$Type>::ROWS) };
    (@row $Type:ty, $NAME:ident) => { Row::Variable($NAME) };
    (@read $reader:ident, $Type:ty) => { <$Type>::read($reader) };
    (@read $reader:ident, $Type:ty, $NAME:ident, $kind:expr) => { $reader.read($NAME, &$kind) };
    (@print $texts:ident, $field:expr) => { $field.print($texts) };
    (@print $texts:ident, $field:expr, $NAME:ident, $kind:expr) => {
        $texts.push(($NAME.name.to_owned(), Kind::print(&$kind, &$field)))
    };
}

pub(super) use settings;
