//! Erasure coding: an OSD that held one shard and gets another place.

use super::*;
use crate::erasure::ShardId;

fn shard(number: u8) -> ShardId {
    ShardId { number, k: 2, m: 1, matrix: 1 }
}

/// osd.1 holds shard 1 of an object; the group is clean on others.
fn left_over() -> Rig {
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    rig.map.pools.get_mut(&PG.pool).unwrap().redundancy = Redundancy::Erasure { k: 2, m: 1 };
    rig.listing.meta = Some(PgMeta { shard: Some(shard(1)), ..rig.listing.meta.unwrap() });
    rig
}

fn clean_elsewhere(rig: &mut Rig) {
    rig.interval(10, &[2, 3, 4], Vec::new());
    let record = rig.map.pgs.get_mut(&PG).unwrap();
    (record.activated, record.clean) = (true, true);
    rig.map.epoch = Epoch(11);
    rig.publish();
}

fn offered(rig: &mut Rig) -> Option<(u64, Option<u8>)> {
    rig.take_sent();
    rig.hear(2, PeerBody::Query);
    let info = |(_, body)| match body {
        PeerBody::Info { object_count, shard, .. } => Some((object_count, shard)),
        _ => None,
    };
    rig.take_sent().into_iter().find_map(info)
}

#[test]
fn an_earlier_place_leaves_nothing() {
    let mut rig = left_over();
    rig.interval(12, &[2, 3, 1], Vec::new());
    assert_eq!(offered(&mut rig), Some((0, Some(2))));
}

#[test]
fn a_copy_that_was_deleted_may_be_followed_by_any_other() {
    let mut rig = left_over();
    clean_elsewhere(&mut rig);
    assert!(rig.ops().any(|op| *op == TxnOp::RemovePg));
    rig.interval(12, &[2, 3, 1], Vec::new());
    assert_eq!(offered(&mut rig), Some((0, Some(2))));
}

/// The store reads what was started before after what it was told since: nothing is left, and that would be taken for zeros.
#[test]
fn rows_of_a_copy_that_is_deleted_meanwhile_are_nobodys() {
    let mut rig = left_over();
    rig.interval(10, &[2, 3, 4], vec![past(5, &[2, 1, 3])]);
    let (object, version) = (object(0), version(5, 1));
    rig.hear(2, PeerBody::ShardRead { tid: 7, object, version, first_row: 0, row_count: 1 });
    assert_eq!(rig.reads.len(), 1);
    clean_elsewhere(&mut rig);
    assert!(rig.ops().any(|op| *op == TxnOp::RemovePg));
    rig.take_sent();
    rig.answer_read(Ok(Content::default()));
    assert_eq!(rig.take_sent(), []);
    // Asked again, it says so.
    rig.hear(2, PeerBody::ShardRead { tid: 7, object, version, first_row: 0, row_count: 1 });
    let missing = PeerBody::ShardData { tid: 7, result: Err(SubResult::Missing) };
    assert_eq!(rig.take_sent(), [(OsdId(2), missing)]);
}

/// The blocks of shard 1 would be taken for those of shard 2.
#[test]
fn a_shard_that_the_store_does_not_delete_is_not_offered_as_another_one() {
    let mut rig = left_over();
    rig.refuse_removals = true;
    clean_elsewhere(&mut rig);
    rig.interval(12, &[2, 3, 1], Vec::new());
    assert_eq!(offered(&mut rig), None);
    rig.interval(13, &[2, 3, 1], Vec::new());
    assert_eq!(offered(&mut rig), None, "nor when it is asked once more");
    rig.refuse_removals = false;
    rig.interval(14, &[2, 3, 1], Vec::new());
    assert_eq!(offered(&mut rig), Some((0, Some(2))));
}
