//! What a start refuses, and what it gets along with: an index of another time, journals that cannot be read everywhere, starts that
//! fail one after the other.

use super::crash_tests::small_disk;
use super::fault_tests::{blocks, read, slot, txn, write};
use super::model::{PGS, content, object, v};
use super::sim::SimDisk;
use super::*;

const JOURNAL: u32 = 256;
/// First block of the journal.
const FIRST: u64 = super::layout::JOURNAL_FIRST;

/// Most of what it says is right, and every block that it names has the bytes of its checksum or a newer one's.
#[test]
fn an_index_that_is_older_than_the_journal_is_refused() {
    let disk = small_disk(JOURNAL, 3);
    let mut store = disk.open().expect("opens");
    assert_eq!(store.commit(vec![txn(vec![write(0, 0, 0, 32, 1)])]), [Ok(())]);
    assert_eq!(store.background(), Ok(false));
    let mut older = Default::default();
    disk.edit_index(|index| older = index.clone());
    assert_eq!(store.commit(vec![txn(vec![write(0, 1, 0, 32, 2)])]), [Ok(())]);
    assert_eq!(store.background(), Ok(false));
    drop(store);
    disk.edit_index(|index| std::mem::swap(index, &mut older));
    let result = disk.open().map(|_| ());
    assert!(matches!(&result, Err(StoreError::Fatal(why)) if why.contains("older")), "{result:?}");
    assert!(matches!(disk.frozen().map(|_| ()), Err(StoreError::Fatal(_))));
    let report = disk.fsck(true);
    assert!(report.problems.iter().any(|p| p.contains("the index is an older one")), "{report}");
    // Nothing was changed: with the right one all is well.
    disk.edit_index(|index| std::mem::swap(index, &mut older));
    let mut store = disk.open().expect("opens");
    assert_eq!(read(&mut store, 0, 0, 32), Ok(blocks(0, 32, 2)));
}

/// Six commits of a block each, which take two blocks of the journal each.
fn six_records(settled: bool) -> SimDisk {
    let disk = small_disk(JOURNAL, 2);
    let mut store = disk.open().expect("opens");
    for n in 0..6 {
        assert_eq!(store.commit(vec![txn(vec![write(0, n, n as u32, 1, 1)])]), [Ok(())]);
    }
    if settled {
        assert_eq!(store.background(), Ok(false));
    }
    assert_eq!(store.ring.head.block, 12);
    disk
}

/// Where an acknowledged record is, or the next one may be, it is not; everywhere else it does not matter.
#[test]
fn an_unreadable_block_of_the_journal_is_no_record_unless_it_may_be_one() {
    for settled in [false, true] {
        for block in 0..JOURNAL {
            let disk = six_records(settled);
            disk.set_unreadable(FIRST + u64::from(block), true);
            let refused = if settled { 12..=12 } else { 0..=12 };
            match disk.open() {
                Err(StoreError::Fatal(why)) if refused.contains(&block) => {
                    let problems = disk.fsck(true).problems;
                    assert!(problems.iter().any(|p| p.contains(&why)), "block {block}: {why}, {problems:?}");
                }
                Ok(mut store) if !refused.contains(&block) => {
                    assert_eq!(read(&mut store, 0, 0, 7), Ok(blocks(0, 6, 1)), "block {block}");
                    assert_eq!(store.commit(vec![txn(vec![write(1, 0, 0, 1, 1)])]), [Ok(())]);
                }
                other => panic!("settled {settled}, block {block}: {:?}", other.map(|_| ())),
            }
        }
    }
}

/// With records that begin at the end of the ring, and one that had no room there.
#[test]
fn an_unreadable_block_is_looked_for_where_a_record_goes_on_at_the_beginning() {
    let wrapped = |wrap: bool| {
        let disk = small_disk(JOURNAL, 2);
        let mut store = disk.open().expect("opens");
        let mut n = 0;
        while store.ring.head.block < JOURNAL - 4 {
            assert_eq!(store.commit(vec![txn(vec![write(0, n, 0, 1, 1)])]), [Ok(())]);
            assert_eq!(store.background(), Ok(false));
            n += 1;
        }
        let end = store.ring.head.block;
        if wrap {
            assert_eq!(store.commit(vec![txn(vec![write(0, n, 0, 8, 2)])]), [Ok(())]);
            assert_eq!(store.ring.head.block, 9);
        }
        (disk, end)
    };
    for block in 0..JOURNAL {
        let (disk, end) = wrapped(true);
        disk.set_unreadable(FIRST + u64::from(block), true);
        // The record, and where the next one would be.
        let refused = block <= 9;
        let result = disk.open().map(|mut store| assert_eq!(read(&mut store, 0, 0, 8), Ok(blocks(0, 8, 2))));
        assert_eq!(result.is_err(), refused, "block {block}: {result:?}");
        let (disk, _) = wrapped(false);
        disk.set_unreadable(FIRST + u64::from(block), true);
        let result = disk.open().map(|_| ());
        assert_eq!(result.is_err(), block == 0 || block == end, "block {block}: {result:?}");
    }
}

