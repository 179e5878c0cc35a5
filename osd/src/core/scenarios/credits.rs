//! Recovery takes a bounded share of an OSD, however many groups it has, and stops at nothing bad.

use super::*;

/// osd.1 is the only holder of every object of some groups; osd.2 has nothing.
fn sole_holder(object_bytes: u32, objects: u32, groups: u32) -> Rig {
    let held: Vec<(u32, Version)> = (0..objects).map(|n| (n, version(5, 1))).collect();
    let mut rig = Rig::new(&held);
    let pool = rig.map.pools.get_mut(&PoolId(1)).unwrap();
    (pool.object_bytes, pool.pg_count) = (object_bytes, groups);
    rig.interval(10, &[1, 2], vec![past(5, &[1, 3])]);
    for index in 0..groups {
        rig.pg.index = index;
        rig.tells(2, 0, &[]);
        rig.activates(2);
    }
    rig
}

#[test]
fn all_groups_share_the_bytes() {
    let mut rig = sole_holder(8 << 20, 20, 40);
    assert_eq!(rig.object_reads.len(), 128);
    rig.tick(100);
    assert_eq!(rig.object_reads.len(), 128, "32 MiB are under way");
    // Whoever ends makes room for another one.
    let state = ObjectState { version: version(5, 1), deleted: false, pending: None };
    rig.answer_object(Ok((state, Content::default())));
    let (_, PeerBody::Push { tid, .. }) = rig.sent.pop().expect("pushes") else { panic!("a push") };
    rig.pg.index = 0;
    rig.hear(2, PeerBody::PushAck { tid, result: SubResult::Ok });
    assert_eq!(rig.object_reads.len(), 128);
}

#[test]
fn what_a_client_waits_for_goes_first_all_the_same() {
    let mut rig = sole_holder(8 << 20, 20, 2);
    rig.object_reads.clear();
    // Both groups have an object of that name: the client's is in the group of its hash.
    rig.pg = rig.map.pg_of(PoolId(1), VOLUME, 19).unwrap();
    rig.write(19, 0);
    assert_eq!(rig.object_reads.iter().map(|(_, o)| *o).collect::<Vec<_>>(), [object(19)]);
}

/// A disk that dies slowly: what it cannot read must not keep it from giving away the rest.
#[test]
fn unreadable_objects_give_way_to_readable_ones() {
    let mut rig = sole_holder(1 << 20, 6, 2);
    let mut tried = BTreeMap::<ObjectId, u32>::new();
    for _ in 0..20 {
        while let Some((_, object)) = rig.object_reads.front().copied() {
            *tried.entry(object).or_default() += 1;
            let bad = StoreError::Unreadable { object, block: 0, why: "test".into(), rest: None };
            rig.answer_object(Err(bad));
        }
        rig.tick(100);
    }
    assert_eq!(tried, (0..6).map(|n| (object(n), 2)).collect(), "each once in each group");
}

/// The only other copy is with a member of the past.
#[test]
fn a_bad_copy_is_replaced_from_a_member_of_the_past() {
    let mut rig = Rig::new(&[(0, version(5, 1))]);
    rig.interval(10, &[1, 2], vec![past(5, &[1, 3])]);
    rig.tells(3, 5, &[has(0, version(5, 1))]);
    rig.tells(2, 0, &[]);
    rig.activates(2);
    let bad = StoreError::Unreadable { object: object(0), block: 0, why: "test".into(), rest: None };
    rig.answer_object(Err(bad));
    assert!(rig.sent.iter().any(|(to, b)| *to == OsdId(3) && matches!(b, PeerBody::Pull { .. })));
}

/// Over a connection that works, a slow member gets the same bytes again and again for nothing.
#[test]
fn an_unanswered_write_is_sent_again_ever_more_rarely() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    rig.sent.clear();
    rig.write(0, 0);
    let mut at = Vec::new();
    for _ in 0..90 {
        let sent = rig.take_sent();
        if sent.iter().any(|(to, b)| *to == OsdId(2) && matches!(b, PeerBody::SubWrite { .. })) {
            at.push(rig.now);
        }
        rig.tick(100);
    }
    assert_eq!(at, [0, 500, 1_000, 2_000, 4_000, 8_000]);
}

/// Three groups wait for their turn; of the last one a member goes away meanwhile, and one copy is left of what it is to bring.
#[test]
fn a_group_that_loses_a_copy_meanwhile_goes_first() {
    let v = version(5, 1);
    let mut rig = Rig::new(&[(0, v)]);
    rig.map.pools.get_mut(&PoolId(1)).unwrap().pg_count = 3;
    rig.step(Event::RebuildLimit { bytes_per_s: 1 });
    rig.interval(10, &[1, 2, 3], vec![past(5, &[1, 2, 3])]);
    for (index, lacks) in [(0, 2), (1, 2), (2, 3)] {
        rig.pg.index = index;
        for other in [2, 3] {
            match other == lacks {
                true => rig.tells(other, 0, &[]),
                false => rig.tells(other, 5, &[has(0, v)]),
            }
        }
        rig.activates(2);
        rig.activates(3);
    }
    assert!(rig.object_reads.is_empty(), "as the limit has it");
    let mut record = PgRecord::clone(&rig.map.pgs[&rig.pg]);
    record.acting = vec![OsdId(1), OsdId(3)];
    (record.interval, record.past) = (Epoch(11), vec![past(5, &[1, 2, 3]), past(10, &[1, 2, 3])]);
    rig.map.epoch = Epoch(11);
    rig.map.pgs.insert(rig.pg, Shared::from(record));
    rig.publish();
    rig.tells(3, 10, &[ObjectEntry { missing: true, ..has(0, v) }]);
    rig.activates(3);
    assert!(rig.object_reads.is_empty());
    rig.take_sent();
    rig.tick(1_000);
    let state = ObjectState { version: v, deleted: false, pending: None };
    rig.answer_object(Ok((state, Content::zero(0, 1))));
    let pushes = |(to, b)| matches!(b, PeerBody::Push { .. }).then_some(to);
    let first = rig.take_sent().into_iter().find_map(pushes);
    assert_eq!(first, Some(OsdId(3)), "of the last group");
}
