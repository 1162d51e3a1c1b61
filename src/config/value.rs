//! The text of single values: parsing, and printing what parses back to the same value.

use std::fmt::{self, Display};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tracing::Level;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::filter::Targets;

use super::{
    Backend, Balance, Check, Discovery, EndsLogged, HostPort, IoChoice, KubePort, Locality,
    LogFormat, PoolMode, Preset, Protocol, ProxyProtocol, ServiceName, Switch,
};

use crate::io::net::{Address, AddressError, PATH_LEN_MAX, UNIX};
use crate::limits::CHECK_PATH_MAX;

/// A value, or why the text is none.
pub(super) type Parsed<T> = Result<T, String>;

/// The longest DNS name and label in bytes (RFC 1035, section 2.3.4).
const NAME_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;

/// A whole number within a range.
pub(super) fn number<T: FromStr + PartialOrd + Display>(
    text: &str,
    range: &RangeInclusive<T>,
) -> Parsed<T> {
    // The parser takes a plus sign as well.
    let number =
        Some(text).filter(|text| !text.starts_with('+')).and_then(|text| text.parse().ok());
    let number = number.ok_or("not a whole number, or far too large")?;
    within(number, range, T::to_string)
}

/// A duration such as `500ms` or `1m 30s` within a range.
pub(super) fn duration(text: &str, range: &RangeInclusive<Duration>) -> Parsed<Duration> {
    let duration =
        humantime::parse_duration(text).map_err(|error| format!("not a duration: {error}"))?;
    within(duration, range, duration_text)
}

fn within<T: PartialOrd>(
    value: T,
    range: &RangeInclusive<T>,
    text: impl Fn(&T) -> String,
) -> Parsed<T> {
    if value < *range.start() {
        Err(format!("below {}", text(range.start())))
    } else if value > *range.end() {
        Err(format!("above {}", text(range.end())))
    } else {
        Ok(value)
    }
}

/// At most `max` distinct items with commas between.
pub(super) fn list<T: PartialEq>(
    text: &str,
    max: usize,
    item: impl Fn(&str) -> Parsed<T>,
) -> Parsed<Vec<T>> {
    let count = text.split(',').count();
    if count > max {
        return Err(format!("{count} items, {max} at most"));
    }
    let mut items = Vec::with_capacity(count);
    for (position, part) in text.split(',').enumerate() {
        let part = part.trim();
        if part.is_empty() {
            return Err(format!("item {} is empty", position + 1));
        }
        let parsed = item(part).map_err(|why| format!("{part:?}: {why}"))?;
        if items.contains(&parsed) {
            return Err(format!("{part:?} is there twice"));
        }
        items.push(parsed);
    }
    Ok(items)
}

/// An address to listen on. One of IPv4 that is written as one of IPv6 is meant as the former.
pub(super) fn socket_address(text: &str) -> Parsed<SocketAddr> {
    let address: SocketAddr = text.parse().map_err(|_| match text.parse::<IpAddr>() {
        Ok(_) => "the port is missing (IPv6 addresses go in brackets)",
        Err(_) => "not an IP address and a port",
    })?;
    let (_, digits) = text.rsplit_once(':').unwrap_or_default();
    if address.port() != 0 || digits != "0" {
        port(digits)?;
    }
    Ok(match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        // It may have a zone.
        IpAddr::V6(_) => address,
    })
}

/// The path of a Unix socket.
fn unix_address(text: &str) -> Parsed<Address> {
    let address: Address = text.parse().map_err(|error: AddressError| match error {
        AddressError::NotAbsolute(_) => "the path does not begin with /".to_owned(),
        AddressError::TooLong(_) => format!("the path is longer than {PATH_LEN_MAX} bytes"),
        AddressError::Unknown(_) => error.to_string(),
    })?;
    let path = address.path().map(|path| path.as_os_str().as_encoded_bytes()).unwrap_or_default();
    match path {
        [.., b'/'] => Err("the path does not end with the name of a file".to_owned()),
        _ if path.contains(&0) => Err("the path has a NUL in it".to_owned()),
        _ => Ok(address),
    }
}