/// Of records that are in flight at once none says that the other one was durable.
#[test]
fn the_last_records_are_not_lost_where_one_of_them_cannot_be_read() {
    let disk = small_disk(JOURNAL, 2);
    let mut store = disk.open().expect("opens");
    let (mut done, mut blocks) = (Vec::new(), Vec::new());
    for n in 0..2 {
        store.start(n, Work::Commit(vec![txn(vec![write(n as u32, 0, 0, 1, 1)])]));
        store.pump();
        blocks.push(store.ring.head.block);
    }
    while store.busy() {
        store.progress(&mut done);
    }
    assert_eq!((done.len(), blocks), (2, vec![2, 4]));
    drop(store);
    for block in 0..4 {
        disk.set_unreadable(FIRST + block, true);
        let result = disk.open().map(|_| ());
        assert!(matches!(result, Err(StoreError::Fatal(_))), "block {block}: {result:?}");
        disk.set_unreadable(FIRST + block, false);
    }
    let mut store = disk.open().expect("opens");
    assert_eq!(read(&mut store, 1, 0, 1), Ok([(0, 1)].into()));
}

/// Of the last record nothing says that its slots were flushed: what cannot be read may have been.
#[test]
fn a_slot_that_cannot_be_read_is_not_one_that_was_never_written() {
    for placed in [false, true] {
        let disk = small_disk(JOURNAL, 3);
        let mut store = disk.open().expect("opens");
        assert_eq!(store.commit(vec![txn(vec![write(0, 0, 0, 32, 1)])]), [Ok(())]);
        assert_eq!(store.background(), Ok(false));
        let op = if placed {
            let placed = store.place(PGS[0], object(0, 0), content(&blocks(0, 32, 2))).expect("places");
            let (base, version) = (v(1), v(2));
            TxnOp::Assemble { object: object(0, 0), version, base, kept: Vec::new(), placed: vec![placed] }
        } else {
            write(0, 1, 0, 32, 2)
        };
        assert_eq!(store.commit(vec![txn(vec![op])]), [Ok(())]);
        drop(store);
        disk.crash();
        for block in [0, 9, 31] {
            disk.set_unreadable(slot(1) + block, true);
            let Err(StoreError::Fatal(why)) = disk.open().map(|_| ()) else {
                panic!("block {block} of {placed}")
            };
            assert!(why.contains(&format!("block {}", slot(1) + block)), "{why}");
            let problems = disk.fsck(true).problems;
            assert!(problems.iter().any(|p| p.contains(&why)), "{why}, {problems:?}");
            disk.set_unreadable(slot(1) + block, false);
        }
        let mut store = disk.open().expect("opens");
        assert_eq!(read(&mut store, 0, 0, 32), Ok(blocks(0, 32, 2)), "placed: {placed}");
    }
}

/// It is not asked for where something else tells whether the record was acknowledged.
#[test]
fn an_unreadable_slot_keeps_no_store_from_opening_where_that_is_known() {
    // A later record says that it was.
    let disk = small_disk(JOURNAL, 3);
    let mut store = disk.open().expect("opens");
    assert_eq!(store.commit(vec![txn(vec![write(0, 0, 0, 32, 1)])]), [Ok(())]);
    assert_eq!(store.commit(vec![txn(vec![write(1, 0, 0, 1, 1)])]), [Ok(())]);
    drop(store);
    disk.set_unreadable(slot(0) + 9, true);
    let mut store = disk.open().expect("opens");
    let found = read(&mut store, 0, 0, 32);
    assert!(matches!(found, Err(StoreError::Unreadable { block: 9, .. })), "{found:?}");
    // Another slot of the record says that it was not.
    for (torn, unreadable) in [(0, 1), (1, 0)] {
        let disk = small_disk(JOURNAL, 3);
        let mut store = disk.open().expect("opens");
        let ops = vec![write(0, 0, 0, 32, 1), write(1, 0, 0, 32, 1)];
        assert_eq!(store.commit(vec![txn(ops)]), [Ok(())]);
        drop(store);
        disk.corrupt(slot(torn) as usize * layout::BLOCK + 5);
        disk.set_unreadable(slot(unreadable) + 9, true);
        let mut store = disk.open().expect("opens");
        assert_eq!(store.object(PGS[0], object(0, 0)), Ok(None));
    }
}

/// Each of them writes one superblock, or none, and the next one goes on from there.
#[test]
fn starts_that_fail_one_after_the_other_leave_a_store() {
    let mut failed = 0;
    for seed in 0..6 {
        for fuses in (0..64).map(|n| [n % 8, n / 8]) {
            let disk = small_disk(JOURNAL, seed);
            let mut store = disk.open().expect("opens");
            assert_eq!(store.commit(vec![txn(vec![write(0, 0, 0, 32, 1)])]), [Ok(())]);
            if seed % 2 == 0 {
                assert_eq!(store.background(), Ok(false));
            }
            drop(store);
            for fuse in fuses {
                disk.set_fuse(Some(fuse));
                failed += u32::from(disk.open().is_err());
                disk.crash();
            }
            let report = disk.fsck(true);
            assert!(report.is_clean_but_for_strangers(), "seed {seed}, {fuses:?}: {report}");
            let mut store = disk.open().expect("opens");
            assert_eq!(read(&mut store, 0, 0, 32), Ok(blocks(0, 32, 1)), "seed {seed}, {fuses:?}");
        }
    }
    assert!(failed > 100, "only {failed} starts failed");
}
