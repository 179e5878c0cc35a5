//! Whole copies of which each has a bad block in another place: what one cannot read another one gives.

use super::*;
use crate::erasure::sparse_content;
use crate::store::{Readable, digest_of};
use gabion_proto::msg::{OpError, ScrubEntry};

const BLOCKS: u32 = 8;

fn at() -> Version {
    version(5, 1)
}

/// The object, but for these blocks.
fn without(bad: &[u32]) -> Content {
    let block = |b: u32| (b, Block::of(vec![b as u8 + 1; 4096].into()));
    sparse_content((0..BLOCKS).filter(|b| !bad.contains(b)).map(block))
}

/// Blocks and the checksums that they should have.
fn gaps(bad: &[u32]) -> Vec<(u32, u32)> {
    bad.iter().map(|b| (*b, crc32fast::hash(&[*b as u8 + 1; 4096]))).collect()
}

fn unreadable(state: Option<(ObjectState, u32)>, content: Content, bad: &[u32]) -> StoreError {
    let bad: Vec<_> = gaps(bad).into_iter().map(|(b, crc)| (object(0), b, crc)).collect();
    let (object, block, _) = bad[0];
    let rest = Some(Box::new(Readable { state, content, bad }));
    StoreError::Unreadable { object, block, why: "checksum mismatch".into(), rest }
}

impl Rig {
    /// A client reads all of it, and these blocks cannot be read here.
    fn read_all(&mut self, bad: &[u32]) -> ClientToken {
        let kind = OpKind::Read { first_block: 0, block_count: BLOCKS, below: Vec::new() };
        let token = self.client(0, kind, Bytes::new());
        self.own_fails(bad);
        token
    }

    fn own_fails(&mut self, bad: &[u32]) {
        self.answer_read(Err(unreadable(None, without(bad), bad)));
    }

    /// A piece of the own copy of which these blocks are bad, as its store has it.
    fn own_piece_at(&mut self, version: Version, bad: &[u32]) {
        let (token, _) = self.object_reads.pop_front().expect("the own copy is read");
        let state = ObjectState { version, deleted: false, pending: None };
        let result = match bad {
            [] => Ok(Piece { state, content: without(&[]), end: BLOCKS }),
            _ => Err(unreadable(Some((state, BLOCKS)), without(bad), bad)),
        };
        self.step(Event::PieceRead { token, result });
    }

    fn pulled(&mut self) -> Option<(OsdId, u64)> {
        let pull = |(to, b)| match b {
            PeerBody::Pull { tid, version, first_block: 0, .. } => {
                assert_eq!(version, at(), "of no other version");
                Some((to, tid))
            }
            _ => None,
        };
        self.take_sent().into_iter().find_map(pull)
    }

    /// Whoever is asked answers with what can be read of its copy.
    fn pulls(&mut self, from: u32, bad: &[u32]) {
        let (to, tid) = self.pulled().expect("asks for a piece");
        assert_eq!(to, OsdId(from));
        self.gives_all_but(from, tid, bad);
    }

    fn gives_all_but(&mut self, from: u32, tid: u64, bad: &[u32]) {
        let c = without(bad);
        let piece = Ok(PieceImage { same: 0, extents: c.extents, end: BLOCKS, bad: gaps(bad) });
        let body = PeerBody::PullReply { tid, object: object(0), version: at(), first_block: 0, piece };
        self.hear_data(from, body, c.data);
    }

    fn dropped(&self) -> bool {
        self.ops().any(|op| matches!(op, TxnOp::DropMissing { .. }))
    }

    fn assembled(&self) -> bool {
        self.ops().any(|op| matches!(op, TxnOp::Assemble { .. }))
    }

    /// Who is brought what is here now, over what is there.
    fn pushes(&mut self) -> Vec<(OsdId, u64)> {
        let pushes = |(to, b)| match b {
            PeerBody::Push { tid, version, over, .. } => {
                assert_eq!((version, over), (at(), Some(at())));
                Some((to, tid))
            }
            _ => None,
        };
        self.take_sent().into_iter().filter_map(pushes).collect()
    }

    /// Those get it, and the group is whole.
    fn brings_it_to(&mut self, to: &[u32]) {
        self.own_piece_at(at(), &[]);
        let pushes = self.pushes();
        assert_eq!(pushes.iter().map(|(o, _)| o.0).collect::<Vec<_>>(), to);
        // Of places that nobody holds.
        let vacant = 3 - self.map.pgs[&PG].acting.len() as u64;
        assert_eq!(self.core.pg_statuses()[0].degraded_objects, vacant + to.len() as u64);
        for (o, tid) in pushes {
            self.hear(o.0, PeerBody::PushAck { tid, result: SubResult::Ok });
        }
        self.tick(100);
        let status = &self.core.pg_statuses()[0];
        assert_eq!((status.damaged_objects, status.unfound_objects, status.degraded_objects), (0, 0, vacant));
    }

