//! Names among the backends: what name servers, and the files that name them, may do.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backend::Backend;
use crate::support::client::{ask, connect, wait_closed};
use crate::support::dns::{NameServer, Reply, loopback_addresses};
use crate::support::metrics::{DISCOVERY_ENDPOINTS, DISCOVERY_ERRORS};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, skip};

const LOOKUP: &[(&str, &str)] = &[("kind", "lookup")];

fn with(dns: &NameServer, backends: impl Into<String>) -> Builder {
    Builder::on(Io::Epoll)
        .mount(dns.resolv_conf(), "/etc/resolv.conf")
        .set("AEGIS_BACKENDS", backends)
        .set("AEGIS_DNS_REFRESH", "100ms")
        .set("AEGIS_BALANCE", "round_robin")
        .set("AEGIS_BACKEND_DRAIN", "0s")
        .set("AEGIS_SLOW_START", "off")
        .without_pool()
}

fn no_server() {
    skip("port 53 or a mount namespace cannot be had");
}

/// Servers at the same port of each address, which say what they are called.
fn servers<const N: usize>(named: [(&'static str, IpAddr); N]) -> [Backend; N] {
    let first = Backend::named_at(named[0].0, named[0].1);
    let port = first.address().port();
    let mut first = Some(first);
    named.map(|(name, ip)| {
        first.take().unwrap_or_else(|| Backend::named_on(name, SocketAddr::new(ip, port)))
    })
}

fn endpoints(proxy: &Proxy) -> Vec<String> {
    let backends = proxy.get("/backends?limit=1024").json();
    let endpoints = backends["endpoints"].as_array().unwrap().iter();
    endpoints.map(|endpoint| endpoint["address"].as_str().unwrap().to_owned()).collect()
}

fn wait_for_endpoints(proxy: &Proxy, wanted: &[SocketAddr]) {
    let wanted: Vec<_> = wanted.iter().map(SocketAddr::to_string).collect();
    eventually(&format!("endpoints {wanted:?}"), PATIENCE, || {
        (endpoints(proxy) == wanted).then_some(())
    });
}

/// Waits until the name was asked for so many times more.
fn wait_for_queries(dns: &NameServer, name: &str, more: usize) {
    let before = dns.asked(name);
    eventually(&format!("{name} is asked for"), PATIENCE, || {
        (dns.asked(name) >= before + more).then_some(())
    });
}

fn who(proxy: &Proxy) -> String {
    ask(&connect(proxy.address()), "who")
}

fn four(last: u8) -> IpAddr {
    IpAddr::from([127, 0, 3, last])
}

const SIX: IpAddr = IpAddr::V6(std::net::Ipv6Addr::LOCALHOST);

fn addresses(ips: &[IpAddr]) -> Reply {
    Reply::Addresses(ips.to_vec(), 0)
}

#[test]
fn a_check_of_the_host_waits_for_each_name() {
    let Some(dns) = NameServer::start() else { return no_server() };
    let backend = Backend::named_at("a", four(1));
    let port = backend.address().port();
    dns.configure("options timeout:1 attempts:1");
    dns.set_addresses("good.test", 60, &[four(1)]);
    dns.set("slow.test", Reply::Silence, Reply::Silence);
    let check = |names: &[&str]| {
        let names: Vec<_> = names.iter().map(|name| format!("{name}:{port}")).collect();
        with(&dns, names.join(",")).argument("check").argument("--host").run()
    };
    let ended = check(&["good.test"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let ended = check(&["good.test", "slow.test"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let about = format!("BAD   names: slow.test:{port}");
    assert!(ended.output.contains(&about), "{ended:?}");
    assert!(ended.output.contains(": connected in "), "{ended:?}");
}

#[test]
fn a_family_that_is_not_answered_for_takes_nothing_from_anybody() {
    let Some(dns) = NameServer::start() else { return no_server() };
    let [a, b] = servers([("a", four(1)), ("b", SIX)]);
    dns.configure("options timeout:1 attempts:1");
    dns.set("db.test", addresses(&[four(1)]), addresses(&[SIX]));
    let proxy = with(&dns, format!("db.test:{}", a.address().port())).start();
    let both = [a.address(), b.address()];
    wait_for_endpoints(&proxy, &both);
    let clients: Vec<_> = (0..4).map(|_| connect(proxy.address())).collect();
    let mut names: Vec<_> = clients.iter().map(|client| ask(client, "who")).collect();
    let sessions = names.clone();
    names.sort();
    assert_eq!(names, ["a", "a", "b", "b"]);
    for bad in [Reply::ServerFailure, Reply::Silence, Reply::Garbage(vec![0xff; 40])] {
        for (six_too, four) in [(false, bad.clone()), (true, bad.clone())] {
            let six = if six_too { bad.clone() } else { addresses(&[SIX]) };
            let errors = proxy.metric(DISCOVERY_ERRORS, LOOKUP);
            dns.set("db.test", four, six);
            proxy.wait_for(DISCOVERY_ERRORS, LOOKUP, |now| now > errors + 2);
            assert_eq!(endpoints(&proxy).len(), 2);
        }
        dns.set("db.test", addresses(&[four(1)]), bad);
        let errors = proxy.metric(DISCOVERY_ERRORS, LOOKUP);
        proxy.wait_for(DISCOVERY_ERRORS, LOOKUP, |now| now > errors + 2);
        wait_for_endpoints(&proxy, &both);
    }
    for (client, name) in clients.iter().zip(&sessions) {
        assert_eq!(&ask(client, "who"), name, "it is cut");
    }

    // What a server knows not to be there has left, though not at the first word.
    dns.set("db.test", Reply::NoData, addresses(&[SIX]));
    wait_for_endpoints(&proxy, &both[1..]);
    dns.set("db.test", Reply::NoSuchName, Reply::NoSuchName);
    wait_for_endpoints(&proxy, &[]);
    for client in &clients {
        wait_closed(client).unwrap();
    }
    dns.set("db.test", addresses(&[four(1)]), Reply::NoSuchName);
    wait_for_endpoints(&proxy, &both[..1]);
    assert_eq!(who(&proxy), "a");
}

#[test]
fn names_that_hang_hold_up_no_others_and_no_end() {
    let Some(dns) = NameServer::start() else { return no_server() };
    let [a, b] = servers([("a", four(1)), ("b", four(2))]);
    let port = a.address().port();
    let mut names: Vec<_> = (0..100).map(|i| format!("hangs{i}.test:{port}")).collect();
    for name in &names {
        dns.set(name.split_once(':').unwrap().0, Reply::Silence, Reply::Silence);
    }
    names.push(format!("db.test:{port}"));
    dns.set("db.test", addresses(&[four(1)]), Reply::NoData);
    let started = Instant::now();
    let mut proxy = with(&dns, names.join(",")).start();
    assert_eq!(who(&proxy), "a");
    let begun = started.elapsed();
    assert!(begun < Duration::from_secs(8), "{begun:?}");
    for i in 0..10 {
        let server = [&b, &a][i % 2];
        let changed = Instant::now();
        dns.set_addresses("db.test", 0, &[server.address().ip()]);
        wait_for_endpoints(&proxy, &[server.address()]);
        let noticed = changed.elapsed();
        assert!(noticed < Duration::from_secs(5), "{noticed:?}");
    }
    assert!((0..100).all(|i| dns.asked(&format!("hangs{i}.test")) > 0), "all are asked for");
    proxy.terminate();
    proxy.wait_clean(Duration::from_secs(2));
}

#[test]
fn a_family_that_hangs_holds_up_nothing() {
    let Some(dns) = NameServer::start() else { return no_server() };
    let [a, b] = servers([("a", four(1)), ("b", four(2))]);
    dns.set("db.test", addresses(&[four(1)]), Reply::Silence);
    let started = Instant::now();
    let proxy = with(&dns, format!("db.test:{}", a.address().port())).start();
    assert_eq!(who(&proxy), "a");
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    // And no news of the other, though each server may be silent for 10 s.
    let changed = Instant::now();
    dns.set("db.test", addresses(&[four(2)]), Reply::Silence);
    wait_for_endpoints(&proxy, &[b.address()]);
    assert!(changed.elapsed() < Duration::from_secs(9), "{:?}", changed.elapsed());
}

/// Nobody is at the first name server's address.
#[test]
fn a_silent_name_server_is_not_waited_for_at_each_name() {
    let Some(dns) = NameServer::start() else { return no_server() };
    let [a] = servers([("a", four(1))]);
    let search: Vec<_> = (0..31).map(|i| format!("s{i}.test")).collect();
    dns.write_resolv_conf(&format!(
        "nameserver 127.98.0.1\nnameserver {}\nsearch {}\noptions ndots:5 timeout:1 attempts:1\n",
        dns.ip(),
        search.join(" "),
    ));
    dns.set_addresses("db.test", 0, &[four(1)]);
    let started = Instant::now();
    let proxy = with(&dns, format!("db.test:{}", a.address().port())).launch();
    wait_for_endpoints(&proxy, &[a.address()]);
    let taken = started.elapsed();
    assert!(taken < Duration::from_secs(10), "{taken:?}, where 32 names take a second each");
}

#[test]
fn the_search_list_names_one_host() {
    let Some(dns) = NameServer::start() else { return no_server() };
    let [a, b] = servers([("a", four(1)), ("b", four(2))]);
    let port = a.address().port();
    dns.configure("search one.test two.test\noptions ndots:2 timeout:1 attempts:1");
    // Of two names that exist, all addresses are of the first.
    dns.set("db.one.test", addresses(&[four(1)]), Reply::NoData);
    dns.set("db.two.test", addresses(&[four(2)]), addresses(&[SIX]));
    let proxy = with(&dns, format!("db:{port}")).start();
    wait_for_endpoints(&proxy, &[a.address()]);
    // It fails for a moment, and is still the name that is meant.
    dns.set("db.one.test", Reply::ServerFailure, Reply::ServerFailure);
    wait_for_queries(&dns, "db.one.test", 10);
    assert_eq!(endpoints(&proxy), [a.address().to_string()]);
    assert_eq!(dns.asked("db.two.test"), 0);
    // It is gone, and so the next one is meant.
    dns.set("db.one.test", Reply::NoSuchName, Reply::NoSuchName);
    wait_for_endpoints(&proxy, &[b.address(), SocketAddr::new(SIX, port)]);
    // A domain that nobody answers for, and in which the name never was, is passed over.
    dns.set("db.one.test", Reply::ServerFailure, Reply::ServerFailure);
    dns.set("db.two.test", addresses(&[four(1)]), Reply::NoData);
    wait_for_endpoints(&proxy, &[a.address()]);
    drop(proxy);

    // With a last dot it stands for itself, and with enough dots first for itself.
    dns.set_addresses("abs.test", 0, &[four(1)]);
    dns.set_addresses("a.b.c", 0, &[four(2)]);
    let proxy = with(&dns, format!("abs.test.:{port},a.b.c:{port}")).start();
    wait_for_endpoints(&proxy, &[a.address(), b.address()]);
    assert_eq!(dns.asked("abs.test.one.test") + dns.asked("a.b.c.one.test"), 0);
}

#[test]
fn an_alias_and_an_answer_that_is_cut_are_followed() {
    let Some(dns) = NameServer::start() else { return no_server() };
    let all = loopback_addresses(300);
    dns.set_addresses("many.test", 0, &all);
    for i in 0..6 {
        let next = if i == 5 { "many.test".to_owned() } else { format!("alias{}.test", i + 1) };
        let alias = Reply::Alias(next);
        dns.set(&format!("alias{i}.test"), alias.clone(), alias);
    }
    let alias = Reply::Alias("circle.test".to_owned());
    dns.set("circle.test", alias.clone(), alias);
    let proxy = with(&dns, "alias0.test:1,circle.test:1").launch();
    proxy.wait_for(DISCOVERY_ENDPOINTS, &[], |count| count == 300);
    assert!(dns.asked_by_tcp("alias0.test") > 0);
}

#[test]
fn a_huge_answer_leaves_room_for_other_names() {
    let Some(dns) = NameServer::start() else { return no_server() };
    let [a] = servers([("a", four(1))]);
    dns.set_addresses("huge.test", 0, &loopback_addresses(4000));
    dns.set_addresses("db.test", 0, &[four(1)]);
    let port = a.address().port();
    let proxy = with(&dns, format!("huge.test:{port},db.test:{port}")).launch();
    proxy.wait_for(DISCOVERY_ENDPOINTS, &[], |count| count == 1024);
    let found = endpoints(&proxy);
    assert!(found.contains(&a.address().to_string()), "the last of {}", found.len());
}

#[test]
fn addresses_are_asked_for_again_when_they_no_longer_hold() {
    let Some(dns) = NameServer::start() else { return no_server() };
    dns.set_addresses("short.test", 0, &[four(1)]);
    dns.set_addresses("long.test", 1 << 31, &[four(2)]);
    dns.set_addresses("second.test", 1, &[four(3)]);
    let names = ["short.test", "long.test", "second.test"];
    let list: Vec<_> = names.iter().map(|name| format!("{name}:1")).collect();
    let proxy = with(&dns, list.join(",")).launch();
    proxy.wait_for(DISCOVERY_ENDPOINTS, &[], |count| count == 3);
    let before = names.map(|name| dns.asked(name));
    // The time is what is tested.
    thread::sleep(Duration::from_secs(3));
    let asked: Vec<_> = names.iter().zip(before).map(|(name, b)| dns.asked(name) - b).collect();
    assert!((20..=62).contains(&asked[0]), "every 100 ms, both families: {asked:?}");
    assert_eq!(asked[1], 0, "{asked:?}");
    assert!((2..=6).contains(&asked[2]), "every second, both families: {asked:?}");
}

#[test]
fn a_resolv_conf_may_change_and_may_be_no_good() {
    let (Some(dns), Some(other)) = (NameServer::start(), NameServer::start()) else {
        return no_server();
    };
    let [a, b] = servers([("a", four(1)), ("b", four(2))]);
    dns.set_addresses("db.test", 0, &[four(1)]);
    other.set_addresses("db.test", 0, &[four(2)]);
    let proxy = with(&dns, format!("db.test:{}", a.address().port())).start();
    wait_for_endpoints(&proxy, &[a.address()]);
    dns.write_resolv_conf(&format!("nameserver {}\n", other.ip()));
    wait_for_endpoints(&proxy, &[b.address()]);
    for nothing in ["", "nameserver", "nameserver nowhere\n\0\u{ff}", "search x"] {
        dns.write_resolv_conf(nothing);
        wait_for_queries(&other, "db.test", 6);
        assert_eq!(endpoints(&proxy), [b.address().to_string()], "{nothing:?}");
    }
    // A server that does not answer, and one that refuses to, are followed by the next.
    let silent = Ipv4Addr::new(127, 0, 0, 53);
    let next = dns.ip();
    other.set("db.test", Reply::ServerFailure, Reply::ServerFailure);
    dns.write_resolv_conf(&format!(
        "nameserver {silent}\nnameserver {}\nnameserver {next}\noptions timeout:1",
        other.ip()
    ));
    wait_for_endpoints(&proxy, &[a.address()]);
}

#[test]
fn names_that_need_a_resolv_conf_are_unknown_without_one() {
    let Some(dns) = NameServer::start() else { return no_server() };
    let [a] = servers([("a", IpAddr::V4(Ipv4Addr::LOCALHOST))]);
    let port = a.address().port();
    let backends = format!("db.test:{port},localhost:{port},127.0.0.1:{port}");
    let mut proxy = with(&dns, backends)
        // Neither is a file.
        .mount(Path::new("/dev/null"), "/etc/resolv.conf")
        .mount(Path::new("/dev/null"), "/etc/hosts")
        .start();
    assert_eq!(who(&proxy), "a");
    assert_eq!(endpoints(&proxy), [a.address().to_string(), format!("[::1]:{port}")]);
    assert_eq!(dns.asked("localhost"), 0, "nobody is to be asked for it");
    proxy.terminate();
    proxy.wait_clean(Duration::from_secs(2));
}
