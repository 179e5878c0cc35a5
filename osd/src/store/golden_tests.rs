//! A disk of format 4, as it was written once, is read for ever: `golden/format-4.image.gz` has its files,
//! `golden/format-4.txt` says what is in it. A change that breaks this test breaks every disk there is, and needs a new
//! format version, with images of its own.

use super::device::{Access, FileDevice};
use super::fsck_tests::{one_of_everything_with, txn};
use super::model::{ModelBlocks, PGS, object, v};
use super::recover::format_parts;
use super::rocks::RocksKv;
use super::tests::IDENTITY;
use super::*;
use crate::erasure::ShardId;
use gabion_proto::blocks::ExtentKind;
use gabion_proto::limits::BLOCK_BYTES;
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};

const IMAGE: &[u8] = include_bytes!("golden/format-4.image.gz");
const CONTENT: &str = include_str!("golden/format-4.txt");
const JOURNAL_BLOCKS: u32 = 64;
const SIZE: u64 = (32 + JOURNAL_BLOCKS as u64 + 14 * 32) * BLOCK_BYTES as u64;

/// Everything in the store, a line a fact.
fn content_of<D: device::Device, K: kv::Kv>(store: &mut Frozen<D, K>) -> String {
    let mut out = format!("{:?}\n", store.identity());
    for (pg, meta) in store.groups().expect("groups") {
        writeln!(out, "{pg}: {meta:?}").expect("writes");
    }
    let mut lines = Vec::new();
    store
        .list_objects(None, |line| {
            lines.push(line);
            Ok::<_, StoreError>(())
        })
        .expect("lists");
    for line in lines {
        writeln!(out, "{line}").expect("writes");
        let object = line.object.parse().expect("an object");
        for o in store.dump(object, line.pg.parse().ok(), false).expect("dumps") {
            for (what, content) in [("committed", Some(&o.committed)), ("pending", o.pending.as_ref())] {
                let Some(c) = content else { continue };
                let (data, zero) = (text(&c.data), text(&c.zero));
                assert_eq!(c.bad_blocks, 0, "{line}: {:?}", c.bad);
                writeln!(out, "  {what}: data {data}, zero {zero}, digest {:08x}", c.digest).expect("writes");
            }
        }
    }
    out
}

fn text(ranges: &[dump::BlockRange]) -> String {
    ranges.iter().map(|r| r.to_string()).collect::<Vec<_>>().join(" ")
}

fn unpack(into: &Path) {
    let mut all = Vec::new();
    flate2::read::GzDecoder::new(IMAGE).read_to_end(&mut all).expect("unpacks");
    let mut rest = &all[..];
    let mut take = |len: usize| {
        let (head, tail) = rest.split_at_checked(len)?;
        rest = tail;
        Some(head)
    };
    while let Some(len) = take(8) {
        let name_len = u64::from_le_bytes(len.try_into().expect("8 bytes")) as usize;
        let name = std::str::from_utf8(take(name_len).expect("a name")).expect("a name");
        let len = u64::from_le_bytes(take(8).expect("a length").try_into().expect("8 bytes")) as usize;
        let path = into.join(name);
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("makes");
        std::fs::write(path, take(len).expect("bytes")).expect("writes");
    }
}

#[test]
fn a_disk_of_format_4_is_read_as_it_was_written() {
    let dir = tempfile::tempdir().expect("temporary directory");
    unpack(dir.path());
    let report = fsck(dir.path(), true).expect("checks");
    assert!(report.is_clean() && report.notes.is_empty(), "{report}");
    assert_eq!(info(dir.path()).expect("a superblock").format_version, 4);
    let mut frozen = open_frozen(dir.path()).expect("opens for reading");
    assert_eq!(content_of(&mut frozen), CONTENT);
    drop(frozen);
    // The same once the journal has been brought to its place, and the store goes on.
    let mut store = open(dir.path()).expect("opens");
    let write =
        TxnOp::Write { object: object(50, 0), prev: v(0), version: v(1), content: content(&[(0, 1)].into()) };
    assert_eq!(store.commit(vec![txn(vec![write.clone()])]), [Ok(())]);
    assert_eq!(store.commit(vec![txn(vec![TxnOp::Purge { object: object(50, 0) }])]), [Ok(())]);
    drop(store);
    let report = fsck(dir.path(), true).expect("checks");
    assert!(report.is_clean(), "{report}");
    assert_eq!(content_of(&mut open_frozen(dir.path()).expect("opens for reading")), CONTENT);
}

#[test]
fn a_disk_of_another_format_is_refused_in_a_sentence() {
    for (version, because) in [(3, "older"), (5, "newer")] {
        let dir = tempfile::tempdir().expect("temporary directory");
        unpack(dir.path());
        let block = dir.path().join("block");
        let mut bytes = std::fs::read(&block).expect("reads");
        for at in layout::SUPERBLOCKS.map(|b| b as usize * BLOCK_BYTES as usize + 8) {
            bytes[at] = version;
        }
        std::fs::write(&block, &bytes).expect("writes");
        for result in [open(dir.path()).map(|_| ()), open_frozen(dir.path()).map(|_| ())] {
            let why = result.expect_err("is refused").to_string();
            assert!(why.contains(&format!("format {version}")) && why.contains(because), "{why}");
        }
        let report = fsck(dir.path(), false).expect("checks");
        assert!(report.problems.iter().any(|p| p.contains(because)), "{report}");
        assert!(std::fs::read(&block).expect("reads") == bytes, "the disk was changed");
    }
}

