//! Scrubs of a replicated group, driven effect by effect: what is found, what is replaced, and what races with clients.

use super::*;
use crate::erasure::{Rows, sparse_content};
use crate::store::digest_of;
use gabion_proto::msg::{OpError, ScrubEntry, ScrubRange};

const RATE: u64 = 64 << 20;

fn content(fill: u8) -> Content {
    Content::data(0, vec![fill; 4096].into())
}

fn state(version: Version) -> ObjectState {
    ObjectState { version, deleted: false, pending: None }
}

/// A copy of `content(1)`.
fn copy(index: u32, version: Version) -> ScrubEntry {
    ScrubEntry {
        object: object(index),
        version,
        deleted: false,
        digest: digest_of(&content(1)),
        unreadable: None,
    }
}

fn rotten(index: u32, version: Version) -> ScrubEntry {
    ScrubEntry { unreadable: Some(0), digest: 0, ..copy(index, version) }
}

fn unreadable(index: u32) -> StoreError {
    StoreError::Unreadable { object: object(index), block: 0, why: "checksum mismatch".into(), rest: None }
}

impl Rig {
    fn order(&mut self, number: u64, deep: bool) {
        let orders = vec![ScrubOrder { pg: PG, number, deep }];
        self.step(Event::Scrub { orders, rate_bytes_per_s: RATE });
    }

    /// The question under way: its number, what it is about and whether it is deep.
    fn question(&mut self) -> (u64, ScrubRange, bool) {
        let asked = self.sent.iter().rev().find_map(|(_, b)| match b {
            PeerBody::ScrubRead { tid, range, deep } => Some((*tid, *range, *deep)),
            _ => None,
        });
        asked.expect("asks members")
    }

    fn tell_copies(&mut self, from: u32, entries: &[ScrubEntry]) {
        let (tid, ..) = self.question();
        self.hear(from, PeerBody::ScrubInfo { tid, entries: entries.to_vec(), last: true });
    }

    /// The own store's word on everything that it is asked.
    fn own_copies(&mut self, version: Version) {
        while let Some((token, _)) = self.digests.pop_front() {
            let digest = digest_of(&content(1));
            self.step(Event::Digested { token, result: Ok((state(version), digest)) });
        }
        while !self.object_reads.is_empty() {
            self.answer_object(Ok((state(version), content(1))));
        }
    }

    fn report(&self) -> Option<&ScrubReport> {
        self.reports.iter().rev().find_map(|r| match r {
            MonitorRequest::Scrubbed { report, .. } => Some(report),
            _ => None,
        })
    }

    fn push(&mut self) -> Option<(OsdId, u64, Version, Option<Version>)> {
        let found = self.sent.iter().find_map(|(to, b)| match b {
            PeerBody::Push { tid, version, over, .. } => Some((*to, *tid, *version, *over)),
            _ => None,
        });
        self.sent.retain(|(_, b)| !matches!(b, PeerBody::Push { .. }));
        found
    }
}

fn clean() -> Rig {
    Rig::active(&[(0, version(5, 1))], &[1, 2, 3])
}

#[test]
fn equal_copies_are_reported_without_a_finding() {
    let mut rig = clean();
    rig.order(1, false);
    assert!(!rig.question().2);
    rig.own_copies(version(5, 1));
    for other in [2, 3] {
        rig.tell_copies(other, &[copy(0, version(5, 1))]);
    }
    let report = rig.report().expect("reported").clone();
    assert_eq!(report, ScrubReport { number: 1, objects: 1, ..ScrubReport::default() });
    // The monitors repeat an order until they have heard.
    rig.take_sent();
    rig.order(1, false);
    assert!(rig.sent.is_empty(), "{:?}", rig.sent);
    rig.order(2, true);
    assert!(rig.question().2);
}