/// An address to listen on.
fn listen_address(text: &str) -> Parsed<Address> {
    if text.starts_with(UNIX) { unix_address(text) } else { socket_address(text).map(Into::into) }
}

/// Addresses to listen on, of which none takes in another one.
pub(super) fn listen_addresses(text: &str, max: usize) -> Parsed<Vec<Address>> {
    let addresses = list(text, max, listen_address)?;
    for (at, one) in addresses.iter().enumerate() {
        if let Some((wide, narrow)) = overlap(std::slice::from_ref(one), &addresses[at + 1..]) {
            return Err(format!("{wide} takes in {narrow}: leave one of them out"));
        }
    }
    Ok(addresses)
}

/// The address of a Unix socket.
pub(super) fn control_address(text: &str) -> Parsed<Address> {
    if text.starts_with(UNIX) {
        unix_address(text)
    } else {
        Err("not unix: and an absolute path".to_owned())
    }
}

/// An address of the one side that takes in one of the other side, and that one.
pub(super) fn overlap<'a>(
    one_side: &'a [Address],
    other_side: &'a [Address],
) -> Option<(&'a Address, &'a Address)> {
    let pairs = one_side.iter().flat_map(|one| other_side.iter().map(move |other| (one, other)));
    let mut both_ways = pairs.flat_map(|(one, other)| [(one, other), (other, one)]);
    both_ways.find(|pair| match pair {
        (Address::Tcp(wide), Address::Tcp(narrow)) => takes_in(*wide, *narrow),
        (one, other) => one == other,
    })
}

/// Whether a socket that listens at the one address leaves none for another socket at the other.
/// Each is of one family.
pub(super) fn takes_in(one: SocketAddr, other: SocketAddr) -> bool {
    let is_any_of_family = one.ip().is_unspecified() && one.is_ipv4() == other.is_ipv4();
    one.port() != 0 && one.port() == other.port() && (one.ip() == other.ip() || is_any_of_family)
}

/// A port that can be connected to: digits alone, the first of which is not 0, so that nobody has
/// to know what a reader makes of other spellings.
fn port(text: &str) -> Parsed<u16> {
    let is_plain =
        text.bytes().all(|b| b.is_ascii_digit()) && (!text.starts_with('0') || text == "0");
    match text.parse() {
        Ok(0) if is_plain => Err("port 0 cannot be connected to".to_owned()),
        Ok(port) if is_plain => Ok(port),
        _ => Err(format!("{text:?} is not a port from 1 to 65535")),
    }
}

/// What logs, apart from the program's own modules.
const LOGGING_LIBRARIES: [&str; 13] = [
    "h2",
    "hickory_net",
    "hickory_proto",
    "hickory_resolver",
    "hyper",
    "hyper_util",
    "kube_client",
    "mio",
    "rustls",
    "tokio",
    "tower",
    "tower_http",
    "warp",
];

/// A log filter, returned without the spaces in it, and without directives that say nothing. Its reader
/// takes each word that is no level for a target, of which everything is to be logged, and a level that is
/// misspelt is such a word.
pub(super) fn log_filter(text: &str) -> Parsed<String> {
    let directives = text.split(',').map(str::trim).filter(|directive| !directive.is_empty());
    let text = directives.collect::<Vec<_>>().join(",");
    if text.is_empty() {
        return Err("there is no level".to_owned());
    }
    if let Err(error) = EnvFilter::builder().with_regex(false).parse(&text) {
        return Err(error.to_string());
    }
    for (target, has_level) in targets(&text) {
        match known_target(target) {
            Known::No if !has_level => return Err(format!("{target:?} is not a level")),
            Known::NoModule => return Err(format!("there is no module {target:?}")),
            Known::No | Known::Yes => {}
        }
    }
    Ok(text)
}