    fn shows(&self, token: ClientToken, content: &Content) {
        assert_eq!(self.reply(token), Some(&OpReply::Data { extents: content.extents.clone() }));
    }

    fn fails(&self, token: ClientToken) {
        assert_eq!(self.reply(token), Some(&OpReply::Failed(OpError::Io)));
    }
}

fn two() -> Rig {
    Rig::active(&[(0, at())], &[1, 2])
}

fn three() -> Rig {
    Rig::active(&[(0, at())], &[1, 2, 3])
}

/// Two copies: the one cannot read block 1, the other one block 5.
#[test]
fn a_read_puts_two_copies_together() {
    let mut rig = two();
    let read = rig.read_all(&[1]);
    assert!(rig.ops().any(|op| matches!(op, TxnOp::AddMissing { .. })));
    rig.pulls(2, &[5]);
    assert!(rig.dropped(), "only here is block 5: whoever leads the next interval must ask for it here");
    rig.own_piece_at(at(), &[1]);
    assert_eq!(rig.placed, [without(&[])]);
    assert!(rig.assembled());
    rig.answer_read(Ok(without(&[])));
    rig.shows(read, &without(&[]));
    rig.brings_it_to(&[2]);
}

/// Three copies: a third one has what the source lacks; it stays as it is.
#[test]
fn what_the_source_cannot_read_is_asked_of_the_next_one() {
    let mut rig = three();
    rig.read_all(&[1]);
    rig.pulls(2, &[1, 5]);
    rig.pulls(3, &[6]);
    assert_eq!(rig.placed, [without(&[])]);
    assert!(rig.assembled() && rig.object_reads.len() == 1);
    rig.brings_it_to(&[2, 3]);
}

/// A source that goes away between two pieces, or refuses: the others are asked all the same.
#[test]
fn a_source_that_refuses_is_passed_over() {
    let mut rig = three();
    let read = rig.read_all(&[1]);
    rig.pulls(2, &[5]);
    let (from, tid) = rig.pulled().expect("asks osd.3");
    assert_eq!(from, OsdId(3));
    let (object, version, piece) = (object(0), at(), Err(SubResult::VersionMismatch));
    rig.hear(3, PeerBody::PullReply { tid, object, version, first_block: 0, piece });
    rig.own_piece_at(at(), &[1]);
    assert!(rig.assembled());
    rig.answer_read(Ok(without(&[])));
    rig.shows(read, &without(&[]));
}

/// The own disk has lost a write that it had acknowledged: its blocks are of an older version.
#[test]
fn nothing_is_put_together_with_another_version() {
    let mut rig = two();
    let read = rig.read_all(&[1]);
    rig.pulls(2, &[5]);
    rig.own_piece_at(version(4, 9), &[1]);
    assert!(!rig.assembled() && rig.placed.is_empty());
    assert!(!matches!(rig.reply(read), Some(OpReply::Data { .. })));
}

/// Nobody has block 5. The rest is served, whoever has it, and nothing else is.
#[test]
fn what_somebody_has_of_a_damaged_object_is_served() {
    let mut rig = three();
    let read = rig.read_all(&[1, 5]);
    rig.pulls(2, &[2, 5]);
    rig.pulls(3, &[5]);
    rig.own_piece_at(at(), &[1, 5]);
    assert_eq!(rig.core.pg_statuses()[0].damaged_objects, 1);
    assert!(!rig.assembled());
    // It has waited, and is read again.
    rig.own_fails(&[1, 5]);
    rig.pulls(2, &[2, 5]);
    rig.pulls(3, &[5]);
    rig.fails(read);
    let one = rig.read(0, 1);
    rig.own_fails_at(1);
    rig.pulls(2, &[2, 5]);
    rig.shows(one, &Content::data(1, vec![2; 4096].into()));
}

