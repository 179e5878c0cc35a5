//! Copies that came back through an export and an import (`osd/docs/format.md`): one that is out of date stands for no later
//! interval, and nobody believes what it holds.

use super::*;

fn activation_of(rig: &Rig, member: u32) -> Option<&Vec<ObjectEntry>> {
    rig.sent.iter().find_map(|(to, body)| match body {
        PeerBody::Activate { missing, .. } if *to == OsdId(member) => Some(missing),
        _ => None,
    })
}

/// osd.3 and osd.4 were the members of interval 7; osd.4 is gone.
fn waiting_for_interval_7() -> Rig {
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    rig.interval(10, &[1, 2], vec![past(5, &[1, 2, 3]), past(7, &[3, 4])]);
    rig.tells(2, 5, &[has(0, version(5, 1))]);
    rig.tick(60_000);
    assert!(activation_of(&rig, 2).is_none(), "nobody of interval 7 has answered");
    rig
}

#[test]
fn the_copy_of_the_last_interval_stands_for_it() {
    let mut rig = waiting_for_interval_7();
    rig.tells(3, 7, &[has(0, version(7, 2))]);
    let missing = activation_of(&rig, 2).expect("goes on");
    assert!(missing.iter().any(|e| e.missing && e.version == version(7, 2)), "{missing:?}");
}

#[test]
fn a_copy_of_before_does_not() {
    let mut rig = waiting_for_interval_7();
    rig.tells(3, 5, &[has(0, version(5, 1))]);
    rig.tick(60_000);
    assert!(activation_of(&rig, 2).is_none());
}

#[test]
fn what_an_old_copy_holds_is_overwritten_or_deleted() {
    let mut rig = Rig::new(&[(0, version(5, 1)), (2, version(4, 1))]);
    rig.interval(10, &[1, 3], vec![past(5, &[1, 2])]);
    // Object 0 as it was, object 1, which was deleted since, and object 2, which has not changed.
    rig.tells(3, 4, &[has(0, version(4, 9)), has(1, version(4, 1)), has(2, version(4, 1))]);
    let missing = activation_of(&rig, 3).expect("goes on");
    let told: Vec<_> = missing.iter().map(|e| (e.object.index, e.version, e.deleted)).collect();
    assert_eq!(told, [(0, version(5, 1), false), (1, Version::ZERO, true)]);
}
