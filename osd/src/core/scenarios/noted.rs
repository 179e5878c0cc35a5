//! Writes of objects that a member lacks: they go on, and the member notes them (rule P4).

use super::*;

const OLD: u64 = 5;

/// osd.1 and osd.2 hold eight objects, osd.3 none. Four are under way.
fn one_is_empty() -> Rig {
    let held: Vec<(u32, Version)> = (0..8).map(|n| (n, version(OLD, 1))).collect();
    let mut rig = Rig::new(&held);
    rig.interval(10, &[1, 2, 3], vec![past(OLD, &[1, 2])]);
    rig.tells(2, OLD, &held.iter().map(|(o, v)| has(*o, *v)).collect::<Vec<_>>());
    rig.tells(3, 0, &[]);
    rig.activates(2);
    rig.activates(3);
    assert_eq!(reads(&rig), [0, 1, 2, 3]);
    rig.take_sent();
    rig
}

fn reads(rig: &Rig) -> Vec<u32> {
    rig.object_reads.iter().map(|(_, o)| o.index).collect()
}

/// What sub-writes say: to whom, of what, the number.
fn sub_writes(rig: &mut Rig) -> Vec<(u32, SubWriteKind, u64)> {
    let kind = |(to, body): (OsdId, PeerBody)| match body {
        PeerBody::SubWrite { tid, write, .. } => Some((to.0, write, tid)),
        _ => None,
    };
    rig.take_sent().into_iter().filter_map(kind).collect()
}

fn done(rig: &Rig, token: ClientToken) -> bool {
    matches!(rig.reply(token), Some(OpReply::Done { .. }))
}

fn acks(rig: &mut Rig, from: u32, tid: u64) {
    rig.hear(from, PeerBody::SubWriteAck { tid, result: SubResult::Ok });
}

/// The store gives the next object that is read, at `version`; what is pushed then.
fn pushes(rig: &mut Rig, version: Version) -> (u64, Version) {
    rig.take_sent();
    rig.answer_object(Ok((ObjectState { version, deleted: false, pending: None }, Content::default())));
    let pushed = rig.take_sent().into_iter().find_map(|(_, b)| match b {
        PeerBody::Push { tid, version, .. } => Some((tid, version)),
        _ => None,
    });
    pushed.expect("a push")
}

#[test]
fn a_write_does_not_wait_for_who_lacks_the_object() {
    let mut rig = one_is_empty();
    let write = rig.write(7, 0);
    let sent = sub_writes(&mut rig);
    let [(2, SubWriteKind::Write { .. }, tid), (3, SubWriteKind::Note, _)] = sent[..] else {
        panic!("{sent:?}")
    };
    acks(&mut rig, 2, tid);
    assert!(!done(&rig, write), "osd.3 has not noted it yet");
    acks(&mut rig, 3, tid);
    assert!(done(&rig, write));
    for _ in 0..4 {
        let (tid, _) = pushes(&mut rig, version(OLD, 1));
        rig.hear(3, PeerBody::PushAck { tid, result: SubResult::Ok });
    }
    assert_eq!(reads(&rig), [4, 5, 6, 7]);
    for _ in 4..7 {
        pushes(&mut rig, version(OLD, 1));
    }
    assert_eq!(pushes(&mut rig, version(10, 1)).1, version(10, 1), "what it is now");
}

/// All of it has been sent.
#[test]
fn what_is_about_to_end_is_written_when_it_is_there() {
    let mut rig = one_is_empty();
    let (tid, _) = pushes(&mut rig, version(OLD, 1));
    let write = rig.write(0, 0);
    assert!(sub_writes(&mut rig).is_empty());
    rig.hear(3, PeerBody::PushAck { tid, result: SubResult::Ok });
    let sent = sub_writes(&mut rig);
    let [(2, SubWriteKind::Write { .. }, tid), (3, SubWriteKind::Write { .. }, _)] = sent[..] else {
        panic!("{sent:?}")
    };
    acks(&mut rig, 2, tid);
    acks(&mut rig, 3, tid);
    assert!(done(&rig, write));
}

