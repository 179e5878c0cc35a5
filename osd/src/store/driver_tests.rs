//! The store that comes to the task that asks it: what it does there never waits, and what is acknowledged there is kept.

use super::driver::StoreDriver;
use super::model::*;
use super::tests::IDENTITY;
use super::watchdog::Watchdog;
use super::*;
use gabion_proto::limits::{BLOCKS_PER_CHUNK, CHUNK_BYTES};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

const PG: PgId = PGS[0];
const PATIENCE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(5);

fn write(number: u32, prev: u64, blocks: &ModelBlocks) -> Txn {
    let (object, content) = (object(number, 0), content(blocks));
    let op = TxnOp::Write { object, prev: v(prev), version: v(prev + 1), content };
    Txn { pg: PG, ops: vec![op], reserve: false }
}

fn some_blocks(first: u32, count: u32, stamp: u32) -> ModelBlocks {
    (first..first + count).map(|b| (b, stamp)).collect()
}

/// A formatted directory with one group.
fn formatted() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temporary directory");
    format(dir.path(), 64 << 20, IDENTITY).expect("formats");
    let make = Txn { pg: PG, ops: vec![TxnOp::SetMeta(PgMeta::default())], reserve: false };
    assert_eq!(open(dir.path()).expect("opens").commit(vec![make]), [Ok(())]);
    dir
}

/// As soon as whoever had it has let go of it.
fn reopened(dir: &Path) -> DirStore {
    loop {
        match open(dir) {
            Ok(store) => break store,
            Err(StoreError::Fatal(why)) if why.contains("another process") => std::thread::yield_now(),
            Err(e) => panic!("{e}"),
        }
    }
}

/// On one thread, as in the daemon.
pub fn on_a_runtime(work: impl Future<Output = ()> + Send + 'static) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        tokio::time::timeout(PATIENCE, tokio::spawn(work)).await.expect("in time").expect("passes");
    });
}

type Driver = StoreDriver<DirStore, (u64, Result<(), StoreError>)>;

struct Load {
    driver: Driver,
    next: u64,
    expected: BTreeMap<u64, u64>,
    outcomes: Vec<(u64, Result<(), StoreError>)>,
}

impl Load {
    fn new(dir: &Path) -> Load {
        let driver = Driver::spawn(reopened(dir), 64, |why| panic!("the store stopped: {why}"));
        Load { driver, next: 0, expected: BTreeMap::new(), outcomes: Vec::new() }
    }

    fn start(&mut self, txn: Txn) {
        let (answers, number) = (self.driver.answers(), self.next);
        self.next += 1;
        self.driver.commit(txn, move |result| answers.put((number, result)));
        *self.expected.entry(number).or_default() += 1;
    }

    /// Gives the thread the time to find that it is calm.
    async fn pause(&mut self) {
        if tokio::time::timeout(PAUSE, self.driver.ready()).await.is_ok() {
            self.driver.turn(&mut self.outcomes);
        }
    }

    /// Until no more than `left` are unanswered; all must have worked, each answered once.
    async fn wait(&mut self, left: usize) {
        while self.expected.len() > left {
            self.driver.ready().await;
            self.driver.turn(&mut self.outcomes);
            for (number, result) in self.outcomes.drain(..) {
                result.expect("works");
                assert_eq!(self.expected.remove(&number), Some(1), "{number} is answered once");
            }
        }
    }
}

