//! What must not wait for ever, nor hold others up for ever.

use super::*;
use crate::store::digest_of;
use gabion_proto::msg::{ScrubEntry, ScrubRange};

fn pulls(rig: &mut Rig) -> Vec<u32> {
    let pull = |(to, b): (OsdId, PeerBody)| matches!(b, PeerBody::Pull { .. }).then_some(to.0);
    rig.take_sent().into_iter().filter_map(pull).collect()
}

/// osd.1 lacks the object; osd.2, which acts, and osd.3, of the past, have it. One answer of osd.2 is lost while osd.3 is down.
#[test]
fn a_source_that_was_late_once_is_asked_again() {
    let v = version(5, 1);
    let mut rig = Rig::new(&[]);
    rig.listing.meta = Some(PgMeta::default());
    rig.interval(10, &[1, 2], vec![past(5, &[2, 3])]);
    rig.tells(3, 5, &[has(0, v)]);
    rig.tells(2, 5, &[has(0, v)]);
    rig.activates(2);
    assert_eq!(pulls(&mut rig), [2], "pulls from who acts");
    rig.map.osds.get_mut(&OsdId(3)).unwrap().up = false;
    rig.map.epoch = Epoch(11);
    rig.publish();
    let mut again = Vec::new();
    for n in 0..3_000 {
        rig.tick(100);
        let asked = pulls(&mut rig);
        // For four seconds it is patient.
        again.extend(asked.into_iter().filter(|_| n > 100));
    }
    assert!(
        !again.is_empty(),
        "osd.2 has it, acts, and is not asked any more: {:?}",
        rig.core.pg_statuses()[0].waiting_for
    );
}

fn info(rig: &mut Rig, from: u32, activated: u64, shard: Option<u8>, entries: &[ObjectEntry]) {
    let (activated, parts) = (Epoch(activated), Vec::new());
    rig.hear(from, PeerBody::Info { activated, object_count: 0, missing_count: 0, shard, parts });
    rig.hear(from, PeerBody::List { after: None, entries: entries.to_vec(), last: true });
}

/// A pool 2+2 that serves with three: osd.1 has a shard of the object, and besides the members there are others, of which some are down.
fn coded(version: Version, others: std::ops::RangeInclusive<u32>, down: [u32; 2]) -> Rig {
    let mut rig = Rig::new(&[(0, version)]);
    for n in others {
        rig.map.osds.insert(OsdId(n), OsdInfo { up: !down.contains(&n), ..osd(n) });
    }
    if let Some(pool) = rig.map.pools.get_mut(&PG.pool) {
        (pool.redundancy, pool.min_size) = (Redundancy::Erasure { k: 2, m: 2 }, 3);
    }
    rig
}

/// 2+2: osd.1 and, of the past, osd.5 have shards, and are enough. osd.5 goes down, osd.6, of the past too, comes back.
#[test]
fn a_shard_that_comes_back_is_asked_for_when_another_is_down() {
    let v = version(5, 1);
    let mut rig = coded(v, 5..=7, [6, 7]);
    rig.interval(10, &[1, 2, 3, 4], vec![past(5, &[1, 5, 6, 7])]);
    info(&mut rig, 5, 5, Some(1), &[has(0, v)]);
    for n in 2..=4 {
        info(&mut rig, n, 0, None, &[]);
    }
    (2..=4).for_each(|n| rig.activates(n));
    let asked = rig.asked_for_shards();
    assert!(asked.iter().any(|(to, _)| *to == OsdId(5)), "{asked:?}");
    rig.map.osds.get_mut(&OsdId(5)).unwrap().up = false;
    rig.map.epoch = Epoch(11);
    rig.publish();
    for _ in 0..100 {
        rig.tick(100);
    }
    rig.map.osds.get_mut(&OsdId(6)).unwrap().up = true;
    rig.map.epoch = Epoch(12);
    rig.publish();
    rig.take_sent();
    for _ in 0..600 {
        rig.tick(100);
    }
    let asked = rig.take_sent().into_iter().any(|(to, b)| to == OsdId(6) && b == PeerBody::Query);
    assert!(asked, "osd.6 has a shard, is up, and is never asked");
}

