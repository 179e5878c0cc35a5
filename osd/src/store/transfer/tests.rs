//! A group comes out of a file as it went in, whole or not at all, and only where nobody is misled by it.

use super::file::{Exported, Item, Reader, Writer};
use super::*;
use crate::store::crash_tests::small_disk;
use crate::store::fsck_tests::{files, one_of_everything, txn};
use crate::store::model::*;
use crate::store::sim::{SimDisk, SimStore};
use crate::store::tests::IDENTITY;
use crate::store::*;
use gabion_proto::blocks::Content;
use proptest::collection::vec;
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

const PG: PgId = PGS[0];

fn exported(disk: &SimDisk, pg: PgId) -> Result<(Vec<u8>, Totals), TransferError> {
    let mut frozen = disk.frozen()?;
    let header = frozen.header(pg, false)?;
    frozen.export(&header, Vec::new())
}

fn imported(disk: &SimDisk, bytes: &[u8]) -> Result<SimStore, TransferError> {
    let mut store = disk.open()?;
    store.import(&mut Reader::new(bytes)?)?;
    Ok(store)
}

/// What of the model is in one group.
fn only(model: &Model, pg: PgId) -> Model {
    Model(model.0.iter().filter(|(id, _)| **id == pg).map(|(id, group)| (*id, group.clone())).collect())
}

#[test]
fn a_group_comes_out_as_it_went_in() {
    let (mut objects, mut pending, mut missing) = (0, 0, 0);
    for seed in 0..16 {
        let mut generator = Generator::new(StdRng::seed_from_u64(seed));
        let disk = small_disk(256, seed);
        let (mut store, mut model) = (disk.open().expect("opens"), Model::default());
        for step in 0..90 {
            let txn = generator.txn(&model);
            model.apply(&txn);
            store.commit(vec![txn]);
            if step == 30 {
                assert_eq!(store.background(), Ok(false));
            }
        }
        drop(store);
        for pg in PGS.into_iter().chain(FAMILY) {
            let Some(group) = model.0.get(&pg).filter(|g| g.meta.is_some()) else {
                assert!(matches!(exported(&disk, pg), Err(TransferError::Refused(_))));
                continue;
            };
            let (bytes, totals) = exported(&disk, pg).expect("exports");
            objects += totals.objects;
            missing += totals.missing;
            pending += group.objects.values().filter(|o| o.pending.is_some()).count();
            let other = small_disk(256, seed);
            let mut store = imported(&other, &bytes).expect("imports");
            let mut model = only(&model, pg);
            assert_eq!(Model::of(&mut store), model.visible(), "seed {seed}");
            assert_eq!(store.usage().objects, model.objects(), "seed {seed}");
            for o in (0..3).flat_map(|index| [object(index, 0), object(index, 1)]) {
                let read = store.read_pending(pg, o, 0, 200).expect("reads");
                assert_eq!(stamps(&read), model.read_pending(pg, o, 0, 200), "seed {seed}, {o}");
            }
            drop(store);
            let report = other.fsck(true);
            assert!(report.is_clean(), "seed {seed}: {report}");
            let (again, _) = exported(&other, pg).expect("exports");
            assert!(again == bytes, "seed {seed}: another export");
            // What was pending can still be committed, and is then the same.
            let mut store = other.open().expect("opens");
            let waiting: Vec<_> = model.0[&pg]
                .objects
                .iter()
                .filter_map(|(o, state)| Some((*o, state.pending.as_ref()?.0)))
                .collect();
            for (object, version) in waiting {
                let ops = vec![TxnOp::CommitPending { object, version: v(version) }];
                let commit = Txn { pg, ops, reserve: true };
                assert!(model.apply(&commit));
                assert_eq!(store.commit(vec![commit]), [Ok(())]);
            }
            assert_eq!(Model::of(&mut store), model.visible(), "seed {seed}, committed");
        }
    }
    assert!(objects > 20 && pending > 5 && missing > 5, "{objects}, {pending}, {missing}");
}

