//! Small writes of shards: parity is added to, once, at the version that the sum names (rule E2).

use super::*;
use crate::erasure::{content_of, sparse_content};
use gabion_proto::blocks::Extent;

const BASE: u64 = 5;

pub(super) fn fill(byte: u8) -> Option<Block> {
    Block::of(vec![byte; 4096].into())
}

/// osd.1 as primary of a 4+2 group of osd.1 to osd.6, in this order but for its own position; one row of object 0 is filled with 1 to 4.
pub(super) fn four_and_two(own: usize) -> (Rig, BTreeMap<u8, Rows>, Vec<u32>) {
    let mut rig = Rig::new(&[(0, version(BASE, 1))]);
    let mut acting: Vec<u32> = (2..=6).collect();
    acting.insert(own, 1);
    rig.map.osds.extend([5, 6].map(|n| (OsdId(n), osd(n))));
    if let Some(pool) = rig.map.pools.get_mut(&PG.pool) {
        (pool.redundancy, pool.min_size) = (Redundancy::Erasure { k: 4, m: 2 }, 5);
    }
    rig.led(1, 10, &acting, vec![past(5, &acting)]);
    let others = || acting.iter().filter(|o| **o != 1);
    others().for_each(|o| rig.tells(*o, 5, &[has(0, version(BASE, 1))]));
    others().for_each(|o| rig.activates(*o));
    let code = ReedSolomon::shared(Geometry { k: 4, m: 2 }).unwrap();
    let mut shards: BTreeMap<u8, Rows> = (0..4).map(|n| (n, vec![fill(n + 1)])).collect();
    shards.extend(code.compute(&shards, &[4, 5]).unwrap());
    rig.take_sent();
    (rig, shards, acting)
}

/// The shards after some blocks of the row became 9.
fn written(shards: &BTreeMap<u8, Rows>, blocks: &[u8]) -> BTreeMap<u8, Rows> {
    let code = ReedSolomon::shared(Geometry { k: 4, m: 2 }).unwrap();
    let row = |n: u8| if blocks.contains(&n) { vec![fill(9)] } else { shards[&n].clone() };
    let mut new: BTreeMap<u8, Rows> = (0..4).map(|n| (n, row(n))).collect();
    new.extend(code.compute(&new, &[4, 5]).unwrap());
    new
}

pub(super) fn row(rows: &Rows) -> Content {
    sparse_content((0..).zip(rows.iter().cloned()))
}

pub(super) fn write(rig: &mut Rig, first_block: u32, count: usize) -> ClientToken {
    let content = Content::data(first_block, vec![9; 4096 * count].into());
    rig.client(0, OpKind::Write { extents: content.extents }, content.data)
}

/// Sub-writes that were sent: to whom, under which number, and what.
fn sub_writes(rig: &mut Rig) -> Vec<(u32, u64, SubWriteKind)> {
    let parts = rig.take_sent().into_iter().filter_map(|(to, b)| match b {
        PeerBody::SubWrite { tid, write, prev, .. } => {
            assert_eq!(prev, version(BASE, 1), "what is added names what it is added to");
            Some((to.0, tid, write))
        }
        _ => None,
    });
    parts.collect()
}

pub(super) fn answer_rows(rig: &mut Rig, from: u32, tid: u64, rows: &Rows) {
    let c = row(rows);
    rig.hear_data(from, PeerBody::ShardData { tid, result: Ok(c.extents) }, c.data);
}

/// What every member must be sent when some blocks become 9; `added`: the parity is added to.
pub(super) fn assert_parts(
    rig: &mut Rig,
    (shards, acting): (&BTreeMap<u8, Rows>, &[u32]),
    blocks: &[u8],
    added: bool,
) -> u64 {
    let new = written(shards, blocks);
    let parts = sub_writes(rig);
    assert_eq!(parts.len(), 5, "everybody gets the version (E1)");
    for (to, _, part) in &parts {
        let n = acting.iter().position(|o| o == to).unwrap() as u8;
        let sum: Rows = shards[&n].iter().zip(&new[&n]).map(|(a, b)| Block::sum(a, b)).collect();
        let expected = match n {
            0..4 if blocks.contains(&n) => SubWriteKind::Write { extents: row(&new[&n]).extents },
            0..4 => SubWriteKind::Write { extents: Vec::new() },
            _ if added => SubWriteKind::Delta { whole: Vec::new(), added: row(&sum).extents },
            _ => SubWriteKind::Write { extents: row(&new[&n]).extents },
        };
        assert_eq!(*part, expected, "shard {n}");
    }
    parts[0].1
}

