//! Disks that fail, fill up, rot, lie and mix up: found, reported, and never served as good data.

use super::buffer::Block;
use super::crash_tests::small_disk;
use super::device::{Completion, Device, Request};
use super::layout::{Geometry, kind};
use super::model::*;
use super::sim::{SimDevice, SimKv};
use super::tests::IDENTITY;
use super::watchdog::Watchdog;
use super::*;
use gabion_proto::limits::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

const PG: PgId = PGS[0];
const JOURNAL: u32 = 256;

pub fn txn(ops: Vec<TxnOp>) -> Txn {
    Txn { pg: PG, ops, reserve: false }
}

pub fn blocks(first: u32, count: u32, stamp: u32) -> ModelBlocks {
    (first..first + count).map(|b| (b, stamp)).collect()
}

pub fn write(index: u32, prev: u64, first: u32, count: u32, stamp: u32) -> TxnOp {
    let content = content(&blocks(first, count, stamp));
    TxnOp::Write { object: object(index, 0), prev: v(prev), version: v(prev + 1), content }
}

pub fn read(store: &mut impl Store, index: u32, first: u32, count: u32) -> Result<ModelBlocks, StoreError> {
    store.read(PG, object(index, 0), &[], first, count).map(|c| stamps(&c))
}

/// First block of slot `n` on a [`small_disk`] with this file's journal.
pub fn slot(n: u32) -> u64 {
    Geometry { journal_blocks: JOURNAL, slots: 96 }.slot_block(n)
}

#[test]
fn an_unreadable_block_is_named_and_its_neighbours_are_served() {
    let disk = small_disk(JOURNAL, 1);
    let mut store = disk.open().expect("opens");
    assert_eq!(store.commit(vec![txn(vec![write(0, 0, 0, 32, 7)])]), [Ok(())]);
    disk.set_unreadable(slot(0) + 5, true);
    let found = read(&mut store, 0, 0, 32);
    assert!(matches!(found, Err(StoreError::Unreadable { block: 5, .. })), "{found:?}");
    disk.set_unreadable(slot(0) + 30, true);
    let piece = store.read_piece(PG, object(0, 0), 0, 64);
    let Err(StoreError::Unreadable { rest: Some(rest), .. }) = piece else { panic!("{piece:?}") };
    let bad: Vec<_> = rest.bad.iter().map(|(o, b, _)| (*o, *b)).collect();
    assert_eq!(bad, [(object(0, 0), 5), (object(0, 0), 30)]);
    assert_eq!(rest.state.map(|(_, end)| end), Some(32));
    let good = blocks(0, 32, 7).into_iter().filter(|(b, _)| ![5, 30].contains(b)).collect();
    assert_eq!(stamps(&rest.content), good);
    disk.set_unreadable(slot(0) + 30, false);
    assert_eq!(read(&mut store, 0, 0, 5), Ok(blocks(0, 5, 7)));
    assert_eq!(read(&mut store, 0, 6, 26), Ok(blocks(6, 26, 7)));
    // Repaired by an overwrite, as replication does it.
    assert_eq!(store.commit(vec![txn(vec![write(0, 1, 5, 1, 8)])]), [Ok(())]);
    assert_eq!(read(&mut store, 0, 5, 1), Ok(blocks(5, 1, 8)));
    disk.set_unreadable(slot(0) + 5, false);
    assert_eq!(store.background(), Ok(false));
    assert_eq!(read(&mut store, 0, 4, 3), Ok([(4, 7), (5, 8), (6, 7)].into()));
}

/// Why a primary lets a write wait for reads of the same blocks (rule P5): commits that share a record become visible together.
#[test]
fn a_read_may_find_what_was_committed_after_it_was_started() {
    let disk = small_disk(JOURNAL, 1);
    let mut store = disk.open().expect("opens");
    assert_eq!(store.commit(vec![txn(vec![write(0, 0, 0, 1, 1)])]), [Ok(())]);
    let mut done = Vec::new();
    // A record under way, so that what follows shares the next one.
    store.start(1, Work::Commit(vec![txn(vec![write(1, 0, 0, 1, 9)])]));
    store.progress(&mut done);
    store.start(2, Work::Commit(vec![txn(vec![write(0, 1, 5, 1, 2)])]));
    let (first_block, block_count) = (0, 1);
    let (object, below) = (object(0, 0), Vec::new());
    store.start(3, Work::Read { pg: PG, object, below, first_block, block_count, pending: false });
    store.start(4, Work::Commit(vec![txn(vec![write(0, 2, 0, 1, 3)])]));
    while store.busy() {
        store.progress(&mut done);
    }
    let found = done.iter().find_map(|(tag, d)| match (tag, d) {
        (3, Done::Read(Ok(content))) => Some(stamps(content)),
        _ => None,
    });
    assert_eq!(found, Some(blocks(0, 1, 3)));
}

