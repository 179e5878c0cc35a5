//! Pools that get more groups: what the new ones inherit, and when they move.

use super::tests::{activate, boot, can_be_told, clean, cluster, down, pg, pool, report};
use super::*;
use gabion_proto::map::PgRecord;
use gabion_proto::placement;

fn set(state: &mut MonitorState, pg_count: u32) -> CommandResult {
    state.apply(5, Command::SetPgs { name: "p".into(), pg_count })
}

fn record(state: &MonitorState, index: u32) -> PgRecord {
    PgRecord::clone(&state.map.pgs[&pg(index)])
}

fn members(acting: &[OsdId]) -> BTreeSet<OsdId> {
    acting.iter().copied().collect()
}

#[test]
fn each_inherits_what_its_group_was_in_an_interval_of_its_own() {
    let mut state = cluster(6, 4);
    activate(&mut state, pg(1));
    let first = record(&state, 1);
    down(&mut state, first.acting[0].0);
    activate(&mut state, pg(1));
    let second = record(&state, 1);
    assert_eq!(second.past.len(), 1);
    assert_eq!(set(&mut state, 16), Ok(Reply::Pool(PoolId(1))));
    let epoch = state.map.epoch;
    assert_eq!((state.map.pgs.len(), state.map.pools[&PoolId(1)].pg_count), (16, 16));
    for index in 0..16 {
        let (now, parent) = (record(&state, index), record(&state, index % 4));
        assert_eq!((now.interval, now.activated, now.clean), (epoch, false, false), "group {index}");
        assert_eq!((&now.up, &now.acting, now.primary), (&parent.up, &parent.acting, parent.primary));
        assert_eq!(now.past, parent.past, "group {index}");
    }
    let child = record(&state, 13);
    assert_eq!(members(&child.acting), members(&second.acting), "nothing moves");
    let past: Vec<_> = child.past.iter().map(|p| (p.interval, members(&p.acting))).collect();
    let wanted = [(first.interval, members(&first.acting)), (second.interval, members(&second.acting))];
    assert_eq!(past, wanted, "both may have taken writes of its objects");
    assert_eq!(record(&state, 2).past, [], "what never served is not looked for");
}

#[test]
fn what_was_said_of_the_whole_group_says_nothing_of_a_part() {
    let mut state = cluster(3, 2);
    activate(&mut state, pg(0));
    let (osd, incarnation, interval) = report(&state, pg(0));
    set(&mut state, 4).unwrap();
    for pg in [pg(0), pg(2)] {
        for late in [
            Command::PgActivated { osd, incarnation, pg, interval },
            Command::PgClean { osd, incarnation, pg, interval },
        ] {
            assert_eq!(state.apply(0, late).unwrap_err().kind, RefusalKind::Aborted);
        }
    }
}

#[test]
fn only_a_doubling_within_the_limits_is_possible() {
    let mut state = cluster(3, 6);
    let before = state.clone();
    for (pg_count, kind) in [
        (0, RefusalKind::Invalid),
        (2, RefusalKind::Invalid),
        (4, RefusalKind::Invalid),
        (7, RefusalKind::Invalid),
        (18, RefusalKind::Invalid),
        (6 << 14, RefusalKind::Invalid),
        (u32::MAX, RefusalKind::Invalid),
    ] {
        assert_eq!(set(&mut state, pg_count).unwrap_err().kind, kind, "{pg_count}");
    }
    assert_eq!(set(&mut state, 6), Ok(Reply::Pool(PoolId(1))));
    assert_eq!(state, before, "neither a refusal nor what is so already changes anything");
    for name in ["a", "b", "c"] {
        state.apply(0, pool(name, 3, 65_536)).unwrap();
    }
    assert_eq!(set(&mut state, 6 << 13).unwrap(), Reply::Pool(PoolId(1)));
    let (full, mut refused) = (state.map.pgs.len(), 0);
    for name in ["d", "e"] {
        refused += usize::from(state.apply(0, pool(name, 3, 8_192)).is_err());
    }
    let more = state.apply(0, Command::SetPgs { name: "d".into(), pg_count: 65_536 });
    assert_eq!((full, refused), (3 * 65_536 + (6 << 13), 0));
    assert_eq!(more.unwrap_err().kind, RefusalKind::Exhausted);
}