/// The volume was removed: others have the map that says so, and have purged the object.
#[test]
fn what_members_with_a_newer_map_have_is_judged_when_that_map_is_here() {
    let mut rig = clean();
    rig.order(1, true);
    let gone = [ScrubEntry { version: Version::ZERO, digest: 0, ..copy(0, Version::ZERO) }];
    rig.own_copies(version(5, 1));
    let (tid, ..) = rig.question();
    for other in [2, 3] {
        let body = PeerBody::ScrubInfo { tid, entries: gone.to_vec(), last: true };
        rig.hear_of(Epoch(11), other, body, Bytes::new());
    }
    assert!(rig.report().is_none() && rig.push().is_none());
    rig.map.removed_volumes.insert(VOLUME);
    rig.map.epoch = Epoch(11);
    rig.publish();
    rig.sent.clear();
    rig.tick(5_000);
    for other in [2, 3] {
        rig.tell_copies(other, &gone);
    }
    // It went meanwhile here, too: looked at once more.
    rig.tick(1_000);
    for other in [2, 3] {
        rig.tell_copies(other, &[]);
    }
    rig.tick(100);
    let report = rig.report().expect("reported");
    assert_eq!((report.findings, report.damaged_objects), (0, 0));
    assert!(rig.push().is_none());
}

#[test]
fn a_light_scrub_that_finds_something_odd_reads_it_and_replaces_it() {
    let mut rig = clean();
    rig.order(1, false);
    rig.own_copies(version(5, 1));
    rig.tell_copies(2, &[copy(0, version(5, 1))]);
    rig.tell_copies(3, &[ScrubEntry { digest: 7, ..copy(0, version(5, 1)) }]);
    rig.tick(100);
    assert_eq!((rig.question().1, rig.question().2), (ScrubRange::One(object(0)), true));
    rig.own_copies(version(5, 1));
    rig.tell_copies(2, &[copy(0, version(5, 1))]);
    rig.tell_copies(3, &[ScrubEntry { digest: 7, ..copy(0, version(5, 1)) }]);
    rig.own_copies(version(5, 1));
    let (to, tid, at, over) = rig.push().expect("pushes");
    assert_eq!((to, at, over), (OsdId(3), version(5, 1), Some(version(5, 1))));
    // Nobody writes it meanwhile.
    let write = rig.write(0, 0);
    assert!(!rig.sent.iter().any(|(_, b)| matches!(b, PeerBody::SubWrite { .. })));
    assert!(rig.report().is_none(), "not over while something is being repaired");
    rig.hear(3, PeerBody::PushAck { tid, result: SubResult::Ok });
    assert!(rig.sent.iter().any(|(_, b)| matches!(b, PeerBody::SubWrite { .. })), "{:?}", rig.reply(write));
    rig.tick(100);
    let report = rig.report().expect("reported");
    assert_eq!((report.findings, report.repaired, report.damaged_objects), (1, 1, 0));
}

#[test]
fn the_primarys_own_rotten_copy_comes_back_from_another() {
    let mut rig = clean();
    rig.order(1, true);
    rig.answer_object(Err(unreadable(0)));
    rig.tell_copies(2, &[rotten(0, version(5, 1))]);
    rig.tell_copies(3, &[copy(0, version(5, 1))]);
    let missing = rig.ops().any(|op| matches!(op, TxnOp::AddMissing { .. }));
    assert!(missing, "the own copy serves nothing any more");
    let pull = rig.sent.iter().find_map(|(to, b)| match b {
        PeerBody::Pull { tid, .. } => Some((*to, *tid)),
        _ => None,
    });
    let (from, tid) = pull.expect("pulls");
    assert_eq!(from, OsdId(3), "never from a rotten one");
    let c = content(1);
    let piece = Ok(PieceImage { same: 0, extents: c.extents, end: 2, bad: Vec::new() });
    let body = PeerBody::PullReply { tid, object: object(0), version: version(5, 1), first_block: 0, piece };
    rig.hear_data(3, body, c.data);
    rig.own_copies(version(5, 1));
    let (to, tid, ..) = rig.push().expect("the other rotten one is replaced, too");
    assert_eq!(to, OsdId(2));
    rig.hear(2, PeerBody::PushAck { tid, result: SubResult::Ok });
    rig.tick(100);
    let report = rig.report().expect("reported");
    assert_eq!((report.findings, report.repaired), (2, 2));
}

