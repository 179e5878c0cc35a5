//! Members of past intervals that are up and do not work: they must not keep a group from serving.

use super::*;

fn activates(rig: &Rig) -> bool {
    rig.sent.iter().any(|(_, b)| matches!(b, PeerBody::Activate { .. }))
}

/// osd.3 was taken out by its operator: up, with a lease, and nothing reaches it. That it serves no reads is
/// for the monitors to see.
#[test]
fn an_earlier_primary_that_does_not_answer_is_not_waited_for() {
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    rig.interval(10, &[1, 2], vec![past(5, &[3, 1, 2])]);
    rig.tells(2, 5, &[has(0, version(5, 1))]);
    assert!(activates(&rig));
}

#[test]
fn half_a_list_of_a_stray_is_waited_for_no_longer_than_it_grows() {
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    rig.interval(10, &[1, 2], vec![past(5, &[3, 1, 2])]);
    rig.hear(
        3,
        PeerBody::Info {
            activated: Epoch(5),
            object_count: 2,
            missing_count: 0,
            shard: None,
            parts: Vec::new(),
        },
    );
    rig.tells(2, 5, &[has(0, version(5, 1))]);
    rig.tick(2_900);
    let page = PeerBody::List { after: None, entries: vec![has(0, version(5, 1))], last: false };
    rig.hear(3, page);
    rig.tick(2_900);
    assert!(!activates(&rig), "it still lists");
    rig.tick(200);
    assert!(activates(&rig));
}

/// Without it nobody was active in interval 5: there is no going on.
#[test]
fn half_a_list_that_is_needed_is_waited_for() {
    let mut rig = Rig::new(&[]);
    rig.interval(10, &[1, 2], vec![past(6, &[3, 4])]);
    rig.hear(
        3,
        PeerBody::Info {
            activated: Epoch(6),
            object_count: 2,
            missing_count: 0,
            shard: None,
            parts: Vec::new(),
        },
    );
    rig.tells(2, 0, &[]);
    rig.tick(60_000);
    assert!(!activates(&rig));
}
