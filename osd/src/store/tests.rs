//! The store's contract: against a model, on a real directory and through crashes at every step.

use super::sim::{SimDisk, SimStore};
use super::*;
use bytes::Bytes;
use gabion_proto::limits::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;

const PG: PgId = PgId { pool: PoolId(1), index: 3 };
pub const IDENTITY: Identity =
    Identity { cluster: ClusterId([1; 16]), osd: OsdId(7), disk: ClusterId([2; 16]) };
const BLOCK: usize = BLOCK_BYTES as usize;

fn object(index: u32) -> ObjectId {
    ObjectId { volume: VolumeId(9), index, layer: LayerId(0) }
}
fn v(raw: u64) -> Version {
    Version::from_raw(raw)
}
fn fill(byte: u8, blocks: u32) -> Bytes {
    Bytes::from(vec![byte; blocks as usize * BLOCK])
}
fn txn(op: TxnOp) -> Txn {
    Txn { pg: PG, ops: vec![op], reserve: false }
}
fn write(o: u32, prev: u64, first: u32, blocks: u32, byte: u8) -> TxnOp {
    let content = Content::data(first, fill(byte, blocks));
    TxnOp::Write { object: object(o), prev: v(prev), version: v(prev + 1), content }
}
fn sim(disk: &SimDisk) -> SimStore {
    disk.open().expect("opens")
}
pub fn new_sim(chunks: usize, seed: u64) -> SimDisk {
    let disk = SimDisk::new((chunks + 1) * CHUNK_BYTES as usize + (4 << 20), seed);
    disk.format(IDENTITY).expect("formats");
    disk
}

/// The records of its deletion are one for each kind, however much there is.
#[test]
fn a_group_of_any_size_can_be_removed() {
    let disk = super::crash_tests::small_disk(64, 1);
    let mut store = sim(&disk);
    for o in 0..16 {
        let (version, block_count) = (v(1), OBJECT_BYTES_DEFAULT / BLOCK_BYTES);
        let (object, prev) = (object(o), v(0));
        let op = TxnOp::Zero { object, prev, version, first_block: 0, block_count, discard: false };
        assert_eq!(store.commit(vec![txn(op)]), [Ok(())]);
    }
    assert_eq!(store.commit(vec![txn(TxnOp::RemovePg)]), [Ok(())]);
    assert_eq!(store.list(PG, None, 10).unwrap(), []);
    drop(store);
    assert_eq!(sim(&disk).list(PG, None, 10).unwrap(), [], "after a replay as well");
}

/// A new member of a group lacks everything, and its activation says so in one transaction, between those of others.
#[test]
fn an_activation_may_name_more_than_shares_a_record() {
    let disk = super::crash_tests::small_disk(64, 1);
    let mut store = sim(&disk);
    let activation = |objects: u32, activated| {
        let needed = Needed::certain(v(7), false);
        let missing = (0..objects).map(|o| TxnOp::AddMissing { object: object(o), needed });
        let meta = PgMeta { promised: Epoch(activated), activated: Epoch(activated), ..PgMeta::default() };
        let ops = std::iter::once(TxnOp::ClearMissing).chain(missing).chain([TxnOp::SetMeta(meta)]).collect();
        Txn { pg: PG, ops, reserve: true }
    };
    let other = |n: u64| Txn { pg: PgId { index: 9, ..PG }, ..txn(write(1, n, 0, 2, 1)) };
    // The journal is in use, wherever its head is.
    let (mut n, mut activated) = (0, 0);
    for round in 0..40 {
        let few = (0..round % 7).map(|i| other(n + i)).collect::<Vec<_>>();
        n += round % 7;
        activated += 1;
        let txns = [few, vec![activation(1_400, activated), other(n)]].concat();
        n += 1;
        let results = store.commit(txns);
        assert!(results.iter().all(Result::is_ok), "round {round}: {results:?}");
    }
    // More than this journal has room for, and nothing of it is done.
    let refused = store.commit(vec![activation(3_000, 99), other(n)]);
    assert!(matches!(refused[..], [Err(StoreError::Invalid(_)), Ok(())]), "{refused:?}");
    drop(store);
    let mut store = sim(&disk);
    assert_eq!(store.list_missing(PG, None, usize::MAX).unwrap().len(), 1_400);
    assert_eq!(store.meta(PG).unwrap().unwrap().activated, Epoch(activated));
    let settled = store.background();
    assert!(settled.is_ok());
}