/// Where the lines of ends come from, for `AEGIS_LOG`: it is no module.
pub const ENDS_TARGET: &str = "aegis::ends";

/// Whether a log filter lets pass what is logged of ends.
pub(super) fn logs_ends(text: &str) -> bool {
    // One that tells spans apart, which are none of ours, is not looked into.
    let targets = text.parse::<Targets>();
    targets.map_or(true, |targets| targets.would_enable(ENDS_TARGET, &Level::INFO))
}

/// The targets of a log filter of which it is not known that anything is logged under them.
pub(super) fn unknown_targets(text: &str) -> impl Iterator<Item = &str> {
    targets(text).map(|(target, _)| target).filter(|target| known_target(target) == Known::No)
}

/// The targets that a log filter names, and whether each comes with a level.
fn targets(text: &str) -> impl Iterator<Item = (&str, bool)> {
    // Spans are not looked at.
    let text = if text.contains('[') { "" } else { text };
    let directives = text.split(',').filter(|directive| !directive.is_empty());
    directives.filter_map(|directive| match directive.split_once('=') {
        Some((target, _)) => Some((target, true)),
        None => LevelFilter::from_str(directive).is_err().then_some((directive, false)),
    })
}

#[derive(PartialEq, Eq)]
enum Known {
    Yes,
    No,
    /// It would be a module of this program.
    NoModule,
}

fn known_target(target: &str) -> Known {
    let mut path = target.split("::");
    let (root, module) = (path.next().unwrap_or_default(), path.next());
    match module {
        Some(_) if target == ENDS_TARGET => Known::Yes,
        Some(module) if root == "aegis" => {
            // The list of modules is where the compiler has it from.
            let mut modules = include_str!("../lib.rs").lines();
            let declares = |line: &str| line == format!("pub mod {module};");
            if modules.any(declares) { Known::Yes } else { Known::NoModule }
        }
        _ if ["aegis", "aegis_proxy"].contains(&root) || LOGGING_LIBRARIES.contains(&root) => {
            Known::Yes
        }
        _ => Known::No,
    }
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = text.rsplit_once(':').ok_or("the port is missing")?;
        if host.starts_with('[') && !host.ends_with(']') {
            return Err(
                "the address in brackets has to be followed by a colon and a port".to_owned()
            );
        }
        let port = self::port(port)?;
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(inner) => match inner.parse::<Ipv6Addr>() {
                // One of IPv4 that is written as one of IPv6 is the former.
                Ok(address) => address.to_canonical().to_string(),
                Err(_) => return Err(format!("{inner:?} is not an IPv6 address")),
            },
            None if host.contains(':') => return Err("IPv6 addresses go in brackets".to_owned()),
            None => check_name(host)?,
        };
        Ok(Self { host, port })
    }
}

/// A name of Kubernetes' kind: a label of DNS (RFC 1123).
pub(super) fn dns_label(text: &str) -> Parsed<String> {
    let fits = (1..=LABEL_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    if fits {
        Ok(text.to_owned())
    } else {
        Err("not a name in Kubernetes: lower-case letters, digits and dashes".to_owned())
    }
}

/// A path that does not depend on where the program was started.
pub(super) fn absolute_path(text: &str) -> Parsed<PathBuf> {
    let path = PathBuf::from(text);
    if path.is_absolute() && !text.ends_with('/') {
        Ok(path)
    } else {
        Err("not the absolute path of a file".to_owned())
    }
}

/// The path of a web page, which stands in a request as it is.
pub(super) fn check_path(text: &str) -> Parsed<String> {
    if !text.starts_with('/') {
        return Err("it does not begin with /".to_owned());
    }
    if text.len() > CHECK_PATH_MAX || !text.bytes().all(|b| b.is_ascii_graphic() && b != b'#') {
        return Err(format!("not up to {CHECK_PATH_MAX} letters, digits and signs without spaces"));
    }
    Ok(text.to_owned())
}

/// A label selector, as far as it can be checked here: the API server knows its syntax.
pub(super) fn selector(text: &str) -> Parsed<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_./=!<>,() ".contains(c);
    if text.chars().all(fits) {
        Ok(text.to_owned())
    } else {
        Err("not a label selector".to_owned())
    }
}

