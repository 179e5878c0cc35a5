//! Which version each object should have, from what members told. Pure.
//!
//! As for whole copies, the members with the highest activated interval say what there is (rule P3). The newest version that
//! one of them knows is wanted, unless it was *provably never acknowledged or shown*. The proof is a witness for the interval that
//! wrote it and for each later one that was active: a member of it that lacked the version then. Where somebody lacks a version
//! that may never have been acknowledged, it is not shown and not committed before everybody has it, and
//! whoever lacks it remembers that (`uncertain`). So every member still holds the version before it, and the object goes back to that one.

use super::super::peering::Told;
use super::super::*;
use gabion_proto::map::PastInterval;

/// What the objects that anybody of the authority knows should be.
pub fn wanted(
    told: &BTreeMap<OsdId, Told>,
    highest: Epoch,
    past: &[PastInterval],
    skip: impl Fn(&ObjectId) -> bool,
) -> BTreeMap<ObjectId, Needed> {
    let known = told.values().filter(|t| t.activated == highest).flat_map(|t| t.entries.keys());
    let objects: BTreeSet<ObjectId> = known.copied().filter(|o| !skip(o)).collect();
    objects
        .into_iter()
        .filter_map(|o| Some((o, needed(told, highest, past, &o)?)))
        .filter(|(_, n)| n.version != Version::ZERO)
        .collect()
}

