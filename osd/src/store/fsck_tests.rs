//! What fsck must find, one injected inconsistency at a time, without opening the store; and that it finds nothing, and
//! changes nothing, where nothing is wrong.

use super::crash_tests::small_disk;
use super::layout::{self, Geometry, ObjectRecord, SUPERBLOCKS, Superblock, kind};
use super::model::*;
use super::sim::SimDisk;
use super::tests::IDENTITY;
use super::*;
use crate::erasure::{MATRIX, ShardId};
use gabion_proto::limits::*;
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::collections::BTreeMap;

const PG: PgId = PGS[0];
const JOURNAL: u32 = 256;
const META: PgMeta = PgMeta { promised: Epoch(5), activated: Epoch(4), shard: None, pg_count: 0 };

type IndexEdit = BTreeMap<Vec<u8>, Vec<u8>>;

pub fn txn(ops: Vec<TxnOp>) -> Txn {
    Txn { pg: PG, ops, reserve: false }
}

fn blocks(first: u32, count: u32, stamp: u32) -> ModelBlocks {
    (first..first + count).map(|b| (b, stamp)).collect()
}

fn write(index: u32, prev: u64, first: u32, count: u32) -> TxnOp {
    let content = content(&blocks(first, count, 7));
    TxnOp::Write { object: object(index, 0), prev: v(prev), version: v(prev + 1), content }
}

/// One of everything: a whole chunk (object 0), single blocks (1), a tombstone (2), pending blocks and zeros (3), a pending
/// chunk (4), a missing object (5), a pending version over a tombstone (6).
pub fn one_of_everything() -> Vec<TxnOp> {
    one_of_everything_with(content)
}

/// The same with other bytes for each stamp.
pub fn one_of_everything_with(content: fn(&ModelBlocks) -> Content) -> Vec<TxnOp> {
    let write = |index: u32, first, count| {
        let content = content(&blocks(first, count, 7));
        TxnOp::Write { object: object(index, 0), prev: v(0), version: v(1), content }
    };
    let prepare = |index: u32, first, count| {
        let content = content(&blocks(first, count, 8));
        TxnOp::Prepare { object: object(index, 0), base: v(1), version: v(2), content }
    };
    let delete = |index| TxnOp::Delete { object: object(index, 0), prev: v(0), version: v(1) };
    let needed = Needed { version: v(9), deleted: false, uncertain: Some(v(8)) };
    let mixed = content(&[(1, 3), (2, 0), (40, 3)].into());
    vec![
        TxnOp::SetMeta(META),
        write(0, 0, 32),
        write(1, 3, 2),
        TxnOp::Zero {
            object: object(1, 0),
            prev: v(1),
            version: v(2),
            first_block: 4,
            block_count: 9,
            discard: true,
        },
        delete(2),
        write(3, 0, 4),
        TxnOp::Prepare { object: object(3, 0), base: v(1), version: v(2), content: mixed },
        write(4, 0, 3),
        prepare(4, 0, 32),
        TxnOp::AddMissing { object: object(5, 0), needed },
        delete(6),
        prepare(6, 5, 1),
    ]
}

/// A store with [`one_of_everything`], all of it in its final place.
fn disk() -> SimDisk {
    let disk = small_disk(JOURNAL, 2);
    let mut store = disk.open().expect("opens");
    assert_eq!(store.commit(vec![txn(one_of_everything())]), [Ok(())]);
    assert_eq!(store.background(), Ok(false));
    drop(store);
    disk
}

fn key(kind: u8, index: u32, number: u32) -> Vec<u8> {
    layout::numbered_key(kind, PG, object(index, 0), number).to_vec()
}

fn object_key(kind: u8, index: u32) -> Vec<u8> {
    layout::object_key(kind, PG, object(index, 0)).to_vec()
}

fn meta_key() -> Vec<u8> {
    layout::pg_key(kind::META, PG).to_vec()
}

fn put<T: Serialize>(index: &mut IndexEdit, key: Vec<u8>, value: &T) {
    index.insert(key, layout::encode(value).expect("encodes"));
}

