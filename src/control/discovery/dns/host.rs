//! What is known of one configured backend: per family, its last known good addresses.

use std::net::{IpAddr, SocketAddr};

use super::super::Wanted;
use super::resolver::{Answer, Family};
use crate::config::Backend;
use crate::io::net::Address;
use crate::limits::{DNS_ANSWERS_TO_LEAVE, ENDPOINTS_MAX};
use crate::proxy::endpoints::Tier;

/// What is known of one of the configured backends.
#[derive(Debug)]
pub(super) struct Host {
    /// Where it is; else it is to be looked up.
    fixed: Option<Address>,
    tier: Tier,
    families: [FamilyState; Family::ALL.len()],
}

impl Host {
    pub(super) fn new(backend: &Backend, tier: Tier) -> Self {
        Self { fixed: backend.address(), tier, families: Default::default() }
    }

    fn len(&self) -> usize {
        let found: usize = self.families.iter().map(|known| known.addresses.len()).sum();
        usize::from(self.fixed.is_some()) + found
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes in what a lookup found of one family.
    pub(super) fn on_answer(&mut self, family: Family, answer: Answer) {
        self.families[family as usize].on_answer(answer);
    }

    /// Whether it was looked up. Where it is to have one address, IPv4 decides.
    pub(super) fn is_answered(&self, has_one: bool) -> bool {
        let [four, six] = &self.families;
        let decided = has_one && !four.addresses.is_empty();
        self.fixed.is_some() || decided || (four.is_answered && six.is_answered)
    }

    /// Whether its latest look-up has failed, or has found that it does not exist.
    pub(super) fn is_in_trouble(&self) -> bool {
        let answered = self.families.iter().all(|known| known.is_answered);
        self.families.iter().any(|known| known.is_stale)
            || self.fixed.is_none() && answered && self.is_empty()
    }

    pub(super) fn is_stale(&self) -> bool {
        self.families.iter().any(|known| known.is_stale && !known.addresses.is_empty())
    }

    /// Its endpoints, at most `max`.
    fn wanted(&self, backend: &Backend, max: usize) -> Vec<Wanted> {
        let tier = self.tier;
        let host = match (&self.fixed, backend) {
            (None, Backend::Tcp(host)) => host,
            (Some(address), _) => {
                return vec![Wanted { tier, ..Wanted::new(backend.to_string(), address.clone()) }];
            }
            (None, Backend::Unix(_)) => unreachable!("a Unix socket is where its path says"),
        };
        let addresses = self.families.iter().flat_map(|known| &known.addresses).take(max);
        let wanted = |&ip: &IpAddr| {
            let name = format!("{}:{}@{ip}", host.host, host.port);
            Wanted { tier, ..Wanted::new(name, SocketAddr::new(ip, host.port)) }
        };
        addresses.map(wanted).collect()
    }
}

/// The endpoints of each host. Where they are too many, those that have the most have fewer, so
/// that no name's answer takes the place of all others.
pub(super) fn wanted(hosts: &[Host], names: &[Backend]) -> Vec<Vec<Wanted>> {
    let counts: Vec<_> = hosts.iter().map(Host::len).collect();
    let fits = |max: usize| counts.iter().map(|&n| n.min(max)).sum::<usize>() <= ENDPOINTS_MAX;
    let max = if fits(usize::MAX) {
        usize::MAX
    } else {
        (1..ENDPOINTS_MAX).rev().find(|&max| fits(max)).unwrap_or(1)
    };
    hosts.iter().zip(names).map(|(known, host)| known.wanted(host, max)).collect()
}

/// What is known of a host's addresses of one family.
#[derive(Debug, Default)]
struct FamilyState {
    /// In their order; the last known good ones.
    addresses: Vec<IpAddr>,
    is_answered: bool,
    /// The latest lookup failed, so that the addresses may be out of date.
    is_stale: bool,
    /// Answers in a row that there is no address.
    absent: u32,
}

impl FamilyState {
    fn on_answer(&mut self, answer: Answer) {
        self.is_answered = true;
        self.is_stale = matches!(answer, Answer::Failed(_));
        match answer {
            Answer::Found { mut addresses, .. } => {
                // Name servers rotate their answers, and a new order is no change.
                addresses.sort_unstable();
                addresses.dedup();
                self.addresses = addresses;
                self.absent = 0;
            }
            Answer::Absent => {
                self.absent = self.absent.saturating_add(1);
                if self.absent >= DNS_ANSWERS_TO_LEAVE {
                    self.addresses.clear();
                }
            }
            Answer::Failed(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{backend, found};
    use super::*;

    #[test]
    fn a_family_has_its_own_last_known_good_addresses() {
        let mut host = Host::new(&backend("db"), Tier::FIRST);
        let mut after = |family: Family, answer: &Answer| {
            host.on_answer(family, answer.clone());
            let addresses = host.families.iter().flat_map(|known| known.addresses.clone());
            let text: Vec<_> = addresses.map(|ip| ip.to_string()).collect();
            (text.join(" "), host.is_stale())
        };
        let failed = Answer::Failed("timed out".to_owned());
        let [both, six] = ["10.0.0.1 10.0.0.2 fd00::1", "fd00::1"].map(str::to_owned);
        after(Family::V6, &found(&["fd00::1"], None));
        let four = found(&["10.0.0.2", "10.0.0.1", "10.0.0.2"], None);
        assert_eq!(after(Family::V4, &four), (both.clone(), false));
        for _ in 0..9 {
            assert_eq!(after(Family::V4, &failed), (both.clone(), true));
        }
        for _ in 1..DNS_ANSWERS_TO_LEAVE {
            assert_eq!(after(Family::V4, &Answer::Absent), (both.clone(), false));
            assert_eq!(after(Family::V4, &failed), (both.clone(), true), "no answer");
        }
        assert_eq!(after(Family::V4, &Answer::Absent), (six.clone(), false));
        assert_eq!(after(Family::V4, &failed), (six, false));
        assert_eq!(after(Family::V4, &four), (both.clone(), false));
        assert_eq!(after(Family::V4, &Answer::Absent), (both, false), "counted anew");
    }

    #[test]
    fn a_huge_answer_does_not_take_the_place_of_others() {
        let all: Vec<_> =
            (0..4000u32).map(|i| IpAddr::from((0x0a00_0000 + i).to_be_bytes())).collect();
        let backends = ["huge", "small", "10.0.0.1"].map(backend);
        let mut hosts = backends.each_ref().map(|backend| Host::new(backend, Tier::FIRST));
        hosts[1].on_answer(Family::V4, found(&["10.1.0.1", "10.1.0.2"], None));
        for (count, kept) in [(1021, 1021), (1022, 1021), (4000, 1021)] {
            let addresses = all[..count].to_vec();
            hosts[0].on_answer(Family::V4, Answer::Found { addresses, ttl: None });
            let lens = wanted(&hosts, &backends).iter().map(Vec::len).collect::<Vec<_>>();
            assert_eq!(lens, [kept, 2, 1], "of {count}");
        }
    }
}
