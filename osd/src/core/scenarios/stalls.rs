//! Recovery beside clients brings one object of a group at a time. What waits for an answer that was lost, or for who is slow, holds nothing
//! else up; it stays under way, once, and clients' writes of it wait.

use super::*;
use crate::core::pg::test_pieces::PIECE;

const LIMIT: u64 = 32 << 20;

fn pulls(rig: &mut Rig) -> Vec<(u32, u64, ObjectId, u32)> {
    let pull = |(to, b): (OsdId, PeerBody)| match b {
        PeerBody::Pull { tid, object, first_block, .. } => Some((to.0, tid, object, first_block)),
        _ => None,
    };
    rig.take_sent().into_iter().filter_map(pull).collect()
}

/// Offers that were sent: to whom, under which number, of what, and whether with a piece.
fn offers(rig: &mut Rig) -> Vec<(u32, u64, ObjectId, bool)> {
    let offer = |(to, b): (OsdId, PeerBody)| match b {
        PeerBody::Push { tid, object, piece, .. } => Some((to.0, tid, object, piece.is_some())),
        _ => None,
    };
    rig.take_sent().into_iter().filter_map(offer).collect()
}

/// osd.1 leads `acting` and has these objects in each of so many groups; osd.2 has none. Recovery is limited, and has begun.
fn bringing(objects: u32, acting: &[u32], groups: u32) -> Rig {
    let held: Vec<(u32, Version)> = (0..objects).map(|n| (n, version(5, 1))).collect();
    let mut rig = Rig::new(&held);
    let pool = rig.map.pools.get_mut(&PG.pool).unwrap();
    (pool.redundancy, pool.pg_count) = (Redundancy::Replicated { size: acting.len() as u32 }, groups);
    rig.step(Event::RebuildLimit { bytes_per_s: LIMIT });
    rig.interval(10, acting, vec![past(5, &[1, 3])]);
    let entries: Vec<ObjectEntry> = held.iter().map(|(o, v)| has(*o, *v)).collect();
    for index in 0..groups {
        rig.pg.index = index;
        rig.tells(2, 0, &[]);
        acting[2..].iter().for_each(|o| rig.tells(*o, 5, &entries));
        acting[1..].iter().for_each(|o| rig.activates(*o));
    }
    rig.take_sent();
    rig.tick(100);
    rig
}

/// The own disk gives what is read, of one piece each.
fn give_own(rig: &mut Rig) -> usize {
    let state = ObjectState { version: version(5, 1), deleted: false, pending: None };
    let count = rig.object_reads.len();
    (0..count).for_each(|_| rig.answer_object(Ok((state, Content::zero(0, 1)))));
    count
}

fn degraded(rig: &Rig) -> u64 {
    rig.core.pg_statuses().iter().map(|s| s.degraded_objects).sum()
}

#[test]
fn a_push_that_is_lost_holds_up_nothing_else() {
    let mut rig = bringing(6, &[1, 2], 1);
    assert_eq!(give_own(&mut rig), 1, "one at a time");
    let [(2, lost, _, true)] = offers(&mut rig)[..] else { panic!("an offer with its piece") };
    rig.tick(200);
    assert_eq!(rig.object_reads.len(), 0, "it may still be answered");
    rig.tick(100);
    // All others come, one at a time.
    for left in (1..6).rev() {
        assert_eq!((give_own(&mut rig), degraded(&rig)), (1, left + 1));
        let sent = offers(&mut rig);
        let (_, tid, ..) = sent.iter().find(|(_, tid, ..)| *tid != lost).expect("another one");
        rig.hear(2, PeerBody::PushAck { tid: *tid, result: SubResult::Ok });
        rig.tick(10);
    }
    assert_eq!(degraded(&rig), 1);
    // And that one is still under way, once: whoever answers late has not answered in vain.
    assert_eq!(rig.object_reads.len(), 0);
    rig.hear(2, PeerBody::PushAck { tid: lost, result: SubResult::Ok });
    rig.hear(2, PeerBody::PushAck { tid: lost, result: SubResult::Ok });
    assert_eq!(degraded(&rig), 0);
}