/// First block of the slot that a chunk has.
fn slot_block(disk: &SimDisk, kind: u8, object: u32) -> u64 {
    let mut slot = None;
    disk.edit_index(|i| slot = layout::ChunkRecord::decode(&i[&key(kind, object, 0)]).expect("a chunk").slot);
    Geometry { journal_blocks: JOURNAL, slots: 96 }.slot_block(slot.expect("a slot"))
}

/// The check finds nothing on the disk as it is, and what is expected after the change.
#[track_caller]
fn finds(what: &str, expected: &str, change: impl FnOnce(&SimDisk)) {
    let disk = disk();
    let before = disk.fsck(true);
    assert!(before.is_clean(), "before {what}: {before}");
    change(&disk);
    disk.record();
    let report = disk.fsck(true);
    assert!(
        report.problems.iter().any(|p| p.contains(expected)),
        "{what}: nothing says {expected:?}:\n{report}"
    );
    assert_eq!(disk.events(), 0, "{what}: the check changed the disk");
}

#[track_caller]
fn finds_in_index(what: &str, expected: &str, edit: impl FnOnce(&mut IndexEdit)) {
    finds(what, expected, |disk| disk.edit_index(edit));
}

#[test]
fn slots_used_twice_or_beyond_the_device() {
    finds_in_index("a slot in two objects", "is used twice", |i| {
        let chunk = i[&key(kind::CHUNK, 0, 0)].clone();
        i.insert(key(kind::CHUNK, 1, 5), chunk);
    });
    finds_in_index("a slot of a pending chunk in a committed one", "is used twice", |i| {
        let chunk = i[&key(kind::PENDING_CHUNK, 4, 0)].clone();
        i.insert(key(kind::CHUNK, 1, 5), chunk);
    });
    finds_in_index("a slot beyond the device", "beyond the device", |i| {
        i.get_mut(&key(kind::CHUNK, 0, 0)).expect("a chunk")[4] = 0xff;
    });
    finds_in_index("a chunk beyond the object", "beyond its end", |i| {
        let chunk = i.remove(&key(kind::CHUNK, 0, 0)).expect("a chunk");
        i.insert(key(kind::CHUNK, 0, OBJECT_BYTES_MAX / CHUNK_BYTES), chunk);
    });
}

#[test]
fn slots_that_nobody_can_free() {
    finds_in_index("a chunk without its object", "belongs to no version and takes slot", |i| {
        i.remove(&object_key(kind::OBJECT, 0));
    });
    finds_in_index("a chunk of a tombstone", "belongs to no version and takes slot", |i| {
        let record = ObjectRecord { version: v(2), deleted: true, pending: None };
        put(i, object_key(kind::OBJECT, 0), &record);
    });
    finds_in_index("a pending chunk without a pending version", "belongs to no version", |i| {
        put(i, object_key(kind::OBJECT, 4), &ObjectRecord { version: v(1), ..ObjectRecord::default() });
    });
    finds_in_index("objects of a group without metadata", "no metadata", |i| {
        i.remove(&meta_key());
    });
    finds_in_index("a missing entry without its group", "no metadata", |i| {
        let stranger = PgId { index: 77, ..PG };
        let key = layout::object_key(kind::MISSING, stranger, object(0, 0)).to_vec();
        put(i, key, &Needed::certain(v(1), false));
    });
}

