//! A pool gets more groups (rule P9): what is here of each is divided first, whatever this OSD is to it.

use super::*;

/// A core that has a group of `pg_count`, and everything that it does about a map in which there are `now`.
fn divides(pg_count: u32, now: u32, acting: &[u32]) -> (OsdCore, Vec<Effect>, ClusterMap) {
    let boot = Boot { cluster: CLUSTER, id: OsdId(1), incarnation: Incarnation(1), epoch: Epoch(1) };
    let meta = PgMeta { promised: Epoch(5), activated: Epoch(5), shard: None, pg_count };
    let mut core = OsdCore::new(boot, vec![(PG, meta)], 0);
    let mut map = Rig::new(&[]).map;
    let acting: Vec<OsdId> = acting.iter().map(|o| OsdId(*o)).collect();
    let record = Shared::from(PgRecord {
        up: acting.clone(),
        primary: acting.first().copied(),
        acting,
        interval: Epoch(10),
        activated: false,
        clean: false,
        past: vec![past(5, &[1, 2])],
    });
    map.epoch = Epoch(10);
    map.pools.get_mut(&PG.pool).unwrap().pg_count = now;
    map.pgs = (0..now).map(|index| (PgId { index, ..PG }, record.clone())).collect();
    let mut out = Vec::new();
    core.step(0, Event::Map(Arc::new(map.clone())), &mut out);
    (core, out, map)
}

/// Group and step of each division, and at which effect.
fn divisions(out: &[Effect]) -> Vec<(usize, u32, u32, u32)> {
    let step = |(at, e): (usize, &Effect)| match e {
        Effect::Store { txn, .. } => match txn.ops[..] {
            [TxnOp::Divide { from, to }] => Some((at, txn.pg.index, from, to)),
            _ => None,
        },
        _ => None,
    };
    out.iter().enumerate().filter_map(step).collect()
}

fn listed(out: &[Effect]) -> Vec<(usize, u32)> {
    let list = |(at, e): (usize, &Effect)| match e {
        Effect::List { pg, .. } => Some((at, pg.index)),
        _ => None,
    };
    out.iter().enumerate().filter_map(list).collect()
}

#[test]
fn members_and_strays_divide_before_they_look() {
    for acting in [[1, 2], [2, 1], [2, 3]] {
        let (_, out, _) = divides(1, 4, &acting);
        let steps = divisions(&out);
        assert_eq!(steps.iter().map(|(_, pg, from, to)| (*pg, *from, *to)).collect::<Vec<_>>(), [(0, 1, 4)]);
        let listed = listed(&out);
        assert_eq!(listed.iter().map(|(_, pg)| *pg).collect::<Vec<_>>(), [0, 1, 2, 3], "{acting:?}");
        assert!(listed.iter().all(|(at, _)| *at > steps[0].0), "what is listed is divided");
    }
}

#[test]
fn nothing_is_divided_twice() {
    let (mut core, _, mut map) = divides(1, 4, &[1, 2]);
    map.epoch = Epoch(11);
    let mut out = Vec::new();
    core.step(0, Event::Map(Arc::new(map)), &mut out);
    assert_eq!(divisions(&out), []);
    let (_, out, _) = divides(4, 4, &[1, 2]);
    assert_eq!(divisions(&out), []);
}

#[test]
fn a_large_step_is_several_of_bounded_size() {
    let (_, out, _) = divides(1, 256, &[2, 3]);
    let steps: Vec<_> = divisions(&out).into_iter().map(|(_, pg, from, to)| (pg, from, to)).collect();
    assert!(steps.iter().all(|(_, from, to)| to / from <= crate::store::DIVIDE_MAX));
    // Whatever there is at each step is divided, so that each group comes out of one.
    let mut groups = std::collections::BTreeSet::from([0]);
    for (pg, from, to) in steps {
        assert!(groups.contains(&pg));
        groups.extend((0..to / from).map(|n| pg + n * from));
    }
    assert_eq!(groups, (0..256).collect());
    let last = divisions(&out).last().map(|(at, ..)| *at);
    assert!(listed(&out).iter().all(|(at, _)| Some(*at) > last));
}

