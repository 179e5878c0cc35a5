//! Placement: weighted rendezvous hashing over the failure-domain tree. Pure; only the monitors
//! call [`place`] and [`assign_from`].
//!
//! Every OSD draws `-ln(u) / weight` for a group, `u` being a hash of group and OSD; the smallest
//! draws win, at most one per failure domain. The smallest of several exponential draws is again
//! exponential with the sum of their weights, so this picks domains (racks, hosts) in proportion to
//! the weight inside them and then an OSD inside by its own weight, without walking the tree.
//!
//! Invariants: the result depends on nothing but its arguments, bit for bit on every machine (only
//! IEEE basic operations, no library logarithm); whether an OSD is up plays no part; one OSD more or
//! less changes at most one member of each group, and that member is the OSD in question or its
//! stand-in. When the tree has fewer domains than the pool wants members, groups come out short.

use crate::ids::*;
use crate::map::{FailureDomain, OsdInfo, Pool, Redundancy};
use std::collections::{BTreeMap, HashMap};

/// A 64-bit mix (splitmix64's finalizer) used for every placement hash.
pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The group, below `pg_count`, of object `index` of a root volume.
pub fn pg_index(volume: VolumeId, index: u32, pg_count: u32) -> u32 {
    (mix(mix(volume.0) ^ u64::from(index)) % u64::from(pg_count.max(1))) as u32
}

/// The ordered OSDs that should hold `pg`: up to `width` of those that are in, no two in one
/// failure domain. Fewer when the tree has fewer domains.
pub fn place(pg: PgId, width: usize, domain: FailureDomain, osds: &BTreeMap<OsdId, OsdInfo>) -> Vec<OsdId> {
    pick(pg, width, &candidates(domain, osds))
}

/// The up sets of all groups of a pool, by group index, as if placed for the first time.
pub fn assign(pool: &Pool, pool_id: PoolId, osds: &BTreeMap<OsdId, OsdInfo>) -> Vec<Vec<OsdId>> {
    assign_from(pool, pool_id, osds, &[])
}

/// The up sets of all groups of a pool, by group index, primary first, given the up sets that are
/// in force (`current`, by group index; empty when there are none).
///
/// Members are those of [`place`]. Replicated: primaries stay where they are unless that leaves
/// them out of proportion to the weights. Erasure coded: a member that stays keeps its shard
/// number, so the first place is not balanced, and a place that nobody takes is
/// [`OsdId::NONE`].
pub fn assign_from(
    pool: &Pool,
    pool_id: PoolId,
    osds: &BTreeMap<OsdId, OsdInfo>,
    current: &[Vec<OsdId>],
) -> Vec<Vec<OsdId>> {
    assign_within(pool, pool_id, osds, current, pool.pg_count)
}

/// The same, with groups from number `places` on where those are whose number is the same modulo `places`: they were divided from
/// them and stay there for now.
pub fn assign_within(
    pool: &Pool,
    pool_id: PoolId,
    osds: &BTreeMap<OsdId, OsdInfo>,
    current: &[Vec<OsdId>],
    places: u32,
) -> Vec<Vec<OsdId>> {
    let candidates = candidates(pool.failure_domain, osds);
    let width = pool.redundancy.width();
    let mut sets: Vec<Vec<OsdId>> = (0..pool.pg_count)
        .map(|index| {
            let place = PgId { pool: pool_id, index: index % places.max(1) };
            let new = pick(place, width, &candidates);
            match (pool.redundancy, current.get(index as usize)) {
                (Redundancy::Replicated { .. }, Some(old)) => keep_order(old, new),
                (Redundancy::Replicated { .. }, None) => new,
                (Redundancy::Erasure { .. }, old) => {
                    keep_positions(old.map_or(&[][..], Vec::as_slice), &new, width)
                }
            }
        })
        .collect();
    if let Redundancy::Replicated { .. } = pool.redundancy {
        balance_primaries(&mut sets, osds);
    }
    sets
}

/// `new`, with every member that was in `old` at its old position and newcomers in the free ones;
/// exactly `width` long, holes are [`OsdId::NONE`].
pub fn keep_positions(old: &[OsdId], new: &[OsdId], width: usize) -> Vec<OsdId> {
    let mut out = vec![OsdId::NONE; width];
    for (slot, member) in out.iter_mut().zip(old) {
        if new.contains(member) {
            *slot = *member;
        }
    }
    for member in new {
        if !out.contains(member) {
            // `new` is no longer than `width`, so a slot is free unless the caller breaks that.
            let Some(slot) = out.iter_mut().find(|o| **o == OsdId::NONE) else { break };
            *slot = *member;
        }
    }
    out
}

/// One OSD that may be chosen.
struct Candidate {
    osd: OsdId,
    /// Failure domains, numbered.
    domain: u32,
    hash: u64,
    weight: f64,
}

