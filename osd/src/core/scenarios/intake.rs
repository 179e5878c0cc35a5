//! Objects come piece by piece, and of an older copy stays what is proven to be the same.

use super::*;
use crate::core::pg::test_pieces::{PIECE, digests};
use gabion_proto::limits::{BLOCK_BYTES, LEAF_BLOCKS};
use gabion_proto::msg::LeafDigest;

const OLD: u64 = 5;
const NEW: u64 = 6;

fn blocks(fill: u8, first: u32, count: u32) -> Content {
    Content::data(first, vec![fill; (count * BLOCK_BYTES) as usize].into())
}

/// osd.1 is a member that has object 0 at an older version, and is offered the newer one.
fn offered() -> Rig {
    let mut rig = Rig::new(&[(0, version(OLD, 1))]);
    rig.interval(10, &[2, 1, 3], vec![past(NEW, &[2, 3])]);
    rig.hear(2, PeerBody::Query);
    let missing = vec![ObjectEntry { missing: true, ..has(0, version(NEW, 1)) }];
    rig.hear(2, PeerBody::Activate { page: 0, missing, last: true });
    rig.take_sent();
    rig.commits.clear();
    let (version, over, piece) = (version(NEW, 1), None, None);
    rig.hear(2, PeerBody::Push { tid: 9, object: object(0), version, deleted: false, over, piece });
    rig
}

/// A piece of the own copy, at a version.
fn own_piece(rig: &mut Rig, version: Version, content: Content) {
    let (token, _) = rig.object_reads.pop_front().expect("the own copy is read");
    let state = ObjectState { version, deleted: false, pending: None };
    rig.step(Event::PieceRead { token, result: Ok(Piece { state, content, end: 2 * PIECE }) });
}

/// What the primary is asked for: first block and digests.
fn asked(rig: &mut Rig) -> Option<(u32, Vec<LeafDigest>)> {
    let pull = |(to, b)| match b {
        PeerBody::Pull { tid: 9, first_block, have, .. } if to == OsdId(2) => Some((first_block, have)),
        _ => None,
    };
    rig.take_sent().into_iter().find_map(pull)
}

fn gives(rig: &mut Rig, first_block: u32, same: u32, content: Content) {
    let piece = Ok(PieceImage { same, extents: content.extents, end: 2 * PIECE, bad: Vec::new() });
    let (object, version) = (object(0), version(NEW, 1));
    rig.hear_data(2, PeerBody::PullReply { tid: 9, object, version, first_block, piece }, content.data);
}

fn acknowledged(rig: &mut Rig) -> Option<SubResult> {
    let ack = |(_, b)| match b {
        PeerBody::PushAck { tid: 9, result } => Some(result),
        _ => None,
    };
    rig.take_sent().into_iter().find_map(ack)
}

#[test]
fn what_is_the_same_stays_and_the_rest_becomes_whole_chunks() {
    let mut rig = offered();
    own_piece(&mut rig, version(OLD, 1), blocks(1, 0, PIECE));
    assert_eq!(asked(&mut rig), Some((0, digests(&blocks(1, 0, PIECE), 0))));
    // The first leaf differs: its chunk is written, of old leaves and the new one.
    gives(&mut rig, 0, !1, blocks(2, 0, LEAF_BLOCKS));
    own_piece(&mut rig, version(OLD, 1), blocks(1, PIECE, PIECE));
    assert_eq!(asked(&mut rig).map(|(first, _)| first), Some(PIECE));
    assert!(rig.commits.is_empty(), "nothing is seen before all is here");
    gives(&mut rig, PIECE, !0, Content::default());
    let [TxnOp::Assemble { version: to, base, kept, placed, .. }] = &rig.commits[0][..] else {
        panic!("{:?}", rig.commits)
    };
    assert_eq!((*to, *base, placed.len()), (version(NEW, 1), version(OLD, 1), 1));
    assert_eq!(kept[..], [1, 2, 3]);
    let [written] = &rig.placed[..] else { panic!("{:?}", rig.placed) };
    let leaf = (LEAF_BLOCKS * BLOCK_BYTES) as usize;
    assert_eq!(written.block_count(), 32);
    assert!(written.data[..leaf].iter().all(|b| *b == 2) && written.data[leaf..].iter().all(|b| *b == 1));
    assert_eq!(acknowledged(&mut rig), Some(SubResult::Ok));
}

