//! The page that lists the endpoints, a part of them at a time.

use std::borrow::Cow;
use std::sync::Arc;

use serde::Serialize;
use std::fmt::Write;

use super::page::Pieces;
use crate::control::View;
use crate::control::view::{labels, usable};
use crate::io::net::Address;
use crate::limits::ENDPOINTS_MAX;
use crate::metrics::{EndpointCounts, EndpointStats};
use crate::proxy::endpoints::{Endpoint, Store, Tier};

/// Endpoints of a page that names no limit: a screen or two of a terminal.
const LIMIT: usize = 100;

/// What can be asked for.
pub(super) const PARAMETERS: &str = "route=NAME (the first if not given), limit=1 to 1024 (100 if not given), offset=0 and above, workers=1 for the counts of each worker";

/// Which part of the list is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Query {
    /// The number of the route.
    route: usize,
    offset: usize,
    limit: usize,
    workers: bool,
}

impl Query {
    /// Reads what follows the `?`; the error is what to tell the client.
    pub(super) fn parse(query: &str, routes: &[&str]) -> Result<Self, String> {
        let mut this = Self { route: 0, offset: 0, limit: LIMIT, workers: false };
        for part in query.split('&').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            if name == "route" {
                let at = routes.iter().position(|route| *route == value);
                let unknown =
                    || format!("there is no route {value:?}; there are: {}\n", routes.join(", "));
                this.route = at.ok_or_else(unknown)?;
                continue;
            }
            let number = value.parse::<usize>().ok();
            match (name, number) {
                ("offset", Some(offset)) => this.offset = offset,
                ("limit", Some(limit @ 1..=ENDPOINTS_MAX)) => this.limit = limit,
                ("workers", Some(workers @ 0..=1)) => this.workers = workers == 1,
                _ => return Err(format!("cannot read {part:?}; there are: {PARAMETERS}\n")),
            }
        }
        Ok(this)
    }
}

#[derive(Serialize)]
struct EndpointRow<'a> {
    name: &'a str,
    address: &'a Address,
    near: bool,
    tier: Tier,
    state: &'static str,
    total: EndpointCounts,
    #[serde(skip_serializing_if = "Option::is_none")]
    workers: Option<Vec<WorkerRow>>,
}

#[derive(Serialize)]
struct WorkerRow {
    state: &'static str,
    counts: EndpointCounts,
}

#[derive(Serialize)]
struct StoreRow<'a> {
    name: &'a str,
    address: Option<&'a Address>,
    why: Option<&'a str>,
}

/// An endpoint that is known and not used.
#[derive(Serialize)]
struct LeftOutRow<'a> {
    name: &'a str,
    address: &'a Address,
    why: String,
}

pub(super) fn state(fails_check: bool, usable: bool) -> &'static str {
    match (fails_check, usable) {
        (true, _) => "fails_check",
        (false, true) => "usable",
        (false, false) => "ejected",
    }
}

fn endpoint_row<'a>(
    endpoint: &'a Endpoint,
    tier: Tier,
    name: &'a str,
    of_workers: bool,
) -> EndpointRow<'a> {
    let worker = |stats: &EndpointStats| WorkerRow {
        state: state(endpoint.fails_check(), stats.ejected.get() == 0),
        counts: EndpointCounts::read(stats),
    };
    EndpointRow {
        name,
        address: &endpoint.address,
        near: endpoint.is_near(),
        tier,
        state: state(endpoint.fails_check(), usable(endpoint)),
        total: EndpointCounts::total(&endpoint.stats),
        workers: of_workers.then(|| endpoint.stats.iter().map(worker).collect()),
    }
}