/// Whoever is asked must be at the version that the object has here: writes of it wait until the read has ended.
#[test]
fn a_write_waits_for_a_read_that_is_mended() {
    let mut rig = damaged();
    let read = rig.read(0, 1);
    rig.own_fails_at(1);
    let (from, tid) = rig.pulled().expect("asks");
    rig.write(0, 3);
    assert!(!rig.sent.iter().any(|(_, b)| matches!(b, PeerBody::SubWrite { .. })));
    rig.gives_all_but(from.0, tid, &[5]);
    rig.shows(read, &Content::data(1, vec![2; 4096].into()));
    assert!(rig.sent.iter().any(|(_, b)| matches!(b, PeerBody::SubWrite { .. })));
}

/// And it waits for those that are in flight. It asks for what the object is then.
#[test]
fn a_read_that_is_mended_waits_for_writes_in_flight() {
    let mut rig = damaged();
    let write = rig.write(0, 3);
    let sub_write = |(_, b)| match b {
        PeerBody::SubWrite { tid, version, .. } => Some((tid, version)),
        _ => None,
    };
    let (tid, written) = rig.take_sent().into_iter().find_map(sub_write).expect("is sent");
    rig.read(0, 1);
    rig.own_fails_at(1);
    rig.tick(100);
    assert!(!rig.sent.iter().any(|(_, b)| matches!(b, PeerBody::Pull { .. })));
    for from in [2, 3] {
        rig.hear(from, PeerBody::SubWriteAck { tid, result: SubResult::Ok });
    }
    assert!(matches!(rig.reply(write), Some(OpReply::Done { .. })));
    rig.tick(100);
    let asked = rig.sent.iter().find_map(|(_, b)| match b {
        PeerBody::Pull { version, .. } => Some(*version),
        _ => None,
    });
    assert_eq!(asked, Some(written));
}

/// A member that does not answer: others are asked, and it is asked again. That it is silent does not mean that it has nothing.
#[test]
fn a_member_that_does_not_answer_is_asked_again() {
    let mut rig = damaged();
    let read = rig.read(0, 1);
    rig.own_fails_at(1);
    let (first, tid) = rig.pulled().expect("asks");
    assert_eq!(first, OsdId(2));
    rig.tick(2_000);
    rig.pulls(3, &[1, 5]);
    assert_eq!(rig.reply(read), None, "osd.2 may have it");
    rig.tick(2_000);
    assert_eq!(rig.pulled(), Some((first, tid)));
    rig.gives_all_but(2, tid, &[5]);
    rig.shows(read, &Content::data(1, vec![2; 4096].into()));
    // Once somebody has said nothing for long, the client comes again. An error is for what nobody has.
    let read = rig.read(0, 1);
    rig.own_fails_at(1);
    for _ in 0..12 {
        rig.tick(2_000);
    }
    assert!(matches!(rig.reply(read), Some(OpReply::Retry { .. })));
}

/// Two reads find the same block bad: what the second one makes of it would outlive the repair that the first one began.
#[test]
fn a_copy_that_is_being_replaced_is_not_lost_again() {
    let mut rig = three();
    rig.hold_pushes = true;
    let whole = OpKind::Read { first_block: 0, block_count: BLOCKS, below: Vec::new() };
    let reads = [(); 3].map(|()| rig.client(0, whole.clone(), Bytes::new()));
    rig.own_fails(&[1]);
    rig.pulls(2, &[]);
    assert!(rig.assembled());
    rig.commits.clear();
    rig.own_fails(&[1]);
    rig.hold_pushes = false;
    let token = rig.held.pop_front().expect("is being stored");
    rig.step(Event::Committed { token, result: Ok(()) });
    // It was read before the copy was replaced.
    rig.own_fails(&[1]);
    assert!(!rig.ops().any(|op| matches!(op, TxnOp::AddMissing { .. })), "it would be missed for ever");
    assert!(matches!(rig.reply(reads[2]), Some(OpReply::Retry { .. })));
    assert_eq!(rig.core.pg_statuses()[0].degraded_objects, 0);
    // These have waited for it, and are read again.
    (0..2).for_each(|_| rig.answer_read(Ok(without(&[]))));
    (0..2).for_each(|n| rig.shows(reads[n], &without(&[])));
}

