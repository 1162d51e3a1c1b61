//! What a variable's text may be: each kind parses it, prints it, and says what it accepts. Ranges
//! are part of the kind, so that all of these follow from a variable's row.

use std::fmt::Display;
use std::marker::PhantomData;
use std::num::NonZero;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use super::value::{Parsed, Word, duration, duration_text, list_text, number};

/// How a variable's text becomes a value and back.
pub(super) trait Kind: Describe {
    /// The type of the variable's field.
    type Value;

    /// The value, or why the text is none.
    fn parse(&self, text: &str) -> Parsed<Self::Value>;

    /// A text that parses to the value.
    fn print(&self, value: &Self::Value) -> String;

    /// The value of a text as it stands in the environment.
    fn parse_found(&self, text: &str) -> Parsed<Self::Value> {
        match text.trim() {
            "" => Err("empty; unset it to have the default".to_owned()),
            // Readers of YAML 1.1, Helm among them, make booleans of a bare `on` and `off`.
            "true" => self.parse("on"),
            "false" => self.parse("off"),
            text => self.parse(text),
        }
    }
}

/// What is known of a kind without the type of its values.
pub(super) trait Describe: Sync {
    /// Which texts are accepted, with their unit: what follows "Accepts".
    fn accepts(&self) -> String;

    /// The shape of the texts, as far as a schema can tell it.
    #[cfg(test)]
    fn shape(&self) -> Shape {
        Shape::default()
    }
}

/// What a text may be; nothing where it has a syntax of its own.
#[cfg(test)]
#[derive(Clone, Default)]
pub(super) struct Shape {
    pub(super) words: Vec<&'static str>,
    pub(super) numbers: Option<RangeInclusive<u64>>,
    pub(super) durations: Option<RangeInclusive<Duration>>,
    pub(super) whole_seconds: bool,
    /// Whether 0 is one more word.
    pub(super) zero_is_word: bool,
    /// Items of a list at most.
    pub(super) items: Option<usize>,
}

