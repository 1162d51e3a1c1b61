//! The text that `/metrics` gives, parsed; and the names that the tests know.

use std::collections::BTreeMap;

pub const ACCEPT_PAUSES: &str = "aegis_accept_pauses_total";
pub const APPLIED_GENERATION: &str = "aegis_worker_applied_generation";
pub const BYTES: &str = "aegis_bytes_total";
pub const CONNECT_RETRIES: &str = "aegis_connect_retries_total";
pub const DISCOVERY_ENDPOINTS: &str = "aegis_discovery_endpoints";
pub const DISCOVERY_ERRORS: &str = "aegis_discovery_errors_total";
pub const DISCOVERY_LAST_SYNC: &str = "aegis_discovery_last_sync_timestamp_seconds";
pub const DISCOVERY_SNAPSHOT_AGE: &str = "aegis_discovery_snapshot_age_seconds";
pub const ENDPOINT_CONNECTIONS: &str = "aegis_endpoint_connections";
pub const ENDPOINT_CONNECTS: &str = "aegis_endpoint_connects_total";
pub const ENDPOINT_USABLE: &str = "aegis_endpoint_usable";
pub const ENDPOINT_SESSIONS: &str = "aegis_endpoint_sessions_active";
pub const HANDED_OVER: &str = "aegis_clients_handed_over_total";
pub const IO_DRIVER: &str = "aegis_io_driver_info";
pub const POOL_CHECKOUTS: &str = "aegis_pool_checkouts_total";
pub const POOL_CONNECTIONS: &str = "aegis_pool_connections";
pub const POOL_DISCARDS: &str = "aegis_pool_discards_total";
pub const CLIENTS_WAITING: &str = "aegis_clients_waiting";
pub const OUTAGE_SECONDS: &str = "aegis_outage_seconds_total";
pub const QUEUE_DEPTH: &str = "aegis_queue_depth";
pub const REQUESTS: &str = "aegis_requests_total";
pub const RETRIES: &str = "aegis_retries_total";
pub const RETRIES_REFUSED: &str = "aegis_retries_refused_total";
pub const SESSIONS_ACTIVE: &str = "aegis_sessions_active";
pub const SESSIONS_OPENED: &str = "aegis_sessions_opened_total";
pub const SESSIONS_CLOSED: &str = "aegis_sessions_closed_total";

pub const STORE_PRESENT: &str = "aegis_store_present";
pub const SPILLOVERS: &str = "aegis_locality_spillovers_total";

/// Labels to select samples by.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// One scrape.
pub struct Metrics(Vec<Sample>);

/// One line of a scrape.
#[derive(Debug)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

impl Metrics {
    /// The value of a metric without labels.
    pub fn value(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|sample| sample.name == name).map(|sample| sample.value)
    }

    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self(lines.map(parse_sample).collect())
    }

    pub fn samples(&self) -> &[Sample] {
        &self.0
    }

    /// The sum of the samples of this name that have these labels; `None` where there is none.
    /// For counts only: a sum that is not a whole number fails the test.
    pub fn sum(&self, name: &str, labels: Labels) -> Option<u64> {
        let selected = |sample: &&Sample| {
            let has = |(key, value): &(&str, &str)| {
                sample.labels.get(*key).is_some_and(|found| found == value)
            };
            sample.name == name && labels.iter().all(has)
        };
        let mut found = self.0.iter().filter(selected).map(|sample| sample.value).peekable();
        found.peek()?;
        let sum: f64 = found.sum();
        Some(sum.to_string().parse().unwrap_or_else(|_| panic!("{name} is {sum}")))
    }

    /// What there is under a name, or else which names there are: for messages of failure.
    pub fn describe(&self, name: &str) -> String {
        let of_name: Vec<_> = self.0.iter().filter(|sample| sample.name == name).collect();
        if of_name.is_empty() {
            let mut names: Vec<_> = self.0.iter().map(|sample| sample.name.as_str()).collect();
            names.dedup();
            return format!("no {name} among {names:?}");
        }
        format!("{of_name:#?}")
    }
}

/// `name{key="value",…} number`, with `\"`, `\\` and `\n` escaped in values.
fn parse_sample(line: &str) -> Sample {
    let malformed = || -> ! { panic!("not a sample: {line:?}") };
    let end = line.find(['{', ' ']).unwrap_or_else(|| malformed());
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (key, after) = rest.split_once("=\"").unwrap_or_else(|| malformed());
            let (value, after) = unquote(after).unwrap_or_else(|| malformed());
            labels.insert(key.to_owned(), value);
            rest = after.strip_prefix(',').unwrap_or(after);
        }
        rest = &rest[1..];
    }
    let number = rest.split_whitespace().next().unwrap_or_else(|| malformed());
    let value = number.parse().unwrap_or_else(|_| malformed());
    Sample { name: name.to_owned(), labels, value }
}

/// The value up to the closing quote, and what follows it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}
