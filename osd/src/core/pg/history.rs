//! Which version each object should have, from what members told (rule P3). Pure.
//!
//! The members with the highest activated interval are the authority, and the newest version that one of them
//! knows is rolled forward. If another one of them held something else instead, the write was never acknowledged: the
//! version is *uncertain*, is not shown before everybody has it, and every member that lacks it records so. When all copies
//! of an uncertain version are lost, the object goes back to an older state that somebody still holds. Without that
//! mark it must not: what is lost may have been acknowledged, and only a holder of it can help.

use super::peering::Told;
use super::*;

/// What the objects that anybody of the authority knows should be.
pub fn wanted(
    told: &BTreeMap<OsdId, Told>,
    highest: Epoch,
    skip: impl Fn(&ObjectId) -> bool,
) -> BTreeMap<ObjectId, Needed> {
    let known = told.values().filter(|t| t.activated == highest).flat_map(|t| t.entries.keys());
    let objects: BTreeSet<ObjectId> = known.copied().filter(|o| !skip(o)).collect();
    objects.into_iter().filter_map(|o| Some((o, needed(told, highest, &o)?))).collect()
}

fn needed(told: &BTreeMap<OsdId, Told>, highest: Epoch, object: &ObjectId) -> Option<Needed> {
    let authority = || told.values().filter(|t| t.activated == highest);
    let (mut best, mut lost) = (None::<Needed>, None::<Needed>);
    // A version of zero is the wish to have nothing.
    for e in authority().filter_map(|t| t.entries.get(object)).filter(|e| e.version != Version::ZERO) {
        let n = Needed { version: e.version, deleted: e.deleted, uncertain: e.uncertain };
        let gone = n.uncertain.is_some() && !told.values().any(|t| t.has(object, &n));
        let slot = if gone { &mut lost } else { &mut best };
        if slot.is_none_or(|s| n.version > s.version) {
            *slot = Some(n);
        }
    }
    let Some(best) = best else { return go_back(told, object, lost?) };
    let doubts = authority().filter_map(|t| match t.entries.get(object) {
        None if best.deleted => None,
        None => Some(Version::ZERO),
        Some(e) if e.missing => e.uncertain.filter(|_| e.version == best.version),
        Some(e) => Some(e.version).filter(|v| *v != best.version),
    });
    Some(Needed { uncertain: doubts.chain(best.uncertain).min(), ..best })
}

/// Nobody holds the uncertain version that was to be rolled forward.
fn go_back(told: &BTreeMap<OsdId, Told>, object: &ObjectId, lost: Needed) -> Option<Needed> {
    let lowest = lost.uncertain?;
    let copies = told.values().filter_map(|t| t.entries.get(object)?.copy());
    match copies.filter(|(v, _)| lost.may_go_back_to(*v)).max() {
        Some((version, deleted)) => {
            let uncertain = Some(lowest).filter(|l| *l < version);
            Some(Needed { version, deleted, uncertain })
        }
        None if lowest == Version::ZERO => None,
        // Whoever holds an older state may come back.
        None => Some(lost),
    }
}
