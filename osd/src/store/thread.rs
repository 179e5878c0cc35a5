//! The one thread that owns a store: requests in order, consecutive commits made durable together.
//!
//! Requests wait in one bounded queue; callers keep to its length, otherwise they block. Every request is answered
//! exactly once through its callback, on this thread (or on the caller's, with `Fatal`, once the thread is gone).

use super::{ObjectState, PgMeta, Store, StoreError, Txn, TxnOp, Usage};
use crate::core::Listing;
use gabion_proto::blocks::Content;
use gabion_proto::ids::*;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

const GROUP_TXNS_MAX: usize = 256;
const GROUP_BYTES_MAX: usize = 16 << 20;
/// Idle for this long means that write-back disturbs nobody.
const IDLE: Duration = Duration::from_secs(1);
/// Committed bytes after which write-back takes turns with requests.
const UNSETTLED_BYTES_MAX: usize = 8 << 20;
const LIST_PAGE: usize = 4096;

type Answer<T> = Box<dyn FnOnce(Result<T, StoreError>) + Send>;

enum Request {
    Commit(Txn, Answer<()>),
    Read { pg: PgId, object: ObjectId, below: Vec<LayerId>, first: u32, count: u32, answer: Answer<Content> },
    ReadObject(PgId, ObjectId, Answer<(ObjectState, Content)>),
    List(PgId, Answer<Listing>),
    Pgs(Answer<Vec<(PgId, PgMeta)>>),
}

impl Request {
    fn fail(self, e: StoreError) {
        match self {
            Request::Commit(_, answer) => answer(Err(e)),
            Request::Read { answer, .. } => answer(Err(e)),
            Request::ReadObject(_, _, answer) => answer(Err(e)),
            Request::List(_, answer) => answer(Err(e)),
            Request::Pgs(answer) => answer(Err(e)),
        }
    }
}

/// Sends requests to the store's thread, which ends when its last handle is dropped.
#[derive(Clone)]
pub struct StoreHandle {
    requests: SyncSender<Request>,
    usage: Arc<Mutex<Usage>>,
}

