//! The engine on the simulator where connections serve several clients with HTTP: seeded runs, every answer and every upload
//! checked.

use std::collections::{HashMap, HashSet};

use super::simulation::RequestRun;
use crate::config::Protocol;
use crate::io::sim::http::{Answer, SURPLUS, UNASKED, body_of, parse};
use crate::io::sim::{Peer, Sim};
use crate::worker::simulation::run_seeds;

/// What one client got: its answers in the order of its requests, and nothing that is cut and looks
/// whole. Returns how many came from backends, and how many of those nobody had asked for.
fn check_client(client: &Peer, whole_uploads: &HashSet<&str>) -> (usize, usize) {
    let (id, http) = (client.id, client.http.as_ref().expect("clients speak HTTP"));
    let answers = parse(&client.received);
    let (mut answered, mut unasked) = (0, 0);
    for (i, answer) in answers.iter().enumerate() {
        let is_opaque = http.asked.last().is_some_and(|asked| asked.tag.is_none());
        let Some(asked) = http.asked.get(i) else {
            // What a backend says on a connection of opaque bytes is passed on.
            assert!(is_opaque && unasked > 0, "client {id} got more answers");
            continue;
        };
        let is_last = i + 1 == answers.len();
        if answer.is_ours {
            assert!(is_last && answer.is_whole, "client {id} got more behind an error");
            continue;
        }
        if answer.tag.as_deref().is_some_and(|tag| tag == UNASKED || tag == SURPLUS) {
            unasked += 1;
            continue;
        }
        let (Some(tag), Some(wanted)) = (&answer.tag, &asked.tag) else {
            assert!(asked.tag.is_none() && is_last, "client {id} asked {asked:?}: {answer:?}");
            continue;
        };
        assert_eq!(tag, wanted, "client {id} got another one's answer");
        check_body(client, answer, tag, is_last);
        answered += 1;
        let goes_on = !is_last && !answer.closes && answer.is_whole;
        if goes_on && asked.body > 0 && answers[i + 1].tag.is_some() {
            assert!(whole_uploads.contains(tag.as_str()), "client {id}: {tag} did not arrive");
        }
    }
    (answered, unasked)
}

/// A body is what the backend gave, to its end, or the client can see that it is not.
fn check_body(client: &Peer, answer: &Answer, tag: &str, is_last: bool) {
    let id = client.id;
    if answer.status == 413 && answer.body.is_empty() {
        return;
    }
    let endpoint = answer.body.get(1).map_or(0, |digit| u16::from(digit.wrapping_sub(b'0')));
    let expected = body_of(tag, endpoint);
    assert!(expected.starts_with(&answer.body), "client {id} got another body for {tag}");
    let is_whole = answer.body.len() == expected.len();
    assert!(is_whole || !answer.is_whole, "client {id} got a part of {tag} as if it were all");
    assert!(is_last || answer.is_whole, "client {id} got an answer behind a part of {tag}");
    let in_order = client.saw_end && !client.saw_reset && !client.reset;
    assert!(is_whole || !in_order, "client {id} was told that a part of {tag} is all");
}

/// Nothing is made twice that must not be. Returns the uploads that reached a backend whole.
fn check_requests(driver: &Sim) -> HashSet<&str> {
    let mut posts: HashMap<&str, usize> = HashMap::new();
    let mut whole = HashSet::new();
    for backend in driver.peers.iter().filter(|peer| !peer.is_client) {
        for heard in backend.http.iter().flat_map(|http| &http.heard) {
            if heard.is_post {
                *posts.entry(&heard.tag).or_default() += 1;
            }
            if heard.is_whole {
                whole.insert(heard.tag.as_str());
            }
        }
    }
    for (tag, times) in posts {
        assert_eq!(times, 1, "{tag} was posted more than once");
    }
    whole
}

fn run(seed: u64) -> (u64, u64) {
    let mut run = RequestRun::new(seed, Protocol::Http1);
    run.serve();
    run.check_liveness();
    let driver = run.run.engine.driver();
    let whole = check_requests(driver);
    let (mut answered, mut leaked) = (0, 0);
    for client in driver.peers.iter().filter(|peer| peer.is_client) {
        let (answers, unasked) = check_client(client, &whole);
        answered += answers;
        leaked += unasked;
    }
    let unasked: usize =
        driver.peers.iter().filter_map(|peer| peer.http.as_ref()).map(|http| http.unasked).sum();
    assert!(leaked <= unasked, "{leaked} words for {unasked}");
    run.run.stop();
    (run.run.stats.sessions_opened.get(), answered as u64)
}

#[test]
fn five_hundred_seeds_of_http_give_every_client_its_own_answers() {
    let (opened, answered) = run_seeds(0, 500, run);
    println!("{opened} clients, {answered} answers");
    assert!(answered > opened, "{answered} answers for {opened}: too little is tested");
}

#[test]
fn equal_seeds_of_http_run_alike() {
    assert_eq!(run(42), run(42));
}
