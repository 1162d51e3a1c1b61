//! Kubernetes objects → endpoints: pure, and the only judge of what may be connected to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use super::known::Weight;
use super::objects::Pod;
use crate::config::{KubePort, Locality};
use crate::control::discovery::Wanted;
use crate::proxy::endpoints::Tier;

/// The label that topology controllers put on nodes, and from 1.35 on also on pods.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// The label beside it for regions.
const REGION_LABEL: &str = "topology.kubernetes.io/region";

/// How objects are read.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    /// Which port is meant.
    pub port: Option<KubePort>,
    /// Which endpoints are near.
    pub locality: Locality,
    /// The own node.
    pub node: Option<String>,
    /// The own zone.
    pub zone: Option<String>,
    /// The own region.
    pub region: Option<String>,
    /// Whether the names of all pods are of interest.
    pub by_key: bool,
}

/// One endpoint as one object describes it; all that is kept of it in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    /// What makes it the same endpoint in several objects: the pod's uid, or its address and port.
    id: String,
    name: String,
    address: SocketAddr,
    terminating: bool,
    near: bool,
    tier: Tier,
}

/// What is kept of one object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Extract {
    candidates: Vec<Candidate>,
    /// The names of all pods, those that do not serve included, where keys say where requests go.
    pub(super) pods: Vec<String>,
    /// Why it has no endpoints for this configuration, though it names some.
    misfit: Option<String>,
    /// Whether some of them serve.
    misses_some: bool,
}

impl Rules {
    /// The tier of what is in this zone and region, as far as it is known. Slices name zones only: a
    /// zone is of the own region where its name begins with that of the region, as clouds name them.
    fn tier_in(&self, zone: Option<&str>, region: Option<&str>) -> Tier {
        if self.locality != Locality::Failover {
            return Tier::FIRST;
        }
        let is_own = |own: &Option<String>, its| own.is_some() && own.as_deref() == its;
        let named_after = |own: &String| zone.is_some_and(|zone| is_zone_of(zone, own));
        if is_own(&self.zone, zone) {
            Tier::FIRST
        } else if is_own(&self.region, region)
            || region.is_none() && self.region.as_ref().is_some_and(named_after)
        {
            Tier::at(1)
        } else {
            Tier::at(2)
        }
    }
}

/// Whether the name of a zone is that of the region and a letter, as in `us-east-1a`, or more behind a
/// dash, as in `us-central1-a` and `eastus-1`; so `eastus2-1` is not of `eastus`.
fn is_zone_of(zone: &str, region: &str) -> bool {
    let Some(rest) = zone.strip_prefix(region) else { return false };
    let is_letter = rest.len() == 1 && rest.as_bytes()[0].is_ascii_alphabetic();
    is_letter || rest.len() > 1 && rest.starts_with('-')
}

impl Weight for Extract {
    fn weight(&self) -> usize {
        let candidate = |c: &Candidate| size_of::<Candidate>() + c.id.len() + c.name.len();
        let candidates: usize = self.candidates.iter().map(candidate).sum();
        let pods: usize = self.pods.iter().map(|pod| size_of::<String>() + pod.len()).sum();
        size_of::<Self>() + candidates + pods + self.misfit.as_ref().map_or(0, String::len)
    }
}

