//! Groups that are divided, put together, deleted and begin anew, in every order: each has its own records and no others'.

use super::homes::{Homes, Region};
use super::model::{content, v};
use super::tests::IDENTITY;
use super::*;
use gabion_proto::limits::{CHUNK_BYTES, PGS_PER_POOL_MAX};
use gabion_proto::placement::pg_index;
use std::collections::{BTreeMap, BTreeSet};

const POOL: PoolId = PoolId(2);

fn pg(index: u32) -> PgId {
    PgId { pool: POOL, index }
}

fn meta(pg_count: u32) -> TxnOp {
    TxnOp::SetMeta(PgMeta { promised: Epoch(2), activated: Epoch(1), shard: None, pg_count })
}

/// An object that is in group `index` of `count`.
fn object_of(index: u32, count: u32) -> ObjectId {
    let mut objects = (0..).map(|index| ObjectId { volume: VolumeId(9), index, layer: LayerId(0) });
    objects.find(|o| pg_index(o.volume, o.index, count) == index).expect("there is one")
}

fn commit(store: &mut impl Store, index: u32, ops: Vec<TxnOp>) {
    assert_eq!(store.commit(vec![Txn { pg: pg(index), ops, reserve: true }]), [Ok(())]);
}

fn replace(object: ObjectId, version: u64, stamp: u32) -> TxnOp {
    let content = content(&BTreeMap::from([(3, stamp)]));
    TxnOp::Replace { object, version: v(version), deleted: false, content }
}

/// A group that became part of another one has left its records where they were. Whatever is still said to it, or begins under its
/// number, must not touch them.
#[test]
fn a_group_that_became_part_of_another_one_has_nothing() {
    let disk = super::sim::SimDisk::new(16 * CHUNK_BYTES as usize + (4 << 20), 1);
    disk.format(IDENTITY).expect("formats");
    let mut store = disk.open().expect("opens");
    let (low, high) = (object_of(0, 2), object_of(1, 2));
    commit(&mut store, 0, vec![meta(2), replace(low, 1, 7)]);
    let prepare = TxnOp::Prepare {
        object: high,
        base: v(1),
        version: v(4),
        content: content(&BTreeMap::from([(3, 9)])),
    };
    let needed = Needed::certain(v(5), false);
    commit(
        &mut store,
        1,
        vec![meta(2), replace(high, 1, 8), prepare, TxnOp::AddMissing { object: high, needed }],
    );
    commit(&mut store, 0, vec![TxnOp::Combine { from: 2, to: 1 }]);
    let is_whole = |store: &mut super::sim::SimStore| {
        let listed: Vec<_> = store.list(pg(0), None, 9).expect("lists").into_iter().map(|(o, _)| o).collect();
        assert_eq!(listed, BTreeSet::from([low, high]).into_iter().collect::<Vec<_>>());
        assert_eq!(store.list_missing(pg(0), None, 9), Ok(vec![(high, needed)]));
        assert_eq!(store.read(pg(0), high, &[], 3, 1), Ok(content(&BTreeMap::from([(3, 8)]))));
        assert_eq!(store.read_pending(pg(0), high, 3, 1), Ok(content(&BTreeMap::from([(3, 9)]))));
    };
    for _ in 0..2 {
        is_whole(&mut store);
        assert_eq!(store.list(pg(1), None, 9), Ok(vec![]), "it is part of the other one");
        assert_eq!(store.list_missing(pg(1), None, 9), Ok(vec![]));
        assert_eq!(store.object(pg(1), high), Ok(None));
        drop(store);
        disk.crash();
        store = disk.open().expect("opens again");
    }
    let used = store.usage();
    commit(&mut store, 1, vec![TxnOp::ClearMissing, TxnOp::RemovePg]);
    assert_eq!(store.usage(), used);
    is_whole(&mut store);
    // It begins anew.
    commit(&mut store, 1, vec![meta(2), replace(high, 3, 5)]);
    is_whole(&mut store);
    commit(&mut store, 1, vec![TxnOp::RemovePg]);
    drop(store);
    store = disk.open().expect("opens again");
    is_whole(&mut store);
    assert_eq!(store.usage(), used);
    commit(&mut store, 0, vec![TxnOp::Divide { from: 1, to: 2 }]);
    assert_eq!(store.object(pg(1), high).map(|s| s.map(|s| s.version)), Ok(Some(v(1))));
    commit(&mut store, 0, vec![TxnOp::RemovePg]);
    commit(&mut store, 1, vec![TxnOp::RemovePg]);
    assert_eq!((store.usage().objects, store.usage().used_bytes), (0, 0));
}

/// The finest groups here.
const FINEST: u32 = 8;

/// Groups, and which life of one wrote what is of each finest class in each home.
#[derive(Clone, Default)]
struct World {
    homes: Homes,
    /// Groups that there are, and of how many they are one.
    there: BTreeMap<u32, u32>,
    records: BTreeMap<(u32, u32), u32>,
    /// What each group should have.
    wanted: BTreeMap<u32, BTreeMap<u32, u32>>,
}