#[test]
fn a_store_is_as_large_as_it_was_made_also_on_a_larger_disk() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let block = std::fs::File::create(dir.path().join("block")).expect("makes a file");
    block.set_len(256 << 20).expect("makes room");
    let size = 64 << 20;
    format(dir.path(), size, IDENTITY).expect("formats");
    let info = info(dir.path()).expect("a superblock");
    let geometry = super::layout::Geometry::for_size(size);
    assert_eq!((info.size_bytes, info.chunks), (size, geometry.slots));
    assert_eq!(info.journal_bytes, u64::from(geometry.journal_blocks) * u64::from(BLOCK_BYTES));
    let store = open(dir.path()).expect("opens");
    assert_eq!(store.usage().capacity_bytes, u64::from(geometry.slots) * u64::from(CHUNK_BYTES));
}

/// A pending version takes the slots that its commit will need: whatever becomes of it, none is kept for nothing.
#[test]
fn a_pending_version_that_goes_away_gives_its_slots_back() {
    let disk = new_sim(40, 3);
    let mut store = sim(&disk);
    let used = |store: &SimStore| store.usage().used_bytes / u64::from(CHUNK_BYTES);
    let commit = |store: &mut SimStore, op| {
        assert_eq!(store.commit(vec![txn(op)]), [Ok(())]);
        used(store)
    };
    let in_chunk = |chunk: u32| Content::data(chunk * BLOCKS_PER_CHUNK + 3, fill(7, 1));
    let prepare = |base, version, content| TxnOp::Prepare {
        object: object(1),
        base: v(base),
        version: v(version),
        content,
    };
    let rollback = || TxnOp::RollbackPending { object: object(1) };
    assert_eq!(commit(&mut store, write(1, 0, 0, 1, 1)), 1);
    assert_eq!(commit(&mut store, prepare(1, 2, in_chunk(5))), 2);
    assert_eq!(commit(&mut store, rollback()), 1);
    // The same once more, elsewhere, and whole; all of one version.
    assert_eq!(commit(&mut store, prepare(1, 3, in_chunk(5))), 2);
    assert_eq!(commit(&mut store, prepare(1, 4, in_chunk(5))), 2);
    assert_eq!(commit(&mut store, prepare(1, 5, in_chunk(6))), 2);
    assert_eq!(commit(&mut store, prepare(1, 6, Content::zero(6 * BLOCKS_PER_CHUNK, 3))), 1);
    let whole = |byte| Content::data(6 * BLOCKS_PER_CHUNK, fill(byte, BLOCKS_PER_CHUNK));
    assert_eq!(commit(&mut store, prepare(1, 7, in_chunk(6))), 2);
    assert_eq!(commit(&mut store, prepare(1, 8, whole(8))), 2);
    assert_eq!(commit(&mut store, prepare(1, 9, in_chunk(0))), 1);
    assert_eq!(commit(&mut store, prepare(1, 10, in_chunk(5))), 2);
    // It loses its base.
    assert_eq!(commit(&mut store, write(1, 1, 0, 1, 2)), 1);
    // What is committed keeps its slot, also when another version goes away.
    assert_eq!(commit(&mut store, prepare(2, 11, in_chunk(5))), 2);
    assert_eq!(commit(&mut store, TxnOp::CommitPending { object: object(1), version: v(11) }), 2);
    assert_eq!(commit(&mut store, prepare(11, 12, in_chunk(5))), 2);
    assert_eq!(commit(&mut store, rollback()), 2);
    // In one transaction.
    let ops = vec![prepare(11, 13, in_chunk(9)), rollback(), prepare(11, 14, in_chunk(9)), rollback()];
    assert_eq!(store.commit(vec![Txn { pg: PG, ops, reserve: false }]), [Ok(())]);
    assert_eq!(used(&store), 2);
    // Zeros were there before, and stay.
    let zero =
        TxnOp::Write { object: object(1), prev: v(11), version: v(15), content: Content::zero(640, 2) };
    assert_eq!(commit(&mut store, zero), 2);
    assert_eq!(commit(&mut store, prepare(15, 16, in_chunk(20))), 3);
    assert_eq!(commit(&mut store, rollback()), 2);
    let found = store.read(PG, object(1), &[], 640, 4).expect("reads");
    assert_eq!(found, Content::zero(640, 2));
    drop(store);
    for _ in 0..2 {
        let report = disk.fsck(true);
        assert!(report.is_clean_but_for_strangers() && report.chunks_used == 2, "{report}");
        assert_eq!(used(&sim(&disk)), 2);
    }
    // A slot that was lost so is found.
    let chunk = super::layout::ChunkRecord { slot: Some(30), ..Default::default() };
    let key = super::layout::numbered_key(super::layout::kind::CHUNK, PG, object(1), 7);
    disk.edit_index(|index| _ = index.insert(key.to_vec(), chunk.encode()));
    let report = disk.fsck(false);
    assert!(report.problems.iter().any(|p| p.contains("nothing in it and takes slot 30")), "{report}");
}

