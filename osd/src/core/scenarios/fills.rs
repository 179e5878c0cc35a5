//! Erasure coding: too few members to serve, and an OSD that could join is held back (rule E5).

use super::*;
use crate::erasure::ShardId;
use gabion_proto::pb;

const FILLED: MonitorRequest = MonitorRequest::Filled { pg: PG, interval: Epoch(10) };

fn shard(number: u8) -> ShardId {
    ShardId { number, k: 2, m: 1, matrix: 1 }
}

/// Interval 5 was {osd.4, osd.2, osd.3}. In interval 6 osd.1 stood in for osd.4, whose shard it lacks, or has beside something. Now osd.2 is lost
/// and osd.4 back: it is to have the position of osd.2, and is held back. All three are needed.
fn too_few(objects: &[(u32, Version)], lacks: &[(u32, Needed)]) -> Rig {
    let mut rig = Rig::new(objects);
    let pool = rig.map.pools.get_mut(&PG.pool).unwrap();
    (pool.redundancy, pool.min_size) = (Redundancy::Erasure { k: 2, m: 1 }, 3);
    rig.listing.meta =
        Some(PgMeta { promised: Epoch(6), activated: Epoch(6), shard: Some(shard(0)), pg_count: 0 });
    rig.listing.missing = lacks.iter().map(|(o, n)| (object(*o), *n)).collect();
    rig.map.osds.get_mut(&OsdId(2)).unwrap().up = false;
    rig
}

fn begin(rig: &mut Rig) {
    let record = PgRecord {
        up: vec![OsdId(1), OsdId(4), OsdId(3)],
        acting: vec![OsdId(1), OsdId::NONE, OsdId(3)],
        primary: Some(OsdId(1)),
        interval: Epoch(10),
        past: vec![past(5, &[4, 2, 3]), past(6, &[1, 2, 3])],
        ..PgRecord::default()
    };
    rig.map.epoch = Epoch(10);
    rig.map.pgs = [(PG, record.into())].into();
    rig.publish();
}

fn tells(rig: &mut Rig, from: u32, activated: u64, number: u8, entries: &[ObjectEntry]) {
    let info = PeerBody::Info {
        activated: Epoch(activated),
        object_count: 0,
        missing_count: 0,
        shard: Some(number),
        parts: Vec::new(),
    };
    rig.hear(from, info);
    rig.hear(from, PeerBody::List { after: None, entries: entries.to_vec(), last: true });
}

fn status(rig: &Rig) -> pb::PgStatus {
    rig.core.pg_statuses().into_iter().next().expect("osd.1 leads the group")
}

/// Answers whatever rows are asked for.
fn answer_rows(rig: &mut Rig) -> Vec<u32> {
    let asked: Vec<(u32, u64)> = rig
        .take_sent()
        .into_iter()
        .filter_map(|(to, body)| match body {
            PeerBody::ShardRead { tid, .. } => Some((to.0, tid)),
            _ => None,
        })
        .collect();
    let content = Content::data(0, vec![7; 4096].into());
    for (from, tid) in &asked {
        let rows = PeerBody::ShardData { tid: *tid, result: Ok(content.extents.clone()) };
        rig.hear_data(*from, rows, content.data.clone());
    }
    asked.into_iter().map(|(from, _)| from).collect()
}

#[test]
fn what_a_member_lacks_is_rebuilt_without_serving_anybody() {
    let newest = version(5, 1);
    let mut rig = too_few(&[], &[(0, Needed::certain(newest, false))]);
    begin(&mut rig);
    tells(&mut rig, 3, 6, 2, &[has(0, newest)]);
    tells(&mut rig, 4, 5, 0, &[has(0, newest)]);
    rig.activates(3);
    assert!(rig.reports.is_empty(), "nobody may count on this interval, and something is missing");
    assert_eq!(status(&rig).state(), pb::PgState::UndersizedInactive);
    let waits = status(&rig).waiting_for;
    assert_eq!(waits, "3 members, 2 are up; before osd.4 may join: 1 shards to be rebuilt");

    let (write, read) = (rig.write(1, 0), rig.read(0, 0));
    assert_eq!(answer_rows(&mut rig), [4], "who is held back has the shard");
    rig.tick(2_000);
    for token in [write, read] {
        let reply = rig.reply(token);
        assert!(matches!(reply, Some(OpReply::Retry { why: RetryWhy::NotActive, .. })), "{reply:?}");
    }
    let stored = |op: &TxnOp| matches!(op, TxnOp::Assemble { object: o, version, .. } if *o == object(0) && *version == newest);
    assert!(rig.ops().any(stored));
    assert_eq!(rig.reports, [FILLED]);
    rig.tick(60_000);
    assert_eq!(rig.reports, [FILLED], "once, and it is never activated nor clean");
    assert!(!rig.sent.iter().any(|(_, b)| matches!(b, PeerBody::SubWrite { .. } | PeerBody::Commit { .. })));
}

