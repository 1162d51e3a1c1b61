//! What a row says of a metric, whatever its values come from.

use super::labels::Label;
use super::when::When;
use crate::config::RouteConfig;

/// What the values of a metric are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only ever grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Durations, counted by how long they were.
    Histogram,
}

impl Kind {
    /// Its word in the text.
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric: all series of one name.
#[derive(Debug)]
pub struct Family {
    /// The name, with its unit and, of counters, `_total`.
    pub name: &'static str,
    /// What its values are.
    pub kind: Kind,
    /// One sentence for the reader of the text and of the page.
    pub help: &'static str,
    /// Its labels, in the order of the text.
    pub labels: &'static [LabelName],
    /// Under which condition it is there.
    pub when: When,
}

/// A label of a metric.
#[derive(Debug, Clone, Copy)]
pub struct LabelName {
    /// The name.
    pub name: &'static str,
    /// What it may be.
    pub values: Values,
}

/// What a label may be.
#[derive(Debug, Clone, Copy)]
pub enum Values {
    /// As many as there are of what is described here: workers, endpoints, stores.
    Open(&'static str),
    /// One of a closed set.
    OneOf(&'static [LabelValue]),
    /// What requests of the protocol at hand ask for.
    Commands,
}

/// One value of a closed set.
#[derive(Debug)]
pub struct LabelValue {
    /// The value in the text and in the log.
    pub name: &'static str,
    /// What it means.
    pub help: &'static str,
    /// Under which condition its series are there.
    pub when: When,
}

impl LabelName {
    /// The number of the worker, from 0.
    pub const WORKER: Self = Self::open("worker", "the worker's number, from 0");
    /// The name of the route.
    pub const ROUTE: Self = Self::open("route", "the route's name; `default` where none is named");
    /// What users call the endpoint.
    pub const ENDPOINT: Self = Self::open(
        "endpoint",
        "the endpoint's name, with `@` and its address where several share the name",
    );
    /// One of the stores that keys are shared among.
    pub const STORE: Self = Self::open("store", "the store's declared name");
    /// Which driver.
    pub const DRIVER: Self = Self::open("driver", "`io_uring` or `epoll`");
    /// Why this driver.
    pub const REASON: Self = Self::open("reason", "of `aegis_io_driver_info`: why this driver");
    /// The kernel.
    pub const KERNEL: Self = Self::open("kernel", "the kernel's release");
    /// The program's version.
    pub const VERSION: Self = Self::open("version", "the program's version");
    /// What it was built for.
    pub const ARCH: Self = Self::open("arch", "the processor's architecture");

    const fn open(name: &'static str, what: &'static str) -> Self {
        Self { name, values: Values::Open(what) }
    }

    /// A label with the values of the set `L`.
    pub const fn of<L: Label>(name: &'static str) -> Self {
        Self { name, values: L::VALUES }
    }

    /// Its values in this configuration, with their indices; `None` where nobody knows them before.
    pub fn shown(&self, config: &RouteConfig) -> Option<Vec<(usize, &'static str)>> {
        match self.values {
            Values::Open(_) => None,
            Values::OneOf(values) => {
                let all = values.iter().enumerate();
                let shown = all.filter(|(_, value)| value.when.holds(config));
                Some(shown.map(|(at, value)| (at, value.name)).collect())
            }
            Values::Commands => {
                let facts = config.protocol.facts();
                Some(facts.verbs().map(|verb| (verb.index(), verb.label())).collect())
            }
        }
    }
}

/// The first expression, or the second where the first is left out of a row.
macro_rules! or {
    (; $default:expr) => {
        $default
    };
    ($given:expr; $default:expr) => {
        $given
    };
}
pub(super) use or;

/// A [`Family`] out of the parts of a row; its doc comment is the help.
macro_rules! family {
    ([$($doc:literal)+] $kind:expr, $name:literal, $labels:expr, [$($when:ident)?]) => {
        $crate::metrics::family::Family {
            name: $name,
            kind: $kind,
            help: concat!($($doc),+).trim_ascii(),
            labels: $labels,
            when: $crate::metrics::family::or!(
                $($crate::metrics::when::When::$when)?;
                $crate::metrics::when::When::ALWAYS
            ),
        }
    };
}
pub(super) use family;