#[test]
fn a_crash_during_an_import_leaves_no_group_or_all_of_it() {
    let source = small_disk(256, 1);
    let mut store = source.open().expect("opens");
    assert_eq!(store.commit(vec![txn(one_of_everything())]), [Ok(())]);
    let whole = Model::of(&mut store);
    drop(store);
    let (bytes, _) = exported(&source, PG).expect("exports");
    let disk = small_disk(64, 3);
    disk.record();
    drop(imported(&disk, &bytes).expect("imports"));
    let (mut nothing, mut all) = (0, 0);
    disk.crashed_at(|at, _, crashed| {
        for sample in 0..3 {
            let disk = crashed((at as u64) << 8 | sample);
            let mut store = disk.open().expect("opens");
            if store.pgs().expect("lists").is_empty() {
                nothing += 1;
                // As the next run does.
                store.forget(PG).expect("forgets");
                assert_eq!((store.usage().used_bytes, store.usage().objects), (0, 0), "point {at}");
                drop(store);
                store = imported(&disk, &bytes).expect("imports");
            } else {
                all += 1;
            }
            assert_eq!(Model::of(&mut store), whole, "point {at}");
        }
    });
    assert!(nothing > 30 && all > 0, "{nothing}, {all}");
}

#[test]
fn an_unreadable_block_stays_unreadable_and_the_rest_is_carried_over() {
    let source = small_disk(256, 1);
    let mut store = source.open().expect("opens");
    assert_eq!(store.commit(vec![txn(one_of_everything())]), [Ok(())]);
    assert_eq!(store.background(), Ok(false));
    drop(store);
    // Two blocks of object 0, which got the first slot: one rotten, one that cannot be read.
    let slot = 32 + 256;
    source.corrupt((slot + 7) * 4096);
    source.set_unreadable(slot as u64 + 9, true);
    let (bytes, totals) = exported(&source, PG).expect("exports");
    assert_eq!(totals.bad_blocks, 2);
    let mut store = imported(&small_disk(256, 2), &bytes).expect("imports");
    for block in 0..32 {
        let read = store.read(PG, object(0, 0), &[], block, 1);
        if matches!(block, 7 | 9) {
            assert!(matches!(read, Err(StoreError::Unreadable { .. })), "{block}: {read:?}");
        } else {
            assert_eq!(stamps(&read.expect("reads")), [(block, 7)].into());
        }
    }
}

fn empty() -> Exported {
    Exported {
        object: object(0, 0),
        state: ObjectState::default(),
        committed: Content::default(),
        prepared: Content::default(),
        bad: Default::default(),
        bad_prepared: Default::default(),
    }
}

/// A small export: a block of data, zeros, a tombstone, a missing object.
fn small_export() -> Vec<u8> {
    let meta = PgMeta { promised: Epoch(3), activated: Epoch(2), shard: None, pg_count: 0 };
    let header = Header { identity: IDENTITY, pg: PG, meta, retired: true };
    let mut writer = Writer::new(Vec::new(), &header).expect("writes");
    let state = |deleted| ObjectState { version: v(4), deleted, pending: None };
    let committed = content(&[(0, 9), (1, 0)].into());
    let first = Exported { object: object(0, 0), state: state(false), committed, ..empty() };
    writer.object(&first).expect("writes");
    writer.object(&Exported { object: object(1, 0), state: state(true), ..empty() }).expect("writes");
    writer.missing(object(2, 0), &Needed::certain(v(8), false)).expect("writes");
    writer.end().expect("ends").0
}

fn read_all(bytes: &[u8]) -> Result<Vec<Item>, TransferError> {
    let mut reader = Reader::new(bytes)?;
    let mut out = Vec::new();
    while let Some(item) = reader.next()? {
        out.push(item);
    }
    Ok(out)
}

