//! Old parity that cannot be read: what is decoded for it, and who owes an answer meanwhile (rules E2 and P8).

use super::delta::*;
use super::*;
use crate::erasure::content_of;

/// Two writes that were made together: of what cannot be read only their rows are decoded, not those between.
#[test]
fn rows_between_joined_writes_are_not_read() {
    let (mut rig, shards, acting) = four_and_two(0);
    write(&mut rig, 0, 1);
    rig.answer_read(Ok(row(&shards[&0])));
    let tid = assert_parts(&mut rig, (&shards, &acting), &[0], true);
    for block in [0, 20] {
        let content = Content::data(block, vec![8; 4096].into());
        rig.client(0, OpKind::Write { extents: content.extents }, content.data);
    }
    (2..=6).for_each(|o| rig.hear(o, PeerBody::SubWriteAck { tid, result: SubResult::Ok }));
    rig.answer_read(Ok(row(&vec![fill(9)])));
    let tid = rig.take_sent().into_iter().find_map(|(to, b)| match b {
        PeerBody::SubWrite { tid, write: SubWriteKind::Delta { added, .. }, .. } if to == OsdId(6) => {
            assert_eq!(
                added.iter().map(|e| (e.first_block, e.block_count)).collect::<Vec<_>>(),
                [(0, 1), (5, 1)]
            );
            Some(tid)
        }
        _ => None,
    });
    let tid = tid.expect("one write");
    rig.hear(6, PeerBody::SubWriteAck { tid, result: SubResult::Unreadable });
    (2..=5).for_each(|o| rig.hear(o, PeerBody::SubWriteAck { tid, result: SubResult::Ok }));
    let mut old = shards.clone();
    old.insert(0, vec![fill(9)]);
    let mut asked = Vec::new();
    for rows in [(0, 1), (5, 1)] {
        let questions = rig.take_sent().into_iter().filter_map(|(to, b)| match b {
            PeerBody::ShardRead { tid, first_row, row_count, .. } => {
                Some((to.0, tid, (first_row, row_count)))
            }
            _ => None,
        });
        let questions: Vec<_> = questions.collect();
        asked.extend(questions.iter().map(|(_, _, rows)| *rows).chain(rig.ranges.back().copied()));
        let content = |n: u8| if rows.0 == 0 { row(&old[&n]) } else { Content::default() };
        rig.answer_read(Ok(content(0)));
        for (from, tid, _) in questions {
            let c = content(acting.iter().position(|a| *a == from).unwrap() as u8);
            rig.hear_data(from, PeerBody::ShardData { tid, result: Ok(c.extents) }, c.data);
        }
    }
    assert_eq!(asked, [[(0, 1); 4], [(5, 1); 4]].concat());
    let mut new: BTreeMap<u8, Rows> = (0..4).map(|n| (n, vec![shards[&n][0].clone(), None])).collect();
    new.insert(0, vec![fill(8), fill(8)]);
    let code = ReedSolomon::shared(Geometry { k: 4, m: 2 }).unwrap();
    new.extend(code.compute(&new, &[5]).unwrap());
    let given = rig.take_sent().into_iter().find_map(|(to, b)| match b {
        PeerBody::SubWrite { write: SubWriteKind::Write { extents }, .. } if to == OsdId(6) => Some(extents),
        _ => None,
    });
    assert_eq!(given, Some(content_of([(0, new[&5][0].clone()), (5, new[&5][1].clone())]).extents));
}

fn stuck(rig: &Rig) -> Vec<u32> {
    rig.core.stuck_peers().iter().map(|s| s.peer).collect()
}

fn wait(rig: &mut Rig, ms: u64) {
    (0..ms / 100).for_each(|_| rig.tick(100));
}

/// osd.1 has sent a write of block 0 of 4+2, and osd.6 cannot read its old parity.
fn unreadable_at_six() -> (Rig, BTreeMap<u8, Rows>, u64) {
    let (mut rig, shards, acting) = four_and_two(0);
    write(&mut rig, 0, 1);
    rig.answer_read(Ok(row(&shards[&0])));
    let tid = assert_parts(&mut rig, (&shards, &acting), &[0], true);
    rig.hear(6, PeerBody::SubWriteAck { tid, result: SubResult::Unreadable });
    (rig, shards, tid)
}

