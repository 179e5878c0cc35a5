//! Hedged reads: what is late is asked elsewhere, and what comes too late is nobody's answer.

use super::*;
use crate::erasure::{Rows, sparse_content};

const OLD: u8 = 1;
const NEW: u8 = 2;

fn content(fill: u8) -> Content {
    Content::data(0, vec![fill; 4096].into())
}

/// Questions for blocks: whom, and under which number.
fn questions(rig: &mut Rig) -> Vec<(u32, u64)> {
    let tid = |(to, body): (OsdId, PeerBody)| match body {
        PeerBody::BlockRead { tid, .. } => Some((to.0, tid)),
        _ => None,
    };
    rig.take_sent().into_iter().filter_map(tid).collect()
}

fn question(rig: &mut Rig) -> (u32, u64) {
    let all = questions(rig);
    assert_eq!(all.len(), 1, "{all:?}");
    all[0]
}

fn blocks(rig: &mut Rig, (from, tid): (u32, u64), fill: u8) {
    let c = content(fill);
    rig.hear_data(from, PeerBody::BlockData { tid, result: Ok(c.extents) }, c.data);
}

fn sub_writes(rig: &mut Rig) -> Vec<(u32, u64)> {
    let tid = |(to, body): (OsdId, PeerBody)| match body {
        PeerBody::SubWrite { tid, .. } => Some((to.0, tid)),
        _ => None,
    };
    rig.take_sent().into_iter().filter_map(tid).collect()
}

/// What a client was told, once.
fn told(rig: &Rig, token: ClientToken) -> Option<&OpReply> {
    let all: Vec<_> = rig.replies.iter().filter(|(t, _)| *t == token).collect();
    assert!(all.len() <= 1, "{all:?}");
    all.first().map(|(_, r)| r)
}

fn shown(rig: &Rig, token: ClientToken, fill: u8) -> bool {
    matches!(told(rig, token), Some(OpReply::Data { extents }) if *extents == content(fill).extents)
}

/// A read whose disk is late, and the question that follows from it.
fn late(acting: &[u32]) -> (Rig, ClientToken, (u32, u64)) {
    let mut rig = Rig::active(&[(0, version(5, 1))], acting);
    rig.take_sent();
    let read = rig.read(0, 0);
    rig.tick(50);
    assert_eq!(questions(&mut rig), [], "not at once");
    rig.tick(100);
    let asked = question(&mut rig);
    (rig, read, asked)
}

#[test]
fn another_member_answers_and_the_own_disk_comes_too_late() {
    let (mut rig, read, asked) = late(&[1, 2, 3]);
    assert_eq!(told(&rig, read), None);
    blocks(&mut rig, asked, OLD);
    assert!(shown(&rig, read, OLD));
    rig.answer_read(Ok(content(NEW)));
    blocks(&mut rig, asked, NEW);
    assert!(shown(&rig, read, OLD), "once");
    let stats = rig.core.stats();
    assert_eq!((stats.reads, stats.hedged_reads, stats.hedges_won), (1, 1, 1));
}

#[test]
fn the_own_disk_answers_and_the_other_member_comes_too_late() {
    let (mut rig, read, asked) = late(&[1, 2]);
    rig.answer_read(Ok(content(OLD)));
    blocks(&mut rig, asked, NEW);
    assert!(shown(&rig, read, OLD));
    assert_eq!(rig.core.stats().hedges_won, 0);
}

/// What overlaps waits for the answer that counts, and for no other.
#[test]
fn a_write_begins_when_the_read_has_its_answer() {
    let (mut rig, read, asked) = late(&[1, 2]);
    let write = rig.write(0, 0);
    assert_eq!(sub_writes(&mut rig), [], "both copies must stay what they are");
    blocks(&mut rig, asked, OLD);
    assert!(shown(&rig, read, OLD));
    let sent = sub_writes(&mut rig);
    assert_eq!(sent.len(), 1);
    // The next read waits for the write, and is not answered by what was asked for the one before.
    let next = rig.read(0, 0);
    rig.answer_read(Ok(content(OLD)));
    blocks(&mut rig, asked, OLD);
    assert_eq!((told(&rig, next), rig.reads.len()), (None, 0));
    rig.hear(2, PeerBody::SubWriteAck { tid: sent[0].1, result: SubResult::Ok });
    assert!(matches!(told(&rig, write), Some(OpReply::Done { .. })));
    blocks(&mut rig, asked, OLD);
    assert_eq!(told(&rig, next), None);
    rig.answer_read(Ok(content(NEW)));
    assert!(shown(&rig, next, NEW));
}