#[test]
fn a_file_cut_short_or_changed_anywhere_is_refused() {
    let whole = small_export();
    assert_eq!(read_all(&whole).expect("reads").len(), 3);
    for len in 0..whole.len() {
        let result = read_all(&whole[..len]);
        assert!(matches!(result, Err(TransferError::CutShort)), "{len} bytes: {result:?}");
    }
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        assert!(read_all(&bytes).is_err(), "byte {at}");
    }
    let longer = [&whole[..], &[0]].concat();
    assert!(matches!(read_all(&longer), Err(TransferError::Damaged(_))));
    let mut newer = whole.clone();
    newer[8] = 9;
    assert!(matches!(read_all(&newer), Err(TransferError::Version(9))));
}

/// The bytes of an export are kept by people: a change that breaks this test needs a new version.
#[test]
fn the_file_has_not_changed() {
    let bytes = small_export();
    let digest = crc32fast::hash(&bytes);
    assert_eq!(digest, GOLDEN_EXPORT, "{digest:x}");
}

const GOLDEN_EXPORT: u32 = 0x5b781bf7;

#[test]
fn what_no_store_can_have_held_is_refused() {
    let meta = PgMeta { promised: Epoch(3), activated: Epoch(2), shard: None, pg_count: 0 };
    let of = |o: Exported| {
        let header = Header { identity: IDENTITY, pg: PG, meta, retired: false };
        let mut writer = Writer::new(Vec::new(), &header).expect("writes");
        writer.object(&o).expect("writes");
        read_all(&writer.end().expect("ends").0)
    };
    let state = ObjectState { version: v(4), deleted: false, pending: None };
    let good = Exported {
        object: object(0, 0),
        state,
        committed: Content::data(0, vec![1; 4096].into()),
        ..empty()
    };
    assert!(of(good.clone()).is_ok());
    let with = |state| Exported { state, ..good.clone() };
    let mut wrong_crc = good.clone();
    wrong_crc.committed.data = vec![2; 4096].into();
    let mut known_wrong = wrong_crc.clone();
    known_wrong.bad.insert(0);
    assert!(of(known_wrong).is_ok(), "the store it came from had it no better");
    let bad = [
        ("a wrong checksum", wrong_crc),
        ("no version", with(ObjectState { version: Version::ZERO, ..state })),
        ("a tombstone with content", with(ObjectState { deleted: true, ..state })),
        ("a pending version of before", with(ObjectState { pending: Some(v(3)), ..state })),
        ("content of no pending version", Exported { prepared: good.committed.clone(), ..good.clone() }),
        ("newer than the promise", {
            with(ObjectState { version: Version::new(Epoch(4), 1).expect("fits"), ..state })
        }),
    ];
    for (what, o) in bad {
        assert!(matches!(of(o), Err(TransferError::Damaged(_))), "{what}");
    }
    let header = Header { identity: IDENTITY, pg: PG, meta, retired: false };
    let mut twice = Writer::new(Vec::new(), &header).expect("writes");
    twice.object(&good).expect("writes");
    twice.object(&good).expect("writes");
    assert!(read_all(&twice.end().expect("ends").0).is_err(), "one object twice");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_do_no_harm(bytes in vec(any::<u8>(), 0..5000)) {
        let _ = read_all(&bytes);
        let mut begun = b"GABIONEX\x01\0\0\0".to_vec();
        begun.extend_from_slice(&bytes);
        let _ = read_all(&begun);
    }

    #[test]
    fn any_record_under_a_good_checksum_does_no_harm(tag in 0u8..5, body in vec(any::<u8>(), 0..400)) {
        let meta = PgMeta { promised: Epoch(u64::MAX), activated: Epoch(2), shard: None, pg_count: 0 };
        let header = Header { identity: IDENTITY, pg: PG, meta, retired: false };
        let mut writer = Writer::new(Vec::new(), &header).expect("writes");
        writer.record(tag, &[&body]).expect("writes");
        let _ = read_all(&writer.end().expect("ends").0);
    }

    #[test]
    fn an_object_comes_back(blocks in proptest::collection::btree_map(0u32..4096, 0u32..3, 0..20), pending: bool) {
        let (committed, prepared) = (content(&blocks), content(&blocks));
        let state = ObjectState { version: v(4), deleted: false, pending: pending.then(|| v(5)) };
        let prepared = if pending { prepared } else { Content::default() };
        let o = Exported { object: object(0, 0), state, committed, prepared, ..empty() };
        let meta = PgMeta { promised: Epoch(3), activated: Epoch(2), shard: None, pg_count: 0 };
        let header = Header { identity: IDENTITY, pg: PG, meta, retired: false };
        let mut writer = Writer::new(Vec::new(), &header).expect("writes");
        writer.object(&o).expect("writes");
        let back = read_all(&writer.end().expect("ends").0).expect("reads");
        prop_assert_eq!(back, vec![Item::Object(Box::new(o))]);
    }
}