/// Reads a slice.
pub(super) fn slice(slice: &EndpointSlice, rules: &Rules) -> Extract {
    // Names (`FQDN`) are a deprecated kind that nothing in a cluster makes.
    if slice.address_type != "IPv4" && slice.address_type != "IPv6" {
        return Extract::default();
    }
    let ports = slice.ports.iter().flatten().filter_map(|port| {
        let tcp = port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        let number = port.port.and_then(|number| u16::try_from(number).ok())?;
        tcp.then(|| (port.name.as_deref().unwrap_or(""), number))
    });
    let pods = slice.endpoints.iter().filter(|_| rules.by_key).map(|endpoint| {
        let target = endpoint.target_ref.as_ref().and_then(|target| target.name.as_ref());
        let name = target.or(endpoint.hostname.as_ref()).or(endpoint.addresses.first());
        name.cloned().unwrap_or_default()
    });
    let pods = pods.collect();
    let port = match choose_port(rules.port.as_ref(), ports) {
        Ok(port) => port,
        Err(why) => {
            // A slice that names nobody has no ports either.
            let misfit = (!slice.endpoints.is_empty()).then_some(why);
            let misses_some = slice.endpoints.iter().any(is_serving);
            return Extract { candidates: Vec::new(), pods, misfit, misses_some };
        }
    };
    let candidates = slice.endpoints.iter().filter(|endpoint| is_serving(endpoint));
    let candidates = candidates.filter_map(|e| candidate(e, port, rules)).collect();
    Extract { candidates, pods, ..Extract::default() }
}

fn is_serving(endpoint: &Endpoint) -> bool {
    // Not `ready`: with publishNotReadyAddresses that is always true.
    let conditions = endpoint.conditions.as_ref();
    conditions.and_then(|c| c.serving.or(c.ready)).unwrap_or(true)
}

fn candidate(endpoint: &Endpoint, port: u16, rules: &Rules) -> Option<Candidate> {
    // Further addresses stand for the same endpoint, and nothing ever sets them.
    let text = endpoint.addresses.first()?;
    let ip: IpAddr = text.parse().ok()?;
    let target = endpoint.target_ref.as_ref();
    let name = target.and_then(|target| target.name.as_ref()).or(endpoint.hostname.as_ref());
    let address = SocketAddr::new(ip, port);
    let same = |own: &Option<String>, its: &Option<String>| own.is_some() && own == its;
    let hints = endpoint.hints.as_ref();
    let near = match rules.locality {
        Locality::Off => false,
        Locality::Node => match hints.and_then(|hints| hints.for_nodes.as_ref()) {
            Some(nodes) => nodes.iter().any(|node| Some(&node.name) == rules.node.as_ref()),
            None => same(&rules.node, &endpoint.node_name),
        },
        Locality::Zone => match hints.and_then(|hints| hints.for_zones.as_ref()) {
            Some(zones) => zones.iter().any(|zone| Some(&zone.name) == rules.zone.as_ref()),
            None => same(&rules.zone, &endpoint.zone),
        },
        // Hints spread the load; here it is where an endpoint is that counts.
        Locality::Failover => same(&rules.zone, &endpoint.zone),
    };
    Some(Candidate {
        id: target.and_then(|target| target.uid.clone()).unwrap_or_else(|| address.to_string()),
        name: name.cloned().unwrap_or_else(|| address.to_string()),
        address,
        terminating: endpoint.conditions.as_ref().and_then(|c| c.terminating).unwrap_or(false),
        near,
        tier: rules.tier_in(endpoint.zone.as_deref(), None),
    })
}

/// Reads a pod.
pub(super) fn pod(pod: &Pod, rules: &Rules) -> Extract {
    let pods = pod.metadata.name.iter().filter(|_| rules.by_key).cloned().collect();
    Extract { pods, ..pod_serving(pod, rules) }
}