#[test]
fn a_failed_write_flush_or_index_stops_the_store_for_good() {
    let (mut kinds, mut fuse) = (0, 0);
    loop {
        let disk = small_disk(64, fuse);
        let mut store = disk.open().expect("opens");
        disk.set_fuse(Some(fuse));
        let mut failed = None;
        for n in 0..12u64 {
            let whole = write(1, n, 0, 32, 3);
            let result = store.commit(vec![txn(vec![write(0, n, 0, 2, 2), whole])]).remove(0);
            let result = result.and_then(|()| store.background().map(|_| ()));
            if let Err(e) = result {
                failed = Some(e);
                break;
            }
        }
        let Some(StoreError::Fatal(why)) = failed else {
            assert_eq!(failed, None);
            break;
        };
        kinds += 1;
        // The disk is well again, but nobody knows what it holds.
        disk.set_fuse(None);
        let fatal = Err(StoreError::Fatal(why.clone()));
        assert_eq!(store.commit(vec![txn(vec![write(2, 0, 0, 1, 1)])]), std::slice::from_ref(&fatal));
        assert_eq!(read(&mut store, 0, 0, 1).map(|_| ()), fatal);
        assert_eq!(store.background().map(|_| ()), fatal);
        assert_eq!(store.list(PG, None, 1).map(|_| ()), fatal);
        fuse += 1;
    }
    assert!(kinds > 30, "only {kinds} places failed");
}

#[test]
fn a_full_disk_rolls_a_transaction_back_whole_whichever_allocation_failed() {
    for free in 0..4 {
        let disk = small_disk(JOURNAL, free);
        let mut store = disk.open().expect("opens");
        let reserve = |op| Txn { reserve: true, ..txn(vec![op]) };
        let chunks = (store.usage().capacity_bytes / u64::from(CHUNK_BYTES)) as u32;
        let kept = (u64::from(chunks) * RECOVERY_FREE_PERCENT).div_ceil(100) as u32;
        for n in 0..chunks - kept - free as u32 {
            assert_eq!(store.commit(vec![reserve(write(n, 0, 0, 1, 1))]), [Ok(())]);
        }
        let (before, usage) = (Model::of(&mut store), store.usage());
        // Small, whole, and a pending one: each takes a slot.
        let ops = vec![
            write(1000, 0, 0, 1, 2),
            write(1001, 0, 0, 32, 2),
            TxnOp::Prepare {
                object: object(1002, 0),
                base: v(0),
                version: v(1),
                content: content(&blocks(0, 3, 2)),
            },
            write(1003, 0, 0, 32, 2),
        ];
        let results = store.commit(vec![Txn { pg: PG, ops, reserve: true }, reserve(write(0, 1, 1, 1, 9))]);
        assert_eq!(results, [Err(StoreError::NoSpace), Ok(())], "{free} free");
        assert_eq!(store.usage(), usage);
        let mut expected = before;
        expected.apply(&txn(vec![write(0, 1, 1, 1, 9)]));
        assert_eq!(Model::of(&mut store), expected);
        // Space comes back, and is used again, also when it has to be waited for.
        for n in 1..4 {
            let delete = TxnOp::Delete { object: object(n, 0), prev: v(1), version: v(2) };
            assert_eq!(store.commit(vec![reserve(delete)]), [Ok(())]);
        }
        for n in 0..3 {
            assert_eq!(store.commit(vec![reserve(write(2000 + n, 0, 0, 32, 4))]), [Ok(())]);
        }
    }
}

