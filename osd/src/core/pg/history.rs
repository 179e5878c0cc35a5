//! Which version each object should have, from what members told (rule P3). Pure.
//!
//! The members with the highest activated interval are the authority, and the newest version that one of them
//! knows is rolled forward. If another one of them held something else instead, the write was never acknowledged: the
//! version is *uncertain*, is not shown before everybody has it, and every member that lacks it records so. When all copies
//! of an uncertain version are lost, the object goes back to an older state that somebody still holds. Without that
//! mark it must not: what is lost may have been acknowledged, and only a holder of it, or of what was written over it, can help.
//!
//! Who holds a later version of the same interval holds the lost one, and more: writes that nobody was told of. The object may *go on* to
//! that if nobody was shown it without them since that interval ended. The mark says that, too, with the version itself as the lowest one: it is made when nobody
//! holds what the last interval that served knew of, and keeps the object hidden until an acting member has it when an interval begins, or all have it.
//!
//! That nobody of the authority disagreed is no proof that a version was acknowledged: who could have disagreed may have been away.
//! While no later interval has served, they can still deny it when they are back (see [`denied`]).

use super::peering::Told;
use super::*;
use gabion_proto::map::PastInterval;

/// What the objects that anybody of the authority knows should be.
pub fn wanted(
    told: &BTreeMap<OsdId, Told>,
    highest: Epoch,
    (past, acting): (&[PastInterval], &BTreeSet<OsdId>),
    skip: impl Fn(&ObjectId) -> bool,
) -> BTreeMap<ObjectId, Needed> {
    let here = |o: &ObjectId, n: &Needed| told.iter().any(|(osd, t)| acting.contains(osd) && t.has(o, n));
    // Once an acting member has it, it is shown from there, and what is missed is that and nothing later.
    let shown = |o: &ObjectId, n: Needed| match n.uncertain == Some(n.version) && here(o, &n) {
        true => Needed { uncertain: None, ..n },
        false => n,
    };
    let known = told.values().filter(|t| t.activated == highest).flat_map(|t| t.entries.keys());
    let objects: BTreeSet<ObjectId> = known.copied().filter(|o| !skip(o)).collect();
    objects.into_iter().filter_map(|o| Some((o, shown(&o, needed(told, highest, past, &o)?)))).collect()
}

fn needed(
    told: &BTreeMap<OsdId, Told>,
    highest: Epoch,
    past: &[PastInterval],
    object: &ObjectId,
) -> Option<Needed> {
    let authority = || told.values().filter(|t| t.activated == highest);
    let (mut best, mut lost) = (None::<Needed>, None::<Needed>);
    // A version of zero is the wish to have nothing.
    for e in authority().filter_map(|t| t.entries.get(object)).filter(|e| e.version != Version::ZERO) {
        let uncertain = e.uncertain.into_iter().chain(denied(told, past, object, e.version)).min();
        let n = Needed { version: e.version, deleted: e.deleted, uncertain };
        let gone = n.uncertain.is_some() && !told.values().any(|t| t.has(object, &n));
        let slot = if gone { &mut lost } else { &mut best };
        if slot.is_none_or(|s| n.version > s.version) {
            *slot = Some(n);
        }
    }
    let Some(best) = best else { return instead(told, object, lost?) };
    let doubts = authority().filter_map(|t| match t.entries.get(object) {
        None if best.deleted => None,
        None => Some(Version::ZERO),
        Some(e) if e.missing => e.uncertain.filter(|_| e.version == best.version),
        Some(e) => Some(e.version).filter(|v| *v != best.version),
    });
    let best = Needed { uncertain: doubts.chain(best.uncertain).min(), ..best };
    let held = best.deleted || told.values().any(|t| t.has(object, &best));
    match best.uncertain {
        _ if held => Some(best),
        Some(_) => instead(told, object, best),
        // Nobody can have been shown it since.
        None if highest == best.version.interval() => Some(Needed { uncertain: Some(best.version), ..best }),
        None => Some(best),
    }
}

/// The proof that a version was neither acknowledged nor shown, from members that were active in the last interval that may have served, and
/// in none since: the lowest version that one of them has instead.
///
/// What that interval wrote and then acknowledged or showed, all its members had durable (invariant 1, rule P5), and nothing takes it from
/// a member that is not active in a later interval. What was in doubt when it began it showed when nobody
/// lacked it any more (rule P3f). Intervals since have served nothing (rule P3c), so that they change nothing about
/// either. About a version that is older and was not in doubt then, nobody can tell: it may have been shown.
fn denied(
    told: &BTreeMap<OsdId, Told>,
    past: &[PastInterval],
    object: &ObjectId,
    version: Version,
) -> Option<Version> {
    let last = past.last()?;
    let wrote = last.interval == version.interval();
    let instead = last.acting.iter().filter_map(|o| {
        let member = told.get(o).filter(|t| t.activated == last.interval)?;
        match member.entries.get(object) {
            None => wrote.then_some(Version::ZERO),
            // Without the mark it may have had it: what cannot be read is missed, too.
            Some(e) if e.missing => e.uncertain.filter(|_| e.version == version),
            Some(e) => Some(e.version).filter(|v| wrote && *v < version),
        }
    });
    instead.min()
}

/// Nobody holds the uncertain version that was to be rolled forward.
fn instead(told: &BTreeMap<OsdId, Told>, object: &ObjectId, lost: Needed) -> Option<Needed> {
    let lowest = lost.uncertain?;
    let copies = told.values().filter_map(|t| t.entries.get(object)?.copy());
    match copies.filter(|(v, _)| lost.may_become(*v)).max() {
        Some((version, deleted)) => {
            // What an earlier interval left was shown.
            let hidden = version.interval() == lost.version.interval();
            let uncertain = Some(lowest.min(version)).filter(|l| hidden || *l < version);
            Some(Needed { version, deleted, uncertain })
        }
        None if lowest == Version::ZERO => None,
        // Whoever holds an older state, or a later one, may come back.
        None => Some(lost),
    }
}