/// The same, of a scrub that began before.
#[test]
fn a_copy_that_is_being_replaced_is_not_found_wrong() {
    let mut rig = three();
    rig.hold_pushes = true;
    let (number, deep) = (1, true);
    rig.step(Event::Scrub { orders: vec![ScrubOrder { pg: PG, number, deep }], rate_bytes_per_s: 64 << 20 });
    let asked = |(_, b): &(OsdId, PeerBody)| match b {
        PeerBody::ScrubRead { tid, .. } => Some(*tid),
        _ => None,
    };
    let tid = rig.sent.iter().find_map(asked).expect("asks members");
    let state = ObjectState { version: at(), deleted: false, pending: None };
    rig.answer_object(Ok((state, without(&[]))));
    rig.read_all(&[1]);
    rig.pulls(2, &[]);
    assert!(rig.assembled());
    rig.commits.clear();
    for from in [2, 3] {
        let digest = digest_of(&without(&[]));
        let entry = ScrubEntry { object: object(0), version: at(), deleted: false, digest, unreadable: None };
        rig.hear(from, PeerBody::ScrubInfo { tid, entries: vec![entry], last: true });
    }
    assert!(!rig.ops().any(|op| matches!(op, TxnOp::AddMissing { .. })), "it would be missed for ever");
    let token = rig.held.pop_front().expect("is being stored");
    rig.step(Event::Committed { token, result: Ok(()) });
    assert_eq!(rig.core.pg_statuses()[0].degraded_objects, 0);
}

/// Somebody lacks what is damaged: it cannot be brought to them, and nobody tries all the time.
#[test]
fn what_is_damaged_is_brought_to_nobody() {
    let mut rig = Rig::new(&[(0, at())]);
    rig.interval(10, &[1, 2, 3], vec![past(5, &[1, 2])]);
    rig.tells(2, 5, &[has(0, at())]);
    rig.tells(3, 0, &[]);
    rig.activates(2);
    rig.activates(3);
    rig.own_piece_at(at(), &[5]);
    rig.pulls(2, &[5]);
    rig.own_piece_at(at(), &[5]);
    assert_eq!(rig.core.pg_statuses()[0].damaged_objects, 1);
    rig.take_sent();
    for _ in 0..90 {
        rig.tick(100);
        assert!(rig.object_reads.is_empty() && rig.pulled().is_none());
    }
}

/// An answer that is not what was asked for, or whose bytes changed on the way, is none.
#[test]
fn a_wrong_answer_is_none() {
    let mut rig = damaged();
    let read = rig.read(0, 1);
    rig.own_fails_at(1);
    let (from, tid) = rig.pulled().expect("asks");
    assert_eq!(from, OsdId(2));
    let c = without(&[]);
    let image = PieceImage { same: 0, extents: c.extents.clone(), end: BLOCKS, bad: Vec::new() };
    let body = |piece| PeerBody::PullReply { tid, object: object(0), version: at(), first_block: 0, piece };
    rig.hear_data(3, body(Ok(image.clone())), c.data.clone());
    assert_eq!(rig.reply(read), None, "osd.3 was not asked");
    let mut bytes = c.data.to_vec();
    bytes[4096] ^= 1;
    rig.hear_data(2, body(Ok(image)), bytes.into());
    assert_eq!(rig.reply(read), None, "osd.3 is asked");
    rig.pulls(3, &[5]);
    rig.shows(read, &Content::data(1, vec![2; 4096].into()));
}

/// Block 5 can be read nowhere, block 1 not here.
fn damaged() -> Rig {
    let mut rig = three();
    rig.read_all(&[1, 5]);
    rig.pulls(2, &[5]);
    rig.pulls(3, &[5]);
    rig.own_piece_at(at(), &[1, 5]);
    rig.own_fails(&[1, 5]);
    for from in [2, 3] {
        rig.pulls(from, &[5]);
    }
    assert_eq!(rig.core.pg_statuses()[0].damaged_objects, 1);
    rig
}

impl Rig {
    fn own_fails_at(&mut self, block: u32) {
        self.answer_read(Err(unreadable(None, Content::default(), &[block])));
    }

    /// Everybody's copy is read; a scrub is told what is found. Some copies may be readable, and be this.
    fn deep_scrub(&mut self, number: u64, own: Option<u8>, others: &[(u32, Option<u8>)]) {
        let orders = vec![ScrubOrder { pg: PG, number, deep: true }];
        self.step(Event::Scrub { orders, rate_bytes_per_s: 64 << 20 });
        let content = |fill: u8| Content::data(0, vec![fill; 4096].into());
        let state = ObjectState { version: at(), deleted: false, pending: None };
        self.answer_object(match own {
            Some(fill) => Ok((state, content(fill))),
            None => Err(unreadable(None, Content::default(), &[1])),
        });
        let asked = self.sent.iter().rev().find_map(|(_, b)| match b {
            PeerBody::ScrubRead { tid, .. } => Some(*tid),
            _ => None,
        });
        let tid = asked.expect("asks members");
        for (from, fill) in others {
            let (digest, unreadable) = match fill {
                Some(fill) => (digest_of(&content(*fill)), None),
                None => (0, Some(2)),
            };
            let entry = ScrubEntry { object: object(0), version: at(), deleted: false, digest, unreadable };
            self.hear(*from, PeerBody::ScrubInfo { tid, entries: vec![entry], last: true });
        }
    }

