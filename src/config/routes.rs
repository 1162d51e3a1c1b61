//! The routes: what they are called, and which variables are a route's own.
//!
//! `AEGIS_LISTEN` is the default of all routes, and `AEGIS_ORDERS__LISTEN` the route `orders`' own. The
//! two underscores part a route's name from a variable's: neither has two in a row.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, LazyLock};

use super::kind::{Kind, List, describe};
use super::read::Reader;
use super::value::list;
use super::variable::{PREFIX, Row, Section, VARIABLES, Variable, variables};
use super::variables::RouteConfig;
use crate::limits;

/// What stands between a route's name and a variable's.
const SEPARATOR: &str = "__";

/// The variables that a route may have of its own.
static OF_ROUTES: LazyLock<Vec<&'static Variable>> = LazyLock::new(|| variables(RouteConfig::ROWS));

/// What a route is called: in variables, in labels and in the log.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteName(Arc<str>);

impl RouteName {
    /// The name as it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the names of its own variables start with. As names have neither underscores nor two
    /// dashes in a row, no two give the same.
    fn prefix(&self) -> String {
        format!("{PREFIX}{}{SEPARATOR}", self.0.to_ascii_uppercase().replace('-', "_"))
    }

    /// A variable of its own.
    pub(super) fn own(&self, variable: &str) -> String {
        self.prefix() + variable.trim_start_matches(PREFIX)
    }
}

impl fmt::Display for RouteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for RouteName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = (1..=limits::ROUTE_NAME_BYTES_MAX).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && text.split('-').all(|word| !word.is_empty());
        if fits {
            Ok(Self(text.into()))
        } else {
            Err("not a route's name: lower-case letters and digits, with single dashes between"
                .to_owned())
        }
    }
}

const NAMES: List<RouteName> = List {
    of: "names",
    count_max: limits::ROUTES_MAX,
    note: "each up to 24 of a-z, 0-9 and single dashes",
    parse: |text, max| list(text, max, str::parse),
};

pub(super) const AEGIS_ROUTES: &Variable = &Variable {
    name: "AEGIS_ROUTES",
    default: "default",
    help: "The routes. AEGIS_LISTEN is for all of them, AEGIS_ORDERS__LISTEN for the route orders.",
    kind: describe::<Vec<RouteName>, _>(&NAMES),
};

/// The names of the routes as they stand in the environment.
pub(super) struct Names {
    pub(super) all: Vec<RouteName>,
    /// False where there is the default only, which has no variables of its own.
    pub(super) are_given: bool,
    /// False where the text is refused: then these are those that can be told.
    pub(super) are_right: bool,
}

impl Names {
    /// What the text of [`AEGIS_ROUTES`] names.
    pub(super) fn of(text: Option<&str>) -> Self {
        let default = || NAMES.parse(AEGIS_ROUTES.default).unwrap_or_default();
        let Some(text) = text else {
            return Self { all: default(), are_given: false, are_right: true };
        };
        if let Ok(all) = NAMES.parse_found(text) {
            return Self { all, are_given: true, are_right: true };
        }
        let mut all = Vec::new();
        for name in text.split(',').filter_map(|name| name.trim().parse().ok()) {
            if all.len() < limits::ROUTES_MAX && !all.contains(&name) {
                all.push(name);
            }
        }
        let all = if all.is_empty() { default() } else { all };
        Self { all, are_given: true, are_right: false }
    }

    /// Which variable this name is, plain or a route's own.
    pub(super) fn variable(&self, name: &str) -> Option<&'static Variable> {
        let plain = VARIABLES.iter().find(|variable| variable.name == name);
        plain.copied().or_else(|| {
            let route = self.with_prefix_of(name)?;
            OF_ROUTES.iter().find(|variable| route.own(variable.name) == name).copied()
        })
    }

    /// The route whose own variables are named like this.
    pub(super) fn with_prefix_of(&self, name: &str) -> Option<&RouteName> {
        let mut routes = self.all.iter().filter(|_| self.are_given);
        routes.find(|route| name.starts_with(&route.prefix()))
    }

    /// The variable of a route that this name would be if it had one underscore more.
    pub(super) fn with_one_underscore(&self, name: &str) -> Option<String> {
        let own = self.all.iter().filter(|_| self.are_given);
        let mut own = own.flat_map(|route| OF_ROUTES.iter().map(|v| route.own(v.name)));
        own.find(|own| own.replacen(SEPARATOR, "_", 1) == name)
    }
}

/// A name taken apart where it is one of a route's variable, whether or not there is either: what
/// stands for the route, and the plain name.
pub(super) fn parts(name: &str) -> Option<(&str, String)> {
    let (route, rest) = name.strip_prefix(PREFIX)?.split_once(SEPARATOR)?;
    Some((route, format!("{PREFIX}{rest}")))
}

/// The plain name of a variable that may be a route's own.
pub(super) fn plain(name: &str) -> String {
    parts(name).map_or_else(|| name.to_owned(), |(_, plain)| plain)
}

impl Variable {
    /// Whether each route may have it of its own; else it is the process's.
    pub fn is_of_routes(&self) -> bool {
        OF_ROUTES.iter().any(|variable| variable.name == self.name)
    }
}

impl Section for RouteName {
    const ROWS: &'static [Row] = &[];

    fn read(reader: &mut Reader) -> Self {
        reader.route().clone()
    }

    fn print(&self, _: &mut Vec<(String, String)>) {}
}

impl Section for Vec<Arc<RouteConfig>> {
    const ROWS: &'static [Row] = &[
        Row::Heading("Routes"),
        Row::Variable(AEGIS_ROUTES),
        Row::Part("Of each route"),
        Row::Section(RouteConfig::ROWS),
        Row::Part("Of the process"),
    ];

    fn read(reader: &mut Reader) -> Self {
        // The names are known already; here a refused text becomes a problem.
        let _ = reader.read(AEGIS_ROUTES, &NAMES);
        reader.read_routes()
    }

    /// What all have in common under the plain name, and what they have not under each one's own.
    fn print(&self, texts: &mut Vec<(String, String)>) {
        let names: Vec<_> = self.iter().map(|route| route.name.clone()).collect();
        texts.push((AEGIS_ROUTES.name.to_owned(), NAMES.print(&names)));
        let of_route = |route: &Arc<RouteConfig>| {
            let mut texts = Vec::new();
            route.print(&mut texts);
            texts
        };
        let of_routes: Vec<_> = self.iter().map(of_route).collect();
        for at in 0..OF_ROUTES.len() {
            let (name, text) = &of_routes[0][at];
            if of_routes.iter().all(|texts| texts[at].1 == *text) {
                texts.push((name.clone(), text.clone()));
                continue;
            }
            let own = names.iter().zip(&of_routes);
            texts.extend(own.map(|(route, texts)| (route.own(name), texts[at].1.clone())));
        }
    }
}