/// Random loads of one to eight writes at a time, small and large, with reads between; what was acknowledged is there after the
/// store was opened again.
#[test]
fn what_is_acknowledged_is_kept_wherever_the_store_was() {
    let dir = formatted();
    if let Err(e) = open_with(dir.path(), Engine::Uring) {
        println!("SKIPPED: io_uring is not permitted here: {e}");
        return;
    }
    let mut model: BTreeMap<u32, (u64, ModelBlocks)> = BTreeMap::new();
    let mut stamp = 0;
    for round in 0..3 {
        let (path, mut before) = (dir.path().to_owned(), std::mem::take(&mut model));
        let (tx, rx) = channel();
        on_a_runtime(async move {
            let mut rng = StdRng::seed_from_u64(round);
            let mut load = Load::new(&path);
            let (mut turns_here, mut left) = (0, 0);
            for _ in 0..60 {
                let depth = if rng.random_bool(0.6) { 1 } else { rng.random_range(2..=8) };
                for _ in 0..rng.random_range(8..40) {
                    let number = rng.random_range(0..6);
                    let count = if rng.random_bool(0.05) { 32 } else { rng.random_range(1..=4) };
                    let first = rng.random_range(0..70);
                    stamp += 1;
                    let (version, blocks) = before.entry(number).or_default();
                    let new = some_blocks(first, count, stamp);
                    load.start(write(number, *version, &new));
                    *version += 1;
                    blocks.extend(new);
                    let was_here = load.driver.is_here();
                    load.wait(depth - 1).await;
                    turns_here += u32::from(was_here);
                    left += u32::from(was_here && !load.driver.is_here());
                    if depth == 1 && !load.driver.is_here() {
                        load.pause().await;
                    }
                }
                if rng.random_bool(0.2) {
                    load.wait(0).await;
                    let number = rng.random_range(0..6);
                    let (tx, rx) = tokio::sync::oneshot::channel();
                    load.driver.away().read_object(PG, object(number, 0), |r| _ = tx.send(r));
                    let read = rx.await.expect("an answer");
                    if let Some((version, blocks)) = before.get(&number) {
                        let (state, content) = read.expect("reads");
                        assert_eq!((state.version, &stamps(&content)), (v(*version), blocks));
                    }
                }
            }
            load.wait(0).await;
            assert!(turns_here > 50 && left > 5, "{turns_here} writes began here, it left {left} times");
            tx.send((before, stamp)).expect("somebody waits");
        });
        (model, stamp) = rx.recv().expect("the load has ended");
        let mut store = reopened(dir.path());
        for (number, (version, blocks)) in &model {
            let (state, content) = store.read_object(PG, object(*number, 0)).expect("reads");
            assert_eq!((state.version, &stamps(&content)), (v(*version), blocks), "object {number}");
        }
    }
    let report = fsck(dir.path(), true).expect("checks");
    assert!(report.is_clean() && report.blocks_read > 0, "{report}");
}

/// An index that counts how often it is asked.
struct Counted(rocks::RocksKv, Arc<AtomicU64>);

impl kv::Kv for Counted {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, String> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.get(key)
    }
    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<kv::Pair>, String> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.scan(prefix, from, limit)
    }
    fn sweep(&self, prefix: &[u8], each: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), String> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.sweep(prefix, each)
    }
    fn start(&mut self, batch: kv::Batch) {
        self.0.start(batch);
    }
    fn poll(&mut self) -> Option<Result<(), String>> {
        self.0.poll()
    }
    fn finish(&mut self) -> Result<(), String> {
        self.0.finish()
    }
    fn set_waker(&mut self, waker: Waker) {
        self.0.set_waker(waker);
    }
}

