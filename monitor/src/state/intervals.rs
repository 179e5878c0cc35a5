//! Up sets, acting sets and intervals of placement groups (rule P1).
//!
//! Invariants: a new interval begins, named by the map's epoch, whenever the acting set, the
//! primary, the incarnation of a member, or the pool's size, min-size or group count changes; an
//! interval that was activated stays in `past` until the group is clean; one that never was is not
//! put there, because it took no writes.

use gabion_proto::ids::*;
use gabion_proto::map::*;
use gabion_proto::placement;
use std::collections::{BTreeMap, BTreeSet};

/// Who is left out of a group's acting set.
pub type Suspects = BTreeMap<PgId, BTreeSet<(OsdId, Incarnation)>>;

/// Brings every group in line with the OSDs and pools of `map`, whose epoch is already the new one;
/// `osds` and `pools` are those of the epoch before. With `placed` up sets are computed again as well: pools that are named there have groups
/// that lie where others do, see `division`.
pub fn recompute(
    map: &mut ClusterMap,
    osds: &BTreeMap<OsdId, OsdInfo>,
    pools: &BTreeMap<PoolId, Pool>,
    suspects: &Suspects,
    placed: Option<&BTreeMap<PoolId, u32>>,
) {
    if let Some(placed) = placed {
        place(map, placed);
    }
    let epoch = map.epoch;
    let none = BTreeSet::new();
    for (id, record) in &mut map.pgs {
        let Some(pool) = map.pools.get(&id.pool) else { continue };
        let suspects = suspects.get(id).unwrap_or(&none);
        let acting = acting(record, pool, &map.osds, suspects);
        let primary = primary(record, pool, &acting);
        let rebooted = acting.iter().any(|o| incarnation(osds, *o) != incarnation(&map.osds, *o));
        let policy = |p: &Pool| (p.redundancy, p.min_size, p.pg_count);
        let same = record.interval != Epoch(0)
            && acting == record.acting
            && primary == record.primary
            && !rebooted
            && pools.get(&id.pool).map(policy) == Some(policy(pool));
        if !same {
            begin_interval(record, epoch, acting, primary);
        }
    }
}

/// Who comes back to an erasure-coded group takes the position that it had, if nobody else needs that one.
fn return_to_places(record: &PgRecord, up: &mut [OsdId]) {
    for from in 0..up.len() {
        // Each swap puts one more OSD in its place.
        while let Some(to) = record
            .place_of(up[from])
            .filter(|to| *to != from && *to < up.len() && record.place_of(up[*to]) != Some(*to))
        {
            up.swap(from, to);
        }
    }
}

fn incarnation(osds: &BTreeMap<OsdId, OsdInfo>, osd: OsdId) -> Option<Incarnation> {
    osds.get(&osd).map(|o| o.incarnation)
}

fn place(map: &mut ClusterMap, placed: &BTreeMap<PoolId, u32>) {
    let pools = &map.pools;
    map.pgs.retain(|id, _| pools.get(&id.pool).is_some_and(|p| id.index < p.pg_count));
    for (pool_id, pool) in pools {
        let ids = (0..pool.pg_count).map(|index| PgId { pool: *pool_id, index });
        let current: Vec<Vec<OsdId>> = match map.pgs.contains_key(&PgId { pool: *pool_id, index: 0 }) {
            true => {
                ids.clone().map(|id| map.pgs.get(&id).map(|r| r.up.clone()).unwrap_or_default()).collect()
            }
            false => Vec::new(),
        };
        let places = placed.get(pool_id).copied().unwrap_or(pool.pg_count);
        let sets = placement::assign_within(pool, *pool_id, &map.osds, &current, places);
        for (id, mut up) in ids.zip(sets) {
            let record = map.pgs.entry(id).or_default();
            if let Redundancy::Erasure { .. } = pool.redundancy {
                return_to_places(record, &mut up);
            }
            if record.up != up {
                record.up = up;
            }
        }
    }
}

/// Earlier primaries of the group that may serve reads under a lease until they have heard of the interval (rule P6).
/// Acting members have: they made its activation durable.
pub fn earlier_primaries(record: &PgRecord) -> BTreeSet<OsdId> {
    record.past.iter().filter_map(|p| p.primary).filter(|o| !record.acting.contains(o)).collect()
}

/// How many of the up set could serve without `suspects`.
pub(super) fn serving(
    record: &PgRecord,
    osds: &BTreeMap<OsdId, OsdInfo>,
    suspects: &BTreeSet<(OsdId, Incarnation)>,
) -> usize {
    record.up.iter().filter(|o| serves(osds, suspects, **o)).count()
}

fn serves(osds: &BTreeMap<OsdId, OsdInfo>, suspects: &BTreeSet<(OsdId, Incarnation)>, osd: OsdId) -> bool {
    osds.get(&osd).is_some_and(|info| info.up && !suspects.contains(&(osd, info.incarnation)))
}