/// All copies rot in the same place: no copy is touched, reads of what is bad fail, others are served, and the monitors hear of it.
#[test]
fn an_object_without_a_good_copy_is_damaged() {
    let mut rig = clean();
    rig.order(1, true);
    rig.answer_object(Err(unreadable(0)));
    rig.commits.clear();
    for other in [2, 3] {
        rig.tell_copies(other, &[rotten(0, version(5, 1))]);
    }
    for _ in 0..2 {
        let pull = rig.take_sent().into_iter().find_map(|(to, b)| match b {
            PeerBody::Pull { tid, .. } => Some((to, tid)),
            _ => None,
        });
        let (from, tid) = pull.expect("asks whether somebody has it");
        let piece = Ok(PieceImage { same: 0, extents: Vec::new(), end: 1, bad: vec![(0, 7)] });
        let (object, version) = (object(0), version(5, 1));
        rig.hear(from.0, PeerBody::PullReply { tid, object, version, first_block: 0, piece });
    }
    rig.answer_object(Err(unreadable(0)));
    rig.tick(100);
    let report = rig.report().expect("reported");
    assert_eq!(report.damaged, [(object(0), Damage::Unreadable)]);
    assert_eq!((report.findings, report.repaired, report.damaged_objects), (3, 0, 1));
    assert!(rig.ops().all(|op| matches!(op, TxnOp::DropMissing { .. })), "{:?}", rig.commits);
    let bad = rig.read(0, 0);
    rig.answer_read(Err(unreadable(0)));
    assert_eq!(rig.reply(bad), Some(&OpReply::Failed(OpError::Io)));
    let good = rig.read(0, 1);
    rig.answer_read(Ok(content(1)));
    assert!(matches!(rig.reply(good), Some(OpReply::Data { .. })));
    assert_eq!(rig.core.pg_statuses()[0].damaged_objects, 1);
}

/// The same found by a read: every other holder is asked, then the client is told.
#[test]
fn a_read_fails_once_nobody_can_read_it() {
    let mut rig = clean();
    let read = rig.read(0, 0);
    rig.answer_read(Err(unreadable(0)));
    for _ in 0..2 {
        let pull = rig.take_sent().into_iter().find_map(|(to, b)| match b {
            PeerBody::Pull { tid, .. } => Some((to, tid)),
            _ => None,
        });
        let (from, tid) = pull.expect("asks the next one");
        assert_eq!(rig.reply(read), None);
        let (object, version, piece) = (object(0), version(5, 1), Err(SubResult::Io));
        rig.hear(from.0, PeerBody::PullReply { tid, object, version, first_block: 0, piece });
    }
    rig.answer_read(Err(unreadable(0)));
    assert_eq!(rig.reply(read), Some(&OpReply::Failed(OpError::Io)));
    assert!(rig.ops().any(|op| matches!(op, TxnOp::DropMissing { .. })));
    let status = &rig.core.pg_statuses()[0];
    assert_eq!((status.damaged_objects, status.unfound_objects, status.degraded_objects), (1, 0, 0));
}

#[test]
fn two_copies_that_differ_are_left_as_they_are() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2]);
    rig.order(1, true);
    rig.own_copies(version(5, 1));
    rig.tell_copies(2, &[ScrubEntry { digest: 7, ..copy(0, version(5, 1)) }]);
    assert_eq!(rig.push(), None);
    assert_eq!(rig.report().expect("reported").damaged, [(object(0), Damage::Inconsistent)]);
}

/// Clients see one of two copies that differ, always the same: the other one is not asked when the disk is late.
#[test]
fn of_two_copies_that_differ_reads_see_one() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2]);
    rig.order(1, true);
    rig.own_copies(version(5, 1));
    rig.tell_copies(2, &[ScrubEntry { digest: 7, ..copy(0, version(5, 1)) }]);
    rig.take_sent();
    let read = rig.read(0, 0);
    rig.tick(150);
    assert!(!rig.take_sent().iter().any(|(_, b)| matches!(b, PeerBody::BlockRead { .. })));
    rig.answer_read(Ok(content(1)));
    assert!(matches!(rig.reply(read), Some(OpReply::Data { .. })));
}

/// A member answers for the time before a write: that proves nothing.
#[test]
fn what_races_with_a_write_is_looked_at_again() {
    let mut rig = clean();
    rig.order(1, false);
    rig.tell_copies(2, &[copy(0, version(5, 1))]);
    rig.write(0, 0);
    let written = version(10, 1);
    let tid = rig.sent.iter().find_map(|(_, b)| match b {
        PeerBody::SubWrite { tid, .. } => Some(*tid),
        _ => None,
    });
    for other in [2, 3] {
        rig.hear(other, PeerBody::SubWriteAck { tid: tid.unwrap(), result: SubResult::Ok });
    }
    rig.own_copies(written);
    rig.tell_copies(3, &[copy(0, written)]);
    assert!(rig.report().is_none());
    rig.tick(300);
    assert_eq!(rig.question().1, ScrubRange::One(object(0)));
    rig.own_copies(written);
    for other in [2, 3] {
        rig.tell_copies(other, &[copy(0, written)]);
    }
    assert_eq!(rig.report().expect("reported").findings, 0);
    assert_eq!(rig.push(), None);
}