fn pod_serving(pod: &Pod, rules: &Rules) -> Extract {
    let Some(status) = &pod.status else { return Extract::default() };
    let ready =
        status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
    let running = status.phase.as_deref() == Some("Running");
    let spec = pod.spec.as_ref();
    let containers = spec.and_then(|spec| spec.containers.as_deref()).unwrap_or_default();
    let sidecars = spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
    let sidecars = sidecars.iter().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = containers.iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten());
    let ports = ports.filter_map(|port| {
        let tcp = port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        let number = u16::try_from(port.number).ok()?;
        tcp.then(|| (port.name.as_deref().unwrap_or(""), number))
    });
    let serves = ready && running;
    let port = match choose_port(rules.port.as_ref(), ports) {
        Ok(port) => port,
        Err(why) => {
            return Extract { misfit: Some(why), misses_some: serves, ..Extract::default() };
        }
    };
    let ip = status.pod_ip.as_deref().and_then(|ip| ip.parse::<IpAddr>().ok());
    let (Some(ip), true) = (ip, serves) else { return Extract::default() };
    let address = SocketAddr::new(ip, port);
    let node = spec.and_then(|spec| spec.node_name.as_ref());
    let label = |name| pod.metadata.labels.as_ref().and_then(|labels| labels.get(name));
    let (zone, region) = (label(ZONE_LABEL), label(REGION_LABEL));
    let near = match rules.locality {
        Locality::Off => false,
        Locality::Node => node.is_some() && node == rules.node.as_ref(),
        Locality::Zone | Locality::Failover => zone.is_some() && zone == rules.zone.as_ref(),
    };
    let candidate = Candidate {
        id: pod.metadata.uid.clone().unwrap_or_else(|| ip.to_string()),
        name: pod.metadata.name.clone().unwrap_or_else(|| address.to_string()),
        address,
        terminating: pod.metadata.deletion_timestamp.is_some(),
        near,
        tier: rules.tier_in(zone.map(String::as_str), region.map(String::as_str)),
    };
    Extract { candidates: vec![candidate], ..Extract::default() }
}

/// The port that is meant, or why there is none.
fn choose_port<'a>(
    meant: Option<&KubePort>,
    ports: impl Iterator<Item = (&'a str, u16)>,
) -> Result<u16, String> {
    let ports: BTreeSet<(&str, u16)> = ports.collect();
    let listed = || {
        let texts: Vec<_> = ports.iter().map(|(name, n)| format!("{n} ({name:?})")).collect();
        if texts.is_empty() { "none".to_owned() } else { texts.join(", ") }
    };
    match meant {
        // A headless Service without ports has endpoints all the same.
        Some(KubePort::Number(number)) => Ok(*number),
        Some(KubePort::Name(name)) => {
            let found = ports.iter().find(|(its, _)| its == name).map(|&(_, number)| number);
            found.ok_or_else(|| format!("no TCP port is called {name:?}; there is {}", listed()))
        }
        None => match ports.iter().collect::<Vec<_>>()[..] {
            [&(_, number)] => Ok(number),
            _ => Err(format!("AEGIS_KUBE_PORT has to choose a TCP port; there is {}", listed())),
        },
    }
}

/// What all objects amount to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Union {
    /// One entry for each endpoint, in a stable order. Endpoints that are going away are there only
    /// if no other is.
    pub wanted: Vec<Wanted>,
    /// Why endpoints are left out though they serve.
    pub left_out: Option<String>,
    /// Why nobody fits this configuration, though somebody is there.
    pub misfit: Option<String>,
}