/// All groups of an OSD share what may be moving.
#[test]
fn a_push_that_is_lost_does_not_hold_up_other_groups() {
    let mut rig = bringing(1, &[1, 2], 2);
    assert_eq!((give_own(&mut rig), offers(&mut rig).len()), (1, 1));
    rig.tick(200);
    assert_eq!(rig.object_reads.len(), 0, "more would be before clients' operations");
    rig.tick(100);
    assert_eq!(rig.object_reads.len(), 1);
}

/// Who answers nothing at all must not get more and more, whatever the number of groups.
#[test]
fn who_is_silent_gets_no_more_than_a_few() {
    let mut rig = bringing(20, &[1, 2], 8);
    let mut offered = 0;
    for _ in 0..50 {
        give_own(&mut rig);
        offered += offers(&mut rig).iter().filter(|(.., piece)| *piece).count();
        rig.tick(100);
    }
    assert!((2..=5).contains(&offered), "{offered}");
}

/// More at once would make it slower still.
#[test]
fn the_own_disk_is_waited_for() {
    let mut rig = bringing(6, &[1, 2], 1);
    (0..50).for_each(|_| rig.tick(100));
    assert_eq!(rig.object_reads.len(), 1);
    // Nor is one late that has not got its piece yet.
    give_own(&mut rig);
    let [(_, tid, object, _)] = offers(&mut rig)[..] else { panic!("an offer") };
    let ask = PeerBody::Pull { tid, object, version: version(5, 1), first_block: PIECE, have: Vec::new() };
    rig.hear(2, ask);
    (0..20).for_each(|_| rig.tick(100));
    assert_eq!(rig.object_reads.len(), 1);
}

/// Rule P4b: what is stalled is under way all the same.
#[test]
fn a_write_waits_for_what_is_stalled() {
    let mut rig = bringing(2, &[1, 2, 3], 1);
    give_own(&mut rig);
    let [(_, tid, object, _)] = offers(&mut rig)[..] else { panic!("an offer") };
    (0..5).for_each(|_| rig.tick(100));
    let client = rig.write(object.index, 0);
    let sub_write =
        |(_, b): &(OsdId, PeerBody)| matches!(b, PeerBody::SubWrite { object: o, .. } if *o == object);
    assert!(!rig.sent.iter().any(sub_write) && rig.reply(client).is_none());
    rig.hear(2, PeerBody::PushAck { tid, result: SubResult::Ok });
    let parts = rig.take_sent().into_iter().filter(sub_write).map(|(to, _)| to.0).collect::<Vec<_>>();
    assert_eq!(parts, [2, 3]);
}

/// The offer, or its answer: a member takes an object once, and says that it has it.
#[test]
fn an_offer_that_is_not_answered_is_made_again() {
    let mut rig = bringing(1, &[1, 2], 1);
    give_own(&mut rig);
    let [(2, tid, object, true)] = offers(&mut rig)[..] else { panic!("an offer with its piece") };
    let mut again = Vec::new();
    for _ in 0..40 {
        rig.tick(100);
        again.extend(offers(&mut rig).into_iter().map(|offer| (rig.now, offer)));
    }
    let expected: Vec<_> = [1_100, 2_100, 4_100].map(|at| (at, (2, tid, object, false))).into();
    assert_eq!(again, expected);
    rig.hear(2, PeerBody::Pull { tid, object, version: version(5, 1), first_block: 0, have: Vec::new() });
    assert_eq!(give_own(&mut rig), 1, "the piece that it did not get");
    rig.hear(2, PeerBody::PushAck { tid, result: SubResult::Ok });
    assert_eq!(degraded(&rig), 0);
}