/// 2+2: osd.5 and osd.6, both of the past, have the same shard. The one that is asked goes down.
#[test]
fn of_two_that_have_a_shard_the_one_that_is_up_is_asked() {
    let v = version(5, 1);
    let mut rig = coded(v, 5..=8, [7, 8]);
    rig.interval(10, &[1, 2, 3, 4], vec![past(4, &[1, 5, 7, 8]), past(5, &[1, 6, 7, 8])]);
    info(&mut rig, 5, 4, Some(1), &[has(0, v)]);
    info(&mut rig, 6, 5, Some(1), &[has(0, v)]);
    for n in 2..=4 {
        info(&mut rig, n, 0, None, &[]);
    }
    (2..=4).for_each(|n| rig.activates(n));
    let asked: Vec<OsdId> = rig.asked_for_shards().into_iter().map(|(to, _)| to).collect();
    assert_eq!(asked, [OsdId(6)]);
    rig.map.osds.get_mut(&OsdId(6)).unwrap().up = false;
    rig.map.epoch = Epoch(11);
    rig.publish();
    for _ in 0..600 {
        rig.tick(100);
    }
    let asked: Vec<OsdId> = rig.asked_for_shards().into_iter().map(|(to, _)| to).collect();
    let status = &rig.core.pg_statuses()[0];
    assert!(
        asked.contains(&OsdId(5)),
        "osd.5 has it, is up, and is not asked; unfound: {}",
        status.unfound_objects
    );
}

/// A client has one write of an object under way at all times.
#[test]
fn who_always_writes_does_not_stop_a_scrub_nor_is_stopped() {
    let digest = digest_of(&Content::data(0, vec![1; 4096].into()));
    let state = |version| ObjectState { version, deleted: false, pending: None };
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    rig.take_sent();
    rig.step(Event::Scrub {
        orders: vec![ScrubOrder { pg: PG, number: 1, deep: false }],
        rate_bytes_per_s: 64 << 20,
    });
    let (mut newest, mut write, mut scrub, mut writes) = (version(5, 1), None, None, 0);
    rig.write(0, 0);
    for n in 1..3_000 {
        for (_, b) in rig.take_sent() {
            match b {
                PeerBody::SubWrite { tid, version, .. } => (newest, write) = (version, Some(tid)),
                PeerBody::ScrubRead { tid, range, .. } => scrub = Some((tid, range)),
                _ => {}
            }
        }
        if let Some((tid, range)) = scrub.take() {
            assert!(matches!(range, ScrubRange::After(None) | ScrubRange::One(_)));
            while let Some((token, _)) = rig.digests.pop_front() {
                rig.step(Event::Digested { token, result: Ok((state(newest), digest)) });
            }
            let entry =
                ScrubEntry { object: object(0), version: newest, deleted: false, digest, unreadable: None };
            for other in [2, 3] {
                rig.hear(other, PeerBody::ScrubInfo { tid, entries: vec![entry], last: true });
            }
        }
        // Each is answered within two milliseconds, and the next one follows at once.
        for _ in 0..50 {
            let Some(tid) = write.take() else { break };
            writes += 1;
            for other in [2, 3] {
                rig.hear(other, PeerBody::SubWriteAck { tid, result: SubResult::Ok });
            }
            rig.write(0, 0);
            rig.take_sent().into_iter().for_each(|(_, b)| match b {
                PeerBody::SubWrite { tid, version, .. } => (newest, write) = (version, Some(tid)),
                PeerBody::ScrubRead { tid, range, .. } => scrub = Some((tid, range)),
                _ => {}
            });
        }
        if rig.reports.iter().any(|r| matches!(r, MonitorRequest::Scrubbed { .. })) {
            assert!(writes > 40 * n, "{writes} writes in {n} ticks");
            return;
        }
        rig.tick(100);
    }
    panic!("not scrubbed after 300 s; {writes} writes");
}

