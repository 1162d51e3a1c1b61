//! Where keys say where requests go: each backend is one store, known by its name, with one address.

use super::super::{Declared, Wanted};
use crate::config::Backend;

/// The store that each backend is, and the endpoints of all of them.
pub(super) fn stores(
    hosts: &[Backend],
    known: &[Vec<Wanted>],
    stale: &[bool],
) -> (Vec<Wanted>, Vec<Declared>) {
    let single: Vec<_> = known.iter().map(|wanted| single(wanted)).collect();
    let place = |index: usize| -> Result<&Wanted, Option<String>> {
        let wanted = single[index].clone()?;
        // Addresses are used again: one that is out of date belongs to who has it now.
        let same = |other: &usize| {
            *other != index && single[*other].as_ref().is_ok_and(|w| w.address == wanted.address)
        };
        let rival = (0..hosts.len()).filter(same).find(|&other| stale[index] || !stale[other]);
        match rival {
            None => Ok(wanted),
            Some(rival) => {
                let (address, rival) = (&wanted.address, &hosts[rival]);
                Err(Some(format!("its address {address} is also that of {rival}")))
            }
        }
    };
    let (mut wanted, mut stores) = (Vec::new(), Vec::with_capacity(hosts.len()));
    for (index, host) in hosts.iter().enumerate() {
        let address = place(index).map(|found| {
            wanted.push(found.clone());
            found.address.clone()
        });
        stores.push(Declared { name: host.to_string(), address });
    }
    (wanted, stores)
}

/// The one address of a store. One of each family is one server, reached by IPv4.
fn single(known: &[Wanted]) -> Result<&Wanted, Option<String>> {
    let mut found: Vec<&Wanted> = known.iter().collect();
    found.sort_unstable_by_key(|wanted| &wanted.address);
    found.dedup_by_key(|wanted| &wanted.address);
    let is_ipv4 = |wanted: &Wanted| wanted.address.tcp().is_some_and(|tcp| tcp.is_ipv4());
    let is_ipv6 = |wanted: &Wanted| wanted.address.tcp().is_some_and(|tcp| tcp.is_ipv6());
    match found[..] {
        [] => Err(None),
        [one] => Ok(one),
        [four, six] if is_ipv4(four) && is_ipv6(six) => Ok(four),
        _ => Err(Some(format!(
            "its name has {} addresses, and a store has one: list the name of each store",
            found.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::backend;
    use super::*;
    use crate::io::net::Address;

    fn at(name: &str, addresses: &[&str]) -> Vec<Wanted> {
        let wanted = |address: &&str| Wanted::new(name, address.parse::<Address>().unwrap());
        addresses.iter().map(wanted).collect()
    }

    #[test]
    fn a_backend_is_one_store_whatever_its_address_is() {
        let hosts = ["a", "b", "c"].map(backend);
        let all = |a: &[&str], b: &[&str], c: &[&str]| [at("a", a), at("b", b), at("c", c)];
        let found = |known: &[Vec<Wanted>], stale: [bool; 3]| {
            let (wanted, stores) = stores(&hosts, known, &stale);
            let names: Vec<_> = stores.iter().map(|store| store.name.clone()).collect();
            assert_eq!(names, ["a:5432", "b:5432", "c:5432"]);
            let placed = stores.iter().filter(|store| store.address.is_ok()).count();
            assert_eq!(wanted.len(), placed);
            stores
                .into_iter()
                .map(|store| match store.address {
                    Ok(address) => address.to_string(),
                    Err(why) => why.unwrap_or_default(),
                })
                .collect::<Vec<_>>()
        };
        let [one, two, three] = ["10.0.0.1:1", "10.0.0.2:1", "[fd00::3]:1"];
        let fresh = [false; 3];
        assert_eq!(found(&all(&[one], &[], &[three]), fresh), [one, "", three]);
        assert_eq!(found(&all(&[one], &[two, three], &[]), fresh), [one, two, ""], "two families");
        let many = "its name has 2 addresses, and a store has one: list the name of each store";
        assert_eq!(found(&all(&[], &[one, two], &[three]), fresh), ["", many, three]);
        let also = |other| format!("its address {one} is also that of {other}:5432");
        let twice = all(&[one], &[one], &[three]);
        assert_eq!(found(&twice, fresh), [&also("b"), &also("a"), three], "whose is it?");
        assert_eq!(
            found(&twice, [true, false, false]),
            [&also("b"), one, three],
            "the newer one's"
        );
        assert_eq!(found(&twice, [true, true, true]), [&also("b"), &also("a"), three]);
    }
}