#[test]
fn damaged_blocks() {
    finds("bit rot", "block 7, in slot", |disk| {
        disk.corrupt((slot_block(disk, kind::CHUNK, 0) as usize + 7) * BLOCK_BYTES as usize);
    });
    finds("a second damaged block of the same chunk", "block 30, in slot", |disk| {
        let first = slot_block(disk, kind::CHUNK, 0) as usize;
        disk.corrupt((first + 7) * BLOCK_BYTES as usize);
        disk.corrupt((first + 30) * BLOCK_BYTES as usize);
    });
    finds("a block that cannot be read", "cannot be read: ", |disk| {
        disk.set_unreadable(slot_block(disk, kind::CHUNK, 0) + 9, true);
    });
    finds("bit rot in a pending chunk", "block 11, in slot", |disk| {
        disk.corrupt((slot_block(disk, kind::PENDING_CHUNK, 4) as usize + 11) * BLOCK_BYTES as usize);
    });
    finds_in_index("a wrong checksum", "block 31, in slot", |i| {
        *i.get_mut(&key(kind::CHUNK, 0, 0)).expect("a chunk").last_mut().expect("bytes") ^= 1;
    });
    finds_in_index("a pending block with a wrong checksum", "pending block 1: checksum mismatch", |i| {
        *i.get_mut(&key(kind::PENDING, 3, 1)).expect("a block").last_mut().expect("bytes") ^= 1;
    });
}

#[test]
fn records_that_cannot_be_read_or_contradict_each_other() {
    finds_in_index("a chunk record cut short", "chunk record of the index is damaged", |i| {
        _ = i.get_mut(&key(kind::CHUNK, 0, 0)).expect("a chunk").pop();
    });
    finds_in_index("an object record of another version", "its record cannot be read", |i| {
        i.get_mut(&object_key(kind::OBJECT, 0)).expect("an object")[0] = 99;
    });
    finds_in_index("an object record that goes on", "its record cannot be read", |i| {
        i.get_mut(&object_key(kind::OBJECT, 0)).expect("an object").push(0);
    });
    finds_in_index("an object without a version", "has no version", |i| {
        put(i, object_key(kind::OBJECT, 0), &ObjectRecord::default());
    });
    finds_in_index("a pending version of before", "does not follow the committed one", |i| {
        let record = ObjectRecord { version: v(9), deleted: false, pending: Some(v(8)) };
        put(i, object_key(kind::OBJECT, 3), &record);
    });
    finds_in_index("a pending block without a pending version", "pending version that there is not", |i| {
        i.insert(key(kind::PENDING, 0, 3), layout::pending_zero());
    });
    finds_in_index("a pending block without a slot to go to", "no slot to go to", |i| {
        i.remove(&key(kind::CHUNK, 3, 1));
    });
    finds_in_index("an empty pending chunk", "pending chunk 0 is empty", |i| {
        i.insert(key(kind::PENDING_CHUNK, 4, 0), layout::ChunkRecord::default().encode());
    });
    finds_in_index("a chunk pending twice", "pending twice", |i| {
        i.insert(key(kind::PENDING, 4, 5), layout::pending_zero());
    });
    finds_in_index("a damaged missing entry", "missing entry cannot be read", |i| {
        i.insert(object_key(kind::MISSING, 5), vec![2, 0xff]);
    });
    for (what, key) in [
        ("a key cut short", vec![kind::OBJECT, 1, 2]),
        ("an object key with a number", key(kind::OBJECT, 0, 3)),
        ("a chunk key without a number", object_key(kind::CHUNK, 0)),
        ("a group key that goes on", object_key(kind::META, 0)),
    ] {
        finds_in_index(what, "malformed key", |i| _ = i.insert(key, vec![2]));
    }
    finds_in_index("a block of the journal in the index", "belongs into the journal", |i| {
        i.insert(key(kind::OVERLAY, 0, 3), vec![2]);
    });
    finds_in_index("an unknown kind of record", "unknown kind 'X'", |i| {
        i.insert(vec![b'X', 1], vec![2]);
    });
    finds_in_index("an identity key that goes on", "key 'I' of the index is too long", |i| {
        i.insert(vec![kind::IDENTITY, 1], vec![2]);
    });
}