#[test]
fn whoever_is_needed_and_away_is_waited_for() {
    let newest = version(5, 1);
    let mut rig = too_few(&[], &[(0, Needed::certain(newest, false))]);
    rig.map.osds.get_mut(&OsdId(4)).unwrap().up = false;
    begin(&mut rig);
    assert_eq!(status(&rig).waiting_for, "3 members, 2 are up");
    assert!(rig.take_sent().is_empty(), "nobody is held back, nothing would be won");
    // It comes back. No interval begins by that.
    rig.map.epoch = Epoch(11);
    rig.map.osds.get_mut(&OsdId(4)).unwrap().up = true;
    rig.publish();
    let asked: Vec<u32> = rig.take_sent().iter().map(|(to, _)| to.0).collect();
    assert_eq!(asked, [3, 4]);
}

#[test]
fn fewer_than_decode_fill_nothing() {
    let mut rig = too_few(&[], &[]);
    rig.map.osds.get_mut(&OsdId(3)).unwrap().up = false;
    begin(&mut rig);
    let record = rig.map.pgs.get_mut(&PG).unwrap();
    (record.interval, record.acting[2]) = (Epoch(11), OsdId::NONE);
    rig.map.epoch = Epoch(11);
    rig.take_sent();
    rig.publish();
    assert_eq!(status(&rig).waiting_for, "3 members, 1 are up");
    assert!(rig.take_sent().is_empty());
}

/// osd.1 has the newest version and not the one before it: if that one must come back, only osd.4 has its shard.
#[test]
fn what_may_have_to_go_back_keeps_whoever_has_the_older_version() {
    let (newest, before) = (version(6, 1), version(5, 1));
    let pending = |base| ObjectEntry { base: Some(base), ..has(0, newest) };
    for (base, may) in [(Version::ZERO, false), (before, true)] {
        let mut rig = too_few(&[(0, base)], &[]);
        rig.listing.objects[0].1.pending = Some(newest);
        begin(&mut rig);
        tells(&mut rig, 3, 6, 2, &[pending(before)]);
        tells(&mut rig, 4, 5, 0, &[has(0, before)]);
        rig.activates(3);
        rig.tick(60_000);
        assert_eq!(rig.reports == [FILLED], may, "beside {base}");
        assert!(!rig.ops().any(|op| matches!(op, TxnOp::CommitPending { .. })), "nor is it committed");
        let waits = status(&rig).waiting_for;
        assert_eq!(waits.ends_with("a member of an earlier interval, about 1 objects"), !may, "{waits}");
    }
}

/// What osd.1 lacks of it may be what makes it go back.
#[test]
fn what_nobody_may_have_acknowledged_is_not_rolled_forward() {
    let (newest, before) = (version(5, 2), version(5, 1));
    let doubtful = Needed { uncertain: Some(before), ..Needed::certain(newest, false) };
    let mut rig = too_few(&[], &[(0, doubtful)]);
    begin(&mut rig);
    let pending = ObjectEntry { base: Some(before), ..has(0, newest) };
    tells(&mut rig, 3, 6, 2, &[pending]);
    tells(&mut rig, 4, 5, 0, &[pending]);
    rig.activates(3);
    rig.tick(60_000);
    assert_eq!(answer_rows(&mut rig), Vec::<u32>::new());
    assert!(rig.reports.is_empty());
}
