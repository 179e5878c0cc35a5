//! Groups that were divided or put together: what it costs to look at them (rule P9).

use super::sim::SimDisk;
use super::tests::new_sim;
use super::thread::StoreThread;
use super::*;
use gabion_proto::placement::pg_index;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;

const POOL: PoolId = PoolId(1);
const OBJECTS: u32 = 12_000;
const AT_ONCE: usize = 200;

fn pg(index: u32) -> PgId {
    PgId { pool: POOL, index }
}

/// Groups of a pool of `count` with tombstones, in the index.
fn filled(count: u32) -> SimDisk {
    let disk = new_sim(8, 1);
    let mut store = disk.open().expect("opens");
    for index in 0..count {
        let meta = PgMeta { pg_count: count, ..PgMeta::default() };
        let mut ops = vec![TxnOp::SetMeta(meta)];
        let objects = (0..OBJECTS).map(|index| ObjectId { volume: VolumeId(9), index, layer: LayerId(0) });
        for object in objects.filter(|o| pg_index(o.volume, o.index, count) == index) {
            let (version, content) = (Version::from_raw(1), Content::default());
            ops.push(TxnOp::Replace { object, version, deleted: true, content });
        }
        for ops in ops.chunks(AT_ONCE) {
            let txn = Txn { pg: pg(index), ops: ops.to_vec(), reserve: true };
            assert_eq!(store.commit(vec![txn]), [Ok(())]);
        }
    }
    store.background().expect("settles");
    disk
}

fn commit(store: &mut impl Store, index: u32, op: TxnOp) {
    assert_eq!(store.commit(vec![Txn { pg: pg(index), ops: vec![op], reserve: true }]), [Ok(())]);
}

/// Whatever a disk says, it is answered.
#[test]
fn homes_of_classes_that_there_are_not_are_damage() {
    let key = super::layout::pg_key(super::layout::kind::HOMES, pg(1));
    let region = |index, count| homes::Region { class: homes::Class { index, count }, home: 5 };
    for regions in [
        vec![region(0, 0), region(0, 0)],
        vec![region(0, 2), region(0, 0)],
        vec![region(0, 2), region(3, 2)],
        vec![region(0, 2), region(2, 4)],
        vec![],
    ] {
        let value = super::layout::encode(&regions).expect("encodes");
        let found = homes::parse(&key, &value);
        assert!(matches!(found, Err(StoreError::Fatal(_))), "{regions:?}: {found:?}");
    }
    let value = super::layout::encode(&vec![region(0, 2), region(1, 4)]).expect("encodes");
    assert!(homes::parse(&key, &value).is_ok());
}

/// Page by page, each page would begin anew in every home.
#[test]
fn what_was_put_together_is_listed_in_one_go() {
    let disk = filled(8);
    let mut store = disk.open().expect("opens");
    commit(&mut store, 0, TxnOp::Combine { from: 8, to: 1 });
    store.background().expect("settles");
    let before = disk.scanned();
    let handle = StoreThread::spawn(store, 4, |why| panic!("the store stopped: {why}"));
    let (tx, rx) = channel();
    handle.list(pg(0), move |r| tx.send(r).expect("somebody waits"));
    let listing = rx.recv().expect("an answer").expect("lists");
    let listed: Vec<u32> = listing.objects.iter().map(|(o, _)| o.index).collect();
    assert_eq!(listed, (0..OBJECTS).collect::<Vec<_>>(), "all, in order");
    let read = disk.scanned() - before;
    assert!(read < OBJECTS as usize * 5 / 4, "{read} records for {OBJECTS} objects");
}

#[test]
fn pages_of_what_was_put_together_are_in_order() {
    let disk = filled(4);
    let mut store = disk.open().expect("opens");
    commit(&mut store, 0, TxnOp::Combine { from: 4, to: 1 });
    for limit in [7, 1000] {
        let mut listed: Vec<u32> = Vec::new();
        let mut after = None;
        while listed.len() < 3000 {
            let page = store.list(pg(0), after, limit).expect("lists");
            assert_eq!(page.len(), limit);
            after = page.last().map(|(o, _)| *o);
            listed.extend(page.iter().map(|(o, _)| o.index));
        }
        assert_eq!(listed, (0..listed.len() as u32).collect::<Vec<_>>());
    }
}

/// One that has a home in common with siblings steps over what is theirs, once.
#[test]
fn a_part_is_removed_in_one_pass() {
    let disk = filled(1);
    let mut store = disk.open().expect("opens");
    commit(&mut store, 0, TxnOp::Divide { from: 1, to: 8 });
    store.background().expect("settles");
    let (before, objects) = (disk.scanned(), store.usage().objects);
    commit(&mut store, 3, TxnOp::RemovePg);
    let read = disk.scanned() - before;
    assert!(read < OBJECTS as usize * 5 / 4, "{read} records for {OBJECTS} objects");
    let own = (0..OBJECTS).filter(|o| pg_index(VolumeId(9), *o, 8) == 3).count() as u64;
    assert_eq!(objects - store.usage().objects, own);
    drop(store);
    let report = disk.fsck(true);
    assert!(report.is_clean() && report.objects == u64::from(OBJECTS) - own, "{report}");
}

/// Otherwise a large group would look like a disk that does not answer (rule S9).
#[test]
fn whoever_watches_hears_of_what_takes_long() {
    let disk = filled(1);
    let mut store = disk.open().expect("opens");
    commit(&mut store, 0, TxnOp::Divide { from: 1, to: 8 });
    store.background().expect("settles");
    let beats = Arc::new(AtomicUsize::new(0));
    let counted = beats.clone();
    store.set_pulse(Box::new(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    }));
    assert!(!store.list(pg(2), None, usize::MAX).expect("lists").is_empty());
    let listing = beats.swap(0, Ordering::Relaxed);
    commit(&mut store, 2, TxnOp::RemovePg);
    let removing = beats.load(Ordering::Relaxed);
    assert!(listing >= 2 && removing >= 2, "{listing} and {removing} for {OBJECTS} records");
}