impl FromStr for ServiceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, namespace) = match text.split_once('.') {
            Some((name, namespace)) => (name, Some(dns_label(namespace)?)),
            None => (text, None),
        };
        Ok(Self { name: dns_label(name)?, namespace })
    }
}

impl Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{}.{namespace}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

impl FromStr for KubePort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.bytes().all(|b| b.is_ascii_digit()) {
            port(text).map(Self::Number)
        } else {
            dns_label(text).map(Self::Name)
        }
    }
}

impl Display for KubePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Number(number) => number.fmt(f),
        }
    }
}

/// A DNS name or an IPv4 address, in lower case.
fn check_name(name: &str) -> Parsed<String> {
    if name.is_empty() {
        return Err("the host is missing".to_owned());
    }
    // Underscores are no part of host names but do occur in DNS names; a last dot says "absolute".
    let absolute = name.strip_suffix('.').unwrap_or(name);
    let label_fits = |label: &str| {
        (1..=LABEL_BYTES_MAX).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if absolute.len() > NAME_BYTES_MAX || !absolute.split('.').all(label_fits) {
        return Err(format!("{name:?} is not a host name"));
    }
    // Resolvers take names that end in a number for odd spellings of IPv4 addresses.
    let numeric = |label: &str| label.bytes().all(|b| b.is_ascii_digit());
    if absolute.rsplit('.').next().is_some_and(numeric) && name.parse::<Ipv4Addr>().is_err() {
        return Err(format!("{name:?} is not an IPv4 address"));
    }
    Ok(name.to_ascii_lowercase())
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with(UNIX) {
            unix_address(text).map(Self::Unix)
        } else {
            text.parse().map(Self::Tcp)
        }
    }
}

impl Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host) => host.fmt(f),
            Self::Unix(address) => address.fmt(f),
        }
    }
}

impl Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A type whose values users write as words.
pub(super) trait Word: Copy + 'static {
    /// All values, in the order in which their words are listed.
    const ALL: &'static [Self];

    fn word(self) -> &'static str;

    fn of_word(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|value| value.word() == text)
    }
}

impl Word for bool {
    const ALL: &'static [Self] = &[true, false];

    fn word(self) -> &'static str {
        if self { "on" } else { "off" }
    }
}

impl Word for Protocol {
    const ALL: &'static [Self] = Self::ALL;

    fn word(self) -> &'static str {
        Self::word(self)
    }
}

/// Gives an enum the words that users write for its variants.
macro_rules! words {
    ($($type:ty { $($word:literal => $variant:ident,)+ })+) => {$(
        impl Word for $type {
            const ALL: &'static [Self] = &[$(Self::$variant,)+];

            fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }
    )+};
}

words! {
    Discovery {
        "static" => Static,
        "dns" => Dns,
        "kubernetes" => Kubernetes,
    }
    Check { "connect" => Connect, "request" => Request, }
    Locality { "off" => Off, "zone" => Zone, "node" => Node, "failover" => Failover, }
    Preset { "none" => None, "postgres" => Postgres, "mysql" => Mysql, "redis" => Redis, }
    PoolMode { "preconnect" => Preconnect, "session" => Session, "request" => Request, }
    Switch { "auto" => Auto, "on" => On, "off" => Off, }
    IoChoice { "auto" => Auto, "uring" => Uring, "epoll" => Epoll, }
    Balance {
        "least_conn" => LeastConn,
        "round_robin" => RoundRobin,
        "random_two" => RandomTwo,
        "peak_ewma" => PeakEwma,
        "source_hash" => SourceHash,
        "key_hash" => KeyHash,
    }
    ProxyProtocol { "off" => Off, "v1" => V1, "v2" => V2, }
    LogFormat { "text" => Text, "json" => Json, }
    EndsLogged { "off" => Off, "abnormal" => Abnormal, "sampled" => Sampled, "all" => All, }
}