#[test]
fn rewriting_whole_chunks_of_an_almost_full_disk_waits_for_slots_instead_of_failing() {
    let disk = small_disk(64, 3);
    let mut store = disk.open().expect("opens");
    let reserve = |op| Txn { reserve: true, ..txn(vec![op]) };
    for n in 0..90 {
        assert_eq!(store.commit(vec![reserve(write(n, 0, 0, 32, 1))]), [Ok(())]);
    }
    for round in 1..6u64 {
        for n in 0..90 {
            let result = store.commit(vec![reserve(write(n, round, 0, 32, 1 + round as u32))]);
            assert_eq!(result, [Ok(())], "round {round}, object {n}");
        }
    }
    assert_eq!(store.usage().used_bytes, 90 * u64::from(CHUNK_BYTES));
    assert_eq!(read(&mut store, 89, 0, 32), Ok(blocks(0, 32, 6)));
}

#[test]
fn a_full_journal_slows_writers_and_loses_nothing() {
    let disk = small_disk(64, 5);
    let mut store = disk.open().expect("opens");
    for n in 0..400u64 {
        store.start(n, Work::Commit(vec![txn(vec![write(0, n, (n % 64) as u32, 1, n as u32 + 1)])]));
    }
    let (mut done, mut answered) = (Vec::new(), 0);
    while answered < 400 {
        assert!(store.progress(&mut done), "nothing moves");
        assert!(store.ring.used() <= 64);
        for (tag, done) in done.drain(..) {
            assert_eq!(tag, answered);
            assert!(matches!(&done, Done::Commit(r) if r[..] == [Ok(())]), "{done:?}");
            answered += 1;
        }
    }
    assert!(store.stats().checkpoints > 10);
    let expected = (0..64).map(|b| (b, if b < 16 { 385 + b } else { 321 + b })).collect();
    assert_eq!(read(&mut store, 0, 0, 64), Ok(expected));
}

#[test]
fn a_misdirected_write_is_found_at_both_places() {
    let disk = small_disk(JOURNAL, 1);
    let mut store = disk.open().expect("opens");
    let ops = vec![write(0, 0, 0, 32, 1), write(1, 0, 0, 32, 2)];
    assert_eq!(store.commit(vec![txn(ops)]), [Ok(())]);
    // What was meant for object 1, block 3, went over object 0, block 9.
    let (meant, hit) = (slot(1) + 3, slot(0) + 9);
    disk.set_block(hit, &disk.block(meant));
    disk.set_block(meant, &vec![0; BLOCK_BYTES as usize]);
    for (object, block) in [(0, 9), (1, 3)] {
        let found = read(&mut store, object, 0, 32);
        assert!(matches!(found, Err(StoreError::Unreadable { block: b, .. }) if b == block), "{found:?}");
    }
    let mut report = FsckReport::default();
    store.check(true, &mut report);
    let found = report.problems.iter().filter(|p| p.contains("checksum mismatch")).count();
    assert_eq!(found, 2, "{report}");
}

#[test]
fn a_lying_flush_is_refused_or_leaves_an_earlier_state() {
    let (mut refused, mut earlier) = ([0; 3], 0);
    for seed in 0..90 {
        // The disk lies, the index, or both.
        let liar = seed as usize % 3;
        let disk = small_disk(64, seed);
        let mut store = disk.open().expect("opens");
        let mut states = vec![Model::default()];
        for n in 0..30u64 {
            disk.set_lying(liar != 1 && n >= seed % 20);
            disk.set_index_lying(liar != 0 && n >= seed % 20);
            let next =
                txn(vec![write(0, n, (n % 40) as u32, 2, n as u32 + 1), write(1, n, 0, 32, n as u32 + 1)]);
            let mut model = states.last().expect("a state").clone();
            assert!(model.apply(&next));
            states.push(model);
            assert_eq!(store.commit(vec![next]), [Ok(())]);
        }
        drop(store);
        disk.set_lying(false);
        disk.set_index_lying(false);
        disk.crash();
        match disk.open() {
            Err(StoreError::Fatal(_)) => refused[liar] += 1,
            Err(e) => panic!("seed {seed}: {e}"),
            Ok(mut store) => {
                // Everything served is something that was written, or a reported error.
                let (mut all, listed) = (true, store.list(PG, None, 10).expect("lists"));
                for (o, _) in listed {
                    match store.read_object(PG, o) {
                        Ok((_, content)) => _ = stamps(&content),
                        Err(StoreError::Unreadable { .. }) => all = false,
                        Err(e) => panic!("seed {seed}: {e}"),
                    }
                }
                if all {
                    let found = Model::of(&mut store);
                    assert!(states.contains(&found), "seed {seed}: a state that never was");
                    earlier += 1;
                } else {
                    refused[liar] += 1;
                }
            }
        }
    }
    println!("{refused:?} found, {earlier} in an earlier state");
    assert!(refused.iter().all(|r| *r > 5), "only {refused:?} of 30 each were found");
}

