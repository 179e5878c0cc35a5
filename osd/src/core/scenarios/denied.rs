//! Writes that one lost disk had, noted as needed by an interval that never served, and members that were away then and never had them.

use super::uncertain::{activated_with, unfound};
use super::*;

fn v(counter: u32) -> Version {
    version(5, counter)
}

fn misses(version: Version, uncertain: Option<Version>) -> ObjectEntry {
    ObjectEntry { missing: true, uncertain, ..has(0, version) }
}

/// Interval 5 was {osd.4, osd.1}; osd.1 was then away. Interval 7 was {osd.4, osd.3}: osd.3, which was new, has taken note that it needs what osd.4
/// had, and nothing else was done. osd.4 is gone, and osd.1 back.
fn survivors(own: Rig, noted: ObjectEntry, past: Vec<PastInterval>) -> Rig {
    let mut rig = own;
    rig.map.osds.get_mut(&OsdId(4)).unwrap().up = false;
    rig.interval(10, &[1, 3], past);
    rig.tells(3, 7, &[noted]);
    rig.activates(3);
    rig
}

fn waits(mut rig: Rig, why: &str) {
    assert_eq!(unfound(&rig), 1, "{why}");
    rig.read(0, 0);
    assert!(rig.reads.is_empty(), "{why}");
    assert!(!rig.reports.contains(&MonitorRequest::Clean { pg: PG, interval: Epoch(10) }), "{why}");
}

#[test]
fn a_member_of_the_interval_denies_what_it_never_had() {
    let mut rig = survivors(Rig::new(&[(0, version(3, 1))]), misses(v(1), None), vec![past(5, &[4, 1])]);
    assert_eq!(unfound(&rig), 0);
    let read = rig.read(0, 0);
    rig.answer_read(Ok(Content::default()));
    assert!(matches!(rig.reply(read), Some(OpReply::Data { .. })));
    assert_eq!(activated_with(&rig), [misses(version(3, 1), None)], "osd.3 gets the older state");
}

/// As the simulator found it: the write made the object.
#[test]
fn an_object_that_a_denied_write_made_never_was() {
    let mut rig = survivors(Rig::new(&[]), misses(v(1), None), vec![past(5, &[4, 1])]);
    assert_eq!(unfound(&rig), 0);
    rig.read(0, 0);
    rig.answer_read(Ok(Content::default()));
    let tid = rig.sent.iter().find_map(|(_, b)| match b {
        PeerBody::Push { tid, version: Version::ZERO, .. } => Some(*tid),
        _ => None,
    });
    rig.hear(3, PeerBody::PushAck { tid: tid.expect("osd.3 forgets it"), result: SubResult::Ok });
    assert!(rig.reports.contains(&MonitorRequest::Clean { pg: PG, interval: Epoch(10) }));
    rig.write(0, 0);
    assert!(rig.sent.iter().any(|(_, b)| matches!(b, PeerBody::SubWrite { .. })), "is written anew");
}

/// Whoever was active in the interval counts, however many the pool wants now.
#[test]
fn sizes_do_not_matter() {
    for (size, min_size) in [(2, 1), (3, 1), (4, 2), (5, 2)] {
        let mut own = Rig::new(&[]);
        let pool = own.map.pools.get_mut(&PG.pool).unwrap();
        (pool.redundancy, pool.min_size) = (Redundancy::Replicated { size }, min_size);
        assert_eq!(unfound(&survivors(own, misses(v(1), None), vec![past(5, &[4, 1])])), 0);
        let mut own = Rig::new(&[]);
        let pool = own.map.pools.get_mut(&PG.pool).unwrap();
        (pool.redundancy, pool.min_size) = (Redundancy::Replicated { size }, min_size);
        waits(survivors(own, misses(v(1), None), vec![past(5, &[4, 1]), past(7, &[4, 3])]), "7 served");
    }
}

/// Two members got different parts of what the primary sent: nothing that both had goes.
#[test]
fn it_goes_back_to_the_newest_state_that_is_left() {
    let mut rig = Rig::new(&[(0, v(1))]);
    rig.map.osds.get_mut(&OsdId(4)).unwrap().up = false;
    rig.interval(10, &[1, 3], vec![past(5, &[4, 1, 2])]);
    rig.tells(2, 5, &[has(0, v(2))]);
    rig.tells(3, 7, &[misses(v(3), None)]);
    rig.activates(3);
    assert_eq!(unfound(&rig), 0);
    let needed = misses(v(2), Some(v(1)));
    assert_eq!(activated_with(&rig), [needed], "and that stays hidden until everybody has it");
}

/// The interval after it served: it may have shown the write, on the one disk that had it.
#[test]
fn what_a_later_interval_may_have_shown_is_waited_for() {
    let past = vec![past(5, &[4, 1]), past(7, &[4, 3])];
    waits(survivors(Rig::new(&[(0, version(3, 1))]), misses(v(1), None), past), "7 may have shown it");
}

