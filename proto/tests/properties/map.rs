use crate::samples;
use gabion_proto::ids::*;
use gabion_proto::map::*;
use gabion_proto::pb;
use proptest::prelude::*;
use prost::Message as _;

fn two_maps(a: u64, b: u64, epoch: u64, step: u64) -> (ClusterMap, ClusterMap) {
    let old = samples::map(a, epoch);
    let mut new = samples::map(b, epoch + step);
    // Half of the groups as before, and no tombstone is ever dropped.
    for (id, record) in old.pgs.iter().filter(|(id, _)| id.index % 2 == 0) {
        if new.pools.get(&id.pool) == old.pools.get(&id.pool) {
            new.pgs.insert(*id, record.clone());
        }
    }
    new.removed_volumes.extend(&old.removed_volumes);
    new.removed_layers.extend(&old.removed_layers);
    if b.is_multiple_of(2) {
        new.remove_root(VolumeId(100 + b % 9));
    }
    new.removed_pools.extend(&old.removed_pools);
    (old, new)
}

proptest! {
    #![proptest_config(crate::config(256))]

    #[test]
    fn a_map_survives_the_wire(seed in any::<u64>(), epoch in 0u64..50) {
        let map = samples::map(seed, epoch);
        let bytes = pb::ClusterMap::from(&map).encode_to_vec();
        let back = pb::ClusterMap::decode(&bytes[..]).unwrap();
        prop_assert_eq!(ClusterMap::try_from(back), Ok(map));
    }

    #[test]
    fn an_increment_leads_to_the_new_map(
        a in any::<u64>(), b in any::<u64>(), epoch in 0u64..50, step in 1u64..9,
    ) {
        let (old, new) = two_maps(a, b, epoch, step);
        let increment = MapIncrement::between(&old, &new);
        let bytes = pb::MapIncrement::from(&increment).encode_to_vec();
        let back = MapIncrement::try_from(pb::MapIncrement::decode(&bytes[..]).unwrap());
        prop_assert_eq!(back.as_ref(), Ok(&increment));
        let mut map = old.clone();
        back.unwrap().apply(&mut map).unwrap();
        prop_assert_eq!(&map, &new);
        // A second time it does not fit, and leaves the map alone.
        let gap = MapError::Gap { from: old.epoch, have: new.epoch };
        prop_assert_eq!(increment.apply(&mut map), Err(gap));
        prop_assert_eq!(&map, &new);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(m) = pb::ClusterMap::decode(&bytes[..]) {
            let _ = ClusterMap::try_from(m);
        }
        if let Ok(m) = pb::MapIncrement::decode(&bytes[..]) {
            let _ = MapIncrement::try_from(m);
        }
    }
}

fn good() -> pb::ClusterMap {
    let mut map = ClusterMap { epoch: Epoch(5), ..Default::default() };
    map.osds.insert(OsdId(1), samples::osd("a", "r", 1));
    map.osds.insert(OsdId(2), samples::osd("b", "r", 1));
    let pool = samples::pool(Redundancy::Replicated { size: 2 }, FailureDomain::Host, 2);
    map.pools.insert(PoolId(1), pool);
    let record = PgRecord {
        up: vec![OsdId(1), OsdId(2)],
        acting: vec![OsdId(1), OsdId(2)],
        primary: Some(OsdId(1)),
        interval: Epoch(5),
        past: vec![PastInterval { interval: Epoch(3), acting: vec![OsdId(2)], primary: Some(OsdId(2)) }],
        ..Default::default()
    };
    map.pgs.insert(PgId { pool: PoolId(1), index: 0 }, record.into());
    (&map).into()
}

#[test]
fn what_is_refused_names_its_field() {
    type Break = fn(&mut pb::ClusterMap);
    let cases: &[(&str, Break)] = &[
        ("cluster", |m| m.cluster.truncate(15)),
        ("osds[0].id", |m| m.osds[0].id = u32::MAX),
        ("osds[0].host", |m| m.osds[0].host = "../x".into()),
        ("osds[1].rack", |m| m.osds[1].rack = "a b".into()),
        ("osds[0].addr", |m| m.osds[0].addr = "localhost:1".into()),
        ("osds[1].disk", |m| m.osds[1].disk = vec![1]),
        ("osds", |m| m.osds[1].id = m.osds[0].id),
        ("osds", |m| m.osds[0].removed = true),
        ("osds", |m| m.osds = vec![m.osds[0].clone(); gabion_proto::limits::OSDS_MAX + 1]),
        ("pools[0].name", |m| m.pools[0].name.clear()),
        ("pools[0].redundancy", |m| m.pools[0].redundancy = None),
        ("pools[0].replicas", |m| {
            m.pools[0].redundancy = Some(Redundancy::Replicated { size: 9 }.into());
        }),
        ("pools[0].erasure", |m| {
            m.pools[0].redundancy = Some(Redundancy::Erasure { k: u32::MAX, m: 2 }.into());
        }),
        ("pools[0].min_size", |m| m.pools[0].min_size = 3),
        ("pools[0].failure_domain", |m| m.pools[0].failure_domain = 0),
        ("pools[0].failure_domain", |m| m.pools[0].failure_domain = 77),
        ("pools[0].pg_count", |m| m.pools[0].pg_count = 0),
        ("pools[0].object_bytes", |m| m.pools[0].object_bytes += 1),
        ("pgs[1.0].pool", |m| m.pools.clear()),
        ("pgs[1.2].index", |m| m.pgs[0].index = 2),
        ("pgs[0].index", |m| m.pgs[0].index = u32::MAX),
        ("pgs[1.0].acting", |m| m.pgs[0].acting.push(3)),
        ("pgs[1.0].up", |m| m.pgs[0].up[1] = u32::MAX),
        ("pgs[0].acting", |m| m.pgs[0].acting[1] = 1),
        ("pgs[0].acting", |m| m.pgs[0].acting = (0..100).collect()),
        ("pgs[0].primary", |m| m.pgs[0].primary = Some(9)),
        ("pgs[1.0].interval", |m| m.pgs[0].interval = 6),
        ("pgs[0].past.interval", |m| m.pgs[0].past[0].interval = 5),
        ("pgs[0].past.primary", |m| m.pgs[0].past[0].primary = Some(u32::MAX)),
    ];
    ClusterMap::try_from(good()).expect("the map is good before it is broken");
    for (field, break_it) in cases {
        let mut map = good();
        break_it(&mut map);
        let error = ClusterMap::try_from(map).expect_err(field);
        assert_eq!(error.field, *field, "{error}");
    }
    let still = pb::MapIncrement { from: 4, to: 4, ..Default::default() };
    assert_eq!(MapIncrement::try_from(still).unwrap_err().field, "to");
}