/// Clients write it all the time: in the end new writes wait for as long as it is looked at, and go on then.
#[test]
fn an_object_that_is_always_written_is_scrubbed_all_the_same() {
    let mut rig = clean();
    rig.order(1, false);
    for n in 1..100 {
        let before = rig.sent.len();
        let write = rig.write(0, 0);
        let tid = rig.sent[before..].iter().find_map(|(_, b)| match b {
            PeerBody::SubWrite { tid, .. } => Some(*tid),
            _ => None,
        });
        let newest = version(10, n);
        match tid {
            Some(tid) => {
                for other in [2, 3] {
                    rig.hear(other, PeerBody::SubWriteAck { tid, result: SubResult::Ok });
                }
                assert!(matches!(rig.reply(write), Some(OpReply::Done { .. })));
                rig.own_copies(newest);
            }
            None => {
                let newest = version(10, n - 1);
                rig.own_copies(newest);
                assert_eq!(rig.reply(write), None);
                for other in [2, 3] {
                    rig.tell_copies(other, &[copy(0, newest)]);
                }
                assert_eq!(rig.report().expect("reported").findings, 0);
                assert!(rig.sent.iter().any(|(_, b)| matches!(b, PeerBody::SubWrite { version, .. } if *version == self::version(10, n))));
                return;
            }
        }
        for other in [2, 3] {
            rig.tell_copies(other, &[copy(0, newest)]);
        }
        rig.own_copies(newest);
        rig.tick(250 * u64::from(n));
    }
    panic!("never looked at");
}

/// As above, but somebody does not say what it has: the writes have waited long enough.
#[test]
fn writes_do_not_wait_for_a_scrub_for_ever() {
    let mut rig = clean();
    rig.order(1, false);
    for n in 1..100 {
        let before = rig.sent.len();
        let write = rig.write(0, 0);
        let sub_write = |(_, b): &(OsdId, PeerBody)| match b {
            PeerBody::SubWrite { tid, .. } => Some(*tid),
            _ => None,
        };
        let Some(tid) = rig.sent[before..].iter().find_map(sub_write) else {
            for _ in 0..9 {
                assert!(rig.sent[before..].iter().find_map(sub_write).is_none());
                rig.tick(350);
            }
            // It was sent back by then.
            assert!(matches!(rig.reply(write), Some(OpReply::Retry { .. })));
            rig.write(0, 0);
            assert!(rig.sent[before..].iter().find_map(sub_write).is_some(), "it waits for the silent one");
            assert!(rig.report().is_none(), "it is looked at again later");
            return;
        };
        for other in [2, 3] {
            rig.hear(other, PeerBody::SubWriteAck { tid, result: SubResult::Ok });
        }
        assert!(matches!(rig.reply(write), Some(OpReply::Done { .. })));
        let newest = version(10, n);
        rig.own_copies(newest);
        for other in [2, 3] {
            rig.tell_copies(other, &[copy(0, newest)]);
        }
        rig.own_copies(newest);
        rig.tick(250 * u64::from(n));
    }
    panic!("never looked at");
}

/// What the members have beside what the primary knows, and what they lack.
#[test]
fn objects_that_are_lacking_come_and_others_go() {
    let mut rig = clean();
    rig.order(1, true);
    rig.own_copies(version(5, 1));
    rig.tell_copies(2, &[]);
    rig.tell_copies(3, &[copy(0, version(5, 1)), copy(1, version(5, 9))]);
    rig.own_copies(version(5, 1));
    let mut pushes: Vec<_> = rig
        .take_sent()
        .into_iter()
        .filter_map(|(to, b)| match b {
            PeerBody::Push { object, version, deleted, over, .. } => {
                Some((to, object, version, deleted, over))
            }
            _ => None,
        })
        .collect();
    pushes.sort();
    let lacking = (OsdId(2), object(0), version(5, 1), false, Some(Version::ZERO));
    let extra = (OsdId(3), object(1), Version::ZERO, true, Some(version(5, 9)));
    assert_eq!(pushes, [lacking, extra]);
}

