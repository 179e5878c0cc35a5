//! The one thread that owns a store. It starts what comes in and hands out what has ended; commits that wait are made
//! durable together, reads go on meanwhile. Without work it sleeps.
//!
//! Requests wait in one bounded queue; callers keep to its length, otherwise they block. Every request is answered
//! exactly once through its callback, on this thread (or on the caller's, with `Fatal`, once the thread is gone).
//! A watchdog stops the OSD when the disk does not answer (rule S9).
//!
//! An OSD's store leaves the thread while little is asked of it: see [`super::driver`].

use super::watchdog::Watchdog;
use super::{
    ConcurrentStore, Done, ObjectState, PgMeta, Piece, Placed, Stats, StoreError, Txn, TxnOp, Usage, Waker,
    Work,
};
use crate::core::Listing;
use gabion_proto::blocks::Content;
use gabion_proto::ids::*;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

/// Requests taken at a time, so that what has ended is not kept waiting.
const TAKE_MAX: usize = 256;
/// Nor for longer than this, where each of them has to look into a slow index: what the disk has answered is a sign of life only
/// when it is taken (rule S9).
const TAKE_TIME: Duration = Duration::from_secs(1);
/// Idle for this long means that write-back disturbs nobody.
pub(super) const IDLE: Duration = Duration::from_secs(1);
/// After so many writes that came one at a time a store is calm.
const CALM_AFTER: u32 = 4;

pub(super) type Answer<T> = Box<dyn FnOnce(Result<T, StoreError>) + Send>;

pub(super) enum Request {
    Commit(Txn, Answer<()>),
    Read {
        pg: PgId,
        object: ObjectId,
        below: Vec<LayerId>,
        first: u32,
        count: u32,
        pending: bool,
        answer: Answer<Content>,
    },
    ReadObject(PgId, ObjectId, Answer<(ObjectState, Content)>),
    ReadPiece(PgId, ObjectId, (u32, u32), Answer<Piece>),
    Place(PgId, ObjectId, Content, Answer<Placed>),
    Digest(PgId, ObjectId, Answer<(ObjectState, u64)>),
    List(PgId, Answer<Listing>),
    Pgs(Answer<Vec<(PgId, PgMeta)>>),
    Settle(Answer<Stats>),
}

impl Request {
    fn fail(self, e: StoreError) {
        match self {
            Request::Commit(_, answer) => answer(Err(e)),
            Request::Read { answer, .. } => answer(Err(e)),
            Request::ReadObject(_, _, answer) => answer(Err(e)),
            Request::ReadPiece(_, _, _, answer) => answer(Err(e)),
            Request::Place(_, _, _, answer) => answer(Err(e)),
            Request::Digest(_, _, answer) => answer(Err(e)),
            Request::List(_, answer) => answer(Err(e)),
            Request::Pgs(answer) => answer(Err(e)),
            Request::Settle(answer) => answer(Err(e)),
        }
    }
}

/// Sends requests to the store's thread, which ends when its last handle is dropped.
#[derive(Clone)]
pub struct StoreHandle {
    requests: SyncSender<Request>,
    waker: Waker,
    usage: Arc<Mutex<(Usage, Stats)>>,
}

/// Why a worker stopped for now.
pub(super) enum Pause {
    /// Its handles are gone.
    Closed,
    /// So little is asked of it that whoever asks can do it.
    Calm,
}

impl StoreHandle {
    pub(super) fn send(&self, request: Request) {
        match self.requests.send(request) {
            Ok(()) => self.waker.wake(),
            Err(e) => e.0.fail(StoreError::Fatal("the store's thread is gone".into())),
        }
    }

    pub fn commit(&self, txn: Txn, answer: impl FnOnce(Result<(), StoreError>) + Send + 'static) {
        self.send(Request::Commit(txn, Box::new(answer)));
    }