/// The text of a list.
pub(super) fn list_text<T: Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

/// The text of a duration.
pub(super) fn duration_text(duration: &Duration) -> String {
    humantime::format_duration(*duration).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_are_names_or_addresses_with_a_port() {
        for (text, host, port) in [
            ("chronos:8080", "chronos", 8080),
            ("Chronos-0.DB.svc.cluster.local.:1", "chronos-0.db.svc.cluster.local.", 1),
            ("_tcp.a:65535", "_tcp.a", 65535),
            ("10.0.0.1:80", "10.0.0.1", 80),
            ("[2001:DB8:0:0::1]:80", "2001:db8::1", 80),
        ] {
            let parsed: HostPort = text.parse().unwrap();
            assert_eq!(parsed, HostPort { host: host.to_owned(), port });
            assert_eq!(parsed.to_string().parse(), Ok(parsed));
        }
        let long = format!("{}:80", "a".repeat(64));
        for text in [
            "chronos",
            ":80",
            "chronos:",
            "chronos:0",
            "chronos:65536",
            "chronos:-1",
            "::1:80",
            "[::1]",
            "[chronos]:80",
            "[10.0.0.1]:80",
            "a..b:80",
            ".:80",
            "-a:80",
            "a b:80",
            "http://a:80",
            "999.0.0.1:80",
            "10.1:80",
            &long,
        ] {
            assert!(text.parse::<HostPort>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_unix_socket_is_an_absolute_path_of_a_file() {
        let unix = "unix:/run/aegis/db.sock";
        let address: Address = unix.parse().unwrap();
        assert_eq!(unix.parse(), Ok(Backend::Unix(address.clone())));
        assert_eq!(Backend::Unix(address.clone()).to_string(), unix);
        assert_eq!(listen_addresses(unix, 1), Ok(vec![address]));
        let long = format!("unix:/{}", "x".repeat(PATH_LEN_MAX));
        for (text, why) in [
            ("unix:", "the path does not begin with /"),
            ("unix:db.sock", "the path does not begin with /"),
            ("unix:/run/", "the path does not end with the name of a file"),
            (&long, "the path is longer than 107 bytes"),
        ] {
            assert_eq!(text.parse::<Backend>().unwrap_err(), why, "{text:?}");
            assert_eq!(listen_addresses(text, 1), Err(format!("{text:?}: {why}")));
        }
    }

    #[test]
    fn lists_refuse_empty_items_repetitions_and_excess() {
        let parse = |text| list(text, 3, |item| number(item, &(0..=9)));
        assert_eq!(parse("1, 2 ,3"), Ok(vec![1, 2, 3]));
        assert_eq!(parse("1,,2"), Err("item 2 is empty".to_owned()));
        assert_eq!(parse("1,"), Err("item 2 is empty".to_owned()));
        assert_eq!(parse("1,2, 1"), Err("\"1\" is there twice".to_owned()));
        assert_eq!(parse("1,2,3,4"), Err("4 items, 3 at most".to_owned()));
        assert_eq!(parse("1,x"), Err("\"x\": not a whole number, or far too large".to_owned()));
    }

    #[test]
    fn durations_need_a_unit_and_a_place_in_the_range() {
        let range = Duration::from_millis(1)..=Duration::from_secs(300);
        assert_eq!(duration("1m 30s", &range), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1ms", &range), Ok(Duration::from_millis(1)));
        assert_eq!(duration("0s", &range), Err("below 1ms".to_owned()));
        assert_eq!(duration("5m 1ns", &range), Err("above 5m".to_owned()));
        for text in ["30", "s", "-1s", "1 parsec", "99999999999999999999s", "off"] {
            assert!(duration(text, &range).unwrap_err().starts_with("not a duration"), "{text}");
        }
    }
}