/// One block of 4+2: its old content is all that is asked for, one block instead of three.
#[test]
fn one_changed_block_is_the_only_one_that_is_asked_for() {
    let (mut rig, shards, acting) = four_and_two(0);
    let client = write(&mut rig, 2, 1);
    let asked = rig.asked_for_shards();
    assert_eq!((asked.len(), asked[0].0, rig.reads.len()), (1, OsdId(4 - 1), 0));
    answer_rows(&mut rig, 3, asked[0].1, &shards[&2]);
    let tid = assert_parts(&mut rig, (&shards, &acting), &[2], true);
    (2..=6).for_each(|o| rig.hear(o, PeerBody::SubWriteAck { tid, result: SubResult::Ok }));
    assert!(matches!(rig.reply(client), Some(OpReply::Done { .. })));
}

#[test]
fn of_an_own_block_nobody_is_asked() {
    let (mut rig, shards, acting) = four_and_two(0);
    write(&mut rig, 0, 1);
    assert_eq!((rig.asked_for_shards(), rig.reads.len()), (vec![], 1));
    rig.answer_read(Ok(row(&shards[&0])));
    assert_parts(&mut rig, (&shards, &acting), &[0], true);
}

/// Of two blocks it takes as much to read the other two, and then no parity is read.
#[test]
fn of_half_a_row_the_other_half_is_read() {
    let (mut rig, shards, acting) = four_and_two(0);
    write(&mut rig, 0, 2);
    let asked = rig.asked_for_shards();
    assert_eq!(asked.iter().map(|(o, _)| o.0).collect::<Vec<_>>(), [3, 4]);
    answer_rows(&mut rig, 3, asked[0].1, &shards[&2]);
    answer_rows(&mut rig, 4, asked[1].1, &shards[&3]);
    assert_parts(&mut rig, (&shards, &acting), &[0, 1], false);
}

#[test]
fn whole_rows_and_new_objects_read_nothing() {
    let (mut rig, shards, acting) = four_and_two(0);
    write(&mut rig, 0, 4);
    assert_eq!(rig.reads.len(), 0);
    assert_parts(&mut rig, (&shards, &acting), &[0, 1, 2, 3], false);
    let content = Content::data(1, vec![9; 4096].into());
    rig.client(1, OpKind::Write { extents: content.extents }, content.data);
    let asked = rig.asked_for_shards();
    assert_eq!((asked, rig.reads.len()), (vec![], 0));
}

/// A write that has whole rows and a part of one: the whole ones are computed, and the rest is added to.
#[test]
fn whole_rows_of_a_write_are_not_added_to() {
    let (mut rig, shards, _) = four_and_two(0);
    write(&mut rig, 3, 5);
    let asked = rig.asked_for_shards();
    assert_eq!((asked.len(), asked[0].0), (1, OsdId(4)));
    answer_rows(&mut rig, 4, asked[0].1, &shards[&3]);
    let parts = sub_writes(&mut rig);
    let parity = parts.iter().filter(|(to, ..)| *to >= 5);
    for (_, _, part) in parity {
        let SubWriteKind::Delta { whole, added } = part else { panic!("{part:?}") };
        assert_eq!((whole[0].first_block, whole.len(), added[0].first_block, added.len()), (1, 1, 0, 1));
    }
}