fn acknowledge(rig: &mut Rig, from: &[u32], tid: u64) {
    from.iter().for_each(|o| rig.hear(*o, PeerBody::SubWriteAck { tid, result: SubResult::Ok }));
}

/// Rule P8: who has said that it cannot read its parity has answered, and waits for who has not.
#[test]
fn only_who_has_not_answered_is_reported() {
    let (mut rig, _, tid) = unreadable_at_six();
    acknowledge(&mut rig, &[2, 3, 4], tid);
    wait(&mut rig, 15_000);
    assert_eq!(stuck(&rig), [5]);
}

/// Nor does it owe the rows that its parity is decoded from.
#[test]
fn who_owes_rows_for_a_parity_is_reported() {
    let (mut rig, shards, tid) = unreadable_at_six();
    acknowledge(&mut rig, &[2, 3, 4, 5], tid);
    rig.answer_read(Ok(row(&shards[&0])));
    let asked = rig.asked_for_shards();
    answer_rows(&mut rig, 2, asked[0].1, &shards[&1]);
    answer_rows(&mut rig, 3, asked[1].1, &shards[&2]);
    wait(&mut rig, 15_000);
    assert_eq!(stuck(&rig), [4, 5]);
}

/// What it was sent instead it owes, from then on.
#[test]
fn who_does_not_take_its_decoded_parity_is_reported() {
    let (mut rig, shards, tid) = unreadable_at_six();
    wait(&mut rig, 8_000);
    acknowledge(&mut rig, &[2, 3, 4, 5], tid);
    rig.answer_read(Ok(row(&shards[&0])));
    for (o, tid) in rig.asked_for_shards() {
        answer_rows(&mut rig, o.0, tid, &shards[&(o.0 as u8 - 1)]);
    }
    wait(&mut rig, 9_000);
    assert!(stuck(&rig).is_empty());
    wait(&mut rig, 1_500);
    assert_eq!(stuck(&rig), [6]);
}

/// If too few rows can be read nobody else can help: it is left out in the end.
#[test]
fn whose_parity_cannot_be_had_is_reported() {
    let (mut rig, shards, tid) = unreadable_at_six();
    acknowledge(&mut rig, &[2, 3, 4, 5], tid);
    let mut reported = BTreeSet::new();
    for _ in 0..150 {
        while !rig.reads.is_empty() {
            rig.answer_read(Ok(row(&shards[&0])));
        }
        for (to, b) in rig.take_sent() {
            match b {
                PeerBody::ShardRead { tid, .. } if to.0 <= 3 => {
                    rig.hear(to.0, PeerBody::ShardData { tid, result: Err(SubResult::Io) });
                }
                PeerBody::ShardRead { tid, .. } => {
                    answer_rows(&mut rig, to.0, tid, &shards[&(to.0 as u8 - 1)])
                }
                PeerBody::SubWrite { tid, .. } => {
                    rig.hear(to.0, PeerBody::SubWriteAck { tid, result: SubResult::Unreadable });
                }
                _ => {}
            }
        }
        rig.tick(100);
        reported.extend(stuck(&rig));
    }
    assert_eq!(reported, [6].into());
}

/// A read that must be decoded: who has answered, or was not asked, is not reported beside who is slow.
#[test]
fn only_who_owes_rows_of_a_read_is_reported() {
    let (mut rig, shards, _) = four_and_two(0);
    rig.read(0, 2);
    let mut reported = BTreeSet::new();
    for _ in 0..150 {
        while !rig.reads.is_empty() {
            rig.answer_read(Ok(row(&shards[&0])));
        }
        for (to, tid) in rig.asked_for_shards() {
            match to.0 {
                3 => {}
                2 | 4 => rig.hear(to.0, PeerBody::ShardData { tid, result: Err(SubResult::Io) }),
                n => answer_rows(&mut rig, n, tid, &shards[&(n as u8 - 1)]),
            }
        }
        rig.tick(100);
        reported.extend(stuck(&rig));
    }
    assert_eq!(reported, [3].into());
}