/// Monitors from an old backup: of the group that they mean only a part is here.
#[test]
fn a_part_is_not_taken_for_the_whole() {
    let combined = |interval| {
        let mut rig = Rig::new(&[(0, version(5, 1))]);
        let meta = PgMeta { promised: Epoch(9), activated: Epoch(9), shard: None, pg_count: 2 };
        let boot = Boot { cluster: CLUSTER, id: OsdId(1), incarnation: Incarnation(1), epoch: Epoch(1) };
        // As a store reports it.
        let start = (0..2).map(|index| (PgId { index, ..PG }, meta)).collect();
        (rig.core, rig.listing.meta) = (OsdCore::new(boot, start, 0), Some(meta));
        rig.interval(interval, &[1, 2], vec![past(5, &[1, 2])]);
        rig.tells(2, 5, &[]);
        let combined = rig.ops().any(|op| matches!(op, TxnOp::Combine { .. }));
        (combined, rig)
    };
    for interval in [8, 9] {
        let (combined, rig) = combined(interval);
        assert!(!combined, "a merge would have begun an interval");
        assert_eq!(rig.sent, [], "it says nothing");
        assert!(rig.core.pg_statuses()[0].waiting_for.contains("one of 2 groups, the map has 1"));
    }
    assert!(combined(10).0);
}

/// An operation was sent when there was one group; its object is in another one now.
#[test]
fn an_operation_for_the_undivided_group_is_sent_back() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2]);
    let old = rig.map.epoch;
    rig.map.pools.get_mut(&PG.pool).unwrap().pg_count = 2;
    rig.interval(11, &[1, 2], vec![past(10, &[1, 2])]);
    let foreign = (0..).find(|o| rig.map.pg_of(PG.pool, VOLUME, *o) != Some(PG)).unwrap();
    let content = Content::data(0, vec![3; 4096].into());
    let op = |epoch| ClientOp {
        epoch,
        pg: PG,
        client: CLIENT,
        session: Session(1),
        generation: Generation(1),
        volume: VOLUME,
        object: object(foreign),
        kind: OpKind::Write { extents: content.extents.clone() },
    };
    let epochs = [old, rig.map.epoch];
    for (n, epoch) in (100..).zip(epochs) {
        rig.step(Event::Client { token: ClientToken(n), op: op(epoch), data: content.data.clone() });
    }
    let stale = Some(&OpReply::Retry { epoch: Epoch(11), why: RetryWhy::StaleMap });
    assert_eq!(rig.reply(ClientToken(100)), stale);
    let invalid = Some(&OpReply::Failed(gabion_proto::msg::OpError::Invalid));
    assert_eq!(rig.reply(ClientToken(101)), invalid, "no client that has this map sends that");
}

/// Whoever has two halves was as active as the older one: it must not be taken for one that has what both took.
#[test]
fn what_becomes_one_is_put_together_before_it_is_looked_at() {
    let boot = Boot { cluster: CLUSTER, id: OsdId(1), incarnation: Incarnation(1), epoch: Epoch(1) };
    let meta =
        |activated| PgMeta { promised: Epoch(9), activated: Epoch(activated), shard: None, pg_count: 4 };
    let start = [(0, 8), (1, 9), (3, 7)].map(|(index, a)| (PgId { index, ..PG }, meta(a)));
    let mut core = OsdCore::new(boot, start.into(), 0);
    let (_, _, mut map) = divides(1, 1, &[1, 2]);
    map.pools.get_mut(&PG.pool).unwrap().pg_count = 2;
    let record = map.pgs[&PG].clone();
    map.pgs.insert(PgId { index: 1, ..PG }, record);
    let mut out = Vec::new();
    core.step(0, Event::Map(Arc::new(map)), &mut out);
    let combined = out.iter().enumerate().filter_map(|(at, e)| match e {
        Effect::Store { txn, .. } => Some((at, txn.pg.index, txn.ops.clone())),
        _ => None,
    });
    let combined: Vec<_> = combined.collect();
    let step = vec![TxnOp::Combine { from: 4, to: 2 }];
    let done: Vec<_> = combined.iter().map(|(_, pg, ops)| (*pg, ops.clone())).collect();
    assert_eq!(done, [(0, step.clone()), (1, step)], "the store says how active the whole was");
    let listed = listed(&out);
    assert_eq!(listed.iter().map(|(_, pg)| *pg).collect::<Vec<_>>(), [0, 1]);
    assert!(listed.iter().all(|(at, _)| *at > combined[1].0));
}
