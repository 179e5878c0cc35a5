//! Maps that say nothing of a group are no reason to delete it.

use super::*;

fn removes(rig: &Rig) -> bool {
    rig.ops().any(|op| matches!(op, TxnOp::RemovePg))
}

fn without_the_pool(rig: &mut Rig, epoch: u64) {
    rig.map.epoch = Epoch(epoch);
    rig.map.pgs.clear();
    rig.map.pools.clear();
}

#[test]
fn a_map_of_another_cluster_deletes_nothing() {
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    without_the_pool(&mut rig, 3);
    rig.map.cluster = ClusterId([8; 16]);
    rig.map.removed_pools.insert(PoolId(1));
    rig.publish();
    assert!(!removes(&rig));
    // Nor does it stand in the way of the right one.
    rig.map.cluster = CLUSTER;
    rig.map.epoch = Epoch(2);
    rig.publish();
    assert_eq!(rig.core.acked_epoch(), Epoch(2));
}

#[test]
fn a_map_from_before_the_boot_deletes_nothing() {
    let mut rig = Rig::booted(&[(0, version(5, 1))], Epoch(9));
    without_the_pool(&mut rig, 8);
    rig.map.removed_pools.insert(PoolId(1));
    rig.publish();
    assert!(!removes(&rig));
}

#[test]
fn a_map_that_calls_another_run_up_deletes_nothing() {
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    without_the_pool(&mut rig, 3);
    rig.map.removed_pools.insert(PoolId(1));
    rig.map.osds.get_mut(&OsdId(1)).unwrap().incarnation = Incarnation(2);
    rig.publish();
    assert!(!removes(&rig));
}

/// Monitors that were set up again from an old backup do not know of younger pools.
#[test]
fn only_the_tombstone_of_its_pool_deletes_a_group() {
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    without_the_pool(&mut rig, 3);
    rig.publish();
    assert!(!removes(&rig));
    rig.map.epoch = Epoch(4);
    rig.map.removed_pools.insert(PoolId(1));
    rig.publish();
    assert!(removes(&rig));
    // Once.
    rig.commits.clear();
    rig.map.epoch = Epoch(5);
    rig.publish();
    assert!(!removes(&rig));
}

#[test]
fn a_group_that_comes_back_is_listed_again() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2]);
    without_the_pool(&mut rig, 11);
    let pools = Rig::new(&[]).map.pools;
    rig.publish();
    let read = rig.read(0, 0);
    assert!(matches!(rig.reply(read), Some(OpReply::Retry { .. })), "not served meanwhile");
    rig.map.pools = pools;
    rig.sent.clear();
    rig.interval(12, &[1, 2], vec![past(10, &[1, 2])]);
    rig.tells(2, 10, &[has(0, version(5, 1))]);
    rig.activates(2);
    let read = rig.read(0, 0);
    assert_eq!(rig.reads.len(), 1);
    rig.answer_read(Ok(Content::default()));
    assert!(matches!(rig.reply(read), Some(OpReply::Data { .. })));
}

/// They would give versions out again that members have, who would take new writes for old ones.
#[test]
fn monitors_that_forgot_an_interval_are_noticed() {
    let meta = |promised, activated| PgMeta {
        promised: Epoch(promised),
        activated: Epoch(activated),
        shard: None,
        pg_count: 0,
    };
    let start = vec![(PG, meta(4, 4)), (PgId { index: 1, ..PG }, meta(9, 7))];
    let boot =
        |epoch| Boot { cluster: CLUSTER, id: OsdId(1), incarnation: Incarnation(1), epoch: Epoch(epoch) };
    assert_eq!(boot(8).forgotten(&start), Some(Epoch(9)));
    assert_eq!(boot(9).forgotten(&start), Some(Epoch(9)), "a boot makes a map of its own");
    assert_eq!(boot(10).forgotten(&start), None);
    for epoch in [0, 1] {
        assert_eq!(boot(epoch).forgotten(&Vec::new()), None, "a new disk");
        assert_eq!(boot(epoch).forgotten(&vec![(PG, meta(0, 0))]), None, "one that never promised anything");
    }
}

/// Whose map is newer asks at once. Before: nothing was answered, and the group waited until it was asked again.
#[test]
fn a_question_that_is_ahead_of_its_map_is_answered_with_it() {
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    let question = |interval, to_incarnation| PeerMsg {
        from: OsdId(2),
        from_incarnation: Incarnation(2),
        to: OsdId(1),
        to_incarnation: Incarnation(to_incarnation),
        epoch: Epoch(interval),
        pg: PG,
        interval: Epoch(interval),
        body: PeerBody::Query,
    };
    let ask = |rig: &mut Rig, msg| {
        rig.step(Event::Peer { msg, data: Bytes::new() });
        assert!(rig.take_sent().is_empty());
    };
    rig.interval(9, &[1, 2], vec![past(5, &[1, 2])]);
    rig.take_sent();
    ask(&mut rig, question(11, 1));
    // One of an earlier interval does not take its place.
    ask(&mut rig, question(10, 1));
    let answers = |rig: &mut Rig| {
        let sent = rig.take_sent();
        sent.iter().filter(|(to, b)| *to == OsdId(2) && matches!(b, PeerBody::Info { .. })).count()
    };
    rig.led(2, 11, &[2, 1], vec![past(5, &[1, 2])]);
    assert_eq!(answers(&mut rig), 1);
    // Once; and nothing to whom the map does not call primary, or to a question to another run of this process.
    ask(&mut rig, question(13, 2));
    rig.led(2, 13, &[2, 1], vec![past(5, &[1, 2])]);
    assert_eq!(answers(&mut rig), 0);
    ask(&mut rig, question(14, 1));
    rig.led(3, 14, &[3, 1], vec![past(5, &[1, 2])]);
    assert_eq!(answers(&mut rig), 0);
    rig.led(2, 15, &[2, 1], vec![past(5, &[1, 2])]);
    assert_eq!(answers(&mut rig), 0, "it was of an interval that is over");
}

/// The next primary serves when this one has said that it does not any more: the monitors are told at once.
#[test]
fn who_is_primary_no_more_owes_an_answer() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2]);
    let told = rig.core.acked_epoch();
    assert!(!rig.core.owes_ack(told));
    // A new interval of the same primary, and anything else.
    rig.interval(12, &[1, 2, 3], vec![past(10, &[1, 2])]);
    assert!(!rig.core.owes_ack(told), "nobody waits for this one");
    rig.led(2, 13, &[2, 1], vec![past(10, &[1, 2])]);
    assert!(rig.core.owes_ack(told) && !rig.core.owes_ack(Epoch(13)));
    // A volume has another holder.
    let told = rig.core.acked_epoch();
    rig.map.epoch = Epoch(14);
    rig.map.attachments.get_mut(&VOLUME).unwrap().generation = Generation(2);
    rig.publish();
    assert!(rig.core.owes_ack(told));
}
