//! The store's thread over a real directory, with io_uring and without.

use super::model::*;
use super::tests::IDENTITY;
use super::thread::StoreThread;
use super::*;
use std::sync::mpsc::channel;

const PG: PgId = PGS[0];
const WRITERS: u32 = 8;
const ROUNDS: u64 = 60;

fn engines(dir: &std::path::Path) -> Vec<Engine> {
    match open_with(dir, Engine::Uring) {
        Ok(_) => vec![Engine::Uring, Engine::Plain],
        Err(e) => {
            println!("SKIPPED: io_uring is not permitted here: {e}");
            vec![Engine::Plain]
        }
    }
}

/// Each writer rewrites its own object, a different mix of small and whole chunks, and reads what it has just
/// written, all at the same time; then everything is read once more after a restart.
#[test]
fn many_writers_and_readers_at_once() {
    let dir = tempfile::tempdir().expect("temporary directory");
    format(dir.path(), 64 << 20, IDENTITY).expect("formats");
    let mut store = open(dir.path()).expect("opens");
    let make = Txn { pg: PG, ops: vec![TxnOp::SetMeta(PgMeta::default())], reserve: false };
    assert_eq!(store.commit(vec![make]), [Ok(())]);
    drop(store);
    let mut version = 0;
    for engine in engines(dir.path()) {
        let store = open_with(dir.path(), engine).expect("opens");
        let handle = StoreThread::spawn(store, 64, |why| panic!("the store stopped: {why}"));
        let mut threads = Vec::new();
        for writer in 0..WRITERS {
            let handle = handle.clone();
            threads.push(std::thread::spawn(move || {
                for round in 0..ROUNDS {
                    let (prev, stamp) = (version + round, (version + round) as u32 + 1);
                    let (first, count) = if (round + u64::from(writer)).is_multiple_of(5) {
                        (0, 32)
                    } else {
                        (round as u32 % 40, 3)
                    };
                    let blocks: ModelBlocks = (first..first + count).map(|b| (b, stamp)).collect();
                    let op = TxnOp::Write {
                        object: object(writer, 0),
                        prev: v(prev),
                        version: v(prev + 1),
                        content: content(&blocks),
                    };
                    let (tx, rx) = channel();
                    let committed = tx.clone();
                    handle.commit(Txn { pg: PG, ops: vec![op], reserve: false }, move |r| {
                        committed.send(r.map(|()| Content::default())).expect("somebody waits");
                    });
                    // Without waiting: it must see the write that was started before it.
                    handle.read(PG, object(writer, 0), Vec::new(), first, count, move |r| {
                        tx.send(r).expect("somebody waits");
                    });
                    let answers: Vec<_> = rx.iter().map(|r| r.expect("works")).collect();
                    assert_eq!(answers.len(), 2);
                    let read = answers.iter().map(stamps).find(|s| !s.is_empty()).expect("a read");
                    assert_eq!(read, blocks, "{engine:?}, writer {writer}, round {round}");
                }
            }));
        }
        threads.into_iter().for_each(|t| t.join().expect("a writer"));
        let (tx, rx) = channel();
        handle.settle(move |r| tx.send(r).expect("somebody waits"));
        let stats = rx.recv().expect("an answer").expect("settles");
        assert!(stats.records > 0 && stats.checkpoints > 0, "{stats:?}");
        assert!(stats.records < u64::from(WRITERS) * ROUNDS, "nothing was committed together: {stats:?}");
        version += ROUNDS;
        let (tx, rx) = channel();
        handle.list(PG, move |r| tx.send(r).expect("somebody waits"));
        let listing = rx.recv().expect("an answer").expect("lists");
        assert!(listing.objects.iter().all(|(_, s)| s.version == v(version)));
        assert_eq!(listing.objects.len(), WRITERS as usize);
        drop(handle);
        // The thread ends by itself; its lock says when.
        let mut store = loop {
            match open_with(dir.path(), engine) {
                Ok(store) => break store,
                Err(StoreError::Fatal(why)) if why.contains("another process") => std::thread::yield_now(),
                Err(e) => panic!("{e}"),
            }
        };
        for writer in 0..WRITERS {
            let (_, content) = store.read_object(PG, object(writer, 0)).expect("reads");
            assert!(!stamps(&content).is_empty());
        }
    }
    let report = fsck(dir.path(), true).expect("checks");
    assert!(report.is_clean() && report.blocks_read > 0, "{report}");
}