#[test]
fn a_read_that_waits_for_a_write_is_not_asked_elsewhere_either() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    rig.write(0, 0);
    let read = rig.read(0, 0);
    for _ in 0..5 {
        rig.tick(100);
    }
    assert_eq!((questions(&mut rig), rig.reads.len(), told(&rig, read)), (vec![], 0, None));
}

#[test]
fn an_answer_of_before_the_interval_is_nobodys() {
    let (mut rig, read, (from, tid)) = late(&[1, 2, 3]);
    rig.map.epoch = Epoch(11);
    rig.interval(11, &[1, 2, 3], vec![past(10, &[1, 2, 3])]);
    assert!(matches!(told(&rig, read), Some(OpReply::Retry { .. })));
    // As it left the member, and as if it were of the new interval.
    let body = PeerBody::BlockData { tid, result: Ok(content(OLD).extents) };
    let msg = PeerMsg {
        from: OsdId(from),
        from_incarnation: Incarnation(u64::from(from)),
        to: OsdId(1),
        to_incarnation: Incarnation(1),
        epoch: Epoch(10),
        pg: PG,
        interval: Epoch(10),
        body,
    };
    rig.step(Event::Peer { msg, data: content(OLD).data });
    blocks(&mut rig, (from, tid), OLD);
    assert!(matches!(told(&rig, read), Some(OpReply::Retry { .. })));
}

/// Rule P6: a deposed primary serves nothing, wherever it has it from.
#[test]
fn no_answer_without_a_lease() {
    let (mut rig, read, asked) = late(&[1, 2, 3]);
    rig.now += 2_000_000;
    blocks(&mut rig, asked, OLD);
    assert!(matches!(told(&rig, read), Some(OpReply::Retry { .. })));
}

#[test]
fn the_same_read_once_more_is_another_one() {
    let (mut rig, read, asked) = late(&[1, 2]);
    let bad =
        StoreError::Unreadable { object: object(0), block: 0, why: "checksum mismatch".into(), rest: None };
    rig.answer_read(Err(bad));
    assert_eq!(told(&rig, read), None, "the own copy is fetched anew");
    blocks(&mut rig, asked, OLD);
    assert_eq!(told(&rig, read), None);
}

/// A failing disk takes its time before it says so.
#[test]
fn a_bad_block_that_nobody_waits_for_any_more_is_repaired() {
    let (mut rig, read, asked) = late(&[1, 2]);
    blocks(&mut rig, asked, OLD);
    rig.take_sent();
    let bad =
        StoreError::Unreadable { object: object(0), block: 0, why: "checksum mismatch".into(), rest: None };
    rig.answer_read(Err(bad));
    assert!(shown(&rig, read, OLD));
    let pulls = rig.take_sent().into_iter().filter(|(_, b)| matches!(b, PeerBody::Pull { .. })).count();
    assert_eq!(pulls, 1);
}

/// Recovery knows nothing of what was removed: it would wait for it for ever.
#[test]
fn a_bad_block_of_a_volume_that_was_removed_meanwhile_is_nobodys() {
    let (mut rig, read, asked) = late(&[1, 2]);
    blocks(&mut rig, asked, OLD);
    assert!(shown(&rig, read, OLD));
    rig.map.removed_volumes.insert(VOLUME);
    rig.map.epoch = Epoch(11);
    rig.publish();
    rig.take_sent();
    let bad =
        StoreError::Unreadable { object: object(0), block: 0, why: "checksum mismatch".into(), rest: None };
    rig.answer_read(Err(bad));
    let pulls = rig.take_sent().into_iter().filter(|(_, b)| matches!(b, PeerBody::Pull { .. })).count();
    assert_eq!(pulls, 0);
}

