//! `aegis-proxy endpoints`: what a running proxy knows of its endpoints, as a table.

use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::Value;

use super::admin::{Admin, option};
use super::output::{fail, print};
use super::table::{Align, plain, table};
use crate::limits::{ENDPOINTS_MAX, ROUTES_MAX};

pub(super) const NAME: &str = "endpoints";

const ROUTE: &str = "route";
const JSON: &str = "json";

#[rustfmt::skip]
const COLUMNS: &[(&str, Align)] = &[
    ("ENDPOINT", Align::Left), ("ADDRESS", Align::Left), ("STATE", Align::Left),
    ("SESSIONS", Align::Right), ("IDLE", Align::Right), ("CONNECTS", Align::Right),
    ("FAILED", Align::Right), ("EJECTIONS", Align::Right),
];

/// The columns of numbers: what they are called in the pages.
const COUNTS: &[&str] =
    &["sessions_active", "pool_idle", "connects", "connect_failures", "ejections"];

pub(super) fn definition() -> Command {
    Command::new(NAME)
        .about("Lists the endpoints of a running proxy: state, sessions, pools and failures")
        .arg(
            Arg::new(ROUTE)
                .long(ROUTE)
                .value_name("NAME")
                .help("Those of this route alone [default: of all]"),
        )
        .arg(
            Arg::new(JSON)
                .long(JSON)
                .action(ArgAction::SetTrue)
                .help("Prints the pages /backends of the routes, in a list"),
        )
        .arg(option())
}

/// Asks for each route, and prints what there is.
pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    let route = matches.get_one::<String>(ROUTE).map(String::as_str);
    let pages = Admin::of(matches).and_then(|admin| ask(&admin, route));
    match pages {
        Ok(pages) if matches.get_flag(JSON) => print(&format!("{:#}\n", Value::Array(pages))),
        Ok(pages) => print(&show(&pages)),
        Err(why) => fail(1, why),
    }
}

/// The page of each route that is asked for.
fn ask(admin: &Admin, route: Option<&str>) -> Result<Vec<Value>, String> {
    let page = |route: &str| admin.json(&format!("/backends?limit={ENDPOINTS_MAX}&route={route}"));
    if let Some(route) = route {
        // What names no route may be no text for the head of a request either.
        let is_name = route.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'&');
        return if is_name { Ok(vec![page(route)?]) } else { Err(format!("no route {route:?}")) };
    }
    let first = admin.json(&format!("/backends?limit={ENDPOINTS_MAX}"))?;
    let names: Vec<_> =
        strings(&first["routes"]).take(ROUTES_MAX).skip(1).map(str::to_owned).collect();
    let others = names.iter().map(|name| page(name));
    std::iter::once(Ok(first)).chain(others).collect()
}

fn strings(list: &Value) -> impl Iterator<Item = &str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str)
}

fn rows(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn show(pages: &[Value]) -> String {
    let blocks: Vec<_> = pages.iter().map(|page| show_route(page).join("\n") + "\n").collect();
    blocks.join("\n")
}

fn show_route(page: &Value) -> Vec<String> {
    let cell = |value: &Value| plain(value.as_str().unwrap_or_default());
    let mut lines = Vec::new();
    if strings(&page["routes"]).count() > 1 {
        lines.push(format!("route {}", cell(&page["route"])));
    }
    let row = |endpoint: &Value| {
        let texts = ["name", "address", "state"].map(|field| cell(&endpoint[field]));
        let counts = COUNTS.iter().map(|field| plain(&endpoint["total"][field].to_string()));
        texts.into_iter().chain(counts).collect()
    };
    let endpoints: Vec<Vec<String>> = rows(&page["endpoints"]).map(row).collect();
    if endpoints.is_empty() {
        lines.push("no endpoint is known".to_owned());
    } else {
        lines.extend(table(COLUMNS, &endpoints));
    }
    // Those that are there are in the table.
    for store in rows(&page["stores"]).filter(|store| store["address"].is_null()) {
        lines.push(format!(
            "no endpoint for store {}: {}",
            cell(&store["name"]),
            cell(&store["why"])
        ));
    }
    for out in rows(&page["left_out"]) {
        lines.push(format!("not used: {}", cell(&out["why"])));
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn endpoints_are_a_table_and_what_is_missing_is_said_below() {
        let total = json!({
            "sessions_active": 3, "pool_idle": 10, "connects": 12, "connect_failures": 0, "ejections": 1
        });
        let page = json!({
            "route": "cache", "routes": ["orders", "cache"],
            "endpoints": [
                {"name": "db-0", "address": "10.0.0.1:5432", "state": "usable", "total": total},
            ],
            "stores": [{"name": "db-1", "address": null, "why": "it is not ready"}],
            "left_out": [{"name": "me", "address": "127.0.0.1:1", "why": "me is this proxy"}],
        });
        let expected = "\
route cache
ENDPOINT  ADDRESS        STATE   SESSIONS  IDLE  CONNECTS  FAILED  EJECTIONS
db-0      10.0.0.1:5432  usable         3    10        12       0          1
no endpoint for store db-1: it is not ready
not used: me is this proxy
";
        assert_eq!(show(&[page]), expected);
        let empty = json!({"route": "default", "routes": ["default"], "endpoints": []});
        assert_eq!(show(&[empty]), "no endpoint is known\n");
    }
}
