//! Layers that a snapshot froze, and layers of which nothing is made any more (rule C6).

use super::*;
use gabion_proto::msg::OpError;

const OLD: LayerId = LayerId(0);
const NEW: LayerId = LayerId(1);

fn freeze(rig: &mut Rig, epoch: u64) {
    rig.map.epoch = Epoch(epoch);
    rig.map.attachments.get_mut(&VOLUME).unwrap().top = NEW;
    rig.publish();
}

fn zero(rig: &mut Rig, layer: LayerId) -> ClientToken {
    rig.client_of(0, layer, OpKind::Zero { first_block: 0, block_count: 1, discard: false }, Bytes::new())
}

fn sent_writes(rig: &mut Rig) -> Vec<(u64, ObjectId)> {
    let write = |(_, body)| match body {
        PeerBody::SubWrite { tid, object, .. } => Some((tid, object)),
        _ => None,
    };
    rig.take_sent().into_iter().filter_map(write).collect()
}

fn acknowledge(rig: &mut Rig) {
    for (tid, _) in sent_writes(rig) {
        rig.hear(2, PeerBody::SubWriteAck { tid, result: SubResult::Ok });
    }
}

#[test]
fn the_holder_writes_its_top_layer_and_no_other() {
    let mut rig = Rig::active(&[], &[1, 2]);
    freeze(&mut rig, 11);
    let late = zero(&mut rig, OLD);
    assert_eq!(rig.reply(late), Some(&OpReply::Failed(OpError::Frozen)));
    assert!(sent_writes(&mut rig).is_empty());
    let now = zero(&mut rig, NEW);
    acknowledge(&mut rig);
    assert!(matches!(rig.reply(now), Some(OpReply::Done { .. })));
    // Frozen is not gone.
    rig.client_of(0, OLD, OpKind::Read { first_block: 0, block_count: 1, below: vec![] }, Bytes::new());
    assert_eq!(rig.reads.len(), 1);
}

#[test]
fn a_layer_that_this_osd_has_not_heard_of_waits_for_the_map() {
    let mut rig = Rig::active(&[], &[1, 2]);
    let early = zero(&mut rig, NEW);
    let again = OpReply::Retry { epoch: Epoch(10), why: RetryWhy::OsdBehind };
    assert_eq!(rig.reply(early), Some(&again));
}

/// Whoever made the snapshot is told that it is in force only then.
#[test]
fn the_freeze_is_in_force_when_older_writes_have_ended() {
    let mut rig = Rig::active(&[], &[1, 2]);
    let write = zero(&mut rig, OLD);
    // Overlaps, and has not started.
    let queued = zero(&mut rig, OLD);
    freeze(&mut rig, 11);
    assert_eq!(rig.core.acked_epoch(), Epoch(10));
    acknowledge(&mut rig);
    assert!(matches!(rig.reply(write), Some(OpReply::Done { .. })));
    assert_eq!(rig.reply(queued), Some(&OpReply::Failed(OpError::Frozen)));
    assert_eq!(rig.core.acked_epoch(), Epoch(11));
}

/// A clone's layers are objects of its root, written under the clone's own attachment.
#[test]
fn a_clone_writes_under_its_own_attachment() {
    let mut rig = Rig::active(&[], &[1, 2]);
    let clone = Attachment {
        generation: Generation(2),
        client: ClientId(7),
        top: NEW,
        ..rig.map.attachments[&VOLUME].clone()
    };
    rig.map.epoch = Epoch(11);
    rig.map.attachments.insert(VolumeId(2), clone);
    rig.map.attachments.get_mut(&VOLUME).unwrap().generation = Generation(3);
    rig.publish();
    let kind = OpKind::Zero { first_block: 0, block_count: 1, discard: false };
    let op = ClientOp {
        epoch: Epoch(11),
        pg: PG,
        client: ClientId(7),
        session: Session(1),
        generation: Generation(2),
        volume: VolumeId(2),
        object: ObjectId { layer: NEW, ..object(0) },
        kind,
    };
    let mut ask = |op: ClientOp, n| {
        rig.step(Event::Client { token: ClientToken(n), op, data: Bytes::new() });
        acknowledge(&mut rig);
        rig.reply(ClientToken(n)).cloned()
    };
    assert!(matches!(ask(op.clone(), 100), Some(OpReply::Done { .. })));
    let roots = ClientOp { object: object(0), ..op.clone() };
    assert_eq!(ask(roots, 101), Some(OpReply::Failed(OpError::Frozen)));
    let foreign = ClientOp { volume: VOLUME, ..op.clone() };
    assert_eq!(ask(foreign, 102), Some(OpReply::Failed(OpError::Fenced)));
    let nobody = ClientOp { volume: VolumeId(3), ..op };
    assert_eq!(ask(nobody, 103), Some(OpReply::Failed(OpError::Fenced)));
}

#[test]
fn removed_layers_are_purged_and_not_read() {
    let mut rig = Rig::new(&[(0, version(5, 1)), (1, version(5, 1))]);
    let upper = ObjectId { layer: NEW, ..object(0) };
    let state = ObjectState { version: version(5, 1), deleted: false, pending: None };
    rig.listing.objects.push((upper, state));
    rig.interval(10, &[1, 2], vec![past(5, &[1, 2])]);
    let entries =
        [has(0, version(5, 1)), has(1, version(5, 1)), ObjectEntry::here(upper, version(5, 1), false)];
    rig.tells(2, 5, &entries);
    rig.activates(2);
    rig.map.epoch = Epoch(11);
    rig.map.removed_layers = [(VOLUME, OLD), (VolumeId(9), NEW)].into();
    rig.publish();
    rig.tick(100);
    let purged: Vec<ObjectId> = rig
        .ops()
        .filter_map(|op| match op {
            TxnOp::Purge { object } => Some(*object),
            _ => None,
        })
        .collect();
    assert_eq!(purged, [object(0), object(1)]);
    let below = vec![OLD];
    let read = rig.client_of(0, NEW, OpKind::Read { first_block: 0, block_count: 1, below }, Bytes::new());
    assert_eq!(rig.reply(read), Some(&OpReply::Failed(OpError::Removed)));
}