/// The primary keeps parity itself: it reads its own old block and stores the sum.
#[test]
fn own_parity_is_added_to_here() {
    let (mut rig, shards, acting) = four_and_two(5);
    write(&mut rig, 1, 1);
    let asked = rig.asked_for_shards();
    assert_eq!((asked.len(), asked[0].0, rig.reads.len()), (1, OsdId(3), 1));
    rig.answer_read(Ok(row(&shards[&5])));
    answer_rows(&mut rig, 3, asked[0].1, &shards[&1]);
    assert_parts(&mut rig, (&shards, &acting), &[1], true);
    let new = written(&shards, &[1]);
    let stored = rig.ops().find_map(|op| match op {
        TxnOp::Prepare { content, .. } => Some(content.clone()),
        _ => None,
    });
    assert_eq!(stored, Some(row(&new[&5])));
}

/// The changed block cannot be read: it is decoded, and what is added is the same.
#[test]
fn an_old_block_that_cannot_be_read_is_decoded() {
    let (mut rig, shards, acting) = four_and_two(0);
    write(&mut rig, 2, 1);
    let asked = rig.asked_for_shards();
    let unreadable = PeerBody::ShardData { tid: asked[0].1, result: Err(SubResult::Io) };
    rig.hear(3, unreadable);
    let asked = rig.asked_for_shards();
    assert_eq!((asked.len(), rig.reads.len()), (3, 1), "k others");
    rig.answer_read(Ok(row(&shards[&0])));
    for (o, tid) in asked {
        let n = acting.iter().position(|a| *a == o.0).unwrap() as u8;
        answer_rows(&mut rig, o.0, tid, &shards[&n]);
    }
    assert_parts(&mut rig, (&shards, &acting), &[2], true);
}

/// A member cannot read its old parity. It is decoded from what the others have at the version before, and the member gets the row as
/// it will be; nobody is asked twice.
#[test]
fn old_parity_that_cannot_be_read_is_decoded() {
    let (mut rig, shards, acting) = four_and_two(0);
    let client = write(&mut rig, 0, 1);
    rig.answer_read(Ok(row(&shards[&0])));
    let tid = assert_parts(&mut rig, (&shards, &acting), &[0], true);
    let unreadable = PeerBody::SubWriteAck { tid, result: SubResult::Unreadable };
    rig.hear(6, unreadable.clone());
    rig.hear(6, unreadable.clone());
    (2..=5).for_each(|o| rig.hear(o, PeerBody::SubWriteAck { tid, result: SubResult::Ok }));
    let questions: Vec<(u32, u64, Version)> = rig
        .take_sent()
        .into_iter()
        .filter_map(|(to, b)| match b {
            PeerBody::ShardRead { tid, version, .. } => Some((to.0, tid, version)),
            _ => None,
        })
        .collect();
    assert_eq!((questions.len(), rig.reads.len()), (3, 1));
    assert!(questions.iter().all(|(to, _, v)| *to != 6 && *v == version(BASE, 1)), "{questions:?}");
    assert!(!rig.newest_read, "the own shard, too, as it was before the write");
    rig.answer_read(Ok(row(&shards[&0])));
    for (from, tid, _) in questions {
        let n = acting.iter().position(|a| *a == from).unwrap() as u8;
        answer_rows(&mut rig, from, tid, &shards[&n]);
    }
    let new = written(&shards, &[0]);
    let part = SubWriteKind::Write { extents: row(&new[&5]).extents };
    assert_eq!(sub_writes(&mut rig), [(6, tid, part)]);
    rig.hear(6, unreadable);
    assert_eq!(rig.asked_for_shards(), vec![], "of a sum that it was sent before");
    assert_eq!(rig.reply(client), None);
    rig.hear(6, PeerBody::SubWriteAck { tid, result: SubResult::Ok });
    assert!(matches!(rig.reply(client), Some(OpReply::Done { .. })));
}

/// Bytes and messages of 4 KiB writes of 4+2, for `docs/performance.md`: of each of the four blocks of a row, and led from a data
/// shard.
#[test]
fn what_a_small_write_moves() {
    let (mut asked, mut own) = (0, 0);
    for block in 0..4 {
        let (mut rig, shards, acting) = four_and_two(0);
        write(&mut rig, block, 1);
        let questions = rig.asked_for_shards();
        (asked, own) = (asked + questions.len(), own + rig.reads.len());
        if !rig.reads.is_empty() {
            rig.answer_read(Ok(row(&shards[&0])));
        }
        questions.into_iter().for_each(|(o, tid)| answer_rows(&mut rig, o.0, tid, &shards[&(block as u8)]));
        assert_parts(&mut rig, (&shards, &acting), &[block as u8], true);
    }
    // Before, each of the four asked for three blocks, but for the own one: 3 + 3 * 2 and 3 own.
    assert_eq!((asked, own), (3, 1));
}