/// A kind without its type, once it is known to give the type of the variable's field.
pub(super) const fn describe<T, K: Kind<Value = T>>(kind: &'static K) -> &'static dyn Describe {
    kind
}

pub(super) const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

pub(super) const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

pub(super) const fn minutes(count: u64) -> Duration {
    seconds(60 * count)
}

pub(super) const fn hours(count: u64) -> Duration {
    minutes(60 * count)
}

pub(super) const fn days(count: u64) -> Duration {
    hours(24 * count)
}

// ---- Numbers -----------------------------------------------------------------------------------

/// A type of whole numbers.
pub(super) trait Whole: FromStr + PartialOrd + Display + Copy + Sync {
    const ZERO: Self;
    const MAX: Self;
    /// The type without 0.
    type NonZero: Display;
    fn non_zero(self) -> Option<Self::NonZero>;
    #[cfg(test)]
    fn to_u64(self) -> u64;
}

macro_rules! whole {
    ($($type:ty),+) => {$(
        impl Whole for $type {
            const ZERO: Self = 0;
            const MAX: Self = <$type>::MAX;
            type NonZero = NonZero<$type>;

            fn non_zero(self) -> Option<Self::NonZero> {
                NonZero::new(self)
            }

            #[cfg(test)]
            fn to_u64(self) -> u64 {
                self.try_into().unwrap()
            }
        }
    )+};
}

whole!(u32, u64, usize);

/// A whole number within a range.
pub(super) struct Number<T> {
    range: RangeInclusive<T>,
    /// Such as " of bytes".
    unit: &'static str,
}

pub(super) const fn numbers<T>(range: RangeInclusive<T>) -> Number<T> {
    numbers_of("", range)
}

pub(super) const fn numbers_of<T>(unit: &'static str, range: RangeInclusive<T>) -> Number<T> {
    Number { range, unit }
}

impl<T: Whole> Describe for Number<T> {
    fn accepts(&self) -> String {
        let (unit, min, max) = (self.unit, self.range.start(), self.range.end());
        if *max == T::MAX {
            format!("a number{unit}")
        } else {
            format!("a number{unit} from {min} to {max}")
        }
    }

    #[cfg(test)]
    fn shape(&self) -> Shape {
        let numbers = self.range.start().to_u64()..=self.range.end().to_u64();
        Shape { numbers: Some(numbers), ..Shape::default() }
    }
}

impl<T: Whole> Kind for Number<T> {
    type Value = T;

    fn parse(&self, text: &str) -> Parsed<T> {
        number(text, &self.range)
    }

    fn print(&self, value: &T) -> String {
        value.to_string()
    }
}

/// A number that is at least 1, or a word, and maybe 0, for what the program chooses or does
/// without.
pub(super) struct Count<T> {
    word: &'static str,
    zero_is_word: bool,
    number: Number<T>,
}

/// `word`, or a number of the range, which starts at 1.
pub(super) const fn word_or<T>(word: &'static str, number: Number<T>) -> Count<T> {
    Count { word, zero_is_word: false, number }
}

/// `word` or 0, or a number of the range, which starts at 1.
pub(super) const fn word_or_zero_or<T>(word: &'static str, number: Number<T>) -> Count<T> {
    Count { word, zero_is_word: true, number }
}

impl<T: Whole> Describe for Count<T> {
    fn accepts(&self) -> String {
        let zero = if self.zero_is_word { " (or 0)" } else { "" };
        format!("{}{zero}, or {}", self.word, self.number.accepts())
    }

    #[cfg(test)]
    fn shape(&self) -> Shape {
        let zero_is_word = self.zero_is_word;
        Shape { words: vec![self.word], zero_is_word, ..self.number.shape() }
    }
}

impl<T: Whole> Kind for Count<T> {
    type Value = Option<T::NonZero>;

    fn parse(&self, text: &str) -> Parsed<Self::Value> {
        if text == self.word {
            return Ok(None);
        }
        let min = if self.zero_is_word { T::ZERO } else { *self.number.range.start() };
        number(text, &(min..=*self.number.range.end())).map(T::non_zero)
    }

    fn print(&self, value: &Self::Value) -> String {
        value.as_ref().map_or_else(|| self.word.to_owned(), ToString::to_string)
    }
}

// ---- Durations ---------------------------------------------------------------------------------

/// A duration within a range.
pub(super) struct Span {
    range: RangeInclusive<Duration>,
    whole_seconds: bool,
}

pub(super) const fn durations(range: RangeInclusive<Duration>) -> Span {
    Span { range, whole_seconds: false }
}

pub(super) const fn whole_seconds(range: RangeInclusive<Duration>) -> Span {
    Span { range, whole_seconds: true }
}

/// A duration in its largest unit, which is how people give bounds.
fn bound(duration: Duration) -> String {
    let ms = duration.as_millis();
    let units = [(days(1), "d"), (hours(1), "h"), (minutes(1), "m"), (seconds(1), "s")];
    let fits = |unit: Duration| ms >= unit.as_millis() && ms.is_multiple_of(unit.as_millis());
    match units.iter().find(|(unit, _)| fits(*unit)) {
        Some((unit, name)) => format!("{}{name}", ms / unit.as_millis()),
        None if ms == 0 => "0s".to_owned(),
        None => format!("{ms}ms"),
    }
}

impl Describe for Span {
    fn accepts(&self) -> String {
        let whole = if self.whole_seconds { " of whole seconds" } else { "" };
        let (min, max) = (bound(*self.range.start()), bound(*self.range.end()));
        format!("a duration{whole} from {min} to {max}")
    }

    #[cfg(test)]
    fn shape(&self) -> Shape {
        let durations = Some(self.range.clone());
        Shape { durations, whole_seconds: self.whole_seconds, ..Shape::default() }
    }
}

impl Kind for Span {
    type Value = Duration;

    fn parse(&self, text: &str) -> Parsed<Duration> {
        let duration = duration(text, &self.range)?;
        if self.whole_seconds && duration.subsec_nanos() != 0 {
            return Err("not whole seconds".to_owned());
        }
        Ok(duration)
    }

    fn print(&self, value: &Duration) -> String {
        duration_text(value)
    }
}

// ---- Words -------------------------------------------------------------------------------------

/// One of the words that stand for the variants of an enum.
pub(super) struct Words<T>(PhantomData<fn() -> T>);

pub(super) const fn words<T>() -> Words<T> {
    Words(PhantomData)
}

impl<T: Word> Describe for Words<T> {
    fn accepts(&self) -> String {
        let words: Vec<_> = T::ALL.iter().map(|value| value.word()).collect();
        let (last, others) = words.split_last().expect("an enum has variants");
        format!("{} or {last}", others.join(", "))
    }

    #[cfg(test)]
    fn shape(&self) -> Shape {
        let words = T::ALL.iter().map(|value| value.word()).collect();
        Shape { words, ..Shape::default() }
    }
}

impl<T: Word> Kind for Words<T> {
    type Value = T;

    fn parse(&self, text: &str) -> Parsed<T> {
        T::of_word(text).ok_or_else(|| "not one of the choices".to_owned())
    }

    fn print(&self, value: &T) -> String {
        value.word().to_owned()
    }
}

/// One of the words, or `auto`, for which `until_settled` stands in: what is meant follows from
/// other variables, and is settled when they are read.
pub(super) struct Open<T> {
    until_settled: T,
    words: Words<T>,
}

const AUTO: &str = "auto";

pub(super) const fn auto_or_words<T: Copy>(until_settled: T) -> Open<T> {
    Open { until_settled, words: words() }
}

impl<T: Word + Sync> Describe for Open<T> {
    fn accepts(&self) -> String {
        join(AUTO, &self.words.accepts())
    }

    #[cfg(test)]
    fn shape(&self) -> Shape {
        let mut shape = self.words.shape();
        shape.words.insert(0, AUTO);
        shape
    }
}

impl<T: Word + Sync> Kind for Open<T> {
    type Value = T;

    fn parse(&self, text: &str) -> Parsed<T> {
        if text == AUTO { Ok(self.until_settled) } else { self.words.parse(text) }
    }

    fn print(&self, value: &T) -> String {
        self.words.print(value)
    }
}

// ---- Texts of other syntax ---------------------------------------------------------------------

/// A text with a syntax of its own.
pub(super) struct Text<T> {
    pub(super) accepts: &'static str,
    pub(super) parse: fn(&str) -> Parsed<T>,
    pub(super) print: fn(&T) -> String,
}

pub(super) const fn text<T: Display>(
    accepts: &'static str,
    parse: fn(&str) -> Parsed<T>,
) -> Text<T> {
    Text { accepts, parse, print: T::to_string }
}

impl<T> Describe for Text<T> {
    fn accepts(&self) -> String {
        self.accepts.to_owned()
    }
}

impl<T> Kind for Text<T> {
    type Value = T;

    fn parse(&self, text: &str) -> Parsed<T> {
        (self.parse)(text)
    }

    fn print(&self, value: &T) -> String {
        (self.print)(value)
    }
}

/// Items with commas between.
pub(super) struct List<T> {
    pub(super) of: &'static str,
    pub(super) count_max: usize,
    pub(super) note: &'static str,
    /// Parses the text of at most so many items.
    pub(super) parse: fn(&str, usize) -> Parsed<Vec<T>>,
}

impl<T> Describe for List<T> {
    fn accepts(&self) -> String {
        format!("1 to {} of {}, comma-separated; {}", self.count_max, self.of, self.note)
    }

    #[cfg(test)]
    fn shape(&self) -> Shape {
        Shape { items: Some(self.count_max), ..Shape::default() }
    }
}

impl<T: Display> Kind for List<T> {
    type Value = Vec<T>;

    fn parse(&self, text: &str) -> Parsed<Vec<T>> {
        (self.parse)(text, self.count_max)
    }

    fn print(&self, value: &Vec<T>) -> String {
        list_text(value)
    }
}

/// Where this runs. On a node without the label, the downward API gives an empty text.
pub(super) struct Place(pub(super) &'static str);

const NONE: &str = "none";

impl Describe for Place {
    fn accepts(&self) -> String {
        join(NONE, self.0)
    }
}

impl Kind for Place {
    type Value = Option<String>;

    fn parse(&self, text: &str) -> Parsed<Option<String>> {
        Ok(Some(text).filter(|text| !["", NONE].contains(text)).map(str::to_owned))
    }

    fn print(&self, value: &Option<String>) -> String {
        value.clone().unwrap_or_else(|| NONE.to_owned())
    }

    fn parse_found(&self, text: &str) -> Parsed<Option<String>> {
        self.parse(text.trim())
    }
}

// ---- What is put around another kind -----------------------------------------------------------

/// A word that stands for `None`, or else a value of the other kind.
pub(super) struct Or<K> {
    word: &'static str,
    kind: K,
}

pub(super) const fn or<K>(word: &'static str, kind: K) -> Or<K> {
    Or { word, kind }
}

/// One more alternative before others.
fn join(word: &str, accepts: &str) -> String {
    let or = if accepts.contains(" or ") { "" } else { "or " };
    format!("{word}, {or}{accepts}")
}

impl<K: Kind> Describe for Or<K> {
    fn accepts(&self) -> String {
        join(self.word, &self.kind.accepts())
    }

    #[cfg(test)]
    fn shape(&self) -> Shape {
        let mut shape = self.kind.shape();
        shape.words.insert(0, self.word);
        shape
    }
}

impl<K: Kind> Kind for Or<K> {
    type Value = Option<K::Value>;

    fn parse(&self, text: &str) -> Parsed<Self::Value> {
        if text == self.word { Ok(None) } else { self.kind.parse(text).map(Some) }
    }

    fn print(&self, value: &Self::Value) -> String {
        value.as_ref().map_or_else(|| self.word.to_owned(), |value| self.kind.print(value))
    }
}

/// Another kind with a note on what it accepts besides.
pub(super) struct Noted<K> {
    kind: K,
    note: &'static str,
}

pub(super) const fn noted<K>(kind: K, note: &'static str) -> Noted<K> {
    Noted { kind, note }
}

impl<K: Kind> Describe for Noted<K> {
    fn accepts(&self) -> String {
        self.kind.accepts() + self.note
    }

    #[cfg(test)]
    fn shape(&self) -> Shape {
        self.kind.shape()
    }
}

impl<K: Kind> Kind for Noted<K> {
    type Value = K::Value;

    fn parse(&self, text: &str) -> Parsed<K::Value> {
        self.kind.parse(text)
    }

    fn print(&self, value: &K::Value) -> String {
        self.kind.print(value)
    }
}