/// What is on its way is given up for a write, so that it need not wait, and comes anew; but not for ever.
#[test]
fn what_is_under_way_gives_way_to_a_write_three_times() {
    let mut rig = one_is_empty();
    for n in 1..=3 {
        let write = rig.write(0, 0);
        let sent = sub_writes(&mut rig);
        let [(2, SubWriteKind::Write { .. }, tid), (3, SubWriteKind::Note, _)] = sent[..] else {
            panic!("{sent:?}")
        };
        acks(&mut rig, 2, tid);
        acks(&mut rig, 3, tid);
        assert!(done(&rig, write));
        // What was being read for the push that was given up is what the object was.
        let at = reads(&rig).iter().position(|o| *o == 0).expect("it was being read");
        let was = if n == 1 { version(OLD, 1) } else { version(10, n - 1) };
        let read = rig.object_reads.remove(at).unwrap();
        rig.object_reads.push_front(read);
        rig.answer_object(Ok((
            ObjectState { version: was, deleted: false, pending: None },
            Content::default(),
        )));
        assert!(rig.take_sent().is_empty(), "{n}: nothing of it is pushed");
        while !reads(&rig).contains(&0) {
            let (tid, _) = pushes(&mut rig, version(OLD, 1));
            rig.hear(3, PeerBody::PushAck { tid, result: SubResult::Ok });
        }
    }
    let write = rig.write(0, 0);
    assert!(sub_writes(&mut rig).is_empty(), "its turn comes");
    while reads(&rig)[0] != 0 {
        pushes(&mut rig, version(OLD, 1));
    }
    let (tid, now) = pushes(&mut rig, version(10, 3));
    assert_eq!(now, version(10, 3));
    rig.hear(3, PeerBody::PushAck { tid, result: SubResult::Ok });
    assert!(!sub_writes(&mut rig).is_empty() && !done(&rig, write));
}

/// Objects that are written all the time come last; then new writes wait for a moment, so that their turn comes.
#[test]
fn recovery_waits_for_writes_in_flight_and_new_ones_for_it() {
    let mut rig = one_is_empty();
    let first = rig.write(4, 0);
    let tid = sub_writes(&mut rig)[0].2;
    for _ in 0..4 {
        let (tid, _) = pushes(&mut rig, version(OLD, 1));
        rig.hear(3, PeerBody::PushAck { tid, result: SubResult::Ok });
    }
    assert_eq!(reads(&rig), [5, 6, 7], "4 is being written");
    let second = rig.write(4, 1);
    assert!(sub_writes(&mut rig).is_empty(), "it is the turn of 4");
    acks(&mut rig, 2, tid);
    acks(&mut rig, 3, tid);
    assert!(done(&rig, first));
    assert_eq!(reads(&rig), [5, 6, 7, 4]);
    assert!(sub_writes(&mut rig).is_empty());
    for _ in 5..8 {
        pushes(&mut rig, version(OLD, 1));
    }
    let (tid, now) = pushes(&mut rig, version(10, 1));
    assert_eq!(now, version(10, 1));
    rig.hear(3, PeerBody::PushAck { tid, result: SubResult::Ok });
    let sent = sub_writes(&mut rig);
    assert!(matches!(sent[..], [(2, SubWriteKind::Write { .. }, _), (3, SubWriteKind::Write { .. }, _)]));
    assert!(!done(&rig, second));
}

/// Invariant 1 and min-size 2: the only holder takes no write.
#[test]
fn a_write_waits_while_too_few_have_the_object() {
    let held: Vec<(u32, Version)> = (0..8).map(|n| (n, version(OLD, 1))).collect();
    let mut rig = Rig::new(&held);
    rig.interval(10, &[1, 2, 3], vec![past(OLD, &[1])]);
    for o in [2, 3] {
        rig.tells(o, 0, &[]);
    }
    rig.activates(2);
    rig.activates(3);
    rig.take_sent();
    rig.write(7, 0);
    assert!(sub_writes(&mut rig).is_empty());
    assert_eq!(reads(&rig), [0, 1, 2, 3, 7], "it is in demand");
}