#[test]
fn a_rotten_record_with_acknowledged_ones_behind_it_is_refused() {
    let disk = small_disk(JOURNAL, 2);
    let mut store = disk.open().expect("opens");
    for n in 0..6 {
        assert_eq!(store.commit(vec![txn(vec![write(0, n, 0, 1, 1)])]), [Ok(())]);
    }
    drop(store);
    // The third record's data; each of them takes two blocks.
    disk.corrupt((32 + 2 * 2 + 1) * BLOCK_BYTES as usize);
    let result = disk.open().map(|_| ());
    assert!(matches!(&result, Err(StoreError::Fatal(why)) if why.contains("acknowledged")), "{result:?}");
}

#[test]
fn one_damaged_superblock_is_harmless_two_are_not() {
    let disk = small_disk(JOURNAL, 2);
    for at in [0, 16] {
        let mut store = disk.open().expect("opens");
        let prev = store.object(PG, object(0, 0)).expect("state").map_or(0, |s| s.version.raw());
        assert_eq!(store.commit(vec![txn(vec![write(0, prev, 0, 3, at + 1)])]), [Ok(())]);
        assert_eq!(store.background(), Ok(false));
        drop(store);
        disk.corrupt(at as usize * BLOCK_BYTES as usize + 30);
        let mut store = disk.open().expect("opens from the other");
        assert_eq!(read(&mut store, 0, 0, 3), Ok(blocks(0, 3, at + 1)));
    }
    disk.corrupt(30);
    disk.corrupt(16 * BLOCK_BYTES as usize + 30);
    assert!(matches!(disk.open().map(|_| ()), Err(StoreError::Fatal(_))));
}

#[test]
fn another_format_and_another_disks_index_are_refused() {
    let disk = small_disk(JOURNAL, 2);
    for block in super::layout::SUPERBLOCKS {
        let mut bytes = disk.block(block);
        bytes[8] = 1;
        disk.set_block(block, &bytes);
    }
    let result = disk.open().map(|_| ());
    assert!(matches!(&result, Err(StoreError::Fatal(why)) if why.contains("format 1")), "{result:?}");

    let disk = small_disk(JOURNAL, 2);
    let other = Identity { osd: OsdId(8), ..IDENTITY };
    disk.edit_index(|index| {
        index.insert(vec![kind::IDENTITY], super::layout::encode(&other).expect("encodes"));
    });
    assert!(matches!(disk.open().map(|_| ()), Err(StoreError::Fatal(_))));
}

#[test]
fn a_disk_that_hangs_stops_its_osd() {
    let (tx, rx) = channel();
    let told = Box::new(move |why| tx.send(why).expect("somebody listens"));
    let watchdog = Watchdog::with_limit(told, Duration::from_millis(20));
    watchdog.working();
    let why = rx.recv_timeout(Duration::from_secs(60)).expect("it barks");
    assert!(why.contains("not answered"), "{why}");
    // Once is enough.
    watchdog.fatal("again");
    drop(watchdog);
    assert!(rx.recv().is_err());
}

/// A disk that tries for long before it says that it cannot read something.
struct Slow {
    disk: SimDevice,
    takes: Duration,
    failed: Arc<AtomicU32>,
}

impl Device for Slow {
    fn blocks(&self) -> u64 {
        self.disk.blocks()
    }
    fn submit(&mut self, tag: u64, request: Request) {
        self.disk.submit(tag, request);
    }
    fn complete(&mut self, out: &mut Vec<Completion>) {
        self.disk.complete(out);
    }
    fn wait(&mut self) {
        self.disk.wait();
    }
    fn waker(&self) -> Waker {
        self.disk.waker()
    }
    fn read_now(&mut self, block: u64, buffer: &mut [Block]) -> io::Result<()> {
        let result = self.disk.read_now(block, buffer);
        if result.is_err() {
            self.failed.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(self.takes);
        }
        result
    }
    fn traffic(&self) -> Traffic {
        self.disk.traffic()
    }
}