#[test]
fn damaged_metadata_of_groups() {
    finds_in_index("metadata cut short", "metadata cannot be read", |i| {
        _ = i.get_mut(&meta_key()).expect("metadata").pop();
    });
    finds_in_index("metadata that goes on", "metadata cannot be read", |i| {
        i.get_mut(&meta_key()).expect("metadata").push(0);
    });
    finds_in_index("an activation without a promise", "promised only", |i| {
        put(i, meta_key(), &PgMeta { promised: Epoch(3), ..META });
    });
    finds_in_index("a lost promise", "newer than the promised interval", |i| {
        let record = ObjectRecord { version: Version::new(Epoch(6), 1).expect("fits"), ..Default::default() };
        put(i, object_key(kind::OBJECT, 0), &record);
    });
    finds_in_index("a missing entry of an interval that was not promised", "newer than the promised", |i| {
        let needed = Needed::certain(Version::new(Epoch(6), 1).expect("fits"), false);
        put(i, object_key(kind::MISSING, 0), &needed);
    });
    for shard in [
        ShardId { number: 3, k: 2, m: 1, matrix: MATRIX },
        ShardId { number: 0, k: 0, m: 1, matrix: MATRIX },
        ShardId { number: 0, k: 2, m: 1, matrix: MATRIX + 1 },
    ] {
        finds_in_index("a shard that there is not", "there is no shard", |i| {
            put(i, meta_key(), &PgMeta { shard: Some(shard), ..META });
        });
    }
}

#[test]
fn damaged_superblocks_and_journals() {
    let edit = |disk: &SimDisk, block: u64, edit: &dyn Fn(&mut Superblock)| {
        let mut superblock = Superblock::decode(&disk.block(block)).expect("intact");
        edit(&mut superblock);
        disk.set_block(block, &superblock.encode());
    };
    for block in SUPERBLOCKS {
        finds("a damaged superblock", &format!("superblock in block {block}: superblock checksum"), |disk| {
            disk.corrupt(block as usize * BLOCK_BYTES as usize + 40);
        });
        finds("superblocks of two disks", "not of one store", |disk| {
            edit(disk, block, &|s| s.identity.disk = ClusterId([9; 16]));
        });
        finds("superblocks of two clusters", "not of one store", |disk| {
            edit(disk, block, &|s| {
                s.identity.cluster = ClusterId([9; 16]);
                s.generation += 1;
            });
        });
        finds("a superblock that was not written for long", "not of one store", |disk| {
            edit(disk, block, &|s| s.generation -= 2);
        });
        finds("superblocks of one generation that differ", "not of one store", |disk| {
            edit(disk, block, &|s| s.tail.crc ^= 1);
        });
    }
    finds("two damaged superblocks", "nothing more can be checked", |disk| {
        SUPERBLOCKS.into_iter().for_each(|block| disk.corrupt(block as usize * BLOCK_BYTES as usize + 40));
    });
    finds("a disk that shrank", "the disk has", |disk| {
        SUPERBLOCKS.into_iter().for_each(|block| edit(disk, block, &|s| s.size += 1 << 30));
    });
    finds_in_index("another disk's index", "belongs to another disk", |i| {
        put(i, vec![kind::IDENTITY], &Identity { osd: OsdId(8), ..IDENTITY });
    });
    finds_in_index("an index of nobody", "not that of a store", |i| _ = i.remove(&vec![kind::IDENTITY]));
    finds_in_index("an index that is ahead of the journal", "acknowledged records are lost", |i| {
        put(i, vec![kind::APPLIED], &1_000u64);
    });
    finds_in_index("a damaged mark of the journal", "a record of the index is damaged", |i| {
        i.insert(vec![kind::APPLIED], vec![2]);
    });
    let write_more = |disk: &SimDisk| {
        let mut store = disk.open().expect("opens");
        for n in 1..7 {
            assert_eq!(store.commit(vec![txn(vec![write(0, n, 0, 1)])]), [Ok(())]);
        }
    };
    finds("a bad record in the middle of the journal", "was acknowledged: the disk lost it", |disk| {
        write_more(disk);
        // The new journal begins behind the first record of the old one.
        let tail = Superblock::decode(&disk.block(0)).expect("intact").tail.block;
        disk.corrupt((32 + tail as usize + 2 * 2 + 1) * BLOCK_BYTES as usize);
    });
    finds("a journal that cannot be read", "would be, cannot be read", |disk| {
        write_more(disk);
        let tail = Superblock::decode(&disk.block(0)).expect("intact").tail.block;
        disk.set_unreadable(32 + u64::from(tail), true);
    });
}

