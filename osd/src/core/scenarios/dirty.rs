//! Reads must not return what only this OSD has (rule P5).

use super::*;

fn sub_writes(rig: &mut Rig) -> Vec<u64> {
    let tid = |(_, body)| match body {
        PeerBody::SubWrite { tid, .. } => Some(tid),
        _ => None,
    };
    rig.take_sent().into_iter().filter_map(tid).collect()
}

/// The store makes good on its contract when a read returns what was made durable after it was started: that may be a write
/// that no other member has, and that a new interval rolls back. Found by the model of the protocol.
#[test]
fn a_write_waits_for_a_read_of_the_same_blocks() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2]);
    let read = rig.read(0, 0);
    assert_eq!(rig.reads.len(), 1, "the read is under way");
    let commits = rig.commits.len();
    let write = rig.write(0, 0);
    assert!(
        sub_writes(&mut rig).is_empty() && rig.commits.len() == commits,
        "nothing may be durable here yet"
    );
    rig.answer_read(Ok(Content::default()));
    assert!(matches!(rig.reply(read), Some(OpReply::Data { .. })));
    for tid in sub_writes(&mut rig) {
        rig.hear(2, PeerBody::SubWriteAck { tid, result: SubResult::Ok });
    }
    assert!(matches!(rig.reply(write), Some(OpReply::Done { .. })), "it goes on without a timer");
}

/// A clone or a snapshot reads through layers: what is written in one of them may show.
#[test]
fn layers_do_not_matter() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2]);
    let below = vec![object(0).layer];
    let kind = OpKind::Read { first_block: 0, block_count: 2, below };
    rig.client_of(0, LayerId(1), kind, Bytes::new());
    assert_eq!(rig.reads.len(), 1);
    rig.write(0, 1);
    assert!(sub_writes(&mut rig).is_empty());
    rig.answer_read(Ok(Content::default()));
    assert_eq!(sub_writes(&mut rig).len(), 1);
}

#[test]
fn other_blocks_do_not_wait() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2]);
    rig.read(0, 0);
    rig.write(0, 1);
    assert_eq!(sub_writes(&mut rig).len(), 1);
    let gone = rig.read(0, 2);
    rig.step(Event::ClientGone { token: gone });
    rig.write(0, 2);
    assert_eq!(sub_writes(&mut rig).len(), 1, "nobody hears of that read any more");
}