    pub fn read(
        &self,
        pg: PgId,
        object: ObjectId,
        below: Vec<LayerId>,
        first: u32,
        count: u32,
        answer: impl FnOnce(Result<Content, StoreError>) + Send + 'static,
    ) {
        let (answer, pending) = (Box::new(answer), false);
        self.send(Request::Read { pg, object, below, first, count, pending, answer });
    }

    /// As [`super::Store::read_pending`].
    pub fn read_pending(
        &self,
        pg: PgId,
        object: ObjectId,
        first: u32,
        count: u32,
        answer: impl FnOnce(Result<Content, StoreError>) + Send + 'static,
    ) {
        let (answer, pending) = (Box::new(answer), true);
        self.send(Request::Read { pg, object, below: Vec::new(), first, count, pending, answer });
    }

    pub fn read_object(
        &self,
        pg: PgId,
        object: ObjectId,
        answer: impl FnOnce(Result<(ObjectState, Content), StoreError>) + Send + 'static,
    ) {
        self.send(Request::ReadObject(pg, object, Box::new(answer)));
    }

    /// As [`super::Store::read_piece`].
    pub fn read_piece(
        &self,
        pg: PgId,
        object: ObjectId,
        blocks: (u32, u32),
        answer: impl FnOnce(Result<Piece, StoreError>) + Send + 'static,
    ) {
        self.send(Request::ReadPiece(pg, object, blocks, Box::new(answer)));
    }

    /// As [`super::Store::place`].
    pub fn place(
        &self,
        pg: PgId,
        object: ObjectId,
        content: Content,
        answer: impl FnOnce(Result<Placed, StoreError>) + Send + 'static,
    ) {
        self.send(Request::Place(pg, object, content, Box::new(answer)));
    }

    /// As [`super::Store::digest`].
    pub fn digest(
        &self,
        pg: PgId,
        object: ObjectId,
        answer: impl FnOnce(Result<(ObjectState, u64), StoreError>) + Send + 'static,
    ) {
        self.send(Request::Digest(pg, object, Box::new(answer)));
    }

    pub fn list(&self, pg: PgId, answer: impl FnOnce(Result<Listing, StoreError>) + Send + 'static) {
        self.send(Request::List(pg, Box::new(answer)));
    }

    pub fn pgs(&self, answer: impl FnOnce(Result<Vec<(PgId, PgMeta)>, StoreError>) + Send + 'static) {
        self.send(Request::Pgs(Box::new(answer)));
    }

    /// Answers when everything so far is in its final place, with what the store did since it was opened.
    pub fn settle(&self, answer: impl FnOnce(Result<Stats, StoreError>) + Send + 'static) {
        self.send(Request::Settle(Box::new(answer)));
    }

    /// As of the last group.
    pub fn usage(&self) -> Usage {
        self.usage.lock().0
    }

    /// The same of what it did.
    pub fn stats(&self) -> Stats {
        self.usage.lock().1
    }
}

/// See the module docs.
pub struct StoreThread;

/// Who waits for the outcome of a started request.
enum Pending {
    Commit(Answer<()>),
    Read(Answer<Content>),
    ReadObject(Answer<(ObjectState, Content)>),
    ReadPiece(Answer<Piece>),
    Place(Answer<Placed>),
    Digest(Answer<(ObjectState, u64)>),
    Settle(Option<Answer<Stats>>),
}

/// A store with who waits for it.
pub(super) struct Worker<S: ConcurrentStore> {
    pub store: S,
    requests: Receiver<Request>,
    usage: Arc<Mutex<(Usage, Stats)>>,
    pub watchdog: Watchdog,
    pending: HashMap<u64, Pending>,
    next_tag: u64,
    /// Everything is in its final place.
    pub settled: bool,
    settling: bool,
    /// Its handles are gone.
    closed: bool,
    /// It may pause when it is calm.
    pauses: bool,
    /// Writes in a row that may have been light and came when nothing else was asked.
    calm: u32,
}