/// A chunk of which these blocks cannot be read, each after `takes`.
fn slow(bad: impl IntoIterator<Item = u64>, takes: Duration) -> (ChunkStore<Slow, SimKv>, Arc<AtomicU32>) {
    let disk = small_disk(JOURNAL, 1);
    let mut store = disk.open().expect("opens");
    assert_eq!(store.commit(vec![txn(vec![write(0, 0, 0, 32, 7)])]), [Ok(())]);
    assert_eq!(store.background(), Ok(false));
    drop(store);
    bad.into_iter().for_each(|block| disk.set_unreadable(slot(0) + block, true));
    let (device, kv) = disk.parts().expect("an eventfd");
    let failed = Arc::new(AtomicU32::new(0));
    let device = Slow { disk: device, takes, failed: failed.clone() };
    (ChunkStore::open(device, kv, 2).expect("opens"), failed)
}

#[test]
fn a_disk_that_needs_long_for_each_of_many_blocks_does_answer() {
    let (store, failed) = slow((0..15).step_by(2), Duration::from_millis(300));
    let (fatal, said) = channel();
    let watchdog = Watchdog::with_limit(Box::new(move |why| _ = fatal.send(why)), Duration::from_secs(1));
    let (mut worker, handle) = thread::worker(store, 8, watchdog, false);
    thread::spawn(move || _ = worker.run());
    let (tx, rx) = channel();
    handle.read(PG, object(0, 0), Vec::new(), 0, 32, move |result| _ = tx.send(result));
    let result = rx.recv().expect("an answer");
    assert!(matches!(result, Err(StoreError::Unreadable { block: 0, .. })), "{result:?}");
    assert_eq!((failed.swap(0, Ordering::Relaxed), said.try_recv().ok()), (8, None));
    // So large that what is left of the chunk is copied.
    let (tx, rx) = channel();
    handle.commit(txn(vec![write(0, 1, 15, 17, 8)]), move |result| _ = tx.send(result));
    assert_eq!(rx.recv(), Ok(Ok(())));
    assert_eq!((failed.load(Ordering::Relaxed), said.try_recv().ok()), (8, None));
}

/// Everybody waits for it: a read that has failed need not be as complete as it could be.
#[test]
fn no_read_that_fails_takes_for_ever() {
    let takes = Duration::from_millis(100);
    let (mut store, failed) = slow((0..15).step_by(2), takes);
    store.probe_max = takes * 5 / 2;
    let result = read(&mut store, 0, 0, 32);
    let Err(StoreError::Unreadable { block: 0, rest: Some(rest), .. }) = result else { panic!("{result:?}") };
    assert!((1..=3).contains(&failed.load(Ordering::Relaxed)), "{failed:?} were tried");
    // What was not tried is not served.
    assert!(rest.bad.iter().any(|(_, block, _)| *block == 31) && stamps(&rest.content).len() < 6, "{rest:?}");
    // None has failed: no time is too long.
    let (mut store, _) = slow([], takes);
    store.probe_max = Duration::ZERO;
    assert_eq!(read(&mut store, 0, 0, 32), Ok(blocks(0, 32, 7)));
}

/// A group whose keys are more than a record could name one by one.
#[test]
fn a_group_is_deleted_however_large_it_is() {
    let disk = small_disk(64, 2);
    let mut store = disk.open().expect("opens");
    let object_blocks = OBJECT_BYTES_MAX / BLOCK_BYTES;
    for n in 0..8 {
        for first_block in (0..object_blocks).step_by(1024) {
            let step = u64::from(first_block / 1024);
            let zero = TxnOp::Zero {
                object: object(n, 0),
                prev: v(step),
                version: v(step + 1),
                first_block,
                block_count: 1024,
                discard: true,
            };
            assert_eq!(store.commit(vec![txn(vec![zero])]), [Ok(())]);
        }
    }
    assert_eq!(store.commit(vec![txn(vec![TxnOp::RemovePg])]), [Ok(())]);
    assert_eq!((store.usage().objects, store.list(PG, None, 10)), (0, Ok(Vec::new())));
    drop(store);
    let report = disk.fsck(true);
    assert!(report.is_clean() && report.objects == 0, "{report}");
}