/// osd.1 as a member: it looks when asked, and takes what replaces a bad copy, but not over what came later.
#[test]
fn a_member_takes_a_replacement_only_for_what_was_found() {
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    rig.interval(10, &[2, 1, 3], vec![past(5, &[2, 1, 3])]);
    rig.hear(2, PeerBody::Query);
    rig.hear(2, PeerBody::Activate { page: 0, missing: Vec::new(), last: true });
    rig.take_sent();
    rig.hear(2, PeerBody::ScrubRead { tid: 7, range: ScrubRange::After(None), deep: true });
    rig.answer_object(Err(unreadable(0)));
    let (_, answer) = rig.take_sent().pop().expect("answers");
    assert_eq!(answer, PeerBody::ScrubInfo { tid: 7, entries: vec![rotten(0, version(5, 1))], last: true });
    let c = content(1);
    let image = PieceImage { same: 0, extents: c.extents, end: 2, bad: Vec::new() };
    let push = |version, over| {
        let piece = Some(image.clone());
        PeerBody::Push { tid: 8, object: object(0), version, deleted: false, over, piece }
    };
    let replaced = |rig: &Rig| rig.ops().filter(|op| matches!(op, TxnOp::Assemble { .. })).count();
    rig.hear_data(2, push(version(5, 1), None), c.data.clone());
    assert_eq!(replaced(&rig), 0, "without a finding it has it already");
    rig.hear_data(2, push(version(5, 1), Some(version(5, 1))), c.data.clone());
    assert_eq!(replaced(&rig), 1);
    let w = content(2);
    let write = SubWriteKind::Write { extents: w.extents };
    let body =
        PeerBody::SubWrite { tid: 9, object: object(0), version: version(10, 1), prev: version(5, 1), write };
    rig.hear_data(2, body, w.data);
    rig.hear_data(2, push(version(5, 1), Some(version(5, 1))), c.data.clone());
    assert_eq!(replaced(&rig), 1, "a late one must not undo a write");
}

/// Members answer as far as they like; nothing between is taken for lacking.
#[test]
fn pages_are_judged_as_far_as_everybody_has_answered() {
    let objects: Vec<(u32, Version)> = (0..70).map(|n| (n, version(5, 1))).collect();
    let mut rig = Rig::active(&objects, &[1, 2]);
    rig.order(1, false);
    for _ in 0..3 {
        if rig.report().is_some() {
            break;
        }
        let (tid, range, _) = rig.question();
        let ScrubRange::After(after) = range else { panic!("in order") };
        let first = after.map_or(0, |o| o.index + 1);
        rig.own_copies(version(5, 1));
        let entries: Vec<_> = (first..70).take(40).map(|n| copy(n, version(5, 1))).collect();
        let last = entries.last().is_some_and(|e| e.object.index == 69);
        rig.hear(2, PeerBody::ScrubInfo { tid, entries, last });
    }
    let report = rig.report().expect("reported");
    assert_eq!((report.objects, report.findings), (70, 0));
}

/// One OSD reads no more than it may, for whomever.
#[test]
fn reads_keep_to_the_rate() {
    let objects: Vec<(u32, Version)> = (0..200).map(|n| (n, version(5, 1))).collect();
    let mut rig = Rig::active(&objects, &[1, 2]);
    rig.step(Event::Scrub { orders: Vec::new(), rate_bytes_per_s: 1 << 20 });
    rig.order(1, true);
    rig.step(Event::Scrub { orders: Vec::new(), rate_bytes_per_s: 1 << 20 });
    let mut read = 0;
    for _ in 0..300 {
        while let Some((token, o)) = rig.object_reads.pop_front() {
            read += 1;
            let whole = Content::data(0, vec![1; 1 << 20].into());
            let _ = o;
            rig.step(Event::ObjectRead { token, result: Ok((state(version(5, 1)), whole)) });
        }
        if rig.sent.iter().any(|(_, b)| matches!(b, PeerBody::ScrubRead { .. })) {
            let (tid, range, _) = rig.question();
            let ScrubRange::After(after) = range else { panic!("in order") };
            let first = after.map_or(0, |o| o.index + 1);
            let digest = digest_of(&Content::data(0, vec![1; 1 << 20].into()));
            let entries: Vec<_> =
                (first..200).take(4).map(|n| ScrubEntry { digest, ..copy(n, version(5, 1)) }).collect();
            let last = entries.last().is_some_and(|e| e.object.index == 199);
            rig.hear(2, PeerBody::ScrubInfo { tid, entries, last });
        }
        rig.tick(100);
    }
    assert!((29..=32).contains(&read), "{read} MiB in 30 s at 1 MiB/s");
}