/// The members of the up set that can serve now, primary first.
///
/// The primary is a member of the newest interval that may have data, if one is left: a fresh
/// member would have to fetch everything before it could serve anything.
fn acting(
    record: &PgRecord,
    pool: &Pool,
    osds: &BTreeMap<OsdId, OsdInfo>,
    suspects: &BTreeSet<(OsdId, Incarnation)>,
) -> Vec<OsdId> {
    let serves = |osd: &OsdId| serves(osds, suspects, *osd);
    match pool.redundancy {
        Redundancy::Erasure { .. } => {
            // What an OSD keeps of one shard may be needed: until the group is clean without it, it gets no other one.
            let here = |osd: &OsdId, position| record.place_of(*osd).is_none_or(|p| p == position);
            let can = |osd: &OsdId, position| serves(osd) && here(osd, position);
            let up = record.up.iter().enumerate();
            let mut acting: Vec<OsdId> =
                up.map(|(p, osd)| if can(osd, p) { *osd } else { OsdId::NONE }).collect();
            // Meanwhile whoever has that shard keeps it.
            for p in 0..acting.len() {
                // Not for one that is only down: it will be back in its own place.
                let held_back = acting[p] == OsdId::NONE && record.place_of(record.up[p]) != Some(p);
                let earlier =
                    record.holders().filter_map(|h| h.get(p)).find(|o| can(o, p) && !acting.contains(o));
                if let Some(osd) = earlier.filter(|_| held_back) {
                    acting[p] = *osd;
                }
            }
            acting
        }
        Redundancy::Replicated { .. } => {
            let mut acting: Vec<OsdId> = record.up.iter().copied().filter(serves).collect();
            let holder = record.holders().flatten().find_map(|o| acting.iter().position(|a| a == o));
            if let Some(at) = holder {
                let primary = acting.remove(at);
                acting.insert(0, primary);
            }
            acting
        }
    }
}

/// Who orders writes: the first one; of shards, the first that has data.
fn primary(record: &PgRecord, pool: &Pool, acting: &[OsdId]) -> Option<OsdId> {
    let there = |o: &&OsdId| **o != OsdId::NONE;
    let first = acting.iter().find(there).copied();
    match pool.redundancy {
        Redundancy::Replicated { .. } => first,
        Redundancy::Erasure { .. } => {
            let holds = |o: &&OsdId| record.holders().next().is_some_and(|acting| acting.contains(o));
            // Who is primary stays it: nothing else would be gained by a new interval.
            let stays = record.primary.filter(|o| record.acting == acting && acting.contains(o));
            stays.or_else(|| acting.iter().filter(there).find(holds).copied()).or(first)
        }
    }
}

/// Erasure coding: every acting member of the current interval, which has served nothing, holds its shard of everything that
/// earlier ones left. In each of those it so stands in for `osd`, which had its position and is needed for that shard no more. The intervals
/// themselves stay: they may have taken writes. False when nobody acts in that position.
pub(super) fn stand_in_for(record: &mut PgRecord, osd: OsdId) -> bool {
    let member = record.place_of(osd).and_then(|place| record.acting.get(place)).copied();
    let Some(member) = member.filter(|o| *o != OsdId::NONE && *o != osd) else { return false };
    for past in &mut record.past {
        past.acting.iter_mut().filter(|o| **o == osd).for_each(|o| *o = member);
    }
    forget_repeated(&mut record.past);
    true
}

/// The same members, in an interval of its own.
pub fn begin_again(record: &mut PgRecord, epoch: Epoch) {
    let (acting, primary) = (record.acting.clone(), record.primary);
    begin_interval(record, epoch, acting, primary);
}

/// Groups that are clean in one interval, with the same members, become one. The interval took writes of all of them, so who was active in it for each
/// (see `TxnOp::Combine`) covers it. Their primaries may serve reads until they have heard of the next one.
pub(super) fn merge<'a>(record: &mut PgRecord, others: impl Iterator<Item = &'a PgRecord>) {
    let ended =
        |r: &PgRecord| PastInterval { interval: r.interval, acting: r.acting.clone(), primary: r.primary };
    let mut past = vec![ended(record)];
    past.extend(others.map(ended));
    past.sort_by_key(|p| p.primary);
    past.dedup_by_key(|p| p.primary);
    record.past = past;
    // What follows is a new interval, and this one is in the past already.
    (record.activated, record.clean) = (false, false);
}

/// Of intervals with the same members only the last one counts: to activate it they all had to agree on what the earlier ones
/// left, and earlier primaries knew by then that they were none. This bounds `past` by the member sets there are.
fn forget_repeated(past: &mut Vec<PastInterval>) {
    let mut later: BTreeSet<BTreeSet<OsdId>> = BTreeSet::new();
    past.reverse();
    past.retain(|p| later.insert(members(&p.acting)));
    past.reverse();
}

fn begin_interval(record: &mut PgRecord, epoch: Epoch, acting: Vec<OsdId>, primary: Option<OsdId>) {
    if record.activated {
        let ended = PastInterval {
            interval: record.interval,
            acting: std::mem::take(&mut record.acting),
            primary: record.primary,
        };
        if record.clean {
            // Everything written before is on every member of this one.
            record.past.clear();
        }
        record.past.push(ended);
        forget_repeated(&mut record.past);
    }
    record.interval = epoch;
    record.acting = acting;
    record.primary = primary;
    record.activated = false;
    record.clean = false;
}

fn members(acting: &[OsdId]) -> BTreeSet<OsdId> {
    acting.iter().copied().filter(|o| *o != OsdId::NONE).collect()
}