/// A source with a group, and a directory for the rest.
struct Bench {
    dir: tempfile::TempDir,
}

const SIZE: u64 = 32 << 20;

impl Bench {
    fn new() -> Bench {
        let bench = Bench { dir: tempfile::tempdir().expect("temporary directory") };
        format(&bench.at("old"), SIZE, IDENTITY).expect("formats");
        let mut store = open(&bench.at("old")).expect("opens");
        assert_eq!(store.commit(vec![txn(one_of_everything())]), [Ok(())]);
        bench
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn import(&self, change: impl FnOnce(&mut Import<'_>)) -> Result<Imported, TransferError> {
        let (data_dir, file) = (self.at("new"), self.at("group"));
        let mut wanted = Import {
            data_dir: &data_dir,
            file: &file,
            as_osd: None,
            size_bytes: None,
            source_is_gone: false,
        };
        change(&mut wanted);
        import(wanted)
    }

    fn as_osd(&self) -> Result<Imported, TransferError> {
        self.import(|w| (w.as_osd, w.size_bytes) = (Some(IDENTITY.osd), Some(SIZE)))
    }

    fn model(&self, name: &str) -> Model {
        Model::of(&mut open_frozen(&self.at(name)).expect("opens for reading").0)
    }
}

#[track_caller]
fn refuses<T: std::fmt::Debug>(result: Result<T, TransferError>, because: &str) {
    let why = result.expect_err("is refused").to_string();
    assert!(why.contains(because), "{why:?} does not say {because:?}");
}

#[test]
fn a_dead_disks_place_is_taken() {
    let bench = Bench::new();
    let whole = bench.model("old");
    refuses(export(&bench.at("old"), PGS[1], &bench.at("group"), false), "has no group");
    export(&bench.at("old"), PG, &bench.at("group"), false).expect("exports");
    refuses(export(&bench.at("old"), PG, &bench.at("group"), false), "left alone");
    refuses(bench.import(|_| {}), "there is no store");
    refuses(bench.as_osd(), "--retire");
    assert!(!bench.at("new").exists(), "a refused import made something");
    std::fs::remove_file(bench.at("group")).expect("removes");
    let (_, totals) = export(&bench.at("old"), PG, &bench.at("group"), true).expect("exports");
    assert_eq!((totals.objects, totals.missing, totals.bad_blocks), (6, 1, 0));
    refuses(bench.import(|w| w.as_osd = Some(OsdId(8))), "is of osd.7");
    refuses(bench.import(|w| w.as_osd = Some(IDENTITY.osd)), "needs --size");

    let done = bench.as_osd().expect("imports");
    assert_eq!((done.totals, done.already, done.header.identity), (totals, false, IDENTITY));
    assert_eq!(bench.model("new"), whole);
    let report = fsck(&bench.at("new"), true).expect("checks");
    assert!(report.is_clean() && report.notes.is_empty(), "{report}");
    assert_eq!(open(&bench.at("new")).expect("is served").identity(), IDENTITY);
    refuses(bench.as_osd(), "has group 1.3 already");

    // The old one is not served any more, and still read.
    let served = open(&bench.at("old")).map(|_| ());
    assert!(matches!(&served, Err(StoreError::Refused(why)) if why.contains("retired")), "{served:?}");
    let report = fsck(&bench.at("old"), true).expect("checks");
    assert!(report.is_clean() && report.notes.len() == 1, "{report}");
    std::fs::remove_file(bench.at("group")).expect("removes");
    export(&bench.at("old"), PG, &bench.at("group"), false).expect("exports again");
}

#[test]
fn another_store_is_left_alone() {
    let bench = Bench::new();
    export(&bench.at("old"), PG, &bench.at("group"), true).expect("exports");
    for (identity, because) in [
        (Identity { cluster: ClusterId([8; 16]), ..IDENTITY }, "of cluster"),
        (Identity { osd: OsdId(8), ..IDENTITY }, "would not ask it"),
        (Identity { disk: ClusterId([8; 16]), ..IDENTITY }, "would not ask it"),
    ] {
        let _ = std::fs::remove_dir_all(bench.at("new"));
        format(&bench.at("new"), SIZE, identity).expect("formats");
        refuses(bench.as_osd(), because);
        assert_eq!(bench.model("new"), Model::default());
    }
    let _ = std::fs::remove_dir_all(bench.at("new"));
    format(&bench.at("new"), SIZE, IDENTITY).expect("formats");
    let before = files(&bench.at("new"));
    let whole = std::fs::read(bench.at("group")).expect("reads");
    for len in [0, 20, whole.len() / 2, whole.len() - 1] {
        std::fs::write(bench.at("group"), &whole[..len]).expect("writes");
        refuses(bench.import(|_| {}), "in its middle");
    }
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    std::fs::write(bench.at("group"), &damaged).expect("writes");
    refuses(bench.import(|_| {}), "is damaged");
    assert_eq!(files(&bench.at("new")), before, "a refused import changed something");
    std::fs::write(bench.at("group"), &whole).expect("writes");
    let store = open(&bench.at("new")).expect("opens");
    refuses(bench.import(|_| {}), "another process");
    drop(store);
    bench.import(|_| {}).expect("imports");
}

#[test]
fn an_interrupted_import_is_seen_repeated_or_aborted() {
    let bench = Bench::new();
    export(&bench.at("old"), PG, &bench.at("group"), true).expect("exports");
    let whole = std::fs::read(bench.at("group")).expect("reads");
    let interrupt = || {
        let _ = std::fs::remove_dir_all(bench.at("new"));
        format(&bench.at("new"), SIZE, IDENTITY).expect("formats");
        write_durably(&bench.at("new"), "import", &format!("{PG}\n")).expect("writes");
        let mut store = open::open_unfinished(&bench.at("new"), Engine::Auto).expect("opens");
        let mut reader = Reader::new(&whole[..whole.len() - 60]).expect("reads");
        // What had come is committed, as in a run that dies later.
        while let Ok(Some(item)) = reader.next() {
            let Item::Object(o) = item else { continue };
            let ops = vec![TxnOp::Replace {
                object: o.object,
                version: v(1),
                deleted: o.state.deleted,
                content: o.committed,
            }];
            assert_eq!(store.commit(vec![txn(ops)]), [Ok(())]);
        }
        assert!(store.usage().objects > 0);
    };
    interrupt();
    let served = open(&bench.at("new")).map(|_| ());
    assert!(matches!(&served, Err(StoreError::Refused(why)) if why.contains("1.3")), "{served:?}");
    let report = fsck(&bench.at("new"), true).expect("checks");
    assert!(report.is_clean_but_for_strangers() && !report.is_clean() && report.notes.len() == 1, "{report}");
    refuses(export(&bench.at("new"), PG, &bench.at("half"), false), "has no group");
    bench.import(|_| {}).expect("imports");
    assert_eq!(bench.model("new"), bench.model("old"));

    interrupt();
    assert_eq!(abort(&bench.at("new")).expect("aborts"), Some(PG));
    assert_eq!(abort(&bench.at("new")).expect("nothing to abort"), None);
    assert_eq!(open(&bench.at("new")).expect("opens").usage().used_bytes, 0);

    // Only the word that it had finished is missing.
    bench.import(|_| {}).expect("imports");
    write_durably(&bench.at("new"), "import", &format!("{PG}\n")).expect("writes");
    refuses(abort(&bench.at("new")), "nothing to abort");
    write_durably(&bench.at("new"), "import", &format!("{PG}\n")).expect("writes");
    assert!(bench.import(|_| {}).expect("is done").already);
    assert_eq!(open(&bench.at("new")).map(|_| ()), Ok(()));

    // Another group's does not touch it.
    write_durably(&bench.at("new"), "import", "1.4\n").expect("writes");
    refuses(bench.import(|_| {}), "an import of group 1.4 has not finished");
}

#[test]
fn what_does_not_fit_is_taken_back() {
    let bench = Bench::new();
    let mut store = open(&bench.at("old")).expect("opens");
    for n in 0..150u32 {
        let content = content(&(0..32).map(|b| (b, n + 1)).collect());
        let write = TxnOp::Write { object: object(100 + n, 0), prev: v(0), version: v(1), content };
        assert_eq!(store.commit(vec![txn(vec![write])]), [Ok(())]);
    }
    drop(store);
    export(&bench.at("old"), PG, &bench.at("group"), true).expect("exports");
    format(&bench.at("new"), SIZE / 2, IDENTITY).expect("formats");
    refuses(bench.import(|_| {}), "no space left");
    let store = open(&bench.at("new")).expect("opens");
    assert_eq!((store.usage().used_bytes, store.usage().objects), (0, 0));
    drop(store);
    assert!(fsck(&bench.at("new"), true).expect("checks").is_clean());
}

/// One of another number of groups would have objects that others have here, and miss some that it is asked for (rule P9).
#[test]
fn a_group_of_another_division_is_refused() {
    let disk = small_disk(256, 5);
    let mut store = disk.open().expect("opens");
    let pg = |index| PgId { index, ..FAMILY[0] };
    let meta = |pg_count| PgMeta { promised: Epoch(2), activated: Epoch(1), shard: None, pg_count };
    let header =
        |index, pg_count| Header { identity: IDENTITY, pg: pg(index), meta: meta(pg_count), retired: true };
    let commit = |store: &mut SimStore, index, op| {
        let txn = Txn { pg: pg(index), ops: vec![op], reserve: true };
        assert_eq!(store.commit(vec![txn]), [Ok(())]);
    };
    assert!(store.fits(&header(1, 2)).is_ok(), "an empty store");
    for index in [0, 1] {
        commit(&mut store, index, TxnOp::SetMeta(meta(2)));
    }
    assert!(store.fits(&header(3, 2)).is_ok());
    let refused = |store: &mut SimStore, header| match store.fits(&header) {
        Err(TransferError::Refused(why)) => why,
        other => panic!("{other:?}"),
    };
    assert!(refused(&mut store, header(3, 4)).contains("one of 2"));
    commit(&mut store, 0, TxnOp::Combine { from: 2, to: 1 });
    // Of before groups were counted. What became part of another group has a home of its own, with nothing in it.
    for index in [1, 3] {
        assert!(store.fits(&header(index, 0)).is_ok());
    }
    assert_eq!(store.list(pg(1), None, 1), Ok(Vec::new()));
}