#[test]
fn who_lacks_the_object_is_not_asked() {
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    rig.interval(10, &[1, 2, 3], vec![past(5, &[1, 3])]);
    rig.tells(2, 0, &[]);
    rig.tells(3, 5, &[has(0, version(5, 1))]);
    [2, 3].into_iter().for_each(|o| rig.activates(o));
    rig.take_sent();
    for _ in 0..5 {
        let read = rig.read(0, 0);
        rig.tick(150);
        let asked = question(&mut rig);
        assert_eq!(asked.0, 3);
        blocks(&mut rig, asked, OLD);
        assert!(shown(&rig, read, OLD));
    }
}

#[test]
fn nonsense_from_a_member_is_no_answer() {
    let other = Content::data(7, vec![OLD; 4096].into());
    let mut torn = content(OLD);
    torn.data = vec![NEW; 4096].into();
    for c in [other, torn] {
        let (mut rig, read, (from, tid)) = late(&[1, 2, 3]);
        let strangers = [2, 3, 4].into_iter().filter(|o| *o != from);
        strangers.for_each(|o| blocks(&mut rig, (o, tid), OLD));
        assert_eq!(told(&rig, read), None, "somebody else");
        rig.hear_data(from, PeerBody::BlockData { tid, result: Ok(c.extents) }, c.data);
        assert_eq!(told(&rig, read), None);
        rig.answer_read(Ok(content(OLD)));
        assert!(shown(&rig, read, OLD));
    }
}

/// A tenth, after what was saved up; and all of them when the monitors say that the own disk is slow.
#[test]
fn there_is_a_limit_to_it() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    let hedged = |rig: &mut Rig, reads: u64| {
        let before = rig.core.stats().hedged_reads;
        for _ in 0..reads {
            rig.read(0, 0);
            rig.tick(150);
            questions(rig);
            while !rig.reads.is_empty() {
                rig.answer_read(Ok(content(OLD)));
            }
        }
        rig.core.stats().hedged_reads - before
    };
    assert!((50..=90).contains(&hedged(&mut rig, 500)));
    rig.step(Event::Slow { limit_ms: 10_000, osds: vec![OsdId(1)] });
    assert_eq!(hedged(&mut rig, 100), 100);
}

/// Reads that were overtaken are still in the queue of the disk: no more of them.
#[test]
fn a_disk_that_is_far_behind_is_not_asked_first() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    rig.step(Event::Slow { limit_ms: 10_000, osds: vec![OsdId(1)] });
    for _ in 0..40 {
        rig.read(0, 0);
        rig.tick(150);
        let asked = question(&mut rig);
        blocks(&mut rig, asked, OLD);
    }
    assert_eq!(rig.reads.len(), 16);
    // The other member does not answer: then the own disk after all.
    let read = rig.read(0, 0);
    assert_eq!((questions(&mut rig).len(), rig.reads.len()), (1, 16));
    rig.tick(1_100);
    assert_eq!(rig.reads.len(), 17);
    while !rig.reads.is_empty() {
        rig.answer_read(Ok(content(OLD)));
    }
    assert!(shown(&rig, read, OLD));
}

/// osd.1 as a member of a group that osd.2 leads.
fn member(missing: &[ObjectEntry]) -> Rig {
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    rig.interval(10, &[2, 1, 3], vec![past(5, &[2, 1, 3])]);
    rig.hear(2, PeerBody::Query);
    rig.hear(2, PeerBody::Activate { page: 0, missing: missing.to_vec(), last: true });
    rig.take_sent();
    rig
}

fn ask(rig: &mut Rig, from: u32, block_count: u32) {
    let (object, below) = (object(0), vec![LayerId(9)]);
    rig.hear(from, PeerBody::BlockRead { tid: 77, object, below, first_block: 0, block_count });
}

fn answered(rig: &mut Rig) -> Option<Result<(), SubResult>> {
    rig.take_sent().into_iter().find_map(|(to, body)| match body {
        PeerBody::BlockData { tid: 77, result } if to == OsdId(2) => Some(result.map(|_| ())),
        _ => None,
    })
}

#[test]
fn a_member_answers_with_what_it_holds() {
    let mut rig = member(&[]);
    ask(&mut rig, 2, 1);
    // Once, however often it is asked.
    ask(&mut rig, 2, 1);
    assert_eq!(rig.reads.len(), 1);
    rig.answer_read(Ok(content(OLD)));
    assert_eq!(answered(&mut rig), Some(Ok(())));
    ask(&mut rig, 3, 1);
    for count in [0, 257, u32::MAX] {
        ask(&mut rig, 2, count);
    }
    assert_eq!((rig.reads.len(), answered(&mut rig)), (0, Some(Err(SubResult::Missing))));
}

