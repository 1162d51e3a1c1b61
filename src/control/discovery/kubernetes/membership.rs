//! Who shares the keys: the declared stores, by the `StatefulSet` that they are the pods of.

use std::collections::{BTreeSet, HashMap};
use std::num::NonZeroUsize;

use super::convert::Extract;
use super::known::Weight;
use super::objects::StatefulSet;
use crate::control::discovery::{Declared, Wanted};
use crate::limits::ENDPOINTS_MAX;

/// What is known of a `StatefulSet`: which ordinals its pods have, and its governing Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ordinals {
    first: i32,
    count: i32,
    service: Option<String>,
}

impl Weight for Ordinals {
    fn weight(&self) -> usize {
        size_of::<Self>() + self.service.as_ref().map_or(0, String::len)
    }
}

/// Reads a `StatefulSet`. What is declared counts, whatever of it is there.
pub(super) fn ordinals(set: &StatefulSet) -> Ordinals {
    let spec = set.spec.as_ref();
    Ordinals {
        first: spec.and_then(|spec| spec.ordinals.as_ref()?.start).unwrap_or(0).max(0),
        count: spec.and_then(|spec| spec.replicas).unwrap_or(1).max(0),
        service: spec.and_then(|spec| spec.service_name.clone()),
    }
}

/// The name of the `StatefulSet` that a pod of this name would belong to.
fn set_of(pod: &str) -> Option<&str> {
    let (set, ordinal) = pod.rsplit_once('-')?;
    let canonical = ordinal == "0" || !ordinal.starts_with('0');
    (canonical && ordinal.parse::<u32>().is_ok()).then_some(set)
}

/// All stores that share the keys.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Membership {
    /// The `StatefulSet` that they are of.
    pub set: String,
    /// The names of its pods.
    pub names: Vec<String>,
}

/// All stores: the ordinals of the one `StatefulSet` that the pods are of, as many as `count` says, or
/// else as `sets` say. It is the `last` one where no pod is there, or the one that `service` governs.
///
/// # Errors
/// Why they are not known, and what to do about it.
pub(super) fn stores<'a>(
    all: impl Iterator<Item = &'a Extract>,
    last: Option<&str>,
    count: Option<NonZeroUsize>,
    sets: Result<&HashMap<String, Ordinals>, &str>,
    service: Option<&str>,
) -> Result<Membership, String> {
    let mut names = BTreeSet::new();
    for pod in all.flat_map(|extract| &extract.pods) {
        names.insert(set_of(pod).ok_or_else(|| {
            format!(
                "pod {pod:?} is not of a StatefulSet, so nobody can say whose keys it holds: \
                 AEGIS_BALANCE=key_hash needs a StatefulSet, other ways of balancing do not"
            )
        })?);
    }
    if names.len() > 1 {
        let names: Vec<_> = names.into_iter().collect();
        let names = names.join(", ");
        return Err(format!(
            "the pods are of several StatefulSets ({names}): AEGIS_KUBE_SERVICE or \
             AEGIS_KUBE_SELECTOR has to name those of one"
        ));
    }
    let seen = names.first().copied().or(last);
    let unseen = || "no pod has been seen yet, whose name would tell its StatefulSet".to_owned();
    if let Some(count) = count {
        return Ok(Membership::new(seen.ok_or_else(unseen)?, 0, count.get()));
    }
    let sets = sets.map_err(str::to_owned)?;
    let governed = sets.iter().filter(|(_, set)| set.service.as_deref() == service);
    let (name, set) = match (seen, &governed.collect::<Vec<_>>()[..]) {
        (Some(name), _) => sets.get_key_value(name).ok_or_else(|| {
            format!(
                "there is no StatefulSet {name:?} whose replicas would tell how many stores there \
                 are: AEGIS_KUBE_STORES can say it"
            )
        })?,
        (None, &[governed]) if service.is_some() => governed,
        (None, _) => return Err(unseen()),
    };
    let count = usize::try_from(set.count).unwrap_or(0);
    if count > ENDPOINTS_MAX {
        return Err(format!(
            "StatefulSet {name:?} has {count} replicas, and {ENDPOINTS_MAX} at most can be served"
        ));
    }
    Ok(Membership::new(name, set.first, count))
}

impl Membership {
    /// Those that shared the keys when a former run ended; none if nobody did.
    pub(super) fn of_former_run(stores: &[Declared]) -> Option<Self> {
        let names: Vec<_> = stores.iter().map(|store| store.name.clone()).collect();
        let set = set_of(names.first()?)?.to_owned();
        Some(Self { set, names })
    }

    fn new(set: &str, first: i32, count: usize) -> Self {
        // The API allows the largest number there is as the first one.
        let names =
            (i64::from(first)..).take(count).map(|ordinal| format!("{set}-{ordinal}")).collect();
        Self { set: set.to_owned(), names }
    }
}