/// Blocks of one byte each, which take little room in the image.
fn content(blocks: &ModelBlocks) -> Content {
    let mut out = super::model::content(blocks);
    let mut data = Vec::with_capacity(out.data.len());
    for (block, ..) in super::model::content(blocks).data_blocks() {
        data.extend(vec![blocks[&block] as u8; BLOCK_BYTES as usize]);
    }
    let mut all = gabion_proto::blocks::block_crcs(&data).into_iter();
    for extent in &mut out.extents {
        if let ExtentKind::Data { crcs } = &mut extent.kind {
            crcs.iter_mut().for_each(|crc| *crc = all.next().expect("one for each block"));
        }
    }
    out.data = data.into();
    out
}

/// What is in the image: settled, then only in the journal.
fn write_image(store: &mut DirStore) {
    let commit = |store: &mut DirStore, pg, ops| {
        assert_eq!(store.commit(vec![Txn { pg, ops, reserve: true }]), [Ok(())]);
    };
    let shard = Some(ShardId { number: 1, k: 2, m: 1, matrix: 1 });
    let meta = PgMeta { promised: Epoch(7), activated: Epoch(6), shard, pg_count: 8 };
    let needed = Needed { version: v(3), deleted: true, uncertain: None };
    commit(store, PGS[0], one_of_everything_with(content));
    let version = Version::new(Epoch(7), 2).expect("fits");
    commit(
        store,
        PGS[1],
        vec![
            TxnOp::SetMeta(meta),
            TxnOp::Replace {
                object: object(0, 1),
                version,
                deleted: false,
                content: content(&[(0, 21), (3, 22), (4, 0), (64, 23)].into()),
            },
            TxnOp::AddMissing { object: object(1, 1), needed },
        ],
    );
    assert_eq!(store.background(), Ok(false));
    let write = |o, prev, blocks: &[(u32, u32)]| TxnOp::Write {
        object: object(o, 0),
        prev: v(prev),
        version: v(prev + 1),
        content: content(&blocks.iter().copied().collect()),
    };
    commit(store, PGS[0], vec![write(0, 1, &[(3, 31), (4, 31)])]);
    let whole: Vec<_> = (0..32).map(|b| (b, 32)).collect();
    commit(store, PGS[0], vec![write(7, 0, &whole)]);
    commit(store, PGS[0], vec![write(7, 1, &[(9, 33)]), TxnOp::ClearMissing]);
    let needed = Needed::certain(v(4), false);
    commit(store, PGS[0], vec![TxnOp::AddMissing { object: object(8, 0), needed }]);
    let prepare = TxnOp::Prepare {
        object: object(1, 0),
        base: v(2),
        version: v(5),
        content: content(&[(0, 34), (1, 0)].into()),
    };
    commit(store, PGS[0], vec![prepare]);
    commit(store, PGS[0], vec![TxnOp::CommitPending { object: object(3, 0), version: v(2) }]);
}

/// Makes the image anew: only for a new format, under a new name.
#[test]
#[ignore = "writes the golden image"]
fn make_the_image() {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/store/golden");
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut device = FileDevice::open(&dir.path().join("block"), Access::Create).expect("makes");
    device.preallocate(SIZE).expect("allocates");
    let index = dir.path().join("index");
    let mut kv = RocksKv::open(&index, true).expect("makes an index");
    format_parts(&mut device, &mut kv, IDENTITY, (SIZE, JOURNAL_BLOCKS), 0x1234_5678).expect("formats");
    drop((device, kv));
    std::fs::write(dir.path().join("lock"), []).expect("writes");
    std::fs::write(dir.path().join("disk-id"), format!("{}\n", IDENTITY.disk)).expect("writes");
    let mut store = open(dir.path()).expect("opens");
    write_image(&mut store);
    drop(store);
    let mut frozen = open_frozen(dir.path()).expect("opens for reading");
    std::fs::write(golden.join("format-4.txt"), content_of(&mut frozen)).expect("writes");
    drop(frozen);

    let mut names = vec!["block".to_owned(), "lock".into(), "disk-id".into()];
    for entry in std::fs::read_dir(&index).expect("lists") {
        let name = entry.expect("lists").file_name().into_string().expect("a name");
        // The rest is RocksDB's own notes.
        if name.ends_with(".sst") || ["CURRENT", "MANIFEST"].iter().any(|n| name.starts_with(n)) {
            names.push(format!("index/{name}"));
        }
    }
    names.sort();
    let out = std::fs::File::create(golden.join("format-4.image.gz")).expect("makes");
    let mut out = flate2::write::GzEncoder::new(out, flate2::Compression::best());
    for name in names {
        let bytes = std::fs::read(dir.path().join(&name)).expect("reads");
        let number = |n: usize| (n as u64).to_le_bytes();
        for part in [&number(name.len())[..], name.as_bytes(), &number(bytes.len()), &bytes] {
            out.write_all(part).expect("packs");
        }
    }
    out.finish().expect("packs");
}