#[test]
fn what_is_light_never_asks_the_index() {
    let dir = formatted();
    let looks = Arc::new(AtomicU64::new(0));
    let device =
        device::FileDevice::open(&dir.path().join("block"), device::Access::ReadWrite).expect("opens");
    let kv = rocks::RocksKv::open(&dir.path().join("index"), false).expect("opens");
    let mut store = ChunkStore::open(device, Counted(kv, looks.clone()), 1).expect("opens");
    let light = |store: &ChunkStore<_, _>, txn: &Txn| store.is_light(&Work::Commit(vec![txn.clone()]));

    let first = write(0, 0, &some_blocks(0, 2, 1));
    assert!(!light(&store, &first), "nothing is known of the object yet");
    assert_eq!(store.commit(vec![first]), [Ok(())]);
    let whole = BLOCKS_PER_CHUNK;
    assert!(!light(&store, &write(0, 1, &some_blocks(0, whole, 2))), "a whole chunk");
    assert!(!light(&store, &write(0, 1, &some_blocks(0, 9, 2))), "too many blocks");
    assert!(
        !light(&store, &write(0, 1, &some_blocks(whole - 1, 2, 2))),
        "nothing is known of the second chunk"
    );
    assert!(!light(&store, &write(1, 0, &some_blocks(0, 1, 2))), "nor of another object");
    let delete = TxnOp::Delete { object: object(0, 0), prev: v(1), version: v(2) };
    assert!(
        !light(&store, &Txn { pg: PG, ops: vec![delete], reserve: false }),
        "looks for all of its records"
    );

    let mut rng = StdRng::seed_from_u64(1);
    let (mut version, mut done, mut lights) = (1, Vec::new(), 0);
    for n in 0..2000u32 {
        let (block, count) = (rng.random_range(0..100), rng.random_range(1..9));
        let txn = write(0, version, &some_blocks(block, count, n + 2));
        let is_light = light(&store, &txn);
        let before = looks.load(Ordering::Relaxed);
        store.start(u64::from(n), Work::Commit(vec![txn]));
        while done.is_empty() {
            store.progress(&mut done);
        }
        if is_light {
            assert_eq!(looks.load(Ordering::Relaxed), before, "write {n} of {count} from {block} on");
            lights += 1;
        }
        let result = done.pop().map(|(_, done)| format!("{done:?}"));
        assert_eq!(result.as_deref(), Some("Commit([Ok(())])"));
        version += 1;
        if n % 500 == 499 {
            // Records go to the index, and are remembered.
            assert_eq!(store.background(), Ok(false));
        }
    }
    assert!(lights > 1900, "{lights}");

    let prepare = TxnOp::Prepare {
        object: object(0, 0),
        base: v(version),
        version: v(version + 1),
        content: content(&some_blocks(3, 1, 9)),
    };
    assert_eq!(store.commit(vec![Txn { pg: PG, ops: vec![prepare], reserve: false }]), [Ok(())]);
    let over = write(0, version, &some_blocks(0, 1, 2));
    assert!(!light(&store, &over), "the pending version's records have to be looked for");
}

/// Answers at once, and from some moment on nothing any more.
pub struct Hanging {
    broken: Arc<AtomicBool>,
    /// It still answers all but one request then, as what does not need the disk.
    from_memory: bool,
    finished: VecDeque<(u64, Done)>,
    hangs: bool,
    waker: Waker,
}

impl Store for Hanging {
    fn identity(&self) -> Identity {
        IDENTITY
    }
    fn commit(&mut self, _: Vec<Txn>) -> Vec<Result<(), StoreError>> {
        unreachable!("nobody waits here")
    }
    fn read(&mut self, _: PgId, _: ObjectId, _: &[LayerId], _: u32, _: u32) -> Result<Content, StoreError> {
        unreachable!("nobody waits here")
    }
    fn read_pending(&mut self, _: PgId, _: ObjectId, _: u32, _: u32) -> Result<Content, StoreError> {
        unreachable!("nobody waits here")
    }
    fn object(&mut self, _: PgId, _: ObjectId) -> Result<Option<ObjectState>, StoreError> {
        unreachable!("nobody waits here")
    }
    fn read_object(&mut self, _: PgId, _: ObjectId) -> Result<(ObjectState, Content), StoreError> {
        unreachable!("nobody waits here")
    }
    fn read_piece(&mut self, _: PgId, _: ObjectId, _: u32, _: u32) -> Result<Piece, StoreError> {
        unreachable!("nobody waits here")
    }
    fn place(&mut self, _: PgId, _: ObjectId, _: Content) -> Result<Placed, StoreError> {
        unreachable!("nobody waits here")
    }
    fn digest(&mut self, _: PgId, _: ObjectId) -> Result<(ObjectState, u64), StoreError> {
        unreachable!("nobody waits here")
    }
    fn list(&mut self, _: PgId, _: Option<ObjectId>, _: usize) -> Result<Vec<ListEntry>, StoreError> {
        unreachable!("nobody waits here")
    }
    fn list_missing(
        &mut self,
        _: PgId,
        _: Option<ObjectId>,
        _: usize,
    ) -> Result<Vec<(ObjectId, Needed)>, StoreError> {
        unreachable!("nobody waits here")
    }
    fn pgs(&mut self) -> Result<Vec<(PgId, PgMeta)>, StoreError> {
        if self.hangs {
            loop {
                std::thread::park();
            }
        }
        Ok(vec![(PG, PgMeta::default())])
    }
    fn meta(&mut self, _: PgId) -> Result<Option<PgMeta>, StoreError> {
        unreachable!("nobody waits here")
    }
    fn usage(&self) -> Usage {
        Usage { capacity_bytes: CHUNK_BYTES.into(), ..Usage::default() }
    }
    fn background(&mut self) -> Result<bool, StoreError> {
        Ok(false)
    }
}

