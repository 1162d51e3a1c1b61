//! What workers count: how a row of it becomes a counter, and its series in the text.

use super::cells::Value;
use super::family::{Family, LabelName};
use super::text;
use crate::config::RouteConfig;

/// Declares a block of counters, all of which one worker writes, and its rows:
///
/// ```text
/// /// Help text, and the field's documentation.
/// field: Cell [label: Set, …] = "name" per WORKER if CONDITION where possible;
/// ```
///
/// `by` names the label that all of its metrics have. Without `per WORKER` the workers are added up.
/// `if` names a condition of [`super::when::When`], `where` a function that tells which series can
/// move, by the indices of their label values.
macro_rules! counted {
    (
        $(#[$attribute:meta])*
        pub struct $stats:ident $(by $by:ident)? {
            metrics {$(
                $(#[doc = $doc:literal])+
                $field:ident: $cell:ident $([$($label:ident: $set:ident),+])? = $name:literal
                    $(per $each:ident)? $(if $when:ident)? $(where $possible:ident)?;
            )+}
            others {$(
                $(#[doc = $other_doc:literal])+
                $other_vis:vis $other:ident: $other_type:ty;
            )*}
        }
    ) => {
        $(#[$attribute])*
        #[derive(Debug, Default)]
        #[repr(align(64))]
        pub struct $stats {
            $($(#[doc = $doc])+ pub $field: cells!($cell $($($set)+)?),)+
            $($(#[doc = $other_doc])+ $other_vis $other: $other_type,)*
        }

        impl $stats {
            /// Its metrics, in the order of the text.
            pub const ROWS: &'static [Row<Self>] = counted!(
                @rows [$($by)?]
                $([$($doc)+] $field [<cells!($cell $($($set)+)?) as Cell>::KIND] $name
                    [$($each)?] [$($($label $set)+)?] [$($when)?] [$($possible)?])+
            );
        }
    };
    (
        @rows $by:tt
        $([$($doc:literal)+] $field:ident [$kind:expr] $name:literal
            [$($each:ident)?] [$($label:ident $set:ident)*] [$($when:ident)?] [$($possible:ident)?])+
    ) => {
        &[$(Row {
            family: family!(
                [$($doc)+]
                $kind,
                $name,
                counted!(@labels $by [$($each)?] [$($label $set)*]),
                [$($when)?]
            ),
            possible: or!($($possible)?; |_| true),
            value: |stats, at| stats.$field.value(at),
        },)+]
    };
    (@labels [$($by:ident)?] [$($each:ident)?] [$($label:ident $set:ident)*]) => {
        &[
            $(LabelName::$each,)?
            $(LabelName::$by,)?
            $(LabelName::of::<super::labels::$set>(stringify!($label)),)*
        ]
    };
}
pub(super) use counted;

/// A metric of which workers keep the values in `S`.
#[derive(Debug)]
pub struct Row<S: 'static> {
    /// What it is.
    pub family: Family,
    pub(super) possible: fn(&[usize]) -> bool,
    pub(super) value: fn(&S, &[usize]) -> Value,
}

/// One series of a metric, apart from whose it is.
#[derive(Debug, Default)]
pub struct Series {
    /// The indices of its label values.
    at: Vec<usize>,
    /// Their names.
    names: Vec<&'static str>,
}

impl<S> Row<S> {
    /// Whether each worker has series of its own; else the workers are added up.
    pub fn per_worker(&self) -> bool {
        self.family.labels.first().is_some_and(|label| label.name == LabelName::WORKER.name)
    }

    /// The series that can move in this configuration.
    pub fn series(&self, config: &RouteConfig) -> Vec<Series> {
        let mut series = vec![Series::default()];
        for values in self.family.labels.iter().filter_map(|label| label.shown(config)) {
            let extend = |begun: Series| {
                let with = move |&(at, name): &(usize, _)| Series {
                    at: [&begun.at[..], &[at]].concat(),
                    names: [&begun.names[..], &[name]].concat(),
                };
                values.iter().map(with).collect::<Vec<_>>()
            };
            series = series.into_iter().flat_map(extend).collect();
        }
        series.retain(|one| (self.possible)(&one.at));
        series
    }

    /// Writes one series of these workers, added up. `number` is the first one's; `by` is the value of
    /// the label that all metrics of the block have.
    pub fn write(
        &self,
        text: &mut String,
        (number, by): (usize, Option<&str>),
        workers: &[&S],
        one: &Series,
    ) {
        let number = number.to_string();
        let own = self.per_worker().then_some(number.as_str());
        let names: Vec<_> = own.into_iter().chain(by).chain(one.names.iter().copied()).collect();
        let total = workers.iter().map(|&stats| (self.value)(stats, &one.at)).reduce(Value::plus);
        match total.unwrap_or_else(|| unreachable!("a process has workers")) {
            Value::Whole(n) => text::sample(text, &self.family, &names, n),
            Value::Nanoseconds(n) => text::sample(text, &self.family, &names, n as f64 / 1e9),
            Value::Durations(all) => text::durations(text, &self.family, &names, &all),
        }
    }
}
