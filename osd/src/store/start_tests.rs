//! What a start refuses, and what it gets along with: an index of another time, journals that cannot be read everywhere, starts that
//! fail one after the other.

use super::crash_tests::small_disk;
use super::model::*;
use super::*;

const PG: PgId = PGS[0];
const JOURNAL: u32 = 256;

fn txn(ops: Vec<TxnOp>) -> Txn {
    Txn { pg: PG, ops, reserve: false }
}

fn blocks(first: u32, count: u32, stamp: u32) -> ModelBlocks {
    (first..first + count).map(|b| (b, stamp)).collect()
}

fn write(index: u32, prev: u64, first: u32, count: u32, stamp: u32) -> TxnOp {
    let content = content(&blocks(first, count, stamp));
    TxnOp::Write { object: object(index, 0), prev: v(prev), version: v(prev + 1), content }
}

fn read(store: &mut impl Store, index: u32, first: u32, count: u32) -> Result<ModelBlocks, StoreError> {
    store.read(PG, object(index, 0), &[], first, count).map(|c| stamps(&c))
}

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