    fn scrubbed(&self) -> Option<(u64, u64, u64)> {
        self.reports.iter().rev().find_map(|r| match r {
            MonitorRequest::Scrubbed { report: r, .. } => Some((r.findings, r.repaired, r.damaged_objects)),
            _ => None,
        })
    }
}

#[test]
fn a_scrub_that_finds_no_copy_whole_puts_them_together() {
    let mut rig = three();
    rig.deep_scrub(1, None, &[(2, None), (3, None)]);
    assert!(!rig.ops().any(|op| matches!(op, TxnOp::AddMissing { .. })), "the own copy may be needed");
    rig.pulls(2, &[2, 5]);
    rig.pulls(3, &[2, 6]);
    rig.own_piece_at(at(), &[1]);
    assert_eq!(rig.placed, [without(&[])]);
    rig.brings_it_to(&[2, 3]);
    assert_eq!(rig.scrubbed(), Some((3, 3, 0)));
}

/// A client has written what nobody could read: then the rest of it is repaired.
#[test]
fn what_is_damaged_is_put_together_when_it_can_be() {
    let mut rig = damaged();
    rig.tick(100);
    rig.deep_scrub(1, None, &[(2, None), (3, None)]);
    rig.pulls(2, &[5]);
    rig.pulls(3, &[]);
    assert!(rig.assembled());
    rig.brings_it_to(&[2, 3]);
    assert_eq!(rig.scrubbed(), Some((3, 3, 0)));
}

/// A scrub has found the own copy wrong, and then the others have bad blocks: what is here fills no gap, and is not served either.
#[test]
fn a_copy_that_a_scrub_found_wrong_fills_no_gap() {
    let mut rig = three();
    rig.deep_scrub(1, Some(9), &[(2, Some(1)), (3, Some(1))]);
    let read =
        rig.client(0, OpKind::Read { first_block: 0, block_count: 1, below: Vec::new() }, Bytes::new());
    rig.pulls(2, &[5]);
    rig.pulls(3, &[5]);
    assert!(rig.object_reads.is_empty() && rig.reads.is_empty() && !rig.assembled() && !rig.dropped());
    assert_eq!(rig.reply(read), None);
    assert_eq!(rig.core.pg_statuses()[0].unfound_objects, 1);
}

/// As a member: it says what it cannot read of a piece, and is offered nothing of that kind.
#[test]
fn a_member_sends_what_it_can_read() {
    let mut rig = Rig::new(&[(0, at())]);
    rig.interval(10, &[2, 1], vec![past(5, &[2, 1])]);
    rig.hear(2, PeerBody::Query);
    rig.hear(2, PeerBody::Activate { page: 0, missing: Vec::new(), last: true });
    rig.take_sent();
    let pull =
        |tid| PeerBody::Pull { tid, object: object(0), version: at(), first_block: 0, have: Vec::new() };
    rig.hear(2, pull(7));
    rig.own_piece_at(at(), &[1, 5]);
    let c = without(&[1, 5]);
    let image = PieceImage { same: 0, extents: c.extents, end: BLOCKS, bad: gaps(&[1, 5]) };
    let reply =
        |tid, piece| PeerBody::PullReply { tid, object: object(0), version: at(), first_block: 0, piece };
    assert_eq!(rig.take_sent(), [(OsdId(2), reply(7, Ok(image)))]);
    // Its disk is at another version than it believes.
    rig.hear(2, pull(8));
    rig.own_piece_at(version(4, 9), &[1, 5]);
    assert_eq!(rig.take_sent(), [(OsdId(2), reply(8, Err(SubResult::VersionMismatch)))]);
}

/// A scrub read the own copy when all of it was readable. Then it is to replace the other one, and is not any more.
#[test]
fn a_copy_that_was_to_be_replaced_gives_what_the_own_one_lost() {
    let mut rig = two();
    rig.deep_scrub(1, Some(1), &[(2, None)]);
    rig.own_piece_at(at(), &[3]);
    rig.pulls(2, &[5]);
    rig.own_piece_at(at(), &[3]);
    assert_eq!(rig.placed, [without(&[])]);
    rig.brings_it_to(&[2]);
}