/// The stores of these names, with where they are.
pub(super) fn declare(stores: &[String], wanted: &[Wanted]) -> Vec<Declared> {
    let place = |name: &String| {
        let mut found = wanted.iter().filter(|wanted| wanted.name == *name);
        // Of a pod that was replaced, or whose address another one has by now, a slice may not know
        // yet.
        let one = match (found.next(), found.next()) {
            (None, _) => return Err(None),
            (Some(one), None) => one,
            (Some(_), Some(_)) => return Err(Some("two pods have its name".to_owned())),
        };
        match wanted.iter().find(|other| other.address == one.address && other.name != one.name) {
            None => Ok(one.address.clone()),
            Some(other) => Err(Some(format!("its address is also that of {}", other.name))),
        }
    };
    stores.iter().map(|name| Declared { name: name.clone(), address: place(name) }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::convert::slice;
    use super::super::testing::{endpoint, one_port, rules, slice_of};
    use super::*;

    fn set(replicas: Value, start: i32, service: &str) -> Ordinals {
        let spec = json!({
            "replicas": replicas, "ordinals": {"start": start}, "serviceName": service,
            "selector": {}, "template": {},
        });
        ordinals(&serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap())
    }

    #[test]
    fn stores_are_the_ordinals_of_a_stateful_set_whoever_is_there() {
        let sets = [
            ("chronos", set(json!(3), 0, "db")),
            ("other", set(json!(null), 5, "others")),
            ("none", set(json!(0), 0, "db")),
            ("many", set(json!(5000), 0, "many")),
            ("last", set(json!(2), i32::MAX, "last")),
        ];
        let sets: HashMap<_, _> = sets.map(|(name, set)| (name.to_owned(), set)).into();
        let away = json!({"ready": false, "serving": false});
        let seen = |pods: &[&str]| {
            let pods: Vec<_> =
                pods.iter().map(|pod| endpoint("10.0.0.1", pod, away.clone())).collect();
            slice(&slice_of("IPv4", one_port(), json!(pods)), &rules())
        };
        let found = |pods: &[&str], count: Option<usize>, service| {
            let count = count.and_then(NonZeroUsize::new);
            stores([seen(pods)].iter(), None, count, Ok(&sets), service).map(|found| found.names)
        };
        let three = ["chronos-0", "chronos-1", "chronos-2"].map(str::to_owned).to_vec();
        assert_eq!(found(&["chronos-1"], None, None), Ok(three.clone()), "one that is not ready");
        assert_eq!(
            found(&["chronos-7", "chronos-0"], None, None),
            Ok(three.clone()),
            "scaled down"
        );
        assert_eq!(
            found(&["other-5"], None, None),
            Ok(vec!["other-5".to_owned()]),
            "ordinals.start"
        );
        let last = ["last-2147483647", "last-2147483648"].map(str::to_owned).to_vec();
        assert_eq!(
            found(&["last-2147483647"], None, None),
            Ok(last),
            "the last number is the first"
        );
        assert_eq!(found(&["none-0"], None, None), Ok(Vec::new()));
        assert_eq!(found(&["chronos-1"], Some(2), None), Ok(three[..2].to_vec()), "as configured");
        assert_eq!(found(&["any-thing-3"], Some(1), None), Ok(vec!["any-thing-0".to_owned()]));
        assert_eq!(
            found(&[], None, Some("others")),
            Ok(vec!["other-5".to_owned()]),
            "by its Service"
        );

        for (pods, count, part) in [
            (&["web-5d8f7c9b-x2x4z"][..], Some(3), "is not of a StatefulSet"),
            (&["web-5d8f7c9b-00123"], Some(3), "is not of a StatefulSet"),
            (&["web-5d8f7c9b-24567"], None, "no StatefulSet \"web-5d8f7c9b\""),
            (&["chronos-0", "other-5"], Some(3), "several StatefulSets (chronos, other)"),
            (&[], Some(3), "no pod has been seen yet"),
            (&[], None, "no pod has been seen yet"),
            (&["many-0"], None, "1024 at most"),
        ] {
            let why = found(pods, count, Some("db")).unwrap_err();
            assert!(why.contains(part), "{pods:?}: {why}");
        }
        let unread = stores([seen(&["chronos-0"])].iter(), None, None, Err("forbidden"), None);
        assert_eq!(unread, Err("forbidden".to_owned()));
        for count in [None, NonZeroUsize::new(3)] {
            let last = stores([].iter(), Some("chronos"), count, Ok(&sets), None).unwrap();
            assert_eq!(last.names, three, "none of its pods is there now");
        }
    }

    #[test]
    fn a_store_is_where_the_one_pod_of_its_name_serves() {
        let names = ["a-0", "a-1", "a-2", "a-3"].map(str::to_owned);
        let at = |name, address: &str| {
            Wanted::new(name, address.parse::<crate::io::net::Address>().unwrap())
        };
        let wanted = [
            at("a-0", "10.0.0.1:1"),
            at("a-2", "10.0.0.2:1"),
            at("a-2", "10.0.0.3:1"),
            at("a-9", "10.0.0.4:1"),
            at("a-3", "10.0.0.5:1"),
            at("a-4", "10.0.0.5:1"),
        ];
        let places: Vec<_> =
            declare(&names, &wanted).into_iter().map(|store| store.address).collect();
        let twice = Err(Some("two pods have its name".to_owned()));
        let shared = Err(Some("its address is also that of a-4".to_owned()));
        assert_eq!(places, [Ok("10.0.0.1:1".parse().unwrap()), Err(None), twice, shared]);
    }
}
