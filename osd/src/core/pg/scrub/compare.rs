//! What copies of one object say of each other. Pure.

use super::Damage;
use crate::core::pg::*;

/// What the primary makes of the copies of an object that nobody wrote to meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Good,
    /// Something is wrong; which copies are good can be said only when all of them were read.
    LookCloser,
    /// These members' copies are to be replaced, whatever version they are at; the others have it.
    Replace {
        bad: BTreeMap<OsdId, Version>,
        good: BTreeSet<OsdId>,
    },
    /// Whole copies: none of them is. Those of these members are at the right version, and unreadable somewhere.
    Assemble {
        partly: BTreeSet<OsdId>,
    },
    Damaged(Damage),
}

/// Judges what each acting member has (`None`: nothing) against what the object should be (`None`: nothing). In an active
/// group that is for its primary to say: it orders all writes. `enough` good copies bring back the others.
pub fn judge(
    wanted: Option<(Version, bool)>,
    copies: &BTreeMap<OsdId, Option<ScrubEntry>>,
    deep: bool,
    enough: usize,
) -> Verdict {
    let held = |c: &Option<ScrubEntry>| c.as_ref().map_or(Version::ZERO, |c| c.version);
    let split = |is_good: &dyn Fn(&Option<ScrubEntry>) -> bool| {
        let (good, bad): (Vec<_>, Vec<_>) = copies.iter().partition(|(_, c)| is_good(c));
        let good: BTreeSet<OsdId> = good.into_iter().map(|(o, _)| *o).collect();
        let bad: BTreeMap<OsdId, Version> = bad.into_iter().map(|(o, c)| (*o, held(c))).collect();
        (good, bad)
    };
    let Some((version, false)) = wanted else {
        // Whoever never had it needs no tombstone.
        let wanted = wanted.map_or(Version::ZERO, |(v, _)| v);
        let (good, bad) = split(&|c| {
            c.is_none_or(|c| {
                let forgotten = wanted == Version::ZERO && c.deleted;
                c.version == Version::ZERO || forgotten || (c.deleted && c.version == wanted)
            })
        });
        return if bad.is_empty() { Verdict::Good } else { Verdict::Replace { bad, good } };
    };
    let is_copy = |c: &Option<ScrubEntry>| {
        c.is_some_and(|c| c.version == version && !c.deleted && c.unreadable.is_none())
    };
    let mut digests: BTreeMap<u64, usize> = BTreeMap::new();
    copies.values().filter(|c| is_copy(c)).flatten().for_each(|c| *digests.entry(c.digest).or_default() += 1);
    let readable: usize = digests.values().sum();
    if readable == copies.len() && digests.len() == 1 {
        return Verdict::Good;
    }
    if !deep {
        return Verdict::LookCloser;
    }
    if readable < enough {
        let may_be_partly = |c: &Option<ScrubEntry>| {
            c.is_some_and(|c| c.version == version && !c.deleted && c.unreadable.is_some())
        };
        let (partly, _) = split(&may_be_partly);
        // Shards are put together row by row, when they are read.
        return match enough == 1 && partly.len() > 1 {
            true => Verdict::Assemble { partly },
            false => Verdict::Damaged(Damage::Unreadable),
        };
    }
    let majority = digests.iter().find(|(_, n)| digests.len() == 1 || **n * 2 > readable);
    let Some((digest, _)) = majority else { return Verdict::Damaged(Damage::Inconsistent) };
    let (good, bad) = split(&|c| is_copy(c) && c.is_some_and(|c| c.digest == *digest));
    Verdict::Replace { bad, good }
}

#[cfg(test)]
mod tests {
    use super::*;

    const O: ObjectId = ObjectId { volume: VolumeId(1), index: 0, layer: LayerId(0) };

    fn v(counter: u32) -> Version {
        Version::new(Epoch(5), counter).unwrap()
    }

    fn copy(version: Version, digest: u64) -> Option<ScrubEntry> {
        Some(ScrubEntry { object: O, version, deleted: false, digest, unreadable: None })
    }

    fn bad(version: Version) -> Option<ScrubEntry> {
        copy(version, 0).map(|c| ScrubEntry { unreadable: Some(3), ..c })
    }

