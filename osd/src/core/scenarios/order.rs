//! Reads and writes of the same blocks, one after the other (rule P5).

use super::*;

fn sub_writes(rig: &Rig) -> usize {
    rig.sent.iter().filter(|(_, b)| matches!(b, PeerBody::SubWrite { .. })).count()
}

/// The store may carry the read out after the write: it would show what only this OSD has.
#[test]
fn a_write_waits_for_a_read_of_its_blocks_in_flight() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    let read = rig.read(0, 5);
    let write = rig.write(0, 5);
    let elsewhere = rig.write(1, 5);
    let writes = |rig: &Rig| rig.ops().filter(|op| matches!(op, TxnOp::Write { .. })).count();
    assert_eq!((writes(&rig), sub_writes(&rig)), (1, 2), "only the one to another object");
    rig.answer_read(Ok(Content::default()));
    assert!(matches!(rig.reply(read), Some(OpReply::Data { .. })));
    assert_eq!((writes(&rig), sub_writes(&rig)), (2, 4));
    assert!(rig.reply(write).is_none() && rig.reply(elsewhere).is_none());
}

#[test]
fn other_blocks_are_written_at_once() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    rig.read(0, 5);
    rig.write(0, 6);
    assert_eq!(sub_writes(&rig), 2);
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