#[test]
fn a_member_that_lacks_it_or_is_not_active_does_not() {
    let lacking = ObjectEntry { missing: true, ..has(0, version(6, 1)) };
    let mut rig = member(&[lacking]);
    ask(&mut rig, 2, 1);
    assert_eq!((rig.reads.len(), answered(&mut rig)), (0, Some(Err(SubResult::Missing))));
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    rig.interval(10, &[2, 1, 3], vec![past(5, &[2, 1, 3])]);
    ask(&mut rig, 2, 1);
    assert_eq!((rig.reads.len(), answered(&mut rig)), (0, None));
}

/// It may have purged a layer of which the primary does not know that it was removed.
#[test]
fn a_member_that_knows_of_a_removal_does_not_answer_with_what_is_left() {
    let mut rig = member(&[]);
    ask(&mut rig, 2, 1);
    rig.map.removed_layers.insert((VOLUME, LayerId(9)));
    rig.map.epoch = Epoch(11);
    rig.publish();
    rig.answer_read(Ok(Content::default()));
    assert_eq!(answered(&mut rig), Some(Err(SubResult::Missing)));
    ask(&mut rig, 2, 1);
    assert_eq!((rig.reads.len(), answered(&mut rig)), (0, Some(Err(SubResult::Missing))));
}

/// osd.1 leads a 2+2 group and keeps shard 0 of an object of two blocks.
struct Coded {
    rig: Rig,
    shards: BTreeMap<u8, Rows>,
}

impl Coded {
    fn new() -> Coded {
        let (mut rig, shards) = Rig::two_and_two([10, 11]);
        rig.take_sent();
        Coded { rig, shards }
    }

    fn asked(&mut self) -> Vec<(u32, u64)> {
        self.rig.asked_for_shards().into_iter().map(|(to, tid)| (to.0, tid)).collect()
    }

    fn shard(&mut self, (from, tid): (u32, u64)) {
        let rows = self.shards[&(from as u8 - 1)].clone();
        let c = sparse_content((0..).zip(rows));
        self.rig.hear_data(from, PeerBody::ShardData { tid, result: Ok(c.extents) }, c.data);
    }

    fn own(&mut self) {
        let c = sparse_content((0..).zip(self.shards[&0].clone()));
        self.rig.answer_read(Ok(c));
    }

    fn shown(&self, token: ClientToken, block: u32) -> bool {
        let want = Content::data(block, vec![10 + block as u8; 4096].into());
        matches!(told(&self.rig, token), Some(OpReply::Data { extents }) if *extents == want.extents)
    }
}

#[test]
fn others_make_up_for_a_late_shard() {
    let mut c = Coded::new();
    let read = c.rig.read(0, 1);
    let late = c.asked();
    assert_eq!(late.len(), 1);
    assert_eq!((late[0].0, c.rig.reads.len()), (2, 0));
    c.rig.tick(50);
    assert_eq!(c.asked(), []);
    c.rig.tick(100);
    let others = c.asked();
    assert_eq!(others.len() + c.rig.reads.len(), 2, "as many as decode");
    assert!(others.iter().all(|(to, _)| *to != 2));
    others.into_iter().for_each(|o| c.shard(o));
    while !c.rig.reads.is_empty() {
        c.own();
    }
    assert!(c.shown(read, 1));
    // Too late: nobody asks any more, and what is written next is not undone by it.
    c.shard(late[0]);
    c.rig.write(0, 1);
    c.shard(late[0]);
    assert!(c.shown(read, 1));
    assert_eq!(c.rig.core.stats().hedges_won, 1);
}

#[test]
fn a_late_shard_that_comes_first_after_all_is_taken() {
    let mut c = Coded::new();
    let read = c.rig.read(0, 1);
    let late = c.asked();
    c.rig.tick(150);
    let others = c.asked();
    assert!(!others.is_empty());
    c.shard(late[0]);
    assert!(c.shown(read, 1));
    others.into_iter().for_each(|o| c.shard(o));
    assert!(c.shown(read, 1));
    assert_eq!(c.rig.core.stats().hedges_won, 0);
}

