//! Objects of removed volumes go, wherever they are met and whenever they come.

use super::*;

fn foreign(volume: u64, index: u32) -> ObjectId {
    ObjectId { volume: VolumeId(volume), index, layer: LayerId(2) }
}

fn purged(rig: &mut Rig) -> Vec<ObjectId> {
    let purge = |op: &TxnOp| match op {
        TxnOp::Purge { object } => Some(*object),
        _ => None,
    };
    let out = rig.ops().filter_map(purge).collect();
    rig.commits.clear();
    out
}

fn member() -> Rig {
    let mut rig = Rig::new(&[]);
    let state = ObjectState { version: version(5, 1), deleted: false, pending: None };
    for (volume, objects) in [(1, 3), (2, 70), (3, 2), (u64::MAX, 2)] {
        rig.listing.objects.extend((0..objects).map(|n| (foreign(volume, n), state)));
    }
    rig.listing.missing.push((foreign(4, 0), Needed::certain(version(5, 2), false)));
    rig.interval(10, &[2, 1], vec![past(5, &[2, 1])]);
    rig.hear(2, PeerBody::Query);
    rig
}

/// An active one that has purged volume 3.
fn purged_member() -> Rig {
    let mut rig = member();
    rig.hear(2, PeerBody::Activate { page: 0, missing: Vec::new(), last: true });
    purges(&mut rig);
    rig
}

/// Volume 3 is removed, and it hears of that.
fn purges(rig: &mut Rig) {
    rig.map.epoch = Epoch(11);
    rig.map.removed_volumes = [VolumeId(3)].into();
    rig.publish();
    for _ in 0..3 {
        rig.tick(100);
    }
    assert_eq!(purged(rig).len(), 2);
}

#[test]
fn only_removed_volumes_are_purged_and_all_of_them() {
    let mut rig = member();
    rig.tick(100);
    assert!(purged(&mut rig).is_empty());
    rig.map.epoch = Epoch(11);
    rig.map.removed_volumes = [2, 4, 9, u64::MAX].map(VolumeId).into();
    rig.publish();
    for _ in 0..3 {
        rig.tick(100);
    }
    let mut gone = purged(&mut rig);
    gone.sort();
    let want = (0..70).map(|n| foreign(2, n)).chain([foreign(4, 0)]);
    assert_eq!(gone, want.chain((0..2).map(|n| foreign(u64::MAX, n))).collect::<Vec<_>>());
    // One more volume: only that is looked for, and found.
    rig.map.epoch = Epoch(12);
    rig.map.removed_volumes.insert(VolumeId(3));
    rig.publish();
    rig.tick(100);
    assert_eq!(purged(&mut rig), [foreign(3, 0), foreign(3, 1)]);
}

/// The primary has not heard of the removal.
#[test]
fn a_late_write_to_a_removed_volume_is_purged_again() {
    let mut rig = purged_member();
    let write = SubWriteKind::Zero { first_block: 0, block_count: 1, discard: false };
    let (object, prev) = (foreign(3, 0), Version::ZERO);
    rig.hear(2, PeerBody::SubWrite { tid: 1, object, version: version(10, 1), prev, write });
    rig.tick(100);
    assert_eq!(purged(&mut rig), [object]);
}

/// Others still have the object, and this member should.
#[test]
fn what_an_activation_names_of_a_removed_volume_is_purged_again() {
    let mut rig = member();
    purges(&mut rig);
    let lacks = foreign(3, 5);
    let entry = ObjectEntry { missing: true, ..ObjectEntry::here(lacks, version(5, 1), false) };
    rig.hear(2, PeerBody::Activate { page: 0, missing: vec![entry], last: true });
    rig.tick(100);
    assert_eq!(purged(&mut rig), [lacks]);
}

/// Its blocks may have been purged before they were read: what lies below is not what the snapshot held.
#[test]
fn a_read_of_a_layer_that_is_removed_meanwhile_says_so() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    let read = rig.read(0, 5);
    rig.map.epoch = Epoch(11);
    rig.map.removed_volumes.insert(VOLUME);
    rig.publish();
    rig.answer_read(Ok(Content::default()));
    assert_eq!(rig.reply(read), Some(&OpReply::Failed(gabion_proto::msg::OpError::Removed)));
}

/// It had the object until it heard of the removal, before the write came that the primary had sent earlier.
#[test]
fn a_write_of_what_was_purged_is_answered() {
    let mut rig = purged_member();
    let write = SubWriteKind::Zero { first_block: 0, block_count: 1, discard: false };
    let (object, prev) = (foreign(3, 0), version(5, 1));
    rig.take_sent();
    rig.hear(2, PeerBody::SubWrite { tid: 7, object, version: version(10, 1), prev, write: write.clone() });
    let acked = |rig: &mut Rig| {
        rig.take_sent().contains(&(OsdId(2), PeerBody::SubWriteAck { tid: 7, result: SubResult::Ok }))
    };
    assert!(acked(&mut rig), "the primary waits for ever, and every fence with it");
    // Of what is still there a predecessor is waited for.
    let object = foreign(1, 0);
    rig.hear(2, PeerBody::SubWrite { tid: 7, object, version: version(10, 3), prev: version(10, 2), write });
    assert!(!acked(&mut rig));
}

/// Shards: the rows came after the purge.
#[test]
fn a_read_of_shards_that_are_removed_meanwhile_says_so() {
    let (mut rig, shards) = Rig::two_and_two([1, 2]);
    let read =
        rig.client(0, OpKind::Read { first_block: 0, block_count: 1, below: Vec::new() }, Bytes::new());
    rig.map.epoch = Epoch(11);
    rig.map.removed_volumes.insert(VOLUME);
    rig.publish();
    rig.answer_read(Ok(crate::erasure::sparse_content((0..).zip(shards[&0].iter().cloned()))));
    assert_eq!(rig.reply(read), Some(&OpReply::Failed(gabion_proto::msg::OpError::Removed)));
}
