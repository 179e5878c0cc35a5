//! Which version each object should have, from what members told. Pure.
//!
//! As for whole copies, the members with the highest activated interval say what there is (rule P3). The newest version that
//! one of them knows is wanted, unless it was *provably never acknowledged*: somebody that was active in the very interval
//! that wrote it lacks it, nobody has committed it, and no later interval was active, in which it might have been
//! shown. Every member then still holds the version before it, and the object goes back to that.

use super::super::peering::Told;
use super::super::*;

/// What the objects that anybody of the authority knows should be. `newest_past`: the newest interval that was active.
pub fn wanted(
    told: &BTreeMap<OsdId, Told>,
    highest: Epoch,
    newest_past: Epoch,
    skip: impl Fn(&ObjectId) -> bool,
) -> BTreeMap<ObjectId, Needed> {
    let known = told.values().filter(|t| t.activated == highest).flat_map(|t| t.entries.keys());
    let objects: BTreeSet<ObjectId> = known.copied().filter(|o| !skip(o)).collect();
    objects
        .into_iter()
        .filter_map(|o| Some((o, needed(told, highest, newest_past, &o)?)))
        .filter(|(_, n)| n.version != Version::ZERO)
        .collect()
}

fn needed(
    told: &BTreeMap<OsdId, Told>,
    highest: Epoch,
    newest_past: Epoch,
    object: &ObjectId,
) -> Option<Needed> {
    let authority = told.values().filter(|t| t.activated == highest);
    let newest = authority.filter_map(|t| t.entries.get(object)).max_by_key(|e| e.version)?;
    let (version, interval) = (newest.version, newest.version.interval());
    let entries = || told.values().filter_map(|t| t.entries.get(object)).filter(|e| e.version == version);
    let committed = entries().any(|e| !e.missing && e.base.is_none());
    let lacks = |t: &Told| t.entries.get(object).is_none_or(|e| e.version != version);
    let unacknowledged = told.values().any(|t| t.activated == interval && lacks(t));
    if unacknowledged && !committed && newest_past <= interval {
        // Nobody tells of it any more: whoever holds it may come back.
        let before = entries().filter(|e| !e.missing).filter_map(|e| e.base).max();
        if let Some(before) = before {
            return Some(Needed::certain(before, false));
        }
    }
    Some(Needed::certain(version, newest.deleted))
}

/// Pending versions that acting members drop, and the committed ones that they then hold.
pub fn rollbacks(
    told: &BTreeMap<OsdId, Told>,
    wanted: &BTreeMap<ObjectId, Needed>,
    members: impl Iterator<Item = OsdId>,
    skip: impl Fn(&ObjectId) -> bool,
) -> BTreeMap<OsdId, BTreeMap<ObjectId, Version>> {
    let back = |o: &ObjectId, e: &ObjectEntry| {
        let base = e.base.filter(|_| !e.missing && !skip(o))?;
        (wanted.get(o).map_or(Version::ZERO, |n| n.version) == base).then_some((*o, base))
    };
    members
        .filter_map(|m| {
            let entries = told.get(&m)?.entries.iter().filter_map(|(o, e)| back(o, e));
            Some((m, entries.collect()))
        })
        .collect()
}

/// What acting members hold as wanted but have not committed.
pub fn pending(
    told: &BTreeMap<OsdId, Told>,
    wanted: &BTreeMap<ObjectId, Needed>,
    members: impl Iterator<Item = OsdId>,
) -> BTreeMap<ObjectId, (Version, BTreeSet<OsdId>)> {
    let mut out: BTreeMap<ObjectId, (Version, BTreeSet<OsdId>)> = BTreeMap::new();
    for member in members {
        for (o, e) in told.get(&member).into_iter().flat_map(|t| &t.entries) {
            let kept = wanted.get(o).is_some_and(|n| n.version == e.version);
            if kept && !e.missing && e.base.is_some() {
                out.entry(*o).or_insert((e.version, BTreeSet::new())).1.insert(member);
            }
        }
    }
    out
}