// ---- at a member ----

/// osd.1 keeps shard `own` of a 2+1 group that osd.2 leads; object 0 has one row, at version 5'1.
fn member(own: usize) -> Rig {
    let mut rig = Rig::new(&[(0, version(BASE, 1))]);
    if let Some(pool) = rig.map.pools.get_mut(&PG.pool) {
        (pool.redundancy, pool.min_size) = (Redundancy::Erasure { k: 2, m: 1 }, 2);
    }
    let mut acting = vec![2, 3];
    acting.insert(own, 1);
    rig.led(2, 10, &acting, vec![past(5, &acting)]);
    rig.hear(2, PeerBody::Query);
    rig.hear(2, PeerBody::Activate { page: 0, missing: Vec::new(), last: true });
    rig.take_sent();
    rig
}

fn delta(version: Version, prev: Version, add: u8) -> (PeerBody, Bytes) {
    let c = row(&vec![fill(add)]);
    let write = SubWriteKind::Delta { whole: Vec::new(), added: c.extents };
    (
        PeerBody::SubWrite { tid: u64::from(version.counter()), object: object(0), version, prev, write },
        c.data,
    )
}

fn hear(rig: &mut Rig, (body, data): (PeerBody, Bytes)) {
    rig.hear_data(2, body, data);
}

/// What was prepared, and over which version.
fn prepared(rig: &Rig) -> Vec<(Version, Version, Content)> {
    let ops = rig.ops().filter_map(|op| match op {
        TxnOp::Prepare { base, version, content, .. } => Some((*base, *version, content.clone())),
        _ => None,
    });
    ops.collect()
}

fn answers(rig: &mut Rig) -> Vec<(u64, SubResult)> {
    let acks = rig.take_sent().into_iter().filter_map(|(_, b)| match b {
        PeerBody::SubWriteAck { tid, result } => Some((tid, result)),
        _ => None,
    });
    acks.collect()
}

fn unreadable() -> StoreError {
    StoreError::Unreadable { object: object(0), block: 0, why: "checksum mismatch".into(), rest: None }
}

const B: Version = Version::ZERO;

fn b(counter: u32) -> Version {
    if counter == 0 { B } else { version(10, counter) }
}

/// Old block and sum give the new one, beside the old; repetitions change nothing, before or after.
#[test]
fn a_sum_is_added_once() {
    let mut rig = member(2);
    let first = delta(b(1), version(BASE, 1), 6);
    hear(&mut rig, first.clone());
    hear(&mut rig, first.clone());
    assert_eq!((rig.reads.len(), prepared(&rig).len(), answers(&mut rig)), (1, 0, vec![]));
    rig.answer_read(Ok(row(&vec![fill(3)])));
    let new = row(&vec![fill(3 ^ 6)]);
    assert_eq!(prepared(&rig), [(version(BASE, 1), b(1), new)]);
    assert_eq!(answers(&mut rig), [(1, SubResult::Ok)]);
    hear(&mut rig, first);
    assert_eq!((rig.reads.len(), prepared(&rig).len()), (0, 1));
    assert_eq!(answers(&mut rig), [(1, SubResult::Ok)], "it has that");
}