impl StoreHandle {
    fn send(&self, request: Request) {
        if let Err(e) = self.requests.send(request) {
            e.0.fail(StoreError::Fatal("the store's thread is gone".into()));
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
        self.send(Request::Read { pg, object, below, first, count, answer: Box::new(answer) });
    }

    pub fn read_object(
        &self,
        pg: PgId,
        object: ObjectId,
        answer: impl FnOnce(Result<(ObjectState, Content), StoreError>) + Send + 'static,
    ) {
        self.send(Request::ReadObject(pg, object, Box::new(answer)));
    }

    pub fn list(&self, pg: PgId, answer: impl FnOnce(Result<Listing, StoreError>) + Send + 'static) {
        self.send(Request::List(pg, Box::new(answer)));
    }

    pub fn pgs(&self, answer: impl FnOnce(Result<Vec<(PgId, PgMeta)>, StoreError>) + Send + 'static) {
        self.send(Request::Pgs(Box::new(answer)));
    }

    /// As of the last group.
    pub fn usage(&self) -> Usage {
        *self.usage.lock()
    }
}

/// See the module docs.
pub struct StoreThread;

struct Worker<S: Store> {
    store: S,
    requests: Receiver<Request>,
    usage: Arc<Mutex<Usage>>,
    on_fatal: Option<Box<dyn FnOnce(String) + Send>>,
    /// Bytes committed since write-back last had nothing more to do.
    unsettled_bytes: usize,
    settled: bool,
}

impl StoreThread {
    /// Starts the thread. `on_fatal` is called once, at the first fatal error.
    pub fn spawn(
        store: impl Store + 'static,
        queue_len: usize,
        on_fatal: impl FnOnce(String) + Send + 'static,
    ) -> StoreHandle {
        let (tx, requests) = sync_channel(queue_len);
        let usage = Arc::new(Mutex::new(store.usage()));
        let handle = StoreHandle { requests: tx, usage: usage.clone() };
        let thread = Worker {
            store,
            requests,
            usage,
            on_fatal: Some(Box::new(on_fatal)),
            unsettled_bytes: 0,
            settled: false,
        };
        let spawned =
            std::thread::Builder::new().name("store".into()).spawn(move || thread.run(queue_len.max(1)));
        if let Err(e) = spawned {
            // The closure, and with it the receiver, is gone: every request answers `Fatal`.
            tracing::error!("cannot start the store's thread: {e}");
        }
        handle
    }
}

impl<S: Store> Worker<S> {
    fn run(mut self, batch_max: usize) {
        let mut waiting = VecDeque::new();
        loop {
            let first = if self.settled {
                self.requests.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                self.requests.recv_timeout(IDLE)
            };
            match first {
                Ok(request) => waiting.push_back(request),
                Err(RecvTimeoutError::Timeout) => {
                    // Goes on until there is nothing left or somebody asks for something.
                    loop {
                        self.background();
                        if self.settled {
                            break;
                        }
                        if let Ok(request) = self.requests.try_recv() {
                            waiting.push_back(request);
                            break;
                        }
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while waiting.len() < batch_max
                && let Ok(request) = self.requests.try_recv()
            {
                waiting.push_back(request);
            }
            while let Some(request) = waiting.pop_front() {
                self.serve(request, &mut waiting);
            }
            *self.usage.lock() = self.store.usage();
            if self.unsettled_bytes > UNSETTLED_BYTES_MAX {
                self.background();
            }
        }
    }

    fn background(&mut self) {
        let result = self.store.background();
        self.settled = !matches!(self.watch(result), Ok(true));
        if self.settled {
            self.unsettled_bytes = 0;
        }
    }

    fn watch<T>(&mut self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(StoreError::Fatal(why)) = &result
            && let Some(on_fatal) = self.on_fatal.take()
        {
            on_fatal(why.clone());
        }
        result
    }

    fn serve(&mut self, request: Request, waiting: &mut VecDeque<Request>) {
        match request {
            Request::Commit(txn, answer) => self.commit(txn, answer, waiting),
            Request::Read { pg, object, below, first, count, answer } => {
                let result = self.store.read(pg, object, &below, first, count);
                answer(self.watch(result));
            }
            Request::ReadObject(pg, object, answer) => {
                let result = self.store.read_object(pg, object);
                answer(self.watch(result));
            }
            Request::List(pg, answer) => {
                let result = self.list(pg);
                answer(self.watch(result));
            }
            Request::Pgs(answer) => {
                let result = self.store.pgs();
                answer(self.watch(result));
            }
        }
    }

    fn commit(&mut self, txn: Txn, answer: Answer<()>, waiting: &mut VecDeque<Request>) {
        let mut bytes = txn_bytes(&txn);
        let (mut txns, mut answers) = (vec![txn], vec![answer]);
        while txns.len() < GROUP_TXNS_MAX && bytes < GROUP_BYTES_MAX {
            match waiting.pop_front() {
                Some(Request::Commit(txn, answer)) => {
                    bytes += txn_bytes(&txn);
                    txns.push(txn);
                    answers.push(answer);
                }
                Some(other) => {
                    waiting.push_front(other);
                    break;
                }
                None => break,
            }
        }
        self.unsettled_bytes += bytes;
        self.settled = false;
        let results = self.store.commit(txns);
        *self.usage.lock() = self.store.usage();
        for (answer, result) in answers.into_iter().zip(results) {
            answer(self.watch(result));
        }
    }

    fn list(&mut self, pg: PgId) -> Result<Listing, StoreError> {
        let mut out = Listing::default();
        loop {
            let page = self.store.list(pg, out.objects.last().map(|(o, _)| *o), LIST_PAGE)?;
            let full = page.len() == LIST_PAGE;
            out.objects.extend(page);
            if !full {
                break;
            }
        }
        loop {
            let page = self.store.list_missing(pg, out.missing.last().map(|(o, _)| *o), LIST_PAGE)?;
            let full = page.len() == LIST_PAGE;
            out.missing.extend(page);
            if !full {
                return Ok(out);
            }
        }
    }
}

fn txn_bytes(txn: &Txn) -> usize {
    let content = |op: &TxnOp| match op {
        TxnOp::Write { content, .. } | TxnOp::Replace { content, .. } | TxnOp::Prepare { content, .. } => {
            content.data.len()
        }
        _ => 0,
    };
    txn.ops.iter().map(content).sum()
}
