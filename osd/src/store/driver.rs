//! Drives a store from the task that asks it, while little is asked, and from a thread of its own otherwise.
//!
//! A request to another thread and its answer cost two switches of threads, which is a good part of a single small write. A store
//! that was asked one thing at a time for a while therefore comes to the task (*it is here*), which starts light requests itself,
//! submits them to the disk without waiting, and is told of completions by its reactor.
//!
//! ```text
//!            light requests                     every other request
//!  task ───────────────────▶ store, here ───────────────────────────▶ store, away: on its thread
//!       ◀─ completions ──────            ◀─── calm: one at a time, idle ───
//! ```
//!
//! The task must never wait for the disk: heartbeats and leases depend on it. So the store leaves, whole and with what is in
//! flight, before anything that could: a request that is not light (it may have to look into the index, or is large), more than
//! `HERE_MAX` requests at a time, a checkpoint that is due, a submission queue that takes no more. The watchdog watches it in
//! both places. Without io_uring a disk can only be waited for, and the store stays away.

use super::thread::{IDLE, Pause, Request, StoreHandle, Worker, spawn, worker};
use super::watchdog::Watchdog;
use super::{ConcurrentStore, Stats, StoreError, Txn, Usage, Work, uring};
use parking_lot::Mutex;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::task::{Context, Poll, Waker};
use std::time::Instant;
use tokio::io::unix::AsyncFd;

/// Requests that the task drives at a time; with more of them the thread is no detour, because it does not sleep in between.
const HERE_MAX: usize = 4;

/// What comes to the task from elsewhere: answers of the store, and the store.
struct Inbox<S: ConcurrentStore, T> {
    items: Vec<T>,
    store: Option<Box<Worker<S>>>,
    waker: Option<Waker>,
}

/// Where answers of the store are put. There is always room: who asks bounds what it asks.
pub struct Answers<S: ConcurrentStore, T>(Arc<Mutex<Inbox<S, T>>>);

impl<S: ConcurrentStore, T> Clone for Answers<S, T> {
    fn clone(&self) -> Self {
        Answers(self.0.clone())
    }
}

impl<S: ConcurrentStore, T> Answers<S, T> {
    fn new() -> Self {
        Answers(Arc::new(Mutex::new(Inbox { items: Vec::new(), store: None, waker: None })))
    }