impl ConcurrentStore for Hanging {
    fn start(&mut self, tag: u64, work: Work) {
        if self.broken.load(Ordering::Relaxed) && !(self.hangs && self.from_memory) {
            self.hangs = true;
            return;
        }
        let done = match work {
            Work::Commit(txns) => Done::Commit(vec![Ok(()); txns.len()]),
            Work::Read { .. } => Done::Read(Ok(Content::default())),
            _ => Done::Settled(Ok(())),
        };
        self.finished.push_back((tag, done));
    }
    fn progress(&mut self, done: &mut Vec<(u64, Done)>) -> bool {
        done.extend(self.finished.drain(..));
        !done.is_empty()
    }
    fn busy(&self) -> bool {
        self.hangs
    }
    fn wait(&mut self) {
        device::wait_readable(&self.waker);
    }
    fn stats(&self) -> Stats {
        Stats::default()
    }
    fn waker(&self) -> Waker {
        self.waker.clone()
    }
    fn set_pulse(&mut self, _: Pulse) {}
    fn completions(&self) -> Option<io::Result<OwnedFd>> {
        Some(self.waker.fd().try_clone_to_owned())
    }
    fn is_light(&self, _: &Work) -> bool {
        true
    }
    fn is_at_rest(&self) -> bool {
        !self.hangs
    }
    fn is_laborious(&self) -> bool {
        false
    }
    fn submit(&mut self) -> bool {
        true
    }
}

/// One that can be told to hang, and its driver, whose watchdog waits for a second.
pub fn hanging<T: Send + 'static>(
    from_memory: bool,
    on_fatal: impl FnOnce(String) + Send + 'static,
) -> (StoreDriver<Hanging, T>, Arc<AtomicBool>) {
    let (waker, broken) = (Waker::new().expect("a waker"), Arc::new(AtomicBool::new(false)));
    let finished = VecDeque::new();
    let store = Hanging { broken: broken.clone(), from_memory, finished, hangs: false, waker };
    let watchdog = Watchdog::with_limit(Box::new(on_fatal), Duration::from_secs(1));
    (StoreDriver::with_watchdog(store, 8, watchdog), broken)
}

/// A light one.
pub fn any_write() -> Txn {
    write(0, 0, &some_blocks(0, 1, 1))
}

fn start(driver: &mut StoreDriver<Hanging, u64>, n: u64) {
    let answers = driver.answers();
    driver.commit(any_write(), move |_| answers.put(n));
}

/// Writes until it is here.
async fn come(driver: &mut StoreDriver<Hanging, u64>) {
    let (mut out, mut n) = (Vec::new(), 0);
    while !driver.is_here() {
        start(driver, n);
        while out.is_empty() {
            driver.ready().await;
            driver.turn(&mut out);
        }
        assert_eq!(out.pop(), Some(n));
        n += 1;
        if tokio::time::timeout(PAUSE, driver.ready()).await.is_ok() {
            driver.turn(&mut out);
        }
    }
}

