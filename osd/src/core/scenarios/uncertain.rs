//! Writes that were not acknowledged when their interval ended: forward, or back, but never lost between the two.

use super::*;

/// osd.1 is R1 of a group {P=osd.4, R1, R2=osd.2} of interval 4, then of {P, R1} in interval 5, which rolled
/// forward what only P held. P's disk is gone before R1 has it.
fn survivors(needed: Needed, theirs: ObjectEntry) -> Rig {
    let mut rig = Rig::new(&[(0, version(3, 1))]);
    rig.listing.missing.push((object(0), needed));
    rig.map.osds.get_mut(&OsdId(4)).unwrap().up = false;
    rig.interval(10, &[1, 2], vec![past(4, &[4, 1, 2]), past(5, &[4, 1])]);
    rig.tells(2, 4, &[theirs]);
    rig.activates(2);
    rig
}

fn uncertain(version: Version, lowest: Version) -> Needed {
    Needed { uncertain: Some(lowest), ..Needed::certain(version, false) }
}

pub(super) fn unfound(rig: &Rig) -> u64 {
    rig.core.pg_statuses()[0].unfound_objects
}

pub(super) fn activated_with(rig: &Rig) -> Vec<ObjectEntry> {
    let missing = |b: &PeerBody| match b {
        PeerBody::Activate { missing, .. } => Some(missing.clone()),
        _ => None,
    };
    rig.sent.iter().filter_map(|(_, b)| missing(b)).flatten().collect()
}

#[test]
fn a_lost_write_that_nobody_acknowledged_goes_back() {
    let mut rig = survivors(uncertain(version(4, 1), version(3, 1)), has(0, version(3, 1)));
    assert_eq!(unfound(&rig), 0);
    let read = rig.read(0, 0);
    rig.answer_read(Ok(Content::default()));
    assert!(matches!(rig.reply(read), Some(OpReply::Data { .. })), "both have the old state");
    assert!(rig.reports.contains(&MonitorRequest::Clean { pg: PG, interval: Epoch(10) }));
}

/// A member that was further than the slowest one: the newest state left is taken, and stays uncertain.
#[test]
fn it_goes_back_no_further_than_it_must() {
    let rig = survivors(uncertain(version(4, 9), version(3, 1)), has(0, version(4, 8)));
    assert_eq!(unfound(&rig), 0);
    let own: Vec<&TxnOp> = rig.ops().filter(|op| matches!(op, TxnOp::AddMissing { .. })).collect();
    let needed = uncertain(version(4, 8), version(3, 1));
    assert_eq!(own, [&TxnOp::AddMissing { object: object(0), needed }]);
}

/// A write that created the object: there is nothing to go back to but nothing.
#[test]
fn a_lost_object_that_nobody_acknowledged_never_was() {
    let mut rig = Rig::new(&[]);
    rig.listing.missing.push((object(0), uncertain(version(4, 1), Version::ZERO)));
    rig.map.osds.get_mut(&OsdId(4)).unwrap().up = false;
    rig.interval(10, &[1, 2], vec![past(4, &[4, 1, 2]), past(5, &[4, 1])]);
    rig.tells(2, 4, &[]);
    rig.activates(2);
    assert_eq!(unfound(&rig), 0);
    rig.read(0, 0);
    assert_eq!(rig.reads.len(), 1);
}

/// The only copy of a write that nobody was told of cannot be read: it is noted as lost, and the monitors are asked for an interval,
/// which goes back to what the others have.
#[test]
fn the_last_copy_of_a_doubtful_write_may_rot() {
    let mut rig = Rig::new(&[(0, version(5, 2))]);
    rig.interval(10, &[1, 2, 3], vec![past(5, &[1, 2, 3])]);
    let tell = |rig: &mut Rig, activated| {
        for o in [2, 3] {
            rig.tells(o, activated, &[has(0, version(5, 1))]);
        }
        rig.activates(2);
        rig.activates(3);
    };
    tell(&mut rig, 5);
    rig.commits.clear();
    let bad = StoreError::Unreadable { object: object(0), block: 0, why: "test".into(), rest: None };
    rig.answer_object(Err(bad));
    let needed = uncertain(version(5, 2), version(5, 1));
    assert_eq!(rig.commits, [[TxnOp::AddMissing { object: object(0), needed }]]);
    assert_eq!(
        rig.core.stuck_peers().iter().map(|s| s.peer).collect::<Vec<_>>(),
        [1],
        "a new interval is needed"
    );
    rig.listing.missing.push((object(0), needed));
    rig.interval(11, &[1, 2, 3], vec![past(10, &[1, 2, 3])]);
    let lacks = ObjectEntry { missing: true, uncertain: needed.uncertain, ..has(0, version(5, 2)) };
    let lacks = ObjectEntry { held: Some((version(5, 1), false)), ..lacks };
    for o in [2, 3] {
        rig.tells(o, 10, &[lacks]);
        rig.take_sent();
    }
    rig.activates(2);
    rig.activates(3);
    assert_eq!(unfound(&rig), 0);
    // What is here of it cannot be read, so nothing of it stays.
    rig.answer_object(Err(StoreError::Unreadable {
        object: object(0),
        block: 0,
        why: "test".into(),
        rest: None,
    }));
    let pulls =
        rig.sent.iter().any(|(_, b)| matches!(b, PeerBody::Pull { version: v, .. } if *v == version(5, 1)));
    assert!(pulls, "what the others have");
}