/// A version that was perhaps never acknowledged may have to go back: it is not written over.
#[test]
fn a_write_waits_while_the_object_is_in_doubt() {
    let mut held: Vec<(u32, Version)> = (0..8).map(|n| (n, version(OLD, 1))).collect();
    held[7].1 = version(OLD, 2);
    let mut rig = Rig::new(&held);
    rig.interval(10, &[1, 2, 3], vec![past(OLD, &[1, 2, 3])]);
    for o in [2, 3] {
        let theirs = if o == 2 { version(OLD, 2) } else { version(OLD, 1) };
        rig.tells(o, OLD, &[has(7, theirs)]);
    }
    rig.activates(2);
    rig.activates(3);
    rig.take_sent();
    rig.write(7, 0);
    assert!(sub_writes(&mut rig).is_empty());
}

/// osd.1 is a member that lacks object 0.
fn lacking() -> Rig {
    let mut rig = Rig::new(&[]);
    rig.interval(10, &[2, 1, 3], vec![past(OLD, &[2, 3])]);
    rig.hear(2, PeerBody::Query);
    let missing = vec![ObjectEntry { missing: true, ..has(0, version(OLD, 1)) }];
    rig.hear(2, PeerBody::Activate { page: 0, missing, last: true });
    rig.take_sent();
    rig.commits.clear();
    rig
}

fn note(rig: &mut Rig, counter: u32) -> Vec<(OsdId, PeerBody)> {
    let (prev, version) = (version(10, counter - 1), version(10, counter));
    let (tid, write) = (u64::from(counter), SubWriteKind::Note);
    rig.hear(2, PeerBody::SubWrite { tid, object: object(0), version, prev, write });
    rig.take_sent()
}

fn push(rig: &mut Rig, version: Version) -> Vec<(OsdId, PeerBody)> {
    let piece = Some(PieceImage { same: 0, extents: Vec::new(), end: 0, bad: Vec::new() });
    rig.hear(2, PeerBody::Push { tid: 99, object: object(0), version, deleted: false, over: None, piece });
    rig.take_sent()
}

fn ok(tid: u64) -> Vec<(OsdId, PeerBody)> {
    vec![(OsdId(2), PeerBody::SubWriteAck { tid, result: SubResult::Ok })]
}

#[test]
fn a_member_notes_what_it_lacks_before_it_answers() {
    let mut rig = lacking();
    assert_eq!(note(&mut rig, 2), ok(2));
    let needed = Needed::certain(version(10, 2), false);
    assert_eq!(rig.commits, [[TxnOp::AddMissing { object: object(0), needed }]]);
    assert_eq!(note(&mut rig, 1), ok(1), "an older one is contained in it");
    assert_eq!(note(&mut rig, 2), ok(2), "again");
    assert_eq!(rig.commits.len(), 1);
    let refused = PeerBody::PushAck { tid: 99, result: SubResult::VersionMismatch };
    assert_eq!(push(&mut rig, version(OLD, 1)), [(OsdId(2), refused)], "what it should have had before");
    let taken = PeerBody::PushAck { tid: 99, result: SubResult::Ok };
    assert_eq!(push(&mut rig, version(10, 2)), [(OsdId(2), taken)]);
    assert_eq!(note(&mut rig, 2), ok(2), "it has it");
}

/// A push that the primary has given up, and which is stored while a newer write is noted.
#[test]
fn a_late_push_does_not_hide_a_newer_note() {
    let mut rig = lacking();
    rig.hold_pushes = true;
    assert!(push(&mut rig, version(OLD, 1)).is_empty());
    assert!(note(&mut rig, 1).is_empty(), "its turn comes when that is over");
    rig.hold_pushes = false;
    let token = rig.held.pop_front().expect("the push is being stored");
    rig.step(Event::Committed { token, result: Ok(()) });
    let taken = (OsdId(2), PeerBody::PushAck { tid: 99, result: SubResult::Ok });
    assert_eq!(rig.take_sent(), [vec![taken], ok(1)].concat());
    let needed = Needed::certain(version(10, 1), false);
    assert_eq!(rig.commits.last().unwrap(), &[TxnOp::AddMissing { object: object(0), needed }]);
}
