use crate::samples::{pool, tree};
use gabion_proto::ids::*;
use gabion_proto::map::*;
use gabion_proto::placement::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const UNIT: u32 = 65_536;
const DOMAINS: [FailureDomain; 3] = [FailureDomain::Osd, FailureDomain::Host, FailureDomain::Rack];

fn domain_of(osd: OsdId, domain: FailureDomain, osds: &BTreeMap<OsdId, OsdInfo>) -> String {
    match domain {
        FailureDomain::Osd => osd.to_string(),
        FailureDomain::Host => osds[&osd].host.clone(),
        FailureDomain::Rack => osds[&osd].rack.clone(),
    }
}

fn usable(info: &OsdInfo) -> bool {
    info.in_cluster && info.weight > 0
}

fn primaries(sets: &[Vec<OsdId>]) -> BTreeMap<OsdId, i64> {
    let mut out = BTreeMap::new();
    for set in sets {
        *out.entry(set[0]).or_insert(0) += 1;
    }
    out
}

proptest! {
    #![proptest_config(crate::config(64))]

    #[test]
    fn groups_are_as_wide_as_the_tree_allows_and_share_no_domain(
        hosts in 1u32..7, per_host in 1u32..4, width in 1usize..6, domain in 0usize..3,
        out in any::<u64>(), weightless in any::<u64>(), down in any::<u64>(), pool in any::<u32>(),
    ) {
        let domain = DOMAINS[domain];
        let mut osds = tree(hosts, per_host, |i| if weightless >> i & 3 == 3 { 0 } else { UNIT });
        for (id, info) in &mut osds {
            info.in_cluster = out >> id.0 & 3 != 3;
        }
        let domains: BTreeSet<String> = osds
            .iter()
            .filter(|(_, i)| usable(i))
            .map(|(o, _)| domain_of(*o, domain, &osds))
            .collect();
        for index in 0..40 {
            let pg = PgId { pool: PoolId(pool), index };
            let set = place(pg, width, domain, &osds);
            prop_assert_eq!(set.len(), width.min(domains.len()));
            let used: BTreeSet<String> = set.iter().map(|o| domain_of(*o, domain, &osds)).collect();
            prop_assert_eq!(used.len(), set.len());
            prop_assert!(set.iter().all(|o| usable(&osds[o])));
            // Whether an OSD is up plays no part, and the same input gives the same result.
            let mut other = osds.clone();
            for (id, info) in &mut other {
                info.up = down >> id.0 & 1 == 0;
            }
            prop_assert_eq!(place(pg, width, domain, &other), set);
        }
    }

    #[test]
    fn shares_follow_the_weights(weights in prop::collection::vec(1u32..5, 3..9), pool in any::<u32>()) {
        let osds = tree(weights.len() as u32, 1, |i| weights[i as usize] * UNIT);
        let pgs = 2048;
        let mut counts = vec![0f64; weights.len()];
        for index in 0..pgs {
            let set = place(PgId { pool: PoolId(pool), index }, 1, FailureDomain::Host, &osds);
            counts[set[0].0 as usize] += 1.0;
        }
        let total: u32 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(&weights) {
            let want = f64::from(pgs) * f64::from(*weight) / f64::from(total);
            prop_assert!((count - want).abs() < 6.0 * want.sqrt(), "{counts:?} for {weights:?}");
        }
    }

    #[test]
    fn copies_and_primaries_are_balanced(
        hosts in 3u32..9, per_host in 1u32..4, pool_id in any::<u32>(),
    ) {
        let osds = tree(hosts, per_host, |_| UNIT);
        let pool = pool(Redundancy::Replicated { size: 3 }, FailureDomain::Host, 256);
        let sets = assign(&pool, PoolId(pool_id), &osds);
        let mut counts = BTreeMap::new();
        for osd in sets.iter().flatten() {
            *counts.entry(*osd).or_insert(0f64) += 1.0;
        }
        let want = 256.0 * 3.0 / osds.len() as f64;
        for id in osds.keys() {
            let got = counts.get(id).copied().unwrap_or(0.0);
            prop_assert!((got - want).abs() < 6.0 * want.sqrt(), "{id} has {got} of {want}");
        }
        let primaries = primaries(&sets);
        prop_assert_eq!(primaries.len(), osds.len());
        let (low, high) = (primaries.values().min().unwrap(), primaries.values().max().unwrap());
        prop_assert!(high - low <= 2, "{primaries:?}");
    }

    #[test]
    fn one_osd_more_or_less_moves_only_what_it_must(
        hosts in 3u32..9, per_host in 1u32..4, domain in 0usize..3, which in any::<u32>(),
        pool_id in any::<u32>(), heavier in any::<bool>(),
    ) {
        let with = tree(hosts, per_host, |i| UNIT * (1 + i % 3));
        let changed = OsdId(which % (hosts * per_host));
        let mut without = with.clone();
        if heavier {
            without.get_mut(&changed).unwrap().weight /= 2;
        } else {
            without.remove(&changed);
        }
        let pool = pool(Redundancy::Replicated { size: 3 }, DOMAINS[domain], 128);
        let before = assign(&pool, PoolId(pool_id), &without);
        let after = assign_from(&pool, PoolId(pool_id), &with, &before);
        for (old, new) in before.iter().zip(&after) {
            let gained: Vec<_> = new.iter().filter(|o| !old.contains(o)).collect();
            let lost = old.iter().filter(|o| !new.contains(o)).count();
            prop_assert!(gained.iter().all(|o| **o == changed), "{old:?} became {new:?}");
            prop_assert!(lost <= gained.len(), "{old:?} became {new:?}");
        }
        // And back: the members are those of before.
        let back = assign_from(&pool, PoolId(pool_id), &without, &after);
        for (old, new) in before.iter().zip(&back) {
            prop_assert_eq!(old.iter().collect::<BTreeSet<_>>(), new.iter().collect::<BTreeSet<_>>());
        }
        // Nothing changes when nothing changed.
        prop_assert_eq!(assign_from(&pool, PoolId(pool_id), &without, &back), back);
    }

    #[test]
    fn shards_keep_their_numbers(
        hosts in 3u32..9, per_host in 1u32..3, which in any::<u32>(), pool_id in any::<u32>(),
    ) {
        let before_osds = tree(hosts, per_host, |_| UNIT);
        let mut after_osds = before_osds.clone();
        let gone = OsdId(which % (hosts * per_host));
        after_osds.get_mut(&gone).unwrap().in_cluster = false;
        let pool = pool(Redundancy::Erasure { k: 4, m: 2 }, FailureDomain::Host, 64);
        let before = assign(&pool, PoolId(pool_id), &before_osds);
        let after = assign_from(&pool, PoolId(pool_id), &after_osds, &before);
        for (old, new) in before.iter().zip(&after) {
            prop_assert_eq!((old.len(), new.len()), (6, 6));
            for (a, b) in old.iter().zip(new) {
                prop_assert!(a == b || *a == gone, "{old:?} became {new:?}");
            }
        }
    }
}

/// Placement must never change between releases: data would move.
#[test]
fn known_places_stay() {
    let osds = tree(6, 2, |i| UNIT * (1 + i % 2));
    let got: Vec<Vec<u32>> = (0..4)
        .map(|index| {
            let pg = PgId { pool: PoolId(3), index };
            place(pg, 3, FailureDomain::Host, &osds).iter().map(|o| o.0).collect()
        })
        .collect();
    assert_eq!(got, KNOWN);
}

/// Computed apart, with another logarithm.
const KNOWN: [[u32; 3]; 4] = [[8, 3, 1], [5, 11, 3], [0, 7, 3], [10, 0, 7]];
