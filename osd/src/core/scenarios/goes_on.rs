//! An acknowledged write that nobody has any more as it was, but somebody with more (rule P3g).

use super::uncertain::{activated_with, unfound};
use super::*;
use gabion_proto::map::OsdInfo;

/// Interval 5 was {osd.4, osd.5, osd.1}: osd.1 missed the object and noted that it was written, which was acknowledged; osd.5 took another write of it, of which
/// nobody else heard. osd.1 has led interval 7 without the two.
fn noted_and_written_over() -> Rig {
    let mut rig = Rig::new(&[]);
    let fifth = OsdInfo { incarnation: Incarnation(5), ..rig.map.osds[&OsdId(4)].clone() };
    rig.map.osds.insert(OsdId(5), fifth);
    for o in [4, 5] {
        rig.map.osds.get_mut(&OsdId(o)).unwrap().up = false;
    }
    rig.listing.meta = Some(PgMeta { promised: Epoch(5), activated: Epoch(5), ..PgMeta::default() });
    rig.listing.missing.push((object(0), Needed::certain(version(5, 1), false)));
    rig
}

/// The same, after interval 7, of which this is what it noted. osd.5 is back.
fn written_over_and_back(noted: Needed) -> Rig {
    let mut rig = noted_and_written_over();
    rig.listing.missing[0].1 = noted;
    rig.listing.meta = Some(PgMeta { promised: Epoch(7), activated: Epoch(7), ..PgMeta::default() });
    rig.map.osds.get_mut(&OsdId(5)).unwrap().up = true;
    rig
}

/// What it notes itself.
fn notes(rig: &Rig) -> Vec<TxnOp> {
    rig.ops().filter(|op| matches!(op, TxnOp::AddMissing { .. })).cloned().collect()
}

fn needs(needed: Needed) -> [TxnOp; 1] {
    [TxnOp::AddMissing { object: object(0), needed }]
}

fn open(counter: u32) -> Needed {
    Needed { uncertain: Some(version(5, 1)), ..Needed::certain(version(5, counter), false) }
}

fn misses(needed: Needed) -> ObjectEntry {
    ObjectEntry { missing: true, uncertain: needed.uncertain, ..has(0, needed.version) }
}

/// Nobody who has it is there: whoever missed it says that nobody was shown it since.
#[test]
fn what_nobody_has_any_more_is_noted_as_hidden() {
    let mut rig = noted_and_written_over();
    rig.interval(7, &[1, 2], vec![past(5, &[4, 5, 1])]);
    rig.tells(2, 3, &[]);
    rig.activates(2);
    assert_eq!(notes(&rig), needs(open(1)));
    assert_eq!(activated_with(&rig), [misses(open(1))]);
    assert_eq!(unfound(&rig), 1);
}

/// Who has it with more is back, as a member. As the simulator found it (`--from 300374`): the object waited for ever.
#[test]
fn it_goes_on_to_a_later_version_of_its_interval() {
    let mut rig = written_over_and_back(open(1));
    rig.interval(10, &[1, 5], vec![past(5, &[4, 5, 1]), past(7, &[1, 2])]);
    rig.tells(5, 5, &[has(0, version(5, 2))]);
    rig.tells(2, 7, &[misses(open(1))]);
    rig.activates(5);
    assert_eq!(unfound(&rig), 0);
    assert_eq!(notes(&rig), needs(open(2)));
    rig.read(0, 0);
    assert!(rig.reads.is_empty(), "it is shown when both have it");
}

/// Somebody was shown the older one meanwhile: what was never acknowledged must not appear behind it.
#[test]
fn what_was_shown_does_not_go_on() {
    let mut rig = written_over_and_back(Needed::certain(version(5, 1), false));
    rig.interval(10, &[1, 5], vec![past(5, &[4, 5, 1]), past(7, &[1, 2])]);
    rig.tells(5, 5, &[has(0, version(5, 2))]);
    rig.activates(5);
    assert_eq!(unfound(&rig), 1);
    assert_eq!(activated_with(&rig), [misses(Needed::certain(version(5, 1), false))]);
}

/// Who has it with more is back, and will be no member.
#[test]
fn a_stray_with_a_later_version_is_heard() {
    let mut rig = noted_and_written_over();
    rig.interval(7, &[1, 2], vec![past(5, &[4, 5, 1])]);
    rig.tells(2, 3, &[]);
    rig.activates(2);
    assert!(rig.core.stuck_peers().is_empty());
    rig.map.osds.get_mut(&OsdId(5)).unwrap().up = true;
    rig.map.epoch = Epoch(8);
    rig.publish();
    // Not at once: the last interval should have heard of it.
    rig.tells(5, 5, &[has(0, version(5, 2))]);
    assert!(rig.core.stuck_peers().is_empty());
    rig.tick(10_000);
    rig.tells(5, 5, &[has(0, version(5, 2))]);
    let stuck: Vec<u32> = rig.core.stuck_peers().iter().map(|s| s.peer).collect();
    assert_eq!(stuck, [1], "a new interval is needed");
}

/// It is asked before anything is chosen: otherwise each interval would end as soon as it is heard.
#[test]
fn a_stray_that_is_up_is_waited_for() {
    let mut rig = written_over_and_back(open(1));
    rig.interval(10, &[1, 2], vec![past(5, &[4, 5, 1]), past(7, &[1, 2])]);
    rig.tells(2, 7, &[misses(open(1))]);
    assert!(rig.sent.contains(&(OsdId(5), PeerBody::Query)) && activated_with(&rig).is_empty());
    rig.tells(5, 5, &[has(0, version(5, 2))]);
    assert_eq!(activated_with(&rig), [misses(open(2))]);
    assert_eq!(unfound(&rig), 0);
}

/// As long as it is up and says nothing for some seconds.
#[test]
fn a_stray_that_is_silent_is_not_waited_for_long() {
    let mut rig = noted_and_written_over();
    rig.listing.missing[0].1 = open(1);
    rig.map.osds.get_mut(&OsdId(5)).unwrap().up = true;
    rig.interval(10, &[1, 2], vec![past(5, &[4, 5, 1])]);
    rig.tells(2, 3, &[]);
    assert!(activated_with(&rig).is_empty());
    rig.tick(3_000);
    assert_eq!(activated_with(&rig), [misses(open(1))]);
}

/// An acting member has it as it was: it is shown from there, whoever else lacks it.
#[test]
fn what_an_acting_member_has_is_not_hidden() {
    let mut rig = written_over_and_back(open(1));
    rig.interval(10, &[1, 5], vec![past(5, &[4, 5, 1]), past(7, &[1, 2])]);
    rig.tells(2, 7, &[misses(open(1))]);
    rig.tells(5, 5, &[has(0, version(5, 1))]);
    rig.activates(5);
    assert_eq!(notes(&rig), needs(Needed::certain(version(5, 1), false)));
}