/// A sum for another version than the one that is here is not added, whichever comes first.
#[test]
fn a_sum_for_another_version_waits_or_is_nothing() {
    let mut rig = member(2);
    hear(&mut rig, delta(b(2), b(1), 8));
    assert_eq!(rig.reads.len(), 0, "its predecessor is not here");
    hear(&mut rig, delta(b(2), version(4, 1), 6));
    assert_eq!(rig.reads.len(), 0);
    hear(&mut rig, delta(b(1), version(BASE, 1), 5));
    assert_eq!(rig.reads.len(), 1);
    rig.answer_read(Ok(row(&vec![fill(3)])));
    // Now the early one has its turn, over what the first one made, which is committed with it.
    assert!(rig.newest_read);
    rig.answer_read(Ok(row(&vec![fill(3 ^ 5)])));
    let made: Vec<_> = prepared(&rig).into_iter().map(|(base, v, _)| (base, v)).collect();
    assert_eq!(made, [(version(BASE, 1), b(1)), (b(1), b(2))]);
    assert!(rig.ops().any(|op| matches!(op, TxnOp::CommitPending { version, .. } if *version == b(1))));
    assert_eq!(prepared(&rig)[1].2, row(&vec![fill(3 ^ 5 ^ 8)]));
}

/// The version that is added to is committed while it is read as pending.
#[test]
fn a_commit_meanwhile_changes_nothing() {
    let mut rig = member(2);
    hear(&mut rig, delta(b(1), version(BASE, 1), 5));
    rig.answer_read(Ok(row(&vec![fill(3)])));
    hear(&mut rig, delta(b(2), b(1), 8));
    rig.hear(2, PeerBody::Commit { objects: vec![(object(0), b(1))] });
    rig.answer_read(Ok(row(&vec![fill(3 ^ 5)])));
    assert_eq!(prepared(&rig)[1], (b(1), b(2), row(&vec![fill(3 ^ 5 ^ 8)])));
    let commits = rig.ops().filter(|op| matches!(op, TxnOp::CommitPending { .. })).count();
    assert_eq!(commits, 1);
}

/// Never zeros in place of what cannot be read; the row as it will be is taken instead.
#[test]
fn what_cannot_be_read_is_not_added_to() {
    let mut rig = member(2);
    let sum = delta(b(1), version(BASE, 1), 5);
    hear(&mut rig, sum.clone());
    rig.answer_read(Err(unreadable()));
    assert_eq!((prepared(&rig).len(), answers(&mut rig)), (0, vec![(1, SubResult::Unreadable)]));
    // It comes again, is being read again, and the row itself overtakes that.
    hear(&mut rig, sum);
    let c = row(&vec![fill(7)]);
    let write = SubWriteKind::Write { extents: c.extents.clone() };
    let whole =
        PeerBody::SubWrite { tid: 1, object: object(0), version: b(1), prev: version(BASE, 1), write };
    rig.hear_data(2, whole, c.data.clone());
    assert_eq!(
        (prepared(&rig), answers(&mut rig)),
        (vec![(version(BASE, 1), b(1), c)], vec![(1, SubResult::Ok)])
    );
    rig.answer_read(Ok(row(&vec![fill(3)])));
    assert_eq!((prepared(&rig).len(), answers(&mut rig)), (1, vec![]));
}

/// A disk that is about to stop its OSD says nothing.
#[test]
fn a_failing_disk_is_not_an_unreadable_row() {
    let mut rig = member(2);
    hear(&mut rig, delta(b(1), version(BASE, 1), 5));
    rig.answer_read(Err(StoreError::Fatal("EIO".into())));
    assert_eq!((prepared(&rig).len(), answers(&mut rig)), (0, vec![]));
}

#[test]
fn an_interval_that_ends_drops_what_was_to_be_added() {
    let mut rig = member(2);
    hear(&mut rig, delta(b(1), version(BASE, 1), 5));
    rig.led(2, 11, &[2, 3, 1], vec![past(10, &[2, 3, 1])]);
    rig.answer_read(Ok(row(&vec![fill(3)])));
    assert_eq!(prepared(&rig).len(), 0);
}

/// The old parity is beside the new one, and what goes back has it.
#[test]
fn rolled_back_parity_is_the_old_one() {
    let mut rig = member(2);
    hear(&mut rig, delta(b(1), version(BASE, 1), 5));
    rig.answer_read(Ok(row(&vec![fill(3)])));
    rig.listing.objects[0].1.pending = Some(b(1));
    rig.led(2, 11, &[2, 3, 1], vec![past(10, &[2, 3, 1])]);
    rig.hear(2, PeerBody::Query);
    rig.hear(2, PeerBody::Activate { page: 0, missing: vec![has(0, version(BASE, 1))], last: true });
    assert!(rig.ops().any(|op| matches!(op, TxnOp::RollbackPending { .. })));
    assert!(!rig.ops().any(|op| matches!(op, TxnOp::CommitPending { .. })), "the old one was never replaced");
}