/// All that stays must be of one version.
#[test]
fn an_own_copy_that_changes_meanwhile_is_not_believed() {
    let mut rig = offered();
    own_piece(&mut rig, version(OLD, 1), blocks(1, 0, PIECE));
    asked(&mut rig);
    gives(&mut rig, 0, !0, Content::default());
    own_piece(&mut rig, version(OLD, 2), blocks(1, PIECE, PIECE));
    assert_eq!(asked(&mut rig), Some((0, Vec::new())), "from the beginning, all of it");
    gives(&mut rig, 0, 0, blocks(3, 0, PIECE));
    assert_eq!(asked(&mut rig), Some((PIECE, Vec::new())));
    gives(&mut rig, PIECE, 0, blocks(3, PIECE, PIECE));
    let [TxnOp::Assemble { kept, placed, .. }] = &rig.commits[0][..] else { panic!("{:?}", rig.commits) };
    assert_eq!((kept.len(), placed.len()), (0, 2));
}

#[test]
fn a_piece_that_cannot_be_read_here_comes_whole() {
    let mut rig = offered();
    let bad =
        StoreError::Unreadable { object: object(0), block: 3, why: "checksum mismatch".into(), rest: None };
    rig.answer_object(Err(bad));
    assert_eq!(asked(&mut rig), Some((0, Vec::new())));
    // Nobody may say that something is the same that was not named.
    gives(&mut rig, 0, 1, Content::default());
    assert_eq!(acknowledged(&mut rig), Some(SubResult::BadChecksum));
    assert!(rig.commits.is_empty());
}

/// The primary has given it up, and the object was written since.
#[test]
fn what_is_not_wanted_any_more_is_not_stored() {
    let mut rig = offered();
    own_piece(&mut rig, version(OLD, 1), blocks(1, 0, PIECE));
    gives(&mut rig, 0, !0, Content::default());
    let (prev, at, write) = (version(NEW, 1), version(10, 1), SubWriteKind::Note);
    rig.hear(2, PeerBody::SubWrite { tid: 11, object: object(0), version: at, prev, write });
    own_piece(&mut rig, version(OLD, 1), blocks(1, PIECE, PIECE));
    gives(&mut rig, PIECE, !0, Content::default());
    assert!(!rig.ops().any(|op| matches!(op, TxnOp::Assemble { .. })));
    assert_eq!(acknowledged(&mut rig), Some(SubResult::VersionMismatch));
}

/// What the store does not take with chunks that stay comes whole the next time.
#[test]
fn a_copy_that_is_not_what_it_seemed_comes_whole() {
    let mut rig = offered();
    rig.hold_pushes = true;
    own_piece(&mut rig, version(OLD, 1), blocks(1, 0, PIECE));
    gives(&mut rig, 0, !0, Content::default());
    own_piece(&mut rig, version(OLD, 1), blocks(1, PIECE, PIECE));
    gives(&mut rig, PIECE, !0, Content::default());
    let token = rig.held.pop_front().expect("is being stored");
    let (object, have, want) = (object(0), version(OLD, 2), version(OLD, 1));
    rig.step(Event::Committed { token, result: Err(StoreError::VersionMismatch { object, have, want }) });
    assert_eq!(acknowledged(&mut rig), Some(SubResult::VersionMismatch));
    let (version, over, piece) = (version(NEW, 1), None, None);
    rig.hear(2, PeerBody::Push { tid: 9, object, version, deleted: false, over, piece });
    assert_eq!(asked(&mut rig), Some((0, Vec::new())));
}