/// Its name says 5, but the record of 5 went when a later interval of the same members ended.
#[test]
fn what_an_interval_wrote_that_is_not_the_last_one_is_waited_for() {
    let mut own = Rig::new(&[(0, version(3, 1))]);
    own.listing.meta = Some(PgMeta { promised: Epoch(6), activated: Epoch(6), shard: None, pg_count: 0 });
    waits(survivors(own, misses(v(1), None), vec![past(6, &[4, 1])]), "6 may have shown it");
}

/// An empty disk, and one that was away during the whole interval, lack everything.
#[test]
fn who_was_not_active_in_the_interval_denies_nothing() {
    for activated in [0, 4] {
        let mut own = Rig::new(&[(0, version(3, 1))]);
        own.listing.meta =
            Some(PgMeta { promised: Epoch(4), activated: Epoch(activated), shard: None, pg_count: 0 });
        own.map.osds.get_mut(&OsdId(4)).unwrap().up = false;
        own.interval(10, &[1, 3], vec![past(5, &[4, 1, 2])]);
        // It had the write and cannot read it any more.
        own.tells(2, 5, &[misses(v(1), None)]);
        own.tells(3, 7, &[misses(v(1), None)]);
        own.activates(3);
        waits(own, "osd.1 knows nothing of 5");
    }
}

/// osd.1 was active in 5, but is no member of it in the record: it is not asked.
#[test]
fn who_is_no_member_in_the_record_denies_nothing() {
    let mut rig = Rig::new(&[(0, version(3, 1))]);
    rig.map.osds.get_mut(&OsdId(4)).unwrap().up = false;
    rig.interval(10, &[1, 3], vec![past(5, &[4, 2])]);
    rig.tells(2, 5, &[misses(v(1), None)]);
    rig.tells(3, 7, &[misses(v(1), None)]);
    rig.activates(3);
    waits(rig, "osd.1 is not asked");
}

/// Its own copy had become unreadable: it misses what it once made durable.
#[test]
fn who_lost_its_copy_denies_nothing() {
    let mut own = Rig::new(&[(0, v(1))]);
    own.listing.missing.push((object(0), Needed::certain(v(1), false)));
    waits(survivors(own, misses(v(1), None), vec![past(5, &[4, 1])]), "osd.1 had it");
}

/// It took part in 7 as well, which chose the write, and what it had may be gone since.
#[test]
fn who_was_active_later_denies_nothing() {
    let mut own = Rig::new(&[(0, version(3, 1))]);
    own.listing.meta = Some(PgMeta { promised: Epoch(7), activated: Epoch(7), shard: None, pg_count: 0 });
    own.listing.missing.push((object(0), Needed::certain(v(1), false)));
    waits(survivors(own, misses(v(1), None), vec![past(5, &[4, 1])]), "7 had it from both");
}

/// A write that was acknowledged is with every member of its interval: it is brought to whoever lacks it.
#[test]
fn what_was_acknowledged_is_there() {
    let rig = survivors(Rig::new(&[(0, v(1))]), misses(v(1), None), vec![past(5, &[4, 1])]);
    assert_eq!(unfound(&rig), 0);
    assert_eq!(activated_with(&rig), [misses(v(1), None)]);
}

/// Interval 6 knew of the doubt, hid the write and did not bring it to osd.1, whose note says so. Interval 7 heard only from osd.4.
#[test]
fn a_doubt_that_the_last_interval_knew_outlives_one_that_forgot_it() {
    let doubted = |uncertain| {
        let mut own = Rig::new(&[(0, version(3, 1))]);
        own.listing.meta = Some(PgMeta { promised: Epoch(6), activated: Epoch(6), shard: None, pg_count: 0 });
        let needed = Needed { uncertain, ..Needed::certain(v(1), false) };
        own.listing.missing.push((object(0), needed));
        survivors(own, misses(v(1), None), vec![past(5, &[4, 1, 2]), past(6, &[4, 1])])
    };
    let mut rig = doubted(Some(version(3, 1)));
    // osd.2 says nothing.
    rig.tick(3_000);
    rig.activates(3);
    assert_eq!(unfound(&rig), 0);
    assert_eq!(activated_with(&rig), [misses(version(3, 1), None)]);
    waits(doubted(None), "6 knew of no doubt, and may have shown it");
}

/// The disk that has it is there: it is rolled forward, and hidden until everybody has it. It could still be lost.
#[test]
fn what_is_denied_and_not_lost_is_hidden() {
    let mut rig = Rig::new(&[(0, version(3, 1))]);
    rig.interval(10, &[1, 3, 4], vec![past(5, &[4, 1])]);
    rig.tells(3, 7, &[misses(v(1), None)]);
    rig.tells(4, 7, &[has(0, v(1))]);
    rig.activates(3);
    rig.activates(4);
    let needed = misses(v(1), Some(version(3, 1)));
    assert_eq!(activated_with(&rig), [needed]);
    let own = rig.ops().any(|op| {
        let needed = Needed { uncertain: Some(version(3, 1)), ..Needed::certain(v(1), false) };
        *op == TxnOp::AddMissing { object: object(0), needed }
    });
    assert!(own, "osd.1 has the mark, too");
    rig.read(0, 0);
    assert!(rig.reads.is_empty());
}