/// Without the mark the lost version may have been acknowledged.
#[test]
fn a_certain_version_is_never_given_up() {
    let mut rig = survivors(Needed::certain(version(4, 1), false), has(0, version(3, 1)));
    assert_eq!(unfound(&rig), 1);
    rig.read(0, 0);
    assert!(rig.reads.is_empty());
}

/// osd.2 comes from an interval that the history left behind, with a write that was rolled back.
#[test]
fn a_version_outside_the_history_is_not_gone_back_to() {
    let mut rig = Rig::new(&[]);
    rig.listing.missing.push((object(0), uncertain(version(4, 1), version(2, 1))));
    rig.map.osds.get_mut(&OsdId(4)).unwrap().up = false;
    rig.interval(10, &[1, 2], vec![past(4, &[4, 3]), past(5, &[4, 1])]);
    rig.tells(3, 4, &[]);
    rig.tells(2, 3, &[has(0, version(3, 7))]);
    rig.activates(2);
    assert_eq!(unfound(&rig), 1);
    assert!(activated_with(&rig).iter().all(|e| e.version == version(4, 1)));
}

/// Only members that do not act any more hold what shows that the write was not acknowledged.
#[test]
fn a_member_of_the_past_raises_the_doubt() {
    let mut rig = Rig::new(&[(0, version(5, 2))]);
    rig.interval(10, &[1, 3], vec![past(5, &[1, 2, 4])]);
    rig.tells(2, 5, &[has(0, version(5, 1))]);
    rig.tells(4, 5, &[has(0, version(5, 1))]);
    rig.tells(3, 0, &[]);
    let told = activated_with(&rig);
    assert_eq!(told.iter().map(|e| e.uncertain).collect::<Vec<_>>(), [Some(version(5, 1))]);
    rig.activates(3);
    waits_for_the_push(&mut rig, 3);
}

fn waits_for_the_push(rig: &mut Rig, to: u32) {
    let read = rig.read(0, 0);
    assert!(rig.reads.is_empty(), "is on one disk and may yet go back");
    let state = ObjectState { version: version(5, 2), deleted: false, pending: None };
    rig.answer_object(Ok((state, Content::default())));
    let tid = rig.sent.iter().find_map(|(_, b)| match b {
        PeerBody::Push { tid, .. } => Some(*tid),
        _ => None,
    });
    rig.hear(to, PeerBody::PushAck { tid: tid.expect("pushes"), result: SubResult::Ok });
    rig.answer_read(Ok(Content::default()));
    assert!(matches!(rig.reply(read), Some(OpReply::Data { .. })));
}

/// The doubt of an earlier interval is known from a member's missing map only.
#[test]
fn the_doubt_outlives_the_interval() {
    let mut rig = Rig::new(&[(0, version(5, 2))]);
    rig.interval(10, &[1, 2], vec![past(5, &[1, 2])]);
    let missing = ObjectEntry {
        missing: true,
        uncertain: Some(version(4, 1)),
        held: Some((version(4, 1), false)),
        ..has(0, version(5, 2))
    };
    rig.tells(2, 5, &[missing]);
    assert_eq!(activated_with(&rig)[0].uncertain, Some(version(4, 1)));
    rig.activates(2);
    waits_for_the_push(&mut rig, 2);
}

#[test]
fn uncertain_objects_are_recovered_first() {
    let held: Vec<(u32, Version)> = (0..40).map(|n| (n, version(5, 2))).collect();
    let mut rig = Rig::new(&held);
    rig.interval(10, &[1, 2], vec![past(5, &[1, 2])]);
    let all: Vec<ObjectEntry> = held
        .iter()
        .map(|(n, v)| ObjectEntry { missing: true, uncertain: None, ..has(*n, *v) })
        .map(|e| if e.object == object(39) { has(39, version(5, 1)) } else { e })
        .collect();
    rig.tells(2, 5, &all);
    rig.activates(2);
    assert_eq!(rig.object_reads.front().map(|(_, o)| *o), Some(object(39)));
}