/// The first piece of an object is being read for a push, which gives way to a write; then it turns out that it cannot be read. Nobody else has
/// what is being written yet: that this OSD misses it must not be noted (as when a client's read finds the block).
#[test]
fn a_bad_block_found_for_a_push_that_gave_way_waits_for_the_write() {
    let v = version(5, 1);
    let mut rig = Rig::new(&[(0, v)]);
    rig.interval(10, &[1, 2, 3], vec![past(5, &[1, 2])]);
    rig.tells(2, 5, &[has(0, v)]);
    rig.tells(3, 0, &[]);
    rig.activates(2);
    rig.activates(3);
    assert_eq!(rig.object_reads.len(), 1, "osd.3 is to get it");
    rig.take_sent();
    let write = rig.write(0, 5);
    let sent = rig.take_sent();
    assert!(
        sent.iter()
            .any(|(to, b)| *to == OsdId(3)
                && matches!(b, PeerBody::SubWrite { write: SubWriteKind::Note, .. }))
    );
    rig.commits.clear();
    rig.answer_object(Err(StoreError::Unreadable {
        object: object(0),
        block: 0,
        why: "checksum mismatch".into(),
        rest: None,
    }));
    assert_eq!(rig.reply(write), None, "on its way to osd.2 and osd.3");
    let missed = rig.ops().find(|op| matches!(op, TxnOp::AddMissing { .. }));
    assert_eq!(missed, None, "durably missed here, without a doubt, and nobody else has it");
}

/// What becomes of it: osd.2 never got the write, osd.1 and osd.3 were an interval without it, and osd.2 is back with what was acknowledged.
#[test]
fn the_only_disk_with_a_version_serves_what_it_can_read() {
    let (acknowledged, written) = (version(5, 1), version(10, 1));
    let mut rig = Rig::new(&[(0, written)]);
    let meta = PgMeta { promised: Epoch(11), activated: Epoch(11), shard: None, pg_count: 1 };
    rig.listing.meta = Some(meta);
    rig.listing.missing = vec![(object(0), Needed::certain(written, false))];
    rig.interval(12, &[1, 2, 3], vec![past(10, &[1, 2, 3]), past(11, &[1, 3])]);
    rig.tells(2, 10, &[has(0, acknowledged)]);
    rig.tells(3, 11, &[ObjectEntry { missing: true, ..has(0, written) }]);
    rig.activates(2);
    rig.activates(3);
    for _ in 0..3_000 {
        rig.tick(100);
    }
    let status = &rig.core.pg_statuses()[0];
    assert_eq!(status.unfound_objects, 0, "every disk is here, and the object waits: {}", status.waiting_for);
}

/// osd.1 could not read a block of its copy and was about to get it anew, when osd.2, the only other one that had it, was lost for good
/// (`osd rm --force`). All other blocks are here.
#[test]
fn the_only_copy_is_served_as_far_as_it_can_be_read() {
    let v = version(5, 1);
    let mut rig = Rig::new(&[(0, v)]);
    rig.listing.meta = Some(PgMeta { promised: Epoch(10), activated: Epoch(10), shard: None, pg_count: 1 });
    rig.listing.missing = vec![(object(0), Needed::certain(v, false))];
    rig.interval(12, &[1, 3], vec![past(10, &[1, 3])]);
    rig.tells(3, 10, &[ObjectEntry { missing: true, ..has(0, v) }]);
    rig.activates(3);
    for _ in 0..300 {
        rig.tick(100);
    }
    rig.read(0, 7);
    let status = &rig.core.pg_statuses()[0];
    assert!(!rig.reads.is_empty(), "nobody else will ever have it: {}", status.waiting_for);
}