#[test]
fn groups_go_to_places_of_their_own_when_all_are_clean() {
    let mut state = cluster(8, 2);
    (0..2).for_each(|n| activate(&mut state, pg(n)));
    set(&mut state, 8).unwrap();
    assert_eq!(state.placed_groups(PoolId(1)), Some(2));
    // They stay together whatever happens meanwhile.
    let away = record(&state, 0).acting[1];
    down(&mut state, away.0);
    state.apply(0, Command::OutOsd { osd: away, automatic: true }).unwrap();
    set(&mut state, 16).unwrap();
    boot(&mut state, away.0 as u8).unwrap();
    for n in 0..16 {
        assert_eq!(state.placed_groups(PoolId(1)), Some(2));
        assert_eq!(members(&record(&state, n).up), members(&record(&state, n % 2).up), "group {n}");
        activate(&mut state, pg(n));
        clean(&mut state, pg(n));
    }
    assert_eq!(state.placed_groups(PoolId(1)), None);
    let own = placement::assign(&state.map.pools[&PoolId(1)], PoolId(1), &state.map.osds);
    for (n, own) in (0..).zip(own) {
        assert_eq!(members(&record(&state, n).up), members(&own), "group {n}");
    }
    let lies: BTreeSet<_> = (0..16).map(|n| members(&record(&state, n).up)).collect();
    assert!(lies.len() > 2, "some have moved");
}

#[test]
fn suspicion_and_scrubs_are_inherited() {
    let mut state = cluster(4, 1);
    activate(&mut state, pg(0));
    let (osd, incarnation, interval) = report(&state, pg(0));
    let peer = record(&state, 0).acting[1];
    let peer_incarnation = state.map.osds[&peer].incarnation;
    let suspect = Command::SuspectPeer { osd, incarnation, pg: pg(0), interval, peer, peer_incarnation };
    state.apply(0, suspect).unwrap();
    let object = |index| ObjectId { volume: VolumeId(1), index, layer: LayerId(0) };
    let damaged = |index| scrubs::DamagedObject { object: object(index), inconsistent: false };
    let scrub = state.scrubs.get_mut(&pg(0)).unwrap();
    (scrub.last_deep_unix_ms, scrub.damaged_objects) = (77, 20);
    scrub.damaged = (0..20).map(damaged).collect();
    set(&mut state, 2).unwrap();
    for n in 0..2 {
        assert!(!record(&state, n).acting.contains(&peer), "group {n} goes on without {peer}");
        assert_eq!(state.scrubs[&pg(n)].last_deep_unix_ms, 77);
    }
    let of = |n| state.scrubs[&pg(n)].damaged.len() as u64;
    assert!(of(0) > 0 && of(1) > 0 && of(0) + of(1) == 20);
    assert_eq!(state.scrubs[&pg(0)].damaged_objects + state.scrubs[&pg(1)].damaged_objects, 20);
}

#[test]
fn a_removed_pool_leaves_nothing_behind() {
    let mut state = cluster(3, 2);
    set(&mut state, 4).unwrap();
    state.apply(0, Command::RemovePool { name: "p".into() }).unwrap();
    assert_eq!((state.placed_groups(PoolId(1)), state.map.pgs.len()), (None, 0));
}

fn all_clean(state: &mut MonitorState) {
    for n in 0..state.map.pools[&PoolId(1)].pg_count {
        // The last one may have merged the others away.
        if state.map.pgs.get(&pg(n)).is_some_and(|r| !r.clean) {
            activate(state, pg(n));
            clean(state, pg(n));
        }
    }
}

#[test]
fn groups_are_merged_when_all_are_clean_in_one_interval_on_the_same_members() {
    let mut state = cluster(8, 8);
    all_clean(&mut state);
    assert_eq!(set(&mut state, 2), Ok(Reply::Pool(PoolId(1))));
    assert_eq!((state.map.pgs.len(), state.merges_to(PoolId(1))), (8, Some(2)));
    for n in 2..8 {
        assert_eq!(
            members(&record(&state, n).up),
            members(&record(&state, n % 2).up),
            "group {n} is on its way"
        );
    }
    all_clean(&mut state);
    assert_eq!(state.map.pgs.len(), 8, "clean, but not in one interval");
    let together = record(&state, 0).interval;
    assert!((0..8).all(|n| record(&state, n).interval == record(&state, n % 2).interval));
    assert!((0..8).all(|n| !record(&state, n).clean) || record(&state, 1).interval != together);
    let before: Vec<_> = (0..8).map(|n| record(&state, n)).collect();
    all_clean(&mut state);
    assert_eq!(
        (state.map.pgs.len(), state.merges_to(PoolId(1)), state.placed_groups(PoolId(1))),
        (2, None, None)
    );
    assert_eq!(state.map.pools[&PoolId(1)].pg_count, 2);
    for n in 0..2u32 {
        let now = record(&state, n);
        let interval = before[n as usize].interval;
        assert_eq!((now.interval, now.activated, now.clean), (state.map.epoch, false, false));
        assert!(
            now.past.iter().all(|p| p.interval == interval && members(&p.acting) == members(&now.acting))
        );
        let primaries = |r: &[PgRecord]| r.iter().filter_map(|r| r.primary).collect::<BTreeSet<_>>();
        let family: Vec<_> = before.iter().skip(n as usize).step_by(2).cloned().collect();
        let known: BTreeSet<_> = now.past.iter().filter_map(|p| p.primary).collect();
        assert_eq!(known, primaries(&family), "each may still serve reads");
    }
    // Everybody can be told.
    assert!(can_be_told(&state));
}