    pub fn put(&self, item: T) {
        let mut inbox = self.0.lock();
        inbox.items.push(item);
        let waker = inbox.waker.take();
        drop(inbox);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn take_back(&self) -> Option<Box<Worker<S>>> {
        self.0.lock().store.take()
    }

    fn give_back(&self, store: Box<Worker<S>>) {
        let mut inbox = self.0.lock();
        inbox.store = Some(store);
        let waker = inbox.waker.take();
        drop(inbox);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The store while it is here.
struct Here<S: ConcurrentStore> {
    worker: Box<Worker<S>>,
    completions: AsyncFd<OwnedFd>,
    /// Something was started and not taken on yet.
    started: bool,
    /// The task has let others run since.
    yielded: bool,
    idle_since: Option<Instant>,
}

/// See the module docs. `T` is what answers are turned into.
pub struct StoreDriver<S: ConcurrentStore, T> {
    handle: StoreHandle,
    visits: Sender<Box<Worker<S>>>,
    answers: Answers<S, T>,
    here: Option<Here<S>>,
    done: Vec<(u64, super::Done)>,
}

impl<S: ConcurrentStore + 'static, T: Send + 'static> StoreDriver<S, T> {
    /// `queue_len` bounds the requests that wait. `on_fatal` is called once, with the reason, when the store has stopped for good.
    pub fn spawn(store: S, queue_len: usize, on_fatal: impl FnOnce(String) + Send + 'static) -> Self {
        Self::with_watchdog(store, queue_len, Watchdog::new(Box::new(on_fatal)))
    }

    pub(super) fn with_watchdog(store: S, queue_len: usize, watchdog: Watchdog) -> Self {
        let comes = store.completions().is_some();
        let (worker, handle) = worker(store, queue_len, watchdog, comes);
        let (visits, visitors) = channel::<Box<Worker<S>>>();
        let answers = Answers::new();
        let back = answers.clone();
        spawn(move || {
            while let Ok(mut worker) = visitors.recv() {
                match worker.run() {
                    Pause::Closed => return,
                    Pause::Calm => back.give_back(worker),
                }
            }
        });
        let driver = StoreDriver { handle, visits, answers, here: None, done: Vec::new() };
        driver.send_away(Box::new(worker));
        driver
    }

    /// Where the callbacks of requests put what comes of them.
    pub fn answers(&self) -> Answers<S, T> {
        self.answers.clone()
    }

    fn send_away(&self, worker: Box<Worker<S>>) {
        if let Err(gone) = self.visits.send(worker) {
            gone.0.watchdog.fatal("its thread is gone");
            // Nobody can wait for what the disk may still owe: the memory that it goes to must stay.
            std::mem::forget(gone);
        }
    }

    /// The store's thread, which has the store from now on. Answers may take until [`StoreDriver::turn`]: the store may be about to
    /// come.
    pub fn away(&mut self) -> &StoreHandle {
        if let Some(here) = self.here.take() {
            self.send_away(here.worker);
        } else if let Some(worker) = self.answers.take_back() {
            // It was to come, and nobody may take it there before there is an answer.
            self.send_away(worker);
        }
        &self.handle
    }

    #[cfg(test)]
    pub fn is_here(&self) -> bool {
        self.here.is_some()
    }

    /// As of the last group.
    pub fn usage(&self) -> Usage {
        self.handle.usage()
    }

    /// The same of what it did.
    pub fn stats(&self) -> Stats {
        self.handle.stats()
    }

    /// Makes a transaction durable.
    pub fn commit(&mut self, txn: Txn, answer: impl FnOnce(Result<(), StoreError>) + Send + 'static) {
        let Some(here) = self.here.as_mut().filter(|here| here.worker.pending() < HERE_MAX) else {
            return self.away().commit(txn, answer);
        };
        let work = Work::Commit(vec![txn]);
        let light = here.worker.store.is_light(&work);
        let Work::Commit(mut txns) = work else { unreachable!("made so above") };
        let Some(txn) = txns.pop() else { unreachable!("made so above") };
        if !light {
            return self.away().commit(txn, answer);
        }
        here.worker.begin(Request::Commit(txn, Box::new(answer)));
        here.started = true;
        here.idle_since = None;
    }

    /// Waits until [`StoreDriver::turn`] has something to do. Cancel-safe.
    pub async fn ready(&mut self) {
        poll_fn(|cx| self.poll_ready(cx)).await;
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        {
            let mut inbox = self.answers.0.lock();
            if !inbox.items.is_empty() || inbox.store.is_some() {
                return Poll::Ready(());
            }
            if !inbox.waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                inbox.waker = Some(cx.waker().clone());
            }
        }
        let Some(here) = &mut self.here else { return Poll::Pending };
        if here.started {
            if here.yielded {
                return Poll::Ready(());
            }
            // Those that send go first: the disk of this OSD is not what a write waits for longest.
            here.yielded = true;
            cx.waker().wake_by_ref();
        }
        match here.completions.poll_read_ready(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(mut guard)) => {
                guard.clear_ready();
                Poll::Ready(())
            }
            // The reactor ends: so does this task.
            Poll::Ready(Err(_)) => Poll::Pending,
        }
    }

    /// Takes the store on as far as it goes without waiting; adds what was answered to `out`.
    pub fn turn(&mut self, out: &mut Vec<T>) {
        let mut inbox = self.answers.0.lock();
        // Nobody needs to be woken for what is answered here.
        inbox.waker = None;
        let back = inbox.store.take();
        drop(inbox);
        if let Some(worker) = back {
            self.arrive(worker);
        }
        self.drive();
        out.append(&mut self.answers.0.lock().items);
    }

    /// The store comes, with what was asked while it was on its way.
    fn arrive(&mut self, mut worker: Box<Worker<S>>) {
        if let Some(request) = worker.next_request() {
            worker.begin(request);
            return self.send_away(worker);
        }
        let completions = match worker.store.completions() {
            Some(Ok(fd)) => uring::watched(fd),
            Some(Err(e)) => Err(e),
            None => return self.send_away(worker),
        };
        match completions {
            Ok(completions) => {
                let idle_since = Some(Instant::now());
                self.here = Some(Here { worker, completions, started: false, yielded: false, idle_since });
            }
            Err(error) => {
                tracing::debug!(%error, "completions of the disk cannot be watched");
                self.send_away(worker);
            }
        }
    }

    fn drive(&mut self) {
        let Some(here) = &mut self.here else { return };
        (here.started, here.yielded) = (false, false);
        while !here.worker.store.is_laborious() && here.worker.store.progress(&mut self.done) {
            here.worker.hand_out(&mut self.done);
        }
        if !here.worker.store.submit() || here.worker.store.is_laborious() {
            self.away();
        } else if !here.worker.store.busy() && here.idle_since.is_none() {
            here.worker.watchdog.idle();
            here.idle_since = Some(Instant::now());
        }
    }

    /// Called now and then: a store with something to bring to its final place does that on its thread, once it is idle for a while.
    pub fn tick(&mut self) {
        let rests = |here: &Here<S>| here.idle_since.is_some_and(|since| since.elapsed() >= IDLE);
        if self.here.as_ref().is_some_and(|here| !here.worker.settled && rests(here)) {
            self.away();
        }
    }
}

impl<S: ConcurrentStore, T> Drop for StoreDriver<S, T> {
    /// The disk may never answer: that is for the thread to wait for.
    fn drop(&mut self) {
        if let Some(here) = self.here.take()
            && let Err(gone) = self.visits.send(here.worker)
        {
            std::mem::forget(gone);
        }
    }
}