/// What a member is told it keeps, and says again, with what it still holds.
#[test]
fn a_member_keeps_the_mark() {
    let mut rig = Rig::new(&[(0, version(3, 1))]);
    rig.interval(10, &[2, 1], vec![past(5, &[2, 1])]);
    rig.hear(2, PeerBody::Query);
    let entry = ObjectEntry { missing: true, uncertain: Some(version(3, 1)), ..has(0, version(4, 1)) };
    rig.hear(2, PeerBody::Activate { page: 0, missing: vec![entry], last: true });
    let needed = uncertain(version(4, 1), version(3, 1));
    assert!(rig.ops().any(|op| *op == TxnOp::AddMissing { object: object(0), needed }));
    rig.sent.clear();
    rig.hear(2, PeerBody::ListRequest { after: None, parts: gabion_proto::msg::ListParts::ALL });
    let listed = ObjectEntry { held: Some((version(3, 1), false)), ..entry };
    assert!(matches!(&rig.sent[..], [(_, PeerBody::List { entries, .. })] if entries[..] == [listed]));
}

/// Of a pool 2+2 osd.1 holds this shard of the object, w beside b, and was last active in that interval.
fn pending_shard(number: u8, activated: u64, (b, w): (Version, Version)) -> Rig {
    let mut rig = Rig::new(&[]);
    if let Some(pool) = rig.map.pools.get_mut(&PG.pool) {
        (pool.redundancy, pool.min_size) = (Redundancy::Erasure { k: 2, m: 2 }, 3);
    }
    let shard = Some(crate::erasure::ShardId { number, k: 2, m: 2, matrix: crate::erasure::MATRIX });
    let activated = Epoch(activated);
    rig.listing.meta = Some(PgMeta { promised: activated, activated, shard, pg_count: 0 });
    rig.listing.objects = vec![(object(0), ObjectState { version: b, deleted: false, pending: Some(w) })];
    rig
}

/// Shards: osd.1 was away when w, which it holds beside b, was overwritten by v, and was told to obtain v. Who took part in that
/// interval lacks v, so it is w that counts, and osd.1 has it after all: still beside b, and not committed.
#[test]
fn what_it_goes_back_to_may_be_pending() {
    let (b, w, v) = (version(5, 1), version(5, 2), version(7, 1));
    let mut rig = pending_shard(0, 9, (b, w));
    rig.listing.missing = vec![(object(0), uncertain(v, w))];
    rig.interval(11, &[1, 2, 3, 4], vec![past(5, &[1, 2, 3, 4]), past(7, &[2, 3, 4]), past(9, &[1, 2, 3])]);
    for other in [2, 3] {
        rig.tells(other, 9, &[ObjectEntry { base: Some(w), ..has(0, v) }]);
    }
    rig.tells(4, 7, &[has(0, w)]);
    [2, 3, 4].iter().for_each(|o| rig.activates(*o));
    assert!(rig.reports.contains(&MonitorRequest::Clean { pg: PG, interval: Epoch(11) }), "nobody lacks it");
    rig.read(0, 0);
    assert!(rig.newest_read, "or b would be read");
    // What is written next is based on w, which is committed with it.
    rig.answer_read(Ok(Content::default()));
    rig.commits.clear();
    let content = Content::data(0, vec![3; 8192].into());
    rig.client(0, OpKind::Write { extents: content.extents }, content.data);
    let ops: Vec<&TxnOp> = rig.ops().collect();
    assert!(ops.iter().any(|op| **op == TxnOp::CommitPending { object: object(0), version: w }), "{ops:?}");
    assert!(ops.iter().any(|op| matches!(op, TxnOp::Prepare { base, .. } if *base == w)), "{ops:?}");
}

/// Shards: a member that holds w beside b is brought v, which may have to go back to w. Then w is what stays, and is certain: every member had it.
/// Of its four shards b would be the only thing left here.
#[test]
fn what_it_may_go_back_to_stays_when_it_is_pending() {
    let (b, w, v) = (version(5, 1), version(5, 2), version(7, 1));
    let mut rig = pending_shard(1, 5, (b, w));
    rig.interval(11, &[2, 1, 3, 4], vec![past(5, &[2, 1, 3, 4]), past(7, &[2, 3, 4])]);
    rig.hear(2, PeerBody::Query);
    let lacks = ObjectEntry { missing: true, uncertain: Some(w), ..has(0, v) };
    rig.hear(2, PeerBody::Activate { page: 0, missing: vec![lacks], last: true });
    rig.commits.clear();
    rig.take_sent();
    let (object, over) = (object(0), None);
    let content = Content::data(0, vec![3; 4096].into());
    let piece = PieceImage { same: 0, extents: content.extents, end: 1, bad: Vec::new() };
    let push = PeerBody::Push { tid: 9, object, version: v, deleted: false, over, piece: Some(piece) };
    rig.hear_data(2, push, content.data);
    let acknowledged = (OsdId(2), PeerBody::PushAck { tid: 9, result: SubResult::Ok });
    assert_eq!(rig.take_sent(), [acknowledged]);
    let ops: Vec<&TxnOp> = rig.ops().collect();
    assert_eq!(ops[0], &TxnOp::CommitPending { object, version: w });
    assert!(matches!(ops[1], TxnOp::Prepare { base, version, .. } if (*base, *version) == (w, v)), "{ops:?}");
}