#[test]
fn one_that_is_not_clean_keeps_all_from_being_merged() {
    // Everybody is everywhere: nothing has to move.
    let mut state = cluster(3, 4);
    all_clean(&mut state);
    let (osd, incarnation, interval) = report(&state, pg(3));
    let peer = record(&state, 3).acting[1];
    let peer_incarnation = state.map.osds[&peer].incarnation;
    let suspect = Command::SuspectPeer { osd, incarnation, pg: pg(3), interval, peer, peer_incarnation };
    state.apply(0, suspect).unwrap();
    all_clean(&mut state);
    set(&mut state, 2).unwrap();
    assert_eq!(state.merge_waits_for(PoolId(1)), 1, "it goes on without a member that group 1 has");
    state.apply(0, Command::ClearSuspect { pg: pg(3), peer, peer_incarnation }).unwrap();
    all_clean(&mut state);
    let intervals = [0, 1, 2, 3].map(|n| record(&state, n).interval);
    assert_eq!(
        (intervals[0], intervals[1]),
        (intervals[2], intervals[3]),
        "those that become one are in one"
    );
    assert_eq!([0, 1, 2, 3].map(|n| record(&state, n).clean), [true, false, true, false]);
    activate(&mut state, pg(1));
    clean(&mut state, pg(1));
    activate(&mut state, pg(3));
    assert_eq!((state.merge_waits_for(PoolId(1)), state.map.pgs.len()), (1, 4));
    // A member restarts: all begin anew, still together.
    boot(&mut state, peer.0 as u8).unwrap();
    assert_eq!((state.merge_waits_for(PoolId(1)), state.map.pgs.len()), (4, 4));
    let (osd, incarnation, interval) = report(&state, pg(3));
    let late = Command::PgClean { osd, incarnation, pg: pg(3), interval: Epoch(interval.0 - 1) };
    assert_eq!(state.apply(0, late).unwrap_err().kind, RefusalKind::Aborted);
    for n in 0..4 {
        assert_eq!(state.map.pgs.len(), 4);
        activate(&mut state, pg(n));
        clean(&mut state, pg(n));
    }
    assert_eq!(state.map.pgs.len(), 2);
}

#[test]
fn a_merge_can_be_called_off_and_made_to_go_further() {
    let mut state = cluster(8, 8);
    all_clean(&mut state);
    set(&mut state, 4).unwrap();
    set(&mut state, 8).unwrap();
    assert_eq!(state.merges_to(PoolId(1)), None);
    all_clean(&mut state);
    all_clean(&mut state);
    assert_eq!((state.map.pgs.len(), state.placed_groups(PoolId(1))), (8, None), "each is in its own place");
    set(&mut state, 4).unwrap();
    set(&mut state, 1).unwrap();
    set(&mut state, 16).unwrap();
    assert_eq!(
        (state.map.pgs.len(), state.merges_to(PoolId(1)), state.placed_groups(PoolId(1))),
        (16, None, Some(1))
    );
    set(&mut state, 2).unwrap();
    for _ in 0..4 {
        all_clean(&mut state);
    }
    assert_eq!(state.map.pgs.len(), 2);
    for _ in 0..2 {
        all_clean(&mut state);
    }
    let own = placement::assign(&state.map.pools[&PoolId(1)], PoolId(1), &state.map.osds);
    assert!((0..2).all(|n| members(&record(&state, n).up) == members(&own[n as usize])));
}

#[test]
fn groups_of_shards_are_not_merged() {
    let mut state = cluster(4, 1);
    let create = Command::CreatePool {
        name: "e".into(),
        redundancy: gabion_proto::map::Redundancy::Erasure { k: 2, m: 1 },
        min_size: 0,
        failure_domain: gabion_proto::map::FailureDomain::Host,
        pg_count: 4,
        object_bytes: 0,
    };
    state.apply(0, create).unwrap();
    let mut set = |pg_count| state.apply(0, Command::SetPgs { name: "e".into(), pg_count });
    assert_eq!(set(2).unwrap_err().kind, RefusalKind::NotBuilt);
    assert_eq!(set(8), Ok(Reply::Pool(PoolId(2))));
}