    fn of(copies: &[Option<ScrubEntry>]) -> BTreeMap<OsdId, Option<ScrubEntry>> {
        (1..).map(OsdId).zip(copies.iter().copied()).collect()
    }

    fn deep(copies: &[Option<ScrubEntry>]) -> Verdict {
        judge(Some((v(2), false)), &of(copies), true, 1)
    }

    fn replace(bad: &[(u32, Version)], good: &[u32]) -> Verdict {
        Verdict::Replace {
            bad: bad.iter().map(|(o, v)| (OsdId(*o), *v)).collect(),
            good: good.iter().map(|o| OsdId(*o)).collect(),
        }
    }

    #[test]
    fn equal_copies_are_good_and_others_are_looked_at() {
        let good = [copy(v(2), 7), copy(v(2), 7), copy(v(2), 7)];
        assert_eq!(judge(Some((v(2), false)), &of(&good), false, 1), Verdict::Good);
        for odd in [None, copy(v(1), 7), copy(v(3), 7), copy(v(2), 8)] {
            let copies = of(&[copy(v(2), 7), odd, copy(v(2), 7)]);
            assert_eq!(judge(Some((v(2), false)), &copies, false, 1), Verdict::LookCloser, "{odd:?}");
        }
    }

    #[test]
    fn what_is_lacking_of_another_version_or_unreadable_is_replaced() {
        assert_eq!(deep(&[copy(v(2), 7), None, copy(v(2), 7)]), replace(&[(2, Version::ZERO)], &[1, 3]));
        assert_eq!(deep(&[copy(v(1), 7), bad(v(2)), copy(v(2), 7)]), replace(&[(1, v(1)), (2, v(2))], &[3]));
    }

    #[test]
    fn the_majority_of_readable_copies_is_right() {
        assert_eq!(deep(&[copy(v(2), 8), copy(v(2), 7), copy(v(2), 7)]), replace(&[(1, v(2))], &[2, 3]));
        let unclear = Verdict::Damaged(Damage::Inconsistent);
        assert_eq!(deep(&[copy(v(2), 8), copy(v(2), 7)]), unclear);
        assert_eq!(deep(&[copy(v(2), 8), copy(v(2), 7), bad(v(2))]), unclear);
        assert_eq!(deep(&[copy(v(2), 8), copy(v(2), 8), copy(v(2), 7), copy(v(2), 6)]), unclear);
    }

    #[test]
    fn nothing_is_replaced_by_what_cannot_be_read() {
        let lone = deep(&[bad(v(2)), None, copy(v(1), 7)]);
        assert_eq!(lone, Verdict::Damaged(Damage::Unreadable));
        // Nor is anything put together of another version.
        let partly = [OsdId(1), OsdId(2)].into();
        assert_eq!(deep(&[bad(v(2)), bad(v(2)), copy(v(1), 7)]), Verdict::Assemble { partly });
        let older = deep(&[bad(v(2)), bad(v(1)), bad(v(1))]);
        assert_eq!(older, Verdict::Damaged(Damage::Unreadable));
        let shards = of(&[bad(v(2)), copy(v(2), 0), None]);
        let coded = judge(Some((v(2), false)), &shards, true, 2);
        assert_eq!(coded, Verdict::Damaged(Damage::Unreadable));
    }

    #[test]
    fn what_should_not_be_there_goes_and_tombstones_need_not_be_everywhere() {
        let tombstone = copy(v(2), 0).map(|c| ScrubEntry { deleted: true, ..c });
        assert_eq!(judge(None, &of(&[None, copy(v(1), 7)]), false, 1), replace(&[(2, v(1))], &[1]));
        assert_eq!(judge(None, &of(&[None, tombstone]), false, 1), Verdict::Good);
        assert_eq!(judge(Some((v(2), true)), &of(&[tombstone, None]), false, 1), Verdict::Good);
        let copies = of(&[tombstone, copy(v(1), 7)]);
        assert_eq!(judge(Some((v(2), true)), &copies, false, 1), replace(&[(2, v(1))], &[1]));
    }
}