/// Writes the part of the list as JSON, an endpoint a line.
pub(super) async fn write(view: Arc<View>, query: Query, mut to: Pieces) {
    to.begin().await;
    let names: Vec<_> = view.routes().map(|route| route.name).collect();
    let Some(route) = view.routes().nth(query.route) else { unreachable!("it was found by name") };
    let snapshot = &route.snapshot;
    let (endpoints, stores) = (&snapshot.endpoints, &snapshot.stores);
    let applied: Vec<_> = route.stats.iter().map(|stats| stats.applied_generation.get()).collect();
    let tiers: Vec<_> = route.stats.iter().map(|stats| stats.tier.get()).collect();
    // Writing to a string cannot fail.
    let _ = write!(
        to.text,
        "{{\"route\": {:?}, \"routes\": {names:?},\n \"generation\": {}, \
         \"applied_generations\": {applied:?}, \"tiers\": {tiers:?},\n \"offset\": {}, \
         \"endpoints_total\": {}, \"endpoints\": [",
        route.name,
        snapshot.generation,
        query.offset,
        endpoints.len(),
    );
    let part =
        |len: usize| query.offset.min(len)..query.offset.saturating_add(query.limit).min(len);
    let range = part(endpoints.len());
    let labels = labels(endpoints);
    let mut before = "\n  ";
    for at in range {
        let (endpoint, tier) = (&endpoints[at], snapshot.tier_of(at));
        let row = endpoint_row(endpoint, tier, &labels[at], query.workers);
        write_row(&mut to.text, &mut before, &row);
        to.pause().await;
    }
    let _ = write!(to.text, "],\n \"stores_total\": {}, \"stores\": [", stores.len());
    let mut before = "\n  ";
    for Store { name, endpoint, why } in &stores[part(stores.len())] {
        let address = endpoint.map(|at| &endpoints[at].address);
        write_row(&mut to.text, &mut before, &StoreRow { name, address, why: why.as_deref() });
        to.pause().await;
    }
    let left_out = route.discovery.left_out();
    let _ = write!(to.text, "],\n \"left_out_total\": {}, \"left_out\": [", left_out.len());
    let mut before = "\n  ";
    for out in &left_out[part(left_out.len())] {
        let row = LeftOutRow { name: &out.name, address: &out.address, why: out.to_string() };
        write_row(&mut to.text, &mut before, &row);
        to.pause().await;
    }
    to.text.push_str("]}\n");
    to.end().await;
}

/// Writes a row as JSON on a line of its own.
pub(super) fn write_row(text: &mut String, before: &mut &str, row: &impl Serialize) {
    // Strings and numbers can always be written.
    let row = serde_json::to_string(row).map_or(Cow::Borrowed("null"), Cow::Owned);
    text.push_str(before);
    text.push_str(&row);
    *before = ",\n  ";
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::admin::page::whole;
    use crate::control::testing::{config, endpoint, view};

    #[test]
    fn parameters_are_checked() {
        let query = |offset, limit, workers| Ok(Query { route: 0, offset, limit, workers });
        let routes = ["orders", "cache"];
        for (text, expected) in [
            ("", query(0, 100, false)),
            ("limit=1024&offset=7&workers=1", query(7, 1024, true)),
            ("&offset=18446744073709551615&", query(usize::MAX, 100, false)),
            ("workers=0", query(0, 100, false)),
        ] {
            assert_eq!(Query::parse(text, &routes), expected, "{text}");
        }
        for text in
            ["limit=0", "limit=1025", "offset=-1", "offset", "workers=2", "page=1", "=", "a=b=c"]
        {
            let error = Query::parse(text, &routes).unwrap_err();
            assert!(
                error.starts_with(&format!("cannot read {text:?}; there are: route=")),
                "{error}"
            );
        }
        assert_eq!(Query::parse("route=cache&limit=1", &routes).unwrap().route, 1);
        let unknown = "there is no route \"stock\"; there are: orders, cache\n";
        assert_eq!(Query::parse("route=stock", &routes), Err(unknown.to_owned()));
    }

    #[test]
    fn parts_make_up_the_whole() {
        let endpoints =
            (1..=250).map(|i| endpoint(&format!("db-{i}\""), &format!("10.0.0.{i}:1"))).collect();
        let view = Arc::new(view(config(), endpoints));
        let page = |query: &str| {
            let query = Query::parse(query, &["default"]).unwrap();
            let text = whole(|pieces| write(Arc::clone(&view), query, pieces));
            let page: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(page["endpoints_total"], 250);
            let rows = page["endpoints"].as_array().unwrap();
            rows.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let parts =
            [page(""), page("offset=100"), page("offset=200&workers=1"), page("offset=250")];
        assert_eq!(parts.each_ref().map(Vec::len), [100, 100, 50, 0]);
        assert_eq!(parts.concat(), page("limit=1024"));
        assert_eq!(page(&format!("offset={}&limit=1024", usize::MAX)), Vec::<String>::new());
    }
}