/// Four members of a 2+2 group with an object of two blocks, and a deep scrub that is about to compare their shards.
fn four_shards() -> (Rig, BTreeMap<u8, Rows>) {
    let (mut rig, shards) = Rig::two_and_two([1, 2]);
    rig.order(1, true);
    let entry = |version| ScrubEntry { digest: 0, ..copy(0, version) };
    rig.own_copies(version(5, 1));
    (2..=4).for_each(|o| rig.tell_copies(o, &[entry(version(5, 1))]));
    (rig, shards)
}

fn shard(shards: &BTreeMap<u8, Rows>, n: u8) -> Content {
    sparse_content((0..).zip(shards[&n].iter().cloned()))
}

/// Everybody who was asked answers; some shards are others than they should be, though they match their checksums.
fn tell_shards(rig: &mut Rig, shards: &BTreeMap<u8, Rows>, asked: &[(OsdId, u64)], wrong: &[u8]) {
    rig.answer_read(Ok(shard(shards, 0)));
    for (to, tid) in asked {
        let n = (to.0 - 1) as u8;
        let told = if wrong.contains(&n) { content(77 + n) } else { shard(shards, n) };
        rig.hear_data(to.0, PeerBody::ShardData { tid: *tid, result: Ok(told.extents) }, told.data);
    }
}

/// Shard 2 is not what the others give: it is computed anew.
#[test]
fn a_wrong_shard_is_computed_from_the_others() {
    let (mut rig, shards) = four_shards();
    // All shards are read, then those that the wrong one is computed from.
    let asked = rig.asked_for_shards();
    assert_eq!(asked.len(), 3, "{asked:?}");
    tell_shards(&mut rig, &shards, &asked, &[2]);
    let asked = rig.asked_for_shards();
    assert!(asked.len() == 1 && asked[0].0 != OsdId(3), "not from itself: {asked:?}");
    tell_shards(&mut rig, &shards, &asked, &[]);
    let pushed = rig.take_sent().into_iter().find_map(|(to, b)| match b {
        PeerBody::Push { tid, piece, over, .. } => Some((to, tid, piece?.extents, over)),
        _ => None,
    });
    let (to, tid, extents, over) = pushed.expect("pushes");
    assert_eq!((to, over, extents), (OsdId(3), Some(version(5, 1)), shard(&shards, 2).extents));
    rig.hear(3, PeerBody::PushAck { tid, result: SubResult::Ok });
    rig.tick(100);
    let report = rig.report().expect("reported");
    assert_eq!((report.findings, report.repaired, report.damaged_objects), (1, 1, 0));
}

/// Of shards that do not fit, decoded bytes are others than those that are held: a late disk does not decide which are shown.
#[test]
fn of_shards_that_do_not_fit_reads_see_what_is_held() {
    let (mut rig, shards) = four_shards();
    let asked = rig.asked_for_shards();
    tell_shards(&mut rig, &shards, &asked, &[2, 3]);
    rig.tick(100);
    assert_eq!(rig.report().expect("reported").damaged, [(object(0), Damage::Inconsistent)]);
    let read = rig.read(0, 1);
    let asked = rig.asked_for_shards();
    assert_eq!(asked.iter().map(|(to, _)| to.0).collect::<Vec<_>>(), [2]);
    rig.tick(150);
    assert_eq!((rig.asked_for_shards(), rig.reads.len()), (vec![], 0));
    let held = shard(&shards, 1);
    rig.hear_data(2, PeerBody::ShardData { tid: asked[0].1, result: Ok(held.extents) }, held.data);
    assert!(matches!(rig.reply(read), Some(OpReply::Data { .. })));
}
