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
    let held = || told.values().filter_map(|t| t.entries.get(object)).filter(|e| !e.missing);
    let committed = held().any(|e| e.base.unwrap_or(e.version) == version);
    // Who was active in the interval and holds a later version held this one before.
    let lacks = |t: &Told| t.entries.get(object).is_none_or(|e| e.version < version);
    let unacknowledged = told.values().any(|t| t.activated == interval && lacks(t));
    if unacknowledged && !committed && newest_past <= interval {
        // Without anybody who holds it, nobody knows what was before: whoever holds it may come back.
        if let Some(before) = held().filter(|e| e.version == version).filter_map(|e| e.base).max() {
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

#[cfg(test)]
mod tests {
    use super::*;

    const O: ObjectId = ObjectId { volume: VolumeId(1), index: 0, layer: LayerId(0) };

    fn v(interval: u64, counter: u32) -> Version {
        Version::new(Epoch(interval), counter).unwrap()
    }

    /// A member and what it holds of the object: the newest version and the committed one beside a pending one.
    fn member(osd: u32, activated: u64, held: Option<(Version, Option<Version>)>) -> (OsdId, Told) {
        let entry = held.map(|(version, base)| ObjectEntry { base, ..ObjectEntry::here(O, version, false) });
        let entries = entry.into_iter().map(|e| (O, e)).collect();
        (OsdId(osd), Told { activated: Epoch(activated), entries, ..Told::default() })
    }

    fn choice(told: &[(OsdId, Told)], newest_past: u64) -> Option<Version> {
        let told: BTreeMap<OsdId, Told> =
            told.iter().map(|(o, t)| (*o, Told { entries: t.entries.clone(), ..*t })).collect();
        let highest = told.values().map(|t| t.activated).max().unwrap();
        wanted(&told, highest, Epoch(newest_past), |_| false).get(&O).map(|n| n.version)
    }

    #[test]
    fn what_every_member_of_its_interval_holds_may_have_been_acknowledged() {
        let pending = Some((v(5, 2), Some(v(5, 1))));
        assert_eq!(choice(&[member(1, 5, pending), member(2, 5, pending)], 5), Some(v(5, 2)));
        // One has not heard of the commit.
        let committed = Some((v(5, 2), None));
        assert_eq!(choice(&[member(1, 5, pending), member(2, 5, committed)], 5), Some(v(5, 2)));
    }

    #[test]
    fn what_a_member_of_its_interval_lacks_goes_back() {
        let (pending, old) = (Some((v(5, 2), Some(v(5, 1)))), Some((v(5, 1), None)));
        assert_eq!(choice(&[member(1, 5, pending), member(2, 5, old)], 5), Some(v(5, 1)));
        let new = Some((v(5, 1), Some(Version::ZERO)));
        assert_eq!(choice(&[member(1, 5, new), member(2, 5, None)], 5), None, "never existed");
        // Chosen by an interval that was never served: the proof still counts.
        assert_eq!(choice(&[member(1, 7, pending), member(2, 5, old)], 5), Some(v(5, 1)));
    }

    #[test]
    fn what_a_later_interval_may_have_shown_stays() {
        let (pending, old) = (Some((v(5, 2), Some(v(5, 1)))), Some((v(5, 1), None)));
        assert_eq!(choice(&[member(1, 7, pending), member(2, 5, old)], 7), Some(v(5, 2)));
        // Somebody committed it, so everybody held it.
        let committed = Some((v(5, 2), None));
        assert_eq!(choice(&[member(1, 5, committed), member(2, 5, old)], 5), Some(v(5, 2)));
    }

    /// Found by the simulator: a member with a still newer version was taken for one that lacks this one.
    #[test]
    fn who_holds_a_later_version_held_this_one() {
        let chosen = member(0, 8, Some((v(5, 3), Some(v(5, 2)))));
        let ahead = member(4, 5, Some((v(5, 4), Some(v(5, 3)))));
        assert_eq!(choice(&[chosen, ahead], 5), Some(v(5, 3)));
    }
}