#[test]
fn the_last_record_that_is_not_whole_is_noted() {
    let disk = disk();
    let mut store = disk.open().expect("opens");
    for n in 1..3 {
        assert_eq!(store.commit(vec![txn(vec![write(0, n, 0, 1)])]), [Ok(())]);
    }
    drop(store);
    let tail = Superblock::decode(&disk.block(0)).expect("intact").tail.block;
    assert!(disk.fsck(true).notes.is_empty());
    disk.corrupt((32 + tail as usize + 2 + 1) * BLOCK_BYTES as usize);
    let report = disk.fsck(true);
    assert!(report.is_clean() && report.notes.len() == 1, "{report}");
}

#[derive(Clone, Debug)]
enum Damage {
    /// Other bytes in the value of some key.
    Value(usize, Vec<u8>),
    /// A bit of the value of some key.
    Bit(usize, usize),
    Key(u8, Vec<u8>, Vec<u8>),
    /// A bit of superblock, journal or slots.
    Disk(usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..40);
    let letter = proptest::sample::select(&b"IJGMOCVPQX"[..]);
    prop_oneof![
        (any::<usize>(), bytes()).prop_map(|(at, value)| Damage::Value(at, value)),
        (any::<usize>(), any::<usize>()).prop_map(|(at, bit)| Damage::Bit(at, bit)),
        (letter, bytes(), bytes()).prop_map(|(letter, key, value)| Damage::Key(letter, key, value)),
        any::<usize>().prop_map(Damage::Disk),
    ]
}

