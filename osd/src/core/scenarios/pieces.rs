//! Shards of which more than can be spared have a bad row: each row decodes from those whose row is good.

use super::*;
use crate::erasure::sparse_content;
use gabion_proto::msg::OpError;

const ROWS: usize = 2;

/// Two rows of a 2+2 code.
fn shards() -> BTreeMap<u8, Rows> {
    let block = |n: u8, row: usize| Block::of(vec![10 * n + row as u8 + 1; 4096].into());
    let mut shards: BTreeMap<u8, Rows> =
        (0..2).map(|n| (n, (0..ROWS).map(|row| block(n, row)).collect())).collect();
    let code = ReedSolomon::shared(Geometry { k: 2, m: 2 }).unwrap();
    shards.extend(code.compute(&shards, &[2, 3]).unwrap());
    shards
}

/// Everybody answers whatever it is asked, as a store with these bad rows does: a range with one of them is an error. How many questions
/// there were.
fn answer_all(rig: &mut Rig, shards: &BTreeMap<u8, Rows>, bad: &[(u8, usize)]) -> usize {
    let mut questions = 0;
    let rows = |n: u8, (first, count): (u32, u32)| {
        let range = first as usize..((first + count) as usize).min(ROWS);
        match bad.iter().any(|(b, row)| *b == n && range.contains(row)) {
            true => None,
            false => Some(sparse_content((first..).zip(shards[&n][range].iter().cloned()))),
        }
    };
    loop {
        let asked = rig.take_sent().into_iter().filter_map(|(to, b)| match b {
            PeerBody::ShardRead { tid, first_row, row_count, .. } => {
                Some((to.0, tid, (first_row, row_count)))
            }
            _ => None,
        });
        let asked: Vec<_> = asked.collect();
        if asked.is_empty() && rig.reads.is_empty() {
            return questions;
        }
        questions += asked.len() + rig.reads.len();
        while !rig.reads.is_empty() {
            let unreadable =
                StoreError::Unreadable { object: object(0), block: 0, why: "rot".into(), rest: None };
            let range = rig.ranges[rig.ranges.len() - rig.reads.len()];
            rig.answer_read(rows(0, range).ok_or(unreadable));
        }
        for (from, tid, range) in asked {
            let (result, data) = match rows((from - 1) as u8, range) {
                Some(c) => (Ok(c.extents), c.data),
                None => (Err(SubResult::Io), Bytes::new()),
            };
            rig.hear_data(from, PeerBody::ShardData { tid, result }, data);
        }
    }
}

fn read_all(rig: &mut Rig) -> ClientToken {
    let kind = OpKind::Read { first_block: 0, block_count: 2 * ROWS as u32, below: Vec::new() };
    rig.client(0, kind, Bytes::new())
}

/// Three shards have a bad row each, not all the same one: no two are whole, but each row has two that are good there.
#[test]
fn each_row_decodes_from_those_that_have_it() {
    let shards = shards();
    let (mut rig, _) = Rig::two_and_two([1, 2]);
    rig.take_sent();
    let read = read_all(&mut rig);
    answer_all(&mut rig, &shards, &[(0, 0), (1, 1), (2, 1)]);
    let Some(OpReply::Data { extents }) = rig.reply(read) else { panic!("{:?}", rig.reply(read)) };
    let blocks = (0..4u32).map(|b| (b, shards[&((b % 2) as u8)][(b / 2) as usize].clone()));
    assert_eq!(*extents, sparse_content(blocks).extents);
    let status = &rig.core.pg_statuses()[0];
    assert_eq!(status.damaged_objects, 0);
}

/// Of one row only one shard is good: that row is lost, and the read says so. The questions end.
#[test]
fn a_row_that_too_few_have_is_an_error() {
    let shards = shards();
    let (mut rig, _) = Rig::two_and_two([1, 2]);
    rig.take_sent();
    let read = read_all(&mut rig);
    let questions = answer_all(&mut rig, &shards, &[(0, 1), (1, 1), (2, 1)]);
    assert_eq!(rig.reply(read), Some(&OpReply::Failed(OpError::Io)));
    assert!(questions < 40, "{questions}");
    let good =
        rig.client(0, OpKind::Read { first_block: 0, block_count: 2, below: Vec::new() }, Bytes::new());
    answer_all(&mut rig, &shards, &[(0, 1), (1, 1), (2, 1)]);
    assert!(matches!(rig.reply(good), Some(OpReply::Data { .. })), "{:?}", rig.reply(good));
}