impl StoreThread {
    /// Starts the thread. `queue_len` bounds the requests that wait. `on_fatal` is called once, with the reason, when
    /// the store has stopped for good.
    pub fn spawn(
        store: impl ConcurrentStore + 'static,
        queue_len: usize,
        on_fatal: impl FnOnce(String) + Send + 'static,
    ) -> StoreHandle {
        let (mut worker, handle) = worker(store, queue_len, Watchdog::new(Box::new(on_fatal)), false);
        spawn(move || {
            worker.run();
        });
        handle
    }
}

/// Starts a thread for a store. Where that fails, what it would have run is gone, and with it the receiver of requests: every one
/// answers `Fatal`.
pub(super) fn spawn(run: impl FnOnce() + Send + 'static) {
    if let Err(e) = std::thread::Builder::new().name("store".into()).spawn(run) {
        tracing::error!("cannot start the store's thread: {e}");
    }
}

/// A store that nobody drives yet.
pub(super) fn worker<S: ConcurrentStore>(
    mut store: S,
    queue_len: usize,
    watchdog: Watchdog,
    pauses: bool,
) -> (Worker<S>, StoreHandle) {
    let (tx, requests) = sync_channel(queue_len);
    let usage = Arc::new(Mutex::new((store.usage(), store.stats())));
    let handle = StoreHandle { requests: tx, waker: store.waker(), usage: usage.clone() };
    store.set_pulse(watchdog.pulse());
    let worker = Worker {
        store,
        requests,
        usage,
        watchdog,
        pending: HashMap::new(),
        next_tag: 0,
        settled: false,
        settling: false,
        closed: false,
        pauses,
        calm: 0,
    };
    (worker, handle)
}