impl Damage {
    fn inflict(&self, disk: &SimDisk) {
        match self {
            Damage::Disk(at) => disk.corrupt(at % ((32 + JOURNAL as usize + 96 * 32) * 4096)),
            Damage::Key(letter, key, value) => disk.edit_index(|i| {
                let key = [&[*letter][..], key].concat();
                i.insert(key, [&[2][..], value].concat());
            }),
            Damage::Value(at, _) | Damage::Bit(at, _) => disk.edit_index(|i| {
                let count = i.len();
                let Some(found) = i.values_mut().nth(at % count) else { return };
                match self {
                    Damage::Value(_, value) => *found = value.clone(),
                    Damage::Bit(_, bit) if !found.is_empty() => {
                        let len = found.len();
                        found[bit / 8 % len] ^= 1 << (bit % 8);
                    }
                    _ => {}
                }
            }),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever a disk holds, the tools and the store say something and go on, or end with an error.
    #[test]
    fn any_damage_is_survived(all in proptest::collection::vec(damage(), 1..6), unsettled: bool) {
        let disk = disk();
        if unsettled {
            let mut store = disk.open().expect("opens");
            assert_eq!(store.commit(vec![txn(vec![write(0, 1, 3, 2), write(7, 0, 0, 32)])]), [Ok(())]);
        }
        all.iter().for_each(|damage| damage.inflict(&disk));
        let _ = disk.fsck(true).to_string();
        if let Ok(mut frozen) = disk.frozen() {
            let _ = frozen.list_objects(None, |line| {
                let _ = line.to_string();
                Ok::<_, StoreError>(())
            });
            for n in 0..8 {
                let _ = frozen.dump(object(n, 0), None, true).map(|all| all.iter().for_each(|o| _ = o.to_string()));
            }
            if let Ok(header) = frozen.header(PG, false) {
                let _ = frozen.export(&header, Vec::new());
            }
        }
        if let Ok(mut store) = disk.open() {
            let _ = store.commit(vec![txn(vec![write(20, 0, 0, 3)])]);
            let _ = store.background();
        }
    }
}

/// What is frozen shows what opening would find, whatever the journal holds.
#[test]
fn a_frozen_store_is_the_store() {
    for seed in 0..12 {
        let mut generator = Generator::new(StdRng::seed_from_u64(seed));
        let disk = small_disk([64, 256][seed as usize % 2], seed);
        let (mut store, mut model) = (disk.open().expect("opens"), Model::default());
        for step in 0..60 {
            let txn = generator.txn(&model);
            model.apply(&txn);
            store.commit(vec![txn]);
            if step % 6 != 0 {
                continue;
            }
            drop(store);
            disk.record();
            let mut frozen = disk.frozen().expect("opens for reading");
            let what = format!("seed {seed}, step {step}");
            assert_eq!(Model::of(&mut frozen.0), model.visible(), "{what}");
            for pg in PGS {
                for o in (0..3).flat_map(|index| [object(index, 0), object(index, 1)]) {
                    let read = frozen.0.read_pending(pg, o, 0, 200).expect("reads");
                    assert_eq!(stamps(&read), model.read_pending(pg, o, 0, 200), "{what}, {o}");
                }
            }
            drop(frozen);
            let report = disk.fsck(true);
            assert!(report.is_clean_but_for_strangers(), "{what}: {report}");
            assert_eq!(disk.events(), 0, "{what}: reading changed the disk");
            store = disk.open().expect("opens");
            assert_eq!(Model::of(&mut store), model.visible(), "{what}");
        }
    }
}

#[test]
fn a_frozen_store_refuses_commits() {
    let dir = tempfile::tempdir().expect("temporary directory");
    format(dir.path(), 16 << 20, IDENTITY).expect("formats");
    let mut frozen = open_frozen(dir.path()).expect("opens for reading");
    let result = frozen.0.commit(vec![txn(vec![write(0, 0, 0, 1)])]);
    assert!(matches!(result[..], [Err(StoreError::Fatal(_))]), "{result:?}");
}

/// Every file below a directory, with its content.
pub fn files(dir: &std::path::Path) -> BTreeMap<std::path::PathBuf, (u64, u32)> {
    let mut out = BTreeMap::new();
    for entry in std::fs::read_dir(dir).expect("lists") {
        let path = entry.expect("lists").path();
        if path.is_dir() {
            out.extend(files(&path));
        } else {
            let bytes = std::fs::read(&path).expect("reads");
            out.insert(path, (bytes.len() as u64, crc32fast::hash(&bytes)));
        }
    }
    out
}

#[test]
fn the_tools_change_no_file() {
    let dir = tempfile::tempdir().expect("temporary directory");
    format(dir.path(), 16 << 20, IDENTITY).expect("formats");
    let mut store = open(dir.path()).expect("opens");
    assert_eq!(store.commit(vec![txn(one_of_everything())]), [Ok(())]);
    assert_eq!(store.background(), Ok(false));
    assert_eq!(store.commit(vec![txn(vec![write(0, 1, 3, 2), write(7, 0, 0, 32)])]), [Ok(())]);
    assert!(fsck(dir.path(), false).is_err() && open_frozen(dir.path()).is_err(), "the lock is held");
    drop(store);

    let before = files(dir.path());
    let report = fsck(dir.path(), true).expect("checks");
    assert!(report.is_clean(), "{report}");
    assert_eq!((report.groups, report.objects, report.missing), (1, 7, 1));
    let mut frozen = open_frozen(dir.path()).expect("opens for reading");
    assert!(open(dir.path()).is_err(), "the lock is held");
    let shown = frozen.dump(object(0, 0), None, true).expect("dumps");
    assert_eq!(shown.len(), 1);
    assert_eq!(shown[0].committed.chunks[0].journal_blocks, 2);
    let mut listed = 0;
    frozen
        .list_objects(None, |_| {
            listed += 1;
            Ok::<_, StoreError>(())
        })
        .expect("lists");
    assert_eq!(listed, 8);
    drop(frozen);
    info(dir.path()).expect("a superblock");
    assert_eq!(files(dir.path()), before);

    std::fs::write(dir.path().join("disk-id"), format!("{}\n", ClusterId([7; 16]))).expect("writes");
    let report = fsck(dir.path(), false).expect("checks");
    assert!(report.problems.iter().any(|p| p.contains("disk-id")), "{report}");
}