fn needed(
    told: &BTreeMap<OsdId, Told>,
    highest: Epoch,
    past: &[PastInterval],
    object: &ObjectId,
) -> Option<Needed> {
    let authority = told.values().filter(|t| t.activated == highest);
    let newest = authority.filter_map(|t| t.entries.get(object)).max_by_key(|e| e.version)?;
    let (version, written) = (newest.version, newest.version.interval());
    let entries = || told.values().filter_map(|t| t.entries.get(object));
    let held = || entries().filter(|e| !e.missing);
    // A committed version was held by everybody once. So was one that a member misses without a doubt.
    let committed = held().any(|e| e.base.unwrap_or(e.version) == version);
    let sure = entries().any(|e| e.missing && e.version == version && e.uncertain.is_none());
    let before = held().filter(|e| e.version == version).filter_map(|e| e.base).max();
    let doubt = entries().filter(|e| e.missing && e.version == version).filter_map(|e| e.uncertain).max();
    if committed || sure {
        return Some(Needed::certain(version, newest.deleted));
    }
    // Who holds a later version held this one before. Who was made active later without it: that interval had the proof, or
    // heard from enough members of this one that none had it.
    let lacks = |t: &Told| {
        let entry = t.entries.get(object);
        entry.is_none_or(|e| e.version < version || (e.missing && e.version == version))
    };
    let lacked = |interval: &PastInterval| {
        let mut members = told.iter().filter(|(o, _)| interval.acting.contains(o));
        members.any(|(_, t)| t.activated >= interval.interval && lacks(t))
    };
    let mut since = past.iter().filter(|p| p.interval >= written).peekable();
    if since.peek().is_some() && since.all(lacked) {
        // Who misses it remembers what was before, even when nobody who holds it is left.
        if let Some(before) = before.max(doubt) {
            return Some(Needed::certain(before, false));
        }
    }
    Some(Needed { version, deleted: newest.deleted, uncertain: before.max(doubt) })
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

/// Objects whose newest version may be kept or dropped, depending on whom else is heard, unless every acting member holds both it
/// and the one before it.
pub fn unsettled(
    told: &BTreeMap<OsdId, Told>,
    wanted: &BTreeMap<ObjectId, Needed>,
    members: impl Iterator<Item = OsdId>,
) -> BTreeSet<ObjectId> {
    let members: Vec<&Told> = members.filter_map(|m| told.get(&m)).collect();
    let both = |t: &Told, o: &ObjectId, version, before| {
        t.entries.get(o).is_some_and(|e| !e.missing && e.version == version && e.base == Some(before))
    };
    let open = wanted.iter().filter_map(|(o, n)| Some((o, n.version, n.uncertain?)));
    let open = open.filter(|(o, version, before)| !members.iter().all(|t| both(t, o, *version, *before)));
    open.map(|(o, ..)| *o).collect()
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
        (OsdId(osd), Told::of(activated, entry))
    }

    fn choice(told: &[(OsdId, Told)], past: &[(u64, &[u32])]) -> Option<(Version, Option<Version>)> {
        let told: BTreeMap<OsdId, Told> = told.iter().cloned().collect();
        let past: Vec<PastInterval> = past
            .iter()
            .map(|(interval, acting)| PastInterval {
                interval: Epoch(*interval),
                acting: acting.iter().map(|o| OsdId(*o)).collect(),
                primary: None,
            })
            .collect();
        let highest = told.values().map(|t| t.activated).max().unwrap();
        wanted(&told, highest, &past, |_| false).get(&O).map(|n| (n.version, n.uncertain))
    }

    /// A member that was told in `activated` to obtain a version that may never have been acknowledged.
    fn misses(osd: u32, activated: u64, version: Version, uncertain: Option<Version>) -> (OsdId, Told) {
        let entry = ObjectEntry { missing: true, uncertain, ..ObjectEntry::here(O, version, false) };
        (OsdId(osd), Told::of(activated, [entry]))
    }

    const I5: (u64, &[u32]) = (5, &[1, 2, 3]);

    #[test]
    fn what_every_member_of_its_interval_holds_may_have_been_acknowledged() {
        let pending = Some((v(5, 2), Some(v(5, 1))));
        let both = [member(1, 5, pending), member(2, 5, pending)];
        assert_eq!(choice(&both, &[I5]), Some((v(5, 2), Some(v(5, 1)))), "kept, not shown at once");
        // One has not heard of the commit.
        let committed = Some((v(5, 2), None));
        assert_eq!(choice(&[member(1, 5, pending), member(2, 5, committed)], &[I5]), Some((v(5, 2), None)));
    }

    #[test]
    fn what_a_member_of_its_interval_lacks_goes_back() {
        let (pending, old) = (Some((v(5, 2), Some(v(5, 1)))), Some((v(5, 1), None)));
        let back = Some((v(5, 1), None));
        assert_eq!(choice(&[member(1, 5, pending), member(2, 5, old)], &[I5]), back);
        let new = Some((v(5, 1), Some(Version::ZERO)));
        assert_eq!(choice(&[member(1, 5, new), member(2, 5, None)], &[I5]), None, "never existed");
        // Chosen by an interval that was never served: the proof still counts.
        assert_eq!(choice(&[member(1, 7, pending), member(2, 5, old)], &[I5]), back);
        // A member of another interval proves nothing.
        assert_eq!(choice(&[member(1, 5, pending), member(4, 0, None)], &[I5]).map(|c| c.0), Some(v(5, 2)));
    }

    #[test]
    fn what_a_later_interval_may_have_shown_stays() {
        let (pending, old) = (Some((v(5, 2), Some(v(5, 1)))), Some((v(5, 1), None)));
        let told = [member(1, 7, pending), member(2, 5, old)];
        assert_eq!(choice(&told, &[I5, (7, &[1, 3])]).map(|c| c.0), Some(v(5, 2)));
        // Somebody committed it, so everybody held it.
        let committed = Some((v(5, 2), None));
        assert_eq!(choice(&[member(1, 5, committed), member(2, 5, old)], &[I5]).map(|c| c.0), Some(v(5, 2)));
    }

    /// Found by the simulator: kept with as few shards as decode, a version that nobody had acknowledged took the one before
    /// it along when one more disk was lost.
    #[test]
    fn what_no_interval_can_have_shown_goes_back() {
        let (pending, old) = (Some((v(5, 2), Some(v(5, 1)))), Some((v(5, 1), None)));
        let past = [I5, (7, &[1, 3, 4][..])];
        let told = |uncertain| [member(1, 7, pending), member(2, 5, old), misses(4, 7, v(5, 2), uncertain)];
        assert_eq!(choice(&told(Some(v(5, 1))), &past), Some((v(5, 1), None)));
        assert_eq!(choice(&told(None), &past), Some((v(5, 2), None)), "7 had no doubt and may have shown it");
    }

    /// Found by the simulator: a member with a still newer version was taken for one that lacks this one.
    #[test]
    fn who_holds_a_later_version_held_this_one() {
        let chosen = member(0, 8, Some((v(5, 3), Some(v(5, 2)))));
        let ahead = member(4, 5, Some((v(5, 4), Some(v(5, 3)))));
        assert_eq!(choice(&[chosen, ahead], &[(5, &[0, 4])]).map(|c| c.0), Some(v(5, 3)));
    }
}