impl World {
    fn home(regions: &[Region], class: u32) -> Option<u32> {
        let of = |r: &&Region| class % r.class.count == r.class.index;
        regions.iter().find(of).map(|r| r.home)
    }

    fn found(&self, index: u32) -> BTreeMap<u32, u32> {
        let regions = self.homes.regions(pg(index));
        let record =
            |class| self.records.get(&(Self::home(&regions, class)?, class)).map(|life| (class, *life));
        (0..FINEST).filter_map(record).collect()
    }

    fn begin(&mut self, index: u32, count: u32, life: u32) {
        self.there.insert(index, count);
        let regions = self.homes.regions(pg(index));
        for class in (0..FINEST).filter(|c| c % count == index) {
            let home = Self::home(&regions, class).expect("it has a place for it");
            self.records.insert((home, class), life);
            self.wanted.entry(index).or_default().insert(class, life);
        }
    }

    fn remove(&mut self, index: u32) {
        for r in self.homes.regions(pg(index)) {
            self.records.retain(|(home, class), _| *home != r.home || class % r.class.count != r.class.index);
        }
        self.homes.set((pg(index), self.homes.after_removal(pg(index))));
        self.there.remove(&index);
        self.wanted.remove(&index);
    }

    fn divide(&mut self, index: u32, to: u32) {
        let from = self.there[&index];
        let all = self.wanted.remove(&index).unwrap_or_default();
        for (part, regions) in self.homes.divided(pg(index), from, to) {
            self.homes.set((part, Some(regions)));
            self.there.insert(part.index, to);
            let own = all.iter().filter(|(class, _)| **class % to == part.index);
            self.wanted.insert(part.index, own.map(|(c, l)| (*c, *l)).collect());
        }
    }

    fn combine(&mut self, index: u32, from: u32, to: u32) {
        let parts: Vec<PgId> = (0..from / to).map(|n| pg(index + n * to)).collect();
        if !parts.iter().any(|p| self.there.contains_key(&p.index)) {
            return;
        }
        self.homes.combined(&parts, from).into_iter().for_each(|change| self.homes.set(change));
        let mut whole = BTreeMap::new();
        for part in parts {
            self.there.remove(&part.index);
            whole.extend(self.wanted.remove(&part.index).unwrap_or_default());
        }
        self.there.insert(index, to);
        self.wanted.insert(index, whole);
    }

    fn check(&self, how: &[String]) {
        for index in 0..FINEST {
            let wanted = self.wanted.get(&index).cloned().unwrap_or_default();
            assert_eq!(self.found(index), wanted, "group {index} after {how:?}");
        }
        assert_eq!(
            self.records.len(),
            self.wanted.values().map(BTreeMap::len).sum::<usize>(),
            "after {how:?}"
        );
    }

    /// Apart from the order of lives.
    fn state(&self, count: u32) -> String {
        let regions: Vec<_> = (0..FINEST).map(|index| self.homes.regions(pg(index))).collect();
        format!("{count} {:?} {:?} {:?}", self.there, regions, self.records.keys())
    }

    /// What can happen to groups of a pool of `count` next: what becomes of them, of how many, and what it was.
    fn next(&self, count: u32, life: u32) -> Vec<(World, u32, String)> {
        let mut out = Vec::new();
        let mut then = |count, what: String, change: &dyn Fn(&mut World)| {
            let mut world = self.clone();
            change(&mut world);
            out.push((world, count, what));
        };
        for index in 0..count {
            if self.there.contains_key(&index) {
                then(count, format!("remove {index}"), &|w| w.remove(index));
            } else {
                then(count, format!("begin {index} of {count}"), &|w| w.begin(index, count, life));
            }
        }
        for to in [1, 2, 4, 8].into_iter().filter(|to| *to != count) {
            let there: Vec<u32> = self.there.keys().copied().collect();
            then(to, format!("{count} to {to}"), &|w| match to > count {
                true => there.iter().for_each(|index| w.divide(*index, to)),
                false => (0..to).for_each(|index| w.combine(index, count, to)),
            });
        }
        out
    }
}

/// Every order of some steps.
#[test]
fn every_group_has_its_own_records_whatever_came_before() {
    let mut seen = BTreeSet::new();
    let start = [1, 2, 4, 8].map(|count| (World::default(), count, Vec::new()));
    let mut now: Vec<(World, u32, Vec<String>)> = start.into();
    for life in 1..=5 {
        for (world, count, how) in std::mem::take(&mut now) {
            for (next, count, what) in world.next(count, life) {
                let how: Vec<String> = how.iter().cloned().chain([what]).collect();
                next.check(&how);
                if seen.insert(next.state(count)) {
                    now.push((next, count, how));
                }
            }
        }
    }
    println!("{} states", seen.len());
    assert!(seen.len() > 10_000, "only {} states", seen.len());
    assert!(seen.iter().any(|s| s.contains(&PGS_PER_POOL_MAX.to_string())), "no group began anew elsewhere");
}
