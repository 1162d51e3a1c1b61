//! Which endpoint holds a key: rendezvous hashing, so every worker and every sidecar agrees.
//!
//! Only names and keys count, never health or order: a key belongs to one store, and to ask another
//! one while it is away would give a wrong answer.

/// The hash of an endpoint's name or of a key. Its values are a contract between sidecars of
/// different versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StableHash(u64);

impl StableHash {
    /// Hashes text as the server sees it: each sequence that is not UTF-8 counts as U+FFFD.
    pub fn of(text: &[u8]) -> Self {
        const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
        let mut hash = OFFSET;
        for chunk in text.utf8_chunks() {
            hash = fnv1a(hash, chunk.valid().as_bytes());
            if !chunk.invalid().is_empty() {
                hash = fnv1a(hash, "\u{fffd}".as_bytes());
            }
        }
        Self(mix(hash))
    }
}

fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    const PRIME: u64 = 0x0100_0000_01b3;
    bytes.iter().fold(hash, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}

/// Spreads every bit over all others (the finalizer of `SplitMix64`).
fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// The index of the endpoint that holds `key`, among the hashes of the endpoints' names. Of equal
/// scores the greater name hash wins, so the order of the names does not matter.
pub fn owner(key: StableHash, names: &[StableHash]) -> Option<usize> {
    let score = |name: StableHash| (mix(key.0 ^ name.0.rotate_left(32)), name.0);
    (0..names.len()).max_by_key(|&index| score(names[index]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: usize = 20_000;

    fn names(count: usize) -> Vec<StableHash> {
        (0..count).map(|i| StableHash::of(format!("chronos-{i}").as_bytes())).collect()
    }

    fn key(i: usize) -> StableHash {
        StableHash::of(format!("key:{i}").as_bytes())
    }

    #[test]
    fn no_endpoint_owns_nothing() {
        assert_eq!(owner(key(1), &[]), None);
    }

    #[test]
    fn keys_spread_evenly() {
        let names = names(5);
        let mut counts = [0; 5];
        (0..KEYS).for_each(|i| counts[owner(key(i), &names).unwrap()] += 1);
        assert!(counts.iter().all(|count| (3_600..4_400).contains(count)), "{counts:?}");
    }

    #[test]
    fn a_new_endpoint_takes_its_share_and_moves_nothing_else() {
        let (before, after) = (names(4), names(5));
        let mut moved = 0;
        for i in 0..KEYS {
            let (old, new) = (owner(key(i), &before), owner(key(i), &after));
            if old != new {
                assert_eq!(new, Some(4));
                moved += 1;
            }
        }
        assert!((3_600..4_400).contains(&moved), "{moved}");
    }

    #[test]
    fn the_order_of_endpoints_does_not_matter() {
        let names = names(7);
        let mut reversed = names.clone();
        reversed.reverse();
        for i in 0..1_000 {
            let found = owner(key(i), &names).map(|index| names[index]);
            assert_eq!(found, owner(key(i), &reversed).map(|index| reversed[index]));
        }
    }

    #[test]
    fn owners_stay_the_same_from_version_to_version() {
        let owners: Vec<_> = (0..10).filter_map(|i| owner(key(i), &names(5))).collect();
        assert_eq!(owners, [1, 2, 1, 0, 3, 2, 4, 3, 4, 0]);
    }

    #[test]
    fn keys_that_the_server_takes_for_one_have_one_owner() {
        assert_eq!(StableHash::of(b"a\xffb"), StableHash::of(b"a\xfeb"));
        assert_eq!(StableHash::of(b"a\xffb"), StableHash::of("a\u{fffd}b".as_bytes()));
        assert_ne!(StableHash::of(b"ab"), StableHash::of(b"ba"));
    }
}