/// The task goes on, the watchdog speaks, and nobody waits for the disk at the end.
#[test]
fn a_disk_that_hangs_stops_nobody_else() {
    on_a_runtime(async {
        let (fatal, mut said) = tokio::sync::mpsc::unbounded_channel();
        let (mut driver, broken) = hanging(false, move |why| _ = fatal.send(why));
        come(&mut driver).await;
        broken.store(true, Ordering::Relaxed);
        start(&mut driver, 0);
        assert!(driver.is_here());
        let (mut out, mut ticks) = (Vec::new(), 0);
        let mut tick = tokio::time::interval(Duration::from_millis(5));
        let why = loop {
            tokio::select! {
                biased;
                () = driver.ready() => driver.turn(&mut out),
                _ = tick.tick() => {
                    ticks += 1;
                    driver.tick();
                }
                why = said.recv() => break why.expect("a reason"),
            }
        };
        assert!(why.contains("not answered") && ticks > 0, "{why}, {ticks} ticks");
        assert!(out.is_empty() && driver.is_here());
    });
}

/// What waits for it, and what does not need it, is no sign of life.
#[test]
fn a_disk_that_hangs_is_noticed_however_much_is_asked() {
    for (from_memory, reads) in [(false, false), (true, false), (true, true)] {
        on_a_runtime(async move {
            let (fatal, mut said) = tokio::sync::mpsc::unbounded_channel();
            let (mut driver, broken) = hanging(from_memory, move |why| _ = fatal.send(why));
            come(&mut driver).await;
            broken.store(true, Ordering::Relaxed);
            start(&mut driver, 0);
            let (mut out, mut asked) = (Vec::new(), 0);
            let mut tick = tokio::time::interval(Duration::from_millis(100));
            let why = loop {
                tokio::select! {
                    biased;
                    why = said.recv() => break why.expect("a reason"),
                    () = driver.ready() => driver.turn(&mut out),
                    _ = tick.tick() => {
                        asked += 1;
                        assert!(asked < 200, "from memory {from_memory}, reads {reads}");
                        if reads {
                            let answers = driver.answers();
                            driver.away().read(PG, object(0, 0), Vec::new(), 0, 1, move |_| answers.put(asked));
                        } else {
                            start(&mut driver, asked);
                        }
                    }
                }
            };
            assert!(why.contains("not answered") && asked > 5, "{why}, asked {asked} times");
            assert_eq!(out.is_empty(), !from_memory);
        });
    }
}

/// Reads that need nothing of the disk, one after the other for longer than the disk may be silent.
#[test]
fn a_disk_that_owes_nothing_is_not_called_silent() {
    on_a_runtime(async {
        let (fatal, mut said) = tokio::sync::mpsc::unbounded_channel();
        let (mut driver, _) = hanging::<u64>(true, move |why| _ = fatal.send(why));
        let (began, mut asked, mut answered) = (std::time::Instant::now(), 0, 0);
        let mut out = Vec::new();
        while began.elapsed() < Duration::from_secs(3) {
            while asked - answered < 1_000 {
                asked += 1;
                let (answers, n) = (driver.answers(), asked);
                driver.away().read(PG, object(0, 0), Vec::new(), 0, 1, move |_| answers.put(n));
            }
            driver.ready().await;
            driver.turn(&mut out);
            answered += out.drain(..).count() as u64;
        }
        assert!(said.try_recv().is_err(), "after {asked} reads");
        assert!(answered > 2_000, "only {answered}");
    });
}

/// Nobody takes it there before.
#[test]
fn a_store_that_is_on_its_way_back_answers() {
    on_a_runtime(async {
        let (mut driver, _) = hanging::<u64>(false, |why| panic!("{why}"));
        for _ in 0..4 {
            let (tx, rx) = tokio::sync::oneshot::channel();
            driver.away().commit(any_write(), |result| _ = tx.send(result));
            rx.await.expect("an answer").expect("works");
        }
        driver.ready().await;
        assert!(!driver.is_here());
        let (tx, rx) = tokio::sync::oneshot::channel();
        driver.away().pgs(|result| _ = tx.send(result));
        let pgs = tokio::time::timeout(Duration::from_secs(20), rx).await.expect("in time");
        assert_eq!(pgs.expect("an answer").map(|pgs| pgs.len()), Ok(1));
    });
}