/// One object: version, tombstone, and a byte per block (0 is zeros).
type Model = BTreeMap<u32, (u64, bool, BTreeMap<u32, u8>)>;

fn dump(store: &mut impl Store) -> Model {
    let listed = store.list(PG, None, 1000).expect("lists");
    let each = listed.into_iter().map(|(o, state)| {
        let (_, content) = store.read_object(PG, o).expect("reads");
        content.validate(true).expect("valid");
        let mut blocks: BTreeMap<u32, u8> = content.data_blocks().map(|(b, d, _)| (b, d[0])).collect();
        for e in content.extents.iter().filter(|e| e.kind == gabion_proto::blocks::ExtentKind::Zero) {
            (e.first_block..e.first_block + e.block_count).for_each(|b| _ = blocks.insert(b, 0));
        }
        (o.index, (state.version.raw(), state.deleted, blocks))
    });
    each.collect()
}

/// A random operation, applied to the model too.
fn step(rng: &mut StdRng, model: &mut Model) -> Txn {
    let o = rng.random_range(0..4u32);
    let (prev, _, mut blocks) = model.get(&o).cloned().unwrap_or_default();
    let (first, count) = match rng.random_range(0..3) {
        0 => (rng.random_range(0..3) * BLOCKS_PER_CHUNK, BLOCKS_PER_CHUNK),
        _ => (rng.random_range(0..80), rng.random_range(1..6)),
    };
    let byte = rng.random_range(1..=255u8);
    let range = first..first + count;
    let mut deleted = false;
    let op = match rng.random_range(0..10) {
        0 => {
            (deleted, blocks) = (true, BTreeMap::new());
            TxnOp::Delete { object: object(o), prev: v(prev), version: v(prev + 1) }
        }
        1 => {
            blocks = range.map(|b| (b, byte)).collect();
            let content = Content::data(first, fill(byte, count));
            TxnOp::Replace { object: object(o), version: v(prev + 1), deleted: false, content }
        }
        2 => {
            range.for_each(|b| _ = blocks.insert(b, 0));
            TxnOp::Zero {
                object: object(o),
                prev: v(prev),
                version: v(prev + 1),
                first_block: first,
                block_count: count,
                discard: rng.random(),
            }
        }
        _ => {
            range.for_each(|b| _ = blocks.insert(b, byte));
            write(o, prev, first, count, byte)
        }
    };
    model.insert(o, (prev + 1, deleted, blocks));
    txn(op)
}

/// Commits groups until an error; returns the acknowledged model and the one of the group that failed.
fn workload(store: &mut impl Store, seed: u64, groups: usize) -> (Model, Model) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut acked = Model::new();
    for _ in 0..groups {
        let mut next = acked.clone();
        let group = (0..rng.random_range(1..4)).map(|_| step(&mut rng, &mut next)).collect();
        if store.commit(group).into_iter().any(|r| r.is_err()) {
            return (acked, next);
        }
        acked = next;
        if rng.random_range(0..3) == 0 && store.background().is_err() {
            break;
        }
    }
    (acked.clone(), acked)
}

#[test]
fn random_operations_match_the_model_and_survive_reopening() {
    for seed in 0..8 {
        let disk = new_sim(64, seed);
        let mut store = sim(&disk);
        let (acked, _) = workload(&mut store, seed, 60);
        assert_eq!(dump(&mut store), acked, "seed {seed}");
        drop(store);
        disk.crash();
        assert_eq!(dump(&mut sim(&disk)), acked, "seed {seed} after a crash");
    }
}

#[test]
fn a_crash_at_any_step_keeps_what_was_acknowledged() {
    for seed in 0..3 {
        for fuse in 0.. {
            let disk = new_sim(64, seed ^ fuse << 8);
            let mut store = sim(&disk);
            disk.set_fuse(Some(fuse));
            let (acked, next) = workload(&mut store, seed, 15);
            let dead = store.dead.is_some();
            drop(store);
            disk.crash();
            let found = dump(&mut sim(&disk));
            assert!(found == acked || found == next, "seed {seed}, fuse {fuse}");
            if !dead {
                assert!(fuse > 10, "the fuse never blew");
                break;
            }
        }
    }
}