fn candidates(domain: FailureDomain, osds: &BTreeMap<OsdId, OsdInfo>) -> Vec<Candidate> {
    let mut numbers: HashMap<&str, u32> = HashMap::new();
    osds.iter()
        .filter(|(_, info)| info.in_cluster && info.weight > 0)
        .map(|(osd, info)| {
            let name = match domain {
                FailureDomain::Osd => None,
                FailureDomain::Host => Some(info.host.as_str()),
                FailureDomain::Rack => Some(info.rack.as_str()),
            };
            let domain = match name {
                None => osd.0,
                Some(name) => {
                    let next = numbers.len() as u32;
                    *numbers.entry(name).or_insert(next)
                }
            };
            Candidate { osd: *osd, domain, hash: mix(u64::from(osd.0)), weight: f64::from(info.weight) }
        })
        .collect()
}

/// The `width` best domains' best OSDs, best first.
fn pick(pg: PgId, width: usize, candidates: &[Candidate]) -> Vec<OsdId> {
    let seed = mix(u64::from(pg.pool.0) << 32 | u64::from(pg.index));
    // The best domains so far with the best draw in each. A domain that falls off the end can only
    // come back with a better draw, because those before it only ever improve.
    let mut best: Vec<(f64, &Candidate)> = Vec::with_capacity(width + 1);
    for c in candidates {
        let draw = neg_ln(mix(seed ^ c.hash)) / c.weight;
        let before = |other: &(f64, &Candidate)| (other.0, other.1.osd) < (draw, c.osd);
        if best.len() == width && best.last().is_none_or(before) {
            continue;
        }
        if let Some(at) = best.iter().position(|b| b.1.domain == c.domain) {
            if before(&best[at]) {
                continue;
            }
            best.remove(at);
        }
        let at = best.partition_point(before);
        best.insert(at, (draw, c));
        best.truncate(width);
    }
    best.into_iter().map(|(_, c)| c.osd).collect()
}

/// `-ln(u)` for `u` made of the upper 53 bits of `hash`, in (0, 1). Series of the inverse
/// hyperbolic tangent, from additions, multiplications and divisions only: those are exact by
/// IEEE 754, while a library's logarithm differs between machines.
fn neg_ln(hash: u64) -> f64 {
    const SQRT_2: f64 = std::f64::consts::SQRT_2;
    // At most 54 significant bits below 2^54: odd, so never 0 and never the whole.
    let n = (hash >> 11) * 2 + 1;
    let bits = 63 - n.leading_zeros();
    let mut mantissa = n as f64 / (1u64 << bits) as f64;
    let mut exponent = f64::from(bits) - 54.0;
    if mantissa > SQRT_2 {
        mantissa /= 2.0;
        exponent += 1.0;
    }
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    // |s| < 0.172, so terms from s^19 on are below 2^-48 of the first.
    let mut sum = 0.0;
    for odd in (1..=17u32).rev().step_by(2) {
        sum = sum * square + 1.0 / f64::from(odd);
    }
    let ln = exponent * std::f64::consts::LN_2 + 2.0 * s * sum;
    // 2^54 - 1 rounds to 2^54 as a float; the draw must still be above zero.
    (-ln).max(f64::MIN_POSITIVE)
}

/// `new`, in the order of `old` where possible: its primary first, and unchanged when the members
/// are the same.
fn keep_order(old: &[OsdId], mut new: Vec<OsdId>) -> Vec<OsdId> {
    if old.len() == new.len() && new.iter().all(|o| old.contains(o)) {
        return old.to_vec();
    }
    if let Some(at) = old.first().and_then(|primary| new.iter().position(|o| o == primary)) {
        new[..=at].rotate_right(1);
    }
    new
}

/// Swaps primaries until no single swap brings two OSDs' counts closer to their weights. Each swap
/// lowers the sum of `count * (count + 1) / weight`, so this ends.
fn balance_primaries(sets: &mut [Vec<OsdId>], osds: &BTreeMap<OsdId, OsdInfo>) {
    let mut counts: HashMap<OsdId, u64> = HashMap::new();
    for primary in sets.iter().filter_map(|s| s.first()) {
        *counts.entry(*primary).or_default() += 1;
    }
    let weight = |osd: &OsdId| osds.get(osd).map_or(1, |info| u64::from(info.weight.max(1)));
    let count = |counts: &HashMap<OsdId, u64>, osd: &OsdId| counts.get(osd).copied().unwrap_or(0);
    loop {
        let mut swapped = false;
        for set in sets.iter_mut().filter(|s| s.len() > 1) {
            let load = |osd: &OsdId, extra: u64| (count(&counts, osd) + extra, weight(osd));
            // The member that would be least loaded as primary; the first of equals.
            let least = (1..set.len())
                .reduce(|a, b| if less(load(&set[b], 1), load(&set[a], 1)) { b } else { a })
                .expect("at least two members");
            if less(load(&set[least], 1), load(&set[0], 0)) {
                *counts.entry(set[0]).or_default() -= 1;
                *counts.entry(set[least]).or_default() += 1;
                set.swap(0, least);
                swapped = true;
            }
        }
        if !swapped {
            return;
        }
    }
}

/// Whether `a.0 / a.1 < b.0 / b.1`.
fn less(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 * b.1 < b.0 * a.1
}