/// Puts the extracts of all objects together.
pub(super) fn union<'a>(all: impl Iterator<Item = &'a Extract>) -> Union {
    let (mut left_out, mut misfit, mut fits) = (None, None, false);
    // While it moves between slices, an endpoint is in two of them; with two families, too. The
    // least wins: one that stays before one that goes, IPv4 before IPv6.
    let mut endpoints = BTreeMap::<&str, &Candidate>::new();
    for extract in all {
        misfit = misfit.or(extract.misfit.as_ref());
        left_out = left_out.or(extract.misfit.as_ref().filter(|_| extract.misses_some));
        fits |= !extract.candidates.is_empty();
        for candidate in &extract.candidates {
            let rank = |c: &Candidate| (c.terminating, c.address);
            let known = endpoints.entry(&candidate.id).or_insert(candidate);
            if rank(candidate) < rank(known) {
                *known = candidate;
            }
        }
    }
    let last_resort = endpoints.values().all(|candidate| candidate.terminating);
    let mut wanted: Vec<_> = endpoints
        .into_values()
        .filter(|candidate| last_resort || !candidate.terminating)
        .map(|c| Wanted {
            name: c.name.clone(),
            address: c.address.into(),
            near: c.near,
            tier: c.tier,
        })
        .collect();
    wanted.sort_unstable_by(|a, b| (&a.name, &a.address).cmp(&(&b.name, &b.address)));
    let misfit = misfit.filter(|_| !fits).cloned();
    Union { wanted, left_out: left_out.cloned(), misfit }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{endpoint, named, one_port, rules, slice_of};
    use super::*;

    /// Name and address of each endpoint.
    fn found(slices: &[EndpointSlice], rules: &Rules) -> Vec<String> {
        let extracts: Vec<_> = slices.iter().map(|s| slice(s, rules)).collect();
        let Union { wanted, .. } = union(extracts.iter());
        wanted.iter().map(|w| format!("{} {}", w.name, w.address)).collect()
    }

    #[test]
    fn conditions_say_who_serves_and_nothing_said_means_yes() {
        let endpoints = json!([
            endpoint("10.0.0.1", "said-nothing", json!({})),
            endpoint("10.0.0.2", "serves", json!({"ready": true, "serving": true})),
            // As with publishNotReadyAddresses.
            endpoint("10.0.0.3", "published-only", json!({"ready": true, "serving": false})),
            endpoint("10.0.0.4", "of-old", json!({"ready": false})),
            endpoint(
                "10.0.0.5",
                "goes",
                json!({"ready": true, "serving": true, "terminating": true})
            ),
        ]);
        let slices = [slice_of("IPv4", one_port(), endpoints)];
        assert_eq!(
            found(&slices, &rules()),
            ["said-nothing 10.0.0.1:8080", "serves 10.0.0.2:8080"]
        );
    }

    #[test]
    fn endpoints_that_go_are_better_than_none() {
        let goes = |serving: bool| json!({"serving": serving, "terminating": true});
        let endpoints =
            json!([endpoint("10.0.0.1", "a", goes(true)), endpoint("10.0.0.2", "b", goes(false)),]);
        let slices = [slice_of("IPv4", one_port(), endpoints)];
        assert_eq!(found(&slices, &rules()), ["a 10.0.0.1:8080"]);
    }

    #[test]
    fn slices_are_one_set_in_a_stable_order_whatever_their_own() {
        let a = slice_of(
            "IPv4",
            one_port(),
            json!([endpoint("10.0.0.2", "b", json!({})), endpoint("10.0.0.1", "a", json!({}))]),
        );
        let b = slice_of("IPv4", one_port(), json!([endpoint("10.0.0.3", "c", json!({}))]));
        let all = ["a 10.0.0.1:8080", "b 10.0.0.2:8080", "c 10.0.0.3:8080"];
        assert_eq!(found(&[a.clone(), b.clone()], &rules()), all);
        assert_eq!(found(&[b, a], &rules()), all);
    }

    #[test]
    fn an_endpoint_in_two_slices_counts_once_and_the_one_that_stays_wins() {
        let goes = json!({"terminating": true});
        let old = slice_of("IPv4", one_port(), json!([endpoint("10.0.0.1", "a", goes)]));
        let new = slice_of("IPv4", one_port(), json!([endpoint("10.0.0.1", "a", json!({}))]));
        for slices in [[old.clone(), new.clone()], [new, old]] {
            assert_eq!(found(&slices, &rules()), ["a 10.0.0.1:8080"]);
        }
    }

    #[test]
    fn what_is_no_pod_is_known_by_its_address_and_port() {
        // As of a Service without a selector, for servers outside of the cluster.
        let endpoints = json!([{"addresses": ["192.0.2.1"]}]);
        let second = json!([{"name": "chronos", "port": 8081, "protocol": "TCP"}]);
        let slices = [
            slice_of("IPv4", one_port(), endpoints.clone()),
            slice_of("IPv4", second, endpoints.clone()),
            slice_of("IPv4", one_port(), endpoints),
        ];
        let both = ["192.0.2.1:8080 192.0.2.1:8080", "192.0.2.1:8081 192.0.2.1:8081"];
        assert_eq!(found(&slices, &rules()), both);
    }

    #[test]
    fn a_pod_with_two_families_is_one_endpoint_and_names_are_passed_over() {
        let four = slice_of("IPv4", one_port(), json!([endpoint("10.0.0.1", "a", json!({}))]));
        let six = slice_of(
            "IPv6",
            one_port(),
            json!([endpoint("fd00::1", "a", json!({})), endpoint("fd00::2", "b", json!({}))]),
        );
        let name = slice_of("FQDN", one_port(), json!([endpoint("db.example", "c", json!({}))]));
        assert_eq!(found(&[six, four, name], &rules()), ["a 10.0.0.1:8080", "b [fd00::2]:8080"]);
    }

    #[test]
    fn ports_are_chosen_by_name_in_each_slice_or_by_number_or_as_the_only_one() {
        let both = |client, peer| {
            json!([{"name": "client", "port": client}, {"name": "peer", "port": peer},
                   {"name": "client", "port": 53, "protocol": "UDP"}])
        };
        let a = slice_of("IPv4", both(8080, 7000), json!([endpoint("10.0.0.1", "a", json!({}))]));
        let b = slice_of("IPv4", both(9090, 7000), json!([endpoint("10.0.0.2", "b", json!({}))]));
        let slices = [a, b];
        assert_eq!(found(&slices, &named("client")), ["a 10.0.0.1:8080", "b 10.0.0.2:9090"]);
        assert_eq!(found(&slices, &named("1234")), ["a 10.0.0.1:1234", "b 10.0.0.2:1234"]);
        for (rules, part) in [(named("sql"), "\"sql\""), (rules(), "AEGIS_KUBE_PORT")] {
            let extract = slice(&slices[0], &rules);
            let Union { wanted, left_out, misfit } = union([&extract].into_iter());
            assert_eq!(wanted.len(), 0);
            assert_eq!(left_out, misfit);
            let trouble = misfit.unwrap();
            assert!(trouble.contains(part) && trouble.contains("8080 (\"client\")"), "{trouble}");
        }
    }

    #[test]
    fn near_is_what_hints_say_or_else_where_the_endpoint_is() {
        let mut here = endpoint("10.0.0.1", "here", json!({}));
        (here["nodeName"], here["zone"]) = (json!("n1"), json!("z1"));
        let mut there = endpoint("10.0.0.2", "there", json!({}));
        (there["nodeName"], there["zone"]) = (json!("n2"), json!("z2"));
        let mut hinted = there.clone();
        hinted["targetRef"] = json!({"name": "hinted", "uid": "h"});
        hinted["addresses"] = json!(["10.0.0.3"]);
        hinted["hints"] = json!({"forZones": [{"name": "z1"}], "forNodes": [{"name": "n1"}]});
        let slice_ = slice_of("IPv4", one_port(), json!([here, there, hinted]));
        for (locality, own, near) in [
            (Locality::Zone, true, &["here", "hinted"][..]),
            (Locality::Node, true, &["here", "hinted"]),
            (Locality::Zone, false, &[]),
            (Locality::Off, true, &[]),
        ] {
            let own = |name: &str| own.then(|| name.to_owned());
            let rules = Rules { locality, node: own("n1"), zone: own("z1"), ..rules() };
            let Union { wanted, .. } = union([&slice(&slice_, &rules)].into_iter());
            let found: Vec<_> = wanted.iter().filter(|w| w.near).map(|w| &w.name[..]).collect();
            assert_eq!(found, near, "{locality:?}");
        }
    }

    #[test]
    fn the_zone_comes_first_then_its_region_then_others() {
        let in_zone = |rules: &Rules, zone: Option<&str>| {
            let mut one = endpoint("10.0.0.1", "a", json!({}));
            one["zone"] = json!(zone);
            // Hints do not say where an endpoint is.
            one["hints"] = json!({"forZones": [{"name": "us-east-1a"}]});
            let slice_ = slice_of("IPv4", one_port(), json!([one]));
            usize::from(union([&slice(&slice_, rules)].into_iter()).wanted[0].tier)
        };
        let own = |name: &str| Some(name.to_owned());
        let failover = Rules { locality: Locality::Failover, ..rules() };
        for (region, zone, expected) in [
            ("us-east-1", "us-east-1a", [0, 1, 2, 2]),
            ("us-central1", "us-central1-a", [0, 1, 2, 2]),
        ] {
            let rules = Rules { region: own(region), zone: own(zone), ..failover.clone() };
            let next = format!("{}z", &zone[..zone.len() - 1]);
            let zones = [Some(zone), Some(&next[..]), Some("elsewhere-a"), None];
            assert_eq!(zones.map(|zone| in_zone(&rules, zone)), expected, "{region}");
        }
        let near = Rules { zone: own("z"), locality: Locality::Zone, ..rules() };
        assert_eq!(in_zone(&near, Some("elsewhere")), 0, "no strict order");
        assert_eq!(in_zone(&failover, Some("z")), 2, "it is not known where this runs");
        for (zone, region, expected) in [
            ("eastus-1", "eastus", true),
            ("eastus2-1", "eastus", false),
            ("us-east-1a", "us-east-1", true),
            ("us-east-10a", "us-east-1", false),
            ("us-west-2-lax-1a", "us-west-2", true),
            ("us-east-1", "us-east-1", false),
        ] {
            assert_eq!(is_zone_of(zone, region), expected, "{zone} of {region}");
        }
    }

    #[test]
    fn a_pod_says_its_region_itself() {
        let pod_in = |zone: &str, region: &str| -> Pod {
            let labels = json!({ZONE_LABEL: zone, REGION_LABEL: region});
            serde_json::from_value(json!({
                "metadata": {"name": "a", "uid": "a", "labels": labels},
                "spec": {"containers": [{"name": "c", "ports": [{"containerPort": 8080}]}]},
                "status": {"phase": "Running", "podIP": "10.0.0.1",
                           "conditions": [{"type": "Ready", "status": "True"}]},
            }))
            .unwrap()
        };
        let [zone, region] = ["z1", "here"].map(|name| Some(name.to_owned()));
        let rules = Rules { locality: Locality::Failover, zone, region, ..rules() };
        for (zone, region, expected) in
            [("z1", "here", 0), ("z2", "here", 1), ("here-a", "there", 2)]
        {
            let extract = pod(&pod_in(zone, region), &rules);
            let tier = union([&extract].into_iter()).wanted[0].tier;
            assert_eq!(usize::from(tier), expected, "{zone} in {region}");
        }
    }

    #[test]
    fn pods_serve_while_they_run_and_are_ready() {
        let pod_of = |name: &str, phase: &str, ready: &str, deleted: bool| -> Pod {
            let deleted = deleted.then_some("2026-01-01T00:00:00Z");
            serde_json::from_value(json!({
                "metadata": {"name": name, "uid": name, "deletionTimestamp": deleted},
                "spec": {"containers": [{"name": "c", "ports": [
                    {"name": "chronos", "containerPort": 8080}, {"name": "m", "containerPort": 9}]}]},
                "status": {"phase": phase, "podIP": "10.0.0.1",
                           "conditions": [{"type": "Ready", "status": ready}]},
            }))
            .unwrap()
        };
        for (phase, ready, deleted, expected) in [
            ("Running", "True", false, true),
            ("Running", "False", false, false),
            ("Pending", "True", false, false),
            ("Running", "True", true, false),
        ] {
            let other = pod(&pod_of("other", "Running", "True", false), &named("chronos"));
            let extract = pod(&pod_of("a", phase, ready, deleted), &named("chronos"));
            let Union { wanted, .. } = union([&other, &extract].into_iter());
            assert_eq!(wanted.iter().any(|w| w.name == "a"), expected, "{phase} {ready} {deleted}");
            assert!(wanted.iter().all(|w| w.address.tcp().unwrap().port() == 8080));
        }
    }
}