#[test]
fn a_directory_store_keeps_its_contents() {
    let dir = tempfile::tempdir().expect("temporary directory");
    format(dir.path(), 16 << 20, IDENTITY).expect("formats");
    assert!(matches!(format(dir.path(), 16 << 20, IDENTITY), Err(StoreError::Invalid(_))));
    let mut store = open(dir.path()).expect("opens");
    assert_eq!(store.commit(vec![txn(TxnOp::SetMeta(PgMeta::default()))]), [Ok(())]);
    assert!(open(dir.path()).is_err(), "the lock is held");
    let (acked, _) = workload(&mut store, 5, 30);
    assert_eq!(dump(&mut store), acked);
    drop(store);
    let mut store = open(dir.path()).expect("opens again");
    assert_eq!((store.identity(), dump(&mut store)), (IDENTITY, acked));
    drop(store);
    let report = fsck(dir.path(), true).expect("checks");
    assert!(report.is_clean() && report.blocks_read > 0, "{report}");
    assert_eq!(info(dir.path()).expect("superblock").identity, IDENTITY);
}

#[test]
fn a_failed_transaction_leaves_no_trace_and_later_ones_go_on() {
    let disk = new_sim(64, 1);
    let mut store = sim(&disk);
    let bad = Txn { pg: PG, ops: vec![write(0, 0, 0, 32, 1), write(1, 5, 0, 1, 1)], reserve: false };
    let results = store.commit(vec![bad, txn(write(0, 0, 3, 1, 9))]);
    assert!(matches!(results[0], Err(StoreError::VersionMismatch { .. })));
    assert_eq!(results[1], Ok(()));
    assert_eq!(dump(&mut store), Model::from([(0, (1, false, BTreeMap::from([(3, 9)])))]));
    assert_eq!(store.usage().used_bytes, u64::from(CHUNK_BYTES));
}

#[test]
fn damage_is_unreadable_and_counted() {
    let disk = new_sim(64, 1);
    let mut store = sim(&disk);
    assert_eq!(store.commit(vec![txn(write(0, 0, 0, 32, 1))]), [Ok(())]);
    disk.corrupt(CHUNK_BYTES as usize + (4 << 20) + 2 * BLOCK);
    let read = store.read(PG, object(0), &[], 0, 32);
    assert!(matches!(read, Err(StoreError::Unreadable { block: 2, .. })), "{read:?}");
    assert_eq!(store.usage().checksum_errors, 1);
}

#[test]
fn space_is_kept_back_and_given_back() {
    let disk = new_sim(100, 1);
    let mut store = sim(&disk);
    let results = store.commit((0..100).map(|o| txn(write(o, 0, 0, 32, 1))).collect());
    assert_eq!(results.iter().filter(|r| r.is_ok()).count() as u64, 100 - FULL_FREE_PERCENT);
    let reserve = |o| Txn { reserve: true, ..txn(write(o, 0, 0, 32, 1)) };
    let results = store.commit((100..110).map(reserve).collect());
    assert_eq!(
        results.iter().filter(|r| r.is_ok()).count() as u64,
        FULL_FREE_PERCENT - RECOVERY_FREE_PERCENT
    );
    assert_eq!(store.commit(vec![txn(TxnOp::RemovePg)]), [Ok(())]);
    assert_eq!((store.usage().used_bytes, store.usage().objects), (0, 0));
}

#[test]
fn pending_versions_commit_and_roll_back() {
    let disk = new_sim(64, 1);
    let mut store = sim(&disk);
    let prepare = |base, version| TxnOp::Prepare {
        object: object(0),
        base: v(base),
        version: v(version),
        content: Content::data(1, fill(version as u8, 2)),
    };
    assert_eq!(store.commit(vec![txn(prepare(0, 5))]), [Ok(())]);
    assert_eq!(store.object(PG, object(0)).expect("state").and_then(|s| s.pending), Some(v(5)));
    assert_eq!(store.read(PG, object(0), &[], 0, 8), Ok(Content::default()));
    let commit = TxnOp::CommitPending { object: object(0), version: v(5) };
    let roll_back = TxnOp::RollbackPending { object: object(0) };
    let group = [commit.clone(), commit, prepare(5, 6), roll_back].map(txn).to_vec();
    assert_eq!(store.commit(group), [Ok(()), Ok(()), Ok(()), Ok(())]);
    assert_eq!(store.read(PG, object(0), &[], 0, 8), Ok(Content::data(1, fill(5, 2))));
    assert_eq!(store.object(PG, object(0)).expect("state").and_then(|s| s.pending), None);
}

#[test]
fn a_disk_that_holds_something_else_is_not_formatted() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut foreign = vec![0u8; 8 << 20];
    foreign[1080..1082].copy_from_slice(&[0x53, 0xef]); // ext4
    let block = dir.path().join("block");
    std::fs::write(&block, &foreign).expect("writes");
    assert!(matches!(format(dir.path(), 16 << 20, IDENTITY), Err(StoreError::Invalid(_))));
    assert!(std::fs::read(&block).expect("reads") == foreign, "the disk was changed");
}