#[test]
fn a_bad_shard_that_nobody_waits_for_any_more_is_computed_anew() {
    let mut c = Coded::new();
    c.rig.read(0, 1);
    let late = c.asked()[0];
    c.rig.tick(150);
    c.asked().into_iter().for_each(|o| c.shard(o));
    c.own();
    c.rig.hear(2, PeerBody::ShardData { tid: late.1, result: Err(SubResult::Io) });
    c.rig.tick(100);
    let (others, own) = (c.asked(), c.rig.reads.len());
    assert_eq!(others.len() + own, 2, "two shards are read for the third");
    assert!(others.iter().all(|(to, _)| *to != 2));
}

#[test]
fn others_make_up_for_the_own_disk() {
    let mut c = Coded::new();
    let read = c.rig.read(0, 0);
    assert_eq!((c.asked().len(), c.rig.reads.len()), (0, 1));
    c.rig.tick(150);
    let others = c.asked();
    assert_eq!(others.len(), 2);
    others.into_iter().for_each(|o| c.shard(o));
    assert!(c.shown(read, 0));
    c.own();
    assert!(c.shown(read, 0));
}

/// Rows are not written while the read waits, however it gets them (E2).
#[test]
fn rows_are_written_when_the_read_has_ended() {
    let mut c = Coded::new();
    let read = c.rig.read(0, 1);
    let late = c.asked();
    c.rig.tick(150);
    let others = c.asked();
    let write = c.rig.write(0, 1);
    assert!(
        !c.rig.sent.iter().any(|(_, b)| matches!(b, PeerBody::SubWrite { .. } | PeerBody::ShardRead { .. }))
    );
    others.into_iter().for_each(|o| c.shard(o));
    while !c.rig.reads.is_empty() {
        c.own();
    }
    assert!(c.shown(read, 1));
    // The write gathers what its parity depends on; the late answer is not part of that.
    let gathered = c.asked();
    c.shard(late[0]);
    assert_eq!(told(&c.rig, write), None);
    assert!(gathered.iter().all(|(_, tid)| *tid != late[0].1));
}

/// A member that owes much is spared while others can decode.
#[test]
fn a_member_that_is_far_behind_is_not_asked_first() {
    let mut c = Coded::new();
    c.rig.step(Event::Slow { limit_ms: 10_000, osds: vec![OsdId(2)] });
    let mut owed = Vec::new();
    for _ in 0..20 {
        let read = c.rig.read(0, 1);
        c.rig.tick(150);
        let asked = c.asked();
        owed.extend(asked.iter().filter(|(to, _)| *to == 2).copied());
        asked.into_iter().filter(|(to, _)| *to != 2).for_each(|o| c.shard(o));
        while !c.rig.reads.is_empty() {
            c.own();
        }
        assert!(c.shown(read, 1));
    }
    assert_eq!(owed.len(), 8);
    // It has caught up.
    owed.into_iter().for_each(|o| c.shard(o));
    c.rig.read(0, 1);
    assert_eq!(c.asked().first().map(|(to, _)| *to), Some(2));
}

/// The limit is of what clients' writes wait for; other reads of shards take what they take.
#[test]
fn a_member_that_owes_a_read_is_not_left_out_as_soon_as_one_that_owes_a_write() {
    let stuck = |c: &Coded| c.rig.core.stuck_peers().iter().map(|s| s.peer).collect::<Vec<_>>();
    for (writes, after_4_s) in [(false, vec![]), (true, vec![2])] {
        let mut c = Coded::new();
        c.rig.step(Event::Slow { limit_ms: 4_000, osds: vec![] });
        match writes {
            // Its parity depends on the other block of the row.
            true => _ = c.rig.write(0, 0),
            false => _ = c.rig.read(0, 1),
        }
        assert!(c.asked().iter().any(|(to, _)| *to == 2));
        for _ in 0..42 {
            c.rig.tick(100);
        }
        assert_eq!(stuck(&c), after_4_s);
        for _ in 0..60 {
            c.rig.tick(100);
        }
        assert!(stuck(&c).contains(&2));
    }
}

#[test]
fn what_is_in_time_is_not_asked_elsewhere() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    rig.take_sent();
    let read = rig.read(0, 0);
    rig.answer_read(Ok(content(OLD)));
    rig.tick(5_000);
    assert!(shown(&rig, read, OLD));
    assert_eq!(questions(&mut rig), []);
}