#[test]
fn a_member_that_has_what_is_offered_again_says_so() {
    let mut rig = Rig::new(&[]);
    rig.interval(10, &[2, 1, 3], vec![past(5, &[2, 3])]);
    rig.hear(2, PeerBody::Query);
    let missing = vec![ObjectEntry { missing: true, ..has(0, version(5, 1)) }];
    rig.hear(2, PeerBody::Activate { page: 0, missing, last: true });
    let (object, version, over) = (object(0), version(5, 1), None);
    let piece = Content::zero(0, 1);
    let first = PieceImage { same: 0, extents: piece.extents, end: 1, bad: Vec::new() };
    let offer = |piece| PeerBody::Push { tid: 9, object, version, deleted: false, over, piece };
    rig.hear(2, offer(Some(first)));
    rig.take_sent();
    rig.hear(2, offer(None));
    let ack = PeerBody::PushAck { tid: 9, result: SubResult::Ok };
    assert_eq!(rig.take_sent(), [(OsdId(2), ack)]);
    assert_eq!(rig.ops().filter(|op| matches!(op, TxnOp::Assemble { .. })).count(), 1);
}

/// At the primary: sooner than the source is changed, and what then comes twice is taken once.
#[test]
fn an_own_piece_that_is_lost_is_asked_for_again() {
    let mut rig = Rig::new(&[]);
    rig.interval(10, &[1, 2, 3], vec![past(6, &[2, 3])]);
    let held: Vec<ObjectEntry> = (0..6).map(|n| has(n, version(6, 1))).collect();
    [2, 3].iter().for_each(|o| rig.tells(*o, 6, &held));
    [2, 3].iter().for_each(|o| rig.activates(*o));
    let first = pulls(&mut rig);
    assert_eq!(first.len(), 4);
    let mut again = Vec::new();
    for _ in 0..7 {
        rig.tick(100);
        again.extend(pulls(&mut rig).into_iter().filter(|p| first.contains(p)));
    }
    assert_eq!(again, first);
    let (from, tid, object, first_block) = first[0];
    let content = Content::data(0, vec![7; 4096].into());
    for _ in 0..2 {
        let piece = Ok(PieceImage { same: 0, extents: content.extents.clone(), end: 1, bad: Vec::new() });
        let body = PeerBody::PullReply { tid, object, version: version(6, 1), first_block, piece };
        rig.hear_data(from, body, content.data.clone());
    }
    let stored = |op: &&TxnOp| matches!(op, TxnOp::Assemble { object: o, .. } if *o == object);
    assert_eq!((rig.placed.len(), rig.ops().filter(stored).count()), (1, 1));
}

/// Shards that do not come hold up no other object that is to be computed.
#[test]
fn a_shard_that_is_late_holds_up_nothing_else() {
    let held = [(0, version(5, 1)), (1, version(5, 1))];
    let mut rig = Rig::new(&held);
    if let Some(pool) = rig.map.pools.get_mut(&PG.pool) {
        (pool.redundancy, pool.min_size) = (Redundancy::Erasure { k: 2, m: 2 }, 3);
    }
    rig.step(Event::RebuildLimit { bytes_per_s: LIMIT });
    let acting = [1, 2, 3, 4];
    rig.interval(10, &acting, vec![past(5, &[1, 2, 3])]);
    let entries = held.map(|(o, v)| has(o, v));
    [2, 3].iter().for_each(|o| rig.tells(*o, 5, &entries));
    rig.tells(4, 0, &[]);
    acting[1..].iter().for_each(|o| rig.activates(*o));
    rig.take_sent();
    rig.tick(100);
    assert_eq!((rig.reads.len(), rig.asked_for_shards().len()), (1, 1), "of one object");
    rig.tick(350);
    assert_eq!(rig.reads.len(), 1, "the own disk is not passed");
    rig.answer_read(Ok(Content::zero(0, 1)));
    rig.tick(40);
    assert_eq!((rig.reads.len(), rig.asked_for_shards().len()), (1, 1), "of the other one");
}