/// Bytes of a peer: whatever does not fit this member's shard is refused, and nothing is read or stored.
#[test]
fn sums_that_do_not_fit_are_refused() {
    let run = |first_block: u32, byte: u8| {
        let c = Content::data(first_block, vec![byte; 4096].into());
        (c.extents, c.data)
    };
    let zero = vec![Extent { first_block: 0, block_count: 1, kind: gabion_proto::blocks::ExtentKind::Zero }];
    let (extents, data) = run(0, 5);
    let (beyond, _) = run(128, 5);
    let cut = data.slice(..4000);
    let twice: Bytes = [&data[..], &data[..]].concat().into();
    let sum = |whole: &[Extent], added: &[Extent]| SubWriteKind::Delta {
        whole: whole.to_vec(),
        added: added.to_vec(),
    };
    let cases = [
        (2, sum(&[], &zero), Bytes::new()),
        (2, sum(&[], &beyond), data.clone()),
        (2, sum(&extents, &extents), twice),
        (2, sum(&[], &extents), cut),
        (2, sum(&extents, &[]), Bytes::new()),
        (2, sum(&[], &extents), vec![6; 4096].into()),
        // It keeps data.
        (1, sum(&[], &extents), data.clone()),
    ];
    for (own, write, data) in cases {
        let mut rig = member(own);
        let body = PeerBody::SubWrite {
            tid: 1,
            object: object(0),
            version: b(1),
            prev: version(BASE, 1),
            write: write.clone(),
        };
        rig.hear_data(2, body, data);
        assert_eq!(answers(&mut rig), [(1, SubResult::BadChecksum)], "{write:?}");
        assert_eq!((rig.reads.len(), prepared(&rig).len()), (0, 0));
    }
    // A group of whole copies has no parity.
    let mut rig = Rig::new(&[(0, version(BASE, 1))]);
    rig.interval(10, &[2, 1, 3], vec![past(5, &[2, 1, 3])]);
    rig.hear(2, PeerBody::Query);
    rig.hear(2, PeerBody::Activate { page: 0, missing: Vec::new(), last: true });
    hear(&mut rig, delta(b(1), version(BASE, 1), 5));
    assert!(
        rig.reads.is_empty()
            && !rig.ops().any(|op| matches!(op, TxnOp::Write { .. } | TxnOp::Prepare { .. }))
    );
}

/// Nothing is there yet: the sum is the parity, and the store is not asked.
#[test]
fn a_new_object_is_added_to_without_reading() {
    let mut rig = member(2);
    let (body, data) = delta(b(1), Version::ZERO, 5);
    let PeerBody::SubWrite { tid, version, prev, write, .. } = body else { unreachable!() };
    rig.hear_data(2, PeerBody::SubWrite { tid, object: object(1), version, prev, write }, data);
    assert_eq!(rig.reads.len(), 0);
    assert_eq!(prepared(&rig), [(Version::ZERO, b(1), content_of([(0, fill(5))]))]);
}

/// Rule E2: rows of a version are of that one, also when a later one is prepared here.
#[test]
fn rows_are_of_the_version_that_was_asked_for() {
    let mut rig = member(2);
    hear(&mut rig, delta(b(1), version(BASE, 1), 5));
    rig.answer_read(Ok(row(&vec![fill(3)])));
    let read = |v| PeerBody::ShardRead { tid: 7, object: object(0), version: v, first_row: 0, row_count: 1 };
    rig.hear(2, read(version(BASE, 1)));
    assert!(!rig.newest_read && rig.reads.len() == 1);
    rig.answer_read(Ok(row(&vec![fill(3)])));
    rig.hear(2, read(b(1)));
    assert!(rig.newest_read && rig.reads.len() == 1);
}
