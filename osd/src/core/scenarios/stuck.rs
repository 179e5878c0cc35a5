//! Recovery over links that do not work, and to members that do not take what they get.

use super::*;

fn pulls_from(rig: &Rig) -> Vec<u32> {
    let pull = |(to, b): &(OsdId, PeerBody)| matches!(b, PeerBody::Pull { .. }).then_some(to.0);
    rig.sent.iter().filter_map(pull).collect()
}

fn pushes(rig: &Rig) -> usize {
    rig.sent.iter().filter(|(_, b)| matches!(b, PeerBody::Push { .. })).count()
}

fn stuck(rig: &Rig) -> Vec<u32> {
    rig.core.stuck_peers().iter().map(|s| s.peer).collect()
}

/// osd.1 is primary and has object 0; osd.2 has not.
fn pushing(objects: u32) -> Rig {
    let held: Vec<(u32, Version)> = (0..objects).map(|n| (n, version(5, 1))).collect();
    let mut rig = Rig::new(&held);
    rig.interval(10, &[1, 2], vec![past(5, &[1, 3])]);
    rig.tells(2, 0, &[]);
    rig.activates(2);
    rig
}

fn read_and_push(rig: &mut Rig) {
    while !rig.object_reads.is_empty() {
        let state = ObjectState { version: version(5, 1), deleted: false, pending: None };
        rig.answer_object(Ok((state, Content::default())));
    }
}

#[test]
fn a_source_that_does_not_answer_is_changed() {
    let mut rig = Rig::new(&[]);
    rig.interval(10, &[1, 2, 3], vec![past(6, &[2, 3])]);
    rig.tells(2, 6, &[has(0, version(6, 1))]);
    rig.tells(3, 6, &[has(0, version(6, 1))]);
    rig.activates(2);
    rig.activates(3);
    assert_eq!(pulls_from(&rig), [2]);
    rig.tick(3_900);
    assert_eq!(pulls_from(&rig), [2, 2]);
    rig.tick(100);
    assert_eq!(pulls_from(&rig), [2, 2, 3]);
}

#[test]
fn the_only_source_is_asked_again_and_reported() {
    let mut rig = Rig::new(&[]);
    rig.interval(10, &[1, 2], vec![past(6, &[2, 3])]);
    rig.tells(2, 6, &[has(0, version(6, 1))]);
    rig.activates(2);
    for _ in 0..120 {
        rig.tick(100);
    }
    assert!(pulls_from(&rig).len() > 1);
    assert_eq!(stuck(&rig), [2]);
}

#[test]
fn a_member_that_does_not_answer_a_push_is_reported() {
    let mut rig = pushing(1);
    for _ in 0..99 {
        read_and_push(&mut rig);
        assert!(stuck(&rig).is_empty());
        rig.tick(100);
    }
    for _ in 0..3 {
        rig.tick(100);
        read_and_push(&mut rig);
    }
    assert!(pushes(&rig) > 1, "sent again");
    assert_eq!(stuck(&rig), [2]);
}

/// Slow, and it works.
#[test]
fn a_member_that_answers_some_is_not_reported() {
    let mut rig = pushing(40);
    for _ in 0..12 {
        read_and_push(&mut rig);
        let push = rig.take_sent().into_iter().find_map(|(_, b)| match b {
            PeerBody::Push { tid, .. } => Some(tid),
            _ => None,
        });
        rig.hear(2, PeerBody::PushAck { tid: push.expect("goes on"), result: SubResult::Ok });
        rig.tick(1_500);
        assert!(stuck(&rig).is_empty());
    }
}

#[test]
fn a_refused_push_is_not_repeated_at_once() {
    let mut rig = pushing(1);
    read_and_push(&mut rig);
    let PeerBody::Push { tid, .. } = rig.sent.pop().expect("pushes").1 else { panic!("a push") };
    rig.hear(2, PeerBody::PushAck { tid, result: SubResult::NoSpace });
    rig.tick(1_900);
    assert!(rig.object_reads.is_empty(), "not before a while");
    rig.tick(200);
    assert_eq!(rig.object_reads.len(), 1);
}