impl<S: ConcurrentStore> Worker<S> {
    /// Serves until its handles are gone, or until it is calm, if it pauses then.
    pub fn run(&mut self) -> Pause {
        self.calm = 0;
        let waker = self.store.waker();
        let mut done = Vec::new();
        loop {
            let (mut taken, began) = (0, Instant::now());
            while taken < TAKE_MAX && began.elapsed() < TAKE_TIME {
                match self.requests.try_recv() {
                    Ok(request) => self.begin(request),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.closed = true;
                        break;
                    }
                }
                taken += 1;
            }
            self.watchdog.working();
            let moved = self.store.progress(&mut done);
            self.hand_out(&mut done);
            if moved || taken == TAKE_MAX {
                // What was answered from memory asked nothing of the disk.
                if !self.store.busy() {
                    self.watchdog.idle();
                }
                continue;
            }
            if self.store.busy() {
                waker.arm();
                match self.requests.try_recv() {
                    Ok(request) => {
                        waker.disarm();
                        self.begin(request);
                    }
                    Err(_) => {
                        self.store.wait();
                        waker.disarm();
                    }
                }
                continue;
            }
            self.watchdog.idle();
            if self.is_calm() {
                return Pause::Calm;
            }
            if self.closed || !self.sleep() {
                return Pause::Closed;
            }
        }
    }

    /// It is idle: whether it may pause.
    fn is_calm(&self) -> bool {
        self.pauses && !self.closed && self.calm >= CALM_AFTER && self.store.is_at_rest()
    }

    /// Waits for a request, or, once nothing has come for a while, for write-back to do; false when the handles are
    /// gone.
    fn sleep(&mut self) -> bool {
        let request = if self.settled {
            self.requests.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            self.requests.recv_timeout(IDLE)
        };
        match request {
            Ok(request) => self.begin(request),
            Err(RecvTimeoutError::Timeout) => {
                self.settled = true;
                if !self.settling {
                    self.settling = true;
                    self.start(Work::Settle, Pending::Settle(None));
                }
            }
            Err(RecvTimeoutError::Disconnected) => return false,
        }
        true
    }

    fn start(&mut self, work: Work, pending: Pending) {
        self.next_tag += 1;
        self.pending.insert(self.next_tag, pending);
        self.store.start(self.next_tag, work);
    }

    pub fn begin(&mut self, request: Request) {
        self.watchdog.working();
        // Others would send a store away that has just come.
        let may_be_light =
            matches!(&request, Request::Commit(txn, _) if matches!(txn.ops[..], [TxnOp::Write { .. }]));
        self.calm = if may_be_light && self.pending.is_empty() { self.calm.saturating_add(1) } else { 0 };
        match request {
            Request::Commit(txn, answer) => {
                self.settled = false;
                self.start(Work::Commit(vec![txn]), Pending::Commit(answer));
            }
            Request::Read { pg, object, below, first, count, pending, answer } => {
                let work = Work::Read { pg, object, below, first_block: first, block_count: count, pending };
                self.start(work, Pending::Read(answer));
            }
            Request::ReadObject(pg, object, answer) => {
                self.start(Work::ReadObject { pg, object }, Pending::ReadObject(answer));
            }
            Request::ReadPiece(pg, object, (first_block, block_count), answer) => {
                let work = Work::ReadPiece { pg, object, first_block, block_count };
                self.start(work, Pending::ReadPiece(answer));
            }
            Request::Place(pg, object, content, answer) => {
                self.start(Work::Place { pg, object, content }, Pending::Place(answer));
            }
            Request::Digest(pg, object, answer) => {
                self.start(Work::Digest { pg, object }, Pending::Digest(answer));
            }
            Request::List(pg, answer) => {
                let result = self.list(pg);
                answer(self.watch(result));
            }
            Request::Settle(answer) => self.start(Work::Settle, Pending::Settle(Some(answer))),
            Request::Pgs(answer) => {
                let result = self.store.pgs();
                answer(self.watch(result));
            }
        }
    }

    /// Requests that were not answered.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// A request that came while nobody drove the store.
    pub fn next_request(&self) -> Option<Request> {
        self.requests.try_recv().ok()
    }

    pub fn hand_out(&mut self, done: &mut Vec<(u64, Done)>) {
        if !done.is_empty() {
            *self.usage.lock() = (self.store.usage(), self.store.stats());
        }
        for (tag, done) in done.drain(..) {
            match (self.pending.remove(&tag), done) {
                (Some(Pending::Commit(answer)), Done::Commit(results)) => {
                    let result = results.into_iter().next().unwrap_or(Ok(()));
                    answer(self.watch(result));
                }
                (Some(Pending::Read(answer)), Done::Read(result)) => answer(self.watch(result)),
                (Some(Pending::ReadObject(answer)), Done::ReadObject(result)) => answer(self.watch(result)),
                (Some(Pending::ReadPiece(answer)), Done::ReadPiece(result)) => answer(self.watch(result)),
                (Some(Pending::Place(answer)), Done::Place(result)) => answer(self.watch(result)),
                (Some(Pending::Digest(answer)), Done::Digest(result)) => answer(self.watch(result)),
                (Some(Pending::Settle(answer)), Done::Settled(result)) => {
                    let result = self.watch(result).map(|()| self.store.stats());
                    match answer {
                        Some(answer) => answer(result),
                        None => self.settling = false,
                    }
                }
                (_, done) => unreachable!("an outcome that nobody waits for: {done:?}"),
            }
        }
    }

    fn watch<T>(&mut self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(StoreError::Fatal(why)) = &result {
            self.watchdog.fatal(why);
        }
        result
    }

    /// In one go: pages would each begin anew in every home of the group.
    fn list(&mut self, pg: PgId) -> Result<Listing, StoreError> {
        Ok(Listing {
            meta: self.store.meta(pg)?,
            objects: self.store.list(pg, None, usize::MAX)?,
            missing: self.store.list_missing(pg, None, usize::MAX)?,
        })
    }
}
